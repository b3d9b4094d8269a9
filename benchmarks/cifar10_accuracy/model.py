"""ResNet-9: the network with which DAWNBench's CIFAR-10 was won (David Page, 2018), its width free."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """Convolution, pooling if asked for, batch norm, ReLU. Pooling comes first: it leaves the others a quarter."""

    def __init__(self, before: int, after: int, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(after)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        """Return the activations."""
        images = self.conv(images)
        return F.relu(self.norm(F.max_pool2d(images, 2) if self.pool else images))


class ResNet9(nn.Module):
    """Eight convolutions, of which two pairs are residual, and a linear layer. No layer starts at 0."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, width), Conv(width, 2 * width, pool=True))
        self.first = nn.Sequential(Conv(2 * width, 2 * width), Conv(2 * width, 2 * width))
        self.middle = nn.Sequential(Conv(2 * width, 4 * width, pool=True), Conv(4 * width, 8 * width, pool=True))
        self.second = nn.Sequential(Conv(8 * width, 8 * width), Conv(8 * width, 8 * width))
        self.head = nn.Linear(8 * width, classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, an eighth of what the head says, as in the original."""
        images = self.stem(images)
        images = images + self.first(images)
        images = self.middle(images)
        images = images + self.second(images)
        return self.head(images.amax((2, 3))) / 8
