"""Protects users from the files of others: no program executes anything that a checkpoint, a run
directory or a dataset holds. Pickles are planted in the place of each file, and programs run."""

import contextlib
import os
import pickle
import shutil
import subprocess
import sys

import pytest
from training import ENVIRONMENT, ROOT, overrides, rocket, run_many

import prepare
import sample
from config import UserError
from preflight import code_files


class Planted:
    """Unpickling this makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def calls(program, arguments):
    """Runs a program's main here; how it ends does not matter."""
    with contextlib.suppress(UserError, SystemExit):
        program.main(arguments)


def test_planted_pickles_are_never_executed(dataset, tiny_tokenizer, tmp_path, capsys):
    executed = tmp_path / "executed"
    payload = pickle.dumps(Planted(executed))
    pickle.loads(payload)
    assert executed.is_dir()  # it works
    executed.rmdir()

    original = tmp_path / "run"
    done = rocket(overrides(dataset, tiny_tokenizer, original, train__stop_at_step=10))
    assert done.returncode == 0, done.stderr
    for name in ("bad_steps.jsonl", "claim.json", "STOP"):
        (original / name).touch()
    planted = [p.relative_to(original) for p in original.rglob("*") if p.is_file()]
    planted = [path for path in planted if path.parts[0] != "code"]  # code is what it is
    assert len(planted) >= 11
    runs = []
    for index, path in enumerate(planted):
        run = tmp_path / f"run{index}"
        shutil.copytree(original, run)
        (run / path).write_bytes(payload)
        runs.append(overrides(dataset, tiny_tokenizer, run, train__max_steps=11))
        calls(sample, [str(run), "--prompt=a", "--max-tokens=2"])
        for flag in ("--bad-steps", "--verify"):
            calls(prepare, [str(run / "config.toml"), flag])
    for index, path in enumerate(p for p in dataset.rglob("*") if p.is_file()):
        data = tmp_path / f"data{index}"
        shutil.copytree(dataset, data)
        (data / path.relative_to(dataset)).write_bytes(payload)
        runs.append(overrides(data, tiny_tokenizer, tmp_path / f"fresh{index}"))
        for flags in ([], ["--verify"]):
            calls(prepare, [f"--data.dir={data}", f"--tokenizer.path={tiny_tokenizer}", *flags])
    model = tmp_path / "planted.model"
    model.write_bytes(payload)
    runs.append(overrides(dataset, tiny_tokenizer, tmp_path / "t", tokenizer__path=model))
    tokenizer = [sys.executable, str(ROOT / "train_tokenizer.py"), f"--tokenizer.path={model}"]
    subprocess.run(tokenizer, env=ENVIRONMENT, capture_output=True, timeout=240)
    run_many(runs)
    assert not executed.exists()


@pytest.mark.parametrize("path", code_files().values(), ids=str)
def test_no_program_can_unpickle_a_file(path):
    text = path.read_text()
    for name in ("import pickle", "torch.load", "np.load", "allow_pickle", "marshal", "eval("):
        assert name not in text.replace(".eval(", "")
