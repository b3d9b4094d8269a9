"""A GradScaler over torchlars.optim.SGD with momentum in 8 bits: skipped steps, without waiting for the device."""

import pytest
import torch
from coded_layers import CODES, ORDER, SCALES, assert_same_runs, in_order, sgd
from coded_layers import give_gradients as give_all_gradients

from torchlars import LARS

pytestmark = pytest.mark.usefixtures("one_thread")

OVERFLOWS = {"first": [0], "two first": [0, 1], "later": [2], "none": []}
STEPS = 5


@pytest.fixture
def reads(monkeypatch):
    """How often the scaler reads on the host whether to take a step."""
    counted, waits = [], torch.amp.GradScaler._maybe_opt_step

    def maybe_opt_step(scaler, *args, **kwargs):
        counted.append(scaler)
        return waits(scaler, *args, **kwargs)

    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", maybe_opt_step)
    return counted


def give_gradients(optimizer, step):
    """None for float16, which a scaler that waits does not unscale."""
    give_all_gradients(optimizer, step)
    for param in in_order(optimizer):
        param.grad = None if param.dtype == torch.float16 else param.grad


def scaled_gradients(optimizer, scaler, step, overflows):
    """Gradients that are scaled by a power of two."""
    give_gradients(optimizer, step)
    scale = scaler.scale(torch.ones(()))
    for param in in_order(optimizer):
        if param.grad is not None:
            param.grad = param.grad * scale.to(param.grad.dtype)
    if overflows:
        in_order(optimizer)[0].grad[3, 5] = torch.inf


@pytest.mark.parametrize("dampening", [0.0, 0.25])
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("wrap", [lambda base: base, LARS], ids=["plain", "LARS"])
def test_skipped_steps_leave_no_trace_but_zeros(wrap, overflow, dampening, backend, reads):
    """A first step is undampened, which only the host can know: it waits until momentum has begun."""
    optimizer, twin = wrap(sgd(dampening=dampening)), wrap(sgd(dampening=dampening))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    waited = []
    for step in range(STEPS):
        before = [param.detach().clone() for param in in_order(optimizer)]
        scaled_gradients(optimizer, scaler, step, step in OVERFLOWS[overflow])
        reads.clear()
        scaler.step(optimizer)
        scaler.update()
        waited.append(len(reads))
        if step in OVERFLOWS[overflow]:
            assert all(map(torch.equal, in_order(optimizer), before))
            for param in in_order(optimizer):
                for name, kept in optimizer.state[param].items():
                    assert kept.any() == (step == 2) or name == ORDER
            has_codes = [CODES in optimizer.state[param] for param in in_order(optimizer)]
            assert any(has_codes) == (dampening == 0.0 or step == 2)
        else:
            give_gradients(twin, step)
            twin.step()
            assert_same_runs(optimizer, twin)
    begins = len(OVERFLOWS[overflow]) if overflow in ("first", "two first") else 0
    assert waited == [int(dampening != 0 and step <= begins) for step in range(STEPS)]
    assert optimizer.state[in_order(optimizer)[0]][SCALES].all()


def test_an_inv_scale_that_rounds_is_that_of_the_op(backend):
    """A scale that is no power of two: gradients are multiplied by its inverse in float32, once."""
    optimizer, twin = sgd(), sgd()
    for step in range(3):
        give_gradients(optimizer, step)
        give_gradients(twin, step)
        inverse = torch.tensor(3.0).double().reciprocal().float()
        for param in in_order(twin):
            param.grad = None if param.dtype.itemsize == 2 else param.grad * inverse
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.zeros(())
        for param in in_order(optimizer):
            param.grad = None if param.dtype.itemsize == 2 else param.grad
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        twin.step()
    assert_same_runs(optimizer, twin)
