"""Commands that end when their time does, and take their children with them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


class Budget:
    """Seconds for all that is done.

    Args:
        seconds: from now on.
        reserve: of them, for what comes after the last command.
    """

    def __init__(self, seconds: float, reserve: float = 0.0) -> None:
        self._end = time.monotonic() + seconds - reserve

    def left(self) -> float:
        """Return what is left for commands, never less than 0."""
        return max(0.0, self._end - time.monotonic())


@dataclass
class Ended:
    """How a command ended."""

    code: int | None  # None: it was killed when its time was over
    seconds: float
    output: str

    @property
    def how(self) -> str:
        """In words."""
        if self.code is None:
            return f"killed after {self.seconds:.0f} s"
        return f"killed by signal {-self.code}" if self.code < 0 else f"exit status {self.code}"


_running: set[subprocess.Popen[bytes]] = set()
_stopped = threading.Event()


def stop() -> None:
    """Kill all running commands, whichever thread waits for them, and those that a thread is yet to start."""
    _stopped.set()
    for process in list(_running):
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command with its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run(command: Sequence[str], seconds: float, log: Path, cwd: Path, environment: Mapping[str, str]) -> Ended:
    """Run a command for at most so many seconds, its output in a file."""
    return run_all([command], seconds, [log], cwd, [environment])[0]


def run_all(
    commands: Sequence[Sequence[str]],
    seconds: float,
    logs: Sequence[Path],
    cwd: Path,
    environments: Sequence[Mapping[str, str]],
) -> list[Ended]:
    """Run commands side by side.

    Each leads a process group of its own, which is killed in any case: a compiler, a test's worker or a sanitized
    process must not go on taking the GPU from the next command.
    """
    start = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    ends: list[tuple[int | None, float]] = []
    try:
        for command, log, environment in zip(commands, logs, environments, strict=True):
            with log.open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=cwd,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
                _running.add(processes[-1])
                if _stopped.is_set():
                    kill(processes[-1])
        for process in processes:
            code = None
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(max(0.0, start + seconds - time.monotonic()))
            ends.append((code, time.monotonic() - start))
    finally:
        for process in processes:
            kill(process)
            process.wait()
            _running.discard(process)
    outputs = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    return [Ended(code, taken, output) for (code, taken), output in zip(ends, outputs, strict=True)]
