"""python tools/bench.py NAME [CONFIG] [--section.key=value …] [--flag=value …]

Measures Rocket on this machine, without a dataset where none is needed. NAME is one of:

training    real steps over random tokens: tokens/s, MFU, where a step's time goes, peak memory
sampling    prefill and decode of sample.py with random weights, greedy, at each batch size
startup     --help beyond the bare interpreter, and launch to the first training row (prepared data)
checkpoint  saving and loading in a temporary directory: seconds and GB/s
tokenizing  the corpus of CONFIG with its tokenizer: MB of text (UTF-8) per second, by processes
time-to-loss  whole runs on the corpus of CONFIG: seconds until --target, from launch to exit

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

tokenizing: `ceiling` is running processes that only encode texts in their memory, `prepare` the
program from start to end, `tokenizes` the rate that it prints; `datasets.map` the same by the
package datasets, if it is installed, with ids as lists, or arrays of uint16 (`lean`).

time-to-loss: a tokenizer and a dataset are made from the raw text, for all. Each contestant sweeps
its learning rates at --first steps, then finds its shortest run, schedule and all, that ends at
--target or less, over train.eval_sequences windows of the validation split, in float32.
`--peer=nanogpt` is nanoGPT's recipe in Rocket's code, `--peer=nanogpt:CLONE` its own train.py,
which takes further options, such as '--peer=nanogpt:CLONE --beta2=0.95'; so is llama2.c. --repeats
times what each has found, again. `start` ends before the first step; `end` saves and exits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
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
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
sys.path.append(f"{sys.path[0]}/tests")  # peers

from config import (
    ROOT,
    Config,
    ConfigError,
    UserError,
    available_cores,
    load_config,
    run_program,
)
from corpus import hub, readers
from tokenizer import Tokenizer, configured_tokenizer
from tools.race import RECIPES, WARM_UP, launch, race, running

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
    "--target=BITS": "time-to-loss: the validation loss to reach, in bits per byte",
    "--first=300": "time-to-loss: steps of the runs that sweep learning rates",
    "--limit=90": "time-to-loss: seconds of the longest run to try",
    "--rates=LABEL:RATE/RATE": "time-to-loss: rates to sweep, by contestants, with commas between;"
    " the default is the rate of CONFIG, and 1e-3/2e-3/4e-3 for peers; one is taken as it is",
    "--json=PATH": "where to write the figures, too",
}
# Both tie the embeddings, as the peers do, and have 8 dim² parameters per layer in the
# feed-forward, as GPT-2 has. So parameter counts are equal, but for nanoGPT's position embeddings.
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
BENCHMARKS = ("training", "sampling", "startup", "checkpoint", "tokenizing", "time-to-loss")
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
    say(f"{listed(machine)}; {options['repeats']} turns")
    compared = functools.partial(compare, name) if name != "time-to-loss" else race_all
    found = compared(config, options, arguments[1:])
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
    if not re.fullmatch("[1-9][0-9]*" + "(,[1-9][0-9]*)*" * several, text):
        kind = "whole numbers above 0, such as 1,2" if several else "one whole number above 0"
        raise ConfigError(f"--{flag}: {kind}, not {text!r}")
    numbers = [int(number) for number in text.split(",")]
    return numbers if several else numbers[0]


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    if is_first_rank():
        print(text, flush=True)


def listed(found: Json) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items())


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def report(label: str, turns: list[Figures], base: list[Figures] | None) -> list[Json]:
    """Prints each figure's median, lowest and highest over turns; returns them.

    Args:
        base: the same turns of another contestant, for ratios.
    """
    rows, width = [], max(len(key.rpartition(" ")[0]) for key in turns[0])
    for key in turns[0]:
        what, _, unit = key.rpartition(" ")
        row = {"what": what, "contestant": label.rstrip(), "unit": unit}
        row |= spread([turn[key] for turn in turns])
        text = f"{label}: {what:<{width}} {written(row)} {unit}".rstrip()
        if base and all(other.get(key) for other in base):
            ratios = [turn[key] / other[key] for turn, other in zip(turns, base, strict=True)]
            row["ratio"] = spread(ratios)
            text = f"{text:<{len(label) + width + 45}} × {written(row['ratio'])}"
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
        kind, _, label = argument.partition("=")
        if kind == "--versus":
            rival = remote(label, common + shlex.split(label))
        elif kind == "--checkout":
            rival = remote(label, common, checkout=label)
        elif name in ("training", "sampling"):
            peer, label = label, re.sub(":.*?(:compile)?$", r"\1", label)
            rival = remote(label, common, peer=peer)
        else:
            raise ConfigError("--peer: only training and sampling are compared with peers")
        contestants.append((label, rival))
    about: Json = {}
    with contextlib.ExitStack() as stack:
        for label, one in contestants:
            stack.callback(one.close)
            about[label] = next(one)
            say(f"{label}: {listed(about[label])}")
        turns = [[next(one) for _, one in contestants] for _ in range(options["repeats"])]
    return {"contestants": about, "rows": report_all([label for label, _ in contestants], turns)}


def report_all(labels: list[str], turns: list[list[Figures]]) -> list[Json]:
    """Reports each contestant's figures of all turns; the ratios are to those of the first."""
    rows, width = [], max(map(len, labels))
    for i, label in enumerate(labels):
        found, base = ([turn[which] for turn in turns] for which in (i, 0))
        rows += report(f"{label:<{width}}", found, base if i else None)
    return rows


def race_all(config: Config, options: Options, arguments: list[str]) -> Json:
    """Runs time-to-loss with CONFIG, each --versus, and each peer's recipe or train.py.

    Raises:
        UserError: contestants that this benchmark can't have; the error of one of them.
    """
    given = [a for a in arguments if a.startswith(("--versus=", "--checkout=", "--peer="))]
    if "RANK" in os.environ:
        raise ConfigError("contestants of time-to-loss are single processes; leave out torchrun")
    own, rivals = [a for a in arguments if a not in given], [("rocket", config, "")]
    for argument in given:
        kind, _, value = argument.partition("=")
        first, *more = shlex.split(value)
        if kind == "--versus":
            rivals.append((value, read_arguments(["time-to-loss", *own, first, *more])[1], ""))
            continue
        name = first.partition(":")[0]
        if kind == "--checkout" or name not in RECIPES:
            raise ConfigError(
                f"{argument}: time-to-loss takes --peer={' or '.join(RECIPES)}[:CLONE]"
            )
        label = re.sub(r":\S*?(:compile)?(?=\s|$)", r"\1", value, count=1)
        if first == name:
            warm_up = f"--optimizer.warmup_steps={round(WARM_UP[name] * config.train.max_steps)}"
            more = [*own, *RECIPES[name].split(), warm_up, *more]
            rivals.append((label, read_arguments(["time-to-loss", *more])[1], ""))
        else:
            rivals.append((label, copy.deepcopy(config), value))
    labels = [label for label, _, _ in rivals]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"two contestants are called {twice[0]!r}; leave one out")
    about, turns = race(rivals, options)
    for label, what in about.items():
        say(f"{label}: {listed(what)}")
    return {"contestants": about, "rows": report_all(list(about), turns)}


def contestant(name: str, config: Config, options: Options, peer: str) -> Contestant:
    """A contestant in this process. torch is imported late: it takes seconds and memory."""
    if name in WITHOUT_TORCH:
        return WITHOUT_TORCH[name](config, options)
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
    command = [str(found), "worker", peer, *arguments]
    options = {"stdin": subprocess.PIPE, "bufsize": 0, "env": environment}
    with running(label, command, **options) as process:
        while line := process.stdout.readline():
            yield json.loads(line)
            with contextlib.suppress(BrokenPipeError):  # it died, so there is no next line either
                process.stdin.write(b"\n")


def work(peer: str, name: str, config: Config, options: Options) -> None:
    """The process of a contestant: a line for its parent at the beginning and for each turn."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # peers print, too
        for figures in contestant(name, config, options, peer):
            print(json.dumps(figures), file=answers, flush=True)
            if not sys.stdin.readline():
                return


def startup(config: Config, _: Options) -> Contestant:
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
            lines = launch("rocket.py", config, scratch)
        first = next((at for at, line in lines if line.startswith("step 1/")), None)
        if first is None:
            raise UserError("rocket.py printed no step")
        yield {"--help s": taken[0] - taken[1], "first step s": first}


def tokenizing(config: Config, options: Options) -> Contestant:
    """MB of text (UTF-8) per second by all processes together, for each number of them.

    Raises:
        UserError: what prepare.py says of the corpus; one that is not text.
    """
    global TOKENIZER
    data = config.data = hub.local_sources(config.data)
    if data.format != "text" or data.mixture:
        raise ConfigError("bench.py tokenizing takes data.format = text, and no mixture")
    data.deduplicate = False  # all encode the same
    TOKENIZER = configured_tokenizer(config.tokenizer)
    TEXTS[:] = [one.text for part in readers.plan(data) for one in readers.read(part, data)]
    with tempfile.TemporaryDirectory() as scratch:
        if (copies := options["copies"]) > 1:
            TEXTS[:] = [f"{text}# {i}\n" for i in range(copies) for text in TEXTS]
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
            corpus = Path(scratch, "corpus.jsonl")
            corpus.write_text("".join(lines), encoding="utf-8")
            data.sources, data.val_sources, data.test_sources = [str(corpus)], [], []
            data.document, data.text_column = "row", "text"
        size = sum(len(text.encode()) for text in TEXTS) / 1e6
        about = {"MB": f"{size:.1f}", "documents": len(TEXTS)}
        ways = [encode_only, lambda count: run_prepare(config, count, scratch)]
        if version("datasets") == "absent":
            about["datasets"] = "is not installed, so it is not compared"
        else:
            from peer_datasets import mapper

            ways.append(mapper(TEXTS, TOKENIZER, scratch))
        yield about
        while True:
            figures: Figures = {}
            for count in options["workers"]:
                figures |= rates(f", {count} workers", [way(count) for way in ways], size)
            yield figures


def rates(of: str, results: list[tuple[Figures, int]], size: float) -> Figures:
    """Rates from the seconds of each way, and their ratios; `size` in MB.

    Raises:
        RuntimeError: not all made the same number of tokens.
    """
    if len({tokens for _, tokens in results}) > 1:
        raise RuntimeError(f"different numbers of tokens: {results}")
    seconds = {what: taken for found, _ in results for what, taken in found.items()}
    found = {f"{what}{of} MB/s": size / taken for what, taken in seconds.items()}
    for what, base in RATIOS:
        if base in seconds:
            found[f"{what} / {base}{of} "] = seconds[base] / seconds[what]  # it has no unit
    return found | {f"prepare, the rest{of} s": seconds["prepare"] - seconds["tokenizes"]}


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


def run_prepare(config: Config, count: int, scratch: str) -> tuple[Figures, int]:
    config.data.workers, config.data.dir = count, f"{scratch}/data"
    lines = launch("prepare.py", config, scratch, "--force")
    printed = "".join(line for _, line in lines)
    own = re.search(r"^tokenized .*, (\S+) MB in .*, (\S+) MB/s$", printed, re.MULTILINE)
    if not float(own[1]) or not float(own[2]):
        raise UserError("the corpus is too short to be measured; raise --copies")
    splits = json.loads(Path(scratch, "data", "manifest.json").read_bytes())["splits"].values()
    tokens = sum(split["tokens"] - 2 * split["documents"] for split in splits)
    return {"prepare": lines[-1][0], "tokenizes": float(own[1]) / float(own[2])}, tokens


WITHOUT_TORCH = {"startup": startup, "tokenizing": tokenizing}

if __name__ == "__main__":
    run_program(main)
