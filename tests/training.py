"""Real training runs for the tests: small configurations, launched as users launch them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from checkpoint import Checkpoint, checkpoint_paths, find_checkpoint
from preflight import code_files
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
# One thread a rank: the suite shares two cores, and thread counts change the order of float sums.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PATIENCE = 240  # seconds that a test waits for what takes a few: a busy machine may stand still


def overrides(dataset: Path, tokenizer: Path, out: Path, **values: object) -> list[str]:
    """Command-line overrides of a tiny float32 run; values are keys with `__` for the dot."""
    keys = {
        "tokenizer__path": tokenizer,
        "tokenizer__vocab_size": Tokenizer(tokenizer).vocab_size,
        "data__dir": dataset,
        "data__seq_len": 32,
        "model__dim": 32,
        "model__n_layers": 2,
        "model__n_heads": 4,
        "model__n_kv_heads": 2,
        "model__ffn_dim": 64,
        "model__max_seq_len": 64,
        "model__tie_embeddings": "false",
        "train__out_dir": out,
        "train__max_steps": 20,
        "train__global_batch_size": 10,
        "train__micro_batch_size": 4,
        "train__log_interval": 1,
        "train__eval_interval": 10,
        "train__eval_sequences": 30,
        "train__sample_prompts": 2,
        "train__dtype": "float32",
        "optimizer__name": "adamw",
        "optimizer__learning_rate": 3e-3,
        "optimizer__warmup_steps": 4,
        "checkpoint__interval": 10,
        "log__report": "false",  # a process an evaluation; tests/test_report.py has it written
        **values,
    }
    return [f"--{name.replace('__', '.')}={value}" for name, value in keys.items()]


def prepared(directory: Path, tokenizer: Path, sources: list[str]) -> Path:
    """A dataset that prepare.py makes there, a fifth for validation; the directory."""
    arguments = [
        f"--data.sources={json.dumps(sources)}",
        "--data.val_fraction=0.2",
        f"--data.dir={directory}",
        f"--tokenizer.path={tokenizer}",
        f"--tokenizer.vocab_size={Tokenizer(tokenizer).vocab_size}",
    ]
    program = [sys.executable, str(ROOT / "prepare.py"), *arguments]
    subprocess.run(program, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return directory


def copy_code(folder: Path) -> Path:
    """A copy of Rocket's Python files, in a folder that it makes."""
    for name, path in code_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    return folder


def rocket(
    arguments: list[str], ranks: int = 1, timeout: int = PATIENCE
) -> subprocess.CompletedProcess:
    """Runs rocket.py in plain python, or under torchrun for more than one rank."""
    return run_many([arguments], ranks, timeout)


def run_many(
    runs: list[list[str]], ranks: int = 1, timeout: int = PATIENCE
) -> subprocess.CompletedProcess:
    """Trains several runs one after the other in one launch; a launch costs seconds."""
    program = [str(ROOT / "tests" / "launch.py"), json.dumps(runs)]
    if len(runs) == 1:
        program = [str(ROOT / "rocket.py"), *runs[0]]
    launch = [*launcher(ranks), *program]
    return subprocess.run(launch, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


def launcher(ranks: int, restarts: int = 0) -> list[str]:
    """The command that starts a program on this many ranks."""
    if ranks == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]


class Launched:
    """A training run in the background, in a session of its own."""

    def __init__(self, arguments: list[str], ranks: int, restarts: int) -> None:
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
        self.process = subprocess.Popen(
            [*launcher(ranks, restarts), str(ROOT / "rocket.py"), *arguments],
            env={**ENVIRONMENT, "PYTHONFAULTHANDLER": "1"},
            stdout=self.files[0],
            stderr=self.files[1],
            start_new_session=True,
        )
        self.pid = self.process.pid

    def said(self) -> str:
        """Its output and errors so far."""
        # Opened anew: reading through the files themselves would move the position that they
        # share with the processes, which would write over what they had said.
        return "".join(Path(f"/proc/self/fd/{file.fileno()}").read_text() for file in self.files)

    def workers(self) -> list[int]:
        """The pids of the ranks that torchrun started, in the order of ranks."""
        found = {}
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        for pid in children.split():
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found |= {name[5:]: int(pid) for name in environment if name.startswith("RANK=")}
        return [found[rank] for rank in sorted(found)]

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(PATIENCE)

    def abort(self) -> None:
        """Ends it; where each thread of its processes stands is then in what it said."""
        with contextlib.suppress(OSError):  # some may have ended
            for pid in self.workers() or [self.pid]:
                os.kill(pid, signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


@contextlib.contextmanager
def started(arguments: list[str], ranks: int = 1, restarts: int = 0) -> Iterator[Launched]:
    """Starts rocket.py and goes on; whatever is left of it at the end is killed.

    If the test fails, pytest shows what was said, and where a run that still went stood.
    """
    launched = Launched(arguments, ranks, restarts)
    try:
        yield launched
    except Exception:
        launched.abort()
        print(launched.said())
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):  # torchrun puts ranks in their own sessions
            for pid in launched.workers():
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launched.pid, signal.SIGKILL)
        launched.process.wait()


def until(holds: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Waits for something to hold; fails if it takes too long."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def rows(out: Path, timings: bool = False) -> list[dict]:
    """The rows of metrics.jsonl, without what differs from run to run by nature."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if not timings:
        for row in found:
            for key in ("hours", "tokens_per_second", "memory_gb"):
                row.pop(key, None)
    return found


def losses(out: Path) -> list[float]:
    """Training losses of a run, in order."""
    return [row["loss"] for row in rows(out) if "loss" in row]


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def tensors(out: Path) -> dict[str, np.ndarray]:
    """All weights and optimizer state of a run's last checkpoint."""
    checkpoint = find_checkpoint(out)
    return {
        f"{group}:{name}": checkpoint.tensor(group, name).numpy()
        for group in ("model", "optimizer")
        for name in checkpoint.shapes(group)
    }


def assert_identical(a: Path, b: Path) -> None:
    """Two runs end in the same bits: weights, optimizer state, metrics."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not different
    assert rows(a) == rows(b)


def steps_kept(out: Path) -> dict[int, bool]:
    """Step to whether its checkpoint holds the optimizer."""
    return {c.step: c.has_optimizer for c in map(Checkpoint, checkpoint_paths(out))}


def error_of(process: subprocess.CompletedProcess) -> str:
    """The one line in which a program says what the user did wrong; fails on a traceback."""
    assert process.returncode != 0, process.stdout
    found = [line for line in process.stderr.splitlines() if ": error: " in line]
    assert len(found) == 1, process.stderr
    assert 'rocket.py", line' not in process.stderr, process.stderr
    return found[0]
