"""The calls under "Coming from X" in examples/README.md beside the peers themselves, where they are installed."""

import functools
import importlib
import inspect
import itertools
import re
import warnings

import pytest
import torch
from peer_calls import (
    ADAM_HYPER,
    BASES,
    CALLS,
    LRS,
    MOMENTUM,
    README,
    ROOT,
    SECOND_DECAY,
    SECOND_LR,
    SGD_HYPER,
    Problem,
    assert_same,
    by_formula,
    differ,
    ours,
    two_groups,
)
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:a layer whose weights are all 0:UserWarning"),  # they are, on purpose
    pytest.mark.filterwarnings("ignore:a group with .* takes its lr whole:UserWarning"),  # as in the peers
]


@functools.cache  # OpenMMLab's registries can be made only once
def import_alone(name):
    return importlib.import_module("benchmarks.step_time.contestants").import_alone(name)


@pytest.fixture
def installed(monkeypatch):
    """Import a peer, or skip the test."""

    def import_or_skip(name):
        monkeypatch.syspath_prepend(str(ROOT))
        load = importlib.import_module
        if name.startswith(("timm.", "lightly.", "mmpretrain.")):  # their parents import torchvision, or mmcv
            load = import_alone
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return load(name)
            except ImportError as error:
                pytest.skip(f"{name} is not installed: {error}")

    return import_or_skip


def in_form(optimizer, foreach):
    """The argument for a form of an optimizer; a version that has one form only is compared in that."""
    if "foreach" in inspect.signature(optimizer).parameters:
        return {"foreach": foreach}
    if foreach:
        pytest.skip(f"this version of {optimizer.__module__} has no foreach")
    return {}


def compare(problem, optimizer, params, peer, peer_params, tolerance=1e-12):
    """Run both, and compare them after every step. Return whether ratios were below 1, of all layers and steps."""
    is_below_1 = set()
    for i, _ in enumerate(zip(problem.steps(optimizer, params), problem.steps(peer, peer_params), strict=True)):
        optimizer.step()
        peer.step()
        assert_same(params, peer_params, tolerance, f"step {i}")
        is_below_1 |= {float(ratio) < 1 for ratio in optimizer.trust_ratios().values()}
    return is_below_1


TIMM = [
    pytest.param(momentum, clip, foreach, id=f"{momentum}{'-clip' * clip}{'-foreach' * foreach}")
    for momentum, clip, foreach in itertools.product(MOMENTUM, (False, True), (False, True))
]


@pytest.mark.parametrize(("momentum", "clip", "foreach"), TIMM)
def test_timm_lars(installed, backend, momentum, clip, foreach):
    lars = installed("timm.optim.lars").Lars
    sgd, clipped = SGD_HYPER | MOMENTUM[momentum], set()
    for seed in range(3):
        problem = Problem(seed)
        params, theirs = problem.params(), problem.params()
        call = CALLS["timm `Lars`"].replace("over(SGD", f"over(SGD, clip={clip}, trust_coef=0.02")
        optimizer = ours(call, params, sgd=sgd)
        peer = lars(two_groups(theirs), **sgd, trust_clip=clip, trust_coeff=0.02, **in_form(lars, foreach))
        clipped |= compare(problem, optimizer, params, peer, theirs)
    assert not clip or clipped == {True, False}


@pytest.mark.parametrize("always_adapt", [False, True])
def test_timm_lars_without_weight_decay_and_with_zero_layers(installed, always_adapt):
    lars = installed("timm.optim.lars").Lars
    problem = Problem(9)
    problem.lrs = (4.0, *LRS[1:])
    problem.layers[0].zero_()
    problem.grads[2][2].zero_()
    params, theirs = problem.params(), problem.params()
    call = CALLS["timm `Lars`"].replace("always_adapt=False", f"clip=True, always_adapt={always_adapt}")
    optimizer = ours(call, params, params=two_groups(params, weight_decay=0.0))
    groups = two_groups(theirs, weight_decay=0.0)
    peer = lars(groups, **SGD_HYPER, trust_clip=True, always_adapt=always_adapt)
    compare(problem, optimizer, params, peer, theirs)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_timm_lamb(installed, backend, clip, foreach, base):
    lamb = installed("timm.optim.lamb").Lamb
    for seed in range(3):
        problem = Problem(seed)
        params, theirs = problem.params(), problem.params()
        call = CALLS["timm `Lamb`"].replace("**adam)", f"**adam), clip={clip}")
        peer = lamb(two_groups(theirs), **ADAM_HYPER, max_grad_norm=None, trust_clip=clip, **in_form(lamb, foreach))
        compare(problem, ours(call, params, base), params, peer, theirs)


@pytest.mark.parametrize("always_adapt", [False, True])
def test_timm_lamb_clips_gradients_and_adapts_what_decays(installed, always_adapt):
    lamb = installed("timm.optim.lamb").Lamb
    problem = Problem(10)
    params, theirs = problem.params(), problem.params()
    call = CALLS["timm `Lamb`"].replace("always_adapt=False", f"always_adapt={always_adapt}")
    optimizer = ours(call, params, params=two_groups(params, weight_decay=0.0))
    peer = lamb(two_groups(theirs, weight_decay=0.0), **ADAM_HYPER, always_adapt=always_adapt)
    norms = []
    for _ in zip(problem.steps(optimizer, params), problem.steps(peer, theirs), strict=True):
        norms.append(nn.utils.clip_grad_norm_(params, 1.0) > 1)
        optimizer.step()
        peer.step()
    assert any(norms)
    assert_same(params, theirs, 1e-5)
    assert differ(params, theirs, by=1e-13)


@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize("decay", [SECOND_DECAY, 0.0])
def test_lightly_lars(installed, backend, momentum, decay):
    lars = installed("lightly.utils.lars").LARS
    sgd = SGD_HYPER | MOMENTUM[momentum]
    for seed in range(2):
        problem = Problem(seed)
        problem.layers[0].zero_()
        params, theirs = problem.params(), problem.params()
        call = CALLS["quadra, lightning-bolts, lightly `LARS`"].replace("over(SGD", "over(SGD, trust_coef=0.02")
        optimizer = ours(call, params, sgd=sgd, params=two_groups(params, weight_decay=decay))
        peer = lars(two_groups(theirs, weight_decay=decay), **sgd, trust_coefficient=0.02)
        compare(problem, optimizer, params, peer, theirs)


@pytest.mark.parametrize("momentum", MOMENTUM)
def test_mmpretrain_lars(installed, backend, momentum):
    lars = installed("mmpretrain.engine.optimizers.lars").LARS
    sgd = SGD_HYPER | MOMENTUM[momentum]
    for seed in range(2):
        problem = Problem(seed)
        problem.layers[0].zero_()
        problem.grads[2][1].zero_()
        params, theirs = problem.params(), problem.params()
        call = CALLS["mmselfsup, mmpretrain `LARS`"].replace("lr_in_momentum=True)", "lr_in_momentum=True, eps=1e-3)")
        groups = [{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.0, "lars_exclude": True}]
        compare(problem, ours(call, params, sgd=sgd), params, lars(groups, **sgd, eps=1e-3), theirs)


@pytest.mark.parametrize("momentum", ["momentum", "nesterov"])
@pytest.mark.parametrize("foreach", [False, True])
def test_pytorch_optimizer_lars(installed, backend, momentum, foreach):
    lars = installed("pytorch_optimizer").LARS
    sgd = SGD_HYPER | MOMENTUM[momentum]
    for seed in range(3):
        problem = Problem(seed)
        params, theirs = problem.params(), problem.params()
        optimizer = ours(CALLS["pytorch_optimizer `LARS`"], params, sgd=sgd)
        peer = lars([{"params": theirs[:2]}, {"params": theirs[2:]}], **sgd, **in_form(lars, foreach))
        compare(problem, optimizer, params, peer, theirs)


def test_pytorch_optimizer_lars_is_as_its_formula_where_it_differs(installed):
    lars = installed("pytorch_optimizer").LARS
    sgd, problem = SGD_HYPER | {"dampening": 0.3}, Problem(11)
    problem.grads[0][0].zero_()
    theirs = problem.params()
    peer = lars([{"params": theirs[:2]}, {"params": theirs[2:]}], **sgd)
    assert_same(problem.run(peer, theirs), by_formula("pytorch_optimizer `LARS`", problem, sgd=sgd))


@pytest.mark.parametrize("foreach", [False, True])
def test_pytorch_optimizer_lamb(installed, foreach):
    lamb = installed("pytorch_optimizer").Lamb
    problem = Problem(12)
    problem.lrs = [lr / 10 for lr in LRS]
    problem.layers = [layer / layer.norm() for layer in problem.layers]
    params, theirs = problem.params(), problem.params()
    adam = ADAM_HYPER | {"eps": 0.0, "weight_decay": 0.0}
    call = CALLS["ColossalAI, pytorch_optimizer `Lamb`"]
    optimizer = ours(call, params, adam=adam, params=two_groups(params, weight_decay=0.0))
    peer = lamb(two_groups(theirs, weight_decay=0.0), **adam, adam_debias=True, **in_form(lamb, foreach))
    compare(problem, optimizer, params, peer, theirs)
    params[0].data.mul_(100)
    theirs[0].data.mul_(100)
    for _ in zip(problem.steps(optimizer, params), problem.steps(peer, theirs), strict=True):
        optimizer.step()
        peer.step()
    assert differ(params[:1], theirs[:1])
    assert_same(params[1:], theirs[1:])


@pytest.mark.parametrize("name", ["LARS", "PytorchLARS"])
@pytest.mark.parametrize("max_unorm", [0.02, 0.3])
def test_bitsandbytes_lars(installed, backend, name, max_unorm):
    lars = getattr(installed("bitsandbytes").optim.lars, name)
    clipped = set()
    for seed in range(3):
        problem = Problem(seed, torch.float32)
        params, theirs = problem.params(), problem.params()
        call = CALLS["bitsandbytes `LARS`, `LARS32bit`"].replace("0.02", str(max_unorm))
        optimizer = ours(call, params)
        peer = lars(two_groups(theirs), **SGD_HYPER, max_unorm=max_unorm)
        clipped |= compare(problem, optimizer, params, peer, theirs, tolerance=1e-5)
    assert clipped == {True, False}


def test_bitsandbytes_ignores_nesterov_and_dampening_and_leaves_zeros(installed):
    module = installed("bitsandbytes").optim.lars
    call, problem = CALLS["bitsandbytes `LARS`, `LARS32bit`"], Problem(13, torch.float32)
    for momentum in {"nesterov": True}, {"dampening": 0.3}:
        sgd = SGD_HYPER | momentum
        for name, is_ignored in ("LARS", True), ("PytorchLARS", False):
            params, theirs = problem.params(), problem.params()
            optimizer = ours(call, params, sgd=SGD_HYPER if is_ignored else sgd)
            compare(problem, optimizer, params, getattr(module, name)(two_groups(theirs), **sgd), theirs, 1e-5)
    problem.layers[0].zero_()
    params, theirs = problem.params(), problem.params()
    problem.run(ours(call, params), params)
    problem.run(module.LARS(two_groups(theirs), **SGD_HYPER), theirs)
    assert torch.count_nonzero(theirs[0]) == 0
    assert torch.count_nonzero(params[0]) > 0
    assert_same(params[1:], theirs[1:], 1e-5)


def test_bitsandbytes_in_8_bits_is_sgd_where_ours_is_lars(installed, backend):
    lars = installed("bitsandbytes").optim.lars.LARS8bit
    random = torch.Generator().manual_seed(16)
    layers = [torch.randn(shape, generator=random) for shape in ((64, 64), (64, 63), (64, 64))]
    params, theirs, plain = ([nn.Parameter(layer.clone()) for layer in layers] for _ in range(3))
    optimizer = ours(CALLS["bitsandbytes `LARS8bit`, `LARS(optim_bits=8)`"], params, params=params)
    peer, sgd = lars(theirs, **SGD_HYPER, max_unorm=0.02), torch.optim.SGD(plain, **SGD_HYPER)
    for step in range(3):
        before = [param.detach().clone() for param in params]
        for i, layer in enumerate(layers):
            grad = torch.randn(layer.shape, generator=random)
            params[i].grad, theirs[i].grad, plain[i].grad = grad, grad.clone(), grad.clone()
        optimizer.step()
        peer.step()
        sgd.step()
        for new, old in zip(params, before, strict=True):
            torch.testing.assert_close((new - old).norm(), SGD_HYPER["lr"] * 0.02 * old.norm(), rtol=1e-4, atol=0)
        # fewer than min_8bit_size elements: 32 bits, and max_unorm, in both
        assert_same(params[1:2], theirs[1:2], 1e-5, f"step {step}")
        for i in (0, 2):
            torch.testing.assert_close(theirs[i], plain[i], rtol=0, atol=0.1 if step else 1e-6)
    assert peer.state[theirs[0]]["state1"].dtype == torch.uint8
    assert "momentum_codes" in optimizer.state[params[0]]
    assert "momentum_buffer" in optimizer.state[params[1]]
    theirs[0].grad[0, 0] = params[0].grad[0, 0] = torch.nan
    optimizer.step()
    peer.step()
    for param in theirs[0], params[0]:
        param.data.zero_()
        param.grad.zero_()
    optimizer.step()
    peer.step()
    assert theirs[0].isfinite().all(), "its codes of NaN are a number"
    assert params[0].isnan().any()


def test_all_arguments_of_bitsandbytes_are_told(installed):
    module = installed("bitsandbytes").optim.lars
    told = README.partition("### From bitsandbytes")[2].partition("What bitsandbytes")[0]
    for lars in module.LARS, module.LARS8bit, module.LARS32bit, module.PytorchLARS:
        for name in inspect.signature(lars).parameters:
            assert re.search(rf"`{name}\b", told), name


@pytest.fixture
def by_optax(installed):
    """Return a function that takes all steps with some layers of a problem."""
    jax, optax = installed("jax"), installed("optax")

    def run(problem, indices, relative, transformation):
        with jax.enable_x64(True):
            lrs = jax.numpy.array([lr * relative for lr in problem.lrs])
            optimizer = transformation(optax, lambda count: lrs[count])
            params = {str(i): jax.numpy.array(problem.layers[i].numpy()) for i in indices}
            state = optimizer.init(params)
            for grads in problem.grads:
                gradients = {str(i): jax.numpy.array(grads[i].numpy()) for i in indices}
                updates, state = optimizer.update(gradients, state, params)
                params = optax.apply_updates(params, updates)
            assert all(str(param.dtype) == "float64" for param in params.values())
            return {i: torch.tensor(params[str(i)].tolist(), dtype=torch.float64) for i in indices}

    return run


@pytest.mark.parametrize("nesterov", [False, True])
def test_optax_lars(by_optax, backend, nesterov):
    sgd = SGD_HYPER | {"nesterov": nesterov}
    for seed in range(2):
        problem = Problem(seed)
        problem.layers[1].zero_()
        problem.grads[3][0].zero_()
        params = problem.params()
        result = problem.run(ours(CALLS["`optax.lars`"], params, sgd=sgd), params)
        for indices, relative, decay in ((0, 2), 1.0, 0.01), ((1, 3), SECOND_LR, SECOND_DECAY):
            expected = by_optax(
                problem, indices, relative, lambda optax, lr, d=decay: optax.lars(lr, d, nesterov=nesterov)
            )
            assert_same([result[i] for i in indices], expected.values(), message=f"seed {seed}")


def test_optax_lars_with_masks(by_optax, backend):
    problem = Problem(14)
    problem.second_lr = 1.0
    params = problem.params()
    call = CALLS["`optax.lars`"].replace("params", '[{"params": weights}, plain_inside]')
    result = problem.run(ours(call, params), params)
    mask = {str(i): i < 2 for i in range(4)}
    masks = {"weight_decay_mask": mask, "trust_ratio_mask": mask}
    expected = by_optax(problem, range(4), 1.0, lambda optax, lr: optax.lars(lr, 0.01, **masks))
    assert_same(result, expected.values())


def test_optax_trust_ratio_of_an_update(by_optax, backend):
    """The LAMB paper's LARS, which is SimCLR's with popular momentum."""
    problem = Problem(15)
    params = problem.params()
    result = problem.run(ours("LAMB(SGD(params, **sgd), trust_coef=0.001)", params), params)
    for indices, relative, decay in ((0, 2), 1.0, 0.01), ((1, 3), SECOND_LR, SECOND_DECAY):

        def lars(optax, lr, decay=decay):
            return optax.chain(
                optax.add_decayed_weights(decay),
                optax.trace(0.9),
                optax.scale_by_trust_ratio(trust_coefficient=0.001),
                optax.scale_by_learning_rate(lr),
            )

        assert_same([result[i] for i in indices], by_optax(problem, indices, relative, lars).values())


@pytest.mark.parametrize("base", BASES)
def test_optax_lamb(by_optax, backend, base):
    for seed in range(2):
        problem = Problem(seed)
        problem.layers[1].zero_()
        params = problem.params()
        result = problem.run(ours(CALLS["`optax.lamb`"], params, base), params)
        for indices, relative, decay in ((0, 2), 1.0, 0.1), ((1, 3), SECOND_LR, SECOND_DECAY):
            expected = by_optax(
                problem, indices, relative, lambda optax, lr, d=decay: optax.lamb(lr, 0.8, 0.95, 1e-3, weight_decay=d)
            )
            assert_same([result[i] for i in indices], expected.values(), message=f"seed {seed}")
