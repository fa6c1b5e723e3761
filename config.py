"""Configuration: typed dataclasses, filled from one TOML file and `--section.key=value` overrides.

Each table of the file is a dataclass here. Each key states its default, its meaning and whether a
resumed run may change it; `--help` and docs/configuration.md are made from that. The file also
holds what all programs share: paths, durable files, and errors in one line.
"""

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

# Relative paths start here. For a run's snapshot of the code too: slurm/train.sh sets ROCKET_ROOT.
ROOT = Path(os.environ.get("ROCKET_ROOT") or Path(__file__).parent).resolve()
DEFAULT_CONFIG = ROOT / "config" / "tiny.toml"
ACCEPT_CHANGES = "--accept-changes"
DATASET_VERSION = 1  # of the format that prepare.py writes and dataset.py reads
MAX_VOCAB_SIZE = 65_536  # token ids are stored as uint16

# Dense bfloat16 FLOP/s from datasheets; the first name that occurs in the device's name counts.
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

# Trainer options of SentencePiece that `[tokenizer]` passes on. Left out are those that Rocket sets
# itself (input, output, vocabulary size, the ids of the special pieces).
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
# A rank's parent, torchrun's agent; asked before the slow import of torch.
STARTED_BY = os.getppid()
LOST_RANK, SICK_NODE = os.EX_TEMPFAIL, os.EX_UNAVAILABLE  # exit codes that slurm/attempts.py reads


class UserError(Exception):
    """A mistake of the user, in one line: what is wrong, where, and how to fix it."""

    code = os.EX_USAGE  # the exit code of a rank; other programs exit with 1
    # If several processes raise the same error: the variable that is 0 in the one that prints it.
    printed_by = ""


class ConfigError(UserError):
    """A mistake in the configuration or on the command line."""

    printed_by = "LOCAL_RANK"  # once per node: only one node may have the mistake


def _key(rule: Resume, default: Any, help: str, low: float = 0) -> Any:
    """A configuration key: its rule on resume, its default, its meaning, and a number's minimum."""
    metadata = {"help": help, "resume": rule, "low": low}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


free = functools.partial(_key, "free")  # a resumed run may change it
consent = functools.partial(_key, "consent")  # with --accept-changes
fixed = functools.partial(_key, "refused")  # only a new run may


@dataclass
class TokenizerConfig:
    """This table also takes any trainer option of SentencePiece and passes it on."""

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
    format: Literal["text", "instruct"] = free("text", "text: documents; instruct: conversations")
    text_column: str = free("text", "column or JSON field that holds the text")
    columns: dict = free(
        {}, 'instruct: the column of each role, in order: {user = "question", assistant = "answer"}'
    )
    messages_column: str = free(
        "messages", "instruct without columns: column of lists of {role, content} or {from, value}"
    )
    template: dict = free(
        {role: f"<|{role}|>{{content}}<|end|>" for role in ("system", "user", "assistant")},
        "instruct: how the message of each role is written",
    )
    train_on: Literal["responses", "all"] = free("responses", "instruct: which tokens to train on")
    too_long: Literal["truncate", "drop"] = free(
        "truncate", "instruct: what to do with a conversation above seq_len tokens"
    )
    document: str | dict = free(
        "auto", f'{", ".join(DOCUMENTS)}, {{starts = "regex"}} or {{lines = 200}}; auto: by format'
    )
    document_mask: bool = fixed(False, "attention stays within a document")
    verify: bool = free(True, "check the shards' sha256 while training, once per dataset")
    max_document_bytes: int = free(16_000_000, "a larger document is bad, see on_error", low=1)
    errors: Literal["strict", "replace"] = free(
        "strict", "text that is not UTF-8: bad, or read with U+FFFD in its place"
    )
    on_error: Literal["stop", "skip"] = free("stop", "at a bad document: stop, or skip and list it")
    deduplicate: bool = free(False, "drop documents of a split that equal an earlier one")
    val_fraction: float = free(0.01, "share of documents held out for validation")
    test_fraction: float = free(0.0, "share of documents held out for testing")
    split_seed: int = free(0, "seed of the split by document content", low=-math.inf)
    part_bytes: int = free(0, "bytes of source per unit of work; 0: by the size of the corpus")
    workers: int = free(0, "processes that prepare.py uses; 0: one per core")
    seq_len: int = fixed(1024, "tokens per training sequence, at most model.max_seq_len", low=1)


@dataclass
class ModelConfig:
    dim: int = fixed(768, "width of the residual stream", low=1)
    n_layers: int = fixed(12, "transformer blocks", low=1)
    n_heads: int = fixed(12, "query heads; dim / n_heads is whole and even", low=1)
    n_kv_heads: int = fixed(0, "key and value heads, a divisor of n_heads; 0: as n_heads")
    ffn_dim: int = fixed(0, "feed-forward width; 0: 8/3 dim, rounded up to a multiple of 256")
    max_seq_len: int = fixed(2048, "longest context in tokens, when sampling too", low=1)
    rope_theta: float = fixed(10_000.0, "base of the rotary embedding", low=1)
    norm_eps: float = fixed(1e-5, "epsilon of RMSNorm")
    tie_embeddings: bool = fixed(False, "one matrix for input and output embeddings")
    init_std: float = fixed(0.02, "standard deviation of the initial weights")
    base_dim: int = consent(0, "dim for which rates and init_std are right; 0: for this model's")
    base_layers: int = consent(0, "n_layers for which they are right; 0: for this model's")


@dataclass
class TrainConfig:
    out_dir: str = free("out/run", "run directory")
    seed: int = fixed(1337, "seed of weights and data order")
    max_steps: int = consent(0, "optimizer steps of the run; or give epochs")
    epochs: float = consent(0.0, "length of the run in passes over the data; or give max_steps")
    stop_at_step: int = free(0, "save and stop at this step, the schedule unchanged; 0: off")
    max_hours: float = free(0.0, "save and stop before a job has run this long; 0: Slurm's limit")
    global_batch_size: int = fixed(32, "sequences per optimizer step, over all ranks", low=1)
    micro_batch_size: int = free(8, "most sequences per forward pass of one rank", low=1)
    init_from: str = fixed("", "run or checkpoint whose weights a new run starts from")
    branch_from: str = fixed(
        "", "run or checkpoint that a new run goes on from: weights, optimizer state and step"
    )
    device: Literal["auto", "cpu", "cuda"] = free("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = consent(
        "auto", "compute type (weights stay float32); auto: what the device does well"
    )
    compile: Literal["auto", "on", "off"] = free(
        "auto", "torch.compile, which takes a minute at the start; auto: on a GPU"
    )
    deterministic: bool = free(False, "GPU: same bits on the same number and kind of GPUs; slower")
    loss_chunk: int = free(
        -1, "tokens per chunk of logits in the loss; 0: all; -1: 8192 on a GPU, else 2048", low=-1
    )
    recompute: Recompute = free(
        "none",
        "activation checkpointing: all but products and attention (selective) or all (block)",
    )
    log_interval: int = free(10, "steps between rows of metrics.jsonl", low=1)
    eval_interval: int = free(250, "steps between evaluations; 0: only at the end")
    eval_sequences: int = free(512, "sequences per evaluation, spread evenly; 0: the whole split")
    sample_prompts: int = free(
        4, "validation prompts whose predictions and continuations go to samples.jsonl; 0: none"
    )
    max_attempts: int = free(
        3, "attempts in a row without a new checkpoint before a job no longer comes back", low=1
    )
    max_bad_steps: int = free(10, "skipped steps in a row before the run stops", low=1)
    spike_factor: float = consent(
        0.0, "skip a step whose gradient norm is this many times the running mean; 0: off"
    )
    patience: int = free(0, "evaluations without a new best before stopping; 0: off")


@dataclass
class OptimizerConfig:
    name: Literal["adamw", "muon"] = fixed("adamw", "muon: for matrices of blocks, else adamw")
    learning_rate: float = consent(6e-4, "peak learning rate")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = consent(
        "cosine", "decay after warm-up; linear goes to zero, wsd decays at the end"
    )
    warmup_steps: int = consent(100, "steps of linear warm-up")
    min_lr_fraction: float = consent(0.1, "cosine: final rate as a share of the peak")
    decay_fraction: float = consent(0.2, "wsd: share of the run spent on the decay")
    momentum: float = consent(0.95, "muon: decay of the momentum, below 1")
    beta1: float = consent(0.9, "decay of the first moment, below 1")
    beta2: float = consent(0.95, "decay of the second moment, below 1")
    eps: float = consent(1e-8, "epsilon of AdamW")
    weight_decay: float = consent(0.1, "decay of matrices (never of norms)")
    grad_clip: float = consent(1.0, "largest gradient norm; 0: no clipping")


@dataclass
class ParallelConfig:
    strategy: Literal["ddp", "fsdp", "hsdp"] = free(
        "ddp", "ddp: whole model per rank; fsdp: sharded; hsdp: sharded within a node"
    )
    reshard_after_forward: bool = free(True, "fsdp: free gathered weights after forward")
    reduce_once: bool = free(
        False, "fsdp: reduce gradients once per step, not per micro-batch; whole gradients per rank"
    )
    timeout_seconds: float = free(
        600, "a rank that keeps the others waiting longer in training is an error", low=1
    )


@dataclass
class CheckpointConfig:
    interval: int = free(1000, "steps between checkpoints, besides new bests and the end; 0: off")
    interval_minutes: float = free(0.0, "minutes between checkpoints, besides interval; 0: off")
    asynchronous: bool = free(False, "write in the background; takes memory for a second copy")
    keep_last: int = free(2, "newest checkpoints kept", low=1)
    keep_best: int = free(1, "best checkpoints by validation loss kept, weights only")


@dataclass
class LogConfig:
    report: bool = free(True, "write report.html at each evaluation and at the end")
    tensorboard: bool = free(False, "write TensorBoard's files too, to the run's tensorboard/")
    wandb: bool = free(
        False, "log to Weights & Biases too, in the run's wandb/; offline unless WANDB_MODE=online"
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


# The keys of each section, by name. tokenizer.options is none: it holds SentencePiece's own keys.
# Reads the fields' types, so this file has no `from __future__ import annotations`.
KEYS = {
    section.name: {f.name: f for f in dataclasses.fields(section.type) if f.name != "options"}
    for section in dataclasses.fields(Config)
}
SECTIONS = tuple(KEYS)
# Words for the types of keys, in errors.
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: 'a table, such as {a = "b"}',
    str | dict: "a string or a table",
    list[str]: 'a list of strings, such as ["a.txt", "b"]',
}


def load_config(
    arguments: list[str],
    *,
    usage: str,
    sections: tuple[str, ...] = SECTIONS,
    flags: dict[str, str] | None = None,
) -> tuple[Config, list[str]]:
    """The configuration of a program and its flags: `[CONFIG] [--section.key=value …] [--flag …]`.

    The command line overrides the file, which overrides the defaults. `flags` maps each flag to its
    help; one with a `=`, such as `--task=I/N`, takes a value. The flags given are returned
    in their order, values included. `--help` prints `usage`, flags and the keys of `sections`.

    Raises:
        ConfigError: an unknown key or flag, a wrong type, a bad relation, an unreadable file.
        SystemExit: after --help.
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
            override(values, argument)
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
            if home := next((s for s in SECTIONS if section in KEYS[s]), ""):
                raise ConfigError(f"{section} is a key of [{home}]: write it below that line")
            raise ConfigError(f"unknown table [{section}]{_nearest(section, SECTIONS)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{section} is a table: write [{section}] and its keys below")
        for name, value in table.items():
            set_key(config, section, name, value)
    _check_relations(config)
    return config


def set_key(config: Config, section: str, name: str, value: Any) -> None:
    """Sets a key, integers widened to float; ConfigError on an unknown key or a wrong value."""
    path, keys, target = f"{section}.{name}", KEYS[section], getattr(config, section)
    options = SENTENCEPIECE_OPTIONS if section == "tokenizer" else []
    if name in options:
        if not isinstance(value, str | int | float | list):
            raise ConfigError(f"{path} is a string, number, boolean or list, not {value!r}")
        target.options[name] = value
        return
    if name not in keys:
        everywhere = [f"{s}.{key}" for s in SECTIONS for key in KEYS[s]]
        nearest = _nearest(name, [*keys, *options], f"{section}.") or _nearest(path, everywhere)
        raise ConfigError(f"unknown key {path}{nearest}")
    kind, low = keys[name].type, keys[name].metadata["low"]
    if kind is float and type(value) is int:
        value = float(value)
    if typing.get_origin(kind) is Literal:
        if value not in (choices := typing.get_args(kind)):
            nearest = _nearest(str(value), choices)
            raise ConfigError(f"{path} is one of {', '.join(choices)}, not {value!r}{nearest}")
    elif not _fits(kind, value):
        raise ConfigError(f"{path} is {KINDS[kind]}, not {value!r}")
    elif kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} is a finite number, not {value}")
    elif kind in (int, float) and value < low:
        raise ConfigError(f"{path} must be at least {low}, not {value}")
    setattr(target, name, value)


def _fits(kind: Any, value: Any) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def override(values: dict[str, Any], argument: str) -> None:
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
    if name in KEYS[section] and KEYS[section][name].type is str and not isinstance(value, str):
        value = text
    values.setdefault(section, {})[name] = value


def _check_relations(config: Config) -> None:
    """Fills in what follows from other keys; ConfigError if keys contradict each other."""
    model, train, data = config.model, config.train, config.data
    model.n_kv_heads = model.n_kv_heads or model.n_heads
    model.ffn_dim = model.ffn_dim or 256 * math.ceil(8 * model.dim / 3 / 256)
    for name, factor in (("dim", "n_heads"), ("n_heads", "n_kv_heads")):
        whole, part = getattr(model, name), getattr(model, factor)
        if whole % part:
            raise ConfigError(f"model.{name} ({whole}) must divide by model.{factor} ({part})")
    if (head_dim := model.dim // model.n_heads) % 2:
        raise ConfigError(
            f"model.dim / model.n_heads ({head_dim}) must be even: rotary embeddings turn pairs"
        )
    if data.seq_len > model.max_seq_len:
        raise ConfigError(
            f"data.seq_len ({data.seq_len}) is above model.max_seq_len ({model.max_seq_len}):"
            " lower the one or raise the other"
        )
    if config.tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise ConfigError(
            f"tokenizer.vocab_size ({config.tokenizer.vocab_size}) is above {MAX_VOCAB_SIZE:,}:"
            " token ids are stored as uint16"
        )
    if data.val_fraction + data.test_fraction >= 1:
        raise ConfigError(
            f"data.val_fraction ({data.val_fraction}) and data.test_fraction ({data.test_fraction})"
            " leave nothing to train on"
        )
    if train.max_steps and train.epochs:
        raise ConfigError(
            f"train.max_steps ({train.max_steps}) and train.epochs ({train.epochs}) both set the"
            " length of the run: give one"
        )
    if train.init_from and train.branch_from:
        raise ConfigError(
            "train.init_from and train.branch_from both say where the run starts: give one"
        )
    for name in ("momentum", "beta1", "beta2"):
        if (beta := getattr(config.optimizer, name)) >= 1:
            raise ConfigError(f"optimizer.{name} must be below 1, not {beta}")
    for name, weight in data.mixture.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise ConfigError(
                f"data.mixture: the weight of {name} is a number above 0, not {weight!r}"
            )
    _check_documents(data)


def _check_documents(data: DataConfig) -> None:
    """ConfigError if the rule for documents, the template or the columns are malformed."""
    rule = data.document
    table = rule if isinstance(rule, dict) and len(rule) == 1 else {}
    starts, lines = table.get("starts"), table.get("lines")
    if not (rule in DOCUMENTS or isinstance(starts, str) or (type(lines) is int and lines > 0)):
        raise ConfigError(
            f'data.document is {", ".join(DOCUMENTS)}, {{starts = "regex"}} or {{lines = 200}},'
            f" not {rule!r}"
        )
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
            raise ConfigError(f"data.{name} lacks the role assistant, which is trained on")
    if data.format == "instruct" and not data.template:
        raise ConfigError("data.template is empty: say how the message of each role is written")
    if data.format == "instruct" and data.document not in ("auto", "row"):
        raise ConfigError("data.document: with data.format = instruct a document is a row")


def loss_chunk(config: Config, on_gpu: bool) -> int:
    """Tokens per chunk of logits in the loss, 0 for all; the default depends on the device.

    Each chunk adds its share of the head's gradient in float32. On a GPU that is memory traffic: at
    2,048 tokens an estimated 2% of a 110M model's step on an H100, at 8,192 a quarter of that. On a
    CPU the products take so long that larger chunks would gain nothing.
    """
    if config.train.loss_chunk >= 0:
        return config.train.loss_chunk
    return 8192 if on_gpu else 2048


def tables(config: Config) -> dict[str, dict[str, Any]]:
    """The whole configuration as plain tables, from which `build_config` makes an equal one."""
    values = dataclasses.asdict(config)
    for table in values.values():
        table.update(table.pop("options", {}))
    return values


def dump_toml(config: Config) -> str:
    """The whole configuration as the text of a TOML file."""
    lines = []
    for section, table in tables(config).items():
        lines += [f"[{section}]", *(f"{name} = {toml_value(v)}" for name, v in table.items()), ""]
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        pairs = (f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    # JSON writes strings, numbers and booleans as TOML does, DEL excepted.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def changes(old: Config, new: Config) -> dict[Resume, list[str]]:
    """The keys whose values differ, as `section.key: old -> new`, by their rule on resume."""
    found: dict[Resume, list[str]] = {"free": [], "consent": [], "refused": []}
    for section in SECTIONS:
        before, after = getattr(old, section), getattr(new, section)
        for f in dataclasses.fields(before):
            values = getattr(before, f.name), getattr(after, f.name)
            if values[0] != values[1]:
                line = f"{section}.{f.name}: {values[0]} -> {values[1]}"
                found[f.metadata["resume"]].append(line)
    return found


def resolve_path(text: str) -> Path:
    """A configured path: `~` and `$VARIABLES` expanded, relative ones start at the repository.

    Raises:
        ConfigError: the path is empty, or one of its variables is not set.
    """
    return Path(_expand(text, str))


def resolve_pattern(text: str) -> str:
    """A configured glob, expanded as by resolve_path. Only `text` itself is a pattern: brackets in
    the repository's path, the home directory or a variable are escaped."""
    return _expand(text, glob.escape)


def _expand(text: str, quote: Callable[[str], str]) -> str:
    """The absolute path; whatever is inserted into `text` goes through `quote`."""
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
    """The file of a CONFIG argument."""
    path = existing_path(name)
    if not path.is_file():
        shipped = sorted(p.stem for p in (ROOT / "config").glob("*.toml"))
        raise ConfigError(f"{name}: no such file; in config/: {', '.join(shipped)}")
    return path


class Parser(argparse.ArgumentParser):
    """The command line of a program without CONFIG; raises UserError for a mistake."""

    def __init__(self, **options: Any) -> None:
        look = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=look, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def existing_path(name: str) -> Path:
    """A path of a command line: relative to the current directory if it exists there, as shells
    complete it, else as in resolve_path; ConfigError if no system can have such a path."""
    try:
        here = Path(name).expanduser()
        return here if here.exists() else resolve_path(name)
    except (OSError, RuntimeError) as error:  # a name too long; ~ of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name[:100]}: {reason}") from None


def read_utf8(path: Path) -> str:
    """The text of a user's file, line ends unchanged; UserError if unreadable or not UTF-8."""
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


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing, {} if a crash has torn it."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def file_sha256(path: Path) -> str:
    """The digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it appears whole or not at all, even if the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable; a rename is safe only after its directory's sync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name, such as wandb/, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def available_cores() -> int:
    """The cores that this process may use: a shared node has more."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    # Slurm states a job's cores even where it does not bind the job to them.
    return min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE", cores)))


def _nearest(name: str, names: Any, prefix: str = "", suffix: str = "") -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{found[0]}{suffix}?" if found else ""


def _help(usage: str, sections: tuple[str, ...], flags: dict[str, str]) -> str:
    lines = [usage.strip(), "", "CONFIG is a TOML file (default config/tiny.toml). Flags:"]
    lines += [f"  {flag}: {text}" for flag, text in [("--help", "this text"), *flags.items()]]
    for section in sections:
        lines += ["", f"[{section}]"]
        for name, default, help, _ in describe(section):
            lines.append(f"  --{section}.{name}={default}\n      {help}")
        if section == "tokenizer":
            options = "and options of SentencePiece's trainer: " + ", ".join(SENTENCEPIECE_OPTIONS)
            lines += textwrap.wrap(options, 100, initial_indent="  ", subsequent_indent=" " * 6)
    return "\n".join(lines)


def describe(section: str) -> Iterator[tuple[str, str, str, str]]:
    """The keys of a section: name, default as TOML, meaning with the allowed words, resume rule."""
    defaults = getattr(Config(), section)
    for name, key in KEYS[section].items():
        meaning = key.metadata["help"]
        if typing.get_origin(key.type) is Literal:
            meaning += f"; one of {', '.join(typing.get_args(key.type))}"
        yield name, toml_value(getattr(defaults, name)), meaning, key.metadata["resume"]


def markdown_table() -> str:
    """The table of all keys in docs/configuration.md."""
    lines = ["| key | default | meaning | on resume |", "|---|---|---|---|"]
    for section in SECTIONS:
        for name, default, help, resume in describe(section):
            cells = (f"`{section}.{name}`", f"`{default}`", help, resume)
            row = (cell.replace("|", "\\|") for cell in cells)  # a bar would end the cell
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def run_program(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a program's main; a user's mistake becomes one line and exit code 1."""
    with errors_in_one_line():
        main(sys.argv[1:])
        sys.stdout.flush()
    sys.exit(0)


def check_command_line(**expected: Any) -> None:
    """Prints --help, or raises what load_config(…, **expected) will raise in main.

    Programs call it before their slow imports, so that nobody waits seconds for either.
    """
    with errors_in_one_line():
        load_config(sys.argv[1:], **expected)


def print_error(line: str) -> None:
    """Writes a line to standard error in one piece. Ranks share it, and in the unbuffered Python
    that torchrun starts, print() would write the line's end apart, behind another rank's line."""
    sys.stderr.write(f"{line}\n")


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turns a UserError inside into one line and exit code 1, of a rank into the error's code."""
    is_rank, program = "TORCHELASTIC_RUN_ID" in os.environ, Path(sys.argv[0]).name
    sys.stdout.reconfigure(errors="replace")  # where the terminal can't show all of Unicode
    try:
        yield
    except UserError as error:
        if os.environ.get(error.printed_by, "0") == "0":
            print_error(f"{program}: error: {error}")
        sys.exit(error.code if is_rank else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno in DISK_FULL:
            where = error.filename or "a file or standard output"
            print_error(f"{program}: error: no space is left for {where}")
        elif not isinstance(error, BrokenPipeError):
            raise
        # Nobody can take the rest of the output: the disk is full, or a reader (`| head`) has left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UserError.code if is_rank else 1)


def main(arguments: list[str]) -> None:
    """Prints the table of all keys, or with CONFIG … the run directory, for scripts."""
    if not arguments:
        print(markdown_table())
        return
    flags = {ACCEPT_CHANGES: "as rocket.py's"}
    config, _ = load_config(arguments, usage=str(main.__doc__), flags=flags)
    print(resolve_path(config.train.out_dir))


if __name__ == "__main__":
    run_program(main)
