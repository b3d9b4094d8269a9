"""Trainers of others drive LARS and LAMB: after the same batches, they have the numbers of a plain loop.

Whatever a trainer does around ``step`` (closures, clipping, accumulation, schedules, wrapping, checkpoints) is done by
hand in :func:`plain_loop`, in float64. The wrapper has two kinds of groups here, momentum, weight decay and an ε that counts,
and some steps clip while others do not, so that nothing can be left out or done twice unseen.
"""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from torchlars import LAMB, LARS

EPOCHS, BATCHES, BATCH_SIZE, ACCUMULATE, CLIP, TRUST_COEF = 2, 6, 4, 2, 0.9, 0.02
STEPS_PER_EPOCH = BATCHES // ACCUMULATE
STEPS = EPOCHS * STEPS_PER_EPOCH


@pytest.fixture(autouse=True, params=[LARS, LAMB])
def _wrapper(request, monkeypatch):
    """Every test runs with each of the two."""
    monkeypatch.setattr(optimizer_of, "wrapper", request.param, raising=False)


def optimizer_of(model, trust_coef=TRUST_COEF, wrap=None):
    """What a user would write; biases are left to the base."""
    weights = [param for param in model.parameters() if param.ndim > 1]
    biases = [param for param in model.parameters() if param.ndim == 1]
    groups = [
        {"params": weights, "weight_decay": 0.05},
        {"params": biases, "weight_decay": 0.001, "lr": 0.1, "trust_coef": None},
    ]
    wrap = optimizer_of.wrapper if wrap is None else wrap
    return wrap(SGD(groups, lr=2.0, momentum=0.9), trust_coef=trust_coef, eps=1e-3)


def only_the_base(optimizer, **options):
    return optimizer


def scheduler_of(optimizer):
    warmup = LinearLR(optimizer, start_factor=0.25, total_iters=2)
    return SequentialLR(optimizer, [warmup, PolynomialLR(optimizer, STEPS - 1, power=2)], milestones=[2])


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def regression_loss(model, batch):
    inputs, targets = batch
    return mse_loss(model(inputs), targets)


@pytest.fixture
def batches():
    """A loader of the same batches in the same order, each epoch."""
    random = torch.Generator().manual_seed(11)
    inputs = torch.randn(BATCHES * BATCH_SIZE, 5, generator=random, dtype=torch.float64)
    targets = torch.randn(BATCHES * BATCH_SIZE, 3, generator=random, dtype=torch.float64)
    return DataLoader(TensorDataset(inputs, targets), batch_size=BATCH_SIZE)


def plain_loop(model, loss_of, loader, clip=CLIP, wrap=None):
    """Train by hand, without closures; return the optimizer."""
    optimizer = optimizer_of(model, wrap=wrap)
    scheduler = scheduler_of(optimizer)
    clipped = set()
    for _ in range(EPOCHS):
        for i, batch in enumerate(loader, start=1):
            (loss_of(model, batch) / ACCUMULATE).backward()
            if i % ACCUMULATE == 0:
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
                clipped.add(bool(norm > clip))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert clipped == {True, False}, "a loop that clips always or never shows less"
    return optimizer


def distance(model, other):
    """Return the largest difference between two models."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((p.detach() - q.detach()).abs().max().item() for p, q in pairs)


def assert_trained_as_by_a_plain_loop(model, optimizer, plain_model, plain_optimizer):
    """Compare parameters, momenta, hyper-parameters and the wrapper's own values."""
    assert distance(model, plain_model) <= 1e-12
    actual, expected = optimizer.state_dict(), plain_optimizer.state_dict()
    key = optimizer_of.wrapper.state_key
    assert actual[key] == expected[key]
    assert len(expected["state"]) > 0
    for key, state in expected["state"].items():
        momentum = actual["state"][key]["momentum_buffer"]
        torch.testing.assert_close(momentum, state["momentum_buffer"], rtol=0, atol=1e-12)
    for group, expected_group in zip(actual["param_groups"], expected["param_groups"], strict=True):
        for key in ("lr", "momentum", "weight_decay"):
            assert group[key] == pytest.approx(expected_group[key], rel=1e-12)
        assert group.get("trust_coef", "absent") == expected_group.get("trust_coef", "absent")


@pytest.fixture
def trained(batches):
    """The plain loop's model and optimizer."""
    model = network()
    return model, plain_loop(model, regression_loss, batches)


def test_the_plain_loop_tells_the_wrapper_from_its_base(trained, batches):
    model = network()
    plain_loop(model, regression_loss, batches, wrap=only_the_base)
    assert distance(model, trained[0]) > 1e-2
    assert distance(network(), trained[0]) > 1e-2


# Lightning


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning", reason="Lightning is not installed")


# A deprecation of torch's that Lightning has yet to follow, and its advice for machines with a GPU or many cores.
lightnings_warnings = [
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


def lightning_module(lightning, automatic=True, trust_coef=TRUST_COEF):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.network = network()
            self.closures = 0

        def training_step(self, batch, index):
            loss = regression_loss(self.network, batch)
            if automatic:
                return loss
            self.manual_backward(loss / ACCUMULATE)
            if (index + 1) % ACCUMULATE == 0:
                optimizer = self.optimizers()
                self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
                optimizer.step()
                self.lr_schedulers().step()
                optimizer.zero_grad()
            return loss

        def configure_optimizers(self):
            optimizer = optimizer_of(self.network, trust_coef)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler_of(optimizer), "interval": "step"},
            }

        def optimizer_step(self, epoch, batch, optimizer, closure=None):
            self.closures += closure is not None
            super().optimizer_step(epoch, batch, optimizer, closure)

    return Module()


def lightning_trainer(lightning, automatic=True, epochs=EPOCHS):
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    itself = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP} if automatic else {}
    return lightning.Trainer(accelerator="cpu", max_epochs=epochs, **itself, **dict.fromkeys(silent, False))


class TestLightning:
    pytestmark = lightnings_warnings

    def test_automatic_optimization(self, lightning, batches, trained):
        """The trainer passes a closure that zeroes, evaluates, goes backward and clips."""
        module, trainer = lightning_module(lightning), lightning_trainer(lightning)
        trainer.fit(module, batches)
        assert module.closures == STEPS
        assert_trained_as_by_a_plain_loop(module.network, trainer.optimizers[0], *trained)

    def test_manual_optimization(self, lightning, batches, trained):
        module, trainer = lightning_module(lightning, automatic=False), lightning_trainer(lightning, automatic=False)
        trainer.fit(module, batches)
        assert_trained_as_by_a_plain_loop(module.network, trainer.optimizers[0], *trained)

    def test_checkpoint_and_resume(self, lightning, batches, trained, tmp_path):
        trainer = lightning_trainer(lightning, epochs=1)
        trainer.fit(lightning_module(lightning), batches)
        trainer.save_checkpoint(tmp_path / "epoch.ckpt")

        module, trainer = lightning_module(lightning, trust_coef=0.5), lightning_trainer(lightning)
        trainer.fit(module, batches, ckpt_path=tmp_path / "epoch.ckpt", weights_only=True)
        assert trainer.global_step == STEPS
        assert_trained_as_by_a_plain_loop(module.network, trainer.optimizers[0], *trained)

    def test_fabric(self, lightning, batches, trained):
        fabric = lightning.Fabric(accelerator="cpu")
        model = network()
        optimizer = optimizer_of(model)
        scheduler = scheduler_of(optimizer)
        fabric_model, fabric_optimizer = fabric.setup(model, optimizer)
        for _ in range(EPOCHS):
            for i, batch in enumerate(batches, start=1):
                fabric.backward(regression_loss(fabric_model, batch) / ACCUMULATE)
                if i % ACCUMULATE == 0:
                    fabric.clip_gradients(fabric_model, fabric_optimizer, max_norm=CLIP)
                    fabric_optimizer.step()
                    scheduler.step()
                    fabric_optimizer.zero_grad()
        assert_trained_as_by_a_plain_loop(model, optimizer, *trained)
        assert fabric_optimizer.state_dict().keys() == optimizer.state_dict().keys()


# accelerate


@pytest.fixture
def accelerate():
    """The package, whose settings are global and outlive an ``Accelerator``."""
    package = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield package
    forget()


class TestAccelerate:
    def prepare(self, accelerate, loader, trust_coef=TRUST_COEF):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
        model = network()
        optimizer = optimizer_of(model, trust_coef)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler_of(optimizer), loader)

    def epoch(self, accelerator, model, optimizer, scheduler, loader):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(regression_loss(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    def test_accumulate_and_clip(self, accelerate, batches, trained):
        prepared = self.prepare(accelerate, batches)
        for _ in range(EPOCHS):
            self.epoch(*prepared)
        _, model, optimizer, _, _ = prepared
        assert_trained_as_by_a_plain_loop(model, optimizer, *trained)

    def test_save_and_load_state(self, accelerate, batches, trained, tmp_path):
        prepared = self.prepare(accelerate, batches)
        self.epoch(*prepared)
        prepared[0].save_state(str(tmp_path))

        prepared = self.prepare(accelerate, batches, trust_coef=0.5)
        accelerator, model, optimizer, _, _ = prepared
        accelerator.load_state(str(tmp_path))
        self.epoch(*prepared)
        assert_trained_as_by_a_plain_loop(model, optimizer, *trained)

    def test_a_step_that_the_scaler_skips(self, accelerate, batches):
        """With float16 accelerate puts a ``step`` of its own on the optimizer, to see whether the scaler calls it."""
        from accelerate.optimizer import AcceleratedOptimizer

        accelerate.Accelerator(cpu=True)
        model, plain_model = network(), network()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = AcceleratedOptimizer(optimizer_of(model), scaler=scaler)
        plain_optimizer = optimizer_of(plain_model)
        for i, batch in enumerate(batches):
            scaler.scale(regression_loss(model, batch)).backward()
            if i == 1:
                model[0].weight.grad[0, 0] = torch.inf
            else:
                regression_loss(plain_model, batch).backward()
                plain_optimizer.step()
                plain_optimizer.zero_grad()
            optimizer.step()
            assert optimizer.step_was_skipped == (i == 1)
            optimizer.zero_grad()
        assert_trained_as_by_a_plain_loop(model, optimizer, plain_model, plain_optimizer)


# Hugging Face Trainer


@pytest.fixture
def transformers(accelerate):
    return pytest.importorskip("transformers", reason="transformers is not installed")


class TestHuggingFaceTrainer:
    clip = 0.2

    def classifier(self, transformers):
        """A tiny transformer of random weights."""
        torch.manual_seed(13)
        config = transformers.BertConfig(
            vocab_size=16,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertForSequenceClassification(config).double()

    @pytest.fixture
    def sentences(self):
        random = torch.Generator().manual_seed(17)
        words = torch.randint(16, (BATCHES * BATCH_SIZE, 8), generator=random)
        labels = torch.randint(2, (BATCHES * BATCH_SIZE,), generator=random)
        return [{"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)]

    @pytest.fixture
    def trained(self, transformers, sentences):
        model = self.classifier(transformers)
        loader = DataLoader(sentences, BATCH_SIZE)
        return model, plain_loop(model, lambda model, batch: model(**batch).loss, loader, self.clip)

    def prepare(self, transformers, sentences, folder, trust_coef=TRUST_COEF):
        class Trainer(transformers.Trainer):
            def get_train_dataloader(self):  # in order, where the Trainer's own shuffles
                return self.accelerator.prepare(DataLoader(sentences, BATCH_SIZE))

        def loss_of(outputs, labels, num_items_in_batch):  # over all the batches of a step, as the Trainer asks
            return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

        model = self.classifier(transformers)
        optimizer = optimizer_of(model, trust_coef)
        arguments = transformers.TrainingArguments(
            str(folder),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=ACCUMULATE,
            max_grad_norm=self.clip,
            save_strategy="epoch",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        optimizers = (optimizer, scheduler_of(optimizer))
        trainer = Trainer(model, arguments, train_dataset=sentences, compute_loss_func=loss_of, optimizers=optimizers)
        return model, optimizer, trainer

    def test_train_and_resume(self, transformers, sentences, trained, tmp_path):
        model, optimizer, trainer = self.prepare(transformers, sentences, tmp_path)
        trainer.train()
        assert distance(model, self.classifier(transformers)) > 1e-3
        assert trainer.state.global_step == STEPS
        assert_trained_as_by_a_plain_loop(model, optimizer, *trained)

        model, optimizer, trainer = self.prepare(transformers, sentences, tmp_path / "resumed", trust_coef=0.5)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS_PER_EPOCH}"))
        assert trainer.state.global_step == STEPS
        assert_trained_as_by_a_plain_loop(model, optimizer, *trained)


# timm, whose training script is told here; the package brings torchvision along and is not installed for this


def test_what_timms_training_loop_reads():
    """timm asks by ``hasattr`` whether gradients need a graph of their own, and whether there are slow weights."""
    optimizer = optimizer_of(network())
    assert not (hasattr(optimizer, "is_second_order") and optimizer.is_second_order)
    assert not hasattr(optimizer, "sync_lookahead")


def test_groups_scaler_and_schedules_like_timms(batches, trained):
    """timm's schedules know ``param_groups`` only: they write ``lr``, scaled by a key that timm has put there."""
    model = network()
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clock = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler_of(clock)

    def write_rates():
        for group, lr_scale in zip(optimizer.param_groups, (2.0, 0.1), strict=True):
            group.setdefault("lr_scale", lr_scale)
            group["lr"] = schedule.get_last_lr()[0] * group["lr_scale"]

    write_rates()
    for _ in range(EPOCHS):
        for i, batch in enumerate(batches, start=1):
            scaler.scale(regression_loss(model, batch) / ACCUMULATE).backward(create_graph=False)
            if i % ACCUMULATE == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                clock.step()
                schedule.step()
                write_rates()
    assert_trained_as_by_a_plain_loop(model, optimizer, *trained)
    assert [group["lr_scale"] for group in optimizer.state_dict()["param_groups"]] == [2.0, 0.1]


# Configuration files, as Lightning's command line reads them


class LARSSGD(LARS.over(torch.optim.SGD, trust_coef=0.02)):
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
