"""Large batches with one learning rate: SGD and LARS on scikit-learn's handwritten digits.

A small CNN without batch norm learns 1,437 real 8x8 images in batches of 32, of 512 and of all 1,437 at once,
each time for the same number of epochs. A larger batch leaves fewer steps, so every step has to go further,
and plain SGD gets into trouble. Three arms show it: SGD whose lr grows in proportion to the batch, SGD whose
lr was tuned again for each batch size, and LARS with one lr for all, since trust ratios fit the step to each
layer. `--arms lamb larc 8bit` adds three: LAMB over AdamW, whose lr grows with the root of the batch; LARC, which is
LARS with no layer's lr above the given one, at the lrs of the first arm; and LARS with momentum in 8 bits, wherever a
layer's rows are long enough for it, at LARS's lr. Test accuracies come as a table and a plot.
Needs torchlars, scikit-learn, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
from math import ceil, sqrt
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR
from tqdm import tqdm

import torchlars.optim
from torchlars import LAMB, LARC, LARS

TRAIN_SIZE, TEST_SIZE = 1437, 360
BATCH_SIZES = (32, 512, TRAIN_SIZE)
LARS_LR = 16.0
LIMITS = """\
Limits: this network has no batch norm; with batch norm after every hidden layer the gap vanishes. Nor is LARS
the only way through: tuned gradient clipping or a tuned Adam also survive the full batch here. At batch 32,
lr 16 is near the edge of LARS itself: now and then a run of that setting ends at chance (10 %)."""


class Setting(NamedTuple):
    """All that two runs with the same seed can differ in."""

    optimizer: str
    batch_size: int
    lr: float

    def steps(self, epochs: int) -> int:
        """An epoch shows every image once, so the smaller batch left over at its end is a step as well."""
        return epochs * ceil(TRAIN_SIZE / self.batch_size)


Arms = dict[str, list[Setting]]
ARMS: Arms = {
    "SGD, linear lr scaling": [Setting("SGD", b, 0.025 * b / 32) for b in BATCH_SIZES],
    "SGD, lr re-tuned": [Setting("SGD", b, 0.025 if b == 32 else 0.05) for b in BATCH_SIZES],
    "LARS, one lr": [Setting("LARS", b, LARS_LR) for b in BATCH_SIZES],
}
# LAMB's lr was chosen at batch 32 and grows by the rule of its paper; LARC takes those of the first arm. One lr for
# all was worse, on two other seeds: LAMB has 92 % at the full batch with 0.02, and ends at chance at batch 32 with
# 0.03; LARC has 87 % at the full batch with 0.05, and ends at chance at batch 32 with 0.1.
ARMS_ON_REQUEST = {
    "lamb": ("LAMB(AdamW), √ scaling", [Setting("LAMB", b, round(0.01 * sqrt(b / 32), 3)) for b in BATCH_SIZES]),
    "larc": ("LARC, linear scaling", [Setting("LARC", b, 0.025 * b / 32) for b in BATCH_SIZES]),
    "8bit": ("LARS, 8-bit momentum", [Setting("LARS 8-bit", b, LARS_LR) for b in BATCH_SIZES]),
}
LOOKS = (  # of the arms in plots: color, marker, and how far they are moved aside
    *(("#D55E00", "s", 0.93), ("#8C8C8C", "^", 1.0), ("#0072B2", "o", 1.07)),
    *(("#009E73", "D", 0.87), ("#CC79A7", "v", 1.15), ("#E69F00", "P", 1.23)),
)


def load_split() -> list[Tensor]:
    """Train and test images, standardised by the training set, then their labels; always the same split."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=TEST_SIZE, stratify=labels, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    return [images[train], images[test], labels[train], labels[test]]


def make_model() -> nn.Sequential:
    """Four convolutions and two linear layers, without batch norm, which would forgive SGD a wrong lr."""
    layers: list[nn.Module] = []
    for before, after in ((1, 8), (8, 16)):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(after, after, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers)


def make_optimizer(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    if setting.optimizer == "LAMB":
        return LAMB(torchlars.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.01))
    hyper = {"lr": setting.lr, "momentum": 0.9, "weight_decay": 5e-4}
    if setting.optimizer == "LARS 8-bit":
        return LARS(torchlars.optim.SGD(model.parameters(), **hyper, momentum_dtype=torch.int8, min_8bit_size=0))
    sgd = torch.optim.SGD(model.parameters(), **hyper)
    if setting.optimizer == "LARS":
        return LARS(sgd, trust_coef=0.001)
    return LARC(sgd) if setting.optimizer == "LARC" else sgd


def warmup_then_poly(optimizer: torch.optim.Optimizer, steps: int) -> SequentialLR:
    """The lr warms up linearly over the first tenth of the steps, then decays to zero as a parabola.

    The schedulers drive a wrapper just as they drive plain SGD.
    """
    warmup_steps = max(1, steps // 10)
    warmup = LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps - 1)
    decay = PolynomialLR(optimizer, total_iters=max(1, steps - warmup_steps), power=2)
    return SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])


def train(setting: Setting, seed: int, epochs: int, split: list[Tensor], progress: tqdm) -> list[float]:
    """Trains one network and returns its test accuracy, in percent, after each epoch."""
    train_images, test_images, train_labels, test_labels = split
    torch.manual_seed(seed)
    model = make_model()
    optimizer = make_optimizer(setting, model)
    scheduler = warmup_then_poly(optimizer, setting.steps(epochs))
    accuracies = []
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN_SIZE).split(setting.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_images[batch]), train_labels[batch]).backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            correct = model(test_images).argmax(dim=1) == test_labels
        accuracies.append(100 * correct.double().mean().item())
        progress.update()
    return accuracies


def train_all(arms: Arms, seeds: int, epochs: int) -> dict[Setting, Tensor]:
    """Accuracies of shape (seeds, epochs) for each distinct setting; at batch 32 both SGD arms share one."""
    split = load_split()
    runs: dict[Setting, list[list[float]]] = {setting: [] for arm in arms.values() for setting in arm}
    with tqdm(total=seeds * len(runs) * epochs, unit="epoch", mininterval=0.5) as progress:
        for seed in range(seeds):
            for setting, accuracies in runs.items():
                description = f"seed {seed}, {setting.optimizer}, batch {setting.batch_size}"
                progress.set_description(description, refresh=False)
                accuracies.append(train(setting, seed, epochs, split, progress))
    return {setting: torch.tensor(accuracies) for setting, accuracies in runs.items()}


def mean_and_spread(accuracies: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the seeds, the first dimension (0 where there is one seed only)."""
    return accuracies.mean(dim=0), accuracies.std(dim=0, correction=min(1, len(accuracies) - 1))


def make_table(arms: Arms, curves: dict[Setting, Tensor]) -> str:
    """Accuracies after the last epoch, as a Markdown table."""
    table = "| arm                    | batch |    lr | steps | mean accuracy | spread |\n"
    table += "|:-----------------------|------:|------:|------:|--------------:|-------:|\n"
    for name, arm in arms.items():
        for setting in arm:
            seeds, epochs = curves[setting].shape
            mean, spread = mean_and_spread(curves[setting][:, -1])
            table += f"| {name:22} | {setting.batch_size:5} | {setting.lr:5.4g} | {setting.steps(epochs):5} "
            table += f"| {mean:11.1f} % | {f'± {spread:.1f}' if seeds > 1 else 'n/a':>6} |\n"
    return table


def plot(arms: Arms, curves: dict[Setting, Tensor]) -> Figure:
    """Left: final accuracy against batch size. Right: accuracy against epoch at the full batch.

    Letters are readable where the plot is 400 pixels wide.
    """
    seeds, epochs = next(iter(curves.values())).shape
    axis = range(1, epochs + 1)
    with rc_context({"font.size": 13, "axes.titlesize": 13, "figure.titlesize": 13}):
        figure = Figure(figsize=(7.4, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for (name, arm), (color, marker, shift) in zip(arms.items(), LOOKS, strict=False):
            mean, spread = mean_and_spread(torch.stack([curves[setting][:, -1] for setting in arm], dim=1))
            dodged, bars = [b * shift for b in BATCH_SIZES], (spread.minimum(mean), spread.minimum(100 - mean))
            left.errorbar(dodged, mean, bars, label=name, color=color, marker=marker, ms=7, lw=2, capsize=4)
            mean, spread = mean_and_spread(curves[arm[-1]])
            low, high = (mean - spread).clamp(min=0), (mean + spread).clamp(max=100)
            right.plot(axis, mean, color=color, lw=2)
            right.fill_between(axis, low, high, color=color, alpha=0.15, lw=0)
        left.set(xscale="log", xlabel="batch size (images)", ylabel="test accuracy (%)", ylim=(0, 103))
        left.set_xticks(BATCH_SIZES, [f"{b:,}" for b in BATCH_SIZES])
        left.minorticks_off()
        left.set_title(f"after {epochs} epochs")
        right.set(xlabel="epoch (of one step)", title=f"at batch {TRAIN_SIZE:,}, all images")
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"Digits, CNN without batch norm (mean ± std, seeds: {seeds})")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="SGD and LARS with large batches on scikit-learn's digits.")
    out, out_help = Path(__file__).resolve().parent / "output", "folder for digits.md and digits.png"
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of each run (default: 60)")
    parser.add_argument("--arms", nargs="+", choices=ARMS_ON_REQUEST, default=[], help="arms besides the usual three")
    parser.add_argument("--lars-lr", type=float, default=LARS_LR, help=f"lr of the LARS arms (default: {LARS_LR:g})")
    parser.add_argument("--out", type=Path, default=out, help=f"{out_help} (default: {out})")
    args = parser.parse_args()
    for option, number in (("--seeds", args.seeds), ("--epochs", args.epochs), ("--lars-lr", args.lars_lr)):
        if not number > 0:
            parser.error(f"{option} must be a positive number (got: {number})")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "digits.md").touch()
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to (got: {args.out}; {error.strerror})")

    torch.set_num_threads(1)  # measured: a second thread hardly helps with images this small
    arms = {
        name: [each._replace(lr=args.lars_lr) if each.optimizer.startswith("LARS") else each for each in arm]
        for name, arm in (ARMS | dict(ARMS_ON_REQUEST[name] for name in args.arms)).items()
    }
    curves = train_all(arms, args.seeds, args.epochs)
    plot(arms, curves).savefig(args.out / "digits.png", dpi=120)
    table = make_table(arms, curves)
    (args.out / "digits.md").write_text(f"{table}\n{LIMITS}\n", encoding="utf-8")
    print(f"\n{table}\nSaved as digits.md and digits.png in {args.out}\n\n{LIMITS}")


if __name__ == "__main__":
    main()
