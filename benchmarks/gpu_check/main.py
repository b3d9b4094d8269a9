"""What takes a GPU to show, in one run: build, tests, sanitizers, launches, waits, speed. See README.md.

It runs before torchlars is built, and imports neither it nor torch: each step is a process of its own, which ends with
its time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: what lies beside it must not stand before everything else
    sys.path[0] = str(ROOT)

from benchmarks.gpu_check import budget, readings  # noqa: E402
from benchmarks.gpu_check.readings import FAILED, PASSED, SKIPPED, Result  # noqa: E402

RESERVE = 8.0  # seconds of the budget, for the summary
LEAST = 5.0  # seconds: a step that has less is not begun
MODULE = "benchmarks.gpu_check"

CUDA_TESTS = ("tests/test_cuda.py", "tests/test_cuda_steps.py")
DEVICE_TESTS = ("tests/test_ops.py", "tests/test_optim_ops.py", "tests/test_cifar10_accuracy.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLANTED = ("memcheck", "initcheck")

#: All steps, in their order unless --steps has another. What is timed has the machine for itself.
SIDE_BY_SIDE = ("cases", "cuda_tests", "device_tests", "waits", *SANITIZERS)
TIMED = ("resnet50", "bandwidth", "llama_7b_bf16", "vit_b_16", "one_100m", "runs", "profile", "tiny", "compiled")
QUICK = ("--rounds", "7", "--min-time", "0.03")
LARGE_GIB = 112  # of GPU memory, for all the core contestants on the set of a 7B model
RUN_MB = ("12", "24", "40")
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "LaunchStats", "Occupancy")
SECTIONS += ("SchedulerStats", "WarpStateStats")
COMPILED = ("torch.compile of LARS + SGD fused", "torch.compile of a whole LARS-SGD")


class Stopped(Exception):
    """Somebody wants this to end."""


class Check:
    """One run: what is found, and where it goes."""

    def __init__(
        self, found: dict[str, Any], total: budget.Budget, out: Path, work: Path, args: argparse.Namespace
    ) -> None:
        self.found = found
        self.total = total
        self.out = out
        self.work = work
        self.args = args
        self.lock = threading.RLock()  # of all that follows
        self.results: list[Result] = []
        self.log: dict[str, list[str]] = {}  # by step
        self.tables: list[str] = []
        self.sets: dict[str, Any] = {}
        self.reports: list[Path] = []  # of tests

    # Steps

    def do(self) -> None:
        """Do the steps, each as far as time allows. Neighbours that are not timed run side by side."""
        self.guard("build", self.build)
        steps = self.steps()
        for is_timed, names in itertools.groupby(self.args.steps, TIMED.__contains__):
            if any(result.is_decisive and result.outcome == FAILED for result in self.results) and not self.args.go_on:
                return
            if is_timed:
                for name in names:
                    self.guard(name, steps[name])
            else:
                self.side_by_side({name: steps[name] for name in names})

    def steps(self) -> dict[str, Callable[[], None]]:
        """Return all steps by name."""
        shards = max(1, min(6, (self.found["cores"] or 1) // 2))
        return {
            "cases": self.cases,
            "cuda_tests": lambda: self.tests("cuda_tests", CUDA_TESTS, min(2, shards)),
            "device_tests": lambda: self.tests("device_tests", DEVICE_TESTS, shards),
            "waits": self.waits,
            **{tool: partial(self.sanitize, tool) for tool in SANITIZERS},
            "resnet50": lambda: self.time_steps("resnet50", 110),
            "bandwidth": self.bandwidth,
            "llama_7b_bf16": self.time_large,
            # Each by itself, and none that would be killed: that leaves nothing behind.
            "vit_b_16": lambda: self.time_steps("vit_b_16", 60, least=60),
            "one_100m": lambda: self.time_steps("one_100m", 45, least=45),
            "runs": self.time_runs,
            "profile": self.profile,
            "tiny": lambda: self.time_steps("tiny", 150, least=150),
            "compiled": self.time_compiled,
        }

    def side_by_side(self, steps: Mapping[str, Callable[[], None]]) -> None:
        """Do steps concurrently."""
        with ThreadPoolExecutor(min(len(steps), self.found["cores"] or 1)) as pool:
            try:
                for waited in [pool.submit(self.guard, name, step) for name, step in steps.items()]:
                    waited.result()
            except Stopped:
                pool.shutdown(wait=False, cancel_futures=True)
                budget.stop()  # or the threads would wait for what they run
                raise

    def guard(self, name: str, step: Callable[[], None]) -> None:
        """Do a step. A fault of this script must not cost the others."""
        try:
            step()
        except Stopped:
            raise
        except Exception as error:
            self.add(name, FAILED, f"gpu_check failed at it: {error!r}", decides=True)

    def build(self) -> None:
        """Build in place, for this GPU alone. Nothing is installed: all that follows is run from the checkout."""
        if self.args.prebuilt:
            ended = self.run("build", [sys.executable, "-m", "torchlars"], 60)
            loaded = rf"^  CUDA +loaded$.*^why .* for .*{re.escape(self.found['capability'])}"
            if ended is not None and re.search(loaded, ended.output, re.MULTILINE | re.DOTALL):
                return self.add("build", PASSED, "built elsewhere", ended.seconds)
        more = {"TORCHLARS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": self.found["capability"]}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        ended = self.run("build", command, 300, more)
        if ended is None:
            return self.skip("build")
        decision = re.search(r"^torchlars: (.+)$", ended.output, re.MULTILINE)
        built = ended.code == 0 and any((ROOT / "torchlars").glob("_C.*"))
        self.add("build", PASSED if built else FAILED, decision[1] if built and decision else ended.how, ended.seconds)

    def tests(self, name: str, files: Sequence[str], shards: int = 1) -> None:
        """Run tests, in several processes side by side."""
        command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-p", "no:cacheprovider"]
        command += ["-p", f"{MODULE}.shard", "--maxfail=30", "--durations=5"]
        reports = [self.work / f"{name}_{shard + 1}.xml" for shard in range(shards)]
        commands = [[*command, f"--junitxml={report}", *files] for report in reports]
        more = [{"SHARD": f"{shard}/{shards}"} for shard in range(shards)]
        ended = self.run_all(name, commands, 150, more) if self.is_built() else None
        if ended is None:
            return self.skip(name, decides=True)
        seconds = max(each.seconds for each in ended)
        written = [report for report in reports if report.exists()]
        counts = readings.junit(written)
        self.reports += written
        note = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
        note += "".join(f"; {each.how}" for each in ended if each.code != 0)
        note += "".join(f"; {failure}" for failure in counts["failures"][:1])
        passed = all(each.code == 0 for each in ended) and counts["passed"] > 0 and not counts["failed"]
        return self.add(name, PASSED if passed else FAILED, note, seconds, counts, decides=True)

    def cases(self) -> None:
        """Compare all ops on layers that kernels find hard with the reference."""
        ended = self.module("cases", "cases", ["--device", "cuda"], 60)
        if ended is None:
            return self.skip("cases", decides=True)
        agrees = readings.agreement(ended.output)
        passed = ended.code == 0 and agrees
        return self.add("cases", PASSED if passed else FAILED, agrees or ended.how, ended.seconds, decides=True)

    def waits(self) -> None:
        """Count launches, and find out whether the host waits."""
        name, file = "waits", self.work / "waits.json"
        ended = self.module(name, "steps", ["--out", str(file)], 100)
        if ended is None:
            return self.skip(name, decides=True)
        modes = read(file)
        waiting = [mode for mode, seen in modes.items() if seen["waits"]]
        counts = {mode: seen.get("kernels") for mode, seen in modes.items()}
        note = ", ".join(
            f"{mode} {counts.get(mode)}" for mode in (readings.WRAPPER, readings.FUSED, "LAMB(AdamW fused)")
        )
        note = f"the host waits in {', '.join(waiting)}" if waiting else f"no waits; kernels: {note}"
        passed = ended.code == 0 and modes and not waiting
        return self.add(
            name, PASSED if passed else FAILED, note if modes else ended.how, ended.seconds, modes, decides=True
        )

    def sanitize(self, tool: str) -> None:
        """Run the kernels' cases under a sanitizer, and what it must not miss."""
        sanitizer = find_tool("compute-sanitizer")
        if sanitizer is None:
            return self.skip(tool, "compute-sanitizer was not found", decides=True)
        # torchlars' kernels alone. Errors of the API are torch's, which tries what may fail; those of a launch remain.
        # The tool gives up on a program that has not connected in time. Loading torch's kernels takes long under it.
        command = [sanitizer, "--tool", tool, "--kernel-name", "kns=torchlars", "--print-limit", "20"]
        command += ["--launch-timeout", "0"]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command += [sys.executable, "-m", f"{MODULE}.cases", "--device", "cuda"]
        # Each tensor is an allocation then, and what lies beyond its end is no other tensor.
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        ended = self.run(tool, command, 150, more) if self.is_built() else None
        if ended is None:
            return self.skip(tool, decides=True)
        errors = readings.sanitizer_errors(ended.output)
        agrees = readings.agreement(ended.output)
        passed = ended.code == 0 and errors == 0 and bool(agrees)
        note = f"{errors} errors" if errors is not None else f"nothing was counted, {ended.how}"
        note += f"; {agrees}" if agrees else f"; the cases did not reach their end ({ended.how})"
        seconds = ended.seconds
        if passed and tool in PLANTED:
            planted = self.run(f"{tool}, of a planted fault", [*command, "--plant", tool], 75, more)
            seconds += planted.seconds if planted else 0
            finds = planted is not None and bool(readings.sanitizer_errors(planted.output))
            finds = finds and planted is not None and readings.blames_torchlars(planted.output)
            note += "; a planted fault was found" if finds else "; BUT A PLANTED FAULT WAS NOT FOUND"
            passed = finds
        return self.add(tool, PASSED if passed else FAILED, note, seconds, {"errors": errors}, decides=True)

    def bandwidth(self) -> None:
        """Measure the passes on tensors of 1 GB."""
        name, file = "bandwidth", self.work / "bandwidth.json"
        ended = self.module(name, "bandwidth", ["--out", str(file)], 45)
        if ended is None:
            return self.skip(name)
        report = read(file)
        note = ", ".join(f"{each} {rate / 1e9:.0f} GB/s" for each, rate in report.get("bytes_per_second", {}).items())
        return self.add(
            name, PASSED if ended.code == 0 and report else FAILED, note or ended.how, ended.seconds, report
        )

    def time_large(self) -> None:
        """Time the set of a 7B model, with the fused form alone where memory is short."""
        fits = self.found["memory_gib"] >= LARGE_GIB
        more = [] if fits else ["--contestants", readings.FUSED]
        self.time_steps("llama_7b_bf16", 70, *more, rounds=("--rounds", "5"))

    def time_runs(self) -> None:
        """Time runs of layers that an L2 cache can hold, beside two launches over all layers."""
        runs = ("--run-mb", *RUN_MB, "--contestants", readings.WRAPPER, readings.FUSED)
        self.time_steps("runs", 90, "--sets", "resnet50", "vit_b_16", *runs)

    def time_compiled(self) -> None:
        """Time what has to be compiled, which takes a minute or more, beside torchlars once more."""
        if not self.args.compile and self.total.left() < 100:
            return self.skip("compiled", "no time left (--compile has it tried all the same)")
        contestants = ("--contestants", readings.WRAPPER, readings.FUSED, *COMPILED)
        return self.time_steps("compiled", 300, "--sets", "resnet50", *contestants, compiles=True)

    def profile(self) -> None:
        """Look into the kernels of a step with Nsight Compute."""
        ncu = find_tool("ncu")
        if ncu is None:
            return self.skip("profile", "ncu was not found")
        # By default ncu matches names without their namespaces.
        command = [ncu, "--kernel-name-base", "demangled", "--kernel-name", "regex:torchlars::cuda::"]
        command += ["--profile-from-start", "off", "--launch-count", "16", "--clock-control", "none"]
        command += [argument for section in SECTIONS for argument in ("--section", section)]
        command += [sys.executable, "-m", f"{MODULE}.steps", "--profile"]
        ended = self.run("profile", command, 90) if self.is_built() else None
        if ended is None:
            return self.skip("profile")
        kernels = readings.profiled(ended.output)
        if kernels:
            replace(self.out / "profile.txt", ended.output)
        note = ", ".join(kernels) or f"no kernel was profiled, {ended.how}"
        return self.add("profile", PASSED if ended.code == 0 and kernels else FAILED, note, ended.seconds)

    def time_steps(
        self,
        name: str,
        seconds: float,
        *more: str,
        least: float = 0.0,
        rounds: Sequence[str] = QUICK,
        compiles: bool = False,
    ) -> None:
        """Run benchmarks.step_time, by default over the set that the step is named for, if so many seconds are left."""
        if self.total.left() < least:
            return self.skip(name)
        sets = () if "--sets" in more else ("--sets", name)
        command = [sys.executable, "-m", "benchmarks.step_time.main", "--device", "cuda", *sets, *more, *rounds]
        command += [*([] if compiles else ["--no-compile"]), "--out", str(self.work), "--name", name]
        ended = self.run(name, command, seconds) if self.is_built() else None
        if ended is None:
            return self.skip(name)
        report = read(self.work / f"{name}.json")
        found = report.get("sets", {})
        if name in found:  # with all contestants
            self.sets |= found
        if (self.work / f"{name}.md").exists():
            self.tables.append((self.work / f"{name}.md").read_text(encoding="utf-8"))
        ratios = [
            f"{layers}: {contestant} {ratio(timed['contestants'][contestant])}"
            for layers, timed in found.items()
            for contestant in (*COMPILED, readings.WRAPPER, readings.FUSED)
            if contestant in timed["contestants"]
        ]
        skipped = re.search(r"is skipped: (.+)", ended.output)
        note = "; ".join(ratios) or (skipped[1] if skipped else ended.how)
        passed = ended.code == 0 and bool(found)
        outcome = PASSED if passed else SKIPPED if ended.code == 0 and skipped else FAILED
        return self.add(name, outcome, note, ended.seconds, report)

    # How they are done

    def is_built(self) -> bool:
        """Return whether there is something to check."""
        return any(result.step == "build" and result.outcome == PASSED for result in self.results)

    def module(self, name: str, module: str, arguments: Sequence[str], seconds: float) -> budget.Ended | None:
        """Run a module of this folder, if there is something to check."""
        command = [sys.executable, "-m", f"{MODULE}.{module}", *arguments]
        return self.run(name, command, seconds) if self.is_built() else None

    def run(
        self, name: str, command: Sequence[str], seconds: float, more: Mapping[str, str] | None = None
    ) -> budget.Ended | None:
        """Run a command with at most so many seconds of what is left, or not at all if that is next to nothing."""
        ended = self.run_all(name, [command], seconds, [more or {}])
        return ended and ended[0]

    def run_all(
        self, name: str, commands: Sequence[Sequence[str]], seconds: float, more: Sequence[Mapping[str, str]]
    ) -> list[budget.Ended] | None:
        """Run commands side by side, likewise."""
        seconds = min(seconds, self.total.left())
        if seconds < LEAST:
            return None
        print(f"{name}: {shlex.join(commands[0])}", flush=True)
        logs = [self.work / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}_{i}.log" for i in range(len(commands))]
        ended = budget.run_all(commands, seconds, logs, ROOT, [environment(each) for each in more])
        with self.lock:
            log = self.log.setdefault(name, [])
            for command, each in zip(commands, ended, strict=True):
                log.append(f"=== {name}: {each.how}, {each.seconds:.1f} s\n$ {shlex.join(command)}\n")
                log.append(readings.clip(each.output))
        return ended

    def skip(self, name: str, why: str = "", decides: bool = False) -> None:
        """Note that a step was not begun."""
        why = why or ("no time left" if self.is_built() or name == "build" else "nothing was built")
        self.add(name, SKIPPED, why, decides=decides)

    def add(
        self,
        name: str,
        outcome: str,
        note: str,
        seconds: float = 0.0,
        data: dict[str, Any] | None = None,
        decides: bool = False,
    ) -> None:
        """Note the result of a step, on disk as well: whoever ends this at once is to find it there."""
        with self.lock:
            self.results.append(Result(name, outcome, note, seconds, decides, data or {}))
            print(f"{name}: {outcome}, {seconds:.0f} s: {note}", flush=True)
            if outcome == FAILED and name in self.log:
                print("\n".join(f"    {line}" for line in self.log[name][-1].splitlines()[-12:]), flush=True)
            self.write()

    # What is left behind

    def data(self, name: str) -> dict[str, Any]:
        """Return what a step found."""
        return next((result.data for result in self.results if result.step == name), {})

    def targets(self) -> list[readings.Row]:
        """Return the targets."""
        try:
            replays = readings.outcome_of(self.reports, "test_a_replayed_step")
            return readings.rows(self.sets, self.data("waits"), self.data("bandwidth"), replays)
        except Exception as error:  # must not cost the summary either
            return [readings.Row("the targets could not be read", "", "", repr(error), "")]

    def summary(self) -> str:
        """Return the summary as it stands."""
        return readings.summary(self.found, self.results, self.targets(), readings.rivals(self.sets))

    def write(self) -> None:
        """Write summary.md, summary.json and log.txt."""
        everything = {
            "passes": readings.passes(self.results),
            "environment": self.found,
            "targets": [vars(row) for row in self.targets()],
            "steps": [vars(result) for result in self.results],
        }
        markdown = "\n\n".join(["# What a GPU showed", self.summary(), *self.tables])
        replace(self.out / "summary.json", json.dumps(everything, indent=1) + "\n")
        replace(self.out / "summary.md", markdown + "\n")
        replace(self.out / "log.txt", "\n".join(line for lines in self.log.values() for line in lines))


def replace(path: Path, text: str) -> None:
    """Write a file that is whole at any moment, whenever all of this is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def ratio(entry: dict[str, Any]) -> str:
    """Return a contestant's ratio to the floor, by the GPU's clock."""
    return f"{next(iter(entry['clocks'].values()))['ratio']:.2f}"


def read(path: Path) -> dict[str, Any]:
    """Return what a step wrote, or nothing if it never did."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a command. Of an environment that was not activated, ninja is to be found as well."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2", **more}


def find_tool(name: str) -> str | None:
    """Return where compute-sanitizer or ncu is: on PATH, in a toolkit, or in a package of it."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders: Iterable[Path] = (
        Path(folder) / each for folder in toolkits if folder for each in ("bin", "compute-sanitizer")
    )
    packages = (Path(entry) for entry in sys.path if entry.endswith("-packages"))
    folders = [*folders, *(each for package in packages for each in package.glob("nvidia/*/compute-sanitizer"))]
    folders += Path("/opt/nvidia/nsight-compute").glob("*")
    found = (shutil.which(name, path=path) for path in (None, *map(str, folders)))
    return next(filter(None, found), None)


def probe(seconds: float, work: Path, prebuilt: bool) -> dict[str, Any]:
    """Return what probe.py finds. Nothing that only a build needs is missing where there is none to be done."""
    command = [sys.executable, "-m", f"{MODULE}.probe", *["--prebuilt"] * prebuilt]
    ended = budget.run(command, seconds, work / "probe.log", ROOT, environment({}))
    try:
        found: dict[str, Any] = json.loads(ended.output.splitlines()[-1])
    except (IndexError, ValueError):
        found = {
            "missing": [f"the machine could not be looked at ({ended.how}): {readings.clip(ended.output, 200, 800)}"]
        }
    return found


def on_signals(handle: Callable[[int, Any], None]) -> None:
    """Handle what ends a process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def stop(number: int, frame: Any) -> None:
    """Leave whatever is being waited for."""
    on_signals(lambda *_: None)  # once is enough
    raise Stopped(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, write and print. Return the exit status: 0 passed, 1 not passed, 2 nothing could be checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=520.0, metavar="SECONDS", help="for everything (default: 520)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/, by the name of the GPU)")
    names = (*SIDE_BY_SIDE, *TIMED)
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="in this order (default: all)")
    parser.add_argument("--go-on", action="store_true", help="run the timings even if a correctness step failed")
    parser.add_argument("--prebuilt", action="store_true", help="use the extension that is there, if it can be loaded")
    parser.add_argument("--compile", action="store_true", help="time torch.compile even if little time is left for it")
    args = parser.parse_args(argv)

    start = time.monotonic()
    total = budget.Budget(args.budget, RESERVE)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        found = probe(total.left(), Path(folder), args.prebuilt)
        if found["missing"]:
            lines = "\n".join(f"- {sentence}" for sentence in found["missing"])
            print(f"nothing was checked, and nothing was changed. What is missing:\n{lines}")
            return 2
        print(readings.describe(found), flush=True)
        slug = re.sub(r"[^a-z0-9]+", "_", found["gpu"].lower()).strip("_")
        out = (args.out or Path(__file__).resolve().parent / "results" / slug).resolve()
        check = Check(found, total, out, Path(folder), args)
        on_signals(stop)
        try:
            check.do()
        except Stopped as signal_name:
            check.add("stopped", FAILED, f"by {signal_name}", decides=True)
        print(f"\n{check.summary()}\n{time.monotonic() - start:.0f} s; everything is in {out}", flush=True)
        return 0 if readings.passes(check.results) else 1


if __name__ == "__main__":
    sys.exit(main())
