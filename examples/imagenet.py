"""ResNet-50 on ImageNet with batches of up to 32,768 images, by the recipes that LARS is known for.

  torchrun --nproc-per-node 8 examples/imagenet.py --data /data/imagenet --batch 32768
  python3 examples/imagenet.py --data fake --batch 256 --epochs 2

--batch chooses a row of the table in the README of kakaobrain/torchlars 0.1.2. All train for 90 epochs with poly(2)
decay. The last column is what the table's authors got; this project has not run the 90 epochs.

   batch  optimizer    lr  warm-up   best top-1
     256  SGD         0.2  none         73.79 %
    8192  LARS       12.8  5 epochs     73.78 %
   16384  LARS       25.0  5 epochs     73.36 %
   32768  LARS       29.0  5 epochs     72.26 %

As in that README, LARS gets all parameters alike: biases and batch norms are adapted and decayed, too. What the table
does not say is taken from the solvers that an author of the LARS paper published (borisgin/nvcaffe, models/resnet50):
momentum 0.9, weight decay 1e-4, no label smoothing. Augmentation is torchvision's usual RandomResizedCrop and flip.

Processes accumulate gradients over micro-batches, so that a batch fits any number of GPUs. The sum is the gradient of
the mean loss of the batch, but batch norm takes its statistics over each micro-batch. Needs torchlars, matplotlib, and
the torchvision that belongs to the installed torch.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import torchlars.optim
from torchlars import LARS

RECIPES = {  # batch: optimizer, lr, epochs of warm-up, best top-1 in percent
    256: ("SGD", 0.2, 0, 73.79),
    8192: ("LARS", 12.8, 5, 73.78),
    16384: ("LARS", 25.0, 5, 73.36),
    32768: ("LARS", 29.0, 5, 72.26),
}
AUTOCAST = {"off": {"enabled": False}, "bf16": {"dtype": torch.bfloat16}, "fp16": {"dtype": torch.float16}}
SETTINGS = ("model", "batch", "lr", "epochs", "weight_decay", "label_smoothing", "seed")  # stay the same on resuming
COLUMNS = ("epoch", "lr", "training loss", "top-1 (%)", "top-5 (%)")


def lr_at(step: int, steps: int, warmup_steps: int, lr: float) -> float:
    """The lr of a step, counted from 0: rises linearly to `lr` at the last step of warm-up, then falls as poly(2)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * (1 - (step - warmup_steps) / (steps - warmup_steps)) ** 2


def micro_batches(order: Tensor, batch: int, micro_batch: int, rank: int, ranks: int) -> list[list[list[int]]]:
    """The micro-batches of one process, as lists of indices, for each step of an epoch.

    Processes take equal shares of a batch, and cut them into the fewest equal parts of at most `micro_batch` images.
    The last batch is what remains, and is left out if it has fewer images than there are processes.
    """
    shares = [images.tensor_split(ranks)[rank] for images in order.split(batch) if len(images) >= ranks]
    return [[part.tolist() for part in share.tensor_split(-(-len(share) // micro_batch))] for share in shares]


def start() -> torch.device:
    """Joins the other processes, if torchrun started this one. Returns the device to compute on."""
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        dist.init_process_group("gloo", **alone)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    dist.init_process_group("nccl", device_id=device, **alone)
    return device


def load(args: argparse.Namespace) -> tuple[nn.Module, Dataset, Dataset]:
    """A new model, and images to train and to test with. Fake ones fill two and a half batches, and nothing is cut."""
    from torchvision import datasets, models, transforms  # here, because all else works without it

    size, classes = args.image_size, 1000
    scale = transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if args.data == "fake":
        count, options = 5 * args.batch // 2, ((3, size, size), classes, transforms.Compose(scale))
        train_set = datasets.FakeData(count, *options)
        test_set = datasets.FakeData(args.batch + 1, *options, random_offset=count)
    else:
        augment = transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()
        crop = transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)
        train_set = datasets.ImageFolder(Path(args.data, "train"), transforms.Compose(augment + scale))
        test_set = datasets.ImageFolder(Path(args.data, "val"), transforms.Compose(crop + scale))
        classes = len(train_set.classes)
    torch.manual_seed(args.seed)  # the same weights on all processes
    return models.get_model(args.model, num_classes=classes), train_set, test_set


class Training:
    """A training, in one process or in several that share every batch (DDP)."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, train_set: Dataset, test_set: Dataset) -> None:
        self.args, self.train_set, self.test_set = args, train_set, test_set
        self.rank, self.ranks, self.device = dist.get_rank(), dist.get_world_size(), next(model.parameters()).device
        self.model = model.to(memory_format=torch.channels_last)
        self.ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        sgd = torchlars.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
        self.optimizer = LARS(sgd, trust_coef=0.001) if args.optimizer == "LARS" else sgd
        self.loss = nn.CrossEntropyLoss(reduction="sum", label_smoothing=args.label_smoothing)
        self.autocast = {"device_type": self.device.type, **AUTOCAST[args.autocast]}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.autocast == "fp16")
        self.settings, self.rows = {name: getattr(args, name) for name in SETTINGS}, []
        if args.resume:  # on any number of processes
            state = torch.load(f"{args.stem}.pt", map_location=self.device, weights_only=True)
            if state["settings"] != self.settings:
                raise ValueError(f"--resume needs the settings {state['settings']} (got: {self.settings})")
            for name in ("model", "optimizer", "scaler"):
                getattr(self, name).load_state_dict(state[name])
            self.rows = state["rows"]

    def load(self, dataset: Dataset, parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches on the device."""
        options = {"num_workers": self.args.workers, "pin_memory": self.device.type == "cuda"}
        for images, labels in DataLoader(dataset, batch_sampler=parts, **options):
            images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            yield images, labels.to(self.device, non_blocking=True)

    def train(self) -> tuple[float, float]:
        """Trains for an epoch. Returns the lr of its last step, and the mean loss of its images."""
        args, epoch, began = self.args, len(self.rows), time.perf_counter()
        torch.manual_seed(args.seed * args.epochs + epoch)
        order = torch.randperm(len(self.train_set))  # the same on all processes
        torch.manual_seed((args.seed * args.epochs + epoch) * self.ranks + self.rank)  # random crops differ
        steps = micro_batches(order, args.batch, args.micro_batch, self.rank, self.ranks)
        batches = self.load(self.train_set, [part for parts in steps for part in parts])
        total, seen, count = torch.zeros((), dtype=torch.float64, device=self.device), 0, len(steps)
        for step, parts in enumerate(steps):
            lr = lr_at(epoch * count + step, args.epochs * count, args.warmup_epochs * count, args.lr)
            self.optimizer.param_groups[0]["lr"] = lr  # the only group
            size = min(args.batch, len(order) - step * args.batch)
            for left, (images, labels) in zip(reversed(range(len(parts))), batches, strict=False):
                with self.ddp.no_sync() if left else nullcontext():  # DDP averages over processes after the last
                    with torch.autocast(**self.autocast):
                        loss = self.loss(self.ddp(images), labels)
                    self.scaler.scale(loss * (self.ranks / size)).backward()
                total, seen = total + loss.detach(), seen + len(labels)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if self.rank == 0 and step % 10 == 0:
                progress = f"epoch {epoch + 1}, step {step + 1} of {count}: lr {lr:.4f}, loss {total.item() / seen:.4f}"
                print(f"{progress}, {seen * self.ranks / (time.perf_counter() - began):,.0f} images/s", flush=True)
        dist.all_reduce(total)
        return lr, total.item() / min(len(order), count * args.batch)

    @torch.no_grad()
    def test(self) -> list[float]:
        """Top-1 and top-5 in percent. A process takes every ranks-th image, so that each image is counted once."""
        for buffer in self.model.buffers():
            if buffer.is_floating_point():  # running statistics of batch norm, which are not the same everywhere
                dist.all_reduce(buffer.div_(self.ranks))
        self.model.eval()
        correct = torch.zeros(2, dtype=torch.int64, device=self.device)
        share, size = range(self.rank, len(self.test_set), self.ranks), self.args.micro_batch
        for images, labels in self.load(self.test_set, [share[i : i + size] for i in range(0, len(share), size)]):
            with torch.autocast(**self.autocast):
                outputs = self.model(images)
            hits = outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]
            correct += torch.stack([hits[:, 0].sum(), hits.sum()])
        self.model.train()
        dist.all_reduce(correct)
        return (100 * correct.double() / len(self.test_set)).tolist()

    def run(self) -> None:
        """Trains for the epochs that are left. After each, process 0 saves the checkpoint, the table and the plot."""
        while len(self.rows) < self.args.epochs:
            self.rows.append([len(self.rows) + 1, *self.train(), *self.test()])
            if self.rank == 0:
                print(*(f"{name} {number:.6g}" for name, number in zip(COLUMNS, self.rows[-1], strict=True)), sep=", ")
                states = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
                torch.save({**states, "settings": self.settings, "rows": self.rows}, f"{self.args.stem}.tmp")
                os.replace(f"{self.args.stem}.tmp", f"{self.args.stem}.pt")  # never half a checkpoint
                with open(f"{self.args.stem}.csv", "w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([COLUMNS, *self.rows])
                plot(self.rows, self.args).savefig(f"{self.args.stem}.png", dpi=160)


def plot(rows: list[list[float]], args: argparse.Namespace) -> Figure:
    """Top-1 and top-5 after every epoch, and the best top-1 of the table's authors."""
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for column, color in ((3, "#D55E00"), (4, "#0072B2")):
        axes.plot([row[0] for row in rows], [row[column] for row in rows], color, marker=".", label=COLUMNS[column])
    if args.top1:
        axes.axhline(args.top1, color="#D55E00", ls=":", label="top-1 of the table's authors")
    title = f"{args.model}, {args.optimizer}, batch {args.batch:,}, lr {args.lr:g}"
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 100), title=title)
    axes.legend(frameon=False)
    return axes.figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains ResNet-50 with large batches, alone or under torchrun.")
    out, known, cores = Path(__file__).resolve().parent / "output", ", ".join(map(str, RECIPES)), os.cpu_count() or 1
    add = parser.add_argument
    add("--data", required=True, help="folder with train/ and val/, where each class has a folder of images; or fake")
    add("--batch", type=int, default=8192, help=f"images in a step, on all processes: {known} (default: 8192)")
    add("--micro-batch", type=int, default=128, help="most images on a device at once (default: 128)")
    add("--lr", type=float, help="instead of the recipe's; with it, LARS takes other batches, too")
    add("--epochs", type=int, default=90, help="of the whole training (default: 90)")
    add("--weight-decay", type=float, default=1e-4, help="of all parameters (default: 1e-4)")
    add("--label-smoothing", type=float, default=0.0, help="of the training loss (default: 0)")
    add("--autocast", choices=AUTOCAST, default="bf16", help="dtype of the forward pass (default: bf16)")
    add("--model", default="resnet50", help="a classifier of torchvision.models (default: resnet50)")
    add("--image-size", type=int, default=224, help="height and width in pixels (default: 224)")
    add("--workers", type=int, default=min(8, cores), help="loaders of images for each process (default: at most 8)")
    add("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    add("--out", type=Path, default=out, help=f"shared folder for imagenet-BATCH.pt, .csv and .png (default: {out})")
    add("--resume", action="store_true", help="go on from imagenet-BATCH.pt")
    args, ranks = parser.parse_args(argv), int(os.environ.get("WORLD_SIZE", 1))
    args.optimizer, lr, args.warmup_epochs, args.top1 = RECIPES.get(args.batch, ("LARS", None, 5, None))
    args.lr, args.stem = lr if args.lr is None else args.lr, args.out / f"imagenet-{args.batch}"
    checkpoint = Path(f"{args.stem}.pt")
    if args.lr is None:
        parser.error(f"--batch must be one of {known}, or --lr be given (got: {args.batch})")
    for name, least in {"batch": ranks, "micro_batch": 1, "lr": 1e-12, "epochs": 1, "image_size": 1}.items():
        if not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least} (got: {getattr(args, name)})")
    if args.data != "fake" and not all(Path(args.data, part).is_dir() for part in ("train", "val")):
        parser.error(f"--data must be a folder that has train/ and val/, or fake (got: {args.data})")
    if args.resume != checkpoint.exists():
        remedy = "does not exist" if args.resume else "exists: add --resume, or remove it"
        parser.error(f"--resume goes on from a checkpoint (got: {checkpoint}, which {remedy})")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args, device = parse(), start()
    model, *images = load(args)
    Training(args, model.to(device), *images).run()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
