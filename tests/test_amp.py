"""GradScaler over bases that unscale and skip by themselves: nobody reads a number off the device, and no number differs.

The oracle is the scaler's other path, which unscales the gradients, reads ``found_inf`` on the host and does not call
``step`` where it is set. Scales are powers of two, so that to unscale rounds nothing and bits can be compared.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW

import torchlars
from torchlars import LAMB, LARS

STEPS = 7


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)


def groups_of(model: nn.Module, **of_second: Any) -> list[dict[str, Any]]:
    """Two groups with numbers of their own, and one that is left to the base."""
    first, second = model[0], model[2]
    return [
        {"params": [first.weight], "weight_decay": 0.1},
        {"params": [second.weight, first.bias], "weight_decay": 0.03, "lr": 0.2, **of_second},
        {"params": [second.bias], "weight_decay": 0.05, "trust_coef": None},
    ]


def loss_of(model: nn.Module, step: int) -> Tensor:
    random = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 6, generator=random, dtype=torch.float64).to(model[0].weight.dtype)
    return model(inputs).square().mean()


BASES = {
    "SGD": lambda groups: SGD(groups, lr=0.4, fused=True),
    "SGD with momentum": lambda groups: SGD(groups, lr=0.4, momentum=0.9, nesterov=True, fused=True),
    "SGD with dampening": lambda groups: SGD(groups, lr=0.4, momentum=0.9, dampening=0.5, fused=True),
    "Adam": lambda groups: Adam(groups, lr=0.02, fused=True),
    "AdamW": lambda groups: AdamW(groups, lr=0.02, fused=True),
    "Adagrad": lambda groups: Adagrad(groups, lr=0.02, fused=True),
    "torchlars Adam": lambda groups: torchlars.optim.Adam(groups, lr=0.02),
    "torchlars AdamW": lambda groups: torchlars.optim.AdamW(groups, lr=0.02),
    "torchlars SGD": lambda groups: torchlars.optim.SGD(groups, lr=0.4),
    "torchlars SGD with momentum": lambda groups: torchlars.optim.SGD(groups, lr=0.4, momentum=0.9, nesterov=True),
    "torchlars SGD with dampening": lambda groups: torchlars.optim.SGD(groups, lr=0.4, momentum=0.9, dampening=0.5),
}
WRAPPERS = {
    "no wrapper": lambda base: base,
    "LARS": lambda base: LARS(base, eps=0.05, trust_coef=0.3),
    "LARS, clipped": lambda base: LARS(base, eps=0.05, trust_coef=0.3, clip=True, norm="decayed"),
    "LARS, of updates": lambda base: LARS(base, eps=0.05, trust_coef=0.3, apply_to="update"),
    "LARS, decoupled": lambda base: LARS(base, eps=0.05, trust_coef=0.3, weight_decay="decoupled"),
    "LAMB": lambda base: LAMB(base, eps=0.05, trust_coef=0.3),
    "LARS, lr in momentum": lambda base: LARS(base, eps=0.05, trust_coef=0.3, norm="decayed", lr_in_momentum=True),
}


def cases() -> list[Any]:
    """Every base under LARS and LAMB, and every dialect over two bases."""
    few = ("SGD with momentum", "torchlars SGD with momentum")
    return [
        (wrapper, base)
        for wrapper in WRAPPERS
        for base in BASES
        if (wrapper in ("LARS", "LAMB") or base in few) and not (wrapper == "no wrapper" and "torchlars" not in base)
    ]


class Reads:
    """Counts how often the scaler reads on the host whether to take a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        waits = torch.amp.GradScaler._maybe_opt_step

        def counted(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return waits(scaler, *args, **kwargs)

        monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", counted)


def waiting(optimizer: Any) -> Any:
    """Return an optimizer whose scaler takes the other path."""
    cls = type(optimizer)
    optimizer.__class__ = type(cls.__name__, (cls,), {"_step_supports_amp_scaling": False})
    return optimizer


def train(optimizer: Any, model: nn.Module, scaler: Any, step: int, overflows: bool, clip: bool = False) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(model, step)).backward()
    if overflows:
        model[0].weight.grad[0, 0] = torch.inf
        model[2].weight.grad[1, 1] = torch.nan
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()


def assert_same_state(state: Any, expected: Any, message: str) -> None:
    """A state that has begun in a skipped step, with the zeros that it begins with anyway, is as good as none."""
    assert expected.keys() == state.keys() or not expected, message
    for key, value in state.items():
        assert torch.equal(value, expected.get(key, torch.zeros_like(value))), (message, key)


@pytest.mark.parametrize("overflows_at", [1, 2, 5])
@pytest.mark.parametrize(("wrapper", "base"), cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_numbers_are_those_of_the_path_that_waits(dtype, wrapper, base, overflows_at, backend, monkeypatch):
    reads = Reads(monkeypatch)
    model, twin = network(dtype), network(dtype)
    optimizer = WRAPPERS[wrapper](BASES[base](groups_of(model)))
    expected = waiting(WRAPPERS[wrapper](BASES[base](groups_of(twin))))
    scaler, twin_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) for _ in range(2))
    scales = set()
    waits_until = None  # the step in which a momentum has begun
    if "dampening" in base or base == "SGD with momentum":
        waits_until = 2 if overflows_at == 1 else 1
    if base == "Adagrad" and not hasattr(optimizer.optim, "_step_supports_amp_scaling"):  # it has no such path in 2.11
        waits_until = STEPS
    for step in range(1, STEPS + 1):
        before = copy.deepcopy(model.state_dict())
        train(expected, twin, twin_scaler, step, step == overflows_at)
        reads.count = 0
        train(optimizer, model, scaler, step, step == overflows_at)
        assert reads.count == (waits_until is not None and step <= waits_until)
        scales.add(scaler.get_scale())
        assert scaler.get_scale() == twin_scaler.get_scale()
        for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(param, other), (step, name)
            assert torch.equal(param, before[name]) == (step == overflows_at), (step, name)
            assert_same_state(optimizer.state[param], expected.state[other], f"{step} {name}")
        for one in (optimizer, optimizer.optim if wrapper != "no wrapper" else optimizer):
            assert not hasattr(one, "grad_scale")
            assert not hasattr(one, "found_inf")
        if wrapper != "no wrapper" and step != overflows_at:
            ratios = zip(optimizer.trust_ratios().values(), expected.trust_ratios().values(), strict=True)
            assert all(torch.equal(ratio, other) for ratio, other in ratios)
    assert len(scales) > 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.03, 0.05]


@pytest.mark.parametrize("base", ["SGD with momentum", "Adam", "torchlars SGD with momentum"])
@pytest.mark.parametrize("wrapper", ["LARS", "LARS, of updates", "LAMB"])
def test_gradients_that_were_unscaled_to_be_clipped(wrapper, base, backend, monkeypatch):
    model, twin = network(torch.float32), network(torch.float32)
    optimizer = WRAPPERS[wrapper](BASES[base](groups_of(model)))
    expected = waiting(WRAPPERS[wrapper](BASES[base](groups_of(twin))))
    scaler, twin_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    for step in range(1, 5):
        train(optimizer, model, scaler, step, step == 3, clip=True)
        train(expected, twin, twin_scaler, step, step == 3, clip=True)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(param, other)
            assert_same_state(optimizer.state[param], expected.state[other], f"{step}")


@pytest.mark.parametrize("base", ["SGD with momentum", "torchlars SGD with momentum"])
def test_groups_of_gradients_and_of_updates_side_by_side(base, backend):
    """The base has one scale for all groups: where some gradients are unscaled before it, all must be."""
    model, twin = network(torch.float32), network(torch.float32)
    optimizer = WRAPPERS["LARS"](BASES[base](groups_of(model, apply_to="update")))
    expected = waiting(WRAPPERS["LARS"](BASES[base](groups_of(twin, apply_to="update"))))
    scaler, twin_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    for step in range(1, 5):
        train(optimizer, model, scaler, step, step == 3)
        train(expected, twin, twin_scaler, step, step == 3)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(param, other)
        ratios = zip(optimizer.trust_ratios().values(), expected.trust_ratios().values(), strict=True)
        assert step == 3 or all(torch.equal(ratio, other) for ratio, other in ratios)


def test_after_a_step_gradients_are_unscaled_and_after_a_skipped_one_as_they_were(backend):
    param = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARS(SGD([param], lr=1.0, weight_decay=0.1, fused=True), eps=0, trust_coef=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    param.grad = scaler.scale(torch.tensor([2.0, 0.0]))
    scaler.step(optimizer)
    scaler.update()
    ratio = 0.5 * 5.0 / (2.0 + 0.1 * 5.0)
    torch.testing.assert_close(param.grad, ratio * torch.tensor([2.3, 0.4]))
    torch.testing.assert_close(param.detach(), torch.tensor([3.0, 4.0]) - ratio * torch.tensor([2.3, 0.4]))

    after = param.detach().clone()
    param.grad = torch.tensor([torch.inf, 1.0])
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param.grad, torch.tensor([torch.inf, 1.0]))
    assert torch.equal(param, after)
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("base", ["SGD", "Adam", "torchlars SGD"])
@pytest.mark.parametrize("wrapper", ["LARS, of updates", "LAMB"])
def test_gradients_of_scaled_updates_are_what_the_base_alone_leaves(wrapper, base, overflows, backend):
    """Torch's fused bases unscale them, as their kernels write gradients; torchlars.optim.SGD leaves them scaled."""
    model, twin = network(torch.float32), network(torch.float32)
    optimizer, expected = WRAPPERS[wrapper](BASES[base](groups_of(model))), BASES[base](groups_of(twin))
    for one, opt in ((model, optimizer), (twin, expected)):
        train(opt, one, torch.amp.GradScaler("cpu", init_scale=2.0**10), 1, overflows)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("base", ["SGD", "Adam", "torchlars SGD with momentum"])
@pytest.mark.parametrize("wrapper", ["LARS", "LARS, of updates", "LAMB"])
@pytest.mark.parametrize(
    ("grad_scale", "found_inf"), [(8.0, None), (None, 0.0), (None, 1.0), (8.0, 0.0), (8.0, 1.0), (None, None)]
)
def test_a_scaler_may_leave_either_tensor_out(grad_scale, found_inf, wrapper, base, backend):
    """To ``unscale_`` beforehand leaves no scale; who needs no skipped steps passes no ``found_inf``."""
    model, twin = network(torch.float32), network(torch.float32)
    optimizer, expected = (WRAPPERS[wrapper](BASES[base](groups_of(one))) for one in (model, twin))
    (loss_of(model, 1) * (grad_scale or 1.0)).backward()
    loss_of(twin, 1).backward()
    if found_inf != 1.0:
        expected.step()
    given = [None if number is None else torch.tensor(number) for number in (grad_scale, found_inf)]
    optimizer.grad_scale, optimizer.found_inf = given
    optimizer.step()
    assert [optimizer.grad_scale, optimizer.found_inf] == given  # the scaler takes them away
    assert not hasattr(optimizer.optim, "grad_scale")
    assert not hasattr(optimizer.optim, "found_inf")
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("wrapper", ["LARS", "LAMB", "no wrapper"])
def test_float16_gradients(wrapper, backend):
    """The path that waits refuses them; here they are unscaled in float32, and rounded once."""
    model, twin = network(torch.float16), network(torch.float16)
    make = lambda groups: torchlars.optim.SGD(groups, lr=0.4, momentum=0.9, momentum_dtype=torch.float32)  # noqa: E731
    optimizer, expected = (WRAPPERS[wrapper](make(groups_of(one))) for one in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        train(optimizer, model, scaler, step, step == 1)
        expected.zero_grad()
        if step != 1:
            (loss_of(twin, step) * 2.0**10).backward()
            for param in twin.parameters():
                param.grad_dtype = None
                param.grad = param.grad.float() / 2.0**10
            expected.step()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(param, other)


def test_a_base_that_wants_the_scaler_itself_is_left_the_other_path(monkeypatch):
    class WantsScaler(SGD):
        def step(self, closure=None, *, grad_scaler=None):
            assert grad_scaler is None
            return super().step(closure)

    model, reads = network(torch.float32), Reads(monkeypatch)
    optimizer = LARS(WantsScaler(model.parameters(), lr=0.4, fused=True))
    scaler = torch.amp.GradScaler("cpu")
    train(optimizer, model, scaler, 0, False)
    assert reads.count == 1


@pytest.mark.parametrize("make", [lambda params: SGD(params, lr=0.4), lambda params: Adam(params, lr=0.02)])
@pytest.mark.parametrize("wrap", [LARS, LAMB])
def test_a_base_that_cannot_unscale_is_left_the_other_path(wrap, make, monkeypatch):
    model, reads = network(torch.float32), Reads(monkeypatch)
    scaler = torch.amp.GradScaler("cpu")
    train(wrap(make(model.parameters())), model, scaler, 0, False)
    assert reads.count == 1


def test_layers_that_torch_steps_are_left_the_other_path(monkeypatch):
    embedding, reads = nn.Embedding(5, 3, sparse=True), Reads(monkeypatch)
    optimizer = LARS(torchlars.optim.SGD(embedding.parameters(), lr=0.4))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(embedding(torch.tensor([1, 3])).sum()).backward()
    scaler.step(optimizer)
    assert reads.count == 1


class Raises(Adam):
    def step(self, closure=None):
        assert self.found_inf is not None
        raise ZeroDivisionError("in the base")


def raises(wrap):
    def make(model):
        return wrap(Raises(model.parameters(), lr=0.02, fused=True))

    return make


def refuses_a_group(make):
    def with_such_a_group(model):
        optimizer = make(SGD(model.parameters(), lr=0.4, fused=True))
        optimizer.param_groups[0]["eps"] = -1.0
        return optimizer

    return with_such_a_group


def refuses_a_parameter(make):
    def with_such_a_parameter(model):
        next(model.parameters())._fsdp_flattened = True
        return make(SGD(model.parameters(), lr=0.4, fused=True))

    return with_such_a_parameter


def refuses_a_number(model):
    optimizer = torchlars.optim.SGD(model.parameters(), lr=0.4)
    optimizer.param_groups[0]["momentum"] = -1.0
    return optimizer


def warns_of_zeros(model):
    nn.init.zeros_(next(model.parameters()))
    return LARS(SGD(model.parameters(), lr=16.0, fused=True))


RAISING = {
    "LARS, in the base": (raises(LARS), "in the base"),
    "LAMB, in the base": (raises(LAMB), "in the base"),
    "LARS, of a group": (refuses_a_group(LARS), "eps of parameter group 0 must be a non-negative number"),
    "LAMB, of a group": (refuses_a_group(LAMB), "eps of parameter group 0 must be a non-negative number"),
    "LARS, of a parameter": (refuses_a_parameter(LARS), "FSDP1 flattens"),
    "LARS, of updates": (refuses_a_parameter(partial(LARS, apply_to="update")), "FSDP1 flattens"),
    "LAMB, of a parameter": (refuses_a_parameter(LAMB), "FSDP1 flattens"),
    "LARS, of a warning": (warns_of_zeros, "weights are all 0"),
    "torchlars SGD": (refuses_a_number, "momentum of parameter group 0 must be a non-negative number"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("make", "message"), RAISING.values(), ids=RAISING)
def test_a_step_that_raises_gives_the_scale_back(make, message):
    model = network(torch.float32)
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(Exception, match=message):
        train(optimizer, model, scaler, 0, False)
    for one in (optimizer, getattr(optimizer, "optim", optimizer)):
        assert not hasattr(one, "grad_scale")
        assert not hasattr(one, "found_inf")


@pytest.mark.parametrize("base", ["SGD with momentum", "torchlars SGD with dampening"])
def test_a_momentum_of_none_has_not_begun(base, backend, monkeypatch):
    """Older versions of torch left such in their state dicts."""
    model, twin, reads = network(torch.float32), network(torch.float32), Reads(monkeypatch)
    optimizer = WRAPPERS["LARS"](BASES[base](groups_of(model)))
    expected = waiting(WRAPPERS["LARS"](BASES[base](groups_of(twin))))
    for one, opt in ((model, optimizer), (twin, expected)):
        opt.state.update({param: {"momentum_buffer": None} for param in one.parameters()})
    scaler, twin_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    for step in range(1, 5):
        train(optimizer, model, scaler, step, step == 1)
        train(expected, twin, twin_scaler, step, step == 1)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert reads.count == 4 + 2


def test_layers_with_gaps_of_groups_that_decouple_beside_others(backend):
    """Over a base that takes ratios, of groups whose decay it would multiply by them the gradients are written here."""

    def build(wrap):
        random = torch.Generator().manual_seed(2)
        wide = [torch.randn(4, 6, generator=random) for _ in range(3)]
        params = [nn.Parameter(values[:, :3]) for values in wide]  # which no plain layer is
        groups = [
            {"params": params[:1], "weight_decay": 0.1, "decoupled_weight_decay": True},
            {"params": params[1:2], "weight_decay": 0.03},
            {"params": params[2:], "trust_coef": None, "weight_decay": 0.05},
        ]
        return wrap(WRAPPERS["LARS"](torchlars.optim.SGD(groups, lr=0.4, momentum=0.9))), params

    (optimizer, params), (expected, twins) = build(lambda optimizer: optimizer), build(waiting)
    scaler, twin_scaler = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    for step in range(1, 5):
        for one, of_one, scale in ((optimizer, params, scaler), (expected, twins, twin_scaler)):
            random = torch.Generator().manual_seed(10 + step)
            for param in of_one:
                param.grad = scale.scale(torch.randn(4, 3, generator=random))
            if step == 2:
                of_one[0].grad[0, 0] = torch.inf
            scale.step(one)
            scale.update()
        assert all(map(torch.equal, params, twins))
        ratios = zip(optimizer.trust_ratios().values(), expected.trust_ratios().values(), strict=True)
        assert step == 2 or all(torch.equal(ratio, other) for ratio, other in ratios)
