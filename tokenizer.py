"""The tokenizer: a SentencePiece model file, text and conversations to uint16 ids and back.

Control pieces are added to a model file without the protobuf package: they are appended, since
protobuf messages merge when their bytes are concatenated.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from config import MAX_VOCAB_SIZE, TokenizerConfig, UserError, resolve_path

SPACE = "\u2581"  # SentencePiece's sign for a space: in a text, it decodes to a space
CONTROL = 3  # SentencePiece's type of the pieces that no text encodes to
OPTIONS = b"rocket options: "
LEARNT = "assistant"  # the role whose words are learnt
MARKER = re.compile(r"<\|[^|<>]*\|>")  # text that can only be meant as a control piece


class Tokenizer:
    """A SentencePiece model (BPE or unigram; Llama 2's tokenizer.model as it is).

    Attributes:
        path: the model file.
        vocab_size: number of pieces.
        bos_id, eos_id: ids that stand before and after a document.
        sha256: hex digest of the file.

    Raises:
        UserError: no such file, not a SentencePiece model, above 65,536 pieces, no BOS or EOS.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            model = path.read_bytes()
        except OSError as error:
            hint = "; train_tokenizer.py makes it" if isinstance(error, FileNotFoundError) else ""
            raise UserError(f"tokenizer {path}: {error.strerror}{hint}") from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.processor = load_model(model, f"tokenizer {path}")
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text (uint16), without BOS and EOS; no text encodes to a control piece."""
        return self.processor.encode_as_numpy(text).astype(np.uint16)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of the ids, control pieces left out; bytes that are not UTF-8 become U+FFFD."""
        return self.processor.decode([int(i) for i in ids])

    def pieces(self) -> list[str]:
        """All pieces in the order of their ids."""
        return self.processor.id_to_piece(list(range(self.vocab_size)))

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text an id stands for (int64): control and unknown pieces 0, byte pieces 1.

        Where the model puts a space before each text (Llama 2's does), that space counts.
        """
        ids = list(range(self.vocab_size))
        lengths = np.array([len(piece.replace(SPACE, " ").encode()) for piece in self.pieces()])
        lengths[self.processor.is_byte(ids)] = 1
        lengths[self.processor.is_control(ids)] = 0
        lengths[self.processor.is_unknown(ids)] = 0
        return lengths

    def control_pieces(self) -> dict[str, int]:
        """Control piece to id, in the order of ids."""
        return {p: i for i, p in enumerate(self.pieces()) if self.processor.is_control(i)}

    def extends(self, old: Tokenizer) -> bool:
        """Whether each piece of `old` has the same id here, so that weights for `old` fit here."""
        return self.pieces()[: old.vocab_size] == old.pieces()


# Conversations as tokens. The control pieces that a template names, such as <|user|>, become their
# ids. In the content of messages the same characters stay text, so nobody can speak in the role of
# another.


class Rendered(NamedTuple):
    """A conversation from BOS to EOS: ids (T,) uint16, and a mask (T,) uint8, 1 where learnt."""

    ids: np.ndarray
    mask: np.ndarray


class Template:
    """How the message of each role is written.

    Attributes:
        before, after: for each role, the ids around its content.

    Raises:
        UserError: it names a control piece that the tokenizer lacks, or its BOS.
    """

    def __init__(self, template: dict[str, str], tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.texts = {role: text.split("{content}") for role, text in template.items()}
        self.control = tokenizer.control_pieces()
        self.before = {role: self._ids(before) for role, (before, _) in self.texts.items()}
        self.after = {role: self._ids(after) for role, (_, after) in self.texts.items()}

    def render(self, messages: Iterable[tuple[str, str]], train_on: str) -> Rendered:
        """The tokens of (role, content) pairs; learnt are the responses with their ends, or all."""
        pieces, masks = [np.array([self.tokenizer.bos_id])], [0]
        for role, content in messages:
            learnt = train_on == "all" or role == LEARNT
            pieces += [self.before[role], self.tokenizer.encode(content), self.after[role]]
            masks += [train_on == "all", learnt, learnt]
        pieces.append(np.array([self.tokenizer.eos_id]))
        masks.append(masks[-1])
        mask = np.repeat(np.array(masks, np.uint8), [len(ids) for ids in pieces])
        return Rendered(np.concatenate(pieces).astype(np.uint16), mask)

    def prompt(self, messages: Iterable[tuple[str, str]]) -> list[int]:
        """The ids after which the model answers."""
        ids = self.render(messages, "all").ids[:-1]
        return [*ids.tolist(), *self.before[LEARNT].tolist()]

    def stops(self) -> tuple[list[int], list[str]]:
        """What ends an answer: ids, or texts where the template marks the end without one.

        An answer ends at the first control piece between it and the next message, else with the
        text between the two.
        """
        ids, texts = {self.tokenizer.eos_id: None}, {}
        for before, _ in self.texts.values():
            parts = self._split(self.texts[LEARNT][1] + before)
            control = [self.control[part] for part in parts if part in self.control]
            if control:
                ids[control[0]] = None
            elif "".join(parts).strip():  # blanks alone may stand within an answer
                texts["".join(parts)] = None
        return [*ids], [*texts]

    def _split(self, text: str) -> list[str]:
        """The template's own text, split into control pieces and the texts between them."""
        known = sorted(self.control, key=len, reverse=True)  # of two that match, the longer
        return [*filter(None, re.split(f"({'|'.join(map(re.escape, known))})", text))]

    def _ids(self, text: str) -> np.ndarray:
        """The ids of the template's own text."""
        ids: list[int] = []
        for part in self._split(text):
            if part in self.control:
                ids.append(self.control[part])
            elif missing := MARKER.search(part):
                raise UserError(
                    f"data.template: {self.tokenizer.path} has no control piece {missing[0]}; add"
                    f" it with train_tokenizer.py --add-pieces='{missing[0]}', or write plain text"
                )
            else:
                ids += self.tokenizer.encode(part).tolist()
        if self.tokenizer.bos_id in ids:
            raise UserError("data.template holds BOS: leave it out, conversations begin with it")
        return np.array(ids, np.uint16)


def configured_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer at tokenizer.path; UserError if its size is not tokenizer.vocab_size."""
    tokenizer = Tokenizer(resolve_path(config.path))
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, but tokenizer.vocab_size is"
            f" {config.vocab_size}: set it to {tokenizer.vocab_size}, or train the tokenizer anew"
        )
    return tokenizer


def load_model(model: bytes, name: str) -> SentencePieceProcessor:
    """A processor of a model file's bytes; UserError, which starts with `name`, if unusable."""
    processor = SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError:
        raise UserError(f"{name}: not a SentencePiece model, or cut short") from None
    size = processor.vocab_size()
    if size > MAX_VOCAB_SIZE:
        raise UserError(f"{name}: {size} pieces; ids are uint16, so at most {MAX_VOCAB_SIZE} fit")
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise UserError(f"{name}: no BOS or no EOS piece, so documents can't be told apart")
    return processor


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
    for piece in new:
        score = b"\x15" + struct.pack("<f", 0.0)
        model += _field(1, _field(1, piece.encode()) + score + b"\x18" + _varint(CONTROL))
    model += _field(2, b"\x20" + _varint(len(known) + len(new)))
    load_model(model, "tokenizer with the added pieces")
    return model


def check_symbol(symbol: str, name: str, control: bool) -> None:
    """UserError, which starts with `name`, for a symbol that SentencePiece would not keep as it is.

    A symbol with a space would never be found: spaces in a text become U+2581 before the search.
    """
    if not symbol:
        raise UserError(f"{name} {symbol!r}: it is empty, leave it out")
    if any(c in (" ", SPACE) or (control and c.isspace()) for c in symbol):
        raise UserError(f"{name} {symbol!r}: write it without spaces, such as <pad> or <tool_call>")
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in symbol):
        raise UserError(f"{name} {symbol!r}: SentencePiece can't store it; take printable text")
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", symbol):  # other tools read the digits in either case
        raise UserError(f"{name} {symbol!r} is the name of a byte's piece; take another")


def add_options(model: bytes, options: dict[str, Any]) -> bytes:
    """The model with its training options in TrainerSpec.model_prefix (2), otherwise unused."""
    return model + _field(2, _field(2, OPTIONS + json.dumps(options).encode()))


def noted_options(model: bytes) -> dict[str, Any] | None:
    """The options that `add_options` noted; None for a model from elsewhere."""
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
