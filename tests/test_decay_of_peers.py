"""LARS keeps the weight decay that an optimizer of another library applies by itself: all of timm and pytorch_optimizer.

Whether it does is measured, not looked up: a class whose step with weight decay λ is its step without, of the gradients
g + λw, has coupled decay, and all others apply theirs by themselves.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from torchlars import LARS

ROOT = Path(__file__).resolve().parent.parent
DECAY = 0.5
TRUST_COEF = 0.02
STEPS = 12
SCALES = (0.01, 10.0)  # of gradients
SHAPES = ([(6, 4), (5,)], [(4, 6), (6, 4)])  # the second for those that take matrices only

#: Which classes do not construct or do not step as (params, lr=0.1, weight_decay=0.5), and why.
WITHOUT = {
    "timm": {
        "Adahessian": "differentiates gradients",
        "Lookahead": "wraps",
    },
    "pytorch_optimizer": {
        **dict.fromkeys(["BaseOptimizer", "MuonBase"], "abstract"),
        **dict.fromkeys(["AdaHessian", "SophiaH"], "differentiates gradients"),
        **dict.fromkeys(["AdaLOMO", "AdamMini", "LOMO"], "takes a model"),
        **dict.fromkeys(["BSAM", "FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM"], "wraps"),
        **dict.fromkeys(["Lookahead", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper"], "wraps"),
        "AliG": "needs a closure",
        "DeMo": "needs einops",
        "DistributedMuon": "needs a process group",
        "Ranger21": "needs num_iterations",
        "TRAC": "wraps",
    },
}


@pytest.fixture(params=["timm", "pytorch_optimizer"])
def classes(request, monkeypatch):
    """All optimizer classes of a library, by name."""
    spec = importlib.util.find_spec(request.param)
    if spec is None:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.syspath_prepend(str(ROOT))
    load = importlib.import_module
    if request.param == "timm":  # its parents import torchvision
        load = load("benchmarks.step_time.contestants").import_alone
        folder = [f"{path}/optim" for path in spec.submodule_search_locations]
        found = [f"timm.optim.{module.name}" for module in pkgutil.iter_modules(folder)]
        names = [name for name in found if "._" not in name and "factory" not in name]
    else:
        names = [module.name for module in pkgutil.walk_packages(spec.submodule_search_locations, "pytorch_optimizer.")]
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in map(load, names):
            for value in vars(module).values():
                is_optimizer = inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
                if is_optimizer and value.__module__.startswith(f"{request.param}."):
                    found[value.__name__] = value
    assert len(found) > 20
    return request.param, found


class Problem:
    """Layers and gradients of one scale, and what one optimizer makes of them."""

    def __init__(self, cls, shapes, dtype, **hyper):
        self.cls = cls
        self.shapes = shapes
        self.dtype = dtype
        self.hyper = hyper
        self.is_muon = cls.__module__.startswith("pytorch_optimizer.optimizer.muon.")

    def construct(self, params, weight_decay):
        if self.is_muon:
            params = [{"params": params[:1], "use_muon": True}, {"params": params[1:], "use_muon": False}]
        torch.manual_seed(1)
        return self.cls(params, lr=0.1, weight_decay=weight_decay, **self.hyper)

    def run(self, scale, weight_decay, grad_of=lambda w, g: g.clone(), wrap=lambda base: base):
        """Return the layers after each step."""
        random = torch.Generator().manual_seed(3)
        params = [nn.Parameter(start) for start in self.start()]
        grads = [
            [scale * torch.randn(shape, generator=random).to(self.dtype) for shape in self.shapes] for _ in range(STEPS)
        ]
        optimizer = wrap(self.construct(params, weight_decay))
        torch.manual_seed(2)
        after = []
        for step in range(STEPS):
            for param, grad in zip(params, grads[step], strict=True):
                param.grad = grad_of(param.detach(), grad)
            optimizer.step()
            after += [param.detach().clone() for param in params]
        return after

    def same(self, one, other):
        """Whether two runs went the same way, but for rounding. Muons round to bfloat16, and amplify that."""
        tolerance = 0.1 if self.is_muon else 1e-6 if self.dtype == torch.float64 else 1e-4
        starts = [*self.start(), *other]
        return all(
            (a - b).norm() <= tolerance * (b - before).norm() + 1e-12
            for a, b, before in zip(one, other, starts[: len(other)], strict=True)
        )

    def is_coupled(self, scale):
        """Whether decay is the same as if it was in the gradients, and whether the first step does not tell the two apart."""
        decayed, plain = self.run(scale, DECAY), self.run(scale, 0.0)
        coupled = self.same(decayed, self.run(scale, 0.0, lambda w, g: g + DECAY * w))
        first = decayed[0] - plain[0]
        start = self.start()[0]
        shrinks = torch.allclose(first, (first * start).sum() / start.square().sum() * start, rtol=1e-4, atol=1e-9)
        return coupled, coupled and shrinks

    def start(self):
        random = torch.Generator().manual_seed(0)
        return [3 * torch.randn(shape, generator=random).to(self.dtype) for shape in self.shapes]


def ratio(w, g, weight_decay):
    return TRUST_COEF * w.norm() / (g.norm() + weight_decay * w.norm() + 1e-8)


def kept(w, g):
    """The gradient that a base gets which keeps its decay."""
    return ratio(w, g, 0) * g


def taken(w, g):
    """The gradient that a base gets whose decay LARS takes over."""
    return ratio(w, g, DECAY) * (g + DECAY * w)


def problem_of(cls):
    """The first problem that a class can work on."""
    for dtype in (torch.float64, torch.float32):
        for shapes in SHAPES:
            problem = Problem(cls, shapes, dtype)
            try:
                problem.run(1.0, DECAY)
                problem.run(1.0, 0.0)
            except Exception as error:
                first = error
            else:
                return problem
    raise first


def fate_of_decay(cls):
    """What decay a class has, what becomes of it under LARS, and whether LARS warns."""
    problem = problem_of(cls)
    kinds = [problem.is_coupled(scale) for scale in SCALES]
    momentum = inspect.signature(cls.__init__).parameters.get("momentum")
    if all(ambiguous for _, ambiguous in kinds) and momentum is not None:  # as that of SGD without momentum
        problem = Problem(cls, problem.shapes, problem.dtype, momentum=0.9)
        kinds = [problem.is_coupled(scale) for scale in SCALES]
    coupled = all(is_coupled for is_coupled, _ in kinds)
    is_kept = is_taken = True
    for scale in SCALES:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            ours = problem.run(scale, DECAY, wrap=partial(LARS, trust_coef=TRUST_COEF))
        is_kept = is_kept and problem.same(ours, problem.run(scale, DECAY, kept))
        is_taken = is_taken and problem.same(ours, problem.run(scale, 0.0, taken))
    warns = any("does not say whether its weight decay is decoupled" in str(warning.message) for warning in warned)
    return "coupled" if coupled else "own", is_kept, is_taken, warns


@pytest.mark.filterwarnings("ignore")
def test_all_keep_their_decay(classes):
    """LARS took the decay of four in five: timm's Lion and NAdamW, pytorch_optimizer's AdaBelief, Lion, SOAP, ...

    Most say that theirs is decoupled, in six ways, and some say nothing. After 12 steps with gradients of two sizes,
    the weights must be those of the class alone, with all of its decay, from gradients times trust ratios of λ = 0. If
    its decay goes through the gradient, LARS takes it over. Of what LARS does not know it must warn.
    """
    library, found = classes
    wrong, cannot = [], {}
    for name, cls in sorted(found.items()):
        try:
            problem_of(cls)
        except Exception as error:
            cannot[name] = error
            continue
        kind, is_kept, is_taken, warns = fate_of_decay(cls)
        if not (is_taken if kind == "coupled" else is_kept) and not warns:
            wrong.append((name, kind, "kept" if is_kept else "taken" if is_taken else "neither"))
    assert wrong == []
    assert {name: error for name, error in cannot.items() if name not in WITHOUT[library]} == {}


def test_wrappers_keep_the_decay_of_what_they_wrap(classes):
    """Lookahead and its like keep their base under several names, and some borrow groups that say nothing."""
    library, found = classes
    wrappers = {
        "timm": {"Lookahead": lambda cls, base: cls(base)},
        "pytorch_optimizer": {
            "Lookahead": lambda cls, base: cls(base),
            "OrthoGrad": lambda cls, base: cls(base),
            "ScheduleFreeWrapper": lambda cls, base: cls(base),
            "TRAC": lambda cls, base: cls(base),
            "SAM": lambda cls, base: cls(base.param_groups, type(base), lr=0.1, weight_decay=DECAY),
        },
    }
    inner = found["NAdamW" if library == "timm" else "SOAP"]
    for name, wrap in wrappers[library].items():
        param = nn.Parameter(torch.full((2, 3), 2.0))
        base = wrap(found[name], inner([param], lr=0.1, weight_decay=DECAY))
        assert LARS(base).plan(False).adaptations[0].is_decoupled, name
