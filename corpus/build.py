"""From sources to a packed dataset, by many processes, and on machines that may stop at any time.

The corpus falls into parts (readers.py). Workers write a part's tokens to `parts/IDENTITY/`
and then its report, so a part with a report is done for good. Where documents are compared or
packed into windows, workers then arrange each part's files anew (packing.py). When all are done,
the files become the shards, numbered in the order of the parts, and the manifest, written last,
makes them a dataset. Files get their names when they are whole, and IDENTITY is a digest of all
that decides their content, so programs that write the same file, anywhere, write the same bytes.
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
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import (
    DATASET_VERSION,
    Config,
    DataConfig,
    UserError,
    available_cores,
    file_sha256,
    sync_directory,
    write_atomically,
)
from corpus import hub, inspection, readers
from corpus.locks import locked
from corpus.packing import (
    ARRANGED,
    COUNTS,
    MASK_COUNTS,
    SHORT_DOCUMENT,
    SKIPPED,
    Encoder,
    Json,
    arrange_part,
    find_duplicates,
    name_file,
    named,
    new_file,
    part_name,
    record_endings,
    tokenize_part,
)
from corpus.readers import Bad, Part
from corpus.sources import Survey
from tokenizer import Template, Tokenizer, configured_tokenizer

SPLITS = ("train", "val", "test")
RULES = {
    "empty": "empty documents",
    "bad": "bad documents",
    "no_response": "conversations without a response",
    "no_prompt": "conversations without a prompt",
    "too_long": "conversations longer than a window",
    "duplicate": "documents equal to an earlier one",
}
REPORT_VERSION = 2  # of what packing.py says of a part
PROGRESS_SECONDS = 30  # between progress lines where there is no terminal for a bar


class Task(NamedTuple):
    """One of `count` tasks that share the parts."""

    index: int
    count: int


def process(directory: Path, config: Config, task: Task | None, flags: list[str]) -> None:
    """Prepares, verifies or describes one dataset; those of a mixture have to be there."""
    if "--verify" in flags:
        verify(directory)
        return
    tokenizer = configured_tokenizer(config.tokenizer)
    if "--inspect" in flags:
        inspection.inspect(directory, tokenizer)
        return
    if config.data.mixture:
        check_part_of_mixture(directory, tokenizer)
        return
    data = hub.local_sources(config.data)
    survey = Survey(data)
    for line in survey.remarks():
        say(line)
    recipe = describe_recipe(data, tokenizer, survey)

    def is_ready() -> bool:
        if "--force" in flags or not (directory / "manifest.json").exists():
            return False
        check_existing(directory, recipe)
        return True

    try:
        # where there are parts, a run with --force may be replacing what looks ready
        if not ((task or not (directory / "parts").exists()) and is_ready()):
            template = Template(data.template, tokenizer) if data.format == "instruct" else None
            encoder = Encoder(data, tokenizer, template, {})
            parts = readers.plan(data, survey.sources)
            with contextlib.nullcontext() if task else alone(directory):
                if not is_ready():  # another run may have made it while this one waited
                    if "--force" in flags:  # parts may be of what the sources held before
                        discard_work(directory)
                    commits = hub.commits(config.data)
                    prepare(encoder, parts, survey, recipe, directory, task, commits)
                    return
                discard_work(directory)  # a kill may have left it
        say(f"{directory}: up to date")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"can't write {directory}: {error.strerror or error}{where}") from None


def alone(directory: Path) -> contextlib.AbstractContextManager[str]:
    """The lock of a run without --task: a second one waits until the first is through."""
    directory.mkdir(parents=True, exist_ok=True)
    return locked(
        directory / "prepare.lock",
        lambda holder: say(f"{directory}: waiting for {holder}, which prepares it"),
    )


def check_part_of_mixture(directory: Path, tokenizer: Tokenizer) -> None:
    """UserError unless a dataset that data.mixture names is there, whole and of this tokenizer."""
    from dataset import read_manifest  # here, as it loads torch, which preparing does not need

    read_manifest(directory, tokenizer.sha256)
    say(f"{directory}: ready (datasets of a mixture are prepared by configurations of their own)")


def prepare(
    encoder: Encoder,
    parts: list[Part],
    survey: Survey,
    recipe: Json,
    directory: Path,
    task: Task | None,
    commits: dict[str, str],
) -> None:
    """Writes the dataset, or a task's share of its parts.

    What the directory held before stays whole until all parts are done. No other run is to work in
    it, array tasks excepted.

    Raises:
        UserError: a document that can't be read, a worker that died, an empty split.
        OSError: the directory can't be written.
    """
    data = encoder.data
    work, reports = open_work(directory, recipe, parts, task)
    if reports:
        say(f"{directory}: {len(reports)} of {len(parts)} parts are done already")
    share = parts[task.index :: task.count] if task else parts
    job = functools.partial(tokenize_part, encoder, work)
    work_through(share, reports, job, data.workers, work, "tokenized")
    if task:
        name = f"task {task.index}/{task.count}"
        say(f"{directory}: {name} is done, {len(share)} of {len(parts)} parts")
        return
    edges = fill_splits(encoder, parts, reports, work)
    tokenized = [reports[part.index] for part in parts]
    counts = add_up(tokenized)
    if survey.unread:
        counts["not_read"] = survey.not_read
    with starting_over(directory):
        check_splits(data, tokenized, edges, counts, work)
    stage, shards = "", tokenized
    if record_endings(data):
        stage, shards = ARRANGED, arrange_parts(encoder, parts, tokenized, work)
    with starting_over(directory):
        manifest = publish(directory, work, stage, recipe, shards, counts, commits)
    describe_result(directory, manifest, sum(report["short"] for report in tokenized), data)


@contextlib.contextmanager
def starting_over(directory: Path) -> Iterator[None]:
    """Discards all work at a mistake that a run which goes on from here would only find again."""
    try:
        yield
    except UserError:
        discard_work(directory)
        raise


def fill_splits(
    encoder: Encoder, parts: list[Part], reports: dict[int, Json], work: Path
) -> dict[str, list[int]]:
    """Tokenizes anew what parts hold documents that have to move, lest a split stays empty.

    Changes `reports`.

    Returns:
        The lowest and highest hashes of each split, as readers.Splitter has them.
    """
    edges: dict[str, list[int]] = {}
    for report in reports.values():
        for split, digests in report["edges"].items():
            for digest in digests:
                readers.note_edge(edges, split, digest)
    moved = readers.fill_splits(edges, encoder.data)
    for index, report in [*reports.items()]:
        held = itertools.chain.from_iterable(report["edges"].values())
        if not moved.keys().isdisjoint(held) and not report["moved"]:  # else a run did it before
            del reports[index]
    job = functools.partial(tokenize_part, encoder._replace(moved=moved), work)
    work_through(parts, reports, job, encoder.data.workers, work, "split anew:")
    return edges


def add_up(reports: list[Json]) -> Json:
    """What became of the documents of all parts: read = written + dropped."""
    dropped = sum((Counter(report["dropped"]) for report in reports), Counter())
    read = sum(report["read"] for report in reports)
    counts = {"read": read, "written": read - dropped.total(), "dropped": {"empty": 0} | dropped}
    if truncated := sum(report["truncated"] for report in reports):
        counts["truncated"] = truncated
    if moved := sum((Counter(report["moved"]) for report in reports), Counter()):
        counts["moved"] = moved
    return counts


def describe_result(directory: Path, manifest: Json, short: int, data: DataConfig) -> None:
    """Says what a new dataset holds, and warns where that is hardly what was meant."""
    for name, split in manifest["splits"].items():
        text = split["tokens"] - split.get("filled", 0)
        say(
            f"{name}: {text:,} tokens in {split['documents']:,} documents,"
            f" {split['bytes'] / text:.2f} bytes a token, {len(split['shards'])} shards"
        )
        if "filled" in split:
            say(
                f"{name}: {split['tokens'] // manifest['seq_len']:,} windows of"
                f" {manifest['seq_len']}, {text / split['tokens']:.1%} filled with conversations;"
                f" {split['trained'] / text:.1%} of their tokens are trained on"
            )
        elif split["tokens"] <= data.seq_len:
            say(
                f"warning: {name} is shorter than one window of data.seq_len + 1 ="
                f" {data.seq_len + 1} tokens, which training needs; lower data.seq_len, or give it"
                " more documents"
            )
    counts = manifest["counts"]
    for name, count in counts.get("moved", {}).items():
        say(f"{name}: {count:,} documents moved to it, so that no split is empty")
    for rule, count in counts["dropped"].items():
        if count:
            say(f"dropped: {count:,} {RULES[rule]}")
    if counts["dropped"].get("bad"):
        say(f"{directory / SKIPPED} lists the bad ones by file and row")
    if "truncated" in counts:
        say(f"truncated to {manifest['seq_len']} tokens: {counts['truncated']:,} conversations")
    if 2 * short > counts["written"] and "format" not in manifest:
        say(
            f"warning: the median document has under {SHORT_DOCUMENT} tokens; if these are lines of"
            ' larger texts, set data.document to file, blank_line, {starts = "regex"} or'
            " {lines = 200}"
        )
    say(f"{directory}: ready")


def say(line: str) -> None:
    """Prints a line at once; a reader that has left, such as `| head`, stops nothing."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_recipe(data: DataConfig, tokenizer: Tokenizer, survey: Survey) -> Json:
    """What a dataset is made of, as its manifest states it: equal recipes give equal shards."""
    return {
        "version": DATASET_VERSION,
        "tokenizer": {
            name: getattr(tokenizer, name) for name in ("sha256", "vocab_size", "bos_id", "eos_id")
        },
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
        **{name: getattr(data, name) for name in further_keys(data)},
    }


def further_keys(data: DataConfig) -> list[str]:
    """The keys that decide what a dataset holds only where others are not left alone."""
    names = ["deduplicate"] if data.deduplicate else []
    if data.on_error == "skip":
        names += ["on_error", "max_document_bytes"]
    if data.format == "instruct":
        names += ["format", "columns" if data.columns else "messages_column", "template"]
        names += ["train_on", "too_long", "seq_len"]
    return names


def check_existing(directory: Path, recipe: Json) -> None:
    """UserError where the dataset that exists is another or damaged."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        check_shards(directory, manifest["splits"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; --force prepares anew") from None
    made = [name for name in manifest if name not in ("splits", "counts", "commits")]
    for name in dict.fromkeys([*recipe, *made]):
        found, wanted = manifest.get(name), recipe.get(name)
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
    from dataset import digests  # here, as it loads torch, which preparing does not need

    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        check_shards(directory, manifest["splits"])
        expected = digests(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{directory}: no whole manifest.json here; run prepare.py") from None
    for name, digest in expected.items():
        if file_sha256(directory / name) != digest:
            raise UserError(f"{directory / name}: damaged; --force prepares anew")
    say(f"{directory}: {len(all_shards(manifest['splits']))} shards match their checksums")


def all_shards(splits: Json) -> list[Json]:
    return [shard for split in splits.values() for shard in split["shards"]]


def shard_file(shard: Json, ending: str) -> str:
    return shard["file"].removesuffix(".bin") + ending


def check_shards(directory: Path, splits: Json) -> None:
    """UserError for the first shard whose size is not as stated."""
    for shard in all_shards(splits):
        wanted = {shard["file"]: 2 * shard["tokens"]}
        if "mask_sha256" in shard:
            wanted[shard_file(shard, ".mask")] = shard["tokens"]
        for name, expected in wanted.items():
            path = directory / name
            size = path.stat().st_size if path.exists() else "no"
            if size != expected:
                raise UserError(
                    f"{path}: {size} bytes instead of {expected}; --force prepares anew"
                )


def open_work(
    directory: Path, recipe: Json, parts: list[Part], task: Task | None
) -> tuple[Path, dict[int, Json]]:
    """The directory of the parts, made ready, and the reports of those that are finished.

    Raises:
        UserError: there are parts of another recipe, which a task must not discard.
    """
    known = [REPORT_VERSION, recipe, parts]
    identity = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    work = directory / "parts" / identity[:16]
    if others := [path for path in work.parent.glob("*") if path != work]:
        left = f"{others[0]}: left by a run with other sources or settings"
        if task:
            raise UserError(f"{left}; run prepare.py once without --task, or remove {work.parent}")
        say(f"{left}; starting over")
        discard_work(directory, work)
    work.mkdir(parents=True, exist_ok=True)
    return work, read_reports(directory, work, "", len(parts))


def read_reports(directory: Path, work: Path, stage: str, count: int) -> dict[int, Json]:
    """The reports of the parts that have come through a stage, and whose files are there."""
    paths = work.glob(f"part-[0-9]*[0-9].{stage}json")
    reports = {int(path.name[5:].split(".")[0]): json.loads(path.read_bytes()) for path in paths}
    if len(reports) < count or (directory / "manifest.json").exists():
        reports = {
            index: report
            for index, report in reports.items()
            if all(
                named(part_name(work, index, stage, split), ".bin").exists()
                for split in report["splits"]
            )
        }  # else publishing had begun: some files may be shards already
    return reports


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


def work_through(
    parts: list[Part],
    reports: dict[int, Json],
    job: Callable[[str, Sequence[int], Part], Json],
    workers: int,
    work: Path,
    verb: str,
) -> None:
    """Does the job on those of the parts that have no report yet, on all cores; adds their reports.

    The job gets a name for its temporary files, and an array for how much of each part is done.

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
    count = min(workers or available_cores(), len(todo))
    job = functools.partial(job, run, done)
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
    say(f"{verb} {documents:,} documents, {speed}")


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


def arrange_parts(
    encoder: Encoder, parts: list[Part], tokenized: list[Json], work: Path
) -> list[Json]:
    """Drops what occurred before and packs conversations, part by part; the parts' new reports."""
    data = encoder.data
    dropped: dict[tuple[int, str], np.ndarray] = {}
    if data.deduplicate:
        for split in SPLITS:
            keys = [(p.index, split) for p in parts if split in tokenized[p.index]["splits"]]
            names = [part_name(work, index, "", split) for index, split in keys]
            dropped |= dict(zip(keys, find_duplicates(names), strict=True))
    reports = read_reports(work.parent.parent, work, ARRANGED, len(parts))
    eos = encoder.tokenizer.eos_id.to_bytes(2, "little")
    splits = [list(report["splits"]) for report in tokenized]
    job = functools.partial(arrange_part, work, splits, dropped, data, eos)
    work_through(parts, reports, job, data.workers, work, "arranged")
    return [reports[part.index] for part in parts]


def check_splits(
    data: DataConfig,
    reports: list[Json],
    edges: dict[str, list[int]],
    counts: Json,
    work: Path,
) -> None:
    """UserError for a split that was asked for and got no document."""
    asked = {
        "train": True,
        "val": data.val_sources or data.val_fraction > 0,
        "test": data.test_sources or data.test_fraction > 0,
    }
    dropped = [f"{count} {RULES[rule]}" for rule, count in counts["dropped"].items() if count]
    beside = f", {' and '.join(dropped)} among them," if dropped else ""
    texts = sum(map(len, edges.values()))
    names = sorted(readers.asked_splits(data), key=SPLITS.index)
    advice = "change data.sources, or the split's sources"
    if 0 < texts < len(names):
        none = " and ".join(f"data.{name}_fraction = 0" for name in names[texts:])
        different = f"{texts} different text{'s' * (texts > 1)}"
        advice = f"{different} can't fill {len(names)} splits: set {none}, or add more"
    for split in SPLITS:
        if asked[split] and not any(split in report["splits"] for report in reports):
            raise UserError(
                f"the {split} split is empty: of {counts['read']} documents{beside} none"
                f" fell into it{first_bad(work)}; {advice}"
            )


def first_bad(work: Path) -> str:
    """Where and why the first bad document is one; nothing if there is none."""
    for path in sorted(work.glob(f"part-*.{SKIPPED}")):
        bad = Bad(**json.loads(path.read_bytes().splitlines()[0]))
        return f" (the first bad one: {bad.message()})"
    return ""


def publish(
    directory: Path,
    work: Path,
    stage: str,
    recipe: Json,
    reports: list[Json],
    counts: Json,
    commits: dict[str, str],
) -> Json:
    """Turns the files of finished parts into shards; the manifest, written last, which it returns.

    A kill in between leaves no manifest, and the next run publishes the rest.
    """
    splits: Json = {}
    names = set()
    (directory / "manifest.json").unlink(missing_ok=True)
    for split in SPLITS:
        shards = []
        for index, report in enumerate(reports):
            if split in report["splits"]:
                shard = {"file": f"{split}-{len(shards):05d}.bin", **report["splits"][split]}
                shards.append(shard)
                for ending in (".bin", ".mask") if "mask_sha256" in shard else (".bin",):
                    names.add(shard_file(shard, ending))
                    if (path := named(part_name(work, index, stage, split), ending)).exists():
                        path.replace(directory / shard_file(shard, ending))
        if shards:
            totals = (name for name in (*COUNTS, *MASK_COUNTS) if name in shards[0])
            splits[split] = {n: sum(shard[n] for shard in shards) for n in totals}
            splits[split]["shards"] = shards
    check_shards(directory, splits)
    for path in directory.iterdir():  # shards of a dataset that was here before
        ours = re.fullmatch(r"(train|val|test)-\d{5,}\.(bin|mask)", path.name)
        if ours and path.name not in names:
            path.unlink()
    if duplicates := sum(report.get("duplicates", 0) for report in reports):
        counts["dropped"]["duplicate"] = duplicates
        counts["written"] -= duplicates
    list_skipped(directory, work)
    manifest = {**recipe, "splits": splits, "counts": counts}
    if commits:
        manifest["commits"] = commits
    sync_directory(directory)
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1).encode())
    discard_work(directory)
    return manifest


def list_skipped(directory: Path, work: Path) -> None:
    """Writes the list of bad documents, a JSON object a line; none where there are none."""
    path = directory / SKIPPED
    if lists := sorted(work.glob(f"part-*.{SKIPPED}")):
        with new_file(path, "new") as file:
            for one in lists:
                with open(one, "rb") as source:
                    shutil.copyfileobj(source, file)
            name_file(file, path)
    else:
        path.unlink(missing_ok=True)
