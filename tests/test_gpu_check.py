"""benchmarks/gpu_check without a GPU: it refuses, keeps to its time, and reads what tools print.

What it calls on a GPU is called here on the CPU, as far as that goes: a mode that LARS refuses must not show first where
minutes are counted.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check" / "main.py"
FOUND = {
    "gpu": "Some GPU 80GB",
    "capability": "9.0",
    "memory_gib": 79.6,
    "l2_mib": 50,
    "multiprocessors": 132,
    "driver": "580.1",
    "cores": 3,
    "torch": "2.13.0",
    "timm": None,
    "missing": [],
}


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def readings(module):
    return module("gpu_check.readings")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [[str(SCRIPT)], ["-m", "benchmarks.gpu_check.main"]], ids=["file", "module"])
def test_without_a_gpu_it_says_what_is_missing_and_changes_nothing(command, tmp_path):
    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, *command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2, ended.stderr
    assert "nothing was checked, and nothing was changed. What is missing:\n- " in ended.stdout
    assert "is not built for CUDA" in ended.stdout or "torch sees no GPU" in ended.stdout
    assert not out.exists()


def test_it_starts_where_torchlars_cannot_be_imported(tmp_path):
    for name in ("torchlars", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not built yet')")
    ended = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    assert "- torch cannot be imported (not built yet)" in ended.stdout


# Sanitizers

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void torchlars::cuda::measure<float>(torchlars::cuda::Layers<torchlars::cuda::MeasuredLayer>)+0x4d0
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
CLEAN = "========= COMPUTE-SANITIZER\n208 cases agree with the reference\n========= ERROR SUMMARY: 0 errors\n"
RACES = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
NO_RACE = "========= COMPUTE-SANITIZER\n208 cases agree with the reference\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


NCU = """\
==PROF== Connected to process 7
==PROF== Profiling "measure" - 0: 0%....50%....100% - 9 passes
==PROF== Profiling "void torchlars::cuda::update<float, float, float, torchlars::cuda::Layers<torchlars::cuda::SgdLayer, 16384>>(T4)" - 1: 0%....100% - 9 passes
==PROF== Profiling "measure" - 2: 0%....50%....100% - 9 passes
    Section: GPU Speed Of Light Throughput
"""


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        (MEMCHECK, 1),
        (CLEAN, 0),
        (RACES, 2),
        (NO_RACE, 0),
        (CLEAN.replace("0 errors", "1234 errors"), 1234),
        (CLEAN + MEMCHECK, 1),
        ("========= COMPUTE-SANITIZER\nkilled in the midst of it", None),
        ("a test prints ERROR SUMMARY: 0 errors", None),
        ("", None),
    ],
)
def test_errors_of_a_sanitizer_are_counted(readings, output, errors):
    assert readings.sanitizer_errors(output) == errors


def test_a_report_names_the_kernel_that_is_to_blame(readings):
    assert readings.blames_torchlars(MEMCHECK)
    assert not readings.blames_torchlars(CLEAN)
    assert not readings.blames_torchlars("torchlars::cuda::measure, says the program itself")
    assert not readings.blames_torchlars(MEMCHECK.replace("torchlars", "at::native"))


# Tests


def write_junit(path, **outcomes):
    cases = "".join(
        f'<testcase classname="tests.test_cuda" name="{name}">{inner}</testcase>' for name, inner in outcomes.items()
    )
    path.write_text(f'<?xml version="1.0"?><testsuites><testsuite name="pytest">{cases}</testsuite></testsuites>')
    return path


def test_tests_are_counted_over_files(readings, tmp_path):
    files = [
        write_junit(tmp_path / "1.xml", test_a="", test_b='<skipped message="one device only"/>'),
        write_junit(
            tmp_path / "2.xml", test_c='<failure message="no">x</failure>', test_d="<error/>", test_e="<system-out/>"
        ),
        tmp_path / "3.xml",
    ]
    files[2].write_text("<testsuites><testsu")  # its writer was killed
    counts = readings.junit(files)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (2, 2, 1)
    assert counts["failures"] == ["tests.test_cuda::test_c", "tests.test_cuda::test_d"]
    assert readings.outcome_of(files, "test_a") == "met"
    assert readings.outcome_of(files, "test_c") == "missed"
    assert readings.outcome_of(files, "test_") == "missed"
    assert readings.outcome_of(files, "test_b") == ""
    assert readings.outcome_of(files, "test_z") == ""


def test_shards_share_all_tests_and_none_twice(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test_it(i):\n    print('ran', i)\n"
    )
    seen = []
    for shard in range(3):
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-s", "-c", os.devnull, "-p", "benchmarks.gpu_check.shard", "-p", "no:cacheprovider", str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "SHARD": f"{shard}/3"},
            capture_output=True,
            text=True,
            timeout=120,
        )  # fmt: skip
        seen.append([int(i) for i in re.findall(r"ran (\d)", ended.stdout)])
    assert seen == [[0, 3, 6], [1, 4], [2, 5]]


def test_all_tests_that_take_in_a_gpu_by_themselves_are_run(module):
    main = module("gpu_check.main")
    takes_device = re.compile(r"^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
    files = {
        f"tests/{path.name}"
        for path in Path(__file__).parent.glob("test_*.py")
        if takes_device.search(path.read_text(encoding="utf-8"))
    }
    assert files == set(main.DEVICE_TESTS)
    assert all((ROOT / file).exists() for file in main.CUDA_TESTS)


# Time

SLEEPER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_ends(pid):
    end = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_command_is_killed_with_its_children_when_its_time_is_over(module, tmp_path):
    budget = module("gpu_check.budget")
    start = time.monotonic()
    ended = budget.run([sys.executable, "-c", SLEEPER], 1.5, tmp_path / "log", tmp_path, os.environ)
    assert 1.5 <= time.monotonic() - start < 20
    assert ended.code is None
    assert ended.how.startswith("killed after ")
    assert_ends(int(ended.output))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_children_do_not_outlive_a_command_that_ends_by_itself(module, tmp_path):
    budget = module("gpu_check.budget")
    code = SLEEPER.rpartition("time.sleep")[0] + "sys.exit(3)"
    ended = budget.run([sys.executable, "-c", code], 60, tmp_path / "log", tmp_path, os.environ)
    assert (ended.code, ended.how) == (3, "exit status 3")
    assert_ends(int(ended.output))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_commands_of_all_threads_are_stopped(module, tmp_path, monkeypatch):
    budget = module("gpu_check.budget")
    monkeypatch.setattr(budget, "_stopped", threading.Event())
    logs = [tmp_path / str(i) for i in range(2)]
    command = [sys.executable, "-c", SLEEPER]
    with ThreadPoolExecutor(2) as pool:
        waited = [pool.submit(budget.run, command, 60, log, tmp_path, os.environ) for log in logs]
        end = time.monotonic() + 30
        while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
            assert time.monotonic() < end
            time.sleep(0.05)
        budget.stop()
        ended = [each.result() for each in waited]
    for each in ended:
        assert_ends(int(each.output))
    ended.append(budget.run(command, 60, tmp_path / "later", tmp_path, os.environ))
    assert [each.how for each in ended] == ["killed by signal 9"] * 3


def test_a_budget_runs_out_and_never_below_zero(module):
    budget = module("gpu_check.budget")
    assert 4 < budget.Budget(10, reserve=5).left() <= 5
    assert budget.Budget(10, reserve=11).left() == 0


# All of it, with commands that only pretend

LOADED = "  CUDA       loaded\nwhy        CPU and CUDA 13.0 (/usr/local/cuda) for 9.0\n"


def stage(name, command, module, tmp_path, change):
    """Leave behind what a command would, and return its output."""

    def option(key):
        return Path(command[command.index(key) + 1])

    if command[-2:] == ["-m", "torchlars"]:
        return change.get("loaded", LOADED)
    if "setup.py" in command:
        return "torchlars: CPU and CUDA 13.0 (/usr/local/cuda) for 9.0\n"
    if "pytest" in command:
        report = next(Path(each.partition("=")[2]) for each in command if each.startswith("--junitxml="))
        write_junit(report, test_a_replayed_step_has_the_bits="", **change.get("tests", {}))
        return "1 passed\n"
    if "--profile" in command:
        return change.get("profile", NCU)
    if "benchmarks.gpu_check.steps" in command:
        modes = {
            "LARS(SGD fused)": {"buckets": 1, "waits": None, "kernels": 9, "torchlars": 2},
            "SGD fused": {"buckets": 1, "waits": None, "kernels": 7, "torchlars": 0},
            "LARS(torchlars.optim.SGD), two dtypes": {
                "buckets": 2,
                "kernels": 4,
                "torchlars": 4,
                "waits": change.get("waits"),
            },
        }
        option("--out").write_text(json.dumps(modes))
        return ""
    if "benchmarks.gpu_check.bandwidth" in command:
        shares = {"copy": 1.0, "norm pass": 0.95, "scale pass": 0.85}
        option("--out").write_text(
            json.dumps({"bytes_per_second": {k: 3e12 * v for k, v in shares.items()}, "of_a_copy": shares})
        )
        return ""
    if "benchmarks.step_time.main" in command:
        sets = command[command.index("--sets") + 1 :]
        sets = sets[: next(i for i, each in enumerate(sets) if each.startswith("--"))]
        report = step_time_report(module, sets)
        option("--out").joinpath(f"{option('--name')}.json").write_text(json.dumps(report))
        option("--out").joinpath(f"{option('--name')}.md").write_text(module("step_time.main").section(sets[0], report))
        if option("--name") == Path("runs"):  # of a few contestants: they must not stand for all
            report["sets"]["resnet50"]["contestants"]["LARS(SGD fused)"]["clocks"]["gpu"]["ratio"] = 9.0
            option("--out").joinpath("runs.json").write_text(json.dumps(report))
        return ""
    if "--plant" in command:
        return change.get("planted", MEMCHECK)
    assert "benchmarks.gpu_check.cases" in command
    return change.get(name or "cases", NO_RACE if "racecheck" in command else CLEAN)


def step_time_report(module, sets):
    """Return what step_time would report of a GPU: its own code over invented times."""
    main, contestants = module("step_time.main"), module("step_time.contestants")
    ms = {
        "SGD fused": 1.0,
        "LARS(SGD fused)": 1.8,
        "LARS(torchlars.optim.SGD)": 1.1,
        "timm Lars": 9.0,
        contestants.OLD: 5.0,
        contestants.PART: 0.1,
        contestants.OLD_PART: 2.5,
    }
    facts = {each.name: each for each in contestants.contestants("fused")}
    report = {"device": "cuda", "environment": {"threads": 8}, "copy_bandwidth": 3e12, "left_out": {}, "sets": {}}
    for name in sets:
        timed = {
            each: {
                "clocks": {
                    clock: {"median": time / 1e3, "q1": time / 1e3, "q3": time / 1e3, "rounds": [time / 1e3] * 3}
                    for clock in ("gpu", "wall")
                },
                "formula": facts[each].formula,
                "form": facts[each].form,
                "gpu_time_by": "graph",
                "launches": 2,
                **({"accesses": facts[each].accesses, "byte_floor": 1.0} if facts[each].accesses else {}),
            }
            for each, time in ms.items()
        }
        report["sets"][name] = {
            "tensors": 161,
            "elements": 25_557_032,
            "dtype": "float32",
            "floor": "SGD fused",
            "left_out": {},
            "contestants": timed,
        }
        main.finish(name, module("step_time.sets").SETS[name], report, "fused")
    return report


@pytest.fixture
def pretend(module, monkeypatch, tmp_path):
    """Return what runs the whole script over commands that pretend, and returns its status and its files."""
    main = module("gpu_check.main")
    budget = module("gpu_check.budget")
    commands_run = []

    def run(*argv, **change):
        def run_all(commands, seconds, logs, cwd, environments):
            ended = []
            for command, environment in zip(commands, environments, strict=True):
                assert 0 < seconds <= 300
                name = command[command.index("--tool") + 1] if "--tool" in command else ""
                if "setup.py" in command:
                    assert (environment["TORCHLARS_CUDA"], environment["TORCH_CUDA_ARCH_LIST"]) == ("1", "9.0")
                commands_run.append(command)
                output = stage(name, command, module, tmp_path, change)
                ended.append(budget.Ended(change.get("code", 0), 1.0, output))
            return ended

        monkeypatch.setattr(main.budget, "run_all", run_all)
        monkeypatch.setattr(main, "probe", lambda seconds, work, prebuilt: dict(FOUND))
        monkeypatch.setattr(main, "find_tool", lambda name: change.get("tool", f"/opt/{name}"))
        monkeypatch.setattr(main, "on_signals", lambda handle: None)
        monkeypatch.setattr(main.Check, "is_built", lambda check: change.get("code", 0) == 0)
        commands_run.clear()
        status = main.main(["--out", str(tmp_path / "out"), *argv])
        out = tmp_path / "out"
        return status, json.loads((out / "summary.json").read_text(encoding="utf-8")), out

    run.commands = commands_run
    return run


def summary_of(text):
    return text[text.index("GPU check: ") :].splitlines()


def test_all_steps_are_done_and_summed_up(pretend, capsys):
    status, summary, out = pretend()
    assert status == 0
    assert summary["passes"]
    assert {result["step"]: result["outcome"] for result in summary["steps"]} == dict.fromkeys(
        [
            "build", "cases", "cuda_tests", "device_tests", "waits", "memcheck", "racecheck", "initcheck", "synccheck",
            "resnet50", "bandwidth", "llama_7b_bf16", "vit_b_16", "one_100m", "runs", "profile", "tiny", "compiled",
        ],
        "passed",
    )  # fmt: skip
    assert {(row["figure"], row["seen"], row["verdict"]) for row in summary["targets"]} == {
        ("LARS(SGD fused) / SGD fused, resnet50", "1.80", "first met"),
        ("LARS(torchlars.optim.SGD) / SGD fused, resnet50", "1.10", "met"),
        ("LARS(torchlars.optim.SGD) / SGD fused, llama_7b_bf16", "1.10", "met"),
        ("LARS part over 0.1.2's, resnet50, wall", "25.0×", "met"),
        ("bandwidth of the norm pass, 1 GB, of a copy", "95%", "met"),
        ("bandwidth of the scale pass, 1 GB, of a copy", "85%", "missed"),
        ("launches a step and (device, dtype), of gradients", "2", "met"),
        ("modes in which the host waits", "0 of 3", "met"),
        ("graph replay has the bits of eager steps (tests)", "", "met"),
    }
    lines = summary_of(capsys.readouterr().out)
    assert lines[0] == "GPU check: all that decides has passed"
    assert lines[-1].endswith(f"everything is in {out}")
    assert 30 < len(lines) <= 61
    assert any("torchlars 0.1.2 algorithm" in line and "2.78×" in line for line in lines)
    assert (out / "summary.md").read_text(encoding="utf-8").splitlines()[2:30] == lines[:28]
    assert "### llama_7b_bf16: 161 tensors" in (out / "summary.md").read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {"summary.md", "summary.json", "log.txt", "profile.txt"}
    assert "--kernel-name kns=torchlars" in (out / "log.txt").read_text(encoding="utf-8")
    assert (out / "profile.txt").read_text(encoding="utf-8") == NCU
    notes = {result["step"]: result["note"] for result in summary["steps"]}
    assert notes["profile"] == "measure, update"


@pytest.mark.parametrize(
    ("step", "change"),
    [
        ("cases", {"cases": "AssertionError: sgd_ differs from the reference"}),
        ("cuda_tests", {"tests": {"test_x": "<failure/>"}}),
        ("waits", {"waits": "called a synchronizing CUDA operation"}),
        ("memcheck", {"memcheck": MEMCHECK}),
        ("memcheck", {"memcheck": CLEAN.replace("208 cases agree with the reference\n", "")}),
        ("memcheck", {"planted": CLEAN}),
        ("memcheck", {"planted": MEMCHECK.replace("torchlars", "at")}),
        ("racecheck", {"racecheck": RACES}),
        ("synccheck", {"synccheck": ""}),
        ("initcheck", {"tool": None}),
        ("build", {"code": 1}),
    ],
)
def test_whatever_decides_and_fails_shows_in_the_status(pretend, step, change, capsys):
    status, summary, _ = pretend(**change)
    assert status == 1
    assert not summary["passes"]
    assert next(result for result in summary["steps"] if result["step"] == step)["outcome"] != "passed"
    assert "GPU check: NOT PASSED" in capsys.readouterr().out


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_is_wrong_is_timed_only_if_asked_for(pretend, goes_on):
    status, summary, _ = pretend(*["--go-on"] * goes_on, memcheck=MEMCHECK)
    assert status == 1
    timed = {result["step"] for result in summary["steps"]} & {"resnet50", "bandwidth", "profile"}
    assert len(timed) == (3 if goes_on else 0)


def test_steps_are_done_in_the_order_that_is_asked_for(pretend):
    status, summary, _ = pretend("--steps", "waits", "bandwidth", "memcheck", "cases")
    steps = [result["step"] for result in summary["steps"]]
    assert status == 0
    assert (steps[:3], set(steps[3:])) == (["build", "waits", "bandwidth"], {"memcheck", "cases"})


def test_what_fails_ends_what_comes_after_it(pretend):
    status, summary, _ = pretend("--steps", "cases", "bandwidth", "memcheck", cases="differs")
    assert (status, [result["step"] for result in summary["steps"]]) == (1, ["build", "cases"])


def test_a_profile_of_no_kernel_is_none(pretend):
    _, summary, out = pretend("--steps", "profile", profile="==WARNING== No kernels were profiled.\n")
    assert [(each["outcome"], each["note"]) for each in summary["steps"][1:]] == [
        ("FAILED", "no kernel was profiled, exit status 0")
    ]
    assert not (out / "profile.txt").exists()


def test_portions_in_the_readme_name_steps_that_there_are(module):
    main = module("gpu_check.main")
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    portions = [each.split() for each in re.findall(r"main\.py.* --steps ([a-z0-9_ ]+)$", readme, re.MULTILINE)]
    steps = [step for portion in portions for step in portion]
    assert len(portions) == 2
    assert len(set(steps)) == len(steps)
    assert set(steps) <= {*main.SIDE_BY_SIDE, *main.TIMED}


@pytest.mark.parametrize(
    ("loaded", "builds"),
    [
        (LOADED, False),
        (LOADED.replace("9.0", "8.0"), True),
        (LOADED.replace("loaded", "loaded, but no device is visible"), True),
        ("", True),
    ],
)
def test_a_prebuilt_extension_is_used_if_it_can_be_loaded(pretend, loaded, builds):
    status, _, _ = pretend("--prebuilt", loaded=loaded)
    assert status == 0
    assert any("setup.py" in command for command in pretend.commands) == builds


def test_what_has_no_time_left_is_skipped_and_summed_up(pretend, capsys):
    status, summary, _ = pretend("--budget", "9")
    assert status == 1
    assert {result["outcome"] for result in summary["steps"]} == {"skipped"}
    assert len(summary["steps"]) == 18
    assert sum("no time left" in line for line in summary_of(capsys.readouterr().out)) == 18


def test_a_fault_of_the_script_costs_one_step(pretend, module, monkeypatch):
    monkeypatch.setattr(module("gpu_check.main").Check, "bandwidth", lambda check: 1 / 0)
    status, summary, _ = pretend()
    outcomes = {result["step"]: result["outcome"] for result in summary["steps"]}
    assert (status, outcomes.pop("bandwidth"), set(outcomes.values())) == (1, "FAILED", {"passed"})


DRIVER = """
import sys
from benchmarks.gpu_check import main
from pathlib import Path
main.probe = lambda seconds, work, prebuilt: {found!r}
main.LEAST = 0.1
def build(check):
    ended = check.run("build", [sys.executable, "-c", {sleeper!r}], 600)
    check.add("build", "FAILED", ended.how + " child " + ended.output.strip(), ended.seconds)
main.Check.build = build
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("how", ["budget", "SIGTERM"])
def test_a_step_that_sleeps_is_killed_and_the_summary_still_comes(how, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(found=FOUND, sleeper=SLEEPER), "--out", str(tmp_path), "--budget", "11" if how == "budget" else "500"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    if how == "SIGTERM":
        assert "Some GPU" in process.stdout.readline()
        while "build: " not in process.stdout.readline():
            pass
        time.sleep(1.5)
        process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "GPU check: NOT PASSED" in output
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    if how == "budget":
        assert_ends(int(re.search(r"killed after \d+ s child (\d+)", summary["steps"][0]["note"])[1]))
    else:
        assert summary["steps"][-1]["note"] == "by SIGTERM"


def test_a_summary_has_sixty_lines_at_most(readings):
    results = [readings.Result(f"step {i}", readings.PASSED, "a | b\n" * 40, 1.0, True) for i in range(80)]
    lines = readings.summary(FOUND, results, [], []).splitlines()
    assert len(lines) == 60
    assert lines[-1] == "[...]"
    assert all(line.count("|") == 5 for line in lines if line.startswith("| step"))


def test_nothing_has_passed_where_nothing_was_decided(readings):
    assert not readings.passes([])
    assert not readings.passes([readings.Result("build", readings.PASSED)])


def test_long_output_keeps_its_ends(readings):
    clipped = readings.clip("a" * 2000 + "x" * 9 + "b" * 10000)
    assert clipped.startswith("a" * 2000 + "\n[... 9 characters left out")
    assert clipped.endswith("b" * 10000)
    assert readings.clip("short") == "short"


# What runs on the GPU


def test_cases_agree_with_the_reference_on_the_cpu(module, extension, threads, capsys):
    threads(1)
    cases = module("gpu_check.cases")
    cases.main(["--device", "cpu"])
    assert re.fullmatch(r"\d{3} cases agree with the reference\n", capsys.readouterr().out)


def test_cases_take_in_what_sanitizers_are_to_see(module):
    cases = module("gpu_check.cases")
    every = list(cases.cases())
    from torchlars import ops

    assert {case.op for case in every} == set(ops.OPS) == set(cases.OPS)
    for op in ops.OPS:
        of_op = [case for case in every if case.op == op]
        assert {case.dtype for case in of_op} == set(cases.DTYPES), op
        assert {cases.MANY, cases.SMALL, cases.EMPTY} <= {case.sizes for case in of_op}
        if cases.takes_inv_scale(op):
            assert {case.inverse for case in of_op} == set(cases.INVERSES)
    tensors = cases.arguments(every[0])["tensors"]
    assert {tensor.storage_offset() for tensor in tensors} == {0, 1}
    copies = cases.copied(tensors, torch.device("cpu"), {})
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.storage_offset() == copy.storage_offset()
        assert not tensor.numel() or tensor.data_ptr() != copy.data_ptr()
    assert len({tensor.untyped_storage().data_ptr() for tensor in copies}) == len(copies)


def test_a_case_that_disagrees_stops_everything(module, extension, monkeypatch):
    cases = module("gpu_check.cases")
    reference = importlib.import_module("torchlars.reference")
    norms = reference.squared_norms
    monkeypatch.setattr(reference, "squared_norms", lambda tensors, inv_scale: norms(tensors, inv_scale) * 1.001)
    with pytest.raises(AssertionError, match="squared_norms float32, 14 layers, inv_scale None: result differs"):
        cases.check(next(cases.cases()), torch.device("cpu"))


@pytest.fixture
def on_cpu(module, extension, monkeypatch):
    """Let what looks at a GPU look at a CPU."""
    steps = module("gpu_check.steps")
    modes = []
    monkeypatch.setattr(steps, "DEVICE", "cpu")
    monkeypatch.setitem(steps.SETS, "resnet50", steps.SETS["smoke"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(steps.cuda, "kernels", lambda step: step() or ["torchlars::cuda::measure", "at::native"])
    return modes


def test_a_profiler_sees_one_step_of_each_kind(on_cpu, module, monkeypatch):
    steps = module("gpu_check.steps")
    calls = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    for name in steps.PROFILED:
        make = steps.MODES[name]
        monkeypatch.setitem(steps.MODES, name, lambda params, make=make: counted(make(params), calls))
    steps.main(["--profile"])
    assert calls == ["step", "step", "start", "step", "stop"] * len(steps.PROFILED)


def counted(optimizer, calls):
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    return optimizer


@pytest.mark.filterwarnings("ignore:torch.cuda.amp")
def test_every_mode_takes_its_steps(on_cpu, module, tmp_path, capsys):
    steps = module("gpu_check.steps")
    steps.main(["--out", str(tmp_path / "steps.json")])
    found = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))
    assert len(found) == len(steps.MODES) + len(steps.SCALED) + len(steps.TWO_DTYPES)
    assert all((mode["waits"], mode["kernels"], mode["torchlars"]) == (None, 2, 1) for mode in found.values())
    assert on_cpu == ["error", "default"] * len(found)
    assert "LAMB(AdamW fused) under a GradScaler: 2 kernels, 1 of torchlars\n" in capsys.readouterr().out


def test_a_mode_in_which_the_host_waits_is_named(on_cpu, module, monkeypatch):
    steps = module("gpu_check.steps")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: on_cpu.append(mode))

    def make(params):
        optimizer = steps.our_sgd(params)
        step = optimizer.step

        def waiting():
            if on_cpu and on_cpu[-1] == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nmore")
            step()

        optimizer.step = waiting
        return optimizer

    found = steps.observe(make, (torch.float32,), False)
    assert found == {"buckets": 1, "waits": "called a synchronizing CUDA operation", "kernels": 2, "torchlars": 1}
    assert on_cpu == ["error", "default"]


def test_passes_of_bandwidth_keep_their_numbers_from_run_to_run(module, extension):
    passes = module("gpu_check.bandwidth").passes(1000, torch.device("cpu"))
    assert {name: accesses for name, (accesses, _) in passes.items()} == {
        "copy": 2,
        "norm pass": 2,
        "norm of one tensor": 1,
        "scale pass": 3,
        "both, as LARS calls them": 5,
        "update pass": 5,
    }
    for _ in range(3):
        for _, call in passes.values():
            call()
    norms = passes["norm pass"][1]()
    torch.testing.assert_close(norms, torch.full((2,), 1000.0, dtype=torch.float64))
