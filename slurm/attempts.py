"""Attempts at a run: how many in a row saved nothing new, how they ended, and what comes next.

A fault that may pass (a lost rank, a signal, a deadline, a sick node) does not end a run. It ends
after train.max_attempts in a row without a new checkpoint. attempts.json, in the run's directory,
keeps what the next attempt needs to know. slurm/train.sh calls it as a program, attempts.py:

    attempts.py begin ATTEMPT ASKED CONFIG [overrides]     counts an attempt; fails if too many
    attempts.py agent RUN ATTEMPT [arguments of torchrun]  runs torchrun on one node
    attempts.py judge RUN ATTEMPT SIGNAL                   prints what to do, sick nodes, why
    attempts.py cancelled RUN ATTEMPT WHY                  records that the job does not come back
    attempts.py opened RUN                                 "yes" if this job wrote config.toml

ATTEMPT is the attempt's id. ASKED is empty unless a person asked for the attempt, SIGNAL unless a
signal came.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from config import (
    ACCEPT_CHANGES,
    DISK_FULL,
    LOST_RANK,
    SICK_NODE,
    UserError,
    load_config,
    print_error,
    read_json,
    resolve_path,
    write_atomically,
)

Json = dict[str, Any]
ATTEMPT = "ROCKET_ATTEMPT"  # the environment variable that holds the id of this attempt
EXPIRY_SECONDS = 300.0  # a run without a heartbeat for this long is dead
MOST_DEATHS, DEATHS_SECONDS = 2, 24 * 3600.0  # of ranks on one node, in this time: it is sick
# Types in attempts.json. A value of another type was not written by this code and does not count.
SHAPE = {"count": int, "max_attempts": int, "checkpoints": list, "deaths": dict}


class Verdict(NamedTuple):
    """What train.sh does after an attempt."""

    action: str  # done or failed: end; again: try again in this job; back: requeue the job
    why: str


def main(arguments: list[str]) -> None:
    match arguments:
        case ["begin", attempt, asked, *rest]:
            flags = {ACCEPT_CHANGES: "as rocket.py's"}
            config, _ = load_config(rest, usage=str(__doc__), flags=flags)
            directory = resolve_path(config.train.out_dir)
            begin(directory, attempt, config.train.max_attempts, bool(asked))
        case ["agent", run, attempt, *rest]:
            agent(Path(run), attempt, rest)
        case ["judge", run, attempt, received]:
            verdict = judge(Path(run), attempt, bool(received))
            print(verdict.action, ",".join(sick_nodes(Path(run))), verdict.why, sep="|")
        case ["cancelled", run, attempt, why]:
            correct_status(Path(run), attempt, requeue=False, why=why)
        case ["opened", run]:
            ours = _read(Path(run)).get("opened_by") == os.environ["SLURM_JOB_ID"]
            print("yes" if ours else "")
        case [] | ["--help"]:
            print(__doc__)
        case _:
            command = " ".join(arguments)
            raise UserError(f"no such command: {command}; see python attempts.py --help")


def checkpoints(directory: Path) -> set[str]:
    """Name and inode of each checkpoint: one that replaces a damaged one of its name is new."""
    found = directory.glob("checkpoints/step_" + "[0-9]" * 8)
    return {f"{path.name} {path.stat().st_ino}" for path in found}


def signal_note(directory: Path, attempt: str) -> Path:
    """The file that train.sh makes when a signal comes, which starting processes would miss."""
    return directory / "logs" / f"signal.{attempt}"


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max((int(name.split()[0][5:]) for name in checkpoints(directory)), default=0)


def begin(directory: Path, attempt: str, limit: int, asked: bool) -> None:
    """Counts an attempt before it starts, so that it counts even if it leaves no trace. UserError,
    also in status.json, if there were too many before it."""
    given_up = _read(directory).get("given_up")
    # A job that comes back after it was given up was brought back by a person.
    if not asked and not given_up and (why := exhausted(directory)):
        give_up(directory, attempt, why)
        raise UserError(f"{directory}: {why}")
    count(directory, attempt, limit, asked or bool(given_up))


def count(directory: Path, attempt: str, limit: int, anew: bool = False) -> None:
    """Counts an attempt once, however often this is called; anew forgets those before it."""
    record = _read(directory)
    if record.get("attempt") == attempt:
        return
    before = 0 if anew or made_progress(directory) else record["count"]
    counted = {"attempt": attempt, "count": before + 1, "max_attempts": limit}
    known = {"checkpoints": sorted(checkpoints(directory)), "given_up": False}
    _update(directory, **counted, **known)


def note_opened(directory: Path) -> None:
    """Records that this job has written the run's configuration and code."""
    _update(directory, opened_by=os.environ.get("SLURM_JOB_ID"))


def made_progress(directory: Path) -> bool:
    """Whether there is a checkpoint that was not there when the last attempt was counted."""
    record = _read(directory)
    counted = {"count", "max_attempts", "checkpoints"} <= record.keys()
    return not counted or bool(checkpoints(directory) - set(map(str, record["checkpoints"])))


def exhausted(directory: Path) -> str:
    """Why the run should not be tried again; empty unless it had too many attempts."""
    record = _read(directory)
    if made_progress(directory) or record["count"] < record["max_attempts"]:
        return ""
    times = f"{record['count']} attempts in a row" if record["count"] > 1 else "an attempt"
    return f"{times} without a new checkpoint (train.max_attempts = {record['max_attempts']})"


def judge(directory: Path, attempt: str, received: bool) -> Verdict:
    """What to do after an attempt; corrects status.json if its ranks could not write it. If a
    signal was received, the job is about to end."""
    ended, status = _take_notes(directory, attempt), _read(directory, "status")
    if status.get("attempt") != attempt:  # it ended before it wrote one
        status = {}
    state, reason = status.get("state"), status.get("reason")
    if state == "finished" or (state == "stopped" and reason not in ("signal", "deadline")):
        return Verdict("done", f"{state}, {reason}")
    why = status.get("why") or ("killed" if state else "ended before training began")
    codes = {code for of_node in ended.values() for code in of_node.values()}
    if state in ("stopped", "failed") and not status.get("requeue"):
        return give_up(directory, attempt, why)
    if not state and UserError.code in codes:
        return give_up(directory, attempt, "it made a mistake before training began")
    if sick := [node for node in sick_nodes(directory) if node in ended]:
        why += f" (sick: {', '.join(sick)})"
    if too_many := exhausted(directory):
        return give_up(directory, attempt, f"{too_many}; the last one: {why}")
    correct_status(directory, attempt, requeue=True, why=why)
    passing = state == "running" or (state, reason) == ("failed", "error")
    if passing and not received and not sick and made_progress(directory):
        return Verdict("again", why)
    return Verdict("back", f"{state}, {reason}: {why}" if reason else why)


def give_up(directory: Path, attempt: str, why: str) -> Verdict:
    """Records that the run is not tried again unless a person asks for it."""
    _update(directory, given_up=True)
    correct_status(directory, attempt, requeue=False, why=why)
    return Verdict("failed", why)


def correct_status(directory: Path, attempt: str, *, requeue: bool, why: str) -> None:
    """Writes into status.json what the ranks of an attempt could not write or did not yet know."""
    claim, job = _read(directory, "claim"), os.environ.get("SLURM_JOB_ID")
    if claim and claim.get("job_id") != job:
        return  # another job trains the run, and its status counts
    status = _read(directory, "status")
    if status.get("attempt") != attempt or status.get("state") not in ("stopped", "failed"):
        status = {"state": "failed", "reason": "error", "step": newest_step(directory)}
    write_status(directory, status | {"requeue": requeue, "why": why, "attempt": attempt})


def write_status(directory: Path, status: Json) -> None:
    """Writes status.json, with job and time. On a full disk it overwrites the old file, because
    that needs no new blocks."""
    stamp = {
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    content = json.dumps(status | stamp, ensure_ascii=False).encode() + b"\n"
    path = directory / "status.json"
    try:
        write_atomically(path, content)
    except OSError as error:
        if error.errno not in DISK_FULL or not path.exists():
            raise
        with open(path, "rb+", buffering=0) as file:
            file.write(content)
            file.truncate()


def is_alive(directory: Path) -> bool:
    """Whether a process trains the run: on this host it must exist, elsewhere have a heartbeat."""
    path = directory / "claim.json"
    lives = holder_lives(read_json(path) or {})
    return time.time() - path.stat().st_mtime < EXPIRY_SECONDS if lives is None else lives


def holder_lives(claim: Json) -> bool | None:
    """Whether the process that holds a claim lives; None if it is on another host."""
    if not {"host", "pid", "started"} <= claim.keys():
        return False  # claims are written whole: this one was torn when its node crashed
    if claim["host"] != socket.gethostname():
        return None
    return process_start(claim["pid"]) == claim["started"]


def process_start(pid: int) -> str | None:
    """When a process of this host started, because a later one may have its number. None if it is
    dead; "" where the system has no /proc."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass  # alive, of another user
    except OSError:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] == "Z" else fields[19]


def sick_nodes(directory: Path) -> list[str]:
    """The nodes that the next attempt should do without."""
    since, deaths = time.time() - DEATHS_SECONDS, _deaths(directory)
    return sorted(n for n in deaths if sum(at > since for at in deaths[n]) >= MOST_DEATHS)


def _deaths(directory: Path) -> dict[str, list[float]]:
    """When ranks died on each node."""
    found = _read(directory).get("deaths", {}).items()
    lists = {node: times for node, times in found if isinstance(times, list)}
    return {node: [t for t in times if isinstance(t, float)] for node, times in lists.items()}


def _take_notes(directory: Path, attempt: str) -> dict[str, dict[str, int]]:
    """The exit codes of the ranks that failed in an attempt, by node and rank; counts deaths.

    It is not the node's fault if a rank met a user's mistake, lost another rank or was asked to
    end, or if ranks crashed on all nodes.
    """
    prefix, ended = f"ended.{attempt}.", {}
    for path in sorted((directory / "logs").glob(f"{prefix}*.json")):
        ended[path.name.removeprefix(prefix).removesuffix(".json")] = read_json(path) or {}
        path.unlink()
    for path in (directory / "logs").glob("signal.*"):
        path.unlink()
    innocent = {0, UserError.code, LOST_RANK, -signal.SIGTERM}
    if len(ended) > 1 and all(1 in codes.values() for codes in ended.values()):
        innocent.add(1)
    deaths, now = _deaths(directory), time.time()
    for node, codes in ended.items():
        if SICK_NODE in codes.values():  # it said so itself
            deaths[node] = [now] * MOST_DEATHS
        elif set(codes.values()) - innocent:
            deaths[node] = [*deaths.get(node, [])[1 - MOST_DEATHS :], now]
    _update(directory, deaths=deaths)
    return ended


def agent(directory: Path, attempt: str, arguments: list[str]) -> None:
    """Runs torchrun in this process; prints how a rank failed, and notes it for judge()."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    if signal_note(directory, attempt).exists():
        sys.exit(1)  # before training begins
    try:
        torchrun(arguments)
        return
    except SignalException:
        pass  # the ranks have printed what they did about it
    except RendezvousError as error:  # another node's agent has gone
        print_error(f"{node} lost contact with the other nodes: {error}".partition("\n")[0])
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in codes.items():
            if code not in (UserError.code, LOST_RANK, SICK_NODE):  # those have printed an error
                print_error(f"rank {rank} on {node} {_how_it_ended(code)}")
        note = directory / "logs" / f"ended.{attempt}.{node}.json"
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps(codes).encode())
    sys.exit(1)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    why = " (a file that it had mapped was cut, or memory ran out)" if name == "SIGBUS" else ""
    return f"was killed by {name}{why}"


def _read(directory: Path, name: str = "attempts") -> Json:
    found = read_json(directory / f"{name}.json") or {}
    return {key: value for key, value in found.items() if isinstance(value, SHAPE.get(key, object))}


def _update(directory: Path, **values: Any) -> None:
    """Changes keys of attempts.json."""
    directory.mkdir(parents=True, exist_ok=True)
    content = json.dumps(_read(directory) | values).encode() + b"\n"
    write_atomically(directory / "attempts.json", content)
