"""python prepare.py [CONFIG] [--section.key=value …] [--force] [--verify]

Tokenizes the sources of CONFIG into the packed dataset `data.dir`, on all cores. A killed run goes
on where it was; a finished one says "up to date".
"""

# How: the corpus falls into parts (corpus.py). Workers write a part's tokens to `parts/` and then
# its report, so a part with a report is done for good. When all are, their files become the shards,
# numbered in the order of the parts, and the manifest, written last, makes them a dataset.

from __future__ import annotations

import contextlib
import functools
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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

import corpus
from config import (
    DATASET_VERSION,
    DataConfig,
    UserError,
    available_cores,
    file_sha256,
    load_config,
    resolve_path,
    run_program,
    sync_directory,
    write_atomically,
)
from corpus import Part
from tokenizer import Tokenizer, configured_tokenizer

SPLITS = ("train", "val", "test")
COUNTS = ("tokens", "documents", "bytes")
SHORT_DOCUMENT = 64  # tokens; a median below it suggests lines where documents were meant
PROGRESS_SECONDS = 30  # between progress lines where there is no terminal for a bar
FLAGS = {
    "--force": "prepare anew, replacing a dataset that exists",
    "--verify": "read a prepared dataset whole and check it against its manifest",
}
Json = dict[str, Any]


def main(arguments: list[str]) -> None:
    config, flags = load_config(
        arguments, usage=__doc__, sections=("tokenizer", "data"), flags=FLAGS
    )
    directory = resolve_path(config.data.dir)
    if "--verify" in flags:
        verify(directory)
        return
    tokenizer = configured_tokenizer(config.tokenizer)
    recipe = describe_recipe(config.data, tokenizer)
    try:
        if (directory / "manifest.json").exists() and "--force" not in flags:
            check_existing(directory, recipe)
            discard_work(directory / "parts")  # a kill may have left it
            say(f"{directory}: up to date")
        else:
            prepare(config.data, tokenizer, recipe, directory)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"can't write {directory}: {error.strerror or error}{where}") from None


def prepare(data: DataConfig, tokenizer: Tokenizer, recipe: Json, directory: Path) -> None:
    """Writes the dataset. What the directory held before stays whole until all parts are done.

    Raises:
        UserError: a document that can't be read, a worker that died, an empty split.
        OSError: the directory can't be written.
    """
    parts = corpus.plan(data)
    reports = open_work(directory, recipe, parts)
    if reports:
        say(f"{directory}: {len(reports)} of {len(parts)} parts are done already")
    tokenize(parts, reports, data, tokenizer, directory / "parts")
    ordered = [reports[part.index] for part in parts]
    try:
        check_splits(data, ordered)
        manifest = publish(directory, recipe, ordered)
    except UserError:  # running again would only find the same
        discard_work(directory / "parts")
        raise
    for name, split in manifest["splits"].items():
        say(
            f"{name}: {split['tokens']:,} tokens in {split['documents']:,} documents,"
            f" {split['bytes'] / split['tokens']:.2f} bytes a token, {len(split['shards'])} shards"
        )
    counts = manifest["counts"]
    if counts["dropped"]["empty"]:
        say(f"dropped: {counts['dropped']['empty']:,} empty documents")
    if 2 * sum(report["short"] for report in ordered) > counts["written"]:
        say(
            f"warning: the median document has under {SHORT_DOCUMENT} tokens; if these are lines of"
            ' larger texts, set data.document to file, blank_line or {starts = "regex"}'
        )
    say(f"{directory}: ready")


def say(line: str) -> None:
    """Prints a line at once; a reader that has left, such as `| head`, stops nothing."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_recipe(data: DataConfig, tokenizer: Tokenizer) -> Json:
    """What a dataset is made of, as its manifest states it: equal recipes give equal shards."""
    return {
        "version": DATASET_VERSION,
        "tokenizer": {
            name: getattr(tokenizer, name) for name in ("sha256", "vocab_size", "bos_id", "eos_id")
        },
        "sources": [
            {"name": source.name, "bytes": source.bytes}
            | ({"split": source.split} if source.split else {})
            for source in corpus.describe_sources(data)
        ],
        **{n: getattr(data, n) for n in ("document", "text_column", "errors", "part_bytes")},
        "split": {
            "seed": data.split_seed,
            "val_fraction": data.val_fraction,
            "test_fraction": data.test_fraction,
        },
    }


def check_existing(directory: Path, recipe: Json) -> None:
    """UserError where the dataset that exists is another or damaged."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        check_shards(directory, manifest["splits"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; --force prepares anew") from None
    for name, wanted in recipe.items():
        found = manifest.get(name)
        if found and isinstance(wanted, list) and found != wanted:  # the first source that differs
            pairs = itertools.zip_longest(found, wanted)
            found, wanted = next(pair for pair in pairs if pair[0] != pair[1])
        if found != wanted:
            raise UserError(
                f"{directory} holds another dataset: {name} was {json.dumps(found)}, is"
                f" {json.dumps(wanted)}; --force prepares anew, another data.dir keeps both"
            )


def verify(directory: Path) -> None:
    """Reads a dataset whole; UserError for what does not match its manifest."""
    try:
        splits = json.loads((directory / "manifest.json").read_bytes())["splits"]
        check_shards(directory, splits)
        digests = {directory / shard["file"]: shard["sha256"] for shard in all_shards(splits)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{directory}: no whole manifest.json here; run prepare.py") from None
    for path, digest in digests.items():
        if file_sha256(path) != digest:
            raise UserError(f"{path}: damaged; --force prepares anew")
    say(f"{directory}: {len(all_shards(splits))} shards match their checksums")


def all_shards(splits: Json) -> list[Json]:
    return [shard for split in splits.values() for shard in split["shards"]]


def check_shards(directory: Path, splits: Json) -> None:
    """UserError for the first shard whose size is not as stated."""
    for shard in all_shards(splits):
        path, wanted = directory / shard["file"], 2 * shard["tokens"]
        size = path.stat().st_size if path.exists() else "no"
        if size != wanted:
            raise UserError(f"{path}: {size} bytes instead of {wanted}; --force prepares anew")


def open_work(directory: Path, recipe: Json, parts: list[Part]) -> dict[int, Json]:
    """Makes the directory of parts ready; the reports of parts that an earlier run finished."""
    work = directory / "parts"
    identity = hashlib.sha256(json.dumps([recipe, parts]).encode()).hexdigest().encode()
    plan = work / "plan"
    if plan.exists() and plan.read_bytes() == identity:
        paths = work.glob("part-*.json")
        reports = {int(path.stem[5:]): json.loads(path.read_bytes()) for path in paths}
        if len(reports) == len(parts) and not (directory / "manifest.json").exists():
            return reports  # publishing had begun: some files may be shards already
        return {
            index: report
            for index, report in reports.items()
            if all(part_file(work, index, split).exists() for split in report["splits"])
        }
    if plan.exists():
        say(f"{work}: left by a run with other sources or settings; starting over")
    discard_work(work)
    work.mkdir(parents=True)
    write_atomically(plan, identity)
    return {}


def discard_work(work: Path) -> None:
    """Removes the directory of parts; OSError if it holds what prepare.py did not write."""
    for path in [*work.glob("part-*"), *work.glob("plan*")]:
        path.unlink()
    if work.exists():
        work.rmdir()


def part_file(work: Path, index: int, split: str) -> Path:
    return work / f"part-{index:06d}.{split}.bin"


def tokenize(
    parts: list[Part], reports: dict[int, Json], data: DataConfig, tokenizer: Tokenizer, work: Path
) -> None:
    """Tokenizes the parts that have no report yet, on all cores, and adds their reports.

    Raises:
        UserError: the first mistake that a worker meets, or a worker that was killed. All others
            are stopped at once.
    """
    if not (todo := [part for part in parts if part.index not in reports]):
        return
    # Bytes read of each part. It has no lock, so a worker that is killed can't keep one.
    done = RawArray("Q", [part.bytes * (part.index in reports) for part in parts])
    total, before, documents = sum(part.bytes for part in parts), sum(done), 0
    start, printed = time.monotonic(), 0.0
    count = min(data.workers or available_cores(), len(todo))
    job = functools.partial(tokenize_part, data=data, tokenizer=tokenizer, work=work, done=done)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(count, context, start_worker, (os.getpid(), job))
    waiting = iter(todo)
    running: dict[Future, Part] = {}
    try:
        with tqdm(total=total, initial=before, unit="B", unit_scale=True, disable=None) as bar:
            while len(reports) < len(parts):
                for part in itertools.islice(waiting, 2 * count - len(running)):
                    running[pool.submit(run_job, part)] = part
                wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in [future for future in running if future.done()]:  # in order
                    report = future.result()
                    reports[running.pop(future).index] = report
                    documents += report["read"]
                seconds, megabytes = time.monotonic() - start, (sum(done) - before) / 1e6
                speed = f"{megabytes:.1f} MB in {seconds:.1f} s, {megabytes / seconds:.1f} MB/s"
                bar.set_postfix_str(f"{documents:,} documents", refresh=False)
                bar.update(sum(done) - bar.n)
                if bar.disable and seconds > printed + PROGRESS_SECONDS:
                    printed = seconds
                    say(f"{sum(done) / total:.0%}: {documents:,} documents, {speed}")
    except BrokenProcessPool:
        files = sorted({part.pieces[0].path for part in running.values()})
        raise UserError(
            f"a worker died in a part that begins with {' or '.join(files)}; if memory ran out, use"
            " fewer data.workers; a new run goes on from here"
        ) from None
    finally:
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.kill()
        pool.shutdown()
        for worker in workers:  # what they had begun
            for path in work.glob(f"part-*.{worker.pid}.tmp"):
                path.unlink()
    say(f"tokenized {documents:,} documents, {speed}")


def start_worker(parent: int, job: Callable[[Part], Json]) -> None:
    """Makes this process a worker: it keeps its job, and ends with its parent."""
    global JOB
    JOB = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(part: Part) -> Json:
    return JOB(part)


def tokenize_part(
    part: Part, data: DataConfig, tokenizer: Tokenizer, work: Path, done: Sequence[int]
) -> Json:
    """Writes the tokens of a part's documents, a file a split, and then its report.

    Raises:
        UserError: a document that can't be read.
        OSError: the files can't be written.
    """
    bos, eos = (i.to_bytes(2, "little") for i in (tokenizer.bos_id, tokenizer.eos_id))
    read = empty = short = 0
    shards: dict[str, Shard] = {}
    with contextlib.ExitStack() as files:
        for document in corpus.read(part, data):
            read += 1
            size = len(document.text.encode())
            done[part.index] = min(part.bytes, done[part.index] + size)
            if not size:
                empty += 1
                continue
            try:
                ids = tokenizer.encode(document.text)
            except Exception as error:
                raise RuntimeError(f"{document.place()}: can't be encoded") from error
            short += len(ids) < SHORT_DOCUMENT
            split = part.split or corpus.split_of(document.text, data)
            if split not in shards:
                path = work / f"part-{part.index:06d}.{split}.{os.getpid()}.tmp"
                files.callback(path.unlink, missing_ok=True)  # unless it is whole and renamed
                shards[split] = Shard(files.enter_context(open(path, "wb", 1 << 20)))
            shards[split].add(bos + ids.astype("<u2").tobytes() + eos, size)
        splits = {
            split: shard.finish(part_file(work, part.index, split))
            for split, shard in sorted(shards.items())
        }
    report = {"splits": splits, "read": read, "empty": empty, "short": short}
    write_atomically(work / f"part-{part.index:06d}.json", json.dumps(report).encode())
    done[part.index] = part.bytes
    return report


class Shard:
    """Tokens of one split of a part on their way to disk, counted and hashed."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.tokens = self.documents = self.bytes = 0

    def add(self, tokens: bytes, size: int) -> None:
        """A document's tokens, two bytes each, and how many bytes its text has."""
        self.file.write(tokens)
        self.digest.update(tokens)
        self.tokens += len(tokens) // 2
        self.documents += 1
        self.bytes += size

    def finish(self, path: Path) -> Json:
        """Makes the file durable and gives it its name; what a manifest says of it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.file.name, path)
        counts = {name: getattr(self, name) for name in COUNTS}
        return counts | {"sha256": self.digest.hexdigest()}


def check_splits(data: DataConfig, reports: list[Json]) -> None:
    """UserError for a split that was asked for and got no document."""
    read, empty = (sum(report[name] for report in reports) for name in ("read", "empty"))
    asked = {
        "train": True,
        "val": data.val_sources or data.val_fraction > 0,
        "test": data.test_sources or data.test_fraction > 0,
    }
    for split in SPLITS:
        if asked[split] and not any(split in report["splits"] for report in reports):
            raise UserError(
                f"the {split} split is empty: of {read} documents, {empty} without text, none fell"
                " into it; change data.sources, the split's sources or fraction, or data.split_seed"
            )


def publish(directory: Path, recipe: Json, reports: list[Json]) -> Json:
    """Turns the files of finished parts into shards; the manifest, written last, which it returns.

    A kill in between leaves no manifest, and the next run publishes the rest.
    """
    work, splits = directory / "parts", {}
    (directory / "manifest.json").unlink(missing_ok=True)
    for split in SPLITS:
        shards = []
        for index, report in enumerate(reports):
            if split in report["splits"]:
                shard = {"file": f"{split}-{len(shards):05d}.bin", **report["splits"][split]}
                shards.append(shard)
                if (path := part_file(work, index, split)).exists():
                    path.replace(directory / shard["file"])
        if shards:
            totals = {name: sum(shard[name] for shard in shards) for name in COUNTS}
            splits[split] = {**totals, "shards": shards}
    check_shards(directory, splits)
    names = {shard["file"] for shard in all_shards(splits)}
    for path in directory.iterdir():  # shards of a dataset that was here before
        if re.fullmatch(r"(train|val|test)-\d{5,}\.bin", path.name) and path.name not in names:
            path.unlink()
    read, empty = (sum(report[name] for report in reports) for name in ("read", "empty"))
    counts = {"read": read, "written": read - empty, "dropped": {"empty": empty}}
    manifest = {**recipe, "splits": splits, "counts": counts}
    sync_directory(directory)
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1).encode())
    discard_work(work)
    return manifest


if __name__ == "__main__":
    run_program(main)
