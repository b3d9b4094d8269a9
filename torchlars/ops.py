"""The ops, and what else is computed for a step. Signatures and documentation are those of :mod:`torchlars.reference`.

An op calls ``torch.ops.torchlars.*``: the extension's kernels for CPU and CUDA, the reference for every other device.
Without the extension it calls the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from torchlars import _checks, reference
from torchlars._checks import DTYPES, compute_dtype, is_writable_in_place
from torchlars._extension import extension

__all__ = [
    "DTYPES",
    "adam_",
    "changed_groups",
    "compute_dtype",
    "empty_ratios",
    "fast_layers",
    "fast_options",
    "has_memory",
    "inv_scale",
    "is_writable_in_place",
    "lr_tensor",
    "overlapping",
    "positions_of_non_parameters",
    "positions_of_other_layout",
    "scale_gradients_",
    "scale_updates_",
    "sgd_",
    "squared_norms",
    "times_lr",
    "trust_ratios",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

OPS = ("squared_norms", "trust_ratios", "scale_gradients_", "scale_updates_", "sgd_", "adam_")
_backend: Any = reference  # tests replace it
if extension is not None:
    _backend = torch.ops.torchlars
    _library = torch.library.Library("torchlars", "IMPL")  # type: ignore[no-untyped-call]
    for _name in OPS:
        _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


class NoFastPath:
    """The fast path where there is none: every layer is left to the slow path."""

    buckets = ()
    shares_memory = False
    params_share_memory = False
    same_layout = True
    versions = 0

    def add(self, groups: Sequence[tuple[dict[str, Any], Any]], *args: Any) -> list[tuple[int, int]]:
        """Return all positions."""
        return [(i, position) for i, (group, _) in enumerate(groups) for position in range(len(group["params"]))]


def fast_layers(kind: str) -> Any:
    """Return an object that gathers layers of a step in C++, the fast path.

    Its ``add(groups, ...)`` takes the dense real layers of groups, given as pairs of a group and its
    :func:`fast_options`. It returns the parameters that are left to the slow path in Python, as pairs of a position in
    ``groups`` and one in the group. Its ``buckets`` hold the layers that it took. While compiling it takes none, as C++
    cannot be traced.

    Args:
        kind: ``"LarsLayers"``, ``"SgdLayers"`` or ``"AdamLayers"``.
    """
    if torch.compiler.is_compiling() or _backend is reference:
        return NoFastPath()
    return getattr(extension, kind)()


def fast_options(kind: str, **values: Any) -> Any:
    """Return the options of a group as ``add`` of :func:`fast_layers` takes them.

    Args:
        kind: ``"LarsOptions"``, ``"SgdOptions"`` or ``"AdamOptions"``.
        **values: by the names in ``_C.pyi``.
    """
    options = None if extension is None or torch.compiler.is_compiling() else getattr(extension, kind)()
    if options is not None:
        for name, value in values.items():
            setattr(options, name, value)
    return options


def has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor's storage is as large as the tensor; it is not after ``untyped_storage().resize_(0)``."""
    if extension is None or _backend is reference or torch.compiler.is_compiling():
        return _checks.has_memory(tensor)
    return extension.has_memory(tensor)  # type: ignore[no-any-return]


def positions_of_other_layout(params: Sequence[Tensor]) -> Sequence[int]:
    """Return the positions of the parameters whose gradient may have another memory order."""
    if torch.compiler.is_compiling() or _backend is reference or extension is None or type(params) is not list:
        return range(len(params))
    return extension.positions_of_other_layout(params)  # type: ignore[no-any-return]


def overlapping(tensors: Sequence[Tensor]) -> list[int]:
    """Return the positions of those tensors whose memory overlaps that of another one.

    The memory of a tensor reaches from its first element to its last one, gaps included.
    """
    if extension is None or _backend is reference or torch.compiler.is_compiling():
        return _checks.overlapping(tensors)
    return extension.overlapping(tensors)  # type: ignore[no-any-return]


def positions_of_non_parameters(groups: Sequence[Sequence[Tensor]]) -> Sequence[tuple[int, int]]:
    """Return the group and position of every tensor whose type is not exactly :class:`torch.nn.Parameter`."""
    if extension is not None and _backend is not reference and not torch.compiler.is_compiling():
        try:
            return extension.positions_of_non_parameters(groups)  # type: ignore[no-any-return]
        except TypeError:  # a group that is no list
            pass
    return [
        (group, position)
        for group, params in enumerate(groups)
        for position, param in enumerate(params)
        if type(param) is not torch.nn.Parameter
    ]


def changed_groups(groups: Sequence[dict[str, Any]], snapshots: Sequence[Any]) -> Sequence[int]:
    """Return the positions of the groups that are not as in their snapshots.

    That is all of them without the extension, or if ``groups`` is no list.

    A snapshot is a tuple of the group's dict and its keys and values in turn, which are compared by identity; ``...``
    stands for any value.
    """
    if torch.compiler.is_compiling() or _backend is reference or extension is None or type(groups) is not list:
        return range(len(groups))
    return extension.changed_groups(groups, snapshots)  # type: ignore[no-any-return]


def lr_tensor(lr: Tensor, device: torch.device) -> Tensor:
    """Return a learning rate as the ``lr_tensor`` of ops, which multiplies the ``lrs``. The host does not read it."""
    return lr.detach().to(device, torch.float64, non_blocking=device.type != "cpu")  # a CPU kernel reads it at once


def times_lr(ratios: Tensor, lr: float | Tensor) -> Tensor:
    """Return trust ratios times a learning rate, rounded once."""
    factor = lr_tensor(lr, ratios.device) if isinstance(lr, Tensor) else lr
    return (ratios.double() * factor).to(ratios.dtype).reshape(ratios.shape)


@torch.no_grad()
def inv_scale(grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device) -> Tensor:
    """Return the ``inv_scale`` σ of ops, from what a :class:`torch.amp.GradScaler` gives to an optimizer.

    σ = 1 / grad_scale, with the bits of ``GradScaler.unscale_``, and 0 where found_inf ≠ 0. The host reads neither. No
    finite float32 has the reciprocal 0; an infinite scale has, and skips the step, as all gradients have overflowed.

    Args:
        grad_scale: the factor of the loss, one float32; None is 1.
        found_inf: not 0 if a gradient is infinite or NaN, one element; None is 0.
        device: the device of the layers.

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


def empty_ratios(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return an uninitialised vector of ``ratios`` for an op that measures them.

    Args:
        grads: the gradients of the layers; of updates, the parameters.
        params: the parameters, of the same number.
    """
    return torch.empty(len(grads), dtype=compute_dtype(grads[0].dtype, params[0].dtype), device=grads[0].device)


def _op(of_reference: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return an op that calls the backend, with the name, signature and documentation of the reference."""
    name = of_reference.__name__

    @functools.wraps(of_reference)
    def op(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return getattr(_backend, name)(*args, **kwargs)  # type: ignore[no-any-return]

    return torch.no_grad()(op)


squared_norms = _op(reference.squared_norms)
trust_ratios = _op(reference.trust_ratios)
scale_gradients_ = _op(reference.scale_gradients_)
scale_updates_ = _op(reference.scale_updates_)
sgd_ = _op(reference.sgd_)
adam_ = _op(reference.adam_)
