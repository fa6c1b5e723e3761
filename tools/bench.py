"""python tools/bench.py NAME [CONFIG] [--section.key=value …] [--flag=value …]

Measures Rocket on this machine, without a dataset where none is needed. NAME is one of:

training    real steps over random tokens: tokens/s, MFU, where a step's time goes, peak memory
sampling    prefill and decode of sample.py with random weights, greedy, at each batch size
startup     --help beyond the bare interpreter, and launch to the first training row (prepared data)
checkpoint  saving and loading in a temporary directory: seconds and GB/s
tokenizing  the corpus and the tokenizer of CONFIG, see below

Contestants run in turns, since a machine's speed drifts: only ratios within a turn count. Each
figure is printed as its median, lowest and highest, and as its ratio to the first contestant's,
which is CONFIG as the command line gives it; after it come each --versus, --checkout and --peer.
Each is a process of its own that builds and warms up before the first turn and sleeps while others
run. training and checkpoint also run under torchrun, with one contestant.

training: `MFU` compares the model's arithmetic (6 N + 12 L D T per token) with the fastest square
matrix product of the same turn and type; `datasheet` with the card's. `optimizer` includes
clipping. `communication` counts collectives in full, even where they overlap with the rest. `data`
is the time to read a step's batches if CONFIG's dataset is prepared. `memory` is the peak of the
process so far: resident on a CPU, allocated on a GPU.

tokenizing: `ceiling`: running processes that only encode texts in their memory; `prepare`: the
program from start to end; `tokenizes`: the rate that it prints, without what comes before and
after; `datasets.map`: the same by the package datasets, if it is installed, from and to Arrow
files, in batches, with ids as lists; `lean`: with arrays of uint16.
"""

from __future__ import annotations

import contextlib
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
from typing import Any

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
    "--peer=NAME": "compare with nanogpt:CLONE, llama2.c:CLONE or transformers; repeatable; with"
    " :compile behind it torch.compile trains it",
    "--warmup=3": "training: steps before the first turn",
    "--steps=5": "training: steps per turn",
    "--trace=PATH": "training: where to write a Chrome trace of three steps (which takes memory)",
    "--batch=1,8,64": "sampling: batch sizes",
    "--prompt=128": "sampling: tokens of each prompt",
    "--new=128": "sampling: tokens of each completion",
    "--workers=1,2": "tokenizing: numbers of processes",
    "--copies=1": "tokenizing: repeat a short corpus this many times, as JSON lines",
    "--json=PATH": "where to write the figures, too",
}
# Both tie the embeddings, as the peers do, and have 8 dim² parameters per layer in the
# feed-forward, as GPT-2 has. So parameter counts are equal, but for nanoGPT's learnt positions.
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
BENCHMARKS = ("training", "sampling", "startup", "checkpoint", "tokenizing")
RATIOS = (
    ("prepare", "ceiling"),
    ("tokenizes", "ceiling"),
    ("prepare", "datasets.map"),
    ("prepare", "datasets.map, lean"),
)
Json = dict[str, Any]
Options = dict[str, Any]  # flags: whole numbers, lists of them where the default has a comma, texts
Figures = dict[str, float]  # of a turn, by what they are and, as the last word, their unit
Contestant = Iterator[dict[str, Any]]  # first what it is, once warmed up, then Figures of each turn

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
    defaults, given = (dict(f[2:].split("=", 1) for f in found) for found in (FLAGS, flags))
    options: Options = defaults | given
    for flag, default in defaults.items():
        if default[0].isdigit():
            options[flag] = whole_numbers(flag, options[flag], several="," in default)
    return name, config, options


def whole_numbers(flag: str, text: str, several: bool) -> int | list[int]:
    if not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", text):
        raise ConfigError(f"--{flag}: whole numbers above 0, such as 1,2, not {text!r}")
    numbers = [int(number) for number in text.split(",")]
    if several:
        return numbers
    if len(numbers) > 1:
        raise ConfigError(f"--{flag}: one number, not {text}")
    return numbers[0]


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


def report(
    who: Json, label: str, turns: list[Figures], base: list[Figures] | None = None
) -> list[Json]:
    """Prints each figure's median, lowest and highest over turns; returns them, led by `who`.

    Args:
        base: the same turns of another, for ratios.
    """
    rows = []
    for key in turns[0]:
        what, unit = key.rsplit(" ", 1)
        row = {"what": what, **who, "unit": unit} | spread([turn[key] for turn in turns])
        text = f"{label}: {what:<22} {written(row)} {unit}".rstrip()
        if base and all(other.get(key) for other in base):
            ratios = [turn[key] / other[key] for turn, other in zip(turns, base, strict=True)]
            row["ratio"] = spread(ratios)
            text = f"{text:<{len(label) + 67}} × {written(row['ratio'])}"
        say(text)
        rows.append(row)
    return rows


def spread(found: list[float]) -> Figures:
    return {"low": min(found), "median": statistics.median(found), "high": max(found)}


def written(of: Json) -> str:
    return f"{of['median']:6,.2f} ({of['low']:,.2f} to {of['high']:,.2f})"


def compare(name: str, config: Config, options: Options, arguments: list[str]) -> Json:
    """Measures all contestants in turns; prints and returns what they are and their figures.

    Raises:
        UserError: contestants that this benchmark can't have; the error of one of them.
    """
    rivals = [a for a in arguments if a.startswith(("--versus=", "--checkout=", "--peer="))]
    if rivals and "RANK" in os.environ:
        raise ConfigError(f"{rivals[0]}: contestants are single processes; leave out torchrun")
    own = [name, *(a for a in arguments if a not in rivals and not a.startswith("--json="))]
    common = [a for a in own if not a.startswith("--trace=")]
    first = remote("rocket", own) if rivals else contestant(name, config, options, "")
    contestants = [("rocket", first)]  # labels may repeat
    for argument in rivals:
        kind, _, value = argument.partition("=")
        if kind == "--versus":
            contestants.append((value, remote(value, common + shlex.split(value))))
        elif kind == "--checkout":
            contestants.append((value, remote(value, common, checkout=value)))
        elif name in ("training", "sampling"):
            label = re.sub(":.*?(:compile)?$", r"\1", value)
            contestants.append((label, remote(label, common, peer=value)))
        else:
            raise ConfigError("--peer: only training and sampling are compared with peers")
    about: Json = {}
    with contextlib.ExitStack() as stack:
        for label, one in contestants:
            stack.callback(one.close)
            about[label] = next(one)
            say(f"{label}: " + ", ".join(f"{key} {value}" for key, value in about[label].items()))
        turns = [[next(one) for _, one in contestants] for _ in range(options["repeats"])]
    rows, width = [], max(len(label) for label, _ in contestants)
    for i, (label, _) in enumerate(contestants):
        found, base = ([turn[which] for turn in turns] for which in (i, 0))
        rows += report({"contestant": label}, f"{label:<{width}}", found, base if i else None)
    return {"contestants": about, "rows": rows}


def contestant(name: str, config: Config, options: Options, peer: str) -> Contestant:
    """A contestant in this process. torch is imported late: it takes seconds and memory."""
    if name == "startup":
        return startup(config)
    from tools import measure

    return measure.contestant(name, config, options, peer)


def remote(label: str, arguments: list[str], *, peer: str = "", checkout: str = "") -> Contestant:
    """A contestant in a process of its own, which sleeps between its turns.

    Raises:
        UserError: it failed; with the last line that it printed.
    """
    root, environment = ROOT, dict(os.environ)
    if checkout:
        root = Path(checkout).resolve()
        environment["ROCKET_ROOT"] = str(root)
    programs = (root / "tools" / "bench.py", root / "bench.py")  # an older one has no folders
    found = next((path for path in programs if path.exists()), None)
    if not found:
        raise ConfigError(f"--checkout={checkout}: no checkout of Rocket")
    command = [sys.executable, str(found), "worker", peer, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, bufsize=0, stderr=errors, env=environment, **pipes) as process,
    ):
        while line := process.stdout.readline():
            yield json.loads(line)
            with contextlib.suppress(BrokenPipeError):  # it died, so there is no next line either
                process.stdin.write(b"\n")
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines() or ["it was killed"]
        raise UserError(f"{label}: {said[-1].removeprefix('bench.py: error: ')}")


def work(peer: str, name: str, config: Config, options: Options) -> None:
    """The process of a contestant: a line for its parent at the beginning and for each turn."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # peers print, too
        for figures in contestant(name, config, options, peer):
            print(json.dumps(figures), file=answers, flush=True)
            if not sys.stdin.readline():
                return


def startup(config: Config) -> Contestant:
    """Launches of rocket.py: `--help`, and a new run to the row of its first step."""
    program = str(ROOT / "rocket.py")
    config.train.log_interval = config.train.stop_at_step = 1
    yield {"program": program}
    while True:
        taken = []
        for command in ((program, "--help"), ("-c", "pass")):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as scratch:
            config.train.out_dir = f"{scratch}/run"
            lines = launch(program, config, Path(scratch))
        first = next((at for at, line in lines if line.startswith("step 1/")), None)
        if first is None:
            raise UserError("rocket.py printed no step")
        yield {"--help s": taken[0] - taken[1], "first step s": first}


def launch(program: str, config: Config, scratch: Path, *flags: str) -> list[tuple[float, str]]:
    """Runs a program on a configuration: what it printed, each line with the seconds since launch,
    and its end as an empty line. UserError: what it printed when it failed."""
    path = scratch / "config.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    command, start = [sys.executable, program, str(path), *flags], time.perf_counter()
    streams = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stderr=errors, **streams) as process:
            lines = [(time.perf_counter() - start, line) for line in process.stdout]
        lines.append((time.perf_counter() - start, ""))
        errors.seek(0)
        if process.returncode:
            raise UserError(errors.read().strip() or f"{program} failed without a word")
    return lines


def tokenizing(config: Config, options: Options) -> list[Json]:
    """MB of text (UTF-8) per second by all processes together, and ratios.

    Raises:
        UserError: what prepare.py says of the corpus; one that is not text.
    """
    global TOKENIZER
    repeats, copies = options["repeats"], options["copies"]
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
        for count in options["workers"]:
            turns = [turn([way(count) for way in ways], size) for _ in range(repeats)]
            rows += report({"workers": count}, f"{count} workers", turns)
    return rows


def turn(results: list[tuple[Figures, int]], size: float) -> Figures:
    """Rates from the seconds of each way, and their ratios; `size` in MB.

    Raises:
        RuntimeError: not all made the same number of tokens.
    """
    if len({tokens for _, tokens in results}) > 1:
        raise RuntimeError(f"different numbers of tokens: {results}")
    seconds = {what: taken for found, _ in results for what, taken in found.items()}
    rates = {f"{what} MB/s": size / taken for what, taken in seconds.items()}
    for what, base in RATIOS:
        if base in seconds:
            rates[f"{what} / {base} "] = seconds[base] / seconds[what]  # it has no unit
    return rates | {"prepare, the rest s": seconds["prepare"] - seconds["tokenizes"]}


def encode_only(count: int) -> tuple[Figures, int]:
    """Seconds, and tokens, as of each way to tokenize the corpus."""
    with multiprocessing.get_context("fork").Pool(count) as pool:
        pool.map(encode_share, [slice(0, 1)] * count, 1)  # all have started
        start = time.perf_counter()
        shares = [slice(i, None, 16 * count) for i in range(16 * count)]  # small: they end as one
        ids = pool.map(encode_share, shares, 1)
        seconds = time.perf_counter() - start
    return {"ceiling": seconds}, sum(map(len, ids)) // 2


def encode_share(share: slice) -> bytes:
    return b"".join(TOKENIZER.encode(text).tobytes() for text in TEXTS[share])


def run_prepare(config: Config, count: int, scratch: Path) -> tuple[Figures, int]:
    config.data.workers, config.data.dir = count, str(scratch / "data")
    lines = launch(str(ROOT / "prepare.py"), config, scratch, "--force")
    printed = "".join(line for _, line in lines)
    own = re.search(r"^tokenized .*, (\S+) MB in .*, (\S+) MB/s$", printed, re.MULTILINE)
    if not float(own[1]) or not float(own[2]):
        raise UserError("the corpus is too short to be measured; raise --copies")
    splits = json.loads((scratch / "data" / "manifest.json").read_bytes())["splits"].values()
    tokens = sum(split["tokens"] - 2 * split["documents"] for split in splits)
    return {"prepare": lines[-1][0], "tokenizes": float(own[1]) / float(own[2])}, tokens


def map_with_datasets(scratch: Path) -> Callable[[int], tuple[Figures, int]]:
    import datasets
    import pyarrow.compute as pc

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(scratch / "rows")
    options = {"batched": True, "remove_columns": ["text"], "load_from_cache_file": False}
    lean = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    variants = (("datasets.map", lists_of_rows, None), ("datasets.map, lean", arrays_of_rows, lean))

    def way(count: int) -> tuple[Figures, int]:
        taken, workers = {}, count if count > 1 else None
        for name, function, features in variants:
            rows = datasets.load_from_disk(scratch / "rows")
            start = time.perf_counter()
            rows = rows.map(function, num_proc=workers, features=features, **options)
            taken[name] = time.perf_counter() - start
        return taken, pc.sum(pc.list_value_length(rows.data.column("ids"))).as_py()

    return way


def lists_of_rows(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"ids": [TOKENIZER.processor.encode(text) for text in rows["text"]]}


def arrays_of_rows(rows: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
    return {"ids": [TOKENIZER.encode(text) for text in rows["text"]]}


if __name__ == "__main__":
    run_program(main)
