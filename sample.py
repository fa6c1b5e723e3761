"""Continues prompts with a trained model, or measures it on text.

    python sample.py out/tiny --prompt="def main("
    python sample.py out/tiny --prompt-file=prompts.txt --num-samples=3 --temperature=0.7
    python sample.py out/tiny                                  (asks for prompts at a terminal)
    python sample.py out/openorca --chat                       (a conversation, with its history)
    python sample.py out/tiny --evaluate=val                   (a split of its dataset)
    python sample.py out/tiny --evaluate=book.txt              (a text file)
    python sample.py out/tiny --choices=questions.jsonl        (multiple choice)

It reads a run directory, a checkpoint of one, or a Hugging Face directory of a Llama (which needs
the package safetensors). A sample depends on its prompt, the settings, the seed and its number,
never on its neighbours. Log-probabilities are the model's own, in nats: before temperature, penalty
and filters.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

from config import Parser, UserError, errors_in_one_line, existing_path, run_program

MAX_TOKENS = 256  # without --max-tokens, or what the model's context leaves


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; UserError where it is wrong."""
    parser = Parser(prog="python sample.py", description=__doc__)
    add, room = parser.add_argument, f"{MAX_TOKENS}, or what is left of model.max_seq_len"
    add("run", help="run directory, such as out/tiny, or Hugging Face directory")
    add("--prompt", help="text to continue")
    add("--prompt-file", help='a prompt a line, or JSON lines with "prompt" if it ends in .jsonl')
    add("--checkpoint", default="best", help="best, last or a checkpoint's path (best)")
    add("--num-samples", type=number(int, 1), default=1, help="samples per prompt (1)")
    add("--max-tokens", type=number(int, 1), help=f"longest completion ({room})")
    likeliest = "0, and what is below 0.001: the likeliest token (0.8)"
    add("--temperature", type=number(float, 0, 100), default=0.8, help=likeliest)
    add("--top-k", type=number(int, 0), default=0, help="draw from the k likeliest; 0: all (0)")
    add("--top-p", type=number(float, 0, 1), default=0.95, help="and from those that hold p (0.95)")
    add("--repetition-penalty", type=number(float, 0.01), default=1.0, help="1: none (1)")
    add("--chat", action="store_true", help="prompts are a user's messages; the model answers")
    add("--system", help="system message of a chat")
    add("--stop", action="append", default=[], help="text that ends a sample; may be repeated")
    add("--seed", type=number(int, 0), default=0, help="seed of the drawing (0)")
    add("--batch-size", type=number(int, 1), default=32, help="samples at a time (32)")
    add("--compile", action="store_true", help="start seconds later, for faster tokens")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--json", action="store_true", help="a JSON object per sample, or of the evaluation")
    logprobs = "with --json: each token's log-probability, and the N likeliest at its place"
    add("--logprobs", type=number(int, 0), metavar="N", help=logprobs)
    add("--evaluate", metavar="TEXT", help="loss on a split (train, val, test) or a text file")
    add("--choices", metavar="FILE", help='JSON lines: {"prompt", "choices": […], "answer": 0}')
    options = parser.parse_args(arguments)
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """UserError for options that contradict each other."""
    modes = ("evaluate", "choices", "chat", "prompt", "prompt_file")
    given = [name for name in modes if getattr(options, name) not in (None, False)]
    given = [f"--{name.replace('_', '-')}" for name in given]
    measures = not {"--evaluate", "--choices"}.isdisjoint(given)
    valueless = "" in (options.evaluate, options.choices)
    for wrong, message in (
        ("" in options.stop, "--stop is empty: it would stop at once"),
        (options.system is not None and not options.chat, "--system is for --chat"),
        ({"--prompt", "--prompt-file"} <= {*given}, "--prompt and --prompt-file: give one"),
        (valueless, "--evaluate and --choices take a value: --evaluate=val"),
        (options.logprobs is not None and not options.json, "--logprobs is for --json"),
        (measures and len(given) > 1, f"{' and '.join(given)}: give one"),
        (measures and options.compile, "--compile is for samples"),
    ):
        if wrong:
            raise UserError(message)


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
    with errors_in_one_line():
        parse(sys.argv[1:])

from inference.evaluation import measure
from inference.generation import Settings, open_source
from inference.sampler import Sampler, read_prompts


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    measuring = options.evaluate or options.choices
    prompts = None if measuring else read_prompts(options)
    if options.checkpoint in ("best", "last"):
        source = open_source(existing_path(options.run), options.checkpoint)
    else:
        source = open_source(existing_path(options.checkpoint))
    print(source, file=sys.stderr)
    if measuring:
        measure(source, options)
        return
    drawing = options.temperature, options.top_k, options.top_p, options.repetition_penalty
    settings = Settings(options.max_tokens or MAX_TOKENS, *drawing, options.seed)
    rows = min(options.batch_size, len(prompts or [""]) * options.num_samples)
    sampler = Sampler(source, options, settings, rows)
    if prompts is None:
        sampler.ask()
    else:
        sampler.answer(prompts)


if __name__ == "__main__":
    run_program(main)
