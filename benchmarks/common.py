"""What the benchmarks share: interleaved turns, quartiles, the environment, tables and files."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import torchlars
from torchlars import _extension

PEERS = ("timm", "pytorch_optimizer", "bitsandbytes")

#: How the names of environment variables begin that say how memory is allocated and where threads run.
TUNING = ("GLIBC_TUNABLES", "GOMP_", "KMP_", "LD_PRELOAD", "MALLOC_", "OMP_", "THP_")


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turn(sample: Callable[[], float], min_time: float) -> float:
    """Return the median of one contestant's samples in one round.

    The first sample is thrown away: it finds the state of other contestants in the cache. The turn ends when the others
    add up to ``min_time``.
    """
    sample()
    samples = [sample()]
    while sum(samples) < min_time:
        samples.append(sample())
    return statistics.median(samples)


def interleaved(
    samples: Mapping[str, Callable[[], float]], rounds: int, min_time: float, seed: int
) -> dict[str, list[float]]:
    """Give every contestant one turn a round, in a new random order each, and return their times round by round.

    A machine that slows down for a while slows all of them, and no one always follows the same neighbour.
    """
    order = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in samples}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            gc.collect()
            for name in order.sample(list(samples), len(samples)):
                times[name].append(turn(samples[name], min_time))
    finally:
        if was_enabled:
            gc.enable()
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratio(times: Sequence[float], floor: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio within a round, where both saw the same machine."""
    return statistics.median(time / unit for time, unit in zip(times, floor, strict=True))


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchlars": f"{torchlars.__version__} ({'reference' if _extension.extension is None else 'extension'})",
        **versions,
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith(TUNING)},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda}
    return found


def cpu_model() -> str:
    """Return the processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(found: Mapping[str, Any]) -> str:
    """Return the environment as one line."""
    return ", ".join(f"{key}: {'not installed' if value is None else value}" for key, value in found.items())


def command(module: str, argv: Sequence[str] | None) -> str:
    """Return the command line that repeats a run."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first ``left`` columns are aligned to the left, the others to the right."""
    rows = [header, *rows]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = (
            f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"| {' | '.join(cells)} |")
    rules = ("-" * (width + 2) if column < left else "-" * (width + 1) + ":" for column, width in enumerate(widths))
    lines.insert(1, f"|{'|'.join(rules)}|")
    return "\n".join(lines)


def write(out: Path, name: str, report: Mapping[str, Any], markdown: str) -> None:
    """Write ``name.json``, with every round's times, and ``name.md``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(markdown, encoding="utf-8")
    print(f"saved as {name}.json and {name}.md in {out}")


def check_extension(parser: argparse.ArgumentParser) -> None:
    """Refuse to time the reference in the name of torchlars."""
    if _extension.extension is None:
        parser.error(
            f"torchlars has no extension in {_extension.PACKAGE} ({_extension.reason}); "
            "build it in place: pip install --no-build-isolation --no-deps -e ."
        )


def add_arguments(parser: argparse.ArgumentParser, out: Path, rounds: int, min_time: float) -> None:
    """Add the options that all benchmarks have."""
    help_of_earlier = "checkouts of earlier versions, built in place, that are timed beside this one (LARS, on a CPU)"
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], metavar="FOLDER", help=help_of_earlier)
    parser.add_argument("--threads", type=positive(int), help="CPU threads (default: torch's own number)")
    parser.add_argument("--rounds", type=positive(int), default=rounds, help=f"(default: {rounds})")
    parser.add_argument(
        "--min-time",
        type=positive(float),
        default=min_time,
        help=f"seconds that a contestant is timed for in every round (default: {min_time})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order within rounds (default: 0)")
    parser.add_argument("--out", type=Path, default=out, help="folder of the results (default: beside the script)")
    parser.add_argument("--name", help="of the files in it (default: made from device, dtype and threads)")


def positive(kind: type) -> Callable[[str], Any]:
    """Return a parser of positive numbers."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"must be a positive number (got: {text})")
        return number

    return parse
