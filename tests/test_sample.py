"""Protects sampling: drawing as transformers does, the same text whoever shares the batch and with
or without the cache, no half characters, and a run directory that is enough to sample from."""

import copy
import dataclasses
import io
import json
import math
import os
import pty
import shutil
import subprocess
import sys

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from training import ENVIRONMENT, overrides, run_many

from checkpoint import checkpoint_paths, find_checkpoint, write_weights
from config import ROOT, ModelConfig, UserError
from corpus.vocabulary import DEFAULTS
from inference.generation import (
    Settings,
    choose,
    drawable,
    fit_to_device,
    generate,
    keep_top_k,
    keep_top_p,
    load_model,
    open_source,
    penalise_repetition,
    uniform_numbers,
)
from inference.linear import PackedLinear, RowLinear, can_pack, pack
from inference.sampler import Completion
from model import Llama, initial_weight
from sample import main
from tokenizer import Tokenizer

VOCAB = 48
CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=40)
needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="torch without oneDNN")
PROMPTS = [[1, 5], [1, 7, 9, 11, 13, 2, 4, 6], [1], [1, 3, 3, 8]]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small a model is slowed down by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    """Weights large enough for logits that are far from uniform."""
    made = Llama(CONFIG, VOCAB).requires_grad_(False)
    for name, parameter in made.named_parameters():
        weight = initial_weight(name, parameter.shape, CONFIG, 0, torch.device("cpu"))
        parameter.copy_(weight * 8 if weight.ndim == 2 else weight)
    return made


def continuations(model, prompts, settings, **options):
    """The generated ids of each prompt."""
    steps = list(generate(model, prompts, settings, **options))
    ids = zip(*(step.ids for step in steps), strict=True)
    return [[token for token in row if token is not None] for row in ids]


def without_cache(model, prompt, settings, sample):
    """The slow truth: one prompt alone, everything computed again for each token."""
    ids = list(prompt)
    randoms = uniform_numbers(settings, [sample])
    for step in range(settings.max_tokens):
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, ids] = True
        logits = model(torch.tensor([ids]))[:, -1]
        ids.append(choose(logits, seen, settings, randoms[:, step]).item())
    return ids[len(prompt) :]


SETTINGS = {
    "greedy": Settings(20, temperature=0),
    "drawn": Settings(20, seed=3),
    "all of it": Settings(20, 0.7, 20, 0.9, 1.3, seed=5),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cache_changes_nothing(model, name):
    settings = SETTINGS[name]
    expected = [without_cache(model, p, settings, i) for i, p in enumerate(PROMPTS)]
    assert continuations(model, PROMPTS, settings) == expected
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)


@pytest.mark.parametrize("name", SETTINGS)
def test_neighbours_change_nothing(model, name):
    together = continuations(model, PROMPTS, SETTINGS[name], samples=[4, 4, 0, 9])
    for prompt, sample, expected in zip(PROMPTS, [4, 4, 0, 9], together, strict=True):
        assert continuations(model, [prompt], SETTINGS[name], samples=[sample]) == [expected]


def test_seed_and_number_choose_the_sample(model):
    draw = lambda seed, samples: continuations(  # noqa: E731
        model, [[1, 5]] * len(samples), Settings(20, seed=seed), samples=samples
    )
    first, second = draw(0, [0, 1])
    assert first != second
    assert draw(0, [1, 0]) == [second, first]
    assert draw(1, [0]) != [first]
    longer = continuations(model, [[1, 5]], Settings(30, seed=0), samples=[0])[0]
    assert longer[:20] == first


def test_greedy_text_is_that_of_transformers(model):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.ffn_dim,
        num_hidden_layers=CONFIG.n_layers,
        num_attention_heads=CONFIG.n_heads,
        num_key_value_heads=CONFIG.n_kv_heads,
        max_position_embeddings=CONFIG.max_seq_len,
        rms_norm_eps=CONFIG.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict())
    for prompt in PROMPTS:
        expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
        expected = expected[0, len(prompt) :].tolist()
        assert continuations(model, [prompt], SETTINGS["greedy"]) == [expected]


@needs_packing
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_model_fit_to_the_cpu_says_the_same(model, rows, compiled):
    fitted = copy.deepcopy(model)
    torch._dynamo.reset()
    counters.clear()
    fit_to_device(fitted, rows == 1, compiled)
    assert type(fitted.lm_head) is (RowLinear if compiled and rows == 1 else PackedLinear)
    for settings in SETTINGS.values():
        expected = continuations(model, PROMPTS[:rows], settings)
        assert continuations(fitted, PROMPTS[:rows], settings) == expected
    assert (counters["stats"]["unique_graphs"] > 0) == compiled


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no products in bfloat16")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_model_fit_to_the_cpu_in_bfloat16(model, rows, compiled):
    """Logits behind the same tokens, since rounding may change what is drawn."""
    fitted = copy.deepcopy(model).bfloat16()
    fit_to_device(fitted, rows == 1, compiled)
    for tested in (fitted, copy.deepcopy(model).bfloat16()):
        cache = tested.new_cache(rows, 9)
        logits = []
        for step in range(9):
            positions = torch.full((rows, 1), step)
            tokens = torch.arange(rows)[:, None] * 5 + step + 2
            logits.append(tested(tokens, cache=cache, positions=positions, length=step + 1))
        exact = model(torch.arange(rows)[:, None] * 5 + torch.arange(9) + 2)
        error = torch.cat(logits, 1).float() - exact
        assert error.norm() < 3e-2 * exact.norm()


@needs_packing
def test_packing_leaves_tied_embeddings(model):
    tied = Llama(dataclasses.replace(CONFIG, tie_embeddings=True), VOCAB).requires_grad_(False)
    tied.model.load_state_dict(model.model.state_dict())
    expected = continuations(tied, PROMPTS, SETTINGS["greedy"])
    fit_to_device(tied, False, False)
    assert continuations(tied, PROMPTS, SETTINGS["greedy"]) == expected


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no products in bfloat16")
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_products_in_bfloat16(rows):
    layer = torch.nn.Linear(48, 32, bias=False).requires_grad_(False)
    x = torch.randn(rows, 2, 48).bfloat16()
    exact = layer.bfloat16().weight.float() @ x.float()[..., None]
    holder = torch.nn.Sequential(layer)
    pack(holder)
    assert torch.allclose(holder(x).float(), exact[..., 0], rtol=1e-2, atol=1e-2)


def test_rows_end_on_their_own(model):
    free = continuations(model, PROMPTS, SETTINGS["drawn"])
    stop = free[0][3]
    for ids, expected in zip(
        continuations(model, PROMPTS, SETTINGS["drawn"], stop_ids=(stop,)), free, strict=True
    ):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert ids == expected[:end]


def test_rows_end_where_the_context_does(model):
    settings = Settings(100, temperature=0)
    found = continuations(model, PROMPTS, settings)
    assert [len(p) + len(ids) for p, ids in zip(PROMPTS, found, strict=True)] == [40] * 4
    assert found[1] == without_cache(model, PROMPTS[1], Settings(32, temperature=0), 0)
    with pytest.raises(AssertionError, match="no room"):
        next(generate(model, [[1] * 40], settings))


def test_only_allowed_ids_are_drawn(model):
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[7, 21]] = True
    for settings in (*SETTINGS.values(), Settings(20, temperature=50.0, top_k=30)):
        for ids in continuations(model, PROMPTS, settings, allowed=allowed):
            assert set(ids) <= {7, 21}


def logits_and_seen():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 200, generator=generator) * 4
    logits[0, 10] = logits[0, 11] = logits[0].max() + 1  # a tie
    logits[1, :50] = -math.inf
    return logits, torch.randint(200, (5, 30), generator=generator)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    transformers = pytest.importorskip("transformers")
    logits, ids = logits_and_seen()
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalise_repetition(logits, seen, penalty), expected)


@pytest.mark.parametrize("k", [1, 2, 50, 199])
def test_top_k_is_that_of_transformers(k):
    transformers = pytest.importorskip("transformers")
    logits, ids = logits_and_seen()
    assert torch.equal(keep_top_k(logits, k), transformers.TopKLogitsWarper(k)(ids, logits))


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(p):
    transformers = pytest.importorskip("transformers")
    logits, ids = logits_and_seen()
    assert torch.equal(keep_top_p(logits, p), transformers.TopPLogitsWarper(p)(ids, logits))


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.5, 0.9, 0.999])
def test_top_p_looks_among_the_likeliest_alone(p):
    logits = logits_and_seen()[0][1:]  # without the tie, of which either may stay
    for among in (1, 5, 30):  # too few for some rows
        assert torch.equal(keep_top_p(logits, p, among), keep_top_p(logits, p))


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0, -1.0]])
    count = 20_000
    randoms = torch.rand(count, generator=torch.Generator().manual_seed(0)).double()
    none = torch.zeros(count, 5, dtype=torch.bool)
    drawn = choose(logits.expand(count, -1), none, Settings(temperature=1.5), randoms)
    shares = torch.bincount(drawn, minlength=5) / count
    torch.testing.assert_close(shares, (logits[0] / 1.5).softmax(0), atol=0.01, rtol=0)
    edges = torch.tensor([0.0, 1 - 2**-24], dtype=torch.float64)
    assert choose(logits.expand(2, -1), none[:2], Settings(), edges).tolist() == [0, 4]


# --- text ---


@pytest.fixture(scope="module", params=[False, True], ids=["as Rocket's", "as Llama 2's"])
def tokenizer(request, tmp_path_factory):
    model = io.BytesIO()
    options = {"vocab_size": 300, "hard_vocab_limit": False, "add_dummy_prefix": request.param}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words and the end of them\n    more words"] * 50),
        model_writer=model,
        **DEFAULTS | options,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def stream(tokenizer, prompt, text, stops=(), cut=None):
    """What a completion shows step by step when the model writes `text` after `prompt`."""
    start = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt + text).tolist()]
    assert ids[: len(start)] == start
    completion = Completion(tokenizer, start, list(stops), [tokenizer.eos_id])
    shown = [completion.add(token) for token in ids[len(start) : cut]]
    return completion, [*shown, completion.add(None)]


@pytest.mark.parametrize(
    "text",
    [
        " words and more",
        "\n    é\U0001f680\u4e2d\u6587 end",
        "\r\n\t\0",
        "\ufffd",
        "x\ufffd end",
        "",
    ],
)
def test_text_streams_in_whole_characters(tokenizer, text):
    completion, shown = stream(tokenizer, "some", text)
    assert completion.text == text
    assert "".join(shown) == completion.text
    assert "".join(shown).count("\ufffd") <= text.count("\ufffd")
    assert completion.end == "length"


def test_half_a_character_is_not_shown(tokenizer):
    completion, shown = stream(tokenizer, "some", " a\U0001f680", cut=-1)
    assert completion.text == "".join(shown) == " a"


def byte_ids(tokenizer, content):
    return [tokenizer.processor.piece_to_id(f"<0x{byte:02X}>") for byte in content]


@pytest.mark.parametrize("content", [b"\xf0\x9f\x9a", b"\xe4\xb8", b"\xc3"])
def test_half_a_character_that_is_all_there_is_is_seen(tokenizer, content):
    start = [tokenizer.bos_id, *tokenizer.encode("some").tolist()]
    for end in (None, tokenizer.eos_id):
        completion = Completion(tokenizer, start, [], [tokenizer.eos_id])
        assert not any(completion.add(token) for token in byte_ids(tokenizer, content))
        assert completion.add(end) == completion.text == "\ufffd" * len(content)


BYTES = st.sampled_from(b"a\n\x80\x9f\xbf\xc3\xe4\xed\xef\xf0\xf5\xff")


@given(parts=st.lists(st.lists(BYTES, max_size=5).map(bytes) | st.just("words"), max_size=8))
def test_broken_bytes_are_seen_as_soon_as_no_character_can_come_of_them(tokenizer, parts):
    """Whatever the bytes: what streams is what the tokenizer decodes, at most three bytes late."""
    start = [tokenizer.bos_id, *tokenizer.encode("some").tolist()]
    completion, ids, shown = Completion(tokenizer, start, [], [tokenizer.eos_id]), [*start], "some"
    for part in parts:
        text = tokenizer.encode(part).tolist() if isinstance(part, str) else None
        for token in text or byte_ids(tokenizer, part):
            ids.append(token)
            shown += completion.add(token)
            assert tokenizer.decode(ids).startswith(shown)
            assert len(tokenizer.decode(ids)) - len(shown) <= 3
    shown += completion.add(tokenizer.eos_id)
    assert shown == "some" + completion.text == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", ["the end", "e", "\n", "\U0001f680", " the end of"])
def test_stop_strings_cross_token_borders(tokenizer, stop):
    text = " words and the end of them\n and \U0001f680 words"
    completion, shown = stream(tokenizer, "some", text, [stop, "never", "words and never"])
    assert completion.text == "".join(shown) == text[: text.index(stop)]
    assert completion.end == "stop"


def test_text_that_only_begins_like_a_stop_string_is_shown(tokenizer):
    completion, shown = stream(tokenizer, "some", " words and the en", ["the end"])
    assert completion.text == "".join(shown) == " words and the en"
    assert not any("the" in text for text in shown[:-1])


def test_the_stop_string_that_is_complete_first_ends_it(tokenizer):
    completion, _ = stream(tokenizer, "some", " words and the end", ["end", "the", "nd the en"])
    assert completion.text == " words and "


def test_eos_ends_it(tokenizer):
    completion = Completion(tokenizer, [tokenizer.bos_id], [], [tokenizer.eos_id])
    for token in [*tokenizer.encode("the end").tolist(), tokenizer.eos_id, 300, None]:
        completion.add(token)
    assert (completion.text, completion.end) == ("the end", "eos")


def test_control_pieces_and_spare_rows_are_never_drawn(tokenizer):
    """A model may have more rows than its tokenizer has pieces."""
    size = tokenizer.vocab_size
    allowed = drawable(tokenizer, size + 8)
    assert allowed[:8].tolist() == [False, False, True, *[False] * 5]  # EOS alone
    assert allowed[8:size].all()
    assert not allowed[size:].any()


# --- the program, on real runs ---


@pytest.fixture(scope="module")
def runs(dataset, tiny_tokenizer, tmp_path_factory):
    """Two trained runs, the second with tied embeddings, each with two checkpoints."""
    directory = tmp_path_factory.mktemp("runs")
    keys = {"checkpoint__interval": 10, "checkpoint__keep_last": 2, "train__max_steps": 20}
    untied = overrides(dataset, tiny_tokenizer, directory / "untied", **keys)
    tied = overrides(
        dataset, tiny_tokenizer, directory / "tied", **keys, model__tie_embeddings="true"
    )
    done = run_many([untied, tied])
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def run(runs, tmp_path):
    """A run directory that was copied elsewhere."""
    return shutil.copytree(runs / "untied", tmp_path / "run")


def sample(capsys, *arguments):
    main([str(a) for a in (*arguments, "--dtype=float32")])
    return capsys.readouterr()


def test_continues_a_prompt(run, capsys):
    shown = sample(capsys, run, "--prompt=def main(", "--max-tokens=20", "--seed=1")
    assert shown.out.startswith("def main(")
    assert "step 20, validation loss" in shown.err
    assert sample(capsys, run, "--prompt=def main(", "--max-tokens=20", "--seed=1") == shown
    other = sample(capsys, run, "--prompt=def main(", "--max-tokens=20", "--seed=2")
    assert other.out != shown.out


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_weights_are_those_of_the_checkpoint(runs, name):
    checkpoint = find_checkpoint(runs / name, "last")
    source = open_source(runs / name, "last")
    model = load_model(source, torch.device("cpu"), torch.float32)
    for parameter, weight in model.named_parameters():
        assert torch.equal(weight, checkpoint.tensor("model", parameter))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")


def test_which_checkpoint(run, capsys):
    last, first = checkpoint_paths(run)
    for choice, step in (("last", 20), ("best", 20), (first, 10), (last, 20)):
        shown = sample(capsys, run, "--prompt=a", "--max-tokens=1", f"--checkpoint={choice}")
        assert f"step {step}," in shown.err
    shown = sample(capsys, first, "--prompt=a", "--max-tokens=1")
    assert "step 10," in shown.err


def test_prompt_files_and_json(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("def main(\n\nimport os\r\nclass")
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in ("def main(", "import os", "class"))
    )
    options = ("--max-tokens=12", "--num-samples=2", "--batch-size=4")
    plain = sample(capsys, run, f"--prompt-file={tmp_path / 'p.txt'}", *options).out
    assert plain == sample(capsys, run, f"--prompt-file={tmp_path / 'p.jsonl'}", *options).out
    assert plain.count("--- prompt ") == 6

    rows = sample(capsys, run, f"--prompt-file={tmp_path / 'p.txt'}", *options, "--json").out
    rows = [json.loads(row) for row in rows.splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (prompt, i) for prompt in ("def main(", "import os", "class") for i in range(2)
    ]
    for row in rows:
        assert row["prompt"] + row["completion"] in plain
        assert row["end"] in ("length", "eos")
    alone = sample(capsys, run, "--prompt=import os", "--max-tokens=12", "--json").out
    assert json.loads(alone) == rows[2]


def test_json_tells_each_token(run, capsys):
    arguments = ["--prompt=def main(", "--max-tokens=8", "--temperature=0", "--json"]
    shown = sample(capsys, run, *arguments, "--logprobs=3", "--seed=5").out
    row = json.loads(shown)
    tokens = row["logprobs"]
    assert len(tokens) == row["tokens"]
    assert row["settings"]["seed"] == 5
    assert row["step"] == 20
    source = open_source(run)
    ids = [source.tokenizer.bos_id, *source.tokenizer.encode("def main(").tolist()]
    ids += [token["id"] for token in tokens]
    model = load_model(source, torch.device("cpu"), torch.float32)
    logs = model(torch.tensor([ids])).double().log_softmax(-1)[0, -len(tokens) - 1 : -1]
    for of_model, token in zip(logs, tokens, strict=True):
        assert token["logprob"] == pytest.approx(of_model[token["id"]].item(), abs=1e-5)
        best = [likely["logprob"] for likely in token["likeliest"]]
        assert best == pytest.approx(of_model.topk(3).values.tolist(), abs=1e-5)
        assert token["piece"] == source.tokenizer.processor.id_to_piece(token["id"])
    assert "logprobs" not in json.loads(sample(capsys, run, *arguments).out)


def test_streams_to_a_terminal(run, capsys):
    arguments = ["--prompt=def é(", "--max-tokens=20", "--stop=zzz"]
    expected = sample(capsys, run, *arguments).out
    ours, theirs = pty.openpty()
    command = [sys.executable, ROOT / "sample.py", run, *arguments, "--dtype=float32"]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # how Linux says that the other end has closed
        pass
    assert process.wait() == 0
    assert shown.decode().replace("\r\n", "\n") == expected


@pytest.mark.parametrize("byte", [0x80, 0xF0])
def test_a_model_that_says_only_broken_bytes_is_seen_to(run, tmp_path, capsys, byte):
    """0x80 begins no character; after 0xF0 its others are missing. Alone, in JSON and in a chat."""
    checkpoint = find_checkpoint(run, "last")
    template = {role: role + ": {content}\n" for role in ("user", "assistant")}
    (byte_id,) = byte_ids(open_source(run).tokenizer, bytes([byte]))

    def weights():  # the same residual stream everywhere, and a head that knows one byte
        for name, shape in checkpoint.shapes("model").items():
            weight = torch.zeros(shape) if "layers" in name else torch.ones(shape)
            if name == "lm_head.weight":
                weight[torch.arange(len(weight)) != byte_id] = 0
            yield name, weight

    record = {k: v for k, v in checkpoint.manifest.items() if k not in ("tensors", "files")}
    path = tmp_path / "broken" / "checkpoints" / "step_00000020"
    write_weights(path, record | {"template": template}, weights())
    shutil.copy(run / "tokenizer.model", tmp_path / "broken")
    arguments = [tmp_path / "broken", "--prompt=a", "--max-tokens=3", "--temperature=0"]
    seen = "\ufffd" * (3 if byte == 0x80 else 2)  # the limit may have cut the last one's character
    assert sample(capsys, *arguments).out == f"a{seen}\n"
    assert sample(capsys, *arguments, "--chat").out == f"{seen}\n"
    row = json.loads(sample(capsys, *arguments, "--json").out)
    assert (row["completion"], row["tokens"]) == (seen, 3)
    row = json.loads(sample(capsys, *arguments, "--json", "--max-tokens=1").out)
    assert (row["completion"], row["tokens"]) == ("\ufffd", 1)


def test_asks_at_a_terminal(run, capsys, monkeypatch):
    lines = iter(["def main(", "x" * 500, "import os"])

    def answer():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    shown = sample(capsys, run, "--max-tokens=5")
    assert "def main(" in shown.out
    assert "import os" in shown.out
    assert "max_seq_len" in shown.err


def test_the_context_is_filled_but_for_an_explicit_wish(run, capsys):
    row = json.loads(sample(capsys, run, "--prompt=a", "--temperature=0", "--json").out)
    assert row["end"] == "eos" or row["tokens"] == 64 - 2
    with pytest.raises(UserError, match=r"2 tokens and 63 to come .*max_seq_len \(64\)"):
        sample(capsys, run, "--prompt=a", "--max-tokens=63")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=a", "--temperature=-1"], "temperature.*0 to 100"),
        (["--prompt=a", "--temperature=nan"], "temperature"),
        (["--prompt=a", "--top-p=1.5"], "top-p.*0 to 1"),
        (["--prompt=a", "--max-tokens=x"], "max-tokens"),
        (["--prompt=a", "--stop="], "--stop is empty"),
        (["--prompt=a", "--frobnicate"], "frobnicate"),
        (["--prompt=a", "--prompt-file=b"], "give one"),
        (["--prompt=a", "--checkpoint=/nowhere"], "/nowhere"),
        (["--prompt=" + "x" * 300], r"max_seq_len \(64\)"),
        (["--prompt=\udce9"], "UTF-8"),
        (["--prompt-file=/nowhere"], "/nowhere: No such file"),
        ([], "--prompt"),
        (["--prompt=a", "--logprobs=2"], "--logprobs is for --json"),
        (["--evaluate=val", "--compile"], "--compile is for samples"),
        (["--evaluate=val", "--prompt=a"], "--evaluate and --prompt: give one"),
        (["--evaluate=test"], "no test split"),
        (["--evaluate=/nowhere.txt"], "/nowhere.txt: No such file"),
        (["--choices=/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
    ],
)
def test_mistakes(run, capsys, arguments, words):
    with pytest.raises(UserError, match=words) as error:
        sample(capsys, run, *arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b'{"text": "a"}', b"not JSON", b"[1]", b'{"prompt": 1}'])
def test_a_bad_row_is_named(run, tmp_path, capsys, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + content)
    with pytest.raises(UserError, match=r"p\.jsonl, row 2"):
        sample(capsys, run, f"--prompt-file={path}")


def test_refuses_another_tokenizer(run):
    (run / "tokenizer.model").write_bytes((run / "tokenizer.model").read_bytes() + b"\x12\x00")
    command = [sys.executable, ROOT / "sample.py", run, "--prompt=a"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "is not the tokenizer" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_missing_run(tmp_path, capsys):
    with pytest.raises(UserError, match="no checkpoint"):
        sample(capsys, tmp_path / "gone", "--prompt=a")
