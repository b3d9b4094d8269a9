"""Groups, layers and gradients for tests of torchlars.optim.SGD, and comparison with torch's own SGD."""

import copy
import io
import math

import pytest
import torch
from by_hand import EPS, TRUST_COEF
from cases import channels_last, sliced, transposed
from closeness import close
from optimizers import change_lr, params_of
from wrapped_networks import sgd

from torchlars import LARS, ops, optim

# Every kind of momentum that SGD has; of two groups, of which either, but never both, may be without weight decay.
MOMENTA = {
    "none": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.25},
    "undershot": {"momentum": 0.9, "dampening": -0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
DECAYS = {"decays": (0.1, 0.03), "one_decays": (0.0, 0.07), "other_decays": (0.2, 0.0)}
TABLE = [
    pytest.param({**options, "maximize": maximize}, decays, id=f"{kind}-{decay}-{'max' if maximize else 'min'}")
    for kind, options in MOMENTA.items()
    for decay, decays in DECAYS.items()
    for maximize in (False, True)
]
table = pytest.mark.parametrize(("options", "decays"), TABLE)
few = pytest.mark.parametrize("options", list(MOMENTA.values()), ids=list(MOMENTA))
SHAPES = [
    # shape, scale, memory order
    [((3, 4), 1.0, None), ((4,), 5.0, None), ((), 0.5, None), ((5,), 0.0, None), ((0, 3), 1.0, None)],
    [((2, 3, 2, 2), 0.2, channels_last), ((4, 3), 2.0, transposed), ((7,), 3.0, None)],
    [((2, 5), 0.7, None), ((6,), 1.5, None)],
]


def layers(index, dtype=torch.float64):
    """The layers of one group, each with a scale of its own; the fourth is zero, the fifth is empty."""
    generator = torch.Generator().manual_seed(index)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    params = []
    for shape, scale, order in SHAPES[index]:
        values = (scale * torch.randn(shape, dtype=wide, generator=generator)).to(dtype)
        params.append(torch.nn.Parameter(values if order is None else order(values)))
    return params


def groups(dtype=torch.float64, decays=DECAYS["decays"], lr=0.5, **options):
    """Two groups that differ in every hyper-parameter, except nesterov."""
    second = {"momentum": 0.6} if options.get("momentum") else {}
    if options.get("dampening"):
        second["dampening"] = 0.4
    return [
        {"params": layers(0, dtype), "weight_decay": decays[0]},
        {"params": layers(1, dtype), "weight_decay": decays[1], "lr": lr / 3, **second},
    ]


def adapted_groups(dtype=torch.float64, decays=DECAYS["decays"], **options):
    """The same for LARS: with its own values, with values of a group, and a third group that is left alone."""
    first, second = groups(dtype, decays, **options)
    return [
        first,
        {**second, "trust_coef": 0.02, "eps": 0.01},
        {"params": layers(2, dtype), "weight_decay": 0.15, "lr": 0.1, "trust_coef": None},
    ]


def pair(options, decays=DECAYS["decays"], dtype=torch.float64, **ours_alone):
    """Our SGD and torch's, over equal layers."""
    return (
        optim.SGD(groups(dtype, decays, **options), lr=0.5, **options, **ours_alone),
        torch.optim.SGD(groups(dtype, decays, **options), lr=0.5, **options),
    )


def lars_pair(options, decays=DECAYS["decays"], dtype=torch.float64):
    """The same, under LARS."""
    return tuple(
        LARS(sgd(adapted_groups(dtype, decays, **options), lr=0.5, **options), eps=EPS, trust_coef=TRUST_COEF)
        for sgd in (optim.SGD, torch.optim.SGD)
    )


PAIRS = {"plain": pair, "lars": lars_pair}
unders = pytest.mark.parametrize("under_lars", [False, True], ids=["plain", "lars"])
both = pytest.mark.parametrize("pair_of", PAIRS.values(), ids=list(PAIRS))


def give_gradients(optimizers, step):
    """Fresh gradients, the same for all; one of zeros in step 1, and one missing in steps 0 and 2."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, params in enumerate(zip(*map(params_of, optimizers), strict=True)):
        wide = torch.complex128 if params[0].is_complex() else torch.float64
        grad = (0.3 * (index + 1) * torch.randn(params[0].shape, dtype=wide, generator=generator)).to(params[0].dtype)
        for param in params:
            missing = (step, index) in {(0, 6), (2, 1)}
            zero = (step, index) == (1, 0)
            param.grad = None if missing else torch.zeros_like(param) if zero else torch.empty_like(param).copy_(grad)


def assert_same(ours, theirs, tolerance=0.0):
    """Parameters and momentum agree, and both have state for the same parameters under the same keys."""
    pairs = list(zip(params_of(ours), params_of(theirs), strict=True))
    assert [p in ours.state for p, _ in pairs] == [q in theirs.state for _, q in pairs]
    for index, (p, q) in enumerate(pairs):
        close(p.detach(), q.detach(), tolerance, f"parameter {index}")
        assert ours.state.get(p, {}).keys() == theirs.state.get(q, {}).keys(), index
        for key, value in ours.state.get(p, {}).items():
            close(value, theirs.state[q][key], tolerance, f"{key} of parameter {index}")


def assert_same_ratios(ours, theirs, tolerance=0.0):
    our_ratios, their_ratios = ours.trust_ratios(), theirs.trust_ratios()
    assert len(our_ratios) == len(their_ratios)
    for index, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
        assert (p in our_ratios) == (q in their_ratios), index
        if p in our_ratios:
            close(our_ratios[p], their_ratios[q], tolerance, f"ratio {index}")


def snapshot(optimizer):
    """Everything that a step may change, and the versions of what it may not."""
    params = params_of(optimizer)
    return copy.deepcopy(
        (
            [param.detach() for param in params],
            [None if param.grad is None else param.grad.detach() for param in params],
            [dict(optimizer.state.get(param, {})) for param in params],
            [param._version for param in params],
            [None if param.grad is None else param.grad._version for param in params],
            [param in optimizer.state for param in params],
        )
    )


def assert_unchanged(optimizer, before):
    torch.testing.assert_close(snapshot(optimizer), before, rtol=0, atol=0, equal_nan=True)


def run(optimizers, steps):
    for step in steps:
        give_gradients(optimizers, step)
        for optimizer in optimizers:
            optimizer.step()
        change_lr(optimizers, step)


def widened(theirs, ours):
    """Let torch's optimizer have what ours has, in float64."""
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        q.data.copy_(p.detach())
        q.grad = None if p.grad is None else p.grad.double()
        if p in ours.state:
            theirs.state[q]["momentum_buffer"] = ours.state[p]["momentum_buffer"].double()


KEPT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class Subclass(torch.nn.Parameter):
    pass


def parameter(*shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.nn.Parameter(scale * torch.randn(shape, dtype=dtype, generator=generator))


def with_gradient(param, grad=None):
    param.grad = torch.full_like(param, 0.25) if grad is None else grad
    return param


def sparse_gradient(rows, shape, dtype=torch.float32, scale=1.0):
    values = scale * torch.arange(1, 1 + len(rows) * math.prod(shape[1:]), dtype=dtype).reshape(len(rows), *shape[1:])
    return torch.sparse_coo_tensor([rows], values, shape)


def flagged(param):
    param._fsdp_flattened = True
    return param


def inference_like(param):
    with torch.inference_mode():
        return torch.full_like(param, 0.5)


def of_grad_dtype(param, dtype):
    if not hasattr(param, "grad_dtype"):
        pytest.skip("gradients of another dtype need a newer torch")
    param.grad_dtype = dtype
    return with_gradient(param, torch.full(param.shape, 0.25, dtype=dtype))


ODD = {
    "sparse": lambda: with_gradient(parameter(5, 2), sparse_gradient([1, 3, 1], (5, 2))),
    "sparse, of an expanded parameter": lambda: with_gradient(  # torch adds row after row
        torch.nn.Parameter(torch.rand(1, 2).expand(5, 2)), sparse_gradient([1, 3, 1], (5, 2), scale=0.1)
    ),
    "complex": lambda: with_gradient(parameter(3, dtype=torch.complex64)),
    "conjugated": lambda: with_gradient(
        parameter(3, dtype=torch.complex64), torch.rand(3, dtype=torch.complex64).conj()
    ),
    "negated": lambda: with_gradient(parameter(3), torch.rand(3, dtype=torch.complex64).conj().imag),
    "expanded": lambda: with_gradient(parameter(3, 4), torch.rand(1, 4).expand(3, 4)),
    "overlapping": lambda: with_gradient(parameter(3, 4), torch.rand(7).as_strided((3, 4), (1, 1))),
    "sliced": lambda: with_gradient(torch.nn.Parameter(sliced(parameter(3, 4).detach()))),
    "gradient sliced": lambda: with_gradient(parameter(3, 4), sliced(torch.rand(3, 4))),
    "gradient of another dtype": lambda: of_grad_dtype(parameter(3, dtype=torch.bfloat16), torch.float32),
    "gradient made in inference mode": lambda: with_gradient(p := parameter(3), inference_like(p)),
    "subclass": lambda: with_gradient(Subclass(torch.rand(3))),
    "parameter conjugated": lambda: with_gradient(
        torch.nn.Parameter(torch.rand(3, dtype=torch.complex64).conj()), 1j * torch.rand(3)
    ),
    "parameter negated": lambda: with_gradient(
        torch.nn.Parameter(torch.rand(3, dtype=torch.complex64).conj().imag), torch.rand(3)
    ),
    "FSDP1": lambda: flagged(with_gradient(parameter(3))),
    "float8": lambda: with_gradient(torch.nn.Parameter(torch.rand(3).to(torch.float8_e4m3fn), requires_grad=True)),
}
PLAINLY = {"decayed_norm": False, "clip": False, "lr_in_momentum": False, "lr": None}
ADD = {"weight_decay": 0.1, "trust_coef": 0.3, "eps": 0.05, "maximize": False, **PLAINLY}
ADD_SGD = {**ADD, "lr": 0.5, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "momentum_in_float32": False}


def add_to_lars(layers, params, **different):
    options = ops.fast_options("LarsOptions", **{**ADD, **different})
    return [position for _, position in layers.add([({"params": params}, options)])]


def add_to_sgd(layers, params, state=None, **different):
    options = ops.fast_options("SgdOptions", **{**ADD_SGD, **different})
    left = layers.add([({"params": params}, options)], {} if state is None else state)
    return [position for _, position in left]


def raises_and_changes_nothing(optimizer, error, message):
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


def sgd_of(model, cls=optim.SGD, under_lars=False, **options):
    """Our SGD, or another class, with two groups of different decay."""
    base = sgd(model, cls, **options)
    return LARS(base, eps=EPS, trust_coef=TRUST_COEF) if under_lars else base


def through(how, state_dict):
    """A state dict after it was copied or saved."""
    if how == "deepcopy":
        return copy.deepcopy(state_dict)
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def hand_over_in_mid_training(how, ours, theirs, expected, other):
    """Theirs, then ours and then another of theirs go on with the state and parameters of the one before."""

    def hand_over(one, to):
        to.load_state_dict(through(how, one.state_dict()))
        for p, q in zip(params_of(one), params_of(to), strict=True):
            q.data.copy_(p.detach())

    run([theirs, expected], range(2))
    hand_over(theirs, ours)
    run([ours, expected], range(2, 4))
    assert_same(ours, expected, 1e-12)
    hand_over(ours, other)
    run([other, expected], range(4, 6))
    assert_same(other, expected, 1e-12)


def step_with_lr_tensors(ours, other, shape, lr_dtype, tolerance):
    """Ours has tensors for lr, which change in place, and the other one the numbers in them."""
    tensors = []
    for group, its_other in zip(ours.param_groups, other.param_groups, strict=True):
        group["lr"] = torch.full(shape, group["lr"], dtype=lr_dtype)
        its_other["lr"] = group["lr"].item()
        tensors.append(group["lr"])
    for step in range(4):
        give_gradients([ours, other], step)
        ours.step()
        other.step()
        assert_same(ours, other, tolerance)
        for group, its_other, tensor in zip(ours.param_groups, other.param_groups, tensors, strict=True):
            assert group["lr"] is tensor
            tensor.mul_(0.7)
            its_other["lr"] = tensor.item()


def step_odd_layers(name, ours, theirs, also=None, tolerance=2e-6):
    """Three steps over an odd layer and others; ``also()`` after each. Gradients are only read."""
    grads = [
        (param.grad, param.grad._version if name != "gradient made in inference mode" else 0)
        for param in params_of(ours)
    ]
    for _ in range(3):
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert_same(ours, theirs, tolerance)
        if also is not None:
            also()
    for param, (grad, version) in zip(params_of(ours), grads, strict=True):
        assert param.grad is grad
        assert grad.is_inference() or grad._version == version
