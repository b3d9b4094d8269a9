"""Every class of torch.optim as a base: its options, implementations, groups and gradients."""

import inspect

import pytest
import torch
from by_hand import WRAPPERS
from closeness import close

lars, lamb, lars_on_updates = WRAPPERS

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
            close(p.detach(), q.detach(), tolerance, where)
            assert (p.grad is None) == (q.grad is None), where
            if p.grad is not None:
                close(p.grad, q.grad, tolerance, f"gradient of {where}")
            ours_state, theirs_state = tensors(ours.state[p]), tensors(theirs.state[q])
            assert len(ours_state) == len(theirs_state), where
            for a, b in zip(ours_state, theirs_state, strict=True):
                close(a, b, tolerance, f"state of {where}")
