"""The tokenizer: text and conversations to uint16 ids and back, by a SentencePiece model file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from config import MAX_VOCAB_SIZE, TokenizerConfig, UserError, resolve_path

SPACE = "\u2581"  # SentencePiece's sign for a space: in a text, it decodes to a space
ASSISTANT = "assistant"  # the role whose messages are trained on
MARKER = re.compile(r"<\|[^|<>]*\|>")  # text that can only be meant as a control piece


class Tokenizer:
    """A SentencePiece model (BPE or unigram; Llama 2's tokenizer.model as it is).

    `bos_id` and `eos_id` stand before and after a document; `sha256` is the file's hex digest.

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


# Conversations as tokens. Control pieces that the template names, such as <|user|>, become their
# ids. In the content of a message the same characters stay text, so no text can change the role.


class Rendered(NamedTuple):
    """A conversation from BOS to EOS: ids (T,) uint16, and a mask (T,) uint8, 1 where trained."""

    ids: np.ndarray
    mask: np.ndarray


class Template:
    """How the message of each role is written: the ids before and after its content.

    Raises:
        UserError: it names a control piece that the tokenizer lacks, or its BOS.
    """

    def __init__(self, template: dict[str, str], tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.texts = {role: text.split("{content}") for role, text in template.items()}
        self.control = tokenizer.control_pieces()
        known = sorted(self.control, key=len, reverse=True)  # of two that match, the longer
        self.pattern = re.compile(f"({'|'.join(map(re.escape, known))})")
        self.before = {role: self._ids(before) for role, (before, _) in self.texts.items()}
        self.after = {role: self._ids(after) for role, (_, after) in self.texts.items()}

    def render(self, messages: Iterable[tuple[str, str]], train_on: str) -> Rendered:
        """The tokens of (role, content) pairs; trained are responses with their ends, or all."""
        pieces, masks = [np.array([self.tokenizer.bos_id])], [0]
        for role, content in messages:
            trained = train_on == "all" or role == ASSISTANT
            pieces += [self.before[role], self.tokenizer.encode(content), self.after[role]]
            masks += [train_on == "all", trained, trained]
        pieces.append(np.array([self.tokenizer.eos_id]))
        masks.append(masks[-1])
        mask = np.repeat(np.array(masks, np.uint8), [len(ids) for ids in pieces])
        return Rendered(np.concatenate(pieces).astype(np.uint16), mask)

    def prompt(self, messages: Iterable[tuple[str, str]]) -> list[int]:
        """The ids after which the model answers."""
        ids = self.render(messages, "all").ids[:-1]
        return [*ids.tolist(), *self.before[ASSISTANT].tolist()]

    def stops(self) -> tuple[list[int], list[str]]:
        """What ends an answer, ids and texts: the first control piece between it and the next
        message, else the text between the two."""
        ids, texts = {self.tokenizer.eos_id: None}, {}
        for before, _ in self.texts.values():
            text = self.texts[ASSISTANT][1] + before
            if control := self.pattern.search(text):
                ids[self.control[control[0]]] = None
            elif text.strip():  # blanks alone may stand within an answer
                texts[text] = None
        return [*ids], [*texts]

    def _ids(self, text: str) -> np.ndarray:
        """The ids of the template's own text."""
        ids: list[int] = []
        for part in filter(None, self.pattern.split(text)):
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


def printable(text: str, kept: str = "") -> str:
    """The text with escapes for what does not print, but for the characters in `kept`."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


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
