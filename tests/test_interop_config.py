"""Configurations and command lines construct LARS: Lightning's CLI, jsonargparse and Hydra."""

from collections.abc import Callable, Iterable

import pytest
import torch
from plain_loop import batches, distance, network, regression_loss
from torch.optim import SGD

from torchlars import LARS


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

        def fit(module, *arguments, add=None):
            class CLI(cli.LightningCLI):
                def add_arguments_to_parser(self, parser):
                    if add is not None:
                        parser.add_optimizer_args(add)

            monkeypatch.setattr("sys.argv", ["train.py", "fit", *arguments])
            return CLI(
                module, trainer_defaults=defaults, seed_everything_default=1, save_config_callback=None
            ).model.network

        return fit

    def test_a_class_that_the_program_adds(self, fit, module):
        options = [f"--optimizer.{option}" for option in [*self.options, "trust_coef=0.02"]]
        assert_trained(fit(module, *options, add=LARS.over(SGD)))

    def test_a_class_of_a_module(self, fit, module):
        options = [f"--optimizer.{option}" for option in self.options]
        assert_trained(fit(module, f"--optimizer={__name__}.LARSSGD", *options))

    def test_a_default(self, fit, module):
        """jsonargparse reads the source of a lambda: of ``lambda params: LARS(SGD(params))`` it keeps ``LARS(params)``."""
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


def test_hydra():
    utils = pytest.importorskip("hydra.utils", reason="Hydra is not installed")
    from omegaconf import OmegaConf

    base = {"_target_": "hydra.utils.get_class", "path": "torch.optim.SGD"}
    config = OmegaConf.create({"_target_": "torchlars.LARS.over", "base": base, "trust_coef": 0.02})
    assert utils.instantiate(config) is LARS.over(SGD, trust_coef=0.02)
