"""Whether this job may train this run, before it does: inputs, changed keys and code, memory, disk.

Every check takes seconds, fails in one line on all ranks alike, and writes nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from checkpoint import (
    Checkpoint,
    checkpoint_paths,
    find_checkpoint,
    readable_checkpoints,
)
from config import (
    ACCEPT_CHANGES,
    SICK_NODE,
    Config,
    ConfigError,
    DataConfig,
    UserError,
    build_config,
    changes,
    dump_toml,
    file_sha256,
    installed,
    read_toml,
    resolve_path,
)
from dataset import mixture_fingerprint, mixture_weights, read_manifest
from distributed import AgreedError, NodeError, World, check_compiler, compiles
from tokenizer import Tokenizer, configured_tokenizer

CODE = Path(__file__).resolve().parent
ROOMS = ("", "corpus", "inference", "slurm", "tools")  # folders of Rocket's Python files
DIFF_LINES = 60  # printed at most
BRANCH_OWN = ("train.out_dir:", "train.init_from:", "train.branch_from:")  # keys of each branch
BRANCH_SETS = (*BRANCH_OWN, "data.document_mask:")  # refused on resume, but a branch may set them


class Inputs(NamedTuple):
    """What training needs to know of its inputs; rank 0 reads it and sends it to the others."""

    manifests: dict[str, dict[str, Any]]  # by directory as configured, in the mixture's order
    weights: dict[str, int]  # of the same directories
    fingerprint: str  # of the manifests and weights
    template: dict[str, str] | None  # of the conversations, if there are any
    vocab_size: int
    bos_id: int
    tokenizer_sha256: str
    byte_lengths: np.ndarray
    model_changed: bool  # the model's code, since the run was started


def check_inputs(directory: Path, config: Config, accept_changes: bool) -> Inputs:
    """Checks tokenizer, datasets and an existing run directory against each other; writes nothing.
    UserError if an input is missing or does not fit, or if keys or code have changed."""
    if config.train.init_from == "resume":
        raise ConfigError(
            "train.init_from=resume: resuming is automatic, run the same command again; init_from"
            " starts a new run from another run or checkpoint"
        )
    for name in ("tensorboard", "wandb"):
        if getattr(config.log, name) and not installed(name):
            raise UserError(
                f"log.{name}: the package {name} is missing; in the repository: pip install"
                f" '.[{name}]'"
            )
    tokenizer = configured_tokenizer(config.tokenizer)
    weights = mixture_weights(config.data)
    manifests = {name: read_manifest(resolve_path(name), tokenizer.sha256) for name in weights}
    _check_kind(config.data, manifests)
    inputs = Inputs(
        manifests=manifests,
        weights=weights,
        fingerprint=mixture_fingerprint(manifests, weights),
        template=_template(manifests),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        tokenizer_sha256=tokenizer.sha256,
        byte_lengths=tokenizer.byte_lengths(),
        model_changed=False,
    )
    checkpoint = next(readable_checkpoints(directory), None)
    if not checkpoint:
        return inputs
    _check_resumed(directory, checkpoint, config, inputs, accept_changes)
    changed = _check_code(directory, accept_changes)
    model_changed = not {"model.py", "fast.py"}.isdisjoint(changed)
    evaluated = checkpoint.config.train.eval_sequences
    if model_changed and evaluated != config.train.eval_sequences:
        raise ConfigError(
            "model.py has changed, so its validation loss is compared with the recorded one: leave"
            f" train.eval_sequences at {evaluated} for this start"
        )
    return inputs._replace(model_changed=model_changed)


def _check_kind(data: DataConfig, manifests: dict[str, dict[str, Any]]) -> None:
    """ConfigError if the dataset is not of the configured kind; a mixture may hold any kind."""
    if data.mixture:
        return
    ((name, manifest),) = manifests.items()
    kind = {"format": "text"} | manifest
    keys = ("format", "template", "train_on", "too_long") if "format" in manifest else ("format",)
    for key in keys:
        if kind.get(key) != getattr(data, key):
            raise ConfigError(
                f"{name} was prepared with data.{key} = {json.dumps(kind.get(key))}, not"
                f" {json.dumps(getattr(data, key))}; set it so, or run prepare.py with --force"
            )


def _template(manifests: dict[str, dict[str, Any]]) -> dict[str, str] | None:
    """The template that all instruct datasets share; ConfigError if one has another."""
    found = {name: known["template"] for name, known in manifests.items() if "template" in known}
    first = next(iter(found), "")
    for name, template in found.items():
        if template != found[first]:
            raise ConfigError(
                f"data.mixture: {name} was prepared with another data.template than {first};"
                " prepare both with the same"
            )
    return found.get(first)


def _check_resumed(
    directory: Path, checkpoint: Checkpoint, config: Config, inputs: Inputs, accept_changes: bool
) -> None:
    """Compares tokenizer, data and keys with those of the run; prints the accepted changes."""
    if checkpoint.manifest["tokenizer_sha256"] != inputs.tokenizer_sha256:
        raise UserError(
            f"{directory}: the run was trained with another tokenizer; set tokenizer.path to that"
            " one, or another train.out_dir"
        )
    if checkpoint.manifest["dataset"] != inputs.fingerprint:
        raise UserError(
            f"{directory}: the run was trained on another dataset or mixture than"
            f" {' and '.join(inputs.weights)} (of a mixture, order and weights count); set data.dir"
            " or data.mixture to it, or start a new run with train.branch_from"
        )
    started = directory / "config.toml"  # has also changes accepted since the checkpoint
    old = build_config(read_toml(started)) if started.exists() else checkpoint.config
    found = changes(old, config)
    if found["refused"]:
        raise ConfigError(
            f"this run can't resume with {'; '.join(found['refused'])}: it would be another run;"
            " set another train.out_dir"
        )
    if found["consent"] and not accept_changes:
        raise ConfigError(
            f"this run was started with other values: {'; '.join(found['consent'])};"
            f" to go on with the new values add {ACCEPT_CHANGES}"
        )
    for change in found["consent"]:
        print(f"accepted: {change}")


def check_branch(parent: Checkpoint, config: Config, inputs: Inputs) -> list[str]:
    """What a branch changes: keys, data, code. ConfigError if it changes a key that it may not."""
    found = changes(parent.config, config)
    refused = [line for line in found["refused"] if not line.startswith(BRANCH_SETS)]
    if parent.manifest["tokenizer_sha256"] != inputs.tokenizer_sha256:
        refused.append(f"tokenizer.path: another tokenizer than {parent.path} was trained with")
    if refused:
        raise ConfigError(
            f"train.branch_from: a branch can't change {'; '.join(refused)}; set it as in"
            f" {parent.path}, or start from those weights alone with train.init_from"
        )
    lines = [line for line in chain(*found.values()) if not line.startswith(BRANCH_OWN)]
    if (old := parent.manifest["dataset"]) != inputs.fingerprint:
        lines.append(f"dataset: {old[:12]} -> {inputs.fingerprint[:12]}")
        if config.train.epochs:
            raise ConfigError(
                "train.epochs counts passes over one dataset, and this branch changes it: give"
                " train.max_steps, which counts from its parent's first step"
            )
    if code := _differing_code(parent.path.parent.parent)[0]:
        lines.append(f"code: {', '.join(code)}")
    return lines


def _differing_code(directory: Path) -> tuple[list[str], list[str]]:
    """Names of the files in use that differ from the run's snapshot, if it has one; the diff."""
    snapshot, changed, diff = directory / "code", [], []
    in_use = code_in_use() if snapshot.is_dir() else {}
    for name, text in in_use.items():
        path = snapshot / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old != text:
            changed.append(name)
            lines = old.splitlines(), text.splitlines()
            diff += difflib.unified_diff(*lines, f"run/{name}", f"now/{name}", lineterm="")
    return changed, diff


def _check_code(directory: Path, accept_changes: bool) -> list[str]:
    """Prints a diff if the code in use is not the run's snapshot; returns what differs."""
    changed, diff = _differing_code(directory)
    if not changed:
        return []
    for line in diff[:DIFF_LINES]:
        print(line)
    if len(diff) > DIFF_LINES:
        print(f"… and {len(diff) - DIFF_LINES} more lines")
    if not accept_changes:
        raise ConfigError(
            f"the code has changed since this run was started: {', '.join(changed)}; to go on with"
            f" the new code add {ACCEPT_CHANGES}; the old one is in {directory / 'code'}"
        )
    print(f"accepted: other code in {', '.join(changed)}")
    return changed


class InitialWeights(NamedTuple):
    """The weights from which a new run starts."""

    checkpoint: Checkpoint
    known: int | None  # tokens that both vocabularies share, see load_weights


def initial_weights(config: Config, inputs: Inputs) -> InitialWeights | None:
    """The weights of train.init_from; None if it is not set.

    The run's tokenizer may extend that of the weights.

    Raises:
        UserError: there is no checkpoint, or the checkpoint has another shape, or this run's
            tokenizer does not extend the checkpoint's.
    """
    if not config.train.init_from:
        return None
    checkpoint = find_checkpoint(resolve_path(config.train.init_from))
    # They change no shape and no output.
    free = ("model.max_seq_len", "model.init_std", "model.base_")
    for change in chain(*changes(checkpoint.config, config).values()):
        if change.startswith("model.") and not change.startswith(free):
            raise ConfigError(f"train.init_from: {checkpoint.path} has another model: {change}")
    if checkpoint.manifest["tokenizer_sha256"] == inputs.tokenizer_sha256:
        rows = checkpoint.shapes("model")["model.embed_tokens.weight"][0]
        return InitialWeights(checkpoint, inputs.vocab_size if rows > inputs.vocab_size else None)
    old = Tokenizer(checkpoint.path.parent.parent / "tokenizer.model")
    new = Tokenizer(resolve_path(config.tokenizer.path))
    if not new.extends(old):
        raise UserError(
            f"train.init_from: {checkpoint.path} was trained with {old.path}, which {new.path} does"
            f" not extend; use {old.path}, or add pieces to it"
        )
    return InitialWeights(checkpoint, old.vocab_size)


def code_files(folder: Path = CODE) -> dict[str, Path]:
    """Rocket's Python files in a copy of the repository, by path relative to it."""
    found = (path for room in ROOMS for path in (folder / room).glob("*.py"))
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def code_in_use() -> dict[str, str]:
    """The text of those of Rocket's files that this process has loaded, by path as above."""
    ours = code_files()
    names = {path.name for path in ours.values()} - {"__init__.py"}
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    # By name first: resolving torch's 2,000 files would take each rank 20,000 look-ups.
    loaded = {os.path.realpath(file) for file in files if os.path.basename(file) in names}
    used = {name: path for name, path in ours.items() if str(path) in loaded}
    return {name: path.read_text(encoding="utf-8") for name, path in used.items()}


def preflight(
    directory: Path, config: Config, checkpoint: Checkpoint | None, parameters: int, world: World
) -> None:
    """Finds what would otherwise fail hours later: ranks that differ, a bad device, a full disk.
    AgreedError names the rank and host that differs, or what is missing."""
    seen_by = world.each(lambda: _look(config, checkpoint, parameters, world))
    if different := world.once(lambda: _first_difference(seen_by)):
        raise AgreedError.about(*different, SICK_NODE, world)
    world.once(lambda: _check_disk(directory, 12 * parameters))


def _look(
    config: Config, checkpoint: Checkpoint | None, parameters: int, world: World
) -> dict[str, str]:
    """Checks this rank's device and compiler; returns what must be the same on all ranks, by name.
    One rank per node reads the shared files, because file systems may differ between nodes."""
    _check_device(config, world.device)
    _check_memory(config, parameters, world)
    if compiles(config.train.compile, world.device):
        check_compiler(world.device)

    seen = {
        "host": socket.gethostname(),
        "code": hashlib.sha256(json.dumps(code_in_use()).encode()).hexdigest(),
        "configuration": hashlib.sha256(dump_toml(config).encode()).hexdigest(),
        "torch": torch.__version__,
        "compute type": str(world.dtype),
    }
    if config.parallel.strategy == "hsdp":
        seen["number of ranks on its node"] = str(world.local_size)
    if world.local_rank == 0:
        names = config.data.mixture or [config.data.dir]
        shared = {f"dataset {name}": resolve_path(name) for name in names}
        if checkpoint:
            shared["checkpoint"] = checkpoint.path
        for name, path in shared.items():
            manifest = path / "manifest.json"
            seen[name] = file_sha256(manifest) if manifest.exists() else "none"
    return seen


def _first_difference(seen_by: list[dict[str, str]]) -> tuple[int, str] | None:
    """The first rank that differs from most ranks, and in what; of two ranks, rank 1."""
    for name in [name for name in seen_by[0] if name != "host"]:
        values = {rank: seen[name] for rank, seen in enumerate(seen_by) if name in seen}
        common = statistics.mode(values.values())
        like = next(rank for rank, value in values.items() if value == common)
        for rank, value in values.items():
            if value != common:
                return rank, (
                    f"rank {rank} on {seen_by[rank]['host']} does not have the same {name} as"
                    f" rank {like} on {seen_by[like]['host']}: {value[:12]} and {common[:12]}"
                )
    return None


def _check_device(config: Config, device: torch.device) -> None:
    """UserError if the GPU that the run is to use does not compute."""
    if device.type == "cpu":
        if config.train.device == "auto" and Path("/dev/nvidia0").exists():
            kind = NodeError if torch.version.cuda else UserError
            raise kind(
                f"{socket.gethostname()} has an NVIDIA GPU that torch {torch.__version__} can't"
                " use: the driver is too old for it, or it is a build for CPUs; set"
                " train.device=cpu to train without"
            )
        return
    try:
        torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item()
    except RuntimeError as error:
        raise NodeError(
            f"{torch.cuda.get_device_name(device)} on {socket.gethostname()} can't compute with"
            f" torch {torch.__version__}: {str(error).partition(chr(10))[0]}"
        ) from None


def _check_memory(config: Config, parameters: int, world: World) -> None:
    """UserError if weights, gradients and optimizer state alone are more than a rank has."""
    shards = {"ddp": 1, "fsdp": world.size, "hsdp": world.local_size}[config.parallel.strategy]
    moments = 1 if config.optimizer.name == "muon" else 2
    needed = 4 * (2 + moments) * parameters / shards
    if world.device.type == "cuda":
        memory, what = torch.cuda.mem_get_info(world.device)[1], "its GPU"
    else:
        pages = os.sysconf("SC_PHYS_PAGES") // world.local_size
        memory, what = pages * os.sysconf("SC_PAGE_SIZE"), "its share of the host"
    if needed > memory:
        raise UserError(
            f"the model does not fit: {parameters / 1e9:.3g}B parameters, gradients and optimizer"
            f" state take {needed / 1e9:,.0f} GB a rank, {what} has {memory / 1e9:,.0f} GB; lower"
            " model.dim or model.n_layers, or set parallel.strategy=fsdp and take more ranks"
            " (python tools/plan.py CONFIG says how many)"
        )


def _check_disk(directory: Path, size: int) -> None:
    """UserError unless the next checkpoints, of size bytes each, can be written."""
    kept = len(checkpoint_paths(directory))
    there = next(path for path in (directory, *directory.parents) if path.is_dir())
    with writing(directory, "set train.out_dir"):
        tempfile.TemporaryFile(dir=there).close()
    needed, free = max(1, 2 - kept) * size, shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{directory}: {free / 1e9:.3f} GB are free, the next checkpoints need"
            f" {needed / 1e9:.3f} GB; make room or set train.out_dir"
        )


@contextlib.contextmanager
def writing(directory: Path, advice: str = "what was saved before is intact") -> Iterator[None]:
    """Turns an OSError inside into a UserError: the run directory can't be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{directory}: the run directory can't be written: {error.strerror}; {advice}"
        ) from None
