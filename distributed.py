"""Processes and sharding: torchrun's process group, how ranks agree, and DDP, FSDP2 or HSDP.

Without torchrun a run is a process group of one, so that training has a single path. This file
knows nothing of data, steps or checkpoints.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import re
import resource
import shutil
import signal
import socket
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from config import (
    LOST_RANK,
    SICK_NODE,
    STARTED_BY,
    Config,
    ParallelConfig,
    UserError,
    available_cores,
    resolve_path,
)

T = TypeVar("T")
STARTUP_TIMEOUT = timedelta(minutes=30)  # ranks wait while one hashes, reads or compiles
SAVE_TIMEOUT = timedelta(hours=2)  # ranks wait for the slowest disk
MOST_FILES = 10_240  # open files per process, the most that macOS allows
POLL_SECONDS = 0.0005
LAG = 1  # steps after which the host reads a step's numbers; the device has its next step by then


class AgreedError(UserError):
    """A UserError of one rank that all ranks raise together."""

    printed_by = "RANK"

    def __init__(self, message: str, code: int = UserError.code) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def about(cls, rank: int, message: str, code: int, world: World) -> AgreedError:
        """An error that one rank met. If its node is sick, all ranks of the node exit with that
        code, because torchrun may see only the first that exits; other nodes have lost a rank."""
        first = world.rank - world.local_rank  # torchrun numbers a node's ranks consecutively
        same_node = first <= rank < first + world.local_size
        return cls(message, LOST_RANK if code == SICK_NODE and not same_node else code)


class NodeError(UserError):
    """Something is wrong with this node, and other nodes may work: a requeued job avoids it."""

    code = SICK_NODE


class LostRankError(UserError):
    """Another rank died or hangs: the same command may succeed if it is run again."""

    code = LOST_RANK


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, its device and its compute type."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    dtype: torch.dtype
    group: dist.ProcessGroup | None = None  # None: the default group

    def in_new_group(self) -> World:
        """The same ranks with a process group of its own, for collectives in another thread."""
        return replace(self, group=dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT))

    def once(self, function: Callable[[], T]) -> T:
        """Runs a function on rank 0 alone, and returns its result on every rank.

        Shared files are read in this way, because 512 ranks that read one manifest overload the
        file system. If the function raises a UserError or OSError, all ranks raise an AgreedError.
        """
        box = [_attempt(function) if self.rank == 0 else None]
        dist.broadcast_object_list(box, group=self.group)
        result, failure = box[0]
        if failure:
            raise AgreedError(failure[0])
        return result

    def each(self, function: Callable[[], T]) -> list[T] | None:
        """Runs a function on every rank; returns all results, by rank, on rank 0, elsewhere None.

        If the function raises a UserError or OSError on a rank, all ranks raise an AgreedError.
        """
        result, failure = _attempt(function)
        for rank, failed in enumerate(self.gather(failure)):
            if failed:
                message, code = failed
                message += f" (rank {rank})" if self.size > 1 else ""
                raise AgreedError.about(rank, message, code, self)
        results = [None] * self.size if self.rank == 0 else None
        dist.gather_object(result, results, group=self.group)
        return results

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place, on the device."""
        if self.size > 1:  # a single GPU needs no NCCL
            dist.all_reduce(values, group=self.group)
        return values


def _attempt(function: Callable[[], T]) -> tuple[T | None, tuple[str, int] | None]:
    """A function's result, and the message and exit code of a UserError or OSError."""
    try:
        return function(), None
    except (UserError, OSError) as error:
        return None, (str(error), getattr(error, "code", UserError.code))


class Arrived(NamedTuple):
    """Numbers of an earlier step that have reached the host."""

    tag: Any  # as given to Lagged.push
    values: list[float]
    time: float  # when the device had computed them, by time.monotonic()


class Lagged:
    """Brings each step's numbers to the host LAG steps later, so that it need not wait for a step.

    If it has to wait all the same, it calls while_waiting repeatedly, with the time.monotonic() at
    which the wait began. An exception that this raises ends the wait.
    """

    def __init__(self, while_waiting: Callable[[float], None]) -> None:
        self._while_waiting = while_waiting
        self._waiting: deque[tuple[Any, Tensor, torch.cuda.Event | None, float]] = deque()

    def push(self, tag: Any, values: Tensor) -> list[Arrived]:
        """Takes a step's numbers (N,); returns those of all steps but the last LAG."""
        event = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((tag, values, event, time.monotonic()))
        return self.drain(keep=LAG)

    def drain(self, keep: int = 0) -> list[Arrived]:
        """Returns the numbers of all steps but the last `keep`, once the device has them."""
        arrived = []
        while len(self._waiting) > keep:
            tag, values, event, at = self._waiting.popleft()
            if event:
                # event.synchronize() would block Python's signal handlers, and if a rank has died
                # under NCCL, it would never return.
                since = time.monotonic()
                while not event.query():
                    self._while_waiting(since)
                    time.sleep(POLL_SECONDS)
                at = time.monotonic()
            arrived.append(Arrived(tag, values.tolist(), at))
        return arrived


def fetch(values: Tensor, while_waiting: Callable[[float], None]) -> list[Any]:
    """The numbers of a tensor on the device, for which it waits as Lagged does."""
    lagged = Lagged(while_waiting)
    lagged.push(None, values)
    return lagged.drain()[0].values


def init_distributed(config: Config) -> World:
    """Joins the processes that torchrun started, or makes a group of one; sets device and threads.

    Collectives may take STARTUP_TIMEOUT, until set_timeout shortens it. UserError if there are
    fewer GPUs than processes, or if only some of torchrun's variables are set.
    """
    _die_with_agent()
    rank, size, local_rank, local_size = _torchrun_ranks()
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        kind = UserError if size == local_size else NodeError  # other nodes may have more
        raise kind(
            f"rank {rank} needs GPU {local_rank}, {socket.gethostname()} has"
            f" {torch.cuda.device_count()}; start fewer processes or set train.device=cpu"
        )
    # All ranks compile at once, so they share the node's cores; by default each would take up to
    # 32. Turning on deterministic algorithms imports what reads this variable, so it comes first.
    workers = max(1, min(32, available_cores() // local_size))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(workers))
    if config.train.deterministic:  # the same bits each time, on a GPU too, or an error
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which no code reads
    if name == "cuda":
        # Segments that grow leave no gaps, as blocks of many sizes do. The first allocation reads
        # the variable. The user may have set another value, also under the variable's older name.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        # If a collective hangs, each rank dumps its last ones.
        dump = resolve_path(config.train.out_dir) / "logs" / "flight_recorder_"
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(dump))
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        backend, device = "gloo", torch.device("cpu")
        if not _user_set_threads():
            torch.set_num_threads(max(1, available_cores() // local_size))
        _keep_freed_memory()
    store = None  # torchrun's
    if "RANK" not in os.environ:
        store = dist.HashStore()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _meeting_point(rank)
    _allow_sockets()
    dist.init_process_group(
        backend, timeout=STARTUP_TIMEOUT, world_size=size, rank=rank, store=store
    )
    dtype = compute_dtype(config.train.dtype, device)
    return World(rank, size, local_rank, local_size, device, dtype)


@contextlib.contextmanager
def process_group(config: Config) -> Iterator[World]:
    """The process group of a training; all ranks leave it together. LostRankError if a collective
    fails because another rank died or hangs."""
    try:
        yield init_distributed(config)
    except AgreedError:  # on all ranks; after any other error, some may still wait for this one
        shut_down()
        raise
    except (RuntimeError, dist.DistError) as error:
        if lost := explain_lost_rank(error):
            if torch.cuda.is_initialized():  # its kernels wait for the lost rank: don't wait too
                atexit.register(os._exit, 1)
            raise lost from None
        raise
    shut_down()


def _torchrun_ranks() -> list[int]:
    """Rank and number of ranks, overall and within this node, as torchrun sets them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        raise UserError(
            f"{' and '.join(given)} is set without the rest of {', '.join(names)}: start with"
            " torchrun, which sets all of them, or unset it"
        )
    return [int(os.environ[name]) for name in names] if given else [0, 1, 0, 1]


def _user_set_threads() -> bool:
    """Whether the user has set OMP_NUM_THREADS.

    For several ranks torchrun sets it to 1 if the user did not, which leaves cores idle. /proc has
    torchrun's own environment. Without /proc (macOS), a 1 is taken to be torchrun's.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads != "1" or int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1:
        return threads is not None
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    pid, environment = os.getpid(), [b"TORCHELASTIC_RUN_ID="]
    try:
        while any(entry.startswith(b"TORCHELASTIC_RUN_ID=") for entry in environment):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in environment)


def _die_with_agent() -> None:
    """Makes this rank die with the torchrun agent that started it (Linux). A rank that outlives it
    would keep the run, or its GPU, from the ranks of the next attempt."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl and "TORCHELASTIC_RUN_ID" in os.environ:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        # If the agent died before that call, this process now has another parent, process 1. But in
        # a container the agent itself may be process 1.
        first = Path("/proc/1/cmdline")
        adopted = os.getppid() == 1 and first.exists() and b"python" not in first.read_bytes()
        if adopted or os.getppid() != STARTED_BY:
            os._exit(LOST_RANK)


def cudnn_version() -> str:
    """The version of cuDNN in use, such as 9.19.0; attention is faster in newer ones."""
    number = torch.backends.cudnn.version() or 0
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def _keep_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning large blocks to the system at once: a
    tenth of each step went into the first use of new pages. A user's own MALLOC_MMAP_THRESHOLD_
    is respected."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # glibc's
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _allow_sockets() -> None:
    """Raises the limit of open files: in each process group, gloo opens a socket to every rank. For
    512 ranks the usual limit of 1,024 is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _meeting_point(rank: int) -> dist.Store:
    """A store for this attempt alone, served by rank 0.

    torchrun's own store survives --max-restarts (torch 2.13), so that restarted ranks would find
    addresses of dead ranks in it. It is only used to pass on the address of the new store. A rank
    that still finds the previous store's address looks again.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    options = {"timeout": STARTUP_TIMEOUT, "wait_for_workers": False}
    agents = dist.TCPStore(host, port, is_master=False, **options)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, **options)
        agents.set("rocket", f"{host} {store.port}")
        return store
    deadline = time.monotonic() + STARTUP_TIMEOUT.total_seconds()
    while True:
        host, port = agents.get("rocket").decode().split()
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return dist.TCPStore(host, int(port), is_master=False, **options)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(f"rank {rank} can't reach rank 0 at {host}: {error}") from None
            time.sleep(0.2)


def set_timeout(model: nn.Module, seconds: float) -> None:
    """Sets the time after which a collective of training counts as hanging, which is an error."""
    groups = {dist.group.WORLD}
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            groups.update(parameter.device_mesh.get_all_groups())
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def explain_lost_rank(error: BaseException) -> LostRankError | None:
    """The error to raise if a collective failed because another rank died or hangs; else None."""
    text = str(error).partition("\n")[0]
    if not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        return None
    text = re.sub(r"^\[\S+\] ", "", text).partition(". ")[0]  # without source file and advice
    return LostRankError(
        f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()} lost contact with another"
        f" rank, which died or hangs: {text}. What was saved is intact: run the same command again"
        " to go on"
    )


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products; auto is bfloat16 if the device has units for it. Otherwise it
    would be emulated: on a CPU with only AVX2, 100 times slower than float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def check_compiler(device: torch.device, otherwise: str = "set train.compile=off") -> None:
    """UserError if this host lacks what torch.compile needs: Python's headers and a compiler, also
    for a GPU, because Triton's launchers are C."""
    variable, names = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    headers = Path(sysconfig.get_path("include"), "Python.h")
    missing = "" if any(map(shutil.which, names)) else f"a compiler ({' or '.join(names)})"
    if missing := missing or ("" if headers.exists() else str(headers)):
        raise UserError(
            f"compiling the model needs {missing}, which {socket.gethostname()} lacks; install it,"
            f" or {otherwise}"
        )


def compiles(choice: str, device: torch.device) -> bool:
    """Whether to compile the model; auto compiles on a GPU."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


def shut_down() -> None:
    """Leaves the process group. Sharded tensors must be gone by then, or gloo may abort at exit."""
    gc.collect()
    dist.destroy_process_group()


def parallelize(model: nn.Module, config: ParallelConfig, world: World) -> nn.Module:
    """Shards a model on the meta device, block by block, and gives it uninitialised memory.

    ddp leaves it whole, fsdp shards over all ranks, hsdp shards within each node and replicates
    across nodes (UserError if these are of unequal size). Weights, gradients and optimizer state
    are float32; compute uses the world's type.
    """
    if config.strategy != "ddp":
        options = {
            "mesh": _device_mesh(config.strategy, world),
            # the rotary tables, inputs of the blocks, stay float32
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=world.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
        }
        for block in model.model.layers:
            fully_shard(block, reshard_after_forward=config.reshard_after_forward, **options)
        if not model.config.tie_embeddings:
            # In a group of its own: its gradient, the first of the backward pass, is reduced while
            # those of the blocks are computed, and the first block does not wait for its weights.
            fully_shard(model.lm_head, reshard_after_forward=False, **options)
        fully_shard(model, reshard_after_forward=False, **options)
    model.to_empty(device=world.device)
    model.tie()
    return model


def _device_mesh(strategy: str, world: World) -> dist.DeviceMesh:
    shape, names = (world.size,), ("shard",)
    if strategy == "hsdp":
        if world.size % world.local_size:
            raise UserError(
                f"parallel.strategy=hsdp needs nodes of equal size, not {world.size} ranks over"
                f" nodes of {world.local_size}; use fsdp"
            )
        shape = world.size // world.local_size, world.local_size
        names = ("replicate", "shard")
    return dist.init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The module to call in training: the model in DDP, unless it is sharded or on a lone rank."""
    if isinstance(model, FSDPModule) or world.size == 1:
        return model
    device_ids = [world.local_rank] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def reshard(model: nn.Module) -> None:
    """Frees weights that FSDP2 has gathered and keeps for a backward pass, after an evaluation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool, config: ParallelConfig) -> Iterator[None]:
    """Sets which collectives run in the backward pass of a micro-batch.

    DDP reduces gradients only in the last micro-batch of a step. FSDP2 reduces them within its
    shards in each: otherwise every rank would hold the whole model's gradients in float32, which
    parallel.reduce_once accepts. HSDP sums over nodes, where links are slower, only in the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not config.reduce_once)
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last or config.reshard_after_forward)
    skip = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if skip else contextlib.nullcontext():
        yield


def autocast(model: nn.Module, world: World) -> torch.autocast:
    """Mixed precision for a model that is not sharded; FSDP2 casts the weights itself."""
    enabled = world.dtype != torch.float32 and not isinstance(model, FSDPModule)
    return torch.autocast(world.device.type, dtype=world.dtype, enabled=enabled)


def shard_dimension(tensor: DTensor) -> int:
    """The dimension of the device mesh over which a tensor's rows are sharded (HSDP's has two)."""
    return next(d for d, p in enumerate(tensor.placements) if isinstance(p, Shard))


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a tensor, without a copy, and the index of the first one."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh, dimension = tensor.device_mesh, shard_dimension(tensor)
    chunk = -(-tensor.shape[0] // mesh.size(dimension))  # fully_shard cuts rows as torch.chunk does
    start = min(chunk * mesh.get_local_rank(dimension), tensor.shape[0])
    return tensor.to_local(), start


def saves_part(tensor: Tensor, index: int, world: World) -> bool:
    """Whether this rank saves its part of a tensor. Of ranks that hold equal copies (DDP's ranks,
    HSDP's replicas) one does: which one depends on the tensor's index, to spread the work."""
    if not isinstance(tensor, DTensor):
        return index % world.size == world.rank
    mesh = tensor.device_mesh
    return mesh.ndim == 1 or index % mesh.size(0) == mesh.get_local_rank(0)


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scales gradients down to a norm of at most largest (0: no clipping); returns the norm before.

    It works on this rank's rows, because operators over DTensors take the host longer and leak
    memory in torch 2.11 (pytorch issue 188174).
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    rows = [local_part(gradient)[0] for gradient in gradients]
    norm = nn.utils.get_total_norm(rows)
    if isinstance(gradients[0], DTensor):
        group = gradients[0].device_mesh.get_group(shard_dimension(gradients[0]))
        square = norm.square()
        dist.all_reduce(square, group=group)
        norm = square.sqrt()
    if largest:
        torch._foreach_mul_(rows, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
