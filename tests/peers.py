"""What bench.py compares Rocket with: other trainers and samplers, each by its own code.

Each does Rocket's work in its own way: the shape of CONFIG, its own model, optimizer and loss. The
code of nanogpt and llama2.c comes from a clone, `nanogpt:PATH` and `llama2.c:PATH`; transformers is
a package. `:compile` behind a trainer compiles its model. In time-to-loss, whole programs are
compared: the train.py of a clone, with options that may follow PATH.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import Config, UserError, available_cores, read_json, resolve_path
from fast import IGNORE
from tools.measure import Times

Generate = Callable[[list[list[int]], int], Times | None]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of a model, of tokens and targets (B, T)


def load_module(path: Path) -> ModuleType:
    """A module from a file, whatever else has its name."""
    name = re.sub(r"\W", "_", str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clone_file(peer: str, name: str) -> Path:
    """A file of the clone that `NAME:PATH` names; UserError if it is not there."""
    clone = peer.split(maxsplit=1)[0].removesuffix(":compile").partition(":")[2]
    path = Path(clone).expanduser().resolve() / name
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


def sampler(peer: str, config: Config, world: Any) -> Any:
    """A context with what continues prompts, timed as measure.rocket_sampler, and the parameters.

    Raises:
        UserError: there is no such peer, or not its clone, or it can't be compiled.
    """
    name = peer.partition(":")[0]
    if name not in SAMPLERS:
        raise UserError(f"--peer={peer}: one of {', '.join(SAMPLERS)} when sampling")
    return SAMPLERS[name](peer, config, world)


@contextlib.contextmanager
def transformers_sampler(_: str, config: Config, world: Any) -> Iterator[tuple[Generate, int]]:
    """generate with its own cache, greedy; it tells no times, so a call of one token is prefill."""
    model = llama_of_transformers(config).to(device=world.device, dtype=world.dtype).eval()

    def seconds(ids: Tensor, new: int) -> float:
        start = time.perf_counter()
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu()
        assert made.shape[1] == ids.shape[1] + new
        return time.perf_counter() - start

    def timed(prompts: list[list[int]], new: int) -> Times:
        ids = torch.tensor(prompts, device=world.device)
        first = seconds(ids, 1)
        return Times(first, (seconds(ids, new) - first) / (new - 1))

    yield timed, sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def run_c(peer: str, config: Config, world: Any) -> Iterator[tuple[Generate, int]]:
    """run.c of llama2.c, float32, one row, from BOS to as many tokens as prompt and completion.

    The rate is the one that it prints.
    """
    source = clone_file(peer, "run.c")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise UserError(f"--peer={peer}: no C compiler on PATH")
    if world.dtype != torch.float32 or world.device.type != "cpu":
        raise UserError(f"--peer={peer}: run.c computes in float32 on a CPU")
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        build = [compiler, "-Ofast", "-march=native", "-fopenmp", source, "-o", scratch / "run"]
        result = subprocess.run([*build, "-lm"], capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"--peer={peer}: {result.stderr.strip().splitlines()[-1]}")
        parameters = write_weights(scratch / "model.bin", config)
        write_pieces(scratch / "tokenizer.bin", config.tokenizer.vocab_size)
        environment = {"OMP_NUM_THREADS": str(available_cores()), **os.environ}

        def timed(prompts: list[list[int]], new: int) -> Times | None:
            if len(prompts) > 1:
                return None
            steps = str(len(prompts[0]) + new)
            command = [scratch / "run", scratch / "model.bin", "-z", scratch / "tokenizer.bin"]
            result = subprocess.run(
                [*command, "-t", "0", "-n", steps],
                capture_output=True,
                encoding="latin-1",
                env=environment,
                check=True,
            )
            return Times(None, 1 / float(re.search(r"achieved tok/s: (\S+)", result.stderr)[1]))

        yield timed, parameters


def write_weights(path: Path, config: Config) -> int:
    """Random weights in the format that run.c reads; their number.

    Its order: embeddings, then each kind of weight of all layers, the last norm, two tables that it
    skips, and the output matrix if it is not the embeddings.
    """
    shape, vocab_size = config.model, config.tokenizer.vocab_size
    dim, ffn_dim, layers = shape.dim, shape.ffn_dim, shape.n_layers
    head_dim = dim // shape.n_heads
    kv_dim = shape.n_kv_heads * head_dim
    signed = vocab_size if shape.tie_embeddings else -vocab_size
    header = (dim, ffn_dim, layers, shape.n_heads, shape.n_kv_heads, signed, shape.max_seq_len)
    attention = (dim * dim, dim * kv_dim, dim * kv_dim, dim * dim)
    norms, generator = torch.ones(layers, dim), torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return 0.02 * torch.randn(size, generator=generator)

    def rows() -> Tensor:
        made = random(vocab_size, dim)
        made[1] = 0.0  # BOS, at which run.c stops, is never the likeliest
        return made

    parts = [rows(), norms, *(random(layers, size) for size in attention), norms]
    parts += [random(layers, dim * ffn_dim) for _ in range(3)]
    parts.append(torch.ones(dim))
    count = sum(part.numel() for part in parts)
    parts.append(random(shape.max_seq_len * head_dim))
    if not shape.tie_embeddings:
        parts.append(rows())
        count += vocab_size * dim
    with open(path, "wb") as file:
        file.write(struct.pack("7i", *header))
        for part in parts:
            file.write(part.numpy().tobytes())
    return count


def write_pieces(path: Path, vocab_size: int) -> None:
    """A vocabulary for run.c: the longest piece, and each one's score, length and bytes."""
    pieces = [struct.pack("fi", 0.0, 1) + b"." for _ in range(vocab_size)]
    path.write_bytes(struct.pack("i", 1) + b"".join(pieces))


SAMPLERS = {"llama2.c": run_c, "transformers": transformers_sampler}


def lay_out(peer: str, config: Config, folder: Path) -> None:
    """What a peer's train.py reads from the folder that it runs in: its own configurator.py, and
    the tokens of CONFIG's dataset.

    nanoGPT reads a split as one file. llama2.c reads the first of its files as the validation
    split, and the others in random order, each cut into windows that it shuffles.
    """
    (folder / "configurator.py").symlink_to(clone_file(peer, "configurator.py"))
    vocab_size = config.tokenizer.vocab_size
    nano = peer.startswith("nanogpt")
    data = folder / "data" / ("corpus" if nano else f"tok{vocab_size}")
    data.mkdir(parents=True)
    directory = resolve_path(config.data.dir)
    splits = read_json(directory / "manifest.json")["splits"]
    for index, split in enumerate(("val", "train")):
        if split not in splits:
            raise UserError(f"{directory}: no {split} split; set data.val_fraction")
        shards = [directory / shard["file"] for shard in splits[split]["shards"]]
        tokens = np.concatenate([np.fromfile(path, "<u2") for path in shards])
        tokens.tofile(data / (f"{split}.bin" if nano else f"data{index:02}.bin"))
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))  # nanoGPT's


def train_command(peer: str, config: Config, rate: float, steps: int, warmup: int) -> list[str]:
    """Arguments of a peer's train.py for a run that ends its schedule, saves and exits.

    It evaluates one batch of each split before the first step, and again when it saves. Its code
    takes one more step before it exits.
    """
    clone, *given = shlex.split(peer)
    shape, seq_len, train = config.model, config.data.seq_len, config.train
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = math.gcd(train.global_batch_size, train.micro_batch_size)
    options: dict[str, Any] = {
        "out_dir": "out",
        "device": device,
        "compile": device == "cuda" or clone.endswith(":compile"),
        "dtype": "bfloat16" if device == "cuda" else "float32",  # on a CPU both ignore it
        "batch_size": batch,
        "gradient_accumulation_steps": train.global_batch_size // batch,
        "learning_rate": float(rate),
        "warmup_iters": warmup,
        "max_iters": steps,
        "eval_interval": steps,
        "eval_iters": 1,
        "log_interval": steps - 1,  # so it prints the first step and the last
        "always_save_checkpoint": True,
    }
    if clone.startswith("nanogpt"):
        options |= {"dataset": "corpus", "block_size": seq_len, "n_layer": shape.n_layers}
        options |= {"n_head": shape.n_heads, "n_embd": shape.dim}
        options |= {"lr_decay_iters": steps, "min_lr": rate / 10, "beta2": 0.99}
    else:
        options |= {"vocab_source": "custom", "vocab_size": config.tokenizer.vocab_size}
        options |= {"max_seq_len": seq_len, "n_layers": shape.n_layers, "dim": shape.dim}
        options |= {"n_heads": shape.n_heads, "n_kv_heads": shape.n_kv_heads or shape.n_heads}
        # It takes no width of the feed-forward: 8/3 dim, rounded up to a multiple, here of ffn_dim.
        options["multiple_of"] = shape.ffn_dim
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [str(clone_file(clone, "train.py")), *flags, *given]


def trained_peer(peer: str, folder: Path, world: Any) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The model that train.py saved in folder, and its loss over a batch, summed, in nats."""
    code = load_module(clone_file(peer, "model.py"))
    saved = torch.load(folder / "out" / "ckpt.pt", map_location=world.device)
    nano = peer.startswith("nanogpt")
    shape = saved["model_args"]
    model = code.GPT(code.GPTConfig(**shape)) if nano else code.Transformer(code.ModelArgs(**shape))
    weights = {name.removeprefix("_orig_mod."): w for name, w in saved["model"].items()}
    model.load_state_dict(weights)
    model.to(world.device).eval()

    def nats(tokens: Tensor, targets: Tensor, _: Tensor | None) -> Tensor:
        trained = targets != IGNORE
        answers = model(tokens, targets.where(trained, -1))  # which both ignore
        return (answers[1] if nano else model.last_loss) * trained.sum()

    return model, nats
