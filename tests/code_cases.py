"""Layers with momentum in 8 bits for tests: arguments of sgd_, comparison to the bit, and the coding by hand."""

import hashlib
import math

import numpy as np
import torch
from cases import as_it_is, copied

from torchlars import ops

WRITTEN = ("params", "momentum_buffers", "momentum_scales")
CODED_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(n, seed):
    """The sequence of the published numbers, float64."""
    x, values = (seed * 2654435761 + 12345) % 2**32, []
    for _ in range(n):
        x = (1664525 * x + 1013904223) % 2**32
        values.append((x >> 8) / 2**23 - 1)
    return torch.tensor(values, dtype=torch.float64)


def sha256(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def scales_shape(shape):
    return shape[0], math.ceil(math.prod(shape[1:]) / 128)


def arguments_of(shapes, dtype=torch.float32, *, grad_dtype=None, layout=as_it_is, seed=0, **different):
    """Arguments of sgd_ by name. Momentum has begun, and each layer has numbers of its own."""
    random = torch.Generator().manual_seed(seed)

    def tensors(scale, dtype):
        return [layout((scale * torch.randn(shape, generator=random)).to(dtype)) for shape in shapes]

    params, grads, n = tensors(0.05, dtype), tensors(0.01, grad_dtype or dtype), len(shapes)
    old = [torch.randint(-127, 128, shape, generator=random, dtype=torch.int8) for shape in shapes]
    return {
        "params": params,
        "grads": grads,
        "momentum_buffers": [
            torch.empty_like(p, dtype=torch.int8).copy_(codes) for p, codes in zip(params, old, strict=True)
        ],
        "momentum_scales": [1e-4 * torch.rand(scales_shape(shape), generator=random) for shape in shapes],
        "maximize": False,
        "weight_decays": [0.05 * (i % 3) for i in range(n)],
        "lrs": [0.1 * (1 + i % 4) for i in range(n)],
        "momentums": [0.9 - 0.1 * (i % 4) for i in range(n)],
        "dampenings": [0.0] * n,
        **different,
    }


def call(arguments, module=ops, **different):
    """Call sgd_ with copies of what it writes. Return those, and the ratios that it measures."""
    taken = {**arguments, **{name: [copied(x) for x in arguments[name]] for name in WRITTEN}, **different}
    if taken.get("trust_coefs"):
        taken["ratios"] = torch.full((len(taken["params"]),), 7.0)
    grads = [copied(grad) for grad in taken["grads"]]
    module.sgd_(**taken)
    assert_same_bits(taken["grads"], grads, "gradient")
    return {name: taken[name] for name in WRITTEN} | {"ratios": taken.get("ratios")}


def assert_same_bits(ones, others, what):
    """NaN equals NaN."""
    for i, (one, other) in enumerate(zip(ones, others, strict=True)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), f"{what} {i}"
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
        same = one.detach().contiguous().view(kind) == other.detach().contiguous().view(kind)
        if one.is_floating_point():
            same |= one.isnan() & other.isnan()
        assert bool(same.all()), f"{what} {i}: {int((~same).sum())} of {same.numel()} elements differ"


def assert_same_results(actual, expected):
    for name in WRITTEN:
        assert_same_bits(actual[name], expected[name], name)


def by_hand(momentum, params, start=0, stride=None):
    """The codes and scales of rows, as the contract says, in numpy, whose integers wrap around and round as they are."""
    f, u = np.float32, np.uint32
    rows, length = momentum.shape
    stride = length if stride is None else stride
    codes = np.zeros((rows, length), np.int8)
    scales = np.zeros((rows, math.ceil(length / 128)), f)
    for row in range(rows):
        for block in range(scales.shape[1]):
            part = np.s_[row, 128 * block : min(128 * (block + 1), length)]
            m, w = momentum[part].astype(f), params[part].astype(f)
            a = np.max(np.abs(m))
            if not np.isfinite(a):  # numpy's max is NaN where any is
                scales[row, block] = np.nan
            elif a >= f(2.0**-100):
                i = (start + row * stride + 128 * block + np.arange(len(m))).astype(np.uint64) % 2**32
                salt = w.view(u) + i.astype(u) * u(0x7F4A7C15) + np.full(1, a).view(u) * u(0xC2B2AE3D)
                h = (m.view(u) * u(0x9E3779B1)) ^ salt
                h = (h ^ (h >> u(16))) * u(0x7FEB352D)
                h = (h ^ (h >> u(15))) * u(0x846CA68B)
                h = h ^ (h >> u(16))
                dither = (h >> u(8)).astype(f) * f(2.0**-24)
                scales[row, block] = a / f(127)
                codes[part] = np.clip(np.floor(m * (f(127) / a) + dither), -127, 127).astype(np.int8)
    return torch.from_numpy(codes), torch.from_numpy(scales)


def decoded(codes, scales):
    """The momentum of rows."""
    return codes.float() * scales.repeat_interleave(128, dim=1)[:, : codes.shape[1]]
