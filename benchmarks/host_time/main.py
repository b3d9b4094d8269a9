"""Time what a step costs the host per tensor: Python, the binding and one element of work. See README.md beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from benchmarks import common
from benchmarks.earlier import Earlier
from benchmarks.step_time.contestants import Hyper, NoOp, grads_of, lars, sgd, torchlars_sgd
from torchlars import ops

HYPER = Hyper(lr=1e-6, weight_decay=1e-4)
PART = "LARS part: LARS(no-op) − no-op"
TARGET_NS = 120
FROM_TENSORS = 100  # a step of fewer costs what any step costs
LAYERS_IN_GROUPS = 200

Step = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Time every contestant on every number of tensors, and write what was found."""
    args = parse(argv)
    device = torch.device(args.device)
    threads_before = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        found = common.environment(device)
        print(common.describe(found), flush=True)
        report: dict[str, Any] = {
            "command": common.command("benchmarks.host_time.main", argv),
            "environment": found,
            "target_ns": TARGET_NS,
            "left_out": {},
            "tensors": {},
            "groups": {},
        }
        for count in args.tensors:
            report["tensors"][count] = time_tensors(count, args, device, report["left_out"])
        for count in args.groups:
            report["groups"][count] = time_groups(count, args, device)
    finally:
        torch.set_num_threads(threads_before)
    tables = f"{summary_table(report)}\n\n{groups_table(report)}\n"
    markdown = f"`{report['command']}`\n\n{common.describe(found)}\n\n{tables}"
    print(f"\n{tables}")
    common.write(args.out, args.name or f"{args.device}_{found['threads']}_threads", report, markdown)
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--tensors", nargs="+", type=common.positive(int), default=[1, 100, 1000, 10_000], metavar="N")
    help_of_groups = f"of {LAYERS_IN_GROUPS} tensors in all (default: 1 2 50 200)"
    parser.add_argument(
        "--groups", nargs="*", type=common.positive(int), default=[1, 2, 50, 200], metavar="N", help=help_of_groups
    )
    common.add_arguments(parser, Path(__file__).parent / "results", rounds=15, min_time=0.05)
    args = parser.parse_args(argv)
    common.check_extension(parser)
    if args.earlier and args.device != "cpu":
        parser.error("--earlier is for --device cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can see, and there is none")
    return args


def new_params(count: int, device: torch.device) -> list[Parameter]:
    """Return parameters of one element, with gradients."""
    params = [Parameter(torch.full((1,), 0.5, device=device)) for _ in range(count)]
    for param in params:
        param.grad = torch.full((1,), 0.1, device=device)
    return params


def contestants(params: list[Parameter], left_out: dict[str, str]) -> dict[str, Step]:
    """Return what is timed, by name.

    Pieces of a step keep gradients in lists, and have their own: a step looks for shared memory where others keep them.
    """
    count = len(params)
    apart = new_params(count, params[0].device)
    grads = grads_of(apart)
    gathered: list[Any] = []
    options = ops.fast_options(
        "LarsOptions", weight_decay=HYPER.weight_decay, trust_coef=HYPER.trust_coef, eps=HYPER.eps
    )

    def gather() -> None:
        layers = ops.fast_layers("LarsLayers")
        layers.add([({"params": apart}, options)])
        gathered[:] = layers.buckets

    gather()
    decays, coefs, eps = ([value] * count for value in (HYPER.weight_decay, HYPER.trust_coef, HYPER.eps))
    how = {"maximize": False, "weight_decays": decays, "trust_coefs": coefs, "eps": eps}
    ratios = ops.empty_ratios(grads, apart)
    steps: dict[str, Step] = {
        "reading p.grad in a Python loop": lambda: [param.grad for param in params],
        "ops.scale_gradients_, lists ready": lambda: ops.scale_gradients_(grads, apart, ratios=ratios, **how),
        "of the LARS part: gathering in C++": gather,
        "of the LARS part: the op, called from C++": lambda: [bucket.adapt() for bucket in gathered],
        "no-op": NoOp(params, HYPER).step,
        "LARS(no-op)": lars(NoOp(params, HYPER), HYPER),
        "SGD foreach": sgd(params, HYPER, "foreach").step,
        "SGD fused": sgd(params, HYPER, "fused").step,
        "LARS(SGD fused)": lars(sgd(params, HYPER, "fused"), HYPER),
    }
    try:
        steps["torchlars.optim.SGD"] = torchlars_sgd(params, HYPER).step
        steps["LARS(torchlars.optim.SGD)"] = lars(torchlars_sgd(params, HYPER), HYPER)
    except ImportError as error:
        left_out["torchlars.optim.SGD"] = str(error)
        print(f"left out: torchlars.optim.SGD: {error}")
    return steps


def time_tensors(
    count: int, args: argparse.Namespace, device: torch.device, left_out: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Return nanoseconds per tensor of every contestant for ``count`` tensors of one element."""
    params = new_params(count, device)

    def clock(step: Step) -> Callable[[], float]:
        def sample() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize()  # an idle device: what is timed is the host's own work
            return common.seconds(step)

        return sample

    steps = contestants(params, left_out)
    samples = {name: clock(step) for name, step in steps.items()}
    for step in steps.values():
        step()  # allocates state
    times = in_turns(samples, args, count, groups=1)
    per_tensor = {name: [time / count * 1e9 for time in rounds] for name, rounds in times.items()}
    return {name: {**common.summary(rounds), "rounds": rounds} for name, rounds in per_tensor.items()}


def in_turns(
    samples: dict[str, Callable[[], float]], args: argparse.Namespace, count: int, groups: int
) -> dict[str, list[float]]:
    """Return the times of all contestants and of the LARS part, and those of earlier versions if there are any."""
    with ExitStack() as stack:
        revisions = [""]
        for checkout in args.earlier:
            earlier = Earlier(checkout, [(1,)] * count, asdict(HYPER), groups=groups, restores=False)
            samples = samples | stack.enter_context(earlier).samples()
            revisions.append(f" at {earlier.revision}")
        times = common.interleaved(samples, args.rounds, args.min_time, args.seed)
    for at in revisions:
        pairs = zip(times[f"LARS(no-op){at}"], times[f"no-op{at}"], strict=True)
        times[PART + at] = [with_lars - base for with_lars, base in pairs]
    return times


def time_groups(count: int, args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Any]]:
    """Return microseconds of a step over the same tensors of one element in ``count`` groups."""
    params = new_params(LAYERS_IN_GROUPS, device)

    def in_groups() -> Any:
        size = LAYERS_IN_GROUPS // count
        return [{"params": params[i * size : (i + 1) * size]} for i in range(count)]

    steps: dict[str, Step] = {
        "no-op": NoOp(in_groups(), HYPER).step,
        "LARS(no-op)": lars(NoOp(in_groups(), HYPER), HYPER),
        "SGD fused": sgd(in_groups(), HYPER, "fused").step,
        "LARS(SGD fused)": lars(sgd(in_groups(), HYPER, "fused"), HYPER),
        "torchlars.optim.SGD": torchlars_sgd(in_groups(), HYPER).step,
        "LARS(torchlars.optim.SGD)": lars(torchlars_sgd(in_groups(), HYPER), HYPER),
    }
    for step in steps.values():
        step()
    samples = {name: partial(common.seconds, step) for name, step in steps.items()}
    times = in_turns(samples, args, LAYERS_IN_GROUPS, groups=count)
    return {name: common.summary([time * 1e6 for time in rounds]) for name, rounds in times.items()}


def numbered(count: int, noun: str) -> str:
    """Return a number of things."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def groups_table(report: dict[str, Any]) -> str:
    """Return microseconds a step as a Markdown table, with what each further group adds."""
    counts = list(report["groups"])
    if not counts:
        return ""
    first, last = counts[0], counts[-1]
    rows = []
    for name in report["groups"][first]:
        medians = [report["groups"][count][name]["median"] for count in counts]
        more = (medians[-1] - medians[0]) / max(last - first, 1)
        rows.append([name, *(f"{median:.0f}" for median in medians), f"{more:.2f}"])
    header = [
        f"µs a step, {LAYERS_IN_GROUPS} tensors: median",
        *(numbered(count, "group") for count in counts),
        "a further one",
    ]
    return common.table(header, rows)


def summary_table(report: dict[str, Any]) -> str:
    """Return nanoseconds per tensor as a Markdown table, with the quartiles and the target."""
    counts = list(report["tensors"])
    rows = []
    for name in report["tensors"][counts[0]]:
        row = [name]
        for count in counts:
            times = report["tensors"][count][name]
            row.append(f"{times['median']:.0f} ({times['q1']:.0f}–{times['q3']:.0f})")
        of_many = [report["tensors"][count][name]["median"] for count in counts if count >= FROM_TENSORS]
        has_target = name == PART and len(of_many) > 0
        row += [f"≤ {TARGET_NS}", "met" if max(of_many) <= TARGET_NS else "missed"] if has_target else ["", ""]
        rows.append(row)
    tensors = [numbered(count, "tensor") for count in counts]
    header = ["ns per tensor: median (quartiles)", *tensors, "target", "verdict"]
    return common.table(header, rows)


if __name__ == "__main__":
    main()
