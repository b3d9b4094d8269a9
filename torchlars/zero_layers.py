"""Warnings of learning rates that are too large for layers without a trust ratio."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchlars import ops
from torchlars.bases import bases
from torchlars.bucket import Adaptation
from torchlars.options import is_capturing, warn_of_caller

__all__: list[str] = []


class ZeroLayers:
    """The warning of layers whose weights are all 0 at their first step.

    Such a layer has no norm, and its trust ratio is 1: it takes the whole of an lr that was chosen for trust ratios of
    about a thousandth. Training collapses if biases that start at 0 get LARS's lr. On the CPU the weights are looked up
    at the step. On an accelerator their norms are requested when the layer is added, and read at the step if they have
    arrived and the layer has not changed since. The host never waits; a late answer is not read. Sharded layers are not
    checked.
    """

    def __init__(self) -> None:
        self._watched: set[Tensor] = set()
        self._answers: list[tuple[dict[Tensor, tuple[int, int]], Tensor, torch.Event]] = []

    def watch(self, params: Iterable[Tensor]) -> None:
        """Add layers that have not had their first step."""
        if torch.compiler.is_compiling():
            return
        params = [param for param in params if _is_plain(param)]
        self._watched.update(params)
        for bucket in _buckets(param for param in params if not _is_readable(param)):
            # Devices differ in what they support, and a missing warning is no error.
            with suppress(RuntimeError, TypeError):
                if not is_capturing(bucket[0].device):
                    flags = (ops.squared_norms(bucket) == 0).to("cpu", non_blocking=True)
                    self._answers.append(({param: _stamp(param) for param in bucket}, flags, _record(bucket[0].device)))

    def warn(self, optim: Optimizer, adaptations: Mapping[int, Adaptation]) -> None:
        """Warn at the first step, once its gradients are there. ``adaptations`` are those of the base's groups."""
        # Where a step cannot be traced as a whole, the compiler traces the functions that it calls.
        if torch.compiler.is_compiling() or not self._watched:
            return
        places = self._places(optim, adaptations)
        zeros = self._zeros(list(places))
        self._watched.clear()
        self._answers.clear()
        found = [param for param in places if param in zeros]
        if found:
            more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
            which, how = "biases and norms", "bias_lr=...) does"
            if any(param.ndim > 1 for param in found):  # param_groups takes them for weights
                which, how = "layers that start at 0", "exclude=['*.lora_B.*']) does by name"
            warn_of_caller(
                "a layer whose weights are all 0 has the trust ratio 1, so that its first step takes the whole lr "
                f"({places[found[0]]}{more}); give {which} an lr of their own, as torchlars.param_groups(model, "
                f"lr=..., weight_decay=..., {how}, or warm lr up from one that the base could take alone"
            )

    def _places(self, optim: Optimizer, adaptations: Mapping[int, Adaptation]) -> dict[Tensor, str]:
        """Return the watched layers that take a large lr at this step, and where they stand."""
        places: dict[Tensor, str] = {}
        for index, how in adaptations.items():
            group = how.group
            lr = group.get("lr")
            if how.trust_coef is None or how.clip or not _is_lars_sized(lr, optim):
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
            # event.query() is not allowed while a graph is captured.
            if elsewhere.isdisjoint(stamps) or is_capturing(next(iter(stamps)).device) or not event.query():
                continue
            for (param, stamp), is_zero in zip(stamps.items(), answer.tolist(), strict=True):
                if is_zero and param in elsewhere and stamp == _stamp(param):  # not filled or moved meanwhile
                    zeros.add(param)
        return zeros


def _is_plain(param: Tensor) -> bool:
    """Return whether a tensor is dense, not a subclass, on a real device, and has elements."""
    return (
        type(param) in (Tensor, nn.Parameter)
        and param.device.type != "meta"
        and param.layout == torch.strided
        and param.dtype in ops.DTYPES
        and param.numel() > 0
        and not param.is_inference()  # these do not count their changes
    )


def _is_readable(param: Tensor) -> bool:
    """Return whether a tensor's values can be read without waiting for a device."""
    return param.device.type == "cpu"


def large_lr_of_unadapted(optim: Optimizer, adapted: Sequence[int]) -> str | None:
    """Return a warning if a group that is not adapted has an lr that is made for trust ratios, beside adapted groups.

    Schedulers that set lrs instead of multiplying them cause that. A tensor on an accelerator is not read.
    """
    groups = optim.param_groups
    for index in sorted(set(range(len(groups))).difference(adapted)):
        group = groups[index]
        if not _is_at_least_1(group.get("lr")) or _finds_its_step(optim):
            continue
        if any(param.grad is not None for param in group["params"]) and any(groups[i]["params"] for i in adapted):
            why = "trust_coef=None" if group.get("trust_coef", 0) is None else "always_adapt=False and no weight decay"
            return (
                f"a group with {why} takes its lr whole, without a trust ratio, and one of 1 or more is made "
                f"for trust ratios (group: {index}, lr: {float(group['lr']):g}); a scheduler that sets lrs needs one "
                "for each group, as in OneCycleLR(optimizer, max_lr=[16, 0.05], ...)"
            )
    return None


def _is_at_least_1(lr: Any) -> bool:
    """Return whether an lr is known to be 1 or more without waiting for a device."""
    if isinstance(lr, Tensor):
        return lr.device.type == "cpu" and lr.numel() == 1 and lr.item() >= 1
    return isinstance(lr, Real) and float(lr) >= 1


def _finds_its_step(optim: Optimizer) -> bool:
    """Return whether the base finds its step itself, as those do that come with an lr of 1, such as Adadelta."""
    return any(_is_at_least_1(_default_lr(type(base))) for base in bases(optim))


def _default_lr(base: type[Optimizer]) -> Any:
    parameter = inspect.signature(base.__init__).parameters.get("lr")
    return None if parameter is None else parameter.default


def _is_lars_sized(lr: Any, optim: Optimizer) -> bool:
    """Return whether an lr is known to be one for trust ratios: a number ≥ 1 that is not the base's default.

    Bases that choose their step length themselves, such as Adadelta, have a default lr of 1.
    """
    return isinstance(lr, Real) and float(lr) >= 1 and lr != _default_lr(type(optim))


def _stamp(param: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written to or moved."""
    return param._version, param.data_ptr()


def _record(device: torch.device) -> torch.Event:
    """Return an event that is recorded after all work that was launched on a device."""
    return torch.accelerator.current_stream(device).record_event()


def _buckets(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Return layers together that share device and dtype."""
    buckets: dict[Any, list[Tensor]] = {}
    for param in params:
        buckets.setdefault((param.device, param.dtype), []).append(param)
    return buckets.values()
