"""Momentum in 8 bits: its coding against published bits and a version by hand, and that its rounding is unbiased."""

import numpy as np
import pytest
import torch
from cases import channels_last
from code_cases import arguments_of, assert_same_bits, by_hand, call, decoded, noise, sha256
from published import PUBLISHED

from torchlars import codes, ops

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = PUBLISHED["momentum in 8 bits"]


def fresh(param):
    """Codes and scales of no momentum."""
    return torch.zeros_like(param, dtype=torch.int8), torch.zeros(codes.scales_shape(param.shape))


def step(param, grad, kept, momentum=0.9, lr=0.1, weight_decay=0.0, **more):
    """Take a step of one layer."""
    ops.sgd_(
        [param],
        [grad],
        [kept[0]],
        momentum_scales=[kept[1]],
        maximize=False,
        weight_decays=[weight_decay],
        lrs=[lr],
        momentums=[momentum],
        dampenings=[0.0],
        **more,
    )


# Published bits


def test_three_steps_have_the_published_bits(backend):
    case = GOLDEN["bits"]
    shape = tuple(case["shape"])
    n = shape[0] * shape[1]
    param = (case["param_scale"] * noise(n, case["param_seed"])).float().reshape(shape)
    kept = fresh(param)
    for seed, expected in zip(case["grad_seeds"], case["steps"], strict=True):
        grad = (case["grad_scale"] * noise(n, seed)).float().reshape(shape)
        step(param, grad, kept, case["momentum"], case["lr"], case["weight_decay"])
        assert kept[0][0, 120:140].tolist() == expected["first_codes"]
        assert kept[1][0].tolist() == expected["first_scales"]
        assert sha256(kept[0]) == expected["codes"]
        assert sha256(kept[1]) == expected["scales"]
        assert sha256(param) == expected["param"]


def test_rounding_to_nearest_has_the_published_codes():
    case = GOLDEN["nearest"]
    momentum = torch.tensor(case["momentum"]).reshape(2, 128)
    coded = torch.full((2, 128), 99, dtype=torch.int8)
    scales = codes.encode(coded, momentum)
    assert coded.flatten().tolist() == case["codes"]
    assert scales.flatten().tolist() == torch.tensor(case["scales"]).tolist()


# By hand


def test_a_first_step_worked_by_hand(backend):
    """Two rows of three elements: a row is a block, and the largest of a block always has the code 127 or -127."""
    param = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])
    grad = torch.tensor([[2.0, 0.0, -0.5], [0.125, -0.0625, 0.0]])
    kept, before = fresh(param), param.clone()
    step(param, grad, kept, lr=0.5)
    assert torch.equal(param, before - 0.5 * grad)  # by the exact momentum
    assert torch.equal(kept[1], torch.tensor([[2.0], [0.125]]) / 127)
    # -0.5 is -31.75 of 2 / 127, and -0.0625 is -63.5 of 0.125 / 127. u of the first: bits(m) = 0xBF000000,
    # bits(p) = 0x3F000000, bits(a) = 0x40000000, i = 2; of the second: 0xBD800000, 0x40400000, 0x3E000000, i = 4.
    first = dither(0xBF000000, 0x3F000000, 0x40000000, 2)
    second = dither(0xBD800000, 0x40400000, 0x3E000000, 4)
    assert kept[0].tolist() == [[127, 0, -32 + (first >= 0.75)], [127, -64 + (second >= 0.5), 0]]


@pytest.mark.parametrize("length", [64, 128, 200])
@pytest.mark.parametrize(("sign", "param"), [(-1, 0.6538122296333313), (1, 0.891508162021637)])
def test_no_code_is_beyond_127(sign, param, length, backend):
    """a * (127 / a) rounds to 127.00001, to which a dither of 0.9999999 is added, or from which 1.8e-7 takes nothing."""
    largest = 0.9743247032165527
    bits = [np.float32(x).view(np.uint32).item() for x in (sign * largest, param, largest)]
    number = sign * np.float32(largest) * (np.float32(127) / np.float32(largest))
    assert np.floor(np.float32(number + np.float32(dither(*bits, 0)))) == (128 if sign > 0 else -128)
    layer, grad = torch.full((1, length), param), torch.zeros(1, length)
    grad[0, 0] = sign * largest
    kept = fresh(layer)
    step(layer, grad, kept, lr=0.5)
    assert kept[0][0, 0] == sign * 127


def dither(m, p, a, i):
    mask = 2**32 - 1
    h = (m * 0x9E3779B1 & mask) ^ (p + i * 0x7F4A7C15 + a * 0xC2B2AE3D & mask)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h = (h ^ h >> shift) * factor & mask
    return (h >> 8) / 2**24


@pytest.mark.parametrize("length", [1, 64, 127, 128, 129, 200, 300])
def test_steps_equal_those_by_hand(backend, length):
    random = torch.Generator().manual_seed(length)
    param = 0.05 * torch.randn(7, length, generator=random)
    kept = fresh(param)
    f = np.float32
    for number in range(3):
        grad = 0.01 * torch.randn(7, length, generator=random)
        m_old, p_old = decoded(*kept).numpy(), param.numpy().copy()
        direction = grad.numpy() + f(0.1) * p_old
        momentum = f(0.9) * m_old + direction
        step(param, grad, kept, weight_decay=0.1)
        assert_same_bits([param], [torch.from_numpy(p_old - f(0.1) * momentum)], f"parameter of step {number}")
        assert_same_bits(kept, by_hand(momentum, p_old), f"codes and scales of step {number}")


def test_the_inverse_of_a_scale_is_rounded_once(backend):
    """127 · (1 / a) would be another number for this a, and give another code."""
    momentum = torch.randn(1, 128, generator=torch.Generator().manual_seed(2841))
    assert 127 * momentum.abs().max().reciprocal() != torch.tensor(127.0).div(momentum.abs().max())
    param = torch.zeros(1, 128)
    kept = fresh(param)
    step(param, momentum, kept)
    assert_same_bits(kept, by_hand(momentum.numpy(), np.zeros((1, 128), np.float32)), "codes and scales")


def test_a_position_counts_from_the_offset_in_rows_of_the_whole_layer(backend):
    """Past 2³² elements it wraps around."""
    for offset, row_length in ((12800, 640), (2**32 - 200, 2**20 + 128)):
        arguments = arguments_of([(5, 128)], weight_decays=[0.0], momentums=[0.0], offsets=[offset])
        found = call({**arguments, "row_lengths": [row_length]})
        grad, param = arguments["grads"][0].numpy(), arguments["params"][0].numpy()
        expected = by_hand(grad, param, offset, row_length)
        assert_same_bits([found["momentum_buffers"][0], found["momentum_scales"][0]], expected, str(offset))
        assert not torch.equal(expected[0], by_hand(grad, param)[0])


def test_rows_of_channels_last_layers_are_those_of_their_memory(backend):
    random = torch.Generator().manual_seed(0)
    param, grad = (channels_last(torch.randn(3, 40, 3, 3, generator=random)) for _ in range(2))
    kept = fresh(param)
    before, by_rows = (x.permute(0, 2, 3, 1).reshape(3, 360).numpy().copy() for x in (param, grad))
    step(param, grad, kept)
    found = kept[0].permute(0, 2, 3, 1).reshape(3, 360), kept[1]
    assert_same_bits(found, by_hand(by_rows, before), "codes and scales")


# Special values


def test_decoding_gives_codes_times_the_scale_of_their_block():
    random = torch.Generator().manual_seed(0)
    coded = torch.randint(-127, 128, (3, 200), generator=random, dtype=torch.int8)
    scales = torch.rand(3, 2, generator=random)
    by_blocks = torch.cat([coded[:, :128] * scales[:, :1], coded[:, 128:] * scales[:, 1:]], dim=1)
    assert torch.equal(codes.decode(coded, scales), by_blocks)
    last = channels_last(coded.reshape(3, 10, 4, 5))
    in_memory = codes.decode(last, scales)
    assert in_memory.stride() == last.stride()
    flat = last.permute(0, 2, 3, 1).reshape(3, 200)
    expected = torch.cat([flat[:, :128] * scales[:, :1], flat[:, 128:] * scales[:, 1:]], dim=1)
    assert torch.equal(in_memory.permute(0, 2, 3, 1).reshape(3, 200), expected)


LEAST = 2.0**-100
MAGNITUDES = {
    # largest magnitude of a block, scale, whether it has codes
    "zero": (0.0, 0.0, False),
    "below the least": (LEAST * (1 - 2**-24), 0.0, False),
    "the least": (LEAST, LEAST / 127, True),
    "huge": (3e38, 3e38 / 127, True),
    "infinite": (torch.inf, torch.nan, False),
    "minus infinite": (-torch.inf, torch.nan, False),
    "NaN": (torch.nan, torch.nan, False),
    "minus NaN": (-torch.nan, torch.nan, False),
}


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_of_special_values_leaves_all_others_alone(backend, name, block):
    """Of two rows of three blocks, the last ones of 44 elements; NaN and infinity show in their own block."""
    largest, scale, has_codes = MAGNITUDES[name]
    random = torch.Generator().manual_seed(1)
    param, grad = torch.zeros(2, 300), torch.randn(2, 300, generator=random)
    usual = fresh(param)
    step(param.clone(), grad.clone(), usual)
    here = slice(128 * block, min(128 * block + 128, 300))
    grad[1, here] = 0.0
    grad[1, here][17] = largest
    kept, stepped = fresh(param), param.clone()
    step(stepped, grad, kept, lr=0.5)
    assert_same_bits([stepped], [param - 0.5 * grad], "parameter")
    expected = usual[0].clone(), usual[1].clone()
    expected[0][1, here] = 0
    expected[0][1, here][17] = 127 if has_codes else 0
    expected[1][1, block] = scale
    assert_same_bits(kept, expected, "codes and scales")
    step(stepped, torch.zeros_like(grad), kept)  # a fault stays
    assert int(decoded(*kept).isnan().sum()) == (0 if scale == scale else here.stop - here.start)


def test_codes_of_minus_128_are_never_written(backend):
    random = torch.Generator().manual_seed(2)
    param, grad = torch.randn(50, 256, generator=random), torch.randn(50, 256, generator=random)
    grad = torch.where(grad < 0, -1.0, 1.0 - 2**-20)  # of which most are a block's largest
    kept = fresh(param)
    step(param, grad, kept)
    assert kept[0].unique().tolist() in ([-127, 126, 127], [-127, 127])
    assert int((kept[0] == -127).sum()) == int((grad < 0).sum())


# Unbiased


FRACTIONS = (0.3, 0.1, 0.03)


@pytest.mark.parametrize(("momentum", "steps", "tolerance"), [(0.9, 100, 0.05), (0.99, 900, 0.08)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_small_elements_reach_their_momentum_and_die_out(backend, sign, momentum, steps, tolerance):
    """Beside one of 1 in each block; rounded to nearest they would stay at 0.01 to 0.66 of it."""
    fractions = torch.tensor([FRACTIONS[i % 3] for i in range(128)])
    fractions[0] = 1.0
    grad = (sign * fractions).expand(32, 128).contiguous()
    param = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    kept, sums = fresh(param), torch.zeros(128)
    for number in range(steps):
        step(param, grad, kept, momentum, lr=1e-3)
        if number >= steps // 2:
            sums += decoded(*kept).mean(0) / (1 - momentum ** (number + 1))
    reached = sums * (1 - momentum) / (steps - steps // 2) / (sign * fractions)
    assert float(reached[0]) == pytest.approx(1.0, rel=1e-3)
    for i, fraction in enumerate(FRACTIONS):
        average = float(reached[3 + i :: 3].mean())
        assert average == pytest.approx(1.0, abs=tolerance), fraction
    full, still = decoded(*kept), torch.zeros_like(grad)
    for _ in range(30):
        step(param, still, kept, momentum, lr=1e-3)
    for i, fraction in enumerate(FRACTIONS):
        left = float(decoded(*kept)[:, 3 + i :: 3].mean() / full[:, 3 + i :: 3].mean()) / momentum**30
        assert left == pytest.approx(1.0, abs=0.1), fraction
    for _ in range(120):
        step(param, still, kept, 0.5, lr=1e-3)
    assert not kept[0].any()
    assert not kept[1].any()
