"""Prints a run's validation bits per byte beside what xz makes of the same text.

python tests/compare_xz.py out/tiny
"""

import json
import lzma
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import build_config, read_toml, resolve_path
from tokenizer import Tokenizer

run = Path(sys.argv[1])
config = build_config(read_toml(run / "config.toml"))
tokenizer = Tokenizer(run / "tokenizer.model")
shards = sorted(resolve_path(config.data.dir).glob("val-*.bin"))
ids = np.concatenate([np.fromfile(shard, dtype="<u2") for shard in shards])
ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
text = b"".join(tokenizer.decode(d.tolist()).encode() for d in np.split(ids, ends))
packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
ours = [row["val_bits_per_byte"] for row in rows if "val_bits_per_byte" in row][-1]
print(f"validation: {ours:.3f} bits per byte; xz -9e on the same text (", end="")
print(f"{len(text):,} bytes): {8 * len(packed) / len(text):.3f}")
