"""The recipes of examples/README.md run as they are printed, on a small network and a CPU, and train it.

Only what a test cannot have is exchanged: the GPU, the number of epochs, the process group. The numbers that trainers get
are compared in test_interop_*.py; those of the table of peers in test_peers.py; the CUDA graph needs test_cuda_steps.py.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from torchlars import LARS

README = (Path(__file__).resolve().parents[1] / "examples" / "README.md").read_text("utf-8")
RECIPES = dict(re.findall(r"^### ([^\n]+)\n(?:(?!^##).)*?^```python\n(.*?)^```", README, re.M | re.S))
SCHEDULE = "Schedule: warm-up, then poly(2)"
SHARDED = "Sharded: FSDP2"
EPOCHS = 3

LOOPS = {  # and what is exchanged
    SCHEDULE: {"epochs = 60": f"epochs = {EPOCHS}", "6 * len(loader)": "len(loader)"},
    "Mixed precision and clipping": {'device = "cuda"': 'device = "cpu"'},
    "Lightning": {"max_epochs=60": f"max_epochs={2 * EPOCHS}, logger=False, enable_checkpointing=False"},
    "accelerate": {"epochs = 60": f"epochs = {EPOCHS}"},
    "timm": {
        'device="cuda"': 'device="cpu"',
        "num_epochs=60": f"num_epochs={EPOCHS}",
        "warmup_epochs=6": "warmup_epochs=1",
    },
}
TRAINER = "Hugging Face Trainer"
NEED = {"Lightning": "lightning", "accelerate": "accelerate", "timm": "timm"}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = torch.relu(block(inputs))
        return self.head(inputs)


class NetworkWithLoss(Network):
    """As transformers has them."""

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(inputs)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def data() -> TensorDataset:
    random = torch.Generator().manual_seed(4)
    labels = torch.randint(4, (512,), generator=random)
    inputs = 3 * torch.eye(6)[labels] + torch.randn(512, 6, generator=random)
    return TensorDataset(inputs, labels)


def loss_of(model: nn.Module) -> float:
    inputs, labels = data().tensors
    with torch.no_grad():
        return cross_entropy(Network.forward(model, inputs), labels).item()


def code_of(recipe: str, exchanged: dict[str, str]) -> str:
    code = RECIPES[recipe]
    for old, new in exchanged.items():
        assert code.count(old) == 1, f"the recipe {recipe!r} does not say {old!r}"
        code = code.replace(old, new)
    return code


def names_for(model: nn.Module, **more: Any) -> dict[str, Any]:
    """Return what recipes expect to be there, the scheduler of the first one included."""
    names: dict[str, Any] = {"model": model, "loader": DataLoader(data(), batch_size=32), "loss_fn": cross_entropy}
    exec(RECIPES[SCHEDULE].split("epochs = ")[0], names)
    return {**names, **more}


def test_every_recipe_has_a_test():
    assert {*LOOPS, SHARDED, TRAINER, "CUDA graphs"} == set(RECIPES)


def pretend_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm imports torchvision, of which the recipe needs nothing, and which has to match torch's very build."""
    with suppress(ImportError, RuntimeError):  # the latter if it is of another build
        importlib.import_module("torchvision")
        return
    for name in ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms"):
        monkeypatch.setitem(sys.modules, f"torchvision{name}", MagicMock())
    monkeypatch.setitem(sys.modules, "torchvision.transforms.functional", MagicMock())


@pytest.mark.filterwarnings("ignore")  # of other people's
@pytest.mark.parametrize("recipe", LOOPS)
def test_recipes_train(recipe, tmp_path, monkeypatch):
    if recipe == "timm":
        pretend_torchvision(monkeypatch)
    if recipe in NEED:
        pytest.importorskip(NEED[recipe], exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    model = Network()
    before = loss_of(model)
    optimizer = LARS(torch.optim.SGD(model.parameters(), lr=16, momentum=0.9, weight_decay=5e-4))
    names = names_for(model, optimizer=optimizer)
    exec(code_of(recipe, LOOPS[recipe]), names)
    assert loss_of(model) < before / 3
    if "scheduler" in names:
        last_lr = names["optimizer"].param_groups[0]["lr"]
        assert 0 <= last_lr < 0.01


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_for_transformers_trains(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    model = NetworkWithLoss()
    before = loss_of(model)
    dataset = [{"inputs": inputs, "labels": labels} for inputs, labels in data()]
    exec(code_of(TRAINER, {"steps = 1000": "steps = 40"}), names_for(model, dataset=dataset))
    assert loss_of(model) < before / 3


def train_sharded(folder: str) -> tuple[float, float, bool]:
    model = Network()
    before = loss_of(model)
    exchanged = {
        "torch.distributed.init_process_group()\n": "",
        "60 * len": "1 * len",
        "6 * len(loader))\n\n": "2)\n\n",
    }
    names = names_for(model, loader=DataLoader(data(), batch_size=8))
    here = os.getcwd()
    os.chdir(folder)  # for the checkpoint
    try:
        exec(code_of(SHARDED, exchanged), names)
    finally:
        os.chdir(here)
    is_sharded = isinstance(model.head.weight, torch.distributed.tensor.DTensor)  # forward() gathers it
    inputs, labels = data().tensors
    with torch.no_grad():
        after = cross_entropy(model(inputs), labels).item()
    return before, after, is_sharded


def test_the_recipe_for_sharded_models_trains(workers, tmp_path):
    for before, after, is_sharded in workers(2, train_sharded, str(tmp_path)):
        assert is_sharded
        assert after < before / 3
