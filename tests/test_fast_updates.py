"""Updates that the fast path scales (csrc/eager.cpp): the layers that it takes, with the same bits as on the slow path."""

import copy

import pytest
import torch
from cases import DTYPES, misaligned
from optimizers import params_of
from sgd_cases import ODD, adapted_groups, assert_same, assert_same_ratios, give_gradients, parameter, with_gradient
from torch import nn
from torch.optim import SGD, AdamW

from torchlars import LAMB, ops, step

pytestmark = pytest.mark.usefixtures("checked_sparse_tensors", "extension")


#: Layers that neither path takes: see test_dialects_errors.py.
REFUSED = {"FSDP1", "float8", "parameter conjugated", "parameter negated", "sparse, of an expanded parameter"}


@pytest.fixture
def left(monkeypatch):
    """The shapes of the layers whose updates the slow path scaled."""
    shapes = []

    def copies(params, make=step.copies):
        made = make(params)
        shapes.extend(tuple(param.shape) for param in made)
        return made

    monkeypatch.setattr(step, "copies", copies)
    return shapes


def assert_equal(fast, slow):
    assert_same(fast, slow)
    assert_same_ratios(fast, slow)
    assert [param._version for param in params_of(fast)] == [param._version for param in params_of(slow)]


def step_on_slow_path(optimizer, closure=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "fast_layers", lambda kind: ops.NoFastPath())
        return optimizer.step(closure)


def sgd(params, **options):
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, **options)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["lr", "lr_tensor"])
@pytest.mark.parametrize("options", [{}, {"trust_coef": 0.3}, {"clip": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fast_path_gives_the_same_bits(dtype, options, lr, left):
    """Over memory orders, layers without gradients, zero and empty ones, and a group that is not adapted."""
    groups = adapted_groups(dtype)
    for i, group in enumerate(groups):
        group["lr"] = lr * (1 + i)
    fast = LAMB(AdamW(groups, lr=lr), **options)
    slow = copy.deepcopy(fast)
    for i in range(3):
        give_gradients([fast, slow], i)
        fast.step()
        assert len(left) == (len(fast.trust_ratios()) if dtype.is_complex else 0)
        step_on_slow_path(slow)
        assert_equal(fast, slow)
        assert len(fast.trust_ratios()) == (8 if i == 1 else 7)
        left.clear()


@pytest.mark.parametrize("options", [{"eps": 0.05}, {"eps": 0.05, "clip": True}], ids=str)
def test_groups_have_options_of_their_own(options, left):
    torch.manual_seed(0)
    params = [with_gradient(parameter(5, scale=3.0**i)) for i in range(4)]
    own = [{}, {"eps": 2.0}, {"trust_coef": 0.1, "lr": 0.5}, {"clip": False, "lr": torch.tensor(0.3)}]
    fast = LAMB(sgd([{"params": [param], **keys} for param, keys in zip(params, own, strict=True)]), **options)
    slow = copy.deepcopy(fast)
    for optimizer in (fast, slow):
        for param, given in zip(params_of(optimizer), params, strict=True):
            param.grad = given.grad.clone()
    fast.step()
    assert left == []
    step_on_slow_path(slow)
    assert_equal(fast, slow)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("numels", [(4_300_003, 5, 70_001), (65, 1030, 16_385)], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_of_any_size_are_whole(dtype, numels, threads, left):
    """Large ones are written past the caches, from memory that need not be aligned."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for take in (LAMB.step, step_on_slow_path):
            torch.manual_seed(0)
            params = [nn.Parameter(misaligned(torch.randn(numel).to(dtype))) for numel in numels]
            assert params[0].data_ptr() % 16 > 0
            optimizer = LAMB(sgd([with_gradient(param) for param in params]))
            take(optimizer)
            assert len(left) == (0 if take is LAMB.step else 3)
            results.append(optimizer)
        assert_equal(*results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(ODD.keys() - REFUSED))
def test_an_odd_layer_is_left(name, left):
    results = []
    for take in (LAMB.step, step_on_slow_path):
        torch.manual_seed(0)
        odd = ODD[name]()
        optimizer = LAMB(SGD([with_gradient(parameter(2)), odd, with_gradient(parameter(4))], lr=0.1))
        del left[:]
        take(optimizer)
        assert len(left) == (1 if take is LAMB.step else 3)
        assert tuple(odd.shape) in left
        results.append(optimizer)
    assert_equal(*results)


def test_a_tied_layer_is_scaled_once_as_its_first_group_says(left):
    results = []
    for take in (LAMB.step, step_on_slow_path):
        torch.manual_seed(0)
        tied, other = with_gradient(parameter(3)), with_gradient(parameter(2))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            base = sgd([tied, other, tied])
        base.param_groups.append({**base.param_groups[0], "params": [tied], "trust_coef": 0.01})
        optimizer = LAMB(base)
        take(optimizer)
        results.append(optimizer)
    assert_equal(*results)
    assert len(results[0].trust_ratios()) == len(left) == 2  # on the slow path


@pytest.mark.parametrize(
    ("spans", "are_left"),
    [([(0, 4), (4, 9)], False), ([(0, 4), (3, 9)], True), ([(0, 9), (2, 3), (5, 7)], True)],
    ids=["side by side", "overlapping", "nested"],
)
def test_parameters_that_share_memory(spans, are_left, left):
    """They are scaled one after the other if they overlap."""
    results = []
    for take in (LAMB.step, step_on_slow_path):
        torch.manual_seed(0)
        memory = torch.randn(9)
        params = [with_gradient(nn.Parameter(memory[begin:end])) for begin, end in spans]
        optimizer = LAMB(sgd([*params, with_gradient(parameter(2))], foreach=False))
        take(optimizer)
        if take is LAMB.step:
            assert len(left) == (len(spans) + 1 if are_left else 0)
        results.append(optimizer)
    assert_equal(*results)


def test_a_layer_that_overlaps_one_of_the_slow_path(left):
    results = []
    for take in (LAMB.step, step_on_slow_path):
        torch.manual_seed(0)
        memory = torch.randn(6, dtype=torch.complex64)
        params = [nn.Parameter(torch.view_as_real(memory)[:4]), nn.Parameter(memory)]
        optimizer = LAMB(sgd([with_gradient(param) for param in params], foreach=False))
        take(optimizer)
        assert len(left) == 2
        del left[:]
        results.append(optimizer)
    assert_equal(*results)


def test_with_a_closure_all_layers_are_left(left):
    """It may give gradients to more, and change groups."""
    optimizer = LAMB(sgd([with_gradient(parameter(3)), parameter(2)]))
    group = optimizer.param_groups[0]

    def closure():
        group["params"][1].grad = torch.ones(2)
        group["lr"] = 0.2
        return torch.tensor(0.5)

    same = copy.deepcopy(optimizer)
    same.param_groups[0]["params"][0].grad = group["params"][0].grad.clone()
    assert optimizer.step(closure) == 0.5
    assert sorted(left) == [(2,), (3,)]
    same.param_groups[0]["params"][1].grad = torch.ones(2)
    same.param_groups[0]["lr"] = 0.2
    same.step()
    assert len(left) == 2
    assert_equal(optimizer, same)


class Swapping(SGD):
    """A base whose step puts other tensors into the parameters, and lets go of the old ones."""

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for param in group["params"]:
                new = nn.Parameter(param.detach() - group["lr"] * param.grad)
                new.grad = param.grad
                torch.utils.swap_tensors(param, new)
        return loss


@pytest.mark.parametrize("closure", [None, lambda: torch.tensor(0.5)], ids=["", "closure"])
def test_a_base_may_swap_the_tensors_of_parameters(closure):
    params = [with_gradient(parameter(5, 3)), with_gradient(parameter(300), torch.randn(300))]
    before = [param.detach().clone() for param in params]
    optimizer = LAMB(Swapping(params, lr=0.25), trust_coef=0.5)
    optimizer.step(closure)
    for param, old in zip(params, before, strict=True):
        ratio = 0.5 * old.norm() / param.grad.norm()
        torch.testing.assert_close(param.detach(), old - 0.25 * ratio * param.grad)


@pytest.mark.parametrize("closure", [None, lambda: torch.tensor(0.5)], ids=["", "closure"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lr_is_that_before_the_step_of_the_base(dtype, closure):
    """A hook of the base may change it in place, as a scheduler there does."""
    lr = torch.tensor(0.25, dtype=dtype)
    params = [with_gradient(parameter(5, 3)), with_gradient(parameter(4, dtype=torch.float64))]
    before = [param.detach().clone() for param in params]
    optimizer = LAMB(SGD([{"params": [param], "lr": lr} for param in params]), trust_coef=0.5)
    optimizer.optim.register_step_post_hook(lambda *args: lr.mul_(0.5))
    optimizer.step(closure)
    assert lr == 0.125
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close((param.detach() - old).norm(), 0.25 * 0.5 * old.norm())


def test_the_base_alone_refers_to_gradients():
    """A second reference would make reading .grad take longer."""
    param = with_gradient(parameter(3))
    optimizer = LAMB(sgd([param]))
    uses = []
    optimizer.optim.register_step_pre_hook(lambda *args: uses.append(param.grad._use_count()))
    before = param.grad._use_count()
    optimizer.step()
    assert uses == [before]
