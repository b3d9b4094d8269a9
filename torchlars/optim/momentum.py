"""Momentum of a fused base: how it is initialized, laid out in memory, coded, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import codes, ops, sharding
from torchlars.layers import memory_of
from torchlars.options import Group, is_capturing, non_negative_number, number_in

__all__: list[str] = []

#: How ``momentum_dtype`` is written in a state dict.
DTYPE_NAMES = {torch.float32: "float32", torch.int8: "int8"}
#: The keys of a group.
GROUP_KEYS = ("momentum_dtype", "min_8bit_size")
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
        is_laid_out = in_order is here and _is_in_order(param, old) and sharding.local(scales).is_contiguous()
        if dtype == torch.int8 and is_placed and is_laid_out:
            return _of_codes(old, scales, order)  # not decoded, as coding anew would round once more
        found = torch.zeros_like(old, dtype=torch.float32)
        sharding.local(found).copy_(codes.decode(in_order, sharding.local(scales)))
    if found is not None:  # torch begins a sparse one from a sparse gradient
        found = found.to_dense() if found.is_sparse else sharding.placed_like(param, found)
    if dtype == torch.int8:
        check_can_begin(param, group)
        return _coded(param, found)
    if found is not None and found.dtype == dtype and _is_in_order(param, found):
        like = found
    else:
        like = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        if found is not None:
            like.copy_(found)
    if like is not state.get(BUFFER):
        check_can_begin(param, group)
    return {BUFFER: like}


def _is_in_order(param: Tensor, tensor: Tensor) -> bool:
    """Tell whether a tensor lies in memory as its parameter does, but for gaps between the parameter's elements."""
    here = sharding.local(param)
    strides = here.stride() if here.is_contiguous() else torch.empty_like(here, device="meta").stride()
    return sharding.local(tensor).stride() == strides


def _of_codes(new: Tensor, scales: Tensor, order: Tensor | None = None) -> dict[str, Tensor]:
    if order is None and new.dim() > 2:
        order = torch.tensor(codes.order_of(sharding.local(new)), device="cpu")
    return {CODES: new, SCALES: scales} if order is None else {CODES: new, SCALES: scales, ORDER: order}


def _coded(param: Any, momentum: Tensor | None) -> dict[str, Tensor]:
    """Return the codes and scales of a momentum, which is distributed as its parameter; of zeros if it is None."""
    new: Any = torch.zeros_like(param, dtype=torch.int8, requires_grad=False)
    here = sharding.local(new)
    if momentum is None:
        scales = torch.zeros(codes.scales_shape(here.shape), dtype=torch.float32, device=here.device)
    else:
        scales = codes.encode(here, sharding.local(momentum))
    if sharding.is_distributed(param):
        shape = torch.Size(codes.scales_shape(param.shape))
        mesh, placements = param.device_mesh, param.placements
        scales = type(new).from_local(scales, mesh, placements, run_check=False, shape=shape, stride=(shape[1], 1))
    return _of_codes(new, scales)


def check_can_begin(param: Tensor, group: int) -> None:
    """Raise if every replay of a CUDA graph would initialize a parameter's momentum again."""
    if not torch.compiler.is_compiling() and is_capturing(param.device):
        raise RuntimeError(
            "momentum must exist before a CUDA graph is captured, in its final dtype and memory order, or replays "
            f"begin it anew (group: {group}, shape: {tuple(param.shape)}); take a step before the capture"
        )


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
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            return f"momentum must be a tensor ({name}: {tensor!r})"
        if not ops.has_memory(memory_of(tensor)):
            return f"momentum must have memory (got: {name} whose storage was freed)"
        if name == BUFFER:
            if tensor.layout not in (torch.strided, torch.sparse_coo):
                return f"momentum must be strided or sparse COO ({name}: {tensor.layout})"
            if tensor.shape != param.shape:
                return f"momentum must have its parameter's shape ({name}: {tuple(tensor.shape)})"
        else:
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
        if name != ORDER and sharding.is_distributed(tensor) != sharding.is_distributed(param):
            kind = "a DTensor" if sharding.is_distributed(tensor) else "a whole tensor"
            return f"momentum must be distributed as its parameter is ({name}: {kind})"
    if CODES in found and not sharding.is_placed_like(found[CODES], found[SCALES]):
        both = ", ".join(f"{name}: {found[name].placements}" for name in (CODES, SCALES))
        return f"{CODES} and {SCALES} must have the same placements ({both})"
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
            if group.get("momentum_dtype") in DTYPE_NAMES:
                group["momentum_dtype"] = DTYPE_NAMES[group["momentum_dtype"]]
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the class of :mod:`torch.optim` that it is derived from.

        Momentum becomes of the dtype that ``momentum_dtype`` asks for. A float one that becomes codes is rounded to
        nearest. A group keeps a key of its own where the state dict has none, as torch's own have.

        Raises:
            TypeError, ValueError: a hyper-parameter or a momentum is impossible.

        Whatever raises, nothing was loaded then.
        """
        own_keys = [{key: group[key] for key in GROUP_KEYS if key in group} for group in self.param_groups]
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
            numbers = {**self.defaults, **group, "momentum_dtype": _dtype_named(dtype)}
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
            for name in {*self.momentum_keys, *MOMENTUM_KEYS}:
                if not isinstance(state.get(name), Tensor | None):
                    raise TypeError(f"{where}[{name!r}] must be a tensor or None (got: {type(state[name]).__name__})")

    def momentum_dtype_of(self, param: Tensor, group: Group) -> torch.dtype:
        """Return the dtype of a parameter's momentum, int8 for codes, as its group asks for it."""
        raise NotImplementedError

    def _load_momentum(self, loaded: dict[str, Any], own_keys: Sequence[dict[str, Any]]) -> None:
        """Give loaded momentum the dtype that groups ask for: torch has cast it to the parameters' dtype."""
        for group, own in zip(self.param_groups, own_keys, strict=True):
            group.update({**own, **group})
            if "momentum_dtype" in group:
                group["momentum_dtype"] = _dtype_named(group["momentum_dtype"])
        ids: Iterator[Any] = (i for group in loaded["param_groups"] for i in group["params"])
        for index, group in enumerate(self.param_groups):
            for param, i in zip(group["params"], ids, strict=False):  # the next group goes on with ids
                saved, dtype = loaded["state"].get(i, {}), self.momentum_dtype_of(param, group)
                found = {name: saved[name] for name in MOMENTUM_KEYS if saved.get(name) is not None}
                found = {name: x.to("cpu" if name == ORDER else param.device) for name, x in found.items()}
                if found.keys() >= {BUFFER, CODES, SCALES} and found[CODES].is_floating_point():
                    found = {BUFFER: found[BUFFER]}  # torch.optim.SGD has cast the codes, and then begun anew
                if found.keys() - {BUFFER} or (found and dtype == torch.int8):
                    problem = problem_of_momentum(param, found)
                    if problem is not None:
                        raise ValueError(f"{problem} in state_dict['state'][{i!r}]")
                    set_momentum(self.state[param], momentum_like(param, found, dtype, index))
                    continue
                for name in self.momentum_keys:
                    if saved.get(name) is not None:
                        self.state[param][name] = saved[name].to(device=param.device, dtype=dtype)


def set_momentum(state: dict[str, Any], momentum: Mapping[str, Tensor]) -> None:
    """Put what :func:`momentum_like` returns into a state, in the place of momentum of another kind."""
    for name in MOMENTUM_KEYS:
        if name not in momentum and name in state:
            del state[name]
    state.update(momentum)


def _dtype_named(name: Any) -> Any:
    """Return the dtype that a state dict holds by its name, and everything else as it is."""
    return next((dtype for dtype, known in DTYPE_NAMES.items() if name == known), name)
