"""Every class of ``torch.optim`` as base follows the contract, under every wrapper.

The oracle is a second, plain instance of the same class, whose steps are corrected by hand: see tests/by_hand.py.
"""

import copy
import inspect

import pytest
import torch
from by_hand import EPS, TRUST_COEF, WRAPPERS, ByHand

from torchlars import LARS

lars, lamb, lars_on_updates = WRAPPERS
wrappers = pytest.mark.parametrize("wrap", WRAPPERS, ids=str)
scaling_updates = pytest.mark.parametrize("wrap", [wrap for wrap in WRAPPERS if not wrap.consumes_gradients], ids=str)

pytestmark = pytest.mark.filterwarnings("ignore:a layer whose weights are all 0:UserWarning")  # they are, on purpose


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_checked_sparse_tensors():
    """Tensors are small here: a second thread would only be waited for. Sparse ones want a word on their checks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.sparse.check_sparse_tensor_invariants():
        yield
    torch.set_num_threads(threads)


# The bases.

# name -> (variants of its options, scale of lr). Every class of torch.optim has to have a line.
BASES = {
    "ASGD": ([{"t0": 2.0, "lambd": 0.01}], 1.0),
    "Adadelta": ([{}], 5.0),
    "Adafactor": ([{}], 0.1),
    "Adagrad": ([{"lr_decay": 0.1}], 0.1),
    "Adam": ([{}, {"amsgrad": True}, {"decoupled_weight_decay": True}], 0.1),
    "AdamW": ([{}, {"amsgrad": True}], 0.1),
    "Adamax": ([{}], 0.1),
    "LBFGS": ([{"line_search_fn": "strong_wolfe"}, {"line_search_fn": "strong_wolfe", "max_iter": 1}], 1.0),
    "Muon": ([{}, {"nesterov": False}], 0.1),
    "NAdam": ([{}, {"decoupled_weight_decay": True}], 0.1),
    "RAdam": ([{}, {"decoupled_weight_decay": True}], 0.1),
    "RMSprop": ([{}, {"momentum": 0.9, "centered": True}], 0.1),
    "Rprop": ([{}], 0.1),
    "SGD": ([{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}], 1.0),
    "SparseAdam": ([{}], 0.1),
}
ALWAYS_DECOUPLED = {"AdamW", "Muon", "Adafactor"}
WITHOUT_WEIGHT_DECAY = {"LBFGS", "Rprop", "SparseAdam"}
BY_CLOSURE_ONLY = {"LBFGS"}
SPARSE_ONLY = {"SparseAdam"}
DENSE = sorted(BASES.keys() - BY_CLOSURE_ONLY - SPARSE_ONLY)


def classes():
    return {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }


def takes(name, option):
    return name in classes() and option in inspect.signature(classes()[name]).parameters


def implementations(name):
    """The implementations that a class has, as options."""
    options = {"loop": {"foreach": False}} if takes(name, "foreach") else {"loop": {}}
    if takes(name, "foreach"):
        options["foreach"] = {"foreach": True}
    if takes(name, "fused"):
        options["fused"] = {"fused": True}
    return options


def label(value):
    return ",".join(f"{key}={item}" for key, item in value.items()) or "-" if isinstance(value, dict) else None


def cases(names):
    """Every class of torch.optim × its variants × implementations × directions, as far as it has them."""
    return [
        pytest.param(name, {**options, **how, **direction}, id="-".join([name, label(options), kind, *direction]))
        for name in names
        if name in classes()
        for options in BASES[name][0]
        for kind, how in implementations(name).items()
        for direction in ([{}, {"maximize": True}] if takes(name, "maximize") else [{}])
    ]


FEW = {"Adafactor", "AdamW", "SGD"}


def of_wrappers(params, few=(lars_on_updates,)):
    """The same cases for every wrapper; for some wrappers those of a few classes, since time is short."""
    return [
        pytest.param(wrap, *param.values, id=f"{wrap}-{param.id}")
        for wrap in WRAPPERS
        for param in params
        if wrap not in few or param.values[0] in FEW
    ]


def is_coupled(name, options):
    return name not in ALWAYS_DECOUPLED and not options.get("decoupled_weight_decay", False)


def layers(seed, shapes, dtype=torch.float64, zero=()):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(param.zero_() if index in zero else param) for index, param in enumerate(params)]


def groups(name, dtype=torch.float64):
    """Three groups: the wrapper's values and a zero layer; values of its own; not adapted."""
    vectors = name != "Muon"  # which takes matrices alone
    lr = BASES[name][1]
    decay = (lambda value: {}) if name in WITHOUT_WEIGHT_DECAY else (lambda value: {"weight_decay": value})
    shapes = [[(3, 4), (4,), (5, 2)], [(2, 3, 2, 2), (6,), ()], [(4, 3), (3,)]]
    if not vectors:
        shapes = [[(3, 4), (1, 4), (5, 2)], [(6, 4), (2, 2), (1, 1)], [(4, 3), (3, 1)]]
    a, b, c = (layers(seed, group, dtype, zero=[2] if seed == 0 else []) for seed, group in enumerate(shapes))
    return [
        {"params": a, "lr": lr, **decay(0.1)},
        {"params": b, "lr": lr / 3, **decay(0.03), "trust_coef": 0.02, **own_eps(name)},
        {"params": c, "lr": lr / 2, **decay(0.2), "trust_coef": None},
    ]


def own_eps(name):
    """A value for the group's key eps, which may be the base's."""
    return {"eps": (None, 1e-2) if name == "Adafactor" else 1e-2}


def give_gradients(optimizers, step):
    """Fresh gradients, the same for all; one of zero, and one that is missing in a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    all_params = [[param for group in optimizer.param_groups for param in group["params"]] for optimizer in optimizers]
    for index, params in enumerate(zip(*all_params, strict=True)):
        grad = torch.randn(params[0].shape, dtype=torch.float64, generator=generator).to(params[0].dtype)
        for param in params:
            param.grad = None if (step, index) == (2, 1) else grad.clone() * (0 if (step, index) == (1, 0) else 1)


def change_lr(optimizers, step):
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            factor = [0.5, 1.7, 0.9, 1.2][(step + index) % 4]
            group["lr"] = group["lr"] * factor


def tensors(value):
    """All tensors in a nested state, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in items for tensor in tensors(item)]


def assert_same(ours, theirs, tolerance=1e-12):
    """Parameters, gradients and state agree."""
    pairs = list(zip(ours.param_groups, theirs.param_groups, strict=True))
    for index, (our_group, their_group) in enumerate(pairs):
        for position, (p, q) in enumerate(zip(our_group["params"], their_group["params"], strict=True)):
            where = f"group {index}, parameter {position}"
            compare(p.detach(), q.detach(), tolerance, where)
            assert (p.grad is None) == (q.grad is None), where
            if p.grad is not None:
                compare(p.grad, q.grad, tolerance, f"gradient of {where}")
            ours_state, theirs_state = tensors(ours.state[p]), tensors(theirs.state[q])
            assert len(ours_state) == len(theirs_state), where
            for a, b in zip(ours_state, theirs_state, strict=True):
                compare(a, b, tolerance, f"state of {where}")


def compare(a, b, tolerance, message):
    a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{message}: {text}")


def hyper_parameters(optimizer):
    """Everything the groups hold, as the very objects."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def assert_identical(before, after):
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert old.keys() == new.keys()
        for key in old:
            assert old[key] is new[key], f"group {index}: {key} was {old[key]!r} and is {new[key]!r}"


def test_every_class_of_torch_optim_has_a_line_in_the_table():
    assert classes().keys() <= BASES.keys()


@pytest.mark.parametrize(("wrap", "name", "options"), of_wrappers(cases(DENSE)))
def test_base_follows_the_contract(wrap, name, options, backend):
    optimizer = wrap(classes()[name](groups(name), **options))
    model = ByHand(wrap, classes()[name](groups(name), **options), coupled=is_coupled(name, options))
    for step in range(4):
        give_gradients([optimizer, model], step)
        before = hyper_parameters(optimizer)
        assert model.step() is None
        assert optimizer.step() is None
        assert_identical(before, hyper_parameters(optimizer))
        assert_same(optimizer, model)
        ratios = [float(ratio) for ratio in optimizer.trust_ratios().values()]
        assert ratios == pytest.approx(model.ratios, rel=1e-14 if wrap.consumes_gradients else 1e-11)
        change_lr([optimizer, model], step)


@wrappers
def test_groups_may_differ_in_direction(wrap, backend):
    def build():
        one, other = layers(0, [(3, 4), (4,)]), layers(1, [(2, 3), (5,)])
        return torch.optim.SGD(
            [{"params": one, "maximize": True}, {"params": other}], lr=0.5, momentum=0.9, weight_decay=0.25
        )

    optimizer, model = wrap(build()), ByHand(wrap, build())
    for step in range(3):
        give_gradients([optimizer, model], step)
        model.step()
        optimizer.step()
        assert_same(optimizer, model)


@pytest.mark.parametrize("times", [2, 3])
@wrappers
def test_a_tied_parameter_is_one_layer(wrap, times, backend):
    """The base steps it as often as it is listed; that is one update."""

    def build():
        one, other = layers(0, [(3, 4), (4,)])
        base = torch.optim.SGD([{"params": [one, other]}], lr=0.5, momentum=0.9, weight_decay=0.25, foreach=False)
        base.param_groups[0]["params"] = [one, other] + [one] * (times - 1)  # torch warns where it sees it
        return base

    optimizer, model = wrap(build()), ByHand(wrap, build())
    for step in (0, 1, 3):
        give_gradients([optimizer, model], step)
        model.step()
        optimizer.step()
        assert_same(optimizer, model)
        assert len(optimizer.trust_ratios()) == 2


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"])
@wrappers
def test_a_complex_layer_is_stepped_like_its_real_view(wrap, name, backend):
    generator = torch.Generator().manual_seed(0)
    layer = torch.randn(3, 4, dtype=torch.complex128, generator=generator)
    params = [torch.nn.Parameter(layer), torch.nn.Parameter(torch.view_as_real(layer).clone())]
    optimizers = [wrap(classes()[name]([param], lr=0.1, weight_decay=0.25)) for param in params]
    for _ in range(3):
        params[0].grad = torch.randn(3, 4, dtype=torch.complex128, generator=generator)
        params[1].grad = torch.view_as_real(params[0].grad).clone()
        for optimizer in optimizers:
            optimizer.step()
        compare(torch.view_as_real(params[0].detach()), params[1].detach(), 1e-12, "parameter")
        compare(torch.view_as_real(params[0].grad), params[1].grad, 1e-12, "gradient")


@wrappers
def test_without_any_gradient_nothing_happens(wrap, backend):
    optimizer = wrap(torch.optim.SGD(groups("SGD"), momentum=0.9))
    before, old = hyper_parameters(optimizer), copy.deepcopy(optimizer)
    optimizer.step()
    assert_identical(before, hyper_parameters(optimizer))
    assert_same(optimizer, old, tolerance=0)
    assert optimizer.trust_ratios() == {}


LOW_PRECISION = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize(
    ("wrap", "name", "implementation"),
    of_wrappers(
        [
            pytest.param(name, kind, id=f"{name}-{kind}")
            for name in DENSE
            if name in classes()
            for kind in implementations(name)
        ]
    ),
)
def test_base_follows_the_contract_in_low_precision(wrap, name, implementation, dtype, backend):
    if (name, implementation, dtype) == ("SGD", "fused", torch.bfloat16) and torch.__version__ < "2.14":
        pytest.skip("SGD(fused=True) of torch 2.12 and 2.13 does not update bfloat16 parameters on CPU")
    options = {**BASES[name][0][0], **implementations(name)[implementation]}
    optimizer = wrap(classes()[name](groups(name, dtype), **options))
    model = ByHand(wrap, classes()[name](groups(name, dtype), **options), coupled=is_coupled(name, options))
    for step in range(3):
        give_gradients([optimizer, model], step)
        model.step()
        optimizer.step()
        assert_same(optimizer, model, LOW_PRECISION[dtype])


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        (name, kind)
        for name in DENSE
        if takes(name, "lr") and "Tensor" in str(inspect.signature(classes()[name]).parameters["lr"].annotation)
        for kind in implementations(name)
        if kind != "foreach"  # where a tensor as lr needs capturable=True
    ],
)
@wrappers
def test_lr_may_be_a_tensor(wrap, name, implementation, backend):
    def build():
        with_tensors = [{**group, "lr": torch.tensor(group["lr"], dtype=torch.float64)} for group in groups(name)]
        return classes()[name](with_tensors, **BASES[name][0][0], **implementations(name)[implementation])

    optimizer = wrap(build())
    model = ByHand(wrap, build(), coupled=is_coupled(name, {}))
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(3):
        give_gradients([optimizer, model], step)
        model.step()
        optimizer.step()
        assert_same(optimizer, model)
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
        for group in [*optimizer.param_groups, *model.param_groups]:
            group["lr"].mul_(0.7)


# Sparse gradients.


def sparse_groups(with_dense):
    tables = layers(7, [(10, 3), (8,), (6, 2)])
    (bias,) = layers(8, [(4,)])
    return [
        {"params": tables[:2]},
        {"params": tables[2:], "trust_coef": None},
        *([{"params": [bias], "weight_decay": 0.1}] if with_dense else []),
    ]


def give_sparse_gradients(optimizers, step, coalesced):
    generator = torch.Generator().manual_seed(2000 + step)
    all_params = [[param for group in optimizer.param_groups for param in group["params"]] for optimizer in optimizers]
    for index, params in enumerate(zip(*all_params, strict=True)):
        shape = params[0].shape
        if shape == (4,):
            grad = torch.randn(shape, dtype=torch.float64, generator=generator)
        else:
            rows = torch.randint(shape[0], (0 if (step, index) == (1, 1) else 6,), generator=generator)
            values = torch.randn((len(rows), *shape[1:]), dtype=torch.float64, generator=generator)
            grad = torch.sparse_coo_tensor(rows[None], values, shape)
            grad = grad.coalesce() if coalesced else grad
        for param in params:
            param.grad = grad.clone()


@pytest.mark.parametrize("coalesced", [True, False], ids=["coalesced", "uncoalesced"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"foreach": False, "momentum": 0.9}),
        ("SGD", {"foreach": True, "momentum": 0.9}),
        ("SGD", {"maximize": True}),
        ("Adagrad", {"foreach": False}),
        ("Adagrad", {"foreach": True, "maximize": True}),
        ("SparseAdam", {}),
        ("SparseAdam", {"maximize": True}),
    ],
    ids=label,
)
@wrappers
def test_sparse_gradients_follow_the_contract(wrap, name, options, coalesced, backend):
    def build():
        return classes()[name](sparse_groups(with_dense=name != "SparseAdam"), lr=0.1, **options)

    optimizer, model = wrap(build()), ByHand(wrap, build())
    for step in range(4):
        give_sparse_gradients([optimizer, model], step, coalesced)
        model.step()
        optimizer.step()
        assert_same(optimizer, model)
        assert optimizer.param_groups[0]["params"][0].grad.is_sparse


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize("wrap", [wrap for wrap in WRAPPERS if wrap.cls is LARS], ids=str)
def test_sparse_gradients_with_weight_decay_are_refused_and_nothing_changes(wrap, name, backend):
    param, dense = layers(7, [(10, 3), (4,)])
    optimizer = wrap(classes()[name]([{"params": [dense]}, {"params": [param]}], lr=0.1, weight_decay=0.125))
    before, old = hyper_parameters(optimizer), copy.deepcopy(optimizer)
    param.grad = torch.sparse_coo_tensor([[1, 1]], torch.ones(2, 3, dtype=torch.float64), (10, 3))
    dense.grad = torch.ones_like(dense)
    message = r"need weight_decay=0 \(weight_decay: 0.125\) \(group: 1, parameter: 0, shape: \(10, 3\)\)"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_identical(before, hyper_parameters(optimizer))
    assert torch.equal(dense.grad, torch.ones_like(dense))
    optimizer.zero_grad()
    assert_same(optimizer, old, tolerance=0)


@wrappers
def test_a_base_that_cannot_take_sparse_gradients_says_so(wrap, backend):
    (param,) = layers(7, [(10, 3)])
    optimizer = wrap(torch.optim.AdamW([param], lr=0.1))
    before = hyper_parameters(optimizer)
    param.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3, dtype=torch.float64), (10, 3))
    # LARS says so before anything changes, LAMB leaves it to the base.
    with pytest.raises(
        RuntimeError, match=r"sparse gradients need a base that takes them|Adam does not support sparse"
    ):
        optimizer.step()
    assert_identical(before, hyper_parameters(optimizer))


# What is refused.


@pytest.mark.parametrize("name", [name for name in sorted(BASES) if takes(name, "differentiable")])
@wrappers
def test_differentiable_base_is_refused(wrap, name):
    message = rf"differentiable must be False \(group: 0, got: True\); {wrap.cls.__name__} writes in place"
    with pytest.raises(ValueError, match=message):
        wrap(classes()[name](groups(name), differentiable=True))


@wrappers
def test_differentiable_group_is_refused_when_it_is_added_and_when_it_steps(wrap):
    first, second = layers(0, [(2, 2), (3,)])
    optimizer = wrap(torch.optim.SGD([first], lr=0.1, weight_decay=0.1))
    with pytest.raises(ValueError, match=r"differentiable must be False \(group: 1, got: True\)"):
        optimizer.add_param_group({"params": [second], "differentiable": True})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["differentiable"] = True
    before = hyper_parameters(optimizer)
    with pytest.raises(ValueError, match=r"differentiable must be False \(group: 0, got: True\)"):
        optimizer.step()
    assert_identical(before, hyper_parameters(optimizer))


@pytest.mark.parametrize("name", [name for name in sorted(BASES) if takes(name, "capturable")])
@pytest.mark.parametrize("foreach", [False, True])
@wrappers
def test_capturable_base_without_an_accelerator_is_refused_by_torch(wrap, name, foreach, backend):
    optimizer = wrap(classes()[name](groups(name), capturable=True, foreach=foreach))
    before = hyper_parameters(optimizer)
    old = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    give_gradients([optimizer], 0)
    with pytest.raises((AssertionError, RuntimeError), match="capturable=True"):
        optimizer.step()
    assert_identical(before, hyper_parameters(optimizer))
    assert all(map(torch.equal, old, [param for group in optimizer.param_groups for param in group["params"]]))


def test_weight_decay_that_is_no_number_in_a_tensor_is_refused():
    (param,) = layers(0, [(2, 2)])
    message = r"weight_decay of parameter group . must be a number \(got: a tensor of shape \(1, 2\)"
    optimizer = LARS(torch.optim.SGD([param], lr=0.1, weight_decay=0.1))
    optimizer.param_groups[0]["weight_decay"] = torch.tensor([[0.1, 0.2]])
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    with pytest.raises(TypeError, match=message):
        LARS(optimizer.optim)


# Closures.


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
        compare(loss, expected, 1e-10, "loss")  # it divides by differences of gradients, and so magnifies rounding
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
        compare(optimizer.step(evaluate), expected, 1e-12, "loss")
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
