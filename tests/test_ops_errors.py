"""Errors of the ops: each names the argument that is wrong, and nothing has changed."""

import pytest
import torch

from torchlars import ops

x, y = torch.ones(3), torch.ones(4)
d = torch.ones(2, dtype=torch.float64)
f32, i64, f8 = torch.float32, torch.int64, torch.float8_e4m3fn
nan, inf = float("nan"), float("inf")
sparse = torch.ones(3).to_sparse()
BAD_CALLS = {
    "no tensors": ("squared_norms", ([],), r"at least one tensor \(got: tensors is empty\)"),
    "mixed dtypes": ("squared_norms", ([x, x.double()],), r"one dtype \(tensors\[0\]: .*, tensors\[1\]: .*\)"),
    "mixed devices": ("squared_norms", ([x, x.to("meta")],), r"one device \(tensors\[0\]: cpu, tensors\[1\]: meta\)"),
    "integers": ("squared_norms", ([x.to(i64)],), r"expected float64, float32, .* \(tensors\[0\]: "),
    "float8": ("squared_norms", ([x.to(f8)],), r"expected float64, float32, .* \(tensors\[0\]: "),
    "sparse": ("squared_norms", ([sparse],), r"expected strided tensors \(tensors\[0\]: .*[Ss]parse"),
    "more grads": ("apply_trust_ratios_", ([x, x], [x], d.float(), [0.1] * 2, False), r"grads: 2, params: 1"),
    "more decays": ("apply_trust_ratios_", ([x], [x], d[:1].float(), [0.1] * 2, False), r"grads: 1, weight_decays: 2"),
    "more ratios": ("apply_trust_ratios_", ([x], [x], d.float(), [0.1], False), r"grads: 1, ratios: 2"),
    "ratios of another dtype": ("apply_trust_ratios_", ([x], [x], d[:1], [0.1], False), r"vector of .*[Ff]loat"),
    "ratios for float64": (
        "apply_trust_ratios_",
        ([x.double()], [x.double()], d[:1].float(), [0.1], False),
        r"vector of .*[Dd]ouble|vector of torch.float64",
    ),
    "shapes": (
        "apply_trust_ratios_",
        ([x], [y], d[:1].float(), [0.1], False),
        r"one shape \(grads\[0\]: \[3\], params\[0\]: \[4\]",
    ),
    "shapes, fused": (
        "scale_by_trust_ratios_",
        ([x], [y], [0.0], [1.0], [0.0], False),
        r"one shape \(grads\[0\]: \[3\]",
    ),
    "kinds": (
        "scale_by_trust_ratios_",
        ([x], [x.to(torch.complex64)], [0.1], [1.0], [0.0], False),
        r"both real or both complex",
    ),
    "expanded": (
        "scale_by_trust_ratios_",
        ([torch.ones(1).expand(3)], [x], [0.1], [1.0], [0.0], False),
        r"written in place \(grads\[0\]: shape \[3\], strides \[0\] overlap in memory\); clone it first",
    ),
    "windows": (
        "apply_trust_ratios_",
        ([torch.ones(7).as_strided((3, 4), (1, 1))], [torch.ones(3, 4)], d[:1].float(), [0.1], False),
        r"written in place \(grads\[0\]: shape \[3, 4\], strides \[1, 1\] overlap in memory\); clone it first",
    ),
    "decay < 0": ("scale_by_trust_ratios_", ([x], [x], [-0.1], [1.0], [0.0], False), r"weight_decays\[0\]: -0.1"),
    "decay NaN": ("apply_trust_ratios_", ([x], [x], d[:1].float(), [nan], False), r"weight_decays\[0\]: nan"),
    "coef = 0": (
        "trust_ratios",
        (d, d, [0.1] * 2, [1.0, 0.0], [0.0] * 2, f32),
        r"positive numbers \(trust_coefs\[1\]: 0",
    ),
    "coef inf": ("trust_ratios", (d, d, [0.1] * 2, [inf, 1.0], [0.0] * 2, f32), r"trust_coefs\[0\]: inf"),
    "eps < 0": ("trust_ratios", (d, d, [0.1] * 2, [1.0] * 2, [0.0, -1.0], f32), r"non-negative numbers \(eps\[1\]: -1"),
    "eps NaN": ("scale_by_trust_ratios_", ([x], [x], [0.1], [1.0], [nan], False), r"eps\[0\]: nan"),
    "fewer eps": ("trust_ratios", (d, d, [0.1] * 2, [1.0] * 2, [0.0], f32), r"param_squared_norms: 2, eps: 1"),
    "norms in float32": ("trust_ratios", (d.float(), d, [0.1] * 2, [1.0] * 2, [0.0] * 2, f32), r"vector of float64"),
    "norms of other length": (
        "trust_ratios",
        (d, d[:1], [0.1] * 2, [1.0] * 2, [0.0] * 2, f32),
        r"param_squared_norms: 2, grad_squared_norms: 1",
    ),
    "a matrix of norms": (
        "trust_ratios",
        (d.view(2, 1), d, [0.1] * 2, [1.0] * 2, [0.0] * 2, f32),
        r"vector of float64",
    ),
    "norms on two devices": (
        "trust_ratios",
        (d, d.to("meta"), [0.1] * 2, [1.0] * 2, [0.0] * 2, f32),
        r"one device \(param_squared_norms: cpu, grad_squared_norms: meta\)",
    ),
    "norms with gaps": (
        "trust_ratios",
        (torch.ones(4, dtype=torch.float64)[::2], d, [0.1] * 2, [1.0] * 2, [0.0] * 2, f32),
        r"a contiguous vector of float64 \(param_squared_norms: shape \[2\]",
    ),
    "norms of gradients with gaps": (
        "trust_ratios",
        (d, torch.ones(4, dtype=torch.float64)[::2], [0.1] * 2, [1.0] * 2, [0.0] * 2, f32),
        r"a contiguous vector of float64 \(grad_squared_norms: shape \[2\]",
    ),
    "ratios in float16": (
        "trust_ratios",
        (d, d, [0.1] * 2, [1.0] * 2, [0.0] * 2, torch.float16),
        r"float64 or float32",
    ),
}
fused_call = ([x], [x], [0.1], [1.0], [0.0], False)
update_call = ([x], [x.clone()], [1.0], [0.0])
BAD_CALLS |= {
    "sums of nothing": ("squared_norms_of_sums", ([], [], []), r"at least one tensor \(got: tensors is empty\)"),
    "more others": ("squared_norms_of_sums", ([x], [x, x], [1.0]), r"one length \(tensors: 1, others: 2\)"),
    "more scales": ("squared_norms_of_sums", ([x], [x], [1.0, 1.0]), r"one length \(tensors: 1, scales: 2\)"),
    "scale NaN": ("squared_norms_of_sums", ([x], [x], [nan]), r"finite numbers \(scales\[0\]: nan\)"),
    "sums of shapes": (
        "squared_norms_of_sums",
        ([x], [y], [1.0]),
        r"tensors and others of one shape \(tensors\[0\]: \[3\], others\[0\]: \[4\]\)",
    ),
    "clip without lrs": ("scale_by_trust_ratios_", (*fused_call, [], None, False, True), r"grads: 1, lrs: 0"),
    "lr in momentum without lrs": (
        "scale_by_trust_ratios_",
        (*fused_call, [], None, False, False, True),
        r"one length \(grads: 1, lrs: 0\)",
    ),
    "more lrs": ("scale_by_trust_ratios_", (*fused_call, [0.1, 0.1]), r"one length \(grads: 1, lrs: 2\)"),
    "lr < 0": ("scale_by_trust_ratios_", (*fused_call, [-0.1]), r"non-negative numbers \(lrs\[0\]: -0.1\)"),
    "lr inf": ("apply_trust_ratios_", ([x], [x], d[:1].float(), [0.1], False, [inf]), r"numbers \(lrs\[0\]: inf\)"),
    "lr_scale in float32": (
        "apply_trust_ratios_",
        ([x], [x], d[:1].float(), [0.1], False, [0.1], torch.tensor(0.5)),
        r"lr_scale to be one float64 on cpu \(got: shape \[\], .*[Ff]loat",
    ),
    "ratios of updates without lrs": (
        "trust_ratios",
        (d, d, [0.0] * 2, [1.0] * 2, [0.0] * 2, f32, [], None, False, True),
        r"one length \(param_squared_norms: 2, lrs: 0\)",
    ),
    "two lr_scales": (
        "trust_ratios",
        (d, d, [0.0] * 2, [1.0] * 2, [0.0] * 2, f32, [0.1] * 2, d),
        r"lr_scale to be one float64 on cpu \(got: shape \[2\]",
    ),
    "updates of another dtype": (
        "apply_trust_ratios_to_updates_",
        ([x], [x.double()], d[:1]),
        r"params and old_params of one dtype \(params\[0\]: .*, old_params\[0\]: ",
    ),
    "updates of another shape": (
        "apply_trust_ratios_to_updates_",
        ([x], [y], d[:1].float()),
        r"params and old_params of one shape \(params\[0\]: \[3\], old_params\[0\]: \[4\]\)",
    ),
    "more updates than ratios": (
        "apply_trust_ratios_to_updates_",
        ([x, x], [x, x], d[:1].float()),
        r"params: 2, ratios: 1",
    ),
    "ratios of updates in float64": ("apply_trust_ratios_to_updates_", ([x], [x], d[:1]), r"vector of .*[Ff]loat"),
    "an expanded update": (
        "apply_trust_ratios_to_updates_",
        ([torch.ones(1).expand(3)], [x], d[:1].float()),
        r"params that can be written in place \(params\[0\]: shape \[3\], strides \[0\] overlap in memory\); clone it",
    ),
    "updates without lrs": ("scale_updates_by_trust_ratios_", (*update_call, [], False), r"params: 1, lrs: 0"),
    "updates with coef 0": (
        "scale_updates_by_trust_ratios_",
        ([x], [x], [0.0], [0.0], [0.1], False),
        r"positive numbers \(trust_coefs\[0\]: 0",
    ),
    "updates with eps < 0": (
        "scale_updates_by_trust_ratios_",
        ([x], [x], [1.0], [-1.0], [0.1], False),
        r"non-negative numbers \(eps\[0\]: -1",
    ),
    "updates on two devices": (
        "scale_updates_by_trust_ratios_",
        ([x], [x.to("meta")], [1.0], [0.0], [0.1], False),
        r"one device \(params\[0\]: cpu, old_params\[0\]: meta\)",
    ),
}
without_inv_scale = {
    "squared_norms": ([x],),
    "squared_norms_of_sums": ([x], [x], [1.0]),
    "apply_trust_ratios_": ([x], [x], d[:1].float(), [0.1], False, [], None),
    "scale_by_trust_ratios_": (*fused_call, [], None, False, False, False),
}
for op, arguments in without_inv_scale.items():
    got = r"expected inv_scale to be one float32 on cpu \(got: shape "
    BAD_CALLS |= {
        f"inv_scale in float64, {op}": (op, (*arguments, d[0]), got + r"\[\], .*([Dd]ouble|float64), cpu\)"),
        f"two inv_scales, {op}": (op, (*arguments, d.float()), got + r"\[2\], .*[Ff]loat.*, cpu\)"),
        f"inv_scale elsewhere, {op}": (op, (*arguments, d[0].float().to("meta")), got + r"\[\], .*, meta\)"),
    }


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls_are_refused_and_change_nothing(backend, bad):
    op, arguments, message = BAD_CALLS[bad]
    grads = arguments[0] if op.endswith("_") else []
    before = [grad.clone() for grad in grads]
    with pytest.raises(RuntimeError, match=message) as raised:
        getattr(ops, op)(*arguments)
    assert str(raised.value).startswith(f"{op}: "), "the message opens with the op's name"
    assert all(torch.equal(grad, copy) for grad, copy in zip(grads, before, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        (None,),
        ([None],),
        (torch.ones(3), 3),
        ("abc",),
        ([1.0, 2.0],),
    ],
)
def test_arguments_of_the_wrong_kind_raise(backend, arguments):
    with pytest.raises((TypeError, RuntimeError, AttributeError)):
        ops.squared_norms(*arguments)
