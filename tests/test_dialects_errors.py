"""Errors of the options that make dialects: each names what is wrong, and nothing has changed."""

import copy
import math

import pytest
import torch
from dialects import give_gradients, layers
from optimizers import params_of
from torch import nn

from torchlars import LAMB, LARS

pytestmark = pytest.mark.usefixtures("one_thread")


BAD_OPTIONS = [
    ({"clip": 1}, TypeError, r"clip{} must be True or False \(got: 1 of type int\)"),
    ({"clip": "yes"}, TypeError, r"clip{} must be True or False \(got: 'yes' of type str\)"),
    ({"clip": None}, TypeError, r"clip{} must be True or False \(got: None of type NoneType\)"),
    ({"norm": "l2"}, ValueError, r"norm{} must be 'raw' or 'decayed' \(got: 'l2'\)"),
    ({"norm": None}, ValueError, r"norm{} must be 'raw' or 'decayed' \(got: None\)"),
    ({"norm": 2}, TypeError, r"norm{} must be 'raw' or 'decayed' \(got: 2\)"),
    ({"lr_in_momentum": 0.5}, TypeError, r"lr_in_momentum{} must be True or False \(got: 0.5 of type float\)"),
    ({"apply_to": "weights"}, ValueError, r"apply_to{} must be 'gradient' or 'update' \(got: 'weights'\)"),
    ({"apply_to": ["update"]}, TypeError, r"apply_to{} must be 'gradient' or 'update' \(got: \['update'\]\)"),
    ({"weight_decay": 0.1}, TypeError, r"weight_decay{} must be None or 'decoupled' \(got: 0.1\); how much is the b"),
    ({"weight_decay": "coupled"}, ValueError, r"weight_decay{} must be None or 'decoupled' \(got: 'coupled'\)"),
    (
        {"lr_in_momentum": True, "apply_to": "update"},
        ValueError,
        r"lr_in_momentum=True{} needs apply_to='gradient' \(got: 'update', which scales the whole step",
    ),
]


def snapshot(optimizer):
    params = params_of(optimizer)
    state = {i: dict(optimizer.state[p]) for i, p in enumerate(params) if p in optimizer.state}
    return copy.deepcopy((params, [p.grad for p in params], state, optimizer.param_groups[0]["lr"]))


def assert_unchanged(optimizer, before):
    assert str(snapshot(optimizer)) == str(before)
    now = snapshot(optimizer)
    for one, other in zip([*now[0], *now[1]], [*before[0], *before[1]], strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=repr)
def test_wrong_options_are_refused_wherever_they_are(options, error, message, backend):
    def base():
        return torch.optim.SGD([{"params": layers(0)}, {"params": layers(1)}], lr=0.5, momentum=0.9, weight_decay=0.1)

    with pytest.raises(error, match="^" + message.format("")):
        LARS(base(), **options)
    optimizer = LARS(base())
    give_gradients([optimizer], 0)
    optimizer.step()
    give_gradients([optimizer], 1)
    before, own = snapshot(optimizer), optimizer.state_dict()["lars"]
    entry = {**optimizer.state_dict(), "lars": options}
    where = r".*" if "needs" in message else ""
    name = next(iter(options))
    in_entry = message.replace(name + "{}", rf"state_dict\['lars'\]\['{name}'\]") if not where else message
    with pytest.raises(error, match=in_entry.replace("{}", r" of state_dict\['lars'\]")):
        optimizer.load_state_dict(entry)
    assert optimizer.state_dict()["lars"] == own
    assert_unchanged(optimizer, before)
    if "weight_decay" in options:
        return  # in a group it is the base's
    with pytest.raises(error, match="^" + message.format(" of parameter group 2")):
        optimizer.add_param_group({"params": layers(2), **options})
    optimizer.param_groups[1].update(options)
    with pytest.raises(error, match="^" + message.format(" of parameter group 1")):
        optimizer.step()
    assert_unchanged(optimizer, before)
    with pytest.raises(error, match="^" + message.format(" of parameter group 1")):
        LARS(optimizer.optim)


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_lr_in_momentum_needs_a_base_that_is_linear_in_lr(base):
    message = rf"lr_in_momentum=True{{}} needs a base whose step is linear in lr: .* \(got: {base.__name__}\)"
    with pytest.raises(TypeError, match=message.format("")):
        LARS(base(layers(0)), lr_in_momentum=True)
    optimizer = LARS(base(layers(0)))
    for group in ({}, {"trust_coef": None}):
        with pytest.raises(TypeError, match=message.format(" of parameter group 1")):
            optimizer.add_param_group({"params": layers(1), "lr_in_momentum": True, **group})
    with pytest.raises(TypeError, match=message.format(r" of state_dict\['lars'\]")):
        optimizer.load_state_dict({**optimizer.state_dict(), "lars": {"lr_in_momentum": True}})
    assert optimizer.lr_in_momentum is False


@pytest.mark.parametrize("group", [{}, {"trust_coef": None}], ids=str)
def test_lr_in_momentum_of_a_group_needs_coupled_decay(group):
    """A group that is not adapted was stepped with coupled weight decay, whatever the wrapper was told."""
    optimizer = LARS(torch.optim.SGD(layers(0), lr=0.1, weight_decay=0.5), weight_decay="decoupled")
    message = r"^lr_in_momentum=True of parameter group 1 hides lr from the base, .* \(got: weight_decay='decoupled'\)"
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": layers(1), "lr_in_momentum": True, **group})


class WithoutLr(torch.optim.Optimizer):
    def __init__(self, params, **defaults):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad)


LR_ERRORS = [
    ({}, TypeError, r"optimizer must have a learning rate \(got: WithoutLr, without lr in parameter group 0\)"),
    ({"lr": None}, TypeError, r"lr of parameter group 0 must be a non-negative number \(got: None of type NoneType\)"),
    ({"lr": -1.0}, ValueError, r"lr of parameter group 0 must be a non-negative number \(got: -1.0\)"),
    ({"lr": math.nan}, ValueError, r"lr of parameter group 0 must be a non-negative number \(got: nan\)"),
    ({"lr": torch.ones(2)}, ValueError, r"lr of parameter group 0 must be a number or a tensor of one element \(got: "),
]


@pytest.mark.parametrize(("defaults", "error", "message"), LR_ERRORS, ids=repr)
def test_lamb_needs_an_lr(defaults, error, message):
    with pytest.raises(error, match=message):
        LAMB(WithoutLr(layers(0), **defaults))
    optimizer = LAMB(WithoutLr(layers(0), lr=0.1))
    give_gradients([optimizer], 0)
    optimizer.param_groups[0].update(defaults) if defaults else optimizer.param_groups[0].pop("lr")
    optimizer.defaults.update(defaults) if defaults else optimizer.defaults.pop("lr")
    before = [param.detach().clone() for param in params_of(optimizer)]
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(map(torch.equal, before, params_of(optimizer)))
    LAMB(WithoutLr([{"params": layers(0), "trust_coef": None}], **defaults))  # what is not adapted needs none


@pytest.mark.parametrize(("defaults", "error", "message"), LR_ERRORS, ids=repr)
def test_clip_needs_an_lr(defaults, error, message):
    with pytest.raises(error, match=message):
        LARS(WithoutLr(layers(0), **defaults), clip=True)
    optimizer = LARS(WithoutLr(layers(0), **defaults))  # which needs none
    give_gradients([optimizer], 0)
    optimizer.clip = True
    before = [(param.detach().clone(), param.grad.clone()) for param in params_of(optimizer)]
    with pytest.raises(error, match=message):
        optimizer.step()
    for (value, grad), param in zip(before, params_of(optimizer), strict=True):
        assert torch.equal(value, param)
        assert torch.equal(grad, param.grad)


@pytest.mark.parametrize("wrap", [LAMB, lambda base: LARS(base, apply_to="update")], ids=["LAMB", "LARS-update"])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            "float8",
            TypeError,
            r"floating dtype with at least 16 bits \(group: 1, parameter: 1, dtype: torch.float8_e4m",
        ),
        ("FSDP1", RuntimeError, r"but FSDP1 flattens and splits them; .* \(group: 1, parameter: 1, shape: \(3, 4\)\)"),
        (
            "expanded",
            RuntimeError,
            r"of a parameter must not share memory \(strides: \(0, 1\)\) \(group: 1, parameter: 1",
        ),
        (
            "conjugated",
            RuntimeError,
            r"parameters must not be lazily conjugated or negated, .* \(group: 1, parameter: 1",
        ),
        (
            "negated",
            RuntimeError,
            r"parameters must not be lazily conjugated or negated, .* \(group: 1, parameter: 1",
        ),
    ],
)
def test_a_parameter_whose_update_cannot_be_scaled_is_named_and_nothing_changes(kind, error, message, wrap, backend):
    fine, param = nn.Parameter(torch.ones(2)), nn.Parameter(torch.rand(3, 4))
    if kind == "float8":
        param = nn.Parameter(torch.ones(3, 4).to(torch.float8_e4m3fn))
    elif kind == "FSDP1":
        param._fsdp_flattened = True
    elif kind == "expanded":
        param = nn.Parameter(torch.rand(1, 4).expand(3, 4))
    elif kind == "conjugated":
        param = nn.Parameter(torch.rand(3, 4, dtype=torch.complex64).conj())
    elif kind == "negated":
        param = nn.Parameter(torch.rand(3, 4, dtype=torch.complex64).conj().imag)
        assert param.is_neg()
    before = param.detach().clone()
    base = torch.optim.SGD([{"params": [fine]}, {"params": [nn.Parameter(torch.ones(1)), param]}], lr=0.5)
    for one in (fine, param):
        one.grad = torch.ones(one.shape, dtype=one.dtype) if kind != "float8" else torch.ones_like(one)
    optimizer = wrap(base)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert fine.tolist() == [1.0, 1.0]
    assert torch.equal(param.detach(), before)
    assert not base.state
    base.param_groups[1]["trust_coef"] = None
    base.param_groups[1]["params"].pop()
    optimizer.step()
