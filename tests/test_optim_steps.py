"""Steps of torchlars.optim.SGD, plain and under LARS, equal those of torch.optim.SGD.

The oracle is ``torch.optim.SGD``, which tests/test_bases.py holds to the formulas under LARS.
"""

import copy
import math

import pytest
import torch
from closeness import assert_within_ulps
from optimizers import change_lr, params_of
from sgd_cases import (
    EPS,
    TRUST_COEF,
    assert_same,
    assert_same_ratios,
    assert_unchanged,
    both,
    few,
    give_gradients,
    lars_pair,
    layers,
    pair,
    parameter,
    run,
    sgd_of,
    snapshot,
    step_with_lr_tensors,
    table,
    unders,
    widened,
    with_gradient,
)
from wrapped_networks import loss_of, network

import torchlars
from torchlars import LARS, ops, optim

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


# The update, plain and with trust ratios.


@table
def test_plain_step_equals_that_of_torch(options, decays, backend):
    ours, theirs = pair(options, decays)
    for step in range(4):
        give_gradients([ours, theirs], step)
        assert ours.step() is None
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        change_lr([ours, theirs], step)


@table
def test_lars_equals_lars_over_torchs_sgd_and_leaves_gradients_alone(options, decays, backend):
    ours, theirs = lars_pair(options, decays)
    for step in range(4):
        give_gradients([ours, theirs], step)
        grads = [param.grad for param in params_of(ours)]
        values = [None if grad is None else grad.clone() for grad in grads]
        versions = [None if grad is None else grad._version for grad in grads]
        assert ours.step() is None
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        assert_same_ratios(ours, theirs, 1e-14)
        assert len(ours.trust_ratios()) == 8 - (step in (0, 2))
        for param, grad, value, version in zip(params_of(ours), grads, values, versions, strict=True):
            assert param.grad is grad
            assert grad is None or (torch.equal(grad, value) and grad._version == version)
        change_lr([ours, theirs], step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128], ids=str)
@few
@both
def test_other_dtypes_equal_torchs_to_their_precision(pair_of, options, dtype, backend):
    ours, theirs = pair_of(options, dtype=dtype)
    for step in range(4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12 if dtype == torch.complex128 else 2e-6)


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@few
def test_a_16_bit_step_is_one_in_float64_that_was_rounded_once(options, dtype, momentum_dtype, backend):
    ours, theirs = pair(options, dtype=dtype, momentum_dtype=momentum_dtype)[0], pair(options)[1]
    for step in range(3):
        give_gradients([ours], step)
        widened(theirs, ours)
        ours.step()
        theirs.step()
        for index, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
            assert_within_ulps(p, q.detach().to(dtype), 1, f"parameter {index}")
            assert (p in ours.state) == (q in theirs.state)
            if p in ours.state:
                buffer, wide = ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
                if momentum_dtype is None:
                    assert_within_ulps(buffer, wide.to(dtype), 1, f"momentum {index}")
                else:
                    assert buffer.dtype == torch.float32
                    torch.testing.assert_close(buffer, wide.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@few
def test_a_16_bit_step_under_lars_is_one_in_float64_that_was_rounded_once(options, dtype, backend):
    ours, theirs = lars_pair(options, dtype=dtype)[0], lars_pair(options)[1]
    for step in range(3):
        give_gradients([ours], step)
        widened(theirs, ours)
        ours.step()
        theirs.step()
        ratios = ours.trust_ratios()
        for index, (p, q) in enumerate(zip(params_of(ours), params_of(theirs), strict=True)):
            assert_within_ulps(p, q.detach().to(dtype), 1, f"parameter {index}")
            if p in ratios:
                assert_within_ulps(ratios[p], theirs.trust_ratios()[q].float(), 1, f"ratio {index}")


@pytest.mark.parametrize(
    "options",
    [{}, {"dampening": 0.25}, {"dampening": 1.0}, {"nesterov": True}, {"nesterov": True, "maximize": True}],
    ids=str,
)
@both
def test_momentum_may_be_exactly_1(pair_of, options, backend):
    """A sum of all gradients, and with a dampening of 1 the first one for good."""
    ours, theirs = pair_of({"momentum": 1.0, **options})
    for optimizer in (ours, theirs):
        for group in optimizer.param_groups:
            group["momentum"] = 1.0
    for step in range(4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)


@both
def test_momentum_may_come_and_go(pair_of, backend):
    """A buffer that is missing is begun undampened; one that is there is kept for as long as there is no momentum."""
    ours, theirs = pair_of({"dampening": 0.25})
    for step, momentum in enumerate([0.0, 0.9, 0.0, 0.5, 0.8]):
        for group in [*ours.param_groups, *theirs.param_groups]:
            group["momentum"] = momentum
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)


@both
def test_groups_may_differ_in_direction_and_in_kind(pair_of, backend):
    ours, theirs = pair_of({"momentum": 0.9})
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(maximize=True)
        optimizer.param_groups[1].update(nesterov=True)
    for step in range(3):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)


@both
def test_a_step_without_any_gradient_changes_nothing(pair_of, backend):
    ours, _ = pair_of({"momentum": 0.9})
    before = snapshot(ours)
    assert ours.step() is None
    assert_unchanged(ours, before)
    assert len(ours.state) == 0


def test_it_is_torchs_sgd_to_whoever_asks():
    optimizer = optim.SGD(layers(0), lr=0.5, momentum=0.9)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.takes_trust_ratios is True
    assert torchlars.optim.SGD is optim.SGD
    named = optim.SGD([(f"layer{i}", param) for i, param in enumerate(layers(0))], lr=0.5)
    assert named.param_groups[0]["param_names"] == [f"layer{i}" for i in range(5)]
    theirs = torch.optim.SGD(layers(0), lr=0.5, momentum=0.9)
    assert list(optimizer.defaults.items()) == list(theirs.defaults.items())
    assert optimizer.param_groups[0].keys() == theirs.param_groups[0].keys()


# The same bits for any number of threads, from run to run, and whichever way a layer took.


def large_groups(dtype):
    """Layers that are cut into chunks, among small ones."""
    generator = torch.Generator().manual_seed(0)
    numels = [[70_001, 5, 16_384], [300, 40_000, *[64] * 20]]
    for index, group in enumerate(numels):
        values = [(i + 1) * torch.randn(n, generator=generator, dtype=torch.float64) for i, n in enumerate(group)]
        params = [torch.nn.Parameter(value.to(dtype)) for value in values]
        yield {"params": params, "weight_decay": [0.1, 0.03][index], "lr": [0.5, 0.2][index]}


def bits_of_large(dtype, under_lars, sgd=optim.SGD, **options):
    optimizer = base = sgd(list(large_groups(dtype)), **options)
    if under_lars:
        optimizer = LARS(base, eps=EPS, trust_coef=TRUST_COEF)
    run([optimizer], range(3))
    ratios = (
        [ratio for _, ratio in sorted((p.numel(), r) for p, r in optimizer.trust_ratios().items())]
        if under_lars
        else []
    )
    momenta = [base.state[param]["momentum_buffer"] for param in params_of(base)]
    return [*(param.detach() for param in params_of(base)), *momenta, *ratios]


def assert_bits(ones, others):
    assert len(ones) == len(others)
    for index, (one, other) in enumerate(zip(ones, others, strict=True)):
        assert one.dtype == other.dtype, index
        assert torch.equal(one, other), index


LARGE = {
    "float32": (torch.float32, {"momentum": 0.9}),
    "nesterov": (torch.float64, {"momentum": 0.9, "nesterov": True}),
    "bfloat16": (torch.bfloat16, {"momentum": 0.9, "momentum_dtype": torch.float32}),
}


@pytest.mark.parametrize("kind", LARGE)
@unders
def test_bits_do_not_depend_on_threads_or_repetition(extension, threads, under_lars, kind):
    dtype, options = LARGE[kind]
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(bits_of_large(dtype, under_lars, **options))
    for result in results[1:]:
        assert_bits(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sgd", [optim.SGD, torch.optim.SGD], ids=["ours", "torchs"])
@unders
def test_bits_do_not_depend_on_who_gathers(extension, monkeypatch, under_lars, sgd, dtype):
    gathered = bits_of_large(dtype, under_lars, sgd, momentum=0.9)
    monkeypatch.setattr(ops, "fast_layers", lambda kind: ops.NoFastPath())
    assert_bits(bits_of_large(dtype, under_lars, sgd, momentum=0.9), gathered)


@unders
def test_a_scaler_skips_the_step_of_an_overflow_and_leaves_no_trace(under_lars, backend):
    model, same = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer, plain = sgd_of(model, under_lars=under_lars), sgd_of(same, under_lars=under_lars)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(6):
        overflows = step in (0, 3)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if overflows:
            model[2].bias.grad[0] = math.inf
        before = [param.detach().clone() for param in model.parameters()], copy.deepcopy(optimizer.state_dict())
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert scaler.get_scale() < scale
            assert all(map(torch.equal, before[0], model.parameters()))
            after = optimizer.state_dict()
            if step == 0:  # momentum begins with zeros
                assert all(state["momentum_buffer"].count_nonzero() == 0 for state in after["state"].values())
                before[1]["state"] = after["state"]
            torch.testing.assert_close(after.pop("state"), before[1].pop("state"), rtol=0, atol=0)
            assert after == before[1]
        else:
            plain.zero_grad()
            loss_of(same, step).backward()
            plain.step()
            assert_same(optimizer, plain)  # a power of two leaves no trace


@pytest.mark.parametrize("numel", [2, 9])
def test_a_compiled_step_is_one_graph_however_many_layers_there_are(numel, extension):
    optimizer = optim.SGD(
        [with_gradient(parameter(n)) for n in range(1, numel)], lr=0.5, momentum=0.9, weight_decay=0.1
    )
    optimizer.step()  # which allocates momentum
    explanation = torch._dynamo.explain(optimizer.step)()
    assert explanation.graph_break_count == 0
    torch._dynamo.reset()


# A tensor as lr, closures, schedulers, hooks.


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@few
@both
def test_lr_may_be_a_tensor_which_is_read_at_each_step(pair_of, options, shape, lr_dtype, backend):
    ours, other = pair_of(options)[0], pair_of(options)[0]
    step_with_lr_tensors(ours, other, shape, lr_dtype, 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both
def test_lr_in_a_tensor_gives_the_bits_of_lr_as_a_number(pair_of, dtype, backend):
    ours, other = (pair_of({"momentum": 0.9}, dtype=dtype)[0] for _ in range(2))
    for group in ours.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    run([ours, other], range(3))
    assert_same(ours, other)
    assert isinstance(optim.SGD(layers(0), lr=torch.tensor(0.5)).param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@unders
def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned(under_lars, grad_mode, backend):
    model, same = network(), network()
    optimizer, theirs = (sgd_of(m, sgd, under_lars) for m, sgd in ((model, optim.SGD), (same, torch.optim.SGD)))
    for step in range(3):
        calls = []

        def closure(step=step, calls=calls):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        with grad_mode():
            loss = optimizer.step(closure)
            assert torch.is_grad_enabled() == (grad_mode is torch.enable_grad)
        theirs.zero_grad()
        expected = loss_of(same, step)
        expected.backward()
        theirs.step()
        assert calls == [True]
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        assert_same(optimizer, theirs, 1e-12)
    assert all(param.requires_grad and param.is_leaf for param in model.parameters())


SCHEDULERS = {
    "OneCycleLR": lambda one: torch.optim.lr_scheduler.OneCycleLR(one, max_lr=[1.0, 0.3], total_steps=8),
    "LambdaLR": lambda one: torch.optim.lr_scheduler.LambdaLR(one, [lambda n: 0.9**n, lambda n: 1 / (1 + n)]),
    "CyclicLR": lambda one: torch.optim.lr_scheduler.CyclicLR(one, 0.1, 1.0, step_size_up=3, base_momentum=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@unders
def test_schedulers_drive_it_as_they_drive_torchs(under_lars, name, backend):
    models = network(), network()
    optimizers = [sgd_of(m, sgd, under_lars) for m, sgd in zip(models, (optim.SGD, torch.optim.SGD), strict=True)]
    schedulers = [SCHEDULERS[name](one) for one in optimizers]
    seen = set()
    for step in range(6):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            scheduler.step()
        assert_same(*optimizers, 1e-12)
        for one, other in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
            assert (one["lr"], one["momentum"]) == (other["lr"], other["momentum"])
        seen.add((one["lr"], one["momentum"]))
    assert len(seen) > 3
    assert name == "LambdaLR" or len({momentum for _, momentum in seen}) > 3


def test_hooks_fire_once_on_the_object_they_were_given_to(backend):
    model, fired = network(dtype=torch.float32), []
    optimizer = sgd_of(model, under_lars=True)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: fired.append("pre")),
        optimizer.register_step_post_hook(lambda *_: fired.append("post")),
        optimizer.optim.register_step_pre_hook(lambda *_: fired.append("base pre")),
        optimizer.optim.register_step_post_hook(lambda *_: fired.append("base post")),
    ]
    loss_of(model, 0).backward()
    optimizer.step()
    assert fired == ["pre", "base pre", "base post", "post"]
    optimizer.optim.step()
    assert fired[4:] == ["base pre", "base post"]
    assert len(handles) == 4


# Compiled.


@pytest.fixture
def compiled():
    """Compile a function, without machine code, and note the names of what was called."""
    names = set()

    def note(module, inputs):
        names.update(str(node.target) for node in module.graph.nodes if node.op.startswith("call"))
        return module.forward

    torch._dynamo.reset()
    yield lambda function: (torch.compile(function, backend=note), names)
    torch._dynamo.reset()


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning",  # torch's own, while it compiles
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
@pytest.mark.parametrize(
    ("backend", "under_lars"), [("extension", False), ("extension", True), ("reference", True)], indirect=["backend"]
)
def test_a_compiled_step_gives_the_numbers_of_an_eager_one(under_lars, compiled, backend):
    def build():
        one, other = parameter(3, 4, scale=2.0), parameter(5)
        base = optim.SGD(
            [{"params": [one], "weight_decay": 0.1}, {"params": [other], "weight_decay": 0.03}], lr=0.5, momentum=0.9
        )
        return LARS(base, eps=EPS, trust_coef=TRUST_COEF) if under_lars else base

    optimizer, expected = build(), build()
    step, names = compiled(optimizer.step)
    for number in range(3):
        give_gradients([optimizer, expected], number + 3)
        step()
        expected.step()
        assert_same(optimizer, expected)
        if under_lars:
            assert_same_ratios(optimizer, expected)
        for one in (optimizer, expected):
            one.param_groups[0]["lr"] *= 0.5
            one.param_groups[1]["weight_decay"] *= 1.5
    assert backend == "reference" or "torchlars.sgd_" in names
    assert not under_lars or backend == "reference" or {"torchlars.squared_norms", "torchlars.trust_ratios"} <= names
