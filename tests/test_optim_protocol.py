"""The protocol by which LARS passes trust ratios to a base: what a base gets, and what it may ask for."""

import ast
import inspect
import itertools
import textwrap

import pytest
import torch
from cases import DTYPES
from closeness import close
from optimizers import change_lr, params_of
from sgd_cases import (
    EPS,
    ODD,
    PLAINLY,
    TRUST_COEF,
    adapted_groups,
    assert_same,
    assert_same_ratios,
    give_gradients,
    lars_pair,
    parameter,
    run,
    with_gradient,
)

from torchlars import LARS, optim

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


def example(name="MySGD"):
    """The class in the documentation."""
    lines = inspect.cleandoc(optim.__doc__).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"    class {name}("))
    block = list(itertools.takewhile(lambda line: not line or line.startswith("    "), lines[begin:]))
    source = textwrap.dedent("\n".join(block))
    assert [type(node) for node in ast.parse(source).body] == [ast.ClassDef]
    namespace = {"torch": torch}
    exec(source, namespace)
    return namespace[name]


def example_pair(groups_of=adapted_groups, **options):
    base = example()(groups_of(**options), {"lr": 0.5, "weight_decay": 0.0})
    return LARS(base, eps=EPS, trust_coef=TRUST_COEF), lars_pair({})[1]


def test_the_documented_base_equals_sgd_under_lars(backend):
    ours, theirs = example_pair()
    for step in range(4):
        give_gradients([ours, theirs], step)
        grads = [None if param.grad is None else (param.grad, param.grad.clone()) for param in params_of(ours)]
        assert ours.step() is None
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        assert_same_ratios(ours, theirs, 1e-14)
        for param, grad in zip(params_of(ours), grads, strict=True):
            assert grad is None or (param.grad is grad[0] and torch.equal(*grad))
        change_lr([ours, theirs], step)


def test_the_documented_base_is_plain_sgd_by_itself(backend):
    ours, theirs = example_pair()[0].optim, torch.optim.SGD(adapted_groups(), lr=0.5)
    run([ours, theirs], range(3))
    assert_same(ours, theirs, 1e-12)


def test_the_documented_base_takes_a_closure_and_measures_what_it_left(backend):
    ours, theirs = example_pair()
    for step in range(3):
        losses = []
        for optimizer in (ours, theirs):

            def closure(optimizer=optimizer, step=step):
                assert torch.is_grad_enabled()
                give_gradients([optimizer], step)
                return torch.tensor(2.0 + step)

            losses.append(optimizer.step(closure))
        assert losses == [2.0 + step] * 2
        assert_same(ours, theirs, 1e-12)
        assert_same_ratios(ours, theirs, 1e-14)


class Records(torch.optim.Optimizer):
    """A base that shows what it is given."""

    takes_trust_ratios = True

    def step(self, closure=None, *, trust_ratios=None, more=None):
        self.closure, self.more, self.given = closure, more, trust_ratios
        return "what the base returns"


def records(group_list=None, **options):
    base = Records(adapted_groups(**options) if group_list is None else group_list, {"lr": 0.5, "weight_decay": 0.125})
    return base, LARS(base, eps=EPS, trust_coef=TRUST_COEF)


def test_a_base_is_passed_what_step_was_and_its_result_is_returned(backend):
    base, optimizer = records()

    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return "the loss"

    assert optimizer.step() == "what the base returns"
    assert (base.closure, base.more) == (None, None)
    assert optimizer.step(closure, more=3) == "what the base returns"
    assert base.more == 3
    assert calls == [], "only the base calls it"
    with torch.no_grad():
        assert base.closure() == "the loss"
    assert calls == [True]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.03, 0.15]


def test_a_group_left_alone_gets_none(backend):
    base, optimizer = records()
    give_gradients([optimizer], 3)
    optimizer.step()
    params = [group["params"] for group in optimizer.param_groups]
    assert base.given.options(0) == {"trust_coef": TRUST_COEF, "eps": EPS, **PLAINLY}
    assert base.given.options(1) == {"trust_coef": 0.02, "eps": 0.01, **PLAINLY}
    assert base.given.options(2) is None
    assert base.given.measure(2, params[2]) is None
    assert optimizer.trust_ratios() == {}
    ratios = base.given.measure(1, params[1][1:])
    assert ratios.shape == (2,)
    for param, ratio in zip(params[1][1:], ratios, strict=True):
        expected = 0.02 * param.norm() / (param.grad.norm() + 0.03 * param.norm() + 0.01)
        close(ratio, expected.detach(), 1e-14, "ratio")
    assert optimizer.trust_ratios() == {}, "those of the step, which asked for none"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratios_are_float64_for_float64_layers_and_float32_for_all_others(dtype, backend):
    base, optimizer = records(dtype=dtype)
    give_gradients([optimizer], 3)
    optimizer.step()
    ratios = base.given.measure(0, optimizer.param_groups[0]["params"])
    assert ratios.dtype == (torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32)
    assert not ratios.requires_grad
    assert ratios[3:].tolist() == [1.0, 1.0]  # the zero layer and the empty one
    assert all(ratio > 0 and ratio != 1 for ratio in ratios[:3].tolist())


def test_a_base_may_measure_and_report_by_itself(backend):
    class Reports(torch.optim.Optimizer):
        takes_trust_ratios = True

        @torch.no_grad()
        def step(self, closure=None, *, trust_ratios=None):
            for index, group in enumerate(self.param_groups):
                options = trust_ratios.options(index)
                for param in group["params"]:
                    if param.grad is None:
                        continue
                    direction = param.grad + group["weight_decay"] * param
                    if options is not None:
                        w, g = param.norm(), param.grad.norm()
                        ratio = options["trust_coef"] * w / (g + group["weight_decay"] * w + options["eps"])
                        ratio = torch.where((w == 0) | (g == 0), 1.0, ratio)
                        direction = ratio * direction
                        trust_ratios.report([param], ratio.reshape(1))
                    param -= group["lr"] * direction

    ours = LARS(Reports(adapted_groups(), {"lr": 0.5}), eps=EPS, trust_coef=TRUST_COEF)
    theirs = lars_pair({})[1]
    for step in range(3):
        give_gradients([ours, theirs], step)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, 1e-12)
        assert_same_ratios(ours, theirs, 1e-14)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("FSDP1", RuntimeError, r"must be whole layers, but FSDP1 .* \(group: 1, parameter: 1, shape: \(3,\)\)"),
        (
            "float8",
            TypeError,
            r"must be of a real or complex .* \(group: 1, parameter: 1, dtype: torch.float8_e4m3fn\)",
        ),
        (
            "sparse",
            RuntimeError,
            r"sparse gradients need weight_decay=0 \(weight_decay: 0.125\) \(group: 1, parameter: 1",
        ),
    ],
)
def test_what_cannot_be_measured_is_named_by_its_place_in_the_group(name, error, message, backend):
    param = ODD[name]()
    base, optimizer = records([{"params": [parameter(2)]}, {"params": [parameter(4), param]}])
    optimizer.step()
    with pytest.raises(error, match=message):
        base.given.measure(1, [param])


def test_a_base_that_does_not_say_so_is_given_scaled_gradients(backend):
    class Silent(optim.SGD):
        takes_trust_ratios = False

    silent = LARS(Silent(adapted_groups(), lr=0.5, momentum=0.9), eps=EPS, trust_coef=TRUST_COEF)
    _, theirs = lars_pair({"momentum": 0.9})
    for optimizer in (silent, theirs):
        optimizer.param_groups[1]["momentum"] = 0.9
    for step in range(3):
        give_gradients([silent, theirs], step)
        silent.step()
        theirs.step()
        assert_same(silent, theirs, 1e-12)
        for p, q in zip(params_of(silent), params_of(theirs), strict=True):
            assert p.grad is None or torch.equal(p.grad, q.grad)


# What a base gets from LARS.


class Asks(torch.optim.SGD):
    """Asks for trust ratios, and does nothing with them."""

    takes_trust_ratios = True

    def step(self, closure=None, *, trust_ratios=None):
        self.got = self.ask(trust_ratios)


def asks(params, ask):
    optimizer = Asks([{"params": params}], lr=0.5, weight_decay=0.1)
    optimizer.ask = ask
    return LARS(optimizer)


def test_what_a_base_measured_in_a_step_is_what_lars_shows(backend):
    params = [with_gradient(parameter(n)) for n in (3, 4, 5)]
    optimizer = asks(params, lambda trust_ratios: trust_ratios.measure(0, params[1:]))
    optimizer.step()
    shown = optimizer.trust_ratios()
    assert list(shown) == params[1:]
    for param, ratio in zip(params[1:], optimizer.optim.got, strict=True):
        expected = 0.001 * param.norm() / (param.grad.norm() + 0.1 * param.norm() + 1e-8)
        torch.testing.assert_close(ratio, expected.detach())
        assert shown[param] == ratio
    optimizer.optim.ask = lambda trust_ratios: None
    optimizer.step()
    assert optimizer.trust_ratios() == {}


def test_no_parameters_have_no_trust_ratios(backend):
    optimizer = asks([parameter(3)], lambda trust_ratios: trust_ratios.measure(0, []))
    optimizer.step()
    assert optimizer.optim.got.shape == (0,)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("stranger", r"params must be of the group \(group: 0, got one of shape \(9,\)\)"),
        ("without gradient", r"params must have gradients \(group: 0, parameter: 1\)"),
        ("mixed", r"of one device and dtype \(group: 0, parameter: 2, torch.float64 on cpu, but torch.float32 on cpu"),
    ],
)
def test_a_base_that_asks_for_what_cannot_be_measured_is_told_so(which, message, backend):
    first, bare, double = with_gradient(parameter(3)), parameter(4), with_gradient(parameter(5, dtype=torch.float64))
    asked = {"stranger": with_gradient(parameter(9)), "without gradient": bare, "mixed": double}[which]
    optimizer = asks([first, bare, double], lambda trust_ratios: trust_ratios.measure(0, [first, asked]))
    with pytest.raises(ValueError, match=message):
        optimizer.step()


class KeepsOptions(torch.optim.SGD):
    takes_trust_ratios = True

    def step(self, closure=None, *, trust_ratios=None):
        self.options = trust_ratios.options(0)


def test_options_are_read_only_and_another_object_once_they_have_changed(extension):
    optimizer = LARS(KeepsOptions([with_gradient(parameter(3))], lr=0.5), eps=EPS)
    optimizer.step()
    options = optimizer.optim.options
    with pytest.raises(TypeError):
        options["eps"] = 7.0
    optimizer.step()
    assert optimizer.optim.options is options
    optimizer.param_groups[0]["eps"] = 0.25
    optimizer.step()
    assert (optimizer.optim.options["eps"], options["eps"]) == (0.25, EPS)


def test_whether_a_base_takes_ratios_is_asked_once_a_step(backend):
    """Groups were left to a base that had been called without ratios: it took a step of plain SGD."""

    class TakesThemOnceThereAreGradients(torch.optim.SGD):
        @property
        def takes_trust_ratios(self):
            return self.param_groups[0]["params"][0].grad is not None

    def closure():
        param.grad = torch.tensor([0.3, 0.4], dtype=torch.float64)
        return param.sum()

    param = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    LARS(TakesThemOnceThereAreGradients([param], lr=0.5, weight_decay=0.1), eps=0.5, trust_coef=0.2).step(closure)
    # r = 0.2 · 5 / (0.5 + 0.1 · 5 + 0.5) = 2/3, g + λw = (0.6, 0.8)
    torch.testing.assert_close(param.detach(), torch.tensor([2.8, 4 - 0.8 / 3], dtype=torch.float64))
