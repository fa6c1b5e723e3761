"""Processes and sharding: what torchrun started, how ranks agree, and DDP, FSDP2 or HSDP.

Every run is a process group, plain python a group of one, so that the loop has one path.
Nothing here knows of data, steps or files.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from config import ParallelConfig, TrainConfig, UserError, available_cores

T = TypeVar("T")


class AgreedError(UserError):
    """A UserError of one rank that all ranks raise together."""

    printed_by = "RANK"


@dataclass(frozen=True)
class World:
    """This process among the others, and what it computes with."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    dtype: torch.dtype

    def once(self, function: Callable[[], T]) -> T:
        """The result of a function that rank 0 alone runs; its UserError is raised by every rank.

        What reads shared files goes through here: 512 ranks reading one manifest is a storm.
        """
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except UserError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise AgreedError(box[1])
        return box[0]

    def each(self, function: Callable[[], T]) -> list[T] | None:
        """Runs a function on all ranks; rank 0 gets the results, by rank, the others None.

        If one raises a UserError, all do. Only the messages travel to everyone.
        """
        result, message = None, None
        try:
            result = function()
        except UserError as error:
            message = str(error)
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, message)
        for rank, message in enumerate(messages):
            if message is not None:
                raise AgreedError(message + (f" (rank {rank})" if self.size > 1 else ""))
        results = [None] * self.size if self.rank == 0 else None
        dist.gather_object(result, results)
        return results

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place and on the device."""
        dist.all_reduce(values)
        return values


def init_distributed(config: TrainConfig) -> World:
    """Joins the processes that torchrun started, or makes a world of one; sets device and threads.

    Raises:
        UserError: fewer GPUs than processes; an environment that is half torchrun's.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        raise UserError(
            f"{' and '.join(given)} is set without the rest of {', '.join(names)}: start with"
            " torchrun, which sets all of them, or unset it"
        )
    numbers = [int(os.environ[name]) for name in names] if given else [0, 1, 0, 1]
    rank, size, local_rank, local_size = numbers
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank} needs GPU {local_rank}, this host has {torch.cuda.device_count()};"
            " start fewer processes or set train.device=cpu"
        )
    if name == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        device = torch.device("cpu")
        # torchrun sets one thread in silence, which leaves cores idle; any other number, and any
        # number without torchrun, is the user's.
        threads = os.environ.get("OMP_NUM_THREADS")
        if threads is None or (given and threads == "1"):
            torch.set_num_threads(max(1, available_cores() // local_size))
    backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
    if given:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, size, local_rank, local_size, device, compute_dtype(config.dtype, device))


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products; auto takes bfloat16 where the device has units for it.

    Without them it is emulated: a CPU with AVX2 alone ran 100 times slower than in float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def shut_down() -> None:
    """Leaves the process group; references to sharded state must be gone, or gloo ranks abort."""
    gc.collect()
    dist.destroy_process_group()


def parallelize(model: nn.Module, config: ParallelConfig, world: World) -> nn.Module:
    """Shards a model on the meta device, block by block, and gives it uninitialised memory.

    ddp leaves it whole; fsdp shards over all ranks; hsdp within a node, replicated across nodes.
    Weights, gradients and optimizer state stay float32; compute runs in the world's type.

    Raises:
        UserError: hsdp with nodes of unequal size.
    """
    if config.strategy != "ddp":
        options = {
            "mesh": _device_mesh(config.strategy, world),
            "reshard_after_forward": config.reshard_after_forward,
            # the rotary tables are inputs of the blocks and stay float32
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=world.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
        }
        for block in model.model.layers:
            fully_shard(block, **options)
        fully_shard(model, **options)
    model.to_empty(device=world.device)
    model.tie()
    return model


def _device_mesh(strategy: str, world: World) -> dist.DeviceMesh:
    if strategy == "fsdp":
        return dist.init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    nodes, rest = divmod(world.size, world.local_size)
    if rest:
        raise UserError(
            f"parallel.strategy=hsdp needs nodes of equal size, not {world.size} ranks over nodes"
            f" of {world.local_size}; use fsdp"
        )
    shape, names = (nodes, world.local_size), ("replicate", "shard")
    return dist.init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The module to call in training: the model itself if it is sharded or alone, else in DDP."""
    if isinstance(model, FSDPModule) or world.size == 1:
        return model
    device_ids = [world.local_rank] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether a backward pass of DDP reduces gradients: only a step's last micro-batch needs it.

    FSDP2 reduces at each one: unreduced, every rank would hold the whole model's gradients.
    """
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def autocast(model: nn.Module, world: World) -> torch.autocast:
    """Mixed precision of a whole model; a sharded one casts its own weights."""
    enabled = world.dtype != torch.float32 and not isinstance(model, FSDPModule)
    return torch.autocast(world.device.type, dtype=world.dtype, enabled=enabled)


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this rank holds, by reference, and the number of the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh = tensor.device_mesh
    dimension = next(d for d, p in enumerate(tensor.placements) if isinstance(p, Shard))
    chunk = -(-tensor.shape[0] // mesh.size(dimension))  # fully_shard cuts rows as torch.chunk does
    start = min(chunk * mesh.get_local_rank(dimension), tensor.shape[0])
    return tensor.to_local(), start


def writes(tensor: Tensor, index: int, world: World) -> bool:
    """Whether this rank is the one that saves its part of a tensor.

    Of equal copies (DDP's ranks, HSDP's replicas) one is saved, chosen by index to spread the work.
    """
    if not isinstance(tensor, DTensor):
        return index % world.size == world.rank
    mesh = tensor.device_mesh
    return mesh.ndim == 1 or index % mesh.size(0) == mesh.get_local_rank(0)


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scales the gradients to a norm of at most largest (0: as they are); their norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if largest:
        nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return norm
