"""torchlars.optim.SGD with momentum in 8 bits: which layers have it, and steps, alone and under the wrappers."""

import copy
import pickle

import pytest
import torch
from cases import channels_last, sliced, transposed
from closeness import assert_within_ulps
from code_cases import assert_same_bits, by_hand
from coded_layers import (
    BUFFER,
    CODES,
    IS_CODED,
    LAYERS,
    MIN_SIZE,
    OPTIONS,
    ORDER,
    SCALES,
    Expected,
    assert_same_runs,
    assert_same_tensors,
    give_gradients,
    in_order,
    run,
    sgd,
)
from sgd_cases import parameter, with_gradient

from torchlars import LAMB, LARC, LARS, ops, optim, reference

pytestmark = pytest.mark.usefixtures("one_thread")

options = pytest.mark.parametrize("name", OPTIONS)


# Which layers have it


def state_of(param, **given):
    """The kinds of momentum that a layer has after one step."""
    optimizer = optim.SGD(
        [with_gradient(param)],
        **{"lr": 0.1, "momentum": 0.9, "momentum_dtype": torch.int8, "min_8bit_size": 0, **given},
    )
    optimizer.step()
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in optimizer.state[param].items()}


def coded(*shape):
    kept = {CODES: (torch.int8, shape), SCALES: (torch.float32, (shape[0], -(-torch.Size(shape[1:]).numel() // 128)))}
    return kept if len(shape) < 3 else {**kept, ORDER: (torch.int64, ())}


def plain(*shape, dtype=torch.float32):
    return {BUFFER: (dtype, shape)}


RULES = {
    "of the least size": (lambda: parameter(32, 128), {"min_8bit_size": 4096}, coded(32, 128)),
    "below the least size": (lambda: parameter(32, 128), {"min_8bit_size": 4097}, plain(32, 128)),
    "of the default's least size": (
        lambda: parameter(64, 64),
        {"min_8bit_size": optim.sgd.MIN_8BIT_SIZE},
        coded(64, 64),
    ),
    "below the default": (lambda: parameter(63, 65), {"min_8bit_size": 4096}, plain(63, 65)),
    "rows of 64": (lambda: parameter(3, 64), {}, coded(3, 64)),
    "rows of 63": (lambda: parameter(300, 63), {}, plain(300, 63)),
    "rows of 2 times 32": (lambda: parameter(3, 2, 32), {}, coded(3, 2, 32)),
    "one row": (lambda: parameter(1, 200), {}, coded(1, 200)),
    "one row, whatever its stride": (lambda: torch.nn.Parameter(parameter(2, 200).detach()[::2]), {}, coded(1, 200)),
    "10 dimensions": (lambda: parameter(2, 64, *[1] * 8), {}, coded(2, 64, *[1] * 8)),
    "11 dimensions": (lambda: parameter(2, 64, *[1] * 9), {}, plain(2, 64, *[1] * 9)),
    "no elements": (lambda: parameter(0, 200), {}, plain(0, 200)),
    "one dimension": (lambda: parameter(5000), {}, plain(5000)),
    "no dimension": (lambda: parameter(), {}, plain()),
    "bfloat16": (lambda: parameter(3, 128, dtype=torch.bfloat16), {}, coded(3, 128)),
    "float16": (lambda: parameter(3, 129, dtype=torch.float16), {}, coded(3, 129)),
    "bfloat16, one dimension": (lambda: parameter(500, dtype=torch.bfloat16), {}, plain(500)),
    "float64": (lambda: parameter(3, 128, dtype=torch.float64), {}, plain(3, 128, dtype=torch.float64)),
    "complex": (lambda: parameter(3, 128, dtype=torch.complex64), {}, plain(3, 128, dtype=torch.complex64)),
    "no momentum": (lambda: parameter(3, 128), {"momentum": 0.0}, {}),
    "transposed": (lambda: torch.nn.Parameter(transposed(parameter(70, 128).detach())), {}, plain(70, 128)),
    "gaps": (lambda: torch.nn.Parameter(sliced(parameter(3, 128).detach())), {}, plain(3, 128)),
    "channels_last": (
        lambda: torch.nn.Parameter(channels_last(parameter(4, 16, 3, 3).detach())),
        {},
        coded(4, 16, 3, 3),
    ),
    "float32 asked for": (lambda: parameter(64, 128), {"momentum_dtype": torch.float32}, plain(64, 128)),
    "nothing asked for": (lambda: parameter(64, 128), {"momentum_dtype": None}, plain(64, 128)),
    "nothing asked for, bfloat16": (
        lambda: parameter(64, 128, dtype=torch.bfloat16),
        {"momentum_dtype": None},
        plain(64, 128, dtype=torch.bfloat16),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_which_layers_are_coded(rule, backend):
    param, given, expected = RULES[rule]
    assert state_of(param(), **given) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_is_not_asked(dtype, backend):
    optimizer, expected = sgd(), sgd()
    default = torch.get_default_dtype()
    try:
        for step in range(2):
            for one, dtype_then in ((optimizer, dtype), (expected, default)):
                give_gradients(one, step)
                torch.set_default_dtype(dtype_then)
                one.step()
                torch.set_default_dtype(default)
    finally:
        torch.set_default_dtype(default)
    assert_same_runs(optimizer, expected)


def test_groups_have_keys_of_their_own(backend):
    first, second, third, fourth = (with_gradient(parameter(10, 128, scale=n)) for n in range(1, 5))
    optimizer = optim.SGD(
        [
            {"params": [first]},
            {"params": [second], "momentum_dtype": torch.float32},
            {"params": [third], "min_8bit_size": 1281},
        ],
        lr=0.1,
        momentum=0.9,
        momentum_dtype=torch.int8,
        min_8bit_size=1280,
    )
    optimizer.add_param_group({"params": [fourth], "min_8bit_size": 0})
    assert [group["momentum_dtype"] for group in optimizer.param_groups] == [torch.int8, torch.float32] + [
        torch.int8
    ] * 2
    assert [group["min_8bit_size"] for group in optimizer.param_groups] == [1280, 1280, 1281, 0]
    optimizer.step()
    assert [CODES in optimizer.state[param] for param in (first, second, third, fourth)] == [True, False, False, True]


def test_one_group_alone_may_be_in_8_bits(backend):
    first, second = with_gradient(parameter(64, 64)), with_gradient(parameter(64, 64))
    optimizer = optim.SGD(
        [{"params": [first]}, {"params": [second], "momentum_dtype": torch.int8}], lr=0.1, momentum=0.9
    )
    optimizer.step()
    assert (list(optimizer.state[first]), list(optimizer.state[second])) == ([BUFFER], [CODES, SCALES])


def test_groups_hold_the_keys_of_torchs_sgd_unless_more_is_asked_for():
    theirs = set(torch.optim.SGD([parameter(2)]).param_groups[0])
    assert set(optim.SGD([parameter(2)]).param_groups[0]) == theirs
    in_8bit = optim.SGD([parameter(2)], momentum_dtype=torch.int8)
    assert set(in_8bit.param_groups[0]) == theirs | {"momentum_dtype", "min_8bit_size"}
    assert in_8bit.param_groups[0]["min_8bit_size"] == in_8bit.defaults["min_8bit_size"] == 4096
    assert set(optim.SGD([parameter(2)], momentum_dtype=torch.float32).param_groups[0]) == theirs | {"momentum_dtype"}


def test_min_8bit_size_is_a_keyword():
    with pytest.raises(TypeError, match="positional arguments"):
        optim.SGD([parameter(2)], 0.1, 0.9, 0.0, 0.0, False, False, torch.int8, 0)


# Steps


@options
def test_steps_have_the_bits_of_the_reference(name, backend):
    optimizer = sgd(**OPTIONS[name])
    expected = Expected(optimizer)
    for step in range(4):
        give_gradients(optimizer, step)
        optimizer.step()
        expected.step()
        expected.assert_same()
        if not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
            optimizer.param_groups[0]["lr"] *= 0.7


def test_a_layer_that_is_shared_by_no_other_has_codes_as_by_hand(backend):
    """Its position counts from its own first element, whatever stands before it in its bucket."""
    params = [with_gradient(parameter(n, 200, scale=n)) for n in (7, 5, 9)]
    grads = [torch.randn(param.shape) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    before = [param.detach().numpy().copy() for param in params]
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9, momentum_dtype=torch.int8, min_8bit_size=0)
    optimizer.step()
    for param, grad, old in zip(params, grads, before, strict=True):
        assert_same_bits(list(optimizer.state[param].values()), by_hand(grad.numpy(), old), "codes and scales")


DIALECTS = {
    "LARS": (LARS, {"eps": 0.05}),
    "decayed, clipped": (LARS, {"norm": "decayed", "clip": True, "eps": 0.05, "trust_coef": 0.01}),
    "lr in momentum": (LARS, {"lr_in_momentum": True, "norm": "decayed"}),
    "LARC": (LARC, {"trust_coef": 0.003}),
}


@options
@pytest.mark.parametrize("dialect", DIALECTS)
def test_steps_under_lars_have_the_bits_of_the_reference_with_its_ratios(dialect, name, backend):
    wrapper, given = DIALECTS[dialect]
    optimizer = wrapper(sgd(**OPTIONS[name]), **{"trust_coef": 0.2, **given})
    twin = wrapper(sgd(cls=torch.optim.SGD, **OPTIONS[name]), **{"trust_coef": 0.2, **given})
    expected = Expected(optimizer)
    for step in range(3):
        give_gradients(optimizer, step)
        for p, q in zip(in_order(optimizer), in_order(twin), strict=True):
            q.data.copy_(p.detach())
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
        ratios, theirs = optimizer.trust_ratios(), twin.trust_ratios()
        for p, q in zip(in_order(optimizer), in_order(twin), strict=True):
            assert_within_ulps(ratios[p], theirs[q], 4)
        expected.step(ratios, lr_in_momentum=given.get("lr_in_momentum", False))
        expected.assert_same()
    assert any(ratio != 1 for ratio in ratios.values())


@pytest.mark.parametrize("wrap", [LAMB, LARS], ids=["LAMB", "LARS of updates"])
def test_steps_whose_updates_are_scaled_have_the_bits_of_the_reference(wrap, backend):
    """What bitsandbytes' LARS8bit with max_unorm becomes; momentum is that of the base alone."""
    given = {"clip": True} if wrap is LAMB else {"apply_to": "update"}
    optimizer = wrap(sgd(), trust_coef=0.02, **given)
    expected = Expected(optimizer)
    for step in range(3):
        give_gradients(optimizer, step)
        before = [param.detach().clone() for param in in_order(optimizer)]
        optimizer.step()
        expected.step()
        for i, param in enumerate(in_order(optimizer)):
            ratio = optimizer.trust_ratios()[param]
            assert ratio != 1
            reference.scale_updates_([expected.params[i]], [before[i]], ratios=ratio.reshape(1))
        expected.assert_same()


def test_a_gradient_may_be_missing_in_any_step(backend):
    """Also before a layer's momentum has begun."""
    optimizer, bare = sgd(), sgd()
    for step in range(3):
        give_gradients(optimizer, step)
        in_order(optimizer)[0].grad = in_order(optimizer)[0].grad if step > 0 else None
        optimizer.step()
        for p, q in zip(in_order(optimizer), in_order(bare), strict=True):
            q.grad = None if p.grad is None or p is not in_order(optimizer)[0] else p.grad
        bare.step()
    p, q = in_order(optimizer)[0], in_order(bare)[0]
    assert_same_tensors([p.detach(), *optimizer.state[p].values()], [q.detach(), *bare.state[q].values()])


@options
def test_bits_do_not_depend_on_who_gathers(name, extension, monkeypatch):
    def trained(wrap):
        optimizer = wrap(sgd(**OPTIONS[name]))
        run(optimizer, range(3))
        return optimizer

    gathered = [trained(lambda base: base), trained(LARS)]
    monkeypatch.setattr(ops, "fast_layers", lambda kind: ops.NoFastPath())
    assert_same_runs(trained(lambda base: base), gathered[0])
    assert_same_runs(trained(LARS), gathered[1])


def test_steps_are_the_same_for_any_number_of_threads(extension, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        params = [parameter(300, 1000, scale=0.1), parameter(700, 130)]
        optimizer = LARS(optim.SGD(params, lr=0.1, momentum=0.9, momentum_dtype=torch.int8))
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
        results.append([x.detach() for p in params for x in (p, *optimizer.state[p].values())])
    for result in results[1:]:
        assert_same_bits(result, results[0], "tensor")


# State, copies, memory


def test_the_state_has_the_layers_shapes_and_memory_order(backend):
    optimizer = sgd()
    run(optimizer, range(1))
    first = [list(optimizer.state[param].values()) for param in in_order(optimizer)]
    for step in (1, 2):
        give_gradients(optimizer, step)
        versions = [[x._version for x in kept] for kept in first]
        optimizer.step()
        for i, param in enumerate(in_order(optimizer)):
            state = optimizer.state[param]
            assert all(x is y for x, y in zip(state.values(), first[i], strict=True))
            written = [x._version > version for x, version in zip(first[i], versions[i], strict=True)]
            assert written == [name != ORDER for name in state]
            assert not any(x.requires_grad for x in first[i])
            kept = state[CODES if IS_CODED[i] else BUFFER]
            assert (kept.shape, kept.stride()) == (param.shape, param.stride())
            if IS_CODED[i]:
                shape = LAYERS[list(LAYERS)[i]][0]
                assert state[SCALES].shape == (shape[0], -(-torch.Size(shape[1:]).numel() // 128))
                assert state[SCALES].is_contiguous()


def test_rows_of_whole_blocks_take_at_most_1_04_bytes_an_element(backend):
    param = with_gradient(parameter(64, 1024))
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9, momentum_dtype=torch.int8)
    optimizer.step()
    assert sum(x.untyped_storage().nbytes() for x in optimizer.state[param].values()) <= 1.04 * param.numel()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("wrap", [lambda base: base, LARS], ids=["plain", "LARS"])
def test_copies_go_on_with_the_same_bits(wrap, how, backend):
    optimizer = wrap(sgd())
    run(optimizer, range(2))
    twin = COPIES[how](optimizer)
    for one in (optimizer, twin):
        run(one, range(2, 4))
    assert_same_runs(optimizer, twin)
    assert twin.param_groups[0]["min_8bit_size"] == MIN_SIZE


# Overlapping and repeated layers, torch.compile


def test_overlapping_layers_are_stepped_one_after_the_other(backend):
    memory = torch.randn(30, 128, generator=torch.Generator().manual_seed(0))
    overlapping = [torch.nn.Parameter(memory[:20]), torch.nn.Parameter(memory[10:])]
    grads = [torch.randn(20, 128), torch.randn(20, 128)]
    apart = memory.clone()
    given = {"lr": 0.1, "momentum": 0.9, "momentum_dtype": torch.int8, "min_8bit_size": 0}
    optimizer = optim.SGD(overlapping, **given)
    twins = [torch.nn.Parameter(memory[:20].clone()), torch.nn.Parameter(memory[10:].clone())]
    expected = [optim.SGD([twin], **given) for twin in twins]
    for _ in range(3):
        for param, grad in zip(overlapping, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        for part, twin, grad, one in zip((apart[:20], apart[10:]), twins, grads, expected, strict=True):
            twin.data.copy_(part)
            twin.grad = grad.clone()
            one.step()
            part.copy_(twin.detach())
    assert torch.equal(memory, apart)
    for param, twin, one in zip(overlapping, twins, expected, strict=True):
        assert_same_tensors(list(optimizer.state[param].values()), list(one.state[twin].values()))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
def test_a_parameter_that_is_listed_twice_is_stepped_once(backend):
    param, twin = (with_gradient(parameter(10, 128)) for _ in range(2))
    given = {"lr": 0.1, "momentum": 0.9, "momentum_dtype": torch.int8, "min_8bit_size": 0}
    twice, once = optim.SGD([param, param], **given), optim.SGD([twin], **given)
    for _ in range(2):
        twice.step()
        once.step()
    assert_same_tensors([param.detach(), *twice.state[param].values()], [twin.detach(), *once.state[twin].values()])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("wrap", [lambda base: base, LARS], ids=["plain", "LARS"])
def test_a_compiled_step_has_the_bits_of_an_eager_one(wrap, extension):
    from torch._dynamo.backends.registry import lookup_backend

    names = []

    def note(module, inputs):
        names.extend(str(node.target) for node in module.graph.nodes if node.op.startswith("call"))
        return lookup_backend("aot_eager")(module, inputs)

    torch._dynamo.reset()
    optimizer, twin = wrap(sgd()), wrap(sgd())
    step = torch.compile(optimizer.step, backend=note, fullgraph=wrap is not LARS)
    for number in range(3):
        for one in (optimizer, twin):
            give_gradients(one, number)
        step()
        twin.step()
        assert_same_runs(optimizer, twin)
    assert "torchlars.sgd_" in names
    torch._dynamo.reset()
