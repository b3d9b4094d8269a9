"""Errors of torchlars.optim.Adam and AdamW: each names what is wrong, and nothing has changed."""

import copy
import math

import pytest
import torch
from adam_cases import ADAMS, adams, groups_of, pair
from optimizers import params_of
from sgd_cases import (
    ODD,
    assert_unchanged,
    flagged,
    give_gradients,
    layers,
    parameter,
    raises_and_changes_nothing,
    run,
    snapshot,
    sparse_gradient,
    with_gradient,
)

from torchlars import LAMB, LARS, optim

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")
KINDS = {
    "Adam": optim.Adam,
    "AdamW": optim.AdamW,
    "LARS(Adam)": LARS.over(optim.Adam),
    "LARS(AdamW)": LARS.over(optim.AdamW),
    "LAMB(Adam)": LAMB.over(optim.Adam),
    "LAMB(AdamW)": LAMB.over(optim.AdamW),
}
kinds = pytest.mark.parametrize("build", KINDS.values(), ids=list(KINDS))

BAD = {
    "lr negative": ({"lr": -0.1}, ValueError, r"lr of parameter group 1 must be a non-negative number \(got: -0.1\)"),
    "lr NaN": ({"lr": math.nan}, ValueError, r"lr of parameter group 1 must be a non-negative number \(got: nan\)"),
    "lr string": ({"lr": "0.1"}, TypeError, r"lr of parameter group 1 must be a .* \(got: '0.1' of type str\)"),
    "lr of two": (
        {"lr": torch.ones(2)},
        ValueError,
        r"lr of parameter group 1 must be a number or a tensor of one element \(got: \(2,\)\)",
    ),
    "lr complex": (
        {"lr": torch.tensor(1j)},
        TypeError,
        r"lr of parameter group 1 must be a real number in a dense tensor \(got: torch.complex64, torch.strided\)",
    ),
    "betas a number": ({"betas": 0.9}, TypeError, r"betas of parameter group 1 must be two numbers \(got: 0.9\)"),
    "betas of three": (
        {"betas": (0.9, 0.8, 0.7)},
        TypeError,
        r"betas of parameter group 1 must be two numbers \(got: \(0.9, 0.8, 0.7\)\)",
    ),
    "beta1 negative": (
        {"betas": (-0.1, 0.9)},
        ValueError,
        r"beta1 of parameter group 1 must be a non-negative number \(got: -0.1\)",
    ),
    "beta2 NaN": (
        {"betas": (0.9, math.nan)},
        ValueError,
        r"beta2 of parameter group 1 must be a non-negative number \(got: nan\)",
    ),
    "beta1 = 1": (
        {"betas": (1.0, 0.9)},
        ValueError,
        r"beta1 of parameter group 1 must be below 1 \(got: 1.0\)",
    ),
    "beta2 = 1": ({"betas": [0.9, 1]}, ValueError, r"beta2 of parameter group 1 must be below 1 \(got: 1.0\)"),
    "beta1 string": ({"betas": ("0.9", 0.9)}, TypeError, r"beta1 of parameter group 1 must be a .*'0.9' of type str"),
    "beta2 tensor": (
        {"betas": (0.9, torch.ones(2))},
        TypeError,
        r"beta2 of parameter group 1 must be a number \(got: a tensor of shape \(2,\)",
    ),
    "eps negative": ({"eps": -1e-8}, ValueError, r"eps of parameter group 1 must be a non-negative number"),
    "eps infinite": ({"eps": math.inf}, ValueError, r"eps of parameter group 1 must be a non-negative number"),
    "eps None": ({"eps": None}, TypeError, r"eps of parameter group 1 must be a .* \(got: None of type NoneType\)"),
    "decay negative": (
        {"weight_decay": -0.1},
        ValueError,
        r"weight_decay of parameter group 1 must be a non-negative number \(got: -0.1\)",
    ),
    "decay string": ({"weight_decay": "0.1"}, TypeError, r"weight_decay of parameter group 1 must be .*'0.1' of"),
    "amsgrad": (
        {"amsgrad": True},
        ValueError,
        r"amsgrad of parameter group 1 must be False \(got: True\); use torch.optim.Adam",
    ),
    "state_dtype": (
        {"state_dtype": torch.float16},
        ValueError,
        r"state_dtype of parameter group 1 must be None or torch.float32 \(got: torch.float16\)",
    ),
    "state_dtype by its name": (
        {"state_dtype": "float32"},
        ValueError,
        r"state_dtype of parameter group 1 must be None or torch.float32 \(got: 'float32'\)",
    ),
    "differentiable": (
        {"differentiable": True},
        ValueError,
        r"differentiable of parameter group 1 must be False \(got: True\)|differentiable must be False \(group: 1, got: True",
    ),
}
bads = pytest.mark.parametrize("bad", BAD)


def small_groups():
    return [{"params": [with_gradient(parameter(n, scale=n)) for n in numels]} for numels in ((3, 4), (2, 5))]


@bads
@pytest.mark.parametrize("steps", [0, 1])
@kinds
def test_a_bad_hyper_parameter_of_one_group_is_refused_and_nothing_changes(build, steps, bad, backend):
    options, error, message = BAD[bad]
    optimizer = build(small_groups(), lr=0.5, weight_decay=0.1)
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups[1].update(options)
    raises_and_changes_nothing(optimizer, error, message)


@bads
@adams
def test_a_bad_hyper_parameter_is_refused_by_the_constructor_and_as_a_new_groups(ours_of, theirs_of, bad):
    options, error, message = BAD[bad]
    first, second = small_groups()
    with pytest.raises(error, match=message):
        ours_of([first, {**second, **options}], lr=0.5, weight_decay=0.1)
    optimizer = ours_of([first], lr=0.5, weight_decay=0.1)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({**second, **options})
    assert len(optimizer.param_groups) == 1
    if bad != "differentiable":
        with pytest.raises(error, match=message.replace(" of parameter group 1", "")):
            ours_of(small_groups(), **{"lr": 0.5, "weight_decay": 0.1, **options})


@bads
@adams
def test_a_state_dict_with_a_bad_hyper_parameter_is_refused_and_nothing_changes(ours_of, theirs_of, bad, backend):
    options, error, message = BAD[bad]
    if bad == "state_dtype by its name":
        pytest.skip("which is how a state dict has it")
    optimizer = ours_of(small_groups(), lr=0.5, weight_decay=0.1)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1].update(options)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    assert optimizer.state_dict()["param_groups"] == groups
    assert not optimizer._optimizer_load_state_dict_pre_hooks


@adams
def test_amsgrad_names_torchs_own(ours_of, theirs_of):
    name = theirs_of.__name__
    with pytest.raises(ValueError, match=rf"^amsgrad must be False \(got: True\); use torch.optim.{name}$"):
        ours_of(small_groups(), amsgrad=True)
    theirs = theirs_of(small_groups(), amsgrad=True)
    theirs.step()
    ours = ours_of(small_groups())
    with pytest.raises(ValueError, match=rf"^amsgrad of parameter group 0 .* use torch.optim.{name}$"):
        ours.load_state_dict(theirs.state_dict())
    assert len(ours.state) == 0


@pytest.mark.parametrize("argument", ["foreach", "fused", "differentiable", "capturable"])
@adams
def test_arguments_that_choose_among_implementations_do_not_exist(ours_of, theirs_of, argument):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        ours_of(small_groups(), lr=0.5, **{argument: False})


# Gradients and parameters.


@pytest.mark.parametrize("base", [optim.Adam, optim.AdamW])
def test_parameters_of_fsdp1_are_refused_before_any_moment_changes(base, backend):
    """LAMB refused them once it was asked to decide, when moments were those of the step already."""
    fine, param = parameter(3), flagged(parameter(4))
    optimizer = LAMB(base([{"params": [fine]}, {"params": [with_gradient(param)]}], lr=0.1, weight_decay=0.1))
    raises_and_changes_nothing(optimizer, RuntimeError, r"\(group: 1, parameter: 0, shape: \(4,\)\)")
    with_gradient(fine)
    raises_and_changes_nothing(optimizer, RuntimeError, r"\(group: 1, parameter: 0, shape: \(4,\)\)")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@kinds
def test_sparse_gradients_are_refused_and_nothing_changes(build, weight_decay, backend):
    table = with_gradient(parameter(5, 2), sparse_gradient([1, 3], (5, 2)))
    optimizer = build([with_gradient(parameter(3)), table], lr=0.5, weight_decay=weight_decay)
    message = (
        r"^gradients must be dense \(got: torch.sparse_coo\); use torch.optim.SparseAdam "
        r"\(group: 0, parameter: 1, shape: \(5, 2\)\)$"
    )
    raises_and_changes_nothing(optimizer, RuntimeError, message)


@pytest.mark.parametrize("name", ["parameter conjugated", "parameter negated"])
@adams
def test_lazily_conjugated_parameters_are_refused_and_nothing_changes(ours_of, theirs_of, name, backend):
    optimizer = ours_of([with_gradient(parameter(3)), ODD[name]()], lr=0.5)
    message = (
        r"^parameters must not be lazily conjugated or negated; use resolve_conj\(\) and resolve_neg\(\) "
        r"\(group: 0, parameter: 1, shape: \(3,\)\)$"
    )
    raises_and_changes_nothing(optimizer, RuntimeError, message)


@adams
def test_subclasses_that_are_no_dtensors_are_refused_and_nothing_changes(ours_of, theirs_of, backend):
    from torch.testing._internal.two_tensor import TwoTensor

    two = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.full((3,), 2.0)))
    two.grad = TwoTensor(torch.full((3,), 0.5), torch.full((3,), 0.25))
    one = with_gradient(parameter(4))
    optimizer, before = ours_of([one, two], lr=0.5), one.detach().clone()
    message = (
        r"^parameters must be plain tensors or DTensors, not other subclasses \(got: TwoTensor\); "
        rf"use torch.optim.{theirs_of.__name__} \(group: 0, param"
    )
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(one, before)
    assert torch.equal(two.a, torch.ones(3))
    assert len(optimizer.state) == 0


@kinds
def test_float8_is_refused_and_nothing_changes(build, backend):
    first, second = small_groups()
    optimizer = build([first, {"params": [*second["params"], ODD["float8"]()]}], lr=0.5, weight_decay=0.1)
    params_of(optimizer)[-1].grad = torch.ones_like(params_of(optimizer)[-1])
    before = [param.detach().clone() for param in params_of(optimizer)[:-1]]
    with pytest.raises(RuntimeError, match=r"parameters must be of .* at least 16 bits \(dtype: torch.float8_e4m3fn\)"):
        optimizer.step()
    assert all(map(torch.equal, before, params_of(optimizer)[:-1]))
    assert len(optimizer.state) == 0


@adams
def test_a_parameter_that_overlaps_itself_is_refused_and_nothing_changes(ours_of, theirs_of, backend):
    wide = with_gradient(torch.nn.Parameter(torch.rand(1, 4).expand(3, 4)), torch.rand(3, 4))
    optimizer = ours_of([with_gradient(parameter(3)), wide], lr=0.5)
    message = (
        r"^elements of a parameter must not share memory \(strides: \(0, 1\)\) "
        r"\(group: 0, parameter: 1, shape: \(3, 4\)\)$"
    )
    raises_and_changes_nothing(optimizer, RuntimeError, message)


# Spoilt state.


def freed():
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


where = r" \(group: 1, parameter: 0, shape: \(2,\)\)$"
STATES = {
    "no tensor": ({"exp_avg": 3.0}, r"^exp_avg must be a tensor \(got: 3.0\)" + where),
    "the other no tensor": ({"exp_avg_sq": "x"}, r"^exp_avg_sq must be a tensor \(got: 'x'\)" + where),
    "another shape": (
        {"exp_avg": torch.zeros(7)},
        r"^exp_avg must have its parameter's shape \(got: \(7,\)\)" + where,
    ),
    "another shape of the other": (
        {"exp_avg_sq": torch.zeros(2, 1)},
        r"^exp_avg_sq must have its parameter's shape \(got: \(2, 1\)\)" + where,
    ),
    "only exp_avg": (
        {"step": None, "exp_avg_sq": None},
        r"^the state of a parameter must hold exp_avg, exp_avg_sq, step, or none \(got: exp_avg\)" + where,
    ),
    "no step": (
        {"step": None},
        r"^the state of a parameter must hold .* or none \(got: exp_avg, exp_avg_sq\)" + where,
    ),
    "step of two": (
        {"step": torch.ones(2)},
        r"^step must be a number or a tensor of one \(got: shape \(2,\), torch.float32\)" + where,
    ),
    "step complex": (
        {"step": torch.tensor(1j)},
        r"^step must be a number or a tensor of one \(got: shape \(\), torch.complex64\)" + where,
    ),
    "step a string": ({"step": "one"}, r"^step must be a number or a tensor of one \(got: 'one'\)" + where),
    "step a list": ({"step": [1]}, r"^step must be a number or a tensor of one \(got: \[1\]\)" + where),
    "memory freed": ({"exp_avg_sq": freed}, r"^exp_avg_sq must have memory \(its storage was freed\)" + where),
    "sparse": (
        {"exp_avg": lambda: torch.ones(2, 2).to_sparse_csr()},
        r"^exp_avg must be strided or sparse COO \(got: torch.sparse_csr\)" + where,
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("spoilt", STATES)
@kinds
def test_a_spoilt_state_is_refused_and_nothing_changes(build, spoilt, backend):
    different, message = STATES[spoilt]
    optimizer = build(small_groups(), lr=0.5, weight_decay=0.1)
    optimizer.step()
    param = optimizer.param_groups[1]["params"][0]
    optimizer.state[param].update({name: value() if callable(value) else value for name, value in different.items()})
    others = [p for p in params_of(optimizer) if p is not param]
    before = [p.detach().clone() for p in params_of(optimizer)], copy.deepcopy([optimizer.state[p] for p in others])
    kept = dict(optimizer.state[param])
    grads = [p.grad.clone() for p in params_of(optimizer)]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(map(torch.equal, before[0], params_of(optimizer)))
    torch.testing.assert_close([optimizer.state[p] for p in others], before[1], rtol=0, atol=0)
    assert {**optimizer.state[param]}.keys() == kept.keys()
    assert all(optimizer.state[param][name] is value for name, value in kept.items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params_of(optimizer), grads, strict=True))


# State dicts.


LOADED = {
    "state no dict": (lambda s: s.update(state=[1]), TypeError, r"state_dict\['state'\] must be a dict \(got: list\)"),
    "a parameter's no dict": (
        lambda s: s["state"].update({0: 3}),
        TypeError,
        r"state_dict\['state'\]\[0\] must be a dict \(got: int\)",
    ),
    "a moment no tensor": (
        lambda s: s["state"][2].update(exp_avg=3.0),
        TypeError,
        r"state_dict\['state'\]\[2\]\['exp_avg'\] must be a tensor or None \(got: float\)",
    ),
    "step a string": (
        lambda s: s["state"][1].update(step="3"),
        ValueError,
        r"^step must be a number or a tensor of one \(got: '3'\) in state_dict\['state'\]\[1\]$",
    ),
    "step true": (
        lambda s: s["state"][1].update(step=True),
        ValueError,
        r"^step must be a number or a tensor of one \(got: True\) in state_dict\['state'\]\[1\]$",
    ),
    "all None": (
        lambda s: s["state"][1].update(step=None, exp_avg=None, exp_avg_sq=None),
        ValueError,
        r"^the state of a parameter must hold .*, or none \(got: None\) in state_dict\['state'\]\[1\]$",
    ),
    "moments of None alone": (
        lambda s: s["state"].update({1: {"exp_avg": None}}),
        ValueError,
        r"^the state of a parameter must hold .*, or none \(got: None\) in state_dict\['state'\]\[1\]$",
    ),
    "step a huge integer": (
        lambda s: s["state"][1].update(step=10**400),
        ValueError,
        r"^step must be a non-negative number within float32 \(got: 10*\) in state_dict\['state'\]\[1\]$",
    ),
    "step beyond float32": (
        lambda s: s["state"][1].update(step=torch.tensor(1e300, dtype=torch.float64)),
        ValueError,
        r"^step must be a non-negative number within float32 \(got: 1e\+300\) in state_dict\['state'\]\[1\]$",
    ),
    "step of two": (
        lambda s: s["state"][1].update(step=torch.ones(2)),
        (ValueError, TypeError),
        r"step .*one.*state_dict\['state'\]\[1\]|state_dict\['state'\]\[1\]\['step'\].*one",
    ),
    "step complex": (
        lambda s: s["state"][1].update(step=torch.tensor(1j)),
        (ValueError, TypeError),
        r"step .*one.*state_dict\['state'\]\[1\]|state_dict\['state'\]\[1\]\['step'\].*one",
    ),
    "no step": (
        lambda s: s["state"][1].pop("step"),
        (ValueError, TypeError),
        r"state_dict\['state'\]\[1\].* step|step.* state_dict\['state'\]\[1\]",
    ),
    "step NaN": (
        lambda s: s["state"][1].update(step=torch.tensor(math.nan)),
        ValueError,
        r"^step must be a non-negative number within float32 \(got: nan\) in state_dict\['state'\]\[1\]$",
    ),
    "step negative": (
        lambda s: s["state"][1].update(step=-3),
        ValueError,
        r"^step must be a non-negative number within float32 \(got: -3\) in state_dict\['state'\]\[1\]$",
    ),
    "moment of another shape": (
        lambda s: s["state"][1].update(exp_avg_sq=torch.zeros(7)),
        ValueError,
        r"^exp_avg_sq must have its parameter's shape, .* \(got: shape \(7,\), torch.float32\) in state_dict",
    ),
    "other groups": (
        lambda s: s["param_groups"].pop(),
        ValueError,
        "different number of parameter groups",
    ),
    "lr in a tensor": (
        lambda s: s["param_groups"][0].update(lr=torch.tensor(-1.0)),
        ValueError,
        r"lr of parameter group 0 must be a non-negative number \(got: -1.0\)",
    ),
}


@pytest.mark.parametrize("kind", LOADED)
@adams
def test_impossible_state_dicts_are_refused_and_nothing_changes(ours_of, theirs_of, kind, backend):
    spoil, error, message = LOADED[kind]
    optimizer, _ = pair(ours_of, theirs_of)
    run([optimizer], range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    run([optimizer], range(3, 4))
    spoil(saved)
    before, groups = snapshot(optimizer), optimizer.param_groups
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    assert optimizer.param_groups is groups
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_after_a_step_that_was_refused_the_trust_ratios_are_still_those_of_the_last_one(backend):
    optimizer = LAMB(optim.AdamW(small_groups(), lr=0.5, weight_decay=0.1))
    optimizer.step()
    ratios = optimizer.trust_ratios()
    optimizer.param_groups[1]["betas"] = (0.9, 1.0)
    with pytest.raises(ValueError, match="beta2 of parameter group 1"):
        optimizer.step()
    after = optimizer.trust_ratios()
    assert ratios.keys() == after.keys()
    assert all(torch.equal(after[param], ratio) for param, ratio in ratios.items())


@adams
def test_a_wrong_group_key_of_the_constructor_stays_a_key_as_in_torch(ours_of, theirs_of):
    """Groups may hold what they like: schedulers and wrappers put keys there."""
    ours = ours_of([{"params": layers(0), "initial_lr": 3.0, "name": "body"}], lr=0.5)
    assert ours.param_groups[0]["name"] == "body"
    saved = ours.state_dict()
    other = ours_of(layers(0), lr=0.1)
    other.load_state_dict(saved)
    assert other.param_groups[0]["initial_lr"] == 3.0
    give_gradients([other], 3)
    other.step()


@pytest.mark.parametrize("missing", ["betas", "eps", "weight_decay", "maximize", "amsgrad", "decoupled_weight_decay"])
def test_a_group_that_lost_a_key_takes_the_default(missing, backend):
    """As state dicts of older versions have fewer keys."""
    for ours_of, _ in ADAMS:
        options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
        one, other = (ours_of(groups_of()[0]["params"], **options) for _ in range(2))
        del one.param_groups[0][missing]
        run([one, other], range(3))
        assert all(map(torch.equal, params_of(one), params_of(other)))
