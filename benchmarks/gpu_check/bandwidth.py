"""What the passes of LARS move in a second on tensors of 1 GB, beside a copy of as much. Writes JSON.

``python -m benchmarks.gpu_check.bandwidth --out bandwidth.json``
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.gpu_check.cases import passes
from benchmarks.step_time import cuda

BYTES = 10**9
ROUNDS, REPEATS = 7, 5


def main(argv: Sequence[str] | None = None) -> None:
    """Time the passes, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    args = parser.parse_args(argv)
    common.check_extension(parser)
    timed = passes(BYTES // 4, torch.device("cuda"))

    def sample(call: Callable[[], object]) -> Callable[[], float]:
        # The fastest of a few, as copy_bandwidth takes it: what disturbs half a millisecond is not a pass's own.
        return lambda: min(cuda.gpu_seconds(call) for _ in range(REPEATS))

    samples = {name: sample(call) for name, (_, call) in timed.items()}
    times = common.interleaved(samples, ROUNDS, min_time=1e-6, seed=0)
    moved = {name: accesses * BYTES / statistics.median(times[name]) for name, (accesses, _) in timed.items()}
    shares = {name: moved[name] / moved["copy"] for name in moved}
    for name in moved:
        print(f"{name}: {moved[name] / 1e9:.0f} GB/s, {shares[name]:.0%} of a copy")
    report = {"bytes_per_second": moved, "of_a_copy": shares, "seconds": times}
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
