"""Cases for the CUDA kernels' own source, and a program by which g++ compiles it and a CPU executes it.

tests/cuda_on_host/ holds what stands in for CUDA, and a driver that reads cases and writes results. A block's threads
take turns only where they wait for each other, in an order chosen per run, so that a missing barrier shows. So do reads
and writes outside of a tensor, misaligned packs, diverging threads, and blocks that rely on each other's order.

What such a run cannot show: in which order real threads see each other's writes to memory (here they share one thread
of the CPU, and see every write at once); real launches, their limits and streams; what nvcc makes of the source; speed.
These take a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from torchlars import codes, reference

GXX = shutil.which("g++")
needs_host_shim = [
    pytest.mark.skipif(sys.platform != "linux", reason="the host shim needs Linux: fibers and sections of its linker"),
    pytest.mark.skipif(GXX is None, reason="the host shim needs g++, and none was found"),
    pytest.mark.usefixtures("one_thread"),  # threads of torch that wait for each other lose more than they win
]
TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of the driver's
ASCENDING, DESCENDING, SHUFFLED = 0, -1, 20180801  # in which threads and blocks take turns


# --- Cases -----------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    numel: int
    weight_decay: float = 0.1
    #: Of parameter, gradient, momentum or first moment, and second moment, in elements off a 16-byte border.
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0)
    fill: tuple[float | None, float | None] = (None, None)  # instead of random parameters, gradients
    first: tuple[float | None, float | None] = (None, None)  # instead of the first random parameter, gradient
    scales: tuple[float, float] = (1.0, 1.0)  # of random parameters, gradients
    row_length: int = 0  # of momentum in 8 bits; 0: one row
    whole_row_length: int = 0  # if this is a shard
    place: int = 0  # of the first element, if this is a shard
    momentum_scale: float = 1.0  # of momentum, or of both moments
    left: float | None = None  # the gradient takes away the decay, but for random numbers of this size relative to it


def sizes(pack: int) -> list[int]:
    """Return the numels around which a kernel changes its way: packs, a block's stride, an unrolled one, chunks."""
    small = [1, 3, 4, 7, 8, 9, *(n * pack for n in (255, 256, 257)), 511 * pack + 1, 1024 * pack - 1, 1025 * pack + 1]
    return [*small, 1023, 16383, 16384, 16385, 3 * 16384 + 5]


def borders(pack: int) -> list[Layer]:
    return [Layer(numel, weight_decay) for numel in sizes(pack) for weight_decay in (0.0, 0.1)]


def misaligned(pack: int) -> list[Layer]:
    offsets = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1), (pack - 1, 1, 2, 3)]
    numels = (1, pack, 256 * pack + 1, 1025 * pack, 16385)
    return [Layer(*numbers) for numbers in product(numels, (0.0, 0.1), offsets)]


def zero(pack: int) -> list[Layer]:
    fills = [(0.0, None), (None, 0.0), (0.0, 0.0), (None, None)]
    layers = [Layer(37, weight_decay, fill=fill) for weight_decay in (0.0, 0.1) for fill in fills]
    layers += [Layer(37, weight_decay, fill=(None, 0.0), momentum_scale=0.0) for weight_decay in (0.0, 0.1)]
    return [*layers, Layer(0), Layer(0, 0.0), Layer(0, offsets=(1, 1, 1, 1)), Layer(1), Layer(1, 0.0), Layer(0)]


def not_finite(pack: int) -> list[Layer]:
    firsts = [(torch.nan, None), (None, torch.nan), (torch.inf, None), (None, -torch.inf), (torch.nan, torch.inf)]
    layers = [Layer(300, weight_decay, first=first) for weight_decay in (0.0, 0.1) for first in firsts]
    return [Layer(300), *layers, Layer(37, fill=(0.0, torch.nan)), Layer(37, fill=(torch.nan, 0.0)), Layer(300)]


def extreme(pack: int) -> list[Layer]:
    big, tiny = (6e4, 6e-8) if pack == 8 else (1e30, 1e-30)
    fills = [(big, tiny), (tiny, big), (big, big), (tiny, tiny)]
    return [Layer(5000, weight_decay, fill=fill) for weight_decay in (0.0, 0.1) for fill in fills]


def binades(pack: int) -> list[Layer]:
    """Return layers of all the magnitudes that any dtype here has, subnormal and infinite ones too."""
    exponents = range(-152, 128, 5)
    pairs = [(e, exponents[-1 - i % 25]) for i, e in enumerate(exponents)]
    return [Layer(259 * pack + 1, 0.1 * (p % 2), scales=(2.0**p, 2.0**g)) for p, g in pairs]


def sparse(pack: int) -> list[Layer]:
    """Return layers whose packs are zeros, or numbers that an update has not moved, but for one or none."""
    firsts = [(first, other) for first in (3.0, 1e-20, 1e30) for other in (0.7, 1e-41)]
    zeros = [Layer(300, weight_decay, fill=(0.0, 0.0), first=first) for weight_decay in (0.0, 0.1) for first in firsts]
    unmoved = [Layer(300, fill=(0.7, 0.7), first=(0.5, 0.25)), *(Layer(300, fill=(x, x)) for x in (1e-20, torch.inf))]
    return zeros + unmoved  # as updates


def cancelling(pack: int) -> list[Layer]:
    """Return layers whose gradients and decays nearly cancel."""
    numel = 259 * pack + 1
    random = [Layer(numel, left=left) for left in (0.0, *(2.0**-i for i in range(0, 25, 3)))]
    alike = [Layer(numel, fill=(2.5, None), left=2.0**-20) for _ in range(5)]  # products that float nearly holds
    return random + alike


def decays_beyond_float(pack: int) -> list[Layer]:
    """Return layers whose decays, or the rests of these, float cannot hold, but what they add to float32 it can."""
    powers = [(-140, 120), (-120, 120), (140, -120), (130, -100)]
    return [
        Layer(259 * pack + 1, 1.3 * 2.0**decay, scales=(2.0**size, 2.0 ** (decay + size))) for decay, size in powers
    ]


SEVERAL_LAUNCHES = "several launches"  # of up to 742 layers each; takes long
CASES: dict[str, Callable[[int], list[Layer]]] = {
    "borders": borders,
    "misaligned views": misaligned,
    "zero norms and empty layers": zero,
    "NaN and infinity": not_finite,
    "squares beyond the dtype": extreme,
    "every binade": binades,
    "zeros with an exception": sparse,
    "gradients that cancel the decay": cancelling,
    "decays beyond float": decays_beyond_float,
    "only an empty layer": lambda pack: [Layer(0)],
    SEVERAL_LAUNCHES: lambda pack: [Layer(2 * 16384), *(Layer(i % 4, 0.1 * (i % 3)) for i in range(910))],
}


MOVED = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 2, 3, 0)]


def in_blocks(pack: int) -> list[Layer]:
    """Return layers for momentum in 8 bits: rows of all kinds, in one chunk and across chunks, whole and shards."""
    rows = [(4, 64), (3, 128), (5, 129), (7, 200), (2, 1000), (1, 300), (40, 1024), (90, 200), (3, 16384 + 130)]
    layers = [Layer(n * length, 0.1 * (i % 2), row_length=length) for i, (n, length) in enumerate(rows)]
    shards = [Layer(8 * 256, row_length=256, whole_row_length=1000, place=5 * 1000 + 128), Layer(600, place=2**32 - 5)]
    firsts = [(None, torch.nan), (None, torch.inf), (torch.nan, None)]
    faults = [Layer(600, row_length=200, first=first) for first in firsts]
    small = [
        Layer(300, 0.0, fill=(None, 1e-31), momentum_scale=0.0),
        Layer(300, 0.0, fill=(None, 0.0)),
        Layer(0, row_length=64),
    ]
    moved = [Layer(900, row_length=100, offsets=offsets) for offsets in MOVED]
    return [*layers, *shards, *faults, *small, *moved, Layer(1025 * pack, row_length=1025 * pack)]


IN_BLOCKS = "in blocks"  # for momentum in 8 bits only


@dataclass
class Case:
    name: str
    layers: list[Layer]
    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]  # in float64: they are cast to the type that a way has
    weight_decays: list[float]
    trust_coefs: list[float]
    eps: list[float]
    lrs: list[float]
    momentums: list[float]
    dampenings: list[float]
    lr_tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    def grad_squared_norms(self, way: Way) -> Tensor:
        if not (way.decayed_norm or way.of_updates):
            return reference.squared_norms(self.grads, inv_scale=way.inv_scale)
        sign = -1 if way.maximize else 1
        scales = [-1.0 if way.of_updates else sign * weight_decay for weight_decay in self.weight_decays]
        return reference.squared_norms(self.grads, others=self.params, scales=scales, inv_scale=way.inv_scale)

    def ratios(self, way: Way) -> Tensor:
        squared_norms = reference.squared_norms(self.params), self.grad_squared_norms(way)
        dtype = reference.compute_dtype(self.dtype, self.dtype)
        no_decays = [0.0] * len(self.weight_decays)
        weight_decays = no_decays if way.decayed_norm or way.of_updates else self.weight_decays
        lr_tensor = self.lr_tensor if way.has_lr_tensor else None
        return reference.trust_ratios(
            *squared_norms,
            weight_decays=weight_decays,
            trust_coefs=self.trust_coefs,
            eps=self.eps,
            dtype=dtype,
            clip=way.clip,
            lrs=self.lrs,
            of_updates=way.of_updates,
            lr_tensor=lr_tensor,
        )


def new_case(name: str, dtype: torch.dtype) -> Case:
    """Return a case in which layers differ in scale and in all numbers: none passes for another."""
    random = torch.Generator().manual_seed(1)
    layers = in_blocks(16 // dtype.itemsize) if name == IN_BLOCKS else CASES[name](16 // dtype.itemsize)

    def tensor(i: int, which: int) -> Tensor:
        scale = (0.5 + i % 7) * (0.3 if which else 1) * layers[i].scales[which]
        values = scale * torch.randn(layers[i].numel, generator=random, dtype=torch.float64)
        if layers[i].fill[which] is not None:
            values.fill_(layers[i].fill[which])
        if layers[i].first[which] is not None:
            values[0] = layers[i].first[which]
        return values.to(dtype)

    count = range(len(layers))
    params, grads = ([tensor(i, which) for i in count] for which in range(2))
    weight_decays = [layer.weight_decay * (1 + i % 5) for i, layer in enumerate(layers)]
    for i, layer in enumerate(layers):
        if layer.left is not None:
            grads[i] = (-weight_decays[i] * params[i].double() * (1 + layer.left * grads[i].double())).to(dtype)
    return Case(
        name,
        layers,
        params,
        grads,
        momenta=[
            (1 + i % 4) * layers[i].momentum_scale * torch.randn(layers[i].numel, generator=random, dtype=torch.float64)
            for i in count
        ],
        weight_decays=weight_decays,
        trust_coefs=[0.5 / (1 + i % 3) for i in count],
        eps=[(0.0, 1e-8, 0.25)[i % 3] for i in count],
        lrs=[0.1 * (1 + i % 4) for i in count],
        momentums=[(0.9, 0.5)[i % 2] for i in count],
        dampenings=[(0.0, 0.1, -0.3)[i % 3] for i in count],
        lr_tensor=torch.tensor([0.7], dtype=torch.float64),
    )


# --- The driver ------------------------------------------------------------------------------------------------------


SCALE, SCALE_IN_THREE_OPS, SGD, LARS_SGD, ADAM, LARS_ADAM, LAMB, LAMB_IN_TWO_PARTS = range(8)  # the driver's ops
FAMILIES = ("scale", "sgd", "adam")  # of ops, which are compiled by themselves
ORDERS = (ASCENDING, DESCENDING, SHUFFLED)


@dataclass(frozen=True)
class Way:
    """One way to run a case: an op, an order of threads and blocks, and what the op takes for all layers."""

    op: int
    order: int
    maximize: bool
    momentum: torch.dtype | None = None
    nesterov: bool = False
    has_ratios: bool = False
    has_lr_tensor: bool = False
    decayed_norm: bool = False
    clip: bool = False
    lr_in_momentum: bool = False
    of_updates: bool = False  # the case's parameters are those before a step, its gradients those after it; or of Adam
    decoupled: bool = False  # the decay
    inverse: float | None = None  # of the gradients' scale; 0: the step is skipped

    @property
    def inv_scale(self) -> Tensor | None:
        return None if self.inverse is None else torch.tensor([self.inverse])

    @property
    def decides(self) -> tuple[float | None, ...]:
        """What trust ratios depend on: ways that have it in common must have the same bits."""
        dialect = (self.has_lr_tensor and self.clip, self.decayed_norm and self.maximize, self.decayed_norm, self.clip)
        return (*dialect, self.inverse)


PLAIN = [Way(op, order, maximize=order == SHUFFLED) for order in ORDERS for op in (SCALE, SCALE_IN_THREE_OPS)]
DIALECTS: list[dict[str, bool]] = [
    {"decayed_norm": True, "maximize": False},
    {"clip": True, "maximize": True},
    {"lr_in_momentum": True, "maximize": False, "has_lr_tensor": True},
    {"decayed_norm": True, "clip": True, "lr_in_momentum": True, "maximize": True, "has_lr_tensor": True},
]
IN_DIALECTS = [
    Way(op, ORDERS[i % 3], **dialect) for i, dialect in enumerate(DIALECTS) for op in (SCALE, SCALE_IN_THREE_OPS)
]
OF_UPDATES = [
    Way(op, ORDERS[i % 3], maximize=False, of_updates=True, clip=i > 0, has_lr_tensor=i > 0)
    for i in range(2)
    for op in (SCALE, SCALE_IN_THREE_OPS)
]
QUARTER, THIRD, SKIP = 0.25, 1 / 3, 0.0
OF_SCALED = [
    Way(op, ORDERS[(i + j) % 3], **dialect, inverse=inverse)
    for i, inverse in enumerate((QUARTER, THIRD, SKIP))
    for j, dialect in enumerate([{"maximize": i == 1}, DIALECTS[(0, 3, 3)[i]]])
    for op in (SCALE, SCALE_IN_THREE_OPS)
]
WAYS = {"plain": PLAIN, "in dialects": IN_DIALECTS, "of updates": OF_UPDATES, "of scaled gradients": OF_SCALED}


def sgd_ways(dtype: torch.dtype) -> list[Way]:
    """Return every kind of momentum with and without ratios, given or decided; and either flag with each of them."""
    momenta = [(None, False), *product({dtype, torch.float32} if dtype.itemsize == 2 else {dtype}, (False, True))]
    return [
        Way(
            op,
            order=ORDERS[(i + j) % 3],
            maximize=(i + j) % 2 == 1,
            momentum=momentum,
            nesterov=nesterov,
            has_ratios=has_ratios,
            has_lr_tensor=(i // 2 + j) % 2 == 1,
            decayed_norm=op == LARS_SGD and i % 2 == 1,
            clip=op == LARS_SGD and i % 3 == 1,
            lr_in_momentum=op == LARS_SGD and i % 3 > 0,
        )
        for i, (momentum, nesterov) in enumerate(momenta)
        for j, (op, has_ratios) in enumerate([(SGD, False), (SGD, True), (LARS_SGD, False)])
    ]


def scaled_sgd_ways(dtype: torch.dtype) -> list[Way]:
    """Return the same of scaled gradients: each op with every inverse."""
    inverses = (QUARTER, THIRD, SKIP)
    return [replace(way, inverse=inverses[(i // 3 + i) % 3]) for i, way in enumerate(sgd_ways(dtype))]


def coded_sgd_ways(dtype: torch.dtype) -> list[Way]:
    """Return ways with momentum in 8 bits: some of those above."""
    ways = [replace(way, momentum=torch.int8) for way in sgd_ways(dtype) + scaled_sgd_ways(dtype) if way.momentum]
    return list(dict.fromkeys(ways))


SGD_WAYS = {"plain": sgd_ways, "of scaled gradients": scaled_sgd_ways}


@dataclass
class Result:
    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    momentum_scales: list[Tensor]
    param_squared_norms: Tensor
    grad_squared_norms: Tensor
    ratios: Tensor


NUMBERS = np.dtype(
    [(name, np.int64) for name in ("numel", "param_offset", "grad_offset", "momentum_offset", "exp_avg_sq_offset")]
    + [(name, np.int64) for name in ("row_length", "whole_row_length", "place")]
    + [(name, np.float64) for name in ("weight_decay", "trust_coef", "eps", "lr", "momentum", "dampening")]
)
BUILDS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", "-g0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def copy_sources(folder: Path) -> Path:
    """Copy the kernels' sources, and let kernels take layers by reference.

    A GPU has the arguments of a kernel in constant memory. On a CPU every thread would copy them: up to 32 KB each.
    """
    copy = Path(shutil.copytree(CSRC, folder / "csrc"))
    for name in ("kernels.cuh", "adam.cuh"):
        kernels = copy / "cuda" / name
        kernels.write_text(re.sub(r"const __grid_constant__ (\w+) (\w+)", r"const \1& \2", kernels.read_text()))
    return copy


def run_compiler(*arguments: str | Path) -> None:
    include = ("-isystem", Path(torch.__file__).parent / "include", "-I", TESTS / "cuda_on_host")
    command = [GXX, "-std=c++17", "-ffp-contract=off", *include, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_driver(folder: Path, csrc: Path, *flags: str | Path) -> Path:
    run_compiler("-I", csrc, *flags, TESTS / "cuda_on_host" / "driver.cpp", "-o", folder / "driver")
    return folder / "driver"


def only(family: str) -> str:
    """Return the flag that compiles a driver for one family of ops."""
    return f"-DONLY_FAMILY={FAMILIES.index(family)}"


def to_bytes(tensors: list[Tensor]) -> bytes:
    return torch.cat(tensors).view(torch.uint8).numpy().tobytes() if tensors else b""


def rows_of(layer: Layer) -> tuple[int, int]:
    """Return the shape of a layer as rows."""
    length = layer.row_length or max(layer.numel, 1)
    return layer.numel // length, length


def momenta_of(case: Case, way: Way) -> list[Tensor]:
    if way.momentum == torch.int8:
        return [coded for coded, _ in coded_momenta(case)]
    return [] if way.momentum is None else [momentum.to(way.momentum, copy=True) for momentum in case.momenta]


def coded_momenta(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Return the codes and scales of all momenta; rounded to nearest."""
    coded = [torch.empty(rows_of(layer), dtype=torch.int8) for layer in case.layers]
    momenta = zip(coded, case.momenta, strict=True)
    scales = [codes.encode(new, momentum.float().reshape(new.shape)) for new, momentum in momenta]
    return [(new.flatten(), of_new) for new, of_new in zip(coded, scales, strict=True)]


def to_input(case: Case, way: Way, state: bytes = b"") -> bytes:
    """Return a case as the driver reads it, with the state that an op has beside parameters and momenta."""
    momentum_dtype = -1 if way.momentum is None else (*DTYPES, torch.int8).index(way.momentum)
    header = [DTYPES.index(case.dtype), way.op, way.maximize, way.order, len(case.layers)]
    header += [momentum_dtype, way.nesterov, way.has_ratios, way.has_lr_tensor, way.inverse is not None]
    header += [way.decayed_norm, way.clip, way.lr_in_momentum, way.of_updates, way.decoupled]
    per_layer = (case.weight_decays, case.trust_coefs, case.eps, case.lrs, case.momentums, case.dampenings)
    numbers = [
        (
            layer.numel,
            *layer.offsets,
            rows_of(layer)[1],
            layer.whole_row_length or rows_of(layer)[1],
            layer.place,
            *others,
        )
        for layer, *others in zip(case.layers, *per_layer, strict=True)
    ]
    return (
        np.array(header, np.int64).tobytes()
        + np.array(numbers, NUMBERS).tobytes()
        + to_bytes(case.params + case.grads)
        + to_bytes(momenta_of(case, way))
        + to_bytes([scales.flatten() for _, scales in coded_momenta(case)] if way.momentum == torch.int8 else [])
        + state
        + to_bytes([case.ratios(way)] if way.has_ratios else [])
        + to_bytes([case.lr_tensor] if way.has_lr_tensor else [])
        + to_bytes([way.inv_scale] if way.inv_scale is not None else [])
    )


class Output:
    """What a driver printed for several ways, to be taken piece by piece."""

    def __init__(self, driver: Path, case: Case, inputs: list[bytes]) -> None:
        done = subprocess.run([driver], input=b"".join(inputs), capture_output=True, timeout=300)
        assert done.returncode == 0, f"{case.name}, {case.dtype}: {done.stderr.decode()}"
        self._bytes, self._position = bytearray(done.stdout), 0

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        begin, self._position = self._position, self._position + count * dtype.itemsize
        return (
            torch.frombuffer(self._bytes[begin : self._position], dtype=dtype) if count else torch.empty(0, dtype=dtype)
        )

    def is_taken(self) -> bool:
        return self._position == len(self._bytes)


def execute(driver: Path, case: Case, ways: list[Way]) -> list[Result]:
    """Run the kernels of a driver on a case, in several ways."""
    name = f"{case.name}, {case.dtype}"
    output = Output(driver, case, [to_input(case, way) for way in ways])
    take = output.take
    results = []
    for way in ways:
        params, grads = ([take(layer.numel, case.dtype) for layer in case.layers] for _ in range(2))
        momenta = [take(layer.numel, way.momentum) for layer in case.layers] if way.momentum else []
        vectors = (torch.float64, torch.float64, reference.compute_dtype(case.dtype, case.dtype))
        norms_and_ratios = [take(len(grads), dtype) for dtype in vectors]
        shapes = [codes.scales_shape(rows_of(layer)) for layer in case.layers if way.momentum == torch.int8]
        scales = [take(rows * blocks, torch.float32).reshape(rows, blocks) for rows, blocks in shapes]
        result = Result(params, grads, momenta, scales, *norms_and_ratios)
        if way.op in (SGD, LARS_SGD):
            assert to_bytes(grads) == to_bytes(case.grads), f"{name}: a gradient was written"
            assert not way.has_ratios or to_bytes([result.ratios]) == to_bytes([case.ratios(way)]), (
                f"{name}: and ratios"
            )
        else:
            assert to_bytes(params) == to_bytes(case.params), f"{name}: a parameter was written"
        if way.inverse == SKIP:
            written = (grads, case.grads), (params, case.params), (momenta, momenta_of(case, way))
            assert all(to_bytes(a) == to_bytes(b) for a, b in written), f"{name}: a skipped step was written"
        results.append(result)
    assert output.is_taken()
    return results


def compare(what: str, case: Case, way: Way, got: Tensor, expected: Tensor, rtol: float) -> None:
    message = f"{what} differ: {case.name}, {case.dtype}, {way}"
    torch.testing.assert_close(
        got, expected, rtol=rtol, atol=0, equal_nan=True, msg=lambda details: f"{message}\n{details}"
    )


def ratio_rtol(dtype: torch.dtype) -> float:
    """Return one unit in the last place; in float64, whose sums the reference adds in another order, a few."""
    return 1e-15 if dtype == torch.float64 else torch.finfo(dtype).eps


def check(case: Case, ways: list[Way], results: list[Result]) -> None:
    """Compare scaled gradients, or updates, with the reference. Ways that decide alike must have the same bits."""
    told: dict[tuple[float | None, ...], Tensor] = {}
    for way, result in zip(ways, results, strict=True):
        if way.op == SCALE_IN_THREE_OPS:
            squared_norms = reference.squared_norms(case.params), case.grad_squared_norms(way)
            rtol = 2.0**-23 if case.dtype.itemsize == 2 else 1e-13
            compare("squared norms", case, way, result.param_squared_norms, squared_norms[0], rtol)
            compare("squared norms", case, way, result.grad_squared_norms, squared_norms[1], rtol)
        ratios = told.setdefault(way.decides, result.ratios)
        compare("ratios", case, way, result.ratios, case.ratios(way), rtol=ratio_rtol(ratios.dtype))
        compare("ratios of two ways", case, way, result.ratios, ratios, rtol=0)
        grads = [grad.clone() for grad in case.grads]
        if way.of_updates:
            reference.scale_updates_(grads, case.params, ratios=ratios)
        else:
            reference.scale_gradients_(
                grads,
                case.params,
                maximize=way.maximize,
                weight_decays=case.weight_decays,
                ratios=ratios,
                lrs=case.lrs,
                lr_in_momentum=way.lr_in_momentum,
                lr_tensor=case.lr_tensor if way.has_lr_tensor else None,
                inv_scale=way.inv_scale,
            )
        compare("gradients", case, way, torch.cat(result.grads), torch.cat(grads), rtol=0)


def check_sgd(case: Case, ways: list[Way], results: list[Result]) -> None:
    """Compare steps of SGD with the reference."""
    for way, result in zip(ways, results, strict=True):
        if way.op == LARS_SGD:
            compare("ratios", case, way, result.ratios, case.ratios(way), rtol=ratio_rtol(result.ratios.dtype))
        params, momenta = [param.clone() for param in case.params], momenta_of(case, way)
        grads, scales, whole = case.grads, None, {}
        if way.momentum == torch.int8:
            shapes = [rows_of(layer) for layer in case.layers]
            params, grads, momenta = (
                [tensor.reshape(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
                for tensors in (params, grads, momenta)
            )
            scales = [of_codes for _, of_codes in coded_momenta(case)]
            whole["row_lengths"] = [layer.whole_row_length or rows_of(layer)[1] for layer in case.layers]
            whole["offsets"] = [layer.place for layer in case.layers]
        reference.sgd_(
            params,
            grads,
            momenta,
            momentum_scales=scales,
            **whole,
            maximize=way.maximize,
            weight_decays=case.weight_decays,
            lrs=case.lrs,
            lr_in_momentum=way.lr_in_momentum,
            lr_tensor=case.lr_tensor if way.has_lr_tensor else None,
            momentums=case.momentums if momenta else [0.0] * len(params),
            dampenings=case.dampenings,
            nesterov=way.nesterov,
            ratios=result.ratios if way.op == LARS_SGD or way.has_ratios else None,
            inv_scale=way.inv_scale,
        )
        flat = [
            torch.cat([tensor.flatten() for tensor in tensors])
            for tensors in (params, momenta, scales or [])
            if tensors
        ]
        compare("parameters", case, way, torch.cat(result.params), flat[0], rtol=0)
        if momenta:
            compare("momenta", case, way, torch.cat(result.momenta), flat[1], rtol=0)
        if scales:
            got = torch.cat([of_codes.flatten() for of_codes in result.momentum_scales])
            compare("scales of momenta", case, way, got, flat[2], rtol=0)


@cache
def has_sanitizers() -> bool:
    """Tell whether programs under AddressSanitizer can be built and run here."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        command = [GXX, *BUILDS["sanitized"], "-x", "c++", "-", "-o", program]
        compiler = subprocess.run(command, input=b"int main() {}", capture_output=True)
        return compiler.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0


def skip_without_sanitizers(build: str) -> None:
    if build == "sanitized" and not has_sanitizers():
        pytest.skip("this g++ cannot build programs that run under AddressSanitizer")
