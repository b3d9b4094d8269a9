"""skorch, Ignite, fastai, torchrl, PEFT, Ray Train and lightly drive LARS: after the same batches, they have the numbers of a plain loop.

Ray Train pickles the loop for its workers, and needs the folder of these tests in PYTHONPATH.
"""

import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from plain_loop import BATCH_SIZE, batches, distance, examples, network, regression_loss
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import SGD

from torchlars import LARS, param_groups

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of other people's

EPOCHS, LR = 2, 2.0
OPTIONS = {"momentum": 0.9, "weight_decay": 0.05, "trust_coef": 0.02}


def train(model, optimizer, loader):
    for _ in range(EPOCHS):
        for batch in loader:
            regression_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()


def trained(loader=None, **options):
    model = network()
    train(model, LARS.over(SGD)(model.parameters(), lr=LR, **{**OPTIONS, **options}), loader or batches())
    return model


def assert_trained(model):
    expected = trained()
    assert distance(network(), expected) > 1e-2
    assert distance(model, expected) <= 1e-12


class TestSkorch:
    @pytest.fixture
    def net(self):
        skorch = pytest.importorskip("skorch")
        options = {f"optimizer__{name}": value for name, value in OPTIONS.items()}
        return skorch.NeuralNetRegressor(
            network,
            optimizer=LARS.over(SGD),
            lr=LR,
            max_epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            train_split=None,
            verbose=0,
            **options,
        )

    def test_fit(self, net):
        inputs, targets = (tensor.numpy() for tensor in examples())
        assert_trained(net.fit(inputs, targets).module_)

    def test_grid_search_in_two_processes(self, net):
        from sklearn.model_selection import GridSearchCV

        inputs, targets = examples()
        half = len(inputs) // 2
        trust_coefs = [0.001, 0.02]
        search = GridSearchCV(
            net, {"optimizer__trust_coef": trust_coefs}, n_jobs=2, cv=2, scoring="neg_mean_squared_error"
        )
        search.fit(inputs.numpy(), targets.numpy())

        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(inputs[half:], targets[half:]), batch_size=BATCH_SIZE
        )
        for trust_coef, score in zip(trust_coefs, search.cv_results_["split0_test_score"], strict=True):
            loss = mse_loss(trained(loader, trust_coef=trust_coef)(inputs[:half]), targets[:half])
            assert score == pytest.approx(-loss.item(), rel=1e-12)


def test_ignite():
    engine = pytest.importorskip("ignite.engine")
    model = network()
    optimizer = LARS(SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=0.05), trust_coef=0.02)
    engine.create_supervised_trainer(model, optimizer, mse_loss).run(batches(), max_epochs=EPOCHS)
    assert_trained(model)


def test_fastai():
    learner = pytest.importorskip("fastai.learner", exc_type=ImportError)
    from fastai.data.core import DataLoaders
    from fastai.optimizer import OptimWrapper

    learn = learner.Learner(
        DataLoaders(batches(), batches()),
        network(),
        loss_func=mse_loss,
        opt_func=partial(OptimWrapper, opt=LARS.over(SGD), **OPTIONS),
        lr=LR,
    )
    learn.remove_cb(learner.Recorder)  # which knows float32 only
    learn.fit(EPOCHS)
    assert_trained(learn.model)


@pytest.mark.filterwarnings("ignore")
class TestTorchRL:
    """``group_optimizers`` makes another object of the same class, from the groups alone."""

    @pytest.fixture
    def group_optimizers(self):
        return pytest.importorskip("torchrl.objectives.utils").group_optimizers

    def test_bases_are_grouped_then_wrapped(self, group_optimizers):
        model = network()
        bases = [SGD(part.parameters(), lr=LR, momentum=0.9, weight_decay=0.05) for part in (model[0], model[2])]
        train(model, LARS(group_optimizers(*bases), trust_coef=0.02), batches())
        assert_trained(model)

    def test_classes_keep_their_options(self, group_optimizers):
        model = network()
        cls = LARS.over(SGD, trust_coef=0.02)
        parts = [cls(part.parameters(), lr=LR, momentum=0.9, weight_decay=0.05) for part in (model[0], model[2])]
        train(model, group_optimizers(*parts), batches())
        assert_trained(model)

    def test_options_of_calls_are_lost(self, group_optimizers):
        """As examples/README.md says."""
        parts = [LARS.over(SGD)(network().parameters(), lr=LR, trust_coef=0.02) for _ in range(2)]
        assert group_optimizers(*parts).trust_coef == 0.001

    def test_wrappers_are_refused(self, group_optimizers):
        optimizer = LARS(SGD(network().parameters(), lr=LR))
        with pytest.raises(TypeError, match=r"\(got: list\); construct the base first"):
            group_optimizers(optimizer)


def test_peft():
    """LoRA's B is a matrix of zeros: left to SGD, it does not take a step of the full lr."""
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(3)
        return peft.get_peft_model(network(), peft.LoraConfig(r=2, target_modules=["0", "2"]))

    model, plain = adapted(), adapted()
    groups = param_groups(model, lr=LR, weight_decay=0.05, bias_lr=0.1, exclude=["*.lora_B.*"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, LARS(SGD(groups, momentum=0.9), trust_coef=0.02), batches())

    momenta = {}
    for _ in range(EPOCHS):
        for batch in batches():
            regression_loss(plain, batch).backward()
            for name, param in plain.named_parameters():
                if param.grad is None:
                    assert "lora" not in name
                    continue
                is_adapted = "lora_A" in name
                g, w, lr, decay = param.grad, param.detach(), *((LR, 0.05) if is_adapted else (0.1, 0.0))
                ratio = 1.0
                if is_adapted and g.any():  # at the first step B is 0, and so is the gradient of A
                    ratio = 0.02 * w.norm() / (g.norm() + decay * w.norm() + 1e-8)
                update = ratio * (g + decay * w)
                momenta[name] = 0.9 * momenta[name] + update if name in momenta else update
                param.data -= lr * momenta[name]
                param.grad = None
    assert len(momenta) == 4
    assert distance(model, plain) <= 1e-12
    assert distance(plain, adapted()) > 1e-2


def test_ray_train(tmp_path):
    ray = pytest.importorskip("ray")
    from ray import train as ray_train
    from ray.train.torch import TorchTrainer, prepare_model

    def loop(config):
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        model = prepare_model(network())
        train(model, LARS.over(SGD)(model.parameters(), lr=LR, **OPTIONS), batches(rank, world_size))
        if rank == 0:
            torch.save(model.module.state_dict(), config["file"])

    file = str(tmp_path / "trained.pt")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        TorchTrainer(
            loop,
            train_loop_config={"file": file},
            scaling_config=ray_train.ScalingConfig(num_workers=2),
            run_config=ray_train.RunConfig(storage_path=str(tmp_path / "runs")),
        ).fit()
    finally:
        ray.shutdown()
    model = network()
    model.load_state_dict(torch.load(file))
    assert_trained(model)


class TestLightly:
    """lightly's modules and losses, trained by its own LARS and by ours, which takes its place."""

    @pytest.fixture
    def lightly(self):
        return pytest.importorskip("lightly", exc_type=ImportError)

    def train(self, model, optimizer, loss_of):
        random = torch.Generator().manual_seed(5)
        for inputs, _ in batches():
            views = [inputs + 0.1 * torch.randn(inputs.shape, generator=random, dtype=inputs.dtype) for _ in range(2)]
            loss_of(model, *views).backward()
            optimizer.step()
            optimizer.zero_grad()

    def compare(self, model, loss_of):
        from lightly.utils.lars import LARS as TheirLARS

        sgd = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05}
        first, ours, theirs = deepcopy(model), model, deepcopy(model)
        params = [param for param in ours.parameters() if param.requires_grad]
        self.train(ours, LARS.over(SGD, always_adapt=False)(params, **sgd), loss_of)
        params = [param for param in theirs.parameters() if param.requires_grad]
        self.train(theirs, TheirLARS(params, **sgd), loss_of)
        assert distance(first, theirs) > 1e-3
        assert distance(ours, theirs) <= 1e-12

    def test_simclr(self, lightly):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        criterion = NTXentLoss()
        model = nn.Sequential(network(), SimCLRProjectionHead(3, 8, 4).double())
        self.compare(model, lambda model, first, second: criterion(model(first), model(second)))

    def test_byol(self, lightly):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum

        online = nn.Sequential(network(), BYOLProjectionHead(3, 8, 4).double())
        model = nn.ModuleDict(
            {"online": online, "target": deepcopy(online), "predict": BYOLPredictionHead(4, 8, 4).double()}
        )
        deactivate_requires_grad(model["target"])
        criterion = NegativeCosineSimilarity()

        def loss_of(model, first, second):
            update_momentum(model["online"], model["target"], 0.9)
            halves = [
                criterion(model["predict"](model["online"](x)), model["target"](y).detach())
                for x, y in ((first, second), (second, first))
            ]
            return sum(halves) / 2

        self.compare(model, loss_of)
