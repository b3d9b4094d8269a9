"""The door to the arithmetic: the four ops of LARS, each called once for all layers of a bucket.

A bucket's tensors share one device and one dtype; gradients and parameters may differ in dtype. Shapes, strides and
numbers of elements are free, empty tensors included. No kernel makes the host wait for its device, none is
differentiable, and results are the same bits for any number of threads.

Behind the door stands the extension (CPU and CUDA kernels, registered as ``torch.ops.torchlars.*``), and for every
other device, or where there is no extension, :mod:`torchlars.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchlars import reference
from torchlars._extension import extension

__all__ = [
    "DTYPES",
    "apply_trust_ratios_",
    "compute_dtype",
    "is_writable_in_place",
    "scale_by_trust_ratios_",
    "squared_norms",
    "trust_ratios",
]

OPS = ("squared_norms", "trust_ratios", "apply_trust_ratios_", "scale_by_trust_ratios_")
DTYPES = reference.DTYPES
compute_dtype = reference.compute_dtype
is_writable_in_place = reference.is_writable_in_place

_backend: Any = reference
if extension is not None:
    _backend = torch.ops.torchlars
    _library = torch.library.Library("torchlars", "IMPL")  # type: ignore[no-untyped-call]
    for _name in OPS:
        _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Measure: the squared L2 norm ‖x‖² = Σ|xᵢ|² of each tensor.

    Args:
        tensors: n tensors, real or complex.

    Returns:
        A float64 vector of n squared norms, on the tensors' device. Sums accumulate in float64, whose range the squares
        must not leave: float64 elements below 1e-162 count as 0, above 1e154 as infinite.

    Raises:
        RuntimeError: the list is empty, or devices, dtypes or layouts are mixed or unsupported.
    """
    return _backend.squared_norms(tensors)  # type: ignore[no-any-return]


@torch.no_grad()
def trust_ratios(
    param_squared_norms: Tensor,
    grad_squared_norms: Tensor,
    weight_decays: Sequence[float],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Decide: the trust ratio r = η‖w‖ / (‖g‖ + λ‖w‖ + ε) of each layer, and 1 where ‖w‖ = 0 or ‖g‖ = 0.

    A norm that is NaN makes the ratio NaN.

    Args:
        param_squared_norms: ‖w‖², a float64 vector of n.
        grad_squared_norms: ‖g‖², likewise.
        weight_decays: λ ≥ 0 of each layer.
        trust_coefs: η > 0 of each layer.
        eps: ε ≥ 0 of each layer.
        dtype: float64 for float64 layers, float32 for all others. Ratios are computed in float64, and rounded once.

    Returns:
        A vector of n ratios.

    Raises:
        RuntimeError: lengths, devices or dtypes disagree, or a number is out of its range.
    """
    return _backend.trust_ratios(  # type: ignore[no-any-return]
        param_squared_norms, grad_squared_norms, weight_decays, trust_coefs, eps, dtype
    )


@torch.no_grad()
def apply_trust_ratios_(
    grads: Sequence[Tensor], params: Sequence[Tensor], ratios: Tensor, weight_decays: Sequence[float], maximize: bool
) -> None:
    """Apply: each gradient becomes r · (g + λw), in place; r · (g − λw) with ``maximize``, where the base negates it.

    Computed in float32 (float64 for float64 layers), and rounded to the gradient's own dtype once, when it is written.

    Args:
        grads: n gradients, written in place.
        params: n parameters, of the gradients' shapes. Where λ is 0 a parameter is not read and its shape is free.
        ratios: the vector of :func:`trust_ratios`, float64 if gradients or parameters are, float32 otherwise.
        weight_decays: λ ≥ 0 of each layer.
        maximize: whether the base optimizer maximizes.

    Raises:
        RuntimeError: lengths, shapes, devices or dtypes disagree, a number is out of its range, or elements of a
            gradient share memory. Nothing was written then.
    """
    _backend.apply_trust_ratios_(grads, params, ratios, weight_decays, maximize)


@torch.no_grad()
def scale_by_trust_ratios_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    weight_decays: Sequence[float],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    maximize: bool,
) -> Tensor:
    """Measure, decide and apply at once, with the bits of the three ops, but reading from cache what was just measured.

    Args:
        grads: n gradients, written in place.
        params: n parameters, of the gradients' shapes.
        weight_decays: λ ≥ 0 of each layer.
        trust_coefs: η > 0 of each layer.
        eps: ε ≥ 0 of each layer.
        maximize: whether the base optimizer maximizes.

    Returns:
        The vector of n trust ratios that were applied, float64 for float64 layers, float32 for all others.

    Raises:
        RuntimeError: as :func:`apply_trust_ratios_` and :func:`trust_ratios` do. Nothing was written then.
    """
    return _backend.scale_by_trust_ratios_(  # type: ignore[no-any-return]
        grads, params, weight_decays, trust_coefs, eps, maximize
    )
