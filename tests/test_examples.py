"""The examples run, for a few epochs, and show what they say. What they need comes with `pip install .[examples]`."""

import importlib
from pathlib import Path

import pytest

from torchlars import LAMB, LARS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, threads):
    """Import an example, which is a script and no module of a package."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads(1)
    return importlib.import_module


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
