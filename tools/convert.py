"""Moves models between Rocket, Hugging Face and llama.cpp; what it writes, it has proved.

    python tools/convert.py to-hf out/tiny out/tiny-hf                 (transformers, vLLM, …)
    python tools/convert.py to-gguf out/tiny out/tiny.gguf --dtype=float16  (llama.cpp, Ollama, …)
    python tools/convert.py from-hf ~/Llama-2-7b-hf out/llama-2-7b    (a directory, or a hub name)

A proof is that each part of model.py, on random tokens, makes of its input what the same part of a
plain Llama makes of it with the weights that were written, read back. One part of the model is in
memory at a time. Where a proof fails nothing is left behind; what a killed process left, the next
one removes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from config import Parser, UserError, existing_path, resolve_path, run_program
from corpus.locks import locked


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; UserError where it is wrong."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python tools/convert.py",
        description=__doc__,
        formatter_class=form,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    exports = {"to-hf": ("directory", "to make"), "to-gguf": ("file", "to write")}
    for name, (output, meaning) in exports.items():
        command = commands.add_parser(name, allow_abbrev=False, help=f"a run to a {output}")
        command.add_argument("run", help="run directory or checkpoint")
        command.add_argument("output", metavar=output.upper(), help=meaning)
        command.add_argument(
            "--dtype", choices=("float32", "float16", "bfloat16"), default="float32"
        )
        command.add_argument(
            "--checkpoint", default="best", help="best, last or a checkpoint's path (best)"
        )
    commands.choices["to-hf"].add_argument(
        "--shard-gb", type=positive, default=2.0, help="largest file in GB; as much memory (2)"
    )
    command = commands.add_parser("from-hf", allow_abbrev=False, help="a directory to a run")
    command.add_argument("source", help="Hugging Face directory, or OWNER/NAME on the hub")
    command.add_argument("output", metavar="RUN", help="run directory to make")
    command.add_argument("--revision", help="on the hub: branch, tag or commit")
    return parser.parse_args(arguments)


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0")
    return value


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:  # before torch, which takes seconds
    parse(sys.argv[1:])

import contextlib
import json
import platform
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import Checkpoint, find_checkpoint, write_weights
from config import ModelConfig, build_config, dump_toml, sync_directory, tables
from inference.generation import tokenizer_of
from inference.pretrained import (
    CONTROL,
    EMBEDDING,
    HEAD,
    INDEX,
    NEEDS_HF,
    SINGLE,
    UNUSED,
    USER_DEFINED,
    Pretrained,
    SentencePiece,
    config_json,
    llama_part,
    llama_parts,
    llama_shapes,
    read_sentencepiece,
    tokenizer_json,
)
from model import Llama
from tokenizer import SPACE, Template, Tokenizer

Weights = Callable[[str], Tensor]  # a parameter by its name
PROOF_TOKENS = 512
FROM_HUB = (
    "config.json generation_config.json tokenizer_config.json added_tokens.json tokenizer.model"
    " model*.safetensors model.safetensors.index.json".split()
)
HARD_TEXTS = (
    " ",
    "  ",
    " a",
    "a ",
    "  a   b  ",
    "\n",
    "\n\n x",
    "\t",
    "a\r\nb",
    "\0",
    "a\0\x01\x7f\x1b[0m",
    "\u0085\u2028\u00a0\u3000\ufeff\ufffd\ue000\U0010ffff",
    "e\u0301 \u0301a",
    "\ufb01 \u2460",
    "\U0001f999",
    "\U0001f469\u200d\U0001f680",
    "\U0001f1eb\U0001f1f7",
    "\u4e2d\u6587\ud55c",
    "\u0627\u0644\u0639\u0631",
    "\u202eabc",
    "<s>",
    "</s><unk>",
    "<0x41>",
    "<|user|> <pad>",
    "1234567",
    "=" * 5,
    "#" * 33,
    " " * 9 + "x",
    "-" * 300,
    "ab" * 40 + "a",
    "ababa aXaa aaaa",
)


class Source(NamedTuple):
    """A run's weights, and what belongs to them."""

    checkpoint: Checkpoint
    config: ModelConfig
    vocab_size: int
    tokenizer: Tokenizer
    pieces: SentencePiece
    template: dict[str, str] | None


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing half-written is left then too
    {"to-hf": to_hf, "to-gguf": to_gguf, "from-hf": from_hf}[options.command](options)


def read_run(options: argparse.Namespace) -> Source:
    """What is to be exported; UserError if it is no Llama, by the names of its weights."""
    which, path = options.checkpoint, options.run
    if which not in ("best", "last"):
        which, path = "last", options.checkpoint
    checkpoint = find_checkpoint(existing_path(path), which)
    tokenizer = tokenizer_of(checkpoint)
    shapes, config = checkpoint.shapes("model"), checkpoint.config.model
    rows = shapes.get(EMBEDDING, [0])[0]
    plain = llama_shapes(config, rows)
    for name in sorted(shapes.keys() | plain.keys()):
        if shapes.get(name) != plain.get(name):
            raise UserError(
                f"{checkpoint.path} is no plain Llama: {name} is {shapes.get(name, 'missing')}, but"
                f" there {plain.get(name, 'unknown')}; a changed model needs an export of its own"
            )
    pieces = read_sentencepiece(tokenizer.path.read_bytes())
    template = checkpoint.manifest.get("template")
    print(f"{checkpoint.path}: step {checkpoint.step}", file=sys.stderr)
    return Source(checkpoint, config, rows, tokenizer, pieces, template)


def new_path(name: str) -> Path:
    """A path of the command line that is to be made; UserError if it can't be one."""
    try:
        path = Path(name).expanduser().absolute()
    except RuntimeError as error:  # ~ of nobody
        raise UserError(f"{name}: {error}") from None
    if not path.name:
        raise UserError(f"{name}: give the name of what is to be made")
    return path


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` if all goes well; otherwise nothing is left.

    What a process that was killed left of it is removed.

    Raises:
        UserError: something is there, another process writes it, or it can't be written.
    """
    temporary = path.parent / f"{path.name}.tmp"

    def refuse(holder: str) -> None:
        raise UserError(f"{path} is being written by {holder}; wait for it, or give another name")

    def check_free(*paths: Path) -> None:
        for there in paths:
            if there.exists() or there.is_symlink():
                raise UserError(f"{there} exists; remove it, or give another name")

    try:
        check_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / f"{temporary.name}.lock", refuse) as died:
            if not died:
                check_free(temporary)
            elif temporary.exists():
                remove(temporary)
                print(f"{temporary}: removed, left by {died}, which was killed", file=sys.stderr)
            try:
                check_free(path)  # one that was at work may have ended just now
                yield temporary
                for made in (*temporary.rglob("*"), temporary):
                    sync_directory(made)  # a file, too
                temporary.rename(path)
                sync_directory(path.parent)
            finally:
                remove(temporary)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{error.filename or path}: {reason}; nothing was written") from None


def remove(path: Path) -> None:
    """Removes a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rounded(checkpoint: Checkpoint, dtype: torch.dtype, name: str) -> Tensor:
    """A checkpoint's weight in another type; UserError where that can't hold it."""
    tensor = checkpoint.tensor("model", name).to(dtype)
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{checkpoint.path}: {name} has values that {str(dtype).removeprefix('torch.')} can't"
            " hold; export it as bfloat16 or float32"
        )
    return tensor


# --- the proof ---


@torch.no_grad()
def prove(config: ModelConfig, vocab_size: int, ours: Weights, theirs: Weights) -> None:
    """Holds model.py with one set of weights against a plain Llama with the other.

    The weights have to be equal to the bit. Then model.py runs as it is, and whatever goes into one
    of its parts goes into the plain part too: errors don't add up, and a part that computes
    something else is named. What comes out of a part has to be what goes into the next.

    Raises:
        UserError: at which part they differ.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        vocab_size, (1, min(config.max_seq_len, PROOF_TOKENS)), generator=generator
    )
    parts, streams = llama_parts(config), [tokens]

    def differs(why: str, part: str) -> UserError:
        return UserError(
            f"not proved: {why} {part}; model.py is no plain Llama there, and the tools that would"
            " load this know nothing of it"
        )

    def load(part: str, name: str) -> tuple[Tensor, Tensor]:
        name = f"{part}.{name}"
        if name == HEAD and config.tie_embeddings:
            name = EMBEDDING
        mine, other = ours(name), theirs(name)
        if not torch.equal(mine, other):
            raise UserError(f"not proved: {name} was read back with other values")
        return mine.float(), other.float()

    def checked(part: str, module: nn.Module) -> Callable[..., Tensor]:
        forward = module.forward

        def run(x: Tensor, *rest: Any, **options: Any) -> Tensor:
            position = len(streams) - 1
            if position == len(parts) or parts[position] != part or not torch.equal(x, streams[-1]):
                raise differs("the residual stream is changed before", part)
            weights = {name: load(part, name) for name, _ in module.named_parameters()}
            module.load_state_dict({n: mine for n, (mine, _) in weights.items()}, assign=True)
            y = forward(x, *rest, **options)
            plain = llama_part(part, x, lambda name: weights[name][1], config)
            added = y - x if part.startswith("model.layers.") else y
            if not (y - plain).norm() <= 1e-4 * added.norm() + 1e-6 * y.norm():
                raise differs("another result at", part)
            module.to("meta")
            streams.append(y)
            return y

        return run

    try:
        with torch.device("meta"):
            model = Llama(config, vocab_size).eval()
        for part in parts:
            module = model.get_submodule(part)
            module.forward = checked(part, module)
        logits = model(tokens)
    except UserError:
        raise
    except Exception as error:  # whatever a changed model.py may raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"not proved: model.py can't run a part at a time: {type(error).__name__}: {reason}"
        ) from None
    if len(streams) <= len(parts) or not torch.equal(logits, streams[-1]):
        raise differs("the logits are changed after", parts[-1])


# --- Hugging Face ---


def to_hf(options: argparse.Namespace) -> None:
    """Exports a run to a directory for transformers."""
    run, dtype = read_run(options), getattr(torch, options.dtype)
    config, tokenizer = run.config, run.tokenizer
    ours = partial(rounded, run.checkpoint, dtype)
    stops = Template(run.template, tokenizer).stops()[0] if run.template else [tokenizer.eos_id]
    silent = [*np.flatnonzero(tokenizer.byte_lengths() == 0).tolist()]
    silent += range(tokenizer.vocab_size, run.vocab_size)  # rows without a piece
    files = {
        "config.json": config_json(config, run.vocab_size, tokenizer, options.dtype),
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": stops if len(stops) > 1 else stops[0],
            # as sample.py: what stands for no text is not drawn
            "suppress_tokens": sorted({*silent} - {*stops}),
        },
        "tokenizer.json": tokenizer_json(run.pieces, piece(tokenizer, tokenizer.bos_id)),
        "tokenizer_config.json": tokenizer_config(run),
    }
    output = new_path(options.output)
    with written(output) as directory:
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=1))
        shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
        write_shards(directory, run, ours, dtype, int(options.shard_gb * 1e9))
        exported = Pretrained(directory)
        if exported.config != config:
            raise UserError(f"config.json would read back as {exported.config}, not {config}")
        check_tokenizer(directory, run)
        prove(config, run.vocab_size, ours, exported.tensor)
    print(f"{output}: {options.dtype}, proved to be the Llama that model.py computes")
    advice = "use split_special_tokens=True for what people write, README's chat_ids for chats"
    warn_of_control_pieces(run, "transformers", advice)


def warn_of_control_pieces(run: Source, tool: str, advice: str) -> None:
    """Says that another tool finds control pieces in texts, and what to do about it."""
    names = [name for name, _, kind in run.pieces.pieces if kind == CONTROL]
    shown = f"{', '.join(names[:9])}{' …' * (len(names) > 9)}"
    print(
        f"warning: {tool} makes control ids of {shown} in a text, so that users can speak in other"
        f" roles; in Rocket they stay text: {advice}"
    )


def write_shards(
    directory: Path, run: Source, ours: Weights, dtype: torch.dtype, most: int
) -> None:
    """Writes the weights as safetensors, one file's in memory at a time."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(NEEDS_HF) from None
    shards, room = [], 0
    sizes = {n: int(np.prod(s)) * dtype.itemsize for n, s in run.checkpoint.shapes("model").items()}
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else SINGLE
        places |= dict.fromkeys(names, file)
        try:
            tensors = {name: ours(name).contiguous() for name in names}
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{directory / file}: {reason}; nothing was written") from None
    if shards[1:]:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=1))


def piece(tokenizer: Tokenizer, i: int) -> str:
    return tokenizer.processor.id_to_piece(i)


def tokenizer_config(run: Source) -> dict[str, Any]:
    """tokenizer_config.json: what the special pieces are for, how conversations are written."""
    tokenizer = run.tokenizer
    control = {name for name, _, kind in run.pieces.pieces if kind == CONTROL}
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": piece(tokenizer, tokenizer.bos_id),
        "eos_token": piece(tokenizer, tokenizer.eos_id),
        "unk_token": piece(tokenizer, tokenizer.processor.unk_id()),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": run.config.max_seq_len,
    }
    if "<pad>" in control:
        values["pad_token"] = "<pad>"
    if run.template:
        values["chat_template"] = chat_template(run.template)
        values["rocket_template"] = run.template  # for from-hf
    return values


def chat_template(template: dict[str, str]) -> str:
    """The template in Jinja, as Template.render and Template.prompt write conversations."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    text, word = "{{ bos_token }}{% for message in messages %}", "if"
    for role, form in template.items():
        before, after = map(quoted, form.split("{content}"))
        text += f"{{% {word} message['role'] == {quoted(role)} %}}"
        text += f"{{{{ {before} + message['content'] + {after} }}}}"
        word = "elif"
    text += "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
    answer = quoted(template["assistant"].split("{content}")[0])
    text += f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% else %}}"
    return text + "{{ eos_token }}{% endif %}"


def check_tokenizer(directory: Path, run: Source) -> None:
    """Holds the tokenizer that was written against SentencePiece; says where they may differ.

    Raises:
        UserError: they differ where they must not.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError(NEEDS_HF) from None
    theirs, ours = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), run.tokenizer
    theirs.encode_special_tokens = True
    draw = random.Random(0)
    texts = [name.replace(SPACE, " ") for name, *_ in run.pieces.pieces]
    mixed = ["".join(draw.choices(texts, k=20)) for _ in range(200)]
    differing = []
    for text in (*HARD_TEXTS, *mixed):
        ids = ours.encode(text).tolist()
        same = theirs.encode(text, add_special_tokens=False).ids == ids
        if not (same and (theirs.decode(ids) == ours.decode(ids) or not run.pieces.byte_fallback)):
            differing.append(text)
    names = {kind: [] for _, _, kind in run.pieces.pieces}
    for name, _, kind in run.pieces.pieces:
        names[kind].append(name)
    inner = (own in name for name in names[CONTROL] for own in names.get(USER_DEFINED, ()))
    doubts = {
        "which of several equally likely segmentations is taken": run.pieces.kind == 1,
        "normalization of letters with several marks": bool(run.pieces.charsmap),
        "spaces around U+2581": run.pieces.remove_spaces,
        "names of control pieces in which user-defined pieces stand": any(inner),
    }
    doubts = [doubt for doubt, there in doubts.items() if there]
    if differing and not doubts:
        raise UserError(f"tokenizer.json gives other ids than tokenizer.model for {differing[0]!r}")
    if doubts:
        print(
            f"tokenizer.json may give other ids than tokenizer.model, by {' and '.join(doubts)}:"
            f" of {len(HARD_TEXTS) + len(mixed)} hard texts it does for {len(differing)}"
        )
    if run.template:
        template = Template(run.template, ours)
        sides = [*template.before.values(), *template.after.values()]
        edges = [ids[at] for ids in sides for at in (0, -1) if len(ids)]
        if not all(map(len, sides)) or not all(ours.processor.is_control(int(i)) for i in edges):
            print(
                "data.template puts plain text, or nothing, beside contents: transformers encodes"
                " it together with them, Rocket by itself, so that ids of chats may differ there"
            )


def from_hf(options: argparse.Namespace) -> None:
    """Imports a Hugging Face directory as a run, to sample from and to start from."""
    output = new_path(options.output)
    model = Pretrained(fetched(options.source, options.revision))
    tokenizer = Tokenizer(model.tokenizer_path)
    with written(output) as directory:
        values = {
            "tokenizer": {"vocab_size": tokenizer.vocab_size},
            "model": asdict(model.config),
            "data": {"seq_len": min(1024, model.config.max_seq_len)},
            "train": {"out_dir": str(output)},
        }
        values["tokenizer"]["path"] = str(output / "tokenizer.model")
        if model.template:
            values["data"]["template"] = model.template
        config = build_config(values)
        record = {
            "step": 0,
            "state": {"step": 0, "val_loss": None},
            "config": tables(config),
            "dataset": None,
            "template": model.template,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": model.vocab_size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "commit": None,
        }
        checkpoint = directory / "checkpoints" / "step_00000000"
        write_weights(checkpoint, record, ((n, finite(model, n)) for n in model.shapes()))
        (directory / "config.toml").write_text(dump_toml(config))
        shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
        ours = Checkpoint(checkpoint)
        prove(
            model.config,
            model.vocab_size,
            lambda name: ours.tensor("model", name),
            lambda name: model.tensor(name).float(),
        )
    spare = model.vocab_size - tokenizer.vocab_size
    print(f"{output}: proved to be the Llama of {model.path}")
    if spare:
        print(f"{spare} rows have no piece in tokenizer.model; they are never sampled")


def finite(model: Pretrained, name: str) -> Tensor:
    """A parameter as float32; UserError if not all of it is numbers."""
    tensor = model.tensor(name).float()
    if not torch.isfinite(tensor).all():
        raise UserError(f"{model.path}: {name} holds values that are not finite")
    return tensor


def fetched(source: str, revision: str | None) -> Path:
    """The directory that is meant; a repository of the hub is downloaded to data/raw.

    Raises:
        UserError: there is no such directory, or the hub does not give it.
    """
    if existing_path(source).is_dir():
        return existing_path(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII):
        raise UserError(f"{source}: no such directory, and no OWNER/NAME on the hub")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UserError("downloads need the package huggingface_hub: " + NEEDS_HF) from None
    directory = resolve_path("data/raw") / f"{source}{'@' * bool(revision)}{revision or ''}"
    try:
        snapshot_download(source, revision=revision, local_dir=directory, allow_patterns=FROM_HUB)
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: not downloaded: {reason}") from None
    return directory


# --- llama.cpp ---


def to_gguf(options: argparse.Namespace) -> None:
    """Exports a run to a GGUF file for llama.cpp."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "to-gguf needs the package gguf: pip install 'rocket-llama[gguf]'"
        ) from None
    run, dtype = read_run(options), getattr(torch, options.dtype)
    ours = partial(rounded_for_gguf, run.checkpoint, dtype)
    names = gguf_names(run.config)
    output = new_path(options.output)
    with written(output) as path:
        writer = gguf.GGUFWriter(path, "llama")
        describe(writer, run, dtype)
        kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        for name, shape in run.checkpoint.shapes("model").items():
            kind = dtype if len(shape) > 1 else torch.float32
            size, quantization = int(np.prod(shape)), gguf.GGMLQuantizationType[kinds[kind]]
            writer.add_tensor_info(
                names[name], shape, np.dtype("f4"), size * kind.itemsize, quantization
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in run.checkpoint.shapes("model"):
            tensor = interleaved(name, ours(name), run.config).contiguous()
            writer.write_tensor_data(tensor.view(torch.uint8).numpy())
        writer.close()
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

        def theirs(name: str) -> Tensor:
            tensor = stored[names[name]]
            kind = next(kind for kind, word in kinds.items() if word == tensor.tensor_type.name)
            offset, size = int(tensor.data_offset), int(tensor.n_bytes)
            data = np.memmap(path, "u1", "c", offset, size)  # its own: pages go with it
            shape = [int(n) for n in reversed(tensor.shape)]
            return halved(name, torch.from_numpy(data).view(kind).view(shape), run.config)

        prove(run.config, run.vocab_size, ours, theirs)
    print(f"{output}: {options.dtype}, proved to be the Llama that model.py computes")
    warn_of_control_pieces(
        run, "llama.cpp's server", "send it ids, or take these names out of what people write"
    )


def rounded_for_gguf(checkpoint: Checkpoint, dtype: torch.dtype, name: str) -> Tensor:
    """llama.cpp wants the norms in float32."""
    norm = len(checkpoint.shapes("model")[name]) == 1
    return rounded(checkpoint, torch.float32 if norm else dtype, name)


def describe(writer: Any, run: Source, dtype: torch.dtype) -> None:
    """Everything but the tensors: sizes, the tokenizer, the chat template.

    Raises:
        UserError: llama.cpp's SentencePiece tokenizer can't do what this one does.
    """
    config, tokenizer, pieces = run.config, run.tokenizer, run.pieces
    for reason, holds in {
        "is not BPE": pieces.kind != 2,
        "has no byte fallback": not pieces.byte_fallback,
        "normalizes text": bool(pieces.charsmap) or pieces.remove_spaces,
        "writes spaces behind words": pieces.space_as_suffix,
        "leaves spaces as they are": not pieces.escape_spaces,
    }.items():
        if holds:
            raise UserError(f"{tokenizer.path} {reason}, which llama.cpp can't do for a Llama")
    head_dim = config.dim // config.n_heads
    writer.add_name(run.checkpoint.path.parent.parent.name)
    writer.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[dtype])
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(run.vocab_size)

    spare = run.vocab_size - tokenizer.vocab_size
    padded = [*pieces.pieces, *((f"[PAD{i}]", -1000.0, UNUSED) for i in range(spare))]
    tokens, scores, kinds = zip(*padded, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.processor.unk_id())
    if "<pad>" in tokens:
        writer.add_pad_token_id(tokens.index("<pad>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(pieces.dummy_prefix)
    if run.template:
        writer.add_chat_template(chat_template(run.template))


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Our name of each parameter to llama.cpp's."""
    of_layer = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {
        f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}.weight"
        for layer in range(config.n_layers)
        for ours, theirs in of_layer.items()
    }
    names |= {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    return names | {HEAD: "output.weight"}


def interleaved(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """Rows of queries and keys as llama.cpp turns them: pairs (2i, 2i + 1), not (i, i + E/2)."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    heads = weight.unflatten(0, (-1, 2, config.dim // config.n_heads // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def halved(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """Undoes `interleaved`."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    heads = weight.unflatten(0, (-1, config.dim // config.n_heads // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)


if __name__ == "__main__":
    run_program(main)
