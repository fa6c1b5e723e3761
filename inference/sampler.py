"""A model and its tokenizer, ready to continue prompts and to answer in a conversation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from config import UserError
from distributed import compute_dtype
from inference.generation import (
    Completion,
    Settings,
    Source,
    drawable,
    fit_to_device,
    generate,
    load_model,
)
from tokenizer import Template

Messages = list[tuple[str, str]]  # roles and contents


class Sampler:
    """A source's model and tokenizer, ready to complete `rows` prompts at a time.

    Raises:
        UserError: a chat with weights that saw no conversation; --compile without a compiler.
    """

    def __init__(self, source: Source, options: argparse.Namespace, rows: int):
        device, dtype = device_and_dtype(options)
        self.source, self.tokenizer = source, source.tokenizer
        self.stops, self.stop_ids = list(options.stop), [self.tokenizer.eos_id]
        self.template: Template | None = None
        if options.chat:
            if not source.template:
                raise UserError(f"{source.path} was trained on plain text; leave out --chat")
            self.template = Template(source.template, self.tokenizer)
            self.stop_ids, stops = self.template.stops()
            self.stops += stops
        self.model = load_model(source, device, dtype)
        fit_to_device(self.model, rows == 1, options.compile)
        self.allowed = drawable(self.tokenizer, self.model.vocab_size).to(device)
        self.allowed[self.stop_ids] = True

    def encode(self, prompts: list[str], max_tokens: int, history: Messages) -> list[list[int]]:
        """Prompts as ids after BOS; UserError where max_tokens more don't fit the context.

        Args:
            history: in a chat, the messages before the prompts.
        """
        limit, encoded = self.model.config.max_seq_len, []
        for number, prompt in enumerate(prompts, 1):
            if any("\ud800" <= c <= "\udfff" for c in prompt):
                raise UserError(f"prompt {number}: not UTF-8")
            if self.template:
                ids = self.template.prompt([*history, ("user", prompt)])
            else:
                ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()]
            if len(ids) + max_tokens > limit:
                raise UserError(
                    f"prompt {number}: {len(ids)} tokens and {max_tokens} to come are above"
                    f" model.max_seq_len ({limit}); shorten the prompt or lower --max-tokens"
                )
            encoded.append(ids)
        return encoded

    def remembered(self, history: Messages, prompt: str, room: int) -> Messages:
        """A chat's messages without the oldest exchanges that do not fit the context beside the
        prompt and the room for an answer; says so where it leaves one out."""
        system = [message for message in history[:1] if message[0] == "system"]
        while len(history) > len(system) and self.template:
            ids = self.template.prompt([*history, ("user", prompt)])
            if len(ids) + room <= self.model.config.max_seq_len:
                break
            history = [*system, *history[len(system) + 2 :]]
            print("(the context is full: the oldest exchange is left out)", file=sys.stderr)
        return history

    def complete(
        self,
        prompts: list[list[int]],
        samples: list[int],
        settings: Settings,
        show: Callable[[str], Any] | None = None,
        likeliest: int | None = None,
    ) -> tuple[list[Completion], list[list[dict[str, Any]]]]:
        """The completions of a batch; `show` gets the first one's text as it becomes certain.

        With `likeliest`, also each row's tokens: their ids, pieces and log-probabilities, and those
        of as many of the likeliest ids at each.
        """
        completions = [Completion(self.tokenizer, p, self.stops, self.stop_ids) for p in prompts]
        known: list[list[dict[str, Any]]] = [[] for _ in prompts]

        def watch(logits: Tensor, chosen: Tensor) -> None:
            logs = logits.double().log_softmax(-1)
            best = logs.topk(min(likeliest or 0, logs.shape[-1]))
            for i, token in enumerate(chosen.tolist()):
                pairs = zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)
                others = [self.describe(*pair) for pair in pairs]
                known[i].append(self.describe(token, logs[i, token].item()) | {"likeliest": others})

        steps = generate(
            self.model,
            prompts,
            settings,
            allowed=self.allowed,
            stop_ids=self.stop_ids,
            samples=samples,
            watch=None if likeliest is None else watch,
        )
        for ids in chain(steps, [[None] * len(prompts)]):
            texts = [c.add(token) for c, token in zip(completions, ids, strict=True)]
            if show:
                show(texts[0])
            if all(completion.end for completion in completions):
                break
        return completions, [row[: c.tokens] for row, c in zip(known, completions, strict=True)]

    def origin(self) -> dict[str, Any]:
        """What a sample came from, for JSON."""
        return {
            "model": str(self.source.path),
            "step": self.source.step,
            "tokenizer_sha256": self.tokenizer.sha256,
            "dtype": str(self.model.lm_head.weight.dtype).removeprefix("torch."),
        }

    def describe(self, token: int, logprob: float) -> dict[str, Any]:
        """A token for JSON; the piece of a spare row is null."""
        has_piece = token < self.tokenizer.vocab_size
        piece = self.tokenizer.processor.id_to_piece(token) if has_piece else None
        return {"id": token, "piece": piece, "logprob": logprob}


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the type of weights; auto chooses as training does."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise UserError("--device=cuda: this machine has no GPU that torch can use")
    name = options.device if options.device != "auto" else "cuda" if has_cuda else "cpu"
    return torch.device(name), compute_dtype(options.dtype, torch.device(name))
