"""What tests, sanitizers and benchmarks have to say, and the summary of it. Needs neither torch nor torchlars."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
LINES = 60  # of the summary on the screen


@dataclass
class Result:
    """What became of a step."""

    step: str
    outcome: str  # PASSED, FAILED or SKIPPED
    note: str = ""
    seconds: float = 0.0
    is_decisive: bool = False  # whether the exit status depends on it
    data: dict[str, Any] = field(default_factory=dict)


# Sanitizers


def sanitizer_errors(output: str) -> int | None:
    """Return the number of errors that compute-sanitizer counts, or None if it never came to counting."""
    errors = [int(count) for count in re.findall(r"^=+ ERROR SUMMARY: (\d+) errors?", output, re.MULTILINE)]
    hazards = [int(count) for count in re.findall(r"^=+ RACECHECK SUMMARY: (\d+) hazards?", output, re.MULTILINE)]
    return sum(errors + hazards) if errors or hazards else None


def blames_torchlars(output: str) -> bool:
    """Return whether a report, and not the program itself, names one of torchlars' kernels."""
    return re.search(r"^=+ .*\btorchlars::cuda::", output, re.MULTILINE) is not None


def agreement(output: str) -> str:
    """Return how many cases agree with the reference, in words, or nothing if they did not reach their end."""
    agrees = re.search(r"^\d+ cases agree with the reference", output, re.MULTILINE)
    return agrees[0] if agrees else ""


def profiled(output: str) -> list[str]:
    """Return the names of the kernels that Nsight Compute has profiled, each once."""
    return list(dict.fromkeys(re.findall(r'^==PROF== Profiling "(?:void )?(?:\w+::)*(\w+)', output, re.MULTILINE)))


def clip(text: str, head: int = 2000, tail: int = 10000) -> str:
    """Return a text without its middle, if it is long."""
    if len(text) <= head + tail:
        return text
    return f"{text[:head]}\n[... {len(text) - head - tail} characters left out ...]\n{text[-tail:]}"


# Tests


def test_cases(paths: Iterable[Path]) -> Iterator[ElementTree.Element]:
    """Return what JUnit files tell of each test. One whose writer was killed tells nothing."""
    for path in paths:
        with suppress(ElementTree.ParseError):
            yield from ElementTree.parse(path).getroot().iter("testcase")


def junit(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the counts of JUnit files, and the names of the tests that failed."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in test_cases(paths):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            counts["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def outcome_of(paths: Iterable[Path], name: str) -> str:
    """Return what became of the tests whose name begins so: met, missed or, if none of them ran, an empty string."""
    outcomes = {
        not {child.tag for child in case} & {"failure", "error"}
        for case in test_cases(paths)
        if (case.get("name") or "").startswith(name) and case.find("skipped") is None
    }
    return "" if not outcomes else "missed" if False in outcomes else "met"


# Targets


@dataclass
class Row:
    """One target, and what was seen of it."""

    figure: str
    target: str
    floor: str
    seen: str
    verdict: str

    def cells(self) -> list[str]:
        """Return it as strings of a table."""
        return [self.figure, self.target, self.floor, self.seen or "–", self.verdict or "not measured"]


WRAPPER, FUSED = "LARS(SGD fused)", "LARS(torchlars.optim.SGD)"
PART, OLD_PART = "LARS part: torchlars", "LARS part: torchlars 0.1.2 algorithm"
LEAST_SHARE = 0.9  # of a copy's bandwidth
MOST_LAUNCHES = 2  # a (device, dtype)
LEAST_FACTOR = 20.0  # of speed over torchlars 0.1.2


def rows(sets: dict[str, Any], steps: dict[str, Any], bandwidth: dict[str, Any], replays: str) -> list[Row]:
    """Return all targets of a GPU.

    Args:
        sets: those of the reports of step_time.
        steps: what steps.py wrote.
        bandwidth: what bandwidth.py wrote.
        replays: what became of the tests of graph replay.
    """
    found = [
        ratio_row(sets, "resnet50", WRAPPER, "≤ 2.1, then ≤ 1.7", "1.6"),
        ratio_row(sets, "resnet50", FUSED, "≤ 1.45, then ≤ 1.2", "1.0"),
        ratio_row(sets, "llama_7b_bf16", FUSED, "≤ 1.4", "1.2"),
    ]
    factor = speedup(sets.get("resnet50"), PART, OLD_PART)
    verdict = "" if factor is None else "met" if factor >= LEAST_FACTOR else "missed"
    seen = "" if factor is None else f"{factor:.1f}×"
    found.append(Row("LARS part over 0.1.2's, resnet50, wall", f"≥ {LEAST_FACTOR:.0f}×", "", seen, verdict))

    for name in ("norm pass", "scale pass"):
        share = bandwidth.get("of_a_copy", {}).get(name)
        verdict = "" if share is None else "met" if share >= LEAST_SHARE else "missed"
        seen = "" if share is None else f"{share:.0%}"
        found.append(Row(f"bandwidth of the {name}, 1 GB, of a copy", f"≥ {LEAST_SHARE:.0%}", "100 %", seen, verdict))

    # Left out: LAMB over our own SGD, whose update is one launch more; updates scaled by the ratios of gradients, which
    # are measured and decided before the base's step.
    counted = (
        mode
        for name, mode in steps.items()
        if mode.get("torchlars") and not (name.startswith("LAMB(torchlars") or name.endswith(", of updates"))
    )
    most = max((mode["torchlars"] / mode["buckets"] for mode in counted), default=None)
    verdict = "" if most is None else "met" if most <= MOST_LAUNCHES else "missed"
    seen = "" if most is None else f"{most:g}"
    found.append(Row("launches a step and (device, dtype), of gradients", f"≤ {MOST_LAUNCHES}", "", seen, verdict))
    waiting = [name for name, mode in steps.items() if mode.get("waits")]
    verdict = "" if not steps else "missed" if waiting else "met"
    found.append(Row("modes in which the host waits", "0", "0", f"{len(waiting)} of {len(steps)}", verdict))
    found.append(Row("graph replay has the bits of eager steps (tests)", "same bits", "", "", replays))
    return found


def ratio_row(sets: dict[str, Any], layers: str, contestant: str, target: str, floor: str) -> Row:
    """Return the target of a ratio to SGD fused, as step_time judged it."""
    figure = f"{contestant} / SGD fused, {layers}"
    entry = sets.get(layers, {}).get("contestants", {}).get(contestant)
    if entry is None or "gpu" not in entry["clocks"]:
        return Row(figure, target, floor, "", "")
    by = entry.get("gpu_time_by")
    seen = f"{entry['clocks']['gpu']['ratio']:.2f}" + ("" if by == "graph" else f" (by {by})")
    return Row(figure, entry["target"] or target, floor, seen, entry["verdict"])


def speedup(layers: dict[str, Any] | None, ours: str, theirs: str) -> float | None:
    """Return the median over rounds of how many times faster we are, by wall time."""
    timed = (layers or {}).get("contestants", {})
    if ours not in timed or theirs not in timed:
        return None
    pairs = zip(*(timed[name]["clocks"]["wall"]["rounds"] for name in (theirs, ours)), strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


def rivals(sets: dict[str, Any]) -> list[list[str]]:
    """Return by set and form of torchlars: its wall time, and the fastest rival's."""
    found = []
    for name, layers in sets.items():
        walls = {
            contestant: (entry["form"], entry["clocks"]["wall"]["median"])
            for contestant, entry in layers["contestants"].items()
        }
        others = {contestant: wall for contestant, (form, wall) in walls.items() if form == "other"}
        if others:
            fastest = min(others, key=lambda each: others[each])
            for ours in (each for each in (WRAPPER, FUSED) if each in walls):
                wall = walls[ours][1]
                factor = f"{others[fastest] / wall:.2f}×"
                found.append([name, ours, f"{wall * 1e3:.3f}", fastest, f"{others[fastest] * 1e3:.3f}", factor])
    return found


# Summary


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. That of benchmarks.common comes with torchlars, which is yet to be built."""
    lines = [list(header), *(list(row) for row in body)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    text = [f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(line, widths, strict=True))} |" for line in lines]
    text.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(text)


def describe(found: dict[str, Any]) -> str:
    """Return the environment as lines of text."""
    gpu = ("gpu", "capability", "memory_gib", "l2_mib", "multiprocessors", "driver")
    lines = []
    for names in (gpu, [name for name in found if name not in (*gpu, "missing")]):
        lines.append(", ".join(f"{name}: {'–' if found[name] is None else found[name]}" for name in names))
    return "\n".join(lines)


def summary(found: dict[str, Any], results: Sequence[Result], targets: Sequence[Row], faster: list[list[str]]) -> str:
    """Return the summary, of at most LINES lines."""
    steps = [[result.step, result.outcome, one_line(result.note), f"{result.seconds:.0f}"] for result in results]
    parts = [
        "GPU check: " + ("all that decides has passed" if passes(results) else "NOT PASSED"),
        describe(found),
        "",
        table(["step", "result", "", "s"], steps),
        "",
        table(["figure", "target", "floor", "seen", "verdict"], [row.cells() for row in targets]),
    ]
    if faster:
        parts += ["", table(["set", "torchlars", "wall ms", "fastest rival", "wall ms", "factor"], faster)]
    lines = "\n".join(parts).splitlines()
    return "\n".join(lines if len(lines) <= LINES else [*lines[: LINES - 1], "[...]"])


def one_line(text: str, width: int = 90) -> str:
    """Return a text that fits a cell."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= width else text[: width - 3] + "..."


def passes(results: Sequence[Result]) -> bool:
    """Return whether everything that decides has been run, and has passed."""
    decisive = [result.outcome for result in results if result.is_decisive]
    return bool(decisive) and all(outcome == PASSED for outcome in decisive)
