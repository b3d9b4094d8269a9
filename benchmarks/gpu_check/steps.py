"""What one step launches over the layers of ResNet-50, and whether the host waits for it. Writes JSON.

``python -m benchmarks.gpu_check.steps --out steps.json``, or under Nsight Compute with ``--profile``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import torchlars
from benchmarks.step_time import cuda
from benchmarks.step_time.sets import SETS
from torchlars import LAMB, LARC, LARS

Params = list[Parameter]
DEVICE = "cuda"


def sgd(params: Params, **options: Any) -> Optimizer:
    """Return torch's SGD."""
    return torch.optim.SGD(params, lr=1e-6, momentum=0.9, weight_decay=1e-4, **options)


def our_sgd(params: Params, **options: Any) -> Optimizer:
    """Return the SGD that takes trust ratios into its own update."""
    return torchlars.optim.SGD(params, lr=1e-6, momentum=0.9, weight_decay=1e-4, **options)


def adamw(params: Params, **options: Any) -> Optimizer:
    """Return torch's AdamW."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=1e-2, **options)


CLIPPED = {"clip": True, "norm": "decayed", "lr_in_momentum": True}
MODES: dict[str, Callable[[Params], Optimizer]] = {
    "SGD fused": lambda params: sgd(params, fused=True),
    "torchlars.optim.SGD": our_sgd,
    "LARS(SGD loop)": lambda params: LARS(sgd(params, foreach=False)),
    "LARS(SGD foreach)": lambda params: LARS(sgd(params, foreach=True)),
    "LARS(SGD fused)": lambda params: LARS(sgd(params, fused=True)),
    "LARS(torchlars.optim.SGD)": lambda params: LARS(our_sgd(params)),
    "LARS(SGD fused), clipped, decayed norm, lr in momentum": lambda params: LARS(sgd(params, fused=True), **CLIPPED),
    "LARS(torchlars.optim.SGD), the same": lambda params: LARS(our_sgd(params), **CLIPPED),
    "LARS(SGD fused), of updates": lambda params: LARS(sgd(params, fused=True), apply_to="update"),
    "LARC(SGD fused)": lambda params: LARC(sgd(params, fused=True)),
    "LARS(Adam fused)": lambda params: LARS(torch.optim.Adam(params, lr=1e-6, weight_decay=1e-4, fused=True)),
    "LAMB(AdamW foreach)": lambda params: LAMB(adamw(params, foreach=True)),
    "LAMB(AdamW fused)": lambda params: LAMB(adamw(params, fused=True)),
    "LAMB(torchlars.optim.SGD)": lambda params: LAMB(our_sgd(params)),
}
SCALED = ("LARS(SGD fused)", "LARS(torchlars.optim.SGD)", "LAMB(AdamW fused)")
PROFILED = ("LARS(torchlars.optim.SGD)", "LARS(SGD fused)", "LAMB(AdamW fused)")
TWO_DTYPES = ("LARS(SGD fused)", "LARS(torchlars.optim.SGD)")


def layers(dtypes: Sequence[torch.dtype]) -> Params:
    """Return the layers with gradients, dealt out to dtypes in turn."""
    params = []
    for i, shape in enumerate(SETS["resnet50"].shapes()):
        param = Parameter((0.05 * torch.randn(shape, device=DEVICE)).to(dtypes[i % len(dtypes)]))
        param.grad = torch.full_like(param, 0.01)
        params.append(param)
    return params


def observe(make: Callable[[Params], Optimizer], dtypes: Sequence[torch.dtype], is_scaled: bool) -> dict[str, Any]:
    """Take steps in one mode."""
    params = layers(dtypes)
    optimizer = make(params)
    step: Callable[[], object] = optimizer.step
    if is_scaled:
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0)
        scaler.scale(torch.zeros((), device=DEVICE))  # which makes it ready

        def step() -> None:
            scaler.step(optimizer)
            scaler.update()

    for _ in range(2):  # the first ones allocate, and the scaler may wait for the very first: torchlars/amp.py says why
        step()
    torch.cuda.synchronize()
    found: dict[str, Any] = {"buckets": len(dtypes), "waits": None}
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        found["waits"] = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if is_scaled and found["waits"]:
        return found  # the scaler is in the midst of a step
    names = cuda.kernels(step)
    found["kernels"] = len(names)
    found["torchlars"] = sum("torchlars" in name for name in names)
    return found


def profile(make: Callable[[Params], Optimizer]) -> None:
    """Take steps in one mode, of which a profiler that was told to wait sees the last."""
    optimizer = make(layers((torch.float32,)))
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        optimizer.step()
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    """Look at every mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    purpose = parser.add_mutually_exclusive_group(required=True)
    purpose.add_argument("--out", type=Path, help="the JSON file")
    purpose.add_argument("--profile", action="store_true", help="take steps for Nsight Compute and look at nothing")
    args = parser.parse_args(argv)
    if args.profile:
        for name in PROFILED:
            profile(MODES[name])
        return
    one, two = (torch.float32,), (torch.float32, torch.bfloat16)
    found = {name: observe(make, one, False) for name, make in MODES.items()}
    found |= {f"{name} under a GradScaler": observe(MODES[name], one, True) for name in SCALED}
    found |= {f"{name}, two dtypes": observe(MODES[name], two, False) for name in TWO_DTYPES}
    for name, mode in found.items():
        waits = f", WAITS: {mode['waits']}" if mode["waits"] else ""
        print(f"{name}: {mode.get('kernels')} kernels, {mode.get('torchlars')} of torchlars{waits}")
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
