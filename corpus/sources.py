"""The files that data.sources, val_sources and test_sources name, and what is beside them unread.

A file is what its device and inode say: names and links that lead to one file are one source.
"""

from __future__ import annotations

import difflib
import errno
import glob
import itertools
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, NoReturn

from config import ROOT, DataConfig, UserError, resolve_path, resolve_pattern

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
TABLES = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
TABLES |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "jsonl")
TEXTS = ".txt .text .md .rst .tex .html .py .c .h .cpp .java .js .rs .go".split()
STDLIB = "python-stdlib"
STDLIB_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
KINDS_TOLD = 6  # of files that are not read, in one line


class Source(NamedTuple):
    """A file, or what starts in it from `start` to `stop` (bytes; row groups of Parquet)."""

    name: str
    path: str
    format: str  # text, python, csv, tsv, jsonl or parquet
    bytes: int
    split: str | None  # None: its documents are split by their content
    start: int = 0
    stop: int | None = None


class Survey:
    """The files that the sources name, each once, and what a user may not expect of them.

    A file is what its device and inode say, whatever names and links lead to it; of its names the
    first of a known ending counts, else the first.

    Raises:
        UserError: a missing file, a glob or directory without files, a file in two splits, what is
            no file, what may not be read.
    """

    def __init__(self, data: DataConfig):
        self.files: dict[tuple[int, ...], Source] = {}
        self.unread: dict[str, str] = {}  # beside them, in directories and globs: path to kind
        self.links: dict[str, str] = {}  # a further name of what is read to its first one
        named = ((None, data.sources), ("val", data.val_sources), ("test", data.test_sources))
        for split, names in named:
            for name in names:
                self.add(name, split)
        # One that lies in a directory may be named, too, or read through a link.
        self.unread = {path: kind for path, kind in self.unread.items() if not self.is_read(path)}

    @property
    def sources(self) -> list[Source]:
        """In the order in which they are read."""
        return list(self.files.values())

    @property
    def not_read(self) -> dict[str, int]:
        """How many files of each ending, or other kind, are not read; the most frequent first."""
        return _count_kinds(self.unread)

    def remarks(self) -> list[str]:
        """What is not read, or read otherwise than it may be meant: lines for the user."""
        links = [(path, self.links.get(first, first)) for path, first in self.links.items()]
        unknown = [source.path for source in self.sources if not _is_known(source.path)]
        told = {
            "not read": describe_kinds(self.unread),
            "unknown ending, read as text": _several([_shown(path) for path in unknown]),
            "links to what is read already, left out": _several(
                [f"{_shown(path)} is {_shown(first)}" for path, first in links]
            ),
        }
        return [f"{what}: {text}" for what, text in told.items() if text]

    def add(self, name: str, split: str | None) -> None:
        """The files of one entry of the sources; below a directory, those of a known ending."""
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
                raise UserError(f"{path}: a {special}, not a file; write what it gives into one")
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
        """Takes a file, unless it is there already; a name that tells its format wins."""
        identity = _identity(status)
        first = self.files.setdefault(identity, source)
        if first.split != source.split:
            same = f" and {first.path} are one file, which" * (first.path != source.path)
            raise UserError(f"{source.path}{same} is in the sources of two splits; name it in one")
        if _is_known(source.path) and not _is_known(first.path):  # as of the hub's blobs
            del self.files[identity]  # the order is that of the names that count
            self.files[identity] = source
            self.links[first.path] = source.path
        elif os.path.abspath(first.path) != os.path.abspath(source.path):
            self.links[source.path] = first.path

    def is_read(self, path: str) -> bool:
        """Whether a path leads to a file that is taken."""
        try:
            return _identity(os.stat(path)) in self.files
        except OSError:  # a broken link
            return False

    def below(self, root: str, stdlib: bool) -> list[tuple[str, os.stat_result]]:
        """The files of known endings below a directory, by their names."""

        def refuse(error: OSError) -> NoReturn:
            raise UserError(f"{error.filename}: {error.strerror}")

        found, left = [], {}
        for _, entries in self.folders(root, refuse, STDLIB_SKIPPED if stdlib else ()):
            for entry in entries:
                if entry.name.endswith(".py") if stdlib else _is_known(entry.name):
                    status = _status(entry.path)
                    if special := _special(status):
                        left[entry.path] = special
                    else:
                        found.append((entry.path, status))
                else:
                    left[entry.path] = _kind(entry)
        if not stdlib:
            self.unread |= left
        return sorted(found)

    def folders(
        self, root: str, refuse: Callable[[OSError], object], skipped: Collection[str] = ()
    ) -> Iterator[tuple[str, list[os.DirEntry]]]:
        """A directory and those below it with the files in each; each once, wherever links lead."""
        folders, walked = [root], {os.path.realpath(root): root}
        for folder in folders:  # grows on the way
            files = []
            for entry in _entries(folder, refuse):
                if not _is_folder(entry):
                    files.append(entry)
                elif entry.name not in skipped:
                    first = walked.setdefault(os.path.realpath(entry.path), entry.path)
                    if first == entry.path:
                        folders.append(entry.path)
                    else:
                        self.links[entry.path] = first
            yield folder, files

    def match(self, pattern: str) -> list[str]:
        """The paths that a pattern matches, as in a shell; `**` means any number of directories.

        Python's own would go round in links, and leave out in silence what may not be opened.
        """

        def note(error: OSError) -> None:
            if isinstance(error, PermissionError):
                self.unread[error.filename] = "unreadable directory"
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # no match
                raise UserError(f"{error.filename}: {error.strerror}")

        root, *parts = Path(pattern).parts
        while parts[-1] == "**":  # a directory stands for all below it
            parts.pop()
        paths = [root]
        for part in parts:
            if part == "**":
                found = (folder for path in paths for folder, _ in self.folders(path, note))
            elif (plain := _literal(part)) is not None:
                found = (f for path in paths if _is_there(f := os.path.join(path, plain), note))
            else:
                hidden = part.startswith(".")
                entries = (entry for path in paths for entry in _entries(path, note, hidden))
                found = (entry.path for entry in entries if fnmatchcase(entry.name, part))
            paths = [*dict.fromkeys(found)]
        return sorted(paths)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from others."""
    # Size and time, since some network file systems use the number of an inode again.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _label(path: str) -> str:
    """A file's name for people and manifests: from the repository on, if it lies there."""
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else path


def _shown(path: str) -> str:
    """A file's name in a line for people."""
    return _printable(_label(path))


def _printable(name: str) -> str:
    """A name with escapes for what would break a line or can't be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _several(names: list[str]) -> str:
    """How many there are, and the first; nothing of nothing."""
    return f"{len(names):,} ({names[0]}{', …' if len(names) > 1 else ''})" if names else ""


def _count_kinds(unread: dict[str, str]) -> dict[str, int]:
    return dict(Counter(sorted(unread.values())).most_common())


def describe_kinds(unread: dict[str, str]) -> str:
    """How many files of each kind are not read, each with an example; nothing of nothing."""
    examples = {kind: path for path, kind in reversed(unread.items())}
    counts = [*_count_kinds(unread).items()]
    told = [
        f"{count:,} {kind} ({_shown(examples[kind])}{', …' if count > 1 else ''})"
        for kind, count in counts[:KINDS_TOLD]
    ]
    if rest := counts[KINDS_TOLD:]:
        told.append(f"{sum(count for _, count in rest):,} of {len(rest)} more kinds")
    return ", ".join(told)


def _status(path: str) -> os.stat_result:
    """What the system knows of a file; UserError says why there is none."""
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:  # a ValueError: NUL in a name
        raise UserError(_why_missing(path, error)) from None


def _why_missing(path: str, error: OSError | ValueError) -> str:
    parts = [*reversed(Path(path).parents), Path(path)]
    part = next((part for part in parts if not os.path.exists(part)), parts[-1])
    code = getattr(error, "errno", None)
    if code not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    if os.path.islink(part):
        end = os.path.realpath(part)
        where = "in a circle" if code == errno.ELOOP else f"to {end}, which does not exist"
        return f"{part}: a link that leads {where}"
    if code == errno.ENOTDIR:
        return f"{path}: {part.parent} is no directory"
    try:
        siblings = os.listdir(part.parent)
    except OSError:  # one may enter it, and not list it
        siblings = []
    there = [name for name in siblings if os.path.exists(part.parent / name)]
    near = difflib.get_close_matches(part.name, there, n=1)
    missing = f"; {part} is missing" * (part != Path(path))
    return f"{path}: no such file{missing}" + (f"; did you mean {near[0]}?" if near else "")


def _gap(pattern: str) -> str:
    """What is missing of a pattern's directories, if that is no pattern itself."""
    folder = next((p for p in reversed(Path(pattern).parents) if not os.path.exists(p)), None)
    return f"; {folder} is missing" if folder and not glob.has_magic(folder.name) else ""


def _special(status: os.stat_result) -> str:
    """What it is that is neither a file nor a directory; reading it may wait for ever."""
    kinds = {stat.S_IFREG: "", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(status.st_mode), "device")


def _kind(entry: os.DirEntry) -> str:
    """What a file in a directory is that is not read: its ending, if it is a file."""
    try:
        if not entry.is_file():
            return _special(entry.stat())
    except OSError:
        return "broken link"
    return ending(entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _is_there(path: str, refuse: Callable[[OSError], object]) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        refuse(error)
        return False
    return True


def _entries(
    folder: str, refuse: Callable[[OSError], object], hidden: bool = False
) -> list[os.DirEntry]:
    """What is in a directory, by name; hidden files only if asked for."""
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if hidden or not entry.name.startswith(".")]
    except OSError as error:
        refuse(error)
        return []
    return sorted(seen, key=lambda entry: entry.name)


def _literal(part: str) -> str | None:
    """The name that a part of a pattern means if it is one; resolve_pattern escapes names."""
    if glob.has_magic(re.sub(r"\[[*?[]\]", "", part)):
        return None
    return re.sub(r"\[([*?[])\]", r"\1", part)


def _is_known(path: str) -> bool:
    return suffixes(path)[0] in (*TEXTS, *TABLES)


def ending(path: str) -> str:
    """The ending of a file's name, for people."""
    return _printable("".join(suffixes(path))) or "without an ending"


def suffixes(path: str) -> tuple[str, str]:
    """The suffix that tells the format, and that of the compression; empty if there is none."""
    stem, suffix = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], suffix) if suffix in COMPRESSIONS else (suffix, "")
