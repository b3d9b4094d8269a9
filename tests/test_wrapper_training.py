"""Wrappers in training loops: DDP, ZeroRedundancyOptimizer, GradScaler, clipping, accumulation, closures."""

import copy
import math

import pytest
import torch
from by_hand import EPS, TRUST_COEF, ByHand
from wrapped_networks import assert_same, assert_same_state_dict, loss_of, network, sgd, train, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")


def test_gradients_are_scaled_in_the_buckets_of_distributed_data_parallel(wrap, process_group, backend):
    model, reference = network(), network()
    parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer, expected = wrapped(wrap, model), wrapped(wrap, reference)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        inputs = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        (parallel(inputs) ** 2).mean().backward()
        grads = [(param.grad, param.grad.data_ptr(), param.grad._version) for param in model.parameters()]
        optimizer.step()
        for param, (grad, pointer, version) in zip(model.parameters(), grads, strict=True):
            assert param.grad is grad
            assert grad.data_ptr() == pointer
            assert (grad._version > version) == wrap.consumes_gradients  # so that autograd sees that it was written
        train(reference, expected, [step])
        assert_same(model, reference)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it is first imported
@pytest.mark.parametrize("wrapper_is", ["inside", "outside", "a class"])
def test_zero_redundancy_optimizer_works(wrap, wrapper_is, process_group, backend):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    model, reference = network(), network()
    expected = wrap(torch.optim.SGD(reference.parameters(), **options))
    if wrapper_is == "outside":
        optimizer = wrap(ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, **options))
    else:
        made = lambda params, **k: wrap(torch.optim.SGD(params, **k))  # noqa: E731
        if wrapper_is == "a class":
            made = wrap.cls.over(torch.optim.SGD, eps=EPS, trust_coef=TRUST_COEF, **wrap.options)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=made, **options)
        assert isinstance(optimizer.optim, wrap.cls)
    for step in range(4):
        train(model, optimizer, [step])
        train(reference, expected, [step])
        assert_same(model, reference)
        for one in (optimizer, expected):
            one.param_groups[0]["lr"] *= 0.5
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


# Mixed precision, clipping, accumulation.


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step_and_clips_and_accumulates_like_a_plain_loop(wrap, fused, backend):
    model, reference = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer, plain = wrapped(wrap, model, fused=fused), ByHand(wrap, sgd(reference, foreach=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(6):
        overflow = step in (0, 3)
        old = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for micro_step in range(2):
            scaler.scale(loss_of(model, 10 * step + micro_step) * (math.inf if overflow else 1.0)).backward()
            loss_of(reference, 10 * step + micro_step).backward()
        scaler.unscale_(optimizer)
        if step % 2:
            for one in (model, reference):
                torch.nn.utils.clip_grad_norm_(one.parameters(), 0.01)
        assert scaler.step(optimizer) is None
        scale = scaler.get_scale()
        scaler.update()
        if overflow:
            assert scaler.get_scale() < scale
            torch.testing.assert_close(model.state_dict(), old[0], rtol=0, atol=0)
            assert_same_state_dict(optimizer.state_dict(), old[1])
        else:
            plain.step()
        assert_same(model, reference, 1e-6)
        for one in (optimizer, plain):
            one.zero_grad()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.03]


def test_grad_scaler_unscales_by_itself(wrap, backend):
    model, reference = network(), network()
    optimizer, expected = wrapped(wrap, model), wrapped(wrap, reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(reference, expected, range(3))
    assert_same(model, reference)  # a power of two leaves no trace


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("max_norm", [None, 0.01])
def test_accumulation_and_clipping_follow_the_contract(wrap, micro_steps, max_norm, backend):
    model, reference = network(), network()
    optimizer, plain = wrapped(wrap, model), ByHand(wrap, sgd(reference))
    for step in range(4):
        for one in (model, reference):
            for micro_step in range(micro_steps):
                loss_of(one, 10 * step + micro_step).backward()
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(one.parameters(), max_norm)
        for one in (optimizer, plain):
            one.step()
            one.zero_grad()
        assert_same(model, reference, 1e-12)


def test_step_returns_the_closures_loss_itself(wrap, backend):
    model = network()
    optimizer = wrapped(wrap, model)
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(loss_of(model, 0))
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0]
    assert optimizer.step() is None


def test_an_averaged_model_is_unaffected(wrap, backend):
    model, reference = network(), network()
    optimizer, expected = wrapped(wrap, model), wrapped(wrap, reference)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    states = []
    for step in range(3):
        train(model, optimizer, [step])
        averaged.update_parameters(model)
        train(reference, expected, [step])
        states.append([param.detach().clone() for param in reference.parameters()])
    assert_same(model, reference)
    for param, history in zip(averaged.parameters(), zip(*states, strict=True), strict=True):
        torch.testing.assert_close(param, torch.stack(history).mean(0), rtol=1e-12, atol=1e-12)
