"""python bench.py tokenizing [CONFIG] [--section.key=value …] [--workers=1,2] [--repeats=5]

Measures Rocket on this machine. What is compared runs in turn, again and again: a machine's speed
drifts, so the ratios within a turn count. Printed are their medians, lowest and highest.

tokenizing: the corpus and tokenizer of CONFIG. `ceiling` are processes that do nothing but encode,
the texts in their memory; `prepare` is the whole program and `tokenizes` its own figure; beside
them stands `datasets.map` with the same tokenizer, if the package datasets is installed.
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
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

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
    "--workers=1,2": "numbers of processes to measure with (default 1 and all cores)",
    "--repeats=5": "turns",
    "--copies=1": "times that the corpus is repeated, as JSON lines, where it is short",
    "--json=PATH": "where to write the figures too",
}
PACKAGES = ("numpy", "sentencepiece", "pyarrow", "datasets")
Json = dict[str, Any]


class Row(NamedTuple):
    """One figure: its values over the turns, in `unit`."""

    what: str
    workers: int
    unit: str
    median: float
    low: float
    high: float


def main(arguments: list[str]) -> None:
    name, *rest = arguments or [""]
    if name not in (*BENCHMARKS, "--help", "-h"):
        raise ConfigError(f"what to measure comes first: {', '.join(BENCHMARKS)}; not {name!r}")
    usage, sections = str(__doc__), ("tokenizer", "data")
    rest = rest if name in BENCHMARKS else arguments
    config, flags = load_config(rest, usage=usage, sections=sections, flags=FLAGS)
    options = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    if len(options) < len(flags):
        raise ConfigError(f"one value for each option, not {' '.join(sorted(flags))}")
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    found = BENCHMARKS[name](config, options)
    for row in map(Row._make, found["rows"]):
        spread = f"{row.median:8.2f} ({row.low:.2f} to {row.high:.2f}) {row.unit}"
        print(f"{row.what:<24} {row.workers} workers {spread}")
    if "json" in options:
        content = {"benchmark": name, "machine": machine, **found}
        content["rows"] = [row._asdict() for row in found["rows"]]
        try:
            Path(options["json"]).write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{options['json']}: can't be written: {error.strerror}") from None


def describe_machine() -> Json:
    found = {"cores": available_cores(), "load": round(os.getloadavg()[0], 1)}
    found["python"] = platform.python_version()
    return found | {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def whole_numbers(options: dict[str, str], name: str, default: str) -> list[int]:
    """The value of an option as numbers above 0; ConfigError if it is something else."""
    text = options.get(name, default)
    if not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", text):
        raise ConfigError(f"--{name} is a whole number above 0 (or several, as 1,2), not {text!r}")
    return [int(number) for number in text.split(",")]


def tokenizing(config: Config, options: dict[str, str]) -> Json:
    """MB of text (UTF-8) a second in all processes together, and ratios.

    Raises:
        UserError: what prepare.py says of the corpus; one that is not text.
    """
    global TOKENIZER, TEXTS  # forked processes find them in their memory
    counts = sorted({*whole_numbers(options, "workers", f"1,{available_cores()}")})
    (repeats,) = whole_numbers(options, "repeats", "5")[:1]
    (copies,) = whole_numbers(options, "copies", "1")[:1]
    if config.data.format != "text" or config.data.mixture:
        raise ConfigError("bench.py tokenizing is for data.format = text, and not for a mixture")
    config.data = hub.local_sources(config.data)
    config.data.deduplicate = False  # all are to encode the same
    TOKENIZER = configured_tokenizer(config.tokenizer)
    parts = corpus.plan(config.data)
    TEXTS = [one.text for part in parts for one in corpus.read(part, config.data) if one.text]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if copies > 1:
            TEXTS = [f"{text}# {i}\n" for i in range(copies) for text in TEXTS]
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
            (scratch / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
            config.data.sources, config.data.val_sources = [str(scratch / "corpus.jsonl")], []
            config.data.test_sources, config.data.text_column = [], "text"
            config.data.document = "row"
        size = sum(len(text.encode()) for text in TEXTS) / 1e6
        print(f"{size:.1f} MB of text in {len(TEXTS):,} documents, {repeats} turns", flush=True)
        ways: list[Callable[[int], dict[str, float]]] = [encode_only]
        ways.append(lambda count: run_prepare(config, count, scratch))
        if version("datasets") == "absent":
            print("the package datasets is not installed: not compared")
        else:
            ways.append(map_with_datasets(scratch))
        rows = []
        bar = tqdm(total=len(counts) * repeats * len(ways), disable=None, leave=False)
        for count in counts:
            turns: dict[str, list[float]] = defaultdict(list)
            for _ in range(repeats):
                for way in ways:
                    for what, seconds in way(count).items():
                        turns[what].append(seconds)
                    bar.update()
            rows += compare(turns, count, size)
        bar.close()
    return {"megabytes": size, "documents": len(TEXTS), "repeats": repeats, "rows": rows}


def compare(turns: dict[str, list[float]], count: int, size: float) -> list[Row]:
    """Rates, and ratios of rates within a turn, from the seconds that each way took."""

    def row(what: str, unit: str, values: np.ndarray) -> Row:
        return Row(what, count, unit, statistics.median(values), min(values), max(values))

    seconds = {what: np.array(values) for what, values in turns.items()}
    rates = {what: size / values for what, values in seconds.items()}
    rows = [row(what, "MB/s", rate) for what, rate in rates.items()]
    rows.append(row("prepare beside its work", "s", seconds["prepare"] - seconds["tokenizes"]))
    rows += [row(f"{w} / ceiling", "", rates[w] / rates["ceiling"]) for w in seconds]
    if maps := [rate for what, rate in rates.items() if what.startswith("datasets")]:
        rows.append(row("prepare / datasets", "", rates["prepare"] / np.max(maps, axis=0)))
    return rows


def encode_only(count: int) -> dict[str, float]:
    """The seconds that processes need which are there already, as are the texts in them."""
    with multiprocessing.get_context("fork").Pool(count) as pool:
        pool.map(encode_share, [slice(0, 1)] * count, chunksize=1)
        start = time.perf_counter()
        shares = [slice(i, None, count) for i in range(count)]
        ids = pool.map(encode_share, shares, chunksize=1)
        seconds = time.perf_counter() - start
    check_tokens("ceiling", sum(map(len, ids)) // 2 + 2 * len(TEXTS))
    return {"ceiling": seconds}


def encode_share(share: slice) -> bytes:
    return b"".join(TOKENIZER.encode(text).tobytes() for text in TEXTS[share])
