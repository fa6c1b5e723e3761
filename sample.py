"""Continues prompts with a trained model, or measures it on text.

    python sample.py out/tiny --prompt="def main("
    python sample.py out/tiny --prompt-file=prompts.txt --num-samples=3 --temperature=0.7
    python sample.py out/tiny                                  (asks for prompts at a terminal)
    python sample.py out/openorca --chat                       (a conversation, with its history)
    python sample.py out/tiny --evaluate=val                   (a split of its dataset)
    python sample.py out/tiny --evaluate=book.txt              (a text file)
    python sample.py out/tiny --choices=questions.jsonl        (multiple choice)

It reads a run directory, a checkpoint of one, or a Hugging Face directory of a Llama (the optional
package safetensors). A sample depends on its prompt, the settings, the seed and its number, never
on its neighbours. Log-probabilities are the model's own, in nats: before temperature, penalty and
filters.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

from config import Parser, UserError, existing_path, read_rows, run_program, told_in_one_line

MAX_TOKENS = 256  # where --max-tokens is not given, or what the model's context leaves


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; UserError where it is wrong."""
    parser = Parser(
        prog="python sample.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", help="run directory, such as out/tiny, or Hugging Face directory")
    add("--prompt", help="text to continue")
    add("--prompt-file", help='a prompt a line, or JSON lines with "prompt" if it ends in .jsonl')
    add("--checkpoint", default="best", help="best, last or a checkpoint's path (best)")
    add("--num-samples", type=number(int, 1), default=1, help="samples a prompt (1)")
    add(
        "--max-tokens",
        type=number(int, 1),
        help=f"longest completion ({MAX_TOKENS}, or what is left of model.max_seq_len)",
    )
    add(
        "--temperature",
        type=number(float, 0, 100),
        default=0.8,
        help="0, and what is below 0.001: the likeliest token (0.8)",
    )
    add("--top-k", type=number(int, 0), default=0, help="draw from the k likeliest; 0: all (0)")
    add("--top-p", type=number(float, 0, 1), default=0.95, help="and from the share p (0.95)")
    add("--repetition-penalty", type=number(float, 0.01), default=1.0, help="1: none (1)")
    add("--chat", action="store_true", help="prompts are a user's messages; the model answers")
    add("--system", help="system message of a chat")
    add("--stop", action="append", default=[], help="text that ends a sample; may be repeated")
    add("--seed", type=number(int, 0), default=0, help="of the drawing (0)")
    add("--batch-size", type=number(int, 1), default=32, help="samples at a time (32)")
    add("--compile", action="store_true", help="seconds at the start for faster tokens")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--json", action="store_true", help="a JSON object a sample, or of the evaluation")
    add(
        "--logprobs",
        type=number(int, 0),
        metavar="N",
        help="with --json: each token's log-probability, and the N likeliest at its place",
    )
    add("--evaluate", metavar="TEXT", help="loss on a split (train, val, test) or a text file")
    add("--choices", metavar="FILE", help='JSON lines: {"prompt", "choices": […], "answer": 0}')
    options = parser.parse_args(arguments)
    if "" in options.stop:
        raise UserError("--stop is empty: it would stop at once")
    if options.system is not None and not options.chat:
        raise UserError("--system is for --chat")
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt-file: give one")
    if "" in (options.evaluate, options.choices):
        raise UserError("--evaluate and --choices take a value: --evaluate=val")
    if options.logprobs is not None and not options.json:
        raise UserError("--logprobs is for --json")
    modes = ("evaluate", "choices", "chat", "prompt", "prompt_file")
    given = [name for name in modes if getattr(options, name) not in (None, False)]
    given = [f"--{name.replace('_', '-')}" for name in given]
    if len(given) > 1 and {"--evaluate", "--choices"} & {*given}:
        raise UserError(f"{' and '.join(given)}: give one")
    if options.compile and {"--evaluate", "--choices"} & {*given}:
        raise UserError("--compile is for samples")
    return options


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite number within bounds."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not (low <= value <= min(high, 2**62)):  # nan is not
            limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}: a number, {limit}")
        return value

    return read


if __name__ == "__main__":  # before torch, which takes seconds to import
    with told_in_one_line():
        parse(sys.argv[1:])

import json
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from chat import Template
from distributed import compute_dtype
from inference.evaluation import Scores, evaluate_choices, evaluate_split, evaluate_text
from inference.generation import (
    Completion,
    Settings,
    Source,
    drawable,
    fit_to_device,
    generate,
    load_model,
    open_source,
    take_any_shape,
)

Messages = list[tuple[str, str]]  # roles and contents


class Sampler:
    """A source's model and tokenizer, ready to complete so many prompts at a time.

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
                encoded.append(self.template.prompt([*history, ("user", prompt)]))
            else:
                encoded.append([self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()])
            if len(encoded[-1]) + max_tokens > limit:
                raise UserError(
                    f"prompt {number}: {len(encoded[-1])} tokens and {max_tokens} to come are above"
                    f" model.max_seq_len ({limit}); shorten the prompt or lower --max-tokens"
                )
        return encoded

    def remembered(self, history: Messages, prompt: str, room: int) -> Messages:
        """What of a chat's messages fits the context beside the prompt and room for the answer:
        its oldest exchanges are left out, aloud."""
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

        With `likeliest`, also what is known of each row's tokens: their ids, pieces and
        log-probabilities, and so many of the likeliest ids' at each.
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
        source = self.source
        found = {"model": str(source.path), "step": source.step}
        dtype = str(self.model.lm_head.weight.dtype).removeprefix("torch.")
        return found | {"tokenizer_sha256": source.tokenizer.sha256, "dtype": dtype}

    def describe(self, token: int, logprob: float) -> dict[str, Any]:
        """A token for JSON; a row that has no piece is told as null."""
        has_piece = token < self.tokenizer.vocab_size
        piece = self.tokenizer.processor.id_to_piece(token) if has_piece else None
        return {"id": token, "piece": piece, "logprob": logprob}


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    measuring = options.evaluate or options.choices
    prompts = None if measuring else read_prompts(options)
    if options.checkpoint in ("best", "last"):
        source = open_source(existing_path(options.run), options.checkpoint)
    else:
        source = open_source(existing_path(options.checkpoint))
    described = f"{source.path}"
    if source.step is not None:
        evaluated = f"validation loss {source.val_loss:.4f}" if source.val_loss < math.inf else ""
        described += f": step {source.step}, {evaluated or 'not evaluated'}"
    print(described, file=sys.stderr)
    if measuring:
        measure(source, options)
        return
    rows = min(options.batch_size, len(prompts or [""]) * options.num_samples)
    sampler = Sampler(source, options, rows)
    history = [("system", options.system)] if options.system else []
    for role in ("user", *(role for role, _ in history)):
        if sampler.template and role not in sampler.template.before:
            raise UserError(f"the template of {source.path} has no role {role!r}")
    if prompts is not None:
        answer(sampler, prompts, options, history)
        return
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)  # standard output is for samples
            prompt = input()
            history = sampler.remembered(history, prompt, options.max_tokens or MAX_TOKENS // 4)
            texts = answer(sampler, [prompt], options, history)
        except UserError as error:
            print(error, file=sys.stderr)
        except EOFError:
            return
        else:
            history += [("user", prompt), ("assistant", texts[0])] if options.chat else []


def measure(source: Source, options: argparse.Namespace) -> None:
    """Evaluates the model on a split, a text file or a file of choices, and prints the figures.

    As training does: weights in float32, products in what the device does well.
    """
    device, dtype = device_and_dtype(options)
    take_any_shape()
    model = load_model(source, device, torch.float32)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if options.choices:
            found = evaluate_choices(model, source.tokenizer, existing_path(options.choices))
        elif options.evaluate in ("train", "val", "test"):
            found = evaluate_split(model, source, options.evaluate, options.batch_size)
        else:
            path = existing_path(options.evaluate)
            found = evaluate_text(model, source.tokenizer, path, options.batch_size)
    if options.json:
        print(json.dumps({"model": str(source.path), "step": source.step, **found._asdict()}))
    elif isinstance(found, Scores):
        print(
            f"loss {found.loss:.4f} nats/token | perplexity {found.perplexity:.2f}"
            f" | {found.bits_per_byte:.4f} bits/byte"
            f" | {found.tokens:,} tokens, {found.bytes:,} bytes"
        )
    else:
        print(
            f"accuracy {100 * found.accuracy:.1f}% ± {100 * found.accuracy_error:.1f}"
            f" | by bytes {100 * found.accuracy_by_bytes:.1f}% ±"
            f" {100 * found.accuracy_by_bytes_error:.1f} | {found.questions} questions"
        )


def answer(
    sampler: Sampler, prompts: list[str], options: argparse.Namespace, history: Messages
) -> list[str]:
    """Samples from each prompt, prints and returns; a single sample streams to a terminal."""
    encoded = sampler.encode(prompts, options.max_tokens or 1, history)
    settings = Settings(
        options.max_tokens or MAX_TOKENS,
        options.temperature,
        options.top_k,
        options.top_p,
        options.repetition_penalty,
        options.seed,
    )
    rows = [(i, sample) for i in range(len(prompts)) for sample in range(options.num_samples)]
    shown = [""] * len(prompts) if options.chat else prompts  # a completion continues its prompt
    if len(rows) == 1 and not options.json and sys.stdout.isatty():
        show = partial(print, end="", flush=True)
        show(shown[0])
        completions, _ = sampler.complete(encoded, [0], settings, show)
        print()
        return [completions[0].text]
    origin = {"settings": asdict(settings), **sampler.origin()}
    texts = []
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        ids, numbers = [encoded[i] for i, _ in batch], [sample for _, sample in batch]
        completions, known = sampler.complete(ids, numbers, settings, likeliest=options.logprobs)
        texts += [completion.text for completion in completions]
        for (i, sample), completion, tokens in zip(batch, completions, known, strict=True):
            if options.json:
                row = {"prompt": prompts[i], "sample": sample, "completion": completion.text}
                row |= {"tokens": completion.tokens, "end": completion.end}
                row |= {"logprobs": tokens} if options.logprobs is not None else {}
                print(json.dumps(row | origin))
            else:
                heading = f"--- prompt {i + 1}, sample {sample + 1} ---\n" if len(rows) > 1 else ""
                print(heading + shown[i] + completion.text)
    return texts


def read_prompts(options: argparse.Namespace) -> list[str] | None:
    """The prompts of the command line or its file; None where a terminal is to be asked."""
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


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the type of weights; auto as in training."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise UserError("--device=cuda: this machine has no GPU that torch can use")
    name = options.device if options.device != "auto" else "cuda" if has_cuda else "cpu"
    return torch.device(name), compute_dtype(options.dtype, torch.device(name))


if __name__ == "__main__":
    run_program(main)
