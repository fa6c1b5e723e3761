"""Hands a run's rows to Weights & Biases: one W&B run for a run directory, whatever jobs it took.

    python tools/track.py RUN

Training starts it beside itself (log.wandb); by hand it does the same for any run, at any time.
Nothing is sent unless WANDB_MODE=online: compute nodes have no network. What it leaves in RUN/wandb
holds all rows of metrics.jsonl from the first on, so `wandb sync` replaces what jobs before had
sent, and steps that were lost and done again are there once.
"""

from __future__ import annotations

import argparse
import functools
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
    read_toml,
    run_program,
    tables,
    tell,
    write_atomically,
)
from corpus.locks import locked

POLL_SECONDS = 1.0
FINISH_SECONDS = 30.0  # that a server may take for the last rows


def main(arguments: list[str]) -> None:
    parser = Parser(
        prog="python tools/track.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="run directory, such as out/tiny")
    parser.add_argument("--follow", action="store_true", help="go on until standard input ends")
    options = parser.parse_args(arguments)
    directory = existing_path(options.run)
    for name in ("config.toml", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: not a run directory, or too young: {name} is missing")
    if not installed("wandb"):
        raise UserError("the package wandb is missing: pip install 'rocket-llama[wandb]'")
    over = threading.Event()
    if options.follow:
        threading.Thread(target=watch, args=(over,), daemon=True).start()
        # Training is told to stop by signals that may reach all processes of a job.
        for name in ("INT", "TERM", "HUP", "USR1", "USR2"):
            signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
    else:
        over.set()
    try:
        (directory / "wandb").mkdir(exist_ok=True)
        busy = functools.partial(leave_to, options.follow)
        with locked(directory / "wandb" / "lock", busy):
            track(directory, over)
    except Exception as error:  # whatever the package raises: training goes on without it
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(" .:")
        give_up(f"{reason}; python tools/track.py {directory} hands over all rows anew")


def leave_to(waits: bool, holder: str) -> None:
    """Where the rows are being handed over already: training waits its turn, a person need not."""
    if not waits:
        print(f"{holder} hands over the rows of this run already")
        sys.exit()


def give_up(reason: str) -> NoReturn:
    """Ends this process with one line: what the package does when Python exits may fail or wait."""
    tell(f"track.py: error: W&B: {reason}")
    os._exit(1)


def watch(over: threading.Event) -> None:
    """Notes the end of training, however it ends; this process does not outlive it by much."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    over.set()
    time.sleep(FINISH_SECONDS)
    give_up(f"the last rows were not taken in {FINISH_SECONDS:.0f} s")


def track(directory: Path, over: threading.Event) -> None:
    """Logs all rows that there are, then those that come, until it is over."""
    import wandb

    config = build_config(read_toml(directory / "config.toml"))
    mode = os.environ.get("WANDB_MODE") or "offline"
    identity = run_id(directory)
    run = wandb.init(
        project=config.log.wandb_project or os.environ.get("WANDB_PROJECT") or "rocket",
        name=directory.resolve().name,
        id=identity,
        # To resume offline would be to add to what was sent, where this has all rows.
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
            if first <= config.train.log_interval:  # else somebody has cut the file
                leave_alone(directory / "wandb", identity, Path(run.dir).parent.name)
            told = f"offline, to be sent by: wandb sync {directory}/wandb/offline-run-*-{identity}"
        else:
            told = run.url or mode
        print(f"W&B run {identity}: {told}", flush=True)
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


def leave_alone(folder: Path, identity: str, name: str) -> None:
    """Removes the offline runs of the jobs before: all that they hold is in the named one."""
    for path in folder.glob(f"offline-run-*-{identity}"):
        if path.name != name:
            shutil.rmtree(path)


def log_rows(run: Any, file: BinaryIO) -> None:
    """Logs the rows that a file has from where it was read up to; a torn one is left for later."""
    for row in whole_rows(file):
        if row["step"] >= run.step:  # else a server that is resumed has it from a job before
            run.log(numbers(row), step=row["step"])


def whole_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
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
