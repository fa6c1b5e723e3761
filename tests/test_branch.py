"""Protects branches: a new run that goes on from a checkpoint of another run, to the bit where
nothing is changed, and that says what it changes."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from training import (
    assert_identical,
    error_of,
    overrides,
    prepared,
    rocket,
    rows,
    run_many,
    status,
    steps_kept,
    tensors,
)

from checkpoint import Checkpoint, _drop_optimizer, find_checkpoint
from dataset import mixture_weights, open_split, read_manifest
from tokenizer import Tokenizer

KEYS = {"optimizer__schedule": "constant", "checkpoint__keep_last": 9, "checkpoint__keep_best": 0}
ANNEAL = {  # constant up to step 20, then to zero in 10 steps
    "train__max_steps": 30,
    "optimizer__schedule": "wsd",
    "optimizer__decay_fraction": 1 / 3,
}


@pytest.fixture(scope="module")
def trunk(dataset, tiny_tokenizer, tmp_path_factory):
    """A run of 40 steps at a constant rate, with checkpoints at 10, 20, 30 and 40."""
    out = tmp_path_factory.mktemp("trunk") / "run"
    done = rocket(overrides(dataset, tiny_tokenizer, out, train__max_steps=40, **KEYS))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def other(tiny_tokenizer, tmp_path_factory):
    """Another dataset."""
    source = f"{sysconfig.get_paths()['stdlib']}/logging"
    return prepared(tmp_path_factory.mktemp("other"), tiny_tokenizer, [source])


@pytest.fixture
def run(dataset, tiny_tokenizer, tmp_path):
    """The arguments of a run in a directory of its own; keywords change keys."""

    def arguments(name, **values):
        return overrides(dataset, tiny_tokenizer, tmp_path / name, **{**KEYS, **values})

    return arguments


def step(run, number):
    return run / "checkpoints" / f"step_{number:08d}"


def jobs(out):
    return [json.loads(line) for line in (out / "jobs.jsonl").read_text().splitlines()]


def test_an_unchanged_branch_is_its_parent(run, trunk, tmp_path):
    """Weights, optimizer state, metrics and samples, to the bit. The branch does not need its
    parent once it has begun, and the parent is as it was."""
    shutil.copytree(trunk, tmp_path / "parent")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parent").rglob("*")}
    options = {"train__max_steps": 40, "train__branch_from": step(tmp_path / "parent", 20)}
    branch = tmp_path / "branch"
    done = rocket([*run("branch", **options), "--train.stop_at_step=25"])
    assert done.returncode == 0, done.stderr
    assert f"branching from step 20: {step(tmp_path / 'parent', 20)}" in done.stdout
    assert "changed: train.stop_at_step: 0 -> 25\n" in done.stdout
    assert done.stdout.count("changed: ") == 1
    assert sorted(steps_kept(branch)) == [20, 25]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "parent").rglob("*")}

    (tmp_path / "parent").rename(tmp_path / "gone")
    done = rocket(run("branch", **options))
    assert done.returncode == 0, done.stderr
    assert "resuming from step 25" in done.stdout
    assert_identical(trunk, branch)
    assert (branch / "samples.jsonl").read_bytes() == (trunk / "samples.jsonl").read_bytes()
    first, second, third = jobs(branch)
    assert first == jobs(trunk)[0]
    assert second["branched_from"] == str(step(tmp_path / "parent", 20))
    assert (second["step"], second["changed"]) == (20, ["train.stop_at_step: 0 -> 25"])
    assert (third["step"], "changed" in third) == (25, False)
    hours = [row["hours"] for row in rows(branch, timings=True)]
    assert hours == sorted(hours)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_unchanged_branch_on_two_ranks(strategy, run, tmp_path):
    options = {"train__max_steps": 40, "parallel__strategy": strategy}
    branch = run("branch", train__branch_from=step(tmp_path / "straight", 20), **options)
    done = run_many([run("straight", **options), branch], ranks=2)
    assert done.returncode == 0, done.stderr
    assert_identical(tmp_path / "straight", tmp_path / "branch")

    done = rocket(run("bad", train__branch_from=tmp_path / "straight", train__seed=1), ranks=2)
    assert "can't change train.seed: 1337 -> 1" in error_of(done)
    assert not (tmp_path / "bad").exists()


def test_lengths_of_one_run(run, trunk, tmp_path):
    """Annealed from a trunk at a constant rate, a branch is the run that decays from the start."""
    branch = run("branch", train__branch_from=step(trunk, 20), **ANNEAL)
    done = run_many([run("straight", **ANNEAL), branch])
    assert done.returncode == 0, done.stderr
    assert_identical(tmp_path / "straight", tmp_path / "branch")
    assert "changed: optimizer.schedule: constant -> wsd\n" in done.stdout
    assert jobs(tmp_path / "branch")[-1]["changed"] == [
        "train.max_steps: 40 -> 30",
        "optimizer.schedule: constant -> wsd",
        f"optimizer.decay_fraction: 0.2 -> {1 / 3}",
    ]


def test_a_branch_that_saved_nothing_begins_again(run, trunk, tmp_path):
    """Its rows are the parent's again; a parent that has gone is an error of one line."""
    shutil.copytree(trunk, tmp_path / "parent")
    branch = run("branch", train__branch_from=tmp_path / "parent", train__max_steps=50)
    done = rocket(branch)
    assert "branching from step 40" in done.stdout, done.stderr
    expected, state = tensors(tmp_path / "branch"), rows(tmp_path / "branch")
    shutil.rmtree(tmp_path / "branch" / "checkpoints")
    done = rocket(branch)
    assert "branching from step 40" in done.stdout, done.stderr
    assert [*tensors(tmp_path / "branch")] == [*expected]
    assert rows(tmp_path / "branch") == state
    assert len(jobs(tmp_path / "branch")) == 2

    shutil.rmtree(tmp_path / "branch" / "checkpoints")
    (tmp_path / "parent").rename(tmp_path / "gone")
    assert f"{tmp_path / 'parent'}: no run or checkpoint" in error_of(rocket(branch))


def test_another_mixture(run, dataset, other, trunk, tiny_tokenizer, tmp_path):
    """Each dataset is read on from where the parent has left it, also after the branch resumes;
    validation losses of other data don't count."""
    mixture = f'{{"{dataset}" = 3, "{other}" = 1}}'
    options = {"train__branch_from": step(trunk, 20), "data__mixture": mixture}
    straight, halved = run("straight", **options, **ANNEAL), run("halved", **options, **ANNEAL)
    done = run_many([straight, [*halved, "--train.stop_at_step=25"], halved])
    assert done.returncode == 0, done.stderr
    assert_identical(tmp_path / "straight", tmp_path / "halved")
    assert "changed: data.mixture: {} -> {" in done.stdout
    assert "changed: dataset: " in done.stdout

    found = rows(tmp_path / "straight")
    known = [row for row in rows(trunk) if row["step"] <= 20]
    assert found[: len(known) - 1] == known[:-1]  # but for the evaluation of other data at step 20
    evaluations = [row for row in found if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [10, 20, 30]
    assert len(evaluations[1]["val_losses"]) == 2
    state = find_checkpoint(tmp_path / "straight").state
    assert state["best_val_losses"] == [min(row["val_loss"] for row in evaluations[1:])]

    # 200 slots of the first dataset, then 3 of 4 slots
    config = find_checkpoint(tmp_path / "straight").config
    weights, sha256 = mixture_weights(config.data), Tokenizer(tiny_tokenizer).sha256
    parts = {name: read_manifest(Path(name), sha256) for name in weights}, weights, 32
    alone = open_split("train", [str(dataset)], *parts)
    mixed = open_split("train", weights, *parts)
    mixed.offsets = state["offsets"]
    read = [window for s in range(20) for window in alone.step_windows(1337, s, 10)]
    read += [window for s in range(20, 30) for window in mixed.step_windows(1337, s, 10)]
    first = [window for window in read if window < alone.windows]
    assert len(first) == len({*first}) == 275
    assert {*first} == {window for s in range(28) for window in alone.step_windows(1337, s, 10)} - {
        *alone.step_windows(1337, 27, 10)[5:]
    }
    epochs = mixed.epochs(300)
    assert epochs[str(dataset)] == 275 / alone.windows
    assert 24 <= epochs[str(other)] * (mixed.windows - alone.windows) <= 26


def test_data_alone_may_change(run, dataset, other, trunk, tmp_path):
    """Another dataset instead of the first one, from its beginning; attention within documents."""
    end = {"train__max_steps": 30, "train__branch_from": trunk / "checkpoints" / "step_00000020"}
    masked = run("masked", data__document_mask="true", **end)
    done = run_many([run("other", data__dir=other, **end), masked])
    assert done.returncode == 0, done.stderr
    assert "changed: data.document_mask: False -> True\n" in done.stdout
    assert find_checkpoint(tmp_path / "other").state["offsets"] == [-200]
    for name in ("other", "masked"):
        known = [row for row in rows(trunk) if row["step"] < 20]
        assert rows(tmp_path / name)[: len(known)] == known
        (again,) = [row for row in rows(tmp_path / name) if row["step"] == 20 and "val_loss" in row]
        assert again not in rows(trunk)
        assert status(tmp_path / name)["state"] == "finished"


def test_what_a_branch_may_not_change(run, trunk, tmp_path):
    """One line that names key and remedy; nothing is written."""
    branch = {"train__branch_from": trunk, "train__max_steps": 60}
    refused = {
        "can't change model.dim: 32 -> 64; set it as in": {"model__dim": 64},
        "train.seed: 1337 -> 1; set it as in": {"train__seed": 1},
        "data.seq_len: 32 -> 16; train.global_batch_size: 10 -> 5; set": {
            "data__seq_len": 16,
            "train__global_batch_size": 5,
        },
        "optimizer.name: adamw -> muon; set it as in": {"optimizer__name": "muon"},
        "would be finished: raise train.max_steps": {"train__max_steps": 40},
        "would be stopped as asked: raise train.stop_at_step": {"train__stop_at_step": 30},
        f"{tmp_path}: no run or checkpoint": {"train__branch_from": tmp_path},
        "step_00000011: no run or checkpoint": {"train__branch_from": step(trunk, 11)},
    }
    done = run_many([run("none", **{**branch, **keys}) for keys in refused.values()])
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for index, message in enumerate(refused):
        (line,) = [line for line in lines if line.startswith(f"run {index} rank 0: ")]
        assert message in line
    assert not (tmp_path / "none").exists()

    both = rocket(run("none", train__init_from=trunk, **branch))
    assert "train.init_from and train.branch_from" in error_of(both)
    own = error_of(rocket(run("none", **{**branch, "train__out_dir": trunk})))
    assert f"train.branch_from:  -> {trunk}" in own
    assert "another train.out_dir" in own


def test_a_damaged_parent(run, trunk, tmp_path):
    """A damaged checkpoint is an error if it is named; of a run, an earlier one is taken."""
    shutil.copytree(trunk, tmp_path / "parent")
    file = step(tmp_path / "parent", 40) / "optimizer-00000.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    _drop_optimizer(Checkpoint(step(tmp_path / "parent", 30)))
    branch = {"train__max_steps": 50}
    for number in (40, 30):
        named = step(tmp_path / "parent", number)
        message = error_of(rocket(run("none", train__branch_from=named, **branch)))
        assert f"{named}: no checkpoint verifies with its optimizer state" in message
    assert not (tmp_path / "none").exists()

    done = rocket(run("branch", train__branch_from=tmp_path / "parent", **branch))
    assert done.returncode == 0, done.stderr
    assert "does not match its checksum" in done.stderr
    assert "branching from step 20" in done.stdout
    assert [row["step"] for row in rows(tmp_path / "branch") if "loss" in row] == [*range(1, 51)]
