"""Plans a training before there is a job: what fits on the GPUs, how long it takes, what it costs.

    python plan.py CONFIG --gpus=64 --gpu=h100 [--mfu=0.4] [--section.key=value …]

Needs no GPU and no dataset. It recommends a strategy, what to recompute and a micro-batch for the
global batch of CONFIG, and says why. Memory is reckoned from the shapes, moment by moment of a
step (see `moments`); docs/planning.md holds it against what was measured.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import shlex
import textwrap
from dataclasses import dataclass
from typing import Any

from config import (
    PEAK_FLOPS,
    Config,
    ConfigError,
    ModelConfig,
    UserError,
    load_config,
    resolve_path,
    run_program,
)

FLAGS = {
    "--gpus=8": "GPUs of the job",
    "--gpu=h100": "their kind: h100, h200, a100-40, a100-80, …; cpu: this machine's ranks",
    "--gpus-per-node=8": "GPUs of a node",
    "--nodes=N": "nodes, instead of --gpus",
    "--gpu-memory-gb=GB": "memory of a GPU (10^9 bytes), where the table is wrong",
    "--gpu-tflops=TFLOPS": "dense bfloat16 TFLOP/s of a GPU, where the table is wrong",
    "--mfu=0.4": "share of that which training reaches; published runs: 0.39 to 0.46 (H100)",
    "--json": "the figures as JSON",
}
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
# What a process holds beside tensors. CPU: python, torch and its libraries, as measured. GPU: the
# context, NCCL's buffers and cuBLAS' workspace, an estimate: nothing has been measured on a GPU.
CPU_OVERHEAD, GPU_OVERHEAD = 0.36e9, 2.0e9
# Published for H100: llm-foundry 0.40 to 0.46 (7B, 13B), torchtitan 0.39 (8B); docs/planning.md.
DEFAULT_MFU = 0.4
# Bytes a second that a GPU gets out of NVLink and a 400 Gbit/s card: assumptions for ranking.
INSIDE_NODE, BETWEEN_NODES = 200e9, 40e9
# Time of a step with recomputation: measured on a CPU (docs/performance.md), and one more forward
# pass for each forward and backward, 4/3, as llm-foundry's HFU counts it.
RECOMPUTE_COST = {"none": 1.0, "selective": 1.1, "block": 4 / 3}
GPU_SLACK = 0.05  # of a GPU's memory that the allocator loses to fragments; an estimate
PARTS = "weights gradients optimizer activations loss communication overhead".split()
RECOMPUTE = ("none", "selective", "block")
SHORT = {
    "communication": "network",
    "activations": "activ.",
    "optimizer": "optim.",
    "gradients": "grads",
}
FP32 = 4  # bytes
MUON_BATCH = 1 << 25  # optimizer.BATCH

Memory = dict[str, float]  # bytes by PARTS


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: of a block, of its matrices, and of what is outside of blocks."""

    block: int
    matrices: int  # of a block
    root: int  # embeddings, head, last norm
    layers: int

    @property
    def total(self) -> int:
        return self.layers * self.block + self.root


def sizes(model: ModelConfig, vocab_size: int) -> Sizes:
    """Counted as model.py builds it; tests hold it against model.parameter_count."""
    kv_dim = model.dim // model.n_heads * model.n_kv_heads
    matrices = 2 * model.dim * (model.dim + kv_dim) + 3 * model.dim * model.ffn_dim
    embeddings = (1 if model.tie_embeddings else 2) * vocab_size * model.dim
    return Sizes(matrices + 2 * model.dim, matrices, embeddings + model.dim, model.n_layers)


def flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """As model.flops_per_token, without torch: 6 N + 12 L D T (PaLM, arXiv 2204.02311)."""
    embedding = 0 if model.tie_embeddings else vocab_size * model.dim
    matrices = sizes(model, vocab_size).total - embedding
    return 6 * matrices + 12 * model.n_layers * model.dim * seq_len


@dataclass(frozen=True)
class Setup:
    """How a rank trains."""

    strategy: str
    recompute: str
    micro_batch: int  # sequences
    micro_batches: int  # a step
    ranks: int
    shards: int  # ranks that hold one copy of the model together
    bytes: int  # of the compute type
    compiled: bool
    on_gpu: bool

    @property
    def sequences(self) -> int:
        """Of a step over all ranks, fillers included."""
        return self.micro_batch * self.micro_batches * self.ranks


def activation_bytes(config: Config, setup: Setup, recompute: str) -> int:
    """Bytes a token that a block keeps for its backward pass.

    Tensors by width, D the model's, K keys' or values', F the feed-forward's. Eager, all is kept:
    input of each norm and (where no kernel fuses it, on a CPU) its normalised form; the norm's
    output, once for all products that take it, but under autocast once for each as a copy; rotated
    q and k, v, attention's output and log-sum-exp; gate, up, silu(gate) and their product.
    Compiled, silu is made again, and the output of o_proj is kept in place of the second norm's
    input. selective keeps products and attention, block the input alone.
    """
    model, b = config.model, setup.bytes
    D, F = model.dim, model.ffn_dim
    K = model.dim // model.n_heads * model.n_kv_heads
    residual = residual_bytes(setup)
    if recompute == "block":
        return residual * D
    logsumexp = FP32 * model.n_heads
    if recompute == "selective":
        unused = 0 if setup.compiled else b * D  # down_proj's output, which eager mode keeps too
        return residual * D + b * (3 * D + 2 * K + 2 * F) + unused + logsumexp
    if setup.compiled:
        return residual * D + b * (5 * D + 2 * K + 3 * F) + logsumexp
    norms = 2 * D * (residual if setup.on_gpu else 2 * FP32)
    outputs = (5 if autocasts(setup) else 2) * b * D
    return norms + outputs + b * (2 * D + 2 * K + 4 * F) + logsumexp


def autocasts(setup: Setup) -> bool:
    """Whether bfloat16 comes from autocast: a sharded model casts its own weights."""
    return setup.bytes < FP32 and setup.strategy == "ddp"


def residual_bytes(setup: Setup) -> int:
    """Of an element of the residual stream, which autocast leaves in float32."""
    return setup.bytes if setup.strategy != "ddp" else FP32


def moments(config: Config, setup: Setup) -> dict[str, Memory]:
    """Bytes that a rank holds at the moments of a step that may be its peak.

    The loss: all activations, a chunk's logits and the gradients that the loss makes on the way.
    The head: its gradient scaled, the old one still there. The last block's backward pass: all
    activations and what is made again; the second block's: nearly all gradients instead. The
    embedding: its gradient (of a sharded model also the head's) beside all others. The optimizer:
    rounds of Muon.
    """
    model, train, v = config.model, config.train, config.tokenizer.vocab_size
    n, b = setup.micro_batch * config.data.seq_len, setup.bytes
    size, sharded = sizes(model, v), setup.strategy != "ddp"
    accumulates, head, shards = setup.micro_batches > 1, v * model.dim, setup.shards
    weights = FP32 * size.total / shards
    inner = size.layers * size.matrices if config.optimizer.name == "muon" else 0
    held = {
        "weights": weights,
        # two moments a parameter, one of Muon
        "optimizer": FP32 * (2 * size.total - inner) / shards,
        "overhead": GPU_OVERHEAD if setup.on_gpu else CPU_OVERHEAD,
    }
    gradients = FP32 * size.total / shards
    if sharded and config.parallel.reduce_once and accumulates:
        gradients = FP32 * size.total
    # DDP's buckets stay; else gradients are freed after each step
    early = gradients if accumulates or (not sharded and setup.ranks > 1) else 0.0

    kept = activation_bytes(config, setup, setup.recompute)
    final = residual_bytes(setup) + b + (0 if setup.on_gpu else FP32)
    activations = n * (size.layers * kept + model.dim * final)
    again = n * (activation_bytes(config, setup, "none") - kept)
    on_the_way = n * (2 * b * (model.ffn_dim + model.dim) + residual_bytes(setup) * model.dim)
    # weights in bfloat16 that autocast made: eager mode lets go of them when the forward pass ends
    casts = 2 * size.layers * size.matrices if autocasts(setup) else 0
    at_loss = casts if setup.recompute == "none" or not setup.compiled else 0
    in_backward = casts if setup.recompute == "none" else casts / size.layers

    chunk = min(train.loss_chunk or n, n)
    # logits, log_softmax and, in bfloat16, what it is made from and the gradient in that type
    logits = chunk * v * (2 * b if setup.compiled else 8 if b == FP32 else 10)
    logits += chunk * v * b * (n > chunk)  # of the chunk before, its gradient
    if b < FP32:  # the chunk's share of the gradient comes as a product of its own
        logits = max(logits, chunk * v * b + b * head)
    loss = n * model.dim * b + FP32 * head + logits + (b * head if autocasts(setup) else 0)

    gathered = dict.fromkeys(("forward", "backward", "reduction"), 0.0)
    if sharded:  # FSDP2 has the next block's weights on their way, and in backward its gradients
        kept_whole = not config.parallel.reshard_after_forward
        whole = b * (size.total if kept_whole else size.root)
        block = 0 if kept_whole else b * size.block
        gathered["forward"] = whole + block
        gathered["backward"] = whole + 2 * block + FP32 * size.block
        gathered["reduction"] = FP32 * size.root
        first = b * (head + size.block)  # gradients when the first block of the pass is done
        moving, embedding = first, b * size.root
        reduced = gradients if early else gradients - FP32 * (size.root + 2 * size.block) / shards
    else:  # copied into what is there; else the tensor that was made is the gradient
        first, reduced = 0.0 if early else FP32 * (head + size.block), gradients
        moving = FP32 * model.dim * model.ffn_dim if early else 0.0
        embedding = FP32 * head * (2 if model.tie_embeddings else 1 if early else 0)

    def moment(gradients: float, activations: float, loss: float, communication: float) -> Memory:
        parts = ("gradients", "activations", "loss", "communication")
        values = (gradients, activations, loss, communication)
        return held | dict(zip(parts, values, strict=True))

    block_pass = again + on_the_way
    head_pass = 2 * b * (head + n * model.dim)
    found = {
        "loss": moment(early, activations + at_loss, loss, gathered["forward"]),
        "head": moment(early, activations + in_backward, head_pass, gathered["forward"]),
        "last block": moment(
            early + (first if not early or sharded else moving),
            activations + in_backward + block_pass,
            0.0,
            gathered["backward"],
        ),
        "second block": moment(
            reduced + moving,
            n * kept + in_backward / size.layers + block_pass,
            0.0,
            gathered["backward"],
        ),
        "embedding": moment(
            gradients + embedding,
            2 * n * model.dim * residual_bytes(setup),
            0.0,
            gathered["reduction"],
        ),
    }
    for name, gone, buffers in muon_rounds(config, setup) if inner else [("optimizer", 0.0, 0.0)]:
        found[name] = moment(gradients - gone, 0.0, 0.0, 0.0)
        found[name]["optimizer"] += buffers
    return found


def muon_rounds(config: Config, setup: Setup) -> list[tuple[str, float, float]]:
    """Of Muon's first round of attention's and of the feed-forward's matrices, the bytes of
    gradients that are gone by then, and those of its buffers (see optimizer.Muon).

    There are the directions, the matrices that this rank orthogonalises (as they travel, as they
    arrive), and of those Newton-Schulz' x, the next x and two squares.
    """
    model, sharded = config.model, setup.strategy != "ddp"
    sharers = setup.shards if sharded else setup.ranks
    alike = 4 if model.n_kv_heads == model.n_heads else 2
    rounds, gone = [], 0.0
    for name, rows, columns, count in (
        ("Muon's attention", model.dim, model.dim, alike * model.n_layers),
        ("Muon's feed-forward", *sorted((model.dim, model.ffn_dim)), 2 * model.n_layers),
    ):
        matrix = rows * columns
        length = min(count, sharers * max(1, MUON_BATCH // (matrix * (1 if sharded else sharers))))
        each = -(-length // sharers)
        travel = each * matrix * (1 if sharers == 1 else 2 if sharded else sharers)
        work = each * 2 * (matrix + rows * rows)
        buffers = setup.bytes * (length * matrix / setup.shards + travel + work)
        rounds.append((name, gone + FP32 * length * matrix / setup.shards, buffers))
        gone += FP32 * count * matrix / setup.shards
    return rounds


def peak(config: Config, setup: Setup) -> tuple[str, Memory]:
    """The moment of a step at which a rank holds most, and what of each part."""
    found = moments(config, setup)
    name = max(found, key=lambda moment: sum(found[moment].values()))
    return name, found[name]


@dataclass(frozen=True)
class Cluster:
    """What a job gets."""

    name: str
    gpus: int
    per_node: int
    memory: float  # bytes of a GPU that tensors and the overhead may take
    flops: float | None  # of a GPU a second, dense bfloat16
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
    fits: bool
    cost: float  # of a step, against its arithmetic alone
    largest: int = 0  # micro-batch that fits

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def option(
    config: Config, cluster: Cluster, strategy: str, recompute: str, micro_batch: int
) -> Option:
    """A strategy with micro-batches of at most so many sequences, cut as dataset.rank_share does."""
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
    moment, memory = peak(config, setup)
    fits = sum(memory.values()) <= cluster.memory
    return Option(setup, moment, memory, fits, relative_cost(config, cluster, setup))


def best_micro_batch(config: Config, cluster: Cluster, strategy: str, recompute: str) -> Option:
    """The option with the least filler sequences and then the largest micro-batch that fits; where
    none does, with one sequence."""
    share = -(-config.train.global_batch_size // cluster.gpus)
    sizes_tried = sorted({-(-share // parts) for parts in range(1, share + 1)}, reverse=True)
    tried = [option(config, cluster, strategy, recompute, size) for size in sizes_tried]
    fitting = [one for one in tried if one.fits]
    if not fitting:
        return tried[-1]
    best = min(fitting, key=lambda one: (one.setup.sequences, one.setup.micro_batches))
    return dataclasses.replace(best, largest=fitting[0].setup.micro_batch)


def relative_cost(config: Config, cluster: Cluster, setup: Setup) -> float:
    """Time of a step by its arithmetic, with what is made again, or by its communication if that is
    more: it overlaps. FSDP2 moves 2 weights and a float32 gradient a parameter at each micro-batch,
    DDP and HSDP's replicas twice a float32 gradient a step.
    """
    arithmetic = RECOMPUTE_COST[setup.recompute]
    if cluster.flops is None or cluster.gpus == 1:
        return arithmetic
    parameters = sizes(config.model, config.tokenizer.vocab_size).total
    inside, between = 1 / INSIDE_NODE, 1 / (BETWEEN_NODES if cluster.nodes > 1 else INSIDE_NODE)
    once, each = 2 * FP32 * parameters / setup.shards * between, 0.0
    if setup.strategy != "ddp":
        once = once if setup.strategy == "hsdp" else 0.0
        path = between if setup.strategy == "fsdp" else inside
        each = (2 * setup.bytes + FP32) * parameters * path
    tokens = setup.micro_batch * config.data.seq_len
    flops = flops_per_token(config.model, config.tokenizer.vocab_size, config.data.seq_len)
    seconds = setup.micro_batches * tokens * flops / (cluster.flops * cluster.mfu)
    return max(arithmetic, (once + setup.micro_batches * each) / seconds)


def options(config: Config, cluster: Cluster) -> list[Option]:
    """All strategies that this cluster has, what communicates least first."""
    strategies = ["ddp"]
    if cluster.gpus > 1:
        strategies += ["hsdp", "fsdp"] if cluster.nodes > 1 and cluster.per_node > 1 else ["fsdp"]
    return [best_micro_batch(config, cluster, s, r) for s in strategies for r in RECOMPUTE]


def recommended(found: list[Option]) -> Option | None:
    """The cheapest that fits; where costs are within 2%, the earlier one."""
    fitting = [one for one in found if one.fits]
    least = min((one.cost for one in fitting), default=0.0)
    return next((one for one in fitting if one.cost <= 1.02 * least), None)


def run_steps(config: Config) -> tuple[int, list[str]]:
    """Steps of the run, and lines on the epochs over what is prepared.

    Raises:
        UserError: the length is not set, or takes a dataset that is not prepared.
    """
    train, data = config.train, config.data
    shares = data.mixture or {data.dir: 1.0}
    windows = {name: prepared_windows(name, data.seq_len) for name in shares}
    missing = [name for name, count in windows.items() if not count]
    if not train.max_steps and not train.epochs:
        raise ConfigError("how long to train is not set: give train.max_steps or train.epochs")
    if train.epochs and missing:
        raise UserError(
            f"train.epochs = {train.epochs} takes the prepared dataset, and {missing[0]} has no"
            " manifest.json: run prepare.py, or set train.max_steps and train.epochs=0"
        )
    batch = train.global_batch_size
    steps = train.max_steps or math.ceil(train.epochs * sum(windows.values()) / batch)
    lines = []
    for name, weight in shares.items():
        text = "not prepared: epochs are not known"
        if windows[name]:
            epochs = steps * batch * weight / sum(shares.values()) / windows[name]
            tokens = windows[name] * data.seq_len
            text = f"{epochs:,.2f} epochs of {tokens / 1e9:,.3f} billion tokens"
        lines.append(f"{name}: {text}")
    return steps, lines


def prepared_windows(name: str, seq_len: int) -> int:
    """Training sequences of a prepared dataset, 0 where there is none (see dataset.TokenDataset)."""
    path = resolve_path(name) / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        tokens = sum(shard["tokens"] for shard in manifest["splits"]["train"]["shards"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; run prepare.py with --force") from None
    return max(0, tokens - ("seq_len" not in manifest)) // seq_len


def read_cluster(flags: set[str]) -> Cluster:
    """The cluster of the command line; ConfigError for what is not there or does not divide."""
    values = dict(flag[2:].split("=", 1) for flag in flags if "=" in flag)

    def number(name: str, default: float, whole: bool = False) -> float:
        text = values.get(name, str(default))
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            kind = "a whole number" if whole else "a number"
            raise ConfigError(f"--{name} is {kind} above 0, not {text!r}")
        return value

    name = values.get("gpu", "h100").lower()
    given = "gpu-memory-gb" in values and "gpu-tflops" in values
    if name not in (*GPUS, "cpu") and not given:
        near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
        raise ConfigError(
            f"--gpu={name} is not known{f'; did you mean {near[0]}?' if near else ''};"
            f" known: {', '.join(GPUS)}, cpu; or give --gpu-memory-gb and --gpu-tflops"
        )
    if {"gpus", "nodes"} <= values.keys() and "gpus-per-node" in values:
        raise ConfigError("--gpus, --nodes and --gpus-per-node: two of them say it all")
    per_node = int(number("gpus-per-node", 8, whole=True))
    gpus = int(number("gpus", per_node, whole=True))
    if "nodes" in values:
        nodes = int(number("nodes", 1, whole=True))
        per_node = -(-gpus // nodes) if "gpus" in values else per_node
        gpus = gpus if "gpus" in values else nodes * per_node
    per_node = min(per_node, gpus)
    if gpus % per_node:
        raise ConfigError(
            f"--gpus={gpus} is not a multiple of the {per_node} GPUs of a node: give"
            f" {gpus - gpus % per_node} or {gpus + per_node - gpus % per_node}, or --gpus-per-node"
        )
    if name == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / per_node
        flops = None
    else:
        memory, datasheet = GPUS.get(name, (0.0, ""))
        flops = PEAK_FLOPS.get(datasheet)
    memory = 1e9 * number("gpu-memory-gb", memory / 1e9 or 1)
    flops = 1e12 * number("gpu-tflops", 1) if "gpu-tflops" in values else flops
    mfu = number("mfu", DEFAULT_MFU)
    if mfu > 1:
        raise ConfigError(f"--mfu={mfu:g} is a share, such as 0.4, not above 1")
    memory *= 1 if name == "cpu" else 1 - GPU_SLACK
    return Cluster(name, gpus, per_node, memory, flops, mfu)


def main(arguments: list[str]) -> None:
    config, flags = load_config(arguments, usage=str(__doc__), flags=FLAGS)
    cluster = read_cluster(flags)
    steps, epochs = run_steps(config)
    found = options(config, cluster)
    best = recommended(found)
    facts = figures(config, cluster, steps, best)
    facts["epochs"] = epochs
    if "--json" in flags:
        facts["options"] = [
            dataclasses.asdict(one.setup)
            | {"memory": one.memory, "moment": one.moment, "cost": one.cost}
            | {"total": one.total, "fits": one.fits, "largest": one.largest}
            for one in found
        ]
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(told(config, cluster, facts, found, best, arguments)))
    if not best:
        least = min(found, key=lambda one: one.total)
        raise UserError(
            f"nothing fits: the least is {least.setup.strategy} with recompute ="
            f" {least.setup.recompute}, {least.total / 1e9:,.1f} GB of the"
            f" {cluster.memory / 1e9:,.1f} GB of a {cluster.name}; {way_out(config, cluster)}"
        )


def way_out(config: Config, cluster: Cluster) -> str:
    """How many GPUs would do."""
    nodes = cluster.nodes
    while (nodes := 2 * nodes) * cluster.per_node <= 16_384:
        more = dataclasses.replace(cluster, gpus=nodes * cluster.per_node)
        if option(config, more, "fsdp", "block", 1).fits:
            return f"{more.gpus} of them would do, or more memory"
    return "more of them would not help: take GPUs with more memory, or a smaller model or seq_len"


def figures(config: Config, cluster: Cluster, steps: int, best: Option | None) -> dict[str, Any]:
    """The figures of the run, by name; hours are None where the FLOP/s are not known."""
    train, v, seq_len = config.train, config.tokenizer.vocab_size, config.data.seq_len
    size, keep = sizes(config.model, v), config.checkpoint
    tokens = steps * train.global_batch_size * seq_len
    flops = flops_per_token(config.model, v, seq_len)
    rate = cluster.flops * cluster.mfu * cluster.gpus if cluster.flops else None
    inner = size.layers * size.matrices if config.optimizer.name == "muon" else 0
    checkpoint = FP32 * (3 * size.total - inner)
    facts: dict[str, Any] = {
        "parameters": size.total,
        "flops_per_token": flops,
        "gpus": cluster.gpus,
        "gpu": cluster.name,
        "nodes": cluster.nodes,
        "memory_a_gpu": cluster.memory,
        "mfu": cluster.mfu,
        "tokens_a_step": train.global_batch_size * seq_len,
        "steps": steps,
        "tokens": tokens,
        "total_flops": tokens * flops,
        "tokens_per_second": rate / flops if rate else None,
        "hours": tokens * flops / rate / 3600 if rate else None,
        "gpu_hours": tokens * flops / rate / 3600 * cluster.gpus if rate else None,
        "checkpoint_bytes": checkpoint,
        # beside those that are kept one is being written
        "disk_bytes": (keep.keep_last + 1) * checkpoint + keep.keep_best * FP32 * size.total,
    }
    if best:
        setup = best.setup
        facts |= {
            "strategy": setup.strategy,
            "recompute": setup.recompute,
            "micro_batch_size": setup.micro_batch,
            "micro_batches": setup.micro_batches,
            "fillers": setup.sequences - train.global_batch_size,
            "memory": best.memory,
        }
    return facts


def told(
    config: Config,
    cluster: Cluster,
    facts: dict[str, Any],
    found: list[Option],
    best: Option | None,
    arguments: list[str],
) -> list[str]:
    """The plan as lines of at most 100 columns."""
    flops = f" of {cluster.flops / 1e12:,.0f} TFLOP/s" if cluster.flops else ""
    hours = "not known: give --gpu-tflops"
    if facts["hours"]:
        hours = (
            f"{facts['hours']:,.1f} h at an MFU of {cluster.mfu:.0%} (assumed),"
            f" {facts['tokens_per_second']:,.0f} tokens/s: {facts['gpu_hours']:,.0f} GPU-hours"
        )
    lines = [
        f"model         {facts['parameters'] / 1e6:,.1f}M parameters,"
        f" {facts['flops_per_token'] / 1e9:,.2f} GFLOPs a token",
        f"GPUs          {cluster.gpus} × {cluster.name} on {cluster.nodes} node(s),"
        f" {cluster.memory / 1e9:,.1f} GB of each usable{flops}",
        f"run           {facts['steps']:,} steps of {facts['tokens_a_step']:,} tokens:"
        f" {facts['tokens'] / 1e9:,.3f} billion tokens",
        *(f"data          {line}" for line in facts["epochs"]),
        f"time          {hours}",
        f"disk          {facts['disk_bytes'] / 1e9:,.1f} GB: a checkpoint has"
        f" {facts['checkpoint_bytes'] / 1e9:,.1f} GB; keep_last {config.checkpoint.keep_last},"
        f" keep_best {config.checkpoint.keep_best}, one in writing",
        "",
        "GB a GPU at the peak of a step, with the largest micro-batch that fits:",
        "strategy recompute micro × number"
        + "".join(f"{name:>9}" for name in (*(SHORT.get(p, p) for p in PARTS), "total"))
        + "   ",
    ]
    for one in found:
        setup = one.setup
        shape = f"{setup.micro_batch} × {setup.micro_batches}"
        lines.append(
            f"{setup.strategy:<8} {setup.recompute:<9} {shape:>14}"
            + "".join(f"{one.memory[part] / 1e9:9,.2f}" for part in PARTS)
            + f"{one.total / 1e9:9,.2f}"
            + ("  <--" if one is best else "" if one.fits else "  no")
        )
    if not best:
        return lines
    command = launch(cluster, facts, arguments)
    return [
        *lines,
        "",
        *why(config, cluster, found, best),
        "",
        command,
        "",
        *request(config, facts),
    ]


def why(config: Config, cluster: Cluster, found: list[Option], best: Option) -> list[str]:
    """The recommendation and its reasons."""
    setup = best.setup
    reasons = [
        f"Recommended: {setup.strategy}, recompute = {setup.recompute}, {setup.micro_batches}"
        f" micro-batches of {setup.micro_batch} on each of {cluster.gpus} ranks make the global"
        f" batch of {config.train.global_batch_size}."
    ]
    if fillers := setup.sequences - config.train.global_batch_size:
        reasons.append(f"{fillers} filler sequences a step are wasted: it does not divide.")
    largest = max(best.memory, key=lambda part: best.memory[part])
    reasons.append(
        f"It takes {best.total / 1e9:,.1f} of {cluster.memory / 1e9:,.1f} GB, most of it {largest},"
        f" at its peak ({best.moment})."
    )
    if setup.strategy != "ddp" and not any(
        one.fits for one in found if one.setup.strategy == "ddp"
    ):
        least = min(one.total for one in found if one.setup.strategy == "ddp")
        reasons.append(f"A whole model a GPU (ddp) would take at least {least / 1e9:,.1f} GB.")
    if setup.recompute != "none":
        reasons.append("Keeping all activations does not fit, or leaves too few tokens at a time.")
    if cluster.flops and cluster.gpus > 1:
        others = ", ".join(
            f"{one.setup.strategy} {one.setup.recompute} {one.cost:.2f}"
            for one in found
            if one.fits
        )
        reasons.append(
            f"Reckoned time, 1 where arithmetic hides all communication: {others} (assuming"
            f" {INSIDE_NODE / 1e9:.0f} GB/s a GPU in a node, {BETWEEN_NODES / 1e9:.0f} between)."
        )
    return textwrap.wrap(" ".join(reasons), 100)


def launch(cluster: Cluster, facts: dict[str, Any], arguments: list[str]) -> str:
    """The command that runs the plan, with the overrides of this command line."""
    chosen = {
        "parallel.strategy": facts["strategy"],
        "train.recompute": facts["recompute"],
        "train.micro_batch_size": facts["micro_batch_size"],
    }
    config = next((a for a in arguments if not a.startswith("-")), "config/tiny.toml")
    kept = [a for a in arguments if "." in a.partition("=")[0] and a.startswith("--")]
    kept = [a for a in kept if a[2:].partition("=")[0] not in chosen]
    tail = " ".join([config, *map(shlex.quote, kept), *(f"--{k}={v}" for k, v in chosen.items())])
    if cluster.name == "cpu":
        return f"torchrun --standalone --nproc_per_node={cluster.gpus} rocket.py {tail}"
    # a run that takes longer than a job comes back by itself (slurm/README.md)
    hours = min(24, math.ceil(1.2 * (facts["hours"] or 24) + 0.5))
    return (
        f"sbatch --nodes={cluster.nodes} --gpus-per-node={cluster.per_node}"
        f" --time={hours}:00:00 slurm/train.sh {tail}"
    )


def request(config: Config, facts: dict[str, Any]) -> list[str]:
    """A paragraph for an allocation request."""
    if not facts["hours"]:
        return []
    text = (
        f"We request {facts['gpu_hours']:,.0f} GPU-hours ({facts['gpus']} {facts['gpu']} on"
        f" {facts['nodes']} node(s) for {facts['hours']:,.0f} hours) and"
        f" {facts['disk_bytes'] / 1e12:,.2f} TB of disk to train a Llama 2 transformer of"
        f" {facts['parameters'] / 1e9:,.2f} billion parameters on"
        f" {facts['tokens'] / 1e9:,.1f} billion tokens in sequences of {config.data.seq_len}."
        f" The training takes {facts['total_flops']:.2e} floating-point operations (6 a parameter"
        f" and token, and attention); the hours assume that it reaches"
        f" {facts['mfu']:.0%} of the GPUs' dense bfloat16 rate, as published runs of this kind do"
        " (docs/planning.md). Evaluation, checkpoints, queueing and repeated runs are not counted."
    )
    return textwrap.wrap(text, 100)


if __name__ == "__main__":
    run_program(main)
