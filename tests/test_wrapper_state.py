"""State dicts and distributed checkpoints of wrappers."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from by_hand import EPS, TRUST_COEF
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.optim import SGD
from wrapped_networks import (
    BASES,
    adam,
    assert_same,
    assert_same_state_dict,
    network,
    save,
    sgd,
    train,
    trained,
    wrapped,
)

from torchlars import LARS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("base", BASES)
def test_training_goes_on_from_a_state_dict_that_was_saved_and_loaded_with_weights_only(wrap, base, backend):
    model, optimizer = trained(wrap, BASES[base])
    file = save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    loaded = torch.load(file, weights_only=True)
    other = network(seed=1)
    resumed = wrap.cls(BASES[base](other))
    other.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    assert (resumed.eps, resumed.trust_coef) == (EPS, TRUST_COEF)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(model, other)


@pytest.mark.parametrize("base", BASES)
def test_the_state_dict_is_the_bases_with_one_key_of_plain_numbers_more(wrap, base):
    _, optimizer = trained(wrap, BASES[base])
    state_dict, plain = optimizer.state_dict(), optimizer.optim.state_dict()
    own = state_dict.pop(wrap.key)
    assert own == wrap.own_values
    assert all(type(value) in (float, bool, str, type(None)) for value in own.values())
    assert state_dict.keys() == plain.keys()
    assert state_dict["param_groups"] == plain["param_groups"]
    assert state_dict["state"].keys() == plain["state"].keys()


@pytest.mark.parametrize("value", [1, torch.tensor(0.5).numpy()[()], True])
def test_options_in_a_state_dict_are_plain_floats_whatever_was_assigned(wrap, value):
    optimizer = wrapped(wrap, network())
    optimizer.trust_coef = value
    if value is True:
        with pytest.raises(TypeError, match="trust_coef must be a positive number"):
            optimizer.state_dict()
    else:
        assert type(optimizer.state_dict()[wrap.key]["trust_coef"]) is float


@pytest.mark.parametrize("base", BASES)
def test_a_state_dict_of_the_plain_base_or_of_torchlars_0_1_2_loads_and_training_goes_on(wrap, base, backend):
    model, reference = network(), network()
    plain, expected = BASES[base](model), wrapped(wrap, reference, BASES[base])
    train(model, plain, range(3))
    train(reference, expected.optim, range(3))
    file = save(plain.state_dict())  # torchlars 0.1.2 returned just that: its state_dict was the base's
    resumed = wrapped(wrap, model, BASES[base])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.eps, resumed.trust_coef) == (EPS, TRUST_COEF)
    train(model, resumed, range(3, 6))
    train(reference, expected, range(3, 6))
    assert_same(model, reference)


@pytest.mark.parametrize("base", BASES)
def test_the_wrappers_state_dict_loads_into_the_plain_base_and_training_goes_on(wrap, base, backend):
    model, optimizer = trained(wrap, BASES[base])
    other = copy.deepcopy(model)
    plain = BASES[base](other)
    plain.load_state_dict(torch.load(save(optimizer.state_dict()), weights_only=True))
    train(model, optimizer.optim, range(3, 6))
    train(other, plain, range(3, 6))
    assert_same(model, other)


def test_options_of_a_group_travel_with_the_state_dict(wrap):
    _, optimizer = trained(wrap)
    optimizer.param_groups[0].update(trust_coef=None)
    optimizer.param_groups[1].update(trust_coef=0.5, eps=0.25)
    resumed = wrapped(wrap, network())
    resumed.load_state_dict(torch.load(save(optimizer.state_dict()), weights_only=True))
    assert resumed.param_groups[0]["trust_coef"] is None
    assert (resumed.param_groups[1]["trust_coef"], resumed.param_groups[1]["eps"]) == (0.5, 0.25)


def test_options_of_a_group_stay_when_the_state_dict_says_nothing_of_them(wrap):
    model = network()
    optimizer = wrapped(wrap, model)
    optimizer.param_groups[0].update(trust_coef=None)
    optimizer.param_groups[1].update(eps=0.25)
    optimizer.load_state_dict(sgd(network(), lr=0.125).state_dict())
    assert optimizer.param_groups[0]["trust_coef"] is None
    assert "eps" not in optimizer.param_groups[0]
    assert optimizer.param_groups[1]["eps"] == 0.25
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_eps_of_a_group_of_adam_is_adams_also_after_loading(wrap):
    model = network()
    optimizer = wrapped(wrap, model, adam, eps=1e-3)
    state_dict = adam(network(), eps=1e-5).state_dict()
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["eps"] == 1e-5
    assert optimizer.eps == EPS


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (None, TypeError, r"state_dict\['lars'\] must be a dict of options \(got: NoneType\)"),
        ([0.1], TypeError, r"state_dict\['lars'\] must be a dict of options \(got: list\)"),
        ({"eta": 0.1}, ValueError, r"state_dict\['lars'\] must hold .*trust_coef.* \(got: eta\)"),
        ({1: 0.1, "eps": 0.1}, ValueError, r"state_dict\['lars'\] must hold .*trust_coef.* \(got: 1\)"),
        ({"eps": -1.0}, ValueError, r"state_dict\['lars'\]\['eps'\] must be a non-negative number \(got: -1.0\)"),
        (
            {"eps": "0"},
            TypeError,
            r"state_dict\['lars'\]\['eps'\] must be a non-negative number \(got: '0' of type str",
        ),
        ({"trust_coef": math.nan}, ValueError, r"\['trust_coef'\] must be a positive number \(got: nan\)"),
        (
            {"eps": 0.5, "trust_coef": None},
            TypeError,
            r"\['trust_coef'\] must be a positive number \(got: None of type",
        ),
        ({"trust_coef": True}, TypeError, r"\['trust_coef'\] must be a positive number \(got: True of type bool\)"),
        ({"trust_coef": torch.tensor(1.0)}, TypeError, r"\['trust_coef'\] must be a positive number \(got: tensor"),
    ],
)
def test_a_state_dict_with_a_wrong_entry_is_refused_and_nothing_is_loaded(wrap, entry, error, message):
    _, source = trained(wrap, steps=2)
    _, optimizer = trained(wrap)
    before = copy.deepcopy(optimizer.state_dict())
    loaded = []
    optimizer.optim.register_load_state_dict_pre_hook(lambda *_: loaded.append(None))
    with pytest.raises(error, match=message.replace("'lars'", repr(wrap.key))):
        optimizer.load_state_dict({**source.state_dict(), wrap.key: entry})
    assert not loaded
    assert_same_state_dict(optimizer.state_dict(), before)


def test_a_state_dict_that_the_base_refuses_leaves_the_options_as_they_were(wrap):
    optimizer = wrapped(wrap, network())
    wrong = wrap(torch.optim.SGD(network().parameters(), lr=0.1), trust_coef=0.75).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(wrong)
    assert optimizer.trust_coef == TRUST_COEF


def test_keys_that_groups_keep_are_checked_with_what_is_loaded():
    """A loaded entry may contradict a key of a group, of which the state dict says nothing."""
    model = network()
    optimizer = LARS(sgd(model), eps=EPS)
    optimizer.param_groups[1]["apply_to"] = "update"
    state_dict = LARS(sgd(network()), lr_in_momentum=True, trust_coef=0.5).state_dict()
    with pytest.raises(ValueError, match=r"^lr_in_momentum=True of parameter group 1 needs apply_to='gradient'"):
        optimizer.load_state_dict(state_dict)
    assert (optimizer.lr_in_momentum, optimizer.trust_coef, optimizer.eps) == (False, 0.001, EPS)
    assert optimizer.param_groups[1]["apply_to"] == "update"


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("base", BASES)
def test_state_dict_functions_of_distributed_checkpoint_resume_training(wrap, base, flatten, backend):
    options = dcp_state_dict.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = trained(wrap, BASES[base])
    state_dict = copy.deepcopy(dcp_state_dict.get_optimizer_state_dict(model, optimizer, options=options))
    other = network(seed=1)
    other.load_state_dict(model.state_dict())
    resumed = wrapped(wrap, other, BASES[base])
    dcp_state_dict.set_optimizer_state_dict(other, resumed, state_dict, options=options)
    assert_same(model, other)  # it takes a step on its own, with lr 0
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(model, other)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_state_dict_functions_exchange_with_the_plain_base(wrap, flatten, backend):
    options = dcp_state_dict.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = trained(wrap)
    state_dicts = [
        dcp_state_dict.get_optimizer_state_dict(model, one, options=options) for one in (optimizer, optimizer.optim)
    ]
    assert state_dicts[0].keys() == state_dicts[1].keys()
    for state_dict, into_plain in zip(state_dicts, (True, False), strict=True):
        reference, expected = copy.deepcopy((model, optimizer))
        other = copy.deepcopy(model)
        target = sgd(other) if into_plain else wrapped(wrap, other)
        dcp_state_dict.set_optimizer_state_dict(other, target, copy.deepcopy(state_dict), options=options)
        train(other, target, range(3, 6))
        train(reference, expected.optim if into_plain else expected, range(3, 6))
        assert_same(other, reference)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoint_saves_and_loads_and_training_goes_on(wrap, flatten, process_group, tmp_path):
    options = dcp_state_dict.StateDictOptions(flatten_optimizer_state_dict=flatten)

    def state(model, optimizer):
        return {
            "model": dcp_state_dict.get_model_state_dict(model),
            "optimizer": dcp_state_dict.get_optimizer_state_dict(model, optimizer, options=options),
        }

    model, optimizer = trained(wrap)
    dcp.save(state(model, optimizer), checkpoint_id=tmp_path)
    other = network(seed=1)
    resumed = wrapped(wrap, other)
    loaded = state(other, resumed)
    dcp.load(loaded, checkpoint_id=tmp_path)
    dcp_state_dict.set_model_state_dict(other, loaded["model"])
    dcp_state_dict.set_optimizer_state_dict(other, resumed, loaded["optimizer"], options=options)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(model, other)


def test_distributed_checkpoint_keeps_all_keys_of_groups_but_not_the_options_of_the_constructor(
    wrap, process_group, tmp_path
):
    """An opt-out (None) or a value of one group comes back; eps and trust_coef of the wrapper stay the resumed one's."""

    def state(model, optimizer):
        return dict(zip(("model", "optimizer"), dcp_state_dict.get_state_dict(model, optimizer), strict=True))

    model, optimizer = trained(wrap)
    optimizer.param_groups[0]["trust_coef"], optimizer.param_groups[1]["trust_coef"] = None, 0.25
    dcp.save(state(model, optimizer), checkpoint_id=tmp_path)
    other = network(seed=1)
    resumed = wrap.cls(sgd(other), eps=0.5, trust_coef=0.75)
    for group in resumed.param_groups:
        group["trust_coef"] = 0.125
    loaded = state(other, resumed)
    dcp.load(loaded, checkpoint_id=tmp_path)
    dcp_state_dict.set_state_dict(
        other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    assert [group["trust_coef"] for group in resumed.param_groups] == [None, 0.25]
    assert (resumed.eps, resumed.trust_coef) == (0.5, 0.75)


def test_distributed_checkpoint_takes_the_optimizer_itself_with_its_options(wrap, process_group, tmp_path):
    model, optimizer = trained(wrap)
    dcp.save({"optimizer": optimizer}, checkpoint_id=tmp_path)
    other = network()
    resumed = wrap.cls(sgd(other))
    train(other, resumed, range(1))  # what is not there cannot be loaded
    other.load_state_dict(model.state_dict())
    dcp.load({"optimizer": resumed}, checkpoint_id=tmp_path)
    assert (resumed.eps, resumed.trust_coef) == (EPS, TRUST_COEF)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(model, other)


def test_a_pickle_without_an_option_of_today_steps(wrap):
    """Those of versions before ``always_adapt`` have none."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = wrap(SGD([param], lr=0.1))
    state = optimizer.__getstate__()
    del state["always_adapt"]
    old = type(optimizer).__new__(type(optimizer))
    old.__setstate__(state)
    old.step()
    assert old.state_dict()[type(optimizer).state_key]["always_adapt"] is True


def test_parameters_that_left_a_group_are_not_kept_alive(wrap):
    optimizer = wrap(SGD([nn.Parameter(torch.ones(3))], lr=0.1))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    optimizer._last_step.clear()
    optimizer._zero_layers = None
    left = weakref.ref(optimizer.param_groups[0]["params"][0])
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(2))]
    optimizer.state.clear()
    gc.collect()
    assert left() is None


def test_an_option_that_every_group_overrides_is_not_read():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = LARS(SGD([{"params": [param], "trust_coef": 0.5}], lr=0.1))
    optimizer.trust_coef = None
    optimizer.step()
    assert len(optimizer.trust_ratios()) == 1
