"""Protects the data order: every window once an epoch, the same batches at every world size."""

import hashlib
import json

import numpy as np
import pytest

from config import UserError
from dataset import (
    TokenDataset,
    evenly_spaced,
    fingerprint,
    permute,
    rank_share,
    read_manifest,
    step_windows,
)
from model import IGNORE

SEQ_LEN = 8


@pytest.fixture
def bins(tmp_path):
    """Three shards of 137 tokens in all, numbered through, so that a token tells its place."""
    shards, start = [], 0
    for index, size in enumerate((50, 3, 84)):
        tokens = np.arange(start, start + size, dtype="<u2")
        tokens.tofile(tmp_path / f"train-{index:05d}.bin")
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        shards.append({"file": f"train-{index:05d}.bin", "tokens": size, "sha256": digest})
        start += size
    manifest = {"version": 1, "tokenizer": {"sha256": "t"}, "splits": {"train": {"shards": shards}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def open_bins(directory):
    return TokenDataset(directory, read_manifest(directory, "t"), "train", SEQ_LEN)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permutation_is_one(size):
    for epoch in range(3):
        assert sorted(permute(7, epoch, np.arange(size), size)) == list(range(size))


def test_permutation_depends_on_seed_and_epoch_and_mixes():
    orders = [tuple(permute(s, e, np.arange(1000), 1000)) for s, e in ((1, 0), (1, 1), (2, 0))]
    assert len(set(orders)) == 3
    for order in orders:  # neighbours of a random order are on average a third of the range apart
        assert 280 < np.abs(np.diff(order)).mean() < 390


def test_permutation_of_a_huge_range_is_cheap():
    far = permute(1, 0, np.arange(10**13, 10**13 + 512), 3 * 10**13)
    assert len(set(far)) == 512
    assert far.max() < 3 * 10**13


def test_windows_cross_shards_and_cover_all_tokens_once(bins):
    data = open_bins(bins)
    assert (data.tokens, data.windows, data.unused_tokens) == (137, 17, 0)
    for index in range(data.windows):
        assert data.window(index).tolist() == list(range(8 * index, 8 * index + 9))


def test_places_say_where_a_window_lies(bins):
    data = open_bins(bins)
    assert data.places(6) == [  # tokens 48 to 56, across a shard of three
        {"shard": "train-00000.bin", "offset": 48, "tokens": 2},
        {"shard": "train-00001.bin", "offset": 0, "tokens": 3},
        {"shard": "train-00002.bin", "offset": 0, "tokens": 4},
    ]
    assert data.places(7) == [{"shard": "train-00002.bin", "offset": 3, "tokens": 9}]
    for window in range(data.windows):
        read = [
            np.fromfile(bins / place["shard"], "<u2", place["tokens"], offset=2 * place["offset"])
            for place in data.places(window)
        ]
        assert np.concatenate(read).tolist() == data.window(window).tolist()


def test_targets_are_the_next_tokens_and_fillers_train_nothing(bins):
    tokens, targets = open_bins(bins).batch(np.array([3, -1]))
    assert tokens[0].tolist() == list(range(24, 32))
    assert targets[0].tolist() == list(range(25, 33))
    assert targets[1].tolist() == [IGNORE] * SEQ_LEN


@pytest.mark.parametrize("batch_size", [5, 7])
def test_an_epoch_and_a_half_at_every_world_size(bins, batch_size):
    """The multiset of windows is exact and each step's global batch is the same everywhere."""
    data = open_bins(bins)
    steps = -(-3 * data.windows // (2 * batch_size))
    hashes = {}
    for ranks in (1, 2, 3):
        for micro_batch_size in (1, 4):
            seen, digests = [], []
            for step in range(steps):
                windows = step_windows(1, step, batch_size, data.windows)
                shares = [rank_share(windows, micro_batch_size, r, ranks) for r in range(ranks)]
                assert len({share.shape for share in shares}) == 1
                assert max(share.shape[1] for share in shares) <= micro_batch_size
                batches = [data.batch(micro) for share in shares for micro in share]
                real = [
                    (tuple(x.tolist()), tuple(y.tolist()))
                    for tokens, targets in batches
                    for x, y in zip(tokens, targets, strict=True)
                    if y[0] != IGNORE
                ]
                seen += [x[0] // SEQ_LEN for x, _ in real]
                digests.append(hashlib.sha256(repr(real).encode()).hexdigest())
            hashes[ranks, micro_batch_size] = digests
            counts = np.bincount(seen, minlength=data.windows)
            assert sum(counts) == steps * batch_size
            assert set(counts) <= {1, 2}  # once in the first epoch, at most once in the second
            assert sorted(seen[: data.windows]) == list(range(data.windows))
    assert len(set(map(tuple, hashes.values()))) == 1


def test_evenly_spaced_is_fixed_and_spread():
    assert evenly_spaced(4, 100).tolist() == [0, 25, 50, 75]
    assert evenly_spaced(0, 5).tolist() == evenly_spaced(9, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_thousand_shards_open_few_files(tmp_path):
    shards = []
    for index in range(300):
        np.full(10, index, dtype="<u2").tofile(tmp_path / f"{index}.bin")
        shards.append({"file": f"{index}.bin", "tokens": 10})
    data = TokenDataset(tmp_path, {"splits": {"train": {"shards": shards}}}, "train", SEQ_LEN)
    for index in range(data.windows):
        data.window(index)
    assert data.shard.cache_info().currsize <= 64


def test_a_split_shorter_than_a_window_is_named(bins):
    with pytest.raises(UserError, match=r"train split has 137 tokens.*data\.seq_len"):
        TokenDataset(bins, read_manifest(bins, "t"), "train", 500)


def test_damage_is_named(bins):
    whole = (bins / "train-00001.bin").read_bytes()
    (bins / "train-00001.bin").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"train-00001\.bin has 5 bytes instead of 6"):
        read_manifest(bins, "t")
    (bins / "train-00001.bin").unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin is missing"):
        read_manifest(bins, "t")
    (bins / "train-00001.bin").write_bytes(whole)
    with pytest.raises(UserError, match="another tokenizer"):
        read_manifest(bins, "u")
    (bins / "manifest.json").write_text('{"version": 1, ')
    with pytest.raises(UserError, match="damaged"):
        read_manifest(bins, "t")
    (bins / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"run prepare\.py"):
        read_manifest(bins, "t")


def test_fingerprint_follows_content(bins):
    manifest = read_manifest(bins, "t")
    before = fingerprint(manifest)
    manifest["sources"] = "elsewhere"
    assert fingerprint(manifest) == before
    manifest["splits"]["train"]["shards"][0]["sha256"] = "other"
    assert fingerprint(manifest) != before
