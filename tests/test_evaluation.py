"""Protects evaluation: the figures of training, every token once, and multiple choice as it is
meant; from a run directory and from a Hugging Face directory."""

import json
import math

import pytest
import torch
from training import overrides, rocket

from config import UserError
from fast import IGNORE
from inference.evaluation import (
    batches,
    evaluate_choices,
    evaluate_text,
    log_likelihood,
    read_questions,
)
from inference.generation import load_model, open_source
from sample import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(dataset, tiny_tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "run"
    done = rocket(overrides(dataset, tiny_tokenizer, out, train__eval_sequences=0))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def source(run):
    return open_source(run, "last")


@pytest.fixture(scope="module")
def model(source):
    return load_model(source, CPU, torch.float32)


def figures(capsys, *arguments):
    main([*map(str, arguments), "--dtype=float32", "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_split_has_the_loss_that_training_had(run, capsys):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["step"] == 20 and "val_loss" in row)
    found = figures(capsys, run, "--evaluate=val", "--checkpoint=last", "--batch-size=7")
    assert found["loss"] == pytest.approx(row["val_loss"], abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(row["val_bits_per_byte"], abs=1e-5)
    assert found["perplexity"] == pytest.approx(row["val_perplexity"], rel=1e-5)
    assert found["step"] == 20


@pytest.mark.parametrize("count", [2, 3, 8, 9, 12, 13, 17, 40])
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_each_token_is_a_target_once(count, length):
    ids = torch.arange(count)
    seen = []
    for tokens, targets in batches(ids.numpy(), length, 3):
        asked = targets != IGNORE
        assert (targets[asked] == tokens[asked] + 1).all()
        seen += targets[asked].tolist()
    assert sorted(seen) == [*range(1, count)]


def test_a_text_shorter_than_the_context_has_its_plain_loss(model, source, tmp_path):
    text = "import os\n\ndef main(): # é\n"
    (tmp_path / "a.py").write_text(text)
    found = evaluate_text(model, source.tokenizer, tmp_path / "a.py", 4)
    ids = torch.tensor([[source.tokenizer.bos_id, *source.tokenizer.encode(text).tolist()]])
    logs = model(ids[:, :-1]).log_softmax(-1)
    nats = -logs.gather(-1, ids[:, 1:, None]).sum().item()
    assert found.tokens == ids.shape[1] - 1
    assert found.bytes == len(text.encode())
    assert found.loss == pytest.approx(nats / found.tokens, abs=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, abs=1e-5)


def test_a_long_text_is_scored_whole(run, capsys, tmp_path):
    text = "".join(f"value_{i} = {i * i}\n" for i in range(200))
    (tmp_path / "long.py").write_text(text)
    main([str(run), f"--evaluate={tmp_path / 'long.py'}", "--dtype=float32"])
    shown = capsys.readouterr().out
    assert f"{len(text):,} bytes" in shown
    assert "bits/byte" in shown


def test_the_likelier_choice_is_taken(model, source, tmp_path):
    """Choices are answered by what the model itself finds likelier, computed by hand."""
    rows = []
    for prompt, choices in (("import", [" os", " zebra"]), ("def ma", ["in(", "\u00e9\u00e9"])):
        logs = [log_likelihood(model, source.tokenizer, prompt, c, "") for c in choices]
        best = max(range(2), key=lambda i, logs=logs: logs[i])
        rows.append({"prompt": prompt, "choices": choices, "answer": best})
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert evaluate_choices(model, source.tokenizer, path).accuracy == 1
    rows[0]["answer"] = 1 - rows[0]["answer"]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    found = evaluate_choices(model, source.tokenizer, path)
    assert (found.accuracy, found.questions) == (0.5, 2)
    assert found.accuracy_error == pytest.approx(0.5)


def test_the_likelihood_is_that_of_the_whole_less_the_prompt(model, source):
    tokenizer, prompt, choice = source.tokenizer, "import sys\n", "def f(x):"
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt + choice).tolist()]
    before = 1 + len(tokenizer.encode(prompt))
    logs = model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = sum(logs[i - 1, ids[i]].item() for i in range(before, len(ids)))
    assert log_likelihood(model, tokenizer, prompt, choice, "") == pytest.approx(expected, abs=1e-4)


def test_a_prompt_above_the_context_keeps_its_end(model, source):
    short = log_likelihood(model, source.tokenizer, "x = 1\n" * 100, "def", "")
    assert math.isfinite(short)
    with pytest.raises(UserError, match=r"row 3: a choice of .* above max_seq_len"):
        log_likelihood(model, source.tokenizer, "a", "x = 1\n" * 100, "q.jsonl, row 3")


@pytest.mark.parametrize(
    "row",
    [
        "not JSON",
        "[1]",
        '{"prompt": "a", "choices": ["b"], "answer": 0}',
        '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
        '{"prompt": "a", "choices": ["b", ""], "answer": 0}',
        '{"prompt": "a", "choices": ["b", 1], "answer": 0}',
        '{"prompt": "a", "choices": "bc", "answer": 0}',
        '{"prompt": "a", "choices": ["b", "c"], "answer": true}',
        '{"prompt": "\\ud800", "choices": ["b", "c"], "answer": 0}',
    ],
)
def test_a_bad_question_is_named(tmp_path, row):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n' + row)
    with pytest.raises(UserError, match=r"q\.jsonl, row 2: write "):
        list(read_questions(path))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "no text"), (b"a\xff", "not UTF-8: .* byte 1")]
)
def test_a_bad_text_is_refused(model, source, tmp_path, content, words):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        evaluate_text(model, source.tokenizer, tmp_path / "t.txt", 1)


def test_a_hugging_face_directory_samples_and_evaluates_alike(run, tmp_path, capsys):
    pytest.importorskip("safetensors")
    from tools import convert

    exported, text = tmp_path / "hf", tmp_path / "t.txt"
    convert.main(["to-hf", str(run), str(exported), "--checkpoint=last"])
    text.write_text("import os\n" * 30)
    capsys.readouterr()
    same = ["completion", "tokens", "end", "tokenizer_sha256"]
    asked = ["--prompt=def main(", "--max-tokens=16", "--temperature=0"]
    ours, theirs = (figures(capsys, path, *asked) for path in (run, exported))
    assert [ours[key] for key in same] == [theirs[key] for key in same]
    loss, other = (figures(capsys, path, f"--evaluate={text}")["loss"] for path in (run, exported))
    assert loss == other
    with pytest.raises(UserError, match="has no dataset"):
        main([str(exported), "--evaluate=val"])
    with pytest.raises(UserError, match="plain text"):
        main([str(exported), "--chat", "--prompt=a"])
