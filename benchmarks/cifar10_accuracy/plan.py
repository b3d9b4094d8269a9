"""Which run comes next: a function of those that are there, so that work can stop at any time and go on elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import log2, sqrt
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cifar10_accuracy.training import Recipe, Run

Record = dict[str, Any]
Done = Mapping[Run, Record]


class Arm(NamedTuple):
    """A policy: an optimizer, and whether its lr is tuned at every batch size or scaled from the one at the base."""

    optimizer: str
    tuned: bool


ARMS = {
    "LARS, tuned": Arm("LARS", tuned=True),
    "SGD, tuned": Arm("SGD", tuned=True),
    "SGD, linear scaling": Arm("SGD", tuned=False),
    "LAMB(AdamW), tuned": Arm("LAMB", tuned=True),
}
# Where a sweep starts at batch 256. At other sizes all three start √(batch / 256) times as high, and climb from there.
START = {"SGD": 0.2, "LARS": 4.0, "LAMB": 0.005}


class Plan(NamedTuple):
    """What is to be run: batch sizes, the most informative first, trials of a sweep and seeds."""

    batches: Sequence[int] = (16384, 256, 8192, 2048, 32768)
    trials: int = 5
    seeds: int = 3
    arms: Sequence[str] = tuple(ARMS)

    def stages(self) -> Iterator[tuple[Sequence[int], range]]:
        """Yield batch sizes and seeds: the first two sizes with all seeds, then the others."""
        for sizes in (self.batches[:2], self.batches[2:]):
            yield sizes, range(1)
            yield sizes, range(1, self.seeds)


def start_lr(optimizer: str, batch: int) -> float:
    """Return the lr of a sweep's first trial."""
    return START[optimizer] * sqrt(batch / 256)


def next_trial(start: float, tried: Mapping[float, float], trials: int) -> float | None:
    """Return the next lr of a sweep, or None at its end. It climbs from the best one so far: ×2, ÷2, ×√2, ÷√2.

    Args:
        start: the first lr.
        tried: accuracies by lr.
        trials: how many there may be.
    """
    if not tried:
        return float(f"{start:.3g}")
    if len(tried) >= trials:
        return None
    halves = {round(2 * log2(lr / start)) for lr in tried}  # half powers of two above the start
    best = round(2 * log2(best_lr(tried) / start))
    for move in (2, -2, 1, -1):
        if best + move not in halves:
            return float(f"{start * 2 ** ((best + move) / 2):.3g}")
    return None


def best_lr(tried: Mapping[float, float]) -> float:
    """Return the lr of the highest accuracy, the smaller one of two."""
    return max(tried, key=lambda lr: (tried[lr], -lr))


def last(record: Record) -> float:
    """Return a run's accuracy after its last step."""
    return float(record["curve"][-1][2])


def best(record: Record) -> float:
    """Return a run's best accuracy of all epochs."""
    return max(float(accuracy) for _, _, accuracy in record["curve"])


def tried(done: Done, optimizer: str, batch: int) -> dict[float, float]:
    """Return a sweep as far as it has come: held-out accuracies by lr, in the order of lrs."""
    found = {
        run.lr: last(record)
        for run, record in done.items()
        if (run.tested_on, run.optimizer, run.batch) == ("held-out", optimizer, batch)
    }
    return dict(sorted(found.items()))


def lr_of(arm: Arm, batch: int, base_batch: int, done: Done) -> float | None:
    """Return the lr of an arm by the sweeps, or None where there is none yet."""
    sweep = tried(done, arm.optimizer, batch if arm.tuned else base_batch)
    if not sweep:
        return None
    return best_lr(sweep) if arm.tuned else float(f"{best_lr(sweep) * batch / base_batch:.6g}")


def next_run(done: Done, plan: Plan, recipe: Recipe) -> Run | None:
    """Return the first run of a plan that is not there yet, or None when all are."""
    for sizes, seeds in plan.stages():
        for batch in sizes:
            for seed in seeds:
                for name in plan.arms:
                    arm = ARMS[name]
                    swept = batch if arm.tuned else recipe.base_batch
                    trial = next_trial(start_lr(arm.optimizer, swept), tried(done, arm.optimizer, swept), plan.trials)
                    if trial is not None:
                        return Run("held-out", arm.optimizer, swept, trial, 0)
                    lr = lr_of(arm, batch, recipe.base_batch, done)
                    assert lr is not None  # its sweep is over
                    run = Run("test", arm.optimizer, batch, lr, seed)
                    if run not in done:
                        return run
    return None


class OtherRecipe(ValueError):
    """A results file holds runs that cannot stand in one table with these."""


def read(path: Path, recipe: Recipe | None = None) -> tuple[Recipe | None, dict[Run, Record]]:
    """Return the recipe of a results file, and its runs. A line that was cut off counts as not run, and is removed.

    Raises:
        OtherRecipe: the recipe is not the given one.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    done = {}
    for line in whole.splitlines():
        record = json.loads(line)
        found = Recipe(**record["recipe"])
        if recipe is not None and found != recipe:
            theirs, ours = found._asdict(), recipe._asdict()
            differences = ", ".join(
                f"{key}: {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]
            )
            raise OtherRecipe(f"{path} holds runs of another recipe ({differences}); name another file")
        recipe = found
        done[Run(**record["run"])] = record
    return recipe, done


def append(path: Path, record: Record) -> None:
    """Add one run to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
