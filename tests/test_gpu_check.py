"""benchmarks/gpu_check without a GPU: its scripts on the CPU, and run.sh over commands that only pretend."""

import importlib
import os
import re
import shlex
import subprocess
from functools import wraps
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torchlars import ops, reference

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_cases_agree_with_the_reference_on_the_cpu(module, extension, threads, capsys):
    threads(1)
    module("gpu_check.cases").main(["--device", "cpu"])
    assert re.fullmatch(r"\d{3} cases agree with the reference\n", capsys.readouterr().out)


def test_cases_take_in_what_sanitizers_are_to_see(module):
    cases = module("gpu_check.cases")
    every = list(cases.cases())
    scaled = filter(cases.takes_inv_scale, cases.OPS)
    assert {op.partition(" ")[0] for op in cases.OPS} == set(ops.OPS)
    assert {(case.op, case.dtype) for case in every} == {*product(cases.OPS, cases.DTYPES)}
    assert {(case.op, case.sizes) for case in every} > {*product(cases.OPS, (cases.MANY, cases.SMALL, cases.EMPTY))}
    assert {(case.op, case.inverse) for case in every} > {*product(scaled, cases.INVERSES)}
    tensors = cases.arguments(every[0])["tensors"]
    copies = cases.copied(tensors, torch.device("cpu"), {})
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
    assert {tensor.storage_offset() for tensor in copies} == {0, 1}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors + copies}) == 2 * len(tensors)


def test_a_case_that_disagrees_stops_everything(module, extension, monkeypatch):
    cases = module("gpu_check.cases")
    first = next(cases.cases())
    right = getattr(reference, first.op)
    wrong = wraps(right)(lambda tensors, **more: 1.001 * right(tensors, **more))
    monkeypatch.setattr(reference, first.op, wrong)
    with pytest.raises(AssertionError, match=f"{first.op} float32, 15 layers, inv_scale None: result differs"):
        cases.check(first, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:torch.cuda.amp")
def test_every_mode_takes_its_steps(module, extension, capsys):
    with pytest.raises(SystemExit, match="False"):
        module("gpu_check.steps").main(["--device", "cpu", "--set", "smoke"])
    lines = capsys.readouterr().out.splitlines()
    assert "LAMB(AdamW fused) under a GradScaler: taken on cpu" in lines
    assert lines[-1] == f"the host waits in 0 of {len(lines) - 1} modes"


def test_a_mode_in_which_the_host_waits_is_named(module, monkeypatch, capsys):
    steps = module("gpu_check.steps")
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(steps.cuda, "kernels", lambda step: step() or ["torchlars::cuda::measure", "at::native"])

    def waiting():
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

    assert steps.observe("this", waiting, torch.device("cuda"))
    assert not steps.observe("that", lambda: None, torch.device("cuda"))
    assert modes == ["default", "error", "default", "error", "default"]
    this, that = capsys.readouterr().out.splitlines()
    assert this == "this: THE HOST WAITS: called a synchronizing CUDA operation"
    assert that == "that: 2 kernels, 1 of torchlars"


def test_a_profiler_sees_the_last_step_of_each_mode(module, extension, monkeypatch):
    steps = module("gpu_check.steps")
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    hook = register_optimizer_step_pre_hook(lambda *_: calls.append("step"))
    steps.main(["--device", "cpu", "--set", "smoke", "--profile"])
    hook.remove()
    assert re.fullmatch("((step )+start (step )+stop ?){4}", " ".join(calls))


def test_passes_of_bandwidth_keep_their_numbers_from_run_to_run(module, extension, capsys):
    passes = module("gpu_check.cases").passes(1000, torch.device("cpu"))
    for _, call in 3 * list(passes.values()):
        call()
    norms = passes["norm pass"][1]()
    torch.testing.assert_close(norms, torch.full((2,), 1000.0, dtype=torch.float64))
    module("gpu_check.bandwidth").main(["--device", "cpu", "--bytes", "4000"])
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == list(passes)


STUB = """#!/bin/bash
printf '%q ' "$@" >> "$RECORD"; echo >> "$RECORD"
case $(basename "$0")" $*" in
python*"-c import torch"*) echo 9.0 ;;
python*"-m torchlars") echo "  CUDA       loaded"; echo "why        CPU and CUDA 13.0 (/cuda) for 9.0" ;;
*sanitizer*--plant*) echo "========= at void torchlars::cuda::measure<float>()+0x49"; echo "== ERROR SUMMARY: 9 errors"; exit 1 ;;
*sanitizer*racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
*sanitizer*) echo "========= ERROR SUMMARY: 0 errors" ;;
ncu*) echo '==PROF== Profiling "measure" - 0: 0%' ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """Return what runs a portion over stubs, and returns its status, how its steps ended, and all commands."""

    def run(portion, *change):
        for name in ("python", "compute-sanitizer", "ncu", "nvidia-smi"):
            (tmp_path / name).write_text(STUB.replace(*change) if change else STUB)
            (tmp_path / name).chmod(0o755)
        out, record = tmp_path / f"out{portion}", tmp_path / "record"
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHON": "python", "RECORD": str(record)}
        command = [ROOT / "benchmarks/gpu_check/run.sh", portion, out]
        status = subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode
        ends = re.findall(r"^([\w ]+): (\w+)[\w ]*, \d+ s: ", (out / "log.txt").read_text(), re.M)
        return status, dict(ends), record.read_text()

    return run


def test_portions_name_what_there_is(run, module, extension, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "has_cuda", True)
    readme = (ROOT / "benchmarks/gpu_check/README.md").read_text(encoding="utf-8")
    for portion in "123":
        status, steps, commands = run(portion)
        assert status == 0
        assert set(steps.values()) == {"passed"}
        told = " ".join(re.findall(rf"^\| {portion} \| (.*?) \|", readme, re.M))
        assert re.findall(r"`(\w+)`", told) == [name for name in steps if not name.startswith("a fault")]
    assert all((ROOT / file).exists() for file in re.findall(r" (tests/\S*)", commands))
    mains = re.findall(r"^-m benchmarks\.(\w+\.main) (.*)$", commands, re.M)
    assert len(mains) == 8 + 1
    for main, argv in mains:
        module(main).parse(shlex.split(argv))


@pytest.mark.parametrize("change", [("for 9.0", "for 8.0"), ("CUDA       loaded", "CUDA       not loaded")])
def test_what_was_built_elsewhere_is_used_if_it_fits(run, change):
    assert "setup.py" not in run("2")[2]
    assert "setup.py build_ext --inplace" in run("2", *change)[2]


@pytest.mark.parametrize(
    ("portion", "step", "change"),
    [
        ("1", "memcheck", ("SUMMARY: 0 errors", "SUMMARY: 10 errors")),
        ("1", "memcheck", ('0 errors" ;;', '0 errors"; exit 1 ;;')),  # the cases disagree
        ("1", "racecheck", ("SUMMARY: 0 hazards", "SUMMARY: 1 hazards")),
        ("1", "a fault planted for memcheck", ("torchlars::cuda", "at::native")),
        ("3", "profile", ("==PROF== Profiling", "==WARNING== No kernels were profiled")),
    ],
)
def test_what_a_tool_must_say_decides(run, portion, step, change):
    status, steps, _ = run(portion, *change)
    assert (status, steps[step]) == (1, "FAILED")
    assert list(steps.values()).count("FAILED") == 1
