"""What agreement, skipping and the deadline cost: steps with all of it against steps without.

    python tests/measure_agreement.py [CONFIG] [--section.key=value …]

Blocks of steps of either kind alternate in one process, on the real dataset and model; the figure
is the median over pairs of blocks. CONFIG's dataset must have been prepared.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import rocket
from checkpoint import Saver
from config import load_config, run_program
from dataset import step_windows
from distributed import Lagged, clip_gradients, init_distributed, replicate, shut_down
from job import Claim, Lookout, Signals, job_end
from model import IGNORE
from run import RunLog, check_inputs

PAIRS, STEPS = 30, 40


def bare_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list, grad_clip):
    """A training step that can't stop, skip or hear of others."""
    trained = sum((targets != IGNORE).sum() for _, targets in batches)
    loss = torch.zeros(())
    for tokens, targets in batches:
        share = model(tokens, targets) / trained
        share.backward()
        loss += share.detach()
    clip_gradients(model, grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def main(arguments: list[str]) -> None:
    config, _ = load_config(arguments, usage=__doc__)
    world = init_distributed(config)
    with tempfile.TemporaryDirectory() as directory:
        config.train.out_dir, config.train.max_hours = directory, 10.0
        run_directory = Path(directory)
        inputs = check_inputs(run_directory, config, False)
        data, val_data = rocket.open_datasets(config, inputs)
        log = RunLog(run_directory, world, 10**9, 1, 1)
        log.restart_clock()
        model, optimizer = rocket.build(config, inputs, None, log, world)
        saver = Saver(run_directory, model, optimizer, config.checkpoint, world)
        claim, end = Claim(run_directory), job_end(config.train.max_hours)
        lookout = Lookout(run_directory, Signals(), claim, end, 1.0, 60.0)
        run = rocket.Run(
            config, inputs, data, val_data, model, optimizer, saver, lookout, log, world
        )
        called, norms = replicate(model, world), torch.zeros(2)
        progress, lagged = rocket.Progress(), Lagged()

        def batches(step: int) -> list[tuple[Tensor, Tensor]]:
            size = config.train.global_batch_size
            windows = step_windows(config.train.seed, step, size, data.windows)
            return list(rocket.load_batches(data, windows, config.train.micro_batch_size, world))

        def full_block(start: int) -> None:
            for step in range(start, start + STEPS):
                near = rocket.evaluation_near(progress, 10**9, config)
                votes = rocket.cast_votes(run, steps=2, evaluation=near)
                outcome = rocket.train_step(
                    called, optimizer, batches(step), 1e-4, votes, norms, config, world
                )
                progress.step += 1
                for _, values, done_at in lagged.push((step, 0.0), outcome):
                    log.count(done_at)
                    known = rocket.Outcome(*values)
                    rocket.note_skipped(run, progress, step, known, None)
                    assert rocket.stop_reason(run, known) is None
                lookout.step_done()

        def bare_block(start: int) -> None:
            optimizer.found_inf = None
            for step in range(start, start + STEPS):
                loss = bare_step(called, optimizer, batches(step), config.optimizer.grad_clip)
                world.sum(loss)

        ratios, step = [], 0
        for pair in range(PAIRS + 1):
            seconds = {}
            for block in (full_block, bare_block) if pair % 2 else (bare_block, full_block):
                start = time.perf_counter()
                block(step)
                seconds[block] = time.perf_counter() - start
                step += STEPS
            if pair:  # the first pair warms up
                ratios.append(seconds[full_block] / seconds[bare_block])
        low, middle, high = statistics.quantiles(ratios, n=4)
        low, middle, high = (f"{100 * (ratio - 1):+.2f}%" for ratio in (low, middle, high))
        print(
            f"{PAIRS} pairs of {STEPS} steps, {1000 * seconds[bare_block] / STEPS:.1f} ms a step:"
            f" {middle} (quartiles {low}, {high})"
        )
    shut_down()


run_program(main)
