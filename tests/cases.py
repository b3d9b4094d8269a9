"""The table of cases that every backend is held to: each with a name and a reason to exist.

Weight decay is never absent as a whole, and every layer has values of its own size, so that a wrong formula, a wrong layer
and a wrong hyper-parameter all show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from closeness import joined
from torch import Tensor

REAL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPLEX_DTYPES = [torch.complex128, torch.complex64]
DTYPES = REAL_DTYPES + COMPLEX_DTYPES

Layout = Callable[[Tensor], Tensor]


def as_it_is(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    """The same values, laid out with the first dimension fastest."""
    return x.mT.contiguous().mT


def misaligned(x: Tensor) -> Tensor:
    """The same values one element behind an allocation's begin."""
    base = x.new_full((x.numel() + 1,), 7)  # uninitialized, it could be NaN, which equals nothing
    return base[1:].view(x.shape).copy_(x)


def sliced(x: Tensor) -> Tensor:
    """The same values with gaps in memory between the rows."""
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


def conjugated(x: Tensor) -> Tensor:
    """The same values behind a lazy conjugation, where there is one."""
    return x.conj().resolve_conj().conj()


def on(device: torch.device | str, tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors on a device, in the same layouts, by one transfer."""
    memory = [torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()) for tensor in tensors]
    there = torch.cat(memory).to(device).split([len(part) for part in memory])
    copies = []
    for tensor, part in zip(tensors, there, strict=True):
        copy = torch.empty(0, dtype=tensor.dtype, device=device).set_(
            part.clone().untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        copies.append(copy.conj() if tensor.is_conj() else copy)
    return copies


@dataclass
class Layer:
    shape: tuple[int, ...]
    weight_decay: float = 0.1
    trust_coef: float = 0.001
    eps: float = 1e-8
    param_scale: float = 1.0
    grad_scale: float = 0.3
    param_layout: Layout = as_it_is
    grad_layout: Layout = as_it_is


@dataclass
class Case:
    name: str
    why: str
    layers: list[Layer] = field(default_factory=list)
    maximize: bool = False

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", grad_dtype: torch.dtype | None = None):
        """Return the arguments of ``calls.scale_gradients``: grads, params, weight_decays, ..., maximize."""
        random = torch.Generator().manual_seed(len(self.layers) + 7 * len(self.name))

        def tensor(shape, scale, layout, dtype):
            wide = torch.complex128 if dtype.is_complex else torch.float64
            values = scale * torch.randn(shape, generator=random, dtype=wide)
            return layout(values.to(dtype))

        params = [tensor(layer.shape, layer.param_scale, layer.param_layout, dtype) for layer in self.layers]
        grads = [tensor(layer.shape, layer.grad_scale, layer.grad_layout, grad_dtype or dtype) for layer in self.layers]
        if torch.device(device).type != "cpu":
            grads, params = on(device, grads), on(device, params)
        return (
            grads,
            params,
            [layer.weight_decay for layer in self.layers],
            [layer.trust_coef for layer in self.layers],
            [layer.eps for layer in self.layers],
            self.maximize,
        )


def sizes(*numels: int) -> list[Layer]:
    """Flat layers of the given sizes, each with a scale, weight decay and coefficients of its own."""
    return [
        Layer(
            (numel,),
            weight_decay=0.05 * (i % 4),
            trust_coef=0.001 * (1 + i % 3),
            eps=1e-8 * 10 ** (i % 5),
            param_scale=1.0 + i % 7,
            grad_scale=0.1 * (1 + i % 5),
        )
        for i, numel in enumerate(numels, start=1)
    ]


CASES = [
    Case("formula", "the smallest layers on which every term of the formula counts", sizes(6, 2, 3)),
    Case("maximize", "the decay changes its sign", sizes(6, 40, 3), maximize=True),
    Case("large_eps", "ε as large as the norms", [Layer((7,), eps=0.5), Layer((9, 2), eps=2.0, weight_decay=0.01)]),
    Case("tails", "every length around the widths of vectors and packs", sizes(*range(1, 70))),
    Case("chunk_borders", "one element less and more than whole chunks", sizes(16383, 16384, 16385, 3 * 16384 + 5)),
    Case("blocks", "around what 256 threads take at once", sizes(255, 256, 257, 1023, 1024, 1025, 2047, 2049, 4099)),
    Case("many", "two launches for measuring, three to scale, four for SGD", sizes(*[1 + i % 5 for i in range(1250)])),
    Case("shapes", "dimensions from none to five", [Layer(s) for s in [(), (1,), (2, 3), (2, 1, 4), (3, 2, 2, 3, 1)]]),
    Case("empty", "layers without elements, alone and among others", [Layer(s) for s in [(0,), (3,), (2, 0), (0, 4)]]),
    Case("only_empty", "nothing to sweep at all", [Layer((0,)), Layer((0, 3))]),
    Case(
        "zero_layers",
        "the ratio is 1 where a norm is 0, and the decay is applied all the same",
        [
            Layer((5,), param_scale=0.0),
            Layer((6,), grad_scale=0.0),
            Layer((7,), param_scale=0.0, grad_scale=0.0),
            Layer((8,)),
        ],
    ),
    Case("no_decay", "layers with and without decay side by side", [Layer((50,), weight_decay=0.0), Layer((60,))]),
    Case(
        "large_norms",
        "norms above 65,504 and squares far above it, which float16 cannot hold",
        [Layer((90000,), param_scale=300.0, grad_scale=250.0), Layer((10,), param_scale=100.0, grad_scale=1000.0)],
    ),
    Case("small_grads", "squares that float16 and float32 lose", [Layer((300,), grad_scale=1e-4, weight_decay=1e-4)]),
    Case(
        "channels_last",
        "dense in another order than the shape's",
        [Layer((4, 3, 5, 5), param_layout=channels_last, grad_layout=channels_last), Layer((3,))],
    ),
    Case(
        "mixed_layouts",
        "parameter and gradient in different orders, which cannot be swept side by side",
        [
            Layer((4, 3, 5, 5), param_layout=channels_last),
            Layer((4, 3, 5, 5), grad_layout=channels_last),
            Layer((30, 7), param_layout=transposed),
            Layer((30, 7), grad_layout=transposed),
            Layer((30, 7), param_layout=transposed, grad_layout=transposed),
        ],
    ),
    Case(
        "gaps",
        "views with gaps, whose surroundings must not be touched",
        [
            Layer((6, 5), param_layout=sliced),
            Layer((6, 5), grad_layout=sliced),
            Layer((300, 7), 0.0, grad_layout=sliced),
        ],
    ),
    Case(
        "misaligned",
        "views that do not start on a 16-byte border",
        [
            Layer((1000,), param_layout=misaligned),
            Layer((1000,), grad_layout=misaligned),
            Layer((20000,), param_layout=misaligned, grad_layout=misaligned),
        ],
    ),
    Case(
        "conjugated",
        "a lazy conjugation changes values without changing memory",
        [Layer((11,), param_layout=conjugated), Layer((12,))],
    ),
]


def named(values):
    return pytest.mark.parametrize("case", values, ids=lambda case: case.name)


inverses = pytest.mark.parametrize("inverse", [0.25, 1 / 3], ids=["quarter", "third"])


def copied(tensor):
    """The same, in memory of its own, with what lies around it."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes and not tensor.is_conj():
        return tensor.clone()  # three times as fast
    storage = tensor.untyped_storage().clone()
    copy = tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return copy.conj() if tensor.is_conj() else copy


def memory(tensors):
    """What memory holds, to the bit, of tensors and around them; a copy on the CPU."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    parts = [empty.new_empty(0).set_(tensor.untyped_storage()) for tensor in tensors]
    return joined(parts).split([len(part) for part in parts])


def overflown(grads, values=(float("inf"), float("nan"), -float("inf"))):
    """The same gradients, of which every layer's first element is infinite or NaN."""
    for i, grad in enumerate(grads):
        if grad.numel() > 0:
            grad[(0,) * grad.dim()] = values[i % len(values)]
    return grads
