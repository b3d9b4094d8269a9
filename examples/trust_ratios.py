"""The trust ratio of every layer over a training: what LARS decides, and how much it differs between layers.

The CNN of digits.py learns its 1,437 handwritten digits. LARS adapts the weights; `param_groups` leaves the biases to
SGD, with an lr of their own, which is what they need. The trust ratios of every step are kept as they come from
`optimizer.trust_ratios()`, as tensors on the device of their layers, and read after the last step: inside of the loop
nobody waits for a number. They come as a table and a plot: while the gradients vanish, ratios grow a thousandfold, to
near trust_coef / weight_decay = 2. Needs torchlars, scikit-learn, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import TRAIN_SIZE, load_split, make_model, warmup_then_poly
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchlars import LARS, param_groups

LR, BIAS_LR, WEIGHT_DECAY = 16.0, 0.05, 5e-4
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")


def train(batch_size: int, epochs: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """Trains one network; returns the trust ratios of all steps, by parameter, and the test accuracy in percent."""
    train_images, test_images, train_labels, test_labels = load_split()
    torch.manual_seed(seed)
    model = make_model()
    groups = param_groups(model, lr=LR, weight_decay=WEIGHT_DECAY, bias_lr=BIAS_LR)
    optimizer = LARS(torch.optim.SGD(groups, momentum=0.9))
    scheduler = warmup_then_poly(optimizer, steps=epochs * -(-TRAIN_SIZE // batch_size))

    history: list[dict[Tensor, Tensor]] = []
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN_SIZE).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_images[batch]), train_labels[batch]).backward()
            optimizer.step()
            scheduler.step()
            history.append(optimizer.trust_ratios())

    names = {param: name for name, param in model.named_parameters()}
    ratios = {names[param]: torch.stack([step[param] for step in history]).cpu() for param in history[0]}
    with torch.no_grad():
        correct = model(test_images).argmax(dim=1) == test_labels
    return ratios, 100 * correct.double().mean().item()


def make_table(ratios: dict[str, Tensor]) -> str:
    """The trust ratios of every layer at the first step, in the middle of all and at the last, as a Markdown table."""
    table = "| layer       |   first |  median |    last |\n"
    table += "|:------------|--------:|--------:|--------:|\n"
    for name, steps in ratios.items():
        table += f"| {name:11} | {steps[0]:7.5f} | {steps.median():7.5f} | {steps[-1]:7.5f} |\n"
    return table


def plot(ratios: dict[str, Tensor], title: str) -> Figure:
    """A line for every layer."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for (name, steps), color in zip(ratios.items(), COLORS, strict=True):
        axes.plot(range(1, len(steps) + 1), steps, label=name, color=color, lw=1.5)
    axes.set(yscale="log", xlabel="step", ylabel="trust ratio", title=title)
    axes.legend(frameon=False, ncols=2)
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="The trust ratios of a small network on scikit-learn's digits.")
    out, out_help = Path(__file__).resolve().parent / "output", "folder for trust_ratios.md and trust_ratios.png"
    parser.add_argument("--batch-size", type=int, default=512, help="images in a step (default: 512)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the run (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=out, help=f"{out_help} (default: {out})")
    args = parser.parse_args()
    for option, number in (("--batch-size", args.batch_size), ("--epochs", args.epochs)):
        if number < 1:
            parser.error(f"{option} must be a positive number (got: {number})")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "trust_ratios.md").touch()
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to (got: {args.out}; {error.strerror})")

    torch.set_num_threads(1)  # images are small
    ratios, accuracy = train(args.batch_size, args.epochs, args.seed)
    title = f"LARS over SGD, lr {LR:g}, batch {args.batch_size}: {accuracy:.1f} % after {args.epochs} epochs"
    plot(ratios, title).savefig(args.out / "trust_ratios.png", dpi=160)
    table = make_table(ratios)
    (args.out / "trust_ratios.md").write_text(table, encoding="utf-8")
    print(f"{title}\n\n{table}\nSaved as trust_ratios.md and trust_ratios.png in {args.out}")


if __name__ == "__main__":
    main()
