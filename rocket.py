"""Rocket trains a Llama 2 on a prepared dataset. This file is the loop; read it from the top.

    python rocket.py CONFIG [--section.key=value …]
    torchrun --standalone --nproc_per_node=8 rocket.py CONFIG [--section.key=value …]

The same command again resumes the run from its newest checkpoint that verifies.
"""

from __future__ import annotations

from config import ACCEPT_CHANGES, check_command_line

FLAGS = {ACCEPT_CHANGES: "resume although the code, or keys that need consent, have changed"}

if __name__ == "__main__":  # before torch, which takes seconds to import
    check_command_line(usage=__doc__, flags=FLAGS)

import math

import torch
from torch import Tensor, nn

from checkpoint import Checkpoint, load_optimizer, load_weights
from config import (
    Config,
    ConfigError,
    load_config,
    loss_chunk,
    resolve_path,
    run_program,
)
from dataset import Batch, Batches, Mixture, open_split
from distributed import (
    AgreedError,
    Lagged,
    World,
    autocast,
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
from fast import IGNORE
from inference.evaluation import evaluate, predictions
from job import Signals, job_end
from model import Llama, initial_weight
from optimizer import build_optimizer, learning_rate
from preflight import InitialWeights, Inputs, check_inputs, initial_weights, preflight
from run import NotFiniteError, Run

NORM_DECAY = 0.98  # of the running mean of the gradient norm, see should_skip
NORM_STEPS = 20  # steps that the mean must hold before others are compared with it


def main(arguments: list[str]) -> None:
    signals = Signals()
    config, flags = load_config(arguments, usage=__doc__, flags=FLAGS)
    with process_group(config) as world:
        signals.install()  # earlier, a signal just ends the process: there is nothing to save
        train(config, ACCEPT_CHANGES in flags, signals, world)


def train(config: Config, accept_changes: bool, signals: Signals, world: World) -> None:
    """Trains the run in train.out_dir until it is finished, or until this job has to stop.

    The run is resumed from its newest checkpoint, if there is one; a new run may branch from one of
    another run. Nothing is written before all checks have passed. world.once runs a function on
    rank 0 and gives its result to all ranks.
    """
    directory = resolve_path(config.train.out_dir)
    end = world.once(lambda: job_end(config.train.max_hours))
    inputs = world.once(lambda: check_inputs(directory, config, accept_changes))
    with Run(directory, config, inputs, *open_datasets(config, inputs), world) as run:
        checkpoint = run.resume()
        reason = run.over()  # it may be finished already
        if not reason:
            preflight(directory, config, checkpoint, run.parameters, world)
            initial = world.once(lambda: None if checkpoint else initial_weights(config, inputs))
            world.once(run.open)
            reason = train_job(run, checkpoint, initial, signals, end)
        run.end(reason)


def train_job(
    run: Run,
    checkpoint: Checkpoint | None,
    initial: InitialWeights | None,
    signals: Signals,
    end: float,
) -> str:
    """Builds model and optimizer and trains them; returns why the run, or this job, is over."""
    config, inputs, world = run.config, run.inputs, run.world
    model, optimizer = build(config, inputs, checkpoint, initial, world)
    with Batches(run.data, config, inputs.bos_id, world) as batches:
        run.describe(batches, checkpoint, initial)
        run.start(model, optimizer, signals, end)
        if inputs.model_changed and check_model(run, model, batches):
            world.once(run.record_start)  # if model.py has not changed, run.open has done that
        return train_steps(run, model, optimizer, batches)


def train_steps(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches
) -> str:
    """The loop: evaluate, save, stop, step. Returns why the run, or this job, is over.

    The host does not wait for the device. It reads the numbers of a step, and the votes of all
    ranks on whether to stop or save, one step later. All ranks read them at the same step.
    """
    config, world, progress, agreed = run.config, run.world, run.progress, run.agreed
    first = progress.step
    replicated = replicate(model, world)
    norm_ema = torch.tensor(progress.norms, device=world.device)
    lagged = Lagged(agreed.conditions.while_waiting)
    run.job_row()
    agreed.ask()  # the ranks vote now; in the loop, their votes travel with the loss of each step
    while True:
        # evaluate
        best = False
        if run.evaluation_due() and not agreed.stop:
            run.record(lagged.drain())
            best = not agreed.stop and validate(run, model, replicated, batches)
            agreed.ask()
            if not agreed.stop and progress.val_loss is None:
                continue  # interrupted by a request to stop that no longer holds: evaluate again

        # save
        over = run.over()
        if best or over or agreed.stop or agreed.save_due or run.save_due():
            run.record(lagged.drain())
            if progress.position != run.saved:
                run.save(norm_ema)
                agreed.ask()

        # stop
        if reason := over or agreed.stop:
            return reason

        # step
        micro_batches = batches.of_step(progress.step)
        lr = learning_rate(progress.step, run.max_steps, config.optimizer)
        votes = agreed.votes(steps=2, evaluation=run.evaluation_near())
        numbers = train_step(
            replicated, optimizer, micro_batches, lr, votes, norm_ema, config, world
        )
        progress.step, progress.val_loss = progress.step + 1, None
        run.record(lagged.push((progress.step, lr), numbers))
        agreed.conditions.step_done()
        if progress.step == first + 1:  # compiled by now: from here on, a slow rank is an error
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
    """One optimizer step over this rank's micro-batches, skipped where it would do harm or nothing.

    The loss is the mean over the trained tokens of the *global* batch, so neither accumulation nor
    filler sequences bias it. DDP and FSDP2 average gradients over ranks, hence the factor
    world.size.

    Args:
        votes: what this rank asks for; summed over the ranks together with the loss.
        norm_ema: see should_skip. Takes in the norm of a good step, if train.spike_factor is set.

    Returns:
        One tensor, equal on all ranks and still on the device: loss (nats per token), sums of the
        votes, number of ranks that skip the step, gradient norm before clipping.
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
    # Without a trained token, old moments and weight decay would still move the weights.
    skip = torch.where(trained > 0, skip, 1.0)
    sums = world.sum(torch.cat((loss[None], votes, skip[None])))
    skip = sums[-1].clamp(max=1.0)  # all ranks skip if one does: norms may differ in the last bit
    if config.train.spike_factor:
        taken = torch.stack((grad_norm, torch.ones_like(grad_norm)))
        norm_ema.lerp_(torch.where(skip > 0, norm_ema, taken), 1 - NORM_DECAY)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    # Mixed precision reports an overflow to fused optimizers by these attributes. With found_inf 1,
    # the optimizer changes nothing, not even its step counts, and the host need not know.
    optimizer.grad_scale, optimizer.found_inf = None, skip
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat((sums, grad_norm[None]))


def should_skip(loss: Tensor, grad_norm: Tensor, norm_ema: Tensor, spike_factor: float) -> Tensor:
    """1.0 if loss or gradient is not finite, or the gradient norm spikes; else 0.0. On the device.

    norm_ema (2,) holds two decaying sums over the steps that were not skipped: of their gradient
    norms, and of ones. The quotient is the running mean of the norms.
    """
    skip = (loss + grad_norm).isfinite().logical_not()
    if spike_factor:
        known = norm_ema[1] > 1 - NORM_DECAY ** (NORM_STEPS - 0.5)  # at least NORM_STEPS good steps
        skip = skip | (known & (grad_norm * norm_ema[1] > spike_factor * norm_ema[0]))
    return skip.float()


def validate(run: Run, model: nn.Module, replicated: nn.Module, batches: Batches) -> bool:
    """Evaluates this step and records it; True if the weights are among the best to keep.

    An evaluation that is interrupted records nothing; the next job evaluates the step first.
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
    """Compares the validation loss of changed model code with the recorded loss of these weights.

    False if the evaluation was interrupted by a request to stop; then this job ends.

    Raises:
        AgreedError: the losses differ, so the weights belong to another model.
    """
    recorded = run.progress.val_loss
    run.say("the model's code has changed since these weights were saved")
    if recorded is None or not run.val_data:
        run.say("can't check whether it computes the same: this step was not evaluated")
        return True
    scores = evaluate(model, run.val_data, batches, run.inputs.byte_lengths, run.agreed)
    reshard(model)
    if scores is None:
        return False
    losses = f"validation loss {scores['val_loss']:.4f}, recorded {recorded:.4f}"
    tolerance = 1e-3 if run.world.dtype == torch.float32 else 2e-2
    if not abs(scores["val_loss"] - recorded) < tolerance:
        raise AgreedError(
            f"model.py has changed what the model computes: {losses}; go back to the old code in"
            f" {run.directory / 'code'}, or start a new run from these weights with train.init_from"
        )
    run.say(f"model.py still computes the same: {losses}")
    return True


def build(
    config: Config,
    inputs: Inputs,
    checkpoint: Checkpoint | None,
    initial: InitialWeights | None,
    world: World,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer: from a checkpoint, from train.init_from, or fresh."""
    cost = loss_chunk(config, world.device.type == "cuda"), config.train.recompute
    with torch.device("meta"):  # without memory: what will be sharded is never whole
        model = Llama(config.model, inputs.vocab_size, *cost)
    model = parallelize(model, config.parallel, world)
    if compiles(config.train.compile, world.device):
        model.compile_parts()
    optimizer = build_optimizer(model, config.optimizer, world.dtype)
    if checkpoint:
        world.each(lambda: load_weights(model, checkpoint))
        world.each(lambda: load_optimizer(model, optimizer, checkpoint))
    elif initial:
        world.each(lambda: load_weights(model, *initial))
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


def open_datasets(config: Config, inputs: Inputs) -> tuple[Mixture, Mixture | None]:
    """The training splits, and the validation splits of the datasets that have them."""
    validated = [name for name, found in inputs.manifests.items() if "val" in found["splits"]]
    if not validated and config.train.patience:
        raise ConfigError("train.patience needs a validation split: set data.val_fraction")
    parts = inputs.manifests, inputs.weights, config.data.seq_len
    data = open_split("train", inputs.manifests, *parts)
    return data, open_split("val", validated, *parts) if validated else None


if __name__ == "__main__":
    run_program(main)
