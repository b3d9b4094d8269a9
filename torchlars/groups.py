"""Layers kept out of adaptation on purpose, and a word to whoever forgot them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torchlars import ops
from torchlars.wrapper import Group, bases, is_capturing, non_negative_number

if TYPE_CHECKING:
    from torchlars.wrapper import OptimizerWrapper

__all__ = ["param_groups"]

SGD_SIZED_LR = 0.05
NORMALISATIONS = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", "torch.nn.modules.normalization")


def param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor,
    weight_decay: float,
    bias_lr: float | Tensor | None = None,
    exclude: Iterable[str] = (),
) -> list[Group]:
    """Return a model's parameters in two groups: weights, and biases and normalisation layers.

    The first, ``{"params": [...], "lr": lr, "weight_decay": weight_decay}``, is adapted and decayed. The second,
    ``{"params": [...], "lr": bias_lr, "weight_decay": 0.0, "trust_coef": None}``, is left to the base optimizer, with
    an lr of its own. To it belongs every parameter

    - with at most one dimension,
    - of a batch, instance, layer, group or RMS norm of torch or of a class derived from one, whatever its dimensions,
    - whose name matches a pattern of ``exclude``.

    A parameter that several modules share comes once, and belongs to the second group if any of its owners or names
    says so. Frozen parameters are there as well, so that they can be thawed. A group without parameters is left out.
    Norms of your own whose weights have more dimensions, and magnitudes of a weight norm, are found by name only.

    **Why the second lr matters.** Under LARS, lr is of another size than the base's own: trust ratios of a thousandth
    or so stand before it. Biases that are left to the base at that lr, or that start at 0 and so have the trust ratio
    1, take a step a hundred times too long, and training collapses. A scheduler that multiplies keeps the two lrs in
    proportion. One that sets lrs gives the weights' lr to all groups, unless it is told one for each, in their order:
    ``OneCycleLR(optimizer, max_lr=[16, 0.05], ...)``, and likewise ``base_lr`` and ``max_lr`` of ``CyclicLR`` and
    ``swa_lr`` of ``SWALR``. An ``eta_min`` is one for all groups: leave it at 0, or below ``bias_lr``. Learning rate
    finders set one for all, too. The wrapper warns once if a group with ``trust_coef=None`` is about to take an lr ≥ 1.

    Args:
        model: any module. Names are those of its ``named_parameters()``.
        lr: of the weights, as the wrapper wants it: about 1 to 64 for LARS over SGD, 1e-3 for LAMB over AdamW. A
            number ≥ 0 or a tensor of one element.
        weight_decay: of the weights, λ ≥ 0.
        bias_lr: of biases and norms, as the base alone wants it. None is the smaller one of ``lr`` and 0.05, which is a
            step that plain SGD can take; for LAMB over AdamW that is ``lr`` itself.
        exclude: names of parameters, or patterns of :func:`fnmatch.fnmatchcase`, such as ``"head.*"``.

    Returns:
        One or two groups, for any :class:`torch.optim.Optimizer` under LARS or LAMB.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a number is out of its range, a pattern matches no name, ``bias_lr`` is missing beside a tensor lr,
            or a lazy module has not seen its first batch.

    Source: to leave biases and norms out is common practice for LARS, and part of MLPerf's rules for ResNet-50. There
    they stay at the weights' lr; here they have their own.

    Example:
        >>> groups = param_groups(model, lr=16, weight_decay=5e-4)
        >>> optimizer = LARS(torch.optim.SGD(groups, momentum=0.9))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module (got: {type(model).__name__})")
    lr = _lr("lr", lr)
    if bias_lr is not None:
        bias_lr = _lr("bias_lr", bias_lr)
    elif isinstance(lr, Tensor):
        raise ValueError("bias_lr must be given where lr is a tensor (got: None), whose value is not read here")
    else:
        bias_lr = min(lr, SGD_SIZED_LR)
    weight_decay = non_negative_number("weight_decay", weight_decay)

    excluded: dict[Tensor, bool] = {}
    names: dict[str, Tensor] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        is_norm = any(cls.__module__ in NORMALISATIONS for cls in type(module).__mro__)
        for name, param in module.named_parameters(module_name, recurse=False, remove_duplicate=False):
            if is_lazy(param):
                raise ValueError(f"model must have seen a batch, which gives lazy parameters their shape (got: {name})")
            names[name] = param
            excluded[param] = excluded.get(param, False) or is_norm or param.ndim <= 1
    for pattern in _patterns(exclude):
        matches = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"exclude must match names of parameters (got: {pattern!r}; names: {_a_few(names)})")
        excluded.update((names[name], True) for name in matches)

    weights = [param for param, is_excluded in excluded.items() if not is_excluded]
    others = [param for param, is_excluded in excluded.items() if is_excluded]
    groups: list[Group] = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": bias_lr, "weight_decay": 0.0, "trust_coef": None},
    ]
    return [group for group in groups if group["params"]]


def _lr(name: str, lr: Any) -> float | Tensor:
    """Return a learning rate that is a number or a tensor of one element, or raise."""
    if not isinstance(lr, Tensor):
        return non_negative_number(name, lr)
    if lr.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element (got: shape {tuple(lr.shape)})")
    return lr


def _patterns(exclude: Any) -> list[str]:
    """Return the patterns as a list, or raise."""
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list of patterns, not one string (got: {exclude!r}); pass [{exclude!r}]")
    if not isinstance(exclude, Iterable):
        raise TypeError(f"exclude must be a list of patterns (got: {type(exclude).__name__})")
    patterns = list(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude must hold strings, names or patterns (got: {type(pattern).__name__})")
    return patterns


def _a_few(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more]) or "none"


class ZeroLayers:
    """Layers whose weights may all be 0 at their first step: warns of those that are about to take a LARS-sized lr.

    Such a layer has no norm to go by. Its trust ratio is 1, and its step the base's, at an lr that was chosen for
    trust ratios of a thousandth. Whether it is 0 is known on the device only. On the CPU it is looked up at the step;
    on an accelerator it is asked for when the layer comes in, and taken from the answer at the step if that has come
    back and the layer is the same as then. The host never waits: an answer that is late goes unread. Sharded layers
    are not looked at: that would take another collective.
    """

    def __init__(self) -> None:
        self._watched: set[Tensor] = set()
        self._answers: list[tuple[dict[Tensor, tuple[int, int]], Tensor, torch.Event]] = []

    def watch(self, params: Iterable[Tensor]) -> None:
        """Take in layers that have not had their first step."""
        if torch.compiler.is_compiling():
            return
        params = [param for param in params if _is_plain(param)]
        self._watched.update(params)
        for bucket in _buckets(param for param in params if not _is_readable(param)):
            # This is no more than a courtesy, and devices differ in what they can do.
            with suppress(RuntimeError, TypeError):
                if not is_capturing(bucket[0].device):
                    flags = (ops.squared_norms(bucket) == 0).to("cpu", non_blocking=True)
                    self._answers.append(({param: _stamp(param) for param in bucket}, flags, _record(bucket[0].device)))

    def before_step(self, optimizer: OptimizerWrapper, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """Warn once the gradients are there: now, or after the first evaluation of the closure, which is returned."""
        if closure is None:
            self._warn(optimizer)
            return None

        def watched_closure() -> Any:
            loss = closure()
            self._warn(optimizer)
            return loss

        return watched_closure

    def _warn(self, optimizer: OptimizerWrapper) -> None:
        # Where a step cannot be traced as a whole, the compiler takes up its callees one by one.
        if torch.compiler.is_compiling() or not self._watched:
            return
        places = self._places(optimizer)
        zeros = self._zeros(list(places))
        self._watched.clear()
        self._answers.clear()
        found = [place for param, place in places.items() if param in zeros]
        if found:
            more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
            warnings.warn(
                "a layer whose weights are all 0 has the trust ratio 1, so that its first step takes the whole lr "
                f"({found[0]}{more}); give biases and norms an lr of their own, as torchlars.param_groups(model, "
                "lr=..., weight_decay=..., bias_lr=...) does, or warm lr up from one that the base could take alone",
                stacklevel=5,
            )

    def _places(self, optimizer: OptimizerWrapper) -> dict[Tensor, str]:
        """Return the watched layers that take a large lr at this step, and where they stand."""
        places: dict[Tensor, str] = {}
        for index, group in enumerate(optimizer.param_groups):
            options, lr = optimizer.group_options(index, group), group.get("lr")
            if options is None or options.get("clip", False) or not _is_lars_sized(lr, optimizer):
                continue
            names = group.get("param_names", ())
            for position, param in enumerate(group["params"]):
                if param in self._watched and param.grad is not None:
                    name = f"name: {names[position]}, " if position < len(names) else ""
                    places[param] = (
                        f"group: {index}, parameter: {position}, {name}shape: {tuple(param.shape)}, lr: {lr}"
                    )
        return places

    def _zeros(self, params: Sequence[Tensor]) -> set[Tensor]:
        """Return which of some layers are known to be all 0."""
        zeros: set[Tensor] = set()
        for bucket in _buckets(param for param in params if _is_plain(param) and _is_readable(param)):
            flags = (ops.squared_norms(bucket) == 0).tolist()
            zeros.update(param for param, is_zero in zip(bucket, flags, strict=True) if is_zero)
        elsewhere = {param for param in params if _is_plain(param) and not _is_readable(param)}
        for stamps, answer, event in self._answers:
            # While a graph is captured, even to ask an event is forbidden.
            if elsewhere.isdisjoint(stamps) or is_capturing(next(iter(stamps)).device) or not event.query():
                continue
            for (param, stamp), is_zero in zip(stamps.items(), answer.tolist(), strict=True):
                if is_zero and param in elsewhere and stamp == _stamp(param):  # not filled or moved meanwhile
                    zeros.add(param)
        return zeros


def _is_plain(param: Tensor) -> bool:
    """Return whether a tensor is what it seems: neither sharded nor fake, and with elements to be 0."""
    return (
        type(param) in (Tensor, nn.Parameter)
        and param.device.type != "meta"
        and param.layout == torch.strided
        and param.dtype in ops.DTYPES
        and param.numel() > 0
        and not param.is_inference()  # these do not count their changes
    )


def _is_readable(param: Tensor) -> bool:
    """Return whether to read a tensor's values makes nobody wait."""
    return param.device.type == "cpu"


def large_lr_of_unadapted(optimizer: OptimizerWrapper, adapted: Sequence[int]) -> str | None:
    """Return what to warn of if a group that opts out is about to take an lr for trust ratios, beside adapted ones.

    Schedulers that set an lr, and do not multiply it, do that. An lr that is a tensor on an accelerator is not read.
    """
    groups = optimizer.param_groups
    if len(adapted) == len(groups):
        return None
    for index, group in enumerate(groups):
        if index in adapted or not _is_at_least_1(group.get("lr")) or _finds_its_step(optimizer):
            continue
        if any(param.grad is not None for param in group["params"]) and any(groups[i]["params"] for i in adapted):
            return (
                "a group with trust_coef=None takes its lr whole, without a trust ratio, and one of 1 or more is made "
                f"for trust ratios (group: {index}, lr: {float(group['lr']):g}); a scheduler that sets lrs needs one "
                "for each group, as in OneCycleLR(optimizer, max_lr=[16, 0.05], ...)"
            )
    return None


def _is_at_least_1(lr: Any) -> bool:
    """Return whether an lr is known to be 1 or more without waiting for a device."""
    if isinstance(lr, Tensor):
        return lr.device.type == "cpu" and lr.numel() == 1 and lr.item() >= 1
    return isinstance(lr, Real) and float(lr) >= 1


def _finds_its_step(optimizer: OptimizerWrapper) -> bool:
    """Return whether the base finds its step itself, as those do that come with an lr of 1, such as Adadelta."""
    return any(_is_at_least_1(_default_lr(type(base))) for base in bases(optimizer.optim))  # type: ignore[arg-type]


@cache
def _default_lr(base: type[Optimizer]) -> Any:
    parameter = inspect.signature(base.__init__).parameters.get("lr")
    return None if parameter is None else parameter.default


def _is_lars_sized(lr: Any, optimizer: OptimizerWrapper) -> bool:
    """Return whether an lr is known to be one for trust ratios: a number ≥ 1 that the base did not come with.

    Bases that find their step themselves, such as Adadelta, come with an lr of 1, and do not mind.
    """
    return isinstance(lr, Real) and float(lr) >= 1 and lr != _default_lr(type(optimizer.optim))  # type: ignore[arg-type]


def _stamp(param: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written to or moved."""
    return param._version, param.data_ptr()


def _record(device: torch.device) -> torch.Event:
    """Return an event behind what a device has been asked for until now."""
    return torch.accelerator.current_stream(device).record_event()


def _buckets(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Return layers together that share device and dtype."""
    buckets: dict[Any, list[Tensor]] = {}
    for param in params:
        buckets.setdefault((param.device, param.dtype), []).append(param)
    return buckets.values()
