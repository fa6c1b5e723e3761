"""Makes a packed dataset from sources, with many processes, on machines that may stop at any time.

The corpus is cut into parts (readers.py). For each part a worker writes token files to
`parts/IDENTITY/` and then a report, which marks the part as done. If documents are deduplicated or
packed into windows, workers then write final files for each part (packing.py). When all parts are
done, their files are renamed to shards, numbered in the order of the parts. The manifest comes
last: a directory without one is no dataset.

A file gets its name only when it is complete. IDENTITY is a digest of everything that decides what
the files contain, so programs that write the same file, on any machine, write the same bytes.
"""

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
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import (
    DATASET_VERSION,
    DataConfig,
    UserError,
    available_cores,
    file_sha256,
    sync_directory,
    write_atomically,
)
from corpus import hub, packing, readers, splits
from corpus.locks import locked
from corpus.packing import ARRANGED, SKIPPED, Json, Worker, tokenize_part
from corpus.readers import Bad, Part
from corpus.sources import Survey
from tokenizer import Template, Tokenizer

SPLITS = ("train", "val", "test")
RULES = {
    "empty": "empty documents",
    "bad": "bad documents",
    "no_response": "conversations without a response",
    "no_prompt": "conversations without a prompt",
    "too_long": "conversations longer than a window",
    "duplicate": "documents equal to an earlier one",
}
REPORT_VERSION = 2  # of the parts' reports
PROGRESS_SECONDS = 30  # between progress lines where there is no terminal for a bar


class Task(NamedTuple):
    """One of `count` tasks of a job array that share the parts."""

    index: int
    count: int


class Build(NamedTuple):
    """A dataset to be made.

    Attributes:
        directory: of the dataset.
        worker: what each process needs; the parts' files are in worker.work.
        recipe: see describe_recipe.
        not_read: number of files near the sources that are not read, by ending.
        commits: of hf:// sources.
    """

    directory: Path
    worker: Worker
    parts: list[Part]
    recipe: Json
    not_read: dict[str, int]
    commits: dict[str, str]


def prepare(
    directory: Path, config: DataConfig, tokenizer: Tokenizer, task: Task | None, force: bool
) -> None:
    """Prepares the dataset of data.sources, or a task's share of its parts.

    An equal dataset that exists is kept. A run without a task waits while another one works in the
    directory.

    Raises:
        UserError: a source or document can't be read, another or a damaged dataset exists, a worker
            died, a split is empty, or the directory can't be written.
    """
    data = hub.local_sources(config)
    survey = Survey(data)
    for line in survey.remarks():
        say(line)
    recipe = describe_recipe(data, tokenizer, survey)
    try:
        # If there are parts, a run with --force may be replacing a dataset that looks ready.
        busy = not task and (directory / "parts").exists()
        if force or busy or not is_ready(directory, recipe):
            template = Template(data.template, tokenizer) if data.format == "instruct" else None
            parts = readers.plan(data, survey.sources)
            identity = json.dumps([REPORT_VERSION, recipe, parts]).encode()
            work = directory / "parts" / hashlib.sha256(identity).hexdigest()[:16]
            worker = Worker(data, tokenizer, template, work, moved={}, duplicates={})
            commits = hub.commits(config)
            build = Build(directory, worker, parts, recipe, survey.not_read, commits)
            directory.mkdir(parents=True, exist_ok=True)
            lock = locked(
                directory / "prepare.lock",
                lambda holder: say(f"{directory}: waiting for {holder}, which is preparing it"),
            )
            with contextlib.nullcontext() if task else lock:
                ready = not force and is_ready(directory, recipe)  # made while this run waited
                if force or ready:  # parts of older sources, or left by a killed run
                    discard_work(directory)
                if not ready:
                    make(build, task)
                    return
        say(f"{directory}: up to date")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"can't write {directory}: {error.strerror or error}{where}") from None


def make(build: Build, task: Task | None) -> None:
    """Tokenizes the parts and publishes the dataset, or tokenizes a task's share of the parts.

    A dataset that is there stays complete until all parts are done.
    """
    directory, parts, data = build.directory, build.parts, build.worker.data
    reports = open_work(build, task)
    if reports:
        say(f"{directory}: {len(reports)} of {len(parts)} parts are done already")
    share = parts[task.index :: task.count] if task else parts
    work_through(tokenize_part, build.worker, share, reports, "tokenized")
    if task:
        done = f"task {task.index}/{task.count} is done, {len(share)} of {len(parts)} parts"
        say(f"{directory}: {done}")
        return
    fill_splits(build, reports)
    tokenized = [reports[part.index] for part in parts]
    counts = add_up(tokenized)
    if build.not_read:
        counts["not_read"] = build.not_read
    check_splits(build, tokenized, counts)
    stage, final = "", tokenized
    if packing.record_endings(data):
        stage, final = ARRANGED, arrange_parts(build, tokenized)
    manifest = publish(build, stage, final, counts)
    describe_result(directory, manifest, sum(report["short"] for report in tokenized), data)


def fill_splits(build: Build, reports: dict[int, Json]) -> None:
    """Moves documents to splits that would be empty: tokenizes their parts, and reports, again."""
    edges = splits.merge_edges(report["edges"] for report in reports.values())
    moved = splits.fill_splits(edges, build.worker.data)
    for index, report in [*reports.items()]:
        held = itertools.chain.from_iterable(report["edges"].values())
        if not report["moved"] and not moved.keys().isdisjoint(held):  # else done by a killed run
            del reports[index]
    worker, verb = build.worker._replace(moved=moved), "tokenized again to fill all splits:"
    work_through(tokenize_part, worker, build.parts, reports, verb)


def add_up(reports: list[Json]) -> Json:
    """The counts of documents in all parts: read = written + dropped."""
    dropped = sum((Counter(report["dropped"]) for report in reports), Counter())
    read = sum(report["read"] for report in reports)
    counts = {"read": read, "written": read - dropped.total(), "dropped": {"empty": 0} | dropped}
    if truncated := sum(report["truncated"] for report in reports):
        counts["truncated"] = truncated
    if moved := sum((Counter(report["moved"]) for report in reports), Counter()):
        counts["moved"] = moved
    return counts


def describe_result(directory: Path, manifest: Json, short: int, data: DataConfig) -> None:
    """Prints what a new dataset contains, with warnings about likely mistakes."""
    counts, window = manifest["counts"], manifest.get("seq_len")
    for name, split in manifest["splits"].items():
        text = split["tokens"] - split.get("filled", 0)
        say(
            f"{name}: {text:,} tokens in {split['documents']:,} documents,"
            f" {split['bytes'] / text:.2f} bytes per token, {len(split['shards'])} shards"
        )
        if window:
            say(
                f"{name}: {split['tokens'] // window:,} windows of {window} tokens,"
                f" {text / split['tokens']:.1%} filled with conversations;"
                f" {split['trained'] / text:.1%} of their tokens are trained on"
            )
        elif split["tokens"] <= data.seq_len:
            say(
                f"warning: {name} has fewer than data.seq_len + 1 = {data.seq_len + 1} tokens,"
                " which training needs; lower data.seq_len, or give it more documents"
            )
    for name, count in counts.get("moved", {}).items():
        say(f"{name}: {count:,} documents moved to it, so that no split is empty")
    for rule, count in counts["dropped"].items():
        if count:
            say(f"dropped: {count:,} {RULES[rule]}")
    if counts["dropped"].get("bad"):
        say(f"{directory / SKIPPED} lists the bad ones by file and row")
    if "truncated" in counts:
        say(f"truncated to {window} tokens: {counts['truncated']:,} conversations")
    if 2 * short > counts["written"] and not window:
        say(
            f"warning: the median document has under {packing.SHORT_DOCUMENT} tokens; if these are"
            ' lines of larger texts, set data.document to file, blank_line, {starts = "regex"} or'
            " {lines = 200}"
        )
    say(f"{directory}: ready")


def say(line: str) -> None:
    """Prints a line at once; if nobody reads any more, as after `| head`, the run goes on."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_recipe(data: DataConfig, tokenizer: Tokenizer, survey: Survey) -> Json:
    """What decides the bytes of the shards, as stated in the manifest.

    Keys that were added later appear only if they have an effect, since older manifests lack them.
    """
    later = ["deduplicate"] if data.deduplicate else []
    if data.on_error == "skip":
        later += ["on_error", "max_document_bytes"]
    if data.format == "instruct":
        later += ["format", "columns" if data.columns else "messages_column", "template"]
        later += ["train_on", "too_long", "seq_len"]
    names = ("sha256", "vocab_size", "bos_id", "eos_id")
    return {
        "version": DATASET_VERSION,
        "tokenizer": {name: getattr(tokenizer, name) for name in names},
        "sources": [
            {"name": source.name, "bytes": source.bytes}
            | ({"split": source.split} if source.split else {})
            for source in survey.sources
        ],
        **{n: getattr(data, n) for n in ("document", "text_column", "errors", "part_bytes")},
        "split": {
            "seed": data.split_seed,
            "val_fraction": data.val_fraction,
            "test_fraction": data.test_fraction,
        },
        **{name: getattr(data, name) for name in later},
    }


def is_ready(directory: Path, recipe: Json) -> bool:
    """Whether the dataset exists; UserError if another or a damaged one does."""
    if not (directory / "manifest.json").exists():
        return False
    manifest, _ = read_manifest(directory)
    made = {n: manifest[n] for n in manifest if n not in ("splits", "counts", "commits")}
    for name in recipe | made:
        found, wanted = made.get(name), recipe.get(name)
        if found and isinstance(wanted, list) and found != wanted:  # the first source that differs
            pairs = itertools.zip_longest(found, wanted)
            found, wanted = next(pair for pair in pairs if pair[0] != pair[1])
        if found != wanted:
            raise UserError(
                f"{directory} holds another dataset: {name} was {json.dumps(found)}, is"
                f" {json.dumps(wanted)}; --force replaces it, another data.dir keeps both"
            )
    return True


def verify(directory: Path) -> None:
    """Reads all of a dataset; UserError names a file that doesn't match the manifest."""
    _, files = read_manifest(directory)
    for name, (_, digest) in files.items():
        if file_sha256(directory / name) != digest:
            raise UserError(f"{directory / name}: damaged; --force prepares it again")
    shards = sum(name.endswith(".bin") for name in files)
    say(f"{directory}: {shards} shards match their checksums")


def read_manifest(directory: Path) -> tuple[Json, dict[str, tuple[int, str]]]:
    """The manifest, and what check_files returns; UserError if it is missing or damaged."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        return manifest, check_files(directory, manifest["splits"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run prepare.py") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; --force prepares it again") from None


def check_files(directory: Path, content: Json) -> dict[str, tuple[int, str]]:
    """The size and sha256 of each file of the splits; UserError if a file has another size."""
    files: dict[str, tuple[int, str]] = {}
    for shard in (shard for split in content.values() for shard in split["shards"]):
        name, tokens = shard["file"], shard["tokens"]
        files[name] = 2 * tokens, shard["sha256"]
        if "mask_sha256" in shard:
            files[name.removesuffix(".bin") + ".mask"] = tokens, shard["mask_sha256"]
    for name, (expected, _) in files.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else "no"
        if size != expected:
            wrong = f"{size} bytes instead of {expected}"
            raise UserError(f"{path}: {wrong}; --force prepares it again")
    return files


def open_work(build: Build, task: Task | None) -> dict[int, Json]:
    """Creates the directory of the parts, and returns the reports of those that are done.

    Parts of another recipe are discarded, but a task raises UserError: they may be in use.
    """
    work = build.worker.work
    if others := [path for path in work.parent.glob("*") if path != work]:
        left = f"{others[0]}: left by a run with other sources or settings"
        if task:
            raise UserError(f"{left}; run prepare.py once without --task, or remove {work.parent}")
        say(f"{left}; starting over")
        discard_work(build.directory, work)
    work.mkdir(parents=True, exist_ok=True)
    return read_reports(build, "")


def read_reports(build: Build, stage: str) -> dict[int, Json]:
    """The reports that a stage has written, of parts whose files are there."""
    paths = build.worker.work.glob(f"part-[0-9]*[0-9].{stage}json")
    reports = {int(path.name[5:].split(".")[0]): json.loads(path.read_bytes()) for path in paths}
    if len(reports) == len(build.parts) and not (build.directory / "manifest.json").exists():
        return reports  # a killed run may have begun to publish: some files may be shards by now
    file = build.worker.file
    return {
        index: report
        for index, report in reports.items()
        if all(file(index, stage, f"{split}.bin").exists() for split in report["splits"])
    }


def discard_work(directory: Path, kept: Path | None = None) -> None:
    """Removes all parts but those in `kept`; OSError for a file that prepare.py has not made."""
    root = directory / "parts"
    for work in [path for path in root.glob("*") if path != kept]:
        while work.exists():  # again if a task that is still running has added a file
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


def work_through(
    job: Callable[[Worker, Part], Json],
    worker: Worker,
    parts: list[Part],
    reports: dict[int, Json],
    verb: str,
) -> None:
    """Does a job on the parts that have no report yet, in many processes, and adds their reports.

    Raises:
        UserError: the first error of a worker, or that one was killed; all workers are stopped.
    """
    if not (todo := [part for part in parts if part.index not in reports]):
        return
    # Without a lock, since a worker that is killed would keep it.
    done = multiprocessing.RawArray("Q", todo[-1].index + 1)
    worker = worker._replace(run=secrets.token_hex(8), done=done)
    total, end, documents = sum(part.bytes for part in parts), len(reports) + len(todo), 0
    before = total - sum(part.bytes for part in todo)
    start, printed = time.monotonic(), 0.0
    count = min(worker.data.workers or available_cores(), len(todo))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(count, context, start_worker, (functools.partial(job, worker),))
    waiting = iter(todo)
    running: dict[Future, Part] = {}
    try:
        with tqdm(total=total, initial=before, unit="B", unit_scale=True, disable=None) as bar:
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
            f"a worker died in a part that begins with {' or '.join(files)}; if memory ran out,"
            " lower data.workers; the next run continues from here"
        ) from None
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown()
        for path in worker.work.glob(f"part-*.{worker.run}.tmp"):  # of workers that were stopped
            path.unlink(missing_ok=True)
    say(f"{verb} {documents:,} documents, {speed}")


def start_worker(job: Callable[[Part], Json]) -> None:
    """Makes this process a worker, which ends when its parent does."""
    global JOB
    JOB = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent kills its workers
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def run_job(part: Part) -> Json:
    return JOB(part)


def arrange_parts(build: Build, tokenized: list[Json]) -> list[Json]:
    """Drops duplicates and packs conversations, part by part; returns the new reports."""
    duplicates: dict[tuple[int, str], np.ndarray] = {}
    for split in SPLITS if build.worker.data.deduplicate else ():
        keys = [(i, split) for i, report in enumerate(tokenized) if split in report["splits"]]
        paths = [build.worker.file(index, "", split) for index, _ in keys]
        duplicates |= zip(keys, packing.find_duplicates(paths), strict=True)
    reports = read_reports(build, ARRANGED)
    worker = build.worker._replace(duplicates=duplicates)
    work_through(packing.arrange_part, worker, build.parts, reports, "arranged")
    return [reports[part.index] for part in build.parts]


def check_splits(build: Build, reports: list[Json], counts: Json) -> None:
    """UserError, after discarding the parts, if a split that was asked for got no document."""
    data, names = build.worker.data, splits.asked_splits(build.worker.data)
    given = [name for name in SPLITS[1:] if getattr(data, f"{name}_sources")]
    filled = {name for report in reports for name in report["splits"]}
    empty = [name for name in SPLITS if name in (*names, *given) and name not in filled]
    if not empty:
        return
    dropped = [f"{count} {RULES[rule]}" for rule, count in counts["dropped"].items() if count]
    beside = f", {' and '.join(dropped)} among them," if dropped else ""
    advice, first = "change data.sources, or the split's sources", ""
    edges = splits.merge_edges(report["edges"] for report in reports)
    texts = sum(map(len, edges.values()))
    if 0 < texts < len(names):
        fractions = [f"data.{name}_fraction = 0" for name in SPLITS if name in names][texts:]
        different = f"{texts} different text{'s' * (texts > 1)} can't fill {len(names)} splits"
        advice = f"{different}: set {' and '.join(fractions)}, or add more"
    if lists := sorted(build.worker.work.glob(f"part-*.{SKIPPED}")):
        bad = Bad(**json.loads(lists[0].read_bytes().splitlines()[0]))
        first = f" (the first bad one: {bad.message()})"
    discard_work(build.directory)  # the same parts would only lead to the same error
    raise UserError(
        f"the {empty[0]} split is empty: of {counts['read']} documents{beside} none fell into"
        f" it{first}; {advice}"
    )


def publish(build: Build, stage: str, reports: list[Json], counts: Json) -> Json:
    """Renames the parts' files to shards, and writes the manifest, which is returned.

    If this is killed, there is no manifest, and the next run publishes the rest.
    """
    directory, content = build.directory, {}
    (directory / "manifest.json").unlink(missing_ok=True)
    for split in SPLITS:
        shards: list[Json] = []
        for index, report in enumerate(reports):
            if split in report["splits"]:
                name = f"{split}-{len(shards):05d}"
                shards.append({"file": f"{name}.bin", **report["splits"][split]})
                for ending in (".bin", ".mask"):
                    path = build.worker.file(index, stage, split + ending)
                    if path.exists():
                        path.replace(directory / (name + ending))
        if shards:
            totals = [key for key, value in shards[0].items() if isinstance(value, int)]
            content[split] = {key: sum(shard[key] for shard in shards) for key in totals}
            content[split]["shards"] = shards
    try:
        files = check_files(directory, content)
    except UserError:
        discard_work(directory)  # so that the next run starts over
        raise
    for path in directory.iterdir():  # shards of a dataset that was here before
        ours = re.fullmatch(r"(train|val|test)-\d{5,}\.(bin|mask)", path.name)
        if ours and path.name not in files:
            path.unlink()
    if duplicates := sum(report.get("duplicates", 0) for report in reports):
        counts["dropped"]["duplicate"] = duplicates
        counts["written"] -= duplicates
    list_skipped(build)
    manifest = {**build.recipe, "splits": content, "counts": counts}
    if build.commits:
        manifest["commits"] = build.commits
    sync_directory(directory)
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1).encode())
    discard_work(directory)
    return manifest


def list_skipped(build: Build) -> None:
    """Lists bad documents in a file, one JSON object per line; no file if there are none."""
    path = build.directory / SKIPPED
    path.unlink(missing_ok=True)
    with packing.new_file(path, "new") as file:
        for one in sorted(build.worker.work.glob(f"part-*.{SKIPPED}")):
            file.write(one.read_bytes())
