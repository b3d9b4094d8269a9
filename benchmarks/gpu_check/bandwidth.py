"""What the passes of LARS move in a second on tensors of 1 GB, beside a copy of as much.

``python -m benchmarks.gpu_check.bandwidth``
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks import common
from benchmarks.gpu_check.cases import passes
from benchmarks.step_time import cuda

ROUNDS, REPEATS = 7, 5


def main(argv: Sequence[str] | None = None) -> None:
    """Time the passes, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda", help="(default: cuda)")
    parser.add_argument("--bytes", type=common.positive(int), default=10**9, help="of a tensor (default: 1 GB)")
    args = parser.parse_args(argv)
    common.check_extension(parser)
    timed = passes(args.bytes // 4, args.device)
    seconds = cuda.gpu_seconds if args.device.type == "cuda" else common.seconds

    def sample(call: Callable[[], object]) -> Callable[[], float]:
        # The fastest of a few, as copy_bandwidth takes it: what disturbs half a millisecond is not a pass's own.
        return lambda: min(seconds(call) for _ in range(REPEATS))

    samples = {name: sample(call) for name, (_, call) in timed.items()}
    times = common.interleaved(samples, ROUNDS, min_time=1e-6, seed=0)
    moved = {name: accesses * args.bytes / statistics.median(times[name]) for name, (accesses, _) in timed.items()}
    for name, rate in moved.items():
        print(f"{name}: {rate / 1e9:.0f} GB/s, {rate / moved['copy']:.0%} of a copy")


if __name__ == "__main__":
    main()
