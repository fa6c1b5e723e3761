"""plan.py with a budget chooses a configuration, and says what limits it.

Protected here: that the file it writes loads and is the plan that it printed, with a reason for
each key; that it stays within the hours, the memory and the text; that more hours never make a
smaller model; that the user's keys win; and that a real run takes the hours that were planned.
"""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT  # which puts the repository on the path
from training import ENVIRONMENT, rocket, rows

from config import build_config, read_toml, resolve_path
from tools import dial, law, plan
from tools.memory import sizes

H100 = ("--gpu=h100", "--gpus=8")


@pytest.fixture(scope="module")
def corpora(tiny_tokenizer, tmp_path_factory):
    """Datasets of a name's number of tokens, as far as a plan reads them: manifest, tokenizer."""
    folder, digest = tmp_path_factory.mktemp("corpora"), dial.file_sha256(tiny_tokenizer)

    def corpus(tokens: float) -> str:
        path = folder / f"{tokens:.0e}"
        path.mkdir(exist_ok=True)
        shutil.copy(tiny_tokenizer, path / "tokenizer.model")
        tokenizer = {"sha256": digest, "vocab_size": 32_000}
        splits = {"train": {"tokens": int(tokens)}, "val": {"tokens": int(tokens / 100)}}
        (path / "manifest.json").write_text(json.dumps({"tokenizer": tokenizer, "splits": splits}))
        return str(path)

    return corpus


def program(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)


def decided(data, *arguments):
    task, _ = dial.read_task([f"--data={data}", *arguments])
    return task, dial.decide(task)


def fit_file(path, **base):
    """A fit as ladder.py writes it."""
    base = {
        "model.base_dim": 96,
        "model.base_layers": 3,
        "data.seq_len": 256,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 5e-3,
        "optimizer.momentum": 0.9,
        "optimizer.schedule": "wsd",
        "optimizer.warmup_steps": 40,
        "train.global_batch_size": 8,
        "batch_tokens": 2048,
        "tokens": [1e6, 4e6],
    } | base
    published = law.PUBLISHED._replace(E=1.5)
    law.write_fit(path, law.Fit(published, [published], 0.01, base, "my text", 1e12))
    return path


# The file.


def test_the_written_file_is_the_plan_and_gives_reasons(corpora, tmp_path):
    path, data = tmp_path / "mine.toml", corpora(1e12)
    arguments = ("--hours=24", *H100, f"--data={data}")
    done = program(*arguments, f"--write={path}")
    assert done.returncode == 0, done.stderr
    assert f"slurm/train.sh {path})" in done.stdout
    text = path.read_text()
    keys = [line for line in text.splitlines() if line and line[0] not in "#["]
    assert keys
    assert all(re.fullmatch(r"\w+ = .+  # \S.+", line) for line in keys)
    assert all(line in done.stdout for line in keys)  # what is written is shown
    task, decision = decided(data, *arguments[:3], f"--write={path}")
    config = build_config(read_toml(path))
    assert config == decision.plan.config
    found = json.loads(program(*arguments, "--json").stdout)
    assert found["parameters"] == sizes(config).total
    assert found["config"]["model.dim"]["value"] == config.model.dim
    assert found["tokens"] == pytest.approx(
        config.train.max_steps * config.train.global_batch_size * config.data.seq_len
    )
    assert f"{config.train.max_steps:,} steps" in done.stdout
    assert 0.9 * 24 <= found["hours"] <= 24
    assert sum(found["hours_by_part"].values()) == pytest.approx(found["hours"])
    assert task.seconds == 24 * 3600


def test_a_file_is_never_overwritten(corpora, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("# mine\n")
    done = program("--hours=1", *H100, f"--data={corpora(1e9)}", f"--write={path}")
    assert done.returncode == 1
    assert "exists" in done.stderr
    assert path.read_text() == "# mine\n"


# What limits.


def test_hours_limit(corpora):
    _, decision = decided(corpora(1e13), "--hours=24", *H100)
    assert (decision.limit, decision.warning) == ("hours", "")
    assert decision.plan.option.fit == plan.FITS


def test_memory_limits(corpora):
    task, decision = decided(corpora(1e13), "--hours=3000", "--gpu=a10", "--gpus=1")
    assert decision.limit == "memory"
    assert decision.plan.option.total <= task.cluster.memory / 1.1
    _, more = decided(corpora(1e13), "--hours=3000", "--gpu=h200", "--gpus=1")
    assert more.limit == "hours"


def test_text_limits(corpora):
    """More hours than the text is worth leave the model that four epochs can teach."""
    data = corpora(1e9)
    plans = [decided(data, f"--hours={hours}", *H100) for hours in (0.2, 24, 2400)]
    assert [decision.limit for _, decision in plans] == ["hours", "text", "text"]
    enough, ample = plans[1][1].plan, plans[2][1].plan
    assert 3.5e9 < enough.tokens <= 4e9
    assert ample.config == enough.config
    assert "hours are left" in plans[1][1].warning
    _, asked = decided(data, "--hours=24", *H100, "--train.epochs=10", "--model.dim=256")
    assert "above 4 epochs" in asked.warning
    assert asked.plan.tokens == pytest.approx(10e9, rel=1e-3)


def test_a_model_has_no_more_parameters_than_the_text_has_tokens(corpora):
    """Also where the user says how long to train; but the user's own width stays."""
    data = corpora(4e6)
    for length in ("--train.epochs=4", "--train.max_steps=1000"):
        _, decision = decided(data, "--hours=24", *H100, length)
        assert decision.limit == "text"
        assert decision.plan.parameters <= 4e6
    _, wide = decided(data, "--hours=24", *H100, "--model.dim=512")
    assert wide.plan.config.model.dim == 512
    assert "learns it by heart" in wide.warning


def test_a_text_too_small_for_any_run(corpora):
    done = program("--hours=1", "--gpu=h100", "--gpus=64", f"--data={corpora(1e5)}")
    assert "the text is too little" in done.stderr
    assert done.returncode != 0


def test_more_hours_never_end_worse(corpora):
    """Also where the text begins to limit: on fast GPUs, tiny models are not cheaper."""
    plans = [decided(corpora(4e6), f"--hours={h}", *H100)[1].plan for h in (0.05, 0.06, 0.2, 24)]
    losses = [one.loss for one in plans]
    assert losses == sorted(losses, reverse=True)
    assert 3.5 < plans[-1].tokens / 4e6 <= 4


@pytest.mark.parametrize("tokens", [1e9, 1e13])
def test_more_hours_never_make_a_smaller_model(corpora, tokens):
    """On 64 GPUs, where batch and strategy come in large steps."""
    hours = [0.25 * 2**i for i in range(5)]
    gpus = ("--gpu=h100", "--gpus=64")
    plans = [decided(corpora(tokens), f"--hours={h}", *gpus)[1].plan for h in hours]
    dims = [one.config.model.dim for one in plans]
    assert dims == sorted(dims)
    assert tokens < 1e10 or dims[0] < dims[-1]
    assert all(one.seconds <= 3600 * h for one, h in zip(plans, hours, strict=True))


# The user's keys, and the ladder's.


def test_the_users_keys_win_and_the_rest_adapts(corpora):
    data = corpora(1e12)
    _, free = decided(data, "--hours=24", *H100)
    keys = ("--model.dim=512", "--optimizer.learning_rate=1e-3", "--train.seed=7")
    _, fixed = decided(data, "--hours=24", *H100, *keys)
    config = fixed.plan.config
    assert (config.model.dim, config.optimizer.learning_rate, config.train.seed) == (512, 1e-3, 7)
    assert all(
        fixed.plan.choices[key].reason == "your choice"
        for key in ("model.dim", "optimizer.learning_rate", "train.seed")
    )
    assert config.model.n_layers == 8  # of the family
    assert fixed.plan.tokens > 2 * free.plan.tokens
    assert fixed.plan.seconds > 0.95 * 24 * 3600
    ways = ("--train.recompute=block", "--parallel.strategy=fsdp", "--train.micro_batch_size=2")
    _, slower = decided(data, "--hours=24", *H100, *ways)
    assert slower.plan.tokens < free.plan.tokens
    assert slower.plan.config.train.micro_batch_size == 2
    assert slower.plan.option.setup.strategy == slower.plan.config.parallel.strategy == "fsdp"
    _, short = decided(data, "--hours=24", *H100, "--train.max_steps=1000", "--model.dim=512")
    assert short.plan.config.train.max_steps == 1000
    assert short.limit == "your values"


def test_a_fit_gives_law_settings_and_loss(corpora, tmp_path):
    path, data = fit_file(tmp_path / "fit.json"), corpora(1e12)
    done = program("--hours=2", *H100, f"--data={data}", f"--fit={path}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    config = {key: one["value"] for key, one in found["config"].items()}
    assert (config["model.base_dim"], config["model.base_layers"]) == (96, 3)
    assert (config["optimizer.schedule"], config["optimizer.momentum"]) == ("wsd", 0.9)
    # batch and rate are not scaled: the law holds for those of the rungs
    assert (config["train.global_batch_size"], config["optimizer.learning_rate"]) == (8, 5e-3)
    assert (config["data.seq_len"], config["model.max_seq_len"]) == (256, 256)
    low, high = found["loss_interval"]
    assert low < found["loss"] < high
    published = law.PUBLISHED._replace(E=1.5)
    assert found["loss"] == pytest.approx(
        published.loss(found["law_parameters"], found["tokens"]), rel=1e-6
    )
    plain = program("--hours=2", *H100, f"--data={data}")
    assert "not predicted: the size is by published constants" in " ".join(plain.stdout.split())


@pytest.mark.parametrize("recipe", dial.RECIPES.values(), ids=dial.RECIPES)
def test_rate_and_batch_of_the_recipe_itself(recipe):
    """At its own batch and length a recipe is as it was swept."""
    steps = recipe.tokens / recipe.batch_tokens
    assert dial.learning_rate(recipe, recipe.batch_tokens, steps) == recipe.rate
    assert dial.batch_tokens(recipe, recipe.tokens) == recipe.batch_tokens
    batch = dial.batch_tokens(recipe, 1e10)
    assert dial.batch_tokens(recipe, 0, int(1e10 / batch)) == pytest.approx(batch, rel=1e-3)
    assert dial.learning_rate(recipe, 10 * batch, steps) == dial.learning_rate(
        recipe, 100 * batch, steps
    )


@pytest.mark.parametrize("rate", [None, 1e-3, 0.0])
def test_weights_are_forgotten_over_the_run(rate, corpora):
    """Decay, rate and steps multiply to one, also for a rate of the user; 0.1 is the most."""
    extra = [] if rate is None else [f"--optimizer.learning_rate={rate}"]
    config = decided(corpora(1e12), "--hours=24", *H100, *extra)[1].plan.config
    forgotten = config.optimizer.learning_rate * config.train.max_steps
    assert config.optimizer.weight_decay == pytest.approx(min(1 / max(forgotten, 1), 0.1), rel=0.5)


def test_a_text_that_repeats_keeps_its_decay(corpora):
    """Less let a model learn four epochs by heart (docs/experiments.md)."""
    config = decided(corpora(1e7), "--hours=24", *H100)[1].plan.config
    tokens = config.train.max_steps * config.train.global_batch_size * config.data.seq_len
    assert tokens > 3 * 1e7
    assert config.optimizer.weight_decay == 0.1


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hours=1"], "say which prepared dataset: --data=DIR"),
        (["--hours=1", "--data=data/nothing"], "no dataset here"),
        (["--hours=many", "--data=DATA"], "--hours is a number above 0, not 'many'"),
        (["--hours=1", "--gpu-hours=1", "--data=DATA"], "--hours or --gpu-hours, not both"),
        (["--hours=1", "config/tiny.toml", "--data=DATA"], "a budget, not both"),
        (["--hours=1e-5", "--data=DATA"], "too little: the least run"),
        (["--hours=1", "--data=DATA", "--train.max_steps=999999999"], "too little: the least run"),
        (["--hours=24", "--data=DATA", "--gpus=1", "--model.dim=8192"], "nothing fits"),
        (["--hours=1", "--data=DATA", "--model.dmi=64"], "did you mean model.dim?"),
        (["--hours=1", "--data=DATA", "--model.dim=many"], "model.dim is a whole number"),
        (["--hours=1", "--data=DATA", "--model.dim=100"], "take 96, or give model.n_heads too"),
        (["--hours=1", "--data=DATA", "--fit=nowhere.json"], "nowhere.json: no such file"),
        (["--hours=1", "--data=DATA", "--fit=FIT", "--optimizer.name=adamw"], "another law"),
        (["--hours=1", "--data=DATA", "--write=nowhere/mine.toml"], "no such directory"),
        (["--hours=1", "--data=DATA", "--gpus=1", "--parallel.strategy=fsdp"], "more ranks"),
        (["--write=mine.toml"], "goes with a budget"),
    ],
)
def test_mistakes_are_one_line(arguments, message, corpora, tmp_path):
    given = {"DATA": corpora(1e12), "FIT": str(fit_file(tmp_path / "fit.json"))}
    for name, value in given.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    done = program(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("plan.py: error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_a_lost_tokenizer_is_named(corpora, tiny_tokenizer):
    data = corpora(3e9)
    (resolve_path(data) / "tokenizer.model").unlink()
    done = program("--hours=1", *H100, f"--data={data}")
    assert "--tokenizer.path=FILE" in done.stderr
    named = program("--hours=1", *H100, f"--data={data}", f"--tokenizer.path={tiny_tokenizer}")
    assert named.returncode == 0, named.stderr


# On this machine.


def test_a_plan_for_this_machine_trains(dataset, tiny_tokenizer, tmp_path):
    """The file of a stated speed is what rocket.py takes."""
    path = tmp_path / "mine.toml"
    done = program(
        *("--hours=0.02", "--gpu=cpu", "--gpu-tflops=0.01", f"--data={dataset}"),
        *(f"--tokenizer.path={tiny_tokenizer}", f"--write={path}"),
        f"--train.out_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    assert f"python rocket.py {path}" in done.stdout
    trained = rocket([str(path), "--train.stop_at_step=2", "--log.report=false"])
    assert trained.returncode == 0, trained.stderr


@pytest.mark.long
def test_a_run_takes_the_hours_that_were_planned(dataset, tiny_tokenizer, tmp_path):
    """Measured here, then trained here: within a factor of two of some minutes."""
    path = tmp_path / "mine.toml"
    done = program(
        *("--hours=0.04", "--gpu=cpu", f"--data={dataset}", f"--write={path}"),
        *(f"--tokenizer.path={tiny_tokenizer}", f"--train.out_dir={tmp_path / 'run'}", "--json"),
    )
    assert done.returncode == 0, done.stderr
    planned = 3600 * json.loads(done.stdout)["hours"]
    start = time.monotonic()
    trained = rocket([str(path)])
    taken = time.monotonic() - start
    assert trained.returncode == 0, trained.stderr
    print(f"planned {planned:.0f} s, taken {taken:.0f} s")
    assert planned / 2 < taken < 2 * planned
    assert rows(tmp_path / "run")[-1]["val_loss"] < 6.0
