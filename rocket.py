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

import math
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

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
    Config,
    ConfigError,
    UserError,
    changes,
    load_config,
    loss_chunk,
    resolve_path,
    run_program,
)
from dataset import Batch, Batches, DataCheck, Mixture, open_split
from distributed import (
    AgreedError,
    Lagged,
    World,
    autocast,
    check_compiler,
    clip_gradients,
    compiles,
    gradient_sync,
    local_part,
    parallelize,
    process_group,
    replicate,
    reshard,
    set_timeout,
)
from inference.evaluation import evaluate, predictions
from job import Consensus, Signals, StopConditions, job_end
from kernels import IGNORE
from model import Llama, initial_weight, parameter_count
from optimizer import build_optimizer, learning_rate
from preflight import Inputs, check_inputs, preflight
from run import NotFiniteError, Progress, Run, open_run, record_start
from tokenizer import Tokenizer

NORM_DECAY, NORM_STEPS = 0.98, 20  # of the running mean of gradient norms; steps until it counts


def main(arguments: list[str]) -> None:
    signals = Signals()
    config, flags = load_config(arguments, usage=__doc__, flags=FLAGS)
    with process_group(config) as world:
        signals.install()  # until here there is nothing to end in order, and ranks may wait in vain
        train(config, ACCEPT_CHANGES in flags, signals, world)


def train(config: Config, accept_changes: bool, signals: Signals, world: World) -> None:
    """Trains the run in train.out_dir to its end or its job's, from wherever it stands."""
    directory = resolve_path(config.train.out_dir)
    end = world.once(lambda: job_end(config.train.max_hours))
    inputs = world.once(lambda: check_inputs(directory, config, accept_changes))
    with Run(directory, config, inputs, *open_datasets(config, inputs), world) as run:
        world.once(run.lock.check)
        seen = world.once(lambda: checkpoint_paths(directory))
        checkpoint = find_resumable(directory, world)
        if checkpoint:
            run.progress = Progress(**checkpoint.state)
        start, reason = run.progress.position, run.over()
        if not reason:
            size = 12 * parameter_count(config.model, inputs.vocab_size)  # bytes of a checkpoint
            preflight(directory, config, checkpoint, size, world)
            if compiles(config.train.compile, world.device):
                world.each(lambda: check_compiler(world.device))
            world.once(lambda: open_run(directory, config, run.lock, seen))
            world.once(lambda: run.status("running", None, run.progress.step))
            if not inputs.model_changed:
                world.once(lambda: record_start(directory, config))
            model, optimizer = build(config, inputs, checkpoint, world, run.say)
            with Batches(run.data, config, inputs.bos_id, world) as batches:
                run.describe(model, batches, checkpoint)
                run.start()
                run.saver = Saver(
                    directory, model, optimizer, config.checkpoint, run.lock.verify, world
                )
                run.check = DataCheck(inputs.manifests, config.data.verify, world)
                estimate = 1 + max(size / world.size / 100e6, size / 2e9)
                conditions = StopConditions(
                    directory,
                    signals,
                    run.lock,
                    run.saver,
                    end,
                    run.progress.save_seconds or estimate,
                    config.checkpoint.interval_minutes,
                    run.check,
                )
                run.agreed = Consensus(conditions, world)
                if inputs.model_changed and check_model(run, model, batches):
                    world.once(lambda: record_start(directory, config))
                reason = train_steps(run, model, optimizer, batches)
        run.end(reason, advanced=run.progress.position != start)


def train_steps(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches
) -> str:
    """The loop: evaluate, save, stop, step; returns why the run, or its job, is over.

    No step waits for the device. What a step gives, and what ranks vote with it, reaches the host
    one step later, on all ranks at the same step.
    """
    config, world, progress, agreed = run.config, run.world, run.progress, run.agreed
    first, conditions = progress.step, agreed.conditions
    replicated = replicate(model, world)
    norm_ema = torch.tensor(progress.norms, device=world.device)
    lagged: Lagged[tuple[int, float]] = Lagged(conditions.while_waiting)
    run.job_row(sum(parameter.numel() for parameter in model.parameters()))
    agreed.ask()
    while True:
        # evaluate
        best = False
        if run.evaluation_due() and not agreed.stop:
            run.record(lagged.drain())
            best = not agreed.stop and validate(run, model, replicated, batches)
            agreed.ask()
            if not agreed.stop and progress.val_loss is None:
                continue  # what had interrupted it was taken back

        # save
        over = run.over()
        if best or over or agreed.stop or agreed.save_due or run.save_due():
            run.record(lagged.drain())
            if progress.position != run.saved:
                run.save(norm_ema)
                agreed.ask()

        # stop
        if reason := over or agreed.stop:
            run.saver.wait()
            run.check.remember()
            world.once(lambda: conditions.stop_file.unlink(missing_ok=True))
            return reason

        # step
        rows = batches.of_step(progress.step)
        lr = learning_rate(progress.step, run.max_steps, config.optimizer)
        votes = agreed.votes(steps=2, evaluation=run.evaluation_near())
        numbers = train_step(replicated, optimizer, rows, lr, votes, norm_ema, config, world)
        progress.step, progress.val_loss = progress.step + 1, None
        run.record(lagged.push((progress.step, lr), numbers))
        conditions.step_done()
        if progress.step == first + 1:  # start-up and compilation are over
            set_timeout(model, config.parallel.timeout_seconds)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    lr: float,
    votes: Tensor,
    norm_ema: Tensor,
    config: Config,
    world: World,
) -> Tensor:
    """One optimizer step over this rank's micro-batches, skipped if it would do harm or nothing.

    The loss is the mean over the trained tokens of the *global* batch, so that neither accumulation
    nor fillers bias it; DDP and FSDP2 average gradients over ranks, hence the factor world.size.

    Args:
        votes: this rank's, to be added up over the ranks along with the loss.
        norm_ema: see should_skip; where spikes count, takes in the norm of a good step.

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
    skip = should_skip(loss, grad_norm, norm_ema, config.train.spike_factor)
    skip = torch.where(trained > 0, skip, 1.0)  # else old moments and decay would move weights
    agreed = world.sum(torch.cat((loss[None], votes, skip[None])))
    skip = agreed[-1].clamp(max=1.0)  # for one rank is for all, whatever their last bits say
    if config.train.spike_factor:
        taken = torch.stack((grad_norm, torch.ones_like(grad_norm)))
        norm_ema.lerp_(torch.where(skip > 0, norm_ema, taken), 1 - NORM_DECAY)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # How mixed precision tells fused optimizers of an overflow: where it is 1, nothing changes,
    # their own step counts included, and nobody waits to hear of it.
    optimizer.grad_scale, optimizer.found_inf = None, skip
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat((agreed, grad_norm[None]))


def should_skip(loss: Tensor, grad_norm: Tensor, norm_ema: Tensor, spike_factor: float) -> Tensor:
    """1.0 if loss or gradient is not finite or the gradient spikes, else 0.0; on the device.

    norm_ema (2,) holds the decaying sums of good steps' norms and of their weights: their quotient
    is the running mean.
    """
    skip = (loss + grad_norm).isfinite().logical_not()
    if spike_factor:
        known = norm_ema[1] > 1 - NORM_DECAY ** (NORM_STEPS - 0.5)  # NORM_STEPS good ones or more
        skip = skip | (known & (grad_norm * norm_ema[1] > spike_factor * norm_ema[0]))
    return skip.float()


def validate(run: Run, model: nn.Module, replicated: nn.Module, batches: Batches) -> bool:
    """Evaluates and records it; True if these weights are among the best to keep.

    An evaluation that is interrupted leaves nothing: the next job makes it first.
    """
    step, data = run.progress.step, run.val_data
    with run.agreed.conditions.timed("evaluation"):
        scores = evaluate(replicated, data, batches, run.inputs.byte_lengths, run.agreed)
        reshard(model)
        if scores is None:
            return False
        if not math.isfinite(scores["val_loss"]):
            raise NotFiniteError(step, "the validation loss is not finite")
        if len(run.data.names) > 1:
            scores["epochs"] = run.data.epochs(step * run.config.train.global_batch_size)
        samples = predictions(replicated, data, batches, run.inputs.vocab_size, run.agreed)
        reshard(model)
    return run.record_evaluation(scores, samples)


def check_model(run: Run, model: nn.Module, batches: Batches) -> bool:
    """Holds a model whose code has changed against the loss that was recorded of these weights.

    False if a signal came before it was known, so that the run ends here.

    Raises:
        AgreedError: they are worth something else now: another model trained them.
    """
    recorded = run.progress.val_loss
    run.say("model.py has changed: these weights were trained by another model")
    if recorded is None or not run.val_data:
        run.say("that it computes the same can't be checked: this step was not evaluated")
        return True
    scores = evaluate(model, run.val_data, batches, run.inputs.byte_lengths, run.agreed)
    reshard(model)
    if scores is None:
        return False
    losses = f"validation loss {scores['val_loss']:.4f}, recorded {recorded:.4f}"
    tolerance = 1e-3 if run.world.dtype == torch.float32 else 2e-2
    if not abs(scores["val_loss"] - recorded) < tolerance:
        raise AgreedError(
            f"model.py has changed what the model computes: {losses}; take the old code, which is"
            f" in {run.directory / 'code'}, or start a new run from these weights with"
            " train.init_from"
        )
    run.say(f"it computes the same: {losses}")
    return True


def build(
    config: Config,
    inputs: Inputs,
    checkpoint: Checkpoint | None,
    world: World,
    say: Callable[[str], None],
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
        start_from(config, model, inputs, world, say)
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


def start_from(
    config: Config, model: nn.Module, inputs: Inputs, world: World, say: Callable[[str], None]
) -> None:
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
    say(f"weights of step {checkpoint.step} from {checkpoint.path}")
    if known and (new_tokens := inputs.vocab_size - known):
        say(f"{new_tokens} new tokens start from the mean of the old embeddings")


def open_datasets(config: Config, inputs: Inputs) -> tuple[Mixture, Mixture | None]:
    """The training splits and, of the datasets that have one, the validation splits."""

    parts = inputs.manifests, inputs.weights, config.data.seq_len
    data = open_split("train", inputs.manifests, *parts)
    validated = [name for name, found in inputs.manifests.items() if "val" in found["splits"]]
    if not validated and config.train.patience:
        raise ConfigError("train.patience needs a validation split: set data.val_fraction")
    return data, open_split("val", validated, *parts) if validated else None


if __name__ == "__main__":
    run_program(main)
