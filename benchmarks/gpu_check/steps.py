"""What one step launches in every mode over the layers of ResNet-50, and whether the host waits for it.

``python -m benchmarks.gpu_check.steps``: exits with status 1 if the host waits. Under Nsight Compute: ``--profile``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import torchlars
from benchmarks.step_time import cuda
from benchmarks.step_time.sets import SETS
from torchlars import LAMB, LARC, LARS

Params = list[Parameter]
Step = Callable[[], object]


def sgd(params: Params, **options: Any) -> Optimizer:
    """Return torch's SGD."""
    return torch.optim.SGD(params, lr=1e-6, momentum=0.9, weight_decay=1e-4, **options)


def our_sgd(params: Params, **options: Any) -> Optimizer:
    """Return the SGD that takes trust ratios into its own update."""
    return torchlars.optim.SGD(params, lr=1e-6, momentum=0.9, weight_decay=1e-4, **options)


def adamw(params: Params, **options: Any) -> Optimizer:
    """Return torch's AdamW."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=1e-2, **options)


def our_adamw(params: Params) -> Optimizer:
    """Return the AdamW that takes trust ratios into its own update."""
    return torchlars.optim.AdamW(params, lr=1e-6, weight_decay=1e-2)


CLIPPED = {"clip": True, "norm": "decayed", "lr_in_momentum": True}
MODES: dict[str, Callable[[Params], Optimizer]] = {
    "SGD fused": lambda params: sgd(params, fused=True),
    "torchlars.optim.SGD": our_sgd,
    "LARS(SGD loop)": lambda params: LARS(sgd(params, foreach=False)),
    "LARS(SGD foreach)": lambda params: LARS(sgd(params, foreach=True)),
    "LARS(SGD fused)": lambda params: LARS(sgd(params, fused=True)),
    "LARS(torchlars.optim.SGD)": lambda params: LARS(our_sgd(params)),
    "torchlars.optim.SGD, 8 bits": lambda params: our_sgd(params, momentum_dtype=torch.int8),
    "LARS(torchlars.optim.SGD, 8 bits)": lambda params: LARS(our_sgd(params, momentum_dtype=torch.int8)),
    "LARS(SGD fused), clipped, decayed norm, lr in momentum": lambda params: LARS(sgd(params, fused=True), **CLIPPED),
    "LARS(torchlars.optim.SGD), the same": lambda params: LARS(our_sgd(params), **CLIPPED),
    "LARS(SGD fused), of updates": lambda params: LARS(sgd(params, fused=True), apply_to="update"),
    "LARC(SGD fused)": lambda params: LARC(sgd(params, fused=True)),
    "LARS(Adam fused)": lambda params: LARS(torch.optim.Adam(params, lr=1e-6, weight_decay=1e-4, fused=True)),
    "LAMB(AdamW foreach)": lambda params: LAMB(adamw(params, foreach=True)),
    "LAMB(AdamW fused)": lambda params: LAMB(adamw(params, fused=True)),
    "LAMB(torchlars.optim.SGD)": lambda params: LAMB(our_sgd(params)),
    "torchlars.optim.AdamW": our_adamw,
    "LAMB(torchlars.optim.AdamW)": lambda params: LAMB(our_adamw(params)),
}
SCALED = ("LARS(SGD fused)", "LARS(torchlars.optim.SGD)", "LAMB(AdamW fused)", "LAMB(torchlars.optim.AdamW)")
TWO_DTYPES = ("LARS(SGD fused)", "LARS(torchlars.optim.SGD)", "LAMB(torchlars.optim.AdamW)")
PROFILED = ("LARS(torchlars.optim.SGD)", "LARS(SGD fused)", "LAMB(AdamW fused)", "LAMB(torchlars.optim.AdamW)")


def layers(name: str, device: torch.device, *dtypes: torch.dtype) -> Params:
    """Return a set of layers with gradients, dealt out to dtypes in turn."""
    params = []
    for i, shape in enumerate(SETS[name].shapes()):
        param = Parameter((0.05 * torch.randn(shape, device=device)).to(dtypes[i % len(dtypes)]))
        param.grad = torch.full_like(param, 0.01)
        params.append(param)
    return params


def scaled(optimizer: Optimizer, device: torch.device) -> Step:
    """Return the step that a GradScaler takes."""
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0)
    scaler.scale(torch.zeros((), device=device))  # which makes it ready

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


def wait(step: Step) -> str | None:
    """Take a step, and return what it waits for, if it does."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def observe(name: str, step: Step, device: torch.device) -> bool:
    """Take steps in one mode and print what they launch. Return whether the host waits. A CPU only takes the steps."""
    for _ in range(2):  # the first ones allocate, and the scaler may wait for the very first: torchlars/amp.py says why
        step()
    if device.type != "cuda":
        step()
        print(f"{name}: taken on {device}")
        return False
    waits = wait(step)
    if waits:  # a scaler would be in the midst of a step
        print(f"{name}: THE HOST WAITS: {waits}", flush=True)
        return True
    kernels = cuda.kernels(step)
    ours = sum("torchlars" in kernel for kernel in kernels)
    print(f"{name}: {len(kernels)} kernels, {ours} of torchlars", flush=True)
    return False


def profile(step: Step) -> None:
    """Take steps, of which a profiler that was told to wait sees the last."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        step()
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    """Look at every mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda", help="(default: cuda)")
    parser.add_argument("--set", choices=SETS, default="resnet50", help="of layers (default: resnet50)")
    parser.add_argument("--profile", action="store_true", help="take steps for Nsight Compute and look at nothing")
    args = parser.parse_args(argv)

    def made(name: str, *dtypes: torch.dtype) -> Optimizer:
        return MODES[name](layers(args.set, args.device, torch.float32, *dtypes))

    if args.profile:
        for name in PROFILED:
            profile(made(name).step)
        return
    waiting = [observe(name, made(name).step, args.device) for name in MODES]
    for name in SCALED:
        waiting.append(observe(f"{name} under a GradScaler", scaled(made(name), args.device), args.device))
    waiting += [observe(f"{name}, two dtypes", made(name, torch.bfloat16).step, args.device) for name in TWO_DTYPES]
    print(f"the host waits in {sum(waiting)} of {len(waiting)} modes")
    sys.exit(any(waiting))


if __name__ == "__main__":
    main()
