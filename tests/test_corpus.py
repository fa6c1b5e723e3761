"""corpus.py keeps every byte of every document, whatever the format and wherever parts are cut.

Protected here: what a document is in each format under each rule; that the cut into parts changes
neither the documents nor their places; that a text has one split; that a mistake in a source is
named with file and row.
"""

import csv
import gzip
import json
import random
import sysconfig
import tokenize
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import corpus
from config import ConfigError, DataConfig, UserError

STARTS = {"starts": r" = [^=]+ = $"}  # the hub's wikitext


def config(*sources, **keys) -> DataConfig:
    return DataConfig(sources=[str(source) for source in sources], **keys)


def documents(data: DataConfig) -> list[corpus.Document]:
    return [document for part in corpus.plan(data) for document in corpus.read(part, data)]


def texts(*sources, **keys) -> list[str]:
    return [document.text for document in documents(config(*sources, **keys))]


def failure(*sources, **keys) -> str:
    with pytest.raises(UserError) as caught:
        documents(config(*sources, **keys))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, rows: list[str]) -> Path:
    return write(path, "".join(json.dumps({"id": 1, "text": row}) + "\n" for row in rows))


def write_parquet(path: Path, rows: list, row_group_size: int = 3) -> Path:
    table = pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_csv(path: Path, rows: list[str]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *((i, row) for i, row in enumerate(rows))])
    return path


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


@pytest.mark.parametrize("writer", [write_jsonl, write_parquet, write_csv])
def test_rows_of_tables_are_kept_exactly(tmp_path, writer):
    suffix = writer.__name__.removeprefix("write_")
    path = writer(tmp_path / f"a.{suffix}", ROWS)
    found = documents(config(path))
    assert [document.text for document in found] == ROWS
    assert [document.row for document in found] == list(range(1, len(ROWS) + 1))
    assert {document.file for document in found} == {str(path)}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_sources_read_like_plain_ones(tmp_path, suffix, compression):
    writers = {".jsonl": write_jsonl, ".csv": write_csv}
    text = "\n".join(ROWS)
    plain = (
        writers[suffix](tmp_path / f"a{suffix}", ROWS)
        if suffix in writers
        else write(tmp_path / "a.txt", text)
    )
    packed = pa.Codec(compression).compress(plain.read_bytes(), asbytes=True)
    path = write(plain.with_name(plain.name + {"gzip": ".gz", "zstd": ".zst"}[compression]), packed)
    assert texts(path) == texts(plain)


def test_a_gzip_file_may_have_several_members(tmp_path):
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    assert texts(path, document="line") == ["one", "two"]


def test_nulls_are_empty_texts_and_blank_lines_of_json_are_none(tmp_path):
    assert texts(write_parquet(tmp_path / "a.parquet", ["a", None, "b"])) == ["a", "", "b"]
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\n{"text": null}\r\n{"text": "b"}')
    assert texts(path) == ["a", "", "b"]


def test_parquet_columns_of_any_text_type(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
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


@pytest.mark.parametrize("rule", ["line", "blank_line", STARTS, "file"])
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
        assert len(corpus.plan(whole)) == 1
        assert rule == "file" or len(corpus.plan(cut)) > 3
        expected, found = documents(whole), documents(cut)
        assert [document.text for document in found] == [document.text for document in expected]
        assert [document.place() for document in found] == [d.place() for d in expected]
        assert sum(part.bytes for part in corpus.plan(cut)) <= path.stat().st_size


def test_a_document_belongs_to_the_part_in_which_it_starts(tmp_path):
    path = write(tmp_path / "a.txt", "a" * 10 + "\n" + "b" * 100 + "\n" + "c" * 10 + "\n")
    data = config(path, document="line", part_bytes=40)
    parts = [[document.text[0] for document in corpus.read(p, data)] for p in corpus.plan(data)]
    assert parts == [["a", "b"], [], [], ["c"]] or parts == [["a", "b"], [], ["c"]]


def test_small_files_share_a_part_and_parts_are_deterministic(tmp_path):
    for i in (10, 2, 1):
        write(tmp_path / f"{i}.txt", f"file {i}" * 10)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "z.md", "below")
    write(tmp_path / ".hidden.txt", "not read")
    write(tmp_path / "picture.png", b"\x89PNG")
    data = config(tmp_path)
    (part,) = corpus.plan(data)
    names = [Path(piece.path).name for piece in part.pieces]
    assert names == ["1.txt", "10.txt", "2.txt", "z.md"]
    assert corpus.plan(config(f"{tmp_path}/*.txt", tmp_path)) == corpus.plan(data)  # each once
    assert len(corpus.plan(config(tmp_path, part_bytes=1))) == 4


def test_the_standard_library_is_read_as_python_reads_it():
    data = DataConfig(sources=["python-stdlib"])
    sources = corpus.describe_sources(data)
    assert 8e6 < sum(source.bytes for source in sources) < 25e6
    assert 8 <= len(corpus.plan(data)) <= 25
    folders = {folder for source in sources for folder in source.name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "__pycache__"}
    found = {document.file: document.text for document in documents(data)}
    assert len(found) == len(sources)
    path = str(Path(sysconfig.get_paths()["stdlib"], "json", "decoder.py"))
    with tokenize.open(path) as file:
        assert found[path] == file.read()


def test_a_text_has_one_split_and_shares_are_met():
    data = DataConfig(val_fraction=0.2, test_fraction=0.1)
    splits = [corpus.split_of(f"text {i}", data) for i in range(5000)]
    assert splits == [corpus.split_of(f"text {i}", data) for i in range(5000)]
    assert 0.18 < splits.count("val") / 5000 < 0.22
    assert 0.08 < splits.count("test") / 5000 < 0.12
    other = DataConfig(val_fraction=0.2, test_fraction=0.1, split_seed=1)
    assert splits != [corpus.split_of(f"text {i}", other) for i in range(5000)]
    # Pinned: prepared datasets and trained tokenizers rely on it staying as it is.
    half = DataConfig(val_fraction=0.5)
    assert " ".join(corpus.split_of(text, half) for text in "abcdefghij") == (
        "train train train train train train val train val val"
    )


def test_sources_given_per_split_are_used_as_given(tmp_path):
    for name in ("train", "val", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(50)])
    data = config(
        tmp_path / "train.jsonl",
        val_sources=[str(tmp_path / "val.jsonl")],
        test_sources=[str(tmp_path / "test.jsonl")],
        val_fraction=0.5,
    )
    assert [part.split for part in corpus.plan(data)] == [None, "val", "test"]
    assert {corpus.split_of(text, data) for text in texts(tmp_path / "train.jsonl")} == {"train"}
    data.val_sources = [str(tmp_path / "train.jsonl")]
    with pytest.raises(UserError, match=r"train\.jsonl is in the sources of two splits"):
        corpus.plan(data)


def test_a_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path / "corpus.txt", "a")
    assert "corpos.txt: no such file; did you mean corpus.txt?" in failure(tmp_path / "corpos.txt")
    assert "*.csv: no file to read here" in failure(tmp_path / "*.csv")
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
        corpus.plan(config(path, document="row"))
    with pytest.raises(ConfigError, match="is no regex"):
        corpus.plan(config(path, document={"starts": "("}))


def test_links_are_followed_and_a_broken_one_is_named(tmp_path):
    for folder in ("elsewhere", "sources"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "elsewhere" / "a.txt", "a")
    (tmp_path / "sources" / "folder").symlink_to(tmp_path / "elsewhere")
    assert texts(tmp_path / "sources") == ["a"]
    (tmp_path / "sources" / "b.txt").symlink_to(tmp_path / "nowhere")
    assert f"{tmp_path}/sources/b.txt: No such file" in failure(tmp_path / "sources")
