"""Rocket trains a Llama 2 on a prepared dataset. This is the loop: read it from top to bottom.

    python rocket.py CONFIG [--section.key=value …]
    torchrun --standalone --nproc_per_node=8 rocket.py CONFIG [--section.key=value …]

Running the same command again resumes from the newest checkpoint that verifies.
"""

from __future__ import annotations

from config import ACCEPT_CHANGES, check_command_line

FLAGS = {ACCEPT_CHANGES: "resume although keys whose rule on resume is consent have changed"}

if __name__ == "__main__":  # before torch, which takes seconds to import
    check_command_line(usage=__doc__, flags=FLAGS)

import atexit
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attempts import newest_step
from checkpoint import (
    Checkpoint,
    Saver,
    checkpoint_paths,
    find_checkpoint,
    find_resumable,
    load_optimizer,
    load_weights,
)
from config import (
    LOST_RANK,
    ROOT,
    SICK_NODE,
    Config,
    ConfigError,
    UserError,
    changes,
    load_config,
    loss_chunk,
    resolve_path,
    run_program,
    tables,
)
from dataset import Mixture, TokenDataset, evenly_spaced, filled_up, rank_share
from distributed import (
    AgreedError,
    Arrived,
    Lagged,
    World,
    autocast,
    check_compiler,
    clip_gradients,
    compiles,
    cudnn_version,
    explain_lost_rank,
    fetch,
    gradient_sync,
    init_distributed,
    local_part,
    parallelize,
    replicate,
    reshard,
    set_timeout,
    shut_down,
)
from job import Claim, Lookout, Signals, Votes, job_end
from model import IGNORE, Llama, flops_per_token, initial_weight, parameter_count
from optimizer import build_optimizer, learning_rate
from run import DataCheck, Inputs, RunLog, check_inputs, finite, open_run, preflight, record_start
from tokenizer import Tokenizer

NORM_DECAY, NORM_STEPS = 0.98, 20  # of the running mean of gradient norms; steps until it counts
WRITTEN_TOKENS, WRITTEN_TEMPERATURE = 48, 0.8  # of the text that a model writes by itself


@dataclass
class Progress:
    """What a run carries from step to step beside weights and optimizer; checkpoints hold it."""

    step: int = 0
    hours: float = 0.0
    best_val_losses: list[float] = field(default_factory=list)  # ascending, as many as are kept
    evaluations_since_best: int = 0
    val_loss: float | None = None  # of the evaluation at this very step, if there was one
    bad_steps: int = 0  # skipped steps in a row, up to this one
    norms: list[float] = field(default_factory=lambda: [0.0, 0.0])  # see does_damage
    save_seconds: float = 0.0  # that the longest save so far took
    rows: dict[str, int] = field(default_factory=dict)  # in each file of the run


class Outcome(NamedTuple):
    """What all ranks come to know of a step, LAG steps later: global values and added-up votes."""

    loss: float
    votes: Votes
    damage: float
    grad_norm: float

    @property
    def skipped(self) -> str | None:
        """Why the step changed nothing, or None if it was a good one."""
        if not self.damage:
            return None
        if self.loss == self.grad_norm == 0:  # no spike is that low
            return "no_trained_tokens"
        return "spike" if math.isfinite(self.loss + self.grad_norm) else "non_finite"


def main(arguments: list[str]) -> None:
    signals = Signals()
    config, flags = load_config(arguments, usage=__doc__, flags=FLAGS)
    try:
        world = init_distributed(config)
        signals.install()  # until here there is nothing to end in order, and ranks may wait in vain
        train(config, ACCEPT_CHANGES in flags, signals, world)
    except AgreedError:  # all ranks are here; after any other error some may wait for this one
        shut_down()
        raise
    except (RuntimeError, dist.DistError) as error:
        if lost := explain_lost_rank(error):
            if torch.cuda.is_initialized():  # its kernels wait for that rank: don't wait for them
                atexit.register(os._exit, 1)
            raise lost from None
        raise
    shut_down()


def train(config: Config, accept_changes: bool, signals: Signals, world: World) -> None:
    """Trains the run in train.out_dir to its end or its job's, from wherever it stands."""
    directory = resolve_path(config.train.out_dir)
    end = world.once(lambda: job_end(config.train.max_hours))
    inputs = world.once(lambda: check_inputs(directory, config, accept_changes))
    data, val_data = open_datasets(config, inputs)
    max_steps = run_length(config, data)
    tokens_a_step = config.train.global_batch_size * data.seq_len
    flops = flops_per_token(config.model, inputs.vocab_size, config.data.seq_len)
    log = RunLog(directory, config.log, world, max_steps, tokens_a_step, flops)
    claim = Claim(directory)
    progress, start, saver = Progress(), Progress(), None
    try:
        world.once(claim.check)
        seen = world.once(lambda: checkpoint_paths(directory))
        checkpoint = find_resumable(directory, world)
        if checkpoint:
            progress = Progress(**checkpoint.state)
            start = replace(progress)
        reason = end_reason(progress, max_steps, config, val_data)
        if not reason:
            size = 12 * parameter_count(config.model, inputs.vocab_size)
            preflight(directory, config, checkpoint, size, world)
            if compiles(config.train.compile, world.device):
                world.each(lambda: check_compiler(world.device))
            world.once(lambda: open_run(directory, config, claim, seen))
            world.once(lambda: log.status("running", None, progress.step))
            if not inputs.model_changed:
                world.once(lambda: record_start(directory, config))
            model, optimizer = build(config, inputs, checkpoint, log, world)
            describe_start(config, model, data, val_data, checkpoint, log, world)
            log.start(progress.step, progress.hours, progress.val_loss is not None, progress.rows)
            saver = Saver(directory, model, optimizer, config.checkpoint, claim.verify, world)
            seconds = progress.save_seconds or 1 + max(size / world.size / 100e6, size / 2e9)
            minutes = config.checkpoint.interval_minutes
            check = DataCheck(inputs.manifests, config.data.verify, world)
            watched = directory, signals, claim, saver, end, seconds, minutes, check.damaged
            parts = config, inputs, data, val_data, model, optimizer, saver
            parts += Lookout(*watched), check, log, world
            with reading_thread(world) as reader:
                run = Run(*parts, reader)
                if inputs.model_changed and check_model(run, progress):
                    world.once(lambda: record_start(directory, config))
                reason = train_steps(run, progress)
        advanced = (progress.step, progress.val_loss) != (start.step, start.val_loss)
        log.end(reason, progress.step, advanced)
    except BaseException as error:
        if saver and isinstance(error, AgreedError):  # all ranks are here
            saver.finish()
        if claim.is_ours and directory.is_dir():
            step = progress.step if saver else newest_step(directory)
            log.failed(*explain_failure(error, step, log))
        raise
    finally:
        claim.release()
        log.close()


def explain_failure(error: BaseException, step: int, log: RunLog) -> tuple[str, int, bool, str]:
    """Of a failure, for status.json: reason, step, whether another try may succeed, and why.

    A lost rank or a sick node may always pass. What fails alike at the same step again does not.
    """
    lost = explain_lost_rank(error)
    why = str(lost or error).partition("\n")[0] or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "signal", step, False, why
    if lost or getattr(error, "code", None) in (LOST_RANK, SICK_NODE):
        return "error", step, True, why
    if isinstance(error, NotFiniteError):
        return "non_finite", error.step, log.failed_before != (error.step, why), why
    return "error", step, not isinstance(error, UserError) and log.failed_before != (step, why), why


@dataclass
class Run:
    """The parts of a run that the loop works with."""

    config: Config
    inputs: Inputs
    data: Mixture
    val_data: Mixture | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    saver: Saver
    lookout: Lookout
    check: DataCheck
    log: RunLog
    world: World
    reader: Executor


def train_steps(run: Run, progress: Progress) -> str:
    """The loop: evaluate, save, step and log, until there is a reason to end, which it returns.

    All ranks learn at the same step that one of them wants to stop, from numbers that travel with
    the loss and reach the host one step later: no step waits for the device.
    """
    config, data, log, lookout, world = run.config, run.data, run.log, run.lookout, run.world
    batch_size, max_steps = config.train.global_batch_size, log.max_steps
    replicated = replicate(run.model, world)
    record = world.once(lambda: identity(config, run.inputs, world))
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    about = {"parameters": parameters, "ranks": world.size, "max_steps": max_steps}
    log.job_row(progress.step, about | {name: record[name] for name in ("commit", "versions")})
    norms = torch.tensor(progress.norms, device=world.device)
    lagged: Lagged[tuple[int, float]] = Lagged(lookout.while_waiting)
    first, saved = progress.step, replace(progress)
    reason, save_due = agree(run), False

    def read(step: int) -> list[tuple[Tensor, Tensor]]:
        windows = data.step_windows(config.train.seed, step, batch_size)
        return list(read_batches(run, data, windows, config.train.micro_batch_size))

    def settle(outcomes: list[Arrived]) -> None:
        """Rows, skipped steps and reasons to stop or save, of the steps that are known by now."""
        nonlocal reason, save_due
        for (step, rate), values, done_at in outcomes:
            loss, *votes, damage, grad_norm = values
            outcome = Outcome(loss, Votes(*votes), damage, grad_norm)
            log.count(done_at)
            if step == max_steps or due(step, config.train.log_interval):
                log.training_row(step, outcome.loss, rate, outcome.grad_norm, outcome.skipped)
            note_skipped(run, progress, step, outcome)
            reason = reason or stop_reason(run, outcome.votes)
            save_due = save_due or outcome.votes.save_due > 0

    def save() -> None:
        nonlocal saved, save_due, reason
        progress.hours, progress.rows, progress.norms = log.hours, {**log.rows}, norms.tolist()
        progress.save_seconds = max(progress.save_seconds, run.saver.seconds)
        log.sync()
        with lookout.timed("save"):
            if progress.step == saved.step:
                run.saver.amend(progress.step, asdict(progress))
            else:
                run.saver.save(progress.step, {**record, "state": asdict(progress)})
        run.check.remember()
        saved, save_due = replace(progress), False
        world.once(lambda: log.status("running", None, progress.step))
        log.restart_clock()
        reason = reason or agree(run)

    ahead = run.reader.submit(read, progress.step)
    while True:
        worth_keeping = False
        if not reason and run.val_data and evaluation_due(progress, max_steps, config):
            settle(lagged.drain())
            worth_keeping = not reason and validate(run, replicated, progress)
            reason = reason or agree(run)
            if not reason and progress.val_loss is None:
                continue  # what had interrupted it was taken back
        reason = end_reason(progress, max_steps, config, run.val_data) or reason
        if reason or worth_keeping or save_due or due(progress.step, config.checkpoint.interval):
            settle(lagged.drain())
            if (progress.step, progress.val_loss) != (saved.step, saved.val_loss):
                save()
        if reason:
            run.saver.wait()
            run.check.remember()
            world.once(lambda: lookout.stop_file.unlink(missing_ok=True))
            return reason

        batches = [on_device(run, *batch) for batch in ahead.result()]
        ahead = run.reader.submit(read, progress.step + 1)
        rate = learning_rate(progress.step, max_steps, config.optimizer)
        votes = cast_votes(run, steps=2, evaluation=evaluation_near(progress, max_steps, config))
        outcome = train_step(replicated, run.optimizer, batches, rate, votes, norms, config, world)
        progress.step += 1
        progress.val_loss = None
        settle(lagged.push((progress.step, rate), outcome))
        lookout.step_done()
        if progress.step == first + 1:
            set_timeout(run.model, config.parallel.timeout_seconds)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    rate: float,
    votes: Tensor,
    norms: Tensor,
    config: Config,
    world: World,
) -> Tensor:
    """One optimizer step over this rank's micro-batches, skipped if it would do damage or nothing.

    The loss is the mean over the trained tokens of the *global* batch, so that neither accumulation
    nor fillers bias it; DDP and FSDP2 average gradients over ranks, hence the factor world.size.

    Args:
        votes: this rank's, to be added up over the ranks along with the loss.
        norms: see does_damage; where spikes count, takes in the norm of a good step.

    Returns:
        The numbers of an Outcome, in order: global, and still on the device. The loss is in nats a
        token, the gradient norm that before clipping.
    """
    trained = world.sum(sum((batch.targets != IGNORE).sum() for batch in batches))
    loss = torch.zeros((), device=world.device)
    for index, batch in enumerate(batches):
        with gradient_sync(model, index == len(batches) - 1, config.parallel):
            with autocast(model, world):
                share = model(*batch) / trained.clamp(min=1)
            (share * world.size).backward()
        loss += share.detach()
    grad_norm = clip_gradients(model, config.optimizer.grad_clip)
    damage = does_damage(loss, grad_norm, norms, config.train.spike_factor)
    damage = torch.where(trained > 0, damage, 1.0)  # else old moments and decay would move weights
    agreed = world.sum(torch.cat((loss[None], votes, damage[None])))
    damage = agreed[-1].clamp(max=1.0)  # for one rank is for all, whatever their last bits say
    if config.train.spike_factor:
        taken = torch.stack((grad_norm, torch.ones_like(grad_norm)))
        norms.lerp_(torch.where(damage > 0, norms, taken), 1 - NORM_DECAY)
    for group in optimizer.param_groups:
        group["lr"] = rate
    # How mixed precision tells fused optimizers of an overflow: where it is 1, nothing changes,
    # their own step counts included, and nobody waits to hear of it.
    optimizer.grad_scale, optimizer.found_inf = None, damage
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat((agreed, grad_norm[None]))


def does_damage(loss: Tensor, grad_norm: Tensor, norms: Tensor, spike_factor: float) -> Tensor:
    """1.0 if loss or gradient is not finite or the gradient spikes, else 0.0; on the device.

    norms (2,) holds the decaying sums of good steps' norms and of their weights: their quotient is
    the running mean.
    """
    damage = (loss + grad_norm).isfinite().logical_not()
    if spike_factor:
        known = norms[1] > 1 - NORM_DECAY ** (NORM_STEPS - 0.5)  # NORM_STEPS good ones or more
        damage = damage | (known & (grad_norm * norms[1] > spike_factor * norms[0]))
    return damage.float()


def note_skipped(run: Run, progress: Progress, step: int, outcome: Outcome) -> None:
    """Counts skipped steps in a row, and writes down exactly which windows they had.

    Raises:
        NotFiniteError: there were train.max_bad_steps of them.
    """
    if not outcome.damage:
        progress.bad_steps = 0
        return
    progress.bad_steps += outcome.skipped != "no_trained_tokens"
    config = run.config
    batch_size = config.train.global_batch_size
    windows = run.data.step_windows(config.train.seed, step - 1, batch_size).tolist()
    row = {
        "step": step,
        "reason": outcome.skipped,
        "loss": finite(outcome.loss),
        "grad_norm": finite(outcome.grad_norm),
        "windows": [run.data.place(window) for window in windows],
    }
    run.log.row(row, "bad_steps.jsonl")
    told = f"loss {outcome.loss}, gradient norm {outcome.grad_norm}"
    run.log.say(f"step {step} skipped ({outcome.skipped}): {told}")
    if progress.bad_steps >= config.train.max_bad_steps:
        raise NotFiniteError(
            step,
            f"{progress.bad_steps} steps in a row were skipped, this one for {told}; they changed"
            " nothing, and what was saved is good; lower optimizer.learning_rate or look at the"
            f" data: python prepare.py {run.log.directory / 'config.toml'} --bad-steps",
        )


def cast_votes(run: Run, steps: int = 0, evaluation: bool = False) -> Tensor:
    """This rank's votes (6,), given what comes before ranks can stop again."""
    votes = run.lookout.votes(run.world.rank, steps, evaluation)
    if not any(votes):  # nearly always, and then nothing has to be copied to the device
        return torch.zeros(len(votes), device=run.world.device)
    return torch.tensor(votes, device=run.world.device)


def agree(run: Run) -> str | None:
    """Why to stop, asked where ranks wait for each other anyway."""
    votes = run.world.sum(cast_votes(run, steps=2))
    return stop_reason(run, Votes(*fetch(votes, run.lookout.while_waiting)))


def stop_reason(run: Run, votes: Votes) -> str | None:
    """Why to stop, or None.

    Raises:
        AgreedError: on every rank: the run belongs to another job, a save failed, a dataset is
            damaged.
    """
    if votes.claim_lost:
        raise AgreedError(f"{run.log.directory} was taken over by another job; nothing was saved")
    if votes.save_failed:
        run.saver.wait()
    if votes.data_damaged:
        run.check.tell()
    return next((why for why in ("stop_file", "signal", "deadline") if getattr(votes, why)), None)


def check_model(run: Run, progress: Progress) -> bool:
    """Holds a model whose code has changed against the loss that was recorded of these weights.

    False if a signal came before it was known, so that the run ends here.

    Raises:
        AgreedError: they are worth something else now: another model trained them.
    """
    run.log.say("model.py has changed: these weights were trained by another model")
    if progress.val_loss is None or not run.val_data:
        run.log.say("that it computes the same can't be checked: this step was not evaluated")
        return True
    scores = evaluate(run, run.model, progress.step)
    reshard(run.model)
    if scores is None:
        return False
    told = f"validation loss {scores['val_loss']:.4f}, recorded {progress.val_loss:.4f}"
    tolerance = 1e-3 if run.world.dtype == torch.float32 else 2e-2
    if not abs(scores["val_loss"] - progress.val_loss) < tolerance:
        raise AgreedError(
            f"model.py has changed what the model computes: {told}; take the old code, which is in"
            f" {run.log.directory / 'code'}, or start a new run from these weights with"
            " train.init_from"
        )
    run.log.say(f"it computes the same: {told}")
    return True


def validate(run: Run, model: nn.Module, progress: Progress) -> bool:
    """Evaluates and writes the rows of it; True if these weights are among the best to keep.

    An evaluation that is interrupted leaves nothing: the next job makes it first.
    """
    config, log = run.config, run.log
    with run.lookout.timed("evaluation"):
        scores = evaluate(run, model, progress.step)
        reshard(run.model)
        if scores is None:
            return False
        if not math.isfinite(scores["val_loss"]):
            raise NotFiniteError(progress.step, "the validation loss is not finite")
        progress.val_loss = scores["val_loss"]
        log.evaluation_row(progress.step, scores)
        rows = predict(run, model)
        reshard(run.model)
        for row in rows:
            log.row({"step": progress.step, **row}, "samples.jsonl")
    log.report()
    log.restart_clock()
    best = progress.best_val_losses
    is_best = not best or progress.val_loss < best[0]
    progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
    kept = config.checkpoint.keep_best
    progress.best_val_losses = sorted([*best, progress.val_loss])[: max(1, kept)]
    return kept > 0 and progress.val_loss in progress.best_val_losses


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, step: int) -> dict[str, Any] | None:
    """Loss, perplexity and bits per byte over a fixed part of the split, shared by all ranks.

    Those of a mixture are the means of its datasets' by weight. None if the ranks agreed to stop
    before its end.

    Raises:
        AgreedError: not a token of a dataset's part is trained on.
    """
    config, data, world = run.config, run.val_data, run.world
    bytes_of = torch.from_numpy(run.inputs.byte_lengths).to(world.device)
    lagged: Lagged[None] = Lagged(run.lookout.while_waiting)
    sums = torch.zeros(len(data.names), 3, dtype=torch.float64, device=world.device)
    # Batches of the shape of training's, whatever there is to evaluate: each shape is compiled.
    size = micro_batch_shape(config, world)[1]
    for own, windows in zip(sums, data.evenly_spaced(config.train.eval_sequences), strict=True):
        for tokens, targets in read_batches(run, data, filled_up(windows, size * world.size), size):
            batch = on_device(run, tokens, targets)
            with autocast(model, world):
                own[0] += model(*batch)
            trained = batch.targets != IGNORE  # as a mask: to gather them would wait for the device
            own[1] += trained.sum()
            own[2] += (bytes_of[batch.targets.clamp(min=0)] * trained).sum()
            for _, votes, _ in lagged.push(None, world.sum(cast_votes(run))):
                if stop_reason(run, Votes(*votes)):
                    return None
    losses, bits = {}, {}
    totals = fetch(world.sum(sums), run.lookout.while_waiting)
    for name, (nats, count, size) in zip(data.names, totals, strict=True):
        if not size:
            raise AgreedError(
                f"{name}: the windows of the val split that are evaluated have no text to train on;"
                " set train.eval_sequences higher, or data.train_on and prepare anew"
            )
        losses[name], bits[name] = nats / count, nats / math.log(2) / size
    loss = data.mean(losses)
    scores = {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),  # finite in JSON, however bad the model
        "val_bits_per_byte": data.mean(bits),
    }
    if len(run.data.names) > 1:
        scores["val_losses"] = losses
        scores["epochs"] = run.data.epochs(step * config.train.global_batch_size)
    return scores


@torch.no_grad()
def predict(run: Run, model: nn.Module) -> list[dict[str, str]]:
    """What the model writes by itself, and what it predicts at each trained token of the second
    half of a few fixed windows.

    Forward passes that see the true tokens before each: as cheap sharded as whole, since every rank
    takes part in them alike. They have the shape of training's, which is compiled.
    """
    config, data, world = run.config, run.val_data, run.world
    if not config.train.sample_prompts:
        return []
    windows = evenly_spaced(config.train.sample_prompts, data.windows)
    size, found = micro_batch_shape(config, world)[1], []
    for start in range(0, len(windows), size):
        asked = windows[start : start + size]
        batch = on_device(run, *data.batch(filled_up(asked, size)))
        with autocast(model, world):
            logits = model(batch.tokens, documents=batch.documents, only=slice(len(asked)))
        found += zip(*batch[:2], logits.argmax(dim=-1), strict=False)  # without the fillers
    written = write_on(run, model)
    if world.rank != 0:
        return []
    tokenizer = Tokenizer(resolve_path(config.train.out_dir) / "tokenizer.model")
    decode, half, rows = tokenizer.decode, data.seq_len // 2, []
    if written:
        prompt, ids = written
        ids = ids[: (*ids, tokenizer.eos_id).index(tokenizer.eos_id)]
        rows.append({"prompt": decode(prompt), "continuation": decode(ids)})
    for prompt, truth, guess in found:
        asked = truth != IGNORE
        asked[:half] = False
        parts = {"prompt": prompt[: half + 1], "prediction": guess[asked], "truth": truth[asked]}
        rows.append({name: decode(ids.tolist()) for name, ids in parts.items()})
    return rows


@torch.no_grad()
def write_on(run: Run, model: nn.Module) -> tuple[list[int], list[int]] | None:
    """The beginning of a fixed window, of a conversation its prompt, and what the model writes
    behind it, token by token, with the same noise each time. None if the ranks agreed to stop.

    A forward pass of one short sequence for each token, on every rank alike. Its shape is not
    training's, so it is not compiled. The largest logit after Gumbel noise is a sample (Gumbel,
    "Statistical Theory of Extreme Values", 1954): nothing is drawn on the device.
    """
    data, world = run.val_data, run.world
    tokens, targets = data.batch(np.zeros(1, dtype=np.int64))
    prompted = int((targets[0] != IGNORE).int().argmax())  # before the first token that is trained
    length = max(1, min(prompted + 1 if prompted else WRITTEN_TOKENS, data.seq_len // 2))
    end = min(length + WRITTEN_TOKENS, data.seq_len)
    noise = torch.empty(end, run.inputs.vocab_size)
    noise = noise.exponential_(generator=torch.Generator().manual_seed(0)).log_().neg_()
    tokens, noise = tokens[:, :end].to(world.device), noise.to(world.device)
    lagged: Lagged[None] = Lagged(run.lookout.while_waiting)
    for place in range(length, end):
        with torch.compiler.set_stance("force_eager"), autocast(model, world):
            logits = model(tokens, only=(0, slice(place - 1, place)))
        tokens[0, place] = (logits[0] / WRITTEN_TEMPERATURE + noise[place]).argmax()
        for _, votes, _ in lagged.push(None, world.sum(cast_votes(run))):
            if stop_reason(run, Votes(*votes)):
                return None
    ids = tokens[0].tolist()
    return ids[:length], ids[length:]


class Batch(NamedTuple):
    """What the model takes, on the device, (B, T) each."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None


def reading_thread(world: World) -> Executor:
    """Where the next step's batches are read and pinned while the device works on this one's."""
    if world.device.type == "cuda":  # a thread begins on GPU 0, which would be every rank's
        return ThreadPoolExecutor(1, "data", torch.cuda.set_device, (world.device,))
    return ThreadPoolExecutor(1, "data")


def micro_batch_shape(config: Config, world: World) -> tuple[int, int]:
    """A training step's micro-batches of a rank, and the sequences of each."""
    windows = np.arange(config.train.global_batch_size)
    return rank_share(windows, config.train.micro_batch_size, 0, world.size).shape


def read_batches(
    run: Run, data: Mixture, windows: np.ndarray, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets of this rank's micro-batches, of at most size sequences, on the host."""
    for share in rank_share(windows, size, run.world.rank, run.world.size):
        tokens, targets = data.batch(share)
        if run.world.device.type == "cuda":  # a copy from pageable memory waits for the device
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        yield tokens, targets


def on_device(run: Run, tokens: Tensor, targets: Tensor) -> Batch:
    """A batch for the model; with data.document_mask, documents begin at each BOS of a window."""
    tokens, targets = (ids.to(run.world.device, non_blocking=True) for ids in (tokens, targets))
    masked = run.config.data.document_mask
    documents = (tokens == run.inputs.bos_id).cumsum(dim=1) if masked else None
    return Batch(tokens, targets, documents)


def build(
    config: Config, inputs: Inputs, checkpoint: Checkpoint | None, log: RunLog, world: World
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as the run needs them: resumed, from other weights, or fresh."""
    cost = loss_chunk(config, world.device.type == "cuda"), config.train.recompute
    with torch.device("meta"):  # without memory: sharded first, the largest is never whole
        model = Llama(config.model, inputs.vocab_size, *cost)
    model = parallelize(model, config.parallel, world)
    if compiles(config.train.compile, world.device):
        model.compile_parts()
    optimizer = build_optimizer(model, config.optimizer, world.dtype)
    if checkpoint:
        load_weights(model, checkpoint)
        load_optimizer(model, optimizer, checkpoint)
    elif config.train.init_from:
        start_from(config, model, inputs, log, world)
    else:
        initialise(model, config)
    return model, optimizer


@torch.no_grad()
def initialise(model: nn.Module, config: Config) -> None:
    """Fresh weights, equal at every world size and strategy; one parameter at a time is whole."""
    for name, parameter in model.named_parameters():
        rows, start = local_part(parameter)
        full = initial_weight(name, parameter.shape, config.model, config.train.seed, rows.device)
        rows.copy_(full[start : start + len(rows)])


def start_from(config: Config, model: nn.Module, inputs: Inputs, log: RunLog, world: World) -> None:
    """Starts a new run from the weights of train.init_from, for a tokenizer that may have grown.

    Raises:
        UserError: no checkpoint there, another shape, a tokenizer that does not extend its own.
    """

    def find() -> tuple[Checkpoint, int | None]:
        checkpoint = find_checkpoint(resolve_path(config.train.init_from))
        free = ("model.max_seq_len", "model.init_std")  # they shape no weight and no product
        for change in chain(*changes(checkpoint.config, config).values()):
            if change.startswith("model.") and not change.startswith(free):
                raise ConfigError(f"train.init_from: {checkpoint.path} has another model: {change}")
        if checkpoint.manifest["tokenizer_sha256"] == inputs.tokenizer_sha256:
            rows = checkpoint.shapes("model")["model.embed_tokens.weight"][0]
            return checkpoint, inputs.vocab_size if rows > inputs.vocab_size else None
        old = Tokenizer(checkpoint.path.parent.parent / "tokenizer.model")
        new = Tokenizer(resolve_path(config.tokenizer.path))
        if not new.extends(old):
            raise UserError(
                f"train.init_from: {new.path} does not extend {old.path}, with which"
                f" {checkpoint.path} was trained; use that one, or add pieces to it"
            )
        return checkpoint, old.vocab_size

    checkpoint, known = world.once(find)
    world.each(lambda: load_weights(model, checkpoint, known))
    log.say(f"weights of step {checkpoint.step} from {checkpoint.path}")
    if known and (new_tokens := inputs.vocab_size - known):
        log.say(f"{new_tokens} new tokens start from the mean of the old embeddings")


def open_datasets(config: Config, inputs: Inputs) -> tuple[Mixture, Mixture | None]:
    """The training splits and, of the datasets that have one, the validation splits."""

    def open_split(split: str, names: Iterable[str]) -> Mixture:
        manifests, seq_len = inputs.manifests, config.data.seq_len
        opened = {n: TokenDataset(resolve_path(n), manifests[n], split, seq_len) for n in names}
        return Mixture(opened, inputs.weights)

    data = open_split("train", inputs.manifests)
    validated = [name for name, found in inputs.manifests.items() if "val" in found["splits"]]
    if not validated and config.train.patience:
        raise ConfigError("train.patience needs a validation split: set data.val_fraction")
    return data, open_split("val", validated) if validated else None


def run_length(config: Config, data: Mixture) -> int:
    """Optimizer steps of the run, from train.max_steps or train.epochs.

    An epoch of a mixture is as many windows as all its datasets have together.
    """
    if config.train.max_steps:
        return config.train.max_steps
    if config.train.epochs:
        return math.ceil(config.train.epochs * data.windows / config.train.global_batch_size)
    raise ConfigError("how long to train is not set: give train.max_steps or train.epochs")


def due(step: int, interval: int) -> bool:
    """Whether something that happens every interval steps happens now; never if interval is 0."""
    return interval > 0 and step % interval == 0


def evaluation_due(progress: Progress, max_steps: int, config: Config) -> bool:
    """Whether this step is to be evaluated and has not been."""
    now = progress.step == max_steps or due(progress.step, config.train.eval_interval)
    return now and progress.step > 0 and progress.val_loss is None


def evaluation_near(progress: Progress, max_steps: int, config: Config) -> bool:
    """Whether one of the next two steps is to be evaluated."""
    after = (progress.step + 1, progress.step + 2)
    return max_steps in after or any(due(step, config.train.eval_interval) for step in after)


def end_reason(
    progress: Progress, max_steps: int, config: Config, val_data: Mixture | None
) -> str | None:
    """Why the run ends at this step, or None."""
    if val_data and evaluation_due(progress, max_steps, config):
        return None
    if progress.step >= max_steps:
        return "max_steps"
    if 0 < config.train.patience <= progress.evaluations_since_best:
        return "early_stop"
    if 0 < config.train.stop_at_step <= progress.step:
        return "stop_at_step"
    return None


class NotFiniteError(AgreedError):
    """Too many steps in a row did damage, or the validation loss is not finite."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"step {step}: {message}")
        self.step = step


def identity(config: Config, inputs: Inputs, world: World) -> dict[str, Any]:
    """What a checkpoint records of where it comes from."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if world.device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": cudnn_version()}
    commit = ""
    if shutil.which("git"):
        git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "config": tables(config),
        "dataset": inputs.fingerprint,
        "template": inputs.template,
        "tokenizer_sha256": inputs.tokenizer_sha256,
        "vocab_size": inputs.vocab_size,
        "versions": versions,
        "commit": commit or None,
    }


def describe_start(
    config: Config,
    model: nn.Module,
    data: Mixture,
    val_data: Mixture | None,
    checkpoint: Checkpoint | None,
    log: RunLog,
    world: World,
) -> None:
    """Says what is about to run, and what of it the user may not expect."""
    batch_size = config.train.global_batch_size
    micro_batches, size = micro_batch_shape(config, world)
    on_gpu = world.device.type == "cuda"
    log.say(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters,"
        f" {config.parallel.strategy} on {world.size} × {world.device.type},"
        f" compute in {str(world.dtype).removeprefix('torch.')}"
        + (" with TF32 products" if world.dtype == torch.float32 and on_gpu else "")
        + (", compiled" if compiles(config.train.compile, world.device) else "")
        + (", deterministic" if config.train.deterministic else "")
        + (f", cuDNN {cudnn_version()}" if on_gpu else "")
    )
    log.say(
        f"{data.tokens:,} tokens in {data.windows:,} windows of {data.seq_len}"
        f" ({data.unused_tokens} tokens at the end unused);"
        f" {batch_size * data.seq_len:,} tokens a step in {micro_batches} micro-batches"
        f" of {size}"
    )
    if len(data.names) > 1:
        epochs = data.epochs(log.max_steps * batch_size)
        for name, part in zip(data.names, data.shares, strict=True):
            log.say(f"{name}: {100 * part:.2f}% of the sequences, {epochs[name]:.2f} epochs of it")
    without = [name for name in data.names if val_data and name not in val_data.names]
    if without:
        log.say(f"no validation split, so not in the validation loss: {', '.join(without)}")
    if config.data.document_mask:
        log.say("attention stays within a document")
    if fillers := micro_batches * size * world.size - batch_size:
        log.say(
            f"global batch {batch_size} does not divide: {fillers} filler sequences a step"
            f" ({100 * fillers / (micro_batches * size * world.size):.0f}% of the work is wasted)"
        )
    if checkpoint:
        log.say(f"resuming from step {checkpoint.step}: {checkpoint.path}")


if __name__ == "__main__":
    run_program(main)
