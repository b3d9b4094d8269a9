"""Unscaling and overflow skipping inside ``step()``, for bases that support it.

For such a base a :class:`torch.amp.GradScaler` sets two tensors as attributes of the optimizer for the duration of a
step, ``grad_scale`` and ``found_inf``, and the host reads neither. For all others the scaler unscales the gradients
itself, reads ``found_inf``, and calls ``step`` or does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import ops

__all__: list[str] = []


def step_supports_scaling(base: Optimizer) -> bool:
    """Tell whether a base can unscale and skip by itself at its next step, and leaves a clean state if it skips.

    If the first step of torch's fused SGD is skipped, it leaves a momentum that was never written (2.13, 2.14): the
    scaler waits for the device until one has begun.
    """
    if not getattr(base, "_step_supports_amp_scaling", False) or "grad_scaler" in signature(base.step).parameters:
        return False
    return not begins_momentum(base, [group for group in base.param_groups if group.get("fused", False)])


def begins_momentum(base: Optimizer, groups: Sequence[dict[str, Any]]) -> bool:
    """Tell whether the next step begins the momentum of any layer of some groups."""
    names = ("momentum_buffer", "momentum_codes")
    return any(
        param.grad is not None and all(base.state.get(param, {}).get(name) is None for name in names)
        for group in groups
        if group.get("momentum", 0) != 0
        for param in group["params"]
    )


class GradScale:
    """The scale of an optimizer's gradients at this step, and whether they overflowed; or neither.

    Args:
        grad_scale: what the loss was multiplied by; None if gradients are unscaled already.
        found_inf: not 0 where the step is to be skipped.
    """

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._grad_scale = grad_scale
        self._found_inf = found_inf
        #: Whether ``grad_scale`` or ``found_inf`` is set.
        self.is_given = grad_scale is not None or found_inf is not None
        self._inv_scales: dict[torch.device, Tensor] = {}

    @classmethod
    def of(cls, optimizer: Optimizer) -> GradScale:
        """Return what the scaler has handed to an optimizer."""
        return cls(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    def once_unscaled(self) -> GradScale:
        """Return what is left to do once gradients are unscaled."""
        return GradScale(None, self._found_inf)

    def inv_scale(self, device: torch.device) -> Tensor | None:
        """Return what ops multiply gradients by, 0 to skip the step; None if there is nothing to do."""
        if not self.is_given:
            return None
        if device not in self._inv_scales:
            self._inv_scales[device] = ops.inv_scale(self._grad_scale, self._found_inf, device)
        return self._inv_scales[device]

    def attributes(self) -> dict[str, Tensor | None]:
        """Return the attributes by which a base is told."""
        return {"grad_scale": self._grad_scale, "found_inf": self._found_inf}


def drop_scale(optimizer: Optimizer) -> None:
    """Delete ``grad_scale`` and ``found_inf``, which a scaler itself deletes only after a step that returns."""
    vars(optimizer).pop("grad_scale", None)
    vars(optimizer).pop("found_inf", None)
