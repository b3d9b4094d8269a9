"""Lightning drives LARS and LAMB: after the same batches, they have the numbers of a plain loop."""

import pytest
import torch
from plain_loop import (
    ACCUMULATE,
    BATCHES,
    CLIP,
    EPOCHS,
    STEPS,
    TRUST_COEF,
    assert_trained_as_by_a_plain_loop,
    batches,
    distance,
    each_wrapper,
    launched,
    network,
    optimizer_of,
    plain_loop,
    regression_loss,
    scheduler_of,
    trained,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim.swa_utils import SWALR, AveragedModel

from torchlars import LARS

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

# Deprecations of torch's that Lightning has yet to follow, and its advice.
pytestmark = [
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
]
SILENT = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Module(lightning.LightningModule):
    def __init__(self, wrapper=LARS, automatic=True, trust_coef=TRUST_COEF, schedules=True):
        super().__init__()
        self.automatic_optimization = automatic
        self.wrapper, self.trust_coef, self.schedules = wrapper, trust_coef, schedules
        self.network = network()
        self.closures = 0
        self.lr = 0.5  # for learning rate finders

    def training_step(self, batch, index):
        loss = regression_loss(self.network, batch)
        if self.automatic_optimization:
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
        optimizer = optimizer_of(self.network, self.wrapper, self.trust_coef)
        if not self.schedules:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler_of(optimizer), "interval": "step"}}

    def optimizer_step(self, epoch, batch, optimizer, closure=None):
        self.closures += closure is not None
        super().optimizer_step(epoch, batch, optimizer, closure)


class ShardedModule(Module):
    def configure_model(self):
        if not isinstance(self.network[0].weight, DTensor):
            for part in (self.network[0], self.network):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def test_the_plain_loop_tells_the_wrapper_from_its_base():
    model, (plain_model, _) = network(), trained()
    plain_loop(model, regression_loss, batches(), wrapper=lambda base, **options: base)
    assert distance(model, plain_model) > 1e-2
    assert distance(network(), plain_model) > 1e-2


def trainer_of(automatic=True, epochs=EPOCHS, **more):
    itself = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP} if automatic else {}
    return lightning.Trainer(accelerator="cpu", max_epochs=epochs, **{**SILENT, **itself, **more})


@each_wrapper
def test_automatic_optimization(wrapper):
    """The trainer passes a closure that zeroes, evaluates, goes backward and clips."""
    module, trainer = Module(wrapper), trainer_of()
    trainer.fit(module, batches())
    assert module.closures == STEPS
    assert_trained_as_by_a_plain_loop(module.network, trainer.optimizers[0], *trained(wrapper))


@each_wrapper
def test_manual_optimization(wrapper):
    module, trainer = Module(wrapper, automatic=False), trainer_of(automatic=False)
    trainer.fit(module, batches())
    assert_trained_as_by_a_plain_loop(module.network, trainer.optimizers[0], *trained(wrapper))


@each_wrapper
def test_checkpoint_and_resume(wrapper, tmp_path):
    trainer = trainer_of(epochs=1)
    trainer.fit(Module(wrapper), batches())
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    module, trainer = Module(wrapper, trust_coef=0.5), trainer_of()
    trainer.fit(module, batches(), ckpt_path=tmp_path / "epoch.ckpt", weights_only=True)
    assert trainer.global_step == STEPS
    assert_trained_as_by_a_plain_loop(module.network, trainer.optimizers[0], *trained(wrapper))


@each_wrapper
def test_fabric(wrapper, tmp_path):
    fabric = lightning.Fabric(accelerator="cpu")

    def set_up(trust_coef=TRUST_COEF):
        model = network()
        optimizer = optimizer_of(model, wrapper, trust_coef)
        fabric_model, fabric_optimizer = fabric.setup(model, optimizer)
        return {"model": fabric_model, "optimizer": fabric_optimizer, "scheduler": scheduler_of(optimizer)}

    def train_an_epoch(model, optimizer, scheduler):
        for i, batch in enumerate(batches(), start=1):
            fabric.backward(regression_loss(model, batch) / ACCUMULATE)
            if i % ACCUMULATE == 0:
                fabric.clip_gradients(model, optimizer, max_norm=CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    first = set_up()
    train_an_epoch(**first)
    fabric.save(tmp_path / "epoch.ckpt", first)
    second = set_up(trust_coef=0.5)
    fabric.load(tmp_path / "epoch.ckpt", second)
    train_an_epoch(**second)
    assert_trained_as_by_a_plain_loop(second["model"].module, second["optimizer"], *trained(wrapper))


@pytest.mark.filterwarnings("ignore:The `lr_find` method.*")
def test_the_lr_finder(tmp_path):
    """It writes one lr into all groups, those left to the base included, and puts everything back at the end."""
    trials, low, high = 8, 1e-3, 0.9
    module, trainer = Module(schedules=False), trainer_of(default_root_dir=tmp_path, accumulate_grad_batches=1)
    tuner = lightning.pytorch.tuner.Tuner(trainer)
    found = tuner.lr_find(module, batches(), min_lr=low, max_lr=high, num_training=trials, early_stop_threshold=None)
    assert distance(module.network, network()) == 0

    model = network()
    optimizer = optimizer_of(model)
    smooth, losses, lrs, lr = 0.0, [], [], low
    for i in range(trials):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = regression_loss(model, list(batches())[i % BATCHES])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        smooth = 0.98 * smooth + 0.02 * loss.item()
        losses.append(smooth / (1 - 0.98 ** (i + 2)))
        lrs.append(lr)
        lr = low * (high / low) ** ((i + 2) / trials)
    assert found.results["lr"] == pytest.approx(lrs, rel=1e-6)
    assert found.results["loss"] == pytest.approx(losses, rel=1e-6)


def test_stochastic_weight_averaging():
    epochs, swa_lrs = 4, [0.5, 0.02]
    averaging = lightning.pytorch.callbacks.StochasticWeightAveraging(
        swa_lrs, swa_epoch_start=2, annealing_epochs=2, annealing_strategy="cos"
    )
    module, trainer = (
        Module(schedules=False),
        trainer_of(epochs=epochs, callbacks=[averaging], accumulate_grad_batches=1),
    )
    trainer.fit(module, batches())

    model = network()
    optimizer = optimizer_of(model)
    average = None
    for epoch in range(epochs):
        if epoch == 1:
            average, schedule = AveragedModel(model), SWALR(optimizer, swa_lrs, anneal_epochs=2)
        if epoch >= 1:
            average.update_parameters(model)
        for batch in batches():
            regression_loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if epoch >= 1:
            schedule.step()
    assert distance(module.network, average.module) <= 1e-12


def train_sharded(rank_trains_with):
    with launched():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        strategy = lightning.pytorch.strategies.ModelParallelStrategy(world_size, 1)  # data, tensor
        environment = lightning.fabric.plugins.environments.TorchElasticEnvironment()
        trainer = trainer_of(
            devices=world_size, strategy=strategy, plugins=[environment], use_distributed_sampler=False
        )
        module = ShardedModule(rank_trains_with)
        trainer.fit(module, batches(rank, world_size))
        for param in module.network.parameters():
            assert isinstance(param, DTensor)
            assert param.placements == (Shard(0),)
            assert param.device_mesh.size() == world_size
        assert_trained_as_by_a_plain_loop(module.network, trainer.optimizers[0], *trained(rank_trains_with))


@each_wrapper
def test_fsdp2(wrapper, workers):
    workers(2, train_sharded, wrapper)
