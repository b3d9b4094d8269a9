"""The chart of a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LINES = {
    "fsdp": ("FSDP2's own collectives, at least", "#8C8C8C", "-"),
    "one_by_one": ("norms one by one", "#D55E00", "-"),
    "ring": ("one all-reduce, flat ring", "#56B4E9", ":"),
    "tree": ("one all-reduce, flat tree", "#56B4E9", "--"),
    "two_level": ("one all-reduce, two levels", "#0072B2", "-"),
    "sweep": ("LARS sweep, at least", "#009E73", "-"),
}


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Draw milliseconds over ranks, a panel a model, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    models = report["models"]
    figure = Figure(figsize=(3.2 * len(models), 3.8), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (name, model) in zip(panels, models.items(), strict=True):
        ranks = [int(count) for count in model["ranks"]]
        for each, (label, color, style) in LINES.items():
            times = [at[f"{each}_us"] / 1e3 for at in model["ranks"].values()]
            axes.loglog(ranks, times, style, color=color, label=label, marker=".", markersize=4)
        axes.set(title=f"{name}: {model['layers']} layers", xlabel="ranks")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms a step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
