"""Faster ways to the same numbers: attention, the loss, recomputation, products on a CPU.

What a model computes stands in model.py; here is what makes a device compute it well.

Shapes: B batch, T tokens, S cached tokens, D dim, H query heads, K key/value heads, E head_dim,
V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

IGNORE = -100  # a target that is not trained on
SHORT = 256  # tokens, see multiplies_faster


def document_mask(documents: Tensor) -> Tensor | BlockMask:
    """What a token attends to: itself and those before it in its document.

    Made at each forward pass, once for all layers. On a GPU only the blocks of the square that have
    something in them are computed; on a CPU, where compiled FlexAttention has no backward pass
    (torch 2.13), the mask is a boolean tensor (B, 1, T, T).

    Args:
        documents: number of each token's document (B, T).
    """
    B, T = documents.shape
    rows, places = (torch.arange(n, device=documents.device) for n in (B, T))

    def sees(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents[row, key] == documents[row, query])

    if documents.device.type == "cpu":
        return sees(rows[:, None, None], None, places[:, None], places)[:, None]
    return compiled(create_block_mask)(sees, B, None, T, T, device=documents.device)


@functools.cache
def compiled(function: Callable) -> Callable:
    """The function compiled: once for all layers and steps, when it is first needed."""
    return torch.compile(function)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """Attention (B, H, T, E) of q over k, v (B, K, S, E); without a mask it is causal.

    What masks a single token is added to its scores.
    """
    groups = k.shape[1]
    grouped, on_cpu = q.shape[1] != groups, q.device.type == "cpu"
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    if mask is not None and q.shape[2] == 1 and (grouped or on_cpu):
        # The heads of a group as so many queries: kernels that take a mask don't take groups, and
        # on a CPU they take a token's time for 32.
        heads = q.unflatten(1, (groups, -1)).squeeze(3)
        way = attend_by_products if on_cpu else F.scaled_dot_product_attention
        return way(heads, k, v, mask).flatten(1, 2)[:, :, None]
    if mask is None and multiplies_faster(q):
        heads = q.unflatten(1, (groups, -1))
        places = torch.arange(q.shape[2], device=q.device)
        mask = torch.where(places[:, None] < places, -math.inf, 0.0)
        return attend_by_products(heads, k[:, :, None], v[:, :, None], mask).flatten(1, 2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def multiplies_faster(q: Tensor) -> bool:
    """Whether whole products beat the kernel that makes blocks of them: in bfloat16 on a CPU, where
    the compiler fuses what is between them, over rows so short that all their scores may exist
    (measured at 256 tokens, head_dim 48, both ways: half the kernel's time)."""
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return on_cpu and torch.compiler.is_compiling() and q.shape[2] <= SHORT


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention (..., T, E) of q over k, v (..., S, E) as it is written down; mask (..., T, S) is
    added to the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.float() + mask).softmax(-1).to(q.dtype) @ v


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses of x (N, D) with logits x Wᵀ, W (V, D), a chunk of tokens at a time.

    Gradients are made along with the loss, while a chunk's logits are there: the same three
    products as without chunks, and never more logits than a chunk's.

    W may have more rows than vocab_size, of zeros: products with a number of rows that does not
    divide by 64 are slow on a GPU. What they give is no logit.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        chunk: int,
        chunk_loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        with_gradients: bool,
    ) -> Tensor:
        loss = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if with_gradients else None
        # float32, lest every chunk rounds it
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        for start in range(0, len(x), chunk or len(x)):
            part = slice(start, start + (chunk or len(x)))
            lost, grad = chunk_loss(make_logits(x[part], weight, vocab_size), targets[part])
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


def make_logits(x: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    """Logits of x (N, D) by weight (at least V, D); the caller keeps none, they are large."""
    logits = x @ weight.T
    logits[:, vocab_size:].fill_(-math.inf)
    return logits


def chunk_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss (float32) of logits (N, V) and its gradient (N, V) in their type."""
    trained = targets != IGNORE
    index = targets.clamp(min=0)[:, None]
    log_p = logits.log_softmax(dim=-1, dtype=torch.float32)
    loss = -(log_p.gather(1, index)[:, 0] * trained).sum()
    if torch.compiler.is_compiling():  # fused: log_p is never in memory, which a scatter needs
        grad = log_p.exp() - (torch.arange(logits.shape[-1], device=index.device) == index)
    else:
        grad = log_p.exp_()
        grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    return loss, grad.mul_(trained[:, None]).to(logits.dtype)


def keep_products() -> tuple[Any, Any]:
    """Selective activation checkpointing (Korthikanti et al., arXiv 2205.05198): what matrix
    products and attention made stays for the backward pass, the cheap rest is made again."""
    return create_selective_checkpoint_contexts(
        lambda context, operator, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE
            if operator in PRODUCTS
            else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )


PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU's library (oneDNN) takes weights of a type in an order of its own."""
    # torch's own operators, which a release may rename: without them weights stay as they are
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in needed):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model: nn.Module) -> None:
    """Lays out the matrices of linear layers as the CPU's library reads them best, in place."""
    for module in linears(model):
        packed = torch.ops.mkldnn._reorder_linear_weight(module.weight, None)
        module.weight = nn.Parameter(packed, requires_grad=False)
        module.__class__ = PackedLinear


class RowLinear(nn.Linear):
    """A linear layer whose product with a single row the compiler can write, with all threads."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != x.shape[-1]:
            return super().forward(x)
        product = (self.weight.float() * x.flatten().float()).sum(-1)
        return product.to(x.dtype).view(*x.shape[:-1], -1)


class PackedLinear(nn.Linear):
    """A linear layer with a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rocket.packed_product(x, self.weight)


torch.library.define("rocket::packed_product", "(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl("rocket::packed_product", "CompositeExplicitAutograd")
def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., D) times a packed weight (N, D). An operator of its own, since the compiler takes
    packed weights only as constants, which would be a graph a layer (torch 2.13)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@torch.library.register_fake("rocket::packed_product")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
