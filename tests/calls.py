"""Ops that measure trust ratios, called so that they return them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchlars import ops


def scale_gradients(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    weight_decays: Sequence[float],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    maximize: bool,
    *,
    module: Any = ops,
    **more: Any,
) -> Tensor:
    """Call ``scale_gradients_`` with what ``cases.Case.make`` returns."""
    ratios, hyper = ops.empty_ratios(grads, params), {"trust_coefs": trust_coefs, "eps": eps}
    module.scale_gradients_(
        grads, params, maximize=maximize, weight_decays=weight_decays, ratios=ratios, **hyper, **more
    )
    return ratios


def scale_updates(
    params: Sequence[Tensor],
    old_params: Sequence[Tensor],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    lrs: Sequence[float],
    *,
    module: Any = ops,
    **more: Any,
) -> Tensor:
    """Call ``scale_updates_``."""
    ratios = ops.empty_ratios(params, old_params)
    module.scale_updates_(params, old_params, ratios=ratios, trust_coefs=trust_coefs, eps=eps, lrs=lrs, **more)
    return ratios


def sgd(*, module: Any = ops, **arguments: Any) -> Tensor:
    """Call ``sgd_``, with ``trust_coefs`` and ``eps``."""
    layers = arguments["grads"], arguments["params"]
    ratios = ops.empty_ratios(*layers) if all(layers) else torch.empty(0)
    module.sgd_(**arguments, ratios=ratios)
    return ratios


def adam(*, module: Any = ops, **arguments: Any) -> Tensor:
    """Call ``adam_``, with ``trust_coefs`` and ``eps``."""
    ratios = ops.empty_ratios(arguments["grads"], arguments["params"])
    module.adam_(**arguments, ratios=ratios)
    return ratios
