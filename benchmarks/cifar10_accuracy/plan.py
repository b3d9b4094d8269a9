"""Which runs come next: a function of those that are there, so that work can stop at any time and go on elsewhere."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
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
START = {"SGD": 0.2, "LARS": 6.0, "LAMB": 0.006}


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


def next_trials(start: float, tried: Mapping[float, float], trials: int) -> list[float]:
    """Return the lrs of a sweep that can be tried now, in their order. There are none at its end.

    The first three are the start, twice and half of it. If the best one so far is the highest, twice of it follows; if
    it is the lowest, half of it; otherwise its neighbours, √2 times as high and as low. Which lrs are tried depends on
    accuracies only, not on how many are tried at once.

    Args:
        start: the first lr.
        tried: accuracies by lr.
        trials: how many there may be.
    """

    def lr(half_powers: int) -> float:
        return float(f"{start * 2 ** (half_powers / 2):.3g}")

    sweep = [0, 2, -2][:trials]
    while len(sweep) < trials and all(lr(each) in tried for each in sweep):
        best = max(sweep, key=lambda each: (tried[lr(each)], -each))
        beyond = [best + 2] * (best == max(sweep)) + [best - 2] * (best == min(sweep))
        new = [each for each in beyond or (best + 1, best - 1) if each not in sweep]
        if not new:
            break
        sweep += new[: trials - len(sweep)]
    return [lr(each) for each in sweep if lr(each) not in tried]


def best_lr(tried: Mapping[float, float]) -> float:
    """Return the lr of the highest accuracy, the smaller one of two."""
    return max(tried, key=lambda lr: (tried[lr], -lr))


def last(record: Record) -> float:
    """Return a run's accuracy after its last step."""
    return float(record["curve"][-1][2])


def best(record: Record) -> float:
    """Return a run's best accuracy of all evaluations."""
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


def next_runs(done: Done, plan: Plan, recipe: Recipe) -> Iterator[Run]:
    """Yield the runs of a plan that are not there yet and can be started now, the most informative first.

    A run on the test set can be started when its sweep is over. A run may come more than once.
    """
    for sizes, seeds in plan.stages():
        for batch, seed, name in itertools.product(sizes, seeds, plan.arms):
            arm = ARMS[name]
            swept = batch if arm.tuned else recipe.base_batch
            sweep = tried(done, arm.optimizer, swept)
            trials = next_trials(start_lr(arm.optimizer, swept), sweep, plan.trials)
            yield from (Run("held-out", arm.optimizer, swept, lr, 0) for lr in trials)
            lr = lr_of(arm, batch, recipe.base_batch, done)
            if not trials and lr is not None:
                run = Run("test", arm.optimizer, batch, lr, seed)
                if run not in done:
                    yield run


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
