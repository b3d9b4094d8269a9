"""Time one optimizer step: SGD or AdamW, LARS or LAMB around it and within it, and other people's. See README.md."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks import common
from benchmarks.earlier import Earlier
from benchmarks.step_time import agreement, chart, cuda, lamb, targets
from benchmarks.step_time.contestants import (
    EIGHT_BITS,
    OLD,
    OLD_PART,
    PART,
    Contestant,
    Hyper,
    contestants,
    in_runs,
)
from benchmarks.step_time.sets import SETS, LayerSet
from torchlars import _extension

#: For each ``--optimizer`` a function that returns all contestants, given the form of the floor.
CONTESTANTS = {"lars": contestants, "lamb": lamb.contestants}
#: So small that weights stay where they are, however long the run.
HYPER = Hyper(lr=1e-6, weight_decay=1e-4)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

Clock = Callable[[], float]


@dataclass
class Entry:
    """A contestant on a set, ready to be timed."""

    contestant: Contestant
    step: Callable[[], object]
    clocks: dict[str, Clock] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Check that contestants agree, time them, and write what was found."""
    args = parse(argv)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    threads_before = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return run(args, device, dtype, common.command("benchmarks.step_time.main", argv))
    finally:
        torch.set_num_threads(threads_before)


def run(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, command: str) -> dict[str, Any]:
    """Do what :func:`main` says."""
    if args.run_mb and not hasattr(_extension.extension, "set_run_bytes"):
        print("everything is skipped: --run-mb needs torchlars._C.set_run_bytes, which this build does not have")
        return {}
    found = common.environment(device)
    print(common.describe(found), flush=True)
    everyone = CONTESTANTS[args.optimizer]("fused")
    floor = floor_of(everyone)
    if not updates(floor, device, dtype):
        everyone = CONTESTANTS[args.optimizer]("foreach")
        instead = floor_of(everyone)
        print(f"{floor.name} does not update all of a {args.dtype} parameter here; {instead.name} stands in for it")
        floor = instead
    entrants, left_out = select(args, everyone)
    ours = [entrant for entrant in entrants if entrant.form in ("wrapper", "fused")]
    entrants += [in_runs(entrant, megabytes) for entrant in ours for megabytes in args.run_mb]

    errors, unable = agreement.check(entrants, device)
    left_out |= unable
    entrants = [entrant for entrant in entrants if entrant.name not in left_out]
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    print(f"{len(errors)} contestants agree with their formulas to {agreement.TOLERANCE:.0e}", flush=True)

    report: dict[str, Any] = {
        "command": command,
        "environment": found,
        "optimizer": args.optimizer,
        "device": args.device,
        "dtype": args.dtype,
        "left_out": left_out,
        "errors": errors,
        "sets": {},
    }
    if device.type == "cuda":
        report["copy_bandwidth"] = cuda.copy_bandwidth(device)
        print(f"a copy within the device moves {report['copy_bandwidth'] / 1e9:.0f} GB/s, read and written", flush=True)
    for name in args.sets:
        layers = SETS[name]
        reason = reason_to_skip(layers, device, dtype, number_of_states(entrants, bool(args.contestants)))
        if reason:
            print(f"\n{name} is skipped: {reason}")
            continue
        report["sets"][name] = time_set(name, layers, entrants, args, device, layers.dtype or dtype, floor)
        finish(name, report)
        print(f"\n{section(name, report)}", flush=True)

    prefix = [] if args.optimizer == "lars" else [args.optimizer]
    suffix = [f"{found['threads']}_threads"] if device.type == "cpu" else []
    file_name = args.name or "_".join([*prefix, args.device, args.dtype, *suffix])
    markdown = "\n\n".join(
        [f"`{command}`", common.describe(found), *(section(name, report) for name in report["sets"])]
    )
    common.write(args.out, file_name, report, markdown + "\n")
    chart.draw(args.out / f"{file_name}.png", report)
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--optimizer", choices=CONTESTANTS, default="lars", help="LARS beside SGD, or LAMB beside AdamW (default: lars)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights, gradients and state")
    parser.add_argument("--sets", nargs="+", choices=SETS, help="(default: all that are meant for the device)")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="(default: all; the floor always takes part)")
    parser.add_argument(
        "--run-mb",
        nargs="+",
        default=[],
        type=common.positive(int),
        metavar="MB",
        help="time torchlars also in runs of layers of so many MB of weights and gradients, which an L2 cache can hold",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out what has to be compiled")
    parser.add_argument("--compile-tiny", action="store_true", help="compile on the set tiny, too, which takes minutes")
    common.add_arguments(parser, Path(__file__).parent / "results", rounds=15, min_time=0.1)
    args = parser.parse_args(argv)
    common.check_extension(parser)
    args.sets = args.sets or [name for name, layers in SETS.items() if args.device in layers.devices]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can see, and there is none")
    if args.earlier and (args.device != "cpu" or args.optimizer != "lars"):
        parser.error("--earlier is for --device cpu and --optimizer lars")
    known = {entrant.name for base in ("fused", "foreach") for entrant in CONTESTANTS[args.optimizer](base)}
    unknown = sorted(set(args.contestants or ()) - known)
    if unknown:
        parser.error(f"--contestants must be of: {', '.join(sorted(known))} (got: {', '.join(unknown)})")
    return args


def floor_of(entrants: list[Contestant]) -> Contestant:
    """Return the contestant that all ratios are of."""
    (floor,) = (entrant for entrant in entrants if entrant.form == "floor")
    return floor


def updates(entrant: Contestant, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a contestant updates all of a parameter.

    On a CPU, SGD(fused=True) of torch 2.12 and 2.13 updates of a half-precision one only what is left over after whole
    SIMD vectors.
    """
    param = Parameter(torch.ones(1024, device=device, dtype=dtype))
    param.grad = torch.ones_like(param)
    entrant.build([param], Hyper(lr=0.5, weight_decay=0.0))()
    return bool((param != 1).all())


def select(args: argparse.Namespace, entrants: list[Contestant]) -> tuple[list[Contestant], dict[str, str]]:
    """Return who was asked for, and why others will not run."""
    chosen = [entrant for entrant in entrants if wanted(args, entrant) or entrant.form == "floor"]
    left_out = {entrant.name: "--no-compile" for entrant in chosen if entrant.compiles and args.no_compile}
    if args.dtype == "float64":
        left_out |= {entrant.name: "float64 has no momentum in 8 bits" for entrant in chosen if entrant.code_bytes}
    return [entrant for entrant in chosen if entrant.name not in left_out], left_out


def wanted(args: argparse.Namespace, entrant: Contestant) -> bool:
    """Return whether the user names a contestant, or names none."""
    return not args.contestants or entrant.name in args.contestants


def number_of_states(entrants: list[Contestant], all_of_them: bool) -> int:
    """Return how many tensors of a parameter's size all contestants on a large set keep together."""
    return sum(entrant.states for entrant in entrants if entrant.is_core or all_of_them)


def reason_to_skip(layers: LayerSet, device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    """Return why a set cannot be timed here, if so."""
    if not layers.is_large:
        return None
    if device.type != "cuda":
        return "it is for GPUs"
    # Weights, gradients and their master copy; everyone's state; some room.
    needed = int((3 + states + 0.1) * layers.elements() * (layers.dtype or dtype).itemsize)
    free, _ = torch.cuda.mem_get_info(device)
    if free < needed:
        return f"it needs {needed / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} are free"
    return None


def time_set(
    name: str,
    layers: LayerSet,
    entrants: list[Contestant],
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    floor: Contestant,
) -> dict[str, Any]:
    """Time all contestants on one set. They share weights and gradients; each has its own state."""
    params, restore = make_layers(layers, device, dtype)
    left_out: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    torch.compiler.reset()  # what was compiled for other shapes counts against a limit
    for entrant in entrants:
        if layers.is_large and not (entrant.is_core or args.contestants):
            left_out[entrant.name] = "memory"
        elif name == "tiny" and entrant.compiles and not args.compile_tiny:
            left_out[entrant.name] = "compiling 2000 layers takes minutes (--compile-tiny)"
        else:
            try:
                entries[entrant.name] = prepare(entrant, params, restore)
            except torch.cuda.OutOfMemoryError:
                left_out[entrant.name] = "out of memory"
                gc.collect()
                torch.cuda.empty_cache()
            except Exception as error:
                left_out[entrant.name] = agreement.reason_to_leave_out(entrant, error)
    for entrant_name, reason in left_out.items():
        print(f"left out of {name}: {entrant_name}: {reason}", flush=True)
    timed: dict[str, dict[str, Any]] = {entrant_name: {"clocks": {}} for entrant_name in entries}
    with ExitStack() as stack:
        before: dict[str, Clock] = {}
        for checkout in args.earlier:
            before |= stack.enter_context(Earlier(checkout, layers.shapes(), asdict(HYPER), dtype)).samples()
        timed |= {entrant_name: {"clocks": {}, "formula": None, "form": "earlier"} for entrant_name in before}
        for clock in ("gpu", "wall") if device.type == "cuda" else ("wall",):
            samples = {entrant_name: entry.clocks[clock] for entrant_name, entry in entries.items()} | before
            for entrant_name, times in common.interleaved(samples, args.rounds, args.min_time, args.seed).items():
                timed[entrant_name]["clocks"][clock] = {**common.summary(times), "rounds": times}
    for entrant_name, entry in entries.items():
        if device.type == "cuda":  # after all timing, which a profiler may slow down
            entry.facts["launches"] = len(cuda.kernels(entry.step))
        timed[entrant_name] |= entry.facts | {"formula": entry.contestant.formula, "form": entry.contestant.form}
        if entry.contestant.accesses is not None and (layers.reuse is not None or entry.contestant.form == "wrapper"):
            accesses = entry.contestant.accesses + entry.contestant.code_bytes / dtype.itemsize
            byte_floor = targets.byte_floor(accesses, entry.contestant.cacheable, layers.reuse, floor.accesses)
            timed[entrant_name] |= {"accesses": accesses, "byte_floor": byte_floor}
    return {
        "tensors": len(params),
        "elements": layers.elements(),
        "dtype": str(dtype).removeprefix("torch."),
        "floor": floor.name,
        "left_out": left_out,
        "contestants": timed,
    }


def make_layers(
    layers: LayerSet, device: torch.device, dtype: torch.dtype
) -> tuple[list[Parameter], Callable[[], None]]:
    """Return parameters with gradients, and a function that restores the gradients.

    A step of LARS consumes them, and so do those of some peers. Steps without new gradients would drive gradients into
    denormal numbers, which take another time. They are written from the last layer to the first, as backward does.
    """
    generator = torch.Generator(device).manual_seed(20170813)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)

    params = [Parameter(normal(shape, 0.05)) for shape in layers.shapes()]
    masters = [normal(tuple(param.shape), 0.01) for param in params]
    for param in params:
        param.grad = torch.empty_like(param)

    def restore() -> None:
        # Nothing refers to gradients in between, as in training: else a step of LARS asks whether layers share them.
        torch._foreach_copy_([param.grad for param in params[::-1]], masters[::-1])

    restore()
    return params, restore


def prepare(entrant: Contestant, params: list[Parameter], restore: Callable[[], None]) -> Entry:
    """Build a contestant, have it allocate and compile what it needs, and give it its clocks."""
    step = entrant.build(params, HYPER)
    entry = Entry(entrant, step)
    restore()
    first = common.seconds(step)
    if entrant.compiles:
        entry.facts["compile_seconds"] = first
    restore()
    step()

    def clock(read: Callable[[Callable[[], object]], float], what: Callable[[], object]) -> Clock:
        def sample() -> float:
            restore()
            return read(what)

        return sample

    if not params[0].is_cuda:
        entry.clocks["wall"] = clock(common.seconds, step)
        return entry

    entry.clocks["wall"] = clock(cuda.wall_seconds, step)
    launch, entry.facts["gpu_time_by"] = step, "events"
    if not entrant.host_syncs:
        try:
            launch, entry.facts["gpu_time_by"] = cuda.capture(step), "graph"
        except RuntimeError as error:
            print(f"{entrant.name} was not captured in a CUDA graph: {error}")
    entry.clocks["gpu"] = clock(cuda.gpu_seconds, launch)
    return entry


def finish(name: str, report: dict[str, Any]) -> None:
    """Add to the times of a set what follows from them: ratios, targets, bandwidths and comparisons."""
    result = report["sets"][name]
    timed, device = result["contestants"], report["device"]
    threads = report["environment"]["threads"]
    for entry in timed.values():
        for clock, times in entry["clocks"].items():
            times["ratio"] = common.ratio(times["rounds"], timed[result["floor"]]["clocks"][clock]["rounds"])
        main_clock = next(iter(entry["clocks"].values()))
        goal = targets.target(report["optimizer"], entry["form"], device, name, threads, result["dtype"])
        entry["target"], entry["verdict"] = targets.verdict(goal, main_clock["ratio"])
        if "copy_bandwidth" in report and "accesses" in entry:
            bytes_moved = entry["accesses"] * result["elements"] * DTYPES[result["dtype"]].itemsize
            entry["bandwidth"] = bytes_moved / main_clock["median"]
    result["comparisons"] = comparisons(name, device, threads, timed)


def comparisons(name: str, device: str, threads: int, timed: dict[str, dict[str, Any]]) -> list[str]:
    """Return in words how torchlars stands against the others, by wall time."""

    def speedup(ours: str, theirs: str) -> float:
        rounds = [timed[each]["clocks"]["wall"]["rounds"] for each in (theirs, ours)]
        return common.ratio(*rounds)

    def line(ours: str, theirs: str, goal: float | None, role: str = "") -> str:
        factor = speedup(ours, theirs)
        outcome = "" if goal is None else f" (target: ≥ {goal:g}×, {'met' if factor >= goal else 'missed'})"
        return f"{ours} is {factor:.2f}× as fast as {role}{theirs}{outcome}."

    lines = []
    others = [each for each, entry in timed.items() if entry["form"] == "other"]
    eager = [each for each in others if "compile_seconds" not in timed[each]]
    for ours, entry in timed.items():
        # What is compiled as a whole has its update within, as the fused form has, and no base to choose.
        rivals, role = (eager, "the fastest eager one of") if entry["form"] == "wrapper" else (others, "the fastest of")
        if entry["form"] in ("wrapper", "fused") and rivals:
            fastest = min(rivals, key=lambda each: timed[each]["clocks"]["wall"]["median"])
            lines.append(line(ours, fastest, 1.0, f"{role} the others, "))
        if entry["form"] == "wrapper" and OLD in timed:
            lines.append(line(ours, OLD, targets.WHOLE_STEP.get((device, name, threads))))
    for ours, whole in EIGHT_BITS.items():
        if ours in timed and whole in timed:
            share = 1 / speedup(ours, whole)
            floors = [timed[each].get("byte_floor") for each in (ours, whole)]
            told = [f"floor: {floors[0] / floors[1]:.2f}"] if all(floors) else []
            goal = targets.EIGHT_BITS.get((device, name, threads))
            told += [f"target: ≤ {goal:g}, {'met' if share <= goal else 'missed'}"] if goal else []
            more = f" ({'; '.join(told)})" if told else ""
            lines.append(f"{ours} takes {share:.2f} of the time of {whole}{more}.")
    if PART in timed and OLD_PART in timed:
        lines.append(line(PART, OLD_PART, targets.LARS_PART.get((device, name))))
    return lines


def section(name: str, report: dict[str, Any]) -> str:
    """Return the table of one set with what belongs to it, in Markdown."""
    result = report["sets"][name]
    has_gpu = "copy_bandwidth" in report
    header = ["contestant", "formula", f"{'GPU' if has_gpu else 'median'} ms", "quartiles", "ratio", "byte floor"]
    header += ["target", "verdict"]
    if has_gpu:
        header += ["by", "wall ms", "wall ratio", "launches", "GB/s", "of a copy"]
    rows = []
    for entrant, entry in result["contestants"].items():
        times = next(iter(entry["clocks"].values()))
        row = [
            entrant,
            entry["formula"] or "its own",
            f"{times['median'] * 1e3:.3f}",
            f"{times['q1'] * 1e3:.3f}–{times['q3'] * 1e3:.3f}",
            f"{times['ratio']:.2f}",
            f"{entry['byte_floor']:.2f}" if "byte_floor" in entry else "",
            entry["target"],
            entry["verdict"],
        ]
        if has_gpu:
            wall = entry["clocks"]["wall"]
            row += [entry["gpu_time_by"], f"{wall['median'] * 1e3:.3f}", f"{wall['ratio']:.2f}"]
            row += [str(entry.get("launches", ""))]
            bandwidth = entry.get("bandwidth")
            row += (
                ["", ""]
                if bandwidth is None
                else [f"{bandwidth / 1e9:.0f}", f"{bandwidth / report['copy_bandwidth']:.0%}"]
            )
        rows.append(row)
    title = f"### {name}: {result['tensors']} tensors, {result['elements'] / 1e6:.4g}M elements, {result['dtype']}"
    lines = [*result["comparisons"]]
    lines += [
        f"{entrant}: {entry['compile_seconds']:.0f} s to compile."
        for entrant, entry in result["contestants"].items()
        if "compile_seconds" in entry
    ]
    absent = report["left_out"] | result["left_out"]
    lines += [f"Left out: {entrant} ({reason})." for entrant, reason in absent.items()]
    return "\n\n".join(
        [title, common.table(header, rows, left=2), *(["\n".join(f"- {each}" for each in lines)] if lines else [])]
    )


if __name__ == "__main__":
    try:
        main()
    except agreement.Disagreement as error:
        sys.exit(str(error))
