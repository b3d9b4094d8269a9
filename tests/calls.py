"""Ops that measure trust ratios, called so that they return them, and bad calls of ops that take a step."""

from __future__ import annotations

import math
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


_x, _y = torch.ones(3), torch.ones(4)
_lr_tensor = r"lr_tensor to be one float64 on cpu \(got: shape "
_inv_scale = r"inv_scale to be one float32 on cpu \(got: shape "
#: Of two layers of shapes (3,) and (4,): what is different, and the error that names it.
BAD_LAYERS = {
    "more params": ({"params": [_x, _x, _x]}, r"one length \(grads: 2, params: 3\)"),
    "integers": ({"params": [_x.long(), _y.long()]}, r"expected float64, float32, .* \(params\[0\]: "),
    "a sparse gradient": ({"grads": [_x.to_sparse(), _y]}, r"strided tensors \(grads\[0\]: .*[Ss]parse"),
    "mixed dtypes": ({"params": [_x, _y.double()]}, r"one dtype \(params\[0\]: .*, params\[1\]: "),
    "mixed devices": ({"grads": [_x, _y.to("meta")]}, r"one device \(grads\[0\]: cpu, grads\[1\]: meta\)"),
    "kinds": ({"grads": [_x * 1j, _y * 1j]}, r"both real or both complex \(grads\[0\]: "),
    "shapes": ({"grads": [_y, _x]}, r"one shape \(grads\[0\]: \[4\], params\[0\]: \[3\]\)"),
    "shapes without decay": (
        {"grads": [_x, _x], "weight_decays": [0.0, 0.0]},
        r"one shape \(grads\[1\]: \[3\], params\[1\]: \[4\]\)",
    ),
    "more decays": ({"weight_decays": [0.1] * 3}, r"one length \(grads: 2, weight_decays: 3\)"),
    "decay < 0": ({"weight_decays": [0.1, -0.1]}, r"non-negative numbers \(weight_decays\[1\]: -0.1\)"),
    "fewer lrs": ({"lrs": [0.1]}, r"one length \(grads: 2, lrs: 1\)"),
    "lr < 0": ({"lrs": [0.1, -2.0]}, r"non-negative numbers \(lrs\[1\]: -2"),
    "lr NaN": ({"lrs": [math.nan, 0.1]}, r"non-negative numbers \(lrs\[0\]: nan\)"),
    "lr_tensor in float32": ({"lr_tensor": torch.tensor(0.5)}, _lr_tensor + r"\[\], .*[Ff]loat"),
    "lr_tensor of two": ({"lr_tensor": torch.ones(2, dtype=torch.float64)}, _lr_tensor + r"\[2\]"),
    "lr_tensor elsewhere": (
        {"lr_tensor": torch.ones((), dtype=torch.float64, device="meta")},
        _lr_tensor + r"\[\], .*meta",
    ),
    "inv_scale in float64": (
        {"inv_scale": torch.tensor(0.5, dtype=torch.float64)},
        _inv_scale + r"\[\], .*([Dd]ouble|float64)",
    ),
    "inv_scale of two": ({"inv_scale": torch.ones(2)}, _inv_scale + r"\[2\]"),
    "inv_scale elsewhere": ({"inv_scale": torch.ones(1, device="meta")}, _inv_scale + r"\[1\], .*meta"),
}
