"""Finds the files that data.sources, val_sources and test_sources name, and those left unread.

A file is identified by device and inode: all names and links that lead to it are one source.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import glob
import itertools
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from config import ROOT, DataConfig, UserError, resolve_path, resolve_pattern

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
TABLES = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
TABLES |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "jsonl")
TEXTS = ".txt .text .md .rst .tex .html .py .c .h .cpp .java .js .rs .go".split()
STDLIB = "python-stdlib"
STDLIB_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
KINDS_SHOWN = 6  # of unread files, in one line
NO_MATCH = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Source(NamedTuple):
    """A file, or the piece of it from `start` to `stop` (bytes; row groups of Parquet)."""

    name: str
    path: str
    format: str  # text, python, csv, tsv, jsonl or parquet
    bytes: int
    split: str | None  # None: each document's content decides
    start: int = 0
    stop: int | None = None


class Survey:
    """The files that the sources name, each once, and what a user may not expect of them.

    If a file has several names, the first with a known ending is used, else the first.

    Attributes:
        sources: in the order in which they are read.
        not_read: the number of other files in the same directories and globs, by their ending or
            other kind, the most frequent first.

    Raises:
        UserError: a missing file, a glob or directory without files, a file in two splits, a
            FIFO, socket or device, a file without read permission.
    """

    def __init__(self, data: DataConfig):
        self.files: dict[tuple[int, ...], Source] = {}
        self.unread: dict[str, str] = {}  # path to kind
        self.links: dict[str, str] = {}  # a file's or directory's other name to its first one
        named = {None: data.sources, "val": data.val_sources, "test": data.test_sources}
        for split, names in named.items():
            for name in names:
                self.add(name, split)
        # A file that one source leaves unread may be named by another, or read through a link.
        self.unread = {path: kind for path, kind in self.unread.items() if not self.is_read(path)}
        self.not_read = dict(_count_kinds(self.unread))
        self.sources = list(self.files.values())

    def remarks(self) -> list[str]:
        """Lines for the user: which files are not read, or not as one might expect."""
        links = [(path, self.links.get(first, first)) for path, first in self.links.items()]
        unknown = [_shown(file.path) for file in self.sources if not _is_known(file.path)]
        lines = {
            "not read": describe_kinds(self.unread),
            "unknown ending, read as text": _several(unknown),
            "links to what is read already, left out": _several(
                [f"{_shown(path)} is {_shown(first)}" for path, first in links]
            ),
        }
        return [f"{what}: {text}" for what, text in lines.items() if text]

    def add(self, name: str, split: str | None) -> None:
        """Adds the files of one entry of the sources; of a directory, those with a known ending."""
        stdlib = name == STDLIB
        root = sysconfig.get_paths()["stdlib"] if stdlib else str(resolve_path(name))
        is_glob = glob.has_magic(name) and not os.path.lexists(root)
        seen, found = len(self.unread), []
        paths = self.match(resolve_pattern(name)) if is_glob else [root]
        for path in paths:
            status = _status(path)
            if stat.S_ISDIR(status.st_mode):
                found += self.below(path, stdlib)
            elif not (special := _special(status)):
                found.append((path, status))
            elif is_glob:
                self.unread[path] = special
            else:
                raise UserError(f"{path}: a {special}, not a file; save its content to a file")
        if not found:
            endings = f"({' '.join([*TEXTS, *TABLES])}; also with {' '.join(COMPRESSIONS)})"
            what = f"no file to read here {endings}" if paths else f"matches nothing{_gap(root)}"
            beside = describe_kinds(dict(itertools.islice(self.unread.items(), seen, None)))
            raise UserError(f"{root}: {what}" + f", but {beside}" * bool(beside))
        for path, status in found:
            if not os.access(path, os.R_OK, effective_ids=True):
                raise UserError(f"{path}: can't be read: {os.strerror(errno.EACCES)}")
            label = f"{STDLIB}/{os.path.relpath(path, root)}" if stdlib else _label(path)
            suffix, compression = suffixes(path)
            format = "python" if stdlib else TABLES.get(suffix, "text")
            if compression and not status.st_size:
                raise UserError(f"{path}: cut short: 0 bytes, which no {compression} file has")
            self.take(Source(label, path, format, status.st_size, split), status)

    def take(self, source: Source, status: os.stat_result) -> None:
        """Adds a file once; a name whose ending tells the format replaces one that does not."""
        identity = _identity(status)
        first = self.files.setdefault(identity, source)
        if first.split != source.split:
            same = f" and {first.path} are one file, which" * (first.path != source.path)
            raise UserError(f"{source.path}{same} is in the sources of two splits; name it in one")
        if _is_known(source.path) and not _is_known(first.path):  # a blob of the hub's cache
            del self.files[identity]  # files are read in the order of the names that are used
            self.files[identity] = source
            self.links[first.path] = source.path
        elif os.path.abspath(first.path) != os.path.abspath(source.path):
            self.links[source.path] = first.path

    def is_read(self, path: str) -> bool:
        """Whether a path leads to a source."""
        try:
            return _identity(os.stat(path)) in self.files
        except OSError:  # a broken link
            return False

    def below(self, root: str, stdlib: bool) -> list[tuple[str, os.stat_result]]:
        """The files with known endings below a directory, sorted by path; notes the others."""
        found, unread = [], {}
        skipped = STDLIB_SKIPPED if stdlib else ()
        for _, entries in self.folders(root, strict=True, skipped=skipped):
            for entry in entries:
                known = entry.name.endswith(".py") if stdlib else _is_known(entry.name)
                status = _status(entry.path) if known else None
                if kind := _special(status) if status else _kind(entry):
                    unread[entry.path] = kind
                else:
                    found.append((entry.path, status))
        if not stdlib:
            self.unread |= unread
        return sorted(found)

    def match(self, pattern: str) -> list[str]:
        """The paths that a pattern matches, as in a shell; `**` means any number of directories.

        Python's glob would follow links in circles, and ignore directories that it can't open.
        """
        root, *parts = Path(pattern).parts
        while parts[-1] == "**":  # a directory stands for all below it
            parts.pop()
        paths = [root]
        for part in parts:
            if part == "**":
                found = (folder for path in paths for folder, _ in self.folders(path))
            elif (plain := _literal(part)) is not None:
                joined = (os.path.join(path, plain) for path in paths)
                found = (path for path in joined if self.is_there(path))
            else:
                hidden = part.startswith(".")
                entries = (entry for path in paths for entry in self.entries(path, hidden=hidden))
                found = (entry.path for entry in entries if fnmatchcase(entry.name, part))
            paths = [*dict.fromkeys(found)]
        return sorted(paths)

    def folders(
        self, root: str, strict: bool = False, skipped: Collection[str] = ()
    ) -> Iterator[tuple[str, list[os.DirEntry]]]:
        """A directory and all below it, with the files in each; each once, wherever links lead."""
        folders, walked = [root], {os.path.realpath(root): root}
        for folder in folders:  # grows on the way
            files = []
            for entry in self.entries(folder, strict):
                if not _is_folder(entry):
                    files.append(entry)
                elif entry.name not in skipped:
                    first = walked.setdefault(os.path.realpath(entry.path), entry.path)
                    if first == entry.path:
                        folders.append(entry.path)
                    else:
                        self.links[entry.path] = first
            yield folder, files

    def entries(self, folder: str, strict: bool = False, hidden: bool = False) -> list[os.DirEntry]:
        """The content of a directory by name; hidden files only if asked for."""
        try:
            with os.scandir(folder) as entries:
                seen = [entry for entry in entries if hidden or not entry.name.startswith(".")]
        except OSError as error:
            self.note(error, strict)
            return []
        return sorted(seen, key=lambda entry: entry.name)

    def is_there(self, path: str) -> bool:
        """Whether a path that a pattern gives exists."""
        try:
            os.lstat(path)
        except OSError as error:
            self.note(error)
            return False
        return True

    def note(self, error: OSError, strict: bool = False) -> None:
        """UserError for a directory that can't be opened; if not `strict`, it counts as unread."""
        if isinstance(error, PermissionError) and not strict:
            self.unread[error.filename] = "unreadable directory"
        elif strict or error.errno not in NO_MATCH:
            raise UserError(f"{error.filename}: {error.strerror}")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What a file is known by; with size and time, since some file systems reuse inode numbers."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _label(path: str) -> str:
    """A file's name in manifests: relative to the repository if it lies there."""
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else path


def _shown(path: str) -> str:
    """A file's name in messages, with escapes for characters that break a line or don't print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in _label(path))


def _several(names: list[str]) -> str:
    """The number of names and the first one; empty for none."""
    return f"{len(names):,} ({names[0]}{', …' * (len(names) > 1)})" if names else ""


def _count_kinds(unread: dict[str, str]) -> list[tuple[str, int]]:
    return Counter(sorted(unread.values())).most_common()


def describe_kinds(unread: dict[str, str]) -> str:
    """The number of files of each kind, with an example; `unread` maps paths to kinds."""
    examples = {kind: path for path, kind in reversed(unread.items())}
    counts = _count_kinds(unread)
    lines = [
        f"{count:,} {kind} ({_shown(examples[kind])}{', …' * (count > 1)})"
        for kind, count in counts[:KINDS_SHOWN]
    ]
    if rest := counts[KINDS_SHOWN:]:
        lines.append(f"{sum(count for _, count in rest):,} of {len(rest)} more kinds")
    return ", ".join(lines)


def _status(path: str) -> os.stat_result:
    """The status of a file; UserError says why there is none."""
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:  # a ValueError: NUL in a name
        raise UserError(_why_missing(path, error)) from None


def _why_missing(path: str, error: OSError | ValueError) -> str:
    """A message that names the first part of a path that is missing or a broken link."""
    parts = [*reversed(Path(path).parents), Path(path)]
    part = next((part for part in parts if not os.path.exists(part)), parts[-1])
    code = getattr(error, "errno", None)
    if code not in NO_MATCH:
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    if os.path.islink(part):
        end = os.path.realpath(part)
        where = "in a circle" if code == errno.ELOOP else f"to {end}, which does not exist"
        return f"{part}: a link that leads {where}"
    if code == errno.ENOTDIR:
        return f"{path}: {part.parent} is no directory"
    siblings = []
    with contextlib.suppress(OSError):  # a directory that may be entered and not listed
        siblings = [name for name in os.listdir(part.parent) if os.path.exists(part.parent / name)]
    near = difflib.get_close_matches(part.name, siblings, n=1)
    missing = f"; {part} is missing" * (part != Path(path))
    return f"{path}: no such file{missing}" + (f"; did you mean {near[0]}?" if near else "")


def _gap(pattern: str) -> str:
    """Names the first directory of a pattern that is missing, unless it is a pattern itself."""
    folder = next((p for p in reversed(Path(pattern).parents) if not os.path.exists(p)), None)
    return f"; {folder} is missing" if folder and not glob.has_magic(folder.name) else ""


def _special(status: os.stat_result) -> str:
    """FIFO, socket or device, since reading one may wait for ever; empty for a regular file."""
    kinds = {stat.S_IFREG: "", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(status.st_mode), "device")


def _kind(entry: os.DirEntry) -> str:
    """The kind of an unread file: its ending, if it is a regular file."""
    try:
        return ending(entry.name) if entry.is_file() else _special(entry.stat())
    except OSError:
        return "broken link"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _literal(part: str) -> str | None:
    """The name that a part of a pattern means, without escapes; None if it is a pattern."""
    if glob.has_magic(re.sub(r"\[[*?[]\]", "", part)):
        return None
    return re.sub(r"\[([*?[])\]", r"\1", part)


def _is_known(path: str) -> bool:
    return suffixes(path)[0] in (*TEXTS, *TABLES)


def ending(path: str) -> str:
    """The ending of a file's name, for people."""
    return _shown("".join(suffixes(path))) or "without an ending"


def suffixes(path: str) -> tuple[str, str]:
    """The suffixes of the format and of the compression; empty where there is none."""
    stem, suffix = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], suffix) if suffix in COMPRESSIONS else (suffix, "")
