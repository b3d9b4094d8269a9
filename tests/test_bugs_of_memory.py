"""What failed where memory is shared, laid out otherwise, or not there: one test a failing, with its story."""

from functools import partial

import numpy as np
import pytest
import torch
from small_layers import assert_close, float64, layer, sparse_rows
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

import torchlars
from torchlars import LAMB, LARS, ops

# Memory that is shared


def adapted(param, grad, weight_decay, trust_coef=0.001, eps=1e-8):
    """What LARS makes of a gradient, of the values that both have now."""
    w, g = param.detach().clone(), grad.to_dense().clone()
    return trust_coef * w.norm() / (g.norm() + weight_decay * w.norm() + eps) * (g + weight_decay * w)


def one_gradient():
    """Of a sum of two parameters, torch.autograd.grad returns one tensor twice."""
    a, b = (nn.Parameter(torch.randn(16, 4, dtype=torch.float64)) for _ in range(2))
    x = torch.randn(8, 16, dtype=torch.float64)
    a.grad, b.grad = torch.autograd.grad(((x @ (a + b)) ** 2).mean(), [a, b])
    assert a.grad is b.grad
    return a, b


def two_views(of_a, of_b):
    def make():
        buffer = torch.randn(24, dtype=torch.float64)
        grads = of_a(buffer), of_b(buffer)
        params = [nn.Parameter(torch.randn(grad.shape, dtype=torch.float64)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return params

    return make


def of_numpy():
    """Two storages of one memory, neither of which knows of the other."""
    params = [nn.Parameter(torch.randn(16, dtype=torch.float64)) for _ in range(2)]
    buffer = np.random.default_rng(0).standard_normal(24)
    params[0].grad, params[1].grad = torch.from_numpy(buffer[:16]), torch.from_numpy(buffer[8:])
    return params


def sparse():
    """An embedding's gradient, given to two."""
    params = [nn.Parameter(torch.randn(4, 2, dtype=torch.float64)) for _ in range(2)]
    sparse_rows(params[0])
    params[1].grad = params[0].grad = params[0].grad.coalesce()
    return params


def of_a_weight():
    """The gradient of a · b with respect to a is b."""
    a, b = (nn.Parameter(torch.randn(16, dtype=torch.float64)) for _ in range(2))
    a.grad, b.grad = b.detach(), torch.randn(16, dtype=torch.float64)
    return a, b


def of_its_own_weight():
    """The gradient of ‖a‖² / 2 is a."""
    a, b = (nn.Parameter(torch.randn(16, dtype=torch.float64)) for _ in range(2))
    a.grad, b.grad = a.detach(), torch.randn(16, dtype=torch.float64)
    return a, b


SHARED_GRADIENTS = {
    "one gradient": one_gradient,
    "views": two_views(lambda x: x[:16], lambda x: x[8:]),
    "a transposed view": two_views(lambda x: x.view(4, 6), lambda x: x.view(4, 6).t()),
    "a view of a view": two_views(lambda x: x, lambda x: x.detach().view(2, 12)[1]),
    "numpy": of_numpy,
    "sparse": sparse,
    "another's weight": of_a_weight,
    "its own weight": of_its_own_weight,
}


@pytest.mark.parametrize("groups", ["one group", "two groups", "one left alone"])
@pytest.mark.parametrize("kind", SHARED_GRADIENTS)
def test_gradients_that_share_memory(backend, kind, groups):
    """Over a base of torch, a gradient that two layers held was scaled once for each: both steps were 100 % off.

    Likewise where views overlapped, and where the other layer was left to the base (``trust_coef=None``).
    """
    a, b = SHARED_GRADIENTS[kind]()
    weight_decay = 0.0 if kind == "sparse" else 0.1
    expected = [param - 0.5 * adapted(param, param.grad, weight_decay) for param in (a, b)]
    if groups == "one left alone":
        expected[1] = b - 0.5 * (b.grad.to_dense() + weight_decay * b)
    given = {
        "one group": [{"params": [a, b]}],
        "two groups": [{"params": [a]}, {"params": [b]}],
        "one left alone": [{"params": [a]}, {"params": [b], "trust_coef": None}],
    }[groups]
    LARS(SGD(given, lr=0.5, weight_decay=weight_decay)).step()
    if kind == "another's weight" and groups == "one left alone":
        return  # b.grad is right then, and what the base makes of a.grad is checked with the other groups
    assert_close(a, expected[0].detach())
    assert_close(b, expected[1].detach())


@pytest.mark.parametrize("kind", SHARED_GRADIENTS)
def test_gradients_that_share_memory_hold_what_was_taken(backend, kind):
    """After the step each holds its own r · (g + λw), as all gradients do."""
    a, b = SHARED_GRADIENTS[kind]()
    expected = [adapted(param, param.grad, 0.0) for param in (a, b)]
    LARS(SGD([a, b], lr=2.0)).step()
    for param, grad in zip((a, b), expected, strict=True):
        assert_close(param.grad.to_dense(), grad)


def test_a_scaled_gradient_that_two_layers_hold(backend):
    """It was unscaled once for each, where updates are scaled and the base leaves unscaling to LARS."""
    a, b = one_gradient()
    expected = [param - 0.5 * param.grad for param in (a, b)]
    base = SGD([{"params": [a]}, {"params": [b], "trust_coef": None}], lr=0.5, fused=True)
    optimizer = LARS(base)
    expected[0] = (a - 0.5 * adapted(a, a.grad, 0.0)).detach()
    a.grad = b.grad = 4096 * a.grad
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4096.0), torch.tensor(0.0)
    optimizer.step()
    assert_close(a, expected[0])
    assert_close(b, expected[1].detach())


def test_what_is_shared_is_looked_for_only_where_it_may_be(extension):
    """Two reference counts say of most gradients and weights that nobody shares them; nothing else is asked then."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10))
    params = list(model.parameters())
    base = SGD(params, lr=0.1, momentum=0.9)
    group = base.param_groups[0]
    how = {"weight_decay": 0.1, "trust_coef": 0.001, "eps": 0.0}

    def shares_memory():
        lars, sgd = extension.LarsLayers(), extension.SgdLayers()
        lars.add([(group, ops.fast_options("LarsOptions", **how))])
        left = sgd.add([(group, ops.fast_options("SgdOptions", **how, lr=0.1, momentum=0.9))], base.state)
        assert left == []
        return lars.shares_memory, sgd.shares_memory

    for _ in range(2):
        base.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        base.step()
        assert shares_memory() == (False, False)
    nn.utils.clip_grad_norm_(params, 1.0)  # gradients have Python objects now
    held = [param.grad for param in params]
    for tensor in (*params, *held):
        assert tensor.untyped_storage().nbytes() > 0  # and so have storages
    assert shares_memory() == (True, False)  # somebody holds them: it might be the state of a base
    first = held[0]
    held.clear()
    tensor = None
    params[0].grad = None
    assert shares_memory() == (False, False)
    params[0].grad = first.detach()
    assert shares_memory() == (True, False)
    params[0].grad = None
    view = params[3].data
    assert shares_memory() == (False, True)
    assert view is not None


@pytest.mark.parametrize("whose", [0, 1])
def test_a_gradient_that_is_momentum(backend, whose):
    """It was scaled, and with it the momentum of a layer, whichever one had it."""
    results = []
    for given in (lambda buffer: buffer, lambda buffer: buffer.clone()):
        params = [layer(), layer()]
        base = SGD(params, lr=1.0, momentum=0.9, weight_decay=0.1)
        optimizer = LARS(base, trust_coef=0.1)
        optimizer.step()
        params[0].grad = given(base.state[params[whose]]["momentum_buffer"])
        params[1].grad = float64([-0.4, 0.3])
        optimizer.step()
        results.append(torch.stack([param.detach() for param in params]))
    assert_close(results[0], results[1])


@pytest.mark.parametrize("wrap", [lambda base: base, LARS], ids=["SGD", "LARS"])
@pytest.mark.parametrize("kind", ["one memory", "views", "momentum", "a gradient is a weight"])
def test_weights_that_share_memory(backend, threads, wrap, kind):
    """Over torchlars.optim.SGD two threads raced: bits differed from run to run, elements were off by up to 1.8.

    Right is what one thread does, layer by layer in order, with the trust ratios and gradients of before the step.
    """
    lr, momentum, weight_decay, size = 0.5, 0.9, 0.1, 40_000

    def make():
        random = torch.Generator().manual_seed(0)
        buffer = torch.randn(2 * size, generator=random, dtype=torch.float64)
        views = {"one memory": (buffer, buffer), "views": (buffer[:size], buffer[size // 2 :][:size])}
        a, b = map(nn.Parameter, views.get(kind, (buffer[:size], buffer[size:])))
        for param in (a, b):
            param.grad = 3 * torch.randn(param.shape, generator=random, dtype=torch.float64)
        if kind == "a gradient is a weight":
            b.grad = a.detach()
        return a, b

    a, b = make()
    buffers = [torch.full_like(param, 0.25) for param in (a, b)]
    if kind == "momentum":
        buffers[1] = buffers[0]
    grads = [param.grad.clone() for param in (a, b)]
    ratios = [1.0, 1.0]
    if wrap is LARS:
        norms = [(param.detach().norm(), grad.norm()) for param, grad in zip((a, b), grads, strict=True)]
        ratios = [0.001 * w / (g + weight_decay * w + 1e-8) for w, g in norms]
    with torch.no_grad():
        for param, grad, ratio, m in zip((a, b), grads, ratios, buffers, strict=True):
            m.mul_(momentum).add_(ratio * (grad + weight_decay * param))
            param.sub_(lr * m)
    expected = [param.detach().clone() for param in (a, b)]

    threads(2)
    for _ in range(5):
        a, b = make()
        base = torchlars.optim.SGD([a, b], lr=lr, momentum=momentum, weight_decay=weight_decay)
        buffers = [torch.full_like(param, 0.25) for param in (a, b)]
        if kind == "momentum":
            buffers[1] = buffers[0]
        for param, m in zip((a, b), buffers, strict=True):
            base.state[param]["momentum_buffer"] = m
        wrap(base).step()
        assert_close(a, expected[0])
        assert_close(b, expected[1])


@pytest.mark.parametrize("wrap", [LAMB, partial(LARS, apply_to="update")], ids=["LAMB", "LARS-update"])
def test_updates_of_weights_that_share_memory(backend, threads, wrap):
    """Two threads raced there as well. All trust ratios are decided before the first update is scaled."""

    def step(number):
        threads(number)
        random = torch.Generator().manual_seed(0)
        buffer = torch.randn(400_000, generator=random)
        a, b = nn.Parameter(buffer), nn.Parameter(buffer)
        for param in (a, b):
            param.grad = 3 * torch.randn(param.shape, generator=random)
        before = buffer.clone()
        optimizer = wrap(SGD([a, b], lr=0.5, weight_decay=0.1))
        optimizer.step()
        expected = before.clone()
        for param in (a, b):
            expected -= 0.5 * (param.grad + 0.1 * expected)
        for ratio in optimizer.trust_ratios().values():
            expected = before + ratio * (expected - before)
        torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-6)
        return buffer

    expected = step(1)
    for _ in range(5):
        assert torch.equal(step(2), expected)


class Taking(SGD):
    """A base that takes trust ratios, and leaves the rest of its step to torch."""

    takes_trust_ratios = True

    def step(self, closure=None, *, trust_ratios=None):
        for index, group in enumerate(self.param_groups):
            ratios = None if trust_ratios is None else trust_ratios.measure(index, group["params"])
            for param, ratio in zip(group["params"], () if ratios is None else ratios, strict=ratios is not None):
                param.grad.mul_(ratio)
        return super().step(closure)


@pytest.mark.parametrize("base", [SGD, Adam, AdamW, Adagrad, Taking])
@pytest.mark.parametrize("wrap", [LARS, partial(LARS, apply_to="update"), LAMB], ids=["LARS", "LARS-update", "LAMB"])
@pytest.mark.parametrize("options", [{}, {"trust_coef": None}], ids=["adapted", "left alone"])
def test_a_fused_base_and_a_gradient_of_another_layout(backend, wrap, base, options):
    """torch's fused optimizers take weight and gradient side by side in memory, whatever their strides.

    LARS hands over a gradient that is laid out as the weight is.
    """

    def step(fused, layout):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(6, 6, dtype=torch.float64).t().contiguous().t())
        optimizer = wrap(base([{"params": [param], **options}], lr=0.5, weight_decay=0.1, fused=fused))
        for _ in range(2):
            param.grad = layout(torch.randn(6, 6, dtype=torch.float64))
            optimizer.step()
        return param

    expected = step(False, lambda grad: grad).detach()
    assert_close(step(True, lambda grad: grad), expected)
    assert_close(step(True, lambda grad: grad.t().contiguous().t()), expected)


def test_a_fused_base_and_a_weight_with_gaps(backend):
    """They do not know gaps either, and what they wrote there was someone else's."""
    rows = torch.randn(4, 6)
    before = rows.clone()
    param = nn.Parameter(rows[:, :3])
    param.grad = torch.randn(4, 3)
    with pytest.raises(
        RuntimeError, match=r"parameters must fill their memory without gaps where fused=True .*use fused=F"
    ):
        LARS(SGD([param], lr=0.5, fused=True)).step()
    assert torch.equal(rows, before)
    assert LARS(SGD([param], lr=0.5)).step() is None
    assert torch.equal(rows[:, 3:], before[:, 3:])


# Memory that is not there


def freed(tensor):
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("what", ["parameter", "gradient"])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: LARS(SGD(params, lr=0.5, weight_decay=0.1)),
        lambda params: LARS(torchlars.optim.SGD(params, lr=0.5, weight_decay=0.1)),
        lambda params: torchlars.optim.SGD(params, lr=0.5, weight_decay=0.1),
        lambda params: LARS(SGD(params, lr=0.5), apply_to="update"),
        lambda params: LAMB(SGD(params, lr=0.5)),
    ],
    ids=["LARS", "LARS-SGD", "SGD", "LARS-update", "LAMB"],
)
def test_freed_storage(backend, make, what):
    """It was read and written all the same, which crashed."""
    params = [layer(), layer()]
    before = [params[0].detach().clone(), params[0].grad.clone()]
    freed(params[1] if what == "parameter" else params[1].grad)
    with pytest.raises(RuntimeError, match=rf"{what}s must have memory .*\(group: 0, parameter: 1, shape: \(2,\)\)"):
        make(params).step()
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[0].grad, before[1])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda params: LARS(SGD(params, lr=0.5)),
        lambda params: LARS(torchlars.optim.SGD(params, lr=0.5)),
        lambda params: torchlars.optim.SGD(params, lr=0.5),
        lambda params: LAMB(SGD(params, lr=0.5)),
    ],
    ids=["LARS", "LARS-SGD", "SGD", "LAMB"],
)
def test_inference_parameters(backend, wrap):
    """torch forbids to write them outside of inference mode. An op of ours wrote them all the same."""
    with torch.inference_mode():
        param = nn.Parameter(float64([3.0, 4.0]), requires_grad=False)
    param.grad = float64([-0.4, 0.3])
    with pytest.raises(RuntimeError, match=r"parameters must not be inference tensors.*\(group: 0, parameter: 0"):
        wrap([param]).step()
    assert param.tolist() == [3.0, 4.0]
