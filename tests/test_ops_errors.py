"""Errors of the ops: each names the argument that is wrong, and nothing has changed."""

import pytest
import torch

from torchlars import ops

x, y = torch.ones(3), torch.ones(4)
d = torch.ones(2, dtype=torch.float64)
f32, i64, f8 = torch.float32, torch.int64, torch.float8_e4m3fn
nan, inf = float("nan"), float("inf")
sparse = torch.ones(3).to_sparse()


def given(grads, params, ratios, weight_decays, **more):
    """Gradients that are scaled by ratios that are read."""
    return ("scale_gradients_", (grads, params), {"ratios": ratios, "weight_decays": weight_decays, **more})


def measured(grads, params, weight_decays, trust_coefs, eps, **more):
    """Gradients that are scaled by ratios that are measured."""
    hyper = {"weight_decays": weight_decays, "trust_coefs": trust_coefs, "eps": eps}
    return ("scale_gradients_", (grads, params), {"ratios": torch.zeros(len(grads)), **hyper, **more})


def decided(params, grads, weight_decays, trust_coefs, eps, dtype, **more):
    hyper = {"weight_decays": weight_decays, "trust_coefs": trust_coefs, "eps": eps}
    return ("trust_ratios", (params, grads), {**hyper, "dtype": dtype, **more})


def updates(params, old_params, ratios, **more):
    return ("scale_updates_", (params, old_params), {"ratios": ratios, **more})


def measured_updates(params, old_params, trust_coefs, eps, lrs, **more):
    hyper = {"trust_coefs": trust_coefs, "eps": eps, "lrs": lrs}
    return updates(params, old_params, torch.zeros(len(params)), **hyper, **more)


def norms(tensors, others=None, scales=(), **more):
    return ("squared_norms", (tensors,), {"others": others, "scales": scales, **more})


one = d[:1].float()  # the ratio of one layer
measured_call = ([x], [x], [0.1], [1.0], [0.0])
two = ([0.1] * 2, [1.0] * 2, [0.0] * 2)
BAD_CALLS = {
    "no tensors": (norms([]), r"at least one tensor \(got: tensors is empty\)"),
    "mixed dtypes": (norms([x, x.double()]), r"one dtype \(tensors\[0\]: .*, tensors\[1\]: .*\)"),
    "mixed devices": (norms([x, x.to("meta")]), r"one device \(tensors\[0\]: cpu, tensors\[1\]: meta\)"),
    "integers": (norms([x.to(i64)]), r"expected float64, float32, .* \(tensors\[0\]: "),
    "float8": (norms([x.to(f8)]), r"expected float64, float32, .* \(tensors\[0\]: "),
    "sparse": (norms([sparse]), r"expected strided tensors \(tensors\[0\]: .*[Ss]parse"),
    "more grads": (given([x, x], [x], d.float(), [0.1] * 2), r"grads: 2, params: 1"),
    "more decays": (given([x], [x], one, [0.1] * 2), r"grads: 1, weight_decays: 2"),
    "more ratios": (given([x], [x], d.float(), [0.1]), r"grads: 1, ratios: 2"),
    "ratios of another dtype": (given([x], [x], d[:1], [0.1]), r"vector of .*[Ff]loat"),
    "ratios for float64": (
        given([x.double()], [x.double()], one, [0.1]),
        r"vector of .*[Dd]ouble|vector of torch.float64",
    ),
    "shapes": (given([x], [y], one, [0.1]), r"one shape \(grads\[0\]: \[3\], params\[0\]: \[4\]"),
    "shapes, measured": (measured([x], [y], [0.0], [1.0], [0.0]), r"one shape \(grads\[0\]: \[3\]"),
    "kinds": (measured([x], [x.to(torch.complex64)], [0.1], [1.0], [0.0]), r"both real or both complex"),
    "expanded": (
        measured([torch.ones(1).expand(3)], [x], [0.1], [1.0], [0.0]),
        r"written in place \(grads\[0\]: shape \[3\], strides \[0\] overlap in memory\); clone it first",
    ),
    "windows": (
        given([torch.ones(7).as_strided((3, 4), (1, 1))], [torch.ones(3, 4)], one, [0.1]),
        r"written in place \(grads\[0\]: shape \[3, 4\], strides \[1, 1\] overlap in memory\); clone it first",
    ),
    "decay < 0": (measured([x], [x], [-0.1], [1.0], [0.0]), r"weight_decays\[0\]: -0.1"),
    "decay NaN": (given([x], [x], one, [nan]), r"weight_decays\[0\]: nan"),
    "coef = 0": (decided(d, d, [0.1] * 2, [1.0, 0.0], [0.0] * 2, f32), r"positive numbers \(trust_coefs\[1\]: 0"),
    "coef inf": (decided(d, d, [0.1] * 2, [inf, 1.0], [0.0] * 2, f32), r"trust_coefs\[0\]: inf"),
    "eps < 0": (decided(d, d, [0.1] * 2, [1.0] * 2, [0.0, -1.0], f32), r"non-negative numbers \(eps\[1\]: -1"),
    "eps NaN": (measured([x], [x], [0.1], [1.0], [nan]), r"eps\[0\]: nan"),
    "fewer eps": (decided(d, d, [0.1] * 2, [1.0] * 2, [0.0], f32), r"param_squared_norms: 2, eps: 1"),
    "norms in float32": (decided(d.float(), d, *two, f32), r"vector of float64"),
    "norms of other length": (decided(d, d[:1], *two, f32), r"param_squared_norms: 2, grad_squared_norms: 1"),
    "a matrix of norms": (decided(d.view(2, 1), d, *two, f32), r"vector of float64"),
    "norms on two devices": (
        decided(d, d.to("meta"), *two, f32),
        r"one device \(param_squared_norms: cpu, grad_squared_norms: meta\)",
    ),
    "norms with gaps": (
        decided(torch.ones(4, dtype=torch.float64)[::2], d, *two, f32),
        r"a contiguous vector of float64 \(param_squared_norms: shape \[2\]",
    ),
    "norms of gradients with gaps": (
        decided(d, torch.ones(4, dtype=torch.float64)[::2], *two, f32),
        r"a contiguous vector of float64 \(grad_squared_norms: shape \[2\]",
    ),
    "ratios in float16": (decided(d, d, *two, torch.float16), r"float64 or float32"),
    "sums of nothing": (norms([], [], []), r"at least one tensor \(got: tensors is empty\)"),
    "more others": (norms([x], [x, x], [1.0]), r"one length \(tensors: 1, others: 2\)"),
    "more scales": (norms([x], [x], [1.0, 1.0]), r"one length \(tensors: 1, scales: 2\)"),
    "scale NaN": (norms([x], [x], [nan]), r"finite numbers \(scales\[0\]: nan\)"),
    "sums of shapes": (
        norms([x], [y], [1.0]),
        r"tensors and others of one shape \(tensors\[0\]: \[3\], others\[0\]: \[4\]\)",
    ),
    "clip without lrs": (measured(*measured_call, clip=True), r"grads: 1, lrs: 0"),
    "lr in momentum without lrs": (measured(*measured_call, lr_in_momentum=True), r"one length \(grads: 1, lrs: 0\)"),
    "more lrs": (measured(*measured_call, lrs=[0.1, 0.1]), r"one length \(grads: 1, lrs: 2\)"),
    "lr < 0": (measured(*measured_call, lrs=[-0.1]), r"non-negative numbers \(lrs\[0\]: -0.1\)"),
    "lr inf": (given([x], [x], one, [0.1], lrs=[inf]), r"numbers \(lrs\[0\]: inf\)"),
    "lr_tensor in float32": (
        given([x], [x], one, [0.1], lrs=[0.1], lr_tensor=torch.tensor(0.5)),
        r"lr_tensor to be one float64 on cpu \(got: shape \[\], .*[Ff]loat",
    ),
    "ratios of updates without lrs": (
        decided(d, d, *two, f32, of_updates=True),
        r"one length \(param_squared_norms: 2, lrs: 0\)",
    ),
    "two lr_tensors": (
        decided(d, d, *two, f32, lrs=[0.1] * 2, lr_tensor=d),
        r"lr_tensor to be one float64 on cpu \(got: shape \[2\]",
    ),
    "updates of another dtype": (
        updates([x], [x.double()], d[:1]),
        r"params and old_params of one dtype \(params\[0\]: .*, old_params\[0\]: ",
    ),
    "updates of another shape": (
        updates([x], [y], one),
        r"params and old_params of one shape \(params\[0\]: \[3\], old_params\[0\]: \[4\]\)",
    ),
    "more updates than ratios": (updates([x, x], [x, x], one), r"params: 2, ratios: 1"),
    "ratios of updates in float64": (updates([x], [x], d[:1]), r"vector of .*[Ff]loat"),
    "an expanded update": (
        updates([torch.ones(1).expand(3)], [x], one),
        r"params that can be written in place \(params\[0\]: shape \[3\], strides \[0\] overlap in memory\); clone it",
    ),
    "updates without lrs": (measured_updates([x], [x.clone()], [1.0], [0.0], []), r"params: 1, lrs: 0"),
    "updates with coef 0": (
        measured_updates([x], [x], [0.0], [0.0], [0.1]),
        r"positive numbers \(trust_coefs\[0\]: 0",
    ),
    "updates with eps < 0": (
        measured_updates([x], [x], [1.0], [-1.0], [0.1]),
        r"non-negative numbers \(eps\[0\]: -1",
    ),
    "updates on two devices": (
        measured_updates([x], [x.to("meta")], [1.0], [0.0], [0.1]),
        r"one device \(params\[0\]: cpu, old_params\[0\]: meta\)",
    ),
}

# No argument is accepted and ignored.
BAD_CALLS |= {
    "scales without others": (norms([x], scales=[1.0]), r"expected others where scales are given"),
    "others without scales": (norms([x], [x]), r"one length \(tensors: 1, scales: 0\)"),
    "no others": (norms([x], [], []), r"at least one tensor \(got: others is empty\)"),
    "lr_tensor without lrs": (decided(d, d, *two, f32, lr_tensor=d[0]), r"expected lrs where lr_tensor is given"),
    "lr_tensor without lrs, gradients": (
        given([x], [x], one, [0.1], lr_tensor=d[0]),
        r"expected lrs where lr_tensor is given",
    ),
    "lr_tensor without lrs, updates": (
        updates([x], [x], one, lr_tensor=d[0]),
        r"expected lrs where lr_tensor is given",
    ),
    "lrs without coefs, updates": (updates([x], [x], one, lrs=[0.1]), r"expected trust_coefs where lrs are given"),
    "clip without coefs, updates": (updates([x], [x], one, clip=True), r"expected trust_coefs where clip is True"),
    "eps without coefs, updates": (updates([x], [x], one, eps=[0.0]), r"expected trust_coefs where eps are given"),
    "coefs without eps, updates": (updates([x], [x], one, trust_coefs=[1.0], lrs=[0.1]), r"params: 1, eps: 0"),
    "more ratios to write": (
        measured(*measured_call, ratios=torch.zeros(2)),
        r"one length \(grads: 1, ratios: 2\)",
    ),
    "ratios to write in float64": (measured(*measured_call, ratios=d[:1]), r"vector of .*[Ff]loat"),
    "lr_in_momentum without lrs, given ratios": (given([x], [x], one, [0.1], lr_in_momentum=True), r"grads: 1, lrs: 0"),
    "lr_in_momentum without lrs, no ratios": (given([x], [x], None, [0.1], lr_in_momentum=True), r"grads: 1, lrs: 0"),
}
for name, ratios in (("given ratios", one), ("no ratios", None)):
    BAD_CALLS |= {
        f"clip, {name}": (
            given([x], [x], ratios, [0.1], clip=True, lrs=[0.1]),
            r"expected trust_coefs where clip is True",
        ),
        f"decayed_norm, {name}": (
            given([x], [x], ratios, [0.1], decayed_norm=True),
            r"expected trust_coefs where decayed_norm is True",
        ),
        f"eps, {name}": (given([x], [x], ratios, [0.1], eps=[0.0]), r"expected trust_coefs where eps are given"),
    }
BAD_CALLS |= {
    "coefs without ratios": (measured(*measured_call, ratios=None), r"expected ratios where trust_coefs are given"),
    "coefs without eps": (given([x], [x], one, [0.1], trust_coefs=[1.0]), r"grads: 1, eps: 0"),
}

without_inv_scale = {
    "squared_norms": norms([x]),
    "squared_norms of sums": norms([x], [x], [1.0]),
    "scale_gradients_": given([x], [x], None, [0.1]),
    "scale_gradients_, given ratios": given([x], [x], one, [0.1]),
    "scale_gradients_, measured": measured(*measured_call),
}
for name, (op, arguments, more) in without_inv_scale.items():
    got = r"expected inv_scale to be one float32 on cpu \(got: shape "
    for what, inv_scale, message in (
        ("inv_scale in float64", d[0], r"\[\], .*([Dd]ouble|float64), cpu\)"),
        ("two inv_scales", d.float(), r"\[2\], .*[Ff]loat.*, cpu\)"),
        ("inv_scale elsewhere", d[0].float().to("meta"), r"\[\], .*, meta\)"),
    ):
        BAD_CALLS[f"{what}, {name}"] = ((op, arguments, {**more, "inv_scale": inv_scale}), got + message)


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls_are_refused_and_change_nothing(backend, bad):
    (op, arguments, more), message = BAD_CALLS[bad]
    more = {"maximize": False, **more} if op == "scale_gradients_" else more
    written = [*arguments[0], *([] if more.get("ratios") is None else [more["ratios"]])] if op.endswith("_") else []
    before = [tensor.clone() for tensor in written]
    with pytest.raises(RuntimeError, match=message) as raised:
        getattr(ops, op)(*arguments, **more)
    assert str(raised.value).startswith(f"{op}: "), "the message opens with the op's name"
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(written, before, strict=True))


@pytest.mark.parametrize("left_out", ["maximize", "weight_decays"])
def test_what_has_no_default_must_be_given_by_name(backend, left_out):
    how = {"maximize": False, "weight_decays": [0.1]}
    del how[left_out]
    with pytest.raises((TypeError, RuntimeError), match=left_out):
        ops.scale_gradients_([x.clone()], [x], **how)
    with pytest.raises((TypeError, RuntimeError), match="positional argument"):
        ops.scale_gradients_([x.clone()], [x], False, weight_decays=[0.1])


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
