"""All who take a step of LARS: torch's own optimizers, torchlars, its peers, and what a user would write by hand.

What is called an *algorithm* is another library's sequence of torch calls, written anew from its description, where the
library itself cannot be installed or needs more than a step.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from torchlars import LARS, _extension

Step = Callable[[], object]


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters, the same for all."""

    lr: float
    weight_decay: float
    trust_coef: float = 0.001
    eps: float = 1e-8
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW and LAMB, as the next
    adam_eps: float = 1e-6


@dataclass(frozen=True)
class Contestant:
    """One way to take a step.

    Args:
        name: as it stands in the table.
        formula: what it claims to compute; those of one formula must agree. None: a formula of its own.
        build: given parameters that have gradients, returns the step.
        form: "floor"; "wrapper", "fused" or "base", which have targets; or "other", for all else that takes a step of
            LARS or LAMB.
        accesses: memory accesses per element, where known.
        cacheable: those of them that are second reads.
        code_bytes: bytes moved per element besides, for codes of momentum and their scales.
        is_foreign: whether it may fail, which leaves it out.
        matrices_only: whether it leaves tensors of fewer than two dimensions to another formula.
        host_syncs: whether it waits for the device, which a CUDA graph cannot hold.
        compiles: whether its first step compiles.
        is_core: whether it is timed where memory is scarce.
        states: tensors of a parameter's size that it keeps.
    """

    name: str
    formula: str | None
    build: Callable[[list[Parameter], Hyper], Step]
    form: str = ""
    accesses: int | None = None
    cacheable: int = 0
    code_bytes: float = 0.0
    is_foreign: bool = False
    matrices_only: bool = False
    host_syncs: bool = False
    compiles: bool = False
    is_core: bool = False
    states: int = 1


OLD = "torchlars 0.1.2 algorithm"
OLD_PART = "LARS part: torchlars 0.1.2 algorithm"
PART = "LARS part: torchlars"
#: Contestants with momentum in 8 bits, and those with momentum in float32 beside which they stand.
EIGHT_BITS = {
    "torchlars.optim.SGD, 8-bit": "torchlars.optim.SGD",
    "LARS(torchlars.optim.SGD, 8-bit)": "LARS(torchlars.optim.SGD)",
}
CODE_BYTES = 2 * (1 + 4 / 128)  # read and written: a byte an element, and a scale for 128 of them


def contestants(base: str) -> list[Contestant]:
    """Return all contestants. ``base`` is the form of SGD that is the floor and every wrapper's base: see README."""

    def torch_sgd(form: str) -> Contestant:
        is_floor = form == base
        return Contestant(
            f"SGD {form}",
            "SGD",
            lambda params, hyper: sgd(params, hyper, form).step,
            form="floor" if is_floor else "",
            accesses=5 if is_floor else None,  # reads w, g and m, and writes w and m
            is_core=is_floor,
        )

    def over_base(name: str, scale: Callable[[list[Parameter], Hyper], None], **facts: Any) -> Contestant:
        return Contestant(
            name, "LARS-SGD", lambda params, hyper: scale_then_step(scale, params, hyper, base), form="other", **facts
        )

    return [
        *(torch_sgd(form) for form in ("loop", "foreach", "fused") if form != "fused" or base == "fused"),
        Contestant(
            "torchlars.optim.SGD",
            "SGD",
            lambda params, hyper: torchlars_sgd(params, hyper).step,
            form="base",
            accesses=5,
            is_core=True,
        ),
        Contestant(
            f"LARS(SGD {base})",
            "LARS-SGD",
            lambda params, hyper: lars(sgd(params, hyper, base), hyper),
            form="wrapper",
            accesses=10,
            cacheable=2,
            is_core=True,
        ),
        Contestant(
            "LARS(torchlars.optim.SGD)",
            "LARS-SGD",
            lambda params, hyper: lars(torchlars_sgd(params, hyper), hyper),
            form="fused",
            accesses=7,
            cacheable=2,
            is_core=True,
        ),
        Contestant(
            "torchlars.optim.SGD, 8-bit",
            "SGD",
            lambda params, hyper: torchlars_sgd(params, hyper, torch.int8).step,
            accesses=3,
            code_bytes=CODE_BYTES,
        ),
        Contestant(
            "LARS(torchlars.optim.SGD, 8-bit)",
            "LARS-SGD",
            lambda params, hyper: lars(torchlars_sgd(params, hyper, torch.int8), hyper),
            accesses=5,
            cacheable=2,
            code_bytes=CODE_BYTES,
        ),
        *(
            Contestant(f"Adam {form}", "Adam", lambda params, hyper, form=form: adam(params, hyper, form).step)
            for form in ("loop", "foreach", "fused")
        ),
        Contestant("LARS(Adam fused)", "LARS-Adam", lambda params, hyper: lars(adam(params, hyper, "fused"), hyper)),
        Contestant("timm Lars", "LARS-SGD", timm_lars, form="other", is_foreign=True),
        Contestant(
            "pytorch_optimizer LARS",
            "LARS-SGD",
            pytorch_optimizer_lars,
            form="other",
            is_foreign=True,
            matrices_only=True,
        ),
        Contestant("bitsandbytes LARS", None, bitsandbytes_lars, form="other", is_foreign=True, host_syncs=True),
        over_base(f"_foreach_ LARS + SGD {base}", foreach_scale_),
        Contestant(
            f"torch.compile of LARS + SGD {base}",
            "LARS-SGD",
            lambda params, hyper: compiled_scale_then_step(params, hyper, base),
            form="other",
            is_foreign=True,
            compiles=True,
        ),
        Contestant(
            "torch.compile of a whole LARS-SGD",
            "LARS-SGD",
            compiled_lars_sgd,
            form="other",
            is_foreign=True,
            compiles=True,
        ),
        over_base(OLD, torchlars_0_1_2_scale_, is_foreign=True, is_core=True),
        over_base("apex LARC algorithm", apex_scale_, host_syncs=True),
        Contestant("lightning-bolts LARS algorithm", "LARS-SGD", lightning_bolts, form="other", host_syncs=True),
        Contestant(PART, "LARS part", lambda params, hyper: lars(NoOp(params, hyper), hyper), is_core=True, states=0),
        Contestant(
            OLD_PART,
            "LARS part",
            lambda params, hyper: lambda: torchlars_0_1_2_scale_(params, hyper),
            is_foreign=True,
            is_core=True,
            states=0,
        ),
    ]


# torch and torchlars


def sgd(params: list[Parameter], hyper: Hyper, form: str, weight_decay: float | None = None) -> Optimizer:
    """Build torch's SGD in one of its forms."""
    return torch.optim.SGD(
        params,
        lr=hyper.lr,
        momentum=hyper.momentum,
        weight_decay=hyper.weight_decay if weight_decay is None else weight_decay,
        foreach=form == "foreach",
        fused=form == "fused",
    )


def torchlars_sgd(params: list[Parameter], hyper: Hyper, momentum_dtype: torch.dtype | None = None) -> Optimizer:
    """Build the SGD that takes trust ratios into its own update."""
    optim = importlib.import_module("torchlars.optim")
    return optim.SGD(
        params,
        lr=hyper.lr,
        momentum=hyper.momentum,
        weight_decay=hyper.weight_decay,
        momentum_dtype=momentum_dtype,
    )


def adam(params: list[Parameter], hyper: Hyper, form: str) -> Optimizer:
    """Build torch's Adam in one of its forms."""
    return torch.optim.Adam(
        params,
        lr=hyper.lr,
        weight_decay=hyper.weight_decay,
        foreach=form == "foreach",
        fused=form == "fused",
        capturable=params[0].is_cuda,  # by a CUDA graph
    )


class NoOp(Optimizer):
    """A base that does nothing, so that what is left is the LARS part."""

    def __init__(self, params: list[Parameter], hyper: Hyper) -> None:
        super().__init__(params, {"weight_decay": hyper.weight_decay, "decoupled_weight_decay": False})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


def lars(optimizer: Optimizer, hyper: Hyper) -> Step:
    """Return the step of torchlars around a base."""
    return LARS(optimizer, eps=hyper.eps, trust_coef=hyper.trust_coef).step


def in_runs(entrant: Contestant, megabytes: int) -> Contestant:
    """Return a contestant of torchlars whose layers go in runs of at most so many MB of weights and gradients."""

    def build(params: list[Parameter], hyper: Hyper) -> Step:
        step, set_run_bytes = entrant.build(params, hyper), _extension.extension.set_run_bytes

        def step_in_runs() -> None:
            set_run_bytes(megabytes * 10**6)
            try:
                step()
            finally:
                set_run_bytes(0)

        return step_in_runs

    return replace(entrant, name=f"{entrant.name}, runs of {megabytes} MB", build=build, form="")


# Peers


def timm_lars(params: list[Parameter], hyper: Hyper) -> Step:
    """Return the step of timm's Lars."""
    return (
        import_alone("timm.optim.lars")
        .Lars(
            params,
            lr=hyper.lr,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
            trust_coeff=hyper.trust_coef,
            eps=hyper.eps,
        )
        .step
    )


def import_alone(name: str) -> ModuleType:
    """Import a module of a package without the package's own imports.

    ``import timm`` imports torchvision, which no optimizer needs and which has to match torch's very build.
    """
    if name in sys.modules:
        return sys.modules[name]
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {top!r}")
    before = dict(sys.modules)
    folder, parent = Path(spec.submodule_search_locations[0]), top
    for part in parts:
        stand_in = ModuleType(parent)
        stand_in.__path__ = [str(folder)]
        sys.modules[parent] = stand_in
        folder, parent = folder / part, f"{parent}.{part}"
    try:
        return importlib.import_module(name)
    finally:
        for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == top]:
            if loaded not in before:
                del sys.modules[loaded]
        sys.modules.update({key: module for key, module in before.items() if key.split(".")[0] == top})


def pytorch_optimizer_lars(params: list[Parameter], hyper: Hyper) -> Step:
    """Return the step of pytorch_optimizer's LARS, which has no eps and leaves vectors to SGD without weight decay."""
    return (
        importlib.import_module("pytorch_optimizer")
        .LARS(
            params,
            lr=hyper.lr,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
            trust_coefficient=hyper.trust_coef,
        )
        .step
    )


def bitsandbytes_lars(params: list[Parameter], hyper: Hyper) -> Step:
    """Return the step of bitsandbytes' 32-bit LARS, which clips the norm of the update to a share of the weights'."""
    return (
        importlib.import_module("bitsandbytes")
        .optim.LARS(
            params, lr=hyper.lr, momentum=hyper.momentum, weight_decay=hyper.weight_decay, max_unorm=hyper.trust_coef
        )
        .step
    )


# By hand


def trust_ratio(param_norm: Tensor, grad_norm: Tensor, hyper: Hyper) -> Tensor:
    """Return the trust ratios of one layer or of a vector of layers."""
    ratio = hyper.trust_coef * param_norm / (grad_norm + hyper.weight_decay * param_norm + hyper.eps)
    return torch.where((param_norm > 0) & (grad_norm > 0), ratio, 1.0)


def grads_of(params: list[Parameter]) -> list[Tensor]:
    """Return the gradients."""
    return [param.grad for param in params if param.grad is not None]


def scale_then_step(
    scale: Callable[[list[Parameter], Hyper], None], params: list[Parameter], hyper: Hyper, base: str
) -> Step:
    """Return a step that scales the gradients, and then has the base step without weight decay."""
    optimizer = sgd(params, hyper, base, weight_decay=0.0)

    def step() -> None:
        scale(params, hyper)
        optimizer.step()

    return step


@torch.no_grad()
def foreach_scale_(params: list[Parameter], hyper: Hyper) -> None:
    """Scale by torch's multi-tensor functions."""
    grads = grads_of(params)
    param_norms = torch.stack(torch._foreach_norm(params))
    grad_norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_add_(grads, params, alpha=hyper.weight_decay)
    torch._foreach_mul_(grads, trust_ratio(param_norms, grad_norms, hyper).unbind())


def scaled(param: Tensor, grad: Tensor, hyper: Hyper) -> Tensor:
    """Return r · (g + λw), as code to be compiled.

    Compiled for a CPU, such a loop over layers ran twice as fast as multi-tensor functions.
    """
    ratio = trust_ratio(torch.linalg.vector_norm(param), torch.linalg.vector_norm(grad), hyper)
    return (grad + hyper.weight_decay * param) * ratio


def compiled_scale_then_step(params: list[Parameter], hyper: Hyper, base: str) -> Step:
    """Return a step whose LARS part is compiled."""

    def scale(params: list[Tensor], grads: list[Tensor]) -> None:
        for param, grad in zip(params, grads, strict=True):
            grad.copy_(scaled(param, grad, hyper))

    compiled = torch.compile(scale, dynamic=False)

    @torch.no_grad()
    def scale_(params: list[Parameter], hyper: Hyper) -> None:
        compiled(params, grads_of(params))

    return scale_then_step(scale_, params, hyper, base)


def compiled_lars_sgd(params: list[Parameter], hyper: Hyper) -> Step:
    """Return a step that is compiled as a whole."""

    def update(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> None:
        for param, grad, buffer in zip(params, grads, buffers, strict=True):
            buffer.mul_(hyper.momentum).add_(scaled(param, grad, hyper))
            param.add_(buffer, alpha=-hyper.lr)

    compiled = torch.compile(update, dynamic=False)
    buffers = [torch.zeros_like(param) for param in params]

    @torch.no_grad()
    def step() -> None:
        compiled(params, grads_of(params), buffers)

    return step


# Algorithms of other libraries


@torch.no_grad()
def torchlars_0_1_2_scale_(params: list[Parameter], hyper: Hyper) -> None:
    """Scale as torchlars 0.1.2: about five kernels a layer, and no wait for the device."""
    for param in params:
        grad = param.grad
        assert grad is not None
        ratio = fused_trust_ratio(param.norm(), grad.norm(), hyper)
        grad.add_(param, alpha=hyper.weight_decay)
        grad.mul_(ratio)


def fused_trust_ratio(param_norm: Tensor, grad_norm: Tensor, hyper: Hyper) -> Tensor | float:
    """Return one layer's trust ratio by a single kernel, as 0.1.2 had one for either kind of device.

    On a CPU that is scalar arithmetic, which Python does about as fast as one call of a function on tensors.
    """
    if param_norm.is_cuda:
        return cuda_trust_ratio()(
            param_norm, grad_norm, weight_decay=hyper.weight_decay, trust_coef=hyper.trust_coef, eps=hyper.eps
        )
    norm, other = param_norm.item(), grad_norm.item()
    if norm > 0 and other > 0:
        return hyper.trust_coef * norm / (other + hyper.weight_decay * norm + hyper.eps)
    return 1.0


_cuda_trust_ratio: Any = None


def cuda_trust_ratio() -> Any:
    """Return the elementwise CUDA kernel of the trust ratio, compiled at its first call."""
    global _cuda_trust_ratio
    if _cuda_trust_ratio is None:
        _cuda_trust_ratio = torch.cuda.jiterator._create_jit_fn(
            """template <typename T> T trust_ratio(T w, T g, T weight_decay, T trust_coef, T eps) {
                return w > T(0) && g > T(0) ? trust_coef * w / (g + weight_decay * w + eps) : T(1);
            }""",
            weight_decay=0.0,
            trust_coef=0.0,
            eps=0.0,
        )
    return _cuda_trust_ratio


@torch.no_grad()
def apex_scale_(params: list[Parameter], hyper: Hyper) -> None:
    """Scale as apex's LARC with clipping off: Python asks for both norms, so the host waits twice a layer."""
    for param in params:
        assert param.grad is not None
        param_norm, grad_norm = torch.norm(param.data), torch.norm(param.grad.data)
        if param_norm != 0 and grad_norm != 0:
            ratio = hyper.trust_coef * param_norm / (grad_norm + param_norm * hyper.weight_decay + hyper.eps)
            param.grad.data += hyper.weight_decay * param.data
            param.grad.data *= ratio


def lightning_bolts(params: list[Parameter], hyper: Hyper) -> Step:
    """Return the step of lightning-bolts' LARS, an optimizer of its own that asks for both norms as well."""
    buffers: dict[Parameter, Tensor] = {}

    @torch.no_grad()
    def step() -> None:
        for param in params:
            grad = param.grad
            assert grad is not None
            param_norm, grad_norm = torch.norm(param), torch.norm(grad)
            if param_norm != 0 and grad_norm != 0:
                ratio = hyper.trust_coef * param_norm / (grad_norm + param_norm * hyper.weight_decay + hyper.eps)
                grad = grad.add(param, alpha=hyper.weight_decay).mul(ratio)
            if param in buffers:
                buffers[param].mul_(hyper.momentum).add_(grad)
            else:
                buffers[param] = grad.clone()
            param.add_(buffers[param], alpha=-hyper.lr)

    return step
