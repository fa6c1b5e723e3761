"""Saves, verifies and loads checkpoints.

A checkpoint is a directory of raw little-endian float32 arrays and one manifest.json:

    step_00001000/manifest.json        state of the run; tensors; files, each with its sha256
    step_00001000/model-00003.bin      the rows of the weights that rank 3 saved
    step_00001000/optimizer-00003.bin  the rows of the optimizer state that rank 3 saved

It is written under a temporary name, synced to disk and then renamed, so it is complete or does not
exist. Loading executes no code and needs no process group. Each rank reads only the rows that it
holds, so a run can resume on another number of ranks or with another sharding.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
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
    print_error,
    sync_directory,
    write_atomically,
)
from distributed import AgreedError, World, local_part, saves_part

FORMAT_VERSION = 1
# A manifest begins with {"digest": "<64 hex digits>". The digest is the sha256 of the manifest with
# zeros in place of these digits.
DIGEST_AT, NO_DIGEST = slice(12, 76), b"0" * 64


class Piece(NamedTuple):
    """Consecutive rows of one tensor, which one rank saves."""

    group: str  # "model" or "optimizer"
    index: int  # of the tensor in its group
    start: int  # index of the first row
    rows: Tensor


class Checkpoint:
    """A checkpoint on disk. The constructor reads the manifest alone; UserError if that is missing,
    damaged or of another format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path / "manifest.json")
        self.step: int = self.manifest["step"]
        self.state: dict[str, Any] = self.manifest["state"]
        self.has_optimizer = "optimizer" in self.manifest["tensors"]
        # by group and name of a tensor: file, offset in bytes, first row, number of rows
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
        """The configuration with which the run saved this checkpoint."""
        return build_config(self.manifest["config"])

    @property
    def val_loss(self) -> float:
        """Validation loss in nats per token; infinity if this step was not evaluated."""
        return math.inf if self.state["val_loss"] is None else self.state["val_loss"]

    def verify(self, rank: int = 0, ranks: int = 1, weights_only: bool = False) -> None:
        """Compares this rank's share of the files with their checksums; UserError if one of them is
        missing or damaged."""
        files = self.manifest["files"]
        if weights_only:
            files = [file for file in files if file["group"] == "model"]
        for file in files[rank::ranks]:
            path = self.path / file["name"]
            try:
                matches = file_sha256(path) == file["sha256"]
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            if not matches:
                raise UserError(f"{path}: does not match its checksum")

    def shapes(self, group: str) -> dict[str, list[int]]:
        """The shape of each tensor in a group ("model" or "optimizer"), by name."""
        return dict(self.manifest["tensors"][group])

    def tensor(self, group: str, name: str, start: int = 0, rows: int | None = None) -> Tensor:
        """Rows of a float32 tensor, from row start on; by default all. Rows of one file are
        memory-mapped, copy-on-write; rows of several files are copied into one tensor."""
        shape = self.shapes(group)[name]
        length = shape[0] if shape else 1
        stop = length if rows is None else start + rows
        parts = []
        for file, offset, first, count in sorted(self._pieces[group, name], key=lambda p: p[2]):
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                offset += 4 * (low - first) * math.prod(shape[1:])
                size = (high - low, *shape[1:])
                parts.append(np.memmap(self.path / file, "<f4", "c", offset, size))
        if not parts:
            return torch.empty(0, *shape[1:])
        whole = torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
        return whole if shape else whole[0]


def _step_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def checkpoint_paths(run: Path) -> list[Path]:
    """The directories of a run's checkpoints, newest first, damaged ones included."""
    return sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)


def readable_checkpoints(run: Path) -> Iterator[Checkpoint]:
    """A run's checkpoints with an intact manifest, newest first; their files are not verified."""
    for path in checkpoint_paths(run):
        with _skipped_if_damaged():
            yield Checkpoint(path)


@contextlib.contextmanager
def _skipped_if_damaged(rank: int = 0) -> Iterator[None]:
    """Turns the error of a damaged checkpoint into a warning, which rank 0 prints."""
    try:
        yield
    except UserError as error:
        if rank == 0:
            print_error(f"checkpoint skipped: {error}")


def find_checkpoint(path: Path, which: str = "last") -> Checkpoint:
    """The "last" or "best" (lowest validation loss) checkpoint of a run, or the checkpoint at path.

    Only the weights are verified. A run's damaged checkpoints are skipped with a warning; UserError
    if none is left.
    """
    path = path.resolve()
    if re.fullmatch(r"step_\d{8}", path.name) and not (path / "checkpoints").exists():
        checkpoint = Checkpoint(path)
        checkpoint.verify(weights_only=True)
        return checkpoint
    found = list(readable_checkpoints(path))
    if which == "best":
        found.sort(key=lambda checkpoint: checkpoint.val_loss)
    for checkpoint in found:
        with _skipped_if_damaged():
            checkpoint.verify(weights_only=True)
            return checkpoint
    if checkpoint_paths(path):
        raise UserError(f"{path}: no checkpoint verifies; the reasons are above")
    raise UserError(f"{path}: no checkpoint here; give a run directory or a checkpoint of one")


def find_resumable(run: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint that verifies and has the optimizer state; None if the run is new. Also
    takes the path of one checkpoint.

    Rank 0 reads each manifest and sends it to the other ranks; all ranks share the hashing.
    AgreedError if there are checkpoints, but training can resume from none of them.
    """
    paths = world.once(lambda: [run] if (run / "manifest.json").exists() else checkpoint_paths(run))
    for path in paths:
        with _skipped_if_damaged(world.rank):
            checkpoint = world.once(lambda path=path: Checkpoint(path))
            if checkpoint.has_optimizer:
                world.each(lambda found=checkpoint: found.verify(world.rank, world.size))
                return checkpoint
    if paths:
        raise AgreedError(
            f"{run}: no checkpoint verifies with its optimizer state, and training does not restart"
            " from 0 by itself; restore one, or start a new run (train.init_from takes weights)"
        )
    return None


class Saver:
    """Saves a run's checkpoints, one at a time; in a thread if checkpoint.asynchronous is set. Its
    collectives have a process group of their own, because those of training go on meanwhile."""

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: CheckpointConfig,
        still_ours: Callable[[], None],
        world: World,
    ) -> None:
        """still_ours must raise a UserError if another job has taken over the run."""
        self.run, self.model, self.optimizer, self.config = run, model, optimizer, config
        self.still_ours, self.world = still_ours, world.in_new_group()
        self.seconds = 0.0  # duration of the last save, without copying
        self._buffer: Tensor | None = None  # host memory for the tensors that the thread saves
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether the thread is saving now."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a save in the thread has failed; wait() raises its error."""
        return self._error is not None

    def save(self, step: int, record: dict[str, Any]) -> None:
        """Saves a checkpoint; every rank must call this. The manifest includes record's entries.

        It waits for the previous save first. With a thread, this method returns once the tensors
        are copied. AgreedError if a rank can't write this checkpoint, or could not write the
        previous one.
        """
        self.wait()
        groups = {
            "model": model_tensors(self.model),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }
        shapes = {
            group: [[name, list(tensor.shape)] for name, tensor in named.items()]
            for group, named in groups.items()
        }
        manifest = {"version": FORMAT_VERSION, "step": step, **record, "tensors": shapes}
        pieces = [piece for group in groups.items() for piece in _own_pieces(*group, self.world)]
        if self.config.asynchronous:
            arguments = manifest, self._copied(pieces)
            # A daemon: another thread would keep the process alive after training has failed.
            self._thread = threading.Thread(target=self._run_thread, args=arguments, daemon=True)
            self._thread.start()
        else:
            self._write_checkpoint(manifest, pieces)

    def _copied(self, pieces: list[Piece]) -> list[Piece]:
        """Copies of the pieces in host memory, in one buffer that every save uses again."""
        on_gpu = self.world.device.type == "cuda"
        sizes = [piece.rows.numel() for piece in pieces]
        if self._buffer is None:
            self._buffer = torch.empty(sum(sizes))
            if on_gpu and pieces:
                weakref.finalize(self, _pin(self._buffer))
        copies = []
        for piece, copy in zip(pieces, self._buffer.split(sizes), strict=True):
            copy = copy.view(piece.rows.shape).copy_(piece.rows, non_blocking=True)
            copies.append(piece._replace(rows=copy))
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def wait(self) -> None:
        """Waits until the thread has saved; raises its error, on every rank."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """As wait(), but prints the error: training has failed already, for another reason."""
        try:
            self.wait()
        except UserError as error:
            if self.world.rank == 0:
                print_error(str(error))

    def amend(self, step: int, state: dict[str, Any]) -> None:
        """Replaces the state in the newest checkpoint, whose step was evaluated after the save."""
        self.wait()
        path = _step_path(self.run, step)

        @_explain_os_errors(path, 0)
        def rewrite() -> None:
            manifest = Checkpoint(path).manifest | {"state": state}
            self.still_ours()
            _write_manifest(path / "manifest.json", manifest)

        self.world.once(rewrite)

    def _run_thread(self, manifest: dict[str, Any], pieces: list[Piece]) -> None:
        try:
            self._write_checkpoint(manifest, pieces)
        except BaseException as error:
            self._error = error

    def _write_checkpoint(self, manifest: dict[str, Any], pieces: list[Piece]) -> None:
        """All ranks write files into a temporary directory and sync them. Then rank 0 writes the
        manifest and renames the directory, so that the checkpoint exists, and prunes old ones."""
        began = time.monotonic()
        final = _step_path(self.run, manifest["step"])
        temporary = final.with_suffix(".tmp")
        shapes = [shape for group in manifest["tensors"].values() for _, shape in group]
        explained = _explain_os_errors(final, 4 * sum(map(math.prod, shapes)))

        @explained
        def begin() -> None:
            self.still_ours()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        @explained
        def write() -> list[dict[str, Any]]:
            groups = itertools.groupby(pieces, key=lambda piece: piece.group)
            return [_write_group(temporary, *group, self.world.rank) for group in groups]

        @explained
        def commit() -> None:
            self.still_ours()
            manifest["files"] = [file for of_rank in files for file in of_rank]
            _write_manifest(temporary / "manifest.json", manifest)
            replaced = None
            if final.exists():  # resuming skipped it: damaged, or without optimizer state
                replaced = _retire(final)
            temporary.replace(final)
            sync_directory(final.parent)
            if replaced:
                shutil.rmtree(replaced)

        try:
            self.world.once(begin)
            files = self.world.each(write)
            self.world.once(commit)
        except AgreedError:
            self.world.once(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise
        self.seconds = time.monotonic() - began
        self.world.once(lambda: prune_checkpoints(self.run, manifest["step"], self.config))


def _pin(buffer: Tensor) -> Callable[[], Any]:
    """Pins host memory, so that a GPU copies into it at full speed; returns a function to unpin it.

    Tensor.pin_memory would round the size up to a power of two: up to twice the checkpoint. If the
    system refuses to pin the memory, this prints a warning, and copies take longer.
    """
    cuda, start = torch.cuda.cudart(), buffer.data_ptr()
    status = cuda.cudaHostRegister(start, buffer.nbytes, 0)
    if status == cuda.cudaError.success:
        return lambda: cuda.cudaHostUnregister(start)
    size, why = buffer.nbytes / 1e9, cuda.cudaGetErrorString(status)
    print_error(f"{size:.1f} GB can't be pinned ({why}): each save stops training for longer")
    return lambda: None


def _own_pieces(group: str, named: dict[str, Tensor], world: World) -> Iterator[Piece]:
    """Yields the rows of a group's tensors that this rank has to save, without copying them."""
    for index, tensor in enumerate(named.values()):
        rows, start = local_part(tensor.detach())
        if saves_part(tensor, index, world) and rows.numel():
            assert rows.dtype == torch.float32, "master weights and optimizer state are float32"
            yield Piece(group, index, start, rows)


@contextlib.contextmanager
def _explain_os_errors(path: Path, size: int) -> Iterator[None]:
    """Turns an OSError inside into a UserError that names the checkpoint and its size in bytes."""
    try:
        yield
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
    """Writes a checkpoint without optimizer state, with one tensor in memory at a time.

    A crash can leave a part of it, so path should lie in a directory that is renamed afterwards.

    Args:
        record: the manifest's other entries: step, state, config, …
        weights: name and float32 tensor of each parameter, tied ones once.
    """
    shapes = []

    def pieces() -> Iterator[Piece]:
        for index, (name, tensor) in enumerate(weights):
            assert tensor.dtype == torch.float32, "checkpoints are float32"
            shapes.append([name, list(tensor.shape)])
            yield Piece("model", index, 0, tensor)

    path.mkdir(parents=True)
    files = [_write_group(path, "model", pieces(), 0)]
    manifest = {"version": FORMAT_VERSION, **record, "tensors": {"model": shapes}, "files": files}
    _write_manifest(path / "manifest.json", manifest)


def _write_group(directory: Path, group: str, pieces: Iterable[Piece], rank: int) -> dict[str, Any]:
    """Writes a rank's pieces of a group into one file; returns the file's entry in the manifest."""
    name = f"{group}-{rank:05d}.bin"
    written, digest = [], hashlib.sha256()
    with open(directory / name, "wb") as file:
        for _, index, start, rows in pieces:
            rows = rows.cpu().contiguous().reshape(rows.shape or (1,))
            content = memoryview(rows.numpy()).cast("B")
            file.write(content)
            digest.update(content)
            written.append([index, start, len(rows)])
        file.flush()
        os.fsync(file.fileno())
    return {"name": name, "group": group, "sha256": digest.hexdigest(), "pieces": written}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, tied ones once."""
    return dict(model.named_parameters())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer state by name, such as lm_head.weight/exp_avg, in the parameters' order."""
    assert all(parameter in optimizer.state for parameter in model.parameters())
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in sorted(optimizer.state[parameter].items())
    }


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint, known: int | None = None) -> None:
    """Copies the weights into a model; each rank reads only the rows that it holds. UserError if
    model and checkpoint differ in the name or shape of a parameter.

    Args:
        known: the number of tokens that both vocabularies share, if they differ. Rows of other
            tokens are not read from the checkpoint; in the model they start as the mean of the
            shared rows.
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
    """Restores the optimizer state; each rank reads only the rows that it holds. UserError if the
    checkpoint's state belongs to other parameters."""
    parameters, shapes = dict(model.named_parameters()), checkpoint.shapes("optimizer")
    if differing := parameters.keys() ^ {name.rpartition("/")[0] for name in shapes}:
        raise UserError(f"{checkpoint.path}: no optimizer state fits {min(differing)}")
    for name, shape in shapes.items():
        owner, _, key = name.rpartition("/")
        parameter = parameters[owner]
        if shape == list(parameter.shape):  # sharded as the parameter is
            value = torch.zeros_like(parameter, requires_grad=False)
        else:
            value = torch.zeros(shape, device=parameter.device)
        rows, start = local_part(value)
        rows.copy_(checkpoint.tensor("optimizer", name, start, len(rows) if shape else 1))
        optimizer.state[parameter][key] = value


def prune_checkpoints(run: Path, newest: int, config: CheckpointConfig) -> None:
    """Removes old checkpoints; UserError if one can't be removed.

    Up to step `newest`, it keeps the last checkpoint.keep_last checkpoints, and the weights of the
    checkpoint.keep_best with the lowest validation loss. Later checkpoints were skipped on resume:
    they are not touched.
    """
    found = [c for c in readable_checkpoints(run) if c.step <= newest]
    evaluated = sorted((c for c in found if c.val_loss < math.inf), key=lambda c: c.val_loss)
    best = {checkpoint.path for checkpoint in evaluated[: config.keep_best]}
    try:
        for checkpoint in found[config.keep_last :]:
            if checkpoint.path not in best:
                shutil.rmtree(_retire(checkpoint.path))
            elif checkpoint.has_optimizer:
                _drop_optimizer(checkpoint)
    except OSError as error:
        raise UserError(
            f"{error.filename or run}: old checkpoints can't be removed: {error.strerror}."
            " What was saved is intact"
        ) from None


def remove_leftovers(run: Path) -> None:
    """Removes the temporary directories of a save or pruning that was killed."""
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


def _retire(path: Path) -> Path:
    """Renames a checkpoint, so that it no longer counts as one; returns its new path."""
    retired = path.with_suffix(".old.tmp")
    shutil.rmtree(retired, ignore_errors=True)
    return path.replace(retired)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest to a file, where its first entry is its own digest (see DIGEST_AT)."""
    content = bytearray(json.dumps({"digest": NO_DIGEST.decode(), **manifest}).encode())
    content[DIGEST_AT] = hashlib.sha256(content).hexdigest().encode()
    write_atomically(path, bytes(content))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    digest, content[DIGEST_AT] = bytes(content[DIGEST_AT]), NO_DIGEST
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise UserError(f"{path}: does not match its own checksum")
    manifest = json.loads(content)
    del manifest["digest"]
    if manifest["version"] != FORMAT_VERSION:
        raise UserError(f"{path}: format version {manifest['version']}, not {FORMAT_VERSION}")
    return manifest
