"""Parameter groups of a model: weights, and biases and normalisation layers with an lr of their own."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchlars.options import Group, learning_rate, non_negative_number

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

    A parameter that several modules share is listed once, and is in the second group if any of its modules or names
    puts it there. Frozen parameters are included. A group without parameters is left out. Norms of your own whose
    weights have more dimensions, magnitudes of a weight norm, and matrices that start at 0 (LoRA's B, gates, output
    layers), whose first trust ratio is 1, must be excluded by name.

    **Why the second lr matters.** Under LARS, lr is multiplied by trust ratios of about a thousandth, and is larger
    accordingly. Training collapses if biases get that lr without adaptation, or start at 0 (trust ratio 1). A scheduler
    that multiplies lrs keeps the two in proportion. One that sets lrs must be given one for each group, in order:
    ``OneCycleLR(optimizer, max_lr=[16, 0.05], ...)``, and likewise ``base_lr`` and ``max_lr`` of ``CyclicLR`` and
    ``swa_lr`` of ``SWALR``. ``eta_min`` is shared by all groups: leave it at 0, or below ``bias_lr``. Learning rate
    finders set one lr for all groups, too. The wrapper warns once if a group that is not adapted has an lr ≥ 1.

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
    lr = learning_rate("lr", lr)
    if bias_lr is not None:
        bias_lr = learning_rate("bias_lr", bias_lr)
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
