r"""Momentum in 8 bits: linear codes with a scale for each block, rounded with a stateless dither.

A *row* of a layer is all elements of one index of dimension 0, in the order of memory. A *block* is up to 128
consecutive elements of a row; the last one of a row may be shorter. With a = max \|m\| over a block

.. math::
    s = a / 127, \qquad q = \operatorname{clamp}(\lfloor m \cdot (127 / a) + u \rfloor, -127, 127), \qquad
    m \approx q \cdot s

in float32, every operation rounded. That is 1 byte an element, and 4 a block. Where a < 2⁻¹⁰⁰ all are 0. Where a is not
finite the scale is NaN, so that the whole block decodes to NaN: a fault stays visible.

The dither u in [0, 1) makes the rounding unbiased: without it, elements that are small beside their block's largest one
keep a momentum of 0. u is a hash of numbers that every replica, every shard and every run have alike: m, a, the
parameter before the step and the element's position in the whole layer. There is no generator and no state.

Here in plain torch, on any device; csrc/codes.h has the same.

Source: a scale for each block is from Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022 (arXiv
2110.02861). There, codes are not linear, a block has 256 elements of the flat tensor, and rounding is to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__: list[str] = []

BLOCK = 128
MAX_CODE = 127
#: A row with fewer elements would cost more than 1/16 byte an element for its scales.
MIN_ROW = 64
#: A number of :func:`order_of` has a decimal digit for each dimension but the first.
MAX_DIMS = 10
_INFINITY, _LEAST = 0x7F800000, 0x0D800000  # the bits of infinity and of 2⁻¹⁰⁰


def row_length(shape: Sequence[int]) -> int:
    """Return the number of elements of a row."""
    length = 1
    for size in shape[1:]:
        length *= size
    return length


def scales_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the scales of a tensor: a number for each block of each row."""
    return shape[0], -(-row_length(shape) // BLOCK)


def has_rows_in_order(tensor: Tensor) -> bool:
    """Tell whether a tensor fills its memory without gaps, one row after the other."""
    if tensor.dim() == 0:
        return False
    length = row_length(tensor.shape)
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    return tensor.numel() == 0 or (extent == length - 1 and (tensor.shape[0] == 1 or tensor.stride(0) == length))


def is_coded(param: Tensor, min_size: int) -> bool:
    """Tell whether the momentum of a whole layer is coded, by its shape and dtype alone."""
    return (
        param.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and param.numel() >= max(min_size, 1)
        and param.dim() <= MAX_DIMS
        and has_rows_in_order(param)
        and row_length(param.shape) >= MIN_ROW
    )


def in_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as a matrix of rows, each in the order of ``like``'s memory. A view if both have one order."""
    return _in_order(tensor, like).reshape(like.shape[0], row_length(like.shape))


def _in_order(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.permute(0, *_dims_in_order(like))


def order_of(tensor: Tensor) -> int:
    """Return the dimensions after the first from the outermost in memory to the innermost, a digit each.

    123 is the order of contiguous tensors with four dimensions, 231 that of channels_last.
    """
    return int("".join(map(str, _dims_in_order(tensor))))


def is_order(number: int, dims: int) -> bool:
    """Tell whether a number is the order of a tensor with so many dimensions."""
    return sorted(str(number)) == [str(dim) for dim in range(1, dims)]


def laid_out(tensor: Tensor, order: int) -> Tensor:
    """Return a tensor in a memory order of :func:`order_of`: itself if it has that order, or a copy."""
    dims = [0, *map(int, str(order))]
    ordered = tensor.permute(dims)
    if ordered.is_contiguous():  # whatever the strides of dimensions with one index
        return tensor
    return ordered.contiguous().permute(sorted(range(len(dims)), key=dims.__getitem__))


def _dims_in_order(like: Tensor) -> list[int]:
    return sorted(range(1, like.dim()), key=like.stride, reverse=True)


def decode(codes: Tensor, scales: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the momentum, float32, in the shape of its codes, whose rows lie in the order of ``like``'s memory."""
    like = codes if like is None else like
    momentum = torch.empty_like(like, dtype=torch.float32)
    of_elements = scales.repeat_interleave(BLOCK, dim=1)[:, : row_length(codes.shape)]
    _write_rows(momentum, in_rows(codes, like).float() * of_elements, like)
    return momentum


def encode(
    codes: Tensor, momentum: Tensor, params: Tensor | None = None, *, offset: int = 0, whole_row_length: int = 0
) -> Tensor:
    """Write the codes of a momentum, and return their scales.

    Args:
        codes: int8, written in place; its memory is in the order of its rows.
        momentum: of its shape.
        params: the parameter w before the step, of its shape, for the dither; None rounds to nearest, half to even.
        offset: the position of the first element in the whole layer; with ``params`` only, as what follows.
        whole_row_length: the number of elements of a row of the whole layer.

    Returns:
        The scales, float32, of :func:`scales_shape`.
    """
    rows = in_rows(momentum, codes).float()
    padding = -rows.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(rows, (0, padding)).reshape(*scales_shape(codes.shape), BLOCK)
    largest = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(dim=2)  # integers: NaN and infinity are the largest
    number = largest.view(torch.float32)
    most = torch.full_like(number, MAX_CODE)  # a scalar would be divided in two roundings
    is_coded = ((largest >= _LEAST) & (largest < _INFINITY))[:, :, None]
    z = blocks * torch.where(is_coded, (most / number)[:, :, None], 0.0)
    if params is None:
        z = z.round()
    else:
        hashed = torch.nn.functional.pad(in_rows(params, codes).float(), (0, padding)).reshape(blocks.shape)
        z = (z + _dither(blocks, hashed, largest[:, :, None], offset, whole_row_length)).floor()
    rounded = torch.where(is_coded, z.clamp(-MAX_CODE, MAX_CODE), 0.0).to(torch.int8)
    _write_rows(codes, rounded.flatten(1)[:, : rows.shape[1]], codes)
    scales = torch.where(is_coded[:, :, 0], number / most, 0.0)
    return torch.where(largest < _INFINITY, scales, torch.nan)


def _dither(momentum: Tensor, params: Tensor, largest: Tensor, offset: int, whole_row_length: int) -> Tensor:
    """Return the dither of each element of blocks."""
    rows, per_row, _ = momentum.shape
    device = momentum.device
    of_rows = offset + whole_row_length * torch.arange(rows, device=device)[:, None]
    position = (of_rows + torch.arange(per_row * BLOCK, device=device)).reshape(momentum.shape)
    salt = _bits(params) + _product(position, 0x7F4A7C15) + _product(largest, 0xC2B2AE3D)
    hashed = _product(_bits(momentum), 0x9E3779B1) ^ (salt & 0xFFFFFFFF)
    hashed = _product(hashed ^ (hashed >> 16), 0x7FEB352D)
    hashed = _product(hashed ^ (hashed >> 15), 0x846CA68B)
    hashed = hashed ^ (hashed >> 16)
    return (hashed >> 8).float() * 2.0**-24


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32).long() & 0xFFFFFFFF


def _product(tensor: Tensor, factor: int) -> Tensor:
    """Return a product modulo 2³², of integers below that in int64, which wraps around."""
    return (tensor.long() & 0xFFFFFFFF) * factor & 0xFFFFFFFF


def _write_rows(tensor: Tensor, rows: Tensor, like: Tensor) -> None:
    ordered = _in_order(tensor, like)
    ordered.copy_(rows.reshape(ordered.shape))
