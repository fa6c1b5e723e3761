"""python prepare.py [CONFIG] [--section.key=value …] [--force] [--verify]

Tokenizes the sources of CONFIG into the packed dataset `data.dir`, on all cores. A killed run goes
on where it was; a finished one says "up to date".
"""

# How: the corpus falls into parts (corpus.py). Workers write a part's tokens to `parts/` and then
# its report, so a part with a report is done for good. When all are, their files become the shards,
# numbered in the order of the parts, and the manifest, written last, makes them a dataset.

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import corpus
from config import (
    Config,
    DataConfig,
    UserError,
    load_config,
    resolve_path,
    run_program,
    sync_directory,
    write_atomically,
)
from corpus import Part
from tokenizer import Tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
FLUSH_DOCUMENTS, FLUSH_TOKENS = 4096, 1_000_000  # held in memory before they are written
SHORT_DOCUMENT = 64  # tokens; a median below it suggests lines where documents were meant
PROGRESS_SECONDS = 30  # between progress lines where there is no terminal for a bar
FLAGS = {
    "--force": "prepare anew, replacing a dataset that exists",
    "--verify": "read a prepared dataset whole and check it against its manifest",
}


def main(arguments: list[str]) -> None:
    config, flags = load_config(
        arguments, usage=__doc__, sections=("tokenizer", "data"), flags=FLAGS
    )
    directory = resolve_path(config.data.dir)
    if "--verify" in flags:
        verify(directory)
        return
    tokenizer = load_tokenizer(config)
    recipe = describe_recipe(config.data, tokenizer)
    try:
        if "--force" not in flags and is_up_to_date(directory, recipe):
            discard_work(directory / "parts")  # a kill may have left it
            print(f"{directory}: up to date")
        else:
            prepare(config.data, tokenizer, recipe, directory)
    except BrokenPipeError:  # of a pipe that what we print goes to, such as `| head`
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"can't write {directory}: {error.strerror or error}{where}") from None


def prepare(
    data: DataConfig,
    tokenizer: Tokenizer,
    recipe: dict[str, Any],
    directory: Path,
) -> None:
    """Writes the dataset. What the directory held before stays whole until all parts are done.

    Raises:
        UserError: a document that can't be read or written, a worker that died, an empty split.
        OSError: the directory can't be written.
    """
    work = directory / "parts"
    parts = corpus.plan(data)
    reports = open_work(work, recipe, parts, dataset_exists=(directory / "manifest.json").exists())
    if reports:
        print(f"{directory}: {len(reports)} of {len(parts)} parts are done already")
    todo = [part for part in parts if part.index not in reports]
    workers = data.workers or available_cores()
    with contextlib.closing(run_workers(todo, workers, data, tokenizer.path, work)) as finished:
        for part, report in show_progress(finished, parts, todo):
            reports[part.index] = report

    ordered = [reports[part.index] for part in parts]
    try:
        check_splits(data, ordered)
        manifest = publish(directory, work, recipe, ordered)
    except UserError:  # running again would only find the same
        discard_work(work)
        raise
    print_summary(directory, manifest, ordered)


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the configuration; UserError if its size is not the one configured."""
    tokenizer = Tokenizer(resolve_path(config.tokenizer.path))
    if tokenizer.vocab_size != config.tokenizer.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, but tokenizer.vocab_size is"
            f" {config.tokenizer.vocab_size}: set it to {tokenizer.vocab_size}, or train the"
            " tokenizer anew"
        )
    return tokenizer


def describe_recipe(data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a dataset is made of, as its manifest states it: equal recipes give equal shards."""
    return {
        "version": FORMAT_VERSION,
        "tokenizer": {
            name: getattr(tokenizer, name) for name in ("sha256", "vocab_size", "bos_id", "eos_id")
        },
        "sources": [
            {"name": source.name, "bytes": source.bytes}
            | ({"split": source.split} if source.split else {})
            for source in corpus.describe_sources(data)
        ],
        "document": data.document,
        "text_column": data.text_column,
        "errors": data.errors,
        "part_bytes": data.part_bytes,
        "split": {
            "seed": data.split_seed,
            "val_fraction": data.val_fraction,
            "test_fraction": data.test_fraction,
        },
    }


def available_cores() -> int:
    """Cores that this process may use: a Slurm job gets fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- a dataset that exists ---


def is_up_to_date(directory: Path, recipe: dict[str, Any]) -> bool:
    """False where there is no dataset; UserError where one exists that is another or damaged."""
    if not (directory / "manifest.json").exists():
        return False
    manifest = read_manifest(directory)
    for name, wanted in recipe.items():
        if (found := manifest.get(name)) != wanted:
            raise UserError(
                f"{directory} holds another dataset: {_difference(name, found, wanted)};"
                " --force prepares anew, another data.dir keeps both"
            )
    if damage := next(_damages(directory, manifest, _wrong_size), ""):
        raise UserError(f"{damage}; --force prepares anew")
    return True


def verify(directory: Path) -> None:
    """Reads all shards and compares size and sha256; UserError names the files that differ."""
    manifest = read_manifest(directory)
    if damages := list(_damages(directory, manifest, _wrong_content)):
        raise UserError(f"{'; '.join(damages)}; --force prepares anew")
    print(f"{directory}: all shards are as the manifest says")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset; UserError where there is none or it is damaged."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        for shard in _shards(manifest):
            shard["file"], shard["tokens"], shard["sha256"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run prepare.py") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; --force prepares anew") from None
    return manifest


def _shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]


def _damages(
    directory: Path, manifest: dict[str, Any], check: Callable[[Path, dict[str, Any]], str]
) -> Iterator[str]:
    """What `check` finds wrong with the shards of a manifest, each with its file."""
    for shard in _shards(manifest):
        path = directory / shard["file"]
        try:
            found = check(path, shard)
        except OSError as error:
            found = error.strerror
        if found:
            yield f"{path}: {found}"


def _wrong_size(path: Path, shard: dict[str, Any]) -> str:
    size, wanted = path.stat().st_size, 2 * shard["tokens"]
    return "" if size == wanted else f"{size} bytes instead of {wanted}"


def _wrong_content(path: Path, shard: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    equal = digest.hexdigest() == shard["sha256"]
    return _wrong_size(path, shard) or ("" if equal else "its sha256 is not the manifest's")


def _difference(name: str, found: Any, wanted: Any) -> str:
    """What differs between two values of a recipe, in a few words."""
    if name == "sources" and found:
        before, now = ({s["name"]: s["bytes"] for s in some} for some in (found, wanted))
        for source in [*now, *before]:
            if before.get(source) != now.get(source):
                sizes = (some.get(source, "no") for some in (before, now))
                return "source {} had {} bytes, has {}".format(source, *sizes)
        return "the order or the splits of the sources"
    if name == "tokenizer" and found:
        return f"its tokenizer is {found['sha256'][:12]}…, not {wanted['sha256'][:12]}…"
    return f"{name} was {json.dumps(found)}, is {json.dumps(wanted)}"


# --- parts ---


def open_work(
    work: Path, recipe: dict[str, Any], parts: list[Part], dataset_exists: bool
) -> dict[int, dict[str, Any]]:
    """Makes the directory of parts ready; the reports of parts that an earlier run finished."""
    identity = hashlib.sha256(json.dumps([recipe, parts]).encode()).hexdigest()
    plan = work / "plan.json"
    if plan.exists():
        if json.loads(plan.read_bytes())["identity"] == identity:
            return _finished(work, dataset_exists, len(parts))
        print(f"{work}: left by a run with other sources or settings; starting over")
    discard_work(work)
    work.mkdir(parents=True)
    write_atomically(plan, json.dumps({"identity": identity}).encode())
    return {}


def discard_work(work: Path) -> None:
    """Removes the directory of parts; OSError if it holds what prepare.py did not write."""
    for path in [*work.glob("part-*"), *work.glob("plan.json*")]:
        path.unlink()
    if work.exists():
        work.rmdir()


def _finished(work: Path, dataset_exists: bool, count: int) -> dict[int, dict[str, Any]]:
    for leftover in work.glob("*.tmp"):
        leftover.unlink()
    paths = work.glob("part-*.json")
    reports = {int(path.stem[5:]): json.loads(path.read_bytes()) for path in paths}
    if len(reports) == count and not dataset_exists:
        return reports  # publishing had begun: some files may be shards already
    return {
        index: report
        for index, report in reports.items()
        if all(_part_file(work, index, split).exists() for split in report["splits"])
    }


def _part_file(work: Path, index: int, split: str) -> Path:
    return work / f"part-{index:06d}.{split}.bin"


def run_workers(
    parts: list[Part], workers: int, data: DataConfig, tokenizer: Path, work: Path
) -> Iterator[tuple[Part, dict[str, Any]]]:
    """Hands the parts out in order to worker processes; yields each with its report when done.

    Raises:
        UserError: the first mistake that a worker meets, or a worker that was killed. All others
            are stopped at once.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting = iter(parts)
    crew: dict[Connection, multiprocessing.Process] = {}
    busy: dict[Connection, Part] = {}

    def hand_out(connection: Connection) -> None:
        if (part := next(waiting, None)) is not None:
            busy[connection] = part
            with contextlib.suppress(OSError):  # a worker that just died is noticed below
                connection.send(part)

    sys.stdout.flush()  # a forked worker would print what is buffered a second time
    try:
        for _ in range(min(workers, len(parts))):
            connection, theirs = context.Pipe()
            arguments = (theirs, os.getpid(), data, tokenizer, work)
            crew[connection] = context.Process(target=serve, args=arguments, daemon=True)
            crew[connection].start()
            theirs.close()
            hand_out(connection)
        while busy:
            wait([*busy, *(crew[connection].sentinel for connection in busy)])
            for connection, part in list(busy.items()):
                reply = _reply(connection, crew[connection], part)
                if reply is not None:
                    del busy[connection]
                    hand_out(connection)
                    yield part, reply
    finally:
        for process in crew.values():
            process.kill()
            process.join()
        for leftover in work.glob("*.tmp"):
            leftover.unlink()


def _reply(
    connection: Connection, process: multiprocessing.Process, part: Part
) -> dict[str, Any] | None:
    """A worker's report, or None while it works; raises what it raised, UserError if it died."""
    dead = not process.is_alive()  # asked first: its last word may still come
    with contextlib.suppress(EOFError, ConnectionError):
        if connection.poll():
            reply = connection.recv()
            if isinstance(reply, Exception):
                raise reply
            return reply
        if not dead:
            return None
    process.join()
    raise UserError(
        f"a worker died (exit code {process.exitcode}) on part {part.index}, which begins with"
        f" {part.pieces[0].path}; if memory ran out, use fewer data.workers; a new run goes on from"
        " here"
    )


def serve(
    connection: Connection, parent: int, data: DataConfig, tokenizer_path: Path, work: Path
) -> None:
    """The life of a worker: takes parts and returns reports, or the exception that stopped it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    tokenizer = Tokenizer(tokenizer_path)
    while True:
        part = connection.recv()
        try:
            reply = tokenize_part(part, data, tokenizer, work)
        except UserError as error:
            reply = error
        except OSError as error:  # from writing: corpus.py reports those from reading itself
            reply = UserError(f"can't write {work}: {error.strerror or error}")
        except Exception:
            reply = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
        connection.send(reply)


def _exit_after(parent: int) -> None:
    """Ends this process when its parent is gone, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def tokenize_part(part: Part, data: DataConfig, tokenizer: Tokenizer, work: Path) -> dict[str, Any]:
    """Writes the tokens of a part's documents, a file a split, and then its report.

    Raises:
        UserError: a document that can't be read.
        OSError: the files can't be written.
    """
    bos, eos = (np.array([i], dtype="<u2") for i in (tokenizer.bos_id, tokenizer.eos_id))
    read = empty = 0
    lengths = [0] * (SHORT_DOCUMENT + 1)  # documents of 0, 1, … tokens, the last: that or more
    writers: dict[str, ShardWriter] = {}
    try:
        for document in corpus.read(part, data):
            read += 1
            if not document.text:
                empty += 1
                continue
            try:
                ids = tokenizer.encode(document.text)
            except Exception as error:
                raise RuntimeError(f"{document.place()}: can't be encoded") from error
            split = part.split or corpus.split_of(document.text, data)
            if split not in writers:
                writers[split] = ShardWriter(_part_file(work, part.index, split))
            writers[split].add([bos, ids, eos], len(document.text.encode()))
            lengths[min(len(ids), SHORT_DOCUMENT)] += 1
        splits = {split: writers[split].finish() for split in SPLITS if split in writers}
    finally:
        for writer in writers.values():
            writer.discard()
    report = {"splits": splits, "read": read, "empty": empty, "lengths": lengths}
    write_atomically(work / f"part-{part.index:06d}.json", json.dumps(report).encode())
    return report


class ShardWriter:
    """Tokens of one split of a part: buffered, hashed, under a temporary name until done."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.file = open(self.temporary, "wb")  # noqa: SIM115, finish or discard closes it
        self.digest = hashlib.sha256()
        self.tokens = self.documents = self.bytes = self.buffered = 0
        self.buffer: list[np.ndarray] = []

    def add(self, ids: list[np.ndarray], size: int) -> None:
        """A document as runs of ids, and its text's bytes."""
        self.buffer += ids
        self.buffered += sum(map(len, ids))
        self.documents += 1
        self.bytes += size
        if self.buffered >= FLUSH_TOKENS or self.documents % FLUSH_DOCUMENTS == 0:
            self._flush()

    def _flush(self) -> None:
        block = np.concatenate(self.buffer).astype("<u2", copy=False).tobytes()
        self.file.write(block)
        self.digest.update(block)
        self.tokens += self.buffered
        self.buffer, self.buffered = [], 0

    def finish(self) -> dict[str, Any]:
        """Makes the file durable and gives it its name; what a manifest says of it."""
        if self.buffer:
            self._flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.temporary.replace(self.path)
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256": self.digest.hexdigest(),
        }

    def discard(self) -> None:
        """Removes the file unless it was finished."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, on a full disk too
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def show_progress(
    finished: Iterator[tuple[Part, dict[str, Any]]], parts: list[Part], todo: list[Part]
) -> Iterator[tuple[Part, dict[str, Any]]]:
    """Passes finished parts on below a bar over bytes, or now and then a line if no terminal."""
    total, left = (sum(part.bytes for part in some) for some in (parts, todo))
    documents, done, summary = 0, total - left, ""
    start = printed = time.monotonic()
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=None) as bar:
        for part, report in finished:
            yield part, report
            documents += report["read"]
            done += part.bytes
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            bar.update(part.bytes)
            megabytes, now = (done - total + left) / 1e6, time.monotonic()
            summary = (
                f"{documents:,} documents, {megabytes:.1f} MB in {now - start:.1f} s,"
                f" {megabytes / (now - start):.1f} MB/s"
            )
            if bar.disable and now > printed + PROGRESS_SECONDS:
                printed = now
                print(f"{done / total:.0%}: {summary}", flush=True)
    if summary:
        print(f"tokenized {summary}")


# --- shards ---


def check_splits(data: DataConfig, reports: list[dict[str, Any]]) -> None:
    """UserError for a split that was asked for and got no document."""
    read = sum(report["read"] for report in reports)
    if not any(report["splits"] for report in reports):
        raise UserError(
            f"the corpus holds no text: {read} documents, all empty, in {', '.join(data.sources)}"
        )
    asked = {
        "train": True,
        "val": data.val_sources or data.val_fraction > 0,
        "test": data.test_sources or data.test_fraction > 0,
    }
    for split in SPLITS:
        if asked[split] and not any(split in report["splits"] for report in reports):
            keys = f"data.{split}_fraction, data.{split}_sources" if split != "train" else "sources"
            raise UserError(
                f"the {split} split is empty: none of {read} documents fell into it; change {keys}"
                " or data.split_seed, or cut smaller documents with data.document"
            )


def publish(
    directory: Path, work: Path, recipe: dict[str, Any], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    """Turns the files of finished parts into shards; the manifest, written last, which it returns.

    A kill in between leaves no manifest, and the next run publishes the rest.
    """
    splits: dict[str, Any] = {}
    (directory / "manifest.json").unlink(missing_ok=True)
    for split in SPLITS:
        shards = []
        for index, report in enumerate(reports):
            if split in report["splits"]:
                shard = {"file": f"{split}-{len(shards):05d}.bin", **report["splits"][split]}
                shards.append(shard)
                if (part_file := _part_file(work, index, split)).exists():
                    part_file.replace(directory / shard["file"])
        if shards:
            totals = {n: sum(s[n] for s in shards) for n in ("tokens", "documents", "bytes")}
            splits[split] = {**totals, "shards": shards}
    if damage := next(_damages(directory, {"splits": splits}, _wrong_size), ""):
        raise UserError(f"{damage}; something else changed it, prepare again")
    names = {shard["file"] for shard in _shards({"splits": splits})}
    for path in directory.iterdir():  # shards of a dataset that was here before
        if re.fullmatch(r"(train|val|test)-\d{5,}\.bin", path.name) and path.name not in names:
            path.unlink()
    read, empty = (sum(report[name] for report in reports) for name in ("read", "empty"))
    manifest = {
        **recipe,
        "splits": splits,
        "counts": {"read": read, "written": read - empty, "dropped": {"empty": empty}},
    }
    sync_directory(directory)
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1).encode())
    discard_work(work)
    return manifest


def print_summary(directory: Path, manifest: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    """What was written, and a warning where documents look like lines."""
    for name, split in manifest["splits"].items():
        print(
            f"{name}: {split['tokens']:,} tokens in {split['documents']:,} documents,"
            f" {split['bytes'] / split['tokens']:.2f} bytes a token, {len(split['shards'])} shards"
        )
    if empty := manifest["counts"]["dropped"]["empty"]:
        print(f"dropped: {empty:,} empty documents")
    lengths = [sum(counts) for counts in zip(*(r["lengths"] for r in reports), strict=True)]
    running = list(itertools.accumulate(lengths))
    median = next(length for length, count in enumerate(running) if 2 * count >= running[-1])
    if median < SHORT_DOCUMENT:
        print(
            f"warning: the median document has {median} tokens, under {SHORT_DOCUMENT}; if these"
            " are lines of larger texts, set data.document to file, blank_line or"
            ' {starts = "regex"}'
        )
    print(f"{directory}: ready")


if __name__ == "__main__":
    run_program(main)
