"""Sharded, replicated and partial parameters: every set-up of torch.distributed has the numbers of the unsharded run.

Each test runs a function of this module on two or four processes (tests/workers.py) and looks at what every rank found.
The unsharded run happens on each rank beside the sharded one: the same wrapper over the same base on whole tensors,
which the other tests hold to formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import torchlars
from torchlars import LAMB, LARS

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")

STEPS, BATCH = 4, 8


class Network(nn.Module):
    """Layers that four ranks cannot share evenly, of which one is too small for all to have a part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 6)
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.second(torch.tanh(self.norm(self.first(inputs)))))


def network(dtype: torch.dtype) -> Network:
    random = torch.Generator().manual_seed(3)
    model = Network().to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=random, dtype=torch.float64))
    return model


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(BATCH, 5, generator=random, dtype=torch.float64)
    return inputs.to(dtype), torch.randn(BATCH, 3, generator=random, dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (model(inputs) - targets).square().mean()


def share(tensor: Tensor, ranks: int, rank: int) -> Tensor:
    return tensor.chunk(ranks)[rank]


# --- Set-ups ----------------------------------------------------------------------------------------------------------


def mesh_of(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])


def fsdp2(model: nn.Module, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(world)
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)


def hsdp(model: nn.Module, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh_of(2, world // 2))


def parallelize(model: nn.Module, mesh: Any, is_sequence_parallel: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    between = Shard(0) if is_sequence_parallel else Replicate()
    plan = {
        "first": tp.ColwiseParallel(output_layouts=between),
        "second": tp.ColwiseParallel(input_layouts=between, output_layouts=Shard(-1)),
        "last": tp.RowwiseParallel(input_layouts=Shard(-1)),
    }
    if is_sequence_parallel:
        plan["norm"] = tp.SequenceParallel(sequence_dim=0)
    tp.parallelize_module(model, mesh, plan)


def tensor_parallel(model: nn.Module, world: int) -> None:
    parallelize(model, mesh_of(world), is_sequence_parallel=False)


def sequence_parallel(model: nn.Module, world: int) -> None:
    parallelize(model, mesh_of(world), is_sequence_parallel=True)


def fsdp2_and_tensor_parallel(model: nn.Module, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(world // 2, 2)
    parallelize(model, mesh["inner"], is_sequence_parallel=False)
    fully_shard(model, mesh=mesh["outer"])


def fsdp2_and_sequence_parallel(model: nn.Module, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(world // 2, 2)
    parallelize(model, mesh["inner"], is_sequence_parallel=True)
    fully_shard(model, mesh=mesh["outer"])


def replicated(model: nn.Module, world: int) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    def take(module: nn.Module, inputs: tuple[Tensor, ...], mesh: Any) -> tuple[Tensor, ...]:
        return tuple(DTensor.from_local(tensor, mesh, [Replicate()]) for tensor in inputs)

    def give(module: nn.Module, output: Any, mesh: Any) -> Tensor:
        return output.to_local()

    distribute_module(model, mesh_of(world), input_fn=take, output_fn=give)


@dataclass(frozen=True)
class Setup:
    name: str
    world: int
    apply: Callable[[nn.Module, int], None]
    data_ranks: int  # how many shares a batch is cut into
    process_groups: int  # over which layers are split: each is a collective of every step
    why: str
    partial: int = 0  # gradients that are sums still to be taken: each costs the first who needs it one more

    def __str__(self) -> str:
        return f"{self.name}, {self.world} ranks"

    def share(self, tensor: Tensor) -> Tensor:
        """Return this rank's share of a batch. Ranks of the inner dimension have the same one."""
        return share(tensor, self.data_ranks, dist.get_rank() // (self.world // self.data_ranks))


SETUPS = [
    Setup("FSDP2", 2, fsdp2, 2, 1, "uneven shards"),
    Setup("FSDP2", 4, fsdp2, 4, 1, "uneven and empty shards"),
    Setup("HSDP", 4, hsdp, 4, 1, "replicas of shards"),
    Setup("TP", 2, tensor_parallel, 1, 1, "sharded by columns, by rows, and whole layers beside them"),
    Setup("FSDP2 + TP", 4, fsdp2_and_tensor_parallel, 2, 2, "sharded over two dimensions, or one of them"),
    Setup("SequenceParallel", 2, sequence_parallel, 1, 1, "gradients that are sums still to be taken", partial=2),
    Setup("FSDP2 + SequenceParallel", 4, fsdp2_and_sequence_parallel, 2, 2, "FSDP takes those sums"),
    Setup("replicated", 2, replicated, 1, 0, "DTensors that are whole"),
]


# --- Optimizers -------------------------------------------------------------------------------------------------------


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with numbers of their own, and one that is left to the base."""
    return [
        {"params": [model.first.weight, model.second.weight, model.norm.bias], "weight_decay": 0.1},
        {"params": [model.last.weight, model.norm.weight, model.first.bias], "weight_decay": 0.03, "lr": 0.7},
        {"params": [model.second.bias], "trust_coef": None, "weight_decay": 0.2},
    ]


def sgd(groups: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.5, momentum=0.9, **options)


def nesterov(groups: Any) -> torch.optim.Optimizer:
    return sgd(groups, nesterov=True, foreach=False, maximize=True)


def our_sgd(groups: Any) -> torch.optim.Optimizer:
    return torchlars.optim.SGD(groups, lr=0.5, momentum=0.9)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01)


DECAYED = {"norm": "decayed", "clip": True}
IN_MOMENTUM = {"norm": "decayed", "lr_in_momentum": True}


@dataclass(frozen=True)
class Arm:
    name: str
    wrapper: Any
    base: Callable[[Any], torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    def __call__(self, model: nn.Module, base_only: bool = False) -> torch.optim.Optimizer:
        base = self.base(groups_of(model))
        return base if base_only else self.wrapper(base, trust_coef=0.3, eps=0.05, **self.options)


ARMS = [
    Arm("LARS(SGD)", LARS, sgd),
    Arm("LARS(SGD nesterov, maximize)", LARS, nesterov, {"norm": "decayed"}),
    Arm("LARS(torchlars SGD)", LARS, our_sgd),
    Arm("LARS(torchlars SGD), decayed, clipped", LARS, our_sgd, DECAYED),
    Arm("LARS(SGD), lr in momentum", LARS, sgd, IN_MOMENTUM),
    Arm("LARS(torchlars SGD), lr in momentum", LARS, our_sgd, IN_MOMENTUM),
    Arm("LARS(SGD), of updates", LARS, sgd, {"apply_to": "update"}),
    Arm("LAMB(AdamW)", LAMB, adamw),
    Arm("LAMB(torchlars SGD)", LAMB, our_sgd, {"clip": True}),
]


# --- Sharded against unsharded ----------------------------------------------------------------------------------------


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, wherever its parts are."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the layer's largest element."""
    one, other = full(one).double(), full(other).double()
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-300))


def differences(model: nn.Module, optimizer: Any, whole: nn.Module, expected: Any) -> dict[str, float]:
    """Return how far apart two runs are: parameters, their state and their trust ratios."""
    found: dict[str, float] = {}
    ratios, expected_ratios = optimizer.trust_ratios(), expected.trust_ratios()
    assert len(ratios) == len(expected_ratios)
    for (name, param), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        found[name] = difference(param, other)
        assert optimizer.state[param].keys() == expected.state[other].keys()
        for key, value in expected.state[other].items():
            found[f"{key} of {name}"] = difference(optimizer.state[param][key], value)
            assert type(optimizer.state[param][key]) is (type(value) if key == "step" else type(param.data)), key
        if other in expected_ratios:
            found[f"ratio of {name}"] = difference(ratios[param], expected_ratios[other])
    return found


def counting() -> Any:
    from torch.distributed.tensor.debug import CommDebugMode

    return CommDebugMode()


def train(setup: Setup, arm: Arm, dtype: torch.dtype) -> tuple[dict[str, float], list[int], list[int], float]:
    """Train sharded and unsharded. Return differences, collectives of steps and of the bare base's, the way gone."""
    model, whole, bare = network(dtype), network(dtype), network(dtype)
    begin = copy.deepcopy(whole)
    setup.apply(model, setup.world)
    setup.apply(bare, setup.world)
    optimizer, expected, base = arm(model), arm(whole), arm(bare, base_only=True)
    collectives, of_base = [], []
    for step in range(STEPS):
        inputs, targets = batch(step, dtype)
        for one, opt, counts in ((model, optimizer, collectives), (bare, base, of_base)):
            loss_of(one, setup.share(inputs), setup.share(targets)).backward()
            with counting() as mode:
                opt.step()
            counts.append(mode.get_total_counts())
        loss_of(whole, inputs, targets).backward()
        expected.step()
        for one in (optimizer, expected, base):
            one.zero_grad()
            one.param_groups[0]["lr"] *= 0.8
    moved = min(difference(p, q) for p, q in zip(whole.parameters(), begin.parameters(), strict=True))
    return differences(model, optimizer, whole, expected), collectives, of_base, moved


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("arm", ARMS, ids=str)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_sharded_run_has_the_numbers_of_the_unsharded_one(workers, setup, arm):
    for found, collectives, of_base, moved in workers(setup.world, train, setup, arm, torch.float64):
        assert max(found.values()) <= TOLERANCE[torch.float64], found
        assert moved > 1e-3
        if arm.wrapper is LAMB:
            assert collectives == [of_bare + setup.process_groups for of_bare in of_base]
        else:  # leaves nothing for the base to do
            assert collectives == [setup.partial + setup.process_groups] * STEPS
