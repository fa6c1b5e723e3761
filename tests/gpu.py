"""What only a GPU can show: proves and measures Rocket on one, in eight minutes, without a network.

    python tests/gpu.py OUT [--only=STAGE,…] [--minutes=7.5] [--nanogpt=CLONE] [--dry-run]

Each stage is a process of its own with a time limit: one that fails or hangs costs no other stage.
What is right comes first, several stages at a time, since they compile for longer than they
compute; then speed, one stage at a time. When the minutes are over, what is left is not run. OUT
gets at most four files, written as results arrive: table.txt, results.jsonl, log.txt and a trace of
training (trace.json.gz, for ui.perfetto.dev). The exit code is 1 if a stage failed.

--dry-run takes tiny shapes and a CPU, to find mistakes of this script before they cost a GPU's
minutes. `nanogpt` is a clone of nanoGPT, to be measured beside Rocket.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROW = "@row "  # begins a line of a stage's output that is a result
LOG_BYTES = 8_000_000  # of all stages together
SMALL = (
    "--model.dim=256 --model.n_layers=4 --model.n_heads=8 --model.n_kv_heads=2 --model.ffn_dim=768"
    " --model.max_seq_len=512 --model.tie_embeddings=false --data.seq_len=512"
    " --tokenizer.vocab_size=4003 --train.global_batch_size=8 --train.micro_batch_size=4"
    " --model.base_dim=0 --model.base_layers=0"  # else the rate grows as the shape shrinks
)
TINY = (
    "--model.dim=64 --model.n_layers=2 --model.n_heads=4 --model.n_kv_heads=2 --model.ffn_dim=128"
    " --model.max_seq_len=64 --data.seq_len=64 --tokenizer.vocab_size=303"
    " --train.global_batch_size=4 --train.micro_batch_size=2 --train.device=cpu"
    " --model.base_dim=0 --model.base_layers=0"
)


class Options(NamedTuple):
    """The command line, as stages see it."""

    out: Path
    dry_run: bool
    nanogpt: str


def report(verdict: str, what: str, expected: str, seen: object) -> None:
    """A line of the table, from within a stage."""
    row = {"what": what, "expected": expected, "seen": str(seen), "verdict": verdict}
    # One write, from a line's beginning to its end: compilers and ranks write to the same pipe.
    sys.stdout.write(f"\n{ROW}{json.dumps(row)}\n")
    sys.stdout.flush()


def check(what: str, expected: str, seen: object, holds: bool) -> None:
    """Something asserted."""
    report("ok" if holds else "FAILED", what, expected, seen)


def measured(what: str, seen: object, expected: str = "") -> None:
    """Something measured, of which nothing is asserted."""
    report("measured", what, expected, seen)


def goal(what: str, least: float, seen: float) -> None:
    """A rate that is to be reached."""
    report("met" if seen >= least else "missed", what, f"≥ {least:,.0f}", f"{seen:,.0f}")


def configured(options: Options, name: str, *overrides: str) -> Any:
    """A shipped configuration, changed; tiny in a dry run."""
    from config import load_config

    tiny = TINY.split() if options.dry_run else ["--train.device=cuda"]
    path = str(ROOT / "config" / f"{name}.toml")
    arguments = [one for override in overrides for one in override.split()]
    return load_config([path, *arguments, "--train.dtype=bfloat16", *tiny], usage="")[0]


@contextlib.contextmanager
def world_of(config: Any) -> Iterator[Any]:
    """This process as rocket.py would run in it. What is sharded must be in another frame."""
    from distributed import init_distributed, shut_down

    yield init_distributed(config)
    shut_down()


def compile_with(options: Options) -> str:
    """Compiled as a GPU does by default; on a CPU, too, where the stage is about that."""
    return f"--train.compile={'on' if options.dry_run else 'auto'}"


class Training:
    """Steps of a configuration over random batches, whose losses come one step late."""

    def __init__(self, config: Any, world: Any) -> None:
        from distributed import Lagged
        from tools import measure

        self.trainer = measure.Trainer(config, world)
        self.model, self.optimizer = self.trainer.model, self.trainer.optimizer
        self.batches = measure.random_batches(config, world)
        self.lagged: Any = Lagged(lambda since: None)
        self.losses: list[float] = []

    def step(self, batches: list[Any] | None = None) -> None:
        numbers = self.trainer.step(batches or self.batches, 1e-3)
        self.losses += [one.values[0] for one in self.lagged.push(None, numbers)]

    def finish(self) -> list[float]:
        """The losses of all steps so far."""
        self.losses += [one.values[0] for one in self.lagged.drain()]
        return self.losses

    def state(self) -> dict[str, Any]:
        """Copies of weights, moments and step counts, by name."""
        from checkpoint import model_tensors, optimizer_tensors

        found = model_tensors(self.model) | optimizer_tensors(self.model, self.optimizer)
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of tensors that differ in a bit."""
    import torch

    def bits(tensor: Any) -> Any:
        return tensor.reshape(-1).view(torch.int32)

    return [name for name in a if not torch.equal(bits(a[name]), bits(b[name]))]


# Right


def machine(options: Options) -> None:
    """What this is."""
    import torch

    from distributed import cudnn_version

    smi = (
        "nvidia-smi --query-gpu=name,driver_version,power.limit,memory.total --format=csv,noheader"
    )
    gpu = "none"
    if shutil.which("nvidia-smi"):
        gpu = subprocess.run(
            smi.split(), capture_output=True, text=True, check=False
        ).stdout.strip()
    measured("GPU, driver, power limit, memory", gpu)
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions |= {"CUDA": torch.version.cuda, "cuDNN": cudnn_version(), "NCCL": nccl}
    with contextlib.suppress(ImportError):
        import triton

        versions["Triton"] = triton.__version__
    measured("versions", ", ".join(f"{name} {number}" for name, number in versions.items()))
    measured("cores", len(os.sched_getaffinity(0)))


def numerics(options: Options, documents: bool) -> None:
    """Compiled bfloat16 on the device against eager float32 on the CPU, which knows no Triton, no
    cuDNN and no FlexAttention."""
    import torch

    from distributed import init_distributed
    from fast import IGNORE
    from model import Llama

    config = configured(options, "llama_110m", SMALL)
    device, vocab_size = init_distributed(config).device, config.tokenizer.vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (
        torch.randint(2, vocab_size, (4, config.data.seq_len), generator=generator)
        for _ in range(2)
    )
    targets[0, ::3] = IGNORE
    starts = torch.rand(tokens.shape, generator=generator) < 0.02
    own = starts.cumsum(dim=1) if documents else None
    count = (targets != IGNORE).sum().item()

    def loss_and_gradients(model: Any, device: Any, enabled: bool) -> tuple[float, dict[str, Any]]:
        parts = [None if part is None else part.to(device) for part in (tokens, targets, own)]
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            loss = model(*parts) / count
        loss.backward()
        gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
        model.zero_grad()
        return loss.item(), gradients

    torch.manual_seed(0)
    reference = Llama(config.model, vocab_size)
    for parameter in reference.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * config.model.init_std)
    exact, wanted = loss_and_gradients(reference, torch.device("cpu"), False)
    for recompute in ("none", "selective", "block"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Llama(config.model, vocab_size, 512, recompute)
        model.load_state_dict(reference.state_dict())
        model.to(device).compile_parts()
        for _ in range(2):
            loss, found = loss_and_gradients(model, device, True)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        errors = {name: (found[name] - wanted[name]).norm().item() for name in wanted}
        norm = math.hypot(*(gradient.norm().item() for gradient in wanted.values()))
        error = math.hypot(*errors.values()) / norm
        worst = max(errors, key=lambda name: errors[name] / wanted[name].norm().item())
        own_error = errors[worst] / wanted[worst].norm().item()
        title = f"compiled bfloat16, recompute {recompute}: "
        check(title + "loss", "within 1e-2", f"{abs(loss - exact):.1e}", abs(loss - exact) < 1e-2)
        check(title + "gradients", "within 2e-2", f"{error:.1e}", error < 2e-2)
        measured(title + "worst gradient", f"{own_error:.1e} ({worst})")
        check(title + "graphs", "at most 3", graphs, 0 < graphs <= 3)


def guard(options: Options) -> None:
    """A step whose gradient holds a NaN changes not a bit."""
    import torch

    def one(name: str) -> None:
        trainer = Training(config, world)
        for _ in range(2):
            trainer.step()
        before = trainer.state()
        victim = trainer.model.model.layers[1].mlp.up_proj.weight

        def poison(parameter: torch.Tensor) -> None:
            parameter.grad.view(-1)[3] = math.nan

        hook = victim.register_post_accumulate_grad_hook(poison)
        trainer.step()
        hook.remove()
        changed = different(before, trainer.state())
        check(f"{name}: changed by a NaN", "nothing of " + str(len(before)), changed, not changed)
        trainer.step()
        missing = before.keys() - different(before, trainer.state())
        check(f"{name}: changed by the next step", "everything", f"all but {missing}", not missing)
        losses = trainer.finish()
        check(f"{name}: loss of four steps", "finite", losses, all(map(math.isfinite, losses)))

    for name in ("adamw", "muon"):
        config = configured(options, "llama_110m", SMALL, f"--optimizer.name={name}")
        with world_of(config) as world:
            one(name)


def no_waiting(options: Options, strategy: str = "ddp") -> None:
    """No operation of a warm step waits for the device: from pinned batches to late losses."""
    import torch

    from dataset import Batches

    def random_batch(windows: Any) -> tuple[Any, Any]:
        shape = (len(windows), config.data.seq_len)
        return tuple(torch.randint(2, config.tokenizer.vocab_size, shape) for _ in range(2))

    def beats() -> str:
        trainer = Training(config, world)
        windows = list(range(8))
        data = SimpleNamespace(batch=random_batch, step_windows=lambda *_: windows)
        batches = Batches(data, config, 2, world)
        steps = itertools.count()

        def beat() -> None:
            trainer.step(batches.of_step(next(steps)))

        for _ in range(3):
            beat()
        if world.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                beat()
        except RuntimeError as error:
            traceback.print_exc()
            return str(error).partition("\n")[0]
        finally:
            if world.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        trainer.finish()
        return "nothing"

    options_of = {"causal": "", "document mask": "--data.document_mask=true"}
    options_of["spike guard, Muon"] = "--train.spike_factor=10 --optimizer.name=muon"
    for title, overrides in options_of.items():
        parallel = f"--parallel.strategy={strategy}"
        config = configured(
            options, "llama_110m", SMALL, compile_with(options), parallel, overrides
        )
        with world_of(config) as world:
            found = beats()
        check(f"what waits in a {strategy} step, {title}", "nothing", found, found == "nothing")


def kernels(options: Options) -> None:
    """Which kernels torch chose for attention."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from distributed import init_distributed
    from fast import attend, past_mask
    from inference.generation import take_any_shape

    config = configured(options, "llama_110m")
    device = init_distributed(config).device
    length, rows = (64, 2) if options.dry_run else (1024, 8)

    def named(queries: int, heads: int, cached: int, training: bool) -> str:
        shape = (rows, heads, length, 64)
        q = torch.randn(rows, queries, 1 if cached else length, 64, device=device)
        k, v = (torch.randn(shape, device=device) for _ in range(2))
        q, k, v = (one.bfloat16().requires_grad_(training) for one in (q, k, v))
        mask = None
        if cached:
            positions = torch.full((rows, 1), cached, device=device)
            mask = past_mask(positions, length, torch.bfloat16)
        on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        attend(q, k, v, mask)
        with profile(activities=activities) as found:
            y = attend(q, k, v, mask)
            if training:
                y.sum().backward()
        times: Counter[str] = Counter()
        for event in found.key_averages():
            times[event.key] += event.self_device_time_total if on_gpu else event.count
        names = [name for name, _ in times.most_common() if "ttention" in name or "fmha" in name]
        names += [name for name in times if "flash" in name or "cudnn" in name]
        return ", ".join(name[:70] for name in dict.fromkeys(names)) or "products alone"

    fused = ("cudnn", "flash", "fmha", "efficient")
    for title, *shape in (
        ("training, MHA", 12, 12, 0, True),
        ("training, GQA", 32, 4, 0, True),
    ):
        seen = named(*shape)
        check(f"attention of {title}", "fused", seen, any(one in seen.lower() for one in fused))
    take_any_shape()
    measured("attention of a prompt, MHA", named(12, 12, 0, False))
    measured("attention of a prompt, GQA", named(32, 4, 0, False))
    measured("attention of a token, MHA", named(12, 12, length // 2, False))
    measured("attention of a token, GQA", named(32, 4, length // 2, False))


def repeat(options: Options, deterministic: bool) -> None:
    """Ten steps twice, from the same seed."""

    def ten_steps() -> dict[str, Any]:
        trainer = Training(config, world)
        for _ in range(10):
            trainer.step()
        return trainer.state()

    extra = f"--train.deterministic={str(deterministic).lower()}"
    for title, mask in (("causal", "false"), ("document mask", "true")):
        masked = f"--data.document_mask={mask}"
        config = configured(options, "llama_110m", SMALL, compile_with(options), masked, extra)
        with world_of(config) as world:
            first = ten_steps()
            changed = different(first, ten_steps())
        del first
        seen = f"{len(changed)} tensors differ" if changed else "equal"
        what = f"ten steps twice, {title}{', deterministic' * deterministic}"
        if deterministic or options.dry_run:
            check(what, "equal", seen, not changed)
        else:
            measured(what, seen)


def decode(options: Options) -> None:
    """Tokens by a CUDA graph over the cache against whole passes without either, float32."""
    import torch

    from distributed import init_distributed
    from inference.generation import Settings, fit_to_device, generate
    from rocket import initialise

    config = configured(options, "llama_110m", SMALL)
    device = init_distributed(config).device
    torch.set_float32_matmul_precision("highest")
    vocab_size, prompts = (
        config.tokenizer.vocab_size,
        [[1, 7, 5], [1, *range(9, 25)], [1, *range(50)]],
    )
    config.model.init_std = 0.1  # so that the likeliest ids differ

    from model import Llama

    for title, heads in (("MHA", config.model.n_heads), ("GQA", config.model.n_kv_heads)):
        config.model.n_kv_heads = heads
        model, fitted, compiled = (Llama(config.model, vocab_size).to(device) for _ in range(3))
        for one in (model, fitted, compiled):
            initialise(one, config)
            one.requires_grad_(False)
        fit_to_device(fitted, False, False)
        fit_to_device(compiled, False, True)
        expected = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(12):
                logits = model(torch.tensor([ids], device=device))
                ids.append(logits[0, -1].argmax().item())
            expected.append(ids[len(prompt) :])
        for how, one in (("", fitted), (", compiled", compiled)):
            steps = generate(one, prompts, Settings(12, temperature=0.0))
            found = [list(row) for row in zip(*(step.ids for step in steps), strict=True)]
            what = f"greedy ids of unequal prompts, {title}{how}"
            check(what, "as by whole passes", found, found == expected)


def save(options: Options) -> None:
    """A checkpoint written in the background while training goes on."""
    from checkpoint import Saver, find_resumable, load_optimizer, load_weights
    from config import tables

    config = configured(options, "llama_110m", "--checkpoint.asynchronous=true")
    record = {"config": tables(config), "state": {"val_loss": None}}

    def resident(peak: bool) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:" if peak else "VmRSS:")[2].split()[0])

    def save_and_load(run: Path) -> None:
        trainer = Training(config, world)
        trainer.step()
        trainer.finish()
        before = trainer.state()
        saver = Saver(run, trainer.model, trainer.optimizer, config.checkpoint, lambda: None, world)
        with contextlib.suppress(OSError):  # else it is the most since the process began
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        base, blocked = resident(peak=False), []
        for step in (1, 2):
            start = time.perf_counter()
            saver.save(step, dict(record))
            blocked.append(time.perf_counter() - start)
            start = time.perf_counter()
            saver.wait()
        written = time.perf_counter() - start
        held = resident(peak=True) - base
        saver.save(3, dict(record))
        for _ in range(3):
            trainer.step()  # while it is being written
        saver.wait()
        changed = trainer.state()
        found = find_resumable(run, world)
        size = sum(file.stat().st_size for file in found.path.iterdir())
        load_weights(trainer.model, found)
        load_optimizer(trainer.model, trainer.optimizer, found)
        wrong = different(before, trainer.state())
        check("save in the background, load: tensors that differ", "none", wrong, not wrong)
        moved = len(different(before, changed))
        check(
            "meanwhile training changed", "all", f"{moved} of {len(before)}", moved == len(before)
        )
        share = held / size
        least = 0.05 * size + 50e6  # a tiny checkpoint's is within the noise
        check(
            "host memory of two saves",
            "≤ 1.3 checkpoints",
            f"{share:.2f}",
            held < 1.3 * size + least,
        )
        rates = ", ".join(f"{one:.2f} s" for one in blocked)
        measured("training waits for a first, a second save", f"{rates} of {size / 1e9:.2f} GB")
        measured(
            "a save takes in the background", f"{written:.2f} s, {size / 1e9 / written:.2f} GB/s"
        )

    with world_of(config) as world, tempfile.TemporaryDirectory() as directory:
        save_and_load(Path(directory))


def sharded(options: Options) -> None:
    """FSDP2 in a world of one: the losses of DDP. torchrun starts this stage."""
    losses = {}

    def ten_losses() -> list[float]:
        trainer = Training(config, world)
        for _ in range(10):
            trainer.step()
        return trainer.finish()

    for optimizer in ("adamw", "muon"):
        for strategy in ("ddp", "fsdp"):
            overrides = f"--parallel.strategy={strategy} --optimizer.name={optimizer}"
            config = configured(options, "llama_110m", SMALL, compile_with(options), overrides)
            with world_of(config) as world:
                losses[strategy] = ten_losses()
        apart = max(abs(a - b) for a, b in zip(losses["ddp"], losses["fsdp"], strict=True))
        seen = f"{apart:.1e} (from {losses['fsdp'][0]:.3f} to {losses['fsdp'][-1]:.3f})"
        check(f"fsdp against ddp, {optimizer}, ten losses", "within 2e-2", seen, apart < 2e-2)
    no_waiting(options, "fsdp")


def path(options: Options) -> None:
    """The four programs: a run that is killed and goes on, from text to a sample."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        sources = json.dumps([str(stdlib / "json"), str(stdlib / "email")])
        arguments = [
            str(ROOT / "config" / "tiny.toml"),
            f"--data.sources={sources}",
            "--data.val_fraction=0.2",
            f"--data.dir={scratch / 'data'}",
            f"--tokenizer.path={scratch / 'tokenizer.model'}",
            "--tokenizer.vocab_size=600",
            f"--train.out_dir={scratch / 'run'}",
            "--train.max_steps=100",
            "--train.eval_interval=50",
            "--checkpoint.interval=20",
            "--train.log_interval=1",
            f"--train.device={'cpu' if options.dry_run else 'cuda'}",
        ]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}

        def program(name: str, *arguments: str) -> subprocess.CompletedProcess:
            command = [sys.executable, str(ROOT / name), *arguments]
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            print(done.stdout, done.stderr, sep="\n", flush=True)
            check(name, "exit code 0", f"{done.returncode}", done.returncode == 0)
            measured(f"{name} takes", f"{time.perf_counter() - start:.1f} s")
            return done

        program("train_tokenizer.py", *arguments)
        program("prepare.py", *arguments)
        command = [sys.executable, str(ROOT / "rocket.py"), *arguments]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as killed:
            for line in killed.stdout:
                print(line, end="", flush=True)
                if line.startswith("step 51/"):
                    killed.kill()
                    break
        resumed = program("rocket.py", *arguments)
        said = [line for line in resumed.stdout.splitlines() if line.startswith("resuming from")]
        check("a run killed at step 51 goes on", "from step 50", said, "step 50" in "".join(said))
        metrics = (scratch / "run" / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in metrics.splitlines()]
        losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
        trained = [row["step"] for row in rows if "loss" in row] == list(range(1, 101))
        check("rows of its metrics", "1 to 100, once each", len(losses), trained)
        seen = f"{losses[1]:.2f} to {losses[100]:.2f}"
        check("its loss", "falls by a nat", seen, losses[100] < losses[1] - 1)
        sample = program("sample.py", str(scratch / "run"), "--prompt=def ", "--max-tokens=60")
        text = sample.stdout.strip()
        check("its sample", "text", repr(text[:60]), len(text) > 10)
        device = "cpu" if options.dry_run else "cuda"
        program("sample.py", str(scratch / "run"), "--evaluate=val", f"--device={device}")


def stuck(options: Options) -> None:
    """A rank that waits for a device which never answers hears a signal, says so and ends."""
    if options.dry_run:
        report("not run", "a device that never answers", "a GPU", "no GPU")
        return
    code = f"""
import atexit, math, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, job
from pathlib import Path
from distributed import Lagged, explain_lost_rank
job.STUCK_SECONDS = 2.0
signals = job.Signals()
signals.install()
lookout = job.StopConditions(Path({str(ROOT)!r}), signals, None, None, math.inf, 1.0, 0.0)
lookout.seconds["step"] = 0.1
lagged = Lagged(lookout.while_waiting)
values = torch.ones(3, device="cuda")
torch.cuda.synchronize()
torch.cuda._sleep(10**12)  # clock cycles: minutes
lagged.push(None, values)
os.kill(os.getpid(), signal.SIGTERM)
try:
    lagged.drain()
except torch.distributed.DistError as error:
    atexit.register(os._exit, 1)
    print(explain_lost_rank(error), flush=True)
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    print(done.stdout, done.stderr, sep="\n", flush=True)
    said = "lost contact with another rank" in done.stdout
    seen = f"exit code {done.returncode} after {seconds:.0f} s, {'said' if said else 'not said'}"
    holds = said and done.returncode == 1 and seconds < 60
    check("a device that never answers, and a signal", "one line, exit code 1, < 60 s", seen, holds)


# Fast


def speed(
    options: Options,
    name: str,
    overrides: str = "",
    *,
    least: float = 0,
    peer: str = "",
    trace: bool = False,
) -> None:
    """Training steps over random tokens: tokens a second, MFU, memory beside plan.py's."""
    import torch

    from tools import measure, plan

    steps = 3 if name == "llama_1b" else 8
    config = configured(options, name, "--parallel.strategy=ddp", overrides, compile_with(options))
    path = str(options.out / "trace.json.gz") if trace else "PATH"
    asked = {"warmup": 3, "steps": steps, "trace": path}
    start = time.perf_counter()
    contestant = measure.contestant("training", config, asked, peer)
    title = f"{name.removeprefix('llama_')} × {config.train.micro_batch_size}"
    title = f"{peer.partition(':')[0] or title} {overrides_in_short(overrides)}".strip()
    about = next(contestant)
    ready = time.perf_counter() - start
    figures = next(contestant)
    print(json.dumps({"title": title} | about | figures), flush=True)
    rate = figures["training tokens/s"]
    if least and not options.dry_run:
        goal(f"{title}: tokens/s", least, rate)
    else:
        measured(f"{title}: tokens/s", f"{rate:,.0f}")
    mfu = figures.get("MFU, datasheet %")
    of_product = f"{figures['MFU %']:.1f}% of the fastest product"
    measured(f"{title}: MFU", f"{mfu:.1f}%, {of_product}" if mfu else of_product)
    parts = ("forward", "backward", "optimizer")
    times = ", ".join(f"{part} {figures[f'{part} ms']:.1f}" for part in parts)
    measured(f"{title}: ms a step", f"{figures['step ms']:.1f}: {times}")
    measured(f"{title}: seconds to the first turn", f"{ready:.0f}")
    if peer:
        measured(f"{title}: memory, GB", f"{figures['memory GB']:.2f}")
        contestant.close()
        return
    cluster = plan.read_cluster(["--gpus=1", f"--gpu={'cpu' if options.dry_run else 'h100'}"])
    size = config.train.micro_batch_size
    ways = config.parallel.strategy, config.train.recompute
    planned = plan.option(config, cluster, *ways, size)
    tensors = (planned.total - planned.memory["overhead"]) / 1e9
    seen, expected = figures["memory GB"], f"{tensors:.2f} ± 10% ({planned.moment})"
    if options.dry_run:  # a CPU's figure holds the process
        measured(f"{title}: memory, GB", f"{seen:.2f}", expected)
    else:
        near = abs(seen / tensors - 1) < 0.1
        report("met" if near else "missed", f"{title}: memory, GB", expected, f"{seen:.2f}")
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.max_memory_reserved() / 1e9
        beside = (total - free) / 1e9 - torch.cuda.memory_reserved() / 1e9
        constant = f"plan.py takes {planned.memory['overhead'] / 1e9:.1f}"
        measured(
            f"{title}: reserved, and beside the allocator",
            f"{reserved:.2f}, {beside:.2f}",
            constant,
        )
    contestant.close()


def overrides_in_short(overrides: str) -> str:
    """Overrides without what the title has already."""
    shown = [one[2:] for one in overrides.split() if "batch_size" not in one]
    return f"({', '.join(shown)})" if shown else ""


def decoding(options: Options, compiled: bool) -> None:
    """Prefill and decoding of the 110M model at three batch sizes."""
    from tools import measure

    config = configured(options, "llama_110m")
    config.train.compile = "on" if compiled else "off"
    prompt, new = (8, 6) if options.dry_run else (128, 128)
    asked = {"batch": [1, 2] if options.dry_run else [1, 8, 64], "prompt": prompt, "new": new}
    contestant = measure.contestant("sampling", config, asked, "")
    print(json.dumps(next(contestant)), flush=True)
    for what, value in next(contestant).items():
        measured(f"110m{', compiled' * compiled}: {what}", f"{value:,.0f}")
    contestant.close()


@dataclass(frozen=True)
class Stage:
    """A process: what it runs, and for how many seconds at most."""

    name: str
    seconds: int
    run: Callable[[Options], None]
    alone: bool = False  # nothing else runs meanwhile
    torchrun: bool = False


def batch(global_batch_size: int, micro_batch_size: int) -> str:
    return (
        f"--train.global_batch_size={global_batch_size} --train.micro_batch_size={micro_batch_size}"
    )


def stages(options: Options) -> list[Stage]:
    """All of them: those that run together, then those that run alone, important ones first."""

    def fast(name: str, seconds: int, *arguments: Any, **keywords: Any) -> Stage:
        run = functools.partial(speed, **keywords)
        return Stage(name, seconds, lambda options: run(options, *arguments), alone=True)

    peer = f"nanogpt:{options.nanogpt}:compile"
    nanogpt = fast("nanogpt", 90, "llama_110m", batch(128, 32), peer=peer)
    return [
        Stage("numerics", 150, functools.partial(numerics, documents=False)),
        Stage("no_waiting", 150, no_waiting),
        Stage("guard", 120, guard),
        Stage("path", 170, path),
        Stage("documents", 170, functools.partial(numerics, documents=True)),
        Stage("decode", 150, decode),
        Stage("sharded", 170, sharded, torchrun=True),
        Stage("machine", 60, machine),
        Stage("deterministic", 150, functools.partial(repeat, deterministic=True)),
        Stage("repeat", 150, functools.partial(repeat, deterministic=False)),
        Stage("save", 120, save),
        Stage("kernels", 90, kernels),
        Stage("stuck", 90, stuck),
        fast("110m_32", 100, "llama_110m", batch(128, 32), least=513_000, trace=True),
        fast("1b_8", 100, "llama_1b", batch(64, 8), least=61_000),
        *([nanogpt] if options.nanogpt else []),
        fast("110m_64", 80, "llama_110m", batch(128, 64), least=513_000),
        fast("1b_16", 90, "llama_1b", batch(64, 16), least=61_000),
        Stage("decoding", 80, functools.partial(decoding, compiled=False), alone=True),
        # what the desk check only suspected, as long as there is time
        fast("chunk_2048", 60, "llama_110m", f"{batch(128, 32)} --train.loss_chunk=2048"),
        fast("price_of_bits", 60, "llama_110m", f"{batch(128, 32)} --train.deterministic=true"),
        Stage("decoding_compiled", 90, functools.partial(decoding, compiled=True), alone=True),
        fast("muon", 60, "llama_110m", f"{batch(128, 32)} --optimizer.name=muon"),
        fast("chunk_all", 60, "llama_110m", f"{batch(128, 32)} --train.loss_chunk=0"),
        fast("fsdp", 60, "llama_1b", f"{batch(64, 8)} --parallel.strategy=fsdp"),
    ]


# The parent


class Table:
    """All rows so far, in three files that are whole at every moment."""

    def __init__(self, out: Path) -> None:
        self.out, self.rows, self.lock, self.logged = out, [], threading.Lock(), 0
        self.started = time.monotonic()
        self.results = open(out / "results.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self.log = open(out / "log.txt", "w", encoding="utf-8")  # noqa: SIM115

    def add(self, stage: str, row: dict[str, str]) -> None:
        with self.lock:
            at = round(time.monotonic() - self.started, 1)
            self.rows.append({"stage": stage} | row)
            self.results.write(json.dumps(self.rows[-1] | {"at": at}, ensure_ascii=False) + "\n")
            self.results.flush()
            print(
                f"{at:6.1f} s  {stage}: {row['what']}: {row['seen']} [{row['verdict']}]", flush=True
            )

    def write_log(self, stage: str, line: str) -> None:
        with self.lock:
            if self.logged < LOG_BYTES and line.strip():
                self.logged += self.log.write(f"{stage}: {line.rstrip()[:2000]}\n")
                self.log.flush()

    def save(self) -> None:
        with self.lock:
            columns = ("stage", "what", "expected", "seen", "verdict")
            lines = [[str(row[column])[:90] for column in columns] for row in self.rows]
            widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
            text = "\n".join(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(line, widths, strict=True)
                ).rstrip()
                for line in [list(columns), *lines]
            )
            (self.out / "table.txt").write_text(text + "\n", encoding="utf-8")


def run_stage(
    stage: Stage, table: Table, arguments: list[str], deadline: float, environment: dict[str, str]
) -> None:
    """Runs a stage in a process of its own and takes in its rows as they come."""

    def ended(seen: str, verdict: str) -> None:
        row = {"what": "ends", "expected": "exit code 0", "seen": seen, "verdict": verdict}
        table.add(stage.name, row)

    # a CPU takes its time, and in a dry run nothing hangs for the price of a GPU
    limit = stage.seconds * (5 if "--dry-run" in arguments else 1)
    left = min(limit, deadline - time.monotonic())
    if left < 10:
        ended("no time left", "not run")
        return
    command = [sys.executable]
    if stage.torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [str(Path(__file__).resolve()), *arguments, f"--stage={stage.name}"]
    mark = f"ROCKET_STAGE={os.getpid()}-{stage.name}"
    start, errors, rows = time.monotonic(), [""], []
    process = subprocess.Popen(
        command,
        env=environment | {"PYTHONUNBUFFERED": "1"} | dict([mark.split("=")]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def take_in() -> None:
        for line in process.stdout:
            table.write_log(stage.name, line)
            if line.startswith(ROW):
                try:
                    row = json.loads(line.removeprefix(ROW))
                except ValueError:
                    row = {"what": "a row", "expected": "JSON", "seen": line, "verdict": "FAILED"}
                rows.append(row)
                table.add(stage.name, row)
            # Not torchrun's own (ChildFailedError), which comes last and says nothing of the cause.
            elif re.match(r"[\w.\[\]: ]*(?<!ChildFailed)(Error|Exception)\b", line):
                errors.append(line.strip())

    reader = threading.Thread(target=take_in, daemon=True)
    reader.start()
    late = False
    try:
        process.wait(left)
    except subprocess.TimeoutExpired:
        late = True
    kill_marked(mark)  # compilers and torchrun's ranks outlive who started them
    process.kill()
    code = process.wait()
    reader.join(10)
    if late or code or not rows:
        why = f"over its {left:.0f} s" if late else f"exit code {code}: {errors[-1]}"
        ended(why, "FAILED")
    table.write_log(stage.name, f"took {time.monotonic() - start:.1f} s")
    table.save()


def kill_marked(mark: str) -> None:
    """Kills every process that has inherited this variable."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or just gone
            if mark.encode() in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--nanogpt", default="")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = Options(given.out, given.dry_run, given.nanogpt)
    every = {stage.name: stage for stage in stages(options)}
    if given.stage:
        run_here(every[given.stage], options)
    names = given.only.split(",") if given.only else list(every)
    if unknown := set(names) - every.keys():
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(every)}")
    given.out.mkdir(parents=True, exist_ok=True)
    table, deadline = Table(given.out), time.monotonic() + 60 * given.minutes
    arguments = [str(given.out), f"--nanogpt={given.nanogpt}", *["--dry-run"] * given.dry_run]
    chosen = [every[name] for name in names]
    cores = len(os.sched_getaffinity(0))
    together = 1 if given.dry_run or not is_shared() else max(1, min(5, cores // 3))
    # A cache of our own: a compiler that is killed with its stage leaves half a file there, and
    # whoever compiles the same next would load it. It takes precedence over the environment, where
    # torch names its cache as soon as a process has compiled, a test's for one.
    cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    own = {"TORCHINDUCTOR_CACHE_DIR": cache.name}
    for alone, at_once in ((False, together), (True, 1)):
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(32, cores // at_once)))}
        environment = threads | os.environ | own
        with ThreadPoolExecutor(at_once) as pool:
            running = [
                pool.submit(run_stage, stage, table, arguments, deadline, environment)
                for stage in chosen
                if stage.alone == alone
            ]
        for one in running:
            if error := one.exception():  # of this script; the others are to go on
                traceback.print_exception(error)
                table.add(
                    "script", {"what": "", "expected": "", "seen": str(error), "verdict": "FAILED"}
                )
    cache.cleanup()
    table.save()
    print((given.out / "table.txt").read_text(encoding="utf-8"))
    counted = Counter(row["verdict"] for row in table.rows)
    print(", ".join(f"{count} {verdict}" for verdict, count in counted.items()))
    if left := [row["stage"] for row in table.rows if row["verdict"] == "not run"]:
        print("not run:", ", ".join(left))
    sys.exit(1 if counted["FAILED"] else 0)


def is_shared() -> bool:
    """Whether several processes may use the GPU at once."""
    if not shutil.which("nvidia-smi"):
        return True
    command = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    return "Exclusive" not in subprocess.run(command, capture_output=True, text=True).stdout


def run_here(stage: Stage, options: Options) -> None:
    """This process is a stage. It ends at once when it is done: compilers leave processes behind,
    and an orderly exit may wait for them."""
    code = 0
    try:
        stage.run(options)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
