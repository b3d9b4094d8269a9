"""Every op on layers that kernels find hard, small enough to run under a sanitizer, and compared with the reference.

``python -m benchmarks.gpu_check.cases``. All that is read on the device is copied there from the host: a sanitizer that
looks at torchlars' kernels alone does not see what torch's kernels write, and would report it as never written. For the
same reason all layers are dense: torch copies others.

The other scripts call no op by its name: what they need of the ops is here.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchlars import _extension, codes, reference  # also loads the ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCES = {torch.int8: 0, torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
INVERSES = (None, 0.125, 0.0)  # of the scale of gradients: not given, given, and a step that is skipped

#: What LAMB over AdamW has of ``adam_``, and the first of two calls, which measures.
LAMB = {"of_updates": True, "decoupled_weight_decay": True}
FIRST_PART = {**LAMB, "ratios": None, "squared_norms": True}

#: Around the widths of packs, blocks and chunks; with empty layers first, last and in between.
SMALL = (0, 1, 3, 7, 64, 0, 255, 257, 70 * 257, 1025, 4099, 16383, 16385, 3 * 16384 + 5, 0)
#: More than one launch takes, of any op.
MANY = tuple(1 + i % 5 for i in range(1250))
#: More chunks than a block has threads, for the ops that add partial sums.
LONG = (260 * 16384 + 3, 5)
EMPTY = (0, 0)

MISALIGNED = ("", "p", "g", "pg")  # which of a layer's tensors begin one element behind a border

#: All ops, those with ratios in two modes: measured by the op, or given. Of those that measure, layers may be LONG.
MEASURE = ("squared_norms", "squared_norms of sums")
MEASURE += tuple(f"{op} that measures" for op in ("scale_gradients_", "scale_updates_", "sgd_", "adam_"))
OPS = (*MEASURE, "trust_ratios", "scale_gradients_", "scale_updates_", "sgd_", "adam_")
NOT_TAKEN = {
    "squared_norms": ("others", "scales"),
    **dict.fromkeys(("scale_gradients_", "sgd_", "adam_"), ("trust_coefs", "eps")),
    "scale_updates_": ("trust_coefs", "eps", "lrs"),
}


@dataclass(frozen=True)
class Case:
    """One call of an op. Its options replace arguments that the op would get otherwise."""

    op: str
    dtype: torch.dtype
    sizes: Sequence[int]
    inverse: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {dtype}, {len(self.sizes)} layers, inv_scale {self.inverse}{options}"


def parameters(op: str) -> list[str]:
    """Return the names of what an op takes in its mode."""
    function = getattr(reference, op.partition(" ")[0])
    return [name for name in inspect.signature(function).parameters if name not in NOT_TAKEN.get(op, ())]


def takes_inv_scale(op: str) -> bool:
    """Return whether an op takes the inverse of a scale."""
    return "inv_scale" in parameters(op)


def cases() -> Iterator[Case]:
    """Return all calls."""
    for dtype in DTYPES:
        for op, options in options_of_ops(dtype):
            for inverse in INVERSES if takes_inv_scale(op) else (None,):
                yield Case(op, dtype, SMALL, inverse, options)
    for sizes in (MANY, LONG, EMPTY):
        for op in MEASURE if sizes is LONG else OPS:
            yield Case(op, torch.float32, sizes, 0.125 if takes_inv_scale(op) else None)
        yield Case("adam_ that measures", torch.float32, sizes, 0.125, LAMB)
        yield Case("adam_", torch.float32, sizes, 0.125, FIRST_PART)
    yield Case("sgd_ that measures", torch.float64, MANY, None, {"nesterov": True})


def options_of_ops(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return ops with the options to try."""
    every_dialect = {"maximize": True, "decayed_norm": True, "clip": True, "lr_in_momentum": True, "lr_tensor": 0.7}
    yield "squared_norms", {}
    yield "squared_norms of sums", {}
    for options in ({}, {"clip": True, "lr_tensor": 0.7}):
        yield "trust_ratios", options
        yield "trust_ratios", {**options, "of_updates": True}
        yield "scale_updates_ that measures", options
    yield "scale_gradients_", {"lrs": ()}
    yield "scale_gradients_", {"maximize": True, "lr_in_momentum": True, "lr_tensor": 0.7}
    yield "scale_gradients_", {"ratios": None}
    yield "scale_updates_", {}
    yield "scale_gradients_ that measures", {}
    yield "scale_gradients_ that measures", every_dialect
    for momentum in (None, *dict.fromkeys((dtype, torch.float32 if dtype.itemsize == 2 else dtype))):
        yield "sgd_", {"momentum_dtype": momentum, "nesterov": momentum == dtype}
        yield "sgd_ that measures", {"momentum_dtype": momentum, "nesterov": momentum == torch.float32}
    yield "sgd_", {"ratios": None, "lr_tensor": 0.7}
    if dtype != torch.float64:  # with given ratios: where a measured one differs by rounding, so does the dither
        for nesterov in (False, True):
            yield "sgd_", {"momentum_dtype": torch.int8, "nesterov": nesterov}
    yield "sgd_ that measures", every_dialect
    for moment in dict.fromkeys((dtype, torch.float32 if dtype.itemsize == 2 else dtype)):
        yield "adam_", {**LAMB, "moment_dtype": moment}
        yield "adam_ that measures", {**LAMB, "moment_dtype": moment}
    yield "adam_", FIRST_PART
    yield "adam_", {**LAMB, "grads": []}
    yield "adam_", {"ratios": None, "lr_tensor": 0.7}
    yield "adam_", {"maximize": True}
    yield "adam_ that measures", {"decoupled_weight_decay": True}
    yield "adam_ that measures", {"of_updates": True, "maximize": True, "clip": True, "lr_tensor": 0.7}
    yield "adam_ that measures", {name: every_dialect[name] for name in every_dialect if name != "lr_in_momentum"}


def arguments(case: Case) -> dict[str, Any]:
    """Return a case's arguments, on the CPU: those that its op takes, out of all that any op takes."""
    random = torch.Generator().manual_seed(len(str(case)))
    real = torch.float64 if case.dtype == torch.float64 else torch.float32
    names, options = parameters(case.op), dict(case.options)
    momentum_dtype, moment_dtype = (options.pop(name, case.dtype) for name in ("momentum_dtype", "moment_dtype"))
    is_coded = momentum_dtype == torch.int8

    def tensors(scale: float, kind: str, dtype: torch.dtype = case.dtype) -> list[Tensor]:
        if case.sizes is MANY:  # out of one: under a sanitizer an allocation takes longer than a layer's step
            whole = scale * torch.randn(sum(MANY), generator=random, dtype=torch.float64)
            return [in_rows(part) for part in whole.to(dtype).split(list(MANY))]
        found = []
        for i, numel in enumerate(case.sizes):  # each of a scale of its own
            values = scale * (1 + i % 7) * torch.randn(numel + 1, generator=random, dtype=torch.float64)
            first = int(kind in MISALIGNED[i % len(MISALIGNED)])
            found.append(in_rows(values.to(dtype)[first : first + numel]))
        return found

    def in_rows(values: Tensor) -> Tensor:
        length = 257 if values.numel() % 257 == 0 else max(values.numel(), 1)
        return values.view(-1, length) if is_coded else values

    def scales() -> list[Tensor]:
        shapes = [codes.scales_shape(tensor.shape) for tensor in tensors(1.0, "p")]
        return [0.01 + torch.rand(shape, generator=random) for shape in shapes]

    def numbers(*cycle: float) -> list[float]:
        return [cycle[i % len(cycle)] for i in range(len(case.sizes))]

    def vector(dtype: torch.dtype, first: float) -> Tensor:
        found = 0.1 + torch.rand(len(case.sizes), generator=random, dtype=torch.float64).to(dtype)
        found[0] = first
        return found

    values: dict[str, Callable[[], Any]] = {
        "tensors": lambda: tensors(1.0, "p"),
        "others": lambda: tensors(0.3, "g"),
        "scales": lambda: numbers(0.1, 0.0, -1.0),
        "params": lambda: tensors(0.1 if "old_params" in names else 1.0, "p"),
        "old_params": lambda: tensors(1.0, "g"),
        "grads": lambda: tensors(0.3, "g"),
        "momentum_buffers": lambda: tensors(3 if is_coded else 0.2, "g", momentum_dtype) if momentum_dtype else [],
        "momentum_scales": lambda: scales() if is_coded else None,
        "exp_avgs": lambda: tensors(0.2, "g", moment_dtype),
        "exp_avg_sqs": lambda: [tensor.square_().add_(0.05) for tensor in tensors(0.2, "p", moment_dtype)],
        "steps": lambda: [torch.tensor(step) for step in numbers(float("grads" in options), 1.0, 100.0)],
        "beta1": lambda: 0.9,
        "beta2": lambda: 0.99,
        "adam_eps": lambda: 1e-8,
        "squared_norms": lambda: None,
        "row_lengths": list,
        "offsets": list,
        "param_squared_norms": lambda: vector(torch.float64, 0),
        "grad_squared_norms": lambda: vector(torch.float64, 0).flip(0),
        "ratios": lambda: vector(real, 1),
        "dtype": lambda: real,
        "weight_decays": lambda: numbers(0.1, 0.0, 0.01),
        "trust_coefs": lambda: numbers(0.5, 0.1, 1.0),
        "eps": lambda: numbers(0.0, 1e-8, 0.1),
        "lrs": lambda: numbers(0.05, 0.025, 0.2) if "steps" in names else numbers(0.5, 0.25, 2.0),
        "momentums": lambda: numbers(0.9, 0.5) if momentum_dtype else numbers(0.0),
        "dampenings": lambda: numbers(0.0) if options.get("nesterov") else numbers(0.0, 0.1),
        "lr_tensor": lambda: None,
        "inv_scale": lambda: None if case.inverse is None else torch.tensor(case.inverse, dtype=torch.float32),
    }
    flags = ("maximize", "nesterov", "clip", "decayed_norm", "lr_in_momentum", "of_updates", "decoupled_weight_decay")
    values |= dict.fromkeys(flags, lambda: False)
    if "lr_tensor" in options:
        options["lr_tensor"] = torch.tensor(options["lr_tensor"], dtype=torch.float64)
    if "squared_norms" in options:
        options["squared_norms"] = torch.empty(2 * len(case.sizes), dtype=torch.float64)
    found = {name: options[name] if name in options else values[name]() for name in names}
    if "old_params" in names:  # parameters are those after an update
        for param, old in zip(found["params"], found["old_params"], strict=True):
            param += old
    return found


def copied(value: Any, device: torch.device, wholes: dict[int, Tensor]) -> Any:
    """Return an argument with copies of its tensors on a device, each of which begins where the original does.

    What shares memory goes on sharing it: ``wholes`` has the copies that were made, by the addresses of the originals.
    """
    if isinstance(value, list):
        return [copied(each, device, wholes) for each in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in wholes:
        whole = torch.empty(0, dtype=value.dtype).set_(storage)
        wholes[storage.data_ptr()] = whole.clone() if device.type == "cpu" else whole.to(device)
    return wholes[storage.data_ptr()].as_strided(value.shape, value.stride(), value.storage_offset())


def check(case: Case, device: torch.device) -> None:
    """Call the op on a device and the reference on the CPU, and compare what they return and what they wrote.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    on_cpu = arguments(case)
    wholes: dict[int, Tensor] = {}
    on_device = {name: copied(value, device, wholes) for name, value in on_cpu.items()}
    with torch.no_grad():
        op = case.op.partition(" ")[0]
        result = getattr(torch.ops.torchlars, op)(**on_device)
        expected = getattr(reference, op)(**on_cpu)
    compare(case, "result", result, expected)
    for name, value in on_cpu.items():
        compare(case, name, on_device[name], value)


def compare(case: Case, name: str, actual: Any, expected: Any) -> None:
    """Compare the tensors of an argument or a result."""
    if isinstance(expected, list):
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            compare(case, f"{name}[{i}]", one, other)
    elif isinstance(expected, Tensor):
        is_norm = expected.dtype == torch.float64 and case.dtype.itemsize == 2  # summed in float32, two at a time
        of_updates = name in ("squared_norms", "ratios") and "of_updates" in case.options  # of moments that are rounded
        is_norm = is_norm and not of_updates
        rtol = 2.0**-23 if is_norm else TOLERANCES[case.dtype if of_updates else expected.dtype]
        atol = 0.0 if is_norm else rtol
        where = f"{case}: {name} differs from the reference"
        torch.testing.assert_close(actual.cpu(), expected, rtol=rtol, atol=atol, msg=lambda how: f"{where}\n{how}")


def plant(fault: str) -> None:
    """Have a kernel of torchlars do what a sanitizer must report. What reports nothing here reports nothing at all.

    It needs PYTORCH_NO_CUDA_MEMORY_CACHING, or the memory behind a tensor is another tensor's and not out of bounds.
    """
    if fault == "memcheck":
        tensor = torch.ones(4096).cuda()
        tensor.untyped_storage().resize_(64)  # bytes; the tensor goes on claiming 16 KiB
    else:
        tensor = torch.empty(4096, device="cuda")
    torch.ops.torchlars.squared_norms([tensor])
    torch.cuda.synchronize()


def passes(elements: int, device: torch.device) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return by name how many bytes a pass reads and writes for each byte of a tensor, and the pass."""
    ops = torch.ops.torchlars
    param, grad, momentum, target = (torch.full((elements,), value, device=device) for value in (1.0, 1.0, 0.0, 0.0))
    how = {"maximize": False, "weight_decays": [1e-12], "ratios": torch.ones(1, device=device)}
    measured = {**how, "trust_coefs": [1.0], "eps": [0.0]}
    numbers = {"lrs": [1e-9], "momentums": [0.9], "dampenings": [0.0]}
    return {
        "copy": (2, lambda: target.copy_(param)),
        "norm pass": (2, lambda: ops.squared_norms([param, grad])),
        "norm of one tensor": (1, lambda: ops.squared_norms([param])),
        "scale pass": (3, lambda: ops.scale_gradients_([grad], [param], **how)),
        "both, as LARS calls them": (5, lambda: ops.scale_gradients_([grad], [param], **measured)),
        "update pass": (5, lambda: ops.sgd_([param], [grad], [momentum], **how, **numbers)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--plant", choices=("memcheck", "initcheck"), help="do what that tool must report, on a GPU")
    args = parser.parse_args(argv)
    if _extension.extension is None:
        sys.exit(f"torchlars has no extension: {_extension.reason}")
    if args.plant:
        plant(args.plant)
        return
    torch.set_num_threads(1)  # of the reference: layers are small
    count = 0
    for case in cases():
        check(case, torch.device(args.device))
        count += 1
    print(f"{count} cases agree with the reference")


if __name__ == "__main__":
    main()
