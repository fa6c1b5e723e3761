"""Linear layers that sample faster on a CPU, with the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU's library (oneDNN) takes weights of a type in an order of its own."""
    # torch's own operators, which a release may rename: without them weights stay as they are
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in needed):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def pack(model: nn.Module) -> None:
    """Lays out the matrices of linear layers as the CPU's library reads them best, in place."""
    for module in linears(model):
        packed = torch.ops.mkldnn._reorder_linear_weight(module.weight, None)
        module.weight = nn.Parameter(packed, requires_grad=False)
        module.__class__ = PackedLinear


class RowLinear(nn.Linear):
    """A linear layer whose product with a single row the compiler writes, with all threads."""

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
    packed weights only as constants, which would make a graph per layer (torch 2.13)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@torch.library.register_fake("rocket::packed_product")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
