"""Models as FSDP2 gathers them: a root unit and one for each block. Shapes alone, derived from the architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod

from benchmarks.step_time import sets
from benchmarks.step_time.sets import Shape


@dataclass(frozen=True)
class Model:
    """The shapes of a model's layers, in the units that a program would give to ``fully_shard`` one by one."""

    units: tuple[tuple[Shape, ...], ...]  # the root first: what is in no block

    def shapes(self) -> Iterator[Shape]:
        """Return the shapes of all layers."""
        for unit in self.units:
            yield from unit

    @property
    def layers(self) -> int:
        """The number of tensors."""
        return sum(len(unit) for unit in self.units)

    def elements(self, units: slice = slice(None)) -> int:
        """Return the number of elements of some units."""
        return sum(prod(shape) for unit in self.units[units] for shape in unit)


def resnet50() -> Model:
    """ResNet-50: a unit for each of 16 blocks."""
    shapes = iter(tuple(sets.resnet50()))
    stem = tuple(islice(shapes, 3))
    blocks = [
        tuple(islice(shapes, 12 if block == 0 else 9))  # the first of a stage has a shortcut to convolve
        for blocks in (3, 4, 6, 3)
        for block in range(blocks)
    ]
    return Model(((*stem, *shapes), *blocks))


def llama(width: int, hidden: int, blocks: int, heads: int, kv_heads: int, words: int) -> Model:
    """Llama 2 and 3: attention whose keys and values may have fewer heads, a gated MLP, two norms; input and output."""
    kv_width = width // heads * kv_heads
    attention = ((width, width), (kv_width, width), (kv_width, width), (width, width))
    mlp = ((hidden, width), (hidden, width), (width, hidden))
    block = (*attention, *mlp, (width,), (width,))
    return Model((((words, width), (width,), (words, width)), *(block,) * blocks))


def llama_2_7b() -> Model:
    """Llama-2-7B."""
    return llama(width=4096, hidden=11008, blocks=32, heads=32, kv_heads=32, words=32000)


def llama_2_70b() -> Model:
    """Llama-2-70B; Llama-3-70B has the same blocks and more words."""
    return llama(width=8192, hidden=28672, blocks=80, heads=64, kv_heads=8, words=32000)


MODELS: dict[str, Callable[[], Model]] = {
    "ResNet-50": resnet50,
    "Llama-2-7B": llama_2_7b,
    "Llama-2-70B": llama_2_70b,
}
