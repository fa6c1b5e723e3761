"""Protects text: it comes back from its ids as it was, never becomes a control token, and a file
that is no usable tokenizer is refused in one line. Added pieces change nothing for ordinary text.
"""

import hashlib
import io
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from config import UserError
from corpus.vocabulary import DEFAULTS, HARD_TEXTS, add_control_pieces
from tokenizer import SPACE, Tokenizer

WORDS = "def return self import class for in if else print the of and to is value".split()


def trained(vocab_size=400, **options):
    """The bytes of a small model with Rocket's defaults."""
    model = io.BytesIO()
    texts = [f"{a} {b}_{a}({i}):\n    {b} = é\n\n" for i, a in enumerate(WORDS) for b in WORDS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        **DEFAULTS | {"hard_vocab_limit": False} | options,
    )
    return model.getvalue()


def saved(path, model):
    path.write_bytes(model)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def tokenizer(model, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", model)


def test_describes_the_file(tokenizer, model):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert len(tokenizer.pieces()) == tokenizer.vocab_size
    assert tokenizer.pieces()[3:8] == DEFAULTS["control_symbols"]
    assert tokenizer.sha256 == hashlib.sha256(model).hexdigest()


@pytest.mark.parametrize("text", ["", *HARD_TEXTS, "\n" * 50, " " * 50, "\t\t", "\r", "é" * 3])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(tokenizer, text):
    text = text.replace(SPACE, " ")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_space_sign_becomes_a_space(tokenizer):
    assert tokenizer.decode(tokenizer.encode(f"a{SPACE}b")) == "a b"


def test_text_never_becomes_a_control_token(tokenizer):
    control = {i for i in range(tokenizer.vocab_size) if tokenizer.processor.is_control(i)}
    text = " ".join(tokenizer.pieces()[i] for i in control) + "<unk>"
    assert {1, 2} < control
    assert not control & set(tokenizer.encode(text).tolist())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_leaves_control_pieces_out(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("def é"), 3, tokenizer.eos_id]
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(ids) == "def é"


def test_byte_lengths(tokenizer):
    lengths, pieces = tokenizer.byte_lengths(), tokenizer.pieces()
    assert lengths[:8].tolist() == [0] * 8
    assert lengths[pieces.index("<0x41>")] == 1
    assert lengths[pieces.index(SPACE)] == 1
    assert lengths[pieces.index("é")] == 2


def test_worker_processes_can_receive_it(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("def é").tolist() == tokenizer.encode("def é").tolist()
    assert copy.sha256 == tokenizer.sha256


def test_a_llama_style_model_works_as_it_is(tmp_path):
    llama = saved(tmp_path / "tokenizer.model", trained(add_dummy_prefix=True, control_symbols=[]))
    text = "def value(self):\n    return 1\n"
    assert llama.decode(llama.encode(text)) == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a SentencePiece model"),
        (b"not a model", "not a SentencePiece model"),
        (None, "No such file"),
        ({"bos_id": -1}, "no BOS or no EOS"),
        ({"eos_id": -1}, "no BOS or no EOS"),
    ],
)
def test_refuses(tmp_path, content, words):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else trained(**content))
    with pytest.raises(UserError, match=words) as error:
        Tokenizer(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_a_model_cut_short(tmp_path, model):
    for size in range(1, len(model), 97):
        with pytest.raises(UserError, match=r"SentencePiece|BOS"):
            saved(tmp_path / "tokenizer.model", model[:size])


def test_refuses_more_pieces_than_uint16_holds(model):
    room = 65_536 - len(sentencepiece.SentencePieceProcessor(model_proto=model))
    full = add_control_pieces(model, [f"<{i}>" for i in range(room)])
    assert sentencepiece.SentencePieceProcessor(model_proto=full).vocab_size() == 65_536
    with pytest.raises(UserError, match="65537 pieces"):
        add_control_pieces(full, ["<more>"])


def test_added_pieces(tmp_path, model, tokenizer):
    bigger = saved(tmp_path / "a.model", add_control_pieces(model, ["<|tool|>", "<pad>", "<|é|>"]))
    assert bigger.pieces() == [*tokenizer.pieces(), "<|tool|>", "<|é|>"]
    assert all(bigger.processor.is_control(tokenizer.vocab_size + i) for i in range(2))
    assert bigger.extends(tokenizer)
    assert not tokenizer.extends(bigger)
    assert (bigger.bos_id, bigger.eos_id) == (1, 2)
    for text in [*HARD_TEXTS, "<|tool|> and <pad>"]:
        assert bigger.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert bigger.decode(bigger.encode(text)) == text


def test_adding_is_idempotent(model):
    once = add_control_pieces(model, ["<|tool|>", "<|tool|>"])
    assert add_control_pieces(once, ["<|tool|>"]) == once
    assert add_control_pieces(model, ["<pad>"]) == model


@pytest.mark.parametrize(
    "piece", ["", "two words", "def", "<unk>", "<0x41>", f"a{SPACE}", "\n", "\0", "\udcff"]
)
def test_refuses_to_add(model, piece):
    with pytest.raises(UserError, match="control piece"):
        add_control_pieces(model, [piece])
