"""Raw sources to documents: text, CSV, TSV, JSON lines, Parquet and Python's standard library.

The unit of work is a *part*, a pure function of the sources' names and sizes, so any number of
processes reads the same documents in the same order. Reading streams: memory is bounded by a batch
and the largest document. `data.document` says what a document is:

    row         the text column of one row
    file        the whole file
    line        a line without its newline
    blank_line  the lines between blank ones, without the last newline
    {starts=…}  from a line whose beginning matches the regex to the next such line, with newlines
    {lines=N}   about N lines: one begins a document if the hash of its bytes is a multiple of N

Whether a line begins a document depends on that line alone, so a file can be cut at any byte. Text
is kept byte for byte, but a byte order mark before it is dropped, and python-stdlib is read as
Python reads it (CRLF is a newline). For all rules but `row`, the rows of a table are lines of one
larger text; a newline is added where a row lacks it. A null is an empty text, and an empty text is
a document; the caller may drop it.

In instruction data a row is a conversation, and its text is the JSON of [[role, content], …];
`texts` gives the contents. `data.on_error` says whether a document that can't be read stops the
reading. A file that is cut short or damaged always does, since nobody knows how much is lost.
docs/adding-a-format.md adds a format.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import tokenize
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from config import ConfigError, DataConfig, UserError
from corpus.sources import COMPRESSIONS, Source, Survey, suffixes
from corpus.splits import text_hash

BOM = b"\xef\xbb\xbf"  # some programs write it before UTF-8; it is not part of the text
OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32"}
OTHER_MARKS |= {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # which begin the longer ones
MIN_PART_BYTES, MAX_PARTS = 1_000_000, 1024  # by default: small corpora, too, use all cores
BATCH_BYTES = 4_000_000  # of a Parquet column, decoded at a time
PACKED_BYTES = 1 << 16  # of a compressed file, read at a time
LONG_WINDOW = "too much memory"  # what libzstd says of a long window, in pyarrow's words
TABLE_LINE_FACTOR = 8  # JSON may take six bytes for one of text, and a line has other fields
PLAIN = ("text", "python")  # formats without rows
BY_LINE = ("text", "jsonl")  # formats that can be cut at any byte
MESSAGES = (("role", "content"), ("from", "value"))  # names of a message's fields
ROLES = {"human": "user", "gpt": "assistant"}  # other names of roles
COUNTED: dict[str, tuple[int, int]] = {}  # of a file: bytes from its start, and lines in them
STRINGS = (pa.string(), pa.large_string(), pa.string_view(), pa.null())


class Part(NamedTuple):
    """A unit of work: files, or pieces of files, of one split."""

    index: int
    split: str | None
    pieces: list[Source]

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)


class Document(NamedTuple):
    """A text and where it starts: a line or row, where 1 is the one at byte `start` of the file."""

    text: str
    file: str
    row: int
    start: int = 0

    def place(self) -> str:
        """`file, row N` for messages, N counted from the file's beginning."""
        return f"{self.file}, row {self.row + _rows_before(self.file, self.start)}"


class Bad(NamedTuple):
    """A document that can't be read: its file, where it is bad (0: the file), and what is wrong."""

    file: str
    row: int
    reason: str

    def message(self) -> str:
        return f"{self.file}{f', row {self.row}' if self.row else ''}: {self.reason}"


class Unreadable(Exception):
    """Why a row can't be read, or, where all its rows are concerned, a file."""


def plan(data: DataConfig, sources: list[Source] | None = None) -> list[Part]:
    """The parts of the corpus, in the order of reading: a pure function of names and sizes.

    Without `sources`, those of the configuration are surveyed.

    Raises:
        UserError: as Survey; a rule that does not fit a format; a damaged Parquet file.
    """
    _boundary(data.document)  # raises ConfigError for what is no regex
    sources = Survey(data).sources if sources is None else sources
    target = data.part_bytes or max(MIN_PART_BYTES, sum(s.bytes for s in sources) // MAX_PARTS)
    parts: list[Part] = []
    size = 0
    for piece in (piece for source in sources for piece in _cut(source, target, data)):
        if not parts or parts[-1].split != piece.split or size + piece.bytes > target:
            parts.append(Part(len(parts), piece.split, []))
            size = 0
        parts[-1].pieces.append(piece)
        size += piece.bytes
    return parts


def read(
    part: Part, data: DataConfig, skipped: Callable[[Bad], object] = lambda bad: None
) -> Iterator[Document]:
    """The documents that start in the part, in order; with data.on_error = skip, the good ones.

    A bad document is not UTF-8 (unless data.errors is replace), above data.max_document_bytes, or a
    row that breaks its format or lacks what is to be read. Each goes to `skipped` once.

    Raises:
        UserError: names file and row: a file that is unreadable or damaged, a missing column, a
            column that is not text; with data.on_error = stop, a bad document.
    """
    for piece in part.pieces:
        yield from Reader(piece, data, skipped).documents()


def texts(document: Document, data: DataConfig) -> list[str]:
    """The texts in a document: the contents of a conversation, or the one text."""
    if data.format == "instruct":
        return [content for _, content in json.loads(document.text)]
    return [document.text]


def _rule(format: str, data: DataConfig) -> str | dict:
    if data.format == "instruct":
        return "row"
    automatic = "file" if format in PLAIN else "row"
    return automatic if data.document == "auto" else data.document


def _cut(source: Source, target: int, data: DataConfig) -> Iterator[Source]:
    """The pieces of a source: of about `target` bytes if its format can be cut, else the file."""
    rule = _rule(source.format, data)
    if rule == "row" and source.format in PLAIN:
        key = "format = instruct" if data.format == "instruct" else "document = row"
        raise ConfigError(f"data.{key} is for tables, but {source.path} is text")
    whole = rule == "file" or suffixes(source.path)[1] or source.bytes <= target
    if source.format == "parquet" and not whole:
        with _open_parquet(source.path) as file:
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        start, size, scale = 0, 0, source.bytes / max(1, sum(sizes))
        for stop, group in enumerate(sizes, 1):
            size += int(group * scale)
            if size >= target or stop == len(sizes):
                yield source._replace(bytes=size, start=start, stop=stop)
                start, size = stop, 0
    elif source.format in BY_LINE and not whole:
        count = -(-source.bytes // target)
        edges = [source.bytes * i // count for i in range(count + 1)]
        for start, stop in itertools.pairwise(edges):
            yield source._replace(bytes=stop - start, start=start, stop=stop)
    else:
        yield source


class Blocks(io.RawIOBase):
    """Blocks of bytes, one after another, as a file."""

    def __init__(self, blocks: Generator[bytes, None, None]):
        self.blocks, self.rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if not self.rest:
            self.rest = memoryview(next(filter(None, self.blocks), b""))
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

    def close(self) -> None:
        self.blocks.close()
        super().close()


class Reader:
    """Reads one piece: rows give units (rows or lines), and runs of units are documents.

    The method for a format yields (position, row as it is in the file), where the position is of
    the kind of the piece's start and stop. `convert` turns such a row into text. `self.row` is the
    number of the current row, so that an error can be placed.
    """

    def __init__(self, piece: Source, data: DataConfig, skipped: Callable[[Bad], object]):
        self.piece, self.data, self.skipped, self.row = piece, data, skipped, 0
        self.rule, self.limit = _rule(piece.format, data), data.max_document_bytes
        self.is_text, self.errors = piece.format in PLAIN, data.errors
        self.origin = piece.start if piece.format in BY_LINE else 0  # the byte of row 1
        self.key, self.columns = "text_column", [data.text_column]  # what is read of a table
        if data.format == "instruct" and data.columns:
            self.key, self.columns = "columns", list(data.columns.values())
        elif data.format == "instruct":
            self.key, self.columns = "messages_column", [data.messages_column]

    def documents(self) -> Iterator[Document]:
        """The documents that start in the piece; UserError with file and row where it fails."""
        try:
            for row, units in self.groups():
                text = "".join(units)
                if self.rule in ("line", "blank_line"):
                    text = _without_newline(text)
                elif isinstance(self.rule, dict) and not text.strip():
                    continue  # blank lines before the first match
                if 4 * len(text) > self.limit and len(text.encode()) > self.limit:
                    self.leave_out(self.too_large(row))
                else:
                    yield Document(text, self.piece.path, row, self.origin)
        except UnicodeError as error:  # Python in another encoding than it declares
            self.leave_out(self.not_utf8(error))
        except SyntaxError as error:
            self.leave_out(self.bad(f"can't be read as Python ({error})"))
        except Unreadable as error:
            raise UserError(f"{self.piece.path}: {error}") from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(self.placed(self.bad(_damage(error))).message()) from None

    def groups(self) -> Iterator[tuple[int, list[str]]]:
        """The first row and the units of each run that begins in the piece.

        A run goes from one boundary to the next, which may lie beyond the piece; what comes before
        a file's first boundary is a run of its first piece. Whether a unit is a boundary depends on
        that unit alone, so neighbouring pieces agree on who owns a run. A bad unit makes its run
        bad.
        """
        is_boundary = _boundary(self.rule)
        owned, good, first, units, size = self.piece.start == 0, True, 1, [], 0
        for unit, inside in self.units():
            bad = isinstance(unit, Bad)
            if self.rule in ("row", "line") if bad else is_boundary(unit):
                if units:
                    yield first, units
                owned, good, units, size = inside, True, [], 0
                if inside and self.rule == "blank_line":
                    continue
            if owned and good:
                first = first if units else self.row
                if not bad:
                    units.append(unit)
                    size += len(unit)
                    if size > self.limit + 2:  # characters, with a newline that may be dropped
                        bad, unit = True, self.too_large(first)
                if bad:
                    self.leave_out(unit)
                    good, units = False, []
            elif not owned and not inside:
                return
        if units or (self.rule == "file" and good):
            yield first, units

    def units(self) -> Iterator[tuple[str | Bad, bool]]:
        """Rows for the rule `row`, else lines, each with whether it starts inside the piece."""
        formats = {"csv": self.csv_rows, "tsv": self.csv_rows, "parquet": self.parquet_rows}
        rows = formats.get(self.piece.format, self.lines)
        stop = math.inf if self.piece.stop is None else self.piece.stop
        is_unit = self.is_text or self.rule == "row"
        for position, row in rows():
            inside = position < stop
            unit = row if isinstance(row, Bad) else self.convert(row)
            if unit is None:
                pass
            elif is_unit or isinstance(unit, Bad):
                yield unit, inside
            else:
                for line in io.StringIO(unit if unit.endswith("\n") else unit + "\n"):
                    yield line, inside
            self.row += 1

    def lines(self) -> Iterator[tuple[int, bytes | Bad]]:
        """Lines with their newlines, by the byte where they start; for `file`, a text is one."""
        limit = self.limit + 2 if self.is_text else TABLE_LINE_FACTOR * self.limit
        start, stop = self.piece.start, self.piece.stop
        self.row = 1
        with self.open() as file:
            take = file.read if self.is_text and self.rule == "file" else file.readline
            head = file.peek(4)  # of the file, also for a later piece
            if code := next((OTHER_MARKS[m] for m in OTHER_MARKS if head.startswith(m)), ""):
                raise Unreadable(
                    f"{code}, not UTF-8; convert it: iconv -f {code} -t UTF-8 IN > OUT"
                )
            position = max(0, start - 1)
            if start:  # the line that the byte before it belongs to is another piece's
                file.seek(position)
                position += _skip_line(take, stop - position)
                if position >= stop:
                    return
            while line := take(limit + 1 + (0 if position else len(BOM))):
                at, position = position, position + len(line)
                line = line if at else line.removeprefix(BOM)
                yield at, line if len(line) <= limit else self.too_large(self.row)
                if len(line) > limit and not line.endswith(b"\n"):
                    position += _skip_line(take)

    def csv_rows(self) -> Iterator[tuple[int, list[bytes] | Bad]]:
        """Records below a header of names, numbered from 1; quoted newlines are kept.

        A record that breaks the rules is its first line: one open quote can't swallow the rest.
        TSV is CSV with tabs. Most TSV knows no quotes, so a field may begin with a quote that is
        never closed: a quoted field with both a tab and a newline breaks the rules, too.
        """
        kind, delimiter = ("TSV", "\t") if self.piece.format == "tsv" else ("CSV", ",")
        csv.field_size_limit(TABLE_LINE_FACTOR * self.limit)
        source = (line for _, line in self.lines())
        header: list[str] = []
        record: list[bytes | Bad] = []  # the lines of the record that is being read
        again: list[bytes | Bad] = []  # lines to read a second time, from the last on

        def lines() -> Iterator[str]:
            while line := again.pop() if again else next(source, None):
                record.append(line)
                if isinstance(line, Bad):
                    raise Unreadable(line.reason)
                yield line.decode("latin-1")  # a character per byte, whatever the bytes mean

        records = None
        while True:
            record.clear()
            try:
                records = records or csv.reader(lines(), strict=True, delimiter=delimiter)
                fields = next(records, None)
                if kind == "TSV" and any("\t" in field and "\n" in field for field in fields or ()):
                    raise csv.Error("a quote is open over a tab and the end of a line")
            except (csv.Error, Unreadable) as error:
                against_rules = isinstance(error, csv.Error)  # or a line above the limit
                reason = f"not {kind} ({error})" if against_rules else str(error)
                if not header:
                    raise Unreadable("the header is " * against_rules + reason) from None
                again += reversed(record[1:])
                records = None
                yield 0, self.bad(reason)
                continue
            if fields is None:
                break
            if not fields:  # an empty line
                continue
            if not header:
                header = [name.encode("latin-1").decode("utf-8", "replace") for name in fields]
                self.check_columns(header)
                indices = [header.index(column) for column in self.columns]
            elif len(fields) == len(header):
                yield 0, [fields[index].encode("latin-1") for index in indices]
            else:
                yield 0, self.bad(f"has {len(fields)} fields, the header {len(header)}")
        if not header:
            raise Unreadable(f"empty: a {kind} file starts with a header of column names")

    def parquet_rows(self) -> Iterator[tuple[int, tuple[object, ...]]]:
        """Rows by their row group, from the piece's first one on, read a batch at a time."""
        with _open_parquet(self.piece.path) as file:
            schema = file.schema_arrow
            self.check_columns(schema.names)
            kinds = {name: _parquet_type(schema.field(name), self.key) for name in self.columns}
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            self.row = 1 + sum(group.num_rows for group in groups[: self.piece.start])
            stop = self.piece.stop if self.rule in ("row", "line") else None  # others may cross it
            for i, group in [*enumerate(groups)][self.piece.start : stop]:
                size = max(1, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size))
                for batch in file.iter_batches(size, [i], list(kinds), use_threads=False):
                    values = [batch.column(n).cast(kinds[n]).to_pylist() for n in self.columns]
                    for row in zip(*values, strict=True):
                        yield i, row

    def open(self) -> io.BufferedReader:
        """The file's bytes, decompressed; Python as UTF-8, whatever its encoding."""
        path = self.piece.path
        if self.piece.format == "python":
            with tokenize.open(path) as file:
                return io.BufferedReader(io.BytesIO(file.read().encode()))
        compression = COMPRESSIONS.get(suffixes(path)[1])
        if not compression:
            return open(path, "rb")
        if compression == "xz":
            return io.BufferedReader(Blocks(_unpack_xz(path)))
        file = io.BufferedReader(pa.input_stream(path, compression=compression))
        try:
            file.peek(1)
        except OSError as error:
            if LONG_WINDOW not in str(error) or not shutil.which("zstd"):
                raise
            return io.BufferedReader(Blocks(_unpack_zstd(path)))
        return file

    def check_columns(self, names: list[str]) -> None:
        """Raises Unreadable unless each column to read is among the names exactly once."""
        for column in self.columns:
            if (count := names.count(column)) != 1:
                wrong = f"{count} columns {column!r}" if count else f"no column {column!r}"
                known = ", ".join(names)
                if self.key == "text_column" and {"messages", "conversations"} & set(names):
                    known += "; or, for conversations, data.format = instruct"
                raise Unreadable(f"{wrong}; set data.{self.key} to one of: {known}")

    def convert(self, row: bytes | Sequence[object]) -> str | Bad | None:
        """The text of a line or of a row's columns, or Bad; None for a blank line of JSON."""
        try:
            if self.is_text:
                return row.decode("utf-8", self.errors)
            if self.piece.format == "jsonl":
                if not row.strip():
                    return None
                fields = _parse(row.decode("utf-8", self.errors).removeprefix("\ufeff"))
                if not isinstance(fields, dict):
                    raise Unreadable('not a JSON object; each line is one, such as {"text": "…"}')
                try:
                    row = [fields[column] for column in self.columns]
                except KeyError:
                    self.check_columns([*fields])
            if self.data.format == "instruct":
                return _conversation(row, self.columns, self.data)
            return _text(row[0], self.columns[0], self.errors)
        except UnicodeError as error:  # bytes, or half of a surrogate pair from JSON's escapes
            return self.not_utf8(error)
        except Unreadable as error:
            return self.bad(str(error))

    def leave_out(self, bad: Bad) -> None:
        """Skips a bad document, if data.on_error allows that."""
        bad = self.placed(bad)
        if self.data.on_error == "stop":
            raise UserError(bad.message())
        self.skipped(bad)

    def too_large(self, row: int) -> Bad:
        reason = (
            f"a document above data.max_document_bytes ({self.limit:,}); raise it, or cut documents"
            " with data.document"
        )
        return Bad(self.piece.path, row, reason)

    def not_utf8(self, error: UnicodeError) -> Bad:
        letter = error.object[error.start : error.start + 1]
        bad = self.bad(f"not UTF-8 ({letter!a}); data.errors = replace puts U+FFFD")
        lines = error.object.count(b"\n", 0, error.start) if self.is_text else 0
        return bad._replace(row=bad.row + lines)

    def bad(self, reason: str) -> Bad:
        return Bad(self.piece.path, self.row, reason)

    def placed(self, bad: Bad) -> Bad:
        """With its row counted from the file's beginning; a good corpus never needs that count."""
        return bad._replace(row=bad.row + _rows_before(self.piece.path, self.origin))


def _boundary(rule: str | dict) -> Callable[[str], bool]:
    """A function that says whether a unit begins a document, or for blank_line ends one."""
    if rule == "blank_line":
        return lambda line: not line.strip()
    if isinstance(rule, str):
        return lambda unit: rule != "file"
    if lines := rule.get("lines"):
        return lambda line: bool(line.strip()) and text_hash(_without_newline(line)) % lines == 0
    try:
        match = re.compile(rule["starts"]).match
    except re.error as error:
        raise ConfigError(f"data.document: {rule['starts']!r} is no regex: {error}") from None
    return lambda line: match(_without_newline(line)) is not None


def _rows_before(path: str, start: int) -> int:
    """How many lines begin before byte `start`, where a piece of the file starts.

    A process reads pieces in order, so counting continues where it last stopped: with bad rows in
    every piece of a file, the file is read once more, not once per piece.
    """
    if not start:
        return 0
    at, rows = COUNTED.get(path, (0, 1))  # with the line that the byte before `start` belongs to
    if at >= start:
        at, rows = 0, 1
    with open(path, "rb") as lines:
        lines.seek(at)
        while at < start - 1:
            block = lines.read(min(BATCH_BYTES, start - 1 - at))
            rows += block.count(b"\n")
            at += len(block)
    COUNTED[path] = at, rows
    return rows


def _conversation(row: Sequence[object], columns: list[str], data: DataConfig) -> str:
    """The JSON of [[role, content], …], from the columns of roles or a list of messages."""
    if data.columns:
        texts = (_text(*pair, data.errors) for pair in zip(row, columns, strict=True))
        messages = zip(data.columns, texts, strict=True)
    else:
        messages = _messages(row[0], data)
    found = [[role, text] for role, text in messages if text or role != "system"]
    return json.dumps(found, ensure_ascii=False)


def _messages(value: object, data: DataConfig) -> Iterator[tuple[str, str]]:
    """The roles and contents of a list of messages, which may be JSON."""
    column = data.messages_column
    if isinstance(value, str | bytes):
        value = _parse(_text(value, column, data.errors) or "null")
    if not isinstance(value, list | None):
        raise Unreadable(f"{column!r} is {type(value).__name__}, not a list of messages")
    for i, message in enumerate(value or [], 1):
        fields = message if isinstance(message, dict) else {}
        keys = next((keys for keys in MESSAGES if {*keys} <= {*fields}), None)
        if keys is None:
            what = f"has {', '.join(fields)}" if fields else f"is {type(message).__name__}"
            raise Unreadable(
                f"message {i} of {column!r} {what}, not role and content, or from and value"
            )
        role, text = (_text(fields[key], f"{key} of message {i}", data.errors) for key in keys)
        role = role if role in data.template else ROLES.get(role, role)
        if role not in data.template:
            known = ", ".join(data.template)
            raise Unreadable(f"message {i}: data.template has no role {role!r}, but {known}")
        yield role, text


def _text(value: object, name: str, errors: str) -> str:
    """A value as text; raises Unreadable if it is not text, UnicodeError if not Unicode."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable(f"{name!r} is {type(value).__name__}, not text")
    if errors == "replace":
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    value.encode()  # raises for half of a surrogate pair
    return value


def _parquet_type(field: pa.Field, key: str) -> pa.DataType:
    """The type as which a column is read; text is read as bytes, since it may not be UTF-8."""

    def is_text(kind: pa.DataType) -> bool:
        return (kind.value_type if pa.types.is_dictionary(kind) else kind) in STRINGS

    kind, wanted = field.type, "text"
    if is_text(kind):
        return pa.large_binary()
    if key == "messages_column":
        wanted = "a list of {role, content} or {from, value}"
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            message = kind.value_type
            fields = [f.name for f in message] if pa.types.is_struct(message) else []
            keys = next((keys for keys in MESSAGES if {*keys} <= {*fields}), ())
            if keys and all(is_text(message.field(name).type) for name in keys):
                read = [(name, pa.large_binary()) for name in fields if name in keys]
                return pa.large_list(pa.struct(read))
    raise Unreadable(f"column {field.name!r} is {kind}, not {wanted}; set data.{key}")


def _parse(line: str) -> object:
    """The value of a JSON text."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON ({error})") from None


def _open_parquet(path: str) -> pq.ParquetFile:
    try:  # buffered and not ahead: memory stays small however large a row group is
        return pq.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: {_damage(error)}") from None


def _without_newline(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line


def _skip_line(take: Callable[[int], bytes], most: float = math.inf) -> int:
    """Reads the rest of a line in blocks, or at least `most` bytes; returns how many it read."""
    count = 0
    while count < most and (block := take(BATCH_BYTES)):
        count += len(block)
        if block.endswith(b"\n"):
            break
    return count


def _unpack_xz(path: str) -> Generator[bytes, None, None]:
    """The content of an xz file, of one stream or several; OSError where it is cut or damaged.

    NUL bytes may follow a stream, in fours. (Python's LZMAFile would take any garbage for the end.)
    """
    try:
        import lzma
    except ImportError:
        raise UserError(f"{path}: this Python was built without lzma; unpack it: xz -d") from None
    try:
        with open(path, "rb") as file:
            while True:
                stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
                while not stream.eof:
                    packed = file.read(PACKED_BYTES) if stream.needs_input else b""
                    if stream.needs_input and not packed:
                        raise OSError("Truncated compressed stream")
                    yield stream.decompress(packed, BATCH_BYTES)
                file.seek(-len(stream.unused_data), os.SEEK_CUR)
                while (word := file.read(4)) == bytes(4):
                    pass
                if word.startswith(b"\0"):
                    raise OSError("NUL bytes behind a stream, not a multiple of 4")
                if not word:
                    return
                file.seek(-len(word), os.SEEK_CUR)
    except lzma.LZMAError as error:
        raise OSError(f"xz decompress failed: {error}") from None


def _unpack_zstd(path: str) -> Generator[bytes, None, None]:
    """The content of a zstd file, by the program zstd, since pyarrow refuses a long window."""
    command, pipe = ["zstd", "-dcq", "--long=31"], subprocess.PIPE
    with (
        open(path, "rb") as file,
        subprocess.Popen(command, stdin=file, stdout=pipe, stderr=pipe) as process,
    ):
        try:
            while block := process.stdout.read(PACKED_BYTES):
                yield block
            if code := process.wait():
                reason = process.stderr.read().decode(errors="replace").strip()
                raise OSError(f"zstd ends with code {code}: {reason}")
        finally:
            process.kill()


def _damage(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    if LONG_WINDOW in reason:
        return (
            "a zstd stream with a window above 128 MiB; put the program zstd on the PATH, or pack"
            " it anew: zstd -dc --long=31 OLD.zst | zstd -o NEW.zst"
        )
    return f"can't be read, cut short or damaged: {reason}"
