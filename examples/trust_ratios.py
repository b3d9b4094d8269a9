"""The trust ratio of every layer over a training: what LARS decides, and how much it differs between layers.

The CNN of digits.py learns its 1,437 handwritten digits. LARS adapts the weights; `param_groups` leaves the biases to
SGD, with an lr of their own, which is what they need. The trust ratios of every step are kept as they come from
`optimizer.named_trust_ratios()`, as tensors on the device of their layers, and read after the last step: inside of the
loop nobody waits for a number. They come as a table and a plot: while the gradients vanish, ratios grow by factors of
400 to 1,500, towards their bound, trust_coef / weight_decay = 2. Needs torchlars, scikit-learn, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import TRAIN_SIZE, load_split, make_model, warmup_then_poly
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchlars import LARS, param_groups

LR, BIAS_LR, WEIGHT_DECAY, TRUST_COEF = 16.0, 0.05, 5e-4, 0.001
LOOKS = (  # of the layers in the plot, in the order of the model
    *(("conv 1", "#9ECAE1", "-"), ("conv 2", "#4292C6", "--"), ("conv 3", "#2166AC", "-."), ("conv 4", "#08306B", ":")),
    *(("linear 1", "#F16913", "-"), ("linear 2", "#7F2704", "--")),
)


def train(batch_size: int, epochs: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """Trains one network; returns the trust ratios of all steps, by parameter, and the test accuracy in percent."""
    train_images, test_images, train_labels, test_labels = load_split()
    torch.manual_seed(seed)
    model = make_model()
    groups = param_groups(model, lr=LR, weight_decay=WEIGHT_DECAY, bias_lr=BIAS_LR)
    optimizer = LARS(torch.optim.SGD(groups, momentum=0.9), trust_coef=TRUST_COEF)
    scheduler = warmup_then_poly(optimizer, steps=epochs * -(-TRAIN_SIZE // batch_size))

    history: list[dict[str, Tensor]] = []
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN_SIZE).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_images[batch]), train_labels[batch]).backward()
            optimizer.step()
            scheduler.step()
            history.append(optimizer.named_trust_ratios(model.named_parameters()))

    ratios = {name: torch.stack([step[name] for step in history]).cpu() for name in history[0]}
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


def plot(ratios: dict[str, Tensor], epochs: int, title: str) -> Figure:
    """A line for every layer, of means over the steps of an epoch; readable where the plot is 400 pixels wide."""
    with rc_context({"font.size": 13, "axes.titlesize": 13}):
        figure = Figure(figsize=(7, 5.2), layout="constrained")
        axes = figure.subplots()
        for (label, color, style), steps in zip(LOOKS, ratios.values(), strict=True):
            means = steps.log().reshape(epochs, -1).mean(dim=1).exp()  # geometric, as befits a logarithmic axis
            axes.plot(range(1, epochs + 1), means, style, label=label, color=color, lw=2.5)
        bound = TRUST_COEF / WEIGHT_DECAY
        axes.axhline(bound, color="black", ls=":", lw=1.5)
        axes.text(1, 1.1 * bound, f"upper bound: trust_coef / weight decay = {bound:g}", va="bottom")
        axes.set(yscale="log", xlabel="epoch", ylabel="trust ratio (no unit)", title=title)
        axes.set_ylim(top=5 * bound)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
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
    plot(ratios, args.epochs, title).savefig(args.out / "trust_ratios.png", dpi=120)
    table = make_table(ratios)
    (args.out / "trust_ratios.md").write_text(table, encoding="utf-8")
    print(f"{title}\n\n{table}\nSaved as trust_ratios.md and trust_ratios.png in {args.out}")


if __name__ == "__main__":
    main()
