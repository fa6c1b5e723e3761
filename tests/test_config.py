"""Protects the configuration: what ships loads, mistakes are named, its table is not stale."""

import ast
import dataclasses
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from config import (
    SENTENCEPIECE_OPTIONS,
    ConfigError,
    build_config,
    changes,
    dump_toml,
    installed,
    load_config,
    markdown_table,
    read_toml,
    resolve_path,
)
from model import parameter_count
from preflight import code_files

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "config").glob("*.toml"))
# Llama 2's from its weights, TinyLlama's from its card; 110M is llama2.c's shape counted by hand:
# 32,000 x 768 tied, 12 blocks of 4 x 768^2 + 3 x 768 x 2,048 + 2 x 768, and the last norm.
PUBLISHED = {
    "llama_110m": 32_000 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768,
    "llama_1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_load_and_round_trip(path, tmp_path):
    config = build_config(read_toml(path))
    written = tmp_path / "config.toml"
    written.write_text(dump_toml(config), encoding="utf-8")
    assert build_config(read_toml(written)) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    config = build_config(read_toml(ROOT / "config" / f"{name}.toml"))
    assert parameter_count(config.model, config.tokenizer.vocab_size) == PUBLISHED[name]


def test_precedence_and_overrides(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[train]\nseed = 5\nmax_steps = 7\n[tokenizer]\nsplit_digits = false\n")
    given = ["--train.seed=6", "--train.out_dir=out/x y", "--data.sources=['a', \"b\"]"]
    config, flags = load_config([str(file), *given, "--go"], usage="", flags={"--go": "go on"})
    assert (config.train.seed, config.train.max_steps) == (6, 7)
    assert config.train.out_dir == "out/x y"
    assert config.data.sources == ["a", "b"]
    assert config.train.log_interval == 10  # the default
    assert config.tokenizer.options == {"split_digits": False}
    assert flags == ["--go"]
    assert load_config(["--train.out_dir=123"], usage="")[0].train.out_dir == "123"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--train.max_step=5", ["train.max_step", "did you mean train.max_steps?"]),
        ("--trian.max_steps=5", ["did you mean train.max_steps?"]),
        ("--train.learning_rate=1", ["did you mean optimizer.learning_rate?"]),
        ("--train.max_steps=many", ["train.max_steps", "whole number", "'many'"]),
        ("--train.max_steps=1.5", ["train.max_steps", "whole number", "1.5"]),
        ("--train.max_steps=true", ["train.max_steps", "whole number"]),
        ("--train.max_steps=-1", ["train.max_steps", "at least 0"]),
        ("--optimizer.learning_rate=nan", ["optimizer.learning_rate", "finite"]),
        ("--optimizer.schedule=cosin", ["cosine", "wsd", "did you mean cosine?"]),
        ("--model.dim=250", ["model.dim", "model.n_heads"]),
        ("--model.n_kv_heads=5", ["model.n_kv_heads"]),
        ("--data.seq_len=999999", ["data.seq_len", "model.max_seq_len"]),
        ("--tokenizer.vocab_size=70000", ["tokenizer.vocab_size", "65,536"]),
        ("--tokenizer.vocab_sise=7", ["did you mean tokenizer.vocab_size?"]),
        ("--tokenizer.split_digit=true", ["did you mean tokenizer.split_digits?"]),
        ("--data.document=rows", ["data.document", "blank_line"]),
        ("--data.sources=a.txt", ["data.sources", "list of strings"]),
        ("--train.seed", ["lacks a value"]),
        ("--forced", ["--forced"]),
        ("nothing.toml", ["nothing.toml", "tiny"]),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_name(argument, words):
    with pytest.raises(ConfigError) as error:
        load_config([str(ROOT / "config/tiny.toml"), argument], usage="", flags={"--force": ""})
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_key_outside_its_table_is_told_where_it_belongs():
    with pytest.raises(ConfigError, match=r"max_steps is a key of \[train\]"):
        build_config({"max_steps": 5})


def test_both_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"train\.max_steps .* and train\.epochs"):
        build_config({"train": {"max_steps": 5, "epochs": 1}})


def test_paths_expand_and_start_at_the_repository(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert resolve_path("$SCRATCH/run") == Path("/scratch/me/run")
    assert resolve_path("out/run") == ROOT / "out/run"
    assert resolve_path("~/run") == Path.home() / "run"
    with pytest.raises(ConfigError, match="NOWHERE"):
        resolve_path("$NOWHERE/run")


def test_changes_are_sorted_by_their_rule():
    old, new = build_config({}), build_config({})
    new.train.log_interval, new.optimizer.learning_rate, new.train.seed = 1, 1.0, 2
    found = changes(old, new)
    assert found["free"] == ["train.log_interval: 10 -> 1"]
    assert found["consent"] == ["optimizer.learning_rate: 0.0006 -> 1.0"]
    assert found["refused"] == ["train.seed: 1337 -> 2"]


def test_the_documentation_holds_the_table_of_keys():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert markdown_table() in page, "paste what `python config.py` prints"


def test_passed_on_options_are_sentencepieces_own():
    known = sentencepiece.SentencePieceTrainer.train
    newer = {"mining_sentence_size"}  # than sentencepiece 0.2.2
    for option in SENTENCEPIECE_OPTIONS:  # an unknown option is refused before a missing input
        if option in newer and sentencepiece.__version__ == "0.2.2":
            continue
        with pytest.raises((OSError, RuntimeError, ValueError)) as error:
            known(input="/nonexistent", model_prefix="/nonexistent/x", **{option: "0"})
        assert "unknown field" not in str(error.value).lower(), option


@pytest.mark.parametrize(
    "program", ["rocket", "prepare", "train_tokenizer", "tools/plan", "sample"]
)
def test_help_of_every_program(program):
    command = [sys.executable, str(ROOT / f"{program}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert program == "sample" or "--data.text_column" in done.stdout


@pytest.mark.parametrize("program", ["rocket", "prepare", "train_tokenizer", "sample"])
@pytest.mark.parametrize("argument", ["--help", "--data.dri=x"])
def test_help_and_mistakes_come_before_slow_imports(program, argument):
    command = [sys.executable, "-X", "importtime", str(ROOT / f"{program}.py"), argument]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (argument != "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "config" in imported
    assert not imported & {"torch", "numpy", "pyarrow", "sentencepiece"}


# What each module may import of Rocket. Programs in tools/ import what they need.
MAY_IMPORT = {
    "config": "",
    "slurm.attempts": "config",
    "attempts": "config slurm.attempts",
    "fast": "",
    "model": "config fast",
    "tokenizer": "config",
    "distributed": "config",
    "dataset": "config distributed fast",
    "optimizer": "config distributed model",
    "checkpoint": "config distributed",
    "job": "checkpoint config dataset distributed slurm.attempts",
    "preflight": "checkpoint config dataset distributed tokenizer",
    "run": "checkpoint config dataset distributed job model preflight slurm.attempts",
    "corpus.sources": "config",
    "corpus.splits": "config",
    "corpus.readers": "config corpus.sources corpus.splits",
    "corpus.locks": "config",
    "corpus.hub": "config corpus.locks corpus.sources",
    "corpus.packing": "config corpus.readers corpus.splits tokenizer",
    "corpus.inspection": "config dataset tokenizer",
    "corpus.build": "config corpus.locks corpus.packing corpus.readers corpus.sources corpus.hub"
    " corpus.splits corpus.inspection dataset tokenizer",
    "corpus.vocabulary": "config corpus.locks corpus.readers corpus.sources corpus.splits"
    " tokenizer",
    "inference.pretrained": "config tokenizer",
    "inference.linear": "",
    "inference.generation": "checkpoint config distributed inference.linear inference.pretrained"
    " fast model tokenizer",
    "inference.evaluation": "config dataset distributed inference.generation job fast model"
    " tokenizer",
    "inference.sampler": "config inference.generation tokenizer",
    "tools.memory": "config",
    "tools.page": "",
    "rocket": "checkpoint config dataset distributed fast inference.evaluation job model optimizer"
    " preflight run",
    "prepare": "config corpus.build corpus.hub corpus.inspection dataset tokenizer",
    "train_tokenizer": "config corpus.hub corpus.vocabulary",
    "sample": "config inference.evaluation inference.generation inference.sampler",
}


def modules() -> dict[str, set[str]]:
    """What each module of Rocket imports of the others."""
    trees = {
        name.removesuffix(".py").replace("/", "."): ast.parse(path.read_text())
        for name, path in code_files().items()
    }
    found = {}
    for name, tree in trees.items():
        nodes = list(ast.walk(tree))
        imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= parts & trees.keys() or {node.module}
        found[name] = imported & trees.keys()
    return found


def test_imports_point_one_way():
    """config <- libraries <- programs; training imports neither raw data nor tools."""
    for name, imported in modules().items():
        if name.endswith("__init__"):
            assert not imported
        elif name in MAY_IMPORT:
            more = imported - set(MAY_IMPORT[name].split())
            assert not more, f"{name} imports {more}"
        else:
            assert name.startswith("tools."), f"{name}: say in MAY_IMPORT what it may import"
            programs = {"prepare", "train_tokenizer", "sample", "attempts"}
            assert not imported & programs, f"{name} imports a program"


def test_the_top_level_stays_small():
    """A newcomer sees the four programs and what trains, and reads the loop in ten minutes."""
    top = {name: path.read_text() for name, path in code_files().items() if "/" not in name}
    assert len(top) <= 16
    assert sum(text.count("\n") for text in top.values()) <= 5_600
    assert top["rocket.py"].count("\n") <= 400
    assert (ROOT / "README.md").read_text().count("\n") <= 250
    for name, text in top.items():
        for node in ast.walk(ast.parse(text)):
            assert not isinstance(node, ast.Nonlocal), f"{name}:{node.lineno}"
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}: {node.name}"


def test_the_model_knows_nothing_of_ranks_or_files():
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "model.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    assert not {"torch.distributed", "pathlib", "os"} & imported


def test_named_tuples_have_no_second_base():
    """Python 3.11 and later allow Generic beside it; 3.10, which we promise, refuses the import."""
    for name, path in code_files().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                assert "NamedTuple" not in bases or len(bases) == 1, f"{name}: {node.name}"


def test_every_key_is_described():
    for section in dataclasses.fields(build_config({})):
        for key in dataclasses.fields(getattr(build_config({}), section.name)):
            assert key.metadata["help"], key.name


def test_every_word_that_is_allowed_is_in_help_and_its_page():
    """As the refusal of another word lists them, wherever that is checked."""
    command = [sys.executable, str(ROOT / "rocket.py"), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page, found = (ROOT / "docs" / "configuration.md").read_text(), []
    for section in dataclasses.fields(build_config({})):
        for key in dataclasses.fields(getattr(build_config({}), section.name)):
            path = f"{section.name}.{key.name}"
            try:
                build_config({section.name: {key.name: "no such word"}})
            except ConfigError as error:
                allowed = (
                    str(error).removeprefix(f"{path} is ").removesuffix(", not 'no such word'")
                )
            else:
                continue
            if re.match("an? |true or|unknown", allowed):  # numbers, lists, tables, no key
                continue
            found.append(path)
            help = told.partition(f"--{path}=")[2].split("\n")[1]
            row = page.rpartition(f"| `{path}` | ")[2].split("\n")[0]
            for word in allowed.removeprefix("one of ").replace(" or ", ", ").split(", "):
                alone = rf"(?<!\w){re.escape(word)}(?!\w)"
                assert re.search(alone, help), (path, word)
                assert re.search(alone, row), (path, word)
    assert {"train.recompute", "train.dtype", "parallel.strategy", "data.document"} <= {*found}
    assert "byte_fallback, character_coverage," in " ".join(told.split())


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_of_somebody").mkdir()  # as W&B leaves in the working directory
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed("wandb_of_somebody")
    assert installed("json")
    assert not installed("no_such_package")


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "config.py")]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == ("config.py: error: no space is left for a file or standard output\n")


def test_an_error_line_is_one_write():
    """Else lines of ranks that share a file run into each other; a datagram is a write."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        script = "from config import print_error; print_error('one line')"
        subprocess.run([sys.executable, "-u", "-c", script], stderr=theirs, cwd=ROOT, check=True)
        assert ours.recv(100) == b"one line\n"
