"""The calls under "Coming from X" in examples/README.md, the formulas of the peers, and problems to solve with both."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import torchlars.optim

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "examples" / "README.md").read_text("utf-8")
SECTION = re.search(r"^## Coming from X\n(.*?)(?:^## |\Z)", README, re.M | re.S)[1]
PREAMBLE = re.search(r"^```python\n(.*?)^```", SECTION, re.M | re.S)[1]
CALLS = {peer: call[1:-1] for peer, call in re.findall(r"^\| (.+?) \| (`[^`|]+`) \|", SECTION, re.M)}
BASES = {"torch": torch.optim, "torchlars": torchlars.optim}
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
    known.update({name: getattr(BASES[base], name) for name in ("SGD", "Adam", "AdamW")})
    known.update({"params": two_groups(layers), "sgd": SGD_HYPER, "adam": ADAM_HYPER, **names})
    return eval(call, known)


def assert_same(actual, expected, tolerance=1e-12, message=""):
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"{message} layer {i}: {text}"
        )


def differ(actual, expected, by=1e-6):
    return any(not torch.allclose(one, other, rtol=by, atol=by) for one, other in zip(actual, expected, strict=True))


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


def solo_learn(w, g, h, memory, eta=0.001, clip_lr=False, exclude_bias_n_norm=True):
    if (w.ndim > 1 or not exclude_bias_n_norm) and w.norm() != 0 and g.norm() != 0:
        ratio = raw_ratio(h, w, g, trust_coef=eta, eps=1e-8)
        if clip_lr:
            h.clipped.add(bool(ratio / h.lr > 1))
            ratio = min(ratio / h.lr, 1)
        g = ratio * (g + h.weight_decay * w)
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


def vissl(w, g, h, memory):
    """With exclude_bias_and_norm, and weight decay everywhere."""
    g = g + h.weight_decay * w
    return w - h.lr * zero_momentum(h, memory, (norm_ratio(w, g) if w.ndim > 1 else 1) * g)


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


def openmmlab(w, g, h, memory, lars_exclude=True, decay_mult=0.0):
    """With these two for vectors, as in most of its configurations."""
    is_excluded = w.ndim <= 1 and lars_exclude
    ratio = 1.0 if is_excluded else raw_ratio(h, w, g, eps=1e-8)
    decay = h.weight_decay * (decay_mult if w.ndim <= 1 else 1)
    return w - torch_momentum(h, memory, h.lr * ratio * (g + decay * w))


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


def intel_lars(w, g, h, memory):
    return w - h.lr * raw_ratio(h, w, g) * torch_momentum(h, memory, g + h.weight_decay * w)


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


def apex_lamb(w, g, h, memory, adam_w_mode=True, use_nvlamb=False):
    """Without the clipping of all gradients together."""
    if adam_w_mode:
        update = adam(w, g, h, memory)
    else:
        update = adam(w, g + h.weight_decay * w, SimpleNamespace(**{**vars(h), "weight_decay": 0.0}), memory)
    is_adapted = use_nvlamb or h.weight_decay != 0
    return w - h.lr * (norm_ratio(w, update, trust_coef=1.0) if is_adapted else 1) * update


def deepspeed_lamb(w, g, h, memory, bias_correction=True):
    update = adam(w, g, h, memory, bias_correction=False)
    ratio = 1.0
    if w.norm() > 0 and update.norm() > 0:
        ratio = w.norm() / update.norm()
        h.clipped.add(bool(ratio < 0.01) - bool(ratio > 10))
        ratio = ratio.clamp(0.01, 10)
    return w - h.lr * (deepspeed_factor(h.betas, memory["step"]) if bias_correction else 1) * ratio * update


def deepspeed_factor(betas, step):
    return (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)


def lamb_without_bias_correction(w, g, h, memory):
    update = adam(w, g, h, memory, bias_correction=False)
    return w - h.lr * norm_ratio(w, update, trust_coef=1.0) * update


FORMULAS = {
    "torchlars 0.1.2": torchlars_0_1_2,
    "NVIDIA apex `LARC`": apex_larc,
    "quadra, lightning-bolts, lightly `LARS`": quadra_and_bolts,
    "timm `Lars`": timm_lars,
    "pytorch_optimizer `LARS`": pytorch_optimizer_lars,
    "bitsandbytes `LARS`, `LARS32bit`": bitsandbytes_lars,
    "bitsandbytes `LARS8bit`, `LARS(optim_bits=8)`": bitsandbytes_lars,  # as it is meant, and without rounding to 8 bits
    "solo-learn `LARS`": solo_learn,
    "solo-learn `LARS(clip_lr=True)`": partial(solo_learn, eta=0.02, clip_lr=True),
    "Barlow Twins, VICReg, VISSL, DINO, MAE, MoCo v3 `LARS`": barlow_twins,
    "mmselfsup, mmpretrain `LARS`": openmmlab,
    "SimCLR": simclr,
    "SimCLR, `classic_momentum=False`": simclr_popular,
    "`optax.lars`": optax_lars,
    "MLPerf's reference since v0.7": mlperf,
    "MLPerf's reference until v0.6": mlperf_until_v0_6,
    "Algorithm 1 of the paper": algorithm_1,
    "the 2018 blog implementation (`eta`)": blog_2018,
    "Intel's extension for PyTorch, `Lars` and `lars_fused_step`": intel_lars,
    "ColossalAI `Lars`": colossalai_lars,
    "`optax.lamb`": lamb,
    "timm `Lamb`": timm_lamb,
    "NVIDIA apex `FusedLAMB`": apex_lamb,
    "DeepSpeed `FusedLamb`": deepspeed_lamb,
    "ColossalAI, pytorch_optimizer `Lamb`": lamb_without_bias_correction,
}
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
