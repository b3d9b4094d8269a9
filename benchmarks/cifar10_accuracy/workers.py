"""Where runs are carried out: in this process, or in several that share one device."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar10_accuracy import data
from benchmarks.cifar10_accuracy.training import Recipe, Run, train


def executor(workers: int) -> Executor:
    """Return a thread of this process, or as many processes as asked for."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    threads = max(1, (os.cpu_count() or 1) // workers)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_process, (threads,))


def start_process(threads: int) -> None:
    """Prepare a process for its runs, and let it end with the one that started it, even if that is killed."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def side_by_side(
    pool: Executor, workers: int, next_run: Callable[[Collection[Run]], Run | None], *args: Any
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Carry out as many runs at a time as there are workers, and yield each with its result when it is over.

    Args:
        pool: what ``executor`` returned.
        workers: how many runs at a time.
        next_run: what to start while some others run, or None if nothing can be started now.
        args: what ``carry_out`` needs besides the run.
    """
    running: dict[Future[dict[str, Any]], Run] = {}
    while True:
        while len(running) < workers and (run := next_run(running.values())):
            running[pool.submit(carry_out, run, *args)] = run
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


@functools.lru_cache(maxsize=2)
def resident(path: Path, tested_on: str, device: torch.device) -> data.Resident:
    """Return a data set that was saved, as a run sees it."""
    images = data.load(path)
    return data.Resident(images.held_out() if tested_on == "held-out" else images, device)


def carry_out(run: Run, recipe: Recipe, path: Path, device: torch.device, compile: bool, graph: bool) -> dict[str, Any]:
    """Train one network on a data set that was saved."""
    # Shapes never change; autotuned algorithms are faster.
    torch.backends.cudnn.benchmark = True
    return train(run, recipe, resident(path, run.tested_on, device), device, compile, graph)
