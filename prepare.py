"""python prepare.py [CONFIG] [--section.key=value …] [--force]
python prepare.py [CONFIG] [--section.key=value …] --task=I/N | --verify | --bad-steps

Tokenizes the sources of CONFIG into the packed dataset `data.dir`, on all cores. A killed run goes
on where it was; a finished one says "up to date". On several machines: N tasks of a job array with
--task=I/N, and when they have ended, a run without it, which does what is missing and publishes.
"""

# How: the corpus falls into parts (corpus.py). Workers write a part's tokens to `parts/IDENTITY/`
# and then its report, so a part with a report is done for good. When all are, their files become
# the shards, numbered in the order of the parts, and the manifest, written last, makes them a
# dataset. Files get their names when they are whole, and IDENTITY is a digest of all that decides
# their content, so that programs that write the same file, on any machines, write the same bytes.

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import secrets
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

import corpus
from config import (
    DATASET_VERSION,
    Config,
    ConfigError,
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
    "--task=I/N": "tokenize every Nth part, from part I on (0 to N - 1), and publish nothing",
    "--verify": "read a prepared dataset whole and check it against its manifest",
    "--bad-steps": "print the texts of the training steps that the run in train.out_dir skipped",
}
Json = dict[str, Any]


class Task(NamedTuple):
    """One of `count` tasks that share the parts."""

    index: int
    count: int


def main(arguments: list[str]) -> None:
    config, flags = load_config(
        arguments, usage=__doc__, sections=("tokenizer", "data"), flags=FLAGS
    )
    directory, task = resolve_path(config.data.dir), read_task(flags)
    if "--verify" in flags:
        verify(directory)
        return
    if "--bad-steps" in flags:
        show_bad_steps(config)
        return
    tokenizer = configured_tokenizer(config.tokenizer)
    recipe = describe_recipe(config.data, tokenizer)
    try:
        if (directory / "manifest.json").exists() and "--force" not in flags:
            check_existing(directory, recipe)
            if not task:
                discard_work(directory)  # a kill may have left it
            say(f"{directory}: up to date")
        else:
            prepare(config.data, tokenizer, recipe, directory, task)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"can't write {directory}: {error.strerror or error}{where}") from None


def read_task(flags: set[str]) -> Task | None:
    """The task that the flags name; ConfigError if there is none such, or another flag with it."""
    texts = [flag.partition("=")[2] for flag in flags if flag.startswith("--task=")]
    if not texts:
        return None
    if len(flags) > 1:
        raise ConfigError(f"--task goes alone, not {' '.join(sorted(flags))}")
    match = re.fullmatch("([0-9]+)/([0-9]+)", texts[0])
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(
            f"--task is I/N with I from 0 to N - 1, such as 0/4, not {texts[0]!r}; in a job array"
            " from 0: --task=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
        )
    return Task(int(match[1]), int(match[2]))


def prepare(
    data: DataConfig, tokenizer: Tokenizer, recipe: Json, directory: Path, task: Task | None
) -> None:
    """Writes the dataset, or a task's share of its parts.

    What the directory held before stays whole until all parts are done.

    Raises:
        UserError: a document that can't be read, a worker that died, an empty split.
        OSError: the directory can't be written.
    """
    parts = corpus.plan(data)
    work, reports = open_work(directory, recipe, parts, task)
    if reports:
        say(f"{directory}: {len(reports)} of {len(parts)} parts are done already")
    share = parts[task.index :: task.count] if task else parts
    tokenize(share, reports, data, tokenizer, work)
    if task:
        name = f"task {task.index}/{task.count}"
        say(f"{directory}: {name} is done, {len(share)} of {len(parts)} parts")
        return
    ordered = [reports[part.index] for part in parts]
    try:
        check_splits(data, ordered)
        manifest = publish(directory, work, recipe, ordered)
    except UserError:  # running again would only find the same
        discard_work(directory)
        raise
    describe_result(directory, manifest, ordered)


def describe_result(directory: Path, manifest: Json, reports: list[Json]) -> None:
    """Says what a new dataset holds, and warns where that is hardly what was meant."""
    for name, split in manifest["splits"].items():
        say(
            f"{name}: {split['tokens']:,} tokens in {split['documents']:,} documents,"
            f" {split['bytes'] / split['tokens']:.2f} bytes a token, {len(split['shards'])} shards"
        )
    counts = manifest["counts"]
    if counts["dropped"]["empty"]:
        say(f"dropped: {counts['dropped']['empty']:,} empty documents")
    if 2 * sum(report["short"] for report in reports) > counts["written"]:
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


def open_work(
    directory: Path, recipe: Json, parts: list[Part], task: Task | None
) -> tuple[Path, dict[int, Json]]:
    """The directory of the parts, made ready, and the reports of those that are finished.

    Raises:
        UserError: there are parts of another recipe, which a task must not discard.
    """
    identity = hashlib.sha256(json.dumps([recipe, parts]).encode()).hexdigest()
    work = directory / "parts" / identity[:16]
    if others := [path for path in work.parent.glob("*") if path != work]:
        left = f"{others[0]}: left by a run with other sources or settings"
        if task:
            raise UserError(f"{left}; run prepare.py once without --task, or remove {work.parent}")
        say(f"{left}; starting over")
        discard_work(directory, work)
    work.mkdir(parents=True, exist_ok=True)
    paths = work.glob("part-*.json")
    reports = {int(path.stem[5:]): json.loads(path.read_bytes()) for path in paths}
    if len(reports) < len(parts) or (directory / "manifest.json").exists():
        reports = {
            index: report
            for index, report in reports.items()
            if all(part_file(work, index, split).exists() for split in report["splits"])
        }  # else publishing had begun: some files may be shards already
    return work, reports


def discard_work(directory: Path, kept: Path | None = None) -> None:
    """Removes all parts, or all but those `kept`; OSError for what prepare.py did not write."""
    root = directory / "parts"
    for work in [path for path in root.glob("*") if path != kept]:
        while work.exists():  # again if a task that still lives has added to it
            ours = [*work.glob("part-*")]
            for path in ours:
                path.unlink(missing_ok=True)
            try:
                work.rmdir()
            except OSError:
                if not ours:
                    raise
    if root.exists() and not kept:
        root.rmdir()


def part_file(work: Path, index: int, split: str) -> Path:
    return work / f"part-{index:06d}.{split}.bin"


def tokenize(
    parts: list[Part], reports: dict[int, Json], data: DataConfig, tokenizer: Tokenizer, work: Path
) -> None:
    """Tokenizes those of the parts that have no report yet, on all cores, and adds their reports.

    Raises:
        UserError: the first mistake that a worker meets, or a worker that was killed. All others
            are stopped at once.
    """
    if not (todo := [part for part in parts if part.index not in reports]):
        return
    # Bytes read of each part. It has no lock, so a worker that is killed can't keep one.
    done = RawArray("Q", todo[-1].index + 1)
    total, end, documents = sum(part.bytes for part in parts), len(reports) + len(todo), 0
    before = total - sum(part.bytes for part in todo)
    start, printed, run = time.monotonic(), 0.0, secrets.token_hex(8)
    count = min(data.workers or available_cores(), len(todo))
    job = functools.partial(tokenize_part, data, tokenizer, work, run, done)
    bar = tqdm(total=total, initial=before, unit="B", unit_scale=True, disable=None)
    waiting = iter(todo)
    running: dict[Future, Part] = {}
    try:
        with start_workers(count, job) as pool, bar:
            while len(reports) < end:
                for part in itertools.islice(waiting, 2 * count - len(running)):
                    running[pool.submit(run_job, part)] = part
                wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in [future for future in running if future.done()]:  # in order
                    report = future.result()
                    reports[running.pop(future).index] = report
                    documents += report["read"]
                seconds, megabytes = time.monotonic() - start, sum(done) / 1e6
                speed = f"{megabytes:.1f} MB in {seconds:.1f} s, {megabytes / seconds:.1f} MB/s"
                bar.set_postfix_str(f"{documents:,} documents", refresh=False)
                bar.update(before + sum(done) - bar.n)
                if bar.disable and seconds > printed + PROGRESS_SECONDS:
                    printed = seconds
                    say(f"{(before + sum(done)) / total:.0%}: {documents:,} documents, {speed}")
    except BrokenProcessPool:
        files = sorted({part.pieces[0].path for part in running.values()})
        raise UserError(
            f"a worker died in a part that begins with {' or '.join(files)}; if memory ran out, use"
            " fewer data.workers; a new run goes on from here"
        ) from None
    finally:
        for path in work.glob(f"part-*.{run}.tmp"):  # what they had begun
            path.unlink(missing_ok=True)
    say(f"tokenized {documents:,} documents, {speed}")


@contextlib.contextmanager
def start_workers(count: int, job: Callable[[Part], Json]) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that have a job; on leaving, all are killed at once."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(count, context, start_worker, (os.getpid(), job))
    try:
        yield pool
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()
        pool.shutdown()


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
    data: DataConfig, tokenizer: Tokenizer, work: Path, run: str, done: Sequence[int], part: Part
) -> Json:
    """Writes the tokens of a part's documents, a file a split, and then its report.

    `run` tells this program's temporary files from those of others that write the same part.

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
                path = part_file(work, part.index, split)
                shards[split] = Shard(files.enter_context(new_file(path, run)))
            shards[split].add(bos + ids.astype("<u2").tobytes() + eos, size)
        splits = {
            split: shard.finish(part_file(work, part.index, split))
            for split, shard in sorted(shards.items())
        }
    report = {"splits": splits, "read": read, "empty": empty, "short": short}
    path = work / f"part-{part.index:06d}.json"
    with new_file(path, run) as file:
        file.write(json.dumps(report).encode())
        name_file(file, path)
    done[part.index] = part.bytes
    return report


@contextlib.contextmanager
def new_file(path: Path, run: str) -> Iterator[BinaryIO]:
    """A file to write under a temporary name; unless `name_file` gives it its own, it goes."""
    temporary = path.with_name(f"{path.name}.{run}.tmp")
    try:
        with open(temporary, "wb", 1 << 20) as file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def name_file(file: BinaryIO, path: Path) -> None:
    """Makes a file durable and gives it its name, where an equal one may stand."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    sync_directory(path.parent)


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
        name_file(self.file, path)
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


def publish(directory: Path, work: Path, recipe: Json, reports: list[Json]) -> Json:
    """Turns the files of finished parts into shards; the manifest, written last, which it returns.

    A kill in between leaves no manifest, and the next run publishes the rest.
    """
    splits = {}
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
    discard_work(directory)
    return manifest


def show_bad_steps(config: Config) -> None:
    """Prints the texts of the training steps that a run skipped.

    Raises:
        UserError: a damaged record, or a dataset that is no longer what it names.
    """
    path = resolve_path(config.train.out_dir) / "bad_steps.jsonl"
    if not path.exists():
        say(f"{path.parent}: no step was skipped")
        return
    tokenizer = configured_tokenizer(config.tokenizer)
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            step = json.loads(line)
            loss, norm = (
                "not finite" if step[name] is None else f"{step[name]:.4g}"
                for name in ("loss", "grad_norm")
            )
            say(f"step {step['step']}: {step['reason']}, loss {loss}, gradient norm {norm}")
            show_windows(resolve_path(step["dataset"]), step["windows"], tokenizer)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: damaged") from None


def show_windows(directory: Path, windows: list[Json], tokenizer: Tokenizer) -> None:
    """Prints where windows lie and their texts; UserError if the dataset does not hold them."""
    from dataset import read_manifest  # here, as it loads torch, which nothing else needs

    read_manifest(directory, tokenizer.sha256)
    for window in windows:
        pieces = window["pieces"]
        places = [f"{p['tokens']} tokens of {p['shard']} from {p['offset']}" for p in pieces]
        say(f"window {window['window']} in {directory}: {', '.join(places)}")
        ids = np.concatenate([read_tokens(directory / p["shard"], p) for p in pieces])
        text = visible_text(ids, tokenizer)
        say(textwrap.indent(text, "  | ", lambda line: True))


def read_tokens(path: Path, piece: Json) -> np.ndarray:
    """The token ids of a piece of a shard; UserError if the shard does not hold them."""
    offset, count = piece["offset"], piece["tokens"]
    ids = np.fromfile(path, "<u2", count, offset=2 * offset) if path.exists() else []
    if len(ids) < count:
        raise UserError(f"{path}: no {count} tokens from {offset} on; was it prepared anew since?")
    return ids


def visible_text(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of ids with special tokens by name, and as escapes what does not print."""
    runs = itertools.groupby(ids.tolist(), tokenizer.processor.is_control)
    text = "".join(
        "".join(tokenizer.processor.id_to_piece(list(run)))
        if special
        else tokenizer.decode(list(run))
        for special, run in runs
    )
    return "".join(c if c.isprintable() or c in "\t\n" else ascii(c)[1:-1] for c in text)


if __name__ == "__main__":
    run_program(main)
