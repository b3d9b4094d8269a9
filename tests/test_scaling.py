"""benchmarks/scaling: its arithmetic against values worked by hand, a run, and the figures in its README."""

import importlib
import json
from pathlib import Path

import pytest
import torch.distributed as dist
from figures import quotes

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "scaling"


@pytest.fixture
def module(benchmark_module):
    return lambda name: benchmark_module(f"scaling.{name}")


@pytest.fixture
def slow(module):
    """A machine whose numbers can be worked with by hand."""
    return module("simulate").Machine(
        launch_us=1,
        nvlink_us=1,
        network_us=10,
        nvlink_small=1,
        network_small=0.5,
        nvlink_large=1,
        network_large=0.05,
        memory=1,
    )


@pytest.fixture
def small(module):
    """A model of a root with 10 elements, and a block with 20 and 25."""
    return module("models").Model((((10,),), ((20,), (5, 5))))


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def test_models_have_the_sizes_of_their_publications(module):
    models = module("models")
    sizes = {name: (build().layers, build().elements()) for name, build in models.MODELS.items()}
    assert sizes == {
        "ResNet-50": (161, 25_557_032),
        "Llama-2-7B": (291, 6_738_415_616),
        "Llama-2-70B": (723, 68_976_648_192),
    }
    llama_3_70b = models.llama(width=8192, hidden=28672, blocks=80, heads=64, kv_heads=8, words=128256)
    assert (llama_3_70b.layers, llama_3_70b.elements()) == (723, 70_553_706_496)
    assert [len(build().units) for build in models.MODELS.values()] == [1 + 16, 1 + 32, 1 + 80]


@pytest.mark.parametrize(("build", "same"), [("resnet50", "resnet50"), ("llama_2_7b", "llama_7b_bf16")])
def test_models_have_the_layers_that_steps_are_timed_on(module, build, same):
    sets = importlib.import_module("benchmarks.step_time.sets")
    assert sorted(getattr(module("models"), build)().shapes()) == sorted(sets.SETS[same].shapes())


def test_units_of_resnet50_are_its_blocks(module):
    root, *blocks = module("models").resnet50().units
    assert root == ((64, 3, 7, 7), (64,), (64,), (1000, 2048), (1000,))
    assert [len(block) for block in blocks] == [12, 9, 9, 12, 9, 9, 9, 12, 9, 9, 9, 9, 9, 12, 9, 9]
    assert all(block[0][2:] == (1, 1) and block[3][2:] == (3, 3) for block in blocks)


@pytest.mark.parametrize(
    ("ranks", "ring", "tree", "two_levels"),
    [
        (8, 1 + 14 * (1 + 0.25), 1 + 6 * 3, 1 + 14 * 3),
        (16, 1 + 30 * (10 + 0.25), 1 + 8 * 14, 1 + 2 * (7 * 3 + 14)),
        (10_000, 1 + 19_998 * (10 + 0.0004), 1 + 28 * 14, 1 + 2 * (7 * 3 + 11 * 14)),  # 1250 nodes
    ],
)
def test_times_of_an_all_reduce_of_2000_bytes(module, slow, ranks, ring, tree, two_levels):
    simulate = module("simulate")
    assert simulate.ring_us(2000, ranks, slow) == pytest.approx(ring)
    assert simulate.tree_us(2000, ranks, slow) == pytest.approx(tree)
    assert simulate.two_level_us(2000, ranks, slow) == pytest.approx(two_levels)


def test_what_a_step_tells(module):
    prediction = module("simulate").prediction
    assert prediction(161, 1) == {"collectives": 0, "bytes": 0}
    assert prediction(161, 2) == prediction(161, 10_000) == {"collectives": 1, "bytes": 2576}


def test_what_it_is_compared_with(module, slow, small):
    simulate = module("simulate")
    assert simulate.fsdp_bytes(small, slow) == 2 * (10 + 2 * 45) + 2 * (10 + 45)
    assert simulate.fsdp_collectives(small) == 5  # the block's three, the root's two
    assert simulate.fsdp_bandwidth_us(small, 8, slow) == pytest.approx(0.310 * 7 / 8)
    assert simulate.fsdp_bandwidth_us(small, 16, slow) == pytest.approx(0.310 * 15 / 16 / 0.4)
    assert simulate.fsdp_latency_us(small, 8, slow) == pytest.approx(5 * (1 + 7))
    assert simulate.fsdp_latency_us(small, 16, slow) == pytest.approx(5 * (1 + 7 + 10))
    assert simulate.fsdp_us(small, 8, slow) == pytest.approx(0.310 * 7 / 8 + 5 * (1 + 7))
    assert simulate.sweep_us(small, 8, slow) == pytest.approx(5 * 0.220 / 8)
    assert simulate.one_by_one_us(small, 8, slow) == pytest.approx(6 * (1 + 14 * 1.004))


def test_ratios_that_may_differ_between_replicas(module):
    assert module("simulate").ratios_that_may_differ(291, 8) == 291 * 14 / 2**28


def test_sums_in_another_order_stay_within_the_bound(module):
    import torch

    ranks, layers = 64, 20_000
    parts = torch.rand(2, layers, ranks, dtype=torch.float64)
    sums = [(parts[..., order].cumsum(-1)[..., -1]) for order in (torch.arange(ranks), torch.randperm(ranks))]
    one, other = (0.001 * w.sqrt() / (g.sqrt() + 1e-4 * w.sqrt() + 1e-8) for w, g in sums)
    assert not torch.equal(one, other)
    assert float(((one - other) / one).abs().max()) <= (ranks + 6) * 2.0**-52  # in units of 2⁻²⁴: (N + 6) 2⁻²⁸
    assert int((one.float() != other.float()).sum()) <= 1


@pytest.mark.parametrize(
    ("value", "text"), [(0.0153, "0.0153"), (15.46, "15.5"), (99.96, "100"), (371.2, "371"), (1234.6, "1,235")]
)
def test_figures_have_three_digits(module, value, text):
    assert module("simulate").short(value) == text


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_assumptions_are_options(module, tmp_path, capsys):
    report = module("main").main(["--simulate", "--network-us", "20", "--node", "4", "--out", str(tmp_path)])
    assert not (tmp_path / "measured.json").exists()
    saved = json.loads((tmp_path / "simulated.json").read_text(encoding="utf-8"))
    assert saved == report["simulated"]
    assert (saved["machine"]["network_us"], saved["machine"]["node"]) == (20, 4)
    assert saved["command"] == f"python -m benchmarks.scaling.main --simulate --network-us 20 --node 4 --out {tmp_path}"
    default = json.loads((FOLDER / "results" / "simulated.json").read_text(encoding="utf-8"))
    for name, model in saved["models"].items():
        assert model["ranks"]["64"]["two_level_us"] > 2 * default["models"][name]["ranks"]["64"]["two_level_us"]
    assert "Llama-2-70B" in capsys.readouterr().out


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
def test_a_run_measures_what_was_predicted(module, extension, tmp_path):
    argv = ["--ranks", "1", "2", "--set", "smoke", "--rounds", "2", "--out", str(tmp_path)]
    module("main").main(argv)
    report = json.loads((tmp_path / "measured.json").read_text(encoding="utf-8"))
    assert {"cpu", "cores", "threads", "torch", "torchlars", "backend", "load average"} <= report["environment"].keys()
    told = {
        ranks: {name: (entry["collectives"], entry["bytes"]) for name, entry in found["contestants"].items()}
        for ranks, found in report["ranks"].items()
    }
    wrappers = ["LARS(SGD foreach)", "LARS(torchlars.optim.SGD)", "LAMB(AdamW foreach)"]
    assert [told["1"][name] for name in wrappers] == [(0, 0)] * 3
    assert [told["2"][name] for name in wrappers] == [(1, 4 * 16)] * 3  # four layers
    assert told["2"]["all-reduce alone"] == (1, 4 * 16)
    assert told["2"]["norms alone, one by one"] == (2 * 4, 2 * 4 * 4)
    for found in report["ranks"].values():
        for name, entry in found["contestants"].items():
            assert ("wall_ratio" in entry) == (name in wrappers)
            for clock in ("wall_ms", "cpu_ms"):
                assert 0 < entry[clock]["q1"] <= entry[clock]["median"] <= entry[clock]["q3"]
                assert len(entry[clock]["rounds"]) == 2
    assert {"whole", "sharded"} == report["host"]["us"]["LARS(SGD foreach) − SGD foreach"].keys()
    table = (tmp_path / "measured.md").read_text(encoding="utf-8")
    assert all(f"| {name} " in table for name in told["2"])


def test_what_was_not_predicted_stops_everything(module, extension):
    measure = module("measure")
    told = {each.name: {"collectives": int(each.wraps), "bytes": 64 * each.wraps} for each in measure.CONTESTANTS}
    measure.check_told([told, told], layers=4, ranks=2)
    told["LARS(SGD foreach)"]["collectives"] = 2
    with pytest.raises(measure.Disagreement, match=r"LARS\(SGD foreach\) told .* on rank 0"):
        measure.check_told([told], layers=4, ranks=2)


# --- What the README says ---------------------------------------------------------------------------------------------


def results(name):
    return json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))


def rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_results_are_those_of_the_formulas(module):
    saved = results("simulated")
    del saved["command"]
    simulate = module("simulate")
    again = simulate.simulate(simulate.Machine())
    assert saved == json.loads(json.dumps(again))


def test_tables_are_those_of_the_results(module):
    measured, simulated = results("measured"), results("simulated")
    tables = {
        "measured": [module("measure").summary_table(measured), module("measure").host_table(measured["host"])],
        "simulated": [module("simulate").models_table(simulated), module("simulate").summary_table(simulated)],
    }
    for name, of_name in tables.items():
        assert rows((FOLDER / "results" / f"{name}.md").read_text("utf-8")) == rows("\n".join(of_name))
        for table in of_name:
            assert table in readme()


def quoted():
    """Return the figures that the README quotes outside of its tables, those of a sentence together."""
    measured, simulated = results("measured"), results("simulated")
    at = {ranks: found["contestants"] for ranks, found in measured["ranks"].items()}

    def cpu(ranks, name):
        return at[ranks][name]["cpu_ms"]["median"]

    def added(ranks):
        return cpu(ranks, "LARS(SGD foreach)") - cpu(ranks, "SGD foreach")

    for name in ("LARS(SGD foreach)", "LARS(torchlars.optim.SGD)"):
        yield tuple(f"{at[ranks][name]['cpu_ratio']:.2f}" for ranks in "124")
    yield f"{cpu('2', 'all-reduce alone'):.2f}", 2, f"{cpu('4', 'all-reduce alone'):.2f}", 4
    yield f"{added('2'):.2f}", f"{added('4'):.2f}"
    yield f"{cpu('2', 'norms alone, one by one'):.2f}", 2
    yield (f"{cpu('2', 'LARS(SGD foreach)'):.2f}",)
    yield (measured["environment"]["cores"],)
    assert measured["environment"]["torch"].partition("+")[0] in readme()
    yield measured["host"]["layers"], 64
    host = measured["host"]["us"]["LARS(SGD foreach) − SGD foreach"]["sharded"]["median"]
    large = simulated["models"]["Llama-2-70B"]
    yield (f"{host:.2f}",)
    yield f"{host * large['layers'] / 1e3:.1f}", large["layers"]
    yield (f"{large['ranks']['8']['shard_gb']:.0f}",)

    seven, machine = simulated["models"]["Llama-2-7B"], simulated["machine"]
    few, many = seven["ranks"]["64"], seven["ranks"]["10000"]
    yield f"{few['two_level_us']:.1f}", 64, f"{many['two_level_us']:.0f}", "10,000"
    bytes_us = [
        2 * seven["vector_bytes"] / 1e3 * (7 / machine["nvlink_small"] + levels / machine["network_small"])
        for levels in (3, 11)
    ]
    yield tuple(f"{us:.2f}" for us in bytes_us)
    yield f"{100 * many['share_of_fsdp']:.3f}", "10,000"
    yield seven["one_by_one_collectives"], f"{many['one_by_one_us'] / 1e3:.1f}"
    yield (f"{100 * many['one_by_one_share_of_fsdp']:.1f}",)
    yield (f"{100 * simulated['models']['ResNet-50']['ranks']['10000']['share_of_fsdp']:.2f}",)
    yield (f"{round(1 / seven['ranks']['8']['ratios_that_may_differ'], -2):,.0f}",)
    yield machine["node"], 100  # H100s


def readme():
    return (FOLDER / "README.md").read_text("utf-8")


def test_figures_in_prose_are_those_of_the_results():
    assert [figures for figures in quoted() if not quotes(readme(), *figures)] == []
    machine = results("simulated")["machine"]
    cells = [f"| {machine[value]} µs |" for value in ("launch_us", "nvlink_us", "network_us")]
    for value in ("nvlink_small", "network_small", "nvlink_large", "memory", "network_large"):
        cells.append(f"| {machine[value]:.0f} GB/s")
    assert [cell for cell in cells if cell not in readme()] == []


def test_prose_is_true_of_the_results():
    simulated = results("simulated")
    seven, large = (simulated["models"][name]["ranks"] for name in ("Llama-2-7B", "Llama-2-70B"))
    host = results("measured")["host"]["us"]["LARS(SGD foreach) − SGD foreach"]["sharded"]["median"] * 723
    for ranks, at in seven.items():
        assert (at["two_level_us"] > at["sweep_us"]) == (int(ranks) >= 512)
    for ranks, at in simulated["models"]["ResNet-50"]["ranks"].items():
        assert at["one_by_one_us"] > at["fsdp_us"]
        assert at["share_of_fsdp"] <= 0.035, ranks
    at = large["10000"]
    assert max(at["two_level_us"], at["tree_us"], at["sweep_us"]) < host < min(at["ring_us"], at["one_by_one_us"])
    for model in simulated["models"].values():
        assert model["vector_bytes"] == 16 * model["layers"]
        assert model["rank_bytes"] == 20 * model["layers"]
    for found in results("measured")["ranks"].values():
        for entry in found["contestants"].values():
            assert len(entry["cpu_ms"]["rounds"]) >= 20
