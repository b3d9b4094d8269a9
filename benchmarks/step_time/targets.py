"""What a figure is held against: the floor of memory traffic, and the targets."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """The ratio to the floor contestant that a form of torchlars is to reach."""

    form: str
    device: str
    layers: str
    threads: int | None  # None: any number
    at_most: float
    first: float | None = None  # a milestone on the way


LARS_TARGETS = (
    Target("wrapper", "cpu", "resnet50", 2, 1.85),
    Target("wrapper", "cpu", "resnet50", 1, 2.0),
    Target("wrapper", "cpu", "vit_b_16", 2, 1.9),
    Target("wrapper", "cpu", "one_100m", 2, 2.2),
    Target("wrapper", "cpu", "tiny", 2, 1.08),
    Target("fused", "cpu", "resnet50", 2, 1.35),
    Target("fused", "cpu", "resnet50", 1, 1.5),
    Target("fused", "cpu", "vit_b_16", 2, 1.4),
    Target("fused", "cpu", "one_100m", 2, 1.6),
    Target("fused", "cpu", "tiny", 2, 0.3),
    Target("wrapper", "cuda", "resnet50", None, 1.7, first=2.1),
    Target("fused", "cuda", "resnet50", None, 1.2, first=1.45),
    Target("fused", "cuda", "llama_7b_bf16", None, 1.4),
)

LAMB_TARGETS = (
    Target("wrapper", "cpu", "resnet50", 2, 2.4),
    Target("wrapper", "cpu", "tiny", 2, 1.4),
    Target("fused", "cpu", "resnet50", 2, 1.3),
    Target("fused", "cpu", "vit_b_16", 2, 1.3),
    Target("fused", "cpu", "tiny", 2, 0.6),
    Target("base", "cpu", "resnet50", 2, 1.0),
    Target("base", "cpu", "vit_b_16", 2, 1.0),
    Target("base", "cpu", "tiny", 2, 1.0),
)
TARGETS = {"lars": LARS_TARGETS, "lamb": LAMB_TARGETS}

#: How many times faster than torchlars 0.1.2 the wrapper is to be: a whole step (with so many threads), and the LARS
#: part alone.
WHOLE_STEP = {("cpu", "resnet50", 2): 1.25, ("cpu", "tiny", 2): 4.0}
LARS_PART = {("cuda", "resnet50"): 20.0}

#: The time of a step with momentum in 8 bits, relative to momentum in float32: with so many threads.
EIGHT_BITS = {("cpu", "one_33m", 1): 0.9, ("cpu", "one_33m_odd", 1): 0.9}


def target(optimizer: str, form: str, device: str, layers: str, threads: int, dtype: str) -> Target | None:
    """Return the target for one figure, if there is one. On the CPU they are for float32."""
    if device == "cpu" and dtype != "float32":
        return None
    for goal in TARGETS[optimizer]:
        if (form, device, layers) == goal[:3] and goal.threads in (None, threads):
            return goal
    return None


def verdict(goal: Target | None, ratio: float) -> tuple[str, str]:
    """Return the target in words, and whether it was met."""
    if goal is None:
        return "", ""
    if goal.first is None:
        return f"≤ {goal.at_most}", "met" if ratio <= goal.at_most else "missed"
    outcome = "met" if ratio <= goal.at_most else "first met" if ratio <= goal.first else "missed"
    return f"≤ {goal.first}, then ≤ {goal.at_most}", outcome


def byte_floor(accesses: float, cacheable: int, reuse: float | None, floor_accesses: int) -> float:
    """Return the memory accesses per element, relative to those of the floor contestant.

    With ``reuse`` None the bytes are so few that all forms could take the time of the floor.
    """
    return 1.0 if reuse is None else (accesses - reuse * cacheable) / floor_accesses
