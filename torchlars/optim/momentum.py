"""Momentum buffers of a fused base: how they are initialized, laid out in memory, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import sharding
from torchlars.options import Group, is_capturing, non_negative_number, number_in

__all__: list[str] = []


def momentum_dtype_of(param: Tensor, momentum_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a parameter's momentum. ``momentum_dtype`` is for 16-bit parameters."""
    return momentum_dtype if momentum_dtype is not None and param.dtype.itemsize == 2 else param.dtype


def momentum_like(param: Tensor, buffer: Tensor | None, dtype: torch.dtype, group: int) -> Tensor:
    """Return a momentum buffer as a kernel takes it, beside its parameter: of its memory order and sharding, and dense.

    Args:
        param: the parameter.
        buffer: the momentum that there is; None begins one with zeros.
        dtype: that of the momentum.
        group: the parameter's group, for the error.

    Returns:
        The buffer itself where it is so already.

    Raises:
        RuntimeError: a new one is needed while a CUDA graph is captured.
    """
    like = None
    if buffer is not None:  # torch begins a sparse one from a sparse gradient
        like = buffer.to_dense() if buffer.is_sparse else sharding.placed_like(param, buffer)
        local_param = sharding.local(param)
        strides = local_param.stride()
        if not local_param.is_contiguous():  # gaps between the elements of a parameter have no momentum
            strides = torch.empty_like(local_param, device="meta").stride()
        if like.dtype != dtype or sharding.local(like).stride() != strides:
            like = torch.zeros_like(param, dtype=dtype, requires_grad=False).copy_(like)
    else:
        like = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    if like is not buffer:
        check_can_begin(param, group)
    return like


def check_can_begin(param: Tensor, group: int) -> None:
    """Raise if every replay of a CUDA graph would initialize a parameter's momentum again."""
    if not torch.compiler.is_compiling() and is_capturing(param.device):
        raise RuntimeError(
            "momentum must exist before a CUDA graph is captured, in its final dtype and memory order, or replays "
            f"begin it anew (group: {group}, shape: {tuple(param.shape)}); take a step before the capture"
        )


def problem_of_momentum(param: Tensor, name: str, buffer: Any) -> str | None:
    """Return why what the state holds under a name cannot be a parameter's momentum, or None."""
    if not isinstance(buffer, Tensor):
        return f"momentum must be a tensor ({name}: {buffer!r})"
    if buffer.layout not in (torch.strided, torch.sparse_coo):
        return f"momentum must be strided or sparse COO ({name}: {buffer.layout})"
    if buffer.shape != param.shape:
        return f"momentum must have its parameter's shape ({name}: {tuple(buffer.shape)})"
    if sharding.is_distributed(buffer) != sharding.is_distributed(param):
        kind = "a DTensor" if sharding.is_distributed(buffer) else "a whole tensor"
        return f"momentum must be distributed as its parameter is ({name}: {kind})"
    return None


class MomentumOptimizer(Optimizer):
    """An optimizer whose groups say the dtype of its momentum, by a key ``momentum_dtype``: saving and loading.

    To be put before a class of :mod:`torch.optim`, whose state dicts it reads.
    """

    #: The state's keys of momentum.
    momentum_keys: ClassVar[tuple[str, ...]]

    def check_group(self, of_group: str, group: Group) -> None:
        """Raise if no step can be taken with the hyper-parameters of a group."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, of plain types and tensors: ``momentum_dtype`` is in it by its name.

        torch.distributed.checkpoint gathers nothing else to one rank.
        """
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            if group.get("momentum_dtype") is torch.float32:
                group["momentum_dtype"] = "float32"
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the class of :mod:`torch.optim` that it is derived from.

        Momentum becomes of the dtype that ``momentum_dtype`` asks for. A group keeps a key of its own where the state
        dict has none, as torch's own have.

        Raises:
            TypeError, ValueError: a hyper-parameter or a momentum is impossible.

        Whatever raises, nothing was loaded then.
        """
        own_keys = [{key: group[key] for key in ("momentum_dtype",) if key in group} for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def check(_: Any, final: dict[str, Any]) -> None:
            self._check_state_dict(final)
            loaded.update(final)

        handle = self.register_load_state_dict_pre_hook(check)  # after all others
        before = self.param_groups, self.state
        try:
            super().load_state_dict(state_dict)
            self._load_momentum(loaded, own_keys)
        except BaseException:
            self.param_groups, self.state = before  # torch replaces both, and does not change them
            raise
        finally:
            handle.remove()

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise if no step could be taken with what a state dict holds."""
        for index, group in enumerate(state_dict["param_groups"]):
            dtype = group.get("momentum_dtype", self.defaults.get("momentum_dtype"))
            numbers = {**self.defaults, **group, "momentum_dtype": torch.float32 if dtype == "float32" else dtype}
            self.check_group(f" of parameter group {index}", numbers)
            if isinstance(numbers["lr"], Tensor) and numbers["lr"].device.type == "cpu":
                name = f"lr of parameter group {index}"
                non_negative_number(name, number_in(name, numbers["lr"]))
        if not isinstance(state_dict["state"], dict):
            raise TypeError(f"state_dict['state'] must be a dict (got: {type(state_dict['state']).__name__})")
        for key, state in state_dict["state"].items():
            where = f"state_dict['state'][{key!r}]"
            if not isinstance(state, dict):
                raise TypeError(f"{where} must be a dict (got: {type(state).__name__})")
            for name in self.momentum_keys:
                if not isinstance(state.get(name), Tensor | None):
                    raise TypeError(f"{where}[{name!r}] must be a tensor or None (got: {type(state[name]).__name__})")

    def _load_momentum(self, loaded: dict[str, Any], own_keys: Sequence[dict[str, Any]]) -> None:
        """Give loaded momentum the dtype that groups ask for: torch has rounded it to the parameters' dtype."""
        for group, own in zip(self.param_groups, own_keys, strict=True):
            group.update({**own, **group})
            if group.get("momentum_dtype") == "float32":
                group["momentum_dtype"] = torch.float32
        ids: Iterator[Any] = (i for group in loaded["param_groups"] for i in group["params"])
        for group in self.param_groups:
            momentum_dtype = group.get("momentum_dtype", self.defaults.get("momentum_dtype"))
            for param, i in zip(group["params"], ids, strict=False):  # the next group goes on with ids
                for name in self.momentum_keys:
                    buffer = loaded["state"].get(i, {}).get(name)
                    if buffer is not None:
                        dtype = momentum_dtype_of(param, momentum_dtype)
                        self.state[param][name] = buffer.to(device=param.device, dtype=dtype)
