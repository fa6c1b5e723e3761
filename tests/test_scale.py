"""Training scales: what a step costs a rank follows the strategy, not the number of ranks.

Protected here, in worlds of which this process is one rank (torch's fake process group moves
nothing): how many collectives a step has and of how many bytes, what a rank holds of weights and
optimizer state, and that no step waits for the device: fake tensors have no values, and reading one
is an error. docs/scaling.md is computed from the same rules.
"""

import contextlib
import gc
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import rocket
from config import build_config, read_toml
from dataset import Batch
from distributed import World, local_part, replicate
from job import Votes
from preflight import Inputs

VOCABULARY = 32_000
NODE = 8  # ranks
NO_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128}


@contextlib.contextmanager
def world_of(size, rank):
    """This process as one rank of a world whose other ranks do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield World(rank, size, rank % NODE, NODE, torch.device("cpu"), torch.bfloat16)
    finally:
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts collectives by kind, and the bytes of the whole tensors that they move."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes, self.sizes = Counter(), Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again, for the local parts
        library, _, name = function.name().partition("::")
        if library in ("c10d", "_c10d_functional") and name not in NO_COLLECTIVES:
            name = {"allreduce_": "all_reduce"}.get(name, name)
            whole = args[1] if "reduce_scatter" in name else args[0]
            whole = whole[0] if isinstance(whole, list) else whole
            self.calls[name] += 1
            self.bytes[name] += whole.numel() * whole.element_size()
            self.sizes.append((name, whole.numel()))
        return function(*args, **(kwargs or {}))


def configure(strategy=None, **model):
    """The 70B model's configuration, changed."""
    values = read_toml(ROOT / "config" / "llama2_70b.toml")
    values["model"] |= model
    values["parallel"] |= {"strategy": strategy} if strategy else {}
    return build_config(values)


def build(config, world):
    inputs = Inputs({}, {}, "", None, VOCABULARY, 1, "", np.zeros(0), False)
    return rocket.build(config, inputs, None, None, world)


def step(config, model, optimizer, world, micro_batches, length=32):
    ids = torch.ones(1, length, dtype=torch.int64)
    batches = [Batch(ids, ids, None)] * micro_batches
    votes, norms = torch.zeros(len(Votes._fields)), torch.zeros(2)
    return rocket.train_step(model, optimizer, batches, 1e-4, votes, norms, config, world)


def check_shares(model, optimizer, shards):
    """A rank holds one part in so many of weights and moments, but for what cutting rows adds."""
    parameters = list(model.parameters())
    held = [local_part(parameter)[0].numel() for parameter in parameters]
    rows = sum(parameter[0].numel() for parameter in parameters)
    assert abs(sum(held) - sum(p.numel() for p in parameters) / shards) <= rows
    for parameter, size in zip(parameters, held, strict=True):
        moments = [value for value in optimizer.state[parameter].values() if value.ndim]
        assert [local_part(moment)[0].numel() for moment in moments] == [size, size]


def check_collectives(counted, strategy, model, micro_batches, shards):
    """FSDP2 gathers each block for both passes, head and embedding once, and reduces all of it at
    each micro-batch; HSDP sums over nodes after the last."""
    size = sum(parameter.numel() for parameter in model.parameters())
    rest = sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    n_layers = model.config.n_layers
    few = 3  # count of trained tokens; loss, votes and damage; gradient norm
    assert counted.calls == {
        "_allgather_base_": micro_batches * (2 * n_layers + 2),
        "_reduce_scatter_base_": micro_batches * (n_layers + 2),
        "all_reduce": few + (n_layers + 2) * (strategy == "hsdp"),
    }
    close = partial(pytest.approx, rel=0.01)  # rows are padded
    gathered = micro_batches * (2 * size - rest)
    assert counted.bytes["_allgather_base_"] == close(2 * gathered)  # bfloat16
    assert counted.bytes["_reduce_scatter_base_"] == close(micro_batches * 4 * size)  # float32
    across_nodes = 4 * size / shards if strategy == "hsdp" else 0
    few = 1000 + 4 * len(list(model.parameters()))  # the norms of all gradients go together
    assert counted.bytes["all_reduce"] - across_nodes < few + 0.01 * across_nodes


@pytest.mark.parametrize(("size", "rank"), [(8, 0), (64, 63)])
@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_sharded_collectives_are_as_many_in_a_world_of_any_size(strategy, size, rank):
    config, shards = configure(strategy, **SMALL), NODE if strategy == "hsdp" else size
    with world_of(size, rank) as world:
        model, optimizer = build(config, world)
        with Collectives() as counted:
            step(config, model, optimizer, world, micro_batches=3)
        check_shares(model, optimizer, shards)
        check_collectives(counted, strategy, model, 3, shards)


def test_reduce_once_takes_no_gradient_collective_in_inner_micro_batches():
    config = configure("fsdp", **SMALL)
    config.parallel.reduce_once = True
    config.parallel.reshard_after_forward = False
    with world_of(8, 0) as world:
        model, optimizer = build(config, world)
        with Collectives() as counted:
            step(config, model, optimizer, world, micro_batches=3)
        groups = config.model.n_layers + 2
        assert counted.calls["_allgather_base_"] == counted.calls["_reduce_scatter_base_"] == groups
        check_shares(model, optimizer, 8)


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_embedding_is_left_to_reduce_when_the_backward_pass_ends(tied):
    config = configure("fsdp", **SMALL, tie_embeddings=tied)
    with world_of(8, 0) as world:
        model, optimizer = build(config, world)
        with Collectives() as counted:
            step(config, model, optimizer, world, micro_batches=1)
        reduced = [size for name, size in counted.sizes if name == "_reduce_scatter_base_"]
        block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        head = [] if tied else [model.lm_head.weight.numel()]
        embedding = model.model.embed_tokens.weight.numel() + model.model.norm.weight.numel()
        assert reduced == [*head, *[block] * config.model.n_layers, embedding]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_of_a_sharded_model_leave_no_objects_behind(name):
    """torch 2.11 leaks an object for each parameter of each optimizer step over DTensors."""
    config = configure("fsdp", **SMALL)
    config.optimizer.name = name

    def specs():
        gc.collect()
        return sum(type(one).__name__ == "DTensorSpec" for one in gc.get_objects())

    with world_of(8, 0) as world:
        model, optimizer = build(config, world)
        found = []
        for _ in range(3):
            for _ in range(5):
                step(config, model, optimizer, world, micro_batches=1)
            found.append(specs())
        assert found[2] == found[1]


@pytest.mark.parametrize(("size", "rank"), [(8, 0), (64, 63)])
def test_ddp_reduces_gradients_once_a_step(size, rank):
    def note(reduced, bucket):  # the fake process group's own answer is not what DDP waits for
        reduced.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    config = configure("ddp", **SMALL)
    with world_of(size, rank) as world:
        model, optimizer = build(config, world)
        replica, reduced = replicate(model, world), []
        replica.register_comm_hook(reduced, note)
        for _ in range(2):  # by the second, DDP arranges its buckets anew
            step(config, replica, optimizer, world, 1)
        for micro_batches in (1, 4):
            reduced.clear()
            with Collectives() as counted:
                step(config, replica, optimizer, world, micro_batches)
            assert sum(reduced) == sum(parameter.numel() for parameter in model.parameters())
            assert counted.calls == {"all_reduce": 2}  # count of tokens; loss, votes and damage


@pytest.mark.parametrize("layers", [2, pytest.param(80, marks=pytest.mark.long)])
def test_70b_builds_and_steps_in_a_world_of_64(layers, monkeypatch):
    def real_mesh(*args, **kwargs):  # its ranks are numbers that torch reads
        with unset_fake_temporarily():
            return init_device_mesh(*args, **kwargs)

    monkeypatch.setattr(dist, "init_device_mesh", real_mesh)
    config = configure(n_layers=layers)
    with world_of(64, 63) as world, FakeTensorMode():
        model, optimizer = build(config, world)
        with Collectives() as counted:
            outcome = step(config, model, optimizer, world, 2, config.data.seq_len)
        check_shares(model, optimizer, world.size)
        check_collectives(counted, config.parallel.strategy, model, 2, world.size)
        with pytest.raises(DataDependentOutputException):
            outcome.tolist()
