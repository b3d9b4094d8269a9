"""Sharded, replicated and partial parameters: every set-up of torch.distributed has the numbers of the unsharded run.

Each test runs a function of this module on two or four processes (tests/workers.py) and looks at what every rank found.
The unsharded run happens on each rank beside the sharded one: the same wrapper over the same base on whole tensors,
which the other tests hold to formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
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


def dampened(groups: Any) -> torch.optim.Optimizer:
    return torchlars.optim.SGD(groups, lr=0.5, momentum=0.9, dampening=0.5)  # but for the first step


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01)


def our_adam(groups: Any) -> torch.optim.Optimizer:
    return torchlars.optim.Adam(groups, lr=0.01, maximize=True)


def our_adamw(groups: Any) -> torch.optim.Optimizer:
    return torchlars.optim.AdamW(groups, lr=0.01)


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
    Arm("LARS(torchlars SGD), dampened", LARS, dampened),
    Arm("LARS(SGD), lr in momentum", LARS, sgd, IN_MOMENTUM),
    Arm("LARS(torchlars SGD), lr in momentum", LARS, our_sgd, IN_MOMENTUM),
    Arm("LARS(SGD), of updates", LARS, sgd, {"apply_to": "update"}),
    Arm("LAMB(AdamW)", LAMB, adamw),
    Arm("LAMB(torchlars SGD)", LAMB, our_sgd, {"clip": True}),
    Arm("LAMB(torchlars AdamW)", LAMB, our_adamw),
    Arm("LAMB(torchlars Adam), clipped", LAMB, our_adam, {"clip": True}),
    Arm("LARS(torchlars Adam), decayed, clipped", LARS, our_adam, DECAYED),
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


FEW = [arm for arm in ARMS if arm.name in ("LARS(SGD)", "LARS(torchlars SGD)", "LAMB(AdamW)", "LAMB(torchlars AdamW)")]


@pytest.mark.parametrize("arm", FEW, ids=str)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_sharded_run_has_the_numbers_of_the_unsharded_one_in_float32(workers, setup, arm):
    for found, *_ in workers(setup.world, train, setup, arm, torch.float32):
        assert max(found.values()) <= TOLERANCE[torch.float32], found


def ratios_of_shards(setup: Setup, arm: Arm) -> tuple[float, list[list[float]]]:
    """Step with norms of what is here only. Return how far off that is, and every rank's ratios."""
    from torchlars import sharding

    complete, sharding.complete = sharding.complete, lambda squared_norms: list(squared_norms) and None
    try:
        found, *_ = train(setup, arm, torch.float64)
    finally:
        sharding.complete = complete
    return max(value for key, value in found.items() if key.startswith("ratio"))


@pytest.mark.parametrize("arm", FEW, ids=str)
@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup.process_groups], ids=str)
def test_these_tests_would_see_norms_of_shards(workers, setup, arm):
    assert max(workers(setup.world, ratios_of_shards, setup, arm)) > 1e-3


def train_in_mixed_precision(arm: Arm, world: int) -> dict[str, float]:
    """FSDP2 that computes in bfloat16 and reduces in float32; the unsharded twin gets its gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, whole = network(torch.float32), network(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh_of(world), mp_policy=policy)
    optimizer, expected = arm(model), arm(whole)
    for step in range(STEPS):
        inputs, targets = (share(tensor, world, dist.get_rank()) for tensor in batch(step, torch.float32))
        loss_of(model, inputs, targets).backward()
        for param, other in zip(model.parameters(), whole.parameters(), strict=True):
            assert param.grad.dtype == torch.float32
            other.grad = full(param.grad).clone()
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
    return differences(model, optimizer, whole, expected)


@pytest.mark.parametrize("arm", FEW, ids=str)
def test_fsdp2_with_a_mixed_precision_policy(workers, arm):
    for found in workers(4, train_in_mixed_precision, arm, 4):
        assert max(found.values()) <= 2e-6, found


def train_with_a_scaler(arm: Arm, world: int, setup: Setup) -> tuple[dict[str, float], list[float], int]:
    """In the second step, a gradient overflows in one shard."""
    model, whole = network(torch.float32), network(torch.float32)
    setup.apply(model, world)
    optimizer, expected = arm(model), arm(whole)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    waits = 0

    def maybe_opt_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal waits
        waits += 1
        return type(scaler)._maybe_opt_step(scaler, *args, **kwargs)

    scaler._maybe_opt_step = maybe_opt_step
    scales = []
    for step in range(STEPS):
        inputs, targets = batch(step, torch.float32)
        scaler.scale(loss_of(model, setup.share(inputs), setup.share(targets))).backward()
        grad = model.first.weight.grad
        if step == 1 and grad.device_mesh.get_coordinate()[-1] == 0:  # in one shard, and all replicas of it
            grad.to_local()[0, 0] = torch.inf
        loss_of(whole, inputs, targets).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            expected.step()
        for one in (optimizer, expected):
            one.zero_grad()
        scales.append(scaler.get_scale())
    return differences(model, optimizer, whole, expected), scales, waits


def fused_adam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, fused=True)


OVER_FUSED = [Arm("LARS(AdamW fused)", LARS, fused_adam), Arm("LAMB(AdamW fused)", LAMB, fused_adam)]


@pytest.mark.parametrize("setup", [SETUPS[1], SETUPS[2]], ids=str)
@pytest.mark.parametrize("arm", [*FEW, *OVER_FUSED], ids=str)
def test_a_scaler_skips_the_step_of_all_ranks(workers, arm, setup):
    for found, scales, waits in workers(setup.world, train_with_a_scaler, arm, setup.world, setup):
        assert max(found.values()) <= TOLERANCE[torch.float32], found
        assert scales == [2.0**10] + [2.0**9] * (STEPS - 1)
        assert waits == (0 if "torchlars" in arm.name or "fused" in arm.name else STEPS)


def reasons_of_breaks() -> set[str]:
    from torch._dynamo.utils import counters

    return {reason.splitlines()[0] for reason in counters["graph_break"]}


def train_compiled(setup: Setup, arm: Arm) -> tuple[dict[str, float], set[str], set[str]]:
    """Return differences, and why graphs broke: those of the wrapper's step, and those of the bare base's."""
    import torch._dynamo

    model, whole, bare = network(torch.float64), network(torch.float64), network(torch.float64)
    setup.apply(model, setup.world)
    setup.apply(bare, setup.world)
    optimizer, expected, base = arm(model), arm(whole), arm(bare, base_only=True)
    reasons = []
    for one, opt in ((bare, base), (model, optimizer)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step_compiled = torch.compile(opt.step, backend="aot_eager")
        for step in range(STEPS):
            inputs, targets = batch(step, torch.float64)
            loss_of(one, setup.share(inputs), setup.share(targets)).backward()
            step_compiled()
            opt.zero_grad()
        reasons.append(reasons_of_breaks())
    advance(None, whole, expected, range(STEPS))
    return differences(model, optimizer, whole, expected), reasons[1], reasons[0]


# Where a base breaks the graph of LAMB's step, the rest of it is compiled call by call, and torch 2.11 cannot trace
# DeviceMesh.get_group on its own.
IS_2_11 = [int(number) for number in torch.__version__.split(".")[:2]] == [2, 11]
BREAKS_OF_MESHES = {"Unsupported method call"} if IS_2_11 else set()


@pytest.mark.parametrize(
    "arm",
    [arm for arm in ARMS if arm.name in ("LARS(SGD)", "LAMB(torchlars SGD)", "LAMB(AdamW)", "LAMB(torchlars AdamW)")],
    ids=str,
)
def test_a_compiled_step_of_shards(workers, arm):
    for found, reasons, of_base in workers(2, train_compiled, SETUPS[0], arm):
        if arm.name != "LAMB(AdamW)":  # whose bias correction is in float32 where it is compiled
            assert max(found.values()) <= TOLERANCE[torch.float64], found
        assert max(found.values()) <= TOLERANCE[torch.float32], found
        assert reasons <= of_base | BREAKS_OF_MESHES


# --- DistributedDataParallel and ZeroRedundancyOptimizer ---------------------------------------------------------------


def train_replicas(
    arm: Arm, kind: str, dtype: torch.dtype, is_bucket_view: bool = True, micro_steps: int = 1
) -> tuple[dict[str, float], int]:
    """Every rank has the whole model and a share of the batch; ``kind`` says who is inside of whom.

    Return differences, and the collectives that steps have more than those of the base.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    world, rank = dist.get_world_size(), dist.get_rank()
    model, whole, bare = network(dtype), network(dtype), network(dtype)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=is_bucket_view)
    options = {"trust_coef": 0.3, "eps": 0.05, **arm.options}
    base = type(arm.base(groups_of(network(dtype))))
    numbers = {"lr": 0.05, "weight_decay": 0.1, **({"momentum": 0.9} if base.__name__ == "SGD" else {})}
    expected = arm.wrapper(base(whole.parameters(), **numbers), **options)
    if kind == "DDP":
        optimizer = arm.wrapper(base(model.parameters(), **numbers), **options)
        plain = base(bare.parameters(), **numbers)
    else:
        plain = ZeroRedundancyOptimizer(bare.parameters(), optimizer_class=base, **numbers)
        if kind == "ZeRO inside":
            inside = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=base, **numbers)
            optimizer = arm.wrapper(inside, **options)
        else:
            made = arm.wrapper.over(base, **options)
            optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=made, **numbers)
    more = 0
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=not is_bucket_view)
        expected.zero_grad()
        for micro_step in range(micro_steps):
            inputs, targets = batch(10 * step + micro_step, dtype)
            with parallel.no_sync() if micro_step + 1 < micro_steps else nullcontext():
                loss_of(parallel, share(inputs, world, rank), share(targets, world, rank)).backward()
            loss_of(whole, inputs, targets).backward()
        grads = [(param.grad, param.grad.data_ptr()) for param in model.parameters()]
        for param, (grad, _) in zip(bare.parameters(), grads, strict=True):
            param.grad = grad.clone()
        for one, sign in ((optimizer, 1), (plain, -1)):
            with counting() as mode:
                one.step()
            more += sign * mode.get_total_counts()
        expected.step()
        for param, (grad, address) in zip(model.parameters(), grads, strict=True):
            assert param.grad is grad
            assert grad.data_ptr() == address
    pairs = zip(model.named_parameters(), whole.parameters(), strict=True)
    return {name: difference(param, other) for (name, param), other in pairs}, more


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("is_bucket_view", [False, True], ids=["", "bucket view"])
@pytest.mark.parametrize("arm", FEW, ids=str)
def test_ddp_has_the_numbers_of_one_process(workers, arm, is_bucket_view, micro_steps):
    for found, more in workers(4, train_replicas, arm, "DDP", torch.float64, is_bucket_view, micro_steps):
        assert max(found.values()) <= TOLERANCE[torch.float64], found
        assert more == 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "world"), [("DDP", 2), ("ZeRO inside", 2), ("ZeRO around", 2), ("ZeRO around", 4)])
@pytest.mark.parametrize("arm", FEW, ids=str)
def test_replicas_have_the_numbers_of_one_process(workers, arm, kind, world, dtype):
    for found, more in workers(world, train_replicas, arm, kind, dtype):
        assert max(found.values()) <= TOLERANCE[dtype], found
        assert more == 0


INSIDE = [
    Arm("LARS(Adafactor)", LARS, torch.optim.Adafactor),  # decouples, and does not say so
    Arm("LARS(SGD), lr in momentum", LARS, sgd, IN_MOMENTUM),
]


@pytest.mark.parametrize("arm", INSIDE, ids=str)
def test_what_is_inside_of_zero_is_known(workers, arm):
    for found, more in workers(2, train_replicas, arm, "ZeRO inside", torch.float64):
        assert max(found.values()) <= TOLERANCE[torch.float64], found
        assert more == 0


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def advance(setup: Setup | None, model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        inputs, targets = batch(step, torch.float64)
        if setup is not None:
            inputs, targets = setup.share(inputs), setup.share(targets)
        loss_of(model, inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(setup: Setup, arm: Arm, folder: str, options: dict[str, bool]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state_dict

    model = network(torch.float64)
    setup.apply(model, setup.world)
    optimizer = arm(model)
    advance(setup, model, optimizer, range(STEPS))
    options = dcp_state_dict.StateDictOptions(**options)
    weights, state = dcp_state_dict.get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(setup: Setup, arm: Arm, folder: str, options: dict[str, bool]) -> dict[str, float]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state_dict

    whole = network(torch.float64)
    expected = arm(whole)
    advance(None, whole, expected, range(2 * STEPS))

    model = network(torch.float64)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    setup.apply(model, setup.world)
    optimizer = arm(model)
    options = dcp_state_dict.StateDictOptions(**options)
    weights, state = dcp_state_dict.get_state_dict(model, optimizer, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    dcp_state_dict.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    advance(setup, model, optimizer, range(STEPS, 2 * STEPS))
    return differences(model, optimizer, whole, expected)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("arm", [*FEW, *(arm for arm in ARMS if arm.options is DECAYED)], ids=str)
@pytest.mark.parametrize(
    ("before", "after"),
    [(SETUPS[1], SETUPS[0]), (SETUPS[0], SETUPS[2]), (SETUPS[4], SETUPS[3])],
    ids=lambda setup: str(setup),
)
def test_a_checkpoint_is_resumed_by_other_shards(workers, tmp_path, before, after, arm, flatten):
    options = {"flatten_optimizer_state_dict": flatten}
    workers(before.world, save, before, arm, str(tmp_path), options)
    for found in workers(after.world, load, after, arm, str(tmp_path), options):
        assert max(found.values()) <= TOLERANCE[torch.float64], found


# --- What is refused --------------------------------------------------------------------------------------------------


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize("wrapper", [LARS, LAMB])
def test_fsdp1_is_refused(wrapper):
    """It runs on accelerators only. What marks its parameters is the same everywhere."""
    from torch.distributed.fsdp import _common_utils

    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    _common_utils._set_fsdp_flattened(param)
    message = message_of(wrapper(torch.optim.SGD([param], lr=0.5, weight_decay=0.1)).step)
    assert message == (
        "RuntimeError: parameters must be whole layers, but FSDP1 flattens and splits them; use fully_shard (FSDP2) from "
        "torch.distributed.fsdp (group: 0, parameter: 0, shape: (3,))"
    )
    assert torch.equal(param, torch.ones(3))


def steps_that_are_refused() -> dict[str, str]:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh, twin_mesh = mesh_of(2), mesh_of(2, 1)
    values = torch.randn(4, 3)

    def step(param: Tensor, grad: Tensor, base: Any = torch.optim.SGD, **state: Tensor) -> str:
        optimizer = LARS(base([nn.Parameter(param)], lr=0.5, weight_decay=0.1, momentum=0.9))
        optimizer.param_groups[0]["params"][0].grad = grad
        if state:
            optimizer.state[optimizer.param_groups[0]["params"][0]] = state
        return message_of(optimizer.step)

    sharded = distribute_tensor(values, mesh, [Shard(0)])
    ours = torchlars.optim.SGD
    return {
        "a sum": step(DTensor.from_local(values, mesh, [Partial()]), DTensor.from_local(values, mesh, [Partial()])),
        "whole gradient": step(sharded, values),
        "whole gradient, ours": step(sharded, values, ours),
        "sharded gradient": step(values, sharded),
        "another mesh": step(sharded, distribute_tensor(values, twin_mesh, [Shard(0), Replicate()])),
        "whole momentum": step(sharded, sharded, ours, momentum_buffer=values),
    }


def test_what_is_distributed_in_two_ways_is_refused(workers):
    where = " (group: 0, parameter: 0, shape: (4, 3))"
    for messages in workers(2, steps_that_are_refused):
        assert messages["a sum"].startswith("RuntimeError: parameters must be sharded or replicated (placements: ")
        as_they_are = "RuntimeError: gradients must be distributed as their parameters are "
        for name in ("whole gradient", "whole gradient, ours"):
            assert messages[name] == f"{as_they_are}(parameter: a DTensor, gradient: a whole tensor){where}"
        assert messages["sharded gradient"] == f"{as_they_are}(parameter: a whole tensor, gradient: a DTensor){where}"
        assert messages["another mesh"].startswith("RuntimeError: gradients must be on their parameter's device mesh (")
        momentum = "RuntimeError: momentum_buffer must be distributed as its parameter is (got: a whole tensor)"
        assert messages["whole momentum"] == f"{momentum}{where}"


def step_of_a_layer_on_two_of_four_ranks(base: Any) -> list[float]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    # Of other ranks than any other test's: torch takes equal meshes for one, even after their process group is gone.
    mesh = DeviceMesh("cpu", [2, 3])
    elsewhere = nn.Parameter(distribute_tensor(torch.tensor([3.0, 4.0], dtype=torch.float64), mesh, [Shard(0)]))
    elsewhere.grad = distribute_tensor(torch.tensor([2.0, 0.0], dtype=torch.float64), mesh, [Shard(0)])
    here = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    here.grad = torch.tensor([2.0, 0.0], dtype=torch.float64)
    optimizer = LARS(base([elsewhere, here], lr=1.0, weight_decay=0.1), eps=0, trust_coef=0.5)
    optimizer.step()
    ratios = optimizer.trust_ratios()
    return [ratios[param].item() for param in (elsewhere, here)]


@pytest.mark.parametrize("base", [torch.optim.SGD, torchlars.optim.SGD], ids=["torch", "torchlars"])
def test_a_rank_outside_of_a_layers_mesh_steps_all_the_same(workers, base):
    results = workers(4, step_of_a_layer_on_two_of_four_ranks, base)
    ratio = 0.5 * 5.0 / (2.0 + 0.1 * 5.0)
    for rank, (of_elsewhere, of_here) in enumerate(results):
        assert of_here == pytest.approx(ratio, rel=1e-12)
        assert rank < 2 or of_elsewhere == pytest.approx(ratio, rel=1e-12)


class Measures(torch.optim.SGD):
    """A base that takes trust ratios of all layers of a group in one call, however they are sharded."""

    takes_trust_ratios = True

    def step(self, closure=None, *, trust_ratios=None):
        for index, group in enumerate(self.param_groups):
            trust_ratios.measure(index, group["params"])


def step_of_mixed_shards() -> str:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(2)
    params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [place])) for place in (Shard(0), Replicate())]
    for param in params:
        param.grad = param.detach().clone()
    return message_of(LARS(Measures(params, lr=0.5)).step)


def test_a_base_asks_for_layers_that_are_sharded_alike(workers):
    for message in workers(2, step_of_mixed_shards):
        assert message == (
            "ValueError: params must be sharded over the same ranks (group: 0, parameter: 1, shape: (4,))"
        )
