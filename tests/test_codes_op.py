"""The op sgd_ with momentum in 8 bits: the extension against the reference, options, shards, threads."""

from itertools import pairwise

import pytest
import torch
from cases import channels_last, copied, misaligned, sliced
from closeness import assert_within_ulps
from code_cases import CODED_DTYPES, WRITTEN, arguments_of, assert_same_results, call

from torchlars import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")

dtypes = pytest.mark.parametrize("dtype", CODED_DTYPES, ids=str)
SHAPES = {
    "rows of every length": [(5, n) for n in (1, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 1000)],
    "rows beyond a chunk": [(2, 16384), (3, 16385), (2, 40000), (1, 70001)],
    "chunks that end inside of blocks": [(170, 100), (300, 129), (90, 1000), (260, 64), (1200, 130)],
    "one row and one element a row": [(1, 128), (1, 777), (900, 1), (17000, 1), (3,)],
    "more dimensions": [(4, 3, 5, 5), (6, 2, 70), (2, 1, 1, 1, 130)],
    "nothing": [(0, 100), (5, 0), (0,), (3, 200), (0, 0)],
}
OPTIONS = {
    "plain": {},
    "nesterov": {"nesterov": True},
    "maximize": {"maximize": True},
    "dampening": {"dampenings": 0.3},
    "negative dampening, no decay": {"dampenings": -0.5, "weight_decays": 0.0},
    "no momentum": {"momentums": 0.0},
    "lr_tensor": {"lr_tensor": torch.tensor(0.37, dtype=torch.float64)},
    "inv_scale": {"inv_scale": torch.tensor(1 / 3)},
    "given ratios": {"ratios": True},
    "given ratios, lr in momentum": {"ratios": True, "lr_in_momentum": True, "nesterov": True},
    "all of it": {
        "ratios": True,
        "lr_in_momentum": True,
        "maximize": True,
        "dampenings": 0.25,
        "inv_scale": torch.tensor(0.3),
        "lr_tensor": torch.tensor(0.7, dtype=torch.float64),
    },
}
options = pytest.mark.parametrize("name", OPTIONS)


def with_options(arguments, name):
    """Options of OPTIONS, with numbers for every layer."""
    n, given = len(arguments["params"]), dict(OPTIONS[name])
    for key in ("dampenings", "weight_decays", "momentums"):
        if key in given:
            given[key] = [given[key]] * n
    if "ratios" in given:
        given["ratios"] = 0.1 + torch.rand(n, generator=torch.Generator().manual_seed(n))
    return {**arguments, **given}


def differs(one, other):
    return any(not torch.equal(a, b) for a, b in zip(one["momentum_buffers"], other["momentum_buffers"], strict=True))


# The extension has the bits of the reference


@dtypes
@pytest.mark.parametrize("shapes", SHAPES)
def test_the_extension_has_the_bits_of_the_reference(extension, device, shapes, dtype):
    arguments = arguments_of(SHAPES[shapes], dtype)
    if device.type == "cpu":
        assert_same_results(call(arguments), call(arguments, reference))
    else:
        there = {name: [x.to(device) for x in arguments[name]] for name in (*WRITTEN, "grads")}
        found = call({**arguments, **there})
        assert_same_results(
            {name: [x.cpu() for x in found[name]] for name in WRITTEN},
            call(arguments, reference),
        )


@dtypes
@options
def test_every_option_has_the_bits_of_the_reference(extension, name, dtype):
    plain = arguments_of([(30, 100), (3, 200), (3, 7000)], dtype, weight_decays=[0.1, 0.0, 0.05])
    arguments = with_options(plain, name)
    found = call(arguments)
    assert_same_results(found, call(arguments, reference))
    for one, other in zip(found["params"], call(plain)["params"], strict=True):
        assert torch.equal(one, other) == (name == "plain")


@pytest.mark.parametrize("grad_dtype", CODED_DTYPES, ids=str)
@dtypes
def test_gradients_may_have_another_dtype(extension, dtype, grad_dtype):
    arguments = arguments_of([(30, 100), (3, 200)], dtype, grad_dtype=grad_dtype)
    assert_same_results(call(arguments), call(arguments, reference))


LAYOUTS = {"channels_last": channels_last, "misaligned": misaligned, "sliced": sliced}


@dtypes
@pytest.mark.parametrize("of_grads", [*LAYOUTS, "contiguous"])
@pytest.mark.parametrize("of_params", ["channels_last", "misaligned", "contiguous"])
def test_layers_may_have_any_order_in_which_rows_are_whole(extension, dtype, of_params, of_grads):
    """Values are those of the layer whose tensors all have the parameter's order."""
    order = LAYOUTS.get(of_params, lambda x: x)
    arguments = arguments_of([(4, 40, 3, 3), (9, 3, 16, 16)], dtype, layout=order)
    expected = call(arguments)
    assert_same_results(expected, call(arguments, reference))
    arguments["grads"] = [LAYOUTS.get(of_grads, lambda x: x)(grad.contiguous()) for grad in arguments["grads"]]
    assert_same_results(call(arguments), expected)
    assert_same_results(call(arguments, reference), expected)


@pytest.mark.parametrize("of_codes", [sliced, channels_last, torch.Tensor.contiguous, misaligned])
def test_codes_of_another_memory_order_are_written_in_place(backend, of_codes):
    """A scale belongs to a block of the parameter's memory."""
    arguments = arguments_of([(4, 40, 3, 3)], layout=channels_last)
    expected = call(arguments)
    arguments["momentum_buffers"] = [of_codes(codes) for codes in arguments["momentum_buffers"]]
    assert_same_results(call(arguments), expected)


DIALECTS = [
    {},
    {"decayed_norm": True},
    {"clip": True},
    {"lr_in_momentum": True},
    {"decayed_norm": True, "clip": True, "lr_in_momentum": True},
]


@dtypes
@pytest.mark.parametrize("inverse", [None, 0.25, 1 / 3])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: " ".join(dialect) or "plain")
def test_measured_ratios_have_the_bits_of_given_ones_and_of_the_reference(extension, dialect, inverse, dtype):
    arguments = arguments_of([(30, 100), (3, 200), (3, 7000)], dtype, weight_decays=[0.1, 0.0, 0.05])
    arguments |= {"lrs": [3.0, 0.1, 5.0], "maximize": True, "nesterov": inverse is None}
    if inverse is not None:
        arguments["inv_scale"] = torch.tensor(inverse)
    measured = {**arguments, **dialect, "trust_coefs": [0.02, 0.3, 0.1], "eps": [0.01, 0.0, 0.3]}
    found = call(measured)
    given = {**arguments, "ratios": found["ratios"], "lr_in_momentum": dialect.get("lr_in_momentum", False)}
    assert_same_results(found, call(given))
    assert_same_results(found, call(given, reference))
    by_reference = call(measured, reference)
    assert_within_ulps(found["ratios"], by_reference["ratios"], 1)
    assert_same_results(by_reference, call({**given, "ratios": by_reference["ratios"]}, reference))


# What is written, and what is not


@dtypes
@options
def test_a_skipped_step_changes_nothing(backend, name, dtype):
    arguments = with_options(arguments_of([(30, 100), (3, 200)], dtype), name)
    arguments["grads"][0][3, 5] = torch.inf
    arguments["momentum_scales"][1][2, 1] = torch.nan
    before = {key: arguments[key] for key in WRITTEN}
    assert_same_results(call(arguments, inv_scale=torch.zeros(())), before)
    measured = {"ratios": None, "trust_coefs": [0.1, 0.2], "eps": [0.0, 0.1]}
    assert_same_results(call(arguments, **measured, inv_scale=torch.zeros(1)), before)


def test_memory_around_views_is_not_touched_and_versions_are_bumped(backend):
    arguments = arguments_of([(30, 100), (3, 4, 64)], layout=misaligned)
    arguments["momentum_buffers"] = [misaligned(x) for x in arguments["momentum_buffers"]]
    arguments["momentum_scales"] = [misaligned(x) for x in arguments["momentum_scales"]]
    tensors = [x for name in WRITTEN for x in arguments[name]]
    versions, pointers = [x._version for x in tensors], [x.data_ptr() for x in tensors]
    ops.sgd_(**arguments)
    assert all(x._version > version for x, version in zip(tensors, versions, strict=True))
    assert [x.data_ptr() for x in tensors] == pointers
    for x in tensors:
        assert x.new_empty(0).set_(x.untyped_storage())[0] == 7


@dtypes
def test_several_layers_have_the_bits_of_one_after_the_other(backend, dtype):
    shapes = [(5, 100), (1, 64), (0, 70), (40, 1000), (3, 200), (17000, 1)]
    arguments = with_options(arguments_of(shapes, dtype), "given ratios")
    together = call(arguments)
    for i in range(len(shapes)):
        one = {
            name: value[i : i + 1] if isinstance(value, list) or name == "ratios" else value
            for name, value in arguments.items()
        }
        assert_same_results(call(one), {name: together[name][i : i + 1] for name in WRITTEN})


# Shards


SHARDED = [(37, 100), (12, 640), (5, 20000), (7, 2, 192)]


@dtypes
@pytest.mark.parametrize("ranks", [2, 3, 5])
@options
def test_shards_of_rows_have_the_bits_of_the_whole(backend, name, ranks, dtype):
    arguments = with_options(arguments_of(SHARDED, dtype), name)
    whole, row_lengths = call(arguments), [x[0].numel() for x in arguments["params"]]
    for rank in range(ranks):
        bounds = [(-(-len(x) // ranks) * rank, -(-len(x) // ranks) * (rank + 1)) for x in arguments["params"]]

        def cut(tensors, bounds=bounds):
            return [x[begin:end] for x, (begin, end) in zip(tensors, bounds, strict=True)]

        shards = {key: [copied(x) for x in cut(arguments[key])] for key in (*WRITTEN, "grads")}
        offsets = [
            min(begin, len(x)) * n for (begin, _), x, n in zip(bounds, arguments["params"], row_lengths, strict=True)
        ]
        found = call({**arguments, **shards}, row_lengths=row_lengths, offsets=offsets)
        assert_same_results(found, {key: cut(whole[key]) for key in WRITTEN})
        if rank == 1:  # these tests would see positions that are counted from the shard
            assert differs(found, call({**arguments, **shards}))


@dtypes
@pytest.mark.parametrize("cuts", [(0, 128, 640), (0, 384, 512, 640), (0, 256, 600)])
def test_shards_of_columns_have_the_bits_of_the_whole(backend, cuts, dtype):
    """Cut between blocks; also where rows are sharded as well."""
    arguments = arguments_of([(12, cuts[-1])], dtype)
    whole, length = call(arguments), cuts[-1]
    for begin, end in pairwise(cuts):
        for rows in (slice(0, 12), slice(5, 12)):
            blocks = slice(begin // 128, -(-end // 128))

            def cut(name, tensors, rows=rows, blocks=blocks, columns=slice(begin, end)):
                return [tensors[0][rows, blocks if name == "momentum_scales" else columns].contiguous()]

            shards = {name: cut(name, arguments[name]) for name in (*WRITTEN, "grads")}
            offset = rows.start * length + begin
            found = call({**arguments, **shards}, row_lengths=[length], offsets=[offset])
            assert_same_results(found, {name: cut(name, whole[name]) for name in WRITTEN})


# Determinism


@dtypes
@pytest.mark.parametrize("measures", [False, True])
def test_bits_are_the_same_for_any_number_of_threads_and_from_run_to_run(extension, threads, measures, dtype):
    arguments = arguments_of([(300, 1000), (1000, 129), (3, 100000), (50, 100)], dtype)
    if measures:
        arguments |= {"trust_coefs": [0.1] * 4, "eps": [0.0] * 4}
    threads(1)
    expected = call(arguments)
    for count in (1, 2, 3):
        threads(count)
        found = call(arguments)
        assert_same_results(found, expected)
        assert not measures or torch.equal(found["ratios"], expected["ratios"])


def test_nothing_is_drawn_from_a_generator(backend):
    torch.manual_seed(3)
    before, arguments = torch.get_rng_state(), arguments_of([(30, 100)])
    expected = call(arguments)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert_same_results(call(arguments), expected)


# For torch.compile


@pytest.mark.parametrize("inverse", [None, 0.0])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"row_lengths": [200, 128], "offsets": [400, 0]},
        {"ratios": torch.ones(2), "nesterov": True},
        {"ratios": torch.ones(2), "trust_coefs": [0.1, 0.2], "eps": [0.0, 0.1], "clip": True},
    ],
    ids=["plain", "shards", "given", "measured"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(extension, device, dtype, more, inverse):
    def there(value):
        if isinstance(value, list):
            return [there(x) for x in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    arguments = {**arguments_of([(3, 200), (4, 128)], dtype), **more}
    if inverse is not None:
        arguments["inv_scale"] = torch.tensor(inverse)
    arguments = {name: there(value) for name, value in arguments.items()}
    first = [arguments.pop(name) for name in ("params", "grads", "momentum_buffers")]
    torch.library.opcheck(torch.ops.torchlars.sgd_.default, tuple(first), arguments)
