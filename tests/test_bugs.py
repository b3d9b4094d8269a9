"""What failed in torchlars 0.1.2, one test a failing."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchlars import LARS


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def layer(dtype=torch.float64, grad=True):
    """A parameter of norm 5 whose gradient has norm 0.5."""
    param = nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))
    if grad:
        param.grad = torch.tensor([-0.4, 0.3], dtype=dtype)
    return param


def trust_ratio(weight_decay=0.0, trust_coef=0.001):
    """That layer's."""
    return trust_coef * 5 / (0.5 + weight_decay * 5 + 1e-8)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-12, atol=0)


# Closures


def test_closure(backend):
    """In 0.1.2, ``step(closure)`` scaled the gradients, then had the base call the closure, which computed new ones.

    The base took those as they were, without weight decay, which was hidden: neither LARS nor decay had any effect.
    Users of Lightning, which always passes a closure, could not reproduce their losses and saw models that did not
    converge (Lightning-AI/pytorch-lightning#6523). There is a decay of 0.1 here and no gradient before the closure, so
    that every one of scaling too early, scaling twice and forgetting the decay ends elsewhere.
    """
    param = layer(grad=False)
    optimizer = LARS(SGD([param], lr=2.0, weight_decay=0.1))

    def closure():
        optimizer.zero_grad()
        loss = (param * float64([-0.4, 0.3])).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(0.0)
    r = trust_ratio(weight_decay=0.1)
    assert_close(param, float64([3.0, 4.0]) - 2.0 * r * float64([-0.4 + 0.3, 0.3 + 0.4]))


def test_closure_that_the_base_calls_many_times(backend):
    """In 0.1.2, LARS had no effect at all over LBFGS: it scaled once, before the first of many evaluations.

    A base that asks four times a step shows a wrapper that scales only the first, or only the last.
    """

    def train(adapt, wrap):
        param = layer(grad=False)
        optimizer = wrap(LBFGS([param], lr=0.1, max_iter=4))
        evaluations = 0

        def closure():
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = (param**4).sum() / 100
            loss.backward()
            adapt(param)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return param, evaluations

    def by_hand(param):
        param.grad.mul_(0.02 * param.detach().norm() / (param.grad.norm() + 1e-8))

    expected, expected_evaluations = train(by_hand, lambda base: base)
    param, evaluations = train(lambda param: None, lambda base: LARS(base, trust_coef=0.02))
    assert evaluations == expected_evaluations > 6
    assert_close(param, expected.detach())


def test_closure_sees_the_weight_decay():
    """In 0.1.2, ``group["weight_decay"]`` was 0 while the closure ran, for all that it penalised or logged by it."""
    param = layer()
    optimizer = LARS(SGD([param], lr=0.5, weight_decay=0.1))
    seen = []
    optimizer.step(lambda: seen.append(optimizer.param_groups[0]["weight_decay"]))
    assert seen == [0.1]


def test_closure_that_loads_a_state_dict():
    """In 0.1.2, decays were put back by position, over whatever the groups held by then.

    A closure that rolled back to a checkpoint saw the checkpoint's decay replaced by the one from before.
    """
    param = layer()
    optimizer = LARS(SGD([param], lr=2.0, weight_decay=0.7))
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0]["weight_decay"] = 0.1
    optimizer.step(lambda: optimizer.load_state_dict(checkpoint))
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    r = trust_ratio(weight_decay=0.1)
    assert_close(param, float64([3.0, 4.0]) - 2.0 * r * float64([-0.4 + 0.3, 0.3 + 0.4]))


# Weight decay


def test_maximize(backend):
    """In 0.1.2, weight decay made weights grow in groups with ``maximize=True``.

    The base negates the gradients of such groups, and with them the decay that they held. The gradient here is at a
    right angle to the weights, so that the decay alone says whether the weights' norm grows.
    """
    param = layer()
    LARS(SGD([param], lr=2.0, weight_decay=0.1, maximize=True)).step()
    r = trust_ratio(weight_decay=0.1)
    assert_close(param, float64([3.0, 4.0]) + 2.0 * r * float64([-0.4 - 0.3, 0.3 - 0.4]))
    assert param.norm() < 5


def test_decoupled_weight_decay(backend):
    """In 0.1.2, AdamW did not decay weights: LARS took its decay away and mixed it into the gradients.

    There Adam's division by their size swallows it, which is what AdamW was made to avoid. One step from zero state is
    the sign of the gradient; the decay of 0.1 · 0.5 of the weights must show beside it.
    """
    param = layer()
    LARS(AdamW([param], lr=0.1, weight_decay=0.5, eps=0.0)).step()
    assert_close(param, float64([3.0 * 0.95 + 0.1, 4.0 * 0.95 - 0.1]))
    assert_close(param.grad, trust_ratio() * float64([-0.4, 0.3]))


# Gradients


def test_sparse_gradients(backend):
    """In 0.1.2, a step with the gradients of ``nn.Embedding(..., sparse=True)`` raised, with weight decay or without.

    It added λw to every gradient, even for λ = 0, and a dense tensor cannot be added to a sparse one in place. The same
    row is looked up twice, so that a norm of the uncoalesced values is wrong as well.
    """
    embedding = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    nn.init.constant_(embedding.weight, 2.0)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    LARS(SGD(embedding.parameters(), lr=3.0)).step()
    r = 0.001 * 32**0.5 / (10**0.5 + 1e-8)
    step = torch.tensor([[0.0], [2.0], [0.0], [1.0]], dtype=torch.float64).expand(4, 2)
    assert_close(embedding.weight, 2.0 - 3.0 * r * step)


def test_expanded_gradient(backend):
    """In 0.1.2, a gradient whose elements share memory could not be written, and torch raised.

    ``expand`` gives such gradients to those who set ``.grad`` themselves.
    """
    param = nn.Parameter(torch.full((2, 8), 0.5, dtype=torch.float64))
    param.grad = float64([[0.25], [0.25]]).expand(2, 8)
    LARS(SGD([param], lr=1.0, weight_decay=0.1)).step()
    r = 0.001 * 2 / (1 + 0.1 * 2 + 1e-8)
    assert_close(param.grad, torch.full((2, 8), r * 0.3, dtype=torch.float64))


def test_tied_parameter(backend):
    """In 0.1.2, a parameter that its group listed twice was scaled twice, by the ratio of the gradient already scaled.

    ``[*encoder.parameters(), *decoder.parameters()]`` is enough, if the two share their embedding.
    """
    param = layer()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        base = SGD([param, param], lr=0.0, weight_decay=0.1)
    LARS(base).step()
    assert_close(param.grad, trust_ratio(weight_decay=0.1) * float64([-0.4 + 0.3, 0.3 + 0.4]))


def test_nan_in_a_gradient(backend):
    """In 0.1.2, one NaN in a gradient set the layer's ratio to 1, silently.

    The comparison that guards against zero norms is false for NaN too. So the layer's other weights took a step along
    the raw gradient, with an lr made for LARS, such as the 16 here, and nothing told why training broke down. Now the
    whole layer does.
    """
    param = layer()
    param.grad[0] = torch.nan
    LARS(SGD([param], lr=16.0, weight_decay=0.1)).step()
    assert param.isnan().all()


# Types


def test_norms_that_float16_cannot_hold(backend):
    """In 0.1.2, float16 layers whose norm exceeds 65,504 turned into NaN at the first step.

    Norms were kept in the layer's own type: infinite, and so was the denominator with weight decay. 90,000 weights of
    300 have a norm of 90,000.
    """
    param = nn.Parameter(torch.full((90_000,), 300.0, dtype=torch.float16))
    param.grad = torch.full_like(param, 2.0)
    LARS(SGD([param], lr=1.0, weight_decay=0.01), trust_coef=0.5).step()
    r = 0.5 * 90_000 / (600 + 0.01 * 90_000)
    assert torch.equal(param.grad, torch.full_like(param.grad, r * (2 + 0.01 * 300)))
    assert torch.equal(param.detach(), torch.full_like(param.grad, 300 - r * 5))


def test_bfloat16(backend):
    """In 0.1.2, bfloat16 layers raised: the compiled function was "not implemented for 'BFloat16'"."""
    param = layer(torch.bfloat16)
    LARS(SGD([param], lr=1.0), trust_coef=0.5).step()
    assert_close(param.grad, (trust_ratio(trust_coef=0.5) * torch.tensor([-0.4, 0.3]).bfloat16().double()).bfloat16())


# Being a torch optimizer


@pytest.mark.parametrize("scheduler", [OneCycleLR, CyclicLR])
def test_schedulers_that_move_the_momentum(scheduler):
    """In 0.1.2, OneCycleLR and CyclicLR raised AttributeError: they read ``defaults``, and there were none."""
    param = layer()
    optimizer = LARS(SGD([param], lr=1.0, momentum=0.9))
    if scheduler is OneCycleLR:
        schedule = OneCycleLR(optimizer, max_lr=4.0, total_steps=10, base_momentum=0.8, max_momentum=0.95)
    else:
        schedule = CyclicLR(optimizer, base_lr=0.1, max_lr=4.0, step_size_up=3, base_momentum=0.8, max_momentum=0.95)
    base = optimizer.optim.param_groups[0]
    assert base["momentum"] == 0.95
    optimizer.step()
    schedule.step()
    assert base["lr"] > 0.1
    assert base["momentum"] < 0.95


def test_hooks():
    """In 0.1.2, registering a hook of any kind raised AttributeError, and hooks of all optimizers skipped this one."""
    optimizer = LARS(SGD([layer()], lr=1.0))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    of_all = register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(type(optimizer).__name__))
    try:
        optimizer.step()
    finally:
        of_all.remove()
    assert calls[0] == "step pre"
    assert sorted(calls[1:]) == ["LARS", "SGD", "step post"]
    calls.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save pre", "save post", "load pre", "load post"]


def test_state():
    """In 0.1.2, there was no ``state``: whoever looked for momenta in it got an AttributeError."""
    param = layer()
    optimizer = LARS(SGD([param], lr=1.0, momentum=0.9))
    assert len(optimizer.state) == 0
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"] is optimizer.optim.state[param]["momentum_buffer"]


def test_distributed_checkpoint():
    """In 0.1.2, torch.distributed.checkpoint could not save the optimizer: it reads ``state``, and there was none."""
    state_dicts = pytest.importorskip(
        "torch.distributed.checkpoint.state_dict", reason="torch has no distributed package"
    )
    model = nn.Linear(2, 3)
    optimizer = LARS(SGD(model.parameters(), lr=1.0, momentum=0.9), trust_coef=0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(state_dicts.get_optimizer_state_dict(model, optimizer))

    other = LARS(SGD(model.parameters(), lr=0.1, momentum=0.9))
    before = copy.deepcopy(model.state_dict())
    state_dicts.set_optimizer_state_dict(model, other, saved)
    assert torch.equal(other.state[model.weight]["momentum_buffer"], optimizer.state[model.weight]["momentum_buffer"])
    assert other.param_groups[0]["lr"] == 1.0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_assigned_groups():
    """In 0.1.2, ``param_groups`` could not be assigned, which accelerate, opacus and deepspeed do."""
    optimizer = LARS(SGD([layer()], lr=1.0))
    param = layer()
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [param]}]
    optimizer.step()
    assert_close(param, float64([3.0, 4.0]) - trust_ratio() * float64([-0.4, 0.3]))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_set_to_none(set_to_none):
    """In 0.1.2, ``zero_grad(set_to_none=...)`` raised TypeError: the wrapper's had no such argument."""
    param = layer()
    LARS(SGD([param], lr=1.0)).zero_grad(set_to_none=set_to_none)
    assert (param.grad is None) == set_to_none
    assert set_to_none or param.grad.tolist() == [0.0, 0.0]


def test_checkpoint_keeps_the_options():
    """In 0.1.2, ``eps`` and ``trust_coef`` were not in the state dict: a resumed run went on with the constructor's.

    The file is read with ``weights_only=True``, as everyone should, and a plain base can read it too.
    """
    optimizer = LARS(SGD([layer()], lr=1.0), eps=0.25, trust_coef=0.02)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state_dict = torch.load(file, weights_only=True)
    resumed = LARS(SGD([layer()], lr=0.1))
    resumed.load_state_dict(state_dict)
    assert (resumed.eps, resumed.trust_coef, resumed.param_groups[0]["lr"]) == (0.25, 0.02, 1.0)
    SGD([layer()], lr=0.1).load_state_dict(state_dict)


def test_parameters_in_place_of_an_optimizer():
    """In 0.1.2, ``LARS(model.parameters())`` was accepted and failed at the first step, by an attribute of a generator.

    It is how every other optimizer is constructed (kakaobrain/torchlars#7).
    """
    with pytest.raises(TypeError, match=r"\(got: generator\); construct the base first: LARS\(torch.optim.SGD\("):
        LARS(nn.Linear(2, 2).parameters())


def test_no_deprecated_calls():
    """In 0.1.2, the first step called ``add_`` in a way that torch deprecates: an error where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LARS(SGD([layer()], lr=1.0, weight_decay=0.1)).step()


# Sharded parameters


def test_flattened_parameters_of_fsdp():
    """In 0.1.2, FSDP trained with ratios of slices of many layers glued together, different on every rank, silently.

    FSDP1 leaves plain tensors with nothing but a mark on them.
    """
    param = layer()
    param._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="FSDP1 flattens and splits them"):
        LARS(SGD([param], lr=1.0)).step()


def test_sharded_parameters(workers):
    """In 0.1.2, the norms of a DTensor went to C++ code that reads them by their address, and a DTensor's address is 0.

    Others took the norm of the shard that they saw, so that every rank had a ratio of its own.
    """
    for ratio, grad in workers(2, step_of_a_shard):
        assert ratio == pytest.approx(0.5 * 5.0 / (2.0 + 0.1 * 5.0), rel=1e-12)  # ‖(3, 4)‖ = 5, ‖(2, 0)‖ = 2
        assert grad == pytest.approx([ratio * (2.0 + 0.1 * 3.0), ratio * 0.1 * 4.0], rel=1e-12)


def step_of_a_shard():
    """One rank of two: 3 of (3, 4) is on the first, 4 on the second."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    values, grads = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([2.0, 0.0], dtype=torch.float64)
    param = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    param.grad = distribute_tensor(grads, mesh, [Shard(0)])
    optimizer = LARS(SGD([param], lr=1.0, weight_decay=0.1), eps=0, trust_coef=0.5)
    optimizer.step()
    return optimizer.trust_ratios()[param].item(), param.grad.full_tensor().tolist()
