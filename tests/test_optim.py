"""SGD that takes trust ratios, the protocol by which it does, and the eager door: all against torch's own SGD.

The oracle is ``torch.optim.SGD``, alone and under LARS, which tests/test_bases.py holds to the contract by hand.
"""

import ast
import copy
import inspect
import io
import itertools
import math
import pickle
import textwrap

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from cases import CASES, DTYPES, REAL_DTYPES, Case, Layer, channels_last, on, sizes, sliced, transposed
from closeness import assert_all_equal, assert_all_within_ulps, assert_within_ulps

import torchlars
from torchlars import LARS, ops, optim, reference

EPS, TRUST_COEF = 0.05, 0.3  # of the wrapper; far from the defaults, so that each is seen to matter


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_checked_sparse_tensors():
    """Tensors are small here: a second thread would only be waited for. Sparse ones want a word on their checks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.sparse.check_sparse_tensor_invariants():
        yield
    torch.set_num_threads(threads)


# What is stepped.

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


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


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


def change_lr(optimizers, step):
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = group["lr"] * [0.5, 1.7, 0.9, 1.2][(step + index) % 4]


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


def close(a, b, tolerance, message):
    a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{message}: {text}")


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


# The update, plain and with trust ratios.


@table
def test_plain_step_equals_that_of_torch(options, decays, backend):
    ours, theirs = pair(options, decays)
    for step in range(4):
        give_gradients([ours, theirs], step)
        assert ours.step() is None
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        change_lr([ours, theirs], step)


@table
def test_lars_equals_lars_over_torchs_sgd_and_leaves_gradients_alone(options, decays, backend):
    ours, theirs = lars_pair(options, decays)
    for step in range(4):
        give_gradients([ours, theirs], step)
        grads = [param.grad for param in params_of(ours)]
        values = [None if grad is None else grad.clone() for grad in grads]
        versions = [None if grad is None else grad._version for grad in grads]
        assert ours.step() is None
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        assert_same_ratios(ours, theirs, 1e-14)
        assert len(ours.trust_ratios()) == 8 - (step in (0, 2))
        for param, grad, value, version in zip(params_of(ours), grads, values, versions, strict=True):
            assert param.grad is grad
            assert grad is None or (torch.equal(grad, value) and grad._version == version)
        change_lr([ours, theirs], step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128], ids=str)
@few
@both
def test_other_dtypes_equal_torchs_to_their_precision(pair_of, options, dtype, backend):
    ours, theirs = pair_of(options, dtype=dtype)
    for step in range(4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12 if dtype == torch.complex128 else 2e-6)


def widened(theirs, ours):
    """Let torch's optimizer have what ours has, in float64."""
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        q.data.copy_(p.detach())
        q.grad = None if p.grad is None else p.grad.double()
        if p in ours.state:
            theirs.state[q]["momentum_buffer"] = ours.state[p]["momentum_buffer"].double()


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@few
def test_a_16_bit_step_is_one_in_float64_that_was_rounded_once(options, dtype, momentum_dtype, backend):
    ours, theirs = pair(options, dtype=dtype, momentum_dtype=momentum_dtype)[0], pair(options)[1]
    for step in range(3):
        give_gradients([ours], step)
        widened(theirs, ours)
        ours.step()
        theirs.step()
        for index, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
            assert_within_ulps(p, q.detach().to(dtype), 1, f"parameter {index}")
            assert (p in ours.state) == (q in theirs.state)
            if p in ours.state:
                buffer, wide = ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
                if momentum_dtype is None:
                    assert_within_ulps(buffer, wide.to(dtype), 1, f"momentum {index}")
                else:
                    assert buffer.dtype == torch.float32
                    torch.testing.assert_close(buffer, wide.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@few
def test_a_16_bit_step_under_lars_is_one_in_float64_that_was_rounded_once(options, dtype, backend):
    ours, theirs = lars_pair(options, dtype=dtype)[0], lars_pair(options)[1]
    for step in range(3):
        give_gradients([ours], step)
        widened(theirs, ours)
        ours.step()
        theirs.step()
        ratios = ours.trust_ratios()
        for index, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
            assert_within_ulps(p, q.detach().to(dtype), 1, f"parameter {index}")
            if p in ratios:
                assert_within_ulps(ratios[p], theirs.trust_ratios()[q].float(), 1, f"ratio {index}")


@pytest.mark.parametrize(
    "options",
    [{}, {"dampening": 0.25}, {"dampening": 1.0}, {"nesterov": True}, {"nesterov": True, "maximize": True}],
    ids=str,
)
@both
def test_momentum_may_be_exactly_1(pair_of, options, backend):
    """A sum of all gradients, and with a dampening of 1 the first one for good."""
    ours, theirs = pair_of({"momentum": 1.0, **options})
    for optimizer in (ours, theirs):
        for group in optimizer.param_groups:
            group["momentum"] = 1.0
    for step in range(4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)


@both
def test_momentum_may_come_and_go(pair_of, backend):
    """A buffer that is missing is begun undampened; one that is there is kept for as long as there is no momentum."""
    ours, theirs = pair_of({"dampening": 0.25})
    for step, momentum in enumerate([0.0, 0.9, 0.0, 0.5, 0.8]):
        for group in [*ours.param_groups, *theirs.param_groups]:
            group["momentum"] = momentum
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)


@both
def test_groups_may_differ_in_direction_and_in_kind(pair_of, backend):
    ours, theirs = pair_of({"momentum": 0.9})
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(maximize=True)
        optimizer.param_groups[1].update(nesterov=True)
    for step in range(3):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)


@both
def test_a_step_without_any_gradient_changes_nothing(pair_of, backend):
    ours, _ = pair_of({"momentum": 0.9})
    before = snapshot(ours)
    assert ours.step() is None
    assert_unchanged(ours, before)
    assert len(ours.state) == 0


def test_it_is_torchs_sgd_to_whoever_asks():
    optimizer = optim.SGD(layers(0), lr=0.5, momentum=0.9)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.takes_trust_ratios is True
    assert torchlars.optim.SGD is optim.SGD
    named = optim.SGD([(f"layer{i}", param) for i, param in enumerate(layers(0))], lr=0.5)
    assert named.param_groups[0]["param_names"] == [f"layer{i}" for i in range(5)]
    theirs = torch.optim.SGD(layers(0), lr=0.5, momentum=0.9)
    assert list(optimizer.defaults.items()) == list(theirs.defaults.items())
    assert optimizer.param_groups[0].keys() == theirs.param_groups[0].keys()


# Momentum is in the parameter's memory order.

ORDERS = {"channels_last": channels_last, "transposed": transposed, "as it is": lambda x: x}


@both
def test_momentum_has_the_parameters_memory_order(pair_of, backend):
    ours, _ = pair_of({"momentum": 0.9})
    for step in (3, 4):
        give_gradients([ours], step)
        ours.step()
        orders = [(param.stride(), ours.state[param]["momentum_buffer"].stride()) for param in ours.state]
        assert ((12, 1, 6, 3), (12, 1, 6, 3)) in orders
        assert ((1, 4), (1, 4)) in orders
        assert all(one == other for one, other in orders)


@pytest.mark.parametrize("order", ORDERS)
@both
def test_loaded_momentum_of_another_memory_order_is_taken_over(pair_of, order, backend):
    ours, theirs = pair_of({"momentum": 0.9})
    run([ours, theirs], range(2))
    for optimizer in (ours, theirs):
        for state in optimizer.state.values():
            buffer = state["momentum_buffer"]
            if buffer.dim() == (4 if order == "channels_last" else 2) or order == "as it is":
                state["momentum_buffer"] = ORDERS[order](buffer.contiguous())
    for step in range(2, 4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
    assert all(ours.state[p]["momentum_buffer"].stride() == p.stride() for p in ours.state if p.grad is not None)


@pytest.mark.parametrize("order", ORDERS)
@both
def test_momentum_that_requires_a_gradient_is_stepped_as_any_other(pair_of, order, backend):
    """Also one that is copied into the parameter's memory order first; what is new requires none."""
    ours, theirs = pair_of({"momentum": 0.9})
    run([ours, theirs], range(2))
    for state in ours.state.values():
        buffer = state["momentum_buffer"]
        assert not buffer.requires_grad
        if buffer.dim() == (4 if order == "channels_last" else 2):
            buffer = ORDERS[order](buffer.contiguous())
        state["momentum_buffer"] = buffer.requires_grad_()
    for step in range(2, 4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
    assert all(value.is_leaf for state in ours.state.values() for value in state.values())
    assert all(param.is_leaf for param in params_of(ours))


@both
def test_momentum_stays_the_same_tensor(pair_of, backend):
    ours, _ = pair_of({"momentum": 0.9})
    run([ours], range(3))
    before = {param: state["momentum_buffer"] for param, state in ours.state.items()}
    versions = {param: buffer._version for param, buffer in before.items()}
    run([ours], range(3, 4))
    for param, buffer in before.items():
        assert ours.state[param]["momentum_buffer"] is buffer
        assert buffer._version > versions[param]
        assert not buffer.requires_grad


# State dicts.


def through(how, state_dict):
    if how == "deepcopy":
        return copy.deepcopy(state_dict)
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


hows = pytest.mark.parametrize("how", ["deepcopy", "weights_only"])


@few
@both
def test_state_dict_is_that_of_torch(pair_of, options):
    ours, theirs = pair_of(options)
    run([ours, theirs], range(3))
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert a["param_groups"] == b["param_groups"]
    assert list(a["param_groups"][0]) == list(b["param_groups"][0])
    torch.testing.assert_close(a["state"], b["state"], rtol=1e-12, atol=1e-12)


@hows
@few
@both
def test_state_dicts_go_from_torch_to_us_and_back_in_mid_training(pair_of, options, how, backend):
    ours, theirs = pair_of(options)
    expected, other = pair_of(options)[1], pair_of(options)[1]
    run([theirs, expected], range(2))

    def hand_over(one, to):
        to.load_state_dict(through(how, one.state_dict()))
        for p, q in zip(params_of(one), params_of(to), strict=True):
            q.data.copy_(p.detach())

    hand_over(theirs, ours)
    run([ours, expected], range(2, 4))
    assert_same(ours, expected, 1e-12)
    hand_over(ours, other)
    run([other, expected], range(4, 6))
    assert_same(other, expected, 1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@both
def test_a_copy_goes_on_like_the_original(pair_of, copied, backend):
    ours, _ = pair_of({"momentum": 0.9, "nesterov": True})
    run([ours], range(2))
    for param in params_of(ours):
        param.grad = None
    other = copied(ours)
    run([ours, other], range(2, 4))
    assert_same(ours, other)
    assert all(p is not q for p, q in zip(params_of(ours), params_of(other), strict=True))
    assert not any(
        p.data_ptr() == q.data_ptr() for p, q in zip(params_of(ours), params_of(other), strict=True) if p.numel()
    )


def test_a_state_dict_of_other_groups_is_refused_and_nothing_changes(backend):
    ours, _ = pair({"momentum": 0.9})
    run([ours], range(2))
    before = snapshot(ours)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        ours.load_state_dict(optim.SGD(layers(0), lr=0.5).state_dict())
    assert_unchanged(ours, before)
    assert not ours._optimizer_load_state_dict_pre_hooks


def test_loading_sees_what_hooks_make_of_a_state_dict(backend):
    ours, _ = pair({"momentum": 0.9}, dtype=torch.bfloat16, momentum_dtype=torch.float32)
    run([ours], range(1))

    def doubled(_, state_dict):
        state = {i: {"momentum_buffer": 2 * own["momentum_buffer"]} for i, own in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other, _ = pair({"momentum": 0.9}, dtype=torch.bfloat16, momentum_dtype=torch.float32)
    other.register_load_state_dict_pre_hook(doubled)
    other.load_state_dict(ours.state_dict())
    for p, q in zip(params_of(ours), params_of(other), strict=True):
        assert (p in ours.state) == (q in other.state)
        if p in ours.state:
            assert torch.equal(other.state[q]["momentum_buffer"], 2 * ours.state[p]["momentum_buffer"])


# momentum_dtype.

KEPT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def in_float32(dtype, **options):
    return pair({"momentum": 0.9, **options}, dtype=dtype, momentum_dtype=torch.float32)[0]


def reference_step(optimizer, buffers):
    """What the reference makes of a step: new parameters, by parameter, and new momenta."""
    results = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            first = param not in buffers
            buffer = buffers.setdefault(param, torch.zeros_like(param, dtype=torch.float32, requires_grad=False))
            result = param.detach().clone()
            reference.sgd_(
                [result],
                [param.grad],
                [buffer],
                None,
                [group["weight_decay"]],
                [group["lr"]],
                [group["momentum"]],
                [0.0 if first else group["dampening"]],
                group["nesterov"],
                group["maximize"],
                None,
            )
            results[param] = result
    return results


@KEPT
@pytest.mark.parametrize("options", [{}, {"dampening": 0.25}, {"nesterov": True}, {"maximize": True}], ids=str)
def test_momentum_in_float32_is_that_of_the_reference(dtype, options, backend):
    ours, buffers = in_float32(dtype, **options), {}
    for step in range(4):
        give_gradients([ours], step)
        expected = reference_step(ours, buffers)
        ours.step()
        assert ours.state.keys() == buffers.keys()
        for param, result in expected.items():
            assert torch.equal(param, result)
        for param, buffer in buffers.items():
            assert ours.state[param]["momentum_buffer"].dtype == torch.float32
            assert torch.equal(ours.state[param]["momentum_buffer"], buffer)
        change_lr([ours], step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_momentum_of_wider_layers_is_not_changed_by_momentum_dtype(dtype, backend):
    one, other = (pair({"momentum": 0.9}, dtype=dtype, momentum_dtype=kept)[0] for kept in (torch.float32, None))
    run([one, other], range(3))
    assert_same(one, other)
    assert all(state["momentum_buffer"].dtype == dtype for state in one.state.values())


@hows
@KEPT
def test_momentum_in_float32_is_loaded_without_rounding(dtype, how, backend):
    ours, other = in_float32(dtype), in_float32(dtype)
    run([ours], range(3))
    assert any((b := s["momentum_buffer"]).numel() and not torch.equal(b, b.to(dtype)) for s in ours.state.values())
    other.load_state_dict(through(how, ours.state_dict()))
    for p, q in zip(params_of(ours), params_of(other), strict=True):
        q.data.copy_(p.detach())
    assert_same(ours, other)
    run([ours, other], range(3, 5))
    assert_same(ours, other)


@hows
@KEPT
def test_momentum_in_float32_goes_through_torch_and_comes_back_as_float32(dtype, how, backend):
    ours, theirs = in_float32(dtype), pair({"momentum": 0.9}, dtype=dtype)[1]
    run([ours], range(3))
    theirs.load_state_dict(through(how, ours.state_dict()))
    assert all(state["momentum_buffer"].dtype == dtype for state in theirs.state.values())
    run([theirs], range(3, 4))
    assert all(state["momentum_buffer"].dtype == dtype for state in theirs.state.values())
    ours.load_state_dict(through(how, theirs.state_dict()))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert (p in ours.state) == (q in theirs.state)
        if p in ours.state:
            assert ours.state[p]["momentum_buffer"].dtype == torch.float32
            assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"].float())


@KEPT
@pytest.mark.parametrize("where", ["argument", "group"])
def test_momentum_that_torch_kept_becomes_float32(where, dtype, backend):
    def build():
        first, second = groups(dtype, momentum=0.9)
        if where == "argument":
            return optim.SGD([first, second], lr=0.5, momentum=0.9, momentum_dtype=torch.float32)
        return optim.SGD([first, {**second, "momentum_dtype": torch.float32}], lr=0.5, momentum=0.9)

    theirs, ours = pair({"momentum": 0.9}, dtype=dtype)[1], build()
    run([theirs], range(3))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for _ in range(2):
        expected = torch.float32 if where == "argument" else dtype
        assert {ours.state[p]["momentum_buffer"].dtype for p in ours.param_groups[0]["params"]} == {expected}
        assert {ours.state[p]["momentum_buffer"].dtype for p in ours.param_groups[1]["params"]} == {torch.float32}
        run([ours], range(3, 4))


@KEPT
def test_momentum_dtype_may_be_a_groups_own(dtype, backend):
    first, second = groups(dtype, momentum=0.9)
    third = {"params": layers(2, dtype), "momentum_dtype": None, "weight_decay": 0.1}
    ours = optim.SGD([first, second], lr=0.5, momentum=0.9, momentum_dtype=torch.float32)
    ours.add_param_group(third)
    run([ours], range(3))
    for group, expected in zip(ours.param_groups, [torch.float32, torch.float32, dtype], strict=True):
        assert group["momentum_dtype"] == (None if expected == dtype else expected)
        assert {ours.state[param]["momentum_buffer"].dtype for param in group["params"]} == {expected}
    other = copy.deepcopy(ours)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_same(ours, other)


@KEPT
def test_momentum_dtype_may_be_changed_between_steps(dtype, backend):
    ours = pair({"momentum": 0.9}, dtype=dtype)[0]
    for step, kept in enumerate([None, torch.float32, None]):
        for group in ours.param_groups:
            group["momentum_dtype"] = kept
        give_gradients([ours], step + 3)
        buffers = {
            param: state["momentum_buffer"].to(kept or dtype).float().clone() for param, state in ours.state.items()
        }
        expected = reference_step(ours, buffers)
        ours.step()
        for param, result in expected.items():
            assert torch.equal(param, result)
            assert torch.equal(ours.state[param]["momentum_buffer"], buffers[param].to(kept or dtype))


@pytest.mark.parametrize("wrong", [torch.float64, torch.bfloat16, "float32", 32, True], ids=str)
def test_a_wrong_momentum_dtype_is_refused(wrong):
    message = rf"must be None or torch.float32 \(got: {wrong!r}\)"
    with pytest.raises(ValueError, match=f"momentum_dtype {message}"):
        optim.SGD(layers(0), lr=0.5, momentum_dtype=wrong)
    with pytest.raises(ValueError, match=f"momentum_dtype of parameter group 1 {message}"):
        optim.SGD([{"params": layers(0)}, {"params": layers(1), "momentum_dtype": wrong}], lr=0.5)


# The same bits for any number of threads, from run to run, and whichever way a layer took.


def large_groups(dtype):
    """Layers that are cut into chunks, among small ones."""
    generator = torch.Generator().manual_seed(0)
    numels = [[70_001, 5, 16_384], [300, 40_000, *[64] * 20]]
    for index, group in enumerate(numels):
        values = [(i + 1) * torch.randn(n, generator=generator, dtype=torch.float64) for i, n in enumerate(group)]
        params = [torch.nn.Parameter(value.to(dtype)) for value in values]
        yield {"params": params, "weight_decay": [0.1, 0.03][index], "lr": [0.5, 0.2][index]}


def bits_of_large(dtype, under_lars, sgd=optim.SGD, **options):
    optimizer = base = sgd(list(large_groups(dtype)), **options)
    if under_lars:
        optimizer = LARS(base, eps=EPS, trust_coef=TRUST_COEF)
    run([optimizer], range(3))
    ratios = (
        [ratio for _, ratio in sorted((p.numel(), r) for p, r in optimizer.trust_ratios().items())]
        if under_lars
        else []
    )
    momenta = [base.state[param]["momentum_buffer"] for param in params_of(base)]
    return [*(param.detach() for param in params_of(base)), *momenta, *ratios]


def assert_bits(ones, others):
    assert len(ones) == len(others)
    for index, (one, other) in enumerate(zip(ones, others, strict=True)):
        assert one.dtype == other.dtype, index
        assert torch.equal(one, other), index


LARGE = {
    "float32": (torch.float32, {"momentum": 0.9}),
    "nesterov": (torch.float64, {"momentum": 0.9, "nesterov": True}),
    "bfloat16": (torch.bfloat16, {"momentum": 0.9, "momentum_dtype": torch.float32}),
}


@pytest.mark.parametrize("kind", LARGE)
@unders
def test_bits_do_not_depend_on_threads_or_repetition(extension, threads, under_lars, kind):
    dtype, options = LARGE[kind]
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(bits_of_large(dtype, under_lars, **options))
    for result in results[1:]:
        assert_bits(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sgd", [optim.SGD, torch.optim.SGD], ids=["ours", "torchs"])
@unders
def test_bits_do_not_depend_on_who_gathers(extension, monkeypatch, under_lars, sgd, dtype):
    gathered = bits_of_large(dtype, under_lars, sgd, momentum=0.9)
    monkeypatch.setattr(ops, "plain_layers", lambda kind: ops.NoPlainLayers())
    assert_bits(bits_of_large(dtype, under_lars, sgd, momentum=0.9), gathered)


# The eager door: which layers it takes.


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


def add_to_lars(door, params, **different):
    return door.add(params, **{**ADD, **different})


def add_to_sgd(door, params, state=None, **different):
    return door.add(params, {} if state is None else state, **{**ADD_SGD, **different})


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
    hyper = [0.1] * 2, [0.3] * 2, [0.05] * 2
    if door == "LarsLayers":
        ratios = layers.buckets[0].adapt(inv_scale)
        expected = ops.scale_by_trust_ratios_(grads, values, *hyper, False, inv_scale=inv_scale)
    else:
        ratios = layers.buckets[0].update(inv_scale=inv_scale)
        sgd = [0.5] * 2, [0.0] * 2, [0.0] * 2, False, False
        expected = ops.lars_sgd_(values, grads, [], *hyper, *sgd, inv_scale=inv_scale)
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
        ops.sgd_([value], [param.grad], [momentum], None, [0.1], [0.5], [0.9], [0.0], False, False, None, inv_scale)
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
    assert ops.plain_layers("SgdLayers").buckets == []


def test_without_extension_or_while_compiling_no_layer_is_plain(backend):
    layers = ops.plain_layers("LarsLayers")
    assert isinstance(layers, ops.NoPlainLayers) == (backend == "reference")
    none = ops.NoPlainLayers()
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


# Odd layers are stepped like plain ones.


def odd_pair(name, under_lars, **options):
    """An odd layer between two plain ones, in our SGD and in torch's. Layers without weight decay are in their own group."""
    optimizers = []
    for sgd in (optim.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        odd = ODD[name]()
        real = torch.float32 if odd.dtype.is_complex else odd.dtype
        one, other = (with_gradient(parameter(n, dtype=real, scale=n)) for n in (4, 6))
        its_own = {"params": [odd], "weight_decay": 0.0 if name.startswith("sparse") else 0.2}
        base = sgd([{"params": [one]}, its_own, {"params": [other], "lr": 0.1}], lr=0.5, weight_decay=0.1, **options)
        optimizers.append(LARS(base, eps=EPS, trust_coef=TRUST_COEF) if under_lars else base)
    return optimizers


DIFFER = {"float8", "gradient of another dtype", "FSDP1"}


@pytest.mark.parametrize("name", [name for name in ODD if name not in DIFFER])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "maximize": True}], ids=str
)
@unders
def test_an_odd_layer_is_stepped_as_by_torch(under_lars, options, name, backend):
    ours, theirs = odd_pair(name, under_lars, **options)
    grads = [
        (param.grad, param.grad._version if name != "gradient made in inference mode" else 0)
        for param in params_of(ours)
    ]
    for _ in range(3):
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 2e-6)
        if under_lars:
            assert_same_ratios(ours, theirs, 1e-6)
            assert len(ours.trust_ratios()) == 3
    for param, (grad, version) in zip(params_of(ours), grads, strict=True):
        assert param.grad is grad
        assert grad.is_inference() or grad._version == version


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.5}], ids=str)
@unders
def test_a_gradient_of_another_dtype_is_not_rounded(under_lars, options, backend):
    """torch's own buffers are of the gradient's dtype then; the oracle is a step in float64."""
    ours, _ = odd_pair("gradient of another dtype", under_lars, **options)
    wide = torch.optim.SGD(
        [{**group, "params": [p.detach().double() for p in group["params"]]} for group in ours.param_groups]
    )
    wide = LARS(wide, eps=EPS, trust_coef=TRUST_COEF) if under_lars else wide
    for scale in (1.0, 1.001, 0.7):
        for param in params_of(ours):
            param.grad.fill_(0.251 * scale)
        widened(wide, ours)
        ours.step()
        wide.step()
        for p, q in zip(params_of(ours), params_of(wide), strict=True):
            assert_within_ulps(p, q.detach().to(p.dtype), 1)
            if options:
                assert_within_ulps(ours.state[p]["momentum_buffer"], wide.state[q]["momentum_buffer"].to(p.dtype), 1)


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "maximize": True}], ids=str
)
@unders
def test_changing_sparse_gradients_are_stepped_as_by_torch(under_lars, options, coalesced, backend):
    ours, theirs = odd_pair("sparse", under_lars, **options)
    for rows in ([0, 1, 1], [4], [], [2, 2, 0]):
        for optimizer in (ours, theirs):
            grad = sparse_gradient(rows, (5, 2), scale=0.1)
            params_of(optimizer)[1].grad = grad.coalesce() if coalesced else grad
        for p, q in zip(params_of(ours)[::2], params_of(theirs)[::2], strict=True):
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 2e-6)
        assert params_of(ours)[1].grad.is_coalesced() == coalesced or len(rows) < 2


@unders
def test_a_gradient_may_be_sparse_and_dense_in_turn(under_lars, backend):
    """Torch's own SGD begins a sparse momentum then, and cannot go on with it: so the oracle's gradients are dense."""
    (ours, _), (_, theirs) = (odd_pair("sparse", under_lars, momentum=0.9) for _ in range(2))
    for step in range(4):
        grad = sparse_gradient([0, 1, 1], (5, 2), scale=0.1 * (step + 1))
        params_of(ours)[1].grad = grad if step % 2 == 0 else grad.to_dense()
        params_of(theirs)[1].grad = grad.to_dense()
        ours.step()
        theirs.step()
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            close(p.detach(), q.detach(), 2e-6, f"step {step}")
            q.grad = p.grad.to_dense().clone()


def raises_and_changes_nothing(optimizer, error, message):
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


@unders
def test_sparse_gradients_with_weight_decay_are_refused_and_nothing_changes(under_lars, backend):
    ours, _ = odd_pair("sparse", under_lars, momentum=0.9)
    ours.param_groups[1]["weight_decay"] = 0.125
    message = (
        r"^sparse gradients need weight_decay=0 \(weight_decay: 0.125\) \(group: 1, parameter: 0, shape: \(5, 2\)\)$"
    )
    raises_and_changes_nothing(ours, RuntimeError, message)


@unders
def test_float8_is_refused_and_nothing_changes(under_lars, backend):
    ours, _ = odd_pair("complex", under_lars, momentum=0.9)
    float8 = ODD["float8"]()
    ours.add_param_group({"params": [parameter(2), float8]})
    before = [param.detach().clone() for param in params_of(ours)[:-1]]
    message = r"^parameters and gradients must be both real or both complex, .* at least 16 bits \(parameter: torch.float8_e4m3fn, gradient: torch.float8_e4m3fn\) \(group: 3, parameter: 1, shape: \(3,\)\)$"
    with pytest.raises(RuntimeError, match=message):
        ours.step()
    assert all(map(torch.equal, before, params_of(ours)[:-1]))
    assert len(ours.state) == 0


@unders
def test_a_parameter_that_overlaps_itself_is_refused_and_nothing_changes(under_lars, backend):
    ours, _ = odd_pair("complex", under_lars, momentum=0.9)
    ours.add_param_group(
        {"params": [with_gradient(torch.nn.Parameter(torch.rand(1, 4).expand(3, 4)), torch.rand(3, 4))]}
    )
    message = r"^elements of a parameter must not share memory \(strides: \(0, 1\)\) \(group: 3, parameter: 0, shape: \(3, 4\)\)$"
    raises_and_changes_nothing(ours, RuntimeError, message)


@unders
def test_a_gradient_of_another_shape_is_refused_and_nothing_changes(under_lars, backend):
    """A parameter may grow by ``.data`` after its gradient came."""
    ours, _ = odd_pair("complex", under_lars, momentum=0.9)
    grown = with_gradient(parameter(3, 4))
    grown.data = torch.rand(5, 4)
    ours.add_param_group({"params": [grown]})
    message = (
        r"^gradients must have their parameter's shape \(gradient: \(3, 4\)\) "
        r"\(group: 3, parameter: 0, shape: \(5, 4\)\)$"
    )
    raises_and_changes_nothing(ours, RuntimeError, message)


@KEPT
def test_sparse_gradients_with_momentum_in_float32_are_refused_and_nothing_changes(dtype, backend):
    table = with_gradient(parameter(5, 2, dtype=dtype), sparse_gradient([1, 3], (5, 2), dtype))
    ours = optim.SGD(
        [with_gradient(parameter(3, dtype=dtype)), table], lr=0.5, momentum=0.9, momentum_dtype=torch.float32
    )
    message = rf"^momentum_dtype must be None for sparse gradients, .* \(dtype: {dtype}\) \(group: 0, parameter: 1, shape: \(5, 2\)\)$"
    raises_and_changes_nothing(ours, RuntimeError, message)
    ours.param_groups[0]["momentum"] = 0.0  # nothing to keep
    ours.step()


def test_parameters_flattened_by_fsdp1_are_stepped_but_refused_under_lars(backend):
    ours, theirs = odd_pair("FSDP1", False, momentum=0.9)
    for _ in range(2):
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 2e-6)
    message = r"^parameters must be whole layers, but FSDP1 .* \(group: 1, parameter: 0, shape: \(3,\)\)$"
    raises_and_changes_nothing(LARS(ours), RuntimeError, message)
    ours.param_groups[1]["trust_coef"] = None
    LARS(ours).step()


@unders
def test_a_layer_that_is_listed_twice_in_a_group_is_one_layer(under_lars, backend):
    def build(times):
        params = [with_gradient(parameter(n)) for n in (3, 4)]
        base = optim.SGD([parameter(2)], lr=0.5, momentum=0.9, weight_decay=0.1)
        base.add_param_group({"params": params})
        base.param_groups[1]["params"] = params * times  # torch warns where it sees it
        return LARS(base, eps=EPS, trust_coef=TRUST_COEF) if under_lars else base

    once, twice = build(1), build(2)
    for _ in range(2):
        once.step()
        twice.step()
        for p, q in zip(once.param_groups[1]["params"], twice.param_groups[1]["params"], strict=False):
            assert torch.equal(p, q)
            assert torch.equal(once.state[p]["momentum_buffer"], twice.state[q]["momentum_buffer"])
    if under_lars:
        assert len(twice.trust_ratios()) == 2


@pytest.fixture
def mesh():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@unders
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_dtensors_are_stepped_as_by_torch(mesh, options, under_lars, backend):
    from torch.distributed.tensor import Shard, distribute_tensor

    def build(sgd):
        whole, shard = parameter(4, 3), parameter(6, 2, scale=3.0)
        shard = torch.nn.Parameter(distribute_tensor(shard.detach(), mesh, [Shard(0)]))
        shard.grad = distribute_tensor(torch.arange(12.0).reshape(6, 2) / 7, mesh, [Shard(0)])
        base = sgd([with_gradient(whole), shard], lr=0.5, weight_decay=0.1, **options)
        return LARS(base, eps=EPS, trust_coef=TRUST_COEF) if under_lars else base

    ours, theirs = build(optim.SGD), build(torch.optim.SGD)
    if backend == "extension":
        positions = add_to_sgd(ops.plain_layers("SgdLayers"), ours.param_groups[0]["params"])
        assert positions == add_to_lars(ops.plain_layers("LarsLayers"), ours.param_groups[0]["params"]) == [1]
    grads = [p.grad.clone() for p in params_of(theirs)]
    for _ in range(3):
        for p, grad in zip(params_of(theirs), grads, strict=True):
            p.grad = grad.clone()  # under LARS, torch's SGD consumes them
        shard = ours.param_groups[0]["params"][1]
        version = shard._version
        ours.step()
        theirs.step()
        assert shard._version > version  # so that autograd sees that it was written
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            assert type(p) is type(q)
            one, other = (x.to_local() if hasattr(x, "to_local") else x for x in (p, q))
            close(one.detach(), other.detach(), 2e-6, "parameter")
            assert (p in ours.state) == (q in theirs.state) == bool(options)
            if options:
                one, other = (x.state[y]["momentum_buffer"] for x, y in ((ours, p), (theirs, q)))
                assert type(one) is type(other)
                close(*(x.to_local() if hasattr(x, "to_local") else x for x in (one, other)), 2e-6, "momentum")


# The protocol.


def example():
    """The class in the documentation."""
    lines = inspect.cleandoc(optim.__doc__).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("    class "))
    block = list(itertools.takewhile(lambda line: not line or line.startswith("    "), lines[begin:]))
    source = textwrap.dedent("\n".join(block))
    (name,) = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    namespace = {"torch": torch}
    exec(source, namespace)
    return namespace[name]


def example_pair(groups_of=adapted_groups, **options):
    base = example()(groups_of(**options), {"lr": 0.5, "weight_decay": 0.0})
    return LARS(base, eps=EPS, trust_coef=TRUST_COEF), lars_pair({})[1]


def test_the_documented_base_equals_sgd_under_lars(backend):
    ours, theirs = example_pair()
    for step in range(4):
        give_gradients([ours, theirs], step)
        grads = [None if param.grad is None else (param.grad, param.grad.clone()) for param in params_of(ours)]
        assert ours.step() is None
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        assert_same_ratios(ours, theirs, 1e-14)
        for param, grad in zip(params_of(ours), grads, strict=True):
            assert grad is None or (param.grad is grad[0] and torch.equal(*grad))
        change_lr([ours, theirs], step)


def test_the_documented_base_is_plain_sgd_by_itself(backend):
    ours, theirs = example_pair()[0].optim, torch.optim.SGD(adapted_groups(), lr=0.5)
    run([ours, theirs], range(3))
    assert_same(ours, theirs, 1e-12)


def test_the_documented_base_takes_a_closure_and_measures_what_it_left(backend):
    ours, theirs = example_pair()
    for step in range(3):
        losses = []
        for optimizer in (ours, theirs):

            def closure(optimizer=optimizer, step=step):
                assert torch.is_grad_enabled()
                give_gradients([optimizer], step)
                return torch.tensor(2.0 + step)

            losses.append(optimizer.step(closure))
        assert losses == [2.0 + step] * 2
        assert_same(ours, theirs, 1e-12)
        assert_same_ratios(ours, theirs, 1e-14)


class Records(torch.optim.Optimizer):
    """A base that shows what it is given."""

    takes_trust_ratios = True

    def step(self, closure=None, *, trust_ratios=None, more=None):
        self.closure, self.more, self.given = closure, more, trust_ratios
        return "what the base returns"


def records(group_list=None, **options):
    base = Records(adapted_groups(**options) if group_list is None else group_list, {"lr": 0.5, "weight_decay": 0.125})
    return base, LARS(base, eps=EPS, trust_coef=TRUST_COEF)


def test_a_base_is_passed_what_step_was_and_its_result_is_returned(backend):
    base, optimizer = records()

    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return "the loss"

    assert optimizer.step() == "what the base returns"
    assert (base.closure, base.more) == (None, None)
    assert optimizer.step(closure, more=3) == "what the base returns"
    assert base.more == 3
    assert calls == [], "only the base calls it"
    with torch.no_grad():
        assert base.closure() == "the loss"
    assert calls == [True]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.03, 0.15]


def test_a_group_left_alone_gets_none(backend):
    base, optimizer = records()
    give_gradients([optimizer], 3)
    optimizer.step()
    params = [group["params"] for group in optimizer.param_groups]
    assert base.given.options(0) == {"trust_coef": TRUST_COEF, "eps": EPS, **PLAINLY}
    assert base.given.options(1) == {"trust_coef": 0.02, "eps": 0.01, **PLAINLY}
    assert base.given.options(2) is None
    assert base.given.measure(2, params[2]) is None
    assert optimizer.trust_ratios() == {}
    ratios = base.given.measure(1, params[1][1:])
    assert ratios.shape == (2,)
    for param, ratio in zip(params[1][1:], ratios, strict=True):
        expected = 0.02 * param.norm() / (param.grad.norm() + 0.03 * param.norm() + 0.01)
        close(ratio, expected.detach(), 1e-14, "ratio")
    assert optimizer.trust_ratios() == {}, "those of the step, which asked for none"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratios_are_float64_for_float64_layers_and_float32_for_all_others(dtype, backend):
    base, optimizer = records(dtype=dtype)
    give_gradients([optimizer], 3)
    optimizer.step()
    ratios = base.given.measure(0, optimizer.param_groups[0]["params"])
    assert ratios.dtype == (torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32)
    assert not ratios.requires_grad
    assert ratios[3:].tolist() == [1.0, 1.0]  # the zero layer and the empty one
    assert all(ratio > 0 and ratio != 1 for ratio in ratios[:3].tolist())


def test_a_base_may_measure_and_report_by_itself(backend):
    class Reports(torch.optim.Optimizer):
        takes_trust_ratios = True

        @torch.no_grad()
        def step(self, closure=None, *, trust_ratios=None):
            for index, group in enumerate(self.param_groups):
                options = trust_ratios.options(index)
                for param in group["params"]:
                    if param.grad is None:
                        continue
                    direction = param.grad + group["weight_decay"] * param
                    if options is not None:
                        w, g = param.norm(), param.grad.norm()
                        ratio = options["trust_coef"] * w / (g + group["weight_decay"] * w + options["eps"])
                        ratio = torch.where((w == 0) | (g == 0), 1.0, ratio)
                        direction = ratio * direction
                        trust_ratios.report([param], ratio.reshape(1))
                    param -= group["lr"] * direction

    ours = LARS(Reports(adapted_groups(), {"lr": 0.5}), eps=EPS, trust_coef=TRUST_COEF)
    theirs = lars_pair({})[1]
    for step in range(3):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        assert_same_ratios(ours, theirs, 1e-14)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("FSDP1", RuntimeError, r"must be whole layers, but FSDP1 .* \(group: 1, parameter: 1, shape: \(3,\)\)"),
        (
            "float8",
            TypeError,
            r"must be of a real or complex .* \(group: 1, parameter: 1, dtype: torch.float8_e4m3fn\)",
        ),
        (
            "sparse",
            RuntimeError,
            r"sparse gradients need weight_decay=0 \(weight_decay: 0.125\) \(group: 1, parameter: 1",
        ),
    ],
)
def test_what_cannot_be_measured_is_named_by_its_place_in_the_group(name, error, message, backend):
    param = ODD[name]()
    base, optimizer = records([{"params": [parameter(2)]}, {"params": [parameter(4), param]}])
    optimizer.step()
    with pytest.raises(error, match=message):
        base.given.measure(1, [param])


def test_a_base_that_does_not_say_so_is_given_scaled_gradients(backend):
    class Silent(optim.SGD):
        takes_trust_ratios = False

    silent = LARS(Silent(adapted_groups(), lr=0.5, momentum=0.9), eps=EPS, trust_coef=TRUST_COEF)
    _, theirs = lars_pair({"momentum": 0.9})
    for optimizer in (silent, theirs):
        optimizer.param_groups[1]["momentum"] = 0.9
    for step in range(3):
        give_gradients([silent, theirs], step)
        silent.step()
        theirs.step()
        assert_same(silent, theirs, 1e-12)
        for p, q in zip(params_of(silent), params_of(theirs), strict=True):
            assert p.grad is None or torch.equal(p.grad, q.grad)


# Loss scaling.


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(dtype)


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    return (model(torch.randn(6, 3, generator=generator).to(model[0].weight.dtype)) ** 2).mean()


def sgd_of(model, sgd=optim.SGD, under_lars=False, **options):
    """Two groups of different decay."""
    base = sgd(
        [
            {"params": list(model[0].parameters()), "weight_decay": 0.1},
            {"params": list(model[2].parameters()), "weight_decay": 0.03, "lr": 0.2},
        ],
        **{"lr": 0.5, "momentum": 0.9, **options},
    )
    return LARS(base, eps=EPS, trust_coef=TRUST_COEF) if under_lars else base


@unders
def test_a_scaler_skips_the_step_of_an_overflow_and_leaves_no_trace(under_lars, backend):
    model, same = network(), network()
    optimizer, plain = sgd_of(model, under_lars=under_lars), sgd_of(same, under_lars=under_lars)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(6):
        overflows = step in (0, 3)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if overflows:
            model[2].bias.grad[0] = math.inf
        before = [param.detach().clone() for param in model.parameters()], copy.deepcopy(optimizer.state_dict())
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert scaler.get_scale() < scale
            assert all(map(torch.equal, before[0], model.parameters()))
            after = optimizer.state_dict()
            if step == 0:  # momentum begins with zeros
                assert all(state["momentum_buffer"].count_nonzero() == 0 for state in after["state"].values())
                before[1]["state"] = after["state"]
            torch.testing.assert_close(after.pop("state"), before[1].pop("state"), rtol=0, atol=0)
            assert after == before[1]
        else:
            plain.zero_grad()
            loss_of(same, step).backward()
            plain.step()
            assert_same(optimizer, plain)  # a power of two leaves no trace


@unders
def test_distributed_checkpoints_keep_momentum_in_float32(under_lars, backend):
    def build():
        model = network(torch.bfloat16)
        return model, sgd_of(model, under_lars=under_lars, momentum_dtype=torch.float32)

    (model, optimizer), (other, fresh) = build(), build()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for flat in (False, True):
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
        state_dict = dcp.get_optimizer_state_dict(model, optimizer, options=options)
        dcp.set_optimizer_state_dict(other, fresh, copy.deepcopy(state_dict), options=options)
        for p, q in zip(params_of(optimizer), params_of(fresh), strict=True):
            assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
            assert torch.equal(optimizer.state[p]["momentum_buffer"], fresh.state[q]["momentum_buffer"])


# What a base gets from LARS.


class Asks(torch.optim.SGD):
    """Asks for trust ratios, and does nothing with them."""

    takes_trust_ratios = True

    def step(self, closure=None, *, trust_ratios=None):
        self.got = self.ask(trust_ratios)


def asks(params, ask):
    optimizer = Asks([{"params": params}], lr=0.5, weight_decay=0.1)
    optimizer.ask = ask
    return LARS(optimizer)


def test_what_a_base_measured_in_a_step_is_what_lars_shows(backend):
    params = [with_gradient(parameter(n)) for n in (3, 4, 5)]
    optimizer = asks(params, lambda trust_ratios: trust_ratios.measure(0, params[1:]))
    optimizer.step()
    shown = optimizer.trust_ratios()
    assert list(shown) == params[1:]
    for param, ratio in zip(params[1:], optimizer.optim.got, strict=True):
        expected = 0.001 * param.norm() / (param.grad.norm() + 0.1 * param.norm() + 1e-8)
        torch.testing.assert_close(ratio, expected.detach())
        assert shown[param] == ratio
    optimizer.optim.ask = lambda trust_ratios: None
    optimizer.step()
    assert optimizer.trust_ratios() == {}


def test_no_parameters_have_no_trust_ratios(backend):
    optimizer = asks([parameter(3)], lambda trust_ratios: trust_ratios.measure(0, []))
    optimizer.step()
    assert optimizer.optim.got.shape == (0,)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("stranger", r"params must be of the group \(group: 0, got one of shape \(9,\)\)"),
        ("without gradient", r"params must have gradients \(group: 0, parameter: 1\)"),
        ("mixed", r"of one device and dtype \(group: 0, parameter: 2, torch.float64 on cpu, but torch.float32 on cpu"),
    ],
)
def test_a_base_that_asks_for_what_cannot_be_measured_is_told_so(which, message, backend):
    first, bare, double = with_gradient(parameter(3)), parameter(4), with_gradient(parameter(5, dtype=torch.float64))
    asked = {"stranger": with_gradient(parameter(9)), "without gradient": bare, "mixed": double}[which]
    optimizer = asks([first, bare, double], lambda trust_ratios: trust_ratios.measure(0, [first, asked]))
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize("numel", [2, 9])
def test_a_compiled_step_is_one_graph_however_many_layers_there_are(numel, extension):
    optimizer = optim.SGD(
        [with_gradient(parameter(n)) for n in range(1, numel)], lr=0.5, momentum=0.9, weight_decay=0.1
    )
    optimizer.step()  # which allocates momentum
    explanation = torch._dynamo.explain(optimizer.step)()
    assert explanation.graph_break_count == 0
    torch._dynamo.reset()


# Bad input.

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
        r"momentum_dtype of parameter group 1 must be None or torch.float32 \(got: torch.float16\)",
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
    raises_and_changes_nothing(optimizer, RuntimeError, r"momentum must be a tensor \(momentum_buffer: 3.0\)")


@unders
def test_momentum_of_another_shape_is_refused_and_nothing_changes(under_lars, backend):
    optimizer = optim.SGD(small_groups(), lr=0.5, momentum=0.9, weight_decay=0.1)
    optimizer = LARS(optimizer) if under_lars else optimizer
    optimizer.step()
    optimizer.state[optimizer.param_groups[1]["params"][0]]["momentum_buffer"] = torch.zeros(7)
    message = r"momentum must have its parameter's shape \(momentum_buffer: \(7,\)\) \(group: 1, parameter: 0"
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


def test_momentum_of_a_parameter_with_gaps_stays_in_its_memory(backend):
    param = torch.nn.Parameter(sliced(torch.randn(6, 5)))
    param.grad = torch.randn(6, 5)
    optimizer = optim.SGD([param], lr=0.5, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    pointer = optimizer.state[param]["momentum_buffer"].data_ptr()
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].data_ptr() == pointer


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


# A tensor as lr, closures, schedulers, hooks.


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@few
@both
def test_lr_may_be_a_tensor_which_is_read_at_each_step(pair_of, options, shape, lr_dtype, backend):
    ours, other = pair_of(options)[0], pair_of(options)[0]
    tensors = []
    for group, its_other in zip(ours.param_groups, other.param_groups, strict=True):
        group["lr"] = torch.full(shape, group["lr"], dtype=lr_dtype)
        its_other["lr"] = group["lr"].item()
        tensors.append(group["lr"])
    for step in range(3):
        give_gradients([ours, other], step)
        ours.step()
        other.step()
        assert_same(ours, other, 1e-15)
        for group, its_other, tensor in zip(ours.param_groups, other.param_groups, tensors, strict=True):
            assert group["lr"] is tensor
            tensor.mul_(0.7)
            its_other["lr"] = tensor.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both
def test_lr_in_a_tensor_gives_the_bits_of_lr_as_a_number(pair_of, dtype, backend):
    ours, other = (pair_of({"momentum": 0.9}, dtype=dtype)[0] for _ in range(2))
    for group in ours.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    run([ours, other], range(3))
    assert_same(ours, other)
    assert isinstance(optim.SGD(layers(0), lr=torch.tensor(0.5)).param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@unders
def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned(under_lars, grad_mode, backend):
    model, same = network(torch.float64), network(torch.float64)
    optimizer, theirs = (sgd_of(m, sgd, under_lars) for m, sgd in ((model, optim.SGD), (same, torch.optim.SGD)))
    for step in range(3):
        calls = []

        def closure(step=step, calls=calls):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        with grad_mode():
            loss = optimizer.step(closure)
            assert torch.is_grad_enabled() == (grad_mode is torch.enable_grad)
        theirs.zero_grad()
        expected = loss_of(same, step)
        expected.backward()
        theirs.step()
        assert calls == [True]
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        assert_same(optimizer, theirs, 1e-12)
    assert all(param.requires_grad and param.is_leaf for param in model.parameters())


SCHEDULERS = {
    "OneCycleLR": lambda one: torch.optim.lr_scheduler.OneCycleLR(one, max_lr=[1.0, 0.3], total_steps=8),
    "LambdaLR": lambda one: torch.optim.lr_scheduler.LambdaLR(one, [lambda n: 0.9**n, lambda n: 1 / (1 + n)]),
    "CyclicLR": lambda one: torch.optim.lr_scheduler.CyclicLR(one, 0.1, 1.0, step_size_up=3, base_momentum=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@unders
def test_schedulers_drive_it_as_they_drive_torchs(under_lars, name, backend):
    models = network(torch.float64), network(torch.float64)
    optimizers = [sgd_of(m, sgd, under_lars) for m, sgd in zip(models, (optim.SGD, torch.optim.SGD), strict=True)]
    schedulers = [SCHEDULERS[name](one) for one in optimizers]
    seen = set()
    for step in range(6):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            scheduler.step()
        assert_same(*optimizers, 1e-12)
        for one, other in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
            assert (one["lr"], one["momentum"]) == (other["lr"], other["momentum"])
        seen.add((one["lr"], one["momentum"]))
    assert len(seen) > 3
    assert name == "LambdaLR" or len({momentum for _, momentum in seen}) > 3


def test_hooks_fire_once_on_the_object_they_were_given_to(backend):
    model, fired = network(), []
    optimizer = sgd_of(model, under_lars=True)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: fired.append("pre")),
        optimizer.register_step_post_hook(lambda *_: fired.append("post")),
        optimizer.optim.register_step_pre_hook(lambda *_: fired.append("base pre")),
        optimizer.optim.register_step_post_hook(lambda *_: fired.append("base post")),
    ]
    loss_of(model, 0).backward()
    optimizer.step()
    assert fired == ["pre", "base pre", "base post", "post"]
    optimizer.optim.step()
    assert fired[4:] == ["base pre", "base post"]
    assert len(handles) == 4


# Compiled.


@pytest.fixture
def compiled():
    """Compile a function, without machine code, and note the names of what was called."""
    names = set()

    def note(module, inputs):
        names.update(str(node.target) for node in module.graph.nodes if node.op.startswith("call"))
        return module.forward

    torch._dynamo.reset()
    yield lambda function: (torch.compile(function, backend=note), names)
    torch._dynamo.reset()


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning",  # torch's own, while it compiles
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
@pytest.mark.parametrize(
    ("backend", "under_lars"), [("extension", False), ("extension", True), ("reference", True)], indirect=["backend"]
)
def test_a_compiled_step_gives_the_numbers_of_an_eager_one(under_lars, compiled, backend):
    def build():
        one, other = parameter(3, 4, scale=2.0), parameter(5)
        base = optim.SGD(
            [{"params": [one], "weight_decay": 0.1}, {"params": [other], "weight_decay": 0.03}], lr=0.5, momentum=0.9
        )
        return LARS(base, eps=EPS, trust_coef=TRUST_COEF) if under_lars else base

    optimizer, expected = build(), build()
    step, names = compiled(optimizer.step)
    for number in range(3):
        give_gradients([optimizer, expected], number + 3)
        step()
        expected.step()
        assert_same(optimizer, expected)
        if under_lars:
            assert_same_ratios(optimizer, expected)
        for one in (optimizer, expected):
            one.param_groups[0]["lr"] *= 0.5
            one.param_groups[1]["weight_decay"] *= 1.5
    assert backend == "reference" or "torchlars.sgd_" in names
    assert not under_lars or backend == "reference" or {"torchlars.squared_norms", "torchlars.trust_ratios"} <= names


# The ops, against the reference.

STEPS = [
    # momentum, nesterov, ratios, lr_scale, maximize
    (None, False, False, False, False),
    (None, False, True, True, True),
    ("own", False, False, True, True),
    ("own", False, True, False, False),
    ("own", True, False, False, True),
    ("own", True, True, True, False),
    ("float32", False, True, True, True),
    ("float32", True, False, False, False),
]
OPS = ["sgd_", "lars_sgd_"]


def steps_of(case, dtype, device="cpu"):
    """Every kind of step that the dtype has; of the longest cases one, and on a GPU some."""
    kinds = [step for step in STEPS if step[0] != "float32" or dtype.itemsize == 2]
    if case.name == "many":
        return kinds[3:4]
    if case.name in ("large_norms", "chunk_borders"):
        return kinds[::3]
    return kinds if torch.device(device).type == "cpu" else kinds[1::3]


def copied(tensor):
    """The same, in memory of its own, with what lies around it."""
    storage = tensor.untyped_storage().clone()
    copy = tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return copy.conj() if tensor.is_conj() else copy


def arguments_of(case, dtype, kind, grad_dtype=None):
    """Arguments for both ops by name; each layer has numbers of its own."""
    momentum, nesterov, has_ratios, has_lr_scale, maximize = kind
    grads, params, weight_decays, trust_coefs, eps, case_maximizes = case.make(dtype, grad_dtype=grad_dtype)
    if case.name == "conjugated":  # torch's dispatcher lets no op write lists of lazily conjugated tensors
        grads, params = params, [param.resolve_conj() for param in grads]
    n, generator = len(params), torch.Generator().manual_seed(len(params))
    ratio_dtype = ops.compute_dtype(grads[0].dtype, dtype)
    buffers = []
    if momentum is not None:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        kept = torch.float32 if momentum == "float32" else dtype
        for i, param in enumerate(params):
            value = 0.2 * (1 + i % 3) * torch.randn(param.shape, generator=generator, dtype=wide)
            buffers.append(torch.empty_like(param.resolve_conj(), dtype=kept).copy_(value))
    return {
        "params": params,
        "grads": grads,
        "momentum_buffers": buffers,
        "ratios": torch.rand(n, generator=generator, dtype=ratio_dtype) + 0.1 if has_ratios else None,
        "weight_decays": weight_decays,
        "trust_coefs": trust_coefs,
        "eps": eps,
        "lrs": [0.1 * (1 + i % 4) for i in range(n)],
        "momentums": [0.5 + 0.1 * (i % 5) if buffers else 0.0 for i in range(n)],
        "dampenings": [[0.0, 0.3, -0.2][i % 3] for i in range(n)],
        "nesterov": nesterov,
        "maximize": maximize != case_maximizes,
        "lr_scale": torch.tensor(0.37, dtype=torch.float64) if has_lr_scale else None,
    }


def moved(arguments, device):
    """The same arguments on a device."""

    def there(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return on(device, value) if isinstance(value, list) and value and isinstance(value[0], torch.Tensor) else value

    return {name: there(value) for name, value in arguments.items()}


def call(op, arguments, module=ops, **different):
    """Call an op with copies of what it writes. Return those, and the ratios if there are any."""
    copies = {name: [copied(x) for x in arguments[name]] for name in ("params", "grads", "momentum_buffers")}
    taken = {**arguments, **copies, **different}
    foreign = {"sgd_": {"trust_coefs", "eps"}, "lars_sgd_": {"ratios"}}[op]
    ratios = getattr(module, op)(**{name: value for name, value in taken.items() if name not in foreign})
    assert_all_equal(taken["grads"], arguments["grads"], "gradients are only read, layer")
    return taken["params"], taken["momentum_buffers"], ratios


def assert_same_results(actual, expected, ulps=0):
    for name, ones, others in zip(("parameter", "momentum"), actual, expected, strict=False):
        if ones or others:
            assert_all_within_ulps(ones, others, ulps, f"{name} of layer")


def named(values):
    return pytest.mark.parametrize("case", values, ids=lambda case: case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_sgd_gives_the_bits_of_the_reference(extension, device, case, dtype):
    for kind in steps_of(case, dtype, device):
        arguments = arguments_of(case, dtype, kind)
        assert_same_results(call("sgd_", moved(arguments, device)), call("sgd_", arguments, reference))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_lars_sgd_equals_the_reference_and_has_the_bits_of_measure_decide_and_update(extension, device, case, dtype):
    is_wide = dtype in (torch.float64, torch.complex128)
    for kind in steps_of(case, dtype, device)[::2]:
        on_cpu = arguments_of(case, dtype, kind)
        arguments = moved(on_cpu, device)
        actual = call("lars_sgd_", arguments)
        norms = ops.squared_norms(arguments["params"]), ops.squared_norms(arguments["grads"])
        ratio_dtype = torch.float64 if is_wide else torch.float32
        hyper = arguments["weight_decays"], arguments["trust_coefs"], arguments["eps"]
        ratios = ops.trust_ratios(*norms, *hyper, ratio_dtype)
        assert torch.equal(actual[2], ratios)
        assert_same_results(actual, call("sgd_", arguments, ratios=ratios))
        # Sums are the only thing in which the two may differ: so the rest is compared with the same ratios.
        expected = reference.trust_ratios(
            *map(reference.squared_norms, (on_cpu["params"], on_cpu["grads"])), *hyper, ratio_dtype
        )
        assert_within_ulps(ratios, expected, 4 if is_wide else 1, "ratios")
        assert_same_results(actual, call("sgd_", on_cpu, reference, ratios=ratios.cpu()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_dialects_of_lars_sgd_have_the_bits_of_measure_decide_and_update(extension, case, dtype):
    kind = STEPS[5] if dtype.itemsize > 2 else STEPS[6]
    dialects = [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
    is_long = case.name in ("many", "large_norms", "chunk_borders")
    for decayed_norm, clip, lr_in_momentum in dialects[3 if is_long else 0 :]:
        arguments = arguments_of(case, dtype, kind)
        dialect = {"decayed_norm": decayed_norm, "clip": clip, "lr_in_momentum": lr_in_momentum}
        actual = call("lars_sgd_", arguments, **dialect)
        grads, params = arguments["grads"], arguments["params"]
        lrs, lr_scale = arguments["lrs"], arguments["lr_scale"]
        decays = arguments["weight_decays"]
        if decayed_norm:
            scales = [-decay if arguments["maximize"] else decay for decay in decays]
            norms, decays = ops.squared_norms_of_sums(grads, params, scales), [0.0] * len(decays)
        else:
            norms = ops.squared_norms(grads)
        hyper = decays, arguments["trust_coefs"], arguments["eps"]
        dtype_of_ratios = ops.compute_dtype(grads[0].dtype, dtype)
        ratios = ops.trust_ratios(ops.squared_norms(params), norms, *hyper, dtype_of_ratios, lrs, lr_scale, clip)
        assert torch.equal(actual[2], ratios)
        inside = {"ratios": ratios}
        if lr_in_momentum:
            scaled = torch.tensor(lrs, dtype=torch.float64) * (1.0 if lr_scale is None else lr_scale)
            inside = {"ratios": (ratios.double() * scaled).to(ratios.dtype), "lrs": [1.0] * len(lrs), "lr_scale": None}
        assert_same_results(actual, call("sgd_", arguments, **inside))
        assert_same_results(actual, call("sgd_", arguments, reference, **inside))


def with_unscaled_gradients(arguments, inv_scale):
    """The same arguments, with gradients unscaled beforehand; what has 16 bits becomes float32, the arithmetic's type."""
    grads = [x.to(torch.promote_types(x.dtype, torch.float32)) * inv_scale for x in arguments["grads"]]
    return {**arguments, "grads": grads}


inverses = pytest.mark.parametrize("inverse", [0.25, 1 / 3], ids=["quarter", "third"])


@inverses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_sgd_of_scaled_gradients_gives_the_bits_of_the_reference_and_of_unscaled_ones(extension, case, dtype, inverse):
    inv_scale = torch.tensor(inverse)
    for kind in steps_of(case, dtype):
        arguments = arguments_of(case, dtype, kind)
        actual = call("sgd_", arguments, inv_scale=inv_scale)
        assert_same_results(actual, call("sgd_", arguments, reference, inv_scale=inv_scale))
        assert_same_results(actual, call("sgd_", with_unscaled_gradients(arguments, inv_scale)))


@inverses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_lars_sgd_of_scaled_gradients_has_the_bits_of_measure_decide_and_update(extension, case, dtype, inverse):
    is_wide, inv_scale = dtype in (torch.float64, torch.complex128), torch.tensor(inverse)
    for i, kind in enumerate(steps_of(case, dtype)[::2]):
        arguments = arguments_of(case, dtype, kind)
        grads, params, decays = arguments["grads"], arguments["params"], arguments["weight_decays"]
        decayed_norm, clip = i % 2 == 0, i % 3 == 0
        actual = call("lars_sgd_", arguments, decayed_norm=decayed_norm, clip=clip, inv_scale=inv_scale)
        for module in (ops, reference):
            norms, hyper = module.squared_norms(grads, inv_scale), (decays, arguments["trust_coefs"], arguments["eps"])
            if decayed_norm:
                scales = [-decay if arguments["maximize"] else decay for decay in decays]
                norms = module.squared_norms_of_sums(grads, params, scales, inv_scale)
                hyper = [0.0] * len(decays), *hyper[1:]
            lrs = arguments["lrs"], arguments["lr_scale"]
            ratios = module.trust_ratios(module.squared_norms(params), norms, *hyper, actual[2].dtype, *lrs, clip)
            assert_within_ulps(actual[2], ratios, 0 if module is ops else 4 if is_wide else 1, "ratios")
            assert_same_results(actual, call("sgd_", arguments, module, ratios=actual[2], inv_scale=inv_scale))
        beforehand = with_unscaled_gradients(arguments, inv_scale)
        if inverse == 0.25:  # which changes no bit of any mantissa
            assert_same_results(actual, call("lars_sgd_", beforehand, decayed_norm=decayed_norm, clip=clip))
        assert_same_results(actual, call("sgd_", beforehand, ratios=actual[2]))


def memory(tensors):
    """What memory holds, to the bit, of tensors and around them."""
    return [torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone() for tensor in tensors]


def overflown(grads, values=(math.inf, math.nan, -math.inf)):
    """Gradients of which every layer's first element is infinite or NaN."""
    for i, grad in enumerate(grads):
        if grad.numel() > 0:
            grad[(0,) * grad.dim()] = values[i % len(values)]
    return grads


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_a_skipped_step_writes_neither_parameters_nor_momentum(backend, case, dtype, op):
    for i, kind in enumerate(steps_of(case, dtype)):
        arguments = arguments_of(case, dtype, kind)
        arguments["grads"] = overflown([copied(grad) for grad in arguments["grads"]])
        tensors = [*arguments["params"], *arguments["momentum_buffers"], *arguments["grads"]]
        before, skip, dialect = memory(tensors), torch.zeros(()), {}
        if op == "lars_sgd_":
            dialect = {"decayed_norm": i % 2 == 1, "clip": i % 3 == 0, "lr_in_momentum": i % 3 == 1}
            arguments["lrs"] = [2.0 * (1 + i % 4) for i in range(len(arguments["lrs"]))]
        foreign = {"sgd_": {"trust_coefs", "eps"}, "lars_sgd_": {"ratios"}}[op]
        taken = {name: value for name, value in arguments.items() if name not in foreign}
        ratios = getattr(ops, op)(**taken, **dialect, inv_scale=skip)
        assert all(torch.equal(a, b) for a, b in zip(memory(tensors), before, strict=True))
        if op == "lars_sgd_":
            lr_scale = 1.0 if kind[3] is False else 0.37
            expected = [min(1 / (lr * lr_scale), 1.0) if dialect["clip"] else 1.0 for lr in arguments["lrs"]]
            assert_within_ulps(ratios, torch.tensor(expected, dtype=ratios.dtype), 1, "ratios")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_scaled_gradients_may_have_another_dtype_than_parameters(extension, dtype, grad_dtype, op):
    case = Case("mixed_dtypes", "", [*sizes(5, 70, 17000), Layer((3, 4), weight_decay=0.0), Layer((0,))])
    for kind, inverse in itertools.product(steps_of(case, dtype), (0.3, 0.0)):
        arguments, inv_scale = arguments_of(case, dtype, kind, grad_dtype), torch.tensor(inverse)
        actual = call(op, arguments, inv_scale=inv_scale)
        ratios = arguments["ratios"] if op == "sgd_" else actual[2]
        assert_same_results(actual, call("sgd_", arguments, reference, ratios=ratios, inv_scale=inv_scale))
        if inverse == 0.0:
            assert_same_results(actual, (arguments["params"], arguments["momentum_buffers"]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_gradients_may_have_another_dtype_than_parameters(extension, device, dtype, grad_dtype, op):
    case = Case("mixed_dtypes", "", [*sizes(5, 70, 17000), Layer((3, 4), weight_decay=0.0), Layer((0,))])
    for kind in steps_of(case, dtype, device):
        arguments = arguments_of(case, dtype, kind, grad_dtype)
        actual = call(op, moved(arguments, device))
        ratios = arguments["ratios"] if op == "sgd_" else actual[2].cpu()
        assert_same_results(actual, call("sgd_", arguments, reference, ratios=ratios))


@named(CASES)
@pytest.mark.parametrize("op", OPS)
def test_memory_around_views_is_not_touched_and_versions_are_bumped(backend, op, case):
    arguments = arguments_of(case, torch.float32, STEPS[3])
    for name in ("params", "momentum_buffers", "grads"):
        arguments[name] = [copied(x) for x in arguments[name]]
    written = [*arguments["params"], *arguments["momentum_buffers"]]
    before = [(tensor._version, tensor.data_ptr(), tensor.untyped_storage().clone()) for tensor in written]
    grads = [(grad._version, grad.untyped_storage().clone()) for grad in arguments["grads"]]
    foreign = {"sgd_": {"trust_coefs", "eps"}, "lars_sgd_": {"ratios"}}[op]
    getattr(ops, op)(**{name: value for name, value in arguments.items() if name not in foreign})
    for tensor, (version, pointer, storage) in zip(written, before, strict=True):
        assert tensor._version > version
        assert tensor.data_ptr() == pointer
        after = tensor.new_empty(0).set_(tensor.untyped_storage())
        untouched = torch.ones(len(after), dtype=torch.bool)
        untouched.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
        assert torch.equal(after[untouched], tensor.new_empty(0).set_(storage)[untouched])
    for grad, (version, storage) in zip(arguments["grads"], grads, strict=True):
        assert grad._version == version
        assert torch.equal(grad.new_empty(0).set_(grad.untyped_storage()), grad.new_empty(0).set_(storage))


@pytest.mark.parametrize("op", OPS)
def test_momentum_buffers_of_any_layout_are_written_in_place(extension, device, op):
    case = Case(
        "buffers", "", [Layer((6, 5)), Layer((6, 5), param_layout=transposed), Layer((6, 5), grad_layout=sliced)]
    )
    for dtype, orders in itertools.product(DTYPES, itertools.permutations([sliced, transposed, lambda x: x])):
        arguments = arguments_of(case, dtype, STEPS[5])
        arguments["momentum_buffers"] = [
            order(x) for order, x in zip(orders, arguments["momentum_buffers"], strict=True)
        ]
        actual = call(op, moved(arguments, device))
        ratios = arguments["ratios"] if op == "sgd_" else actual[2].cpu()
        assert_same_results(actual, call("sgd_", arguments, reference, ratios=ratios))


@pytest.mark.parametrize("op", OPS)
def test_layers_that_require_gradients_stay_leaves(backend, op):
    case = Case("leaves", "", [Layer((3,)), Layer((4,))])
    arguments = arguments_of(case, torch.float32, STEPS[3])
    params = [param.requires_grad_() for param in arguments["params"]]
    getattr(ops, op)(
        **{k: v for k, v in arguments.items() if k not in (("trust_coefs", "eps") if op == "sgd_" else ("ratios",))}
    )
    assert all(param.is_leaf and param.requires_grad and param.grad_fn is None for param in params)


x, y = torch.ones(3), torch.ones(4)
bad_lr_scale = r"lr_scale to be one float64 on cpu \(got: shape "
bad_inv_scale = r"inv_scale to be one float32 on cpu \(got: shape "
BAD_CALLS = {
    "no params": ({"params": [], "grads": []}, r"at least one tensor \(got: grads is empty\)"),
    "more params": ({"params": [x, x, x]}, r"one length \(grads: 2, params: 3\)"),
    "integers": ({"params": [x.long(), y.long()]}, r"expected float64, float32, .* \(params\[0\]: "),
    "a sparse gradient": ({"grads": [x.to_sparse(), y]}, r"strided tensors \(grads\[0\]: .*[Ss]parse"),
    "mixed dtypes": ({"params": [x, y.double()]}, r"one dtype \(params\[0\]: .*, params\[1\]: "),
    "mixed devices": ({"grads": [x, y.to("meta")]}, r"one device \(grads\[0\]: cpu, grads\[1\]: meta\)"),
    "kinds": ({"grads": [x * 1j, y * 1j]}, r"both real or both complex \(grads\[0\]: "),
    "shapes": ({"grads": [y, x]}, r"one shape \(grads\[0\]: \[4\], params\[0\]: \[3\]\)"),
    "shapes without decay": (
        {"grads": [x, x], "weight_decays": [0.0, 0.0]},
        r"one shape \(grads\[1\]: \[3\], params\[1\]: \[4\]\)",
    ),
    "an expanded parameter": (
        {"params": [torch.ones(1).expand(3), y]},
        r"params that can be written in place \(params\[0\]: shape \[3\], strides \[0\] overlap in memory\); clone it first",
    ),
    "an overlapping buffer": (
        {"momentum_buffers": [x, torch.ones(1).expand(4)]},
        r"momentum_buffers that can be written in place \(momentum_buffers\[1\]: shape \[4\], strides \[0\] overlap",
    ),
    "more decays": ({"weight_decays": [0.1] * 3}, r"one length \(grads: 2, weight_decays: 3\)"),
    "decay < 0": ({"weight_decays": [0.1, -0.1]}, r"non-negative numbers \(weight_decays\[1\]: -0.1\)"),
    "fewer lrs": ({"lrs": [0.1]}, r"one length \(grads: 2, lrs: 1\)"),
    "lr < 0": ({"lrs": [0.1, -2.0]}, r"non-negative numbers \(lrs\[1\]: -2"),
    "lr NaN": ({"lrs": [math.nan, 0.1]}, r"non-negative numbers \(lrs\[0\]: nan\)"),
    "fewer momentums": ({"momentums": [0.9]}, r"one length \(grads: 2, momentums: 1\)"),
    "momentum infinite": ({"momentums": [0.9, math.inf]}, r"non-negative numbers \(momentums\[1\]: inf\)"),
    "more dampenings": ({"dampenings": [0.0] * 3}, r"one length \(grads: 2, dampenings: 3\)"),
    "dampening NaN": ({"dampenings": [0.0, math.nan]}, r"finite numbers \(dampenings\[1\]: nan\)"),
    "fewer buffers": ({"momentum_buffers": [x]}, r"one length \(grads: 2, momentum_buffers: 1\)"),
    "mixed buffers": (
        {"momentum_buffers": [x, y.double()]},
        r"one dtype \(momentum_buffers\[0\]: .*, momentum_buffers\[1\]: ",
    ),
    "buffers of another device": (
        {"momentum_buffers": [x.to("meta"), y.to("meta")]},
        r"one device \(params\[0\]: cpu, momentum_buffers\[0\]: meta\)",
    ),
    "buffers of another dtype": (
        {"momentum_buffers": [x.double(), y.double()]},
        r"momentum_buffers of the dtype of params, or of float32 for 16-bit ones \(params\[0\]: .*, momentum_buffers\[0\]: ",
    ),
    "buffers of 16 bits": (
        {"momentum_buffers": [x.bfloat16(), y.bfloat16()]},
        r"momentum_buffers of the dtype of params, or of float32 for 16-bit ones",
    ),
    "buffers of other shapes": (
        {"momentum_buffers": [x, x]},
        r"one shape \(params\[1\]: \[4\], momentum_buffers\[1\]: \[3\]\)",
    ),
    "no buffers": ({"momentum_buffers": []}, r"momentum_buffers where there is momentum \(momentums\[0\]: 0.9\)"),
    "nesterov without buffers": (
        {"momentum_buffers": [], "momentums": [0.0, 0.0], "nesterov": True},
        r"momentum_buffers where nesterov is True",
    ),
    "lr_scale in float32": ({"lr_scale": torch.tensor(0.5)}, bad_lr_scale + r"\[\], .*[Ff]loat"),
    "lr_scale of two": ({"lr_scale": torch.ones(2, dtype=torch.float64)}, bad_lr_scale + r"\[2\]"),
    "lr_scale elsewhere": (
        {"lr_scale": torch.ones((), dtype=torch.float64, device="meta")},
        bad_lr_scale + r"\[\], .*meta",
    ),
    "inv_scale in float64": (
        {"inv_scale": torch.tensor(0.5, dtype=torch.float64)},
        bad_inv_scale + r"\[\], .*([Dd]ouble|float64)",
    ),
    "inv_scale of two": ({"inv_scale": torch.ones(2)}, bad_inv_scale + r"\[2\]"),
    "inv_scale elsewhere": ({"inv_scale": torch.ones(1, device="meta")}, bad_inv_scale + r"\[1\], .*meta"),
}
BAD_CALLS_OF_ONE = {
    "sgd_": {
        "more ratios": ({"ratios": torch.ones(3)}, r"one length \(grads: 2, ratios: 3\)"),
        "ratios in float64": (
            {"ratios": torch.ones(2, dtype=torch.float64)},
            r"ratios to be a contiguous vector of .*[Ff]loat",
        ),
        "a matrix of ratios": (
            {"ratios": torch.ones(2, 1)},
            r"ratios to be a contiguous vector of .* \(got: shape \[2, 1\]",
        ),
        "ratios elsewhere": ({"ratios": torch.ones(2, device="meta")}, r"one device \(grads\[0\]: cpu, ratios: meta\)"),
    },
    "lars_sgd_": {
        "fewer coefs": ({"trust_coefs": [0.1]}, r"one length \(grads: 2, trust_coefs: 1\)"),
        "coef 0": ({"trust_coefs": [0.1, 0.0]}, r"positive numbers \(trust_coefs\[1\]: 0"),
        "more eps": ({"eps": [0.1] * 3}, r"one length \(grads: 2, eps: 3\)"),
        "eps NaN": ({"eps": [math.nan, 0.0]}, r"non-negative numbers \(eps\[0\]: nan\)"),
    },
}


@pytest.mark.parametrize(
    ("op", "bad"), [(op, bad) for op in OPS for bad in [*BAD_CALLS, *BAD_CALLS_OF_ONE[op]]], ids=str
)
def test_bad_calls_are_refused_and_change_nothing(backend, op, bad):
    different, message = {**BAD_CALLS, **BAD_CALLS_OF_ONE[op]}[bad]
    arguments = arguments_of(Case("bad", "", [Layer((3,)), Layer((4,))]), torch.float32, STEPS[3])
    arguments = {**arguments, "momentums": [0.9, 0.5], **different}
    if op == "sgd_":
        del arguments["trust_coefs"], arguments["eps"]
    else:
        del arguments["ratios"]
    tensors = [*arguments["params"], *arguments["grads"], *arguments["momentum_buffers"]]
    before = [(tensor._version, tensor.clone()) for tensor in tensors]
    with pytest.raises(RuntimeError, match=message) as raised:
        getattr(ops, op)(**arguments)
    assert str(raised.value).startswith(f"{op}: expected "), "the message opens with the op's name"
    for tensor, (version, value) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert tensor.device.type == "meta" or torch.equal(tensor.to_dense(), value.to_dense())


@unders
@pytest.mark.parametrize("options", [{"full_state_dict": True}, {"cpu_offload": True}, {}], ids=str)
def test_a_distributed_checkpoint_gathered_to_one_rank_keeps_momentum_in_float32(under_lars, options, backend):
    """It takes plain types and tensors only, and a dtype is neither."""

    def build():
        model = network(torch.bfloat16)
        return model, sgd_of(model, under_lars=under_lars, momentum_dtype=torch.float32)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    options = dcp.StateDictOptions(**options)
    (model, optimizer), (other, resumed) = build(), build()
    train(model, optimizer, range(2))
    state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    assert {group["momentum_dtype"] for group in state["param_groups"]} == {"float32"}
    other.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other, resumed, copy.deepcopy(state), options=options)
    assert all(group["momentum_dtype"] is torch.float32 for group in resumed.param_groups)
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(param, twin)
        assert resumed.state[twin]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(optimizer.state[param]["momentum_buffer"], resumed.state[twin]["momentum_buffer"])
