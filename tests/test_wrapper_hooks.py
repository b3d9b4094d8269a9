"""Hooks of a wrapper and of its base: each fires once, on the object that it was registered on."""

import copy
import pickle

import pytest
import torch
from by_hand import EPS
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from wrapped_networks import loss_of, network, train, trained, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")


def test_step_hooks_fire_once_on_the_object_they_were_given_to(wrap):
    model = network()
    optimizer, fired = wrapped(wrap, model), []

    def hook(name):
        return lambda who, args, kwargs: fired.append((name, type(who).__name__, len(args), kwargs))

    handles = [
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        optimizer.optim.register_step_pre_hook(hook("base pre")),
        optimizer.optim.register_step_post_hook(hook("base post")),
    ]
    loss_of(model, 0).backward()
    optimizer.step(closure=None)
    expected = [
        ("pre", wrap.cls.__name__, 1, {"closure": None}),
        ("base pre", "SGD", 1, {}),
        ("base post", "SGD", 1, {}),
        ("post", wrap.cls.__name__, 1, {"closure": None}),
    ]
    assert fired == expected
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert fired == expected


def test_a_step_pre_hook_sees_raw_gradients_and_the_bases_sees_what_the_base_does(wrap):
    model = network()
    optimizer, seen = wrapped(wrap, model), []
    for one in (optimizer, optimizer.optim):
        one.register_step_pre_hook(lambda *_: seen.append(model[0].weight.grad.clone()))
    loss_of(model, 0).backward()
    raw = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(seen[0], raw)
    assert torch.equal(seen[1], model[0].weight.grad)
    assert torch.equal(seen[1], raw) != wrap.consumes_gradients


def test_a_step_pre_hook_can_change_the_arguments(wrap):
    model = network()
    optimizer, evaluated = wrapped(wrap, model), []

    def closure():
        evaluated.append(None)
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    optimizer.register_step_pre_hook(lambda who, args, kwargs: ((who, closure), {}))
    assert optimizer.step() is not None
    assert len(evaluated) == 1


def test_global_step_hooks_fire_once_on_the_wrapper(wrap):
    model = network()
    optimizer, fired = wrapped(wrap, model), []
    handles = [
        register_optimizer_step_pre_hook(lambda who, args, kwargs: fired.append(("pre", who))),
        register_optimizer_step_post_hook(lambda who, args, kwargs: fired.append(("post", who))),
    ]
    try:
        train(model, optimizer, range(1))
    finally:
        for handle in handles:
            handle.remove()
    assert fired == [("pre", optimizer), ("post", optimizer)]  # and none of the base
    train(model, optimizer, range(1))
    assert len(fired) == 2


def test_state_dict_hooks_fire_once_on_the_object_they_were_given_to(wrap):
    optimizer, fired = wrapped(wrap, network()), []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda who: fired.append(("pre", who))),
        optimizer.register_state_dict_post_hook(
            lambda who, state_dict: fired.append(("post", who, wrap.key in state_dict))
        ),
        optimizer.optim.register_state_dict_post_hook(lambda who, state_dict: fired.append(("base", who, *state_dict))),
    ]
    optimizer.state_dict()
    base = optimizer.optim
    assert fired == [("pre", optimizer), ("base", base, "state", "param_groups"), ("post", optimizer, True)]
    for handle in handles:
        handle.remove()
    optimizer.state_dict()
    assert len(fired) == 3


def test_a_state_dict_post_hook_can_replace_what_is_returned(wrap):
    optimizer = wrapped(wrap, network())
    optimizer.register_state_dict_post_hook(lambda who, state_dict: {**state_dict, "first": 1})
    optimizer.register_state_dict_post_hook(lambda who, state_dict: {"prepended": 2, **state_dict}, prepend=True)
    assert list(optimizer.state_dict()) == ["prepended", "state", "param_groups", wrap.key, "first"]


def test_load_state_dict_hooks_fire_once_on_the_object_they_were_given_to(wrap):
    optimizer, fired = wrapped(wrap, network()), []
    handles = [
        optimizer.register_load_state_dict_pre_hook(lambda who, state_dict: fired.append(("pre", who, *state_dict))),
        optimizer.register_load_state_dict_post_hook(lambda who: fired.append(("post", who))),
        optimizer.optim.register_load_state_dict_pre_hook(lambda who, state_dict: fired.append(("base", *state_dict))),
    ]
    optimizer.load_state_dict(optimizer.state_dict())
    expected = [
        ("pre", optimizer, "state", "param_groups", wrap.key),
        ("base", "state", "param_groups"),
        ("post", optimizer),
    ]
    assert fired == expected
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert fired == expected


def test_a_load_pre_hook_can_replace_what_is_loaded(wrap):
    optimizer = wrapped(wrap, network())
    state_dict = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda who, given: {**given, wrap.key: {"trust_coef": 0.75}})
    optimizer.load_state_dict(state_dict)
    assert (optimizer.trust_coef, optimizer.eps) == (0.75, EPS)


def test_a_load_pre_hook_that_edits_its_argument_does_not_edit_the_callers(wrap):
    optimizer = wrapped(wrap, network())
    state_dict = optimizer.state_dict()

    def hook(who, given):
        given[wrap.key] = {"trust_coef": 0.75}
        given.pop("unheard of", None)

    optimizer.register_load_state_dict_pre_hook(hook)
    before = {**state_dict, "unheard of": 1}
    given = dict(before)
    optimizer.load_state_dict(given)
    assert optimizer.trust_coef == 0.75
    assert given == before


def test_hooks_are_dropped_by_copies_as_torch_drops_them(wrap):
    _, optimizer = trained(wrap)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(None))
    for copied in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer.optim))):
        copied.step()
    assert not fired
