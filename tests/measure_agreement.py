"""What agreement, skipping and the deadline cost: steps with all of it against steps without.

    python tests/measure_agreement.py [CONFIG] [--section.key=value …]

Steps of either kind alternate in one process, on the real dataset and model; the figure compares
their medians. CONFIG's dataset must have been prepared.
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
from config import Config, load_config, run_program
from distributed import (
    Lagged,
    World,
    autocast,
    clip_gradients,
    gradient_sync,
    init_distributed,
    replicate,
    shut_down,
)
from job import Claim, Lookout, Signals, Votes, job_end
from model import IGNORE
from run import RunLog, check_inputs

STEPS, WARM_UP = 1050, 50


def bare_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[rocket.Batch],
    config: Config,
    world: World,
) -> Tensor:
    """rocket.train_step without votes and without skipping."""
    trained = world.sum(sum((batch.targets != IGNORE).sum() for batch in batches))
    loss = torch.zeros((), device=world.device)
    for index, batch in enumerate(batches):
        with gradient_sync(model, index == len(batches) - 1):
            with autocast(model, world):
                share = model(*batch) / trained
            (share * world.size).backward()
        loss += share.detach()
    clip_gradients(model, config.optimizer.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    optimizer.found_inf = None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return world.sum(loss)


def main(arguments: list[str]) -> None:
    config, _ = load_config(arguments, usage=__doc__)
    world = init_distributed(config)
    with tempfile.TemporaryDirectory() as directory:
        config.train.out_dir, config.train.max_hours = directory, 10.0
        run_directory = Path(directory)
        inputs = check_inputs(run_directory, config, False)
        data, val_data = rocket.open_datasets(config, inputs)
        log = RunLog(run_directory, config.log, world, 10**9, 1, 1)
        log.restart_clock()
        model, optimizer = rocket.build(config, inputs, None, log, world)
        saver = Saver(run_directory, model, optimizer, config.checkpoint, lambda: None, world)
        claim, end = Claim(run_directory), job_end(config.train.max_hours)
        lookout = Lookout(run_directory, Signals(), claim, saver, end, 1.0, 60.0)
        reader = rocket.reading_thread(world)
        run = rocket.Run(
            config, inputs, data, val_data, model, optimizer, saver, lookout, log, world, reader
        )
        called, norms = replicate(model, world), torch.zeros(2)
        progress, lagged = rocket.Progress(), Lagged(lookout.while_waiting)

        def batches(step: int) -> list[rocket.Batch]:
            size = config.train.global_batch_size
            windows = data.step_windows(config.train.seed, step, size)
            read = rocket.read_batches(run, data, windows, config.train.micro_batch_size)
            return [rocket.on_device(run, *batch) for batch in read]

        def full(step: int) -> None:
            near = rocket.evaluation_near(progress, 10**9, config)
            votes = rocket.cast_votes(run, steps=2, evaluation=near)
            rows = batches(step)
            outcome = rocket.train_step(called, optimizer, rows, 1e-4, votes, norms, config, world)
            progress.step += 1
            for _, values, done_at in lagged.push((step, 0.0), outcome):
                log.count(done_at)
                loss, *votes, damage, norm = values
                known = rocket.Outcome(loss, Votes(*votes), damage, norm)
                rocket.note_skipped(run, progress, step, known)
                assert rocket.stop_reason(run, known.votes) is None
            lookout.step_done()

        def bare(step: int) -> None:
            bare_step(called, optimizer, batches(step), config, world)

        seconds = {full: [], bare: []}
        for step in range(STEPS):
            kinds = (full, bare) if step % 2 else (bare, full)
            for kind in kinds:
                start = time.perf_counter()
                kind(step)
                seconds[kind].append(time.perf_counter() - start)
        with_all, without = (statistics.median(seconds[kind][WARM_UP:]) for kind in (full, bare))
        print(
            f"median of {STEPS - WARM_UP} steps: {1000 * with_all:.2f} ms with,"
            f" {1000 * without:.2f} ms without: {100 * (with_all / without - 1):+.2f}%"
        )
    shut_down()


run_program(main)
