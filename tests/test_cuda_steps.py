"""Whole steps on a GPU: captured in a graph, under a GradScaler, and sharded. The host must wait for none of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import torchlars
from torchlars import LAMB, LARS, PercentileClipping

WAITS, NEVER_WAITS = "default", "error"


@pytest.fixture(autouse=True)
def _needs_cuda(cuda):
    yield
    torch.cuda.set_sync_debug_mode(WAITS)


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(60, 90), nn.Tanh(), nn.Linear(90, 40)).cuda()


def groups_of(model: nn.Module, lr: Any) -> list[dict[str, Any]]:
    """Two groups with numbers of their own, and one that is left to the base."""
    return [
        {"params": [model[0].weight], "weight_decay": 0.1, "lr": lr},
        {"params": [model[2].weight, model[0].bias], "weight_decay": 0.03, "lr": lr},
        {"params": [model[2].bias], "weight_decay": 0.05, "lr": lr, "trust_coef": None},
    ]


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 60, generator=torch.Generator().manual_seed(step)).cuda()


def sgd(groups: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9, **options)


def our_sgd(groups: Any) -> torch.optim.Optimizer:
    return torchlars.optim.SGD(groups, momentum=0.9, nesterov=True)


def our_sgd_in_8_bits(groups: Any) -> torch.optim.Optimizer:
    return torchlars.optim.SGD(groups, momentum=0.9, momentum_dtype=torch.int8, min_8bit_size=0)


def our_adam_in_float32(groups: Any) -> torch.optim.Optimizer:
    return torchlars.optim.Adam(groups, betas=(0.8, 0.95), state_dtype=torch.float32)


CLIPPED = {"clip": True, "norm": "decayed", "eps": 0.05, "trust_coef": 0.3}
# Bases whose step can be captured with an lr that is a tensor: torch's own SGD reads its value, but where it is fused.
CAPTURED = {
    "LARS(SGD fused)": lambda groups: LARS(sgd(groups, fused=True)),
    "LARS(SGD fused), clipped": lambda groups: LARS(sgd(groups, fused=True), **CLIPPED),
    "LARS(SGD fused), lr in momentum": lambda groups: LARS(sgd(groups, fused=True), lr_in_momentum=True),
    "LARS(torchlars SGD)": lambda groups: LARS(our_sgd(groups)),
    "LARS(torchlars SGD), clipped": lambda groups: LARS(our_sgd(groups), **CLIPPED),
    "LARS(torchlars SGD), of updates": lambda groups: LARS(our_sgd(groups), apply_to="update"),
    "LARS(torchlars SGD in 8 bits)": lambda groups: LARS(our_sgd_in_8_bits(groups)),
    "LARS(Adam)": lambda groups: LARS(torch.optim.Adam(groups, capturable=True)),
    "LARS(torchlars Adam)": lambda groups: LARS(torchlars.optim.Adam(groups)),
    "LAMB(torchlars AdamW)": lambda groups: LAMB(torchlars.optim.AdamW(groups)),
    "LAMB(torchlars Adam in float32), clipped": lambda groups: LAMB(our_adam_in_float32(groups), clip=True),
    "LAMB(AdamW)": lambda groups: LAMB(torch.optim.AdamW(groups, capturable=True)),
    "LAMB(AdamW fused)": lambda groups: LAMB(torch.optim.AdamW(groups, capturable=True, fused=True)),
}


def give_gradients(model: nn.Module, step: int) -> None:
    """Write gradients where they are: a graph knows addresses."""
    loss = model(batch(step)).square().mean()
    for param, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(grad)


@pytest.mark.parametrize("make", CAPTURED.values(), ids=CAPTURED)
def test_a_replayed_step_has_the_bits_of_an_eager_one_and_follows_its_lr(make):
    model, twin = network(), network()
    lr, twin_lr = (torch.tensor(0.1, device="cuda") for _ in range(2))
    optimizer, expected = make(groups_of(model, lr)), make(groups_of(twin, twin_lr))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for before a capture
        for step in range(3):
            give_gradients(model, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    for step in range(3):
        give_gradients(twin, step)
        expected.step()

    before = copy.deepcopy(model.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "capturing is no step"
    ratios = optimizer.trust_ratios()
    for step in range(3, 7):
        lr.mul_(0.5)
        twin_lr.mul_(0.5)
        give_gradients(model, step)
        give_gradients(twin, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(NEVER_WAITS)
        graph.replay()
        expected.step()
        torch.cuda.set_sync_debug_mode(WAITS)
        for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(param, other), (step, name)
            for key, value in expected.state[other].items():
                assert torch.equal(optimizer.state[param][key], value), (step, name, key)
        twins = expected.trust_ratios().values()
        assert all(torch.equal(ratio, other) for ratio, other in zip(ratios.values(), twins, strict=True))


@pytest.mark.parametrize("make", [lambda groups: sgd(groups, fused=True), our_sgd], ids=["SGD fused", "torchlars SGD"])
def test_clipping_at_a_percentile_is_replayed_and_never_waits(make):
    model, twin = network(), network()
    lr = torch.tensor(0.1, device="cuda")
    optimizer, expected = (make([{"params": one.parameters(), "lr": lr}]) for one in (model, twin))
    clipping, twin_clipping = (PercentileClipping(one, percentile=30, history=4) for one in (optimizer, expected))
    give_gradients(model, 0)
    give_gradients(twin, 0)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        lr.add_(0)  # torch warns of graphs without nodes
        with pytest.raises(RuntimeError, match="take a step before the capture"):
            optimizer.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    expected.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 8):
        for one in (model, twin):
            give_gradients(one, step)
            for param in one.parameters():
                param.grad.mul_(step % 3 if step < 7 else torch.nan)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(NEVER_WAITS)
        graph.replay()
        expected.step()
        torch.cuda.set_sync_debug_mode(WAITS)
        histories = zip(clipping.state_dict()["histories"], twin_clipping.state_dict()["histories"], strict=True)
        assert all(torch.equal(*pair) for pair in histories), step
        grads = [param.grad for one in (model, twin) for param in one.parameters()]
        torch.testing.assert_close(grads[:4], grads[4:], rtol=0, atol=0, equal_nan=True)


OVER_OURS = pytest.mark.parametrize(
    "make", [lambda groups: LARS(our_sgd(groups)), lambda groups: LAMB(our_sgd(groups))], ids=["LARS", "LAMB"]
)


@OVER_OURS
def test_an_lr_elsewhere_is_refused_where_a_graph_is_captured(make):
    model = network()
    optimizer = make(groups_of(model, 0.1))
    give_gradients(model, 0)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.1)
    message = "lr must be on the parameters' device while a CUDA graph is captured"
    anything = torch.ones(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        anything.add_(1)  # torch warns of graphs without nodes
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()


FIRST_STEPS = {"torchlars SGD": our_sgd, **CAPTURED}


@pytest.mark.parametrize("make", FIRST_STEPS.values(), ids=FIRST_STEPS)
def test_a_first_step_is_refused_where_a_graph_is_captured(make):
    model, twin = network(), network()
    lr, twin_lr = (torch.tensor(0.1, device="cuda") for _ in range(2))
    optimizer, expected = make(groups_of(model, lr)), make(groups_of(twin, twin_lr))
    give_gradients(model, 0)
    give_gradients(twin, 0)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        lr.add_(0)  # torch warns of graphs without nodes
        with pytest.raises(RuntimeError, match="take a step before the capture"):
            optimizer.step()
    for opt in (optimizer, expected):  # as if nothing had happened
        opt.step()
    assert all(torch.equal(param, other) for param, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_momentum_of_another_dtype_is_refused_where_a_graph_is_captured():
    """Each replay would start from the momentum of before the capture."""
    param = nn.Parameter(torch.ones(300, dtype=torch.bfloat16, device="cuda"))
    optimizer = LARS(torchlars.optim.SGD([param], lr=0.1, momentum=0.9, weight_decay=0.1))
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["momentum_dtype"] = torch.float32
    anything = torch.ones(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        anything.add_(1)
        with pytest.raises(RuntimeError, match=r"\(group: 0, shape: \(300,\)\); take a step before the capture"):
            optimizer.step()


@OVER_OURS
def test_numbers_are_kept_as_they_are_at_the_capture(make):
    model, twin = network(), network()
    optimizer, expected = make(groups_of(model, 0.1)), make(groups_of(twin, 0.1))
    for one, opt in ((model, optimizer), (twin, expected)):
        give_gradients(one, 0)
        opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for group in optimizer.param_groups:
        group.update(lr=7.0, weight_decay=0.9, momentum=0.1)
    graph.replay()
    expected.step()
    assert all(torch.equal(param, other) for param, other in zip(model.parameters(), twin.parameters(), strict=True))


FUSED = {
    "LARS(SGD)": lambda groups: LARS(torch.optim.SGD(groups, fused=True)),
    "LARS(SGD with momentum)": lambda groups: LARS(sgd(groups, fused=True), **CLIPPED),
    "LARS(Adam)": lambda groups: LARS(torch.optim.Adam(groups, fused=True)),
    "LARS(SGD), of updates": lambda groups: LARS(sgd(groups, fused=True), apply_to="update"),
    "LARS(torchlars SGD)": lambda groups: LARS(our_sgd(groups)),
    "torchlars SGD": our_sgd,
    "torchlars SGD in 8 bits": our_sgd_in_8_bits,
    "torchlars AdamW": torchlars.optim.AdamW,
    "LARS(torchlars Adam)": lambda groups: LARS(torchlars.optim.Adam(groups)),
    "LAMB(torchlars AdamW)": lambda groups: LAMB(torchlars.optim.AdamW(groups)),
    "LAMB(AdamW)": lambda groups: LAMB(torch.optim.AdamW(groups, fused=True)),
}


@pytest.mark.parametrize("overflows_at", [1, 2, 5])
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_a_scaler_never_waits_and_has_the_numbers_of_one_that_does(make, overflows_at):
    model, twin = network(), network()
    optimizer, expected = make(groups_of(model, 0.1)), make(groups_of(twin, 0.1))
    cls = type(expected)
    expected.__class__ = type(cls.__name__, (cls,), {"_step_supports_amp_scaling": False})
    scaler, twin_scaler = (torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3) for _ in range(2))
    begun = not optimizer.param_groups[0].get("fused", False) or optimizer.param_groups[0].get("momentum", 0) == 0
    # Only where updates are scaled does torch's fused SGD unscale. With a scale, its kernel (2.11, sm_90, float32, what
    # is aligned) rounds lr * g before it subtracts, without one it does not: p differs by an ULP here and there.
    same_bits = {"rtol": 0, "atol": 0}
    closeness = {"rtol": 1e-6, "atol": 1e-8} if make is FUSED["LARS(SGD), of updates"] else same_bits
    for step in range(1, 7):
        for one, opt, scale in ((model, optimizer, scaler), (twin, expected, twin_scaler)):
            opt.zero_grad()
            scale.scale(one(batch(step)).square().mean()).backward()
            if step == overflows_at:
                one[0].weight.grad[0, 0] = torch.inf
        torch.cuda.synchronize()
        supports = getattr(optimizer, "_step_supports_amp_scaling", False)
        assert supports or not begun
        torch.cuda.set_sync_debug_mode(NEVER_WAITS if supports else WAITS)
        scaler.step(optimizer)
        scaler.update()
        torch.cuda.set_sync_debug_mode(WAITS)
        begun = begun or step != overflows_at
        twin_scaler.step(expected)
        twin_scaler.update()
        assert scaler.get_scale() == twin_scaler.get_scale()
        for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            message = f"{step} {name}: {{}}".format
            torch.testing.assert_close(param, other, **closeness, msg=message)


@pytest.fixture
def nccl(tmp_path):
    if not dist.is_available() or not dist.is_nccl_available():
        pytest.skip("torch has no NCCL, or runs on tests/fake_cuda")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [lambda groups: LARS(sgd(groups)), *CAPTURED.values()], ids=["LARS(SGD)", *CAPTURED])
def test_fsdp2_on_one_gpu(nccl, make):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, twin = network(), network()
    fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
    lr = torch.tensor(0.1, device="cuda") if make in CAPTURED.values() else 0.1
    optimizer, expected = make(groups_of(model, lr)), make(groups_of(twin, lr))
    if type(optimizer.optim) is torch.optim.SGD and optimizer.param_groups[0]["fused"]:
        pytest.skip("torch's fused SGD takes no DTensor")
    for step in range(4):
        model(batch(step)).square().mean().backward()
        twin(batch(step)).square().mean().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(NEVER_WAITS)
        optimizer.step()
        torch.cuda.set_sync_debug_mode(WAITS)
        expected.step()
        for one in (optimizer, expected):
            one.zero_grad()
        for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param.full_tensor(), other, rtol=1e-6, atol=1e-7, msg=f"{step} {name}")


def test_squared_norms_are_completed_without_waiting(nccl):
    from torchlars import sharding

    vectors = [torch.arange(4.0, dtype=torch.float64, device="cuda") + i for i in range(3)]
    expected = [vector.clone() for vector in vectors]
    group = dist.group.WORLD
    sharding.complete([([group], vectors[0])])  # the first collective connects
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(NEVER_WAITS)
    sharding.complete([([group], vector) for vector in vectors])
    torch.cuda.set_sync_debug_mode(WAITS)
    assert all(torch.equal(vector, other) for vector, other in zip(vectors, expected, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sharding.complete([([group], vector) for vector in vectors])
    graph.replay()
    assert all(torch.equal(vector, other) for vector, other in zip(vectors, expected, strict=True))


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("wrapper", [LARS, LAMB])
@pytest.mark.filterwarnings("ignore")  # torch's own, of FSDP1 and of a world of one
def test_fsdp1_is_refused(nccl, wrapper, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(network(), use_orig_params=use_orig_params)
    optimizer = wrapper(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    model(batch(0)).square().mean().backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"FSDP1 flattens and splits them; use fully_shard \(FSDP2\)"):
        optimizer.step()
    assert all(torch.equal(param, value) for param, value in zip(model.parameters(), before, strict=True))
