"""Checkpoints that never lie: written aside, synced, checksummed, renamed; verified before use.

A checkpoint is a directory of raw little-endian float32 arrays beside one manifest.json:

    step_00001000/manifest.json        what there is and where, every file's digest and its own
    step_00001000/model-00003.bin      the rows of the weights that rank 3 held
    step_00001000/optimizer-00003.bin  the same of the optimizer state

Loading never executes anything, needs no process group, and cuts the rows for any other sharding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import (
    CheckpointConfig,
    Config,
    UserError,
    build_config,
    file_sha256,
    sync_directory,
    write_atomically,
)
from distributed import AgreedError, World, local_part, writes

FORMAT_VERSION = 1
GROUPS = ("model", "optimizer")
# The manifest begins {"digest": "<64 hex digits>", and the digest covers every other byte of it.
DIGEST_AT, UNSEALED = slice(12, 76), b"0" * 64


class Checkpoint:
    """A checkpoint on disk: the manifest is read and checked, tensors are mapped on demand.

    Raises:
        UserError: the manifest is missing, damaged or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path / "manifest.json")
        self.step: int = self.manifest["step"]
        self.state: dict[str, Any] = self.manifest["state"]
        self.has_optimizer = "optimizer" in self.manifest["tensors"]
        self._pieces: dict[tuple[str, str], list[tuple[str, int, int, int]]] = {}
        for file in self.manifest["files"]:
            tensors, offset = self.manifest["tensors"][file["group"]], 0
            for index, start, rows in file["pieces"]:
                name, shape = tensors[index]
                piece = (file["name"], offset, start, rows)
                self._pieces.setdefault((file["group"], name), []).append(piece)
                offset += 4 * rows * math.prod(shape[1:])

    @property
    def config(self) -> Config:
        """The configuration that the run had when it saved this."""
        return build_config(self.manifest["config"])

    @property
    def val_loss(self) -> float:
        """Validation loss in nats a token at this step; infinite if it was not evaluated."""
        return math.inf if self.state["val_loss"] is None else self.state["val_loss"]

    def verify(self, rank: int = 0, ranks: int = 1, groups: tuple[str, ...] = GROUPS) -> None:
        """Hashes this rank's share of the groups' files; UserError names one that is damaged."""
        files = [file for file in self.manifest["files"] if file["group"] in groups]
        for file in files[rank::ranks]:
            path = self.path / file["name"]
            try:
                matches = file_sha256(path) == file["sha256"]
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            if not matches:
                raise UserError(f"{path}: does not match its checksum")

    def shapes(self, group: str) -> dict[str, list[int]]:
        """Name to shape of the tensors of a group, "model" or "optimizer"."""
        return dict(self.manifest["tensors"][group])

    def tensor(self, group: str, name: str, start: int = 0, rows: int | None = None) -> Tensor:
        """Rows start … start + rows of a float32 tensor; all rows by default.

        Mapped from its file, copy-on-write, where one file holds all of them; else put together.
        """
        shape = self.shapes(group)[name]
        length = shape[0] if shape else 1
        stop = length if rows is None else start + rows
        parts = []
        for file, offset, first, count in sorted(self._pieces[group, name], key=lambda p: p[2]):
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                offset += 4 * (low - first) * math.prod(shape[1:])
                size = (high - low, *shape[1:])
                parts.append(
                    np.memmap(self.path / file, "<f4", mode="c", offset=offset, shape=size)
                )
        if not parts:
            return torch.empty(0, *shape[1:])
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return torch.from_numpy(whole).view(shape if stop - start == length else [-1, *shape[1:]])


def checkpoint_paths(run: Path) -> list[Path]:
    """The directories of a run's checkpoints, newest first, whether they verify or not."""
    return sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)


def find_checkpoint(path: Path, which: str = "last") -> Checkpoint:
    """The "best" or "last" checkpoint of a run directory, or the one at path; its weights verified.

    Best is the lowest validation loss. One that does not verify is passed over, aloud.

    Raises:
        UserError: there is none, or none that verifies.
    """
    path = path.resolve()
    if re.fullmatch(r"step_\d{8}", path.name) and not (path / "checkpoints").exists():
        checkpoint = Checkpoint(path)
        checkpoint.verify(groups=("model",))
        return checkpoint
    found, damaged = [], []
    for candidate in checkpoint_paths(path):
        try:
            found.append(Checkpoint(candidate))
        except UserError as error:
            damaged.append(str(error))
    if which == "best":
        found.sort(key=lambda checkpoint: checkpoint.val_loss)
    for checkpoint in found:
        try:
            checkpoint.verify(groups=("model",))
        except UserError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            print(f"passed over: {message}", file=sys.stderr)
        return checkpoint
    if damaged:
        raise UserError(f"{path}: no checkpoint verifies: {'; '.join(damaged)}")
    raise UserError(f"{path}: no checkpoint here; give a run directory or a checkpoint of one")


def find_resumable(run: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint that verifies and holds the optimizer; None if the run has none yet.

    One rank reads each manifest and hands it on; all share the hashing.

    Raises:
        UserError: there are checkpoints and none can be resumed. Never a silent start from 0.
    """
    paths = world.once(lambda: checkpoint_paths(run))
    for path in paths:
        try:
            checkpoint = world.once(lambda path=path: Checkpoint(path))
            if not checkpoint.has_optimizer:
                continue
            world.each(lambda found=checkpoint: found.verify(world.rank, world.size))
        except AgreedError as error:
            if world.rank == 0:
                print(f"passed over: {error}", file=sys.stderr)
        else:
            return checkpoint
    if paths:
        raise AgreedError(
            f"{run}: no checkpoint verifies with its optimizer state, and training does not restart"
            " from 0 by itself; restore one, or start a new run (train.init_from takes weights)"
        )
    return None


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
    world: World,
) -> None:
    """Saves a checkpoint; it exists only once all of it is durable. Every rank must call this.

    Args:
        record: what the manifest holds beside the tensors: state, config, versions, …

    Raises:
        UserError: on every rank, if one could not write; what existed before is intact.
    """
    final = run / "checkpoints" / f"step_{step:08d}"
    temporary = final.with_suffix(".tmp")
    groups = {"model": model_tensors(model), "optimizer": optimizer_tensors(model, optimizer)}

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> list[dict[str, Any]]:
        files = (_write_group(temporary, group, groups[group], world) for group in groups)
        return [file for file in files if file["pieces"]]

    def commit() -> None:
        tensors = {
            group: [[name, list(tensor.shape)] for name, tensor in named.items()]
            for group, named in groups.items()
        }
        manifest = {"version": FORMAT_VERSION, "step": step, **record, "tensors": tensors}
        manifest["files"] = [file for of_rank in files for file in of_rank]
        _write_manifest(temporary / "manifest.json", manifest)
        replaced = final.exists()  # did not verify, or weights alone: this run passed it over
        if replaced:
            final.replace(_aside(final))
        temporary.replace(final)
        sync_directory(final.parent)
        if replaced:
            remove_leftovers(run)

    size = 4 * sum(tensor.numel() for named in groups.values() for tensor in named.values())
    try:
        world.once(lambda: _explained(begin, final, size))
        files = world.each(lambda: _explained(write, final, size))
        world.once(lambda: _explained(commit, final, size))
    except AgreedError:
        world.once(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise


def _explained(function: Any, path: Path, size: int) -> Any:
    try:
        return function()
    except OSError as error:
        try:
            free = f"{shutil.disk_usage(path.parent).free / 1e9:.3f} GB are free"
        except OSError:
            free = "the directory can't be read"
        raise UserError(
            f"{path}: could not be saved: {error.strerror}; it needs {size / 1e9:.3f} GB, {free}."
            " What was saved before is intact"
        ) from None


def _write_group(
    directory: Path, group: str, tensors: dict[str, Tensor], world: World
) -> dict[str, Any]:
    """Writes the rows that this rank saves of a group into one file, hashed on the way."""
    name = f"{group}-{world.rank:05d}.bin"
    pieces, digest = [], hashlib.sha256()
    with open(directory / name, "wb") as file:
        for index, tensor in enumerate(tensors.values()):
            rows, start = local_part(tensor.detach())
            if not writes(tensor, index, world) or not rows.numel():
                continue
            assert rows.dtype == torch.float32, "master weights and optimizer state are float32"
            rows = rows.cpu().contiguous().reshape(rows.shape or (1,))
            content = memoryview(rows.numpy()).cast("B")
            file.write(content)
            digest.update(content)
            pieces.append([index, start, len(rows)])
        file.flush()
        os.fsync(file.fileno())
    if not pieces:
        (directory / name).unlink()
    return {"name": name, "group": group, "sha256": digest.hexdigest(), "pieces": pieces}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name to parameter; tied ones once."""
    return dict(model.named_parameters())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`parameter/state` to tensor, in the order of the parameters."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in sorted(optimizer.state[parameter].items())
    }


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint, new_rows: int = 0) -> None:
    """Copies the weights into a model, each rank reading only the rows that it holds.

    Args:
        new_rows: tokens that the model has more than the checkpoint; their rows start as the mean.

    Raises:
        UserError: a parameter is missing, left over or of another shape.
    """
    shapes = checkpoint.shapes("model")
    for name, parameter in model.named_parameters():
        grows = new_rows if name in ("model.embed_tokens.weight", "lm_head.weight") else 0
        shape = list(parameter.shape)
        if shapes.pop(name, None) != [shape[0] - grows, *shape[1:]]:
            raise UserError(f"{checkpoint.path}: its {name} does not have the shape {shape}")
        rows, start = local_part(parameter)
        if grows:
            old = checkpoint.tensor("model", name)
            grown = torch.cat((old, old.mean(dim=0, keepdim=True).expand(grows, -1)))
            rows.copy_(grown[start : start + len(rows)])
        else:
            rows.copy_(checkpoint.tensor("model", name, start, len(rows)))
    if shapes:
        raise UserError(f"{checkpoint.path}: weights that this model lacks: {', '.join(shapes)}")


@torch.no_grad()
def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> None:
    """Restores the optimizer's state, each rank reading only the rows that it holds."""
    parameters = dict(model.named_parameters())
    for name, shape in checkpoint.shapes("optimizer").items():
        owner, _, key = name.rpartition("/")
        parameter = parameters[owner]
        sharded_alike = shape == list(parameter.shape)
        value = (
            torch.zeros_like(parameter, requires_grad=False)
            if sharded_alike
            else torch.zeros(shape, device=parameter.device)
        )
        rows, start = local_part(value)
        rows.copy_(checkpoint.tensor("optimizer", name, start, len(rows) if shape else 1))
        optimizer.state[parameter][key] = value


def prune_checkpoints(run: Path, newest: int, config: CheckpointConfig) -> None:
    """Keeps the last checkpoints up to step newest whole and the best ones' weights.

    Steps beyond newest are those that resuming passed over: they don't count, and stay.
    """
    found = [c for c in readable_checkpoints(run) if c.step <= newest]
    evaluated = sorted((c for c in found if c.val_loss < math.inf), key=lambda c: c.val_loss)
    best = {checkpoint.path for checkpoint in evaluated[: config.keep_best]}
    for checkpoint in found[config.keep_last :]:
        if checkpoint.path not in best:
            shutil.rmtree(checkpoint.path.replace(_aside(checkpoint.path)))
        elif checkpoint.has_optimizer:
            _drop_optimizer(checkpoint)


def readable_checkpoints(run: Path) -> Iterator[Checkpoint]:
    """A run's checkpoints whose manifests are whole, newest first; their files are not hashed."""
    for path in checkpoint_paths(run):
        try:
            yield Checkpoint(path)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)


def remove_leftovers(run: Path) -> None:
    """Removes what a killed save or pruning left behind."""
    for path in (run / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(path)


def _drop_optimizer(checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    dropped = [file for file in manifest["files"] if file["group"] == "optimizer"]
    manifest["files"] = [file for file in manifest["files"] if file["group"] != "optimizer"]
    del manifest["tensors"]["optimizer"]
    _write_manifest(checkpoint.path / "manifest.json", manifest)
    for file in dropped:
        (checkpoint.path / file["name"]).unlink()


def _aside(path: Path) -> Path:
    """A name under which a directory is no checkpoint any more, whatever happens next."""
    aside = path.with_suffix(".old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    manifest = {"digest": UNSEALED.decode(), **{k: v for k, v in manifest.items() if k != "digest"}}
    content = bytearray(json.dumps(manifest).encode())
    content[DIGEST_AT] = hashlib.sha256(content).hexdigest().encode()
    write_atomically(path, bytes(content))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    digest, content[DIGEST_AT] = bytes(content[DIGEST_AT]), UNSEALED
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise UserError(f"{path}: does not match its own checksum")
    manifest = json.loads(content)
    if manifest["version"] != FORMAT_VERSION:
        raise UserError(f"{path}: format version {manifest['version']}, not {FORMAT_VERSION}")
    return manifest
