"""Torture: no SIGKILL, at whatever moment, loses work.

    python tests/torture.py [--kills=100] [--seed=N] [--work=DIR]

Four runs (saving in the loop or in the background; one process, or two under torchrun) are killed
again and again, mostly while they save, and started again by the same command. After each kill all
checkpoints on disk must verify, and training must go on by itself from the newest one. At the end
weights, optimizer state, metrics and samples are those of a run that nobody disturbed.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training
from training import ROOT, assert_identical, copy_code, overrides, rows, steps_kept

from checkpoint import Checkpoint, checkpoint_paths
from config import UserError
from slurm.attempts import process_start

ENVIRONMENT = {**training.ENVIRONMENT, "ROCKET_ROOT": str(ROOT)}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
MOMENTS = {"saving": 0.6, "pruning": 0.1, "training": 0.15, "starting": 0.15}  # when to kill
MODES = {"sync": "false", "async": "true"}
AHEAD = 6  # steps that a run may go on before it is killed
SAVE, PRUNING = "step_" + "[0-9]" * 8 + ".tmp", "step_*.old.tmp"
COUNTED = ("kills", "in a save", "pruning", "before step 1", "resumed", "unloadable", "lost")


class Victim:
    """A run as its user has it: one command, started again whenever it is dead."""

    def __init__(self, program: list[str], out: Path, ranks: int, rng: random.Random) -> None:
        self.program, self.out, self.ranks, self.rng = program, out, ranks, rng
        self.log = out.with_suffix(".log")  # of all starts
        self.saved = self.read = 0  # when these processes started: newest step, bytes of log
        self.launcher, self.starts = None, {}  # see workers()
        self.counts, self.problems = Counter(), []

    def start(self) -> None:
        self.restarts = self.rng.choice((0, 3))  # that torchrun still makes by itself
        torchrun = [*TORCHRUN, f"--max-restarts={self.restarts}"] if self.ranks > 1 else []
        command = [sys.executable, *torchrun, *self.program]
        options = {"stderr": subprocess.STDOUT, "env": ENVIRONMENT, "start_new_session": True}
        with open(self.log, "ab") as log:
            self.launcher = subprocess.Popen(command, stdout=log, **options)

    def finish(self) -> None:
        assert self.launcher.wait(timeout=300) == 0, f"exit status {self.launcher.returncode}"
        self.check_output()

    def kill(self, moment: str) -> None:
        """Kills one worker or all processes at a random moment, and looks at what is left."""
        saved, limit = self.newest(), time.monotonic() + self.rng.uniform(0, 8)
        if moment == "starting":
            self.wait_for(lambda: time.monotonic() > limit or len(self.steps()) > AHEAD)
        else:
            self.wait_for(lambda: self.newest() > saved)  # so that the run gets somewhere
        workers = self.workers()
        one = bool(workers) and self.rng.random() < 0.5
        enough = len(self.steps()) + self.rng.randint(0, AHEAD)
        if moment == "saving":
            self.wait_for(lambda: self.exists(SAVE))
            time.sleep(self.rng.uniform(0, 0.03))
        elif moment == "pruning":  # it takes a millisecond, which may be missed
            self.wait_for(lambda: self.exists(PRUNING) or len(self.steps()) > enough)
        elif moment == "training":
            self.wait_for(lambda: len(self.steps()) >= enough)
            time.sleep(self.rng.uniform(0, 0.05))
        saved, printed = self.newest(), len(self.output())
        if one:
            os.kill(self.rng.choice(workers), signal.SIGKILL)
        else:
            workers = self.kill_all()
        restarted = one and self.restarts > 0
        self.restarts -= one
        if not restarted:
            self.launcher.wait(timeout=90)
        self.wait_for(lambda: not set(workers) & set(self.workers()), launched=restarted)
        self.examine(saved, printed, f"{moment}, {'one worker' if one else 'all'}")
        if not restarted:
            self.start()

    def kill_all(self) -> list[int]:
        """Kills the launcher and its workers, which it returns."""
        self.launcher.send_signal(signal.SIGSTOP)  # so that it starts no more meanwhile
        workers = self.workers()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        self.launcher.kill()
        return workers

    def workers(self) -> list[int]:
        """The launcher's living processes; in a world of 1 there are none, it trains itself."""
        pid = self.launcher.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        if self.ranks > 1 and children.exists():
            self.starts |= {n: process_start(n) for n in map(int, children.read_text().split())}
        return [n for n, start in self.starts.items() if start and process_start(n) == start]

    def examine(self, saved: int, printed: int, title: str) -> None:
        """Holds the dead processes' output and the checkpoints against what must be."""
        self.counts["kills"] += 1
        if self.steps():  # else what the kill before left behind may still be there
            self.counts["in a save"] += self.exists(SAVE)
            self.counts["pruning"] += self.exists(PRUNING)
        else:
            self.counts["before step 1"] += 1
        self.check_output(printed)
        for path in checkpoint_paths(self.out):
            try:
                Checkpoint(path).verify()
            except UserError as error:
                self.problem("unloadable", str(error))
        self.saved = self.newest()
        if self.saved < saved:
            self.problem("lost", f"the checkpoint of step {saved} is gone")
        with open(self.log, "a") as log:
            log.write(f"\n-- kill {self.counts['kills']}, {title}: step {self.saved} is saved\n")
        self.read = self.log.stat().st_size

    def check_output(self, printed: int | None = None) -> None:
        """Training went on from the newest checkpoint, and without an error before the kill."""
        output, steps = self.output(), self.steps()
        resumed = re.search(r"^resuming from step (\d+):", output, re.M)
        self.counts["resumed"] += bool(resumed)
        since = int(resumed[1]) if resumed else 0
        if (resumed or steps) and since != self.saved:
            self.problem("lost", f"went on from step {since}, but step {self.saved} was saved")
        if steps != [since + 1 + index for index in range(len(steps))]:
            self.problem("steps", f"not each once after step {since}: {steps}")
        wrong = re.findall(
            r"^.*(?:: error: |checkpoint skipped|Traceback).*$", output[:printed], re.M
        )
        if printed is not None:  # the worker that was not killed says in one line why it ends
            after = re.findall(r"^.*(?:: error: |rocket\.py\", line).*$", output[printed:], re.M)
            wrong += [line for line in after if "lost contact" not in line]
        for line in wrong:
            self.problem("errors", line)

    def problem(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        self.problems.append(f"{self.log}: {text}")

    def wait_for(self, condition: Callable[[], object], launched: bool = True) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            ended = launched and self.launcher.poll() is not None
            assert not ended, f"ended by itself, exit status {self.launcher.returncode}"
            assert time.monotonic() < deadline, "it hangs"
            time.sleep(0.0005)

    def output(self) -> str:
        """What these processes have printed."""
        with open(self.log, "rb") as log:
            log.seek(self.read)
            return log.read().decode(errors="replace")

    def steps(self) -> list[int]:
        """The steps that these processes have trained."""
        return [int(n) for n in re.findall(r"^step (\d+)/\d+ \| loss", self.output(), re.M)]

    def newest(self) -> int:
        """The newest step that has a checkpoint; 0 for none."""
        return max((int(path.name[5:]) for path in checkpoint_paths(self.out)), default=0)

    def exists(self, pattern: str) -> bool:
        return any((self.out / "checkpoints").glob(pattern))


def prepare(work: Path) -> None:
    """Code (a copy: ours may be edited while this takes its minutes), dataset and tokenizer."""
    code, dataset, tokenizer = work / "code", work / "dataset", work / "tokenizer.model"
    copy_code(code)
    sources = [str(Path(sysconfig.get_paths()["stdlib"]) / name) for name in ("json", "email")]
    arguments = [f"--data.sources={sources}", "--data.val_fraction=0.2", f"--data.dir={dataset}"]
    arguments += [f"--tokenizer.path={tokenizer}", "--tokenizer.vocab_size=2000"]
    for program in ("train_tokenizer.py", "prepare.py"):
        command = [sys.executable, str(code / program), *arguments]
        subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True)


def compare(undisturbed: Path, killed: Path, steps: int) -> None:
    """Both runs end alike: in the same bits, with each row once."""
    assert_identical(undisturbed, killed)
    assert [row["step"] for row in rows(killed) if "loss" in row] == list(range(1, steps + 1))
    samples = (killed / "samples.jsonl").read_text()
    assert samples == (undisturbed / "samples.jsonl").read_text()
    assert len(set(samples.splitlines())) == len(samples.splitlines())
    assert steps_kept(undisturbed) == steps_kept(killed)


def torture(work: Path, mode: str, ranks: int, kills: int, rng: random.Random) -> list[str]:
    """One series: the two runs, then what distinguishes them; returns what went wrong."""
    begun, steps, victims = time.monotonic(), 30 + 10 * kills, []  # more than the kills let pass
    for name in ("undisturbed", "killed"):
        out = work / f"{mode}-{ranks}-{name}"
        keys = {"model__dim": 128, "model__ffn_dim": 384, "train__max_steps": steps}
        keys |= {"train__global_batch_size": 4, "train__eval_interval": 7}
        keys |= {"checkpoint__interval": 3, "checkpoint__asynchronous": MODES[mode]}
        arguments = overrides(work / "dataset", work / "tokenizer.model", out, **keys)
        victims.append(Victim([str(work / "code" / "rocket.py"), *arguments], out, ranks, rng))
    undisturbed, killed = victims
    try:
        undisturbed.start()
        undisturbed.finish()
        killed.start()
        for _ in range(kills):
            killed.kill(rng.choices(list(MOMENTS), MOMENTS.values())[0])
        killed.finish()
        compare(undisturbed.out, killed.out, steps)
    except (AssertionError, UserError, subprocess.TimeoutExpired):
        killed.problem("errors", traceback.format_exc())
    finally:
        for victim in filter(lambda victim: victim.launcher, victims):
            victim.kill_all()
    counts = ", ".join(f"{killed.counts[name]} {name}" for name in COUNTED)
    print(f"{mode}, world of {ranks}: {counts}; {time.monotonic() - begun:.0f} s", flush=True)
    return victims[0].problems + victims[1].problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--work", type=Path, help="directory to make; else one that is removed")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("terminated"))
    work = (options.work or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    begun, rng, problems = time.monotonic(), random.Random(options.seed), []
    print(f"{options.kills} kills, seed {options.seed}, in {work}", flush=True)
    prepare(work)
    for index, (mode, ranks) in enumerate((m, r) for m in MODES for r in (1, 2)):
        problems += torture(work, mode, ranks, (options.kills + index) // 4, rng)
    print(f"{time.monotonic() - begun:.0f} s, {len(problems)} problems", *problems, sep="\n")
    if problems:
        sys.exit(f"again: python tests/torture.py --kills={options.kills} --seed={options.seed}")
    if not options.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
