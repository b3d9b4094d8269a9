"""Sharded layers (DTensor): the local part of each, and sums of squared norms over the ranks that hold it.

:func:`torch.distributed.fsdp.fully_shard`, tensor parallelism and both together make parameters that are ``DTensor``.
Each rank measures and updates its own shard, and the squared norm of a layer is the sum of those of its shards. That
sum, and the redistribution of gradients whose placements differ from their parameter's, are the only communication.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchlars import codes

__all__: list[str] = []


#: The error for a tensor that holds pieces of several layers.
FLAT_PARTITION = (
    "parameters must be whole layers, but this tensor is no torch.nn.Parameter and came into its group after the "
    "optimizer was wrapped, as the flat partitions of DeepSpeed ZeRO do, which hold pieces of several layers; shard by "
    "fully_shard (FSDP2) from torch.distributed.fsdp, or use DDP; give whole layers that are plain tensors to "
    "add_param_group"
)


def is_distributed(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, without importing what would make one."""
    return getattr(tensor, "device_mesh", None) is not None


def local(tensor: Tensor) -> Tensor:
    """Return the local part of a tensor: itself, or this rank's shard or replica, which shares its memory."""
    if not is_distributed(tensor):
        return tensor
    dtensor: Any = tensor
    # to_local() would make a new view of a parameter each time.
    here: Tensor = dtensor.to_local() if torch.compiler.is_compiling() else dtensor._local_tensor
    return here.wait() if hasattr(here, "wait") else here  # of a collective that may still be under way


def process_groups(param: Any) -> tuple[Any, ...]:
    """Return the process groups over which a layer is split: in each of them, every rank holds another part of it.

    A rank outside of the layer's mesh holds nothing of it, and is in none.
    """
    if not is_distributed(param) or param.device_mesh.get_coordinate() is None:
        return ()
    mesh, placements = param.device_mesh, param.placements
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def problem_of(param: Any) -> str | None:
    """Return why a parameter is not supported (FSDP1, Partial), or None."""
    if getattr(param, "_fsdp_flattened", False) or hasattr(param, "_param_numels"):  # of torch, or of fairscale
        return (
            "parameters must be whole layers, but FSDP1 flattens and splits them; use fully_shard (FSDP2) from "
            "torch.distributed.fsdp"
        )
    if is_distributed(param) and any(placement.is_partial() for placement in param.placements):
        return f"parameters must be sharded or replicated (placements: {param.placements})"
    return None


def problem_of_gradient(param: Any) -> str | None:
    """Return why a gradient does not go with its parameter, or None."""
    grad = param.grad
    assert grad is not None
    if is_distributed(grad) != is_distributed(param):
        kinds = ["a DTensor" if is_distributed(tensor) else "a whole tensor" for tensor in (param, grad)]
        return f"gradients must be distributed as their parameters are (parameter: {kinds[0]}, gradient: {kinds[1]})"
    if is_distributed(param) and grad.device_mesh != param.device_mesh:
        return (
            "gradients must be on their parameter's device mesh "
            f"(parameter: {param.device_mesh}, gradient: {grad.device_mesh})"
        )
    return None


def is_placed_like(param: Any, tensor: Any) -> bool:
    """Tell whether a tensor has its parameter's placements. Both are whole tensors, or DTensors of one mesh."""
    return not is_distributed(param) or tensor.placements == param.placements


def placed_like(param: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor with its parameter's placements: itself, or redistributed by a collective.

    A gradient may be ``Partial``, a pending sum, as SequenceParallel leaves them.
    """
    if is_placed_like(param, tensor):
        return tensor
    like: Any = param
    dtensor: Any = tensor
    return dtensor.redistribute(like.device_mesh, like.placements)  # type: ignore[no-any-return]


def place_of_rows(param: Any) -> tuple[int, int] | None:
    """Return where the rows of a layer's local part lie in the whole layer, whose rows fill its memory in order.

    Returns:
        The position of the first element here, and the number of elements of a row of the whole layer. None if on any
        rank the rows here are not consecutive, or are cut elsewhere than between blocks of :mod:`torchlars.codes`.
    """
    length = codes.row_length(param.shape)
    if not is_distributed(param):
        return 0, length
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # nothing of the layer is here
        return 0, length
    place = _place_of_rows.__wrapped__ if torch.compiler.is_compiling() else _place_of_rows
    offset = place(
        tuple(param.shape), tuple(param.stride()), tuple(mesh.shape), tuple(param.placements), tuple(coordinate)
    )
    return None if offset is None else (offset, length)


@functools.lru_cache(maxsize=4096)
def _place_of_rows(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Any, ...],
    coordinate: tuple[int, ...],
) -> int | None:
    """Return the position of the first element at a coordinate of a mesh, or None."""
    offset, length = 0, codes.row_length(shape)
    for dim in range(len(shape)):
        splits = [
            (mesh_dim, mesh_shape[mesh_dim], getattr(placement, "split_factor", 1))
            for mesh_dim, placement in enumerate(placements)
            if getattr(placement, "dim", None) == dim
        ]
        if not splits:
            continue
        unit = length if dim == 0 else length // max(shape[1], 1)  # elements of one index
        if dim > 1 or (dim == 1 and shape[1] > 1 and strides[1] != unit):
            return None
        for place in itertools.product(*(range(ranks) for _, ranks, _ in splits)):
            pieces = _pieces(shape[dim], splits, place)
            if len(pieces) > 1:
                return None
            if dim == 1:  # the scales of these blocks must be on the same rank
                ends = [(i * unit / codes.BLOCK, -(-j * unit // codes.BLOCK)) for i, j in pieces]
                if ends != _pieces(codes.scales_shape(shape)[1], splits, place):
                    return None
        here = _pieces(shape[dim], splits, [coordinate[mesh_dim] for mesh_dim, _, _ in splits])
        offset += here[0][0] * unit if here else 0
    return offset


def _pieces(size: int, splits: Sequence[tuple[int, int, int]], place: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges of a dimension that are at a place, after splits as DTensor makes them.

    Args:
        size: that of the dimension.
        splits: for each a mesh dimension, its number of ranks and the ``split_factor`` of a ``_StridedShard``, or 1.
        place: the rank in each of these mesh dimensions.
    """
    pieces = [(0, size)]
    for (_, ranks, factor), rank in zip(splits, place, strict=True):
        pieces = [piece for part in range(factor) for piece in _chunk(_chunk(pieces, factor, part), ranks, rank)]
    merged: list[tuple[int, int]] = []
    for begin, end in pieces:
        if merged and merged[-1][1] == begin:
            begin = merged.pop()[0]
        merged.append((begin, end))
    return merged


def _chunk(pieces: Sequence[tuple[int, int]], chunks: int, index: int) -> list[tuple[int, int]]:
    """Return one of the chunks of some ranges, as :func:`torch.chunk` cuts what they hold."""
    total = sum(end - begin for begin, end in pieces)
    size = -(-total // chunks)
    found, first = [], 0  # first: how many elements there were before
    for begin, end in pieces:
        low, high = (min(max(bound - first + begin, begin), end) for bound in (size * index, size * (index + 1)))
        if low < high:
            found.append((low, high))
        first += end - begin
    return found


def complete(squared_norms: Iterable[tuple[Sequence[Any], Tensor]]) -> None:
    """Complete: sum squared norms over all shards, in place, by one all-reduce for each process group.

    Every rank of a group must call this with the same layers, in the same order.

    Args:
        squared_norms: vectors of local squared norms, each with the process groups over which its layers are split. A
            vector without groups stays as it is.
    """
    parts: dict[Any, list[Tensor]] = {}
    for groups, vector in squared_norms:
        for group in groups:
            parts.setdefault((group, vector.device), []).append(vector)
    for (group, _), vectors in parts.items():
        joined = vectors[0] if len(vectors) == 1 else torch.cat(vectors)
        dist.all_reduce(joined, group=group)
        if len(vectors) > 1:
            torch._foreach_copy_(vectors, torch.split(joined, [len(vector) for vector in vectors]))


def note_writes(tensors: Iterable[Tensor]) -> None:
    """Increment the versions of DTensors whose local shards were written."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if is_distributed(tensor)])
