"""Steps and state of torchlars.optim.Adam and AdamW, on their own: they equal those of torch.optim.

The oracle is torch's optimizer in float64; of 16-bit layers it is the reference.
"""

import copy
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch
from adam_cases import (
    ADAMS,
    KEPT,
    STATE_DTYPES,
    adams,
    assert_follows_the_reference,
    groups_of,
    op_arguments,
    pair,
    results_of,
    train_with_overflows,
    widen,
)
from cases import channels_last, sliced, transposed
from closeness import close
from optimizers import change_lr, params_of
from sgd_cases import (
    DECAYS,
    ODD,
    assert_same,
    assert_unchanged,
    give_gradients,
    hand_over_in_mid_training,
    layers,
    of_grad_dtype,
    parameter,
    run,
    snapshot,
    step_odd_layers,
    step_with_lr_tensors,
    through,
    with_gradient,
)
from wrapped_networks import loss_of, network

from torchlars import ops, optim

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


# The update.


@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
@pytest.mark.parametrize("decays", DECAYS.values(), ids=list(DECAYS))
@pytest.mark.parametrize("eps", [1e-8, 0.03])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.6), (0.7, 0.0)], ids=str)
@adams
def test_a_step_equals_that_of_torch(ours_of, theirs_of, betas, eps, decays, maximize, backend):
    ours, theirs = pair(ours_of, theirs_of, decays=decays, betas=betas, eps=eps, maximize=maximize)
    for step in range(5):
        give_gradients([ours, theirs], step)
        grads = [param.grad for param in params_of(ours)]
        versions = [None if grad is None else grad._version for grad in grads]
        assert ours.step() is None
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        for param, grad, version in zip(params_of(ours), grads, versions, strict=True):
            assert param.grad is grad
            assert grad is None or grad._version == version
        change_lr([ours, theirs], step)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@adams
def test_lr_may_be_a_tensor_which_is_read_at_each_step(ours_of, theirs_of, shape, lr_dtype, backend):
    ours, theirs = pair(ours_of, theirs_of)
    step_with_lr_tensors(ours, theirs, shape, lr_dtype, 1e-12)
    assert isinstance(ours_of(layers(0), lr=torch.tensor(0.5)).param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
@adams
def test_complex_layers_equal_torchs(ours_of, theirs_of, dtype, maximize, backend):
    ours, theirs = pair(ours_of, theirs_of, dtype, maximize=maximize)
    for step in range(4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12 if dtype == torch.complex128 else 2e-6)


def test_the_kind_of_decay_is_an_argument_of_adam(backend):
    ours, theirs = pair(optim.Adam, torch.optim.Adam, decoupled_weight_decay=True)
    expected, _ = pair(optim.AdamW, torch.optim.AdamW)
    run([ours, theirs, expected], range(3))
    assert_same(ours, theirs, 1e-12)
    assert_same(ours, expected)


@adams
def test_groups_may_differ_in_direction_and_in_kind_of_decay(ours_of, theirs_of, backend):
    """The kind is a key of a group; it is the class's own only where that is AdamW, and only once it is loaded."""
    ours, theirs = pair(ours_of, theirs_of)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(maximize=True)
        optimizer.param_groups[1].update(decoupled_weight_decay=ours_of is optim.Adam)
    for step in range(3):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)


FLOAT32 = [
    # betas, eps, decay, lr, maximize
    ((0.9, 0.999), 1e-8, 0.01, 1e-3, False),
    ((0.9, 0.95), 1e-6, 0.1, 0.02, True),
    ((0.5, 0.9), 1e-2, 0.3, 0.7, False),
    ((0.0, 0.99), 1e-8, 0.1, 0.01, False),
]


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize(("betas", "eps", "decay", "lr", "maximize"), FLOAT32)
@adams
def test_a_float32_step_is_one_in_float64_to_2_ulps(
    ours_of, theirs_of, betas, eps, decay, lr, maximize, steps, extension
):
    """ULPs are those of the largest term of each sum, not of the sum.

    Terms of opposite signs cancel: the sum is then smaller than either, and no arithmetic of float32 gives it to its own
    ULP, as each term was rounded to its own. w − γu is the sum of w and the terms of γu, which has those of the first
    moment and λw. A coupled decay is a term of the gradient, which is at most the sum of both, as is its square. γu is
    rounded about seven times before it is subtracted, which shows only where it is not small beside w.
    """
    random = torch.Generator().manual_seed(steps)
    sizes = {3000: 1.0, 7: 0.01, 500: 30.0}
    values = [(n, scale * torch.randn(n, generator=random)) for n, scale in sizes.items()]
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay, "maximize": maximize}
    ours = ours_of([torch.nn.Parameter(value) for _, value in values], **options)
    theirs = theirs_of([torch.nn.Parameter(value.double()) for _, value in values], **options)
    for step in range(steps + 1):
        for i, param in enumerate(params_of(ours)):
            param.grad = 10.0**-i * torch.randn(param.shape, generator=random)
        if step == steps:
            break
        ours.step()
    widen(theirs, ours)
    before = copy.deepcopy([theirs.state.get(q) for q in params_of(theirs)])
    params = [q.detach().clone() for q in params_of(theirs)]
    ours.step()
    theirs.step()
    eps32, worst = torch.finfo(torch.float32).eps, {}
    for p, q, old, w in zip(params_of(ours), params_of(theirs), before, params, strict=True):
        one, other = ours.state[p], theirs.state[q]
        m, v = (old["exp_avg"].abs(), old["exp_avg_sq"]) if old else (torch.zeros_like(w), torch.zeros_like(w))
        g, coupled = q.grad.abs(), 0.0 if theirs_of is torch.optim.AdamW else decay
        d = g + coupled * w.abs()
        # The larger terms of the moments, and of w − γu.
        larger_m = torch.maximum(betas[0] * m, (1 - betas[0]) * d)
        larger_v = torch.maximum(betas[1] * v, (1 - betas[1]) * d**2)
        denominator = (other["exp_avg_sq"] / (1 - betas[1] ** (steps + 1))).sqrt() + eps
        of_update = larger_m / (1 - betas[0] ** (steps + 1)) / denominator
        larger_w = w.abs() + 2 * lr * torch.maximum(of_update, (decay - coupled) * w.abs())
        for name, a, e, larger in (
            ("exp_avg", one["exp_avg"], other["exp_avg"], larger_m),
            ("exp_avg_sq", one["exp_avg_sq"], other["exp_avg_sq"], larger_v),
            ("parameter", p.detach(), q.detach(), larger_w),
        ):
            assert a.dtype == torch.float32
            off = ((a.double() - e).abs() / (eps32 * larger)).max().item()
            worst[name] = max(worst.get(name, 0.0), off)
        assert one["step"].item() == steps + 1
    assert max(worst.values()) <= 2, worst


@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
@STATE_DTYPES
@KEPT
@adams
def test_a_16_bit_step_is_that_of_the_reference(ours_of, theirs_of, dtype, state_dtype, maximize, extension):
    ours, _ = pair(ours_of, theirs_of, dtype, ours_alone={"state_dtype": state_dtype}, maximize=maximize)
    for step in range(4):
        give_gradients([ours], step)
        before = [op_arguments(ours, index) for index in range(2)]
        ours.step()
        for index, arguments in enumerate(before):
            assert_follows_the_reference(arguments, results_of(ours, index))
        for state in ours.state.values():
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (state_dtype or dtype)
        change_lr([ours], step)


@STATE_DTYPES
@KEPT
@adams
def test_many_16_bit_steps_stay_close_to_float64(ours_of, theirs_of, dtype, state_dtype, backend):
    """A parameter loses half an ULP a step; state in float32 loses nothing that one would see."""
    ours, _ = pair(ours_of, theirs_of, dtype, ours_alone={"state_dtype": state_dtype})
    _, theirs = pair(ours_of, theirs_of)
    for step in range(6):
        give_gradients([ours], step)
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            q.data.copy_(p.detach())
            q.grad = None if p.grad is None else p.grad.double()
        ours.step()
        theirs.step()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        ulp = torch.finfo(dtype).eps
        close(p.detach().double(), q.detach(), (0.5 if state_dtype else 3) * ulp, "parameter")
        for name in ("exp_avg", "exp_avg_sq"):
            tolerance = 1e-6 if state_dtype else 4 * ulp
            close(ours.state[p][name].double(), theirs.state[q][name], tolerance, name)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
@KEPT
@adams
def test_small_gradients_in_16_bits_give_the_steps_of_torchs_fused_form(ours_of, theirs_of, dtype, size, backend):
    """Their second moments become 0 in float16, but only after the update was computed."""
    start, directions = torch.linspace(0.5, 2, 64, dtype=torch.float64), torch.linspace(-1, 2, 64, dtype=torch.float64)
    ours, theirs = (
        adam([torch.nn.Parameter(start.to(dtype))], lr=0.01, weight_decay=0.1, **options)
        for adam, options in ((ours_of, {}), (theirs_of, {"fused": True}))
    )
    for step in range(3):
        before = params_of(ours)[0].detach().clone()
        for optimizer in (ours, theirs):
            params_of(optimizer)[0].data.copy_(before)
            params_of(optimizer)[0].grad = (size * (1 + 0.1 * step) * directions).to(dtype)
            optimizer.step()
        for name in ("exp_avg", "exp_avg_sq"):
            (one,), (other,) = ([state[name] for state in x.state.values()] for x in (ours, theirs))
            least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            torch.testing.assert_close(one, other, rtol=torch.finfo(dtype).eps, atol=least)
        assert (params_of(ours)[0].detach() - before).abs().max() < 0.5
        moved = [params_of(optimizer)[0].detach() for optimizer in (ours, theirs)]
        torch.testing.assert_close(*moved, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@adams
def test_state_of_wider_layers_is_not_changed_by_state_dtype(ours_of, theirs_of, dtype, backend):
    one, other = (
        pair(ours_of, theirs_of, dtype, ours_alone={"state_dtype": kept})[0] for kept in (torch.float32, None)
    )
    run([one, other], range(3))
    assert_same(one, other)
    assert all(state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype for state in one.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@STATE_DTYPES
@adams
def test_bits_do_not_depend_on_who_gathers(ours_of, theirs_of, dtype, state_dtype, extension, monkeypatch):
    one, other = (pair(ours_of, theirs_of, dtype, ours_alone={"state_dtype": state_dtype})[0] for _ in range(2))
    run([one], range(4))
    monkeypatch.setattr(ops, "fast_layers", lambda kind: ops.NoFastPath())
    run([other], range(4))
    assert_same(one, other)


@adams
def test_plain_layers_are_all_on_the_fast_path_once_they_have_state(ours_of, theirs_of, extension):
    ours, _ = pair(ours_of, theirs_of, torch.float32)
    for step, others in ((3, 8), (4, 0)):
        give_gradients([ours], step)
        plain, left = ours._gather(None)
        assert sum(len(bucket.params) for bucket in left) == others
        assert sum(len(bucket.params) for bucket in plain) == 8 - others
        del plain, left
        ours.step()


@adams
def test_a_step_without_any_gradient_changes_nothing(ours_of, theirs_of, backend):
    ours, _ = pair(ours_of, theirs_of)
    before = snapshot(ours)
    assert ours.step() is None
    assert_unchanged(ours, before)
    assert len(ours.state) == 0


@adams
def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned(ours_of, theirs_of, backend):
    model, same = network(), network()
    options = {"lr": 0.05, "weight_decay": 0.1}
    optimizer, theirs = ours_of(model.parameters(), **options), theirs_of(same.parameters(), **options)
    for step in range(3):
        calls = []

        def closure(step=step, calls=calls):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        with torch.no_grad():
            loss = optimizer.step(closure)
            assert not torch.is_grad_enabled()
        theirs.zero_grad()
        expected = loss_of(same, step)
        expected.backward()
        theirs.step()
        assert calls == [True]
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        assert_same(optimizer, theirs, 1e-12)
    assert all(param.requires_grad and param.is_leaf for param in model.parameters())


@STATE_DTYPES
@adams
def test_a_scaler_skips_the_step_of_an_overflow_and_leaves_clean_state(ours_of, theirs_of, state_dtype, backend):
    options = {"lr": 0.05, "weight_decay": 0.1, "state_dtype": state_dtype}
    train_with_overflows(lambda params: ours_of(params, **options))


# What it is to whoever asks.


@adams
def test_it_is_torchs_own_to_whoever_asks(ours_of, theirs_of):
    ours, theirs = ours_of(layers(0), lr=0.5), theirs_of(layers(0), lr=0.5)
    assert isinstance(ours, theirs_of)
    assert ours.takes_trust_ratios is True
    assert ours.takes_ratios_of_updates is True
    assert list(ours.defaults.items()) == list(theirs.defaults.items())
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    defaults = ours_of(layers(0)).defaults
    assert defaults == theirs_of(layers(0)).defaults
    named = ours_of([(f"layer{i}", param) for i, param in enumerate(layers(0))], lr=0.5)
    assert named.param_groups[0]["param_names"] == [f"layer{i}" for i in range(5)]
    assert "state_dtype" not in defaults


@adams
def test_the_constructor_has_torchs_arguments_but_for_those_that_choose_an_implementation(ours_of, theirs_of):
    ours, theirs = (dict(inspect.signature(cls).parameters) for cls in (ours_of, theirs_of))
    assert theirs.keys() - ours.keys() == {"foreach", "fused", "capturable", "differentiable"}
    assert ours.keys() - theirs.keys() == {"state_dtype"}
    for name in ours.keys() & theirs.keys():
        assert ours[name].default == theirs[name].default, name
        assert ours[name].kind == theirs[name].kind, name
    assert [n for n in ours if n in theirs and n != "maximize"] == [n for n in theirs if n in ours and n != "maximize"]
    assert ours["state_dtype"].kind is inspect.Parameter.KEYWORD_ONLY


# State.


def test_the_state_is_that_of_torch_under_the_same_keys(backend):
    for ours_of, theirs_of in ADAMS:
        ours, theirs = pair(ours_of, theirs_of)
        run([ours, theirs], range(3))
        a, b = ours.state_dict(), theirs.state_dict()
        assert a.keys() == b.keys()
        assert a["param_groups"] == b["param_groups"]
        assert list(a["param_groups"][0]) == list(b["param_groups"][0])
        assert [list(state) for state in a["state"].values()] == [list(state) for state in b["state"].values()]
        torch.testing.assert_close(a["state"], b["state"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
@adams
def test_step_is_a_float32_without_dimensions_on_the_parameters_device(ours_of, theirs_of, dtype, backend):
    ours, _ = pair(ours_of, theirs_of, dtype)
    for step in range(3):
        run([ours], [step])
        for index, param in enumerate(params_of(ours)):
            if param not in ours.state:
                continue
            count = ours.state[param]["step"]
            assert (count.dtype, count.shape, count.device) == (torch.float32, (), param.device)
            assert count.item() == 1 + step - (index == 6) - (index == 1 and step == 2)


@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "weights_only"])
@adams
def test_state_dicts_go_from_torch_to_us_and_back_in_mid_training(ours_of, theirs_of, how, implementation, backend):
    (ours, theirs), (_, expected), (_, other) = (pair(ours_of, theirs_of) for _ in range(3))
    for group in [*theirs.param_groups, *other.param_groups]:
        group.update(implementation)
    hand_over_in_mid_training(how, ours, theirs, expected, other)


@pytest.mark.parametrize("how", ["deepcopy", "weights_only"])
@KEPT
@adams
def test_state_in_float32_is_loaded_without_rounding_and_goes_through_torch(ours_of, theirs_of, dtype, how, backend):
    options = {"ours_alone": {"state_dtype": torch.float32}}
    (ours, theirs), (other, _) = (pair(ours_of, theirs_of, dtype, **options) for _ in range(2))
    run([ours], range(3))
    names = ("exp_avg", "exp_avg_sq")
    for name in names:
        assert any(
            not torch.equal(x := state[name], x.to(dtype)) for state in ours.state.values() if state[name].numel()
        )
    saved = through(how, ours.state_dict())
    assert {group["state_dtype"] for group in saved["param_groups"]} == {"float32"}
    other.load_state_dict(saved)
    for p, q in zip(params_of(ours), params_of(other), strict=True):
        q.data.copy_(p.detach())
    assert_same(ours, other)
    run([ours, other], range(3, 5))
    assert_same(ours, other)
    theirs.load_state_dict(through(how, ours.state_dict()))
    run([theirs], range(5, 6))
    other.load_state_dict(through(how, theirs.state_dict()))
    for p, q in zip(params_of(other), params_of(theirs), strict=True):
        for name in names:
            assert theirs.state[q][name].dtype == dtype
            assert other.state[p][name].dtype == torch.float32
            assert torch.equal(other.state[p][name], theirs.state[q][name].float())
        assert other.state[p]["step"].item() == theirs.state[q]["step"].item()


@KEPT
def test_state_dtype_may_be_a_groups_own_and_be_changed_between_steps(dtype, backend):
    first, second = groups_of(dtype)
    ours = optim.AdamW([first, {**second, "state_dtype": None}], lr=0.1, state_dtype=torch.float32)
    run([ours], range(3, 5))
    for group, expected in zip(ours.param_groups, [torch.float32, dtype], strict=True):
        assert {ours.state[p][name].dtype for p in group["params"] for name in ("exp_avg", "exp_avg_sq")} == {expected}
    other = copy.deepcopy(ours)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_same(ours, other)
    for kept in (None, torch.float32):
        for group in ours.param_groups:
            group["state_dtype"] = kept
        give_gradients([ours], 3)
        before = [op_arguments(ours, index) for index in range(2)]
        for arguments in before:
            for name in ("exp_avgs", "exp_avg_sqs"):
                arguments[name] = [x.to(kept or dtype) for x in arguments[name]]
        ours.step()
        for index, arguments in enumerate(before):
            if backend == "extension":
                assert_follows_the_reference(arguments, results_of(ours, index))
            assert {x.dtype for x in results_of(ours, index)["exp_avgs"]} == {kept or dtype}


copies = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)


@copies
@adams
def test_a_copy_goes_on_like_the_original(ours_of, theirs_of, copied, backend):
    ours, _ = pair(ours_of, theirs_of, torch.bfloat16, ours_alone={"state_dtype": torch.float32})
    run([ours], range(2))
    for param in params_of(ours):
        param.grad = None
    other = copied(ours)
    run([ours, other], range(2, 4))
    assert_same(ours, other)
    for p, q in zip(params_of(ours), params_of(other), strict=True):
        assert p is not q
        assert p.numel() == 0 or p.data_ptr() != q.data_ptr()
        for name in ours.state.get(p, {}) if p.numel() else ():
            assert ours.state[p][name].data_ptr() != other.state[q][name].data_ptr()


@adams
def test_state_stays_the_same_tensors_in_the_parameters_memory_order(ours_of, theirs_of, backend):
    ours, _ = pair(ours_of, theirs_of)
    run([ours], range(3))
    before = {(param, name): value for param, state in ours.state.items() for name, value in state.items()}
    versions = {key: value._version for key, value in before.items()}
    run([ours], range(3, 4))
    for (param, name), value in before.items():
        assert ours.state[param][name] is value
        assert value._version > versions[param, name]
        assert not value.requires_grad
        assert name == "step" or value.stride() == param.stride()
    strides = [param.stride() for param in params_of(ours)]
    assert (12, 1, 6, 3) in strides
    assert (1, 4) in strides


ORDERS = {"channels_last": channels_last, "transposed": transposed, "as it is": lambda x: x}


@pytest.mark.parametrize("order", ORDERS)
@adams
def test_state_of_another_memory_order_is_taken_over(ours_of, theirs_of, order, backend):
    ours, theirs = pair(ours_of, theirs_of)
    run([ours, theirs], range(2))
    for optimizer, name in itertools.product((ours, theirs), ("exp_avg", "exp_avg_sq")):
        for state in optimizer.state.values():
            if state[name].dim() == (4 if order == "channels_last" else 2) or order == "as it is":
                state[name] = ORDERS[order](state[name].contiguous())
                if optimizer is ours:
                    state[name].requires_grad_()
    for step in range(2, 4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
    for param, state in ours.state.items():
        assert param.grad is None or state["exp_avg"].stride() == state["exp_avg_sq"].stride() == param.stride()


STEPS = {
    "int": int,
    "float": float,
    "an int tensor": lambda step: torch.tensor(int(step)),
    "a float64 tensor": lambda step: torch.tensor(float(step), dtype=torch.float64),
    "a tensor of one dimension": lambda step: torch.tensor([float(step)]),
    "one that requires a gradient": lambda step: torch.tensor(float(step), requires_grad=True),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["set", "loaded"])
@pytest.mark.parametrize("kind", STEPS)
@adams
def test_step_may_be_any_number(ours_of, theirs_of, kind, loaded, backend):
    ours, theirs = pair(ours_of, theirs_of)
    run([ours, theirs], range(2))
    if loaded:
        saved = copy.deepcopy(ours.state_dict())
        for state in saved["state"].values():
            state["step"] = STEPS[kind](state["step"].item())
        ours.load_state_dict(saved)
    else:
        for state in ours.state.values():
            state["step"] = STEPS[kind](state["step"].item())
    run([ours, theirs], range(3, 5))
    assert_same(ours, theirs, 1e-12)
    assert {state["step"].dtype for state in ours.state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_of_another_dtype_is_taken_over(dtype, backend):
    """As set by hand: moments in float64 of narrower layers are rounded to what the group asks for."""
    ours, other = (pair(*ADAMS[1], dtype)[0] for _ in range(2))
    run([ours, other], range(3))
    for state in ours.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].double()
    run([ours, other], range(3, 5))
    assert_same(ours, other)
    assert all(state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype for state in ours.state.values())


@adams
def test_lazily_conjugated_moments_are_taken_over(ours_of, theirs_of, backend):
    """As set by hand. Beside a plain layer, whose step would be taken first."""
    for build in (ours_of, lambda *args, **options: optim.SGD(*args, momentum=0.9, **options)):
        lazy, resolved = (
            build([with_gradient(parameter(4)), with_gradient(parameter(5, dtype=torch.complex64))], lr=0.1)
            for _ in range(2)
        )
        for optimizer in (lazy, resolved):
            optimizer.step()
            state = optimizer.state[params_of(optimizer)[1]]
            moments = [name for name, value in state.items() if value.is_complex()]
            assert moments
            for name in moments:
                state[name] = state[name].conj() if optimizer is lazy else state[name].conj().resolve_conj()
            optimizer.step()
        assert_same(lazy, resolved)


@pytest.mark.parametrize("number", [np.float64, np.float32, np.int64, float, int])
@adams
def test_steps_are_loaded_from_any_kind_of_number(ours_of, theirs_of, number, backend):
    ours, theirs = pair(ours_of, theirs_of)
    run([ours, theirs], range(3))
    for optimizer in (ours, theirs):
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            state["step"] = number(3)
        optimizer.load_state_dict(saved)
    run([ours, theirs], range(3, 5))
    assert_same(ours, theirs, 1e-12)


def test_a_state_of_none_is_begun_anew(backend):
    """As a state dict may hold it, for a parameter that has no state yet."""
    ours, expected = (optim.AdamW([with_gradient(parameter(3)), with_gradient(parameter(4))], lr=0.1) for _ in range(2))
    ours.state[ours.param_groups[0]["params"][1]].update(step=None, exp_avg=None, exp_avg_sq=None)
    ours.step()
    expected.step()
    assert_same(ours, expected)


# Odd layers.


def odd_pair(ours_of, theirs_of, name):
    """An odd layer between two plain ones, in our optimizer and in torch's."""
    optimizers = []
    for adam in (ours_of, theirs_of):
        torch.manual_seed(0)
        odd = ODD[name]()
        real = torch.float32 if odd.dtype.is_complex else odd.dtype
        one, other = (with_gradient(parameter(n, dtype=real, scale=n)) for n in (4, 6))
        its_own = {"params": [odd], "weight_decay": 0.2}
        loop = {} if adam is ours_of else {"foreach": False}
        optimizers.append(
            adam([{"params": [one]}, its_own, {"params": [other], "lr": 0.1}], lr=0.05, weight_decay=0.1, **loop)
        )
    return optimizers


REFUSED = {"sparse", "sparse, of an expanded parameter", "parameter conjugated", "parameter negated", "float8"}


@pytest.mark.parametrize("name", [n for n in ODD if n not in REFUSED and n != "gradient of another dtype"])
@adams
def test_an_odd_layer_is_stepped_as_by_torch(ours_of, theirs_of, name, backend):
    ours, theirs = odd_pair(ours_of, theirs_of, name)
    step_odd_layers(name, ours, theirs)


@STATE_DTYPES
@adams
def test_a_gradient_of_another_dtype_is_not_rounded(ours_of, theirs_of, state_dtype, backend):
    """The oracle is a step in float64 from the same state."""
    param = of_grad_dtype(parameter(300, dtype=torch.bfloat16), torch.float32)
    options = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.5, 0.7), "eps": 1e-3}
    ours = ours_of([param], state_dtype=state_dtype, **options)
    theirs = theirs_of([torch.nn.Parameter(param.detach().double())], **options)
    for scale in (1.0, 1.001, 0.7):
        param.grad = scale * 0.251 * torch.arange(1.0, 301.0).log()
        assert not torch.equal(param.grad, param.grad.bfloat16().float())
        widen(theirs, ours)
        ours.step()
        theirs.step()
        ulp = torch.finfo(torch.bfloat16).eps
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            close(p.detach().double(), q.detach(), ulp, "parameter")
            for name in ("exp_avg", "exp_avg_sq"):
                close(ours.state[p][name].double(), theirs.state[q][name], 2e-7 if state_dtype else ulp / 2, name)


@adams
def test_a_layer_that_is_listed_twice_is_one_layer(ours_of, theirs_of, backend):
    def build(times):
        params = [with_gradient(parameter(n)) for n in (3, 4)]
        base = ours_of([parameter(2)], lr=0.5, weight_decay=0.1)
        base.add_param_group({"params": params})
        base.param_groups[1]["params"] = params * times  # torch warns where it sees it
        base.param_groups[0]["params"] += params * (times - 1)
        return base

    once, twice = build(1), build(2)
    twice.param_groups[0]["params"] = twice.param_groups[0]["params"][:1]
    for _ in range(3):
        once.step()
        twice.step()
        for p, q in zip(once.param_groups[1]["params"], twice.param_groups[1]["params"], strict=False):
            assert torch.equal(p, q)
            for name, value in once.state[p].items():
                assert torch.equal(value, twice.state[q][name])


@adams
def test_a_layer_of_two_groups_is_stepped_once_as_the_first_one_says(ours_of, theirs_of, backend):
    params = [with_gradient(parameter(n)) for n in (3, 4)]
    ours = ours_of(params, lr=0.1, weight_decay=0.1)
    ours.param_groups.append({**ours.param_groups[0], "lr": 7.0, "weight_decay": 0.9, "params": params[:1]})
    expected = theirs_of([with_gradient(parameter(n)) for n in (3, 4)], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        ours.step()
        expected.step()
    for p, q in zip(params, params_of(expected), strict=True):
        close(p.detach(), q.detach(), 2e-6, "parameter")
        assert ours.state[p]["step"].item() == 3


@adams
def test_overlapping_parameters_are_stepped_one_after_the_other(ours_of, theirs_of, backend):
    """As one thread does them, in the order that they are listed in; a gradient may be another layer's memory, too."""

    def build(adam, **options):
        memory = torch.linspace(-2, 3, 12, dtype=torch.float64)
        params = [torch.nn.Parameter(x) for x in (memory[:8], memory[4:], torch.ones(3, dtype=torch.float64))]
        params[0].grad, params[1].grad = params[0].detach().sin(), params[1].detach().cos()
        params[2].grad = params[0].detach()[:3]  # which the step writes
        return adam(params, lr=0.1, weight_decay=0.1, betas=(0.5, 0.7), **options)

    ours, theirs = build(ours_of), build(theirs_of, foreach=False)
    grads = [params_of(optimizer)[2].grad.clone() for optimizer in (ours, theirs)]
    for _ in range(3):
        params_of(theirs)[2].grad = params_of(ours)[2].grad.clone()  # of before the step
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
    assert not torch.equal(grads[0], params_of(ours)[2].grad)


def test_state_that_several_layers_share_is_not_written_by_two_threads(backend):
    """State of one memory, as by a dict that was copied without its tensors: layers are stepped one after the other."""
    param, other = (with_gradient(parameter(4, dtype=torch.float64)) for _ in range(2))
    ours = optim.AdamW([param, other], lr=0.1, weight_decay=0.1)
    ours.step()
    ours.state[other]["step"] = ours.state[param]["step"]
    theirs = torch.optim.AdamW(
        [torch.nn.Parameter(p.detach().clone()) for p in (param, other)], lr=0.1, weight_decay=0.1
    )
    widen(theirs, ours)
    theirs.state[params_of(theirs)[1]]["step"] = theirs.state[params_of(theirs)[0]]["step"]
    for group in theirs.param_groups:
        group["foreach"] = False
    # Torch's loop counts the step of the first layer, and that of the second from there.
    ours.step()
    theirs.step()
    assert ours.state[param]["step"].item() == 3
    for p, q in zip((param, other), params_of(theirs), strict=True):
        close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"], 1e-12, "exp_avg")
        assert torch.isfinite(p).all()


def test_a_parameter_with_gaps_keeps_its_moments_and_what_lies_around(backend):
    base = sliced(torch.randn(6, 5))
    param = torch.nn.Parameter(base)
    around = torch.empty(0).set_(base.untyped_storage()).clone().reshape(6, 10)[:, 5:]
    param.grad = torch.randn(6, 5)
    ours = optim.AdamW([param], lr=0.1, weight_decay=0.1)
    ours.step()
    pointers = [ours.state[param][name].data_ptr() for name in ("exp_avg", "exp_avg_sq")]
    ours.step()
    assert [ours.state[param][name].data_ptr() for name in ("exp_avg", "exp_avg_sq")] == pointers
    assert torch.equal(torch.empty(0).set_(base.untyped_storage()).reshape(6, 10)[:, 5:], around)
