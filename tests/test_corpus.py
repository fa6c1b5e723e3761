"""readers.py keeps every byte of every document, whatever the format and wherever parts are cut.

Protected here: which files the sources name, each once, and what is said of the others; what a
document is in each format under each rule, and what a conversation is; that the cut into parts
changes neither the documents nor their places; that a text has one split; that
a mistake in a source is named with file and row, or left out and told once, nothing else with it;
that memory stays small however large a row group or a line is.
"""

import contextlib
import csv
import gzip
import itertools
import json
import lzma
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ROOT, ConfigError, DataConfig, UserError
from corpus import readers
from corpus.sources import COMPRESSIONS, Survey
from corpus.splits import Splitter, asked_splits, fill_splits, merge_edges, text_hash

STARTS = {"starts": r" = [^=]+ = $"}  # the hub's wikitext


def config(*sources, **keys) -> DataConfig:
    return DataConfig(sources=[str(source) for source in sources], **keys)


def documents(data: DataConfig) -> list[readers.Document]:
    return [document for part in readers.plan(data) for document in readers.read(part, data)]


def texts(*sources, **keys) -> list[str]:
    return [document.text for document in documents(config(*sources, **keys))]


def failure(*sources, **keys) -> str:
    with pytest.raises(UserError) as caught:
        documents(config(*sources, **keys))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def skipping(*sources, **keys) -> tuple[list[readers.Document], list[readers.Bad]]:
    """With on_error = skip: the documents, and what was left out."""
    data = config(*sources, on_error="skip", **keys)
    bad: list[readers.Bad] = []
    parts = readers.plan(data)
    return [found for part in parts for found in readers.read(part, data, bad.append)], bad


def left_out(*sources, **keys) -> list[tuple[int, str]]:
    """Row and reason of each bad document; the first of them is what `stop` stops at."""
    _, bad = skipping(*sources, **keys)
    if bad:
        assert failure(*sources, **keys) == f"{bad[0].file}, row {bad[0].row}: {bad[0].reason}"
    return [(row, reason) for _, row, reason in bad]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, rows: list[str]) -> Path:
    return write(path, "".join(json.dumps({"id": 1, "text": row}) + "\n" for row in rows))


def write_parquet(path: Path, rows: list, row_group_size: int = 3) -> Path:
    table = pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_csv(path: Path, rows: list[str], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "text"], *((i, row) for i, row in enumerate(rows))])
    return path


def write_tsv(path: Path, rows: list[str]) -> Path:
    return write_csv(path, rows, "\t")


def compress(path: Path, suffix: str) -> Path:
    packed = path.with_name(path.name + suffix)
    if suffix == ".xz":
        return write(packed, lzma.compress(path.read_bytes()))
    with pa.output_stream(packed, compression=COMPRESSIONS[suffix]) as file:
        file.write(path.read_bytes())
    return packed


ROWS = [
    "plain",
    "two\nlines",
    "windows\r\nlines\r\n",
    'say "hello", she said',
    "",
    "emoji 🦙 and عربي",
    " leading, trailing \t ",
    "\u2028 separators \x0b\x0c\x1c are no newlines",
    "<s>[INST] not a control token </s>",
    "x" * 5000,
]


@pytest.mark.parametrize("writer", [write_jsonl, write_parquet, write_csv, write_tsv])
def test_rows_of_tables_are_kept_exactly(tmp_path, writer):
    suffix = writer.__name__.removeprefix("write_")
    path = writer(tmp_path / f"a.{suffix}", ROWS)
    found = documents(config(path))
    assert [document.text for document in found] == ROWS
    assert [document.row for document in found] == list(range(1, len(ROWS) + 1))
    assert {document.file for document in found} == {str(path)}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".ndjson", ".csv", ".tsv"])
@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_sources_read_like_plain_ones(tmp_path, suffix, compression):
    writers = {
        ".jsonl": write_jsonl,
        ".ndjson": write_jsonl,
        ".csv": write_csv,
        ".tsv": write_tsv,
        ".txt": lambda path, rows: write(path, "\n".join(rows)),
    }
    plain = writers[suffix](tmp_path / f"a{suffix}", ROWS)
    assert texts(plain) == (["\n".join(ROWS)] if suffix == ".txt" else ROWS)
    folder = tmp_path / "folder"
    folder.mkdir()
    packed = compress(plain, compression).rename(folder / f"a{suffix}{compression}".upper())
    assert texts(packed) == texts(folder) == texts(plain)


def test_a_gzip_file_may_have_several_members(tmp_path):
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    assert texts(path, document="line") == ["one", "two"]


def test_nulls_are_empty_texts_and_blank_lines_of_json_are_none(tmp_path):
    assert texts(write_parquet(tmp_path / "a.parquet", ["a", None, "b"])) == ["a", "", "b"]
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\n{"text": null}\r\n{"text": "b"}')
    assert texts(path) == ["a", "", "b"]


def test_parquet_columns_of_any_text_type(tmp_path):
    kinds = pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())
    for kind in (*kinds, pa.string_view()):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"body": pa.array(["a", None, "é"]).cast(kind)}), path)
        assert texts(path, text_column="body") == ["a", "", "é"]


def test_document_rules_over_text(tmp_path):
    text = "\r\none\r\ntwo\n \n\nthree\n\tfour"
    path = write(tmp_path / "a.txt", text)
    assert texts(path) == [text]
    assert texts(path, document="line") == ["", "one", "two", " ", "", "three", "\tfour"]
    assert texts(path, document="blank_line") == ["one\r\ntwo", "three\n\tfour"]
    assert texts(path, document={"starts": "t"}) == ["\r\none\r\n", "two\n \n\n", "three\n\tfour"]
    rows = [document.row for document in documents(config(path, document="blank_line"))]
    assert rows == [2, 6]


WIKI = ["", " = A = \n", "", " text of a \n", " = = Part = = \n", " more", " = B = \n", " b \n"]


@pytest.mark.parametrize("writer", [write_jsonl, write_parquet, write_csv])
def test_rows_that_are_lines_of_a_larger_text(tmp_path, writer):
    path = writer(tmp_path / f"a.{writer.__name__.removeprefix('write_')}", WIKI)
    articles = [" = A = \n\n text of a \n = = Part = = \n more\n", " = B = \n b \n"]
    assert texts(path, document=STARTS) == articles
    assert texts(path, document="file") == ["\n" + "".join(articles)]
    paragraphs = [" = A = ", " text of a \n = = Part = = \n more\n = B = \n b "]
    assert texts(path, document="blank_line") == paragraphs
    assert texts(path, document="line") == [row.removesuffix("\n") for row in WIKI]


def random_lines(seed: int) -> list[str]:
    """Lines of uneven length: blank, multi-byte, CRLF, headings; some longer than a part."""
    choose = random.Random(seed)
    kinds = ["", "", "é🦙" * 40, " = Title = ", "a" * 300, "text\r", "  ", "short"]
    return [choose.choice(kinds) for _ in range(80)]


@pytest.mark.parametrize("rule", ["line", "blank_line", STARTS, {"lines": 3}, "file"])
@pytest.mark.parametrize("format", ["txt", "jsonl", "parquet"])
def test_the_cut_into_parts_changes_no_document(tmp_path, rule, format):
    for seed, part_bytes in enumerate([5, 50, 333, 1000]):
        lines = random_lines(seed)
        path = tmp_path / f"{seed}.{format}"
        if format == "txt":
            write(path, "\n".join(lines) + "\n" * (seed % 2))
        else:
            (write_jsonl if format == "jsonl" else write_parquet)(path, lines)
        whole, cut = (
            config(path, document=rule, part_bytes=size) for size in (1_000_000_000, part_bytes)
        )
        assert len(readers.plan(whole)) == 1
        assert rule == "file" or len(readers.plan(cut)) > 3
        expected, found = documents(whole), documents(cut)
        assert [document.text for document in found] == [document.text for document in expected]
        assert [document.place() for document in found] == [d.place() for d in expected]
        assert sum(part.bytes for part in readers.plan(cut)) <= path.stat().st_size


def test_a_document_belongs_to_the_part_in_which_it_starts(tmp_path):
    path = write(tmp_path / "a.txt", "a" * 10 + "\n" + "b" * 100 + "\n" + "c" * 10 + "\n")
    data = config(path, document="line", part_bytes=40)
    parts = [[document.text[0] for document in readers.read(p, data)] for p in readers.plan(data)]
    assert parts == [["a", "b"], [], [], ["c"]] or parts == [["a", "b"], [], ["c"]]


def test_small_files_share_a_part_and_parts_are_deterministic(tmp_path):
    for i in (10, 2, 1):
        write(tmp_path / f"{i}.txt", f"file {i}" * 10)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "z.md", "below")
    write(tmp_path / ".hidden.txt", "not read")
    write(tmp_path / "picture.png", b"\x89PNG")
    data = config(tmp_path)
    (part,) = readers.plan(data)
    names = [Path(piece.path).name for piece in part.pieces]
    assert names == ["1.txt", "10.txt", "2.txt", "z.md"]
    assert readers.plan(config(f"{tmp_path}/*.txt", tmp_path)) == readers.plan(data)  # each once
    assert len(readers.plan(config(tmp_path, part_bytes=1))) == 4


def test_the_standard_library_is_read_as_python_reads_it():
    data = DataConfig(sources=["python-stdlib"])
    sources = Survey(data).sources
    assert 8e6 < sum(source.bytes for source in sources) < 25e6
    assert 8 <= len(readers.plan(data)) <= 25
    folders = {folder for source in sources for folder in source.name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "__pycache__"}
    found = {document.file: document.text for document in documents(data)}
    assert len(found) == len(sources)
    path = str(Path(sysconfig.get_paths()["stdlib"], "json", "decoder.py"))
    with tokenize.open(path) as file:
        assert found[path] == file.read()


def split_of(text: str, data: DataConfig) -> str:
    return Splitter(data, {}).split(text)


def test_a_text_has_one_split_and_shares_are_met():
    data = DataConfig(val_fraction=0.2, test_fraction=0.1)
    splits = [split_of(f"text {i}", data) for i in range(5000)]
    assert splits == [split_of(f"text {i}", data) for i in range(5000)]
    assert 0.18 < splits.count("val") / 5000 < 0.22
    assert 0.08 < splits.count("test") / 5000 < 0.12
    other = DataConfig(val_fraction=0.2, test_fraction=0.1, split_seed=1)
    assert splits != [split_of(f"text {i}", other) for i in range(5000)]
    # Pinned: prepared datasets and trained tokenizers rely on it staying as it is.
    half = DataConfig(val_fraction=0.5)
    assert " ".join(split_of(text, half) for text in "abcdefghij") == (
        "train train train train train train val train val val"
    )


FRACTIONS = st.sampled_from([0.0, 1e-6, 0.01, 0.3, 0.49])


@given(
    texts=st.lists(st.text(max_size=3), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    val=FRACTIONS,
    test=FRACTIONS,
    own=st.sampled_from([{}, {"val_sources": ["val"]}, {"test_sources": ["test"]}]),
)
def test_few_documents_fill_every_split(texts, cuts, val, test, own):
    """In the order of their hashes, whoever reads which of them; as few as possible move."""
    data = DataConfig(val_fraction=val, test_fraction=test, **own)
    edges = []
    for start, stop in itertools.pairwise([0, *sorted(cuts), 12]):
        splitter = Splitter(data, {})
        assert [splitter.split(t) for t in texts[start:stop]] == [
            split_of(t, data) for t in texts[start:stop]
        ]
        assert all(len(digests) <= 4 for digests in splitter.edges.values())
        edges.append(splitter.edges)
    edges = merge_edges(edges)
    moved = fill_splits(edges, data)
    splitter = Splitter(data, moved)
    found = {text: splitter.split(text) for text in texts}
    before = {text: split_of(text, data) for text in texts}
    asked = asked_splits(data)
    if len(found) < len(asked) or {*before.values()} == {*asked}:
        assert found == before
        return
    assert {*found.values()} == {*asked}
    by_hash = sorted(found, key=lambda text: text_hash(text, b"0"))
    order = [asked.index(found[text]) for text in by_hash]
    assert order == sorted(order)
    changes = sum(found[text] != before[text] for text in found)
    assert sum(splitter.counts.values()) == sum(found[text] != before[text] for text in texts)
    borders = itertools.combinations_with_replacement(range(len(by_hash) + 1), len(asked) - 1)
    possible = [
        [asked[sum(place >= border for border in borders)] for place in range(len(by_hash))]
        for borders in borders
    ]
    fewest = min(
        sum(split != before[text] for text, split in zip(by_hash, splits, strict=True))
        for splits in possible
        if {*splits} == {*asked}
    )
    assert changes == fewest


def test_sources_given_per_split_are_used_as_given(tmp_path):
    for name in ("train", "val", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(50)])
    data = config(
        tmp_path / "train.jsonl",
        val_sources=[str(tmp_path / "val.jsonl")],
        test_sources=[str(tmp_path / "test.jsonl")],
        val_fraction=0.5,
    )
    assert [part.split for part in readers.plan(data)] == [None, "val", "test"]
    assert {split_of(text, data) for text in texts(tmp_path / "train.jsonl")} == {"train"}
    data.val_sources = [str(tmp_path / "train.jsonl")]
    with pytest.raises(UserError, match=r"train\.jsonl is in the sources of two splits"):
        readers.plan(data)


def test_a_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path / "corpus.txt", "a")
    assert "corpos.txt: no such file; did you mean corpus.txt?" in failure(tmp_path / "corpos.txt")
    assert failure(tmp_path / "corpos" / "a.txt") == (
        f"{tmp_path}/corpos/a.txt: no such file; {tmp_path}/corpos is missing;"
        " did you mean corpus.txt?"
    )
    assert failure(tmp_path / "corpus.txt" / "a") == (
        f"{tmp_path}/corpus.txt/a: {tmp_path}/corpus.txt is no directory"
    )
    assert failure(tmp_path / "*.csv") == f"{tmp_path}/*.csv: matches nothing"
    assert failure(tmp_path / "corpos" / "*.csv") == (
        f"{tmp_path}/corpos/*.csv: matches nothing; {tmp_path}/corpos is missing"
    )
    assert failure(tmp_path / ("a" * 300)).endswith(": File name too long")
    (tmp_path / "empty").mkdir()
    assert "empty: no file to read here" in failure(tmp_path / "empty")


def test_text_that_is_not_utf8_is_named_or_replaced(tmp_path):
    bad = b"caf\xe9"
    path = write(tmp_path / "a.txt", b"one\ntwo\n" + bad + b"\n")
    assert f"{path}, row 3: not UTF-8 (b'\\xe9')" in failure(path)
    assert "row 3: not UTF-8" in failure(path, document="line", part_bytes=3)
    assert texts(path, errors="replace") == ["one\ntwo\ncaf\ufffd\n"]

    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "' + bad + b'"}\n')
    assert f"{path}, row 2: not UTF-8" in failure(path)
    assert texts(path, errors="replace") == ["a", "caf\ufffd"]

    path = write(tmp_path / "a.csv", b"text\na\nb\n" + bad + b"\n")
    assert f"{path}, row 3: not UTF-8" in failure(path)

    path = tmp_path / "a.parquet"
    array = pa.array([b"a", b"b", bad, b"d"]).view(pa.string())
    pq.write_table(pa.table({"text": array}), path, row_group_size=2)
    assert f"{path}, row 3: not UTF-8" in failure(path)
    assert texts(path, errors="replace") == ["a", "b", "caf\ufffd", "d"]


def test_half_a_surrogate_pair_in_json_is_no_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83e\\udd99"}\n{"text": "a\\ud83e"}\n')
    assert f"{path}, row 2: not UTF-8 ('\\ud83e')" in failure(path)
    assert texts(path, errors="replace") == ["🦙", "a\ufffd"]


def test_a_document_above_the_limit_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["small", "é" * 60, "small"])
    message = "row 2: a document above data.max_document_bytes (100)"
    assert message in failure(path, max_document_bytes=100)
    assert len(texts(path, max_document_bytes=120)) == 3
    assert message in failure(
        write_parquet(tmp_path / "a.parquet", ["small", "é" * 60]), max_document_bytes=100
    )
    assert message in failure(
        write_csv(tmp_path / "a.csv", ["small", "é" * 60]), max_document_bytes=100
    )
    path = write(tmp_path / "a.txt", "small\n" + "a" * 101 + "\nend")
    assert message in failure(path, document="line", max_document_bytes=100)
    assert "row 1: a document above" in failure(path, max_document_bytes=100)
    assert len(texts(path, document="line", max_document_bytes=101)) == 3
    path = write(tmp_path / "b.txt", "\n" + "a line\n" * 50)
    assert message in failure(path, document="blank_line", max_document_bytes=100)
    message = message.replace("row 2", "row 1")
    assert message in failure(path, document={"starts": "never"}, max_document_bytes=100)


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_a_file_cut_short_is_named(tmp_path, cut):
    rows = [f"{random.Random(i).random()} text" for i in range(2000)]
    parquet = write_parquet(tmp_path / "a.parquet", rows, 500)
    packed = write(
        tmp_path / "a.jsonl.gz", gzip.compress(write_jsonl(tmp_path / "b", rows).read_bytes())
    )
    for path in (parquet, packed):
        content = path.read_bytes()
        write(path, content[: int(len(content) * cut)])
        for part_bytes in (0, 1000):
            message = failure(path, part_bytes=part_bytes)
            assert message.startswith(str(path))
            assert "cut short or damaged" in message


def test_a_missing_column_names_those_that_exist(tmp_path):
    for writer in (write_jsonl, write_parquet, write_csv):
        path = writer(tmp_path / f"a.{writer.__name__.removeprefix('write_')}", ["a"])
        message = failure(path, text_column="body")
        assert "no column 'body'; set data.text_column to one of: id, text" in message
        assert str(path) in message


def test_a_column_that_is_not_text_is_refused(tmp_path):
    message = failure(write_parquet(tmp_path / "a.parquet", ["a"]), text_column="id")
    assert "column 'id' is int64, not text" in message
    message = failure(write_jsonl(tmp_path / "a.jsonl", ["a"]), text_column="id")
    assert "a.jsonl, row 1: 'id' is int, not text" in message


def test_a_malformed_row_is_named(tmp_path):
    good = '{"text": "a"}\n'
    path = write(tmp_path / "a.jsonl", good * 2 + '{"text": "b"\n' + good)
    assert f"{path}, row 3: not JSON" in failure(path)
    assert "row 3: not JSON" in failure(path, part_bytes=5)
    assert "row 2: not a JSON object" in failure(write(tmp_path / "b.jsonl", good + "[1]\n"))
    path = write(tmp_path / "a.csv", 'id,text\n1,a\n2,"b\n3,c\n')
    assert f"{path}, row 2: not CSV (unexpected end of data)" in failure(path)
    path = write(tmp_path / "b.csv", "id,text\n1,a\n2\n")
    assert f"{path}, row 2: has 1 fields, the header 2" in failure(path)
    assert "a header of column names" in failure(write(tmp_path / "c.csv", ""))


def test_a_rule_that_makes_no_sense_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    with pytest.raises(ConfigError, match=r"data\.document = row is for tables"):
        readers.plan(config(path, document="row"))
    with pytest.raises(ConfigError, match="is no regex"):
        readers.plan(config(path, document={"starts": "("}))


def test_links_are_followed_and_a_broken_one_is_named(tmp_path):
    for folder in ("elsewhere", "sources"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "elsewhere" / "a.txt", "a")
    (tmp_path / "sources" / "folder").symlink_to(tmp_path / "elsewhere")
    assert texts(tmp_path / "sources") == ["a"]
    link = tmp_path / "sources" / "b.txt"
    link.symlink_to("nowhere")
    line = f"{link}: a link that leads to {link.parent}/nowhere, which does not exist"
    assert failure(tmp_path / "sources") == failure(link) == failure(f"{tmp_path}/*/b.txt") == line
    link.unlink()
    link.symlink_to(link)
    line = f"{link}: a link that leads in a circle"
    assert failure(tmp_path / "sources") == failure(link) == failure(link / "a.txt") == line
    (tmp_path / "gone").symlink_to(tmp_path / "purged")
    line = f"{tmp_path}/gone: a link that leads to {tmp_path}/purged, which does not exist"
    assert failure(tmp_path / "gone" / "a.txt") == line
    write(tmp_path / "gond", "a")
    assert failure(tmp_path / "gone") == line


@pytest.fixture
def limited():
    """Ends a test that waits for ever."""

    def stop(*_) -> None:
        pytest.fail("it takes more than 20 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def tree(folder: Path, *names: str) -> Path:
    """A directory with JSON lines, each file with its name as text."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, [name])
    return folder


def remarks(*sources, **keys) -> list[str]:
    return Survey(config(*sources, **keys)).remarks()


def other_names(tmp_path: Path) -> dict[str, Path]:
    """Further names of a/x.jsonl, by what they are."""
    tree(tmp_path, "a/x.jsonl")
    (tmp_path / "latest").symlink_to("a")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a" / "x.jsonl")
    (tmp_path / "link of a link.jsonl").symlink_to("link.jsonl")
    os.link(tmp_path / "a" / "x.jsonl", tmp_path / "hard.jsonl")
    return {
        "link to the directory": tmp_path / "latest",
        "through a link": tmp_path / "latest" / "x.jsonl",
        "link": tmp_path / "link.jsonl",
        "link of a link": tmp_path / "link of a link.jsonl",
        "hard link": tmp_path / "hard.jsonl",
        "glob": tmp_path / "late*" / "*.jsonl",
        "back and forth": tmp_path / "a" / ".." / "a" / "x.jsonl",
        "from the repository": Path(os.path.relpath(tmp_path, ROOT)) / "a" / "x.jsonl",
    }


def test_a_file_under_another_name_is_read_once(tmp_path):
    for kind, name in other_names(tmp_path).items():
        assert texts(tmp_path / "a", name) == ["a/x.jsonl"], kind
        found = remarks(tmp_path / "a", name)
        if kind in ("back and forth", "from the repository"):  # the same name, otherwise written
            assert found == []
        else:
            (line,) = found
            assert line.startswith("links to what is read already, left out: 1 ("), kind
            assert line.endswith(f" is {tmp_path}/a/x.jsonl)"), kind
    assert texts(tmp_path) == ["a/x.jsonl"]
    (line,) = remarks(tmp_path)  # the directory is one of four
    assert line == (
        f"links to what is read already, left out: 4 ({tmp_path}/latest is {tmp_path}/a, …)"
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_a_file_under_another_name_does_not_stand_in_two_splits(tmp_path, swapped):
    for kind, name in other_names(tmp_path).items():
        train, val = (name, tmp_path / "a") if swapped else (tmp_path / "a", name)
        for split in ("val_sources", "test_sources"):
            message = failure(train, **{split: [str(val)]})
            assert message.endswith(" in the sources of two splits; name it in one"), kind
            assert f"{tmp_path}/a/x.jsonl" in message
            if kind not in ("glob", "link to the directory"):
                assert f"{name}" in message, kind


def test_equal_content_is_not_one_file(tmp_path):
    tree(tmp_path, "a.jsonl")
    shutil.copy2(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert texts(tmp_path) == ["a.jsonl"] * 2
    assert remarks(tmp_path) == []


@pytest.mark.parametrize("pattern", ["", "**", "**/*.jsonl", "*/**/*.jsonl", "**/b/**/*"])
def test_a_walk_goes_round_no_circle(tmp_path, limited, pattern):
    """Followed each on its own, these links would make more paths than can be walked."""
    root = tree(tmp_path / "root", "a/b/x.jsonl", "a/b/y.jsonl")
    for folder in (root, root / "a", root / "a" / "b"):
        for i in range(5):
            (folder / f"self{i}").symlink_to(".")
        (folder / "up").symlink_to("..")
        (folder / "top").symlink_to(root)
    source = root / pattern
    assert sorted(texts(source)) == ["a/b/x.jsonl", "a/b/y.jsonl"]
    found = Survey(config(source)).sources
    assert [Path(piece.name).name for piece in found] == ["x.jsonl", "y.jsonl"]
    assert any(line.startswith("links to what is read already") for line in remarks(source))


def test_names_and_order_of_sources_stay_as_they_were(tmp_path):
    """They are what a manifest states, so that a dataset made before stays up to date."""
    names = ["a.b/x.jsonl", "a/x.jsonl", "a/b/c/x.jsonl", "a-/x.jsonl", "z.jsonl", "B.jsonl"]
    tree(tmp_path, *names)
    wanted = [f"{tmp_path}/{name}" for name in sorted(names)]
    for source in (tmp_path, f"{tmp_path}/", f"{tmp_path}/**", f"{tmp_path}/**/*.jsonl"):
        assert [found.name for found in Survey(config(source)).sources] == wanted
    dotted = f"{tmp_path}/a/../z.jsonl"
    assert [found.name for found in Survey(config(dotted)).sources] == [dotted]
    found = Survey(config("README.md", "docs/../docs/data.md")).sources
    assert [source.name for source in found] == ["README.md", "docs/../docs/data.md"]


def test_what_is_not_read_is_told(tmp_path):
    tree(tmp_path, "README.md", "a/one.jsonl")
    for name in ("wiki_00", "wiki_01", "a/wiki_02", "b.jsonl.lz4", ".hidden", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "text")
    for name in ("c.XML.gz", "d.png", "e.PNG"):
        write(tmp_path / name, b"\x1f\x8b")
    survey = Survey(config(tmp_path))
    assert len(survey.sources) == 2
    assert survey.not_read == {"without an ending": 3, ".png": 2, ".lz4": 1, ".xml.gz": 1}
    assert survey.remarks() == [
        f"not read: 3 without an ending ({tmp_path}/wiki_00, …), 2 .png ({tmp_path}/d.png, …),"
        f" 1 .lz4 ({tmp_path}/b.jsonl.lz4), 1 .xml.gz ({tmp_path}/c.XML.gz)"
    ]
    for i in range(10):
        write(tmp_path / f"part.{i}", "text")
    assert remarks(tmp_path)[0].endswith(", 8 of 8 more kinds")
    (tmp_path / "only").mkdir()
    write(tmp_path / "only" / "wiki_03", "text")
    line = failure(tmp_path / "a", tmp_path / "only")
    assert line.endswith(
        f"; also with .gz .zst .bz2 .xz), but 1 without an ending ({tmp_path}/only/wiki_03)"
    )


def test_a_file_of_an_unknown_ending_that_is_named_is_read_as_text(tmp_path):
    for name in ("wiki_00", "wiki_01", "a.xml"):
        write(tmp_path / name, f"{name}\n")
    compress(tmp_path / "a.xml", ".gz")
    assert texts(tmp_path / "a.xml") == ["a.xml\n"]
    assert remarks(tmp_path / "a.xml") == [f"unknown ending, read as text: 1 ({tmp_path}/a.xml)"]
    assert texts(tmp_path / "a.xml.gz") == ["a.xml\n"]
    assert remarks(tmp_path / "a.xml.gz") != []
    assert texts(tmp_path / "wiki_*") == ["wiki_00\n", "wiki_01\n"]
    assert remarks(tmp_path / "wiki_*") == [
        f"unknown ending, read as text: 2 ({tmp_path}/wiki_00, …)"
    ]
    write(tmp_path / "b.md", "b")
    survey = Survey(config(tmp_path, tmp_path / "wiki_00"))  # not read, and then read
    assert survey.not_read == {".xml": 1, ".xml.gz": 1, "without an ending": 1}


def hub_cache(root: Path) -> Path:
    """A tree as the hub's programs make it: names are links to files named by their hashes."""
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots" / "r1" / "data").mkdir(parents=True)
    for i, blob in enumerate(("b0", "a1")):
        write_jsonl(root / "blobs" / blob, [f"row {i}"])
        name = root / "snapshots" / "r1" / "data" / f"train-{i}.jsonl"
        name.symlink_to(f"../../../blobs/{blob}")
    return root


def test_of_a_files_names_one_that_tells_its_format_wins(tmp_path):
    root = hub_cache(tmp_path / "hub")
    blobs, data = root / "blobs", root / "snapshots" / "r1" / "data"
    for sources in ([root / "**" / "*"], [blobs / "*", data], [data, blobs / "*"]):
        assert texts(*sources) == ["row 0", "row 1"]
        names = [source.name for source in Survey(config(*sources)).sources]
        assert names == [f"{data}/train-0.jsonl", f"{data}/train-1.jsonl"]
        (line,) = remarks(*sources)
        assert line.startswith(f"links to what is read already, left out: 2 ({blobs}/")
    (blobs / "c").symlink_to("a1")
    (line,) = remarks(blobs / "c", blobs / "a1", data)
    assert line.endswith(f"left out: 2 ({blobs}/a1 is {data}/train-1.jsonl, …)")
    os.link(blobs / "a1", tmp_path / "again.txt")  # of two that tell one, the first
    assert texts(data / "train-1.jsonl", tmp_path / "again.txt") == ["row 1"]


def test_what_is_read_through_a_link_is_not_called_unread(tmp_path):
    root = hub_cache(tmp_path / "hub")
    assert remarks(root) == []
    write_jsonl(root / "blobs" / "c2", ["row 2"])  # no name leads to it
    os.link(root / "blobs" / "b0", root / "hard")
    (root / "gone").symlink_to("purged")
    assert Survey(config(root)).not_read == {"broken link": 1, "without an ending": 1}
    assert sorted(texts(root)) == ["row 0", "row 1"]


def test_names_that_would_break_a_line_are_escaped(tmp_path):
    names = ["a\nb", "c\x1b[2Jd", "e\x85\u2028", os.fsdecode(b"\xff"), "naïve 文"]
    shown = ["a\\nb", "c\\x1b[2Jd", "e\\x85\\u2028", "\\udcff", "naïve 文"]
    tree(tmp_path, "z.jsonl")
    for name, expected in zip(names, shown, strict=True):
        path = write(tmp_path / name, "text")
        assert remarks(path) == [f"unknown ending, read as text: 1 ({tmp_path}/{expected})"]
        assert remarks(tmp_path) == [f"not read: 1 without an ending ({tmp_path}/{expected})"]
        (tmp_path / "z").symlink_to(path)
        line = f"left out: 1 ({tmp_path}/z is {tmp_path}/{expected})"
        assert any(remark.endswith(line) for remark in remarks(path, tmp_path / "z"))
        (tmp_path / "z").unlink()
        path = path.rename(tmp_path / f"y.{name}")
        assert f"({tmp_path}/y.{expected})" in remarks(tmp_path)[0]
        assert all(line.isprintable() for line in remarks(tmp_path))
        path.unlink()


def test_what_is_no_file_is_not_waited_for(tmp_path, limited, monkeypatch):
    tree(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 100 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("c.txt")
    (tmp_path / "d.txt").symlink_to("/dev/zero")
    (tmp_path / "image").symlink_to("purged")
    kinds = {"FIFO": 2, "device": 1, "socket": 1}
    assert texts(tmp_path) == texts(tmp_path / "[a-d]*") == ["a.jsonl"]
    assert Survey(config(tmp_path)).not_read == {**kinds, "broken link": 1}
    assert Survey(config(tmp_path / "[a-dp]*")).not_read == kinds
    for name, kind in (("b.jsonl", "FIFO"), ("c.txt", "socket"), ("d.txt", "device")):
        message = f"{tmp_path / name}: a {kind}, not a file; save its content to a file"
        assert failure(tmp_path / name) == message
    assert ", but 1 FIFO (" in failure(tmp_path / "pip*")


@contextlib.contextmanager
def without_privileges(folder: Path):
    """As a user who does not own the directory, which is reached by all."""
    for parent in (folder, *folder.parents[:-2]):
        parent.chmod(0o755)
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_entered_is_told(tmp_path):
    tree(tmp_path, "a/x.jsonl", "locked/x.jsonl", "listed/x.jsonl", "entered/x.jsonl")
    for name, mode in (("locked", 0o000), ("listed", 0o444), ("entered", 0o111)):
        (tmp_path / name).chmod(mode)
    with without_privileges(tmp_path):
        assert failure(tmp_path) == f"{tmp_path}/entered: Permission denied"
        assert failure(tmp_path / "locked") == f"{tmp_path}/locked: Permission denied"
        for name in ("locked/x.jsonl", "locked/y", "listed/x.jsonl"):
            assert failure(tmp_path / name) == f"{tmp_path / name}: Permission denied"
        assert texts(tmp_path / "entered/x.jsonl") == ["entered/x.jsonl"]
        assert failure(tmp_path / "entered/y.jsonl") == (
            f"{tmp_path}/entered/y.jsonl: no such file"
        )
        line = "matches nothing, but 1 unreadable directory"
        assert line in failure(tmp_path / "locked" / "*.jsonl")
        assert line in failure(tmp_path / "lock*" / "x.jsonl")
        survey = Survey(config(tmp_path / "[ae]*" / "*.jsonl", tmp_path / "[a-d]" / "x.jsonl"))
        assert [Path(source.path).parent.name for source in survey.sources] == ["a"]
        assert survey.not_read == {"unreadable directory": 1}
    for name in ("locked", "listed", "entered"):
        (tmp_path / name).chmod(0o755)


def test_a_file_that_may_not_be_read_is_told_at_the_start(tmp_path):
    path = tree(tmp_path, "a.jsonl", "b.jsonl") / "b.jsonl"
    path.chmod(0o000)
    with without_privileges(tmp_path):
        for source in (path, tmp_path, tmp_path / "*.jsonl"):
            with pytest.raises(UserError) as caught:
                Survey(config(source))
            assert str(caught.value) == f"{path}: can't be read: Permission denied"
        assert texts(tmp_path / "a.jsonl") == ["a.jsonl"]


def test_only_what_is_written_is_a_pattern(tmp_path, monkeypatch):
    root = tree(tmp_path / "my [1] *?[", "raw/a.jsonl", "raw/b.jsonl", "raw/data[1].jsonl")
    tree(tmp_path / "my 1 xx[", "raw/c.jsonl")  # what the path would match as a pattern
    monkeypatch.setenv("ROOM", str(root))
    monkeypatch.setenv("HOME", str(root))
    for start in (str(root).replace("[", "[[]"), "$ROOM", "${ROOM}", "~", "$ROOM/raw/.."):
        assert texts(f"{start}/raw/[ab].jsonl") == ["raw/a.jsonl", "raw/b.jsonl"]
        assert texts(f"{start}/r*/data[[]1].jsonl") == ["raw/data[1].jsonl"]
    monkeypatch.setenv("NAME", "[ab]")
    assert failure("$ROOM/raw/$NAME*.jsonl") == f"{root}/raw/[ab]*.jsonl: matches nothing"
    assert texts("$ROOM/raw/data[1].jsonl") == ["raw/data[1].jsonl"]
    assert texts(root / "raw" / "data[1].jsonl") == ["raw/data[1].jsonl"]
    assert failure("$ROOM/raw/data[2].jsonl").endswith("/raw/data[2].jsonl: matches nothing")
    code = (
        "from corpus import readers;"
        "data = readers.DataConfig(sources=['raw/*.jsonl', 'raw/data[1].jsonl']);"
        "print([piece.name for part in readers.plan(data) for piece in part.pieces])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "ROCKET_ROOT": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['raw/a.jsonl', 'raw/b.jsonl', 'raw/data[1].jsonl']\n"


def test_documents_of_about_n_lines(tmp_path):
    """Boundaries hang on lines alone: an edit moves those next to it, and no others."""
    lines = [f"sentence {i}" for i in range(5000)]
    for i in range(0, 5000, 7):
        lines[i] = "" if i % 2 else " \t"
    rule = {"lines": 20}
    path = write(tmp_path / "a.txt", "\r\n".join(lines))
    found = texts(path, document=rule)
    assert "".join(found) == "\r\n".join(lines)
    assert 150 < len(found) < 350
    assert all(text.split("\r\n")[0].strip() for text in found[1:])
    rows = texts(write_jsonl(tmp_path / "a.jsonl", lines), document=rule)
    assert rows == [text.replace("\r\n", "\n").removesuffix("\n") + "\n" for text in found]
    edited = write(tmp_path / "b.txt", "\r\n".join(["new", *lines[:2500], "new", *lines[2500:]]))
    assert len(set(texts(edited, document=rule)) - set(found)) <= 2
    assert len(texts(path, document={"lines": 1})) == sum(bool(line.strip()) for line in lines)


TEMPLATE = {"system", "user", "assistant"}
CHAT = [
    [("system", "Be kind."), ("user", "two\nlines"), ("assistant", "é🦙 <|end|>")],
    [("system", ""), ("user", "no system"), ("assistant", "</s>")],
    [("user", "null answer"), ("assistant", None)],
    [("user", 'a "quote", a comma'), ("assistant", "b"), ("user", "\r\nc"), ("assistant", "d")],
    [],
    None,
]
TURNS = [
    [[role, text or ""] for role, text in chat or [] if text or role != "system"] for chat in CHAT
]


def write_chats(path: Path, style: tuple[str, str]) -> Path:
    """The conversations of CHAT, their fields and roles named in a style."""
    names = {"user": "human", "assistant": "gpt"} if style == ("from", "value") else {}
    rows = [
        [dict(zip(style, (names.get(role, role), text), strict=True)) for role, text in chat]
        if chat is not None
        else None
        for chat in CHAT
    ]
    if path.suffix == ".parquet":
        extra = [
            [row and [{**m, "weight": 1.5, "calls": [{"id": 1}]} for m in row]] for row in rows
        ]
        table = pa.table({"id": range(len(rows)), "messages": [row for (row,) in extra]})
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".jsonl":
        write(path, "".join(json.dumps({"id": [1], "messages": r}) + "\n" for r in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [["messages", "id"], *((json.dumps(r) if r is not None else "", 1) for r in rows)]
            )
    return path


@pytest.mark.parametrize("style", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_conversations_of_messages(tmp_path, suffix, style):
    path = write_chats(tmp_path / f"a.{suffix}", style)
    data = config(path, format="instruct")
    found = documents(data)
    assert [document.text for document in found] == [
        json.dumps(turns, ensure_ascii=False) for turns in TURNS
    ]
    assert [document.row for document in found] == list(range(1, len(CHAT) + 1))
    contents = [readers.texts(document, data) for document in found]
    assert contents == [[text for _, text in turns] for turns in TURNS]
    assert [d.text for d in documents(config(path, format="instruct", part_bytes=1))] == [
        document.text for document in found
    ]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_conversations_of_columns(tmp_path, suffix, kind):
    path = tmp_path / f"a.{suffix}"
    rows = [("one", "be", 1), ("two", "", 2), (None, None, 3), ("é\n", "[]", 4)]
    if suffix == "parquet":
        question, system, number = (list(column) for column in zip(*rows, strict=True))
        text = (
            pa.dictionary(pa.int8(), pa.string()) if kind == "dictionary" else getattr(pa, kind)()
        )
        table = {"a": pa.array(question).cast(text), "s": pa.array(system).cast(text)}
        broken = pa.array([b"\xff"] * 4).view(pa.string())
        table |= {"number": number, "nested": [[{"a": "b"}]] * 4, "broken": broken}
        pq.write_table(pa.table(table), path, row_group_size=3)
    elif suffix == "jsonl":
        lines = [json.dumps({"a": a, "s": s, "n": [n], "x": "\ud800"}) for a, s, n in rows]
        write(path, "\n".join(lines))
    else:
        with open(path, "w", newline="", encoding="latin-1") as file:
            csv.writer(file).writerows([["n", "a", "s", "x"]])
            for a, s, n in rows:
                encoded = a and a.encode().decode("latin-1")
                csv.writer(file).writerow([n, encoded, s, "\xff"])  # the last is not UTF-8
    columns = {"system": "s", "user": "a", "assistant": "a"}
    assert [json.loads(text) for text in texts(path, format="instruct", columns=columns)] == [
        [["system", "be"], ["user", "one"], ["assistant", "one"]],
        [["user", "two"], ["assistant", "two"]],
        [["user", ""], ["assistant", ""]],
        [["system", "[]"], ["user", "é\n"], ["assistant", "é\n"]],
    ]


def test_a_parquet_column_of_nulls_alone(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"s": pa.nulls(2), "q": ["a", "b"]}), path)
    columns = {"system": "s", "assistant": "q"}
    found = texts(path, format="instruct", columns=columns)
    assert found == ['[["assistant", "a"]]', '[["assistant", "b"]]']


def test_instruction_data_is_rows_of_tables(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.format = instruct is for tables"):
        readers.plan(config(write(tmp_path / "a.txt", "a"), format="instruct"))
    data = config("a.jsonl")
    assert readers.texts(readers.Document("as it is", "a.jsonl", 1), data) == ["as it is"]


def test_bad_conversations_are_named(tmp_path):
    good = [{"role": "user", "content": "a"}]
    rows = {
        "message 2: data.template has no role 'asistant', but system, user, assistant": [
            *good,
            {"role": "asistant", "content": "b"},
        ],
        "'content of message 1' is int, not text": [{"role": "user", "content": 1}],
        "'messages' is dict, not a list of messages": {"role": "user", "content": "a"},
        "message 1 of 'messages' has user, not role and content, or from and value": [
            {"user": "a"}
        ],
        "message 2 of 'messages' is str, not role and content, or from and value": [*good, "b"],
        "message 1: data.template has no role '', but": [{"role": None, "content": "b"}],
        "not JSON (Expecting value": "nothing",
        "not UTF-8 ('\\ud83e')": [{"role": "user", "content": "\ud83e"}],
    }
    lines = [{"messages": value} for row in rows.values() for value in (good, row)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [*lines, {"message": good}])))
    found = left_out(path, format="instruct")
    assert [row for row, _ in found] == [*range(2, 2 * len(rows) + 1, 2), 2 * len(rows) + 1]
    expected = [*rows, "no column 'messages'; set data.messages_column to one of: message"]
    for (_, reason), words in zip(found, expected, strict=True):
        assert reason.startswith(words)

    columns = {"user": "question", "assistant": "answer"}
    path = write(tmp_path / "b.csv", "question,reply\na,b\n")
    message = failure(path, format="instruct", columns=columns, on_error="skip")
    assert message == (f"{path}: no column 'answer'; set data.columns to one of: question, reply")
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    message = failure(path, format="instruct", messages_column="id", on_error="skip")
    assert "column 'id' is int64, not a list of {role, content} or {from, value}" in message


def test_a_column_named_twice_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", "text,text\na,b\n")
    assert "2 columns 'text'; set data.text_column" in failure(path)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([["a"], ["b"]], ["text", "text"]), path)
    assert "2 columns 'text'; set data.text_column" in failure(path)


GOOD = [f"text {i}, é\n\nwith lines" for i in range(20_000)]
BAD_ROW = 13_579


@pytest.mark.parametrize("format", ["jsonl", "parquet", "csv"])
def test_one_bad_row_among_many(tmp_path, format):
    """`stop` names it; `skip` leaves out that row alone; where parts are cut changes nothing."""
    path = tmp_path / f"a.{format}"
    rows = [text.encode() for text in GOOD]
    rows[BAD_ROW - 1] = b"caf\xe9"
    if format == "parquet":
        array = pa.array(rows).view(pa.string())
        pq.write_table(pa.table({"text": array}), path, row_group_size=1000)
    elif format == "jsonl":
        write(path, b"\n".join(b'{"text": "%s"}' % row.replace(b"\n", b"\\n") for row in rows))
    else:
        write(path, b"text\n" + b"".join(b'"%s"\n' % row for row in rows))
    wanted = [*GOOD[: BAD_ROW - 1], *GOOD[BAD_ROW:]]
    for part_bytes, parts in ((0, 1), (20_000, 1 if format == "csv" else 4)):
        assert len(readers.plan(config(path, part_bytes=part_bytes))) >= parts
        found, bad = skipping(path, part_bytes=part_bytes)
        assert [document.text for document in found] == wanted
        ((file, row, reason),) = bad
        assert (file, row) == (str(path), BAD_ROW)
        assert reason.startswith("not UTF-8 (b'\\xe9')")
        assert failure(path, part_bytes=part_bytes) == f"{path}, row {row}: {reason}"


def test_skipping_changes_nothing_where_all_is_well(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_csv(tmp_path / "b.csv", ROWS)
    write_parquet(tmp_path / "c.parquet", ROWS)
    for rule in ("auto", "line", "blank_line", STARTS, {"lines": 2}, "file"):
        found, bad = skipping(tmp_path, document=rule)
        assert found == documents(config(tmp_path, document=rule))
        assert bad == []


def test_bad_rows_of_json_lines(tmp_path):
    good = '{"text": "a"}'
    lines = [
        good,
        "{",
        "[1]",
        '{"body": "a"}',
        '{"text": 1}',
        '{"text": "\\ud800"}',
        "",
        "1" * 5000,
    ]
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, '{"text": "' + "b" * 101 + '"}', good]))
    wanted = (
        "not JSON|not a JSON object|no column|'text' is int|not UTF-8|a document above|a document"
    )
    found = left_out(path, max_document_bytes=100)
    assert [row for row, _ in found] == [2, 3, 4, 5, 6, 8, 9]
    for (_, reason), words in zip(found, wanted.split("|"), strict=True):
        assert reason.startswith(words)
    for part_bytes in (3, 20, 400):
        documents, bad = skipping(path, max_document_bytes=100, part_bytes=part_bytes)
        assert [document.place() for document in documents] == [f"{path}, row 1", f"{path}, row 10"]
        assert [(row, reason) for _, row, reason in bad] == found


def test_bad_records_of_csv_do_not_swallow_their_neighbours(tmp_path):
    records = [
        '1,"a\nb"',
        "2",
        '3,"open',
        "4,d",
        '5,"e"x',
        "6,f,g",
        "",
        '7,"é ""h"""',
        '8,"end\n9,i',
    ]
    path = write(tmp_path / "a.csv", "\ufeffid,text\r\n" + "\r\n".join(records))
    found, bad = skipping(path)
    assert [document.text for document in found] == ["a\nb", "d", 'é "h"', "i"]
    assert [document.row for document in found] == [1, 4, 7, 9]
    assert [(row, reason[:12]) for _, row, reason in bad] == [
        (2, "has 1 fields"),
        (3, "not CSV (','"),
        (5, "not CSV (','"),
        (6, "has 3 fields"),
        (8, "not CSV (une"),
    ]
    path = write(tmp_path / "b.csv", "text\n" + "a" * 1000 + "\nb\n" + "c" * 11 + "\nd\n")
    found, bad = skipping(path, max_document_bytes=10)
    assert [document.text for document in found] == ["b", "d"]
    assert [row for _, row, _ in bad] == [1, 3]
    assert all("above data.max_document_bytes" in reason for _, _, reason in bad)
    path = write(tmp_path / "c.csv", 'text\n"open\nb\n' + "a" * 1000 + "\nd\n")
    found, bad = skipping(path, max_document_bytes=10)
    assert [(document.row, document.text) for document in found] == [(2, "b"), (4, "d")]
    assert [row for _, row, _ in bad] == [1, 3]


def test_a_bad_line_makes_its_document_bad_once(tmp_path):
    lines = [b"= a", b"one", b"caf\xe9", b"caf\xe9", b"", b"= b", b"two", b"", b"= c", b"x" * 200]
    path = write(tmp_path / "a.txt", b"\n".join([*lines, b"x" * 200, b"", b"= d", b"three"]))
    keys = {"max_document_bytes": 100}
    for rule, wanted, rows in (
        ("blank_line", ["= b\ntwo", "= d\nthree"], [3, 10]),
        ({"starts": "= "}, ["= b\ntwo\n\n", "= d\nthree"], [3, 10]),
        ("file", [], [1]),
    ):
        for part_bytes in (0, 7, 40):
            found, bad = skipping(path, document=rule, part_bytes=part_bytes, **keys)
            assert [document.text for document in found] == wanted
            assert [row for _, row, _ in bad] == rows
    found, bad = skipping(path, document="line", part_bytes=30, **keys)
    assert len(found) == 10
    assert [row for _, row, _ in bad] == [3, 4, 10, 11]


@pytest.mark.parametrize("rule", ["line", "blank_line", STARTS, {"lines": 3}])
@pytest.mark.parametrize("format", ["txt", "jsonl", "parquet"])
def test_the_cut_into_parts_changes_nothing_that_is_left_out(tmp_path, rule, format):
    for seed, part_bytes in enumerate([5, 50, 333]):
        choose = random.Random(seed)
        lines = [line.encode() for line in random_lines(seed)]
        for i in choose.sample(range(len(lines)), 8):
            lines[i] = choose.choice([b"caf\xe9", b"x" * 900, b" = \xff = "])
        path = tmp_path / f"{seed}.{format}"
        if format == "parquet":
            array = pa.array(lines).view(pa.string())
            pq.write_table(pa.table({"text": array}), path, row_group_size=3)
        elif format == "jsonl":
            rows = [b'{"text": "%s"}' % line.replace(b"\r", b"\\r") for line in lines]
            write(path, b"\n".join(rows))
        else:
            write(path, b"\n".join(lines))
        keys = {"document": rule, "max_document_bytes": 800}
        found, bad = skipping(path, part_bytes=part_bytes, **keys)
        whole, all_bad = skipping(path, part_bytes=1_000_000_000, **keys)
        assert [(d.text, d.place()) for d in found] == [(d.text, d.place()) for d in whole]
        assert bad == all_bad
        assert 1 <= len(bad) <= 8


def test_python_that_is_not_what_it_says_is_one_bad_document(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    write(tmp_path / "a.py", "# coding: latin-1\nx = '\xe9'\n".encode("latin-1"))
    write(tmp_path / "b.py", b"one\ncaf\xe9\n" * 2)
    write(tmp_path / "c.py", b"# coding: nothing\n")
    write(tmp_path / "d.py", b"last\r\n")
    found, bad = skipping("python-stdlib")
    assert [document.text for document in found] == ["# coding: latin-1\nx = '\xe9'\n", "last\n"]
    assert [(Path(file).name, row) for file, row, _ in bad] == [("b.py", 2), ("c.py", 1)]
    assert "b.py, row 2: not UTF-8 (b'\\xe9')" in failure("python-stdlib")


def test_what_is_cut_short_stops_the_reading_in_both_modes(tmp_path):
    rows = [f"{random.Random(i).random()} text" for i in range(2000)]
    plain = write_jsonl(tmp_path / "a.jsonl", rows)
    paths = [compress(plain, suffix) for suffix in COMPRESSIONS]
    paths.append(write_parquet(tmp_path / "a.parquet", rows, 500))
    for path in paths:
        packed = path.read_bytes()
        write(path, packed[: len(packed) * 9 // 10])
        assert "cut short or damaged" in failure(path, on_error="skip")
    pq.write_table(pa.table({"id": range(len(rows)), "text": rows}), path, write_page_checksum=True)
    damaged = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    damaged[column.data_page_offset - 200] ^= 1  # in its dictionary
    assert "cut short or damaged" in failure(write(path, bytes(damaged)), on_error="skip")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_compressed_file_is_whole_or_refused(tmp_path, compression):
    """Cut after any byte, of no byte, or with something behind its end."""
    plain = write_jsonl(tmp_path / "a.jsonl", [f"row {i}" for i in range(30)])
    whole = compress(plain, compression).read_bytes()
    path = tmp_path / f"b.jsonl{compression}"
    for content in (whole, whole + whole):
        assert len(texts(write(path, content))) == 30 * len(content) // len(whole)
    line = failure(write(path, b""))
    assert line == f"{path}: cut short: 0 bytes, which no {compression} file has"
    assert failure(path, on_error="skip") == line
    assert line in failure(tmp_path)
    damaged = [whole[:size] for size in range(1, len(whole))]
    damaged += [whole + whole[:size] for size in range(1, len(whole), 5)]
    damaged += [whole + b"garbage", b"\0" * 512, b"not packed"]
    damaged += [whole + b"\0" * (6 if compression == ".xz" else 8)]
    for content in damaged:
        for on_error in ("stop", "skip"):
            assert "cut short or damaged" in failure(write(path, content), on_error=on_error)


def test_xz_streams_may_be_padded(tmp_path, monkeypatch):
    whole, path = lzma.compress(b'{"text": "a"}\n'), tmp_path / "a.jsonl.xz"
    for block in (7, len(whole), len(whole) + 3, readers.PACKED_BYTES):
        monkeypatch.setattr(readers, "PACKED_BYTES", block)
        for size in (4, 8, 200):
            padding = b"\0" * size
            assert texts(write(path, whole + padding)) == ["a"]
            assert texts(write(path, whole + padding + whole + whole + padding)) == ["a"] * 3
            for rest in (b"\0", b"\0\0" + whole, b"garbage", whole[:-1]):
                message = failure(write(path, whole + padding + rest), on_error="skip")
                assert "cut short or damaged" in message
            assert "cut short or damaged" in failure(write(path, padding + whole))


def test_a_flipped_bit_of_xz_is_found(tmp_path, monkeypatch):
    packed = lzma.compress(b'{"text": "some text"}\n' * 50)
    for place in range(0, len(packed), 3):
        damaged = bytearray(packed)
        damaged[place] ^= 1
        assert "damaged" in failure(write(tmp_path / "a.jsonl.xz", bytes(damaged)))
    monkeypatch.setitem(sys.modules, "lzma", None)
    path = write(tmp_path / "a.jsonl.xz", packed)
    assert failure(path) == f"{path}: this Python was built without lzma; unpack it: xz -d"


def zstd_frame(content: bytes, window_log: int) -> bytes:
    """A frame of one uncompressed block that asks for a window."""
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block


def test_a_zstd_window_of_any_size_is_read(tmp_path, monkeypatch):
    row, bad = b'{"text": "a"}\n', "a zstd stream with a window above 128 MiB; put the program zstd"
    path = tmp_path / "a.jsonl.zst"
    for log in (20, 27):
        assert texts(write(path, zstd_frame(row, log) * 2)) == ["a", "a"]
    if shutil.which("zstd"):
        for log in (28, 31):
            assert texts(write(path, zstd_frame(row, log) + zstd_frame(row, 20))) == ["a", "a"]
            assert texts(path, document="line") == ["a", "a"]
        done = subprocess.run(["zstd", "--long=31"], input=row * 9, capture_output=True, check=True)
        assert texts(write(path, done.stdout)) == ["a"] * 9
        for content in (done.stdout[:-1], done.stdout + b"garbage"):
            message = failure(write(path, content), on_error="skip")
            assert f"{path}" in message
            assert "cut short or damaged: zstd ends with code 1: " in message
    monkeypatch.setenv("PATH", "")
    for content in (zstd_frame(row, 31), zstd_frame(row, 20) + zstd_frame(row, 31)):
        message = failure(write(path, content), on_error="skip")
        assert bad in message
        assert "zstd -dc --long=31 OLD.zst | zstd -o NEW.zst" in message
        assert "damaged" not in message


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
def test_a_byte_order_mark_is_no_text(tmp_path, compression):
    def read(name: str, content: str, **keys) -> list[str]:
        path = write(tmp_path / name, "\ufeff" + content)
        return texts(compress(path, compression) if compression else path, **keys)

    for name, tab in (("a.csv", ","), ("a.tsv", "\t")):
        for header in (f"text{tab}id", f'"text"{tab}"id"', f'id{tab}"text"', f'"id"{tab}text'):
            row = f"1{tab}a" if header.strip('"').startswith("id") else f"a{tab}1"
            assert read(name, f"{header}\r\n{row}\n") == ["a"]
            assert read(name, f"{header}\r\n{row}\n", text_column="id") == ["1"]
    assert read("a.csv", "text\n\ufeffa\n") == ["\ufeffa"]  # within a text it is one
    assert read("a.jsonl", '{"text": "a"}\n{"text": "\ufeffb"}') == ["a", "\ufeffb"]
    assert read("a.ndjson", '\n{"text": "a"}\n') == ["a"]
    assert read("a.txt", "a\n\ufeffb") == ["a\n\ufeffb"]
    assert read("a.txt", "a\n\ufeffb", document="line") == ["a", "\ufeffb"]
    assert read("a.txt", "# a\nb\n# c", document={"starts": "# "}) == ["# a\nb\n", "# c"]
    assert read("a.txt", "\na\n", document="blank_line", part_bytes=1) == ["a"]
    assert read("a.txt", "a" * 10, max_document_bytes=10) == ["a" * 10]
    assert read("a.txt", "a" * 10, max_document_bytes=10, document="line") == ["a" * 10]
    path = write(tmp_path / "b.txt", "\ufeff" + "é" * 6)
    assert "row 1: a document above" in failure(path, max_document_bytes=10)


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
def test_what_begins_as_utf16_is_refused(tmp_path, compression, encoding):
    contents = {
        "a.txt": "one\ntwo\n",
        "a.csv": "text\na\n",
        "a.tsv": "id\ttext\n1\ta\n",
        "a.jsonl": '{"text": "a"}\n',
    }
    for (name, content), order in itertools.product(contents.items(), ("LE", "BE")):
        path = write(tmp_path / name, ("\ufeff" + content).encode(f"{encoding}-{order}"))
        path = compress(path, compression) if compression else path
        line = f"{path}: {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 IN > OUT"
        for keys in ({}, {"errors": "replace"}, {"on_error": "skip"}, {"document": "line"}):
            assert failure(path, **keys) == line
    if not compression:  # the mark is in the first piece, which another process may read
        data = config(tmp_path / "a.jsonl", part_bytes=3)
        with pytest.raises(UserError, match=f"{encoding}, not UTF-8"):
            [*readers.read(readers.plan(data)[-1], data)]


def test_tsv_is_csv_with_tabs(tmp_path):
    path = write(tmp_path / "a.tsv", 'id\ttext\n1\ta, "b", c\n2\t"d ""e""\nf"\n3\t"g\th"\n')
    assert texts(path) == ['a, "b", c', 'd "e"\nf', "g\th"]
    data = config(path, format="instruct", columns={"user": "id", "assistant": "text"})
    assert json.loads(documents(data)[0].text)[1] == ["assistant", 'a, "b", c']


def test_an_open_quote_of_tsv_swallows_no_row(tmp_path):
    """Of sentences, one may open a quote and the next close it."""
    lines = ["good\t1", '"I love it.\t2', 'It is great."\t3', '"Open', '"x" y\t5', "last\t6"]
    path = write(tmp_path / "a.tsv", "text\tid\n" + "\n".join(lines))
    found = left_out(path)
    assert [row for row, _ in found] == [2, 4, 5]
    assert found[0][1] == "not TSV (a quote is open over a tab and the end of a line)"
    read, _ = skipping(path)
    assert [document.text for document in read] == ["good", 'It is great."', "last"]
    path = write(tmp_path / "b.tsv", 'id\t"text\n1\ta"\n')
    assert "the header is not TSV" in failure(path)


ANY_TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from('\0\r\n\x0b\x1c\x85\u2028\ufeff\u2581",'),
    )
)
HARD = st.one_of(ANY_TEXT, st.sampled_from(["</s>", "<|end|>", "<|user|>", "\u2581", "\r", '"']))


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(HARD, HARD), max_size=6))
@pytest.mark.parametrize("format", ["jsonl", "parquet", "csv"])
def test_any_text_is_kept(tmp_path_factory, format, rows):
    path = tmp_path_factory.mktemp("rows") / f"a.{format}"
    if format == "parquet":
        columns = [pa.array([row[i] for row in rows], pa.string()) for i in (0, 1)]
        pq.write_table(pa.table(columns, ["text", "reply"]), path, row_group_size=2)
    elif format == "jsonl":
        lines = [json.dumps({"text": a, "reply": b}, ensure_ascii=len(a) % 2 > 0) for a, b in rows]
        write(path, "\r\n".join(lines))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "reply"), *rows])
    assert texts(path) == [text for text, _ in rows]
    columns = {"system": "text", "assistant": "reply"}
    data = config(path, format="instruct", columns=columns)
    for document, (text, reply) in zip(documents(data), rows, strict=True):
        turns = [["system", text], ["assistant", reply]] if text else [["assistant", reply]]
        assert json.loads(document.text) == turns
        assert readers.texts(document, data) == [content for _, content in turns]


PEAK = """
import resource, sys
from corpus import readers
from config import DataConfig

data = DataConfig(sources=sys.argv[1:], on_error="skip", max_document_bytes=1_000_000)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read = sum(1 for part in readers.plan(data) for document in readers.read(part, data))
print(read, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_stays_small_however_large_a_row_group_or_a_line_is(tmp_path):
    source = random.Random(0)
    rows = [source.randbytes(5_000).hex() for _ in range(10_000)]  # 100 MB
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    with open(tmp_path / "b.jsonl", "w") as file:
        file.write('{"text": "a"}\n{"text": "')
        for _ in range(200):
            file.write("a" * 1_000_000)
        file.write('"}\n{"text": "b"}\n')
    for name, count, most in (("a.parquet", 10_000, 60), ("b.jsonl", 2, 30)):
        command = [sys.executable, "-c", PEAK, str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        read, peak = map(int, done.stdout.split())
        assert read == count
        assert peak < most
