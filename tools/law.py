"""The scaling law of a text: what a model of N parameters loses after D tokens.

    L(N, D) = E + A / N^alpha + B / D^beta      nats per token

This is approach 3 of Hoffmann et al. (arXiv 2203.15556), fitted as Besiroglu et al. (2404.10102)
say. ladder.py trains the small runs and writes the fit, plan.py reads it: docs/scaling-law.md.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

from config import Config, UserError, read_json, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 3  # of the file of a fit
CONFIDENCE = 0.95  # of intervals
MAX_EPOCHS = 4  # up to here, repeated text is almost as good as new text (2305.16264)
FRESH_EPOCHS = 2  # up to here, it was as good (docs/scaling-law.md)
# Of the family of shapes: multiples of the head's width, see shape().
WIDTHS = [*range(32, 320, 32), *range(320, 1024, 64), *range(1024, 8193, 128)]
RESAMPLES = 100
STEPS = 300  # of L-BFGS
Runs = Sequence[tuple[float, float, float]]  # parameters, tokens and loss of each
DELTA = 1e-3  # Huber's: residuals of log loss above it count linearly, as in 2203.15556
# Starts of the descent: E as a share of the mean loss (A and B share the rest), and the exponents.
STARTS = [(e, alpha, beta) for e in (0.3, 0.6) for alpha in (0.2, 0.5) for beta in (0.2, 0.5, 1.0)]
# Exponents of fits across texts and codebases lie within about this of the published ones. With a
# dozen rungs it keeps E, A and alpha from trading places; with a hundred it is not felt.
PRIOR_DEVIATION = 0.15


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

    def loss_on(self, parameters: float, tokens: float, corpus: float) -> float:
        """The same on a text of `corpus` tokens, which the run may repeat."""
        return self.loss(*effective(parameters, tokens, corpus))


# Of 2305.16264: how soon repeats, and parameters in excess, are worth less. In excess are those
# above a 20th of the text's tokens, which is the best size for one epoch (2203.15556).
REPEATS, EXCESS, BEST_RATIO = 15.4, 5.31, 20


def epoch_tokens(tokens: dict[str, float], shares: dict[str, float]) -> float:
    """Tokens of an epoch of a mixture, by dataset: it is over when the first of them is."""
    return sum(shares.values()) * min(tokens[name] / share for name, share in shares.items())


def effective(parameters: float, tokens: float, corpus: float) -> tuple[float, float]:
    """What parameters and tokens are worth on a text of `corpus` tokens: the N and D of the law.

    Repeats teach less than new text (2305.16264, equation 5), and parameters in excess learn the
    text by heart (equation 6). There, an excess counts less from the first epoch on. Here, two
    epochs showed no sign of it, and four did: so the effect is raised, as an exponent, to the cube
    of the share of training that repeats (docs/scaling-law.md has the measurements).
    """
    if tokens <= corpus:
        return parameters, tokens
    new = corpus * (1 + REPEATS * (1 - math.exp((1 - tokens / corpus) / REPEATS)))
    best = min(parameters, corpus / BEST_RATIO)
    useful = best * (1 + EXCESS * (1 - math.exp((1 - parameters / best) / EXCESS)))
    return parameters * (useful / parameters) ** (1 - corpus / tokens) ** 3, new


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
    width, but four at least, heads of 32 to 128. So below dim 320 all have the same depth, and
    small ladders don't mix depths.
    """
    head_dim = 32 if dim < 320 else 64 if dim <= 1024 else 128
    return {
        "dim": dim,
        "n_layers": max(4, round(dim / 64)),
        "n_heads": dim // head_dim,
        "n_kv_heads": dim // head_dim,
        "ffn_dim": 3 * dim if dim < 512 else 256 * math.ceil(8 * dim / 3 / 256),
    }


def fit_law(runs: Runs, start: Law | None = None) -> Law:
    """The law that fits the losses of runs best, by L-BFGS from a grid of starts, or from one.

    As in approach 3 of 2203.15556, log L is a logsumexp of three terms, and its residuals go
    through Huber's loss. All constants are positive. What 2404.10102 found wrong there is not done
    here: the objective is a sum in units of DELTA, not a mean of numbers so small that L-BFGS stops
    at once; and nothing is rounded.
    """
    import torch  # here, since it takes seconds and plan.py needs only the law

    logs = torch.tensor(runs, dtype=torch.float64).log()
    means = logs.mean(0)  # about these, the five constants depend less on each other
    (N, D, L), (n, d, mean) = (logs - means).T, means.tolist()
    sizes = torch.stack((torch.zeros_like(N), -N, -D))
    published = torch.tensor([PUBLISHED.alpha, PUBLISHED.beta], dtype=torch.float64)

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient at x = log E, log A, log B, log alpha, log beta; autograd takes thrice
        as long for so few numbers."""
        exponents = x[3:].exp()
        powers = torch.nn.functional.pad(exponents, (1, 0))
        terms = x[:3, None] + powers[:, None] * sizes
        predicted = terms.logsumexp(0)
        residuals = (predicted - L) / DELTA
        slopes = residuals.clamp(-1, 1)  # of Huber's loss
        off = (exponents - published) / PRIOR_DEVIATION
        value = (slopes * (residuals - slopes / 2)).sum() + off.square().sum() / 2
        shares = (terms - predicted).exp() * slopes / DELTA
        by_power = (shares * sizes).sum(1)[1:] + off / PRIOR_DEVIATION
        return value, torch.cat((shares.sum(1), by_power * exponents))

    if start:
        log_A, log_B = math.log(start.A) - start.alpha * n, math.log(start.B) - start.beta * d
        constants = [log - mean for log in (math.log(start.E), log_A, log_B)]
        starts = [[*constants, math.log(start.alpha), math.log(start.beta)]]
    else:
        starts = [
            [math.log(e), *[math.log((1 - e) / 2)] * 2, math.log(alpha), math.log(beta)]
            for e, alpha, beta in STARTS
        ]
    found = [descend(objective, torch.tensor(x, dtype=torch.float64)) for x in starts]
    e, a, b, *powers = min(found, key=lambda one: one[0])[1]
    alpha, beta = map(math.exp, powers)
    E, A, B = (math.exp(x + mean) for x in (e, a + alpha * n, b + beta * d))
    return Law(E, A, alpha, B, beta)


def descend(
    objective: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor
) -> tuple[float, list[float]]:
    """The least value of an objective that torch's L-BFGS reaches from x, and where."""
    import torch

    optimizer = torch.optim.LBFGS(
        [x], max_iter=STEPS, tolerance_grad=1e-6, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        value, x.grad = objective(x)
        return value

    with torch.no_grad():
        optimizer.step(closure)
        value = closure().item()
    return value if math.isfinite(value) else math.inf, x.tolist()


def leave_one_out(runs: Runs, law: Law) -> list[float]:
    """For each run, log of its loss over what the law of all other runs predicts."""
    return [leave_out(runs, [index], law)[0] for index in range(len(runs))]


def leave_out(runs: Runs, some: Sequence[int], law: Law) -> list[float]:
    """For some runs, log of their losses over what the law of all others predicts."""
    others = [run for index, run in enumerate(runs) if index not in some]
    return residuals([runs[index] for index in some], fit_law(others, law))


def residuals(runs: Runs, law: Law) -> list[float]:
    """Log of each run's loss over what the law predicts."""
    return [math.log(loss / law.loss(n, d)) for n, d, loss in runs]


def noise_of(runs: Runs, trunks: Sequence[Hashable], law: Law) -> list[list[float]]:
    """For each trunk, errors of its branches' log losses that are as large as the true ones.

    The residuals of a trunk are too small, since the law was fitted to it. Its errors by a law that
    was fitted without it are too large, since that law is uncertain too. The geometric mean of the
    two is right for a linear fit (MacKinnon and White's HC2, 1985; here of whole trunks, since
    branches share the luck of their trunk). Few trunks show only a part of the luck: hence a factor
    with which simulated intervals hold what they promise (docs/scaling-law.md).
    """
    found, count = [], len(set(trunks))
    for trunk in dict.fromkeys(trunks):
        some = [index for index, label in enumerate(trunks) if label == trunk]
        without = leave_out(runs, some, law)
        small = math.hypot(*residuals([runs[index] for index in some], law))
        factor = math.sqrt(small / max(1e-12, math.hypot(*without)) * count / (count - 2))
        found.append([error * factor for error in without])
    return found


def resample(
    runs: Runs, trunks: Sequence[Hashable], law: Law, noise: list[list[float]]
) -> list[Law]:
    """RESAMPLES laws, each fitted to what `law` predicts, times the errors of trunks drawn anew.

    The runs stay as they are: of a dozen, a sample would often lack a size or a length. A trunk
    gets the errors of a random one, with a random sign (a wild bootstrap of clusters), so that
    the branches of a trunk stay alike.
    """
    draw, laws = random.Random(0), []
    for _ in range(RESAMPLES):
        errors = {}
        for trunk in dict.fromkeys(trunks):
            sign = draw.choice((-1, 1))
            errors[trunk] = itertools.cycle([sign * error for error in draw.choice(noise)])
        made = [
            (n, d, law.loss(n, d) * math.exp(next(errors[trunk])))
            for (n, d, _), trunk in zip(runs, trunks, strict=True)
        ]
        laws.append(fit_law(made, law))
    return laws


class Fit(NamedTuple):
    """A law with its uncertainty, and the settings for which it holds.

    Attributes:
        laws: fits of resampled rungs.
        noise: deviation of the logarithm of a single run's loss.
        base: what a planned run takes over, by section.key; and, beside keys of the configuration,
            batch_tokens (tokens per step) and tokens (the lengths of the rungs).
        dataset: what was trained on, in words.
        corpus: its tokens.
        rungs: the runs: name, dim, parameters, tokens, flops, loss.
    """

    law: Law
    laws: list[Law]
    noise: float
    base: dict[str, Any]
    dataset: str
    corpus: float
    rungs: list[dict[str, Any]] = []  # noqa: RUF012 - nobody changes it


def interval(fit: Fit, parameters: float, tokens: float) -> tuple[float, float, float]:
    """Low, predicted and high loss of a single run: the interval holds it in CONFIDENCE of cases.

    It joins what the fit does not know, from the resampled laws, with the noise of one run.
    """
    normal, tail = NormalDist(), (1 - CONFIDENCE) / 2
    noise = [math.exp(fit.noise * normal.inv_cdf((i + 0.5) / 20)) for i in range(20)]
    laws = fit.laws or [fit.law]
    found = [law.loss_on(parameters, tokens, fit.corpus) for law in (fit.law, *laws)]
    losses = sorted(loss * factor for loss in found[1:] for factor in noise)
    cut = int(tail * len(losses))
    return losses[cut], found[0], losses[-1 - cut]


def tokens_per_parameter(fit: Fit) -> tuple[float, float]:
    """The least and the most that rungs were trained on."""
    ratios = [rung["tokens"] / rung["parameters"] for rung in fit.rungs]
    return min(ratios, default=0.0), max(ratios, default=math.inf)


def is_inside(fit: Fit, parameters: float, tokens: float) -> bool:
    """Whether a run has tokens per parameter as the rungs have them, or about so, since sizes come
    in coarse steps. Outside, the law does not hold as well (docs/scaling-law.md)."""
    low, high = tokens_per_parameter(fit)
    return 0.9 * low <= tokens / parameters <= 1.1 * high


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
        corpus, rungs = float(content["corpus"]), list(content["rungs"])
        needed = [
            (base, "batch_tokens tokens"),
            *((r, "dim parameters tokens flops loss") for r in rungs),
        ]
        if not all(key in found for found, keys in needed for key in keys.split()):
            raise ValueError
        return Fit(law, laws, noise, base, dataset, corpus, rungs)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: damaged; run ladder.py again, which writes it anew") from None
