"""From token bins to batches: the packed dataset, and the order in which a run sees it.

The order is a pure function of the configuration and the step, so that a run resumes from the step
number alone on any number of ranks. Nothing here knows of a model or of processes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import DATASET_VERSION, ConfigError, UserError
from model import IGNORE

OPEN_SHARDS = 64  # memory maps kept open: a thousand would exhaust the usual `ulimit -n 1024`


def read_manifest(directory: Path, tokenizer_sha256: str) -> dict[str, Any]:
    """The manifest of a prepared dataset, checked against its files' sizes and the tokenizer.

    Raises:
        UserError: no dataset, another version or tokenizer, a shard that is missing or cut.
    """
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        version, tokenizer = manifest["version"], manifest["tokenizer"]["sha256"]
        sizes = {
            directory / shard["file"]: 2 * shard["tokens"]
            for split in manifest["splits"].values()
            for shard in split["shards"]
        }
    except FileNotFoundError:
        raise UserError(
            f"{directory}: no dataset here (manifest.json is missing); run prepare.py"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; run prepare.py with --force") from None
    if version != DATASET_VERSION:
        raise UserError(
            f"{path}: format version {version}, not {DATASET_VERSION}; run prepare.py with --force"
        )
    if tokenizer != tokenizer_sha256:
        raise UserError(
            f"{path}: the dataset was made with another tokenizer (sha256 {tokenizer[:12]}…, not"
            f" {tokenizer_sha256[:12]}…); set tokenizer.path to it, or run prepare.py with --force"
        )
    for file, expected in sizes.items():
        size = file.stat().st_size if file.exists() else -1
        if size != expected:
            found = "is missing" if size < 0 else f"has {size} bytes instead of {expected}"
            raise UserError(f"{file} {found}; run prepare.py with --force")
    return manifest


def fingerprint(manifest: dict[str, Any]) -> str:
    """The identity of a dataset's content: a digest of its shards' digests and its tokenizer."""
    content = {"splits": manifest["splits"], "tokenizer": manifest["tokenizer"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TokenDataset:
    """The windows of one split: window i is seq_len + 1 tokens from i · seq_len on.

    Memory is O(shards); shards open when they are first read.

    Raises:
        ConfigError: the split is missing or shorter than one window of data.seq_len.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], split: str, seq_len: int) -> None:
        shards = manifest["splits"].get(split, {"shards": []})["shards"]
        self.files = [directory / shard["file"] for shard in shards]
        self.starts = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        self.seq_len = seq_len
        self.tokens = int(self.starts[-1])
        self.windows = max(0, self.tokens - 1) // seq_len
        self.unused_tokens = self.tokens - self.windows * seq_len - 1
        if not self.windows:
            raise ConfigError(
                f"{directory}: the {split} split has {self.tokens} tokens, less than one window of"
                f" data.seq_len + 1 = {seq_len + 1}"
            )
        self.shard = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def _open(self, index: int) -> np.memmap:
        return np.memmap(self.files[index], dtype="<u2", mode="r")

    def window(self, index: int) -> np.ndarray:
        """The seq_len + 1 token ids of a window, uint16."""
        return np.concatenate([self.shard(i)[start:stop] for i, start, stop in self._pieces(index)])

    def places(self, index: int) -> list[dict[str, Any]]:
        """Where a window lies: file name, first token and number of tokens of each piece."""
        return [
            {"shard": self.files[i].name, "offset": start, "tokens": stop - start}
            for i, start, stop in self._pieces(index)
        ]

    def _pieces(self, index: int) -> Iterator[tuple[int, int, int]]:
        """The pieces of a window as (shard, start, stop), in tokens from the shard's beginning."""
        start, stop = index * self.seq_len, (index + 1) * self.seq_len + 1
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            first, end = int(self.starts[shard]), int(self.starts[shard + 1])
            yield shard, start - first, min(stop, end) - first
            start, shard = end, shard + 1

    def batch(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens and targets (B, seq_len), int64, of window numbers (B,).

        A number of -1 is a filler: token 0, with no target to train on.
        """
        ids = np.zeros((len(windows), self.seq_len + 1), dtype=np.int64)
        for row, index in zip(ids, windows, strict=True):
            if index >= 0:
                row[:] = self.window(int(index))
        tokens, targets = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        targets[torch.from_numpy(windows < 0)] = IGNORE
        return tokens, targets


def step_windows(seed: int, step: int, batch_size: int, windows: int) -> np.ndarray:
    """The windows (batch_size,) of a step: slots step · B … (step + 1) · B - 1 of the run."""
    slots = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, positions = np.divmod(slots, windows)
    order = np.empty_like(slots)
    for epoch in np.unique(epochs):  # a batch may straddle epochs
        inside = epochs == epoch
        order[inside] = permute(seed, int(epoch), positions[inside], windows)
    return order


def permute(seed: int, epoch: int, positions: np.ndarray, size: int) -> np.ndarray:
    """Where a keyed permutation of range(size) sends positions; O(1) memory whatever the size.

    A Feistel network over the next power of four, whose outputs above size walk on until they fall
    inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    keys = np.frombuffer(digest + hashlib.sha256(digest).digest(), dtype="<u8")
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_scramble(right ^ round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= size
    return values.astype(np.int64)


def _scramble(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def evenly_spaced(count: int, windows: int) -> np.ndarray:
    """Up to count window numbers spread over a split, the same at every call; all of them for 0."""
    count = min(count, windows) or windows
    return np.arange(count, dtype=np.int64) * windows // count


def rank_share(windows: np.ndarray, micro_batch_size: int, rank: int, ranks: int) -> np.ndarray:
    """A rank's share of a global batch as (micro-batches, sequences), -1 for fillers.

    Every rank gets the same shape, so that all run equal collectives, whatever the sizes.
    """
    share = -(-len(windows) // ranks)
    micro_batches = -(-share // micro_batch_size)
    size = -(-share // micro_batches)
    padded = np.full(micro_batches * size, -1, dtype=np.int64)
    mine = windows[rank * share : (rank + 1) * share]
    padded[: len(mine)] = mine
    return padded.reshape(micro_batches, size)
