"""Processes and sharding: what torchrun started, how ranks agree, and DDP, FSDP2 or HSDP.

Every run is a process group, plain python a group of one, so that the loop has one path.
Nothing here knows of data, steps or files.
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
from typing import Any, Generic, NamedTuple, TypeVar

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
MOST_FILES = 10_240  # open at a time, the most that macOS grants
POLL_SECONDS = 0.0005
LAG = 1  # steps until the host hears of a step: the device always has the next one to work on


class AgreedError(UserError):
    """A UserError of one rank that all ranks raise together."""

    printed_by = "RANK"

    def __init__(self, message: str, code: int = UserError.code) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def about(cls, rank: int, message: str, code: int, world: World) -> AgreedError:
        """Of an error of one rank; where its node is sick, all ranks there end with that code:
        torchrun may see but the first that ends."""
        first = world.rank - world.local_rank  # of this node: torchrun numbers a node's in a row
        here = first <= rank < first + world.local_size
        innocent = code == SICK_NODE and not here
        return cls(message, LOST_RANK if innocent else code)


class NodeError(UserError):
    """This node can't do what others may: a job that comes back does without it."""

    code = SICK_NODE


class LostRankError(UserError):
    """Another rank died or hangs: the same command again may succeed."""

    code = LOST_RANK


@dataclass(frozen=True)
class World:
    """This process among the others, and what it computes with."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    dtype: torch.dtype
    group: dist.ProcessGroup | None = None  # None: the default group

    def aside(self) -> World:
        """The same ranks in a group of its own, for collectives in another thread."""
        return replace(self, group=dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT))

    def once(self, function: Callable[[], T]) -> T:
        """The result of a function that rank 0 alone runs; its failure is raised by every rank.

        That is, a UserError, or an OSError of the files that it works with.

        What reads shared files goes through here: 512 ranks reading one manifest is a storm.
        """
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except (UserError, OSError) as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, group=self.group)
        if box[1] is not None:
            raise AgreedError(box[1])
        return box[0]

    def each(self, function: Callable[[], T]) -> list[T] | None:
        """Runs a function on all ranks; rank 0 gets the results, by rank, the others None.

        If one raises a UserError or an OSError, all do. Only the messages travel to everyone.
        """
        result, failure = None, None
        try:
            result = function()
        except (UserError, OSError) as error:
            failure = str(error), getattr(error, "code", UserError.code)
        for rank, failed in enumerate(self.gather(failure)):
            if failed is not None:
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
        """The sum over all ranks, in place and on the device."""
        if self.size > 1:  # a lone GPU does without NCCL
            dist.all_reduce(values, group=self.group)
        return values


class Arrived(NamedTuple, Generic[T]):
    """Numbers of an earlier step that have reached the host."""

    tag: T
    values: list[float]
    time: float  # when the device had them, by time.monotonic()


class Lagged(Generic[T]):
    """Brings numbers of each step to the host LAG steps later, so that no step is waited for.

    Args:
        while_waiting: called again and again while the host waits for the device after all, with
            the time.monotonic() at which it began to; what it raises ends the wait.
    """

    def __init__(self, while_waiting: Callable[[float], None]) -> None:
        self._while_waiting = while_waiting
        self._waiting: deque[tuple[T, Tensor, torch.cuda.Event | None, float]] = deque()

    def push(self, tag: T, values: Tensor) -> list[Arrived[T]]:
        """Takes in this step's numbers (N,) and hands out those whose turn has come."""
        event = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((tag, values, event, time.monotonic()))
        return self.drain(keep=LAG)

    def drain(self, keep: int = 0) -> list[Arrived[T]]:
        """Hands out all but the newest steps."""
        arrived = []
        while len(self._waiting) > keep:
            tag, values, event, at = self._waiting.popleft()
            if event:
                # event.synchronize() would keep Python from running handlers of signals, and where
                # a rank has died under NCCL the device never gets there.
                since = time.monotonic()
                while not event.query():
                    self._while_waiting(since)
                    time.sleep(POLL_SECONDS)
                at = time.monotonic()
            arrived.append(Arrived(tag, values.tolist(), at))
        return arrived


def fetch(values: Tensor, while_waiting: Callable[[float], None]) -> list[Any]:
    """The numbers of a tensor on the device, waited for as by Lagged."""
    lagged: Lagged[None] = Lagged(while_waiting)
    lagged.push(None, values)
    return lagged.drain()[0].values


def init_distributed(config: Config) -> World:
    """Joins the processes that torchrun started, or makes a world of one; sets device and threads.

    Collectives may take STARTUP_TIMEOUT until set_timeout shortens it.

    Raises:
        UserError: fewer GPUs than processes; an environment that is half torchrun's.
    """
    _die_with_agent()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        raise UserError(
            f"{' and '.join(given)} is set without the rest of {', '.join(names)}: start with"
            " torchrun, which sets all of them, or unset it"
        )
    numbers = [int(os.environ[name]) for name in names] if given else [0, 1, 0, 1]
    rank, size, local_rank, local_size = numbers
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        kind = UserError if size == local_size else NodeError  # other nodes may have more
        raise kind(
            f"rank {rank} needs GPU {local_rank}, {socket.gethostname()} has"
            f" {torch.cuda.device_count()}; start fewer processes or set train.device=cpu"
        )
    # Each rank compiles for itself: together they take the node's cores, not min(32, cores) each.
    # Before deterministic algorithms, which import what reads it.
    workers = max(1, min(32, available_cores() // local_size))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(workers))
    if config.train.deterministic:
        be_deterministic()
    if name == "cuda":
        # Read at the first allocation: memory grows in place, where blocks of many sizes would
        # leave gaps. A choice of the user's own counts, by its older name too.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        device = torch.device("cpu")
        if not _user_set_threads():
            torch.set_num_threads(max(1, available_cores() // local_size))
        _keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
    if name == "cuda":  # a hang leaves the last collectives of each rank behind
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        dump = resolve_path(config.train.out_dir) / "logs" / "flight_recorder_"
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(dump))
    meeting: dict[str, Any] = {"rank": rank, "world_size": size}
    if not given:
        meeting["store"] = dist.HashStore()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        meeting["store"] = _meeting_point(rank)
    _allow_sockets()
    dist.init_process_group(backend, timeout=STARTUP_TIMEOUT, **meeting)
    dtype = compute_dtype(config.train.dtype, device)
    return World(rank, size, local_rank, local_size, device, dtype)


@contextlib.contextmanager
def process_group(config: Config) -> Iterator[World]:
    """The processes of a training as a group, which they leave together.

    Raises:
        LostRankError: a collective failed because another rank died or hangs.
    """
    try:
        yield init_distributed(config)
    except AgreedError:  # all ranks are here; after any other error some may wait for this one
        shut_down()
        raise
    except (RuntimeError, dist.DistError) as error:
        if lost := explain_lost_rank(error):
            if torch.cuda.is_initialized():  # its kernels wait for that rank: don't wait for them
                atexit.register(os._exit, 1)
            raise lost from None
        raise
    shut_down()


def _user_set_threads() -> bool:
    """Whether OMP_NUM_THREADS is the user's own.

    Where it is missing torchrun sets 1 for its ranks, if they are several, which leaves cores idle.
    What torchrun was started with still stands in /proc; without one (macOS), 1 is taken for its.
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
    """Ends this rank with the agent that started it (Linux): one that outlives it would go on to
    train and hold the run, or its GPU, against those that the next attempt starts."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl and "TORCHELASTIC_RUN_ID" in os.environ:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        # It was killed before that if the system's first process has taken this one over; in a
        # container that may be the agent itself.
        first = Path("/proc/1/cmdline")
        adopted = os.getppid() == 1 and first.exists() and b"python" not in first.read_bytes()
        if adopted or os.getppid() != STARTED_BY:
            os._exit(LOST_RANK)


def be_deterministic() -> None:
    """Makes every operation give the same bits each time, on a GPU too, or raise an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it before it is set


def cudnn_version() -> str:
    """Of the cuDNN in use, such as 9.19.0: attention is as fast as that is new."""
    number = torch.backends.cudnn.version() or 0
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def _keep_freed_memory() -> None:
    """Lets glibc use freed memory again, where it would return large pieces to the system at once:
    each step's tensors would come as new pages, and filling in those took a tenth of a step.
    MALLOC_MMAP_THRESHOLD_ in the environment is the user's own choice."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # glibc's
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _allow_sockets() -> None:
    """Raises the limit of open files: gloo has a socket for every rank in each of its groups, at
    512 ranks more than the usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft not in (resource.RLIM_INFINITY, hard) and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _meeting_point(rank: int) -> dist.Store:
    """A store that is this attempt's alone, served by rank 0.

    torchrun's own outlives --max-restarts (torch 2.13): ranks that start again would find the
    addresses of dead ones there. It only carries where the new store is, and a rank that finds
    where a dead one was looks again.
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
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(f"rank {rank} can't reach rank 0 at {host}: {error}") from None
            time.sleep(0.2)
        else:
            return dist.TCPStore(host, int(port), is_master=False, **options)


def set_timeout(model: nn.Module, seconds: float) -> None:
    """How long a collective of training may take before it is an error and not a hang."""
    groups = {dist.group.WORLD}
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            groups.update(parameter.device_mesh.get_all_groups())
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def explain_lost_rank(error: BaseException) -> LostRankError | None:
    """The one line for a collective that failed because another rank died or hung; else None."""
    text = str(error).partition("\n")[0]
    if not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        return None
    text = re.sub(r"^\[\S+\] ", "", text).partition(". ")[0]  # without source files and advice
    return LostRankError(
        f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()} lost contact with another"
        f" rank, which died or hangs: {text}. What was saved is intact: run the same command again"
        " to go on"
    )


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


def check_compiler(device: torch.device, otherwise: str = "set train.compile=off") -> None:
    """UserError if this host lacks what torch.compile calls: a compiler, for a GPU too (Triton's
    launchers are C), and Python's headers."""
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
    """Whether to compile the model; auto does on a GPU."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


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
            # the rotary tables are inputs of the blocks and stay float32
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=world.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
        }
        for block in model.model.layers:
            fully_shard(block, reshard_after_forward=config.reshard_after_forward, **options)
        if not model.config.tie_embeddings:
            # Its gradient is there first and travels while the blocks' are made; and the first
            # block does not wait for its weights.
            fully_shard(model.lm_head, reshard_after_forward=False, **options)
        fully_shard(model, reshard_after_forward=False, **options)
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


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 gathered and has kept for a backward pass that does not come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool, config: ParallelConfig) -> Iterator[None]:
    """Which collectives a backward pass of a step's micro-batches runs; after the last, all have.

    DDP reduces at the last alone. FSDP2 reduces within its shards at each one, unless
    parallel.reduce_once: unreduced, every rank holds the whole model's gradients in float32. HSDP
    sums over nodes, the slower way, at the last alone.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not config.reduce_once)
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last or config.reshard_after_forward)
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def autocast(model: nn.Module, world: World) -> torch.autocast:
    """Mixed precision of a whole model; a sharded one casts its own weights."""
    enabled = world.dtype != torch.float32 and not isinstance(model, FSDPModule)
    return torch.autocast(world.device.type, dtype=world.dtype, enabled=enabled)


def shard_dimension(tensor: DTensor) -> int:
    """The dimension of its mesh over which a tensor's rows are spread."""
    return next(d for d, p in enumerate(tensor.placements) if isinstance(p, Shard))


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this rank holds, by reference, and the number of the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh, dimension = tensor.device_mesh, shard_dimension(tensor)
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
    """Scales the gradients to a norm of at most largest (0: as they are); their norm before.

    Works on the rows that this rank holds: operators over DTensors take the host longer, and those
    of torch 2.11 leak (pytorch issue 188174).
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
