"""One dial: a budget of hours and a prepared dataset become a configuration with its reasons.

    python tools/plan.py --hours=24 --gpus=8 --gpu=h100 --data=data/mine --write=config/mine.toml

The size is the member of the family of shapes (law.shape) whose loss, by the scaling law, is lowest
after the tokens that the budget leaves for it. What is chosen and why: docs/planning.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from config import (
    DEFAULT_CONFIG,
    KEYS,
    ROOT,
    Config,
    ConfigError,
    UserError,
    build_config,
    existing_path,
    file_sha256,
    load_config,
    override,
    read_json,
    read_toml,
    resolve_path,
    set_key,
    toml_value,
    write_atomically,
)
from tools import law, memory, plan
from tools.memory import FP32, sizes
from tools.plan import FITS, TIGHT, Cluster, Option, figure

DIMS = law.WIDTHS[1:]  # 64 and more
NOISY_BATCH = 65_536  # tokens; below it AdamW's second moment averages longer (docs/experiments.md)
GRID = 1.25  # ratio of the budgets that are compared
LEAST_STEPS = 100  # a shorter run is hardly more than its warm-up
SEQ_LENS = (128, 2048)  # the shortest and the longest that are chosen
WARMUP, MOST_WARMUP = 0.05, 2000  # share of the steps (docs/experiments.md), and steps
EVALUATIONS = (2, 20)  # of a run: at least, at most
EVAL_SHARE = 0.05  # of the training time that they may take
EVAL_TOKENS = (16_384, 131_072, 1 << 20)  # of an evaluation: at least, better, at most
CHECKPOINT_SECONDS = 1800  # the work that a lost node may cost
SAVE_SHARE = 0.01  # of the time that saving may take, by more work at risk
# Seconds of what is not arithmetic: estimates.
START = {"cpu": 12.0, "gpu": 120.0}  # imports, checks, and on a GPU compiling
EVALUATION = {"cpu": 1.0, "gpu": 5.0}  # of each: samples, rows, the report's start
# Bytes per second with fsync and digests: measured (docs/performance.md), and an estimate of what a
# cluster's file system takes.
SAVE_BYTES = {"cpu": 0.35e9, "gpu": 1e9}
# A GPU takes at least so long for a block's forward and backward pass, and for the rest of a step:
# the time to launch its kernels. Estimates; without them a tiny model would train in no time.
BLOCK_SECONDS, STEP_SECONDS = 0.5e-3, 5e-3


OWN = ("hours", "gpu-hours", "data", "fit", "write")  # flags that plan.py has for a budget alone


class Recipe(NamedTuple):
    """A learning rate, and the run for which it is the best."""

    rate: float
    base_dim: int  # and BASE_LAYERS layers: where it is right; it transfers (model.transfer)
    batch_tokens: float  # per step
    tokens: float  # of the run
    batch_exponent: float  # how the best rate grows with the batch, at equal steps
    source: str


BASE_LAYERS = 2
RECIPES = {
    "muon": Recipe(1.3e-2, 32, 512, 256_000, 0.26, "docs/experiments.md"),
    "adamw": Recipe(3.4e-2, 8, 512, 256_000, 0.5, "docs/experiments.md"),
}
# The batch's exponent was measured up to so many times the recipe's batch; and how the best rate
# falls with the steps at an equal batch (docs/experiments.md).
BATCH_LIMIT, STEPS_EXPONENT = 4.0, -0.27
MOST_DECAY = 0.1  # Llama 2's
# The batch above which data parallelism brings less grows with about the root of the tokens,
# whatever the model's size (arXiv 2410.21676, 2505.13738).
TOKENS_EXPONENT = 0.5


def learning_rate(recipe: Recipe, batch_tokens: float, steps: float) -> float:
    """The peak rate for another batch and length, with two digits."""
    batch = min(batch_tokens / recipe.batch_tokens, BATCH_LIMIT)
    length = steps / (recipe.tokens / recipe.batch_tokens)
    return float(f"{recipe.rate * batch**recipe.batch_exponent * length**STEPS_EXPONENT:.1e}")


def batch_tokens(recipe: Recipe, tokens: float, steps: int = 0) -> float:
    """Tokens per step of a run of so many tokens, or of so many steps; never fewer than the
    recipe's."""
    times, exponent = tokens / recipe.tokens, TOKENS_EXPONENT
    if steps:  # the same rule, solved for the batch of steps * batch tokens
        times, exponent = steps * recipe.batch_tokens / recipe.tokens, exponent / (1 - exponent)
    return recipe.batch_tokens * max(1.0, times) ** exponent


YOURS = "your choice"


class Choice(NamedTuple):
    """The value of a key, and its reason in a line."""

    value: Any
    reason: str


Choices = dict[str, Choice]  # by section.key


class Speed(NamedTuple):
    """FLOP/s of a rank at a width: of forward and backward passes, and of the optimizer's step."""

    dim: int
    passes: float
    optimizer: float


@dataclass(frozen=True)
class Task:
    """What is to be planned."""

    seconds: float  # of the budget
    cluster: Cluster
    fixed: dict[str, Any]  # the user's values, by section.key
    given: Choices  # dataset and tokenizer
    corpus: float  # training tokens of an epoch
    validation: int  # tokens of the validation split
    fit: law.Fit | None
    speeds: tuple[Speed, ...]  # by growing width

    @property
    def kind(self) -> str:
        return "cpu" if self.cluster.name == "cpu" else "gpu"

    @property
    def law(self) -> law.Law:
        return self.fit.law if self.fit else law.PUBLISHED

    @property
    def base(self) -> dict[str, Any]:
        """What all runs of the ladder share; nothing without one."""
        return self.fit.base if self.fit else {}

    @property
    def recipe(self) -> Recipe:
        """From which rate and batch follow: the ladder's, if there is one."""
        if not self.fit:
            return RECIPES[self.fixed.get("optimizer.name", "muon")]
        rate, base_dim = self.base["optimizer.learning_rate"], self.base["model.base_dim"]
        run = self.base["batch_tokens"], max(self.base["tokens"])
        exponent = RECIPES[self.base["optimizer.name"]].batch_exponent
        return Recipe(rate, base_dim, *run, exponent, "the ladder's")

    @property
    def fixed_length(self) -> bool:
        """Whether the user has said how long to train."""
        return bool(self.fixed.get("train.max_steps") or self.fixed.get("train.epochs"))


@dataclass(frozen=True)
class Plan:
    """A configuration, what it takes and what the law says of it."""

    choices: Choices
    config: Config
    option: Option
    fits: bool
    parameters: int  # the law's N
    tokens: int
    loss: float  # by the law
    inside: bool  # with tokens per parameter for which the law holds
    times: dict[str, float]  # seconds by part

    @property
    def seconds(self) -> float:
        return sum(self.times.values())


# ---- choices

# Keys that a planned run does not take from the ladder: they follow from its size, length and data.
OWN_KEYS = """
    model.dim model.n_layers model.n_heads model.n_kv_heads model.ffn_dim data.dir data.mixture
""".split()


def settled(task: Task, section: str, proposed: dict[str, tuple[Any, str]]) -> Choices:
    """The proposals for keys of a section, where the ladder or the user has not decided."""
    found = {}
    for name, (value, reason) in proposed.items():
        key = f"{section}.{name}"
        found[key] = Choice(value, reason)
        if key in task.base and key not in OWN_KEYS:
            found[key] = Choice(task.base[key], "as in the ladder, for which the law holds")
        if key in task.fixed:
            found[key] = Choice(task.fixed[key], YOURS)
    return found


def model_choices(task: Task, dim: int, seq_len: int) -> Choices:
    """The member of the family of this width, and the base from which its rates transfer."""
    shape = law.shape(dim)
    by = "the ladder's fit" if task.fit else "published constants (arXiv 2404.10102)"
    reasons = {
        "dim": f"the lowest loss for the hours, by {by}",
        "n_layers": "a block per 64 of the width, four at least, as in the family (law.shape)",
        "n_heads": f"heads of {dim // max(1, shape['n_heads'])}",
        "n_kv_heads": "fewer would save memory when sampling, not in training",
        "ffn_dim": "3 dim" if dim < 512 else "8/3 dim, up to a multiple of 256",
    }
    proposed: dict[str, tuple[Any, str]] = {k: (shape[k], reason) for k, reason in reasons.items()}
    proposed["max_seq_len"] = seq_len, "as data.seq_len"
    proposed["tie_embeddings"] = False, "two matrices, as in the recipe that was swept"
    proposed["base_dim"] = task.recipe.base_dim, "where the rate is right (model.transfer)"
    proposed["base_layers"] = BASE_LAYERS, "its depth"
    return settled(task, "model", proposed)


def length_choices(task: Task, tokens: float) -> Choices:
    """Sequence length, batch and steps of a run of about so many tokens."""
    recipe, ranks, (low, high) = task.recipe, task.cluster.gpus, SEQ_LENS
    wanted = batch_tokens(recipe, tokens, task.fixed.get("train.max_steps", 0))
    seq_len = min(max(low, 1 << int(math.log2(wanted / 4))), high)
    reason = f"a batch holds at least 4, up to {high:,} tokens"
    found = settled(task, "data", {"seq_len": (seq_len, reason)}) | task.given
    seq_len = found["data.seq_len"].value
    batch = max(1, round(wanted / seq_len / ranks)) * ranks
    reason = (
        f"{figure(wanted)} tokens: {figure(recipe.batch_tokens)} for {figure(recipe.tokens)} of"
        " training, growing with their root (arXiv 2410.21676)"
    )
    if batch * seq_len > 2 * wanted:
        reason += f"; more, since each of {ranks} ranks needs a sequence"
    found |= settled(task, "train", {"global_batch_size": (batch, reason)})
    batch = found["train.global_batch_size"].value
    if epochs := task.fixed.get("train.epochs"):
        return found | {"train.epochs": Choice(epochs, YOURS)}
    steps = max(1, int(tokens / batch / seq_len))
    reason = f"{figure(steps * batch * seq_len / task.corpus)} epochs of the text"
    return found | settled(task, "train", {"max_steps": (steps, reason)})


def recipe_choices(task: Task, steps: int, step_tokens: int) -> Choices:
    """The optimizer's keys, for so many steps of so many tokens."""
    recipe, noisy = task.recipe, step_tokens < NOISY_BATCH
    rate = learning_rate(recipe, step_tokens, steps)
    swept = (
        f"{recipe.rate:g} at the base shape ({recipe.source}), batch^{recipe.batch_exponent:g}"
        f" up to {BATCH_LIMIT:g} times, steps^{STEPS_EXPONENT:g}"
    )
    to_zero = "to zero: best for a known length (arXiv 2502.15938); wsd could be branched"
    if steps * step_tokens > law.FRESH_EPOCHS * task.corpus:
        decay = MOST_DECAY, "with less, a text that repeats is learned by heart"
    else:
        forgotten = max(steps * task.fixed.get("optimizer.learning_rate", rate), 1 / MOST_DECAY)
        reason = f"1 / (steps × rate), {MOST_DECAY:g} at most: weights are forgotten over the run"
        decay = float(f"{1 / forgotten:.1g}"), reason
    warmup = min(max(1, round(WARMUP * steps)), MOST_WARMUP)
    proposed: dict[str, tuple[Any, str]] = {
        key.partition(".")[2]: (value, "")  # what the ladder says beside these
        for key, value in task.base.items()
        if key.startswith("optimizer.")
    }
    proposed["name"] = "muon", "a lower loss than AdamW's for the same time"
    proposed["learning_rate"] = rate, swept
    proposed["schedule"] = "linear", to_zero
    proposed["warmup_steps"] = warmup, f"{WARMUP:.0%} of the steps, {MOST_WARMUP} at most"
    proposed["weight_decay"] = decay
    proposed["beta2"] = (0.99, "small batches are noisy") if noisy else (0.95, "Llama 2's")
    return settled(task, "optimizer", proposed)


def upkeep_choices(task: Task, config: Config, option: Option, steps: int) -> Choices:
    """When to evaluate, save and log."""
    seq_len, (fewest, most), (low, middle, high) = config.data.seq_len, EVALUATIONS, EVAL_TOKENS
    tokens, second = (
        steps * config.train.global_batch_size * seq_len,
        step_seconds(task, config, option),
    )
    affordable = 3 * EVAL_SHARE * tokens  # a forward pass is a third of a step
    wanted = max(low, min(middle, affordable / fewest), affordable / most)
    wanted = max(1, min(wanted, high, task.validation))
    whole = wanted == task.validation
    each = wanted / tokens * steps * second / 3 + EVALUATION[task.kind]
    count = int(min(max(fewest, EVAL_SHARE * steps * second / each), most))
    sequences = 0 if whole else max(1, int(wanted / seq_len))
    part = f"{'all' if whole else figure(wanted)} tokens of the validation split"
    found = settled(
        task,
        "train",
        {
            "eval_interval": (math.ceil(steps / count), f"{count} evaluations"),
            "eval_sequences": (sequences, part),
            "log_interval": (min(max(1, steps // 1000), 100), "about a thousand rows"),
        },
    )
    save = save_seconds(task, config)
    apart = max(CHECKPOINT_SECONDS, save / SAVE_SHARE)
    reason = f"{figure(apart / 60)} minutes of work at risk; a save takes about {figure(save)} s"
    interval = min(steps, max(1, int(apart / second)))
    return found | settled(task, "checkpoint", {"interval": (interval, reason)})


def way_choices(task: Task, option: Option) -> Choices:
    """How it is trained: strategy, recomputation and micro-batch."""
    setup, slower = option.setup, f"steps take {option.cost:.2f} times the arithmetic"
    peak = f"{option.total / 1e9:.1f} of {task.cluster.memory / 1e9:.0f} GB at the peak"
    size = setup.micro_batch, f"{setup.micro_batches} of them per rank and step"
    ways = {"recompute": (setup.recompute, f"the fastest that fits: {slower}")}
    device = {"device": ("cpu", "as planned")} if task.kind == "cpu" else {}
    return settled(task, "parallel", {"strategy": (setup.strategy, peak)}) | settled(
        task, "train", ways | {"micro_batch_size": size} | device
    )


# ---- time


def optimizer_flops(config: Config) -> float:
    """FLOPs of an optimizer's step: Muon's 20 r²c + 10 r³ per matrix, and 20 per parameter."""
    model = config.model
    total = 20.0 * sizes(config).total
    if config.optimizer.name == "muon":
        shapes = [(model.dim, model.dim, 2), (memory.kv_dim(model), model.dim, 2)]
        for rows, columns, count in [*shapes, (model.dim, model.ffn_dim, 3)]:
            r, c = min(rows, columns), max(rows, columns)
            total += model.n_layers * count * (20.0 * r * r * c + 10.0 * r**3)
    return total


def speed_at(speeds: tuple[Speed, ...], dim: int) -> Speed:
    """Interpolated between the nearest widths, in logarithms; constant outside of them."""
    below = [one for one in speeds if one.dim <= dim] or [speeds[0]]
    above = [one for one in speeds if one.dim >= dim] or [speeds[-1]]
    a, b = below[-1], above[0]
    share = math.log(dim / a.dim) / math.log(b.dim / a.dim) if b.dim != a.dim else 0.0
    passes, optimizer = (x ** (1 - share) * y**share for x, y in zip(a[1:], b[1:], strict=True))
    return Speed(dim, passes, optimizer)


def step_seconds(task: Task, config: Config, option: Option) -> float:
    """Seconds of a step: passes, slowed by recomputation and communication, and the optimizer."""
    setup, speed = option.setup, speed_at(task.speeds, config.model.dim)
    tokens = setup.micro_batches * setup.micro_batch * config.data.seq_len
    passes = tokens * memory.flops_per_token(config) / speed.passes * option.cost
    sharers = setup.shards if setup.sharded else setup.ranks  # Muon's matrices are spread
    step = passes + optimizer_flops(config) / speed.optimizer / sharers
    if task.kind == "cpu":
        return step
    launches = setup.micro_batches * config.model.n_layers * BLOCK_SECONDS + STEP_SECONDS
    return max(step, launches)


def save_seconds(task: Task, config: Config) -> float:
    """Seconds of a checkpoint: weights and the optimizer's state."""
    size = sizes(config)
    return 0.1 + FP32 * (3 * size.total - size.muon) / SAVE_BYTES[task.kind]


def times(task: Task, config: Config, option: Option, steps: int) -> dict[str, float]:
    """Seconds of a run by part."""
    train, seq_len = config.train, config.data.seq_len
    speed = speed_at(task.speeds, config.model.dim)
    evaluations = math.ceil(steps / train.eval_interval) if train.eval_interval else 1
    tokens = min(train.eval_sequences * seq_len or task.validation, task.validation)
    forward = tokens * memory.flops_per_token(config) / 3 / speed.passes / task.cluster.gpus
    evaluation = evaluations * (forward + EVALUATION[task.kind]) if task.validation else 0.0
    # a new best is saved too, and so is the end
    saves = evaluations + (steps // config.checkpoint.interval if config.checkpoint.interval else 0)
    return {
        "start": START[task.kind],
        "training": steps * step_seconds(task, config, option),
        "evaluation": evaluation,
        "checkpoints": saves * save_seconds(task, config),
    }


# ---- search


def ways(task: Task, config: Config) -> list[Option]:
    """The ways to train that the user's values leave."""
    found = plan.options(config, task.cluster)
    for key, name in (("parallel.strategy", "strategy"), ("train.recompute", "recompute")):
        if key in task.fixed:
            found = [one for one in found if getattr(one.setup, name) == task.fixed[key]]
    if not found:
        raise ConfigError(f"parallel.strategy={task.fixed['parallel.strategy']} needs more ranks")
    if size := task.fixed.get("train.micro_batch_size"):
        pairs = [(one.setup.strategy, one.setup.recompute) for one in found]
        found = [plan.option(config, task.cluster, *pair, size) for pair in pairs]
    return found


def plan_of(task: Task, dim: int, tokens: float) -> Plan:
    """The plan of a width and about so many tokens; ConfigError if the user's keys forbid it."""
    length = length_choices(task, tokens)
    seq_len, batch = (length[key].value for key in ("data.seq_len", "train.global_batch_size"))
    if epochs := task.fixed.get("train.epochs"):
        steps = math.ceil(epochs * task.corpus / seq_len / batch)
    else:
        steps = length["train.max_steps"].value
    chosen = model_choices(task, dim, seq_len) | length
    chosen |= recipe_choices(task, steps, batch * seq_len)
    config = configured(task, chosen)
    found = ways(task, config)
    option = plan.recommended(found)
    if not option:  # what it would reach with more memory
        least = min(found, key=lambda one: one.total)
        option = dataclasses.replace(least, cost=min(one.cost for one in found))
    chosen |= way_choices(task, option) | upkeep_choices(task, config, option, steps)
    extra = {key: Choice(v, YOURS) for key, v in task.fixed.items() if key not in chosen}
    config = configured(task, chosen | extra)
    parameters = law.parameters(config, config.tokenizer.vocab_size)
    tokens = steps * batch * seq_len
    return Plan(
        choices=chosen | extra,
        config=config,
        option=option,
        fits=option.fit == FITS or (option.fit == TIGHT and "model.dim" in task.fixed),
        parameters=parameters,
        tokens=tokens,
        loss=task.law.loss_on(parameters, tokens, task.corpus),
        inside=not task.fit or law.is_inside(task.fit, parameters, tokens),
        times=times(task, config, option, steps),
    )


def configured(task: Task, choices: Choices) -> Config:
    """The configuration of choices, with the user's further keys."""
    values: dict[str, dict[str, Any]] = {}
    for key, value in (task.fixed | {key: one.value for key, one in choices.items()}).items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    return build_config(values)


def filled(task: Task, dim: int, tokens: float, most: float) -> Plan | None:
    """The plan of a width that fills the budget, with `most` tokens at most; None if the budget
    does not hold it.

    Each round scales the tokens, at first a guess, by what is left of the time. Where sequence
    length or batch jump, that leads in circles: there the middle of too few and too many is next.
    """
    start, best = START[task.kind], None
    left, few, many = task.seconds - start, 0.0, math.inf
    for _ in range(40):
        found = plan_of(task, dim, tokens)
        ratio = left / (found.seconds - start)
        if ratio >= 1 and (best is None or found.tokens > best.tokens):
            best = found
        few, many = (max(few, tokens), many) if ratio >= 1 else (few, min(many, tokens))
        wanted = found.tokens * ratio
        if not few < wanted < many:
            between = 0 < few < many < math.inf
            wanted = math.sqrt(few * many) if between else tokens * (1.1 if ratio >= 1 else 0.9)
        wanted = min(most, wanted)
        if task.fixed_length or ratio <= 0 or 1 <= ratio < 1.02 or wanted == tokens:
            break
        if many < 1.005 * few:
            break
        tokens = wanted
    return best


def search(task: Task, most: float = math.inf) -> list[Plan]:
    """The plans that fill the budget, one per width, of at most so many tokens.

    Raises:
        UserError: the budget holds none of them.
        ConfigError: the user's keys contradict each other at every width.
    """
    found, errors, tokens = [], [], min(most, RECIPES["muon"].tokens)
    for dim in [task.fixed["model.dim"]] if "model.dim" in task.fixed else DIMS:
        try:
            one = filled(task, dim, tokens, most)
        except ConfigError as error:
            errors.append(error)
            continue
        if one is None or (steps_of(one) < LEAST_STEPS and not task.fixed_length):
            break  # larger ones take longer
        if found and is_past(best_of(found), one):
            break
        found.append(one)
        tokens = one.tokens
    if not found and errors:
        raise errors[0]
    if not found:
        raise UserError(too_little(task))
    return found


def is_past(best: Plan, one: Plan) -> bool:
    """Whether larger widths than this one are no better than the best so far."""
    return best.inside and (not one.inside or one.loss > 1.02 * best.loss)


def too_little(task: Task) -> str:
    """The message on a budget that holds no run: what the least run takes."""
    dim, recipe = task.fixed.get("model.dim", DIMS[0]), task.recipe
    least = plan_of(task, dim, LEAST_STEPS * recipe.batch_tokens)
    what = f"dim {dim} for {steps_of(least):,} steps"
    if least.seconds <= task.seconds:
        return (
            f"the text is too little: the least run, {what}, takes"
            f" {figure(least.tokens / task.corpus)} epochs of it, and above {law.MAX_EPOCHS}"
            " repeats teach little (arXiv 2305.16264). Take more text, or give train.epochs"
        )
    return (
        f"a budget of {figure(task.seconds / 3600)} hours is too little: the least run, {what},"
        f" takes {figure(least.seconds / 3600)} hours on {task.cluster.gpus} × {task.cluster.name}"
    )


def steps_of(one: Plan) -> int:
    train = one.config.train
    return one.tokens // (train.global_batch_size * one.config.data.seq_len)


class Decision(NamedTuple):
    """The plan, what limits it, and a warning on that."""

    plan: Plan
    limit: str  # hours, memory, text or your values
    warning: str


def decide(task: Task) -> Decision:
    """The plan of the lowest loss that fits in memory, within law.MAX_EPOCHS epochs of the text.

    Raises:
        UserError: no width fits in memory, or in the budget.
    """
    found, limit = search(task), "hours"
    wanted = best_of(found)
    most = math.inf if task.fixed_length else law.MAX_EPOCHS * task.corpus
    # A larger model would learn the text by heart (docs/scaling-law.md).
    largest = math.inf if "model.dim" in task.fixed else task.corpus
    if wanted.tokens > most or wanted.parameters > largest:
        found, limit = search(task, most), "text"
        largest = min(largest, wanted.parameters)
    found = [o for o in found if o.parameters <= largest and o.tokens <= most] or found[:1]
    fitting = [one for one in found if one.fits]
    if not fitting:
        least = min(found, key=lambda one: one.option.total)
        raise UserError(
            f"nothing fits: dim {least.config.model.dim} takes {least.option.total / 1e9:,.1f} GB"
            f" where {task.cluster.name} has {task.cluster.memory / 1e9:,.1f} to use; take more or"
            " larger GPUs, or a smaller model.dim or data.seq_len"
        )
    best = best_of(fitting) if limit == "text" else steady(task, fitting)
    ideal = best_of(found)
    left, warning = (task.seconds - best.seconds) / 3600, ""
    if limit == "text":
        warning = (
            f"{figure(wanted.parameters / 1e6)}M parameters and {figure(wanted.tokens / 1e6)}M"
            f" tokens would fill the hours. But above {law.MAX_EPOCHS} epochs repeats teach little"
            " (arXiv 2305.16264), and a model of more parameters than the text has tokens learns it"
            f" by heart (docs/scaling-law.md). So {figure(left)} hours are left: more text would"
            " use them"
        )
    elif not ideal.fits:
        limit = "memory"
        warning = (
            f"dim {ideal.config.model.dim} would be better, but takes"
            f" {ideal.option.total / 1e9:,.1f} of {task.cluster.memory / 1e9:,.1f} GB: take more or"
            " larger GPUs"
        )
    elif task.fixed_length and left > 0.1 * task.seconds / 3600:
        limit, warning = "your values", f"{figure(left)} hours are left"
    return Decision(best, limit, "; ".join(filter(None, [warning, *doubts(task, best)])))


def doubts(task: Task, best: Plan) -> list[str]:
    """Why a plan may end worse than the law says."""
    found = []
    if best.tokens > 1.01 * law.MAX_EPOCHS * task.corpus:
        found.append(f"above {law.MAX_EPOCHS} epochs repeats teach little")
    if best.parameters > task.corpus:
        found.append("a model of more parameters than the text has tokens learns it by heart")
    if not task.fit:
        return found
    low, high = law.tokens_per_parameter(task.fit)
    if not best.inside:
        found.append(
            f"{figure(best.tokens / best.parameters)} tokens per parameter, but the rungs have"
            f" {figure(low)} to {figure(high)}: the loss is less sure"
        )
    largest = max((rung["flops"] for rung in task.fit.rungs), default=math.inf)
    times = best.tokens * memory.flops_per_token(best.config) / largest
    if times > 10:
        found.append(f"{figure(times)} times the compute of the largest rung: the loss is a guess")
    if abs(math.log(task.corpus / task.fit.corpus)) > 0.01:
        found.append(f"the fit is of another text ({task.fit.dataset})")
    ranks, batch = task.cluster.gpus, best.config.train.global_batch_size
    if ranks > batch:
        found.append(f"the ladder's batch of {batch} sequences is too small for {ranks} GPUs")
    return found


def plans_for(task: Task, seconds: float) -> list[Plan]:
    """The plans that fill another budget; none if it is too little for any run."""
    try:
        return search(dataclasses.replace(task, seconds=seconds))
    except UserError:
        return []


def steady(task: Task, fitting: list[Plan]) -> Plan:
    """The plan of the largest width that is best for one of the budgets 1.25^k below this one.

    Batch and strategy come in steps, so the best width alone may fall where the budget grows. The
    loss is flat there, and nobody would understand it.
    """
    dims, top = [], math.floor(math.log(task.seconds, GRID))
    for power in range(top, top - 10, -1):
        if not (plans := plans_for(task, GRID**power)):
            break
        dims += [best_of(one).config.model.dim for one in [[p for p in plans if p.fits]] if one]
    least = max(dims, default=best_of(fitting).config.model.dim)
    return min(fitting, key=lambda one: abs(one.config.model.dim - least))


def best_of(plans: list[Plan]) -> Plan:
    """The plan of the lowest loss, of those for which the law holds if there are any."""
    return min(plans, key=lambda one: (not one.inside, one.loss))


# ---- what is given: budget, dataset, speed


def measured(config: Config, ranks: int) -> Speed:
    """What a rank reaches on this machine's cores, by three steps of this model.

    Loads torch. The median step counts: others may use the machine.
    """
    import torch

    from config import available_cores
    from distributed import init_distributed, shut_down
    from tools.measure import Trainer, median_parts, random_batches

    train = config.train
    train.device, train.global_batch_size = "cpu", min(train.global_batch_size, 64)
    train.micro_batch_size = train.global_batch_size
    world = init_distributed(config)
    if ranks > 1:
        torch.set_num_threads(max(1, available_cores() // ranks))
    parts = median_parts(Trainer(config, world), random_batches(config, world), world.device)
    shut_down()
    tokens = train.global_batch_size * config.data.seq_len
    passes = tokens * memory.flops_per_token(config) / (parts["forward"] + parts["backward"])
    return Speed(config.model.dim, passes, optimizer_flops(config) / parts["optimizer"])


def read_dataset(fixed: dict[str, Any]) -> tuple[Choices, float, int]:
    """The keys of dataset and tokenizer, the tokens of an epoch, and of the validation split.

    Raises:
        UserError: a dataset is not prepared or damaged, or its tokenizer is not found.
    """
    shares = fixed.get("data.mixture") or {fixed["data.dir"]: 1.0}
    found = {}
    for name in shares:
        directory = resolve_path(name)
        if (manifest := read_json(directory / "manifest.json")) is None:
            raise UserError(
                f"{name}: no dataset here (manifest.json is missing); run prepare.py first"
            )
        found[name] = manifest
    try:
        tokens = {
            name: {split: part["tokens"] for split, part in manifest["splits"].items()}
            for name, manifest in found.items()
        }
        first = next(iter(found.values()))
        vocabulary, sha256 = first["tokenizer"]["vocab_size"], first["tokenizer"]["sha256"]
        epoch = law.epoch_tokens({name: parts["train"] for name, parts in tokens.items()}, shares)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{' or '.join(found)}: damaged; run prepare.py with --force") from None
    made = "as the dataset was prepared"
    path = fixed.get("tokenizer.path") or find_tokenizer(next(iter(found)), sha256)
    choices = {
        "tokenizer.path": Choice(path, "whose sha256 the dataset names"),
        "tokenizer.vocab_size": Choice(vocabulary, "its pieces"),
    }
    if "data.mixture" not in fixed:
        choices["data.dir"] = Choice(fixed["data.dir"], "your dataset")
        for key in ("format", "template", "train_on", "too_long", "seq_len"):
            if key in first:
                choices[f"data.{key}"] = Choice(first[key], made)
    validation = sum(splits.get("val", 0) for splits in tokens.values())
    return choices, epoch, validation


def find_tokenizer(dataset: str, sha256: str) -> str:
    """The configured path of the tokenizer with this digest: beside the dataset, or of a file in
    config/ for this dataset."""
    paths = [f"{dataset.rstrip('/')}/tokenizer.model"]
    for path in sorted((ROOT / "config").glob("*.toml")):
        try:
            config = build_config(read_toml(path))
        except ConfigError:  # somebody's, half written
            continue
        if resolve_path(config.data.dir) == resolve_path(dataset):
            paths.append(config.tokenizer.path)
    for path in paths:
        file = resolve_path(path)
        if file.is_file() and file_sha256(file) == sha256:
            return path
    raise UserError(
        f"{dataset}: its tokenizer is not beside it; say where it is with --tokenizer.path=FILE"
    )


def read_task(arguments: list[str]) -> tuple[Task, dict[str, str]]:
    """The task of a command line, and the values of its flags.

    Raises:
        UserError: a mistake on the command line; no dataset, or a damaged fit.
    """
    keys = [a for a in arguments if a.startswith("--") and "." in a.partition("=")[0]]
    rest = [a for a in arguments if a not in keys]
    if names := [a for a in rest if not a.startswith("-")]:
        raise ConfigError(f"give a CONFIG ({names[0]}) or a budget, not both")
    _, given = load_config([str(DEFAULT_CONFIG), *rest], usage="", flags=plan.FLAGS)
    flags = dict(flag[2:].partition("=")[::2] for flag in given)
    own = {name: flags.pop(name, "") for name in OWN}
    fixed = read_keys(keys)
    if own["data"]:
        fixed["data.dir"] = own["data"]
    if not {"data.dir", "data.mixture"} & fixed.keys():
        raise ConfigError("say which prepared dataset: --data=DIR; prepare.py makes one")
    if flags.get("gpu", "").lower() == "cpu" and not {"gpus", "nodes"} & flags.keys():
        flags["gpus"] = "1"  # a process takes all cores
    dim = fixed.get("model.dim", DIMS[0])
    if dim not in law.WIDTHS and "model.n_heads" not in fixed:
        near = min(law.WIDTHS, key=lambda width: abs(width - dim))
        raise ConfigError(
            f"model.dim={dim} is no width of the family (law.shape): take {near}, or give"
            " model.n_heads too"
        )
    cluster = plan.read_cluster([f"--{name}={value}" for name, value in flags.items() if value])
    if own["hours"] and own["gpu-hours"]:
        raise ConfigError("give --hours or --gpu-hours, not both")
    name = "hours" if own["hours"] else "gpu-hours"
    hours = plan.number(name, own[name]) / (1 if own["hours"] else cluster.gpus)
    choices, corpus, validation = read_dataset(fixed)
    fit = law.read_fit(existing_path(own["fit"])) if own["fit"] else None
    if fit and (swept := fit.base["optimizer.name"]) != fixed.get("optimizer.name", swept):
        raise ConfigError(
            f"{own['fit']} is of runs with optimizer.name={swept}; another optimizer has another"
            " law: train a ladder with it, or plan without --fit"
        )
    name = Path(own["write"]).stem or Path(fixed.get("data.dir", "mixture")).name
    choices["train.out_dir"] = Choice(f"out/{name}", "the run's directory")
    choices |= {key: Choice(v, YOURS) for key, v in fixed.items() if key in choices}
    speeds = ()
    if cluster.flops:
        rate = cluster.flops * cluster.mfu
        speeds = (Speed(DIMS[0], rate, rate),)
    elif cluster.name != "cpu":
        raise ConfigError(f"the FLOP/s of {cluster.name} are not known: give --gpu-tflops")
    task = Task(3600 * hours, cluster, fixed, choices, corpus, validation, fit, speeds)
    return task, own | {"json": "--json" if "--json" in given else ""}


def read_keys(keys: list[str]) -> dict[str, Any]:
    """The user's values by section.key; ConfigError where a key or the type of a value is wrong."""
    tables: dict[str, dict[str, Any]] = {}
    for key in keys:
        override(tables, key)
    values, config = {}, Config()
    for section, table in tables.items():
        for name, value in table.items():
            set_key(config, section, name, value)
            values[f"{section}.{name}"] = getattr(getattr(config, section), name, value)
    return values


def decide_measured(task: Task) -> tuple[Task, Decision]:
    """The decision; on a CPU whose FLOP/s are not given, after measuring the widths at issue."""
    if task.speeds:
        return task, decide(task)
    unknown = dataclasses.replace(task, speeds=(Speed(DIMS[0], 1e9, 1e9),))
    for _ in range(5):
        known = {one.dim for one in task.speeds}
        if not known:
            dims = [task.fixed.get("model.dim", dim) for dim in (DIMS[0], 256)]
            configs = [plan_of(unknown, dim, 1e6).config for dim in dict.fromkeys(dims)]
        else:
            decision = decide(task)
            if decision.plan.config.model.dim in known:
                break
            configs = [decision.plan.config]
        new = [measured(config, task.cluster.gpus) for config in configs]
        task = dataclasses.replace(task, speeds=tuple(sorted((*task.speeds, *new))))
    return task, decide(task)


# ---- the file, and the text around it


def toml(decision: Decision, lines: list[str]) -> str:
    """The choices as a TOML file, each with its reason; the lines above them as a comment."""
    text = [f"# {line}".rstrip() for line in lines]
    choices = decision.plan.choices
    for section, keys in KEYS.items():
        names = [*keys, *(k for k in given_options(choices, section) if k not in keys)]
        found = [
            (name, choices[f"{section}.{name}"]) for name in names if f"{section}.{name}" in choices
        ]
        if found:
            text += ["", f"[{section}]"]
        text += [f"{name} = {toml_value(one.value)}  # {one.reason}" for name, one in found]
    return "\n".join(text) + "\n"


def given_options(choices: Choices, section: str) -> list[str]:
    """The names of a section's choices."""
    return [key.partition(".")[2] for key in choices if key.startswith(f"{section}.")]


def facts_of(task: Task, decision: Decision) -> plan.Facts:
    """The figures of a decision, by name; the loss is None without a fit, whose text it is of."""
    one = decision.plan
    low, loss, high = None, None, None
    if task.fit:
        fit = task.fit._replace(corpus=task.corpus)
        low, loss, high = law.interval(fit, one.parameters, one.tokens)
    setup = one.option.setup
    return {
        "limit": decision.limit,
        "warning": decision.warning,
        "budget_hours": task.seconds / 3600,
        "hours": one.seconds / 3600,
        "gpu_hours": one.seconds / 3600 * task.cluster.gpus,
        "hours_by_part": {part: taken / 3600 for part, taken in one.times.items()},
        "parameters": sizes(one.config).total,
        "law_parameters": one.parameters,
        "law": task.law._asdict(),
        "law_of": task.fit.dataset if task.fit else "published, of another text",
        "loss": loss,
        "loss_interval": [low, high] if task.fit else None,
        "tokens": one.tokens,
        "steps": steps_of(one),
        "epochs": one.tokens / task.corpus,
        "flops_per_token": memory.flops_per_token(one.config),
        "memory": one.option.memory,
        "strategy": setup.strategy,
        "config": {key: choice._asdict() for key, choice in one.choices.items()},
    }


def summary(task: Task, decision: Decision, facts: plan.Facts) -> list[str]:
    """What was found, a thought a line."""
    one, cluster = decision.plan, task.cluster
    model, parts = one.config.model, one.times
    loss = "not predicted: the size is by published constants (arXiv 2404.10102), of another text"
    if task.fit:
        low, high = facts["loss_interval"]
        loss = (
            f"{facts['loss']:.3f} nats per token, {low:.3f} to {high:.3f} in"
            f" {law.CONFIDENCE:.0%} of cases, by the fit on {task.fit.dataset}"
        )
    speed = speed_at(task.speeds, model.dim).passes
    how = f"{cluster.mfu:.0%} of {figure((cluster.flops or 0) / 1e12)} TFLOP/s, assumed"
    if not cluster.flops:
        how = f"{figure(speed / 1e9)} GFLOP/s, measured here"
    shares = ", ".join(f"{name} {parts[name] / one.seconds:.1%}" for name in parts)
    lines = [
        f"limit   {decision.limit}{f': {decision.warning}' if decision.warning else ''}",
        f"model   {figure(facts['parameters'] / 1e6)}M parameters: dim {model.dim},"
        f" {model.n_layers} layers",
        f"run     {facts['steps']:,} steps, {figure(one.tokens / 1e6)} million tokens:"
        f" {figure(facts['epochs'])} epochs of the text",
        f"time    {figure(facts['hours'])} of {figure(facts['budget_hours'])} hours on"
        f" {cluster.gpus} × {cluster.name}: {shares} ({how})",
        f"loss    {loss}",
    ]
    wrapped = [textwrap.wrap(line, 100, subsequent_indent=" " * 8) for line in lines]
    return [line for part in wrapped for line in part]


def command(task: Task, hours: float, file: str) -> str:
    """What starts the run."""
    if task.cluster.name == "cpu" and task.cluster.gpus == 1:
        return f"python rocket.py {shlex.quote(file)}"
    return plan.start(task.cluster, hours, shlex.quote(file))


def main(arguments: list[str]) -> None:
    task, flags = read_task(arguments)
    path = existing_path(flags["write"]) if flags["write"] else None
    if path and path.exists():
        raise UserError(f"{path} exists: give --write another name, or remove it")
    if path and not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory")
    task, decision = decide_measured(task)
    facts = facts_of(task, decision)
    lines = summary(task, decision, facts)
    made = ["Written by", f"  python tools/plan.py {shlex.join(arguments)}", "", *lines]
    text = toml(decision, made)
    if path:
        write_atomically(path, text.encode())
    if flags["json"]:
        print(json.dumps(facts, indent=1))
        return
    file = flags["write"] or "config/mine.toml"
    print(*lines, "", text.partition("\n\n")[2], sep="\n")
    how = "start it with" if path else "as a file: --write=config/mine.toml; then"
    print(f"{how}: {command(task, facts['hours'], file)}")
