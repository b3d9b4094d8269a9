"""The wrappers that share their manners, and a step of each by hand: what tests for all of them are held to.

The oracle is a plain base: given gradients that were scaled here, or corrected here after its step. In float64, and
with norms that Python adds up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import LAMB, LARS

EPS, TRUST_COEF = 0.05, 0.3  # of the wrapper; far from the defaults, so that each is seen to matter


@dataclass(frozen=True)
class Wrapper:
    """A wrapper as the tests of manners want it: ``wrap(base)``."""

    name: str
    cls: Any
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self, base: Optimizer, eps: float = EPS, trust_coef: float = TRUST_COEF, **options: Any) -> Any:
        return self.cls(base, eps=eps, trust_coef=trust_coef, **self.options, **options)

    def __str__(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        """Its own key in a state dict."""
        return self.cls.state_key

    @property
    def consumes_gradients(self) -> bool:
        """Whether gradients are scaled; else it is updates."""
        return self.cls is LARS and not self.options

    @property
    def own_values(self) -> dict[str, Any]:
        """What a state dict holds under its own key."""
        if self.cls is LAMB:
            return {"trust_coef": TRUST_COEF, "eps": EPS, "clip": False, "always_adapt": True}
        plain = {"clip": False, "norm": "raw", "lr_in_momentum": False, "apply_to": "gradient"}
        plain |= {"always_adapt": True, "weight_decay": None}
        return {"eps": EPS, "trust_coef": TRUST_COEF, **plain, **self.options}


WRAPPERS = [Wrapper("LARS", LARS), Wrapper("LAMB", LAMB), Wrapper("LARS-update", LARS, {"apply_to": "update"})]
wrappers = pytest.mark.parametrize("wrap", WRAPPERS, ids=str)


def norm(tensor: Tensor) -> float:
    return math.sqrt(math.fsum(abs(value) ** 2 for value in tensor.detach().flatten().tolist()))


def trust_ratio(param: Tensor, grad: Tensor, weight_decay: float, trust_coef: float, eps: float) -> float:
    param_norm, grad_norm = norm(param), norm(grad)
    if param_norm == 0 or grad_norm == 0:
        return 1.0
    return trust_coef * param_norm / (grad_norm + weight_decay * param_norm + eps)


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))


def adapted(param: Tensor, grad: Tensor, ratio: float, weight_decay: float, maximize: bool) -> Tensor:
    """What the base must see: r · (g + λw), rounded once to the gradient's dtype."""
    decay = -weight_decay if maximize else weight_decay
    return (ratio * (wide(grad) + decay * wide(param))).to(grad.dtype)


class ByHand:
    """A plain base whose steps are made those of a wrapper."""

    def __init__(
        self, wrap: Wrapper, base: Optimizer, coupled: bool = True, eps: float = EPS, trust_coef: float = TRUST_COEF
    ) -> None:
        self.wrap, self.base = wrap, base
        self.ratios: list[float] = []  # of the last step
        self.own: list[Any] = []  # of each group: (λ, η, ε), or None if it is not adapted
        for group in base.param_groups:
            group_trust_coef = group.pop("trust_coef", trust_coef)
            group_eps = group.pop("eps", eps) if "eps" not in base.defaults else eps
            weight_decay = group.get("weight_decay", 0.0) if coupled else 0.0
            self.own.append(None if group_trust_coef is None else (weight_decay, group_trust_coef, group_eps))
            if wrap.consumes_gradients and group_trust_coef is not None and weight_decay != 0:
                group["weight_decay"] = 0.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @property
    def state(self) -> Any:
        return self.base.state

    def zero_grad(self) -> None:
        self.base.zero_grad()

    def adapt(self) -> dict[Tensor, float]:
        """Return the trust ratios of all gradients; scale them if that is what the wrapper does."""
        ratios: dict[Tensor, float] = {}
        for group, own in zip(self.base.param_groups, self.own, strict=True):
            for param in group["params"]:
                if own is None or param.grad is None or param in ratios:
                    continue
                grad = param.grad.coalesce() if param.grad.is_sparse else param.grad
                ratio = ratios[param] = trust_ratio(param, grad.to_dense(), *own)
                if not self.wrap.consumes_gradients:
                    continue
                if grad.is_sparse:
                    values = ratio * grad.values()
                    param.grad = torch.sparse_coo_tensor(grad.indices(), values, grad.shape).coalesce()
                else:
                    param.grad = adapted(param, grad, ratio, own[0], group.get("maximize", False))
        return ratios

    def scale_updates(self, old_params: dict[Tensor, Tensor], ratios: dict[Tensor, float]) -> None:
        """Correct what the base did; LAMB measures that."""
        is_lamb, seen = self.wrap.cls is LAMB, set()
        for group, own in zip(self.base.param_groups, self.own, strict=True):
            for param in group["params"]:
                if own is None or param.grad is None or param in seen:
                    continue
                seen.add(param)
                old = wide(old_params[param])
                update = wide(param) - old
                if is_lamb:
                    lr = float(group["lr"]) or 1.0  # with lr 0 there is no update
                    ratios[param] = trust_ratio(old, update / lr, 0.0, *own[1:])
                if ratios[param] != 1:
                    param.detach().copy_(old + ratios[param] * update)

    def step(self, closure: Any = None) -> Any:
        """Take a step, and return what the base returned."""
        old_params = {p: p.detach().clone() for group in self.base.param_groups for p in group["params"]}
        ratios: dict[Tensor, float] = {}

        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            ratios.update(self.before())
            return loss

        if closure is None:
            ratios.update(self.before())
        loss = self.base.step() if closure is None else self.base.step(evaluate)
        if not self.wrap.consumes_gradients:
            self.scale_updates(old_params, ratios)
        self.ratios = list(ratios.values())
        return loss

    def before(self) -> dict[Tensor, float]:
        """Do what is to be done as soon as there are gradients."""
        return {} if self.wrap.cls is LAMB else self.adapt()
