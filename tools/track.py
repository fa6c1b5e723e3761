"""Hands a run's rows to Weights & Biases: one W&B run per run directory, over all of its jobs.

    python tools/track.py RUN

Training starts it in a process of its own (log.wandb); by hand it does the same for any run.
Nothing is sent unless WANDB_MODE=online: compute nodes have no network. RUN/wandb gets all rows of
metrics.jsonl from the first on. So `wandb sync` replaces what earlier jobs sent, and steps that
were lost and trained again appear once.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from config import (
    Parser,
    UserError,
    build_config,
    existing_path,
    installed,
    print_error,
    read_toml,
    run_program,
    tables,
    write_atomically,
)
from corpus.locks import locked

POLL_SECONDS = 1.0
FINISH_SECONDS = 30.0  # a server may take so long for the last rows


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python tools/track.py", description=__doc__)
    parser.add_argument("run", help="run directory, such as out/tiny")
    parser.add_argument("--follow", action="store_true", help="continue until standard input ends")
    options = parser.parse_args(arguments)
    directory = existing_path(options.run)
    for name in ("config.toml", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: {name} is missing: no run, or one that has just begun")
    if not installed("wandb"):
        raise UserError("the package wandb is missing; in the repository: pip install '.[wandb]'")
    over = threading.Event()
    if options.follow:
        threading.Thread(target=watch, args=(over,), daemon=True).start()
        # Signals that stop training may reach all processes of a job.
        for name in ("INT", "TERM", "HUP", "USR1", "USR2"):
            signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
    else:
        over.set()

    def busy(holder: str) -> None:
        if not options.follow:  # training waits for the other process, a person need not
            print(f"{holder} hands over the rows of this run already")
            sys.exit()

    try:
        (directory / "wandb").mkdir(exist_ok=True)
        with locked(directory / "wandb" / "lock", busy):
            track(directory, over)
    except Exception as error:  # whatever the package raises: training goes on without it
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(" .:")
        give_up(f"{reason}; python tools/track.py {directory} hands over all rows anew")


def give_up(reason: str) -> NoReturn:
    """Ends this process with one line, and without the package's exit handlers, which may hang."""
    print_error(f"track.py: error: W&B: {reason}")
    os._exit(1)


def watch(over: threading.Event) -> None:
    """Sets `over` when training ends, in whatever way; ends this process soon after."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    over.set()
    time.sleep(FINISH_SECONDS)
    give_up(f"the last rows were not taken in {FINISH_SECONDS:.0f} s")


def track(directory: Path, over: threading.Event) -> None:
    """Logs all rows of a run, and those that are added until it is over."""
    import wandb

    config = build_config(read_toml(directory / "config.toml"))
    mode = os.environ.get("WANDB_MODE") or "offline"
    identity = run_id(directory)
    run = wandb.init(
        project=config.log.wandb_project or os.environ.get("WANDB_PROJECT") or "rocket",
        name=directory.resolve().name,
        id=identity,
        # An offline run has all rows; resumed, it would add them to those already sent.
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=str(directory),
        config=tables(config),
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )
    with open(directory / "metrics.jsonl", "rb") as file:
        first = next(whole_rows(file), {"step": 0})["step"]
        file.seek(0)
        log_rows(run, file)
        if run.offline:
            pattern = f"offline-run-*-{identity}"
            if first <= config.train.log_interval:  # else somebody has cut the file
                for path in (directory / "wandb").glob(pattern):  # this one has all their rows
                    if path.name != Path(run.dir).parent.name:
                        shutil.rmtree(path)
            where = f"offline, to be sent by: wandb sync {directory}/wandb/{pattern}"
        else:
            where = run.url or mode
        print(f"W&B run {identity}: {where}", flush=True)
        while not over.wait(POLL_SECONDS):
            log_rows(run, file)
        log_rows(run, file)
    run.finish()


def run_id(directory: Path) -> str:
    """The id of the W&B run, the same for all jobs."""
    path = directory / "wandb" / "id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(4).encode())
    return path.read_text().strip()


def log_rows(run: Any, file: BinaryIO) -> None:
    """Logs the rows that were added to a file since it was last read."""
    for row in whole_rows(file):
        if row["step"] >= run.step:  # else the server has it from an earlier job
            run.log(numbers(row), step=row["step"])


def whole_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The rows from the file's position on; a torn last one is left for the next call."""
    while (line := file.readline()).endswith(b"\n"):
        yield json.loads(line)
    file.seek(-len(line), os.SEEK_CUR)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by name; those of each dataset are named dataset/key."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": number for key, number in value.items()}
        elif isinstance(value, int | float) and name != "step":
            found[name] = value
    return found


if __name__ == "__main__":
    run_program(main)
