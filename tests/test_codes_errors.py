"""Errors of sgd_ with momentum in 8 bits: each names the argument that is wrong, and nothing has changed."""

import math

import pytest
import torch
from code_cases import WRITTEN, arguments_of

from torchlars import ops

x, y = torch.ones(3, 200), torch.ones(4, 128)
codes = [torch.ones(3, 200, dtype=torch.int8), torch.ones(4, 128, dtype=torch.int8)]
scales = [torch.ones(3, 2), torch.ones(4, 1)]
GIVEN = "where momentum_scales are given"
KINDS = rf"expected float32, bfloat16 or float16 {GIVEN} \(params\[0\]: "
BY_ROWS = rf"params that fill their memory row by row {GIVEN} \(params\[0\]: shape "
BLOCKS = r"contiguous momentum_scales of one number for each block of a row \(momentum_scales\["
BAD_CALLS = {
    "fewer codes": ({"momentum_buffers": codes[:1]}, r"one length \(grads: 2, momentum_buffers: 1\)"),
    "fewer scales": ({"momentum_scales": scales[:1]}, r"one length \(grads: 2, momentum_scales: 1\)"),
    "no scales": ({"momentum_scales": []}, r"one length \(grads: 2, momentum_scales: 0\)"),
    "no codes": (
        {"momentum_buffers": [], "momentums": [0.0, 0.0]},
        r"expected momentum_buffers where momentum_scales are given$",
    ),
    "float64": (
        {"params": [x.double(), y.double()], "grads": [x.double(), y.double()]},
        KINDS + r".*, grads\[0\]: .*\)",
    ),
    "gradients in float64": ({"grads": [x.double(), y.double()]}, KINDS + r".*, grads\[0\]: .*([Dd]ouble|float64)\)"),
    "complex64": ({"params": [x * 1j, y * 1j], "grads": [x * 1j, y * 1j]}, KINDS),
    "no dimensions": (
        {"params": [torch.ones(()), y], "grads": [torch.ones(()), y]},
        BY_ROWS + r"\[\], strides \[\]\)",
    ),
    "a transposed parameter": (
        {"params": [torch.ones(200, 3).t(), y]},
        BY_ROWS + r"\[3, 200\], strides \[1, 3\]\)",
    ),
    "rows with gaps": (
        {"params": [torch.ones(3, 201)[:, :200], y]},
        BY_ROWS + r"\[3, 200\], strides \[201, 1\]\)",
    ),
    "elements with gaps": (
        {"params": [torch.ones(3, 400)[:, ::2], y]},
        BY_ROWS + r"\[3, 200\], strides \[400, 2\]\)",
    ),
    "codes in uint8": (
        {"momentum_buffers": [codes[0], codes[1].to(torch.uint8)]},
        rf"momentum_buffers of .*([Cc]har|int8) {GIVEN} \(momentum_buffers\[1\]: .*([Bb]yte|uint8)\)",
    ),
    "codes in float32": (
        {"momentum_buffers": [x, codes[1]]},
        rf"momentum_buffers of .* {GIVEN} \(momentum_buffers\[0\]: .*[Ff]loat",
    ),
    "sparse codes": (
        {"momentum_buffers": [codes[0].to_sparse(), codes[1]]},
        rf"momentum_buffers of .* {GIVEN} \(momentum_buffers\[0\]: ",
    ),
    "codes elsewhere": (
        {"momentum_buffers": [codes[0], codes[1].to("meta")]},
        r"one device \(params\[1\]: cpu, momentum_buffers\[1\]: meta\)",
    ),
    "codes of another shape": (
        {"momentum_buffers": [codes[0], torch.ones(128, 4, dtype=torch.int8)]},
        r"one shape \(params\[1\]: \[4, 128\], momentum_buffers\[1\]: \[128, 4\]\)",
    ),
    "expanded codes": (
        {"momentum_buffers": [codes[0], codes[1][:1].expand(4, 128)]},
        r"momentum_buffers that can be written in place \(momentum_buffers\[1\]: shape \[4, 128\], strides \[0, 1\]",
    ),
    "scales in float64": (
        {"momentum_scales": [scales[0].double(), scales[1]]},
        rf"momentum_scales of .*[Ff]loat.* {GIVEN} \(momentum_scales\[0\]: .*([Dd]ouble|float64)\)",
    ),
    "scales in bfloat16": (
        {"momentum_scales": [scales[0], scales[1].bfloat16()]},
        rf"momentum_scales of .* {GIVEN} \(momentum_scales\[1\]: .*[Bb][Ff]loat16\)",
    ),
    "scales elsewhere": (
        {"momentum_scales": [scales[0].to("meta"), scales[1]]},
        r"one device \(params\[0\]: cpu, momentum_scales\[0\]: meta\)",
    ),
    "one scale a row": (
        {"momentum_scales": [torch.ones(3, 1), scales[1]]},
        BLOCKS + r"0\]: shape \[3, 1\], expected: \[3, 2\]\)",
    ),
    "too many scales": (
        {"momentum_scales": [scales[0], torch.ones(4, 2)]},
        BLOCKS + r"1\]: shape \[4, 2\], expected: \[4, 1\]\)",
    ),
    "scales in a vector": (
        {"momentum_scales": [torch.ones(6), scales[1]]},
        BLOCKS + r"0\]: shape \[6\], expected: \[3, 2\]\)",
    ),
    "scales transposed": (
        {"momentum_scales": [torch.ones(2, 3).t(), scales[1]]},
        BLOCKS + r"0\]: shape \[3, 2\], expected: \[3, 2\]\)",
    ),
    "row_lengths without scales": (
        {"momentum_scales": None, "momentum_buffers": [x, y], "row_lengths": [200, 128], "offsets": [0, 0]},
        r"expected momentum_scales where row_lengths are given",
    ),
    "offsets without row_lengths": ({"offsets": [0, 0]}, r"one length \(grads: 2, row_lengths: 0\)"),
    "offsets without row_lengths and scales": (
        {"momentum_scales": None, "momentum_buffers": [x, y], "offsets": [0, 0]},
        r"one length \(grads: 2, row_lengths: 0\)|expected momentum_scales where offsets are given",
    ),
    "fewer row_lengths": ({"row_lengths": [200], "offsets": [0, 0]}, r"one length \(grads: 2, row_lengths: 1\)"),
    "fewer offsets": ({"row_lengths": [200, 128], "offsets": [0]}, r"one length \(grads: 2, offsets: 1\)"),
    "row_lengths without offsets": ({"row_lengths": [200, 128]}, r"one length \(grads: 2, offsets: 0\)"),
    "codes without scales": (
        {"momentum_scales": None},
        r"expected float64, float32, .* \(momentum_buffers\[0\]: ",
    ),
    # as without codes
    "a gradient of another shape": (
        {"grads": [y, y]},
        r"one shape \(grads\[0\]: \[4, 128\], params\[0\]: \[3, 200\]\)",
    ),
    "an expanded parameter": (
        {"params": [x[:1].expand(3, 200), y]},
        r"params that can be written in place \(params\[0\]: shape \[3, 200\], strides \[0, 1\] overlap",
    ),
    "momentum NaN": ({"momentums": [0.9, math.nan]}, r"non-negative numbers \(momentums\[1\]: nan\)"),
    "fewer dampenings": ({"dampenings": [0.0]}, r"one length \(grads: 2, dampenings: 1\)"),
    "ratios in float64": (
        {"ratios": torch.ones(2, dtype=torch.float64)},
        r"ratios to be a contiguous vector of .*loat",
    ),
    "inv_scale of two": ({"inv_scale": torch.ones(2)}, r"inv_scale to be one float32 on cpu \(got: shape \[2\]"),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls_are_refused_and_change_nothing(backend, bad):
    different, message = BAD_CALLS[bad]
    arguments = {**arguments_of([(3, 200), (4, 128)]), **different}
    tensors = [tensor for name in (*WRITTEN, "grads") for tensor in arguments[name] or ()]
    before = [(tensor._version, tensor.clone()) for tensor in tensors]
    with pytest.raises(RuntimeError, match=message) as raised:
        ops.sgd_(**arguments)
    assert str(raised.value).startswith("sgd_: expected "), "the message opens with the op's name"
    for tensor, (version, value) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert tensor.device.type == "meta" or torch.equal(tensor.to_dense(), value.to_dense())


def test_the_call_that_all_bad_ones_are_made_of_is_good(backend):
    arguments = arguments_of([(3, 200), (4, 128)])
    before = [codes.clone() for codes in arguments["momentum_buffers"]]
    ops.sgd_(**arguments, row_lengths=[200, 128], offsets=[0, 0])
    assert not any(map(torch.equal, arguments["momentum_buffers"], before))


def test_lazily_negated_scales_are_refused_by_kernels(extension):
    """Kernels read memory, which holds the negative."""
    arguments = arguments_of([(3, 200), (4, 128)])
    arguments["momentum_scales"] = [torch._neg_view(-scales[0]), scales[1]]
    with pytest.raises(RuntimeError, match=BLOCKS):
        ops.sgd_(**arguments)
