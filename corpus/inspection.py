"""What is in a prepared dataset, printed for people: prepare.py --inspect and --bad-steps.

Shards are read in blocks of whole documents and lengths are counted by value, so memory does not
grow with the data and every figure is exact. Nothing here knows how a dataset is made.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import sys
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from config import MAX_VOCAB_SIZE, Config, UserError, resolve_path, write_atomically
from tokenizer import SPACE, Tokenizer, configured_tokenizer

BLOCK_TOKENS = 4_000_000  # read at a time; a longer document is still read whole
LIMIT_TOKENS = 2_000_000_000  # of a larger split, evenly spaced shards are read
QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)  # percent
COLUMNS = 100  # of the terminal
BAR = 40  # columns of the longest bar
LONGEST, BEGINNING = 5, 60  # documents, and characters of each
FIRST, EXCERPT = 3, 400  # documents, and characters of each
SOURCES = 10  # that are listed by name
OPEN, CLOSE = "⟦", "⟧"  # around trained text
BOLD_GREEN, PLAIN = "\033[1;32m", "\033[0m"
Json = dict[str, Any]

say = functools.partial(print, flush=True)  # so that a closed pipe (`| head`) ends the program


class Place(NamedTuple):
    """Where a document lies: its tokens with BOS and EOS, its shard, and its first token there."""

    length: int
    path: Path
    offset: int


@dataclass
class Content:
    """What is in the shards of a split, as far as they were read."""

    shards: list[Json]  # those that were read, as in the manifest
    pieces: np.ndarray  # (vocabulary,) how often each occurs, fill left out
    lengths: Counter[int] = field(default_factory=Counter)  # documents of each length
    longest: list[Place] = field(default_factory=list)
    first: list[Place] = field(default_factory=list)
    trained: int = 0
    filled: int = 0


def inspect(directory: Path, tokenizer: Tokenizer) -> None:
    """Prints what is in a dataset and draws lengths.png beside its manifest.

    Raises:
        UserError: no dataset, a damaged one, or one of another tokenizer.
    """
    from dataset import read_manifest  # here, since it loads torch, which nothing else needs

    manifest = read_manifest(directory, tokenizer.sha256)
    try:
        origin = [*describe_origin(directory, manifest)]
        heads = {name: [*describe_split(split)] for name, split in manifest["splits"].items()}
        seq_len = manifest.get("seq_len", 0)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{directory}/manifest.json: damaged; --force prepares anew") from None
    say(f"{directory}: {'instruction data' if seq_len else 'text'}")
    contents = {}
    for name, head in heads.items():
        split = manifest["splits"][name]
        contents[name] = content = read_split(directory, split, seq_len, tokenizer)
        say("\n".join(["", name, *head, *describe_content(content, split, seq_len, tokenizer)]))
        say("\n".join(["", *describe_lengths(content.lengths)]))
        say("\n".join(["", *describe_documents(content, seq_len, tokenizer)]))
    if "train" in contents:
        say("\n" + describe_vocabulary(contents["train"], tokenizer))
    say("\n".join(["", *origin, ""]))
    lengths = {name: content.lengths for name, content in contents.items()}
    say(draw_lengths(directory / "lengths.png", lengths, seq_len))


def read_split(directory: Path, split: Json, seq_len: int, tokenizer: Tokenizer) -> Content:
    """Reads the shards of a split; seq_len is that of instruction data, else 0.

    Raises:
        UserError: a shard that is not what the manifest says.
    """
    shards = split["shards"]
    if split["tokens"] > LIMIT_TOKENS:
        count = max(1, len(shards) * LIMIT_TOKENS // split["tokens"])
        shards = [shards[i * len(shards) // count] for i in range(count)]
    content = Content(shards, np.zeros(tokenizer.vocab_size, dtype=np.int64))
    total = sum(shard["tokens"] for shard in shards)
    with tqdm(total=total, unit=" tokens", unit_scale=True, leave=False, disable=None) as bar:
        for shard in shards:
            path, before = directory / shard["file"], content.lengths.total()
            for offset, ids, starts in read_documents(path, shard["tokens"], seq_len, tokenizer):
                add_documents(content, path, offset, ids, starts, seq_len, tokenizer)
                bar.update(len(ids))
            if (found := content.lengths.total() - before) != shard["documents"]:
                raise damage(path, f"{found} documents instead of {shard['documents']}")
    content.pieces[tokenizer.eos_id] -= content.filled
    return content


def read_documents(
    path: Path, tokens: int, seq_len: int, tokenizer: Tokenizer
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """A shard in blocks of whole documents, or of whole windows for instruction data.

    Yields:
        A block's first token, its ids (n,), and where documents start in it.
    """
    block = max(1, BLOCK_TOKENS // seq_len) * seq_len if seq_len else BLOCK_TOKENS
    if seq_len and tokens % seq_len:
        raise damage(path, f"{tokens} tokens are no whole windows of {seq_len}")
    offset, size = 0, block
    while offset < tokens:
        ids = read_tokens(path, offset, min(size, tokens - offset))
        starts = np.flatnonzero(ids == tokenizer.bos_id)
        if not len(starts) or starts[0]:
            raise damage(path, f"no BOS at token {offset}")
        if offset + len(ids) < tokens and not seq_len:  # the last document may go on
            if len(starts) == 1:
                size *= 2
                continue
            ids, starts = ids[: starts[-1]], starts[:-1]
        yield offset, ids, starts
        offset, size = offset + len(ids), block


def add_documents(
    content: Content,
    path: Path,
    offset: int,
    ids: np.ndarray,
    starts: np.ndarray,
    seq_len: int,
    tokenizer: Tokenizer,
) -> None:
    """Adds a block that `read_documents` gave; UserError where it is damaged."""
    pieces = np.bincount(ids, minlength=MAX_VOCAB_SIZE)
    if pieces[tokenizer.vocab_size :].any():
        raise damage(path, f"id {ids.max()}, but the tokenizer has {tokenizer.vocab_size} pieces")
    content.pieces += pieces[: tokenizer.vocab_size]
    lengths = np.diff(starts, append=len(ids))
    if seq_len:
        windows = ids.reshape(-1, seq_len)
        if len(bad := np.flatnonzero(windows[:, 0] != tokenizer.bos_id)):
            raise damage(path, f"no BOS at token {offset + bad[0] * seq_len}")
        mask = read_tokens(path.with_suffix(".mask"), offset, len(ids), "u1")
        # Untrained EOS at a window's end are fill, but one of them may end a cut conversation.
        untrained = ((ids == tokenizer.eos_id) & (mask == 0)).reshape(windows.shape)
        tails = (~untrained)[:, ::-1].argmax(axis=1)
        before = windows[np.arange(len(windows)), seq_len - 1 - tails]
        fill = np.maximum(tails - (before != tokenizer.eos_id), 0)
        lengths[np.flatnonzero(np.diff(starts // seq_len, append=-1))] -= fill
        content.filled += int(fill.sum())
        content.trained += int(np.count_nonzero(mask))
    if len(bad := np.flatnonzero(ids[starts + lengths - 1] != tokenizer.eos_id)):
        raise damage(path, f"no EOS behind the document at token {offset + starts[bad[0]]}")
    content.lengths.update(lengths.tolist())
    longest = np.argsort(-lengths, kind="stable")[:LONGEST]
    first, longer = (
        [Place(int(lengths[i]), path, offset + int(starts[i])) for i in which]
        for which in (range(min(len(starts), FIRST - len(content.first))), longest)
    )
    content.first += first
    content.longest = sorted(content.longest + longer, key=lambda p: -p.length)[:LONGEST]


def damage(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}; --force prepares anew")


def row(name: str, figure: str, note: str = "") -> str:
    return f"  {name:<14} {figure:>17}  {note}".rstrip()


def describe_split(split: Json) -> Iterator[str]:
    """What the manifest says about a split."""
    tokens = split["tokens"] - split.get("filled", 0)
    yield row("documents", f"{split['documents']:,}")
    yield row("tokens", f"{tokens:,}", "BOS and EOS counted")
    yield row("bytes of text", f"{split['bytes']:,}", f"{split['bytes'] / tokens:.2f} per token")
    yield row("shards", f"{len(split['shards']):,}")


def describe_content(
    content: Content, split: Json, seq_len: int, tokenizer: Tokenizer
) -> Iterator[str]:
    """What the tokens of a split are."""
    processor, tokens = tokenizer.processor, int(content.pieces.sum())
    in_bytes = sum(content.pieces[i] for i in range(tokenizer.vocab_size) if processor.is_byte(i))
    unknown = content.pieces[processor.unk_id()]
    if len(content.shards) < len(split["shards"]):
        yield f"  looked at {len(content.shards)} of {len(split['shards'])} shards for what follows"
    if seq_len:
        space = tokens + content.filled
        yield row("windows", f"{space // seq_len:,}", f"of {seq_len:,} tokens")
        yield row("fill rate", f"{tokens / space:.2%}", "of the windows is conversations")
        yield row("trained", f"{content.trained / tokens:.2%}", "of the tokens without fill")
    yield row("byte pieces", f"{in_bytes / tokens:.3%}", "of the tokens: bytes of rare characters")
    yield row("unknown pieces", f"{unknown / tokens:.3%}", "of the tokens: text that is lost")


def describe_lengths(lengths: Counter[int]) -> Iterator[str]:
    """Quantiles, each a length that occurs, and a histogram by powers of two."""
    values, counts = sorted_lengths(lengths)
    total = counts.sum()
    quantiles = np.percentile(values, QUANTILES, weights=counts, method="inverted_cdf")
    names = ["min", *(f"{percent}%" for percent in QUANTILES[1:-1]), "max", "mean"]
    cells = [f"{figure:,}" for figure in (*quantiles, round(values @ counts / total))]
    wide = max(6, *map(len, cells))
    yield "  tokens per document, BOS and EOS counted"
    yield "  " + " ".join(name.rjust(wide) for name in names)
    yield "  " + " ".join(cell.rjust(wide) for cell in cells)
    yield ""
    octaves = np.frexp(values)[1] - 1
    documents = np.bincount(octaves, weights=counts).astype(np.int64)
    for octave in range(octaves[0], octaves[-1] + 1):
        count = documents[octave]
        bar = "█" * round(BAR * count / documents.max()) or ("▏" if count else "")
        low, high = f"{2**octave:,}", f"{2 ** (octave + 1) - 1:,}"
        yield f"  {low:>11} – {high:<11} {count:>15,} {count / total:>6.1%} {bar}".rstrip()


def sorted_lengths(lengths: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct lengths in ascending order, and how many documents have each (int64)."""
    return tuple(np.array(sorted(lengths.items()), dtype=np.int64).T)


def describe_documents(content: Content, seq_len: int, tokenizer: Tokenizer) -> Iterator[str]:
    """The longest documents, and how the first ones read."""
    yield "  longest documents: tokens, shard:first token, beginning"
    heads = [[f"{p.length:,}", f"{p.path.name}:{p.offset}"] for p in content.longest]
    wide = [max(map(len, column)) for column in zip(*heads, strict=True)]
    for place, (length, where) in zip(content.longest, heads, strict=True):
        # A character takes at most four tokens; the BOS is left out.
        ids = read_tokens(place.path, place.offset, min(place.length, 4 * BEGINNING + 1))[1:]
        text = visible_text(ids, tokenizer)[:BEGINNING].replace("\n", "\\n").replace("\t", "\\t")
        head = f"  {length:>{wide[0]}} {where:<{wide[1]}} "
        yield head + text[: fitting(text, COLUMNS - len(head))]
    legend = f", trained text between {OPEN} and {CLOSE}" if seq_len else ""
    for number, (length, path, offset) in enumerate(content.first, 1):
        # A conversation is read whole, since its answers are shown; of a text a little more than
        # is shown, so that `marked_text` knows that there is more.
        count = length if seq_len else min(length, 4 * EXCERPT + 5)
        mask = np.zeros(count, dtype=np.uint8)
        if seq_len:
            mask = read_tokens(path.with_suffix(".mask"), offset, count, "u1")
        yield ""
        yield f"  document {number}, {length:,} tokens{legend}"
        yield from framed(marked_text(read_tokens(path, offset, count), mask, tokenizer))


def framed(text: str) -> Iterator[str]:
    """The lines of a text behind a bar, cut to the terminal's width; trained text in colour."""
    colour = sys.stdout.isatty()
    inside = False
    for line in text.expandtabs(4).split("\n"):
        while True:
            count = fitting(line, COLUMNS - 4)
            if count < len(line):  # between words if possible
                count = line.rfind(" ", count // 2, count) + 1 or count
            shown, line = line[:count], line[count:]
            start = BOLD_GREEN if inside else ""
            inside = shown.rfind(OPEN) > shown.rfind(CLOSE) or (inside and CLOSE not in shown)
            if colour:
                shown = start + shown.replace(OPEN, BOLD_GREEN + OPEN)
                shown = shown.replace(CLOSE, CLOSE + PLAIN) + (PLAIN if inside else "")
            yield f"  | {shown}"
            if not line:
                break


def fitting(text: str, columns: int) -> int:
    """How many characters of a line fit into that many columns of a terminal; at least one."""
    wide = (
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
    return max(1, sum(end <= columns for end in itertools.accumulate(wide)))


def describe_vocabulary(content: Content, tokenizer: Tokenizer) -> str:
    """How many pieces never occur, by kind."""
    processor = tokenizer.processor
    unused = np.flatnonzero(content.pieces == 0).tolist()
    in_bytes = sum(map(processor.is_byte, unused))
    control = sum(map(processor.is_control, unused))
    kinds = f"{in_bytes} bytes, {control} control, {len(unused) - in_bytes - control:,} others"
    return f"{len(unused):,} of {tokenizer.vocab_size:,} pieces never occur in train ({kinds})"


def describe_origin(directory: Path, manifest: Json) -> Iterator[str]:
    """Counts and sources from the manifest, and how many bad rows were left out."""
    counts, sources, skipped = manifest["counts"], manifest["sources"], directory / "skipped.jsonl"
    dropped = {rule.replace("_", " "): count for rule, count in counts["dropped"].items()}
    yield "made from"
    yield row("read", f"{counts['read']:,}", "documents")
    yield row("written", f"{counts['written']:,}")
    rules = ", ".join(f"{count:,} {rule}" for rule, count in dropped.items() if count)
    yield row("dropped", f"{sum(dropped.values()):,}", rules)
    for split, count in counts.get("moved", {}).items():
        yield row("moved", f"{count:,}", f"documents to {split}, so that no split is empty")
    if "truncated" in counts:
        yield row("truncated", f"{counts['truncated']:,}", "conversations, cut to a window")
    if skipped.exists():
        with open(skipped, "rb") as file:
            yield row("bad rows", f"{sum(1 for _ in file):,}", "left out, skipped.jsonl lists them")
    else:
        yield row("bad rows", "0", "there is no skipped.jsonl")
    if not_read := counts.get("not_read"):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in not_read.items())
        yield row("not read", f"{sum(not_read.values()):,}", f"files beside the sources: {kinds}")
    yield row("sources", f"{len(sources):,}", f"{sum(s['bytes'] for s in sources):,} bytes")
    for source in sources[:SOURCES]:
        name = source["name"] + (f" ({source['split']})" if "split" in source else "")
        name = name if len(name) <= 60 else "…" + name[-59:]  # the end of a path says more
        yield f"    {source['bytes']:>15,} bytes  {name}"
    if len(sources) > SOURCES:
        yield f"    … and {len(sources) - SOURCES:,} more"


def draw_lengths(path: Path, lengths: dict[str, Counter[int]], seq_len: int) -> str:
    """Draws the document lengths of each split; returns a line that says where, or why not."""
    try:
        from matplotlib.figure import Figure  # without pyplot, so it needs no display
    except ImportError:
        return "for a picture of the lengths: pip install '.[plot]'"
    figure = Figure(figsize=(8, 7), layout="constrained")
    shares, sums = figure.subplots(2, sharex=True)
    styles = [("-", "black", 1.8), ("--", "tab:orange", 1.5), (":", "tab:blue", 2.2)]
    for (name, counter), (style, colour, width) in zip(lengths.items(), styles, strict=False):
        values, counts = sorted_lengths(counter)
        look = {"linestyle": style, "color": colour, "linewidth": width}
        low, high = np.frexp(values[[0, -1]])[1]
        edges = np.unique(np.ceil(2 ** np.arange(low - 1, high + 0.1, 0.5)))
        percent = np.histogram(values, edges, weights=100 * counts / counts.sum())[0]
        shares.stairs(percent / np.diff(np.log2(edges)), edges, label=name, **look)
        total = np.append(0, 100 * counts.cumsum() / counts.sum())
        sums.step(np.append(values[0], values), total, where="post", **look)
    shares.set(title=f"Document lengths of {path.parent.name}")
    shares.set(ylabel="% of documents per doubling of length")
    sums.set(ylabel="% of documents up to this length")
    sums.set(xlabel="tokens per document, BOS and EOS counted")
    sums.set_xscale("log", base=2)
    sums.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in (shares, sums):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        if seq_len:
            axes.axvline(seq_len, color="0.6", linewidth=1, label=f"seq_len {seq_len:,}")
    shares.legend()
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        return f"no picture of the lengths: can't write {path}: {error.strerror}"
    return f"picture of the lengths: {path}"


def show_bad_steps(config: Config) -> None:
    """Prints the texts of the training steps that a run skipped.

    Raises:
        UserError: a damaged record, or a dataset that has changed since.
    """
    path = resolve_path(config.train.out_dir) / "bad_steps.jsonl"
    if not path.exists():
        say(f"{path.parent}: no step was skipped")
        return
    tokenizer = configured_tokenizer(config.tokenizer)
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            step = json.loads(line)
            loss, norm = (
                "not finite" if step[name] is None else f"{step[name]:.4g}"
                for name in ("loss", "grad_norm")
            )
            say(f"step {step['step']}: {step['reason']}, loss {loss}, gradient norm {norm}")
            show_windows(step["windows"], tokenizer)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: damaged") from None


def show_windows(windows: list[Json], tokenizer: Tokenizer) -> None:
    """Prints where windows lie and their texts; UserError if they are not in their datasets."""
    from dataset import read_manifest  # here, since it loads torch, which nothing else needs

    for directory in {window["dataset"]: None for window in windows}:
        read_manifest(resolve_path(directory), tokenizer.sha256)
    for window in windows:
        directory, pieces = resolve_path(window["dataset"]), window["pieces"]
        places = [f"{p['tokens']} tokens of {p['shard']} from {p['offset']}" for p in pieces]
        say(f"window {window['window']} in {directory}: {', '.join(places)}")
        shards = [read_tokens(directory / p["shard"], p["offset"], p["tokens"]) for p in pieces]
        text = visible_text(np.concatenate(shards), tokenizer)
        say(textwrap.indent(text, "  | ", lambda line: True))


def read_tokens(path: Path, offset: int, count: int, kind: str = "<u2") -> np.ndarray:
    """`count` numbers of a shard or mask; UserError if it has fewer."""
    size = np.dtype(kind).itemsize
    ids = np.fromfile(path, kind, count, offset=size * offset) if path.exists() else []
    if len(ids) < count:
        raise UserError(f"{path}: no {count} tokens from {offset} on; was it prepared anew since?")
    return ids


def visible_text(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of ids: special tokens by name, and escapes for what does not print."""
    return "".join(text for text, _ in visible_runs(ids, np.zeros(len(ids)), tokenizer))


def marked_text(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> str:
    """The beginning of `visible_text`, with marks around the text where the mask is not 0.

    Of a conversation, the beginning of each message, so that a long question hides no answer.
    """
    marked, left, most = "", EXCERPT, EXCERPT // 2 if mask.any() else EXCERPT
    for trained, runs in itertools.groupby(visible_runs(ids, mask, tokenizer), lambda run: run[1]):
        text = "".join(text for text, _ in runs)
        shown = text if len(text) <= min(left, most) else text[: min(left, most)] + "…"
        marked += OPEN + shown + CLOSE if trained else shown
        left -= min(len(text), most)
        if left <= 0:
            break
    return marked


def visible_runs(
    ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer
) -> Iterator[tuple[str, bool]]:
    """Texts of runs of ids that are alike, special or not and trained or not; with the latter."""
    processor = tokenizer.processor
    kinds = zip(ids.tolist(), (mask != 0).tolist(), strict=True)
    begins = True  # SentencePiece drops the space before a text, but a run may be amid a text
    for (special, trained), run in itertools.groupby(
        kinds, lambda pair: (processor.is_control(pair[0]), pair[1])
    ):
        run_ids = [i for i, _ in run]
        pieces = processor.id_to_piece(run_ids)
        text = "".join(pieces) if special else tokenizer.decode(run_ids)
        if not (special or begins) and not text.startswith(pieces[0].replace(SPACE, " ")):
            text = " " * pieces[0].startswith(SPACE) + text
        begins = special
        yield (
            "".join(c if c.isprintable() or c in "\t\n" else ascii(c)[1:-1] for c in text),
            trained,
        )
