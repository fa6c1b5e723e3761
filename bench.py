"""python bench.py tokenizing [CONFIG] [--section.key=value …] [--workers=1,2] [--repeats=5]

Measures Rocket on this machine. What is compared runs in turn, again and again: a machine's speed
drifts, so ratios within a turn count. Printed are the median, the lowest and the highest.

tokenizing: the corpus and the tokenizer of CONFIG. `ceiling`: processes that are there already and
only encode texts in their memory; `prepare`: the program from its start to its end; `tokenizes`:
its own figure, without what comes before and after; `datasets.map`: the same by the package
datasets, if it is installed, from and to Arrow files, in batches, with ids as lists; `lean`: with
arrays of uint16.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import corpus
import hub
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
from tokenizer import Tokenizer, configured_tokenizer

FLAGS = {
    "--workers=1,2": "numbers of processes to measure with",
    "--repeats=5": "turns",
    "--copies=1": "measure a short corpus so many times over, as JSON lines",
    "--json=PATH": "where to write the figures too",
}
Json = dict[str, Any]
Measured = tuple[dict[str, float], int]  # seconds by what took them, and tokens made

TOKENIZER: Tokenizer  # forked processes find both in their memory
TEXTS: list[str] = []


def main(arguments: list[str]) -> None:
    name, *rest = arguments or [""]
    if name not in (*BENCHMARKS, "--help", "-h"):
        raise ConfigError(f"name first what to measure: {', '.join(BENCHMARKS)}; not {name!r}")
    rest = rest if name in BENCHMARKS else arguments
    usage, sections = str(__doc__), ("tokenizer", "data")
    config, flags = load_config(rest, usage=usage, sections=sections, flags=FLAGS)
    options = dict(flag[2:].split("=", 1) for flag in (*FLAGS, *flags))
    machine = {"cores": available_cores(), "load": round(os.getloadavg()[0], 1)}
    machine |= {"python": platform.python_version()}
    machine |= {p: version(p) for p in ("numpy", "sentencepiece", "pyarrow", "datasets")}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    rows = BENCHMARKS[name](config, options)
    if options["json"] != "PATH":
        content = json.dumps({"benchmark": name, "machine": machine, "rows": rows}, indent=1)
        try:
            Path(options["json"]).write_text(content + "\n")
        except OSError as error:
            raise UserError(f"{options['json']}: can't be written: {error.strerror}") from None


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def whole_numbers(options: dict[str, str], name: str) -> list[int]:
    if not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", options[name]):
        raise ConfigError(f"--{name}: whole numbers above 0, such as 1,2, not {options[name]!r}")
    return [int(text) for text in options[name].split(",")]


def whole_number(options: dict[str, str], name: str) -> int:
    numbers = whole_numbers(options, name)
    if len(numbers) > 1:
        raise ConfigError(f"--{name}: one number, not {options[name]}")
    return numbers[0]


def tokenizing(config: Config, options: dict[str, str]) -> list[Json]:
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
    TEXTS[:] = [one.text for part in corpus.plan(data) for one in corpus.read(part, data)]
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
            rows += report(turns, count, size)
    return rows


def measure(ways: list[Callable[[int], Measured]], count: int) -> dict[str, float]:
    """One turn: its seconds. RuntimeError where the ways did not do the same work."""
    results = [way(count) for way in ways]
    if len({tokens for _, tokens in results}) > 1:
        raise RuntimeError(f"different numbers of tokens: {results}")
    return {what: taken for seconds, _ in results for what, taken in seconds.items()}


def report(turns: list[dict[str, float]], count: int, size: float) -> list[Json]:
    """Prints rates, and their ratios within a turn; `size` in MB."""
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
    rows = []
    for (what, unit), found in values.items():
        low, median, high = min(found), statistics.median(found), max(found)
        print(
            f"{count} workers: {what:<22} {median:6.2f} ({low:.2f} to {high:.2f}) {unit}".rstrip()
        )
        rows.append({"what": what, "workers": count, "unit": unit})
        rows[-1] |= {"low": low, "median": median, "high": high}
    sys.stdout.flush()
    return rows


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


BENCHMARKS = {"tokenizing": tokenizing}

if __name__ == "__main__":
    run_program(main)
