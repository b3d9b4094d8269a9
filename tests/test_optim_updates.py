"""Ratios of updates for a base that multiplies by them itself, under LAMB.

The oracle is the same base without the attribute, whose updates LAMB scales, and a step by hand.
"""

import pytest
import torch
from sgd_cases import parameter, with_gradient
from test_optim_protocol import example
from torch import nn

from torchlars import LAMB, LARS

SignSGD = example("MySignSGD")
pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(SignSGD):
    takes_ratios_of_updates = False


class MeasuresItself(torch.optim.Optimizer):
    """A base that decides by itself, in the pass of its own update."""

    takes_ratios_of_updates = True

    @torch.no_grad()
    def step(self, closure=None, *, trust_ratios=None):
        for index, group in enumerate(self.param_groups):
            options = trust_ratios.update_options(index)
            for param in group["params"]:
                if param.grad is None:
                    continue
                update, ratio = param.grad.sign() + group["weight_decay"] * param, torch.ones((), dtype=torch.float64)
                if options is not None:
                    assert options.keys() == {"trust_coef", "eps", "clip"}
                    if param.norm() != 0 and update.norm() != 0:
                        ratio = options["trust_coef"] * param.norm() / (update.norm() + options["eps"])
                    ratio = ratio.clamp(max=1.0) if options["clip"] else ratio
                    trust_ratios.report([param], ratio.reshape(1))
                param -= group["lr"] * ratio * update


class MeasuresNorms(torch.optim.Optimizer):
    """A base that measures by itself, and leaves it to LAMB to complete norms and decide."""

    takes_ratios_of_updates = True

    @torch.no_grad()
    def step(self, closure=None, *, trust_ratios=None):
        layers = []
        for index, group in enumerate(self.param_groups):
            params = [param for param in group["params"] if param.grad is not None]
            updates = [param.grad.sign() + group["weight_decay"] * param for param in params]
            norms = torch.stack([x.detach().square().sum() for x in [*params, *updates]]) if params else torch.empty(0)
            layers.append((index, params, updates, norms.double()))
        decided = trust_ratios.decide_updates([(index, params, norms) for index, params, _, norms in layers])
        for (index, params, updates, _), ratios in zip(layers, decided, strict=True):
            for i, param in enumerate(params):
                param -= self.param_groups[index]["lr"] * (updates[i] if ratios is None else ratios[i] * updates[i])


def groups_of(seed=0):
    params = [
        with_gradient(parameter(*shape, scale=scale, dtype=torch.float64))
        for shape, scale in [((3, 4), 2.0), ((5,), 0.1), ((7, 2), 30.0)]
    ]
    params[2].grad = None if seed else params[2].grad
    left = with_gradient(parameter(3, dtype=torch.float64))
    zero = with_gradient(nn.Parameter(torch.zeros(4, dtype=torch.float64)))
    return [
        {"params": params[:2], "lr": 0.25, "weight_decay": 0.1},
        {"params": [params[2], zero], "trust_coef": 0.3, "clip": True, "eps": 0.5},
        {"params": [left], "trust_coef": None},
    ]


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def test_an_update_by_hand(backend):
    """‖w‖ = 5, u = (1, −1) + 0.5 · (3, 4) = (2.5, 1): r = 0.6 · 5 / (√7.25 + 0.25)."""
    for base in (SignSGD, Plain, MeasuresItself, MeasuresNorms):
        param = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        param.grad = torch.tensor([0.3, -0.4], dtype=torch.float64)
        optimizer = LAMB(base([param], {"lr": 0.5, "weight_decay": 0.5}), trust_coef=0.6, eps=0.25)
        optimizer.step()
        r = 0.6 * 5 / (7.25**0.5 + 0.25)
        torch.testing.assert_close(
            optimizer.trust_ratios()[param], torch.tensor(r, dtype=torch.float64), rtol=1e-14, atol=1e-15
        )
        torch.testing.assert_close(
            param.detach(), torch.tensor([3 - 0.5 * r * 2.5, 4 - 0.5 * r], dtype=torch.float64), rtol=1e-14, atol=1e-15
        )
        assert param.grad.tolist() == [0.3, -0.4]


@pytest.mark.parametrize("base", [SignSGD, MeasuresItself, MeasuresNorms])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_base_that_takes_them_steps_as_one_whose_updates_are_scaled(base, seed, backend):
    ours, theirs = (
        LAMB(cls(groups_of(seed), {"lr": 0.5, "weight_decay": 0.2}), trust_coef=0.7, eps=0.1) for cls in (base, Plain)
    )
    for _ in range(3):
        ours.step()
        theirs.step()
        for one, other in zip(params_of(ours), params_of(theirs), strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-12, atol=1e-15)
        ratios = [[o.trust_ratios().get(param) for param in params_of(o)] for o in (ours, theirs)]
        assert [ratio is None for ratio in ratios[0]] == [ratio is None for ratio in ratios[1]]
        for one, other in zip(*ratios, strict=True):
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    assert sum(ratio is not None for ratio in ratios[0]) == (4 if seed == 0 else 3)


class Both(SignSGD):
    """A base that takes ratios of either kind, and shows what it is told."""

    takes_trust_ratios = True

    def step(self, closure=None, *, trust_ratios=None):
        params = [param for param in self.param_groups[0]["params"] if param.grad is not None]
        updates = [param.grad for param in params]
        self.of_gradients = trust_ratios.measure(0, params), trust_ratios.options(0)
        self.of_updates = trust_ratios.measure_updates([(0, params, updates)])[0], trust_ratios.update_options(0)


@pytest.mark.parametrize("wrap", [LARS, LAMB])
def test_a_base_that_takes_both_kinds_is_asked_for_one_at_a_time(wrap, backend):
    optimizer = wrap(Both([with_gradient(parameter(3))], {"lr": 0.5, "weight_decay": 0.2}))
    optimizer.step()
    has, has_not = optimizer.optim.of_gradients, optimizer.optim.of_updates
    if wrap is LAMB:
        has, has_not = has_not, has
    assert has_not == (None, None)
    assert all(found is not None for found in has)


def test_lars_adapts_a_base_that_takes_ratios_of_updates_alone_as_any_other(backend):
    """Its ``step`` is not given the keyword."""
    ours, theirs = (
        LARS(cls(groups_of(), {"lr": 0.5, "weight_decay": 0.2}), weight_decay="decoupled") for cls in (SignSGD, Plain)
    )
    ours.step()
    theirs.step()
    for one, other in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(one, other)


class Asks(torch.optim.SGD):
    takes_ratios_of_updates = True

    def __init__(self, params, ask):
        super().__init__(params, lr=0.5, momentum=0.9)
        self.ask = ask

    def step(self, closure=None, *, trust_ratios=None):
        trust_ratios.measure_updates([(0, *self.ask(self.param_groups[0]["params"]))])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda params: (params, [params[0]]), r"one for each of params \(group: 0, params: 3, updates: 1\)"),
        (
            lambda params: (params[:1], [torch.ones(4)]),
            r"their parameter's shape \(group: 0, parameter: 0, shape: \(3,\)",
        ),
        (lambda params: (params[1:2], params[1:2]), r"must have gradients \(group: 0, parameter: 1\)"),
        (lambda params: ([nn.Parameter(torch.ones(3))], [torch.ones(3)]), r"must be of the group \(group: 0, got one"),
        (
            lambda params: ([params[0], params[2]], [torch.ones(3)] * 2),
            r"one device and dtype \(group: 0, parameter: 2",
        ),
    ],
)
def test_what_cannot_be_measured_is_named_and_nothing_changes(ask, message, backend):
    params = [with_gradient(parameter(3)), parameter(3), with_gradient(parameter(3, dtype=torch.bfloat16))]
    before = [param.detach().clone() for param in params]
    optimizer = LAMB(Asks(params, ask))
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert optimizer.trust_ratios() == {}


def step_sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    results = []
    for is_sharded in (True, False):
        param = nn.Parameter(torch.arange(15.0).reshape(5, 3) + 1)
        grad = torch.linspace(-1, 1, 15).reshape(5, 3)
        if is_sharded:
            param = nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)]))
            grad = distribute_tensor(grad, mesh, [Shard(0)])
        param.grad = grad
        optimizer = LAMB(SignSGD([param], {"lr": 0.5, "weight_decay": 0.1}), trust_coef=0.5)
        for _ in range(2):
            optimizer.step()
        results.append(param.full_tensor().detach() if is_sharded else param.detach())
    return results


def test_ratios_of_sharded_updates_are_those_of_whole_layers(workers):
    for sharded, whole in workers(2, step_sharded):
        torch.testing.assert_close(sharded, whole, rtol=1e-6, atol=0)
