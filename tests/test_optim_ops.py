"""The op sgd_, with trust ratios and without, against the reference."""

import itertools
import math

import calls
import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    REAL_DTYPES,
    Case,
    Layer,
    copied,
    inverses,
    memory,
    named,
    on,
    overflown,
    sizes,
    sliced,
    transposed,
)
from closeness import assert_all_equal, assert_all_within_ulps, assert_within_ulps

from torchlars import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


STEPS = [
    # momentum, nesterov, ratios, lr_tensor, maximize
    (None, False, False, False, False),
    (None, False, True, True, True),
    ("own", False, False, True, True),
    ("own", False, True, False, False),
    ("own", True, False, False, True),
    ("own", True, True, True, False),
    ("float32", False, True, True, True),
    ("float32", True, False, False, False),
]
OPS = ["given", "measured"]  # sgd_ with ratios that are given, or 1, and with those that it measures


def steps_of(case, dtype, device="cpu"):
    """Every kind of step that the dtype has; of the longest cases one, and on a GPU some."""
    kinds = [step for step in STEPS if step[0] != "float32" or dtype.itemsize == 2]
    if case.name == "many":
        return kinds[3:4]
    if case.name in ("large_norms", "chunk_borders"):
        return kinds[::3]
    return kinds if torch.device(device).type == "cpu" else kinds[1::3]


def arguments_of(case, dtype, kind, grad_dtype=None):
    """Arguments for both ops by name; each layer has numbers of its own."""
    momentum, nesterov, has_ratios, has_lr_tensor, maximize = kind
    grads, params, weight_decays, trust_coefs, eps, case_maximizes = case.make(dtype, grad_dtype=grad_dtype)
    if case.name == "conjugated":  # torch's dispatcher lets no op write lists of lazily conjugated tensors
        grads, params = params, [param.resolve_conj() for param in grads]
    n, generator = len(params), torch.Generator().manual_seed(len(params))
    ratio_dtype = ops.compute_dtype(grads[0].dtype, dtype)
    buffers = []
    if momentum is not None:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        kept = torch.float32 if momentum == "float32" else dtype
        for i, param in enumerate(params):
            value = 0.2 * (1 + i % 3) * torch.randn(param.shape, generator=generator, dtype=wide)
            buffers.append(torch.empty_like(param.resolve_conj(), dtype=kept).copy_(value))
    return {
        "params": params,
        "grads": grads,
        "momentum_buffers": buffers,
        "ratios": torch.rand(n, generator=generator, dtype=ratio_dtype) + 0.1 if has_ratios else None,
        "weight_decays": weight_decays,
        "trust_coefs": trust_coefs,
        "eps": eps,
        "lrs": [0.1 * (1 + i % 4) for i in range(n)],
        "momentums": [0.5 + 0.1 * (i % 5) if buffers else 0.0 for i in range(n)],
        "dampenings": [[0.0, 0.3, -0.2][i % 3] for i in range(n)],
        "nesterov": nesterov,
        "maximize": maximize != case_maximizes,
        "lr_tensor": torch.tensor(0.37, dtype=torch.float64) if has_lr_tensor else None,
    }


def moved(arguments, device):
    """The same arguments on a device."""

    def there(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return on(device, value) if isinstance(value, list) and value and isinstance(value[0], torch.Tensor) else value

    return {name: there(value) for name, value in arguments.items()}


def sgd(op, arguments, module=ops):
    """Call sgd_ with those of the arguments that it takes. Return the ratios if it measures them."""
    foreign = {"given": {"trust_coefs", "eps"}, "measured": {"ratios"}}[op]
    taken = {name: value for name, value in arguments.items() if name not in foreign}
    return module.sgd_(**taken) if op == "given" else calls.sgd(**taken, module=module)


def call(op, arguments, module=ops, **different):
    """Call an op with copies of what it writes. Return those, and the ratios if there are any."""
    copies = {name: [copied(x) for x in arguments[name]] for name in ("params", "grads", "momentum_buffers")}
    taken = {**arguments, **copies, **different}
    ratios = sgd(op, taken, module)
    assert_all_equal(taken["grads"], arguments["grads"], "gradients are only read, layer")
    return taken["params"], taken["momentum_buffers"], ratios


def assert_same_results(actual, expected, ulps=0):
    for name, ones, others in zip(("parameter", "momentum"), actual, expected, strict=False):
        if ones or others:
            assert_all_within_ulps(ones, others, ulps, f"{name} of layer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_sgd_gives_the_bits_of_the_reference(extension, device, case, dtype):
    for kind in steps_of(case, dtype, device):
        arguments = arguments_of(case, dtype, kind)
        assert_same_results(call("given", moved(arguments, device)), call("given", arguments, reference))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_sgd_with_ratios_equals_the_reference_and_has_the_bits_of_measure_decide_and_update(
    extension, device, case, dtype
):
    is_wide = dtype in (torch.float64, torch.complex128)
    for kind in steps_of(case, dtype, device)[::2]:
        on_cpu = arguments_of(case, dtype, kind)
        arguments = moved(on_cpu, device)
        actual = call("measured", arguments)
        norms = ops.squared_norms(arguments["params"]), ops.squared_norms(arguments["grads"])
        hyper = {name: arguments[name] for name in ("weight_decays", "trust_coefs", "eps")}
        hyper["dtype"] = torch.float64 if is_wide else torch.float32
        ratios = ops.trust_ratios(*norms, **hyper)
        assert torch.equal(actual[2], ratios)
        assert_same_results(actual, call("given", arguments, ratios=ratios))
        # Sums are the only thing in which the two may differ: so the rest is compared with the same ratios.
        expected = reference.trust_ratios(*map(reference.squared_norms, (on_cpu["params"], on_cpu["grads"])), **hyper)
        assert_within_ulps(ratios, expected, 4 if is_wide else 1, "ratios")
        assert_same_results(actual, call("given", on_cpu, reference, ratios=ratios.cpu()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_dialects_of_sgd_with_ratios_have_the_bits_of_measure_decide_and_update(extension, case, dtype):
    kind = STEPS[5] if dtype.itemsize > 2 else STEPS[6]
    dialects = [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
    is_long = case.name in ("many", "large_norms", "chunk_borders")
    for decayed_norm, clip, lr_in_momentum in dialects[3 if is_long else 0 :]:
        arguments = arguments_of(case, dtype, kind)
        dialect = {"decayed_norm": decayed_norm, "clip": clip, "lr_in_momentum": lr_in_momentum}
        actual = call("measured", arguments, **dialect)
        grads, params = arguments["grads"], arguments["params"]
        lrs, lr_tensor = arguments["lrs"], arguments["lr_tensor"]
        hyper = {name: arguments[name] for name in ("weight_decays", "trust_coefs", "eps", "lrs", "lr_tensor")}
        if decayed_norm:
            scales = [-decay if arguments["maximize"] else decay for decay in hyper["weight_decays"]]
            norms = ops.squared_norms(grads, others=params, scales=scales)
            hyper["weight_decays"] = [0.0] * len(lrs)
        else:
            norms = ops.squared_norms(grads)
        dtype_of_ratios = ops.compute_dtype(grads[0].dtype, dtype)
        ratios = ops.trust_ratios(ops.squared_norms(params), norms, **hyper, dtype=dtype_of_ratios, clip=clip)
        assert torch.equal(actual[2], ratios)
        inside = {"ratios": ratios}
        if lr_in_momentum:
            scaled = torch.tensor(lrs, dtype=torch.float64) * (1.0 if lr_tensor is None else lr_tensor)
            inside = {"ratios": (ratios.double() * scaled).to(ratios.dtype), "lrs": [1.0] * len(lrs), "lr_tensor": None}
        assert_same_results(actual, call("given", arguments, **inside))
        assert_same_results(actual, call("given", arguments, reference, **inside))
        inside = {"ratios": ratios, "lr_in_momentum": lr_in_momentum}
        assert_same_results(actual, call("given", arguments, **inside))
        assert_same_results(actual, call("given", arguments, reference, **inside))


def with_unscaled_gradients(arguments, inv_scale):
    """The same arguments, with gradients unscaled beforehand; what has 16 bits becomes float32, the arithmetic's type."""
    grads = [x.to(torch.promote_types(x.dtype, torch.float32)) * inv_scale for x in arguments["grads"]]
    return {**arguments, "grads": grads}


@inverses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_sgd_of_scaled_gradients_gives_the_bits_of_the_reference_and_of_unscaled_ones(extension, case, dtype, inverse):
    inv_scale = torch.tensor(inverse)
    for kind in steps_of(case, dtype):
        arguments = arguments_of(case, dtype, kind)
        actual = call("given", arguments, inv_scale=inv_scale)
        assert_same_results(actual, call("given", arguments, reference, inv_scale=inv_scale))
        assert_same_results(actual, call("given", with_unscaled_gradients(arguments, inv_scale)))


@inverses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_sgd_with_ratios_of_scaled_gradients_has_the_bits_of_measure_decide_and_update(extension, case, dtype, inverse):
    is_wide, inv_scale = dtype in (torch.float64, torch.complex128), torch.tensor(inverse)
    for i, kind in enumerate(steps_of(case, dtype)[::2]):
        arguments = arguments_of(case, dtype, kind)
        grads, params = arguments["grads"], arguments["params"]
        decayed_norm, clip = i % 2 == 0, i % 3 == 0
        actual = call("measured", arguments, decayed_norm=decayed_norm, clip=clip, inv_scale=inv_scale)
        for module in (ops, reference):
            norms = module.squared_norms(grads, inv_scale=inv_scale)
            hyper = {name: arguments[name] for name in ("weight_decays", "trust_coefs", "eps", "lrs", "lr_tensor")}
            if decayed_norm:
                scales = [-decay if arguments["maximize"] else decay for decay in hyper["weight_decays"]]
                norms = module.squared_norms(grads, others=params, scales=scales, inv_scale=inv_scale)
                hyper["weight_decays"] = [0.0] * len(scales)
            ratios = module.trust_ratios(module.squared_norms(params), norms, **hyper, dtype=actual[2].dtype, clip=clip)
            assert_within_ulps(actual[2], ratios, 0 if module is ops else 4 if is_wide else 1, "ratios")
            assert_same_results(actual, call("given", arguments, module, ratios=actual[2], inv_scale=inv_scale))
        beforehand = with_unscaled_gradients(arguments, inv_scale)
        if inverse == 0.25:  # which changes no bit of any mantissa
            assert_same_results(actual, call("measured", beforehand, decayed_norm=decayed_norm, clip=clip))
        assert_same_results(actual, call("given", beforehand, ratios=actual[2]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_a_skipped_step_writes_neither_parameters_nor_momentum(backend, case, dtype, op):
    for i, kind in enumerate(steps_of(case, dtype)):
        arguments = arguments_of(case, dtype, kind)
        arguments["grads"] = overflown([copied(grad) for grad in arguments["grads"]])
        tensors = [*arguments["params"], *arguments["momentum_buffers"], *arguments["grads"]]
        before, skip, dialect = memory(tensors), torch.zeros(()), {}
        if op == "measured":
            dialect = {"decayed_norm": i % 2 == 1, "clip": i % 3 == 0, "lr_in_momentum": i % 3 == 1}
            arguments["lrs"] = [2.0 * (1 + i % 4) for i in range(len(arguments["lrs"]))]
        ratios = sgd(op, {**arguments, **dialect, "inv_scale": skip})
        assert all(torch.equal(a, b) for a, b in zip(memory(tensors), before, strict=True))
        if op == "measured":
            lr_tensor = 1.0 if kind[3] is False else 0.37
            expected = [min(1 / (lr * lr_tensor), 1.0) if dialect["clip"] else 1.0 for lr in arguments["lrs"]]
            assert_within_ulps(ratios, torch.tensor(expected, dtype=ratios.dtype), 1, "ratios")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_scaled_gradients_may_have_another_dtype_than_parameters(extension, dtype, grad_dtype, op):
    case = Case("mixed_dtypes", "", [*sizes(5, 70, 17000), Layer((3, 4), weight_decay=0.0), Layer((0,))])
    for kind, inverse in itertools.product(steps_of(case, dtype), (0.3, 0.0)):
        arguments, inv_scale = arguments_of(case, dtype, kind, grad_dtype), torch.tensor(inverse)
        actual = call(op, arguments, inv_scale=inv_scale)
        ratios = arguments["ratios"] if op == "given" else actual[2]
        assert_same_results(actual, call("given", arguments, reference, ratios=ratios, inv_scale=inv_scale))
        if inverse == 0.0:
            assert_same_results(actual, (arguments["params"], arguments["momentum_buffers"]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_gradients_may_have_another_dtype_than_parameters(extension, device, dtype, grad_dtype, op):
    case = Case("mixed_dtypes", "", [*sizes(5, 70, 17000), Layer((3, 4), weight_decay=0.0), Layer((0,))])
    for kind in steps_of(case, dtype, device):
        arguments = arguments_of(case, dtype, kind, grad_dtype)
        actual = call(op, moved(arguments, device))
        ratios = arguments["ratios"] if op == "given" else actual[2].cpu()
        assert_same_results(actual, call("given", arguments, reference, ratios=ratios))


@named(CASES)
@pytest.mark.parametrize("op", OPS)
def test_memory_around_views_is_not_touched_and_versions_are_bumped(backend, op, case):
    arguments = arguments_of(case, torch.float32, STEPS[3])
    for name in ("params", "momentum_buffers", "grads"):
        arguments[name] = [copied(x) for x in arguments[name]]
    written = [*arguments["params"], *arguments["momentum_buffers"]]
    before = [(tensor._version, tensor.data_ptr(), tensor.untyped_storage().clone()) for tensor in written]
    grads = [(grad._version, grad.untyped_storage().clone()) for grad in arguments["grads"]]
    sgd(op, arguments)
    for tensor, (version, pointer, storage) in zip(written, before, strict=True):
        assert tensor._version > version
        assert tensor.data_ptr() == pointer
        after = tensor.new_empty(0).set_(tensor.untyped_storage())
        untouched = torch.ones(len(after), dtype=torch.bool)
        untouched.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
        assert torch.equal(after[untouched], tensor.new_empty(0).set_(storage)[untouched])
    for grad, (version, storage) in zip(arguments["grads"], grads, strict=True):
        assert grad._version == version
        assert torch.equal(grad.new_empty(0).set_(grad.untyped_storage()), grad.new_empty(0).set_(storage))


@pytest.mark.parametrize("op", OPS)
def test_momentum_buffers_of_any_layout_are_written_in_place(extension, device, op):
    case = Case(
        "buffers", "", [Layer((6, 5)), Layer((6, 5), param_layout=transposed), Layer((6, 5), grad_layout=sliced)]
    )
    for dtype, orders in itertools.product(DTYPES, itertools.permutations([sliced, transposed, lambda x: x])):
        arguments = arguments_of(case, dtype, STEPS[5])
        arguments["momentum_buffers"] = [
            order(x) for order, x in zip(orders, arguments["momentum_buffers"], strict=True)
        ]
        actual = call(op, moved(arguments, device))
        ratios = arguments["ratios"] if op == "given" else actual[2].cpu()
        assert_same_results(actual, call("given", arguments, reference, ratios=ratios))


@pytest.mark.parametrize("op", OPS)
def test_layers_that_require_gradients_stay_leaves(backend, op):
    case = Case("leaves", "", [Layer((3,)), Layer((4,))])
    arguments = arguments_of(case, torch.float32, STEPS[3])
    params = [param.requires_grad_() for param in arguments["params"]]
    sgd(op, arguments)
    assert all(param.is_leaf and param.requires_grad and param.grad_fn is None for param in params)


x, y = torch.ones(3), torch.ones(4)
BAD_CALLS = {
    **calls.BAD_LAYERS,
    "no params": ({"params": [], "grads": []}, r"at least one tensor \(got: grads is empty\)"),
    "an expanded parameter": (
        {"params": [torch.ones(1).expand(3), y]},
        r"params that can be written in place \(params\[0\]: shape \[3\], strides \[0\] overlap in memory\); clone it first",
    ),
    "an overlapping buffer": (
        {"momentum_buffers": [x, torch.ones(1).expand(4)]},
        r"momentum_buffers that can be written in place \(momentum_buffers\[1\]: shape \[4\], strides \[0\] overlap",
    ),
    "fewer momentums": ({"momentums": [0.9]}, r"one length \(grads: 2, momentums: 1\)"),
    "momentum infinite": ({"momentums": [0.9, math.inf]}, r"non-negative numbers \(momentums\[1\]: inf\)"),
    "more dampenings": ({"dampenings": [0.0] * 3}, r"one length \(grads: 2, dampenings: 3\)"),
    "dampening NaN": ({"dampenings": [0.0, math.nan]}, r"finite numbers \(dampenings\[1\]: nan\)"),
    "fewer buffers": ({"momentum_buffers": [x]}, r"one length \(params: 2, momentum_buffers: 1\)"),
    "mixed buffers": (
        {"momentum_buffers": [x, y.double()]},
        r"one dtype \(momentum_buffers\[0\]: .*, momentum_buffers\[1\]: ",
    ),
    "buffers of another device": (
        {"momentum_buffers": [x.to("meta"), y.to("meta")]},
        r"one device \(params\[0\]: cpu, momentum_buffers\[0\]: meta\)",
    ),
    "buffers of another dtype": (
        {"momentum_buffers": [x.double(), y.double()]},
        r"momentum_buffers of the dtype of params, or of float32 for 16-bit ones \(params\[0\]: .*, momentum_buffers\[0\]: ",
    ),
    "buffers of 16 bits": (
        {"momentum_buffers": [x.bfloat16(), y.bfloat16()]},
        r"momentum_buffers of the dtype of params, or of float32 for 16-bit ones",
    ),
    "buffers of other shapes": (
        {"momentum_buffers": [x, x]},
        r"one shape \(params\[1\]: \[4\], momentum_buffers\[1\]: \[3\]\)",
    ),
    "no buffers": ({"momentum_buffers": []}, r"momentum_buffers where there is momentum \(momentums\[0\]: 0.9\)"),
    "nesterov without buffers": (
        {"momentum_buffers": [], "momentums": [0.0, 0.0], "nesterov": True},
        r"momentum_buffers where nesterov is True",
    ),
}
BAD_CALLS_OF_ONE = {
    "given": {
        "more ratios": ({"ratios": torch.ones(3)}, r"one length \(grads: 2, ratios: 3\)"),
        "ratios in float64": (
            {"ratios": torch.ones(2, dtype=torch.float64)},
            r"ratios to be a contiguous vector of .*[Ff]loat",
        ),
        "a matrix of ratios": (
            {"ratios": torch.ones(2, 1)},
            r"ratios to be a contiguous vector of .* \(got: shape \[2, 1\]",
        ),
        "ratios elsewhere": ({"ratios": torch.ones(2, device="meta")}, r"one device \(grads\[0\]: cpu, ratios: meta\)"),
        "clip": ({"clip": True}, r"trust_coefs where clip is True"),
        "clip without ratios": ({"clip": True, "ratios": None}, r"trust_coefs where clip is True"),
        "decayed_norm": ({"decayed_norm": True}, r"trust_coefs where decayed_norm is True"),
    },
    "measured": {
        "fewer coefs": ({"trust_coefs": [0.1]}, r"one length \(grads: 2, trust_coefs: 1\)"),
        "coef 0": ({"trust_coefs": [0.1, 0.0]}, r"positive numbers \(trust_coefs\[1\]: 0"),
        "no coefs": ({"trust_coefs": []}, r"trust_coefs where eps are given"),
        "no eps": ({"eps": []}, r"one length \(grads: 2, eps: 0\)"),
        "more eps": ({"eps": [0.1] * 3}, r"one length \(grads: 2, eps: 3\)"),
        "eps NaN": ({"eps": [math.nan, 0.0]}, r"non-negative numbers \(eps\[0\]: nan\)"),
    },
}


@pytest.mark.parametrize(
    ("op", "bad"), [(op, bad) for op in OPS for bad in [*BAD_CALLS, *BAD_CALLS_OF_ONE[op]]], ids=str
)
def test_bad_calls_are_refused_and_change_nothing(backend, op, bad):
    different, message = {**BAD_CALLS, **BAD_CALLS_OF_ONE[op]}[bad]
    arguments = arguments_of(Case("bad", "", [Layer((3,)), Layer((4,))]), torch.float32, STEPS[3])
    arguments = {**arguments, "momentums": [0.9, 0.5], **different}
    tensors = [*arguments["params"], *arguments["grads"], *arguments["momentum_buffers"]]
    before = [(tensor._version, tensor.clone()) for tensor in tensors]
    with pytest.raises(RuntimeError, match=message) as raised:
        sgd(op, arguments)
    assert str(raised.value).startswith("sgd_: expected "), "the message opens with the op's name"
    for tensor, (version, value) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert tensor.device.type == "meta" or torch.equal(tensor.to_dense(), value.to_dense())


def layers_at_the_borders(dtype):
    """Layers that one thread takes alone and those that all share, and a neighbour of another memory order."""
    torch.manual_seed(0)
    own = [2**k + more for k in (17, 20) for more in (-1, 0, 1)]  # 4 MB of parameter and gradient are 2**19 floats each
    shapes = [(64,), *((2**19 // dtype.itemsize * 4 + more,) for more in (-1, 0, 1)), *((n,) for n in own), (300, 70)]
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    grads = [(0.1 * torch.randn(shape)).to(dtype) for shape in shapes]
    grads[-1] = transposed(grads[-1])
    return params, grads, [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("decayed_norm", [False, True])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_a_layer_is_stepped_alike_alone_and_among_others_by_any_number_of_threads(
    extension, threads, dtype, decayed_norm
):
    found = []
    for count in (1, 2, 3, 4):
        threads(count)
        params, grads, buffers = layers_at_the_borders(dtype)
        numbers = {name: [0.1 + 0.01 * i for i in range(len(params))] for name in ("weight_decays", "lrs", "momentums")}
        numbers |= {name: [0.02 * (i + 1) for i in range(len(params))] for name in ("dampenings", "trust_coefs", "eps")}
        how = {"maximize": True, "decayed_norm": decayed_norm}
        if count == 1:  # one by one
            ratios = [
                calls.sgd(
                    params=params[i : i + 1],
                    grads=grads[i : i + 1],
                    momentum_buffers=buffers[i : i + 1],
                    **{name: values[i : i + 1] for name, values in numbers.items()},
                    **how,
                )
                for i in range(len(params))
            ]
            found.append([*params, *buffers, torch.cat(ratios)])
            params, grads, buffers = layers_at_the_borders(dtype)
        ratios = calls.sgd(params=params, grads=grads, momentum_buffers=buffers, **numbers, **how)
        found.append([*params, *buffers, ratios])
    assert len(set(found[0][-1].tolist())) == len(found[0][-1])
    for others in found[1:]:
        assert_all_equal(others, found[0], "bits")


@pytest.mark.parametrize(
    "count", [32, 2**20]
)  # of the layer that takes the shared memory: it is stepped at once if large
@pytest.mark.parametrize("is_measured", [False, True])
def test_gradients_that_are_copied_on_write_are_read_as_they_were(extension, is_measured, count):
    base = torch.randn(count + 64)
    copy = torch._lazy_clone(base)
    gradient, param = copy[:32].clone(), torch.zeros(32)
    numbers = {"weight_decays": [0.0] * 3, "lrs": [1.0] * 3, "momentums": [0.0] * 3, "dampenings": [0.0] * 3}
    arguments = {"params": [param, copy[32:64], base], "grads": [copy[:32], torch.ones(32), torch.ones(count + 64)]}
    if is_measured:
        numbers |= {"trust_coefs": [1.0] * 3, "eps": [0.0] * 3, "ratios": torch.empty(3)}
    ops.sgd_(**arguments, momentum_buffers=[], maximize=False, **numbers)
    assert torch.equal(param, -gradient)
    assert torch.equal(copy[:32], gradient)


def test_a_skipped_step_copies_nothing_that_is_copied_on_write(extension):
    param, buffer = torch._lazy_clone(torch.ones(40)), torch._lazy_clone(torch.ones(40))
    numbers = {"weight_decays": [0.1], "lrs": [1.0], "momentums": [0.9], "dampenings": [0.0]}
    ratios = calls.sgd(
        params=[param],
        grads=[torch.ones(40)],
        momentum_buffers=[buffer],
        maximize=False,
        trust_coefs=[0.5],
        eps=[0.0],
        inv_scale=torch.zeros(1),
        **numbers,
    )
    assert ratios.tolist() == [1]
    assert torch._C._is_cow_tensor(param)
    assert torch._C._is_cow_tensor(buffer)
    assert param._version == buffer._version == 0
