"""A wrapper is a torch.optim.Optimizer: its groups, state, copies and representation are those of its base."""

import copy
import pickle

import pytest
import torch
from by_hand import EPS, TRUST_COEF, ByHand
from wrapped_networks import BASES, adam, assert_same, loss_of, network, save, train, trained, wrapped

from torchlars import LARS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_is_a_torch_optimizer(wrap):
    optimizer = wrapped(wrap, network())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.optim, torch.optim.SGD)
    assert (optimizer.eps, optimizer.trust_coef) == (EPS, TRUST_COEF)


@pytest.mark.parametrize("name", ["param_groups", "state", "defaults"])
def test_property_is_the_bases_own_and_can_be_assigned(wrap, name):
    optimizer = wrapped(wrap, network())
    assert getattr(optimizer, name) is getattr(optimizer.optim, name)
    replacement = copy.copy(getattr(optimizer, name))
    setattr(optimizer, name, replacement)
    assert getattr(optimizer, name) is replacement
    assert getattr(optimizer.optim, name) is replacement
    assert name not in vars(optimizer)


@pytest.mark.parametrize("load", ["wrapper", "base"])
def test_properties_are_live_after_a_state_dict_was_loaded(wrap, load):
    model, optimizer = trained(wrap)
    old_groups, old_state = optimizer.param_groups, optimizer.state
    state_dict = (optimizer if load == "wrapper" else optimizer.optim).state_dict()
    (optimizer if load == "wrapper" else optimizer.optim).load_state_dict(copy.deepcopy(state_dict))
    assert optimizer.param_groups is optimizer.optim.param_groups is not old_groups
    assert optimizer.state is optimizer.optim.state is not old_state
    optimizer.param_groups[0]["lr"] = 0.0
    old = model[0].weight.detach().clone()
    train(model, optimizer, range(3, 4))
    assert torch.equal(model[0].weight, old)


@pytest.mark.parametrize(
    "name", ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "LBFGS", "NAdam", "RMSprop", "Rprop", "SGD"]
)
def test_it_adds_no_key_to_groups_or_defaults(wrap, name):
    model, other = network(), network()
    options = {"line_search_fn": "strong_wolfe"} if name == "LBFGS" else {}
    plain = getattr(torch.optim, name)(model.parameters(), lr=0.1, **options)
    if name == "LBFGS" and not wrap.consumes_gradients:
        return  # it is refused
    optimizer = wrap(getattr(torch.optim, name)(other.parameters(), lr=0.1, **options))
    copied = pickle.loads(pickle.dumps(optimizer))
    plain = pickle.loads(pickle.dumps(plain))  # where torch adds a key itself
    optimizer.step(lambda: loss_of(other, 0))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.defaults.keys() | {"differentiable"} == plain.defaults.keys() | {"differentiable"}
    assert copied.defaults.keys() == plain.defaults.keys()
    assert [group.keys() for group in optimizer.param_groups] == [group.keys() for group in plain.param_groups]


def test_a_base_without_differentiable_gets_no_such_default():
    optimizer = LARS(torch.optim.LBFGS(network().parameters(), line_search_fn="strong_wolfe"))
    assert "differentiable" not in optimizer.defaults


def test_unknown_attributes_are_not_taken_from_the_base(wrap):
    optimizer = wrapped(wrap, network(), adam, fused=True)
    assert optimizer._step_supports_amp_scaling  # which is the wrapper's own
    optimizer.optim.something = 1
    assert not hasattr(optimizer, "something")
    with pytest.raises(AttributeError, match="something"):
        optimizer.something  # noqa: B018


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_does_what_is_asked(wrap, set_to_none):
    model, optimizer = trained(wrap)
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [param.grad for param in model.parameters()]
    assert all(grad is None if set_to_none else not grad.any() for grad in grads)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_a_group_can_be_added_with_options_of_its_own(wrap, backend):
    model, reference = network(), network()
    optimizer = wrap(torch.optim.SGD(model[0].parameters(), lr=0.1, weight_decay=0.25))

    def more(model):
        own = {"trust_coef": 0.5, "eps": 0.125, "weight_decay": 0.0}
        return [{"params": [model[2].weight], **own}, {"params": [model[2].bias], "trust_coef": None}]

    for group in more(model):
        optimizer.add_param_group(group)
    groups = [{"params": list(reference[0].parameters())}, *more(reference)]
    expected = ByHand(wrap, torch.optim.SGD(groups, lr=0.1, weight_decay=0.25))
    for step in range(2):
        for one in (model, reference):
            one.zero_grad()
            loss_of(one, step).backward()
        optimizer.step()
        expected.step()
        assert_same(model, reference, 1e-14)
    assert model[2].bias not in optimizer.trust_ratios()
    assert len(optimizer.trust_ratios()) == 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0, 0.25]


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"trust_coef": 0}, ValueError, r"trust_coef of parameter group 2 must be a positive number \(got: 0\)"),
        (
            {"trust_coef": "1"},
            TypeError,
            r"trust_coef of parameter group 2 must be a positive number \(got: '1' of type str\)",
        ),
        ({"eps": -1.0}, ValueError, r"eps of parameter group 2 must be a non-negative number \(got: -1.0\)"),
        (
            {"eps": None},
            TypeError,
            r"eps of parameter group 2 must be a non-negative number \(got: None of type NoneType\)",
        ),
    ],
)
def test_a_group_with_a_wrong_option_is_not_added(wrap, option, error, message):
    optimizer = wrapped(wrap, network())
    extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [extra], **option})
    assert len(optimizer.param_groups) == 2


def test_a_group_that_is_no_dict_is_refused_as_torch_refuses_it(wrap):
    with pytest.raises(TypeError, match="param_group must be a dict, but got <class 'list'>"):
        wrapped(wrap, network()).add_param_group([torch.nn.Parameter(torch.ones(2))])


def test_repr_shows_the_options_and_the_base(wrap):
    optimizer = wrapped(wrap, network())
    options = ", ".join(f"{name}={value!r}" for name, value in wrap.own_values.items())
    assert repr(optimizer) == f"{wrap.cls.__name__}({options}, optim={optimizer.optim!r})"
    assert "momentum: 0.9" in repr(optimizer)


@pytest.mark.parametrize("calls", [["train"], ["eval"], ["train", "eval", "train"]])
def test_train_and_eval_are_forwarded_to_a_base_that_has_them(wrap, calls):
    class ScheduleFree(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.told = []

        def train(self):
            self.told.append("train")

        def eval(self):
            self.told.append("eval")

    optimizer = wrap(ScheduleFree(network().parameters(), lr=0.1))
    for call in calls:
        getattr(optimizer, call)()
    assert optimizer.optim.told == calls
    optimizer.train(False)
    assert optimizer.optim.told == [*calls, "eval"]


def test_train_and_eval_do_nothing_over_a_base_that_has_none(wrap):
    optimizer = wrapped(wrap, network())
    assert optimizer.train() is None
    assert optimizer.eval() is None


# Copies.


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: torch.load(save(x), weights_only=False)],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("base", BASES)
def test_a_copy_of_model_and_optimizer_trains_on_alike_and_apart(wrap, how, base, backend):
    model, optimizer = trained(wrap, BASES[base])
    optimizer.param_groups[0]["trust_coef"] = 0.5
    copied_model, copied = how((model, optimizer))
    assert copied.param_groups[0]["params"][0] is next(copied_model.parameters())
    assert (copied.eps, copied.trust_coef) == (EPS, TRUST_COEF)
    old = [param.detach().clone() for param in model.parameters()]
    train(copied_model, copied, range(3, 6))
    assert all(map(torch.equal, old, model.parameters()))
    train(model, optimizer, range(3, 6))
    assert_same(model, copied_model)


def test_a_shallow_copy_shares_the_base(wrap):
    model, optimizer = trained(wrap)
    copied = copy.copy(optimizer)
    assert copied is not optimizer
    assert copied.optim is optimizer.optim
    copied.trust_coef = 0.5
    assert optimizer.trust_coef == TRUST_COEF
    train(model, copied, range(1))


def test_what_a_copy_holds_is_what_the_wrapper_owns(wrap):
    optimizer = wrapped(wrap, network())
    optimizer.step = None
    assert optimizer.__getstate__().keys() == {"optim", *wrap.own_values}
    assert callable(copy.deepcopy(optimizer).step)
