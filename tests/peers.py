"""What bench.py compares Rocket with: other trainers, other samplers, and the package datasets.

Each does Rocket's work in its own way: the shape of CONFIG, its own model, optimizer and loss. Of
nanogpt and llama2.c the code comes from a clone, `nanogpt:PATH` and `llama2.c:PATH`; transformers
and datasets are packages. `:compile` behind a trainer compiles its model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import load_module
from config import Config, UserError

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of a model, of tokens and targets (B, T)


def clone_file(peer: str, name: str) -> Path:
    """A file of the clone that `NAME:PATH` names; UserError if it is not there."""
    path = Path(peer.removesuffix(":compile").partition(":")[2]).expanduser() / name
    if not path.is_file():
        raise UserError(f"--peer={peer}: {path} is not there; write NAME:PATH of a clone")
    return path


def trainer(peer: str, config: Config, world: Any, batches: list) -> tuple[Callable[[], Any], int]:
    """A step over the batches, and the number of parameters.

    Raises:
        UserError: there is no such peer, or not its clone.
    """
    name = peer.partition(":")[0]
    if name not in TRAINERS:
        raise UserError(f"--peer={peer}: one of {', '.join(TRAINERS)}")
    model, optimizer, loss_of = TRAINERS[name](peer, config, world.device)
    called = torch.compile(model) if peer.endswith(":compile") else model
    mixed = world.dtype != torch.float32

    def step() -> None:
        for tokens, targets, _ in batches:
            with torch.autocast(world.device.type, dtype=world.dtype, enabled=mixed):
                loss = loss_of(called, tokens, targets) / len(batches)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(parameter.numel() for parameter in model.parameters())


def nanogpt(
    peer: str, config: Config, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, Loss]:
    code, shape = load_module(clone_file(peer, "model.py")), config.model
    options = code.GPTConfig(
        block_size=config.data.seq_len,
        vocab_size=config.tokenizer.vocab_size,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_embd=shape.dim,
        bias=False,
    )
    model = code.GPT(options).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    return model, optimizer, lambda called, tokens, targets: called(tokens, targets)[1]


def llama2_c(
    peer: str, config: Config, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, Loss]:
    code, shape = load_module(clone_file(peer, "model.py")), config.model
    options = code.ModelArgs(
        dim=shape.dim,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        vocab_size=config.tokenizer.vocab_size,
        hidden_dim=shape.ffn_dim,
        max_seq_len=config.data.seq_len,
    )
    model = code.Transformer(options).to(device)
    optimizer = model.configure_optimizers(0.1, 5e-4, (0.9, 0.95), device.type)

    def loss_of(called: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        called(tokens, targets)
        return model.last_loss

    return model, optimizer, loss_of


def llama_of_transformers(config: Config) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UserError("--peer=transformers: the package is not installed") from None
    shape = config.model
    options = LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=shape.max_seq_len,
        vocab_size=config.tokenizer.vocab_size,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(options)


def transformers_trainer(
    peer: str, config: Config, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, Loss]:
    model = llama_of_transformers(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)  # its Trainer's default

    def loss_of(called: nn.Module, tokens: Tensor, _: Tensor) -> Tensor:
        return called(input_ids=tokens, labels=tokens, use_cache=False).loss  # it shifts them

    return model, optimizer, loss_of


TRAINERS = {"nanogpt": nanogpt, "llama2.c": llama2_c, "transformers": transformers_trainer}
