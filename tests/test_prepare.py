"""prepare.py makes the same bytes however it is run, and never takes half a dataset for one.

Protected here, through the real command line: the bins and the manifest as DESIGN states them;
equal shards for any number of workers and tasks and after a kill; what exists stays until its
replacement is whole; each mistake is one line on stderr that names the place. Every document is
accounted for, and conversations keep their masks.
"""

import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare as program
from config import DataConfig, UserError
from corpus import build
from corpus.build import verify
from corpus.splits import Splitter, text_hash
from corpus.vocabulary import add_control_pieces
from tokenizer import Template, Tokenizer

VOCAB_SIZE = 600
WORDS = "def return import for while with class yield lambda try except 🦙 é".split()


def document(i: int) -> str:
    """Some 400 bytes of text that no other number gives."""
    return f"# {i}\r\n\t" + " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(80)) + "\n"


@pytest.fixture
def project(tmp_path, tiny_tokenizer):
    """A directory with a corpus of 1,500 rows and a configuration that cuts it into many parts."""
    rows = [document(i) for i in range(1500)] + ["", document(0)]
    lines = [json.dumps({"text": row}) + "\n" for row in rows]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    (tmp_path / "config.toml").write_text(
        f"""
        [tokenizer]
        path = "{tiny_tokenizer}"
        vocab_size = {VOCAB_SIZE}
        [data]
        sources = ["{tmp_path}/corpus.jsonl"]
        dir = "{tmp_path}/data"
        val_fraction = 0.1
        test_fraction = 0.05
        part_bytes = 50_000
        workers = 2
        """
    )
    return tmp_path


def command(project, *arguments):
    return [sys.executable, str(ROOT / "prepare.py"), f"{project}/config.toml", *arguments]


def prepare(project, *arguments, **options):
    return subprocess.run(
        command(project, *arguments), capture_output=True, text=True, timeout=240, **options
    )


def prepared(project, *arguments):
    result = prepare(project, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def refused(project, *arguments, **options):
    """The one line with which a mistake is reported."""
    result = prepare(project, *arguments, **options)
    assert result.returncode == 1, (result.stdout, result.stderr)
    (line,) = result.stderr.splitlines()
    assert line.startswith("prepare.py: error: ")
    return line


def manifest(directory):
    return json.loads((directory / "manifest.json").read_text())


def digests(directory):
    """Name and sha256 of every file of a dataset."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def split_documents(directory, split, tokenizer):
    """The documents of a split as read back from its bins."""
    ids = np.concatenate(
        [np.fromfile(path, dtype="<u2") for path in sorted(directory.glob(f"{split}-*.bin"))]
    )
    starts, stops = (np.flatnonzero(ids == i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    assert starts[0] == 0
    assert stops[-1] == len(ids) - 1
    assert (starts[1:] == stops[:-1] + 1).all()  # back to back, BOS once a document
    return [
        tokenizer.decode(ids[start + 1 : stop]) for start, stop in zip(starts, stops, strict=True)
    ]


def test_bins_and_manifest_hold_the_corpus_exactly(project, tiny_tokenizer):
    output = prepared(project)
    directory, tokenizer = project / "data", Tokenizer(tiny_tokenizer)
    data = DataConfig(val_fraction=0.1, test_fraction=0.05)
    found = manifest(directory)
    rows = [document(i) for i in [*range(1500), 0]]
    for split in ("train", "val", "test"):
        expected = [row for row in rows if Splitter(data, {}).split(row) == split]
        assert split_documents(directory, split, tokenizer) == expected
        entry = found["splits"][split]
        assert entry["documents"] == len(expected)
        assert entry["bytes"] == sum(len(row.encode()) for row in expected)
        assert entry["tokens"] == sum(shard["tokens"] for shard in entry["shards"])
        for i, shard in enumerate(entry["shards"]):
            assert shard["file"] == f"{split}-{i:05d}.bin"
            content = (directory / shard["file"]).read_bytes()
            assert len(content) == 2 * shard["tokens"]
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert f"{split}: {entry['tokens']:,} tokens" in output
    assert found["version"] == 1
    assert found["tokenizer"] == {
        "sha256": hashlib.sha256(tiny_tokenizer.read_bytes()).hexdigest(),
        "vocab_size": VOCAB_SIZE,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }
    size = (project / "corpus.jsonl").stat().st_size
    assert found["sources"] == [{"name": f"{project}/corpus.jsonl", "bytes": size}]
    assert found["document"] == "auto"
    assert found["split"] == {"seed": 0, "val_fraction": 0.1, "test_fraction": 0.05}
    assert found["counts"] == {"read": 1502, "written": 1501, "dropped": {"empty": 1}}
    shards = sum(len(entry["shards"]) for entry in found["splits"].values())
    assert len(list(directory.iterdir())) == shards + 1  # nothing else is left


def test_training_accepts_the_dataset(project, tiny_tokenizer):
    dataset = pytest.importorskip("dataset")
    prepared(project)
    dataset.read_manifest(project / "data", Tokenizer(tiny_tokenizer).sha256)


def test_shards_are_the_same_for_any_number_of_workers(project):
    for workers in (1, 2, 3):
        prepared(project, f"--data.workers={workers}", f"--data.dir={project}/{workers}")
    assert len(digests(project / "1")) > 20
    assert digests(project / "1") == digests(project / "2") == digests(project / "3")


def wait_until(happens, process):
    """Waits for an event in a running program, at most some minutes."""
    for _ in range(240_000):
        if happens():
            return
        assert process.poll() is None, "the program ended before"
        time.sleep(0.001)
    raise AssertionError("did not happen")


def workers_of(process):
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(path) as file:
        return [int(pid) for pid in file.read().split()]


def grow_corpus(project):
    """A corpus that takes long enough to be killed in the middle."""
    path = project / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in range(6000)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_goes_on_and_gives_the_same_shards(project):
    grow_corpus(project)
    prepared(project, f"--data.dir={project}/straight")
    parts = project / "data" / "parts"
    process = subprocess.Popen(command(project), stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(parts.glob("*/part-*.json"))) > 2, process)
    workers = workers_of(process)
    process.kill()
    process.wait()
    assert not (project / "data" / "manifest.json").exists()
    wait_for_end(workers)
    finished = [path.stem for path in parts.glob("*/part-*.json")]
    bins = [path for name in finished for path in parts.glob(f"*/{name}.*.bin")]
    done = {path.name: path.stat().st_mtime_ns for path in bins}
    assert len(done) > 2
    assert "parts are done already" in prepared(project)
    assert digests(project / "data") == digests(project / "straight")
    kept = {path.stat().st_mtime_ns for path in (project / "data").glob("*.bin")}
    assert set(done.values()) <= kept  # what was finished was not done again


def wait_for_end(pids):
    """Workers of a killed program end on their own within seconds."""
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}/exe") for pid in pids):
        assert time.monotonic() < end, "workers outlived the program"
        time.sleep(0.01)


def test_a_kill_while_shards_get_their_names_is_mended(project, monkeypatch):
    prepared(project, f"--data.dir={project}/straight")
    publish, replace = build.publish, build.Path.replace
    named = []

    def stop_at_the_fifth(path, target):
        named.append(target)
        if len(named) == 5:
            raise KeyboardInterrupt
        return replace(path, target)

    def interrupted(*arguments):
        monkeypatch.setattr(build.Path, "replace", stop_at_the_fifth)
        return publish(*arguments)

    monkeypatch.setattr(build, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program.main([f"{project}/config.toml"])
    monkeypatch.undo()
    assert len(list((project / "data").glob("*.bin"))) == 4
    assert not (project / "data" / "manifest.json").exists()
    prepared(project)
    assert digests(project / "data") == digests(project / "straight")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_dead_worker_ends_the_run(project):
    grow_corpus(project)
    process = subprocess.Popen(
        command(project), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    parts = project / "data" / "parts"
    wait_until(lambda: list(parts.glob("*/part-*.json")), process)
    workers = workers_of(process)
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 1
    assert f"a worker died in a part that begins with {project}/corpus.jsonl" in stderr
    assert len(stderr.splitlines()) == 1
    wait_for_end(workers)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_is_quiet(project):
    grow_corpus(project)
    process = subprocess.Popen(
        command(project), stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    wait_until(lambda: list((project / "data" / "parts").glob("*/part-*.json")), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, stderr = process.communicate(timeout=240)
    assert (process.returncode, stderr) == (130, b"")


def at_once(project, *tasks):
    """Starts tasks at the same moment; what each of them printed."""
    processes = [
        subprocess.Popen(
            command(project, f"--task={task}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in tasks
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(tasks), outputs
    return outputs


def test_tasks_at_once_give_the_same_shards(project):
    prepared(project, f"--data.dir={project}/straight")
    again = ["1/2", "0/2", "0/2", "1/2"]  # a job that was started twice: two write each part
    for tasks in (["0/1"], again, ["0/3", "1/3", "2/3"]):
        outputs = at_once(project, *tasks)
        for task, output in zip(tasks, outputs, strict=True):
            assert f"task {task} is done" in output
        assert [path.name for path in (project / "data").iterdir()] == ["parts"]
        output = prepared(project)
        assert "parts are done already" in output
        assert "tokenized" not in output
        assert digests(project / "data") == digests(project / "straight")
        shutil.rmtree(project / "data")


def test_a_task_of_a_finished_dataset_has_nothing_to_do(project):
    prepared(project)
    assert prepared(project, "--task=1/2") == f"{project}/data: up to date\n"
    assert "holds another dataset" in refused(project, "--task=1/2", "--data.split_seed=1")
    assert not (project / "data" / "parts").exists()


def test_a_task_leaves_work_of_another_recipe_alone(project):
    prepared(project, "--task=0/2")
    before = digests(next((project / "data" / "parts").iterdir()))
    line = refused(project, "--task=1/2", "--data.split_seed=1")
    assert "other sources or settings; run prepare.py once without --task, or remove" in line
    (work,) = (project / "data" / "parts").iterdir()
    assert digests(work) == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_goes_on_where_a_killed_task_was(project):
    grow_corpus(project)
    prepared(project, f"--data.dir={project}/straight")
    at_once(project, "1/2")
    parts = project / "data" / "parts"
    reports = len(list(parts.glob("*/part-*.json")))
    process = subprocess.Popen(command(project, "--task=0/2"), stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(parts.glob("*/part-*.json"))) > reports, process)
    workers = workers_of(process)
    process.kill()
    process.wait()
    wait_for_end(workers)
    (work,) = parts.iterdir()
    (work / "part-000000.train.bin.0123456789abcdef.tmp").write_text("of a task killed elsewhere")
    output = prepared(project)
    assert "parts are done already" in output
    assert "tokenized" in output
    assert digests(project / "data") == digests(project / "straight")


def test_a_run_with_other_settings_takes_nothing_from_a_live_task(project):
    grow_corpus(project)
    task = subprocess.Popen(
        command(project, "--task=0/1", "--data.workers=1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: list((project / "data" / "parts").glob("*/part-*.json")), task)
    assert "starting over" in prepared(project, "--data.split_seed=1")
    assert len(task.communicate(timeout=240)[1].splitlines()) <= 1
    assert manifest(project / "data")["split"]["seed"] == 1
    prepared(project, "--verify")


# --- several runs on one directory at once ---


def start(project, *arguments):
    """A run in the background."""
    return subprocess.Popen(
        command(project, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def halted(project):
    """A larger corpus, and a run that stands still in the middle of it."""
    grow_corpus(project)
    process = start(project)
    wait_until(lambda: list((project / "data" / "parts").glob("*/part-*.json")), process)
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.communicate()


def waiting(project, halted, *arguments):
    """A run in the background that waits for the one that stands still."""
    process = start(project, *arguments)
    line = process.stdout.readline()
    assert line.startswith(f"{project}/data: waiting for process {halted.pid} on "), line
    return process


def ended(process):
    """What it printed, what it said was wrong, and its exit code."""
    return *process.communicate(timeout=240), process.returncode


def test_forced_work_takes_nothing_of_a_killed_run(project, halted):
    """Its parts may be of what a source held before an edit that left its size as it was."""
    halted.kill()
    halted.wait()
    assert list((project / "data" / "parts").glob("*/part-*.json"))
    corpus = project / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("a", "o"))
    prepared(project, "--force")
    prepared(project, f"--data.dir={project}/straight")
    assert digests(project / "data") == digests(project / "straight")


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_runs_at_once_make_one_dataset(project, halted, force):
    """The later ones wait, and find it up to date; with --force each prepares it, in turn."""
    others = [waiting(project, halted, *force, f"--data.workers={count}") for count in (1, 3)]
    halted.send_signal(signal.SIGCONT)
    results = [ended(process) for process in (halted, *others)]
    assert [(errors, code) for _, errors, code in results] == [("", 0)] * 3
    for output, _, _ in results[1:]:
        assert output.endswith("ready\n" if force else f"{project}/data: up to date\n")
    prepared(project, f"--data.dir={project}/straight")
    assert digests(project / "data") == digests(project / "straight")


def test_a_run_that_waits_goes_on_where_a_killed_one_was(project, halted):
    other = waiting(project, halted)
    halted.kill()
    output, errors, code = ended(other)
    assert (errors, code) == ("", 0)
    assert "parts are done already" in output
    prepared(project, f"--data.dir={project}/straight")
    assert digests(project / "data") == digests(project / "straight")


def test_a_run_with_other_settings_at_once_is_refused(project, halted):
    """By the dataset that the first one made, which stays as it is."""
    other = waiting(project, halted, "--data.split_seed=1")
    halted.send_signal(signal.SIGCONT)
    assert ended(halted)[1:] == ("", 0)
    _, errors, code = ended(other)
    assert (errors.count("\n"), code) == (1, 1)
    assert "holds another dataset: split was" in errors
    prepared(project)
    prepared(project, "--verify")


def test_other_settings_start_over(project):
    bad = project / "corpus.jsonl"
    bad.write_text(bad.read_text() + "{\n")
    refused(project)
    assert list((project / "data" / "parts").glob("*/part-*.json"))
    bad.write_text(bad.read_text().removesuffix("{\n"))
    assert "starting over" in prepared(project, "--data.split_seed=1")
    assert manifest(project / "data")["split"]["seed"] == 1


def test_a_finished_dataset_is_up_to_date_and_never_overwritten_unasked(project):
    prepared(project)
    directory = project / "data"
    before = digests(directory)
    assert prepared(project, "--data.workers=1") == f"{directory}: up to date\n"

    line = refused(project, "--data.val_fraction=0.2")
    assert "holds another dataset: split was" in line
    assert "--force replaces it, another data.dir keeps both" in line
    with open(project / "corpus.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert f'sources was {{"name": "{project}/corpus.jsonl", "bytes"' in refused(project)
    assert digests(directory) == before

    # A failed run with --force leaves the old dataset as it was; a good one leaves no old shard.
    with open(project / "corpus.jsonl", "a") as file:
        file.write('{"text": 5}\n')
    assert "row 1504: 'text' is int" in refused(project, "--force")
    shutil.rmtree(directory / "parts")
    assert digests(directory) == before
    (project / "corpus.jsonl").write_text('{"text": "small corpus"}\n' * 3)
    prepared(project, "--force", "--data.val_fraction=0", "--data.test_fraction=0")
    assert set(digests(directory)) == {"manifest.json", "train-00000.bin"}


def test_a_damaged_dataset_is_named(project):
    prepared(project)
    path = project / "data" / "train-00003.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert f"{path}: {len(content) - 1} bytes instead of {len(content)}" in refused(project)
    path.unlink()
    assert f"{path}: no bytes instead of" in refused(project)
    (project / "data" / "manifest.json").write_text("{")
    assert "manifest.json: damaged" in refused(project)


def mistakes(project):
    """Name, files to write, overrides, and what the line on stderr says."""
    row = json.dumps({"text": document(1)}) + "\n"
    one = ["--data.workers=1"]  # the first row is read first
    return {
        "missing file": ({}, ["--data.sources=['corpos.jsonl']"], "corpos.jsonl: no such file"),
        "no match": ({}, [f"--data.sources=['{project}/*.csv']"], "*.csv: matches nothing"),
        "empty corpus": ({"corpus.jsonl": ""}, [], "the train split is empty: of 0 documents none"),
        "only empty texts": (
            {"corpus.jsonl": '{"text": ""}\n'},
            [],
            "of 1 documents, 1 empty documents among them, none",
        ),
        "bad row": ({"corpus.jsonl": row * 900 + "{\n" + row * 900}, [], "corpus.jsonl, row 901: "),
        "no column": ({}, ["--data.text_column=body", *one], "row 1: no column 'body'; set"),
        "too large": ({}, ["--data.max_document_bytes=50", *one], "row 1: a document above"),
        "one text": (
            {"corpus.jsonl": row * 20},
            [],
            " split is empty: of 20 documents none fell into it; 1 different text can't fill 3"
            " splits: set data.val_fraction = 0 and data.test_fraction = 0, or add more",
        ),
        "two texts": (
            {"corpus.jsonl": row * 20 + row.replace("# 1", "# 2") + '{"text": ""}\n'},
            [],
            "2 different texts can't fill 3 splits: set data.test_fraction = 0, or add more",
        ),
        "an empty split of its own": (
            {"empty.txt": ""},
            [f"--data.val_sources=['{project}/empty.txt']"],
            "change data.sources, or the split's sources",
        ),
        "other size": ({}, ["--tokenizer.vocab_size=601"], "has 600 pieces, but"),
        "too many": ({}, ["--tokenizer.vocab_size=70000"], "above 65,536"),
        "no tokenizer": ({}, [f"--tokenizer.path={project}/no.model"], "no.model: No such file"),
        "no model": (
            {"bad.model": "text"},
            [f"--tokenizer.path={project}/bad.model"],
            "not a SentencePiece model",
        ),
        "task too high": ({}, ["--task=4/4"], "I from 0 to N - 1, such as 0/4, not '4/4'"),
        "no task": ({}, ["--task=x"], "I from 0 to N - 1, such as 0/4, not 'x'"),
        "task alone": ({}, ["--task"], "unknown option --task; did you mean --task=I/N?"),
        "two tasks": ({}, ["--task=0/2", "--task=1/2"], "--task allows no other flag"),
        "forced task": ({}, ["--task=0/2", "--force"], "no other flag, got --force --task=0/2"),
        "typo": ({}, ["--data.worker=2"], "did you mean data.workers?"),
        "unwritable": ({}, ["--data.dir=/proc/nothing/data"], "can't write /proc/nothing/data"),
        "not ours": ({"data/parts/mine.txt": "mine"}, [], "can't write"),
    }


@pytest.mark.parametrize("name", list(mistakes("")))
def test_a_mistake_is_one_line(project, name):
    files, overrides, message = mistakes(project)[name]
    for file, content in files.items():
        (project / file).parent.mkdir(parents=True, exist_ok=True)
        (project / file).write_text(content)
    assert message in refused(project, *overrides)
    assert not (project / "data" / "manifest.json").exists()


def test_what_is_not_read_is_told_and_stated(project):
    """Beside the sources, in the output and in the manifest; it is no part of what they are."""
    source = f"--data.sources=['{project}/corpus']"
    (project / "corpus").mkdir()
    (project / "corpus.jsonl").rename(project / "corpus" / "a.jsonl")
    prepared(project, source, f"--data.dir={project}/alone")
    os.mkfifo(project / "corpus" / "b.jsonl")
    for name in ("wiki_00", "wiki_01", "c.arrow"):
        (project / "corpus" / name).write_text("text")
    (project / "corpus" / "latest").symlink_to(".")
    link = f"{project}/corpus/latest is {project}/corpus"
    told = (
        f"not read: 2 without an ending ({project}/corpus/wiki_00, …), 1 .arrow"
        f" ({project}/corpus/c.arrow), 1 FIFO ({project}/corpus/b.jsonl)\n"
        f"links to what is read already, left out: 1 ({link})\n"
    )
    assert prepared(project, source).startswith(told)
    counts = {"without an ending": 2, ".arrow": 1, "FIFO": 1}
    assert manifest(project / "data")["counts"].pop("not_read") == counts
    assert "not_read" not in manifest(project / "alone")["counts"]
    for name in ("data", "alone"):
        assert prepared(project, source, f"--data.dir={project}/{name}") == (
            f"{told}{project}/{name}: up to date\n"
        )
    alone, data = digests(project / "alone"), digests(project / "data")
    assert alone.pop("manifest.json") != data.pop("manifest.json")
    assert alone == data
    output = prepared(project, source, "--inspect")
    words = "not read 4 files beside the sources: 2 without an ending, 1 .arrow, 1 FIFO"
    assert words in [" ".join(line.split()) for line in output.splitlines()]


def test_training_text_under_another_name_is_no_validation_text(project):
    (project / "latest").symlink_to(".")
    os.link(project / "corpus.jsonl", project / "held_out.jsonl")
    for name in ("latest/corpus.jsonl", "held_out.jsonl", "data/../corpus.jsonl"):
        (project / "data").mkdir(exist_ok=True)
        line = refused(project, f"--data.val_sources=['{project}/{name}']")
        assert line.endswith(
            f"{project}/{name} and {project}/corpus.jsonl are one file, which is in the sources of"
            " two splits; name it in one"
        )
        assert not (project / "data" / "manifest.json").exists()


def test_text_that_is_not_utf8_names_file_and_row(project):
    rows = [document(i).encode() for i in range(500)]
    rows[123] = b"caf\xe9\n"
    (project / "corpus.txt").write_bytes(b"".join(rows).replace(b"\r\n", b" "))
    arguments = [f"--data.sources=['{project}/corpus.txt']", "--data.document=line"]
    assert f"{project}/corpus.txt, row 124: not UTF-8 (b'\\xe9')" in refused(project, *arguments)
    prepared(project, *arguments, "--data.errors=replace")


def test_a_full_disk_is_named_and_leaves_no_dataset(project):
    def limit_files():  # stands for a disk that is full: writing fails in the middle of a file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    line = refused(project, preexec_fn=limit_files)
    assert f"can't write {project}/data" in line
    assert not (project / "data" / "manifest.json").exists()
    assert not list((project / "data").rglob("*.tmp"))
    prepared(project)


def test_a_tokenizer_without_room_in_uint16_is_refused_before_any_work(project, tiny_tokenizer):
    model = tiny_tokenizer.read_bytes()
    for i in range(65_537 - VOCAB_SIZE):  # messages merge: pieces are field 1, their text field 1
        piece = b"\x0a" + bytes([len(b"<%d>" % i)]) + b"<%d>" % i + b"\x18\x03"
        model += b"\x0a" + bytes([len(piece)]) + piece
    (project / "large.model").write_bytes(model)
    assert "65537 pieces" in refused(project, f"--tokenizer.path={project}/large.model")
    assert not (project / "data").exists()


def test_short_documents_are_warned_of(project):
    assert "warning" not in prepared(project)
    (project / "corpus.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    arguments = [f"--data.sources=['{project}/corpus.txt']", f"--data.dir={project}/lines"]
    assert "warning: the median document has" in prepared(
        project, *arguments, "--data.document=line"
    )


def test_the_main_program_does_without_torch():
    code = "import prepare, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_verify_reads_every_byte(project):
    """A random flipped byte, or a random cut, in each shard: 200 trials, none accepted."""
    prepared(project)
    directory = project / "data"
    shards = sorted(directory.glob("*.bin"))
    generator = random.Random(0)
    for trial in range(200):
        shard = shards[trial % len(shards)]
        content = shard.read_bytes()
        damaged, place = bytearray(content), generator.randrange(len(content))
        if trial % 4 < 2:
            damaged[place] ^= generator.randrange(1, 256)
        else:
            del damaged[place:]
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=shard.name):
            verify(directory)
        shard.write_bytes(content)
    verify(directory)


def test_verify_finds_one_flipped_byte(project):
    prepared(project)
    assert "match their checksums" in prepared(project, "--verify")
    shard = sorted((project / "data").glob("train-*.bin"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert f"{shard}: damaged" in refused(project, "--verify")
    shard.write_bytes(content[:-1])
    assert str(shard) in refused(project, "--verify")
    (shard.parent / "manifest.json").unlink()
    assert "run prepare.py" in refused(project, "--verify")


# --- few documents ---

SPLITS = "val test train"  # in the order of hashes
FEW = {
    "the default": (3, ["--data.val_fraction=0.01", "--data.test_fraction=0"], "val train"),
    "three splits": (3, ["--data.val_fraction=0.001", "--data.test_fraction=0.001"], SPLITS),
    "one each": (2, ["--data.val_fraction=0.5", "--data.test_fraction=0"], "val train"),
    "nearly all held out": (4, ["--data.val_fraction=0.98", "--data.test_fraction=0.01"], SPLITS),
    "nearly all tested": (5, ["--data.val_fraction=0.0001", "--data.test_fraction=0.99"], SPLITS),
    "none held out": (1, ["--data.val_fraction=0", "--data.test_fraction=0"], "train"),
}


@pytest.mark.parametrize("name", FEW)
def test_of_few_documents_each_split_gets_one(project, tiny_tokenizer, name):
    """By their hashes, in the order val, test, train: the same however it is prepared."""
    count, keys, splits = FEW[name]
    keys = [*keys, "--data.part_bytes=300"]
    texts = [document(i) for i in range(count)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (project / "corpus.jsonl").write_text(rows * 2)  # equal texts stay together
    output = prepared(project, *keys)
    tokenizer, content = Tokenizer(tiny_tokenizer), manifest(project / "data")
    found = {s: split_documents(project / "data", s, tokenizer) for s in content["splits"]}
    assert {*found} == {*splits.split()}
    hashes = {s: [text_hash(text, b"0") for text in found[s]] for s in found}
    for low, high in itertools.pairwise(splits.split()):
        assert max(hashes[low]) < min(hashes[high])
    for split, held in found.items():
        assert held == [text for text in texts * 2 if text in held], split
    assert content["counts"]["read"] == content["counts"]["written"] == 2 * count
    for split, moved in content["counts"].get("moved", {}).items():
        assert f"{split}: {moved} documents moved to it, so that no split is empty" in output

    for index in range(3):
        prepared(project, *keys, f"--task={index}/3", f"--data.dir={project}/tasks")
    prepared(project, *keys, f"--data.dir={project}/tasks", "--data.workers=1")
    assert digests(project / "tasks") == digests(project / "data")


def test_few_conversations_fill_the_splits_too_and_after_a_kill(chats, monkeypatch):
    project, arguments = chats
    rows = [json.dumps({"ask": f"{i}?", "reply": document(i)[:50]}) + "\n" for i in (1, 2, 3, 3)]
    (project / "corpus.jsonl").write_text("".join(rows))
    arguments += ["--data.val_fraction=0.001", "--data.test_fraction=0.001", "--data.workers=1"]
    arguments += ["--data.deduplicate=true", "--data.part_bytes=60"]
    prepared(project, *arguments, f"--data.dir={project}/straight")
    content = manifest(project / "straight")
    assert [content["splits"][split]["documents"] for split in ("train", "val", "test")] == [1] * 3
    assert content["counts"]["dropped"]["duplicate"] == 1
    monkeypatch.setattr(build, "arrange_parts", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if not (child := os.fork()):  # dies when they have moved
        program.main([f"{project}/config.toml", *arguments])
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (work,) = (project / "data" / "parts").iterdir()
    reports = [json.loads(path.read_text()) for path in sorted(work.glob("part-*.json"))]
    moved = [index for index, report in enumerate(reports) if report["moved"]]
    assert len(moved) >= 2
    (work / f"part-{moved[0]:06d}.json").unlink()  # as if that one had not been reached
    prepared(project, *arguments)
    assert digests(project / "data") == digests(project / "straight")


# --- documents of any kind, conversations, duplicates, bad rows ---

MARKERS = "<s> </s> <unk> <|system|> <|user|> <|assistant|> <|end|>".split()
TEXTS = st.text() | st.lists(st.sampled_from([*MARKERS, "\u2581", "\r\n", "\0", " "])).map("".join)
# Repeated: hypothesis refuses to draw so many characters one by one.
LONG = st.builds(str.__mul__, st.text("aé🦙", min_size=1), st.integers(2000, 4000))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS | LONG, min_size=1, max_size=40))
def test_any_text_comes_back_from_the_bins(project, chat_tokenizer, texts):
    """Control tokens in a text stay text. U+2581, SentencePiece's sign for a space, becomes one."""
    (project / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    keys = ["--data.val_fraction=0", "--data.test_fraction=0", "--data.workers=1", "--force"]
    try:
        program.main([f"{project}/config.toml", *keys, *chat_keys(chat_tokenizer)])
    except UserError:  # the train split is empty
        assert not any(texts)
        return
    tokenizer = Tokenizer(chat_tokenizer)
    found = split_documents(project / "data", "train", tokenizer)
    assert found == [text.replace("\u2581", " ") for text in texts if text]
    assert manifest(project / "data")["counts"]["dropped"] == {"empty": texts.count("")}


@pytest.fixture(scope="session")
def chat_tokenizer(tiny_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "tokenizer.model"
    path.write_bytes(add_control_pieces(tiny_tokenizer.read_bytes(), MARKERS[3:]))
    return path


def chat_keys(path):
    return [f"--tokenizer.path={path}", f"--tokenizer.vocab_size={Tokenizer(path).vocab_size}"]


def conversation(i):
    """What a row of the corpus asks and answers; some have no answer, one is far too long."""
    if i == 77:
        return "why?", document(i) * 5
    question = document(i)[: 20 + i * 37 % 200]
    return question, "" if i % 40 == 3 else document(i + 5000)[: 10 + i * 53 % 150]


SEQ_LEN = 256


@pytest.fixture
def chats(project, chat_tokenizer):
    """The project with conversations, and the arguments that prepare them."""
    rows = [conversation(i) for i in range(400)] + [conversation(5), ("", None), ("", "yes")]
    lines = [json.dumps({"ask": ask, "reply": reply}) + "\n" for ask, reply in rows]
    (project / "corpus.jsonl").write_text("".join(lines))
    columns = '--data.columns={user = "ask", assistant = "reply"}'
    keys = ["--data.format=instruct", columns, f"--data.seq_len={SEQ_LEN}"]
    return project, [*keys, "--data.part_bytes=20000", *chat_keys(chat_tokenizer)]


def windows_of(directory, split):
    names = sorted(directory.glob(f"{split}-*.bin"))
    ids = np.concatenate([np.fromfile(name, "<u2") for name in names])
    mask = np.concatenate([np.fromfile(name.with_suffix(".mask"), np.uint8) for name in names])
    assert len(ids) == len(mask)
    return ids.reshape(-1, SEQ_LEN), mask.reshape(-1, SEQ_LEN)


def test_conversations_are_packed_whole_with_their_masks(chats, chat_tokenizer):
    project, arguments = chats
    output = prepared(project, *arguments)
    tokenizer = Tokenizer(chat_tokenizer)
    template = Template(DataConfig().template, tokenizer)
    expected, truncated = Counter(), 0
    for ask, reply in [conversation(i) for i in [*range(400), 5]]:
        if reply:
            ids, mask = template.render([("user", ask), ("assistant", reply)], "responses")
            if len(ids) > SEQ_LEN:
                truncated += 1
                ids, mask = ids[:SEQ_LEN].copy(), mask[:SEQ_LEN].copy()
                ids[-1], mask[-1] = tokenizer.eos_id, 0
            expected[ids.tobytes(), mask.tobytes()] += 1
    found = Counter()
    content = manifest(project / "data")
    for split in ("train", "val", "test"):
        fill = 0
        for window, mask in zip(*windows_of(project / "data", split), strict=True):
            starts = np.flatnonzero(window == tokenizer.bos_id)
            assert starts[0] == 0
            for start, stop in zip(starts, [*starts[1:], SEQ_LEN], strict=True):
                end = start + int(np.argmax(window[start:stop] == tokenizer.eos_id)) + 1
                found[window[start:end].tobytes(), mask[start:end].tobytes()] += 1
                fill += stop - end
                assert (window[end:stop] == tokenizer.eos_id).all()
                assert not mask[end:stop].any()
        entry = content["splits"][split]
        assert entry["filled"] == fill
        assert entry["trained"] == windows_of(project / "data", split)[1].sum()
    assert found == expected
    counts = content["counts"]
    assert counts["dropped"] == {"empty": 1, "no_prompt": 1, "no_response": 10}
    assert counts["truncated"] == truncated > 0
    assert counts["read"] == 403 == counts["written"] + 12
    assert sum(s["documents"] for s in content["splits"].values()) == counts["written"]
    assert content["seq_len"] == SEQ_LEN
    assert content["template"] == DataConfig().template
    assert "dropped: 10 conversations without a response" in output
    assert f"truncated to 256 tokens: {truncated} conversations" in output
    entry = content["splits"]["train"]
    assert f"{1 - entry['filled'] / entry['tokens']:.1%} filled" in output
    prepared(project, *arguments, "--verify")
    (project / "data" / "train-00000.mask").write_bytes(b"")
    assert "train-00000.mask: 0 bytes instead of" in refused(project, *arguments)


def test_conversations_give_the_same_shards_however_they_are_prepared(chats):
    project, arguments = chats
    arguments += ["--data.deduplicate=true"]
    prepared(project, *arguments, "--data.workers=1", f"--data.dir={project}/one")
    for index in range(3):
        prepared(project, *arguments, f"--task={index}/3")
    prepared(project, *arguments)
    assert digests(project / "one") == digests(project / "data")
    assert manifest(project / "one")["counts"]["dropped"]["duplicate"] == 1


def test_a_kill_while_parts_are_arranged_is_mended(chats, monkeypatch):
    project, arguments = chats
    prepared(project, *arguments, f"--data.dir={project}/straight")
    monkeypatch.setattr(build, "publish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if not (child := os.fork()):  # dies between the two stages' ends and the manifest
        program.main([f"{project}/config.toml", *arguments])
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (work,) = (project / "data" / "parts").iterdir()
    (work / "part-000001.arranged.json").unlink()  # as if that one had not been reached
    prepared(project, *arguments)
    assert digests(project / "straight") == digests(project / "data")


def test_another_kind_of_dataset_is_never_up_to_date(chats):
    project, arguments = chats
    prepared(project, *arguments, "--data.deduplicate=true")
    assert "deduplicate was true, is null" in refused(project, *arguments)
    tokenizer = arguments[-2:]
    text = ["--data.text_column=reply", "--data.part_bytes=20000", *tokenizer]
    assert "holds another dataset" in refused(project, *text)


def test_longer_conversations_may_be_dropped(chats):
    project, arguments = chats
    prepared(project, *arguments, f"--data.dir={project}/cut")
    prepared(project, *arguments, "--data.too_long=drop")
    cut, counts = (manifest(project / name)["counts"] for name in ("cut", "data"))
    assert counts["dropped"] == cut["dropped"] | {"too_long": cut["truncated"]}
    assert "truncated" not in counts


def test_duplicates_are_dropped_but_for_the_first(project, tiny_tokenizer):
    prepared(project, f"--data.dir={project}/all")
    output = prepared(project, "--data.deduplicate=true")
    assert "dropped: 1 documents equal to an earlier one" in output
    counts = manifest(project / "data")["counts"]
    assert counts == {"read": 1502, "written": 1500, "dropped": {"empty": 1, "duplicate": 1}}
    tokenizer = Tokenizer(tiny_tokenizer)
    for split in ("train", "val", "test"):
        kept = list(dict.fromkeys(split_documents(project / "all", split, tokenizer)))
        assert split_documents(project / "data", split, tokenizer) == kept


def test_bad_rows_are_skipped_counted_and_listed(project):
    lines = (project / "corpus.jsonl").read_bytes().splitlines(keepends=True)
    lines[700] = b'{"text": 7}\n'
    lines[1200] = b'{"text": "caf\xe9"}\n'
    (project / "corpus.jsonl").write_bytes(b"".join(lines))
    assert "corpus.jsonl, row 701: 'text' is int, not text" in refused(project)
    output = prepared(project, "--data.on_error=skip")
    assert "dropped: 2 bad documents" in output
    listed = project / "data" / "skipped.jsonl"
    assert f"{listed} lists the bad ones by file and row" in output
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in rows] == [
        (f"{project}/corpus.jsonl", 701),
        (f"{project}/corpus.jsonl", 1201),
    ]
    assert "is int, not text" in rows[0]["reason"]
    assert "not UTF-8" in rows[1]["reason"]
    counts = manifest(project / "data")["counts"]
    assert counts == {"read": 1502, "written": 1499, "dropped": {"empty": 1, "bad": 2}}
    good = [line for number, line in enumerate(lines) if number not in (700, 1200)]
    (project / "corpus.jsonl").write_bytes(b"".join(good))
    prepared(project, "--force")
    assert not listed.exists()
    assert manifest(project / "data")["counts"]["written"] == 1499
