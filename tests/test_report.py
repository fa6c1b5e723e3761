"""Protects what people see of runs: pages that hold all there is, show every spike, execute nothing
that a run's files say, and are read from whatever a job left behind. Chromium opens the pages."""

import contextlib
import csv
import html
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
from training import ENVIRONMENT, ROOT, overrides, rocket, rows, started, status, until

from config import LogConfig, UserError, build_config, dump_toml
from preflight import check_inputs
from tools import page, report

HOSTILE = (
    "</pre></script><script>document.title='executed'</script><img src=x onerror=alert(1)>\"'&"
)
VOID = {"meta", "input", "br", "img"}
TOKENS = 1000


def training_row(step, loss=None, **more):
    place = {"step": step, "tokens": step * TOKENS, "hours": step / 100}
    numbers = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 5e3, "memory_gb": 1.0}
    return place | {"loss": 9 / (1 + step / 50) + 1 if loss is None else loss} | numbers | more


def evaluation_row(step, loss):
    place = {"step": step, "tokens": step * TOKENS, "hours": step / 100}
    scores = {"val_loss": loss, "val_perplexity": math.exp(loss), "val_bits_per_byte": loss / 3}
    return place | scores


def job_row(step, ranks=2, **more):
    place = {"step": step, "tokens": step * TOKENS, "hours": step / 100}
    known = {"device": "cuda", "host": "node1", "commit": "abc" * 14, "max_steps": 100}
    return place | {"ranks": ranks} | known | more


def make_run(path, steps=100, val_losses=(5.0, 3.0, 2.0), **config):
    """A run directory as training leaves it, with evaluations spread evenly."""
    path.mkdir(parents=True)
    tables = {"train": {"max_steps": 100, "out_dir": str(path)}}
    for key, value in config.items():
        section, name = key.split("__")
        tables.setdefault(section, {})[name] = value
    (path / "config.toml").write_text(dump_toml(build_config(tables)))
    found = [training_row(step) for step in range(1, steps + 1)]
    for index, loss in enumerate(val_losses):
        found.append(evaluation_row((index + 1) * steps // len(val_losses), loss))
    found.sort(key=lambda row: row["step"])
    write_rows(path / "metrics.jsonl", found)
    write_rows(path / "jobs.jsonl", [job_row(0)])
    (path / "status.json").write_text('{"state": "finished", "reason": null, "step": 100}')
    sample = {"prompt": "def f(", "prediction": "self):", "truth": "x):"}
    written = {"prompt": "class ", "continuation": "Tree:"}
    samples = [{"step": step, **row} for step in (50, 100) for row in (written, sample)]
    write_rows(path / "samples.jsonl", samples)
    return path


def write_rows(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


class Page(HTMLParser):
    """A page as a browser without JavaScript has it; fails on an element that is not closed."""

    def __init__(self, content):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(content.decode())
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def charts(self, axis):
        return [svg for svg in self.all("svg") if svg.get("class") == f"by-{axis}"]


def page_of(path):
    return Page(report.report(read(path)))


def read(path):
    run = report.read_run(path)
    report.name_runs([run])
    return run


def program(*arguments, cwd=None):
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=240, env=ENVIRONMENT
    )


def test_a_page_shows_a_run_and_needs_nothing_else(tmp_path):
    path = make_run(tmp_path / "tiny", optimizer__learning_rate=1e-3)
    done = program(path)
    assert done.returncode == 0, done.stderr
    content = (path / "report.html").read_bytes()
    shown = Page(content)
    for words in ("finished", "100 of 100", "100k", "abcabcabcabc", "def f(", "self):", "x):"):
        assert words in shown.text
    assert "What the model writes It goes on from the prompt by itself" in shown.text
    assert "Prompt 1 class after continuation step 50 Tree: step 100 Tree:" in shown.text
    assert "One-step predictions, which are not a text that it writes" in shown.text
    assert "Prompt 1 def f( after prediction step 50 self): step 100 self): truth x):" in shown.text
    assert "GPU-hours 2 2 × cuda" in shown.text
    assert "Best validation loss 2 at step 100 Bits per byte 0.6667" in shown.text
    assert "optimizer.learning_rate 0.001 0.0006" in shown.text
    for axis in page.AXES:
        titles = [svg["aria-label"].partition(" against")[0] for svg in shown.charts(axis)]
        expected = ["Loss", "Validation", "Learning rate", "Gradient norm", "Throughput"]
        assert titles == [*expected, "Peak memory"]
    assert all(cell["scope"] in ("row", "col") for cell in shown.all("th"))
    used = {name for _, attributes in shown.elements for name in attributes}
    assert not used & {"src", "href", "srcset", "action", "onclick", "onload"}
    assert b"http:" not in content
    assert b"https:" not in content
    assert b"url(" not in content
    assert not list(path.glob("*.tmp"))


def test_nothing_of_a_run_is_taken_for_html(tmp_path):
    path = make_run(tmp_path / "<script>x<b>&", data__sources=[HOSTILE], data__dir=HOSTILE)
    sample = {"step": 1, "prompt": HOSTILE, "prediction": HOSTILE + "\x00\ud800\x1b", "truth": 7}
    write_rows(path / "samples.jsonl", [sample, {"step": 2, "prediction": [HOSTILE]}])
    write_rows(path / "jobs.jsonl", [job_row(0, host=HOSTILE, commit=[HOSTILE]), job_row(50)])
    write_rows(path / "bad_steps.jsonl", [{"step": 3, "reason": HOSTILE, "loss": HOSTILE}])
    (path / "status.json").write_text(json.dumps({"state": HOSTILE, "time": [HOSTILE]}))
    other = make_run(tmp_path / "other")
    run = read(path)
    for content in (report.report(run), report.comparison([run, read(other)])):
        shown = Page(content)
        assert len(shown.all("script")) == 1
        assert not shown.all("img")
        assert not shown.all("b") or "<b>&amp;" not in content.decode()
        assert "document.title='executed'" in shown.text
        assert "<script>x<b>&" in shown.text


def test_spikes_survive_a_million_steps(tmp_path):
    path = make_run(tmp_path / "long")
    steps = range(10, 1_000_001, 20)
    spikes = {400_010: 77.0, 777_770: 0.25}
    write_rows(path / "metrics.jsonl", (training_row(s, spikes.get(s, 2.0)) for s in steps))
    run = read(path)
    points = run.curves["loss"].points()
    assert len(points) <= 2 * report.STRETCHES + 1
    assert {point[0]: point[3] for point in points if point[3] != 2.0} == spikes
    assert points[-1][0] == steps[-1]
    content = report.report(run)
    assert len(content) < 500_000
    svg = content.decode().split('class="by-steps"')[1]
    drawn = re.search(r'polyline class="s0" points="([^"]*)"', svg)[1]
    heights = [float(point.split(",")[1]) for point in drawn.split()]
    assert min(heights) < page.TOP + 10  # the upper spike reaches the top
    assert max(heights) > page.HEIGHT - page.BOTTOM - 10


def test_memory_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for index, count in enumerate((4_000, 40_000)):
        path = make_run(tmp_path / str(index))
        write_rows(path / "metrics.jsonl", (training_row(s, s % 7) for s in range(1, count + 1)))
        write_rows(path / "bad_steps.jsonl", ({"step": s} for s in range(1, count + 1)))
        samples = ({"step": s, "prompt": "a" * 500} for s in range(1, count // 10))
        write_rows(path / "samples.jsonl", samples)
        tracemalloc.start()
        report.read_run(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_what_a_job_left_behind_is_read(tmp_path):
    path = make_run(tmp_path / "torn")
    rest = [training_row(1), training_row(2) | {"loss": None, "skipped": "non_finite"}]
    lines = [json.dumps(row) for row in rest]
    bad = ["nonsense", "[1]", '{"loss": 1}', '{"step": "x"}', '{"step": NaN}', '{"step": -1}']
    bad += ['{"step": 3, "tokens": 1e999, "hours": 1}', "[" * 100_000]
    huge = json.dumps(training_row(4))[:-1] + f', "grad_norm": {"9" * 400}}}'
    torn = json.dumps(training_row(5))[:40]
    (path / "metrics.jsonl").write_text("\n".join([*lines, *bad, huge, torn]))
    (path / "status.json").write_text('{"state": ')
    run = read(path)
    assert run.unreadable == {"metrics.jsonl": len(bad)}
    assert (run.step, len(run.curves["loss"].points())) == (4, 2)
    assert f"{len(bad)} unreadable rows in metrics.jsonl left out" in page_of(path).text
    for name in ("status.json", "jobs.jsonl", "samples.jsonl", "bad_steps.jsonl"):
        (path / name).unlink(missing_ok=True)
    assert "Status unknown" in page_of(path).text
    (path / "metrics.jsonl").write_text("")
    assert "There are no rows yet." in page_of(path).text
    assert Page(report.comparison([read(path), read(make_run(tmp_path / "b"))])).charts("steps")


def test_restarts_and_skipped_steps_are_marked(tmp_path):
    path = make_run(tmp_path / "run")
    starts = [(0, 2), (40, 4), (60, 4), (50, 1)]  # the third saved nothing: its steps were lost
    write_rows(path / "jobs.jsonl", [job_row(step, ranks) for step, ranks in starts])
    write_rows(path / "bad_steps.jsonl", [{"step": s, "reason": "spike"} for s in (7, 80)])
    run = read(path)
    assert [job["step"] for job in run.jobs] == [0, 40, 50]
    assert run.gpu_hours == pytest.approx((40 * 2 + 10 * 4 + 50 * 1) / 100)
    shown = page_of(path)
    figures = len(shown.charts("steps"))
    paths = shown.all("path")
    restarts = [p["d"] for p in paths if p.get("class") == "restart"]
    assert len(restarts) == 3 * figures
    assert {d.count("M") for d in restarts} == {2}
    skipped = [p["d"] for p in paths if p.get("class") == "skipped"]
    assert {d.count("M") for d in skipped} == {2}
    norms = next(c for c in shown.charts("steps") if c["aria-label"].startswith("Gradient norm"))
    assert norms["data-y"].startswith("0 ")
    assert "3 jobs, 1 more whose steps were lost" in shown.text
    assert "Skipped steps (spike: 2)" in shown.text
    # step 50 of 100 stands in the middle of every axis
    _, high, left, right = map(float, shown.charts("steps")[0]["data-x"].split())
    assert high == 100
    places = [int(x) for x in re.findall(r"M(\d+) ", restarts[0])]
    assert places[1] == pytest.approx((left + right) / 2, abs=1)


def test_a_branch_is_marked(tmp_path):
    """Its page says where it comes from and what it changes; in a comparison, too."""
    trunk, path = make_run(tmp_path / "trunk"), make_run(tmp_path / "branch")
    parent = str(trunk / "checkpoints" / "step_00000050")
    changed = ["optimizer.schedule: constant -> wsd", HOSTILE]
    branch = job_row(50, branched_from=parent, changed=changed)
    later = [job_row(50), job_row(80)]  # the first stopped before its first step
    write_rows(path / "jobs.jsonl", [job_row(0), branch, *later])
    shown = page_of(path)
    figures = len(shown.charts("steps"))
    for kind, places in (("branch", 1), ("restart", 2)):
        marks = [p["d"] for p in shown.all("path") if p.get("class") == kind]
        assert len(marks) == 3 * figures
        assert {d.count("M") for d in marks} == {places}
    assert "Branch of trunk at step 50: optimizer.schedule: constant -> wsd ;" in shown.text
    assert HOSTILE in shown.text
    assert "┃ branch" in shown.text
    compared = report.comparison([read(trunk), read(path)])
    assert "branch of trunk at step 50" in Page(compared).text

    for parent, changed in (([{}], "x"), (1, [None])):
        strange = job_row(50, branched_from=parent, changed=changed)
        write_rows(path / "jobs.jsonl", [job_row(0), strange])
        assert "Branch of" in page_of(path).text


def test_hours_are_named_after_the_device(tmp_path):
    on_gpu, on_cpu = make_run(tmp_path / "gpu"), make_run(tmp_path / "cpu")
    write_rows(on_cpu / "jobs.jsonl", [job_row(0, device="cpu")])
    assert "CPU rank-hours 2 2 × cpu" in page_of(on_cpu).text
    for names, told in (("gg", "GPU-hours"), ("cc", "CPU rank-hours"), ("gc", "Rank-hours")):
        runs = [read({"g": on_gpu, "c": on_cpu}[name]) for name in names]
        shown = Page(report.comparison(runs)).text
        assert f"tokens hours {told} step" in shown
        assert f"{told}: hours × ranks" in shown
        assert "(CPU)" not in shown


def test_comparison(tmp_path):
    runs = []
    for rate in (1e-3, 2e-3):
        for seed in (1, 2, 3):
            config = {"optimizer__learning_rate": rate, "train__seed": seed}
            losses = (4.0, 1.0 + 1000 * rate + seed / 10, 4.5)
            runs.append(make_run(tmp_path / f"lr{rate}" / f"s{seed}", 90, losses, **config))
    runs.append(make_run(tmp_path / "none", val_losses=(), optimizer__learning_rate=1e-3))
    (tmp_path / "notes").mkdir()
    done = program(*runs, tmp_path / "notes", "--output=c.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"left out: {tmp_path / 'notes'}: not a run directory: config.toml is missing"
    ]
    with open(tmp_path / "c.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["run"] for row in table][:4] == [
        "lr0.001/s1",
        "lr0.001/s2",
        "lr0.001/s3",
        "lr0.002/s1",
    ]
    assert [row["best_val_loss"] for row in table] == ["2.1", "2.2", "2.3", "3.1", "3.2", "3.3", ""]
    assert table[0].keys() >= {"optimizer.learning_rate", "train.seed"}
    assert "train.max_steps" not in table[0]
    assert float(table[0]["gpu_hours"]) == pytest.approx(1.8)
    assert float(table[0]["seeds_mean"]) == pytest.approx(2.2)
    assert float(table[0]["seeds_deviation"]) == pytest.approx(statistics.stdev([2.1, 2.2, 2.3]))
    shown = Page((tmp_path / "c.html").read_bytes())
    assert "1, 2, 3, 7 3 2.2 ± 0.1" in shown.text
    assert "4, 5, 6 3 3.2 ± 0.1" in shown.text
    labels = {line["data-label"] for line in shown.all("polyline") if "data-label" in line}
    assert labels == {f"lr{rate}/s{seed}" for rate in (0.001, 0.002) for seed in (1, 2, 3)} | {
        "none"
    }


def test_fifty_runs_differ_without_colour(tmp_path):
    runs = [make_run(tmp_path / str(index), 300, train__seed=index) for index in range(42)]
    runs += [make_run(tmp_path / "again" / str(index), 300) for index in range(8)]
    assert program(*runs, cwd=tmp_path).returncode == 0
    content = (tmp_path / "comparison.html").read_bytes()
    assert len(content) < 2_000_000
    swatches = re.findall(
        r'<svg class="swatch".*?stroke-dasharray="([^"]*)".*?d="M[\d.]+ [\d.]+(m[^"]*)"',
        content.decode(),
    )
    assert len(swatches) == 50
    assert len(set(swatches)) == 42
    with open(tmp_path / "comparison.csv", newline="") as file:
        names = [row["run"] for row in csv.DictReader(file)]
    assert len(set(names)) == 50
    assert "again/3" in names


def test_mistakes_are_one_line(tmp_path):
    run = make_run(tmp_path / "run")
    empty, young = tmp_path / "empty", tmp_path / "young"
    for path in (empty, young):
        path.mkdir()
    shutil.copy(run / "config.toml", young)
    broken = make_run(tmp_path / "broken")
    (broken / "config.toml").write_text("[")
    for arguments, expected in (
        ([], "name one run directory or more"),
        ([tmp_path / "missing"], "no such run directory"),
        ([run, tmp_path / "missing"], "no such run directory"),
        ([empty], "not a run directory"),
        ([empty, young], "none of these directories is a run"),
        ([young], "no metrics.jsonl yet"),
        ([broken], "not TOML"),
        ([run, "--outptu=x.html"], "did you mean --output?"),
        ([run, "--output"], "--output lacks a value"),
        ([run, broken, f"--output={run}/metrics.jsonl"], "exists and is no report"),
        ([run, run, f"--output={run}/config.toml"], "exists and is no report"),
        ([run, young, f"--output={tmp_path}/no/x.csv"], "name the page"),
        (["x" * 300], "name too long"),
        (["~nobody-of-that-name/run"], "home directory"),
        ([run, f"--output={tmp_path}/no/x.html"], "can't be written: No such file"),
    ):
        done = program(*arguments)
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert expected in lines[-1], done.stderr
        assert lines[-1].startswith("report.py: error: ")
        assert "Traceback" not in done.stderr
    assert "python tools/report.py RUN" in program("--help").stdout


def test_drawing_needs_no_torch():
    check = "import sys, tools.report; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    command = [sys.executable, "-c", check]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 100, False, [0, 20, 40, 60, 80, 100]),
        (1.37, 7.62, False, [2, 3, 4, 5, 6, 7]),
        (0, 6e-4, False, [0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4]),
        (0.4, 45, True, [0.5, 1, 2, 5, 10, 20]),
        (1e-3, 1e9, True, [1e-3, 1e-1, 1e1, 1e3, 1e5, 1e7, 1e9]),
    ],
)
def test_ticks_are_round(low, high, log, expected):
    assert page.ticks(low, high, log) == pytest.approx(expected)


def test_numbers_are_short():
    written = [page.short(v) for v in (0.0, 1.4321, 1e-3, 3e-4, 1.05e-4, 20e3, 3.2e9, 2e20, None)]
    assert written == ["0", "1.432", "0.001", "3e-4", "1.05e-4", "20k", "3.2B", "2e20", "–"]


# ---- beside training


def test_training_writes_its_report_and_its_jobs(dataset, tiny_tokenizer, tmp_path):
    out = tmp_path / "run"
    arguments = overrides(dataset, tiny_tokenizer, out, log__report="true")
    first = [*arguments, "--train.stop_at_step=10"]
    for run, ranks in ((first, 1), (arguments, 2)):
        done = rocket(run, ranks)
        assert done.returncode == 0, done.stderr
        assert "no report" not in done.stdout
        shown = Page((out / "report.html").read_bytes())
        assert f"Status {status(out)['state']}" in shown.text
    jobs = [json.loads(line) for line in (out / "jobs.jsonl").read_text().splitlines()]
    assert [(job["step"], job["ranks"], job["device"]) for job in jobs] == [
        (0, 1, "cpu"),
        (10, 2, "cpu"),
    ]
    assert jobs[0]["parameters"] > 10_000
    assert jobs[1]["hours"] >= rows(out, timings=True)[9]["hours"]
    assert [job["max_steps"] for job in jobs] == [20, 20]
    assert "20 of 20" in shown.text
    assert (out / "code" / "tools" / "report.py").is_file()
    run = read(out)
    assert 0 < run.gpu_hours < 2 * run.hours


def test_a_report_is_written_while_training_goes_on(dataset, tiny_tokenizer, tmp_path):
    out = tmp_path / "run"
    endless = {"train__max_steps": 1_000_000, "train__eval_interval": 20, "log__report": "true"}
    with started(overrides(dataset, tiny_tokenizer, out, **endless)) as launched:
        until((out / "report.html").exists)
        assert "Status running" in page_of(out).text
        assert status(out)["state"] == "running"
        assert "no process trains it" not in page_of(out).text
        (out / "STOP").touch()
        assert launched.wait() == 0
    assert "Status stopped (stop_file)" in Page((out / "report.html").read_bytes()).text


def test_a_report_that_fails_is_told_and_training_goes_on(dataset, tiny_tokenizer, tmp_path):
    out = tmp_path / "run"
    (out / "report.html" / "in the way").mkdir(parents=True)
    done = rocket(overrides(dataset, tiny_tokenizer, out, log__report="true"))
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("no report.html: ")]
    assert told
    assert "can't be written: Is a directory" in told[-1]
    assert status(out)["state"] == "finished"


def test_tensorboard_has_each_step_once(dataset, tiny_tokenizer, tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    arguments = overrides(dataset, tiny_tokenizer, out, log__tensorboard="true")
    assert rocket(arguments).returncode == 0
    shutil.rmtree(out / "checkpoints" / "step_00000020")  # steps 11 to 20 are done again
    assert rocket(arguments).returncode == 0
    known = rows(out, timings=True)
    for kind, name, key in (("train", "loss", "loss"), ("val", "loss", "val_loss")):
        board = EventAccumulator(str(out / "tensorboard" / kind)).Reload()
        expected = [(row["step"], row[key]) for row in known if key in row]
        seen = [(event.step, event.value) for event in board.Scalars(name)]
        assert seen == [(step, pytest.approx(value)) for step, value in expected]
    assert len(list((out / "tensorboard" / "train").iterdir())) == 2


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_training(package, tmp_path, monkeypatch):
    config = build_config({"log": {package: True}})
    assert getattr(LogConfig(), package) is False
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf"in the repository: pip install '\.\[{package}\]'"):
        check_inputs(tmp_path / "run", config, False)


# ---- Weights & Biases, the real package, offline


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.delitem(ENVIRONMENT, "WANDB_MODE", raising=False)


def recorded(out):
    """The id of the only W&B run in a run directory, and its records, read by W&B's own program."""
    (path,) = (out / "wandb").glob("offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return path.stem.removeprefix("run-"), [json.loads(line) for line in done.stdout.splitlines()]


def history(records):
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def follower(out):
    """The processes that hand a run's rows over: track.py and what it has started."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            words = path.read_text().split("\0")
            if str(out) in words and words[1].endswith("track.py"):
                pid = path.parent.name
                return [pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def test_wandb_has_one_run_and_each_step_once(dataset, tiny_tokenizer, tmp_path, offline):
    """Over two jobs, of which the second does ten steps again, on more ranks."""
    out = tmp_path / "run"
    arguments = overrides(dataset, tiny_tokenizer, out, log__wandb="true", log__wandb_project="lab")
    identities = []
    for ranks in (1, 2):
        done = rocket(arguments, ranks)
        assert done.returncode == 0, done.stderr
        identity, records = recorded(out)
        identities.append(identity)
        assert f"wandb sync {out}/wandb/offline-run-*-{identity}" in done.stdout
        assert done.stdout.count("W&B run") == 1
        expected = [(row["step"], row["loss"]) for row in rows(out) if "loss" in row]
        logged = [(row["_step"], row["loss"]) for row in history(records)]
        assert logged == [(step, pytest.approx(loss)) for step, loss in expected]
        expected = [(row["step"], row["val_loss"]) for row in rows(out) if "val_loss" in row]
        logged = [(row["_step"], row["val_loss"]) for row in history(records) if "val_loss" in row]
        assert logged == [(step, pytest.approx(loss)) for step, loss in expected]
        shutil.rmtree(out / "checkpoints" / "step_00000020")  # steps 11 to 20 are done again
    assert len(set(identities)) == 1
    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert (run["project"], run["display_name"]) == ("lab", "run")
    assert run["config"]["update"]["model"]["dim"] == 32
    assert not run.get("resume")  # `wandb sync` would add all rows to what it had sent before
    assert program("--help").returncode == 0
    again = [sys.executable, str(ROOT / "tools" / "track.py"), str(out)]
    done = subprocess.run(again, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    identity, records = recorded(out)
    assert identity == identities[0]
    assert [row["_step"] for row in history(records)] == list(range(1, 21))
    metrics = (
        out / "metrics.jsonl"
    )  # without its beginning the W&B run of before has more, and stays
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[5:]))
    assert subprocess.run(again, capture_output=True, env=ENVIRONMENT).returncode == 0
    assert len(list((out / "wandb").glob("offline-run-*"))) == 2


def test_wandb_outlives_no_run(dataset, tiny_tokenizer, tmp_path, offline):
    """What is killed leaves its rows with W&B and no process behind."""
    out = tmp_path / "run"
    endless = {"train__max_steps": 1_000_000, "train__eval_interval": 0, "log__wandb": "true"}
    with started(overrides(dataset, tiny_tokenizer, out, **endless)) as launched:
        until(lambda: "W&B run" in launched.said())
        processes = follower(out)
        assert len(processes) == 2
        by_hand = [
            sys.executable,
            str(ROOT / "tools" / "track.py"),
            str(out),
        ]
        done = subprocess.run(by_hand, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "hands over the rows of this run already" in done.stdout
        os.kill(launched.pid, signal.SIGKILL)
        launched.wait()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
    whole = [line for line in (out / "metrics.jsonl").read_text().splitlines() if line[-1] == "}"]
    _, records = recorded(out)
    assert [row["_step"] for row in history(records)] == list(range(1, len(whole) + 1))


def test_a_wandb_that_fails_is_told_and_training_goes_on(
    dataset, tiny_tokenizer, tmp_path, offline
):
    """It can't begin; it is killed halfway, and TERM is for training alone."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "wandb").touch()
    done = rocket(overrides(dataset, tiny_tokenizer, out, log__wandb="true"))
    assert (done.returncode, status(out)["state"]) == (0, "finished")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("track.py: error: W&B: FileExistsError: ")
    out = tmp_path / "other"
    endless = {"train__max_steps": 1_000_000, "train__eval_interval": 0, "log__wandb": "true"}
    with started(overrides(dataset, tiny_tokenizer, out, **endless)) as launched:
        until(lambda: "W&B run" in launched.said())
        mine, core = map(int, follower(out))
        os.kill(mine, signal.SIGTERM)
        os.kill(core, signal.SIGKILL)
        until(lambda: "track.py: error: W&B: " in launched.said())
        step = rows(out)[-1]["step"]
        until(lambda: rows(out)[-1]["step"] > step)
        os.kill(launched.pid, signal.SIGTERM)
        assert launched.wait() == 0
        assert "Traceback" not in launched.said()
    assert status(out)["reason"] == "signal"
    assert not follower(out)


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    """Opens a page with a script added to it, and returns the DOM and what the console said."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no Chromium found (chromium, chromium-browser, google-chrome, chrome)")

    def look(path, script="", dark=False):
        copy = path.with_name("copy.html")
        copy.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
        command += ["--enable-logging=stderr", f"--user-data-dir={path.parent / 'profile'}"]
        command += ["--blink-settings=preferredColorScheme=0"] * dark
        done = subprocess.run(
            [*command, "--dump-dom", f"file://{copy}"], capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode()
        console = [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]
        return done.stdout.decode(), console

    return look


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a run with all that there can be on it, and that of a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        make_run(folder / f"a-run-with-a-long-name-{'x' * 60}{i}", train__seed=i) for i in range(4)
    ]
    for run in runs[:1]:
        time = "2026-11-28T21:39:01+0000"
        write_rows(run / "jobs.jsonl", [job_row(0, time=time), job_row(40, time=time)])
        (run / "status.json").write_text(json.dumps({"state": "running", "time": time}))
        write_rows(run / "bad_steps.jsonl", [{"step": 7, "reason": "spike", "loss": 3.0}])
        long = {"prompt": "x" * 1000, "prediction": HOSTILE, "truth": "y " * 300}
        write_rows(run / "samples.jsonl", [{"step": 10, **long}, {"step": 20, **long}])
    assert program(runs[0]).returncode == 0
    assert program(*runs, f"--output={folder / 'comparison.html'}").returncode == 0
    return runs[0] / "report.html", folder / "comparison.html"


def told(dom):
    """What a script has written to the page's title."""
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))


@pytest.mark.browser
def test_chromium_opens_pages_without_a_complaint(browser, pages):
    script = """
    const charts = [...document.querySelectorAll(".charts figure > svg")];
    const shown = charts.filter(c => getComputedStyle(c).display !== "none");
    document.getElementById("by-hours").click();
    const then = charts.filter(c => getComputedStyle(c).display !== "none");
    const box = then[0].getBoundingClientRect();
    const at = {clientX: box.left + box.width / 2, clientY: box.top + 50, bubbles: true};
    then[0].dispatchEvent(new PointerEvent("pointermove", at));
    dispatchEvent(new Event("beforeprint"));
    document.title = JSON.stringify({
      shown: shown.map(c => c.getAttribute("class")), then: then.map(c => c.getAttribute("class")),
      folded: document.querySelectorAll("details:not([open])").length,
      curves: shown.every(c => c.querySelector("polyline").getTotalLength() > 100),
      readout: then[0].parentNode.querySelector(".readout").textContent,
      requests: performance.getEntriesByType("resource").length});
    """
    for path in pages:
        dom, console = browser(path, script)
        assert not console
        seen = told(dom)
        assert set(seen["shown"]) == {"by-steps"}
        assert set(seen["then"]) == {"by-hours"}
        assert len(seen["then"]) == len(seen["shown"]) >= 6
        assert seen["curves"]
        assert seen["requests"] == seen["folded"] == 0
        assert re.match(r"(hours|minutes) ", seen["readout"])


@pytest.mark.browser
def test_labels_of_curves_are_not_cut(browser, tmp_path):
    names = ("wmwmwm_1", "MMMM", "运行一二三")
    runs = [make_run(tmp_path / name) for name in names]
    path = tmp_path / "comparison.html"
    assert program(*runs, f"--output={path}").returncode == 0
    script = """
    const charts = [...document.querySelectorAll(".by-steps")];
    document.title = JSON.stringify(charts.map(c => [...c.querySelectorAll(".end")].map(
      t => t.getBoundingClientRect().right - c.getBoundingClientRect().right)));
    """
    over = told(browser(path, script)[0])
    assert len(over) >= 6
    assert all(len(chart) == len(names) and max(chart) <= 0 for chart in over)


@pytest.mark.browser
def test_the_readout_tells_the_values_of_the_curve(browser, pages):
    script = """
    const svg = document.querySelector(".by-steps"), box = svg.getBoundingClientRect();
    const [, high, left, right] = svg.dataset.x.split(" ").map(Number);
    const x = box.left + (left + 0.5 * (right - left)) * box.width / svg.viewBox.baseVal.width;
    svg.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: box.top + 60}));
    document.title = JSON.stringify(svg.parentNode.querySelector(".readout").textContent);
    """
    said = told(browser(pages[0], script)[0])
    step, loss = re.match(r"steps ([\d.]+): training ([\d.]+), validation", said).groups()
    assert float(step) == pytest.approx(50, abs=1)
    assert float(loss) == pytest.approx(training_row(50)["loss"], rel=0.02)


@pytest.mark.browser
def test_a_phone_never_scrolls_sideways(browser, pages):
    """Chromium's windows are no narrower than 500 pixels, so a frame is the phone."""
    for path in pages:
        inner = path.with_name("inner.html")
        script = "const page = document.documentElement;"
        script += "parent.postMessage([innerWidth, page.scrollWidth - page.clientWidth], '*')"
        inner.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
        outer = path.with_name("outer.html")
        outer.write_text(
            "<title></title><body><iframe src='inner.html' width=360 height=800 frameborder=0>"
            "</iframe><script>onmessage = e => document.title = JSON.stringify(e.data)</script>"
            "</body>"
        )
        assert told(browser(outer)[0]) == [360, 0]


@pytest.mark.browser
def test_dates_are_whole_on_a_narrow_screen(browser, pages):
    """Of the status, of two jobs, of the page: on one line at any width, in a page that fits."""
    script = """
    const seen = [];
    for (const part of document.querySelectorAll("details")) part.open = true;
    for (let width = 300; width <= 520; width += 5) {
      document.body.style.width = width + "px";
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      const lines = [];
      for (let node; node = walker.nextNode();) {
        for (const found of node.data.matchAll(/\\d{4}-\\d\\d-\\d\\d\\S*/g)) {
          if (node.parentElement.closest("script")) continue;
          const range = document.createRange();
          range.setStart(node, found.index);
          range.setEnd(node, found.index + found[0].length);
          lines.push(new Set([...range.getClientRects()].map(r => r.top)).size);
        }
      }
      seen.push([lines, document.body.scrollWidth > width]);
    }
    document.title = JSON.stringify(seen);
    """
    seen = told(browser(pages[0], script)[0])
    assert len(seen) == 45
    assert all((lines, wide) == ([1, 1, 1, 1], False) for lines, wide in seen)


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out(browser, pages, dark):
    """WCAG: a contrast of 4.5 for text, of 3 for lines; the page's ground is light or dark."""
    script = """
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const card = document.querySelector("dl div") ?? document.body;
    const grounds = [ground, light(getComputedStyle(card).backgroundColor)];
    const least = (selector, key) => Math.min(...[...document.querySelectorAll(selector)].map(e =>
      Math.min(...grounds.map(g => contrast(g, light(getComputedStyle(e)[key]))))));
    document.title = JSON.stringify({ground, lines: least("polyline,path.restart", "stroke"),
      labels: least("svg text", "fill"), text: least("h1,p,dt,dd,small,th,td,pre", "color")});
    """
    for path in pages:
        seen = told(browser(path, script, dark)[0])
        assert (seen["ground"] < 0.1) == dark
        assert seen["text"] >= 4.5
        assert seen["labels"] >= 4.5
        assert seen["lines"] >= 3
