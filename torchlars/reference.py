"""The ops in plain torch, on any device, and their documentation. Every other backend is tested against it.

An op is called once for all layers of a bucket. The tensors of one argument share a device and a dtype; gradients and
parameters may differ in dtype. Shapes and strides are free, and tensors may be empty. A tensor that is written must not
be listed twice. No op makes the host wait for its device, none is differentiable, and results are the same bits for any
number of threads.

Here sums, norms and ratios are computed in float64, and each result is rounded once, when it is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlars import _checks, codes
from torchlars._checks import checked_by, compute_dtype

__all__ = ["adam_", "scale_gradients_", "scale_updates_", "sgd_", "squared_norms", "trust_ratios"]


@checked_by(_checks.squared_norms)
def squared_norms(
    tensors: Sequence[Tensor],
    *,
    others: Sequence[Tensor] | None = None,
    scales: Sequence[float] = (),
    inv_scale: Tensor | None = None,
) -> Tensor:
    """Measure the squared L2 norm ‖σx‖² = σ²Σ|xᵢ|² of each tensor, or ‖σx + sy‖² where ``others`` are given.

    With s = λ it is that of gradients that decay, with s = −1 that of updates.

    Args:
        tensors: n tensors x, real or complex.
        others: n tensors y, of the shapes of ``tensors``; None is ‖σx‖².
        scales: s of each pair; empty without ``others``. Where it is 0, y is not read and its shape is free.
        inv_scale: σ, which unscales gradients: a float32 tensor of one element on the tensors' device, whose value the
            host need not know. None is 1. y is not multiplied by it. Where σ is 0 all norms are 0, even those of
            infinities and NaN.

    Returns:
        A float64 vector of n squared norms, on the tensors' device. Sums x + sy and sums of squares are in float64:
        squares of elements below 1e-162 count as 0, above 1e154 as infinite. σ² multiplies the sum; with ``others`` it
        multiplies that of x + (s / σ)y. CUDA kernels square most elements in float32, and take most sums x + sy in
        pairs of float32: a sum's relative error is below 1e-12, of 16-bit elements below 2⁻²³, besides what float64
        loses in x + sy.

    Raises:
        RuntimeError: a list is empty, lengths or shapes disagree, devices, dtypes or layouts are mixed or unsupported,
            or a scale is not finite.
    """
    if others is None:
        return _unscaled(_squared_norms(tensors), inv_scale)
    sums = []
    for x, y, scale in zip(tensors, others, scales, strict=True):
        s = scale if inv_scale is None else scale / inv_scale.double().reshape(())
        total = _wide(_real(x)) + s * _wide(_real(y)) if scale != 0 else _wide(_real(x))
        sums.append(total.square().sum())
    return _unscaled(torch.stack(sums), inv_scale)


@checked_by(_checks.trust_ratios)
def trust_ratios(
    param_squared_norms: Tensor,
    grad_squared_norms: Tensor,
    *,
    weight_decays: Sequence[float],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    dtype: torch.dtype,
    clip: bool = False,
    lrs: Sequence[float] = (),
    of_updates: bool = False,
    lr_tensor: Tensor | None = None,
) -> Tensor:
    """Decide the trust ratio r = η‖w‖ / (‖g‖ + λ‖w‖ + ε) of each layer, which is 1 where ‖w‖ = 0 or ‖g‖ = 0.

    A norm that is NaN makes the ratio NaN.

    Args:
        param_squared_norms: ‖w‖², a float64 vector of n.
        grad_squared_norms: ‖g‖², likewise, of unscaled gradients; or ‖g + λw‖², with zeros for ``weight_decays``; or
            ‖γu‖² of updates.
        weight_decays: λ ≥ 0 of each layer.
        trust_coefs: η > 0 of each layer.
        eps: ε ≥ 0 of each layer.
        dtype: float64 for float64 layers, float32 for all others. Ratios are computed in float64 and rounded once.
        clip: whether the ratio is min(r / γ, 1): no layer's step is longer than the base optimizer's own.
        lrs: γ ≥ 0 of each layer; may be empty without ``clip`` and ``of_updates``.
        of_updates: whether ``grad_squared_norms`` are of updates γu. ‖u‖ then takes the place of ‖g‖, and ``clip``
            makes the ratio min(r, 1).
        lr_tensor: multiplies all lrs if given: a float64 tensor of one element on the norms' device, whose value the
            host need not know.

    Returns:
        A vector of n ratios.

    Raises:
        RuntimeError: lengths, devices or dtypes disagree, or a number is out of its range.
    """
    param_norms, grad_norms = param_squared_norms.sqrt(), grad_squared_norms.sqrt()
    decay, coef, small = (param_norms.new_tensor(values) for values in (weight_decays, trust_coefs, eps))
    if of_updates:  # which have the length lr · ‖u‖
        grad_norms = torch.where(grad_norms == 0, 0.0, grad_norms / _scaled(lrs, lr_tensor, grad_norms))
    ratios = coef * param_norms / (grad_norms + decay * param_norms + small)
    is_nan = (param_norms + grad_norms).isnan()
    is_one = ((param_norms == 0) | (grad_norms == 0)) & ~is_nan
    ratios = torch.where(is_one, 1.0, ratios)
    if clip:
        ratios = (ratios if of_updates else ratios / _scaled(lrs, lr_tensor, ratios)).clamp(max=1.0)
    return ratios.to(dtype)


@checked_by(_checks.scale_gradients_)
def scale_gradients_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    maximize: bool,
    weight_decays: Sequence[float],
    decayed_norm: bool = False,
    ratios: Tensor | None = None,
    trust_coefs: Sequence[float] = (),
    eps: Sequence[float] = (),
    clip: bool = False,
    lrs: Sequence[float] = (),
    lr_in_momentum: bool = False,
    lr_tensor: Tensor | None = None,
    inv_scale: Tensor | None = None,
) -> None:
    """Scale each gradient by its trust ratio, in place: g ← r · (σg + λw), or r · (σg − λw) with ``maximize``.

    The ratios r are

    - 1 if ``ratios`` are not given: gradients are only unscaled and decayed;
    - read from ``ratios`` if these are given without ``trust_coefs``;
    - measured, decided and written to ``ratios`` if ``trust_coefs`` are given. The bits are those of
      :func:`squared_norms`, :func:`trust_ratios` and this op with the ratios that they give, but gradients and
      parameters are still in cache when they are read the second time.

    Computed in float32 (float64 for float64 layers), and rounded once to the gradient's dtype.

    Args:
        grads: n gradients g, written in place.
        params: n parameters w, of the gradients' shapes. Without ``trust_coefs``, a parameter whose λ is 0 is not read
            and its shape is free.
        maximize: whether the base optimizer maximizes: it negates the gradient, and the decay still pulls towards 0.
        weight_decays: λ ≥ 0 of each layer.
        decayed_norm: whether the ratio's denominator has ‖σg ± λw‖ in the place of ‖σg‖ + λ‖w‖. Needs ``trust_coefs``.
        ratios: a contiguous vector of n, float64 if gradients or parameters are, float32 otherwise. With
            ``trust_coefs`` it is written, whatever it holds. For a step that is skipped (σ = 0) it gets the ratios of
            zero gradients: 1, and with ``clip`` min(1 / γ, 1).
        trust_coefs: η > 0 of each layer; empty if ratios are not measured.
        eps: ε ≥ 0 of each layer, with ``trust_coefs``; else empty.
        clip: whether the ratio is min(r / γ, 1). Needs ``trust_coefs``.
        lrs: γ ≥ 0 of each layer; may be empty without ``clip`` and ``lr_in_momentum``.
        lr_in_momentum: whether γr takes the place of r in the gradient, so that γ enters the base's momentum.
        lr_tensor: multiplies all lrs if given, as in :func:`trust_ratios`.
        inv_scale: σ, as in :func:`squared_norms`. Where it is 0 the step is skipped: no gradient is written.

    Raises:
        RuntimeError: lengths, shapes, devices or dtypes disagree, a number is out of its range, an argument is given
            without the one that it needs, or elements of a gradient share memory. Nothing was written then.
    """
    if len(trust_coefs) > 0:
        _decide(
            ratios,
            grads,
            params,
            maximize=maximize,
            weight_decays=weight_decays,
            decayed_norm=decayed_norm,
            trust_coefs=trust_coefs,
            eps=eps,
            clip=clip,
            lrs=lrs,
            lr_tensor=lr_tensor,
            inv_scale=inv_scale,
        )
    dtype = compute_dtype(grads[0].dtype, params[0].dtype)
    factors = _ones(grads, params) if ratios is None else ratios
    if lr_in_momentum:
        factors = _times_lrs(factors, lrs, lr_tensor)
    for grad, param, factor, weight_decay in zip(grads, params, factors, weight_decays, strict=True):
        scaled = _times(_real(grad.to(torch.promote_types(grad.dtype, dtype))), inv_scale)
        if weight_decay != 0:
            decay = -weight_decay if maximize else weight_decay
            scaled = scaled + decay * _real(param).to(scaled.dtype)
        _write(grad, factor * scaled, inv_scale)


@checked_by(_checks.scale_updates_)
def scale_updates_(
    params: Sequence[Tensor],
    old_params: Sequence[Tensor],
    *,
    ratios: Tensor,
    trust_coefs: Sequence[float] = (),
    eps: Sequence[float] = (),
    clip: bool = False,
    lrs: Sequence[float] = (),
    lr_tensor: Tensor | None = None,
) -> None:
    """Scale the update of each parameter by its trust ratio, in place: w ← w_old + r · (w − w_old).

    Where r = 1 the parameter is not written. The ratios are read from ``ratios``; or, if ``trust_coefs`` are given,
    measured, decided and written there, as by :func:`squared_norms` and :func:`trust_ratios` with ``of_updates``:
    r = η‖w_old‖ / (‖w − w_old‖ / γ + ε).

    Args:
        params: n parameters w after a step, written in place.
        old_params: the same before the step, of their shapes and dtype.
        ratios: a contiguous vector of n, float64 for float64 layers, float32 for all others.
        trust_coefs: η > 0 of each layer; empty if ratios are not measured. The arguments that follow are given with
            them only.
        eps: ε ≥ 0 of each layer.
        clip: whether the ratio is min(r, 1).
        lrs: γ ≥ 0 of each layer's step.
        lr_tensor: multiplies all lrs if given, as in :func:`trust_ratios`.

    Raises:
        RuntimeError: lengths, shapes, devices or dtypes disagree, a number is out of its range, an argument is given
            without ``trust_coefs``, or elements of a parameter share memory. Nothing was written then.
    """
    if len(trust_coefs) > 0:
        measured = trust_ratios(
            squared_norms(old_params),
            squared_norms(params, others=old_params, scales=[-1.0] * len(params)),
            weight_decays=[0.0] * len(params),
            trust_coefs=trust_coefs,
            eps=eps,
            dtype=ratios.dtype,
            clip=clip,
            lrs=lrs,
            of_updates=True,
            lr_tensor=lr_tensor,
        )
        ratios.copy_(measured)
    for param, old_param, ratio in zip(params, old_params, ratios, strict=True):
        new, old = (_real(tensor).to(ratios.dtype) for tensor in (param, old_param))
        _write(param, torch.where(ratio == 1, new, old + ratio * (new - old)))


@checked_by(_checks.sgd_)
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum_scales: Sequence[Tensor] | None = None,
    row_lengths: Sequence[int] = (),
    offsets: Sequence[int] = (),
    maximize: bool,
    weight_decays: Sequence[float],
    decayed_norm: bool = False,
    lrs: Sequence[float],
    lr_in_momentum: bool = False,
    lr_tensor: Tensor | None = None,
    momentums: Sequence[float],
    dampenings: Sequence[float],
    nesterov: bool = False,
    ratios: Tensor | None = None,
    trust_coefs: Sequence[float] = (),
    eps: Sequence[float] = (),
    clip: bool = False,
    inv_scale: Tensor | None = None,
) -> None:
    """Take a step of SGD in place, along d = r · (σg + λw).

    m ← μm + (1 − τ)d, then w ← w − γm, or w ← w − γ(d + μm) with ``nesterov``, or w ← w − γd without momentum.

    The ratios r are

    - 1 if ``ratios`` are not given: plain SGD;
    - read from ``ratios`` if these are given without ``trust_coefs``;
    - measured, decided and written to ``ratios`` if ``trust_coefs`` are given, as in :func:`scale_gradients_`.

    Gradients are only read. Computed in float32 (float64 for float64 layers); a parameter and a momentum are each
    rounded once, when they are written.

    Args:
        params: n parameters w, written in place.
        grads: n gradients g, of the parameters' shapes.
        momentum_buffers: n buffers m, of the parameters' shapes, written in place; or none, for no momentum. Of the
            parameters' dtype, or of float32 for bfloat16 and float16 ones. A first step starts from zeros, with τ = 0.
        momentum_scales: if given, momentum is in 8 bits as :mod:`torchlars.codes` defines it: ``momentum_buffers`` are
            codes, int8, and these are n contiguous float32 tensors of their scales, of ``codes.scales_shape``, written
            in place. Layers are float32, bfloat16 or float16 then, and fill their memory row by row. The parameter is
            updated by the exact momentum, which is coded afterwards.
        row_lengths: of each layer that is a shard, the elements of a row of the whole one; empty if all are whole.
        offsets: of each layer that is a shard, the position of its first element in the whole one; likewise.
        maximize: whether to ascend: g is negated first.
        weight_decays: λ ≥ 0 of each layer.
        decayed_norm: as in :func:`scale_gradients_`.
        lrs: γ ≥ 0 of each layer.
        lr_in_momentum: whether γ multiplies d, and so enters the momentum, instead of the step.
        lr_tensor: multiplies all lrs if given, as in :func:`trust_ratios`.
        momentums: μ ≥ 0 of each layer, 0 where there are no buffers.
        dampenings: τ of each layer.
        nesterov: whether to use Nesterov momentum.
        ratios: as in :func:`scale_gradients_`.
        trust_coefs: likewise.
        eps: likewise.
        clip: likewise.
        inv_scale: σ, as in :func:`squared_norms`. Where it is 0 the step is skipped: neither parameters nor momentum
            are written.

    Raises:
        RuntimeError: lengths, shapes, devices or dtypes disagree, a number is out of its range, an argument is given
            without the one that it needs, or elements of a tensor to write share memory. Nothing was written then.
    """
    if len(trust_coefs) > 0:
        _decide(
            ratios,
            grads,
            params,
            maximize=maximize,
            weight_decays=weight_decays,
            decayed_norm=decayed_norm,
            trust_coefs=trust_coefs,
            eps=eps,
            clip=clip,
            lrs=lrs,
            lr_tensor=lr_tensor,
            inv_scale=inv_scale,
        )
    dtype = compute_dtype(grads[0].dtype, params[0].dtype)
    factors = _ones(grads, params) if ratios is None else ratios
    if lr_in_momentum:
        factors, lrs, lr_tensor = _times_lrs(factors, lrs, lr_tensor), [1.0] * len(params), None
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        w = _real(param).to(dtype)
        direction = _times(_real(grad).to(dtype), inv_scale)
        if maximize:
            direction = -direction
        if weight_decays[i] != 0:
            direction = direction + weight_decays[i] * w
        direction = factors[i] * direction
        if len(momentum_buffers) > 0:
            scales = None if momentum_scales is None else momentum_scales[i]
            old = momentum_buffers[i] if scales is None else codes.decode(momentum_buffers[i], scales, param)
            buffer = momentums[i] * _real(old).to(dtype) + (1 - dampenings[i]) * direction
            if scales is None:
                _write(momentum_buffers[i], buffer, inv_scale)
            else:
                is_whole = len(offsets) == 0
                coded = torch.empty_like(param, dtype=torch.int8)
                new_scales = codes.encode(
                    coded,
                    buffer,
                    param,
                    offset=0 if is_whole else offsets[i],
                    whole_row_length=codes.row_length(param.shape) if is_whole else row_lengths[i],
                )
                _write(momentum_buffers[i], coded, inv_scale)
                _write(scales, new_scales, inv_scale)
            direction = direction + momentums[i] * buffer if nesterov else buffer
        lr = lrs[i] if lr_tensor is None else (lrs[i] * lr_tensor.reshape(())).to(dtype)
        _write(param, w - lr * direction, inv_scale)


@checked_by(_checks.adam_)
def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    maximize: bool,
    weight_decays: Sequence[float],
    decoupled_weight_decay: bool,
    beta1: float,
    beta2: float,
    adam_eps: float,
    decayed_norm: bool = False,
    lrs: Sequence[float],
    lr_tensor: Tensor | None = None,
    of_updates: bool = False,
    ratios: Tensor | None = None,
    trust_coefs: Sequence[float] = (),
    eps: Sequence[float] = (),
    clip: bool = False,
    squared_norms: Tensor | None = None,
    inv_scale: Tensor | None = None,
) -> None:
    """Take a step of Adam or AdamW in place, with trust ratios of gradients or of updates, or without.

    t ← t + 1, m ← β₁m + (1 − β₁)d and v ← β₂v + (1 − β₂)d², then w ← w − γsu with
    u = m / (1 − β₁ᵗ) / (√v / √(1 − β₂ᵗ) + ε). With ``decoupled_weight_decay`` d = r · σg, and λw is added to u;
    without, d = r · (σg + λw).

    The trust ratios are r, and s is 1; or, with ``of_updates``, they are s, and r is 1. They are

    - 1 if ``ratios`` are not given: plain Adam;
    - read from ``ratios`` if these are given without ``trust_coefs``;
    - measured, decided and written to ``ratios`` if ``trust_coefs`` are given: r as in :func:`scale_gradients_`, with
      λ = 0 where the decay is decoupled, s = η‖w‖ / (‖u‖ + eps).

    A step with ratios of updates can be taken in two calls, between which norms are completed over several ranks. The
    first is given ``squared_norms``: it updates t, m and v, and measures. The second has no ``grads``: it updates w, by
    ``ratios`` that are given. The bits are those of one call, for gradients of the parameters' dtype. For others the
    moments must not be of 16 bits in the first call.

    If u is measured from gradients of the parameters' dtype, it is that of m and v as they are stored, rounded to their
    dtype. Otherwise it is that of m and v before they are rounded. Kernels compute in float32 (float64 for float64
    layers). A parameter and each moment are rounded once, when they are written.

    Args:
        params: n parameters w, written in place.
        grads: n gradients g, of the parameters' shapes; or none, if t, m and v are those of this step already.
        exp_avgs: n first moments m, of the parameters' shapes, written in place. Of the parameters' dtype, or of
            float32 for bfloat16 and float16 ones.
        exp_avg_sqs: n second moments v, likewise, of the dtype of ``exp_avgs``. Of complex layers, real and imaginary
            parts are numbers of their own.
        steps: n numbers of steps t that were taken, 0 before the first: float32 tensors of one element on the
            parameters' device, written in place. The host does not read them.
        maximize: whether to ascend: g is negated first.
        weight_decays: λ ≥ 0 of each layer.
        decoupled_weight_decay: whether λw is added to u, as in AdamW, and not to g.
        beta1: 0 ≤ β₁ < 1.
        beta2: 0 ≤ β₂ < 1.
        adam_eps: ε ≥ 0 in the denominator of u.
        decayed_norm: as in :func:`scale_gradients_`.
        lrs: γ ≥ 0 of each layer.
        lr_tensor: multiplies all lrs if given, as in :func:`trust_ratios`.
        of_updates: whether trust ratios are those of updates.
        ratios: as in :func:`scale_gradients_`. With ``of_updates`` they are 1 for a step that is skipped.
        trust_coefs: likewise.
        eps: likewise.
        clip: whether r is min(r / γ, 1), or s is min(s, 1). Needs ``trust_coefs``.
        squared_norms: a contiguous float64 vector of 2n: if given, ‖w‖² of all layers and ‖u‖² of all layers are
            written there, and parameters are not written. Zeros for a step that is skipped.
        inv_scale: σ, as in :func:`squared_norms`. Where it is 0 the step is skipped: neither parameters nor moments nor
            t are written.

    Raises:
        RuntimeError: lengths, shapes, devices or dtypes disagree, a number is out of its range, an argument is given
            without the one that it needs, or elements of a tensor to write share memory. Nothing was written then.
    """
    if len(trust_coefs) > 0 and not of_updates:
        _decide(
            ratios,
            grads,
            params,
            maximize=maximize,
            weight_decays=[0.0] * len(params) if decoupled_weight_decay else weight_decays,
            decayed_norm=decayed_norm,
            trust_coefs=trust_coefs,
            eps=eps,
            clip=clip,
            lrs=lrs,
            lr_tensor=lr_tensor,
            inv_scale=inv_scale,
        )
    factors = [1.0] * len(params) if ratios is None or of_updates else ratios
    is_measured = squared_norms is not None or (of_updates and len(trust_coefs) > 0)
    moments = []
    for i, grad in enumerate(grads):
        direction = _times(_real(grad).double(), inv_scale)
        if maximize:
            direction = -direction
        if not decoupled_weight_decay and weight_decays[i] != 0:
            direction = direction + weight_decays[i] * _real(params[i]).double()
        direction = factors[i] * direction
        m, v = _real(exp_avgs[i]).double(), _real(exp_avg_sqs[i]).double()
        m = m + (1 - beta1) * (direction - m) if beta1 > 0.5 else direction - beta1 * (direction - m)
        v = beta2 * v + (1 - beta2) * direction.square()
        _write(exp_avgs[i], m, inv_scale)
        _write(exp_avg_sqs[i], v, inv_scale)
        _write(steps[i], steps[i] + 1, inv_scale)
        moments.append((m, v))
    if len(grads) == 0 or (is_measured and grads[0].dtype == params[0].dtype):
        stored = zip(exp_avgs, exp_avg_sqs, strict=True)
        moments = [(_real(m).double(), _real(v).double()) for m, v in stored]
    updates = []
    for i, (param, (m, v)) in enumerate(zip(params, moments, strict=True)):
        t = steps[i].double().reshape(())
        update = m / (1 - beta1**t) / (v.sqrt() / (1 - beta2**t).sqrt() + adam_eps)
        if decoupled_weight_decay and weight_decays[i] != 0:
            update = update + weight_decays[i] * _real(param).double()
        updates.append(update)
    if is_measured:
        measured = torch.cat([_squared_norms(params), _squared_norms(updates)])
        if inv_scale is not None:
            measured = torch.where(inv_scale.reshape(()) == 0, 0.0, measured)
        if squared_norms is not None:
            squared_norms.copy_(measured)
            return
        assert ratios is not None
        decided = trust_ratios(
            *measured.chunk(2),
            weight_decays=[0.0] * len(params),
            trust_coefs=trust_coefs,
            eps=eps,
            dtype=ratios.dtype,
            clip=clip,
            lrs=[1.0] * len(params),
            of_updates=True,
        )
        ratios.copy_(decided)
    factors = _scaled(lrs, lr_tensor, params[0])
    if ratios is not None and of_updates:
        factors = factors * ratios
    for param, update, factor in zip(params, updates, factors, strict=True):
        _write(param, _real(param).double() - factor * update, inv_scale)


def _decide(
    ratios: Tensor | None,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    maximize: bool,
    weight_decays: Sequence[float],
    decayed_norm: bool,
    trust_coefs: Sequence[float],
    eps: Sequence[float],
    clip: bool,
    lrs: Sequence[float],
    lr_tensor: Tensor | None,
    inv_scale: Tensor | None,
) -> None:
    """Measure layers, and write their trust ratios. With ``decayed_norm`` the decay is in the gradient's norm."""
    assert ratios is not None
    if decayed_norm:
        scales = [-weight_decay if maximize else weight_decay for weight_decay in weight_decays]
        grad_squared_norms = squared_norms(grads, others=params, scales=scales, inv_scale=inv_scale)
        weight_decays = [0.0] * len(grads)
    else:
        grad_squared_norms = squared_norms(grads, inv_scale=inv_scale)
    measured = trust_ratios(
        squared_norms(params),
        grad_squared_norms,
        weight_decays=weight_decays,
        trust_coefs=trust_coefs,
        eps=eps,
        dtype=ratios.dtype,
        clip=clip,
        lrs=lrs,
        lr_tensor=lr_tensor,
    )
    ratios.copy_(measured)


def _squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([_wide(tensor).abs().square().sum() for tensor in tensors])


def _ones(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    dtype = compute_dtype(grads[0].dtype, params[0].dtype)
    return torch.ones(len(grads), dtype=dtype, device=grads[0].device)


def _scaled(lrs: Sequence[float], lr_tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return all learning rates as a float64 vector."""
    vector = torch.tensor(lrs, dtype=torch.float64, device=like.device)
    return vector if lr_tensor is None else vector * lr_tensor.reshape(())


def _times_lrs(ratios: Tensor, lrs: Sequence[float], lr_tensor: Tensor | None) -> Tensor:
    return (ratios.double() * _scaled(lrs, lr_tensor, ratios)).to(ratios.dtype)


def _times(grad: Tensor, inv_scale: Tensor | None) -> Tensor:
    return grad if inv_scale is None else inv_scale.reshape(()).to(grad.dtype) * grad


def _unscaled(squared_norms: Tensor, inv_scale: Tensor | None) -> Tensor:
    """Return squared norms times inv_scale²; 0 where that is 0, also for infinities."""
    if inv_scale is None:
        return squared_norms
    factor = inv_scale.double().reshape(()).square()
    return torch.where(factor == 0, 0.0, factor * squared_norms)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def _real(tensor: Tensor) -> Tensor:
    """View complex numbers as pairs of real ones: torch makes a real factor complex, and 0 · ∞ is NaN then."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _write(tensor: Tensor, real: Tensor, inv_scale: Tensor | None = None) -> None:
    """Write a result; where inv_scale is 0, which the host need not know, write what the tensor holds already."""
    if inv_scale is not None:
        before = _real(tensor)
        real = torch.where(inv_scale.reshape(()) == 0, before, real.to(before.dtype))
    tensor.copy_(torch.view_as_complex(real) if tensor.is_complex() else real)
