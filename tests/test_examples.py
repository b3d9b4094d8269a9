"""The examples run, for a few epochs, and show what they say. What they need comes with `pip install .[examples]`."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from figures import quotes

import torchlars.optim
from torchlars import LAMB, LARC, LARS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture
def example(monkeypatch, threads):
    """Import an example, which is a script and no module of a package."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads(1)
    return importlib.import_module


@pytest.fixture
def digits(example):
    for package in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    return example("digits")


@pytest.fixture
def run(monkeypatch, digits, tmp_path):
    """Run the main of a module with command line arguments; returns the table that it has written."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *args, "--out", str(tmp_path)])
        module.main()
        assert (tmp_path / f"{module.__name__}.png").stat().st_size > 0
        lines = (tmp_path / f"{module.__name__}.md").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return run


def test_lars_over_adam_leaves_unequal_steps_and_lamb_makes_them_equal(example):
    lamb_over_adam = example("lamb_over_adam")
    lars, lamb = (list(lamb_over_adam.relative_steps(wrap).values()) for wrap in (LARS, LAMB))
    assert len(lars) == len(lamb) == 5
    assert max(lars) > 3 * min(lars)
    assert lamb == pytest.approx([lamb_over_adam.LR] * 5, rel=1e-4)  # each a float32 difference of weights


def test_the_readme_has_the_figures_that_lamb_over_adam_prints(example, capsys):
    example("lamb_over_adam").main()
    rows = [line for line in capsys.readouterr().out.splitlines() if ".weight" in line or ".bias" in line]
    lars = [float(row.split("|")[3]) for row in rows]
    assert len(lars) == 5
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert quotes(readme, f"{min(lars):.4f}", f"{max(lars):.4f}")


def test_digits_has_three_arms(digits, run):
    head, _, *rows = run(digits, "--seeds", "1", "--epochs", "1")
    assert head == ["arm", "batch", "lr", "steps", "mean accuracy", "spread"]
    assert [row[0] for row in rows] == [name for name in digits.ARMS for _ in digits.BATCH_SIZES]
    assert [row[1] for row in rows] == ["32", "512", "1437"] * 3
    assert [row[3] for row in rows] == ["45", "3", "1"] * 3


def test_digits_gains_arms_on_request(digits, run, monkeypatch):
    monkeypatch.setattr(digits, "ARMS", {"SGD": digits.ARMS["SGD, linear lr scaling"]})
    rows = run(digits, "--seeds", "1", "--epochs", "2", "--arms", "larc", "lamb", "8bit")[2:]
    usual, larc, lamb, coded = rows[:3], rows[3:6], rows[6:9], rows[9:]
    names = ("SGD", "LARC, linear scaling", "LAMB(AdamW), √ scaling", "LARS, 8-bit momentum")
    assert [row[0] for row in rows] == [name for name in names for _ in digits.BATCH_SIZES]
    assert [row[2] for row in larc] == ["0.025", "0.4", "1.123"]
    assert [row[2] for row in lamb] == ["0.01", "0.04", "0.067"]
    assert [row[2] for row in coded] == ["16"] * 3
    for arm in (usual, larc, lamb, coded):
        assert float(arm[0][4].strip(" %")) > 20  # at batch 32 it has learned something in two epochs


def test_digits_takes_another_lr_for_the_lars_arms(digits, run, monkeypatch):
    names = ("SGD, lr re-tuned", "LARS, one lr")
    monkeypatch.setattr(digits, "ARMS", {name: digits.ARMS[name] for name in names})
    rows = run(digits, "--seeds", "1", "--epochs", "1", "--arms", "8bit", "--lars-lr", "8")[2:]
    assert [row[2] for row in rows] == ["0.025", "0.05", "0.05", *["8"] * 6]


def test_digits_refuses_arms_that_it_does_not_have(digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--arms", "adam"])
    with pytest.raises(SystemExit):
        digits.main()
    assert "argument --arms: invalid choice: 'adam'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "wrapper", "base"),
    [
        ("LARS 8-bit", LARS, torchlars.optim.SGD),
        ("SGD", torch.optim.SGD, None),
        ("LARS", LARS, torch.optim.SGD),
        ("LARC", LARC, torch.optim.SGD),
        ("LAMB", LAMB, torchlars.optim.AdamW),
    ],
)
def test_the_arms_of_digits_are_what_they_are_called(digits, name, wrapper, base):
    optimizer = digits.make_optimizer(digits.Setting(name, 32, 0.5), torch.nn.Linear(2, 2))
    assert type(optimizer) is wrapper
    assert base is None or type(optimizer.optim) is base
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["weight_decay"] > 0


def test_all_layers_of_digits_with_rows_of_64_elements_have_momentum_in_8_bits(digits):
    model = digits.make_model()
    optimizer = digits.make_optimizer(digits.Setting("LARS 8-bit", 32, 16.0), model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    coded = [name for name, param in model.named_parameters() if "momentum_codes" in optimizer.state[param]]
    assert coded == [f"{i}.weight" for i in (2, 5, 7, 11, 13)], "all weights but those of the first layer, of 9 a row"


def test_trust_ratios_of_all_weights_and_no_biases(example, digits, run):
    head, _, *rows = run(example("trust_ratios"), "--epochs", "2", "--batch-size", "700")
    assert head == ["layer", "first", "median", "last"]
    weights = {name: param for name, param in digits.make_model().named_parameters() if param.ndim > 1}
    assert [row[0] for row in rows] == list(weights)
    firsts = [float(row[1]) for row in rows]
    assert all(0 < ratio < 2 for ratio in firsts)  # trust_coef / weight_decay is the largest that there can be
    assert len(set(firsts)) > 1


def test_trust_ratios_are_recorded_at_every_step(example, digits):
    ratios, accuracy = example("trust_ratios").train(batch_size=500, epochs=2, seed=0)
    assert {steps.shape for steps in ratios.values()} == {(6,)}
    assert all((steps[1:] != steps[:-1]).all() for steps in ratios.values())
    assert 0 <= accuracy <= 100


@pytest.mark.parametrize("option", ["--batch-size", "--epochs"])
def test_trust_ratios_refuses_less_than_one(example, digits, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trust_ratios.py", option, "0"])
    with pytest.raises(SystemExit):
        example("trust_ratios").main()
    assert f"{option} must be a positive number (got: 0)" in capsys.readouterr().err


@pytest.fixture
def distributed(digits):
    """Run a script on two processes, as torchrun does; returns its exit status, what it printed and its errors."""

    def distributed(script, *args):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*launcher, str(script), *args],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    return distributed


@needs_gloo
def test_distributed_has_equal_losses_under_ddp_and_fsdp2_and_after_resuming(distributed, tmp_path):
    status, printed, errors = distributed(
        EXAMPLES / "distributed.py", "--epochs", "2", "--out", str(tmp_path / "saved")
    )
    assert status == 0, errors
    assert "Warning" not in errors
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 2, "each of two ranks saves its shards"
    title, _, head, first, second, _, verdict = printed
    assert title == "Mean losses in torch.float64 on cpu, processes: 2"
    assert re.split("  +", head) == ["epoch", "one process", "DDP", "FSDP2", "FSDP2, resumed"]
    for epoch, row, runs in ((1, first, 3), (2, second, 4)):
        number, *losses = row.split()
        assert number == str(epoch)
        assert len(losses) == runs
        assert len(set(losses)) == 1
    assert float(second.split()[1]) < float(first.split()[1])
    assert re.fullmatch(r"Equal: largest relative difference \d\.\de[-+]\d\d, allowed 1e-12", verdict)


@needs_gloo
def test_distributed_fails_where_ratios_are_those_of_shards(distributed, tmp_path):
    script = tmp_path / "without_communication.py"
    script.write_text(
        "import runpy, sys\n"
        "from torchlars import sharding\n"
        "sharding.complete = lambda squared_norms: None\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        f"runpy.run_path({str(EXAMPLES / 'distributed.py')!r}, run_name='__main__')\n",
        encoding="utf-8",
    )
    status, printed, errors = distributed(script, "--epochs", "2")
    assert status == 1, errors
    (_, alone, ddp, fsdp2), (_, *at_last) = (row.split() for row in printed[3:5])
    assert ddp == alone
    assert fsdp2 != alone
    assert at_last[2] == at_last[3], "it resumes from what it has saved, whatever that is"
    assert printed[-1].startswith("NOT EQUAL: largest relative difference ")


@needs_gloo
def test_distributed_refuses_a_training_without_a_middle(example, digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distributed.py", "--epochs", "1"])
    with pytest.raises(SystemExit):
        example("distributed").main()
    assert "--epochs must be at least 2, so that there is a middle (got: 1)" in capsys.readouterr().err
