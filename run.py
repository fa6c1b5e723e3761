"""The run directory: who may go on with it, and what it tells people and scripts.

Rank 0 alone writes. Rows are durable before a checkpoint of their step is, and resuming cuts what
lies after it, so that each step stands in the files once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import attempts
from checkpoint import Checkpoint, checkpoint_paths, readable_checkpoints, remove_leftovers
from config import (
    ACCEPT_CHANGES,
    PEAK_FLOPS,
    SICK_NODE,
    Config,
    ConfigError,
    DataConfig,
    LogConfig,
    UserError,
    build_config,
    changes,
    dump_toml,
    file_sha256,
    installed,
    read_toml,
    resolve_path,
    tell,
    write_atomically,
)
from dataset import digests, mixture_fingerprint, mixture_weights, read_manifest
from distributed import AgreedError, NodeError, World
from job import CODE, Claim, changed_code, code_in_use, print_diff, snapshot_code
from tokenizer import configured_tokenizer

REPORT_SECONDS = 300.0  # that report.py may take; a million rows are read in 11


def device_peak(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in GB: the GPU's, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Inputs(NamedTuple):
    """What training needs to know of its inputs; read by one rank and handed to the others."""

    manifests: dict[str, dict[str, Any]]  # by directory as configured, in the order of the mixture
    weights: dict[str, int]  # of the same directories
    fingerprint: str  # of all of that
    template: dict[str, str] | None  # of the conversations, if there are any
    vocab_size: int
    bos_id: int
    tokenizer_sha256: str
    byte_lengths: np.ndarray
    model_changed: bool  # its code, since the run was started


def check_inputs(directory: Path, config: Config, accept_changes: bool) -> Inputs:
    """Checks tokenizer, datasets and an existing run directory against each other; writes nothing.

    Raises:
        UserError: an input is missing or does not fit, or the run was started with keys that may
            not change or need consent.
    """
    if config.train.init_from == "resume":
        raise ConfigError(
            "train.init_from=resume: resuming is automatic, run the same command again;"
            " init_from takes another run or checkpoint to start a new run from"
        )
    for name in ("tensorboard", "wandb"):
        if getattr(config.log, name) and not installed(name):
            raise UserError(
                f"log.{name}: the package {name} is missing: pip install 'rocket-llama[{name}]'"
            )
    tokenizer = configured_tokenizer(config.tokenizer)
    weights = mixture_weights(config.data)
    manifests = {name: read_manifest(resolve_path(name), tokenizer.sha256) for name in weights}
    _check_kind(config.data, manifests)
    fingerprint, template = mixture_fingerprint(manifests, weights), _template(manifests)
    changed: list[str] = []
    if checkpoint := next(readable_checkpoints(directory), None):
        if checkpoint.manifest["tokenizer_sha256"] != tokenizer.sha256:
            raise UserError(f"{directory}: the run was trained with another tokenizer")
        if checkpoint.manifest["dataset"] != fingerprint:
            raise UserError(
                f"{directory}: the run was trained on another dataset or mixture than"
                f" {' and '.join(weights)} (of a mixture, order and weights count); set data.dir or"
                " data.mixture to it, or start a new run with train.init_from"
            )
        # config.toml also knows the changes accepted since that checkpoint
        started = directory / "config.toml"
        old = build_config(read_toml(started)) if started.exists() else checkpoint.config
        _check_changes(old, config, accept_changes)
        changed = _check_code(directory, accept_changes)
        evaluated = checkpoint.config.train.eval_sequences
        if "model.py" in changed and evaluated != config.train.eval_sequences:
            raise ConfigError(
                "model.py has changed, so this start compares the validation loss with the recorded"
                f" one: leave train.eval_sequences at {evaluated} for it"
            )
    return Inputs(
        manifests=manifests,
        weights=weights,
        fingerprint=fingerprint,
        template=template,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        tokenizer_sha256=tokenizer.sha256,
        byte_lengths=tokenizer.byte_lengths(),
        model_changed="model.py" in changed,
    )


def _check_kind(data: DataConfig, manifests: dict[str, dict[str, Any]]) -> None:
    """ConfigError where the configuration describes another kind of data than there is.

    The datasets of a mixture may be of several kinds, so there it describes none.
    """
    if data.mixture:
        return
    ((name, manifest),) = manifests.items()
    kind = {"format": "text"} | manifest
    keys = ("format", "template", "train_on", "too_long") if "format" in manifest else ("format",)
    for key in keys:
        if kind.get(key) != getattr(data, key):
            raise ConfigError(
                f"{name} was prepared with data.{key} = {json.dumps(kind.get(key))}, not"
                f" {json.dumps(getattr(data, key))}; set it so, or run prepare.py with --force"
            )


def _template(manifests: dict[str, dict[str, Any]]) -> dict[str, str] | None:
    """The template that the instruct datasets share; ConfigError if one has another."""
    found = {name: known["template"] for name, known in manifests.items() if "template" in known}
    first, template = next(iter(found.items()), ("", None))
    for name in found:
        if found[name] != template:
            raise ConfigError(
                f"data.mixture: {name} was prepared with another data.template than {first};"
                " prepare both with the same"
            )
    return template


def open_run(directory: Path, config: Config, claim: Claim, seen: list[Path]) -> None:
    """Makes the run directory ours, without leftovers, and counts the attempt.

    Args:
        seen: the checkpoints that there were when this job chose one.

    Raises:
        UserError: another job trains it, or did in the meantime; it can't be written.
    """
    try:
        claim.take()
        if checkpoint_paths(directory) != seen:
            raise UserError(f"{directory}: another job has just trained this run; start again")
        remove_leftovers(directory)
        (directory / "logs").mkdir(exist_ok=True)
        by_hand = f"{socket.gethostname()} {os.getpid()} {time.time()}"
        attempt = os.environ.get(attempts.ATTEMPT, by_hand)
        attempts.count(directory, attempt, config.train.max_attempts)
    except OSError as error:
        raise _not_writable(directory, error) from None


def record_start(directory: Path, config: Config) -> None:
    """Writes down with which configuration, tokenizer and code the run goes on.

    Raises:
        UserError: the directory can't be written.
    """
    try:
        snapshot_code(directory)
        write_atomically(directory / "config.toml", dump_toml(config).encode())
        tokenizer = resolve_path(config.tokenizer.path).read_bytes()
        write_atomically(directory / "tokenizer.model", tokenizer)
        attempts.note_opened(directory)
    except OSError as error:
        raise _not_writable(directory, error) from None


def _check_changes(old: Config, new: Config, accept_changes: bool) -> None:
    """Holds the keys of a resumed run against those it was started with."""
    found = changes(old, new)
    if found["refused"]:
        raise ConfigError(
            f"this run can't resume with {'; '.join(found['refused'])}: it would be another run;"
            " set another train.out_dir"
        )
    if found["consent"] and not accept_changes:
        raise ConfigError(
            f"this run was started otherwise: {'; '.join(found['consent'])};"
            f" to go on with the new values add {ACCEPT_CHANGES}"
        )
    for change in found["consent"]:
        print(f"accepted: {change}")


def _check_code(directory: Path, accept_changes: bool) -> list[str]:
    """Holds the code in use against the snapshot that the run was started with; what differs."""
    if not (changed := changed_code(directory)):
        return []
    print_diff(changed)
    names = ", ".join(changed)
    if not accept_changes:
        raise ConfigError(
            f"the code has changed since this run was started: {names}; to go on with the new code"
            f" add {ACCEPT_CHANGES}; the old one is in {directory / 'code'}"
        )
    print(f"accepted: other code in {names}")
    return list(changed)


def preflight(
    directory: Path, config: Config, checkpoint: Checkpoint | None, size: int, world: World
) -> None:
    """What would otherwise fail hours later: every rank sees the same, and disk and device do.

    Shared files are read by one rank a node, which is where file systems may differ.

    Args:
        size: bytes of a checkpoint.

    Raises:
        UserError: names the rank and host that differs, or what is missing.
    """

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    def look() -> dict[str, Any]:
        _check_device(config, world.device)
        _check_memory(config, size // 12, world)
        seen = {
            "host": socket.gethostname(),
            "code": digest(json.dumps(code_in_use()).encode()),
            "configuration": digest(dump_toml(config).encode()),
            "torch": torch.__version__,
            "compute type": str(world.dtype),
        }
        if config.parallel.strategy == "hsdp":
            seen["number of ranks on its node"] = str(world.local_size)
        if world.local_rank == 0:
            names = config.data.mixture or [config.data.dir]
            shared = {f"dataset {name}": resolve_path(name) for name in names}
            if checkpoint:
                shared["checkpoint"] = checkpoint.path
            for name, path in shared.items():
                manifest = path / "manifest.json"
                seen[name] = digest(manifest.read_bytes()) if manifest.exists() else "none"
        return seen

    seen_by = world.each(look)

    if different := world.once(lambda: _first_difference(seen_by)):
        raise AgreedError.about(*different, SICK_NODE, world)
    world.once(lambda: _check_disk(directory, size))


def _first_difference(seen_by: list[dict[str, Any]]) -> tuple[int, str] | None:
    """The first rank that sees something else than most do, and what; of two, rank 1."""
    for name in [name for name in seen_by[0] if name != "host"]:
        values = {rank: seen[name] for rank, seen in enumerate(seen_by) if name in seen}
        common = Counter(values.values()).most_common(1)[0][0]
        like = next(rank for rank, value in values.items() if value == common)
        for rank, value in values.items():
            if value != common:
                return rank, (
                    f"rank {rank} on {seen_by[rank]['host']} does not have the same {name} as"
                    f" rank {like} on {seen_by[like]['host']}: {value[:12]} and {common[:12]}"
                )
    return None


def _check_disk(directory: Path, size: int) -> None:
    """UserError unless the next checkpoints, of size bytes each, can be written."""
    kept = len(checkpoint_paths(directory))
    there = next(path for path in (directory, *directory.parents) if path.is_dir())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise _not_writable(directory, error) from None
    needed, free = max(1, 2 - kept) * size, shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{directory}: {free / 1e9:.3f} GB are free, the next checkpoints need"
            f" {needed / 1e9:.3f} GB; make room or set train.out_dir"
        )


def _not_writable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"{directory}: the run directory can't be written: {error.strerror}; set train.out_dir"
    )


def _check_memory(config: Config, parameters: int, world: World) -> None:
    """UserError where weights, gradients and optimizer state alone are more than a rank has."""
    shards = {"ddp": 1, "fsdp": world.size, "hsdp": world.local_size}[config.parallel.strategy]
    moments = 1 if config.optimizer.name == "muon" else 2
    needed = 4 * (2 + moments) * parameters / shards
    if world.device.type == "cuda":
        memory, what = torch.cuda.mem_get_info(world.device)[1], "its GPU"
    else:
        pages = os.sysconf("SC_PHYS_PAGES") // world.local_size
        memory, what = pages * os.sysconf("SC_PAGE_SIZE"), "its share of the host"
    if needed > memory:
        raise UserError(
            f"the model does not fit: its {parameters / 1e9:.3g}B parameters, their gradients and"
            f" the optimizer's state are {needed / 1e9:,.0f} GB a rank, and {what} has"
            f" {memory / 1e9:,.0f} GB; set a smaller model.dim or model.n_layers, or"
            " parallel.strategy=fsdp and more ranks (python tools/plan.py CONFIG tells how many)"
        )


def _check_device(config: Config, device: torch.device) -> None:
    """UserError if the GPU that the run means to use does not compute."""
    if device.type == "cpu":
        if config.train.device == "auto" and Path("/dev/nvidia0").exists():
            kind = NodeError if torch.version.cuda else UserError
            raise kind(
                f"{socket.gethostname()} has an NVIDIA GPU that torch {torch.__version__} can't"
                " use: the driver is too old for it, or it is a build for CPUs; set"
                " train.device=cpu to train without"
            )
        return
    try:
        torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item()
    except RuntimeError as error:
        raise NodeError(
            f"{torch.cuda.get_device_name(device)} on {socket.gethostname()} can't compute with"
            f" torch {torch.__version__}: {str(error).partition(chr(10))[0]}"
        ) from None


class DataCheck:
    """Compares the datasets' bytes with their digests, beside training and once.

    A flipped bit trains as well as a right one, so every shard is hashed: each rank takes its
    share, in a thread of the lowest priority. What was right is remembered beside the manifest, in
    verified.json, by size, time and inode, and is not hashed again.
    """

    FILE = "verified.json"

    def __init__(self, manifests: dict[str, dict[str, Any]], enabled: bool, world: World) -> None:
        """Every rank must call this. Hosts whose datasets lie on disks of their own hash all."""
        self.world, self.wrong = world, ""
        self.paths = {resolve_path(name): digests(found) for name, found in manifests.items()}
        self.checked: dict[Path, dict[str, list[int]]] = {path: {} for path in self.paths}
        self.finished = not enabled
        if self.finished:
            return
        # Only a file system that ranks share shows them the same file, changed at the same moment.
        found = [(path / "manifest.json").stat() for path in self.paths]
        mine = [(stat.st_ino, stat.st_ctime_ns) for stat in found]
        disks: list[Any] = [None] * world.size
        dist.all_gather_object(disks, mine)
        self.sharers = [rank for rank, disk in enumerate(disks) if disk == mine]
        lists: list[Any] = [None] * world.size
        leads = world.rank == self.sharers[0]
        dist.all_gather_object(lists, self._not_verified() if leads else None)
        todo = lists[self.sharers[0]]
        self.share = todo[self.sharers.index(world.rank) :: len(self.sharers)]
        self.finished = not any(lists)
        threading.Thread(target=self._hash, daemon=True).start()

    def damaged(self) -> bool:
        """Whether this rank has found a file that is wrong."""
        return bool(self.wrong)

    def tell(self) -> None:
        """AgreedError on every rank if one of them has found a file that is wrong."""

        def name() -> None:
            if self.wrong:
                raise UserError(self.wrong)

        self.world.each(name)

    def remember(self) -> None:
        """Writes down what is right by now, until all of it is; every rank must call this."""
        if self.finished:
            return
        self.tell()
        lists: list[Any] = [None] * self.world.size
        dist.all_gather_object(lists, (self.checked, not self.share))
        self.finished = all(done for _, done in lists)
        if self.world.rank != self.sharers[0]:
            return
        for path in self.paths:
            known = self._known(path)
            for rank in self.sharers:
                known |= lists[rank][0][path]
            temporary = path / f"{self.FILE}.{socket.gethostname()}.{os.getpid()}.tmp"
            try:
                temporary.write_text(json.dumps(known))
                temporary.chmod(0o666 & (path / "manifest.json").stat().st_mode)
                temporary.replace(path / self.FILE)
            except OSError as error:  # others' data, say: they are right all the same
                tell(f"{path / self.FILE} can't be written: {error.strerror}; hashed in each job")

    def _known(self, path: Path) -> dict[str, list[int]]:
        try:
            return attempts.read_json(path / self.FILE) or {}
        except OSError:  # another user's: hash again
            return {}

    def _not_verified(self) -> list[tuple[Path, str]]:
        found = []
        for path, files in self.paths.items():
            known = self._known(path)
            with os.scandir(path) as entries:
                stats = {e.name: self._stamp(e.stat()) for e in entries if e.name in files}
            found += [(path, name) for name in files if known.get(name) != stats.get(name)]
        return found

    @staticmethod
    def _stamp(stat: os.stat_result) -> list[int]:
        return [stat.st_size, stat.st_mtime_ns, stat.st_ino]

    def _hash(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while self.share:
            directory, name = self.share[-1]
            path = directory / name
            try:
                stamp = self._stamp(path.stat())
                digest = file_sha256(path)
            except OSError as error:
                self.wrong = f"{path} can't be read: {error.strerror}"
                return
            if digest != self.paths[directory][name]:
                self.wrong = (
                    f"{path} is damaged: its sha256 is {digest[:12]}…, not"
                    f" {self.paths[directory][name][:12]}… as in manifest.json; restore it, or run"
                    " prepare.py with --force. Steps of this job may have read it"
                )
                return
            self.checked[directory][name] = stamp
            self.share.pop()


class RunLog:
    """Rows, status, report and console of a run; ranks other than 0 write nothing."""

    FILES = ("metrics.jsonl", "samples.jsonl", "bad_steps.jsonl", "jobs.jsonl")

    def __init__(
        self,
        directory: Path,
        config: LogConfig,
        world: World,
        max_steps: int,
        tokens_a_step: int,
        flops: float,
    ) -> None:
        self.directory, self.config, self.tokens_a_step = directory, config, tokens_a_step
        self.enabled = world.rank == 0
        self.device = world.device
        self.max_steps = max_steps
        peak = device_peak(world.device)
        self.peak_rate = peak * world.size / flops if peak else None  # tokens/s at 100% MFU
        self.files: dict[str, Any] = {}
        self.rows: Counter[str] = Counter()  # that each file has
        self.boards: dict[str, Any] = {}  # TensorBoard's writers, by what their rows are of
        self.tracker: subprocess.Popen | None = None  # follows the rows for Weights & Biases
        self.reporter = ThreadPoolExecutor(1, "report")  # exiting Python waits for its last report
        self.next_report: Future[None] = Future()
        self.bar = tqdm(disable=True)
        self.failed_before = self._failed_before() if self.enabled else None

    def start(self, step: int, hours: float, evaluated: bool, rows: dict[str, int]) -> None:
        """Opens the files, cut to what the checkpoint of a step knows, and starts the clocks.

        Args:
            rows: how many each file had then.
        """
        self.started = time.monotonic() - 3600 * hours
        self.restart_clock()
        if self.enabled:
            for name in self.FILES:
                known = math.inf if name == "jobs.jsonl" else step  # what came to nothing was a job
                self.rows[name] = kept = cut_rows(self.directory / name, known, evaluated)
                if missing := max(0, rows.get(name, 0) - kept):
                    self.say(
                        f"{self.directory / name}: {missing} of the {rows[name]} rows up to step"
                        f" {step} are missing; it was changed or deleted since that was saved"
                    )
                self.files[name] = open(self.directory / name, "ab", buffering=0)  # noqa: SIM115
            if sys.stderr.isatty():
                self.bar = tqdm(total=self.max_steps, initial=step, unit="step")
            if self.config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                for kind, first in (("train", step + 1), ("val", step + evaluated)):
                    folder = str(self.directory / "tensorboard" / kind)
                    self.boards[kind] = SummaryWriter(folder, purge_step=first)
            if self.config.wandb:
                self._track()

    def job_row(self, step: int, about: dict[str, Any]) -> None:
        """Writes the row of the job that begins at a step, with what else is known about it."""
        job = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "device": self.device.type,
        }
        self.row(self._place(step) | job | about, "jobs.jsonl")

    @property
    def hours(self) -> float:
        """Hours of training, added up over the jobs of the run."""
        return (time.monotonic() - self.started) / 3600

    def restart_clock(self) -> None:
        """Leaves what came before (logging, evaluation, saving) out of the throughput."""
        self.mark, self.steps = time.monotonic(), 0

    def count(self, done_at: float) -> None:
        """Counts a step that was done at a time, by time.monotonic()."""
        self.steps += 1
        self.done_at = done_at
        self.bar.update()

    def training_row(
        self, step: int, loss: float, rate: float, grad_norm: float, skipped: str | None
    ) -> None:
        """Writes and prints the row of a training step; skipped says why it changed nothing."""
        elapsed = self.done_at - self.mark
        row = self._place(step) | {
            "loss": finite(loss),
            "learning_rate": rate,
            "grad_norm": finite(grad_norm),
            "tokens_per_second": self.steps * self.tokens_a_step / elapsed,
        }
        if skipped:
            row["skipped"] = skipped
        if self.peak_rate:
            row["mfu"] = row["tokens_per_second"] / self.peak_rate
        row["memory_gb"] = memory_gb(self.device)
        self.row(row)
        self.board("train", step, row)
        self.say(
            f"step {step}/{self.max_steps} | loss {loss:.4f} | lr {rate:.2e}"
            f" | grad norm {grad_norm:.2f} | {row['tokens_per_second']:,.0f} tok/s"
            + (f" | MFU {100 * row['mfu']:.1f}%" if "mfu" in row else "")
            + f" | {row['memory_gb']:.2f} GB"
            f" | {describe_seconds(elapsed / self.steps * (self.max_steps - step))} left"
        )
        self.mark, self.steps = self.done_at, 0

    def evaluation_row(self, step: int, scores: dict[str, Any]) -> None:
        """Writes and prints the row of an evaluation."""
        self.row(self._place(step) | scores)
        self.board("val", step, scores)
        self.say(
            f"step {step}/{self.max_steps} | val loss {{val_loss:.4f}} | perplexity"
            " {val_perplexity:.2f} | {val_bits_per_byte:.4f} bits/byte".format(**scores)
        )
        if len(losses := scores.get("val_losses", {})) > 1:  # of a mixture
            names = [Path(name).name for name in losses]
            names = names if len({*names}) == len(names) else [*losses]
            told = (f"{n} {loss:.4f}" for n, loss in zip(names, losses.values(), strict=True))
            self.say(f"  val loss of each dataset: {', '.join(told)}")

    def _place(self, step: int) -> dict[str, Any]:
        return {"step": step, "tokens": step * self.tokens_a_step, "hours": self.hours}

    def row(self, row: dict[str, Any], file: str = "metrics.jsonl") -> None:
        """Appends a row to one of the run's files."""
        if self.enabled:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            self._guarded(lambda: self.files[file].write(line.encode()))
            self.rows[file] += 1

    def board(self, kind: str, step: int, row: dict[str, Any]) -> None:
        """Passes a row's numbers on to TensorBoard, if it is to know."""
        if kind in self.boards:
            numbers = {name: value for name, value in row.items() if isinstance(value, float)}
            for name, value in numbers.items():
                self.boards[kind].add_scalar(name.removeprefix("val_"), value, step)

    def _track(self) -> None:
        """Has Weights & Biases fed by a process beside training, which can't hold it up or end it;
        its standard input ends with this process, and signals to this one are not for it."""
        command = [
            sys.executable,
            str(CODE / "tools" / "track.py"),
            str(self.directory),
            "--follow",
        ]
        try:
            self.tracker = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            self.say(f"no W&B run: {error}")

    def report(self) -> None:
        """Has report.html written by a process of low priority beside training, one at a time."""
        if self.files and self.config.report:
            self.next_report.cancel()  # if it still waits for the one before
            self.next_report = self.reporter.submit(self._report)

    def _report(self) -> None:
        command = ["nice", sys.executable, str(CODE / "tools" / "report.py"), str(self.directory)]
        options = {"capture_output": True, "text": True, "timeout": REPORT_SECONDS}
        try:  # in a session of its own: Ctrl-C at the terminal is meant for training
            done = subprocess.run(command, **options, start_new_session=True)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.say(f"no report.html: {error}")
            return
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            self.say(f"no report.html: {last or f'exit code {done.returncode}'}")

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def sync(self) -> None:
        """Makes all rows so far durable."""
        for file in self.files.values():
            self._guarded(lambda file=file: os.fsync(file.fileno()))
        for board in self.boards.values():
            self._guarded(board.flush)

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"{self.directory} can't be written: {error.strerror}") from None

    def status(
        self, state: str, reason: str | None, step: int, requeue: bool = False, why: str = ""
    ) -> None:
        """Writes status.json, the contract for scripts: torchrun turns every exit code into 1.

        Args:
            state: running, finished, stopped or failed.
            reason: why it ended: deadline, signal, stop_file, stop_at_step, early_stop, non_finite
                or error; else None.
            requeue: whether the same job should come back; not once its attempts were too many.
            why: the reason in words.
        """
        if not self.enabled:
            return
        if requeue and (too_many := attempts.exhausted(self.directory)):
            requeue, why = False, f"{too_many}; the last one: {why or reason}"
            self.say(f"does not come back: {too_many}")
        attempt = os.environ.get(attempts.ATTEMPT)
        status = {"state": state, "reason": reason, "step": step, "requeue": requeue}
        status |= {"why": why, "attempt": attempt}
        self._guarded(lambda: attempts.write_status(self.directory, status))

    def _failed_before(self) -> tuple[int, str] | None:
        """Where the job before this one failed, and why, if it did."""
        status = attempts.read_json(self.directory / "status.json") or {}
        if status.get("state") != "failed":
            return None
        return status.get("step", 0), status.get("why", "")

    def failed(self, reason: str, step: int, requeue: bool, why: str) -> None:
        """Records a failure; where even that fails, says so and leaves the first error in view."""
        try:
            self.status("failed", reason, step, requeue, why)
        except UserError as error:
            tell(f"no status.json: {error}")
        self.report()

    def end(self, reason: str, step: int, advanced: bool) -> None:
        """Records and says that the run ended in order."""
        told = {
            "max_steps": "finished",
            "early_stop": "finished early, no new best",
            "stop_at_step": "stopped as asked",
            "stop_file": "stopped by the STOP file",
            "signal": "stopped by a signal",
            "deadline": "stopped before the job's time is over",
        }[reason]
        if reason == "deadline" and not advanced:
            told += " (too short for any progress: give it more)"
        requeue = reason in ("signal", "deadline")
        shown = None if reason == "max_steps" else reason
        self.status(told.split()[0], shown, step, requeue, told)
        self.report()
        self.say(f"{told} at step {step}: {self.directory}")

    def close(self) -> None:
        """Closes the files and the progress bar."""
        self.bar.close()
        for file in (*self.files.values(), *self.boards.values()):
            file.close()
        if self.tracker:
            self.tracker.stdin.close()
            self.tracker.wait()


def finite(number: float) -> float | None:
    """The number, or None for what JSON can't say."""
    return number if math.isfinite(number) else None


def cut_rows(path: Path, step: float, evaluated: bool) -> int:
    """Cuts a file of rows behind the last whole one up to a step; how many it keeps.

    If that step was not evaluated yet, rows of an evaluation that a job before began are cut too.
    """
    if not path.exists():
        return 0
    keep = rows = 0
    whole, torn = [], False
    with open(path, "rb+") as file:
        for line in file:
            try:
                row = json.loads(line)
                known = evaluated or "loss" in row
                inside = line.endswith(b"\n") and row["step"] < step + known
            except (ValueError, KeyError, TypeError):  # torn by a crash
                inside = False
            if not inside:
                torn = True
                continue
            rows += 1
            if torn:  # rows behind a line that somebody has changed
                whole.append(line)
            else:
                keep += len(line)
        if whole:
            file.seek(0)
            write_atomically(path, file.read(keep) + b"".join(whole))
        else:
            file.truncate(keep)
    return rows


def describe_seconds(seconds: float) -> str:
    """A duration as 45s, 3m10s or 5h02m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
