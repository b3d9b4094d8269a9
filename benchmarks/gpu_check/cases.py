"""Every op on layers that kernels find hard, small enough to run under a sanitizer, and compared with the reference.

``python -m benchmarks.gpu_check.cases --device cuda``. All that is read on the device comes there by a copy from the
host: a sanitizer that looks at torchlars' kernels alone does not see what torch's kernels write, and would report
it as never written. For the same reason all layers are dense: others pass through a copy by torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
INVERSES = (None, 0.125, 0.0)  # of the scale of gradients: not given, given, and a step that is skipped

#: Around the widths of packs, blocks and chunks; with empty layers first, last and in between.
SMALL = (0, 1, 3, 7, 64, 0, 255, 257, 1025, 4099, 16383, 16385, 3 * 16384 + 5, 0)
#: More than one launch takes, of any op.
MANY = tuple(1 + i % 5 for i in range(1250))
#: More chunks than a block has threads, for the ops that add partial sums.
LONG = (260 * 16384 + 3, 5)
MEASURE = (
    "squared_norms",
    "squared_norms_of_sums",
    "scale_by_trust_ratios_",
    "scale_updates_by_trust_ratios_",
    "lars_sgd_",
)
EMPTY = (0, 0)

MISALIGNED = ("", "p", "g", "pg")  # which of a layer's tensors begin one element behind a border

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    op: str
    dtype: torch.dtype
    sizes: Sequence[int]
    inverse: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {dtype}, {len(self.sizes)} layers, inv_scale {self.inverse}{options and ', '}{options}"


def cases() -> Iterator[Case]:
    """Return all calls."""
    for dtype in DTYPES:
        for inverse in INVERSES:
            for op, options in with_inv_scale(dtype):
                yield Case(op, dtype, SMALL, inverse, options)
        for op, options in without_inv_scale():
            yield Case(op, dtype, SMALL, None, options)
    for sizes in (MANY, LONG, EMPTY):
        for op in ARGUMENTS:
            if sizes is not LONG or op in MEASURE:
                yield Case(op, torch.float32, sizes, 0.125 if takes_inv_scale(op) else None)
    yield Case("lars_sgd_", torch.float64, MANY, None, {"nesterov": True, "momentum": torch.float64})


def with_inv_scale(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return ops that take the inverse of a scale, with the options to try."""
    every_dialect = {"decayed_norm": True, "clip": True, "lr_in_momentum": True, "lr_scale": 0.7}
    yield "squared_norms", {}
    yield "squared_norms_of_sums", {}
    yield "apply_trust_ratios_", {}
    yield "apply_trust_ratios_", {"maximize": True, "with_lrs": True, "lr_scale": 0.7}
    yield "scale_by_trust_ratios_", {}
    yield "scale_by_trust_ratios_", {"maximize": True, **every_dialect}
    for momentum in (None, *dict.fromkeys((dtype, torch.float32 if dtype.itemsize == 2 else dtype))):
        yield "sgd_", {"momentum": momentum, "nesterov": momentum == dtype}
        yield "lars_sgd_", {"momentum": momentum, "nesterov": momentum == torch.float32}
    yield "sgd_", {"momentum": dtype, "without_ratios": True, "lr_scale": 0.7}
    yield "lars_sgd_", {"momentum": dtype, "maximize": True, **every_dialect}


def without_inv_scale() -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the others."""
    for options in ({}, {"clip": True, "lr_scale": 0.7}):
        yield "trust_ratios", options
        yield "trust_ratios", {**options, "of_updates": True}
        yield "scale_updates_by_trust_ratios_", options
    yield "apply_trust_ratios_to_updates_", {}


def takes_inv_scale(op: str) -> bool:
    """Return whether an op takes the inverse of a scale."""
    return op in {op for op, _ in with_inv_scale(torch.float32)}


class Layers:
    """Tensors and numbers of a case, from a generator of its own. Where a tensor is misaligned, so is its copy."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(len(str(case)))

    def tensors(self, scale: float, kind: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return a tensor a layer, each of a scale of its own."""
        dtype = dtype or self.case.dtype
        if self.case.sizes is MANY:  # out of one: under a sanitizer an allocation takes longer than a layer's step
            whole = scale * torch.randn(sum(MANY), generator=self.random, dtype=torch.float64)
            return list(whole.to(dtype).split(list(MANY)))
        found = []
        for i, numel in enumerate(self.case.sizes):
            values = scale * (1 + i % 7) * torch.randn(numel + 1, generator=self.random, dtype=torch.float64)
            first = int(kind in MISALIGNED[i % len(MISALIGNED)])
            found.append(values.to(dtype)[first : first + numel])
        return found

    def numbers(self, *cycle: float) -> list[float]:
        """Return a number a layer."""
        return [cycle[i % len(cycle)] for i in range(len(self.case.sizes))]

    def vector(self, dtype: torch.dtype, low: float = 0.1) -> Tensor:
        """Return a vector with a positive element a layer."""
        return low + torch.rand(len(self.case.sizes), generator=self.random, dtype=torch.float64).to(dtype)

    def ratios(self) -> Tensor:
        """Return ratios as the ops take them."""
        return self.vector(torch.float64 if self.case.dtype == torch.float64 else torch.float32)

    def lrs(self) -> list[float]:
        """Return learning rates."""
        return self.numbers(0.5, 0.25, 2.0)

    def hyper(self) -> Arguments:
        """Return what decides on a ratio."""
        return {"trust_coefs": self.numbers(0.5, 0.1, 1.0), "eps": self.numbers(0.0, 1e-8, 0.1)}

    def weight_decays(self) -> list[float]:
        """Return weight decays, some of them 0."""
        return self.numbers(0.1, 0.0, 0.01)


def of_squared_norms(layers: Layers) -> Arguments:
    """Return what squared_norms takes."""
    return {"tensors": layers.tensors(1.0, "p")}


def of_squared_norms_of_sums(layers: Layers) -> Arguments:
    """Return what squared_norms_of_sums takes."""
    scales = layers.numbers(0.1, 0.0, -1.0)
    return {"tensors": layers.tensors(0.3, "g"), "others": layers.tensors(1.0, "p"), "scales": scales}


def of_trust_ratios(layers: Layers) -> Arguments:
    """Return what trust_ratios takes."""
    norms = [layers.vector(torch.float64) for _ in range(2)]
    norms[0][0], norms[1][-1] = 0, 0
    return {
        "param_squared_norms": norms[0],
        "grad_squared_norms": norms[1],
        "weight_decays": layers.weight_decays(),
        **layers.hyper(),
        "dtype": torch.float64 if layers.case.dtype == torch.float64 else torch.float32,
        "lrs": layers.lrs(),
    }


def of_apply(layers: Layers) -> Arguments:
    """Return what apply_trust_ratios_ takes."""
    more = {"lrs": layers.lrs()} if layers.case.options.get("with_lrs") else {}
    return {
        "grads": layers.tensors(0.3, "g"),
        "params": layers.tensors(1.0, "p"),
        "ratios": layers.ratios(),
        "weight_decays": layers.weight_decays(),
        "maximize": False,
        **more,
    }


def of_scale(layers: Layers) -> Arguments:
    """Return what scale_by_trust_ratios_ takes."""
    found = of_apply(layers) | layers.hyper() | {"lrs": layers.lrs()}
    del found["ratios"]
    return found


def of_updates(layers: Layers) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters after and before a step."""
    old = layers.tensors(1.0, "g")
    new = [(w.double() + u.double()).to(w.dtype) for w, u in zip(old, layers.tensors(0.1, "p"), strict=True)]
    return new, old


def of_apply_to_updates(layers: Layers) -> Arguments:
    """Return what apply_trust_ratios_to_updates_ takes."""
    new, old = of_updates(layers)
    ratios = layers.ratios()
    ratios[0] = 1
    return {"params": new, "old_params": old, "ratios": ratios}


def of_scale_updates(layers: Layers) -> Arguments:
    """Return what scale_updates_by_trust_ratios_ takes."""
    new, old = of_updates(layers)
    return {"params": new, "old_params": old, **layers.hyper(), "lrs": layers.lrs(), "clip": False}


def of_sgd(layers: Layers) -> Arguments:
    """Return what sgd_ takes."""
    dtype = layers.case.options.get("momentum", layers.case.dtype)
    return {
        "params": layers.tensors(1.0, "p"),
        "grads": layers.tensors(0.3, "g"),
        "momentum_buffers": layers.tensors(0.2, "g", dtype) if dtype else [],
        "ratios": None if layers.case.options.get("without_ratios") else layers.ratios(),
        "weight_decays": layers.weight_decays(),
        "lrs": layers.lrs(),
        "momentums": layers.numbers(0.9, 0.5) if dtype else layers.numbers(0.0),
        "dampenings": layers.numbers(0.0) if layers.case.options.get("nesterov") else layers.numbers(0.0, 0.1),
        "nesterov": False,
        "maximize": False,
    }


def of_lars_sgd(layers: Layers) -> Arguments:
    """Return what lars_sgd_ takes."""
    found = of_sgd(layers) | layers.hyper()
    del found["ratios"]
    return found


ARGUMENTS: dict[str, Callable[[Layers], Arguments]] = {
    "squared_norms": of_squared_norms,
    "squared_norms_of_sums": of_squared_norms_of_sums,
    "trust_ratios": of_trust_ratios,
    "apply_trust_ratios_": of_apply,
    "scale_by_trust_ratios_": of_scale,
    "apply_trust_ratios_to_updates_": of_apply_to_updates,
    "scale_updates_by_trust_ratios_": of_scale_updates,
    "sgd_": of_sgd,
    "lars_sgd_": of_lars_sgd,
}
FOR_CASES_ALONE = {"momentum", "with_lrs", "without_ratios"}


def arguments(case: Case) -> Arguments:
    """Return a case's arguments, on the CPU."""
    found = ARGUMENTS[case.op](Layers(case))
    found |= {key: value for key, value in case.options.items() if key not in FOR_CASES_ALONE}
    if "lr_scale" in case.options:
        found["lr_scale"] = torch.tensor(case.options["lr_scale"], dtype=torch.float64)
    if case.inverse is not None:
        found["inv_scale"] = torch.tensor(case.inverse, dtype=torch.float32)
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
    from torchlars import reference

    on_cpu = arguments(case)
    wholes: dict[int, Tensor] = {}
    on_device = {name: copied(value, device, wholes) for name, value in on_cpu.items()}
    with torch.no_grad():
        result = getattr(torch.ops.torchlars, case.op)(**on_device)
        expected = getattr(reference, case.op)(**on_cpu)
    if expected is not None:
        compare(case, "result", result, expected)
    for name, value in on_cpu.items():
        if isinstance(value, list):
            for i, (actual, wanted) in enumerate(zip(on_device[name], value, strict=True)):
                if isinstance(wanted, Tensor):
                    compare(case, f"{name}[{i}]", actual, wanted)


def compare(case: Case, name: str, actual: Tensor, expected: Tensor) -> None:
    """Compare one tensor."""
    is_norm = expected.dtype == torch.float64 and case.dtype.itemsize == 2  # summed in float32, two at a time
    tolerance = 2.0**-23 if is_norm else TOLERANCES[expected.dtype]
    atol = 0 if is_norm else tolerance
    is_close = torch.allclose(actual.cpu().double(), expected.double(), rtol=tolerance, atol=atol)
    if not is_close or actual.dtype != expected.dtype:
        raise AssertionError(f"{case}: {name} differs from the reference")


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


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--plant", choices=("memcheck", "initcheck"), help="do what that tool must report, on a GPU")
    args = parser.parse_args(argv)

    from torchlars import _extension  # also loads the ops

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
