"""What a cluster does to a run, on a real Slurm of two pretend nodes: whatever ends a job, the run
comes back by itself and ends in the same bits, with each step once in its metrics; and it does not
come back where it should not.

Python's part (claims, signals, deadlines) has its own tests; this one protects slurm/*.sh.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from training import (
    ENVIRONMENT,
    ROOT,
    assert_identical,
    copy_code,
    losses,
    overrides,
    rows,
    status,
    tensors,
)

from config import load_config
from tools import law, rungs

STEPS = 160  # some seconds: long enough to be hit, and saved every 20 steps
TERMINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def what_is_missing() -> str | None:
    if os.geteuid() != 0:
        return "starting a Slurm needs root"
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        return "no Slurm, and no apt-get to install it"
    return None


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
]


def wait_until(condition, what: str, timeout: float = 240):
    """The first true value of a condition, looked at often; fails when the time is over."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} in {timeout} s"
        time.sleep(0.1)
    return value


class Cluster:
    """A running Slurm, and what the tests ask of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        inherited = {
            k: v for k, v in ENVIRONMENT.items() if not k.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment = inherited | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
        }

    def call(self, *command: object, cwd: Path = ROOT, **environment: str) -> str:
        """What a command prints; it must succeed."""
        process = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=240,
            cwd=cwd,
            env=self.environment | environment,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    def train(
        self, *arguments: object, flags: str = "", root: Path = ROOT, **environment: str
    ) -> str:
        """Submits slurm/train.sh from the repository; the job's id."""
        output = f"--output={self.directory}/%j.out"
        command = ["sbatch", "--parsable", output, *flags.split(), "slurm/train.sh"]
        return self.call(*command, *arguments, cwd=root, **environment)

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", "-o", job)))

    def end(self, job: str, timeout: float = 120) -> dict[str, str]:
        """What Slurm says of a job once it is over for good."""

        def over() -> dict[str, str] | None:
            found = self.job(job)
            return found if found["JobState"] in TERMINAL else None

        try:
            return wait_until(over, f"end of job {job}", timeout)
        finally:
            print(re.sub(r"step .* left\n", "", self.log(job)))  # shown where the test fails

    def log(self, job: str) -> str:
        path = self.directory / f"{job}.out"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="session")
def cluster():
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, for a socket
    script = ROOT / "tests" / "slurm_up.sh"
    subprocess.run([script, "start", directory], check=True, timeout=300)
    yield Cluster(directory)
    subprocess.run([script, "stop", directory], check=True, timeout=120)
    shutil.rmtree(directory)


@pytest.fixture
def arguments(dataset, tiny_tokenizer):
    """The overrides of a run in a directory, by keywords with __ for the dot."""

    def build(out: Path, **values: object) -> list[str]:
        keys = {"train__max_steps": STEPS, "train__eval_interval": 100, "checkpoint__interval": 20}
        return overrides(dataset, tiny_tokenizer, out, **(keys | values))

    return build


@pytest.fixture(scope="module")
def undisturbed(cluster, dataset, tiny_tokenizer, tmp_path_factory) -> dict[int, Path]:
    """Runs that nothing happened to, by their number of nodes."""
    keys = {"train__max_steps": STEPS, "train__eval_interval": 100, "checkpoint__interval": 20}
    outs = {nodes: tmp_path_factory.mktemp("undisturbed") for nodes in (1, 2)}
    jobs = [
        cluster.train(*overrides(dataset, tiny_tokenizer, out, **keys), flags=f"--nodes={nodes}")
        for nodes, out in outs.items()
    ]
    for job in jobs:
        found = cluster.end(job)
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0")
    return outs


def wait_saved(out: Path) -> None:
    """Returns when a run has saved a checkpoint: it is in the middle."""
    wait_until(lambda: list(out.glob("checkpoints/step_????????")), f"checkpoint in {out}")


def workers(out: Path, node: str = "") -> list[int]:
    """The processes that train a run, on a node or on all."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
            environment = (path.parent / "environ").read_text(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if node and f"SLURMD_NODENAME={node}" not in environment:
            continue
        if words[1:2] == ["-u"] and "rocket.py" in words[2] and any(str(out) in w for w in words):
            found.append(int(path.parent.name))
    return sorted(found)


def agents(out: Path) -> list[int]:
    """The processes that start and watch the workers of a run, one a node."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "agent" in words and str(out) in words and "srun" not in words[0]:
                found.append(int(path.parent.name))
    return sorted(found)


def assert_finished(out: Path, like: Path) -> None:
    """A run is finished, and in the same bits as another: each step once in its metrics."""
    assert status(out)["state"] == "finished"
    assert_identical(out, like)
    steps = [row["step"] for row in rows(out) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


def test_two_nodes_train_to_the_end(undisturbed):
    assert status(undisturbed[2])["state"] == "finished"
    assert losses(undisturbed[2]) == pytest.approx(losses(undisturbed[1]), abs=1e-4)
    assert not all(
        (tensors(undisturbed[2])[name] == tensor).all()
        for name, tensor in tensors(undisturbed[1]).items()
    ), "two ranks sum in another order than one"
    log = next((undisturbed[2] / "logs").glob("train-*.log")).read_text()
    assert "on slurmn[1-2]" in log
    assert f"step {STEPS}/{STEPS}" in log


def test_requeued_job_keeps_its_code_and_configuration(cluster, arguments, undisturbed, tmp_path):
    """scontrol requeue in mid-run; somebody edits the repository while the job waits."""
    repository, out = tmp_path / "repository", tmp_path / "out"
    copy_code(repository)
    shutil.copytree(ROOT / "slurm", repository / "slurm", dirs_exist_ok=True)
    config = repository / "mine.toml"
    tiny = (ROOT / "config" / "tiny.toml").read_text()
    config.write_text(tiny.replace("out/tiny", str(out)))
    command = [a for a in arguments(out) if "out_dir" not in a]
    job = cluster.train("mine.toml", *command, root=repository)
    wait_saved(out)
    cluster.call("scontrol", "requeue", job)
    for name in ("rocket.py", "attempts.py", "config.py"):
        (repository / name).write_text('raise SystemExit("somebody edits this")\n')
    config.write_text(tiny.replace("out/tiny", str(tmp_path / "next")))
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    assert_finished(out, undisturbed[1])
    assert not (tmp_path / "next").exists()
    assert f"finished at step {STEPS}" in (out / "logs" / f"train-{job}.log").read_text()


def test_signal_to_the_batch_shell(cluster, arguments, undisturbed, tmp_path):
    job = cluster.train(*arguments(tmp_path), flags="--nodes=2")
    wait_saved(tmp_path)
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in agents(tmp_path)]
    meeting = {tuple(re.findall(r"is_host=(\d)\0--local-addr=(\w+)", c)[0]) for c in commands}
    # said by name and number, since both nodes of this Slurm are one host
    assert meeting == {("1", "slurmn1"), ("0", "slurmn2")}
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    assert "comes back: stopped, signal" in cluster.log(job)
    assert_finished(tmp_path, undisturbed[2])


def test_preemption(cluster, arguments, undisturbed, tmp_path):
    job = cluster.train(*arguments(tmp_path), flags="--nodelist=slurmn1")
    wait_saved(tmp_path)
    urgent = ["--partition=urgent", "--nodelist=slurmn1", "--exclusive", "--output=/dev/null"]
    cluster.call("sbatch", "--parsable", *urgent, "--wrap=true")
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    assert_finished(tmp_path, undisturbed[1])


@pytest.mark.parametrize("nodes", [1, 2])
def test_killed_worker(nodes, cluster, arguments, undisturbed, tmp_path):
    job = cluster.train(*arguments(tmp_path), flags=f"--nodes={nodes}")
    wait_saved(tmp_path)
    os.kill(workers(tmp_path)[-1], signal.SIGKILL)
    found = cluster.end(job)
    assert found["JobState"] == "COMPLETED"
    if nodes == 1:  # nobody was left to write a status; the allocation is still good
        assert "another attempt" in cluster.log(job)
        assert found["Restarts"] == "0"
    assert_finished(tmp_path, undisturbed[nodes])


def wait_trains(out: Path, step: int = 0) -> None:
    """Returns when a run has trained beyond a step in its present start."""
    trained = lambda: any(row["step"] > step for row in rows(out))  # noqa: E731
    wait_until(lambda: workers(out) and (out / "metrics.jsonl").exists() and trained(), "step")


@pytest.mark.parametrize("nodes", [1, 2])
def test_killed_before_a_new_checkpoint(nodes, cluster, arguments, undisturbed, tmp_path):
    """A checkpoint at step 60, the next far away, and a worker dies in between."""
    stopped = cluster.train(*arguments(tmp_path, train__stop_at_step=60), flags=f"--nodes={nodes}")
    assert cluster.end(stopped)["JobState"] == "COMPLETED"
    far = arguments(tmp_path, checkpoint__interval=0)
    job = cluster.train(*far, flags=f"--nodes={nodes}")
    wait_trains(tmp_path, 65)
    os.kill(workers(tmp_path)[-1], signal.SIGKILL)
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    assert "comes back" in cluster.log(job)
    assert_finished(tmp_path, undisturbed[nodes])


def test_a_signal_that_srun_loses(cluster, arguments, undisturbed, tmp_path):
    """It comes while the first attempt's srun starts, which then ignores it."""
    lossy = tmp_path / "bin" / "srun"
    lossy.parent.mkdir()
    note = tmp_path / "run" / "logs" / "signal.*"
    lossy.write_text(
        '#!/bin/bash\ntrap "" USR1\n'
        'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then\n'
        '    kill -USR1 "$PPID"\n'
        f"    until compgen -G '{note}' >/dev/null; do sleep 0.05; done\n"
        "fi\n"
        f'exec {shutil.which("srun")} "$@"\n'
    )
    lossy.chmod(0o755)
    path = f"{lossy.parent}:{cluster.environment['PATH']}"
    job = cluster.train(*arguments(tmp_path / "run"), PATH=path)
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    assert "comes back: ended before training began" in cluster.log(job)
    assert_finished(tmp_path / "run", undisturbed[1])


def test_attempts_without_progress_end(cluster, arguments, tmp_path):
    """A signal in each start-up, as a limit sends that is shorter than it: twice, and no more."""
    job = cluster.train(*arguments(tmp_path, train__max_attempts=2))
    for restart in range(2):
        wait_until(lambda r=restart: f"restart {r}," in cluster.log(job), f"start {restart}")
        cluster.call("scancel", "--batch", "--signal=USR1", job)
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "1")
    assert "2 attempts in a row without a new checkpoint" in cluster.log(job)
    assert (status(tmp_path)["state"], status(tmp_path)["requeue"]) == ("failed", False)
    assert "2 attempts in a row" in status(tmp_path)["why"]
    again = cluster.train(*arguments(tmp_path, train__stop_at_step=5))  # a person asks for it
    assert cluster.end(again)["JobState"] == "COMPLETED"


def test_a_sick_node_is_left_out(cluster, arguments, tmp_path):
    """Two workers die on it before anything is saved; the third attempt is elsewhere."""
    job = cluster.train(*arguments(tmp_path))
    for restart in range(2):
        wait_until(lambda r=restart: f"restart {r}," in cluster.log(job), f"start {restart}")
        found = wait_until(lambda: workers(tmp_path), "worker")
        assert cluster.job(job)["NodeList"] == "slurmn1"
        os.kill(found[0], signal.SIGKILL)
        wait_until(lambda: not workers(tmp_path), "death")
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"], found["NodeList"]) == (
        "COMPLETED",
        "2",
        "slurmn2",
    )
    assert found["ExcNodeList"] == "slurmn1"
    assert "rank 0 on slurmn1 was killed by SIGKILL" in cluster.log(job)
    assert "does without slurmn1" in cluster.log(job)


def test_a_sick_node_that_is_needed_stays(cluster, arguments, undisturbed, tmp_path):
    job = cluster.train(*arguments(tmp_path), flags="--nodes=2")
    for restart in range(2):
        wait_until(lambda r=restart: f"restart {r}," in cluster.log(job), f"start {restart}")
        wait_until(lambda: len(workers(tmp_path)) == 2, "workers")
        os.kill(workers(tmp_path, "slurmn2")[0], signal.SIGKILL)
        wait_until(lambda: not workers(tmp_path), "death")
    found = cluster.end(job)
    assert (found["JobState"], found["ExcNodeList"]) == ("COMPLETED", "(null)")
    assert "slurmn2: sick, but there are too few nodes to do without" in cluster.log(job)
    assert_finished(tmp_path, undisturbed[2])


def test_a_sick_node_that_was_asked_for_stays(cluster, arguments, tmp_path):
    """Without it the job would wait for ever."""
    job = cluster.train(*arguments(tmp_path), flags="--nodelist=slurmn2")
    for restart in range(2):
        wait_until(lambda r=restart: f"restart {r}," in cluster.log(job), f"start {restart}")
        os.kill(wait_until(lambda: workers(tmp_path), "worker")[0], signal.SIGKILL)
        wait_until(lambda: not workers(tmp_path), "death")
    found = cluster.end(job)
    assert (found["JobState"], found["ExcNodeList"]) == ("COMPLETED", "(null)")
    assert "slurmn2: sick, but there are too few nodes to do without" in cluster.log(job)


def test_requeues_by_slurm_are_bounded_too(cluster, arguments, tmp_path):
    """A node is lost in each start-up, and each time Slurm requeues the job by itself."""
    job = cluster.train(*arguments(tmp_path, train__max_attempts=2), flags="--nodes=2")
    for restart in range(2):
        wait_until(lambda r=restart: f"restart {r}," in cluster.log(job), f"start {restart}")
        wait_until(lambda: len(workers(tmp_path)) == 2, "workers")
        cluster.call("scontrol", "update", "NodeName=slurmn2", "State=DOWN", "Reason=lost")
        wait_until(lambda: not workers(tmp_path), "end of the attempt")
        with contextlib.suppress(AssertionError):  # it answers, and may have come back by itself
            cluster.call("scontrol", "update", "NodeName=slurmn2", "State=RESUME")
    found = cluster.end(job)
    assert found["JobState"] == "CANCELLED"
    assert "not requeued: 2 attempts in a row" in cluster.log(job)
    assert not status(tmp_path)["requeue"]


def test_a_killed_srun_leaves_no_rank_to_train_beside_the_next(
    cluster, arguments, undisturbed, tmp_path
):
    job = cluster.train(*arguments(tmp_path))
    wait_saved(tmp_path)
    ranks = workers(tmp_path)
    subprocess.run(["pkill", "-KILL", "-f", f"^srun .*{tmp_path}"], check=True)
    wait_until(lambda: not set(ranks) & set(workers(tmp_path)), "end of the rank")
    found = cluster.end(job)
    assert found["JobState"] == "COMPLETED"
    assert_finished(tmp_path, undisturbed[1])


def test_a_node_lost_during_start_up(cluster, arguments, undisturbed, tmp_path):
    """Slurm itself requeues the job; where its agent alone dies, train.sh does."""
    job = cluster.train(*arguments(tmp_path), flags="--nodes=2")
    wait_until(lambda: len(workers(tmp_path)) == 2, "workers")
    cluster.call("scontrol", "update", "NodeName=slurmn2", "State=DOWN", "Reason=lost")
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "requeue")
    with contextlib.suppress(AssertionError):  # it answers, and may have come back by itself
        cluster.call("scontrol", "update", "NodeName=slurmn2", "State=RESUME")
    wait_until(lambda: "restart 1," in cluster.log(job), "restart")
    agent = wait_until(lambda: agents(tmp_path), "agent")[-1]
    os.kill(agent, signal.SIGKILL)
    found = cluster.end(job, timeout=240)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "2")
    assert_finished(tmp_path, undisturbed[2])


def test_cancelled_for_good(cluster, arguments, tmp_path):
    job = cluster.train(*arguments(tmp_path))
    wait_saved(tmp_path)
    cluster.call("scancel", job)
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == ("stopped", "signal")
    step = status(tmp_path)["step"]
    assert (tmp_path / "checkpoints" / f"step_{step:08d}").exists()
    assert "not requeued" in cluster.log(job)
    assert not status(tmp_path)["requeue"]


def test_stop_file_is_the_end(cluster, arguments, tmp_path):
    job = cluster.train(*arguments(tmp_path))
    wait_saved(tmp_path)
    (tmp_path / "STOP").touch()
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0")
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == ("stopped", "stop_file")


def test_user_mistakes_are_not_tried_again(cluster, arguments, tmp_path):
    unknown = cluster.train(*arguments(tmp_path, train__sed=1))
    nowhere = cluster.train(*arguments(tmp_path, data__dir=tmp_path / "nowhere"))
    for job, message in ((unknown, "unknown key train.sed"), (nowhere, "nowhere")):
        found = cluster.end(job)
        assert (found["JobState"], found["Restarts"]) == ("FAILED", "0")
        assert len(re.findall(f"error: .*{message}", cluster.log(job))) == 1
    assert (status(tmp_path)["state"], status(tmp_path)["requeue"]) == ("failed", False)


def test_successor_where_requeueing_is_forbidden(cluster, arguments, undisturbed, tmp_path):
    flags = "--no-requeue --nodes=2 --time=7 --job-name=mine"
    job = cluster.train(*arguments(tmp_path), flags=flags)
    wait_saved(tmp_path)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert cluster.end(job)["JobState"] == "COMPLETED"
    successor = re.findall(r"train\.sh: job (\d+)$", cluster.log(job), re.MULTILINE)[-1]
    found = cluster.end(successor)
    assert found["JobState"] == "COMPLETED"
    assert (found["JobName"], found["TimeLimit"]) == ("mine", "00:07:00")
    assert found["NumNodes"] == "2"
    assert_finished(tmp_path, undisturbed[2])


def test_another_number_of_nodes(cluster, arguments, undisturbed, tmp_path):
    """Two nodes, one, two, across requeues."""
    job = cluster.train(*arguments(tmp_path), flags="--nodes=2")
    for restarts, nodes in ((0, 1), (1, 2)):
        seen = set(tmp_path.glob("checkpoints/step_????????"))
        new = lambda seen=seen: set(tmp_path.glob("checkpoints/step_????????")) - seen  # noqa: E731
        wait_until(new, "new checkpoint")
        assert cluster.job(job)["Restarts"] == str(restarts)
        cluster.call("scontrol", "requeue", job)
        wait_until(lambda: cluster.job(job)["JobState"] == "PENDING", "pending job")
        cluster.call("scontrol", "update", f"JobId={job}", f"NumNodes={nodes}")
    found = cluster.end(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "2")
    worlds = re.findall(r"ddp on (\d) × cpu", cluster.log(job))
    assert worlds == ["2", "1", "2"]
    assert status(tmp_path)["state"] == "finished"
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, STEPS + 1))
    assert losses(tmp_path) == pytest.approx(losses(undisturbed[2]), abs=1e-4)


def test_pipeline(cluster, arguments, tmp_path):
    """Tokenizer, dataset by an array of tasks, training, and a sample of the model."""
    stdlib = Path(os.__file__).parent
    out, data = tmp_path / "out", tmp_path / "data"
    keys = {
        "tokenizer__path": tmp_path / "tokenizer.model",
        "tokenizer__sample_bytes": 300_000,
        "data__sources": f'["{stdlib / "json"}","{stdlib / "email"}"]',
        "data__dir": data,
        "data__part_bytes": 50_000,
        "data__val_fraction": 0.2,
        "train__max_steps": 20,
    }
    # submitted from elsewhere, so that the output lands there
    pipeline = ROOT / "slurm" / "pipeline.sh"
    job = cluster.call(pipeline, *arguments(out, **keys), cwd=tmp_path, TASKS="2")
    assert cluster.end(job)["JobState"] == "COMPLETED"
    assert status(out)["state"] == "finished"
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("slurm-*.out")))
    assert "task 0/2" in logs
    assert "task 1/2" in logs
    command = [ROOT / "slurm" / "sample.sh", out, "--prompt=import", "--max-tokens=5"]
    sample = cluster.call(*command, cwd=tmp_path)
    assert cluster.end(sample)["JobState"] == "COMPLETED"
    assert "import" in (tmp_path / f"slurm-{sample}.out").read_text()


def test_sweep(cluster, arguments, tmp_path):
    varied = ["optimizer.learning_rate=1e-4,3e-3", "train.seed=1,2"]
    command = [ROOT / "slurm" / "sweep.sh", ROOT / "config" / "tiny.toml", *varied]
    fixed = arguments(tmp_path / "run", train__max_steps=20)
    fixed = [a for a in fixed if not a.startswith("--optimizer.learning_rate")]
    *outs, job = cluster.call(*command, *fixed, cwd=tmp_path).splitlines()
    names = [f"run-learning_rate_{r}-seed_{s}" for r in ("1e-4", "3e-3") for s in (1, 2)]
    assert outs == [str(tmp_path / name) for name in names]
    wait_until(lambda: not cluster.call("squeue", "-h", "-j", job), "end of the sweep")
    assert all(status(Path(out))["state"] == "finished" for out in outs)
    assert len({tuple(losses(Path(out))) for out in outs}) == 4


def test_ladder(cluster, arguments, tmp_path):
    """An array for the longest run of each size, others for the branches; then the fit."""
    out = tmp_path / "ladder"
    command = [*arguments(tmp_path / "run", checkpoint__interval=0), f"--out={out}"]
    config = load_config(command[:-1], usage="")[0]
    speed = rungs.Speed(3.0, 0.002, 5e10)
    plan = rungs.Ladder(
        out, rungs.base_config(config, 4), [32, 64, 96], 20, 3, 1, 1, speed, 1.0, 0.25
    )
    rungs.write_plan(plan)
    last = int(cluster.call(ROOT / "slurm" / "ladder.sh", *command, cwd=tmp_path))
    jobs = ",".join(map(str, range(last - 2, last + 1)))
    wait_until(lambda: not cluster.call("squeue", "-h", "-j", jobs), "end of the ladder", 500)
    cluster.call(sys.executable, "tools/ladder.py", *command, "--fit")
    assert len(law.read_fit(out / "fit.json").rungs) == plan.count() == 7


def test_array_task_comes_back_alone(cluster, arguments, tmp_path):
    """The SLURM_JOB_ID of one task is the array's: its requeue must not touch the others."""
    tasks = [f"--train.out_dir={tmp_path / name} --train.max_steps={STEPS}" for name in "ab"]
    job = cluster.train(*arguments(tmp_path), "--", *tasks, flags="--array=0-1")
    for name in "ab":
        wait_saved(tmp_path / name)
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_1")  # its SLURM_JOB_ID is `job`
    for name, restarts in (("a", 0), ("b", 1)):
        out = tmp_path / name
        finished = lambda out=out: status(out)["state"] == "finished"  # noqa: E731
        wait_until(finished, f"end of {out}")
        assert status(out)["restart_count"] == restarts
        assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, STEPS + 1))


def test_time_limit(cluster, arguments, tmp_path):
    """A minute is never enough: the run stops in time by its own clock, and comes back."""
    keys = {"train__max_steps": 1_000_000, "train__log_interval": 10, "checkpoint__interval": 500}
    keys |= {"train__eval_interval": 0}
    outs = [tmp_path / "limited", tmp_path / "unlimited"]
    # without the signal, which Slurm sends up to a minute early
    flags = ["--time=1 --signal=B:USR1@0 --nodelist=slurmn1", "--nodelist=slurmn2"]
    jobs = [
        cluster.train(*arguments(out, **keys), flags=f) for out, f in zip(outs, flags, strict=True)
    ]
    comes_back = "comes back: stopped, deadline"
    wait_until(lambda: comes_back in cluster.log(jobs[0]), "end of the first try")
    stopped = status(outs[0])["step"]
    for job, out in zip(jobs, outs, strict=True):
        step = lambda out=out: max(row["step"] for row in rows(out))  # noqa: E731
        wait_until(lambda step=step: step() > stopped + 50, "step beyond the stop")
        (out / "STOP").touch()
        assert cluster.end(job)["JobState"] == "COMPLETED"
    assert int(cluster.job(jobs[0])["Restarts"]) >= 1
    limited, unlimited = (losses(out) for out in outs)
    common = min(len(limited), len(unlimited))
    assert 10 * common > stopped + 50
    assert limited[:common] == unlimited[:common]


@pytest.mark.torture
def test_thirty_attempts_each_killed(cluster, arguments, undisturbed, tmp_path):
    """A worker or an agent, at a random second; the ends of rank 0 and 1 within 10 ms."""
    seed, steps = random.SystemRandom().randrange(10**6), 3000
    print("seed", seed)
    rng = random.Random(seed)
    keys = {"train__max_steps": steps, "checkpoint__interval": 50, "train__eval_interval": 500}
    keys |= {"train__log_interval": 1, "train__max_attempts": 30}
    reference, out = tmp_path / "reference", tmp_path / "killed"
    assert cluster.end(cluster.train(*arguments(reference, **keys), flags="--nodes=2"), 600)
    job = cluster.train(*arguments(out, **keys), flags="--nodes=2 --time=3:00:00")
    over = lambda: cluster.job(job)["JobState"] in TERMINAL  # noqa: E731
    for _ in range(30):
        wait_until(lambda: over() or len(agents(out)) == 2, "attempt", 400)
        time.sleep(rng.uniform(0, 12))
        found = (workers(out) if rng.random() < 0.7 else []) or agents(out)
        victims = found if rng.random() < 0.2 else rng.sample(found, min(1, len(found)))
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        if over():
            break
        wait_until(
            lambda seen=found: over() or not set(seen) & set(agents(out) + workers(out)), "end", 400
        )
    assert cluster.end(job, 600)["JobState"] == "COMPLETED"
    assert status(out)["state"] == "finished"
    assert_identical(out, reference)
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, steps + 1))
