"""Protects the tokenizer's training: it sees the training split alone and evenly, the file appears
only once it is proven, what exists is never overwritten unasked, and each mistake is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import prepare
import train_tokenizer
from config import ROOT, DataConfig, UserError
from corpus import readers, vocabulary
from corpus.splits import Splitter
from corpus.vocabulary import CHUNK, Sample, chunks
from tokenizer import Tokenizer
from train_tokenizer import main

LINE = "def function_{0}(value):\n    return value * {0}\n\n"


@pytest.fixture
def work(tmp_path, capsys):
    """A corpus of 200 small documents, and a config for it."""
    (tmp_path / "raw").mkdir()
    for i in range(200):
        text = "".join(LINE.format(i * 7 + k) for k in range(10))
        (tmp_path / "raw" / f"{i:03}.txt").write_text(text)
    (tmp_path / "config.toml").write_text(f"""
        [tokenizer]
        path = "{tmp_path}/out/tokenizer.model"
        vocab_size = 320
        [data]
        sources = ["{tmp_path}/raw"]
        val_fraction = 0.1
    """)
    return tmp_path


def run(work, *arguments):
    main([str(work / "config.toml"), *arguments])


def test_trains_proves_and_writes(work, capsys):
    run(work)
    out = capsys.readouterr().out
    assert "320 pieces" in out
    assert "bytes per token on held-out text, round trip exact" in out
    chat = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert f"control pieces, which no text gives: <s> </s> {' '.join(chat)}\n" in out
    tokenizer = Tokenizer(work / "out" / "tokenizer.model")
    spelt = tokenizer.processor.encode(f"<s></s>{''.join(chat)}")
    assert not {tokenizer.pieces().index(piece) for piece in ["<s>", "</s>", *chat]} & {*spelt}
    assert all(piece in train_tokenizer.__doc__ for piece in chat)
    assert tokenizer.vocab_size == 320
    assert tokenizer.pieces()[:3] == ["<unk>", "<s>", "</s>"]
    rows = (work / "out" / "tokenizer.vocab").read_text().split("\n")
    assert len(rows) == 320 + 1
    assert rows[3].split("\t")[0] == tokenizer.pieces()[3]
    assert sorted(p.name for p in (work / "out").iterdir()) == [
        "tokenizer.model",
        "tokenizer.vocab",
    ]


def test_learns_line_breaks_and_indentation(work):
    run(work)
    pieces = Tokenizer(work / "out" / "tokenizer.model").pieces()
    assert "\u2581" * 4 in pieces
    assert any("\n" in piece for piece in pieces)


def test_the_same_corpus_gives_the_same_file(work):
    run(work, "--tokenizer.sample_bytes=20000")
    first = (work / "out" / "tokenizer.model").read_bytes()
    run(work, "--tokenizer.sample_bytes=20000", "--force", "--data.part_bytes=1000")
    assert (work / "out" / "tokenizer.model").read_bytes() == first


def test_held_out_text_is_not_learned_from(work):
    """A character that only held-out documents hold gets no piece; in training ones it does."""
    data = DataConfig(sources=[str(work / "raw")], val_fraction=0.1)
    for path in (work / "raw").iterdir():
        for sign in "\u4e2d\u6587":  # the file's text decides its split, so try both signs
            text = path.read_text().rstrip("\u4e2d\u6587") + sign * 50
            if Splitter(data, {}).split(text) == ("val" if sign == "\u4e2d" else "train"):
                path.write_text(text)
                break
    run(work)
    pieces = Tokenizer(work / "out" / "tokenizer.model").pieces()
    assert any("\u6587" in piece for piece in pieces)
    assert not any("\u4e2d" in piece for piece in pieces)


def test_of_few_documents_the_one_that_prepare_holds_out_is_not_learned_from(work, capsys):
    """By its hash no document is held out; prepare.py then moves the one of the lowest hash."""
    texts = [
        "".join(LINE.format(i) for i in range(80)) + sign * 50 for sign in "\u4e2d\u6587\u5b57"
    ]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (work / "few.jsonl").write_text(rows)
    keys = [f'--data.sources=["{work}/few.jsonl"]', "--data.val_fraction=0.001"]
    run(work, *keys)
    assert "bytes per token on held-out text" in capsys.readouterr().out
    pieces = Tokenizer(work / "out" / "tokenizer.model").pieces()
    learned = [sign for sign in "\u4e2d\u6587\u5b57" if any(sign in piece for piece in pieces)]
    prepare.main([str(work / "config.toml"), *keys, f"--data.dir={work}/data"])
    tokenizer = Tokenizer(work / "out" / "tokenizer.model")
    held_out = tokenizer.decode(np.fromfile(work / "data" / "val-00000.bin", "<u2"))
    assert len(learned) == 2
    assert not {*learned} & {*held_out}


def test_a_single_document_that_is_held_out_leaves_nothing_to_learn(work):
    (work / "one.txt").write_text("one document")
    with pytest.raises(UserError, match=r"no training text .*set data.val_fraction = 0"):
        run(work, f'--data.sources=["{work}/one.txt"]', "--data.val_fraction=0.9999")


def test_val_sources_are_not_learned_from(work):
    (work / "val.txt").write_text("\u4e2d" * 5000)
    run(work, f'--data.val_sources=["{work}/val.txt"]')
    assert not any("\u4e2d" in p for p in Tokenizer(work / "out" / "tokenizer.model").pieces())


def test_bad_documents_are_left_out_and_counted(work, capsys):
    (work / "raw" / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"bad\.txt, row 1: not UTF-8"):
        run(work)
    run(work, "--data.on_error=skip")
    assert "left out 1 bad documents; prepare.py lists them\n" in capsys.readouterr().out


def test_what_is_not_read_is_told(work, capsys):
    for name in ("wiki_00", "wiki_01"):
        (work / "raw" / name).write_text("\u4e2d" * 5000)
    (work / "latest").symlink_to("raw")
    (work / "notes").write_text("a few notes")
    run(work, f'--data.sources=["{work}/raw", "{work}/latest/000.txt", "{work}/notes"]')
    assert capsys.readouterr().out.startswith(
        f"not read: 2 without an ending ({work}/raw/wiki_00, …)\n"
        f"unknown ending, read as text: 1 ({work}/notes)\n"
        f"links to what is read already, left out: 1 ({work}/latest/000.txt is {work}/raw/000.txt)"
        "\ntraining 320 pieces"
    )
    assert not any("\u4e2d" in p for p in Tokenizer(work / "out" / "tokenizer.model").pieces())


def test_of_conversations_the_contents_are_learned(work):
    rows = (
        json.dumps({"q": LINE.format(i), "a": "\u4e2d" * 20, "id": i}) + "\n" for i in range(2000)
    )
    (work / "chat.jsonl").write_text("".join(rows))
    run(
        work,
        f"--data.sources=['{work}/chat.jsonl']",
        "--data.format=instruct",
        '--data.columns={user = "q", assistant = "a"}',
    )
    pieces = Tokenizer(work / "out" / "tokenizer.model").pieces()
    assert "\u4e2d" in pieces
    assert "assistant" not in pieces
    assert not any('"' in piece for piece in pieces)


def test_sample_is_even_and_bounded():
    sample = Sample(50_000)
    for i in range(10_000):
        sample.add(b"%010d" % i * 10)
    numbers = [int(text[:10]) for text in sample.texts()]
    assert sample.size <= 50_000
    assert sample.size > 49_800
    assert numbers == sorted(numbers)
    for tenth in range(10):  # 50 expected in each, deviation 7
        assert 25 < sum(n // 1000 == tenth for n in numbers) < 75
    assert Sample(50).texts() == []


def test_a_large_corpus_is_sampled_everywhere_without_reading_all(work, monkeypatch):
    read = []
    original = readers.read

    def counted(part, data, skipped):
        for document in original(part, data, skipped):
            read.append(document)
            yield document

    monkeypatch.setattr(readers, "read", counted)
    lines = [f"{i:06} {'x' * 92}\n" for i in range(40_000)]
    (work / "big.txt").write_text("".join(lines))
    run(
        work,
        f'--data.sources=["{work}/big.txt"]',
        "--data.document=line",
        "--data.part_bytes=10000",
        "--tokenizer.sample_bytes=20000",
        "--tokenizer.hard_vocab_limit=false",
    )
    numbers = [int(document.text[:6]) for document in read]
    assert len(numbers) < 7_000
    assert {n // 1000 for n in numbers} == set(range(40))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x" * 3500,
        "word " * 1000,
        "\n" * 2500,
        " " * 2500,
        ("line\n" + "    " * 3) * 400,
        "a" + "\n" * 1500 + "b" * 1500,
        "\u4e2d\n" * 2000,
    ],
)
def test_chunks_keep_the_text(text):
    found = list(chunks(text))
    assert "".join(found) == text
    assert all(len(chunk.encode()) <= 4 * CHUNK <= 4192 for chunk in found)
    assert len(found) <= 2 * len(text) / CHUNK + 2


def test_chunks_start_with_their_line_breaks():
    for chunk in list(chunks("some code here\n\n\n    indented\n" * 200))[1:]:
        assert chunk.startswith("\n")
        assert not chunk.startswith("\n    ")


def test_a_second_run_is_up_to_date(work, capsys):
    run(work)
    path = work / "out" / "tokenizer.model"
    before = path.stat().st_ino, path.stat().st_mtime_ns
    capsys.readouterr()
    run(work, "--data.sources=['gone']")
    assert "up to date" in capsys.readouterr().out
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before


def test_what_exists_is_never_overwritten_unasked(work):
    run(work)
    path = work / "out" / "tokenizer.model"
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"has 320 pieces, tokenizer\.vocab_size is 330.*--force"):
        run(work, "--tokenizer.vocab_size=330")
    with pytest.raises(UserError, match=r"was trained with.*split_digits.*--force"):
        run(work, "--tokenizer.split_digits=false")
    assert path.read_bytes() == before
    run(work, "--tokenizer.vocab_size=330", "--force")
    assert Tokenizer(path).vocab_size == 330


def test_what_another_process_wrote_meanwhile_stays(work, capsys, monkeypatch):
    """Two configurations that share a tokenizer train it at once: the first one there stays."""
    train, path = vocabulary.train, work / "out" / "tokenizer.model"

    def overtaken(*arguments):
        model = train(*arguments)
        monkeypatch.undo()
        run(work)
        return model

    monkeypatch.setattr(vocabulary, "train", overtaken)
    run(work, "--tokenizer.sample_bytes=20000")
    assert "(another process has trained it meanwhile)" in capsys.readouterr().out
    written = path.read_bytes()
    path.unlink()
    run(work)
    assert path.read_bytes() == written
    path.unlink()

    monkeypatch.setattr(vocabulary, "train", overtaken)
    with pytest.raises(UserError, match=r"has 320 pieces, tokenizer\.vocab_size is 330"):
        run(work, "--tokenizer.vocab_size=330")
    assert path.read_bytes() == written


def test_options_pass_on(work):
    options = ["--tokenizer.model_type=char", "--tokenizer.hard_vocab_limit=false"]
    run(work, *options, '--tokenizer.control_symbols=["<|a|>"]')
    assert Tokenizer(work / "out" / "tokenizer.model").pieces()[3] == "<|a|>"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokenizer.vocab_size=60000"], r"tokenizer\.vocab_size \(60000\).*at most \d+$"),
        (["--tokenizer.vocab_size=100"], r"tokenizer\.vocab_size \(100\) is too small"),
        (["--tokenizer.model_type=bbpe"], r'tokenizer\.model_type = "bbpe"'),
        (["--tokenizer.character_coverage=7"], r"tokenizer\.character_coverage = 7"),
        (["--tokenizer.byte_fallback=maybe"], r'tokenizer\.byte_fallback = "maybe"'),
        (["--tokenizer.byte_falback=true"], r"did you mean tokenizer\.byte_fallback"),
        (["--tokenizer.byte_fallback=false", "--tokenizer.vocab_size=60"], "would lose text"),
        (["--tokenizer.normalization_rule_name=nfkc"], "would lose text"),
        (["--tokenizer.remove_extra_whitespaces=true"], "would lose text"),
        (["--tokenizer.sample_bytes=1"], "no training text"),
        (["--data.sources=['/nowhere.txt']"], "/nowhere.txt"),
        (["--add-pieces=<x>"], "--output"),
        (["--frce"], "did you mean --force"),
    ],
)
def test_mistakes(work, arguments, words):
    with pytest.raises(UserError, match=words) as error:
        run(work, *arguments)
    assert "\n" not in str(error.value)
    assert not (work / "out").exists()


SYMBOLS = {  # what is given, and the symbol that is named
    "a space": (["<x>", "two words"], "'two words'"),
    "a space first": ([" <x>"], "' <x>'"),
    "a space last": (["<x> "], "'<x> '"),
    "one text": ("<x>,two words", "'two words'"),
    "after a comma": ("<x>, <y>", "' <y>'"),
    "SentencePiece's space": (["<x>\u2581"], "'<x>\u2581'"),
    "nothing": (["<x>", ""], "''"),
    "twice": (["<x>", "<y>", "<x>"], "'<x>' is a user-defined one already"),
    "a control piece": (["<|user|>"], r"'<\|user\|>' is a control symbol already"),
    "BOS": (["<s>"], "'<s>' is the piece BOS already"),
    "EOS": (["</s>"], "'</s>' is the piece EOS already"),
    "unknown": (["<unk>"], "'<unk>' is the unknown piece already"),
    "a byte": (["<0x41>"], "'<0x41>': it is the name of a byte's piece"),
    "a byte in other letters": (["<0x0a>"], "'<0x0a>': it is the name of a byte's piece"),
    "NUL": (["a\0b"], r"'a\\x00b': SentencePiece can't store it"),
}


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("name", SYMBOLS)
def test_a_symbol_that_would_never_be_encoded_is_refused(work, name, model_type):
    """Before anything is read, whether it would be lost (a space) or taken from text (BOS)."""
    given, words = SYMBOLS[name]
    with pytest.raises(UserError, match=r"tokenizer\.user_defined_symbols: the symbol " + words):
        run(
            work,
            f"--tokenizer.user_defined_symbols={json.dumps(given)}",
            f"--tokenizer.model_type={model_type}",
            "--data.sources=['/nowhere.txt']",
        )
    assert not (work / "out").exists()


@pytest.mark.parametrize("given", ["<|x|>,two words", ["<|x|>", "<|x|>"], ["<|x\n|>"], ["<unk>"]])
def test_a_control_symbol_that_would_be_none_is_refused(work, given):
    with pytest.raises(UserError, match=r"tokenizer\.control_symbols: the symbol '.*'"):
        run(work, f"--tokenizer.control_symbols={json.dumps(given)}")
    assert not (work / "out").exists()


@pytest.mark.parametrize("options", ["add_dummy_prefix=true", "model_type=word"])
def test_a_model_that_does_not_keep_a_symbol_is_not_written(work, options):
    """With a prefix it is two ids, and a model of words knows it only where it stands alone."""
    with pytest.raises(UserError, match=r"user_defined_symbols: '<tool>' would be encoded as '"):
        run(
            work,
            "--tokenizer.user_defined_symbols=['<tool>']",
            f"--tokenizer.{options}",
            "--tokenizer.hard_vocab_limit=false",
            "--tokenizer.vocab_size=400",
        )
    assert not (work / "out").exists()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_each_symbol_has_an_id_of_its_own(work, model_type):
    own = ["<tool>", "<tool>s", "==", "=", "a,b", "\n\n", "\t", "\ufb01", "return", "\u3000"]
    run(
        work,
        f"--tokenizer.user_defined_symbols={json.dumps(own)}",
        f"--tokenizer.model_type={model_type}",
        "--tokenizer.hard_vocab_limit=false",
    )
    tokenizer = Tokenizer(work / "out" / "tokenizer.model")
    for symbol in own:
        (i,) = tokenizer.encode(symbol).tolist()
        assert tokenizer.pieces()[i] == tokenizer.decode([i]) == symbol
        assert i in tokenizer.encode(f"x{symbol}y")


def test_a_mistake_on_the_command_line_is_one_line(work):
    command = [sys.executable, ROOT / "train_tokenizer.py", work / "config.toml"]
    done = subprocess.run(
        [*command, "--tokenizer.vocab_size=60000"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("train_tokenizer.py: error: tokenizer.vocab_size (60000)")
    assert done.stderr.count("\n") == 1


def test_a_directory_that_cannot_be_written(work):
    (work / "out").write_text("a file")
    with pytest.raises(UserError, match="can't be written"):
        run(work)


def test_add_pieces(work, capsys):
    run(work)
    path, output = work / "out" / "tokenizer.model", work / "more.model"
    before = path.read_bytes()
    run(work, "--add-pieces=<|tool|>,<pad>", f"--output={output}")
    assert Tokenizer(output).pieces()[320:] == ["<|tool|>"]
    assert Tokenizer(output).extends(Tokenizer(path))
    run(work, "--add-pieces=<|tool|>,<pad>", f"--output={output}")
    assert "up to date" in capsys.readouterr().out

    with pytest.raises(UserError, match="would change"):
        run(work, "--add-pieces=<|tool|>", f"--output={path}")
    assert path.read_bytes() == before
    run(work, "--add-pieces=<|tool|>", f"--output={path}", "--force")
    assert path.read_bytes() == output.read_bytes()


def test_follows_the_umask(work):
    old = os.umask(0o027)
    try:
        run(work)
    finally:
        os.umask(old)
    assert Path(work / "out" / "tokenizer.model").stat().st_mode & 0o777 == 0o640
