"""A part's documents to files of tokens: encoded, compared, packed into windows.

The documents of one split of a part stand back to back in NAME.bin. Where their tokens have a mask
it is NAME.mask, a byte a token; where they are to be compared or packed, NAME.docs has a record for
each, and from it `arrange_part` makes the final files.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from config import DataConfig, sync_directory
from corpus import readers
from corpus.readers import Bad, Document, Part
from tokenizer import LEARNT, Template, Tokenizer

COUNTS = ("tokens", "documents", "bytes")
MASK_COUNTS = ("trained", "filled")
ARRANGED = "arranged."  # in the names of files whose documents were compared or packed
SKIPPED = "skipped.jsonl"
SHORT_DOCUMENT = 64  # tokens; a median below it suggests lines where documents were meant
RECORD = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("digest", "<u8", 2)])
DUPLICATES_AT_ONCE = 4_000_000  # records compared at a time, about 50 bytes of memory each


Json = dict[str, Any]


class Encoder(NamedTuple):
    """What a worker needs to tokenize documents.

    Attributes:
        template: for conversations.
        moved: documents that go to another split than their hash says, see readers.fill_splits.
    """

    data: DataConfig
    tokenizer: Tokenizer
    template: Template | None
    moved: dict[int, str]


class Encoded(NamedTuple):
    """A document's tokens, two bytes each; its mask, one byte each; and the bytes of its text."""

    tokens: bytes
    mask: bytes
    bytes: int
    digest: bytes = bytes(16)
    truncated: bool = False


class Shard:
    """One split of a part on its way to disk, counted and hashed.

    Args:
        path: the files' name without its ending.
        endings: the files to write, of .bin, .mask and .docs.
        run: tells this program's temporary files from those of others that write the same.
    """

    def __init__(self, files: contextlib.ExitStack, path: Path, endings: tuple[str, ...], run: str):
        self.path = path
        self.files = {
            ending: files.enter_context(new_file(named(path, ending), run)) for ending in endings
        }
        self.digests = {ending: hashlib.sha256() for ending in endings}
        self.counts = dict.fromkeys((*COUNTS, *MASK_COUNTS), 0)

    def add(self, document: Encoded) -> None:
        self.write(".bin", document.tokens)
        if ".mask" in self.files:
            self.write(".mask", document.mask)
            self.counts["trained"] += document.mask.count(1)
        tokens = len(document.tokens) // 2
        if ".docs" in self.files:
            digest = np.frombuffer(document.digest, "<u8")
            record = np.array([(tokens, document.bytes, digest)], RECORD)
            self.write(".docs", record.tobytes())
        self.counts["tokens"] += tokens
        self.counts["documents"] += 1
        self.counts["bytes"] += document.bytes

    def fill(self, count: int, eos: bytes) -> None:
        """Fills up a window."""
        self.write(".bin", eos * count)
        self.write(".mask", bytes(count))
        self.counts["tokens"] += count
        self.counts["filled"] += count

    def write(self, ending: str, content: bytes) -> None:
        self.files[ending].write(content)
        self.digests[ending].update(content)

    def finish(self) -> Json:
        """Makes the files durable and gives them their names; what a manifest says of them."""
        for ending, file in self.files.items():
            name_file(file, named(self.path, ending))
        masked = ".mask" in self.files
        found = {name: self.counts[name] for name in (*COUNTS, *(MASK_COUNTS if masked else ()))}
        found["sha256"] = self.digests[".bin"].hexdigest()
        if masked:
            found["mask_sha256"] = self.digests[".mask"].hexdigest()
        return found


def part_name(work: Path, index: int, stage: str, split: str) -> Path:
    """The files of one split of a part, without their endings."""
    return work / f"part-{index:06d}.{stage}{split}"


def record_endings(data: DataConfig) -> tuple[str, ...]:
    """What a part's documents need beside their tokens, so that they can be arranged anew."""
    mask = (".mask",) if data.format == "instruct" else ()
    return (*mask, ".docs") if mask or data.deduplicate else ()


def tokenize_part(encoder: Encoder, work: Path, run: str, done: Sequence[int], part: Part) -> Json:
    """Writes the tokens of a part's documents, some files a split, and then its report.

    Raises:
        UserError: a document that can't be read.
        OSError: the files can't be written.
    """
    data, counts = encoder.data, Counter(read=0, truncated=0, short=0)
    dropped: Counter[str] = Counter()
    shards: dict[str, Shard] = {}
    splitter = readers.Splitter(data, encoder.moved)
    with contextlib.ExitStack() as files:
        skipped = files.enter_context(new_file(work / f"part-{part.index:06d}.{SKIPPED}", run))

        def skip(bad: Bad) -> None:
            line = json.dumps(bad._asdict(), ensure_ascii=False) + "\n"
            skipped.write(line.encode(errors="replace"))
            counts["read"] += 1
            dropped["bad"] += 1

        for document in readers.read(part, data, skip):
            counts["read"] += 1
            done[part.index] = min(part.bytes, done[part.index] + len(document.text.encode()))
            try:
                encoded = encode(document, encoder)
            except Exception as error:
                raise RuntimeError(f"{document.place()}: can't be encoded") from error
            if isinstance(encoded, str):
                dropped[encoded] += 1
                continue
            tokens = len(encoded.tokens) // 2
            counts["short"] += tokens < SHORT_DOCUMENT
            counts["truncated"] += encoded.truncated
            split = part.split or splitter.split(document.text)
            if split not in shards:
                name = part_name(work, part.index, "", split)
                shards[split] = Shard(files, name, (".bin", *record_endings(data)), run)
            shards[split].add(encoded)
        splits = {split: shard.finish() for split, shard in sorted(shards.items())}
        if dropped["bad"]:
            name_file(skipped, work / f"part-{part.index:06d}.{SKIPPED}")
    report = {"splits": splits, **counts, "dropped": dropped}
    report |= {"edges": splitter.edges, "moved": splitter.counts}
    write_file(work / f"part-{part.index:06d}.json", json.dumps(report).encode(), run)
    done[part.index] = part.bytes
    return report


def write_file(path: Path, content: bytes, run: str) -> None:
    with new_file(path, run) as file:
        file.write(content)
        name_file(file, path)


def encode(document: Document, encoder: Encoder) -> Encoded | str:
    """A document's tokens from BOS to EOS, or the rule by which it is dropped."""
    data, tokenizer, template, _ = encoder
    size = len(document.text.encode())
    digest = bytes(16)
    if data.deduplicate:
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
    if not template:
        if not size:
            return "empty"
        bos, eos = (i.to_bytes(2, "little") for i in (tokenizer.bos_id, tokenizer.eos_id))
        ids = tokenizer.encode(document.text).astype("<u2").tobytes()
        return Encoded(bos + ids + eos, b"", size, digest)
    messages = json.loads(document.text)
    if not any(content for _, content in messages):
        return "empty"
    if not any(content for role, content in messages if role == LEARNT):
        return "no_response"
    asked = [content for role, content in messages if role not in ("system", LEARNT)]
    if asked and not any(asked):
        return "no_prompt"
    ids, mask = template.render(messages, data.train_on)
    truncated = len(ids) > data.seq_len
    if truncated:
        if data.too_long == "drop":
            return "too_long"
        ids, mask = ids[: data.seq_len].copy(), mask[: data.seq_len].copy()
        ids[-1], mask[-1] = tokenizer.eos_id, 0
        if not mask.any():
            return "too_long"
    text = tokenizer.decode(ids) if truncated else "".join(content for _, content in messages)
    size = len(text.encode())
    return Encoded(ids.astype("<u2").tobytes(), mask.tobytes(), size, digest, truncated)


def arrange_part(
    work: Path,
    splits: list[list[str]],
    dropped: dict[tuple[int, str], np.ndarray],
    data: DataConfig,
    eos: bytes,
    run: str,
    done: Sequence[int],
    part: Part,
) -> Json:
    """Writes a part's files anew, as they will be published, and then its report."""
    shards = {}
    nothing = np.empty(0, np.int64)
    endings = (".bin", ".mask") if data.format == "instruct" else (".bin",)
    duplicates = 0
    with contextlib.ExitStack() as files:
        for split in splits[part.index]:
            drop = dropped.get((part.index, split), nothing)
            duplicates += len(drop)
            shard = Shard(files, part_name(work, part.index, ARRANGED, split), endings, run)
            arrange(part_name(work, part.index, "", split), shard, drop, data.seq_len, eos)
            if shard.counts["documents"]:
                shards[split] = shard.finish()
    read = sum(shard["documents"] for shard in shards.values()) + duplicates
    report = {"splits": shards, "read": read, "duplicates": duplicates}
    path = work / f"part-{part.index:06d}.{ARRANGED}json"
    write_file(path, json.dumps(report).encode(), run)
    done[part.index] = part.bytes
    return report


def named(path: Path, ending: str) -> Path:
    """`part-000000.train` and `.bin` to one name (the part's dot is no ending)."""
    return path.with_name(path.name + ending)


def arrange(source: Path, shard: Shard, dropped: np.ndarray, seq_len: int, eos: bytes) -> None:
    """Copies the documents of `source` into a shard but for those dropped, packed if it has a mask.

    Args:
        dropped: indices of documents.
        seq_len: tokens of a window, for documents with a mask.
        eos: EOS as two bytes.
    """
    records = np.fromfile(named(source, ".docs"), RECORD)
    starts = np.concatenate([[0], np.cumsum(records["tokens"])]).astype(np.int64)
    kept = np.setdiff1d(np.arange(len(records)), dropped)
    tokens = np.memmap(named(source, ".bin"), "<u2", "r")
    masked = ".mask" in shard.files
    mask = np.memmap(named(source, ".mask"), np.uint8, "r") if masked else None
    lengths = records["tokens"][kept].astype(np.int64)
    for window in pack(lengths, seq_len) if masked else [range(len(kept))]:
        for index in kept[window]:
            place = slice(starts[index], starts[index + 1])
            trained = b"" if mask is None else mask[place].tobytes()
            shard.add(Encoded(tokens[place].tobytes(), trained, int(records["bytes"][index])))
        if masked:
            shard.fill(seq_len - int(lengths[window].sum()), eos)


def pack(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Fills windows of `size` tokens with whole documents: best fit, the longest first.

    A document goes where it leaves the least room (Johnson, "Near-optimal bin packing algorithms",
    1973), so that hardly any window but a part's last ones has much left.

    Returns:
        For each window the indices of its documents; all in the order of the documents.
    """
    windows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # windows with so many tokens left
    rooms: list[int] = []  # the keys, ascending
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

    Memory does not grow with the corpus: digests are compared in groups by their value, at the
    price of reading the records once a group.
    """
    total = sum(named(path, ".docs").stat().st_size for path in sources) // RECORD.itemsize
    groups = -(-total // DUPLICATES_AT_ONCE)
    found: list[list[np.ndarray]] = [[] for _ in sources]
    for group in range(groups):
        digests, owners, indices = [], [], []
        for owner, path in enumerate(sources):
            digest = np.fromfile(named(path, ".docs"), RECORD)["digest"]
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
    """A file to write under a temporary name; unless `name_file` gives it its own, it goes."""
    temporary = path.with_name(f"{path.name}.{run}.tmp")
    try:
        with open(temporary, "wb", 1 << 20) as file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def name_file(file: BinaryIO, path: Path) -> None:
    """Makes a file durable and gives it its name, where an equal one may stand."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    sync_directory(path.parent)
