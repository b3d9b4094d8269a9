"""Before anything is timed: those who claim one formula must compute one thing.

Each takes three steps from the same float32 weights, over layers of different scales, two of them zero at first, with
new gradients every step. What they are held against is the formula itself, spelled out in float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.step_time.contestants import PART, Contestant, Hyper

SHAPES = ((8, 3, 3, 3), (8,), (16, 8), (16,), (1, 4, 8), (16, 16))
ZEROS = (1, 4)  # a vector and a matrix
STEPS = 3
TOLERANCE = 1e-5

#: Large enough that every term counts: a trust ratio of 0.02 or so, and half of it weight decay's.
HYPER = Hyper(lr=0.75, weight_decay=0.5, trust_coef=0.02, betas=(0.8, 0.95), adam_eps=0.01)


class Disagreement(Exception):
    """Someone computes something else than was claimed."""


def check(entrants: Iterable[Contestant], device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Return the error of each contestant that claims a formula, and why others are left out.

    A contestant of someone else that is off by more than the tolerance is left out.

    Raises:
        Disagreement: torchlars, or the floor that all ratios are of, is off by more than the tolerance.
    """
    weights, gradients = inputs(device)
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for entrant in entrants:
        try:
            found = outcome(entrant, weights, gradients)
        except Exception as error:
            left_out[entrant.name] = reason_to_leave_out(entrant, error)
            continue
        if entrant.formula is not None:
            wanted = expected(entrant.formula, weights, gradients)
            errors[entrant.name] = max(
                float((a - b).norm() / b.norm())
                for a, b in zip(found, wanted, strict=True)
                if a.ndim > 1 or not entrant.matrices_only
            )
    by_name = {entrant.name: entrant for entrant in entrants}
    wrong = {
        name: f"does not compute {by_name[name].formula} (off by {error:.1e})"
        for name, error in errors.items()
        if not error <= TOLERANCE  # NaN is wrong, too
    }
    decisive = ", ".join(f"{name} {reason}" for name, reason in wrong.items() if is_decisive(by_name[name]))
    if decisive:
        raise Disagreement(f"nothing was timed: {decisive}; at most {TOLERANCE:.0e} is allowed")
    return {name: error for name, error in errors.items() if name not in wrong}, left_out | wrong


def is_decisive(entrant: Contestant) -> bool:
    """Return whether no figure means anything without a contestant: torchlars, and the floor that all ratios are of."""
    return (
        entrant.form == "floor"
        or entrant.name == PART
        or entrant.name.startswith(("LARS(", "LAMB(", "torchlars.optim."))
    )


def reason_to_leave_out(entrant: Contestant, error: Exception) -> str:
    """Return why a contestant is left out, or raise what must not be passed over."""
    if not (entrant.is_foreign or isinstance(error, ImportError)):
        raise error
    message = str(error).strip()
    return f"{type(error).__name__}: {message.splitlines()[0]}" if message else type(error).__name__


def inputs(device: torch.device) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return weights, and gradients for each step."""
    generator = torch.Generator().manual_seed(20170813)

    def layers(scale: float) -> list[Tensor]:
        return [
            (scale * 2.0**index * torch.randn(shape, generator=generator)).to(device)
            for index, shape in enumerate(SHAPES)
        ]

    weights = layers(0.1)
    for index in ZEROS:
        weights[index].zero_()
    return weights, [layers(0.05) for _ in range(STEPS)]


def outcome(entrant: Contestant, weights: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """Return how far every layer has moved; of a mere LARS part, the last gradients."""
    params = [Parameter(weight.clone()) for weight in weights]
    for param in params:
        param.grad = torch.zeros_like(param)
    step = entrant.build(params, HYPER)
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad.copy_(grad)
        step()
    return results(entrant.formula, params, weights)


def expected(formula: str, weights: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """Return what :func:`outcome` must be, in float64."""
    params = [Parameter(weight.double()) for weight in weights]
    if formula.startswith("LAMB"):
        is_corrected = formula == "LAMB"
        updated = [lamb(param.detach(), grads, is_corrected) for param, *grads in zip(params, *gradients, strict=True)]
        return results(formula, [Parameter(param) for param in updated], weights)
    is_lars = formula.startswith("LARS")
    loop = {"weight_decay": 0.0 if is_lars else HYPER.weight_decay, "foreach": False, "fused": False}
    base: torch.optim.Optimizer | None = None
    if formula.endswith("SGD"):
        base = torch.optim.SGD(params, HYPER.lr, momentum=HYPER.momentum, **loop)
    elif formula.endswith("Adam"):
        base = torch.optim.Adam(params, HYPER.lr, **loop)
    elif formula == "AdamW":
        base = torch.optim.AdamW(params, HYPER.lr, HYPER.betas, HYPER.adam_eps, **loop)
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad = lars_gradient(param.detach(), grad.double()) if is_lars else grad.double()
        if base is not None:
            base.step()
    return results(formula, params, weights)


def lars_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """Return r · (g + λw)."""
    param_norm, grad_norm = param.norm(), grad.norm()
    ratio = torch.ones_like(param_norm)
    if param_norm > 0 and grad_norm > 0:
        ratio = HYPER.trust_coef * param_norm / (grad_norm + HYPER.weight_decay * param_norm + HYPER.eps)
    return ratio * (grad + HYPER.weight_decay * param)


def lamb(param: Tensor, grads: list[Tensor], is_corrected: bool) -> Tensor:
    """Return a parameter after a step of LAMB for each of its gradients, with or without bias correction."""
    (beta1, beta2), first, second = HYPER.betas, torch.zeros_like(param), torch.zeros_like(param)
    for count, grad in enumerate(grads, start=1):
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad**2
        scales = (1 - beta1**count, 1 - beta2**count) if is_corrected else (1.0, 1.0)
        update = first / scales[0] / ((second / scales[1]).sqrt() + HYPER.adam_eps) + HYPER.weight_decay * param
        ratio = param.norm() / update.norm() if param.norm() > 0 and update.norm() > 0 else 1.0
        param = param - HYPER.lr * ratio * update
    return param


def results(formula: str | None, params: list[Parameter], weights: list[Tensor]) -> list[Tensor]:
    """Return what is compared."""
    if formula == "LARS part":
        return [param.grad.double() for param in params]
    return [param.detach().double() - weight.double() for param, weight in zip(params, weights, strict=True)]
