"""Why Adam wants LAMB: the relative step of every layer, under LARS over Adam and under LAMB over Adam.

Adam divides the gradient by its own size, so that a factor before the gradient, which is all that LARS applies, is
lost again: the steps stay Adam's, longer for some layers than for others when measured by their weights. LAMB applies
the trust ratio to the step that Adam made: every layer moves by the same part of its weights, lr. Needs torchlars.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from torchlars import LAMB, LARS

LR, STEPS = 0.001, 20
Wrap = Callable[[Optimizer], Optimizer]
WRAPS: dict[str, Wrap] = {"Adam": lambda adam: adam, "LARS(Adam)": LARS, "LAMB(Adam)": LAMB}


def relative_steps(wrap: Wrap) -> dict[str, float]:
    """‖Δw‖ / ‖w‖ of every layer of a small network, at the last of a few steps; always the same weights and data."""
    torch.manual_seed(0)
    words_to_classes = torch.randn(100, 5)
    model = nn.Sequential(nn.EmbeddingBag(100, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = wrap(Adam(model.parameters(), lr=LR))
    for _ in range(STEPS):
        texts = torch.randint(100, (256, 10))
        classes = words_to_classes[texts].sum(dim=1).argmax(dim=1)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(texts), classes).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    return {name: ((after[name] - old).norm() / old.norm()).item() for name, old in before.items()}


def main() -> None:
    torch.set_num_threads(1)
    columns = {name: relative_steps(wrap) for name, wrap in WRAPS.items()}
    print(f"‖Δw‖ / ‖w‖ at step {STEPS}, lr {LR}\n")
    print(f"| {'layer':9} |" + "".join(f" {name:>10} |" for name in columns))
    print(f"|:{'-' * 9}-|" + f"{'-' * 11}:|" * len(columns))
    for layer in columns["Adam"]:
        print(f"| {layer:9} |" + "".join(f" {steps[layer]:10.5f} |" for steps in columns.values()))
    spreads = [max(steps.values()) / min(steps.values()) for steps in columns.values()]
    print(f"| {'max / min':9} |" + "".join(f" {spread:10.5f} |" for spread in spreads))


if __name__ == "__main__":
    main()
