"""Reading parameter groups, and again only those that have changed."""

from functools import partial

import pytest
import torch

import torchlars
from torchlars import LAMB, LARS
from torchlars.options import GroupReader


class Reads:
    """A reader of groups that counts."""

    def __init__(self, needs_lr=True):
        self.reader = GroupReader(lambda result: needs_lr)
        self.context, self.read_groups = [0.5], []

    def __call__(self, groups):
        self.read_groups.clear()
        results = self.reader.read(groups, self.read, lambda: list(self.context))
        return results, list(self.read_groups)

    def read(self, index, group):
        self.read_groups.append(index)
        if group.get("lr") == "bad":
            raise ValueError("bad")
        return index, dict(group)


def groups_of(count=3):
    return [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5 + i, "nesterov": False} for i in range(count)]


def test_groups_that_have_not_changed_are_not_read_again(extension):
    reads, groups = Reads(), groups_of()
    first, read = reads(groups)
    assert read == [0, 1, 2]
    again, read = reads(groups)
    assert (again is first, read) == (True, [])
    groups[1]["params"] = []  # is not what is read
    assert reads(groups) == (first, [])


CHANGES = {
    "a value": lambda group: group.update(lr=0.75),
    "an equal value of another type": lambda group: group.update(nesterov=0),
    "a new key": lambda group: group.update(momentum=0.9),
    "a key less": lambda group: group.pop("nesterov"),
    "the order": lambda group: group.update(lr=group.pop("lr")),
    "another key for the same value": lambda group: group.update(clip=group.pop("nesterov")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_group_that_has_changed_is_read_again(extension, change):
    reads, groups = Reads(), groups_of()
    reads(groups)
    change(groups[1])
    results, read = reads(groups)
    assert results[1] == (1, groups[1])
    assert read == [1]
    assert reads(groups)[1] == []


def test_another_dict_with_the_same_values_is_read_again(extension):
    reads, groups = Reads(), groups_of()
    reads(groups)
    groups[2] = dict(groups[2])
    assert reads(groups)[1] == [2]
    assert reads(groups[::-1])[1] == [0, 2]
    results, read = reads([*groups[::-1], *groups_of(1)])
    assert (len(results), read) == (4, [3])
    results, read = reads(groups[::-1][:1])
    assert (results, read) == ([(0, groups[2])], [])


def test_another_context_has_all_read_again(extension):
    reads, groups = Reads(), groups_of()
    reads(groups)
    reads.context = [0.25]
    assert reads(groups)[1] == [0, 1, 2]
    reads.context = [0.25, None]
    assert reads(groups)[1] == [0, 1, 2]


@pytest.mark.parametrize("value", [torch.tensor(0.5), [0.9, 0.999], {"a": 1}], ids=str)
def test_values_that_can_change_in_place_are_read_every_time(extension, value):
    reads, groups = Reads(), groups_of()
    groups[1]["lr" if isinstance(value, torch.Tensor) else "betas"] = value
    reads(groups)
    assert reads(groups)[1] == [1]


def test_an_ellipsis_is_a_value_like_others(extension):
    reads, groups = Reads(), groups_of()
    groups[1]["nesterov"] = ...
    reads(groups)
    groups[1]["nesterov"] = False
    results, read = reads(groups)
    assert (results[1], read) == ((1, groups[1]), [1])


def test_a_tensor_in_the_defaults_is_read_every_time():
    """A group without a key takes the base's default, which may be a tensor that changes in place."""
    momentum = torch.tensor(0.5)
    optimizer = torchlars.optim.SGD(groups_of(1), lr=0.1, momentum=momentum)
    (param,) = optimizer.param_groups[0]["params"]
    del optimizer.param_groups[0]["momentum"]
    for value, expected in ((0.5, 1.0), (0.5, 1.5), (0.25, 1.375)):
        momentum.fill_(value)
        param.grad = torch.ones(2)
        optimizer.step()
        assert optimizer.state[param]["momentum_buffer"].tolist() == [expected] * 2


@pytest.mark.parametrize("lr", [0.75, torch.tensor(0.5)], ids=str)
def test_an_lr_that_is_not_needed_may_change(extension, lr):
    reads, groups = Reads(needs_lr=False), groups_of()
    first, _ = reads(groups)
    groups[1]["lr"] = lr
    assert reads(groups) == (first, [])
    groups[1]["nesterov"] = True
    assert reads(groups)[1] == [1]
    assert reads(groups)[1] == []


def test_groups_that_could_not_all_be_read_are_read_again(extension):
    reads, groups = Reads(), groups_of()
    reads(groups)
    groups[0]["lr"], groups[1]["lr"] = 0.25, "bad"
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            reads(groups)
    groups[1]["lr"] = 1.5
    results, read = reads(groups)
    assert read == [0, 1]
    assert results == [(i, group) for i, group in enumerate(groups)]


def test_a_group_that_changes_while_it_is_read_is_read_again(extension):
    reads, groups = Reads(), groups_of()
    read = reads.read

    def is_interrupted(index, group):
        result = read(index, group)
        group["lr"] = 7.0  # by a signal handler
        return result

    reads.read = is_interrupted
    reads(groups[:1])
    reads.read = read
    assert reads(groups[:1]) == ([(0, groups[0])], [0])


def test_a_subclass_of_dict_is_read_every_time(extension):
    class Computes(dict):
        def __getitem__(self, key):
            return 2 * super().__getitem__(key) if key == "lr" else super().__getitem__(key)

    reads, groups = Reads(), groups_of(2)
    groups[1] = Computes(groups[1])
    reads(groups)
    assert reads(groups)[1] == [1]


@pytest.mark.parametrize("kind", ["LarsLayers", "SgdLayers"])
def test_the_fast_path_refuses_groups_without_parameters_or_options(extension, kind):
    layers, state = getattr(extension, kind)(), [{}] * (kind == "SgdLayers")
    options = getattr(extension, kind.replace("Layers", "Options"))()
    with pytest.raises(TypeError, match="expected the options of each group"):
        layers.add([({"params": []}, None)], *state)
    with pytest.raises(KeyError, match="params"):
        layers.add([({}, options)], *state)


def test_groups_that_are_no_list_are_read_every_time():
    reads, groups = Reads(), tuple(groups_of())
    reads(groups)
    assert reads(groups)[1] == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrap", "is_needed"),
    [
        (LARS, False),
        (partial(LARS, apply_to="update"), False),
        (partial(LARS, clip=True), True),
        (partial(LARS, lr_in_momentum=True), True),
        (LAMB, True),
    ],
    ids=["LARS", "LARS-update", "clip", "lr_in_momentum", "LAMB"],
)
def test_a_schedulers_lr_is_read_where_it_is_needed(extension, wrap, is_needed):
    optimizer = wrap(torch.optim.SGD(groups_of(), lr=0.5, momentum=0.9))
    plan = optimizer.plan(False)
    assert optimizer.plan(False) is plan
    optimizer.param_groups[1]["lr"] = 0.25
    assert (optimizer.plan(False) is not plan) == is_needed
    assert not is_needed or optimizer.plan(False).adaptations[1].lr == 0.25
