"""The run directory while a job trains it: state, rows, status, console, and the code that runs.

Rank 0 alone writes. Rows are durable before a checkpoint of their step is, and resuming cuts what
lies after it, so that each step stands in the files once.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import attempts
from checkpoint import Checkpoint, Saver, checkpoint_paths, remove_leftovers
from config import (
    LOST_RANK,
    PEAK_FLOPS,
    ROOT,
    SICK_NODE,
    Config,
    ConfigError,
    UserError,
    dump_toml,
    resolve_path,
    tables,
    tell,
    write_atomically,
)
from dataset import Batches, DataCheck, Mixture
from distributed import AgreedError, Arrived, World, compiles, cudnn_version, explain_lost_rank
from job import Consensus, RunLock
from model import flops_per_token
from preflight import CODE, Inputs, code_files, not_writable

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


def snapshot_code(directory: Path) -> None:
    """Copies Rocket's Python files into the run; a requeued job runs them, whatever is edited."""
    code, fresh = directory / "code", directory / "code.tmp"
    now, then = (
        {name: path.read_bytes() for name, path in code_files(folder).items()}
        for folder in (CODE, code)
    )
    if now == then:
        return
    aside = directory / "code.old.tmp"
    for path in (fresh, aside):
        shutil.rmtree(path, ignore_errors=True)
    fresh.mkdir()
    for name, content in now.items():
        (fresh / name).parent.mkdir(exist_ok=True)
        (fresh / name).write_bytes(content)
    if code.exists():
        code.rename(aside)
    fresh.rename(code)
    shutil.rmtree(aside, ignore_errors=True)


def open_run(directory: Path, config: Config, lock: RunLock, seen: list[Path]) -> None:
    """Makes the run directory ours, without leftovers, and counts the attempt.

    Args:
        seen: the checkpoints that there were when this job chose one.

    Raises:
        UserError: another job trains it, or did in the meantime; it can't be written.
    """
    try:
        lock.take()
        if checkpoint_paths(directory) != seen:
            raise UserError(f"{directory}: another job has just trained this run; start again")
        remove_leftovers(directory)
        (directory / "logs").mkdir(exist_ok=True)
        by_hand = f"{socket.gethostname()} {os.getpid()} {time.time()}"
        attempt = os.environ.get(attempts.ATTEMPT, by_hand)
        attempts.count(directory, attempt, config.train.max_attempts)
    except OSError as error:
        raise not_writable(directory, error) from None


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
        raise not_writable(directory, error) from None


@dataclass
class Progress:
    """What a run carries from step to step beside weights and optimizer; checkpoints hold it."""

    step: int = 0
    hours: float = 0.0
    best_val_losses: list[float] = field(default_factory=list)  # ascending, as many as are kept
    evaluations_since_best: int = 0
    val_loss: float | None = None  # of the evaluation at this very step, if there was one
    bad_steps: int = 0  # skipped steps in a row, up to this one
    norms: list[float] = field(default_factory=lambda: [0.0, 0.0])  # see rocket.should_skip
    save_seconds: float = 0.0  # that the longest save so far took
    rows: dict[str, int] = field(default_factory=dict)  # in each file of the run

    @property
    def position(self) -> tuple[int, float | None]:
        """What a checkpoint of this state is named and ranked by."""
        return self.step, self.val_loss


class Outcome(NamedTuple):
    """What all ranks come to know of a step, LAG steps later: global values."""

    loss: float
    skip: float
    grad_norm: float

    @property
    def skipped(self) -> str | None:
        """Why the step changed nothing, or None if it was a good one."""
        if not self.skip:
            return None
        if self.loss == self.grad_norm == 0:  # no spike is that low
            return "no_trained_tokens"
        return "spike" if math.isfinite(self.loss + self.grad_norm) else "non_finite"


class NotFiniteError(AgreedError):
    """Too many steps in a row were skipped, or the validation loss is not finite."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"step {step}: {message}")
        self.step = step


class Run:
    """A run: its progress, and what is written and printed of it. Ranks other than 0 write nothing.

    As a context manager it records a failure in status.json, and frees the run at the end.

    Attributes:
        saver, agreed, check: what saves it, what all ranks have agreed on, what verifies its
            dataset; set when training begins.
    """

    FILES = ("metrics.jsonl", "samples.jsonl", "bad_steps.jsonl", "jobs.jsonl")
    saver: Saver | None = None
    agreed: Consensus
    check: DataCheck

    def __init__(
        self,
        directory: Path,
        config: Config,
        inputs: Inputs,
        data: Mixture,
        val_data: Mixture | None,
        world: World,
    ) -> None:
        self.directory, self.config, self.inputs = directory, config, inputs
        self.data, self.val_data = data, val_data
        self.world, self.enabled = world, world.rank == 0
        self.lock, self.progress = RunLock(directory), Progress()
        self.max_steps = run_length(config, data)
        self.tokens_per_step = config.train.global_batch_size * data.seq_len
        flops = flops_per_token(config.model, inputs.vocab_size, config.data.seq_len)
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

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error:
                if self.saver and isinstance(error, AgreedError):  # all ranks are here
                    self.saver.finish()
                if self.lock.is_ours and self.directory.is_dir():
                    self._failed(error)
        finally:
            self.lock.release()
            self._close()

    def evaluation_due(self) -> bool:
        """Whether this step is to be evaluated and has not been."""
        step, interval = self.progress.step, self.config.train.eval_interval
        now = step > 0 and (step == self.max_steps or due(step, interval))
        return now and self.val_data is not None and self.progress.val_loss is None

    def evaluation_near(self) -> bool:
        """Whether one of the next two steps is to be evaluated."""
        after = (self.progress.step + 1, self.progress.step + 2)
        return self.max_steps in after or any(
            due(step, self.config.train.eval_interval) for step in after
        )

    def over(self) -> str:
        """Why the run ends at this step, or nothing."""
        step, train = self.progress.step, self.config.train
        if self.evaluation_due():
            return ""
        if step >= self.max_steps:
            return "max_steps"
        if 0 < train.patience <= self.progress.evaluations_since_best:
            return "early_stop"
        if 0 < train.stop_at_step <= step:
            return "stop_at_step"
        return ""

    def save_due(self) -> bool:
        """Whether this step is to be saved, whatever else happens at it."""
        return due(self.progress.step, self.config.checkpoint.interval)

    def start(self) -> None:
        """Opens the files, cut to what the resumed checkpoint knows, and starts the clocks."""
        step, rows = self.progress.step, self.progress.rows
        evaluated = self.progress.val_loss is not None
        self.saved = self.progress.position
        self.origin = self.world.once(self._provenance)
        self.started = time.monotonic() - 3600 * self.progress.hours
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
            if self.config.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                for kind, first in (("train", step + 1), ("val", step + evaluated)):
                    folder = str(self.directory / "tensorboard" / kind)
                    self.boards[kind] = SummaryWriter(folder, purge_step=first)
            if self.config.log.wandb:
                self._track()

    def describe(self, model: nn.Module, batches: Batches, checkpoint: Checkpoint | None) -> None:
        """Says what is about to run, and what of it the user may not expect."""
        config, data, val_data, world = self.config, self.data, self.val_data, self.world
        batch_size = config.train.global_batch_size
        micro_batches, size = batches.shape
        on_gpu = world.device.type == "cuda"
        self.say(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters,"
            f" {config.parallel.strategy} on {world.size} × {world.device.type},"
            f" compute in {str(world.dtype).removeprefix('torch.')}"
            + (" with TF32 products" if world.dtype == torch.float32 and on_gpu else "")
            + (", compiled" if compiles(config.train.compile, world.device) else "")
            + (", deterministic" if config.train.deterministic else "")
            + (f", cuDNN {cudnn_version()}" if on_gpu else "")
        )
        self.say(
            f"{data.tokens:,} tokens in {data.windows:,} windows of {data.seq_len}"
            f" ({data.unused_tokens} tokens at the end unused);"
            f" {batch_size * data.seq_len:,} tokens a step in {micro_batches} micro-batches"
            f" of {size}"
        )
        if len(data.names) > 1:
            epochs = data.epochs(self.max_steps * batch_size)
            for name, part in zip(data.names, data.shares, strict=True):
                self.say(
                    f"{name}: {100 * part:.2f}% of the sequences, {epochs[name]:.2f} epochs of it"
                )
        without = [name for name in data.names if val_data and name not in val_data.names]
        if without:
            self.say(f"no validation split, so not in the validation loss: {', '.join(without)}")
        if config.data.document_mask:
            self.say("attention stays within a document")
        slots = micro_batches * size * world.size
        if fillers := slots - batch_size:
            self.say(
                f"global batch {batch_size} does not divide: {fillers} filler sequences a step"
                f" ({100 * fillers / slots:.0f}% of the work is wasted)"
            )
        if checkpoint:
            self.say(f"resuming from step {checkpoint.step}: {checkpoint.path}")

    def job_row(self, parameters: int) -> None:
        """Writes the row of the job that begins now."""
        row = self._place(self.progress.step) | {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "device": self.world.device.type,
            "parameters": parameters,
            "ranks": self.world.size,
            "max_steps": self.max_steps,
            "commit": self.origin["commit"],
            "versions": self.origin["versions"],
        }
        self.row(row, "jobs.jsonl")

    @property
    def hours(self) -> float:
        """Hours of training, added up over the jobs of the run."""
        return (time.monotonic() - self.started) / 3600

    def restart_clock(self) -> None:
        """Leaves what came before (logging, evaluation, saving) out of the throughput."""
        self.mark, self.steps = time.monotonic(), 0

    def record(self, arrived: list[Arrived[tuple[int, float]]]) -> None:
        """Takes in the steps that are known by now: rows, skipped steps, what ranks agreed on.

        Raises:
            AgreedError: a rank has failed, or too many steps in a row were skipped.
        """
        for (step, lr), values, done_at in arrived:
            loss, *votes, skip, grad_norm = values
            outcome = Outcome(loss, skip, grad_norm)
            self.steps += 1
            self.done_at = done_at
            self.bar.update()
            if step == self.max_steps or due(step, self.config.train.log_interval):
                self._training_row(step, lr, outcome)
            self._note_skipped(step, outcome)
            self.agreed.hear(votes)

    def save(self, norm_ema: Tensor) -> None:
        """Saves a checkpoint of this step, or adds its validation loss to one that is there.

        Raises:
            AgreedError: it could not be written, or the run belongs to another job.
        """
        progress, step = self.progress, self.progress.step
        progress.hours, progress.rows, progress.norms = self.hours, {**self.rows}, norm_ema.tolist()
        progress.save_seconds = max(progress.save_seconds, self.saver.seconds)
        self._sync()
        with self.agreed.conditions.timed("save"):
            if step == self.saved[0]:
                self.saver.amend(step, asdict(progress))
            else:
                self.saver.save(step, {**self.origin, "state": asdict(progress)})
        self.check.remember()
        self.saved, self.agreed.save_due = progress.position, False
        self.world.once(lambda: self.status("running", None, step))
        self.restart_clock()

    def _training_row(self, step: int, lr: float, outcome: Outcome) -> None:
        """Writes and prints the row of a training step."""
        loss, grad_norm, elapsed = outcome.loss, outcome.grad_norm, self.done_at - self.mark
        row = self._place(step) | {
            "loss": finite(loss),
            "learning_rate": lr,
            "grad_norm": finite(grad_norm),
            "tokens_per_second": self.steps * self.tokens_per_step / elapsed,
        }
        if outcome.skipped:
            row["skipped"] = outcome.skipped
        if self.peak_rate:
            row["mfu"] = row["tokens_per_second"] / self.peak_rate
        row["memory_gb"] = memory_gb(self.world.device)
        self.row(row)
        self._board("train", step, row)
        self.say(
            f"step {step}/{self.max_steps} | loss {loss:.4f} | lr {lr:.2e}"
            f" | grad norm {grad_norm:.2f} | {row['tokens_per_second']:,.0f} tok/s"
            + (f" | MFU {100 * row['mfu']:.1f}%" if "mfu" in row else "")
            + f" | {row['memory_gb']:.2f} GB"
            f" | {describe_seconds(elapsed / self.steps * (self.max_steps - step))} left"
        )
        self.mark, self.steps = self.done_at, 0

    def _note_skipped(self, step: int, outcome: Outcome) -> None:
        """Counts skipped steps in a row, and writes down exactly which windows they had.

        Raises:
            NotFiniteError: there were train.max_bad_steps of them.
        """
        progress, train = self.progress, self.config.train
        if not outcome.skip:
            progress.bad_steps = 0
            return
        progress.bad_steps += outcome.skipped != "no_trained_tokens"
        windows = self.data.step_windows(train.seed, step - 1, train.global_batch_size).tolist()
        row = {
            "step": step,
            "reason": outcome.skipped,
            "loss": finite(outcome.loss),
            "grad_norm": finite(outcome.grad_norm),
            "windows": [self.data.place(window) for window in windows],
        }
        self.row(row, "bad_steps.jsonl")
        why = f"loss {outcome.loss}, gradient norm {outcome.grad_norm}"
        self.say(f"step {step} skipped ({outcome.skipped}): {why}")
        if progress.bad_steps >= train.max_bad_steps:
            raise NotFiniteError(
                step,
                f"{progress.bad_steps} steps in a row were skipped, this one for {why}; they"
                " changed nothing, and what was saved is good; lower optimizer.learning_rate or"
                " look at the data: python prepare.py"
                f" {self.directory / 'config.toml'} --bad-steps",
            )

    def record_evaluation(self, scores: dict[str, Any], samples: list[dict[str, str]]) -> bool:
        """Writes the rows of an evaluation; True if these weights are among the best to keep.

        Raises:
            NotFiniteError: the validation loss is not finite.
        """
        progress, loss = self.progress, scores["val_loss"]
        progress.val_loss = loss
        self._evaluation_row(progress.step, scores)
        for row in samples:
            self.row({"step": progress.step, **row}, "samples.jsonl")
        self.report()
        self.restart_clock()
        best = progress.best_val_losses
        is_best = not best or loss < best[0]
        progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
        kept = self.config.checkpoint.keep_best
        progress.best_val_losses = sorted([*best, loss])[: max(1, kept)]
        return kept > 0 and loss in progress.best_val_losses

    def _evaluation_row(self, step: int, scores: dict[str, Any]) -> None:
        """Writes and prints the row of an evaluation."""
        self.row(self._place(step) | scores)
        self._board("val", step, scores)
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
        return {"step": step, "tokens": step * self.tokens_per_step, "hours": self.hours}

    def row(self, row: dict[str, Any], file: str = "metrics.jsonl") -> None:
        """Appends a row to one of the run's files."""
        if self.enabled:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            self._guarded(lambda: self.files[file].write(line.encode()))
            self.rows[file] += 1

    def _board(self, kind: str, step: int, row: dict[str, Any]) -> None:
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

    def _provenance(self) -> dict[str, Any]:
        """What a checkpoint records of where it comes from."""
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        if self.world.device.type == "cuda":
            versions |= {"cuda": torch.version.cuda, "cudnn": cudnn_version()}
        commit = ""
        if shutil.which("git"):
            git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
            commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        return {
            "config": tables(self.config),
            "dataset": self.inputs.fingerprint,
            "template": self.inputs.template,
            "tokenizer_sha256": self.inputs.tokenizer_sha256,
            "vocab_size": self.inputs.vocab_size,
            "versions": versions,
            "commit": commit or None,
        }

    def report(self) -> None:
        """Has report.html written by a process of low priority beside training, one at a time."""
        if self.files and self.config.log.report:
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

    def _sync(self) -> None:
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

    def _failed(self, error: BaseException) -> None:
        """Records a failure; where even that fails, says so and leaves the first error in view."""
        step = self.progress.step if self.saver else attempts.newest_step(self.directory)
        try:
            self.status("failed", *explain_failure(error, step, self.failed_before))
        except UserError as why:
            tell(f"no status.json: {why}")
        self.report()

    def end(self, reason: str, advanced: bool) -> None:
        """Records and says that the run ended in order; advanced: it got further than it was."""
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
        self.status(told.split()[0], shown, self.progress.step, requeue, told)
        self.report()
        self.say(f"{told} at step {self.progress.step}: {self.directory}")

    def _close(self) -> None:
        """Closes the files and the progress bar."""
        self.bar.close()
        for file in (*self.files.values(), *self.boards.values()):
            file.close()
        if self.tracker:
            self.tracker.stdin.close()
            self.tracker.wait()


def run_length(config: Config, data: Mixture) -> int:
    """Optimizer steps of the run, from train.max_steps or train.epochs.

    An epoch of a mixture is as many windows as all its datasets have together.
    """
    if config.train.max_steps:
        return config.train.max_steps
    if config.train.epochs:
        return math.ceil(config.train.epochs * data.windows / config.train.global_batch_size)
    raise ConfigError("how long to train is not set: give train.max_steps or train.epochs")


def due(step: int, interval: int) -> bool:
    """Whether something that happens every interval steps happens now; never if interval is 0."""
    return interval > 0 and step % interval == 0


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


def explain_failure(
    error: BaseException, step: int, before: tuple[int, str] | None
) -> tuple[str, int, bool, str]:
    """Of a failure, for status.json: reason, step, whether another try may succeed, and why.

    A lost rank or a sick node may always pass. What fails alike at the same step again does not.

    Args:
        before: step and reason of the failure of the job before this one.
    """
    lost = explain_lost_rank(error)
    why = str(lost or error).partition("\n")[0] or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "signal", step, False, why
    if lost or getattr(error, "code", None) in (LOST_RANK, SICK_NODE):
        return "error", step, True, why
    if isinstance(error, NotFiniteError):
        return "non_finite", error.step, before != (error.step, why), why
    return "error", step, not isinstance(error, UserError) and before != (step, why), why
