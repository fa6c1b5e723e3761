"""What bench.py measures with torch: training, sampling, checkpoints, and the loss of what was
trained, by Rocket's own parts."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from checkpoint import Saver, find_resumable, load_optimizer, load_weights
from config import Config, ConfigError, UserError, tables
from dataset import Batch, Batches, rank_share
from distributed import World, init_distributed, replicate, shut_down
from inference import evaluation, generation
from job import Votes
from model import Llama, flops_per_token, parameter_count
from preflight import check_inputs
from rocket import build, initialise, open_datasets, train_step
from run import device_peak, memory_gb

Contestant = Iterator[dict[str, Any]]  # see bench.py
Options = dict[str, Any]


class Times(NamedTuple):
    """Seconds of completing a batch: to the first token of each row (None: unknown), of each later
    token, and those spent once between them, such as on a CUDA graph."""

    first: float | None
    token: float
    once: float = 0.0


Generate = Callable[[list[list[int]], int], Times | None]


def contestant(name: str, config: Config, options: Options, peer: str) -> Contestant:
    """A benchmark, in all processes that torchrun started or in one; UserError if it can't run."""
    world = init_distributed(config)
    try:  # sharded state is in another frame, which is gone before the group is
        yield from BENCHMARKS[name](config, options, peer, world)
    finally:
        shut_down()


def describe(world: World, parameters: int) -> dict[str, Any]:
    device = "cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device)
    return {
        "parameters": parameters,
        "type": str(world.dtype).removeprefix("torch."),
        "device": f"{world.size} × {device}",
        "threads": torch.get_num_threads(),
    }


def training(config: Config, options: Options, peer: str, world: World) -> Contestant:
    """Optimizer steps of rocket.py, or of a peer, over random tokens on the device."""
    device, seq_len, batches = world.device, config.data.seq_len, random_batches(config, world)
    about, reads = {}, None
    if peer:
        from peers import trainer

        step, parameters = trainer(peer, config, world, batches)
    else:
        step = functools.partial(Trainer(config, world).step, batches)
        parameters = parameter_count(config.model, config.tokenizer.vocab_size)
        try:
            reads = reading(config, world)
            next(reads)  # opens the dataset
        except UserError as error:
            about["data"], reads = f"not measured, {error}", None
    for _ in range(options["warmup"]):
        step()
    if options["trace"] != "PATH":
        profile = profiled(step, 3, device)
        if world.rank == 0:
            profile.export_chrome_trace(options["trace"])
    yield describe(world, parameters) | about
    tokens = config.train.global_batch_size * seq_len
    flops = tokens * flops_per_token(config.model, config.tokenizer.vocab_size, seq_len)
    while True:
        seconds, parts = timed_steps(step, options["steps"], device)
        memory, peak = memory_gb(device), matmul_rate(device, world.dtype) * world.size
        figures = {"training tokens/s": tokens / seconds, "step ms": 1000 * seconds}
        figures |= {f"{part} ms": 1000 * taken for part, taken in parts.items()}
        figures["communication ms"] = 1000 * communication(step, world)
        if reads:
            figures["data ms"] = 1000 * next(reads)
        figures |= {"memory GB": memory, "matmul GFLOP/s": peak / 1e9}
        figures["MFU %"] = 100 * flops / seconds / peak
        if datasheet := device_peak(device):
            figures["MFU, datasheet %"] = 100 * flops / seconds / datasheet / world.size
        yield figures


def build_model(config: Config, world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as rocket.py builds them for a fresh run; no tokenizer is needed."""
    inputs = SimpleNamespace(vocab_size=config.tokenizer.vocab_size)
    return build(config, inputs, None, None, world)


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


def reading(config: Config, world: World) -> Iterator[float]:
    """Seconds that it takes to read each next step's batches; UserError without a dataset."""
    inputs = world.once(lambda: check_inputs(Path(os.devnull), config, False))
    (data, _), train = open_datasets(config, inputs), config.train
    for step in itertools.count():
        start = time.perf_counter()
        windows = data.step_windows(train.seed, step, train.global_batch_size)
        for share in rank_share(windows, train.micro_batch_size, world.rank, world.size):
            data.batch(share)
        yield time.perf_counter() - start


def now(device: torch.device) -> float:
    """The time when the device has done what it was given, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def timed_steps(
    step: Callable[[], Any], count: int, device: torch.device
) -> tuple[float, dict[str, float]]:
    """Mean seconds of a step and of its parts, which calls of backward set apart."""
    marks: list[Any] = []
    backward = torch.Tensor.backward

    def marked(*args: Any, **kwargs: Any) -> None:
        marks.append(mark(device))
        backward(*args, **kwargs)
        marks.append(mark(device))

    steps = []
    torch.Tensor.backward = marked
    try:
        start = now(device)
        for _ in range(count):
            marks = [mark(device)]
            step()
            steps.append([*marks, mark(device)])
        seconds = (now(device) - start) / count
    finally:
        torch.Tensor.backward = backward
    parts = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
    for points in steps:
        *passes, rest = map(between, points, points[1:])
        for name, taken in zip(parts, (sum(passes[::2]), sum(passes[1::2]), rest), strict=True):
            parts[name] += taken / count
    return seconds, parts


def median_parts(trainer: Trainer, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Seconds of the parts of a step, as timed_steps gives them: the median of five warm steps,
    since others may use the machine."""
    for _ in range(2):
        trainer.step(batches)
    found = [timed_steps(lambda: trainer.step(batches), 1, device)[1] for _ in range(5)]
    return {part: sorted(one[part] for one in found)[2] for part in found[0]}


def profiled(step: Callable[[], Any], count: int, device: torch.device) -> Any:
    """torch's profile of some steps."""
    with torch.profiler.profile() as found:  # of all devices that there are
        for _ in range(count):
            step()
        now(device)
    return found


def communication(step: Callable[[], Any], world: World) -> float:
    """Seconds of a step that collectives take: kernels of NCCL on a GPU, else gloo's."""
    if world.size == 1:
        return 0.0
    prefix = "ncclDevKernel" if world.device.type == "cuda" else "gloo:"
    events = profiled(step, 1, world.device).events()
    return sum(e.time_range.elapsed_us() for e in events if e.name.startswith(prefix)) / 1e6


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square product, in the layout of a linear layer's output or in that of
    its weights' gradient, which differ on a CPU that emulates bfloat16."""
    rates, threads = [], torch.get_num_threads()
    for size in (512, 1024, 2048, 4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for sides in ({"x": a, "y": b.T}, {"x": a.T, "y": b}):
            seconds = Timer("x @ y", globals=sides, num_threads=threads).timeit(4).mean
            rates.append(2 * size**3 / seconds)
        if seconds > 0.05:  # large enough
            break
    return max(rates)


def sampling(config: Config, options: Options, peer: str, world: World) -> Contestant:
    """Prefill and decode, greedy, of random prompts with random weights."""
    sizes, length, new = (options[name] for name in ("batch", "prompt", "new"))
    config.model.max_seq_len = max(config.model.max_seq_len, length + new)
    if new < 3:
        raise ConfigError("--new: at least 3, the rate is that of the third and later tokens")
    sampler = rocket_sampler
    if peer:
        from peers import sampler
    with sampler(peer, config, world) as (generate, parameters):
        ids = torch.randint(2, config.tokenizer.vocab_size, (max(sizes), length)).tolist()
        taken = [size for size in sizes if generate(ids[:size], new)]  # compiles
        if not taken:
            raise ConfigError(f"--batch={','.join(map(str, sizes))}: {peer} takes 1 alone")
        yield describe(world, parameters)
        while True:
            figures = {}
            for size in taken:
                times = generate(ids[:size], new)
                if times.first:
                    figures[f"prefill, batch {size} tokens/s"] = size * length / times.first
                figures[f"decode, batch {size} tokens/s"] = size / times.token
                if times.once:
                    figures[f"capture, batch {size} ms"] = 1000 * times.once
            yield figures


@contextlib.contextmanager
def rocket_sampler(_: str, config: Config, world: World) -> Iterator[tuple[Generate, int]]:
    """generation.generate, timed to its first token and from it on; the number of parameters."""
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
        points = [now(world.device)]
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
    optimizer.step()  # makes its state
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
            now(world.device)
            world.each(lambda: None)  # the last rank has read the files, too
            loaded = time.perf_counter()
            size = sum(file.stat().st_size for file in found.path.iterdir()) / 1e9
            yield {
                "size GB": size,
                "save s": saved - start,
                "save GB/s": size / (saved - start),
                "load s": loaded - saved,
                "load GB/s": size / (loaded - saved),
            }


@contextlib.contextmanager
def judge(config: Config) -> Iterator[Callable[[Callable], tuple[float, int]]]:
    """Evaluates trained models alike: in float32, over train.eval_sequences windows of CONFIG's
    validation split. The function that it yields takes one that loads a model (trained_rocket), and
    returns bits per byte and the number of parameters.

    Raises:
        UserError: the dataset is not there, or has no validation split.
    """
    config = copy.deepcopy(config)
    config.train.dtype = "float32"
    config.train.global_batch_size = config.train.micro_batch_size = 32  # faster than training's
    world = init_distributed(config)
    try:
        inputs = check_inputs(Path(os.devnull), config, False)
        _, data = open_datasets(config, inputs)
        if not data:
            raise UserError(f"{config.data.dir}: no val split; set data.val_fraction")
        with Batches(data, config, inputs.bos_id, world) as batches:

            @torch.no_grad()
            def judged(load: Callable) -> tuple[float, int]:
                model, nats = load(world)
                windows = data.evenly_spaced(config.train.eval_sequences)
                parts = [batches.of_windows(data, part) for part in windows]
                scores, _ = evaluation.score(nats, data, parts, inputs.byte_lengths, world, "val")
                bits = scores.bits_per_byte
                count = sum(p.numel() for p in model.parameters())
                return bits if math.isfinite(bits) else math.inf, count  # it has diverged

            yield judged
    finally:
        shut_down()


def trained_rocket(config: Config, world: World) -> tuple[nn.Module, nn.Module]:
    """The model of a run in train.out_dir, which is also its loss over a batch, summed, in nats."""
    model, _ = build_model(config, world)
    load_weights(model, find_resumable(Path(config.train.out_dir), world))
    return model, model


BENCHMARKS = {"training": training, "sampling": sampling, "checkpoint": checkpoint}
