"""The model: Llama 2 in plain PyTorch. It knows nothing of distribution, files or training.

Modules and parameters carry the names of Hugging Face's LlamaForCausalLM and the rotary embedding
uses its half-split layout, so that a state dict moves between the two as it is.

Shapes: B batch, T tokens, S cached tokens, D dim, H query heads, K key/value heads, E head_dim,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from config import ModelConfig, Recompute
from kernels import LinearCrossEntropy, attend, chunk_loss, document_mask, keep_products


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for a batch.

    Row b of the batch holds its own number of tokens: each layer writes at the positions that it is
    given, and attention never looks past a row's position, so prompts of unequal length share a
    batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.length = length
        shape = (batch_size, config.n_kv_heads, length, config.dim // config.n_heads)
        layers = range(config.n_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        heads = torch.arange(batch_size * config.n_kv_heads, device=device)
        self.starts = heads.view(batch_size, -1, 1) * length

    def layers(self, positions: Tensor, length: int) -> list[Past]:
        """What each layer works with, at positions (B, T), looking at so many entries."""
        places = (self.starts + positions[:, None]).flatten()
        return [Past(*kept, places, length) for kept in zip(self.keys, self.values, strict=True)]


class Past(NamedTuple):
    """A layer's keys and values (B, K, S, E), where in them, counted over all rows and heads, those
    of the current tokens belong (B K T), and how many of each are looked at."""

    keys: Tensor
    values: Tensor
    places: Tensor
    length: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, K, T, E); returns the first entries of each row (B, K, length, E)."""
        for kept, new in ((self.keys, k), (self.values, v)):
            kept.flatten(0, 2).index_copy_(0, self.places, new.flatten(0, 2))
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In the type of x, as in a sharded model, whose weights are cast; autocast on a GPU makes
        # float32 of it from torch 2.12 on. One kernel takes one type.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # 3% of a token's time on a CPU
                return self.forward(x)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.q_proj = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        past: Past | None,
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
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

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        past: Past | None,
    ) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.add_both(x, rotary, mask, past)
        keep = {"context_fn": keep_products} if self.recompute == "selective" else {}
        # there is no dropout, hence no state of randomness to go back to
        options = {"use_reentrant": False, "preserve_rng_state": False, **keep}
        return checkpoint(self.add_both, x, rotary, mask, past, **options)

    def add_both(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None,
        past: Past | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, recompute: Recompute):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.dim)
        layers = (Block(config, recompute) for _ in range(config.n_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)


def past_mask(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores (B, 1, T, length): a token at a position (B, T) of its row sees what
    stands before it. Not boolean: each layer would make this of it."""
    keys = torch.arange(length, device=positions.device)
    unseen = (keys > positions[..., None])[:, None]
    mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
    return mask.masked_fill_(unseen, -math.inf)


class Llama(nn.Module):
    """Llama 2 (Touvron et al., arXiv 2307.09288).

    Args:
        loss_chunk: tokens whose logits exist at a time when a loss is asked for; 0: all.
        recompute: what a backward pass makes again instead of finding it in memory.
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
        self.model = Decoder(config, vocab_size, recompute)
        self.lm_head = Head(config.dim, vocab_size, loss_chunk)
        self.tie()

    def tie(self) -> None:
        """Makes tied embeddings one matrix; to be called again after new memory (to_empty)."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def compile_parts(self) -> None:
        """Compiles the blocks and the loss, without a graph break.

        A block at a time, since one graph serves all of them and what shards the model goes on
        working between them; forward alone, so that hooks stay outside and names as they are.
        """
        # It would cut blocks into pieces to overlap their communication, which blocks do already.
        torch._dynamo.config.optimize_ddp = False
        for layer in self.model.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
        self.lm_head.chunk_loss = torch.compile(chunk_loss, fullgraph=True, dynamic=False)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        length: int = 0,
        only: Any = None,
    ) -> Tensor:
        """Logits (B, T, V), or with targets the *sum* of the losses in nats (float32 scalar).

        Args:
            tokens: ids (B, T).
            targets: ids (B, T), IGNORE where a token is not trained on.
            documents: number of each token's document (B, T): attention stays within one. Positions
                run on over documents, as rotary embeddings tell distances alone; without a cache.
            cache: keys and values of earlier tokens; the current ones are added at `positions`.
            positions: place of each token in its sequence (B, T); with a cache only.
            length: cached entries to attend over, above every position; with a cache only.
            only: an index of (B, T), the tokens whose logits are wanted (…, V): those of all would
                take gigabytes.
        """
        mask, past = None, [None] * len(self.model.layers)
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            if documents is not None:
                mask = document_mask(documents)
        else:
            assert length <= cache.length, "the cache is shorter than length"
            if length > tokens.shape[1] or length == 1:  # else it begins here, and is causal
                mask = past_mask(positions, length, cache.keys[0].dtype)
            past = cache.layers(positions, length)
        rotary = rotary_tables(positions, self.config)
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):  # as a sharded model's, whose weights are cast
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer, seen in zip(self.model.layers, past, strict=True):
            x = layer(x, rotary, mask, seen)
        if only is not None:
            x = x[only]
        x = self.model.norm(x)
        return self.lm_head(x) if targets is None else self.lm_head(x, targets)


class Head(nn.Linear):
    """The output matrix, which makes logits or, a chunk of tokens at a time, the loss.

    The loss is made here and not by the model, since what shards the head then knows when its
    gradient is there: at the beginning of the backward pass.
    """

    def __init__(self, dim: int, vocab_size: int, loss_chunk: int):
        super().__init__(dim, vocab_size, bias=False)
        self.loss_chunk, self.chunk_loss = loss_chunk, chunk_loss

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (…, V) of x (…, D), or with targets (…) the sum of the losses."""
        if targets is None:
            return super().forward(x)
        weight, device = self.weight, x.device.type
        if torch.is_autocast_enabled(device):  # which does not look into a function of our own
            x, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, weight))
        if device == "cuda" and (missing := -len(weight) % 64):
            weight = F.pad(weight, (0, 0, 0, missing))
        ways = self.out_features, self.loss_chunk, self.chunk_loss, torch.is_grad_enabled()
        return LinearCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), *ways)


def rotary_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, E) of positions (B, T), float32 (RoPE, arXiv 2104.09864).

    Made at each forward pass, once for all layers: a buffer would have to survive the meta device.
    """
    head_dim = config.dim // config.n_heads
    powers = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * config.rope_theta**-powers
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + E/2) of each head by their position's angle; x (B, heads, T, E)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def initial_weight(
    name: str, shape: torch.Size, config: ModelConfig, seed: int, device: torch.device
) -> Tensor:
    """The initial value of one parameter: normal with deviation init_std, residual projections at
    init_std / sqrt(2 n_layers) (GPT-2's rule), norms at one.

    A pure function of seed and name, so that every rank can make any parameter alone, and the
    weights are equal at every world size and strategy on the same kind of device.
    """
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = config.init_std / math.sqrt(2 * config.n_layers) if residual else config.init_std
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of the model, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config, vocab_size).parameters())


def flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Training FLOPs a token, forward and backward: 6 N + 12 L D T (PaLM, arXiv 2204.02311).

    N counts the matrices that a token is multiplied with, so not the input embedding.
    """
    embedding = 0 if config.tie_embeddings else vocab_size * config.dim
    matrices = parameter_count(config, vocab_size) - embedding
    return 6 * matrices + 12 * config.n_layers * config.dim * seq_len
