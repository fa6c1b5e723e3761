"""What a rank holds in memory while it trains, in closed form: no tensor is made, no torch needed.

Each term stands for tensors that model.py, distributed.py and optimizer.py make. Those that are
there at the same moment of a step are added up, and the peak is the largest such sum. Tests and
docs/planning.md hold it against real training.
"""

from __future__ import annotations

from dataclasses import dataclass

from config import Config, ModelConfig, loss_chunk

# What a process holds beside tensors. CPU: python, torch and its libraries, as measured. GPU: the
# context, NCCL's buffers and cuBLAS' workspace, an estimate: nothing has been measured on a GPU.
CPU_OVERHEAD, GPU_OVERHEAD = 0.36e9, 2.0e9
PARTS = "weights gradients optimizer activations loss communication overhead".split()
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
    return 6 * multiplied(model, vocab_size) + 12 * model.n_layers * model.dim * seq_len


def multiplied(model: ModelConfig, vocab_size: int) -> int:
    """Parameters that each token is multiplied with: all but the input embedding, unless it is the
    head too."""
    embedding = 0 if model.tie_embeddings else vocab_size * model.dim
    return sizes(model, vocab_size).total - embedding


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
    output, once for all products that take it; rotated q and k, v, attention's output and
    log-sum-exp; gate, up, silu(gate) and their product. Compiled, silu is made again, and the
    output of o_proj is kept in place of the second norm's input. selective keeps products and
    attention, block the input alone.
    """
    model, b = config.model, setup.bytes
    D, F = model.dim, model.ffn_dim
    K = model.dim // model.n_heads * model.n_kv_heads
    if recompute == "block":
        return b * D
    logsumexp = FP32 * model.n_heads
    if recompute == "selective":
        unused = 0 if setup.compiled else b * D  # down_proj's output, which eager mode keeps too
        return b * (4 * D + 2 * K + 2 * F) + unused + logsumexp
    if setup.compiled:
        return b * (6 * D + 2 * K + 3 * F) + logsumexp
    norms = 2 * D * (b if setup.on_gpu else 2 * FP32)
    return norms + b * (4 * D + 2 * K + 4 * F) + logsumexp


def autocasts(setup: Setup) -> bool:
    """Whether bfloat16 comes from autocast: a sharded model casts its own weights."""
    return setup.bytes < FP32 and setup.strategy == "ddp"


def moments(config: Config, setup: Setup) -> dict[str, Memory]:
    """Bytes that a rank holds at the moments of a step that may be its peak.

    The loss: all activations, a chunk's logits and the gradients that the loss makes on the way.
    The head: its gradient scaled, the old one still there. The last block's backward pass: all
    activations and what is made again; the second block's: nearly all gradients instead. The
    embedding: its gradient (of a sharded model also the head's) beside all others. The optimizer:
    rounds of Muon.
    """
    model, v = config.model, config.tokenizer.vocab_size
    n, b = setup.micro_batch * config.data.seq_len, setup.bytes
    size, sharded = sizes(model, v), setup.strategy != "ddp"
    accumulates, head, shards = setup.micro_batches > 1, v * model.dim, setup.shards
    last_reduced = size.root - (0 if model.tie_embeddings else head)  # see distributed.parallelize
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
    # Between micro-batches gradients stay, between steps they don't; but DDP's buckets do, and what
    # is not reduced yet does not lie in them.
    buckets = 0.0 if sharded or setup.ranks == 1 else gradients
    early = buckets + (gradients if accumulates else 0.0)

    kept = activation_bytes(config, setup, setup.recompute)
    final = 2 * b + (0 if setup.on_gpu else FP32)
    activations = n * (size.layers * kept + model.dim * final)
    again = n * (activation_bytes(config, setup, "none") - kept)
    on_the_way = n * b * (2 * model.ffn_dim + 3 * model.dim)
    # weights in bfloat16 that autocast made: eager mode lets go of them when the forward pass ends
    casts = 2 * size.layers * size.matrices if autocasts(setup) else 0
    at_loss = casts if setup.recompute == "none" or not setup.compiled else 0
    in_backward = casts if setup.recompute == "none" else casts / size.layers

    chunk = min(loss_chunk(config, setup.on_gpu) or n, n)
    # logits, log_softmax and, in bfloat16, what it is made from and the gradient in that type
    logits = chunk * v * (2 * b if setup.compiled else 8 if b == FP32 else 10)
    logits += chunk * v * b * (n > chunk)  # of the chunk before, its gradient
    if b < FP32:  # the chunk's share of the gradient comes as a product of its own
        logits = max(logits, chunk * v * b + b * head)
    copies = autocasts(setup) + (setup.on_gpu and v % 64 > 0)  # of the head: cast, filled up
    loss = n * model.dim * b + FP32 * head + logits + copies * b * head

    gathered = dict.fromkeys(("forward", "backward", "reduction"), 0.0)
    if sharded:  # FSDP2 has the next block's weights on their way, and in backward its gradients
        kept_whole = not config.parallel.reshard_after_forward
        whole = b * (size.total if kept_whole else size.root)
        block = 0 if kept_whole else b * size.block
        gathered["forward"] = whole + block
        gathered["backward"] = whole + 2 * block + FP32 * size.block
        gathered["reduction"] = FP32 * last_reduced
        # Whole gradients at the peak: the head's and the block's, or where what was made again is
        # gone when those are there, down_proj's alone.
        own = size.block if setup.recompute == "none" else model.dim * model.ffn_dim
        first = b * (head + own)
        moving, embedding = first, b * last_reduced
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
            n * model.dim * (b + (FP32 if autocasts(setup) else b)),
            0.0,
            gathered["reduction"],
        ),
    }
    for name, gone, buffers in muon_rounds(config, setup) if inner else [("optimizer", 0.0, 0.0)]:
        found[name] = moment(gradients - gone, 0.0, 0.0, 0.0)
        found[name]["optimizer"] += buffers
    return found


def muon_rounds(config: Config, setup: Setup) -> list[tuple[str, float, float]]:
    """Of Muon's first round of attention's and of the feed-forward's matrices: the bytes of
    gradients that are gone by then, and those of its buffers (see optimizer.Muon).

    First gradients, momenta and new momenta, stacked in float32, and the directions; then the
    directions, the matrices that this rank orthogonalises, for DDP those of all ranks, sharded as
    they leave, arrive and are whole, and Newton-Schulz' x, next x and two squares. Gradients that
    are views, of DDP's buckets or a block's in FSDP2, stay.
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
        travel = each * matrix * (0 if sharers == 1 else 3 if sharded else sharers)
        work = each * 2 * (matrix + rows * rows)
        own = length * matrix / setup.shards
        cast = setup.bytes * own if setup.bytes < FP32 else 0
        buffers = max(3 * FP32 * own + cast, setup.bytes * (own + travel + work))
        freed = gone + FP32 * length * matrix if sharers == 1 else 0.0
        rounds.append((name, freed, buffers))
        gone += FP32 * count * matrix
    return rounds


def peak(config: Config, setup: Setup) -> tuple[str, Memory]:
    """The moment of a step at which a rank holds most, and what of each part."""
    found = moments(config, setup)
    name = max(found, key=lambda moment: sum(found[moment].values()))
    return name, found[name]
