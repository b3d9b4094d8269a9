"""A device of PrivateUse1's, made of plain Python: its tensors are on the CPU, and torch does not know.

Whoever imports it has it for good, and as its accelerator: tests/test_devices.py runs it as a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import torchlars
from torchlars import LAMB, LARS

_setup_privateuseone_for_python_backend("toy")

calls: list[str] = []  # of operators that ran on the device


class ToyTensor(Tensor):
    """A tensor on the toy device; ``on_cpu`` holds its values."""

    on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # what comes to the CPU is a plain tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"toy({self.on_cpu})"


def toy(values: Tensor) -> Any:
    """Return a tensor on the toy device that shares memory with one on the CPU."""
    tensor = torch._C._acc.create_empty_tensor(values.shape, values.dtype)
    tensor.__class__ = ToyTensor
    tensor.on_cpu = values
    return tensor


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    calls.append(op.name())
    of_values: dict[int, Tensor] = {}

    def to_values(x: Any) -> Any:
        if isinstance(x, ToyTensor):
            of_values[id(x.on_cpu)] = x
            return x.on_cpu
        return torch.device("cpu") if isinstance(x, torch.device) else x

    result = op(*tree_map(to_values, args), **tree_map(to_values, kwargs))

    def to_toys(x: Any) -> Any:  # what was written in place is the very tensor that was given
        if not isinstance(x, Tensor):
            return x
        return of_values[id(x)] if id(x) in of_values else toy(x)

    return tree_map(to_toys, result)


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    values = [x.on_cpu if isinstance(x, ToyTensor) else x for x in (source, to)]
    values[1].copy_(values[0])
    return to


_library = torch.library.Library("aten", "IMPL")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
for _op in (torch.ops.aten.empty.memory_format, torch.ops.aten.detach.default, torch.ops.aten.alias.default):
    # The fallback comes after what torch has for every device, which would lose what stands behind a toy tensor.
    _library.impl(
        _op.name().removeprefix("aten::"), lambda *args, op=_op, **kwargs: _run(op, *args, **kwargs), "PrivateUse1"
    )
_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(_run, "PrivateUse1")


def steps_on(place: Callable[[Tensor], Tensor], make: Callable[[list[Tensor]], Any]) -> list[Tensor]:
    """Return parameters after three steps, of which the second stays on the CPU."""
    params = [place(torch.tensor([3.0, 4.0])), torch.tensor([5.0, 2.0]), place(torch.arange(6.0).reshape(2, 3) + 1)]
    grads = [torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]), torch.ones(2, 3)]
    optimizer = make(params)
    for _ in range(3):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone() if param.device.type == "cpu" else place(grad.clone())
        optimizer.step()
    ratios = optimizer.trust_ratios()
    assert all(ratios[param].device == param.device for param in params)
    return [param.cpu() for param in params] + [ratios[param].cpu() for param in params]


MOMENTUM = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
OPTIMIZERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "LARS(SGD)": lambda params: LARS(torch.optim.SGD(params, **MOMENTUM), trust_coef=0.3),
    "LARS(torchlars SGD)": lambda params: LARS(torchlars.optim.SGD(params, **MOMENTUM), norm="decayed", clip=True),
    "LARS(SGD), of updates": lambda params: LARS(torch.optim.SGD(params, **MOMENTUM), apply_to="update"),
    "LAMB(AdamW)": lambda params: LAMB(torch.optim.AdamW(params, lr=0.01)),
}


def main() -> None:
    """Compare steps on the toy device with those on the CPU, bit for bit."""
    for name, make in OPTIMIZERS.items():
        calls.clear()
        with torch.inference_mode():  # autograd's views of a toy tensor would lose what stands behind it
            results = steps_on(toy, make)
        assert "aten::sqrt.out" in calls, "the reference did not run on the device"
        expected = steps_on(lambda values: values, make)
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other, rtol=1e-6, atol=0)
        print(f"{name}: {len(calls)} operators ran on {torch.device('toy')}")


if __name__ == "__main__":
    main()
