"""Classes over a base, ``LARS.over(SGD)``: their arguments, their pickles, and that they are let go."""

import copy
import gc
import inspect
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import torchlars
from torchlars import LAMB, LARC, LARS


def layers(n=2):
    """Parameters with gradients, none of which is like another."""
    params = [nn.Parameter(torch.linspace(1, 2 + i, 3 + i, dtype=torch.float64)) for i in range(n)]
    for i, param in enumerate(params):
        param.grad = torch.linspace(-1, 0.5, 3 + i, dtype=torch.float64)
    return params


@pytest.mark.parametrize("wrapper", [LARS, LARC, LAMB])
@pytest.mark.parametrize(
    "base", [torch.optim.SGD, torchlars.optim.SGD, torch.optim.AdamW, torchlars.optim.Adam, torchlars.optim.AdamW]
)
def test_over_makes_a_class_with_the_bases_signature_and_the_wrappers_options(wrapper, base):
    made = wrapper.over(base, trust_coef=0.5)
    assert made is wrapper.over(base, trust_coef=0.5)
    assert made is not wrapper.over(base, trust_coef=0.25)
    assert made is not wrapper.over(base)
    assert issubclass(made, wrapper)
    assert issubclass(made, torch.optim.Optimizer)
    parameters = inspect.signature(made).parameters
    of_base = inspect.signature(base, eval_str=True).parameters
    assert {name: parameters[name] for name in of_base} == dict(of_base)
    of_wrapper = {name: parameters[name].default for name in parameters.keys() - of_base}
    assert of_wrapper.keys() == wrapper.options.keys() & inspect.signature(wrapper).parameters.keys() - of_base.keys()
    assert of_wrapper["trust_coef"] == 0.5
    assert of_wrapper["clip"] == inspect.signature(wrapper).parameters["clip"].default
    assert base.__name__ in made.__name__
    optimizer = made(layers(), 0.125, weight_decay=0.25)
    assert type(optimizer.optim) is base
    assert (optimizer.trust_coef, optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.5, 0.125, 0.25)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LARS.over(layers()), TypeError, r"base must be a class of optimizers, itself no wrapper \(got: \["),
        (
            lambda: LARS.over(nn.Linear),
            TypeError,
            r"base must be a class of optimizers, .* for example LARS.over\(torch",
        ),
        (lambda: LAMB.over(LARS), TypeError, r"base must be a class of optimizers, itself no wrapper .* LAMB.over\("),
        (
            lambda: LARS.over(torch.optim.SGD, lr=0.1),
            TypeError,
            r"LARS has the options eps, .* \(got: lr\); .* LARS.over\(SGD\)\(params,",
        ),
        (
            lambda: LAMB.over(torch.optim.SGD, norm="raw"),
            TypeError,
            r"LAMB has the options trust_coef, eps, clip, always_adapt \(got",
        ),
        (
            lambda: LARC.over(torch.optim.SGD, norm="raw"),
            TypeError,
            r"LARC has the options trust_coef, clip, eps, always_adapt \(",
        ),
        (lambda: LARS.over(torch.optim.SGD, trust_coef=-1), ValueError, r"trust_coef must be a positive number \("),
        (lambda: LARS.over(torch.optim.SGD, clip=1), TypeError, r"clip must be True or False \(got: 1 of type int\)"),
    ],
)
def test_over_refuses_what_it_cannot_make(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_wrappers_options_are_arguments_of_the_class():
    made = LARS.over(torch.optim.SGD, trust_coef=0.5, clip=True)
    params, others = layers(), layers()
    optimizer = made(params, lr=2.0, momentum=0.9, weight_decay=0.25, trust_coef=0.02, norm="decayed")
    expected = LARS(
        torch.optim.SGD(others, lr=2.0, momentum=0.9, weight_decay=0.25), trust_coef=0.02, norm="decayed", clip=True
    )
    assert optimizer.state_dict() == expected.state_dict()
    for one in (optimizer, expected):
        one.step()
    assert all(map(torch.equal, params, others))


def test_a_name_of_both_is_the_bases():
    optimizer = LARS.over(torch.optim.Adam, eps=0.5)(layers(), eps=0.25)
    assert (optimizer.eps, optimizer.optim.defaults["eps"]) == (0.5, 0.25)
    optimizer = LARS.over(torch.optim.SGD, weight_decay="decoupled")(layers(), weight_decay=0.25)
    assert (optimizer.weight_decay, optimizer.optim.defaults["weight_decay"]) == ("decoupled", 0.25)


def test_a_base_that_takes_any_keyword_is_not_given_the_wrappers():
    class Any(torch.optim.SGD):
        def __init__(self, params, **keywords):
            super().__init__(params, **keywords)

    optimizer = LARS.over(Any)(layers(), lr=0.5, trust_coef=0.25)
    assert (optimizer.trust_coef, optimizer.defaults["lr"]) == (0.25, 0.5)
    assert list(inspect.signature(LARS.over(Any)).parameters)[-1] == "keywords"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trust_coef": -1}, ValueError, r"trust_coef must be a positive number \(got: -1\)"),
        ({"norm": "raww"}, ValueError, r"norm must be 'raw' or 'decayed' \(got: 'raww'\)"),
        ({"clipp": True}, TypeError, "unexpected keyword argument 'clipp'"),
    ],
)
def test_a_class_refuses_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LARS.over(torch.optim.SGD)(layers(), lr=0.5, **arguments)


class LARSOfAModule(LARS.over(torch.optim.SGD, trust_coef=0.02)):
    """A class to be found by name."""


def test_a_class_derived_from_one_over_a_base_keeps_its_name_in_copies_and_pickles():
    optimizer = LARSOfAModule([nn.Parameter(torch.ones(2))], lr=0.3)
    optimizer.eps = 0.5
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is LARSOfAModule
        assert (copied.trust_coef, copied.eps, copied.param_groups[0]["lr"]) == (0.02, 0.5, 0.3)
    assert pickle.loads(pickle.dumps(LARSOfAModule)) is LARSOfAModule


def test_nothing_is_over_two_bases():
    with pytest.raises(TypeError, match="LARSOfAModule is over a base already"):
        LARSOfAModule.over(torch.optim.SGD)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("of", ["pickle", "cloudpickle"])
def test_a_class_is_pickled_by_how_it_was_made(of, protocol):
    module = pytest.importorskip(of, reason=f"{of} is not installed")
    classes = [
        LARS.over(torch.optim.SGD),
        LARS.over(torch.optim.SGD, trust_coef=0.02),
        LAMB.over(torchlars.optim.AdamW),
    ]
    for made in classes:
        assert module.loads(module.dumps(made, protocol)) is made
        optimizer = made(layers(), lr=0.5, weight_decay=0.25, trust_coef=0.125)
        copied = module.loads(module.dumps(optimizer, protocol))
        assert type(copied) is made
        assert copied.trust_coef == 0.125
        assert copied.param_groups[0]["weight_decay"] == 0.25
    assert copy.copy(made) is copy.deepcopy(made) is made


def test_a_class_is_the_same_in_another_process():
    made = LARS.over(torch.optim.SGD, trust_coef=0.02)
    code = (
        "import pickle, sys; made, again, optimizer = map(pickle.loads, pickle.load(sys.stdin.buffer)); import torch, torchlars; "
        "assert made is again is type(optimizer) is torchlars.LARS.over(torch.optim.SGD, trust_coef=0.02); "
        "print(made.__name__, optimizer.trust_coef)"
    )
    pickles = [pickle.dumps(one) for one in (made, made, made(layers(), lr=0.5, trust_coef=0.125))]
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(pickles), capture_output=True)
    assert done.stdout.decode().split() == ["LARSOverSGD", "0.125"], done.stderr.decode()


def test_classes_that_nobody_holds_are_let_go():
    class Base(torch.optim.SGD):
        pass

    made = LARS.over(Base)
    optimizer = made(layers(), lr=16.0, weight_decay=0.25)
    optimizer.step()
    name, references = made.__qualname__, [weakref.ref(made), weakref.ref(Base)]
    assert getattr(torchlars.over, name) is made
    del made, optimizer
    gc.collect()
    assert references[0]() is None
    with pytest.raises(AttributeError, match=r"module 'torchlars\.over' has no attribute"):
        getattr(torchlars.over, name)
    del Base
    gc.collect()
    assert references[1]() is None


@pytest.mark.parametrize("wrapper", [LARS, LARC, LAMB])
@pytest.mark.parametrize("base", [torch.optim.SGD, torchlars.optim.SGD, torchlars.optim.AdamW])
def test_parsers_of_command_lines_get_types(wrapper, base):
    """Strings would be of our modules, where parsers do not look for them."""
    annotations = [parameter.annotation for parameter in inspect.signature(wrapper.over(base)).parameters.values()]
    assert not any(isinstance(annotation, str) for annotation in annotations)
    assert bool in annotations


def test_annotations_that_cannot_be_evaluated_are_left_as_they_are():
    class Base(torch.optim.SGD):
        def __init__(self, params: "Unknown", lr: float = 1e-3) -> None:  # noqa: F821
            super().__init__(params, lr)

    assert inspect.signature(LARS.over(Base)).parameters["params"].annotation == "Unknown"


def test_threads_make_classes_at_once():
    """Half of them the same ones, all of one name; they failed while one looked through the classes of another."""

    def make(thread):
        made = []
        for i in range(40):
            base = shared[i] if i % 2 else type("Base", (torch.optim.SGD,), {})
            made.append(LARS.over(base))
            assert getattr(torchlars.over, made[-1].__qualname__) is made[-1]
        return made

    shared = [type("Base", (torch.optim.SGD,), {}) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    for classes in zip(*made, strict=True):
        assert len(set(classes)) in (1, 8)
    every = {cls for classes in made for cls in classes}
    assert len(every) == len({cls.__qualname__ for cls in every}) == 8 * 20 + 20


@pytest.mark.parametrize("wrapper", [LARS, LARC, LARS.over])
def test_the_warning_of_an_unknown_weight_decay_names_the_line_that_constructs(wrapper):
    class Unknown(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "weight_decay": 0.25})

        def step(self, closure=None):
            return None

    make = wrapper(Unknown) if wrapper == LARS.over else lambda params: wrapper(Unknown(params))
    with pytest.warns(UserWarning, match="Unknown does not say whether its weight decay is decoupled") as caught:
        make(layers())
    assert [one.filename for one in caught] == [__file__]
