"""Whoever comes from another LARS keeps their numbers: the calls of README's table "Coming from X", held to the truth.

Every call is read from the table and evaluated. It is compared with numbers that the peer once produced
(``published.json``), with the peer's formula, written here from what is known of it, and with the peer itself where it
is installed. The formulas know what the peers do at zero norms, without weight decay and with dampening, so that the
tests also say where a peer differs.
"""

import importlib
import inspect
import itertools
import json
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torchlars.optim

pytestmark = [
    pytest.mark.filterwarnings("ignore:a layer whose weights are all 0:UserWarning"),  # they are, on purpose
    pytest.mark.filterwarnings("ignore:a group with trust_coef=None takes its lr whole:UserWarning"),  # as in the peers
]

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
SECTION = re.search(r"^## Coming from X\n(.*?)^## ", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)[1]
PREAMBLE = re.search(r"^```python\n(.*?)^```", SECTION, re.M | re.S)[1]
CALLS = {peer: call[1:-1] for peer, call in re.findall(r"^\| (.+?) \| (`[^`|]+`) \|", SECTION, re.M)}
BASES = {"torch": torch.optim.SGD, "torchlars": torchlars.optim.SGD}

PROMISED = [
    *("torchlars 0.1.2", "apex `LARC`", "quadra", "lightning-bolts", "timm `Lars`", "pytorch_optimizer `LARS`"),
    *("bitsandbytes", "Barlow Twins", "VICReg", "SimCLR", "`optax.lars`", "MLPerf", "Algorithm 1", "2018 blog"),
    *("ColossalAI `Lars`", "`optax.lamb`", "timm `Lamb`"),
]

SGD_HYPER = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}
ADAM_HYPER = {"lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
LRS = (0.5, 0.5, 4.0, 0.05, 0.3, 0.002)  # of the first group
SECOND_LR = 0.3  # of the second group, relative to the first
SECOND_DECAY = 0.2


class Problem:
    """Four layers, two of them vectors, and their gradients over some steps. Every scale is another."""

    def __init__(self, seed, dtype=torch.float64):
        random = torch.Generator().manual_seed(seed)

        def draw(shape, low, high):
            scale = 10 ** (low + (high - low) * torch.rand((), generator=random, dtype=torch.float64))
            return (scale * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)

        shapes = [(4, 3), (2, 3, 2), (5,), (3,)]
        self.layers = [draw(shape, -1, 1) for shape in shapes]
        self.grads = [[draw(shape, -3, 1) for shape in shapes] for _ in LRS]
        self.lrs = LRS
        self.second_lr = SECOND_LR
        self.second_decay = SECOND_DECAY

    def params(self):
        return [nn.Parameter(layer.clone()) for layer in self.layers]

    def steps(self, optimizer, params):
        """Set gradients and learning rates of an optimizer with two groups, before each of its steps."""
        for lr, grads in zip(self.lrs, self.grads, strict=True):
            for group, relative in zip(optimizer.param_groups, (1.0, self.second_lr), strict=True):
                group["lr"] = lr * relative
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            yield

    def run(self, optimizer, params):
        """Take all steps; return what the layers became."""
        for _ in self.steps(optimizer, params):
            optimizer.step()
        return [param.detach() for param in params]


def moderate(problem):
    """Without elements of a gradient that ColossalAI would clamp."""
    problem.grads = [[grad.clamp(-5, 5) for grad in grads] for grads in problem.grads]
    return problem


def is_split(peer):
    """Whether a call keeps vectors in a group of their own."""
    return "weights" in CALLS[peer]


def two_groups(params, **second):
    """Two groups of one matrix and one vector each."""
    return [
        {"params": params[::2]},
        {"params": params[1::2], "weight_decay": SECOND_DECAY, "lr": 0.1, **second},
    ]


def ours(call, layers, /, base="torch", **names):
    """Evaluate a call of the table as a reader would, after the lines before the table and with names of their own."""
    known = {"model": SimpleNamespace(parameters=lambda: iter(layers))}
    exec(PREAMBLE, known)
    known["plain"]["lr"] = known["plain_inside"]["lr"] = 0.1
    known.update({"SGD": BASES[base], "params": two_groups(layers), "sgd": SGD_HYPER, "adam": ADAM_HYPER, **names})
    return eval(call, known)


def assert_same(actual, expected, tolerance=1e-12, message=""):
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"{message} layer {i}: {text}"
        )


def differ(actual, expected, by=1e-6):
    return any(not torch.allclose(one, other, rtol=by, atol=by) for one, other in zip(actual, expected, strict=True))


# The table


def test_every_peer_has_a_row():
    for name in PROMISED:
        assert any(name in peer for peer in CALLS), name
    rows = [line for line in SECTION.splitlines() if line.startswith("| ")]
    assert len(CALLS) == len(rows) - 1, "every row but the head has a call"
    assert set(CALLS) == set(FORMULAS)


def test_the_lines_before_the_table_run_as_they_stand():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    for call in CALLS.values():
        names = {"model": model}
        exec(PREAMBLE, names)
        optimizer = eval(call, names)
        model(torch.ones(5, 3)).sum().backward()
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
        assert all(differ([param], [old]) for param, old in zip(model.parameters(), before, strict=True)), call


# Published numbers


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PUBLISHED["peers"])
def test_published_numbers(backend, name, base):
    case, data = PUBLISHED["peers"][name], PUBLISHED["data"]
    hparams = case["hparams"]
    w, b = (nn.Parameter(torch.tensor(data[key], dtype=torch.float64)) for key in ("W0", "B0"))
    sgd = {"lr": hparams["lr"][0], "weight_decay": hparams["wd"], "momentum": hparams.get("momentum", 0)}
    adam = {"lr": hparams["lr"][0], "weight_decay": hparams["wd"]}
    adam |= {key: hparams[key] for key in ("betas", "eps") if key in hparams}
    none = {"params": []}  # the peers ran without their filters
    names = {"params": [w, b], "weights": [w, b], "plain": none, "plain_inside": none, "sgd": sgd, "adam": adam}
    optimizer = ours(CALLS[case["peer"]], [w, b], base, **names)
    for i, expected in enumerate(case["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = hparams["lr"][i]
        w.grad, b.grad = (torch.tensor(data[key][i], dtype=torch.float64) for key in ("GW", "GB"))
        optimizer.step()
        seen = {"w": w, "b": b, "buf": optimizer.state[w].get("momentum_buffer")}
        if base == "torch":  # the other leaves gradients as they were
            seen["w_grad_after"] = w.grad
        for key in expected.keys() & seen.keys():
            values = torch.tensor(expected[key], dtype=torch.float64)
            torch.testing.assert_close(seen[key].detach(), values, rtol=0, atol=1e-12, msg=f"step {i}: {key}")


# Formulas of the peers, each for one layer: w, g, its hyper-parameters h and what it remembers. All return the new w.


def torch_momentum(h, memory, gradient):
    """torch.optim.SGD's, whose first buffer is not dampened."""
    buffer = memory.get("buffer")
    memory["buffer"] = gradient if buffer is None else h.momentum * buffer + (1 - h.dampening) * gradient
    return gradient + h.momentum * memory["buffer"] if h.nesterov else memory["buffer"]


def zero_momentum(h, memory, gradient, new=1.0):
    """Of those whose buffer is 0 at first."""
    memory["buffer"] = h.momentum * memory.get("buffer", 0) + new * gradient
    return gradient + h.momentum * memory["buffer"] if h.nesterov else memory["buffer"]


def raw_ratio(h, w, g, trust_coef=0.001, eps=0.0):
    if w.norm() == 0 or g.norm() == 0:
        return 1.0
    return trust_coef * w.norm() / (g.norm() + h.weight_decay * w.norm() + eps)


def norm_ratio(w, update, trust_coef=0.001):
    return trust_coef * w.norm() / update.norm() if w.norm() > 0 and update.norm() > 0 else 1.0


def torchlars_0_1_2(w, g, h, memory):
    ratio = raw_ratio(h, w, g, eps=1e-8)
    return w - h.lr * torch_momentum(h, memory, ratio * (g + h.weight_decay * w))


def apex_larc(w, g, h, memory):
    if w.norm() != 0 and g.norm() != 0:
        ratio = raw_ratio(h, w, g, trust_coef=0.02, eps=1e-8) / h.lr
        h.clipped.add(bool(ratio > 1))
        g = min(ratio, 1) * (g + h.weight_decay * w)
    return w - h.lr * torch_momentum(h, memory, g)


def quadra_and_bolts(w, g, h, memory):
    if h.weight_decay != 0 and w.norm() != 0 and g.norm() != 0:
        g = raw_ratio(h, w, g, eps=1e-8) * (g + h.weight_decay * w)
    return w - h.lr * torch_momentum(h, memory, g)


def timm_lars(w, g, h, memory):
    if h.weight_decay != 0:
        g = raw_ratio(h, w, g, eps=1e-8) * (g + h.weight_decay * w)
    return w - h.lr * torch_momentum(h, memory, g)


def pytorch_optimizer_lars(w, g, h, memory):
    if w.ndim > 1:
        denominator = g.norm() + h.weight_decay * w.norm()
        ratio = 0.001 * w.norm() / denominator if w.norm() > 0 and denominator > 0 else 1.0
        g = ratio * (g + h.weight_decay * w)
    return w - h.lr * zero_momentum(h, memory, g, new=1 - h.dampening)


def bitsandbytes_lars(w, g, h, memory):
    g = g + h.weight_decay * w
    memory["buffer"] = update = h.momentum * memory.get("buffer", 0) + g
    h.clipped.add(bool(update.norm() > 0.02 * w.norm()))
    return w - h.lr * update * (min(1, 0.02 * w.norm() / update.norm()) if update.norm() > 0 else 1)


def barlow_twins(w, g, h, memory):
    if w.ndim > 1:
        g = g + h.weight_decay * w
        g = norm_ratio(w, g) * g
    memory["buffer"] = h.momentum * memory.get("buffer", 0) + g
    return w - h.lr * memory["buffer"]


def simclr(w, g, h, memory):
    step = h.lr * g
    if w.ndim > 1:
        g = g + h.weight_decay * w
        step = h.lr * norm_ratio(w, g) * g
    return w - zero_momentum(h, memory, step)


def simclr_popular(w, g, h, memory):
    update = zero_momentum(h, memory, g + h.weight_decay * w if w.ndim > 1 else g)
    return w - h.lr * (norm_ratio(w, update) if w.ndim > 1 else 1) * update


def optax_lars(w, g, h, memory):
    g = g + h.weight_decay * w
    return w - zero_momentum(h, memory, h.lr * norm_ratio(w, g) * g)


def mlperf(w, g, h, memory, eps=0.0):
    step = h.lr * g
    if w.ndim > 1:
        step = h.lr * raw_ratio(h, w, g, eps=eps) * (g + h.weight_decay * w)
    return w - zero_momentum(h, memory, step)


def mlperf_until_v0_6(w, g, h, memory):
    g = g + h.weight_decay * w  # from the loss
    return w - h.lr * raw_ratio(h, w, g) * zero_momentum(h, memory, g)


def algorithm_1(w, g, h, memory):
    local_lr = 0.001 * w.norm() / (g.norm() + h.weight_decay * w.norm())
    memory["buffer"] = h.momentum * memory.get("buffer", 0) + h.lr * local_lr * (g + h.weight_decay * w)
    return w - memory["buffer"]


def blog_2018(w, g, h, memory):
    local_lr = 0.001 * w.norm() / (g.norm() + h.weight_decay * w.norm())
    return w - h.lr * local_lr * torch_momentum(h, memory, g + h.weight_decay * w)


def colossalai_lars(w, g, h, memory):
    ratio = min(raw_ratio(h, w, g), 50)
    gradient = (g + h.weight_decay * w).clamp(-10, 10)
    memory["buffer"] = h.momentum * memory.get("buffer", 0) + gradient
    return w - h.lr * ratio * memory["buffer"]


def adam(w, g, h, memory, bias_correction=True):
    """The update of AdamW, without lr."""
    memory["step"] = memory.get("step", 0) + 1
    moments = []
    for name, beta, value in (("first", h.betas[0], g), ("second", h.betas[1], g * g)):
        memory[name] = beta * memory.get(name, 0) + (1 - beta) * value
        moments.append(memory[name] / (1 - beta ** memory["step"]) if bias_correction else memory[name])
    return moments[0] / (moments[1].sqrt() + h.eps) + h.weight_decay * w


def lamb(w, g, h, memory):
    update = adam(w, g, h, memory)
    return w - h.lr * norm_ratio(w, update, trust_coef=1.0) * update


def timm_lamb(w, g, h, memory):
    update = adam(w, g, h, memory)
    return w - h.lr * (norm_ratio(w, update, trust_coef=1.0) if h.weight_decay != 0 else 1) * update


def lamb_without_bias_correction(w, g, h, memory):
    update = adam(w, g, h, memory, bias_correction=False)
    return w - h.lr * norm_ratio(w, update, trust_coef=1.0) * update


FORMULAS = {
    "torchlars 0.1.2": torchlars_0_1_2,
    "NVIDIA apex `LARC`": apex_larc,
    "quadra, lightning-bolts `LARS`": quadra_and_bolts,
    "timm `Lars`": timm_lars,
    "pytorch_optimizer `LARS`": pytorch_optimizer_lars,
    "bitsandbytes `LARS`, 32-bit": bitsandbytes_lars,
    "Barlow Twins, VICReg, VISSL `LARS`": barlow_twins,
    "SimCLR": simclr,
    "SimCLR, `classic_momentum=False`": simclr_popular,
    "`optax.lars`": optax_lars,
    "MLPerf's reference since v0.7": mlperf,
    "MLPerf's reference until v0.6": mlperf_until_v0_6,
    "Algorithm 1 of the paper": algorithm_1,
    "the 2018 blog implementation (`eta`)": blog_2018,
    "ColossalAI `Lars`": colossalai_lars,
    "`optax.lamb`": lamb,
    "timm `Lamb`": timm_lamb,
    "ColossalAI, pytorch_optimizer `Lamb`": lamb_without_bias_correction,
}
NOT_EXACT = {"MLPerf's reference until v0.6", "ColossalAI, pytorch_optimizer `Lamb`"}
HAS_NESTEROV = {
    *("torchlars 0.1.2", "NVIDIA apex `LARC`", "quadra, lightning-bolts `LARS`", "timm `Lars`", "`optax.lars`"),
    *("pytorch_optimizer `LARS`", "SimCLR", "SimCLR, `classic_momentum=False`", "MLPerf's reference since v0.7"),
}
HAS_DAMPENING = {"torchlars 0.1.2", "NVIDIA apex `LARC`", "quadra, lightning-bolts `LARS`", "timm `Lars`"}
MOMENTUM = {
    "momentum": {},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.3},
}


def by_formula(peer, problem, clipped=None, formula=None, sgd=SGD_HYPER, adam=ADAM_HYPER):
    """Take all steps of a problem by a peer's formula, or by another one with the same groups."""
    hyper = {"nesterov": False, "dampening": 0.0, **(adam if "AdamW" in CALLS[peer] else sgd)}
    layers, memories = problem.layers, [{} for _ in problem.layers]
    clipped = set() if clipped is None else clipped
    for lr, grads in zip(problem.lrs, problem.grads, strict=True):
        new = []
        for i, (w, g, memory) in enumerate(zip(layers, grads, memories, strict=True)):
            is_second = i >= 2 if is_split(peer) else i % 2 == 1
            h = SimpleNamespace(**hyper, clipped=clipped)
            h.lr = lr * (problem.second_lr if is_second else 1)
            if is_second and not is_split(peer):
                h.weight_decay = problem.second_decay
            new.append((formula or FORMULAS[peer])(w, g, h, memory))
        layers = new
    return layers


CASES = [
    pytest.param(peer, momentum, base, id=f"{peer}-{momentum}-{base}".replace("`", ""))
    for peer, momentum, base in itertools.product(CALLS, MOMENTUM, BASES)
    if peer not in NOT_EXACT
    and (momentum != "nesterov" or peer in HAS_NESTEROV)
    and (momentum != "dampening" or peer in HAS_DAMPENING)
    and (base == "torch" or "SGD" in CALLS[peer])
]


@pytest.mark.parametrize(("peer", "momentum", "base"), CASES)
def test_formulas(backend, peer, momentum, base):
    clipped = set()
    for seed in range(3):
        problem = Problem(seed)
        if peer == "ColossalAI `Lars`":
            problem = moderate(problem)
        sgd = SGD_HYPER | MOMENTUM[momentum]
        params = problem.params()
        result = problem.run(ours(CALLS[peer], params, base, sgd=sgd), params)
        assert_same(result, by_formula(peer, problem, clipped, sgd=sgd), message=f"seed {seed}")
    if "clip" in CALLS[peer] or "LARC" in CALLS[peer]:
        assert clipped == {True, False}, "one that clips always or never shows less"


@pytest.mark.parametrize("peer", [peer for peer in CALLS if peer not in NOT_EXACT])
def test_no_other_call_would_do(peer):
    def written_out(call):
        return call.replace("LARS.over(SGD)(params, **sgd)", "LARS(SGD(params, **sgd))")

    problem = moderate(Problem(0))
    for other in CALLS.values():
        params = problem.params()
        result = problem.run(ours(other, params), params)
        is_same = written_out(other) == written_out(CALLS[peer])
        assert is_same != differ(result, by_formula(peer, problem), by=1e-9), other


OPTIONS = [
    *(r", eps=0", r', norm="decayed"', r", lr_in_momentum=True", r', apply_to="update"', r", clip=True"),
    *(r", trust_coef=[\d.]+", r"(?<=plain)_inside"),
]


@pytest.mark.parametrize("peer", [peer for peer in CALLS if peer not in NOT_EXACT])
def test_no_option_can_be_left_out(peer):
    problem = moderate(Problem(1))
    for option in OPTIONS:
        call = re.sub(option, "", CALLS[peer])
        params = problem.params()
        result = problem.run(ours(call, params), params)
        assert (call == CALLS[peer]) != differ(result, by_formula(peer, problem), by=1e-12), option


# What the last column says


ZERO = {
    "weights": {"NVIDIA apex `LARC`", "bitsandbytes `LARS`, 32-bit", "Algorithm 1 of the paper"},
    "gradient": {
        *("NVIDIA apex `LARC`", "quadra, lightning-bolts `LARS`", "pytorch_optimizer `LARS`"),
        "Algorithm 1 of the paper",
    },
}


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize(
    "peer", [peer for peer in CALLS if peer not in {*NOT_EXACT, "the 2018 blog implementation (`eta`)"}]
)
def test_zero_norms(peer, zero):
    problem = moderate(Problem(3))
    problem.lrs = (4.0, *LRS[1:])  # above 1, where clipping shows
    if zero == "weights":
        problem.layers[0].zero_()
    else:
        problem.grads[0][0].zero_()
    params = problem.params()
    result, expected = problem.run(ours(CALLS[peer], params), params), by_formula(peer, problem)
    assert_same(result[1:], expected[1:])
    if peer in ZERO[zero]:
        assert differ(result[:1], expected[:1])
    else:
        assert_same(result[:1], expected[:1])


@pytest.mark.parametrize("peer", ["quadra, lightning-bolts `LARS`", "timm `Lars`", "timm `Lamb`"])
def test_groups_without_weight_decay(peer):
    problem = Problem(4)
    problem.second_decay = 0.0
    expected = by_formula(peer, problem)
    for trust_coef, is_same in ({"trust_coef": None}, True), ({}, False):
        params = problem.params()
        groups = two_groups(params, weight_decay=0.0, **trust_coef)
        result = problem.run(ours(CALLS[peer], params, params=groups), params)
        assert is_same != differ(result, expected, by=1e-12)


def test_dampening_of_pytorch_optimizer():
    peer, problem, sgd = "pytorch_optimizer `LARS`", Problem(5), SGD_HYPER | {"dampening": 0.3}
    params = problem.params()
    assert differ(problem.run(ours(CALLS[peer], params, sgd=sgd), params), by_formula(peer, problem, sgd=sgd))


def test_limits_of_colossalai():
    peer, problem = "ColossalAI `Lars`", Problem(0)
    params = problem.params()
    result, expected = problem.run(ours(CALLS[peer], params), params), by_formula(peer, problem)
    is_clamped = [any(bool((grads[i].abs() > 10).any()) for grads in problem.grads) for i in range(4)]
    assert set(is_clamped) == {True, False}
    for one, other, clamped in zip(result, expected, is_clamped, strict=True):
        assert differ([one], [other]) == clamped
    problem = moderate(Problem(0))
    problem.grads[0][0] *= 1e-9
    problem.layers[0] *= 1e3
    assert 0.001 * problem.layers[0].norm() / (0.01 * problem.layers[0].norm() + problem.grads[0][0].norm()) < 50
    sgd = SGD_HYPER | {"weight_decay": 0.0}
    params = problem.params()
    result, expected = problem.run(ours(CALLS[peer], params, sgd=sgd), params), by_formula(peer, problem, sgd=sgd)
    assert differ(result[:1], expected[:1])
    assert_same(result[1:], expected[1:])


def test_mlperf_until_v0_6_is_exact_without_weight_decay_only():
    peer, problem = "MLPerf's reference until v0.6", Problem(6)
    params = problem.params()
    result = problem.run(ours(CALLS[peer], params), params)
    assert differ(result, by_formula(peer, problem))
    sgd, problem.second_decay = SGD_HYPER | {"weight_decay": 0.0}, 0.0
    params = problem.params()
    result = problem.run(ours(CALLS[peer], params, sgd=sgd, params=two_groups(params, weight_decay=0.0)), params)
    assert_same(result, by_formula(peer, problem, sgd=sgd))


def test_lamb_without_bias_correction_is_exact_without_eps_and_weight_decay_only():
    peer, problem = "ColossalAI, pytorch_optimizer `Lamb`", Problem(7)
    problem.second_decay = 0.0
    for eps, weight_decay, is_same in (0.0, 0.0, True), (1e-3, 0.0, False), (0.0, 0.1, False):
        adam = ADAM_HYPER | {"eps": eps, "weight_decay": weight_decay}
        params = problem.params()
        optimizer = ours(CALLS[peer], params, adam=adam, params=two_groups(params, weight_decay=0.0))
        assert is_same != differ(problem.run(optimizer, params), by_formula(peer, problem, adam=adam), by=1e-12)


VARIANTS = {
    "SwAV": ("NVIDIA apex `LARC`", "**sgd)", "**sgd), trust_coef=0.001, clip=False", torchlars_0_1_2),
    "without filters": (
        "Barlow Twins, VICReg, VISSL `LARS`",
        '[{"params": weights}, plain]',
        "[{'params': weights}, {**plain, 'trust_coef': 0.001, 'weight_decay': 0.01}]",
        lambda w, g, h, memory: barlow_twins(w[None], g[None], h, memory)[0],
    ),
    "TensorFlow 2": ("MLPerf's reference since v0.7", "eps=0", "eps=1e-7", partial(mlperf, eps=1e-7)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    peer, old, new, formula = VARIANTS[name]
    problem = Problem(8)
    params = problem.params()
    result = problem.run(ours(CALLS[peer].replace(old, new), params), params)
    assert_same(result, by_formula(peer, problem, formula=formula))
    assert differ(result, by_formula(peer, problem), by=1e-12)


# The peers themselves


@pytest.fixture
def installed(monkeypatch):
    """Import a peer, or skip the test."""

    def import_or_skip(name):
        monkeypatch.syspath_prepend(str(ROOT))
        load = importlib.import_module
        if name.startswith("timm."):  # its parents import torchvision
            load = load("benchmarks.step_time.contestants").import_alone
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return load(name)
            except ImportError as error:
                pytest.skip(f"{name} is not installed: {error}")

    return import_or_skip


def in_form(optimizer, foreach):
    """The argument for a form of an optimizer; a version that has one form only is compared in that."""
    if "foreach" in inspect.signature(optimizer).parameters:
        return {"foreach": foreach}
    if foreach:
        pytest.skip(f"this version of {optimizer.__module__} has no foreach")
    return {}


def compare(problem, optimizer, params, peer, peer_params, tolerance=1e-12):
    """Run both, and compare them after every step. Return whether ratios were below 1, of all layers and steps."""
    is_below_1 = set()
    for i, _ in enumerate(zip(problem.steps(optimizer, params), problem.steps(peer, peer_params), strict=True)):
        optimizer.step()
        peer.step()
        assert_same(params, peer_params, tolerance, f"step {i}")
        is_below_1 |= {float(ratio) < 1 for ratio in optimizer.trust_ratios().values()}
    return is_below_1


TIMM = [
    pytest.param(momentum, clip, foreach, id=f"{momentum}{'-clip' * clip}{'-foreach' * foreach}")
    for momentum, clip, foreach in itertools.product(MOMENTUM, (False, True), (False, True))
]


@pytest.mark.parametrize(("momentum", "clip", "foreach"), TIMM)
def test_timm_lars(installed, backend, momentum, clip, foreach):
    lars = installed("timm.optim.lars").Lars
    sgd, clipped = SGD_HYPER | MOMENTUM[momentum], set()
    for seed in range(3):
        problem = Problem(seed)
        params, theirs = problem.params(), problem.params()
        call = CALLS["timm `Lars`"].replace("over(SGD)", f"over(SGD, clip={clip}, trust_coef=0.02)")
        optimizer = ours(call, params, sgd=sgd)
        peer = lars(two_groups(theirs), **sgd, trust_clip=clip, trust_coeff=0.02, **in_form(lars, foreach))
        clipped |= compare(problem, optimizer, params, peer, theirs)
    assert not clip or clipped == {True, False}


@pytest.mark.parametrize("always_adapt", [False, True])
def test_timm_lars_without_weight_decay_and_with_zero_layers(installed, always_adapt):
    lars = installed("timm.optim.lars").Lars
    problem = Problem(9)
    problem.lrs = (4.0, *LRS[1:])
    problem.layers[0].zero_()
    problem.grads[2][2].zero_()
    params, theirs = problem.params(), problem.params()
    options = {"weight_decay": 0.0} if always_adapt else {"weight_decay": 0.0, "trust_coef": None}
    call = CALLS["timm `Lars`"].replace("over(SGD)", "over(SGD, clip=True)")
    optimizer = ours(call, params, params=two_groups(params, **options))
    groups = two_groups(theirs, weight_decay=0.0)
    peer = lars(groups, **SGD_HYPER, trust_clip=True, always_adapt=always_adapt)
    compare(problem, optimizer, params, peer, theirs)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_timm_lamb(installed, backend, clip, foreach):
    lamb = installed("timm.optim.lamb").Lamb
    for seed in range(3):
        problem = Problem(seed)
        params, theirs = problem.params(), problem.params()
        call = CALLS["timm `Lamb`"].replace("**adam)", f"**adam), clip={clip}")
        peer = lamb(two_groups(theirs), **ADAM_HYPER, max_grad_norm=None, trust_clip=clip, **in_form(lamb, foreach))
        compare(problem, ours(call, params), params, peer, theirs)


@pytest.mark.parametrize("always_adapt", [False, True])
def test_timm_lamb_clips_gradients_and_adapts_what_decays(installed, always_adapt):
    lamb = installed("timm.optim.lamb").Lamb
    problem = Problem(10)
    params, theirs = problem.params(), problem.params()
    options = {"weight_decay": 0.0} if always_adapt else {"weight_decay": 0.0, "trust_coef": None}
    optimizer = ours(CALLS["timm `Lamb`"], params, params=two_groups(params, **options))
    peer = lamb(two_groups(theirs, weight_decay=0.0), **ADAM_HYPER, always_adapt=always_adapt)
    norms = []
    for _ in zip(problem.steps(optimizer, params), problem.steps(peer, theirs), strict=True):
        norms.append(nn.utils.clip_grad_norm_(params, 1.0) > 1)
        optimizer.step()
        peer.step()
    assert any(norms)
    assert_same(params, theirs, 1e-5)
    assert differ(params, theirs, by=1e-13)


@pytest.mark.parametrize("momentum", ["momentum", "nesterov"])
@pytest.mark.parametrize("foreach", [False, True])
def test_pytorch_optimizer_lars(installed, backend, momentum, foreach):
    lars = installed("pytorch_optimizer").LARS
    sgd = SGD_HYPER | MOMENTUM[momentum]
    for seed in range(3):
        problem = Problem(seed)
        params, theirs = problem.params(), problem.params()
        optimizer = ours(CALLS["pytorch_optimizer `LARS`"], params, sgd=sgd)
        peer = lars([{"params": theirs[:2]}, {"params": theirs[2:]}], **sgd, **in_form(lars, foreach))
        compare(problem, optimizer, params, peer, theirs)


def test_pytorch_optimizer_lars_is_as_its_formula_where_it_differs(installed):
    lars = installed("pytorch_optimizer").LARS
    sgd, problem = SGD_HYPER | {"dampening": 0.3}, Problem(11)
    problem.grads[0][0].zero_()
    theirs = problem.params()
    peer = lars([{"params": theirs[:2]}, {"params": theirs[2:]}], **sgd)
    assert_same(problem.run(peer, theirs), by_formula("pytorch_optimizer `LARS`", problem, sgd=sgd))


@pytest.mark.parametrize("foreach", [False, True])
def test_pytorch_optimizer_lamb(installed, foreach):
    lamb = installed("pytorch_optimizer").Lamb
    problem = Problem(12)
    problem.lrs = [lr / 10 for lr in LRS]
    problem.layers = [layer / layer.norm() for layer in problem.layers]
    params, theirs = problem.params(), problem.params()
    adam = ADAM_HYPER | {"eps": 0.0, "weight_decay": 0.0}
    call = CALLS["ColossalAI, pytorch_optimizer `Lamb`"]
    optimizer = ours(call, params, adam=adam, params=two_groups(params, weight_decay=0.0))
    peer = lamb(two_groups(theirs, weight_decay=0.0), **adam, adam_debias=True, **in_form(lamb, foreach))
    compare(problem, optimizer, params, peer, theirs)
    params[0].data.mul_(100)
    theirs[0].data.mul_(100)
    for _ in zip(problem.steps(optimizer, params), problem.steps(peer, theirs), strict=True):
        optimizer.step()
        peer.step()
    assert differ(params[:1], theirs[:1])
    assert_same(params[1:], theirs[1:])


@pytest.mark.parametrize("name", ["LARS", "PytorchLARS"])
@pytest.mark.parametrize("max_unorm", [0.02, 0.3])
def test_bitsandbytes_lars(installed, backend, name, max_unorm):
    lars = getattr(installed("bitsandbytes").optim.lars, name)
    clipped = set()
    for seed in range(3):
        problem = Problem(seed, torch.float32)
        params, theirs = problem.params(), problem.params()
        call = CALLS["bitsandbytes `LARS`, 32-bit"].replace("0.02", str(max_unorm))
        optimizer = ours(call, params)
        peer = lars(two_groups(theirs), **SGD_HYPER, max_unorm=max_unorm)
        clipped |= compare(problem, optimizer, params, peer, theirs, tolerance=1e-5)
    assert clipped == {True, False}


def test_bitsandbytes_ignores_nesterov_and_dampening_and_leaves_zeros(installed):
    module = installed("bitsandbytes").optim.lars
    call, problem = CALLS["bitsandbytes `LARS`, 32-bit"], Problem(13, torch.float32)
    for momentum in {"nesterov": True}, {"dampening": 0.3}:
        sgd = SGD_HYPER | momentum
        for name, is_ignored in ("LARS", True), ("PytorchLARS", False):
            params, theirs = problem.params(), problem.params()
            optimizer = ours(call, params, sgd=SGD_HYPER if is_ignored else sgd)
            compare(problem, optimizer, params, getattr(module, name)(two_groups(theirs), **sgd), theirs, 1e-5)
    problem.layers[0].zero_()
    params, theirs = problem.params(), problem.params()
    problem.run(ours(call, params), params)
    problem.run(module.LARS(two_groups(theirs), **SGD_HYPER), theirs)
    assert torch.count_nonzero(theirs[0]) == 0
    assert torch.count_nonzero(params[0]) > 0
    assert_same(params[1:], theirs[1:], 1e-5)


@pytest.fixture
def by_optax(installed):
    """Return a function that takes all steps with some layers of a problem."""
    jax, optax = installed("jax"), installed("optax")

    def run(problem, indices, relative, transformation):
        with jax.enable_x64(True):
            lrs = jax.numpy.array([lr * relative for lr in problem.lrs])
            optimizer = transformation(optax, lambda count: lrs[count])
            params = {str(i): jax.numpy.array(problem.layers[i].numpy()) for i in indices}
            state = optimizer.init(params)
            for grads in problem.grads:
                gradients = {str(i): jax.numpy.array(grads[i].numpy()) for i in indices}
                updates, state = optimizer.update(gradients, state, params)
                params = optax.apply_updates(params, updates)
            assert all(str(param.dtype) == "float64" for param in params.values())
            return {i: torch.tensor(params[str(i)].tolist(), dtype=torch.float64) for i in indices}

    return run


@pytest.mark.parametrize("nesterov", [False, True])
def test_optax_lars(by_optax, backend, nesterov):
    sgd = SGD_HYPER | {"nesterov": nesterov}
    for seed in range(2):
        problem = Problem(seed)
        problem.layers[1].zero_()
        problem.grads[3][0].zero_()
        params = problem.params()
        result = problem.run(ours(CALLS["`optax.lars`"], params, sgd=sgd), params)
        for indices, relative, decay in ((0, 2), 1.0, 0.01), ((1, 3), SECOND_LR, SECOND_DECAY):
            expected = by_optax(
                problem, indices, relative, lambda optax, lr, d=decay: optax.lars(lr, d, nesterov=nesterov)
            )
            assert_same([result[i] for i in indices], expected.values(), message=f"seed {seed}")


def test_optax_lars_with_masks(by_optax, backend):
    problem = Problem(14)
    problem.second_lr = 1.0
    params = problem.params()
    call = CALLS["`optax.lars`"].replace("params", '[{"params": weights}, plain_inside]')
    result = problem.run(ours(call, params), params)
    mask = {str(i): i < 2 for i in range(4)}
    masks = {"weight_decay_mask": mask, "trust_ratio_mask": mask}
    expected = by_optax(problem, range(4), 1.0, lambda optax, lr: optax.lars(lr, 0.01, **masks))
    assert_same(result, expected.values())


def test_optax_trust_ratio_of_an_update(by_optax, backend):
    """The LAMB paper's LARS, which is SimCLR's with popular momentum."""
    problem = Problem(15)
    params = problem.params()
    result = problem.run(ours("LAMB(SGD(params, **sgd), trust_coef=0.001)", params), params)
    for indices, relative, decay in ((0, 2), 1.0, 0.01), ((1, 3), SECOND_LR, SECOND_DECAY):

        def lars(optax, lr, decay=decay):
            return optax.chain(
                optax.add_decayed_weights(decay),
                optax.trace(0.9),
                optax.scale_by_trust_ratio(trust_coefficient=0.001),
                optax.scale_by_learning_rate(lr),
            )

        assert_same([result[i] for i in indices], by_optax(problem, indices, relative, lars).values())


def test_optax_lamb(by_optax, backend):
    for seed in range(2):
        problem = Problem(seed)
        problem.layers[1].zero_()
        params = problem.params()
        result = problem.run(ours(CALLS["`optax.lamb`"], params), params)
        for indices, relative, decay in ((0, 2), 1.0, 0.1), ((1, 3), SECOND_LR, SECOND_DECAY):
            expected = by_optax(
                problem, indices, relative, lambda optax, lr, d=decay: optax.lamb(lr, 0.8, 0.95, 1e-3, weight_decay=d)
            )
            assert_same([result[i] for i in indices], expected.values(), message=f"seed {seed}")
