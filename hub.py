"""Sources on the Hugging Face Hub: hf://datasets/OWNER/NAME[@REVISION][/PATH].

`download` needs the network and the package huggingface_hub; all else is offline, from what it left
in `data.raw_dir`. There OWNER/NAME[@REVISION] is a directory with the hub's files and a listing. It
holds one commit, the one that REVISION was when it was first asked for, so that data never changes
below a project; remove the directory to fetch a newer one. The listing names a source only once all
its files are there, so what an interrupted download left is not taken for data.

PATH is a file, a glob (`**` for folders of any depth), a folder or nothing. A file, and what a glob
matches, is taken as it is. Of a folder, or of the whole repository, data files are taken; if
`data.sources` names it, each goes to the split that its own name or folder tells, as the hub has it
(`train-00000-of-00002.parquet`, `validation/…`).
"""

# Files are fetched here and not by huggingface_hub's own functions: these throw away a file that
# was cut short, and keep caches and logs in the home directory, which on a cluster is small.

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from tqdm import tqdm

from config import (
    ConfigError,
    DataConfig,
    UserError,
    resolve_path,
    sync_directory,
    write_atomically,
)

FORM = "hf://datasets/OWNER/NAME[@REVISION][/PATH]"
EXAMPLE = "hf://datasets/Salesforce/wikitext/wikitext-103-raw-v1"
NAME = r"\w[\w.-]*"
SOURCE = re.compile(
    rf"hf://datasets/({NAME}/{NAME}|{NAME}(?=@|$))"
    r"(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?",
    re.ASCII,
)
LISTING = ".listing.json"
SILENCE_SECONDS = 30  # after which the hub counts as out of reach
FORMATS = {".parquet": "Parquet", ".csv": "CSV", ".json": "JSON", ".jsonl": "JSON", ".txt": "text"}
COMPRESSIONS = (".gz", ".zst", ".bz2")
NOT_DATA = ("README.md", "dataset_infos.json")  # the hub's own, beside hidden ones
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})(?![a-z])", re.IGNORECASE)


class Source(NamedTuple):
    """What an hf:// string says, and the directory of its repository here."""

    text: str
    dataset: str
    revision: str | None
    path: str
    directory: Path


class File(NamedTuple):
    """A file on the hub; `digest` is its SHA-256, or that of a git blob (SHA-1) for small ones."""

    path: str
    bytes: int
    digest: str


class Listing(NamedTuple):
    """What a directory holds: bytes of each file, and the files of each PATH that is whole."""

    commit: str
    files: dict[str, int]
    paths: dict[str, list[str]]


def local_sources(data: DataConfig) -> DataConfig:
    """The configuration with each hf:// source replaced by its files here, in their splits.

    A split that has sources of its own takes nothing from folders in `data.sources`; this is said.

    Raises:
        UserError: not downloaded, a file that is missing or cut, a folder with nothing to train on.
    """
    if not _hub_sources(data):
        return data
    own = {"val": data.val_sources, "test": data.test_sources}
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for text in data.sources:
        for split, names in _by_split(text, data).items():
            if split == "train" or not own[split]:
                found[split] += names
            elif names:
                _say(f"{text}: {len(names)} {split} file(s) left out for data.{split}_sources")
    for split, texts in own.items():
        found[split] += [name for text in texts for name in _local_files(text, data)]
    return dataclasses.replace(
        data, sources=found["train"], val_sources=found["val"], test_sources=found["test"]
    )


def commits(data: DataConfig) -> dict[str, str]:
    """The commit of each hf:// source; UserError if one is not downloaded."""
    return {source.text: _whole(source).commit for source in _hub_sources(data)}


def download(data: DataConfig) -> None:
    """Fetches what is not here yet of every hf:// source, and says what is where.

    Raises:
        UserError: no huggingface_hub, no network, no such dataset, revision or file, no right to
            it, files that hold no data or several formats, a disk that is full.
    """
    sources = _hub_sources(data)
    if not sources:
        _say("no hf:// sources in data.sources, val_sources or test_sources: nothing to download")
    for source in sources:
        if _problem(source) is None:
            _report(source, "up to date")
        else:
            _fetch_source(source)
            _report(source, "downloaded")


def _hub_sources(data: DataConfig) -> list[Source]:
    texts = [*data.sources, *data.val_sources, *data.test_sources]
    return [_parse(text, data) for text in dict.fromkeys(texts) if text.startswith("hf://")]


def _parse(text: str, data: DataConfig) -> Source:
    match = SOURCE.fullmatch(text)
    path = (match[3] or "").rstrip("/") if match else ""
    if not match or (path and not _is_safe(path)):
        raise ConfigError(f"{text}: not of the form {FORM}, such as {EXAMPLE}")
    revision = unquote(match[2]) if match[2] else None
    name = match[1] + (f"@{quote(revision, safe='')}" if revision else "")
    return Source(text, match[1], revision, path, resolve_path(data.raw_dir) / name)


def _is_safe(path: str) -> bool:
    """Whether a path of the hub's stays below a directory and means itself as a configured path."""
    plain = path.isprintable() and not set("\\$") & set(path) and path != LISTING
    return plain and not {"", ".", ".."} & set(path.split("/"))


def _by_split(text: str, data: DataConfig) -> dict[str, list[str]]:
    """The local files of an entry of data.sources; a folder of the hub's may hold three splits."""
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    if not text.startswith("hf://"):
        found["train"] = [text]
        return found
    source = _parse(text, data)
    for path in _whole(source).paths[source.path]:
        split = _named_split(path, source) if _is_folder(path, source) else "train"
        found[split].append(str(source.directory / path))
    if not found["train"]:
        raise UserError(f"{text}: all its files are named as val or test data; name them by a glob")
    return found


def _local_files(text: str, data: DataConfig) -> list[str]:
    if not text.startswith("hf://"):
        return [text]
    source = _parse(text, data)
    return [str(source.directory / path) for path in _whole(source).paths[source.path]]


def _is_folder(path: str, source: Source) -> bool:
    """Whether a source takes a file because it lies in the folder that the source names."""
    return path != source.path and not has_magic(source.path)


def _named_split(path: str, source: Source) -> str:
    """The split that a file's name tells, or else its innermost folder below the source's."""
    below = path.removeprefix(source.path).split("/")
    found = next(filter(None, map(SPLIT_WORD.search, reversed(below))), None)
    return SPLIT_WORDS[found[1].lower()] if found else "train"


def _whole(source: Source) -> Listing:
    """The listing of a source that is here as a whole; UserError tells what is not."""
    if problem := _problem(source):
        raise UserError(f"{source.text}: {problem}")
    listing = _read_listing(source.directory)
    assert listing is not None
    return listing


def _problem(source: Source) -> str | None:
    """Why a source is not whole; None if it is."""
    listing = _read_listing(source.directory)
    if listing is None or source.path not in listing.paths:
        return "not downloaded yet; on a machine with network: python prepare.py CONFIG --download"
    for name in listing.paths[source.path]:
        path = source.directory / name
        if _size(path) != listing.files[name]:
            return f"{path} is missing or has another size; run python prepare.py CONFIG --download"
    return None


def _read_listing(directory: Path) -> Listing | None:
    path = directory / LISTING
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        listing = Listing(values["commit"], dict(values["files"]), dict(values["paths"]))
        names = {name for names in listing.paths.values() for name in names}
        if names - set(listing.files) or not all(map(_is_safe, names)):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: not what --download writes; remove {directory} and download again"
        ) from None
    return listing


def _write_listing(directory: Path, listing: Listing) -> None:
    write_atomically(directory / LISTING, json.dumps(listing._asdict(), indent=1).encode())


def _size(path: Path) -> int:
    """Bytes of a file; -1: there is none."""
    return path.stat().st_size if path.is_file() else -1


def _report(source: Source, done: str) -> None:
    listing = _whole(source)
    names = listing.paths[source.path]
    size = sum(listing.files[name] for name in names)
    splits = Counter(_named_split(name, source) for name in names)
    named = f" ({', '.join(f'{n} {split}' for split, n in splits.items())})" * (len(splits) > 1)
    _say(
        f"{source.text}: {done}, {len(names)} file(s){named}, {size:,} bytes, commit"
        f" {listing.commit[:12]}, in {source.directory} (remove it to fetch a newer commit)"
    )
    if named and has_magic(source.path):
        _say("  a glob takes all that it matches; name the folder to keep its splits apart")


def _say(text: str) -> None:
    print(text, flush=True)


def _fetch_source(source: Source) -> None:
    """Brings a source here; what is here already of the same commit stays."""
    # Telemetry would write a file into the home directory.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError(
            f"{source.text}: the package huggingface_hub is missing: pip install huggingface_hub"
            " (or, in the repository, pip install '.[hub]')"
        ) from None
    listing = _read_listing(source.directory)
    with _hub_errors(source, listing):
        commit, there = _list_hub(source, listing)
        files = _select(source, there)
        source.directory.mkdir(parents=True, exist_ok=True)
        listing = listing or Listing(commit, {}, {})
        _write_listing(source.directory, listing)  # an interrupted run goes on with this commit
        todo = [f for f in files if listing.files.get(f.path) != f.bytes or not _is_here(f, source)]
        missing = sum(_missing(f, source) for f in todo)
        free = shutil.disk_usage(source.directory).free
        if missing > free:
            raise UserError(
                f"{source.text}: {missing:,} bytes to fetch, {free:,} free in {source.directory};"
                " make room or set data.raw_dir"
            )
        with tqdm(total=missing, unit="B", unit_scale=True, disable=None) as bar:
            for file in todo:
                _fetch(file, source, commit, bar)
        listing.files.update({file.path: file.bytes for file in files})
        listing.paths[source.path] = [file.path for file in files]
        _write_listing(source.directory, listing)


def _list_hub(source: Source, listing: Listing | None) -> tuple[str, list[File]]:
    """The commit of the directory, else of the revision, and the files that it has on the hub."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.hf_api import RepoFile

    api, revision = HfApi(), listing.commit if listing else source.revision
    try:
        info = api.dataset_info(source.dataset, revision=revision, timeout=SILENCE_SECONDS)
        commit = str(info.sha)
        tree = api.list_repo_tree(
            source.dataset, repo_type="dataset", revision=commit, recursive=True
        )
        files = [
            File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in tree
            if isinstance(entry, RepoFile)
        ]
    except HFValidationError:
        raise UserError(f"{source.text}: {source.dataset} is no name that the hub allows") from None
    except (ValueError, TypeError, KeyError):  # such as a page that asks for a login
        raise UserError(
            f"{source.text}: {constants.ENDPOINT} does not answer as a hub does; is HF_ENDPOINT"
            " right?"
        ) from None
    return commit, sorted(files)


def _select(source: Source, files: list[File]) -> list[File]:
    """The files that a source means, in order of their paths."""
    named = [file for file in files if file.path == source.path]
    chosen = named or [file for file in files if _matches(file.path, source.path)]
    for file in chosen:
        if not _is_safe(file.path):
            raise UserError(f"{source.text}: refused, a file on the hub is named {file.path!r}")
    if not chosen:
        paths = {file.path for file in files if not _is_hidden(file.path)}
        paths |= {str(folder) for path in paths for folder in Path(path).parents} - {"."}
        near = difflib.get_close_matches(source.path, sorted(paths), n=1, cutoff=0.3)
        there = near[0] if near else ", ".join(sorted({p.split("/")[0] for p in paths})[:8])
        known = " ".join(FORMATS)
        raise UserError(
            f"{source.text}: no such file, nor data ({known}) below it; there is: {there}"
        )
    formats = Counter(FORMATS[_suffix(f.path)] for f in chosen if _is_folder(f.path, source))
    if len(formats) > 1:
        held = ", ".join(f"{count} {format}" for format, count in sorted(formats.items()))
        raise UserError(
            f"{source.text}: holds several formats ({held} files); name one by a glob, such as"
            f" {source.text.rstrip('/')}/**/*{_suffix(chosen[0].path)}*"
        )
    return chosen


def _matches(path: str, pattern: str) -> bool:
    """Whether a glob or folder takes a file: it matches it, or a folder above and it is data."""
    parts, patterns = path.split("/"), pattern.split("/") if pattern else []
    if _is_hidden(path) or parts[-1] in NOT_DATA:
        return False
    if _parts_match(parts, patterns):
        return True
    above = any(_parts_match(parts[:count], patterns) for count in range(len(parts)))
    return above and _suffix(path) in FORMATS


def _parts_match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_parts_match(parts[start:], patterns[1:]) for start in range(len(parts) + 1))
    if not parts or not fnmatchcase(parts[0], patterns[0]):
        return False
    return _parts_match(parts[1:], patterns[1:])


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") and part.strip(".") for part in path.split("/"))


def _suffix(path: str) -> str:
    """The suffix that tells the format."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def _part(file: File, source: Source) -> Path:
    """Where a file grows until it is whole."""
    path = source.directory / file.path
    return path.with_name(f".{path.name}.part")


def _is_here(file: File, source: Source) -> bool:
    return _size(source.directory / file.path) == file.bytes


def _missing(file: File, source: Source) -> int:
    """Bytes still to fetch."""
    here = file.bytes if _is_here(file, source) else _size(_part(file, source))
    return file.bytes - max(0, here)


def _fetch(file: File, source: Source, commit: str, bar: tqdm) -> None:
    """Brings a file here from where it stands, and proves its bytes before it gets its name."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    path, part = source.directory / file.path, _part(file, source)
    if _is_here(file, source) and _digest(path, file) == file.digest:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    while (start := _size(part)) < file.bytes:
        try:
            _append(part, file, source, commit, bar)
        except HTTPError as error:  # a connection that broke is tried again while it brings bytes
            if isinstance(error, HfHubHTTPError) or _size(part) <= start:
                raise
        if _size(part) <= start:
            raise UserError(f"{source.text}: the hub sent nothing of {file.path}; try again later")
    if _digest(part, file) != file.digest:
        part.unlink()
        raise UserError(
            f"{source.text}: {file.path} arrived with other bytes than the hub lists; download it"
            " again"
        )
    part.replace(path)
    sync_directory(path.parent)


def _append(part: Path, file: File, source: Source, commit: str, bar: tqdm) -> None:
    """One request for what a file lacks."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(source.dataset, file.path, repo_type="dataset", revision=commit)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start := _size(part):
        headers["Range"] = f"bytes={start}-"
    request = http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=SILENCE_SECONDS,
        retry_on_exceptions=(),
        retry_on_status_codes=(408, 429),
    )
    with request as response, open(part, "ab") as out:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # the whole file comes again
            out.truncate(0)
            bar.update(-start)
        for block in response.iter_bytes():
            out.write(block)
            bar.update(len(block))
        out.flush()
        os.fsync(out.fileno())


def _digest(path: Path, file: File) -> str:
    """The digest of a local file, of the kind that the hub gives for it."""
    git = len(file.digest) == 40
    digest = hashlib.sha1(usedforsecurity=False) if git else hashlib.sha256()
    if git:
        digest.update(f"blob {file.bytes}\0".encode())
    with open(path, "rb", buffering=0) as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _hub_errors(source: Source, listing: Listing | None) -> Iterator[None]:
    """What goes wrong between here and the hub, as a UserError."""
    from huggingface_hub import constants, errors, get_token

    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/datasets/{source.dataset}"
    log_in = "`hf auth login` or set HF_TOKEN"
    unknown = f"no dataset {source.dataset} on {hub}, or a private one: mend the name, or {log_in}"
    try:
        yield
        return
    except errors.OfflineModeIsEnabled:
        message = "HF_HUB_OFFLINE is set; unset it where there is network"
    except errors.GatedRepoError:
        message = f"gated; accept its terms at {page}, then {log_in}"
    except errors.RepositoryNotFoundError:
        message = unknown
    except errors.RevisionNotFoundError:
        message = f"no revision {source.revision}; {page}/tree/main shows what there is"
        if listing:
            message = f"commit {listing.commit} is gone from the hub; remove {source.directory}"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        message = f"{hub} answers with HTTP error {status}; try again later"
        if status in (401, 403):
            message = f"{hub} refuses your token (HTTP {status}); {log_in} of one that may read"
        if status == 401 and not get_token():
            message = unknown
    except errors.HTTPError as error:
        message = (
            f"can't reach {hub} ({str(error) or type(error).__name__}); compute nodes often have no"
            " network: run it on a login node"
        )
    except OSError as error:
        message = f"can't write {error.filename or source.directory}: {error.strerror or error}"
    raise UserError(f"{source.text}: {message}") from None
