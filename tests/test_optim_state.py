"""State of torchlars.optim.SGD: momentum, its dtype and memory order, copies, state dicts and checkpoints."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from cases import channels_last, sliced, transposed
from optimizers import change_lr, params_of
from sgd_cases import (
    KEPT,
    assert_same,
    assert_unchanged,
    both,
    few,
    give_gradients,
    groups,
    hand_over_in_mid_training,
    layers,
    pair,
    parameter,
    run,
    sgd_of,
    snapshot,
    through,
    unders,
    with_gradient,
)
from wrapped_networks import loss_of, network

from torchlars import LAMB, LARS, optim, reference

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


# Memory order of momentum.

ORDERS = {"channels_last": channels_last, "transposed": transposed, "as it is": lambda x: x}


@both
def test_momentum_has_the_parameters_memory_order(pair_of, backend):
    ours, _ = pair_of({"momentum": 0.9})
    for step in (3, 4):
        give_gradients([ours], step)
        ours.step()
        orders = [(param.stride(), ours.state[param]["momentum_buffer"].stride()) for param in ours.state]
        assert ((12, 1, 6, 3), (12, 1, 6, 3)) in orders
        assert ((1, 4), (1, 4)) in orders
        assert all(one == other for one, other in orders)


@pytest.mark.parametrize("order", ORDERS)
@both
def test_loaded_momentum_of_another_memory_order_is_taken_over(pair_of, order, backend):
    ours, theirs = pair_of({"momentum": 0.9})
    run([ours, theirs], range(2))
    for optimizer in (ours, theirs):
        for state in optimizer.state.values():
            buffer = state["momentum_buffer"]
            if buffer.dim() == (4 if order == "channels_last" else 2) or order == "as it is":
                state["momentum_buffer"] = ORDERS[order](buffer.contiguous())
    for step in range(2, 4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
    assert all(ours.state[p]["momentum_buffer"].stride() == p.stride() for p in ours.state if p.grad is not None)


@pytest.mark.parametrize("order", ORDERS)
@both
def test_momentum_that_requires_a_gradient_is_stepped_as_any_other(pair_of, order, backend):
    """Also one that is copied into the parameter's memory order first; what is new requires none."""
    ours, theirs = pair_of({"momentum": 0.9})
    run([ours, theirs], range(2))
    for state in ours.state.values():
        buffer = state["momentum_buffer"]
        assert not buffer.requires_grad
        if buffer.dim() == (4 if order == "channels_last" else 2):
            buffer = ORDERS[order](buffer.contiguous())
        state["momentum_buffer"] = buffer.requires_grad_()
    for step in range(2, 4):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
    assert all(value.is_leaf for state in ours.state.values() for value in state.values())
    assert all(param.is_leaf for param in params_of(ours))


@both
def test_momentum_stays_the_same_tensor(pair_of, backend):
    ours, _ = pair_of({"momentum": 0.9})
    run([ours], range(3))
    before = {param: state["momentum_buffer"] for param, state in ours.state.items()}
    versions = {param: buffer._version for param, buffer in before.items()}
    run([ours], range(3, 4))
    for param, buffer in before.items():
        assert ours.state[param]["momentum_buffer"] is buffer
        assert buffer._version > versions[param]
        assert not buffer.requires_grad


# State dicts.


hows = pytest.mark.parametrize("how", ["deepcopy", "weights_only"])


@few
@both
def test_state_dict_is_that_of_torch(pair_of, options):
    ours, theirs = pair_of(options)
    run([ours, theirs], range(3))
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert a["param_groups"] == b["param_groups"]
    assert list(a["param_groups"][0]) == list(b["param_groups"][0])
    torch.testing.assert_close(a["state"], b["state"], rtol=1e-12, atol=1e-12)


@hows
@few
@both
def test_state_dicts_go_from_torch_to_us_and_back_in_mid_training(pair_of, options, how, backend):
    ours, theirs = pair_of(options)
    expected, other = pair_of(options)[1], pair_of(options)[1]
    hand_over_in_mid_training(how, ours, theirs, expected, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@both
def test_a_copy_goes_on_like_the_original(pair_of, copied, backend):
    ours, _ = pair_of({"momentum": 0.9, "nesterov": True})
    run([ours], range(2))
    for param in params_of(ours):
        param.grad = None
    other = copied(ours)
    run([ours, other], range(2, 4))
    assert_same(ours, other)
    assert all(p is not q for p, q in zip(params_of(ours), params_of(other), strict=True))
    assert not any(
        p.data_ptr() == q.data_ptr() for p, q in zip(params_of(ours), params_of(other), strict=True) if p.numel()
    )


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("wrap", [LARS, LAMB])
def test_gradients_stay_where_a_state_dict_says_that_torchs_fused_form_wrote_it(wrap, base, backend):
    """Which alone needs gradients in their parameters' memory order, and parameters without gaps."""
    theirs = getattr(torch.optim, base)([with_gradient(parameter(4, 3)) for _ in range(2)], lr=0.25, fused=True)
    theirs.step()
    params = [parameter(4, 3), torch.nn.Parameter(parameter(4, 6).detach()[:, ::2])]
    ours = wrap(getattr(optim, base)(params, lr=0.25, weight_decay=0.1))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["fused"]
    expected = wrap(getattr(optim, base)([torch.nn.Parameter(p.detach().clone()) for p in params], lr=0.25))
    expected.load_state_dict(copy.deepcopy(theirs.state_dict()))
    expected.param_groups[0]["fused"] = False
    grads = [torch.arange(12.0).reshape(3, 4).t() for _ in params]
    for param, same, grad in zip(params, params_of(expected), grads, strict=True):
        param.grad, same.grad = grad, grad.contiguous()
    ours.step()
    expected.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert_same(ours, expected)


def test_a_state_dict_of_other_groups_is_refused_and_nothing_changes(backend):
    ours, _ = pair({"momentum": 0.9})
    run([ours], range(2))
    before = snapshot(ours)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        ours.load_state_dict(optim.SGD(layers(0), lr=0.5).state_dict())
    assert_unchanged(ours, before)
    assert not ours._optimizer_load_state_dict_pre_hooks


def test_loading_sees_what_hooks_make_of_a_state_dict(backend):
    ours, _ = pair({"momentum": 0.9}, dtype=torch.bfloat16, momentum_dtype=torch.float32)
    run([ours], range(1))

    def doubled(_, state_dict):
        state = {i: {"momentum_buffer": 2 * own["momentum_buffer"]} for i, own in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other, _ = pair({"momentum": 0.9}, dtype=torch.bfloat16, momentum_dtype=torch.float32)
    other.register_load_state_dict_pre_hook(doubled)
    other.load_state_dict(ours.state_dict())
    for p, q in zip(params_of(ours), params_of(other), strict=True):
        assert (p in ours.state) == (q in other.state)
        if p in ours.state:
            assert torch.equal(other.state[q]["momentum_buffer"], 2 * ours.state[p]["momentum_buffer"])


def in_float32(dtype, **options):
    return pair({"momentum": 0.9, **options}, dtype=dtype, momentum_dtype=torch.float32)[0]


def reference_step(optimizer, buffers):
    """What the reference makes of a step: new parameters, by parameter, and new momenta."""
    results = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            first = param not in buffers
            buffer = buffers.setdefault(param, torch.zeros_like(param, dtype=torch.float32, requires_grad=False))
            result = param.detach().clone()
            reference.sgd_(
                [result],
                [param.grad],
                [buffer],
                maximize=group["maximize"],
                weight_decays=[group["weight_decay"]],
                lrs=[group["lr"]],
                momentums=[group["momentum"]],
                dampenings=[0.0 if first else group["dampening"]],
                nesterov=group["nesterov"],
            )
            results[param] = result
    return results


@KEPT
@pytest.mark.parametrize("options", [{}, {"dampening": 0.25}, {"nesterov": True}, {"maximize": True}], ids=str)
def test_momentum_in_float32_is_that_of_the_reference(dtype, options, backend):
    ours, buffers = in_float32(dtype, **options), {}
    for step in range(4):
        give_gradients([ours], step)
        expected = reference_step(ours, buffers)
        ours.step()
        assert ours.state.keys() == buffers.keys()
        for param, result in expected.items():
            assert torch.equal(param, result)
        for param, buffer in buffers.items():
            assert ours.state[param]["momentum_buffer"].dtype == torch.float32
            assert torch.equal(ours.state[param]["momentum_buffer"], buffer)
        change_lr([ours], step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_momentum_of_wider_layers_is_not_changed_by_momentum_dtype(dtype, backend):
    one, other = (pair({"momentum": 0.9}, dtype=dtype, momentum_dtype=kept)[0] for kept in (torch.float32, None))
    run([one, other], range(3))
    assert_same(one, other)
    assert all(state["momentum_buffer"].dtype == dtype for state in one.state.values())


@hows
@KEPT
def test_momentum_in_float32_is_loaded_without_rounding(dtype, how, backend):
    ours, other = in_float32(dtype), in_float32(dtype)
    run([ours], range(3))
    assert any((b := s["momentum_buffer"]).numel() and not torch.equal(b, b.to(dtype)) for s in ours.state.values())
    other.load_state_dict(through(how, ours.state_dict()))
    for p, q in zip(params_of(ours), params_of(other), strict=True):
        q.data.copy_(p.detach())
    assert_same(ours, other)
    run([ours, other], range(3, 5))
    assert_same(ours, other)


@hows
@KEPT
def test_momentum_in_float32_goes_through_torch_and_comes_back_as_float32(dtype, how, backend):
    ours, theirs = in_float32(dtype), pair({"momentum": 0.9}, dtype=dtype)[1]
    run([ours], range(3))
    theirs.load_state_dict(through(how, ours.state_dict()))
    assert all(state["momentum_buffer"].dtype == dtype for state in theirs.state.values())
    run([theirs], range(3, 4))
    assert all(state["momentum_buffer"].dtype == dtype for state in theirs.state.values())
    ours.load_state_dict(through(how, theirs.state_dict()))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert (p in ours.state) == (q in theirs.state)
        if p in ours.state:
            assert ours.state[p]["momentum_buffer"].dtype == torch.float32
            assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"].float())


@KEPT
@pytest.mark.parametrize("where", ["argument", "group"])
def test_momentum_that_torch_kept_becomes_float32(where, dtype, backend):
    def build():
        first, second = groups(dtype, momentum=0.9)
        if where == "argument":
            return optim.SGD([first, second], lr=0.5, momentum=0.9, momentum_dtype=torch.float32)
        return optim.SGD([first, {**second, "momentum_dtype": torch.float32}], lr=0.5, momentum=0.9)

    theirs, ours = pair({"momentum": 0.9}, dtype=dtype)[1], build()
    run([theirs], range(3))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for _ in range(2):
        expected = torch.float32 if where == "argument" else dtype
        assert {ours.state[p]["momentum_buffer"].dtype for p in ours.param_groups[0]["params"]} == {expected}
        assert {ours.state[p]["momentum_buffer"].dtype for p in ours.param_groups[1]["params"]} == {torch.float32}
        run([ours], range(3, 4))


@KEPT
def test_momentum_dtype_may_be_a_groups_own(dtype, backend):
    first, second = groups(dtype, momentum=0.9)
    third = {"params": layers(2, dtype), "momentum_dtype": None, "weight_decay": 0.1}
    ours = optim.SGD([first, second], lr=0.5, momentum=0.9, momentum_dtype=torch.float32)
    ours.add_param_group(third)
    run([ours], range(3))
    for group, expected in zip(ours.param_groups, [torch.float32, torch.float32, dtype], strict=True):
        assert group["momentum_dtype"] == (None if expected == dtype else expected)
        assert {ours.state[param]["momentum_buffer"].dtype for param in group["params"]} == {expected}
    other = copy.deepcopy(ours)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_same(ours, other)


@KEPT
def test_momentum_dtype_may_be_changed_between_steps(dtype, backend):
    ours = pair({"momentum": 0.9}, dtype=dtype)[0]
    for step, kept in enumerate([None, torch.float32, None]):
        for group in ours.param_groups:
            group["momentum_dtype"] = kept
        give_gradients([ours], step + 3)
        buffers = {
            param: state["momentum_buffer"].to(kept or dtype).float().clone() for param, state in ours.state.items()
        }
        expected = reference_step(ours, buffers)
        ours.step()
        for param, result in expected.items():
            assert torch.equal(param, result)
            assert torch.equal(ours.state[param]["momentum_buffer"], buffers[param].to(kept or dtype))


@pytest.mark.parametrize("wrong", [torch.float64, torch.bfloat16, "float32", 32, True], ids=str)
def test_a_wrong_momentum_dtype_is_refused(wrong):
    message = rf"must be None, torch.float32 or torch.int8 \(got: {wrong!r}\)"
    with pytest.raises(ValueError, match=f"momentum_dtype {message}"):
        optim.SGD(layers(0), lr=0.5, momentum_dtype=wrong)
    with pytest.raises(ValueError, match=f"momentum_dtype of parameter group 1 {message}"):
        optim.SGD([{"params": layers(0)}, {"params": layers(1), "momentum_dtype": wrong}], lr=0.5)


@unders
def test_distributed_checkpoints_keep_momentum_in_float32(under_lars, backend):
    def build():
        model = network(dtype=torch.bfloat16)
        return model, sgd_of(model, under_lars=under_lars, momentum_dtype=torch.float32)

    (model, optimizer), (other, fresh) = build(), build()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for flat in (False, True):
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
        state_dict = dcp.get_optimizer_state_dict(model, optimizer, options=options)
        dcp.set_optimizer_state_dict(other, fresh, copy.deepcopy(state_dict), options=options)
        for p, q in zip(params_of(optimizer), params_of(fresh), strict=True):
            assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
            assert torch.equal(optimizer.state[p]["momentum_buffer"], fresh.state[q]["momentum_buffer"])


def test_momentum_of_a_parameter_with_gaps_stays_in_its_memory(backend):
    param = torch.nn.Parameter(sliced(torch.randn(6, 5)))
    param.grad = torch.randn(6, 5)
    optimizer = optim.SGD([param], lr=0.5, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    pointer = optimizer.state[param]["momentum_buffer"].data_ptr()
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].data_ptr() == pointer


@unders
@pytest.mark.parametrize("options", [{"full_state_dict": True}, {"cpu_offload": True}, {}], ids=str)
def test_a_distributed_checkpoint_gathered_to_one_rank_keeps_momentum_in_float32(under_lars, options, backend):
    """It takes plain types and tensors only, and a dtype is neither."""

    def build():
        model = network(dtype=torch.bfloat16)
        return model, sgd_of(model, under_lars=under_lars, momentum_dtype=torch.float32)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    options = dcp.StateDictOptions(**options)
    (model, optimizer), (other, resumed) = build(), build()
    train(model, optimizer, range(2))
    state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    assert {group["momentum_dtype"] for group in state["param_groups"]} == {"float32"}
    other.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other, resumed, copy.deepcopy(state), options=options)
    assert all(group["momentum_dtype"] is torch.float32 for group in resumed.param_groups)
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(param, twin)
        assert resumed.state[twin]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(optimizer.state[param]["momentum_buffer"], resumed.state[twin]["momentum_buffer"])
