"""Optimizers and the learning rate: AdamW with decay on matrices only, Muon, the schedules."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config import OptimizerConfig
from distributed import local_part, shard_dimension
from model import transfer

BATCH = 1 << 25  # elements of Muon's buffer; more if one matrix per rank needs more


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) for the model's parameters, sharded or not.

    With optimizer.name = muon, the matrices of the blocks are Muon's, and AdamW has the embeddings,
    the head and the norms.

    Args:
        dtype: the type in which Muon orthogonalises.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    matrices: dict[nn.Parameter, float] = {}  # of Muon, and the factors of their rates
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2
        muon = config.name == "muon" and is_matrix and name.startswith("model.layers.")
        factor = transfer(name, model.config, muon).lr
        if muon:
            matrices[parameter] = factor
        else:
            groups[factor, is_matrix * config.weight_decay / factor].append(parameter)
    parts = [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]
    options = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,  # one kernel for all parameters; it knows found_inf
    }
    if not matrices:
        return AdamW(parts, **options)
    parts.append({"params": [*matrices], "lr_factor": 1.0, "weight_decay": config.weight_decay})
    return Muon(parts, matrices, config.momentum, dtype, **options)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, over this rank's rows of each parameter.

    A step over DTensors takes the host several times as long, and in torch 2.11 it leaks memory
    (pytorch issue 188174).
    """

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:  # parameters, gradients, moments, step counts
            tensors[:] = [local_part(tensor)[0] for tensor in tensors]
        return has_complex


class Muon(AdamW):
    """Muon for the matrices of the last parameter group, AdamW for the other groups.

    Muon (Jordan et al., kellerjordan.github.io/posts/muon) steps along the orthogonal matrix
    nearest to the momentum, here times 0.2 sqrt(max(rows, columns)): then elements move about as
    far as AdamW's, and both can share learning rate and decay (Moonlight, arXiv 2502.16982).

    Each matrix is orthogonalised by one rank. Matrices of one shape are processed in rounds, with
    the same number for each rank. DDP gathers the results, in one collective per round. FSDP2 and
    HSDP exchange rows for whole matrices and back, in two collectives per round within the shard
    group (HSDP's replicas do the same work). For r rows and c >= r columns, a matrix costs about
    20 r²c + 10 r³ FLOPs, compared with 6 rc per token of training. Each operation is one kernel for
    all matrices of a round: one per matrix would take a GPU longer to launch than to run.

    The state is half of AdamW's. A round takes 12 to 24 bytes of memory per element of its buffer,
    which has BATCH elements, or more if one matrix per rank needs more: under DDP the world's size
    times a matrix, one matrix if sharded.

    As with fused AdamW, a step with found_inf = 1 changes nothing, and the host does not wait for
    it. A step clears the gradients of the matrices.

    Args:
        factors: of each matrix's update, but not of its decay (see model.transfer). They are not
            rates of groups, because matrices of one shape share a round whatever their factors.
    """

    def __init__(
        self,
        groups: list[dict],
        factors: dict[nn.Parameter, float],
        momentum: float,
        dtype: torch.dtype,
        **options: object,
    ) -> None:
        super().__init__(groups, **options)
        self.factors, self.momentum, self.dtype = factors, momentum, dtype
        alike = defaultdict(list)
        for matrix in factors:
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
        super().step()  # skips parameters without a gradient: the matrices

    def _step_matrices(self, matrices: list[nn.Parameter]) -> None:
        rate, decay = (self.param_groups[-1][name] for name in ("lr", "weight_decay"))
        updates = _orthogonalize_together(self._directions(matrices), matrices[0])
        torch._foreach_mul_(list(updates.unbind()), [self.factors[m] for m in matrices])
        scale = 0.2 * math.sqrt(max(matrices[0].shape))
        rows = [local_part(matrix)[0] for matrix in matrices]
        old = torch.stack(rows)
        self._set(rows, old, (old * (1 - rate * decay)).sub_(updates, alpha=rate * scale))

    def _set(self, tensors: list[Tensor], old: Tensor, new: Tensor) -> None:
        """Sets tensors to their new values, stacked, or to the old ones where found_inf is 1."""
        if getattr(self, "found_inf", None) is not None:
            torch.where(self.found_inf > 0, old, new, out=new)
        torch._foreach_copy_(tensors, list(new.unbind()))

    def _directions(self, matrices: list[nn.Parameter]) -> Tensor:
        """Updates the momenta; returns Nesterov's directions for this rank's rows (N, r, C)."""
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
        self._set(momenta, old, mean)
        return directions


def orthogonalize(matrices: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrices to matrices (B, R, C): singular values are near 1.

    Five Newton-Schulz steps, with the coefficients of kellerjordan.github.io/posts/muon, in the
    type of the matrices. Rows or columns of zeros stay zero and don't change the others.
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
    """The ranks that share the work on a matrix, as a group and its size: its shards', or all."""
    group = dist.group.WORLD  # None in a process without a group
    if isinstance(matrix, DTensor):
        group = matrix.device_mesh.get_group(shard_dimension(matrix))
    return group, dist.get_world_size(group) if group else 1


def _orthogonalize_together(parts: Tensor, like: Tensor) -> Tensor:
    """Orthogonalises N matrices of which this rank holds the rows parts (N, r, C); returns the same
    rows of the results. like is one of the parameters, all of which are distributed alike."""
    group, ranks = _sharers(like)
    if ranks == 1:
        return orthogonalize(parts)
    each = -(-len(parts) // ranks)  # matrices per rank; the last ones may be zeros
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
        # torch 2.13's name; for the older one each rank would print a warning
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(buffer, orthogonalize(own).contiguous(), group=group)
    return own_rows


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step 0 … max_steps - 1: linear warm-up, then the schedule.

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
