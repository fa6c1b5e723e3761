"""What bench.py measures with torch in a process of its own: training, sampling, checkpoint.

Each benchmark is a contestant as bench.compare takes them. The parts of Rocket are the real ones.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from checkpoint import Saver, find_resumable, load_optimizer, load_weights
from config import Config, ConfigError, UserError, tables
from dataset import Batch, rank_share
from distributed import World, init_distributed, replicate, shut_down
from inference import generation
from job import Votes
from model import Llama, flops_per_token, parameter_count
from preflight import check_inputs
from rocket import build, initialise, open_datasets, train_step
from run import device_peak, memory_gb
from tools.bench import Contestant, Json, Options, Times, load_module, whole_number, whole_numbers

PEERS = Path(__file__).resolve().parents[1] / "tests" / "peers.py"
Generate = Callable[[list[list[int]], int], Times | None]


def contestant(name: str, config: Config, options: Options, peer: str) -> Contestant:
    """A benchmark among the processes that torchrun started, or in one.

    Raises:
        UserError: what stands in the way of it.
    """
    world = init_distributed(config)
    try:  # what works with sharded state is in another frame, gone before the group is
        yield from BENCHMARKS[name](config, options, peer, world)
    finally:
        shut_down()


def describe(world: World, parameters: int) -> Json:
    device = "cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device)
    return {
        "parameters": parameters,
        "type": str(world.dtype).removeprefix("torch."),
        "device": f"{world.size} × {device}",
        "threads": torch.get_num_threads(),
    }


def training(config: Config, options: Options, peer: str, world: World) -> Contestant:
    """Optimizer steps of rocket.py, or of a peer, over random tokens on the device."""
    warm_up, count = whole_number(options, "warmup"), whole_number(options, "steps")
    seq_len = config.data.seq_len
    tokens = config.train.global_batch_size * seq_len
    device = world.device
    batches = random_batches(config, world)
    trainer = load_module(PEERS).trainer if peer else rocket_trainer
    step, parameters = trainer(peer, config, world, batches)
    read, unread = (None, "") if peer else reader(config, world)
    flops = flops_per_token(config.model, config.tokenizer.vocab_size, seq_len)
    for _ in range(warm_up):
        step()
    if options["trace"] != "PATH":
        profile = profiled(step, 3, device)
        if world.rank == 0:
            profile.export_chrome_trace(options["trace"])
    yield describe(world, parameters) | ({"data": unread} if unread else {})
    while True:
        seconds, parts = timed_steps(step, count, device)
        memory, rate = memory_gb(device), tokens / seconds
        peak = matmul_rate(device, world.dtype) * world.size
        figures = {"training tokens/s": rate, "step ms": 1000 * seconds}
        figures |= {f"{part} ms": 1000 * taken for part, taken in parts.items()}
        figures["communication ms"] = 1000 * communication(step, world)
        if read:
            figures["data ms"] = 1000 * read()
        figures["memory GB"] = memory
        figures["matmul GFLOP/s"] = peak / 1e9
        figures["MFU %"] = 100 * flops * rate / peak
        if datasheet := device_peak(device):
            figures["MFU, datasheet %"] = 100 * flops * rate / datasheet / world.size
        yield figures


def build_model(config: Config, world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as rocket.py builds them for a fresh run; no tokenizer is needed."""
    config.train.init_from = ""
    inputs = SimpleNamespace(vocab_size=config.tokenizer.vocab_size)
    return build(config, inputs, None, world, print)


def rocket_trainer(
    _: str, config: Config, world: World, batches: list[Batch]
) -> tuple[Callable[[], Any], int]:
    """A step as rocket.py's loop makes it, and the number of parameters."""
    trainer = Trainer(config, world)
    count = parameter_count(config.model, config.tokenizer.vocab_size)
    return lambda: trainer.step(batches), count


class Trainer:
    """Model and optimizer of a configuration, stepping as rocket.py's loop does."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.model, self.optimizer = build_model(config, world)
        self.called = replicate(self.model, world)
        self.votes = torch.zeros(len(Votes._fields), device=world.device)
        self.norms = torch.zeros(2, device=world.device)

    def step(self, batches: list[Batch], rate: float = 1e-4) -> Tensor:
        """The numbers of train_step, on the device."""
        parts = self.votes, self.norms, self.config, self.world
        return train_step(self.called, self.optimizer, batches, rate, *parts)


def random_batches(config: Config, world: World) -> list[Batch]:
    """This rank's micro-batches of a step, on the device; the same at each step."""
    train, seq_len = config.train, config.data.seq_len
    windows = np.arange(train.global_batch_size)
    shape = rank_share(windows, train.micro_batch_size, world.rank, world.size).shape
    generator = torch.Generator().manual_seed(world.rank)
    size = (*shape, seq_len + 1)
    ids = torch.randint(config.tokenizer.vocab_size, size, generator=generator).to(world.device)
    tokens, targets = ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
    documents = (tokens == 1).cumsum(dim=-1) if config.data.document_mask else [None] * len(ids)
    return [Batch(*batch) for batch in zip(tokens, targets, documents, strict=True)]


def reader(config: Config, world: World) -> tuple[Callable[[], float] | None, str]:
    """A function that reads a step's batches, in seconds, or why there is none."""
    try:
        inputs = world.once(lambda: check_inputs(Path(os.devnull), config, False))
        data, _ = open_datasets(config, inputs)
    except UserError as error:
        return None, f"not measured, {error}"
    steps = itertools.count()

    def read() -> float:
        start = time.perf_counter()
        train = config.train
        windows = data.step_windows(train.seed, next(steps), train.global_batch_size)
        for share in rank_share(windows, train.micro_batch_size, world.rank, world.size):
            data.batch(share)
        return time.perf_counter() - start

    return read, ""


def mark(device: torch.device) -> Any:
    """A point in time: of the host on a CPU, of the device's own queue on a GPU."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds between two marks that have passed."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_steps(
    step: Callable[[], Any], count: int, device: torch.device
) -> tuple[float, dict[str, float]]:
    """Mean seconds of a step and of its parts, told apart by where backward begins and ends."""
    marks: list[Any] = []
    backward = torch.Tensor.backward

    def marked(*args: Any, **kwargs: Any) -> None:
        marks.append(mark(device))
        backward(*args, **kwargs)
        marks.append(mark(device))

    parts = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
    spans = []
    torch.Tensor.backward = marked
    try:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            marks = [mark(device)]
            step()
            spans.append([*marks, mark(device)])
        wait_for(device)
        seconds = time.perf_counter() - start
    finally:
        torch.Tensor.backward = backward
    for points in spans:
        *passes, rest = map(between, points, points[1:])
        parts["forward"] += sum(passes[::2]) / count
        parts["backward"] += sum(passes[1::2]) / count
        parts["optimizer"] += rest / count
    return seconds / count, parts


def profiled(step: Callable[[], Any], count: int, device: torch.device) -> Any:
    """torch's profile of some steps."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(count):
            step()
        wait_for(device)
    return found


def communication(step: Callable[[], Any], world: World) -> float:
    """Seconds of a step that collectives take: kernels of NCCL on a GPU, else gloo's."""
    if world.size == 1:
        return 0.0
    prefix = "ncclDevKernel" if world.device.type == "cuda" else "gloo:"
    events = profiled(step, 1, world.device).events()
    return sum(e.time_range.elapsed_us() for e in events if e.name.startswith(prefix)) / 1e6


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square product: the most that this device does now.

    Both layouts of a linear layer count, that of its output and that of its weights' gradient: on a
    CPU that emulates bfloat16 they differ.
    """
    rates, times = [], 4
    for size in (512, 1024, 2048, 4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for left, right in ((a, b.T), (a.T, b)):
            left @ right
            wait_for(device)
            start = time.perf_counter()
            for _ in range(times):
                left @ right
            wait_for(device)
            seconds = time.perf_counter() - start
            rates.append(times * 2 * size**3 / seconds)
        if seconds > 0.2:  # large enough
            break
    return max(rates)


def sampling(config: Config, options: Options, peer: str, world: World) -> Contestant:
    """Prefill and decode, greedy, of random prompts with random weights."""
    sizes = whole_numbers(options, "batch")
    length, new = whole_number(options, "prompt"), whole_number(options, "new")
    config.model.max_seq_len = max(config.model.max_seq_len, length + new)
    if new < 3:
        raise ConfigError("--new: at least 3, the rate is that of the third and later tokens")
    sampler = load_module(PEERS).sampler if peer else rocket_sampler
    with sampler(peer, config, world) as (generate, parameters):
        ids = torch.randint(2, config.tokenizer.vocab_size, (max(sizes), length)).tolist()
        sizes = [size for size in sizes if generate(ids[:size], new)]  # compiles
        if not sizes:
            raise ConfigError(f"--batch={options['batch']}: {peer} takes 1 alone")
        yield describe(world, parameters)
        while True:
            figures = {}
            for size in sizes:
                times = generate(ids[:size], new)
                if times.first:
                    figures[f"prefill, batch {size} tokens/s"] = size * length / times.first
                figures[f"decode, batch {size} tokens/s"] = size / times.token
                if times.once:
                    figures[f"capture, batch {size} ms"] = 1000 * times.once
            yield figures


@contextlib.contextmanager
def rocket_sampler(_: str, config: Config, world: World) -> Iterator[tuple[Generate, int]]:
    """generation.generate, timed to its first token and from there on; the number of parameters."""
    vocab_size = config.tokenizer.vocab_size
    compiled, on_cpu = config.train.compile == "on", world.device.type == "cpu"

    @functools.cache
    def built(single: bool) -> Llama:
        with torch.device("meta"):
            model = Llama(config.model, vocab_size)
        model.to_empty(device=world.device)
        model.tie()
        initialise(model, config)
        model = model.requires_grad_(False).to(world.dtype)
        generation.fit_to_device(model, single, compiled)
        return model

    def timed(prompts: list[list[int]], new: int) -> Times:
        model = built(on_cpu and compiled and len(prompts) == 1)
        wait_for(world.device)
        points = [time.perf_counter()]
        for _ in generation.generate(model, prompts, generation.Settings(new, temperature=0.0)):
            points.append(time.perf_counter())
        assert len(points) == 1 + new
        start, first, second, *_, end = points
        token = (end - second) / (new - 2)  # on a GPU a graph is captured before the second
        return Times(first - start, token, 0.0 if on_cpu else second - first - token)

    yield timed, parameter_count(config.model, vocab_size)


def checkpoint(config: Config, _: Options, __: str, world: World) -> Contestant:
    """A checkpoint of CONFIG's model and optimizer: saved and synced, verified and loaded."""
    config.checkpoint.asynchronous, config.checkpoint.keep_last = False, 1
    record = {"config": tables(config), "state": {"val_loss": None}}
    model, optimizer = build_model(config, world)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # now it has a state
    optimizer.zero_grad()
    count = parameter_count(config.model, config.tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        run = Path(world.once(lambda: stack.enter_context(TemporaryDirectory(prefix="bench-"))))
        saver = Saver(run, model, optimizer, config.checkpoint, lambda: None, world)
        yield describe(world, count) | {"in": str(run.parent)}
        for step in itertools.count(1):
            start = time.perf_counter()
            saver.save(step, dict(record))
            saved = time.perf_counter()
            found = find_resumable(run, world)
            load_weights(model, found)
            load_optimizer(model, optimizer, found)
            wait_for(world.device)
            world.each(lambda: None)  # the last rank, too, is done with the files
            loaded = time.perf_counter()
            size = sum(file.stat().st_size for file in found.path.iterdir()) / 1e9
            yield {
                "size GB": size,
                "save s": saved - start,
                "save GB/s": size / (saved - start),
                "load s": loaded - saved,
                "load GB/s": size / (loaded - saved),
            }


BENCHMARKS = {"training": training, "sampling": sampling, "checkpoint": checkpoint}
