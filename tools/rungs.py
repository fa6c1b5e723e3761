"""The small runs of a ladder: which there are, how long they take, and how they are trained."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from config import (
    ROOT,
    Config,
    UserError,
    available_cores,
    build_config,
    dump_toml,
    read_json,
    resolve_path,
    tables,
    write_atomically,
)
from slurm.attempts import is_alive
from tools import law
from tools.memory import flops_per_token

DECAY = 0.2  # of each length; 2405.18392 finds it as good as a cosine
SIZES, MIN_SIZES, MIN_LENGTHS, MIN_RUNGS = 4, 3, 3, 7
LENGTHS = 8  # of a size, at most
FIRST = 6  # intervals after which the shortest length leaves its trunk (see Ladder)
# Of the widest size, at least: fewer, and the sizes hardly differ.
TOKENS_PER_PARAMETER = 1.25
# Of the shortest length, and the narrowest size that is chosen. Earlier, and if it is narrower, a
# model has not learned to use its context, and the law does not hold (docs/scaling-law.md).
MIN_STEPS, MIN_TOKENS, NARROWEST = 1000, 5e6, 96
SPAN = 10  # parameters of the largest size over the smallest: a wide ladder predicts best
MARGIN = 0.9  # of the ladder's share is planned: measured speeds vary
MEASURED_STEPS = 60
VERSION = 2  # of plan.json
Json = dict[str, Any]


class Speed(NamedTuple):
    """Seconds that a run takes on this machine while as many run as will: to start, and for a step
    of given FLOPs."""

    start: float
    step: float  # of a step, at whatever size
    flops: float  # per second, beyond that

    def seconds(self, steps: float, flops: float) -> float:
        """Of steps, each of so many FLOPs, without the start."""
        return steps * (self.step + flops / self.flops)


class Rung(NamedTuple):
    name: str
    width: int
    steps: int
    config: Config


@dataclass(frozen=True)
class Ladder:
    """What is trained.

    Attributes:
        base: the configuration that all runs share.
        interval: steps between a trunk's checkpoints. Branches leave at 6, 7, 8 … intervals, and
            decay over the last fifth of their lengths.
        lengths: of a size, at most.
    """

    out: Path
    base: Config
    widths: list[int]
    interval: int
    lengths: int
    seeds: int
    at_once: int
    speed: Speed
    hours: float
    share: float

    def chain(self, width: int, seed: int) -> list[Rung]:
        """The runs of a size: the trunk, which is the longest length, and then its branches."""
        interval, trunk, found = self.interval, "", []
        for leaves_at in reversed(range(FIRST, self.longest(width) + 1)):
            steps = 5 * interval * leaves_at // 4
            name = f"dim{width}-steps{steps}" + f"-seed{seed}" * (self.seeds > 1)
            leaves = f"{trunk}/checkpoints/step_{interval * leaves_at:08}" if trunk else ""
            trunk = trunk or str(self.out / name)
            changed = {
                "train.max_steps": steps,
                "train.seed": seed,
                "train.out_dir": str(self.out / name),
                "train.branch_from": leaves,
                "checkpoint.interval": interval,
                # a trunk keeps all, from which branches leave; each interruption adds one
                "checkpoint.keep_last": 1 if leaves else 1000,
            }
            config = changed_config(self.base, changed | family(width))
            found.append(Rung(name, width, steps, config))
        return found

    def longest(self, width: int) -> int:
        """After how many intervals the longest run of a size begins to decay.

        All sizes have the same lengths: what size brings is seen at equal length, and what length
        brings at equal size. But no run costs more than the widest size at the shortest length. So
        the rungs reach far in both for what the dearest of them costs.
        """
        this, dearest = (
            step_flops(changed_config(self.base, family(one))) for one in (width, max(self.widths))
        )
        return min(FIRST + self.lengths - 1, int(FIRST * dearest / this + 1e-9))

    def count(self) -> int:
        """Of all runs."""
        return self.seeds * sum(self.longest(width) - FIRST + 1 for width in self.widths)

    def most(self) -> int:
        """Lengths of the narrowest size, which has most."""
        return self.longest(min(self.widths)) - FIRST + 1

    def is_enough(self) -> bool:
        """Whether a fit is possible, if no run fails."""
        return self.count() >= MIN_RUNGS and self.most() >= MIN_LENGTHS

    def chains(self) -> list[list[Rung]]:
        """All runs, the dearest size first."""
        seeds = range(self.base.train.seed, self.base.train.seed + self.seeds)
        every = (self.chain(width, seed) for seed in seeds for width in self.widths)
        return sorted(every, key=self.seconds, reverse=True)

    def seconds(self, chain: list[Rung]) -> float:
        """Predicted time of a size: its starts, its steps, its evaluations."""
        trunk = chain[0]
        flops = step_flops(trunk.config)
        steps = trunk.steps + DECAY * sum(rung.steps for rung in chain[1:])
        evaluated = evaluated_tokens(trunk.config) / 3 / batch_tokens(trunk.config)
        steps += evaluated * len(chain)  # a forward pass is a third of the work
        return self.speed.start * len(chain) + self.speed.seconds(steps, flops)

    def total(self) -> float:
        """Predicted seconds until all is trained: each of at_once workers takes the next size."""
        workers = [0.0] * self.at_once
        for chain in self.chains():
            workers[workers.index(min(workers))] += self.seconds(chain)
        return max(workers)


# ---- configurations


def changed_config(config: Config, values: Json) -> Config:
    """A configuration with other values, by section.key."""
    new = tables(config)
    for key, value in values.items():
        section, _, name = key.partition(".")
        new[section][name] = value
    return build_config(new)


def family(width: int) -> Json:
    """The keys of a member of the family of shapes."""
    return {f"model.{name}": value for name, value in law.shape(width).items()}


def base_config(config: Config, warmup: int) -> Config:
    """What all rungs share. CONFIG's learning rate is taken as right for CONFIG's shape, unless it
    names another base."""
    model = config.model
    base = {
        "model.base_dim": model.base_dim or model.dim,
        "model.base_layers": model.base_layers or model.n_layers,
        "optimizer.schedule": "wsd",
        "optimizer.decay_fraction": DECAY,
        "optimizer.warmup_steps": warmup,
        "train.max_steps": 0,
        "train.epochs": 0.0,
        "train.stop_at_step": 0,
        "train.init_from": "",
        "train.eval_interval": 0,
        "train.sample_prompts": 0,
        "train.patience": 0,
        "checkpoint.keep_best": 0,
        "checkpoint.interval_minutes": 0.0,
        "log.report": False,
    }
    return changed_config(config, base)


def batch_tokens(config: Config) -> int:
    return config.train.global_batch_size * config.data.seq_len


def step_flops(config: Config) -> float:
    return batch_tokens(config) * flops_per_token(config)


def vocabulary(config: Config) -> int:
    return config.tokenizer.vocab_size


def split_tokens(config: Config, split: str) -> int:
    """Tokens of a split of the prepared datasets; of a training split, those of an epoch.

    Raises:
        UserError: one is not prepared, or none of them has this split.
    """
    shares, found = config.data.mixture or {config.data.dir: 1.0}, {}
    for name in shares:
        path = resolve_path(name) / "manifest.json"
        if not (manifest := read_json(path)):
            raise UserError(f"{path}: no prepared dataset; run prepare.py")
        shards = manifest["splits"].get(split, {}).get("shards", [])
        found[name] = sum(shard["tokens"] for shard in shards)
    if not sum(found.values()):
        raise UserError(f"{' and '.join(found)}: no {split} split; see data.val_fraction")
    if split != "train":
        return sum(found.values())
    return int(law.epoch_tokens(found, shares))


def evaluated_tokens(config: Config) -> int:
    """Tokens of the validation split that an evaluation reads."""
    asked = config.train.eval_sequences * config.data.seq_len
    return min(asked or math.inf, split_tokens(config, "val"))


# ---- the plan


def devices() -> int:
    """GPUs that this process sees; 0 without a driver."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len(visible.split(",")) if visible else 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return listed.stdout.count("GPU ")


def new_ladder(config: Config, options: Json, out: Path) -> Ladder:
    """Plans a ladder that takes less than its share of the hours.

    Raises:
        UserError: no hours are given, or they or the text are too little.
    """
    if "hours" not in options:
        raise UserError("give --hours: what this machine has for the ladder and the large run")
    share, sizes = options.get("share", 0.25), options.get("sizes")
    count = options.get("seeds", 1) * len(sizes or range(SIZES))
    at_once = min(count, options.get("at-once") or devices() or available_cores())
    speed = Speed(60.0, 0.0, options.get("flops", 0.0))  # a start in a job, with compilation
    if not speed.flops:
        ends = sizes or (NARROWEST, min(max(2 * NARROWEST, config.model.dim // 64 * 64), 512))
        speed = measure(config, (ends[0], ends[-1]), at_once)
    empty = Ladder(
        out=out,
        base=config,
        widths=sizes or [],
        interval=0,
        lengths=options.get("lengths", LENGTHS),
        seeds=options.get("seeds", 1),
        at_once=at_once,
        speed=speed,
        hours=options["hours"],
        share=share,
    )

    def possible() -> Iterator[Ladder]:
        every = [sizes] if sizes else families(vocabulary(config))
        return filter(Ladder.is_enough, (dataclasses.replace(empty, widths=w) for w in every))

    smallest = next(possible(), None)
    if not smallest:
        raise UserError(
            f"{empty.count()} runs, of at most {empty.most()} lengths, are too few for the fit:"
            f" it needs {MIN_RUNGS}, of {MIN_LENGTHS} lengths, and no run costs more than the"
            f" shortest of dim {empty.widths[-1]}. Give --sizes that are further apart, or more"
            " --lengths or --seeds"
        )
    ladders = (fill(one, least_steps(one, bool(sizes))) for one in possible())
    ladder = next(reversed([*itertools.takewhile(bool, ladders)]), None)
    if not ladder:
        raise too_little(smallest, least_steps(smallest, bool(sizes)))
    return ladder


def least_steps(ladder: Ladder, given: bool) -> int:
    """Steps of the shortest length, at least; enough for the widest size, unless it is given."""
    widest = changed_config(ladder.base, family(max(ladder.widths)))
    enough = TOKENS_PER_PARAMETER * law.parameters(widest, vocabulary(widest))
    tokens = max(MIN_TOKENS, 0 if given else enough)
    return max(MIN_STEPS, math.ceil(tokens / batch_tokens(ladder.base)))


def fill(ladder: Ladder, least: int) -> Ladder | None:
    """The ladder with lengths as long as its time and text allow. None if its shortest length would
    have fewer steps than least."""
    seconds = MARGIN * 3600 * ladder.hours * ladder.share
    intervals = range(1, most_interval(ladder) + 1)
    found = bisect.bisect(intervals, seconds, key=lambda one: spaced(ladder, one).total())
    return spaced(ladder, found) if 5 * FIRST * found >= least else None


def too_little(ladder: Ladder, least: int) -> UserError:
    """What is too little for a shortest length of so many steps, text or time."""
    interval, most = math.ceil(least / (5 * FIRST)), most_interval(ladder)
    if interval > most:
        return UserError(
            f"in {law.MAX_EPOCHS} epochs of the text, the shortest of {ladder.most()} lengths has"
            f" {5 * FIRST * most:,} steps; it needs {least:,}: take more text, or fewer --lengths"
        )
    seconds = spaced(ladder, interval).total() / MARGIN
    return UserError(
        f"--hours={ladder.hours:g} × --share={ladder.share:g} are too few for {len(ladder.widths)}"
        f" sizes of {least:,} steps and more, which take {seconds / 60:,.1f} minutes: give"
        f" --hours={math.ceil(seconds / 36 / ladder.share) / 100:g} or a larger --share"
    )


def most_interval(ladder: Ladder) -> int:
    """The interval, as in spaced, with which the longest trunk takes all epochs that it may."""
    epoch = split_tokens(ladder.base, "train") / batch_tokens(ladder.base)  # in steps
    trunk = 5 / 4 * max(map(ladder.longest, ladder.widths))  # in intervals
    return int(law.MAX_EPOCHS * epoch / trunk / 4)


def spaced(ladder: Ladder, interval: int) -> Ladder:
    """With intervals of so many times 4 steps; a tenth of the shortest length warms up."""
    base = base_config(ladder.base, warmup=FIRST * interval // 2)
    return dataclasses.replace(ladder, base=base, interval=4 * interval)


def measure(config: Config, widths: tuple[int, int], at_once: int) -> Speed:
    """Trains a few steps of two sizes, as many runs at a time as the ladder will."""
    print(f"measures {MEASURED_STEPS} steps of dim {widths[0]} and {widths[1]}", flush=True)
    with TemporaryDirectory() as folder:
        chains = []
        for index in range(2 * max(1, at_once // 2)):
            width, chain = widths[index % 2], []
            # The first run fills caches, of files and kernels, that most rungs find filled.
            lengths = {f"{index}-cold": MEASURED_STEPS // 3, str(index): MEASURED_STEPS}
            for name, steps in lengths.items():
                values = {
                    "train.max_steps": steps,
                    "train.out_dir": f"{folder}/{name}",
                    "train.eval_sequences": config.train.global_batch_size,
                    "train.log_interval": MEASURED_STEPS // 3,
                }
                sized = changed_config(base_config(config, 1), values | family(width))
                chain.append(Rung(name, width, steps, sized))
            chains.append(chain)
        write_configs(Path(folder), chains)
        ended = {}
        for name, error in Workers(Path(folder), at_once).train(chains):
            if error:
                width = widths[int(name.partition("-")[0]) % 2]
                raise UserError(f"a run of dim {width} could not be measured: {error}")
            ended[name] = time.monotonic()
        rungs = [rung for _, rung in chains]
        seconds = [ended[rung.name] - ended[f"{rung.name}-cold"] for rung in rungs]
        steps = []
        for rung in rungs:
            rows = [row for row in read_rows(Path(folder) / rung.name) if "loss" in row]
            steps.append(batch_tokens(config) / rows[-1]["tokens_per_second"])
    steps = [statistics.mean(steps[end::2]) for end in (0, 1)]
    flops = [step_flops(rung.config) for rung in rungs[:2]]
    rate = max(1.0, flops[1] - flops[0]) / max(1e-9, steps[1] - steps[0])
    fixed = max(0.0, steps[0] - flops[0] / rate)
    start = min(seconds) - MEASURED_STEPS * min(steps)
    return Speed(max(1.0, start), fixed, rate)


def read_rows(directory: Path) -> list[Json]:
    """The rows of a run's metrics; the last one only if it is whole, since a run may be writing."""
    path = directory / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def families(vocab_size: int) -> Iterator[list[int]]:
    """Sets of about SIZES widths, by their largest: from 1/SPAN of its parameters."""
    sizes = {
        width: law.parameters(build_config({"model": law.shape(width)}), vocab_size)
        for width in law.WIDTHS
        if width >= NARROWEST
    }
    for largest in sizes:
        smallest = next(width for width in sizes if SPAN * sizes[width] >= sizes[largest])
        steps = [(largest / smallest) ** (index / (SIZES - 1)) for index in range(SIZES)]
        near = {min(law.WIDTHS, key=lambda w: abs(w - smallest * step)) for step in steps}
        if len(near) >= MIN_SIZES:
            yield sorted(near)


def write_configs(out: Path, chains: list[list[Rung]]) -> None:
    """Writes NAME.toml for each run, which rocket.py takes as it is."""
    for rung in itertools.chain(*chains):
        write_atomically(out / f"{rung.name}.toml", dump_toml(rung.config).encode())


def write_plan(ladder: Ladder) -> None:
    """Writes the runs' configurations, and OUT/plan.json, by which the command goes on."""
    ladder.out.mkdir(parents=True, exist_ok=True)
    write_configs(ladder.out, ladder.chains())
    plan = {
        name: getattr(ladder, name)
        for name in ("widths", "interval", "lengths", "seeds", "at_once", "speed", "hours", "share")
    }
    plan |= {"version": VERSION, "base": tables(ladder.base)}
    write_atomically(ladder.out / "plan.json", (json.dumps(plan, indent=1) + "\n").encode())


def read_plan(out: Path, config: Config, options: Json) -> Ladder | None:
    """The ladder of a directory; None if there is none.

    Raises:
        UserError: it is damaged, or was planned with other settings than these.
    """
    path = out / "plan.json"
    if (plan := read_json(path)) is None:
        return None
    try:
        if plan and plan.pop("version", 1) != VERSION:
            raise UserError(f"{path}: of another version of ladder.py; choose another --out")
        base = build_config(plan.pop("base"))
        ladder = Ladder(out=out, base=base, **plan | {"speed": Speed(*plan["speed"])})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: damaged; delete it, or choose another --out") from None
    ours = tables(base_config(config, base.optimizer.warmup_steps))
    other = [
        f"{section}.{name} = {before}, not {value}"
        for section, table in ours.items()
        for name, value in table.items()
        if value != (before := tables(base)[section].get(name))
        and name not in (*law.shape(32), "out_dir")
    ]
    was = {"sizes": ladder.widths, "flops": ladder.speed.flops}
    was |= {name: getattr(ladder, name) for name in ("hours", "share", "lengths", "seeds")}
    other += [f"--{k}={was[k]}, not {v}" for k, v in options.items() if k in was and was[k] != v]
    if other:
        raise UserError(f"{out} holds a ladder with {', '.join(other)}: choose another --out")
    return dataclasses.replace(ladder, at_once=options.get("at-once", ladder.at_once))


# ---- training


class Workers:
    """Runs of rocket.py, some at a time, each with its GPU or its share of the cores."""

    def __init__(self, out: Path, at_once: int) -> None:
        self.out, self.at_once = out, at_once
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(at_once):
            self.slots.put(slot)
        self.running: set[subprocess.Popen] = set()
        self.stopping = False

    def train(self, chains: list[list[Rung]]) -> Iterator[tuple[str, str]]:
        """Trains the runs of each chain in order; yields name and error ("" if none) of each as it
        ends. Without its trunk no branch is trained. Interrupted, the runs save and stop."""
        ended: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

        def work(chain: list[Rung]) -> None:
            slot, failed = self.slots.get(), ""
            for rung in chain:
                try:
                    error = f"{failed} did not finish" if failed else self.one(rung, slot)
                except OSError as problem:  # a full disk
                    error = str(problem)  # unsaid, the loop below would wait for ever
                failed = failed or (rung.name if error and rung is chain[0] else "")
                ended.put((rung.name, error))
            self.slots.put(slot)

        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                for chain in chains:
                    pool.submit(work, chain)
                for _ in itertools.chain(*chains):
                    yield ended.get()
            finally:
                self.stopping = True
                for process in list(self.running):
                    process.terminate()

    def one(self, rung: Rung, slot: int) -> str:
        """Trains a run, unless it is finished; returns its error."""
        if self.stopping:
            return "stopped"
        if state(self.out / rung.name) == "finished":
            return ""
        path = self.out / f"{rung.name}.toml"
        threads = max(1, available_cores() // self.at_once)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if gpus := devices():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
        with open(self.out / f"{rung.name}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "rocket.py"), str(path)],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        if code == 0:
            return ""
        said = (self.out / f"{rung.name}.log").read_text(errors="replace").splitlines()
        errors = [line.partition("error: ")[2] for line in said if "error: " in line]
        return errors[-1] if errors else f"exit code {code}; see {rung.name}.log in {self.out}"


def state(directory: Path) -> str:
    """What status.json says of a run: finished, failed, stopped …, or "not trained"."""
    try:
        status = read_json(directory / "status.json") or {}
    except OSError:
        return "not readable"
    if status.get("state") == "running":
        return "still being trained" if is_alive(directory) else "killed; the same command goes on"
    if status.get("state") == "failed":
        return f"failed at step {status.get('step')}: {status.get('reason')}"
    return str(status.get("state", "not trained"))


def train(ladder: Ladder) -> None:
    """Trains what is not finished, and prints how far it is."""
    chains, started = ladder.chains(), time.monotonic()
    count = sum(map(len, chains))
    workers = Workers(ladder.out, ladder.at_once)
    for index, (name, error) in enumerate(workers.train(chains), 1):
        loss = final_loss(ladder.out / name)
        told = error or (f"validation loss {loss:.4f}" if loss else "no validation loss")
        minutes = (time.monotonic() - started) / 60
        print(f"[{index}/{count}, {minutes:.1f} min] {name}: {told}", flush=True)


def final_loss(directory: Path) -> float | None:
    """The validation loss at a run's end."""
    rows = [row for row in read_rows(directory) if "val_loss" in row]
    return rows[-1]["val_loss"] if rows and state(directory) == "finished" else None
