"""Faster ways to the same numbers: attention, the loss, the KV cache, recomputation.

model.py says what a model computes; this file makes a device compute it well.

Shapes: B batch, T tokens, S cached tokens, D dim, H query heads, K key/value heads, E head_dim,
V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy as Policy
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

IGNORE = -100  # a target that is not trained on
SHORT = 256  # tokens in a row whose scores may all exist at once
Mask = Tensor | BlockMask | None  # what attention may see; None: causal


def document_mask(documents: Tensor) -> Mask:
    """Lets a token attend to itself and to those before it in its document.

    Made in each forward pass, once for all layers. On a GPU only blocks of the square that are not
    empty are computed; on a CPU, where compiled FlexAttention has no backward pass (torch 2.13),
    the mask is a boolean tensor (B, 1, T, T).

    Args:
        documents: number of each token's document (B, T).
    """
    B, T = documents.shape
    rows, positions = (torch.arange(n, device=documents.device) for n in (B, T))

    def sees(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents[row, key] == documents[row, query])

    if documents.device.type == "cpu":
        return sees(rows[:, None, None], None, positions[:, None], positions)[:, None]
    return compiled(create_block_mask)(sees, B, None, T, T, device=documents.device)


@functools.cache
def compiled(function: Callable) -> Callable:
    """The function compiled, once for all layers and steps, when it is first needed."""
    return torch.compile(function)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention (B, H, T, E) of q over k, v (B, K, S, E); without a mask it is causal.

    The mask of a single token is added to its scores.
    """
    groups, on_cpu = k.shape[1], q.device.type == "cpu"
    grouped = q.shape[1] != groups
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    if mask is not None and q.shape[2] == 1 and (grouped or on_cpu):
        # The heads of a group become queries. Kernels that take a mask don't take groups, and on a
        # CPU they take as long for one token as for 32.
        heads = q.unflatten(1, (groups, -1)).squeeze(3)
        way = attend_by_products if on_cpu else F.scaled_dot_product_attention
        return way(heads, k, v, mask).flatten(1, 2)[:, :, None]
    # In bfloat16 on a CPU, plain products beat the kernel, which works in blocks, if the compiler
    # fuses what is between them and rows are so short that all scores may exist: half the kernel's
    # time, forward and backward, at 256 tokens and head_dim 48.
    fused = on_cpu and q.dtype == torch.bfloat16 and torch.compiler.is_compiling()
    if mask is None and fused and q.shape[2] <= SHORT:
        heads = q.unflatten(1, (groups, -1))
        positions = torch.arange(q.shape[2], device=q.device)
        mask = torch.where(positions[:, None] < positions, -math.inf, 0.0)
        return attend_by_products(heads, k[:, :, None], v[:, :, None], mask).flatten(1, 2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention (..., T, E) of q over k, v (..., S, E) as its formula says; mask (..., T, S) is
    added to the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.float() + mask).softmax(-1).to(q.dtype) @ v


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for a batch.

    Each row has its own number of tokens: layers write at the positions that they are given, and
    attention never looks past a row's position, so prompts of unequal length share a batch.

    Args:
        shape: of each layer's keys and values (B, K, S, E).
        like: a tensor whose type and device they have.
    """

    def __init__(self, n_layers: int, shape: tuple[int, ...], like: Tensor):
        rows, heads, self.length, _ = shape
        self.keys = [like.new_zeros(shape) for _ in range(n_layers)]
        self.values = [like.new_zeros(shape) for _ in range(n_layers)]
        starts = torch.arange(0, rows * heads * self.length, self.length, device=like.device)
        self.starts = starts.view(rows, heads, 1)

    def layers(self, positions: Tensor, length: int) -> tuple[Mask, list[LayerCache]]:
        """The mask and each layer's cache, for tokens at positions (B, T) that attend to the first
        `length` entries."""
        assert length <= self.length, "the cache is shorter than length"
        mask = None  # causal: the sequence begins with these tokens
        if length > positions.shape[1] or length == 1:
            mask = past_mask(positions, length, self.keys[0].dtype)
        offsets = (self.starts + positions[:, None]).flatten()
        pairs = zip(self.keys, self.values, strict=True)
        return mask, [LayerCache(keys, values, offsets, length) for keys, values in pairs]


class LayerCache(NamedTuple):
    """A layer's keys and values (B, K, S, E), the offsets in them, counted over all rows and heads,
    where those of the current tokens belong (B K T), and how many per row are attended to."""

    keys: Tensor
    values: Tensor
    offsets: Tensor
    length: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, K, T, E); returns the first entries of each row (B, K, length, E)."""
        for kept, new in ((self.keys, k), (self.values, v)):
            kept.flatten(0, 2).index_copy_(0, self.offsets, new.flatten(0, 2))
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def past_mask(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores (B, 1, T, length), so that a token at a position (B, T) of its row
    sees nothing behind it. Each layer would convert a boolean mask to this one."""
    keys = torch.arange(length, device=positions.device)
    unseen = (keys > positions[..., None])[:, None]
    mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
    return mask.masked_fill_(unseen, -math.inf)


ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # see chunk_loss


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int, chunk_loss: ChunkLoss
) -> Tensor:
    """The sum of the losses (float32) of x (…, D) with logits x Wᵀ, W (V, D), and targets (…).

    Args:
        chunk: tokens whose logits exist at a time; 0: all.
        chunk_loss: the function of that name, perhaps compiled.
    """
    vocab_size, device = len(weight), x.device.type
    if torch.is_autocast_enabled(device):  # it does not reach into a function of our own
        x, weight = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, weight))
    if device == "cuda" and (missing := -len(weight) % 64):
        weight = F.pad(weight, (0, 0, 0, missing))
    options = vocab_size, chunk, chunk_loss, torch.is_grad_enabled()
    return LinearCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), *options)


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses of x (N, D) with logits x Wᵀ, W (V, D), a chunk of tokens at a time.

    Gradients are computed with the loss, while a chunk's logits exist: that takes the same three
    products as without chunks, and never more memory than a chunk's logits.

    W may have more rows than vocab_size, of zeros: a GPU is slow at products whose number of rows
    does not divide by 64. Those rows make no logits.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        chunk: int,
        chunk_loss: ChunkLoss,
        with_gradients: bool,
    ) -> Tensor:
        loss = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if with_gradients else None
        # float32, or every chunk would round it
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        chunk = chunk or len(x)
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            logits = x[part] @ weight.T
            logits[:, vocab_size:].fill_(-math.inf)
            lost, grad = chunk_loss(logits, targets[part])
            del logits  # they are large
            loss += lost
            if with_gradients:
                torch.mm(grad, weight, out=grad_x[part])
                if grad.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, x[part])
                else:
                    grad_weight += grad.T @ x[part]
        if with_gradients:
            ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, share: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * share, grad_weight * share, None, None, None, None, None


def chunk_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss (float32) of logits (N, V) and its gradient (N, V) in their type."""
    trained = targets != IGNORE
    index = targets.clamp(min=0)[:, None]
    log_p = logits.log_softmax(dim=-1, dtype=torch.float32)
    loss = -(log_p.gather(1, index)[:, 0] * trained).sum()
    if torch.compiler.is_compiling():  # fused, so that log_p never exists, which scatter_ needs
        grad = log_p.exp() - (torch.arange(logits.shape[-1], device=index.device) == index)
    else:
        grad = log_p.exp_()
        grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    return loss, grad.mul_(trained[:, None]).to(logits.dtype)


def recomputed(recompute: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), where the backward pass computes results again instead of keeping them:
    none of them, all (block), or all but those of matrix products and attention (selective;
    Korthikanti et al., arXiv 2205.05198)."""
    if recompute == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    chosen = {"context_fn": contexts} if recompute == "selective" else {}
    # without dropout there is no random state to restore
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **chosen)


def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Policy:
    """Which results selective recomputation keeps."""
    return Policy.MUST_SAVE if operator in PRODUCTS else Policy.PREFER_RECOMPUTE


PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
