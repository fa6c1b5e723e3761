"""Protects the model: it is Llama 2 (transformers is the reference), sees no future and no other
document, starts from weights that seed and name alone determine, and generates the same with and
without its cache. What saves memory or time (chunks of the loss, recomputing, compiling) changes
neither loss nor gradients, and does save what it is for."""

import collections
import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import ROOT, ModelConfig, build_config, read_toml
from fast import IGNORE, LinearCrossEntropy, attend, attend_by_products, chunk_loss
from model import Llama, flops_per_token, initial_weight, parameter_count

VOCAB = 64
SMALL = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=48, max_seq_len=32)
SHAPES = {
    "MHA": SMALL,
    "GQA": dataclasses.replace(SMALL, n_kv_heads=2),
    "MQA": dataclasses.replace(SMALL, n_kv_heads=1),
    "tied": dataclasses.replace(SMALL, tie_embeddings=True),
    "GQA tied": dataclasses.replace(SMALL, n_kv_heads=2, tie_embeddings=True),
    "other constants": dataclasses.replace(SMALL, rope_theta=500.0, norm_eps=1e-2),
    # Llama 2 70B with its 8 query heads to a key head, 3.5 dim in the feed-forward, at 1/64 width
    "Llama 2": ModelConfig(
        dim=128, n_layers=4, n_heads=16, n_kv_heads=2, ffn_dim=448, max_seq_len=4096
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small a model is slowed down by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SHAPES)
def config(request):
    return SHAPES[request.param]


def build(config, seed=0, scale=1.0, **options):
    """A model with its initial weights; a larger scale makes attention and logits less uniform."""
    model = Llama(config, VOCAB, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = initial_weight(name, parameter.shape, config, seed, torch.device("cpu"))
            parameter.copy_(weight * scale if weight.ndim == 2 else weight + 0.1)
    return model


def tokens_of(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def reference(model):
    """The same weights in transformers' LlamaForCausalLM, moved without renaming."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=c.dim,
            intermediate_size=c.ffn_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tie_embeddings,
        )
    )
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs


def assert_close(ours, theirs, bound=1e-4):
    """Within 1e-4 of the largest, the project's bound (measured: about 1e-6)."""
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_attention_by_products_is_the_kernels(n_kv_heads):
    q = torch.randn(2, 4, 7, 16)
    k, v = torch.randn(2, 2, n_kv_heads, 7, 16)
    heads = q.unflatten(1, (n_kv_heads, -1))
    causal = torch.full((7, 7), -math.inf).triu(1)
    products = attend_by_products(heads, k[:, :, None], v[:, :, None], causal).flatten(1, 2)
    assert torch.allclose(products, attend(q, k, v, None), atol=1e-6)


def test_compiled_bfloat16_attention_is_near_that_of_float32():
    q, k, v = torch.randn(3, 2, 4, 40, 16, dtype=torch.bfloat16)
    compiled = torch.compile(attend, fullgraph=True)(q, k, v, None)
    exact = attend(q.float(), k.float(), v.float(), None)
    assert (compiled.float() - exact).norm() < 2e-2 * exact.norm()


def test_logits_and_gradients_are_those_of_transformers(config):
    model = build(config, scale=5.0)
    theirs = reference(model)
    tokens, targets = tokens_of(3, 17), tokens_of(3, 17, seed=1)
    expected = theirs(input_ids=tokens).logits
    assert_close(model(tokens), expected)

    torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), targets.flatten(), reduction="sum"
    ).backward()
    model(tokens, targets).backward()
    gradients = dict(theirs.named_parameters())
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name].grad)


def test_the_state_dict_comes_back_from_transformers(config):
    model = build(config)
    other = Llama(config, VOCAB)
    other.load_state_dict(reference(model).state_dict(), strict=True)
    tokens = tokens_of(2, 9)
    assert torch.equal(model(tokens), other(tokens))


@torch.no_grad()
def test_a_token_never_changes_logits_before_it(config):
    model = build(config, scale=5.0)
    tokens = tokens_of(2, 16)
    before = model(tokens)
    for t in range(16):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all()  # and reaches each one from it on


LENGTHS = (5, 9, 2)  # of three documents in a row


@torch.no_grad()
def packed_and_alone(config, masked):
    """Logits of documents in one row, and of each in a row of its own, end to end."""
    model, tokens = build(config, scale=5.0), tokens_of(2, sum(LENGTHS))
    documents = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)).expand(2, -1)
    alone = torch.cat([model(part) for part in tokens.split(LENGTHS, dim=1)], dim=1)
    return model(tokens, documents=documents if masked else None), alone


def test_packed_documents_have_the_logits_of_each_alone(config):
    """Though their positions run on; without a mask the same comparison finds the leak."""
    assert_close(*packed_and_alone(config, masked=True), bound=1e-5)
    leaking, alone = packed_and_alone(config, masked=False)
    assert_close(leaking[:, : LENGTHS[0]], alone[:, : LENGTHS[0]])
    with pytest.raises(AssertionError):
        assert_close(leaking, alone)


@pytest.mark.parametrize("first", [7, 1100])  # the second is more than a block of the kernel
@pytest.mark.parametrize("shape", ["MHA", "GQA"])
def test_a_document_never_reaches_another(shape, first):
    """Neither its loss, to the bit, nor a gradient of it, which is exactly zero."""
    model, length = build(SHAPES[shape], scale=5.0), first + 8
    tokens, targets = tokens_of(1, length), tokens_of(1, length, seed=1)
    targets[:, :first] = IGNORE
    documents = (torch.arange(length) >= first).long()[None]
    embedded = []
    model.model.embed_tokens.register_forward_hook(lambda *call: embedded.append(call[-1]))

    def loss_and_gradient(documents):
        loss = model(tokens, targets, documents)
        (gradient,) = torch.autograd.grad(loss, embedded[-1])
        return loss, gradient

    loss, gradient = loss_and_gradient(documents)
    assert not gradient[:, :first].any()
    assert gradient[:, first:].any(-1).all()
    _, leaking = loss_and_gradient(None)
    assert leaking[:, :first].any(-1).all()
    tokens[:, :first] = (tokens[:, :first] + 1) % VOCAB
    after, gradient_after = loss_and_gradient(documents)
    assert torch.equal(after, loss)
    assert torch.equal(gradient_after, gradient)


def test_initial_loss_of_the_tiny_config_is_the_log_of_its_vocabulary():
    tiny = build_config(read_toml(ROOT / "config" / "tiny.toml"))
    config, vocab_size = tiny.model, tiny.tokenizer.vocab_size
    model = Llama(config, vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                initial_weight(name, parameter.shape, config, 1337, torch.device("cpu"))
            )
        tokens = torch.randint(vocab_size, (4, 65), generator=torch.Generator().manual_seed(0))
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    assert abs(loss.item() - math.log(vocab_size)) < 0.1


def test_initial_weights_are_a_pure_function_of_seed_and_name():
    cpu, shape = torch.device("cpu"), torch.Size((64, 64))
    make = lambda name, seed: initial_weight(name, shape, SMALL, seed, cpu)  # noqa: E731
    first = make("model.layers.0.self_attn.q_proj.weight", 1)
    torch.manual_seed(99)
    assert torch.equal(make("model.layers.0.self_attn.q_proj.weight", 1), first)
    assert not torch.equal(make("model.layers.0.self_attn.q_proj.weight", 2), first)
    assert not torch.equal(make("model.layers.1.self_attn.q_proj.weight", 1), first)
    assert first.std().item() == pytest.approx(SMALL.init_std, rel=0.05)
    residual = make("model.layers.0.mlp.down_proj.weight", 1)
    assert residual.std().item() == pytest.approx(SMALL.init_std / 2, rel=0.05)  # 2 layers
    assert torch.equal(
        initial_weight("model.norm.weight", torch.Size((8,)), SMALL, 1, cpu), torch.ones(8)
    )


def test_loss_is_the_sum_over_trained_tokens():
    model = build(SMALL)
    tokens, targets = tokens_of(2, 8), tokens_of(2, 8, seed=1)
    targets[0, 3:] = IGNORE
    log_p = model(tokens).log_softmax(-1)
    expected = -sum(
        log_p[b, t, targets[b, t]] for b in range(2) for t in range(8) if targets[b, t] != IGNORE
    )
    loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    assert model(tokens, torch.full_like(targets, IGNORE)).item() == 0.0


class Operators(TorchDispatchMode):
    """Counts operators, and the most rows of logits that one of them made."""

    def __init__(self):
        super().__init__()
        self.counts, self.logit_rows = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.counts[function] += 1
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB,):
                self.logit_rows = max(self.logit_rows, tensor.numel() // VOCAB)
        return made


def loss_and_gradients(model, tokens, targets, **options):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", enabled=options.get("bfloat16", False)):
        loss = model(tokens, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("chunk", [0, 1, 7, 17, 1000])
def test_the_loss_in_chunks_is_the_loss(config, chunk, bfloat16):
    model = build(config, scale=5.0, loss_chunk=chunk)
    tokens, targets = tokens_of(3, 17), tokens_of(3, 17, seed=1)
    targets[0, 3:] = targets[1, 5] = IGNORE
    with torch.autocast("cpu", enabled=bfloat16):
        logits = model(tokens).flatten(0, 1).float()
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    wanted = dict(zip(dict(model.named_parameters()), grad_of(expected, model), strict=True))
    loss, gradients = loss_and_gradients(model, tokens, targets, bfloat16=bfloat16)
    assert_close(loss, expected.detach(), 1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], 2e-2 if bfloat16 else 1e-4)
    with torch.no_grad(), torch.autocast("cpu", enabled=bfloat16):
        assert_close(model(tokens, targets), loss, 1e-6)


def test_rows_of_zeros_below_the_head_change_nothing():
    """As on a GPU, where a head of 37 rows is multiplied as one of 64."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (20, 37))
    targets = torch.randint(37, (20,), generator=generator)
    found = []
    for missing in (0, 27):
        padded = torch.nn.functional.pad(weight, (0, 0, 0, missing))
        loss = LinearCrossEntropy.apply(x, padded, targets, 37, 7, chunk_loss, True)
        found.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for plain, filled in zip(*found, strict=True):
        assert plain.shape == filled.shape
        torch.testing.assert_close(plain, filled)


def test_the_residual_stream_has_the_type_of_products(config):
    """As when the model is sharded, which casts the embedding's weights."""
    model, types = build(config), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens_of(2, 8))
    assert set(types) == {torch.bfloat16}


def grad_of(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_no_more_logits_than_a_chunk_ever_exist(training):
    config = dataclasses.replace(SMALL, dim=24, n_heads=4, ffn_dim=40)  # nothing else has 64
    seen = {}
    for chunk in (0, 30):
        model = build(config, loss_chunk=chunk)
        model.requires_grad_(training)
        with Operators() as operators, torch.set_grad_enabled(training):
            loss = model(tokens_of(3, 20), tokens_of(3, 20, seed=1))
            if training:
                loss.backward()
        seen[chunk] = operators.logit_rows
    assert seen == {0: 60, 30: 30}


def test_recomputing_makes_again_what_it_says_and_nothing_else():
    products = torch.ops.aten.mm.default
    counts, results = {}, {}
    for recompute in ("none", "selective", "block"):
        model = build(SMALL, scale=5.0, recompute=recompute)
        with Operators() as operators:
            results[recompute] = loss_and_gradients(
                model, tokens_of(3, 17), tokens_of(3, 17, seed=1)
            )
        counts[recompute] = operators.counts
        loss, gradients = results[recompute]
        assert torch.equal(loss, results["none"][0])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, results["none"][1][name])
    again = counts["block"][products] - counts["none"][products]
    assert again == 6 * SMALL.n_layers  # a block's last product is not needed to go backwards
    assert counts["selective"][products] == counts["none"][products]
    silu = torch.ops.aten.silu.default
    assert counts["selective"][silu] == 2 * counts["none"][silu] == 2 * SMALL.n_layers


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_compiled_is_the_same_in_one_graph(recompute):
    """Of a step's two graphs, block and loss, there is one each for all layers and steps."""
    config = dataclasses.replace(SHAPES["GQA"], n_layers=12)
    tokens, targets = tokens_of(3, 20), tokens_of(3, 20, seed=1)
    expected = loss_and_gradients(build(config, scale=5.0), tokens, targets)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(config, scale=5.0, recompute=recompute, loss_chunk=30)
    model.compile_parts()
    for _ in range(3):
        loss, gradients = loss_and_gradients(model, tokens, targets)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert_close(loss, expected[0], 1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[1][name])
    for _ in range(2):
        with torch.no_grad():
            assert_close(model(tokens, targets), loss, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]
    theirs = reference(model)
    assert_close(model(tokens), theirs(input_ids=tokens).logits)


def test_embeddings_stay_tied_on_their_way_from_the_meta_device():
    config = SHAPES["tied"]
    with torch.device("meta"):
        model = Llama(config, VOCAB)
    model.to_empty(device="cpu")
    model.tie()
    model.to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_parameter_counts():
    by_hand = VOCAB * 32 * 2 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert parameter_count(SMALL, VOCAB) == by_hand
    assert parameter_count(SHAPES["tied"], VOCAB) == by_hand - VOCAB * 32
    llama2_7b = ModelConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11_008)
    assert parameter_count(llama2_7b, 32_000) == 6_738_415_616
    llama2_70b = ModelConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28_672)
    assert parameter_count(llama2_70b, 32_000) == 68_976_648_192


def test_flops_count_what_a_token_is_multiplied_with():
    matrices = parameter_count(SMALL, VOCAB) - VOCAB * 32
    assert flops_per_token(SMALL, VOCAB, 16) == 6 * matrices + 12 * 2 * 32 * 16
    tied = flops_per_token(SHAPES["tied"], VOCAB, 16)
    assert tied == flops_per_token(SMALL, VOCAB, 16)


@torch.no_grad()
def test_cached_logits_are_those_without_a_cache(config):
    """A batch of unequal rows: a prompt in one pass, then the rest token by token."""
    model = build(config, scale=5.0)
    tokens, prompts, steps = tokens_of(3, 16), torch.tensor([2, 7, 4]), 6
    cache = model.new_cache(3, 7 + steps)
    whole = model(tokens)
    positions, rows = torch.arange(7)[None].expand(3, -1), torch.arange(3)
    last = rows[:, None], prompts[:, None] - 1
    logits = model(tokens[:, :7], cache=cache, positions=positions, length=7, logits_at=last)
    torch.testing.assert_close(logits[:, 0], whole[rows, prompts - 1])
    for step in range(steps):
        position = prompts + step  # the tokens behind the shorter prompts are written over
        logits = model(
            tokens[rows, position][:, None],
            cache=cache,
            positions=position[:, None],
            length=7 + step + 1,
        )
        torch.testing.assert_close(logits[:, 0], whole[rows, position])


def test_the_cache_has_its_length():
    model = build(SMALL)
    cache = model.new_cache(1, 4)
    tokens, positions = tokens_of(1, 5), torch.arange(5)[None]
    with pytest.raises(AssertionError, match="shorter"):
        model(tokens, cache=cache, positions=positions, length=5)
    with pytest.raises(IndexError):
        model(tokens, cache=cache, positions=positions, length=4)


def test_bfloat16_is_close():
    model, tokens = build(SMALL, scale=5.0), tokens_of(2, 16)
    expected = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
