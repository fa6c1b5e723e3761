"""Trains a tokenizer: raw sources -> tokenizer.model, and beside it tokenizer.vocab to read.

python train_tokenizer.py config/tiny.toml --tokenizer.vocab_size=8000
python train_tokenizer.py config/tiny.toml --add-pieces='<pad>,<|tool|>' --output=data/more.model
"""

from __future__ import annotations

from config import check_command_line

USAGE = """python train_tokenizer.py [CONFIG] [--section.key=value ...] [--force]

Learns a SentencePiece model from the training split of data.sources, proves that it gives text
back as it was, and writes it to tokenizer.path. Beside <unk>, <s> and </s> it holds control pieces
for conversations, so that a model of text can be fine-tuned on them later: <pad>, <|system|>,
<|user|>, <|assistant|> and <|end|>. data.template puts them into tokens; no text does, even one
that spells them out. tokenizer.control_symbols names others, or none.

With --add-pieces it learns nothing, but writes the tokenizer at tokenizer.path with more control
pieces to --output."""

FLAGS = {
    "--force": "overwrite what exists, although datasets and models may have been built on it",
    "--add-pieces=<pad>,<|x|>": "control pieces to add (the ones that exist stay as they are)",
    "--output=PATH": "where the tokenizer with the added pieces goes; tokenizer.path needs --force",
}

if __name__ == "__main__":  # before imports that take longer than this
    check_command_line(usage=USAGE, sections=("tokenizer", "data"), flags=FLAGS)

import csv
import heapq
import io
import itertools
import json
import math
import os
import random
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

from config import (
    Config,
    TokenizerConfig,
    UserError,
    load_config,
    locked,
    resolve_path,
    run_program,
    write_atomically,
)
from corpus import hub, readers
from corpus.sources import Survey
from tokenizer import (
    SPACE,
    Tokenizer,
    add_control_pieces,
    add_options,
    check_symbol,
    load_model,
    noted_options,
)

# As Llama 2's tokenizer, but no space goes before a text: what is encoded is what was written.
DEFAULTS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,  # indentation: a third fewer tokens for Python
    "character_coverage": 0.99995,
    "control_symbols": ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "num_threads": os.cpu_count(),
    "minloglevel": 2,  # errors only
}

CHUNK = 1000  # characters fed at a time: SentencePiece skips what is longer than 4,192 bytes
HELD_OUT_BYTES = 1_000_000
READ_FACTOR = 16  # of a larger corpus, at most this many times the sample is read
HARD_TEXTS = (
    " one\ttab\r\nCRLF\n\n\n    indent  \t ",
    "\0\x01\x1b[0m\x7f\u0085\u2028\ufeff\ufffd\u2585",
    "e\u0301 \U0001f469\u200d\U0001f680\U0001f1eb\U0001f1f7 \u0627\u0644\u0639\u0631 \u4e2d\u6587",
    "<s></s><unk><pad><|user|><0x41> 1234567890",
)


def main(arguments: list[str]) -> None:
    own = [a for a in arguments if a.startswith(("--add-pieces=", "--output="))]
    rest = [a for a in arguments if a not in own]
    config, flags = load_config(rest, usage=USAGE, sections=("tokenizer", "data"), flags=FLAGS)
    path = resolve_path(config.tokenizer.path)
    if own:
        add_pieces(path, dict(a.split("=", 1) for a in own), "--force" in flags)
        return
    check_symbols(config.tokenizer)
    if path.exists() and "--force" not in flags:
        check_existing(path, config.tokenizer)
        print(f"up to date: {path} (--force trains it anew)")
    elif config.data.mixture:
        raise UserError(
            f"{path}: no tokenizer here; a mixture has that of its datasets: set tokenizer.path"
        )
    else:
        config.data = hub.local_sources(config.data)
        train_and_write(path, config, "--force" in flags)


def check_existing(path: Path, config: TokenizerConfig) -> None:
    """UserError where the tokenizer at `path` is not the one that the configuration describes."""
    size, wanted, options = Tokenizer(path).vocab_size, config.vocab_size, config.options
    trained = noted_options(path.read_bytes())
    if size > wanted or (size < wanted and options.get("hard_vocab_limit", True)):
        differs = f"has {size} pieces, tokenizer.vocab_size is {wanted}"
    elif trained is not None and trained != options:
        differs = f"was trained with {json.dumps(trained)}, [tokenizer] has {json.dumps(options)}"
    else:
        return
    raise UserError(
        f"{path} exists and {differs}: change that, choose another tokenizer.path, or use --force"
    )


def train_and_write(path: Path, config: Config, force: bool) -> None:
    """Samples, trains, proves the round trip, and only then writes; says what came of it."""
    start = time.perf_counter()
    training, held_out = sample_corpus(config)
    if not training.size:
        raise UserError(
            "data.sources hold no training text (a single one may be held out: set"
            " data.val_fraction = 0), or tokenizer.sample_bytes is too small"
        )
    print(
        f"training {config.tokenizer.vocab_size} pieces on {training.size / 1e6:.1f} MB", flush=True
    )
    model = train(training.texts(), config.tokenizer)

    processor = load_model(model, "the trained tokenizer")
    check_encoded(processor, symbols(config.tokenizer, "user_defined_symbols"))
    judge = held_out if held_out.size else Sample(HELD_OUT_BYTES, training.texts())
    texts = [text.decode() for text in judge.texts()]
    for text in [*HARD_TEXTS, *texts]:
        check_round_trip(text, processor.decode(processor.encode(text)))
    rate = judge.size / max(1, sum(map(len, processor.encode(texts))))
    if not write_model(path, model, force):
        check_existing(path, config.tokenizer)
        print(f"up to date: {path} (another process has trained it meanwhile)")
        return
    print(
        f"{path}: {processor.vocab_size()} pieces, {rate:.2f} bytes per token on"
        f" {'held-out' if held_out.size else 'training'} text, round trip exact,"
        f" {time.perf_counter() - start:.0f} s"
    )
    control = filter(processor.is_control, range(processor.vocab_size()))
    print(f"control pieces, which no text gives: {' '.join(map(processor.id_to_piece, control))}")


class Sample:
    """At most `budget` bytes of the texts added, each with the same chance wherever it stood.

    Each text draws a random key and the lowest stay (bottom-k sampling): one pass over a stream of
    any length, in memory for the budget alone.
    """

    def __init__(self, budget: int, texts: Iterable[bytes] = ()):
        self.budget = budget
        self.size = self.count = 0
        self.limit = 1.0
        self.heap: list[tuple[float, int, bytes]] = []
        self.random = random.Random(0)
        for text in texts:
            self.add(text)

    def add(self, text: bytes) -> None:
        key = self.random.random()
        if key >= self.limit:
            return
        self.count += 1
        self.size += len(text)
        heapq.heappush(self.heap, (-key, self.count, text))
        while self.size > self.budget:
            highest, _, dropped = heapq.heappop(self.heap)
            self.limit = -highest
            self.size -= len(dropped)

    def texts(self) -> list[bytes]:
        """The sampled texts in the order in which they were added."""
        return [text for _, _, text in sorted(self.heap, key=lambda entry: entry[1])]


def sample_corpus(config: Config, moved: dict[int, str] | None = None) -> tuple[Sample, Sample]:
    """A sample of the training split, and a small one of the held-out text met on the way.

    A corpus far above the budget is read in part, the same share of each unit of work from its
    start; units that could not be cut small (a compressed file) are read whole. A corpus of few
    documents is read again where prepare.py will move some, lest a split stays empty.

    Args:
        moved: documents that are, see readers.fill_splits.
    """
    training, held_out = Sample(config.tokenizer.sample_bytes), Sample(HELD_OUT_BYTES)
    splitter, whole = readers.Splitter(config.data, moved or {}), True
    survey = Survey(config.data)
    if moved is None:
        for line in survey.remarks():
            print(line, flush=True)
    parts = readers.plan(config.data, survey.sources)
    parts = [part for part in parts if part.split != "test"]
    total = sum(part.bytes for part in parts)
    share = READ_FACTOR * training.budget / max(1, total)
    progress = tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)
    skipped = itertools.count()  # each bad document takes a number
    for part in parts:
        left = share * part.bytes if part.bytes < total / 256 else math.inf
        for document in readers.read(part, config.data, lambda bad: next(skipped)):
            if not document.text:
                continue
            split = part.split or splitter.split(document.text)
            sample = training if split == "train" else held_out
            for text in readers.texts(document, config.data):
                for chunk in chunks(text):
                    sample.add(chunk.encode())
            left -= len(document.text)
            if left < 0:
                whole = False
                break
        progress.update(part.bytes)
    progress.close()
    if whole and not moved and (moved := readers.fill_splits(splitter.edges, config.data)):
        return sample_corpus(config, moved)
    if bad := next(skipped):
        print(f"left out {bad:,} bad documents; prepare.py lists them")
    return training, held_out


def chunks(text: str) -> Iterator[str]:
    """The text in pieces of at most CHUNK characters, cut before line breaks, else before spaces.

    Never behind a line break: SentencePiece strips those from the end of what it is fed, so it
    would not see how lines begin.
    """
    start = 0
    while len(text) - start > CHUNK:
        window = text[start : start + CHUNK]
        head = window[: max(window.rfind("\n"), 0)].rstrip("\n")
        head = head or window[: max(window.rfind(" "), 0)].rstrip(" ") or window
        yield head
        start += len(head)
    yield text[start:]


def train(texts: list[bytes], config: TokenizerConfig) -> bytes:
    """The bytes of a model file trained on the texts; UserError where SentencePiece refuses."""
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=config.vocab_size,
            **DEFAULTS | config.options,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(explain(str(error), config)) from None
    return add_options(model.getvalue(), config.options)


def explain(complaint: str, config: TokenizerConfig) -> str:
    """SentencePiece's complaint in the words of the configuration."""
    size = f"tokenizer.vocab_size ({config.vocab_size})"
    if found := re.search(r"too high .* <= (\d+)", complaint):
        return f"{size} is more than the sampled text gives: at most {found[1]}"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", complaint):
        return (
            f"{size} is too small: bytes, reserved pieces and the text's characters are {found[1]}:"
            " raise it, or leave out rare characters with a lower tokenizer.character_coverage"
        )
    reason = re.sub(r"^\w+: (src/\S+ )?", "", complaint)
    for name, value in config.options.items():
        if name in complaint or f'"{value}"' in complaint:
            return f"SentencePiece refuses tokenizer.{name} = {json.dumps(value)}: {reason}"
    return f"SentencePiece refuses these texts or options {json.dumps(config.options)}: {reason}"


def symbols(config: TokenizerConfig, option: str) -> list[str]:
    """The symbols that an option gives: a list, or text with commas between them."""
    given = config.options.get(option, DEFAULTS.get(option, []))
    if isinstance(given, list):
        return [str(symbol) for symbol in given]
    try:
        return next(csv.reader([str(given)], strict=True), [])
    except csv.Error:
        raise UserError(f"tokenizer.{option} is a list of symbols, not {given!r}") from None


def check_symbols(config: TokenizerConfig) -> None:
    """UserError for a symbol that can't become a piece of its own, as far as its name tells."""
    taken = {"<unk>": "the unknown piece"}
    for option, kind in (
        ("control_symbols", "a control symbol"),
        ("user_defined_symbols", "a user-defined one"),
    ):
        for symbol in symbols(config, option):
            name = f"tokenizer.{option}: the symbol"
            check_symbol(symbol, name, control=option == "control_symbols")
            if symbol in taken:
                raise UserError(
                    f"{name} {symbol!r} is {taken[symbol]} already; leave it out here, or there"
                )
            taken[symbol] = kind
        taken |= {"<s>": "the piece BOS", "</s>": "the piece EOS"}  # control symbols in any case


def check_encoded(processor: SentencePieceProcessor, symbols: list[str]) -> None:
    """UserError unless each symbol is encoded to its own id and no other, in a text too."""
    for symbol in symbols:
        own, alone = processor.piece_to_id(symbol), processor.encode(symbol)
        within = processor.encode(f"\0{symbol}\0")
        if alone == [own] and within.count(own) == 1:
            continue
        became = " ".join(map(repr, processor.id_to_piece(alone if alone != [own] else within)))
        raise UserError(
            f"tokenizer.user_defined_symbols: {symbol!r} would be encoded as {became}; leave it"
            " out, or mend tokenizer.add_dummy_prefix or tokenizer.model_type"
        )


def check_round_trip(text: str, back: str) -> None:
    """UserError unless decoding gave the text back; only SentencePiece's own sign may change."""
    text = text.replace(SPACE, " ")
    if text != back:
        pairs = enumerate(zip(text, back, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
        raise UserError(
            f"this tokenizer would lose text: {text[at : at + 20]!r} came back as"
            f" {back[at : at + 20]!r}; look at byte_fallback, normalization_rule_name and the"
            " whitespace options of [tokenizer]"
        )


def add_pieces(path: Path, options: dict[str, str], force: bool) -> None:
    """Writes the tokenizer at `path` with more control pieces to --output."""
    if set(options) != {"--add-pieces", "--output"}:
        raise UserError("--add-pieces=<pad>,<|x|> and --output=PATH go together")
    output = resolve_path(options["--output"])
    size = Tokenizer(path).vocab_size
    model = add_control_pieces(path.read_bytes(), options["--add-pieces"].split(","))
    if output.exists() and output.read_bytes() == model:
        print(f"up to date: {output}")
    elif output.exists() and not force:
        raise UserError(
            f"{output} exists and would change: choose another --output, or use --force"
        )
    else:
        write_model(output, model, replace=True)
        print(f"{output}: {size} pieces and {Tokenizer(output).vocab_size - size} more")


def write_model(path: Path, model: bytes, replace: bool) -> bool:
    """Writes the model, and beside it a .vocab to read: line i is piece i and its score.

    Returns:
        Whether it did: not where a model is there by now and is not to be replaced.

    Raises:
        UserError: the directory can't be written.
    """
    processor = load_model(model, str(path))
    rows = (
        f"{one_line(processor.id_to_piece(i))}\t{processor.get_score(i):g}\n"
        for i in range(processor.vocab_size())
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock"), lambda holder: None):
            if path.exists() and not replace:
                return False
            write_atomically(path.with_suffix(".vocab"), "".join(rows).encode())
            write_atomically(path, model)
            return True
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None


def one_line(piece: str) -> str:
    """The piece with its line breaks and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)


if __name__ == "__main__":
    run_program(main)
