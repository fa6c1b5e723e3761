"""Protects the optimizer's groups, Muon alone and on several ranks, and the schedules."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from training import assert_identical, losses, overrides, run_many

from config import ModelConfig, OptimizerConfig
from model import Llama, initial_weight
from optimizer import build_optimizer, learning_rate, orthogonalize


def rates(schedule, steps=100, **options):
    config = OptimizerConfig(schedule=schedule, learning_rate=1.0, warmup_steps=10, **options)
    return [learning_rate(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_reaches_the_peak_and_never_rises_again(schedule):
    found = rates(schedule)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(found) == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(found[10:]))


def test_where_each_schedule_ends():
    assert rates("cosine")[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates("cosine", min_lr_fraction=0.0)[-1] == pytest.approx(0.0, abs=1e-3)
    assert rates("linear")[-1] == pytest.approx(1 / 90)
    assert rates("constant")[-1] == 1.0
    wsd = rates("wsd", decay_fraction=0.2)
    assert wsd[80] == 1.0
    assert wsd[90] == pytest.approx(0.5)
    assert wsd[-1] == pytest.approx(0.05)


def test_decay_is_on_matrices_only():
    model = small_llama()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5, learning_rate=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.allclose(new, old * (1 - 0.1 * 0.5) if old.ndim == 2 else old)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_orthogonalizing_leaves_singular_vectors_and_brings_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ orthogonalize(matrices) @ right.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert (inner - values.diag_embed()).abs().max() < 1e-4


def test_rows_of_zeros_change_nothing():
    matrix = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    padded = nn.functional.pad(matrix, (0, 0, 0, 5))
    expected = nn.functional.pad(orthogonalize(matrix), (0, 0, 0, 5))
    assert torch.allclose(orthogonalize(padded), expected, atol=1e-5)
    assert not orthogonalize(torch.zeros(1, 3, 4)).any()


def small_llama():
    torch.manual_seed(0)
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=65, max_seq_len=16)
    return Llama(config, vocab_size=50)


def moved(optimizer_name, dim, n_layers, base_dim, rate, tied=False):
    """Root mean square of what three steps change in the logits of a model, of random tokens."""
    base = {"base_dim": base_dim, "base_layers": 2} if base_dim else {}
    heads = {"n_heads": dim // 32, "n_kv_heads": dim // 32, "tie_embeddings": tied}
    shape = ModelConfig(dim=dim, n_layers=n_layers, ffn_dim=3 * dim, **heads, **base)
    model = Llama(shape, vocab_size=64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(name, p.shape, shape, 1, p.device))
    config = OptimizerConfig(optimizer_name, learning_rate=rate)
    optimizer = build_optimizer(model, config)
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    before = model(tokens).detach()
    for _ in range(3):
        model(tokens, tokens.roll(-1, 1)).div(tokens.numel()).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        optimizer.step()
        optimizer.zero_grad()
    return (model(tokens) - before).square().mean().sqrt().item()


@pytest.mark.parametrize(("name", "rate"), [("adamw", 2e-3), ("muon", 8e-3)])
def test_with_a_base_steps_change_wide_and_deep_models_as_much_as_small_ones(name, rate):
    """The coordinate check of arXiv 2203.03466, at 8 times the width, and at 4 times the depth."""
    small = moved(name, 64, 2, 64, rate)
    assert moved(name, 64, 2, 0, rate) == small  # the base itself is as without a base
    assert moved(name, 512, 2, 64, rate) == pytest.approx(small, rel=0.3)
    assert moved(name, 64, 8, 64, rate) == pytest.approx(small, rel=0.3)
    assert moved(name, 512, 2, 0, rate) > 1.5 * small
    tied = moved(name, 64, 2, 64, rate, tied=True)
    assert moved(name, 512, 2, 64, rate, tied=True) == pytest.approx(tied, rel=0.3)


def set_gradients(model):
    tokens = torch.randint(50, (2, 16))
    model(tokens, tokens).backward()


def test_muon_is_torchs_on_the_blocks_matrices_and_adamw_on_the_rest():
    ours, theirs = small_llama(), small_llama()
    inner = [p for n, p in theirs.named_parameters() if "layers" in n and p.ndim == 2]
    outer = [p for n, p in theirs.named_parameters() if "layers" not in n and p.ndim == 2]
    norms = [p for p in theirs.parameters() if p.ndim == 1]
    rate = {"lr": 0.01, "weight_decay": 0.3}
    groups = [{"params": outer}, {"params": norms, "weight_decay": 0.0}]
    references = [
        torch.optim.Muon(inner, **rate, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, **rate, betas=(0.9, 0.95)),
    ]
    config = OptimizerConfig("muon", learning_rate=0.01, weight_decay=0.3, momentum=0.9)
    optimizer = build_optimizer(ours, config, torch.bfloat16)  # as torch's orthogonalises
    before = [p.detach().clone() for p in ours.parameters()]
    for _ in range(3):
        set_gradients(ours)
        for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
            yours.grad = mine.grad.clone()
        for each in (optimizer, *references):
            each.step()
            each.zero_grad()
    for old, mine, yours in zip(before, ours.parameters(), theirs.parameters(), strict=True):
        assert (mine - yours).norm() < 0.01 * (yours - old).norm()


def test_a_step_with_found_inf_changes_not_a_bit():
    model = small_llama()
    optimizer = build_optimizer(model, OptimizerConfig("muon"))
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
    set_gradients(model)
    optimizer.step()

    def everything():
        return [
            tensor.detach().clone().view(torch.int32)
            for p in model.parameters()
            for tensor in (p, *optimizer.state[p].values())
        ]

    for damage in (float("nan"), float("inf"), 1.0):
        before = everything()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, damage)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert all(map(torch.equal, before, everything()))
    set_gradients(model)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not any(map(torch.equal, before, everything()))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.long
def test_muon_on_two_ranks_is_that_of_one_and_resumes_bit_identically(
    dataset, tiny_tokenizer, tmp_path
):
    """20 float32 steps within 1e-4; 65 rows are 33 and 32, and of some shapes there is a matrix too
    few for every rank."""

    def run(name, **values):
        keys = {"optimizer__name": "muon", "model__ffn_dim": 65, "model__n_layers": 1, **values}
        return overrides(dataset, tiny_tokenizer, tmp_path / name, **keys)

    sharded = {"parallel__strategy": "fsdp"}
    halved = run("halved", **sharded)
    together = [
        run("ddp"),
        run("fsdp", **sharded),
        [*halved, "--train.stop_at_step=10"],
        halved,
    ]
    for runs, ranks in (([run("alone")], 1), (together, 2)):
        done = run_many(runs, ranks)
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stderr
    for name in ("ddp", "fsdp"):
        differences = np.subtract(losses(tmp_path / name), losses(tmp_path / "alone"))
        assert len(differences) == 20
        assert np.abs(differences).max() < 1e-4
    assert_identical(tmp_path / "fsdp", tmp_path / "halved")
