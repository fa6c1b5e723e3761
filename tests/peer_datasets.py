"""What bench.py tokenizing compares prepare.py with: datasets.map of the package datasets.

Apart from peers.py, since tokenizing is measured in processes that never load torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import datasets
import numpy as np
import pyarrow.compute as pc

from tokenizer import Tokenizer

TOKENIZER: Tokenizer  # forked processes find it in their memory


def mapper(
    texts: list[str], tokenizer: Tokenizer, scratch: str
) -> Callable[[int], tuple[dict[str, float], int]]:
    """A way to tokenize texts with a number of processes: seconds by name, and how many tokens."""
    global TOKENIZER
    TOKENIZER = tokenizer
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(f"{scratch}/rows")
    options = {"batched": True, "remove_columns": ["text"], "load_from_cache_file": False}
    lean = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    variants = (("datasets.map", lists_of_rows, None), ("datasets.map, lean", arrays_of_rows, lean))

    def way(count: int) -> tuple[dict[str, float], int]:
        taken, workers = {}, count if count > 1 else None
        for name, function, features in variants:
            rows = datasets.load_from_disk(f"{scratch}/rows")
            start = time.perf_counter()
            rows = rows.map(function, num_proc=workers, features=features, **options)
            taken[name] = time.perf_counter() - start
        return taken, pc.sum(pc.list_value_length(rows.data.column("ids"))).as_py()

    return way


def lists_of_rows(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"ids": [TOKENIZER.processor.encode(text) for text in rows["text"]]}


def arrays_of_rows(rows: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
    return {"ids": [TOKENIZER.encode(text) for text in rows["text"]]}
