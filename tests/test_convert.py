"""Protects conversion: what transformers and llama.cpp load is the model that sample.py samples,
its tokenizer gives the same ids, a changed model is refused, nothing is left of what failed."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import sentencepiece
import torch
from training import ENVIRONMENT

from chat import Template
from checkpoint import Checkpoint, find_checkpoint, write_weights
from config import ROOT, DataConfig, ModelConfig, UserError, build_config, dump_toml, tables
from convert import HARD_TEXTS, main
from model import Llama, initial_weight
from pretrained import Pretrained
from sample import Settings, drawable, generate, load_model
from tokenizer import Tokenizer, add_control_pieces
from train_tokenizer import DEFAULTS

pytest.importorskip("safetensors", reason="the extra hf is not installed")
pytest.importorskip("tokenizers", reason="the extra hf is not installed")

SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 48, "max_seq_len": 64}
MODELS = {
    "MHA, untied": ModelConfig(**SIZES, n_kv_heads=4, rope_theta=500_000.0),
    "GQA, tied": ModelConfig(**SIZES, n_kv_heads=2, tie_embeddings=True, norm_eps=1e-6),
    "MQA, untied": ModelConfig(**SIZES, n_kv_heads=1),
}
MARKERS = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEXTS = [
    *(
        "",
        "\u00e9",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u0301\u0302a\u0323\u0301",
        "a\u0000",
        "\x7f\x80\x9f",
    ),
    *(
        "\u200b\u200d\u2060",
        "\ud55c\uad6d\uc5b4",
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\u05d0\u05d1\u05d2",
        "\u2067x\u2069",
    ),
    *(
        "import os\n\n\ndef main(argv: list[str]) -> int:\n\treturn 0  # no\n",
        "x = {'a': [1, 22, 333]}\r\n",
    ),
    *(
        c * n
        for c in (" ", "\n", "=", "-", "a", "\u4e2d", "\U0001f999", "\t", "ab", " a")
        for n in (3, 7, 64, 501)
    ),
    *(
        "<|end|>",
        "<|user|>hi<|end|>",
        "[INST] <<SYS>>",
        "<s><s>",
        "a<unk>b",
        "<0xFF><0x0A>",
        "</s >",
    ),
    *(
        "  leading",
        "trailing  ",
        "\n leading",
        " \n ",
        "a\n\n\n\nb",
        "tab\t\tstop",
        "\u2581"[:0] + "_ __ ___",
    ),
    *(
        "http://a.b/c?d=e&f=%20",
        "3.14159e-10",
        "\\n\\t\\0",
        "caf\u00e9 cafe\u0301",
        "\ufffd\ufffd",
        "\ue0ff",
        "\U000f0000",
    ),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small a model is slowed down by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_tokenizer(**options):
    """The bytes of a small tokenizer: Rocket's defaults but for the options."""
    out = io.BytesIO()
    text = [
        "some words and the end of them\n    more words == 12 caf\u00e9 \u4e2d\u6587 self.aaaa bbbb"
    ] * 30
    text += [line + "\n" for line in (ROOT / "sample.py").read_text().splitlines()]
    sizes = {"vocab_size": 500, "hard_vocab_limit": False, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=out, **DEFAULTS | sizes | options
    )
    return out.getvalue()


def make_run(path, model, tokenizer, spare=0, template=None):
    """A run directory of random weights, large enough for logits that are far from uniform."""
    path.mkdir(parents=True)
    (path / "tokenizer.model").write_bytes(tokenizer)
    pieces = Tokenizer(path / "tokenizer.model")
    config = build_config(
        {
            "model": asdict(model),
            "data": {"seq_len": 32},
            "tokenizer": {"vocab_size": pieces.vocab_size},
        }
    )
    rows = pieces.vocab_size + spare
    record = {
        "step": 3,
        "state": {"step": 3, "val_loss": 2.5},
        "config": tables(config),
        "template": template,
        "tokenizer_sha256": pieces.sha256,
        "vocab_size": rows,
    }

    def weights():
        for name, parameter in Llama(model, rows).named_parameters():
            weight = initial_weight(name, parameter.shape, config.model, 0, torch.device("cpu"))
            noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name)))
            yield name, weight * 8 if weight.ndim == 2 else weight + noise

    write_weights(path / "checkpoints" / "step_00000003", record, weights())
    (path / "config.toml").write_text(dump_toml(config))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    for name, model in MODELS.items():
        make_run(directory / name, model, tokenizer, spare=3 * ("MQA" in name))
    return directory


def convert(*arguments):
    main([str(argument) for argument in arguments])


def greedy(run, prompt, length=24):
    """The ids with which sample.py continues."""
    model = load_model(find_checkpoint(run)).float()
    pieces = Tokenizer(run / "tokenizer.model")
    ids = [pieces.bos_id, *pieces.encode(prompt).tolist()]
    settings = Settings(length, temperature=0)
    allowed = drawable(pieces, model.vocab_size)
    steps = generate(model, [ids], settings, allowed=allowed, stop_ids=[pieces.eos_id])
    return ids, [step[0] for step in steps if step[0] is not None], model


# --- transformers ---


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(runs, tmp_path, name, capsys):
    transformers = pytest.importorskip("transformers")
    convert("to-hf", runs / name, tmp_path / "hf")
    assert "proved" in capsys.readouterr().out
    theirs, said = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(said.values()), said
    ids, expected, model = greedy(runs / name, "def main(")
    tokens = torch.randint(600, (2, 64), generator=torch.Generator().manual_seed(1)) % len(
        model.lm_head.weight
    )
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=0)

    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = written("def main(", return_tensors="pt")
    assert prompt.input_ids[0].tolist() == ids
    out = theirs.generate(
        prompt.input_ids, attention_mask=prompt.attention_mask, do_sample=False, max_new_tokens=24
    )
    assert out[0, len(ids) :].tolist() == expected


TOKENIZERS = {
    "Rocket's": {},
    "Llama 2's": {"add_dummy_prefix": True, "allow_whitespace_only_pieces": False},
    "a prefix and blanks": {"add_dummy_prefix": True},
    "no byte fallback": {"byte_fallback": False},
    "user-defined pieces": {"user_defined_symbols": ["<tool>", "=="]},
    "pieces across words": {"split_by_whitespace": False, "split_by_unicode_script": False},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_gives_the_same_ids(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = add_control_pieces(train_tokenizer(**TOKENIZERS[name]), ["<|tool|>"])
    convert("to-hf", make_run(tmp_path / "run", MODELS["GQA, tied"], model), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer(tmp_path / "run" / "tokenizer.model")
    texts = [*HARD_TEXTS, *TEXTS, *(a + b for a in HARD_TEXTS[::3] for b in TEXTS[::5])]
    assert len({*texts}) > 150
    for text in texts:
        ids = ours.encode(text).tolist()
        assert theirs(text, split_special_tokens=True).input_ids == [ours.bos_id, *ids], ascii(text)
        if "byte" not in name:
            assert theirs.decode(ids) == ours.decode(ids)
    for i in range(ours.vocab_size):
        assert theirs.convert_ids_to_tokens(i) == ours.processor.id_to_piece(i)
    assert theirs("<|tool|>a", add_special_tokens=False).input_ids[0] == ours.vocab_size - 1
    assert theirs.bos_token_id == ours.bos_id
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.pad_token == "<pad>"


INEXACT = {
    "unigram": {"model_type": "unigram"},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "SentencePiece's own": {
        "normalization_rule_name": "nmt_nfkc",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": True,
        "model_type": "unigram",
    },
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_transformers_cannot_do_exactly_is_said(tmp_path, capsys, name):
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path / "run", MODELS["GQA, tied"], train_tokenizer(**INEXACT[name]))
    convert("to-hf", run, tmp_path / "hf")
    assert "may give other ids than tokenizer.model" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer(run / "tokenizer.model")
    for text in [
        "",
        " a  b ",
        "caf\u00e9 \ufb01",
        "<s>",
        "def main(argv):",
        "some words\n",
        "\u4e2d\u6587",
    ]:
        expected = [ours.bos_id, *ours.encode(text).tolist()]
        assert theirs(text, split_special_tokens=True).input_ids == expected, text


@pytest.mark.parametrize("prefix", [False, True])
def test_the_chat_template(tmp_path, prefix, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2", reason="transformers renders templates with it")
    template = {**DataConfig().template, "system": '<|system|>\n"{content}"\\<|end|>'}
    run = make_run(
        tmp_path / "run",
        MODELS["GQA, tied"],
        train_tokenizer(add_dummy_prefix=prefix),
        template=DataConfig().template,
    )
    convert("to-hf", run, tmp_path / "hf")
    assert "chat_template" not in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Template(DataConfig().template, Tokenizer(run / "tokenizer.model"))
    chat = [
        ("system", " Be\nbrief. "),
        ("user", "2+2?"),
        ("assistant", "4\U0001f999"),
        ("user", ""),
    ]
    messages = [{"role": role, "content": content} for role, content in chat]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == ours.prompt(chat)
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == ours.render(chat, "all").ids.tolist()
    with pytest.raises(Exception, match="no role tool"):
        theirs.apply_chat_template([{"role": "tool", "content": "a"}])
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert settings.eos_token_id == ours.stops()[0]
    assert Pretrained(tmp_path / "hf").template == DataConfig().template

    shutil.rmtree(run)
    make_run(run, MODELS["GQA, tied"], train_tokenizer(add_dummy_prefix=prefix), template=template)
    convert("to-hf", run, tmp_path / "plain")
    assert "plain text beside contents" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    shown = theirs.apply_chat_template(messages[:1], tokenize=False)
    assert shown == '<s><|system|>\n" Be\nbrief. "\\<|end|></s>'


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(runs, tmp_path, dtype):
    convert("to-hf", runs / "GQA, tied", tmp_path / "hf", f"--dtype={dtype}")
    exported, checkpoint = Pretrained(tmp_path / "hf"), find_checkpoint(runs / "GQA, tied")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == dtype
    for name in exported.shapes():
        expected = checkpoint.tensor("model", name).to(getattr(torch, dtype))
        assert torch.equal(exported.tensor(name), expected)


def test_a_round_trip_keeps_every_bit(runs, tmp_path):
    for name, model in MODELS.items():
        convert("to-hf", runs / name, tmp_path / name / "hf", "--shard-gb=2e-5")
        assert len([*(tmp_path / name / "hf").glob("model-*-of-*.safetensors")]) > 2
        convert("from-hf", tmp_path / name / "hf", tmp_path / name / "run")
        old, new = find_checkpoint(runs / name), find_checkpoint(tmp_path / name / "run")
        assert old.shapes("model") == new.shapes("model")
        for parameter in old.shapes("model"):
            assert torch.equal(old.tensor("model", parameter), new.tensor("model", parameter))
        assert new.config.model == model
        assert (tmp_path / name / "run" / "tokenizer.model").read_bytes() == (
            runs / name / "tokenizer.model"
        ).read_bytes()
        assert greedy(runs / name, "a")[1] == greedy(tmp_path / name / "run", "a")[1]
