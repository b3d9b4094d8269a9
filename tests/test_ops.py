"""The backends against the reference: cases × dtypes × routes, dialects and scaled gradients.

The reference runs on the CPU, whatever the device: independent of the GPU under test, and without thousands of small
kernels.
"""

import sys
from pathlib import Path

import pytest
import torch
from calls import scale_gradients, scale_updates, sgd
from cases import (
    CASES,
    COMPLEX_DTYPES,
    DTYPES,
    REAL_DTYPES,
    Case,
    Layer,
    copied,
    inverses,
    memory,
    misaligned,
    named,
    on,
    overflown,
    sizes,
    sliced,
)
from closeness import assert_all_equal, assert_all_within_ulps, assert_within_ulps

from torchlars import ops, reference


def three(grads, params, weight_decays, trust_coefs, eps, maximize):
    param_squared_norms, grad_squared_norms = ops.squared_norms(params), ops.squared_norms(grads)
    dtype = ops.compute_dtype(grads[0].dtype, params[0].dtype)
    hyper = {"weight_decays": weight_decays, "trust_coefs": trust_coefs, "eps": eps}
    ratios = ops.trust_ratios(param_squared_norms, grad_squared_norms, **hyper, dtype=dtype)
    ops.scale_gradients_(grads, params, maximize=maximize, weight_decays=weight_decays, ratios=ratios)
    return ratios


def gpu_rtol(tensors):
    """The relative error of a sum of squares on a GPU, where most numbers are squared in float."""
    return {2: 2.0**-23, 4: 1e-13, 8: 1e-14}[min(x.real.dtype.itemsize for x in tensors)]


def assert_squared_norms(actual, expected, tensors, ulps):
    if actual.device.type == "cpu":
        assert_within_ulps(actual, expected, ulps, "squared norms")
    else:
        torch.testing.assert_close(actual.cpu(), expected, rtol=gpu_rtol(tensors), atol=0, equal_nan=True)


def assert_adapted(ratios, grads, expected_ratios, expected_grads, rtol):
    """Ratios and gradients. On a GPU those in float64 are no better than the norms of what is not."""
    is_wide = ratios.dtype == torch.float64
    if is_wide and ratios.is_cuda and rtol > 1e-14:
        torch.testing.assert_close(ratios.cpu(), expected_ratios, rtol=2 * rtol, atol=0)
        for grad, expected in zip(grads, expected_grads, strict=True):
            more = 2 * torch.finfo(grad.dtype).eps
            torch.testing.assert_close(grad.cpu(), expected, rtol=2 * rtol + more, atol=0)
        return
    assert_within_ulps(ratios, expected_ratios, 4 if is_wide else 1)
    ulps = 8 if expected_grads[0].dtype == torch.float64 else 2
    assert_all_within_ulps(grads, expected_grads, ulps, "gradient of layer")


ROUTES = {"fused": scale_gradients, "three": three}


def copies(arguments):
    """The same arguments with gradients that may be written, in the same layouts."""
    grads, *others = arguments
    return ([copied(grad) for grad in grads], *others)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_extension_equals_the_reference(extension, device, case, dtype, route):
    is_wide = dtype in (torch.float64, torch.complex128)
    actual, expected, original = case.make(dtype, device), case.make(dtype), case.make(dtype)
    expected_ratios = scale_gradients(*expected, module=reference)
    ratios = ROUTES[route](*actual)
    assert_within_ulps(ratios, expected_ratios, 4 if is_wide else 1, "ratios")
    assert_all_within_ulps(actual[0], expected[0], 8 if is_wide else 2, "gradient of layer")
    assert_all_equal(actual[1], original[1], "parameters are only read, layer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_fused_gives_the_bits_of_the_three(extension, device, case, dtype):
    arguments = case.make(dtype, device)
    one, other = copies(arguments), copies(arguments)
    assert torch.equal(scale_gradients(*one), three(*other))
    assert_all_equal(one[0], other[0], "gradient of layer")


# The dialects: fused, and op by op.

DIALECTS = [
    # decayed_norm, clip, lr_in_momentum, lr in a tensor
    (True, False, False, False),
    (False, True, False, True),
    (False, False, True, True),
    (True, True, True, False),
]
NAMES = ("decayed_norm", "clip", "lr_in_momentum")


def lrs_of(n, in_tensor, device):
    lr_tensor = torch.tensor(0.5, dtype=torch.float64, device=device) if in_tensor else None
    return {"lrs": [0.002 * (1 + i % 5) for i in range(n)], "lr_tensor": lr_tensor}


def dialects_of(case):
    return DIALECTS[-1:] if case.name in ("many", "large_norms", "chunk_borders") else DIALECTS


def op_by_op(grads, params, weight_decays, trust_coefs, eps, maximize, lrs, dialect, inv_scale=None, halve=1):
    """What scale_gradients does, by three ops; its ratios are multiplied by ``halve`` before they are applied."""
    decays = weight_decays
    if dialect["decayed_norm"]:
        scales = [-weight_decay if maximize else weight_decay for weight_decay in weight_decays]
        grad_norms, decays = (
            ops.squared_norms(grads, others=params, scales=scales, inv_scale=inv_scale),
            [0.0] * len(grads),
        )
    else:
        grad_norms = ops.squared_norms(grads, inv_scale=inv_scale)
    dtype, hyper = ops.compute_dtype(grads[0].dtype, params[0].dtype), {"trust_coefs": trust_coefs, "eps": eps}
    norms = ops.squared_norms(params), grad_norms
    ratios = ops.trust_ratios(*norms, weight_decays=decays, **hyper, dtype=dtype, clip=dialect["clip"], **lrs)
    lrs = {**lrs, "lr_in_momentum": True} if dialect["lr_in_momentum"] else {}
    how = {"maximize": maximize, "weight_decays": weight_decays, "inv_scale": inv_scale}
    ops.scale_gradients_(grads, params, **how, ratios=halve * ratios, **lrs)
    return ratios


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_dialects_equal_the_reference_and_have_the_bits_of_op_by_op(extension, device, case, dtype):
    is_wide = dtype in (torch.float64, torch.complex128)
    arguments, on_cpu = case.make(dtype, device), case.make(dtype)
    for decayed_norm, clip, lr_in_momentum, in_tensor in dialects_of(case):
        lrs, lrs_on_cpu = (lrs_of(len(arguments[0]), in_tensor, where) for where in (device, "cpu"))
        dialect = dict(zip(NAMES, (decayed_norm, clip, lr_in_momentum), strict=True))
        expected, actual, apart = copies(on_cpu), copies(arguments), copies(arguments)
        expected_ratios = scale_gradients(*expected, **lrs_on_cpu, **dialect, module=reference)
        ratios = scale_gradients(*actual, **lrs, **dialect)
        assert_within_ulps(ratios, expected_ratios, 4 if is_wide else 1, "ratios")
        assert_all_equal([ratios], [op_by_op(*apart, lrs, dialect)], "ratios")
        assert_all_equal(actual[0], apart[0], "op by op, gradient of layer")
        assert_all_within_ulps(actual[0], expected[0], 8 if is_wide else 2, "gradient of layer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_scaled_updates_equal_the_reference_and_have_the_bits_of_op_by_op(extension, device, case, dtype):
    """What the table calls gradients are parameters after a step here."""
    is_wide = dtype in (torch.float64, torch.complex128)
    for clip, in_tensor in ((False, True), (True, False)):
        expected, old_on_cpu, _, trust_coefs, eps, _ = case.make(dtype)
        if case.name != "zero_layers":  # else a small step
            for param, old in zip(expected, old_on_cpu, strict=True):
                param.mul_(0.02).add_(old)
        before, actual, apart, old_params = (on(device, x) for x in (expected, expected, expected, old_on_cpu))
        lrs, lrs_on_cpu = (lrs_of(len(expected), in_tensor, where) for where in (device, "cpu"))
        hyper = {"trust_coefs": [100 * coef for coef in trust_coefs], "eps": eps, "clip": clip}
        scaled = copies([expected])[0]
        expected_ratios = scale_updates(scaled, old_on_cpu, **hyper, **lrs_on_cpu, module=reference)
        ratios = scale_updates(actual, old_params, **hyper, **lrs)
        assert_within_ulps(ratios, expected_ratios, 8 if is_wide else 1, "ratios")
        updates = ops.squared_norms(apart, others=old_params, scales=[-1.0] * len(apart))
        hyper |= {"weight_decays": [0.0] * len(apart), "dtype": ratios.dtype, "of_updates": True}
        ratios_apart = ops.trust_ratios(ops.squared_norms(old_params), updates, **hyper, **lrs)
        ops.scale_updates_(apart, old_params, ratios=ratios_apart)
        assert_all_equal([ratios], [ratios_apart], "ratios")
        ratios = ratios.cpu()
        reference.scale_updates_(expected, old_on_cpu, ratios=ratios)
        assert_all_equal(actual, apart, "op by op, layer")
        assert_all_equal(actual, expected, "rounding of layer")
        if bool((ratios == 1).any()):
            kept = [i for i, ratio in enumerate(ratios.tolist()) if ratio == 1]
            assert_all_equal([actual[i] for i in kept], [before[i] for i in kept], "with ratio 1 nothing is written")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_squared_norms_of_sums_equal_the_reference(extension, device, case, dtype):
    tensors, others, *_ = case.make(dtype, device)
    scales = [(-1.0, 0.25, 0.0, -0.1)[i % 4] for i in range(len(tensors))]
    actual = ops.squared_norms(tensors, others=others, scales=scales)
    tensors_on_cpu, others_on_cpu, *_ = case.make(dtype)
    expected = reference.squared_norms(tensors_on_cpu, others=others_on_cpu, scales=scales)
    assert_squared_norms(actual, expected, tensors, 4 + 2 * (max(x.numel() for x in tensors) > 10000))
    zeros = ops.squared_norms(tensors, others=others, scales=[0.0] * len(tensors))
    assert torch.equal(zeros, ops.squared_norms(tensors))


def test_scaled_updates_by_hand(backend):
    # ‖w_old‖ = 5, Δ = (−0.3, 0.4), γ = 0.25 · 2: ‖u‖ = 1 and r = 0.6 · 5 / (1 + 1) = 1.5, clipped 1
    for clip, ratio, after in ((False, 1.5, [2.55, 4.6]), (True, 1.0, [2.7, 4.4])):
        old, new = (torch.tensor(w, dtype=torch.float64) for w in ([3.0, 4.0], [2.7, 4.4]))
        lr_tensor = torch.tensor(2.0, dtype=torch.float64)
        ratios = scale_updates([new], [old], [0.6], [1.0], [0.25], clip=clip, lr_tensor=lr_tensor)
        assert ratios.item() == pytest.approx(ratio, rel=1e-14)
        assert new.tolist() == pytest.approx(after, rel=1e-14)


def test_an_update_of_ratio_1_is_not_touched(backend):
    """In float32 w_old + (w − w_old) is not w."""
    old, new = torch.rand(1000), torch.rand(1000) * 1e-3
    assert not torch.equal(old + (new - old), new)
    before = new.clone()
    ops.scale_updates_([new], [old], ratios=torch.ones(1))
    assert torch.equal(new, before)


def test_a_nan_shows_in_the_whole_layer_of_an_update(backend):
    for which in ("old", "new"):
        old, new = torch.rand(5), torch.rand(5)
        (old if which == "old" else new)[1] = float("nan")
        for clip in (False, True):
            written = new.clone()
            assert scale_updates([written], [old], [1.0], [0.0], [0.1], clip=clip).isnan().all()
            assert written.isnan().all()


@pytest.mark.parametrize("clip", [False, True])
def test_clipped_ratios_by_hand(backend, clip):
    norms = torch.tensor([25.0, 25.0, 0.0, 0.0]).double(), torch.tensor([1.0, 1.0, 1.0, float("nan")]).double()
    hyper = {"weight_decays": [0.0] * 4, "trust_coefs": [0.1] * 4, "eps": [0.0] * 4, "lrs": [1.0, 0.25, 4.0, 1.0]}
    ratios = ops.trust_ratios(*norms, **hyper, dtype=torch.float64, clip=clip)
    expected = [0.5, 1.0, 0.25, float("nan")] if clip else [0.5, 0.5, 1.0, float("nan")]
    assert ratios.tolist() == pytest.approx(expected, nan_ok=True)
    of_updates = ops.trust_ratios(*norms, **hyper, dtype=torch.float64, clip=clip, of_updates=True)
    assert of_updates.tolist() == pytest.approx([0.5, 0.125, 1.0, float("nan")], nan_ok=True)


# Scaled gradients, which are multiplied by inv_scale before anything else; where that is 0 the step is skipped.


def unscaled(tensors, inv_scale):
    """The same, multiplied by inv_scale beforehand; what has 16 bits becomes float32, in which ops compute."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) * inv_scale for x in tensors]


@inverses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_scaled_gradients_are_adapted_as_if_unscaled_beforehand(extension, device, case, dtype, inverse):
    is_wide, inv_scale = dtype in (torch.float64, torch.complex128), torch.tensor(inverse, device=device)
    arguments, on_cpu = case.make(dtype, device), case.make(dtype)
    for decayed_norm, clip, lr_in_momentum, in_tensor in [(False,) * 4, *dialects_of(case)]:
        lrs, lrs_on_cpu = (lrs_of(len(arguments[0]), in_tensor, where) for where in (device, "cpu"))
        dialect = dict(zip(NAMES, (decayed_norm, clip, lr_in_momentum), strict=True))
        expected, actual, apart = copies(on_cpu), copies(arguments), copies(arguments)
        ratios = scale_gradients(*actual, **lrs, **dialect, inv_scale=inv_scale)
        expected_ratios = scale_gradients(
            *expected, **lrs_on_cpu, **dialect, inv_scale=torch.tensor(inverse), module=reference
        )
        assert_within_ulps(ratios, expected_ratios, 4 if is_wide else 1, "ratios")
        assert_all_equal([ratios], [op_by_op(*apart, lrs, dialect, inv_scale)], "ratios")
        beforehand = (unscaled(arguments[0], inv_scale), *arguments[1:])
        ratios_beforehand = scale_gradients(*beforehand, **lrs, **dialect)
        ulps = 8 if is_wide or decayed_norm else 2  # where a sum cancels, what was rounded beforehand counts for more
        ulps = 0 if inverse == 0.25 and dtype.itemsize > 2 else ulps  # powers of two change no bit of a mantissa
        assert_within_ulps(ratios, ratios_beforehand, ulps, "unscaled beforehand, ratios")
        assert_all_equal(actual[0], apart[0], "op by op, gradient of layer")
        assert_all_within_ulps(actual[0], expected[0], 8 if is_wide else 2, "gradient of layer")
        before = [grad.to(dtype) for grad in beforehand[0]]
        assert_all_within_ulps(actual[0], before, ulps, "unscaled beforehand, gradient of layer")


@inverses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_squared_norms_of_scaled_tensors(extension, device, case, dtype, inverse):
    tensors, others, *_ = case.make(dtype, device)
    inv_scale = torch.tensor([inverse], device=device)
    beforehand = [x.to(torch.promote_types(x.dtype, torch.float64)) * inv_scale[0].double() for x in tensors]
    scales = [(-1.0, 0.25, 0.0, -0.1)[i % 4] for i in range(len(tensors))]
    tensors_on_cpu, others_on_cpu, *_ = case.make(dtype)
    for more, more_on_cpu in (
        ({}, {}),
        ({"others": others, "scales": scales}, {"others": others_on_cpu, "scales": scales}),
    ):
        actual = ops.squared_norms(tensors, **more, inv_scale=inv_scale)
        expected = reference.squared_norms(tensors_on_cpu, **more_on_cpu, inv_scale=inv_scale.cpu())
        assert_squared_norms(actual, expected, tensors, 8)
        norms = ops.squared_norms(beforehand, **more)
        if device.type != "cpu" or inverse != 0.25:  # a sum of one element may cancel, and magnify what was rounded
            rtol = 1e-10 if device.type == "cpu" else max(gpu_rtol(tensors), 1e-10)
            torch.testing.assert_close(actual, norms, rtol=rtol, atol=0)
        else:
            assert torch.equal(actual, norms)
    zeros = ops.squared_norms(tensors, others=others, scales=[0.0] * len(tensors), inv_scale=inv_scale)
    assert torch.equal(zeros, ops.squared_norms(tensors, inv_scale=inv_scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_a_skipped_step_writes_nothing(backend, device, case, dtype):
    arguments, skip = case.make(dtype, device), torch.zeros((), device=device)
    before = memory(overflown(arguments[0]))
    for decayed_norm, clip, lr_in_momentum, in_tensor in [(False,) * 4, *dialects_of(case)]:
        grads, *others = copies(arguments)
        lrs = [(0.25, 2.0, 4.0)[i % 3] * (2 if in_tensor else 1) for i in range(len(grads))]
        lrs = {**lrs_of(0, in_tensor, device), "lrs": lrs}
        dialect = dict(zip(NAMES, (decayed_norm, clip, lr_in_momentum), strict=True))
        ratios = scale_gradients(grads, *others, **lrs, **dialect, inv_scale=skip)
        assert ratios.tolist() == [(1.0, 0.5, 0.25)[i % 3] if clip else 1.0 for i in range(len(grads))]
        assert torch.equal(ratios, op_by_op(grads, *others, lrs, dialect, skip, halve=0.5))
        assert_all_equal(memory(grads), before, "memory of layer")


@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_a_skipped_step_writes_nothing_to_gradients_of_another_dtype(backend, device, dtype, grad_dtype):
    case = Case("mixed_dtypes", "", [*sizes(5, 70, 17000), Layer((6, 4), grad_layout=sliced), Layer((0,))])
    grads, *others = case.make(dtype, device, grad_dtype)
    before, skip = memory(overflown(grads, [float("inf")])), torch.zeros(1, device=device)
    ratios = scale_gradients(grads, *others, inv_scale=skip)
    assert ratios.tolist() == [1.0] * 5
    assert_all_equal(memory(grads), before, "memory of layer")


def test_a_nan_in_a_parameter_shows_in_a_skipped_step_too(backend, device):
    grads, params = ([torch.tensor([1.0, x], device=device)] for x in (float("inf"), float("nan")))
    ratios = scale_gradients(grads, params, [0.1], [1.0], [0.0], False, inv_scale=torch.zeros(1, device=device))
    assert ratios.isnan().all()
    assert grads[0].tolist() == [1.0, float("inf")]


@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_scaled_gradients_may_have_another_dtype_than_parameters(extension, device, dtype, grad_dtype):
    case = Case("mixed_dtypes", "", [*sizes(5, 70, 17000), Layer((3, 4), weight_decay=0.0), Layer((0,))])
    inv_scale = torch.tensor(0.3, device=device)
    for options in ({}, {"decayed_norm": True}):
        actual, expected = (case.make(dtype, where, grad_dtype) for where in (device, "cpu"))
        ratios = scale_gradients(*actual, **options, inv_scale=inv_scale)
        expected_ratios = scale_gradients(*expected, **options, inv_scale=inv_scale.cpu(), module=reference)
        assert_adapted(ratios, actual[0], expected_ratios, expected[0], gpu_rtol([*actual[0], *actual[1]]))


def test_unscaled_gradients_are_not_rounded_in_between(backend):
    # 2⁻¹² · 1.5 · 2⁻¹⁵ is less than float16 can hold, but r = 2¹⁵ times that is not.
    grad, param = torch.tensor([2.0**-15 * 1.5]).half(), torch.tensor([1.0]).half()
    how = {"maximize": False, "weight_decays": [0.0], "inv_scale": torch.tensor(2.0**-12)}
    ops.scale_gradients_([grad], [param], **how, ratios=torch.tensor([2.0**15]))
    assert grad.item() == 2.0**-12 * 1.5


@pytest.mark.parametrize("grad_scale", [65536.0, 3.0, 1e-3, 1e30])
def test_scaled_gradients_have_the_bits_that_a_grad_scaler_gives_them(backend, device, grad_scale):
    grad_scale = torch.tensor(grad_scale, device=device)
    scaled = grad_scale * torch.randn(1000, device=device)
    grad, unscaled_by_torch, found_inf = scaled.clone(), scaled.clone(), torch.zeros(1, device=device)
    inv_scale = ops.inv_scale(grad_scale, None, device)
    torch._amp_foreach_non_finite_check_and_unscale_([unscaled_by_torch], found_inf, inv_scale)
    param, one = torch.zeros(1000, device=device), torch.ones(1, device=device)
    ops.scale_gradients_([grad], [param], maximize=False, weight_decays=[0.1], ratios=one, inv_scale=inv_scale)
    assert torch.equal(grad, unscaled_by_torch)
    assert ops.squared_norms([scaled], inv_scale=inv_scale).item() == pytest.approx(
        grad.double().square().sum().item(), rel=1e-6
    )


largest, smallest = torch.finfo(torch.float32).max, 2.0**-149


@pytest.mark.parametrize(
    ("grad_scale", "found_inf", "expected"),
    [
        (None, None, 1.0),
        (65536.0, None, 2.0**-16),
        (65536.0, 0.0, 2.0**-16),
        (10.0, 0.0, torch.tensor(10.0).double().reciprocal().float().item()),
        (largest, 0.0, 2.0**-128),
        (2.0**127, None, 2.0**-127),
        (smallest, 0.0, float("inf")),
        (0.0, None, float("inf")),
        (float("inf"), 0.0, 0.0),
        (None, 0.0, 1.0),
        (None, 1.0, 0.0),
        (None, 2.0, 0.0),
        (65536.0, 1.0, 0.0),
        (65536.0, smallest, 0.0),
        (65536.0, float("nan"), 0.0),
        (0.0, 1.0, 0.0),
        (float("nan"), 0.0, float("nan")),
    ],
)
def test_inv_scale_of_a_grad_scaler(device, grad_scale, found_inf, expected):
    for shape in ((), (1,)):
        scale, found = (None if x is None else torch.full(shape, x, device=device) for x in (grad_scale, found_inf))
        inv_scale = ops.inv_scale(scale, found, device)
        assert inv_scale.item() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
        assert (inv_scale.dtype, inv_scale.shape, inv_scale.device.type) == (torch.float32, (), device.type)
        assert scale is None or scale.item() == pytest.approx(grad_scale, rel=0, abs=0, nan_ok=True)
        assert found is None or found.item() == pytest.approx(found_inf, rel=0, abs=0, nan_ok=True)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it compiles
def test_one_graph_steps_and_skips(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    def step(grads, params, momenta, grad_scale, found_inf):
        inv_scale = ops.inv_scale(grad_scale, found_inf, params[0].device)
        how = {"maximize": False, "weight_decays": [0.1], "trust_coefs": [0.5], "eps": [0.0], "inv_scale": inv_scale}
        tensors = {"params": params, "grads": grads, "momentum_buffers": momenta}
        ratios = sgd(**tensors, **how, lrs=[0.1], momentums=[0.9], dampenings=[0.0], nesterov=True)
        return ratios, scale_gradients(grads, params, **how)

    torch._dynamo.reset()
    compiles = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=compiles, fullgraph=True)
    grad, param, momentum = (torch.randn(7) for _ in range(3))
    for grad_scale, found_inf in ((8.0, 0.0), (2.0, 1.0), (3.0, 0.0)):
        scaled = grad_scale * grad
        if found_inf:
            scaled[3] = float("inf")
        scaler = torch.tensor(grad_scale), torch.tensor([found_inf])
        ours, expected = (([x.clone()] for x in (scaled, param, momentum)) for _ in range(2))
        ours, expected = tuple(ours), tuple(expected)
        for ratio, expected_ratio in zip(compiled(*ours, *scaler), step(*expected, *scaler), strict=True):
            assert torch.equal(ratio, expected_ratio)
        for (one,), (other,) in zip(ours, expected, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(ours[1][0], param) == bool(found_inf)
    assert compiles.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_may_have_another_dtype_than_parameters(extension, device, route, dtype, grad_dtype):
    case = Case("mixed_dtypes", "", [*sizes(5, 70, 17000), Layer((3, 4), weight_decay=0.0), Layer((0,))])
    actual, expected = (case.make(dtype, where, grad_dtype) for where in (device, "cpu"))
    ratios, expected_ratios = ROUTES[route](*actual), scale_gradients(*expected, module=reference)
    assert_adapted(ratios, actual[0], expected_ratios, expected[0], gpu_rtol([*actual[0], *actual[1]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(extension, threads, dtype):
    case = Case("threads", "", sizes(2_000_003, 5, 100_000, 16384, 300_001, *[64] * 50))
    arguments = case.make(dtype)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        one = copies(arguments)
        results.append([*one[0], scale_gradients(*one), ops.squared_norms(arguments[1])])
        grads, params, *hyper, _ = other = copies(arguments)
        lrs, dialect = [0.1] * len(grads), dict.fromkeys(NAMES, True)
        results[-1] += [scale_gradients(*other, lrs=lrs, **dialect), *grads]
        updated = copies(arguments)[0]
        results[-1] += [scale_updates(updated, params, *hyper[1:], lrs), *updated]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux is the extension built with OpenMP")
def test_loops_are_parallel(extension):
    """at::parallel_for is compiled with us: without OpenMP it would silently be a plain loop."""
    binary = Path(extension.__file__).read_bytes()
    assert b"GOMP_parallel" in binary or b"__kmpc_fork_call" in binary


def test_ratio_is_within_an_ulp_of_float64_at_20_million_elements(backend):
    param, grad = torch.randn(20_000_000), torch.randn(20_000_000).mul_(1e-3)
    param_norm = param.double().square().sum().sqrt()
    grad_norm = grad.double().square().sum().sqrt()
    expected = 0.001 * param_norm / (grad_norm + 1e-4 * param_norm + 1e-8)
    ratio = scale_gradients([grad], [param], [1e-4], [0.001], [1e-8], False)
    assert_within_ulps(ratio, expected.float().reshape(1), 1)


@pytest.mark.parametrize("which", ["param", "grad"])
def test_a_nan_shows_in_the_whole_layer_and_only_there(backend, device, which):
    case = Case("nan", "", [Layer((5,), param_scale=float(which == "param")), Layer((6,))])
    grads, params, *hyper = case.make(torch.float32, device)
    (params if which == "param" else grads)[0][2] = float("nan")
    ratios = scale_gradients(grads, params, *hyper)
    assert ratios.isnan().tolist() == [True, False]
    assert bool(grads[0].isnan().all())
    assert bool(grads[1].isfinite().all())


@pytest.mark.parametrize("route", ROUTES)
def test_infinities_follow_the_formula(backend, device, route):
    grads = [torch.tensor([1.0, float("inf")], device=device)]
    params = [torch.tensor([1.0, 2.0], device=device)]
    ratios = ROUTES[route](grads, params, [0.1], [0.001], [1e-8], False)
    assert ratios.tolist() == [0.0]
    assert grads[0][0] == 0
    assert grads[0][1].isnan()


@pytest.mark.parametrize("inverse", [None, 0.5])
def test_infinities_of_a_complex_layer_stay_in_their_part(backend, inverse):
    grads, params = [torch.tensor([complex(float("inf"), 1), 1 + 1j])], [torch.zeros(2, dtype=torch.complex64)]
    inv_scale, one = (None, 1.0) if inverse is None else (torch.tensor(inverse), inverse)
    scale_gradients(grads, params, [0.0], [0.001], [1e-8], False, inv_scale=inv_scale)
    assert torch.view_as_real(grads[0]).tolist() == [[float("inf"), one], [one, one]]


@named(CASES)
def test_memory_around_a_view_is_not_touched(backend, device, case):
    arguments = case.make(torch.float32, device)
    before = memory(arguments[0])
    scale_gradients(*arguments)
    for i, (grad, old, new) in enumerate(zip(arguments[0], before, memory(arguments[0]), strict=True)):
        around = torch.ones(len(new) // 4, dtype=torch.bool)
        around.as_strided(grad.shape, grad.stride(), grad.storage_offset()).fill_(False)
        assert torch.equal(new.view(-1, 4)[around], old.view(-1, 4)[around]), i


def test_gradients_keep_their_object_and_bump_their_version(backend, device):
    case = Case("version", "", [Layer((5,)), Layer((6, 3), grad_layout=lambda x: x.mT.contiguous().mT)])
    grads, params, *hyper = case.make(torch.float32, device)
    pointers, versions = [g.data_ptr() for g in grads], [g._version for g in grads]
    param_versions = [p._version for p in params]
    scale_gradients(grads, params, *hyper)
    assert [g.data_ptr() for g in grads] == pointers
    assert all(g._version > version for g, version in zip(grads, versions, strict=True))
    assert [p._version for p in params] == param_versions


def test_leaves_that_require_gradients_stay_leaves(backend):
    param, grad = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    scale_gradients([grad], [param], [0.1], [0.001], [1e-8], False)
    assert grad.is_leaf
    assert not ops.squared_norms([param]).requires_grad


SQUARES = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
MODES = {
    # op, options; "ratios": which are read, "measured": with trust coefficients
    "squared_norms": ("squared_norms", {}),
    "squared_norms, of sums": ("squared_norms", {"others": ..., "scales": [-1.0, 0.5, 0.0]}),
    "trust_ratios": ("trust_ratios", {"clip": True, "lrs": ..., "of_updates": True}),
    "scale_gradients_": ("scale_gradients_", {}),
    "scale_gradients_, ratios": ("scale_gradients_", {"ratios": ..., "lrs": ..., "lr_in_momentum": True}),
    "scale_gradients_, measured": (
        "scale_gradients_",
        {"trust_coefs": ..., "lrs": ..., "decayed_norm": True, "clip": True, "lr_in_momentum": True},
    ),
    "scale_updates_, ratios": ("scale_updates_", {"ratios": ...}),
    "scale_updates_, measured": ("scale_updates_", {"trust_coefs": ..., "lrs": ..., "clip": True}),
    "sgd_": ("sgd_", {"lrs": ...}),
    "sgd_, ratios": ("sgd_", {"lrs": ..., "ratios": ..., "nesterov": True}),
    "sgd_, measured": (
        "sgd_",
        {"trust_coefs": ..., "lrs": ..., "decayed_norm": True, "clip": True, "lr_in_momentum": True, "nesterov": True},
    ),
    "adam_": ("adam_", {"lrs": ..., "decoupled_weight_decay": False}),
    "adam_, ratios": ("adam_", {"lrs": ..., "ratios": ...}),
    "adam_, measured": ("adam_", {"trust_coefs": ..., "lrs": ..., "decayed_norm": True, "clip": True}),
    "adam_, of updates": ("adam_", {"trust_coefs": ..., "lrs": ..., "of_updates": True, "clip": True}),
    "adam_, first of two calls": ("adam_", {"lrs": ..., "of_updates": True, "squared_norms": ...}),
    "adam_, second of two calls": ("adam_", {"lrs": ..., "of_updates": True, "ratios": ..., "grads": ...}),
}
INVERSES = {"trust_ratios": [None], "scale_updates_": [None], "adam_": [None, 0.0]}  # but for all others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    ("mode", "inverse"),
    [(m, i) for m, (op, _) in MODES.items() for i in INVERSES.get(op, [None, 0.5, 0.0])],
)
def test_opcheck(extension, device, mode, dtype, inverse):
    case = Case("opcheck", "", [Layer((3, 4)), Layer((5,), weight_decay=0.01), Layer((0,))])
    grads, params, weight_decays, trust_coefs, eps, maximize = case.make(dtype, device)
    squares, momenta = SQUARES.to(device), [torch.ones_like(param) for param in params]
    op, options = MODES[mode]
    arguments, more = {
        "squared_norms": ((params,), {}),
        "trust_ratios": (
            (squares, squares.flip(0).contiguous()),
            {"weight_decays": weight_decays, "trust_coefs": trust_coefs, "eps": eps, "dtype": torch.float32},
        ),
        "scale_gradients_": ((grads, params), {"maximize": maximize, "weight_decays": weight_decays}),
        "scale_updates_": ((params, grads), {}),
        "sgd_": (
            (params, grads, momenta),
            {
                "maximize": maximize,
                "weight_decays": weight_decays,
                "momentums": [0.9] * 3,
                "dampenings": [0.0] * 3,
            },
        ),
        "adam_": (
            (
                params,
                [] if "grads" in options else grads,
                momenta,
                [torch.ones_like(param) for param in params],
                [torch.full((), 3.0, device=device) for _ in params],
            ),
            {
                "maximize": maximize,
                "weight_decays": weight_decays,
                "decoupled_weight_decay": True,
                "beta1": 0.8,
                "beta2": 0.95,
                "adam_eps": 1e-3,
            },
        ),
    }[op]
    options = {**more, **{name: value for name, value in options.items() if name != "grads"}}
    if "squared_norms" in options:
        options["squared_norms"] = torch.full((6,), 7.0, dtype=torch.float64, device=device)
    if "others" in options:
        options["others"] = grads
    if "lrs" in options:
        options |= {"lrs": [0.1, 0.2, 0.3], "lr_tensor": squares[0]}
    if "ratios" in options:
        options["ratios"] = squares.float()
    if "trust_coefs" in options and op != "trust_ratios":
        options |= {"ratios": torch.full((3,), 7.0, device=device), "trust_coefs": trust_coefs, "eps": eps}
    if inverse is not None:
        options["inv_scale"] = torch.tensor(inverse, device=device)
    torch.library.opcheck(getattr(torch.ops.torchlars, op).default, arguments, options)


def test_every_op_is_checked_in_a_mode():
    assert [*dict.fromkeys(op for op, _ in MODES.values())] == list(ops.OPS)


@pytest.mark.parametrize("lr_in_momentum", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_without_ratios_gradients_are_scaled_as_with_ratios_of_1(backend, device, case, dtype, lr_in_momentum):
    grads, params, weight_decays, *_, maximize = case.make(dtype, device)
    one, other = copies([grads])[0], copies([grads])[0]
    lrs = {**lrs_of(len(grads), True, device), "lr_in_momentum": True} if lr_in_momentum else {}
    how = {"maximize": maximize, "weight_decays": weight_decays, "inv_scale": torch.tensor(0.3, device=device), **lrs}
    ops.scale_gradients_(one, params, **how)
    ops.scale_gradients_(other, params, **how, ratios=ops.empty_ratios(grads, params).fill_(1))
    assert_all_equal(one, other, "gradient of layer")


@pytest.mark.parametrize("grad_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_measured_ratios_are_written_whatever_they_hold(backend, device, grad_dtype):
    grads, params, *others = Case("ratios", "", sizes(5, 70)).make(torch.float32, device, grad_dtype)
    for fill in (float("nan"), 0.0):
        written = ops.empty_ratios(grads, params).fill_(fill)
        version = written._version
        how = dict(zip(("weight_decays", "trust_coefs", "eps", "maximize"), others, strict=True))
        ops.scale_gradients_([grad.clone() for grad in grads], params, **how, ratios=written)
        assert written._version > version
        assert torch.equal(written, scale_gradients([grad.clone() for grad in grads], params, *others))


@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=str)
def test_complex_norm_is_that_of_the_complex_vector(backend, dtype):
    vector = torch.tensor([3 + 4j, 0 + 12j], dtype=dtype)
    assert ops.squared_norms([vector]).tolist() == [169.0]


def test_sparse_values_may_be_fewer_than_a_parameter_that_does_not_decay(backend):
    values, param = torch.tensor([3.0, 4.0]), torch.randn(10, 2)
    how = {"maximize": False, "weight_decays": [0.0], "ratios": torch.tensor([0.5])}
    ops.scale_gradients_([values], [param], **how)
    assert values.tolist() == [1.5, 2.0]
    ops.scale_gradients_([values], [param], **how, inv_scale=torch.tensor(4.0))
    assert values.tolist() == [3.0, 4.0]
    ops.scale_gradients_([values], [param], **how, inv_scale=torch.tensor(0.0))
    assert values.tolist() == [3.0, 4.0]


def test_misaligned_is_misaligned():
    assert misaligned(torch.ones(8)).data_ptr() % 16 == 4


def test_ratios_times_lr_are_rounded_once(backend):
    ratios = torch.rand(10_000, generator=torch.Generator().manual_seed(8))
    for lr in (0.3, torch.tensor([0.3], dtype=torch.float64)):
        expected = torch.tensor([ratio * 0.3 for ratio in ratios.tolist()])  # in double, then to float32
        assert torch.equal(ops.times_lr(ratios, lr), expected)
        assert not torch.equal(ratios * 0.3, expected)
