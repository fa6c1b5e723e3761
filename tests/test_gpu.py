"""Protects tests/gpu.py, which gets a GPU once and for minutes: every stage that a CPU can run
holds there, no stage costs another, and what it leaves behind is small and whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = str(ROOT / "tests" / "gpu.py")


def run(out, *arguments, timeout=60):
    command = [sys.executable, SCRIPT, str(out), "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_every_stage_holds_on_a_cpu(tmp_path):
    done = run(tmp_path, "--minutes=30", timeout=2000)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    found = rows(tmp_path)
    assert {row["verdict"] for row in found} == {"ok", "measured", "not run"}
    assert {row["stage"] for row in found if row["verdict"] == "not run"} == {"stuck"}
    table = (tmp_path / "table.txt").read_text()
    assert table in done.stdout
    assert len(table.splitlines()) == 1 + len(found)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["log.txt", "results.jsonl", "table.txt", "trace.json.gz"]
    assert all(path.stat().st_size < 16e6 for path in tmp_path.iterdir())


def test_a_stage_that_fails_costs_no_other(tmp_path):
    (tmp_path / "trace.json.gz").mkdir()  # the first stage can't write its trace
    done = run(tmp_path, "--only=110m_32,machine,stuck", timeout=240)
    assert done.returncode == 1
    found = {row["stage"]: row for row in rows(tmp_path)}
    assert found["110m_32"]["verdict"] == "FAILED"
    assert "IsADirectoryError" in found["110m_32"]["seen"]
    assert found["machine"]["verdict"] == "measured"
    assert found["stuck"]["verdict"] == "not run"


def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    """The 15 seconds end while torchrun's rank and its compilers are at work, which leave nothing
    half written to those who compile after them."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    done = run(tmp_path, "--only=sharded,machine", "--minutes=0.25", timeout=120)
    assert done.returncode == 1
    assert not cache.exists()
    *_, failed, after = rows(tmp_path)
    assert (failed["stage"], failed["verdict"]) == ("sharded", "FAILED")
    assert failed["seen"].startswith("over its 15 s")
    assert (after["stage"], after["seen"]) == ("machine", "no time left")
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_of(path, tmp_path)]
    assert not left


def is_of(cmdline, directory):
    """Whether a process has the directory among its arguments."""
    try:
        return str(directory).encode() in cmdline.read_bytes()
    except OSError:  # it has just gone
        return False


def test_when_the_minutes_are_over_the_rest_is_not_run(tmp_path):
    done = run(tmp_path, "--only=110m_32,machine", "--minutes=0")
    assert done.returncode == 0
    assert [row["verdict"] for row in rows(tmp_path)] == ["not run", "not run"]


def test_a_stage_that_does_not_exist_is_named(tmp_path):
    done = run(tmp_path / "out", "--only=kernel")
    assert done.returncode == 2
    assert "no stage kernel; there are numerics, " in done.stderr
    assert not (tmp_path / "out").exists()
