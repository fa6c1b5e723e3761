"""bench.py time-to-loss: seconds from raw text until a stated validation loss, by whole programs.

A model is as good as it gets at the end of its schedule. So a contestant's time is that of its
shortest run, with its own schedule to the end, that ends at or below the target. A sweep of
learning rates over short runs comes first; then each length is guessed from the runs before it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import ROOT, Config, ConfigError, UserError, dump_toml
from corpus import hub

# The peers' recipes in Rocket's code, and the share of a run in which the rate warms up. nanoGPT's
# is that of the small model that its README trains on a CPU (config/train_shakespeare_char.py: 100
# of 2,000 steps); llama2.c has one recipe, the defaults of its train.py (1,000 of 100,000).
ADAMW = (
    "--optimizer.name=adamw --optimizer.schedule=cosine --model.base_dim=0 --model.base_layers=0"
)
RECIPES = {
    "nanogpt": f"{ADAMW} --optimizer.min_lr_fraction=0.1 --optimizer.beta2=0.99",
    "llama2.c": f"{ADAMW} --optimizer.min_lr_fraction=0 --optimizer.beta2=0.95",
}
WARM_UP = {"nanogpt": 0.05, "llama2.c": 0.01}
PEER_RATES = [1e-3, 2e-3, 4e-3]  # swept unless --rates names others
SLOPE = -0.15  # bits per byte by which a run of twice the length ends lower, until two runs tell
WITHIN = 0.01  # bits per byte below the target at which a run is short enough: seeds differ as much
NEAR = 1.05  # ratio of two lengths between which none is tried
LARGEST_STEP = 4  # ratio of a guessed length to the longest run, or the shortest

Lines = list[tuple[float, str]]  # what a program printed, each line with the seconds since launch


class Trained(NamedTuple):
    """A whole run: learning rate, steps, validation loss in bits per byte, parameters, and seconds:
    before the first step, of a step, and from launch to exit."""

    rate: float
    steps: int
    bits: float
    parameters: int
    start: float
    step: float
    total: float


class Racer(NamedTuple):
    """A contestant: the rates that it sweeps, and what trains and evaluates it."""

    label: str
    rates: list[float]
    train: Callable[[float, int], Trained]  # at a rate, for a number of steps


Rivals = list[tuple[str, Config, str]]  # label, configuration, and a peer's clone with its options


def race(rivals: Rivals, options: dict[str, Any]) -> tuple[dict[str, dict], list[list[dict]]]:
    """What each contestant is, and its figures of each turn.

    Args:
        rivals: the first is CONFIG. One with a peer trains by the peer's own train.py.

    Raises:
        UserError: a wrong flag or corpus, a peer that is not there, a program that fails.
    """
    target, rates = number("--target", options["target"]), read_rates(options["rates"], rivals)
    config = rivals[0][1]
    if config.data.mixture or config.data.format != "text" or not config.train.max_steps:
        raise ConfigError("time-to-loss takes data.format = text, no mixture, and train.max_steps")
    from peers import clone_file  # torch takes seconds

    from tools import measure

    for _, _, peer in rivals:
        if peer:
            clone_file(peer, "train.py")
    about: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="race-") as scratch:
        shared = prepare(rivals, scratch)
        print(f"tokenizer and dataset, which all share: {shared:.1f} s", flush=True)
        with measure.judge(config) as judge:
            racers = [racer(*rival, rates, judge, scratch) for rival in rivals]
            found = search_in_turns(racers, target, options["first"], options["limit"])
            turns = [found]
            for _ in range(options["repeats"] - 1):
                turns.append([again(*one, target) for one in zip(racers, found, strict=True)])
    tokens = config.data.seq_len * config.train.global_batch_size
    for one, run in zip(racers, found, strict=True):
        about[one.label] = {"parameters": run.parameters, "rate": run.rate, "steps": run.steps}
        if run.bits > target:
            about[one.label]["not reached"] = f"{run.bits:.4f} bits per byte; raise --limit"
    return about, [[figures(run, target, tokens, shared) for run in turn] for turn in turns]


def number(flag: str, text: str) -> float:
    """A number above 0 that a flag gives; ConfigError if it is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{flag}: a number above 0, not {text!r}")
    return value


def read_rates(text: str, rivals: Rivals) -> dict[str, list[float]]:
    """Learning rates by label, from `LABEL:RATE[/RATE…],…`."""
    found, labels = {}, [label for label, _, _ in rivals]
    for part in text.split(",") if text != "LABEL:RATE/RATE" else []:
        label, _, listed = part.rpartition(":")
        if label not in labels:
            raise ConfigError(f"--rates: no contestant is {label!r}; there are {', '.join(labels)}")
        found[label] = sorted(number("--rates", rate) for rate in listed.split("/"))
    return found


def prepare(rivals: Rivals, scratch: str) -> float:
    """Makes tokenizer and dataset from the raw text, in scratch; seconds that both took."""
    config = rivals[0][1]
    config.data = hub.local_sources(config.data)
    for _, one, _ in rivals:
        one.tokenizer.path, one.data.dir = f"{scratch}/tokenizer.model", f"{scratch}/data"
    programs = ("train_tokenizer.py", "prepare.py")
    return sum(launch(program, config, scratch)[-1][0] for program in programs)


def racer(
    label: str, config: Config, peer: str, rates: dict, judge: Callable, scratch: str
) -> Racer:
    """Rocket on a configuration, or a peer by its own code in a folder with its own data format."""
    own = PEER_RATES if re.split("[ :]", label)[0] in RECIPES else [config.optimizer.learning_rate]
    swept = rates.get(label, own)
    if not peer:
        return Racer(label, swept, functools.partial(train_rocket, config, judge))
    from peers import lay_out

    folder = Path(tempfile.mkdtemp(dir=scratch))
    lay_out(peer, config, folder)
    return Racer(label, swept, functools.partial(train_peer, peer, config, judge, folder))


def train_rocket(config: Config, judge: Callable, rate: float, steps: int) -> Trained:
    """A run of rocket.py: warm-up keeps its share of the steps, and one batch is evaluated."""
    from tools.measure import trained_rocket

    config = copy.deepcopy(config)
    train, optimizer = config.train, config.optimizer
    optimizer.warmup_steps = round(steps * optimizer.warmup_steps / train.max_steps)
    optimizer.learning_rate, train.max_steps, train.log_interval = rate, steps, max(1, steps // 10)
    train.eval_interval = train.sample_prompts = config.checkpoint.interval = 0
    train.eval_sequences = train.global_batch_size
    with tempfile.TemporaryDirectory() as scratch:
        train.out_dir = f"{scratch}/run"
        lines = launch("rocket.py", config, scratch)
        bits, parameters = judge(functools.partial(trained_rocket, config))
    marks = [
        (int(found[1]), at)
        for at, line in lines
        if (found := re.match(r"step (\d+)/.*\| lr", line))
    ]
    return Trained(rate, steps, bits, parameters, *split(marks), lines[-1][0])


def train_peer(
    peer: str, config: Config, judge: Callable, folder: Path, rate: float, steps: int
) -> Trained:
    """A run of a peer's train.py, which evaluates two batches and saves its weights at the end."""
    from peers import train_command, trained_peer

    command = train_command(
        peer, config, rate, steps, round(steps * WARM_UP[peer.partition(":")[0]])
    )
    lines = timed(peer.partition(":")[0], command, cwd=folder)
    bits, parameters = judge(functools.partial(trained_peer, peer, folder))
    # "iter 0: loss 7.6 …" and "0 | loss 7.6 …", after the first step
    found = [(re.match(r"(?:iter )?(\d+)(?:: | \| )loss", line), at) for at, line in lines]
    marks = [(int(match[1]) + 1, at) for match, at in found if match]
    return Trained(rate, steps, bits, parameters, *split(marks), lines[-1][0])


def split(marks: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds before the first step and of a step, from steps done and when they were."""
    (first, begun), (last, ended) = marks[0], marks[-1]
    step = (ended - begun) / (last - first)
    return begun - first * step, step


def again(racer: Racer, run: Trained, target: float) -> Trained:
    """The same run once more, if it reached the target."""
    return racer.train(run.rate, run.steps) if run.bits <= target else run


def search_in_turns(racers: list[Racer], target: float, first: int, limit: int) -> list[Trained]:
    """Each one's shortest run that reaches the target, or its best; they take turns, since a
    machine's speed drifts."""
    searches = [search(one, target, first, limit) for one in racers]
    found: list[Trained] = [next(one) for one in searches]
    waiting = dict(enumerate(searches))
    while waiting:
        for index, one in list(waiting.items()):
            try:
                found[index] = next(one)
            except StopIteration:
                del waiting[index]
    return found


def search(racer: Racer, target: float, first: int, limit: int) -> Iterator[Trained]:
    """The best run so far, after each run; the first is the best of a sweep."""

    def run(rate: float, steps: int) -> Trained:
        found = racer.train(rate, steps)
        what = f"{racer.label}: rate {rate:.2g}, {steps:,} steps"
        print(f"{what}: {found.bits:.4f} bits per byte, {found.total:.1f} s", flush=True)
        return found

    def rank(one: Trained) -> tuple[bool, float]:
        return one.bits > target, one.bits if one.bits > target else one.steps

    best = sweep(functools.partial(run, steps=first), racer.rates)
    runs = {first: best.bits}
    longest = max(first, int((limit - best.start) / best.step))
    yield best
    while steps := next_length(runs, target, longest):
        found = run(best.rate, steps)
        runs[steps] = found.bits
        best = min(best, found, key=rank)
        yield best


def sweep(run: Callable[[float], Trained], rates: list[float]) -> Trained:
    """The run with the best rate; where that is the lowest or the highest of several, half or twice
    it is tried as well."""
    runs = {rate: run(rate) for rate in rates}
    while True:
        best = min(runs, key=lambda rate: runs[rate].bits)
        further = {min(runs): best / 2, max(runs): best * 2}.get(best)
        if len(runs) == 1 or not further:
            return runs[best]
        runs[further] = run(further)


def next_length(runs: dict[int, float], target: float, longest: int) -> int | None:
    """The number of steps to try next, or None: the shortest run is found, or longest is too short.

    Loss is taken as a straight line in the logarithm of the steps.

    Args:
        runs: bits per byte by steps.
    """
    high = min((steps for steps, bits in runs.items() if bits <= target), default=None)
    low = max((steps for steps in runs if steps < (high or math.inf)), default=None)
    if high and (runs[high] > target - WITHIN or (low and high < low * NEAR)):
        return None
    near = sorted(runs, key=lambda steps: abs(runs[steps] - target))[:2]
    slope, (at, *other) = SLOPE, near
    if other and math.log2(at / other[0]):
        slope = (runs[at] - runs[other[0]]) / math.log2(at / other[0])
    slope = slope if slope < SLOPE / 10 else SLOPE  # two runs can differ by noise alone
    guess = at * 2 ** ((target - WITHIN / 2 - runs[at]) / slope)
    lowest = low * NEAR**0.5 if low else high / LARGEST_STEP
    highest = high / NEAR**0.5 if high else low * LARGEST_STEP
    guess = min(longest, round(min(max(guess, lowest), highest)))
    return guess if guess >= 20 and guess not in runs else None


def figures(run: Trained, target: float, tokens: int, shared: float) -> dict[str, float]:
    """Of a run, with tokens a step; without times where the target is not reached."""
    loss = {"loss bits/byte": run.bits}
    if run.bits > target:
        return loss
    steps = run.steps * run.step
    return {
        "from raw text s": shared + run.total,
        "run s": run.total,
        "start s": run.start,
        "steps s": steps,
        "end s": run.total - run.start - steps,
        "tokens k": run.steps * tokens / 1000,
        "token µs": 1e6 * run.step / tokens,
        **loss,
    }


@contextlib.contextmanager
def running(label: str, command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Python in a process whose output is read; UserError with its last line where it fails."""
    options |= {"args": [sys.executable, *command], "stdout": subprocess.PIPE}
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(stderr=errors, **options) as process:
            yield process
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["it was killed"]
            message = said[-1].removeprefix(f"{Path(command[0]).name}: error: ")
            raise UserError(f"{label}: {message}")


def timed(label: str, command: list[str], **options: Any) -> Lines:
    """What Python printed, and its end as an empty line."""
    options |= {"text": True, "encoding": "utf-8", "env": os.environ | {"PYTHONUNBUFFERED": "1"}}
    start = time.perf_counter()
    with running(label, command, **options) as process:
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
    return [*lines, (time.perf_counter() - start, "")]


def launch(program: str, config: Config, scratch: str, *flags: str) -> Lines:
    """Runs a program of Rocket on a configuration."""
    path = Path(scratch, "config.toml")
    path.write_text(dump_toml(config), encoding="utf-8")
    return timed(program, [str(ROOT / program), str(path), *flags])
