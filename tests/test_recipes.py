"""The recipes of examples/README.md run as they are printed, on a small network and a CPU, and train it.

Only what a test cannot have is exchanged: the GPU, the number of epochs, the process group. The numbers that trainers get
are compared in test_interop_*.py; those of the table of peers in test_peers.py; the CUDA graph needs test_cuda_steps.py.
"""

from __future__ import annotations

import csv
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

from torchlars import LARS, param_groups

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
TRAINER, TRAINER_CLASS = "Hugging Face Trainer", "Hugging Face Trainer, also with FSDP2"
LOGGERS, LIGHTNING_CALLBACK, TRAINER_CALLBACK = (
    f"Trust ratios in {where}"
    for where in ("TensorBoard and Weights & Biases", "Lightning", "the Hugging Face Trainer")
)
REGISTRY = "timm's registry"
ELSEWHERE = {"CUDA graphs", "Configuration files and command lines"}  # test_cuda_steps.py, test_interop_config.py
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


def labelled() -> list[dict[str, torch.Tensor]]:
    return [{"inputs": inputs, "labels": labels} for inputs, labels in data()]


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
    here = {SHARDED, TRAINER, TRAINER_CLASS, LOGGERS, LIGHTNING_CALLBACK, TRAINER_CALLBACK, REGISTRY}
    assert {*LOOPS, *here, *ELSEWHERE} == set(RECIPES)


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
@pytest.mark.parametrize("recipe", [TRAINER, TRAINER_CLASS])
def test_recipes_for_transformers_train(recipe, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    model = NetworkWithLoss()
    before = loss_of(model)
    exchanged = {"steps = 1000": "steps = 40"} if recipe == TRAINER else {"max_steps=1000": "max_steps=40"}
    names = names_for(model, dataset=labelled())
    exec(code_of(recipe, exchanged), names)
    assert loss_of(model) < before / 3
    weights, others = names["trainer"].optimizer.param_groups
    assert weights["lr"] == pytest.approx(160 * others["lr"])
    assert weights["lr"] < 0.1
    assert others["trust_coef"] is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weight_decay", [5e-4, 0])
def test_the_recipe_for_timms_registry(weight_decay, monkeypatch):
    pretend_torchvision(monkeypatch)
    optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    exec(RECIPES[REGISTRY], {})
    models = Network(), Network()
    options = {"lr": 16, "momentum": 0.9, "weight_decay": weight_decay, "trust_coef": 0.02, "eps": 0.5}
    theirs = optim.create_optimizer_v2(models[0], opt="torchlars", **options)
    groups = param_groups(models[1], lr=16, weight_decay=5e-4, bias_lr=0.16) if weight_decay else models[1].parameters()
    ours = LARS(torch.optim.SGD(groups, lr=16, momentum=0.9), trust_coef=0.02, eps=0.5)
    for model, optimizer in zip(models, (theirs, ours), strict=True):
        for inputs, targets in DataLoader(data(), batch_size=64):
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    for param, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(param, expected)


# What is logged, beside the formula.


def ratios_by_formula(model: nn.Module) -> dict[str, float]:
    ratios = {}
    for name, param in model.named_parameters():
        w, g = param.detach().double().norm(), param.grad.double().norm()
        ratios[f"trust_ratio/{name}"] = (0.001 * w / (g + 5e-4 * w + 1e-8)).item()
    return ratios


def logged_in(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_logged(logged: dict[str, list[float]], expected: list[dict[str, float]]) -> None:
    """Compare what was logged with the ratios of the steps at which it was."""
    assert len(expected) > 1
    for name in expected[0]:
        ratios = [ratios[name] for ratios in expected]
        assert max(ratios) > 1.01 * min(ratios)
        assert logged[name] == pytest.approx(ratios, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_for_tensorboard_and_wandb(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    model = Network()
    optimizer = LARS(torch.optim.SGD(model.parameters(), lr=16, momentum=0.9, weight_decay=5e-4))
    expected: list[dict[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: expected.append(ratios_by_formula(model)))
    names = names_for(model, optimizer=optimizer)
    history: list[dict[str, float]] = []
    log = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda run, ratios, step: history.append(ratios) or log(run, ratios, step=step)
    )
    exec(code_of(LOGGERS, {"step % 50": "step % 4"}), names)
    names["run"].finish()
    names["writer"].close()
    assert_logged(logged_in(tmp_path / "runs"), expected[3::4])
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert_logged({name: [ratios[name] for ratios in history] for name in history[0]}, expected[3::4])


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_for_trust_ratios_in_lightning(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    expected: list[dict[str, float]] = []
    monkeypatch.setattr(
        lightning.LightningModule,
        "on_before_optimizer_step",
        lambda module, optimizer: expected.append(ratios_by_formula(module)),
    )
    names = names_for(Network())
    exec(code_of("Lightning", LOOPS["Lightning"]), names)
    expected.clear()
    loggers = names["loggers"] = [lightning.pytorch.loggers.CSVLogger(tmp_path / folder) for folder in ("a", "b")]
    more = "log_every_n_steps=5, accumulate_grad_batches=3, enable_checkpointing=False, logger=loggers"
    exec(code_of(LIGHTNING_CALLBACK, {"max_epochs=60": f"max_epochs=2, {more}"}), names)
    assert len(expected) == 2 * 6  # steps, in epochs of 16 batches
    for logger in loggers:
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["trust_ratio/model.head.weight"]]
        assert [int(row["step"]) for row in rows] == [5, 10]
        assert_logged({name: [float(row[name]) for row in rows] for name in expected[0]}, expected[4::5])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("callback", ["TensorBoardCallback", "WandbCallback"])
def test_the_recipe_for_trust_ratios_in_the_trainer(callback, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tensorboard")
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    history: list[dict[str, float]] = []
    monkeypatch.setattr(wandb.Run, "log", lambda _, row, **__: history.append(row))
    expected: dict[int, dict[str, float]] = {}  # by step: every callback has this method
    monkeypatch.setattr(
        transformers.TrainerCallback,
        "on_pre_optimizer_step",
        lambda _, __, state, *___, model, **____: expected.update({state.global_step: ratios_by_formula(model)}),
    )
    model = NetworkWithLoss()
    optimizer = LARS(torch.optim.SGD(model.parameters(), lr=1, momentum=0.9, weight_decay=5e-4))
    names = names_for(model, optimizer=optimizer, dataset=labelled())
    code = code_of(TRAINER_CALLBACK, {"logging_steps=50": "logging_steps=16, num_train_epochs=1"})
    assert code.count("TensorBoardCallback") == 2
    if callback == "WandbCallback":
        wandb.init(mode="offline")  # which it takes
    exec(code.replace("TensorBoardCallback", callback), names)
    if callback == "TensorBoardCallback":
        logged = logged_in(tmp_path / "output")
    else:
        wandb.finish()
        rows = [row for row in history if "train/trust_ratio/head.weight" in row]
        logged = {name: [row[name] for row in rows] for name in rows[0]}
    logged = {name.removeprefix("train/"): values for name, values in logged.items()}
    assert_logged(logged, list(expected.values())[15::16])


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
