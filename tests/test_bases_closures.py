"""Closures over every class of torch.optim, and what step() puts back after errors."""

import pytest
import torch
from bases import (
    BASES,
    DENSE,
    assert_same,
    cases,
    classes,
    groups,
    label,
    lamb,
    lars,
    lars_on_updates,
    layers,
    of_wrappers,
)
from by_hand import EPS, TRUST_COEF, WRAPPERS, ByHand, wrappers
from closeness import close
from optimizers import assert_identical, change_lr, hyper_parameters

from torchlars import LARS

scaling_updates = pytest.mark.parametrize("wrap", [wrap for wrap in WRAPPERS if not wrap.consumes_gradients], ids=str)
pytestmark = [
    pytest.mark.usefixtures("one_thread", "checked_sparse_tensors"),
    pytest.mark.filterwarnings("ignore:a layer whose weights are all 0:UserWarning"),  # they are, on purpose
]


def targets(optimizer):
    """A function that evaluates a smooth loss of all parameters anew, with its gradients."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    goals = [goal.detach() for goal in layers(99, [param.shape for param in params])]

    def evaluate():
        optimizer.zero_grad()
        distances = [param - goal for param, goal in zip(params, goals, strict=True)]
        loss = sum((x**2).sum() * (1 + i) + (x**4).sum() / 10 for i, x in enumerate(distances))
        loss.backward()
        return loss

    return evaluate


@pytest.mark.parametrize(("wrap", "name", "options"), of_wrappers(cases(DENSE), few=(lamb, lars_on_updates)))
def test_step_with_a_closure_equals_a_step_without(wrap, name, options, backend):
    with_closure, without = (wrap(classes()[name](groups(name), **options)) for _ in range(2))
    evaluate, evaluate_before = targets(with_closure), targets(without)
    for _ in range(3):
        before = hyper_parameters(with_closure)
        expected = evaluate_before()
        without.step()
        with torch.no_grad():
            loss = with_closure.step(evaluate)
        assert torch.equal(loss, expected)
        assert_identical(before, hyper_parameters(with_closure))
        assert_same(with_closure, without, tolerance=0)


@pytest.mark.parametrize("options", BASES["LBFGS"][0], ids=label)
def test_lbfgs_follows_the_contract_at_every_evaluation(options, backend):
    def build():
        return torch.optim.LBFGS(layers(3, [(3, 4), (4,), (5,)], zero=[2]), lr=0.5, **{"max_iter": 6, **options})

    optimizer, model = LARS(build(), eps=EPS, trust_coef=TRUST_COEF), ByHand(lars, build())
    evaluate, evaluate_model = targets(optimizer), targets(model)
    evaluations = []

    def counted():
        evaluations.append(None)
        return evaluate()

    for step in range(4):
        expected, loss = model.step(evaluate_model), optimizer.step(counted)
        close(loss, expected, 1e-10, "loss")  # it divides by differences of gradients, and so magnifies rounding
        assert_same(optimizer, model, 1e-10)
        change_lr([optimizer, model], step)
    state = next(iter(optimizer.state.values()))
    assert len(evaluations) == state["func_evals"]
    assert len(evaluations) > 4 if options.get("max_iter") == 1 else len(evaluations) > 12


def test_lbfgs_without_a_closure_says_so():
    optimizer = LARS(torch.optim.LBFGS(layers(3, [(3, 4)]), line_search_fn="strong_wolfe"))
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


@scaling_updates
def test_lbfgs_is_refused_where_updates_are_scaled(wrap):
    who = {"LAMB": "LAMB", "LARS-update": "apply_to='update'"}[str(wrap)]
    message = rf"^{who} needs a base that takes one step along one direction \(got: LBFGS, which searches along many"
    base = torch.optim.LBFGS(layers(3, [(3, 4)]))
    around = torch.optim.SGD(base.param_groups[0]["params"])
    around.optim = base  # as ZeroRedundancyOptimizer is
    for one in (base, around):
        with pytest.raises(TypeError, match=message):
            wrap(one)
    group = {**base.param_groups[0], "apply_to": "update"}
    base.param_groups[0].update(group)
    if wrap.cls is LARS:
        with pytest.raises(TypeError, match=r"^apply_to='update' of parameter group 0 needs a base that takes one"):
            LARS(base)


@scaling_updates
def test_frozen_layers_are_left_alone_by_a_step_with_a_closure(wrap, backend):
    """Whatever their dtype: no gradient can come to them."""
    param, frozen = layers(3, [(3, 4)])[0], torch.ones(3, 4).to(torch.float8_e4m3fn)
    twin = torch.nn.Parameter(param.detach().clone())

    def closure_of(one):
        def closure():
            one.grad = None
            loss = (one**3).sum()
            loss.backward()
            return loss

        return closure

    for params in ([param, torch.nn.Parameter(frozen, requires_grad=False)], [twin]):
        wrap(torch.optim.SGD(params, lr=0.5, weight_decay=0.1)).step(closure_of(params[0]))
    assert torch.equal(param, twin)
    assert torch.equal(frozen.float(), torch.ones(3, 4))


class Recorder(torch.optim.Optimizer):
    """A base of another house. Evaluates ``evaluations`` times, with gradients as they are, and notes what it sees."""

    def __init__(self, params, evaluations=1, fails=None, **defaults):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.25, "decoupled_weight_decay": False, **defaults})
        self.evaluations = evaluations
        self.fails = fails
        self.calls = []
        self.seen = []

    def look(self):
        return [group.get("weight_decay") for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None, *args, **kwargs):
        self.calls.append((closure, args, kwargs))
        if self.fails == "at once":
            raise KeyboardInterrupt
        loss = None
        for _ in range(self.evaluations if closure else 1):
            loss = closure() if closure else None
            self.seen.append(self.look())
            for group in self.param_groups:
                for param in group["params"]:
                    param.sub_(group["lr"] * (param.grad + group.get("weight_decay", 0) * param))
        if self.fails == "at the end":
            raise KeyError("the base's own fault")
        return loss


def recorder(**options):
    """A recorder with a decayed group, one without decay, and one that is not adapted."""
    a, b, c = layers(5, [(3, 2), (4,), (2,)])
    decay, small = 1, 0.0078125 * 2  # an int must stay an int, and every object itself
    trust = {"params": [c], "weight_decay": small, "trust_coef": None}
    return Recorder([{"params": [a], "weight_decay": decay}, {"params": [b], "weight_decay": 0}, trust], **options)


@wrappers
def test_closure_sees_the_users_weight_decay_and_the_base_only_where_it_decays(wrap, backend):
    base = recorder(evaluations=3)
    optimizer = wrap(base)
    evaluate, seen = targets(optimizer), []

    def closure():
        seen.append(base.look())
        return evaluate()

    optimizer.step(closure)
    assert seen == [[1, 0, 0.015625]] * 3
    assert base.seen == [[0 if wrap.consumes_gradients else 1, 0, 0.015625]] * 3


@wrappers
def test_base_that_evaluates_twice_follows_the_contract(wrap, backend):
    optimizer, model = wrap(recorder(evaluations=2)), ByHand(wrap, recorder(evaluations=2))
    evaluate, evaluate_model = targets(optimizer), targets(model)
    for _ in range(3):
        expected = model.step(evaluate_model)
        close(optimizer.step(evaluate), expected, 1e-12, "loss")
        assert_same(optimizer, model)


@wrappers
def test_what_a_closure_sets_stays_and_is_used_at_once(wrap, backend):
    optimizer, plain = wrap(recorder(evaluations=2)), wrap(recorder(evaluations=2, weight_decay=0))

    def set_options(one):
        one.param_groups[0].update(weight_decay=0.75, lr=0.3, eps=0.2)
        one.param_groups[1].update(weight_decay=0.125, trust_coef=0.5)

    evaluate = targets(optimizer)

    def closure():
        set_options(optimizer)
        return evaluate()

    set_options(plain)
    optimizer.step(closure)
    plain.step(targets(plain))
    assert optimizer.optim.look() == [0.75, 0.125, 0.015625]
    assert optimizer.optim.seen == [[0, 0, 0.015625] if wrap.consumes_gradients else [0.75, 0.125, 0.015625]] * 2
    assert_same(optimizer, plain, 0)


@wrappers
def test_groups_may_be_added_or_reordered_inside_a_closure(wrap, backend):
    optimizer, plain = wrap(recorder(evaluations=3)), wrap(recorder(evaluations=3))

    def add(one):
        one.add_param_group({"params": layers(6, [(2, 2)]), "weight_decay": 0.0625})
        one.param_groups.reverse()

    def closure():
        if len(optimizer.param_groups) == 3:
            add(optimizer)
        return targets(optimizer)()

    add(plain)
    optimizer.step(closure)
    plain.step(lambda: targets(plain)())
    assert optimizer.optim.look() == [0.0625, 0.015625, 0, 1]
    assert_same(optimizer, plain, 0)


@pytest.mark.parametrize(
    ("wrap", "name", "fails_at"),
    [
        *((wrap, name, 1) for wrap in WRAPPERS for name in ("SGD", "Adam")),
        *((wrap, "Recorder", n) for wrap in WRAPPERS for n in (1, 2, 3)),
        *((lars, "LBFGS", n) for n in (1, 2, 3)),
    ],
    ids=str,
)
def test_after_a_closure_that_raises_hyper_parameters_are_the_same_objects(wrap, name, fails_at, backend):
    params = layers(3, [(3, 4), (4,)])
    base = {
        "SGD": lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.015625 * 3),
        "Adam": lambda: torch.optim.Adam(params, lr=0.1, weight_decay=0.015625 * 3),
        "LBFGS": lambda: torch.optim.LBFGS(
            [{"params": params, "weight_decay": 0.015625 * 3}], lr=0.1, line_search_fn="strong_wolfe"
        ),
        "Recorder": lambda: recorder(evaluations=3),
    }[name]()
    optimizer, evaluations = wrap(base), []
    evaluate, before = targets(optimizer), hyper_parameters(optimizer)

    def closure():
        evaluations.append(None)
        if len(evaluations) == fails_at:
            raise ZeroDivisionError("in the closure")
        return evaluate()

    with pytest.raises(ZeroDivisionError, match="in the closure"):
        optimizer.step(closure)
    assert len(evaluations) == fails_at
    assert_identical(before, hyper_parameters(optimizer))


@pytest.mark.parametrize(("fails", "error"), [("at once", KeyboardInterrupt), ("at the end", KeyError)])
@pytest.mark.parametrize("with_closure", [False, True])
@wrappers
def test_after_a_base_that_raises_hyper_parameters_are_the_same_objects(wrap, fails, error, with_closure, backend):
    optimizer = wrap(recorder(fails=fails, evaluations=2))
    evaluate, before = targets(optimizer), hyper_parameters(optimizer)
    evaluate()
    with pytest.raises(error):
        optimizer.step(*([evaluate] if with_closure else []))
    assert_identical(before, hyper_parameters(optimizer))


@pytest.mark.parametrize("when", ["pre", "post"])
@wrappers
def test_after_a_hook_of_the_base_that_raises_hyper_parameters_are_the_same_objects(wrap, when, backend):
    optimizer = wrap(recorder())
    before = hyper_parameters(optimizer)
    targets(optimizer)()

    def hook(optimizer, args, kwargs):
        raise ZeroDivisionError("in a hook")

    getattr(optimizer.optim, f"register_step_{when}_hook")(hook)
    with pytest.raises(ZeroDivisionError, match="in a hook"):
        optimizer.step()
    assert_identical(before, hyper_parameters(optimizer))


def test_after_a_closure_whose_gradients_are_refused_hyper_parameters_are_the_same_objects(backend):
    optimizer = LARS(recorder(evaluations=2))
    evaluate, before, evaluations = targets(optimizer), hyper_parameters(optimizer), []

    def closure():
        loss = evaluate()
        evaluations.append(None)
        if len(evaluations) == 2:
            param = optimizer.param_groups[0]["params"][0]
            param.grad = param.grad.to_sparse()
        return loss

    with pytest.raises(RuntimeError, match="sparse gradients need weight_decay=0"):
        optimizer.step(closure)
    assert_identical(before, hyper_parameters(optimizer))


@wrappers
def test_gradients_are_enabled_inside_a_closure_whoever_disabled_them(wrap, backend):
    optimizer = wrap(recorder(evaluations=2))  # whose step disables them, and leaves it at that
    evaluate, enabled = targets(optimizer), []

    def closure():
        enabled.append(torch.is_grad_enabled())
        return evaluate()

    with torch.no_grad():
        optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert enabled == [True, True]


@pytest.mark.parametrize(
    ("args", "kwargs", "passed_on"),
    [
        ((), {}, ((), {})),
        ((None,), {}, ((), {})),
        ((), {"closure": None}, ((), {})),
        ((None, 1, "two"), {"three": 3}, ((1, "two"), {"three": 3})),
        ((), {"three": 3}, ((), {"three": 3})),
    ],
)
@pytest.mark.parametrize("with_closure", [False, True])
@wrappers
def test_arguments_of_step_are_passed_on_to_the_base(wrap, args, kwargs, passed_on, with_closure, backend):
    optimizer = wrap(recorder())
    evaluate = targets(optimizer)
    evaluate()
    if with_closure and args:
        args = (evaluate, *args[1:])
    elif with_closure:
        kwargs = {**kwargs, "closure": evaluate}
    loss = optimizer.step(*args, **kwargs)
    ((closure, *rest),) = optimizer.optim.calls
    assert tuple(rest) == passed_on
    assert callable(closure) if with_closure else closure is None
    assert (loss is not None) == with_closure


@wrappers
def test_a_base_whose_step_takes_nothing_is_stepped(wrap, backend):
    class Bare(torch.optim.Optimizer):
        def step(self):
            self.stepped = True

    (param,) = layers(0, [(2, 2)])
    optimizer = wrap(Bare([param], {"lr": 0.1}))
    optimizer.step()
    optimizer.step(closure=None)
    assert optimizer.optim.stepped
