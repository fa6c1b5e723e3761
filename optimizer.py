"""The optimizer and its learning rate: AdamW with decay on matrices only, and the schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over the model's parameters, sharded or not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # fused: one kernel for all parameters; the foreach path leaks over DTensors from torch 2.12 on
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """The rate of step 0 … max_steps - 1: linear warm-up, then the schedule.

    cosine falls to min_lr_fraction of the peak, linear to zero; wsd stays at the peak and falls
    linearly to zero over the last decay_fraction of the run (arXiv 2405.18392).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    if config.schedule == "cosine":
        low = config.min_lr_fraction
        factor = low + (1 - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    elif config.schedule == "linear":
        factor = max(0.0, 1 - progress)
    elif config.schedule == "wsd":
        factor = min(1.0, (max_steps - step) / max(1.0, config.decay_fraction * max_steps))
    else:
        factor = 1.0
    return config.learning_rate * factor
