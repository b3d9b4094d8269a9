"""What parameters and their gradients must be for a step, and gradients that can be written in place."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import ops, sharding
from torchlars.bases import problem_of_sparse

__all__: list[str] = []

WRONG_DTYPE = "parameters must be of a real or complex floating dtype with at least 16 bits"


@torch.no_grad()
def copies(params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Return copies of parameters, by parameter; of sharded ones, of their local part."""
    distinct = list(dict.fromkeys(params))
    here = [sharding.local(param) for param in distinct]
    copied = [torch.empty_like(tensor) for tensor in here]
    if copied:
        torch._foreach_copy_(copied, here)  # torch 2.11 has no _foreach_clone
    return dict(zip(distinct, copied, strict=True))


def check_param(group: int, position: int, param: Tensor) -> None:
    """Raise if a parameter cannot be a layer."""
    problem = sharding.problem_of(param) or problem_of_memory(param)
    if problem is None and param.dtype not in ops.DTYPES:
        raise TypeError(
            f"{WRONG_DTYPE} (group: {group}, parameter: {position}, dtype: {param.dtype}); leave others to the base: "
            "trust_coef=None in their group"
        )
    if problem is not None:
        raise RuntimeError(f"{problem} (group: {group}, parameter: {position}, shape: {tuple(param.shape)})")


def problem_of_memory(param: Tensor) -> str | None:
    """Return why a parameter with its gradient has no memory that can be written, or None."""
    if torch.compiler.is_compiling():  # asking would cause a graph break
        return None
    here = sharding.local(param)
    if here.is_inference() and not torch.is_inference_mode_enabled():
        return "parameters must not be inference tensors, which can be written in inference mode only; clone them"
    if not ops.has_memory(here):
        return "parameters must have memory (got: one whose storage was freed)"
    grad = param.grad
    if grad is not None and not ops.has_memory(memory_of(grad)):
        return "gradients must have memory (got: one whose storage was freed)"
    return None


def check_layer(group: int, position: int, param: Tensor, weight_decay: float, optim: Optimizer) -> None:
    """Raise if a parameter with its gradient cannot be adapted, or the base is known not to take it."""
    check_param(group, position, param)
    problem = problem_of_gradient(param, weight_decay)
    if problem is None and param.grad is not None and param.grad.is_sparse:
        problem = problem_of_sparse(optim, group)
    if problem is not None:
        raise RuntimeError(f"{problem} (group: {group}, parameter: {position}, shape: {tuple(param.shape)})")


def problem_of_gradient(param: Tensor, weight_decay: float) -> str | None:
    """Return why a gradient cannot be adapted, or None."""
    grad = param.grad
    assert grad is not None
    if grad.layout not in (torch.strided, torch.sparse_coo):
        return f"gradients must be strided or sparse COO (layout: {grad.layout})"
    if grad.is_sparse and weight_decay != 0:
        return f"sparse gradients need weight_decay=0 (weight_decay: {weight_decay})"
    if grad.shape != param.shape:
        return f"gradients must have their parameter's shape (gradient: {tuple(grad.shape)})"
    if grad.device != param.device:
        return f"gradients must be on their parameter's device (parameter: {param.device}, gradient: {grad.device})"
    if grad.dtype not in ops.DTYPES or grad.is_complex() != param.is_complex():
        return f"gradients must be of their parameter's kind (parameter: {param.dtype}, gradient: {grad.dtype})"
    return sharding.problem_of_gradient(param)


def memory_of(tensor: Tensor) -> Tensor:
    """Return the strided tensor that holds the local elements of a tensor."""
    return tensor._values() if tensor.is_sparse else sharding.local(tensor)


def writable_gradient(param: Tensor) -> Tensor:
    """Return the local part of a gradient, or the values of a sparse one, so that it can be written in place.

    ``.grad`` is replaced first by a copy if elements share memory (expanded, overlapping), if it is lazily conjugated
    or negated, or if it was made in inference mode; by its coalesced form if it is sparse and uncoalesced. A gradient
    whose placements differ from its parameter's is redistributed.
    """
    assert param.grad is not None
    grad = sharding.placed_like(param, param.grad)
    here = sharding.local(grad)
    is_inference = not torch.compiler.is_compiling() and here.is_inference()  # asking would cause a graph break
    if grad.is_sparse:
        grad = grad.coalesce()
        if not ops.is_writable_in_place(grad._values()):
            values = grad._values().clone()
            grad = torch.sparse_coo_tensor(
                grad._indices(), values, grad.shape, is_coalesced=True, check_invariants=False
            )
    elif is_inference or not (here.is_contiguous() or ops.is_writable_in_place(here)):
        grad = grad.clone()
    elif not sharding.is_distributed(grad):
        grad = grad.resolve_conj().resolve_neg()
    if grad is not param.grad:
        param.grad = grad
    return grad._values() if grad.is_sparse else sharding.local(grad)


def own_gradients(written: Iterable[Tensor], params: Iterable[Tensor], state: Any) -> bool:
    """Copy gradients that are to be written and share memory. Return whether there were any.

    Two parameters may have the same gradient, or overlapping ones: scaling it for one layer would scale it for the
    other, too. A gradient may also share the memory of a parameter, or of its state, such as momentum.

    Args:
        written: the parameters whose gradients are to be written.
        params: all parameters.
        state: the base's, by parameter.
    """
    params = list(dict.fromkeys(params))
    layers = [(param, param.grad) for param in params if param.grad is not None]
    if torch.compiler.is_compiling():  # memory has no address there
        counts: dict[Tensor, int] = {}
        for _, grad in layers:
            counts[grad] = counts.get(grad, 0) + 1
        shared = [i for i, (_, grad) in enumerate(layers) if counts[grad] > 1]
    else:
        memory = [memory_of(grad) for _, grad in layers]
        memory += [sharding.local(param) for param in params]
        kept = [state.get(param) for param in params]
        values = [value for of_param in kept if isinstance(of_param, dict) for value in of_param.values()]
        memory += [memory_of(value) for value in values if isinstance(value, Tensor)]
        shared = ops.overlapping(memory)
    if len(shared) == 0:
        return False
    written = set(written)
    copied = [layers[i] for i in shared if i < len(layers) and layers[i][0] in written]
    for param, grad in copied:
        param.grad = grad.detach().clone()  # gradients may have a graph, too
    return len(copied) > 0


def undo_adaptation(param: Tensor, factor: float, weight_decay: float, inv_scale: float) -> None:
    """Undo g ← factor · (inv_scale · g + λw), but for what was lost to rounding.

    Args:
        param: w, with its gradient.
        factor: that of the gradient.
        weight_decay: λ, negative where the group maximizes.
        inv_scale: 0 if nothing was done.

    Nothing is undone where the inverse of factor times inv_scale is 0 or not finite in the dtype of the arithmetic.
    """
    if param.grad is None or factor * inv_scale == 0:
        return
    grad, here = memory_of(param.grad), sharding.local(param)
    inverse = torch.tensor([1 / (factor * inv_scale)], dtype=torch.float64, device="cpu")
    inverse = inverse.to(ops.compute_dtype(grad.dtype, here.dtype))
    if not 0 < abs(inverse.item()) < math.inf:
        return
    decays = [abs(weight_decay) * factor]
    ops.scale_gradients_(
        [grad], [here], maximize=weight_decay > 0, weight_decays=decays, ratios=inverse.to(grad.device)
    )


def lay_out_gradients(groups: Iterable[dict[str, Any]], skipped: Collection[int] = ()) -> bool:
    """Lay out gradients in memory as their parameters are, in groups with ``fused=True``. Return whether any was not.

    torch's fused optimizers iterate over both in memory order, whatever their strides, and update the wrong elements
    where these differ (seen with 2.11 and 2.13).

    Raises:
        RuntimeError: there are gaps in a parameter, which those optimizers do not know either.
    """
    replaced = False
    for index, group in enumerate(groups):
        if not group.get("fused", False) or index in skipped:
            continue
        params = group["params"]
        for position in ops.positions_of_other_layout(params):
            param = params[position]
            grad = param.grad
            if grad is None or sharding.is_distributed(param) or grad.layout != torch.strided:
                continue
            if _strides(param) != _strides(torch.empty_like(param, device="meta")):
                raise RuntimeError(
                    f"parameters must fill their memory without gaps where fused=True (group: {index}, parameter: "
                    f"{position}, shape: {tuple(param.shape)}, strides: {param.stride()}); use fused=False"
                )
            if grad.shape == param.shape and _strides(grad) != _strides(param):
                param.grad = torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad.detach())
                replaced = True
    return replaced


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides that matter: those of dimensions with more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def scale_updates(params: Sequence[Tensor], old_params: Sequence[Tensor], ratios: Tensor) -> None:
    """Apply trust ratios to updates. Parameters that share memory are written one after the other."""
    here = [sharding.local(param) for param in params]
    if not torch.compiler.is_compiling() and ops.overlapping(here):
        for i in range(len(here)):
            ops.scale_updates_(here[i : i + 1], old_params[i : i + 1], ratios=ratios[i : i + 1])
    else:
        ops.scale_updates_(here, old_params, ratios=ratios)
    sharding.note_writes(params)


def readable_gradient(param: Tensor) -> Tensor:
    """Return the local part of a gradient, with its parameter's placements, or the values of a sparse one."""
    assert param.grad is not None
    grad = sharding.placed_like(param, param.grad)
    if grad is not param.grad:
        param.grad = grad  # so that the base does not redistribute it again
    return grad.coalesce()._values() if grad.is_sparse else sharding.local(grad)


def check_update(group: int, position: int, param: Tensor) -> None:
    """Raise if a parameter's update cannot be scaled."""
    check_param(group, position, param)
    here = sharding.local(param)
    if here.layout != torch.strided:
        problem = f"parameters must be strided (layout: {here.layout})"
    elif not ops.is_writable_in_place(here):
        problem = f"elements of a parameter must not share memory (strides: {here.stride()})"
    elif not torch.compiler.is_compiling() and (here.is_conj() or here.is_neg()):  # asking would cause a graph break
        problem = "parameters must not be lazily conjugated or negated, since no op of ours can write them"
    else:
        return
    raise RuntimeError(f"{problem} (group: {group}, parameter: {position}, shape: {tuple(param.shape)})")
