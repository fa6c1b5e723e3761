"""Plans a training before there is a job: what fits on the GPUs, how long it takes, what it costs.

    python tools/plan.py CONFIG --gpus=64 --gpu=h100 [--mfu=0.4] [--section.key=value …]
    python tools/plan.py --hours=24 --gpus=8 --gpu=h100 --data=data/mine [--write=config/mine.toml]

With a budget of hours in place of CONFIG, it chooses the whole configuration and writes it with the
reasons (dial.py). With CONFIG, it needs no GPU and no dataset: it recommends a strategy, what to
recompute and a micro-batch for the global batch of CONFIG, and says why. How good its figures are:
docs/planning.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from config import (
    PEAK_FLOPS,
    Config,
    ConfigError,
    UserError,
    load_config,
    read_json,
    resolve_path,
    run_program,
)
from tools import memory
from tools.memory import FP32, PARTS, Memory, Setup, sizes

# Memory in GiB (what nvidia-smi shows is a little less), and the name in PEAK_FLOPS.
GPUS = {
    "h200": (141e9, "H200"),
    "h100": (80 * 2**30, "H100"),
    "h100-pcie": (80 * 2**30, "H100 PCIe"),
    "a100-80": (80 * 2**30, "A100"),
    "a100-40": (40 * 2**30, "A100"),
    "l40s": (48e9, "L40S"),
    "a10": (24e9, "A10"),
    "a10g": (24e9, "A10G"),
    "rtx4090": (24e9, "RTX 4090"),
}
FLAGS = {
    "--gpus=8": "GPUs of the job",
    "--gpu=h100": f"their kind: {', '.join(GPUS)}; cpu: this machine's ranks",
    "--gpus-per-node=8": "GPUs of a node",
    "--nodes=N": "nodes, instead of --gpus",
    "--gpu-memory-gb=GB": "memory of a GPU (10^9 bytes), where the table is wrong",
    "--gpu-tflops=TFLOPS": "dense bfloat16 TFLOP/s of a GPU, where the table is wrong",
    "--mfu=0.4": "share of these TFLOP/s that training reaches when it recomputes nothing;"
    " published runs: 0.39 to 0.46 (H100)",
    "--json": "the figures as JSON",
    "--hours=24": "a budget of hours in place of CONFIG: chooses the configuration",
    "--gpu-hours=192": "the same budget for all GPUs together",
    "--data=DIR": "with a budget: the prepared dataset",
    "--fit=FILE": "with a budget: the scaling law that ladder.py fitted to this text",
    "--write=FILE": "with a budget: where the configuration goes, such as config/mine.toml",
}
# Published for H100: llm-foundry 0.40 to 0.46 (7B, 13B), torchtitan 0.39 (8B); docs/planning.md.
DEFAULT_MFU = 0.4
# Bytes per second that a GPU gets out of NVLink and a 400 Gbit/s card: assumptions for ranking.
INSIDE_NODE, BETWEEN_NODES = 200e9, 40e9
# Time of a step with recomputation: measured on a CPU (docs/performance.md), and one more forward
# pass for each forward and backward, 4/3, as llm-foundry's HFU counts it.
RECOMPUTE_COST = {"none": 1.0, "selective": 1.1, "block": 4 / 3}
GPU_SLACK = 0.05  # of a GPU's memory that the allocator loses to fragments; an estimate
MEMORY_ERROR = 0.1  # the largest relative error of predicted memory; docs/planning.md
FITS, TIGHT, TOO_LARGE = "fits", "is tight: may not fit", "does not fit"
COUNTS = ("gpus", "nodes", "gpus-per-node")  # flags that count something
LONG_DAYS = 60  # few people mean a plan for more days
Facts = dict[str, Any]
COLUMNS = "weight grads optim. activ. loss comm. fixed total".split()  # PARTS, and their sum


@dataclass(frozen=True)
class Cluster:
    """What a job gets."""

    name: str
    gpus: int
    per_node: int
    memory: float  # bytes per GPU for tensors and the overhead
    flops: float | None  # per second of a GPU, dense bfloat16
    mfu: float

    @property
    def nodes(self) -> int:
        return self.gpus // self.per_node


@dataclass(frozen=True)
class Option:
    """A way to train, and what it takes."""

    setup: Setup
    moment: str  # of its peak
    memory: Memory
    fit: str  # FITS, TIGHT or TOO_LARGE
    cost: float  # time of a step relative to its arithmetic alone
    largest: int = 0  # micro-batch that fits, or may fit where it is tight

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def shape(self) -> str:
        return f"{self.setup.micro_batches} × {self.setup.micro_batch}"


def option(
    config: Config, cluster: Cluster, strategy: str, recompute: str, micro_batch: int
) -> Option:
    """A strategy with micro-batches of at most `micro_batch` sequences, cut as by
    dataset.rank_share."""
    on_gpu, train = cluster.name != "cpu", config.train
    share = -(-train.global_batch_size // cluster.gpus)
    micro_batches = -(-share // micro_batch)
    low = train.dtype == "bfloat16" or (train.dtype == "auto" and on_gpu)
    setup = Setup(
        strategy=strategy,
        recompute=recompute,
        micro_batch=-(-share // micro_batches),
        micro_batches=micro_batches,
        ranks=cluster.gpus,
        shards={"ddp": 1, "hsdp": cluster.per_node, "fsdp": cluster.gpus}[strategy],
        bytes=2 if low else FP32,
        compiled=train.compile == "on" or (train.compile == "auto" and on_gpu),
        on_gpu=on_gpu,
    )
    moment, parts = memory.peak(config, setup)
    share = sum(parts.values()) / cluster.memory
    fit = FITS if share * (1 + MEMORY_ERROR) <= 1 else TIGHT if share <= 1 else TOO_LARGE
    return Option(setup, moment, parts, fit, relative_cost(config, cluster, setup))


def relative_cost(config: Config, cluster: Cluster, setup: Setup) -> float:
    """Time of a step relative to its arithmetic: with recomputation, or of its communication if
    that takes longer, since the two overlap.

    Per parameter, FSDP2 moves 2 weights and a float32 gradient at each micro-batch; DDP and HSDP's
    replicas move a float32 gradient twice per step.
    """
    arithmetic = RECOMPUTE_COST[setup.recompute]
    if cluster.flops is None or cluster.gpus == 1:
        return arithmetic
    parameters, seq_len = sizes(config).total, config.data.seq_len
    inside, between = 1 / INSIDE_NODE, 1 / (BETWEEN_NODES if cluster.nodes > 1 else INSIDE_NODE)
    replicas = 2 * FP32 * parameters / setup.shards * between
    shards, times = (2 * setup.bytes + FP32) * parameters, setup.micro_batches
    moving = {
        "ddp": replicas,
        "hsdp": replicas + times * (shards * inside),
        "fsdp": times * (shards * between),
    }
    flops = times * setup.micro_batch * seq_len * memory.flops_per_token(config)
    seconds = flops / (cluster.flops * cluster.mfu)
    return max(arithmetic, moving[setup.strategy] / seconds)


def best_micro_batch(config: Config, cluster: Cluster, strategy: str, recompute: str) -> Option:
    """Of the options that fit (else may fit), the one with the fewest filler sequences and then
    the largest micro-batch; if there is none, the one with a single sequence."""
    share = -(-config.train.global_batch_size // cluster.gpus)
    sizes_tried = sorted({-(-share // parts) for parts in range(1, share + 1)}, reverse=True)
    tried = [option(config, cluster, strategy, recompute, size) for size in sizes_tried]
    fitting = safest(tried)
    if not fitting:
        return tried[-1]
    best = min(fitting, key=lambda one: (one.setup.sequences, one.setup.micro_batches))
    return dataclasses.replace(best, largest=fitting[0].setup.micro_batch)


def safest(found: list[Option]) -> list[Option]:
    """The options that fit; where none does, those that may."""
    return [one for one in found if one.fit == FITS] or [one for one in found if one.fit == TIGHT]


def options(config: Config, cluster: Cluster) -> list[Option]:
    """All strategies that this cluster has, in order of growing communication."""
    strategies = ["ddp"]
    if cluster.gpus > 1:
        strategies += ["hsdp", "fsdp"] if cluster.nodes > 1 and cluster.per_node > 1 else ["fsdp"]
    return [best_micro_batch(config, cluster, s, r) for s in strategies for r in RECOMPUTE_COST]


def recommended(found: list[Option]) -> Option | None:
    """The cheapest of the safest options; of costs within 2%, the earlier one."""
    fitting = safest(found)
    least = min((one.cost for one in fitting), default=0.0)
    return next((one for one in fitting if one.cost <= 1.02 * least), None)


def run_steps(config: Config) -> tuple[int, list[str]]:
    """Steps of the run, and a line per dataset on how many epochs they are.

    Raises:
        UserError: the length is not set, or depends on a dataset that is not prepared.
    """
    train, data = config.train, config.data
    shares = data.mixture or {data.dir: 1.0}
    windows = {name: prepared_windows(name, data.seq_len) for name in shares}
    missing = [name for name, count in windows.items() if not count]
    if not train.max_steps and not train.epochs:
        raise ConfigError("how long to train is not set: give train.max_steps or train.epochs")
    if train.epochs and missing:
        raise UserError(
            f"train.epochs = {train.epochs} needs the prepared dataset, and {missing[0]} has no"
            " manifest.json: run prepare.py, or set train.max_steps and train.epochs=0"
        )
    batch = train.global_batch_size
    steps = train.max_steps or math.ceil(train.epochs * sum(windows.values()) / batch)
    lines = []
    for name, weight in shares.items():
        lines.append(f"{name}: not prepared: epochs are not known")
        if count := windows[name]:
            epochs = steps * batch * weight / sum(shares.values()) / count
            tokens = count * data.seq_len / 1e9
            lines[-1] = f"{name}: {epochs:,.2f} epochs of {tokens:,.3f} billion tokens"
    return steps, lines


def prepared_windows(name: str, seq_len: int) -> int:
    """Training sequences of a dataset, 0 where it is not prepared (see dataset.TokenDataset)."""
    path = resolve_path(name) / "manifest.json"
    try:
        if (manifest := read_json(path)) is None:
            return 0
        tokens = sum(shard["tokens"] for shard in manifest["splits"]["train"]["shards"])
    except (OSError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; run prepare.py with --force") from None
    return max(0, tokens - ("seq_len" not in manifest)) // seq_len


# ---- command line


def read_cluster(flags: list[str]) -> Cluster:
    """The cluster of the command line.

    Raises:
        ConfigError: an unknown GPU, a value that is not a number, GPUs that don't fill the nodes.
    """
    values = dict(flag[2:].split("=", 1) for flag in flags if "=" in flag)
    name = values.pop("gpu", "h100").lower()
    given = {flag: number(flag, text) for flag, text in values.items()}
    if name not in (*GPUS, "cpu") and not {"gpu-memory-gb", "gpu-tflops"} <= given.keys():
        near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
        raise ConfigError(
            f"--gpu={name} is not known{f', did you mean {near[0]}?' if near else ','}"
            f" there are {', '.join(GPUS)} and cpu; or give --gpu-memory-gb and --gpu-tflops"
        )
    gpus, per_node = read_nodes(given)
    available, datasheet = GPUS.get(name, (0.0, ""))
    if name == "cpu":
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / per_node
    available = 1e9 * given.get("gpu-memory-gb", available / 1e9)
    available *= 1 if name == "cpu" else 1 - GPU_SLACK
    flops = 1e12 * given["gpu-tflops"] if "gpu-tflops" in given else PEAK_FLOPS.get(datasheet)
    mfu = given.get("mfu", DEFAULT_MFU)
    if mfu > 1:
        raise ConfigError(f"--mfu={mfu:g} is a share, such as 0.4, not above 1")
    return Cluster(name, gpus, per_node, available, flops, mfu)


def number(flag: str, text: str) -> float:
    """A flag's value above 0; a whole number where the flag counts something."""
    convert, kind = (int, "a whole number") if flag in COUNTS else (float, "a number")
    try:
        value = convert(text)
    except ValueError:
        value = 0
    if not 1e-6 < value < 1e9:
        raise ConfigError(f"--{flag} is {kind} above 0, not {text!r}")
    return value


def read_nodes(given: dict[str, Any]) -> tuple[int, int]:
    """GPUs of the job and GPUs per node, which divide them."""
    gpus, nodes, per_node = (given.get(flag) for flag in COUNTS)
    if gpus and nodes:
        if per_node:
            raise ConfigError("give two of --gpus, --nodes and --gpus-per-node; the third follows")
        if gpus % nodes:
            raise ConfigError(f"--gpus={gpus} can't be spread evenly over --nodes={nodes}")
        per_node = gpus // nodes
    per_node = per_node or 8
    gpus = gpus or per_node * (nodes or 1)
    per_node = min(per_node, gpus)
    if rest := gpus % per_node:
        raise ConfigError(
            f"--gpus={gpus} is not a multiple of the {per_node} GPUs of a node: give"
            f" {gpus - rest} or {gpus + per_node - rest}, or --gpus-per-node"
        )
    return gpus, per_node


def main(arguments: list[str]) -> None:
    if (
        any(a.startswith(("--hours=", "--gpu-hours=")) for a in arguments)
        and "--help" not in arguments
    ):
        from tools import dial  # which imports this file

        return dial.main(arguments)
    config, flags = load_config(arguments, usage=str(__doc__), flags=FLAGS)
    if budget := [a for a in flags if a.startswith(("--data=", "--fit=", "--write="))]:
        raise ConfigError(f"{budget[0]} goes with a budget: give --hours or --gpu-hours")
    cluster = read_cluster(flags)
    steps, epochs = run_steps(config)
    found = options(config, cluster)
    best = recommended(found)
    facts = figures(config, cluster, steps, best) | {"epochs": epochs}
    facts["warnings"] = warnings(config, cluster, facts, best) if best else []
    if "--json" in flags:
        facts["options"] = [
            dataclasses.asdict(one.setup)
            | {"memory": one.memory, "moment": one.moment, "cost": one.cost, "total": one.total}
            | {"fits": one.fit == FITS, "tight": one.fit == TIGHT, "largest": one.largest}
            for one in found
        ]
        print(json.dumps(facts, indent=1))
    else:
        parts = [*summary(config, cluster, facts), "", *table(config, cluster, found, best)]
        if best:
            for text in (why(config, cluster, best), *facts["warnings"]):
                parts += ["", *textwrap.wrap(text, 100)]
            parts += ["", launch(cluster, facts, arguments), "", *request(config, facts)]
        print(*parts, sep="\n")
    if not best:
        least = min(found, key=lambda one: one.total)
        raise UserError(
            f"nothing fits: the least is {least.setup.strategy} with recompute ="
            f" {least.setup.recompute}, {least.total / 1e9:,.1f} GB where {cluster.name} has"
            f" {cluster.memory / 1e9:,.1f} to use; {way_out(config, cluster)}"
        )


def way_out(config: Config, cluster: Cluster) -> str:
    """How many GPUs would be enough."""
    nodes = cluster.nodes
    while (nodes := 2 * nodes) * cluster.per_node <= 16_384:
        more = dataclasses.replace(cluster, gpus=nodes * cluster.per_node)
        if option(config, more, "fsdp", "block", 1).fit == FITS:
            return f"{more.gpus} of them would do, or more memory"
    return "more of them would not help: take GPUs with more memory, or a smaller model or seq_len"


# ---- figures, and the text around them


def figures(config: Config, cluster: Cluster, steps: int, best: Option | None) -> Facts:
    """The figures of the run with the recommended option, by name.

    Hours are at --mfu, times what its recomputation, communication and filler sequences cost; None
    where the FLOP/s are not known, or nothing fits.
    """
    size, keep, batch = sizes(config), config.checkpoint, config.train.global_batch_size
    flops, tokens_a_step = memory.flops_per_token(config), batch * config.data.seq_len
    tokens, checkpoint = steps * tokens_a_step, FP32 * (3 * size.total - size.muon)
    facts: Facts = {
        "parameters": size.total,
        "multiplied_parameters": size.multiplied,
        "flops_per_token": flops,
        "gpus": cluster.gpus,
        "gpu": cluster.name,
        "nodes": cluster.nodes,
        "memory_a_gpu": cluster.memory,
        "mfu": cluster.mfu,
        "slowed_by": [],
        "tokens_a_step": tokens_a_step,
        "steps": steps,
        "tokens": tokens,
        "total_flops": tokens * flops,
        "checkpoint_bytes": checkpoint,
        # one more is being written beside those that are kept
        "disk_bytes": (keep.keep_last + 1) * checkpoint + keep.keep_best * FP32 * size.total,
    }
    facts |= dict.fromkeys(("slowdown", "tokens_per_second", "hours", "gpu_hours"))
    if best:
        setup = best.setup
        facts |= {
            "strategy": setup.strategy,
            "recompute": setup.recompute,
            "micro_batch_size": setup.micro_batch,
            "micro_batches": setup.micro_batches,
            "fillers": setup.sequences - batch,
            "memory": best.memory,
        }
        fillers = setup.sequences / batch
    if best and cluster.flops:
        causes = {"recomputation and communication": best.cost, "filler sequences": fillers}
        rate = cluster.flops * cluster.mfu * cluster.gpus / (best.cost * fillers)
        facts |= {
            "slowdown": best.cost * fillers,
            "slowed_by": [name for name, factor in causes.items() if factor >= 1.005],
            "tokens_per_second": rate / flops,
            "hours": (hours := tokens * flops / rate / 3600),
            "gpu_hours": hours * cluster.gpus,
        }
    return facts


def figure(number: float) -> str:
    """A number with three digits, or all digits before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def in_billions(facts: Facts) -> dict[str, str]:
    return {k: figure(v / 1e9) for k, v in facts.items() if isinstance(v, int | float)}


def counted(config: Config) -> str:
    """What N counts in 6 N, the operations per token."""
    return f"with{'' if config.model.tie_embeddings else 'out'} the input embedding"


def summary(config: Config, cluster: Cluster, facts: Facts) -> list[str]:
    """The run in figures, a line each."""
    keep, giga = config.checkpoint, in_billions(facts)
    time = f"not known: {'give --gpu-tflops' if 'strategy' in facts else 'nothing fits'}"
    if slowdown := facts["slowdown"]:
        longer = f", and the recommended settings take {slowdown:.2f} times as long"
        time = (
            f"{figure(facts['hours'])} h at {cluster.mfu / slowdown:.0%} MFU ({cluster.mfu:.0%} is"
            f" assumed{longer if facts['slowed_by'] else ''}), {facts['tokens_per_second']:,.0f}"
            f" tokens/s: {figure(facts['gpu_hours'])} GPU-hours"
        )
    rate = f", {figure(cluster.flops / 1e12)} TFLOP/s" if cluster.flops else ""
    return [
        f"model   {figure(facts['parameters'] / 1e6)}M parameters, {giga['flops_per_token']} GFLOPs"
        f" per token (6 N + 12 L D T, N {counted(config)})",
        f"GPUs    {cluster.nodes} × {cluster.per_node} {cluster.name}: {giga['memory_a_gpu']} GB of"
        f" each to use{rate}",
        f"run     {facts['steps']:,} steps of {facts['tokens_a_step']:,} tokens: {giga['tokens']}"
        " billion tokens",
        *(f"data    {line}" for line in facts["epochs"]),
        *textwrap.wrap(f"time    {time}", 100, subsequent_indent=" " * 8),
        f"disk    {giga['disk_bytes']} GB: {giga['checkpoint_bytes']} GB per checkpoint,"
        f" {keep.keep_last} kept and one being written, {keep.keep_best} best",
    ]


def table(config: Config, cluster: Cluster, found: list[Option], best: Option | None) -> list[str]:
    """The options, a line each, under a heading, and what CONFIG itself would take."""
    heading = (
        "Peak memory per GPU in GB. most: the largest micro-batch that fits; micro: number × size"
        " of those that divide the global batch best; time: of a step, 1 where arithmetic hides"
        f" all communication (assuming {INSIDE_NODE / 1e9:.0f} GB/s per GPU in a node,"
        f" {BETWEEN_NODES / 1e9:.0f} between). * is recommended, - does not fit, ? may not fit:"
        f" the estimate can be wrong by {MEMORY_ERROR:.0%}."
    )
    columns = "".join(f"{column:>7}" for column in COLUMNS)
    lines = [
        *textwrap.wrap(heading, 100),
        f"  {'':<5}{'recompute':<10}{'most':>5}{'micro':>9}{'time':>7}{columns}",
    ]
    for one in found:
        mark = "*" if one is best else {FITS: " ", TIGHT: "?", TOO_LARGE: "-"}[one.fit]
        digits = 2 if one.total < 100e9 else 1
        lines.append(
            f"{mark} {one.setup.strategy:<5}{one.setup.recompute:<10}{one.largest:>5}"
            f"{one.shape:>9} {one.cost:6.2f}"
            + "".join(f" {one.memory[part] / 1e9:6.{digits}f}" for part in PARTS)
            + f" {one.total / 1e9:6.{digits}f}"
        )
    strategy, recompute = config.parallel.strategy, config.train.recompute
    own = option(config, cluster, strategy, recompute, config.train.micro_batch_size)
    itself = f"CONFIG itself ({strategy}, {recompute}, {own.shape}): {own.total / 1e9:,.2f} GB"
    return [*lines, f"{itself}, which {own.fit}"]


def why(config: Config, cluster: Cluster, best: Option) -> str:
    """The recommendation and its reason."""
    setup, batch = best.setup, config.train.global_batch_size
    largest = max(best.memory, key=lambda part: best.memory[part])
    fillers = setup.sequences - batch
    uneven = f" The batch does not divide evenly: {fillers} filler sequences per step are wasted."
    return (
        f"Recommended: {setup.strategy}, recompute = {setup.recompute}, {setup.micro_batches}"
        f" micro-batches of {setup.micro_batch} on each rank for the global batch of {batch}. It is"
        " the fastest that fits, and of those within 2% the one with the least sharding and"
        " recomputation."
        f" At its peak ({best.moment}) a rank holds {best.total / 1e9:,.1f} of"
        f" {cluster.memory / 1e9:,.1f} GB, most of it {largest}.{uneven if fillers else ''}"
    )


def warnings(config: Config, cluster: Cluster, facts: Facts, best: Option) -> list[str]:
    """What is probably not meant, or may fail, and what to do."""
    found, days = [], (facts["hours"] or 0) / 24
    if days > LONG_DAYS:
        gpus = math.ceil(days / LONG_DAYS * cluster.nodes) * cluster.per_node
        enough = gpus <= config.train.global_batch_size  # each GPU trains a sequence or more a step
        steps = round(facts["steps"] * LONG_DAYS / days)
        found.append(
            f"warning: it takes {figure(days)} days on these GPUs. For {LONG_DAYS} days"
            f"{f' take about {gpus:,} of them, or' if enough else ''} train on"
            f" {figure(steps * facts['tokens_a_step'] / 1e9)} billion tokens"
            f" (train.max_steps={steps}), or train a smaller model."
        )
    if best.fit == TIGHT:
        found.append(
            f"warning: {best.total / 1e9:,.1f} of {cluster.memory / 1e9:,.1f} GB may not fit: the"
            f" estimate can be wrong by {MEMORY_ERROR:.0%}. Run a few steps first"
            " (--train.stop_at_step=5), or take more or larger GPUs."
        )
    return found


def launch(cluster: Cluster, facts: Facts, arguments: list[str]) -> str:
    """The command that runs the plan, with the overrides of this command line."""
    chosen = {
        "parallel.strategy": facts["strategy"],
        "train.recompute": facts["recompute"],
        "train.micro_batch_size": facts["micro_batch_size"],
    }
    config = next((a for a in arguments if not a.startswith("-")), "config/tiny.toml")
    overrides = [a for a in arguments if a.startswith("--") and "." in a.partition("=")[0]]
    kept = [a for a in overrides if a[2:].partition("=")[0] not in chosen]
    tail = " ".join([shlex.join((config, *kept)), *(f"--{k}={v}" for k, v in chosen.items())])
    return start(cluster, facts["hours"], tail)


def start(cluster: Cluster, hours: float | None, tail: str) -> str:
    """The command that starts rocket.py with these arguments, on this cluster."""
    if cluster.name == "cpu":
        return f"torchrun --standalone --nproc_per_node={cluster.gpus} rocket.py {tail}"
    # a run that takes longer than a job comes back by itself (docs/jobs.md)
    limit = min(24, math.ceil(1.2 * (hours or 24) + 0.5))
    # sbatch itself does not read the site's account and partition (slurm/site.example.sh)
    return (
        "(script=train; [ ! -f slurm/site.sh ] || . slurm/site.sh;"
        f" sbatch --nodes={cluster.nodes} --gpus-per-node={cluster.per_node}"
        f" --time={limit}:00:00 slurm/train.sh {tail})"
    )


def request(config: Config, facts: Facts) -> list[str]:
    """The lines of a paragraph for an allocation request; none where the hours are not known."""
    if not facts["hours"]:
        return []
    model, seq_len, giga = config.model, config.data.seq_len, in_billions(facts)
    longer = f", and {facts['slowdown']:.2f} times as long for {' and '.join(facts['slowed_by'])}"
    text = (
        f"We request {figure(facts['gpu_hours'])} GPU-hours ({facts['gpus']} {facts['gpu']} on"
        f" {facts['nodes']} node{'s' * (facts['nodes'] > 1)} for {figure(facts['hours'])} hours)"
        f" and {giga['disk_bytes']} GB of disk to train a Llama 2 transformer of"
        f" {giga['parameters']} billion parameters on {giga['tokens']} billion tokens in sequences"
        f" of {seq_len}. The training takes {facts['total_flops']:.2e} floating-point operations:"
        f" 6 N + 12 L D T per token, where N = {giga['multiplied_parameters']} billion parameters"
        f" {counted(config)}, L = {model.n_layers} layers, D = {model.dim} their width and T ="
        f" {seq_len} tokens. The hours assume {facts['mfu']:.0%} of the GPUs' dense bfloat16 rate,"
        " as published runs reach that recompute nothing (39% to 46%)"
        f"{longer if facts['slowed_by'] else ''}. Evaluation, checkpoints, the optimizer's step,"
        " queueing and repeated runs are not counted."
    )
    return textwrap.wrap(text, 100)


if __name__ == "__main__":
    run_program(main)
