"""What failed, in torchlars 0.1.2 and since: one test a failing, with its story."""

import copy
import io
import math
import warnings
from collections import defaultdict
from functools import partial

import pytest
import torch
from small_layers import assert_close, float64, layer, trust_ratio
from torch import nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LinearLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

import torchlars
from torchlars import LAMB, LARS, bases, param_groups

# Closures


def test_closure(backend):
    """In 0.1.2, ``step(closure)`` scaled the gradients, then had the base call the closure, which computed new ones.

    The base took those as they were, without weight decay, which was hidden: neither LARS nor decay had any effect.
    Users of Lightning, which always passes a closure, could not reproduce their losses and saw models that did not
    converge (Lightning-AI/pytorch-lightning#6523). There is a decay of 0.1 here and no gradient before the closure, so
    that every one of scaling too early, scaling twice and forgetting the decay ends elsewhere.
    """
    param = layer(grad=False)
    optimizer = LARS(SGD([param], lr=2.0, weight_decay=0.1))

    def closure():
        optimizer.zero_grad()
        loss = (param * float64([-0.4, 0.3])).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(0.0)
    r = trust_ratio(weight_decay=0.1)
    assert_close(param, float64([3.0, 4.0]) - 2.0 * r * float64([-0.4 + 0.3, 0.3 + 0.4]))


def test_closure_that_the_base_calls_many_times(backend):
    """In 0.1.2, LARS had no effect at all over LBFGS: it scaled once, before the first of many evaluations.

    A base that asks four times a step shows a wrapper that scales only the first, or only the last.
    """

    def train(adapt, wrap):
        param = layer(grad=False)
        optimizer = wrap(LBFGS([param], lr=0.1, max_iter=4, line_search_fn="strong_wolfe"))
        evaluations = 0

        def closure():
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = (param**4).sum() / 100
            loss.backward()
            adapt(param)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return param, evaluations

    def by_hand(param):
        param.grad.mul_(0.02 * param.detach().norm() / (param.grad.norm() + 1e-8))

    expected, expected_evaluations = train(by_hand, lambda base: base)
    param, evaluations = train(lambda param: None, lambda base: LARS(base, trust_coef=0.02))
    assert evaluations == expected_evaluations > 6
    assert_close(param, expected.detach())


def quadratic(condition=10.0, layers=1):
    """Parameters, and a convex loss of them whose least value is 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    axes, _ = torch.linalg.qr(normal(10, 10))
    curvature = axes * torch.logspace(0, math.log10(condition), 10, dtype=torch.float64) @ axes.T
    least = normal(10)
    params = [nn.Parameter(part.clone()) for part in normal(10).chunk(layers)]

    def loss():
        distance = torch.cat(params) - least
        return distance @ curvature @ distance / 2

    return params, loss


@pytest.mark.parametrize("trust_coef", [0.001, 0.02, 1.0])
@pytest.mark.parametrize(("condition", "layers"), [(1.0, 1), (10.0, 1), (1000.0, 1), (10.0, 2)])
def test_lbfgs_with_a_line_search(condition, layers, trust_coef):
    """LARS over LBFGS climbed, at any trust_coef: convex losses rose hundredfold, where LBFGS alone reaches 0.

    Scaled gradients are not those of the loss, so that LBFGS's estimate of the curvature is wrong, and with it the
    length of its steps. A line search measures the loss itself.
    """
    params, loss = quadratic(condition, layers)
    optimizer = LARS(LBFGS(params, line_search_fn="strong_wolfe"), trust_coef=trust_coef)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    before = loss().item()
    for _ in range(20):
        optimizer.step(closure)
    assert loss().item() < 1e-8 < 1 < before


def test_lbfgs_without_a_line_search():
    """LARS over LBFGS without a line search climbed, which is its default: now it is refused, wherever it comes in."""
    params, _ = quadratic()
    message = r"^LBFGS needs a line search under LARS \(parameter group: 0, got: line_search_fn=None\)"
    with pytest.raises(TypeError, match=message):
        LARS(LBFGS(params))
    with pytest.raises(TypeError, match=message):
        LARS.over(LBFGS)(params)
    around = SGD(params)
    around.optim, around.param_groups = (base := LBFGS(params)), base.param_groups  # as ZeroRedundancyOptimizer is
    with pytest.raises(TypeError, match=message):
        LARS(around)

    optimizer = LARS(LBFGS(params, lr=0.5, line_search_fn="strong_wolfe"))
    with pytest.raises(TypeError, match=message):
        optimizer.load_state_dict(LBFGS(params, lr=0.25).state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["line_search_fn"]) == (0.5, "strong_wolfe")
    optimizer.param_groups[0]["line_search_fn"] = None
    with pytest.raises(TypeError, match=message):
        optimizer.step(lambda: pytest.fail("the closure was evaluated"))
    LARS(LBFGS([{"params": params, "trust_coef": None}]))  # nothing is scaled


def test_closure_sees_the_weight_decay():
    """In 0.1.2, ``group["weight_decay"]`` was 0 while the closure ran, for all that it penalised or logged by it."""
    param = layer()
    optimizer = LARS(SGD([param], lr=0.5, weight_decay=0.1))
    seen = []
    optimizer.step(lambda: seen.append(optimizer.param_groups[0]["weight_decay"]))
    assert seen == [0.1]


def test_closure_that_loads_a_state_dict():
    """In 0.1.2, decays were put back by position, over whatever the groups held by then.

    A closure that rolled back to a checkpoint saw the checkpoint's decay replaced by the one from before.
    """
    param = layer()
    optimizer = LARS(SGD([param], lr=2.0, weight_decay=0.7))
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0]["weight_decay"] = 0.1
    optimizer.step(lambda: optimizer.load_state_dict(checkpoint))
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    r = trust_ratio(weight_decay=0.1)
    assert_close(param, float64([3.0, 4.0]) - 2.0 * r * float64([-0.4 + 0.3, 0.3 + 0.4]))


# Gradients


def test_sparse_gradients(backend):
    """In 0.1.2, a step with the gradients of ``nn.Embedding(..., sparse=True)`` raised, with weight decay or without.

    It added λw to every gradient, even for λ = 0, and a dense tensor cannot be added to a sparse one in place. The same
    row is looked up twice, so that a norm of the uncoalesced values is wrong as well.
    """
    embedding = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    nn.init.constant_(embedding.weight, 2.0)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    LARS(SGD(embedding.parameters(), lr=3.0)).step()
    r = 0.001 * 32**0.5 / (10**0.5 + 1e-8)
    step = torch.tensor([[0.0], [2.0], [0.0], [1.0]], dtype=torch.float64).expand(4, 2)
    assert_close(embedding.weight, 2.0 - 3.0 * r * step)


def test_expanded_gradient(backend):
    """In 0.1.2, a gradient whose elements share memory could not be written, and torch raised.

    ``expand`` gives such gradients to those who set ``.grad`` themselves.
    """
    param = nn.Parameter(torch.full((2, 8), 0.5, dtype=torch.float64))
    param.grad = float64([[0.25], [0.25]]).expand(2, 8)
    LARS(SGD([param], lr=1.0, weight_decay=0.1)).step()
    r = 0.001 * 2 / (1 + 0.1 * 2 + 1e-8)
    assert_close(param.grad, torch.full((2, 8), r * 0.3, dtype=torch.float64))


def test_tied_parameter(backend):
    """In 0.1.2, a parameter that its group listed twice was scaled twice, by the ratio of the gradient already scaled.

    ``[*encoder.parameters(), *decoder.parameters()]`` is enough, if the two share their embedding.
    """
    param = layer()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        base = SGD([param, param], lr=0.0, weight_decay=0.1)
    LARS(base).step()
    assert_close(param.grad, trust_ratio(weight_decay=0.1) * float64([-0.4 + 0.3, 0.3 + 0.4]))


def test_nan_in_a_gradient(backend):
    """In 0.1.2, one NaN in a gradient set the layer's ratio to 1, silently.

    The comparison that guards against zero norms is false for NaN too. So the layer's other weights took a step along
    the raw gradient, with an lr made for LARS, such as the 16 here, and nothing told why training broke down. Now the
    whole layer does.
    """
    param = layer()
    param.grad[0] = torch.nan
    LARS(SGD([param], lr=16.0, weight_decay=0.1)).step()
    assert param.isnan().all()


def test_a_base_that_drops_gradients_as_it_steps(backend):
    """LAMB took the layers for ones that had no gradient, and left their updates as they were."""
    param = layer()
    old, update = param.detach().clone(), 0.1 * param.detach() + param.grad
    optimizer = LAMB(SGD([param], lr=0.5, weight_decay=0.1))
    optimizer.optim.register_step_post_hook(lambda base, args, kwargs: base.zero_grad())
    optimizer.step()
    assert param.grad is None
    assert_close(param, old - 0.5 * update * old.norm() / update.norm())


# Types


def test_norms_that_float16_cannot_hold(backend):
    """In 0.1.2, float16 layers whose norm exceeds 65,504 turned into NaN at the first step.

    Norms were kept in the layer's own type: infinite, and so was the denominator with weight decay. 90,000 weights of
    300 have a norm of 90,000.
    """
    param = nn.Parameter(torch.full((90_000,), 300.0, dtype=torch.float16))
    param.grad = torch.full_like(param, 2.0)
    LARS(SGD([param], lr=1.0, weight_decay=0.01), trust_coef=0.5).step()
    r = 0.5 * 90_000 / (600 + 0.01 * 90_000)
    assert torch.equal(param.grad, torch.full_like(param.grad, r * (2 + 0.01 * 300)))
    assert torch.equal(param.detach(), torch.full_like(param.grad, 300 - r * 5))


def test_bfloat16(backend):
    """In 0.1.2, bfloat16 layers raised: the compiled function was "not implemented for 'BFloat16'"."""
    param = layer(torch.bfloat16)
    LARS(SGD([param], lr=1.0), trust_coef=0.5).step()
    assert_close(param.grad, (trust_ratio(trust_coef=0.5) * torch.tensor([-0.4, 0.3]).bfloat16().double()).bfloat16())


# Being a torch optimizer


@pytest.mark.parametrize("scheduler", [OneCycleLR, CyclicLR])
def test_schedulers_that_move_the_momentum(scheduler):
    """In 0.1.2, OneCycleLR and CyclicLR raised AttributeError: they read ``defaults``, and there were none."""
    param = layer()
    optimizer = LARS(SGD([param], lr=1.0, momentum=0.9))
    if scheduler is OneCycleLR:
        schedule = OneCycleLR(optimizer, max_lr=4.0, total_steps=10, base_momentum=0.8, max_momentum=0.95)
    else:
        schedule = CyclicLR(optimizer, base_lr=0.1, max_lr=4.0, step_size_up=3, base_momentum=0.8, max_momentum=0.95)
    base = optimizer.optim.param_groups[0]
    assert base["momentum"] == 0.95
    optimizer.step()
    schedule.step()
    assert base["lr"] > 0.1
    assert base["momentum"] < 0.95


SETS_LRS = {  # scheduler of an optimizer and lrs, one for all groups or one for each
    "OneCycleLR": lambda optimizer, lrs: OneCycleLR(optimizer, max_lr=lrs, total_steps=9),
    "CyclicLR": lambda optimizer, lrs: CyclicLR(optimizer, base_lr=[0.1, 0.01], max_lr=lrs, step_size_up=4),
    "SWALR": lambda optimizer, lrs: SWALR(optimizer, swa_lr=lrs, anneal_epochs=4),
    "eta_min": lambda optimizer, lr: CosineAnnealingLR(optimizer, T_max=8, eta_min=lr),
    "multiplies": lambda optimizer, _: LinearLR(optimizer, 0.1, total_iters=4),
}


def lr_warnings(optimizer, scheduler=None, steps=8):
    """What eight steps of two layers warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.ones_like(param)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return [str(warning.message) for warning in caught]


def weights_and_biases(lr=16.0, bias_lr=None):
    """Two groups, adapted and not, of layers that are not 0."""
    model = nn.Linear(2, 3)
    nn.init.ones_(model.bias)
    return param_groups(model, lr=lr, weight_decay=1e-4, bias_lr=bias_lr)


LARGE_LR = "a group with trust_coef=None takes its lr whole, without a trust ratio, and one of 1 or more is made for"


@pytest.mark.parametrize("base", [SGD, torchlars.optim.SGD])
@pytest.mark.parametrize("wrap", [LARS, LAMB])
@pytest.mark.parametrize(
    ("name", "lrs"),
    [("OneCycleLR", 16.0), ("CyclicLR", 16.0), ("SWALR", 4.0), ("eta_min", 1.5)],
)
def test_schedulers_that_set_one_lr_for_all_groups(name, lrs, wrap, base):
    """OneCycleLR(max_lr=16) gave the biases of ``param_groups``, which have no trust ratio, the weights' lr of 16.

    So did CyclicLR, SWALR and an ``eta_min``, and nothing told why the training broke down. Most of them do it after
    some steps only, and one warning is enough.
    """
    optimizer = wrap(base(weights_and_biases(), momentum=0.9), trust_coef=0.001)
    (message,) = lr_warnings(optimizer, SETS_LRS[name](optimizer, lrs))
    assert message.startswith(LARGE_LR)
    assert "(group: 1, lr: " in message
    assert "max_lr=[16, 0.05]" in message


@pytest.mark.parametrize(
    ("name", "lrs"),
    [
        ("OneCycleLR", [16.0, 0.05]),
        ("CyclicLR", [16.0, 0.05]),
        ("SWALR", [4.0, 0.01]),
        ("eta_min", 0.0),
        ("multiplies", None),
    ],
)
def test_schedulers_that_set_an_lr_for_each_group(name, lrs):
    optimizer = LARS(SGD(weights_and_biases(), momentum=0.9))
    assert lr_warnings(optimizer, SETS_LRS[name](optimizer, lrs)) == []


def test_large_lr_of_a_group_that_opts_out():
    """Whoever gave it: one warning where there are adapted layers beside, and the base does not find its step itself."""
    for lr in (2.0, torch.tensor(2.0)):
        assert len(lr_warnings(LARS(SGD(weights_and_biases(bias_lr=lr))))) == 1
    weights, biases = weights_and_biases(bias_lr=2.0)
    assert len(lr_warnings(LARS(SGD([weights, {**biases, "lr_in_momentum": True}]), lr_in_momentum=True))) == 1
    weights, biases = weights_and_biases(bias_lr=2.0)
    with pytest.warns(UserWarning, match=LARGE_LR):  # its gradients come from the closure
        LARS(SGD([weights, biases])).step(lambda: biases["params"][0].sum().backward())

    assert lr_warnings(LARS(SGD([biases]))) == []
    assert lr_warnings(LARS(SGD([biases, {"params": []}]))) == []
    assert lr_warnings(LARS(SGD([{**group, "trust_coef": 0.001} for group in (weights, biases)]))) == []
    assert lr_warnings(LARS(torch.optim.Adadelta(weights_and_biases(bias_lr=1.0)))) == []
    assert lr_warnings(LARS(SGD(weights_and_biases(bias_lr=0.999)))) == []


def test_hooks():
    """In 0.1.2, registering a hook of any kind raised AttributeError, and hooks of all optimizers skipped this one."""
    optimizer = LARS(SGD([layer()], lr=1.0))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    of_all = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(type(optimizer).__name__))
    try:
        optimizer.step()
    finally:
        of_all.remove()
    assert calls == ["step pre", "step post", "LARS"]
    calls.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save pre", "save post", "load pre", "load post"]


def test_state():
    """In 0.1.2, there was no ``state``: whoever looked for momenta in it got an AttributeError."""
    param = layer()
    optimizer = LARS(SGD([param], lr=1.0, momentum=0.9))
    assert len(optimizer.state) == 0
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"] is optimizer.optim.state[param]["momentum_buffer"]


def test_distributed_checkpoint():
    """In 0.1.2, torch.distributed.checkpoint could not save the optimizer: it reads ``state``, and there was none."""
    state_dicts = pytest.importorskip(
        "torch.distributed.checkpoint.state_dict", reason="torch has no distributed package"
    )
    model = nn.Linear(2, 3)
    optimizer = LARS(SGD(model.parameters(), lr=1.0, momentum=0.9), trust_coef=0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(state_dicts.get_optimizer_state_dict(model, optimizer))

    other = LARS(SGD(model.parameters(), lr=0.1, momentum=0.9))
    before = copy.deepcopy(model.state_dict())
    state_dicts.set_optimizer_state_dict(model, other, saved)
    assert torch.equal(other.state[model.weight]["momentum_buffer"], optimizer.state[model.weight]["momentum_buffer"])
    assert other.param_groups[0]["lr"] == 1.0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_assigned_groups():
    """In 0.1.2, ``param_groups`` could not be assigned, which accelerate, opacus and deepspeed do."""
    optimizer = LARS(SGD([layer()], lr=1.0))
    param = layer()
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [param]}]
    optimizer.step()
    assert_close(param, float64([3.0, 4.0]) - trust_ratio() * float64([-0.4, 0.3]))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_set_to_none(set_to_none):
    """In 0.1.2, ``zero_grad(set_to_none=...)`` raised TypeError: the wrapper's had no such argument."""
    param = layer()
    LARS(SGD([param], lr=1.0)).zero_grad(set_to_none=set_to_none)
    assert (param.grad is None) == set_to_none
    assert set_to_none or param.grad.tolist() == [0.0, 0.0]


def test_checkpoint_keeps_the_options():
    """In 0.1.2, ``eps`` and ``trust_coef`` were not in the state dict: a resumed run went on with the constructor's.

    The file is read with ``weights_only=True``, as everyone should, and a plain base can read it too.
    """
    optimizer = LARS(SGD([layer()], lr=1.0), eps=0.25, trust_coef=0.02)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state_dict = torch.load(file, weights_only=True)
    resumed = LARS(SGD([layer()], lr=0.1))
    resumed.load_state_dict(state_dict)
    assert (resumed.eps, resumed.trust_coef, resumed.param_groups[0]["lr"]) == (0.25, 0.02, 1.0)
    SGD([layer()], lr=0.1).load_state_dict(state_dict)


def test_parameters_in_place_of_an_optimizer():
    """In 0.1.2, ``LARS(model.parameters())`` was accepted and failed at the first step, by an attribute of a generator.

    It is how every other optimizer is constructed (kakaobrain/torchlars#7).
    """
    with pytest.raises(TypeError, match=r"\(got: generator\); construct the base first: LARS\(torch.optim.SGD\("):
        LARS(nn.Linear(2, 2).parameters())


def test_no_deprecated_calls():
    """In 0.1.2, the first step called ``add_`` in a way that torch deprecates: an error where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LARS(SGD([layer()], lr=1.0, weight_decay=0.1)).step()


# State and state dicts


@pytest.mark.parametrize("wrap", [LARS, LAMB])
def test_resetting_momentum_by_setstate(wrap):
    """``__setstate__({"state": ...})``, a common idiom, did nothing: what is the base's was written beside it."""
    param = layer()
    optimizer = wrap(SGD([param], lr=0.1, momentum=0.9))
    optimizer.step()
    assert len(optimizer.optim.state) == 1
    empty = defaultdict(dict)
    optimizer.__setstate__({"state": empty})
    assert optimizer.optim.state is optimizer.state is empty
    other = [{**optimizer.param_groups[0], "lr": 0.5}]
    del other[0]["nesterov"]
    optimizer.__setstate__({"param_groups": other})
    assert optimizer.optim.param_groups is optimizer.param_groups is other
    assert other[0]["nesterov"] is False  # as torch.optim.SGD does to groups of an older torch
    assert {"state", "param_groups"}.isdisjoint(vars(optimizer))


DAMAGED = {
    "a momentum that is no tensor": (lambda d: d["state"][0].update(momentum_buffer=[1.0, 2.0]), TypeError, "'momentum_buffer'. must be a tensor"),
    "momentum NaN": (lambda d: d["param_groups"][0].update(momentum=float("nan")), ValueError, "momentum of .*nan"),
    "a state that is no dict": (lambda d: d["state"].update({0: 3.0}), TypeError, r"state_dict\['state'\]\[0\] must be a d"),
    "no state": (lambda d: d.update(state=[1.0]), TypeError, r"state_dict\['state'\] must be a dict"),
    "lr -1": (lambda d: d["param_groups"][0].update(lr=-1.0), ValueError, "lr of parameter group 0 .*-1.0"),
    "lr x": (lambda d: d["param_groups"][0].update(lr="x"), TypeError, "lr of parameter group 0 .*'x'"),
    "lr None": (lambda d: d["param_groups"][0].update(lr=None), TypeError, "lr of parameter group 0 .*None"),
    "lr NaN": (lambda d: d["param_groups"][0].update(lr=float("nan")), ValueError, "lr of parameter group 0 .*nan"),
    "lr tensor": (lambda d: d["param_groups"][0].update(lr=torch.tensor(-1.0)), ValueError, "lr of parameter group 0 .*-1"),
    "decay NaN": (lambda d: d["param_groups"][0].update(weight_decay=float("nan")), ValueError, "weight_decay of .*nan"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(
    ("wrap", "base"),
    [
        (lambda base: base, torchlars.optim.SGD),
        (LARS, torchlars.optim.SGD),
        (LARS, SGD),
        (partial(LARS, apply_to="update"), SGD),
        (LAMB, SGD),
        (LAMB, Adam),
    ],
    ids=["SGD", "LARS-SGD", "LARS-torch", "update-torch", "LAMB-torch", "LAMB-Adam"],
)
def test_damaged_state_dicts(wrap, base, damage):
    """They raised AttributeError after the state was replaced, or were loaded and then stepped uphill."""
    do, error, message = DAMAGED[damage]
    if "momentum" in damage and base is Adam:
        pytest.skip("has none")
    param = layer()
    arguments = {"momentum": 0.5} if base is not Adam else {}
    optimizer = wrap(base([param], lr=0.5, weight_decay=0.1, **arguments))
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    param.grad = float64([-0.4, 0.3])
    optimizer.step()
    state, groups = optimizer.state, optimizer.param_groups
    before = copy.deepcopy(optimizer.state_dict())
    do(state_dict)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state_dict)
    assert optimizer.state is state
    assert optimizer.param_groups is groups
    after = optimizer.state_dict()
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert after == before


def test_a_load_that_fails_half_way():
    """What the base raises after it has replaced its state is undone: nothing is half loaded."""

    class Picky(SGD):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            raise KeyError("extra")

    optimizer = LARS(Picky([layer()], lr=0.5, momentum=0.5))
    optimizer.step()
    state, groups = optimizer.state, optimizer.param_groups
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["lars"]["eps"] = 0.25
    with pytest.raises(KeyError, match="extra"):
        optimizer.load_state_dict(state_dict)
    assert (optimizer.state is state, optimizer.param_groups is groups, optimizer.eps) == (True, True, 1e-8)


# Hyper-parameters


@pytest.mark.parametrize("scheduler", [OneCycleLR, CyclicLR])
@pytest.mark.parametrize(
    "wrap", [lambda base: base, LARS, partial(LARS, apply_to="update")], ids=["SGD", "LARS", "update"]
)
def test_a_momentum_that_is_a_tensor(backend, wrap, scheduler):
    """Schedulers that were given tensors leave them in groups. torchlars.optim.SGD raised at its next step."""

    def train(number, base):
        param = layer()
        optimizer = wrap(base([param], lr=0.1, momentum=0.9, weight_decay=0.1))
        options = {"base_momentum": number(0.5), "max_momentum": number(0.95)}
        if scheduler is OneCycleLR:
            schedule = OneCycleLR(optimizer, max_lr=0.9, total_steps=4, **options)
        else:
            schedule = CyclicLR(optimizer, base_lr=0.1, max_lr=0.9, step_size_up=2, **options)
        for _ in range(3):
            param.grad = float64([-0.4, 0.3])
            optimizer.step()
            schedule.step()
        return param.detach()

    expected = train(float, SGD)
    torch.testing.assert_close(train(torch.tensor, torchlars.optim.SGD), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("base", [SGD, torchlars.optim.SGD])
def test_hyper_parameters_that_are_tensors(backend, base):
    """A weight decay that is a tensor stopped ``LARS(torch.optim.SGD)`` at construction. torch takes it."""
    numbers = {"weight_decay": 0.25, "momentum": 0.5, "dampening": 0.125}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    results = []
    for given in (numbers, tensors):
        param = layer()
        optimizer = LARS(base([param], lr=2.0, **given))
        for _ in range(2):
            param.grad = float64([-0.4, 0.3])
            optimizer.step()
        assert all(optimizer.param_groups[0][name] is given[name] for name in numbers)
        results.append(param.detach())
    assert_close(results[1], results[0])


@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(True), torch.tensor(1j), torch.ones((), device="meta")])
@pytest.mark.parametrize("name", ["weight_decay", "momentum", "dampening"])
def test_tensors_that_are_no_numbers(name, value):
    """They are refused by a sentence before any training; so is one on another device, for which the host would wait."""
    base = torchlars.optim.SGD([layer()], lr=0.1)
    base.param_groups[0][name] = value
    with pytest.raises(TypeError, match=f"{name} of parameter group 0 must be a number"):
        LARS(base).step()
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        torchlars.optim.SGD([layer()], lr=0.1, **{name: value})


@pytest.mark.parametrize("base", [SGD, Adam, torchlars.optim.SGD])
@pytest.mark.parametrize("wrap", [LARS, partial(LARS, apply_to="update"), LAMB], ids=["LARS", "LARS-update", "LAMB"])
@pytest.mark.parametrize("scheduled", ["nothing", "the base", "the wrapper"])
def test_global_hooks_fire_once(wrap, base, scheduled):
    """They fired for the base and for the wrapper, so that who counted steps, as torch's profiler does, counted two."""
    calls = []

    def note(when):
        return lambda who, args, kwargs: calls.append((when, type(who).__name__))

    optimizer = wrap(base([layer()], lr=0.1))
    if scheduled != "nothing":
        schedule = LinearLR(optimizer.optim if scheduled == "the base" else optimizer)
    name, name_of_base = type(optimizer).__name__, base.__name__
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    optimizer.optim.register_step_pre_hook(note("pre"))
    optimizer.optim.register_step_post_hook(note("post"))
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    try:
        optimizer.step()
        if scheduled != "nothing":
            schedule.step()  # warns if it has not seen the step
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [
        ("global pre", name), ("pre", name), ("pre", name_of_base), ("post", name_of_base), ("post", name),
        ("global post", name),
    ]  # fmt: skip


def test_a_hook_of_the_base_may_replace_arguments():
    """As torch documents it: a tuple of new args and kwargs, or an error for whatever else it returns."""
    param, seen = layer(), []
    optimizer = LARS(SGD([param], lr=0.1))
    handle = optimizer.optim.register_step_pre_hook(lambda who, args, kwargs: ((who, lambda: seen.append(1)), {}))
    optimizer.step()
    assert seen == [1]
    handle.remove()
    optimizer.optim.register_step_pre_hook(lambda who, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@pytest.mark.parametrize("make", [LARS, LAMB])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_state_that_a_captured_graph_would_begin_is_refused(monkeypatch, make, base):
    """A first step inside of a capture lost its momentum at every replay: the graph began it."""
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.full_like(param, 0.5)
    optimizer = make(base([param], lr=0.1, weight_decay=0.1, **({"momentum": 0.9} if base is torch.optim.SGD else {})))
    with monkeypatch.context() as in_capture:
        in_capture.setattr(bases, "is_capturing", lambda device=None: True)
        keys = "momentum_buffer" if base is torch.optim.SGD else "exp_avg, exp_avg_sq, step"
        message = rf"state of {base.__name__} must exist .* \(created in the capture: {keys}\); take a step"
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert not optimizer.state[param]
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
    param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    with monkeypatch.context() as in_capture:
        in_capture.setattr(bases, "is_capturing", lambda device=None: True)
        optimizer.step()


class CountedMomentum(SGD):
    """SGD that counts steps beside its momentum, and replaces the momentum of a scalar instead of updating it."""

    fails = False

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if param.grad is None:
                continue
            if not state:
                state["step"] = 0
                if self.fails:
                    raise ArithmeticError("in the first step")
                state["momentum"] = torch.zeros_like(param)
            state["step"] += 1
            if param.ndim == 0:
                state["momentum"] = 0.9 * state["momentum"] + param.grad
            else:
                state["momentum"].mul_(0.9).add_(param.grad)


class Outer(SGD):
    """A wrapper that keeps the optimizer that steps in an attribute."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.inner = CountedMomentum(params, lr)

    def step(self, closure=None):
        return self.inner.step()


@pytest.mark.parametrize("base", [CountedMomentum, Outer])
def test_state_is_as_it_was_after_a_refused_capture(monkeypatch, base):
    """A base whose ``step`` counter stayed behind without its tensors failed in every later step."""
    param, late, scalar = layer(), layer(grad=False), nn.Parameter(float64(2.0))
    optimizer = LARS(base([param, late, scalar], 0.1))
    inner = optimizer.optim.inner if base is Outer else optimizer.optim

    def refuse(error, match):
        before = {param: dict(state) for param, state in inner.state.items() if state}
        with monkeypatch.context() as in_capture:
            in_capture.setattr(bases, "is_capturing", lambda device=None: True)
            with pytest.raises(error, match=match):
                optimizer.step()
        assert {param: state for param, state in inner.state.items() if state} == before

    refuse(RuntimeError, r"\(created in the capture: momentum\); take a step before the capture")
    optimizer.step()
    late.grad = torch.ones_like(late)
    refuse(RuntimeError, r"\(created in the capture: momentum\); take a step before the capture")
    inner.fails = True
    refuse(ArithmeticError, "in the first step")
    inner.fails = False
    optimizer.step()
    scalar.grad = torch.ones_like(scalar)
    optimizer.step()
    refuse(RuntimeError, rf"step of {base.__name__} cannot be captured .* \(replaced: momentum\); use a base")


def test_layers_on_the_cpu_may_begin_momentum_beside_a_capture(monkeypatch):
    """Their first step is not captured, but it was refused."""
    param = layer()
    optimizer = LARS(SGD([param], lr=0.1, momentum=0.9))
    monkeypatch.setattr(bases, "is_capturing", lambda device=None: device is None)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], param.grad)


def test_a_sparse_momentum_is_not_made_dense_in_a_capture(monkeypatch):
    """Every replay would have begun from the sparse momentum of the capture."""
    param = layer()
    optimizer = torchlars.optim.SGD([param], lr=0.1, momentum=0.9)
    momentum = torch.ones_like(param).detach().to_sparse()
    optimizer.state[param]["momentum_buffer"] = momentum
    monkeypatch.setattr(torchlars.optim.fused, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"\(group: 0, shape: \(2,\)\); take a step before the capture"):
        optimizer.step()
    assert optimizer.state[param]["momentum_buffer"] is momentum


@pytest.mark.parametrize("closure", [None, lambda: 0.0], ids=["none", "closure"])
def test_updates_are_scaled_where_the_base_drops_gradients_in_its_step(closure):
    """With a closure LAMB still took such layers for ones without a gradient, and left their updates as they were."""

    class Drops(SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.zero_grad()
            return loss

    param = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    param.grad = torch.tensor([0.6, 0.8])
    optimizer = LAMB(Drops([param], lr=0.1))
    optimizer.step() if closure is None else optimizer.step(closure)
    torch.testing.assert_close(param.detach(), torch.tensor([2.7, 3.6]))
    assert list(optimizer.trust_ratios()) == [param]


@pytest.mark.parametrize("wrap", [lambda base: base, LAMB], ids=["plain", "LAMB"])
def test_betas_that_change_in_place_are_read_again(wrap):
    """A tuple was taken for a constant, also one of tensors."""
    steps = []
    for base in (torchlars.optim.AdamW, torch.optim.AdamW):
        betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in (0.9, 0.99))
        param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = wrap(base([param], lr=0.1, weight_decay=0.1, betas=betas))
        for grad in ([1.0, 2, 3], [-1.0, 5, 0.3]):
            param.grad = torch.tensor(grad, dtype=torch.float64)
            optimizer.step()
            betas[0].fill_(0.1)
        steps.append(param.detach())
    torch.testing.assert_close(*steps, rtol=1e-12, atol=1e-12)
