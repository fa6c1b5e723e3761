"""Turns datasets, which are files of token ids, into the batches of a run.

A window is a sequence as it lies in a dataset. Slot n of a run is the n-th sequence that it trains
on, counted from 0. The window of a slot is a pure function of the configuration, so a run resumes
from its step number alone, on any number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import (
    DATASET_VERSION,
    Config,
    ConfigError,
    DataConfig,
    UserError,
    file_sha256,
    print_error,
    read_json,
    resolve_path,
)
from distributed import World
from fast import IGNORE

Json = dict[str, Any]

OPEN_FILES = 64  # memory maps kept open; a thousand would exhaust the usual `ulimit -n 1024`
WEIGHT_SUM = 2**20  # most that a mixture's weights, as whole numbers, add up to
INSTRUCT_KEYS = ("format", "seq_len", "template", "train_on", "too_long")  # they decide the masks


def read_manifest(directory: Path, tokenizer_sha256: str) -> Json:
    """The manifest of a prepared dataset; UserError if there is none, if it has another version or
    tokenizer, or if a file is missing or has another size."""
    path = directory / "manifest.json"
    if (manifest := read_json(path)) is None:
        raise UserError(f"{directory}: no dataset here (manifest.json is missing); run prepare.py")
    try:
        version, tokenizer = manifest["version"], manifest["tokenizer"]["sha256"]
        shards = [s for split in manifest["splits"].values() for s in split["shards"]]
        sizes = {shard["file"]: 2 * shard["tokens"] for shard in shards}
        if "seq_len" in manifest:
            sizes |= {mask_name(shard["file"]): shard["tokens"] for shard in shards}
    except (KeyError, TypeError, AttributeError):
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
    # A network file system sends sizes with a directory listing. Asking for each size would take a
    # round trip per shard, of which there may be ten thousand.
    with os.scandir(directory) as entries:
        found = {e.name: e.stat().st_size for e in entries if e.name in sizes and e.is_file()}
    for name, expected in sizes.items():
        if (size := found.get(name)) != expected:
            wrong = "is missing" if size is None else f"has {size} bytes instead of {expected}"
            raise UserError(f"{directory / name} {wrong}; run prepare.py with --force")
    return manifest


def mask_name(shard: str) -> str:
    """The name of a shard's mask: in instruct data, it says which tokens are trained on."""
    return shard.removesuffix(".bin") + ".mask"


def fingerprint(manifest: Json) -> str:
    """A digest that identifies a dataset. It covers the digests of the files, the tokenizer and,
    for instruct data, the keys that decide the masks."""
    content = {"splits": manifest["splits"], "tokenizer": manifest["tokenizer"]}
    content |= {name: manifest[name] for name in INSTRUCT_KEYS if name in manifest}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def mixture_fingerprint(manifests: dict[str, Json], weights: dict[str, int]) -> str:
    """A digest that identifies datasets, their order and weights; of one, its own fingerprint."""
    parts = [(fingerprint(manifest), weights[name]) for name, manifest in manifests.items()]
    if len(parts) == 1:
        return parts[0][0]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def mixture_weights(data: DataConfig) -> dict[str, int]:
    """The weights of data.mixture as whole numbers, by directory; without it, 1 for data.dir.

    They keep the given proportions: 0.7 and 0.3 become 7 and 3. If their sum would exceed
    WEIGHT_SUM, shares are rounded to multiples of 1 / WEIGHT_SUM, those with the largest remainders
    up. ConfigError if a share is rounded to zero, or a dataset is named twice.
    """
    mixture = data.mixture or {data.dir: 1}
    paths = {name: os.path.realpath(resolve_path(name)) for name in mixture}
    times = Counter(paths.values())
    if twice := [name for name, path in paths.items() if times[path] > 1]:
        raise ConfigError(f"data.mixture: {' and '.join(twice)} are one dataset; name it once")
    given = {name: Fraction(str(weight)) for name, weight in mixture.items()}
    shares = {name: weight / sum(given.values()) for name, weight in given.items()}
    total = min(math.lcm(*(share.denominator for share in shares.values())), WEIGHT_SUM)
    weights = {name: math.floor(share * total) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: weights[name] - shares[name] * total)
    for name in by_remainder[: total - sum(weights.values())]:
        weights[name] += 1
    for name, weight in weights.items():
        if not weight:
            raise ConfigError(
                f"data.mixture: {name} is {float(shares[name]):.1e} of the whole, less than the"
                f" smallest share, 1/{WEIGHT_SUM:,}; leave it out or give it more weight"
            )
    return weights


@functools.lru_cache(maxsize=OPEN_FILES)  # one limit for all datasets of the process
def open_file(path: Path, dtype: str) -> np.memmap:
    """A shard or mask as a memory map."""
    return np.memmap(path, dtype, mode="r")


def read_file(path: Path, dtype: str, start: int, stop: int) -> np.ndarray:
    """Entries [start, stop) of a shard or mask; UserError if the file was truncated while open:
    reading beyond its end would kill the process by SIGBUS, without a message."""
    array = open_file(path, dtype)
    if array.base.size() < array.nbytes:  # mmap.size() is the file's size now
        raise UserError(
            f"{path} was truncated while in use; restore it, or run prepare.py with --force"
        )
    return array[start:stop]


def digests(manifest: Json) -> dict[str, str]:
    """The sha256 of each shard and mask of a dataset, by file name."""
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    masks = {mask_name(s["file"]): s["mask_sha256"] for s in shards if "mask_sha256" in s}
    return {shard["file"]: shard["sha256"] for shard in shards} | masks


class TokenDataset:
    """The windows of one split of a dataset. Its memory grows with the shards, not the windows.

    Window i of a text dataset is the seq_len + 1 tokens from token i · seq_len on, in one shard or
    several. In an instruct dataset it is only seq_len tokens: these are whole conversations, so the
    next token is no target.
    """

    def __init__(self, directory: Path, manifest: Json, split: str, seq_len: int) -> None:
        """ConfigError if the split is missing, is shorter than one window, has no token to train
        on, or was packed for another seq_len."""
        shards = manifest["splits"].get(split, {"shards": []})["shards"]
        self.files = [directory / shard["file"] for shard in shards]
        self.masks = [directory / mask_name(shard["file"]) for shard in shards]
        self.starts = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        self.seq_len = seq_len
        self.packed = "seq_len" in manifest
        self.tokens = int(self.starts[-1])
        extra = 0 if self.packed else 1  # tokens that a window shares with the next one
        self.windows = max(0, self.tokens - extra) // seq_len
        self.unused_tokens = self.tokens - self.windows * seq_len - extra
        self.window_tokens = seq_len + extra
        if self.packed and manifest["seq_len"] != seq_len:
            raise ConfigError(
                f"{directory}: conversations were packed into windows of {manifest['seq_len']}"
                f" tokens, data.seq_len is {seq_len}; set data.seq_len={manifest['seq_len']}, or"
                " run prepare.py with --force"
            )
        if not self.windows:
            raise ConfigError(
                f"{directory}: the {split} split has {self.tokens} tokens, less than one window of"
                f" data.seq_len{' + 1' * extra} = {self.window_tokens}"
            )
        if self.packed and not any(shard["trained"] for shard in shards):
            raise ConfigError(
                f"{directory}: the {split} split has no token to train on; look at data.train_on"
                " and data.columns, and run prepare.py with --force"
            )

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A window's token ids, uint16, and which of them are training targets, bool."""
        pieces = [*self._pieces(index)]
        ids = np.concatenate([read_file(self.files[i], "<u2", *span) for i, *span in pieces])
        if not self.packed:
            return ids, np.ones(len(ids), dtype=bool)
        mask = np.concatenate([read_file(self.masks[i], "u1", *span) for i, *span in pieces])
        return ids, mask != 0

    def locate(self, index: int) -> list[Json]:
        """Where a window lies: file name, first token and number of tokens of each piece."""
        return [
            {"shard": self.files[i].name, "offset": start, "tokens": stop - start}
            for i, start, stop in self._pieces(index)
        ]

    def _pieces(self, index: int) -> Iterator[tuple[int, int, int]]:
        """The pieces of a window as (shard, start, stop): tokens [start, stop) of the shard."""
        start = index * self.seq_len
        stop = start + self.window_tokens
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            first, end = int(self.starts[shard]), int(self.starts[shard + 1])
            yield shard, start - first, min(stop, end) - first
            start, shard = end, shard + 1

    def order(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """The windows at these positions of an endless order; each epoch is a new permutation."""
        epochs, offsets = np.divmod(positions, self.windows)
        order = np.empty_like(positions)
        for epoch in np.unique(epochs):  # a batch may straddle epochs
            inside = epochs == epoch
            order[inside] = permute(seed, int(epoch), offsets[inside], self.windows)
        return order


class Mixture:
    """The datasets that a run reads, in proportion to their weights; also a single dataset.

    Windows are numbered consecutively: those of the first dataset, those of the second, and so on.
    """

    def __init__(self, datasets: dict[str, TokenDataset], weights: dict[str, int]) -> None:
        """Takes datasets and weights by directory; mixture_weights computes the weights."""
        self.names, self.datasets = list(datasets), list(datasets.values())
        self.weights = [weights[name] for name in self.names]
        self.shares = [weight / sum(self.weights) for weight in self.weights]
        self.starts = np.cumsum([0, *(data.windows for data in self.datasets)])
        self.windows = int(self.starts[-1])
        self.tokens = sum(data.tokens for data in self.datasets)
        self.unused_tokens = sum(data.unused_tokens for data in self.datasets)
        self.seq_len = self.datasets[0].seq_len
        self.offsets = [0] * len(self.names)  # in each dataset's order, see next_positions

    def step_windows(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """The windows (batch_size,) of a step, which has the slots from step · batch_size on. Each
        window of a dataset comes once per epoch of that dataset."""
        slots = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
        which, positions = interleave(slots, self.weights)
        order = np.empty_like(slots)
        for index in np.unique(which):
            mine = which == index
            own = positions[mine] + self.offsets[index]
            order[mine] = self.starts[index] + self.datasets[index].order(seed, own)
        return order

    def epochs(self, slots: int) -> dict[str, float]:
        """How many epochs of each dataset the first slots of a run make up."""
        counts = slot_counts(slots, self.weights)
        each = zip(self.names, counts, self.offsets, self.datasets, strict=True)
        return {name: (count + offset) / data.windows for name, count, offset, data in each}

    def evenly_spaced(self, count: int) -> list[np.ndarray]:
        """Evenly spaced windows of each dataset: its share of count, at least one; for 0, all."""
        found = []
        for data, share, start in zip(self.datasets, self.shares, self.starts[:-1], strict=True):
            own = max(1, round(count * share)) if count else 0
            found.append(start + evenly_spaced(own, data.windows))
        return found

    def mean(self, values: dict[str, float]) -> float:
        """The mean of the datasets' values, by weight."""
        return sum(
            share * values[name] for name, share in zip(self.names, self.shares, strict=True)
        )

    def locate(self, window: int) -> Json:
        """Where a window lies: its dataset, its number within that dataset, and its pieces."""
        index, own = self._find(window)
        pieces = self.datasets[index].locate(own)
        return {"dataset": self.names[index], "window": own, "pieces": pieces}

    def batch(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens and targets (B, seq_len), int64, of windows (B,). Targets that are not trained on
        are IGNORE. Window -1 is a filler sequence: its tokens are 0, its targets IGNORE."""
        tokens = np.zeros((len(windows), self.seq_len), dtype=np.int64)
        targets = np.full_like(tokens, IGNORE)
        for row, window in enumerate(windows):
            if window >= 0:
                index, own = self._find(int(window))
                ids, trained = self.datasets[index].window(own)
                tokens[row] = ids[: self.seq_len]
                targets[row, : len(ids) - 1][trained[1:]] = ids[1:][trained[1:]]
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def _find(self, window: int) -> tuple[int, int]:
        """The index of a window's dataset, and the window's number within that dataset."""
        index = int(np.searchsorted(self.starts, window, side="right")) - 1
        return index, window - int(self.starts[index])


class Batch(NamedTuple):
    """The model's inputs (B, T), on the device."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None  # the number of each token's document, if attention stays within it


class Batches:
    """This rank's micro-batches, on the device. A thread reads those of the next step in advance.
    shape is (micro-batches per step, sequences per micro-batch), equal on all ranks."""

    def __init__(self, data: Mixture, config: Config, bos_id: int, world: World) -> None:
        self.data, self.config, self.bos_id, self.world = data, config, bos_id, world
        windows = np.arange(config.train.global_batch_size)
        self.shape = rank_share(windows, config.train.micro_batch_size, 0, world.size).shape
        # In a new thread, the current device is GPU 0, whatever this rank's GPU is.
        on_gpu = world.device.type == "cuda"
        start = (torch.cuda.set_device, (world.device,)) if on_gpu else (None, ())
        self._reader = ThreadPoolExecutor(1, "data", *start)
        self._ahead: dict[int, Future[list[tuple[Tensor, Tensor]]]] = {}  # by step

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown()

    def of_step(self, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        future = self._ahead.get(step) or self._reader.submit(self._read_step, step)
        read = future.result()
        self._ahead = {step + 1: self._reader.submit(self._read_step, step + 1)}
        return [self.on_device(*batch) for batch in read]

    def of_windows(self, data: Mixture, windows: np.ndarray) -> Iterator[Batch]:
        """This rank's share of the windows, in batches of the shape that training has: a compiled
        model would be compiled anew for another shape."""
        size = self.shape[1]
        for batch in self._read(data, padded(windows, size * self.world.size), size):
            yield self.on_device(*batch)

    def on_device(self, tokens: Tensor, targets: Tensor) -> Batch:
        """A batch on the device; with data.document_mask, each BOS begins another document."""
        tokens = tokens.to(self.world.device, non_blocking=True)
        targets = targets.to(self.world.device, non_blocking=True)
        masked = self.config.data.document_mask
        return Batch(tokens, targets, (tokens == self.bos_id).cumsum(dim=1) if masked else None)

    def _read_step(self, step: int) -> list[tuple[Tensor, Tensor]]:
        train = self.config.train
        windows = self.data.step_windows(train.seed, step, train.global_batch_size)
        return [*self._read(self.data, windows, train.micro_batch_size)]

    def _read(
        self, data: Mixture, windows: np.ndarray, size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and targets, on the host, of this rank's micro-batches of at most size rows."""
        for share in rank_share(windows, size, self.world.rank, self.world.size):
            tokens, targets = data.batch(share)
            if self.world.device.type == "cuda":  # from pageable memory, copies are synchronous
                tokens, targets = tokens.pin_memory(), targets.pin_memory()
            yield tokens, targets


def open_split(
    split: str,
    names: Iterable[str],
    manifests: dict[str, Json],
    weights: dict[str, int],
    seq_len: int,
) -> Mixture:
    """One split of the named datasets, as a mixture."""
    opened = {n: TokenDataset(resolve_path(n), manifests[n], split, seq_len) for n in names}
    return Mixture(opened, weights)


def interleave(slots: np.ndarray, weights: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which dataset each slot of a run reads, and how many earlier slots read that dataset.

    The datasets are the leaves of a balanced binary tree. At a node of weight t whose left half has
    weight l, slot n goes left if floor((n + 1) · l / t) is above floor(n · l / t). The latter is
    the number of earlier slots that went left.

    Of the first n slots, dataset d is due n · w_d / t. The number that it gets differs from that by
    less than the depth of its leaf, which is at most ceil(log2 k) for k datasets. Proof: the root
    gets its due n exactly. If a node gets c slots and misses its due by m, its left child gets
    floor(c · l / t). That differs from c · l / t by less than 1, and c · l / t differs from the
    child's due by m · l / t. So the left child misses its due by less than m + 1. The right child
    gets the rest, so it misses its due by just as much.

    Products stay within 64 bits for slots below 2^43, because weights add up to 2^20 at most.
    """
    if len(weights) == 1:
        return np.zeros_like(slots), slots
    half = len(weights) // 2
    left, total = sum(weights[:half]), sum(weights)
    before = slots * left // total
    goes_left = (slots + 1) * left // total > before
    which, positions = np.empty_like(slots), np.empty_like(slots)
    for side, own, first, stop in (
        (goes_left, before, 0, half),
        (~goes_left, slots - before, half, None),
    ):
        found, positions[side] = interleave(own[side], weights[first:stop])
        which[side] = first + found
    return which, positions


def slot_counts(slots: int, weights: list[int]) -> list[int]:
    """How many of the first slots of a run read each dataset, without listing them all."""
    if len(weights) == 1:
        return [slots]
    half = len(weights) // 2
    left = slots * sum(weights[:half]) // sum(weights)
    return slot_counts(left, weights[:half]) + slot_counts(slots - left, weights[half:])


def next_positions(data: DataConfig, slots: int, offsets: list[int]) -> dict[str, int]:
    """How far in the order of each dataset, by real path, a run is after this many slots.

    A branch that changes the mixture sets offsets (otherwise empty), so that each dataset is read
    on from where the parent has left it, and its windows still come once per epoch.
    """
    weights = mixture_weights(data)
    counts = slot_counts(slots, list(weights.values()))
    each = zip(weights, counts, offsets or [0] * len(counts), strict=True)
    return {os.path.realpath(resolve_path(name)): n + offset for name, n, offset in each}


def permute(seed: int, epoch: int, positions: np.ndarray, size: int) -> np.ndarray:
    """The values at these positions of a permutation of range(size) that depends on seed and epoch.

    It needs O(1) memory. A Feistel network permutes the numbers below the next power of four. An
    output that is not below `size` is permuted again, until it is (Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains", 2002).
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
    """The finaliser of splitmix64, in which every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def evenly_spaced(count: int, windows: int) -> np.ndarray:
    """At most count of these windows, evenly spaced, the same at every call; for count 0, all."""
    count = min(count, windows) or windows
    return np.arange(count, dtype=np.int64) * windows // count


def rank_share(windows: np.ndarray, micro_batch_size: int, rank: int, ranks: int) -> np.ndarray:
    """A rank's share of a global batch: windows (micro-batches, sequences), with -1 for filler
    sequences. All ranks get the same shape, so that they run the same collectives."""
    share = -(-len(windows) // ranks)
    micro_batches = -(-share // micro_batch_size)
    size = -(-share // micro_batches)
    mine = windows[rank * share : (rank + 1) * share]
    missing = micro_batches * size - len(mine)
    return np.pad(mine, (0, missing), constant_values=-1).reshape(micro_batches, size)


def padded(windows: np.ndarray, multiple: int) -> np.ndarray:
    """The windows, then filler sequences (-1) until their number divides by `multiple`."""
    return np.pad(windows, (0, -len(windows) % multiple), constant_values=-1)


class DataCheck:
    """Compares each file of the datasets with its checksum, while training goes on.

    Training would read a flipped bit without an error. Each rank hashes a share of the files, in a
    thread of the lowest priority. verified.json, beside the manifest, records size, time and inode
    of each intact file. Such a file is hashed again only if one of these three changes.
    """

    FILE = "verified.json"

    def __init__(self, manifests: dict[str, Json], enabled: bool, world: World) -> None:
        """Every rank must call this. A host with its own copy of the datasets checks all of it."""
        self.world, self.wrong = world, ""  # wrong: what this rank has found
        self.paths = {resolve_path(name): digests(found) for name, found in manifests.items()}
        self.intact: list[tuple[Path, str, list[int]]] = []  # as _to_hash lists them
        self.finished = not enabled
        if self.finished:
            return
        # Ranks that see the same inodes, changed at the same moment, share a file system.
        stats = [(path / "manifest.json").stat() for path in self.paths]
        disks = world.gather([(stat.st_ino, stat.st_ctime_ns) for stat in stats])
        self.sharers = [rank for rank, disk in enumerate(disks) if disk == disks[world.rank]]
        leads = world.rank == self.sharers[0]
        lists = world.gather(self._to_hash() if leads else None)
        self.todo = lists[self.sharers[0]][self.sharers.index(world.rank) :: len(self.sharers)]
        self.finished = not any(lists)
        threading.Thread(target=self._hash, daemon=True).start()

    def raise_if_wrong(self) -> None:
        """AgreedError on every rank if one of them has found a damaged file."""

        def check() -> None:
            if self.wrong:
                raise UserError(self.wrong)

        self.world.each(check)

    def remember(self) -> None:
        """Adds to verified.json what has been hashed since; every rank must call this."""
        if self.finished:
            return
        self.raise_if_wrong()
        done, lists = zip(*self.world.gather((not self.todo, self.intact)), strict=True)
        self.finished = all(done)
        if self.world.rank != self.sharers[0]:
            return
        intact = [file for rank in self.sharers for file in lists[rank]]
        for path in self.paths:
            known = self._known(path)
            known |= {name: stamp for directory, name, stamp in intact if directory == path}
            temporary = path / f"{self.FILE}.{socket.gethostname()}.{os.getpid()}.tmp"
            try:
                temporary.write_text(json.dumps(known))
                temporary.chmod(0o666 & (path / "manifest.json").stat().st_mode)
                temporary.replace(path / self.FILE)
            except OSError as error:  # another user's dataset, for example: it is intact
                print_error(
                    f"{path / self.FILE} can't be written: {error.strerror}; each job hashes again"
                )

    def _known(self, path: Path) -> dict[str, list[int]]:
        try:
            return read_json(path / self.FILE) or {}
        except OSError:  # not readable by this user: hash again
            return {}

    def _to_hash(self) -> list[tuple[Path, str, list[int]]]:
        """Directory, name and stamp (size, time, inode) of each file that must be hashed."""
        found = []
        for path, files in self.paths.items():
            known = self._known(path)
            with os.scandir(path) as entries:
                stats = [(entry.name, entry.stat()) for entry in entries if entry.name in files]
            for name, stat in stats:
                stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
                if known.get(name) != stamp:
                    found.append((path, name, stamp))
        return found

    def _hash(self) -> None:
        if sys.platform == "linux":  # where each thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while self.todo:
            directory, name, _ = file = self.todo[-1]
            path = directory / name
            try:
                intact = file_sha256(path) == self.paths[directory][name]
            except OSError as error:
                self.wrong = f"{path} can't be read: {error.strerror}"
                return
            if not intact:
                self.wrong = (
                    f"{path} is damaged: its sha256 is not the one in manifest.json; restore it, or"
                    " run prepare.py with --force. Steps of this job may have read it"
                )
                return
            self.intact.append(file)
            self.todo.pop()
