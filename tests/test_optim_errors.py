"""Errors of torchlars.optim.SGD: each names what is wrong, and nothing has changed."""

import copy
import math

import pytest
import torch
from sgd_cases import (
    EPS,
    TRUST_COEF,
    assert_same,
    give_gradients,
    parameter,
    raises_and_changes_nothing,
    unders,
    with_gradient,
)

from torchlars import LARS, optim

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


BAD = {
    "lr negative": ({"lr": -0.1}, ValueError, r"lr of parameter group 1 must be a non-negative number \(got: -0.1\)"),
    "lr NaN": ({"lr": math.nan}, ValueError, r"lr of parameter group 1 must be a non-negative number \(got: nan\)"),
    "lr infinite": (
        {"lr": math.inf},
        ValueError,
        r"lr of parameter group 1 must be a non-negative number \(got: inf\)",
    ),
    "lr string": ({"lr": "0.1"}, TypeError, r"lr of parameter group 1 must be a .* \(got: '0.1' of type str\)"),
    "lr None": ({"lr": None}, TypeError, r"lr of parameter group 1 must be a .* \(got: None of type NoneType\)"),
    "lr of two": (
        {"lr": torch.ones(2)},
        ValueError,
        r"lr of parameter group 1 must be a number or a tensor of one element \(got: \(2,\)\)",
    ),
    "lr true": (
        {"lr": torch.tensor(True)},
        TypeError,
        r"lr of parameter group 1 must be a real number in a dense tensor \(got: torch.bool, torch.strided\)",
    ),
    "lr complex": (
        {"lr": torch.tensor(0.1 + 1j)},
        TypeError,
        r"lr of parameter group 1 must be a real number in a dense tensor \(got: torch.complex64, torch.strided\)",
    ),
    "lr sparse": (
        {"lr": torch.tensor([0.1]).to_sparse()},
        TypeError,
        r"lr of parameter group 1 must be a real number in a dense tensor \(got: torch.float32, torch.sparse_coo\)",
    ),
    "lr of none": (
        {"lr": torch.ones(0, 3)},
        ValueError,
        r"lr of parameter group 1 must be a number or a tensor of one element \(got: \(0, 3\)\)",
    ),
    "momentum negative": ({"momentum": -1}, ValueError, r"momentum of parameter group 1 must be a .* \(got: -1\)"),
    "momentum NaN": ({"momentum": math.nan}, ValueError, r"momentum of parameter group 1 must be a .* \(got: nan\)"),
    "momentum True": (
        {"momentum": True},
        TypeError,
        r"momentum of parameter group 1 must be a .* \(got: True of type bool",
    ),
    "momentum tensor": (
        {"momentum": torch.tensor([0.9, 0.8])},
        TypeError,
        r"momentum of parameter group 1 must be a number \(got: a tensor of shape \(2,\)",
    ),
    "dampening NaN": (
        {"dampening": math.nan},
        ValueError,
        r"dampening of parameter group 1 must be a finite .* \(got: nan",
    ),
    "dampening string": (
        {"dampening": "0"},
        TypeError,
        r"dampening of parameter group 1 must be a finite .* \(got: '0'",
    ),
    "decay negative": (
        {"weight_decay": -0.1},
        ValueError,
        r"weight_decay of parameter group 1 must be .* \(got: -0.1\)",
    ),
    "decay string": (
        {"weight_decay": "0.1"},
        TypeError,
        r"weight_decay of parameter group 1 must be .* \(got: '0.1' of",
    ),
    "nesterov without momentum": (
        {"nesterov": True, "momentum": 0},
        ValueError,
        r"nesterov of parameter group 1 needs momentum and no dampening \(momentum: 0.0, dampening: 0.0\)",
    ),
    "nesterov with dampening": (
        {"nesterov": True, "dampening": 0.5},
        ValueError,
        r"nesterov of parameter group 1 needs momentum and no dampening \(momentum: 0.9, dampening: 0.5\)",
    ),
    "momentum_dtype": (
        {"momentum_dtype": torch.float16},
        ValueError,
        r"momentum_dtype of parameter group 1 must be None, torch.float32 or torch.int8 \(got: torch.float16\)",
    ),
    "differentiable": (
        {"differentiable": True},
        ValueError,
        r"differentiable of parameter group 1 must be False \(got: True\)|differentiable must be False \(group: 1, got: True",
    ),
}


def small_groups():
    return [{"params": [with_gradient(parameter(n, scale=n)) for n in numels]} for numels in ((3, 4), (2, 5))]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("steps", [0, 1])
@unders
def test_a_bad_hyper_parameter_of_one_group_is_refused_and_nothing_changes(under_lars, steps, bad, backend):
    options, error, message = BAD[bad]
    optimizer = optim.SGD(small_groups(), lr=0.5, momentum=0.9, weight_decay=0.1)
    optimizer = LARS(optimizer) if under_lars else optimizer
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups[1].update(options)
    raises_and_changes_nothing(optimizer, error, message)
    assert (
        optimizer.param_groups[1].items()
        >= {k: v for k, v in options.items() if not isinstance(v, torch.Tensor)}.items()
    )


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_hyper_parameter_of_one_group_is_refused_by_the_constructor(bad):
    options, error, message = BAD[bad]
    first, second = small_groups()
    with pytest.raises(error, match=message):
        optim.SGD([first, {**second, **options}], lr=0.5, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("bad", BAD)
def test_a_group_with_a_bad_hyper_parameter_is_not_added(bad):
    options, error, message = BAD[bad]
    first, second = small_groups()
    optimizer = optim.SGD([first], lr=0.5, momentum=0.9, weight_decay=0.1)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({**second, **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad != "differentiable"])
def test_a_bad_argument_is_refused(bad):
    options, error, message = BAD[bad]
    with pytest.raises(error, match=message.replace(" of parameter group 1", "")):
        optim.SGD(small_groups(), **{"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, **options})


@unders
def test_momentum_that_is_no_tensor_is_refused_and_nothing_changes(under_lars, backend):
    optimizer = optim.SGD(small_groups(), lr=0.5, momentum=0.9, weight_decay=0.1)
    optimizer = LARS(optimizer) if under_lars else optimizer
    optimizer.state[optimizer.param_groups[1]["params"][0]]["momentum_buffer"] = 3.0
    raises_and_changes_nothing(optimizer, RuntimeError, r"momentum_buffer must be a tensor \(got: 3.0\)")


@unders
def test_momentum_of_another_shape_is_refused_and_nothing_changes(under_lars, backend):
    optimizer = optim.SGD(small_groups(), lr=0.5, momentum=0.9, weight_decay=0.1)
    optimizer = LARS(optimizer) if under_lars else optimizer
    optimizer.step()
    optimizer.state[optimizer.param_groups[1]["params"][0]]["momentum_buffer"] = torch.zeros(7)
    message = r"momentum_buffer must have its parameter's shape \(got: \(7,\)\) \(group: 1, parameter: 0"
    raises_and_changes_nothing(optimizer, RuntimeError, message)


def test_after_a_step_that_was_refused_the_trust_ratios_are_still_those_of_the_last_one(backend):
    optimizer = LARS(optim.SGD(small_groups(), lr=0.5, momentum=0.9, weight_decay=0.1))
    optimizer.step()
    ratios = optimizer.trust_ratios()
    optimizer.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr of parameter group 1"):
        optimizer.step()
    after = optimizer.trust_ratios()
    assert ratios.keys() == after.keys()
    assert all(torch.equal(after[param], ratio) for param, ratio in ratios.items())


@pytest.mark.parametrize("argument", ["foreach", "fused", "differentiable", "capturable"])
def test_arguments_that_choose_among_implementations_do_not_exist(argument):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        optim.SGD(small_groups(), lr=0.5, **{argument: False})


@unders
def test_a_differentiable_group_is_neither_loaded_nor_stepped(under_lars, backend):
    ours = optim.SGD(small_groups(), lr=0.5, momentum=0.9, weight_decay=0.1)
    ours = LARS(ours) if under_lars else ours
    state_dict = ours.state_dict()
    state_dict["param_groups"][1]["differentiable"] = True
    with pytest.raises(ValueError, match="differentiable"):
        ours.load_state_dict(state_dict)
    ours.param_groups[1]["differentiable"] = True
    raises_and_changes_nothing(ours, ValueError, "differentiable")


@pytest.mark.parametrize("implementation", [{"foreach": True}, {"fused": True}], ids=str)
@unders
def test_a_loaded_choice_among_implementations_is_passed_over(under_lars, implementation, backend):
    theirs = torch.optim.SGD(small_groups(), lr=0.5, momentum=0.9, weight_decay=0.1, **implementation)
    ours = optim.SGD(small_groups(), lr=0.1)
    theirs, ours = (LARS(one, EPS, TRUST_COEF) if under_lars else one for one in (theirs, ours))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for _ in range(3):
        give_gradients([ours, theirs], 3)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 2e-6)
