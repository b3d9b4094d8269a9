"""torchlars.optim.Adam and AdamW under LAMB and LARS: trust ratios in the pass of their own update.

The oracle is the same wrapper over torch's optimizer in float64, which tests/test_bases.py holds to the formulas.
"""

import copy
import itertools

import pytest
import torch
from adam_cases import (
    ADAMS,
    KEPT,
    adams,
    groups_of,
    train_with_overflows,
    widen,
)
from by_hand import EPS, TRUST_COEF
from optimizers import change_lr, params_of
from sgd_cases import (
    DECAYS,
    ODD,
    assert_same,
    assert_same_ratios,
    give_gradients,
    layers,
    of_grad_dtype,
    parameter,
    run,
    step_odd_layers,
    with_gradient,
)
from wrapped_networks import loss_of, network

from torchlars import LAMB, LARS, ops, optim, reference

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


@pytest.fixture(params=["fast", "slow", "reference"])
def path(request, monkeypatch, extension):
    """Every way that layers can take: gathered in C++, gathered in Python, and without the extension."""
    if request.param == "slow":
        monkeypatch.setattr(ops, "fast_layers", lambda kind: ops.NoFastPath())
    elif request.param == "reference":
        monkeypatch.setattr(ops, "_backend", reference)
    return request.param


def adapted_groups(dtype=torch.float64, decays=DECAYS["decays"], **second):
    """With the wrapper's own values, with values of a group, and one that is left alone."""
    first, other = groups_of(dtype, decays, **{"trust_coef": 0.02, **second})
    return [first, other, {"params": layers(2, dtype), "weight_decay": 0.15, "lr": 0.05, "trust_coef": None}]


def wrapped(adam, wrap=LAMB, dtype=torch.float64, decays=DECAYS["decays"], second=(), wrap_options=(), **options):
    """A wrapper over an Adam, with numbers that are far from the defaults."""
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, **options}
    how = {"eps": EPS, "trust_coef": TRUST_COEF, **dict(wrap_options)}
    return wrap(adam(adapted_groups(dtype, decays, **dict(second)), **options), **how)


def pair(adams_of, *args, **options):
    return tuple(wrapped(adam, *args, **options) for adam in adams_of)


def step_both(ours, theirs, steps, tolerance=1e-12, count=None, of_ratios=None):
    """Take steps of both, and compare everything after each; the gradients of ours are not written."""
    for step in steps:
        give_gradients([ours, theirs], step)
        grads = [(param.grad, None if param.grad is None else param.grad.clone()) for param in params_of(ours)]
        versions = [None if grad is None else grad._version for grad, _ in grads]
        assert ours.step() is None
        theirs.step()
        assert_same(ours, theirs, tolerance)
        assert_same_ratios(ours, theirs, tolerance if of_ratios is None else of_ratios)
        if count is not None:
            assert len(ours.trust_ratios()) == count - (step in (0, 2))
        for param, (grad, value), version in zip(params_of(ours), grads, versions, strict=True):
            assert param.grad is grad
            assert grad is None or (torch.equal(grad, value) and grad._version == version)
        change_lr([ours, theirs], step)


# Ratios of updates.

UPDATES = {
    "plain": {},
    "clipped": {"wrap_options": {"clip": True, "trust_coef": 4.0}},
    "without eps": {"wrap_options": {"eps": 0.0, "trust_coef": 1.0}},
    "large eps": {"wrap_options": {"eps": 2.0}},
    "not always": {"wrap_options": {"always_adapt": False}},
    "keys of a group": {"second": {"trust_coef": 3.0, "clip": True}},
    "another key of a group": {"second": {"always_adapt": False}, "decays": DECAYS["other_decays"]},
}


@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
@pytest.mark.parametrize("decays", DECAYS.values(), ids=list(DECAYS))
@pytest.mark.parametrize("kind", UPDATES)
@adams
def test_lamb_equals_lamb_over_torchs_own(ours_of, theirs_of, kind, decays, maximize, path):
    options = {"decays": decays, "maximize": maximize, **UPDATES[kind]}
    ours, theirs = pair((ours_of, theirs_of), **options)
    step_both(ours, theirs, range(5), count=None if "not" in kind or "another" in kind else 8)


def test_the_numbers_of_the_table_clip_some_layers_and_not_others():
    """A condition of the test above."""
    for options in (UPDATES["clipped"], UPDATES["keys of a group"]):
        optimizer = wrapped(optim.AdamW, **options)
        seen = set()
        for step in range(5):
            run([optimizer], [step])
            params = optimizer.param_groups["second" in options]["params"]
            ratios = optimizer.trust_ratios()
            seen |= {bool(ratios[p] == 1) for p in params if p in ratios and p.numel() > 1 and p.any()}
        assert seen == {True, False}


def test_eps_of_a_group_is_adams_own(path):
    ours, theirs = pair(ADAMS[1], second={"eps": 0.3})
    assert ours.param_groups[1]["eps"] == 0.3
    step_both(ours, theirs, range(4), count=8)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@adams
def test_lr_may_be_a_tensor(ours_of, theirs_of, shape, lr_dtype, path):
    ours, theirs = pair((ours_of, theirs_of), wrap_options={"clip": True})
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        group["lr"] = torch.full(shape, group["lr"], dtype=lr_dtype)
        other["lr"] = group["lr"].item()
    for step in range(4):
        step_both(ours, theirs, [step], count=8)
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            other["lr"] = float(group["lr"])


@adams
def test_an_lr_of_0_moves_the_moments_alone(ours_of, theirs_of, path):
    """As a warm-up begins with. Ratios of a step that is none are not compared: there is no update to measure."""
    ours, theirs = pair((ours_of, theirs_of))
    for step, lr in enumerate((0.0, 0.1, 0.0, 0.3)):
        for group in [*ours.param_groups, *theirs.param_groups]:
            group["lr"] = lr
        before = [param.detach().clone() for param in params_of(ours)]
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        assert lr != 0 or all(map(torch.equal, before, params_of(ours)))
        assert all(ratio.isfinite() for ratio in ours.trust_ratios().values())


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
@adams
def test_lamb_of_complex_layers_equals_lamb_over_torchs_own(ours_of, theirs_of, dtype, path):
    ours, theirs = pair((ours_of, theirs_of), dtype=dtype)
    is_wide = dtype == torch.complex128
    step_both(ours, theirs, range(3), 1e-12 if is_wide else 2e-5, count=8)


@adams
def test_without_any_group_to_adapt_the_step_is_adams_own(ours_of, theirs_of, path):
    ours, theirs = pair((ours_of, theirs_of), second={"trust_coef": None})
    ours.param_groups[0]["trust_coef"] = theirs.param_groups[0]["trust_coef"] = None
    step_both(ours, theirs, range(3))
    assert ours.trust_ratios() == {}


@adams
def test_the_options_may_change_between_steps(ours_of, theirs_of, path):
    ours, theirs = pair((ours_of, theirs_of))
    changes = [{}, {"trust_coef": None}, {"trust_coef": 0.7, "clip": True}, {"betas": (0.5, 0.5)}, {"eps": 0.1}]
    for step, change in enumerate(changes):
        for optimizer in (ours, theirs):
            optimizer.param_groups[1].update(change)
        step_both(ours, theirs, [step])
    for optimizer in (ours, theirs):
        optimizer.eps, optimizer.trust_coef = 0.01, 0.5
    step_both(ours, theirs, [5], count=8)


# Precision in float32.


def ulps(tensor):
    """The unit of the last place of float32 numbers near some float64 ones."""
    return torch.exp2((torch.frexp(tensor)[1] - 24).double())


LENGTHS = [1e-1, 1e-3, 1e-6]


def of_float32(adam, lr, scale, dtype=torch.float32, trust_coef=1.0, **options):
    random = torch.Generator().manual_seed(7)
    values = [s * scale * torch.randn(n, generator=random) for n, s in ((4000, 1.0), (300, 0.5), (9, 2.0))]
    base = adam([torch.nn.Parameter(v.to(dtype)) for v in values], lr=lr, weight_decay=0.02, **options)
    return LAMB(base, trust_coef=trust_coef)


def give_normal_gradients(optimizers, step):
    random = torch.Generator().manual_seed(50 + step)
    for params in zip(*map(params_of, optimizers), strict=True):
        grad = 0.1 * torch.randn(params[0].shape, generator=random)
        for param in params:
            param.grad = grad.to(param.dtype)


@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
@pytest.mark.parametrize("length", LENGTHS)
@adams
def test_a_float32_step_is_the_contracts_to_a_part_in_a_million_of_the_update(
    ours_of, theirs_of, length, maximize, path
):
    """Beyond that the parameter is rounded once, to half an ULP: |w − oracle| ≤ ulp(w) / 2 + 1e-6 · |γru|.

    ‖γu‖ = length · ‖w‖, about, and a step's is 200 times as long where that is 1e-6, so that one can see its error. The
    oracle is LAMB over torch's own in float64, from the same float32 parameters and state. |u| is taken as the sum of the
    sizes of its terms, those of the first moment and λw: terms that cancel leave their own rounding errors.
    """
    scale = 10.0
    options = {"lr": length * scale, "betas": (0.8, 0.95), "eps": 1e-6, "maximize": maximize}
    trust_coef = {1e-1: 0.05, 1e-3: 0.3}.get(length, 20.0)
    ours = of_float32(ours_of, scale=scale, trust_coef=trust_coef, **options)
    theirs = of_float32(theirs_of, scale=scale, dtype=torch.float64, trust_coef=trust_coef, **options)
    for step in range(4):
        give_normal_gradients([ours], step)
        widen(theirs.optim, ours.optim)
        old = [q.detach().clone() for q in params_of(theirs)]
        before = copy.deepcopy([theirs.state[q].get("exp_avg") for q in params_of(theirs)])
        ours.step()
        theirs.step()
        for p, q, w, m in zip(params_of(ours), params_of(theirs), old, before, strict=True):
            ratio, expected = ours.trust_ratios()[p].item(), theirs.trust_ratios()[q].item()
            assert ratio == pytest.approx(expected, rel=1e-6)
            is_coupled = theirs_of is torch.optim.Adam
            g = q.grad.abs() + (0.02 * w.abs() if is_coupled else 0.0)
            terms = 0.8 * (torch.zeros_like(w) if m is None else m).abs() + 0.2 * g
            root = (theirs.state[q]["exp_avg_sq"] / (1 - 0.95 ** (step + 1))).sqrt()
            u = terms / (1 - 0.8 ** (step + 1)) / (root + 1e-6) + (0.0 if is_coupled else 0.02 * w.abs())
            update = options["lr"] * expected * u
            bound = torch.maximum(ulps(q.detach()), ulps(p.detach().double())) / 2 + 1e-6 * update
            off = (p.detach().double() - q.detach()).abs()
            assert bool((off <= bound).all()), f"step {step}: {(off / bound).max():.2f} times what is allowed"
            assert update.norm() > 1e-5 * w.norm(), "one could see nothing"


@adams
def test_the_difference_of_rounded_parameters_gives_no_such_ratio(ours_of, theirs_of, backend):
    """LAMB over torch's own in float32, where ‖γu‖ = 1e-6 ‖w‖, is off by more than 1 %; ours is exact there."""
    errors = {}
    for adam in (ours_of, theirs_of):
        options = {"lr": 1e-5, "betas": (0.8, 0.95), "eps": 1e-6}
        inexact = of_float32(adam, scale=10.0, trust_coef=20.0, **options)
        exact = of_float32(theirs_of, scale=10.0, trust_coef=20.0, dtype=torch.float64, **options)
        give_normal_gradients([inexact, exact], 0)
        values = [(p.detach().norm(), p) for p in params_of(exact)]
        inexact.step()
        exact.step()
        found, expected = (
            [optimizer.trust_ratios()[p].item() for p in params_of(optimizer)] for optimizer in (inexact, exact)
        )
        errors[adam] = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        relative = [20.0 * 1e-5 / r for r in expected]  # ‖γu‖ / ‖w‖, as r = 20 ‖w‖ / ‖u‖
        assert len(values) == 3
        assert all(3e-7 < length < 3e-6 for length in relative)
    assert errors[ours_of] < 1e-6
    assert errors[theirs_of] > 0.01


# The same bits whichever way a layer took.


@pytest.mark.parametrize("wrap", [LAMB, LARS], ids=["LAMB", "LARS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@adams
def test_bits_do_not_depend_on_who_gathers(ours_of, theirs_of, dtype, wrap, extension, monkeypatch):
    for state_dtype in [None, torch.float32] if dtype.itemsize == 2 else [None]:
        how = {"wrap": wrap, "dtype": dtype, "state_dtype": state_dtype, "wrap_options": {"clip": True}}
        one, other = (wrapped(ours_of, **how) for _ in range(2))
        seen = []
        for step in range(4):
            run([one], [step])
            seen.append(one.trust_ratios())
        with monkeypatch.context() as patched:
            patched.setattr(ops, "fast_layers", lambda kind: ops.NoFastPath())
            for step in range(4):
                run([other], [step])
                for p, q in zip(params_of(one), params_of(other), strict=True):
                    assert (p in seen[step]) == (q in other.trust_ratios())
                    assert p not in seen[step] or torch.equal(seen[step][p], other.trust_ratios()[q])
        assert_same(one, other)


@pytest.mark.parametrize("wrap", [LAMB, LARS], ids=["LAMB", "LARS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(extension, threads, dtype, wrap):
    def build():
        random = torch.Generator().manual_seed(0)
        values = [(i + 1) * torch.randn(n, generator=random) for i, n in enumerate([40_001, 5, 16_384, *[64] * 6])]
        params = [torch.nn.Parameter(value.to(dtype)) for value in values]
        options = {"lr": 0.01, "weight_decay": 0.1, "state_dtype": torch.float32}
        return wrap(optim.Adam([{"params": params[:4]}, {"params": params[4:], "lr": 0.1}], **options), trust_coef=0.3)

    results = []
    for count in (1, 2, 3, 3):
        threads(count)
        optimizer = build()
        run([optimizer], range(3, 6))
        ratios = optimizer.trust_ratios()
        results.append([x for p in params_of(optimizer) for x in (p.detach(), *optimizer.state[p].values(), ratios[p])])
    threads(1)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@KEPT
@adams
def test_16_bit_layers_with_state_in_float32_follow_float64(ours_of, theirs_of, dtype, path):
    """The update is that of the state in float32: the parameter is rounded once, and the ratio is exact."""
    ours, theirs = wrapped(ours_of, dtype=dtype, state_dtype=torch.float32), wrapped(theirs_of)
    for step in range(4):
        give_gradients([ours], step)
        widen(theirs.optim, ours.optim)
        ours.step()
        theirs.step()
        ratios = ours.trust_ratios()
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            ulp = torch.finfo(dtype).eps * torch.maximum(p.detach().abs().double(), q.detach().abs())
            assert bool(((p.detach().double() - q.detach()).abs() <= 0.51 * ulp + 1e-7).all())
            if p in ratios:
                assert ratios[p].dtype == torch.float32
                assert ratios[p].item() == pytest.approx(theirs.trust_ratios()[q].item(), rel=1e-6)


@KEPT
@adams
def test_gradients_of_another_dtype_have_the_ratio_of_the_update_that_is_applied(ours_of, theirs_of, dtype, path):
    """In float16 their second moments are 0 once they are rounded, after both."""
    param = of_grad_dtype(parameter(300, dtype=dtype), torch.float32)
    options = {"lr": 0.01, "weight_decay": 0.1}
    ours = LAMB(ours_of([param], **options))
    theirs = LAMB(theirs_of([torch.nn.Parameter(param.detach().double())], **options))
    for step in range(3):
        param.grad = 1e-3 * (1 + step) * torch.randn(300, generator=torch.Generator().manual_seed(step))
        widen(theirs.optim, ours.optim)
        ours.step()
        theirs.step()
        (p, ratio), (q, expected) = ours.trust_ratios().popitem(), theirs.trust_ratios().popitem()
        assert ratio.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=torch.finfo(dtype).eps, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            moment, exact = ours.optim.state[p][name], theirs.optim.state[q][name]
            assert moment.dtype == dtype
            torch.testing.assert_close(moment, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=6e-8)


# Ratios of gradients.

GRADIENTS = {
    "plain": {},
    "clipped": {"wrap_options": {"clip": True}},
    "decayed": {"wrap_options": {"norm": "decayed"}},
    "decayed, clipped": {"wrap_options": {"norm": "decayed", "clip": True}},
    "large eps": {"wrap_options": {"eps": 2.0}},
    "not always": {"wrap_options": {"always_adapt": False}},
    "keys of a group": {"second": {"trust_coef": 3.0, "clip": True, "norm": "decayed"}},
    "on updates": {"wrap_options": {"apply_to": "update"}},
}


@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
@pytest.mark.parametrize("decays", DECAYS.values(), ids=list(DECAYS))
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("adams_of", ADAMS, ids=["Adam", "AdamW"])
def test_lars_over_both_equals_lars_over_torchs_own_and_leaves_gradients_alone(adams_of, kind, decays, maximize, path):
    options = {"wrap": LARS, "decays": decays, "maximize": maximize, **GRADIENTS[kind]}
    ours, theirs = pair(adams_of, **options)
    step_both(ours, theirs, range(4), count=None if "not" in kind else 8)


def test_a_decoupled_group_of_adam_under_lars(path):
    ours, theirs = pair(ADAMS[0], wrap=LARS, second={"decoupled_weight_decay": True})
    step_both(ours, theirs, range(4), count=8)


def test_decay_that_only_the_wrapper_calls_decoupled_is_adapted_by_it(path):
    """Adam adds it to the gradient: were the ratios applied in its pass, they would multiply the decay, too."""
    ours, theirs = pair(ADAMS[0], wrap=LARS, wrap_options={"weight_decay": "decoupled"})
    for step in range(4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        assert_same_ratios(ours, theirs, 1e-12)


def test_ratios_of_gradients_are_seen_in_the_moments(path):
    """Adam's parameters hardly depend on them: so the tests above compare the moments, which do."""
    one, other = (wrapped(optim.Adam, LARS, wrap_options={"trust_coef": coef}) for coef in (0.3, 0.6))
    run([one, other], range(3, 4))
    p, q = params_of(one)[0], params_of(other)[0]
    assert torch.allclose(other.state[q]["exp_avg"], 2 * one.state[p]["exp_avg"], rtol=1e-12)


# The wrapper's manners.


@pytest.mark.parametrize("wrap", [LAMB, LARS], ids=["LAMB", "LARS"])
def test_state_dicts_go_from_torch_to_us_and_back_in_mid_training(wrap, path):
    for adams_of in ADAMS if wrap is LAMB else ADAMS[:1]:
        (ours, theirs), (_, expected), (_, other) = (pair(adams_of, wrap=wrap) for _ in range(3))

        def hand_over(one, to):
            to.load_state_dict(copy.deepcopy(one.state_dict()))
            for p, q in zip(params_of(one), params_of(to), strict=True):
                q.data.copy_(p.detach())

        run([theirs, expected], range(2))
        hand_over(theirs, ours)
        step_both(ours, expected, range(2, 4))
        hand_over(ours, other)
        run([other, expected], range(4, 6))
        assert_same(other, expected, 1e-12)


@adams
def test_a_copy_goes_on_like_the_original(ours_of, theirs_of, path):
    ours = wrapped(ours_of)
    run([ours], range(2))
    for param in params_of(ours):
        param.grad = None
    other = copy.deepcopy(ours)
    run([ours, other], range(2, 4))
    assert_same(ours, other)
    assert_same_ratios(ours, other)


@adams
def test_overlapping_parameters_are_stepped_one_after_the_other(ours_of, theirs_of, path):
    """The oracle has an optimizer for each. LAMB measured them all first, by values that the others change."""
    options = {"lr": 0.05, "weight_decay": 0.1}

    def views():
        memory = torch.linspace(-1.0, 2.0, 8, dtype=torch.float64)
        return [torch.nn.Parameter(memory[:5]), torch.nn.Parameter(memory[3:])]

    one, two = views(), views()
    together = LAMB(ours_of(one, **options), trust_coef=0.3)
    apart = [LAMB(ours_of([param], **options), trust_coef=0.3) for param in two]
    for step in range(3):
        for params in (one, two):
            for i, param in enumerate(params):
                param.grad = torch.linspace(0.5 - step, 1.0 + i, 5, dtype=torch.float64)
        together.step()
        for optimizer in apart:
            optimizer.step()
        for p, q, optimizer in zip(one, two, apart, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(together.trust_ratios()[p], optimizer.trust_ratios()[q], rtol=1e-13, atol=0)


@adams
def test_a_scaler_skips_the_step_of_an_overflow_and_leaves_clean_state(ours_of, theirs_of, path):
    """Also the first one. The ratios of a step that was skipped are 1."""

    def are_one(optimizer):
        assert len(optimizer.trust_ratios()) == 4
        assert all(ratio == 1 for ratio in optimizer.trust_ratios().values())

    train_with_overflows(
        lambda params: LAMB(ours_of(params, lr=0.05, weight_decay=0.1), trust_coef=0.3), are_one, assert_same_ratios
    )


@adams
def test_a_closure_is_called_once_and_its_loss_returned(ours_of, theirs_of, path):
    models = network(), network()
    optimizers = [
        LAMB(adam(model.parameters(), lr=0.05, weight_decay=0.1), trust_coef=0.3)
        for adam, model in zip((ours_of, theirs_of), models, strict=True)
    ]
    for step in range(3):
        losses, calls = [], []
        for optimizer, model in zip(optimizers, models, strict=True):

            def closure(optimizer=optimizer, model=model, step=step, calls=calls):
                calls.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
        assert calls == [True, True]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
        assert_same(*optimizers, 1e-12)
        assert_same_ratios(*optimizers, 1e-12)


DIFFER = {"float8", "gradient of another dtype", "FSDP1", "parameter conjugated", "parameter negated"}


@pytest.mark.parametrize("name", [name for name in ODD if name not in DIFFER and not name.startswith("sparse")])
@pytest.mark.parametrize("kind", ["LAMB(AdamW)", "LARS(Adam)"])
def test_an_odd_layer_is_stepped_as_over_torchs_own(kind, name, backend):
    """Compared in what both can compute: the update of torch's own in float32 is a difference of rounded parameters."""
    optimizers, wrap = [], LAMB if "LAMB" in kind else LARS
    for adam in ADAMS[kind == "LAMB(AdamW)"]:
        torch.manual_seed(0)
        odd = ODD[name]()
        real = torch.float32 if odd.dtype.is_complex else odd.dtype
        one, other = (with_gradient(parameter(n, dtype=real, scale=n)) for n in (4, 6))
        its_own = {"params": [odd], "weight_decay": 0.2}
        loop = {} if adam.__module__.startswith("torchlars") else {"foreach": False}
        base = adam([{"params": [one]}, its_own, {"params": [other], "lr": 0.3}], lr=0.2, weight_decay=0.1, **loop)
        optimizers.append(wrap(base, eps=EPS, trust_coef=TRUST_COEF))

    def ratios_are_the_same():
        assert_same_ratios(*optimizers, 1e-5)
        assert len(optimizers[0].trust_ratios()) == 3

    step_odd_layers(name, *optimizers, ratios_are_the_same, 1e-5)


@adams
def test_a_tied_layer_has_one_ratio_and_one_step(ours_of, theirs_of, path):
    def build(times):
        params = [with_gradient(parameter(n, dtype=torch.float64)) for n in (3, 4)]
        base = ours_of([parameter(2, dtype=torch.float64)], lr=0.1, weight_decay=0.1)
        base.add_param_group({"params": params})
        base.param_groups[1]["params"] = params * times  # torch warns where it sees it
        return LAMB(base, eps=EPS, trust_coef=TRUST_COEF)

    once, twice = build(1), build(2)
    for _ in range(3):
        once.step()
        twice.step()
        for p, q in zip(once.param_groups[1]["params"], twice.param_groups[1]["params"], strict=False):
            assert torch.equal(p, q)
            assert twice.state[q]["step"] == once.state[p]["step"]
    assert len(twice.trust_ratios()) == 2


def test_buckets_are_of_one_kind_and_their_layers_have_numbers_of_their_own(extension):
    """Layers of groups that differ in numbers alone share a call; other betas, eps, kinds of decay and lrs do not."""
    params = [with_gradient(parameter(3 + i)) for i in range(7)]
    keys = [
        *({}, {"lr": 0.3, "weight_decay": 0.2, "trust_coef": 0.7}, {"betas": (0.9, 0.5)}, {"eps": 0.1}),
        *({"decoupled_weight_decay": True}, {"maximize": True}, {"trust_coef": None}),
    ]
    groups = [{"params": [param], **key} for param, key in zip(params, keys, strict=True)]
    optimizer = LAMB(optim.Adam(groups, lr=0.1, weight_decay=0.1), eps=EPS, trust_coef=TRUST_COEF)
    optimizer.step()
    found, base = [], optimizer.optim
    gather, position_of = base._gather, {id(param): i for i, param in enumerate(params)}

    def note(trust_ratios):
        fast, others = gather(trust_ratios)
        found.append(([[position_of[id(p)] for p in bucket.params] for bucket in fast], others))
        return fast, others

    base._gather = note
    optimizer.step()
    assert found == [([[0, 1], [2], [3], [4], [5], [6]], [])]


def test_every_group_has_its_own_step_with_trust_ratios_or_without(path):
    """Every combination of two groups: adapted or not, in either order."""
    for first, second in itertools.product([None, 0.3], [None, 0.7]):
        ours, theirs = (
            LAMB(
                adam([{"params": layers(0), "trust_coef": first}, {"params": layers(1), "trust_coef": second}], lr=0.1)
            )
            for adam in ADAMS[1]
        )
        for step in range(3, 5):
            give_gradients([ours, theirs], step)
            ours.step()
            theirs.step()
            assert_same(ours, theirs, 1e-12)
            assert_same_ratios(ours, theirs, 1e-12)
