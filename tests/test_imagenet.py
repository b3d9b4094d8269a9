"""examples/imagenet.py: the recipes, and trainings that are the same however they are cut, shared and interrupted.

All but the last test train on tensors and need no torchvision. Networks have no batch norm, except where its statistics
are the subject, and are trained in float64: only rounding may differ, and a ReLU or a max-pool would not amplify it.
"""

import csv
import importlib
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from figures import quotes
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import torchlars.optim
from torchlars import LARS

Figure = pytest.importorskip("matplotlib.figure").Figure
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EPOCHS, STEPS = 7, 3  # of 31 images in batches of 12, the last of 7
OPTIONS = ["--data", "fake", "--batch", "12", "--lr", "8", "--epochs", "7", "--weight-decay", "0.01", "--workers", "0"]
OPTIONS += ["--label-smoothing", "0.1", "--autocast", "off"]


def load_example():
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module("imagenet")


@pytest.fixture
def imagenet():
    return load_example()


def small_network(*norm):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), *norm, nn.Tanh(), nn.Flatten(), nn.Linear(54, 6)).double()


def small_set(size, seed):
    images = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.arange(size) % 6
    images[range(size), 0, 1, labels] += 9  # something to learn
    return TensorDataset(images, labels)


class KilledError(Exception):
    pass


def train(argv, killed_after=None, norm=(), train_size=31, dtype=torch.float64):
    """Train on this rank; returns weights, momentum, buffers and the rows of the table."""
    imagenet = load_example()
    model, sets = small_network(*norm).to(dtype), (small_set(train_size, 2), small_set(11, 3))
    for dataset in sets:
        dataset.tensors = (dataset.tensors[0].to(dtype), dataset.tensors[1])
    training = imagenet.Training(imagenet.parse(argv), model, *sets)

    def train_unless_killed():
        result = imagenet.Training.train(training)
        if len(training.rows) == killed_after:
            raise KilledError  # in the middle of the next epoch
        return result

    training.train = train_unless_killed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError) if killed_after else nullcontext():
        patch.setattr(imagenet, "plot", lambda rows, args: Figure(figsize=(1, 1)))  # which would take most of the time
        training.run()
    weights = [param.detach() for param in model.parameters()]
    momentum = [training.optimizer.state[param]["momentum_buffer"] for param in model.parameters()]
    return weights, momentum, list(model.buffers()), training.rows


def plain_loop():
    """The same training, one whole batch at a time, with all formulas written out."""
    model, train_set, test_set = small_network(), small_set(31, 2), small_set(11, 3)
    images, labels = train_set.tensors
    optimizer = LARS(torchlars.optim.SGD(model.parameters(), lr=8, momentum=0.9, weight_decay=0.01), trust_coef=0.001)
    rows = []
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        order, losses = torch.randperm(31), []
        for i, batch in enumerate((order[:12], order[12:24], order[24:])):
            step = epoch * STEPS + i  # 15 steps of warm-up, then 6 of poly(2)
            lr = 8 * (step + 1) / 15 if step < 15 else 8 * ((21 - step) / 6) ** 2
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss = cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(batch))
        with torch.no_grad():
            best = model(test_set.tensors[0]).argsort(dim=1, descending=True)
        hits = best == test_set.tensors[1][:, None]
        rows.append(
            [epoch + 1, lr, sum(losses) / 31, 100 * hits[:, 0].sum().item() / 11, 100 * hits[:, :5].sum().item() / 11]
        )
    weights = [param.detach() for param in model.parameters()]
    return weights, [optimizer.state[param]["momentum_buffer"] for param in model.parameters()], [], rows


def assert_same(results, expected, rtol=1e-11):
    for weights, momentum, _, rows in results:
        for tensors, right in ((weights, expected[0]), (momentum, expected[1])):
            for tensor, other in zip(tensors, right, strict=True):
                torch.testing.assert_close(tensor, other, rtol=0, atol=rtol * other.abs().max().item())
        assert [value for row in rows for value in row] == pytest.approx(
            [value for row in expected[3] for value in row], rel=rtol
        )


def test_docstring_and_readme_have_the_recipes(imagenet):
    rows = re.findall(r"^ +(\d+)  (\w+) +([\d.]+)  (none|\d+ epochs) +([\d.]+) %$", imagenet.__doc__, re.MULTILINE)
    told = {
        int(batch): (optimizer, float(lr), 0 if warmup == "none" else int(warmup.split()[0]), float(top1))
        for batch, optimizer, lr, warmup, top1 in rows
    }
    assert told == imagenet.RECIPES
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for batch, (_, lr, warmup_epochs, top1) in imagenet.RECIPES.items():
        assert quotes(readme, f"{batch:,}", lr, warmup_epochs, top1)


def test_lr_rises_for_the_warmup_and_then_falls_as_poly_2(imagenet):
    lrs = [imagenet.lr_at(step, 9, 4, 10.0) for step in range(9)]
    assert lrs == pytest.approx([2.5, 5, 7.5, 10, 10, 6.4, 3.6, 1.6, 0.4])
    assert [imagenet.lr_at(step, 2, 0, 0.2) for step in range(2)] == pytest.approx([0.2, 0.05])
    assert imagenet.lr_at(2, 3, 5, 10.0) == pytest.approx(6), "a short trial may end within warm-up"


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [33, 36, 37, 41])
def test_micro_batches_share_and_cut_every_batch_evenly(imagenet, ranks, size):
    order = torch.randperm(size)
    steps = list(zip(*(imagenet.micro_batches(order, 12, 3, rank, ranks) for rank in range(ranks)), strict=True))
    batches = [order[i : i + 12].tolist() for i in range(0, size, 12)]
    if len(batches[-1]) < ranks:
        batches.pop()
    assert [[image for parts in step for part in parts for image in part] for step in steps] == batches
    for step in steps:
        shares = [sum(map(len, parts)) for parts in step]
        assert max(shares) - min(shares) <= 1
        for share, parts in zip(shares, step, strict=True):
            assert len(parts) == math.ceil(share / 3)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("batch", "lr", "optimizer", "warmup_epochs"),
    [(256, 0.2, "SGD", 0), (8192, 12.8, "LARS", 5), (16384, 25.0, "LARS", 5), (32768, 29.0, "LARS", 5)],
)
def test_batch_chooses_the_recipe(imagenet, process_group, tmp_path, batch, lr, optimizer, warmup_epochs):
    args = imagenet.parse(["--data", "fake", "--batch", str(batch), "--out", str(tmp_path)])
    assert (args.epochs, args.warmup_epochs) == (90, warmup_epochs)
    training = imagenet.Training(args, small_network(), small_set(31, 2), small_set(11, 3))
    base = training.optimizer.optim if optimizer == "LARS" else training.optimizer
    assert type(training.optimizer) is (LARS if optimizer == "LARS" else torchlars.optim.SGD)
    assert type(base) is torchlars.optim.SGD
    (group,) = base.param_groups
    assert [group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")] == [lr, 0.9, 1e-4, False]
    assert len(group["params"]) == 4, "biases, too"


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 5), (2, 4), (3, 3)])
def test_training_is_that_of_whole_batches(workers, tmp_path, ranks, micro_batch):
    argv = [*OPTIONS, "--micro-batch", str(micro_batch), "--out", str(tmp_path)]
    assert_same(workers(ranks, train, argv), plain_loop())


def count_reductions(argv):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    imagenet, calls = load_example(), []
    training = imagenet.Training(imagenet.parse(argv), small_network(), small_set(31, 2), small_set(11, 3))
    training.ddp.register_comm_hook(None, lambda state, bucket: calls.append(bucket) or allreduce_hook(None, bucket))
    training.train()
    return len(calls)


def test_gradients_are_communicated_once_a_step(workers, tmp_path):
    assert workers(2, count_reductions, [*OPTIONS, "--micro-batch", "2", "--out", str(tmp_path)]) == [STEPS, STEPS]


def test_training_is_resumed_after_the_last_whole_epoch(workers, tmp_path):
    argv, expected = [*OPTIONS, "--micro-batch", "4", "--out", str(tmp_path)], plain_loop()
    workers(2, train, argv, 2)
    workers(3, train, [*argv, "--resume"], 5)
    assert_same(workers(2, train, [*argv, "--resume"]), expected)
    header, *rows = csv.reader((tmp_path / "imagenet-12.csv").read_text(encoding="utf-8").splitlines())
    assert header == ["epoch", "lr", "training loss", "top-1 (%)", "top-5 (%)"]
    assert [[float(cell) for cell in row] for row in rows] == [pytest.approx(row, rel=1e-11) for row in expected[3]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"imagenet-12.{kind}" for kind in ("csv", "png", "pt")]


def test_batch_norm_differs_by_running_statistics_only_and_these_are_averaged(workers, tmp_path):
    norm, argv = (nn.BatchNorm2d(6),), [*OPTIONS, "--micro-batch", "3"]
    (alone,) = workers(1, train, [*argv, "--out", str(tmp_path / "1")], None, norm, 24)
    shared = workers(2, train, [*argv, "--out", str(tmp_path / "2")], None, norm, 24)
    for weights, momentum, _, _ in shared:
        for tensor, other in zip([*weights, *momentum], [*alone[0], *alone[1]], strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=1e-11 * other.abs().max().item())
    (mean, variance, _), (also_mean, also_variance, _), (other_mean, _, _) = shared[0][2], shared[1][2], alone[2]
    assert torch.equal(mean, also_mean)
    assert torch.equal(variance, also_variance)
    assert not torch.equal(mean, other_mean)
    assert shared[0][3] == shared[1][3]


def test_plot_shows_both_accuracies_and_that_of_the_authors(imagenet, tmp_path):
    args = imagenet.parse(["--data", "fake", "--batch", "16384", "--out", str(tmp_path)])
    (axes,) = imagenet.plot([[1, 5.0, 6.5, 10.0, 25.0], [2, 10.0, 5.5, 20.0, 40.0]], args).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {
        "top-1 (%)": ([1, 2], [10.0, 20.0]),
        "top-5 (%)": ([1, 2], [25.0, 40.0]),
        "top-1 of the table's authors": ([0, 1], [73.36, 73.36]),
    }
    assert axes.get_title() == "resnet50, LARS, batch 16,384, lr 25"


def count_hits(ranks):
    """Logits are the images: of 7 images, 3 have their label on top, and 5 among the five best of 8."""
    logits = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]).expand(7, 8).reshape(7, 1, 2, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 8, bias=False))
    nn.init.eye_(model[1].weight)
    dataset = TensorDataset(logits, torch.tensor([0, 4, 7, 0, 5, 0, 1]))
    imagenet = load_example()
    return imagenet.Training(imagenet.parse([*OPTIONS, "--micro-batch", "2"]), model, dataset, dataset).test()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_accuracies_count_every_image_once(workers, ranks):
    expected = pytest.approx([300 / 7, 500 / 7], rel=1e-14)
    assert workers(ranks, count_hits, ranks) == [expected] * ranks


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_trains_nearly_as_float32(workers, tmp_path, dtype):
    argv = [*OPTIONS, "--micro-batch", "5", "--out"]
    (exact,) = workers(1, train, [*argv, str(tmp_path / "off")], None, (), 31, torch.float32)
    cast = workers(2, train, [*argv, str(tmp_path / dtype), "--autocast", dtype], None, (), 31, torch.float32)
    losses, right = [row[2] for row in cast[0][3]], [row[2] for row in exact[3]]
    assert losses == pytest.approx(right, rel=0.02)
    assert losses != pytest.approx(right, rel=1e-6)
    assert right[-1] < 0.95 * right[0]
    state = torch.load(tmp_path / dtype / "imagenet-12.pt", weights_only=True)
    assert ("scale" in state["scaler"]) == (dtype == "fp16")


def test_resuming_refuses_other_settings(imagenet, process_group, tmp_path):
    argv = [*OPTIONS, "--out", str(tmp_path)]
    train([*argv, "--epochs", "1"])
    with pytest.raises(
        ValueError, match=r"--resume needs the settings \{.*'epochs': 1,.*\} \(got: \{.*'epochs': 2,.*\}\)"
    ):
        train([*argv, "--epochs", "2", "--resume"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "/nowhere"], "--data must be a folder that has train/ and val/, or fake (got: /nowhere)"),
        (["--batch", "512"], "--batch must be one of 256, 8192, 16384, 32768, or --lr be given (got: 512)"),
        (["--batch", "3", "--lr", "1"], "--batch must be at least 4 (got: 3)"),
        (["--micro-batch", "0"], "--micro-batch must be at least 1 (got: 0)"),
        (["--epochs", "0"], "--epochs must be at least 1 (got: 0)"),
        (["--lr", "nan"], "--lr must be at least 1e-12 (got: nan)"),
        (["--resume"], "--resume goes on from a checkpoint (got: {out}/imagenet-8192.pt, which does not exist)"),
        (
            ["--batch", "256"],
            "--resume goes on from a checkpoint (got: {out}/imagenet-256.pt, which exists: add --resume, or remove it)",
        ),
    ],
)
def test_bad_arguments(imagenet, monkeypatch, tmp_path, capsys, argv, message):
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "imagenet-256.pt").touch()
    with pytest.raises(SystemExit):
        imagenet.parse(["--data", "fake", "--out", str(tmp_path), *argv])
    assert message.format(out=tmp_path) in capsys.readouterr().err


WITHOUT_BATCH_NORM = f"""\
import functools, os, runpy, shutil, sys
import torch
from torchvision.models.resnet import BasicBlock, ResNet

norm = functools.partial(torch.nn.GroupNorm, 8)
sys.modules["torchvision.models"].get_model = lambda name, **kwargs: ResNet(
    BasicBlock, dict(resnet10=[1, 1, 1, 1])[name], norm_layer=norm, **kwargs
)
torch.set_default_dtype(torch.float64)
replace, count = os.replace, 0

def replace_and_keep(new, old):
    global count
    replace(new, old)
    count += 1
    shutil.copy(old, f"{{old}}.{{count}}")

os.replace = replace_and_keep
sys.path.insert(0, {str(EXAMPLES.parent)!r})
runpy.run_path({str(EXAMPLES / "imagenet.py")!r}, run_name="__main__")
"""


@pytest.fixture
def torchvision():
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        pytest.skip(f"no torchvision: {error}")


def test_a_folder_of_images_is_augmented_for_training_only(imagenet, torchvision, tmp_path):
    to_image = torchvision.transforms.ToPILImage()
    gray = torch.full((3, 40, 60), 0.6)  # 153 of 255
    for part, images in (("train", torch.rand(3, 3, 40, 60)), ("val", gray[None])):
        for label in ("cat", "dog", "owl"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i, image in enumerate(images):
                to_image(image).save(folder / f"{i}.png")
    argv = ["--data", str(tmp_path), "--image-size", "28", "--model", "resnet18", "--out", str(tmp_path / "out")]
    model, train_set, test_set = imagenet.load(imagenet.parse(argv))
    assert (len(train_set), len(test_set), model.fc.out_features) == (9, 3, 3)
    assert not torch.equal(train_set[0][0], train_set[0][0])
    image, label = test_set[2]
    assert (image.shape, label) == ((3, 28, 28), 2)
    expected = torch.tensor([(0.6 - 0.485) / 0.229, (0.6 - 0.456) / 0.224, (0.6 - 0.406) / 0.225])
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 28, 28))


def test_fake_images_in_one_process_then_resumed_by_two(torchvision, tmp_path):
    """A ResNet with group norm, in float64, since batch norm would see other micro-batches."""
    script = tmp_path / "without_batch_norm.py"
    script.write_text(WITHOUT_BATCH_NORM, encoding="utf-8")

    def run(*launcher_and_options):
        options = ["--data", "fake", "--batch", "6", "--lr", "8", "--model", "resnet10", "--image-size", "32"]
        options += ["--autocast", "off", "--micro-batch", "2", "--epochs", "6", "--out", str(tmp_path)]
        launcher, more = launcher_and_options
        done = subprocess.run(
            [sys.executable, *launcher, str(script), *options, *more],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        return torch.load(tmp_path / "imagenet-6.pt", weights_only=True), done.stdout

    alone, printed = run([], ["--workers", "0"])
    assert re.search(r"epoch 2, step 1 of 3: lr 2.1333, loss \d\.\d{4}, [\d,]+ images/s", printed)
    (tmp_path / "imagenet-6.pt.4").replace(tmp_path / "imagenet-6.pt")
    resumed, printed = run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], ["--resume", "--workers", "1"]
    )
    assert "epoch 4, step" not in printed
    assert len(alone["rows"]) == len(resumed["rows"]) == 6
    for row, other in zip(resumed["rows"], alone["rows"], strict=True):
        assert row == pytest.approx(other, rel=1e-10)
    moved = [name for name, tensor in alone["model"].items() if tensor.dtype == torch.float64]
    assert moved == list(alone["model"])
    for name in moved:
        right = alone["model"][name]
        torch.testing.assert_close(resumed["model"][name], right, rtol=0, atol=1e-10 * right.abs().max().item())
