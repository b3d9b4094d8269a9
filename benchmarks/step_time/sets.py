"""The sets of layers that a step is timed on: shapes alone, as no step asks where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerSet:
    """Shapes, and what is known of them before anything is measured."""

    shapes: Callable[[], Iterator[Shape]]
    #: The share of second reads that a cache of the usual size can serve. None: bytes do not matter, calls do.
    reuse: float | None
    #: Where it is timed by default. None: nowhere.
    devices: tuple[str, ...] = ("cpu", "cuda")
    #: The only dtype that it is timed in. None: the one that was asked for.
    dtype: torch.dtype | None = None
    #: Whether memory has room for the core contestants' states only.
    is_large: bool = False

    def elements(self) -> int:
        """Return the number of elements of all layers."""
        return sum(prod(shape) for shape in self.shapes())


def resnet50() -> Iterator[Shape]:
    """ResNet-50: 161 tensors, 25.6M elements, 108 of the tensors vectors."""

    def convolution(inputs: int, outputs: int, kernel: int) -> Iterator[Shape]:
        yield (outputs, inputs, kernel, kernel)
        yield from ((outputs,), (outputs,))  # its batch norm

    yield from convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(inputs, width, 1)
            yield from convolution(width, width, 3)
            yield from convolution(width, 4 * width, 1)
            if block == 0:
                yield from convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    yield from ((1000, inputs), (1000,))


def vit_b_16() -> Iterator[Shape]:
    """ViT-B/16: 152 tensors, 86.6M elements."""
    width, hidden = 768, 3072
    yield from ((1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width))
    for _ in range(12):
        yield from ((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,))
    yield from ((width,), (width,), (1000, width), (1000,))


def llama_7b() -> Iterator[Shape]:
    """Llama-2-7B: 291 tensors, 6.74G elements."""
    width, hidden, words = 4096, 11008, 32000
    yield (words, width)
    for _ in range(32):
        yield from ((width, width),) * 4
        yield from ((hidden, width), (hidden, width), (width, hidden), (width,), (width,))
    yield from ((width,), (words, width))


def one_100m() -> Iterator[Shape]:
    """One tensor that no cache holds."""
    yield (10_000, 10_000)


def one_33m() -> Iterator[Shape]:
    """One tensor that no cache holds, with rows of 32 whole blocks of 8-bit momentum."""
    yield (8192, 4096)


def one_33m_odd() -> Iterator[Shape]:
    """One tensor that no cache holds, with rows that end in a part of a block."""
    yield (8400, 4000)


def tiny() -> Iterator[Shape]:
    """2000 tensors of 64 elements. They are matrices, since one peer leaves vectors out of LARS."""
    yield from ((8, 8),) * 2000


def smoke() -> Iterator[Shape]:
    """Four tensors, for the tests of the benchmark itself."""
    yield from ((8, 3, 3, 3), (8,), (16, 8), (16,))


SETS = {
    "resnet50": LayerSet(resnet50, reuse=1.0),
    "vit_b_16": LayerSet(vit_b_16, reuse=1.0),
    "one_100m": LayerSet(one_100m, reuse=0.0),
    "one_33m": LayerSet(one_33m, reuse=0.0, devices=()),
    "one_33m_odd": LayerSet(one_33m_odd, reuse=0.0, devices=()),
    "tiny": LayerSet(tiny, reuse=None),
    "llama_7b_bf16": LayerSet(llama_7b, reuse=0.5, devices=("cuda",), dtype=torch.bfloat16, is_large=True),
    "smoke": LayerSet(smoke, reuse=None, devices=()),
}
