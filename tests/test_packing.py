"""Windows of whole conversations lose nothing and are nearly full; duplicates are found exactly."""

import contextlib
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import packing
from corpus.packing import Encoded, Shard, arrange, find_duplicates, pack

SIZE = 64
EOS = b"\x02\x00"


def assert_packed(windows, lengths, size):
    """Every document is in one window, and no window is too full."""
    assert sorted(i for window in windows for i in window) == list(range(len(lengths)))
    assert all(0 < sum(lengths[window]) <= size for window in windows)


@given(st.lists(st.integers(2, SIZE), max_size=300))
def test_every_document_is_in_one_window(lengths):
    windows = pack(np.array(lengths, np.int64), SIZE)
    assert_packed(windows, np.array(lengths, np.int64), SIZE)
    # two windows that are half empty would have been one
    assert len(windows) <= 2 * sum(lengths) / SIZE + 1


def test_windows_are_nearly_full_for_lengths_like_openorcas():
    """Median 300, mean about 410, and one in a hundred above 1,900 tokens."""
    lengths = np.random.default_rng(0).lognormal(np.log(300), 0.8, 20_000).astype(np.int64)
    for size in (512, 1024, 2048):
        cut = lengths.clip(8, size)
        windows = pack(cut, size)
        assert_packed(windows, cut, size)
        assert cut.sum() / (len(windows) * size) > 0.99


def test_a_perfect_fit_is_found():
    lengths = np.array([40, 24, 30, 34, 64, 10, 54])
    assert pack(lengths, SIZE) == [[0, 1], [2, 3], [4], [5, 6]]


def encoded(number, length):
    """A document of its own ids, trained from its third token on."""
    ids = np.full(length, 10 + number, "<u2")
    ids[0], ids[-1] = 1, 2
    mask = np.ones(length, np.uint8)
    mask[:2] = 0
    digest = hashlib.blake2b(str(number).encode(), digest_size=16).digest()
    return Encoded(ids.tobytes(), mask.tobytes(), 3 * length, digest)


def write(path, documents, endings):
    with contextlib.ExitStack() as files:
        shard = Shard(files, path, endings, "test")
        for document in documents:
            shard.add(document)
        return shard.summary()


@pytest.mark.parametrize("masked", [False, True])
def test_arranging_keeps_every_document_but_those_dropped(tmp_path, masked):
    lengths = np.random.default_rng(1).integers(3, SIZE + 1, 50)
    documents = [encoded(number, int(length)) for number, length in enumerate(lengths)]
    mask = (".mask",) if masked else ()
    write(tmp_path / "a.train", documents, (".bin", *mask, ".docs"))
    dropped = np.array([0, 7, 49], np.uint32)
    with contextlib.ExitStack() as files:
        shard = Shard(files, tmp_path / "b.train", (".bin", *mask), "test")
        arrange(tmp_path / "a.train", shard, dropped, SIZE, EOS)
        counts = shard.summary()
    kept = [d for number, d in enumerate(documents) if number not in dropped]
    ids = np.fromfile(tmp_path / "b.train.bin", "<u2")
    assert counts["documents"] == len(kept)
    assert counts["tokens"] == len(ids)
    assert counts["sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
    if not masked:
        assert ids.tobytes() == b"".join(d.tokens for d in kept)
        return
    assert len(ids) % SIZE == 0
    trained = np.fromfile(tmp_path / "b.train.mask", np.uint8)
    assert counts["trained"] == trained.sum() == sum(d.mask.count(1) for d in kept)
    assert counts["filled"] == len(ids) - sum(len(d.tokens) // 2 for d in kept)
    found = []
    for window, flags in zip(ids.reshape(-1, SIZE), trained.reshape(-1, SIZE), strict=True):
        starts = np.flatnonzero(window == 1)
        assert starts[0] == 0
        for start, stop in zip(starts, [*starts[1:], SIZE], strict=True):
            stop = start + int((window[start:stop] != 2).sum()) + 1  # up to its EOS
            found.append((window[start:stop].tobytes(), flags[start:stop].tobytes()))
        assert not flags[stop:].any()
        assert (window[stop:] == 2).all()
    assert sorted(found) == sorted((d.tokens, d.mask) for d in kept)


@pytest.mark.parametrize("at_once", [1, 7, 1_000_000])
def test_duplicates_are_all_but_the_first(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(packing, "DUPLICATES_AT_ONCE", at_once)
    random = np.random.default_rng(2)
    numbers = [random.integers(0, 30, count).tolist() for count in (20, 1, 40)]
    paths = [tmp_path / f"part-{i}.train" for i in range(3)]
    for path, mine in zip(paths, numbers, strict=True):
        write(path, [encoded(number, 5) for number in mine], (".bin", ".docs"))
    seen, expected = set(), []
    for mine in numbers:
        expected.append([])
        for index, number in enumerate(mine):
            if number in seen:
                expected[-1].append(index)
            seen.add(number)
    assert [found.tolist() for found in find_duplicates(paths)] == expected


def test_no_documents_have_no_duplicates():
    assert find_duplicates([]) == []
