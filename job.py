"""The job that a run is in: its signals and its end, its claim on the run directory, its code.

Rank 0 alone reads clocks and shared files; the loop carries what it finds to the other ranks.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist

from attempts import EXPIRY_SECONDS, holder_lives, process_start, read_json
from checkpoint import Saver
from config import UserError, tell

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
INSIST_SECONDS = (0.5, 5.0)  # a second Ctrl-C in between is meant; an earlier one is an echo
HEARTBEAT_SECONDS = 30.0
OWN_SECONDS = 60.0  # that a process of this very job may take to die
CODE = Path(__file__).resolve().parent
DIFF_LINES = 60
STUCK_SECONDS = 15.0  # and three steps: torchrun kills 30 s after TERM, unless it is told otherwise


class Signals:
    """Signals are noted, not died of; the loop looks and ends in order on all ranks."""

    def __init__(self) -> None:
        self.received = False
        self.terminated_at = math.inf  # when TERM came first, by time.monotonic()
        self._interrupted = -INSIST_SECONDS[1]

    def install(self) -> None:
        """Takes over the signals that schedulers, launchers and people send.

        One that is ignored stays so: nohup lets a terminal go.
        """
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGTERM:
            self.terminated_at = min(self.terminated_at, time.monotonic())
        since = time.monotonic() - self._interrupted
        # torchrun turns the second Ctrl-C into TERM
        if number in (signal.SIGINT, signal.SIGTERM) and INSIST_SECONDS[0] < since:
            if since < INSIST_SECONDS[1]:
                raise KeyboardInterrupt
            if number == signal.SIGINT:
                self._interrupted = time.monotonic()


def job_end(max_hours: float) -> float:
    """When this job must be over, in Unix time: Slurm's end or train.max_hours; else infinity."""
    end = time.time() + 3600 * max_hours if max_hours else float("inf")
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return end
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # one of its tasks has the id of all
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    told = os.environ.get("SLURM_JOB_END_TIME", "")
    if not told:  # older than Slurm 23.02
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
        environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # told below
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            told = done.stdout.strip()
    if told.isdigit():
        return min(end, float(told))
    if not told:
        tell(f"Slurm does not tell when job {job} ends: set train.max_hours")
    return end  # of a partition without a limit it says N/A


class Votes(NamedTuple):
    """What a rank asks for, 0 or 1 each, or their sums: what any rank asks for, all do at once."""

    claim_lost: float
    save_failed: float
    data_damaged: float
    stop_file: float
    signal: float
    deadline: float
    save_due: float


class Lookout:
    """Why this rank would stop or save now."""

    FILE_SECONDS = 1.0  # between looks for the STOP file

    def __init__(
        self,
        directory: Path,
        signals: Signals,
        claim: Claim,
        saver: Saver,
        end: float,
        save_seconds: float,
        save_minutes: float,
        data_damaged: Callable[[], bool] = lambda: False,
    ) -> None:
        """The first save is estimated at save_seconds; the rest is measured."""
        self.data_damaged = data_damaged
        self.stop_file = directory / "STOP"
        self.signals, self.claim, self.saver, self.end = signals, claim, saver, end
        self.margin = min(30.0, 0.05 * (end - time.time()))
        self.seconds = {"step": 0.0, "evaluation": 0.0, "save": save_seconds}
        self.save_minutes = save_minutes
        self.saved_at = self.stepped_at = time.monotonic()
        self.looked_at, self.stop_file_seen = -self.FILE_SECONDS, False

    def step_done(self) -> None:
        """Marks the end of a step; the estimate follows a slower one at once, a faster slowly."""
        now = time.monotonic()
        last, mean = now - self.stepped_at, self.seconds["step"]
        self.seconds["step"] = max(last, mean + 0.1 * (last - mean))
        self.stepped_at = now

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Measures an evaluation or a save; the longest so far counts."""
        start = time.monotonic()
        yield
        self.stepped_at = time.monotonic()
        self.seconds[what] = max(self.seconds[what], self.stepped_at - start)
        if what == "save":
            self.saved_at = self.stepped_at

    def while_waiting(self, since: float) -> None:
        """DistError if, since TERM came, the device has not answered for far too long.

        So it is when a rank has died under NCCL: torchrun sends TERM to the others, whose devices
        wait for it. Steps tell how long they take; before the first nothing is known. Any other
        wait is ended by parallel.timeout_seconds.

        Args:
            since: when the host began to wait for the device, by time.monotonic().
        """
        step = self.seconds["step"]
        waited = time.monotonic() - max(since, self.signals.terminated_at)
        if step and waited > STUCK_SECONDS + 3 * step:
            raise dist.DistError(f"{waited:.0f} s after TERM the device has not answered")

    def votes(self, rank: int, steps: int, evaluation: bool) -> Votes:
        """This rank's votes.

        Args:
            steps: that come before the next chance to stop.
            evaluation: whether one of them is evaluated.
        """
        now = time.monotonic()
        late = save_due = False
        if rank == 0:  # one clock, and one process that asks the file system
            if now - self.looked_at >= self.FILE_SECONDS:
                self.looked_at, self.stop_file_seen = now, self.stop_file.exists()
            save = 1.5 * max(self.seconds["save"], self.saver.seconds)
            needed = save + self.saver.busy * save + self.margin + steps * self.seconds["step"]
            needed += evaluation * self.seconds["evaluation"]
            late = self.end - time.time() < needed
            save_due = 0 < 60 * self.save_minutes <= now - self.saved_at
        return Votes(
            claim_lost=float(self.claim.lost),
            save_failed=float(self.saver.failed),
            data_damaged=float(self.data_damaged()),
            stop_file=float(self.stop_file_seen),
            signal=float(self.signals.received),
            deadline=float(late),
            save_due=float(save_due),
        )


class Claim:
    """One run directory, one job: claim.json names the job that trains the run.

    A claim is free if its process on this host is dead, if it is our own job's from before a
    requeue, or if its heartbeat, the file's modification time, has stopped.
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
            time.sleep(0.5)  # of an attempt before this one, and killed with it

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        job = f"job {holder['job_id']}, " if holder.get("job_id") else ""
        return UserError(
            f"{self.path.parent} is being trained by {job}process {holder.get('pid')} on"
            f" {holder.get('host')}; stop that one first (touch {self.path.parent}/STOP), or set"
            " another train.out_dir"
        )

    def verify(self) -> None:
        """UserError if another job has taken the run; called before what must not collide."""
        if not self.is_ours:
            self.lost = True
            raise UserError(f"{self.path.parent} was taken over by another job; it is left alone")

    @property
    def is_ours(self) -> bool:
        """Whether nobody else holds the run."""
        return not self.lost and read_json(self.path) in (None, self.mine)

    def take(self) -> None:
        """Claims the run and keeps the claim alive; UserError if another job holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another job is removing it too
            judged = self.path.stat()
            self.check()
            # Renaming has one winner. Whoever finds that it took away another's fresh claim puts
            # it back and leaves.
            aside = self.path.with_name(f"claim.{socket.gethostname()}.{os.getpid()}.tmp")
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
        """Gives the run free; where that fails, this process' end does."""
        self._released.set()
        try:
            if self.mine and read_json(self.path) == self.mine:
                self.path.unlink()
        except OSError as error:
            tell(f"{self.path} stays: {error.strerror}")

    def _create(self) -> bool:
        """Makes the claim, whole from its first moment; False if there is one."""
        fresh = self.path.with_name(f"claim.{socket.gethostname()}.{os.getpid()}.new")
        with open(fresh, "w") as file:
            file.write(json.dumps(self.mine))
            file.flush()
            os.fsync(file.fileno())  # or it is there and empty when this node has lost its power
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
        # Both times are the file server's, so that clocks of hosts need not agree.
        probe = self.path.with_name(f"claim.{socket.gethostname()}.{os.getpid()}.probe")
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
                tell(f"{self.path}: no heartbeat: {error.strerror}")


def code_files(folder: Path = CODE) -> dict[str, Path]:
    """Rocket's Python files in a copy of it, by their names from there."""
    packages = (path.parent for path in folder.glob("*/__init__.py"))
    found = (path for place in (folder, *packages) for path in place.glob("*.py"))
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def code_in_use() -> dict[str, str]:
    """Name to text of the modules of Rocket that this process has loaded."""
    ours = code_files()
    names = {path.name for path in ours.values()} - {"__init__.py"}
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    # By name first: to resolve all of torch's 2,000 files is 20,000 look-ups by every rank.
    loaded = {os.path.realpath(file) for file in files if os.path.basename(file) in names}
    used = {name: path for name, path in ours.items() if str(path) in loaded}
    return {name: path.read_text(encoding="utf-8") for name, path in used.items()}


def changed_code(directory: Path) -> dict[str, list[str]]:
    """File to unified diff, for the code in use that is not what the run's snapshot holds."""
    found = {}
    if (directory / "code").is_dir():
        for name, text in code_in_use().items():
            path = directory / "code" / name
            old = path.read_text(encoding="utf-8") if path.exists() else ""
            if old != text:
                lines = difflib.unified_diff(
                    old.splitlines(), text.splitlines(), f"run/{name}", f"now/{name}", lineterm=""
                )
                found[name] = list(lines)
    return found


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


def print_diff(changed: dict[str, list[str]], say: Callable[[str], None] = print) -> None:
    """Prints what has changed in the code, the beginning of it if it is long."""
    lines = [line for diff in changed.values() for line in diff]
    for line in lines[:DIFF_LINES]:
        say(line)
    if len(lines) > DIFF_LINES:
        say(f"… and {len(lines) - DIFF_LINES} lines more")
