"""What LARS and LAMB ask of layers and their gradients, and the trust ratios of the last step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import ops, sharding
from torchlars.wrapper import OptimizerWrapper, is_base

__all__: list[str] = []


class TrustRatioWrapper(OptimizerWrapper):
    """A wrapper that remembers which trust ratios it applied last."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_step: list[tuple[Sequence[Tensor], Tensor]] = []  # changed in place, which torch 2.11 can trace

    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """Return the trust ratio of every layer that the last step adapted, by parameter.

        Each is a 0-dimensional tensor on its parameter's device; only reading its value waits for that device. Layers
        without a gradient and groups with ``trust_coef=None`` have none. Of a sharded layer it is that of the whole
        one, the same on every rank. Of a step that a scaler skipped, and of one in a CUDA graph before its replay,
        ratios mean nothing.
        """
        return {
            param: ratio
            for params, ratios in self._last_step
            for param, ratio in zip(params, ratios.unbind(), strict=True)
        }


@torch.no_grad()
def copies(params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Return what parameters hold now, by parameter; of sharded ones, what is here."""
    distinct = list(dict.fromkeys(params))
    here = [sharding.local(param) for param in distinct]
    copied = [torch.empty_like(tensor) for tensor in here]
    if copied:
        torch._foreach_copy_(copied, here)  # torch 2.11 has no _foreach_clone
    return dict(zip(distinct, copied, strict=True))


def check_param(group: int, position: int, param: Tensor) -> None:
    """Raise if a parameter cannot be a layer."""
    problem = sharding.problem_of(param)
    if problem is None and param.dtype not in ops.DTYPES:
        raise TypeError(
            f"parameters must be of a real or complex floating dtype with at least 16 bits (group: {group}, "
            f"parameter: {position}, dtype: {param.dtype}); leave others to the base: trust_coef=None in their group"
        )
    if problem is not None:
        raise RuntimeError(f"{problem} (group: {group}, parameter: {position}, shape: {tuple(param.shape)})")


def check_layer(group: int, position: int, param: Tensor, weight_decay: float) -> None:
    """Raise if a parameter with its gradient cannot be adapted."""
    check_param(group, position, param)
    problem = _problem_of_gradient(param, weight_decay)
    if problem is not None:
        raise RuntimeError(f"{problem} (group: {group}, parameter: {position}, shape: {tuple(param.shape)})")


def _problem_of_gradient(param: Tensor, weight_decay: float) -> str | None:
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


def writable_gradient(param: Tensor) -> Tensor:
    """Return what of a gradient can be written in place: itself or what is here of it, or the values of a sparse one.

    A gradient that is a view of itself (expanded, overlapping, lazily conjugated or negated) or was made in inference
    mode is replaced by its values first, an uncoalesced sparse one by its sum, and one that is distributed otherwise
    than its parameter by what a collective makes of it.
    """
    assert param.grad is not None
    grad = sharding.placed_like(param, param.grad)
    here = sharding.local(grad)
    is_inference = not torch.compiler.is_compiling() and here.is_inference()  # to ask would break a graph
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


def readable_gradient(param: Tensor) -> Tensor:
    """Return what is here of a gradient, distributed as its parameter is, or the values of a sparse one."""
    assert param.grad is not None
    grad = sharding.placed_like(param, param.grad)
    if grad is not param.grad:
        param.grad = grad  # for the base, so that it need not do the same again
    return grad.coalesce()._values() if grad.is_sparse else sharding.local(grad)


def check_update(group: int, position: int, param: Tensor) -> None:
    """Raise if a parameter's update cannot be scaled."""
    check_param(group, position, param)
    here = sharding.local(param)
    if here.layout != torch.strided:
        problem = f"parameters must be strided (layout: {here.layout})"
    elif not ops.is_writable_in_place(here):
        problem = f"elements of a parameter must not share memory (strides: {here.stride()})"
    elif not torch.compiler.is_compiling() and (here.is_conj() or here.is_neg()):  # to ask would break a graph
        problem = "parameters must not be lazily conjugated or negated, since no op of ours can write them"
    else:
        return
    raise RuntimeError(f"{problem} (group: {group}, parameter: {position}, shape: {tuple(param.shape)})")


def check_update_is_scalable(optim: Optimizer, who: str) -> None:
    """Raise if a base's update has no length per lr."""
    if is_base(optim, torch.optim.LBFGS):
        raise TypeError(
            f"{who} needs a base that takes one step along one direction (got: LBFGS, which searches along many, "
            "over all layers at once); LARS(LBFGS(...)) scales its gradients"
        )
