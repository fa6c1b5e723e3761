"""Converts models between Rocket, Hugging Face and llama.cpp, and proves each result.

    python tools/convert.py to-hf out/tiny out/tiny-hf                 (transformers, vLLM, …)
    python tools/convert.py to-gguf out/tiny out/tiny.gguf --dtype=float16  (llama.cpp, Ollama, …)
    python tools/convert.py from-hf ~/Llama-2-7b-hf out/llama-2-7b    (a directory, or a hub name)

The written weights are read back. On random tokens, each part of model.py must then give the same
result as that part of a plain Llama with these weights. One part of the model is in memory at a
time. If the proof fails, nothing is left behind; the next process removes what a killed one left.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from config import Parser, UserError, existing_path, installed, resolve_path, run_program
from corpus.locks import locked


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; UserError where it is wrong."""
    parser = Parser(prog="python tools/convert.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, output in {"to-hf": "directory", "to-gguf": "file"}.items():
        command = commands.add_parser(name, help=f"a run to a {output}")
        command.add_argument("run", help="run directory or checkpoint")
        command.add_argument("output", metavar=output.upper(), help="to write")
        dtypes = ("float32", "float16", "bfloat16")
        command.add_argument("--dtype", choices=dtypes, default="float32")
        which = "best, last or a checkpoint's path (best)"
        command.add_argument("--checkpoint", default="best", help=which)
    size = "largest file in GB; as much memory is needed (2)"
    to_hf = commands.choices["to-hf"]
    to_hf.add_argument("--shard-gb", type=positive_number, default=2.0, help=size)
    command = commands.add_parser("from-hf", help="a directory to a run")
    command.add_argument("source", help="Hugging Face directory, or OWNER/NAME on the hub")
    command.add_argument("output", metavar="RUN", help="run directory to make")
    command.add_argument("--revision", help="on the hub: branch, tag or commit")
    return parser.parse_args(arguments)


def positive_number(text: str) -> float:
    """An argparse type: a number above 0; argparse names this function in its error."""
    if not 0 < float(text) < 1e6:
        raise ValueError
    return float(text)


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:  # before torch, which takes seconds
    parse(sys.argv[1:])

import contextlib
import dataclasses
import json
import math
import platform
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import Checkpoint, find_checkpoint, write_weights
from config import ModelConfig, build_config, dump_toml, sync_directory, tables
from inference import pretrained
from inference.generation import tokenizer_of
from inference.pretrained import EMBEDDING, HEAD, NEEDS_HF, SINGLE, Pretrained, SentencePiece
from model import Llama
from tokenizer import SPACE, Template, Tokenizer

Weights = Callable[[str], Tensor]  # a parameter by its name
PROOF_TOKENS = 512
# GGUF's name of a tensor's type, and its number for a file that consists of them
GGUF_TYPES = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}
FROM_HUB = (
    "config.json generation_config.json tokenizer_config.json added_tokens.json tokenizer.model"
    " model*.safetensors model.safetensors.index.json".split()
)
# Texts that tokenizers easily get wrong: blanks, control characters, marks, signs of several code
# points, other scripts, names of pieces, repetitions.
HARD_TEXTS = (
    *(
        " ,  , a,a ,  a   b  ,\n,\n\n x,\t,a\r\nb,\0,a\0\x01\x7f\x1b[0m"
        ",\u0085\u2028\u00a0\u3000\ufeff\ufffd\ue000\U0010ffff,e\u0301 \u0301a,\ufb01 \u2460"
        ",\U0001f999,\U0001f469\u200d\U0001f680,\U0001f1eb\U0001f1f7,\u4e2d\u6587\ud55c"
        ",\u0627\u0644\u0639\u0631,\u202eabc,<s>,</s><unk>,<0x41>,<|user|> <pad>,1234567"
    ).split(","),
    *("=" * 5, "#" * 33, " " * 9 + "x", "-" * 300, "ab" * 40 + "a", "ababa aXaa aaaa"),
)


class Run(NamedTuple):
    """What is exported: a run's weights, and what belongs to them."""

    checkpoint: Checkpoint
    config: ModelConfig
    shapes: dict[str, list[int]]
    dtypes: dict[str, torch.dtype]  # the type that each weight is written in
    vocab_size: int  # rows of the embedding
    tokenizer: Tokenizer
    spm: SentencePiece
    template: dict[str, str] | None

    def weight(self, name: str) -> Tensor:
        """A weight in the type that it is written in; UserError where that can't hold it."""
        tensor = self.checkpoint.tensor("model", name).to(self.dtypes[name])
        if not torch.isfinite(tensor).all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{self.checkpoint.path}: {name} has values that {dtype} can't hold; export it as"
                " bfloat16 or float32"
            )
        return tensor


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half-written is left
    (from_hf if options.command == "from-hf" else export)(options)


def export(options: argparse.Namespace) -> None:
    """Exports a run to a directory for transformers or to a GGUF file for llama.cpp."""
    if options.command == "to-hf":
        write, tool = write_hf, "transformers"
        advice = "split_special_tokens=True for users' text, chat_ids (docs/tools.md) for chats"
        if not (installed("safetensors") and installed("tokenizers")):
            raise UserError(NEEDS_HF)
    else:
        write, tool = write_gguf, "llama.cpp's server"
        advice = "send it ids, or take these names out of what people write"
        if not installed("gguf"):
            raise UserError("the package gguf is missing; in the repository: pip install '.[gguf]'")
    run, output = read_run(options), new_path(options.output)
    with written(output) as path:
        prove(run.config, run.vocab_size, run.weight, write(path, run, options))
    print(f"{output}: {options.dtype}, proved to be the Llama that model.py computes")
    names = run.spm.names(pretrained.CONTROL)
    print(
        f"warning: {tool} makes control ids of {', '.join(names[:9])}{' …' * (len(names) > 9)} in a"
        " text, so that users can speak in other roles; in Rocket they stay text: " + advice
    )


def read_run(options: argparse.Namespace) -> Run:
    """What is to be exported; UserError if the names or shapes of its weights are not a Llama's."""
    which, path = options.checkpoint, options.run
    if which not in ("best", "last"):
        which, path = "last", options.checkpoint
    checkpoint = find_checkpoint(existing_path(path), which)
    tokenizer = tokenizer_of(checkpoint)
    shapes, config = checkpoint.shapes("model"), checkpoint.config.model
    rows = shapes.get(EMBEDDING, [0])[0]
    pretrained.check_shapes(shapes, pretrained.llama_shapes(config, rows), checkpoint.path)
    dtypes = dict.fromkeys(shapes, getattr(torch, options.dtype))
    if options.command == "to-gguf":  # llama.cpp wants the norms in float32
        dtypes |= {name: torch.float32 for name, shape in shapes.items() if len(shape) == 1}
    spm = SentencePiece(tokenizer.path.read_bytes())
    template = checkpoint.manifest.get("template")
    print(f"{checkpoint.path}: step {checkpoint.step}", file=sys.stderr)
    return Run(checkpoint, config, shapes, dtypes, rows, tokenizer, spm, template)


def new_path(name: str) -> Path:
    """The path of an output that the command line names; UserError if there can be none."""
    try:
        path = Path(name).expanduser().absolute()
    except RuntimeError as error:  # ~ of an unknown user
        raise UserError(f"{name}: {error}") from None
    if not path.name:
        raise UserError(f"{name}: give the name of what is to be made")
    return path


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path to write to: renamed to `path` if all goes well, else removed.

    What a killed process left there is removed, too.

    Raises:
        UserError: something is there, another process writes it, or it can't be written.
    """
    temporary = path.parent / f"{path.name}.tmp"

    def refuse(holder: str) -> None:
        raise UserError(f"{path} is being written by {holder}; wait for it, or give another name")

    try:
        check_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / f"{temporary.name}.lock", refuse) as died:
            if died and temporary.exists():
                remove(temporary)
                print(f"{temporary}: removed, left by {died}, which was killed", file=sys.stderr)
            check_free(temporary)
            check_free(path)  # a process that was at work may have ended just now
            try:
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


def check_free(path: Path) -> None:
    """UserError if something is at the path."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists; remove it, or give another name")


def remove(path: Path) -> None:
    """Removes a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- the proof ---


@torch.no_grad()
def prove(config: ModelConfig, vocab_size: int, ours: Weights, theirs: Weights) -> None:
    """Compares model.py with one set of weights and a plain Llama with the other.

    The weights must be equal to the bit. Then model.py runs as it is, and each of its parts is
    compared with the plain part on the same input: errors don't add up, and a part that computes
    something else is named. The output of a part must be the input of the next.

    Raises:
        UserError: they differ; it names the part.
    """
    generator = torch.Generator().manual_seed(0)
    size = (1, min(config.max_seq_len, PROOF_TOKENS))
    tokens = torch.randint(vocab_size, size, generator=generator)
    parts, streams = pretrained.llama_parts(config), [tokens]
    expected = iter(parts)

    def differs(why: str, part: str) -> UserError:
        return UserError(
            f"not proved: {why} {part}; model.py differs from a plain Llama there, and the tools"
            " that load an export compute a plain Llama"
        )

    def run(part: str, module: nn.Module, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if part != next(expected, None) or not torch.equal(x, streams[-1]):
            raise differs("the residual stream is changed before", part)
        weights = {}
        for name, _ in module.named_parameters():
            full = f"{part}.{name}"
            full = EMBEDDING if full == HEAD and config.tie_embeddings else full
            weights[name] = theirs(full).float()
            if not torch.equal(ours(full).float(), weights[name]):
                raise UserError(f"not proved: {full} was read back with other values")
        # First, and with our own copy of x: model.py may change weights and tensors in place.
        plain = pretrained.llama_part(part, streams[-1], weights, config)
        module.load_state_dict(weights, assign=True)
        y = type(module).forward(module, x, *rest, **options)
        added = y - streams[-1] if part.startswith("model.layers.") else y
        if not (y - plain).norm() <= 1e-4 * added.norm() + 1e-6 * y.norm():
            raise differs("another result at", part)
        module.to("meta")
        streams.append(y.clone())
        return y

    try:
        with torch.device("meta"):
            model = Llama(config, vocab_size).eval()
        for part in parts:
            module = model.get_submodule(part)
            module.forward = partial(run, part, module)
        logits = model(tokens.clone())
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


def write_hf(directory: Path, run: Run, options: argparse.Namespace) -> Weights:
    """Writes a directory for transformers; returns its weights, read back."""
    config, tokenizer = run.config, run.tokenizer
    stops = Template(run.template, tokenizer).stops()[0] if run.template else [tokenizer.eos_id]
    silent = {*np.flatnonzero(tokenizer.byte_lengths() == 0).tolist()}
    silent |= {*range(tokenizer.vocab_size, run.vocab_size)}  # rows without a piece
    files = {
        "config.json": {
            **pretrained.plain_config(config, run.vocab_size),
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "dtype": options.dtype,
            "torch_dtype": options.dtype,
            "use_cache": True,
        },
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": stops if len(stops) > 1 else stops[0],
            # as in sample.py: what stands for no text is never sampled
            "suppress_tokens": sorted(silent - {*stops}),
        },
        "tokenizer.json": pretrained.tokenizer_json(run.spm, tokenizer.bos_id),
        "tokenizer_config.json": tokenizer_config(run),
    }
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=1))
    shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
    write_shards(directory, run, int(options.shard_gb * 1e9))
    exported = Pretrained(directory)
    plain = dataclasses.replace(config, base_dim=0, base_layers=0)  # only training knows a base
    if exported.config != plain:
        raise UserError(f"config.json would read back as {exported.config}, not {plain}")
    check_tokenizer(directory, run)
    return exported.tensor


def write_shards(directory: Path, run: Run, max_bytes: int) -> None:
    """Writes the weights as safetensors files of max_bytes at most, each in memory by itself."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards, room = [], 0
    sizes = {n: math.prod(shape) * run.dtypes[n].itemsize for n, shape in run.shapes.items()}
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else SINGLE
        places |= dict.fromkeys(names, file)
        try:
            tensors = {name: run.weight(name).contiguous() for name in names}
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{directory / file}: {reason}; nothing was written") from None
    if shards[1:]:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (directory / pretrained.INDEX).write_text(json.dumps(index, indent=1))


def tokenizer_config(run: Run) -> dict[str, Any]:
    """tokenizer_config.json: what the special pieces are for, how conversations are written."""
    tokenizer, pieces = run.tokenizer, run.tokenizer.pieces()
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[tokenizer.bos_id],
        "eos_token": pieces[tokenizer.eos_id],
        "unk_token": pieces[tokenizer.processor.unk_id()],
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": run.config.max_seq_len,
    }
    if "<pad>" in run.spm.names(pretrained.CONTROL):
        values["pad_token"] = "<pad>"
    if run.template:
        values["chat_template"] = chat_template(run.template)
        values["rocket_template"] = run.template  # for from-hf
    return values


def chat_template(template: dict[str, str]) -> str:
    """The template in Jinja, which writes conversations as Template.render and prompt do."""
    quoted = partial(json.dumps, ensure_ascii=False)
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


def check_tokenizer(directory: Path, run: Run) -> None:
    """Compares the written tokenizer with SentencePiece: a line where they may differ, UserError
    where they differ but must not."""
    import tokenizers

    theirs, ours = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), run.tokenizer
    theirs.encode_special_tokens = True
    draw = random.Random(0)
    words = [name.replace(SPACE, " ") for name, *_ in run.spm.pieces]
    texts = [*HARD_TEXTS, *("".join(draw.choices(words, k=20)) for _ in range(200))]
    differing = []
    for text in texts:
        ids = ours.encode(text).tolist()
        same = theirs.encode(text, add_special_tokens=False).ids == ids
        if not (same and (theirs.decode(ids) == ours.decode(ids) or not run.spm.byte_fallback)):
            differing.append(text)
    control, own = run.spm.names(pretrained.CONTROL), run.spm.names(pretrained.USER_DEFINED)
    doubts = {
        "the choice among equally likely segmentations": run.spm.is_unigram,
        "normalization of letters with several marks": bool(run.spm.charsmap),
        "spaces around U+2581": run.spm.remove_spaces,
        "control pieces that contain user-defined ones": any(o in c for c in control for o in own),
    }
    if doubts := [doubt for doubt, there in doubts.items() if there]:
        print(
            f"tokenizer.json may give other ids than tokenizer.model ({', '.join(doubts)}):"
            f" {len(differing)} of {len(texts)} hard texts have other ids"
        )
    elif differing:
        raise UserError(f"tokenizer.json gives other ids than tokenizer.model for {differing[0]!r}")
    if run.template:
        template = Template(run.template, ours)
        sides = [*template.before.values(), *template.after.values()]
        if not all(len(ids) and {ids[0], ids[-1]} <= {*template.control.values()} for ids in sides):
            print(
                "data.template puts plain text, or nothing, beside contents: transformers encodes"
                " the two together, Rocket separately, so that ids of chats may differ there"
            )


def from_hf(options: argparse.Namespace) -> None:
    """Imports a Hugging Face directory as a run, to sample from and to start from."""
    output = new_path(options.output)
    model = Pretrained(fetched(options.source, options.revision))
    tokenizer = Tokenizer(model.tokenizer_path)
    data = {"template": model.template} if model.template else {}
    values = {
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "path": str(output / "tokenizer.model"),
        },
        "model": asdict(model.config),
        "data": {"seq_len": min(1024, model.config.max_seq_len), **data},
        "train": {"out_dir": str(output)},
    }
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

    def theirs(name: str) -> Tensor:
        tensor = model.tensor(name).float()
        if not torch.isfinite(tensor).all():
            raise UserError(f"{model.path}: {name} holds values that are not finite")
        return tensor

    with written(output) as directory:
        path = directory / "checkpoints" / "step_00000000"
        write_weights(path, record, ((name, theirs(name)) for name in model.shapes()))
        (directory / "config.toml").write_text(dump_toml(config))
        shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
        ours = partial(Checkpoint(path).tensor, "model")
        prove(model.config, model.vocab_size, ours, theirs)
    print(f"{output}: proved to be the Llama of {model.path}")
    if spare := model.vocab_size - tokenizer.vocab_size:
        print(f"{spare} rows have no piece in tokenizer.model; they are never sampled")


def fetched(source: str, revision: str | None) -> Path:
    """The directory `source`, or a repository of the hub, which is downloaded to data/raw;
    UserError if there is neither."""
    if existing_path(source).is_dir():
        return existing_path(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII):
        raise UserError(f"{source}: no such directory, and no OWNER/NAME on the hub")
    if not installed("huggingface_hub"):
        raise UserError(f"huggingface_hub is missing: {NEEDS_HF}")
    from huggingface_hub import errors, snapshot_download

    directory = resolve_path("data/raw") / (f"{source}@{revision}" if revision else source)
    try:
        snapshot_download(source, revision=revision, local_dir=directory, allow_patterns=FROM_HUB)
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: not downloaded: {reason}") from None
    return directory


# --- llama.cpp ---


def write_gguf(path: Path, run: Run, options: argparse.Namespace) -> Weights:
    """Writes a GGUF file for llama.cpp; returns its weights, read back."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, run.config.n_layers)
    names = {name: names.get_name(name, [".weight"]) for name in run.shapes}
    kinds = {dtype: gguf.GGMLQuantizationType[kind] for dtype, (kind, _) in GGUF_TYPES.items()}
    dtypes = {kind: dtype for dtype, kind in kinds.items()}
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, run)
    for name, shape in run.shapes.items():
        dtype = run.dtypes[name]
        size = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(names[name], shape, np.dtype("f4"), size, kinds[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in run.shapes:
        tensor = interleaved(name, run.weight(name), run.config).contiguous()
        writer.write_tensor_data(tensor.view(torch.uint8).numpy())
    writer.close()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def read(name: str) -> Tensor:
        tensor = stored[names[name]]
        # The file is mapped for each tensor, so that its pages are freed with it.
        data = np.memmap(path, "u1", "c", int(tensor.data_offset), int(tensor.n_bytes))
        weight = torch.from_numpy(data).view(dtypes[tensor.tensor_type])
        weight = weight.view(tensor.shape[::-1].tolist())
        return interleaved(name, weight, run.config, undo=True)

    return read


def describe(writer: Any, run: Run) -> None:
    """Writes everything but the tensors; UserError for a tokenizer that llama.cpp lacks."""
    config, tokenizer, spm = run.config, run.tokenizer, run.spm
    obstacles = {
        "is not BPE": not spm.is_bpe,
        "has no byte fallback": not spm.byte_fallback,
        "normalizes text": bool(spm.charsmap) or spm.remove_spaces,
    }
    spm.refuse(str(tokenizer.path), "llama.cpp can't do for a Llama", obstacles)
    writer.add_name(run.checkpoint.path.parent.parent.name)
    writer.add_file_type(GGUF_TYPES[run.dtypes[EMBEDDING]][1])
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.dim // config.n_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(run.vocab_size)

    spare = run.vocab_size - tokenizer.vocab_size
    padded = [*spm.pieces, *((f"[PAD{i}]", -1000.0, pretrained.UNUSED) for i in range(spare))]
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
    writer.add_add_space_prefix(spm.dummy_prefix)
    if run.template:
        writer.add_chat_template(chat_template(run.template))


def interleaved(name: str, weight: Tensor, config: ModelConfig, undo: bool = False) -> Tensor:
    """Rows of queries and keys in llama.cpp's order of pairs: (2i, 2i + 1), not (i, i + E/2)."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    half = config.dim // config.n_heads // 2
    pairs = (half, 2) if undo else (2, half)
    return weight.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


if __name__ == "__main__":
    run_program(main)
