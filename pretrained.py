"""A Llama as a Hugging Face directory: config.json, safetensors shards, tokenizer.model.

What is read comes from anywhere, so nothing of it is executed or believed: every field of the
configuration is known, neutral or refused by name, and each tensor is where a Llama has one, with
the shape that it has there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import ConfigError, ModelConfig, UserError, build_config
from tokenizer import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_JSON_BYTES = 100_000_000
DTYPES = ("F32", "F16", "BF16")
# Keys of config.json that become ours, and transformers' default where one may be missing.
SIZES = {
    "hidden_size": ("dim", None),
    "num_hidden_layers": ("n_layers", None),
    "num_attention_heads": ("n_heads", None),
    "num_key_value_heads": ("n_kv_heads", 0),
    "intermediate_size": ("ffn_dim", None),
    "max_position_embeddings": ("max_seq_len", 2048),
}
NUMBERS = {"rms_norm_eps": ("norm_eps", 1e-6), "initializer_range": ("init_std", 0.02)}
# Keys that may only have these values, which are those of a plain Llama.
NEUTRAL = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
}
# Keys that say nothing of what the model computes.
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
        config: the model as Rocket describes it.
        vocab_size: rows of the embedding; the tokenizer may have fewer pieces.
        tokenizer_path: its tokenizer.model.
        template: how conversations are written, of a directory that convert.py made; else None.

    Raises:
        UserError: a file is missing or damaged, or the model is no plain Llama.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config_path = path / "config.json"
        values = read_json(config_path)
        self.config, self.vocab_size = read_config(values, config_path)
        self.tokenizer_path = path / "tokenizer.model"
        if not self.tokenizer_path.is_file():
            raise UserError(f"{path}: no tokenizer.model; Rocket reads SentencePiece models alone")
        tokenizer = Tokenizer(self.tokenizer_path)
        if tokenizer.vocab_size > self.vocab_size:
            raise UserError(
                f"{self.tokenizer_path} has {tokenizer.vocab_size} pieces, but the model has rows"
                f" for {self.vocab_size}; it is the tokenizer of another model"
            )
        self.template = self._read_tokenizer_config(values, tokenizer)
        self._files = open_shards(path)
        self._shapes = self._check_tensors()

    def shapes(self) -> dict[str, list[int]]:
        """Name to shape of the parameters; tied embeddings once."""
        return dict(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """A parameter in the type that it is stored in, mapped from its file, copy-on-write."""
        return self._files[name].get_tensor(name)

    def _check_tensors(self) -> dict[str, list[int]]:
        """The shapes of the parameters; UserError where the tensors are not those of this Llama."""
        c, tied = self.config, self.config.tie_embeddings
        names = set(self._files)
        if 2 + 9 * c.n_layers > len(names):
            raise UserError(
                f"{self.path}: {len(names)} tensors are too few for {c.n_layers} layers; a shard is"
                " missing, or num_hidden_layers of config.json is wrong"
            )
        shapes = llama_shapes(c, self.vocab_size)
        buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(c.n_layers)}
        wanted = shapes | {name: [c.dim // c.n_heads // 2] for name in buffers & names}
        if tied and HEAD in names:
            wanted[HEAD] = shapes[EMBEDDING]
        if missing := wanted.keys() - names:
            raise UserError(f"{self.path}: the tensor {min(missing)} is missing")
        if extra := names - wanted.keys():
            raise UserError(f"{self.path}: the tensor {min(extra)!r} is none of a Llama's")
        for name, shape in wanted.items():
            part = self._files[name].get_slice(name)
            if part.get_shape() != shape:
                raise UserError(
                    f"{self.path}: {name} has the shape {part.get_shape()}, not {shape}"
                )
            if part.get_dtype() not in DTYPES:
                raise UserError(
                    f"{self.path}: {name} is of type {part.get_dtype()}; Rocket reads float32,"
                    " float16 and bfloat16"
                )
        for name in buffers & names:
            if not torch.allclose(self.tensor(name).float(), inverse_frequencies(c), rtol=1e-2):
                raise UserError(
                    f"{self.path}: {name} is not what rope_theta = {c.rope_theta} gives"
                )
        if HEAD in wanted and tied and not torch.equal(self.tensor(HEAD), self.tensor(EMBEDDING)):
            raise UserError(
                f"{self.path}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; it"
                " has to be false where both count"
            )
        return shapes

    def _read_tokenizer_config(
        self, values: dict[str, Any], tokenizer: Tokenizer
    ) -> dict[str, str] | None:
        """The template, if there is one; UserError for tokens that tokenizer.model does not have.

        A row beyond its pieces is spare, unless the directory names a token for it.
        """
        named = {}
        for key in ("bos_token_id", "eos_token_id"):
            ids = values.get(key)
            named |= {i: key for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
        path = self.path / "tokenizer_config.json"
        table = read_json(path) if path.exists() else {}
        added = table.get("added_tokens_decoder") or {}
        if isinstance(added, dict):
            named |= {int(i): "an added token" for i in added if i.isdecimal() and len(i) < 10}
        path = self.path / "added_tokens.json"
        if path.exists():
            added = read_json(path).values()
            named |= {i: "an added token" for i in added if type(i) is int}
        for i, name in named.items():
            if tokenizer.vocab_size <= i < self.vocab_size:
                raise UserError(
                    f"{self.path}: {name} is id {i}, but tokenizer.model has only"
                    f" {tokenizer.vocab_size} pieces; add the missing ones to it, in order, with"
                    " train_tokenizer.py --add-pieces"
                )
        template = table.get("rocket_template")
        if template is not None:
            try:
                build_config({"data": {"template": template}})
            except ConfigError as error:
                raise UserError(f"{self.path}/tokenizer_config.json: {error}") from None
        return template


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
    """Radians a position of each pair of a head (E/2,), float32 (RoPE, arXiv 2104.09864)."""
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
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON, or cut short") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def read_config(values: dict[str, Any], path: Path) -> tuple[ModelConfig, int]:
    """The model that a config.json describes, and the rows of its embedding.

    Raises:
        UserError: a field is missing, of another type, or makes it another model than a Llama.
    """

    def refuse(key: str, why: str) -> None:
        raise UserError(f"{path}: {key!r} is {json.dumps(values[key])[:80]}: {why}")

    if "model_type" not in values:
        raise UserError(f"{path}: no model_type; it is llama in a Llama's configuration")
    known = {"vocab_size", "tie_word_embeddings", "head_dim", "rope_theta", "rope_parameters"}
    known |= {"rope_scaling", *SIZES, *NUMBERS, *NEUTRAL, *HARMLESS}
    for key, value in values.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            refuse(key, f"Rocket reads plain Llamas, where it is {json.dumps(NEUTRAL[key][0])}")
        if (
            key not in known
            and value is not None
            and value is not False
            and value not in ("", [], {})
        ):
            refuse(key, "not supported: it may change what the model computes")

    def number(key: str, default: float | None, kind: type) -> float:
        value = default if values.get(key) is None else values[key]
        if value is None:
            raise UserError(f"{path}: no {key}")
        good = type(value) in {kind, int} and (default == value or 0 < value < 1e15)
        if not good:
            refuse(key, "not a sensible number")
        return kind(value)

    table = {ours: number(key, default, int) for key, (ours, default) in SIZES.items()}
    table |= {ours: number(key, default, float) for key, (ours, default) in NUMBERS.items()}
    table["rope_theta"] = read_rope_theta(values, path)
    tied = values.get("tie_word_embeddings", False)
    table["tie_embeddings"] = tied
    rows = number("vocab_size", None, int)
    try:
        config = build_config(
            {"model": table, "data": {"seq_len": min(1024, table["max_seq_len"])}}
        ).model
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None
    if values.get("head_dim") not in (None, config.dim // config.n_heads):
        refuse("head_dim", "Rocket's heads have hidden_size / num_attention_heads")
    return config, rows


def read_rope_theta(values: dict[str, Any], path: Path) -> float:
    """The base of the rotary embedding, from where transformers 4 or 5 write it.

    Raises:
        UserError: the embedding is scaled or partial; two places differ.
    """
    found = {"rope_theta": values.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        table = values.get(key) or {}
        if not isinstance(table, dict):
            raise UserError(f"{path}: {key} is no table")
        for name, value in table.items():
            if name == "rope_theta":
                found[f"{key}.rope_theta"] = value
            elif (name, value) not in (
                ("rope_type", "default"),
                ("type", "default"),
                ("partial_rotary_factor", 1),
            ):
                raise UserError(
                    f"{path}: {key}.{name} = {json.dumps(value)[:80]} is not supported; Rocket's"
                    " rotary embedding is the default one, not scaled"
                )
    given = {key: value for key, value in found.items() if value is not None}
    for key, value in given.items():
        if type(value) not in (int, float) or not 1 <= value < 1e15:
            raise UserError(f"{path}: {key} = {json.dumps(value)[:80]}: not a sensible number")
    if len(set(given.values())) > 1:
        raise UserError(f"{path}: {' and '.join(given)} differ; which one holds?")
    return float(next(iter(given.values()), 10_000.0))


def open_shards(path: Path) -> dict[str, Any]:
    """Name of each tensor to the open safetensors file that holds it, headers checked.

    Raises:
        UserError: no such file, one that is damaged or not named in the directory; an index that
            does not say what the files hold.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(
            "Hugging Face directories need the package safetensors: pip install 'rocket-llama[hf]'"
        ) from None
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise UserError(f"{path} holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    places = None
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
    tensors: dict[str, Any] = {}
    for name in sorted(set(places.values())) if places else [SINGLE]:
        if not (path / name).is_file():
            raise UserError(f"{path / name}: the shard is missing; fetch it again")
        try:
            file = safe_open(path / name, "pt")
            held = set(file.keys())
        except SafetensorError as error:
            raise UserError(
                f"{path / name}: not safetensors, or damaged: {' '.join(str(error).split())}"
            ) from None
        except OSError as error:
            raise UserError(f"{path / name}: {error.strerror or error}") from None
        if places and held != {tensor for tensor, place in places.items() if place == name}:
            raise UserError(f"{path / name}: holds other tensors than {INDEX} says")
        tensors |= dict.fromkeys(held, file)
    return tensors
