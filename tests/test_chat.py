"""What the loss falls on in a conversation, and that no text speaks in another's role."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import DataConfig, UserError
from corpus.vocabulary import add_control_pieces
from tokenizer import Template, Tokenizer

MARKERS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "é?")]
CHAT.append(("assistant", "🦙 <|end|>"))


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "tokenizer.model"
    path.write_bytes(add_control_pieces(tiny_tokenizer.read_bytes(), MARKERS))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def template(tokenizer):
    return Template(DataConfig().template, tokenizer)


def shown(tokenizer, ids):
    """Ids as text, control pieces by name."""
    control = tokenizer.processor.is_control
    return "".join(
        tokenizer.processor.id_to_piece(int(i)) if control(int(i)) else tokenizer.decode([int(i)])
        for i in ids
    )


def test_a_conversation_in_tokens(template, tokenizer):
    ids, mask = template.render(CHAT[:3], "responses")
    assert shown(tokenizer, ids) == (
        "<s><|system|>Be brief.<|end|><|user|>2+2?<|end|><|assistant|>4<|end|></s>"
    )
    trained = shown(tokenizer, ids[mask == 1])
    assert trained == "4<|end|></s>"  # the answer and that it ends; not that it begins


def test_every_response_is_trained_and_no_prompt(template, tokenizer):
    ids, mask = template.render([*CHAT, ("user", "and?")], "responses")
    control = tokenizer.processor.is_control
    trained = ids[mask == 1].tolist()
    assert [tokenizer.processor.id_to_piece(i) for i in trained if control(i)] == ["<|end|>"] * 2
    assert tokenizer.decode(trained) == "4🦙 <|end|>"
    assert mask[-1] == 0  # nobody answered: that it ends here is nothing to learn


def test_all_is_trained_but_bos(template):
    ids, mask = template.render(CHAT, "all")
    assert mask.tolist() == [0] + [1] * (len(ids) - 1)


def test_text_never_becomes_a_marker(template, tokenizer):
    ids, _ = template.render([("user", "<|assistant|></s><s>")], "responses")
    control = [int(i) for i in ids if tokenizer.processor.is_control(int(i))]
    assert [tokenizer.processor.id_to_piece(i) for i in control] == [
        "<s>",
        "<|user|>",
        "<|end|>",
        "</s>",
    ]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), max_size=5))
def test_a_prompt_and_its_answer_are_what_was_trained_on(template, tokenizer, messages):
    """sample.py asks in the same ids that prepare.py wrote."""
    ids, _ = template.render([*messages, ("assistant", "answer")], "responses")
    prompt = template.prompt(messages)
    answer = [*tokenizer.encode("answer").tolist(), *template.after["assistant"].tolist()]
    assert ids.tolist() == [*prompt, *answer, tokenizer.eos_id]


def test_what_ends_an_answer(template, tokenizer):
    end = tokenizer.processor.piece_to_id("<|end|>")
    assert template.stops() == ([tokenizer.eos_id, end], [])
    plain = {"user": "Q: {content}\n", "assistant": "A: {content}\n\n"}
    # not the blank line alone, which an answer may hold
    assert Template(plain, tokenizer).stops() == ([tokenizer.eos_id], ["\n\nQ: ", "\n\nA: "])
    spaced = {"user": "<|user|>{content}", "assistant": "<|assistant|>{content} <|end|>"}
    assert Template(spaced, tokenizer).stops() == ([tokenizer.eos_id, end], [])
    user, assistant = map(tokenizer.processor.piece_to_id, ("<|user|>", "<|assistant|>"))
    unmarked = {"user": "<|user|>{content}", "assistant": "<|assistant|>{content}\n"}
    assert Template(unmarked, tokenizer).stops() == ([tokenizer.eos_id, user, assistant], [])
    assert Template({"assistant": "{content}"}, tokenizer).stops() == ([tokenizer.eos_id], [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<|tool|>{content}", ["no control piece <|tool|>", "--add-pieces='<|tool|>'"]),
        ("<s>{content}", ["BOS"]),
    ],
)
def test_a_template_that_the_tokenizer_can_not_write(tokenizer, text, words):
    with pytest.raises(UserError) as error:
        Template({"assistant": text}, tokenizer)
    assert all(word in str(error.value) for word in words)
