"""The ops in plain torch, on any device: slow, obvious, and the truth that every backend is held to.

What each op takes and means is documented in :mod:`torchlars.ops`. Sums, norms and ratios are computed in float64, and
everything is rounded once, when it is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []

#: The dtypes that layers may have.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64)


def squared_norms(tensors: Sequence[Tensor], inv_scale: Tensor | None = None) -> Tensor:
    """Sum |x|² over each tensor, times inv_scale²."""
    op = "squared_norms"
    _check_tensors(op, "tensors", tensors)
    _check_inv_scale(op, inv_scale, tensors[0].device)
    return _unscaled(torch.stack([_wide(tensor).abs().square().sum() for tensor in tensors]), inv_scale)


def squared_norms_of_sums(
    tensors: Sequence[Tensor], others: Sequence[Tensor], scales: Sequence[float], inv_scale: Tensor | None = None
) -> Tensor:
    """Sum |x + sy|² over each pair; |x + (s / inv_scale)y|², times inv_scale²."""
    op = "squared_norms_of_sums"
    _check_pairs(op, "tensors", tensors, "others", others)
    _check_length(op, "scales", scales, "tensors", len(tensors))
    _check_shapes(op, "tensors", tensors, "others", others, scales)
    for i, scale in enumerate(scales):
        _check(math.isfinite(scale), f"{op}: expected finite numbers (scales[{i}]: {scale})")
    _check_inv_scale(op, inv_scale, tensors[0].device)
    sums = []
    for x, y, scale in zip(tensors, others, scales, strict=True):
        s = scale if inv_scale is None else scale / inv_scale.double().reshape(())
        sums.append(_wide(_real(x)) + s * _wide(_real(y)) if scale != 0 else _wide(_real(x)))
    return _unscaled(torch.stack([total.square().sum() for total in sums]), inv_scale)


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
    """η‖w‖ / (‖g‖ + λ‖w‖ + ε), and 1 where either norm is zero and none is NaN; with ``clip`` min(that / γ, 1)."""
    op, layers = "trust_ratios", param_squared_norms.numel()
    for name, vector in (("param_squared_norms", param_squared_norms), ("grad_squared_norms", grad_squared_norms)):
        _check(
            vector.dim() == 1 and vector.dtype == torch.float64 and vector.is_contiguous(),
            f"{op}: expected a contiguous vector of float64 ({name}: shape {list(vector.shape)}, {vector.dtype})",
        )
    _check_length(op, "grad_squared_norms", grad_squared_norms, "param_squared_norms", layers)
    _check_hyper_parameters(op, layers, "param_squared_norms", weight_decays, trust_coefs, eps)
    _check(
        param_squared_norms.device == grad_squared_norms.device,
        f"{op}: expected tensors on one device (param_squared_norms: {param_squared_norms.device}, "
        f"grad_squared_norms: {grad_squared_norms.device})",
    )
    _check(dtype in (torch.float64, torch.float32), f"{op}: expected float64 or float32 (dtype: {dtype})")
    _check_lrs(op, layers, "param_squared_norms", lrs, lr_scale, param_squared_norms.device, clip or of_updates)

    param_norms, grad_norms = param_squared_norms.sqrt(), grad_squared_norms.sqrt()
    decay, coef, small = (param_norms.new_tensor(values) for values in (weight_decays, trust_coefs, eps))
    if of_updates:  # which have the length lr · ‖u‖
        grad_norms = torch.where(grad_norms == 0, 0.0, grad_norms / _scaled(lrs, lr_scale, grad_norms))
    ratios = coef * param_norms / (grad_norms + decay * param_norms + small)
    is_nan = (param_norms + grad_norms).isnan()
    is_one = ((param_norms == 0) | (grad_norms == 0)) & ~is_nan
    ratios = torch.where(is_one, 1.0, ratios)
    if clip:
        ratios = (ratios if of_updates else ratios / _scaled(lrs, lr_scale, ratios)).clamp(max=1.0)
    return ratios.to(dtype)


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
    """G ← r · (inv_scale · g + λw), with −λ where the group maximizes; with γr instead of r where lrs are given."""
    op = "apply_trust_ratios_"
    _check_layers(op, grads, params, weight_decays, equal_shapes=False)
    _check_writable(op, "grads", grads)
    _check_ratios(op, ratios, grads, params)
    _check_lrs(op, len(grads), "grads", lrs, lr_scale, grads[0].device, False)
    _check_inv_scale(op, inv_scale, grads[0].device)
    dtype = compute_dtype(grads[0].dtype, params[0].dtype)

    factors = _times_lrs(ratios, lrs, lr_scale) if lrs else ratios
    for grad, param, ratio, weight_decay in zip(grads, params, factors, weight_decays, strict=True):
        adapted = _times(_real(grad.to(torch.promote_types(grad.dtype, dtype))), inv_scale)
        if weight_decay != 0:
            decay = -weight_decay if maximize else weight_decay
            adapted = adapted + decay * _real(param).to(adapted.dtype)
        adapted = ratio * adapted
        _write(grad, adapted, inv_scale)


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
    """Do all of the above: measure, decide, apply."""
    op = "scale_by_trust_ratios_"
    _check_layers(op, grads, params, weight_decays, equal_shapes=True)
    _check_writable(op, "grads", grads)
    _check_hyper_parameters(op, len(grads), "grads", weight_decays, trust_coefs, eps)
    _check_lrs(op, len(grads), "grads", lrs, lr_scale, grads[0].device, clip or lr_in_momentum)
    _check_inv_scale(op, inv_scale, grads[0].device)
    numbers = weight_decays, trust_coefs, eps
    ratios = _decide(
        grads, params, *numbers, maximize, lrs, lr_scale, decayed_norm=decayed_norm, clip=clip, inv_scale=inv_scale
    )
    lrs = lrs if lr_in_momentum else ()
    apply_trust_ratios_(grads, params, ratios, weight_decays, maximize, lrs, lr_scale, inv_scale)
    return ratios


def apply_trust_ratios_to_updates_(params: Sequence[Tensor], old_params: Sequence[Tensor], ratios: Tensor) -> None:
    """W ← w_old + r · (w − w_old), and w itself where r = 1."""
    op = "apply_trust_ratios_to_updates_"
    _check_updates(op, params, old_params)
    _check_ratios(op, ratios, params, old_params, "params")
    for param, old_param, ratio in zip(params, old_params, ratios, strict=True):
        new, old = (_real(tensor).to(ratios.dtype) for tensor in (param, old_param))
        _write(param, torch.where(ratio == 1, new, old + ratio * (new - old)))


def scale_updates_by_trust_ratios_(
    params: Sequence[Tensor],
    old_params: Sequence[Tensor],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    lrs: Sequence[float],
    clip: bool,
    lr_scale: Tensor | None = None,
) -> Tensor:
    """Measure and decide, and let ``apply_trust_ratios_to_updates_`` apply the ratios."""
    op, layers = "scale_updates_by_trust_ratios_", len(params)
    _check_updates(op, params, old_params)
    _check_hyper_parameters(op, layers, "params", [0.0] * layers, trust_coefs, eps)
    _check_lrs(op, layers, "params", lrs, lr_scale, params[0].device, True)
    norms = squared_norms(old_params), squared_norms_of_sums(params, old_params, [-1.0] * layers)
    dtype = compute_dtype(params[0].dtype, params[0].dtype)
    ratios = trust_ratios(*norms, [0.0] * layers, trust_coefs, eps, dtype, lrs, lr_scale, clip, of_updates=True)
    apply_trust_ratios_to_updates_(params, old_params, ratios)
    return ratios


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
    """D = r · (±inv_scale · g + λw), m ← μm + (1 − τ)d, d ← d + μm or m, w ← w − γd."""
    op = "sgd_"
    numbers = weight_decays, lrs, momentums, dampenings
    _check_sgd(op, params, grads, momentum_buffers, *numbers, nesterov, lr_scale, inv_scale)
    dtype = compute_dtype(grads[0].dtype, params[0].dtype)
    if ratios is not None:
        _check_ratios(op, ratios, grads, params)

    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        w = _real(param).to(dtype)
        direction = _times(_real(grad).to(dtype), inv_scale)
        if maximize:
            direction = -direction
        if weight_decays[i] != 0:
            direction = direction + weight_decays[i] * w
        if ratios is not None:
            direction = ratios[i] * direction
        if momentum_buffers:
            buffer = momentums[i] * _real(momentum_buffers[i]).to(dtype) + (1 - dampenings[i]) * direction
            _write(momentum_buffers[i], buffer, inv_scale)
            direction = direction + momentums[i] * buffer if nesterov else buffer
        lr = lrs[i] if lr_scale is None else (lrs[i] * lr_scale.reshape(())).to(dtype)
        _write(param, w - lr * direction, inv_scale)


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
    """Measure and decide, and let ``sgd_`` apply the ratios; times lr where that is in the momentum."""
    op, layers = "lars_sgd_", len(grads)
    numbers = weight_decays, lrs, momentums, dampenings
    _check_sgd(op, params, grads, momentum_buffers, *numbers, nesterov, lr_scale, inv_scale)
    hyper = weight_decays, trust_coefs, eps
    _check_hyper_parameters(op, layers, "grads", *hyper)
    ratios = _decide(
        grads, params, *hyper, maximize, lrs, lr_scale, decayed_norm=decayed_norm, clip=clip, inv_scale=inv_scale
    )
    factors = ratios
    if lr_in_momentum:
        factors, lrs, lr_scale = _times_lrs(ratios, lrs, lr_scale), [1.0] * layers, None
    numbers = weight_decays, lrs, momentums, dampenings
    sgd_(params, grads, momentum_buffers, factors, *numbers, nesterov, maximize, lr_scale, inv_scale)
    return ratios


def _decide(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    weight_decays: Sequence[float],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    maximize: bool,
    lrs: Sequence[float],
    lr_scale: Tensor | None,
    decayed_norm: bool,
    clip: bool,
    inv_scale: Tensor | None,
) -> Tensor:
    """Measure and decide. With ``decayed_norm`` the decay is in the gradient's norm, not beside it."""
    if decayed_norm:
        scales = [-weight_decay if maximize else weight_decay for weight_decay in weight_decays]
        grad_squared_norms = squared_norms_of_sums(grads, params, scales, inv_scale)
        weight_decays = [0.0] * len(grads)
    else:
        grad_squared_norms = squared_norms(grads, inv_scale)
    dtype = compute_dtype(grads[0].dtype, params[0].dtype)
    norms = squared_norms(params), grad_squared_norms
    return trust_ratios(*norms, weight_decays, trust_coefs, eps, dtype, lrs, lr_scale, clip)


def _scaled(lrs: Sequence[float], lr_scale: Tensor | None, like: Tensor) -> Tensor:
    """Return all lrs as a float64 vector."""
    vector = torch.tensor(lrs, dtype=torch.float64, device=like.device)
    return vector if lr_scale is None else vector * lr_scale.reshape(())


def _times_lrs(ratios: Tensor, lrs: Sequence[float], lr_scale: Tensor | None) -> Tensor:
    return (ratios.double() * _scaled(lrs, lr_scale, ratios)).to(ratios.dtype)


def _times(grad: Tensor, inv_scale: Tensor | None) -> Tensor:
    return grad if inv_scale is None else inv_scale.reshape(()).to(grad.dtype) * grad


def _unscaled(squared_norms: Tensor, inv_scale: Tensor | None) -> Tensor:
    """Return squared norms times inv_scale²; 0 where that is 0, also for infinities."""
    if inv_scale is None:
        return squared_norms
    factor = inv_scale.double().reshape(()).square()
    return torch.where(factor == 0, 0.0, factor * squared_norms)


def compute_dtype(grad: torch.dtype, param: torch.dtype) -> torch.dtype:
    """Return the type of a layer's trust ratio and arithmetic: float64 for float64 layers, float32 for all others."""
    wide = {torch.float64, torch.complex128}
    return torch.float64 if {grad, param} & wide else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def _real(tensor: Tensor) -> Tensor:
    """Return complex numbers as two real ones each: torch makes a real factor complex, and 0 · ∞ is NaN then."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _write(tensor: Tensor, real: Tensor, inv_scale: Tensor | None = None) -> None:
    """Write what was computed; what is there already where inv_scale is 0, as the host need not know that."""
    if inv_scale is not None:
        before = _real(tensor)
        real = torch.where(inv_scale.reshape(()) == 0, before, real.to(before.dtype))
    tensor.copy_(torch.view_as_complex(real) if tensor.is_complex() else real)


# What csrc/checks.h asks, in the same words.


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _check_length(
    op: str, name: str, values: Sequence[float] | Sequence[Tensor] | Tensor, than: str, length: int
) -> None:
    _check(len(values) == length, f"{op}: expected lists of one length ({than}: {length}, {name}: {len(values)})")


def _check_numbers(op: str, name: str, numbers: Sequence[float], may_be_zero: bool) -> None:
    kind = "non-negative" if may_be_zero else "positive"
    for i, number in enumerate(numbers):
        in_range = math.isfinite(number) and (number >= 0 if may_be_zero else number > 0)
        _check(in_range, f"{op}: expected {kind} numbers ({name}[{i}]: {number})")


def _check_hyper_parameters(
    op: str, layers: int, than: str, weight_decays: Sequence[float], trust_coefs: Sequence[float], eps: Sequence[float]
) -> None:
    named = (("weight_decays", weight_decays), ("trust_coefs", trust_coefs), ("eps", eps))
    for name, values in named:
        _check_length(op, name, values, than, layers)
    for name, values in named:
        _check_numbers(op, name, values, may_be_zero=name != "trust_coefs")


def _check_tensors(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    _check(len(tensors) > 0, f"{op}: expected at least one tensor (got: {name} is empty)")
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        _check(tensor.layout == torch.strided, f"{op}: expected strided tensors ({name}[{i}]: {tensor.layout})")
        _check(
            tensor.dtype in DTYPES,
            f"{op}: expected float64, float32, bfloat16, float16, complex128 or complex64 "
            f"({name}[{i}]: {tensor.dtype})",
        )
        _check(
            tensor.device == first.device,
            f"{op}: expected tensors on one device ({name}[0]: {first.device}, {name}[{i}]: {tensor.device})",
        )
        _check(
            tensor.dtype == first.dtype,
            f"{op}: expected tensors of one dtype ({name}[0]: {first.dtype}, {name}[{i}]: {tensor.dtype})",
        )


def _check_pairs(op: str, name: str, tensors: Sequence[Tensor], other_name: str, others: Sequence[Tensor]) -> None:
    _check_tensors(op, name, tensors)
    _check_tensors(op, other_name, others)
    _check_length(op, other_name, others, name, len(tensors))
    tensor, other = tensors[0], others[0]
    _check(
        tensor.device == other.device,
        f"{op}: expected tensors on one device ({name}[0]: {tensor.device}, {other_name}[0]: {other.device})",
    )
    _check(
        tensor.is_complex() == other.is_complex(),
        f"{op}: expected {name} and {other_name} to be both real or both complex "
        f"({name}[0]: {tensor.dtype}, {other_name}[0]: {other.dtype})",
    )


def _check_shapes(
    op: str,
    name: str,
    tensors: Sequence[Tensor],
    other_name: str,
    others: Sequence[Tensor],
    free_where_zero: Sequence[float] | None = None,
) -> None:
    for i, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
        _check(
            tensor.shape == other.shape or (free_where_zero is not None and free_where_zero[i] == 0),
            f"{op}: expected {name} and {other_name} of one shape "
            f"({name}[{i}]: {list(tensor.shape)}, {other_name}[{i}]: {list(other.shape)})",
        )


def _check_layers(
    op: str, grads: Sequence[Tensor], params: Sequence[Tensor], weight_decays: Sequence[float], equal_shapes: bool
) -> None:
    _check_pairs(op, "grads", grads, "params", params)
    _check_length(op, "weight_decays", weight_decays, "grads", len(grads))
    _check_numbers(op, "weight_decays", weight_decays, may_be_zero=True)
    _check_shapes(op, "grads", grads, "params", params, None if equal_shapes else weight_decays)


def _check_updates(op: str, params: Sequence[Tensor], old_params: Sequence[Tensor]) -> None:
    _check_pairs(op, "params", params, "old_params", old_params)
    param, old_param = params[0], old_params[0]
    _check(
        param.dtype == old_param.dtype,
        f"{op}: expected params and old_params of one dtype (params[0]: {param.dtype}, "
        f"old_params[0]: {old_param.dtype})",
    )
    _check_shapes(op, "params", params, "old_params", old_params)
    _check_writable(op, "params", params)


def _check_writable(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        _check(
            is_writable_in_place(tensor),
            f"{op}: expected {name} that can be written in place ({name}[{i}]: shape {list(tensor.shape)}, "
            f"strides {list(tensor.stride())} overlap in memory); clone it first",
        )


def _check_ratios(
    op: str, ratios: Tensor, grads: Sequence[Tensor], params: Sequence[Tensor], name: str = "grads"
) -> None:
    dtype = compute_dtype(grads[0].dtype, params[0].dtype)
    _check(
        ratios.dim() == 1 and ratios.dtype == dtype and ratios.is_contiguous(),
        f"{op}: expected ratios to be a contiguous vector of {dtype} (got: shape {list(ratios.shape)}, {ratios.dtype})",
    )
    _check_length(op, "ratios", ratios, name, len(grads))
    _check(
        ratios.device == grads[0].device,
        f"{op}: expected tensors on one device ({name}[0]: {grads[0].device}, ratios: {ratios.device})",
    )


def _check_lrs(
    op: str,
    layers: int,
    than: str,
    lrs: Sequence[float],
    lr_scale: Tensor | None,
    device: torch.device,
    are_needed: bool,
) -> None:
    if are_needed or len(lrs) > 0:
        _check_length(op, "lrs", lrs, than, layers)
    _check_numbers(op, "lrs", lrs, may_be_zero=True)
    _check_lr_scale(op, lr_scale, device)


def _check_lr_scale(op: str, lr_scale: Tensor | None, device: torch.device) -> None:
    if lr_scale is not None:
        _check(
            lr_scale.numel() == 1 and lr_scale.dtype == torch.float64 and lr_scale.device == device,
            f"{op}: expected lr_scale to be one float64 on {device} "
            f"(got: shape {list(lr_scale.shape)}, {lr_scale.dtype}, {lr_scale.device})",
        )


def _check_inv_scale(op: str, inv_scale: Tensor | None, device: torch.device) -> None:
    if inv_scale is not None:
        _check(
            inv_scale.numel() == 1 and inv_scale.dtype == torch.float32 and inv_scale.device == device,
            f"{op}: expected inv_scale to be one float32 on {device} "
            f"(got: shape {list(inv_scale.shape)}, {inv_scale.dtype}, {inv_scale.device})",
        )


def _check_sgd(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weight_decays: Sequence[float],
    lrs: Sequence[float],
    momentums: Sequence[float],
    dampenings: Sequence[float],
    nesterov: bool,
    lr_scale: Tensor | None,
    inv_scale: Tensor | None,
) -> None:
    _check_layers(op, grads, params, weight_decays, equal_shapes=True)
    _check_writable(op, "params", params)
    for name, values in (("lrs", lrs), ("momentums", momentums), ("dampenings", dampenings)):
        _check_length(op, name, values, "grads", len(grads))
    _check_numbers(op, "lrs", lrs, may_be_zero=True)
    _check_numbers(op, "momentums", momentums, may_be_zero=True)
    for i, dampening in enumerate(dampenings):
        _check(math.isfinite(dampening), f"{op}: expected finite numbers (dampenings[{i}]: {dampening})")
    if momentum_buffers:
        _check_tensors(op, "momentum_buffers", momentum_buffers)
        _check_length(op, "momentum_buffers", momentum_buffers, "grads", len(grads))
        _check_writable(op, "momentum_buffers", momentum_buffers)
        buffer, param = momentum_buffers[0], params[0]
        _check(
            buffer.device == param.device,
            f"{op}: expected tensors on one device (params[0]: {param.device}, momentum_buffers[0]: {buffer.device})",
        )
        _check(
            buffer.dtype in (param.dtype, torch.float32) if param.dtype.itemsize == 2 else buffer.dtype == param.dtype,
            f"{op}: expected momentum_buffers of the dtype of params, or of float32 for 16-bit ones "
            f"(params[0]: {param.dtype}, momentum_buffers[0]: {buffer.dtype})",
        )
        for i, (buffer, param) in enumerate(zip(momentum_buffers, params, strict=True)):
            _check(
                buffer.shape == param.shape,
                f"{op}: expected params and momentum_buffers of one shape "
                f"(params[{i}]: {list(param.shape)}, momentum_buffers[{i}]: {list(buffer.shape)})",
            )
    else:
        for i, momentum in enumerate(momentums):
            _check(
                momentum == 0, f"{op}: expected momentum_buffers where there is momentum (momentums[{i}]: {momentum})"
            )
        _check(not nesterov, f"{op}: expected momentum_buffers where nesterov is True")
    _check_lr_scale(op, lr_scale, params[0].device)
    _check_inv_scale(op, inv_scale, params[0].device)


def is_writable_in_place(tensor: Tensor) -> bool:
    """Tell whether no two elements share memory, for every layout that slicing, permuting and expanding produce."""
    if tensor.is_contiguous():  # most are, and to sort sizes that a compiler does not know would break its graph
        return True
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    extent = 0
    for stride, size in dims:
        if stride <= extent:
            return tensor.numel() == 0
        extent += stride * (size - 1)
    return True


def has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor's storage is as large as the tensor; it is not after ``untyped_storage().resize_(0)``.

    Other devices than CPU and CUDA may keep their memory elsewhere.
    """
    is_known = not torch.compiler.is_compiling() and tensor.device.type in ("cpu", "cuda")
    if not is_known or tensor.numel() == 0 or not torch._C._has_storage(tensor):
        return True
    begin = tensor.storage_offset() * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= begin + _extent(tensor)


def overlapping(tensors: Sequence[Tensor]) -> list[int]:
    """Return the positions of those tensors whose memory overlaps that of another one.

    Where a storage's pointer need not be an address, only tensors of one storage can overlap.
    """
    spans = []
    for i, tensor in enumerate(tensors):
        if tensor.layout == torch.strided and tensor.numel() > 0 and torch._C._has_storage(tensor):
            storage = tensor.untyped_storage()
            has_address = tensor.device.type in ("cpu", "cuda") and storage.data_ptr() != 0
            begin = (storage.data_ptr() if has_address else 0) + tensor.storage_offset() * tensor.element_size()
            spans.append((0 if has_address else storage._cdata, begin, begin + _extent(tensor), i))
    found: set[int] = set()
    furthest: tuple[Any, ...] = (0, 0, 0, 0)  # of those before: the one that ends last
    for span in sorted(spans):
        storage_of, begin, end, i = span
        if storage_of == furthest[0] and begin < furthest[2]:
            found |= {furthest[3], i}
        if storage_of != furthest[0] or end > furthest[2]:
            furthest = span
    return sorted(found)


def _extent(tensor: Tensor) -> int:
    """Return how many bytes there are from a tensor's first element to the end of its last one."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in strides)) * tensor.element_size()
