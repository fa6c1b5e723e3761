"""The model: Llama 2 (Touvron et al., arXiv 2307.09288) in plain PyTorch, as the paper has it.

It knows nothing of distribution, files or training; what only makes it faster is in fast.py.
Modules and parameters carry the names of Hugging Face's LlamaForCausalLM, and the rotary embedding
uses its half-split layout, so a state dict moves between the two unchanged.

Shapes: B batch, T tokens, D dim, E head_dim, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig, Recompute
from fast import (
    KVCache,
    LayerCache,
    Mask,
    attend,
    chunk_loss,
    document_mask,
    linear_cross_entropy,
    recomputed,
)

Rotary = tuple[Tensor, Tensor]  # see rotary_tables
RESIDUAL = ("o_proj.weight", "down_proj.weight")  # the matrices that end a block's two branches


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In the type of x, as in a sharded model, whose weights are cast. Autocast on a GPU would
        # return float32 from torch 2.12 on, and the fused kernel takes one type.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # 3% of a token's time on a CPU
                return self.forward(x)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary_tables(positions: Tensor, config: ModelConfig) -> Rotary:
    """Cosines and sines (B, 1, T, E) of positions (B, T), float32 (RoPE, arXiv 2104.09864).

    Computed in each forward pass, once for all layers: a buffer would not survive the meta device.
    """
    head_dim = config.dim // config.n_heads
    powers = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * config.rope_theta**-powers
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + E/2) of each head by their position's angle; x (B, heads, T, E)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.q_proj = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: Mask, past: LayerCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if past:
            k, v = past.update(k, v)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, recompute: Recompute):
        super().__init__()
        self.recompute = recompute
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return recomputed(self.recompute, self.residual, x, *context)

    def residual(self, x: Tensor, rotary: Rotary, mask: Mask, past: LayerCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Linear):
    """The output matrix, which makes logits or, a chunk of tokens at a time, the loss.

    The loss is made here and not in Llama, so that FSDP2, which shards this module, knows when its
    gradient is there: at the beginning of the backward pass.
    """

    def __init__(self, dim: int, vocab_size: int, loss_chunk: int):
        super().__init__(dim, vocab_size, bias=False)
        self.loss_chunk, self.chunk_loss = loss_chunk, chunk_loss

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (…, V) of x (…, D), or with targets (…) the sum of the losses."""
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, targets, self.loss_chunk, self.chunk_loss)


class Llama(nn.Module):
    """Llama 2.

    Args:
        loss_chunk: tokens whose logits exist at a time when a loss is computed; 0: all.
        recompute: what the backward pass computes again, to save memory; see fast.recomputed.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        loss_chunk: int = 0,
        recompute: Recompute = "none",
    ):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocab_size, config.dim),
                "layers": nn.ModuleList(Block(config, recompute) for _ in range(config.n_layers)),
                "norm": RMSNorm(config.dim, config.norm_eps),
            }
        )
        self.lm_head = Head(config.dim, vocab_size, loss_chunk)
        self.tie()

    def tie(self) -> None:
        """Makes tied embeddings one matrix; call it again after to_empty gave them new memory."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def compile_parts(self) -> None:
        """Compiles the blocks and the loss, without a graph break.

        Block by block, so that one graph serves all of them and FSDP2 can work between them; only
        `forward`, so that hooks stay outside of the graph and parameters keep their names.
        """
        # It would split blocks to overlap their communication, which goes block by block already.
        torch._dynamo.config.optimize_ddp = False
        for layer in self.model.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
        self.lm_head.chunk_loss = torch.compile(chunk_loss, fullgraph=True, dynamic=False)

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache of `length` tokens per row, of the weights' type and on their device."""
        shape = rows, self.config.n_kv_heads, length, self.config.dim // self.config.n_heads
        return KVCache(self.config.n_layers, shape, self.model.embed_tokens.weight)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        length: int = 0,
        logits_at: Any = ...,
    ) -> Tensor:
        """Logits (B, T, V), or with targets the *sum* of the losses in nats (float32 scalar).

        Args:
            tokens: ids (B, T).
            targets: ids (B, T), IGNORE where a token is not trained on.
            documents: number of each token's document (B, T): attention stays within it. Positions
                run on over documents, since rotary embeddings encode distances only. No cache.
            cache: keys and values of earlier tokens; the current ones are added at `positions`.
            positions: position of each token in its sequence (B, T); only with a cache.
            length: cached tokens to attend to, above every position; only with a cache.
            logits_at: an index into (B, T): which tokens' logits to compute (…, V), since those of
                all can take gigabytes.
        """
        mask, past = None, [None] * len(self.model.layers)
        if cache is not None:
            mask, past = cache.layers(positions, length)
        else:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            if documents is not None:
                mask = document_mask(documents)
        rotary = rotary_tables(positions, self.config)
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):  # as in a sharded model: its weights are cast
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer, seen in zip(self.model.layers, past, strict=True):
            x = layer(x, rotary, mask, seen)
        x = self.model.norm(x[logits_at])
        return self.lm_head(x) if targets is None else self.lm_head(x, targets)


class Transfer(NamedTuple):
    """Factors of a parameter's initial deviation and of its learning rate."""

    std: float = 1.0
    lr: float = 1.0


def transfer(name: str, config: ModelConfig, muon: bool) -> Transfer:
    """How the settings of a parameter differ from those of the base shape, so that a learning rate
    found at model.base_dim and model.base_layers is right at dim and n_layers. Ones without a base.

    Width follows maximal update (arXiv 2203.03466): a step changes each matrix's output as much as
    in the base model. Elements of AdamW's update are about one, so its rate falls with the width.
    Muon's update has the spectral norm 0.2 sqrt(width), so its rate falls with the root (spectral
    condition, arXiv 2310.17813). Depth follows CompleteP (arXiv 2505.01618), which divides what a
    block adds by the number of blocks; here the matrices that end its two branches absorb that.

    Weight decay is left alone: what a step takes from a weight, lr * weight_decay of it, has no
    factor, so weights are forgotten over equally many steps (arXiv 2405.13698).
    """
    width = config.dim / (config.base_dim or config.dim)
    depth = config.n_layers / (config.base_layers or config.n_layers)
    if name == "lm_head.weight":
        return Transfer(1 / width, 1 / width)
    if name == "model.norm.weight" and config.tie_embeddings:
        return Transfer(1 / width, 1 / width)  # in place of the head, which is the embedding
    if not name.startswith("model.layers.") or name.endswith("norm.weight"):
        return Transfer()
    std, lr = width**-0.5, width**-0.5 if muon else 1 / width
    return Transfer(std / depth, lr / depth) if name.endswith(RESIDUAL) else Transfer(std, lr)


def initial_weight(
    name: str, shape: torch.Size, config: ModelConfig, seed: int, device: torch.device
) -> Tensor:
    """The initial value of one parameter: normal with deviation init_std, residual projections at
    init_std / sqrt(2 n_layers) (GPT-2's rule), norms at one; all times transfer(…).std, where
    n_layers is then the base's.

    A pure function of seed and name, so any rank can make any parameter by itself, and weights are
    equal at every world size and strategy on the same kind of device.
    """
    factor = transfer(name, config, muon=False).std
    if len(shape) == 1:
        return torch.full(shape, factor, device=device)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    layers = config.base_layers or config.n_layers
    std = config.init_std / math.sqrt(2 * layers) if name.endswith(RESIDUAL) else config.init_std
    return torch.empty(shape, device=device).normal_(0.0, std * factor, generator=generator)


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of the model, tied ones once; allocates nothing."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config, vocab_size).parameters())


def flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Training FLOPs per token, forward and backward: 6 N + 12 L D T (PaLM, arXiv 2204.02311).

    N counts the matrices that a token is multiplied with, so not the input embedding.
    """
    embedding = 0 if config.tie_embeddings else vocab_size * config.dim
    matrices = parameter_count(config, vocab_size) - embedding
    return 6 * matrices + 12 * config.n_layers * config.dim * seq_len
