"""Does LARS keep its accuracy as the batch grows? CIFAR-10, ResNet-9, four arms. See README.md beside it."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.cifar10_accuracy import data, plan, report, workers
from benchmarks.cifar10_accuracy.plan import Record
from benchmarks.cifar10_accuracy.training import DTYPES, Recipe, Run
from torchlars import _extension

DEFAULTS, PLAN = Recipe(""), plan.Plan()


def main(argv: Sequence[str] | None = None) -> None:
    """Carry out the runs that are not there yet, as far as time goes, and print the tables."""
    start = time.perf_counter()
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder, workers.executor(args.workers) as pool:
        try:
            images = data.synthetic() if args.synthetic else data.load(args.data, pool.map)
        except ValueError as error:
            args.parser.error(f"--data {error}")
        if args.prepare:
            data.save(args.prepare, images)
            args.parser.exit(message=f"saved as {args.prepare}\n")
        recipe = Recipe(
            images.fingerprint(),
            epochs=args.epochs,
            warmup=args.warmup,
            width=args.width,
            cutout=args.cutout,
            microbatch=args.microbatch,
            base_batch=args.base_batch,
            bias_lr=args.bias_lr,
            dtype=args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"),
        )
        try:
            _, done = plan.read(args.results, recipe)
        except plan.OtherRecipe as error:
            args.parser.error(f"--results: {error}")
        environment = common.environment(args.device)
        environment |= {"compile": args.compile, "graph": args.graph, "workers": args.workers}
        print(common.describe(environment), flush=True)
        shared = Path(folder) / "data.npz"
        data.save(shared, images)
        wanted = plan.Plan(args.batches, args.trials, args.seeds, args.arms)
        seconds: dict[int, float] = {}

        def ends_in_time(run: Run) -> bool:
            elapsed = time.perf_counter() - start
            expected = seconds.get(run.batch, max(seconds.values(), default=0))
            return not args.minutes or elapsed + expected <= 60 * args.minutes

        def next_run(running: Collection[Run]) -> Run | None:
            runs = plan.next_runs(done, wanted, recipe)
            return next((run for run in runs if run not in running and ends_in_time(run)), None)

        options = (shared, args.device, args.compile, args.graph)
        for run, found in workers.side_by_side(pool, args.workers, next_run, recipe, *options):
            seconds[run.batch] = max(found["seconds"], seconds.get(run.batch, 0))
            done[run] = {"run": run._asdict(), "recipe": recipe._asdict(), **found, "environment": environment}
            plan.append(args.results, done[run])
            print(f"{(time.perf_counter() - start) / 60:5.1f} min  {name_of(run)}: {end_of(done[run])}", flush=True)
    left = next(plan.next_runs(done, wanted, recipe), None)
    print(f"time is up before {name_of(left)}: the same command goes on from there" if left else "all runs are there")
    print(f"\n{report.tables(done, recipe)}")


def end_of(record: Record) -> str:
    """Return what came out of a run as a few words."""
    end = "diverged" if record["diverged"] else f"{plan.last(record):.2f} %, best {plan.best(record):.2f} %"
    return f"{end} ({record['seconds']:.1f} s)"


def name_of(run: Run) -> str:
    """Return a run as a few words."""
    return f"{run.optimizer}, batch {run.batch}, lr {run.lr:g}, seed {run.seed}, on the {run.tested_on} set"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="what --prepare wrote, or what it reads")
    source.add_argument("--synthetic", action="store_true", help="ten colors under noise, to try the script out")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write --data as one .npz of pixels, and stop")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="(default: cuda)")
    parser.add_argument("--minutes", type=common.positive(float), help="start no run that would not end within these")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="(default: results/runs.jsonl)")
    number, size = common.positive(float), common.positive(int)
    parser.add_argument("--batches", nargs="+", type=size, default=PLAN.batches, help=f"(default: {PLAN.batches})")
    parser.add_argument("--arms", nargs="+", choices=plan.ARMS, default=PLAN.arms, help="(default: all)")
    parser.add_argument("--trials", type=size, default=PLAN.trials, help=f"of a sweep (default: {PLAN.trials})")
    parser.add_argument("--seeds", type=size, default=PLAN.seeds, help=f"(default: {PLAN.seeds})")
    parser.add_argument("--workers", type=size, default=1, help="runs at a time, each in its process (default: 1)")
    parser.add_argument("--graph", action="store_true", help="capture forward and backward in a CUDA graph")
    parser.add_argument("--compile", action="store_true", help="pass the network through torch.compile")
    recipe = parser.add_argument_group("recipe", "the same for all runs of a results file")
    recipe.add_argument("--epochs", type=number, default=DEFAULTS.epochs, help=f"(default: {DEFAULTS.epochs})")
    recipe.add_argument("--warmup", type=number, default=DEFAULTS.warmup, help=f"epochs (default: {DEFAULTS.warmup})")
    recipe.add_argument("--width", type=size, default=DEFAULTS.width, help=f"channels (default: {DEFAULTS.width})")
    recipe.add_argument("--cutout", type=size, default=DEFAULTS.cutout, help="pixels a side (default: none)")
    recipe.add_argument(
        "--microbatch",
        type=size,
        default=DEFAULTS.microbatch,
        help=f"images that go through the network, and its batch norms, at once (default: {DEFAULTS.microbatch})",
    )
    recipe.add_argument(
        "--base-batch",
        type=size,
        default=DEFAULTS.base_batch,
        help=f"batch size from whose lr linear scaling starts (default: {DEFAULTS.base_batch})",
    )
    recipe.add_argument(
        "--bias-lr",
        type=number,
        default=DEFAULTS.bias_lr,
        help=f"of biases and norms under LARS, at the base batch size (default: {DEFAULTS.bias_lr})",
    )
    recipe.add_argument("--dtype", choices=DTYPES, help="of autocast (default: bfloat16 on CUDA, else float32)")
    args = parser.parse_args(argv)
    args.parser = parser
    if args.warmup >= args.epochs:
        parser.error(f"--warmup must be less than --epochs (got: {args.warmup:g} and {args.epochs:g})")
    if args.graph and args.device.type != "cuda":
        parser.error(f"--graph needs --device cuda (got: {args.device})")
    if args.prepare:
        return args  # needs neither an extension nor a GPU
    common.check_extension(parser)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can see, and there is none")
    if args.device.type == "cuda" and not _extension.extension.has_cuda:
        parser.error(f"--device cuda needs torchlars' CUDA kernels ({_extension.reason})")
    return args


if __name__ == "__main__":
    main()
