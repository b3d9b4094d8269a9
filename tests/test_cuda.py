"""What only a GPU can show: that the host never waits, and that streams and devices are respected.

That the kernels compute the right numbers is shown by tests/test_ops.py, which takes in every device there is.
"""

import os
import re
import subprocess
import sys

import calls
import pytest
import torch
from torch import nn

from torchlars import LAMB, LARC, LARS, _extension, codes, ops, reference
from torchlars import optim as torchlars_optim

SGD = pytest.mark.parametrize("op", [ops.sgd_, calls.sgd], ids=["given", "measured"])  # the ratios
DTYPES = pytest.mark.parametrize(
    ("dtype", "momentum_dtype"),
    [
        (torch.float32, None),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)


@pytest.fixture(autouse=True)
def _needs_cuda(cuda):
    pass


def make(device="cuda", dtypes=(torch.float32,)):
    params = [
        nn.Parameter(torch.randn(shape, device=device).to(t)) for t in dtypes for shape in [(300, 70), (70,), (0,)]
    ]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def expected_gradients(params):
    grads = [param.grad.clone() for param in params]
    for param, grad in zip(params, grads, strict=True):
        calls.scale_gradients([grad], [param.detach()], [0.1], [0.001], [1e-8], False, module=reference)
    return grads


def sgd_arguments(op, dtype, momentum_dtype):
    """Return the arguments of an op that steps, for a layer that decays, one that does not and an empty one."""
    params = make(dtypes=(dtype,))
    arguments = {
        "params": [param.detach() for param in params],
        "grads": [param.grad for param in params],
        "momentum_buffers": [torch.randn_like(param, dtype=momentum_dtype) for param in params if momentum_dtype],
        "weight_decays": [0.1, 0.0, 0.1],
        "lrs": [0.1, 0.2, 0.3],
        "momentums": [0.9 if momentum_dtype else 0.0] * 3,
        "dampenings": [0.0, 0.1, 0.2],
        "nesterov": momentum_dtype == torch.float32,
        "maximize": dtype == torch.bfloat16,
        "lr_tensor": torch.tensor(0.7, dtype=torch.float64, device="cuda"),
    }
    if op is ops.sgd_:
        return arguments | {"ratios": torch.tensor([0.5, 2.0, 1.0], device="cuda")}
    return arguments | {"trust_coefs": [0.5, 0.1, 1.0], "eps": [0.0, 1e-8, 0.1]}


def cloned(arguments):
    def clone(value):
        if isinstance(value, list):
            return [clone(x) for x in value]
        return value.clone() if isinstance(value, torch.Tensor) else value

    return {name: clone(value) for name, value in arguments.items()}


def reference_step(op, arguments):
    """Return the arguments after a step of the reference, which waits for the device as often as it likes."""
    arguments = cloned(arguments)
    if op is ops.sgd_:
        reference.sgd_(**arguments)
    else:
        calls.sgd(**arguments, module=reference)
    return arguments


def assert_stepped(arguments, expected):
    for name in ("params", "grads", "momentum_buffers"):
        for actual, wanted in zip(arguments[name], expected[name], strict=True):
            torch.testing.assert_close(actual, wanted)


# How a step of Adam is taken, and how many launches it takes: one more than SGD where nothing but steps can come first.
ADAM = {
    "plain": ({}, 2),
    "ratios of gradients given": ({"ratios": True}, 2),
    "ratios of updates given": ({"ratios": True, "of_updates": True}, 2),
    "LARS": ({"trust_coefs": [0.5, 0.1, 1.0], "eps": [0.0, 1e-8, 0.1], "decoupled_weight_decay": False}, 2),
    "LAMB": ({"trust_coefs": [0.5, 0.1, 1.0], "eps": [0.0, 1e-8, 0.1], "of_updates": True}, 2),
    "first part": ({"squared_norms": True, "of_updates": True}, 3),
    "second part": ({"ratios": True, "of_updates": True, "grads": []}, 1),
}
EVERY_ADAM = pytest.mark.parametrize("how", ADAM)
MOMENTS = pytest.mark.parametrize(
    ("dtype", "moment_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)


def adam_arguments(how, dtype, moment_dtype):
    """Return the arguments of a step of Adam, for a layer that decays, one that does not and an empty one."""
    params = make(dtypes=(dtype,))
    options = dict(ADAM[how][0])
    if "ratios" in options or "trust_coefs" in options:
        options["ratios"] = torch.tensor([0.5, 2.0, 1.0], device="cuda")
    if "squared_norms" in options:
        options["squared_norms"] = torch.empty(2 * len(params), dtype=torch.float64, device="cuda")
    return {
        "params": [param.detach() for param in params],
        "grads": [param.grad for param in params],
        "exp_avgs": [torch.randn_like(param, dtype=moment_dtype).detach() for param in params],
        "exp_avg_sqs": [torch.rand_like(param, dtype=moment_dtype).detach() + 0.1 for param in params],
        "steps": [torch.tensor(step, device="cuda") for step in (1.0, 2.0, 100.0)],
        "weight_decays": [0.1, 0.0, 0.1],
        "decoupled_weight_decay": True,
        "lrs": [0.01, 0.02, 0.03],
        "beta1": 0.9,
        "beta2": 0.99,
        "adam_eps": 1e-8,
        "maximize": dtype == torch.bfloat16,
        "lr_tensor": torch.tensor(0.7, dtype=torch.float64, device="cuda"),
        **options,
    }


WRITTEN_BY_ADAM = ("params", "exp_avgs", "exp_avg_sqs", "steps")


def assert_stepped_by_adam(arguments, expected):
    for name in WRITTEN_BY_ADAM:
        for actual, wanted in zip(arguments[name], expected[name], strict=True):
            torch.testing.assert_close(actual, wanted)
    rtol = 1e-3 if arguments["params"][0].dtype == torch.bfloat16 else 1e-5
    for name in ("ratios", "squared_norms"):
        if name in arguments:
            torch.testing.assert_close(arguments[name], expected[name], rtol=rtol, atol=0)


@pytest.fixture
def no_sync():
    """Make every wait of the host for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("base", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)], ids=["one dtype", "two dtypes"])
def test_step_never_waits_for_the_device(no_sync, base, dtypes):
    params = make(dtypes=dtypes)
    torch.cuda.set_sync_debug_mode("default")
    expected = expected_gradients(params)
    torch.cuda.set_sync_debug_mode("error")
    options = {"foreach": base == "foreach", "fused": base == "fused"}
    optimizer = LARS(torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, **options))
    optimizer.step()
    ratios = optimizer.trust_ratios()
    torch.cuda.set_sync_debug_mode("default")
    assert len(ratios) == len(params)
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)


EVERY_DIALECT = {
    "LARC": lambda base: LARC(base, trust_coef=0.5),
    "decayed norm": lambda base: LARS(base, norm="decayed"),
    "lr in momentum": lambda base: LARS(base, lr_in_momentum=True, clip=True, norm="decayed"),
    "update": lambda base: LARS(base, apply_to="update"),
    "LAMB": lambda base: LAMB(base),
    "LAMB, clipped": lambda base: LAMB(base, clip=True),
}


@pytest.mark.parametrize("lr_is_tensor", [False, True], ids=["lr", "lr on the device"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torchlars_optim.SGD], ids=["torch", "torchlars"])
@pytest.mark.parametrize("dialect", EVERY_DIALECT)
def test_no_dialect_waits_for_the_device(no_sync, monkeypatch, dialect, base, lr_is_tensor):
    torch.cuda.set_sync_debug_mode("default")
    params = make(dtypes=(torch.float32, torch.float64))
    lr = torch.tensor(0.1, device="cuda") if lr_is_tensor else 0.1
    options = {"momentum": 0.9, "weight_decay": 0.1}
    if base is torch.optim.SGD and lr_is_tensor:
        options["fused"] = True
    twins = [nn.Parameter(param.detach().cpu()) for param in params]
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad.cpu()
    optimizer = EVERY_DIALECT[dialect](base(params, lr=lr, **options))
    oracle = EVERY_DIALECT[dialect](torch.optim.SGD(twins, lr=0.1, momentum=0.9, weight_decay=0.1))
    grads = [param.grad.clone() for param in params]
    for _ in range(2):
        for param, twin, grad in zip(params, twins, grads, strict=True):  # a step may have consumed them
            param.grad.copy_(grad)
            twin.grad.copy_(grad)
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        with monkeypatch.context() as on_reference:
            on_reference.setattr(ops, "_backend", reference)
            oracle.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param.cpu(), twin, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("is_late", [False, True])
def test_layers_of_zeros_are_found_without_waiting(is_late):
    params = make()
    nn.init.zeros_(params[1])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if is_late:
            torch.cuda._sleep(2_000_000_000)
        optimizer = LARS(torch.optim.SGD(params, lr=16.0))
        if is_late:
            optimizer.step()  # a warning would be an error
            return
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        with pytest.warns(UserWarning, match=r"\(group: 0, parameter: 1, shape: \(70,\), lr: 16.0\)"):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream():
    params = make()
    expected = expected_gradients(params)
    grads = [param.grad.clone() for param in params]
    for param in params:
        param.grad.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # whatever runs on another stream meanwhile reads NaN
        for param, grad in zip(params, grads, strict=True):
            param.grad.copy_(grad)
        LARS(torch.optim.SGD(params, lr=0.1, weight_decay=0.1)).step()
    side.synchronize()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)


@SGD
@DTYPES
def test_sgd_never_waits_for_the_device(op, dtype, momentum_dtype):
    arguments = sgd_arguments(op, dtype, momentum_dtype)
    expected = reference_step(op, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_stepped(arguments, expected)


INVERSES = pytest.mark.parametrize("found_inf", [0.0, 1.0], ids=["scaled", "skipped"])


def scaler_values(found_inf):
    """Return what a GradScaler hands over: the scale, and whether gradients overflowed."""
    return torch.tensor(8.0, device="cuda"), torch.tensor([found_inf], device="cuda")


def overflow(grads, found_inf):
    for grad in grads:
        grad.mul_(8.0)
    if found_inf:
        grads[0][0, 0] = float("inf")


@SGD
@DTYPES
@INVERSES
def test_sgd_of_scaled_gradients_never_waits_for_the_device(op, dtype, momentum_dtype, found_inf):
    arguments = sgd_arguments(op, dtype, momentum_dtype)
    overflow(arguments["grads"], found_inf)
    scaler, device = scaler_values(found_inf), torch.device("cuda", torch.cuda.current_device())
    expected = reference_step(op, {**arguments, "inv_scale": ops.inv_scale(*scaler, device)})
    before = cloned(arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(**arguments, inv_scale=ops.inv_scale(*scaler, device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_stepped(arguments, expected)
    for name in ("params", "momentum_buffers") if found_inf else ():
        assert all(torch.equal(a, b) for a, b in zip(arguments[name], before[name], strict=True))


@EVERY_ADAM
@MOMENTS
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0], ids=["unscaled", "scaled", "skipped"])
def test_adam_never_waits_for_the_device(how, dtype, moment_dtype, found_inf):
    arguments = adam_arguments(how, dtype, moment_dtype)
    scaler, device = None, torch.device("cuda", torch.cuda.current_device())
    expected = cloned(arguments)
    if found_inf is not None:
        scaler = scaler_values(found_inf)
        if arguments["grads"]:
            overflow(arguments["grads"], found_inf)
            expected = cloned(arguments)
        expected["inv_scale"] = ops.inv_scale(*scaler, device)
    before = cloned(arguments)
    reference.adam_(**expected)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.adam_(**arguments, inv_scale=None if scaler is None else ops.inv_scale(*scaler, device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_stepped_by_adam(arguments, expected)
    for name in WRITTEN_BY_ADAM if found_inf else ():
        assert all(torch.equal(a, b) for a, b in zip(arguments[name], before[name], strict=True))


@INVERSES
@pytest.mark.parametrize("decayed_norm", [False, True])
def test_scaled_gradients_are_adapted_without_waiting_for_the_device(decayed_norm, found_inf):
    params = make()
    grads, values = [param.grad for param in params], [param.detach() for param in params]
    overflow(grads, found_inf)
    scaler, device = scaler_values(found_inf), torch.device("cuda", torch.cuda.current_device())
    numbers, how = ([0.1] * 3, [0.5] * 3, [1e-8] * 3, False), {"decayed_norm": decayed_norm}
    expected = [grad.clone() for grad in grads]
    inv_scale = ops.inv_scale(*scaler, device)
    calls.scale_gradients(expected, values, *numbers, **how, inv_scale=inv_scale, module=reference)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inv_scale = ops.inv_scale(*scaler, device)
        ratios = calls.scale_gradients(grads, values, *numbers, **how, inv_scale=inv_scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (ratios == 1).all() == bool(found_inf)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_one_graph_steps_and_skips():
    """What a CUDA graph replays is decided by values on the device alone."""
    params = make()
    grads, values = [param.grad for param in params], [param.detach() for param in params]
    scale, found_inf = scaler_values(0.0)
    device = torch.device("cuda", torch.cuda.current_device())
    names = ("weight_decays", "trust_coefs", "eps", "lrs", "momentums", "dampenings")
    numbers = {name: [x] * 3 for name, x in zip(names, (0.1, 0.5, 1e-8, 0.1, 0.0, 0.0), strict=True)}

    def step(module=ops, params=values):
        inv_scale = ops.inv_scale(scale, found_inf, device)
        tensors = {"params": params, "grads": grads, "momentum_buffers": []}
        calls.sgd(**tensors, **numbers, maximize=False, inv_scale=inv_scale, module=module)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for skips in (True, False):
        found_inf.fill_(float(skips))
        before = [value.clone() for value in values]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(values[0], before[0]) == skips
        step(reference, before)
        for value, wanted in zip(values, before, strict=True):
            torch.testing.assert_close(value, wanted)


@SGD
def test_sgd_goes_to_the_current_stream(op):
    arguments = sgd_arguments(op, torch.float32, torch.float32)
    expected = reference_step(op, arguments)
    grads = [grad.clone() for grad in arguments["grads"]]
    for grad in arguments["grads"]:
        grad.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # whatever runs on another stream meanwhile reads NaN
        for grad, values in zip(arguments["grads"], grads, strict=True):
            grad.copy_(values)
        op(**arguments)
    side.synchronize()
    assert_stepped(arguments, expected)


def with_gaps(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


LAYOUTS = {
    "wider gradients": {"grads": torch.Tensor.float},
    "narrower gradients": {"grads": torch.Tensor.half},
    "gradients with gaps": {"grads": with_gaps, "exp_avg_sqs": with_gaps},
    "parameters with gaps": {"params": with_gaps},
    "transposed": {"params": lambda x: x.t().contiguous().t(), "exp_avgs": with_gaps},
    "complex": dict.fromkeys(("params", "grads", "exp_avgs", "exp_avg_sqs"), lambda x: torch.complex(x, 2 * x)),
}


@EVERY_ADAM
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adam_takes_layers_that_are_copied(how, layout):
    dtype = torch.bfloat16 if layout == "wider gradients" else torch.float32
    arguments = adam_arguments(how, dtype, torch.float32)
    for name, changed in LAYOUTS[layout].items():
        arguments[name] = [changed(tensor) for tensor in arguments[name]]
    expected = {
        name: [x.clone() for x in each] if name in WRITTEN_BY_ADAM else each for name, each in arguments.items()
    }
    expected |= {name: expected[name].clone() for name in ("ratios", "squared_norms") if name in expected}
    versions = [param._version for param in arguments["params"]]
    reference.adam_(**expected)
    ops.adam_(**arguments)
    assert_stepped_by_adam(arguments, expected)
    written = [param._version > version for param, version in zip(arguments["params"], versions, strict=True)]
    assert written == [how != "first part"] * 3


@EVERY_ADAM
def test_adam_goes_to_the_current_stream(how):
    arguments = adam_arguments(how, torch.float32, torch.float32)
    expected = cloned(arguments)
    reference.adam_(**expected)
    moments = [moment.clone() for moment in arguments["exp_avgs"]]
    for moment in arguments["exp_avgs"]:
        moment.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # whatever runs on another stream meanwhile reads NaN
        for moment, values in zip(arguments["exp_avgs"], moments, strict=True):
            moment.copy_(values)
        ops.adam_(**arguments)
    side.synchronize()
    assert_stepped_by_adam(arguments, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device only")
def test_another_device_than_the_current_one():
    params = make(device="cuda:1")
    expected = expected_gradients(params)
    with torch.cuda.device(0):
        LARS(torch.optim.SGD(params, lr=0.1, weight_decay=0.1)).step()
        assert torch.cuda.current_device() == 0
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)


def test_devices_may_be_mixed_in_a_group_but_not_in_a_call():
    cpu, gpu = make("cpu"), make("cuda")
    expected = expected_gradients(cpu) + expected_gradients(gpu)
    LARS(torch.optim.SGD([*cpu, *gpu], lr=0.1, weight_decay=0.1)).step()
    for param, gradient in zip([*cpu, *gpu], expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)
    with pytest.raises(RuntimeError, match=r"one device \(tensors\[0\]: cuda:0, tensors\[3\]: cpu\)"):
        ops.squared_norms([*gpu, *cpu])


def test_bits_are_the_same_from_run_to_run():
    param = torch.randn(20_000_000, device="cuda")
    results = []
    for _ in range(5):
        grad = torch.randn(20_000_000, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        ratio = calls.scale_gradients([grad], [param], [0.1], [0.001], [1e-8], False)
        results.append((ratio, grad))
    assert all(torch.equal(r, results[0][0]) and torch.equal(g, results[0][1]) for r, g in results)


@DTYPES
def test_bits_of_sgd_are_the_same_from_run_to_run(dtype, momentum_dtype):
    param, grad = (torch.randn(20_000_000, device="cuda").to(dtype) for _ in range(2))
    buffers = [torch.randn_like(param, dtype=momentum_dtype)] if momentum_dtype else []
    momentum = 0.9 if momentum_dtype else 0.0
    results = []
    for _ in range(5):
        params, momenta = [param.clone()], [buffer.clone() for buffer in buffers]
        tensors = {"params": params, "grads": [grad], "momentum_buffers": momenta}
        numbers = {"weight_decays": [0.1], "trust_coefs": [0.001], "eps": [1e-8], "lrs": [0.1], "dampenings": [0.0]}
        ratios = calls.sgd(**tensors, **numbers, momentums=[momentum], maximize=False)
        results.append([ratios, *params, *momenta])
    for result in results:
        assert all(torch.equal(x, first) for x, first in zip(result, results[0], strict=True))


@MOMENTS
@pytest.mark.parametrize("of_updates", [False, True], ids=["LARS", "LAMB"])
def test_bits_of_adam_are_the_same_from_run_to_run(dtype, moment_dtype, of_updates):
    param, grad = (torch.randn(20_000_000, device="cuda").to(dtype) for _ in range(2))
    moment, square = (torch.rand_like(param, dtype=moment_dtype) for _ in range(2))
    numbers = {"weight_decays": [0.1], "trust_coefs": [0.001], "eps": [1e-8], "lrs": [0.1], "maximize": False}
    numbers |= {"decoupled_weight_decay": of_updates, "beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-8}
    results = []
    for _ in range(5):
        written = [param.clone()], [moment.clone()], [square.clone()], [torch.zeros(1, device="cuda")]
        tensors = dict(zip(WRITTEN_BY_ADAM, written, strict=True))
        ratios = calls.adam(**tensors, grads=[grad], **numbers, of_updates=of_updates)
        results.append([ratios, *(each for (each,) in written)])
    for result in results:
        assert all(torch.equal(x, first) for x, first in zip(result, results[0], strict=True))


@MOMENTS
def test_two_calls_of_adam_have_the_bits_of_one(dtype, moment_dtype):
    one = adam_arguments("LAMB", dtype, moment_dtype)
    two = cloned(one)
    coefs, eps, ratios = (two.pop(name) for name in ("trust_coefs", "eps", "ratios"))
    squared_norms = torch.empty(2 * len(coefs), dtype=torch.float64, device="cuda")
    ops.adam_(**one)
    ops.adam_(**two, squared_norms=squared_norms)
    numbers = {"weight_decays": [0.0] * len(coefs), "trust_coefs": coefs, "eps": eps, "lrs": [1.0] * len(coefs)}
    ratios.copy_(ops.trust_ratios(*squared_norms.chunk(2), **numbers, dtype=ratios.dtype, of_updates=True))
    ops.adam_(**{**two, "grads": []}, ratios=ratios)
    assert torch.equal(ratios, one["ratios"])
    for name in WRITTEN_BY_ADAM:
        assert all(torch.equal(a, b) for a, b in zip(one[name], two[name], strict=True))


def count_launches(call, *arguments, **more):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(*arguments, **more)
        torch.cuda.synchronize()
    return sum("torchlars" in event.name for event in profile.events())


def test_two_launches_a_bucket():
    params = make()
    grads, values = [p.grad for p in params], [p.detach() for p in params]
    arguments = (grads, values, [0.1] * 3, [1.0] * 3, [0.0] * 3, False)
    assert count_launches(calls.scale_gradients, *arguments) == 2


@pytest.mark.parametrize("ratios", [None, [0.5, 2.0, 1.0]], ids=["none", "given"])
def test_one_launch_scales_a_bucket_whose_ratios_are_not_measured(ratios):
    params = make()
    grads, values = [p.grad for p in params], [p.detach() for p in params]
    ratios = ratios and torch.tensor(ratios, device="cuda")
    how = {"maximize": False, "weight_decays": [0.1] * 3, "ratios": ratios}
    assert count_launches(ops.scale_gradients_, grads, values, **how) == 1


def test_without_ratios_every_launch_takes_ratios_of_1():
    params = [torch.randn(3, device="cuda") for _ in range(1000)]  # more than one launch takes
    grads = [torch.randn(3, device="cuda") for _ in params]
    expected = [grad + 0.5 * param for grad, param in zip(grads, params, strict=True)]
    ops.scale_gradients_(grads, params, maximize=False, weight_decays=[0.5] * len(params))
    assert torch.equal(torch.stack(grads), torch.stack(expected))


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_momentum_in_8_bits_has_the_references_bits_and_takes_no_more_launches(dtype, measured):
    shapes = [(90, 200), (3, 16384 + 130), (40, 128), (7, 65), (0, 64)]
    params, grads = ([torch.randn(shape, device="cuda").to(dtype) for shape in shapes] for _ in range(2))
    coded = [torch.zeros(shape, dtype=torch.int8, device="cuda") for shape in shapes]
    scales = [codes.encode(new, torch.randn(new.shape, device="cuda")) for new in coded]
    layers = range(len(shapes))
    numbers = {"weight_decays": [0.1 * (i % 2) for i in layers], "lrs": [0.1 + i for i in layers]}
    numbers |= {"momentums": [0.9] * len(shapes), "dampenings": [0.1 * i for i in layers]}
    if measured:
        numbers |= {"trust_coefs": [0.02 + i for i in layers], "eps": [0.01] * len(shapes)}
    expected = [[tensor.clone() for tensor in tensors] for tensors in (params, coded, scales)]
    ratios, given = (torch.ones(len(shapes), device="cuda") for _ in range(2))
    tensors = {"params": params, "grads": grads, "momentum_buffers": coded, "momentum_scales": scales}
    launches = count_launches(ops.sgd_, **tensors, **numbers, maximize=True, ratios=ratios if measured else None)
    assert launches == 1 + measured
    given.copy_(ratios)
    numbers = {name: values for name, values in numbers.items() if name not in ("trust_coefs", "eps")}
    tensors = {"params": expected[0], "grads": grads, "momentum_buffers": expected[1], "momentum_scales": expected[2]}
    reference.sgd_(**tensors, **numbers, maximize=True, ratios=given)
    for got, known in zip((params, coded, scales), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(got, known, strict=True))


@DTYPES
@pytest.mark.parametrize("inverse", [None, 0.5, 0.0])
@pytest.mark.parametrize(("op", "launches"), [(ops.sgd_, 1), (calls.sgd, 2)], ids=["given", "measured"])
def test_launches_of_sgd(op, launches, inverse, dtype, momentum_dtype):
    inv_scale = None if inverse is None else torch.tensor(inverse, device="cuda")
    arguments = {**sgd_arguments(op, dtype, momentum_dtype), "inv_scale": inv_scale}
    assert count_launches(op, **arguments) == launches


@EVERY_ADAM
@MOMENTS
@pytest.mark.parametrize("inverse", [None, 0.5, 0.0])
def test_launches_of_adam(how, dtype, moment_dtype, inverse):
    inv_scale = None if inverse is None else torch.tensor(inverse, device="cuda")
    arguments = {**adam_arguments(how, dtype, moment_dtype), "inv_scale": inv_scale}
    assert count_launches(ops.adam_, **arguments) == ADAM[how][1]


@pytest.mark.parametrize("inverse", [None, 0.5, 0.0])
@pytest.mark.parametrize("options", [{}, {"decayed_norm": True, "clip": True, "lr_in_momentum": True}], ids=["", "all"])
def test_no_dialect_and_no_scale_launches_more(options, inverse):
    params = make()
    grads, values = [p.grad for p in params], [p.detach() for p in params]
    arguments = (grads, values, [0.1] * 3, [1.0] * 3, [0.0] * 3, False)
    inv_scale = None if inverse is None else torch.tensor(inverse, device="cuda")
    assert count_launches(calls.scale_gradients, *arguments, lrs=[0.1] * 3, **options, inv_scale=inv_scale) == 2


def test_two_launches_scale_a_bucket_of_updates():
    values = [p.detach() for p in make()]
    old_values = [value.clone() for value in values]
    assert count_launches(calls.scale_updates, values, old_values, [1.0] * 3, [0.0] * 3, [0.1] * 3) == 2


@pytest.fixture
def run_bytes():
    """Set the bytes of parameters and gradients that are measured and adapted at once; put back afterwards."""
    yield _extension.extension.set_run_bytes
    _extension.extension.set_run_bytes(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda params: LARS(torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)),
        lambda params: LARS(torchlars_optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1), norm="decayed"),
        lambda params: LAMB(torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)),
        lambda params: LARS(torchlars_optim.Adam(params, lr=0.1, weight_decay=0.1), norm="decayed"),
        lambda params: LAMB(torchlars_optim.AdamW(params, lr=0.1, weight_decay=0.1)),
    ],
    ids=["LARS(SGD)", "LARS(torchlars SGD)", "LAMB(AdamW)", "LARS(torchlars Adam)", "LAMB(torchlars AdamW)"],
)
def test_runs_of_layers_have_the_bits_of_two_launches(make, dtype, run_bytes):
    params = make_many(dtype)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad.clone()
    optimizer, expected = make(params), make(twins)
    run_bytes(0)
    expected.step()
    run_bytes(300_000)
    optimizer.step()
    ratios, expected_ratios = optimizer.trust_ratios(), expected.trust_ratios()
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)
        assert torch.equal(ratios[param], expected_ratios[twin])


def make_many(dtype):
    return [param for _ in range(6) for param in make(dtypes=(dtype,))]


OF_RUNS = {
    "LARS": (lambda params: LARS(torchlars_optim.SGD(params, lr=0.1, weight_decay=0.1)), 300_000),
    "LAMB": (lambda params: LAMB(torchlars_optim.AdamW(params, lr=0.1, weight_decay=0.1)), 600_000),
}


@pytest.mark.parametrize(("optimizer", "bytes_of_runs"), OF_RUNS.values(), ids=OF_RUNS)
def test_runs_take_more_launches(run_bytes, optimizer, bytes_of_runs):
    """A large layer has 168,000 bytes with its gradient, and as many of moments."""
    optimizer = optimizer(make_many(torch.float32))
    optimizer.step()  # the first one begins the state
    assert count_launches(optimizer.step) == 2
    run_bytes(bytes_of_runs)
    assert count_launches(optimizer.step) == 12
    with pytest.raises(ValueError, match=r"expected a non-negative number of bytes \(got: -1\)"):
        run_bytes(-1)


on_fake_device = pytest.mark.skipif("FAKE_CUDA" not in os.environ, reason="is about tests/fake_cuda")


@on_fake_device
@pytest.mark.parametrize(
    ("variable", "error"),
    [
        pytest.param(
            "DRIVER=12000", r"needs an NVIDIA driver 530 or newer: .* \(got: a driver for CUDA 12\.0\)", id="driver"
        ),
        pytest.param("ARCHITECTURE=86", None, id="kernels that do not wait for earlier ones must not overlap them"),
    ],
)
def test_what_drivers_and_architectures_do_not_know_is_not_asked_for(variable, error):
    step = """
import torch
from torchlars import _C, ops
_C.set_run_bytes(4)
x, y, ratios = (torch.ones(n, device="cuda") for n in (3, 3, 1))
ops.scale_gradients_([x], [y], maximize=False, weight_decays=[0.1], ratios=ratios, trust_coefs=[1.0], eps=[0.0])
"""
    environment = {**os.environ, **dict([f"FAKE_CUDA_{variable}".split("=")])}
    done = subprocess.run([sys.executable, "-c", step], env=environment, capture_output=True, text=True)
    if error is None:
        assert done.returncode == 0, done.stderr
    else:
        assert re.search(error, done.stderr)


@on_fake_device
def test_the_fake_device_reads_numbers_of_the_host_at_the_call():
    x, number, graph = torch.ones(3, device="cuda"), torch.tensor(2.0), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * number
    number.fill_(7)
    graph.replay()
    assert y.tolist() == [2, 2, 2]


@on_fake_device
@pytest.mark.parametrize("use", ["query", "synchronize", "wait"])
def test_the_fake_device_refuses_an_event_of_a_capture_that_is_over(use):
    event, x = torch.cuda.Event(), torch.ones(3, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x += 1
        event.record()
    with pytest.raises(RuntimeError, match="CUDA error"):
        getattr(event, use)()


@on_fake_device
def test_the_fake_device_refuses_a_stream_that_joins_a_capture():
    step = """
import torch
event, x = torch.cuda.Event(), torch.ones(3, device="cuda")
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    x += 1
    event.record()
    torch.cuda.Stream().wait_event(event)
"""
    done = subprocess.run([sys.executable, "-c", step], capture_output=True, text=True)  # torch does not recover
    assert re.search("wait_event.*CUDA error: operation not supported", done.stderr, re.DOTALL)
