"""LAMB: the trust ratio of every layer's update, around any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import ops, sharding
from torchlars.amp import GradScale
from torchlars.layers import (
    TrustRatioWrapper,
    check_update,
    check_update_is_scalable,
    copies,
    lay_out_gradients,
    scale_updates,
)
from torchlars.wrapper import learning_rate, non_negative_number, positive_number, step_of_base, true_or_false

__all__ = ["LAMB"]


class LAMB(TrustRatioWrapper):
    r"""Layer-wise adaptive moments around a base optimizer: the trust ratio of the base's update.

    The base takes its whole step, with its own weight decay and momentum. Then the step of every layer (every parameter
    tensor *w*) gets another length:

    .. math::
        w \leftarrow w_\text{old} + r \cdot (w - w_\text{old}), \qquad
        r = \frac{\eta \lVert w_\text{old} \rVert}{\lVert u \rVert + \epsilon}, \qquad
        u = \frac{w - w_\text{old}}{\gamma},

    with the L2 norm over the whole layer, *r* = 1 where either norm is zero, and min(*r*, 1) with ``clip``. *r* is the
    *trust ratio*, η ``trust_coef``, ε ``eps`` and γ the group's learning rate at this step. So a layer's step has the
    length γ · η · ‖w‖, or with ``clip`` that at most.

    Over AdamW that is LAMB, and the wrapper for all bases that barely notice a gradient's scale (the Adam family, Muon,
    Adafactor), over which :class:`torchlars.LARS` does almost nothing. Over SGD with momentum it is a LARS that scales
    the momentum, too.

    **Gradients** stay as they were. Each parameter is copied for the duration of a step; of a sharded one
    (``DTensor``), what is here. Norms are those of whole layers, and all ranks must have gradients of the same layers,
    as in :class:`torchlars.LARS`.

    **Precision.** An update is the difference of two values of the parameter's dtype, each of which was rounded. So it
    must not be much smaller than the parameter: in float32 it is good to 1 % where ‖γu‖ is above 1e-5 · ‖w‖, which
    Adam's always is in practice. In bfloat16 and float16 most of a small update is lost: keep such parameters in
    float32.

    Parameters, groups, state and hyper-parameters are the base's, and whatever drives a torch optimizer drives this
    one. A group may hold ``trust_coef``, ``eps`` and ``clip`` as keys of its own, and ``trust_coef=None`` to be left to
    the base, as biases and normalisation layers often are (see :func:`torchlars.param_groups`). Where the base itself
    has a key ``eps``, as Adam has, that one is the base's.

    Args:
        optimizer: the base, any :class:`torch.optim.Optimizer` whose groups have an ``lr``. Kept as ``.optim``.
        trust_coef: η > 0, the length of a step relative to the weights', per unit of lr.
        eps: ε ≥ 0, in units of an update's norm.
        clip: whether no step is to be longer than the base's own.

    Raises:
        TypeError: ``optimizer`` is no optimizer, has no lr or searches along a line (LBFGS), or an argument is of the
            wrong kind.
        ValueError: a number is out of its range, the base is differentiable, or a group holds an option under the name
            of another library, such as ``trust_coefficient``, which the base does not own.

    Source: You et al., *Large Batch Optimization for Deep Learning: Training BERT in 76 minutes*, 2020,
    arXiv:1904.00962, with their φ(‖w‖) = ‖w‖. As in optax and timm, AdamW's bias correction stays.

    Example:
        >>> optimizer = LAMB(torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01))
        >>> loss.backward()
        >>> optimizer.step()
    """

    options: ClassVar = {"trust_coef": positive_number, "eps": non_negative_number, "clip": true_or_false}
    opt_out = "trust_coef"
    state_key = "lamb"

    trust_coef: float
    eps: float
    clip: bool

    def __init__(self, optimizer: Optimizer, trust_coef: float = 1.0, eps: float = 0.0, *, clip: bool = False) -> None:
        super().__init__(optimizer, trust_coef=trust_coef, eps=eps, clip=clip)

    def check_options(self, of_group: str, options: dict[str, Any]) -> None:
        """Raise if the base's update cannot be scaled."""
        check_update_is_scalable(self.optim, "LAMB")

    def group_options(self, index: int, group: dict[str, Any]) -> dict[str, Any] | None:
        """Return the options of the ``index``-th group with its lr, or None if it opts out."""
        options = super().group_options(index, group)
        if options is not None:
            options["lr"] = learning_rate(self.optim, index, {**self.defaults, **group})
        return options

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Let the base take its step, then scale every layer's update by its trust ratio.

        Args:
            closure: evaluates the model anew and returns the loss. It is called as often as the base asks, with
                gradients enabled, and may change the groups. The update is all that the step did.
            *args: passed on to the base.
            **kwargs: passed on to the base.

        Returns:
            What the base returns: the closure's loss, if any.

        Raises:
            TypeError, ValueError, RuntimeError: a group or parameter cannot be adapted; the message names it. Nothing
                has changed then. What the base raises leaves the base's step as far as it got.
        """
        buckets: list[Bucket] = []
        old_params: dict[Tensor, Tensor] = {}

        def gather() -> None:
            buckets[:] = self._gather(gradients_may_come=closure is not None)
            for bucket in buckets:
                old_params.update(copies([param for param in bucket.layers if param not in old_params]))
            lay_out_gradients(self.param_groups)

        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()  # type: ignore[misc]
            gather()
            return loss

        try:
            if closure is not None:
                args = (evaluate, *args)
            elif args:  # they keep their places
                args = (None, *args)
            # For the base, whose gradients these are: a step that it skips is no update.
            grad_scale = GradScale.of(self)
            gather()
            grad_scale.hand_to(self.optim)
            try:
                loss = step_of_base(self.optim)(*args, **kwargs)
            finally:
                grad_scale.take_from(self.optim)
            self._last_step[:] = _scale_updates(buckets, old_params)
            return loss
        except BaseException:
            GradScale.of(self).take_from(self.optim, self)  # else the scaler does so
            raise

    def _gather(self, gradients_may_come: bool) -> list[Bucket]:
        """Return all layers that the base may update, in buckets."""
        buckets: dict[Any, Bucket] = {}
        seen: set[Tensor] = set()  # a tied parameter is one layer, however often it is listed
        all_options = [self.group_options(index, group) for index, group in enumerate(self.param_groups)]
        self.check_groups([index for index, options in enumerate(all_options) if options is not None])
        for index, (group, options) in enumerate(zip(self.param_groups, all_options, strict=True)):
            if options is None:
                continue
            for position, param in enumerate(group["params"]):
                if param in seen or (param.grad is None and not (gradients_may_come and param.requires_grad)):
                    continue
                seen.add(param)
                check_update(index, position, param)
                lr = options["lr"] if isinstance(options["lr"], Tensor) else None
                groups = sharding.process_groups(param)
                key = (param.device, param.dtype, options["clip"], lr, groups)
                bucket = buckets.setdefault(key, Bucket(clip=options["clip"], lr=lr, process_groups=groups))
                bucket.add(param, **options)
        return list(buckets.values())


@torch.no_grad()
def _scale_updates(
    buckets: Sequence[Bucket], old_params: dict[Tensor, Tensor]
) -> list[tuple[Sequence[Tensor], Tensor]]:
    """Measure, complete, decide, apply. Return the layers that were updated, and their trust ratios."""
    buckets = [bucket for bucket in buckets if bucket.take_updates(old_params)]
    sharded = [bucket for bucket in buckets if bucket.process_groups]
    sharding.complete([(bucket.process_groups, bucket.measure()) for bucket in sharded])
    return [(bucket.params, bucket.scale()) for bucket in buckets]


@dataclass
class Bucket:
    """Layers whose updates one call can scale: of one device and one dtype, and sharded alike."""

    clip: bool
    lr: Tensor | None  # of all, else each has its own
    process_groups: Sequence[Any]
    layers: dict[Tensor, tuple[float, float, float]] = field(default_factory=dict)
    params: list[Tensor] = field(default_factory=list)  # those that have gradients
    local_params: list[Tensor] = field(default_factory=list)  # what is here of each
    old_params: list[Tensor] = field(default_factory=list)  # likewise, before the step
    squared_norms: Tensor | None = None  # before the step, then of updates; if measured

    def add(self, param: Tensor, trust_coef: float, eps: float, clip: bool, lr: float | Tensor) -> None:
        """Add one layer."""
        self.layers[param] = (trust_coef, eps, 1.0 if isinstance(lr, Tensor) else lr)

    def take_updates(self, old_params: dict[Tensor, Tensor]) -> bool:
        """Take the updates of those that have gradients. Return whether there are any."""
        self.params = [param for param in self.layers if param.grad is not None]
        self.local_params = [sharding.local(param) for param in self.params]
        self.old_params = [old_params[param] for param in self.params]
        return len(self.params) > 0  # bool() of a list breaks the graphs of torch 2.11

    def measure(self) -> Tensor:
        """Measure what is here."""
        updates = ops.squared_norms_of_sums(self.local_params, self.old_params, [-1.0] * len(self.params))
        self.squared_norms = torch.cat([ops.squared_norms(self.old_params), updates])
        return self.squared_norms

    def scale(self) -> Tensor:
        """Scale the updates. Return the trust ratios."""
        trust_coefs, eps, lrs = zip(*(self.layers[param] for param in self.params), strict=True)
        lr_scale = None if self.lr is None else ops.lr_scale(self.lr, self.params[0].device)
        shares_memory = not torch.compiler.is_compiling() and len(ops.overlapping(self.local_params)) > 0
        if self.squared_norms is None and shares_memory:
            self.measure()
        if self.squared_norms is None:
            return ops.scale_updates_by_trust_ratios_(
                self.local_params, self.old_params, trust_coefs, eps, lrs, self.clip, lr_scale
            )
        old_squared_norms, update_squared_norms = self.squared_norms.chunk(2)
        ratios = ops.trust_ratios(
            old_squared_norms,
            update_squared_norms,
            [0.0] * len(self.params),
            trust_coefs,
            eps,
            ops.compute_dtype(self.params[0].dtype, self.params[0].dtype),
            lrs,
            lr_scale,
            self.clip,
            of_updates=True,
        )
        scale_updates(self.params, self.old_params, ratios)
        return ratios
