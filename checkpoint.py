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
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    tell,
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


def _step_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


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
            tell(f"passed over: {message}")
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
                tell(f"passed over: {error}")
        else:
            return checkpoint
    if paths:
        raise AgreedError(
            f"{run}: no checkpoint verifies with its optimizer state, and training does not restart"
            " from 0 by itself; restore one, or start a new run (train.init_from takes weights)"
        )
    return None


class Saver:
    """Saves a run's checkpoints, in the background if configured, one at a time.

    It has a process group of its own, so that its ranks may agree while training goes on, and the
    slowest disk has more time than a collective of training.
    """

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: CheckpointConfig,
        still_ours: Callable[[], None],
        world: World,
    ) -> None:
        """still_ours raises a UserError when the run belongs to another job by now."""
        self.run, self.model, self.optimizer, self.config = run, model, optimizer, config
        self.still_ours, self.world = still_ours, world.aside()
        self.saved_step = -1
        self.seconds = 0.0  # that the last save took, from copies to commit
        self._buffer: Tensor | None = None  # see _copied
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way in the background."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the save in the background failed; wait() raises why."""
        return self._error is not None

    def save(self, step: int, record: dict[str, Any]) -> None:
        """Saves a checkpoint; it exists only once all of it is durable. Every rank must call this.

        In the background it returns as soon as the tensors are copied; a save before it is waited
        for.

        Args:
            record: what the manifest holds beside the tensors: state, config, versions, …

        Raises:
            UserError: on every rank, if one could not write this or the save before; what existed
                before is intact.
        """
        self.wait()
        tensors = {
            "model": model_tensors(self.model),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }
        shapes = {
            group: [[name, list(tensor.shape)] for name, tensor in named.items()]
            for group, named in tensors.items()
        }
        background = self.config.asynchronous
        pieces = {
            group: _own_pieces(list(named.values()), self.world) for group, named in tensors.items()
        }
        manifest = {"version": FORMAT_VERSION, "step": step, **record, "tensors": shapes}
        if not background:
            self._work(manifest, pieces)
            return
        pieces = self._copied(pieces)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # the copies are on their way
        # daemon: when training fails, this must not keep the process from ending
        self._thread = threading.Thread(
            target=self._work_aside, args=(manifest, pieces), daemon=True
        )
        self._thread.start()

    def _copied(self, pieces: dict[str, list[Piece]]) -> dict[str, list[Piece]]:
        """The pieces in host memory, on their way: in one buffer, which each save uses again."""
        rows = [piece.rows for of_group in pieces.values() for piece in of_group]
        if self._buffer is None:
            self._buffer = torch.empty(sum(map(torch.numel, rows)))
            if self.world.device.type == "cuda" and rows:
                weakref.finalize(self, _pin(self._buffer))
        copies = iter(self._buffer.split([one.numel() for one in rows]))

        def copied(piece: Piece) -> Piece:
            copy = next(copies).view(piece.rows.shape).copy_(piece.rows, non_blocking=True)
            return piece._replace(rows=copy)

        return {group: [copied(piece) for piece in of_group] for group, of_group in pieces.items()}

    def wait(self) -> None:
        """Waits for a save in the background; raises its error, on every rank."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Waits for a save in the background when training has failed; says if that failed too."""
        try:
            self.wait()
        except UserError as error:
            if self.world.rank == 0:
                tell(str(error))

    def amend(self, step: int, state: dict[str, Any]) -> None:
        """Replaces the state that the newest checkpoint holds: its step was evaluated later."""
        self.wait()

        def rewrite() -> None:
            checkpoint = Checkpoint(_step_path(self.run, step))
            checkpoint.manifest["state"] = state
            self.still_ours()
            _write_manifest(checkpoint.path / "manifest.json", checkpoint.manifest)

        path = _step_path(self.run, step)
        self.world.once(lambda: _explained(rewrite, path, 0))

    def _work_aside(self, manifest: dict[str, Any], pieces: dict[str, list[Piece]]) -> None:
        try:
            self._work(manifest, pieces)
        except BaseException as error:
            self._error = error

    def _work(self, manifest: dict[str, Any], pieces: dict[str, list[Piece]]) -> None:
        start = time.monotonic()
        _write_checkpoint(self.run, manifest, pieces, self.still_ours, self.world)
        self.saved_step, self.seconds = manifest["step"], time.monotonic() - start

        def prune() -> None:
            try:
                prune_checkpoints(self.run, manifest["step"], self.config)
            except OSError as error:
                raise UserError(
                    f"{error.filename or self.run}: old checkpoints can't be removed:"
                    f" {error.strerror}. What was saved is intact"
                ) from None

        self.world.once(prune)


class Piece(NamedTuple):
    """Rows of a tensor that this rank saves."""

    index: int  # of the tensor in its group
    start: int  # number of the first row
    rows: Tensor


def _pin(buffer: Tensor) -> Callable[[], Any]:
    """Pins host memory, so that a GPU copies into it beside its work; returns what undoes it.

    torch's own pinned memory comes in powers of two: up to twice a checkpoint would be held. Where
    the system does not let it be pinned, copies take longer, and nothing else changes.
    """
    cuda, start = torch.cuda.cudart(), buffer.data_ptr()
    status = cuda.cudaHostRegister(start, buffer.nbytes, 0)
    if status != cuda.cudaError.success:
        why = cuda.cudaGetErrorString(status)
        tell(
            f"{buffer.nbytes / 1e9:.1f} GB can't be pinned ({why}): saves stop training for longer"
        )
        return lambda: None
    return partial(cuda.cudaHostUnregister, start)


def _own_pieces(tensors: list[Tensor], world: World) -> list[Piece]:
    """What this rank saves of a group, by reference."""
    pieces = []
    for index, tensor in enumerate(tensors):
        rows, start = local_part(tensor.detach())
        if not writes(tensor, index, world) or not rows.numel():
            continue
        assert rows.dtype == torch.float32, "master weights and optimizer state are float32"
        pieces.append(Piece(index, start, rows))
    return pieces


def _write_checkpoint(
    run: Path,
    manifest: dict[str, Any],
    pieces: dict[str, list[Piece]],
    still_ours: Callable[[], None],
    world: World,
) -> None:
    """The commit protocol: written aside by all ranks, and renamed once everything is durable."""
    final = _step_path(run, manifest["step"])
    temporary = final.with_suffix(".tmp")

    def begin() -> None:
        still_ours()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> list[dict[str, Any]]:
        return [
            _write_group(temporary, group, of_group, world.rank)
            for group, of_group in pieces.items()
            if of_group
        ]

    def commit() -> None:
        still_ours()
        manifest["files"] = [file for of_rank in files for file in of_rank]
        _write_manifest(temporary / "manifest.json", manifest)
        replaced = final.exists()  # did not verify, or weights alone: this run passed it over
        if replaced:
            final.replace(_aside(final))
        temporary.replace(final)
        sync_directory(final.parent)
        if replaced:
            remove_leftovers(run)

    shapes = [shape for group in manifest["tensors"].values() for _, shape in group]
    size = 4 * sum(map(math.prod, shapes))
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


def write_weights(
    path: Path, record: dict[str, Any], weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes a checkpoint of weights alone, without a process group, a tensor at a time in memory.

    It does not replace one: the caller renames the directory around it once all is there.

    Args:
        path: the checkpoint, such as run/checkpoints/step_00000000.
        record: what the manifest holds beside the tensors: step, state, config, …
        weights: name and float32 tensor of each parameter, tied ones once.
    """
    shapes = []

    def pieces() -> Iterator[Piece]:
        for index, (name, tensor) in enumerate(weights):
            assert tensor.dtype == torch.float32, "checkpoints are float32"
            shapes.append([name, list(tensor.shape)])
            yield Piece(index, 0, tensor)

    path.mkdir(parents=True)
    files = [_write_group(path, "model", pieces(), 0)]
    manifest = {"version": FORMAT_VERSION, **record, "tensors": {"model": shapes}, "files": files}
    _write_manifest(path / "manifest.json", manifest)


def _write_group(directory: Path, group: str, pieces: Iterable[Piece], rank: int) -> dict[str, Any]:
    """Writes the rows that this rank saves of a group into one file, hashed on the way."""
    name = f"{group}-{rank:05d}.bin"
    written, digest = [], hashlib.sha256()
    with open(directory / name, "wb") as file:
        for index, start, rows in pieces:
            rows = rows.cpu().contiguous().reshape(rows.shape or (1,))
            content = memoryview(rows.numpy()).cast("B")
            file.write(content)
            digest.update(content)
            written.append([index, start, len(rows)])
        file.flush()
        os.fsync(file.fileno())
    return {"name": name, "group": group, "sha256": digest.hexdigest(), "pieces": written}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name to parameter; tied ones once."""
    return dict(model.named_parameters())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`parameter/state` to tensor, in the order of the parameters, all of which have some."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {n for n, p in parameters.items() if p in optimizer.state}
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in sorted(optimizer.state[parameter].items())
    }


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint, known: int | None = None) -> None:
    """Copies the weights into a model, each rank reading only the rows that it holds.

    Args:
        known: tokens that both know, where one of them has more rows: others of the checkpoint are
            left, others of the model start as the mean of the known ones. None: they have the same.

    Raises:
        UserError: a parameter is missing, left over or of another shape.
    """
    shapes = checkpoint.shapes("model")
    for name, parameter in model.named_parameters():
        of_tokens = known is not None and name in ("model.embed_tokens.weight", "lm_head.weight")
        shape, saved = list(parameter.shape), shapes.pop(name, [])
        if (saved[1:] if of_tokens else saved) != shape[of_tokens:]:
            raise UserError(f"{checkpoint.path}: its {name} does not have the shape {shape}")
        rows, start = local_part(parameter)
        if of_tokens:
            old = checkpoint.tensor("model", name, 0, known)
            grown = torch.cat((old, old.mean(dim=0, keepdim=True).expand(shape[0] - known, -1)))
            rows.copy_(grown[start : start + len(rows)])
        else:
            rows.copy_(checkpoint.tensor("model", name, start, len(rows)))
    if shapes:
        raise UserError(f"{checkpoint.path}: weights that this model lacks: {', '.join(shapes)}")


@torch.no_grad()
def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> None:
    """Restores the optimizer's state, each rank reading only the rows that it holds.

    Raises:
        UserError: the state of a parameter is missing.
    """
    parameters = dict(model.named_parameters())
    saved = {name.rpartition("/")[0] for name in checkpoint.shapes("optimizer")}
    if missing := parameters.keys() ^ saved:
        raise UserError(f"{checkpoint.path}: no optimizer state fits {min(missing)}")
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
            tell(f"passed over: {error}")


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
