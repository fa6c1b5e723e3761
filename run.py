"""What a job writes and prints about the run that it trains: rows of metrics, status.json, console.

Only rank 0 writes. Rows are durable before the checkpoint of their step. Resuming removes the rows
after the checkpoint that it resumes from, so each step is in the files once.
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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import Checkpoint, Saver, checkpoint_paths, find_resumable, remove_leftovers
from config import (
    LOST_RANK,
    PEAK_FLOPS,
    ROOT,
    SICK_NODE,
    Config,
    ConfigError,
    UserError,
    dump_toml,
    print_error,
    read_json,
    resolve_path,
    tables,
    write_atomically,
)
from dataset import Batches, DataCheck, Mixture, next_positions
from distributed import AgreedError, Arrived, World, compiles, cudnn_version, explain_lost_rank
from job import Consensus, RunLock, Signals, StopConditions
from model import flops_per_token, parameter_count
from preflight import CODE, InitialWeights, Inputs, check_branch, code_files, writing
from slurm import attempts

REPORT_SECONDS = 300.0  # limit for tools/report.py; it reads a million rows in 11 s
ENDS = {  # reasons to end a job in order, and what status.json and the console say
    "max_steps": "finished",
    "early_stop": "finished early, no new best",
    "stop_at_step": "stopped as asked",
    "stop_file": "stopped by the STOP file",
    "signal": "stopped by a signal",
    "deadline": "stopped before the job's time is over",
}


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
    """Copies Rocket's Python files into the run: edits don't change what a requeued job runs."""
    code, fresh, old = (directory / name for name in ("code", "code.tmp", "code.old.tmp"))
    now, then = (
        {name: path.read_bytes() for name, path in code_files(folder).items()}
        for folder in (CODE, code)
    )
    if now == then:
        return
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    for name, content in now.items():
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        (fresh / name).write_bytes(content)
    if code.exists():
        code.rename(old)
    fresh.rename(code)
    shutil.rmtree(old, ignore_errors=True)


@dataclass
class Progress:
    """The state of a run beside weights and optimizer; a checkpoint's manifest holds it."""

    step: int = 0
    hours: float = 0.0
    best_val_losses: list[float] = field(default_factory=list)  # ascending, see record_evaluation
    evaluations_since_best: int = 0
    val_loss: float | None = None  # of this very step, if it was evaluated
    bad_steps: int = 0  # skipped steps in a row, up to this one
    norms: list[float] = field(default_factory=lambda: [0.0, 0.0])  # norm_ema of rocket.should_skip
    save_seconds: float = 0.0  # duration of the longest save so far
    rows: dict[str, int] = field(default_factory=dict)  # number of rows by file
    offsets: list[int] = field(default_factory=list)  # of the data, if a branch has changed them

    @property
    def position(self) -> tuple[int, float | None]:
        """What a checkpoint of this state is named and ranked by."""
        return self.step, self.val_loss


class NotFiniteError(AgreedError):
    """Too many steps in a row were skipped, or the validation loss is not finite."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"step {step}: {message}")
        self.step = step


class Run:
    """A run: its progress, and what is written and printed about it, by rank 0 alone.

    As a context manager it records a failure in status.json, and releases the run at the end.

    Attributes:
        saved: position of the newest checkpoint, None for a branch without; from resume() on.
        parent: the checkpoint of another run from which this job branches, if it does.
        changed: what the branch changes, in lines.
        saver: saves checkpoints. It and the next two exist from start() on.
        agreed: what all ranks have agreed on: to stop, to save.
        check: compares the bytes of the dataset with its digests.
    """

    FILES = ("metrics.jsonl", "samples.jsonl", "bad_steps.jsonl", "jobs.jsonl")
    saver: Saver | None = None
    parent: Checkpoint | None = None
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
        self.changed: list[str] = []
        self.max_steps = run_length(config, data)
        self.tokens_per_step = config.train.global_batch_size * data.seq_len
        self.parameters = parameter_count(config.model, inputs.vocab_size)
        flops = flops_per_token(config.model, inputs.vocab_size, config.data.seq_len)
        peak = device_peak(world.device)
        self.peak_rate = peak * world.size / flops if peak else None  # tokens/s at 100% MFU
        self.files: dict[str, BinaryIO] = {}
        self.boards: dict[str, Any] = {}  # TensorBoard's writers, for training and evaluation
        self.tracker: subprocess.Popen | None = None  # hands the rows to Weights & Biases
        self.reporter = ThreadPoolExecutor(1, "report")  # Python waits for its last report at exit
        self.next_report: Future[None] = Future()
        self.bar = tqdm(disable=True)
        known = read_json(directory / "status.json") if self.enabled else None
        self.status_before = known or {}  # of the job before this one

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error:
                if self.saver and isinstance(error, AgreedError):  # all ranks are here
                    self.saver.finish()
                if self.lock.is_ours and self.directory.is_dir():
                    self._failed(error)
        finally:
            self.lock.release()
            self.bar.close()
            for file in (*self.files.values(), *self.boards.values()):
                file.close()
            if self.tracker:
                self.tracker.stdin.close()
                self.tracker.wait()

    # ---- what is due at this step

    def evaluation_due(self) -> bool:
        """Whether this step has to be evaluated and has not been."""
        progress = self.progress
        pending = self.val_data is not None and progress.val_loss is None
        return pending and progress.step > 0 and self._is_evaluated(progress.step)

    def evaluation_near(self) -> bool:
        """Whether one of the next two steps has to be evaluated."""
        return any(self._is_evaluated(self.progress.step + ahead) for ahead in (1, 2))

    def _is_evaluated(self, step: int) -> bool:
        return step == self.max_steps or due(step, self.config.train.eval_interval)

    def over(self) -> str:
        """Why the run ends at this step; empty if it goes on."""
        step, train = self.progress.step, self.config.train
        if self.evaluation_due():
            return ""
        if step >= self.max_steps:
            return "max_steps"
        if 0 < train.patience <= self.progress.evaluations_since_best:
            return "early_stop"
        return "stop_at_step" if 0 < train.stop_at_step <= step else ""

    def save_due(self) -> bool:
        """Whether checkpoint.interval asks for a checkpoint of this step. A branch saves at once,
        because its parent may remove the one that it comes from."""
        return not self.saved or due(self.progress.step, self.config.checkpoint.interval)

    # ---- start

    def resume(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; the run takes over its progress. For a new run it is
        that of train.branch_from, or None.

        Raises:
            AgreedError: another job trains the run, there are checkpoints but none verifies, or the
                branch can't be trained.
        """
        self.world.once(self.lock.check)
        self.seen = self.world.once(lambda: checkpoint_paths(self.directory))
        checkpoint = find_resumable(self.directory, self.world)
        if checkpoint:
            self.progress = Progress(**checkpoint.state)
        elif self.config.train.branch_from:
            checkpoint = self.parent = self._branch()
        if self.progress.offsets:
            self.data.offsets = self.progress.offsets
        self.resumed_at = self.progress.position
        self.saved = None if self.parent else self.resumed_at
        return checkpoint

    def _branch(self) -> Checkpoint:
        """The checkpoint that train.branch_from names; the run takes over its progress. If the data
        change, it forgets validation losses, because they can't be compared."""
        config, once = self.config, self.world.once
        path = once(lambda: resolve_path(config.train.branch_from).resolve())
        parent = find_resumable(path, self.world)
        if not parent:
            raise AgreedError(f"train.branch_from: {path}: no run or checkpoint")
        self.changed = once(lambda: check_branch(parent, config, self.inputs))
        self.progress = progress = Progress(**parent.state)
        known, other = parent.config.data, parent.manifest["dataset"] != self.inputs.fingerprint
        if other:
            slots = progress.step * config.train.global_batch_size
            before = once(lambda: next_positions(known, slots, progress.offsets))
            now = next_positions(config.data, slots, [])
            progress.offsets = [before.get(path, 0) - position for path, position in now.items()]
        if other or known.document_mask != config.data.document_mask:
            progress.best_val_losses, progress.evaluations_since_best = [], 0
            progress.val_loss, progress.rows = None, {}
        if ends := "max_steps" if progress.step >= self.max_steps else self.over():
            key = {"max_steps": "max_steps or epochs", "early_stop": "patience"}.get(ends, ends)
            raise AgreedError(
                f"train.branch_from: at step {progress.step} of {parent.path} this branch would be"
                f" {ENDS[ends]}: raise train.{key}; steps count from the parent's first"
            )
        return parent

    def open(self) -> None:
        """On rank 0: locks the run, removes leftovers, counts the attempt, writes status.json.

        Raises:
            UserError: another job trains the run, or has trained it since resume(), or the run
                directory can't be written.
        """
        with writing(self.directory, "set train.out_dir"):
            self.lock.take()
            if checkpoint_paths(self.directory) != self.seen:
                raise UserError(
                    f"{self.directory}: another job has just trained this run; start again"
                )
            remove_leftovers(self.directory)
            (self.directory / "logs").mkdir(exist_ok=True)
            by_hand = f"{socket.gethostname()} {os.getpid()} {time.time()}"
            attempt = os.environ.get(attempts.ATTEMPT, by_hand)
            attempts.count(self.directory, attempt, self.config.train.max_attempts)
        self.status("running", None, self.progress.step)
        if not self.inputs.model_changed:  # else rocket.py does it, after check_model
            self.record_start()

    def record_start(self) -> None:
        """Writes code, configuration and tokenizer with which the run goes on; on rank 0."""
        with writing(self.directory, "set train.out_dir"):
            snapshot_code(self.directory)
            write_atomically(self.directory / "config.toml", dump_toml(self.config).encode())
            tokenizer = resolve_path(self.config.tokenizer.path).read_bytes()
            write_atomically(self.directory / "tokenizer.model", tokenizer)
            attempts.note_opened(self.directory)

    def start(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, signals: Signals, end: float
    ) -> None:
        """Opens the files, starts the clocks, and sets up saving and stopping.

        Args:
            end: when this job must be over, in Unix time.
        """
        config, world = self.config, self.world
        self.origin = world.once(self._provenance)
        self.started = time.monotonic() - 3600 * self.progress.hours
        self.restart_clock()
        world.once(self._open_files)
        self.saver = Saver(
            self.directory, model, optimizer, config.checkpoint, self.lock.verify, world
        )
        self.check = DataCheck(self.inputs.manifests, config.data.verify, world)
        size = 12 * self.parameters  # bytes of a checkpoint: weights and two moments in float32
        save_seconds = self.progress.save_seconds or 1 + max(size / world.size / 100e6, size / 2e9)
        minutes = config.checkpoint.interval_minutes
        conditions = StopConditions(
            self.directory, signals, self.lock, self.saver, end, save_seconds, minutes, self.check
        )
        self.agreed = Consensus(conditions, world)

    def _open_files(self) -> None:
        """Opens the files of rows, cut to the resumed step; starts bar, TensorBoard and W&B."""
        step, rows = self.progress.step, self.progress.rows
        evaluated = self.progress.val_loss is not None
        for name in self.FILES:
            path, saved = self.directory / name, rows.get(name, 0)
            if self.parent:
                copy_rows(self.parent, path)
            # the row of a job stays, even if its steps are lost
            last = math.inf if name == "jobs.jsonl" else step
            rows[name] = cut_rows(path, last, evaluated)
            if missing := max(0, saved - rows[name]):
                self.say(
                    f"{path}: {missing} of the {saved} rows up to step {step} are missing; the file"
                    " was changed or deleted after that step was saved"
                )
            self.files[name] = open(path, "ab", buffering=0)  # noqa: SIM115
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.max_steps, initial=step, unit="step")
        if self.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            for kind, first in (("train", step + 1), ("val", step + evaluated)):
                folder = str(self.directory / "tensorboard" / kind)
                self.boards[kind] = SummaryWriter(folder, purge_step=first)
        if self.config.log.wandb:
            # A process of its own can't delay or end training. It ends when its standard input is
            # closed, at the latest when training ends. Training's signals must not reach it.
            options = {"stdin": subprocess.PIPE, "start_new_session": True}
            try:
                self.tracker = subprocess.Popen([*self._tool("track.py"), "--follow"], **options)
            except OSError as error:
                self.say(f"no W&B run: {error}")

    def _provenance(self) -> dict[str, Any]:
        """What a checkpoint records of its origin: configuration, data, versions and commit."""
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

    def describe(
        self, batches: Batches, checkpoint: Checkpoint | None, initial: InitialWeights | None
    ) -> None:
        """Prints what is about to run, and what of it the user may not expect."""
        config, data, val_data, world = self.config, self.data, self.val_data, self.world
        batch_size, on_gpu = config.train.global_batch_size, world.device.type == "cuda"
        micro_batches, size = batches.shape
        self.say(
            f"{self.parameters / 1e6:.1f}M parameters,"
            f" {config.parallel.strategy} on {world.size} × {world.device.type},"
            f" compute in {str(world.dtype).removeprefix('torch.')}"
            + (" with TF32 matrix products" if world.dtype == torch.float32 and on_gpu else "")
            + (", compiled" if compiles(config.train.compile, world.device) else "")
            + (", deterministic" if config.train.deterministic else "")
            + (f", cuDNN {cudnn_version()}" if on_gpu else "")
        )
        self.say(
            f"{data.tokens:,} tokens in {data.windows:,} windows of {data.seq_len}"
            f" ({data.unused_tokens} tokens at the end unused); {self.tokens_per_step:,} tokens per"
            f" step, {micro_batches} micro-batches of {size} sequences per process"
        )
        if len(data.names) > 1:
            epochs = data.epochs(self.max_steps * batch_size)
            for name, share in zip(data.names, data.shares, strict=True):
                self.say(f"{name}: {share:.2%} of the sequences, {epochs[name]:.2f} epochs of it")
        without = [name for name in data.names if val_data and name not in val_data.names]
        if without:
            self.say(f"no validation split, so not in the validation loss: {', '.join(without)}")
        if config.data.document_mask:
            self.say("attention stays within a document")
        slots = micro_batches * size * world.size
        if fillers := slots - batch_size:
            self.say(
                f"global batch {batch_size} does not divide evenly: {fillers} filler sequences per"
                f" step ({fillers / slots:.0%} of the work) don't count"
            )
        if checkpoint:
            how = "branching" if self.parent else "resuming"
            self.say(f"{how} from step {checkpoint.step}: {checkpoint.path}")
        for change in self.changed:
            self.say(f"changed: {change}")
        if initial:
            self.say(f"weights of step {initial.checkpoint.step} from {initial.checkpoint.path}")
        if initial and initial.known and (new := self.inputs.vocab_size - initial.known):
            self.say(f"{new} new tokens start from the mean of the old embeddings")

    # ---- steps, evaluations, checkpoints

    @property
    def hours(self) -> float:
        """Hours of training, added up over the jobs of the run."""
        return (time.monotonic() - self.started) / 3600

    def restart_clock(self) -> None:
        """Measures throughput from now on, so that evaluation and saving don't count."""
        self.mark, self.steps = time.monotonic(), 0

    def record(self, arrived: list[Arrived]) -> None:
        """Handles the numbers of steps: writes rows, counts skipped steps, hands on the votes.

        Raises:
            AgreedError: a rank has failed, or too many steps in a row were skipped.
        """
        for (step, lr), (loss, *votes, skip, grad_norm), done_at in arrived:
            skipped = skip_reason(loss, grad_norm) if skip else ""
            self.steps += 1
            self.bar.update()
            if step == self.max_steps or due(step, self.config.train.log_interval):
                self._record_step(step, lr, loss, grad_norm, skipped, done_at)
            if skipped:
                self._record_skipped(step, loss, grad_norm, skipped)
            else:
                self.progress.bad_steps = 0
            self.agreed.hear(votes)

    def _record_step(
        self, step: int, lr: float, loss: float, grad_norm: float, skipped: str, done_at: float
    ) -> None:
        """Writes and prints the row of a training step."""
        elapsed = done_at - self.mark
        rate = self.steps * self.tokens_per_step / elapsed
        left = describe_seconds(elapsed / self.steps * (self.max_steps - step))
        self.mark, self.steps = done_at, 0
        row = self._place(step) | {
            "loss": finite(loss),
            "learning_rate": lr,
            "grad_norm": finite(grad_norm),
            "tokens_per_second": rate,
        }
        mfu = ""
        if skipped:
            row["skipped"] = skipped
        if self.peak_rate:
            row["mfu"] = rate / self.peak_rate
            mfu = f" | MFU {row['mfu']:.1%}"
        row["memory_gb"] = memory_gb(self.world.device)
        self.row(row)
        self._board("train", step, row)
        self.say(
            f"step {step}/{self.max_steps} | loss {loss:.4f} | lr {lr:.2e}"
            f" | grad norm {grad_norm:.2f} | {rate:,.0f} tok/s{mfu}"
            f" | {row['memory_gb']:.2f} GB | {left} left"
        )

    def _record_skipped(self, step: int, loss: float, grad_norm: float, reason: str) -> None:
        """Counts a skipped step, and records which windows it had.

        Raises:
            NotFiniteError: train.max_bad_steps were skipped in a row.
        """
        progress, train = self.progress, self.config.train
        progress.bad_steps += reason != "no_trained_tokens"
        windows = self.data.step_windows(train.seed, step - 1, train.global_batch_size).tolist()
        row = {
            "step": step,
            "reason": reason,
            "loss": finite(loss),
            "grad_norm": finite(grad_norm),
            "windows": [self.data.locate(window) for window in windows],
        }
        self.row(row, "bad_steps.jsonl")
        why = f"loss {loss}, gradient norm {grad_norm}"
        self.say(f"step {step} skipped ({reason}): {why}")
        if progress.bad_steps >= train.max_bad_steps:
            raise NotFiniteError(
                step,
                f"{progress.bad_steps} steps in a row were skipped, this one for {why}; they"
                " changed nothing, and what was saved is good; lower optimizer.learning_rate or"
                " look at the data: python prepare.py"
                f" {self.directory / 'config.toml'} --bad-steps",
            )

    def record_evaluation(self, scores: dict[str, Any], samples: list[dict[str, str]]) -> bool:
        """Writes and prints an evaluation; True if these weights are among the best to keep."""
        progress, loss, kept = self.progress, scores["val_loss"], self.config.checkpoint.keep_best
        self.row(self._place(progress.step) | scores)
        self._board("val", progress.step, scores)
        self.say(
            f"step {progress.step}/{self.max_steps} | val loss {loss:.4f}"
            f" | perplexity {scores['val_perplexity']:.2f}"
            f" | {scores['val_bits_per_byte']:.4f} bits/byte"
        )
        if len(losses := scores.get("val_losses", {})) > 1:  # of a mixture
            names = [Path(name).name for name in losses]
            names = names if len({*names}) == len(names) else [*losses]
            parts = (f"{n} {loss:.4f}" for n, loss in zip(names, losses.values(), strict=True))
            self.say(f"  val loss of each dataset: {', '.join(parts)}")
        for sample in samples:
            self.row({"step": progress.step, **sample}, "samples.jsonl")
        self.report()
        best = progress.best_val_losses
        is_best = not best or loss < best[0]
        progress.val_loss = loss
        progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
        progress.best_val_losses = sorted([*best, loss])[: max(1, kept)]
        self.restart_clock()
        return kept > 0 and loss in progress.best_val_losses

    def save(self, norm_ema: Tensor) -> None:
        """Saves a checkpoint of this step, or adds its validation loss to the one that exists.

        Raises:
            AgreedError: it could not be written, or the run belongs to another job.
        """
        progress, step = self.progress, self.progress.step
        progress.hours, progress.norms = self.hours, norm_ema.tolist()
        progress.save_seconds = max(progress.save_seconds, self.saver.seconds)
        with writing(self.directory):  # rows first: they are durable before their checkpoint
            for file in self.files.values():
                os.fsync(file.fileno())
            for board in self.boards.values():
                board.flush()
        with self.agreed.conditions.timed("save"):
            if self.saved and step == self.saved[0]:
                self.saver.amend(step, asdict(progress))
            else:
                self.saver.save(step, {**self.origin, "state": asdict(progress)})
        self.check.remember()
        self.saved, self.agreed.save_due = progress.position, False
        self.world.once(lambda: self.status("running", None, step))
        self.restart_clock()

    # ---- rows, console, report

    def job_row(self) -> None:
        """Writes the row of the job that begins now."""
        row = self._place(self.progress.step) | {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "device": self.world.device.type,
            "parameters": self.parameters,
            "ranks": self.world.size,
            "max_steps": self.max_steps,
            "commit": self.origin["commit"],
            "versions": self.origin["versions"],
        }
        if self.parent:
            row |= {"branched_from": str(self.parent.path), "changed": self.changed}
        self.row(row, "jobs.jsonl")

    def _place(self, step: int) -> dict[str, Any]:
        return {"step": step, "tokens": step * self.tokens_per_step, "hours": self.hours}

    def row(self, row: dict[str, Any], file: str = "metrics.jsonl") -> None:
        """Appends a row to one of the run's files."""
        if self.enabled:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            with writing(self.directory):
                self.files[file].write(line.encode())
            self.progress.rows[file] += 1

    def _board(self, kind: str, step: int, row: dict[str, Any]) -> None:
        """Writes a row's numbers for TensorBoard, with log.tensorboard."""
        if kind in self.boards:
            numbers = {name: value for name, value in row.items() if isinstance(value, float)}
            for name, value in numbers.items():
                self.boards[kind].add_scalar(name.removeprefix("val_"), value, step)

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def report(self) -> None:
        """Writes report.html in a low-priority process beside training, one at a time."""
        if self.files and self.config.log.report:
            self.next_report.cancel()  # if it still waits for the one before
            self.next_report = self.reporter.submit(self._report)

    def _report(self) -> None:
        options = {"capture_output": True, "text": True, "timeout": REPORT_SECONDS}
        command = ["nice", *self._tool("report.py")]
        try:  # in a session of its own: Ctrl-C at the terminal is meant for training
            subprocess.run(command, check=True, start_new_session=True, **options)
        except subprocess.CalledProcessError as error:
            self.say(f"no report.html: {error.stderr.strip().rpartition(chr(10))[2] or error}")
        except (OSError, subprocess.TimeoutExpired) as error:
            self.say(f"no report.html: {error}")

    def _tool(self, name: str) -> list[str]:
        """The command that runs a tool on this run."""
        return [sys.executable, str(CODE / "tools" / name), str(self.directory)]

    # ---- status.json

    def status(
        self, state: str, reason: str | None, step: int, requeue: bool = False, why: str = ""
    ) -> None:
        """Writes status.json, which scripts read, because torchrun turns every failure into 1.

        Args:
            state: running, finished, stopped or failed.
            reason: why it ended: deadline, signal, stop_file, stop_at_step, early_stop, non_finite
                or error; else None.
            requeue: whether the same job should come back; false after train.max_attempts.
            why: the reason in words.
        """
        if not self.enabled:
            return
        if requeue and (too_many := attempts.exhausted(self.directory)):
            requeue, why = False, f"{too_many}; the last one: {why or reason}"
            self.say(f"the job does not come back: {too_many}")
        status = {"state": state, "reason": reason, "step": step, "requeue": requeue}
        status |= {"why": why, "attempt": os.environ.get(attempts.ATTEMPT)}
        with writing(self.directory):
            attempts.write_status(self.directory, status)

    def _failed(self, error: BaseException) -> None:
        """Records a failure. If that fails too, prints why; the first error is still raised."""
        step = self.progress.step if self.saver else attempts.newest_step(self.directory)
        try:
            self.status("failed", *explain_failure(error, step, self.status_before))
        except UserError as why:
            print_error(f"no status.json: {why}")
        self.report()

    def end(self, reason: str) -> None:
        """Waits for the last save, and records and prints why the run, or this job, is over."""
        if self.saver:  # else there was nothing to train
            self.saver.wait()
            self.check.remember()
            self.world.once(lambda: self.agreed.conditions.stop_file.unlink(missing_ok=True))
        why = ENDS[reason]
        if reason == "deadline" and self.progress.position == self.resumed_at:
            why += " (too short for any progress: give it more)"
        requeue = reason in ("signal", "deadline")
        shown = None if reason == "max_steps" else reason
        self.status(why.split()[0], shown, self.progress.step, requeue, why)
        self.report()
        self.say(f"{why} at step {self.progress.step}: {self.directory}")


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
    """Whether something that is done every interval steps is due at this one; never for 0."""
    return interval > 0 and step % interval == 0


def skip_reason(loss: float, grad_norm: float) -> str:
    """Why a step with this loss and gradient norm was skipped."""
    if loss == grad_norm == 0:  # no spike is that low
        return "no_trained_tokens"
    return "spike" if math.isfinite(loss + grad_norm) else "non_finite"


def finite(number: float) -> float | None:
    """The number, or None if it is infinite or NaN, which JSON can't express."""
    return number if math.isfinite(number) else None


def copy_rows(parent: Checkpoint, path: Path) -> None:
    """Replaces a file by the rows of it that the parent's run had when it saved the checkpoint."""
    source, rows = parent.path.parent.parent / path.name, [b""]
    if source.exists():
        with open(source, "rb") as file:
            rows = list(islice(file, parent.state["rows"].get(path.name, 0)))
    write_atomically(path, b"".join(rows))


def cut_rows(path: Path, step: float, evaluated: bool) -> int:
    """Removes torn rows and those after a step from a file; returns how many rows are left.

    If the checkpoint has no evaluation of the step, the step's evaluation rows go too: the job
    wrote them, but was killed before it saved the evaluation.
    """

    def belongs(line: bytes) -> bool:
        try:
            row = json.loads(line)
            return line.endswith(b"\n") and row["step"] < step + (evaluated or "loss" in row)
        except (ValueError, KeyError, TypeError):  # torn by a crash
            return False

    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        head = [len(line) for line in takewhile(belongs, file)]
        rest = [line for line in file if belongs(line)]  # behind a line that somebody has changed
        if rest:
            file.seek(0)
            write_atomically(path, file.read(sum(head)) + b"".join(rest))
        else:
            file.truncate(sum(head))
    return len(head) + len(rest)


def describe_seconds(seconds: float) -> str:
    """A duration as 45s, 3m10s or 5h02m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def explain_failure(
    error: BaseException, step: int, before: dict[str, Any]
) -> tuple[str, int, bool, str]:
    """What status.json says of a failure: reason, step, whether to try again, cause in words.

    After a lost rank or on a sick node, the job is always tried again: another try may succeed.
    After other failures it is, unless the user has to act, or the job before this one failed at the
    same step for the same reason.

    Args:
        before: status.json as the job before left it.
    """
    lost = explain_lost_rank(error)
    why = str(lost or error).partition("\n")[0] or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "signal", step, False, why
    if lost or getattr(error, "code", None) in (LOST_RANK, SICK_NODE):
        return "error", step, True, why
    not_finite = isinstance(error, NotFiniteError)
    step = error.step if not_finite else step
    repeated = [before.get(key) for key in ("state", "step", "why")] == ["failed", step, why]
    again = not repeated and (not_finite or not isinstance(error, UserError))
    return "non_finite" if not_finite else "error", step, again, why
