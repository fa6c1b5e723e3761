"""A model and its tokenizer that continue prompts or answer in a conversation, and the text of a
sample while its tokens arrive."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from config import UserError, existing_path, read_rows
from inference.generation import (
    Settings,
    Source,
    device_and_dtype,
    drawable,
    fit_to_device,
    generate,
    load_model,
)
from tokenizer import Template, Tokenizer


class Sampler:
    """A source's model and tokenizer, ready to complete `rows` prompts at a time.

    Attributes:
        template: how a chat's messages are written; None if prompts are to be continued.
        history: roles and contents of a chat's messages before the next prompt.

    Raises:
        UserError: a chat with weights that saw no conversation, or not such a role; --compile
            without a compiler.
    """

    def __init__(self, source: Source, options: argparse.Namespace, settings: Settings, rows: int):
        device, dtype = device_and_dtype(options)
        self.source, self.tokenizer = source, source.tokenizer
        self.options, self.settings = options, settings
        self.template: Template | None = None
        self.history = [("system", options.system)] if options.system else []
        self.stops, self.stop_ids = list(options.stop), [self.tokenizer.eos_id]
        if options.chat:
            if not source.template:
                raise UserError(f"{source.path} was trained on plain text; leave out --chat")
            self.template = Template(source.template, self.tokenizer)
            for role in ("user", *dict(self.history)):
                if role not in self.template.before:
                    raise UserError(f"the template of {source.path} has no role {role!r}")
            self.stop_ids, stops = self.template.stops()
            self.stops += stops
        self.model = load_model(source, device, dtype)
        fit_to_device(self.model, rows == 1, options.compile)
        self.allowed = drawable(self.tokenizer, self.model.vocab_size).to(device)
        self.allowed[self.stop_ids] = True

    def ask(self) -> None:
        """Asks for prompts at a terminal and answers them, until its input ends."""
        room = self.options.max_tokens or self.settings.max_tokens // 4
        while True:
            try:
                print("> ", end="", file=sys.stderr, flush=True)  # standard output is for samples
                self.converse(input(), room)
            except UserError as error:
                print(error, file=sys.stderr)
            except EOFError:
                return

    def converse(self, prompt: str, room: int) -> None:
        """Answers a prompt that was typed; a chat remembers both.

        A chat's oldest exchanges are left out, with a message, where the context has no room for
        them beside the prompt and an answer of `room` tokens.
        """
        oldest = sum(role == "system" for role, _ in self.history)  # this message stays
        limit = self.model.config.max_seq_len - room
        while len(self.history) > oldest and len(self.ids_of(prompt)) > limit:
            del self.history[oldest : oldest + 2]
            print("(the context is full: the oldest exchange is left out)", file=sys.stderr)
        text = self.answer([prompt])[0]
        if self.template:
            self.history += [("user", prompt), ("assistant", text)]

    def answer(self, prompts: list[str]) -> list[str]:
        """Samples from each prompt, printed and returned; a single sample streams to a terminal.

        Raises:
            UserError: a prompt is not UTF-8, or does not fit the context.
        """
        options, encoded = self.options, self.encode(prompts)
        rows = [(i, sample) for i in range(len(prompts)) for sample in range(options.num_samples)]
        shown = [""] * len(prompts) if self.template else prompts  # a completion continues them
        show, texts, many = None, [], len(rows) > 1
        if not many and not options.json and sys.stdout.isatty():
            show = partial(print, end="", flush=True)
            show(shown[0])
        for start in range(0, len(rows), options.batch_size):
            batch = rows[start : start + options.batch_size]
            ids, numbers = [encoded[i] for i, _ in batch], [sample for _, sample in batch]
            completions = self.complete(ids, numbers, show)
            texts += [completion.text for completion in completions]
            for (i, sample), completion in zip(batch, completions, strict=True):
                if options.json:
                    print(json.dumps(self.row(prompts[i], sample, completion)))
                elif show:
                    print()
                else:
                    heading = f"--- prompt {i + 1}, sample {sample + 1} ---\n" if many else ""
                    print(heading + shown[i] + completion.text)
        return texts

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Prompts as ids; UserError where --max-tokens more, or one, don't fit the context."""
        new, limit = self.options.max_tokens or 1, self.model.config.max_seq_len
        encoded = [self.ids_of(prompt, number) for number, prompt in enumerate(prompts, 1)]
        for number, ids in enumerate(encoded, 1):
            if len(ids) + new > limit:
                raise UserError(
                    f"prompt {number}: {len(ids)} tokens and {new} to come are above"
                    f" model.max_seq_len ({limit}); shorten the prompt or lower --max-tokens"
                )
        return encoded

    def ids_of(self, prompt: str, number: int = 1) -> list[int]:
        """A prompt's ids after BOS; in a chat, those of the conversation up to its answer."""
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError(f"prompt {number}: not UTF-8")
        if self.template:
            return self.template.prompt([*self.history, ("user", prompt)])
        return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()]

    def complete(
        self, prompts: list[list[int]], samples: list[int], show: Callable[[str], Any] | None
    ) -> list[Completion]:
        """The completions of a batch; `show` gets the first one's text as it becomes certain."""
        completions = [Completion(self.tokenizer, p, self.stops, self.stop_ids) for p in prompts]
        options = {"allowed": self.allowed, "stop_ids": self.stop_ids, "samples": samples}
        for step in generate(self.model, prompts, self.settings, **options):
            if self.options.logprobs is not None:
                self.note_logprobs(completions, step.ids, step.logits)
            texts = [c.add(token) for c, token in zip(completions, step.ids, strict=True)]
            if show:
                show(texts[0])
            if all(completion.end for completion in completions):
                break
        texts = [completion.add(None) for completion in completions]
        if show:
            show(texts[0])
        return completions

    def note_logprobs(
        self, completions: list[Completion], ids: list[int | None], logits: Tensor
    ) -> None:
        """Adds a step's ids to the log-probabilities of completions that go on."""
        logs = logits.double().log_softmax(-1)
        best = logs.topk(min(self.options.logprobs, logs.shape[-1]))
        for i, (completion, token) in enumerate(zip(completions, ids, strict=True)):
            if token is not None and not completion.end:
                pairs = zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)
                own = self.describe(token, logs[i, token].item())
                own["likeliest"] = [self.describe(*pair) for pair in pairs]
                completion.logprobs.append(own)

    def describe(self, token: int, logprob: float) -> dict[str, Any]:
        """A token for JSON; the piece of a spare row is null."""
        has_piece = token < self.tokenizer.vocab_size
        piece = self.tokenizer.processor.id_to_piece(token) if has_piece else None
        return {"id": token, "piece": piece, "logprob": logprob}

    def row(self, prompt: str, sample: int, completion: Completion) -> dict[str, Any]:
        """A sample for JSON, and what it came from."""
        row = {"prompt": prompt, "sample": sample, "completion": completion.text}
        row |= {"tokens": completion.tokens, "end": completion.end}
        row |= {"logprobs": completion.logprobs} if self.options.logprobs is not None else {}
        return row | {
            "settings": asdict(self.settings),
            "model": str(self.source.path),
            "step": self.source.step,
            "tokenizer_sha256": self.tokenizer.sha256,
            "dtype": str(self.model.lm_head.weight.dtype).removeprefix("torch."),
        }


class Completion:
    """The text of one sample while its tokens arrive.

    Attributes:
        text: the certain part of the completion, without a stop string and what follows it, and
            without a character that the limit cut, unless there is nothing else.
        tokens: number of ids taken.
        end: None while it goes on; then eos, stop (a stop string) or length.
        logprobs: the log-probability of each id, for JSON, if --logprobs asks for it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stops: list[str], stop_ids: Sequence[int]
    ):
        self.tokenizer, self.stops, self.stop_ids = tokenizer, stops, stop_ids
        self.text, self.tokens, self.end = "", 0, None
        self.ids, self.logprobs = list(prompt), []
        self.context, self.decoded = 0, len(prompt)  # ids before `decoded` are in the text
        self.shown = 0

    def add(self, token: int | None) -> str:
        """Takes the next id, or None at the end; returns the text that can be shown now.

        Characters whose last bytes may follow are held back, and what may become a stop string.
        """
        if self.end:
            return ""
        start = len(self.text)
        if token is None or token in self.stop_ids:
            self.end = "length" if token is None else "eos"
            if token is not None or not self.text:  # a character that the limit cut is left out
                self._take(len(self.ids))
        else:
            self.ids.append(token)
            self._take(len(self.ids) - self._begun_bytes())
        self.tokens += token is not None
        for stop in self.stops:
            at = self.text.find(stop, max(0, start - len(stop) + 1))
            if at >= 0:
                self.text, self.end = self.text[:at], "stop"
        certain = len(self.text) if self.end else len(self.text) - self._possible_stop()
        shown, self.shown = self.shown, max(self.shown, certain)
        return self.text[shown:certain]

    def _take(self, stop: int) -> None:
        """Adds the text of the ids before `stop`, decoded behind earlier ones, on which a leading
        space depends. Bytes that are no character become U+FFFD."""
        if stop > self.decoded:
            before, now = (
                self.tokenizer.decode(self.ids[self.context : end]) for end in (self.decoded, stop)
            )
            self.text += now[len(before) :]
            self.context, self.decoded = self.decoded, stop

    def _begun_bytes(self) -> int:
        """Number of ids at the end that are the first bytes of a character not yet complete."""
        processor = self.tokenizer.processor
        for count in range(min(3, len(self.ids) - self.decoded), 0, -1):
            ids = self.ids[-count:]
            if all(map(processor.is_byte, ids)):
                begun = bytes(int(piece[1:-1], 16) for piece in processor.id_to_piece(ids))
                with contextlib.suppress(UnicodeDecodeError):
                    if codecs.utf_8_decode(begun, "strict", False)[1] == 0:
                        return count
        return 0

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        begun = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        return max((len(part) for part in begun if self.text.endswith(part)), default=0)


def read_prompts(options: argparse.Namespace) -> list[str] | None:
    """The prompts of the command line or its file; None to ask for them at a terminal."""
    if options.prompt is not None:
        return [options.prompt]
    if options.prompt_file is None:
        if sys.stdin.isatty():
            return None
        raise UserError("give --prompt or --prompt-file (a terminal would be asked for prompts)")
    path = existing_path(options.prompt_file)
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path}: holds no prompt")
    return [json_prompt(path, *row) if path.suffix == ".jsonl" else row[1] for row in rows]


def json_prompt(path: Path, row: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'{path}, row {row}: write {{"prompt": "text"}}')
    return prompt
