"""Every class of torch.optim as a base gives the numbers of the formulas, under every wrapper.

The oracle is a second, plain instance of the same class, whose steps are corrected by hand: see tests/by_hand.py.
"""

import copy
import inspect

import pytest
import torch
from bases import BASES, DENSE, assert_same, cases, classes, groups, implementations, label, layers, of_wrappers, takes
from by_hand import WRAPPERS, ByHand, wrappers
from closeness import close
from optimizers import assert_identical, change_lr, hyper_parameters

from torchlars import LARS

pytestmark = [
    pytest.mark.usefixtures("one_thread", "checked_sparse_tensors"),
    pytest.mark.filterwarnings("ignore:a layer whose weights are all 0:UserWarning"),  # they are, on purpose
]
ALWAYS_DECOUPLED = {"AdamW", "Muon", "Adafactor"}


def is_coupled(name, options):
    return name not in ALWAYS_DECOUPLED and not options.get("decoupled_weight_decay", False)


def give_gradients(optimizers, step):
    """Fresh gradients, the same for all; one of zero, and one that is missing in a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    all_params = [[param for group in optimizer.param_groups for param in group["params"]] for optimizer in optimizers]
    for index, params in enumerate(zip(*all_params, strict=True)):
        grad = torch.randn(params[0].shape, dtype=torch.float64, generator=generator).to(params[0].dtype)
        for param in params:
            param.grad = None if (step, index) == (2, 1) else grad.clone() * (0 if (step, index) == (1, 0) else 1)


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
        close(torch.view_as_real(params[0].detach()), params[1].detach(), 1e-12, "parameter")
        close(torch.view_as_real(params[0].grad), params[1].grad, 1e-12, "gradient")


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
