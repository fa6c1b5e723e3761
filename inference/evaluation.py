"""Evaluation of a finished model: loss on a split or on any text, and multiple choice.

rocket.py's own evaluation, while it trains, is shared by its ranks; here is one process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import UserError, read_rows, read_utf8, resolve_path
from dataset import Mixture, TokenDataset, mixture_weights, read_manifest
from inference.generation import Source
from model import IGNORE, Llama
from tokenizer import Tokenizer

MAX_TEXT_BYTES = 16_000_000  # encoding one text takes 60 bytes a byte


class Scores(NamedTuple):
    """loss in nats a token; perplexity; bits_per_byte, of the text; tokens that were predicted."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


class Answers(NamedTuple):
    """Shares of questions answered right, with their standard errors: by the log-likelihood of a
    choice, and by that divided by its bytes."""

    accuracy: float
    accuracy_error: float
    accuracy_by_bytes: float
    accuracy_by_bytes_error: float
    questions: int


def scores(nats: float, tokens: int, size: int) -> Scores:
    """Of so many tokens that stand for so many bytes."""
    loss = nats / tokens
    return Scores(loss, math.exp(min(loss, 700.0)), nats / math.log(2) / size, tokens, size)


@torch.inference_mode()
def evaluate_split(model: Llama, source: Source, split: str, batch_size: int) -> Scores:
    """The whole split of a run's dataset, in windows of data.seq_len, as training evaluates it.

    Of a mixture loss and bits per byte are the means of its datasets' by weight.

    Raises:
        UserError: not a run; its dataset is gone or another one; it has no such split, or nothing
            in it is trained on.
    """
    if source.run_config is None:
        raise UserError(
            f"{source.path} has no dataset: --evaluate={split} needs a run; give a text file"
        )
    data = open_split(source, split)
    bytes_of = torch.from_numpy(source.tokenizer.byte_lengths())
    device = model.lm_head.weight.device
    found = {}
    for name, windows in zip(data.names, data.evenly_spaced(0), strict=True):
        nats, count, size = 0.0, 0, 0
        for start in range(0, len(windows), batch_size):
            tokens, targets = data.batch(windows[start : start + batch_size])
            documents = None
            if source.run_config.data.document_mask:
                documents = (tokens == source.tokenizer.bos_id).cumsum(dim=1).to(device)
            nats += model(tokens.to(device), targets.to(device), documents).item()
            trained = targets[targets != IGNORE]
            count += len(trained)
            size += int(bytes_of[trained].sum())
        if not size:
            raise UserError(f"{name}: the {split} split has no text that is trained on")
        found[name] = scores(nats, count, size)
    loss = data.mean({name: one.loss for name, one in found.items()})
    bits = data.mean({name: one.bits_per_byte for name, one in found.items()})
    totals = (sum(getattr(one, key) for one in found.values()) for key in ("tokens", "bytes"))
    return Scores(loss, math.exp(min(loss, 700.0)), bits, *totals)


def open_split(source: Source, split: str) -> Mixture:
    """The split of a run's datasets, of those that have it."""
    assert source.run_config is not None
    data = source.run_config.data
    weights = mixture_weights(data)
    opened = {}
    for name in weights:
        manifest = read_manifest(resolve_path(name), source.tokenizer.sha256)
        if split in manifest["splits"]:
            opened[name] = TokenDataset(resolve_path(name), manifest, split, data.seq_len)
    if not opened:
        raise UserError(f"{' and '.join(weights)}: no {split} split; see data.{split}_fraction")
    return Mixture(opened, weights)


@torch.inference_mode()
def evaluate_text(model: Llama, tokenizer: Tokenizer, path: Path, batch_size: int) -> Scores:
    """A text file as one document: each token once, behind at least half a context of others
    (but at the beginning, where BOS stands).

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
    nats, device = 0.0, model.lm_head.weight.device
    for batch in batches(ids, model.config.max_seq_len, batch_size):
        tokens, targets = (part.to(device) for part in batch)
        nats += model(tokens, targets).item()
    return scores(nats, len(ids) - 1, len(text.encode()))


def batches(ids: np.ndarray, length: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets (B, T) of windows that overlap by half: each of ids but the first is a
    target once, IGNORE else."""
    stride = max(1, length // 2)
    starts = [0, *range(stride, len(ids) - 1 - (length - stride), stride)]
    length = min(length, len(ids) - 1)
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        tokens = np.zeros((len(chosen), length), dtype=np.int64)
        targets = np.full_like(tokens, IGNORE)
        for row, start in enumerate(chosen):
            window = ids[start : start + length + 1]
            tokens[row, : len(window) - 1] = window[:-1]
            new = length - stride if start else 0  # targets before it are the last window's
            targets[row, new : len(window) - 1] = window[new + 1 :]
        yield torch.from_numpy(tokens), torch.from_numpy(targets)


@torch.inference_mode()
def evaluate_choices(model: Llama, tokenizer: Tokenizer, path: Path) -> Answers:
    """Multiple choice: the answer is the choice that the model thinks likeliest behind the prompt.

    Raises:
        UserError: a row is not a question, or does not fit the context.
    """
    right = []
    for row, prompt, choices, answer in read_questions(path):
        logs = [log_likelihood(model, tokenizer, prompt, c, f"{path}, row {row}") for c in choices]
        by_bytes = [log / len(c.encode()) for log, c in zip(logs, choices, strict=True)]
        right.append([int(np.argmax(logs)) == answer, int(np.argmax(by_bytes)) == answer])
    shares = np.mean(right, axis=0)
    errors = np.std(right, axis=0, ddof=1) / math.sqrt(len(right)) if len(right) > 1 else [0.0, 0.0]
    figures = [float(figure) for pair in zip(shares, errors, strict=True) for figure in pair]
    return Answers(*figures, len(right))


def log_likelihood(
    model: Llama, tokenizer: Tokenizer, prompt: str, choice: str, where: str
) -> float:
    """Nats of the choice behind the prompt: of the tokens of both that differ from the prompt's."""
    device, limit = model.lm_head.weight.device, model.config.max_seq_len
    before = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt + choice).tolist()]
    same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), None)
    start = max(1, min(len(before), len(ids)) if same is None else same)
    if len(ids) - start > limit:
        raise UserError(f"{where}: a choice of {len(ids) - start} tokens is above max_seq_len")
    cut = max(0, len(ids) - 1 - limit)  # the beginning of a prompt that is too long
    ids, start = ids[cut:], start - cut
    targets = torch.tensor([ids[1:]])
    targets[:, : start - 1] = IGNORE
    return -model(torch.tensor([ids[:-1]], device=device), targets.to(device)).item()


def read_questions(path: Path) -> Iterator[tuple[int, str, list[str], int]]:
    """Row, prompt, choices and number of the right one, of each line of JSON."""
    form = '{"prompt": "text", "choices": ["text", …], "answer": 0}'
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: holds no question; write {form} a line")
    for number, line in rows:
        question = parse_question(line)
        if question is None:
            raise UserError(f"{path}, row {number}: write {form}")
        yield number, *question


def parse_question(line: str) -> tuple[str, list[str], int] | None:
    """Prompt, choices and answer of a line; None if it is no question."""
    try:
        value: Any = json.loads(line)
        prompt, choices, answer = (value[key] for key in ("prompt", "choices", "answer"))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = [prompt, *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(t, str) and not any("\ud800" <= c <= "\udfff" for c in t) for t in texts):
        return None
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if len(choices) < 2 or "" in choices or not whole or not 0 <= answer < len(choices):
        return None
    return prompt, choices, answer
