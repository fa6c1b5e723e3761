"""What a rank holds in memory while it trains, in closed form: no tensor is made, no torch needed.

Each term stands for tensors that model.py, distributed.py and optimizer.py make. Those that exist
at the same moment of a step are added up, and the peak is the largest such sum. Tests and
docs/planning.md compare it with real training.
"""

from __future__ import annotations

from dataclasses import dataclass

from config import Config, ModelConfig, loss_chunk

# What a process holds beside tensors. CPU: python, torch and its libraries, as measured. GPU: the
# context, NCCL's buffers and cuBLAS' workspace, an estimate: nothing has been measured on a GPU.
CPU_OVERHEAD, GPU_OVERHEAD = 0.36e9, 2.0e9
PARTS = "weights gradients optimizer activations loss communication overhead".split()
# The moments of a step that may be its peak: the loss is computed; the head's gradient is scaled;
# the backward pass is in the last block, in the second block, in the embedding; the optimizer's.
MOMENTS = ("loss", "head", "last block", "second block", "embedding", "optimizer")
FP32 = 4  # bytes
MUON_BATCH = 1 << 25  # optimizer.BATCH

Memory = dict[str, float]  # bytes by PARTS
ByMoment = dict[str, float]  # of one part: bytes by MOMENTS


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    layers: int
    block: int
    matrices: int  # of a block
    head: int
    root: int  # outside of blocks: embedding, head, last norm
    multiplied: int  # with each token: all but an input embedding that is not the head too
    muon: int  # that Muon updates

    @property
    def total(self) -> int:
        return self.layers * self.block + self.root


def sizes(config: Config) -> Sizes:
    """Counted as model.py builds it; tests compare it with model.parameter_count."""
    model, head = config.model, config.tokenizer.vocab_size * config.model.dim
    matrices = 2 * model.dim * (model.dim + kv_dim(model)) + 3 * model.dim * model.ffn_dim
    block = matrices + 2 * model.dim
    return Sizes(
        layers=model.n_layers,
        block=block,
        matrices=matrices,
        head=head,
        root=head * (1 if model.tie_embeddings else 2) + model.dim,
        multiplied=model.n_layers * block + head + model.dim,
        muon=model.n_layers * matrices if config.optimizer.name == "muon" else 0,
    )


def kv_dim(model: ModelConfig) -> int:
    """Width of the keys, and of the values."""
    return model.dim // model.n_heads * model.n_kv_heads


def flops_per_token(config: Config) -> float:
    """As model.flops_per_token, without torch: 6 N + 12 L D T (PaLM, arXiv 2204.02311)."""
    model = config.model
    return 6 * sizes(config).multiplied + 12 * model.n_layers * model.dim * config.data.seq_len


@dataclass(frozen=True)
class Setup:
    """How a rank trains."""

    strategy: str
    recompute: str
    micro_batch: int  # sequences
    micro_batches: int  # per step
    ranks: int
    shards: int  # ranks that hold one copy of the model together
    bytes: int  # per number of the compute type
    compiled: bool
    on_gpu: bool

    @property
    def sequences(self) -> int:
        """Sequences per step over all ranks, fillers included."""
        return self.micro_batch * self.micro_batches * self.ranks

    @property
    def sharded(self) -> bool:
        return self.strategy != "ddp"

    @property
    def autocasts(self) -> bool:
        """Whether bfloat16 comes from autocast: a sharded model casts its own weights."""
        return self.bytes < FP32 and not self.sharded


def moments(config: Config, setup: Setup) -> dict[str, Memory]:
    """Bytes that a rank holds at each of MOMENTS; with Muon its rounds are the optimizer's step."""
    size = sizes(config)
    held = {
        "weights": FP32 * size.total / setup.shards,
        # AdamW keeps two moments per parameter, Muon one
        "optimizer": FP32 * (2 * size.total - size.muon) / setup.shards,
        "overhead": GPU_OVERHEAD if setup.on_gpu else CPU_OVERHEAD,
    }
    parts = {
        "gradients": gradient_bytes(config, setup),
        "activations": activation_bytes(config, setup),
        "loss": loss_bytes(config, setup),
        "communication": gathered_bytes(config, setup),
    }
    found = {
        moment: held | {part: by_moment.get(moment, 0.0) for part, by_moment in parts.items()}
        for moment in MOMENTS
    }
    if size.muon:
        step = found.pop("optimizer")
        for name, freed, buffers in muon_rounds(config, setup):
            gradients, optimizer = step["gradients"] - freed, step["optimizer"] + buffers
            found[name] = step | {"gradients": gradients, "optimizer": optimizer}
    return found


def gradient_bytes(config: Config, setup: Setup) -> ByMoment:
    """Gradients, reduced or not."""
    model, size, b = config.model, sizes(config), setup.bytes
    head, down_proj = size.head, model.dim * model.ffn_dim
    whole = setup.sharded and setup.micro_batches > 1 and config.parallel.reduce_once
    everything = FP32 * size.total / (1 if whole else setup.shards)
    # Between micro-batches gradients stay, between steps they don't. But DDP's buckets stay, and
    # gradients that are not reduced yet don't lie in them.
    buckets = 0.0 if setup.sharded or setup.ranks == 1 else everything
    early = buckets + (everything if setup.micro_batches > 1 else 0.0)
    reduced = everything
    if setup.sharded:
        # Whole gradients at the peak: the head's and the block's; or down_proj's alone, where what
        # was recomputed is freed before the block's others exist.
        new = second = b * (head + (size.block if setup.recompute == "none" else down_proj))
        embedding = b * (head + model.dim)
        if not early:
            reduced -= FP32 * (size.root + 2 * size.block) / setup.shards
    elif early:  # a new gradient is added to what is there
        new = second = FP32 * down_proj
        embedding = FP32 * head * (2 if model.tie_embeddings else 1)
    else:  # the tensor that was made is the gradient
        new, second = FP32 * (head + size.block), 0.0
        embedding = FP32 * head * (2 if model.tie_embeddings else 0)
    found = (early, early, early + new, reduced + second, everything + embedding, everything)
    return dict(zip(MOMENTS, found, strict=True))


def activation_bytes(config: Config, setup: Setup) -> ByMoment:
    """Activations, recomputed ones included, and weights cast by autocast."""
    model, size, b = config.model, sizes(config), setup.bytes
    n = setup.micro_batch * config.data.seq_len
    kept = kept_per_token(config, setup, setup.recompute)
    final = 2 * b + (0 if setup.on_gpu else FP32)  # around the last norm
    everything = n * (size.layers * kept + model.dim * final)
    recomputed = n * (kept_per_token(config, setup, "none") - kept)
    block_pass = recomputed + n * b * (2 * model.ffn_dim + 3 * model.dim)
    # Weights in bfloat16 that autocast made. Eager mode frees them when the forward pass ends.
    casts = 2 * size.layers * size.matrices if setup.autocasts else 0
    at_loss = casts if setup.recompute == "none" or not setup.compiled else 0
    in_backward = casts if setup.recompute == "none" else casts / size.layers
    return {
        "loss": everything + at_loss,
        "head": everything + in_backward,
        "last block": everything + in_backward + block_pass,
        "second block": n * kept + in_backward / size.layers + block_pass,
        "embedding": n * model.dim * (b + (FP32 if setup.autocasts else b)),
    }


def kept_per_token(config: Config, setup: Setup, recompute: str) -> int:
    """Bytes per token that a block keeps for its backward pass.

    Tensors by width: D is the model's, K the keys' or values', F the feed-forward's. Eager mode
    keeps everything: each norm's input and (where no kernel fuses it, on a CPU) its normalised
    form; the norm's output, once for all products that take it; rotated q and k, v, attention's
    output and log-sum-exp; gate, up, silu(gate) and their product. Compiled, silu is recomputed,
    and the output of o_proj is kept in place of the second norm's input. selective keeps products
    and attention, block the input alone.
    """
    model, b = config.model, setup.bytes
    D, K, F = model.dim, kv_dim(model), model.ffn_dim
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


def loss_bytes(config: Config, setup: Setup) -> ByMoment:
    """The loss with a chunk's logits and the gradients that it makes on the way; at the head, its
    gradient is scaled while the old one still exists."""
    model, v, b = config.model, config.tokenizer.vocab_size, setup.bytes
    n, head = setup.micro_batch * config.data.seq_len, sizes(config).head
    chunk = min(loss_chunk(config, setup.on_gpu) or n, n)
    # logits, log_softmax and, in bfloat16, what it is made from and the gradient in that type
    logits = chunk * v * (2 * b if setup.compiled else 8 if b == FP32 else 10)
    logits += chunk * v * b * (n > chunk)  # the gradient of the previous chunk
    if b < FP32:  # the chunk's share of the gradient comes as a product of its own
        logits = max(logits, chunk * v * b + b * head)
    copies = setup.autocasts + (setup.on_gpu and v % 64 > 0)  # of the head: cast, padded
    return {
        "loss": n * model.dim * b + FP32 * head + logits + copies * b * head,
        "head": 2 * b * (head + n * model.dim),
    }


def gathered_bytes(config: Config, setup: Setup) -> ByMoment:
    """What FSDP2 gathers and reduces: it has the next block's weights on their way, and in the
    backward pass a block's gradients."""
    if not setup.sharded:
        return {}
    size, b = sizes(config), setup.bytes
    last = size.head + config.model.dim  # embedding and last norm: see distributed.parallelize
    reshard = config.parallel.reshard_after_forward
    whole, block = (b * size.root, b * size.block) if reshard else (b * size.total, 0)
    forward, backward = whole + block, whole + 2 * block + FP32 * size.block
    found = (forward, forward, backward, backward, FP32 * last, 0.0)
    return dict(zip(MOMENTS, found, strict=True))


def muon_rounds(config: Config, setup: Setup) -> list[tuple[str, float, float]]:
    """Muon's first round over attention's matrices and over the feed-forward's: name, bytes of
    gradients that are freed by then, and bytes of its buffers (see optimizer.Muon).

    Each round first holds gradients, momenta and new momenta, stacked in float32, and the
    directions; then the directions, the matrices that this rank orthogonalises, the matrices as
    they travel (with DDP those of all ranks, sharded as they leave, arrive and are whole), and
    Newton-Schulz' x, next x and two squares. Gradients that are views, of DDP's buckets or of a
    block's in FSDP2, are not freed.
    """
    model = config.model
    sharers = setup.shards if setup.sharded else setup.ranks
    alike = 4 if model.n_kv_heads == model.n_heads else 2
    rounds, gone = [], 0.0
    for name, rows, columns, count in (
        ("Muon's attention", model.dim, model.dim, alike * model.n_layers),
        ("Muon's feed-forward", *sorted((model.dim, model.ffn_dim)), 2 * model.n_layers),
    ):
        matrix = rows * columns
        at_once = MUON_BATCH // (matrix * (1 if setup.sharded else sharers))
        length = min(count, sharers * max(1, at_once))
        each = -(-length // sharers)
        travel = each * matrix * (0 if sharers == 1 else 3 if setup.sharded else sharers)
        work = each * 2 * (matrix + rows * rows)
        own = length * matrix / setup.shards
        cast = setup.bytes * own if setup.bytes < FP32 else 0
        buffers = max(3 * FP32 * own + cast, setup.bytes * (own + travel + work))
        freed = gone + FP32 * length * matrix if sharers == 1 else 0.0
        rounds.append((name, freed, buffers))
        gone += FP32 * count * matrix
    return rounds


def peak(config: Config, setup: Setup) -> tuple[str, Memory]:
    """The moment of a step at which a rank holds most, and its bytes by part."""
    return max(moments(config, setup).items(), key=lambda found: sum(found[1].values()))
