"""Bad arguments, and layers that momentum in 8 bits does not take: each error names what is wrong, nothing changes."""

import re

import pytest
import torch
from cases import sliced
from coded_layers import BUFFER, CODES, SCALES
from sgd_cases import ODD, parameter, raises_and_changes_nothing, sparse_gradient, unders, with_gradient

from torchlars import LARS, optim

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")

DTYPE = "must be None, torch.float32 or torch.int8"
SIZE = "must be a non-negative integer"
BAD = {
    "a name": ({"momentum_dtype": "int8"}, ValueError, "momentum_dtype{} " + DTYPE + r" \(got: 'int8'\)"),
    "uint8": ({"momentum_dtype": torch.uint8}, ValueError, "momentum_dtype{} " + DTYPE + r" \(got: torch.uint8\)"),
    "a bool": ({"momentum_dtype": True}, ValueError, "momentum_dtype{} " + DTYPE + r" \(got: True\)"),
    "bits": ({"momentum_dtype": 8}, ValueError, "momentum_dtype{} " + DTYPE + r" \(got: 8\)"),
    "negative": ({"min_8bit_size": -1}, ValueError, "min_8bit_size{} " + SIZE + r" \(got: -1\)"),
    "a float": ({"min_8bit_size": 1.5}, TypeError, "min_8bit_size{} " + SIZE + r" \(got: 1.5 of type float\)"),
    "True": ({"min_8bit_size": True}, TypeError, "min_8bit_size{} " + SIZE + r" \(got: True of type bool\)"),
    "a string": ({"min_8bit_size": "4096"}, TypeError, "min_8bit_size{} " + SIZE + r" \(got: '4096' of type str\)"),
    "None": ({"min_8bit_size": None}, TypeError, "min_8bit_size{} " + SIZE + r" \(got: None of type NoneType\)"),
}
bads = pytest.mark.parametrize("bad", BAD)


def in_8bit(params, **options):
    options = {"lr": 0.1, "momentum": 0.9, "momentum_dtype": torch.int8, "min_8bit_size": 0, **options}
    return optim.SGD(params, **options)


def two_groups():
    return [{"params": [with_gradient(parameter(n, 70))]} for n in (3, 4)]


@bads
def test_a_bad_argument_is_refused(bad):
    options, error, message = BAD[bad]
    with pytest.raises(error, match="^" + message.format("")):
        in_8bit(two_groups(), **options)


@pytest.mark.parametrize("size", [-1, "4096"], ids=str)
def test_a_bad_size_is_refused_without_momentum_in_8_bits(size):
    with pytest.raises((TypeError, ValueError), match="min_8bit_size must be a non-negative integer"):
        optim.SGD(two_groups(), lr=0.1, min_8bit_size=size)


@bads
def test_a_bad_key_of_a_group_is_refused_by_the_constructor(bad):
    options, error, message = BAD[bad]
    first, second = two_groups()
    with pytest.raises(error, match="^" + message.format(" of parameter group 1")):
        in_8bit([first, {**second, **options}])


@bads
@unders
def test_a_group_with_a_bad_key_is_not_added(under_lars, bad):
    options, error, message = BAD[bad]
    first, second = two_groups()
    optimizer = LARS(in_8bit([first])) if under_lars else in_8bit([first])
    with pytest.raises(error, match=message.format(" of parameter group 1")):
        optimizer.add_param_group({**second, **options})
    assert len(optimizer.param_groups) == 1


@bads
@pytest.mark.parametrize("steps", [0, 1])
@unders
def test_a_bad_key_of_a_group_is_refused_by_a_step_and_nothing_changes(under_lars, steps, bad, backend):
    options, error, message = BAD[bad]
    optimizer = LARS(in_8bit(two_groups())) if under_lars else in_8bit(two_groups())
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups[1].update(options)
    raises_and_changes_nothing(optimizer, error, message.format(" of parameter group 1"))


def negated():
    return with_gradient(torch.nn.Parameter(torch._neg_view(torch.rand(4, 70))), torch.rand(4, 70))


LAYERS = {
    "a sparse gradient": lambda: with_gradient(parameter(4, 70), sparse_gradient([1, 3], (4, 70))),
    "a sparse gradient, uncoalesced": lambda: with_gradient(parameter(4, 70), sparse_gradient([1, 1], (4, 70))),
    "a lazily negated parameter": negated,
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("steps", [0, 1])
@unders
def test_a_layer_that_only_torch_can_step_is_refused_and_nothing_changes(under_lars, steps, name, backend):
    odd = LAYERS[name]()
    optimizer = in_8bit([with_gradient(parameter(3, 70)), odd])
    optimizer = LARS(optimizer) if under_lars else optimizer
    grad = odd.grad
    for _ in range(steps):  # without the odd one
        odd.grad = None
        optimizer.step()
    odd.grad = grad
    message = (
        r"^momentum_dtype must be None for sparse gradients, tensor subclasses and lazily negated parameters "
        r"\(dtype: torch.float32\) \(group: 0, parameter: 1, shape: \(4, 70\)\)$"
    )
    raises_and_changes_nothing(optimizer, RuntimeError, message)
    optimizer.param_groups[0]["momentum_dtype"] = None
    optimizer.step()
    assert list(optimizer.state[odd]) == [BUFFER]


def test_a_layer_in_8_bits_whose_gradients_become_sparse_goes_on_once_its_group_leaves_8_bits(backend):
    param, twin = with_gradient(parameter(4, 70)), with_gradient(parameter(4, 70))
    optimizer = in_8bit([param])
    optimizer.step()
    state = optimizer.state[param]
    momentum = state[CODES] * state[SCALES]
    expected = torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    expected.step()
    expected.state[twin][BUFFER] = momentum
    grad = sparse_gradient([1, 3, 1], (4, 70), scale=0.01)
    param.grad, twin.grad = grad, grad.to_dense()
    raises_and_changes_nothing(optimizer, RuntimeError, "momentum_dtype must be None for sparse gradients")
    optimizer.param_groups[0]["momentum_dtype"] = None
    optimizer.step()
    expected.step()
    assert list(optimizer.state[param]) == [BUFFER]
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(optimizer.state[param][BUFFER], expected.state[twin][BUFFER], rtol=1e-6, atol=1e-7)


@unders
def test_a_sparse_gradient_of_a_small_layer_is_stepped_as_by_torch(under_lars, backend):
    """It would not be coded anyway, and its momentum has its own dtype."""
    odd = ODD["sparse"]()
    optimizer = in_8bit([{"params": [with_gradient(parameter(3, 70))]}, {"params": [odd], "weight_decay": 0.0}])
    optimizer = LARS(optimizer) if under_lars else optimizer
    optimizer.step()
    assert list(optimizer.state[odd]) == [BUFFER]


@pytest.mark.skipif(not hasattr(torch.nn.Parameter, "grad_dtype"), reason="needs a newer torch")
@unders
def test_a_float64_gradient_is_refused_and_nothing_changes(under_lars, backend):
    odd = parameter(4, 70)
    odd.grad_dtype = torch.float64
    odd.grad = torch.ones(4, 70, dtype=torch.float64)
    optimizer = in_8bit([with_gradient(parameter(3, 70)), odd])
    optimizer = LARS(optimizer) if under_lars else optimizer
    message = (
        r"^gradients of a layer with momentum in 8 bits must have at most 32 bits \(gradient: torch.float64\) "
        r"\(group: 0, parameter: 1, shape: \(4, 70\)\)$"
    )
    raises_and_changes_nothing(optimizer, RuntimeError, message)
    optimizer.param_groups[0]["momentum_dtype"] = None
    optimizer.step()


WRONG = {
    "codes that are no tensor": ({CODES: 3.0}, "momentum_codes must be a tensor (got: 3.0)"),
    "codes of another shape": (
        {CODES: torch.zeros(70, 4, dtype=torch.int8)},
        "momentum_codes must be torch.int8 of shape (4, 70) (got: torch.int8, torch.strided, shape (70, 4))",
    ),
    "codes in float32": (
        {CODES: torch.zeros(4, 70)},
        "momentum_codes must be torch.int8 of shape (4, 70) (got: torch.float32, torch.strided, shape (4, 70))"
        "; if torch.optim.SGD has cast them, delete them, and momentum begins anew",
    ),
    "scales of another shape": (
        {SCALES: torch.zeros(4)},
        "momentum_scales must be torch.float32 of shape (4, 1) (got: torch.float32, torch.strided, shape (4,))",
    ),
    "scales in float64": (
        {SCALES: torch.zeros(4, 1, dtype=torch.float64)},
        "momentum_scales must be torch.float32 of shape (4, 1) (got: torch.float64, torch.strided, shape (4, 1))",
    ),
    "codes alone": (
        {SCALES: None},
        "momentum must be a momentum_buffer, or momentum_codes with their momentum_scales (found: momentum_codes)",
    ),
    "both kinds": (
        {BUFFER: torch.zeros(4, 70)},
        "momentum_scales (found: momentum_buffer, momentum_codes, momentum_scales)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("momentum_dtype", [torch.int8, None], ids=str)
@unders
def test_a_state_that_was_spoilt_is_refused_and_nothing_changes(under_lars, momentum_dtype, wrong, backend):
    """Also where the group has left 8 bits in the meantime."""
    changes, message = WRONG[wrong]
    optimizer = LARS(in_8bit(two_groups())) if under_lars else in_8bit(two_groups())
    optimizer.step()
    optimizer.param_groups[1]["momentum_dtype"] = momentum_dtype
    optimizer.state[optimizer.param_groups[1]["params"][0]].update(changes)
    message = re.escape(message) + r" \(group: 1, parameter: 0, shape: \(4, 70\)\)$"
    raises_and_changes_nothing(optimizer, RuntimeError, message)


def test_scales_with_gaps_are_taken_over(backend):
    """Whoever lays them out otherwise, the values count."""
    param, twin = (with_gradient(parameter(4, 2, 100)) for _ in range(2))
    optimizer, expected = in_8bit([param]), in_8bit([twin])
    for one in (optimizer, expected):
        one.step()
    state = optimizer.state[param]
    state[SCALES] = sliced(state[SCALES])
    for one in (optimizer, expected):
        one.step()
    assert optimizer.state[param][SCALES].is_contiguous()
    # coded anew from their decoded values, to nearest: the same codes and scales but for a rounding
    assert torch.equal(optimizer.state[param][SCALES], expected.state[twin][SCALES])
    assert torch.equal(param, twin)
