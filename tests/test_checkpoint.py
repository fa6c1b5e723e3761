"""Protects checkpoints: one flipped or missing byte is refused, saving is all or nothing, in
the background too, and pruning keeps what it must."""

import json
import os
import random
import shutil

import pytest
import torch
from torch import nn

import checkpoint
from checkpoint import (
    Checkpoint,
    Saver,
    checkpoint_paths,
    find_checkpoint,
    find_resumable,
    load_optimizer,
    load_weights,
    prune_checkpoints,
    remove_leftovers,
)
from config import CheckpointConfig, Config, UserError
from distributed import init_distributed, shut_down


@pytest.fixture(scope="module")
def world():
    """A world of one, as plain python makes it."""
    os.environ.pop("RANK", None)
    config = Config()
    config.train.device = "cpu"
    yield init_distributed(config)
    shut_down()


def trained(seed=0, width=6):
    """A small module whose optimizer has taken a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def saver_of(run, world, seed=0, **options):
    model, optimizer = trained(seed)
    config = CheckpointConfig(keep_last=100, keep_best=100, **options)
    return Saver(run, model, optimizer, config, lambda: None, world)


def save(run, step, world, seed=0, val_loss=None):
    saver = saver_of(run, world, seed)
    saver.save(step, {"state": {"val_loss": val_loss}})
    return saver.model, saver.optimizer


def test_a_round_trip_is_exact(tmp_path, world):
    model, optimizer = save(tmp_path, 3, world, seed=1)
    found = find_checkpoint(tmp_path)
    other, other_optimizer = trained(seed=2)
    load_weights(other, found)
    load_optimizer(other, other_optimizer, found)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        a, b = optimizer.state[ours], other_optimizer.state[theirs]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_rows_are_cut_from_the_middle(tmp_path, world):
    model, _ = save(tmp_path, 3, world)
    rows = find_checkpoint(tmp_path).tensor("model", "0.weight", 2, 3)
    assert torch.equal(rows, model[0].weight[2:5])


def test_every_byte_counts(tmp_path, world):
    """A random flipped byte, or a random cut, in each file: never accepted, the one before is."""
    for step in (1, 2):
        save(tmp_path / "run", step, world)
    original = checkpoint_paths(tmp_path / "run")[0]
    generator, trials = random.Random(0), 0
    for file in sorted(original.iterdir()):
        content = file.read_bytes()
        for trial in range(70):
            damaged = bytearray(content)
            place = generator.randrange(len(content))
            if trial % 2:
                damaged[place] ^= generator.randrange(1, 256)
            else:
                del damaged[place:]
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=file.name):
                Checkpoint(original).verify()
            assert find_resumable(tmp_path / "run", world).step == 1
            trials += 1
        file.write_bytes(content)
    assert trials == 210
    assert find_resumable(tmp_path / "run", world).step == 2


def test_the_newest_that_verifies_is_found(tmp_path, world, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step, world, seed=step)
    newest = checkpoint_paths(tmp_path)[0]
    (newest / "model-00000.bin").unlink()
    assert find_checkpoint(tmp_path).step == 2
    assert str(newest) in capsys.readouterr().err
    shutil.rmtree(checkpoint_paths(tmp_path)[1])
    (checkpoint_paths(tmp_path)[1] / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint verifies"):
        find_checkpoint(tmp_path)


def test_best_is_by_validation_loss(tmp_path, world):
    for step, val_loss in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5)):
        save(tmp_path, step, world, val_loss=val_loss)
    assert find_checkpoint(tmp_path, "best").step == 2
    assert find_checkpoint(tmp_path, "last").step == 4


def test_pruning(tmp_path, world):
    """The last two whole, the best one's weights; what resuming skipped is not counted."""
    for step, val_loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, None), (5, 4.0), (9, None)):
        save(tmp_path, step, world, val_loss=val_loss)
    prune_checkpoints(tmp_path, 5, CheckpointConfig(keep_last=2, keep_best=1))
    kept = {c.step: c.has_optimizer for c in map(Checkpoint, checkpoint_paths(tmp_path))}
    assert kept == {2: False, 4: True, 5: True, 9: True}
    find_checkpoint(checkpoint_paths(tmp_path)[-1])  # still verifies without its optimizer
    assert not list((tmp_path / "checkpoints" / "step_00000002").glob("optimizer*"))


def test_pruning_never_counts_what_is_damaged(tmp_path, world):
    for step in (1, 2):
        save(tmp_path, step, world)
    (checkpoint_paths(tmp_path)[0] / "manifest.json").write_text("{}")
    prune_checkpoints(tmp_path, 2, CheckpointConfig(keep_last=1, keep_best=0))
    assert find_checkpoint(tmp_path).step == 1


def test_a_failed_save_leaves_what_was_there(tmp_path, world, monkeypatch):
    """The disk says no in the middle: a line with directory and space, nothing half-done."""
    save(tmp_path, 1, world)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(UserError, match=r"step_00000002.*No space left.*needs .* GB"):
        save(tmp_path, 2, world)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path).step == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_what_a_kill_leaves_is_no_checkpoint(tmp_path, world):
    save(tmp_path, 1, world)
    shutil.copytree(checkpoint_paths(tmp_path)[0], tmp_path / "checkpoints" / "step_00000002.tmp")
    assert find_checkpoint(tmp_path).step == 1
    remove_leftovers(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_saving_a_step_again_replaces_it(tmp_path, world):
    save(tmp_path, 1, world, seed=1)
    model, _ = save(tmp_path, 1, world, seed=2)
    assert torch.equal(find_checkpoint(tmp_path).tensor("model", "0.weight"), model[0].weight)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_weights_of_another_shape_are_refused(tmp_path, world):
    save(tmp_path, 1, world)
    with pytest.raises(UserError, match=r"0\.weight does not have the shape \[7, 4\]"):
        load_weights(trained(width=7)[0], find_checkpoint(tmp_path))


def test_the_background_saves_what_was_when_it_began(tmp_path, world):
    """Training goes on while it writes; the next save waits for it."""
    saver = saver_of(tmp_path, world, asynchronous=True)
    for step in (1, 2, 3):
        before = saver.model[0].weight.clone()
        saver.save(step, {"state": {"val_loss": None}})
        with torch.no_grad():
            saver.model[0].weight.add_(1)
        saver.wait()
        assert torch.equal(find_checkpoint(tmp_path).tensor("model", "0.weight"), before)


def test_a_save_that_fails_in_the_background_is_heard_of(tmp_path, world, monkeypatch):
    saver = saver_of(tmp_path, world, asynchronous=True)
    saver.save(1, {"state": {"val_loss": None}})
    saver.wait()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    saver.save(2, {"state": {"val_loss": None}})
    with pytest.raises(UserError, match=r"step_00000002.*No space left"):
        saver.wait()
    monkeypatch.undo()
    assert find_checkpoint(tmp_path).step == 1
    saver.save(3, {"state": {"val_loss": None}})
    saver.wait()
    assert find_checkpoint(tmp_path).step == 3


def test_a_later_evaluation_amends_the_newest(tmp_path, world):
    saver = saver_of(tmp_path, world)
    saver.save(1, {"state": {"val_loss": None}})
    saver.amend(1, {"val_loss": 2.5})
    found = find_checkpoint(tmp_path)
    found.verify()
    assert found.val_loss == 2.5


def test_the_manifest_is_plain_json(tmp_path, world):
    save(tmp_path, 7, world)
    manifest = json.loads((checkpoint_paths(tmp_path)[0] / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert ["0.weight", [6, 4]] in manifest["tensors"]["model"]
