"""What a step left behind that failed or was interrupted: one test a failing, with its story."""

import gc
from collections import defaultdict
from functools import partial

import pytest
import torch
from small_layers import assert_close, float64, layer, sparse_rows, trust_ratio
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import torchlars
from torchlars import LAMB, LARS, ops
from torchlars.step import Step

# Steps that fail


class Refuses(SGD):
    """A base that raises before it has moved anything, like one that finds no memory for its first state."""

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        raise torch.OutOfMemoryError("no memory for the state")


def dense(param):
    param.grad = torch.randn(param.shape, dtype=param.dtype)


def permuted(param):
    param.grad = torch.randn(param.shape[::-1], dtype=param.dtype).permute(*reversed(range(param.ndim)))


def in_float32(param):
    param.grad_dtype = torch.float32
    param.grad = torch.randn(param.shape, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "maximize", "scaled"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"lr_in_momentum": True}, True, False),
        ({"lr_in_momentum": True, "norm": "decayed"}, False, True),
        ({"clip": True}, True, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("fill", [dense, permuted, in_float32, sparse_rows])
def test_a_step_that_the_base_refuses(backend, options, fill, maximize, scaled):
    """It had scaled the gradients; taken again, it was another step. They are put back."""
    param = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    fill(param)
    weight_decay = 0.0 if fill is sparse_rows else 0.1
    optimizer = LARS(Refuses([param], lr=0.5, weight_decay=weight_decay, maximize=maximize), **options)
    if scaled:
        param.grad = 1024 * param.grad
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    before = param.grad.to_dense().clone()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    tolerance = 1e-6 if fill is in_float32 else 1e-12
    torch.testing.assert_close(param.grad.to_dense(), before, rtol=tolerance, atol=tolerance)
    assert optimizer.param_groups[0]["weight_decay"] == weight_decay
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("scale", [None, 4.0, 2.0**100])
def test_a_refused_step_with_a_ratio_that_cannot_be_inverted(backend, scale):
    """1 / r overflowed float32, and in place of the base's error came one of torch's; what followed was not put back."""
    params = [nn.Parameter(torch.full((4,), size)) for size in (1.0, 1e-20, 1.0)]
    optimizer = LARS(Refuses(params, lr=0.1, weight_decay=0.1))
    for param, size in zip(params, (1.0, 1e20, 1.0), strict=True):
        param.grad = torch.full((4,), size) if scale is None else torch.full((4,), size).clamp(max=1e8) * scale
    if scale is not None:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    before = [param.grad.clone() for param in params]
    with pytest.raises(torch.OutOfMemoryError, match="no memory for the state"):
        optimizer.step()
    for index in (0, 2):
        torch.testing.assert_close(params[index].grad, before[index])
    assert "grad_scale" not in vars(optimizer)
    assert "found_inf" not in vars(optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_a_closure_and_a_base_that_refuses_the_step(backend):
    """What the closure left in the gradients is put back."""
    param = layer()
    optimizer = LARS(Refuses([param], lr=0.5, weight_decay=0.1))

    def closure():
        param.grad = float64([-0.4, 0.3])

    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(closure)
    assert_close(param.grad, float64([-0.4, 0.3]))


def test_a_parameter_that_grew(backend):
    """Its state is of the old shape, at which Adam raises before it has moved the parameter."""
    param = layer()
    optimizer = LARS(Adam([param], lr=0.5, weight_decay=0.1))
    optimizer.step()
    param.grad = None
    param.data = torch.randn(5, dtype=torch.float64)
    param.grad = torch.randn(5, dtype=torch.float64)
    before = param.grad.clone()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert_close(param.grad, before)


@pytest.mark.parametrize(
    "base", [Adam, AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
             torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Muon,
             partial(SGD, fused=True)],
)  # fmt: skip
def test_a_sparse_gradient_that_the_base_does_not_take(backend, base):
    """Some of the base's groups have moved by the time that it comes to one with a sparse gradient: so it is asked."""
    params = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2)]
    dense(params[0])
    sparse_rows(params[1])
    before = [(param.detach().clone(), param.grad.to_dense().clone()) for param in params]
    optimizer = LARS(base([{"params": [param]} for param in params], lr=0.5))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0  # what is decayed cannot be sparse
    with pytest.raises(RuntimeError, match=r"sparse gradients .*\(group: 1, parameter: 0"):
        optimizer.step()
    for param, (value, grad) in zip(params, before, strict=True):
        assert torch.equal(param, value)
        assert torch.equal(param.grad.to_dense(), grad)


def test_gradients_of_a_step_that_has_begun_stay_as_they_are(backend):
    """Once the base has moved a parameter there is no going back: its gradient is what it has been moved by."""

    class Fails(SGD):
        def step(self, closure=None):
            super().step()
            raise ValueError("too late")

    param = layer()
    optimizer = LARS(Fails([param], lr=1.0, weight_decay=0.1))
    with pytest.raises(ValueError, match="too late"):
        optimizer.step()
    assert_close(param.grad, trust_ratio(weight_decay=0.1) * float64([-0.4 + 0.3, 0.3 + 0.4]))


# Interrupts


class Interrupted(dict):
    """A parameter group that is interrupted once, as a certain value is about to be written, or just after it was."""

    def __init__(self, group, interrupted_at, is_written):
        super().__init__(group)
        self.interrupted_at, self.is_written = interrupted_at, is_written

    def __setitem__(self, name, value):
        at, self.interrupted_at = self.interrupted_at, self.interrupted_at if self.get(name) is None else None
        interrupts = at == (name, value)
        if not interrupts:
            self.interrupted_at = at
        if interrupts and not self.is_written:
            raise KeyboardInterrupt
        super().__setitem__(name, value)
        if interrupts:
            raise KeyboardInterrupt


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("at", [("weight_decay", 0.0), ("lr", 1.0), ("weight_decay", 0.1), ("lr", 0.5)], ids=str)
def test_an_interrupt_leaves_no_hidden_hyper_parameter(at, is_written):
    """Ctrl-C while hyper-parameters were put back left a weight decay of 0 and an lr of 1 for good."""
    params = [layer(), layer()]
    base = SGD([{"params": [param]} for param in params], lr=0.5, weight_decay=0.1)
    base.param_groups[0] = Interrupted(base.param_groups[0], at, is_written)
    optimizer = LARS(base, lr_in_momentum=True)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.1)] * 2


@pytest.mark.parametrize("first", range(9))
def test_the_gradient_of_a_tied_layer_is_put_back_as_its_first_group_adapted_it(first):
    """The last group's weight decay was taken off, or with many groups that of any."""
    groups = [{"params": [layer()], "weight_decay": 0.1} for _ in range(9)]
    base = Refuses([*groups, {"params": [layer()], "weight_decay": 0.3}], lr=0.5)
    tied = base.param_groups[first]["params"][0]
    base.param_groups[-1]["params"] = [tied]
    before = tied.grad.clone()
    with pytest.raises(RuntimeError, match="no memory"):
        LARS(base).step()
    assert_close(tied.grad, before)


def test_what_two_interrupts_left_is_put_back_by_the_next_step():
    """The first one comes before hyper-parameters are put back, the second one while they are."""
    param = layer()
    optimizer = LARS(SGD([param], lr=0.5, weight_decay=0.1))
    optimizer._hidden.replace([(optimizer.param_groups[0], "weight_decay", 0.0)])  # what a step leaves that ends there
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert_close(param.grad, trust_ratio(weight_decay=0.1) * float64([-0.4 + 0.3, 0.3 + 0.4]))
    optimizer._hidden.replace([(optimizer.param_groups[0], "weight_decay", 0.0)])
    optimizer.param_groups[0]["weight_decay"] = 0.7  # by the user, who found 0
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.7


@pytest.mark.parametrize("wrap", [partial(LARS, apply_to="update"), LAMB], ids=["LARS-update", "LAMB"])
def test_a_failure_while_updates_are_scaled_leaves_no_scale(wrap, monkeypatch):
    """It left the tensors of a GradScaler on the optimizer, by which the next step would have unscaled."""

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    optimizer = wrap(SGD([layer(torch.float32)], lr=0.5, fused=True))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    monkeypatch.setattr(Step, "scale_updates", fails)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    for who in (optimizer, optimizer.optim):
        assert {"grad_scale", "found_inf"}.isdisjoint(vars(who))


def test_a_group_that_changes_while_it_is_walked(extension):
    """Its list was borrowed while the hash of a parameter, which is Python code, could change it: SIGSEGV."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(2000)]
    for param in params:
        param.grad = torch.ones(4)
    base = torchlars.optim.SGD(params, lr=0.1, momentum=0.9)
    base.step()
    base.state = defaultdict(dict, reversed(base.state.items()))  # in the order of parameters, no hash is needed
    hashed = Tensor.__hash__
    calls = []

    def shrinks(tensor):
        calls.append(None)
        if len(calls) == 100:
            del params[:], base.param_groups[0]["params"][:]
            base.state.clear()
            gc.collect()
            calls.append([object() for _ in range(10_000)])
        return hashed(tensor)

    layers = extension.SgdLayers()
    options = ops.fast_options("SgdOptions", lr=0.1, momentum=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__hash__", shrinks)
        left = layers.add([(base.param_groups[0], options)], base.state)
    assert sum(len(bucket.params) for bucket in layers.buckets) + len(left) == 100
