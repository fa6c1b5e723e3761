"""The optimizer and its learning rate: AdamW with decay on matrices only, Muon, the schedules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config import OptimizerConfig
from distributed import local_part, shard_dimension

BATCH = 1 << 25  # elements that Muon's buffer holds, or more where one matrix a rank needs more


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over the model's parameters, sharded or not.

    With muon the blocks' matrices are left to it, and to AdamW the embeddings, head and norms.

    Args:
        dtype: that Muon orthogonalises in.
    """
    named = list(model.named_parameters())
    inner = [p for name, p in named if name.startswith("model.layers.") and p.ndim == 2]
    inner = inner if config.name == "muon" else []
    outer = [p for _, p in named if not any(p is matrix for matrix in inner)]
    groups = [
        {"params": [p for p in outer if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in outer if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,  # one kernel for all parameters, which takes found_inf
    }
    if not inner:
        return AdamW(groups, **options)
    groups.append({"params": inner, "weight_decay": config.weight_decay})
    return Muon(groups, config.momentum, dtype, **options)


class AdamW(torch.optim.AdamW):
    """torch's, over the rows that a rank holds of each parameter.

    Over DTensors a step takes the host several times as long, and in torch 2.11 leaks memory
    (pytorch issue 188174).
    """

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:  # parameters, gradients, moments, step counts
            tensors[:] = [local_part(tensor)[0] for tensor in tensors]
        return has_complex


class Muon(AdamW):
    """Muon for the matrices of the last group, AdamW for the groups before it.

    Muon (Jordan et al., kellerjordan.github.io/posts/muon) steps along the momentum's nearest
    orthogonal matrix. At 0.2 sqrt(max(rows, columns)) times that, the elements move about as far
    as AdamW's, so both share learning rate and decay (Moonlight, arXiv 2502.16982).

    Each matrix is orthogonalised by one rank, and matrices of one shape in rounds of equally many
    a rank: DDP gathers the results, one collective a round; FSDP2 and HSDP exchange rows for
    whole matrices and back, two a round within the shard group (HSDP's replicas do the same work).
    A matrix of r rows and c columns, c the more, costs about 20 r²c + 10 r³ FLOPs, against the
    6 rc a token of training. The state is half of AdamW's; a round takes in memory 12 to 24 bytes
    an element of its buffer, which has BATCH elements or, if that is more, what one matrix for each
    rank needs: the world's size times a matrix under DDP, one matrix if sharded. Within a round
    each operation is one kernel for all its matrices: on a GPU one for each would take longer to
    launch than to run.

    Where found_inf is 1 a step changes nothing, as with fused AdamW, and no host waits for it.
    Matrices' gradients are gone after a step.
    """

    def __init__(
        self, groups: list[dict], momentum: float, dtype: torch.dtype, **options: object
    ) -> None:
        super().__init__(groups, **options)
        self.momentum, self.dtype = momentum, dtype
        alike = defaultdict(list)
        for matrix in self.param_groups[-1]["params"]:
            alike[matrix.shape].append(matrix)
        self.rounds: list[list[nn.Parameter]] = []
        for matrices in alike.values():
            ranks = _sharers(matrices[0])[1]
            buffer = matrices[0].numel() * (1 if isinstance(matrices[0], DTensor) else ranks)
            length = ranks * max(1, BATCH // buffer)
            self.rounds += [matrices[i : i + length] for i in range(0, len(matrices), length)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for matrices in self.rounds:
            self._step_matrices(matrices)
        super().step()  # passes over what has no gradient

    def _step_matrices(self, matrices: list[nn.Parameter]) -> None:
        rate, decay = (self.param_groups[-1][name] for name in ("lr", "weight_decay"))
        found_inf = getattr(self, "found_inf", None)

        def change(kept: list[Tensor], old: Tensor, new: Tensor) -> None:
            if found_inf is not None:
                torch.where(found_inf > 0, old, new, out=new)
            torch._foreach_copy_(kept, list(new.unbind()))

        updates = _orthogonalize_together(self._directions(matrices, change), matrices[0])
        scale = 0.2 * math.sqrt(max(matrices[0].shape))
        rows = [local_part(matrix)[0] for matrix in matrices]
        old = torch.stack(rows)
        change(rows, old, (old * (1 - rate * decay)).sub_(updates, alpha=rate * scale))

    def _directions(
        self, matrices: list[nn.Parameter], change: Callable[[list[Tensor], Tensor, Tensor], None]
    ) -> Tensor:
        """Takes the gradients into the momenta and gives Nesterov's: this rank's rows (N, r, C)."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        gradients = torch.stack([local_part(matrix.grad)[0] for matrix in matrices])
        for matrix in matrices:
            matrix.grad = None
        momenta = [local_part(self.state[matrix]["momentum"])[0] for matrix in matrices]
        old = torch.stack(momenta)
        mean = old.lerp(gradients, 1 - self.momentum)
        directions = gradients.lerp_(mean, self.momentum).to(self.dtype)
        change(momenta, old, mean)
        return directions


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: singular values come to lie around 1.

    Five Newton-Schulz steps with the quintic's coefficients of kellerjordan.github.io/posts/muon.
    Rows or columns of zeros stay zero and leave the others as they would be alone.

    Args:
        matrices: (B, R, C), in the type to compute in.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        higher = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, higher, x, beta=3.4445)
    return x.mT if tall else x


def _sharers(matrix: Tensor) -> tuple[dist.ProcessGroup | None, int]:
    """The group that shares the work on a matrix, and its size: its shards' ranks, or all."""
    group = dist.group.WORLD  # None in a program that has not joined any
    if isinstance(matrix, DTensor):
        group = matrix.device_mesh.get_group(shard_dimension(matrix))
    return group, dist.get_world_size(group) if group else 1


def _orthogonalize_together(parts: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of the orthogonalised matrices, whose rows here are parts (N, r, C).

    Args:
        like: a parameter that is distributed as each of them.
    """
    group, ranks = _sharers(like)
    if ranks == 1:
        return orthogonalize(parts)
    each = -(-len(parts) // ranks)  # matrices that a rank orthogonalises, some perhaps of zeros
    sharded = isinstance(like, DTensor)
    chunk = -(-like.shape[0] // ranks) if sharded else like.shape[0]  # as in local_part
    buffer = parts.new_zeros(ranks * each, chunk, like.shape[1])
    own_rows = buffer[: len(parts), : parts.shape[1]]
    own_rows.copy_(parts)
    if sharded:
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer, group=group)
        whole = received.unflatten(0, (ranks, each)).transpose(0, 1).flatten(1, 2)
        whole = orthogonalize(whole).unflatten(1, (ranks, chunk)).transpose(0, 1)
        dist.all_to_all_single(buffer, whole.contiguous().flatten(0, 1), group=group)
    else:
        own = buffer.unflatten(0, (ranks, each))[dist.get_rank(group)]
        # torch 2.13's name; each rank would warn of the other
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(buffer, orthogonalize(own).contiguous(), group=group)
    return own_rows


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """The rate of step 0 … max_steps - 1: linear warm-up, then the schedule.

    cosine falls to min_lr_fraction of the peak, linear to zero; wsd stays at the peak and falls
    linearly to zero over the last decay_fraction of the run (arXiv 2405.18392).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    if config.schedule == "cosine":
        low = config.min_lr_fraction
        factor = low + (1 - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    elif config.schedule == "linear":
        factor = max(0.0, 1 - progress)
    elif config.schedule == "wsd":
        factor = min(1.0, (max_steps - step) / max(1.0, config.decay_fraction * max_steps))
    else:
        factor = 1.0
    return config.learning_rate * factor
