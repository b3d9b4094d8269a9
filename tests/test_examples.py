"""The examples run, for a few epochs, and show what they say. What they need comes with `pip install .[examples]`."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from torchlars import LAMB, LARC, LARS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


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
    readme = " ".join((EXAMPLES.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"between {min(lars):.4f} and {max(lars):.4f} of its weights" in readme


def test_digits_has_three_arms(digits, run):
    head, _, *rows = run(digits, "--seeds", "1", "--epochs", "1")
    assert head == ["arm", "batch", "lr", "steps", "mean accuracy", "spread"]
    assert [row[0] for row in rows] == [name for name in digits.ARMS for _ in digits.BATCH_SIZES]
    assert [row[1] for row in rows] == ["32", "512", "1437"] * 3
    assert [row[3] for row in rows] == ["45", "3", "1"] * 3


def test_digits_gains_arms_on_request(digits, run, monkeypatch):
    monkeypatch.setattr(digits, "ARMS", {"SGD": digits.ARMS["SGD, linear lr scaling"]})
    rows = run(digits, "--seeds", "1", "--epochs", "2", "--arms", "larc", "lamb")[2:]
    usual, larc, lamb = rows[:3], rows[3:6], rows[6:]
    assert [row[0] for row in rows] == [*["SGD"] * 3, *["LARC, linear scaling"] * 3, *["LAMB(AdamW), √ scaling"] * 3]
    assert [row[2] for row in larc] == ["0.025", "0.4", "1.123"]
    assert [row[2] for row in lamb] == ["0.01", "0.04", "0.067"]
    for arm in (usual, larc, lamb):
        assert float(arm[0][4].strip(" %")) > 20  # at batch 32 it has learned something in two epochs


def test_digits_refuses_arms_that_it_does_not_have(digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--arms", "adam"])
    with pytest.raises(SystemExit):
        digits.main()
    assert "argument --arms: invalid choice: 'adam'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "wrapper", "base"),
    [
        ("SGD", torch.optim.SGD, None),
        ("LARS", LARS, torch.optim.SGD),
        ("LARC", LARC, torch.optim.SGD),
        ("LAMB", LAMB, torch.optim.AdamW),
    ],
)
def test_the_arms_of_digits_are_what_they_are_called(digits, name, wrapper, base):
    optimizer = digits.make_optimizer(digits.Setting(name, 32, 0.5), torch.nn.Linear(2, 2))
    assert type(optimizer) is wrapper
    assert base is None or type(optimizer.optim) is base
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["weight_decay"] > 0


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
