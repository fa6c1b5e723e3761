"""Reads a trained model, fits it to the device and continues a batch of prompts token by token.

A sample depends on its prompt, the settings, the seed and its number, never on its neighbours.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoint import Checkpoint, find_checkpoint
from config import Config, ModelConfig, UserError
from distributed import check_compiler, compute_dtype
from fast import KVCache
from inference.linear import RowLinear, can_pack, linears, pack
from inference.pretrained import EMBEDDING, HEAD, Pretrained
from model import Llama
from tokenizer import Tokenizer


class Source(NamedTuple):
    """Where a model is read from: weights by name, mapped from their files, and their tokenizer.

    Attributes:
        weights: names of the parameters, tied ones once.
        template: how the conversations that it was trained on were written, if it was.
        run_config: None for a model from elsewhere, which has no dataset.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    weights: list[str]
    tensor: Callable[[str], Tensor]
    template: dict[str, str] | None
    step: int | None = None
    val_loss: float = math.inf
    run_config: Config | None = None

    def __str__(self) -> str:
        if self.step is None:
            return str(self.path)
        known = self.val_loss < math.inf
        loss = f"validation loss {self.val_loss:.4f}" if known else "not evaluated"
        return f"{self.path}: step {self.step}, {loss}"


def open_source(path: Path, which: str = "best") -> Source:
    """A run directory's checkpoint, "best" or "last", one checkpoint, or a Hugging Face directory.

    Raises:
        UserError: it is none of them, is damaged, or its tokenizer is not its own.
    """
    if (path / "config.json").is_file():
        found = Pretrained(path)
        tokenizer, weights = Tokenizer(found.tokenizer_path), [*found.shapes()]
        return Source(path, found.config, tokenizer, weights, found.tensor, found.template)
    found = find_checkpoint(path, which)
    return Source(
        path=found.path,
        config=found.config.model,
        tokenizer=tokenizer_of(found),
        weights=[*found.shapes("model")],
        tensor=partial(found.tensor, "model"),
        template=found.manifest.get("template"),
        step=found.step,
        val_loss=found.val_loss,
        run_config=found.config if found.manifest.get("dataset") else None,  # an import has none
    )


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer in a checkpoint's run; UserError if its weights were trained with another."""
    tokenizer = Tokenizer(checkpoint.path.parent.parent / "tokenizer.model")
    if tokenizer.sha256 != checkpoint.manifest["tokenizer_sha256"]:
        raise UserError(
            f"{tokenizer.path} is not the tokenizer that {checkpoint.path} was trained with; put"
            " the original back"
        )
    return tokenizer


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the type of weights; auto chooses as training does."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise UserError("--device=cuda: this machine has no GPU that torch can use")
    name = options.device if options.device != "auto" else "cuda" if has_cuda else "cpu"
    return torch.device(name), compute_dtype(options.dtype, torch.device(name))


def load_model(source: Source, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model with a source's weights: mapped from its files if they have that type and device,
    else converted one at a time."""
    weights = {name: source.tensor(name).to(device, dtype) for name in source.weights}
    with torch.device("meta"):
        model = Llama(source.config, len(weights[EMBEDDING]), loss_chunk=2048)
    if model.config.tie_embeddings:
        weights[HEAD] = weights[EMBEDDING]  # stored once
    model.load_state_dict(weights, assign=True)
    model.tie()
    return model.requires_grad_(False)


def fit_to_device(model: Llama, single: bool, compiled: bool) -> None:
    """Makes a model fast at continuing a single row, or several, in place.

    On a CPU a token takes as long as reading the weights. The library reads them at half of
    memory's speed or less in the order in which they are stored, so each matrix is copied into the
    library's own order. Compiling fuses the operations between a token's products into a few
    kernels. For a single row the compiler also writes the products; they read the stored weights.

    Raises:
        UserError: there is no compiler.
    """
    weight = model.lm_head.weight
    if compiled:
        check_compiler(weight.device, "leave out --compile")
    if weight.device.type == "cuda":
        take_any_shape()
    elif single and compiled:
        for module in linears(model):
            module.__class__ = RowLinear  # by its class, so that one graph serves all layers
    elif can_pack(weight.dtype):
        pack(model)
    if not compiled:
        return

    def part(plain: Callable, fast: Callable, x: Tensor, *others: Any) -> Tensor:
        return (fast if x.shape[1] == 1 else plain)(x, *others)

    for module in (*model.model.layers, model.lm_head):
        module.forward = partial(part, module.forward, torch.compile(module.forward))


def take_any_shape() -> None:
    """Keeps this process from attention kernels that a GPU must prepare for each shape: cuDNN's
    takes 55 to 400 ms for one, and each prompt has a shape of its own."""
    torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Settings:
    """How the next token is drawn; the defaults draw from the model's own distribution."""

    max_tokens: int = 256
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Step(NamedTuple):
    """The next id of each row, and the logits of the model itself (B, V) from which it was drawn,
    which hold until the next step.

    The id is None where the row has ended: a stop id was its last, or prompt and completion fill
    model.max_seq_len.
    """

    ids: list[int | None]
    logits: Tensor


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: list[list[int]],
    settings: Settings,
    *,
    allowed: Tensor | None = None,
    stop_ids: Sequence[int] = (),
    samples: list[int] | None = None,
) -> Iterator[Step]:
    """Continues a batch of prompts of any lengths, one token each per step.

    Args:
        prompts: ids, BOS included; each shorter than model.max_seq_len.
        allowed: which ids may be drawn (V,); None: all.
        stop_ids: ids that end a row.
        samples: the number of each row's sample, which seeds its randomness; None: 0, 1, …
    """
    rows, device, limit = len(prompts), model.lm_head.weight.device, model.config.max_seq_len
    lengths = torch.tensor([*map(len, prompts)], device=device)
    longest = max(map(len, prompts))
    assert longest < limit, "a prompt leaves no room"
    length = min(longest + settings.max_tokens, limit)
    randoms = uniform_numbers(settings, samples or list(range(rows))).to(device)
    # The padding of shorter prompts is overwritten before anything attends to it.
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
    positions = torch.arange(longest, device=device).expand(rows, -1)
    seen = torch.zeros(rows, model.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    cache, next_logits, ended = model.new_cache(rows, length), model, [False] * rows
    last = torch.arange(rows, device=device)[:, None], lengths[:, None] - 1
    logits = model(tokens, cache=cache, positions=positions, length=longest, logits_at=last)
    for step in range(settings.max_tokens):
        logits = raw = logits[:, 0].float()
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        chosen = choose(logits, seen, settings, randoms[:, step])
        ids = chosen.tolist()
        yield Step([None if end else i for i, end in zip(ids, ended, strict=True)], raw)
        for row, token in enumerate(ids):
            ended[row] |= token in stop_ids or len(prompts[row]) + step + 1 >= limit
        if all(ended) or step + 1 == settings.max_tokens:
            return
        seen.scatter_(1, chosen[:, None], True)
        positions = (lengths + step).clamp(max=length - 1)[:, None]  # full rows go on in place
        if step == 0 and device.type == "cuda":
            next_logits = captured(model, cache, chosen, positions)
        now = min(longest + step + 1, length)
        logits = next_logits(chosen[:, None], cache=cache, positions=positions, length=now)


def captured(
    model: Llama, cache: KVCache, chosen: Tensor, positions: Tensor
) -> Callable[..., Tensor]:
    """The model's step by one token per row as a CUDA graph: one launch, not one for each kernel.

    It attends to the whole cache, masked, because the shapes of a graph are fixed.

    Args:
        chosen, positions: of the next step, which capturing runs.
    """
    tokens, at = chosen[:, None].clone(), positions.clone()
    step = partial(model, tokens, cache=cache, positions=at, length=cache.length)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # here libraries allocate and the compiler compiles, which no capture allows
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay(chosen: Tensor, *, positions: Tensor, **_: object) -> Tensor:
        tokens.copy_(chosen)
        at.copy_(positions)
        graph.replay()
        return logits

    return replay


def choose(logits: Tensor, seen: Tensor, settings: Settings, randoms: Tensor) -> Tensor:
    """The next id of each row (B,) from logits (B, V), ids seen (B, V) and randoms in [0, 1) (B,).

    The order is that of transformers: penalty, temperature, top-k, top-p.
    """
    if settings.repetition_penalty != 1:
        logits = penalise_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature < 0.001:  # where the division would overflow
        return logits.argmax(-1)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = keep_top_p(logits, settings.top_p)
    # The inverse of the distribution function takes one random number per token.
    total = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(total, (randoms * total[:, -1])[:, None], right=True)[:, 0]


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes ids seen before less likely (CTRL, Keskar et al., arXiv 1909.05858)."""
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalised, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k likeliest ids, and any that tie with the last of them."""
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)


def keep_top_p(logits: Tensor, p: float, among: int = 1024) -> Tensor:
    """Keeps the fewest ids that reach the share p (nucleus, Holtzman et al., arXiv 1904.09751).

    They are looked for among the likeliest `among`. Only rows that need more are sorted, which
    takes several times as long.
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
    """Random numbers in [0, 1), one per token of each sample (B, max_tokens), float64."""
    rows = []
    for sample in samples:
        digest = hashlib.sha256(f"{settings.seed} {sample}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        rows.append(torch.rand(settings.max_tokens, generator=generator))
    return torch.stack(rows).double()


def drawable(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Which of a model's ids may be drawn (V,): no control pieces but EOS, and no spare rows."""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.byte_lengths() > 0)
    allowed[tokenizer.eos_id] = True
    return allowed
