"""All who take a step of LAMB, beside the AdamW that is their floor. Those of LARS are in contestants.py.

Peers and algorithms are set up to compute LAMB as its paper defines it, where they can: with bias correction, with
weight decay in the update whose norm is taken, and without clipping of gradients.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks.step_time.contestants import Contestant, Hyper, Step, grads_of, import_alone
from torchlars import LAMB, ops


def contestants(base: str) -> list[Contestant]:
    """Return all contestants. ``base`` is the form of AdamW that is the floor and every wrapper's base: see README."""

    def torch_adamw(form: str) -> Contestant:
        is_floor = form == base
        return Contestant(
            f"AdamW {form}",
            "AdamW",
            lambda params, hyper: adamw(params, hyper, form).step,
            form="floor" if is_floor else "",
            accesses=7 if is_floor else None,  # reads w, g, m and v, and writes w, m and v
            is_core=is_floor,
            states=2,
        )

    def other(
        name: str, build: Callable[[list[Parameter], Hyper], Step], formula: str | None = "LAMB", **facts: Any
    ) -> Contestant:
        return Contestant(name, formula, build, **{"form": "other", "states": 2, **facts})

    return [
        *(torch_adamw(form) for form in ("loop", "foreach", "fused") if form != "fused" or base == "fused"),
        Contestant(
            "torchlars.optim.AdamW",
            "AdamW",
            lambda params, hyper: torchlars_adamw(params, hyper).step,
            form="base",
            accesses=7,
            is_core=True,
            states=2,
        ),
        Contestant(
            f"LAMB(AdamW {base})",
            "LAMB",
            lambda params, hyper: LAMB(adamw(params, hyper, base)).step,
            form="wrapper",
            accesses=14,  # copies w, takes AdamW's step, reads both for norms, reads both again and writes w
            cacheable=2,
            states=2,
        ),
        Contestant(
            "LAMB(torchlars.optim.AdamW)",
            "LAMB",
            lambda params, hyper: LAMB(torchlars_adamw(params, hyper)).step,
            form="fused",
            accesses=10,  # reads w, g, m and v and writes m and v; reads w, m and v again and writes w
            cacheable=3,
            is_core=True,
            states=2,
        ),
        Contestant("first pass of LAMB alone", None, lambda params, hyper: one_pass(params, hyper, True), states=2),
        Contestant("second pass of LAMB alone", None, lambda params, hyper: one_pass(params, hyper, False), states=2),
        other("timm Lamb", timm_lamb, is_foreign=True),
        other("pytorch_optimizer Lamb", pytorch_optimizer_lamb, None, is_foreign=True),
        other("bitsandbytes LAMB", bitsandbytes_lamb, None, is_foreign=True, host_syncs=True),
        other(
            f"_foreach_ LAMB + AdamW {base}",
            lambda params, hyper: step_then_scale(foreach_scale_, params, hyper, base),
            states=3,
        ),
        other("_foreach_ LAMB", foreach_lamb),
        other(
            f"torch.compile of LAMB + AdamW {base}",
            lambda params, hyper: compiled_step_then_scale(params, hyper, base),
            is_foreign=True,
            compiles=True,
            states=3,
        ),
        other("torch.compile of a whole LAMB", compiled_lamb, is_foreign=True, compiles=True),
        other("apex FusedLAMB algorithm", apex_lamb),
        other("DeepSpeed FusedLamb algorithm", deepspeed_lamb, "LAMB without bias correction"),
    ]


# torch and torchlars


def adamw(params: list[Parameter], hyper: Hyper, form: str) -> Optimizer:
    """Build torch's AdamW in one of its forms."""
    return torch.optim.AdamW(
        params,
        lr=hyper.lr,
        betas=hyper.betas,
        eps=hyper.adam_eps,
        weight_decay=hyper.weight_decay,
        foreach=form == "foreach",
        fused=form == "fused",
        capturable=params[0].is_cuda,  # by a CUDA graph
    )


def torchlars_adamw(params: list[Parameter], hyper: Hyper) -> Optimizer:
    """Build the AdamW that takes trust ratios into its own update."""
    optim = importlib.import_module("torchlars.optim")
    return optim.AdamW(params, lr=hyper.lr, betas=hyper.betas, eps=hyper.adam_eps, weight_decay=hyper.weight_decay)


def one_pass(params: list[Parameter], hyper: Hyper, is_first: bool) -> Step:
    """Return one of the passes of LAMB(torchlars.optim.AdamW) over all layers, which reads them from memory.

    The first updates moments and measures, the second updates parameters.
    """
    layers = len(params)
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(param) for param in params] for _ in range(2))
    steps = [torch.zeros((), device=param.device) for param in params]
    dtype = ops.compute_dtype(params[0].dtype, params[0].dtype)
    ones = torch.ones(layers, dtype=dtype, device=params[0].device)
    squared_norms = torch.empty(2 * layers, dtype=torch.float64, device=params[0].device)

    def step() -> None:
        ops.adam_(
            params,
            grads_of(params) if is_first else [],
            exp_avgs,
            exp_avg_sqs,
            steps,
            maximize=False,
            weight_decays=[hyper.weight_decay] * layers,
            decoupled_weight_decay=True,
            beta1=hyper.betas[0],
            beta2=hyper.betas[1],
            adam_eps=hyper.adam_eps,
            lrs=[hyper.lr] * layers,
            of_updates=True,
            ratios=None if is_first else ones,
            squared_norms=squared_norms if is_first else None,
        )

    return step


# Peers


def timm_lamb(params: list[Parameter], hyper: Hyper) -> Step:
    """Return the step of timm's Lamb, without its clipping of all gradients."""
    return (
        import_alone("timm.optim.lamb")
        .Lamb(
            params,
            lr=hyper.lr,
            betas=hyper.betas,
            eps=hyper.adam_eps,
            weight_decay=hyper.weight_decay,
            max_grad_norm=None,
        )
        .step
    )


def pytorch_optimizer_lamb(params: list[Parameter], hyper: Hyper) -> Step:
    """Return the step of pytorch_optimizer's Lamb.

    It corrects no bias of the second moments, and the first's in its lr. It decays weights before it takes norms, and
    limits the weights' to 10.
    """
    return (
        importlib.import_module("pytorch_optimizer")
        .Lamb(params, lr=hyper.lr, betas=hyper.betas, eps=hyper.adam_eps, weight_decay=hyper.weight_decay)
        .step
    )


def bitsandbytes_lamb(params: list[Parameter], hyper: Hyper) -> Step:
    """Return the step of bitsandbytes' 32-bit LAMB.

    It clips the norm of Adam's update to that of the weights, and decays weights beside that.
    """
    return (
        importlib.import_module("bitsandbytes")
        .optim.LAMB(params, lr=hyper.lr, betas=hyper.betas, eps=hyper.adam_eps, weight_decay=hyper.weight_decay)
        .step
    )


# By hand


def trust_ratio(param_norm: Tensor, update_norm: Tensor) -> Tensor:
    """Return the trust ratios of one layer or of a vector of layers."""
    return torch.where((param_norm > 0) & (update_norm > 0), param_norm / update_norm, 1.0)


def step_then_scale(
    scale: Callable[[list[Tensor], list[Tensor], Hyper], None], params: list[Parameter], hyper: Hyper, base: str
) -> Step:
    """Return a step that copies the parameters, has the base step, and then scales how far it moved them."""
    optimizer = adamw(params, hyper, base)
    old_params = [torch.empty_like(param) for param in params]

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_(old_params, params)
        optimizer.step()
        scale(params, old_params, hyper)

    return step


def foreach_scale_(params: list[Tensor], old_params: list[Tensor], hyper: Hyper) -> None:
    """Scale by torch's multi-tensor functions."""
    torch._foreach_sub_(params, old_params)
    param_norms = torch.stack(torch._foreach_norm(old_params))
    update_norms = torch.stack(torch._foreach_norm(params)) / hyper.lr
    torch._foreach_mul_(params, trust_ratio(param_norms, update_norms).unbind())
    torch._foreach_add_(params, old_params)


def compiled_step_then_scale(params: list[Parameter], hyper: Hyper, base: str) -> Step:
    """Return a step whose LAMB part is compiled."""

    def scale(params: list[Tensor], old_params: list[Tensor], hyper: Hyper) -> None:
        for param, old_param in zip(params, old_params, strict=True):
            update = param - old_param
            norms = torch.linalg.vector_norm(old_param), torch.linalg.vector_norm(update) / hyper.lr
            param.copy_(old_param + trust_ratio(*norms) * update)

    return step_then_scale(torch.compile(scale, dynamic=False), params, hyper, base)


def foreach_lamb(params: list[Parameter], hyper: Hyper, max_grad_norm: float | None = None) -> Step:
    """Return a step of torch's multi-tensor functions, which may first clip the norm of all gradients together."""
    (beta1, beta2), count = hyper.betas, 0
    first, second = ([torch.zeros_like(param) for param in params] for _ in range(2))

    @torch.no_grad()
    def step() -> None:
        nonlocal count
        count += 1
        grads = grads_of(params)
        if max_grad_norm is not None:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_div_(grads, (norm / max_grad_norm).clamp_(min=1))
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        divisors = torch._foreach_sqrt(second)
        torch._foreach_div_(divisors, math.sqrt(1 - beta2**count))
        torch._foreach_add_(divisors, hyper.adam_eps)
        updates = torch._foreach_div(first, 1 - beta1**count)
        torch._foreach_div_(updates, divisors)
        torch._foreach_add_(updates, params, alpha=hyper.weight_decay)
        ratios = trust_ratio(*(torch.stack(torch._foreach_norm(each)) for each in (params, updates)))
        torch._foreach_mul_(updates, ratios.unbind())
        torch._foreach_add_(params, updates, alpha=-hyper.lr)

    return step


def compiled_lamb(params: list[Parameter], hyper: Hyper) -> Step:
    """Return a step that is compiled as a whole."""
    beta1, beta2 = hyper.betas

    def update(
        params: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor], corrections: Tensor
    ) -> None:
        for param, grad, m, v in zip(params, grads, first, second, strict=True):
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            step = m / corrections[0] / ((v / corrections[1]).sqrt() + hyper.adam_eps) + hyper.weight_decay * param
            ratio = trust_ratio(torch.linalg.vector_norm(param), torch.linalg.vector_norm(step))
            param.sub_(hyper.lr * ratio * step)

    compiled = torch.compile(update, dynamic=False)
    first, second = ([torch.zeros_like(param) for param in params] for _ in range(2))
    betas = torch.tensor(hyper.betas, device=params[0].device)
    powers = torch.ones_like(betas)

    @torch.no_grad()
    def step() -> None:
        powers.mul_(betas)
        compiled(params, grads_of(params), first, second, 1 - powers)

    return step


# Algorithms of other libraries


def apex_lamb(params: list[Parameter], hyper: Hyper) -> Step:
    """Return a step of apex's FusedLAMB, which takes the norm of all gradients even where nothing is clipped."""
    return foreach_lamb(params, hyper, max_grad_norm=math.inf)


def deepspeed_lamb(params: list[Parameter], hyper: Hyper) -> Step:
    """Return a step of DeepSpeed's FusedLamb: layer by layer, with a ratio between 0.01 and 10.

    Its bias correction is a factor of the lr (in 0.19.8), of another size than LAMB's, and is left out.
    """
    beta1, beta2 = hyper.betas
    first, second = ([torch.zeros_like(param) for param in params] for _ in range(2))

    @torch.no_grad()
    def step() -> None:
        for param, m, v in zip(params, first, second, strict=True):
            grad = param.grad
            assert grad is not None
            m.mul_(beta1).add_(grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            update = (m / v.sqrt().add_(hyper.adam_eps)).add_(param, alpha=hyper.weight_decay)
            param_norm, update_norm = torch.linalg.vector_norm(param), torch.linalg.vector_norm(update)
            bounded = (param_norm / update_norm).clamp_(0.01, 10.0)
            ratio = torch.where((param_norm > 0) & (update_norm > 0), bounded, 1.0)
            param.sub_(update.mul_(ratio), alpha=hyper.lr)

    return step
