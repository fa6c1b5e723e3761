"""python tools/bench.py NAME [CONFIG] [--section.key=value …] [--flag=value …]

Measures Rocket on this machine, without a dataset where none is needed. NAME is one of:

training    real steps over random tokens: tokens/s, MFU, where a step's time goes, peak memory
sampling    prefill and decode of sample.py with random weights, greedy, at each batch size
startup     --help beyond the bare interpreter, and launch to the first training row (prepared data)
checkpoint  saving and loading in a temporary directory: seconds and GB/s
tokenizing  the corpus and the tokenizer of CONFIG, see below

What is compared runs in turn, again and again: a machine's speed drifts, so ratios within a turn
count. Printed are the median, the lowest and the highest, and ratios to the first contestant:
CONFIG as the command line gives it; then come each --versus, --checkout and --peer. Each is a
process of its own that builds and warms up before the first turn and sleeps while others have
theirs. training and checkpoint take torchrun too, with one contestant.

training: `MFU` is the model's arithmetic (6 N + 12 L D T a token) against the fastest square matrix
product of the same turn at the same type; `datasheet` against the card's. `optimizer` includes
clipping. `communication` counts collectives in full, also where they overlap with the rest. `data`
is the time to read a step's batches if CONFIG's dataset is prepared. `memory` is the most that the
process held so far: resident on a CPU, allocated on a GPU.

tokenizing: `ceiling`: processes that are there already and only encode texts in their memory;
`prepare`: the program from its start to its end; `tokenizes`: its own figure, without what comes
before and after; `datasets.map`: the same by the package datasets, if it is installed, from and to
Arrow files, in batches, with ids as lists; `lean`: with arrays of uint16.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from config import (
    ROOT,
    Config,
    ConfigError,
    UserError,
    available_cores,
    dump_toml,
    load_config,
    run_program,
)
from corpus import hub, readers
from tokenizer import Tokenizer, configured_tokenizer

FLAGS = {
    "--repeats=5": "turns",
    "--shape=NAME": "step or memory: a small model, for comparisons on a CPU",
    "--versus=OVERRIDES": "compare with settings such as '--train.dtype=float32'; repeatable",
    "--checkout=PATH": "compare with another checkout of Rocket, by its own bench.py; repeatable",
    "--peer=NAME": "compare with nanogpt:CLONE, llama2.c:CLONE or transformers, repeatable; with"
    " :compile behind it torch.compile trains it",
    "--warmup=3": "training: steps before the first turn",
    "--steps=5": "training: steps a turn",
    "--trace=PATH": "training: where to write a Chrome trace of three steps (which takes memory)",
    "--batch=1,8,64": "sampling: batch sizes",
    "--prompt=128": "sampling: tokens of each prompt",
    "--new=128": "sampling: tokens of each completion",
    "--workers=1,2": "tokenizing: numbers of processes",
    "--copies=1": "tokenizing: measure a short corpus so many times over, as JSON lines",
    "--json=PATH": "where to write the figures too",
}
# Both tie the embeddings, as the peers do, and have 8 dim² parameters a layer in the feed-forward,
# as GPT-2 has: all have the same number of parameters, but for nanoGPT's learnt positions.
SHARED = (
    "--model.n_kv_heads=0 --model.max_seq_len=512 --model.tie_embeddings=true"
    " --optimizer.name=adamw"
)
SHAPES = {
    "step": f"{SHARED} --model.dim=288 --model.n_layers=6 --model.n_heads=6 --model.ffn_dim=768"
    " --tokenizer.vocab_size=4096 --data.seq_len=256 --train.global_batch_size=16"
    " --train.micro_batch_size=16",
    "memory": f"{SHARED} --model.dim=768 --model.n_layers=4 --model.n_heads=12"
    " --model.ffn_dim=2048 --tokenizer.vocab_size=32000 --data.seq_len=512"
    " --train.global_batch_size=8 --train.micro_batch_size=8",
}
Json = dict[str, Any]
Options = dict[str, str]
Contestant = Iterator[dict[str, Any]]  # see compare
Measured = tuple[dict[str, float], int]  # seconds by what took them, and tokens made
Values = dict[tuple[str, str], list[float]]  # by what and its unit, one of each turn


class Times(NamedTuple):
    """Seconds of completing a batch: to the first token of each row (None: not told), of each token
    from then on, and what was spent once between them, such as on a CUDA graph."""

    first: float | None
    token: float
    once: float = 0.0


TOKENIZER: Tokenizer  # forked processes find both in their memory
TEXTS: list[str] = []


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["worker"]:
        work(arguments[1], *read_arguments(arguments[2:]))
        return
    name, config, options = read_arguments(arguments)
    machine = {"cores": available_cores(), "load": round(os.getloadavg()[0], 1)}
    machine |= {"python": platform.python_version()}
    machine |= {p: version(p) for p in ("numpy", "sentencepiece", "pyarrow", "datasets", "torch")}
    say(", ".join(f"{key} {value}" for key, value in machine.items()))
    if name == "tokenizing":
        found = {"rows": tokenizing(config, options)}
    else:
        found = compare(name, config, options, arguments[1:])
    if options["json"] != "PATH" and is_first_rank():
        content = {"benchmark": name, "arguments": arguments[1:], "machine": machine, **found}
        try:
            Path(options["json"]).write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{options['json']}: can't be written: {error.strerror}") from None


def read_arguments(arguments: list[str]) -> tuple[str, Config, Options]:
    """What to measure, the configuration, and the flags with their defaults."""
    name, *rest = arguments or [""]
    if name not in (*BENCHMARKS, "--help", "-h"):
        raise ConfigError(f"name first what to measure: {', '.join(BENCHMARKS)}; not {name!r}")
    rest = rest if name in BENCHMARKS else arguments
    shape = next((a.partition("=")[2] for a in rest if a.startswith("--shape=")), None)
    if shape not in (None, *SHAPES):
        raise ConfigError(f"--shape is one of {', '.join(SHAPES)}, not {shape!r}")
    shaped = SHAPES[shape].split() if shape else []
    config, flags = load_config([*shaped, *rest], usage=str(__doc__), flags=FLAGS)
    return name, config, dict(flag[2:].split("=", 1) for flag in (*FLAGS, *flags))


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    if is_first_rank():
        print(text, flush=True)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def whole_numbers(options: Options, name: str) -> list[int]:
    if not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", options[name]):
        raise ConfigError(f"--{name}: whole numbers above 0, such as 1,2, not {options[name]!r}")
    return [int(text) for text in options[name].split(",")]


def whole_number(options: Options, name: str) -> int:
    numbers = whole_numbers(options, name)
    if len(numbers) > 1:
        raise ConfigError(f"--{name}: one number, not {options[name]}")
    return numbers[0]


def report(who: Json, label: str, values: Values, base: Values | None = None) -> list[Json]:
    """Prints median, lowest and highest; returns them, each with what it is of (`who`).

    Args:
        base: what a figure is divided by within its turn, if it is there.
    """
    rows = []
    for (what, unit), found in values.items():
        row = {"what": what, **who, "unit": unit} | spread(found)
        text = f"{label}: {what:<22} {written(row)} {unit}".rstrip()
        if base and all(base.get((what, unit), [0])):
            row["ratio"] = spread([a / b for a, b in zip(found, base[what, unit], strict=True)])
            text = f"{text:<{len(label) + 67}} × {written(row['ratio'])}"
        say(text)
        rows.append(row)
    return rows


def spread(found: list[float]) -> dict[str, float]:
    return {"low": min(found), "median": statistics.median(found), "high": max(found)}


def written(of: Json) -> str:
    return f"{of['median']:6,.2f} ({of['low']:,.2f} to {of['high']:,.2f})"


def contestant(name: str, config: Config, options: Options, peer: str) -> Contestant:
    """A contestant in this process. torch is imported late: it takes seconds and memory."""
    if name == "startup":
        return startup(config, options, peer)
    from tools import measure

    return measure.contestant(name, config, options, peer)


def load_module(path: Path) -> ModuleType:
    """A module from a file, whatever else goes by its name."""
    name = re.sub(r"\W", "_", str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(name: str, config: Config, options: Options, arguments: list[str]) -> Json:
    """Measures all contestants in turn; prints and returns what they are and what the turns gave.

    A contestant is an iterator. It first gives what it is, once it has warmed up, and then figures
    of a turn, again and again: their names, the last word of which is a unit, and values.

    Raises:
        UserError: contestants that this benchmark can't have; what one of them raised.
    """
    repeats = whole_number(options, "repeats")
    rivals = [a for a in arguments if a.startswith(("--versus=", "--checkout=", "--peer="))]
    if rivals and "RANK" in os.environ:
        raise ConfigError(f"{rivals[0]}: contestants are single processes; leave out torchrun")
    own = [a for a in arguments if a not in rivals and not a.startswith("--json=")]
    common = [name, *(a for a in own if not a.startswith("--trace="))]
    if rivals:
        contestants = [("rocket", remote("rocket", [name, *own]))]
    else:
        contestants = [("rocket", contestant(name, config, options, ""))]
    for rival in rivals:
        kind, _, value = rival.partition("=")
        label = value
        if kind == "--versus":
            one = remote(label, common + shlex.split(value))
        elif kind == "--checkout":
            one = remote(label, common, checkout=value)
        elif name in ("training", "sampling"):
            label = re.sub(":.*?(:compile)?$", r"\1", value)
            one = remote(label, common, peer=value)
        else:
            raise ConfigError("--peer: only training and sampling are compared with peers")
        contestants.append((label, one))
    about: Json = {}
    with contextlib.ExitStack() as stack:
        for label, one in contestants:
            stack.callback(one.close)
            about[label] = next(one)
            say(f"{label}: " + ", ".join(f"{key} {value}" for key, value in about[label].items()))
        turns = [[next(one) for _, one in contestants] for _ in range(repeats)]
    rows, width = [], max(len(label) for label, _ in contestants)
    values: list[Values] = [
        {tuple(key.rsplit(" ", 1)): [turn[i][key] for turn in turns] for key in figures}
        for i, figures in enumerate(turns[0])
    ]
    for (label, _), own in zip(contestants, values, strict=True):
        base = values[0] if own is not values[0] else None
        rows += report({"contestant": label}, f"{label:<{width}}", own, base)
    return {"contestants": about, "rows": rows}


def remote(label: str, arguments: list[str], *, peer: str = "", checkout: str = "") -> Contestant:
    """A contestant in a process of its own, which sleeps between its turns.

    Raises:
        UserError: it failed; with the last line that it said.
    """
    root, environment = ROOT, dict(os.environ)
    if checkout:
        root = Path(checkout).resolve()
        environment["ROCKET_ROOT"] = str(root)
    programs = (root / "tools" / "bench.py", root / "bench.py")  # one of before the folders
    found = next((path for path in programs if path.exists()), None)
    if not found:
        raise ConfigError(f"--checkout={checkout}: no checkout of Rocket")
    program = [str(found), "worker", peer, *arguments]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, *program],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        ) as process,
    ):
        while line := process.stdout.readline():
            yield json.loads(line)
            with contextlib.suppress(BrokenPipeError):  # it died; there is no line either
                process.stdin.write(b"\n")
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines() or ["it was killed"]
        raise UserError(f"{label}: {said[-1].removeprefix('bench.py: error: ')}")


def work(peer: str, name: str, config: Config, options: Options) -> None:
    """The process of a contestant: a line for its parent at the beginning and for each turn."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # peers talk
        for figures in contestant(name, config, options, peer):
            print(json.dumps(figures), file=answers, flush=True)
            if not sys.stdin.readline():
                return


def startup(config: Config, options: Options, _: str) -> Contestant:
    """Launches of rocket.py: `--help`, and a new run to the row of its first step."""

    def seconds(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    program = str(ROOT / "rocket.py")
    config.train.log_interval = config.train.stop_at_step = 1
    yield {"program": program}
    while True:
        bare = seconds("-c", "pass")
        yield {
            "--help s": seconds(program, "--help") - bare,
            "first step s": first_step(program, config),
        }


def first_step(program: str, config: Config) -> float:
    """Seconds from launch to the row of the first step; UserError: what rocket.py said instead."""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as errors:
        config.train.out_dir, path = f"{scratch}/run", f"{scratch}/config.toml"
        Path(path).write_text(dump_toml(config), encoding="utf-8")
        start, taken = time.perf_counter(), None
        command = [sys.executable, program, path]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        ) as process:
            for line in process.stdout:
                if line.startswith("step 1/"):
                    taken = taken or time.perf_counter() - start
        if process.returncode or not taken:
            errors.seek(0)
            raise UserError(errors.read().strip() or "rocket.py printed no step")
        return taken


def tokenizing(config: Config, options: Options) -> list[Json]:
    """MB of text (UTF-8) a second by all processes together, and ratios; printed as they come.

    Raises:
        UserError: what prepare.py says of the corpus; one that is not text.
    """
    global TOKENIZER
    workers = whole_numbers(options, "workers")
    repeats, copies = whole_number(options, "repeats"), whole_number(options, "copies")
    data = config.data = hub.local_sources(config.data)
    if data.format != "text" or data.mixture:
        raise ConfigError("bench.py tokenizing takes data.format = text, and no mixture")
    data.deduplicate = False  # all encode the same
    TOKENIZER = configured_tokenizer(config.tokenizer)
    TEXTS[:] = [one.text for part in readers.plan(data) for one in readers.read(part, data)]
    with tempfile.TemporaryDirectory() as name:
        scratch, rows = Path(name), []
        if copies > 1:
            TEXTS[:] = [f"{text}# {i}\n" for i in range(copies) for text in TEXTS]
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
            (scratch / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
            data.sources, data.val_sources, data.test_sources = [f"{name}/corpus.jsonl"], [], []
            data.document, data.text_column = "row", "text"
        size = sum(len(text.encode()) for text in TEXTS) / 1e6
        print(f"{size:.1f} MB in {len(TEXTS):,} documents, {repeats} turns", flush=True)
        ways = [encode_only, lambda count: run_prepare(config, count, scratch)]
        if version("datasets") == "absent":
            print("the package datasets is not installed, so it is not compared")
        else:
            ways.append(map_with_datasets(scratch))
        for count in workers:
            turns = [measure(ways, count) for _ in range(repeats)]
            rows += report({"workers": count}, f"{count} workers", rates(turns, size))
    return rows


def measure(ways: list[Callable[[int], Measured]], count: int) -> dict[str, float]:
    """One turn: its seconds. RuntimeError where the ways did not do the same work."""
    results = [way(count) for way in ways]
    if len({tokens for _, tokens in results}) > 1:
        raise RuntimeError(f"different numbers of tokens: {results}")
    return {what: taken for seconds, _ in results for what, taken in seconds.items()}


def rates(turns: list[dict[str, float]], size: float) -> Values:
    """Rates, and their ratios within a turn; `size` in MB."""
    values = {(what, "MB/s"): [size / turn[what] for turn in turns] for what in turns[0]}
    for what, base in (
        ("prepare", "ceiling"),
        ("tokenizes", "ceiling"),
        ("prepare", "datasets.map"),
        ("prepare", "datasets.map, lean"),
    ):
        if base in turns[0]:
            values[f"{what} / {base}", ""] = [turn[base] / turn[what] for turn in turns]
    values["prepare, the rest", "s"] = [turn["prepare"] - turn["tokenizes"] for turn in turns]
    return values


def encode_only(count: int) -> Measured:
    with multiprocessing.get_context("fork").Pool(count) as pool:
        pool.map(encode_share, [slice(0, 1)] * count, 1)  # all are there
        start = time.perf_counter()
        shares = [slice(i, None, 16 * count) for i in range(16 * count)]  # small: they end as one
        ids = pool.map(encode_share, shares, 1)
        seconds = time.perf_counter() - start
    return {"ceiling": seconds}, sum(map(len, ids)) // 2


def encode_share(share: slice) -> bytes:
    return b"".join(TOKENIZER.encode(text).tobytes() for text in TEXTS[share])


def run_prepare(config: Config, count: int, scratch: Path) -> Measured:
    config.data.workers, config.data.dir = count, str(scratch / "data")
    (scratch / "config.toml").write_text(dump_toml(config), encoding="utf-8")
    command = [sys.executable, str(ROOT / "prepare.py"), str(scratch / "config.toml"), "--force"]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    seconds = time.perf_counter() - start
    if result.returncode:
        raise UserError(result.stderr.strip())
    own = re.search(r"^tokenized .*, (\S+) MB in .*, (\S+) MB/s$", result.stdout, re.MULTILINE)
    if not float(own[1]) or not float(own[2]):
        raise UserError("the corpus is too short to be measured; raise --copies")
    splits = json.loads((scratch / "data" / "manifest.json").read_bytes())["splits"].values()
    tokens = sum(split["tokens"] - 2 * split["documents"] for split in splits)
    return {"prepare": seconds, "tokenizes": float(own[1]) / float(own[2])}, tokens


def map_with_datasets(scratch: Path) -> Callable[[int], Measured]:
    import datasets
    import pyarrow.compute as pc

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(scratch / "rows")
    options = {"remove_columns": ["text"], "load_from_cache_file": False}
    lean = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    variants = (
        ("datasets.map", lists_of_rows, {"batched": True}),
        ("datasets.map, lean", arrays_of_rows, {"batched": True, "features": lean}),
    )

    def way(count: int) -> Measured:
        taken = {}
        for name, function, more in variants:
            rows = datasets.load_from_disk(scratch / "rows")
            start = time.perf_counter()
            rows = rows.map(function, num_proc=count if count > 1 else None, **more, **options)
            taken[name] = time.perf_counter() - start
        return taken, pc.sum(pc.list_value_length(rows.data.column("ids"))).as_py()

    return way


def lists_of_rows(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"ids": [TOKENIZER.processor.encode(text) for text in rows["text"]]}


def arrays_of_rows(rows: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
    return {"ids": [TOKENIZER.encode(text) for text in rows["text"]]}


BENCHMARKS = ("training", "sampling", "startup", "checkpoint", "tokenizing")

if __name__ == "__main__":
    run_program(main)
