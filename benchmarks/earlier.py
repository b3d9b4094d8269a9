"""The steps of an earlier version of torchlars, which stand beside this one's in one run.

One process cannot load two versions of the extension. So another process runs this file as a script, with the earlier
checkout on its path, and takes a step whenever it is asked to. Of that checkout it imports torchlars alone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer


class Earlier:
    """A process that steps layers of given shapes with the version in a checkout, which is built in place.

    Args:
        checkout: its folder.
        shapes: of all layers.
        dtype: of weights, gradients and momentum.
        hyper: lr, momentum, weight_decay, trust_coef and eps.
        groups: how many parameter groups of the same size the layers are in.
        restores: whether gradients are restored before each step.
    """

    def __init__(
        self,
        checkout: Path,
        shapes: Iterable[tuple[int, ...]],
        hyper: dict[str, float],
        dtype: torch.dtype = torch.float32,
        groups: int = 1,
        restores: bool = True,
    ) -> None:
        revision = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(revision, capture_output=True, text=True, check=False)
        self.revision = found.stdout.strip() or checkout.name
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        setup = {"shapes": list(shapes), "dtype": str(dtype).removeprefix("torch."), "hyper": hyper, "groups": groups}
        self.names: list[str] = self._ask({**setup, "threads": torch.get_num_threads(), "restores": restores})

    def samples(self) -> dict[str, Callable[[], float]]:
        """Return for each of its steps, by name with the revision, what takes it and returns its seconds."""
        return {f"{name} at {self.revision}": partial(self._ask, name) for name in self.names}

    def __enter__(self) -> Earlier:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.communicate()
            raise RuntimeError(f"the process of {self.revision} has ended; what it said is above")
        return json.loads(answer)


def serve() -> None:
    """Build all steps as the first line of the input says, and take one for every further line."""
    import torchlars.optim
    from torchlars import LARS, _extension

    package, extension = Path(torchlars.__file__).resolve().parent, _extension.extension
    # An installed torchlars may lend its extension to a checkout that has none.
    if extension is None or Path(str(extension.__file__)).resolve().parent != package:
        found = _extension.reason if extension is None else f"found: {extension.__file__}"
        sys.exit(f"torchlars has no extension of its own in {package} ({found}); build it in place")

    class NoOp(Optimizer):
        def step(self, closure: Any = None) -> None:
            """Do nothing."""

    setup = json.loads(sys.stdin.readline())
    hyper, dtype = setup["hyper"], getattr(torch, setup["dtype"])
    torch.set_num_threads(setup["threads"])
    params = [Parameter(torch.randn(shape, dtype=dtype).mul_(0.05)) for shape in setup["shapes"]]
    masters = [torch.randn_like(param).mul_(0.01) for param in params]
    for param, master in zip(params, masters, strict=True):
        param.grad = master.clone()
    size = len(params) // setup["groups"]

    def groups() -> list[dict[str, Any]]:
        return [{"params": params[i * size : (i + 1) * size]} for i in range(setup["groups"])]

    def no_op() -> Optimizer:
        return NoOp(groups(), {"weight_decay": hyper["weight_decay"], "decoupled_weight_decay": False})

    of_sgd = {key: hyper[key] for key in ("lr", "momentum", "weight_decay")}
    bases: dict[str, Callable[[], Optimizer]] = {
        **({} if setup["restores"] else {"no-op": no_op}),  # beside which gradients would take long to restore
        "SGD fused": lambda: torch.optim.SGD(groups(), fused=True, **of_sgd),
        "torchlars.optim.SGD": lambda: torchlars.optim.SGD(groups(), **of_sgd),
    }
    steps: dict[str, Callable[[], object]] = {}
    for name, base in bases.items():
        steps[name] = base().step
        steps[f"LARS({name})"] = LARS(base(), trust_coef=hyper["trust_coef"], eps=hyper["eps"]).step
    for step in steps.values():
        step()  # allocates state
    gc.disable()
    print(json.dumps(list(steps)), flush=True)
    for line in sys.stdin:
        step = steps[json.loads(line)]
        for _ in range(2):  # the first one wakes up a process that has waited
            if setup["restores"]:
                torch._foreach_copy_([param.grad for param in params[::-1]], masters[::-1])
            start = time.perf_counter()
            step()
            taken = time.perf_counter() - start
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    serve()
