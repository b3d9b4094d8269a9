"""The tables and the plot of a results file. Needs no data, no GPU and no extension."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.cifar10_accuracy import plan
from benchmarks.cifar10_accuracy.plan import ARMS, Done, Record
from benchmarks.cifar10_accuracy.training import Recipe

RESULTS = Path(__file__).parent / "results" / "runs.jsonl"
LOOKS = {  # color, marker, and how far an arm is moved aside
    "LARS, tuned": ("#0072B2", "o", 1.06),
    "SGD, tuned": ("#8C8C8C", "^", 1.0),
    "SGD, linear scaling": ("#D55E00", "s", 0.94),
    "LAMB(AdamW), tuned": ("#009E73", "D", 1.12),
}


def finals(done: Done, name: str, batch: int, base_batch: int) -> tuple[float | None, list[Record]]:
    """Return an arm's lr, and its runs on the test set with it."""
    arm = ARMS[name]
    lr = plan.lr_of(arm, batch, base_batch, done)
    wanted = ("test", arm.optimizer, batch, lr)
    return lr, [record for run, record in sorted(done.items()) if run[:4] == wanted]


def sizes(done: Done) -> list[int]:
    """Return the batch sizes that were run."""
    return sorted({run.batch for run in done})


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.2f} %"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"


def accuracy_table(done: Done, recipe: Recipe) -> str:
    """Return the test accuracies as a Markdown table, in the form that torchlars has always had it in."""
    rows = []
    for batch in sizes(done):
        for name in ARMS:
            lr, records = finals(done, name, batch, recipe.base_batch)
            if records:
                bests, lasts = ([of(record) for record in records] for of in (plan.best, plan.last))
                diverged = sum(record["diverged"] for record in records)
                seeds = f"{len(records)}" + (f", {diverged} diverged" if diverged else "")
                rows.append([f"{batch}", name, f"{lr:g}", f"{recipe.warmup:g}", f"{recipe.epochs:g}"])
                rows[-1] += [f"{records[0]['steps']}", spread(bests), spread(lasts), seeds]
    header = ["batch", "lr policy", "lr", "warm-up", "epochs", "steps", "best top-1", "last top-1", "seeds"]
    return common.table(header, rows, left=2)


def sweep_table(done: Done) -> str:
    """Return all trials as a Markdown table: held-out accuracy by lr, the chosen one in bold."""
    rows = []
    for batch in sizes(done):
        for optimizer in plan.START:
            sweep = plan.tried(done, optimizer, batch)
            if sweep:
                chosen = plan.best_lr(sweep)
                cells = [f"{lr:g}: {accuracy:.2f}" for lr, accuracy in sweep.items()]
                marked = [f"**{cell}**" if lr == chosen else cell for lr, cell in zip(sweep, cells, strict=True)]
                inside = min(sweep) < chosen < max(sweep)
                rows.append([f"{batch}", optimizer, ", ".join(marked), "yes" if inside else "no"])
    return common.table(["batch", "optimizer", "lr: held-out top-1 in %", "best is inside"], rows, left=4)


def tables(done: Done, recipe: Recipe) -> str:
    """Return both tables, and where the runs come from."""
    found = sorted({common.describe(record["environment"]) for record in done.values()})
    seconds = sum(record["seconds"] for record in done.values())
    about = f"{len(done)} runs, whose times add up to {seconds / 60:.1f} minutes."
    about += f" Recipe: {common.describe(recipe._asdict())}."
    return "\n\n".join([accuracy_table(done, recipe), sweep_table(done), about, *found]) + "\n"


def draw(path: Path, done: Done, recipe: Recipe) -> None:
    """Draw the last accuracy against the batch size, and accuracy against epoch at the largest batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = {
        name: {batch: records for batch in sizes(done) if (records := finals(done, name, batch, recipe.base_batch)[1])}
        for name in ARMS
    }
    ticks = sorted({batch for by_batch in found.values() for batch in by_batch})
    for name, by_batch in found.items():
        color, marker, aside = LOOKS[name]
        lasts = [[plan.last(record) for record in records] for records in by_batch.values()]
        bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in lasts]
        means = [statistics.mean(values) for values in lasts]
        dodged = [batch * aside for batch in by_batch]
        left.errorbar(dodged, means, bars, label=name, color=color, marker=marker, ms=7, lw=2, capsize=4)
        for record in [record for batch in ticks[-1:] for record in by_batch.get(batch, [])]:
            seen, _, accuracies = zip(*record["curve"], strict=True)
            right.plot(seen, accuracies, color=color, lw=1.5, alpha=0.8)
    left.set(xscale="log", xlabel="batch size", ylabel="top-1 on the test set (%)")
    left.set_title(f"After {recipe.epochs:g} epochs: mean ± standard deviation over seeds")
    left.set_xticks(ticks, [f"{batch:,}" for batch in ticks])
    left.minorticks_off()
    left.legend(frameon=False, loc="lower left")
    right.set(xlabel="epoch")
    if ticks:
        right.set_title(f"During training at batch {ticks[-1]:,}, every seed")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Write tables and plot beside the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: results/runs.jsonl beside the script)")
    args = parser.parse_args(argv)
    recipe, done = plan.read(args.results)
    if recipe is None:
        parser.error(f"--results must hold runs (got: {args.results})")
    markdown = tables(done, recipe)
    args.results.with_suffix(".md").write_text(markdown, encoding="utf-8")
    draw(args.results.with_suffix(".png"), done, recipe)
    print(f"{markdown}\nsaved beside {args.results}, as .md and .png")


if __name__ == "__main__":
    main()
