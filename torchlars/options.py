"""Checks of options and hyper-parameters, which return the normalized value or raise; reading of groups; warnings."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from numbers import Integral, Real
from operator import is_
from types import EllipsisType, NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchlars import ops

__all__: list[str] = []

#: A parameter group of an optimizer.
Group = dict[str, Any]

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class CommonOptions(TypedDict, total=False):
        """The options that all wrappers have."""

        trust_coef: float
        eps: float
        clip: bool
        always_adapt: bool


def warn_of_caller(message: str) -> None:
    """Warn, and name the innermost line of the call stack that is neither torch's nor ours."""
    frame, level = sys._getframe().f_back, 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "torchlars"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def is_capturing(device: torch.device | None = None) -> bool:
    """Return whether the current stream captures a CUDA graph. Always False of a device that is not CUDA."""
    if device is not None and device.type != "cuda":
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def true_or_false(name: str, value: Any) -> bool:
    """Return a truth value, or raise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False (got: {value!r} of type {type(value).__name__})")
    return value


def one_of(*values: Any) -> Callable[[str, Any], Any]:
    """Return a check that a value is one of several."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str | None) or value not in values:
            kind = TypeError if not isinstance(value, str | None) else ValueError
            raise kind(f"{name} must be {' or '.join(map(repr, values))} (got: {value!r})")
        return value

    return check


def non_negative_number(name: str, value: Any) -> float:
    """Return a finite number that is at least 0, or raise."""
    return _number(name, value, "non-negative", lambda number: number >= 0)


def positive_number(name: str, value: Any) -> float:
    """Return a finite number above 0, or raise."""
    return _number(name, value, "positive", lambda number: number > 0)


def finite_number(name: str, value: Any) -> float:
    """Return a finite number, or raise."""
    return _number(name, value, "finite", lambda number: True)


def non_negative_integer(name: str, value: Any) -> int:
    """Return an integer that is at least 0, or raise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a non-negative integer (got: {value!r} of type {type(value).__name__})")
    if value < 0:
        raise ValueError(f"{name} must be a non-negative integer (got: {value!r})")
    return int(value)


def _number(name: str, value: Any, kind: str, in_range: Callable[[float], bool]) -> float:
    is_float = type(value) is float  # the common case, checked first because it is fast
    if not is_float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a {kind} number (got: {value!r} of type {type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf or not in_range(number):  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be a {kind} number (got: {value!r})")
    return number


def number_in(name: str, value: Any) -> Any:
    """Return the number in a tensor of one element, as schedulers leave in groups, and every other value as it is."""
    if type(value) is float or not isinstance(value, Tensor):
        return value
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a number (got: a tensor of shape {tuple(value.shape)} and {value.dtype})")
    if value.device.type != "cpu":
        raise TypeError(
            f"{name} must be a number or a tensor on the CPU (got: one on {value.device}, whose value the host would "
            "have to wait for in every step); pass its .item()"
        )
    return float(value.detach())


def weight_decay_of(index: int, group: Group) -> float:
    """Return the weight decay of the ``index``-th group, coupled or decoupled.

    Raises:
        TypeError, ValueError: it is not a non-negative number.
    """
    name = f"weight_decay of parameter group {index}"
    return non_negative_number(name, number_in(name, group.get("weight_decay", 0.0)))


def learning_rate(name: str, lr: Any) -> float | Tensor:
    """Return a learning rate: a number, or a tensor of one element whose value is not read.

    Raises:
        TypeError, ValueError: it is neither, or negative.
        RuntimeError: a CUDA graph is being captured, and the tensor is on the CPU: its memory may be gone at a replay.
    """
    if not isinstance(lr, Tensor):
        return non_negative_number(name, lr)
    if lr.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element (got: {tuple(lr.shape)})")
    if lr.is_complex() or lr.dtype == torch.bool or lr.layout != torch.strided:
        raise TypeError(f"{name} must be a real number in a dense tensor (got: {lr.dtype}, {lr.layout})")
    if not torch.compiler.is_compiling() and lr.device.type == "cpu" and is_capturing():
        raise RuntimeError(
            f"lr must be on the parameters' device while a CUDA graph is captured (got: a tensor on {lr.device}); "
            "a number is kept as it is at the capture"
        )
    return lr


class GroupReader:
    """Reads parameter groups, and with the extension again only those that have changed since the last step.

    The result of a group is reused while the group is the same dict with the same keys and identical values, and while
    the *context*, a list of all other values that were read, is identical, too. A group with values that can change in
    place, such as tensors on the CPU, is read every time; so are all groups if the context holds such a tensor. Nothing
    about parameters and gradients is remembered.

    Args:
        needs_lr: tells of a result whether it depends on the group's lr, which schedulers may change at every step.
    """

    def __init__(self, needs_lr: Callable[[Any], bool]) -> None:
        self._needs_lr = needs_lr
        # The context, results and snapshots (None: not to be used again) of the last call.
        self._last: tuple[list[Any], list[Any], list[Any]] = ([], [], [])

    def read(
        self, groups: Sequence[Group], read: Callable[[int, Group], Any], context_of: Callable[[], list[Any]]
    ) -> list[Any]:
        """Return ``read(index, group)`` of every group. If nothing has changed, that is the same list as last time."""
        if torch.compiler.is_compiling():
            return [read(index, group) for index, group in enumerate(groups)]
        context = context_of()
        last_context, results, snapshots = self._last
        if len(last_context) != len(context) or not all(map(is_, last_context, context)):
            results, snapshots = [], []
        changed = ops.changed_groups(groups, snapshots)
        if len(changed) == 0 and len(results) == len(groups):
            return results
        new = [None] * (len(groups) - len(results))
        results, snapshots = [*results[: len(groups)], *new], [*snapshots[: len(groups)], *new]
        for index in changed:
            items = dict(groups[index])  # first: a signal handler may change the group meanwhile
            results[index] = read(index, groups[index])
            snapshots[index] = _snapshot(groups[index], items, self._needs_lr(results[index]))
        if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in _flat(context)):
            context = []  # they can change in place
        self._last = context, results, snapshots  # at once, and only if no group has raised
        return results


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    """Return values, with the items of tuples in the place of these, as betas may be a tuple of tensors."""
    return chain.from_iterable(value if type(value) is tuple else (value,) for value in values)


_CONSTANTS = frozenset({float, int, bool, str, tuple, NoneType, EllipsisType, torch.dtype})


def _snapshot(group: Group, items: Group, has_lr: bool) -> tuple[Any, ...] | None:
    """Return items of a group as :func:`torchlars.ops.changed_groups` takes them, or None if they can change in place.

    An lr on an accelerator is not read, whatever its value. Values that are not read are replaced by ``...``, so that
    they are not kept alive.
    """
    if any(value is ... for value in items.values()):
        return None
    not_read = ("params", "param_names") if has_lr else ("params", "param_names", "lr")
    items.update((key, ...) for key in not_read if key in items)
    lr = items.get("lr")
    if not _CONSTANTS.issuperset(map(type, _flat(items.values()))):
        is_on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        others = (items[key] for key in items if key != "lr")
        if not is_on_device or not _CONSTANTS.issuperset(map(type, _flat(others))):
            return None
    return group, *chain.from_iterable(items.items())
