"""Processes on this machine that form a process group (gloo) for the duration of a call."""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

# For all tests and the processes that they start: a collection of garbage looks at all that torch has imported, and by
# default these take a tenth of the time.
gc.set_threshold(100_000, 20, 100)
TIMEOUT = 180  # seconds, for whatever one call does: the first one compiles, on a busy machine for a minute


def serve(rank: int, connection: Any) -> None:
    """Take calls, and send back what they return or raise."""
    torch.set_num_threads(1)
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "OFF"
    with suppress(EOFError):  # no more calls will come
        while True:
            world_size, store, function, args = connection.recv()
            try:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(store, world_size),
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=TIMEOUT),
                )
                torch.manual_seed(20170813)
                connection.send((True, function(*args)))
            except BaseException:
                connection.send((False, traceback.format_exc()))
            # A rank that leaves while others still connect to it would fail them.
            connection.recv()
            if dist.is_initialized():
                dist.destroy_process_group()


class Workers:
    """``workers(2, function, ...)`` calls a function of a test module on two ranks. Returns what each returns.

    The processes are started at the first call and kept for the next; after a failure, which may leave ranks waiting
    for each other, they are started anew.
    """

    def __init__(self, count: int = 4) -> None:
        self._count = count
        self._processes: list[Any] = []
        self._connections: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def stop(self) -> None:
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def __call__(self, world_size: int, function: Any, *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        connections = self._connections[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            for connection in connections:
                connection.send((world_size, os.path.join(folder, "store"), function, args))
            answers: list[Any] = [None] * world_size
            waiting = dict(enumerate(connections))
            while waiting:
                ready = wait(list(waiting.values()), timeout=TIMEOUT)
                for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                    answers[rank] = waiting.pop(rank).recv()
                failed = [
                    f"rank {rank}: {answer[1]}" for rank, answer in enumerate(answers) if answer and not answer[0]
                ]
                if failed or not ready:
                    self.stop()
                    raise AssertionError("\n".join(failed) or f"no answer within {TIMEOUT} s of ranks {list(waiting)}")
            for connection in connections:
                connection.send("all have answered")
        return [answer[1] for answer in answers]
