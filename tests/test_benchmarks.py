"""The benchmarks run, check what they time, and write what their tables need. Nothing here looks at a time itself."""

import dataclasses
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--rounds", "2", "--min-time", "1e-6"]
PEERS = {
    "timm": ("timm Lars", "timm Lamb"),
    "pytorch_optimizer": ("pytorch_optimizer LARS", "pytorch_optimizer Lamb"),
    "bitsandbytes": ("bitsandbytes LARS", "bitsandbytes LAMB"),
}


@pytest.fixture
def module(benchmark_module, monkeypatch, extension):
    """Import a module of the benchmarks; no peer is there unless a test says so."""
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    return benchmark_module


@pytest.fixture
def step_time(module, tmp_path):
    def run(*args):
        argv = ["--sets", "smoke", "--no-compile", "--out", str(tmp_path), "--name", "run", *QUICK, *args]
        return module("step_time.main").main(argv)

    return run


@pytest.mark.parametrize("name", ["step_time.main", "host_time.main", "scaling.main"])
def test_the_reference_is_not_timed_in_the_name_of_torchlars(module, name, monkeypatch, capsys):
    main = module(name).main
    monkeypatch.setattr(module("common")._extension, "extension", None)
    with pytest.raises(SystemExit):
        main([])
    assert "torchlars has no extension in" in capsys.readouterr().err


def test_step_time_writes_what_the_table_needs(step_time, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "4000000000")
    step_time()
    report = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert report["command"].startswith("python -m benchmarks.step_time.main --sets smoke")
    assert {"cpu", "cores", "threads", "torch", "torchlars", *PEERS} <= report["environment"].keys()
    assert report["environment"]["MALLOC_TRIM_THRESHOLD_"] == "4000000000"
    result = report["sets"]["smoke"]
    assert (result["tensors"], result["elements"], result["floor"]) == (4, 216 + 8 + 128 + 16, "SGD fused")
    timed = result["contestants"]
    assert {"SGD loop", "SGD foreach", "SGD fused", "LARS(SGD fused)", "LARS(Adam fused)"} <= timed.keys()
    assert {"torchlars 0.1.2 algorithm", "apex LARC algorithm", "lightning-bolts LARS algorithm"} <= timed.keys()
    for entry in timed.values():
        times = entry["clocks"]["wall"]
        assert 0 < times["q1"] <= times["median"] <= times["q3"]
        assert len(times["rounds"]) == 2
        assert times["ratio"] > 0
        assert {"formula", "target", "verdict"} <= entry.keys()
    assert timed["SGD fused"]["clocks"]["wall"]["ratio"] == 1
    table = (tmp_path / "run.md").read_text(encoding="utf-8")
    assert all(f"| {name} " in table for name in timed)
    assert all(name in table for name in report["left_out"])
    assert table.splitlines()[6].count("|") == 9
    assert "agree with their formulas" in capsys.readouterr().out


def test_lamb_stands_beside_adamw(step_time, tmp_path):
    step_time("--optimizer", "lamb")
    report = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    result = report["sets"]["smoke"]
    timed = result["contestants"]
    assert result["floor"] == "AdamW fused"
    assert timed["AdamW fused"]["clocks"]["wall"]["ratio"] == 1
    assert {"AdamW loop", "AdamW foreach", "torchlars.optim.AdamW"} <= timed.keys()
    assert {"LAMB(AdamW fused)", "LAMB(torchlars.optim.AdamW)", "_foreach_ LAMB"} <= timed.keys()
    assert {"apex FusedLAMB algorithm", "DeepSpeed FusedLamb algorithm"} <= timed.keys()
    assert not [name for name in timed if "LARS" in name or "SGD" in name]
    formulas = {"AdamW", "LAMB", "LAMB without bias correction"}
    passes = {"first pass of LAMB alone", "second pass of LAMB alone"}
    assert {name for name, entry in timed.items() if entry["formula"] is None} == passes
    assert {entry["formula"] for entry in timed.values()} == formulas | {None}
    assert report["errors"].keys() == timed.keys() - passes
    table = (tmp_path / "run.md").read_text(encoding="utf-8")
    assert all(f"| {name} " in table for name in timed)


def test_lamb_has_files_of_its_own(module, tmp_path):
    argv = ["--sets", "smoke", "--out", str(tmp_path), *QUICK, "--threads", "1", "--contestants"]
    module("step_time.main").main([*argv, "LARS(SGD fused)"])
    module("step_time.main").main([*argv, "LAMB(AdamW fused)", "--optimizer", "lamb"])
    names = {"cpu_float32_1_threads.md", "lamb_cpu_float32_1_threads.md"}
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".md"} == names


@pytest.mark.parametrize(("optimizer", "floor"), [("lars", "SGD fused"), ("lamb", "AdamW fused")])
def test_peers_that_are_missing_are_left_out_with_a_reason(step_time, optimizer, floor):
    ours = f"{optimizer.upper()}({floor})"
    peers = {peer: names[optimizer == "lamb"] for peer, names in PEERS.items()}
    report = step_time("--optimizer", optimizer, "--contestants", ours, *peers.values())
    assert list(report["sets"]["smoke"]["contestants"]) == [floor, ours]
    for peer, name in peers.items():
        assert peer in report["left_out"][name]


def test_what_breaks_in_torchlars_is_not_left_out(step_time, module, monkeypatch):
    def broken(optimizer, hyper):
        raise RuntimeError("broken")

    monkeypatch.setattr(module("step_time.contestants"), "lars", broken)
    with pytest.raises(RuntimeError, match="broken"):
        step_time()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda w, g, h: h.trust_coef * w / (g + h.weight_decay * w + h.eps), id="no rule for zeros"),
        pytest.param(lambda w, g, h: torch.where((w > 0) & (g > 0), h.trust_coef * w / g, 1.0), id="no weight decay"),
        pytest.param(
            lambda w, g, h: torch.where(
                (w > 0) & (g > 0), 1.00002 * h.trust_coef * w / (g + h.weight_decay * w + h.eps), 1.0
            ),
            id="off by 2e-5",
        ),
    ],
)
def test_a_rival_with_a_wrong_formula_is_left_out(step_time, module, monkeypatch, tmp_path, capsys, wrong):
    monkeypatch.setattr(module("step_time.contestants"), "trust_ratio", wrong)
    report = step_time()
    name = "_foreach_ LARS + SGD fused"
    assert re.fullmatch(r"does not compute LARS-SGD \(off by \d\.\de.\d\d\)", report["left_out"][name])
    assert name not in report["errors"]
    assert name not in report["sets"]["smoke"]["contestants"]
    assert f"\nleft out: {name}: does not compute LARS-SGD" in capsys.readouterr().out
    assert f"\n- Left out: {name} (does not compute LARS-SGD" in (tmp_path / "run.md").read_text(encoding="utf-8")
    assert "apex LARC algorithm" in report["sets"]["smoke"]["contestants"]


def test_a_rival_with_a_wrong_lamb_is_left_out(step_time, module, monkeypatch):
    monkeypatch.setattr(module("step_time.lamb"), "trust_ratio", lambda w, u: w / u)  # no rule for zeros
    report = step_time("--optimizer", "lamb")
    wrong = {name for name, reason in report["left_out"].items() if "does not compute LAMB" in reason}
    assert wrong == {"_foreach_ LAMB + AdamW fused", "_foreach_ LAMB", "apex FusedLAMB algorithm"}


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
@pytest.mark.parametrize("form", ["floor", "base", "wrapper", "fused"])
def test_nothing_is_timed_beside_a_wrong_floor_or_a_wrong_torchlars(
    step_time, module, monkeypatch, tmp_path, form, optimizer
):
    main, agreement = module("step_time.main"), module("step_time.agreement")
    everyone = main.CONTESTANTS[optimizer]("fused")
    (entrant,) = [each for each in everyone if each.form == form]
    off = dataclasses.replace(agreement.HYPER, lr=0.9)
    wrong = dataclasses.replace(entrant, build=lambda params, hyper: entrant.build(params, off))
    everyone = [wrong if each is entrant else each for each in everyone]
    monkeypatch.setitem(main.CONTESTANTS, optimizer, lambda base: everyone)
    with pytest.raises(agreement.Disagreement, match=re.escape(f"{entrant.name} does not compute {entrant.formula}")):
        step_time("--optimizer", optimizer)
    assert not list(tmp_path.iterdir())


def test_runs_are_timed_beside_two_launches(step_time, extension, monkeypatch):
    sizes = []
    monkeypatch.setattr(extension, "set_run_bytes", sizes.append, raising=False)
    report = step_time("--run-mb", "12", "40", "--contestants", "LARS(SGD fused)", "LARS(torchlars.optim.SGD)")
    runs = [f"{name}, runs of {mb} MB" for name in ("LARS(SGD fused)", "LARS(torchlars.optim.SGD)") for mb in (12, 40)]
    timed = report["sets"]["smoke"]["contestants"]
    assert list(timed) == ["SGD fused", "LARS(SGD fused)", "LARS(torchlars.optim.SGD)", *runs]
    assert set(runs) <= report["errors"].keys(), "they must agree with the formula, too"
    assert set(sizes[::2]) == {12_000_000, 40_000_000}
    assert set(sizes[1::2]) == {0}, "whoever comes next takes two launches"


def test_runs_are_skipped_where_the_extension_has_none(step_time, extension, monkeypatch, capsys):
    monkeypatch.delattr(extension, "set_run_bytes", raising=False)
    assert step_time("--run-mb", "24") == {}
    assert "everything is skipped: --run-mb needs torchlars._C.set_run_bytes" in capsys.readouterr().out


CHANGES = {
    "LARS(SGD fused)": [{"momentum": 0.8}, {"weight_decay": 0.4}, {"trust_coef": 0.021}, {"lr": 0.9}],
    "LAMB(AdamW fused)": [
        *({"betas": (0.81, 0.95)}, {"betas": (0.8, 0.94)}, {"adam_eps": 0.011}, {"weight_decay": 0.4}, {"lr": 0.9})
    ],
}


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name, changes in CHANGES.items() for change in changes]
)
def test_the_check_sees_every_hyper_parameter(module, name, change):
    main, agreement = module("step_time.main"), module("step_time.agreement")
    everyone = [each for contestants in main.CONTESTANTS.values() for each in contestants("fused")]
    (entrant,) = [each for each in everyone if each.name == name]
    off = dataclasses.replace(agreement.HYPER, **change)
    wrong = dataclasses.replace(entrant, build=lambda params, hyper: entrant.build(params, off))
    assert agreement.check([entrant], torch.device("cpu"))[0].keys() == {name}
    with pytest.raises(agreement.Disagreement, match=re.escape(f"{name} does not compute {entrant.formula}")):
        agreement.check([wrong], torch.device("cpu"))


def lamb_step(module, build, weight, grad, **options):
    """Return a layer of four equal weights after a step with equal gradients, on which decay and eps count."""
    param = torch.nn.Parameter(torch.full((4,), weight))
    param.grad = torch.full((4,), grad)
    hyper = module("step_time.contestants").Hyper(lr=0.1, weight_decay=0.01, betas=(0.5, 0.75), adam_eps=0.5)
    getattr(module("step_time.lamb"), build)([param], hyper, **options)()
    return param.detach()


@pytest.mark.parametrize(("weight", "ratio"), [(0.001, 0.01), (0.5, 0.5 / 0.505), (200.0, 10.0)])
def test_deepspeeds_algorithm_bounds_the_ratio(module, weight, ratio):
    update = 0.5 / (0.5 + 0.5) + 0.01 * weight  # a first moment of 0.5, and a second of 0.25
    moved = lamb_step(module, "deepspeed_lamb", weight, 1.0)
    torch.testing.assert_close(moved, torch.full((4,), weight - 0.1 * ratio * update))


def test_apexs_algorithm_can_clip_the_norm_of_all_gradients(module):
    clipped = lamb_step(module, "foreach_lamb", 0.5, 2.0, max_grad_norm=1.0)
    torch.testing.assert_close(clipped, lamb_step(module, "foreach_lamb", 0.5, 0.5))
    unclipped = lamb_step(module, "apex_lamb", 0.5, 2.0)
    torch.testing.assert_close(unclipped, lamb_step(module, "foreach_lamb", 0.5, 2.0))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes(step_time, dtype):
    report = step_time("--dtype", dtype, "--contestants", "LARS(SGD fused)", "LARS(SGD foreach)")
    result = report["sets"]["smoke"]
    assert result["dtype"] == dtype
    assert result["floor"] in ("SGD fused", "SGD foreach")
    assert result["floor"].replace("SGD", "LARS(SGD") + ")" in result["contestants"]


def test_sets_have_the_sizes_of_their_models(module):
    sets = module("step_time.sets").SETS
    sizes = {name: (len(list(layers.shapes())), layers.elements()) for name, layers in sets.items()}
    assert sizes["resnet50"] == (161, 25_557_032)
    assert sizes["vit_b_16"] == (152, 86_567_656)
    assert sizes["one_100m"] == (1, 100_000_000)
    assert sizes["one_33m"] == (1, 8192 * 4096)
    assert sizes["one_33m_odd"] == (1, 8400 * 4000)
    assert sizes["tiny"] == (2000, 128_000)
    assert sizes["llama_7b_bf16"] == (291, 6_738_415_616)


def test_momentum_in_8_bits_stands_beside_that_in_float32(step_time, module, monkeypatch, tmp_path):
    sets, main, contestants = (module(f"step_time.{name}") for name in ("sets", "main", "contestants"))
    layers = sets.LayerSet(lambda: iter([(64, 128)]), reuse=0.0)
    monkeypatch.setitem(sets.SETS, "one_33m", layers)
    names = [name for pair in contestants.EIGHT_BITS.items() for name in pair]
    report = step_time("--sets", "one_33m", "--threads", "1", "--contestants", *names)
    timed = report["sets"]["one_33m"]["contestants"]
    assert set(timed) == {"SGD fused", *names}
    assert [round(timed[name]["byte_floor"], 2) for name in contestants.EIGHT_BITS] == [0.70, 1.10]
    plain, lars = report["sets"]["one_33m"]["comparisons"][-2:]
    number, verdict = r"\d+\.\d\d", r"target: ≤ 0\.9, (met|missed)\)\."
    told = (
        rf"torchlars\.optim\.SGD, 8-bit takes {number} of the time of torchlars\.optim\.SGD \(floor: 0\.70; {verdict}"
    )
    assert re.fullmatch(told, plain)
    assert re.fullmatch(rf"LARS\(.*, 8-bit\) takes {number} of .* \(floor: 0\.79; {verdict}", lars)
    params, _ = main.make_layers(layers, torch.device("cpu"), torch.float32)
    optimizer = contestants.torchlars_sgd(params, main.HYPER, torch.int8)
    optimizer.step()
    assert "momentum_codes" in optimizer.state[params[0]]
    report = step_time("--dtype", "float64", "--contestants", *names)
    assert report["left_out"] == dict.fromkeys(contestants.EIGHT_BITS, "float64 has no momentum in 8 bits")


def test_a_large_set_is_skipped_for_the_memory_of_those_who_take_part(module, monkeypatch):
    main, sets, contestants = (module(f"step_time.{name}") for name in ("main", "sets", "contestants"))
    everyone = contestants.contestants("fused")
    two = [each for each in everyone if each.name in ("SGD fused", "LARS(torchlars.optim.SGD)")]
    assert main.number_of_states(everyone, False) == 5  # SGD, 0.1.2, and three of torchlars
    assert main.number_of_states(two, True) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * 2**30, 80 * 2**30))
    llama, device = sets.SETS["llama_7b_bf16"], torch.device("cuda")
    assert "needs 102 GiB" in main.reason_to_skip(llama, device, torch.float32, 5)
    assert main.reason_to_skip(llama, device, torch.float32, 2) is None
    assert main.reason_to_skip(llama, torch.device("cpu"), torch.float32, 2) == "it is for GPUs"


def test_targets_and_floors(module):
    targets = module("step_time.targets")
    cpu = targets.target("lars", "wrapper", "cpu", "resnet50", 2, "float32")
    assert [targets.verdict(cpu, ratio)[1] for ratio in (1.85, 1.86)] == ["met", "missed"]
    assert targets.target("lars", "wrapper", "cpu", "resnet50", 2, "bfloat16") is None
    assert targets.target("lars", "wrapper", "cpu", "resnet50", 8, "float32") is None
    gpu = targets.target("lars", "wrapper", "cuda", "resnet50", 8, "float32")
    assert [targets.verdict(gpu, ratio)[1] for ratio in (1.7, 2.0, 2.2)] == ["met", "first met", "missed"]
    assert [targets.byte_floor(10, 2, reuse, 5) for reuse in (1, 0, None)] == [1.6, 2.0, 1.0]
    assert [targets.byte_floor(7, 2, reuse, 5) for reuse in (1, 0, 0.5)] == [1.0, 1.4, 1.2]
    lamb = [targets.target("lamb", form, "cpu", "tiny", 2, "float32").at_most for form in ("wrapper", "fused", "base")]
    assert lamb == [1.4, 0.6, 1.0]


def test_floors_of_lamb(module):
    main, targets = module("step_time.main"), module("step_time.targets")
    everyone = main.CONTESTANTS["lamb"]("fused")
    floor = main.floor_of(everyone)
    floors = {
        each.name: [
            round(targets.byte_floor(each.accesses, each.cacheable, reuse, floor.accesses), 2) for reuse in (1, 0)
        ]
        for each in everyone
        if each.accesses
    }
    assert floors == {
        "AdamW fused": [1.0, 1.0],
        "torchlars.optim.AdamW": [1.0, 1.0],
        "LAMB(AdamW fused)": [1.71, 2.0],
        "LAMB(torchlars.optim.AdamW)": [1.0, 1.43],
    }
    assert main.number_of_states(everyone, False) == 6  # two moments of three


def test_ratios_are_taken_within_rounds(module):
    assert module("common").ratio([2.0, 20.0, 2.0], [1.0, 10.0, 0.5]) == 2


def test_every_round_times_everyone_in_a_new_order(module):
    order = []

    def sample(name):
        order.append(name)
        return 1.0

    names = "abcd"
    samples = {name: (lambda name=name: sample(name)) for name in names}
    times = module("common").interleaved(samples, rounds=5, min_time=1.0, seed=0)
    assert times == {name: [1.0] * 5 for name in names}
    rounds = ["".join(order[start : start + 8 : 2]) for start in range(0, 40, 8)]  # each warms up once
    assert all(sorted(each) == list(names) for each in rounds)
    assert len(set(rounds)) > 1


def test_a_package_gives_one_module_without_its_own_imports(module, monkeypatch, tmp_path):
    package = tmp_path / "heavy" / "optim"
    package.mkdir(parents=True)
    (tmp_path / "heavy" / "__init__.py").write_text("import what_nobody_has")
    (package / "__init__.py").write_text("import what_nobody_has")
    (package / "light.py").write_text("from .helpers import value")
    (package / "helpers.py").write_text("value = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_alone = module("step_time.contestants").import_alone
    assert import_alone("heavy.optim.light").value == 3
    assert not any(name.startswith("heavy") for name in sys.modules)
    with pytest.raises(ModuleNotFoundError, match="what_nobody_has"):
        importlib.import_module("heavy")


def test_host_time_writes_what_the_table_needs(module, tmp_path):
    argv = ["--tensors", "1", "100", "--groups", "1", "4", "--out", str(tmp_path), "--name", "run", *QUICK]
    module("host_time.main").main(argv)
    report = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert report["command"].startswith("python -m benchmarks.host_time.main --tensors 1 100")
    part = "LARS part: LARS(no-op) − no-op"
    for count in ("1", "100"):
        timed = report["tensors"][count]
        assert {"SGD fused", "SGD foreach", "ops.scale_gradients_, lists ready", part} <= timed.keys()
        assert all(len(times["rounds"]) == 2 for times in timed.values())
    table = (tmp_path / "run.md").read_text(encoding="utf-8")
    assert all(f"| {name} " in table for name in timed)
    assert "≤ 120" in table
    for count in ("1", "4"):
        timed = report["groups"][count]
        assert {"no-op", "LARS(torchlars.optim.SGD)", part} <= timed.keys()
    assert "a further one" in table


def test_an_earlier_version_stands_beside_this_one(step_time, module, tmp_path):
    names = {"SGD fused", "LARS(SGD fused)", "torchlars.optim.SGD", "LARS(torchlars.optim.SGD)"}
    timed = step_time("--earlier", str(ROOT), "--contestants", "LARS(SGD fused)")["sets"]["smoke"]["contestants"]
    at = next(name.removeprefix("SGD fused") for name in timed if name.startswith("SGD fused at "))
    assert {name + at for name in names} <= timed.keys()
    assert all(len(entry["clocks"]["wall"]["rounds"]) == 2 for entry in timed.values())
    assert timed["LARS(SGD fused)" + at]["form"] == "earlier"

    argv = ["--tensors", "1", "--groups", "1", "4", "--out", str(tmp_path), *QUICK, "--earlier", str(ROOT)]
    report = module("host_time.main").main(argv)
    part = "LARS part: LARS(no-op) − no-op"
    for found in (report["tensors"][1], report["groups"][1], report["groups"][4]):
        assert {name + at for name in (*names, "no-op", part)} <= found.keys()


LENT = """
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {file!r}) if name == "torchlars._C" else None
sys.meta_path.append(Finder)
"""


@pytest.mark.parametrize("is_lent", [False, True], ids=["none", "of another"])
def test_an_earlier_version_is_timed_with_its_own_extension(step_time, extension, is_lent, tmp_path, capfd):
    """An editable install lent its extension, by a finder, to a checkout that had none."""
    checkout = tmp_path / "earlier"
    shutil.copytree(ROOT / "torchlars", checkout / "torchlars", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    if is_lent:
        (checkout / "sitecustomize.py").write_text(LENT.format(file=extension.__file__), "utf-8")
        loader = checkout / "torchlars" / "_extension.py"  # versions without this check take what is lent
        code = loader.read_text("utf-8").replace("if PathFinder.find_spec(", "if False and PathFinder.find_spec(")
        assert code.count("if False and ") == 1
        loader.write_text(code, "utf-8")
    with pytest.raises(RuntimeError, match=r"the process of .* has ended"):
        step_time("--earlier", str(checkout), "--contestants", "LARS(SGD fused)")
    said = capfd.readouterr().err
    assert f"torchlars has no extension of its own in {checkout / 'torchlars'} (" in said
    assert not is_lent or f"(found: {extension.__file__})" in said


@pytest.mark.parametrize("more", [["--device", "cuda"], ["--optimizer", "lamb"]], ids=["cuda", "lamb"])
def test_an_earlier_version_is_for_lars_on_a_cpu(step_time, more, capsys):
    with pytest.raises(SystemExit):
        step_time("--earlier", str(ROOT), *more)
    assert re.search("--earlier is for|needs a GPU", capsys.readouterr().err)


# --- What the READMEs say ----------------------------------------------------------------------------------------------

SETS = ("resnet50", "vit_b_16", "one_100m", "tiny")


def ratios_of(results, folder="step_time"):
    """Return the table of a run of step_time, as {set: {contestant: ratio}}."""
    sections = re.split(r"^### ", (ROOT / "benchmarks" / folder / "results" / results).read_text("utf-8"), flags=re.M)[
        1:
    ]
    row = re.compile(r"^\| ([^|]+?) +\|[^|]+\|[^|]+\|[^|]+\| +([\d.]+) \|", re.M)
    return {section.split(":")[0]: dict(row.findall(section)) for section in sections}


def cells_of(line):
    return [cell.strip().replace("*", "").replace("`", "") for cell in line.strip("|").split("|")]


def speeds_told(readme, section):
    """Return the table of a section of a README as {contestant: ratios}."""
    text = re.search(rf"^{section}\n(.*?)^##", (ROOT / readme).read_text("utf-8"), re.M | re.S)[1]
    lines = [cells_of(line) for line in re.findall(r"^\|.*\|$", text, re.M)][2:]
    remarks = re.compile(r",? its|\(another formula\)|\(waits for the GPU\)")
    return {remarks.sub("", name).strip(): told for name, *told in lines if "floor" not in name}


def test_speeds_on_a_gpu_are_those_of_the_results():
    found = ratios_of("nvidia_h100_80gb_hbm3/summary.md", "gpu_check")
    told = speeds_told("benchmarks/step_time/README.md", "### On a GPU")
    assert len(told) == 9
    for name, ratios in told.items():
        assert ratios == [found[layers].get(name, "") for layers in ("resnet50", "one_100m", "llama_7b_bf16")], name


def test_speeds_in_readme_are_those_of_the_results():
    found = ratios_of("cpu_float32_2_threads.md")
    told = speeds_told("README.md", "## Speed")
    assert len(told) == 6
    for name, ratios in told.items():
        assert ratios == [found[layers].get(name, "") for layers in SETS], name


def test_speeds_of_lamb_in_readme_are_those_of_the_results():
    found = ratios_of("lamb_cpu_float32_2_threads.md")
    told = speeds_told("README.md", "### LAMB")
    assert len(told) == 6
    for name, ratios in told.items():
        assert ratios == [found[layers].get(name, "") for layers in ("resnet50", "vit_b_16", "tiny")], name


def test_ratios_beside_targets_are_those_of_the_results(module):
    targets = module("step_time.targets")
    readme = (ROOT / "benchmarks/step_time/README.md").read_text("utf-8")
    rows = re.findall(r"^\| (\w+) +\| +(1|2) \|(.*)\|$", readme.partition("### Before and after")[0], re.M)
    assert [(layers, int(threads)) for layers, threads, _ in rows] == [
        ("resnet50", 2),
        ("resnet50", 1),
        ("vit_b_16", 2),
        ("one_100m", 2),
        ("tiny", 2),
    ]
    for layers, threads, rest in rows:
        expected = []
        for form, name in (("wrapper", "LARS(SGD fused)"), ("fused", "LARS(torchlars.optim.SGD)")):
            target = targets.target("lars", form, "cpu", layers, int(threads), "float32")
            expected.append(f"{target.at_most:g}" if target else "–")
            expected.append(ratios_of(f"cpu_float32_{threads}_threads.md")[layers][name])
        assert cells_of(rest) == expected, layers


def test_ratios_before_and_after_are_those_of_the_results():
    readme = (ROOT / "benchmarks/step_time/README.md").read_text("utf-8")
    before, after = re.search(r"^Before: (\w+)\. After: (\w+)\.", readme, re.M).groups()
    for threads, sets in ((2, SETS), (1, SETS[:2])):
        found = ratios_of(f"cpu_before_after_{threads}_threads.md")
        for layers in sets:
            names = ("SGD fused", "LARS(SGD fused)", "LARS(torchlars.optim.SGD)")
            cells = [found[layers][f"{name} at {revision}"] for name in names for revision in (before, after)]
            assert f"| {layers} | {threads} | {' | '.join(cells)} |" in readme


def test_nanoseconds_in_host_times_readme_are_those_of_the_results():
    folder = ROOT / "benchmarks/host_time"
    tables = re.findall(r"(?:^\|.*\|\n)+", (folder / "results/cpu_1_threads.md").read_text("utf-8"), re.M)
    assert len(tables) == 2
    assert all(table in (folder / "README.md").read_text("utf-8") for table in tables)


def test_passes_of_lamb_in_the_readme_are_those_of_the_results():
    found = ratios_of("lamb_cpu_passes_2_threads.md")
    readme = (ROOT / "benchmarks/step_time/README.md").read_text("utf-8")
    names = ("LAMB(torchlars.optim.AdamW)", "first pass of LAMB alone", "second pass of LAMB alone")
    for layers in ("resnet50", "vit_b_16"):
        cells = " | ".join(found[layers][name] for name in names)
        assert f"| {layers} | {cells} |" in readme


def test_ratios_of_lamb_beside_targets_are_those_of_the_results(module):
    targets = module("step_time.targets")
    found = ratios_of("lamb_cpu_float32_2_threads.md")
    readme = (ROOT / "benchmarks/step_time/README.md").read_text("utf-8")
    forms = {"fused": "LAMB(torchlars.optim.AdamW)", "base": "torchlars.optim.AdamW", "wrapper": "LAMB(AdamW fused)"}
    for layers in ("resnet50", "vit_b_16", "tiny"):
        cells = []
        for form, name in forms.items():
            target = targets.target("lamb", form, "cpu", layers, 2, "float32")
            cells += [f"{target.at_most:.1f}" if target else "–", found[layers][name]]
        assert re.search(rf"^\| {layers} +\| {re.escape(' | '.join(cells))} \|$", readme, re.M), layers
