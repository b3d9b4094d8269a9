"""The step of LARS, LARC and LAMB: gather, measure, complete, decide, apply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from torchlars import amp, ops, sharding
from torchlars.amp import GradScale
from torchlars.bases import bases, check_line_search, decouples, step_of_base
from torchlars.bucket import Adaptation, Bucket, Plan, measure, needs_lr
from torchlars.layers import (
    check_layer,
    check_update,
    copies,
    lay_out_gradients,
    own_gradients,
    readable_gradient,
    undo_adaptation,
    writable_gradient,
)
from torchlars.optim.fused import FusedOptimizer
from torchlars.options import Group, GroupReader, is_capturing, learning_rate, warn_of_caller, weight_decay_of
from torchlars.wrapper import OptimizerWrapper
from torchlars.zero_layers import ZeroLayers, large_lr_of_unadapted

__all__: list[str] = []

#: The attributes by which a base declares that it multiplies by trust ratios itself: of gradients, of updates.
_TAKES_RATIOS_OF = {"gradient": "takes_trust_ratios", "update": "takes_ratios_of_updates"}


class TrustRatioWrapper(OptimizerWrapper):
    """A wrapper that multiplies gradients or updates by trust ratios. Subclasses say which, and add options."""

    #: Whose norm is in the ratio: ``"gradient"`` or ``"update"``. A subclass of the latter scales updates.
    ratio_of: ClassVar[str]

    _zero_layers: ZeroLayers | None  # None after the first step

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_zero_layers", None)
        self._reader = GroupReader(needs_lr)
        self._plan: Plan | None = None
        self._last_step: list[tuple[Sequence[Tensor], Tensor]] = []  # changed in place, which torch 2.11 can trace
        if "optim" not in state:
            return
        self._warns_of_large_lr = True
        # Plain tensors that the user passed as parameters. The references are strong, since torch.utils.swap_tensors
        # refuses tensors that have weak ones.
        self._given: set[Tensor] = set()
        self._shapes: dict[int, list[torch.Size | None]] = {}  # of the layers that were given, by group
        for index in range(len(self.param_groups)):
            self._note_layers(index)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group to the base. It may hold any of the wrapper's options as keys."""
        super().add_param_group(param_group)
        self._note_layers(len(self.param_groups) - 1)

    def _note_layers(self, index: int) -> None:
        params = self.param_groups[index]["params"]
        self._given.update(params[position] for _, position in ops.positions_of_non_parameters([params]))
        self._shapes[index] = [None if is_lazy(param) else param.shape for param in params]

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Take the base's step, with gradients or updates multiplied by their layers' trust ratios.

        Args:
            closure: evaluates the model anew and returns the loss. It is called as often as the base asks, with
                gradients enabled and the user's hyper-parameters in place, and may change the groups. The gradients
                that it leaves are adapted each time.
            *args: passed on to the base.
            **kwargs: passed on to the base.

        Returns:
            What the base returns: the closure's loss, if any.

        Raises:
            TypeError, ValueError, RuntimeError: a group, parameter or gradient cannot be adapted; the message names it.
                Nothing has changed then.

        Whatever raises, hyper-parameters are restored. If the base raises before it has written to any adapted
        parameter, by their version counters, gradients are restored, too: up to a rounding error of the larger one of g
        and λw, and but for elements that had become 0 or were not finite, and layers whose ratio has no finite inverse
        in their dtype. A base's step that was partially completed is not rolled back.
        """
        # Dynamo skips a frame that does not name torch, and compiles what it calls one by one.
        this = Step(self, closure, torch.compiler.is_compiling())
        try:
            self._hidden.restore_after_interrupt()
            this.read_groups()
            args, kwargs = this.arguments(*args, **kwargs)
            if closure is None:
                this.adapt()
            this.hide()
            try:
                loss = step_of_base(self.optim)(*args, **kwargs)
            finally:
                self._hidden.restore()
            this.scale_updates()
        except BaseException:
            amp.drop_scale(self)
            this.undo()
            raise
        self._last_step[:] = this.reported
        return loss

    def base_takes_ratios(self) -> bool:
        """Tell whether the base multiplies by trust ratios of this kind itself."""
        return bool(getattr(self.optim, _TAKES_RATIOS_OF[self.ratio_of], False))

    def plan(self, base_takes: bool) -> Plan:
        """Return what a step derives from the options of the groups now."""
        of_groups = self._reader.read(self.param_groups, self._adaptation, self._context)
        plan = self._plan
        if plan is None or plan.of_groups is not of_groups or plan.base_takes != base_takes:
            self._plan = plan = Plan(of_groups, base_takes)
        return plan

    def _context(self) -> list[Any]:
        """Return every value outside of the groups that adaptations depend on."""
        context = list(map(getattr, repeat(self), self.options))
        for base in bases(self.optim):
            context += [base, getattr(base, "takes_trust_ratios", None), *base.defaults, *base.defaults.values()]
        return context

    def check_group(self, index: int, group: Group) -> None:
        """Raise if an option that the ``index``-th group holds is wrong, or does not go together with the others."""
        self._adaptation(index, {**self.defaults, **group})

    def _adaptation(self, index: int, group: Group) -> Adaptation | None:
        """Read a group, whose keys come before the wrapper's own values, unless the base has a key of that name."""
        name = f"of parameter group {index}"
        if group.get("differentiable", self.defaults.get("differentiable", False)):
            raise ValueError(
                f"differentiable must be False (group: {index}, got: True); {type(self).__name__} writes in place, "
                "which cannot be differentiated through"
            )
        own = self._group_keys(group)
        is_left = own.get("trust_coef", 0) is None  # to the base
        for key, value in own.items():
            if not (is_left and key == "trust_coef"):
                own[key] = self.options[key](f"{key} {name}", value)
        if not is_left:
            options = {
                key: own[key] if key in own else check(key, getattr(self, key)) for key, check in self.options.items()
            }
        elif own.get("lr_in_momentum", False):
            options = {key: self.options[key](key, getattr(self, key)) for key in self.wrapper_only}
            options |= {"trust_coef": None, "lr_in_momentum": True, "apply_to": own.get("apply_to", "gradient")}
        else:
            return None
        self.check_options(f" {name}", options)
        if not options.pop("always_adapt", True) and weight_decay_of(index, group) == 0:
            options["trust_coef"] = None
            if not options.get("lr_in_momentum", False):
                return None
        is_decoupled = options.pop("weight_decay", None) == "decoupled"
        weight_decay, lr = 0.0, None
        if self.ratio_of == "update":
            options["apply_to"] = "update"
        else:
            check_line_search(self.optim, index, group)
            is_decoupled = is_decoupled or bool(decouples(self.optim, group))
            if not is_decoupled:
                weight_decay = weight_decay_of(index, group)
            elif options["lr_in_momentum"] and group.get("weight_decay", 0) != 0:
                raise ValueError(
                    f"lr_in_momentum=True {name} hides lr from the base, which decoupled weight decay is multiplied by "
                    "(got: decoupled_weight_decay=True)"
                )
        if self.ratio_of == "update" or options.get("clip", False) or options["lr_in_momentum"]:
            if "lr" not in group and "lr" not in self.defaults:
                raise TypeError(
                    f"optimizer must have a learning rate (got: {type(self.optim).__name__}, without lr in parameter "
                    f"group {index})"
                )
            lr = learning_rate(f"lr {name}", group.get("lr", self.defaults.get("lr")))
        has_flag = "decoupled_weight_decay" in self.optim.defaults
        maximize = self.ratio_of == "gradient" and bool(group.get("maximize", False))
        return Adaptation(
            group,
            ratio_of=self.ratio_of,
            weight_decay=weight_decay,
            is_decoupled=is_decoupled,
            base_decouples=has_flag and bool(group.get("decoupled_weight_decay", False)),
            maximize=maximize,
            lr=lr,
            **options,
        )

    def check_layers(self, adapted: Sequence[int]) -> None:
        """Raise if a group that is adapted holds what may be a flat partition of several layers."""
        groups = self.param_groups
        lists = [groups[index]["params"] for index in adapted]
        for i, position in ops.positions_of_non_parameters(lists):
            if not self._is_whole(adapted[i], position, lists[i]) and lists[i][position].grad is not None:
                raise RuntimeError(
                    f"{sharding.FLAT_PARTITION} (group: {adapted[i]}, parameter: {position}, "
                    f"shape: {tuple(lists[i][position].shape)})"
                )

    def _is_whole(self, index: int, position: int, params: Sequence[Tensor]) -> bool:
        """Tell whether a tensor in a group can be taken for a whole layer.

        It can if it is a parameter or a DTensor, if the user passed it, or if it is in the place of a layer of its
        shape, as master copies of a layer in float32 are.
        """
        param = params[position]
        if sharding.is_distributed(param) or isinstance(param, torch.nn.Parameter) or param in self._given:
            return True
        shapes = self._shapes.get(index, [])
        return len(shapes) == len(params) and shapes[position] == param.shape

    def warn_of_large_lr(self, adapted: Sequence[int]) -> None:
        """Warn, once, if a group that is not adapted has an lr that is meant for trust ratios."""
        some_are_left = len(adapted) < len(self.param_groups)
        if some_are_left and self._warns_of_large_lr and not torch.compiler.is_compiling():
            found = large_lr_of_unadapted(self.optim, adapted)
            if found is not None:
                self._warns_of_large_lr = False
                warn_of_caller(found)

    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """Return the trust ratio of every layer that the last step adapted, by parameter.

        Each is a 0-dimensional tensor on its parameter's device; only reading its value waits for that device. Layers
        without a gradient and groups that are not adapted have none. Of a sharded layer it is that of the whole
        one, the same on every rank. The ratios of a step that a scaler skipped, and of one in a CUDA graph before its
        replay, are undefined.
        """
        return {
            param: ratio
            for params, ratios in self._last_step
            for param, ratio in zip(params, ratios.unbind(), strict=True)
        }

    def named_trust_ratios(
        self, named_parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """Return :meth:`trust_ratios` by name, in the order of the names.

        Args:
            named_parameters: names and parameters, such as ``model.named_parameters()``; those without a trust ratio
                are left out, and so are trust ratios without a name. If None, the names are those that the base was
                constructed with, as in ``SGD(model.named_parameters(), ...)``.

        Raises:
            TypeError: ``named_parameters`` are no names and parameters.
            ValueError: the groups hold no names, two parameters have the same one, or none of the given ones is in the
                groups.
        """
        if named_parameters is None:
            named_parameters = _named_parameters(self.param_groups)
        names = _checked_names(named_parameters)
        params = {param for group in self.param_groups for param in group["params"]}
        if params.isdisjoint(names.values()):
            raise ValueError(
                f"named_parameters must be those of the model that this optimizer steps (got: {len(names)}, of which "
                f"none is among the {len(params)} in its groups)"
            )
        ratios = self.trust_ratios()
        return {name: ratios[param] for name, param in names.items() if param in ratios}


def _named_parameters(groups: Iterable[Group]) -> Iterable[tuple[str, Tensor]]:
    """Yield the names and parameters of a base that was constructed with both."""
    for index, group in enumerate(groups):
        if "param_names" not in group:
            raise ValueError(
                f"parameter groups must hold the names of their parameters (got: no param_names in group {index}); "
                "pass model.named_parameters(), or construct the base with it: SGD(model.named_parameters(), ...)"
            )
        yield from zip(group["param_names"], group["params"], strict=True)


def _checked_names(named_parameters: Any) -> dict[str, Tensor]:
    """Return parameters by name, or raise."""
    names: dict[str, Tensor] = {}
    pairs = named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters
    for pair in pairs if isinstance(pairs, Iterable) else [pairs]:
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            raise TypeError(
                "named_parameters must be names and parameters, such as model.named_parameters() (got: "
                f"{type(named_parameters).__name__} with {type(pair).__name__})"
            )
        name, param = pair
        if names.setdefault(name, param) is not param:
            raise ValueError(f"named_parameters must have one name each (got: {name!r} twice); prefix them by model")
    return names


class Step:
    """One step. Implements :class:`torchlars.optim.TrustRatios` for bases that take trust ratios."""

    def __init__(self, wrapper: TrustRatioWrapper, closure: Callable[[], Any] | None, is_compiling: bool) -> None:
        self._wrapper = wrapper
        self._is_compiling = is_compiling
        self._hidden = wrapper._hidden
        self._closure = closure
        self._base_takes = wrapper.base_takes_ratios()  # once a step, whatever its closure changes
        self._grad_scale = self._scale_for_base = GradScale.of(wrapper)
        self._unscales = False
        self._plan: Plan  # once groups have been read
        self._written: list[tuple[Sequence[Tensor], Tensor | None]] = []  # with the ratios of gradients
        self._params: Sequence[Sequence[Tensor]] = ()  # all that are adapted, by bucket
        self._versions = 0  # of these, before the base's step
        self._fast_updates: Sequence[Any] = ()  # buckets of layers whose updates are scaled on the fast path
        self._updated: dict[Tensor, Adaptation] = {}  # all others whose updates are scaled
        self._old_params: dict[Tensor, Tensor] = {}  # these, before the base's step
        self._scaled_later: list[Bucket] = []  # updates, by ratios of gradients
        self.reported: list[tuple[Sequence[Tensor], Tensor]] = []

    def arguments(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the base's step, given those of the wrapper's step except its closure."""
        if self._closure is not None:
            args = (self._evaluate, *args)
        elif args:  # they keep their places
            args = (None, *args)
        if self._base_takes:
            kwargs["trust_ratios"] = self
        return args, kwargs

    def _evaluate(self) -> Any:
        """Evaluate the closure, with the user's hyper-parameters in place, and adapt the gradients that it leaves."""
        self._hidden.restore()
        with torch.enable_grad():
            loss = self._closure()  # type: ignore[misc]
        self.reported.clear()
        self._scaled_later.clear()
        self._written.clear()
        self.read_groups()
        self.adapt()
        # By the gradients of now, which the base may drop as it steps.
        self._updated = {param: how for param, how in self._updated.items() if param.grad is not None}
        self.hide()
        return loss

    def read_groups(self) -> None:
        """Read how groups are adapted, and copy the parameters whose updates are scaled."""
        wrapper = self._wrapper
        self._plan = plan = wrapper.plan(self._base_takes)
        wrapper.check_layers(plan.adapted)
        wrapper.warn_of_large_lr(plan.adapted)
        self._updated = {}
        if plan.updated:
            self._copy_params()
        # If gradients are unscaled here, all are: the base has one scale for all groups.
        self._unscales = self._grad_scale.is_given and len(plan.written) > 0
        self._scale_for_base = self._grad_scale.once_unscaled() if self._unscales else self._grad_scale

    def _copy_params(self) -> None:
        """Copy all parameters whose updates may have to be scaled here, and their lr.

        The closure may give gradients to more.
        """
        self._fast_updates, left = self._gather_fast_updates()
        hows = {index: self._plan.adaptations[index] for index, _ in left}
        lrs = {how.lr: how.lr.detach().clone() for how in hows.values() if isinstance(how.lr, Tensor)}
        for index, how in hows.items():  # the base's step may change lr in place
            hows[index] = replace(how, lr=lrs[how.lr]) if isinstance(how.lr, Tensor) else how
        for index, position in left:
            how = hows[index]
            param = how.group["params"][position]
            if param.grad is not None or (self._closure is not None and param.requires_grad):
                check_update(index, position, param)
                self._updated.setdefault(param, how)
        for bucket in self._fast_updates:
            bucket.copy_params()
        if self._updated:
            self._old_params.update(copies(param for param in self._updated if param not in self._old_params))

    def _gather_fast_updates(self) -> tuple[Sequence[Any], list[tuple[int, int]]]:
        """Return the buckets of layers whose updates the fast path scales, and the group and position of all others."""
        plan, groups = self._plan, self._wrapper.param_groups
        if self._closure is None and self._wrapper.ratio_of == "update":
            fast_layers = ops.fast_layers("LarsLayers")
            left = [(plan.fast[i], position) for i, position in fast_layers.add(plan.fast_groups())]
            if not fast_layers.params_share_memory:
                return fast_layers.buckets, left
            params = [param for bucket in fast_layers.buckets for param in bucket.params]
            params += [sharding.local(groups[index]["params"][position]) for index, position in left]
            if len(ops.overlapping(params)) == 0:  # else they are scaled one after the other
                return fast_layers.buckets, left
        return (), [(index, position) for index in plan.updated for position in range(len(groups[index]["params"]))]

    def adapt(self) -> None:
        """Adapt the gradients of all layers, except those that the base adapts itself."""
        self._warn_of_zero_layers()
        plan = self._plan
        self._lay_out_gradients(skipped=plan.written)  # those are looked at as they are gathered
        if self._wrapper.ratio_of == "update" or len(plan.for_base) == len(plan.adaptations):
            return
        fast_layers, buckets = self._gather()
        # Not the buckets: while something else refers to gradients, the base takes longer to read .grad.
        self._params = [bucket.params for bucket in [*fast_layers.buckets, *buckets]]
        self._versions = fast_layers.versions + (_versions(bucket.params for bucket in buckets) if buckets else 0)
        for fast_bucket in fast_layers.buckets:
            params = fast_bucket.params
            ratios = fast_bucket.adapt(self._grad_scale.inv_scale(params[0].device))
            self._written.append((params, ratios))
            self.report(params, ratios)
        if len(buckets) > 0:
            self._adapt_others(buckets)

    def _adapt_others(self, buckets: Sequence[Bucket]) -> None:
        """Adapt the gradients of layers that do not take the fast path."""
        with torch.no_grad():
            measure([bucket for bucket in buckets if len(bucket.trust_coefs) > 0 and not bucket.takes_one_pass])
            for bucket in buckets:
                bucket.scale_gradients()
                scales_updates = bucket.adaptation.apply_to == "update"
                if bucket.is_written:
                    self._written.append((bucket.params, None if scales_updates else bucket.ratios))
                if bucket.ratios is not None:
                    self.report(bucket.params, bucket.ratios)
                    if scales_updates:
                        bucket.grads.clear()
                        self._scaled_later.append(bucket)

    def _warn_of_zero_layers(self) -> None:
        zero_layers = self._wrapper._zero_layers
        if zero_layers is not None and not self._is_compiling:
            self._wrapper._zero_layers = None
            zero_layers.warn(self._wrapper.optim, self._plan.adaptations)

    def _gather(self) -> tuple[Any, Sequence[Bucket]]:
        """Return all layers to adapt, in buckets: those of the fast path, and the others.

        What there is to raise is raised before anything changes.
        """
        fast_layers, buckets = self._gather_as_they_lie()
        replaced = False
        if not fast_layers.same_layout or buckets:
            replaced = self._lay_out_gradients()
        if fast_layers.shares_memory or any(bucket.is_written for bucket in buckets):
            written = [param for bucket in fast_layers.buckets for param in bucket.params]
            written += [param for bucket in buckets if bucket.is_written for param in bucket.params]
            params = (param for group in self._wrapper.param_groups for param in group["params"])
            replaced = own_gradients(written, params, self._wrapper.state) or replaced
        return self._gather_as_they_lie() if replaced else (fast_layers, buckets)

    def _lay_out_gradients(self, skipped: Collection[int] = ()) -> bool:
        """Lay out gradients as torch's fused optimizers need them. Return whether any was replaced."""
        # Ours are none of these, though their groups may hold the key of these from a state dict.
        is_ours = isinstance(self._wrapper.optim, FusedOptimizer)
        return not is_ours and lay_out_gradients(self._wrapper.param_groups, skipped)

    def _gather_as_they_lie(self) -> tuple[Any, Sequence[Bucket]]:
        """Return all layers to adapt, in buckets, with gradients of any memory layout."""
        fast_layers = ops.fast_layers("LarsLayers")
        others = self._add_to(fast_layers)
        return fast_layers, self._buckets_of(others) if len(others) > 0 else []

    def _buckets_of(self, layers: Iterable[tuple[int, int, Adaptation]]) -> list[Bucket]:
        """Return layers that do not take the fast path, in buckets."""
        buckets: dict[Any, Bucket] = {}
        seen: set[Tensor] = set()  # a tied parameter is one layer, however often it is listed
        with torch.no_grad():
            for index, position, how in layers:
                param = self._wrapper.param_groups[index]["params"][position]
                if param.grad is None or param in seen:
                    continue
                seen.add(param)
                if index in self._plan.adaptations:
                    check_layer(index, position, param, how.weight_decay, self._wrapper.optim)
                groups = sharding.process_groups(param)
                key = (param.device, param.dtype, param.grad.dtype, param.grad.is_sparse, groups, how.kind)
                if key not in buckets:
                    is_written = how.apply_to == "gradient" or self._unscales
                    inv_scale = self._grad_scale.inv_scale(param.device)
                    is_sparse = param.grad.is_sparse
                    buckets[key] = Bucket(how, groups, inv_scale, is_written=is_written, is_sparse=is_sparse)
                bucket = buckets[key]
                bucket.add(param, how, writable_gradient(param) if bucket.is_written else readable_gradient(param))
        return list(buckets.values())

    def _add_to(self, fast_layers: Any) -> list[tuple[int, int, Adaptation]]:
        """Add layers to the fast path. Return the others: group, position and options, in the order of the groups."""
        plan = self._plan
        left: dict[int, list[int]] = {}
        for i, position in fast_layers.add(plan.fast_groups()):
            left.setdefault(plan.fast[i], []).append(position)
        layers: list[tuple[int, int, Adaptation]] = []
        if len(left) == 0 and plan.is_all_fast and not self._unscales:
            return layers
        for index, group in enumerate(self._wrapper.param_groups):
            how = plan.adaptations.get(index)
            positions: Iterable[int] = range(len(group["params"]))
            if how is None or index in plan.for_base:
                if not self._unscales:
                    continue
                how = Adaptation(group)  # only unscaled
            elif how.multiplies_gradients:
                positions = left.get(index, [])
            layers += [(index, position, how) for position in positions]
        return layers

    def hide(self) -> None:
        """Hide from the base what gradients hold already: weight decay, lr in the momentum, and the loss's scale."""
        if self._scale_for_base.is_given:
            attributes = vars(self._wrapper.optim)
            scale = self._scale_for_base.attributes()
            self._hidden.replace((attributes, name, value) for name, value in scale.items())
        self._hidden.replace(self._plan.hidden)

    def scale_updates(self) -> None:
        """Multiply updates by trust ratios. Where these are of updates, measure, complete and decide them first."""
        for bucket in self._fast_updates:
            self.report(bucket.params, bucket.scale_updates())
        if len(self._updated) == 0:
            return
        with torch.no_grad():
            of_updates = self._gather_updates()
            measure([bucket for bucket in of_updates if bucket.process_groups])
            for bucket in [*self._scaled_later, *of_updates]:
                bucket.old_params = [self._old_params[param] for param in bucket.params]
                bucket.scale_updates()
            self.reported += [(bucket.params, bucket.ratios) for bucket in of_updates]  # type: ignore[misc]

    def _gather_updates(self) -> list[Bucket]:
        """Return the layers that ratios of updates are decided for, in buckets."""
        buckets: dict[Any, Bucket] = {}
        for param, how in self._updated.items():
            if how.ratio_of == "update":
                groups = sharding.process_groups(param)
                key = (param.device, param.dtype, groups, how.kind)
                if key not in buckets:
                    buckets[key] = Bucket(how, groups)
                buckets[key].add(param, how)
                buckets[key].old_params.append(self._old_params[param])
        return list(buckets.values())

    def undo(self) -> None:
        """Put back what was hidden, and gradients if the base has not written any adapted parameter since."""
        self._hidden.restore()
        written, self._written = self._written, []
        if not written or self._is_compiling or _versions(self._params) != self._versions:
            return
        if any(is_capturing(params[0].device) for params, _ in written):  # into a CUDA graph: nothing has run yet
            return
        # All others were only unscaled. A tied layer is adapted as the first group that lists it says.
        adapted = [how for index, how in self._plan.adaptations.items() if index in self._plan.written]
        hows = {param: how for how in reversed(adapted) for param in how.group["params"]}
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

    # The protocol of torchlars.optim.TrustRatios.

    def options(self, index: int) -> Mapping[str, Any] | None:
        """Return how to measure the gradients of a group, or None if they are to be taken as they are."""
        how = self._adaptation_for_base(index, "gradient")
        return None if how is None else how.options_for_base()

    def update_options(self, index: int) -> Mapping[str, Any] | None:
        """Return how to measure the updates of a group, or None if they are to be taken as they are."""
        how = self._adaptation_for_base(index, "update")
        return None if how is None else how.options_for_base()

    def measure(self, index: int, params: Sequence[Tensor]) -> Tensor | None:
        """Return what the gradients of some parameters of a group are to be multiplied by, or None for nothing."""
        return self.measure_all([(index, params)])[0]

    def measure_all(self, layers: Iterable[tuple[int, Sequence[Tensor]]]) -> list[Tensor | None]:
        """Return the same for parameters of several groups, whose shards are completed together."""
        with torch.no_grad():
            buckets = [self._bucket_for_base("gradient", index, params) for index, params in layers]
            return self._decide_for_base(buckets)

    def measure_updates(self, layers: Iterable[tuple[int, Sequence[Tensor], Sequence[Tensor]]]) -> list[Tensor | None]:
        """Return what the updates of some parameters of groups are to be multiplied by, or None for nothing."""
        with torch.no_grad():
            buckets = [self._bucket_for_base("update", *of_group) for of_group in layers]
            return self._decide_for_base(buckets)

    def decide_updates(self, layers: Iterable[tuple[int, Sequence[Tensor], Tensor]]) -> list[Tensor | None]:
        """Return the same, given squared norms of what is here of parameters and updates."""
        with torch.no_grad():
            buckets = []
            for index, params, squared_norms in layers:
                bucket = self._bucket_for_base("update", index, params)
                if bucket is not None:
                    bucket.squared_norms = squared_norms
                buckets.append(bucket)
            return self._decide_for_base(buckets)

    def report(self, params: Sequence[Tensor], ratios: Tensor) -> None:
        """Take note of ratios that were applied."""
        self.reported.append((params, ratios))

    def _adaptation_for_base(self, index: int, ratio_of: str) -> Adaptation | None:
        how = self._plan.adaptations.get(index)
        return how if how is not None and how.ratio_of == ratio_of and index in self._plan.for_base else None

    def _bucket_for_base(
        self, ratio_of: str, index: int, params: Sequence[Tensor], updates: Sequence[Tensor] | None = None
    ) -> Bucket | None:
        """Return layers that the base asks for, or None if it is to take their gradients or updates as they are."""
        how = self._adaptation_for_base(index, ratio_of)
        if how is None:
            return None
        if ratio_of == "update":
            how = replace(how, lr=1.0)  # which the base has not multiplied by yet
            if updates is not None and len(updates) != len(params):
                raise ValueError(
                    f"updates must be one for each of params (group: {index}, params: {len(params)}, "
                    f"updates: {len(updates)})"
                )
        if len(params) == 0:
            return Bucket(how)
        positions = {param: position for position, param in enumerate(how.group["params"])}
        inv_scale = None if ratio_of == "update" else self._scale_for_base.inv_scale(params[0].device)
        bucket = Bucket(how, sharding.process_groups(params[0]), inv_scale)
        for i, param in enumerate(params):
            position = positions.get(param)
            if position is None:
                raise ValueError(f"params must be of the group (group: {index}, got one of shape {tuple(param.shape)})")
            if param.grad is None:
                raise ValueError(f"params must have gradients (group: {index}, parameter: {position})")
            if ratio_of == "gradient":
                check_layer(index, position, param, how.weight_decay, self._wrapper.optim)
            else:
                check_update(index, position, param)
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
            if ratio_of == "gradient":
                bucket.add(param, how, readable_gradient(param))
            elif updates is None:
                bucket.add(param, how)
            else:
                if updates[i].shape != param.shape:
                    raise ValueError(
                        f"updates must have their parameter's shape (group: {index}, parameter: {position}, "
                        f"shape: {tuple(param.shape)}, update: {tuple(updates[i].shape)})"
                    )
                if (updates[i].device, updates[i].dtype) != (param.device, updates[0].dtype):
                    raise ValueError(
                        f"updates must be on their parameter's device and of one dtype (group: {index}, parameter: "
                        f"{position}, {updates[i].dtype} on {updates[i].device})"
                    )
                bucket.add(param, how, sharding.local(sharding.placed_like(param, updates[i])))
        return bucket

    def _decide_for_base(self, buckets: Sequence[Bucket | None]) -> list[Tensor | None]:
        """Measure, complete and decide; what the base multiplies by, for each bucket."""
        measure([bucket for bucket in buckets if bucket is not None and bucket.params])
        factors: list[Tensor | None] = []
        for bucket in buckets:
            if bucket is None:
                factors.append(None)
            elif len(bucket.params) == 0:
                factors.append(torch.empty(0))
            else:
                how, ratios = bucket.adaptation, bucket.decide()
                self.report(bucket.params, ratios)
                in_momentum = how.lr_in_momentum and how.lr is not None
                factors.append(ops.times_lr(ratios, how.lr) if in_momentum else ratios)  # type: ignore[arg-type]
        return factors


def _versions(params: Iterable[Sequence[Tensor]]) -> int:
    """Return how often the parameters of some buckets were written in place, all together."""
    if torch.compiler.is_compiling():
        return 0
    flat = (param for of_bucket in params for param in of_bucket)
    return sum(param._version for param in flat if not param.is_inference())  # these do not count
