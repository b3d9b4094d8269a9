"""Groups, gradients and an oracle for tests of the dialects of LARS."""

import math

import torch
from optimizers import params_of
from torch import nn


def layers(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    shapes = [(3, 4), (5,), (), (2, 2)]
    params = [(i + 0.3) * torch.randn(s, generator=generator, dtype=wide) for i, s in enumerate(shapes, start=1)]
    params[3].zero_()
    params[0] = params[0].mT.contiguous().mT  # another memory order than its gradient's
    return [nn.Parameter(param.to(dtype)) for param in params]


def groups(dtype=torch.float64, update=False):
    """The wrapper's options; others, ascending; not adapted; not adapted, but lr in the momentum."""
    others = {"trust_coef": 0.05, "eps": 0.2, "clip": True, "norm": "decayed", "maximize": True}
    return [
        {"params": layers(0, dtype), "weight_decay": 0.1, "lr": 0.4},
        {"params": layers(1, dtype), "weight_decay": 0.03, "lr": 0.7, **others},
        {"params": layers(2, dtype), "weight_decay": 0.2, "lr": 0.2, "trust_coef": None},
        {"params": layers(3, dtype), "weight_decay": 0.15, "lr": 0.3, "trust_coef": None, "lr_in_momentum": True},
        {"params": layers(4, dtype), "weight_decay": 0.0, "lr": 0.9, "maximize": update},
    ]


def norm(tensor):
    return math.sqrt(math.fsum(abs(x) ** 2 for x in tensor.flatten().tolist()))


class Oracle:
    """SGD under LARS, as the formulas say."""

    def __init__(self, param_groups, **options):
        self.param_groups = [{**options, **group} for group in param_groups]
        self.momenta, self.ratios = {}, {}

    def ratio(self, w, g, d, o):
        decayed = o["norm"] == "decayed"
        w_norm, g_norm = norm(w), norm(d if decayed else g)
        r = 1.0
        if w_norm != 0 and g_norm != 0:
            rest = 0.0 if decayed else o["weight_decay"] * w_norm
            r = o["trust_coef"] * w_norm / (g_norm + rest + o["eps"])
        return min(r / float(o["lr"]), 1.0) if o["clip"] else r

    def step(self):
        self.ratios = {}
        for o in self.param_groups:
            for p in o["params"]:
                if p.grad is None:
                    continue
                w, g, lr = p.detach().clone(), p.grad, float(o["lr"])
                d = (-g if o["maximize"] else g) + o["weight_decay"] * w
                r = 1.0
                if o["trust_coef"] is not None:
                    r = self.ratios[p] = self.ratio(w, g, d, o)
                on_update = o["apply_to"] == "update" and o["trust_coef"] is not None
                d = d if on_update else r * d
                if o["lr_in_momentum"]:
                    d, lr = lr * d, 1.0
                if o["momentum"]:
                    if p in self.momenta:
                        self.momenta[p] = o["momentum"] * self.momenta[p] + (1 - o["dampening"]) * d
                    else:
                        self.momenta[p] = d.clone()
                    d = d + o["momentum"] * self.momenta[p] if o["nesterov"] else self.momenta[p]
                p.detach().copy_(w - (r if on_update else 1.0) * lr * d)


def give_gradients(optimizers, step):
    """The same for all; one that is zero, one that is missing, one that the weight decay does not change."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, params in enumerate(zip(*map(params_of, optimizers), strict=True)):
        wide = torch.complex128 if params[0].is_complex() else torch.float64
        grad = 0.4 * (1 + index % 3) * torch.randn(params[0].shape, generator=generator, dtype=wide)
        grad = grad * 0 if (step, index) in {(1, 0), (1, 5)} else grad
        for param in params:
            param.grad = None if (step, index) == (2, 1) else grad.to(params[0].dtype, copy=True)
