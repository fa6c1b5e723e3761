"""What --inspect says of a dataset is what is in it, and --bad-steps prints the text that it names.

Every figure is compared with one that plain loops over the tokens give; the text datasets are those
of the real prepare.py. Also: any block size gives the same, damage is one line that names the file,
and memory does not grow with the data.
"""

import contextlib
import io
import json
import os
import pty
import random
import re
import subprocess
import sys
import tracemalloc
import unicodedata
from collections import Counter

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT
from training import ENVIRONMENT

from config import Config, UserError
from corpus import inspection
from corpus.vocabulary import add_control_pieces
from tokenizer import Tokenizer

WORDS = "def return import class 🦙 مرحبا é 漢字 lambda yield \t \r\n x = 5".split(" ")
SEQ_LEN = 48


def document(i):
    """A text of its own, from one word to some 200."""
    draw = random.Random(i)
    return f"# {i} " + " ".join(draw.choices(WORDS, k=int(2 ** draw.uniform(0, 7.6))))


@pytest.fixture(scope="module")
def text_data(tmp_path_factory, tiny_tokenizer):
    """What prepare.py makes of 300 rows in several shards a split."""
    root = tmp_path_factory.mktemp("inspected")
    rows = [json.dumps({"text": text}) + "\n" for text in [*map(document, range(300)), "", ""]]
    (root / "corpus.jsonl").write_text("".join(rows))
    arguments = [
        f'--data.sources=["{root}/corpus.jsonl"]',
        f"--data.dir={root}/data",
        f"--tokenizer.path={tiny_tokenizer}",
        "--tokenizer.vocab_size=600",
        "--data.val_fraction=0.1",
        "--data.test_fraction=0.05",
        "--data.part_bytes=20_000",
    ]
    program = [sys.executable, str(ROOT / "prepare.py"), *arguments]
    subprocess.run(program, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return root / "data"


@pytest.fixture(scope="module")
def text_lines(text_data, tokenizer):
    """What is printed of it."""
    return inspected(text_data, tokenizer)


@pytest.fixture
def text_copy(text_data, tmp_path):
    """A copy of it to damage."""
    for path in text_data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return Tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "tokenizer.model"
    pieces = ["<|user|>", "<|assistant|>", "<|end|>"]
    path.write_bytes(add_control_pieces(tiny_tokenizer.read_bytes(), pieces))
    return Tokenizer(path)


def conversation(tokenizer, question, answer):
    """(id, mask) of each token, as the contract has them; without an answer, none is trained."""
    piece = tokenizer.processor.piece_to_id
    asked = [piece("<|user|>"), *tokenizer.encode(question).tolist(), piece("<|end|>")]
    tokens = [(i, 0) for i in [tokenizer.bos_id, *asked]]
    if answer:
        said = [*tokenizer.encode(answer).tolist(), piece("<|end|>"), tokenizer.eos_id]
        return [*tokens, (piece("<|assistant|>"), 0), *((i, 1) for i in said)]
    return [*tokens, (tokenizer.eos_id, 0)]


@pytest.fixture(scope="module")
def chats(chat_tokenizer):
    """Windows of conversations: two in one, one that fills it, a truncated and an unanswered one.

    The last one ends in two EOS, the template's and its own.
    """
    t = chat_tokenizer
    full = conversation(t, "q", "a" * 60)
    while len(full) > SEQ_LEN:
        del full[-3]
    cut = [*conversation(t, "1 2 3", "9 " * 60)[: SEQ_LEN - 1], (t.eos_id, 0)]
    hello = conversation(t, "Hi 🦙", "مر 🦙")
    double = [*conversation(t, "both", "ends"), (t.eos_id, 1)]
    return [[hello, conversation(t, "a", "b")], [full], [cut], [conversation(t, "?", "")], [double]]


@pytest.fixture
def chat_data(chats, chat_tokenizer, tmp_path):
    """The windows on disk, as two shards of a dataset."""
    shards = []
    for number, windows in enumerate((chats[:3], chats[3:])):
        filled = [[token for chat in window for token in chat] for window in windows]
        for window in filled:
            window += [(chat_tokenizer.eos_id, 0)] * (SEQ_LEN - len(window))
        ids, mask = np.array(filled).reshape(-1, 2).T
        ids.astype("<u2").tofile(tmp_path / f"train-{number:05d}.bin")
        mask.astype("u1").tofile(tmp_path / f"train-{number:05d}.mask")
        used = sum(len(chat) for window in windows for chat in window)
        shard = {"tokens": len(ids), "documents": sum(map(len, windows)), "bytes": 100}
        shard |= {"trained": int(mask.sum()), "filled": len(ids) - used}
        shards.append({"file": f"train-{number:05d}.bin", **shard})
    totals = {name: sum(s[name] for s in shards) for name in shards[0] if name != "file"}
    write_manifest(tmp_path, chat_tokenizer, {"train": {**totals, "shards": shards}}, SEQ_LEN)
    return tmp_path


def write_manifest(directory, tokenizer, splits, seq_len=None, sources=1):
    manifest = {
        "version": 1,
        "tokenizer": {"sha256": tokenizer.sha256},
        "splits": splits,
        "counts": {"read": 9, "written": 6, "dropped": {"empty": 1, "too_long": 2, "bad": 0}},
        "sources": [{"name": f"corpus/{i}.jsonl", "bytes": 1000 * i} for i in range(sources)],
    } | ({"format": "instruct", "seq_len": seq_len} if seq_len else {})
    (directory / "manifest.json").write_text(json.dumps(manifest))


def inspected(directory, tokenizer):
    """The lines that are printed; every one fits the terminal."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        inspection.inspect(directory, tokenizer)
    lines = output.getvalue().splitlines()
    for line in lines:
        assert columns(line) <= 100 or "lengths.png" in line or line.startswith(str(directory))
    return lines


def columns(line):
    """How wide a terminal shows a line."""
    wide = {"W": 2, "F": 2}
    shown = [c for c in line if not unicodedata.combining(c)]
    return sum(wide.get(unicodedata.east_asian_width(c), 1) for c in shown)


def section(lines, split):
    """The lines of a split, without the spaces that align them."""
    start = lines.index(split)
    ends = ("val", "test", "made from")
    stop = next((i for i in range(start + 1, len(lines)) if lines[i] in ends), len(lines))
    return [" ".join(line.split()) for line in lines[start:stop]]


def figure(lines, name):
    """The figure of a row."""
    (found,) = (match[1] for line in lines if (match := re.match(rf"{name} ([\d,.%]+)", line)))
    return found


def slow_documents(directory, split, tokenizer):
    """(shard, offset, ids) of each document of a text split, token by token."""
    found = []
    for path in sorted(directory.glob(f"{split}-*.bin")):
        for offset, i in enumerate(np.fromfile(path, "<u2").tolist()):
            if i == tokenizer.bos_id:
                found.append((path.name, offset, []))
            found[-1][2].append(i)
    return found


def check_lengths(lines, lengths):
    """The quantiles and the histogram against those of a sorted list."""
    ordered = sorted(lengths)
    wanted = [ordered[0]]
    for percent in (1, 5, 25, 50, 75, 95, 99):
        wanted.append(
            next(n for n in ordered if sum(m <= n for m in ordered) * 100 >= percent * len(ordered))
        )
    wanted += [ordered[-1], round(sum(ordered) / len(ordered))]
    row = lines.index("min 1% 5% 25% 50% 75% 95% 99% max mean") + 1
    assert lines[row].replace(",", "").split() == [str(n) for n in wanted]
    histogram = [line.split() for line in lines if " – " in line]
    low, total = 1, 0
    for cells in histogram:
        low, high = int(cells[0].replace(",", "")), int(cells[2].replace(",", ""))
        count = sum(low <= n <= high for n in lengths)
        total += count
        assert (high, int(cells[3])) == (2 * low - 1, count)
        assert cells[4] == f"{count / len(lengths):.1%}"
    assert total == len(lengths)
    bars = [line[5] if len(line) > 5 else "" for line in histogram]
    assert max(map(len, bars)) == 40
    assert all(bool(bar) == (cells[3] != "0") for bar, cells in zip(bars, histogram, strict=True))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_figures_of_a_text_split(text_data, text_lines, tokenizer, split):
    lines = section(text_lines, split)
    documents = slow_documents(text_data, split, tokenizer)
    ids = [i for _, _, document in documents for i in document]
    texts = [tokenizer.decode(document) for _, _, document in documents]
    size = sum(len(text.encode()) for text in texts)
    assert figure(lines, "documents") == f"{len(documents):,}"
    assert figure(lines, "tokens") == f"{len(ids):,}"
    assert f"bytes of text {size:,} {size / len(ids):.2f} per token" in lines
    assert figure(lines, "shards") == str(len(list(text_data.glob(f"{split}-*.bin"))))
    in_bytes = sum(map(tokenizer.processor.is_byte, ids))
    assert in_bytes  # 🦙 and the Arabic
    assert figure(lines, "byte pieces") == f"{in_bytes / len(ids):.3%}"
    assert figure(lines, "unknown pieces") == "0.000%"
    assert not any(line.startswith(("windows", "trained", "fill", "looked")) for line in lines)
    check_lengths(lines, [len(document) for _, _, document in documents])


def test_the_longest_documents_and_the_first_ones(text_data, text_lines, tokenizer):
    lines = text_lines
    documents = slow_documents(text_data, "train", tokenizer)
    longest = sorted(documents, key=lambda d: -len(d[2]))[:5]
    start = lines.index("  longest documents: tokens, shard:first token, beginning") + 1
    for line, (shard, offset, ids) in zip(lines[start : start + 5], longest, strict=True):
        length, place, beginning = line.split(maxsplit=2)
        assert (length.replace(",", ""), place) == (str(len(ids)), f"{shard}:{offset}")
        text = tokenizer.decode(ids)[:60].replace("\r", "\\r").replace("\n", "\\n")
        assert text.replace("\t", "\\t").startswith(beginning)
        assert len(beginning) > 30
    for number, (_, _, ids) in enumerate(documents[:3], 1):
        start = lines.index(f"  document {number}, {len(ids):,} tokens") + 1
        stop = lines.index("", start)
        shown = "".join(line.removeprefix("  | ") for line in lines[start:stop])
        text = f"<s>{tokenizer.decode(ids)}</s>".replace("\r", "\\r")
        text = text if len(text) <= 400 else text[:400] + "…"
        assert "".join(shown.split()) == "".join(text.split())


def test_the_manifest_and_the_vocabulary(text_data, text_lines, tokenizer):
    lines = [" ".join(line.split()) for line in text_lines]
    seen = {i for _, _, ids in slow_documents(text_data, "train", tokenizer) for i in ids}
    never = [i for i in range(600) if i not in seen]
    kinds = [
        sum(map(kind, never))
        for kind in (tokenizer.processor.is_byte, tokenizer.processor.is_control)
    ]
    assert (
        f"{len(never)} of 600 pieces never occur in train"
        f" ({kinds[0]} bytes, {kinds[1]} control, {len(never) - sum(kinds)} others)"
    ) in lines
    size = (text_data.parent / "corpus.jsonl").stat().st_size
    for line in (
        "read 302 documents",
        "written 300",
        "dropped 2 2 empty",
        "bad rows 0 there is no skipped.jsonl",
        f"sources 1 {size:,} bytes",
    ):
        assert line in lines
    assert lines[-1] == f"picture of the lengths: {text_data}/lengths.png" or "pip" in lines[-1]


def test_conversations(chat_data, chats, chat_tokenizer):
    (chat_data / "skipped.jsonl").write_text('{"row": 1}\n{"row": 2}\n')
    output = inspected(chat_data, chat_tokenizer)
    lines = section(output, "train")
    flat = [chat for window in chats for chat in window]
    tokens = sum(map(len, flat))
    trained = sum(mask for chat in flat for _, mask in chat)
    in_bytes = sum(chat_tokenizer.processor.is_byte(i) for chat in flat for i, _ in chat)
    assert figure(lines, "documents") == "6"
    assert figure(lines, "tokens") == str(tokens)
    assert f"windows 5 of {SEQ_LEN} tokens" in lines
    assert figure(lines, "fill rate") == f"{tokens / (5 * SEQ_LEN):.2%}"
    assert figure(lines, "trained") == f"{trained / tokens:.2%}"
    assert figure(lines, "byte pieces") == f"{in_bytes / tokens:.3%}"
    check_lengths(lines, list(map(len, flat)))
    assert f"document 1, {len(flat[0])} tokens, trained text between ⟦ and ⟧" in lines
    assert "| <s><|user|>Hi 🦙<|end|><|assistant|>⟦مر 🦙<|end|></s>⟧" in lines
    assert "| <s><|user|>a<|end|><|assistant|>⟦b<|end|></s>⟧" in lines
    longest = sorted(flat[:4], key=len)[-1]
    assert len(longest) == SEQ_LEN
    assert any(line.startswith(f"{SEQ_LEN} train-00000.bin:{SEQ_LEN} <|user|>q") for line in lines)
    rest = [" ".join(line.split()) for line in output]
    assert "dropped 3 1 empty, 2 too long" in rest
    assert "bad rows 2 left out, skipped.jsonl lists them" in rest


def content(directory, tokenizer):
    """All that was read of a dataset."""
    manifest = json.loads((directory / "manifest.json").read_text())
    splits, seq_len = manifest["splits"].values(), manifest.get("seq_len", 0)
    found = [inspection.read_split(directory, split, seq_len, tokenizer) for split in splits]
    return [vars(content) | {"pieces": content.pieces.tolist()} for content in found]


def test_block_borders_change_nothing(text_data, chat_data, tokenizer, chat_tokenizer, monkeypatch):
    wanted = content(text_data, tokenizer), content(chat_data, chat_tokenizer)
    for block in (1, 7, 100, 999):
        monkeypatch.setattr(inspection, "BLOCK_TOKENS", block)
        assert (content(text_data, tokenizer), content(chat_data, chat_tokenizer)) == wanted


def test_a_large_split_is_looked_at_in_evenly_spaced_shards(text_data, tokenizer, monkeypatch):
    split = json.loads((text_data / "manifest.json").read_text())["splits"]["train"]
    shards = [shard["file"] for shard in split["shards"]]
    assert len(shards) >= 4
    monkeypatch.setattr(inspection, "LIMIT_TOKENS", split["tokens"] // 2)
    found = inspection.read_split(text_data, split, 0, tokenizer)
    count = len(shards) // 2
    chosen = {shards[i * len(shards) // count] for i in range(count)}
    documents = [d for d in slow_documents(text_data, "train", tokenizer) if d[0] in chosen]
    assert found.lengths == Counter(len(ids) for _, _, ids in documents)
    lines = inspection.describe_content(found, split)
    assert next(lines) == f"  looked at {count} of {len(shards)} shards for what follows"


def test_many_sources_are_counted(chat_data, chat_tokenizer):
    write_manifest(chat_data, chat_tokenizer, {}, sources=14)
    manifest = json.loads((chat_data / "manifest.json").read_text())
    lines = [" ".join(line.split()) for line in inspection.describe_origin(chat_data, manifest)]
    assert "sources 14 91,000 bytes" in lines
    assert lines[-2:] == ["9,000 bytes corpus/9.jsonl", "… and 4 more"]


def test_wide_characters_fit_too(tmp_path, tokenizer):
    text = "漢" * 90
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], "<u2")
    ids.tofile(tmp_path / "train-00000.bin")
    shard = {"file": "train-00000.bin", "tokens": len(ids), "documents": 1}
    content = inspection.read_split(tmp_path, {**shard, "shards": [shard]}, 0, tokenizer)
    lines = list(inspection.describe_documents(content))
    assert next(line.count("漢") for line in lines if "漢" in line) > 30  # one of the longest
    assert "".join(lines).count("漢") > 120  # and the first, whole
    assert max(map(columns, lines)) == 100


def test_memory_does_not_grow_with_the_data(tmp_path, tokenizer, monkeypatch):
    draw = np.random.default_rng(0)
    ids = draw.integers(3, 600, 3_000_000).astype("<u2")
    ids[::100], ids[99::100] = tokenizer.bos_id, tokenizer.eos_id
    ids.tofile(tmp_path / "train-00000.bin")
    shard = {"file": "train-00000.bin", "tokens": len(ids), "documents": len(ids) // 100}
    monkeypatch.setattr(inspection, "BLOCK_TOKENS", 20_000)
    tracemalloc.start()
    content = inspection.read_split(tmp_path, {**shard, "shards": [shard]}, 0, tokenizer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert content.lengths == {100: 30_000}
    assert peak < 2_000_000  # half of it counts ids; the tokens alone have 6 MB


def test_a_space_at_the_border_of_the_mask_is_kept(tmp_path):
    """Llama 2's tokenizer puts a space before each text, and takes it away again."""
    prefix = tmp_path / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello wide world", "hello again"] * 50),
        model_prefix=str(prefix),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = Tokenizer(prefix.with_suffix(".model"))
    ids = [1, *tokenizer.encode("hello world again").tolist(), 2]
    pieces = tokenizer.processor.id_to_piece(ids)
    first, last = (next(i for i, p in enumerate(pieces) if p.startswith(s)) for s in ("▁w", "▁a"))
    mask = [int(first <= i < last) for i in range(len(ids))]
    assert inspection.marked_text(ids, mask, tokenizer) == "<s>hello⟦ world⟧ again</s>"


def test_a_terminal_shows_trained_text_in_colour(monkeypatch):
    owner, terminal = pty.openpty()
    with open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        lines = list(inspection.framed("a⟦b\nc⟧d"))
    os.close(owner)
    green, plain = "\033[1;32m", "\033[0m"
    assert lines == [f"  | a{green}⟦b{plain}", f"  | {green}c⟧{plain}d"]


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path, loaded = tmp_path / "lengths.png", "matplotlib.pyplot" in sys.modules
    path.write_bytes(b"old")
    lengths = {
        "train": Counter({2: 1, 70: 9, 900: 5}),
        "val": Counter({5: 3}),
        "test": Counter({3: 1}),
    }
    assert inspection.draw_lengths(path, lengths, 1024) == f"picture of the lengths: {path}"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == loaded  # whose state would be everybody's


def test_a_picture_that_cannot_be_written_is_told(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "no" / "lengths.png"
    line = inspection.draw_lengths(path, {"train": Counter({5: 1})}, 0)
    assert line == f"no picture of the lengths: can't write {path}: No such file or directory"


def test_without_matplotlib_there_is_no_picture(chat_data, chat_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    last = inspected(chat_data, chat_tokenizer)[-1]
    assert last == "for a picture of the lengths: pip install '.[plot]'"
    assert not (chat_data / "lengths.png").exists()


def change_ids(directory, change):
    """Changes the second train shard."""
    path = directory / "train-00001.bin"
    ids = np.fromfile(path, "<u2")
    change(ids)
    ids.tofile(path)


def at_document(tokenizer, ids, number):
    return int(np.flatnonzero(ids == tokenizer.bos_id)[number])


DAMAGES = {
    "train-00001.bin: damaged: id 65535, but the tokenizer has 600 pieces": (
        lambda t, ids: ids.__setitem__(5, 65535)
    ),
    "train-00001.bin: damaged: no EOS behind the document at token 0": (
        lambda t, ids: ids.__setitem__(at_document(t, ids, 1) - 1, 100)
    ),
    "train-00001.bin: damaged: no EOS behind": lambda t, ids: ids.__setitem__(-1, 100),
    "train-00001.bin: damaged: no BOS at token 0": lambda t, ids: ids.__setitem__(0, 100),
    "train-00001.bin: damaged: [0-9]+ documents instead of": (
        lambda t, ids: ids.__setitem__(at_document(t, ids, 2), 100)
    ),
}


@pytest.mark.parametrize("block", [50, 4_000_000])
@pytest.mark.parametrize("message", list(DAMAGES))
def test_damaged_content_is_named(text_copy, tokenizer, monkeypatch, message, block):
    monkeypatch.setattr(inspection, "BLOCK_TOKENS", block)
    change_ids(text_copy, lambda ids: DAMAGES[message](tokenizer, ids))
    with pytest.raises(UserError, match=message):
        inspection.inspect(text_copy, tokenizer)


@pytest.mark.parametrize(("place", "value", "message"), [(0, 50, "no BOS"), (-1, 50, "no EOS")])
def test_damaged_windows_are_named(chat_data, chat_tokenizer, place, value, message):
    change_ids(chat_data, lambda ids: ids.__setitem__(SEQ_LEN + place, value))
    with pytest.raises(UserError, match=f"train-00001.bin: damaged: {message}"):
        inspection.inspect(chat_data, chat_tokenizer)


def test_a_shard_that_is_no_whole_windows_is_named(chat_data, chat_tokenizer):
    manifest = json.loads((chat_data / "manifest.json").read_text())
    (chat_data / "manifest.json").write_text(json.dumps({**manifest, "seq_len": SEQ_LEN + 1}))
    with pytest.raises(UserError, match="144 tokens are no whole windows of 49"):
        inspection.inspect(chat_data, chat_tokenizer)


def test_files_that_do_not_fit_are_named(chat_data, chat_tokenizer, tokenizer):
    with pytest.raises(UserError, match="no dataset here"):
        inspection.inspect(chat_data / "elsewhere", chat_tokenizer)
    with pytest.raises(UserError, match="made with another tokenizer"):
        inspection.inspect(chat_data, tokenizer)
    shard = chat_data / "train-00000.mask"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00000\.mask"):
        inspection.inspect(chat_data, chat_tokenizer)
    manifest = json.loads((chat_data / "manifest.json").read_text())
    shard.write_bytes(shard.read_bytes() + b"\0")
    (chat_data / "manifest.json").write_text(json.dumps({**manifest, "counts": []}))
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        inspection.inspect(chat_data, chat_tokenizer)
    (chat_data / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        inspection.inspect(chat_data, chat_tokenizer)


@pytest.fixture
def run(text_data, tiny_tokenizer, tmp_path):
    """The configuration of a run that may have skipped steps."""
    config = Config()
    config.tokenizer.path, config.tokenizer.vocab_size = str(tiny_tokenizer), 600
    config.train.out_dir = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    return config


def skipped(directory, changed_window=None, **changed):
    """A record of a skipped step whose first window lies across two shards."""
    first, second = json.loads((directory / "manifest.json").read_text())["splits"]["train"][
        "shards"
    ][:2]
    pieces = [
        {"shard": first["file"], "offset": first["tokens"] - 40, "tokens": 40},
        {"shard": second["file"], "offset": 0, "tokens": 25},
    ]
    window = {"dataset": str(directory), "window": 3, "pieces": pieces} | (changed_window or {})
    step = {"step": 12, "reason": "spike", "loss": 5.25, "grad_norm": 1234.5, "windows": [window]}
    return step | changed


def write_steps(config, *steps):
    text = "".join(json.dumps(step) + "\n" for step in steps)
    with open(f"{config.train.out_dir}/bad_steps.jsonl", "w") as file:
        file.write(text)


def test_bad_steps_are_printed_with_their_texts(
    run, text_data, chat_data, tiny_tokenizer, tokenizer, capsys
):
    inspection.show_bad_steps(run)
    assert capsys.readouterr().out == f"{run.train.out_dir}: no step was skipped\n"
    failed = skipped(text_data, step=13, reason="non_finite", loss=None, grad_norm=None, windows=[])
    write_steps(run, skipped(text_data), failed)
    inspection.show_bad_steps(run)
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "step 12: spike, loss 5.25, gradient norm 1234"
    assert lines[-2] == "step 13: non_finite, loss not finite, gradient norm not finite"
    bins = [np.fromfile(text_data / f"train-0000{i}.bin", "<u2") for i in (0, 1)]
    places = [f"40 tokens of train-00000.bin from {len(bins[0]) - 40}", "25 tokens of train-00001"]
    assert lines[1] == f"window 3 in {text_data}: {', '.join(places)}.bin from 0"
    ids = np.concatenate([bins[0][-40:], bins[1][:25]]).tolist()
    border = ids.index(tokenizer.bos_id, 39)  # where the second shard begins
    text = shown(tokenizer, ids[:border]) + shown(tokenizer, ids[border:])
    assert "</s><s>" in text
    assert lines[2:-2] == ["  | " + line for line in text.replace("\r", "\\r").split("\n")]


def shown(tokenizer, ids):
    """Text between the special tokens' names."""
    for name, i in (("<s>", tokenizer.bos_id), ("</s>", tokenizer.eos_id)):
        if i in ids:
            at = ids.index(i)
            return shown(tokenizer, ids[:at]) + name + shown(tokenizer, ids[at + 1 :])
    return tokenizer.decode(ids)


def test_bad_steps_of_a_mixture(run, text_data, text_copy, capsys):
    windows = [*skipped(text_data)["windows"], *skipped(text_copy, {"window": 8})["windows"]]
    write_steps(run, skipped(text_data, windows=windows))
    inspection.show_bad_steps(run)
    lines = capsys.readouterr().out.split("\n")
    named = [line.split(":")[0] for line in lines if line.startswith("window")]
    assert named == [f"window 3 in {text_data}", f"window 8 in {text_copy}"]


def test_bad_steps_that_do_not_fit_are_named(run, text_data):
    piece = {"shard": "train-00000.bin", "offset": 10**6, "tokens": 5}
    steps = {
        "train-00000.bin: no 5 tokens from 1000000 on; was it prepared anew": skipped(
            text_data, {"pieces": [piece]}
        ),
        "elsewhere: no dataset here": skipped(text_data, {"dataset": f"{text_data}/elsewhere"}),
        "bad_steps.jsonl, line 1: damaged": {"step": 1},
    }
    for message, step in steps.items():
        write_steps(run, step)
        with pytest.raises(UserError, match=message):
            inspection.show_bad_steps(run)
    with open(f"{run.train.out_dir}/bad_steps.jsonl", "w") as file:
        file.write(json.dumps(skipped(text_data)) + '\n{"step": 1')
    with pytest.raises(UserError, match=r"bad_steps\.jsonl, line 2: damaged"):
        inspection.show_bad_steps(run)
