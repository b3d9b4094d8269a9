"""Gathering layers of Adam in C++ (csrc/eager.cpp): which layers it takes, and into which buckets."""

import itertools

import pytest
import torch
from cases import sliced, transposed
from sgd_cases import KEPT, ODD, PLAINLY, parameter, with_gradient
from test_optim_gathering import PLAIN, taken

from torchlars import ops

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")
OPTIONS = {
    **{"weight_decay": 0.1, "trust_coef": 0.3, "eps": 0.05, "maximize": False, **PLAINLY, "lr": 0.5},
    **{"beta1": 0.8, "beta2": 0.95, "adam_eps": 1e-3, "decoupled_weight_decay": True, "state_in_float32": False},
    "of_updates": False,
}


def add(layers, params, state, **different):
    """The positions of those parameters of a group that are left."""
    options = ops.fast_options("AdamOptions", **{**OPTIONS, **different})
    return [position for _, position in layers.add([({"params": params}, options)], state)]


def state_of(*params, dtype=None):
    """The state after two steps."""
    return {
        param: {
            "step": torch.tensor(2.0),
            "exp_avg": torch.full_like(param, 0.25, dtype=dtype or param.dtype, requires_grad=False),
            "exp_avg_sq": torch.full_like(param, 0.5, dtype=dtype or param.dtype, requires_grad=False),
        }
        for param in params
    }


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_layer_is_taken(extension, name):
    layers, param = extension.AdamLayers(), PLAIN[name]()
    assert add(layers, [param], state_of(param)) == []
    assert taken(layers) == [[id(param)]]
    assert layers.buckets[0].params[0] is param


@pytest.mark.parametrize("name", [name for name in ODD if name != "float8"])
def test_an_odd_layer_is_left_to_the_slow_path(extension, name):
    layers, param = extension.AdamLayers(), ODD[name]()
    before, after = with_gradient(parameter(2)), with_gradient(parameter(4))
    state = {**state_of(before, after), param: {"step": torch.tensor(2.0)}}
    if name != "sparse, of an expanded parameter":
        state |= state_of(param)
    assert add(layers, [before, param, after], state) == [1]
    assert taken(layers) == [[id(before), id(after)]]


def test_layers_without_gradient_and_tied_ones(extension):
    layers, param, other = extension.AdamLayers(), with_gradient(parameter(3)), with_gradient(parameter(2))
    without, state = parameter(5), state_of(param, other)
    assert add(layers, [param, without, other, param], state) == []
    assert add(layers, [param], state, weight_decay=0.7) == []
    assert taken(layers) == [[id(param), id(other)]]


one = torch.ones(3, 4)
STATES = {
    # what is different in a state, and whether the layer is left
    "as it should be": ({}, False),
    "more than there should be": ({"max_exp_avg_sq": one, "other": 3}, False),
    "exp_avg missing": ({"exp_avg": None}, True),
    "exp_avg_sq missing": ({"exp_avg_sq": None}, True),
    "step missing": ({"step": None}, True),
    "exp_avg of another dtype": ({"exp_avg": one.double()}, True),
    "exp_avg_sq of another dtype": ({"exp_avg_sq": one.bfloat16()}, True),
    "exp_avg of another memory order": ({"exp_avg": transposed(one)}, True),
    "exp_avg_sq of another memory order": ({"exp_avg_sq": transposed(one)}, True),
    "exp_avg of another shape": ({"exp_avg": torch.ones(4, 3)}, True),
    "exp_avg sparse": ({"exp_avg": one.to_sparse()}, True),
    "exp_avg_sq with gaps": ({"exp_avg_sq": sliced(one)}, True),
    "exp_avg of a subclass": ({"exp_avg": one.as_subclass(type("Sub", (torch.Tensor,), {}))}, True),
    "exp_avg_sq elsewhere": ({"exp_avg_sq": one.to("meta")}, True),
    "exp_avg a number": ({"exp_avg": 1.0}, True),
    "step an int": ({"step": 2}, True),
    "step a float": ({"step": 2.0}, True),
    "step a string": ({"step": "2"}, True),
    "step in float64": ({"step": torch.tensor(2.0, dtype=torch.float64)}, True),
    "step an integer tensor": ({"step": torch.tensor(2)}, True),
    "step of one dimension": ({"step": torch.tensor([2.0])}, True),
    "step elsewhere": ({"step": torch.tensor(2.0, device="meta")}, True),
}


@pytest.mark.parametrize("name", STATES)
def test_a_layer_whose_state_is_not_as_it_should_be_is_left(extension, name):
    different, is_left = STATES[name]
    param, other = with_gradient(parameter(3, 4)), with_gradient(parameter(5))
    state = state_of(param, other)
    state[param].update(different)
    kept = dict(state[param])
    layers = extension.AdamLayers()
    assert add(layers, [param, other], state) == [0] * is_left
    assert taken(layers) == [[id(other)] if is_left else [id(param), id(other)]]
    assert state[param].keys() == kept.keys()
    assert all(state[param][key] is value for key, value in kept.items())


@pytest.mark.parametrize("state", [lambda param: {}, lambda param: {param: {}}, lambda param: {param: [1]}])
def test_a_layer_without_state_is_left_and_gets_none(extension, state):
    param, layers = with_gradient(parameter(3, 4)), extension.AdamLayers()
    given = state(param)
    assert add(layers, [param], given) == [0]
    assert layers.buckets == []
    assert {**given}.keys() == state(param).keys()


@KEPT
def test_16_bit_layers_are_taken_with_the_state_they_ask_for(extension, dtype):
    param = with_gradient(parameter(3, dtype=dtype))
    for kept, in_float32 in itertools.product([dtype, torch.float32], [False, True]):
        positions = add(extension.AdamLayers(), [param], state_of(param, dtype=kept), state_in_float32=in_float32)
        assert positions == [0] * ((kept == torch.float32) != in_float32)


def test_buckets_are_of_one_kind_of_step(extension):
    layers, params = extension.AdamLayers(), [with_gradient(parameter(n)) for n in range(1, 17)]
    wide = with_gradient(parameter(3, dtype=torch.float64))
    tensor, other = torch.tensor(0.5), torch.tensor(0.5)
    kinds = [
        {},
        {"lr": 0.1, "weight_decay": 0.7, "trust_coef": 0.7, "eps": 0.0},
        {"trust_coef": None, "eps": None},
        {"trust_coef": None, "eps": None, "lr": 0.1},
        {"beta1": 0.9},
        {"beta2": 0.9},
        {"adam_eps": 0.1},
        {"decoupled_weight_decay": False},
        {"maximize": True},
        {"of_updates": True},
        {"clip": True},
        {"decayed_norm": True},
        {"lr": tensor},
        {"lr": other},
        {"lr": tensor, "weight_decay": 0.0},
        {"state_in_float32": True},  # says nothing of a float32 layer
    ]
    state = state_of(*params, wide)
    for param, kind in zip(params, kinds, strict=True):
        assert add(layers, [param], state, **kind) == []
    assert add(layers, [wide], state) == []
    together = [[0, 1, 15], [2, 3], *([i] for i in range(4, 12)), [12, 14], [13]]
    assert taken(layers) == [*([id(params[i]) for i in bucket] for bucket in together), [id(wide)]]


SHARED = {
    "nothing": (lambda a, b: None, False),
    "a moment": (lambda a, b: a.update(exp_avg=b["exp_avg"]), True),
    "a step": (lambda a, b: a.update(step=b["step"]), True),
    "two moments of one layer": (lambda a, b: a.update(exp_avg_sq=a["exp_avg"]), True),
    "a view": (lambda a, b: a.update(exp_avg=torch.ones(2, 3)[0]), True),
}


@pytest.mark.parametrize("name", SHARED)
def test_layers_that_may_share_memory_are_noted(extension, name):
    share, is_noted = SHARED[name]
    params = [with_gradient(parameter(3)), with_gradient(parameter(3))]
    state, layers = state_of(*params), extension.AdamLayers()
    share(*state.values())
    assert not layers.shares_memory
    assert add(layers, params, state) == []
    assert layers.shares_memory == is_noted


@pytest.mark.parametrize("mode", ["plain", "of gradients", "of updates"])
@pytest.mark.parametrize("inverse", [None, 0.25, 1 / 3, 0.0])
def test_a_bucket_takes_the_step_of_the_op(extension, inverse, mode):
    params = [with_gradient(parameter(3, 4, scale=2.0)), with_gradient(parameter(5))]
    state, inv_scale = state_of(*params), None if inverse is None else torch.tensor([inverse])
    names = ("exp_avg", "exp_avg_sq", "step")
    values, grads = [param.detach().clone() for param in params], [param.grad.clone() for param in params]
    copies = {name + "s": [state[param][name].clone() for param in params] for name in names}
    layers = extension.AdamLayers()
    different = {"trust_coef": None, "eps": None} if mode == "plain" else {"of_updates": mode == "of updates"}
    assert add(layers, params, state, **different) == []
    ratios = layers.buckets[0].update(inv_scale=inv_scale)
    how = {}
    if mode != "plain":
        how = {
            "ratios": torch.empty(2),
            "trust_coefs": [0.3] * 2,
            "eps": [0.05] * 2,
            "of_updates": mode == "of updates",
        }
    numbers = {"weight_decays": [0.1] * 2, "lrs": [0.5] * 2, "decoupled_weight_decay": True, "maximize": False}
    ops.adam_(values, grads, **copies, **numbers, beta1=0.8, beta2=0.95, adam_eps=1e-3, inv_scale=inv_scale, **how)
    assert (ratios is None) == (mode == "plain")
    assert ratios is None or torch.equal(ratios, how["ratios"])
    for i, (param, value, grad) in enumerate(zip(params, values, grads, strict=True)):
        assert torch.equal(param, value)
        assert torch.equal(param.grad, grad)
        assert all(torch.equal(state[param][name], copies[name + "s"][i]) for name in names)
        assert state[param]["step"] == (2 if inverse == 0 else 3)


def test_a_bucket_refuses_an_inv_scale_of_another_dtype(extension):
    layers, param = extension.AdamLayers(), with_gradient(parameter(3))
    assert add(layers, [param], state_of(param)) == []
    message = r"expected inv_scale to be one float32 on cpu \(got: shape \[\], Double, cpu\)"
    with pytest.raises(RuntimeError, match=message):
        layers.buckets[0].update(torch.tensor(0.5, dtype=torch.float64))


def test_without_extension_or_while_compiling_no_layer_is_plain(backend):
    layers = ops.fast_layers("AdamLayers")
    assert isinstance(layers, ops.NoFastPath) == (backend == "reference")
    assert list(add(ops.NoFastPath(), [parameter(3)] * 3, {})) == [0, 1, 2]


def test_the_door_refuses_what_is_no_sequence_of_tensors(extension):
    layers, param = extension.AdamLayers(), with_gradient(parameter(3))
    for wrong in (None, 3, parameter):
        with pytest.raises(TypeError):
            add(layers, wrong, {})
    with pytest.raises(TypeError):
        add(layers, [param], {}, beta1="0.1")
    assert layers.buckets == []
