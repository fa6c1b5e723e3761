"""Trains a tokenizer: the text it is trained on, the checks that it loses no text, and its file.

Control pieces are added to a model file without the protobuf package: they are appended, since
protobuf messages merge when their bytes are concatenated.
"""

from __future__ import annotations

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
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

from config import Config, TokenizerConfig, UserError, write_atomically
from corpus import readers, splits
from corpus.locks import locked
from corpus.sources import Survey
from tokenizer import SPACE, Tokenizer, load_model, printable

# As Llama 2's tokenizer, but without a space before each text: exactly what was written is encoded.
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

OPTIONS = b"rocket options: "
CONTROL = b"\x15\0\0\0\0\x18\x03"  # the fields of a piece of score 0 that no text encodes to
CHUNK = 1000  # characters fed at a time: SentencePiece skips texts longer than 4,192 bytes
HELD_OUT_BYTES = 1_000_000
READ_FACTOR = 16  # at most this many times the sample is read of a larger corpus
HARD_TEXTS = (
    " one\ttab\r\nCRLF\n\n\n    indent  \t ",
    "\0\x01\x1b[0m\x7f\u0085\u2028\ufeff\ufffd\u2585",
    "e\u0301 \U0001f469\u200d\U0001f680\U0001f1eb\U0001f1f7 \u0627\u0644\u0639\u0631 \u4e2d\u6587",
    "<s></s><unk><pad><|user|><0x41> 1234567890",
)


def check_existing(path: Path, config: TokenizerConfig) -> None:
    """UserError where the tokenizer at `path` is not the one that the configuration describes."""
    size, wanted, options = Tokenizer(path).vocab_size, config.vocab_size, config.options
    trained = noted_options(path.read_bytes())
    if size > wanted or (size < wanted and options.get("hard_vocab_limit", True)):
        differs = f"has {size} pieces, tokenizer.vocab_size is {wanted}"
    elif trained not in (None, options):
        differs = f"was trained with {json.dumps(trained)}, [tokenizer] has {json.dumps(options)}"
    else:
        return
    raise UserError(
        f"{path} exists and {differs}: change that, choose another tokenizer.path, or use --force"
    )


def train_and_write(path: Path, config: Config, force: bool) -> None:
    """Samples, trains, checks the round trip, and only then writes; prints the result."""
    start = time.perf_counter()
    training, held_out = sample_corpus(config)
    if not training.size:
        raise UserError(
            "data.sources hold no training text (a single one may be held out: set"
            " data.val_fraction = 0), or tokenizer.sample_bytes is too small"
        )
    size = config.tokenizer.vocab_size
    print(f"training {size} pieces on {training.size / 1e6:.1f} MB", flush=True)
    model = train(training.texts(), config.tokenizer)

    processor = load_model(model, "the trained tokenizer")
    judge = held_out if held_out.size else Sample(HELD_OUT_BYTES, training.texts())
    texts = [text.decode() for text in judge.texts()]
    check_encoded(processor, config.tokenizer)
    check_round_trips(processor, texts)
    rate = judge.size / max(1, sum(map(len, processor.encode(texts))))
    if not write_model(path, model, force):
        check_existing(path, config.tokenizer)
        print(f"up to date: {path} (another process has trained it meanwhile)")
        return
    tokenizer = Tokenizer(path)
    print(
        f"{path}: {tokenizer.vocab_size} pieces, {rate:.2f} bytes per token on"
        f" {'held-out' if held_out.size else 'training'} text, round trip exact,"
        f" {time.perf_counter() - start:.0f} s\n"
        f"control pieces, which no text gives: {' '.join(tokenizer.control_pieces())}"
    )


def add_pieces(path: Path, pieces: list[str], output: Path, force: bool) -> None:
    """Writes the tokenizer at `path` with more control pieces to `output`.

    Raises:
        UserError: another file is at `output` and `force` is not set; see add_control_pieces.
    """
    size = Tokenizer(path).vocab_size
    model = add_control_pieces(path.read_bytes(), pieces)
    if output.exists() and output.read_bytes() == model:
        print(f"up to date: {output}")
    elif write_model(output, model, force):
        print(f"{output}: {size} pieces and {Tokenizer(output).vocab_size - size} more")
    else:
        raise UserError(
            f"{output} exists and would change: choose another --output, or use --force"
        )


def write_model(path: Path, model: bytes, replace: bool) -> bool:
    """Writes the model, and beside it a .vocab to read: line i is piece i and its score.

    Returns False if there is a model by now and `replace` is not set; UserError if the directory
    can't be written.
    """
    processor = load_model(model, str(path))
    rows = (
        f"{printable(processor.id_to_piece(i))}\t{processor.get_score(i):g}\n"
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


class Sample:
    """At most `budget` bytes of the added texts, each chosen with the same probability.

    Each text draws a random key and the lowest keys stay (bottom-k sampling), in one pass over a
    stream of any length and in memory for the budget alone.
    """

    def __init__(self, budget: int, texts: Iterable[bytes] = ()):
        self.budget, self.size, self.count = budget, 0, 0
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
    """A sample of the training split, and a small one of the held-out text on the way.

    Of a corpus far above the budget, the same share of each unit of work is read, from its start;
    units that could not be cut small (a compressed file) are read whole. A corpus of few documents
    is read again if prepare.py will move some of them so that no split is empty (`moved`, see
    splits.fill_splits).
    """
    training, held_out = Sample(config.tokenizer.sample_bytes), Sample(HELD_OUT_BYTES)
    splitter, whole = splits.Splitter(config.data, moved or {}), True
    survey = Survey(config.data)
    if moved is None:
        for line in survey.remarks():
            print(line, flush=True)
    parts = [p for p in readers.plan(config.data, survey.sources) if p.split != "test"]
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
    if whole and not moved and (moved := splits.fill_splits(splitter.edges, config.data)):
        return sample_corpus(config, moved)
    if bad := next(skipped):
        print(f"left out {bad:,} bad documents; prepare.py lists them")
    return training, held_out


def chunks(text: str) -> Iterator[str]:
    """The text in pieces of at most CHUNK characters, cut before line breaks, else before spaces.

    Never after a line break: SentencePiece strips those from the end of a text, so it would not
    see how lines begin.
    """
    start = 0
    while len(text) - start > CHUNK:
        window = text[start : start + CHUNK]
        head = window.rpartition("\n")[0].rstrip("\n")
        head = head or window.rpartition(" ")[0].rstrip(" ") or window
        yield head
        start += len(head)
    yield text[start:]


def train(texts: list[bytes], config: TokenizerConfig) -> bytes:
    """The bytes of a model file trained on the texts; UserError where SentencePiece refuses.

    The file notes the options in TrainerSpec.model_prefix (2), which is otherwise unused.
    """
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
    return model.getvalue() + _field(2, _field(2, OPTIONS + json.dumps(config.options).encode()))


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
    """The symbols of an option: a list, or text with commas between them."""
    given = config.options.get(option, DEFAULTS.get(option, []))
    if isinstance(given, list):
        return [str(symbol) for symbol in given]
    try:
        return next(csv.reader([str(given)], strict=True), [])
    except csv.Error:
        raise UserError(f"tokenizer.{option} is a list of symbols, not {given!r}") from None


def check_symbols(config: TokenizerConfig) -> None:
    """UserError for a symbol that can't become a piece of its own, as far as its name shows."""
    taken = {"<unk>": "the unknown piece"}
    kinds = {"control_symbols": "a control symbol", "user_defined_symbols": "a user-defined one"}
    for option, kind in kinds.items():
        for symbol in symbols(config, option):
            name = f"tokenizer.{option}: the symbol"
            check_symbol(symbol, name, control=option == "control_symbols")
            if symbol in taken:
                raise UserError(
                    f"{name} {symbol!r} is {taken[symbol]} already; leave it out here, or there"
                )
            taken[symbol] = kind
        taken |= {"<s>": "the piece BOS", "</s>": "the piece EOS"}  # control symbols in any case


def check_encoded(processor: SentencePieceProcessor, config: TokenizerConfig) -> None:
    """UserError unless each user-defined symbol is encoded to its own id alone, in a text too."""
    for symbol in symbols(config, "user_defined_symbols"):
        own, alone = processor.piece_to_id(symbol), processor.encode(symbol)
        within = processor.encode(f"\0{symbol}\0")
        if alone != [own] or within.count(own) != 1:
            ids = alone if alone != [own] else within
            raise UserError(
                f"tokenizer.user_defined_symbols: {symbol!r} would be encoded as"
                f" {' '.join(map(repr, processor.id_to_piece(ids)))}; leave it out, or change"
                " tokenizer.add_dummy_prefix or tokenizer.model_type"
            )


def check_round_trips(processor: SentencePieceProcessor, texts: list[str]) -> None:
    """UserError unless decoding gives these and hard texts back; only U+2581 may become a space."""
    for text in (*HARD_TEXTS, *texts):
        text, back = text.replace(SPACE, " "), processor.decode(processor.encode(text))
        if text != back:
            at = next(i for i in range(len(text) + 1) if text[: i + 1] != back[: i + 1])
            raise UserError(
                f"this tokenizer would lose text: {text[at : at + 20]!r} came back as"
                f" {back[at : at + 20]!r}; look at byte_fallback, normalization_rule_name and the"
                " whitespace options of [tokenizer]"
            )


def add_control_pieces(model: bytes, pieces: list[str]) -> bytes:
    """The model with these control pieces after its own; pieces that it has stay as they are.

    Field numbers are those of sentencepiece_model.proto: ModelProto.pieces = 1 (piece = 1,
    score = 2, type = 3) and ModelProto.trainer_spec = 2 (vocab_size = 4).

    Raises:
        UserError: a piece is empty, holds whitespace or is one that text encodes to; too many.
    """
    processor = load_model(model, "tokenizer")
    known = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    for piece in pieces:
        check_symbol(piece, "control piece", control=True)
        if piece in known and not processor.is_control(known[piece]):
            raise UserError(f"control piece {piece!r}: text encodes to it already; take another")
    new = [piece for piece in dict.fromkeys(pieces) if piece not in known]
    if not new:
        return model
    model += b"".join(_field(1, _field(1, piece.encode()) + CONTROL) for piece in new)
    model += _field(2, b"\x20" + _varint(len(known) + len(new)))
    load_model(model, "tokenizer with the added pieces")
    return model


def check_symbol(symbol: str, name: str, control: bool) -> None:
    """UserError, which starts with `name`, for a symbol that SentencePiece would not keep as it is.

    A symbol with a space would never be found: spaces in a text become U+2581 before the search.
    """
    spaces = r"[\s\u2581]" if control else r"[ \u2581]"
    faults = {
        r"\A\Z": "it is empty, leave it out",
        spaces: "write it without spaces, such as <pad> or <tool_call>",
        r"[\0\ud800-\udfff]": "SentencePiece can't store it; take printable text",
        # Other tools read the digits in either case.
        r"\A<0x[0-9A-Fa-f]{2}>\Z": "it is the name of a byte's piece; take another",
    }
    for pattern, fault in faults.items():
        if re.search(pattern, symbol):
            raise UserError(f"{name} {symbol!r}: {fault}")


def noted_options(model: bytes) -> dict[str, Any] | None:
    """The options that `train` noted; None for a model from elsewhere."""
    _, mark, rest = model.rpartition(OPTIONS)
    return json.JSONDecoder().raw_decode(rest.decode(errors="replace"))[0] if mark else None


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Protobuf's integer: seven bits a byte, the low ones first, the high bit where more follow."""
    if value < 128:
        return bytes([value])
    return bytes([value & 127 | 128]) + _varint(value >> 7)
