"""The job that trains a run: its signals, its time limit, its lock on the run directory, and how
all ranks agree to stop or save at the same step.

Only rank 0 reads clocks and shared files. The other ranks learn from its votes what it has found.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint import Saver
from config import UserError, print_error, read_json, write_atomically
from dataset import DataCheck
from distributed import AgreedError, World, fetch
from slurm.attempts import ATTEMPT, EXPIRY_SECONDS, holder_lives, process_start, signal_note

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
INSIST_SECONDS = (0.5, 5.0)  # a second Ctrl-C within this time counts; an earlier one is an echo
HEARTBEAT_SECONDS = 30.0
OWN_SECONDS = 60.0  # in which a process of this job's previous attempt dies
STUCK_SECONDS = 15.0  # torchrun kills ranks 30 s after TERM, unless set otherwise


class Signals:
    """Records signals, which would end the process, so that all ranks can stop in good order."""

    def __init__(self) -> None:
        self.received = False
        self.terminated_at = math.inf  # when TERM came first, by time.monotonic()
        self._interrupted = -INSIST_SECONDS[1]

    def install(self) -> None:
        """Handles the signals of schedulers, launchers and people. Those that are ignored stay so:
        under nohup, a run survives its terminal."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received, now = True, time.monotonic()
        if number == signal.SIGTERM:
            self.terminated_at = min(self.terminated_at, now)
        # torchrun turns the second Ctrl-C into TERM
        since = now - self._interrupted
        if number in (signal.SIGINT, signal.SIGTERM) and INSIST_SECONDS[0] < since:
            if since < INSIST_SECONDS[1]:
                raise KeyboardInterrupt
            if number == signal.SIGINT:
                self._interrupted = now


def job_end(max_hours: float) -> float:
    """When this job must be over, in Unix time: by Slurm or train.max_hours; else infinity."""
    end = time.time() + 3600 * max_hours if max_hours else math.inf
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return end
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # SLURM_JOB_ID may mean the whole array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    limit = os.environ.get("SLURM_JOB_END_TIME", "")
    if not limit:  # older than Slurm 23.02
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
        environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # warned of below
            done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
            limit = done.stdout.decode().strip()
    if limit.isdigit():
        return min(end, float(limit))
    if not limit:
        print_error(f"Slurm does not say when job {job} ends: set train.max_hours")
    return end  # N/A in a partition without a limit


class Votes(NamedTuple):
    """What a rank asks for; also the sums over all ranks, since all do what one asks for."""

    lock_lost: float
    save_failed: float
    data_damaged: float
    stop_file: float
    signal: float
    deadline: float
    save_due: float


@dataclass
class StopConditions:
    """Why this rank would stop or save now."""

    directory: Path
    signals: Signals
    lock: RunLock
    saver: Saver
    end: float  # of the job, in Unix time
    save_seconds: float  # estimate for the first save; later ones are measured
    save_minutes: float  # between saves; 0: off
    check: DataCheck | None = None

    FILE_SECONDS = 1.0  # between looks for the STOP file and for the note of a signal

    def __post_init__(self) -> None:
        self.stop_file = self.directory / "STOP"
        self.signal_note = signal_note(self.directory, os.environ.get(ATTEMPT, ""))
        self.margin = min(30.0, 0.05 * (self.end - time.time()))
        self.seconds = {"step": 0.0, "evaluation": 0.0, "save": self.save_seconds}
        self.saved_at = self.stepped_at = time.monotonic()
        self.looked_at, self.stop_file_seen = -self.FILE_SECONDS, False

    def step_done(self) -> None:
        """Marks the end of a step. The estimate of a step's time rises at once and falls slowly."""
        now = time.monotonic()
        last, mean = now - self.stepped_at, self.seconds["step"]
        self.seconds["step"] = max(last, mean + 0.1 * (last - mean))
        self.stepped_at = now

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Measures an "evaluation" or a "save"; the longest so far is the estimate of the next."""
        start = time.monotonic()
        yield
        self.stepped_at = time.monotonic()
        self.seconds[what] = max(self.seconds[what], self.stepped_at - start)
        if what == "save":
            self.saved_at = self.stepped_at

    def while_waiting(self, since: float) -> None:
        """DistError if the device has not answered for far too long since TERM came.

        If a rank dies under NCCL, the devices of the others wait for it, and torchrun sends TERM.
        Any other wait is ended by parallel.timeout_seconds. Nothing limits the first step, because
        its duration is not known yet. The host has waited since this time.monotonic().
        """
        step = self.seconds["step"]
        waited = time.monotonic() - max(since, self.signals.terminated_at)
        if step and waited > STUCK_SECONDS + 3 * step:
            raise dist.DistError(f"{waited:.0f} s after TERM the device has not answered")

    def votes(self, rank: int, steps: int, evaluation: bool) -> Votes:
        """This rank's votes. It votes for the deadline if too little time is left for this many
        steps, an evaluation, if one is due by then, and a save."""
        now = time.monotonic()
        late = save_due = False
        if rank == 0:  # one clock, and one process that asks the file system
            if now - self.looked_at >= self.FILE_SECONDS:
                self.looked_at, self.stop_file_seen = now, self.stop_file.exists()
                self.signals.received |= self.signal_note.exists()
            save = 1.5 * max(self.seconds["save"], self.saver.seconds)
            needed = save + self.saver.busy * save + self.margin + steps * self.seconds["step"]
            needed += evaluation * self.seconds["evaluation"]
            late = self.end - time.time() < needed
            save_due = 0 < 60 * self.save_minutes <= now - self.saved_at
        return Votes(
            lock_lost=self.lock.lost,
            save_failed=self.saver.failed,
            data_damaged=bool(self.check and self.check.wrong),
            stop_file=self.stop_file_seen,
            signal=self.signals.received,
            deadline=late,
            save_due=save_due,
        )


class Consensus:
    """What all ranks have agreed on. Their votes are summed together with each step's numbers."""

    def __init__(self, conditions: StopConditions, world: World) -> None:
        self.conditions, self.world = conditions, world
        self.stop = ""  # why to stop, if a rank has asked for it
        self.save_due = False  # whether a rank has asked for a checkpoint

    def votes(self, steps: int = 0, evaluation: bool = False) -> Tensor:
        """This rank's votes (7,), on the device, as StopConditions.votes casts them."""
        votes = self.conditions.votes(self.world.rank, steps, evaluation)
        if not any(votes):  # nearly always, and then nothing has to be copied to the device
            return torch.zeros(len(votes), device=self.world.device)
        return torch.tensor(votes, dtype=torch.float32, device=self.world.device)

    def reason(self, sums: list[float]) -> str:
        """Why to stop by these sums of votes; empty if not. AgreedError, on every rank, if the run
        belongs to another job, a save failed or a dataset is damaged."""
        votes, conditions = Votes(*sums), self.conditions
        if votes.lock_lost:
            run = conditions.directory
            raise AgreedError(f"{run} was taken over by another job; nothing was saved")
        if votes.save_failed:
            conditions.saver.wait()
        if votes.data_damaged:
            conditions.check.raise_if_wrong()
        return next((why for why in ("stop_file", "signal", "deadline") if getattr(votes, why)), "")

    def hear(self, sums: list[float]) -> None:
        """Takes in the sums of a step's votes."""
        self.stop = self.stop or self.reason(sums)
        self.save_due = self.save_due or Votes(*sums).save_due > 0

    def ask(self) -> None:
        """Sums the votes at once, where ranks wait for each other anyway."""
        if not self.stop:
            sums = self.world.sum(self.votes(steps=2))
            self.stop = self.reason(fetch(sums, self.conditions.while_waiting))


class RunLock:
    """One job trains a run at a time: claim.json names it.

    A claim is void if its process was on this host and is dead, if it is of this same job before
    a requeue, or if its heartbeat, the file's modification time, has stopped.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "claim.json"
        self.lost = False  # another job took the run: stop without touching it
        self.mine: dict[str, Any] | None = None
        self._released = threading.Event()

    def check(self) -> None:
        """UserError if another job trains the run; writes nothing."""
        deadline, own_job = time.monotonic() + OWN_SECONDS, os.environ.get("SLURM_JOB_ID")
        while (holder := read_json(self.path)) is not None and not self._is_free(holder):
            if not own_job or holder.get("job_id") != own_job or time.monotonic() > deadline:
                raise self._refusal(holder)
            time.sleep(0.5)  # a process of this job's previous attempt is being killed

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        job = f"job {holder['job_id']}, " if holder.get("job_id") else ""
        return UserError(
            f"{self.path.parent} is being trained by {job}process {holder.get('pid')} on"
            f" {holder.get('host')}; stop that one first (touch {self.path.parent}/STOP), or set"
            " another train.out_dir"
        )

    def verify(self) -> None:
        """UserError if another job has taken the run; called before each save."""
        if not self.is_ours:
            self.lost = True
            raise UserError(f"{self.path.parent} was taken over by another job; it is left alone")

    @property
    def is_ours(self) -> bool:
        """Whether nobody else holds the run."""
        return not self.lost and read_json(self.path) in (None, self.mine)

    def take(self) -> None:
        """Claims the run and keeps up the heartbeat; UserError if another job holds the run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another job is removing it too
            judged = self.path.stat()
            self.check()
            # If several jobs rename the file, one succeeds. If what it has taken away is not the
            # void claim but a new one of another job, it puts that back and leaves.
            aside = self._beside("tmp")
            self.path.rename(aside)
            taken = aside.stat()
            if (taken.st_ino, taken.st_mtime_ns) != (judged.st_ino, judged.st_mtime_ns):
                aside.rename(self.path)
                self.check()
            aside.unlink()
        self.mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if not self._create():
            self.mine = None
            raise self._refusal(read_json(self.path) or {})
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Frees the run. If that fails, the claim is void once this process has ended."""
        self._released.set()
        try:
            if self.mine and read_json(self.path) == self.mine:
                self.path.unlink()
        except OSError as error:
            print_error(f"{self.path} stays: {error.strerror}")

    def _beside(self, kind: str) -> Path:
        """A file beside the claim that no other process uses."""
        return self.path.with_name(f"claim.{socket.gethostname()}.{os.getpid()}.{kind}")

    def _create(self) -> bool:
        """Makes the claim, complete at once; False if there is one already."""
        fresh = self._beside("new")
        # durable before it is linked, or a power failure leaves an empty claim
        write_atomically(fresh, json.dumps(self.mine).encode())
        try:
            os.link(fresh, self.path)
        except FileExistsError:
            return False
        finally:
            fresh.unlink()
        return True

    def _is_free(self, holder: dict[str, Any]) -> bool:
        if (lives := holder_lives(holder)) is not None:
            return not lives
        if holder.get("job_id") and holder["job_id"] == os.environ.get("SLURM_JOB_ID"):
            return True
        # Both times are the file server's, because the hosts' clocks may differ.
        probe = self._beside("probe")
        try:
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
            return now - self.path.stat().st_mtime > EXPIRY_SECONDS
        except FileNotFoundError:
            return True

    def _beat(self) -> None:
        status = self.path.with_name("status.json")
        while not self.lost and not self._released.wait(HEARTBEAT_SECONDS):
            try:
                holder = read_json(self.path)
                if holder == self.mine:
                    os.utime(self.path)
                    if status.exists():
                        os.utime(status)
                else:
                    self.lost = holder is not None or not self._create()
            except OSError as error:  # the file system may be back at the next beat
                print_error(f"{self.path}: no heartbeat: {error.strerror}")
