"""LARS: the trust ratio of every layer, around any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import ops
from torchlars.wrapper import (
    HiddenHyperParameters,
    OptimizerWrapper,
    coupled_weight_decay,
    non_negative_number,
    positive_number,
)

__all__ = ["LARS"]


class LARS(OptimizerWrapper):
    r"""Layer-wise adaptive rate scaling around a base optimizer.

    Before the base takes its step, the gradient *g* of every layer (every parameter tensor *w*) becomes

    .. math::
        g \leftarrow r \cdot (g + \lambda w), \qquad
        r = \frac{\eta \lVert w \rVert}{\lVert g \rVert + \lambda \lVert w \rVert + \epsilon},

    with the L2 norm over the whole layer, *r* = 1 where either norm is zero, and (g − λw) in groups that maximize.
    *r* is the *trust ratio*, η ``trust_coef``, ε ``eps`` and λ the group's weight decay, if it is coupled.

    **The learning rate** enters once, in the base: a step of plain SGD has the length lr · η · ‖w‖ or less, whatever
    the gradient's. So lr is of another size here than for SGD alone, and nearly the same for all batch sizes. Momentum
    is the base's and collects gradients that are already scaled, without lr; the paper's Algorithm 1 keeps lr inside
    the momentum. The two differ while lr changes.

    **Gradients are consumed**: after :meth:`step`, ``p.grad`` holds r · (g + λw). Clip before it, and look at gradients
    before it. A base that takes trust ratios (see :mod:`torchlars.optim`) multiplies by them in its own update: then
    ``p.grad`` stays as it was, and nothing is hidden from the base.

    **Weight decay** that the base would add to the gradient (SGD, Adam, RMSprop, ...) is taken over, and hidden from
    the base while it steps. Decoupled weight decay (AdamW, Muon, Adafactor, ``decoupled_weight_decay=True``) stays the
    base's: then λ = 0. A base of another library that decouples without saying so needs that key in its groups.

    **Other bases.** The Adam family, Muon, Adafactor and Rprop barely notice a gradient's scale, so that LARS does
    almost nothing over them.

    Parameters, groups, state and hyper-parameters are the base's, and whatever drives a torch optimizer drives this
    one. A group may hold ``trust_coef`` and ``eps`` as keys of its own, and ``trust_coef=None`` to be left to the base
    as it is, weight decay included. Where the base itself has a key ``eps``, as Adam has, that one is the base's.

    Args:
        optimizer: the base, any :class:`torch.optim.Optimizer`. Kept as ``.optim``.
        eps: ε ≥ 0, in units of a gradient's norm.
        trust_coef: η > 0, the length of a step relative to the weights', per unit of lr.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or a number is not a number.
        ValueError: a number is out of its range, or the base is differentiable.

    Source: You, Gitman and Ginsburg, *Large Batch Training of Convolutional Networks*, 2017, arXiv:1708.03888. The
    formula of the ratio is theirs, with ε added. Where they keep lr inside the momentum we follow
    kakaobrain/torchlars 0.1.2, which does not.

    Example:
        >>> optimizer = LARS(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))
        >>> loss.backward()
        >>> optimizer.step()
    """

    options: ClassVar = {"eps": non_negative_number, "trust_coef": positive_number}
    opt_out = "trust_coef"
    state_key = "lars"

    eps: float
    trust_coef: float

    def __init__(self, optimizer: Optimizer, eps: float = 1e-8, trust_coef: float = 0.001) -> None:
        super().__init__(optimizer, eps=eps, trust_coef=trust_coef)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_step: list[tuple[Sequence[Tensor], Tensor]] = []  # changed in place, which torch 2.11 can trace

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Scale every gradient by its layer's trust ratio, then let the base take its step.

        Args:
            closure: evaluates the model anew and returns the loss. It is called as often as the base asks, with
                gradients enabled and the user's hyper-parameters in sight, and what it leaves in ``.grad`` is scaled
                each time.
            *args: passed on to the base.
            **kwargs: passed on to the base.

        Returns:
            What the base returns: the closure's loss, if any.

        Raises:
            TypeError, ValueError, RuntimeError: a group, parameter or gradient cannot be adapted; the message names it.
                Nothing has changed then. Whatever raises, hyper-parameters are back as they were.
        """
        if getattr(self.optim, "takes_trust_ratios", False):
            trust_ratios = TrustRatios(self)
            if closure is not None or args:
                args = (closure, *args)
            loss = self.optim.step(*args, trust_ratios=trust_ratios, **kwargs)  # type: ignore[call-overload]
            self._last_step[:] = trust_ratios.reported
            return loss
        hidden = HiddenHyperParameters()

        def adapted_closure() -> Any:
            hidden.restore()
            with torch.enable_grad():
                loss = closure()  # type: ignore[misc]
            self._adapt()
            self._hide_weight_decay(hidden)
            return loss

        if closure is not None:
            args = (adapted_closure, *args)
        elif args:  # they keep their places
            args = (None, *args)
        try:
            if closure is None:
                self._adapt()
            self._hide_weight_decay(hidden)
            return self.optim.step(*args, **kwargs)
        finally:
            hidden.restore()

    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """Return the trust ratio of every layer that the last step adapted, by parameter.

        Each is a 0-dimensional tensor on its parameter's device; only reading its value waits for that device. Layers
        without a gradient and groups with ``trust_coef=None`` have none.
        """
        return {
            param: ratio
            for params, ratios in self._last_step
            for param, ratio in zip(params, ratios.unbind(), strict=True)
        }

    @torch.no_grad()
    def _adapt(self) -> None:
        """Measure, decide, apply."""
        self._last_step[:] = [(bucket.params, bucket.adapt()) for bucket in self._gather()]

    def _gather(self) -> Iterable[Bucket]:
        """Return all layers to adapt, in buckets. Raise what there is to raise before anything changes."""
        plain_layers = ops.plain_layers("LarsLayers")
        buckets: dict[Any, Bucket] = {}
        seen: set[Tensor] = set()  # a tied parameter is one layer, however often it is listed
        for index, group in enumerate(self.param_groups):
            options = self.group_options(index, group)
            if options is None:
                continue
            weight_decay = coupled_weight_decay(self.optim, index, group)
            maximize = bool(group.get("maximize", False))
            for position in plain_layers.add(group["params"], weight_decay, **options, maximize=maximize):
                param = group["params"][position]
                if param.grad is None or param in seen:
                    continue
                seen.add(param)
                _check_layer(index, position, param, weight_decay)
                is_sparse = param.grad.is_sparse
                key = (param.device, param.dtype, param.grad.dtype, is_sparse, maximize)
                bucket = buckets.setdefault(key, Bucket(is_sparse=is_sparse, maximize=maximize))
                bucket.add(param, weight_decay, **options)
        return [*plain_layers.buckets, *buckets.values()]

    def _hide_weight_decay(self, hidden: HiddenHyperParameters) -> None:
        """Hide the weight decay that the gradients hold already."""
        for index, group in enumerate(self.param_groups):
            if self.group_options(index, group) is not None and coupled_weight_decay(self.optim, index, group) != 0:
                hidden.hide(group, "weight_decay", 0.0)


class TrustRatios:
    """What a base that takes trust ratios gets: see :class:`torchlars.optim.TrustRatios`."""

    def __init__(self, lars: LARS) -> None:
        self._lars = lars
        self.reported: list[tuple[Sequence[Tensor], Tensor]] = []

    def options(self, index: int) -> dict[str, float] | None:
        """Return ``trust_coef`` and ``eps`` of a group, or None if it is not adapted."""
        return self._lars.group_options(index, self._lars.param_groups[index])

    @torch.no_grad()
    def measure(self, index: int, params: Sequence[Tensor]) -> Tensor | None:
        """Return the trust ratios of some parameters of a group, or None if it is not adapted."""
        options = self.options(index)
        if options is None:
            return None
        group = self._lars.param_groups[index]
        weight_decay = coupled_weight_decay(self._lars.optim, index, group)
        positions = {param: position for position, param in enumerate(group["params"])}
        grads: list[Tensor] = []
        for param in params:
            position = positions.get(param)
            if position is None:
                raise ValueError(f"params must be of the group (group: {index}, got one of shape {tuple(param.shape)})")
            grad = param.grad
            if grad is None:
                raise ValueError(f"params must have gradients (group: {index}, parameter: {position})")
            _check_layer(index, position, param, weight_decay)
            if (param.device, param.dtype) != (params[0].device, params[0].dtype):
                raise ValueError(
                    f"params must be of one device and dtype (group: {index}, parameter: {position}, {param.dtype} on "
                    f"{param.device}, but {params[0].dtype} on {params[0].device} before)"
                )
            grads.append(grad.coalesce()._values() if grad.is_sparse else grad)
        if not grads:
            return torch.empty(0)
        layers = len(params)
        trust_coefs, eps = [options["trust_coef"]] * layers, [options["eps"]] * layers
        ratios = _measure(grads, params, [weight_decay] * layers, trust_coefs, eps)
        self.report(params, ratios)
        return ratios

    def report(self, params: Sequence[Tensor], ratios: Tensor) -> None:
        """Take note of ratios that were applied."""
        self.reported.append((params, ratios))


@dataclass
class Bucket:
    """Layers that one call can adapt: of one device and one dtype."""

    is_sparse: bool
    maximize: bool
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    weight_decays: list[float] = field(default_factory=list)
    trust_coefs: list[float] = field(default_factory=list)
    eps: list[float] = field(default_factory=list)

    def add(self, param: Tensor, weight_decay: float, trust_coef: float, eps: float) -> None:
        """Add one layer."""
        self.params.append(param)
        self.grads.append(_writable_gradient(param))
        self.weight_decays.append(weight_decay)
        self.trust_coefs.append(trust_coef)
        self.eps.append(eps)

    def adapt(self) -> Tensor:
        """Scale the gradients, and return the trust ratios."""
        if not self.is_sparse:
            return ops.scale_by_trust_ratios_(
                self.grads, self.params, self.weight_decays, self.trust_coefs, self.eps, self.maximize
            )
        # The values of a sparse gradient are fewer than the parameter's: the two cannot be swept side by side.
        ratios = _measure(self.grads, self.params, self.weight_decays, self.trust_coefs, self.eps)
        ops.apply_trust_ratios_(self.grads, self.params, ratios, self.weight_decays, self.maximize)
        return ratios


def _measure(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    weight_decays: Sequence[float],
    trust_coefs: Sequence[float],
    eps: Sequence[float],
) -> Tensor:
    """Measure and decide."""
    dtype = ops.compute_dtype(grads[0].dtype, params[0].dtype)
    norms = ops.squared_norms(params), ops.squared_norms(grads)
    return ops.trust_ratios(*norms, weight_decays, trust_coefs, eps, dtype)


def _check_layer(group: int, position: int, param: Tensor, weight_decay: float) -> None:
    """Raise if a parameter with its gradient cannot be adapted."""
    grad = param.grad
    assert grad is not None
    if getattr(param, "_fsdp_flattened", False):
        problem = (
            "parameters must be whole layers, but FSDP1 flattens and splits them; use DDP or ZeroRedundancyOptimizer"
        )
    elif getattr(param, "device_mesh", None) is not None:
        problem = "parameters must be whole layers, but a DTensor may be a shard; use DDP or ZeroRedundancyOptimizer"
    elif param.dtype not in ops.DTYPES:
        raise TypeError(
            f"parameters must be of a real or complex floating dtype with at least 16 bits (group: {group}, "
            f"parameter: {position}, dtype: {param.dtype}); leave others to the base: trust_coef=None in their group"
        )
    elif grad.layout not in (torch.strided, torch.sparse_coo):
        problem = f"gradients must be strided or sparse COO (layout: {grad.layout})"
    elif grad.is_sparse and weight_decay != 0:
        problem = f"sparse gradients need weight_decay=0 (weight_decay: {weight_decay})"
    elif grad.shape != param.shape:
        problem = f"gradients must have their parameter's shape (gradient: {tuple(grad.shape)})"
    elif grad.device != param.device:
        problem = f"gradients must be on their parameter's device (parameter: {param.device}, gradient: {grad.device})"
    elif grad.dtype not in ops.DTYPES or grad.is_complex() != param.is_complex():
        problem = f"gradients must be of their parameter's kind (parameter: {param.dtype}, gradient: {grad.dtype})"
    else:
        return
    raise RuntimeError(f"{problem} (group: {group}, parameter: {position}, shape: {tuple(param.shape)})")


def _writable_gradient(param: Tensor) -> Tensor:
    """Return what of a gradient can be written in place: itself, or the values of a sparse one.

    A gradient that is a view of itself (expanded, overlapping, lazily conjugated or negated) or was made in inference
    mode is replaced by its values first, an uncoalesced sparse one by its sum.
    """
    assert param.grad is not None
    grad = param.grad
    is_inference = not torch.compiler.is_compiling() and grad.is_inference()  # to ask would break a graph
    if grad.is_sparse:
        grad = grad.coalesce()
        if not ops.is_writable_in_place(grad._values()):
            values = grad._values().clone()
            grad = torch.sparse_coo_tensor(
                grad._indices(), values, grad.shape, is_coalesced=True, check_invariants=False
            )
    elif is_inference or not (grad.is_contiguous() or ops.is_writable_in_place(grad)):
        grad = grad.clone()
    else:
        grad = grad.resolve_conj().resolve_neg()
    if grad is not param.grad:
        param.grad = grad
    return grad._values() if grad.is_sparse else grad
