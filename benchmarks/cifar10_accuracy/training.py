"""One training run: all that two runs can differ in goes in, a line of the results comes out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from math import isfinite, sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import torchlars
from benchmarks.cifar10_accuracy.data import Resident
from benchmarks.cifar10_accuracy.model import ResNet9
from torchlars import LAMB, LARS, param_groups

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EVALUATIONS = 12
EVAL_SIZE = 2500  # divides both test sets: the network sees one shape more than in training


class Run(NamedTuple):
    """What a run differs in from others of its recipe. ``tested_on`` is "held-out" (in sweeps) or "test"."""

    tested_on: str
    optimizer: str
    batch: int
    lr: float
    seed: int


class Recipe(NamedTuple):
    """What all runs of a results file have in common."""

    data: str
    epochs: float = 60
    warmup: float = 10
    width: int = 32
    cutout: int = 0
    microbatch: int = 2048
    base_batch: int = 256
    bias_lr: float = 0.2
    dtype: str = "bfloat16"

    def steps(self, images: int, batch: int) -> int:
        """Return the number of steps in which the images are seen ``epochs`` times, to the nearest step."""
        return max(1, round(self.epochs * images / batch))

    def warmup_steps(self, images: int, batch: int) -> int:
        """Return how many of them are warm-up."""
        return max(1, round(self.warmup * images / batch))

    def scaled_bias_lr(self, batch: int) -> float:
        """Return the lr of biases and norms under LARS, which grows with the square root of the batch."""
        return self.bias_lr * sqrt(batch / self.base_batch)


def make_optimizer(name: str, model: nn.Module, lr: float, bias_lr: float) -> Optimizer:
    """Return an optimizer by its name. Biases and norms go without decay everywhere, and without trust ratios.

    Args:
        name: "SGD", "LARS" or "LAMB".
        model: what it is for.
        lr: of the weights.
        bias_lr: of biases and norms under LARS. SGD and LAMB want no other lr for these.
    """
    fused = next(model.parameters()).device.type == "cuda"
    if name == "SGD":
        return SGD(param_groups(model, lr=lr, weight_decay=5e-4, bias_lr=lr), momentum=0.9, fused=fused)
    if name == "LARS":
        groups = param_groups(model, lr=lr, weight_decay=5e-4, bias_lr=bias_lr)
        return LARS(torchlars.optim.SGD(groups, momentum=0.9))
    return LAMB(AdamW(param_groups(model, lr=lr, weight_decay=0.01, bias_lr=lr), fused=fused))


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Return what lr is multiplied by at a step: up to 1 in a line, then down to 0 as a parabola, poly(2)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, 1 - (step - warmup_steps) / max(1, steps - warmup_steps)) ** 2


def train(
    run: Run, recipe: Recipe, data: Resident, device: torch.device, compile: bool = False, graph: bool = False
) -> dict[str, Any]:
    """Train one network, and return its curve: epochs seen, mean training loss since, and accuracy in percent.

    The seed decides over initial weights, the order of images, crops and flips.

    Args:
        run: what to train.
        recipe: what all runs have in common.
        data: on ``device``.
        device: where to train.
        compile: whether to pass the network through torch.compile.
        graph: whether to capture forward and backward in a CUDA graph, where parts are of one size.
    """
    start = time.perf_counter()
    torch.manual_seed(run.seed)
    model: nn.Module = ResNet9(recipe.width)  # on the host: the same weights for every device
    model = model.to(device, memory_format=torch.channels_last)
    forward: Any = torch.compile(model, dynamic=False) if compile else model
    generator = torch.Generator(device).manual_seed(run.seed)
    steps, warmup_steps = (count(len(data), run.batch) for count in (recipe.steps, recipe.warmup_steps))
    optimizer = make_optimizer(run.optimizer, model, run.lr, recipe.scaled_bias_lr(run.batch))
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, steps, warmup_steps))
    cast = torch.autocast(device.type, DTYPES[recipe.dtype], enabled=recipe.dtype != "float32")
    loss_sum = torch.zeros((), device=device)

    def learn(images: Tensor, labels: Tensor) -> None:
        with cast:
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum") / run.batch
        loss.backward()
        loss_sum.add_(loss.detach())

    size = min(run.batch, recipe.microbatch)
    graph = graph and run.batch % size == 0
    if graph:
        anything = torch.zeros(size, dtype=torch.int64, device=device)
        learn = captured(learn, model, *data.train_batch(anything, torch.Generator(device)))
        loss_sum.zero_()

    curve: list[tuple[float, float, float]] = []
    evaluated = 0
    parts_of_steps = data.training_steps(run.batch, steps, generator, recipe.microbatch, recipe.cutout)
    for step, parts in enumerate(parts_of_steps, start=1):
        # Each part has batch statistics of its own, as on the devices of a data-parallel training.
        for images, labels in parts:
            learn(images, labels)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=not graph)
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:  # the host waits here, and only here
            with cast:
                accuracy = evaluate(forward, data)
            curve.append((step * run.batch / len(data), loss_sum.item() / (step - evaluated), accuracy))
            evaluated = step
            loss_sum.zero_()
            if not isfinite(curve[-1][1]):
                break  # nothing comes back from there
    return {
        "steps": steps,
        "warmup_steps": warmup_steps,
        "diverged": not isfinite(curve[-1][1]),
        # JSON knows no NaN.
        "curve": [[round(seen, 4), loss if isfinite(loss) else None, accuracy] for seen, loss, accuracy in curve],
        "seconds": round(time.perf_counter() - start, 2),
    }


def captured(
    learn: Callable[[Tensor, Tensor], None], model: nn.Module, images: Tensor, labels: Tensor
) -> Callable[[Tensor, Tensor], None]:
    """Return ``learn`` as a CUDA graph, for images of one shape.

    It adds to gradients where they are, so they must be set to 0 and not to None. The model is left as it was.
    """
    state = copy.deepcopy(model.state_dict())
    images, labels = images.clone(), labels.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for before a capture
        for _ in range(3):
            learn(images, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # the stream that autograd has come to know
        learn(images, labels)
    model.load_state_dict(state)
    model.zero_grad(set_to_none=False)

    def replay(new_images: Tensor, new_labels: Tensor) -> None:
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()

    return replay


@torch.no_grad()
def evaluate(model: Any, data: Resident) -> float:
    """Return the top-1 accuracy on the test set in percent, by running statistics, without augmentation."""
    model.eval()
    correct = [(model(images).argmax(1) == labels).sum() for images, labels in data.test_batches(EVAL_SIZE)]
    model.train()
    return 100 * torch.stack(correct).sum().item() / len(data.test_labels)
