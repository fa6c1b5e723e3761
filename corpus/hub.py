"""Sources on the Hugging Face Hub: hf://datasets/OWNER/NAME[@REVISION][/PATH].

`download` needs the network and the package huggingface_hub. Everything else works offline, from
what `download` left in `data.raw_dir`: a directory OWNER/NAME[@REVISION] with files of the hub and
a listing. It holds one commit, the one that REVISION meant at the first download, so the data of a
project never changes; remove the directory to fetch a newer commit. The listing names a source only
once all its files are there, so an interrupted download is never taken for data.

PATH is a file, a glob (as on the hub, `*` matches `/` too), a folder or nothing. A file is taken
whatever it is, and so is what a glob matches. Of a folder, or of the whole repository, only data
files are taken; if `data.sources` names it, each goes to the split that its name or folder says, as
on the hub (`train-00000-of-00002.parquet`, `validation/…`).
"""

# The library only moves bytes here: its functions for whole files throw away a file that was cut
# short, and keep caches and logs in the home directory, which is small on a cluster.

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import shutil
from collections import Counter
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote

from config import (
    ConfigError,
    DataConfig,
    UserError,
    file_sha256,
    read_json,
    resolve_path,
    sync_directory,
    write_atomically,
)
from corpus.locks import locked
from corpus.sources import TABLES, describe_kinds, ending, suffixes

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

FORM = "hf://datasets/OWNER/NAME[@REVISION][/PATH]"
EXAMPLE = "hf://datasets/Salesforce/wikitext/wikitext-103-raw-v1"
SOURCE = re.compile(
    r"hf://datasets/(\w[\w.-]*/\w[\w.-]*)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?",
    re.ASCII,
)
LISTING = ".listing.json"
SUFFIXES = (*TABLES, ".txt")
NOT_DATA = ("README.md", "dataset_infos.json")  # the hub's own files, like hidden ones
SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev)"
    r"|(?P<test>test(?:ing)?|evaluation|eval))(?![a-z])",
    re.IGNORECASE,
)

_say = functools.partial(print, flush=True)


class Source(NamedTuple):
    """An hf:// string, taken apart, and the local directory of its repository."""

    text: str
    dataset: str
    revision: str | None
    path: str
    directory: Path


class Listing(NamedTuple):
    """What is in a directory: of each PATH that is complete, the files and their bytes."""

    commit: str
    paths: dict[str, dict[str, int]]


def local_sources(data: DataConfig) -> DataConfig:
    """The configuration with each hf:// source replaced by its local files, in their splits.

    A split with sources of its own takes nothing from folders in `data.sources`; a line says so.
    Raises UserError if a source is not downloaded, lacks a file or has nothing to train on.
    """
    if not _hub_sources(data):
        return data
    own = {"train": [], "val": data.val_sources, "test": data.test_sources}
    found = {
        split: [path for text in texts for _, path in _local_files(text, data)]
        for split, texts in own.items()
    }
    for text in data.sources:
        files = _local_files(text, data)
        splits = Counter(split for split, _ in files)
        if not splits["train"]:
            raise UserError(f"{text}: all its files are named as val or test data; use a glob")
        for split, path in files:
            found[split] += [path] * (not own[split])
        for split in filter(own.get, splits):
            _say(f"{text}: {splits[split]} {split} file(s) left out for data.{split}_sources")
    train, val, test = found.values()
    return dataclasses.replace(data, sources=train, val_sources=val, test_sources=test)


def commits(data: DataConfig) -> dict[str, str]:
    """The commit of each hf:// source; UserError if a source is not downloaded."""
    return {source.text: _whole(source).commit for source in _hub_sources(data)}


def download(data: DataConfig) -> None:
    """Fetches what is missing of every hf:// source, and prints what is where.

    Raises UserError: no huggingface_hub, no network, no such dataset, revision or file, no right to
    it, files without data or of several formats, a full disk.
    """
    sources = _hub_sources(data)
    if not sources:
        _say("no hf:// sources in data.sources, val_sources or test_sources: nothing to download")
    for source in sources:
        listing, problem = _look(source)
        if problem:
            _fetch(source, listing)
        _report(source, "downloaded" if problem else "up to date")


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
    """Whether a path on the hub stays below a directory, and means itself in a configuration."""
    plain = path.isprintable() and not set("\\$") & set(path) and path != LISTING
    return plain and not {"", ".", ".."} & set(path.split("/"))


def _local_files(text: str, data: DataConfig) -> list[tuple[str, str]]:
    """The local files of an entry of the sources, each with its split."""
    if not text.startswith("hf://"):
        return [("train", text)]
    source = _parse(text, data)
    return [
        ("train" if has_magic(source.path) else _split(path, source), str(source.directory / path))
        for path in _whole(source).paths[source.path]
    ]


def _split(path: str, source: Source) -> str:
    """The split that a file's name says, or else its innermost folder below the source's; train."""
    below = path.removeprefix(source.path).split("/")
    found = next(filter(None, map(SPLIT.search, reversed(below))), None)
    return str(found.lastgroup) if found else "train"


def _whole(source: Source) -> Listing:
    """The listing of a source that is complete; UserError says what is missing."""
    listing, problem = _look(source)
    if listing is None or problem:
        command = "python prepare.py CONFIG --download"
        raise UserError(f"{source.text}: {problem}; on a machine with network: {command}")
    return listing


def _look(source: Source) -> tuple[Listing | None, str]:
    """The listing of a source's directory, and what is missing of the source, if anything."""
    path = source.directory / LISTING
    try:
        if (values := read_json(path)) is None:
            return None, "not downloaded yet"
        listing = Listing(**values)
        sizes = [item for files in listing.paths.values() for item in files.items()]
        if not all(_is_safe(name) and isinstance(size, int) for name, size in sizes):
            raise ValueError
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        remedy = f"remove {source.directory} and download again"
        raise UserError(f"{path}: not what --download writes; {remedy}") from None
    if source.path not in listing.paths:
        return listing, "not downloaded yet"
    for name, size in listing.paths[source.path].items():
        if _size(source.directory / name) != size:
            return listing, f"{source.directory / name} is missing or has another size"
    return listing, ""


def _size(path: Path) -> int:
    """Bytes of a file; -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


def _report(source: Source, done: str) -> None:
    commit, paths = _whole(source)
    files = paths[source.path]
    splits = Counter(_split(name, source) for name in files)
    counts = ", ".join(f"{count} {split}" for split, count in splits.items())
    named = f" ({counts})" if len(splits) > 1 else ""
    _say(
        f"{source.text}: {done}, {len(files)} file(s){named}, {sum(files.values()):,} bytes, commit"
        f" {commit[:12]}, in {source.directory} (remove it to fetch a newer commit)"
    )
    if named and has_magic(source.path):
        _say("  a glob takes all that it matches; name the folder to keep its splits apart")


def _fetch(source: Source, listing: Listing | None) -> None:
    """Downloads what is missing of a source; if there is a listing, of its commit."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it writes into the home directory
    try:
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
    except ImportError:
        package = "the package huggingface_hub is missing; in the repository: pip install '.[hub]'"
        raise UserError(f"{source.text}: {package}") from None
    try:
        commit, there = _list_hub(source, listing)
        files = _select(source, there)
        source.directory.mkdir(parents=True, exist_ok=True)
        lock = source.directory / ".download.lock"
        with locked(lock, lambda holder: _say(f"{source.text}: waiting for {holder}")):
            if _look(source)[1]:  # else another process downloaded it while this one waited
                _fetch_files(source, commit, files)
    except (UserError, HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if message := _explain(error, source, listing):  # which does not name the source
            raise UserError(f"{source.text}: {message}") from None
        raise


def _fetch_files(source: Source, commit: str, files: list[RepoFile]) -> None:
    """Downloads the files that are missing, and names the source in the listing."""
    listing = _look(source)[0] or Listing(commit, {})
    if listing.commit != commit:
        raise UserError("its newest commit has changed; download it again")
    _write_listing(source, listing)  # so that an interrupted download continues with this commit
    missing = [file for file in files if _size(source.directory / file.path) != file.size]
    size = sum(file.size - max(0, _size(_part(source, file))) for file in missing)
    if size > (free := shutil.disk_usage(source.directory).free):
        room = f"{size:,} bytes to fetch, {free:,} free in {source.directory}"
        raise UserError(f"{room}; make room or set data.raw_dir")
    for file in missing:
        _fetch_file(source, commit, file)
    listing.paths[source.path] = {file.path: file.size for file in files}
    _write_listing(source, listing)


def _write_listing(source: Source, listing: Listing) -> None:
    write_atomically(source.directory / LISTING, json.dumps(listing._asdict(), indent=1).encode())


def _list_hub(source: Source, listing: Listing | None) -> tuple[str, list[RepoFile]]:
    """The commit of the listing, else of the revision, and its files on the hub, by path."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, revision = HfApi(), listing.commit if listing else source.revision
    commit = str(api.dataset_info(source.dataset, revision=revision, timeout=30).sha)
    tree = api.list_repo_tree(source.dataset, repo_type="dataset", revision=commit, recursive=True)
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    return commit, sorted(files, key=lambda file: file.path)


def _select(source: Source, files: list[RepoFile]) -> list[RepoFile]:
    """The files that a source means, by path; prints what else is in its folder."""
    seen = [file for file in files if not re.search(r"(^|/)\.[^./]", file.path)]  # not hidden
    data = [file for file in seen if file.path.split("/")[-1] not in NOT_DATA]
    left = {}
    chosen = [file for file in files if file.path == source.path]
    if not chosen and has_magic(source.path):
        chosen = [file for file in data if fnmatchcase(file.path, source.path)]
    elif not chosen:
        folder = source.path and source.path + "/"
        below = [file for file in data if file.path.startswith(folder)]
        chosen = [file for file in below if _suffix(file.path)]
        left = {file.path: ending(file.path) for file in below if not _suffix(file.path)}
    for file in chosen:
        if not _is_safe(file.path):
            raise UserError(f"refused, a file on the hub is named {file.path!r}")
    if not chosen:
        paths = {str(path) for f in seen for path in (Path(f.path), *Path(f.path).parents)} - {"."}
        near = ", ".join(difflib.get_close_matches(source.path, sorted(paths), cutoff=0))
        known = " ".join(SUFFIXES)
        raise UserError(f"no such file, nor data ({known}) below it; there is: {near or 'nothing'}")
    formats = sorted({_suffix(file.path) for file in chosen})
    if len(formats) > 1 and not has_magic(source.path):
        example = f"{source.text.rstrip('/')}/*{formats[0]}*"
        several = f"holds several formats ({', '.join(formats)})"
        raise UserError(f"{several}; name one by a glob, such as {example}")
    if left:
        _say(f"{source.text}: not downloaded: {describe_kinds(left)}")
    return chosen


def _suffix(path: str) -> str:
    """The suffix that says the format; empty if it is not a format of data."""
    suffix = suffixes(path)[0]
    return suffix if suffix in SUFFIXES else ""


def _part(source: Source, file: RepoFile) -> Path:
    """Where a file is kept until it is complete."""
    path = source.directory / file.path
    return path.with_name(f".{path.name}.part")


def _fetch_file(source: Source, commit: str, file: RepoFile) -> None:
    """Downloads the rest of a file, which gets its name once its digest is right."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    from huggingface_hub.utils.sha import git_hash

    path, part = source.directory / file.path, _part(source, file)
    url = hf_hub_url(source.dataset, file.path, repo_type="dataset", revision=commit)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # so that ranges mean the file
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as out:
        if (start := out.tell()) < file.size:
            http_get(url, out, resume_size=start, headers=headers, displayed_filename=file.path)
        out.flush()
        os.fsync(out.fileno())
    if file.lfs:
        intact = file_sha256(part) == file.lfs.sha256
    else:  # a small file
        intact = git_hash(part.read_bytes()) == file.blob_id
    if not intact:
        part.unlink()
        raise UserError(f"{file.path} arrived with other bytes than the hub lists; download again")
    part.replace(path)
    sync_directory(path.parent)


def _explain(error: Exception, source: Source, listing: Listing | None) -> str | None:
    """What went wrong with the hub, and what to do; None for a mistake of ours."""
    from huggingface_hub import constants, errors

    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/datasets/{source.dataset}"
    log_in = "`hf auth login` or set HF_TOKEN"
    revision = f"no revision {source.revision}; {page}/tree/main shows what there is"
    if listing:
        revision = f"commit {listing.commit} is gone from the hub; remove {source.directory}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    answer = f"{hub} answers with HTTP error {status}; try again later"
    if status in (401, 403):
        answer = f"{hub} refuses your token (HTTP {status}); {log_in} of one that may read"
    words = {  # the first that fits
        UserError: str(error),
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it where there is network",
        errors.GatedRepoError: f"gated; accept its terms at {page}, then {log_in}",
        errors.RepositoryNotFoundError: f"no dataset {source.dataset} on {hub}, or a private one:"
        f" correct the name, or {log_in}",
        errors.RevisionNotFoundError: revision,
        errors.HfHubHTTPError: answer,
        errors.HTTPError: f"can't reach {hub} ({str(error) or type(error).__name__}); compute nodes"
        " often have no network: run it on a login node",
        errors.HFValidationError: f"{source.dataset} is no name that the hub allows",
        # A page that asks for a login, say.
        json.JSONDecodeError: f"{hub} does not answer as a hub does; is HF_ENDPOINT right?",
        OSError: f"can't write {getattr(error, 'filename', None) or source.directory}:"
        f" {getattr(error, 'strerror', None) or error}",
    }
    return next((text for kind, text in words.items() if isinstance(error, kind)), None)
