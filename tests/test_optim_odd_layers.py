"""Layers of torchlars.optim.SGD that take the slow path: sparse, complex, overlapping, sharded and others."""

import pytest
import torch
from closeness import assert_within_ulps, close
from optimizers import params_of
from sgd_cases import (
    EPS,
    KEPT,
    ODD,
    TRUST_COEF,
    add_to_lars,
    add_to_sgd,
    assert_same,
    assert_same_ratios,
    parameter,
    raises_and_changes_nothing,
    sparse_gradient,
    step_odd_layers,
    unders,
    widened,
    with_gradient,
)

from torchlars import LARS, ops, optim

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


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

    def also():
        if under_lars:
            assert_same_ratios(ours, theirs, 1e-6)
            assert len(ours.trust_ratios()) == 3

    step_odd_layers(name, ours, theirs, also)


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
    message = r"^parameters must be of .* at least 16 bits \(dtype: torch.float8_e4m3fn\) \(group: 3, parameter: 1, shape: \(3,\)\)$"
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


@unders
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_dtensors_are_stepped_as_by_torch(process_group, options, under_lars, backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))

    def build(sgd):
        whole, shard = parameter(4, 3), parameter(6, 2, scale=3.0)
        shard = torch.nn.Parameter(distribute_tensor(shard.detach(), mesh, [Shard(0)]))
        shard.grad = distribute_tensor(torch.arange(12.0).reshape(6, 2) / 7, mesh, [Shard(0)])
        base = sgd([with_gradient(whole), shard], lr=0.5, weight_decay=0.1, **options)
        return LARS(base, eps=EPS, trust_coef=TRUST_COEF) if under_lars else base

    ours, theirs = build(optim.SGD), build(torch.optim.SGD)
    if backend == "extension":
        positions = add_to_sgd(ops.fast_layers("SgdLayers"), ours.param_groups[0]["params"])
        assert positions == add_to_lars(ops.fast_layers("LarsLayers"), ours.param_groups[0]["params"]) == [1]
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
