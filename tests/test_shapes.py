"""Data of the shapes that labs have goes from its files to a trained model that is sampled.

Through the real programs, on the shipped configurations where there is one: wikitext, OpenOrca
(fine-tuned from the former, and chatted with), BookCorpus, CSV with quoted newlines, jsonl.zst.
"""

import csv
import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training import ENVIRONMENT, ROOT, rows, status

pytestmark = pytest.mark.long

WORDS = (
    """the of and river city was in built century a king to war song by from 🦙 é العربية""".split()
)
SMALL = """--data.seq_len=64 --model.dim=32 --model.n_layers=2 --model.n_heads=4
    --model.n_kv_heads=2 --model.ffn_dim=64 --model.max_seq_len=128
    --model.base_dim=0 --model.base_layers=0
    --train.max_steps=12 --train.epochs=0
    --train.global_batch_size=8 --train.micro_batch_size=8 --train.eval_interval=6
    --train.dtype=float32 --optimizer.warmup_steps=2 --optimizer.learning_rate=3e-3
    --tokenizer.vocab_size=380""".split()


def sentence(chance, words=12):
    return " ".join(chance.choices(WORDS, k=chance.randint(3, 2 * words)))


def program(name, *arguments):
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def go_through(config, directory, *keys):
    """Tokenizer, dataset, model; the manifest, and what tells sample.py of the run."""
    arguments = [config, *SMALL, f"--data.dir={directory}/data", f"--train.out_dir={directory}/run"]
    arguments += [f"--tokenizer.path={directory}/tokenizer.model", *keys]
    program("train_tokenizer.py", *arguments)
    program("prepare.py", *arguments)
    program("prepare.py", *arguments, "--verify")
    assert "documents" in program("prepare.py", *arguments, "--inspect")
    program("rocket.py", *arguments)
    run = directory / "run"
    assert status(run)["state"] == "finished"
    losses = [row["val_loss"] for row in rows(run) if "val_loss" in row]
    assert losses[-1] < losses[0]
    manifest = json.loads((directory / "data" / "manifest.json").read_text())
    counts = manifest["counts"]
    assert counts["read"] == counts["written"] + sum(counts["dropped"].values())
    assert counts["written"] == sum(s["documents"] for s in manifest["splits"].values())
    return manifest


def say(directory, *arguments):
    return program("sample.py", directory / "run", "--max-tokens=12", "--dtype=float32", *arguments)


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory):
    """Articles whose rows are lines, in the hub's files; 8 + 8 for training, 3, 3."""
    directory = tmp_path_factory.mktemp("wikitext")
    chance = random.Random(0)
    names = [f"train-0000{i}-of-00002" for i in (0, 1)]
    for name, articles in zip(
        [*names, "validation-00000-of-00001", "test-00000-of-00001"], (8, 8, 3, 3), strict=True
    ):
        lines = [""]
        for article in range(articles):
            lines += [f" = Article {article} of {name} = \n", "", f" = = {WORDS[article]} = = \n"]
            lines += [f" {sentence(chance, 30)} . \n" for _ in range(30)]
        pq.write_table(pa.table({"text": lines}), directory / f"{name}.parquet", row_group_size=50)
    keys = [
        f'--data.sources=["{directory}/train-*.parquet"]',
        f'--data.val_sources=["{directory}/validation-*.parquet"]',
        f'--data.test_sources=["{directory}/test-*.parquet"]',
        "--data.part_bytes=5000",
    ]
    return directory, go_through(ROOT / "config" / "wikitext.toml", directory, *keys)


def test_wikitext(wikitext):
    directory, manifest = wikitext
    found = {name: split["documents"] for name, split in manifest["splits"].items()}
    # what comes before the first article of a file, an empty line, is no document
    assert found == {"train": 16, "val": 3, "test": 3}
    assert "the" in say(directory, "--prompt= = Article 1 = \n the")


def test_openorca(wikitext, tmp_path):
    """Nulls, empty responses, a document of 50 kB, emoji, Arabic, CRLF; row groups that differ."""
    chance = random.Random(1)
    table = []
    for i in range(1200):
        system = (None, "", "You are an AI assistant.")[i % 3]
        question, response = sentence(chance) + "\r\n" * (i % 2), sentence(chance)
        response = {7: None, 11: ""}.get(i, response)
        question = "x" * 50_000 if i == 20 else question
        response = sentence(chance, 10_000) if i == 21 else response
        values = (f"flan.{i}", system, question, response)
        table.append(
            dict(zip(("id", "system_prompt", "question", "response"), values, strict=True))
        )
    halves = {"1M-GPT4-Augmented": table[:500], "3_5M-GPT3_5-Augmented": table[500:]}
    for (name, part), size in zip(halves.items(), (70, 1000), strict=True):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(part), path, row_group_size=size)
    base = wikitext[0]
    source = base / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
    manifest = go_through(
        ROOT / "config" / "openorca.toml",
        tmp_path,
        f'--data.sources=["{tmp_path}/1M-GPT4-Augmented.parquet",'
        f' "{tmp_path}/3_5M-GPT3_5-Augmented.parquet"]',
        f"--train.init_from={base}/run",
        "--data.val_fraction=0.1",
        "--data.seq_len=256",
        "--model.max_seq_len=256",
    )
    counts = manifest["counts"]
    assert counts["read"] == 1200
    assert counts["dropped"] == {"empty": 0, "no_response": 2, "too_long": 1}
    assert counts["truncated"] >= 1
    train = manifest["splits"]["train"]
    assert train["filled"] < 0.05 * train["tokens"]
    assert 0 < train["trained"] < train["tokens"] - train["filled"]
    answers = say(tmp_path, "--chat", "--prompt=the river?", "--json", "--temperature=0")
    answer = json.loads(answers)
    assert answer["prompt"] == "the river?"
    assert "<|" not in answer["completion"]
    system = say(tmp_path, "--chat", "--prompt=the river?", "--json", "--system=You are a king")
    assert json.loads(system)["completion"]


def test_bookcorpus(tmp_path):
    """A sentence a line, no boundaries: documents are runs of lines, and no line is lost."""
    chance = random.Random(2)
    lines = [sentence(chance) + " .\n" for _ in range(4000)]
    (tmp_path / "books_large_p1.txt").write_text("".join(lines[:2500]))
    (tmp_path / "books_large_p2.txt").write_text("".join(lines[2500:]))
    manifest = go_through(
        ROOT / "config" / "bookcorpus.toml",
        tmp_path,
        f'--data.sources=["{tmp_path}/books_large_p*.txt"]',
        "--data.document={lines = 50}",
        "--data.val_fraction=0.1",
        "--data.part_bytes=20000",
    )
    assert sum(s["bytes"] for s in manifest["splits"].values()) == len("".join(lines).encode())
    assert 40 < manifest["counts"]["written"] < 140  # about 4000 / 50
    assert say(tmp_path, "--prompt=the")


@pytest.mark.parametrize("shape", ["csv", "jsonl.zst"])
def test_tables(tmp_path, shape):
    chance = random.Random(3)
    texts = [f'{sentence(chance)},\n"{i}"\r\n\n{sentence(chance, 60)}' for i in range(600)]
    path = tmp_path / f"notes.{shape}"
    if shape == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "body"])
            writer.writerows(enumerate(texts))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            for text in texts:
                file.write(json.dumps({"id": 1, "body": text}).encode() + b"\n")
    manifest = go_through(
        ROOT / "config" / "tiny.toml",
        tmp_path,
        f'--data.sources=["{path}"]',
        "--data.text_column=body",
    )
    assert sum(s["bytes"] for s in manifest["splits"].values()) == len("".join(texts).encode())
    assert manifest["counts"] == {"read": 600, "written": 600, "dropped": {"empty": 0}}
    assert say(tmp_path, "--prompt=the")
