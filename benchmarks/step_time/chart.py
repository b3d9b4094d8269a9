"""The bar chart of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {"floor": "#8C8C8C", "wrapper": "#0072B2", "fused": "#0072B2"}


def draw(path: Path, report: dict[str, Any]) -> None:
    """Draw each contestant's ratio to the floor, a panel a set, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    sets = report["sets"]
    if not sets:
        return
    most = max(len(result["contestants"]) for result in sets.values())
    figure = Figure(figsize=(4 + 3.4 * len(sets), 1.2 + 0.28 * most), layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, (name, result) in zip(panels, sets.items(), strict=True):
        timed = result["contestants"]
        clock = "gpu" if "copy_bandwidth" in report else "wall"
        ratios = [entry["clocks"][clock]["ratio"] for entry in timed.values()]
        bars = axes.barh(list(timed), ratios, color=[COLORS.get(entry["form"], "#E0B48C") for entry in timed.values()])
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=8)
        for place, entry in enumerate(timed.values()):
            if "byte_floor" in entry:
                axes.plot([entry["byte_floor"]] * 2, [place - 0.4, place + 0.4], color="black", lw=1.5)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.15 * max(ratios)), xlabel=f"time / {result['floor']}")
        axes.set_title(f"{name}, {result['dtype']}")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    where = (
        report["environment"].get("gpu")
        or f"{report['environment']['cpu']}, {report['environment']['threads']} threads"
    )
    figure.suptitle(f"One step, shorter is better; black lines: floors of memory traffic ({where})", fontsize=10)
    figure.savefig(path, dpi=130)
