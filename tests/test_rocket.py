"""Protects training: the loss is the same however it is spread, resuming changes nothing, every
mistake is one line, and every rank stops together. Real processes throughout."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from training import (
    ENVIRONMENT,
    ROOT,
    assert_identical,
    error_of,
    losses,
    overrides,
    rocket,
    rows,
    run_many,
    started,
    status,
    steps_kept,
    tensors,
    until,
)

from checkpoint import Checkpoint, _drop_optimizer, _write_manifest, find_checkpoint
from config import build_config, file_sha256, read_toml
from dataset import Mixture, TokenDataset, evenly_spaced, mask_name
from inference.generation import load_model, open_source
from tokenizer import Tokenizer


@pytest.fixture
def run(dataset, tiny_tokenizer, tmp_path):
    """The arguments of a run in a directory of its own; keywords change keys."""

    def arguments(name="run", **values):
        return overrides(dataset, tiny_tokenizer, tmp_path / name, **values)

    return arguments


@pytest.fixture(scope="module")
def finished(dataset, tiny_tokenizer, tmp_path_factory):
    """A finished run of 20 steps; copy it before changing it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = rocket(overrides(dataset, tiny_tokenizer, out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def finished_tied(dataset, tiny_tokenizer, tmp_path_factory):
    """The same with tied embeddings."""
    out = tmp_path_factory.mktemp("finished") / "tied"
    done = rocket(overrides(dataset, tiny_tokenizer, out, model__tie_embeddings="true"))
    assert done.returncode == 0, done.stderr
    return out


SPREADS = {  # name: ranks, strategy
    "ddp2": (2, "ddp"),
    "fsdp2": (2, "fsdp"),
    "ddp3": (3, "ddp"),
}


@pytest.mark.parametrize(
    "spread", [*(pytest.param(name, marks=pytest.mark.long) for name in ("ddp2", "ddp3")), "fsdp2"]
)
def test_losses_match_the_single_process(spread, run, tmp_path, finished, finished_tied):
    """20 float32 steps within 1e-4, with and without accumulation; 10 does not divide by 3."""
    ranks, strategy = SPREADS[spread]
    done = run_many(
        [
            run("plain", parallel__strategy=strategy, train__micro_batch_size=10),
            run("accumulated", parallel__strategy=strategy, train__micro_batch_size=1),
            run("tied", parallel__strategy=strategy, model__tie_embeddings="true"),
        ],
        ranks,
    )
    assert done.returncode == 0, done.stderr
    for name in ("plain", "accumulated", "tied"):
        reference = finished_tied if name == "tied" else finished
        assert len(losses(tmp_path / name)) == 20
        assert np.abs(np.subtract(losses(tmp_path / name), losses(reference))).max() < 1e-4
        ours, theirs = rows(tmp_path / name)[-1], rows(reference)[-1]
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-4)
        assert ours["val_bits_per_byte"] == pytest.approx(theirs["val_bits_per_byte"], abs=1e-4)


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [(1, "ddp"), pytest.param(2, "ddp", marks=pytest.mark.long), (2, "fsdp")],
)
def test_resumed_training_is_bit_identical(ranks, strategy, run, tmp_path):
    """40 steps straight against 20, a new process, 20 more: weights, optimizer, metrics."""
    options = {"train__max_steps": 40, "parallel__strategy": strategy}
    straight, halved = run("straight", **options), run("halved", **options)
    first = run_many([straight, [*halved, "--train.stop_at_step=20"]], ranks)
    assert first.returncode == 0, first.stderr
    assert status(tmp_path / "halved")["reason"] == "stop_at_step"
    second = rocket(halved, ranks)
    assert second.returncode == 0, second.stderr
    assert "resuming from step 20" in second.stdout
    assert [row["step"] for row in rows(tmp_path / "halved") if "loss" in row] == [*range(1, 41)]
    assert_identical(tmp_path / "straight", tmp_path / "halved")


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "strategy", "chunk"), [(1, "ddp", 2048), (2, "ddp", 20), (2, "fsdp", 20)]
)
def test_what_saves_time_and_memory_changes_nothing(
    ranks, strategy, chunk, run, tmp_path, finished
):
    """Compiled, recomputed, reduced once and with a loss in chunks: losses within 1e-4 of the plain
    run's, and resuming is bit-identical."""
    options = {
        "train__compile": "on",
        "train__recompute": "selective",
        "train__loss_chunk": chunk,
        "train__micro_batch_size": 1,
        "parallel__reduce_once": "true",
        "parallel__strategy": strategy,
    }
    straight, halved = run("straight", **options), run("halved", **options)
    for command in (straight, [*halved, "--train.stop_at_step=10"], halved):
        done = rocket(command, ranks, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "compiled" in done.stdout
    assert_identical(tmp_path / "straight", tmp_path / "halved")
    assert np.abs(np.subtract(losses(tmp_path / "straight"), losses(finished))).max() < 1e-4


def test_compiling_without_a_compiler_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setitem(ENVIRONMENT, "CXX", "no-such-compiler")
    assert "needs a compiler (no-such-compiler)" in error_of(rocket(run(train__compile="on")))
    assert not (tmp_path / "run").exists()


def test_resuming_on_other_ranks_and_strategies(run, tmp_path):
    """1 process to FSDP2 on 2: same batches, losses within 1e-4. A long test goes everywhere."""
    assert rocket(run("reference", train__max_steps=40)).returncode == 0
    for ranks, strategy, stop in ((1, "ddp", 20), (2, "fsdp", 0)):
        options = {"parallel__strategy": strategy, "train__stop_at_step": stop}
        done = rocket(run("moving", train__max_steps=40, **options), ranks)
        assert done.returncode == 0, done.stderr
    differences = np.subtract(losses(tmp_path / "moving"), losses(tmp_path / "reference"))
    assert len(differences) == 40
    assert np.abs(differences).max() < 1e-4


def test_what_a_finished_run_leaves(finished):
    assert status(finished)["state"] == "finished"
    assert build_config(read_toml(finished / "config.toml")).train.max_steps == 20
    training = [row for row in rows(finished, timings=True) if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 21))
    assert all(row["tokens"] == row["step"] * 320 for row in training)
    needed = {"hours", "learning_rate", "grad_norm", "tokens_per_second"}
    assert all(needed <= row.keys() for row in training)
    evaluations = [row for row in rows(finished) if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [10, 20]
    for row in evaluations:
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
    assert losses(finished)[-1] < losses(finished)[0]
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [10, 10, 10, 20, 20, 20]
    assert ["continuation" in s for s in samples] == [True, False, False] * 2
    assert samples[1]["truth"] == samples[4]["truth"]


@torch.no_grad()
def test_samples_are_what_the_saved_model_predicts(finished, dataset):
    source = open_source(finished, "last")
    model = load_model(source, torch.device("cpu"), torch.float32)
    manifest = json.loads((dataset / "manifest.json").read_text())
    data = Mixture({"it": TokenDataset(dataset, manifest, "val", 32)}, {"it": 1})
    tokens, targets = data.batch(evenly_spaced(2, data.windows))
    guesses = model(tokens).argmax(-1)
    decode = source.tokenizer.decode
    kept = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    for row, sample in enumerate(kept[4:]):
        assert sample["prompt"] == decode(tokens[row, :17].tolist())
        assert sample["prediction"] == decode(guesses[row, 16:].tolist())
        assert sample["truth"] == decode(targets[row, 16:].tolist())


@torch.no_grad()
def test_what_a_model_writes_by_itself_is_its_own(finished, dataset):
    """Token by token from what it wrote before, never from the text."""
    source = open_source(finished, "last")
    model = load_model(source, torch.device("cpu"), torch.float32)
    ids = torch.from_numpy(np.fromfile(dataset / "val-00000.bin", "<u2")[None, :16].astype("i8"))
    luck = torch.empty(32, 600).exponential_(generator=torch.Generator().manual_seed(0))
    while ids.shape[1] < 32:
        guess = (model(ids)[0, -1] / 0.8 - luck[ids.shape[1]].log()).argmax()
        ids = torch.cat((ids, guess.view(1, 1)), dim=1)
    written = ids[0, 16:].tolist()
    written = written[: [*written, 2].index(2)]  # up to EOS
    kept = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    decode = source.tokenizer.decode
    last = {"prompt": decode(ids[0, :16].tolist()), "continuation": decode(written)}
    assert kept[3] == {"step": 20, **last}
    assert len(written) > 3


def test_initial_loss_is_that_of_a_uniform_guess(finished):
    assert losses(finished)[0] == pytest.approx(math.log(600), abs=0.1)


def test_deterministic_algorithms_change_nothing_on_a_cpu(run, finished, tmp_path):
    done = rocket(run(train__deterministic="true"))
    assert done.returncode == 0, done.stderr
    assert "compute in float32, deterministic" in done.stdout
    assert_identical(finished, tmp_path / "run")


def test_a_finished_run_says_so_and_changes_nothing(run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    again = rocket(run())
    assert again.returncode == 0, again.stderr
    assert "finished at step 20" in again.stdout
    assert_identical(finished, tmp_path / "run")


def test_a_kill_between_checkpoints_repeats_no_row(run, finished, tmp_path):
    """Rows after the last checkpoint, the last one torn, are cut and written anew."""
    halfway = rocket(run(train__stop_at_step=10))
    assert halfway.returncode == 0, halfway.stderr
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 9.0}\n{"step": 12, "los')
    assert rocket(run()).returncode == 0
    assert_identical(finished, tmp_path / "run")


def copied(dataset, tmp_path):
    """A dataset that may be damaged, not yet verified."""
    data = tmp_path / "data"
    shutil.copytree(dataset, data, ignore=shutil.ignore_patterns("verified.json"))
    return data


def flip(path):
    """Changes one bit of a file, and nothing that a look at its size would tell."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


ENDLESS = {"train__max_steps": 100_000, "train__eval_interval": 0, "checkpoint__interval": 0}


@pytest.mark.parametrize(("ranks", "split"), [(1, "val"), (2, "train")])
def test_damaged_bytes_of_a_dataset_stop_all_ranks(ranks, split, run, dataset, tmp_path):
    """A flipped bit is a token like any other; the digest in the manifest tells."""
    data, out = copied(dataset, tmp_path), tmp_path / "run"
    flip(data / f"{split}-00000.bin")
    failed = rocket(run(data__dir=data, **ENDLESS), ranks)
    assert f"{data}/{split}-00000.bin is damaged" in error_of(failed)
    state = status(out)
    assert (state["state"], state["reason"], state["requeue"]) == ("failed", "error", False)
    assert f"{split}-00000.bin is damaged" in state["why"]


def test_a_dataset_is_verified_once(run, dataset, tmp_path):
    """What was right is remembered, until a file is another one or has changed."""
    data = copied(dataset, tmp_path)
    done = rocket(run("first", data__dir=data), ranks=2)
    assert done.returncode == 0, done.stderr
    known = json.loads((data / "verified.json").read_text())
    assert sorted(known) == sorted(path.name for path in data.glob("*.bin"))
    shard = data / "train-00000.bin"
    times = shard.stat()
    flip(shard)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had been written
    done = rocket(run("second", data__dir=data))
    assert done.returncode == 0, done.stderr
    os.utime(shard)
    assert "is damaged" in error_of(rocket(run("third", data__dir=data, **ENDLESS)))
    assert rocket(run("fourth", data__dir=data, data__verify="false")).returncode == 0


def test_a_dataset_that_can_not_be_remembered_is_trained_on(run, dataset, tmp_path):
    """Another user's verified.json, which may be neither read nor written."""
    data = copied(dataset, tmp_path)
    (data / "verified.json").mkdir()
    done = rocket(run(data__dir=data))
    assert done.returncode == 0, done.stderr
    assert f"{data}/verified.json can't be written" in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shard_that_is_cut_while_it_is_mapped_is_named(ranks, run, dataset, tmp_path):
    """To read beyond its end is SIGBUS, after which nobody knows which file it was."""
    data = copied(dataset, tmp_path)
    with started(run(data__dir=data, **ENDLESS), ranks) as launched:
        until(lambda: "| loss" in launched.said())
        os.truncate(data / "train-00000.bin", 100)
        assert launched.wait() == 1
    assert f"error: {data}/train-00000.bin was truncated while in use" in launched.said()


def test_rows_that_are_missing_are_said_to_be(run, finished, tmp_path):
    """metrics.jsonl was cut or deleted between two jobs."""
    shutil.copytree(finished, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    longer = [*run(train__max_steps=21), "--accept-changes"]
    kept = metrics.read_text().splitlines(keepends=True)
    assert len(kept) == 22
    metrics.write_text("".join(kept[:5]))
    done = rocket(longer)
    assert done.returncode == 0, done.stderr
    assert f"{metrics}: 17 of the 22 rows up to step 20 are missing" in done.stdout
    metrics.unlink()
    done = rocket([*run(train__max_steps=22), "--accept-changes"])
    assert done.returncode == 0, done.stderr
    assert f"{metrics}: 7 of the 7 rows up to step 21 are missing" in done.stdout
    done = rocket([*run(train__max_steps=23), "--accept-changes"])
    assert "are missing" not in done.stdout
    first, *rest = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([first, "changed by hand\n", *rest[1:]]))
    done = rocket([*run(train__max_steps=24), "--accept-changes"])
    assert f"{metrics}: 1 of the {1 + len(rest)} rows up to step 23 are missing" in done.stdout
    assert metrics.read_text().startswith("".join([first, *rest[1:]]))


def test_damaged_checkpoints_are_passed_over_or_stop_the_run(run, finished, tmp_path):
    """In a world of 2: the newest cut in half falls back; all damaged is an error, nothing lost."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for kept, step in enumerate((20, 10)):
        weights = out / "checkpoints" / f"step_{step:08d}" / "model-00000.bin"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        before = sorted(p.name for p in (out / "checkpoints").iterdir())
        done = rocket(run(train__stop_at_step=10), ranks=2)
        if kept == 0:
            assert done.returncode == 0, done.stderr
            assert "checkpoint skipped" in done.stderr
            assert str(weights) in done.stderr
        else:
            assert "no checkpoint verifies" in error_of(done)
            assert sorted(p.name for p in (out / "checkpoints").iterdir()) == before


def test_weights_alone_are_never_a_silent_start_from_zero(run, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "step_00000020")
    _drop_optimizer(Checkpoint(out / "checkpoints" / "step_00000010"))
    before = (out / "metrics.jsonl").read_bytes()
    assert "does not restart from 0" in error_of(rocket(run()))
    assert (out / "metrics.jsonl").read_bytes() == before


def test_falling_back_ends_in_the_same_bits(run, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    manifest = out / "checkpoints" / "step_00000020" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    done = rocket(run())
    assert done.returncode == 0, done.stderr
    assert "resuming from step 10" in done.stdout
    assert_identical(finished, out)


def test_keys_that_may_not_change(run, finished, tmp_path):
    """Refused keys name themselves; consent keys need the flag; free keys pass."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert "train.seed: 1337 -> 1" in error_of(rocket(run(train__seed=1)))
    longer = run(train__max_steps=25, train__log_interval=5, train__micro_batch_size=3)
    assert "how long" in error_of(rocket([*run(train__max_steps=0), "--accept-changes"]))
    message = error_of(rocket(longer))
    assert "train.max_steps: 20 -> 25" in message
    assert "--accept-changes" in message
    assert_identical(finished, out)
    accepted = rocket([*longer, "--accept-changes"])
    assert accepted.returncode == 0, accepted.stderr
    assert "accepted: train.max_steps: 20 -> 25" in accepted.stdout
    assert status(out)["step"] == 25


def test_keeping_the_last_and_the_best(run, tmp_path):
    """A learning rate that ruins the model late: the best weights stay, without their optimizer."""
    options = {"checkpoint__interval": 5, "train__eval_interval": 5, "checkpoint__keep_last": 1}
    first = rocket(run(train__stop_at_step=10, **options))
    assert first.returncode == 0, first.stderr
    worse = [*run(**options), "--optimizer.learning_rate=0.5", "--accept-changes"]
    done = rocket(worse)
    assert done.returncode == 0, done.stderr
    assert steps_kept(tmp_path / "run") == {10: False, 20: True}
    assert set(tensors(tmp_path / "run")) > {"optimizer:lm_head.weight/exp_avg"}


def test_early_stopping(run, tmp_path):
    done = rocket(run(optimizer__learning_rate=0, train__eval_interval=2, train__patience=3))
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "run")["reason"] == "early_stop"
    assert status(tmp_path / "run")["step"] == 8  # the first evaluation is the best


def test_epochs_set_the_length(run, tmp_path, dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    windows = (manifest["splits"]["train"]["tokens"] - 1) // 64
    options = {"train__max_steps": 0, "train__epochs": 0.1, "data__seq_len": 64}
    done = rocket(run(train__log_interval=1000, **options))
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "run")["step"] == math.ceil(0.1 * windows / 10)


@pytest.mark.long
def test_init_from_starts_anew_with_old_weights(run, finished, tmp_path, tiny_tokenizer):
    """From a run; with a grown tokenizer the new rows are the mean; resume is explained."""
    done = rocket(run("same", train__init_from=finished, optimizer__learning_rate=0))
    assert done.returncode == 0, done.stderr
    before, after = tensors(finished), tensors(tmp_path / "same")
    name = "model:model.embed_tokens.weight"
    assert np.array_equal(before[name], after[name])
    other = run("none", train__init_from=finished, model__n_kv_heads=4, model__n_heads=8)
    assert "another model: model.n_heads: 4 -> 8" in error_of(rocket(other))
    assert "automatic" in error_of(rocket(run("none", train__init_from="resume")))
    assert "no checkpoint" in error_of(rocket(run("none", train__init_from=tmp_path)))
    assert not (tmp_path / "none").exists(), "a refused start writes nothing"


@pytest.mark.long
def test_init_from_accepts_a_grown_tokenizer(run, dataset, finished, tmp_path, tiny_tokenizer):
    grown = tmp_path / "grown.model"
    from corpus.vocabulary import add_control_pieces

    grown.write_bytes(add_control_pieces(tiny_tokenizer.read_bytes(), ["<|new|>", "<|newer|>"]))
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = Tokenizer(grown).sha256
    (data / "manifest.json").write_text(json.dumps(manifest))
    options = {"tokenizer__path": grown, "tokenizer__vocab_size": 602, "data__dir": data}
    frozen = {"optimizer__learning_rate": 0, "train__max_steps": 1}
    for ranks, strategy in ((1, "ddp"), (2, "fsdp")):
        name = f"new{ranks}"
        done = rocket(
            run(name, train__init_from=finished, parallel__strategy=strategy, **options, **frozen),
            ranks,
        )
        assert done.returncode == 0, done.stderr
        assert "2 new tokens" in done.stdout
        for weight in ("model:model.embed_tokens.weight", "model:lm_head.weight"):
            old, new = tensors(finished)[weight], tensors(tmp_path / name)[weight]
            assert np.array_equal(new[:600], old)
            assert np.allclose(new[600:], old.mean(axis=0), atol=1e-6)


@pytest.fixture
def poisoned(run, finished, dataset, tmp_path):
    """Arguments of a run in which two steps are bad: (arguments, bad steps, token).

    It starts from weights in which the embedding of one token, that these two steps alone contain,
    is not a number.
    """
    source = tmp_path / "poison"
    shutil.copytree(finished, source)
    manifest = json.loads((dataset / "manifest.json").read_text())
    data = TokenDataset(dataset, manifest, "train", 32)
    order = Mixture({"it": data}, {"it": 1})
    steps_of: dict[int, list[int]] = {}
    for step in range(20):
        windows = order.step_windows(1337, step, 10)
        for token in np.unique([data.window(int(w))[0][:-1] for w in windows]):
            steps_of.setdefault(int(token), []).append(step + 1)
    # some step before the first of them, so that there may be a checkpoint, and one between them
    fits = (s for s in steps_of.items() if len(s[1]) == 2 and s[1][0] > 1 and s[1][1] - s[1][0] > 1)
    token, bad = next(fits)
    checkpoint = find_checkpoint(source)
    file = next(f for f in checkpoint.manifest["files"] if f["group"] == "model")
    weights = np.memmap(checkpoint.path / file["name"], "<f4", mode="r+")
    assert checkpoint.manifest["tensors"]["model"][0] == ["model.embed_tokens.weight", [600, 32]]
    weights[token * 32 : (token + 1) * 32] = np.nan
    weights.flush()
    file["sha256"] = file_sha256(checkpoint.path / file["name"])
    _write_manifest(checkpoint.path / "manifest.json", checkpoint.manifest)
    arguments = run(train__init_from=checkpoint.path, train__eval_interval=0, data__val_fraction=0)
    return arguments, bad, token


def test_steps_that_are_not_finite_are_skipped(poisoned, tmp_path, dataset):
    """On all ranks, nothing else is lost, and the file says exactly which text they had."""
    arguments, bad, token = poisoned
    out = tmp_path / "run"
    done = rocket([*arguments, "--train.stop_at_step=19", "--parallel.strategy=fsdp"], ranks=2)
    assert done.returncode == 0, done.stderr
    skipped = [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == bad
    assert {row["reason"] for row in skipped} == {"non_finite"}
    for row in rows(out):
        assert (row["loss"] is None) == (row["step"] in bad) == ("skipped" in row)
    windows = [window for row in skipped for window in row["windows"]]
    assert len(windows) == 20
    assert {window["dataset"] for window in windows} == {str(dataset)}
    guilty = 0
    for window in windows:
        ids = [
            np.memmap(dataset / piece["shard"], "<u2")[piece["offset"] :][: piece["tokens"]]
            for piece in window["pieces"]
        ]
        guilty += token in np.concatenate(ids)[:-1]
    assert guilty >= 2
    program = [sys.executable, str(ROOT / "prepare.py"), str(out / "config.toml"), "--bad-steps"]
    shown = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert f"step {bad[1]}: non_finite" in shown.stdout
    weights = {name: value for name, value in tensors(out).items() if "embed" not in name}
    assert all(np.isfinite(value).all() for value in weights.values())
    steps = tensors(out)["optimizer:lm_head.weight/step"]
    assert steps.item() == 17  # of 19


def test_resuming_after_skipped_steps_is_bit_identical(poisoned, tmp_path):
    """A checkpoint between a bad step and the next: counts, running mean and rows go on."""
    arguments, bad, _ = poisoned
    stop = f"--train.stop_at_step={bad[0]}"
    straight = [*arguments, f"--train.out_dir={tmp_path / 'straight'}", "--train.stop_at_step=19"]
    assert rocket(straight).returncode == 0
    assert rocket([*arguments, stop]).returncode == 0
    assert find_checkpoint(tmp_path / "run").state["bad_steps"] == 1
    assert rocket([*arguments, "--train.stop_at_step=19"]).returncode == 0
    ours, theirs = tensors(tmp_path / "run"), tensors(tmp_path / "straight")
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in theirs)
    for file in ("bad_steps.jsonl",):
        assert (tmp_path / "run" / file).read_text() == (tmp_path / "straight" / file).read_text()
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    states = [find_checkpoint(tmp_path / name).state for name in ("run", "straight")]
    assert states[0]["norms"] == states[1]["norms"]


def test_spikes_are_skipped(run, tmp_path):
    """With a factor below 1 nearly every step is a spike once the running mean is known."""
    out = tmp_path / "run"
    options = {"train__max_steps": 40, "train__spike_factor": 0.5, "train__max_bad_steps": 15}
    done = rocket(run(**options), ranks=2)
    assert "15 steps in a row were skipped" in error_of(done)
    skipped = [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [*range(21, 36)]
    assert {row["reason"] for row in skipped} == {"spike"}
    assert status(out)["reason"] == "non_finite"
    tensors(out)


def test_a_failure_at_the_same_step_does_not_come_back(run, tmp_path):
    options = {"optimizer__learning_rate": 1e30, "optimizer__grad_clip": 0, "train__max_steps": 60}
    first = rocket(run(**options))
    assert "steps in a row were skipped" in error_of(first)
    assert status(tmp_path / "run")["requeue"]
    error_of(rocket(run(**options)))
    assert not status(tmp_path / "run")["requeue"]


def write_instruct(directory, dataset, splits, template="{content}"):
    """Conversations of real tokens, packed for 32: two a window, of which the second half counts.

    Args:
        splits: name to (windows, the last of them that are trained on).
    """
    directory.mkdir()
    manifest = json.loads((dataset / "manifest.json").read_text())
    bos, eos = (manifest["tokenizer"][name] for name in ("bos_id", "eos_id"))
    text = np.fromfile(dataset / "train-00000.bin", "<u2")
    text = text[(text != bos) & (text != eos)]
    manifest |= {"format": "instruct", "seq_len": 32, "template": {"assistant": template}}
    manifest |= {"train_on": "responses", "too_long": "truncate", "splits": {}}
    for split, (windows, trained) in splits.items():
        ids = text[: 32 * windows].reshape(windows, 32).copy()
        ids[:, [0, 14]], ids[:, [13, 29, 30, 31]] = bos, eos  # two tokens of fill
        mask = np.zeros(ids.shape, dtype="u1")
        mask[windows - trained :, [*range(7, 14), *range(22, 30)]] = 1
        file = f"{split}-00000.bin"
        ids.tofile(directory / file)
        mask.tofile(directory / mask_name(file))
        shard = {"file": file, "tokens": ids.size, "trained": int(mask.sum())}
        shard["sha256"] = file_sha256(directory / file)
        shard["mask_sha256"] = file_sha256(directory / mask_name(file))
        manifest["splits"][split] = {"tokens": ids.size, "shards": [shard]}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def toml_table(**values):
    """A table for the command line: {"a" = 1, "b" = 2}."""
    return "{" + ", ".join(f"{json.dumps(k)} = {v}" for k, v in values.items()) + "}"


def test_a_mixture_with_a_document_mask(run, dataset, tmp_path):
    """Text and conversations: any number of ranks, resumed in the middle, one run; steps without a
    trained token change nothing; the mask has an effect."""
    talk = write_instruct(tmp_path / "talk", dataset, {"train": (60, 60), "val": (9, 9)})
    rare = write_instruct(tmp_path / "rare", dataset, {"train": (40, 6)})
    mixture = {"data__mixture": toml_table(**{str(dataset): 0.7, str(talk): 0.3})}
    masked = {**mixture, "data__document_mask": "true"}
    sparse = {"data__mixture": toml_table(**{str(rare): 1})}
    sparse |= {"train__global_batch_size": 2, "train__max_bad_steps": 1}
    one = run_many(
        [
            run("reference", **masked),
            run("halved", **masked, train__stop_at_step=10),
            run("halved", **masked),
            run("moving", **masked, train__stop_at_step=10),
            run("plain", **mixture),
            run("sparse", **sparse),
            run("talking", data__mixture=toml_table(**{str(talk): 1}), train__max_steps=2),
        ]
    )
    assert one.returncode == 0, one.stderr
    two = run_many(
        [
            run("moving", **masked),
            run("sharded", **masked, parallel__strategy="fsdp"),
            run("sparse2", **sparse, parallel__strategy="fsdp"),
            run("moving", **mixture),
        ],
        ranks=2,
    )
    assert two.returncode == 0, two.stderr
    assert "run 3 rank 0: this run can't resume with data.document_mask" in two.stderr
    assert_identical(tmp_path / "reference", tmp_path / "halved")
    for name in ("moving", "sharded", "plain"):
        apart = np.subtract(losses(tmp_path / name), losses(tmp_path / "reference"))
        assert len(apart) == 20
        assert (np.abs(apart).max() < 1e-4) == (name != "plain"), name

    assert f"{talk}: 30.00% of the sequences, 1.00 epochs of it" in one.stdout
    assert "attention stays within a document" in one.stdout
    assert find_checkpoint(tmp_path / "reference").manifest["template"] == {
        "assistant": "{content}"
    }
    last = rows(tmp_path / "reference")[-1]
    assert last["epochs"][str(talk)] == 1.0
    of_text, of_talk = (last["val_losses"][str(name)] for name in (dataset, talk))
    assert last["val_loss"] == pytest.approx(0.7 * of_text + 0.3 * of_talk)
    told = f"val loss of each dataset: {dataset.name} {of_text:.4f}, talk {of_talk:.4f}"
    assert told in one.stdout

    written = {
        name: json.loads((tmp_path / name / "samples.jsonl").read_text().splitlines()[0])
        for name in ("reference", "halved", "sharded", "talking")
    }
    assert written["reference"] == written["halved"]
    assert written["reference"]["prompt"] == written["sharded"]["prompt"]
    window = np.fromfile(talk / "val-00000.bin", "<u2")[:7]  # up to the first that is trained on
    assert written["talking"]["prompt"] == Tokenizer(
        tmp_path / "talking" / "tokenizer.model"
    ).decode(window)

    bad_steps = (tmp_path / "sparse" / "bad_steps.jsonl").read_text()
    skipped = [json.loads(line) for line in bad_steps.splitlines()]
    assert {row["reason"] for row in skipped} == {"no_trained_tokens"}
    assert 5 < len(skipped) < 20
    for row in skipped:
        assert all(w["dataset"] == str(rare) and w["window"] < 34 for w in row["windows"])
    assert [row["step"] for row in rows(tmp_path / "sparse") if "skipped" in row] == [
        row["step"] for row in skipped
    ]
    assert status(tmp_path / "sparse")["state"] == "finished"
    assert tensors(tmp_path / "sparse")["optimizer:lm_head.weight/step"] == 20 - len(skipped)
    assert (tmp_path / "sparse2" / "bad_steps.jsonl").read_text() == bad_steps


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "ddp"), (2, "fsdp")])
def test_saving_in_the_background_changes_nothing(ranks, strategy, run, finished, tmp_path):
    """The same checkpoints, to the bit, best ones included, and a resume from one of them."""
    options = {"checkpoint__interval": 2, "parallel__strategy": strategy}
    background = {**options, "checkpoint__asynchronous": "true"}
    done = run_many(
        [
            run("plain", **options),
            run("background", **background, train__stop_at_step=11),
            run("background", **background),
        ],
        ranks,
    )
    assert done.returncode == 0, done.stderr
    assert "run " not in done.stderr, done.stderr
    assert_identical(tmp_path / "plain", tmp_path / "background")
    assert steps_kept(tmp_path / "plain") == steps_kept(tmp_path / "background")
    assert not list((tmp_path / "background" / "checkpoints").glob("*.tmp"))


@pytest.mark.long
def test_saving_after_an_evaluation_that_kept_gathered_weights(run, finished, tmp_path):
    """FSDP2 that does not reshard after forward: the checkpoint holds all of the state."""
    options = {"parallel__strategy": "fsdp", "parallel__reshard_after_forward": "false"}
    stopped = rocket(run(**options, train__stop_at_step=10), ranks=2)
    assert stopped.returncode == 0, stopped.stderr
    assert len(find_checkpoint(tmp_path / "run").shapes("optimizer")) == 3 * 21
    done = rocket(run(**options), ranks=2)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.subtract(losses(tmp_path / "run"), losses(finished))).max() < 1e-4


def test_a_failure_waits_for_the_save_under_way(run, poisoned, tmp_path):
    """Bad steps end the run while it saves in the background: that checkpoint is there."""
    arguments, bad, _ = poisoned
    options = ["--checkpoint.asynchronous=true", "--train.max_bad_steps=1"]
    error_of(rocket([*arguments, *options, f"--checkpoint.interval={bad[0] - 1}"]))
    assert status(tmp_path / "run")["reason"] == "non_finite"
    assert bad[0] - 1 in steps_kept(tmp_path / "run")


@pytest.mark.parametrize("asynchronous", [pytest.param("false", marks=pytest.mark.long), "true"])
def test_a_run_directory_that_turns_read_only(asynchronous, run, tmp_path):
    """While it trains: all ranks stop with one line, and the last checkpoint stays loadable."""
    out = tmp_path / "run"
    options = {"train__max_steps": 10**6, "train__eval_interval": 0, "checkpoint__keep_last": 1}
    options |= {"checkpoint__interval": 30, "checkpoint__asynchronous": asynchronous}
    with started(run(**options), ranks=2) as launched:
        until(lambda: (out / "checkpoints" / "step_00000030").exists())
        if subprocess.run(["mount", "--bind", out, out], capture_output=True).returncode:
            pytest.skip("mounting the directory read-only needs root")
        try:
            read_only = ["mount", "-o", "remount,bind,ro", out]  # refused while a file is written
            until(lambda: subprocess.run(read_only, capture_output=True).returncode == 0)
            assert launched.wait() == 1
        finally:
            subprocess.run(["umount", "--lazy", out], check=True)
        message = [line for line in launched.said().splitlines() if "rocket.py: error" in line]
    assert len(message) == 1, launched.said()
    assert str(out) in message[0]
    assert "Read-only" in message[0]
    assert "Traceback" not in launched.said().partition("torch/distributed/elastic")[0]
    tensors(out)


def test_a_loss_that_is_not_finite_stops_all_ranks(run, tmp_path):
    options = {"optimizer__learning_rate": 1e30, "optimizer__grad_clip": 0, "train__max_steps": 60}
    done = rocket(run(**options), ranks=2)
    assert "gradient norm" in error_of(done)
    assert status(tmp_path / "run")["reason"] == "non_finite"
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


BAD_INPUTS = {  # what a user might give in a world of 2, and the words of the answer
    "cut bin": "bytes instead of",
    "other tokenizer": "another tokenizer",
    "no dataset": "run prepare.py",
    "no tokenizer": "no_such.model",
    "wrong vocab": "tokenizer.vocab_size",
    "out_dir under a file": "can't be written",
    "no length": "train.max_steps or train.epochs",
    "window too long": "less than one window",
    "no output": "a path is empty",
    "packed for another length": "windows of 32 tokens, data.seq_len is 16; set data.seq_len=32",
    "two templates": "was prepared with another data.template than",
    "nothing to evaluate": "no text to train on",
    "another kind": 'was prepared with data.format = "instruct", not "text"',
}


def test_bad_inputs_stop_a_world_of_two(run, dataset, tmp_path):
    """One line and a non-zero exit each; nothing hangs, nothing is written."""
    cut, other = tmp_path / "cut", tmp_path / "other"
    shutil.copytree(dataset, cut)
    shard = cut / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    shutil.copytree(dataset, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "file").write_text("")
    splits = {"train": (20, 20), "val": (20, 1)}
    talk = write_instruct(tmp_path / "talk", dataset, splits)
    chat = write_instruct(tmp_path / "chat", dataset, {"train": (20, 20)}, "-{content}")
    part = {"train__max_steps": 1, "train__eval_sequences": 3}
    alone = toml_table(**{str(talk): 1})
    cases = {
        "cut bin": run("a", data__dir=cut),
        "other tokenizer": run("b", data__dir=other),
        "no dataset": run("c", data__dir=tmp_path / "nothing"),
        "no tokenizer": run("d", tokenizer__path=tmp_path / "no_such.model"),
        "wrong vocab": run("e", tokenizer__vocab_size=601),
        "out_dir under a file": run("file/run"),
        "no length": run("g", train__max_steps=0),
        "no output": run(train__out_dir=""),
        "window too long": run("h", data__seq_len=10**7, model__max_seq_len=10**7),
        "packed for another length": run("i", data__mixture=alone, data__seq_len=16),
        "two templates": run("j", data__mixture=toml_table(**{str(talk): 1, str(chat): 1})),
        "nothing to evaluate": run("k", data__mixture=alone, **part),
        "another kind": run("l", data__dir=talk),
    }
    done = run_many(list(cases.values()), ranks=2)  # a rank that did not raise would hang it
    for index, case in enumerate(cases):
        for rank in (0, 1):
            start = f"run {index} rank {rank}:"
            said = [line for line in done.stderr.splitlines() if line.startswith(start)]
            assert len(said) == 1, f"{case}: {done.stderr}"
            assert BAD_INPUTS[case] in said[0], case
    assert BAD_INPUTS["cut bin"] in error_of(rocket(cases["cut bin"], ranks=2))
    assert not list(tmp_path.glob("[a-l]/checkpoints"))


def test_a_full_disk_while_saving_keeps_what_was_saved(run, small_disk):
    """Two checkpoints fit, three do not: the run stops on both ranks and the first ones stay."""
    options = {"checkpoint__interval": 5, "train__sample_prompts": 0, "train__eval_interval": 0}
    done = rocket(run(train__out_dir=small_disk / "run", **options), ranks=2)
    message = error_of(done)
    assert str(small_disk / "run") in message
    assert "No space left" in message
    assert "needs" in message
    assert steps_kept(small_disk / "run") == {5: True, 10: True}
    assert not list((small_disk / "run" / "checkpoints").glob("*.tmp"))
    tensors(small_disk / "run")


def on_two_nodes(arguments):
    """Trains with two torchrun agents of two ranks each, as on two nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                *(f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"),
                *("--nproc_per_node=2", str(ROOT / "rocket.py")),
                *arguments,
            ],
            env=ENVIRONMENT,
        )
        for node in (0, 1)
    ]
    assert [agent.wait(timeout=240) for agent in agents] == [0, 0]


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "once"), [("adamw", "false"), ("muon", "true")])
def test_two_nodes_with_hsdp_match_the_single_process(optimizer, once, run, tmp_path):
    """Sharded within a node, replicated across."""
    reference = rocket(run("alone", optimizer__name=optimizer))
    assert reference.returncode == 0, reference.stderr
    options = {"parallel__strategy": "hsdp", "train__micro_batch_size": 1}  # three a step
    on_two_nodes(run(optimizer__name=optimizer, parallel__reduce_once=once, **options))
    assert np.abs(np.subtract(losses(tmp_path / "run"), losses(tmp_path / "alone"))).max() < 1e-4
    resumed = rocket(run(optimizer__name=optimizer))  # its sharded checkpoint opens on one process
    assert "finished at step 20" in resumed.stdout
    ours, theirs = tensors(tmp_path / "run"), tensors(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


@pytest.mark.long
def test_a_run_moves_between_all_worlds_and_strategies(run, tmp_path):
    """DDP, FSDP2 and HSDP on 1 to 4 ranks, each from the checkpoint of the one before."""
    assert rocket(run("reference", train__max_steps=80)).returncode == 0
    moves = [
        (1, "ddp"),
        (4, "hsdp"),
        (3, "fsdp"),
        (2, "ddp"),
        (4, "hsdp"),
        (1, "ddp"),
        (4, "ddp"),
        (2, "fsdp"),
    ]
    for index, (ranks, strategy) in enumerate(moves, 1):
        options = {"parallel__strategy": strategy, "train__stop_at_step": 10 * index}
        arguments = run("moving", train__max_steps=80, **options)
        if strategy == "hsdp":
            on_two_nodes(arguments)
        else:
            done = rocket(arguments, ranks)
            assert done.returncode == 0, done.stderr
    assert status(tmp_path / "moving")["state"] == "finished"
    differences = np.subtract(losses(tmp_path / "moving"), losses(tmp_path / "reference"))
    assert len(differences) == 80
    assert np.abs(differences).max() < 1e-4


def test_half_of_torchruns_environment_is_refused(run, tmp_path):
    """A WORLD_SIZE without the rest would train on a share of the batch and call it all of it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "rocket.py"), *run()],
        env={**ENVIRONMENT, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert "start with torchrun" in error_of(done)
    assert not (tmp_path / "run").exists()


def test_a_machine_without_git_trains(run, tmp_path):
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, str(ROOT / "rocket.py"), *run(train__max_steps=2)],
        env={**ENVIRONMENT, "PATH": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
