"""The op adam_, with trust ratios of gradients or updates and without, against the reference."""

import itertools
import math

import calls
import pytest
import torch
from adam_cases import (
    MODES,
    WRITTEN,
    arguments_of,
    assert_follows_the_reference,
    assert_same_bits,
    assert_same_results,
    call,
    in_two_calls,
)
from cases import (
    CASES,
    DTYPES,
    REAL_DTYPES,
    Case,
    Layer,
    copied,
    memory,
    named,
    overflown,
    sizes,
    sliced,
    transposed,
)
from closeness import assert_all_equal, assert_within_ulps

from torchlars import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")
LONG = ("many", "large_norms", "chunk_borders")
MEASURED = [mode for mode, options in MODES.items() if "trust_coefs" in options]
OF_UPDATES = [mode for mode, options in MODES.items() if "of_updates" in options]
modes = pytest.mark.parametrize("mode", MODES)


def steps_of(case, dtype):
    """Arguments of every mode, with other flags for other dtypes and moments; of the longest cases fewer."""
    first = DTYPES.index(dtype)
    for i, mode in enumerate(MODES):
        if case.name not in ("many", "tails") or i % 5 == first % 5:
            variant, in_float32 = i + first + len(case.name), dtype.itemsize == 2 and (i + len(case.name)) % 2 == 0
            yield arguments_of(case, dtype, mode, variant, moments_in_float32=in_float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_adam_gives_what_the_reference_does(extension, case, dtype):
    for arguments in steps_of(case, dtype):
        assert_follows_the_reference(arguments, call(arguments))


@pytest.mark.parametrize("mode", ["of gradients, decayed", "of updates, measured"])
def test_layers_that_are_more_than_a_cache_holds_have_ratios_of_their_own(extension, mode):
    """They are measured and updated in runs of 4 MiB; small layers are at the ends of a run and in its middle."""
    case = Case("runs", "", sizes(7, 600_001, 5, 3, 550_000, 350_000, 11))
    arguments = arguments_of(case, torch.float32, mode, 2)
    actual = call(arguments)
    assert_follows_the_reference(arguments, actual)
    if mode in OF_UPDATES:
        assert_same_results(in_two_calls(arguments), actual)


def test_clipped_ratios_are_some_that_are_clipped_and_some_that_are_not():
    """A condition of the tests above, for every flag that they vary."""
    for mode, variant in itertools.product(("of gradients, clipped", "of updates, clipped"), range(4)):
        arguments = arguments_of(CASES[3], torch.float64, mode, variant)
        ratios = call(arguments)["ratios"]
        assert 10 < int((ratios == 1).sum()) < 60, (mode, variant)
        assert not torch.equal(ratios, call({**arguments, "clip": False})["ratios"])


@pytest.mark.parametrize("mode", ["plain", "of gradients", "of gradients, measured", "of updates, measured"])
@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_gradients_may_have_another_dtype_than_parameters(extension, dtype, grad_dtype, mode):
    case = Case("mixed_dtypes", "", [*sizes(5, 70, 17000), Layer((3, 4), weight_decay=0.0), Layer((0,))])
    for variant, in_float32 in itertools.product((0, 1), [False, True] if dtype.itemsize == 2 else [False]):
        arguments = arguments_of(case, dtype, mode, variant, grad_dtype, in_float32)
        assert_follows_the_reference(arguments, call(arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", OF_UPDATES[1:])
@named([case for case in CASES if case.name != "many"])
def test_two_calls_have_the_bits_of_one(backend, case, dtype, mode):
    if backend == "reference" and case.name in (*LONG, "tails"):
        pytest.skip("what is different there is how the extension cuts layers")
    for in_float32 in [False, True] if dtype.itemsize == 2 else [False]:
        arguments = arguments_of(case, dtype, mode, DTYPES.index(dtype) + in_float32, moments_in_float32=in_float32)
        expected = call(arguments)
        actual = in_two_calls(arguments)
        assert_same_results(actual, expected)
        assert_same_bits(
            [actual["squared_norms"].chunk(2)[0]], [ops.squared_norms(arguments["params"])], "norms of parameters"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named([case for case in CASES if case.name not in LONG])
def test_measured_ratios_of_gradients_have_the_bits_of_ratios_that_are_given(extension, case, dtype):
    for variant, mode in enumerate(MEASURED[:3]):
        arguments = arguments_of(case, dtype, mode, variant + DTYPES.index(dtype))
        actual = call(arguments)
        given = {k: v for k, v in arguments.items() if k not in ("trust_coefs", "eps", "clip", "decayed_norm")}
        assert_same_results(actual, call(given, ratios=actual["ratios"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
@modes
def test_scaled_gradients_give_the_bits_of_unscaled_ones(backend, mode, dtype):
    """A scale that is a power of two changes no bit of any mantissa."""
    for variant in range(4):
        arguments = arguments_of(CASES[0], dtype, mode, variant)
        unscaled = {name: value for name, value in arguments.items() if name != "inv_scale"}
        unscaled["grads"] = [0.125 * grad for grad in arguments["grads"]]
        assert_same_results(call(arguments, inv_scale=torch.tensor(0.125)), call(unscaled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(extension, threads, dtype):
    case = Case("threads", "", sizes(40_001, 5, 16_384, 300, *[64] * 5))
    steps = [
        arguments_of(case, dtype, mode, variant, moments_in_float32=dtype == torch.bfloat16)
        for variant, mode in enumerate(("plain", "of gradients, decayed", "of updates, clipped"))
    ]
    results = []
    for count in (1, 2, 3, 3):
        threads(count)
        results.append([*map(call, steps), in_two_calls(steps[2])])
    threads(1)
    assert_same_results(results[0][2], results[0][3])
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_same_results(one, other)


@named(CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_a_skipped_step_writes_nothing_but_ratios(backend, case, dtype):
    for i, mode in enumerate(MODES):
        if case.name in (*LONG, "tails") and (backend == "reference" or dtype != torch.float64):
            continue  # what is different there is how the extension cuts layers
        arguments = arguments_of(case, dtype, mode, i, moments_in_float32=dtype == torch.bfloat16 and i % 2 == 0)
        arguments["grads"] = overflown([copied(grad) for grad in arguments["grads"]])
        arguments |= {"inv_scale": torch.zeros(()), "lrs": [2.0 * (1 + i % 4) for i in range(len(arguments["lrs"]))]}
        tensors = [tensor for name in (*WRITTEN, "grads") for tensor in arguments[name]]
        before, given = memory(tensors), arguments.get("ratios")
        given = None if given is None else given.clone()
        ops.adam_(**arguments)
        assert all(torch.equal(a, b) for a, b in zip(memory(tensors), before, strict=True)), mode
        if mode in MEASURED:
            lr_tensor, clips = float(arguments.get("lr_tensor", 1.0)), mode == "of gradients, clipped"
            expected = [min(1 / (lr * lr_tensor), 1.0) if clips else 1.0 for lr in arguments["lrs"]]
            assert_within_ulps(arguments["ratios"], torch.tensor(expected, dtype=arguments["ratios"].dtype), 1, mode)
        elif given is not None:
            assert torch.equal(arguments["ratios"], given)
        if mode in OF_UPDATES[1:]:
            of_one = {k: v for k, v in arguments.items() if k not in ("trust_coefs", "eps", "clip", "ratios")}
            squared_norms = torch.full((2 * len(arguments["params"]),), 7.0, dtype=torch.float64)
            ops.adam_(**of_one, squared_norms=squared_norms)
            assert not squared_norms.any()
            ops.adam_(**{**of_one, "grads": []}, ratios=torch.full_like(arguments["ratios"], 0.5))
            assert all(torch.equal(a, b) for a, b in zip(memory(tensors), before, strict=True)), mode


@named(CASES)
@pytest.mark.parametrize("mode", ["plain", "of gradients, measured", "of updates, measured"])
def test_memory_around_views_is_not_touched_and_versions_are_bumped(backend, mode, case):
    arguments = arguments_of(case, torch.float32, mode, 1)
    for name in (*WRITTEN, "grads"):
        arguments[name] = [copied(x) for x in arguments[name]]
    written = [tensor for name in WRITTEN for tensor in arguments[name]]
    if mode in MEASURED:
        written.append(arguments["ratios"])
    before = [(tensor._version, tensor.data_ptr(), tensor.untyped_storage().clone()) for tensor in written]
    grads = [(grad._version, grad.untyped_storage().clone()) for grad in arguments["grads"]]
    ops.adam_(**arguments)
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


def test_the_second_call_of_two_writes_no_more_than_parameters(backend):
    arguments = arguments_of(CASES[0], torch.float32, "of updates", 1)
    state = [tensor for name in ("exp_avgs", "exp_avg_sqs", "steps") for tensor in arguments[name]]
    before = [(tensor._version, tensor.clone()) for tensor in state], [param._version for param in arguments["params"]]
    ops.adam_(**{**arguments, "grads": []})
    for tensor, (version, value) in zip(state, before[0], strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, value)
    assert all(param._version > version for param, version in zip(arguments["params"], before[1], strict=True))


@pytest.mark.parametrize("mode", ["plain", "of gradients, measured", "of updates, measured"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_any_layout_are_written_in_place(extension, dtype, mode):
    layers = [Layer((6, 5)), Layer((6, 5), param_layout=transposed), Layer((6, 5), grad_layout=sliced)]
    orders = [sliced, transposed, lambda x: x]
    for i, (first, second) in enumerate(itertools.product(itertools.permutations(orders), repeat=2)):
        arguments = arguments_of(Case("moments", "", layers), dtype, mode, i)
        for name, by in (("exp_avgs", first), ("exp_avg_sqs", second)):
            arguments[name] = [order(x) for order, x in zip(by, arguments[name], strict=True)]
        actual = call(arguments)
        if i % 5 == 0:
            assert_follows_the_reference(arguments, actual)
        dense = {name: [x.contiguous() for x in arguments[name]] for name in ("exp_avgs", "exp_avg_sqs")}
        expected = call(arguments, **dense)
        for name in WRITTEN:
            assert_same_bits(actual[name], expected[name], name)
        if mode in OF_UPDATES:
            assert_same_results(in_two_calls(arguments), actual)


@modes
def test_layers_that_require_gradients_stay_leaves(backend, mode):
    arguments = arguments_of(Case("leaves", "", [Layer((3,)), Layer((4,))]), torch.float32, mode)
    params = [param.requires_grad_() for param in arguments["params"]]
    ops.adam_(**arguments)
    assert all(param.is_leaf and param.requires_grad and param.grad_fn is None for param in params)
    assert not any(x.requires_grad for name in WRITTEN[1:] for x in arguments[name])


def test_a_ratio_of_updates_is_exact_where_the_difference_of_parameters_is_not(backend):
    """‖γu‖ = 1e-6 ‖w‖: half an ULP of every parameter is about 6 % of its update."""
    case = Case("short", "", [Layer((3000,), param_scale=1.0), Layer((200, 11), param_scale=50.0)])
    for variant in range(4):
        arguments = arguments_of(case, torch.float32, "of updates, measured", variant)
        arguments["lrs"] = [1e-6 * 0.2, 1e-6 * 10.0]
        arguments["trust_coefs"] = [0.7, 0.3]
        assert_follows_the_reference(arguments, call(arguments))


x, y, zero = torch.ones(3), torch.ones(4), torch.zeros(())
bad_step = r"each of steps to be one float32 on cpu \(got: shape "
squares = torch.zeros(4, dtype=torch.float64)
BAD_CALLS = {
    **calls.BAD_LAYERS,
    "no params": ({"params": []}, r"at least one tensor \(got: params is empty\)"),
    "an expanded parameter": (
        {"params": [torch.ones(1).expand(3), y]},
        r"params that can be written in place \(params\[0\]: shape \[3\], strides \[0\] overlap in memory\); clone",
    ),
    "an overlapping moment": (
        {"exp_avgs": [x, torch.ones(1).expand(4)]},
        r"exp_avgs that can be written in place \(exp_avgs\[1\]: shape \[4\], strides \[0\] overlap",
    ),
    "another overlapping moment": (
        {"exp_avg_sqs": [torch.ones(1).expand(3), y]},
        r"exp_avg_sqs that can be written in place \(exp_avg_sqs\[0\]: shape \[3\], strides \[0\] overlap",
    ),
    "no lrs": ({"lrs": []}, r"one length \(grads: 2, lrs: 0\)"),
    "fewer moments": ({"exp_avgs": [x]}, r"one length \(params: 2, exp_avgs: 1\)"),
    "no moments": ({"exp_avg_sqs": []}, r"at least one tensor \(got: exp_avg_sqs is empty\)"),
    "more second moments": ({"exp_avg_sqs": [x, y, x]}, r"one length \(params: 2, exp_avg_sqs: 3\)"),
    "mixed moments": ({"exp_avgs": [x, y.double()]}, r"one dtype \(exp_avgs\[0\]: .*, exp_avgs\[1\]: "),
    "moments of another device": (
        {"exp_avg_sqs": [x.to("meta"), y.to("meta")]},
        r"one device \(params\[0\]: cpu, exp_avg_sqs\[0\]: meta\)",
    ),
    "moments of another dtype": (
        {"exp_avgs": [x.double(), y.double()]},
        r"exp_avgs of the dtype of params, or of float32 for 16-bit ones \(params\[0\]: .*, exp_avgs\[0\]: ",
    ),
    "moments of 16 bits": (
        {"exp_avg_sqs": [x.bfloat16(), y.bfloat16()]},
        r"exp_avg_sqs of the dtype of params, or of float32 for 16-bit ones",
    ),
    "moments of two dtypes": (
        {
            **{name: [x.bfloat16(), y.bfloat16()] for name in ("params", "grads", "exp_avgs")},
            "exp_avg_sqs": [x, y],
        },
        r"exp_avgs and exp_avg_sqs of one dtype \(exp_avgs\[0\]: .*, exp_avg_sqs\[0\]: ",
    ),
    "moments of other shapes": ({"exp_avgs": [x, x]}, r"one shape \(params\[1\]: \[4\], exp_avgs\[1\]: \[3\]\)"),
    "second moments of other shapes": (
        {"exp_avg_sqs": [y, y]},
        r"one shape \(params\[0\]: \[3\], exp_avg_sqs\[0\]: \[4\]\)",
    ),
    "fewer steps": ({"steps": [zero]}, r"one length \(params: 2, steps: 1\)"),
    "steps in float64": ({"steps": [zero, zero.double()]}, bad_step + r"\[\], .*([Dd]ouble|float64)"),
    "steps of two": ({"steps": [zero, torch.zeros(2)]}, bad_step + r"\[2\]"),
    "steps elsewhere": ({"steps": [zero.to("meta"), zero]}, bad_step + r"\[\], .*meta"),
    "beta1 = 1": ({"beta1": 1.0}, r"beta1 in \[0, 1\) \(got: 1"),
    "beta1 < 0": ({"beta1": -0.1}, r"beta1 in \[0, 1\) \(got: -0.1"),
    "beta2 NaN": ({"beta2": math.nan}, r"beta2 in \[0, 1\) \(got: nan"),
    "adam_eps < 0": ({"adam_eps": -1.0}, r"non-negative adam_eps \(got: -1"),
    "adam_eps infinite": ({"adam_eps": math.inf}, r"non-negative adam_eps \(got: inf"),
    "more ratios": ({"ratios": torch.ones(3)}, r"one length \(grads: 2, ratios: 3\)"),
    "ratios in float64": (
        {"ratios": torch.ones(2, dtype=torch.float64)},
        r"ratios to be a contiguous vector of .*[Ff]loat",
    ),
    "a matrix of ratios": ({"ratios": torch.ones(2, 1)}, r"ratios to be a contiguous vector of .* \(got: shape \[2, 1"),
    "ratios elsewhere": ({"ratios": torch.ones(2, device="meta")}, r"one device \(grads\[0\]: cpu, ratios: meta\)"),
}
BAD_CALLS_OF = {
    "plain": {
        "clip": ({"clip": True}, r"trust_coefs where clip is True"),
        "decayed_norm": ({"decayed_norm": True}, r"trust_coefs where decayed_norm is True"),
        "eps": ({"eps": [0.1, 0.1]}, r"trust_coefs where eps are given"),
        "coefs without ratios": ({"trust_coefs": [0.1, 0.1], "eps": [0.1, 0.1]}, r"ratios where trust_coefs are given"),
        "no grads": ({"grads": []}, r"of_updates where grads are empty"),
        "squared_norms": ({"squared_norms": squares}, r"of_updates where squared_norms are given"),
    },
    "of gradients, measured": {
        "fewer coefs": ({"trust_coefs": [0.1]}, r"one length \(grads: 2, trust_coefs: 1\)"),
        "coef 0": ({"trust_coefs": [0.1, 0.0]}, r"positive numbers \(trust_coefs\[1\]: 0"),
        "no coefs": ({"trust_coefs": []}, r"trust_coefs where eps are given"),
        "no eps": ({"eps": []}, r"one length \(grads: 2, eps: 0\)"),
        "more eps": ({"eps": [0.1] * 3}, r"one length \(grads: 2, eps: 3\)"),
        "eps NaN": ({"eps": [math.nan, 0.0]}, r"non-negative numbers \(eps\[0\]: nan\)"),
    },
    "of updates": {
        "no grads": ({"grads": [], "squared_norms": squares}, r"no squared_norms where grads are empty"),
        "no grads, measured": (
            {"grads": [], "trust_coefs": [0.1, 0.1], "eps": [0.1, 0.1]},
            r"no trust_coefs where grads are empty",
        ),
        "no grads, but bad moments": (
            {"grads": [], "exp_avgs": [x, x]},
            r"one shape \(params\[1\]: \[4\], exp_avgs\[1\]: \[3\]\)",
        ),
        "squared_norms and ratios": ({"squared_norms": squares}, r"no ratios where squared_norms are given"),
        "decayed_norm": ({"decayed_norm": True}, r"where decayed_norm is True"),
        "fewer squared_norms": (
            {"ratios": None, "squared_norms": squares[:3]},
            r"one length \(twice the params: 4, squared_norms: 3\)",
        ),
        "squared_norms, but grads of another dtype beside 16-bit moments": (
            {
                **{name: [x.bfloat16(), y.bfloat16()] for name in ("params", "exp_avgs", "exp_avg_sqs")},
                "ratios": None,
                "squared_norms": squares,
            },
            r"expected exp_avgs of float32 where squared_norms are given with grads of another dtype than params "
            r"\(params\[0\]: .*[Bb][Ff]loat16, grads\[0\]: .*[Ff]loat.*, exp_avgs\[0\]: .*[Bb][Ff]loat16\)",
        ),
        "squared_norms in float32": (
            {"ratios": None, "squared_norms": squares.float()},
            r"a contiguous vector of float64 \(squared_norms: ",
        ),
        "squared_norms with gaps": (
            {"ratios": None, "squared_norms": torch.zeros(8, dtype=torch.float64)[::2]},
            r"a contiguous vector of float64 \(squared_norms: ",
        ),
        "squared_norms elsewhere": (
            {"ratios": None, "squared_norms": squares.to("meta")},
            r"one device \(params\[0\]: cpu, squared_norms: meta\)",
        ),
    },
    "of updates, measured": {
        "decayed_norm": ({"decayed_norm": True}, r"no decayed_norm where of_updates is True"),
        "fewer coefs": ({"trust_coefs": [0.1]}, r"one length \(grads: 2, trust_coefs: 1\)"),
        "eps < 0": ({"eps": [0.1, -1.0]}, r"non-negative numbers \(eps\[1\]: -1"),
    },
}


@pytest.mark.parametrize(
    ("mode", "bad"), [(mode, bad) for mode, of_one in BAD_CALLS_OF.items() for bad in [*BAD_CALLS, *of_one]], ids=str
)
def test_bad_calls_are_refused_and_change_nothing(backend, mode, bad):
    different, message = {**BAD_CALLS, **BAD_CALLS_OF[mode]}[bad]
    arguments = arguments_of(Case("bad", "", [Layer((3,)), Layer((4,))]), torch.float32, mode, 0)
    arguments = {**arguments, **different}
    tensors = [tensor for name in (*WRITTEN, "grads") for tensor in arguments[name]]
    tensors += [arguments[name] for name in ("ratios", "squared_norms") if arguments.get(name) is not None]
    before = [(tensor._version, tensor.clone()) for tensor in tensors]
    with pytest.raises(RuntimeError, match=message) as raised:
        ops.adam_(**arguments)
    assert str(raised.value).startswith("adam_: expected "), "the message opens with the op's name"
    for tensor, (version, value) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert tensor.device.type == "meta" or torch.equal(
            tensor.to_dense().nan_to_num(7), value.to_dense().nan_to_num(7)
        )


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_both_backends_refuse_in_the_same_words(extension, bad):
    different, _ = BAD_CALLS[bad]
    arguments = {**arguments_of(Case("bad", "", [Layer((3,)), Layer((4,))]), torch.float32, "plain"), **different}
    messages = []
    for module in (torch.ops.torchlars, reference):
        with pytest.raises(RuntimeError) as raised:
            module.adam_(**arguments)
        messages.append(str(raised.value).partition("(")[0].partition("\n")[0].replace("torch.float32", "Float"))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_lr_in_a_tensor_gives_the_bits_of_one_in_numbers(backend, dtype):
    for mode in MODES:
        arguments = arguments_of(CASES[0], dtype, mode, 0)
        scaled = [lr * 0.5 for lr in arguments["lrs"]]
        actual = call(arguments, lr_tensor=torch.tensor([0.5], dtype=torch.float64))
        assert_same_results(actual, call(arguments, lrs=scaled))
        assert_all_equal(actual["steps"], [step + 1 for step in arguments["steps"]], "steps of layer")
