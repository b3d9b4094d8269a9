"""What failed, in torchlars 0.1.2 and since: one test a failing, with its story."""

import copy
import gc
import io
import math
import pickle
import warnings
from collections import defaultdict
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LinearLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

import torchlars
from torchlars import LAMB, LARS, ops, param_groups


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def layer(dtype=torch.float64, grad=True):
    """A parameter of norm 5 whose gradient has norm 0.5."""
    param = nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))
    if grad:
        param.grad = torch.tensor([-0.4, 0.3], dtype=dtype)
    return param


def trust_ratio(weight_decay=0.0, trust_coef=0.001):
    """That layer's."""
    return trust_coef * 5 / (0.5 + weight_decay * 5 + 1e-8)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-12, atol=0)


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


# Weight decay


def test_maximize(backend):
    """In 0.1.2, weight decay made weights grow in groups with ``maximize=True``.

    The base negates the gradients of such groups, and with them the decay that they held. The gradient here is at a
    right angle to the weights, so that the decay alone says whether the weights' norm grows.
    """
    param = layer()
    LARS(SGD([param], lr=2.0, weight_decay=0.1, maximize=True)).step()
    r = trust_ratio(weight_decay=0.1)
    assert_close(param, float64([3.0, 4.0]) + 2.0 * r * float64([-0.4 - 0.3, 0.3 - 0.4]))
    assert param.norm() < 5


def test_decoupled_weight_decay(backend):
    """In 0.1.2, AdamW did not decay weights: LARS took its decay away and mixed it into the gradients.

    There Adam's division by their size swallows it, which is what AdamW was made to avoid. One step from zero state is
    the sign of the gradient; the decay of 0.1 · 0.5 of the weights must show beside it.
    """
    param = layer()
    LARS(AdamW([param], lr=0.1, weight_decay=0.5, eps=0.0)).step()
    assert_close(param, float64([3.0 * 0.95 + 0.1, 4.0 * 0.95 - 0.1]))
    assert_close(param.grad, trust_ratio() * float64([-0.4, 0.3]))


class Shrinks(torch.optim.Optimizer):
    """A base of another house whose decay is decoupled where what it holds says so, and else goes through gradients."""

    def __init__(self, params, defaults=None, shrinks=True):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.5, **(defaults or {})})
        self.shrinks = shrinks

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                decay = group["weight_decay"] * param
                grad = param.grad + (0 if self.shrinks else decay)
                param.sub_(group["lr"] * (grad.sign() + (decay if self.shrinks else 0)))


FLAGS = [
    *(
        (name, True)
        for name in ("decoupled_weight_decay", "weight_decouple", "decoupled", "decoupled_decay", "decouple")
    ),
    *(("use_decoupled_weight_decay", True), ("stable_weight_decay", True), ("adam_w_mode", 1)),
    *(("weight_decay_type", "decoupled"), ("weight_decay_type", "stable")),
]


def assert_decay_stays(param):
    """One step of Shrinks by the sign of the gradient, and the decay of 0.1 · 0.5 of the weights beside it."""
    assert_close(param, float64([3.0 * 0.95 + 0.1, 4.0 * 0.95 - 0.1]))
    assert_close(param.grad, trust_ratio() * float64([-0.4, 0.3]))


@pytest.mark.parametrize("where", ["group", "defaults"])
@pytest.mark.parametrize(("flag", "value"), FLAGS)
def test_decoupled_weight_decay_by_another_name(flag, value, where, backend):
    """Only ``decoupled_weight_decay`` was read, so that bases of other libraries lost their decay.

    pytorch_optimizer's AdaBelief and Lion, timm's Adopt and AdaBelief, and Prodigy say it by other names. LARS took
    their decay and added it to the gradients, where the sign or the division by their size swallows it. A name can
    stand in the defaults alone: a checkpoint from before it existed replaces the groups.
    """
    param = layer()
    base = Shrinks([param], {flag: value})
    if where == "group":
        del base.defaults[flag]
    else:
        del base.param_groups[0][flag]
    LARS(base).step()
    assert_decay_stays(param)


@pytest.mark.parametrize(("flag", "value"), [*((flag, False) for flag, _ in FLAGS[:8]), ("weight_decay_type", "l2")])
def test_coupled_weight_decay_by_another_name(flag, value):
    """Such names also say that decay is coupled: then LARS takes it over as ever, and has nothing to warn of."""
    param = layer()
    optimizer = LARS(Shrinks([param], {flag: value}, shrinks=False))
    optimizer.step()
    assert_close(param.grad, trust_ratio(weight_decay=0.5) * float64([-0.4 + 1.5, 0.3 + 2.0]))


def test_what_a_group_says_of_its_weight_decay_comes_before_the_defaults():
    """One group may decouple and its neighbour not."""
    one, other = layer(), layer()
    base = Shrinks([{"params": [one], "weight_decouple": False}, {"params": [other]}], {"weight_decouple": True})
    LARS(base).step()
    assert_close(one.grad, trust_ratio(weight_decay=0.5) * float64([-0.4 + 1.5, 0.3 + 2.0]))
    assert_decay_stays(other)


@pytest.mark.parametrize(
    ("library", "name"),
    [("timm", "NAdamW"), ("timm", "Kron"), ("pytorch_optimizer", "SOAP"), ("bitsandbytes", "Optimizer2State")],
)
def test_decoupled_weight_decay_of_classes_that_do_not_say_so(library, name):
    """timm's NAdamW, Lion and LaProp say nothing, and its Kron says ``decoupled_decay=False`` of another kind of its own.

    They are known by name, and so are classes derived from them.
    """
    param = layer()
    known = type(name, (Shrinks,), {"__module__": f"{library}.optim.any"})
    base = type("Own", (known,), {})([param], {"decoupled_decay": False} if name == "Kron" else {})
    LARS(base).step()
    assert_decay_stays(param)


class Keeps(torch.optim.Optimizer):
    """A wrapper that borrows what its base has, and keeps the base under some name."""

    def __init__(self, name, base):
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups
        self.__dict__.update({name: base, "itself": self, "number": 3})

    @property
    def optim(self):
        raise RuntimeError("not to be read")

    def step(self, closure=None):
        next(value for value in vars(self).values() if isinstance(value, Shrinks)).step()


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer", "_base_optimizer", "_optimizer", "inner"])
def test_decoupled_weight_decay_inside_of_a_wrapper(name):
    """Only ``.optim`` was followed to what a base is wrapped around.

    Lookahead and SAM keep theirs as ``_base_optimizer``, ``base_optimizer`` or ``optimizer``. What else they hold,
    themselves included, must not confuse the search, and what is LBFGS inside is LBFGS.
    """
    param = layer()
    base = Shrinks([param], {"decouple": True})
    del base.param_groups[0]["decouple"]
    LARS(Keeps(name, base)).step()
    assert_decay_stays(param)
    with pytest.raises(TypeError, match="LBFGS"):
        LAMB(Keeps(name, LBFGS([layer()])))


def test_weight_decay_of_a_base_that_says_nothing():
    """The decay of a base that nobody knows was taken for coupled in silence. Now that is said, once, before training."""
    with pytest.warns(UserWarning, match="Shrinks does not say .* give weight_decay='decoupled' to LARS") as warned:
        optimizer = LARS(Shrinks([layer()]))
    assert warned[0].filename == __file__
    optimizer.add_param_group({"params": [layer()]})  # said already

    optimizer = LARS(Shrinks([layer()], {"weight_decay": 0.0}))  # nothing to say
    with pytest.warns(UserWarning, match="Shrinks does not say"):
        optimizer.add_param_group({"params": [layer()], "weight_decay": 0.5})
    optimizer = LARS(Shrinks([layer()], {"weight_decay": 0.0}))
    with pytest.warns(UserWarning, match="Shrinks does not say"):
        optimizer.load_state_dict(Shrinks([layer()]).state_dict())

    around = type("Around", (Keeps,), {"__module__": "torch.distributed.optim.any"})  # torch's, but not its base
    with pytest.warns(UserWarning, match="Around does not say"):
        LARS(around("optim_", Shrinks([layer()])))

    LARS(Shrinks([layer()]), weight_decay="decoupled")
    LARS(Shrinks([{"params": [layer()], "trust_coef": None}]))  # left to the base
    LARS(type("Own", (SGD,), {})([layer()], lr=0.1, weight_decay=0.5))  # known


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


# Options under the names of other libraries


FOREIGN = [
    ("trust_coefficient", 0.02, "say trust_coef$"),
    ("trust_coeff", 0.02, "say trust_coef$"),
    ("eta", 0.02, "say trust_coef$"),
    ("eeta", 0.02, "say trust_coef$"),
    ("lars_coeff", 0.02, "say trust_coef$"),
    ("trust_clip", True, "say clip$"),
    ("clip_lr", True, "say clip$"),
    ("epsilon", 0.1, "say eps$"),
    ("lars_weight_decay", 0.1, "say weight_decay$"),
    ("always_adapt", False, "say trust_coef=None in groups without weight decay"),
    ("max_unorm", 0.02, r"say the trust_coef of LAMB\(..., clip=True\)$"),
    ("weight_decay_filter", None, "say weight_decay=0 in a group"),
    ("lars_adaptation_filter", None, "say trust_coef=None in a group"),
    ("exclude_bias_n_norm", True, "say trust_coef=None in a group"),
    ("lars_exclude", True, "say trust_coef=None"),
]


@pytest.mark.parametrize("wrap", [LARS, LAMB])
@pytest.mark.parametrize(("key", "value", "remedy"), FOREIGN)
def test_options_under_the_names_of_other_libraries(key, value, remedy, wrap):
    """A group's ``trust_coefficient`` was ignored, so that an apex or timm checkpoint's 0.02 became 0.001.

    It is refused wherever a group comes in, and nothing has changed then.
    """
    message = rf"(?s)parameter group {{}} must hold .*\(got: {key}={value!r}\); instead of {key} {remedy}"
    group = {"params": [layer()], key: value}
    with pytest.raises(ValueError, match=message.format(1)):
        wrap(SGD([{"params": [layer()]}, group], lr=1.0))
    optimizer = wrap(SGD([layer()], lr=1.0, momentum=0.9))
    optimizer.step()
    with pytest.raises(ValueError, match=message.format(1)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1

    before = copy.deepcopy(optimizer.state_dict())
    checkpoint = copy.deepcopy(before)
    checkpoint["param_groups"][0].update({"lr": 3.0, key: value})
    checkpoint["state"][0]["momentum_buffer"] += 1
    checkpoint[wrap.state_key]["eps"] = 0.5
    with pytest.raises(ValueError, match=message.format(0)):
        optimizer.load_state_dict(checkpoint)
    after = optimizer.state_dict()
    assert torch.equal(after["state"][0].pop("momentum_buffer"), before["state"][0].pop("momentum_buffer"))
    assert after == before


def test_a_checkpoint_of_timm():
    """Every key that is to be renamed is named at once."""
    optimizer = LARS(SGD([layer()], lr=1.0))
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0].update(trust_coeff=0.02, trust_clip=True, always_adapt=False)
    with pytest.raises(ValueError, match=r"\(got: trust_coeff=0.02, trust_clip=True, always_adapt=False\)"):
        optimizer.load_state_dict(checkpoint)


@pytest.mark.parametrize("wrap", [LARS, LAMB])
@pytest.mark.parametrize("inside", [False, True])
def test_options_of_the_base_under_such_names(inside, wrap):
    """What the base has in its defaults, or one that it is wrapped around, is the base's, and nobody's key is let be."""
    base = Shrinks([layer()], {"trust_coefficient": 0.02, "max_unorm": 0.1, "decouple": True})
    optimizer = wrap(Keeps("base_optimizer", base) if inside else base)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer = wrap(base)
    optimizer.add_param_group({"params": [layer()], "trust_coefficient": 0.1, "color": "red"})
    assert optimizer.param_groups[1]["trust_coefficient"] == 0.1


# Sharded parameters


def test_flattened_parameters_of_fsdp():
    """In 0.1.2, FSDP trained with ratios of slices of many layers glued together, different on every rank, silently.

    FSDP1 leaves plain tensors with nothing but a mark on them.
    """
    param = layer()
    param._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="FSDP1 flattens and splits them"):
        LARS(SGD([param], lr=1.0)).step()

    class FlatParameter(nn.Parameter):  # of fairscale, where FSDP1 comes from
        _param_numels = (1, 1)

    param = FlatParameter(layer().detach())
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="FSDP1 flattens and splits them"):
        LARS(SGD([param], lr=1.0)).step()


FLATTENING = {
    "LARS": lambda params: LARS(SGD(params, lr=0.5, weight_decay=0.1)),
    "LARS, torchlars.optim.SGD": lambda params: LARS(torchlars.optim.SGD(params, lr=0.5, weight_decay=0.1)),
    "LARS, update": lambda params: LARS(SGD(params, lr=0.5, weight_decay=0.1), apply_to="update"),
    "LARS.over": lambda params: LARS.over(SGD)(params, lr=0.5, weight_decay=0.1),
    "LAMB": lambda params: LAMB(AdamW(params, lr=0.5, weight_decay=0.1)),
}
flattening = pytest.mark.parametrize("build", FLATTENING.values(), ids=FLATTENING.keys())
FLAT = r"^parameters must be whole layers, but this tensor is no torch.nn.Parameter .*\(group: 0, parameter: 0, shape: {}\)$"


def two_layers(*shapes):
    """Layers with gradients; unless told otherwise, a weight and a bias."""
    params = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes or ((3, 4), (3,))]
    for param in params:
        param.grad = torch.full_like(param, 0.25)
    return params


def master(param):
    """A copy as engines make them: a plain tensor, a leaf."""
    copied = param.detach().clone().requires_grad_()
    copied.grad = param.grad.clone()
    return copied


def flatten(group, ranks=1):
    """Do what the ZeRO optimizers of DeepSpeed do to a group: a rank's piece of one flat copy of all its layers."""
    flat = torch.cat([param.detach().flatten() for param in group["params"]])
    flat = flat[: len(flat) // ranks].clone().requires_grad_()
    flat.grad = torch.full_like(flat, 0.25)
    group["params"] = [flat]
    return flat


def assert_refused(optimizer, flat):
    before = flat.detach().clone(), flat.grad.clone(), optimizer.param_groups[0]["weight_decay"]
    with pytest.raises(RuntimeError, match=FLAT.format(rf"\({len(flat)},\)")):
        optimizer.step()
    assert torch.equal(flat, before[0])
    assert torch.equal(flat.grad, before[1])
    assert optimizer.param_groups[0]["weight_decay"] == before[2]


@flattening
def test_flat_partitions(build, backend):
    """DeepSpeed's ZeRO trained with one ratio for all layers, silently, or with that of a rank's piece of them all.

    After the optimizer was wrapped, it puts one flat vector into each group, a plain tensor with no mark on it.
    """
    for ranks in (1, 2, 5):
        optimizer = build(two_layers())
        flat = flatten(optimizer.param_groups[0], ranks)
        assert_refused(optimizer, flat)
        optimizer.load_state_dict(optimizer.state_dict())
        assert_refused(optimizer, flat)

    optimizer = build(two_layers((3, 4)))  # one layer, but this rank's piece of it only
    assert_refused(optimizer, flatten(optimizer.param_groups[0], ranks=2))
    optimizer = build(two_layers((4,), (12,)))  # the piece has the shape of a layer
    assert_refused(optimizer, flatten(optimizer.param_groups[0], ranks=4))

    optimizer = build(two_layers())  # ZeRO 3: one piece after another, and none between steps
    flat = flatten(optimizer.param_groups[0])
    for piece in flat.detach().split(4):
        optimizer.param_groups[0]["params"] = []
        optimizer.step()
        optimizer.param_groups[0]["params"] = [piece.clone().requires_grad_()]
        optimizer.step()  # there is no gradient yet
        optimizer.param_groups[0]["params"][0].grad = torch.ones_like(piece)
        assert_refused(optimizer, optimizer.param_groups[0]["params"][0])


@flattening
def test_flat_partitions_of_a_group_that_opts_out(build, backend):
    optimizer = build([{"params": two_layers(), "trust_coef": None}, {"params": two_layers()}])
    flat = flatten(optimizer.param_groups[0])
    optimizer.step()
    assert not torch.equal(flat, torch.ones_like(flat))


def steps(optimizer):
    """Whether a step changes every tensor there is, each by a trust ratio of its own."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert list(optimizer.trust_ratios()) == params
    return all(not torch.equal(param, old) for param, old in zip(params, before, strict=True))


@flattening
def test_parameters_that_are_replaced_one_by_one(build, backend):
    """They hold whole layers, whoever replaced them, and whatever their type."""
    params = two_layers()
    optimizer = build(params)
    optimizer.param_groups[0]["params"][:] = [
        nn.Parameter(param.detach().clone()) for param in two_layers((5, 4), (7,))
    ]
    for param in optimizer.param_groups[0]["params"]:  # a model's own: other Parameters, of other shapes
        param.grad = torch.ones_like(param)
    assert steps(optimizer)

    class OfALibrary(nn.Parameter):
        pass

    optimizer.param_groups[0]["params"] = [OfALibrary(torch.ones(6, 4, dtype=torch.float64))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(6, 4, dtype=torch.float64)
    assert steps(optimizer)

    optimizer = build(params)  # float32 copies of layers in float16, as apex, Megatron and DeepSpeed make them
    optimizer.param_groups[0]["params"] = [master(param) for param in optimizer.param_groups[0]["params"]]
    assert steps(optimizer)

    params = two_layers()
    optimizer = build(params)
    params[0].grad = None
    torch.utils.swap_tensors(params[0], torch.full((3, 4), 2.0, dtype=torch.float64, requires_grad=True))
    params[0].grad = torch.ones_like(params[0])
    assert type(params[0]) is torch.Tensor  # types are swapped, too
    assert steps(optimizer)


@flattening
def test_plain_tensors_that_the_user_gave(build, backend):
    params = [master(param) for param in two_layers()]
    optimizer = build(params)
    optimizer.add_param_group({"params": [master(param) for param in two_layers((5,))]})
    assert steps(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups.reverse()
    assert steps(optimizer)
    for make in (copy.copy, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))):
        copied = make(optimizer)
        for group in copied.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, 0.25)
        assert steps(copied)

    params[0].data = torch.ones(6, 4, dtype=torch.float64)  # it grows
    params[0].grad = torch.full_like(params[0], 0.25)
    optimizer.state.clear()
    assert steps(optimizer)
    params[0].grad = None
    torch.utils.swap_tensors(params[0], torch.ones(2, 2, dtype=torch.float64, requires_grad=True))
    params[0].grad = torch.full_like(params[0], 0.25)
    optimizer.state.clear()
    assert steps(optimizer)


def test_parameters_that_are_sharded_after_the_optimizer_was_wrapped(workers):
    """accelerate puts placeholders into the groups, shards the model, and then puts DTensors there."""
    for names in workers(2, shard_as_accelerate_does):
        assert names == ["DTensor"] * 4


def shard_as_accelerate_does():
    """One rank of two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 2)
    nn.init.ones_(model.bias)
    optimizers = [LARS(SGD(model.parameters(), lr=1.0)), LAMB(AdamW(model.parameters(), lr=1.0))]
    names = {param.data_ptr(): name for name, param in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for position, param in enumerate(group["params"]):
                group["params"][position] = torch.empty(1)
                group["params"][position].data_ptr = param.data_ptr()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    sharded = dict(model.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[param.data_ptr]] for param in group["params"]]
    model(torch.ones(3, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return [type(param).__name__ for optimizer in optimizers for param in optimizer.trust_ratios()]


def test_sharded_parameters(workers):
    """In 0.1.2, the norms of a DTensor went to C++ code that reads them by their address, and a DTensor's address is 0.

    Others took the norm of the shard that they saw, so that every rank had a ratio of its own.
    """
    for ratio, grad in workers(2, step_of_a_shard):
        assert ratio == pytest.approx(0.5 * 5.0 / (2.0 + 0.1 * 5.0), rel=1e-12)  # ‖(3, 4)‖ = 5, ‖(2, 0)‖ = 2
        assert grad == pytest.approx([ratio * (2.0 + 0.1 * 3.0), ratio * 0.1 * 4.0], rel=1e-12)


def step_of_a_shard():
    """One rank of two: 3 of (3, 4) is on the first, 4 on the second."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    values, grads = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([2.0, 0.0], dtype=torch.float64)
    param = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    param.grad = distribute_tensor(grads, mesh, [Shard(0)])
    optimizer = LARS(SGD([param], lr=1.0, weight_decay=0.1), eps=0, trust_coef=0.5)
    optimizer.step()
    return optimizer.trust_ratios()[param].item(), param.grad.full_tensor().tolist()


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
    how = {"trust_coef": 0.001, "eps": 0.0, "decayed_norm": False, "clip": False, "lr_in_momentum": False}

    def shares_memory():
        lars, sgd = extension.LarsLayers(), extension.SgdLayers()
        lars.add(params, 0.1, False, **how, lr=None)
        left = sgd.add(params, base.state, 0.1, **how, lr=0.1, momentum=0.9, dampening=0.0, nesterov=False,
                       maximize=False, momentum_in_float32=False)  # fmt: skip
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


@pytest.mark.parametrize("base", [SGD, Adam, AdamW, Adagrad])
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


def sparse_rows(param):
    values = torch.randn(2, *param.shape[1:], dtype=param.dtype)
    with torch.sparse.check_sparse_tensor_invariants(True):  # says so, else torch warns
        param.grad = torch.sparse_coo_tensor([[1, 3]], values, param.shape)


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


def test_what_two_interrupts_left_is_put_back_by_the_next_step():
    """The first one comes before hyper-parameters are put back, the second one while they are."""
    param = layer()
    optimizer = LARS(SGD([param], lr=0.5, weight_decay=0.1))
    optimizer._hidden.hide(optimizer.param_groups[0], "weight_decay", 0.0)  # what a step leaves that ends there
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert_close(param.grad, trust_ratio(weight_decay=0.1) * float64([-0.4 + 0.3, 0.3 + 0.4]))
    optimizer._hidden.hide(optimizer.param_groups[0], "weight_decay", 0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.7  # by the user, who found 0
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.7


@pytest.mark.parametrize("wrap", [partial(LARS, apply_to="update"), LAMB], ids=["LARS-update", "LAMB"])
def test_a_failure_while_updates_are_scaled_leaves_no_scale(wrap, monkeypatch):
    """It left the tensors of a GradScaler on the optimizer, by which the next step would have unscaled."""

    def fails(*args):
        raise KeyboardInterrupt

    optimizer = wrap(SGD([layer(torch.float32)], lr=0.5, fused=True))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for name in ("apply_trust_ratios_to_updates_", "scale_updates_by_trust_ratios_"):
        monkeypatch.setattr(ops, name, fails)
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
    how = {"trust_coef": None, "eps": None, "decayed_norm": False, "clip": False, "lr_in_momentum": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__hash__", shrinks)
        left = layers.add(base.param_groups[0]["params"], base.state, 0.0, **how, lr=0.1, momentum=0.9, dampening=0.0,
                   nesterov=False, maximize=False, momentum_in_float32=False)  # fmt: skip
    assert sum(len(bucket.params) for bucket in layers.buckets) + len(left) == 100


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
