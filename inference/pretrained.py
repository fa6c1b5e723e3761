"""A Llama as a Hugging Face directory: config.json, safetensors shards, the tokenizer.

Such a directory may come from anyone, so nothing in it is executed or trusted: what config.json
says must be true of a plain Llama or is refused by name, and the tensors must be those of a Llama,
with their shapes. The arithmetic of a plain Llama is written out at the end, independently of
model.py, so that the two can be compared.
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import ConfigError, ModelConfig, UserError, build_config, installed
from tokenizer import SPACE, Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDS_HF = "Hugging Face models need more packages; in the repository: pip install '.[hf]'"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_JSON_BYTES = 100_000_000
DTYPES = ("F32", "F16", "BF16")
# Numbers of config.json: our key, their type, and transformers' default where one may be missing.
NUMBERS = {
    "hidden_size": ("dim", int, None),
    "num_hidden_layers": ("n_layers", int, None),
    "num_attention_heads": ("n_heads", int, None),
    "num_key_value_heads": ("n_kv_heads", int, 0),
    "intermediate_size": ("ffn_dim", int, None),
    "max_position_embeddings": ("max_seq_len", int, 2048),
    "rms_norm_eps": ("norm_eps", float, 1e-6),
    "initializer_range": ("init_std", float, 0.02),
}
# Keys that don't change what the model computes, or that are compared with tokenizer.model.
HARMLESS = set(
    "_name_or_path transformers_version use_cache bos_token_id eos_token_id pad_token_id"
    " unk_token_id sep_token_id dtype torch_dtype id2label label2id return_dict"
    " return_dict_in_generate chunk_size_feed_forward num_labels max_sequence_length"
    " model_max_length max_length min_length temperature top_k top_p do_sample tokenizer_class"
    " _attn_implementation attn_implementation"
    " unsloth_version unsloth_fixed repetition_penalty length_penalty num_beams num_beam_groups"
    " num_return_sequences no_repeat_ngram_size diversity_penalty typical_p output_attentions"
    " output_hidden_states problem_type task_specific_params".split()
)


class Pretrained:
    """A Llama in a Hugging Face directory: config.json and safetensors shards, mapped on demand.

    Attributes:
        config: the model in Rocket's terms.
        vocab_size: rows of the embedding; the tokenizer may have fewer pieces.
        tokenizer_path: its tokenizer.model.
        template: how conversations are written, if convert.py made the directory; else None.

    Raises:
        UserError: a file is missing or damaged, or the model is not a plain Llama.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path / "config.json")
        self.config, self.vocab_size = read_config(values, path / "config.json")
        self.tokenizer_path = path / "tokenizer.model"
        if not self.tokenizer_path.is_file():
            raise UserError(f"{path}: no tokenizer.model; Rocket reads SentencePiece models alone")
        self._check_tokenizer(values, Tokenizer(self.tokenizer_path))
        self.template = self._read_template()
        self._stored = read_shards(path)
        self._check_tensors()

    def shapes(self) -> dict[str, list[int]]:
        """Name to shape of the parameters; tied embeddings once."""
        return llama_shapes(self.config, self.vocab_size)

    def tensor(self, name: str) -> Tensor:
        """A parameter in the type that it is stored in, mapped from its file, copy-on-write."""
        from safetensors import safe_open

        # The file is opened for each tensor, so that its pages are freed with it.
        with safe_open(self._stored[name].path, "pt") as file:
            return file.get_tensor(name)

    def _check_tensors(self) -> None:
        """UserError where the tensors are not those of the Llama in config.json."""
        c, found = self.config, self._stored
        if 2 + 9 * c.n_layers > len(found):
            raise UserError(
                f"{self.path}: {len(found)} tensors are too few for {c.n_layers} layers; a shard is"
                " missing, or num_hidden_layers of config.json is wrong"
            )
        buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(c.n_layers)}
        buffers &= found.keys()  # old exports hold them
        wanted = self.shapes() | {name: [c.dim // c.n_heads // 2] for name in buffers}
        if copied_head := c.tie_embeddings and HEAD in found:
            wanted[HEAD] = wanted[EMBEDDING]
        check_shapes({name: shape for name, (_, shape, _) in found.items()}, wanted, self.path)
        for name, (_, _, dtype) in found.items():
            if dtype not in DTYPES:
                raise UserError(
                    f"{self.path}: {name} is of type {dtype}; Rocket reads {', '.join(DTYPES)}"
                )
        for name in buffers:
            if not torch.allclose(self.tensor(name).float(), inverse_frequencies(c), rtol=1e-2):
                raise UserError(
                    f"{self.path}: {name} is not what rope_theta = {c.rope_theta} gives"
                )
        if copied_head and not torch.equal(self.tensor(HEAD), self.tensor(EMBEDDING)):
            raise UserError(
                f"{self.path}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING};"
                " set it to false if both are used"
            )

    def _check_tokenizer(self, values: dict[str, Any], tokenizer: Tokenizer) -> None:
        """UserError if the directory names tokens that tokenizer.model does not have.

        Rows of the embedding beyond its pieces are spare, unless a token is named for one.
        """
        if tokenizer.vocab_size > self.vocab_size:
            raise UserError(
                f"{tokenizer.path} has {tokenizer.vocab_size} pieces, but the model has rows for"
                f" {self.vocab_size}; it is the tokenizer of another model"
            )
        names = {}
        for key, own in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
            given = values[key] if isinstance(values.get(key), list) else [values.get(key)]
            ids = [i for i in given if type(i) is int]
            names |= dict.fromkeys(ids, key)
            if ids and own not in ids:
                raise UserError(
                    f"{self.path}/config.json: {key} is {values[key]}, but of tokenizer.model it is"
                    f" {own}; they are of different models"
                )
        added = self._optional("added_tokens.json").values()
        added = [i for i in added if type(i) is int]
        decoder = self._optional("tokenizer_config.json").get("added_tokens_decoder")
        if isinstance(decoder, dict):
            added += [int(i) for i in decoder if i.isdecimal() and len(i) < 10]
        for i, name in (names | dict.fromkeys(added, "an added token")).items():
            if tokenizer.vocab_size <= i < self.vocab_size:
                raise UserError(
                    f"{self.path}: {name} is id {i}, but tokenizer.model has only"
                    f" {tokenizer.vocab_size} pieces; add the missing ones to it, in order, with"
                    " train_tokenizer.py --add-pieces"
                )

    def _optional(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the directory; empty if there is no such file."""
        path = self.path / name
        return read_json(path) if path.exists() else {}

    def _read_template(self) -> dict[str, str] | None:
        """The template that convert.py wrote, if it did; UserError if it is malformed."""
        template = self._optional("tokenizer_config.json").get("rocket_template")
        if template is not None:
            try:
                build_config({"data": {"template": template}})
            except ConfigError as error:
                raise UserError(f"{self.path}/tokenizer_config.json: {error}") from None
        return template


def check_shapes(found: dict[str, list[int]], wanted: dict[str, list[int]], where: Path) -> None:
    """UserError for the first parameter that is missing, unknown or of another shape."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{where} is no plain Llama: {name!r} is {found.get(name, 'missing')} where a Llama"
                f" has {wanted.get(name, 'nothing')}; another model needs a conversion of its own"
            )


def llama_shapes(config: ModelConfig, vocab_size: int) -> dict[str, list[int]]:
    """Name to shape of a plain Llama's parameters, tied embeddings once."""
    width, kv = config.dim, config.n_kv_heads * (config.dim // config.n_heads)
    of_layer = {
        "input_layernorm": [width],
        "self_attn.q_proj": [width, width],
        "self_attn.k_proj": [kv, width],
        "self_attn.v_proj": [kv, width],
        "self_attn.o_proj": [width, width],
        "post_attention_layernorm": [width],
        "mlp.gate_proj": [config.ffn_dim, width],
        "mlp.up_proj": [config.ffn_dim, width],
        "mlp.down_proj": [width, config.ffn_dim],
    }
    shapes = {EMBEDDING: [vocab_size, width]}
    for layer in range(config.n_layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": s for part, s in of_layer.items()}
    shapes["model.norm.weight"] = [width]
    return shapes if config.tie_embeddings else {**shapes, HEAD: [vocab_size, width]}


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of a head (E/2,), float32 (RoPE, arXiv 2104.09864)."""
    head_dim = config.dim // config.n_heads
    return config.rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where there is none."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a directory that transformers can load")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: more than {MAX_JSON_BYTES // 1_000_000} MB of JSON")
        values = json.loads(path.read_bytes())
        if isinstance(values, dict):
            return values
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path}: not a JSON object, or cut short")


def read_config(values: dict[str, Any], path: Path) -> tuple[ModelConfig, int]:
    """The model that a config.json describes, and the rows of its embedding.

    Raises:
        UserError: a field is missing, has the wrong type, or makes it another model than a Llama.
    """
    if (kind := values.get("model_type")) != "llama":
        raise UserError(f"{path}: 'model_type' is {json.dumps(kind)[:80]}: Rocket reads Llamas")
    # transformers 5 writes the base of the rotary embedding into a table, 4 beside the tables.
    tables = [values, values.get("rope_parameters"), values.get("rope_scaling")]
    bases = [table.get("rope_theta") for table in tables if isinstance(table, dict)]
    found = {**values, "rope_theta": next((base for base in bases if base is not None), None)}
    ours = {"tie_embeddings": values.get("tie_word_embeddings", False)}
    more = {"vocab_size": ("rows", int, None), "rope_theta": ("rope_theta", float, 10_000.0)}
    for key, (name, kind, default) in {**NUMBERS, **more}.items():
        value = default if found.get(key) is None else found[key]
        if value is None:
            raise UserError(f"{path}: no {key}")
        low = 0 if kind is float or default == 0 else 1
        if type(value) not in {kind, int} or not low <= value < 1e15:
            raise UserError(f"{path}: {key!r} is {json.dumps(value)[:80]}: not a sensible number")
        ours[name] = kind(value)
    rows = ours.pop("rows")
    data = {"seq_len": min(1024, ours["max_seq_len"])}
    try:
        config = build_config({"model": ours, "data": data}).model
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None
    plain = plain_config(config, rows)
    plain |= {"resid_pdrop": 0, "embd_pdrop": 0, "partial_rotary_factor": 1}
    plain["rope_parameters"] |= {"type": "default", "partial_rotary_factor": 1}
    plain["rope_scaling"] = plain["rope_parameters"]
    if values.get("hidden_act") == "swish":  # silu's other name
        plain["hidden_act"] = "swish"
    check_values({k: v for k, v in values.items() if k not in HARMLESS}, plain, path)
    return config, rows


def check_values(
    values: dict[str, Any], plain: dict[str, Any], path: Path, table: str = ""
) -> None:
    """UserError for the first value that is not the plain Llama's. Null is, unless for a name."""
    for key, value in values.items():
        expected = plain.get(key)
        if value == expected or (value is None and not isinstance(expected, str)):
            continue
        if isinstance(expected, dict) and isinstance(value, dict):
            check_values(value, expected, path, f"{key}.")
        elif key in plain or json.dumps(value) not in ("false", '""', "[]", "{}"):
            why = "not supported: it may change what the model computes"
            if key in plain:
                plainly = json.dumps(expected)[:80]
                why = f"Rocket reads plain Llamas, where it is {plainly} with the other values"
            raise UserError(f"{path}: {table + key!r} is {json.dumps(value)[:80]}: {why}")


def plain_config(config: ModelConfig, rows: int) -> dict[str, Any]:
    """What config.json says of a plain Llama whose embedding has that many rows."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, name) for key, (name, *_) in NUMBERS.items()},
        "head_dim": config.dim // config.n_heads,
        "vocab_size": rows,
        "tie_word_embeddings": config.tie_embeddings,
        # transformers 5 reads the table, 4 the number: without it, it takes 10000 silently
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


class Stored(NamedTuple):
    """A tensor's file, and what the file's header says about it."""

    path: Path
    shape: list[int]
    dtype: str


def read_shards(path: Path) -> dict[str, Stored]:
    """The tensors of a directory's safetensors files, by their headers, which are checked.

    Raises:
        UserError: there is no such file, one is damaged or lies elsewhere, or the index is wrong.
    """
    if not installed("safetensors"):
        raise UserError(NEEDS_HF)
    from safetensors import SafetensorError, safe_open

    single, index, places = path / SINGLE, path / INDEX, {}
    if single.exists() and index.exists():
        raise UserError(f"{path} holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index}: no weight_map")
        for name in places.values():
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise UserError(f"{index}: {json.dumps(name)[:80]} is no file of this directory")
    elif not single.exists():
        pickled = any([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        hint = "; pickled weights (.bin) are not read, as they may execute code" if pickled else ""
        raise UserError(f"{path}: neither {SINGLE} nor {INDEX}{hint}")
    tensors: dict[str, Stored] = {}
    for shard in sorted({path / name for name in places.values()} or {single}):
        if not shard.is_file():
            raise UserError(f"{shard}: the shard is missing; fetch it again")
        try:
            with safe_open(shard, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                held = {n: Stored(shard, p.get_shape(), p.get_dtype()) for n, p in parts.items()}
        except SafetensorError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{shard}: not safetensors, or damaged: {reason}") from None
        except OSError as error:
            raise UserError(f"{shard}: {error.strerror or error}") from None
        if places and held.keys() != {name for name, of in places.items() if of == shard.name}:
            raise UserError(f"{shard}: holds other tensors than {INDEX} says")
        tensors |= held
    return tensors


# --- a SentencePiece model in the terms of other tokenizers ---

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class SentencePiece:
    """What a SentencePiece model file says and its processor does not expose.

    It is read by hand, with the numbers of sentencepiece_model.proto: the module that comes with
    sentencepiece for it demands the newest protobuf package.

    Attributes:
        pieces: (piece, score, type) in the order of ids.
        charsmap: the compiled normalization; empty: none.
    """

    def __init__(self, model: bytes) -> None:
        self.pieces: list[tuple[str, float, int]] = []
        parts = {2: b"", 3: b""}  # TrainerSpec and NormalizerSpec
        for number, value in _fields(model):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                self.pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number in parts:
                parts[number] += value  # messages merge when their bytes are concatenated
        trainer, normalizer = (dict(_fields(part)) for part in parts.values())
        kind = trainer.get(3, 1)
        self.is_unigram, self.is_bpe = kind == 1, kind == 2
        self.byte_fallback = bool(trainer.get(35, 0))
        self.space_as_suffix = bool(trainer.get(24, 0))
        self.charsmap = normalizer.get(2, b"")
        self.dummy_prefix = bool(normalizer.get(3, 1))
        self.remove_spaces = bool(normalizer.get(4, 1))
        self.escape_spaces = bool(normalizer.get(5, 1))

    def names(self, *types: int) -> list[str]:
        """The pieces of these types, in the order of their ids."""
        return [piece for piece, _, kind in self.pieces if kind in types]

    def refuse(self, name: str, tool: str, obstacles: dict[str, bool]) -> None:
        """UserError for the first obstacle that is there; `name` is the model's file."""
        obstacles |= {
            "writes spaces behind words": self.space_as_suffix,
            "leaves spaces as they are": not self.escape_spaces,
        }
        for obstacle in filter(obstacles.get, obstacles):
            raise UserError(f"{name} {obstacle}, which {tool}")


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protobuf message's fields: integers or bytes."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        number, kind = divmod(_varint(stream), 8)
        value = _varint(stream) if kind in (0, 2) else {1: 8, 5: 4}[kind]
        yield number, stream.read(value) if kind else value


def _varint(stream: io.BytesIO) -> int:
    """Protobuf's integer: seven bits a byte, the low ones first, the high bit where more follow."""
    (byte,) = stream.read(1)
    return byte if byte < 128 else byte - 128 + (_varint(stream) << 7)


def tokenizer_json(model: SentencePiece, bos_id: int) -> dict[str, Any]:
    """The tokenizer.json that gives a SentencePiece model's ids, with BOS in front.

    BPE without normalization gives the same ids. SentencePiece merges by the merged piece alone,
    `tokenizers` by pairs: where the halves of a piece overlap with themselves, as those of ababa
    do, the cut that the leftmost merge would make comes first. A unigram model's equally likely
    segmentations, and normalization of letters with several marks, may differ.

    Raises:
        UserError: the model does what tokenizer.json can't express.
    """
    own = model.names(USER_DEFINED)
    obstacles = {
        "is neither BPE nor unigram": not (model.is_bpe or model.is_unigram),
        "holds unused pieces": bool(model.names(UNUSED)),
        "holds user-defined pieces and puts a space first": bool(own)
        and (model.dummy_prefix or model.remove_spaces),
        "has a user-defined piece with a space": any(SPACE in piece for piece in own),
    }
    model.refuse("tokenizer.model", "transformers can't do", obstacles)
    normalizers, decoders = _text_steps(model)
    added = [
        {
            "id": i,
            "content": piece,
            "special": kind != USER_DEFINED,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, (piece, _, kind) in enumerate(model.pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    bos = model.pieces[bos_id][0]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, a],
            "pair": [start, a, start, b],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**_core(model), "byte_fallback": model.byte_fallback},
    }


def _text_steps(model: SentencePiece) -> tuple[list[dict], list[dict]]:
    """What tokenizer.json does to a text before it is encoded, and after ids are decoded."""

    def replace(pattern: str, text: str, kind: str = "Regex") -> dict[str, Any]:
        return {"type": "Replace", "pattern": {kind: pattern}, "content": text}

    charsmap = base64.b64encode(model.charsmap).decode()
    normalizers = [{"type": "Precompiled", "precompiled_charsmap": charsmap}] * bool(charsmap)
    if model.remove_spaces:
        normalizers += [replace(r"\A +| +\z", ""), replace(" {2,}", " ")]
    if model.dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append(replace(" ", SPACE, "String"))
    decoders = [replace(SPACE, " ", "String"), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.dummy_prefix or model.remove_spaces:
        most = 1_000_000 if model.remove_spaces else 1
        decoders.append({"type": "Strip", "content": " ", "start": most, "stop": 0})
    return normalizers, decoders


def _core(model: SentencePiece) -> dict[str, Any]:
    """The vocabulary of tokenizer.json, and for BPE its merges, the best piece's pairs first."""
    (unknown,) = model.names(UNKNOWN)
    ids = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    if model.is_unigram:
        no_text = (UNKNOWN, CONTROL, BYTE)  # never the likeliest
        vocab = [[piece, -1e4 if kind in no_text else s] for piece, s, kind in model.pieces]
        return {"type": "Unigram", "unk_id": ids[unknown], "vocab": vocab}
    scores = {piece: score for piece, score, kind in model.pieces if kind == NORMAL}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = [i for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
        cuts.sort(key=lambda i: (piece[i:] != piece[:-i], -i))
        merges += [f"{piece[:i]} {piece[i:]}" for i in cuts]
    core = {"type": "BPE", "unk_token": unknown, "fuse_unk": True, "dropout": None}
    core |= {"ignore_merges": False, "vocab": ids, "merges": merges}
    return core | dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"))


# --- the arithmetic of a plain Llama, a part at a time ---


def llama_parts(config: ModelConfig) -> list[str]:
    """The parts in the order in which a token goes through them."""
    layers = [f"model.layers.{layer}" for layer in range(config.n_layers)]
    return ["model.embed_tokens", *layers, "model.norm", "lm_head"]


def llama_part(part: str, x: Tensor, weights: dict[str, Tensor], c: ModelConfig) -> Tensor:
    """A part's result for x: ids (B, T) to the residual stream (B, T, D), at the end to logits.

    Written without any code of model.py (Touvron et al., arXiv 2302.13971 and 2307.09288).

    Args:
        weights: the part's float32 parameters, by the rest of their names.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weights[name]

    if part == "model.embed_tokens":
        return weights["weight"][x]
    if part == "model.norm":
        return norm(x, "weight")
    if part == "lm_head":
        return x @ weights["weight"].T
    T, head_dim = x.shape[1], c.dim // c.n_heads
    angles = torch.outer(torch.arange(T).float(), inverse_frequencies(c))
    cos, sin = angles.cos(), angles.sin()  # (T, E/2)

    def rotated(y: Tensor) -> Tensor:
        a, b = y.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    h = norm(x, "input_layernorm.weight")
    q, k, v = (linear(h, f"self_attn.{name}_proj") for name in "qkv")
    q, k, v = (y.unflatten(-1, (-1, head_dim)).transpose(1, 2) for y in (q, k, v))
    k, v = (y.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1) for y in (k, v))
    scores = rotated(q) @ rotated(k).transpose(2, 3) / math.sqrt(head_dim)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + linear(y, "self_attn.o_proj")
    h = norm(x, "post_attention_layernorm.weight")
    gate = linear(h, "mlp.gate_proj")
    return x + linear(gate * torch.sigmoid(gate) * linear(h, "mlp.up_proj"), "mlp.down_proj")
