"""Evaluation: the loss on a split, by all ranks while a model trains or by one process afterwards,
what a model writes meanwhile, the loss on any text, and multiple choice."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import UserError, existing_path, read_rows, read_utf8, resolve_path
from dataset import (
    Batch,
    Batches,
    Mixture,
    evenly_spaced,
    mixture_weights,
    open_split,
    padded,
    read_manifest,
)
from distributed import AgreedError, Lagged, World, autocast, fetch
from fast import IGNORE
from job import Consensus
from model import Llama
from tokenizer import Tokenizer

if TYPE_CHECKING:  # see measure
    from inference.generation import Source

WRITTEN_TOKENS, WRITTEN_TEMPERATURE = 48, 0.8  # of the text that a model writes by itself
MAX_TEXT_BYTES = 16_000_000  # encoding one text takes 60 bytes a byte


class Scores(NamedTuple):
    """Loss in nats per token, its perplexity, bits per byte of text, predicted tokens, bytes."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, loss: float, bits_per_byte: float, tokens: float, size: float) -> Scores:
        perplexity = math.exp(min(loss, 700.0))  # finite in JSON, however bad the model
        return cls(loss, perplexity, bits_per_byte, int(tokens), int(size))

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4f} nats/token | perplexity {self.perplexity:.2f}"
        size = f"{self.tokens:,} tokens, {self.bytes:,} bytes"
        return f"{loss} | {self.bits_per_byte:.4f} bits/byte | {size}"


class Answers(NamedTuple):
    """Shares of questions answered right, with their standard errors: by the log-likelihood of a
    choice, and by that per byte."""

    accuracy: float
    accuracy_error: float
    accuracy_by_bytes: float
    accuracy_by_bytes_error: float
    questions: int

    def __str__(self) -> str:
        first, error, by_bytes, other_error = (f"{100 * share:.1f}" for share in self[:4])
        shares = f"accuracy {first}% ± {error} | by bytes {by_bytes}% ± {other_error}"
        return f"{shares} | {self.questions} questions"


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Mixture, batches: Batches, byte_lengths: np.ndarray, agreed: Consensus
) -> dict[str, Any] | None:
    """Loss, perplexity and bits per byte over a fixed part of a split, shared by all ranks; None if
    they agreed to stop before its end. See score for arguments and errors."""
    windows = data.evenly_spaced(batches.config.train.eval_sequences)
    parts = [batches.of_windows(data, part) for part in windows]
    if not (scored := score(model, data, parts, byte_lengths, batches.world, "val", agreed)):
        return None
    (loss, perplexity, bits, *_), losses = scored
    row = {"val_loss": loss, "val_perplexity": perplexity, "val_bits_per_byte": bits}
    return row | ({"val_losses": losses} if len(batches.data.names) > 1 else {})


def score(
    model: nn.Module,
    data: Mixture,
    parts: list[Iterator[Batch]],
    byte_lengths: np.ndarray,
    world: World,
    split: str,
    agreed: Consensus | None = None,
) -> tuple[Scores, dict[str, float]] | None:
    """A mixture's scores, and the loss of each of its datasets; None if the ranks agreed to stop.
    Loss and bits per byte of a mixture are the means of its datasets' by weight.

    Args:
        parts: for each dataset, this rank's batches of it.
        byte_lengths: bytes of text that each token stands for (V,).
        agreed: by what the ranks agree to stop; None: nothing stops it.

    Raises:
        AgreedError: no token of a dataset's part is trained on.
    """
    while_waiting = agreed.conditions.while_waiting if agreed else lambda since: None
    lagged, bytes_of = Lagged(while_waiting), torch.from_numpy(byte_lengths).to(world.device)
    sums = torch.zeros(len(parts), 3, dtype=torch.float64, device=world.device)
    for own, part in zip(sums, parts, strict=True):
        for batch in part:
            with autocast(model, world):
                own[0] += model(*batch)
            trained = batch.targets != IGNORE  # a mask: an index would wait for the device
            own[1] += trained.sum()
            own[2] += (bytes_of[batch.targets.clamp(min=0)] * trained).sum()
            if agreed and stopped(agreed, lagged):
                return None
    totals, losses, bits = fetch(world.sum(sums), while_waiting), {}, {}
    for name, (nats, count, size) in zip(data.names, totals, strict=True):
        if not size:
            raise AgreedError(
                f"{name}: the windows of the {split} split that are evaluated have no text to train"
                " on; set train.eval_sequences higher, or data.train_on and prepare anew"
            )
        losses[name], bits[name] = nats / count, nats / math.log(2) / size
    _, tokens, size = map(sum, zip(*totals, strict=True))
    return Scores.of(data.mean(losses), data.mean(bits), tokens, size), losses


def stopped(agreed: Consensus, lagged: Lagged) -> bool:
    """Casts this rank's votes; True if by those cast before all ranks agreed to stop."""
    heard = lagged.push(None, agreed.world.sum(agreed.votes()))
    return any(agreed.reason(votes) for _, votes, _ in heard)


@torch.no_grad()
def predictions(
    model: nn.Module, data: Mixture, batches: Batches, vocab_size: int, agreed: Consensus
) -> list[dict[str, str]]:
    """What the model writes by itself, and what it predicts for each trained token in the second
    half of a few fixed windows.

    Predictions see the true tokens before each: one forward pass of training's shape, which is
    compiled, and in which every rank of a sharded model takes part alike.
    """
    world, prompts = batches.world, batches.config.train.sample_prompts
    if not prompts:
        return []
    windows, size, found = evenly_spaced(prompts, data.windows), batches.shape[1], []
    for start in range(0, len(windows), size):
        asked = windows[start : start + size]
        batch = batches.on_device(*data.batch(padded(asked, size)))
        with autocast(model, world):
            logits = model(batch.tokens, documents=batch.documents, logits_at=slice(len(asked)))
        found += zip(*batch[:2], logits.argmax(dim=-1), strict=False)  # without the fillers
    written = continuation(model, data, world, vocab_size, agreed)
    if world.rank != 0:
        return []
    tokenizer = Tokenizer(resolve_path(batches.config.train.out_dir) / "tokenizer.model")
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
def continuation(
    model: nn.Module, data: Mixture, world: World, vocab_size: int, agreed: Consensus
) -> tuple[list[int], list[int]] | None:
    """The beginning of a fixed window (of a conversation, its prompt) and what the model writes
    after it, with the same noise at every evaluation. None if the ranks agreed to stop.

    Each token takes a forward pass of one short sequence, on every rank alike. Its shape is not
    training's, so it is not compiled. The largest logit after Gumbel noise is a sample (Gumbel,
    "Statistical Theory of Extreme Values", 1954), so nothing is drawn on the device.
    """
    tokens, targets = data.batch(np.zeros(1, dtype=np.int64))
    prompted = int((targets[0] != IGNORE).int().argmax())  # tokens before the first one trained on
    length = max(1, min(prompted + 1 if prompted else WRITTEN_TOKENS, data.seq_len // 2))
    end = min(length + WRITTEN_TOKENS, data.seq_len)
    noise = torch.empty(end, vocab_size)
    noise = noise.exponential_(generator=torch.Generator().manual_seed(0)).log_().neg_()
    tokens, noise = tokens[:, :end].to(world.device), noise.to(world.device)
    lagged = Lagged(agreed.conditions.while_waiting)
    for position in range(length, end):
        with torch.compiler.set_stance("force_eager"), autocast(model, world):
            logits = model(tokens, logits_at=(0, slice(position - 1, position)))
        tokens[0, position] = (logits[0] / WRITTEN_TEMPERATURE + noise[position]).argmax()
        if stopped(agreed, lagged):
            return None
    ids = tokens[0].tolist()
    return ids[:length], ids[length:]


def measure(source: Source, options: argparse.Namespace) -> None:
    """Evaluates the model on a split, a text file or a file of choices, and prints the figures.

    As in training, weights are float32 and products of the type that the device does well.
    """
    # here, since training evaluates too, and needs nothing of sampling
    from inference.generation import device_and_dtype, load_model, take_any_shape

    world = World(0, 1, 0, 1, *device_and_dtype(options))  # a lone rank
    take_any_shape()
    model = load_model(source, world.device, torch.float32)
    with autocast(model, world):
        if options.choices:
            found = evaluate_choices(model, source.tokenizer, existing_path(options.choices))
        elif options.evaluate in ("train", "val", "test"):
            found = evaluate_split(model, source, options.evaluate, options.batch_size, world)
        else:
            path = existing_path(options.evaluate)
            if not path.exists():
                raise UserError(f"--evaluate={path}: No such file; or give train, val or test")
            found = evaluate_text(model, source.tokenizer, path, options.batch_size)
    if options.json:
        print(json.dumps({"model": str(source.path), "step": source.step, **found._asdict()}))
    else:
        print(found)


@torch.inference_mode()
def evaluate_split(
    model: Llama, source: Source, split: str, batch_size: int, world: World
) -> Scores:
    """The whole split of a run's dataset, in windows of data.seq_len, as training evaluates it.

    Raises:
        UserError: not a run; its dataset is gone or another one; it has no such split, or nothing
            in it is trained on.
    """
    if source.run_config is None:
        raise UserError(
            f"{source.path} has no dataset: --evaluate={split} needs a run; give a text file"
        )
    config, tokenizer = source.run_config, source.tokenizer
    weights = mixture_weights(config.data)
    manifests = {name: read_manifest(resolve_path(name), tokenizer.sha256) for name in weights}
    names = [name for name, manifest in manifests.items() if split in manifest["splits"]]
    if not names:
        raise UserError(f"{' and '.join(weights)}: no {split} split; see data.{split}_fraction")
    data = open_split(split, names, manifests, weights, config.data.seq_len)
    batches = Batches(data, config, tokenizer.bos_id, world)

    def of_windows(windows: np.ndarray) -> Iterator[Batch]:  # without filler sequences
        for start in range(0, len(windows), batch_size):
            yield batches.on_device(*data.batch(windows[start : start + batch_size]))

    parts = [of_windows(windows) for windows in data.evenly_spaced(0)]
    return score(model, data, parts, tokenizer.byte_lengths(), world, split)[0]


@torch.inference_mode()
def evaluate_text(model: Llama, tokenizer: Tokenizer, path: Path, batch_size: int) -> Scores:
    """A text file as one document: each token is predicted once, from at least half a context
    before it, or from all tokens back to BOS.

    Raises:
        UserError: it can't be read, is empty, too large or not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a text file")
    if path.exists() and path.stat().st_size > MAX_TEXT_BYTES:
        raise UserError(f"{path}: above {MAX_TEXT_BYTES / 1e6:.0f} MB; evaluate a part of it")
    text = read_utf8(path)
    ids = np.concatenate(([tokenizer.bos_id], tokenizer.encode(text))).astype(np.int64)
    if len(ids) < 2:
        raise UserError(f"{path}: holds no text")
    nats = 0.0
    for batch in batches(ids, model.config.max_seq_len, batch_size):
        tokens, targets = (part.to(model.lm_head.weight.device) for part in batch)
        nats += model(tokens, targets).item()
    count, size = len(ids) - 1, len(text.encode())
    return Scores.of(nats / count, nats / math.log(2) / size, count, size)


def batches(ids: np.ndarray, length: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets (B, T) of windows that overlap by half: each of ids but the first is a
    target once, IGNORE otherwise."""
    stride = max(1, length // 2)
    starts = np.array([0, *range(stride, len(ids) - 1 - (length - stride), stride)])
    length = min(length, len(ids) - 1)
    extended = np.pad(ids, (0, length), constant_values=IGNORE)
    windows = np.lib.stride_tricks.sliding_window_view(extended, length + 1)
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        tokens, targets = windows[chosen, :-1].clip(min=0), windows[chosen, 1:]
        targets[chosen > 0, : length - stride] = IGNORE  # they are targets of the window before
        yield torch.from_numpy(tokens), torch.from_numpy(targets)


@torch.inference_mode()
def evaluate_choices(model: Llama, tokenizer: Tokenizer, path: Path) -> Answers:
    """Multiple choice: the model answers with the choice that is likeliest after the prompt.

    Raises:
        UserError: a row is not a question, or does not fit the context.
    """
    right = []
    for row, prompt, choices, answer in read_questions(path):
        logs = [log_likelihood(model, tokenizer, prompt, c, f"{path}, row {row}") for c in choices]
        by_bytes = [log / len(c.encode()) for log, c in zip(logs, choices, strict=True)]
        right.append([int(np.argmax(logs)) == answer, int(np.argmax(by_bytes)) == answer])
    errors = np.std(right, axis=0, ddof=1) / math.sqrt(len(right)) if len(right) > 1 else [0.0, 0.0]
    figures = np.column_stack((np.mean(right, axis=0), errors)).flatten().tolist()
    return Answers(*figures, len(right))


def log_likelihood(
    model: Llama, tokenizer: Tokenizer, prompt: str, choice: str, where: str
) -> float:
    """Nats of the tokens that a choice adds to its prompt, or changes in it."""
    device, limit = model.lm_head.weight.device, model.config.max_seq_len
    before = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt + choice).tolist()]
    same = [a == b for a, b in zip(before, ids, strict=False)]  # BOS, at least
    start = [*same, False].index(False)
    if len(ids) - start > limit:
        raise UserError(f"{where}: a choice of {len(ids) - start} tokens is above max_seq_len")
    cut = max(0, len(ids) - 1 - limit)  # the beginning of a prompt that is too long
    ids, start = ids[cut:], start - cut
    targets = torch.tensor([ids[1:]])
    targets[:, : start - 1] = IGNORE
    return -model(torch.tensor([ids[:-1]], device=device), targets.to(device)).item()


def read_questions(path: Path) -> Iterator[tuple[int, str, list[str], int]]:
    """Row, prompt, choices and number of the right one, of each line of JSON.

    Raises:
        UserError: a row is not a question, or there is none.
    """
    form = '{"prompt": "text", "choices": ["text", …], "answer": 0}'
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: holds no question; write {form} a line")
    for number, line in rows:
        try:
            value: Any = json.loads(line)
            prompt, choices, answer = (value[key] for key in ("prompt", "choices", "answer"))
            "".join([prompt, *choices]).encode()  # fails unless all are text that can be UTF-8
            right = type(choices) is list and len(choices) > 1 and "" not in choices
            right = right and type(answer) is int and 0 <= answer < len(choices)
        except (ValueError, TypeError, KeyError, RecursionError):
            right = False
        if not right:
            raise UserError(f"{path}, row {number}: write {form}")
        yield number, prompt, choices, answer
