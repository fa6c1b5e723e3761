"""Conversations as tokens: the template that writes each role's message, and what is learnt of it.

A template names control pieces of the tokenizer, such as <|user|>, and they become their ids. In
what people wrote the same characters stay text, so nobody can speak in another's role.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from config import UserError
from tokenizer import Tokenizer

LEARNT = "assistant"  # the role whose words are learnt
MARKER = re.compile(r"<\|[^|<>]*\|>")  # what surely means a control piece


class Rendered(NamedTuple):
    """A conversation from BOS to EOS: ids (T,) uint16, and 1 where one is learnt (T,) uint8."""

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
        processor = tokenizer.processor
        control = [i for i in range(tokenizer.vocab_size) if processor.is_control(i)]
        self.control = {processor.id_to_piece(i): i for i in control}
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
        """What ends an answer: ids, and texts where the template marks its end in text alone.

        That is what comes between an answer and the next message, up to the first control piece.
        """
        ids, texts = {self.tokenizer.eos_id: None}, {}
        for before, _ in self.texts.values():
            parts = self._split(self.texts[LEARNT][1] + before)
            control = [self.control[part] for part in parts if part in self.control]
            if control:
                ids[control[0]] = None
            elif "".join(parts).strip():  # an answer may hold blanks
                texts["".join(parts)] = None
        return [*ids], [*texts]

    def _split(self, text: str) -> list[str]:
        """The template's own text in parts: control pieces, and what stands between them."""
        known = sorted(self.control, key=len, reverse=True)
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
            raise UserError("data.template holds BOS, which begins each conversation by itself")
        return np.array(ids, np.uint16)
