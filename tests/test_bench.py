"""bench.py measures the real programs, on any corpus, and says what it can't take in one line.

Protected here: that it runs, that all that is compared does the same work (it stops else, and peers
have as many parameters), and that its figures fit each other. How fast anything is, no test
asserts. Peers that are cloned are not tried here, those that are packages are.
"""

import json
import pickle
import subprocess
import sysconfig

import pytest
from conftest import ROOT
from peers import lay_out, train_command
from training import ENVIRONMENT, launcher, overrides

from config import UserError, load_config
from tools.race import WITHIN, next_length

SMALL = (
    "--model.dim=64 --model.n_layers=2 --model.n_heads=4 --model.ffn_dim=192"
    " --model.tie_embeddings=true --tokenizer.vocab_size=512 --data.seq_len=32"
    " --train.global_batch_size=4 --train.micro_batch_size=2 --train.dtype=float32 --repeats=1"
    " --optimizer.name=adamw"
).split()


def bench(*arguments, ranks=1):
    command = [*launcher(ranks), str(ROOT / "tools" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)


def measured(path, *arguments, ranks=1):
    """Contestants, and medians by contestant and name, of a run that has to succeed."""
    result = bench(*arguments, f"--json={path}", ranks=ranks)
    assert result.returncode == 0, result.stderr
    figures = json.loads(path.read_text())
    medians = {name: {} for name in figures["contestants"]}
    for row in figures["rows"]:
        assert row["low"] <= row["median"] <= row["high"]
        medians[row["contestant"]][f"{row['what']} {row['unit']}"] = row["median"]
    return figures["contestants"], medians, result.stdout


@pytest.fixture
def corpus(tmp_path, tiny_tokenizer):
    """Arguments that name a corpus of 40 documents."""
    rows = [json.dumps({"text": f"# {i}\ndef f():\n    return {i}\n" * 300}) for i in range(40)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    return [
        f"--tokenizer.path={tiny_tokenizer}",
        "--tokenizer.vocab_size=600",
        f'--data.sources=["{tmp_path}/corpus.jsonl"]',
        "--data.val_fraction=0.2",
    ]


def test_tokenizing_writes_rates_and_ratios(corpus, tmp_path):
    path = tmp_path / "figures.json"
    options = ["--repeats=1", "--workers=2", "--copies=2", f"--json={path}"]
    result = bench("tokenizing", *corpus, *options)
    assert result.returncode == 0, result.stderr
    assert "; 1 turns\n" in result.stdout
    assert "documents 80" in result.stdout
    figures = json.loads(path.read_text())
    assert all(row["what"].endswith(", 2 workers") for row in figures["rows"])
    median = {row["what"].removesuffix(", 2 workers"): row["median"] for row in figures["rows"]}
    assert median["prepare / ceiling"] == pytest.approx(median["prepare"] / median["ceiling"])
    assert median["tokenizes / ceiling"] == pytest.approx(median["tokenizes"] / median["ceiling"])
    compared = figures["machine"]["datasets"] != "absent"
    assert ("prepare / datasets.map" in median) == compared
    assert ("not compared" in result.stdout) != compared


def test_training_tells_where_a_step_goes(tmp_path):
    about, medians, _ = measured(tmp_path / "figures.json", "training", *SMALL)
    assert about["rocket"]["type"] == "float32"
    assert "tokenizer" in about["rocket"]["data"]  # why reading is not measured
    own, parameters = medians["rocket"], about["rocket"]["parameters"]
    step = own["step ms"]
    assert own["training tokens/s"] * step / 1000 == pytest.approx(4 * 32)
    parts = [own[f"{part} ms"] for part in ("forward", "backward", "optimizer")]
    assert min(parts) > 0
    assert sum(parts) <= step
    flops = 6 * parameters + 12 * 2 * 64 * 32  # a token: embeddings are tied, so all count
    done = flops * own["training tokens/s"] / 1e9
    assert own["MFU %"] == pytest.approx(100 * done / own["matmul GFLOP/s"])
    assert own["memory GB"] > 0.05
    assert own["communication ms"] == 0
    assert "data ms" not in own


@pytest.mark.long
def test_training_under_torchrun_counts_communication(dataset, tiny_tokenizer, tmp_path):
    path, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    run = overrides(dataset, tiny_tokenizer, tmp_path)
    options = ["--repeats=1", f"--trace={trace}"]
    about, medians, printed = measured(path, "training", *run, *options, ranks=2)
    assert about["rocket"]["device"] == "2 × cpu"
    assert printed.count("tokens/s") == 1  # rank 0 alone
    assert medians["rocket"]["communication ms"] > 0
    assert medians["rocket"]["data ms"] > 0
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["training", "sampling"])
def test_contestants_of_equal_shape_take_turns(tmp_path, name):
    rivals = ["--peer=transformers", "--versus=--optimizer.grad_clip=0 --model.ffn_dim=64"]
    rivals += [f"--checkout={ROOT}"]
    options = ["--batch=1,2", "--prompt=8", "--new=4"]
    about, medians, _ = measured(tmp_path / "f.json", name, *SMALL, *rivals, *options)
    labels = ["rocket", "transformers", "--optimizer.grad_clip=0 --model.ffn_dim=64", str(ROOT)]
    assert list(about) == labels
    counts = [about[label]["parameters"] for label in labels]
    assert counts[0] == counts[1] == counts[3] == counts[2] + 2 * 3 * 64 * 128
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    rates = [row for row in rows if row["unit"] == "tokens/s"]
    assert len(rates) == 4 * (1 if name == "training" else 4)
    for row in rates:
        what = f"{row['what']} tokens/s"
        if row["contestant"] == "rocket":
            assert "ratio" not in row
        else:
            own = medians[row["contestant"]][what]
            assert row["ratio"]["median"] == pytest.approx(own / medians["rocket"][what])


def test_sampling_measures_prefill_and_decode(tmp_path):
    options = ["--batch=1,3", "--prompt=8", "--new=4", "--train.dtype=bfloat16"]
    about, medians, _ = measured(tmp_path / "f.json", "sampling", *SMALL, *options)
    assert about["rocket"]["type"] == "bfloat16"
    kinds = ("prefill, batch 1", "decode, batch 1", "prefill, batch 3", "decode, batch 3")
    assert list(medians["rocket"]) == [f"{kind} tokens/s" for kind in kinds]


def test_checkpoint_measures_saving_and_loading(tmp_path):
    about, medians, _ = measured(tmp_path / "f.json", "checkpoint", *SMALL)
    own = medians["rocket"]
    state = 12 * about["rocket"]["parameters"] / 1e9  # weights and two moments
    assert state < own["size GB"] < 1.1 * state
    for what in ("save", "load"):
        assert own[f"{what} s"] * own[f"{what} GB/s"] == pytest.approx(own["size GB"])


def test_time_to_loss_trains_from_raw_text_until_the_target(tmp_path):
    """A real race: Rocket reaches the target, nanoGPT's recipe at a useless rate doesn't."""
    stdlib = sysconfig.get_paths()["stdlib"]
    path, model = tmp_path / "figures.json", SMALL[:4]
    options = [f'--data.sources=["{stdlib}/json", "{stdlib}/email"]', "--data.val_fraction=0.2"]
    options += ["--tokenizer.vocab_size=600", "--data.seq_len=32", "--train.global_batch_size=4"]
    options += ["--train.max_steps=100", "--train.eval_sequences=30", "--log.report=false"]
    race = ["--target=4", "--first=30", "--limit=1", "--repeats=1", "--rates=nanogpt:1e-9"]
    about, medians, said = measured(path, "time-to-loss", *model, *options, *race, "--peer=nanogpt")
    own, other = medians["rocket"], medians["nanogpt"]
    assert about["rocket"]["steps"] == 30
    assert own["loss bits/byte"] <= 4 < other["loss bits/byte"]
    assert own["tokens k"] == pytest.approx(30 * 4 * 32 / 1000)
    parts = own["start s"] + own["steps s"] + own["end s"]
    assert own["run s"] == pytest.approx(parts)
    assert own["from raw text s"] > own["run s"] > own["start s"] > 0
    assert own["steps s"] == pytest.approx(own["token µs"] * own["tokens k"] / 1000)
    assert list(other) == ["loss bits/byte"]
    assert "not reached" in about["nanogpt"]
    assert "raise --limit" in said


def test_lengths_are_guessed_from_the_runs_before():
    """On a real curve the search ends within a few runs, at a run that just reaches the target."""

    def loss(steps):
        return 1.2 + 8 * steps**-0.33

    for target in (1.8, 2.0, 2.5):
        runs = {300: loss(300)}
        while steps := next_length(runs, target, longest=10_000):
            runs[steps] = loss(steps)
        assert len(runs) <= 5
        assert target - WITHIN <= loss(min(s for s in runs if runs[s] <= target)) <= target
    assert next_length({300: 3.0}, 2.0, longest=300) is None
    assert next_length({300: 3.0}, 2.0, longest=400) == 400
    assert next_length({300: 3.0, 400: 2.9}, 2.0, longest=400) is None
    assert 300 < next_length({300: 2.1, 600: 2.2}, 2.0, longest=9_999) <= 2_400  # noise


def test_peers_read_the_same_tokens(dataset, tiny_tokenizer, tmp_path):
    run = overrides(dataset, tiny_tokenizer, tmp_path)
    config, _ = load_config(run, usage="")
    (clone := tmp_path / "clone").mkdir()
    for name in ("configurator.py", "train.py"):
        (clone / name).write_text("")
    splits = {}
    for split in ("train", "val"):
        shards = sorted(dataset.glob(f"{split}-*.bin"))
        splits[split] = b"".join(path.read_bytes() for path in shards)
    for name, files in (
        ("nanogpt", ["corpus/val.bin", "corpus/train.bin"]),
        ("llama2.c", ["tok600/data00.bin", "tok600/data01.bin"]),
    ):
        (folder := tmp_path / name).mkdir()
        peer = f"{name}:{clone} --beta2=0.9"
        lay_out(peer, config, folder)
        assert [(folder / "data" / f).read_bytes() for f in files] == [*splits.values()][::-1]
        command = train_command(peer, config, 2e-3, 50, 5)
        assert command[0] == str(clone / "train.py")
        assert command[-1] == "--beta2=0.9"
        assert {"--learning_rate=0.002", "--max_iters=50", "--warmup_iters=5"} <= set(command)
    meta = pickle.loads((tmp_path / "nanogpt/data/corpus/meta.pkl").read_bytes())
    assert meta == {"vocab_size": 600}
    with pytest.raises(UserError, match="is not there"):
        lay_out(f"nanogpt:{tmp_path}/none", config, tmp_path)


@pytest.mark.long
def test_a_peer_that_is_not_there_is_one_line(tmp_path):
    result = bench("training", *SMALL, f"--peer=nanogpt:{tmp_path}")
    assert result.returncode == 1
    assert f"nanogpt: --peer=nanogpt:{tmp_path}: {tmp_path}/model.py is not" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.long
def test_startup_launches_the_program(dataset, tiny_tokenizer, tmp_path):
    run = overrides(dataset, tiny_tokenizer, tmp_path)
    _, medians, _ = measured(tmp_path / "f.json", "startup", *run, "--repeats=1")
    assert medians["rocket"]["first step s"] > 0
    assert not (tmp_path / "checkpoints").exists()  # it ran elsewhere


NAMES = "training, sampling, startup, checkpoint, tokenizing, time-to-loss"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], f"name first what to measure: {NAMES}; not ''"),
        (["tokenising"], f"name first what to measure: {NAMES}; not 'tokenising'"),
        (["training", "--shape=large"], "--shape is one of step, memory, not 'large'"),
        (["training", "--steps=0"], "--steps: one whole number above 0, not '0'"),
        (["startup", "--peer=transformers"], "only training and sampling"),
        (["startup", "--versus=--model.dim=7"], "--model.dim=7: model.dim (7) must divide"),
        (["startup", "--data.dir=none", "--tokenizer.path=none"], "train_tokenizer.py makes it"),
        (["tokenizing", "--workers=0"], "--workers: whole numbers above 0, such as 1,2, not '0'"),
        (["tokenizing", "--repeats=x"], "--repeats: "),
        (["tokenizing", "--repeats=2,3"], "--repeats: one whole number above 0, not '2,3'"),
        (["tokenizing", "--json"], "unknown option --json"),
        (["tokenizing", "--data.format=instruct"], "data.format = text"),
        (["time-to-loss"], "--target: a number above 0, not 'BITS'"),
        (["time-to-loss", "--target=2", "--rates=nanogpt:1e-3"], "no contestant is 'nanogpt'"),
        (["time-to-loss", "--target=2", "--peer=transformers"], "--peer=nanogpt or llama2.c"),
        (
            ["time-to-loss", "--target=2", "--peer=nanogpt", "--peer=nanogpt"],
            "are called 'nanogpt'",
        ),
        (["time-to-loss", "--target=2", "--peer=nanogpt:none"], "none/train.py is not there"),
        (["time-to-loss", "--target=2", "--train.epochs=1", "--train.max_steps=0"], "max_steps"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, said):
    result = bench(*arguments)
    assert result.returncode == 1
    assert result.stdout.count("\n") <= 2  # the machine, the first contestant
    assert result.stderr.startswith("bench.py: error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
