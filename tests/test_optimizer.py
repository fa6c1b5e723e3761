"""Protects the optimizer's groups and the learning-rate schedules."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from config import OptimizerConfig
from optimizer import build_optimizer, learning_rate


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
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.RMSNorm(4))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5, learning_rate=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrix, norm = model.parameters()
    assert torch.allclose(matrix, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(norm, before[1])
