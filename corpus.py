"""Raw sources to documents: text, CSV, JSON lines, Parquet, python-stdlib. It knows no tokens.

The unit of work is a *part*, a pure function of the sources' names and sizes, so that any number
of processes reads the same documents in the same order. Reading streams: memory is bounded by a
batch and the largest document. What a document's text is, by `data.document`:

    row         the text column of one row
    file        the whole file
    line        a line without its newline
    blank_line  the lines between blank ones, without the last newline
    {starts=…}  from a line that the regex matches (at its start) to the next one, newlines kept

Text stands as in the source, byte for byte (but python-stdlib is read as Python reads it, CRLF a
newline). For all rules but `row`, a table's rows are lines of one larger text, a newline added
where a row lacks it. A null is an empty text; an empty text is a document, the caller may drop it.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from config import ROOT, ConfigError, DataConfig, UserError, resolve_path

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TABLES = {".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".parquet": "parquet"}
TEXTS = ".txt .text .md .rst .tex .html .py .c .h .cpp .java .js .rs .go".split()
STDLIB = "python-stdlib"
STDLIB_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
MIN_PART_BYTES, MAX_PARTS = 1_000_000, 1024  # the default part: small corpora still feed all cores
BATCH_BYTES = 4_000_000  # of a Parquet column, decoded at a time
TABLE_LINE_FACTOR = 8  # JSON may take six bytes for one of text, and a line has other fields


class Source(NamedTuple):
    """A file, or what starts in it from `start` to `stop` (bytes; row groups of Parquet)."""

    name: str
    path: str
    format: str  # text, python, csv, jsonl or parquet
    bytes: int
    split: str | None  # None: its documents are split by their content
    start: int = 0
    stop: int | None = None


class Part(NamedTuple):
    """A unit of work: sources, or pieces of them, of one split."""

    index: int
    split: str | None
    pieces: list[Source]

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)


class Document(NamedTuple):
    """A text and where it starts: a line or row from 1, counted from byte `start` of the file."""

    text: str
    file: str
    row: int
    start: int = 0

    def place(self) -> str:
        """`file, row N` for messages, N counted from the file's beginning; N = 0: the file."""
        row = self.row
        if self.start:  # lines are counted only now: a corpus without a mistake needs no count
            row += 1  # the one that the byte before `start` belongs to
            with open(self.file, "rb") as lines:
                for at in range(0, self.start - 1, BATCH_BYTES):
                    row += lines.read(min(BATCH_BYTES, self.start - 1 - at)).count(b"\n")
        return f"{self.file}, row {row}" if row else self.file


def describe_sources(data: DataConfig) -> list[Source]:
    """All source files in the order in which they are read, each once.

    Raises:
        UserError: a missing file, a glob or directory without files, a file in two splits.
    """
    found: dict[str, Source] = {}
    named = ((None, data.sources), ("val", data.val_sources), ("test", data.test_sources))
    for split, names in named:
        for source in (source for name in names for source in _expand(name, split)):
            if found.setdefault(source.path, source).split != split:
                raise UserError(f"{source.path} is in the sources of two splits; name it in one")
    return list(found.values())


def plan(data: DataConfig) -> list[Part]:
    """The parts of the corpus, from its sources' names and sizes alone, in the order of reading.

    Raises:
        UserError: as `describe_sources`; a rule that a format can't follow; a damaged Parquet file.
    """
    _boundary(data.document)
    sources = describe_sources(data)
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


def read(part: Part, data: DataConfig) -> Iterator[Document]:
    """The documents that start in the part, in order.

    Raises:
        UserError: names file and row: unreadable or damaged, no such column, a column that is not
            text, not UTF-8 (unless data.errors is replace), above data.max_document_bytes.
    """
    for piece in part.pieces:
        yield from Reader(piece, data).documents()


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


def _expand(name: str, split: str | None) -> Iterator[Source]:
    """The files of one entry of the sources; below a directory, those of a known suffix."""
    stdlib = name == STDLIB
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib else resolve_path(name)
    paths = [root]
    if not root.exists() and glob.has_magic(name):
        paths = [Path(path) for path in sorted(glob.glob(str(root), recursive=True))]
    elif not root.exists():
        siblings = os.listdir(root.parent) if root.parent.is_dir() else []
        near = difflib.get_close_matches(root.name, siblings, n=1)
        raise UserError(f"{root}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    known = [".py"] if stdlib else [*TEXTS, *TABLES]
    files: list[Path] = []
    for path in paths:
        below = _walk(path, STDLIB_SKIPPED if stdlib else set()) if path.is_dir() else [path]
        files += [file for file in below if file == path or _suffixes(str(file))[0] in known]
    if not files:
        raise UserError(f"{root}: no file to read here ({' '.join(known)}; also .gz and .zst)")
    for path in files:
        base, prefix = (root, f"{STDLIB}/") if stdlib else (ROOT, "")
        label = path.relative_to(base) if path.is_relative_to(base) else path
        format = "python" if stdlib else TABLES.get(_suffixes(str(path))[0], "text")
        try:
            size = path.stat().st_size
        except OSError as error:  # a link that leads nowhere
            raise UserError(f"{path}: {error.strerror}") from None
        yield Source(prefix + label.as_posix(), str(path), format, size, split)


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    """Files below a directory by their relative names, hidden ones left out."""

    def refuse(error: OSError) -> NoReturn:  # by default os.walk leaves out what it can't read
        raise UserError(f"{error.filename}: {error.strerror}")

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _suffixes(path: str) -> tuple[str, str | None]:
    """The suffix that tells the format, and the compression if there is one."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    return os.path.splitext(stem)[1] if compression else suffix, compression


def _rule(format: str, data: DataConfig) -> str | dict:
    automatic = "file" if format in ("text", "python") else "row"
    return automatic if data.document == "auto" else data.document


def _cut(source: Source, target: int, data: DataConfig) -> Iterator[Source]:
    """The pieces of a source: of about `target` bytes where its format can be cut, else one."""
    rule = _rule(source.format, data)
    if rule == "row" and source.format in ("text", "python"):
        raise ConfigError(f"data.document = row is for tables, but {source.path} is text")
    whole = rule == "file" or source.format in ("csv", "python") or _suffixes(source.path)[1]
    if whole or source.bytes <= target:
        yield source
    elif source.format == "parquet":
        with _open_parquet(source.path) as file:
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        start, size, scale = 0, 0, source.bytes / max(1, sum(sizes))
        for stop, group in enumerate(sizes, 1):
            size += int(group * scale)
            if size >= target or stop == len(sizes):
                yield source._replace(bytes=size, start=start, stop=stop)
                start, size = stop, 0
    else:
        count = -(-source.bytes // target)
        edges = [source.bytes * i // count for i in range(count + 1)]
        for start, stop in itertools.pairwise(edges):
            yield source._replace(bytes=stop - start, start=start, stop=stop)


class Reader:
    """Reads one piece; `row` is where it stands, so that whatever goes wrong can be placed.

    Each format yields (position, text); a position is in the unit of the piece's start and stop.
    """

    def __init__(self, piece: Source, data: DataConfig):
        self.piece, self.data, self.row = piece, data, 0
        self.rule, self.limit = _rule(piece.format, data), data.max_document_bytes
        self.is_text = piece.format in ("text", "python")
        self.origin = piece.start if piece.format in ("text", "jsonl") else 0  # rows count from it

    def documents(self) -> Iterator[Document]:
        """The documents that start in the piece; UserError with file and row where it fails."""
        try:
            for row, units in self.groups():
                text = "".join(units)
                if self.rule in ("line", "blank_line"):
                    text = _without_newline(text)
                elif isinstance(self.rule, dict) and not text.strip():
                    continue  # blank lines before the first match
                if len(text.encode()) > self.limit:
                    raise self.too_large(row)
                yield Document(text, self.piece.path, row, self.origin)
        except UnicodeError as error:  # bytes, or half of a surrogate pair from JSON's escapes
            self.row += error.object.count(b"\n", 0, error.start) if self.is_text else 0
            bad = error.object[error.start : error.start + 1]
            raise self.error(f"not UTF-8 ({bad!a}); data.errors = replace puts U+FFFD") from None
        except csv.Error as error:
            raise self.error(f"not CSV ({error})") from None
        except (OSError, SyntaxError, pa.ArrowException) as error:
            raise self.error(_damage(error)) from None

    def groups(self) -> Iterator[tuple[int, list[str]]]:
        """Runs of units, each from a boundary inside the piece to the next, which may lie beyond.

        What comes before a file's first boundary is a run of its first piece. Whether a unit is a
        boundary depends on that unit alone, so neighbouring pieces agree on who owns a run.
        """
        is_boundary = _boundary(self.rule)
        owned, first, units, size = self.piece.start == 0, 1, [], 0
        for text, inside in self.units():
            if is_boundary(text):
                if units:
                    yield first, units
                owned, units, size = inside, [], 0
                if inside and self.rule == "blank_line":
                    continue
            if owned:
                first = first if units else self.row
                units.append(text)
                size += len(text)
                if size > self.limit + 2:  # characters, and a newline that may go
                    raise self.too_large(first)
            elif not inside:
                return
        if units or self.rule == "file":
            yield first, units

    def units(self) -> Iterator[tuple[str, bool]]:
        """Rows for the rule `row`, else lines, each with whether it starts inside the piece."""
        formats = {"csv": self.csv_rows, "jsonl": self.json_rows, "parquet": self.parquet_rows}
        for position, text in formats.get(self.piece.format, self.lines)():
            inside = self.piece.stop is None or position < self.piece.stop
            if self.is_text or self.rule == "row":
                yield text, inside
            else:
                for line in io.StringIO(text if text.endswith("\n") else text + "\n"):
                    yield line, inside

    def lines(self) -> Iterator[tuple[int, str]]:
        """Lines with their newlines, by the byte where they start; for `file`, a text is one."""
        limit = self.limit + 2 if self.is_text else TABLE_LINE_FACTOR * self.limit
        self.row = 1
        with self.open() as file:
            take = file.read if self.is_text and self.rule == "file" else file.readline
            if self.piece.start:  # the line that the byte before it belongs to is another piece's
                file.seek(self.piece.start - 1)
                while (tail := file.readline(BATCH_BYTES)) and not tail.endswith(b"\n"):
                    pass
            position = file.tell() if self.piece.start else 0
            while raw := take(limit + 1):
                if len(raw) > limit:
                    raise self.too_large(self.row)
                yield position, raw.decode("utf-8", self.data.errors)
                position += len(raw)
                self.row += 1

    def json_rows(self) -> Iterator[tuple[int, str]]:
        """A JSON object a line; blank lines are none."""
        column = self.data.text_column
        for position, line in self.lines():
            if not line.strip():
                continue
            try:
                values = json.loads(line.removeprefix("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise self.error(f"not JSON ({error}); one object a line") from None
            if not isinstance(values, dict):
                raise self.error('not a JSON object; each line is one, such as {"text": "…"}')
            self.check_column(values)
            text = "" if values[column] is None else values[column]
            if not isinstance(text, str):
                raise self.error(f"{column!r} is {type(text).__name__}, not text")
            if self.data.errors == "replace":
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            text.encode()  # raises for half of a surrogate pair
            yield position, text

    def csv_rows(self) -> Iterator[tuple[int, str]]:
        """Records below a header of names, numbered from 1; quoted newlines are kept."""
        csv.field_size_limit(self.limit)
        limit, errors = TABLE_LINE_FACTOR * self.limit, self.data.errors
        with self.open() as file:
            lines = (raw.decode("utf-8", errors) for raw in iter(lambda: file.readline(limit), b""))
            rows = filter(None, csv.reader(lines, strict=True))  # an empty line is no record
            names = next(rows, None)
            if names is None:
                raise self.error("empty: a CSV file starts with a header of column names")
            names[0] = names[0].removeprefix("\ufeff")
            self.check_column(names)
            index = names.index(self.data.text_column)
            self.row = 1
            for values in rows:
                if len(values) != len(names):
                    raise self.error(f"has {len(values)} fields, the header {len(names)}")
                yield 0, values[index]
                self.row += 1

    def parquet_rows(self) -> Iterator[tuple[int, str]]:
        """Rows from the piece's first row group on, a batch at a time."""
        with _open_parquet(self.piece.path) as file:
            column = self.data.text_column
            self.check_column(file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if kind not in (pa.string(), pa.large_string()):
                raise self.error(f"column {column!r} is {kind}, not text; set data.text_column")
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            self.row = 1 + sum(group.num_rows for group in groups[: self.piece.start])
            stop = self.piece.stop if self.rule in ("row", "line") else None  # what may cross it
            for i, group in [*enumerate(groups)][self.piece.start : stop]:
                size = max(1, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size))
                for batch in file.iter_batches(size, [i], [column], use_threads=False):
                    # As bytes, so that text which is not UTF-8 is found here, with its row.
                    for raw in batch.column(0).cast(pa.large_binary()).to_pylist():
                        yield i, (raw or b"").decode("utf-8", self.data.errors)
                        self.row += 1

    def open(self) -> BinaryIO:
        """The file's bytes, without compression; Python as UTF-8, whatever it is written in."""
        path = self.piece.path
        if self.piece.format == "python":
            with tokenize.open(path) as file:
                return io.BytesIO(file.read().encode())
        if compression := _suffixes(path)[1]:
            return io.BufferedReader(pa.input_stream(path, compression=compression))
        return open(path, "rb")

    def check_column(self, names: Iterable[str]) -> None:
        if (column := self.data.text_column) not in names:
            message = f"no column {column!r}; set data.text_column to one of: {', '.join(names)}"
            raise self.error(message)

    def too_large(self, row: int) -> UserError:
        self.row = row
        return self.error(
            f"a document above data.max_document_bytes ({self.limit:,}); raise it, or cut documents"
            " with data.document"
        )

    def error(self, message: str) -> UserError:
        here = Document("", self.piece.path, self.row, self.origin)
        return UserError(f"{here.place()}: {message}")


def _boundary(rule: str | dict) -> Callable[[str], bool]:
    """Tells whether a unit begins a document, or for blank_line ends one."""
    if isinstance(rule, dict):
        try:
            match = re.compile(rule["starts"]).match
        except re.error as error:
            raise ConfigError(f"data.document: {rule['starts']!r} is no regex: {error}") from None
        return lambda line: match(_without_newline(line)) is not None
    if rule == "blank_line":
        return lambda line: not line.strip()
    return lambda unit: rule != "file"


def _open_parquet(path: str) -> pq.ParquetFile:
    try:  # buffered and not ahead: memory stays small however large a row group is
        return pq.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: {_damage(error)}") from None


def _without_newline(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line


def _damage(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return f"can't be read, cut short or damaged: {reason}"
