"""Configuration: typed dataclasses filled from one TOML file and `--section.key=value` overrides.

One table of the file is one dataclass here; each key states its default, meaning and what a resumed
run may do with it, so that `--help` and the README's table come from this file alone. It also holds
what every program shares: paths and the way in which a user's mistake is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Relative paths start here. A run's snapshot of this code (job.py) keeps the repository's.
ROOT = Path(os.environ.get("ROCKET_ROOT") or Path(__file__).parent).resolve()
DEFAULT_CONFIG = ROOT / "config" / "tiny.toml"
ACCEPT_CHANGES = "--accept-changes"
DATASET_VERSION = 1  # of the format that prepare.py writes and dataset.py reads
MAX_VOCAB_SIZE = 65_536  # token ids are stored as uint16

# Dense bfloat16 FLOP/s by the makers' datasheets; the first name found in the device's wins.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}

Resume = Literal["free", "consent", "refused"]
Recompute = Literal["none", "selective", "block"]
DOCUMENTS = ("auto", "row", "file", "line", "blank_line")  # and two kinds of table

# Trainer options of SentencePiece that `[tokenizer]` passes on as they are. Left out are those that
# Rocket sets itself (input, output, vocabulary size, the ids of the special pieces).
SENTENCEPIECE_OPTIONS = (
    "add_dummy_prefix allow_whitespace_only_pieces byte_fallback character_coverage"
    " control_symbols differential_privacy_clipping_threshold differential_privacy_noise_level"
    " enable_differential_privacy escape_whitespaces hard_vocab_limit input_sentence_size"
    " max_sentence_length max_sentencepiece_length mining_sentence_size model_type"
    " normalization_rule_name normalization_rule_tsv num_sub_iterations num_threads"
    " pretokenization_delimiter remove_extra_whitespaces required_chars seed_sentencepiece_size"
    " seed_sentencepieces_file shrinking_factor shuffle_input_sentence"
    " split_by_number split_by_unicode_script split_by_whitespace split_digits"
    " train_extremely_large_corpus treat_whitespace_as_suffix unk_surface use_all_vocab"
    " user_defined_symbols vocabulary_output_piece_score"
).split()


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

STARTED_BY = os.getppid()  # of a rank, torchrun's agent, known before torch takes its seconds

# Exit codes by which the one who started a rank knows what became of it (attempts.py).
LOST_RANK, SICK_NODE = os.EX_TEMPFAIL, os.EX_UNAVAILABLE


class UserError(Exception):
    """A mistake that the user can mend: one line that says what, where and what to do."""

    code = os.EX_USAGE  # the exit code of a rank; of a program that is none it is 1
    # Where several processes raise it alike: the variable that is 0 in the one that prints it.
    printed_by: str | None = None


class ConfigError(UserError):
    """A mistake in the configuration or on the command line."""

    printed_by = "LOCAL_RANK"  # one a node: what is wrong may be wrong on one node alone


def _key(rule: Resume, default: Any, help: str, low: float | None = None) -> Any:
    """A configuration key: what a resumed run may do with it, default, meaning, lowest value."""
    metadata = {"help": help, "resume": rule, "low": low}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


free = functools.partial(_key, "free")  # a resumed run may change it
consent = functools.partial(_key, "consent")  # with --accept-changes
fixed = functools.partial(_key, "refused")  # it would be another run


@dataclass
class TokenizerConfig:
    """Any trainer option of SentencePiece may stand in this table too and is passed on."""

    path: str = free("data/tokenizer.model", "SentencePiece model, written by train_tokenizer.py")
    vocab_size: int = fixed(
        32_000, "pieces, at most 65,536; five are for conversations (<|user|>, …)", low=2
    )
    sample_bytes: int = free(
        100_000_000, "bytes of training text to learn from; about 17 bytes of memory each", low=1
    )
    options: dict = free({}, "trainer options of SentencePiece, written as keys of this table")


@dataclass
class DataConfig:
    sources: list[str] = free(
        ["python-stdlib"],
        "files, directories or globs of text, CSV, TSV, JSON lines or Parquet; hf://datasets/…; or"
        " python-stdlib",
    )
    val_sources: list[str] = free([], "sources used as the validation split, whole")
    test_sources: list[str] = free([], "sources used as the test split, whole")
    raw_dir: str = free("data/raw", "where prepare.py --download puts hf:// sources")
    dir: str = free("data/tiny", "prepared dataset")
    mixture: dict = free(
        {}, 'prepared datasets and their weights, instead of dir: {"data/a" = 0.7, "data/b" = 0.3}'
    )
    format: Literal["text", "instruct"] = free(
        "text", "text: documents; instruct: conversations with a loss mask"
    )
    text_column: str = free("text", "column or JSON field that holds the text")
    columns: dict = free(
        {}, 'instruct: the column of each role, in order: {user = "question", assistant = "answer"}'
    )
    messages_column: str = free(
        "messages",
        "instruct, without columns: the column of lists of {role, content} or {from, value}",
    )
    template: dict = free(
        {role: f"<|{role}|>{{content}}<|end|>" for role in ("system", "user", "assistant")},
        "instruct: how the message of each role is written",
    )
    train_on: Literal["responses", "all"] = free(
        "responses", "instruct: tokens that the loss falls on"
    )
    too_long: Literal["truncate", "drop"] = free(
        "truncate", "instruct: what to do with a conversation above seq_len tokens"
    )
    document: str | dict = free(
        "auto", f'{", ".join(DOCUMENTS)}, {{starts = "regex"}} or {{lines = 200}}; auto: by format'
    )
    document_mask: bool = fixed(False, "attention stays within a document")
    verify: bool = free(
        True, "compare the shards with their sha256 beside training, once a dataset"
    )
    max_document_bytes: int = free(
        16_000_000, "a larger document is a bad one, see on_error", low=1
    )
    errors: Literal["strict", "replace"] = free(
        "strict", "text that is not UTF-8: bad, or read with U+FFFD in its place"
    )
    on_error: Literal["stop", "skip"] = free(
        "stop", "at a bad document: stop, or leave it out and list it"
    )
    deduplicate: bool = free(False, "drop documents of a split that equal an earlier one")
    val_fraction: float = free(0.01, "share of documents held out for validation", low=0)
    test_fraction: float = free(0.0, "share of documents held out for testing", low=0)
    split_seed: int = free(0, "seed of the split by document content")
    part_bytes: int = free(0, "bytes of source a unit of work; 0: by the corpus' size", low=0)
    workers: int = free(0, "processes that prepare.py uses; 0: one a core", low=0)
    seq_len: int = fixed(1024, "tokens a training sequence, at most model.max_seq_len", low=1)


@dataclass
class ModelConfig:
    dim: int = fixed(768, "width of the residual stream", low=1)
    n_layers: int = fixed(12, "transformer blocks", low=1)
    n_heads: int = fixed(12, "query heads; dim / n_heads is whole and even", low=1)
    n_kv_heads: int = fixed(0, "key and value heads, a divisor of n_heads; 0: as n_heads", low=0)
    ffn_dim: int = fixed(
        0, "width of the feed-forward; 0: 8/3 dim, rounded up to a multiple of 256", low=0
    )
    max_seq_len: int = fixed(2048, "longest context in tokens, when sampling too", low=1)
    rope_theta: float = fixed(10_000.0, "base of the rotary embedding", low=1)
    norm_eps: float = fixed(1e-5, "epsilon of RMSNorm", low=0)
    tie_embeddings: bool = fixed(False, "one matrix for input and output embeddings")
    init_std: float = fixed(0.02, "deviation of the initial weights", low=0)


@dataclass
class TrainConfig:
    out_dir: str = free("out/run", "run directory")
    seed: int = fixed(1337, "seed of weights and data order", low=0)
    max_steps: int = consent(0, "optimizer steps of the run; or give epochs", low=0)
    epochs: float = consent(
        0.0, "length of the run in passes over the data; or give max_steps", low=0
    )
    stop_at_step: int = free(0, "save and stop at this step, the schedule unchanged; 0: off", low=0)
    max_hours: float = free(
        0.0, "save and stop before a job has lasted this long; 0: Slurm's limit alone", low=0
    )
    global_batch_size: int = fixed(32, "sequences an optimizer step, over all ranks", low=1)
    micro_batch_size: int = free(8, "most sequences a forward pass of one rank", low=1)
    init_from: str = fixed("", "run or checkpoint whose weights a new run starts from")
    device: Literal["auto", "cpu", "cuda"] = free("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = consent(
        "auto", "compute type (weights stay float32); auto: what the device does well"
    )
    compile: Literal["auto", "on", "off"] = free(
        "auto", "torch.compile, which takes a minute at the start; auto: on a GPU"
    )
    deterministic: bool = free(
        False, "GPU: the same bits each time, on the same kind and number; slower"
    )
    loss_chunk: int = free(
        -1,
        "tokens whose logits exist at a time in the loss; 0: all; -1: 8192 on a GPU, else 2048",
        low=-1,
    )
    recompute: Recompute = free(
        "none",
        "activation checkpointing: the backward pass makes again all but products and attention"
        " (selective) or all of a block, to save memory",
    )
    log_interval: int = free(10, "steps between rows of metrics.jsonl", low=1)
    eval_interval: int = free(250, "steps between evaluations; 0: only at the end", low=0)
    eval_sequences: int = free(
        512, "sequences an evaluation, spread evenly; 0: the whole split", low=0
    )
    sample_prompts: int = free(
        4,
        "validation prompts whose predictions samples.jsonl keeps, and a continuation; 0: nothing",
        low=0,
    )
    max_attempts: int = free(
        3, "attempts in a row without a new checkpoint before a job no longer comes back", low=1
    )
    max_bad_steps: int = free(10, "skipped steps in a row before the run stops", low=1)
    spike_factor: float = consent(
        0.0, "skip a step whose gradient norm is this many times the running mean; 0: off", low=0
    )
    patience: int = free(0, "evaluations without a new best before stopping; 0: off", low=0)


@dataclass
class OptimizerConfig:
    name: Literal["adamw", "muon"] = fixed(
        "adamw", "muon: for the matrices of the blocks, with adamw for the rest"
    )
    learning_rate: float = consent(6e-4, "peak learning rate", low=0)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = consent(
        "cosine", "decay after warm-up; linear goes to zero, wsd decays at the end"
    )
    warmup_steps: int = consent(100, "steps of linear warm-up", low=0)
    min_lr_fraction: float = consent(0.1, "cosine: final rate as a share of the peak", low=0)
    decay_fraction: float = consent(0.2, "wsd: share of the run spent on the decay", low=0)
    momentum: float = consent(0.95, "muon: decay of the momentum, below 1", low=0)
    beta1: float = consent(0.9, "decay of the first moment, below 1", low=0)
    beta2: float = consent(0.95, "decay of the second moment, below 1", low=0)
    eps: float = consent(1e-8, "epsilon of AdamW", low=0)
    weight_decay: float = consent(0.1, "decay of matrices (never of norms)", low=0)
    grad_clip: float = consent(1.0, "largest gradient norm; 0: no clipping", low=0)


@dataclass
class ParallelConfig:
    strategy: Literal["ddp", "fsdp", "hsdp"] = free(
        "ddp", "ddp: whole model a rank; fsdp: sharded; hsdp: sharded in a node"
    )
    reshard_after_forward: bool = free(True, "fsdp: free gathered weights after forward")
    reduce_once: bool = free(
        False,
        "fsdp: reduce gradients once a step and not at each micro-batch, for memory as without",
    )
    timeout_seconds: float = free(
        600, "a rank that keeps the others waiting longer in training is an error", low=1
    )


@dataclass
class CheckpointConfig:
    interval: int = free(
        1000, "steps between checkpoints, beside new bests and the end; 0: none between", low=0
    )
    interval_minutes: float = free(0.0, "minutes between checkpoints, beside steps; 0: off", low=0)
    asynchronous: bool = free(False, "write in the background; takes memory for a second copy")
    keep_last: int = free(2, "newest checkpoints kept", low=1)
    keep_best: int = free(1, "best checkpoints by validation loss kept, weights only", low=0)


@dataclass
class LogConfig:
    report: bool = free(True, "write report.html at each evaluation and at the end")
    tensorboard: bool = free(
        False, "write TensorBoard's event files too, to tensorboard/ of the run directory"
    )
    wandb: bool = free(
        False,
        "keep a Weights & Biases run too, in wandb/ of the run directory; offline unless"
        " WANDB_MODE=online",
    )
    wandb_project: str = free("", "its project; empty: $WANDB_PROJECT, else rocket")


@dataclass
class Config:
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


SECTIONS = tuple(f.name for f in dataclasses.fields(Config))


def load_config(
    arguments: list[str],
    *,
    usage: str,
    sections: tuple[str, ...] = SECTIONS,
    flags: dict[str, str] | None = None,
) -> tuple[Config, list[str]]:
    """The configuration of a program, from `[CONFIG] [--section.key=value …] [--flag …]`.

    Precedence: defaults < file < command line. `flags` maps each flag to its help; the ones given
    come back in their order. One with a `=`, such as `--task=I/N`, takes a value and comes back
    with it.
    `--help` prints `usage`, the flags and the keys of `sections`, and exits.

    Raises:
        ConfigError: an unknown key or flag, a wrong type, a bad relation, an unreadable file.
    """
    flags = flags or {}
    if "--help" in arguments or "-h" in arguments:
        print(_help(usage, sections, flags))
        sys.exit(0)
    names = [a for a in arguments if not a.startswith("-")]
    if len(names) > 1:
        raise ConfigError(
            f"one CONFIG at a time, got {' and '.join(names)}; overrides read --section.key=value"
        )
    values = read_toml(_config_file(names[0]) if names else DEFAULT_CONFIG)
    given: list[str] = []
    valued = tuple(flag.partition("=")[0] + "=" for flag in flags if "=" in flag)
    for argument in arguments:
        if argument in flags or argument.startswith(valued):
            given.append(argument)
        elif argument.startswith("--") and "." in argument.partition("=")[0]:
            _override(values, argument)
        elif argument.startswith("-"):
            raise ConfigError(
                f"unknown option {argument}{_nearest(argument, flags)}; keys: --section.key=value"
            )
    return build_config(values), given


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ConfigError where it can't be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def build_config(values: dict[str, Any]) -> Config:
    """Typed, checked configuration from nested tables; ConfigError names the key that is wrong."""
    config = Config()
    for section, table in values.items():
        if section not in SECTIONS:
            raise ConfigError(f"unknown table [{section}]{_nearest(section, SECTIONS)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{section} is a table: write [{section}] and its keys below")
        _fill(getattr(config, section), section, table)
    _check_relations(config)
    return config


def _fill(target: Any, section: str, table: dict[str, Any]) -> None:
    hints = typing.get_type_hints(type(target))
    fields = {f.name: f for f in dataclasses.fields(target) if f.name != "options"}
    extra = SENTENCEPIECE_OPTIONS if section == "tokenizer" else ()
    for name, value in table.items():
        path = f"{section}.{name}"
        if name in fields:
            value = _typed(path, value, hints[name])
            low = fields[name].metadata["low"]
            if low is not None and value < low:
                raise ConfigError(f"{path} must be at least {low}, not {value}")
            setattr(target, name, value)
        elif name in extra:
            if not isinstance(value, str | int | float | list):
                raise ConfigError(f"{path} is a string, number, boolean or list, not {value!r}")
            target.options[name] = value
        else:
            everywhere = [
                f"{s}.{f.name}" for s in SECTIONS for f in dataclasses.fields(getattr(Config(), s))
            ]
            nearest = _nearest(name, [*fields, *extra], f"{section}.") or _nearest(path, everywhere)
            raise ConfigError(f"unknown key {path}{nearest}")


def _typed(path: str, value: Any, hint: Any) -> Any:
    """The value as the type of its key, integers widened to float; ConfigError on another type."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(
                f"{path} is one of {', '.join(choices)}, not {value!r}"
                + _nearest(str(value), choices)
            )
        return value
    if hint is float and type(value) is int:
        value = float(value)
    if hint == list[str]:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f'{path} is a list of strings, such as ["a.txt", "b"], not {value!r}')
        return value
    if hint == (str | dict):
        if not isinstance(value, str | dict):
            raise ConfigError(f"{path} is a string or a table, not {value!r}")
        return value
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        names[dict] = 'a table, such as {a = "b"}'
        raise ConfigError(f"{path} is {names[hint]}, not {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{path} is a finite number, not {value}")
    return value


def _override(values: dict[str, Any], argument: str) -> None:
    """Sets `--section.key=value` in the tables: TOML syntax, or bare text for a string."""
    path, equals, text = argument[2:].partition("=")
    if not equals:
        raise ConfigError(f"{argument} lacks a value: write {argument}=value")
    section, _, name = path.partition(".")
    if section not in SECTIONS:
        raise ConfigError(f"unknown key {path}{_nearest(section, SECTIONS, '', f'.{name}')}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    hints = typing.get_type_hints(type(getattr(Config(), section)))
    if hints.get(name) is str and not isinstance(value, str):
        value = text
    values.setdefault(section, {})[name] = value


def _check_relations(config: Config) -> None:
    """Fills what follows from other keys and refuses keys that contradict each other."""
    model, train, data = config.model, config.train, config.data
    model.n_kv_heads = model.n_kv_heads or model.n_heads
    model.ffn_dim = model.ffn_dim or 256 * math.ceil(8 * model.dim / 3 / 256)
    head_dim = model.dim // model.n_heads

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    require(
        model.dim % model.n_heads == 0,
        f"model.dim ({model.dim}) must divide by model.n_heads ({model.n_heads})",
    )
    require(
        head_dim % 2 == 0,
        f"model.dim / model.n_heads ({head_dim}) must be even: rotary embeddings turn pairs",
    )
    require(
        model.n_heads % model.n_kv_heads == 0,
        f"model.n_heads ({model.n_heads}) must divide by model.n_kv_heads ({model.n_kv_heads})",
    )
    require(
        data.seq_len <= model.max_seq_len,
        f"data.seq_len ({data.seq_len}) is above model.max_seq_len ({model.max_seq_len})",
    )
    require(
        config.tokenizer.vocab_size <= MAX_VOCAB_SIZE,
        f"tokenizer.vocab_size ({config.tokenizer.vocab_size}) is above {MAX_VOCAB_SIZE:,}:"
        " token ids are stored as uint16",
    )
    require(
        data.val_fraction + data.test_fraction < 1,
        f"data.val_fraction ({data.val_fraction}) and data.test_fraction ({data.test_fraction})"
        " leave nothing to train on",
    )
    require(
        not (train.max_steps and train.epochs),
        f"train.max_steps ({train.max_steps}) and train.epochs ({train.epochs}) both set the"
        " length of the run: give one",
    )
    for name in ("momentum", "beta1", "beta2"):
        beta = getattr(config.optimizer, name)
        require(beta < 1, f"optimizer.{name} must be below 1, not {beta}")
    _check_document(data.document)
    _check_instruct(data)
    for name, weight in data.mixture.items():
        number = type(weight) in (int, float) and 0 < weight < math.inf
        require(number, f"data.mixture: the weight of {name} is a number above 0, not {weight!r}")


def _check_document(rule: str | dict) -> None:
    if rule in DOCUMENTS:
        return
    if isinstance(rule, dict) and len(rule) == 1:
        starts, lines = rule.get("starts"), rule.get("lines")
        if isinstance(starts, str) or (type(lines) is int and lines > 0):
            return
    raise ConfigError(
        f'data.document is {", ".join(DOCUMENTS)}, {{starts = "regex"}} or {{lines = 200}},'
        f" not {rule!r}"
    )


def _check_instruct(data: DataConfig) -> None:
    """ConfigError for a template or columns that make no conversation."""
    for role, text in data.template.items():
        if not isinstance(text, str) or text.count("{content}") != 1:
            raise ConfigError(f"data.template.{role} is a text with {{content}} once, not {text!r}")
    for role, column in data.columns.items():
        if role not in data.template:
            near = _nearest(role, data.template)
            raise ConfigError(f"data.columns: data.template has no role {role!r}{near}")
        if not isinstance(column, str):
            raise ConfigError(f"data.columns.{role} is the name of a column, not {column!r}")
    for name, table in (("template", data.template), ("columns", data.columns)):
        if table and "assistant" not in table:
            raise ConfigError(f"data.{name} lacks the role assistant, whose words are learnt")
    if data.format == "instruct" and not data.template:
        raise ConfigError("data.template is empty: say how the message of each role is written")
    if data.format == "instruct" and data.document not in ("auto", "row"):
        raise ConfigError("data.document: with data.format = instruct a document is a row")


def loss_chunk(config: Config, on_gpu: bool) -> int:
    """Tokens whose logits exist at a time in the loss, 0 for all; the default is the device's.

    Each chunk adds its share of the head's gradient in float32, which a GPU spends on moving
    memory: at 2,048 tokens an estimated 2% of a 110M model's step on an H100, at 8,192 a quarter of
    that. A CPU's products take so long that more memory would buy nothing.
    """
    if config.train.loss_chunk >= 0:
        return config.train.loss_chunk
    return 8192 if on_gpu else 2048


def tables(config: Config) -> dict[str, dict[str, Any]]:
    """The whole configuration as plain tables, which `build_config` reads back to an equal one."""
    values = dataclasses.asdict(config)
    for table in values.values():
        table.update(table.pop("options", {}))
    return values


def dump_toml(config: Config) -> str:
    """The whole configuration as the text of a TOML file."""
    lines = []
    for section, table in tables(config).items():
        lines += [f"[{section}]", *(f"{name} = {_toml_value(v)}" for name, v in table.items()), ""]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
        )
    if isinstance(value, str):  # a JSON string is a TOML basic string, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def changes(old: Config, new: Config) -> dict[Resume, list[str]]:
    """The keys whose values differ, as `section.key: old -> new`, by their rule on resume."""
    found: dict[Resume, list[str]] = {"free": [], "consent": [], "refused": []}
    for section in SECTIONS:
        for f in dataclasses.fields(getattr(old, section)):
            before, after = (
                getattr(getattr(old, section), f.name),
                getattr(getattr(new, section), f.name),
            )
            if before != after:
                found[f.metadata["resume"]].append(f"{section}.{f.name}: {before} -> {after}")
    return found


def resolve_path(text: str) -> Path:
    """A configured path: `~` and `$VARIABLES` expanded, relative ones from the repository.

    Raises:
        ConfigError: empty, or with a variable that is not set.
    """
    return Path(_expand(text, str))


def resolve_pattern(text: str) -> str:
    """A configured glob, as resolve_path: only what `text` itself says is a pattern.

    Brackets in the repository's path, in a home directory or in a variable are escaped.
    """
    return _expand(text, glob.escape)


def _expand(text: str, quote: Callable[[str], str]) -> str:
    """An absolute path; what does not stand in `text` goes through `quote`."""
    if not text:
        raise ConfigError("a path is empty; is the shell variable that was to hold it set?")

    def value(match: re.Match[str]) -> str:
        name = match[1].strip("{}")
        if name not in os.environ:
            raise ConfigError(f"{text}: the variable is not set; set it or write the path out")
        return quote(os.environ[name])

    expanded = re.sub(r"\$(\w+|\{[^}]*\}|)", value, text, flags=re.ASCII)
    if expanded.startswith("~"):
        home, _, rest = expanded.partition("/")
        expanded = os.path.join(quote(os.path.expanduser(home)), rest)
    return os.path.join(quote(str(ROOT)), expanded)


def _config_file(name: str) -> Path:
    """A CONFIG argument: from the current directory, as shells complete it, else the repository."""
    here = Path(name).expanduser()
    path = here if here.exists() else resolve_path(name)
    if not path.is_file():
        shipped = sorted(p.stem for p in (ROOT / "config").glob("*.toml"))
        raise ConfigError(f"{name}: no such file; shipped in config/: {', '.join(shipped)}")
    return path


class Parser(argparse.ArgumentParser):
    """A command line without a CONFIG; its mistakes are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def existing_path(name: str) -> Path:
    """A path of a command line: from the current directory if it is there, else as in resolve_path.

    Raises:
        UserError: no system can have such a path.
    """
    try:
        here = Path(name).expanduser()
        return here if here.exists() else resolve_path(name)
    except (OSError, RuntimeError) as error:  # a name too long; ~ of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name[:100]}: {reason}") from None


def read_utf8(path: Path) -> str:
    """The text of a file that the user named, its line ends as they are.

    Raises:
        UserError: it can't be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def read_rows(path: Path) -> list[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank; errors as read_utf8's."""
    lines = enumerate(read_utf8(path).split("\n"), 1)
    return [
        (row, line.removesuffix("\r").removeprefix("\ufeff")) for row, line in lines if line.strip()
    ]


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it appears whole or not at all, even if the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def file_sha256(path: Path) -> str:
    """The digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name, such as wandb/, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def available_cores() -> int:
    """Cores that this process may use, which on a shared node are fewer than there are.

    A Slurm that does not bind jobs to their cores still says how many they have.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE", cores)))


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable; a rename is safe only after its directory's sync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nearest(name: str, names: Any, prefix: str = "", suffix: str = "") -> str:
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{found[0]}{suffix}?" if found else ""


def _help(usage: str, sections: tuple[str, ...], flags: dict[str, str]) -> str:
    lines = [
        usage.strip(),
        "",
        "CONFIG is a TOML file (default config/tiny.toml). Flags:",
        "  --help: this text",
    ]
    lines += [f"  {flag}: {text}" for flag, text in flags.items()]
    for section in sections:
        lines += ["", f"[{section}]"]
        for name, default, help, _ in describe(section):
            lines.append(f"  --{section}.{name}={default}\n      {help}")
        if section == "tokenizer":
            options = "and options of SentencePiece's trainer: " + ", ".join(SENTENCEPIECE_OPTIONS)
            lines += textwrap.wrap(options, 100, initial_indent="  ", subsequent_indent=" " * 6)
    return "\n".join(lines)


def describe(section: str) -> list[tuple[str, str, str, str]]:
    """(key, default as TOML, meaning with all words that are allowed, rule on resume) of a section,
    in order."""
    defaults = getattr(Config(), section)
    hints, found = typing.get_type_hints(type(defaults)), []
    for f in dataclasses.fields(defaults):
        if f.name == "options":
            continue
        meaning = f.metadata["help"]
        if typing.get_origin(hints[f.name]) is Literal:
            meaning += f"; one of {', '.join(typing.get_args(hints[f.name]))}"
        default = _toml_value(getattr(defaults, f.name))
        found.append((f.name, default, meaning, f.metadata["resume"]))
    return found


def markdown_table() -> str:
    """The README's table of all keys."""
    lines = ["| key | default | meaning | on resume |", "|---|---|---|---|"]
    for section in SECTIONS:
        for name, default, help, resume in describe(section):
            cells = (f"`{section}.{name}`", f"`{default}`", help, resume)
            row = (cell.replace("|", "\\|") for cell in cells)  # a bar would end the cell
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def run_program(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a program's main; a user's mistake becomes one line and exit code 1."""
    with told_in_one_line():
        main(sys.argv[1:])
        sys.stdout.flush()
    sys.exit(0)


def check_command_line(**expected: Any) -> None:
    """Answers --help, and refuses what load_config(…, **expected) would in main.

    Called before a program's slow imports, so that nobody waits seconds for either.
    """
    with told_in_one_line():
        load_config(sys.argv[1:], **expected)


def tell(line: str) -> None:
    """Writes a line to standard error in one piece: ranks share it, and in the unbuffered Python
    that torchrun starts, print() writes the line's end apart, behind what another rank says."""
    sys.stderr.write(f"{line}\n")


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Within it a user's mistake becomes one line and exit code 1, or of a rank the error's own."""
    is_rank = "TORCHELASTIC_RUN_ID" in os.environ
    sys.stdout.reconfigure(errors="replace")  # where the terminal can't show all of Unicode
    try:
        yield
    except UserError as error:
        if error.printed_by is None or os.environ.get(error.printed_by, "0") == "0":
            tell(f"{Path(sys.argv[0]).name}: error: {error}")
        sys.exit(error.code if is_rank else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        full = error.errno in DISK_FULL
        if not full and not isinstance(error, BrokenPipeError):
            raise
        if full:
            where = error.filename or "a file or standard output"
            tell(f"{Path(sys.argv[0]).name}: error: no space is left for {where}")
        # else a reader that has left, such as `| head`; what is left to write has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UserError.code if is_rank else 1)


def main(arguments: list[str]) -> None:
    """Without arguments prints the README's table, with CONFIG … the run directory, for scripts."""
    if not arguments:
        print(markdown_table())
        return
    flags = {ACCEPT_CHANGES: "as rocket.py's"}
    config, _ = load_config(arguments, usage=str(main.__doc__), flags=flags)
    print(resolve_path(config.train.out_dir))


if __name__ == "__main__":
    run_program(main)
