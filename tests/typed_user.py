"""A user's code for mypy and pyright. Both must accept it, and find each planted error, which an ignored one stands for.

An error that is not found is reported, as an unnecessary comment.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR

import torchlars.optim
from torchlars import LAMB, LARC, LARS, PercentileClipping, param_groups


def construct(model: nn.Module) -> list[Optimizer]:
    """Every way to construct an optimizer."""
    base = SGD(model.parameters(), lr=0.1)
    lars: LARS = LARS.over(SGD)(model.parameters(), lr=16, momentum=0.9, weight_decay=5e-4, trust_coef=0.02)
    lamb: LAMB = LAMB.over(AdamW, clip=True)(model.named_parameters(), lr=1e-3)
    larc: LARC = LARC.over(SGD, trust_coef=0.02)(model.parameters(), lr=0.1)
    class_: type[Optimizer] = LARC.over(torchlars.optim.SGD, clip=False)
    return [
        LARS(optimizer=base, eps=1e-8, trust_coef=0.001),
        LARS(base, clip=True, norm="decayed", lr_in_momentum=True, always_adapt=False),
        LARS(base, apply_to="update", weight_decay="decoupled"),
        LARC(base, 0.02, clip=False),
        LAMB(torchlars.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, state_dtype=torch.float32)),
        LARS(torchlars.optim.SGD(param_groups(model, lr=16, weight_decay=5e-4, exclude=["head.*"]), momentum=0.9)),
        LARS(torchlars.optim.SGD(model.parameters(), lr=16, momentum=0.9, momentum_dtype=torch.int8)),
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=class_, lr=16),
        lars,
        lamb,
        larc,
    ]


class LARSSGD(LARS.over(SGD, trust_coef=0.02)):  # type: ignore[misc]  # mypy knows no base classes that are calls
    """A class for configuration files."""


def train(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Every way to use one."""
    optimizer = LARS(SGD(model.parameters(), lr=16, momentum=0.9))
    scheduler = LinearLR(optimizer)
    clipping = PercentileClipping(optimizer, percentile=5)
    scaler = torch.amp.GradScaler("cuda")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(inputs).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # in torch
        return loss

    optimizer.step(closure)
    clipping.load_state_dict(clipping.state_dict())
    scaler.step(optimizer)
    scheduler.step()
    optimizer.add_param_group({"params": [nn.Parameter(inputs)], "trust_coef": None})
    optimizer.load_state_dict(optimizer.state_dict())
    trust_coef: float = optimizer.trust_coef
    by_parameter: dict[Tensor, Tensor] = optimizer.trust_ratios()
    print(trust_coef, len(by_parameter), optimizer.optim.defaults["lr"])
    return {**optimizer.named_trust_ratios(), **optimizer.named_trust_ratios(model.named_parameters())}


def planted_errors(model: nn.Module, optimizer: LARS) -> None:
    """What both must find."""
    base = SGD(model.parameters())
    LARS(model.parameters())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    LARS(base, norm="raww")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    LARS(base, apply_to="updates")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    LARS(base, weight_decay=1e-4)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    LARS(base, trust_coefficient=0.001)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    LARS(base, 1e-8, 0.001, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    LARC(base, norm="decayed")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    LARC.over(SGD, norm="raw")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    LAMB(base, clip="no")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    LARS.over(base)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    LARS.over(SGD, norm="raww")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    LARS.over(SGD, lr=16)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    LAMB.over(AdamW, norm="raw")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    param_groups(model, lr=16)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    optimizer.named_trust_ratios(model)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    optimizer.norm = "raww"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    torchlars.optim.SGD(model.parameters(), momentum_dtype="int8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
