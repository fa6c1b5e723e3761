"""Raw sources to documents: text, CSV, JSON lines, Parquet, python-stdlib. It knows no tokens.

The unit of work is a *part*, a pure function of the sources' names and sizes, so that any number
of processes reads the same documents in the same order. Reading streams: memory is bounded by a
batch and the largest document. What a document's text is, by `data.document`:

    row         the text column of one row
    file        the whole file
    line        a line without its newline
    blank_line  the lines between blank ones, without the last newline
    {starts=…}  from a line that the regex matches (at its start) to the next one, newlines kept

Text stands as in the source, byte for byte (but tokenize.open, which reads python-stdlib, makes
CRLF a newline). For all rules but `row`, a table's rows are lines of one larger text, a newline
added where a row lacks it. A null is an empty text; an empty text is a document, which the caller
may drop.
"""

from __future__ import annotations

import csv
import difflib
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from config import ROOT, ConfigError, DataConfig, UserError, resolve_path

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TABLES = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
TEXTS = ".txt .text .md .rst .tex .html .py .c .h .cpp .java .js .rs .go".split()
STDLIB = "python-stdlib"
STDLIB_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
MIN_PART_BYTES, MAX_PARTS = 1_000_000, 1024  # the default part: small corpora still feed all cores
BATCH_BYTES = 4_000_000  # of a Parquet column, decoded at a time
JSON_LINE_FACTOR = 8  # an escaped line may take six bytes for one of text, and has other fields


class Source(NamedTuple):
    """A file of the corpus; `split` is None where its documents are split by their content."""

    name: str
    path: str
    format: str  # text, python, csv, jsonl or parquet
    bytes: int
    split: str | None


class Piece(NamedTuple):
    """A file from `start` to `stop`, in bytes or, for Parquet, row groups; None: to its end."""

    path: str
    format: str
    bytes: int
    start: int = 0
    stop: int | None = None


class Part(NamedTuple):
    """A unit of work; `split` is None where documents are split by their content."""

    index: int
    split: str | None
    bytes: int
    pieces: tuple[Piece, ...]


class Document(NamedTuple):
    """A text and where it starts: a line or row from 1, counted from byte `start` of the file."""

    text: str
    file: str
    row: int
    start: int = 0

    def place(self) -> str:
        """`file, row N` with N counted from the file's beginning, for messages."""
        return _place(self.file, self.row, self.start)


Row = tuple[int, str, bool]  # row number, text, whether it starts inside the piece


def describe_sources(data: DataConfig) -> list[Source]:
    """All source files in the order in which they are read, each once.

    Raises:
        UserError: a missing file, a glob or directory without files, a file in two splits.
    """
    found: dict[str, Source] = {}
    named = ((None, data.sources), ("val", data.val_sources), ("test", data.test_sources))
    for split, names in named:
        for source in (source for name in names for source in _expand(name, split)):
            first = found.setdefault(source.path, source)
            if first.split != split:
                raise UserError(f"{source.path} is in the sources of two splits; name it in one")
    return list(found.values())


def plan(data: DataConfig) -> list[Part]:
    """The parts of the corpus, from its sources' names and sizes alone, in the order of reading.

    Raises:
        UserError: as `describe_sources`; a rule that a format can't follow; a damaged Parquet file.
    """
    sources = describe_sources(data)
    total = sum(source.bytes for source in sources)
    target = data.part_bytes or max(MIN_PART_BYTES, total // MAX_PARTS)
    parts: list[Part] = []
    for split, some in itertools.groupby(sources, key=lambda source: source.split):
        pieces: list[Piece] = []
        size = 0
        for piece in (piece for source in some for piece in _cut(source, target, data)):
            if pieces and size + piece.bytes > target:
                parts.append(Part(len(parts), split, size, tuple(pieces)))
                pieces, size = [], 0
            pieces.append(piece)
            size += piece.bytes
        if pieces:
            parts.append(Part(len(parts), split, size, tuple(pieces)))
    return parts


def read(part: Part, data: DataConfig) -> Iterator[Document]:
    """The documents that start in the part, in order.

    Raises:
        UserError: names file and row: unreadable or damaged, no such column, a column that is not
            text, not UTF-8 (unless data.errors is replace), above data.max_document_bytes.
    """
    for piece in part.pieces:
        for document in _documents(piece, data):
            if len(document.text.encode()) > data.max_document_bytes:
                raise UserError(f"{document.place()}: {_too_large(data)}")
            yield document


def split_of(text: str, data: DataConfig) -> str:
    """train, val or test, by the hash of data.split_seed and the text; never by the training seed.

    A split that has sources of its own takes nothing from the others.
    """
    key = str(data.split_seed).encode()
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
    share = int.from_bytes(digest, "big") / 2**64
    val = 0.0 if data.val_sources else data.val_fraction
    test = 0.0 if data.test_sources else data.test_fraction
    return "val" if share < val else "test" if share < val + test else "train"


# --- sources and parts ---


def _expand(name: str, split: str | None) -> Iterator[Source]:
    if name == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in _walk(root, STDLIB_SKIPPED):
            if path.suffix == ".py":
                label = f"{STDLIB}/{path.relative_to(root).as_posix()}"
                yield Source(label, str(path), "python", path.stat().st_size, split)
        return
    root = resolve_path(name)
    paths = [root]
    if not root.exists() and glob.has_magic(name):
        paths = [Path(path) for path in sorted(glob.glob(str(root), recursive=True))]
        if not paths:
            raise UserError(f"{root}: no file matches this pattern of the data sources")
    files = [file for path in paths for file in _files(path)]
    if not files:
        suffixes = " ".join([*TEXTS, *TABLES])
        raise UserError(f"{root}: holds no file to read ({suffixes}, with or without .gz .zst)")
    for path in files:
        label = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        yield Source(label.as_posix(), str(path), _format(path), path.stat().st_size, split)


def _files(path: Path) -> list[Path]:
    """The file itself, whatever its suffix, or the readable files below a directory."""
    if path.is_dir():
        return [file for file in _walk(path, set()) if _suffix(file) in {*TEXTS, *TABLES}]
    if path.exists():
        return [path]
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    raise UserError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))


def _walk(root: Path, skipped: set[str]) -> Iterator[Path]:
    """Files below a directory by their relative names, hidden ones left out."""

    def refuse(error: OSError) -> None:  # by default os.walk leaves out what it can't read
        raise UserError(f"{error.filename}: {error.strerror}")

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    yield from sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _suffix(path: Path) -> str:
    """The suffix that tells the format, below that of a compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def _format(path: Path) -> str:
    return TABLES.get(_suffix(path), "text")


def _rule(format: str, data: DataConfig) -> str | dict:
    if data.document == "auto":
        return "file" if format in ("text", "python") else "row"
    return data.document


def _crosses(piece: Piece, data: DataConfig) -> bool:
    """Whether a document that starts in the piece may end beyond it."""
    return _rule(piece.format, data) not in ("row", "line")


def _cut(source: Source, target: int, data: DataConfig) -> Iterator[Piece]:
    """The pieces of a source: of about `target` bytes where its format can be cut, else one."""
    rule = _rule(source.format, data)
    if rule == "row" and source.format in ("text", "python"):
        raise ConfigError(
            f"data.document = row is for tables, but {source.path} is text: file, line, blank_line"
            ' or {starts = "regex"}'
        )
    if isinstance(rule, dict):
        _pattern(rule)
    compressed = Path(source.path).suffix.lower() in COMPRESSIONS
    whole = rule == "file" or compressed or source.format in ("csv", "python")
    if whole or source.bytes <= target:
        yield Piece(source.path, source.format, source.bytes)
    elif source.format == "parquet":
        yield from _cut_row_groups(source, target)
    else:
        count = -(-source.bytes // target)
        edges = [source.bytes * i // count for i in range(count + 1)]
        for start, stop in itertools.pairwise(edges):
            yield Piece(source.path, source.format, stop - start, start, stop)


def _cut_row_groups(source: Source, target: int) -> Iterator[Piece]:
    with _open_parquet(source.path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    scale = source.bytes / max(1, sum(group.total_byte_size for group in groups))
    start, size = 0, 0
    for i, group in enumerate(groups):
        size += int(group.total_byte_size * scale)
        if size >= target or i + 1 == len(groups):
            yield Piece(source.path, source.format, size, start, i + 1)
            start, size = i + 1, 0


# --- documents ---


def _documents(piece: Piece, data: DataConfig) -> Iterator[Document]:
    rule = _rule(piece.format, data)
    start = _origin(piece)
    if rule == "row":
        for row, text, _ in _rows(piece, data):
            yield Document(text, piece.path, row, start)
    elif rule == "line":
        for row, line, _ in _lines(piece, data):
            yield Document(_without_newline(line), piece.path, row, start)
    elif rule == "file" and piece.format in ("text", "python"):
        yield Document(_whole_file(piece, data), piece.path, 1)
    elif rule == "file":
        for row, lines in _groups(piece, data, lambda line: False):
            yield Document("".join(lines), piece.path, row)
    elif rule == "blank_line":
        for row, lines in _groups(piece, data, lambda line: not line.strip()):
            blank = bool(lines) and not lines[0].strip()
            if text := "".join(lines[blank:]):
                yield Document(_without_newline(text), piece.path, row + blank, start)
    else:
        matches = _pattern(rule).match
        for row, lines in _groups(piece, data, lambda line: bool(matches(_without_newline(line)))):
            if (text := "".join(lines)).strip():  # blank lines before the first match are none
                yield Document(text, piece.path, row, start)


def _groups(
    piece: Piece, data: DataConfig, is_boundary: Callable[[str], bool]
) -> Iterator[tuple[int, list[str]]]:
    """Runs of lines, each from a boundary line inside the piece to the next, which may lie beyond.

    The lines before a file's first boundary are a run of its first piece. Whether a line is a
    boundary depends on that line alone, so neighbouring pieces agree on who owns a run.
    """
    first, lines, size = 1, [], 0
    owned = piece.start == 0
    for row, line, inside in _lines(piece, data):
        if is_boundary(line):
            if owned:
                yield first, lines
            first, lines, size, owned = row, [], 0, True
            if not inside:
                return
        elif not owned and not inside:
            return
        if owned:
            lines.append(line)
            size += len(line)
            if size > data.max_document_bytes + 2:  # characters, and a newline that may go
                blank = not lines[0].strip()  # the boundary before the document
                raise _error(piece, first + blank, _too_large(data))
    if owned:
        yield first, lines


def _lines(piece: Piece, data: DataConfig) -> Iterator[Row]:
    """The lines of a piece with their newlines; where documents cross its border, those beyond."""
    if piece.format == "text":
        for row, raw, inside in _byte_lines(piece, data, data.max_document_bytes):
            yield row, _decoded(piece, row, raw, data), inside
    elif piece.format == "python":
        for row, line in enumerate(io.StringIO(_whole_file(piece, data)), 1):
            yield row, line, True
    else:
        for row, text, inside in _rows(piece, data):
            text = text if text.endswith("\n") else text + "\n"
            for line in io.StringIO(text):
                yield row, line, inside


def _rows(piece: Piece, data: DataConfig) -> Iterator[Row]:
    """The text column of a piece's rows; where documents cross its border, those beyond."""
    readers = {"csv": _csv_rows, "jsonl": _json_rows, "parquet": _parquet_rows}
    return readers[piece.format](piece, data)


def _whole_file(piece: Piece, data: DataConfig) -> str:
    if piece.format == "text":
        try:
            with _open(piece) as file:
                raw = file.read(data.max_document_bytes + 1)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(piece, None, error) from None
        if len(raw) > data.max_document_bytes:
            raise _error(piece, 1, _too_large(data))
        return _decoded(piece, 1, raw, data)
    try:
        with tokenize.open(piece.path) as file:
            return file.read()
    except OSError as error:
        raise _unreadable(piece, None, error) from None
    except (SyntaxError, UnicodeDecodeError) as error:
        raise _error(piece, 1, f"not Python text: {error}") from None


def _byte_lines(piece: Piece, data: DataConfig, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    row, crosses = 0, _crosses(piece, data)
    try:
        with _open(piece) as file:
            position = _seek_line(file, piece.start)
            while line := file.readline(limit + 3):  # with its newline, and one byte to tell
                row += 1
                if len(line) > limit + 2:
                    raise _error(piece, row, _too_large(data))
                inside = piece.stop is None or position < piece.stop
                if not inside and not crosses:
                    return
                yield row, line, inside
                position += len(line)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(piece, row + 1, error) from None


def _seek_line(file: BinaryIO, start: int) -> int:
    """Moves to the first line that starts at byte `start` or later; its position."""
    if start == 0:
        return 0
    file.seek(start - 1)
    while (tail := file.readline(BATCH_BYTES)) and not tail.endswith(b"\n"):
        pass
    return file.tell()


def _json_rows(piece: Piece, data: DataConfig) -> Iterator[Row]:
    column = data.text_column
    limit = JSON_LINE_FACTOR * data.max_document_bytes
    for row, raw, inside in _byte_lines(piece, data, limit):
        line = _decoded(piece, row, raw, data)
        if row == 1 and piece.start == 0:
            line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _error(piece, row, f"not JSON ({error}); one object a line") from None
        if not isinstance(values, dict):
            raise _error(piece, row, 'not a JSON object; each line is one, such as {"text": "…"}')
        if column not in values:
            raise _error(piece, row, _no_column(column, list(values)))
        text = values[column]
        if not isinstance(text, str | None):
            raise _error(piece, row, f"{column!r} is {type(text).__name__}, not text")
        yield row, _without_surrogates(piece, row, text or "", data), inside


def _csv_rows(piece: Piece, data: DataConfig) -> Iterator[Row]:
    """Rows of a CSV file with a header, numbered from 1 below it; quoted newlines are kept."""
    csv.field_size_limit(data.max_document_bytes)
    lines = _byte_lines(piece, data, JSON_LINE_FACTOR * data.max_document_bytes)
    errors = data.errors
    reader = csv.reader((raw.decode("utf-8", errors) for _, raw, _ in lines), strict=True)
    names: list[str] | None = None
    index, row = 0, -1
    while True:
        row += 1
        try:
            values = next(reader)
            while not values:  # csv's word for a line without a character
                values = next(reader)
        except StopIteration:
            break
        except UnicodeDecodeError as error:
            raise _error(piece, row, _not_utf8(error)) from None
        except csv.Error as error:
            hint = f"; {_too_large(data)}" if "field limit" in str(error) else ""
            raise _error(piece, row, f"not CSV ({error}){hint}") from None
        if names is None:
            names = [values[0].removeprefix("\ufeff"), *values[1:]]
            if data.text_column not in names:
                raise _error(piece, None, _no_column(data.text_column, names))
            index = names.index(data.text_column)
        elif len(values) != len(names):
            raise _error(piece, row, f"has {len(values)} fields, the header {len(names)}")
        else:
            yield row, values[index], True
    if names is None:
        raise _error(piece, None, "empty: a CSV file starts with a header of column names")


def _parquet_rows(piece: Piece, data: DataConfig) -> Iterator[Row]:
    row = 0
    with _open_parquet(piece.path) as file:
        column = _text_column(piece, file.schema_arrow, data.text_column)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        row = sum(group.num_rows for group in groups[: piece.start])
        stop = len(groups) if _crosses(piece, data) else piece.stop
        for i, group in enumerate(groups[piece.start : stop], piece.start):
            rows = max(1, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size))
            batches = file.iter_batches(rows, row_groups=[i], columns=[column], use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                except (OSError, pa.ArrowException) as error:
                    raise _unreadable(piece, row + 1, error) from None
                if batch is None:
                    break
                values = batch.column(0)
                if pa.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                # As bytes, so that text which is not UTF-8 is found here, with its row.
                for raw in values.cast(pa.large_binary()).to_pylist():
                    row += 1
                    inside = piece.stop is None or i < piece.stop
                    yield row, _decoded(piece, row, raw or b"", data), inside


def _text_column(piece: Piece, schema: pa.Schema, name: str) -> str:
    if name not in schema.names:
        raise _error(piece, None, _no_column(name, schema.names))
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise _error(piece, None, f"column {name!r} is {kind}, not text; set data.text_column")
    return name


def _open(piece: Piece) -> BinaryIO:
    compression = COMPRESSIONS.get(Path(piece.path).suffix.lower())
    if compression:
        return io.BufferedReader(pa.input_stream(piece.path, compression=compression))
    return open(piece.path, "rb")


def _open_parquet(path: str) -> pq.ParquetFile:
    try:  # buffered and not ahead: memory stays small however large a row group is
        return pq.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(Piece(path, "parquet", 0), None, error) from None


def _decoded(piece: Piece, row: int, raw: bytes, data: DataConfig) -> str:
    """The text of bytes that start at this row; UserError where they are not UTF-8."""
    try:
        return raw.decode("utf-8", data.errors)
    except UnicodeDecodeError as error:
        inside = 0 if piece.format == "parquet" else raw.count(b"\n", 0, error.start)
        raise _error(piece, row + inside, _not_utf8(error)) from None


def _without_surrogates(piece: Piece, row: int, text: str, data: DataConfig) -> str:
    """JSON's escapes can write half of a surrogate pair, which no UTF-8 holds."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        if data.errors == "strict":
            raise _error(piece, row, f"not Unicode text: {error.reason}; {REPLACE}") from None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _without_newline(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line


def _pattern(rule: dict) -> re.Pattern[str]:
    try:
        return re.compile(rule["starts"])
    except re.error as error:
        raise ConfigError(f"data.document: {rule['starts']!r} is no regex: {error}") from None


# --- messages ---

REPLACE = "data.errors = replace puts U+FFFD in its place"


def _error(piece: Piece, row: int | None, message: str) -> UserError:
    place = piece.path if row is None else _place(piece.path, row, _origin(piece))
    return UserError(f"{place}: {message}")


def _unreadable(piece: Piece, row: int | None, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return _error(piece, row, f"can't be read, cut short or damaged: {reason}")


def _origin(piece: Piece) -> int:
    """The byte from which the rows of a piece are counted."""
    return piece.start if piece.format in ("text", "jsonl") else 0


def _place(file: str, row: int, start: int) -> str:
    """Counts the lines before `start` only now: a corpus without a mistake needs no count."""
    if start:
        row += 1  # the line that the byte before `start` belongs to
        left = start - 1
        with open(file, "rb") as lines:
            while left and (block := lines.read(min(left, 1 << 20))):
                row += block.count(b"\n")
                left -= len(block)
    return f"{file}, row {row}"


def _too_large(data: DataConfig) -> str:
    return (
        f"a document above data.max_document_bytes ({data.max_document_bytes:,}); raise it, or cut"
        " documents with data.document"
    )


def _no_column(column: str, names: list[str]) -> str:
    return f"no column {column!r}; set data.text_column to one of: {', '.join(names)}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x}); {REPLACE}"
