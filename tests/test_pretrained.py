"""Protects what is believed of a Hugging Face directory: a plain Llama is read as transformers
reads it, everything else is refused in one line, and nothing that lies there is executed."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from config import ModelConfig, UserError
from inference.pretrained import Pretrained, inverse_frequencies, llama_shapes
from tokenizer import Tokenizer
from tools.convert import main

safetensors = pytest.importorskip("safetensors.torch", reason="the extra hf is not installed")

MODEL = ModelConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24, max_seq_len=32)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 604,
}


def weights(tied=False):
    model = ModelConfig(**{**vars(MODEL), "tie_embeddings": tied})
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(s, generator=generator) for n, s in llama_shapes(model, 604).items()}


@pytest.fixture
def directory(tiny_tokenizer, tmp_path):
    """A model in two shards, with four rows more than its tokenizer has pieces."""
    path, tensors = tmp_path / "hf", weights()
    path.mkdir()
    (path / "tokenizer.model").write_bytes(tiny_tokenizer.read_bytes())
    (path / "config.json").write_text(json.dumps(CONFIG))
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in {*places.values()}:
        held = {name: tensor for name, tensor in tensors.items() if places[name] == shard}
        safetensors.save_file(held, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def single(directory, tensors, **config):
    """Puts other tensors into a directory, in one file, and other values into its configuration."""
    for path in directory.glob("model*"):
        path.unlink()
    safetensors.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))


def refused(directory, words):
    """Refused by the library, and by the program, which leaves nothing behind."""
    with pytest.raises(UserError, match=words) as error:
        Pretrained(directory)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=words):
        main(["from-hf", str(directory), str(directory.parent / "run")])
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_directory_is_read(directory):
    model, expected = Pretrained(directory), weights()
    assert vars(model.config) == {**vars(MODEL), "init_std": 0.02}
    assert model.vocab_size == 604
    assert Tokenizer(model.tokenizer_path).vocab_size == 600
    assert {name: [*tensor.shape] for name, tensor in expected.items()} == model.shapes()
    for name in model.shapes():
        assert torch.equal(model.tensor(name), expected[name])


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_embeddings(directory, with_head):
    tensors = weights(tied=True)
    if with_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    single(directory, tensors, tie_word_embeddings=True)
    model = Pretrained(directory)
    assert model.config.tie_embeddings
    assert "lm_head.weight" not in model.shapes()
    if with_head:
        tensors["lm_head.weight"][3, 4] += 1
        single(directory, tensors, tie_word_embeddings=True)
        refused(directory, "tie_word_embeddings is true, but lm_head.weight differs")


def test_rotary_buffers_of_old_exports(directory):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    frequencies = inverse_frequencies(MODEL)
    single(directory, {**weights(), name: frequencies})
    assert name not in Pretrained(directory).shapes()
    single(directory, {**weights(), name: frequencies / 2})
    refused(directory, "inv_freq is not what rope_theta = 10000.0 gives")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(directory, dtype):
    single(directory, {name: tensor.to(dtype) for name, tensor in weights().items()})
    assert Pretrained(directory).tensor("model.norm.weight").dtype == dtype


@pytest.mark.parametrize(
    ("values", "theta"),
    [
        ({}, 1e4),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 500000, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_scaling": None, "head_dim": 4, "mlp_bias": False, "sliding_window": None}, 1e4),
    ],
)
def test_where_the_base_of_the_rotary_embedding_stands(directory, values, theta):
    (directory / "config.json").write_text(json.dumps({**CONFIG, **values}))
    assert Pretrained(directory).config.rope_theta == theta


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "mistral"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": [1]},
        {"rope_theta": "10000"},
        {"rope_theta": -1},
        {"partial_rotary_factor": 0.5},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"resid_pdrop": 0.1},
        {"sliding_window": 128},
        {"head_dim": 8},
        {"pretraining_tp": 2},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"logit_scale": 2.0},
        {"tie_word_embeddings": "yes"},
        {"hidden_size": 10**30},
        {"hidden_size": -16},
        {"hidden_size": 16.5},
        {"hidden_size": None},
        {"num_hidden_layers": 10**9},
        {"num_key_value_heads": 3},
        {"intermediate_size": 25},
        {"vocab_size": True},
        {"vocab_size": 605},
        {"rms_norm_eps": float("nan")},
    ],
    ids=json.dumps,
)
def test_fields_of_other_models_are_refused_by_name(directory, values):
    (directory / "config.json").write_text(json.dumps({**CONFIG, **values}))
    names = {
        "num_hidden_layers": "layers",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp",
        "tie_word_embeddings": "tie_embeddings",
    }
    name = next(reversed(values))
    if values == {"vocab_size": 605}:
        name = r"'lm_head.weight' is \[604, 16\] where a Llama has \[605, 16\]"
    refused(directory, names.get(name, name))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[" * 100_000, b'"x"', b'{"a": ' + b"1" * 5000 + b"}", b"\xff\xfe"],
)
def test_a_configuration_that_is_not_json(directory, content):
    (directory / "config.json").write_bytes(content)
    refused(directory, "config.json: not")


class Planted:
    """What runs a program when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_planted_pickle_is_not_opened(directory, tmp_path_factory, name):
    trace = tmp_path_factory.mktemp("trace") / "executed"
    for path in directory.glob("model*"):
        path.unlink()
    (directory / name).write_bytes(pickle.dumps(Planted(trace)))
    refused(directory, "pickled weights" if name.endswith("bin") else "not safetensors, or damaged")
    assert not trace.exists()
    pickle.loads((directory / name).read_bytes())
    assert trace.exists()  # it would have


def header(table, data=b"", size=None):
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


FILES = {
    "2^60 bytes of header": header({}, size=2**60),
    "more header than file": header({}, size=5000),
    "a negative shape": header(
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"
    ),
    "offsets beyond the end": header(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"1234"
    ),
    "a shape that overflows": header(
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"
    ),
    "a made-up type": header(
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"
    ),
    "nothing": b"",
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_files(directory, name):
    (directory / "model-1.safetensors").write_bytes(FILES[name])
    refused(directory, "model-1.safetensors: not safetensors, or damaged")


def test_damaged_directories(directory):
    shard, index = directory / "model-0.safetensors", directory / "model.safetensors.index.json"
    content, places = shard.read_bytes(), json.loads(index.read_text())["weight_map"]
    shard.write_bytes(content[:-1])
    refused(directory, "model-0.safetensors: not safetensors, or damaged")
    shard.unlink()
    refused(directory, "model-0.safetensors: the shard is missing")
    shard.mkdir()
    refused(directory, "model-0.safetensors: the shard is missing")
    shard.rmdir()
    shard.write_bytes(content)
    for name in ("../other.safetensors", "/etc/passwd", "..", "", 7, None):
        index.write_text(json.dumps({"weight_map": {**places, "model.norm.weight": name}}))
        refused(directory, "is no file of this directory")
    other = {**places, "model.norm.weight": "model-0.safetensors"}
    other["model.embed_tokens.weight"] = "model-1.safetensors"
    index.write_text(json.dumps({"weight_map": other}))
    refused(directory, "holds other tensors than")
    index.write_text(json.dumps({"weight_map": places}))
    Pretrained(directory)
    (directory / "model.safetensors").write_bytes(content)
    refused(directory, "holds both")
    index.unlink()
    refused(directory, "too few for 2 layers")


def test_tensors_that_are_none_of_a_llama(directory):
    for change, words in {
        ("model.norm.weight", None): "'model.norm.weight' is missing where",
        ("lm_head.weight", None): "'lm_head.weight' is missing where",
        (
            "model.layers.0.self_attn.q_proj.bias",
            torch.ones(16),
        ): "q_proj.bias' is \\[16\\] where a Llama has nothing",
        ("a\nb", torch.ones(16)): r"'a\\nb' is \[16\] where a Llama has nothing",
        ("model.norm.weight", torch.ones(17)): r"is \[17\] where a Llama has \[16\]",
        ("model.norm.weight", torch.ones(16).double()): "is of type F64",
        ("model.norm.weight", torch.ones(16).char()): "is of type I8",
    }.items():
        tensors = {**weights(), "x": torch.ones(1)}
        del tensors["x"]
        tensors.pop(change[0], None)
        extra = {} if change[1] is None else {change[0]: change[1]}
        filler = {"model.layers.0.self_attn.rotary_emb.inv_freq": inverse_frequencies(MODEL)}
        single(directory, {**tensors, **filler, **extra})
        refused(directory, words)


def test_values_that_are_not_numbers(directory):
    tensors = weights()
    tensors["model.norm.weight"][3] = np.nan
    single(directory, tensors)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds values that are not finite"):
        main(["from-hf", str(directory), str(directory.parent / "run")])
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_tokenizers_that_do_not_fit(directory, tiny_tokenizer):
    (directory / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": [2, 601]}))
    refused(directory, "eos_token_id is id 601, but tokenizer.model has only 600 pieces")
    (directory / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": 2}))
    (directory / "added_tokens.json").write_text('{"<|im_end|>": 600}')
    refused(directory, "an added token is id 600")
    (directory / "added_tokens.json").write_text(
        '{"<pad>": 604}'
    )  # beyond the rows: no model has it
    Pretrained(directory)
    (directory / "tokenizer_config.json").write_text('{"rocket_template": {"user": "{content}"}}')
    refused(directory, "tokenizer_config.json: data.template lacks the role assistant")
    (directory / "tokenizer_config.json").write_text("{}")
    few = {k: v[:599] if len(v) == 604 else v for k, v in weights().items()}
    single(directory, few, vocab_size=599)
    refused(directory, "has 600 pieces, but the model has rows for 599")
    (directory / "tokenizer.model").write_bytes(b"no model")
    refused(directory, "not a SentencePiece model")
    (directory / "tokenizer.model").unlink()
    refused(directory, "no tokenizer.model")
