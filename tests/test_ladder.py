"""The scaling law and the ladder that fits it: on made-up losses, and on real small runs."""

import json
import math
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training import ENVIRONMENT, ROOT, error_of, overrides, until

from config import ConfigError, UserError, build_config, load_config
from model import parameter_count
from tools import ladder, law, rungs
from tools.law import Fit, Law
from tools.rungs import Ladder, Speed

TRUE = Law(E=1.3, A=60.0, alpha=0.38, B=400.0, beta=0.43)
# Parameters, and lengths in tokens; CAPPED is what rungs.py plans. LARGE has seven times the
# compute of the largest of both.
Sizes = dict[float, tuple[float, ...]]
EQUAL_TIME: Sizes = {
    size: tuple(longest / part for part in (8, 4, 2, 1))
    for size, longest in {79e3: 7.7e6, 184e3: 5.1e6, 437e3: 3.5e6, 1.83e6: 1.2e6}.items()
}
CAPPED: Sizes = {
    size: tuple(1.2e6 * part / 6 for part in range(6, most + 1))
    for size, most in {184e3: 13, 437e3: 13, 0.9e6: 12, 1.83e6: 6}.items()
}
LARGE = 3.9e6, 4e6


def made_up(noise: float, seed: int, sizes: Sizes = EQUAL_TIME) -> list[tuple[float, float, float]]:
    """Runs whose losses follow TRUE, but for noise of which most is common to a size, as branches
    of one trunk have it."""
    draw, runs = random.Random(seed), []
    for size, lengths in sizes.items():
        common = 0.8 * draw.gauss(0, noise)
        for tokens in lengths:
            error = common + 0.6 * draw.gauss(0, noise)
            runs.append((size, tokens, TRUE.loss(size, tokens) * math.exp(error)))
    return runs


def test_recovers_the_law():
    fitted = law.fit_law(made_up(0.0, 0))
    for name in Law._fields:
        value = getattr(TRUE, name)
        assert getattr(fitted, name) == pytest.approx(value, rel=0.05), name
    assert fitted.loss(*LARGE) == pytest.approx(TRUE.loss(*LARGE), rel=1e-3)


def test_a_run_that_went_wrong_hardly_moves_the_law():
    """Huber's loss counts it by its sign, not by its size."""
    runs = made_up(0.001, 0)
    n, d, loss = runs[9]
    moved = [law.fit_law([*runs[:9], (n, d, loss * f), *runs[10:]]).loss(*LARGE) for f in (1.03, 2)]
    assert moved[0] == pytest.approx(moved[1], rel=2e-3)


def fit_of(runs: list[tuple[float, float, float]]) -> Fit:
    trunks = [size for size, _, _ in runs]
    best = law.fit_law(runs)
    noise = law.noise_of(runs, trunks, best)
    each = [error for trunk in noise for error in trunk]
    deviation = math.sqrt(sum(error**2 for error in each) / len(each))
    return Fit(best, law.resample(runs, trunks, best, noise), deviation, {}, "made up", 1e9)


@pytest.mark.long
@pytest.mark.parametrize(
    ("sizes", "width"), [(EQUAL_TIME, 0.05), (CAPPED, 0.1)], ids=["equal time", "capped"]
)
def test_intervals_hold_what_they_promise(sizes, width, monkeypatch):
    """95% of single runs; of 20 ladders, 17 or more hold theirs in all but a few of such tests."""
    monkeypatch.setattr(law, "RESAMPLES", 40)
    held, widths = 0, []
    for seed in range(20):
        low, predicted, high = law.interval(fit_of(made_up(0.003, seed, sizes)), *LARGE)
        loss = TRUE.loss(*LARGE) * math.exp(random.Random(-seed).gauss(0, 0.003))
        held += low <= loss <= high
        widths.append((high - low) / predicted)
    assert held >= 17
    assert sum(widths) / 20 < width  # and they say something


def test_the_family_is_counted_as_the_model_is():
    for width in (32, 96, 256, 512, 1024, 2048):
        config = build_config({"model": law.shape(width), "tokenizer": {"vocab_size": 600}})
        embedding = 600 * width
        counted = law.parameters(config, 600)
        assert counted == parameter_count(config.model, 600) - embedding
    for width in law.WIDTHS:
        build_config({"model": law.shape(width)})
    assert law.shape(128) == {
        "dim": 128,
        "n_layers": 4,
        "n_heads": 4,
        "n_kv_heads": 4,
        "ffn_dim": 384,
    }


def test_repeats_teach_less_and_less():
    assert law.effective(1e5, 5e6, 1e7) == (1e5, 5e6)
    every = [law.effective(1e5, 1e7 * epochs, 1e7) for epochs in (1, 2, 4, 16, 1e6)]
    # 2305.16264: four epochs are nearly as good as new text, and in the end 16.4 are the most
    assert [tokens / 1e7 for _, tokens in every] == pytest.approx([1, 1.97, 3.73, 10.6, 16.4], 0.01)
    assert {parameters for parameters, _ in every} == {1e5}


def test_parameters_in_excess_count_less_where_the_text_repeats():
    corpus, large = 1e7, 1e8
    assert law.effective(large, corpus, corpus)[0] == large
    counted = [law.effective(large, corpus * epochs, corpus)[0] for epochs in (1.1, 2, 4, 1e5)]
    assert counted == sorted(counted, reverse=True)
    assert counted[0] > 0.99 * large
    assert counted[-1] == pytest.approx(corpus / 20 * (1 + law.EXCESS), rel=0.01)
    # more parameters are never worth less
    sizes = [law.effective(1e5 * 2**power, 4 * corpus, corpus)[0] for power in range(12)]
    assert sizes == sorted(sizes)


def test_a_fit_is_read_as_it_was_written(tmp_path):
    fit = Fit(
        TRUE, [TRUE, law.PUBLISHED], 0.002, {"batch_tokens": 512, "tokens": [1]}, "a text", 4e6
    )
    law.write_fit(tmp_path / "fit.json", fit)
    assert law.read_fit(tmp_path / "fit.json") == fit


LACKING = Fit(TRUE, [TRUE], 0.1, {"batch_tokens": 512, "tokens": [1]}, "a text", 1.0, [{"dim": 32}])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"version": 3, "law": {"E": 1}}',
        '{"law": 3}',
        json.dumps({**LACKING._asdict(), "law": TRUE._asdict()}),
    ],
)
def test_a_damaged_fit_is_one_line(content, tmp_path):
    (tmp_path / "fit.json").write_text(content)
    with pytest.raises(UserError, match=r"fit\.json: damaged"):
        law.read_fit(tmp_path / "fit.json")


def test_a_missing_fit_and_another_version(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        law.read_fit(tmp_path / "fit.json")
    (tmp_path / "fit.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="another version"):
        law.read_fit(tmp_path / "fit.json")


# ---- the plan


SPEED = Speed(start=3.0, step=0.002, flops=5e10)


@pytest.fixture
def config(dataset, tiny_tokenizer, tmp_path, monkeypatch):
    """With a dataset too small for the shortest length of a real ladder."""
    monkeypatch.setattr(rungs, "MIN_STEPS", 80)
    monkeypatch.setattr(rungs, "MIN_TOKENS", 0)
    monkeypatch.setattr(rungs, "TOKENS_PER_PARAMETER", 0)
    values = {"optimizer__name": "muon", "data__seq_len": 64, "train__global_batch_size": 4}
    return load_config(overrides(dataset, tiny_tokenizer, tmp_path / "run", **values), usage="")[0]


def planned(config, out: Path, hours: float = 1, at_once: int = 2) -> Ladder | None:
    ladder = Ladder(out, config, [32, 64, 96], 0, 3, 1, at_once, SPEED, hours, 0.25)
    return rungs.fill(ladder, rungs.MIN_STEPS)


@pytest.mark.parametrize("hours", [0.5, 1, 3])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_plan_stays_within_its_share(config, hours, at_once, tmp_path):
    plan = planned(config, tmp_path, hours, at_once)
    assert plan.total() <= 0.25 * 3600 * hours
    for chain in plan.chains():
        longest = max(rung.steps for rung in chain) * rungs.batch_tokens(config)
        assert longest <= law.MAX_EPOCHS * rungs.split_tokens(config, "train")


def test_branches_leave_where_the_trunk_saves_and_their_decay_begins(config, tmp_path):
    for trunk, *branches in planned(config, tmp_path).chains():
        assert not trunk.config.train.branch_from
        interval = trunk.config.checkpoint.interval
        assert trunk.config.checkpoint.keep_last > trunk.steps // interval
        for branch in branches:
            parent, leaves = branch.config.train.branch_from.split("/checkpoints/step_")
            assert Path(parent).name == trunk.name
            assert int(leaves) % interval == 0
            assert int(leaves) == branch.steps * (1 - rungs.DECAY) < trunk.steps * 0.8


def test_no_run_costs_more_than_the_widest_size_at_the_shortest_length(config, tmp_path):
    costs = {}
    for chain in planned(config, tmp_path).chains():
        costs[chain[0].width] = [rung.steps * rungs.step_flops(rung.config) for rung in chain]
    assert len(costs[96]) == 1
    assert max(costs[32][0], costs[64][0]) <= costs[96][0]


def test_sizes_that_make_too_few_runs(config, tmp_path):
    options = {"hours": 1.0, "flops": 1e10, "sizes": [224, 256, 288], "lengths": 3}
    with pytest.raises(UserError, match=r"6 runs, .*are too few for the fit.*further apart"):
        rungs.new_ladder(config, options, tmp_path)
    with pytest.raises(UserError, match=r"9 runs, of at most 1 lengths"):
        rungs.new_ladder(config, options | {"sizes": [7936, 8064, 8192], "seeds": 3}, tmp_path)


@pytest.mark.parametrize("sizes", [{}, {"sizes": [32, 64, 96]}], ids=["any sizes", "given sizes"])
def test_hours_that_are_too_few(config, tmp_path, sizes):
    """The error names hours that are enough."""
    options = {"hours": 0.01, "flops": 1e10} | sizes
    with pytest.raises(UserError, match=r"0\.01 × --share=0\.25 are too few for . sizes") as error:
        rungs.new_ladder(config, options, tmp_path)
    options["hours"] = float(re.search(r"give --hours=(\S+)", str(error.value))[1])
    plan = rungs.new_ladder(config, options, tmp_path)
    assert 0.8 * 3600 * options["hours"] * 0.25 < plan.total() < 3600 * options["hours"] * 0.25


def test_the_shortest_length_is_enough_for_the_widest_size(config, tmp_path, monkeypatch):
    """Unless the user has named it."""
    plan = planned(config, tmp_path)
    monkeypatch.setattr(rungs, "TOKENS_PER_PARAMETER", 1.25)
    widest = next(chain[0] for chain in plan.chains() if chain[0].width == 96)
    tokens = rungs.least_steps(plan, given=False) * rungs.batch_tokens(config)
    assert tokens == pytest.approx(1.25 * law.parameters(widest.config, 600), rel=0.01)
    assert rungs.least_steps(plan, given=True) == rungs.MIN_STEPS


def test_a_text_that_is_too_little(config, tmp_path, monkeypatch):
    monkeypatch.setattr(rungs, "MIN_STEPS", 10_000)
    with pytest.raises(UserError, match="needs 10,000: take more text"):
        rungs.new_ladder(config, {"hours": 100.0, "flops": 1e10}, tmp_path)


def test_rates_are_those_of_the_shape_of_config(config, tmp_path):
    plan = planned(config, tmp_path)
    assert (plan.base.model.base_dim, plan.base.model.base_layers) == (32, 2)


def test_a_plan_goes_on_only_with_its_own_settings(config, tmp_path):
    plan = planned(config, tmp_path)
    rungs.write_plan(plan)
    assert rungs.read_plan(tmp_path, config, {}) == plan
    with pytest.raises(UserError, match=r"sizes=.*, not \[96\].*seeds=1, not 2: choose"):
        rungs.read_plan(tmp_path, config, {"sizes": [96], "seeds": 2})
    assert rungs.read_plan(tmp_path, config, {"at-once": 1}).at_once == 1
    with pytest.raises(UserError, match=r"hours=1, not 2\.0: choose another --out"):
        rungs.read_plan(tmp_path, config, {"hours": 2.0})
    config.optimizer.learning_rate = 1.0
    with pytest.raises(UserError, match=r"learning_rate = 0\.003, not 1\.0: choose another --out"):
        rungs.read_plan(tmp_path, config, {})
    (tmp_path / "plan.json").write_text('{"widths": [32]}')
    with pytest.raises(UserError, match=r"another version of ladder\.py; choose another --out"):
        rungs.read_plan(tmp_path, config, {})
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        rungs.read_plan(tmp_path, config, {})


def test_an_epoch_of_a_mixture_is_over_with_its_first_dataset(config, dataset, tmp_path):
    tokens = rungs.split_tokens(config, "train")
    other = tmp_path / "other"
    other.mkdir()
    split = {"shards": [{"tokens": 1000 * tokens}]}
    (other / "manifest.json").write_text(json.dumps({"splits": {"train": split}}))
    config.data.mixture = {str(dataset): 3.0, str(other): 1.0}
    assert rungs.split_tokens(config, "train") == pytest.approx(4 / 3 * tokens, abs=1)


def test_hidden_gpus_are_none(monkeypatch):
    for visible, count in (("", 0), ("0,3", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert rungs.devices() == count


def test_a_run_that_cannot_start_is_an_error_and_no_hang(config, tmp_path):
    """Nowhere to write its log, as on a full disk."""
    plan = planned(config, tmp_path / "nowhere")
    ended = dict(rungs.Workers(plan.out, 2).train(plan.chains()))
    assert len(ended) == plan.count()
    assert all("No such file" in error or "did not finish" in error for error in ended.values())


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--hours=-1", "--hours is a number above 0"),
        ("--hours=nan", "--hours is a number above 0"),
        ("--share=2", "a share below 1"),
        ("--lengths=2", "--lengths is 3 or more"),
        ("--sizes=32,64", "name 3 widths or more"),
        ("--sizes=32,64,100", "100 is no width of the family; take 96"),
        ("--sizes=a", "--sizes is a whole number above 0"),
    ],
)
def test_wrong_flags(flag, says):
    with pytest.raises(ConfigError, match=says):
        ladder.read_flags([flag])


# ---- rungs


def pretend(plan: Ladder) -> None:
    """The files of finished runs whose losses follow TRUE, repeats and all."""
    for rung in (rung for chain in plan.chains() for rung in chain):
        directory = plan.out / rung.name
        directory.mkdir()
        size = law.parameters(rung.config, 600)
        tokens = rung.steps * rungs.batch_tokens(rung.config)
        loss = TRUE.loss_on(size, tokens, rungs.split_tokens(plan.base, "train"))
        (directory / "status.json").write_text('{"state": "finished"}')
        (directory / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": loss}) + "\n")


def test_bad_rungs_are_named_and_left_out(config, tmp_path):
    plan = planned(config, tmp_path)
    pretend(plan)
    first, second, third = sorted(plan.chains(), key=len)
    (tmp_path / first[0].name / "status.json").write_text(
        '{"state": "failed", "step": 7, "reason": "non_finite"}'
    )
    (tmp_path / second[0].name / "metrics.jsonl").write_text('{"step": 1, "val_loss": 99.0}\n')
    (tmp_path / third[1].name / "status.json").unlink()
    found, bad = ladder.collect(plan)
    assert len(found) == plan.count() - 3
    assert bad[first[0].name] == "failed at step 7: non_finite"
    assert bad[second[0].name].startswith("diverged: 99.0000")
    assert bad[third[1].name] == "not trained"
    with pytest.raises(UserError, match=r"4 good rungs.*it needs 7.*Train those that are left out"):
        ladder.fit_ladder(plan, found)


def test_fit_page_and_predictions(config, tmp_path, monkeypatch):
    monkeypatch.setattr(law, "RESAMPLES", 5)
    plan = planned(config, tmp_path)
    pretend(plan)
    found, _ = ladder.collect(plan)
    fit, errors = ladder.fit_ladder(plan, found)
    assert max(map(abs, errors)) < 0.01
    assert fit.base["model.base_dim"] == 32
    assert fit.base["batch_tokens"] == 256
    path = ladder.large_run(plan, fit)
    large = load_config([str(path)], usage="")[0]
    seconds = plan.speed.seconds(large.train.max_steps, rungs.step_flops(large))
    assert seconds <= 1.02 * 3600 * plan.hours * (1 - plan.share)
    ladder.predict(tmp_path, fit, path)
    ladder.predict(tmp_path, fit, path)  # the same again is not written again
    (row,) = ladder.outcomes(tmp_path)
    assert row["before"]
    assert row["differs"] == []
    assert "loss" not in row
    directory = Path(row["run"])
    directory.mkdir()
    (directory / "status.json").write_text('{"state": "finished"}')
    (directory / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "val_loss": row["high"]}) + "\n"
    )
    (row,) = ladder.outcomes(tmp_path)
    assert row["held"]
    assert row["error"] < 0
    assert "inside the interval" in ladder.outcome_line(row)
    best = ladder.best_runs(plan, fit)
    assert [one["flops"] for one in best] == sorted(one["flops"] for one in best)
    page = ladder.page(fit, errors, {"dim32": "killed"}, best, [row]).decode()
    assert "killed" in page
    assert "large predicted" in page
    assert "://" not in page


def test_what_a_run_does_unlike_the_rungs(config, tmp_path, monkeypatch):
    monkeypatch.setattr(law, "RESAMPLES", 2)
    plan = planned(config, tmp_path)
    pretend(plan)
    fit, _ = ladder.fit_ladder(plan, ladder.collect(plan)[0])
    fit = fit._replace(corpus=1e6)  # larger than these models
    steps = plan.chain(96, plan.base.train.seed)[0].steps

    def differences(width, **values):
        values = {"train__max_steps": steps} | values
        changed = {key.replace("__", "."): value for key, value in values.items()}
        run = rungs.changed_config(plan.base, rungs.family(width) | changed)
        return [one.partition(" (rungs: ")[0] for one in ladder.differences(fit, run)]

    assert differences(96) == []
    assert differences(96, optimizer__learning_rate=1.0) == ["optimizer.learning_rate=1.0"]
    assert differences(96, model__ffn_dim=64)[0] == "model.ffn_dim=64"
    assert differences(320)[0] == "model.n_layers=5"
    assert differences(96, train__max_steps=steps // 4)[0].startswith("tokens per parameter")
    assert differences(32, train__max_steps=50 * steps)[-1].startswith("epochs")
    assert differences(1024)[-1].startswith("more parameters than the text has tokens")


# ---- real runs


def command(dataset: Path, tokenizer: Path, out: Path) -> list[str]:
    values = {"data__seq_len": 64, "train__global_batch_size": 4, "optimizer__name": "muon"}
    keys = overrides(dataset, tokenizer, out / "run", **values)
    return [sys.executable, str(ROOT / "tools" / "ladder.py"), *keys, f"--out={out}"]


def test_no_hours(dataset, tiny_tokenizer, tmp_path):
    tried = subprocess.run(
        command(dataset, tiny_tokenizer, tmp_path / "ladder"),
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert "give --hours" in error_of(tried)
    assert not (tmp_path / "ladder").exists()


def test_tasks_need_a_speed(dataset, tiny_tokenizer, tmp_path):
    """A login node has no GPU to measure."""
    tried = subprocess.run(
        [*command(dataset, tiny_tokenizer, tmp_path / "ladder"), "--hours=1", "--tasks"],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert "give --flops" in error_of(tried)
    assert not tried.stdout


@pytest.mark.long
def test_a_small_ladder_that_is_killed_goes_on(dataset, tiny_tokenizer, tmp_path):
    """A plan of its own, so that it takes as many steps on any machine: 300 to 400."""
    out = tmp_path / "ladder"
    keys = command(dataset, tiny_tokenizer, out)
    config = load_config(list(keys[2:-1]), usage="")[0]
    base = rungs.base_config(config, 8)
    plan = Ladder(out, base, [32, 64, 96], 40, 3, 1, 2, SPEED, 1.0, 0.25)
    rungs.write_plan(plan)
    first = subprocess.Popen(keys, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    until(lambda: list(out.glob("*/checkpoints/step_*")))
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 130
    names = [rung.name for chain in plan.chains() for rung in chain]
    assert any(rungs.state(out / name) != "finished" for name in names)
    second = subprocess.run(keys, capture_output=True, text=True, env=ENVIRONMENT)
    assert second.returncode == 0, second.stdout + second.stderr
    assert all(rungs.state(out / name) == "finished" for name in names)
    assert len(law.read_fit(out / "fit.json").rungs) == plan.count() == 7
    assert (out / "ladder.html").exists()
    assert (out / "predictions.jsonl").exists()
    trained = [(out / name / "metrics.jsonl").stat().st_mtime_ns for name in names]
    subprocess.run(keys, check=True, capture_output=True, env=ENVIRONMENT)
    assert trained == [(out / name / "metrics.jsonl").stat().st_mtime_ns for name in names]
