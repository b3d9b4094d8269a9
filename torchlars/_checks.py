"""The checks of the ops' arguments, in the words of csrc/checks.h, and what they ask of a tensor's memory."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from torchlars import codes

__all__: list[str] = []

#: The dtypes that layers may have.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Arguments = dict[str, Any]


def checked_by(
    check: Callable[[str, Arguments], None],
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Return a decorator for an op that calls ``check(the op's name, its arguments by name)`` first."""

    def decorate(op: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        parameters = inspect.signature(op).parameters
        defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
        name, names = op.__name__, tuple(parameters)

        @functools.wraps(op)
        def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            arguments = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            if len(arguments) == len(names):  # else the call itself raises a TypeError
                check(name, arguments)
            return op(*args, **kwargs)

        return checked

    return decorate


# The checks of each op.


def squared_norms(op: str, a: Arguments) -> None:
    """Check the arguments of the op of this name, as the other functions here that have an op's name."""
    tensors, others, scales = a["tensors"], a["others"], a["scales"]
    _check_tensors(op, "tensors", tensors)
    _check_needs(op, "scales", "are given", len(scales) > 0, "others", others is not None)
    if others is not None:
        _check_pairs(op, "tensors", tensors, "others", others)
        _check_numbers(op, "scales", scales, "tensors", len(tensors), "finite")
        _check_shapes(op, "tensors", tensors, "others", others, scales)
    _check_scale(op, "inv_scale", a["inv_scale"], torch.float32, tensors[0].device)


def trust_ratios(op: str, a: Arguments) -> None:
    than, (params, grads) = "param_squared_norms", (a["param_squared_norms"], a["grad_squared_norms"])
    for name in (than, "grad_squared_norms"):
        _check_squared_norms(op, name, a[name])
    layers = len(params)
    _check_length(op, "grad_squared_norms", grads, than, layers)
    _check(
        params.device == grads.device,
        f"{op}: expected tensors on one device ({than}: {params.device}, grad_squared_norms: {grads.device})",
    )
    _check_numbers(op, "weight_decays", a["weight_decays"], than, layers)
    _check_numbers(op, "trust_coefs", a["trust_coefs"], than, layers, "positive")
    _check_numbers(op, "eps", a["eps"], than, layers)
    dtype = a["dtype"]
    _check(dtype in (torch.float64, torch.float32), f"{op}: expected float64 or float32 (dtype: {dtype})")
    _check_lrs(op, a["lrs"], a["lr_tensor"], than, layers, params.device, a["clip"] or a["of_updates"])


def scale_gradients_(op: str, a: Arguments) -> None:
    # Of a layer that does not decay, only the norm of the parameter is read.
    free_where_zero = () if len(a["trust_coefs"]) > 0 else a["weight_decays"]
    _check_layers(op, a, a["clip"] or a["lr_in_momentum"], free_where_zero)
    _check_writable(op, "grads", a["grads"])


def scale_updates_(op: str, a: Arguments) -> None:
    params, old_params, measures = a["params"], a["old_params"], len(a["trust_coefs"]) > 0
    _check_pairs(op, "params", params, "old_params", old_params)
    _check(
        params[0].dtype == old_params[0].dtype,
        f"{op}: expected params and old_params of one dtype (params[0]: {params[0].dtype}, "
        f"old_params[0]: {old_params[0].dtype})",
    )
    _check_shapes(op, "params", params, "old_params", old_params)
    _check_writable(op, "params", params)
    _check_ratios(op, a, "params", params, old_params)
    _check_needs(op, "lrs", "are given", len(a["lrs"]) > 0, "trust_coefs", measures)
    _check_lrs(op, a["lrs"], a["lr_tensor"], "params", len(params), params[0].device, measures)


def sgd_(op: str, a: Arguments) -> None:
    params, buffers, momentums, layers = a["params"], a["momentum_buffers"], a["momentums"], len(a["grads"])
    scales = a["momentum_scales"]
    _check_layers(op, a, True, ())
    _check_writable(op, "params", params)
    _check_numbers(op, "momentums", momentums, "grads", layers)
    _check_numbers(op, "dampenings", a["dampenings"], "grads", layers, "finite")
    _check_needs(op, "row_lengths", "are given", len(a["row_lengths"]) > 0, "momentum_scales", scales is not None)
    if len(a["row_lengths"]) + len(a["offsets"]) > 0:
        _check_length(op, "row_lengths", a["row_lengths"], "grads", layers)
        _check_length(op, "offsets", a["offsets"], "grads", layers)
    if len(buffers) == 0:
        for i, momentum in enumerate(momentums):
            _check(
                momentum == 0, f"{op}: expected momentum_buffers where there is momentum (momentums[{i}]: {momentum})"
            )
        _check_needs(op, "nesterov", "is True", a["nesterov"], "momentum_buffers", False)
        _check_needs(op, "momentum_scales", "are given", scales is not None, "momentum_buffers", False)
        return
    if scales is not None:
        _check_codes(op, a, scales)
        return
    _check_state(op, "momentum_buffers", buffers, params)


def adam_(op: str, a: Arguments) -> None:
    params, ratios, norms, measures = a["params"], a["ratios"], a["squared_norms"], len(a["trust_coefs"]) > 0
    if len(a["grads"]) == 0:
        _check_needs(op, "grads", "are empty", True, "of_updates", a["of_updates"])
        _check_needs(op, "grads", "are empty", True, "no trust_coefs", not measures)
        _check_needs(op, "grads", "are empty", True, "no squared_norms", norms is None)
    _check_layers(op, a if len(a["grads"]) > 0 else {**a, "grads": params}, True, ())
    _check_writable(op, "params", params)
    exp_avgs, exp_avg_sqs = a["exp_avgs"], a["exp_avg_sqs"]
    _check_state(op, "exp_avgs", exp_avgs, params)
    _check_state(op, "exp_avg_sqs", exp_avg_sqs, params)
    _check(
        exp_avgs[0].dtype == exp_avg_sqs[0].dtype,
        f"{op}: expected exp_avgs and exp_avg_sqs of one dtype (exp_avgs[0]: {exp_avgs[0].dtype}, "
        f"exp_avg_sqs[0]: {exp_avg_sqs[0].dtype})",
    )
    _check_length(op, "steps", a["steps"], "params", len(params))
    for step in a["steps"]:
        _check_scale(op, "each of steps", step, torch.float32, params[0].device)
    for name in ("beta1", "beta2"):
        _check(0 <= a[name] < 1, f"{op}: expected {name} in [0, 1) (got: {a[name]})")
    _check(0 <= a["adam_eps"] < math.inf, f"{op}: expected a non-negative adam_eps (got: {a['adam_eps']})")
    _check_needs(op, "of_updates", "is True", a["of_updates"], "no decayed_norm", not a["decayed_norm"])
    if norms is not None:
        _check_needs(op, "squared_norms", "are given", True, "of_updates", a["of_updates"])
        _check_needs(op, "squared_norms", "are given", True, "no ratios", ratios is None)
        is_mixed, exp_avg = a["grads"][0].dtype != params[0].dtype, exp_avgs[0]
        _check(
            not is_mixed or exp_avg.dtype.itemsize > 2,
            f"{op}: expected exp_avgs of float32 where squared_norms are given with grads of another dtype than params "
            f"(params[0]: {params[0].dtype}, grads[0]: {a['grads'][0].dtype}, exp_avgs[0]: {exp_avg.dtype})",
        )
        _check_squared_norms(op, "squared_norms", norms)
        _check_length(op, "squared_norms", norms, "twice the params", 2 * len(params))
        _check(
            norms.device == params[0].device,
            f"{op}: expected tensors on one device (params[0]: {params[0].device}, squared_norms: {norms.device})",
        )


def _check_state(op: str, name: str, state: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Check a list of tensors that an optimizer keeps for its parameters."""
    _check_tensors(op, name, state)
    _check_length(op, name, state, "params", len(params))
    _check_writable(op, name, state)
    first, param = state[0], params[0]
    _check(
        first.device == param.device,
        f"{op}: expected tensors on one device (params[0]: {param.device}, {name}[0]: {first.device})",
    )
    _check(
        first.dtype in (param.dtype, torch.float32) if param.dtype.itemsize == 2 else first.dtype == param.dtype,
        f"{op}: expected {name} of the dtype of params, or of float32 for 16-bit ones "
        f"(params[0]: {param.dtype}, {name}[0]: {first.dtype})",
    )
    _check_shapes(op, "params", params, name, state)


def _check_codes(op: str, a: Arguments, scales: Sequence[Tensor]) -> None:
    """Check momentum in 8 bits."""
    params, grads, buffers = a["params"], a["grads"], a["momentum_buffers"]
    where = "where momentum_scales are given"
    _check_length(op, "momentum_buffers", buffers, "grads", len(params))
    _check_length(op, "momentum_scales", scales, "grads", len(params))
    _check(
        not params[0].is_complex() and compute_dtype(grads[0].dtype, params[0].dtype) == torch.float32,
        f"{op}: expected float32, bfloat16 or float16 {where} (params[0]: {params[0].dtype}, "
        f"grads[0]: {grads[0].dtype})",
    )
    for i, param in enumerate(params):
        _check(
            codes.has_rows_in_order(param),
            f"{op}: expected params that fill their memory row by row {where} "
            f"(params[{i}]: shape {list(param.shape)}, strides {list(param.stride())})",
        )
        named = (("momentum_buffers", buffers[i], torch.int8), ("momentum_scales", scales[i], torch.float32))
        for name, tensor, dtype in named:
            _check(
                tensor.layout == torch.strided and tensor.dtype == dtype,
                f"{op}: expected {name} of {dtype} {where} ({name}[{i}]: {tensor.dtype})",
            )
            _check(
                tensor.device == param.device,
                f"{op}: expected tensors on one device (params[{i}]: {param.device}, {name}[{i}]: {tensor.device})",
            )
        _check(
            tuple(scales[i].shape) == codes.scales_shape(param.shape) and scales[i].is_contiguous(),
            f"{op}: expected contiguous momentum_scales of one number for each block of a row (momentum_scales[{i}]: "
            f"shape {list(scales[i].shape)}, expected: {list(codes.scales_shape(param.shape))})",
        )
    _check_shapes(op, "params", params, "momentum_buffers", buffers)
    _check_writable(op, "momentum_buffers", buffers)


# What they have in common.


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _check_needs(op: str, name: str, is_: str, given: bool, needed: str, has: bool) -> None:
    _check(has or not given, f"{op}: expected {needed} where {name} {is_}")


def _check_length(
    op: str, name: str, values: Sequence[float] | Sequence[Tensor] | Tensor, than: str, length: int
) -> None:
    _check(len(values) == length, f"{op}: expected lists of one length ({than}: {length}, {name}: {len(values)})")


def _check_numbers(
    op: str, name: str, numbers: Sequence[float], than: str, layers: int, kind: str = "non-negative"
) -> None:
    """Check that there is one number a layer, each of a kind."""
    _check_length(op, name, numbers, than, layers)
    for i, number in enumerate(numbers):
        in_range = number > 0 if kind == "positive" else kind == "finite" or number >= 0
        _check(-math.inf < number < math.inf and in_range, f"{op}: expected {kind} numbers ({name}[{i}]: {number})")


def _check_tensors(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    _check(len(tensors) > 0, f"{op}: expected at least one tensor (got: {name} is empty)")
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        _check(tensor.layout == torch.strided, f"{op}: expected strided tensors ({name}[{i}]: {tensor.layout})")
        _check(
            tensor.dtype in DTYPES,
            f"{op}: expected float64, float32, bfloat16, float16, complex128 or complex64 "
            f"({name}[{i}]: {tensor.dtype})",
        )
        _check(
            tensor.device == first.device,
            f"{op}: expected tensors on one device ({name}[0]: {first.device}, {name}[{i}]: {tensor.device})",
        )
        _check(
            tensor.dtype == first.dtype,
            f"{op}: expected tensors of one dtype ({name}[0]: {first.dtype}, {name}[{i}]: {tensor.dtype})",
        )


def _check_pairs(op: str, name: str, tensors: Sequence[Tensor], other_name: str, others: Sequence[Tensor]) -> None:
    """Check two lists of tensors that go together, pair by pair; their shapes apart."""
    _check_tensors(op, name, tensors)
    _check_tensors(op, other_name, others)
    _check_length(op, other_name, others, name, len(tensors))
    tensor, other = tensors[0], others[0]
    _check(
        tensor.device == other.device,
        f"{op}: expected tensors on one device ({name}[0]: {tensor.device}, {other_name}[0]: {other.device})",
    )
    _check(
        tensor.is_complex() == other.is_complex(),
        f"{op}: expected {name} and {other_name} to be both real or both complex "
        f"({name}[0]: {tensor.dtype}, {other_name}[0]: {other.dtype})",
    )


def _check_shapes(
    op: str,
    name: str,
    tensors: Sequence[Tensor],
    other_name: str,
    others: Sequence[Tensor],
    free_where_zero: Sequence[float] = (),
) -> None:
    """Check that shapes agree, except where ``free_where_zero`` is 0, if that is given."""
    for i, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
        _check(
            tensor.shape == other.shape or (len(free_where_zero) > 0 and free_where_zero[i] == 0),
            f"{op}: expected {name} and {other_name} of one shape "
            f"({name}[{i}]: {list(tensor.shape)}, {other_name}[{i}]: {list(other.shape)})",
        )


def _check_writable(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        _check(
            is_writable_in_place(tensor),
            f"{op}: expected {name} that can be written in place ({name}[{i}]: shape {list(tensor.shape)}, "
            f"strides {list(tensor.stride())} overlap in memory); clone it first",
        )


def _check_scale(op: str, name: str, given: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
    """Check a number that is read on the device."""
    if given is not None:
        _check(
            given.numel() == 1 and given.dtype == dtype and given.device == device,
            f"{op}: expected {name} to be one {str(dtype).removeprefix('torch.')} on {device} "
            f"(got: shape {list(given.shape)}, {given.dtype}, {given.device})",
        )


def _check_lrs(
    op: str,
    lrs: Sequence[float],
    lr_tensor: Tensor | None,
    than: str,
    layers: int,
    device: torch.device,
    are_needed: bool,
) -> None:
    _check_needs(op, "lr_tensor", "is given", lr_tensor is not None, "lrs", are_needed or len(lrs) > 0)
    if are_needed or len(lrs) > 0:
        _check_numbers(op, "lrs", lrs, than, layers)
    _check_scale(op, "lr_tensor", lr_tensor, torch.float64, device)


def _check_layers(op: str, a: Arguments, lrs_are_needed: bool, free_where_zero: Sequence[float]) -> None:
    """Check what ``scale_gradients_``, ``sgd_`` and ``adam_`` have in common."""
    grads, params = a["grads"], a["params"]
    _check_pairs(op, "grads", grads, "params", params)
    _check_numbers(op, "weight_decays", a["weight_decays"], "grads", len(grads))
    _check_shapes(op, "grads", grads, "params", params, free_where_zero)
    _check_needs(op, "decayed_norm", "is True", a["decayed_norm"], "trust_coefs", len(a["trust_coefs"]) > 0)
    _check_ratios(op, a, "grads", grads, params)
    _check_lrs(op, a["lrs"], a["lr_tensor"], "grads", len(grads), grads[0].device, lrs_are_needed)
    _check_scale(op, "inv_scale", a["inv_scale"], torch.float32, grads[0].device)


def _check_ratios(op: str, a: Arguments, name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Check the trust ratios of layers, and the numbers that they are decided by."""
    ratios, measures = a["ratios"], len(a["trust_coefs"]) > 0
    _check_needs(op, "trust_coefs", "are given", measures, "ratios", ratios is not None)
    _check_needs(op, "eps", "are given", len(a["eps"]) > 0, "trust_coefs", measures)
    _check_needs(op, "clip", "is True", a["clip"], "trust_coefs", measures)
    if measures:
        _check_numbers(op, "trust_coefs", a["trust_coefs"], name, len(tensors), "positive")
        _check_numbers(op, "eps", a["eps"], name, len(tensors))
    if ratios is not None:
        dtype = compute_dtype(tensors[0].dtype, params[0].dtype)
        _check(
            ratios.dim() == 1 and ratios.dtype == dtype and ratios.is_contiguous(),
            f"{op}: expected ratios to be a contiguous vector of {dtype} "
            f"(got: shape {list(ratios.shape)}, {ratios.dtype})",
        )
        _check_length(op, "ratios", ratios, name, len(tensors))
        _check(
            ratios.device == tensors[0].device,
            f"{op}: expected tensors on one device ({name}[0]: {tensors[0].device}, ratios: {ratios.device})",
        )


def _check_squared_norms(op: str, name: str, squared_norms: Tensor) -> None:
    _check(
        squared_norms.dim() == 1 and squared_norms.dtype == torch.float64 and squared_norms.is_contiguous(),
        f"{op}: expected a contiguous vector of float64 "
        f"({name}: shape {list(squared_norms.shape)}, {squared_norms.dtype})",
    )


# Dtypes and memory.


def compute_dtype(grad: torch.dtype, param: torch.dtype) -> torch.dtype:
    """Return the type of a layer's trust ratio and arithmetic: float64 for float64 layers, float32 for all others."""
    wide = {torch.float64, torch.complex128}
    return torch.float64 if {grad, param} & wide else torch.float32


def is_writable_in_place(tensor: Tensor) -> bool:
    """Tell whether no two elements share memory, for every layout that slicing, permuting and expanding produce."""
    if tensor.is_contiguous():  # most are, and to sort sizes that a compiler does not know would break its graph
        return True
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    extent = 0
    for stride, size in dims:
        if stride <= extent:
            return tensor.numel() == 0
        extent += stride * (size - 1)
    return True


def has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor's storage is as large as the tensor; it is not after ``untyped_storage().resize_(0)``.

    Other devices than CPU and CUDA may keep their memory elsewhere.
    """
    is_known = not torch.compiler.is_compiling() and tensor.device.type in ("cpu", "cuda")
    if not is_known or tensor.numel() == 0 or not torch._C._has_storage(tensor):
        return True
    begin = tensor.storage_offset() * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= begin + _extent(tensor)


def overlapping(tensors: Sequence[Tensor]) -> list[int]:
    """Return the positions of those tensors whose memory overlaps that of another one.

    Where a storage's pointer need not be an address, only tensors of one storage can overlap.
    """
    spans = []
    for i, tensor in enumerate(tensors):
        if tensor.layout == torch.strided and tensor.numel() > 0 and torch._C._has_storage(tensor):
            storage = tensor.untyped_storage()
            has_address = tensor.device.type in ("cpu", "cuda") and storage.data_ptr() != 0
            begin = (storage.data_ptr() if has_address else 0) + tensor.storage_offset() * tensor.element_size()
            spans.append((0 if has_address else storage._cdata, begin, begin + _extent(tensor), i))
    found: set[int] = set()
    furthest: tuple[Any, ...] = (0, 0, 0, 0)  # of those before: the one that ends last
    for span in sorted(spans):
        storage_of, begin, end, i = span
        if storage_of == furthest[0] and begin < furthest[2]:
            found |= {furthest[3], i}
        if storage_of != furthest[0] or end > furthest[2]:
            furthest = span
    return sorted(found)


def _extent(tensor: Tensor) -> int:
    """Return how many bytes there are from a tensor's first element to the end of its last one."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in strides)) * tensor.element_size()
