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
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from config import Config, UserError, resolve_path, write_atomically
from tokenizer import SPACE, Tokenizer, configured_tokenizer, printable

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


class Document(NamedTuple):
    """A document that is shown: its tokens with BOS and EOS, where it lies, and how it begins."""

    length: int
    place: str  # shard and first token
    ids: list[int]
    mask: list[int]  # 1 where trained


@dataclass
class Content:
    """What is in the shards of a split, as far as they were read."""

    tokenizer: Tokenizer
    seq_len: int  # of instruction data, else 0
    shards: int  # that were read
    pieces: np.ndarray  # (vocabulary,) how often each occurs, fill left out
    lengths: Counter[int] = field(default_factory=Counter)  # documents of each length
    longest: list[Document] = field(default_factory=list)
    first: list[Document] = field(default_factory=list)
    trained: int = 0
    filled: int = 0

    def add(self, path: Path, offset: int, ids: np.ndarray, starts: np.ndarray) -> None:
        """Adds a block that `read_blocks` gave; UserError where it is damaged."""
        if (top := ids.max()) >= len(self.pieces):
            raise damage(path, f"id {top}, but the tokenizer has {len(self.pieces)} pieces")
        kept, mask = np.ones(len(ids), bool), np.zeros(len(ids), np.uint8)
        if self.seq_len:
            mask = read_tokens(path.with_suffix(".mask"), offset, len(ids), "u1")
            kept = ~find_fill(ids, mask, self.seq_len, self.tokenizer.eos_id)
        self.trained += int(np.count_nonzero(mask))
        self.filled += int(np.count_nonzero(~kept))
        self.pieces += np.bincount(ids[kept], minlength=len(self.pieces))
        lengths = np.add.reduceat(kept, starts, dtype=np.int64)
        if len(bad := np.flatnonzero(ids[starts + lengths - 1] != self.tokenizer.eos_id)):
            raise damage(path, f"no EOS behind the document at token {offset + starts[bad[0]]}")
        self.lengths.update(lengths.tolist())

        def document(i: int) -> Document:
            start, length = int(starts[i]), int(lengths[i])
            # A conversation is kept whole, since its answers are shown; of a text a little more
            # than is shown, so that `marked_text` knows that there is more.
            stop = start + (length if self.seq_len else min(length, 4 * EXCERPT + 5))
            place = f"{path.name}:{offset + start}"
            return Document(length, place, ids[start:stop].tolist(), mask[start:stop].tolist())

        self.first += map(document, range(len(starts))[: FIRST - len(self.first)])
        self.longest += map(document, np.argsort(-lengths, kind="stable")[:LONGEST])
        self.longest = sorted(self.longest, key=lambda document: -document.length)[:LONGEST]


def inspect(directory: Path, tokenizer: Tokenizer) -> None:
    """Prints what is in a dataset and draws lengths.png beside its manifest; UserError if there is
    no dataset, a damaged one, or one of another tokenizer."""
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
        say("", name, *head, *describe_content(content, split), sep="\n")
        say("", *describe_lengths(content.lengths), "", *describe_documents(content), sep="\n")
    if "train" in contents:
        say("", describe_vocabulary(contents["train"]), sep="\n")
    say("", *origin, "", sep="\n")
    lengths = {name: content.lengths for name, content in contents.items()}
    say(draw_lengths(directory / "lengths.png", lengths, seq_len))


def read_split(directory: Path, split: Json, seq_len: int, tokenizer: Tokenizer) -> Content:
    """Reads the shards of a split; seq_len is that of instruction data, else 0. UserError for a
    shard that is not what the manifest says."""
    shards = split["shards"]
    if split["tokens"] > LIMIT_TOKENS:
        count = max(1, len(shards) * LIMIT_TOKENS // split["tokens"])
        shards = [shards[i * len(shards) // count] for i in range(count)]
    content = Content(tokenizer, seq_len, len(shards), np.zeros(tokenizer.vocab_size, np.int64))
    total = sum(shard["tokens"] for shard in shards)
    with tqdm(total=total, unit=" tokens", unit_scale=True, leave=False, disable=None) as bar:
        for shard in shards:
            path, before = directory / shard["file"], content.lengths.total()
            blocks = read_blocks(path, shard["tokens"], seq_len, tokenizer.bos_id)
            for offset, ids, starts in blocks:
                content.add(path, offset, ids, starts)
                bar.update(len(ids))
            if (found := content.lengths.total() - before) != shard["documents"]:
                raise damage(path, f"{found} documents instead of {shard['documents']}")
    return content


def read_blocks(
    path: Path, tokens: int, seq_len: int, bos: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """A shard in blocks of whole documents, or of whole windows for instruction data.

    Yields:
        A block's first token, its ids (n,), and where documents start in it.
    """
    if seq_len and tokens % seq_len:
        raise damage(path, f"{tokens} tokens are no whole windows of {seq_len}")
    usual = max(1, BLOCK_TOKENS // seq_len) * seq_len if seq_len else BLOCK_TOKENS
    offset, size = 0, usual
    while offset < tokens:
        ids = read_tokens(path, offset, min(size, tokens - offset))
        if len(bad := np.flatnonzero(ids[:: seq_len or len(ids)] != bos)):  # each window begins so
            raise damage(path, f"no BOS at token {offset + bad[0] * seq_len}")
        starts = np.flatnonzero(ids == bos)
        if offset + len(ids) < tokens and not seq_len:  # the last document may go on
            if len(starts) == 1:
                size *= 2
                continue
            ids, starts = ids[: starts[-1]], starts[:-1]
        yield offset, ids, starts
        offset, size = offset + len(ids), usual


def find_fill(ids: np.ndarray, mask: np.ndarray, seq_len: int, eos: int) -> np.ndarray:
    """Which tokens of windows are fill (n,): the untrained EOS at a window's end, except for the
    one that ends a truncated conversation, which stands behind another token."""
    is_eos = (ids == eos).reshape(-1, seq_len)
    untrained = is_eos & (mask == 0).reshape(-1, seq_len)
    tail = np.logical_and.accumulate(untrained[:, ::-1], axis=1)[:, ::-1]
    return (tail & np.roll(is_eos, 1, axis=1)).ravel()


def damage(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}; --force prepares anew")


def row(name: str, figure: str, note: str = "") -> str:
    return f"  {name:<14} {figure:>17}  {note}".rstrip()


def table(rows: list[list[str]], sides: str) -> Iterator[str]:
    """Lines of aligned cells; `sides` has < (left) or > (right) for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        columns = zip(cells, sides, widths, strict=True)
        yield "  " + " ".join(f"{cell:{side}{width}}" for cell, side, width in columns).rstrip()


def describe_split(split: Json) -> Iterator[str]:
    """What the manifest says about a split."""
    tokens = split["tokens"] - split.get("filled", 0)
    yield row("documents", f"{split['documents']:,}")
    yield row("tokens", f"{tokens:,}", "BOS and EOS counted")
    yield row("bytes of text", f"{split['bytes']:,}", f"{split['bytes'] / tokens:.2f} per token")
    yield row("shards", f"{len(split['shards']):,}")


def describe_content(content: Content, split: Json) -> Iterator[str]:
    """What the tokens of a split are."""
    processor, tokens = content.tokenizer.processor, int(content.pieces.sum())
    in_bytes = content.pieces @ processor.is_byte([*range(len(content.pieces))])
    unknown = content.pieces[processor.unk_id()]
    if content.shards < (shards := len(split["shards"])):
        yield f"  looked at {content.shards} of {shards} shards for what follows"
    if content.seq_len:
        space = tokens + content.filled
        yield row("windows", f"{space // content.seq_len:,}", f"of {content.seq_len:,} tokens")
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
    cells = [f"{figure:>6,}" for figure in (*quantiles, round(values @ counts / total))]
    yield "  tokens per document, BOS and EOS counted"
    yield from table([names, cells], ">" * len(names))
    yield ""
    shortest, longest = np.frexp(values[[0, -1]])[1]
    edges = 2 ** np.arange(shortest - 1, longest + 1)
    documents = np.histogram(values, edges, weights=counts)[0].astype(np.int64)
    rows = []
    for low, high, count in zip(edges, edges[1:] - 1, documents, strict=False):
        bar = "█" * round(BAR * count / documents.max()) or "▏" * bool(count)
        rows.append([f"{low:,}", "–", f"{high:,}", f"{count:>9,}", f"{count / total:.1%}", bar])
    yield from table(rows, "><<>><")


def sorted_lengths(lengths: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct lengths in ascending order, and how many documents have each (int64)."""
    return tuple(np.array(sorted(lengths.items()), dtype=np.int64).T)


def describe_documents(content: Content) -> Iterator[str]:
    """The longest documents, and how the first ones read."""
    yield "  longest documents: tokens, shard:first token, beginning"
    heads = [*table([[f"{d.length:,}", d.place] for d in content.longest], ">>")]
    for head, document in zip(heads, content.longest, strict=True):
        # A character takes at most four tokens; the BOS is left out.
        text = visible_text(document.ids[1 : 4 * BEGINNING + 1], content.tokenizer)
        text = printable(text[:BEGINNING])
        yield f"{head} {text[: fitting(text, COLUMNS - len(head) - 1)]}"
    legend = f", trained text between {OPEN} and {CLOSE}" if content.seq_len else ""
    for number, document in enumerate(content.first, 1):
        yield ""
        yield f"  document {number}, {document.length:,} tokens{legend}"
        yield from framed(marked_text(document.ids, document.mask, content.tokenizer))


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


def describe_vocabulary(content: Content) -> str:
    """How many pieces never occur, by kind."""
    processor, size = content.tokenizer.processor, len(content.pieces)
    unused = np.flatnonzero(content.pieces == 0).tolist()
    in_bytes, control = sum(processor.is_byte(unused)), sum(processor.is_control(unused))
    kinds = f"{in_bytes} bytes, {control} control, {len(unused) - in_bytes - control:,} others"
    return f"{len(unused):,} of {size:,} pieces never occur in train ({kinds})"


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
        sums.ecdf(values, counts, **look)
    shares.set_title(f"Document lengths of {path.parent.name}")
    shares.set_ylabel("% of documents per doubling of length")
    sums.set_ylabel("% of documents up to this length")
    sums.set_xlabel("tokens per document, BOS and EOS counted")
    sums.set_xscale("log", base=2)
    sums.xaxis.set_major_formatter("{x:,.0f}")
    sums.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}")
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
    """Prints the texts of the training steps that a run skipped; UserError for a damaged record,
    or a dataset that has changed since."""
    path = resolve_path(config.train.out_dir) / "bad_steps.jsonl"
    if not path.exists() or not path.stat().st_size:
        say(f"{path.parent}: no step was skipped")
        return
    tokenizer = configured_tokenizer(config.tokenizer)
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            step = json.loads(line)
            loss, norm = (
                "not finite" if number is None else f"{number:.4g}"
                for number in (step["loss"], step["grad_norm"])
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
        text = visible_text(np.concatenate(shards).tolist(), tokenizer)
        say(textwrap.indent(text, "  | ", lambda line: True))


def read_tokens(path: Path, offset: int, count: int, kind: str = "<u2") -> np.ndarray:
    """`count` numbers of a shard or mask; UserError if it has fewer."""
    size = np.dtype(kind).itemsize
    ids = np.fromfile(path, kind, count, offset=size * offset) if path.exists() else []
    if len(ids) < count:
        raise UserError(f"{path}: no {count} tokens from {offset} on; was it prepared anew since?")
    return ids


def visible_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids: special tokens by name, and escapes for what does not print."""
    return "".join(text for text, _ in visible_runs(ids, [0] * len(ids), tokenizer))


def marked_text(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> str:
    """The beginning of `visible_text`, with marks around the text where the mask is not 0.

    Of a conversation, the beginning of each message, so that a long question hides no answer.
    """
    marked, left, most = "", EXCERPT, EXCERPT // 2 if any(mask) else EXCERPT
    for trained, runs in itertools.groupby(visible_runs(ids, mask, tokenizer), itemgetter(1)):
        text = "".join(text for text, _ in runs)
        count = min(len(text), left, most)
        shown = text[:count] + "…" * (count < len(text))
        marked += OPEN + shown + CLOSE if trained else shown
        left -= count
        if not left:
            break
    return marked


def visible_runs(
    ids: list[int], mask: list[int], tokenizer: Tokenizer
) -> Iterator[tuple[str, int]]:
    """The texts of runs of tokens, each with its mask: in a run, the mask is the same, and either
    all tokens are special or none."""
    processor = tokenizer.processor
    tokens = zip(ids, processor.is_control(ids), mask, strict=True)
    begins = True  # SentencePiece drops the space before a text, but a run may be amid a text
    for (special, trained), run in itertools.groupby(tokens, itemgetter(1, 2)):
        run_ids = [i for i, _, _ in run]
        pieces = processor.id_to_piece(run_ids)
        text = "".join(pieces) if special else processor.decode(run_ids)
        if not (special or begins) and not text.startswith(pieces[0].replace(SPACE, " ")):
            text = " " * pieces[0].startswith(SPACE) + text
        begins = special
        yield printable(text, "\t\n"), trained
