"""The scaling law of a text: what a model of N parameters loses after D tokens.

    L(N, D) = E + A / N^alpha + B / D^beta      nats per token

This is approach 3 of Hoffmann et al. (arXiv 2203.15556), fitted as Besiroglu et al. (2404.10102)
say. ladder.py trains the small runs and writes the fit, plan.py reads it: docs/scaling-law.md.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from config import Config, UserError, read_json, write_atomically

VERSION = 1  # of the file of a fit
CONFIDENCE = 0.95  # of intervals


class Law(NamedTuple):
    """The five constants of the law."""

    E: float  # what no model can know of the next token
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Validation loss in nats per token, for numbers or arrays."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


# Of Hoffmann's runs (MassiveText, 32,000 pieces), in the refit of 2404.10102.
PUBLISHED = Law(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)


def parameters(config: Config, vocab_size: int) -> int:
    """The N of the law: the parameters that a token is multiplied with, so not the input
    embedding, whose size says little on what a small model can compute."""
    model = config.model
    head_dim = model.dim // model.n_heads
    attention = 2 * model.dim * (model.dim + head_dim * model.n_kv_heads)
    block = attention + 3 * model.dim * model.ffn_dim + 2 * model.dim
    return model.n_layers * block + vocab_size * model.dim + model.dim


def shape(dim: int) -> dict[str, int]:
    """The model keys of the member of the family of shapes that has this width.

    All sizes of a ladder, and the runs that it predicts, are of one family: a block per 64 of the
    width, heads of 32 to 128.
    """
    head_dim = 32 if dim < 256 else 64 if dim <= 1024 else 128
    return {
        "dim": dim,
        "n_layers": max(1, round(dim / 64)),
        "n_heads": dim // head_dim,
        "n_kv_heads": dim // head_dim,
        "ffn_dim": 3 * dim if dim < 512 else 256 * math.ceil(8 * dim / 3 / 256),
    }


class Fit(NamedTuple):
    """A law with its uncertainty, and the settings for which it holds.

    Attributes:
        laws: fits of resampled rungs.
        noise: deviation of the logarithm of a single run's loss.
        base: what a planned run takes over, by section.key; and, beside keys of the configuration,
            batch_tokens (tokens per step) and tokens (the lengths of the rungs).
        dataset: what was trained on, in words.
        rungs: the runs: name, dim, parameters, tokens, flops, loss.
    """

    law: Law
    laws: list[Law]
    noise: float
    base: dict[str, Any]
    dataset: str
    rungs: list[dict[str, Any]] = []  # noqa: RUF012 - nobody changes it


def interval(fit: Fit, parameters: float, tokens: float) -> tuple[float, float, float]:
    """Low, predicted and high loss of a single run: the interval holds it in CONFIDENCE of cases.

    It joins what the fit does not know, from the resampled laws, with the noise of one run.
    """
    normal, tail = NormalDist(), (1 - CONFIDENCE) / 2
    noise = [math.exp(fit.noise * normal.inv_cdf((i + 0.5) / 20)) for i in range(20)]
    laws = fit.laws or [fit.law]
    losses = sorted(law.loss(parameters, tokens) * factor for law in laws for factor in noise)
    cut = int(tail * len(losses))
    return losses[cut], fit.law.loss(parameters, tokens), losses[-1 - cut]


def write_fit(path: Path, fit: Fit) -> None:
    """Writes a fit as JSON, whole or not at all."""
    content = {"version": VERSION, **fit._asdict(), "law": fit.law._asdict()}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_fit(path: Path) -> Fit:
    """The fit in a file.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if content is None:
        raise UserError(f"{path}: no such file; tools/ladder.py writes it as fit.json")
    if content.get("version", VERSION) != VERSION:
        raise UserError(f"{path}: of another version of ladder.py; run ladder.py again")
    try:
        law = Law(**{name: float(value) for name, value in content["law"].items()})
        laws = [Law(*map(float, values)) for values in content["laws"]]
        noise, base, dataset = float(content["noise"]), dict(content["base"]), content["dataset"]
        return Fit(law, laws, noise, base, dataset, list(content["rungs"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: damaged; run ladder.py again, which writes it anew") from None
