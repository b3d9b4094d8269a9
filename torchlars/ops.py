"""The door to the arithmetic: each op is called once for all layers of a bucket.

A bucket's tensors share one device and one dtype; gradients and parameters may differ in dtype. Shapes, strides and
numbers of elements are free, empty tensors included; no tensor that is written may be listed twice. No kernel makes the
host wait for its device, none is differentiable, and results are the same bits for any number of threads.

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
    "apply_trust_ratios_to_updates_",
    "compute_dtype",
    "has_memory",
    "inv_scale",
    "is_writable_in_place",
    "lars_sgd_",
    "lr_scale",
    "overlapping",
    "positions_of_non_parameters",
    "positions_of_other_layout",
    "scale_by_trust_ratios_",
    "scale_updates_by_trust_ratios_",
    "sgd_",
    "squared_norms",
    "squared_norms_of_sums",
    "times_lr",
    "trust_ratios",
]

OPS = (
    "squared_norms",
    "squared_norms_of_sums",
    "trust_ratios",
    "apply_trust_ratios_",
    "scale_by_trust_ratios_",
    "apply_trust_ratios_to_updates_",
    "scale_updates_by_trust_ratios_",
    "sgd_",
    "lars_sgd_",
)
DTYPES = reference.DTYPES
compute_dtype = reference.compute_dtype
is_writable_in_place = reference.is_writable_in_place

_backend: Any = reference
if extension is not None:
    _backend = torch.ops.torchlars
    _library = torch.library.Library("torchlars", "IMPL")  # type: ignore[no-untyped-call]
    for _name in OPS:
        _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


class NoPlainLayers:
    """Takes none: every layer gets the closer look."""

    buckets = ()
    shares_memory = False
    same_layout = True
    versions = 0

    def add(self, params: Sequence[Tensor], *args: Any, **kwargs: Any) -> range:
        """Return all positions."""
        return range(len(params))


def plain_layers(kind: str) -> Any:
    """Return what gathers a step's plain layers in C++.

    Its ``add(params, ...)`` takes a group's plain layers and returns the positions of the parameters that need a closer
    look in Python; its ``buckets`` hold what it took. While compiling, all layers take the way that can be traced.
    """
    if torch.compiler.is_compiling() or _backend is reference:
        return NoPlainLayers()
    return getattr(extension, kind)()


def has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor's storage is as large as the tensor; it is not after ``untyped_storage().resize_(0)``."""
    if extension is None or _backend is reference or torch.compiler.is_compiling():
        return reference.has_memory(tensor)
    return extension.has_memory(tensor)  # type: ignore[no-any-return]


def positions_of_other_layout(params: Sequence[Tensor]) -> Sequence[int]:
    """Return the positions of the parameters whose gradient may lie in memory in another order than they do."""
    if torch.compiler.is_compiling() or _backend is reference or extension is None or type(params) is not list:
        return range(len(params))
    return extension.positions_of_other_layout(params)  # type: ignore[no-any-return]


def overlapping(tensors: Sequence[Tensor]) -> list[int]:
    """Return the positions of those tensors whose memory overlaps that of another one.

    The memory of a tensor is that from its first element to its last one, with all gaps.
    """
    if extension is None or _backend is reference:
        return reference.overlapping(tensors)
    return extension.overlapping(tensors)  # type: ignore[no-any-return]


def positions_of_non_parameters(params: Sequence[Tensor]) -> Sequence[int]:
    """Return the positions of all tensors whose type is not exactly :class:`torch.nn.Parameter`."""
    if torch.compiler.is_compiling() or _backend is reference or extension is None or type(params) is not list:
        return [position for position, param in enumerate(params) if type(param) is not torch.nn.Parameter]
    return extension.positions_of_non_parameters(params)  # type: ignore[no-any-return]


def lr_scale(lr: Tensor, device: torch.device) -> Tensor:
    """Return a learning rate as ops take it, which multiplies the ``lrs``. The host does not wait for its value."""
    return lr.detach().to(device, torch.float64, non_blocking=device.type != "cpu")  # to a CPU: it is read at once


def times_lr(ratios: Tensor, lr: float | Tensor) -> Tensor:
    """Return trust ratios times a learning rate, rounded once."""
    factor = lr_scale(lr, ratios.device) if isinstance(lr, Tensor) else lr
    return (ratios.double() * factor).to(ratios.dtype).reshape(ratios.shape)


@torch.no_grad()
def inv_scale(grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device) -> Tensor:
    """Return what a :class:`torch.amp.GradScaler` hands to an optimizer as ops take it: ``inv_scale`` σ.

    σ = 1 / grad_scale, with the bits of ``GradScaler.unscale_``, and 0 where found_inf ≠ 0. The host waits for neither
    value. No finite float32 has the reciprocal 0; an infinite scale has, and skips the step, as all gradients have
    overflown then.

    Args:
        grad_scale: by what the loss was multiplied, one float32; None is 1.
        found_inf: not 0 where a gradient is infinite or NaN, one element; None is 0.
        device: the layers'.

    Returns:
        A float32 tensor without dimensions, on that device.
    """
    scale, found = (
        None if value is None else value.reshape(()).to(device, non_blocking=device.type != "cpu")
        for value in (grad_scale, found_inf)
    )
    inverse = torch.ones((), dtype=torch.float32, device=device) if scale is None else scale.double().reciprocal()
    inverse = inverse.float()
    if found is not None:  # filled, as a product would be NaN for a scale of 0
        inverse.masked_fill_(found != 0, 0.0)
    return inverse


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor], inv_scale: Tensor | None = None) -> Tensor:
    """Measure: the squared L2 norm ‖x‖² = Σ|xᵢ|² of each tensor; ‖σx‖² where an ``inv_scale`` σ is given.

    Args:
        tensors: n tensors, real or complex.
        inv_scale: σ, by which scaled gradients are multiplied before anything else: a float32 tensor of one element on
            the tensors' device, which the host need not know. Where it is 0 all norms are 0, also those of infinities
            and NaN.

    Returns:
        A float64 vector of n squared norms, on the tensors' device. Sums accumulate in float64, whose range the squares
        must not leave: float64 elements below 1e-162 count as 0, above 1e154 as infinite. Only then comes σ². CUDA
        kernels square most elements in float32: a sum's relative error is below 1e-12, of 16-bit elements below 2⁻²³.

    Raises:
        RuntimeError: the list is empty, or devices, dtypes or layouts are mixed or unsupported.
    """
    return _backend.squared_norms(tensors, inv_scale)  # type: ignore[no-any-return]


@torch.no_grad()
def squared_norms_of_sums(
    tensors: Sequence[Tensor], others: Sequence[Tensor], scales: Sequence[float], inv_scale: Tensor | None = None
) -> Tensor:
    """Measure: the squared L2 norm ‖x + sy‖² of each pair of tensors; ‖σx + sy‖² where an ``inv_scale`` σ is given.

    With s = λ that of gradients that decay, with s = −1 that of updates.

    Args:
        tensors: n tensors x.
        others: n tensors y, of their shapes.
        scales: s of each pair. Where it is 0, y is not read and its shape is free.
        inv_scale: σ, as in :func:`squared_norms`: y is not multiplied by it. Where it is 0 all norms are 0.

    Returns:
        A float64 vector of n squared norms. Both the sums x + sy and the sums of their squares are in float64, but CUDA
        kernels take most of them in pairs of float32: the relative error of :func:`squared_norms` then comes beside
        what float64 loses in x + sy. With σ they are σ² times those of x + (s / σ)y.

    Raises:
        RuntimeError: as :func:`squared_norms` does; or lengths or shapes disagree, or a scale is not finite.
    """
    return _backend.squared_norms_of_sums(tensors, others, scales, inv_scale)  # type: ignore[no-any-return]


@torch.no_grad()
def trust_ratios(
    param_squared_norms: Tensor,
    grad_squared_norms: Tensor,
    weight_decays: Sequence[float],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    dtype: torch.dtype,
    lrs: Sequence[float] = (),
    lr_scale: Tensor | None = None,
    clip: bool = False,
    of_updates: bool = False,
) -> Tensor:
    """Decide: the trust ratio r = η‖w‖ / (‖g‖ + λ‖w‖ + ε) of each layer, and 1 where ‖w‖ = 0 or ‖g‖ = 0.

    With ``clip`` it is min(r / γ, 1). With ``of_updates`` the norms are not of gradients but of updates γu: then ‖u‖ is
    in the place of ‖g‖, and ``clip`` makes it min(r, 1). A norm that is NaN makes the ratio NaN.

    Args:
        param_squared_norms: ‖w‖², a float64 vector of n.
        grad_squared_norms: ‖g‖², likewise, of gradients that are unscaled; or ‖g + λw‖², with zeros for
            ``weight_decays``; or ‖γu‖².
        weight_decays: λ ≥ 0 of each layer.
        trust_coefs: η > 0 of each layer.
        eps: ε ≥ 0 of each layer.
        dtype: float64 for float64 layers, float32 for all others. Ratios are computed in float64, and rounded once.
        lrs: γ ≥ 0 of each layer; may be empty where nothing needs them.
        lr_scale: multiplies all lrs if given: a float64 tensor of one element on the layers' device, which the host
            need not know.
        clip: whether no layer's step is to be longer than the base's own.
        of_updates: whether ``grad_squared_norms`` are of updates.

    Returns:
        A vector of n ratios.

    Raises:
        RuntimeError: lengths, devices or dtypes disagree, or a number is out of its range.
    """
    return _backend.trust_ratios(  # type: ignore[no-any-return]
        param_squared_norms,
        grad_squared_norms,
        weight_decays,
        trust_coefs,
        eps,
        dtype,
        lrs,
        lr_scale,
        clip,
        of_updates,
    )


@torch.no_grad()
def apply_trust_ratios_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    ratios: Tensor,
    weight_decays: Sequence[float],
    maximize: bool,
    lrs: Sequence[float] = (),
    lr_scale: Tensor | None = None,
    inv_scale: Tensor | None = None,
) -> None:
    """Apply: each gradient becomes r · (g + λw), in place; r · (g − λw) with ``maximize``, where the base negates it.

    Where ``lrs`` are given, γr is in the place of r. Where an ``inv_scale`` σ is given, σg is in the place of g; and if
    it is 0, the step is skipped: nothing is written. Computed in float32 (float64 for float64 layers), and rounded to
    the gradient's own dtype once, when it is written.

    Args:
        grads: n gradients, written in place.
        params: n parameters, of the gradients' shapes. Where λ is 0 a parameter is not read and its shape is free.
        ratios: the vector of :func:`trust_ratios`, float64 if gradients or parameters are, float32 otherwise.
        weight_decays: λ ≥ 0 of each layer.
        maximize: whether the base optimizer maximizes.
        lrs: γ ≥ 0 of each layer, where lr is to be in the momentum; else empty.
        lr_scale: multiplies all lrs if given.
        inv_scale: σ, as in :func:`squared_norms`.

    Raises:
        RuntimeError: lengths, shapes, devices or dtypes disagree, a number is out of its range, or elements of a
            gradient share memory. Nothing was written then.
    """
    _backend.apply_trust_ratios_(grads, params, ratios, weight_decays, maximize, lrs, lr_scale, inv_scale)


@torch.no_grad()
def scale_by_trust_ratios_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    weight_decays: Sequence[float],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    maximize: bool,
    lrs: Sequence[float] = (),
    lr_scale: Tensor | None = None,
    decayed_norm: bool = False,
    clip: bool = False,
    lr_in_momentum: bool = False,
    inv_scale: Tensor | None = None,
) -> Tensor:
    """Measure, decide and apply at once, with the bits of the three ops, but reading from cache what was just measured.

    Args:
        grads: n gradients, written in place.
        params: n parameters, of the gradients' shapes.
        weight_decays: λ ≥ 0 of each layer.
        trust_coefs: η > 0 of each layer.
        eps: ε ≥ 0 of each layer.
        maximize: whether the base optimizer maximizes.
        lrs: γ ≥ 0 of each layer, which ``clip`` and ``lr_in_momentum`` need; else they may be empty.
        lr_scale: multiplies all lrs if given.
        decayed_norm: whether ‖g + λw‖ is in the place of ‖g‖ + λ‖w‖.
        clip: whether the ratio is min(r / γ, 1).
        lr_in_momentum: whether γr is applied in the place of r.
        inv_scale: σ, as in :func:`squared_norms` and :func:`apply_trust_ratios_`.

    Returns:
        The vector of n trust ratios that were applied, float64 for float64 layers, float32 for all others. Of a step
        that is skipped, those of gradients without a length: 1, and with ``clip`` min(1 / γ, 1).

    Raises:
        RuntimeError: as :func:`apply_trust_ratios_` and :func:`trust_ratios` do. Nothing was written then.
    """
    return _backend.scale_by_trust_ratios_(  # type: ignore[no-any-return]
        grads,
        params,
        weight_decays,
        trust_coefs,
        eps,
        maximize,
        lrs,
        lr_scale,
        decayed_norm,
        clip,
        lr_in_momentum,
        inv_scale,
    )


@torch.no_grad()
def apply_trust_ratios_to_updates_(params: Sequence[Tensor], old_params: Sequence[Tensor], ratios: Tensor) -> None:
    """Apply: each parameter w becomes w_old + r · (w − w_old), in place. Where r is 1 it stays as it is, to the bit.

    Args:
        params: n parameters after a step, written in place.
        old_params: the same before the step, of their shapes and dtype.
        ratios: the vector of :func:`trust_ratios`.

    Raises:
        RuntimeError: lengths, shapes, devices or dtypes disagree, or elements of a parameter share memory. Nothing was
            written then.
    """
    _backend.apply_trust_ratios_to_updates_(params, old_params, ratios)


@torch.no_grad()
def scale_updates_by_trust_ratios_(
    params: Sequence[Tensor],
    old_params: Sequence[Tensor],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    lrs: Sequence[float],
    clip: bool,
    lr_scale: Tensor | None = None,
) -> Tensor:
    """Measure updates, decide and apply at once, with the bits of the ops apart.

    Args:
        params: n parameters after a step, written in place.
        old_params: the same before the step, of their shapes and dtype.
        trust_coefs: η > 0 of each layer.
        eps: ε ≥ 0 of each layer.
        lrs: γ ≥ 0 of each layer's step.
        clip: whether the ratio is min(r, 1).
        lr_scale: multiplies all lrs if given.

    Returns:
        The vector of n trust ratios that were applied, float64 for float64 layers, float32 for all others.

    Raises:
        RuntimeError: as :func:`apply_trust_ratios_to_updates_` and :func:`trust_ratios` do. Nothing was written then.
    """
    return _backend.scale_updates_by_trust_ratios_(  # type: ignore[no-any-return]
        params, old_params, trust_coefs, eps, lrs, clip, lr_scale
    )


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ratios: Tensor | None,
    weight_decays: Sequence[float],
    lrs: Sequence[float],
    momentums: Sequence[float],
    dampenings: Sequence[float],
    nesterov: bool,
    maximize: bool,
    lr_scale: Tensor | None = None,
    inv_scale: Tensor | None = None,
) -> None:
    """Update: SGD's own step in place, along d = r · (g + λw) instead of g + λw.

    m ← μm + (1 − τ)d, then w ← w − γm, or w ← w − γ(d + μm) with ``nesterov``, or w ← w − γd without momentum.
    With ``maximize``, g is negated first. Gradients are only read. Where an ``inv_scale`` σ is given, σg is in the
    place of g; and if it is 0, the step is skipped: neither parameters nor momentum are written. Computed in float32
    (float64 for float64 layers); a parameter and a momentum are each rounded once, when they are written.

    Args:
        params: n parameters, written in place.
        grads: n gradients, of the parameters' shapes.
        momentum_buffers: n buffers m, of the parameters' shapes, written in place; or none at all, for no momentum. Of
            the parameters' dtype, or of float32 for bfloat16 and float16 ones. A first step starts from zeros and with
            τ = 0.
        ratios: the vector of :func:`trust_ratios`; None is plain SGD.
        weight_decays: λ ≥ 0 of each layer.
        lrs: γ ≥ 0 of each layer.
        momentums: μ ≥ 0 of each layer, 0 where there are no buffers.
        dampenings: τ of each layer.
        nesterov: whether to look ahead.
        maximize: whether to ascend.
        lr_scale: multiplies all lrs if given: a float64 tensor of one element on the layers' device, which the host
            need not know.
        inv_scale: σ, as in :func:`squared_norms`.

    Raises:
        RuntimeError: lengths, shapes, devices or dtypes disagree, a number is out of its range, or elements of a
            tensor to write share memory. Nothing was written then.
    """
    _backend.sgd_(
        params,
        grads,
        momentum_buffers,
        ratios,
        weight_decays,
        lrs,
        momentums,
        dampenings,
        nesterov,
        maximize,
        lr_scale,
        inv_scale,
    )


@torch.no_grad()
def lars_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weight_decays: Sequence[float],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    lrs: Sequence[float],
    momentums: Sequence[float],
    dampenings: Sequence[float],
    nesterov: bool,
    maximize: bool,
    lr_scale: Tensor | None = None,
    decayed_norm: bool = False,
    clip: bool = False,
    lr_in_momentum: bool = False,
    inv_scale: Tensor | None = None,
) -> Tensor:
    """Measure, decide and update at once, with the bits of the three ops, reading from cache what was just measured.

    Args:
        params: as in :func:`sgd_`, like all arguments that are not listed here.
        grads: only read.
        momentum_buffers: written in place.
        weight_decays: λ ≥ 0 of each layer.
        trust_coefs: η > 0 of each layer.
        eps: ε ≥ 0 of each layer.
        lrs: γ ≥ 0 of each layer.
        momentums: μ ≥ 0 of each layer.
        dampenings: τ of each layer.
        nesterov: whether to look ahead.
        maximize: whether to ascend.
        lr_scale: multiplies all lrs if given.
        decayed_norm: as in :func:`scale_by_trust_ratios_`.
        clip: likewise.
        lr_in_momentum: whether γ multiplies d, and so enters the momentum, instead of the step.
        inv_scale: σ, as in :func:`squared_norms` and :func:`sgd_`.

    Returns:
        The vector of n trust ratios that were applied, float64 for float64 layers, float32 for all others. Of a step
        that is skipped, as in :func:`scale_by_trust_ratios_`.

    Raises:
        RuntimeError: as :func:`sgd_` and :func:`trust_ratios` do. Nothing was written then.
    """
    return _backend.lars_sgd_(  # type: ignore[no-any-return]
        params,
        grads,
        momentum_buffers,
        weight_decays,
        trust_coefs,
        eps,
        lrs,
        momentums,
        dampenings,
        nesterov,
        maximize,
        lr_scale,
        decayed_norm,
        clip,
        lr_in_momentum,
        inv_scale,
    )
