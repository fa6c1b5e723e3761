"""prepare.py makes the same bytes however it is run, and never takes half a dataset for one.

Protected here, through the real command line: the bins and the manifest as DESIGN states them;
equal shards for any number of workers and tasks and after a kill; what exists stays until its
replacement is whole; each mistake is one line on stderr that names the place. Also --bad-steps.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

import corpus
from config import DataConfig, UserError
from prepare import verify
from tokenizer import Tokenizer

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
        command(project, *arguments), capture_output=True, text=True, timeout=60, **options
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
        expected = [row for row in rows if corpus.split_of(row, data) == split]
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
    """Waits for an event in a running program, at most a minute."""
    for _ in range(60_000):
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
    import prepare as program

    prepared(project, f"--data.dir={project}/straight")
    publish, replace = program.publish, program.Path.replace
    named = []

    def stop_at_the_fifth(path, target):
        named.append(target)
        if len(named) == 5:
            raise KeyboardInterrupt
        return replace(path, target)

    def interrupted(*arguments):
        monkeypatch.setattr(program.Path, "replace", stop_at_the_fifth)
        return publish(*arguments)

    monkeypatch.setattr(program, "publish", interrupted)
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
    _, stderr = process.communicate(timeout=30)
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
    _, stderr = process.communicate(timeout=30)
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
    outputs = [process.communicate(timeout=60)[0] for process in processes]
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
    assert len(task.communicate(timeout=30)[1].splitlines()) <= 1
    assert manifest(project / "data")["split"]["seed"] == 1
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
    assert "--force prepares anew" in line
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
        "no match": ({}, [f"--data.sources=['{project}/*.csv']"], "no file to read here"),
        "empty corpus": ({"corpus.jsonl": ""}, [], "the train split is empty: of 0 documents, 0 "),
        "only empty texts": (
            {"corpus.jsonl": '{"text": ""}\n'},
            [],
            "of 1 documents, 1 without text",
        ),
        "bad row": ({"corpus.jsonl": row * 900 + "{\n" + row * 900}, [], "corpus.jsonl, row 901: "),
        "no column": ({}, ["--data.text_column=body", *one], "row 1: no column 'body'; set"),
        "too large": ({}, ["--data.max_document_bytes=50", *one], "row 1: a document above"),
        "empty split": (
            {"corpus.jsonl": row * 20},
            [],
            " split is empty: of 20 documents, 0 without text, none fell into it",
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
        "two tasks": ({}, ["--task=0/2", "--task=1/2"], "--task goes alone"),
        "forced task": ({}, ["--task=0/2", "--force"], "goes alone, not --force --task=0/2"),
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


def skipped(project, **changed):
    """A record of a skipped step whose one window lies across two shards."""
    first, second = manifest(project / "data")["splits"]["train"]["shards"][:2]
    pieces = [
        {"shard": first["file"], "offset": first["tokens"] - 40, "tokens": 40},
        {"shard": second["file"], "offset": 0, "tokens": 25},
    ]
    step = {"step": 12, "reason": "spike", "loss": 5.25, "grad_norm": 1234.5}
    step |= {"windows": [{"window": 3, "pieces": pieces}], "dataset": f"{project}/data"}
    return json.dumps(step | changed) + "\n"


def test_bad_steps_are_printed_with_their_texts(project, tiny_tokenizer):
    run = project / "run"
    arguments = ["--bad-steps", f"--train.out_dir={run}"]
    assert prepared(project, *arguments) == f"{run}: no step was skipped\n"
    prepared(project)
    run.mkdir()
    failed = skipped(project, step=13, reason="non_finite", loss=None, grad_norm=None, windows=[])
    (run / "bad_steps.jsonl").write_text(skipped(project) + failed)
    lines = prepared(project, *arguments).split("\n")
    assert lines[0] == "step 12: spike, loss 5.25, gradient norm 1234"
    assert lines[-2] == "step 13: non_finite, loss not finite, gradient norm not finite"
    bins = [np.fromfile(project / "data" / f"train-0000{i}.bin", "<u2") for i in (0, 1)]
    places = [f"40 tokens of train-00000.bin from {len(bins[0]) - 40}", "25 tokens of train-00001"]
    assert lines[1].startswith(f"window 3 in {project}/data: {', '.join(places)}.bin from 0")
    decode = Tokenizer(tiny_tokenizer).decode
    text = decode(bins[0][-40:-1]) + "</s><s>" + decode(bins[1][1:25])
    assert "\r\n\t" in text
    assert lines[2:-2] == ["  | " + line for line in text.replace("\r", "\\r").split("\n")]


def test_bad_steps_that_do_not_fit_are_named(project):
    import prepare as program

    prepared(project)
    (project / "run").mkdir()
    record = project / "run" / "bad_steps.jsonl"
    piece = {"shard": "train-00000.bin", "offset": 10**6, "tokens": 5}
    records = {
        "bad_steps.jsonl, line 2: damaged": skipped(project) + '{"step": 1',
        "train-00000.bin: no 5 tokens from 1000000 on; was it prepared anew": skipped(
            project, windows=[{"window": 3, "pieces": [piece]}]
        ),
        "elsewhere: no dataset here": skipped(project, dataset=f"{project}/elsewhere"),
    }
    for message, text in records.items():
        record.write_text(text)
        with pytest.raises(UserError, match=message):
            program.main(
                [f"{project}/config.toml", "--bad-steps", f"--train.out_dir={project}/run"]
            )
