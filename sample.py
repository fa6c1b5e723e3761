"""Continues prompts with a trained model; reads a run directory alone.

    python sample.py out/tiny --prompt="def main("
    python sample.py out/tiny --prompt-file=prompts.txt --num-samples=3 --temperature=0.7
    python sample.py out/tiny                                  (asks for prompts at a terminal)
    python sample.py out/openorca --chat                       (a conversation, with its history)

A sample depends on its prompt, the settings, the seed and its number, never on its neighbours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from chat import Template
from checkpoint import Checkpoint, find_checkpoint
from config import UserError, resolve_path, run_program
from distributed import compute_dtype
from model import KVCache, Llama
from tokenizer import Tokenizer

Messages = list[tuple[str, str]]  # roles and contents
MAX_TOKENS = 256  # where --max-tokens is not given, or what the model's context leaves


@dataclass(frozen=True)
class Settings:
    """How the next token is drawn; the defaults draw from the model's own distribution."""

    max_tokens: int = MAX_TOKENS
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: list[list[int]],
    settings: Settings,
    *,
    allowed: Tensor | None = None,
    stop_ids: Sequence[int] = (),
    samples: list[int] | None = None,
) -> Iterator[list[int | None]]:
    """Continues a batch of prompts of any lengths, a token each a step.

    Args:
        prompts: ids, BOS included; each shorter than model.max_seq_len.
        allowed: which ids may be drawn (V,); None: all.
        stop_ids: ids that end a row.
        samples: the number of each row's sample, its own source of randomness; None: 0, 1, …

    Yields:
        The next id of each row; None where the row has ended: a stop id was its last, or it has
        settings.max_tokens, or prompt and completion fill model.max_seq_len.
    """
    rows, device, limit = len(prompts), model.lm_head.weight.device, model.config.max_seq_len
    longest = max(map(len, prompts))
    assert longest < limit, "a prompt leaves no room"
    length = min(longest + settings.max_tokens, limit)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    randoms = uniform_numbers(settings, samples or list(range(rows))).to(device)
    seen = None
    if settings.repetition_penalty != 1:
        seen = torch.zeros(rows, model.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
    ended = [False] * rows

    # What shorter prompts are filled up with is written over before anything attends to it.
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
    positions = torch.arange(longest, device=device).expand(rows, -1)
    cache = KVCache(model.config, rows, length, device, model.lm_head.weight.dtype)
    next_logits = None
    logits = model(tokens, cache=cache, positions=positions, length=longest, only=lengths - 1)
    for step in range(settings.max_tokens):
        logits = logits[:, 0].float()
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        chosen = choose(logits, seen, settings, randoms[:, step])
        ids = chosen.tolist()
        yield [None if end else token for token, end in zip(ids, ended, strict=True)]
        for row, token in enumerate(ids):
            full = len(prompts[row]) + step + 1 >= limit
            ended[row] = ended[row] or full or token in stop_ids
        if all(ended) or step + 1 == settings.max_tokens:
            return
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        positions = (lengths + step).clamp(max=length - 1)[:, None]  # full rows go on in place
        now = min(longest + step + 1, length)
        if not next_logits:
            on_gpu = device.type == "cuda"
            next_logits = captured(model, cache, chosen, positions) if on_gpu else model
        logits = next_logits(chosen[:, None], cache=cache, positions=positions, length=now)


def captured(
    model: Llama, cache: KVCache, chosen: Tensor, positions: Tensor
) -> Callable[..., Tensor]:
    """The model's step by one token a row as a CUDA graph: one launch, not one for each kernel.

    It attends over the whole cache, masked, whatever `length` is: a graph's shapes are fixed.

    Args:
        chosen, positions: of the step to come, which is made on the way.
    """
    tokens, places = chosen[:, None].clone(), positions.clone()

    def step() -> Tensor:
        return model(tokens, cache=cache, positions=places, length=cache.length)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # libraries allocate what they need, which a capture can't
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay(chosen: Tensor, *, positions: Tensor, **_: object) -> Tensor:
        tokens.copy_(chosen)
        places.copy_(positions)
        graph.replay()
        return logits

    return replay


def choose(logits: Tensor, seen: Tensor | None, settings: Settings, randoms: Tensor) -> Tensor:
    """The next id of each row (B,) from logits (B, V), ids seen (B, V) and randoms in [0, 1) (B,).

    The order is that of transformers: penalty, temperature, top-k, top-p. The penalty alone needs
    `seen`.
    """
    if seen is not None:
        logits = penalise_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature < 0.001:  # where the division would overflow
        return logits.argmax(-1)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = keep_top_p(logits, settings.top_p)
    # Inverse of the distribution function: one random number a token, whatever the vocabulary.
    total = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(total, (randoms * total[:, -1])[:, None], right=True)[:, 0]


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes ids seen before less likely (CTRL, Keskar et al., arXiv 1909.05858)."""
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalised, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leaves the k likeliest ids (and what ties with the last of them)."""
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)


def keep_top_p(logits: Tensor, p: float, among: int = 1024) -> Tensor:
    """Leaves the fewest ids that hold the share p (nucleus, Holtzman et al., arXiv 1904.09751).

    Only rows that don't find them `among` the likeliest are sorted, each row for itself: it takes
    several times as long.
    """
    if among >= logits.shape[-1]:
        ordered, ids = logits.sort()  # the likeliest last: it always stays
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - p
        dropped[:, -1] = False
        return logits.masked_fill(dropped.scatter(1, ids, dropped), -math.inf)
    ordered, ids = logits.topk(among)
    shares = (ordered.double() - logits.double().logsumexp(-1, keepdim=True)).exp()
    dropped = shares.cumsum(-1) - shares >= p
    flat = ~dropped[:, -1]
    dropped[:, 0] = False
    others = torch.ones_like(logits, dtype=torch.bool)
    kept = logits.masked_fill(others.scatter_(1, ids, dropped), -math.inf)
    if flat.any():
        kept[flat] = keep_top_p(logits[flat], p, logits.shape[-1])
    return kept


def uniform_numbers(settings: Settings, samples: list[int]) -> Tensor:
    """Numbers in [0, 1), a row a sample and one for each token (B, max_tokens), float64."""
    rows = []
    for sample in samples:
        digest = hashlib.sha256(f"{settings.seed} {sample}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        rows.append(torch.rand(settings.max_tokens, generator=generator))
    return torch.stack(rows).double()


class Completion:
    """The text of one sample while its tokens arrive.

    Attributes:
        text: what is certain of the completion; a stop string and what follows is left out.
        tokens: number of ids taken.
        end: None while it goes on; then eos, stop (a stop string) or length.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stops: list[str], stop_ids: Sequence[int]
    ):
        self.tokenizer, self.stops, self.stop_ids = tokenizer, stops, stop_ids
        self.text, self.tokens, self.end = "", 0, None
        self.ids = list(prompt)
        self.context, self.decoded = 0, len(prompt)  # ids before `decoded` are in the text
        self.shown = 0

    def add(self, token: int | None) -> str:
        """Takes the next id, or None at the end; returns the text that can be shown now.

        Held back are characters of which bytes are missing, and what may become a stop string.
        """
        if self.end:
            return ""
        start = len(self.text)
        if token is None or token in self.stop_ids:
            self.end = "length" if token is None else "eos"
            self.text += self._new_text().rstrip("\ufffd")  # half a character is none
        else:
            self.ids.append(token)
            new = self._new_text()
            if not new.endswith("\ufffd"):
                self.text += new
                self.context, self.decoded = self.decoded, len(self.ids)
        self.tokens += token is not None
        for stop in self.stops:
            at = self.text.find(stop, max(0, start - len(stop) + 1))
            if at >= 0:
                self.text, self.end = self.text[:at], "stop"
        certain = len(self.text) if self.end else len(self.text) - self._possible_stop()
        shown, self.shown = self.shown, max(self.shown, certain)
        return self.text[shown:certain]

    def _new_text(self) -> str:
        """Text of the ids not yet decoded; those before them tell whether a space leads it."""
        decode, ids = self.tokenizer.decode, self.ids[self.context :]
        return decode(ids)[len(decode(ids[: self.decoded - self.context])) :]

    def _possible_stop(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        begun = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        return max((len(part) for part in begun if self.text.endswith(part)), default=0)


class Sampler:
    """A checkpoint's model and its run's tokenizer.

    Raises:
        UserError: the tokenizer is not the one that the weights were trained with; a chat with
            weights that saw no conversation.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        stops: list[str],
        chat: bool = False,
    ):
        self.stops = list(stops)
        self.tokenizer = Tokenizer(checkpoint.path.parent.parent / "tokenizer.model")
        if self.tokenizer.sha256 != checkpoint.manifest["tokenizer_sha256"]:
            raise UserError(
                f"{self.tokenizer.path} is not the tokenizer that {checkpoint.path} was trained"
                " with; put the original back"
            )
        self.model = prepare(load_model(checkpoint), device, dtype)
        self.template: Template | None = None
        self.stop_ids = [self.tokenizer.eos_id]
        if chat:
            if not (template := checkpoint.manifest.get("template")):
                raise UserError(f"{checkpoint.path} was trained on plain text; leave out --chat")
            self.template = Template(template, self.tokenizer)
            self.stop_ids, stops = self.template.stops()
            self.stops += stops
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

    def complete(
        self,
        prompts: list[list[int]],
        samples: list[int],
        settings: Settings,
        show: Callable[[str], Any] | None = None,
    ) -> list[Completion]:
        """The completions of a batch; `show` gets the first one's text as it becomes certain."""
        completions = [Completion(self.tokenizer, p, self.stops, self.stop_ids) for p in prompts]
        steps = generate(
            self.model,
            prompts,
            settings,
            allowed=self.allowed,
            stop_ids=self.stop_ids,
            samples=samples,
        )
        for ids in chain(steps, [[None] * len(prompts)]):
            texts = [c.add(token) for c, token in zip(completions, ids, strict=True)]
            if show:
                show(texts[0])
            if all(completion.end for completion in completions):
                break
        return completions


def drawable(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Which of a model's ids are drawn (V,): EOS, but no other control piece and no spare row."""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.byte_lengths() > 0)
    allowed[tokenizer.eos_id] = True
    return allowed


def load_model(checkpoint: Checkpoint) -> Llama:
    """The model with a checkpoint's weights, mapped from its files."""
    weights = {name: checkpoint.tensor("model", name) for name in checkpoint.shapes("model")}
    embedding = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Llama(checkpoint.config.model, len(embedding))
    if model.config.tie_embeddings:
        weights["lm_head.weight"] = embedding  # stored once
    model.load_state_dict(weights, assign=True)
    model.tie()
    return model.requires_grad_(False)


def prepare(model: Llama, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model where and how it generates, changed in place.

    Float32 matrices on a CPU are stored by columns, which products with few rows read faster (1.3
    times and more where measured).
    """
    model.to(device=device, dtype=dtype)
    if device.type == "cpu" and dtype == torch.float32:
        for linear in model.modules():
            if isinstance(linear, torch.nn.Linear):
                by_columns = linear.weight.t().contiguous().t()  # untied, where it was tied
                linear.weight = torch.nn.Parameter(by_columns, requires_grad=False)
    return model


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    prompts = read_prompts(options)
    if options.checkpoint in ("best", "last"):
        checkpoint = find_checkpoint(existing(options.run), options.checkpoint)
    else:
        checkpoint = find_checkpoint(existing(options.checkpoint))
    loss = checkpoint.val_loss
    evaluated = f"validation loss {loss:.4f}" if loss < math.inf else "not evaluated"
    print(f"{checkpoint.path}: step {checkpoint.step}, {evaluated}", file=sys.stderr)
    device, dtype = device_and_dtype(options)
    sampler = Sampler(checkpoint, device, dtype, options.stop, options.chat)
    history = [("system", options.system)] if options.system else []
    for role in ("user", *(role for role, _ in history)):
        if sampler.template and role not in sampler.template.before:
            raise UserError(f"the template of {checkpoint.path} has no role {role!r}")
    if prompts is not None:
        answer(sampler, prompts, options, history)
        return
    while True:
        try:
            prompt = input("> ")
            texts = answer(sampler, [prompt], options, history)
        except UserError as error:
            print(error, file=sys.stderr)
        except EOFError:
            return
        else:
            history += [("user", prompt), ("assistant", texts[0])] if options.chat else []


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
        completions = sampler.complete(encoded, [0], settings, show)
        print()
        return [completions[0].text]
    texts = []
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        ids, numbers = [encoded[i] for i, _ in batch], [sample for _, sample in batch]
        completions = sampler.complete(ids, numbers, settings)
        texts += [completion.text for completion in completions]
        for (i, sample), completion in zip(batch, completions, strict=True):
            if options.json:
                row = {"prompt": prompts[i], "sample": sample, "completion": completion.text}
                print(json.dumps({**row, "tokens": completion.tokens, "end": completion.end}))
            else:
                heading = f"--- prompt {i + 1}, sample {sample + 1} ---\n" if len(rows) > 1 else ""
                print(heading + shown[i] + completion.text)
    return texts


def existing(name: str) -> Path:
    """A path on the command line: from the current directory, else from the repository."""
    here = Path(name).expanduser()
    return here if here.exists() else resolve_path(name)


def read_prompts(options: argparse.Namespace) -> list[str] | None:
    """The prompts of the command line or its file; None where a terminal is to be asked."""
    if options.prompt is not None:
        return [options.prompt]
    if options.prompt_file is None:
        if sys.stdin.isatty():
            return None
        raise UserError("give --prompt or --prompt-file (a terminal would be asked for prompts)")
    path = Path(options.prompt_file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    rows = [(row, line.removesuffix("\r")) for row, line in enumerate(lines, 1) if line.strip()]
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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; UserError where it is wrong."""
    parser = Parser(
        prog="python sample.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", help="run directory, such as out/tiny")
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
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--json", action="store_true", help="a JSON object a sample")
    options = parser.parse_args(arguments)
    if "" in options.stop:
        raise UserError("--stop is empty: it would stop at once")
    if options.system is not None and not options.chat:
        raise UserError("--system is for --chat")
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt-file: give one")
    return options


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite number within bounds."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}: a number, {limit}")
        return value

    return read


if __name__ == "__main__":
    run_program(main)
