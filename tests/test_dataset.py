"""Protects the data order: every window once an epoch, in the proportions of a mixture, the same
batches at every world size; the masks of instruct data; that ten thousand shards can be read."""

import hashlib
import json
import math
import os
import resource

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import ConfigError, DataConfig, UserError
from dataset import (
    OPEN_FILES,
    WEIGHT_SUM,
    Mixture,
    TokenDataset,
    evenly_spaced,
    fingerprint,
    interleave,
    mask_name,
    mixture_fingerprint,
    mixture_weights,
    open_file,
    permute,
    rank_share,
    read_manifest,
    slot_counts,
)
from fast import IGNORE

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


def plain(data):
    """A mixture of one."""
    return Mixture({"it": data}, {"it": 1})


@pytest.fixture
def packed(tmp_path):
    """Instruct data: eleven windows of 8 over two shards, tokens numbered from 1,000 on.

    The last two tokens of each window are fill, and the mask holds its even tokens and the first.
    """
    directory, shards = tmp_path / "packed", []
    directory.mkdir()
    for index, windows in enumerate((4, 7)):
        tokens = 1000 + np.arange(32 * index, 32 * index + 8 * windows, dtype="<u2")
        mask = np.tile(np.array([1, 0, 1, 0, 1, 0, 0, 0], dtype="u1"), windows)
        name = f"train-{index:05d}.bin"
        tokens.tofile(directory / name)
        mask.tofile(directory / mask_name(name))
        shards.append(
            {
                **{"file": name, "tokens": len(tokens), "trained": int(mask.sum())},
                **{"filled": 2 * windows, "sha256": f"s{index}", "mask_sha256": f"m{index}"},
            }
        )
    decided = {"format": "instruct", "seq_len": SEQ_LEN, "template": {"user": "{content}"}}
    manifest = {"version": 1, "tokenizer": {"sha256": "t"}, "splits": {"train": {"shards": shards}}}
    manifest |= {**decided, "train_on": "responses", "too_long": "truncate"}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


@pytest.fixture
def mixture(bins, packed):
    """Seven sequences of text to three of conversations."""
    datasets = {"text": open_bins(bins), "talk": open_bins(packed)}
    return Mixture(datasets, mixture_weights(DataConfig(mixture={"text": 0.7, "talk": 0.3})))


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
        assert data.window(index)[0].tolist() == list(range(8 * index, 8 * index + 9))


def test_places_say_where_a_window_lies(bins):
    data = open_bins(bins)
    assert data.locate(6) == [  # tokens 48 to 56, across a shard of three
        {"shard": "train-00000.bin", "offset": 48, "tokens": 2},
        {"shard": "train-00001.bin", "offset": 0, "tokens": 3},
        {"shard": "train-00002.bin", "offset": 0, "tokens": 4},
    ]
    assert data.locate(7) == [{"shard": "train-00002.bin", "offset": 3, "tokens": 9}]
    for window in range(data.windows):
        read = [
            np.fromfile(bins / place["shard"], "<u2", place["tokens"], offset=2 * place["offset"])
            for place in data.locate(window)
        ]
        assert np.concatenate(read).tolist() == data.window(window)[0].tolist()


def test_targets_are_the_next_tokens_and_fillers_train_nothing(bins):
    tokens, targets = plain(open_bins(bins)).batch(np.array([3, -1]))
    assert tokens[0].tolist() == list(range(24, 32))
    assert targets[0].tolist() == list(range(25, 33))
    assert targets[1].tolist() == [IGNORE] * SEQ_LEN


@pytest.mark.parametrize("batch_size", [5, 7])
def test_an_epoch_and_a_half_at_every_world_size(bins, batch_size):
    """The multiset of windows is exact and each step's global batch is the same everywhere."""
    data = plain(open_bins(bins))
    steps = -(-3 * data.windows // (2 * batch_size))
    hashes = {}
    for ranks in (1, 2, 3):
        for micro_batch_size in (1, 4):
            seen, digests = [], []
            for step in range(steps):
                windows = data.step_windows(1, step, batch_size)
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


def test_targets_of_instruct_data_follow_the_mask(packed):
    """A target is the next token where the mask holds it; the last of a window has none."""
    data = open_bins(packed)
    assert (data.tokens, data.windows, data.unused_tokens) == (88, 11, 0)
    for window in range(data.windows):  # the fourth is the first of the second shard
        tokens, targets = plain(data).batch(np.array([window]))
        first = 1000 + 8 * window
        assert tokens[0].tolist() == list(range(first, first + 8))
        wanted = [IGNORE, first + 2, IGNORE, first + 4, *[IGNORE] * 4]
        assert targets[0].tolist() == wanted
    assert data.locate(4) == [{"shard": "train-00001.bin", "offset": 0, "tokens": 8}]


def test_instruct_data_is_read_with_its_own_seq_len(packed):
    manifest = read_manifest(packed, "t")
    with pytest.raises(ConfigError, match=r"windows of 8 tokens, data\.seq_len is 4; set data"):
        TokenDataset(packed, manifest, "train", 4)
    for shard in manifest["splits"]["train"]["shards"]:
        shard["trained"] = 0
    with pytest.raises(ConfigError, match="train split has no token to train on"):
        TokenDataset(packed, manifest, "train", SEQ_LEN)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.integers(0, 2**42))
def test_a_mixture_keeps_its_proportions(weights, start):
    """Within ceil(log2 k) sequences at any moment; a dataset's slots come in order, each once."""
    before = slot_counts(start, weights)
    which, positions = interleave(np.arange(start, start + 200), weights)
    depth, total = math.ceil(math.log2(len(weights))), sum(weights)
    for index, weight in enumerate(weights):
        mine = which == index
        assert positions[mine].tolist() == list(range(before[index], before[index] + mine.sum()))
        counts = before[index] + np.cumsum(mine)
        for n, count in zip(range(start + 1, start + 201), counts.tolist(), strict=True):
            missed = abs(count * total - n * weight)
            assert missed < max(1, depth * total)  # a mixture of one misses nothing
        assert slot_counts(start + 200, weights)[index] == counts[-1]


def test_a_mixture_far_into_a_run_stays_exact():
    """At the documented limit of 64-bit products, with the largest weights."""
    weights, far = [WEIGHT_SUM - 2, 1, 1], 2**43 - 1000
    which, positions = interleave(np.arange(far, far + 999), weights)
    for index in range(3):
        expected = slot_counts(far, weights)[index]
        assert positions[which == index].tolist()[:1] in ([], [expected])
    assert (positions >= 0).all()


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({}, [1]),
        ({"a": 5}, [1]),
        ({"a": 0.7, "b": 0.3}, [7, 3]),
        ({"a": 14, "b": 6.0}, [7, 3]),
        ({"a": 1, "b": 1, "c": 1}, [1, 1, 1]),
        ({"a": 1e-5, "b": 0.99999}, [1, 99_999]),
        ({"a": 3.1415926, "b": 2.7182818}, [562_162, 486_414]),
    ],
)
def test_weights_are_whole_numbers_in_the_same_proportion(given, weights):
    found = list(mixture_weights(DataConfig(mixture=given)).values())
    assert found == weights
    written = [float(weight) for weight in given.values()] or [1.0]
    for weight, share in zip(found, written, strict=True):
        assert abs(weight / sum(found) - share / sum(written)) < 1 / WEIGHT_SUM


def test_a_dataset_is_named_once_in_a_mixture_whatever_leads_to_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "latest").symlink_to("a")
    (tmp_path / "circle").symlink_to("circle")
    mixture = {f"{tmp_path}/a": 1}
    for name in ("latest", "a/../a", "latest/../a/"):
        with pytest.raises(ConfigError, match=r"a and .* are one dataset; name it once"):
            mixture_weights(DataConfig(mixture={**mixture, f"{tmp_path}/{name}": 1}))
    twice = {**mixture, f"{tmp_path}/circle": 1}  # it is refused where its manifest is read
    assert list(mixture_weights(DataConfig(mixture=twice)).values()) == [1, 1]


def test_a_weight_that_would_never_count_is_named():
    with pytest.raises(ConfigError, match=r"data\.mixture: b is 1\.0e-07 of the whole"):
        mixture_weights(DataConfig(mixture={"a": 1, "b": 1e-7}))


def test_each_dataset_of_a_mixture_once_an_epoch(mixture):
    steps = 40  # of five: 140 sequences of text are 8 epochs and 4 windows
    seen = np.concatenate([mixture.step_windows(1, step, 5) for step in range(steps)])
    places = [mixture.locate(int(window)) for window in seen]
    for name, windows in (("text", 17), ("talk", 11)):
        own = [place["window"] for place in places if place["dataset"] == name]
        assert len(own) == {"text": 140, "talk": 60}[name]
        for start in range(0, len(own) - windows + 1, windows):
            assert sorted(own[start : start + windows]) == list(range(windows))
        assert mixture.epochs(5 * steps)[name] == len(own) / windows
    assert places[0]["pieces"] == dict(zip(mixture.names, mixture.datasets, strict=True))[
        places[0]["dataset"]
    ].locate(places[0]["window"])


def test_a_mixture_of_one_is_the_dataset(bins):
    """The same order as a dataset of its own, wherever a run begins to read."""
    data = open_bins(bins)
    alone = Mixture({"a": data}, mixture_weights(DataConfig(mixture={"a": 0.3})))
    for step in (0, 3, 10**9):
        slots = np.arange(5 * step, 5 * step + 5)
        expected = [int(permute(7, i // 17, np.array([i % 17]), 17)[0]) for i in slots.tolist()]
        assert alone.step_windows(7, step, 5).tolist() == expected


@pytest.mark.parametrize("batch_size", [4, 7])
def test_a_mixture_at_every_world_size_and_resumed(bins, packed, mixture, batch_size):
    """Text and conversations: a step's batch has one hash, whoever reads it, from where on."""

    def batch_hashes(data, steps, ranks):
        for step in steps:
            windows = data.step_windows(3, step, batch_size)
            shares = [rank_share(windows, 2, rank, ranks) for rank in range(ranks)]
            real = [
                (x.tolist(), y.tolist())
                for share in shares
                for micro in share
                for window, x, y in zip(micro, *data.batch(micro), strict=True)
                if window >= 0
            ]
            assert len(real) == batch_size
            yield hashlib.sha256(repr(real).encode()).hexdigest()

    straight = [*batch_hashes(mixture, range(12), 1)]
    assert len(set(straight)) == 12
    for ranks in (1, 2, 3):
        datasets = {"text": open_bins(bins), "talk": open_bins(packed)}
        resumed = Mixture(datasets, {"text": 7, "talk": 3})
        assert [*batch_hashes(mixture, range(5), ranks)] == straight[:5]
        assert [*batch_hashes(resumed, range(5, 12), ranks)] == straight[5:]


def test_a_mixture_is_evaluated_by_weight(mixture):
    text, talk = mixture.evenly_spaced(10)
    assert text.tolist() == evenly_spaced(7, 17).tolist()
    assert talk.tolist() == [17 + window for window in evenly_spaced(3, 11)]
    assert [len(windows) for windows in mixture.evenly_spaced(1)] == [1, 1]
    assert [len(windows) for windows in mixture.evenly_spaced(0)] == [17, 11]
    assert mixture.mean({"text": 1.0, "talk": 2.0}) == pytest.approx(1.3)


@pytest.fixture
def few_descriptors():
    """The usual `ulimit -n`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("masked", [False, True])
def test_ten_thousand_shards_open_few_files(masked, tmp_path, few_descriptors):
    shards, size = [], 80
    for name, length in (("ids", 2 * size), ("mask", size)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(length)
    for index in range(10_000):  # one file under ten thousand names, which is quicker to make
        shard = {"file": f"train-{index:05d}.bin", "tokens": size, "trained": 1, "sha256": "0" * 64}
        shards.append(shard)
        os.link(tmp_path / "ids", tmp_path / shard["file"])
        if masked:
            os.link(tmp_path / "mask", tmp_path / mask_name(shard["file"]))
    manifest = {"version": 1, "tokenizer": {"sha256": "t"}, "splits": {"train": {"shards": shards}}}
    manifest |= {"format": "instruct", "seq_len": SEQ_LEN} if masked else {}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    open_file.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    data = plain(open_bins(tmp_path))
    assert data.windows == 100_000 - (not masked)
    data.batch(data.step_windows(0, 0, 2000))
    assert open_file.cache_info().misses > 1000
    assert len(os.listdir("/proc/self/fd")) <= before + OPEN_FILES


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


def test_damaged_masks_are_named(packed):
    mask = packed / "train-00001.mask"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00001\.mask has 55 bytes instead of 56"):
        read_manifest(packed, "t")
    mask.unlink()
    with pytest.raises(UserError, match=r"train-00001\.mask is missing"):
        read_manifest(packed, "t")


def test_fingerprint_covers_masks_and_mixtures(bins, packed):
    text, talk = read_manifest(bins, "t"), read_manifest(packed, "t")
    seen = {fingerprint(talk)}
    for key, value in (("template", {"user": "-{content}"}), ("train_on", "all")):
        seen.add(fingerprint({**talk, key: value}))
    talk["splits"]["train"]["shards"][0]["mask_sha256"] = "other"
    seen.add(fingerprint(talk))
    assert len(seen) == 4
    alone = mixture_fingerprint({"a": text}, {"a": 1})
    assert alone == fingerprint(text)
    seen = {
        alone,
        mixture_fingerprint({"a": text, "b": talk}, {"a": 7, "b": 3}),
        mixture_fingerprint({"a": text, "b": talk}, {"a": 3, "b": 7}),
        mixture_fingerprint({"b": talk, "a": text}, {"a": 7, "b": 3}),
    }
    assert len(seen) == 4
    moved = mixture_fingerprint({"c": text, "d": talk}, {"c": 7, "d": 3})
    assert moved in seen


def test_fingerprint_follows_content(bins):
    manifest = read_manifest(bins, "t")
    before = fingerprint(manifest)
    manifest["sources"] = "elsewhere"
    assert fingerprint(manifest) == before
    manifest["splits"]["train"]["shards"][0]["sha256"] = "other"
    assert fingerprint(manifest) != before
