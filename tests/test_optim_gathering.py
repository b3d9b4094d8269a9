"""Gathering layers in C++ (csrc/eager.cpp): which layers it takes, and into which buckets."""

import itertools

import calls
import pytest
import torch
from cases import channels_last, sliced, transposed
from sgd_cases import KEPT, ODD, add_to_lars, add_to_sgd, give_gradients, lars_pair, parameter, with_gradient

from torchlars import ops

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


PLAIN = {
    "as it is": lambda: with_gradient(parameter(3, 4)),
    "of no dimension": lambda: with_gradient(parameter()),
    "empty": lambda: with_gradient(parameter(0, 3)),
    "channels_last": lambda: with_gradient(torch.nn.Parameter(channels_last(parameter(2, 3, 2, 2).detach()))),
    "gradient of another memory order": lambda: with_gradient(parameter(3, 4), transposed(torch.rand(3, 4))),
    "gradient that requires a gradient": lambda: with_gradient(parameter(3), torch.rand(3, requires_grad=True)),
    "a tensor that is no Parameter": lambda: with_gradient(torch.rand(3, requires_grad=True)),
    "bfloat16": lambda: with_gradient(parameter(3, dtype=torch.bfloat16)),
    "float16": lambda: with_gradient(parameter(3, dtype=torch.float16)),
    "float64": lambda: with_gradient(parameter(3, dtype=torch.float64)),
}
DOORS = {"LarsLayers": add_to_lars, "SgdLayers": add_to_sgd}
doors = pytest.mark.parametrize("door", DOORS)


def taken(layers):
    """The buckets' parameters, by their identity: tensors compare element by element."""
    return [[id(param) for param in bucket.params] for bucket in layers.buckets]


@pytest.mark.parametrize("name", PLAIN)
@doors
def test_a_plain_layer_is_taken(extension, door, name):
    layers, param = getattr(extension, door)(), PLAIN[name]()
    assert DOORS[door](layers, [param]) == []
    assert taken(layers) == [[id(param)]]
    assert layers.buckets[0].params[0] is param


@pytest.mark.parametrize("name", ODD)
@doors
def test_an_odd_layer_is_left_for_a_closer_look(extension, door, name):
    layers, param = getattr(extension, door)(), ODD[name]()
    before, after = parameter(2), parameter(4)
    assert DOORS[door](layers, [with_gradient(before), param, with_gradient(after)]) == [1]
    assert taken(layers) == [[id(before), id(after)]]


@doors
def test_a_layer_without_gradient_is_nobodys(extension, door):
    layers = getattr(extension, door)()
    assert DOORS[door](layers, [parameter(3), parameter(2, dtype=torch.complex64)]) == []
    assert layers.buckets == []


@doors
def test_a_tied_layer_is_taken_once(extension, door):
    layers, param, other = getattr(extension, door)(), with_gradient(parameter(3)), with_gradient(parameter(2))
    assert DOORS[door](layers, [param, other, param]) == []
    assert DOORS[door](layers, [param], weight_decay=0.7) == []
    assert taken(layers) == [[id(param), id(other)]]


@doors
def test_buckets_are_of_one_dtype_and_direction(extension, door):
    layers = getattr(extension, door)()
    a, b, c, d = (
        with_gradient(parameter(n, dtype=t))
        for n, t in zip((2, 3, 4, 5), [torch.float32, torch.float64] * 2, strict=True)
    )
    e, f = with_gradient(parameter(6)), with_gradient(parameter(7))
    assert DOORS[door](layers, (a, b, c)) == []  # any sequence
    assert DOORS[door](layers, [d], weight_decay=0.2, trust_coef=0.1, eps=0.0) == []
    assert DOORS[door](layers, [e], maximize=True) == []
    assert DOORS[door](layers, [f]) == []
    assert taken(layers) == [[id(a), id(c), id(f)], [id(b), id(d)], [id(e)]]


@pytest.mark.parametrize("inverse", [None, 0.25, 1 / 3, 0.0])
@doors
def test_a_bucket_takes_the_inv_scale_of_scaled_gradients(extension, door, inverse):
    layers, inv_scale = getattr(extension, door)(), None if inverse is None else torch.tensor([inverse])
    params = [with_gradient(parameter(3, 4, scale=2.0)), with_gradient(parameter(5))]
    values, grads = [param.detach().clone() for param in params], [param.grad.clone() for param in params]
    assert DOORS[door](layers, params) == []
    hyper = {"weight_decays": [0.1] * 2, "trust_coefs": [0.3] * 2, "eps": [0.05] * 2, "maximize": False}
    if door == "LarsLayers":
        ratios = layers.buckets[0].adapt(inv_scale)
        expected = calls.scale_gradients(grads, values, **hyper, inv_scale=inv_scale)
    else:
        ratios = layers.buckets[0].update(inv_scale=inv_scale)
        hyper |= {"lrs": [0.5] * 2, "momentums": [0.0] * 2, "dampenings": [0.0] * 2, "inv_scale": inv_scale}
        expected = calls.sgd(params=values, grads=grads, momentum_buffers=[], **hyper)
    assert torch.equal(ratios, expected)
    assert (ratios == 1).all() == (inverse == 0.0)
    for param, value, grad in zip(params, values, grads, strict=True):
        assert torch.equal(param, value)
        assert torch.equal(param.grad, grad)


def test_a_bucket_of_plain_sgd_takes_an_inv_scale(extension):
    param = with_gradient(parameter(5))
    value, momentum = param.detach().clone(), torch.rand(5)
    for inverse in (0.3, 0.0):
        layers, buffer, inv_scale = extension.SgdLayers(), momentum.clone(), torch.tensor(inverse)
        state = {param: {"momentum_buffer": buffer}}
        assert add_to_sgd(layers, [param], state, momentum=0.9, trust_coef=None, eps=None) == []
        assert layers.buckets[0].update(inv_scale) is None
        numbers = {"weight_decays": [0.1], "lrs": [0.5], "momentums": [0.9], "dampenings": [0.0]}
        ops.sgd_([value], [param.grad], [momentum], maximize=False, **numbers, inv_scale=inv_scale)
        assert torch.equal(param, value)
        assert torch.equal(buffer, momentum)


@doors
def test_a_bucket_refuses_an_inv_scale_of_another_dtype(extension, door):
    layers = getattr(extension, door)()
    assert DOORS[door](layers, [with_gradient(parameter(3))]) == []
    step = getattr(layers.buckets[0], {"LarsLayers": "adapt", "SgdLayers": "update"}[door])
    with pytest.raises(
        RuntimeError, match=r"expected inv_scale to be one float32 on cpu \(got: shape \[\], Double, cpu\)"
    ):
        step(torch.tensor(0.5, dtype=torch.float64))


def test_buckets_of_sgd_are_of_one_kind_of_step(extension):
    layers, params = extension.SgdLayers(), [with_gradient(parameter(n)) for n in range(1, 10)]
    state = {param: {"momentum_buffer": torch.ones_like(param, requires_grad=False)} for param in params}
    one, other = torch.tensor(0.5), torch.tensor(0.5)
    kinds = [
        {},
        {"lr": 0.1, "dampening": 0.5},
        {"trust_coef": None, "eps": None},
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": False},
        {"momentum": 0.9, "nesterov": True},
        {"lr": one},
        {"lr": other},
        {"lr": one, "weight_decay": 0.0},
    ]
    for param, kind in zip(params, kinds, strict=True):
        assert add_to_sgd(layers, [param], state, **kind) == []
    together = [[0, 1], [2], [3, 4], [5], [6, 8], [7]]
    assert taken(layers) == [[id(params[i]) for i in bucket] for bucket in together]


BUFFERS = {
    "missing": (lambda param: None, True),
    "None": (lambda param: {"momentum_buffer": None}, True),
    "no state of its own": (lambda param: {}, True),
    "as it should be": (lambda param: {"momentum_buffer": torch.ones(3, 4)}, False),
    "of another dtype": (lambda param: {"momentum_buffer": torch.ones(3, 4, dtype=torch.float64)}, True),
    "of another memory order": (lambda param: {"momentum_buffer": transposed(torch.ones(3, 4))}, True),
    "of another shape": (lambda param: {"momentum_buffer": torch.ones(4, 3)}, True),
    "sparse": (lambda param: {"momentum_buffer": torch.ones(3, 4).to_sparse()}, True),
    "with gaps": (lambda param: {"momentum_buffer": sliced(torch.ones(3, 4))}, True),
    "subclass": (
        lambda param: {"momentum_buffer": torch.ones(3, 4).as_subclass(type("Sub", (torch.Tensor,), {}))},
        True,
    ),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_a_layer_whose_momentum_is_not_as_it_should_be_is_left(extension, name):
    make, is_left = BUFFERS[name]
    param, other = with_gradient(parameter(3, 4)), with_gradient(parameter(5))
    state, own = {other: {"momentum_buffer": torch.zeros(5)}}, make(param)
    if own is not None:
        state[param] = own
    layers = extension.SgdLayers()
    assert add_to_sgd(layers, [param, other], state, momentum=0.9) == [0] * is_left
    assert taken(layers) == [[id(other)] if is_left else [id(param), id(other)]]
    assert (param in state) == (own is not None)
    without = extension.SgdLayers()
    assert add_to_sgd(without, [param, other], state, momentum=0.0) == []


@KEPT
def test_16_bit_layers_are_taken_with_the_momentum_they_ask_for(extension, dtype):
    param = with_gradient(parameter(3, dtype=dtype))
    for kept, in_float32, is_left in itertools.product([dtype, torch.float32], [False, True], [None]):
        state = {param: {"momentum_buffer": torch.ones(3, dtype=kept)}}
        is_left = (kept == torch.float32) != in_float32
        positions = add_to_sgd(extension.SgdLayers(), [param], state, momentum=0.9, momentum_in_float32=in_float32)
        assert positions == [0] * is_left


def test_an_optimizers_plain_layers_are_all_taken_once_they_have_momentum(extension):
    ours, _ = lars_pair({"momentum": 0.9}, dtype=torch.float32)
    for step, others in ((3, 10), (4, 0)):
        give_gradients([ours], step)
        plain, left = ours.optim._gather(None)
        assert sum(len(bucket.params) for bucket in left) == others
        assert sum(len(bucket.params) for bucket in plain) == 10 - others
        ours.step()
    assert ops.fast_layers("SgdLayers").buckets == []


def test_without_extension_or_while_compiling_no_layer_is_plain(backend):
    layers = ops.fast_layers("LarsLayers")
    assert isinstance(layers, ops.NoFastPath) == (backend == "reference")
    none = ops.NoFastPath()
    assert list(add_to_sgd(none, [parameter(3)] * 3)) == [0, 1, 2]
    assert list(add_to_lars(none, (parameter(3),))) == [0]
    assert list(none.buckets) == []


@doors
def test_the_door_refuses_what_is_no_sequence_of_tensors(extension, door):
    layers = getattr(extension, door)()
    for wrong in (None, 3, parameter):
        with pytest.raises(TypeError):
            DOORS[door](layers, wrong)
    with pytest.raises(TypeError):
        DOORS[door](layers, [with_gradient(parameter(3))], weight_decay="0.1")
    assert layers.buckets == []
