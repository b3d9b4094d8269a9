"""Every dialect of LARS against numbers worked by hand and against formulas, and the classes LARC and LAMB."""

import copy
import io
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
from by_hand import EPS, TRUST_COEF
from dialects import Oracle, give_gradients, groups, layers, norm
from optimizers import assert_identical, change_lr, hyper_parameters, params_of
from torch import nn

import torchlars
from torchlars import LAMB, LARC, LARS, ops

pytestmark = pytest.mark.usefixtures("one_thread")


SGDS = {"torch": torch.optim.SGD, "torchlars": torchlars.optim.SGD}
sgds = pytest.mark.parametrize("sgd", SGDS.values(), ids=list(SGDS))


# By hand: ‖w‖ = 5, ‖g‖ = 0.5, g + λw = (0.6, 0), g − λw = (0, −0.8).

W, G, DECAY = [3.0, 4.0], [0.3, -0.4], 0.1


def hand_made(wrap, sgd=torch.optim.SGD, lr=0.5, weight=W, grad=G, **options):
    param = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    param.grad = torch.tensor(grad, dtype=torch.float64)
    optimizer = wrap(sgd([param], lr=lr, weight_decay=DECAY, **options))
    optimizer.step()
    (ratio,) = optimizer.trust_ratios().values()
    return ratio.item(), param.detach().tolist()


BY_HAND = {
    # r = 0.06 · 5 / (0.5 + 0.1 · 5) = 0.3
    "raw": ({}, {}, 0.3, [2.91, 4.0]),
    # r = 0.06 · 5 / 0.6 = 0.5
    "decayed": ({"norm": "decayed"}, {}, 0.5, [2.85, 4.0]),
    # r = 0.06 · 5 / 0.8 = 0.375 of an ascent along (0, 0.8)
    "decayed, maximize": ({"norm": "decayed"}, {"maximize": True}, 0.375, [3.0, 3.85]),
    "raw, maximize": ({}, {"maximize": True}, 0.3, [3.0, 3.88]),
    # min(0.3 / 0.5, 1) and min(0.3 / 0.2, 1)
    "clip, below": ({"clip": True}, {}, 0.6, [2.82, 4.0]),
    "clip, above": ({"clip": True}, {"lr": 0.2}, 1.0, [2.88, 4.0]),
    "clip, decayed": ({"clip": True, "norm": "decayed"}, {"lr": 0.625}, 0.8, [2.7, 4.0]),
    "clip, lr in a tensor": ({"clip": True}, {"lr": torch.tensor(0.5)}, 0.6, [2.82, 4.0]),
    "clip, lr 0 in a tensor": ({"clip": True}, {"lr": torch.tensor(0.0)}, 1.0, [3.0, 4.0]),
    # A zero layer's ratio of 1 is clipped, too: min(1 / 2, 1) and min(1 / 0.5, 1)
    "clip, zero layer": ({"clip": True}, {"lr": 2.0, "weight": [0.0, 0.0]}, 0.5, [-0.3, 0.4]),
    "clip, zero layer, small lr": ({"clip": True}, {"weight": [0.0, 0.0]}, 1.0, [-0.15, 0.2]),
    "clip, zero gradient": ({"clip": True}, {"lr": 2.0, "grad": [0.0, 0.0]}, 0.5, [2.7, 3.6]),
    "decayed, zero gradient": ({"norm": "decayed"}, {"grad": [0.0, 0.0]}, 0.6, [2.91, 3.88]),
    "decayed, gradient that the decay cancels": (
        {"norm": "decayed"},
        {"weight": [2.0, 4.0], "grad": [-0.2, -0.4]},
        1.0,
        [2.0, 4.0],
    ),
    "lr in momentum": ({"lr_in_momentum": True}, {}, 0.3, [2.91, 4.0]),
    "update": ({"apply_to": "update"}, {}, 0.3, [2.91, 4.0]),
    "update, clip": ({"apply_to": "update", "clip": True}, {}, 0.6, [2.82, 4.0]),
    "update, decayed": ({"apply_to": "update", "norm": "decayed"}, {}, 0.5, [2.85, 4.0]),
    # λ = 0 for us, all of it for the base: r = 0.06 · 5 / 0.5 = 0.6, and then r·g + λw
    "decoupled": ({"weight_decay": "decoupled"}, {}, 0.6, [2.76, 3.92]),
}


# Without weight decay r = 1, or 0.03 · 5 / 0.5 = 0.3 where layers are always adapted.
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dialect", [{}, {"clip": True}, {"apply_to": "update"}, {"lr_in_momentum": True}], ids=str)
@pytest.mark.parametrize("wrap", [partial(LARS, eps=0.0, trust_coef=0.03), partial(LARC, eps=0.0, trust_coef=0.03)])
@sgds
def test_layers_without_weight_decay_that_are_not_always_adapted(sgd, wrap, dialect, weight_decay, backend):
    if wrap.func is LARC:
        dialect = {"clip": dialect.get("clip", False)}

    def step_of(options, **keys):
        param = nn.Parameter(torch.tensor(W, dtype=torch.float64))
        param.grad = torch.tensor(G, dtype=torch.float64)
        optimizer = wrap(sgd([{"params": [param], **keys}], lr=0.5, weight_decay=weight_decay), **dialect, **options)
        assert optimizer.state_dict()["lars"]["always_adapt"] is options.get("always_adapt", True)
        optimizer.step()
        return param.detach().tolist(), [ratio.item() for ratio in optimizer.trust_ratios().values()]

    adapted = step_of({})
    assert adapted[0] != pytest.approx([2.85, 4.2])
    expected = adapted if weight_decay else (pytest.approx([2.85, 4.2], rel=1e-14), [])
    assert step_of({"always_adapt": False}) == step_of({}, always_adapt=False) == expected
    assert step_of({"always_adapt": False}, always_adapt=True) == adapted


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_leaves_updates_of_layers_without_weight_decay(weight_decay, backend):
    steps = []
    for wrap in (LAMB, partial(LAMB, always_adapt=False), lambda base: base):
        param = nn.Parameter(torch.tensor(W, dtype=torch.float64))
        param.grad = torch.tensor(G, dtype=torch.float64)
        wrap(torch.optim.AdamW([param], lr=0.5, weight_decay=weight_decay)).step()
        steps.append(param.detach().tolist())
    always, not_always, base = steps
    assert not_always == (always if weight_decay else base) != (base if weight_decay else always)


@pytest.mark.parametrize("name", BY_HAND)
@sgds
def test_formula_by_hand(sgd, name, backend):
    dialect, given, ratio, weight = BY_HAND[name]
    actual = hand_made(lambda base: LARS(base, 0.0, 0.06, **dialect), sgd, **given)
    assert actual == (pytest.approx(ratio, rel=1e-15), pytest.approx(weight, rel=1e-14, abs=1e-15))


@pytest.mark.parametrize(
    ("options", "given", "ratio", "weight"),
    [
        # Δ = −0.5 · (0.6, 0), ‖u‖ = 0.6
        ({"trust_coef": 0.06}, {}, 0.5, [2.85, 4.0]),
        ({"trust_coef": 0.06, "eps": 0.4}, {}, 0.3, [2.91, 4.0]),
        ({"trust_coef": 0.06}, {"lr": 0.25}, 0.5, [2.925, 4.0]),
        ({"trust_coef": 0.06}, {"lr": torch.tensor(0.25)}, 0.5, [2.925, 4.0]),
        ({}, {"lr": 0.03}, 5 / 0.6, [2.85, 4.0]),
        ({"clip": True}, {}, 1.0, [2.7, 4.0]),
        ({"clip": True, "trust_coef": 0.06}, {}, 0.5, [2.85, 4.0]),
        ({}, {"weight": [0.0, 0.0]}, 1.0, [-0.15, 0.2]),
        ({}, {"grad": [-0.3, -0.4]}, 1.0, [3.0, 4.0]),
        ({}, {"lr": 0.0}, 1.0, [3.0, 4.0]),
        ({"trust_coef": 0.06}, {"maximize": True}, 0.375, [3.0, 3.85]),
    ],
)
@sgds
def test_lamb_by_hand(sgd, options, given, ratio, weight, backend):
    actual = hand_made(lambda base: LAMB(base, **options), sgd, **given)
    assert actual == (pytest.approx(ratio, rel=1e-14), pytest.approx(weight, rel=1e-14))


@pytest.mark.parametrize("adamw", [torch.optim.AdamW, torchlars.optim.AdamW], ids=["torchs", "ours"])
def test_lamb_over_adamw_by_hand(adamw, backend):
    """A first step of AdamW is the gradient's sign: u = (1, −1) + λw, to a part in 1e8."""
    ratio, weight = hand_made(LAMB, adamw, lr=0.01, eps=1e-15)
    assert ratio == pytest.approx(5 / math.hypot(1.3, 0.6), rel=1e-12)
    assert weight == pytest.approx([3 - 0.01 * ratio * 1.3, 4 + 0.01 * ratio * 0.6], rel=1e-12)


# Many steps.

DIALECTS = [
    {"clip": clip, "norm": norm, **where}
    for clip, norm, where in itertools.product(
        (False, True), ("raw", "decayed"), ({}, {"lr_in_momentum": True}, {"apply_to": "update"})
    )
]
MOMENTA = [{}, {"momentum": 0.9, "dampening": 0.25}, {"momentum": 0.9, "nesterov": True}]


def label(options):
    return ",".join(f"{key}={value}" for key, value in options.items() if value not in (False, "raw")) or "-"


DEFAULTS = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
PLAIN = {"eps": EPS, "trust_coef": TRUST_COEF, "clip": False, "norm": "raw"}
PLAIN = {**PLAIN, "lr_in_momentum": False, "apply_to": "gradient"}


@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("options", MOMENTA, ids=label)
@pytest.mark.parametrize("dialect", DIALECTS, ids=label)
@sgds
def test_steps_follow_the_formulas(sgd, dialect, options, lr, backend):
    own = groups()
    for group in own:
        if lr == "tensor":
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        if dialect.get("apply_to") == "update" and "norm" in group:
            group["apply_to"] = "gradient"  # both in one step
    optimizer = LARS(sgd(own, lr=0.5, **options), EPS, TRUST_COEF, **dialect)
    oracle = Oracle(groups(), **{**DEFAULTS, **options, **PLAIN, **dialect})
    if dialect.get("apply_to") == "update":
        oracle.param_groups[1]["apply_to"] = "gradient"
        oracle.param_groups[3]["apply_to"] = "gradient"
    for group in oracle.param_groups[2:3]:
        group["lr_in_momentum"] = False  # it is the wrapper's, and this group is left alone
    for step in range(4):
        give_gradients([optimizer, oracle], step)
        before = hyper_parameters(optimizer)
        optimizer.step()
        oracle.step()
        assert_identical(before, hyper_parameters(optimizer))
        ratios = optimizer.trust_ratios()
        assert len(ratios) == len(oracle.ratios) == 12 - (step == 2)
        for p, q in zip(params_of(optimizer), params_of(oracle), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            assert (p in ratios) == (q in oracle.ratios)
            assert p not in ratios or ratios[p].item() == pytest.approx(oracle.ratios[q], rel=1e-11)
        change_lr([optimizer, oracle], step)


@pytest.mark.parametrize("dialect", DIALECTS, ids=label)
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float32, torch.bfloat16], ids=str)
def test_both_sgds_and_both_ways_agree_in_other_dtypes(dtype, dialect, backend, monkeypatch):
    """Where gradients are scaled, a base that takes ratios rounds less: so momentum is in float32 and few steps."""
    tolerance = {torch.complex128: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-5}[dtype]
    kept = {"momentum_dtype": torch.float32} if dtype == torch.bfloat16 else {}
    ours = LARS(torchlars.optim.SGD(groups(dtype), lr=0.5, momentum=0.9, **kept), EPS, TRUST_COEF, **dialect)
    theirs = LARS(torch.optim.SGD(groups(dtype), lr=0.5, momentum=0.9), EPS, TRUST_COEF, **dialect)
    closer = copy.deepcopy(ours)
    for step in range(3):
        give_gradients([ours, theirs, closer], step)
        ours.step()
        theirs.step()
        with monkeypatch.context() as patched:
            patched.setattr(ops, "fast_layers", lambda kind: ops.NoFastPath())
            closer.step()
        for p, q, same in zip(params_of(ours), params_of(theirs), params_of(closer), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(p, same, rtol=1e-15 if dtype == torch.complex128 else 0, atol=1e-15)
        change_lr([ours, theirs, closer], step)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's own, in 2.11, though it is told
@pytest.mark.parametrize("dialect", DIALECTS, ids=label)
@sgds
def test_a_sparse_gradient_is_adapted_like_a_dense_one(sgd, dialect, backend):
    def build():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(6, 2, dtype=torch.float64)), nn.Parameter(torch.randn(3).double())]
        return LARS(sgd([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}], lr=0.5), **dialect)

    sparse, dense = build(), build()
    for step in range(3):
        grad = torch.sparse_coo_tensor(
            [[1, 4, 1]], (1 + step) * torch.arange(6.0).double().reshape(3, 2), (6, 2), check_invariants=True
        )
        params_of(sparse)[0].grad, params_of(dense)[0].grad = grad.clone(), grad.to_dense()
        for one in (sparse, dense):
            params_of(one)[1].grad = torch.full((3,), 0.5, dtype=torch.float64)
            one.step()
            change_lr([one], step)
        for p, q in zip(params_of(sparse), params_of(dense), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d.get("apply_to") == "update"], ids=label)
def test_updates_of_adamw_are_scaled_by_ratios_of_gradients(dialect, backend):
    """AdamW decouples: λ = 0 in the ratio, and its own decay is part of the update."""
    params, plain = layers(0), layers(0)
    optimizer = LARS(torch.optim.AdamW(params, lr=0.1, weight_decay=0.3), EPS, TRUST_COEF, **dialect)
    base = torch.optim.AdamW(plain, lr=0.1, weight_decay=0.3)
    for step in range(3):
        give_gradients([optimizer, base], step)
        old = [param.detach().clone() for param in plain]
        base.step()
        optimizer.step()
        for p, q, w in zip(params, plain, old, strict=True):
            if q.grad is not None:
                zero = norm(w) == 0 or norm(q.grad) == 0
                r = 1.0 if zero else TRUST_COEF * norm(w) / (norm(q.grad) + EPS)
                r = min(r / 0.1, 1) if dialect["clip"] else r
                q.detach().copy_(w + r * (q.detach() - w))
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


class Decouples(torch.optim.Optimizer):
    """A base of another house which shrinks weights apart from the gradient and does not say so."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.5, "weight_decay": 0.25})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self.seen = group["weight_decay"]
            for param in group["params"]:
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * param.grad)


@pytest.mark.parametrize("who_says", ["wrapper", "group"])
@pytest.mark.parametrize("norm_of", ["raw", "decayed"])
def test_decoupled_decay_stays_the_bases(norm_of, who_says, backend):
    param = nn.Parameter(torch.tensor([3.0, 4.0]).double())
    param.grad = torch.tensor([0.3, -0.4]).double()
    group = {"params": [param], **({"decoupled_weight_decay": True} if who_says == "group" else {})}
    options = {"weight_decay": "decoupled"} if who_says == "wrapper" else {}
    optimizer = LARS(Decouples([group]), 0.0, 0.06, norm=norm_of, **options)
    optimizer.step()
    assert optimizer.optim.seen == 0.25
    assert optimizer.trust_ratios()[param].item() == pytest.approx(0.6)
    # w ← 0.875 · w − 0.5 · 0.6 · g
    assert param.tolist() == pytest.approx([0.875 * 3 - 0.09, 0.875 * 4 + 0.12])


@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("clip", [False, True])
def test_lamb_heeds_the_options_of_groups(clip, lr, backend):
    def own():
        others = [{}, {"clip": not clip, "eps": 0.2}, {"trust_coef": None}, {"trust_coef": 3.0}, {"clip": not clip}]
        lrs = [0.4, 0.7, 0.2, 0.3, 0.9] if lr == "number" else [torch.tensor(0.4).double()] * 5
        return [
            {"params": layers(i), "weight_decay": 0.1 * i, "lr": rate, **options}
            for i, (rate, options) in enumerate(zip(lrs, others, strict=True))
        ]

    optimizer = LAMB(torch.optim.SGD(own(), lr=0.5, momentum=0.9), 0.5, 0.1, clip=clip)
    plain = torch.optim.SGD(own(), lr=0.5, momentum=0.9)
    clipped = set()
    for step in range(3):
        give_gradients([optimizer, plain], step)
        old = [[param.detach().clone() for param in group["params"]] for group in plain.param_groups]
        optimizer.step()
        plain.step()
        for ours, group, values in zip(optimizer.param_groups, plain.param_groups, old, strict=True):
            options = {"trust_coef": 0.5, "eps": 0.1, "clip": clip, **group}
            for p, q, w in zip(ours["params"], group["params"], values, strict=True):
                update = norm(q.detach() - w) / float(group["lr"])
                r = 1.0
                if q.grad is not None and options["trust_coef"] is not None and norm(w) != 0 and update != 0:
                    r = options["trust_coef"] * norm(w) / (update + options["eps"])
                    clipped.add((options["clip"], r > 1))
                    r = min(r, 1.0) if options["clip"] else r
                q.detach().copy_(w + r * (q.detach() - w))
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        if lr == "number":
            change_lr([optimizer, plain], step)
    assert len(clipped) == 4


# The learning rate that is hidden.


@sgds
def test_the_users_lr_is_seen_by_closures_and_put_back_after_errors(sgd, backend):
    optimizer = LARS(sgd(groups(), lr=0.5, momentum=0.9), lr_in_momentum=True)
    before, seen = hyper_parameters(optimizer), []

    def closure(fails=False):
        seen.append([group["lr"] for group in optimizer.param_groups])
        give_gradients([optimizer], 0)
        if fails:
            raise ZeroDivisionError("in the closure")
        return 1.0

    assert optimizer.step(closure) == 1.0
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: closure(fails=True))
    assert seen == [[0.4, 0.7, 0.2, 0.3, 0.9]] * 2
    assert_identical(before, hyper_parameters(optimizer))

    class Raises(sgd):
        def step(self, closure=None, **kwargs):
            self.seen = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
            raise KeyError("in the base")

    failing = LARS(Raises(groups(), lr=0.5), lr_in_momentum=True)
    before = hyper_parameters(failing)
    give_gradients([failing], 0)
    with pytest.raises(KeyError):
        failing.step()
    lrs = [lr for lr, _ in failing.optim.seen]
    assert lrs == [1.0, 1.0, 0.2, 1.0, 1.0]
    decays = [decay for _, decay in failing.optim.seen]
    assert decays == ([0.0, 0.0, 0.2, 0.0, 0.0] if sgd is torch.optim.SGD else [0.1, 0.03, 0.2, 0.0, 0.0])
    assert_identical(before, hyper_parameters(failing))


# LARC.


def test_larc_has_the_defaults_and_the_order_of_apex():
    base = torch.optim.SGD(layers(0), lr=0.1)
    optimizer = LARC(base)
    assert (optimizer.trust_coef, optimizer.clip, optimizer.eps, optimizer.norm) == (0.02, True, 1e-8, "raw")
    optimizer = LARC(base, 0.03, False, 1e-5)
    assert (optimizer.trust_coef, optimizer.clip, optimizer.eps) == (0.03, False, 1e-5)
    assert isinstance(optimizer, LARS)
    with pytest.raises(TypeError, match="norm"):
        LARC(base, norm="decayed")
    assert repr(optimizer).startswith("LARC(eps=1e-05, trust_coef=0.03, clip=False, norm='raw', ")


# Copies, state dicts, classes for frameworks.


def made(kind):
    params = layers(0)
    sgd = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    return {
        "LARC": lambda: LARC(torch.optim.SGD(params, **sgd), 0.3),
        "LAMB": lambda: LAMB(torch.optim.SGD(params, **sgd), 0.3, 0.1, clip=True),
        "LARS.over": lambda: LARS.over(torchlars.optim.SGD, trust_coef=0.3, norm="decayed")(params, **sgd),
        "LARC.over": lambda: LARC.over(torch.optim.SGD, trust_coef=0.3)(params, **sgd),
        "LAMB.over": lambda: LAMB.over(torch.optim.AdamW, trust_coef=0.3)(params, lr=0.5, weight_decay=0.1),
    }[kind]()


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", ["LARC", "LAMB", "LARS.over", "LARC.over", "LAMB.over"])
def test_copies_are_of_the_same_class_and_go_on_alike(kind, how, backend):
    optimizer = made(kind)
    give_gradients([optimizer], 0)
    optimizer.step()
    copied = how(optimizer)
    assert type(copied) is type(optimizer)
    assert repr(copied) == repr(optimizer)
    if how is copy.copy:
        assert copied.optim is optimizer.optim
        return
    for step in (1, 3):
        give_gradients([optimizer, copied], step)
        for one in (optimizer, copied):
            one.step()
        assert all(map(torch.equal, params_of(optimizer), params_of(copied)))
        assert not any(p is q for p, q in zip(params_of(optimizer), params_of(copied), strict=True))


@pytest.mark.parametrize(("length", "allowed"), [(1e-5, 0.01), (1e-3, 1e-4)])
def test_precision_of_small_updates_in_float32(length, allowed, backend):
    """LAMB's docstring has the first of them; the update is a difference of rounded numbers."""
    random = torch.Generator().manual_seed(9)
    values, grads = (torch.randn(1000, dtype=torch.float64, generator=random) for _ in range(2))
    lr = length * float(values.norm() / grads.norm())
    param = torch.nn.Parameter(values.float())
    param.grad = grads.float()
    optimizer = LAMB(torch.optim.SGD([param], lr=lr), 0.7)
    optimizer.step()
    expected = 0.7 * values.norm() / grads.norm()
    assert abs(optimizer.trust_ratios()[param].item() / expected - 1) < allowed


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_options_travel_in_state_dicts(backend):
    dialect = {"clip": True, "norm": "decayed", "apply_to": "update", "weight_decay": "decoupled"}
    # Decoupled weight decay does not go with lr in the momentum.
    kept = [group for group in groups() if "lr_in_momentum" not in group]
    optimizer = LARS(torch.optim.SGD(kept, lr=0.5), EPS, TRUST_COEF, **dialect)
    state_dict = saved(optimizer.state_dict())
    assert state_dict["lars"] == {
        "eps": EPS,
        "trust_coef": TRUST_COEF,
        "lr_in_momentum": False,
        "always_adapt": True,
        **dialect,
    }
    other = LARS(torch.optim.SGD([{"params": group["params"]} for group in kept], lr=0.1))
    other.load_state_dict(state_dict)
    assert hyper_parameters(other) == hyper_parameters(optimizer)
    assert other.state_dict()["lars"] == state_dict["lars"]


def test_a_state_dict_that_says_less_leaves_the_rest(backend):
    optimizer = LARS(torch.optim.SGD(groups(), lr=0.5), clip=True, norm="decayed")
    optimizer.load_state_dict({**optimizer.state_dict(), "lars": {"eps": 0.5, "trust_coef": 0.25}})
    assert (optimizer.eps, optimizer.trust_coef, optimizer.clip, optimizer.norm) == (0.5, 0.25, True, "decayed")
    lamb = LAMB(torch.optim.SGD(groups(), lr=0.5), 0.5, clip=True)
    lamb.load_state_dict(optimizer.state_dict())  # another wrapper's values are not its own
    assert (lamb.eps, lamb.trust_coef, lamb.clip) == (0.0, 0.5, True)


@sgds
@pytest.mark.parametrize("lr_is_tensor", [False, True])
def test_clip_at_lr_0_moves_nothing_and_momentum_takes_whole_gradients(lr_is_tensor, sgd, backend):
    """Warm-ups begin so, and torch.distributed.checkpoint, where it makes a state to load into: min(r / 0, 1) is 1."""
    param = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    lr = torch.tensor(0.0, dtype=torch.float64) if lr_is_tensor else 0.0
    optimizer = LARS(sgd([param], lr=lr, momentum=0.9, weight_decay=0.1), eps=0, trust_coef=0.01, clip=True)
    for momentum in ([2.3, 0.4], [0.9 * 2.3 + 2.3, 0.9 * 0.4 + 0.4]):
        param.grad = torch.tensor([2.0, 0.0], dtype=torch.float64)
        optimizer.step()
        assert param.tolist() == [3.0, 4.0]
        assert optimizer.trust_ratios()[param] == 1
        assert optimizer.state[param]["momentum_buffer"].tolist() == pytest.approx(momentum, rel=1e-14)
    optimizer.param_groups[0]["lr"] = 0.5
    param.grad = torch.tensor([2.0, 0.0], dtype=torch.float64)
    optimizer.step()
    ratio = 0.01 * 5.0 / (2.0 + 0.1 * 5.0) / 0.5
    assert optimizer.trust_ratios()[param].item() == pytest.approx(ratio, rel=1e-14)
    moved = [0.5 * (0.9 * 1.9 * whole + ratio * whole) for whole in (2.3, 0.4)]
    assert param.tolist() == pytest.approx([3.0 - moved[0], 4.0 - moved[1]], rel=1e-14)


def test_several_dtypes_devices_and_orders_in_one_group(backend):
    """Under LAMB, and with updates scaled."""
    for wrap in (lambda b: LAMB(b, 0.3), lambda b: LARS(b, EPS, TRUST_COEF, apply_to="update")):
        torch.manual_seed(0)
        whole = [nn.Parameter(torch.randn(4, 3).to(dtype)) for dtype in ops.DTYPES]
        whole += [
            nn.Parameter(torch.randn(3, 4).mT),
            nn.Parameter(torch.randn(4, 6)[:, :3]),
            nn.Parameter(torch.ones(0)),
        ]
        elsewhere = nn.Parameter(torch.ones(2, device="meta"))
        alone = [nn.Parameter(param.detach().clone()) for param in whole]
        for p, q in zip(whole, alone, strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype)
            q.grad = p.grad.clone()
        elsewhere.grad = torch.ones_like(elsewhere)
        options = {"lr": 0.5, "weight_decay": 0.1, "foreach": False}
        optimizer = wrap(torch.optim.SGD([*whole, elsewhere], **options))
        optimizer.step()
        assert len(optimizer.trust_ratios()) == len(whole) + 1
        for p, q in zip(whole, alone, strict=True):
            one = wrap(torch.optim.SGD([q], **options))
            one.step()
            torch.testing.assert_close(p, q, rtol=0, atol=0)
            assert torch.equal(optimizer.trust_ratios()[p], one.trust_ratios()[q])
            wide = p.dtype in (torch.float64, torch.complex128)
            assert one.trust_ratios()[q].dtype == (torch.float64 if wide else torch.float32)


def test_gradients_stay_as_they_are_where_updates_are_scaled(backend):
    for wrap in (LAMB, lambda base: LARS(base, apply_to="update")):
        optimizer = wrap(torch.optim.SGD(layers(0), lr=0.5, weight_decay=0.1))
        give_gradients([optimizer], 0)
        grads = [(param.grad, param.grad.clone(), param.grad._version) for param in params_of(optimizer)]
        optimizer.step()
        for param, (grad, value, version) in zip(params_of(optimizer), grads, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, value)
            assert grad._version == version


@pytest.mark.parametrize(
    "wrap", [LARS, LAMB, lambda base: LARS(base, apply_to="update")], ids=["LARS", "LAMB", "update"]
)
def test_a_closure_that_leaves_no_gradient_leaves_no_trust_ratio(wrap, backend):
    optimizer = wrap(torch.optim.SGD(layers(0), lr=0.5, momentum=0.9, weight_decay=0.1))
    used, unused, *_ = params_of(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    before = unused.detach().clone()
    optimizer.step(closure)
    assert list(optimizer.trust_ratios()) == [used]
    assert torch.equal(unused, before)
