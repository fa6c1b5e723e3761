"""Assigns the documents of data.sources to train, val and test by a hash of their text.

The hash is keyed with data.split_seed; the training seed plays no role. In the order of hashes come
val, test and train. Equal texts have equal hashes, so they share a split. A split with sources of
its own takes nothing from data.sources.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable

from config import DataConfig

Edges = dict[str, list[int]]  # of each split: its two lowest and two highest hashes


class Splitter:
    """Assigns documents to splits.

    Args:
        moved: what `fill_splits` returned: the new splits of the documents that move, by hash.

    Attributes:
        edges: of the splits before any document moves; `fill_splits` needs nothing else.
        counts: how many documents were moved to each split.
    """

    def __init__(self, data: DataConfig, moved: dict[int, str]):
        shares = _held_out(data)
        self.names, self.borders = [*shares, "train"], [*itertools.accumulate(shares.values())]
        self.seed, self.moved = str(data.split_seed).encode(), moved
        self.edges: Edges = {}
        self.counts: Counter[str] = Counter()

    def split(self, text: str) -> str:
        digest = text_hash(text, self.seed)
        split = self.names[bisect.bisect(self.borders, digest / 2**64)]
        edges = self.edges.setdefault(split, [])
        if digest not in edges:
            bisect.insort(edges, digest)
            del edges[2:-2]
        if digest in self.moved:
            split = self.moved[digest]
            self.counts[split] += 1
        return split


def asked_splits(data: DataConfig) -> list[str]:
    """The splits that data.sources fill, in the order of their hashes."""
    return [*_held_out(data), "train"]


def merge_edges(edges: Iterable[Edges]) -> Edges:
    """The edges of several Splitters together, in order; more than four per split do no harm."""
    merged: dict[str, set[int]] = {}
    for one in edges:
        for split, digests in one.items():
            merged.setdefault(split, set()).update(digests)
    return {split: sorted(digests) for split, digests in merged.items()}


def fill_splits(edges: Edges, data: DataConfig) -> dict[int, str]:
    """Which documents to move so that no split is empty that the configuration asks for.

    The borders between the hashes of the splits move by as few documents as possible: a pure
    function of the documents.

    Returns:
        The new split of each that moves, by hash; empty if there are fewer texts than splits.
    """
    names = asked_splits(data)
    ordered = [(digest, name) for name in names for digest in edges.get(name, ())]
    if len(ordered) < len(names):
        return {}
    moved, start, natural = {}, 0, 0
    for place, name in enumerate(names, 1):
        natural += len(edges.get(name, ()))
        stop = min(max(natural, start + 1), len(ordered) - len(names) + place)
        moved |= {digest: name for digest, old in ordered[start:stop] if old != name}
        start = stop
    return moved


def text_hash(text: str, key: bytes = b"") -> int:
    """A 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "big")


def _held_out(data: DataConfig) -> dict[str, float]:
    """The shares of data.sources that are held out, in the order of hashes."""
    shares = {
        "val": 0.0 if data.val_sources else data.val_fraction,
        "test": 0.0 if data.test_sources else data.test_fraction,
    }
    return {split: share for split, share in shares.items() if share}
