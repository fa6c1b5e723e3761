"""Turns the documents of one part into token files: encodes, drops duplicates, packs windows.

The files of one split of a part share a name. NAME.bin holds the tokens, documents back to back.
Conversations add NAME.mask, one byte per token. If documents are deduplicated or packed, NAME.docs
has a record for each, and `arrange_part` writes the final files from these.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from config import DataConfig, sync_directory
from corpus import readers
from corpus.readers import Bad, Document, Part
from corpus.splits import Splitter
from tokenizer import ASSISTANT, Template, Tokenizer

ARRANGED = "arranged."  # in the names of files whose documents were deduplicated or packed
SKIPPED = "skipped.jsonl"
SHORT_DOCUMENT = 64  # tokens; a lower median suggests that lines were taken for documents
RECORD = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("digest", "<u8", 2)])  # of NAME.docs
DUPLICATES_AT_ONCE = 4_000_000  # records compared at a time, about 50 bytes of memory each

Json = dict[str, Any]


class Worker(NamedTuple):
    """What a process needs to work on parts.

    Attributes:
        template: how conversations are written; None for plain text.
        work: the directory of the parts' files.
        moved: the new splits of the documents that splits.fill_splits moves, by their hash.
        duplicates: the indices of documents to drop, by part and split.
        run: see new_file.
        done: the bytes read of each part, for the progress bar.
    """

    data: DataConfig
    tokenizer: Tokenizer
    template: Template | None
    work: Path
    moved: dict[int, str]
    duplicates: dict[tuple[int, str], np.ndarray]
    run: str = ""
    done: Sequence[int] = ()

    def file(self, index: int, stage: str, name: str) -> Path:
        """A file of a part: its report, its bad rows, or the tokens of a split (no ending)."""
        return self.work / f"part-{index:06d}.{stage}{name}"


class Encoded(NamedTuple):
    """A document's tokens (two bytes each), its mask (one byte each), and the bytes of its text."""

    tokens: bytes
    mask: bytes
    bytes: int
    digest: bytes = bytes(16)
    truncated: bool = False


class Shard:
    """Writes, counts and hashes the files of one split of a part.

    Args:
        files: closes the files in the end, which then get their names (see new_file).
        path: the name without the ending.
        endings: which files to write, of .bin, .mask and .docs.
        run: see new_file.
    """

    def __init__(self, files: contextlib.ExitStack, path: Path, endings: tuple[str, ...], run: str):
        self.files = {
            ending: files.enter_context(new_file(Path(f"{path}{ending}"), run))
            for ending in endings
        }
        self.digests = {ending: hashlib.sha256() for ending in endings}
        self.counts = {"tokens": 0, "documents": 0, "bytes": 0}
        self.counts |= {"trained": 0, "filled": 0} if ".mask" in endings else {}

    def add(self, document: Encoded) -> None:
        tokens = len(document.tokens) // 2
        self.write(".bin", document.tokens)
        if ".mask" in self.files:
            self.write(".mask", document.mask)
            self.counts["trained"] += document.mask.count(1)
        if ".docs" in self.files:
            self.write(".docs", struct.pack("<QQ16s", tokens, document.bytes, document.digest))
        self.counts["tokens"] += tokens
        self.counts["documents"] += 1
        self.counts["bytes"] += document.bytes

    def fill(self, count: int, eos: bytes) -> None:
        """Pads a window with `count` tokens EOS, which are not trained on."""
        self.write(".bin", eos * count)
        self.write(".mask", bytes(count))
        self.counts["tokens"] += count
        self.counts["filled"] += count

    def write(self, ending: str, content: bytes) -> None:
        self.files[ending].write(content)
        self.digests[ending].update(content)

    def summary(self) -> Json:
        """The counts and digests, as the manifest states them."""
        digests = {"sha256": self.digests[".bin"].hexdigest()}
        if ".mask" in self.files:
            digests["mask_sha256"] = self.digests[".mask"].hexdigest()
        return self.counts | digests


def record_endings(data: DataConfig) -> tuple[str, ...]:
    """The files that arrange_part needs beside the tokens; none if it has nothing to do."""
    mask = (".mask",) if data.format == "instruct" else ()
    return (*mask, ".docs") if mask or data.deduplicate else ()


def tokenize_part(worker: Worker, part: Part) -> Json:
    """Writes a part's token files and then its report, which is returned.

    Raises:
        UserError: a document can't be read.
        OSError: a file can't be written.
    """
    data, done, run = worker.data, worker.done, worker.run
    counts, dropped = Counter(read=0, truncated=0, short=0), Counter()
    shards: dict[str, Shard] = {}
    splitter = Splitter(data, worker.moved)
    with contextlib.ExitStack() as files:
        skipped = files.enter_context(new_file(worker.file(part.index, "", SKIPPED), run))

        def skip(bad: Bad) -> None:
            line = json.dumps(bad._asdict(), ensure_ascii=False) + "\n"
            skipped.write(line.encode(errors="replace"))
            counts["read"] += 1
            dropped["bad"] += 1

        for document in readers.read(part, data, skip):
            counts["read"] += 1
            done[part.index] = min(part.bytes, done[part.index] + len(document.text.encode()))
            try:
                encoded = encode(document, worker)
            except Exception as error:
                raise RuntimeError(f"{document.place()}: can't be encoded") from error
            if isinstance(encoded, str):
                dropped[encoded] += 1
                continue
            counts["short"] += len(encoded.tokens) < 2 * SHORT_DOCUMENT
            counts["truncated"] += encoded.truncated
            split = part.split or splitter.split(document.text)
            if split not in shards:
                path = worker.file(part.index, "", split)
                shards[split] = Shard(files, path, (".bin", *record_endings(data)), run)
            shards[split].add(encoded)
        splits = {split: shard.summary() for split, shard in sorted(shards.items())}
    report = {"splits": splits, **counts, "dropped": dropped}
    report |= {"edges": splitter.edges, "moved": splitter.counts}
    return write_report(worker, part, "", report)


def write_report(worker: Worker, part: Part, stage: str, report: Json) -> Json:
    """Writes the report of a part whose files are complete, which marks the part as done."""
    with new_file(worker.file(part.index, stage, "json"), worker.run) as file:
        file.write(json.dumps(report).encode())
    worker.done[part.index] = part.bytes
    return report


def encode(document: Document, worker: Worker) -> Encoded | str:
    """A document's tokens from BOS to EOS, or the rule (see build.RULES) that drops it."""
    data, tokenizer, template = worker.data, worker.tokenizer, worker.template
    content = document.text.encode()
    digest = hashlib.blake2b(content, digest_size=16).digest() if data.deduplicate else bytes(16)
    if not template:
        if not content:
            return "empty"
        bos, eos = (i.to_bytes(2, "little") for i in (tokenizer.bos_id, tokenizer.eos_id))
        ids = tokenizer.encode(document.text).astype("<u2").tobytes()
        return Encoded(bos + ids + eos, b"", len(content), digest)
    messages = json.loads(document.text)
    if not any(text for _, text in messages):
        return "empty"
    if not any(text for role, text in messages if role == ASSISTANT):
        return "no_response"
    asked = [text for role, text in messages if role not in ("system", ASSISTANT)]
    if asked and not any(asked):
        return "no_prompt"
    ids, mask = template.render(messages, data.train_on)
    size = sum(len(text.encode()) for _, text in messages)
    if truncated := len(ids) > data.seq_len:
        if data.too_long == "drop":
            return "too_long"
        ids, mask = ids[: data.seq_len].copy(), mask[: data.seq_len].copy()
        ids[-1], mask[-1] = tokenizer.eos_id, 0
        if not mask.any():
            return "too_long"
        size = len(tokenizer.decode(ids).encode())
    return Encoded(ids.astype("<u2").tobytes(), mask.tobytes(), size, digest, truncated)


def arrange_part(worker: Worker, part: Part) -> Json:
    """Writes a tokenized part's final files, and then its report, which is returned."""
    data, eos = worker.data, worker.tokenizer.eos_id.to_bytes(2, "little")
    endings = (".bin", ".mask") if data.format == "instruct" else (".bin",)
    tokenized = json.loads(worker.file(part.index, "", "json").read_bytes())
    shards, duplicates = {}, 0
    with contextlib.ExitStack() as files:
        for split in tokenized["splits"]:
            drop = worker.duplicates.get((part.index, split), np.empty(0, np.int64))
            path = worker.file(part.index, ARRANGED, split)
            shard = Shard(files, path, endings, worker.run)
            arrange(worker.file(part.index, "", split), shard, drop, data.seq_len, eos)
            duplicates += len(drop)
            if shard.counts["documents"]:
                shards[split] = shard.summary()
    read = sum(shard["documents"] for shard in shards.values()) + duplicates
    report = {"splits": shards, "read": read, "duplicates": duplicates}
    return write_report(worker, part, ARRANGED, report)


def arrange(source: Path, shard: Shard, dropped: np.ndarray, seq_len: int, eos: bytes) -> None:
    """Copies documents to a shard, packed into windows of `seq_len` tokens if it has a mask.

    Args:
        source: the name of the documents' files, without the ending.
        dropped: indices of the documents to leave out.
        eos: EOS as two bytes.
    """
    records = np.fromfile(f"{source}.docs", RECORD)
    starts = np.concatenate([[0], np.cumsum(records["tokens"])]).astype(np.int64)
    kept = np.setdiff1d(np.arange(len(records)), dropped)
    tokens = np.memmap(f"{source}.bin", "<u2", "r")
    masked = ".mask" in shard.files
    mask = np.memmap(f"{source}.mask", np.uint8, "r") if masked else None
    lengths = records["tokens"][kept].astype(np.int64)
    for window in pack(lengths, seq_len) if masked else [range(len(kept))]:
        for index in kept[window]:
            place = slice(starts[index], starts[index + 1])
            trained = b"" if mask is None else mask[place].tobytes()
            shard.add(Encoded(tokens[place].tobytes(), trained, int(records["bytes"][index])))
        if masked:
            shard.fill(seq_len - int(lengths[window].sum()), eos)


def pack(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Fills windows of `size` tokens with whole documents: best fit, longest document first.

    A document goes to the window that it leaves with the least room (Johnson, "Near-optimal bin
    packing algorithms", 1973), so only the last few windows of a part have much room left.

    Returns:
        For each window the indices of its documents; windows and indices in ascending order.
    """
    windows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # windows by the tokens that still fit
    rooms: list[int] = []  # the keys of by_room, ascending
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            window = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room, window = size, len(windows)
            windows.append([])
        windows[window].append(document)
        if left := room - length:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(window)
    return sorted(map(sorted, windows))


def find_duplicates(sources: list[Path]) -> list[np.ndarray]:
    """For each source the indices of documents whose digest an earlier document has.

    Digests are compared in groups by their value. So memory does not grow with the corpus, but the
    records are read once per group.
    """
    total = sum(os.path.getsize(f"{path}.docs") for path in sources) // RECORD.itemsize
    groups = -(-total // DUPLICATES_AT_ONCE)
    found: list[list[np.ndarray]] = [[] for _ in sources]
    for group in range(groups):
        digests, owners, indices = [], [], []
        for owner, path in enumerate(sources):
            digest = np.fromfile(f"{path}.docs", RECORD)["digest"]
            (mine,) = np.nonzero(digest[:, 0] % groups == group)
            digests.append(digest[mine])
            owners.append(np.full(len(mine), owner, np.uint32))
            indices.append(mine.astype(np.uint32))
        digest, owner, index = map(np.concatenate, (digests, owners, indices))
        order = np.lexsort((digest[:, 1], digest[:, 0]))  # stable: equal ones stay in order
        again = order[1:][(digest[order[1:]] == digest[order[:-1]]).all(axis=1)]
        for number in np.unique(owner[again]):
            found[number].append(index[again][owner[again] == number])
    return [np.sort(np.concatenate([np.empty(0, np.uint32), *parts])) for parts in found]


@contextlib.contextmanager
def new_file(path: Path, run: str) -> Iterator[BinaryIO]:
    """A file that gets its name at the end, complete and durable; after an error it is removed.

    So is one that stayed empty. Programs that write the same `path` at the same time differ in
    `run`, which is part of the temporary name; the last one replaces an equal file.
    """
    temporary = path.with_name(f"{path.name}.{run}.tmp")
    try:
        with open(temporary, "wb", 1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if size:
            temporary.replace(path)
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
