"""LARS: the trust ratio of every layer, around any optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import ops, sharding
from torchlars.amp import GradScale
from torchlars.groups import ZeroLayers
from torchlars.layers import (
    TrustRatioWrapper,
    check_layer,
    check_update,
    check_update_is_scalable,
    copies,
    lay_out_gradients,
    own_gradients,
    readable_gradient,
    scale_updates,
    undo_adaptation,
    writable_gradient,
)
from torchlars.wrapper import (
    decouples,
    is_base,
    is_capturing,
    learning_rate,
    non_negative_number,
    one_of,
    positive_number,
    step_of_base,
    steps_as,
    true_or_false,
    weight_decay_of,
)

__all__ = ["LARC", "LARS"]


def _none_or_decoupled(name: str, value: Any) -> str | None:
    if value is None or value == "decoupled":
        return value  # type: ignore[no-any-return]
    raise (ValueError if isinstance(value, str) else TypeError)(
        f"{name} must be None or 'decoupled' (got: {value!r}); how much is the base's: SGD(..., weight_decay=1e-4)"
    )


def _check_line_search(optim: Optimizer, index: int, group: dict[str, Any]) -> None:
    """Raise if LBFGS is to take steps whose length it works out from gradients that are not those of its loss."""
    if "line_search_fn" in group and group["line_search_fn"] is None and is_base(optim, torch.optim.LBFGS):
        raise TypeError(
            f"LBFGS needs a line search under LARS (parameter group: {index}, got: line_search_fn=None): scaled "
            "gradients are not those of the loss, and the steps that LBFGS derives from them climb; pass "
            "line_search_fn='strong_wolfe'"
        )


class LARS(TrustRatioWrapper):
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
    the momentum (``lr_in_momentum=True``). The two differ while lr changes.

    **Gradients are consumed**: after :meth:`step`, ``p.grad`` holds r · (g + λw). Clip before it, and look at gradients
    before it. A base that takes trust ratios (see :mod:`torchlars.optim`) multiplies by them in its own update: then
    ``p.grad`` stays as it was, and no weight decay is hidden from the base.

    **Weight decay** that the base would add to the gradient (SGD, Adam, RMSprop, ...) is taken over, and hidden from
    the base while it steps. Decoupled weight decay (AdamW, Muon, Adafactor) stays the base's: then λ = 0. Whether it is
    decoupled is read from a group, or from the base's defaults, as ``decoupled_weight_decay``, ``weight_decouple``,
    ``decoupled_decay``, ``decoupled``, ``decouple``, ``use_decoupled_weight_decay``, ``stable_weight_decay``,
    ``weight_decay_type`` or ``adam_w_mode``; the classes of timm, pytorch_optimizer and bitsandbytes that say nothing
    are known by name. So are bases that another optimizer keeps as an attribute (Lookahead, SAM). One warning is given
    for a base of which nothing is known, and its decay is taken for coupled. ``weight_decay="decoupled"``, or
    ``decoupled_weight_decay`` in its groups, says which it is.

    **Other bases.** The Adam family, Muon, Adafactor and Rprop barely notice a gradient's scale, so that LARS does
    almost nothing over them: :class:`torchlars.LAMB` is their wrapper. LBFGS needs ``line_search_fn="strong_wolfe"``:
    scaled gradients are not those of the loss, and steps of a length that is derived from them alone climb.

    **Dialects.** Other implementations of LARS differ in four places, with γ for the group's lr at this step:

    - ``clip=True``: *r* ← min(*r* / γ, 1), so that *r* is a layer's learning rate and γ its upper bound. Where γ is 0,
      as in the first step of some warm-ups, that is 1: nothing moves, but momentum takes whole gradients.
    - ``norm="decayed"``: ‖g + λw‖ in the place of ‖g‖ + λ‖w‖.
    - ``lr_in_momentum=True``: the gradient becomes γ · r · (g + λw), and the base steps with an lr of 1, so that
      momentum keeps the lr of the steps in which it was collected. While the base steps, its own hooks read that 1, and
      what they make of it is lost.
    - ``apply_to="update"``: the base takes its whole step with its own gradient, weight decay and momentum, nothing is
      hidden, and then w ← w_old + r · (w − w_old). Gradients stay as they were, parameters are copied for the duration
      of a step, and what :class:`torchlars.LAMB` says of precision holds here.

    The README's table says which combination gives which implementation.

    **Sharded layers** (``DTensor``, as FSDP2 and tensor parallelism make them) have the trust ratios of whole layers.
    All ranks must take the step, with gradients of the same layers, which nobody checks: one all-reduce for each
    process group over which layers are split sums their squared norms, in order. (Two, where a base that takes trust
    ratios asks for those of some groups, and others are adapted here.) FSDP1 is refused, and so are flat partitions of
    several layers, which DeepSpeed ZeRO puts into the groups: tensors that are no :class:`torch.nn.Parameter`, were not
    there when the optimizer was wrapped, and do not have the shape of the layer that was.

    **Mixed precision.** Over a base that unscales gradients itself (``fused=True``, :class:`torchlars.optim.SGD`), a
    :class:`torch.amp.GradScaler` leaves that to :meth:`step`, which reads neither scale nor overflow on the host.
    Gradients are unscaled as they are adapted; where they overflowed, nothing is written.

    Parameters, groups, state and hyper-parameters are the base's, and whatever drives a torch optimizer drives this
    one. A group may hold all options but ``weight_decay`` (which is the base's there) as keys of its own, and
    ``trust_coef=None`` to be left to the base as it is, weight decay included. (With ``lr_in_momentum=True`` beside it,
    such a group has its lr in the momentum all the same, as biases have where everything has.) Where the base itself
    has a key of that name, as Adam has ``eps``, that one is the base's.

    Args:
        optimizer: the base, any :class:`torch.optim.Optimizer`. Kept as ``.optim``.
        eps: ε ≥ 0, in units of a gradient's norm.
        trust_coef: η > 0, the length of a step relative to the weights', per unit of lr.
        clip: whether no layer's learning rate is to be above the group's, of which the trust ratio is then a share.
        norm: ``"raw"`` or ``"decayed"``, the norms in the denominator of *r*.
        lr_in_momentum: whether lr multiplies gradients instead of steps. Needs a base whose step is linear in lr:
            :class:`torch.optim.SGD` or a subclass.
        apply_to: ``"gradient"`` or ``"update"``, what *r* multiplies.
        weight_decay: None to ask the base which kind it has; ``"decoupled"`` where it decouples and does not say so.
            A group says it by a key ``decoupled_weight_decay``, True or False.

    Raises:
        TypeError: ``optimizer`` is no optimizer, an argument is of the wrong kind, or the base's steps do not allow it.
        ValueError: an argument is out of its range, two contradict each other, the base is differentiable, or a group
            holds an option under the name of another library, such as ``trust_coefficient``, which the base does not
            own. Loading a state dict raises likewise.

    Source: You, Gitman and Ginsburg, *Large Batch Training of Convolutional Networks*, 2017, arXiv:1708.03888. The
    formula of the ratio is theirs, with ε added. Where they keep lr inside the momentum (``lr_in_momentum=True``) the
    default follows kakaobrain/torchlars 0.1.2, which does not.

    Example:
        >>> optimizer = LARS(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))
        >>> loss.backward()
        >>> optimizer.step()
    """

    options: ClassVar = {
        "eps": non_negative_number,
        "trust_coef": positive_number,
        "clip": true_or_false,
        "norm": one_of("raw", "decayed"),
        "lr_in_momentum": true_or_false,
        "apply_to": one_of("gradient", "update"),
        "weight_decay": _none_or_decoupled,
    }
    wrapper_only = frozenset({"weight_decay"})
    opt_out = "trust_coef"
    state_key = "lars"

    eps: float
    trust_coef: float
    clip: bool
    norm: str
    lr_in_momentum: bool
    apply_to: str
    weight_decay: str | None
    _zero_layers: ZeroLayers | None

    def __init__(
        self,
        optimizer: Optimizer,
        eps: float = 1e-8,
        trust_coef: float = 0.001,
        *,
        clip: bool = False,
        norm: str = "raw",
        lr_in_momentum: bool = False,
        apply_to: str = "gradient",
        weight_decay: str | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            eps=eps,
            trust_coef=trust_coef,
            clip=clip,
            norm=norm,
            lr_in_momentum=lr_in_momentum,
            apply_to=apply_to,
            weight_decay=weight_decay,
        )
        self._zero_layers = ZeroLayers()
        for group in self.param_groups:
            self._zero_layers.watch(group["params"])
        if self._guesses_decay():
            self._warn_of_guess()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_zero_layers", None)  # only from the constructor to the first step

    def check_options(self, of_group: str, options: dict[str, Any]) -> None:
        """Raise if options do not go together, or not with the base."""
        if options["apply_to"] == "update":
            check_update_is_scalable(self.optim, f"apply_to='update'{of_group}")
        if not options["lr_in_momentum"]:
            return
        if options.get("weight_decay") == "decoupled":
            raise ValueError(
                f"lr_in_momentum=True{of_group} hides lr from the base, which decoupled weight decay is multiplied by "
                "(got: weight_decay='decoupled')"
            )
        if options["apply_to"] == "update":
            raise ValueError(
                f"lr_in_momentum=True{of_group} needs apply_to='gradient' (got: 'update', which scales the whole step, "
                "with lr and momentum in it)"
            )
        if not steps_as(self.optim, torch.optim.SGD):
            raise TypeError(
                f"lr_in_momentum=True{of_group} needs a base whose step is linear in lr: torch.optim.SGD, "
                f"torchlars.optim.SGD or a subclass (got: {type(self.optim).__name__})"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base. It may hold any of the wrapper's options as keys."""
        guessed = self._guesses_decay()
        super().add_param_group(param_group)
        if self._guesses_decay() and not guessed:
            self._warn_of_guess()
        if self._zero_layers is None:
            self._zero_layers = ZeroLayers()
        self._zero_layers.watch(self.param_groups[-1]["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, as :meth:`torchlars.wrapper.OptimizerWrapper.load_state_dict` does."""
        guessed = self._guesses_decay()
        super().load_state_dict(state_dict)
        if self._guesses_decay() and not guessed:
            self._warn_of_guess()

    def _guesses_decay(self) -> bool:
        """Tell whether there is weight decay of which nobody says whether it is coupled."""
        for index, group in enumerate(self.param_groups):
            if decouples(self.optim, group) is None:
                adaptation = self.adaptation(index)
                if adaptation is not None and adaptation.weight_decay != 0:
                    return True
        return False

    def _warn_of_guess(self) -> None:
        name = type(self).__name__
        warnings.warn(
            f"{type(self.optim).__name__} does not say whether its weight decay is decoupled; {name} takes it for "
            f"coupled, and adds it to gradients. If it is decoupled, give weight_decay='decoupled' to {name}; if not, "
            "put decoupled_weight_decay=False into its parameter groups",
            stacklevel=3,
        )

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Scale every gradient by its layer's trust ratio, then let the base take its step.

        With ``apply_to="update"`` it is the step that is scaled.

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
                Nothing has changed then.

        Whatever raises, hyper-parameters are back as they were. If the base raises before it has written to any adapted
        parameter, as far as their version counters tell, gradients are put back as they were. What is lost is their
        rounding, in units of the larger one of g and λw, and what had become 0 or was not finite.
        """
        this = None
        try:
            self._hidden.restore_what_was_left()
            this = Step(self, closure)
            args, kwargs = this.arguments(*args, **kwargs)
            this.read_groups()
            if self._zero_layers is not None and not torch.compiler.is_compiling():
                zero_layers, self._zero_layers = self._zero_layers, None
                this.closure = zero_layers.before_step(self, closure)
            if closure is None:
                this.adapt()
            this.hide()
            try:
                loss = step_of_base(self.optim)(*args, **kwargs)
            finally:
                this.restore()
            this.scale_updates()
        except BaseException:
            if this is not None:
                this.undo()
            GradScale.of(self).take_from(self.optim, self)  # else the scaler does so
            raise
        self._last_step[:] = this.reported
        return loss

    def group_options(self, index: int, group: dict[str, Any]) -> dict[str, Any] | None:
        """Return the options of the ``index``-th group, or None if it opts out."""
        self._adaptation(index, {**self.defaults, **group})  # raises what there is to raise
        return super().group_options(index, group)

    def adaptation(self, index: int) -> Adaptation | None:
        """Return how the layers of the ``index``-th group are adapted now, or None if they are left to the base."""
        return self._adaptation(index, self.param_groups[index])

    def _adaptation(self, index: int, group: dict[str, Any]) -> Adaptation | None:
        options = super().group_options(index, group) or self._options_of_unadapted(index, group)
        if options is None:
            return None
        _check_line_search(self.optim, index, group)
        is_decoupled = options.pop("weight_decay", None) == "decoupled" or bool(decouples(self.optim, group))
        if is_decoupled and options["lr_in_momentum"] and group.get("weight_decay", 0) != 0:
            raise ValueError(
                f"lr_in_momentum=True of parameter group {index} hides lr from the base, which decoupled weight decay "
                "is multiplied by (got: decoupled_weight_decay=True)"
            )
        needs_lr = options["clip"] or options["lr_in_momentum"]
        return Adaptation(
            group=group,
            weight_decay=0.0 if is_decoupled else weight_decay_of(index, group),
            is_decoupled=is_decoupled,
            maximize=bool(group.get("maximize", False)),
            lr=learning_rate(self.optim, index, group) if needs_lr else None,
            **options,
        )

    def _options_of_unadapted(self, index: int, group: dict[str, Any]) -> dict[str, Any] | None:
        """Return the options of a group that opts out, but asks for its lr to be in the momentum all the same."""
        own = self._group_keys(group)
        if not own.get("lr_in_momentum", False):
            return None
        options = {"trust_coef": None, "eps": 0.0, "clip": False, "norm": "raw", "lr_in_momentum": True}
        options["apply_to"] = own.get("apply_to", "gradient")
        self.check_options(f" of parameter group {index}", options)
        return options


class LARC(LARS):
    r"""LARS under the name and with the defaults of NVIDIA's apex: ``LARS(optimizer, eps, trust_coef, clip=clip)``.

    With ``clip=True`` the trust ratio is min(*r* / γ, 1), so that no layer's learning rate *r* is above the group's γ;
    with ``clip=False`` this is plain LARS. Groups may hold all keys that they may hold under :class:`LARS`. For its
    other arguments ask for ``LARS(optimizer, 1e-8, 0.02, clip=True, ...)``.

    Args:
        optimizer: the base, any :class:`torch.optim.Optimizer`. Kept as ``.optim``.
        trust_coef: η > 0. ``trust_coefficient`` there.
        clip: whether no layer's learning rate is to be above the group's.
        eps: ε ≥ 0, in units of a gradient's norm.

    Raises:
        TypeError, ValueError: as :class:`LARS` does.

    Source: ``apex.parallel.LARC``. There a layer whose weights or gradient are all zero takes no weight decay, and the
    whole of γ where that is above 1; here its ratio is 1 before it is clipped.

    Example:
        >>> optimizer = LARC(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))
    """

    def __init__(self, optimizer: Optimizer, trust_coef: float = 0.02, clip: bool = True, eps: float = 1e-8) -> None:
        super().__init__(optimizer, eps, trust_coef, clip=clip)


@dataclass
class Adaptation:
    """How one step adapts the layers of one group; by default, not at all."""

    group: dict[str, Any]
    trust_coef: float | None = None  # None: no trust ratio, but lr in the momentum, or gradients to be unscaled
    eps: float = 0.0
    clip: bool = False
    norm: str = "raw"
    lr_in_momentum: bool = False
    apply_to: str = "gradient"
    weight_decay: float = 0.0  # the coupled one
    is_decoupled: bool = False  # whether the base's is not
    maximize: bool = False
    lr: float | Tensor | None = None  # None: nothing here needs it

    @property
    def is_of_gradients(self) -> bool:
        """Whether gradients are multiplied by trust ratios."""
        return self.trust_coef is not None and self.apply_to == "gradient"

    def for_kernels(self) -> dict[str, Any]:
        """Return what one pass needs to measure, decide and apply."""
        return {
            "trust_coef": self.trust_coef,
            "eps": self.eps,
            "decayed_norm": self.norm == "decayed",
            "clip": self.clip,
            "lr_in_momentum": self.lr_in_momentum,
            "lr": self.lr,
        }

    def kind(self) -> tuple[Any, ...]:
        """Return what all layers of a bucket have in common."""
        lr = self.lr if isinstance(self.lr, Tensor) else None
        adapts = self.trust_coef is not None
        return (self.maximize, self.norm, self.clip, self.lr_in_momentum, self.apply_to, adapts, lr)


class Step:
    """One step; to a base that takes trust ratios, its :class:`torchlars.optim.TrustRatios`."""

    def __init__(self, lars: LARS, closure: Callable[[], Any] | None) -> None:
        self._lars = lars
        self.closure = closure
        self.base_takes = bool(getattr(lars.optim, "takes_trust_ratios", False))
        self._hidden = lars._hidden
        self._grad_scale = self._scale_for_base = GradScale.of(lars)
        self._unscales = False
        self.reported: list[tuple[Sequence[Tensor], Tensor]] = []
        self._scaled_later: list[tuple[Sequence[Tensor], Tensor]] = []
        self._written: list[tuple[Sequence[Tensor], Tensor | None]] = []  # whose gradients were, and by what ratios
        self._params: Sequence[Sequence[Tensor]] = ()  # all that are adapted, by bucket
        self._versions = 0  # of these, before the base's step
        self._old_params: dict[Tensor, Tensor] = {}
        self._adaptations: dict[int, Adaptation] = {}

    def arguments(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the base's step is called with, given what the wrapper's was called with beside its closure."""
        if self.closure is not None:
            args = (self._evaluate, *args)
        elif args:  # they keep their places
            args = (None, *args)
        if self.base_takes:
            kwargs["trust_ratios"] = self
        return args, kwargs

    def _evaluate(self) -> Any:
        """Evaluate the closure, with the user's hyper-parameters in sight, and adapt the gradients that it leaves."""
        self.restore()
        with torch.enable_grad():
            loss = self.closure()  # type: ignore[misc]
        self.read_groups()
        self.adapt()
        self.hide()
        return loss

    def read_groups(self) -> None:
        """Read from the groups how they are adapted. Raise what can be told from them."""
        hows = {index: self._lars.adaptation(index) for index in range(len(self._lars.param_groups))}
        self._adaptations = {index: how for index, how in hows.items() if how is not None}
        self._lars.check_groups([index for index, how in self._adaptations.items() if how.trust_coef is not None])
        new_params = [param for param in self._to_be_updated() if param not in self._old_params]
        if len(new_params) > 0:
            self._old_params.update(copies(new_params))
        # What is written here is unscaled here, and then so is all the rest: the base has one scale for all groups.
        self._unscales = self._grad_scale.is_given and any(map(self._is_written, self._adaptations.values()))
        self._scale_for_base = self._grad_scale.once_unscaled() if self._unscales else self._grad_scale

    def _is_written(self, how: Adaptation) -> bool:
        """Tell whether gradients are written here."""
        return how.apply_to == "gradient" and not self._is_for_base(how)

    def _to_be_updated(self) -> Sequence[Tensor]:
        """Return all parameters whose updates may have to be scaled."""
        params: list[Tensor] = []
        for index, how in self._adaptations.items():
            if how.apply_to == "update":
                for position, param in enumerate(how.group["params"]):
                    if param.grad is not None or (self.closure is not None and param.requires_grad):
                        check_update(index, position, param)
                        params.append(param)
        return params

    def adapt(self) -> None:
        """Measure, complete, decide, apply; all but what the base does by itself."""
        self.reported.clear()
        self._scaled_later.clear()
        self._written.clear()
        written = [index for index, how in self._adaptations.items() if self._is_written(how)]
        lay_out_gradients(self._lars.param_groups, skipped=written)  # those are looked at as they are gathered
        if all(map(self._is_for_base, self._adaptations.values())):
            return
        with torch.no_grad():
            plain_layers, buckets = self._gather()
            # Not the buckets: while something else refers to gradients, the base takes longer to read .grad.
            self._params = [bucket.params for bucket in [*plain_layers.buckets, *buckets]]
            self._versions = plain_layers.versions + _versions(bucket.params for bucket in buckets)
            for plain_bucket in plain_layers.buckets:
                params = plain_bucket.params
                ratios = plain_bucket.adapt(self._grad_scale.inv_scale(params[0].device))
                self._written.append((params, ratios))
                self.report(params, ratios)
            _measure([bucket for bucket in buckets if bucket.is_measured_apart])
            for bucket in buckets:
                ratios = bucket.adapt()
                is_of_updates = bucket.how.apply_to == "update"
                if bucket.is_written:
                    self._written.append((bucket.params, None if is_of_updates else ratios))
                if ratios is not None:
                    self.report(bucket.params, ratios)
                    if is_of_updates:
                        self._scaled_later.append((bucket.params, ratios))

    def _gather(self) -> tuple[Any, Sequence[Bucket]]:
        """Return all layers to adapt, in buckets: the plain ones, and the others.

        What there is to raise is raised before anything changes.
        """
        plain_layers, buckets = self._gather_as_they_lie()
        replaced = False
        if not plain_layers.same_layout or buckets:
            replaced = lay_out_gradients(self._lars.param_groups)
        if plain_layers.shares_memory or any(bucket.is_written for bucket in buckets):
            written = [param for bucket in plain_layers.buckets for param in bucket.params]
            written += [param for bucket in buckets if bucket.is_written for param in bucket.params]
            params = (param for group in self._lars.param_groups for param in group["params"])
            replaced = own_gradients(written, params, self._lars.state) or replaced
        return self._gather_as_they_lie() if replaced else (plain_layers, buckets)

    def _gather_as_they_lie(self) -> tuple[Any, Sequence[Bucket]]:
        """Return all layers to adapt, in buckets, wherever their gradients lie in memory."""
        plain_layers = ops.plain_layers("LarsLayers")
        buckets: dict[Any, Bucket] = {}
        seen: set[Tensor] = set()  # a tied parameter is one layer, however often it is listed
        for index, group in enumerate(self._lars.param_groups):
            how = self._adaptations.get(index)
            if how is None or self._is_for_base(how):
                if not self._unscales:
                    continue
                how = Adaptation(group)  # only unscaled
            params = group["params"]
            positions: Iterable[int] = range(len(params))
            if how.is_of_gradients:
                positions = plain_layers.add(params, how.weight_decay, how.maximize, **how.for_kernels())
            for position in positions:
                param = params[position]
                if param.grad is None or param in seen:
                    continue
                seen.add(param)
                if index in self._adaptations:
                    check_layer(index, position, param, how.weight_decay, self._lars.optim)
                groups = sharding.process_groups(param)
                key = (param.device, param.dtype, param.grad.dtype, param.grad.is_sparse, groups, how.kind())
                if key not in buckets:
                    is_written = how.apply_to == "gradient" or self._unscales
                    buckets[key] = Bucket(how, groups, is_written, self._grad_scale.inv_scale(param.device))
                buckets[key].add(param, how)
        return plain_layers, list(buckets.values())

    def undo(self) -> None:
        """Put back what was hidden, and gradients if the base has not written any adapted parameter since."""
        self.restore()
        written, self._written = self._written, []
        if not written or torch.compiler.is_compiling() or _versions(self._params) != self._versions:
            return
        if any(is_capturing(params[0].device) for params, _ in written):  # into a CUDA graph: nothing has run yet
            return
        adapted = filter(self._is_written, self._adaptations.values())  # all others were only unscaled
        hows = {param: how for how in adapted for param in how.group["params"]}
        with torch.no_grad():
            for params, ratios in written:
                factors = [1.0] * len(params) if ratios is None else ratios.tolist()
                for param, factor in zip(params, factors, strict=True):
                    how = hows.get(param, Adaptation({}))
                    inv_scale = self._grad_scale.inv_scale(param.device)
                    undo_adaptation(
                        param,
                        factor * float(how.lr) if how.lr_in_momentum and how.lr is not None else factor,
                        -how.weight_decay if how.maximize else how.weight_decay,
                        1.0 if inv_scale is None else float(inv_scale),
                    )

    def hide(self) -> None:
        """Hide what the gradients hold already: weight decay, lr where it is in the momentum, and the loss's scale."""
        self._scale_for_base.hand_to(self._lars.optim)
        for how in self._adaptations.values():
            if how.apply_to == "update":
                continue
            if how.weight_decay != 0 and not self._is_for_base(how):
                self._hidden.hide(how.group, "weight_decay", 0.0)
            if how.lr_in_momentum:
                self._hidden.hide(how.group, "lr", 1.0)

    def restore(self) -> None:
        """Put back what was hidden."""
        self._hidden.restore()
        self._scale_for_base.take_from(self._lars.optim)

    def scale_updates(self) -> None:
        """Apply the trust ratios of gradients to updates."""
        if len(self._scaled_later) == 0:
            return
        with torch.no_grad():
            for params, ratios in self._scaled_later:
                old_params = [self._old_params[param] for param in params]
                scale_updates(params, old_params, ratios)

    # To a base that takes trust ratios.

    def _is_for_base(self, how: Adaptation) -> bool:
        """Tell whether the base multiplies by a group's ratios. It does so with its decay: not if that is decoupled."""
        return self.base_takes and how.is_of_gradients and not how.is_decoupled

    def options(self, index: int) -> dict[str, Any] | None:
        """Return how to measure a group, or None if its gradients are to be taken as they are."""
        how = self._adaptations.get(index)
        return how.for_kernels() if how is not None and self._is_for_base(how) else None

    def measure(self, index: int, params: Sequence[Tensor]) -> Tensor | None:
        """Return what the gradients of some parameters of a group are to be multiplied by, or None for nothing."""
        return self.measure_all([(index, params)])[0]

    def measure_all(self, layers: Iterable[tuple[int, Sequence[Tensor]]]) -> list[Tensor | None]:
        """Do so for parameters of several groups at once, whose shards are completed together."""
        with torch.no_grad():
            buckets = [self._bucket_for_base(index, params) for index, params in layers]
            _measure([bucket for bucket in buckets if bucket is not None and bucket.params])
            return [None if bucket is None else self._decide_for_base(bucket) for bucket in buckets]

    def _bucket_for_base(self, index: int, params: Sequence[Tensor]) -> Bucket | None:
        """Return layers that the base asks for, or None if it is to take their gradients as they are."""
        how = self._adaptations.get(index)
        if how is None or not self._is_for_base(how):
            return None
        positions = {param: position for position, param in enumerate(how.group["params"])}
        if not params:
            return Bucket(how)
        inv_scale = self._scale_for_base.inv_scale(params[0].device)
        bucket = Bucket(how, sharding.process_groups(params[0]), inv_scale=inv_scale)
        for param in params:
            position = positions.get(param)
            if position is None:
                raise ValueError(f"params must be of the group (group: {index}, got one of shape {tuple(param.shape)})")
            if param.grad is None:
                raise ValueError(f"params must have gradients (group: {index}, parameter: {position})")
            check_layer(index, position, param, how.weight_decay, self._lars.optim)
            if (param.device, param.dtype) != (params[0].device, params[0].dtype):
                raise ValueError(
                    f"params must be of one device and dtype (group: {index}, parameter: {position}, {param.dtype} on "
                    f"{param.device}, but {params[0].dtype} on {params[0].device} before)"
                )
            if sharding.process_groups(param) != bucket.process_groups:
                raise ValueError(
                    f"params must be sharded over the same ranks (group: {index}, parameter: {position}, "
                    f"shape: {tuple(param.shape)})"
                )
            bucket.add(param, how)
        return bucket

    def _decide_for_base(self, bucket: Bucket) -> Tensor:
        if not bucket.params:
            return torch.empty(0)
        how, ratios = bucket.how, bucket.decide()
        self.report(bucket.params, ratios)
        return ops.times_lr(ratios, how.lr) if how.lr_in_momentum and how.lr is not None else ratios

    def report(self, params: Sequence[Tensor], ratios: Tensor) -> None:
        """Take note of ratios that were applied."""
        self.reported.append((params, ratios))


class Bucket:
    """Layers that one call can adapt: of one device and one dtype, sharded and adapted in one way."""

    def __init__(
        self,
        how: Adaptation,
        process_groups: Sequence[Any] = (),
        is_written: bool = False,
        inv_scale: Tensor | None = None,
    ) -> None:
        self.how = how  # but for the numbers, which each layer has of its own
        self.process_groups = process_groups
        self.is_written = is_written  # gradients are, if only to be unscaled
        self.inv_scale = inv_scale
        self.is_sparse = False
        self.params: list[Tensor] = []
        self.local_params: list[Tensor] = []  # what is here of each
        self.grads: list[Tensor] = []  # likewise
        self.squared_norms: Tensor | None = None  # of all parameters, then of all gradients; if measured
        self.weight_decays: list[float] = []
        self.trust_coefs: list[float] = []
        self.eps: list[float] = []
        self.lrs: list[float] = []

    @property
    def is_swept_at_once(self) -> bool:
        """Whether one op measures, decides and applies.

        Not where other ranks hold shards; nor can the values of a sparse gradient be swept beside a parameter that has
        more of them.
        """
        return self.how.is_of_gradients and not self.is_sparse and not self.process_groups

    @property
    def is_measured_apart(self) -> bool:
        """Whether norms are measured, and completed, before the gradients are swept."""
        return self.how.trust_coef is not None and not self.is_swept_at_once

    def add(self, param: Tensor, how: Adaptation) -> None:
        """Add one layer."""
        assert param.grad is not None
        self.is_sparse = param.grad.is_sparse
        self.params.append(param)
        self.local_params.append(sharding.local(param))
        self.grads.append(writable_gradient(param) if self.is_written else readable_gradient(param))
        self.weight_decays.append(how.weight_decay)
        if how.trust_coef is not None:
            self.trust_coefs.append(how.trust_coef)
        self.eps.append(how.eps)
        if how.lr is not None:
            self.lrs.append(1.0 if isinstance(how.lr, Tensor) else how.lr)

    def _lr_scale(self) -> Tensor | None:
        return ops.lr_scale(self.how.lr, self.params[0].device) if isinstance(self.how.lr, Tensor) else None

    def measure(self) -> Tensor:
        """Measure what is here."""
        if self.how.norm == "decayed":
            scales = [-weight_decay if self.how.maximize else weight_decay for weight_decay in self.weight_decays]
            grad_squared_norms = ops.squared_norms_of_sums(self.grads, self.local_params, scales, self.inv_scale)
        else:
            grad_squared_norms = ops.squared_norms(self.grads, self.inv_scale)
        self.squared_norms = torch.cat([ops.squared_norms(self.local_params), grad_squared_norms])
        return self.squared_norms

    def decide(self) -> Tensor:
        """Decide, once squared norms are complete."""
        assert self.squared_norms is not None
        param_squared_norms, grad_squared_norms = self.squared_norms.chunk(2)
        is_decay_in_norm = self.how.norm == "decayed"
        return ops.trust_ratios(
            param_squared_norms,
            grad_squared_norms,
            [0.0] * len(self.params) if is_decay_in_norm else self.weight_decays,
            self.trust_coefs,
            self.eps,
            ops.compute_dtype(self.grads[0].dtype, self.params[0].dtype),
            self.lrs,
            self._lr_scale(),
            self.how.clip,
        )

    def adapt(self) -> Tensor | None:
        """Scale the gradients, unless it is updates that are scaled. Return the trust ratios, if there are any."""
        how = self.how
        if self.is_swept_at_once:
            return ops.scale_by_trust_ratios_(
                self.grads,
                self.local_params,
                self.weight_decays,
                self.trust_coefs,
                self.eps,
                how.maximize,
                self.lrs,
                self._lr_scale(),
                how.norm == "decayed",
                how.clip,
                how.lr_in_momentum,
                self.inv_scale,
            )
        ratios = None if how.trust_coef is None else self.decide()
        if self.is_written:
            is_of_updates = how.apply_to == "update"
            ops.apply_trust_ratios_(
                self.grads,
                self.local_params,
                self._ones() if ratios is None or is_of_updates else ratios,
                [0.0] * len(self.grads) if is_of_updates else self.weight_decays,
                how.maximize,
                self.lrs if how.lr_in_momentum else [],
                self._lr_scale(),
                self.inv_scale,
            )
        return ratios

    def _ones(self) -> Tensor:
        dtype = ops.compute_dtype(self.grads[0].dtype, self.params[0].dtype)
        return torch.ones(len(self.grads), dtype=dtype, device=self.grads[0].device)


def _versions(params: Iterable[Sequence[Tensor]]) -> int:
    """Return how often the parameters of some buckets were written in place, all together."""
    if torch.compiler.is_compiling():
        return 0
    flat = (param for of_bucket in params for param in of_bucket)
    return sum(param._version for param in flat if not param.is_inference())  # these do not count


def _measure(buckets: Sequence[Bucket]) -> None:
    """Measure and complete."""
    sharding.complete([(bucket.process_groups, bucket.measure()) for bucket in buckets])
