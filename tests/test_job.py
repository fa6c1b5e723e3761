"""Protects runs from what befalls jobs: signals, deadlines, the STOP file, a second job on the
run, edited code, dead and hung ranks, ranks that differ. Real processes throughout."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from training import (
    ENVIRONMENT,
    PATIENCE,
    ROOT,
    assert_identical,
    copy_code,
    error_of,
    launcher,
    overrides,
    rocket,
    rows,
    started,
    status,
    steps_kept,
    until,
)

import job
from checkpoint import find_checkpoint
from config import UserError, available_cores
from dataset import Mixture, TokenDataset
from distributed import explain_lost_rank
from job import RunLock
from slurm import attempts

LONG = {"train__max_steps": 100_000, "train__eval_interval": 0, "checkpoint__interval": 0}


@pytest.fixture
def run(dataset, tiny_tokenizer, tmp_path):
    """The arguments of a run in a directory of its own; keywords change keys."""

    def arguments(name="run", **values):
        return overrides(dataset, tiny_tokenizer, tmp_path / name, **values)

    return arguments


def trains(out):
    """Whether the run has come to its fifth row."""
    file = out / "metrics.jsonl"
    return file.exists() and file.read_bytes().count(b"\n") >= 5


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("SIGTERM", 2), ("SIGUSR1", 2), ("SIGINT", 1), ("SIGHUP", 1), ("SIGUSR2", 1)],
)
def test_a_signal_to_one_rank_stops_all_at_one_step(name, ranks, run, tmp_path):
    """Whichever rank hears it: a checkpoint of the last step, exit code 0, and a requeue."""
    out = tmp_path / "run"
    with started(run(**LONG), ranks) as launched:
        until(lambda: trains(out))
        rank = launched.workers()[1] if ranks == 2 else launched.pid
        os.kill(rank, getattr(signal, name))
        assert launched.wait() == 0
    assert status(out)["state"] == "stopped"
    assert status(out)["reason"] == "signal"
    assert status(out)["requeue"]
    assert [*steps_kept(out)] == [status(out)["step"]] == [rows(out)[-1]["step"]]


def test_a_signal_that_all_ranks_missed_is_found_in_a_note(run, tmp_path, monkeypatch):
    """As slurm/train.sh leaves it when USR1 comes before the ranks are there."""
    monkeypatch.setitem(ENVIRONMENT, attempts.ATTEMPT, "7-0-1")
    out = tmp_path / "run"
    (out / "logs").mkdir(parents=True)
    (out / "logs" / "signal.7-0-0").touch()  # of another attempt
    with started(run(**LONG), ranks=2) as launched:
        until(lambda: trains(out))
        attempts.signal_note(out, "7-0-1").touch()
        assert launched.wait() == 0
    assert (status(out)["reason"], status(out)["requeue"]) == ("signal", True)
    assert [*steps_kept(out)] == [status(out)["step"]]
    assert attempts.judge(out, "7-0-1", received=True).action == "back"
    assert not [*out.glob("logs/signal.*")]


def test_a_stopped_run_ends_in_the_same_bits(run, tmp_path):
    """Stopped by signals wherever they fall, evaluation and saving included, and resumed."""
    out = tmp_path / "run"
    options = {"checkpoint__interval": 2, "train__eval_interval": 3, "train__max_steps": 100}
    moments = [lambda: trains(out), lambda: any(out.glob("checkpoints/*.tmp"))]
    reference = rocket(run("reference", **options))
    assert reference.returncode == 0, reference.stderr
    for moment in moments:
        with started(run(**options)) as launched:
            until(moment)
            launched.process.send_signal(signal.SIGTERM)
            assert launched.wait() == 0
    done = rocket(run(**options))
    assert done.returncode == 0, done.stderr
    assert_identical(tmp_path / "reference", out)


@pytest.mark.long
def test_an_interrupted_evaluation_is_made_by_the_next_job(run, tmp_path):
    """Signalled inside a long one: it ends early, leaves no row, and is not missing after."""
    options = {"train__max_steps": 4, "train__eval_interval": 2, "train__eval_sequences": 300}
    slow = {**options, "train__micro_batch_size": 1}
    assert rocket(run("reference", **slow)).returncode == 0
    out = tmp_path / "run"
    with started(run(**slow)) as launched:
        until(lambda: (out / "metrics.jsonl").exists() and len(rows(out)) == 2)
        launched.process.send_signal(signal.SIGUSR1)
        assert launched.wait() == 0
    assert status(out)["step"] == 2
    assert not any("val_loss" in row for row in rows(out))
    assert find_checkpoint(out).state["val_loss"] is None
    for name in ("metrics.jsonl", "samples.jsonl"):  # a job that was killed after its evaluation
        with open(out / name, "a") as file:
            file.write('{"step": 2, "val_loss": 9.0}\n')
    assert rocket([*run(**slow), "--train.stop_at_step=2"]).returncode == 0
    assert find_checkpoint(out).state["val_loss"] == rows(out)[-1]["val_loss"]
    assert rocket(run(**slow)).returncode == 0
    assert_identical(tmp_path / "reference", out)


def test_nohup_keeps_its_word(run, tmp_path):
    """A hang-up that was to be ignored still is: the run goes on."""
    out = tmp_path / "run"
    command = ["nohup", sys.executable, str(ROOT / "rocket.py"), *run(train__max_steps=60)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until(lambda: trains(out))
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) == 0
    assert status(out)["state"] == "finished"


def test_a_job_too_short_for_a_step_comes_back_a_few_times(run, tmp_path):
    """A slow start may pass, a limit that is too short does not: its attempts are counted."""
    for requeue in (True, False):
        done = rocket(run(train__max_hours=0.1 / 3600, train__max_attempts=2))
        assert done.returncode == 0, done.stderr
        assert "too short" in done.stdout
        state = status(tmp_path / "run")
        assert (state["reason"], state["step"], state["requeue"]) == ("deadline", 0, requeue)
    assert "2 attempts in a row without a new checkpoint" in state["why"]
    assert "does not come back: 2 attempts in a row" in done.stdout


def test_a_crash_comes_back_once(run, dataset, tmp_path):
    """A token beyond the vocabulary, which start-up does not look for, in what step 15 reads."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(dataset, data)
    manifest = json.loads((data / "manifest.json").read_text())
    tokens = Mixture({"it": TokenDataset(data, manifest, "train", 32)}, {"it": 1})
    window = int(tokens.step_windows(1337, 14, 10)[3])
    place = tokens.locate(window)["pieces"][0]
    shard = np.memmap(data / place["shard"], "<u2", mode="r+")
    shard[place["offset"] + 5] = 60_000
    shard.flush()
    for requeue in (True, False):
        assert rocket(run(data__dir=data, data__verify="false")).returncode == 1
        assert (status(out)["state"], status(out)["reason"]) == ("failed", "error")
        assert (status(out)["step"], status(out)["requeue"]) == (14, requeue)


def test_a_signal_during_start_up_stops_before_the_first_step(run, tmp_path):
    out = tmp_path / "run"
    with started(run(**LONG)) as launched:
        until(lambda: (out / "claim.json").exists())
        launched.process.send_signal(signal.SIGTERM)
        assert launched.wait() == 0
    assert status(out)["reason"] == "signal"
    assert status(out)["step"] <= 2


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_second_interrupt_stops_at_once(ranks, run, tmp_path):
    """Ctrl-C twice; torchrun turns the second into TERM for its workers."""
    out = tmp_path / "run"
    slow = {"data__seq_len": 512, "model__max_seq_len": 512, "train__global_batch_size": 60}
    with started(run(**LONG, **slow), ranks) as launched:
        until(lambda: (out / "metrics.jsonl").exists() and rows(out))
        launched.process.send_signal(signal.SIGINT)
        time.sleep(1)  # people need as long, and half a second is taken for an echo
        launched.process.send_signal(signal.SIGINT)
        assert launched.wait() == (130 if ranks == 1 else 1)
    assert status(out)["state"] == "failed"
    assert status(out)["reason"] == "signal"
    assert not status(out)["requeue"]
    assert not steps_kept(out)


def test_the_stop_file_stops_and_goes(run, tmp_path):
    out = tmp_path / "run"
    with started(run(**LONG), ranks=2) as launched:
        until(lambda: trains(out))
        (out / "STOP").touch()
        assert launched.wait() == 0
    assert not (out / "STOP").exists()
    assert (status(out)["reason"], status(out)["requeue"]) == ("stop_file", False)
    assert [*steps_kept(out)] == [status(out)["step"]]


def test_the_run_stops_before_its_time_is_over(run, tmp_path):
    """Twenty seconds from its start to the end of its job: it has saved and left by then."""
    out = tmp_path / "run"
    done = rocket(run(**LONG, train__max_hours=20 / 3600), ranks=2)
    assert done.returncode == 0, done.stderr
    first, last = (out / "code").stat().st_mtime, (out / "status.json").stat().st_mtime
    assert last - first < 20
    assert (status(out)["reason"], status(out)["requeue"]) == ("deadline", True)
    assert [*steps_kept(out)] == [status(out)["step"]]


def test_the_clock_saves_too(run, tmp_path):
    """No interval in steps: a checkpoint a second."""
    out = tmp_path / "run"
    with started(run(**LONG, checkpoint__interval_minutes=1 / 60)) as launched:
        until(lambda: list(out.glob("checkpoints/step_" + "[0-9]" * 8)))
        first = steps_kept(out)
        until(lambda: steps_kept(out).keys() != first.keys())
        (out / "STOP").touch()
        assert launched.wait() == 0


def test_a_second_job_on_a_live_run_leaves(run, tmp_path):
    """It names the first one and touches nothing; once that one is dead, the run is free."""
    out = tmp_path / "run"
    with started(run(**LONG)) as launched:
        until(lambda: trains(out))
        message = error_of(rocket(run(**LONG)))
        assert f"process {launched.pid} on {socket.gethostname()}" in message
        launched.process.kill()
        launched.wait()
    assert (out / "claim.json").exists()
    done = rocket([*run(**LONG), "--train.stop_at_step=3"])
    assert done.returncode == 0, done.stderr
    assert not (out / "claim.json").exists()


def claim_of(directory, **values):
    """A claim as another job's process would have left it."""
    holder = {"host": "elsewhere", "pid": 1, "started": "1", "job_id": None, "time": "", **values}
    (directory / "claim.json").write_text(json.dumps(holder))


def test_claims_of_other_hosts_expire(tmp_path, monkeypatch):
    claim_of(tmp_path, job_id="7")
    with pytest.raises(UserError, match="job 7, process 1 on elsewhere"):
        RunLock(tmp_path).take()
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # our own job, requeued on another host
    own = RunLock(tmp_path)
    own.take()
    own.release()
    monkeypatch.delenv("SLURM_JOB_ID")
    claim_of(tmp_path)
    old = time.time() - attempts.EXPIRY_SECONDS - 5
    os.utime(tmp_path / "claim.json", (old, old))
    RunLock(tmp_path).take()


def test_a_process_number_used_again_is_not_the_holder(tmp_path):
    claim_of(tmp_path, host=socket.gethostname(), pid=os.getppid(), started="0")
    RunLock(tmp_path).take()
    alive = attempts.process_start(os.getppid())
    claim_of(tmp_path, host=socket.gethostname(), pid=os.getppid(), started=alive)
    with pytest.raises(UserError, match="is being trained"):
        RunLock(tmp_path).take()


@pytest.mark.long
@pytest.mark.parametrize("left", ["nothing", "a dead job's claim", "a torn claim"])
def test_of_jobs_that_come_at_once_one_gets_the_run(left, tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from config import UserError; from job import RunLock\n"
        "claim = RunLock(Path(sys.argv[1]))\n"
        "sys.stdin.readline()\n"
        "try: claim.take()\n"
        "except UserError: print('left', flush=True)\n"
        "else: print('took', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        if left == "a dead job's claim":
            claim_of(directory, host=socket.gethostname(), pid=2**22 + 1)
        elif left == "a torn claim":
            (directory / "claim.json").write_text('{"host": "else')
            os.utime(directory / "claim.json", (0, 0))
        jobs = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(directory)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        for each in jobs:
            each.stdin.write("go\n")
            each.stdin.flush()
        said = [each.stdout.readline().strip() for each in jobs]
        for each in jobs:
            each.communicate("end\n")
        assert sorted(said) == ["left", "left", "left", "took"]


def test_a_run_taken_over_is_left_alone(run, tmp_path, monkeypatch):
    """A job that was taken for dead and wakes up sees the other's claim, and saves nothing."""
    monkeypatch.setattr(job, "HEARTBEAT_SECONDS", 0.05)
    claim = RunLock(tmp_path)
    claim.take()
    claim_of(tmp_path, job_id="8")
    with pytest.raises(UserError, match="taken over"):  # asked before each save, too
        claim.verify()
    until(lambda: claim.lost)
    claim.release()
    assert json.loads((tmp_path / "claim.json").read_text())["job_id"] == "8"


def test_a_heartbeat_keeps_the_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "HEARTBEAT_SECONDS", 0.05)
    claim = RunLock(tmp_path)
    claim.take()
    os.utime(claim.path, (0, 0))
    until(lambda: claim.path.stat().st_mtime > time.time() - 60)
    claim.path.unlink()  # by whatever cleans up scratch
    until(claim.path.exists)
    assert not claim.lost
    claim.release()


def checkout(tmp_path):
    """A copy of the repository, to be edited."""
    repository = copy_code(tmp_path / "repository")
    shutil.copytree(ROOT / "config", repository / "config")
    return repository


def start(program, *arguments, **variables):
    """Runs a program of a checkout to its end."""
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        env={**ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_other_code_needs_consent(run, tmp_path):
    """By hand the difference is printed and needs the flag; the run's own copy needs none."""
    repository, out = checkout(tmp_path), tmp_path / "run"

    program = repository / "rocket.py"
    first = start(program, *run(), "--train.stop_at_step=5")
    assert first.returncode == 0, first.stderr
    (repository / "sample.py").write_text("# no part of training\n")
    model = repository / "model.py"
    model.write_text(model.read_text() + "\nEDITED = True\n")
    refused = start(program, *run(), "--train.stop_at_step=6")
    assert "model.py" in error_of(refused)
    assert "+EDITED = True" in refused.stdout
    assert "sample.py" not in refused.stdout + refused.stderr
    snapshot = [out / "code" / "rocket.py", out / "config.toml", "--train.stop_at_step=7"]
    requeued = start(*map(str, snapshot), ROCKET_ROOT=str(repository))
    assert requeued.returncode == 0, requeued.stderr
    assert not (out / "code" / "model.py").read_text().endswith("EDITED = True\n")
    accepted = start(program, *run(), "--accept-changes")
    assert accepted.returncode == 0, accepted.stderr
    assert "accepted: other code in model.py" in accepted.stdout
    assert "the model's code has changed since these weights were saved" in accepted.stdout
    assert "this step was not evaluated" in accepted.stdout
    assert (out / "code" / "model.py").read_text().endswith("EDITED = True\n")


def test_weights_are_not_continued_by_a_model_that_computes_otherwise(run, tmp_path):
    """The loss that was recorded with them tells, whatever the flag."""
    repository, out = checkout(tmp_path), tmp_path / "run"
    assert rocket([*run(), "--train.stop_at_step=10"]).returncode == 0  # evaluated there

    def resumed(old, new):
        model = repository / "model.py"
        model.write_text((ROOT / "model.py").read_text().replace(old, new))
        return start(repository / "rocket.py", *run(), "--accept-changes")

    assert "F.silu" in (ROOT / "model.py").read_text()
    refused = resumed("F.silu(", "(lambda x: F.relu(x) ** 2)(")
    message = error_of(refused)
    assert "model.py has changed what the model computes: validation loss" in message
    assert "train.init_from" in message
    assert [*steps_kept(out)] == [10]
    assert "F.silu" in (out / "code" / "model.py").read_text()  # which made these weights
    accepted = resumed("F.silu(", "torch.nn.functional.silu(")
    assert accepted.returncode == 0, accepted.stderr
    assert "model.py still computes the same: validation loss" in accepted.stdout


def test_where_nothing_can_be_written_it_is_said(run, tmp_path):
    """Not that a disk is full that is none, and no word of files that can't be."""
    message = error_of(process := rocket(run(train__out_dir="/proc/foo")))
    assert "/proc/foo: the run directory can't be written" in message
    assert "set train.out_dir" in message
    assert "status.json" not in process.stderr


def test_a_model_that_fits_nowhere_is_said_to(run, tmp_path):
    huge = {"model__dim": 400_000, "model__ffn_dim": 1_000_000, "model__n_layers": 200}
    message = error_of(process := rocket(run(**huge)))
    assert "the model does not fit" in message
    assert "GB a rank" in message
    assert "status.json" not in process.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_that_see_different_things_are_named(run, tmp_path):
    """Rank 1 alone is given another learning rate."""
    program = 'exec "$0" "$@" $([ "$RANK" = 0 ] || echo --optimizer.learning_rate=0.1)'
    rank = [sys.executable, str(ROOT / "rocket.py"), *run()]
    done = subprocess.run(
        [*launcher(2), "--no-python", "bash", "-c", program, *rank],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    message = error_of(done)
    assert "rank 1 on" in message
    assert "does not have the same configuration as rank 0" in message
    codes = re.findall(r"rank +: (\d) .*\n +exitcode +: (\d+)", done.stderr)
    assert {code for _, code in codes} == {"69"}  # by which attempts.py knows whose node it is


def test_a_disk_too_small_for_two_checkpoints_is_said_at_the_start(run, small_disk):
    options = {"model__dim": 64, "model__ffn_dim": 128}
    message = error_of(rocket(run(train__out_dir=small_disk / "run", **options)))
    assert "the next checkpoints need" in message
    assert str(small_disk / "run") in message


def test_a_killed_rank_ends_the_job_at_once(run, tmp_path):
    out = tmp_path / "run"
    with started(run(**{**LONG, "checkpoint__interval": 2}), ranks=2) as launched:
        until(lambda: trains(out))
        os.kill(launched.workers()[1], signal.SIGKILL)
        killed_at = time.monotonic()
        assert launched.wait() == 1
        assert time.monotonic() - killed_at < 60
        said = launched.said()
    assert "rocket.py: error: rank 0 on" in said
    assert "lost contact with another rank" in said
    assert "Traceback" not in said.partition("torch/distributed/elastic")[0]
    assert status(out)["state"] == "failed"
    assert status(out)["requeue"]  # it had made progress


@pytest.mark.parametrize("saved", [0, 4])
def test_a_rank_lost_before_a_new_checkpoint_comes_back(saved, run, tmp_path):
    """Whatever this start has saved: but not without end, and each new checkpoint counts anew."""
    out = tmp_path / "run"
    options = {**LONG, "train__max_attempts": 2}
    if saved:
        assert rocket([*run(**options), f"--train.stop_at_step={saved}"]).returncode == 0
    for requeue in (True, False):
        with started(run(**options), ranks=2) as launched:
            until(lambda launched=launched: "| loss" in launched.said())
            os.kill(launched.workers()[1], signal.SIGKILL)
            assert launched.wait() == 1
        assert (status(out)["state"], status(out)["reason"]) == ("failed", "error")
        assert status(out)["requeue"] == requeue
        assert "lost contact with another rank" in status(out)["why"]
        assert status(out)["step"] > saved
    assert "2 attempts in a row without a new checkpoint" in status(out)["why"]
    assert rocket([*run(**options), f"--train.stop_at_step={saved + 1}"]).returncode == 0
    with started(run(**options), ranks=2) as launched:
        until(lambda: "| loss" in launched.said())
        os.kill(launched.workers()[1], signal.SIGKILL)
        assert launched.wait() == 1
    assert status(out)["requeue"]


@pytest.mark.parametrize(
    ("attempts_of_nodes", "sick"),
    [
        ([{"a": {"0": -9}, "b": {"1": 75}}], []),  # once
        ([{"a": {"0": -9}, "b": {"1": 75}}] * 2, ["a"]),
        ([{"a": {"0": 75}, "b": {"1": -11, "2": 75}}] * 2, ["b"]),
        ([{"a": {"0": 75}, "b": {"1": 69}}], ["b"]),  # it says so itself
        ([{"a": {"0": 1}, "b": {"1": 1}}] * 2, []),  # what crashes everywhere is the code
        ([{"a": {"0": 1}, "b": {"1": 75}}] * 2, ["a"]),
        ([{"a": {"0": 64}}] * 2, []),  # a mistake
        ([{"a": {"0": -15}, "b": {"1": 75}}] * 2, []),  # was told to end
    ],
)
def test_which_node_is_sick(attempts_of_nodes, sick, tmp_path):
    """By how its ranks ended, whatever they took with them elsewhere."""
    (tmp_path / "logs").mkdir()
    for number, ended in enumerate(attempts_of_nodes):
        attempts.count(tmp_path, str(number), 9)
        for node, codes in ended.items():
            note = tmp_path / "logs" / f"ended.{number}.{node}.json"
            note.write_text(json.dumps(codes))
        attempts.judge(tmp_path, str(number), False)
    assert attempts.sick_nodes(tmp_path) == sick
    assert not list((tmp_path / "logs").iterdir())
    record = json.loads((tmp_path / "attempts.json").read_text())
    for node, times in record["deaths"].items():
        record["deaths"][node] = [at - attempts.DEATHS_SECONDS for at in times]
    (tmp_path / "attempts.json").write_text(json.dumps(record))
    assert attempts.sick_nodes(tmp_path) == []


def test_a_rank_dies_with_its_agent(run, tmp_path):
    """torchrun is killed: its rank would train on, and hold the run against the next attempt."""
    out = tmp_path / "run"
    with started(run(**LONG), ranks=2) as launched:
        until(lambda: trains(out))
        ranks = launched.workers()
        launched.process.kill()
        until(lambda: not any(attempts.process_start(rank) for rank in ranks))
    done = rocket([*run(**LONG), "--train.stop_at_step=3"])
    assert done.returncode == 0, done.stderr


def test_a_rank_dies_with_an_agent_that_dies_while_it_starts(run):
    """Before it has said so to the system: it would wait for the others for half an hour."""
    with started(run(**LONG), ranks=2) as launched:
        until(lambda: len(launched.workers()) == 2)
        ranks = launched.workers()
        launched.process.kill()
        until(lambda: not any(attempts.process_start(rank) for rank in ranks))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("attempts", '{"count": 1}'),
        ("attempts", '{"count": 1, "checkpoints": []}'),
        ("attempts", '{"count": "1", "max_attempts": {}, "checkpoints": null, "given_up": 5}'),
        ("attempts", '{"deaths": null}'),
        ("attempts", '{"deaths": {"a": 5, "b": ["x"]}}'),
        ("attempts", '{"count": 1, "max_att'),
        ("attempts", "[]"),
        ("status", '{"attempt": "1"}'),
        ("status", '{"attempt": "1", "state": "failed"}'),
        ("status", '{"attempt": "1", "state": "stopped", "reason": "signal"}'),
        ("status", "garbage"),
        ("claim", '{"host": "elsewhere"}'),
    ],
)
def test_records_of_another_shape_end_no_run(name, content, tmp_path):
    """A person, a crash or another version has written them."""
    (tmp_path / f"{name}.json").write_text(content)
    attempts.begin(tmp_path, "1", 3, asked=False)
    verdict = attempts.judge(tmp_path, "1", False)
    assert verdict.action == ("failed" if "state" in content else "back")
    assert not attempts.is_alive(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", f'{{"host": "{socket.gethostname()}"}}'])
def test_a_claim_that_was_torn_is_free(content, tmp_path):
    """Whole from its first moment, it is torn where a node has lost its power."""
    (tmp_path / "claim.json").write_text(content)
    claim = RunLock(tmp_path)
    claim.take()
    claim.release()


def test_status_tells_a_live_run_from_a_dead_one(run, tmp_path, monkeypatch):
    """The step from which it goes on from the start, then what is saved; alive by its claim."""
    out = tmp_path / "run"
    assert rocket([*run(**LONG), "--train.stop_at_step=7"]).returncode == 0
    assert not attempts.is_alive(out)
    with started(run(**{**LONG, "checkpoint__interval": 20})) as launched:
        until(lambda: status(out)["state"] == "running")
        assert status(out)["step"] == 7
        assert attempts.is_alive(out)
        until(lambda: status(out)["step"] == 20)
        launched.process.kill()
        launched.wait()
    assert status(out)["state"] == "running"
    assert not attempts.is_alive(out)
    command = [sys.executable, str(ROOT / "tools" / "report.py"), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    assert "running (but no process trains it: killed)" in (out / "report.html").read_text()
    claim_of(out)
    assert attempts.is_alive(out)  # of another host, by its heartbeat
    old = time.time() - attempts.EXPIRY_SECONDS - 5
    os.utime(out / "claim.json", (old, old))
    assert not attempts.is_alive(out)


def test_a_live_run_keeps_its_status_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "HEARTBEAT_SECONDS", 0.05)
    attempts.write_status(tmp_path, {"state": "running"})
    os.utime(tmp_path / "status.json", (0, 0))
    claim = RunLock(tmp_path)
    claim.take()
    until(lambda: (tmp_path / "status.json").stat().st_mtime > time.time() - 60)
    claim.release()


def test_a_full_disk_is_in_the_status(small_disk):
    """There is no room for another status.json, and it is told all the same."""
    attempts.write_status(small_disk, {"state": "running", "why": ""})
    with open(small_disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(1000))
    attempts.write_status(small_disk, {"state": "failed", "why": "no space is left" * 20})
    assert status(small_disk)["state"] == "failed"


THREADS = """
import sys
sys.path.insert(0, sys.argv[1])
import distributed, torch
from config import build_config
distributed.init_distributed(build_config({"train": {"device": "cpu"}}))
sys.stdout.write(f"{distributed._user_set_threads()} {torch.get_num_threads()}\\n")
distributed.shut_down()
"""


@pytest.mark.parametrize(
    ("threads", "ranks", "wrapped"),
    [("1", 1, False), ("1", 2, False), (None, 2, False), ("1", 2, True), (None, 2, True)],
)
def test_threads_are_the_users_where_he_says_so(threads, ranks, wrapped, tmp_path):
    """torchrun sets OMP_NUM_THREADS=1 for several ranks; a user's own 1 looks the same to them."""
    program = tmp_path / "threads.py"
    program.write_text(THREADS)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": threads} if threads else {}
    command = [str(program), str(ROOT)]
    if wrapped:  # the rank's parent is a shell, which torchrun has set it for
        command = ["--no-python", "bash", "-c", '"$0" "$@"; true', sys.executable, *command]
    launch = [*launcher(2)[:-2], f"--nproc_per_node={ranks}", *command]
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    share = max(1, available_cores() // ranks)
    expected = f"{threads is not None} {threads or share}"
    assert done.stdout.split("\n")[:-1] == [expected] * ranks, done.stderr


@pytest.mark.long
def test_torchrun_restarts_from_the_last_checkpoint(run, tmp_path):
    out = tmp_path / "run"
    options = {"train__max_steps": 60, "checkpoint__interval": 10}
    reference = rocket(run("reference", **options), ranks=2)
    assert reference.returncode == 0, reference.stderr
    with started(run(**options), ranks=2, restarts=3) as launched:
        until(lambda: (out / "checkpoints" / "step_00000010").exists())
        os.kill(launched.workers()[0], signal.SIGKILL)
        assert launched.wait() == 0
        assert "resuming from step" in launched.said()
    assert_identical(tmp_path / "reference", out)


def test_a_hung_rank_is_an_error_and_not_a_hang(run, tmp_path):
    out = tmp_path / "run"
    with started(run(**LONG, parallel__timeout_seconds=3), ranks=2) as launched:
        until(lambda: trains(out))
        hung = launched.workers()[1]
        os.kill(hung, signal.SIGSTOP)
        until(lambda: "rocket.py: error" in launched.said())
        os.kill(hung, signal.SIGKILL)
        assert launched.wait() == 1
        assert "Timed out" in launched.said()
    assert status(out)["state"] == "failed"


def test_a_device_that_does_not_answer_a_signal_is_a_lost_rank(tmp_path):
    """Under NCCL nothing fails when a rank dies: the others are told to end, and their devices wait
    for it. tests/gpu.py shows it on a device."""
    signals = job.Signals()
    lookout = job.StopConditions(tmp_path, signals, None, None, math.inf, 1.0, 0.0)
    now, limit = time.monotonic(), job.STUCK_SECONDS + 3 * 2.0
    lookout.seconds["step"] = 2.0
    lookout.while_waiting(now - 2 * limit)  # for long, but torchrun did not ask it to end
    signals.terminated_at = now - limit + 5
    lookout.while_waiting(now - 2 * limit)  # three steps may be under way
    signals.terminated_at = now - limit - 5
    lookout.while_waiting(now - limit + 5)  # it was saving when the signal came
    with pytest.raises(torch.distributed.DistError) as error:
        lookout.while_waiting(now - 2 * limit)
    assert "lost contact with another rank" in str(explain_lost_rank(error.value))
    lookout.seconds["step"] = 0.0
    lookout.while_waiting(now - 2 * limit)  # the first step compiles, for as long as it takes


WAITING = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from slurm import attempts
import job
from config import run_program
from distributed import explain_lost_rank
from pathlib import Path
ready = Path(__file__).with_name("ready")
if os.environ["RANK"] == "1":
    while not ready.exists():
        time.sleep(0.01)
    os._exit(7)
signals = job.Signals()
signals.install()
ready.touch()
lookout = job.StopConditions(Path(sys.argv[1]), signals, None, None, float("inf"), 1.0, 0.0)
lookout.seconds["step"] = 0.1
since = time.monotonic()
def main(arguments):
    try:
        while True:
            lookout.while_waiting(since)
            time.sleep(0.01)
    except Exception as error:
        raise explain_lost_rank(error)
run_program(main)
"""


@pytest.mark.long
def test_a_lost_rank_is_told_before_torchrun_kills(tmp_path):
    """Rank 0 waits as for a device that waits for rank 1, which has died."""
    program = tmp_path / "wait.py"
    program.write_text(WAITING)
    command = [*launcher(2), str(program), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "wait.py: error: rank 0 on " in done.stderr
    assert "lost contact with another rank" in done.stderr
