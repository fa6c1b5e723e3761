"""Rocket trains a Llama 2 on a prepared dataset. This is the loop: read it from top to bottom.

    python rocket.py CONFIG [--section.key=value …]
    torchrun --standalone --nproc_per_node=8 rocket.py CONFIG [--section.key=value …]

Running the same command again resumes from the newest checkpoint that verifies.
"""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import (
    Checkpoint,
    find_checkpoint,
    find_resumable,
    load_optimizer,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from config import (
    ROOT,
    Config,
    ConfigError,
    UserError,
    changes,
    load_config,
    resolve_path,
    run_program,
    tables,
)
from dataset import TokenDataset, evenly_spaced, fingerprint, rank_share, step_windows
from distributed import (
    AgreedError,
    World,
    autocast,
    clip_gradients,
    gradient_sync,
    init_distributed,
    local_part,
    parallelize,
    replicate,
    shut_down,
)
from model import IGNORE, Llama, flops_per_token, initial_weight
from optimizer import build_optimizer, learning_rate
from run import ACCEPT_CHANGES, Inputs, RunLog, check_inputs, open_run
from tokenizer import Tokenizer

FLAGS = {ACCEPT_CHANGES: "resume although keys whose rule on resume is consent have changed"}


@dataclass
class Progress:
    """What a run carries from step to step beside weights and optimizer; checkpoints hold it."""

    step: int = 0
    hours: float = 0.0
    best_val_losses: list[float] = field(default_factory=list)  # ascending, as many as are kept
    evaluations_since_best: int = 0
    val_loss: float | None = None  # of the evaluation at this very step, if there was one


def main(arguments: list[str]) -> None:
    config, flags = load_config(arguments, usage=__doc__, flags=FLAGS)
    world = init_distributed(config.train)
    try:
        train(config, ACCEPT_CHANGES in flags, world)
    except AgreedError:  # all ranks are here; after any other error some may wait for this one
        shut_down()
        raise
    shut_down()


def train(config: Config, accept_changes: bool, world: World) -> None:
    """Trains the run in train.out_dir to its end, from wherever it stands."""
    directory = resolve_path(config.train.out_dir)
    inputs = world.once(lambda: check_inputs(directory, config, accept_changes))
    data, val_data = open_datasets(config, inputs)
    max_steps = run_length(config, data)
    flops = flops_per_token(config.model, inputs.vocab_size, config.data.seq_len)
    log = RunLog(directory, world, max_steps, flops)
    progress = Progress()
    try:
        checkpoint = find_resumable(directory, world)
        if checkpoint:
            progress = Progress(**checkpoint.state)
        if not end_reason(progress, max_steps, config):
            world.once(lambda: open_run(directory, config))
            model, optimizer = build(config, inputs, checkpoint, log, world)
            describe_start(config, model, data, checkpoint, log, world)
            log.start(progress.step, progress.hours)
            train_steps(config, inputs, data, val_data, model, optimizer, progress, log, world)
    except BaseException as error:
        reason = "non_finite" if isinstance(error, NotFiniteError) else "error"
        log.failed(reason, progress.step)
        raise
    finally:
        log.close()
    log.end(end_reason(progress, max_steps, config), progress.step)


def train_steps(
    config: Config,
    inputs: Inputs,
    data: TokenDataset,
    val_data: TokenDataset | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    log: RunLog,
    world: World,
) -> None:
    """The loop: step, log, evaluate and save, until there is a reason to end."""
    batch_size, max_steps = config.train.global_batch_size, log.max_steps
    replicated = replicate(model, world)
    record = world.once(lambda: identity(config, inputs))
    saved_step, saved_at = progress.step, time.monotonic()

    def save() -> None:
        nonlocal saved_step, saved_at
        require_finite(loss, grad_norm, progress.step)
        progress.hours = log.hours
        record["state"] = asdict(progress)
        log.sync()
        save_checkpoint(log.directory, progress.step, model, optimizer, record, world)
        world.once(lambda: prune_checkpoints(log.directory, progress.step, config.checkpoint))
        saved_step, saved_at = progress.step, time.monotonic()
        log.restart_clock()

    while not end_reason(progress, max_steps, config):
        windows = step_windows(config.train.seed, progress.step, batch_size, data.windows)
        batches = list(load_batches(data, windows, config.train.micro_batch_size, world))
        rate = learning_rate(progress.step, max_steps, config.optimizer)
        loss, grad_norm = train_step(replicated, optimizer, batches, rate, config, world)
        progress.step += 1
        progress.val_loss = None
        log.count(batch_size * data.seq_len)
        at_end = progress.step == max_steps

        # Losses stay on the device until a row is due, so that steps queue up without a wait.
        if at_end or due(progress.step, config.train.log_interval):
            require_finite(loss, grad_norm, progress.step)
            log.training_row(progress.step, loss.item(), rate, grad_norm.item())

        worth_keeping = False
        if val_data and (at_end or due(progress.step, config.train.eval_interval)):
            require_finite(loss, grad_norm, progress.step)
            worth_keeping = validate(replicated, val_data, progress, inputs, config, log, world)

        if (
            worth_keeping
            or due(progress.step, config.checkpoint.interval)
            or minutes_passed(progress.step, saved_at, config, world)
        ):
            save()
    if saved_step != progress.step:
        save()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    rate: float,
    config: Config,
    world: World,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over this rank's micro-batches.

    The loss is the mean over the trained tokens of the *global* batch, so that neither accumulation
    nor fillers bias it; DDP and FSDP2 average gradients over ranks, hence the factor world.size.

    Returns:
        Loss in nats a token and gradient norm before clipping: global, and still on the device.
    """
    trained = world.sum(sum((targets != IGNORE).sum() for _, targets in batches))
    loss = torch.zeros((), device=world.device)
    for index, (tokens, targets) in enumerate(batches):
        with gradient_sync(model, index == len(batches) - 1):
            with autocast(model, world):
                share = model(tokens, targets) / trained
            (share * world.size).backward()
        loss += share.detach()
    grad_norm = clip_gradients(model, config.optimizer.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return world.sum(loss), grad_norm


def validate(
    model: nn.Module,
    data: TokenDataset,
    progress: Progress,
    inputs: Inputs,
    config: Config,
    log: RunLog,
    world: World,
) -> bool:
    """Evaluates and writes the rows of it; True if these weights are among the best to keep."""
    scores = evaluate(model, data, inputs.byte_lengths, config, world)
    if not math.isfinite(scores["val_loss"]):
        raise NotFiniteError(f"step {progress.step}: the validation loss is not finite")
    progress.val_loss = scores["val_loss"]
    log.evaluation_row(progress.step, scores)
    for row in predict(model, data, config, world):
        log.row({"step": progress.step, **row}, "samples.jsonl")
    log.restart_clock()
    best = progress.best_val_losses
    is_best = not best or progress.val_loss < best[0]
    progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
    kept = config.checkpoint.keep_best
    progress.best_val_losses = sorted([*best, progress.val_loss])[: max(1, kept)]
    return kept > 0 and progress.val_loss in progress.best_val_losses


@torch.no_grad()
def evaluate(
    model: nn.Module, data: TokenDataset, byte_lengths: np.ndarray, config: Config, world: World
) -> dict[str, float]:
    """Loss, perplexity and bits per byte over a fixed part of a split, shared by all ranks."""
    windows = evenly_spaced(config.train.eval_sequences, data.windows)
    bytes_of = torch.from_numpy(byte_lengths).to(world.device)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # nats, tokens, bytes
    for tokens, targets in load_batches(data, windows, config.train.micro_batch_size, world):
        with autocast(model, world):
            sums[0] += model(tokens, targets)
        trained = targets[targets != IGNORE]
        sums[1] += trained.numel()
        sums[2] += bytes_of[trained].sum()
    nats, count, size = world.sum(sums).tolist()
    loss = nats / count
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),  # finite in JSON, however bad the model
        "val_bits_per_byte": nats / math.log(2) / size,
    }


@torch.no_grad()
def predict(
    model: nn.Module, data: TokenDataset, config: Config, world: World
) -> list[dict[str, str]]:
    """What the model predicts at each token of the second half of a few fixed windows.

    One forward pass that sees the true tokens before each: as cheap sharded as whole, since every
    rank takes part in it alike.
    """
    if not config.train.sample_prompts:
        return []
    tokens, targets = data.batch(evenly_spaced(config.train.sample_prompts, data.windows))
    with autocast(model, world):
        predicted = model(tokens.to(world.device)).argmax(dim=-1).cpu()
    if world.rank != 0:
        return []
    decode = Tokenizer(resolve_path(config.train.out_dir) / "tokenizer.model").decode
    half = data.seq_len // 2
    return [
        {
            "prompt": decode(prompt[: half + 1].tolist()),
            "prediction": decode(guess[half:].tolist()),
            "truth": decode(truth[half:].tolist()),
        }
        for prompt, guess, truth in zip(tokens, predicted, targets, strict=True)
    ]


def load_batches(
    data: TokenDataset, windows: np.ndarray, micro_batch_size: int, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of a global batch, on the device: tokens and targets (B, T)."""
    for share in rank_share(windows, micro_batch_size, world.rank, world.size):
        batch = data.batch(share)
        if world.device.type == "cuda":  # a copy from pageable memory would wait for the device
            batch = tuple(ids.pin_memory() for ids in batch)
        tokens, targets = (ids.to(world.device, non_blocking=True) for ids in batch)
        yield tokens, targets


def build(
    config: Config, inputs: Inputs, checkpoint: Checkpoint | None, log: RunLog, world: World
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as the run needs them: resumed, from other weights, or fresh."""
    with torch.device("meta"):  # without memory: sharded first, the largest is never whole
        model = Llama(config.model, inputs.vocab_size)
    model = parallelize(model, config.parallel, world)
    optimizer = build_optimizer(model, config.optimizer)
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

    def find() -> tuple[Checkpoint, int]:
        checkpoint = find_checkpoint(resolve_path(config.train.init_from))
        free = ("model.max_seq_len", "model.init_std")  # they shape no weight and no product
        for change in chain(*changes(checkpoint.config, config).values()):
            if change.startswith("model.") and not change.startswith(free):
                raise ConfigError(f"train.init_from: {checkpoint.path} has another model: {change}")
        if checkpoint.manifest["tokenizer_sha256"] == inputs.tokenizer_sha256:
            return checkpoint, 0
        old = Tokenizer(checkpoint.path.parent.parent / "tokenizer.model")
        new = Tokenizer(resolve_path(config.tokenizer.path))
        if not new.extends(old):
            raise UserError(
                f"train.init_from: {new.path} does not extend {old.path}, with which"
                f" {checkpoint.path} was trained; use that one, or add pieces to it"
            )
        return checkpoint, new.vocab_size - old.vocab_size

    checkpoint, new_rows = world.once(find)
    world.each(lambda: load_weights(model, checkpoint, new_rows))
    log.say(f"weights of step {checkpoint.step} from {checkpoint.path}")
    if new_rows:
        log.say(f"{new_rows} new tokens start from the mean of the old embeddings")


def open_datasets(config: Config, inputs: Inputs) -> tuple[TokenDataset, TokenDataset | None]:
    """The training split and, unless the dataset has none, the validation split."""
    directory = resolve_path(config.data.dir)
    data = TokenDataset(directory, inputs.manifest, "train", config.data.seq_len)
    if "val" not in inputs.manifest["splits"]:
        if config.train.patience:
            raise ConfigError("train.patience needs a validation split: set data.val_fraction")
        return data, None
    return data, TokenDataset(directory, inputs.manifest, "val", config.data.seq_len)


def run_length(config: Config, data: TokenDataset) -> int:
    """Optimizer steps of the run, from train.max_steps or train.epochs."""
    if config.train.max_steps:
        return config.train.max_steps
    if config.train.epochs:
        return math.ceil(config.train.epochs * data.windows / config.train.global_batch_size)
    raise ConfigError("how long to train is not set: give train.max_steps or train.epochs")


def due(step: int, interval: int) -> bool:
    """Whether something that happens every interval steps happens now; never if interval is 0."""
    return interval > 0 and step % interval == 0


def minutes_passed(step: int, since: float, config: Config, world: World) -> bool:
    """Whether checkpoint.interval_minutes have passed by rank 0's clock; all ranks hear the same.

    Asked only where a row is due, since asking makes the ranks wait for each other.
    """
    minutes = config.checkpoint.interval_minutes
    if minutes == 0 or not due(step, config.train.log_interval):
        return False
    return world.once(lambda: time.monotonic() - since >= 60 * minutes)


def end_reason(progress: Progress, max_steps: int, config: Config) -> str | None:
    """Why the run ends at this step, or None."""
    if progress.step >= max_steps:
        return "max_steps"
    if 0 < config.train.patience <= progress.evaluations_since_best:
        return "early_stop"
    if 0 < config.train.stop_at_step <= progress.step:
        return "stop_at_step"
    return None


class NotFiniteError(AgreedError):
    """The loss or a gradient is not finite."""


def require_finite(loss: Tensor, grad_norm: Tensor, step: int) -> None:
    """Stops before damage is logged or saved; loss and norm are global, so all ranks stop."""
    if not (math.isfinite(loss.item()) and math.isfinite(grad_norm.item())):
        raise NotFiniteError(
            f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}; nothing was saved"
            " since the last checkpoint; lower optimizer.learning_rate or look at the data"
        )


def identity(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What a checkpoint records of where it comes from."""
    commit = ""
    if shutil.which("git"):
        git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "config": tables(config),
        "dataset": fingerprint(inputs.manifest),
        "tokenizer_sha256": inputs.tokenizer_sha256,
        "vocab_size": inputs.vocab_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit or None,
    }


def describe_start(
    config: Config,
    model: nn.Module,
    data: TokenDataset,
    checkpoint: Checkpoint | None,
    log: RunLog,
    world: World,
) -> None:
    """Says what is about to run, and what of it the user may not expect."""
    batch_size = config.train.global_batch_size
    share = rank_share(np.arange(batch_size), config.train.micro_batch_size, 0, world.size)
    on_gpu = world.device.type == "cuda"
    log.say(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters,"
        f" {config.parallel.strategy} on {world.size} × {world.device.type},"
        f" compute in {str(world.dtype).removeprefix('torch.')}"
        + (" with TF32 products" if world.dtype == torch.float32 and on_gpu else "")
    )
    log.say(
        f"{data.tokens:,} tokens in {data.windows:,} windows of {data.seq_len}"
        f" ({data.unused_tokens} tokens at the end unused);"
        f" {batch_size * data.seq_len:,} tokens a step in {share.shape[0]} micro-batches"
        f" of {share.shape[1]}"
    )
    if fillers := share.size * world.size - batch_size:
        log.say(
            f"global batch {batch_size} does not divide: {fillers} filler sequences a step"
            f" ({100 * fillers / (share.size * world.size):.0f}% of the work is wasted)"
        )
    if checkpoint:
        log.say(f"resuming from step {checkpoint.step}: {checkpoint.path}")


if __name__ == "__main__":
    run_program(main)
