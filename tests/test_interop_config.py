"""Configurations and command lines construct LARS: Lightning's CLI, jsonargparse and Hydra."""

import re
from collections.abc import Callable, Iterable

import pytest
import torch
from peer_calls import README
from plain_loop import batches, distance, network, regression_loss
from torch.optim import SGD

from torchlars import LAMB, LARS
from torchlars.optim import AdamW

SECTION = re.search(r"^### Configuration files and command lines\n(.*?)^##", README, re.M | re.S)[1]


class LARSSGD(LARS.over(SGD, trust_coef=0.02)):
    """What a user's module holds, for a configuration to name."""


def test_a_configuration_names_a_class_over_a_base():
    jsonargparse = pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    param = torch.nn.Parameter(torch.ones(2))
    path = f"{__name__}.LARSSGD"
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])  # as OptimizerCallable is
    settings = {"class_path": path, "init_args": {"lr": 0.3, "momentum": 0.9}}
    config = parser.parse_object({"optimizer": settings})
    config = parser.parse_string(parser.dump(config))  # what was written down can be read again
    assert config.optimizer.class_path == path
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # as older ones call it
    optimizer = instantiate(config).optimizer([param])
    assert type(optimizer) is LARSSGD
    assert type(optimizer.optim) is torch.optim.SGD
    assert (optimizer.trust_coef, *(optimizer.defaults[name] for name in ("lr", "momentum"))) == (0.02, 0.3, 0.9)


# Lightning's command line

LR, OPTIONS = 2.0, {"momentum": 0.9, "weight_decay": 0.05}


def assert_trained(trained, **more):
    """Compare with a plain loop."""
    model = network()
    optimizer = LARS.over(SGD, trust_coef=0.02)(model.parameters(), lr=LR, **OPTIONS, **more)
    for batch in batches():
        regression_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(model, network()) > 1e-2
    assert distance(model, trained) <= 1e-12


class TestLightningCLI:
    pytestmark = pytest.mark.filterwarnings("ignore")  # jsonargparse deprecates what Lightning calls
    options = ("lr=2", "momentum=0.9", "weight_decay=0.05")

    @pytest.fixture
    def module(self):
        lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.network = network()

            def training_step(self, batch, index):
                return regression_loss(self.network, batch)

            def train_dataloader(self):
                return batches()

        return Module

    @pytest.fixture
    def fit(self, monkeypatch):
        """Run ``fit`` of the command line; return the trained network."""
        pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
        cli = pytest.importorskip("lightning.pytorch.cli", reason="Lightning is not installed")
        silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        defaults = {"accelerator": "cpu", "max_epochs": 1, **dict.fromkeys(silent, False)}

        def fit(module, *arguments, cls=cli.LightningCLI):
            monkeypatch.setattr("sys.argv", ["train.py", "fit", *arguments])
            return cls(
                module, trainer_defaults=defaults, seed_everything_default=1, save_config_callback=None
            ).model.network

        return fit

    def test_a_class_that_the_program_adds(self, fit, module):
        names = {}
        exec(re.search(r"^```python\n(.*?)^```", SECTION, re.M | re.S)[1], names)
        options = [f"--optimizer.{option}" for option in [*self.options, "trust_coef=0.02"]]
        assert_trained(fit(module, *options, cls=names["CLI"]))

    @pytest.mark.parametrize("option", ["norm=raww", "trust_coef=abc", "clip=1"])
    def test_an_option_is_checked_by_the_parser(self, fit, module, option, capsys):
        names = {}
        exec(re.search(r"^```python\n(.*?)^```", SECTION, re.M | re.S)[1], names)
        with pytest.raises(SystemExit):
            fit(module, f"--optimizer.{option}", cls=names["CLI"])
        assert option.split("=")[0] in capsys.readouterr().err

    def test_a_class_of_a_module(self, fit, module):
        options = [f"--optimizer.{option}" for option in self.options]
        assert_trained(fit(module, f"--optimizer={__name__}.LARSSGD", *options))

    def test_a_default(self, fit, module):
        from lightning.pytorch.cli import OptimizerCallable

        class WithDefault(module):
            def __init__(
                self,
                optimizer: OptimizerCallable = lambda params: LARS.over(SGD, trust_coef=0.02)(params, lr=LR, **OPTIONS),
            ):
                super().__init__()
                self.optimizer = optimizer

            def configure_optimizers(self):
                return self.optimizer(self.parameters())

        assert_trained(fit(WithDefault))
        options = [f"--model.optimizer.{option}" for option in [*self.options, "eps=0.001"]]
        assert_trained(fit(WithDefault, f"--model.optimizer={__name__}.LARSSGD", *options), eps=1e-3)

    def test_a_default_that_constructs_the_base(self, fit, module):
        """jsonargparse reads the source of a lambda: of ``lambda params: LARS(SGD(params))`` it keeps ``LARS(params)``."""
        from lightning.pytorch.cli import OptimizerCallable

        class WithDefault(module):
            def __init__(self, optimizer: OptimizerCallable = lambda params: LARS(SGD(params, lr=LR))):
                super().__init__()
                self.configure_optimizers = lambda: optimizer(self.parameters())

        with pytest.raises(TypeError, match=r"where only params are passed, as by a framework, call LARS.over\("):
            fit(WithDefault)


def test_hydra():
    utils = pytest.importorskip("hydra.utils", reason="Hydra is not installed")
    from omegaconf import OmegaConf

    config = OmegaConf.create(re.search(r"^```yaml\n(.*?)^```", SECTION, re.M | re.S)[1])
    model = network()
    optimizer_class = utils.instantiate(config.optimizer_class)
    assert optimizer_class is LARS.over(SGD, trust_coef=0.02)
    optimizer = optimizer_class(model.parameters(), **config.optimizer)
    assert optimizer.trust_coef == 0.02
    (group,) = optimizer.param_groups
    assert group["params"] == list(model.parameters())
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (16, 0.9, 5e-4)


def test_lists_of_hydra_are_sequences():
    pytest.importorskip("hydra.utils", reason="Hydra is not installed")
    from omegaconf import OmegaConf

    optimizer = LAMB.over(AdamW)(network().parameters(), **OmegaConf.create({"betas": [0.8, 0.95]}))
    assert tuple(optimizer.param_groups[0]["betas"]) == (0.8, 0.95)
