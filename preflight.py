"""Whether this job may train this run, before it does: inputs, changed keys and code, memory, disk.

All of it fails within seconds and in one line, on every rank alike, and writes nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from checkpoint import Checkpoint, checkpoint_paths, readable_checkpoints
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
    installed,
    read_toml,
    resolve_path,
)
from dataset import mixture_fingerprint, mixture_weights, read_manifest
from distributed import AgreedError, NodeError, World
from tokenizer import configured_tokenizer

CODE = Path(__file__).resolve().parent
ROOMS = ("", "corpus", "inference", "tools")  # folders of Rocket's Python files
DIFF_LINES = 60


class Inputs(NamedTuple):
    """What training needs to know of its inputs; read by one rank and handed to the others."""

    manifests: dict[str, dict[str, Any]]  # by directory as configured, in the order of the mixture
    weights: dict[str, int]  # of the same directories
    fingerprint: str  # of all of that
    template: dict[str, str] | None  # of the conversations, if there are any
    vocab_size: int
    bos_id: int
    tokenizer_sha256: str
    byte_lengths: np.ndarray
    model_changed: bool  # its code, since the run was started


def check_inputs(directory: Path, config: Config, accept_changes: bool) -> Inputs:
    """Checks tokenizer, datasets and an existing run directory against each other; writes nothing.

    Raises:
        UserError: an input is missing or does not fit, or the run was started with keys that may
            not change or need consent.
    """
    if config.train.init_from == "resume":
        raise ConfigError(
            "train.init_from=resume: resuming is automatic, run the same command again;"
            " init_from takes another run or checkpoint to start a new run from"
        )
    for name in ("tensorboard", "wandb"):
        if getattr(config.log, name) and not installed(name):
            raise UserError(
                f"log.{name}: the package {name} is missing: pip install 'rocket-llama[{name}]'"
            )
    tokenizer = configured_tokenizer(config.tokenizer)
    weights = mixture_weights(config.data)
    manifests = {name: read_manifest(resolve_path(name), tokenizer.sha256) for name in weights}
    _check_kind(config.data, manifests)
    fingerprint, template = mixture_fingerprint(manifests, weights), _template(manifests)
    changed: list[str] = []
    if checkpoint := next(readable_checkpoints(directory), None):
        if checkpoint.manifest["tokenizer_sha256"] != tokenizer.sha256:
            raise UserError(f"{directory}: the run was trained with another tokenizer")
        if checkpoint.manifest["dataset"] != fingerprint:
            raise UserError(
                f"{directory}: the run was trained on another dataset or mixture than"
                f" {' and '.join(weights)} (of a mixture, order and weights count); set data.dir or"
                " data.mixture to it, or start a new run with train.init_from"
            )
        # config.toml also knows the changes accepted since that checkpoint
        started = directory / "config.toml"
        old = build_config(read_toml(started)) if started.exists() else checkpoint.config
        _check_changes(old, config, accept_changes)
        changed = _check_code(directory, accept_changes)
        evaluated = checkpoint.config.train.eval_sequences
        if {"model.py", "kernels.py"} & {*changed} and evaluated != config.train.eval_sequences:
            raise ConfigError(
                "model.py has changed, so this start compares the validation loss with the recorded"
                f" one: leave train.eval_sequences at {evaluated} for it"
            )
    return Inputs(
        manifests=manifests,
        weights=weights,
        fingerprint=fingerprint,
        template=template,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        tokenizer_sha256=tokenizer.sha256,
        byte_lengths=tokenizer.byte_lengths(),
        model_changed=bool({"model.py", "kernels.py"} & {*changed}),
    )


def _check_kind(data: DataConfig, manifests: dict[str, dict[str, Any]]) -> None:
    """ConfigError where the configuration describes another kind of data than there is.

    The datasets of a mixture may be of several kinds, so there it describes none.
    """
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
    """The template that the instruct datasets share; ConfigError if one has another."""
    found = {name: known["template"] for name, known in manifests.items() if "template" in known}
    first, template = next(iter(found.items()), ("", None))
    for name in found:
        if found[name] != template:
            raise ConfigError(
                f"data.mixture: {name} was prepared with another data.template than {first};"
                " prepare both with the same"
            )
    return template


def _check_changes(old: Config, new: Config, accept_changes: bool) -> None:
    """Holds the keys of a resumed run against those it was started with."""
    found = changes(old, new)
    if found["refused"]:
        raise ConfigError(
            f"this run can't resume with {'; '.join(found['refused'])}: it would be another run;"
            " set another train.out_dir"
        )
    if found["consent"] and not accept_changes:
        raise ConfigError(
            f"this run was started otherwise: {'; '.join(found['consent'])};"
            f" to go on with the new values add {ACCEPT_CHANGES}"
        )
    for change in found["consent"]:
        print(f"accepted: {change}")


def _check_code(directory: Path, accept_changes: bool) -> list[str]:
    """Holds the code in use against the snapshot that the run was started with; what differs."""
    if not (changed := changed_code(directory)):
        return []
    print_diff(changed)
    names = ", ".join(changed)
    if not accept_changes:
        raise ConfigError(
            f"the code has changed since this run was started: {names}; to go on with the new code"
            f" add {ACCEPT_CHANGES}; the old one is in {directory / 'code'}"
        )
    print(f"accepted: other code in {names}")
    return list(changed)


def preflight(
    directory: Path, config: Config, checkpoint: Checkpoint | None, size: int, world: World
) -> None:
    """What would otherwise fail hours later: every rank sees the same, and disk and device do.

    Shared files are read by one rank a node, which is where file systems may differ.

    Args:
        size: bytes of a checkpoint.

    Raises:
        UserError: names the rank and host that differs, or what is missing.
    """

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    def look() -> dict[str, Any]:
        _check_device(config, world.device)
        _check_memory(config, size // 12, world)
        seen = {
            "host": socket.gethostname(),
            "code": digest(json.dumps(code_in_use()).encode()),
            "configuration": digest(dump_toml(config).encode()),
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
                seen[name] = digest(manifest.read_bytes()) if manifest.exists() else "none"
        return seen

    seen_by = world.each(look)

    if different := world.once(lambda: _first_difference(seen_by)):
        raise AgreedError.about(*different, SICK_NODE, world)
    world.once(lambda: _check_disk(directory, size))


def _first_difference(seen_by: list[dict[str, Any]]) -> tuple[int, str] | None:
    """The first rank that sees something else than most do, and what; of two, rank 1."""
    for name in [name for name in seen_by[0] if name != "host"]:
        values = {rank: seen[name] for rank, seen in enumerate(seen_by) if name in seen}
        common = Counter(values.values()).most_common(1)[0][0]
        like = next(rank for rank, value in values.items() if value == common)
        for rank, value in values.items():
            if value != common:
                return rank, (
                    f"rank {rank} on {seen_by[rank]['host']} does not have the same {name} as"
                    f" rank {like} on {seen_by[like]['host']}: {value[:12]} and {common[:12]}"
                )
    return None


def _check_disk(directory: Path, size: int) -> None:
    """UserError unless the next checkpoints, of size bytes each, can be written."""
    kept = len(checkpoint_paths(directory))
    there = next(path for path in (directory, *directory.parents) if path.is_dir())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise not_writable(directory, error) from None
    needed, free = max(1, 2 - kept) * size, shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{directory}: {free / 1e9:.3f} GB are free, the next checkpoints need"
            f" {needed / 1e9:.3f} GB; make room or set train.out_dir"
        )


def not_writable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"{directory}: the run directory can't be written: {error.strerror}; set train.out_dir"
    )


def _check_memory(config: Config, parameters: int, world: World) -> None:
    """UserError where weights, gradients and optimizer state alone are more than a rank has."""
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
            f"the model does not fit: its {parameters / 1e9:.3g}B parameters, their gradients and"
            f" the optimizer's state are {needed / 1e9:,.0f} GB a rank, and {what} has"
            f" {memory / 1e9:,.0f} GB; set a smaller model.dim or model.n_layers, or"
            " parallel.strategy=fsdp and more ranks (python tools/plan.py CONFIG tells how many)"
        )


def _check_device(config: Config, device: torch.device) -> None:
    """UserError if the GPU that the run means to use does not compute."""
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


def code_files(folder: Path = CODE) -> dict[str, Path]:
    """Rocket's Python files in a copy of it, by their names from there."""
    found = (path for room in ROOMS for path in (folder / room).glob("*.py"))
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def code_in_use() -> dict[str, str]:
    """Name to text of the modules of Rocket that this process has loaded."""
    ours = code_files()
    names = {path.name for path in ours.values()} - {"__init__.py"}
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    # By name first: to resolve all of torch's 2,000 files is 20,000 look-ups by every rank.
    loaded = {os.path.realpath(file) for file in files if os.path.basename(file) in names}
    used = {name: path for name, path in ours.items() if str(path) in loaded}
    return {name: path.read_text(encoding="utf-8") for name, path in used.items()}


def changed_code(directory: Path) -> dict[str, list[str]]:
    """File to unified diff, for the code in use that is not what the run's snapshot holds."""
    found = {}
    if (directory / "code").is_dir():
        for name, text in code_in_use().items():
            path = directory / "code" / name
            old = path.read_text(encoding="utf-8") if path.exists() else ""
            if old != text:
                lines = difflib.unified_diff(
                    old.splitlines(), text.splitlines(), f"run/{name}", f"now/{name}", lineterm=""
                )
                found[name] = list(lines)
    return found


def print_diff(changed: dict[str, list[str]], say: Callable[[str], None] = print) -> None:
    """Prints what has changed in the code, the beginning of it if it is long."""
    lines = [line for diff in changed.values() for line in diff]
    for line in lines[:DIFF_LINES]:
        say(line)
    if len(lines) > DIFF_LINES:
        say(f"… and {len(lines) - DIFF_LINES} lines more")
