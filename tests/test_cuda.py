"""What only a GPU can show: that the host never waits, and that streams and devices are respected.

That the kernels compute the right numbers is shown by tests/test_ops.py, which takes in every device there is.
"""

import pytest
import torch
from torch import nn

from torchlars import LARS, ops, reference


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
        reference.scale_by_trust_ratios_([grad], [param.detach()], [0.1], [0.001], [1e-8], False)
    return grads


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
        ratio = ops.scale_by_trust_ratios_([grad], [param], [0.1], [0.001], [1e-8], False)
        results.append((ratio, grad))
    assert all(torch.equal(r, results[0][0]) and torch.equal(g, results[0][1]) for r, g in results)


def test_two_launches_a_bucket():
    params = make()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.scale_by_trust_ratios_(
            [p.grad for p in params], [p.detach() for p in params], [0.1] * 3, [1.0] * 3, [0.0] * 3, False
        )
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "torchlars" in event.name]
    assert len(kernels) == 2
