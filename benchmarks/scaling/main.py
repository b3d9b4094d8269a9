"""Time a step whose parameters are sharded, and compute what it costs on more ranks. See README.md beside it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.scaling import chart, measure, simulate
from benchmarks.step_time.sets import SETS

HOST_LAYERS = 161


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure unless told otherwise, simulate, and write what was found."""
    args = parse(argv)
    command = common.command("benchmarks.scaling.main", argv)
    reports: dict[str, Any] = {}
    if not args.simulate:
        load = [round(each, 2) for each in os.getloadavg()]  # of others, before there is our own
        found = {**common.environment(torch.device("cpu")), "threads": 1, "backend": "gloo", "load average": load}
        print(common.describe(found), flush=True)
        report: dict[str, Any] = {"command": command, "environment": found, "set": args.set, "ranks": {}}
        for ranks in args.ranks:
            report["ranks"][str(ranks)] = measure.measure(args.set, ranks, args.rounds, args.seed)
        report["host"] = measure.host(HOST_LAYERS, args.rounds, args.seed)
        markdown = f"{measure.summary_table(report)}\n\n{measure.host_table(report['host'])}"
        print(f"\n{markdown}\n")
        common.write(args.out, "measured", report, f"`{command}`\n\n{common.describe(found)}\n\n{markdown}\n")
        reports["measured"] = report
    report = {"command": command, **simulate.simulate(simulate.machine(args))}
    tables = f"{simulate.models_table(report)}\n\n{simulate.summary_table(report)}"
    print(f"\n{tables}\n")
    common.write(args.out, "simulated", report, f"`{command}`\n\n{common.describe(report['machine'])}\n\n{tables}\n")
    chart.draw(args.out / "simulated.png", report)
    reports["simulated"] = report
    return reports


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulate", action="store_true", help="only compute, measure nothing")
    parser.add_argument("--ranks", nargs="+", type=common.positive(int), default=[1, 2, 4], metavar="N")
    parser.add_argument("--set", choices=sorted(SETS), default="resnet50", help="(default: resnet50)")
    parser.add_argument("--rounds", type=common.positive(int), default=40, help="(default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the order within rounds (default: 0)")
    out = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=out, help="folder of the results (default: beside the script)")
    simulate.add_arguments(parser)
    args = parser.parse_args(argv)
    if not args.simulate:
        common.check_extension(parser)
    return args


if __name__ == "__main__":
    main()
