"""Momentum of SGD: how it is initialized, laid out in memory, and coded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchlars import codes, sharding
from torchlars.optim.fused import (
    check_can_begin,
    is_in_order,
    problem_of_distribution,
    problem_of_state,
    problem_of_tensor,
    state_like,
)

__all__: list[str] = []

#: The keys of one layer's momentum in the state: a buffer, or codes and their scales. Scales belong to blocks in
#: memory, whose order checkpoints need not keep: layers with three dimensions or more also have codes.order_of(codes).
#: It is a tensor, because torch.distributed.checkpoint restores only tensors in state dicts with integer keys.
BUFFER, CODES, SCALES, ORDER = MOMENTUM_KEYS = (
    "momentum_buffer",
    "momentum_codes",
    "momentum_scales",
    "momentum_order",
)
_KINDS: tuple[set[str], ...] = (set(), {BUFFER}, {CODES, SCALES}, {CODES, SCALES, ORDER})


def momentum_dtype_of(
    param: Tensor, momentum_dtype: torch.dtype | None, min_8bit_size: int | None = None
) -> torch.dtype:
    """Return the dtype of a parameter's momentum.

    Args:
        param: the parameter.
        momentum_dtype: the one for 16-bit parameters; None is the parameter's.
        min_8bit_size: if given, momentum of layers with so many elements is coded, wherever :mod:`torchlars.codes` can.
    """
    if min_8bit_size is not None and codes.is_coded(param, min_8bit_size) and sharding.place_of_rows(param) is not None:
        return torch.int8
    return momentum_dtype if momentum_dtype is not None and param.dtype.itemsize == 2 else param.dtype


def momentum_like(param: Tensor, state: Mapping[str, Any], dtype: torch.dtype, group: int) -> dict[str, Tensor]:
    """Return the momentum of a layer as a kernel takes it: in its parameter's memory order and sharding, and dense.

    Args:
        param: the parameter.
        state: its state, from which momentum is taken over, whatever its kind. Without any it begins with zeros.
        dtype: that of the momentum; int8 for codes.
        group: the parameter's group, for the error.

    Returns:
        What the state is to hold of :data:`MOMENTUM_KEYS`: the same tensors where they are so already. A buffer that
        becomes codes is rounded to nearest, half to even. Codes in another memory order or sharding are decoded, and
        rounded so again.

    Raises:
        RuntimeError: new tensors are needed while a CUDA graph is captured.
    """
    found: Tensor | None = state.get(BUFFER)
    if state.get(CODES) is not None:
        old, scales = state[CODES], state[SCALES]
        here, order = sharding.local(old), state.get(ORDER)
        in_order = here
        if order is not None and not torch.compiler.is_compiling():  # which cannot read it
            order = order.cpu()  # also where all of the state was moved: the next step is not to wait for the device
            in_order = codes.laid_out(here, int(order))
        is_placed = sharding.is_placed_like(param, old) and sharding.is_placed_like(param, scales)
        is_laid_out = in_order is here and is_in_order(param, old) and sharding.local(scales).is_contiguous()
        if dtype == torch.int8 and is_placed and is_laid_out:
            return _of_codes(old, scales, order)  # not decoded, as coding anew would round once more
        found = torch.zeros_like(old, dtype=torch.float32)
        sharding.local(found).copy_(codes.decode(in_order, sharding.local(scales)))
    if dtype == torch.int8:
        check_can_begin(param, group)
        return _coded(param, found)
    return {BUFFER: state_like(param, found, dtype, group)}


def _of_codes(new: Tensor, scales: Tensor, order: Tensor | None = None) -> dict[str, Tensor]:
    if order is None and new.dim() > 2:
        order = torch.tensor(codes.order_of(sharding.local(new)), device="cpu")
    return {CODES: new, SCALES: scales} if order is None else {CODES: new, SCALES: scales, ORDER: order}


def _coded(param: Any, momentum: Tensor | None) -> dict[str, Tensor]:
    """Return the codes and scales of a momentum; of zeros if it is None."""
    new: Any = torch.zeros_like(param, dtype=torch.int8, requires_grad=False)
    here = sharding.local(new)
    if momentum is not None:  # torch begins a sparse one from a sparse gradient
        momentum = momentum.to_dense() if momentum.is_sparse else sharding.placed_like(param, momentum)
    if momentum is None:
        scales = torch.zeros(codes.scales_shape(here.shape), dtype=torch.float32, device=here.device)
    else:
        scales = codes.encode(here, sharding.local(momentum))
    if sharding.is_distributed(param):
        shape = torch.Size(codes.scales_shape(param.shape))
        mesh, placements = param.device_mesh, param.placements
        scales = type(new).from_local(scales, mesh, placements, run_check=False, shape=shape, stride=(shape[1], 1))
    return _of_codes(new, scales)


def has_momentum(state: Mapping[str, Any]) -> bool:
    """Tell whether the momentum of a layer has begun."""
    return state.get(BUFFER) is not None or state.get(CODES) is not None


def problem_of_momentum(param: Tensor, state: Mapping[str, Any]) -> str | None:
    """Return why what a state holds of :data:`MOMENTUM_KEYS` cannot be a parameter's momentum, or None."""
    found = {name: state[name] for name in MOMENTUM_KEYS if state.get(name) is not None}
    if set(found) not in _KINDS:
        return f"momentum must be a {BUFFER}, or {CODES} with their {SCALES} (found: {', '.join(found)})"
    if CODES in found and param.dim() == 0:
        return f"a parameter without dimensions has no rows, and cannot have {CODES}"
    problem = problem_of_state(param, found, (BUFFER,))
    if problem is not None:
        return problem
    for name in (CODES, SCALES, ORDER):
        tensor = found.get(name)
        if tensor is None:
            continue
        problem = problem_of_tensor(name, tensor)
        if problem is not None:
            return problem
        dtype, shape = {
            CODES: (torch.int8, tuple(param.shape)),
            SCALES: (torch.float32, codes.scales_shape(param.shape)),
            ORDER: (torch.int64, ()),
        }[name]
        if tensor.layout != torch.strided or tensor.dtype != dtype or tensor.shape != shape:
            got = f"{tensor.dtype}, {tensor.layout}, shape {tuple(tensor.shape)}"
            remedy = "; if torch.optim.SGD has cast them, delete them, and momentum begins anew"
            is_cast = name == CODES and tensor.is_floating_point()
            return f"{name} must be {dtype} of shape {shape} (got: {got}){remedy if is_cast else ''}"
        if name == ORDER and not torch.compiler.is_compiling() and not codes.is_order(int(tensor), param.dim()):
            return f"{ORDER} must name dimensions 1 to {param.dim() - 1}, a digit each (got: {int(tensor)})"
        problem = None if name == ORDER else problem_of_distribution(param, name, tensor)
        if problem is not None:
            return problem
    if CODES in found and not sharding.is_placed_like(found[CODES], found[SCALES]):
        both = ", ".join(f"{name}: {found[name].placements}" for name in (CODES, SCALES))
        return f"{CODES} and {SCALES} must have the same placements ({both})"
    return None


def set_momentum(state: dict[str, Any], momentum: Mapping[str, Tensor]) -> None:
    """Put what :func:`momentum_like` returns into a state, in the place of momentum of another kind."""
    for name in MOMENTUM_KEYS:
        if name not in momentum and name in state:
            del state[name]
    state.update(momentum)
