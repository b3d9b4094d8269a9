"""The calls under "Coming from X" in examples/README.md give published numbers and those of the peers' formulas.

Every call is read from the table and evaluated. It is compared with numbers that the peer once produced
(``published.json``), and with the peer's formula, written here from what is known of it. The formulas include what
the peers do at zero norms, without weight decay and with dampening.
"""

import itertools
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peer_calls import (
    ADAM_HYPER,
    BASES,
    CALLS,
    FORMULAS,
    LRS,
    MOMENTUM,
    PREAMBLE,
    README,
    SECTION,
    SGD_HYPER,
    Problem,
    apex_lamb,
    assert_same,
    barlow_twins,
    by_formula,
    deepspeed_factor,
    deepspeed_lamb,
    differ,
    mlperf,
    openmmlab,
    ours,
    solo_learn,
    torchlars_0_1_2,
    two_groups,
    vissl,
)
from published import PUBLISHED
from torch import nn

import torchlars.optim

pytestmark = [
    pytest.mark.filterwarnings("ignore:a layer whose weights are all 0:UserWarning"),  # they are, on purpose
    pytest.mark.filterwarnings("ignore:a group with .* takes its lr whole:UserWarning"),  # as in the peers
]
PROMISED = [
    *(
        "torchlars 0.1.2",
        "apex `LARC`",
        "quadra",
        "lightning-bolts",
        "lightly",
        "timm `Lars`",
        "pytorch_optimizer `LARS`",
    ),
    *("solo-learn `LARS`", "clip_lr=True", "DINO", "MAE", "MoCo v3", "VISSL", "mmselfsup", "mmpretrain"),
    *("bitsandbytes", "Barlow Twins", "VICReg", "SimCLR", "`optax.lars`", "MLPerf", "Algorithm 1", "2018 blog"),
    *("Intel's extension", "ColossalAI `Lars`", "`optax.lamb`", "timm `Lamb`", "`LARS32bit`", "`LARS8bit`"),
    *("apex `FusedLAMB`", "DeepSpeed `FusedLamb`"),
]
EIGHT_BITS = "bitsandbytes `LARS8bit`, `LARS(optim_bits=8)`"


def moderate(problem):
    """Without elements of a gradient that ColossalAI would clamp."""
    problem.grads = [[grad.clamp(-5, 5) for grad in grads] for grads in problem.grads]
    return problem


# The table


def test_every_peer_has_a_row():
    for name in PROMISED:
        assert any(name in peer for peer in CALLS), name
    rows = [line for line in SECTION.splitlines() if line.startswith("| ")]
    assert len(CALLS) == len(rows) - 1, "every row but the head has a call"
    assert set(CALLS) == set(FORMULAS)


def test_the_lines_before_the_table_run_as_they_stand():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    for call in CALLS.values():
        names = {"model": model}
        exec(PREAMBLE, names)
        optimizer = eval(call, names)
        model(torch.ones(5, 3)).sum().backward()
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
        assert all(differ([param], [old]) for param, old in zip(model.parameters(), before, strict=True)), call


def test_all_arguments_of_bitsandbytes_have_a_row():
    rows = re.findall(
        r"^\| (`.+?) \| (.+?) \|$", re.search(r"^### From bitsandbytes\n(.*?)^#", README, re.M | re.S)[1], re.M
    )
    arguments = dict(rows)
    for name in (
        "`lr`",
        "`dampening`",
        "`nesterov`",
        "`optim_bits=8`",
        "`optim_bits=32`",
        "`min_8bit_size`",
        "`max_unorm`",
    ):
        assert any(name in row for row in arguments), name
    assert {"`percentile_clipping` (until 0.49.2)", "`args`"} <= arguments.keys()


def test_the_lines_about_8_bits_run_as_they_stand():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    names = {"model": model}
    exec(PREAMBLE, names)
    exec(re.search(r"^## Momentum in 8 bits\n\n```python\n(.*?)^```", README, re.M | re.S)[1], names)
    model(torch.ones(5, 64)).sum().backward()
    names["optimizer"].step()
    coded = [len(param) for param in model.parameters() if "momentum_codes" in names["optimizer"].state[param]]
    assert coded == [64]
    assert any(history.any() for history in names["clipping"].state_dict()["histories"])


def test_the_bytes_of_momentum_are_those_of_the_table():
    table = README.partition("### Size and accuracy")[2].partition("A row is")[0]
    told = dict(re.findall(r"rows of (\d+) elements.*\| `torch.int8` \| ([\d.]+) \|", table))
    assert set(told) == {"4096", "4000", "576", "64"}
    for row, number in told.items():
        param = nn.Parameter(torch.ones(64, int(row)))
        param.grad = torch.ones_like(param)
        optimizer = torchlars.optim.SGD([param], lr=0.1, momentum=0.9, momentum_dtype=torch.int8)
        optimizer.step()
        size = sum(each.numel() * each.element_size() for each in optimizer.state[param].values())
        assert abs(size / param.numel() - float(number)) <= 0.00051, row


# Published numbers


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PUBLISHED["peers"])
def test_published_numbers(backend, name, base):
    case, data = PUBLISHED["peers"][name], PUBLISHED["data"]
    hparams = case["hparams"]
    w, b = (nn.Parameter(torch.tensor(data[key], dtype=torch.float64)) for key in ("W0", "B0"))
    sgd = {"lr": hparams["lr"][0], "weight_decay": hparams["wd"], "momentum": hparams.get("momentum", 0)}
    adam = {"lr": hparams["lr"][0], "weight_decay": hparams["wd"]}
    adam |= {key: hparams[key] for key in ("betas", "eps") if key in hparams}
    none = {"params": []}  # the peers ran without their filters
    names = {"params": [w, b], "weights": [w, b], "plain": none, "plain_inside": none, "sgd": sgd, "adam": adam}
    optimizer = ours(CALLS[case["peer"]], [w, b], base, **names)
    for i, expected in enumerate(case["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = hparams["lr"][i]
        w.grad, b.grad = (torch.tensor(data[key][i], dtype=torch.float64) for key in ("GW", "GB"))
        optimizer.step()
        seen = {"w": w, "b": b, "buf": optimizer.state[w].get("momentum_buffer")}
        if base == "torch":  # the other leaves gradients as they were
            seen["w_grad_after"] = w.grad
        for key in expected.keys() & seen.keys():
            values = torch.tensor(expected[key], dtype=torch.float64)
            torch.testing.assert_close(seen[key].detach(), values, rtol=0, atol=1e-12, msg=f"step {i}: {key}")


def noise(shape, seed):
    """The weights and gradients of published numbers that come without them."""
    values, x = [], (seed * 2654435761 + 12345) % 2**32
    for _ in range(math.prod(shape)):
        x = (1664525 * x + 1013904223) % 2**32
        values.append((x >> 8) / 2**23 - 1)
    return torch.tensor(values, dtype=torch.float64).reshape(shape).float()


def run_of_bitsandbytes(peer, case, shape, base="torch"):
    """Take the steps of a published run with the call for a peer; return the parameter before and after each."""
    w = nn.Parameter(noise(shape, case["weights_seed"]))
    sgd = {"lr": 0.1, "momentum": case["momentum"], "weight_decay": case.get("weight_decay", 0)}
    call = CALLS[peer].replace("trust_coef=0.02", f"trust_coef={case['max_unorm']}")
    optimizer, values = ours(call, [w], base, params=[w], sgd=sgd), [w.detach().clone()]
    for lr, seed in zip(case["lrs"], case["grad_seeds"], strict=True):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = case.get("grad_scale", 1.0) * noise(shape, seed)
        optimizer.step()
        values.append(w.detach().clone())
    return values


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PUBLISHED["bitsandbytes"]["32-bit"])
def test_published_numbers_of_bitsandbytes(backend, name, base):
    case = PUBLISHED["bitsandbytes"]["32-bit"][name]
    _, *values = run_of_bitsandbytes("bitsandbytes `LARS`, `LARS32bit`", case, (3, 4), base)
    for i, (value, step) in enumerate(zip(values, case["steps"], strict=True)):
        expected = torch.tensor(step).reshape(3, 4)
        torch.testing.assert_close(value, expected, rtol=0, atol=3e-7, msg=lambda text, i=i: f"step {i}: {text}")


def test_in_8_bits_a_layer_moves_as_far_as_in_32_where_bitsandbytes_moves_it_by_its_length(backend):
    case = PUBLISHED["bitsandbytes"]["8-bit"]
    values = run_of_bitsandbytes(EIGHT_BITS, case, case["shape"])
    moved = [float((new - old).norm() / old.norm()) for old, new in itertools.pairwise(values)]
    assert moved == pytest.approx([case["exact step over weights"]] * 3, rel=1e-5)
    assert [float(value.norm()) for value in values[1:]] == pytest.approx(case["exact norms"], rel=1e-4)
    assert min(case["step over weights"]) > 0.6


NOT_EXACT = {
    *("MLPerf's reference until v0.6", "ColossalAI, pytorch_optimizer `Lamb`", "DeepSpeed `FusedLamb`", EIGHT_BITS)
}
HAS_NESTEROV = {
    *(
        "torchlars 0.1.2",
        "NVIDIA apex `LARC`",
        "quadra, lightning-bolts, lightly `LARS`",
        "timm `Lars`",
        "`optax.lars`",
    ),
    *("solo-learn `LARS`", "solo-learn `LARS(clip_lr=True)`", "mmselfsup, mmpretrain `LARS`"),
    *("pytorch_optimizer `LARS`", "SimCLR", "SimCLR, `classic_momentum=False`", "MLPerf's reference since v0.7"),
}
HAS_DAMPENING = {
    *("torchlars 0.1.2", "NVIDIA apex `LARC`", "quadra, lightning-bolts, lightly `LARS`", "timm `Lars`"),
    *("solo-learn `LARS`", "solo-learn `LARS(clip_lr=True)`", "mmselfsup, mmpretrain `LARS`"),
}
CASES = [
    pytest.param(peer, momentum, base, id=f"{peer}-{momentum}-{base}".replace("`", ""))
    for peer, momentum, base in itertools.product(CALLS, MOMENTUM, BASES)
    if peer not in NOT_EXACT
    and (momentum != "nesterov" or peer in HAS_NESTEROV)
    and (momentum != "dampening" or peer in HAS_DAMPENING)
]


@pytest.mark.parametrize(("peer", "momentum", "base"), CASES)
def test_formulas(backend, peer, momentum, base):
    clipped = set()
    for seed in range(3):
        problem = Problem(seed)
        if peer == "ColossalAI `Lars`":
            problem = moderate(problem)
        sgd = SGD_HYPER | MOMENTUM[momentum]
        params = problem.params()
        result = problem.run(ours(CALLS[peer], params, base, sgd=sgd), params)
        assert_same(result, by_formula(peer, problem, clipped, sgd=sgd), message=f"seed {seed}")
    if "clip" in CALLS[peer] or "LARC" in CALLS[peer]:
        assert clipped == {True, False}, "one that clips always or never shows less"


@pytest.mark.parametrize("peer", [peer for peer in CALLS if peer not in NOT_EXACT])
def test_no_other_call_would_do(peer):
    def written_out(call):
        call = call.replace("LARS.over(SGD, always_adapt=False)(params, **sgd)", "LARS(SGD(params, **sgd))")
        call = call.replace("torchlars.optim.SGD", "SGD").replace(", momentum_dtype=torch.int8", "")  # float64 has none
        return call.replace(", always_adapt=False", "")  # all layers decay here

    problem = moderate(Problem(0))
    for other in CALLS.values():
        params = problem.params()
        result = problem.run(ours(other, params), params)
        is_same = written_out(other) == written_out(CALLS[peer])
        assert is_same != differ(result, by_formula(peer, problem), by=1e-12), other


OPTIONS = [
    *(r", eps=0", r', norm="decayed"', r", lr_in_momentum=True", r', apply_to="update"', r", clip=True"),
    *(r", trust_coef=[\d.]+", r"(?<=plain)_inside"),
]


@pytest.mark.parametrize("peer", [peer for peer in CALLS if peer not in NOT_EXACT])
def test_no_option_can_be_left_out(peer):
    problem = moderate(Problem(1))
    for option in OPTIONS:
        call = re.sub(option, "", CALLS[peer])
        params = problem.params()
        result = problem.run(ours(call, params), params)
        assert (call == CALLS[peer]) != differ(result, by_formula(peer, problem), by=1e-12), option


# What the last column says


ZERO = {
    "weights": {
        *("NVIDIA apex `LARC`", "bitsandbytes `LARS`, `LARS32bit`", "Algorithm 1 of the paper"),
        "solo-learn `LARS(clip_lr=True)`",
    },
    "gradient": {
        *("NVIDIA apex `LARC`", "quadra, lightning-bolts, lightly `LARS`", "pytorch_optimizer `LARS`"),
        *("Algorithm 1 of the paper", "solo-learn `LARS`", "solo-learn `LARS(clip_lr=True)`"),
    },
}


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize(
    "peer", [peer for peer in CALLS if peer not in {*NOT_EXACT, "the 2018 blog implementation (`eta`)"}]
)
def test_zero_norms(peer, zero):
    problem = moderate(Problem(3))
    problem.lrs = (4.0, *LRS[1:])  # above 1, where clipping shows
    if zero == "weights":
        problem.layers[0].zero_()
    else:
        problem.grads[0][0].zero_()
    params = problem.params()
    result, expected = problem.run(ours(CALLS[peer], params), params), by_formula(peer, problem)
    assert_same(result[1:], expected[1:])
    if peer in ZERO[zero]:
        assert differ(result[:1], expected[:1])
    else:
        assert_same(result[:1], expected[:1])


@pytest.mark.parametrize(
    "peer",
    ["quadra, lightning-bolts, lightly `LARS`", "timm `Lars`", "timm `Lamb`", "NVIDIA apex `FusedLAMB`"],
)
@pytest.mark.parametrize("momentum", MOMENTUM)
def test_groups_without_weight_decay(peer, momentum):
    problem, sgd = Problem(4), SGD_HYPER | MOMENTUM[momentum]
    problem.second_decay = 0.0
    expected = by_formula(peer, problem, sgd=sgd)
    for call, is_same in (CALLS[peer], True), (CALLS[peer].replace(", always_adapt=False", ""), False):
        params = problem.params()
        result = problem.run(ours(call, params, sgd=sgd, params=two_groups(params, weight_decay=0.0)), params)
        assert is_same != differ(result, expected, by=1e-12)


def test_dampening_of_pytorch_optimizer():
    peer, problem, sgd = "pytorch_optimizer `LARS`", Problem(5), SGD_HYPER | {"dampening": 0.3}
    params = problem.params()
    assert differ(problem.run(ours(CALLS[peer], params, sgd=sgd), params), by_formula(peer, problem, sgd=sgd))


def test_limits_of_colossalai():
    peer, problem = "ColossalAI `Lars`", Problem(0)
    params = problem.params()
    result, expected = problem.run(ours(CALLS[peer], params), params), by_formula(peer, problem)
    is_clamped = [any(bool((grads[i].abs() > 10).any()) for grads in problem.grads) for i in range(4)]
    assert set(is_clamped) == {True, False}
    for one, other, clamped in zip(result, expected, is_clamped, strict=True):
        assert differ([one], [other]) == clamped
    problem = moderate(Problem(0))
    problem.grads[0][0] *= 1e-9
    problem.layers[0] *= 1e3
    assert 0.001 * problem.layers[0].norm() / (0.01 * problem.layers[0].norm() + problem.grads[0][0].norm()) < 50
    sgd = SGD_HYPER | {"weight_decay": 0.0}
    params = problem.params()
    result, expected = problem.run(ours(CALLS[peer], params, sgd=sgd), params), by_formula(peer, problem, sgd=sgd)
    assert differ(result[:1], expected[:1])
    assert_same(result[1:], expected[1:])


def test_mlperf_until_v0_6_is_exact_without_weight_decay_only():
    peer, problem = "MLPerf's reference until v0.6", Problem(6)
    params = problem.params()
    result = problem.run(ours(CALLS[peer], params), params)
    assert differ(result, by_formula(peer, problem))
    sgd, problem.second_decay = SGD_HYPER | {"weight_decay": 0.0}, 0.0
    params = problem.params()
    result = problem.run(ours(CALLS[peer], params, sgd=sgd, params=two_groups(params, weight_decay=0.0)), params)
    assert_same(result, by_formula(peer, problem, sgd=sgd))


def test_solo_learn_adapts_groups_without_weight_decay():
    problem, sgd = Problem(19), SGD_HYPER | {"weight_decay": 0.0}
    expected = by_formula("solo-learn `LARS`", problem, sgd=sgd)
    for peer, is_same in ("solo-learn `LARS`", True), ("quadra, lightning-bolts, lightly `LARS`", False):
        params = problem.params()
        result = problem.run(ours(CALLS[peer], params, sgd=sgd, params=two_groups(params, weight_decay=0.0)), params)
        assert is_same != differ(result[:1], expected[:1], by=1e-12)


def test_dino_sets_the_weight_decay_of_its_first_group_before_each_step():
    problem, memories = Problem(20), [{} for _ in range(4)]
    expected, params = problem.layers, problem.params()
    optimizer = ours(CALLS["Barlow Twins, VICReg, VISSL, DINO, MAE, MoCo v3 `LARS`"], params)
    for i, _ in enumerate(problem.steps(optimizer, params)):
        optimizer.param_groups[0]["weight_decay"] = decay = 0.04 + 0.1 * i
        optimizer.step()
        layers = zip(expected, problem.grads[i], memories, (1, 1, problem.second_lr, problem.second_lr), strict=True)
        expected = [
            barlow_twins(w, g, SimpleNamespace(lr=LRS[i] * relative, momentum=0.9, weight_decay=decay), memory)
            for w, g, memory, relative in layers
        ]
    assert_same(params, expected)


def test_nvlamb_of_apex():
    peer, problem = "NVIDIA apex `FusedLAMB`", Problem(16)
    problem.second_decay = 0.0
    params = problem.params()
    call = CALLS[peer].replace("always_adapt=False", "always_adapt=True")
    result = problem.run(ours(call, params, params=two_groups(params, weight_decay=0.0)), params)
    assert_same(result, by_formula(peer, problem, formula=partial(apex_lamb, use_nvlamb=True)))
    assert differ(result, by_formula(peer, problem))


def test_apex_clips_all_gradients_together():
    peer, problem = "NVIDIA apex `FusedLAMB`", Problem(17)
    params = problem.params()
    optimizer, norms = ours(CALLS[peer], params), []
    for _ in problem.steps(optimizer, params):
        norms.append(float(nn.utils.clip_grad_norm_(params, 1.0)))
        optimizer.step()
    assert any(norm > 1 for norm in norms)
    assert differ(params, by_formula(peer, problem))
    problem.grads = [
        [grad / max(1.0, norm) for grad in grads] for grads, norm in zip(problem.grads, norms, strict=True)
    ]
    assert_same(params, by_formula(peer, problem), 1e-5)


def within_bounds(problem):
    """With layers that keep DeepSpeed's ratio within its bounds."""
    problem.layers = [layer / layer.norm() for layer in problem.layers]
    problem.lrs = [lr / 10 for lr in LRS]
    return problem


@pytest.mark.parametrize("bias_correction", [False, True])
def test_deepspeed_is_exact_without_eps_and_weight_decay_within_its_bounds(bias_correction):
    peer, problem = "DeepSpeed `FusedLamb`", within_bounds(Problem(18))
    problem.second_decay = 0.0
    adam = ADAM_HYPER | {"eps": 0.0, "weight_decay": 0.0}
    formula, bounded = partial(deepspeed_lamb, bias_correction=bias_correction), set()
    expected = by_formula(peer, problem, bounded, formula, adam=adam)
    assert bounded == {0}
    params = problem.params()
    optimizer = ours(CALLS[peer], params, adam=adam, params=two_groups(params, weight_decay=0.0))
    if bias_correction:
        factors = [deepspeed_factor(adam["betas"], step) for step in range(1, len(LRS) + 1)]
        problem.lrs = [lr * factor for lr, factor in zip(problem.lrs, factors, strict=True)]
    assert_same(problem.run(optimizer, params), expected)


@pytest.mark.parametrize("change", [{"eps": 1e-3}, {"weight_decay": 0.1}, {"bound": 1e-3}, {"bound": 1e3}])
def test_deepspeed_is_not_exact_otherwise(change):
    peer, problem = "DeepSpeed `FusedLamb`", within_bounds(Problem(18))
    problem.layers[0] *= change.get("bound", 1.0)
    problem.second_decay = 0.0
    adam = ADAM_HYPER | {"eps": 0.0, "weight_decay": 0.0} | {key: change[key] for key in change.keys() - {"bound"}}
    params, bounded = problem.params(), set()
    result = problem.run(ours(CALLS[peer], params, adam=adam, params=two_groups(params, weight_decay=0.0)), params)
    expected = by_formula(peer, problem, bounded, partial(deepspeed_lamb, bias_correction=False), adam=adam)
    assert differ(result[:1], expected[:1])
    assert (len(bounded) > 1) == ("bound" in change)


def test_lamb_without_bias_correction_is_exact_without_eps_and_weight_decay_only():
    peer, problem = "ColossalAI, pytorch_optimizer `Lamb`", Problem(7)
    problem.second_decay = 0.0
    for eps, weight_decay, is_same in (0.0, 0.0, True), (1e-3, 0.0, False), (0.0, 0.1, False):
        adam = ADAM_HYPER | {"eps": eps, "weight_decay": weight_decay}
        params = problem.params()
        optimizer = ours(CALLS[peer], params, adam=adam, params=two_groups(params, weight_decay=0.0))
        assert is_same != differ(problem.run(optimizer, params), by_formula(peer, problem, adam=adam), by=1e-12)


VARIANTS = {
    "SwAV": ("NVIDIA apex `LARC`", "**sgd)", "**sgd), trust_coef=0.001, clip=False", torchlars_0_1_2),
    "without filters": (
        "Barlow Twins, VICReg, VISSL, DINO, MAE, MoCo v3 `LARS`",
        '[{"params": weights}, plain]',
        "[{'params': weights}, {**plain, 'trust_coef': 0.001, 'weight_decay': 0.01}]",
        lambda w, g, h, memory: barlow_twins(w[None], g[None], h, memory)[0],
    ),
    "solo-learn without its filter": (
        "solo-learn `LARS`",
        '[{"params": weights}, plain]',
        "[{'params': weights}, {**plain, 'trust_coef': 0.001, 'weight_decay': 0.01}]",
        partial(solo_learn, exclude_bias_n_norm=False),
    ),
    "clip_lr with another eta": (
        "solo-learn `LARS(clip_lr=True)`",
        "**sgd)",
        "**sgd), trust_coef=0.001",
        partial(solo_learn, clip_lr=True),
    ),
    "exclude_bias_and_norm of VISSL": (
        "Barlow Twins, VICReg, VISSL, DINO, MAE, MoCo v3 `LARS`",
        "plain]",
        '{**plain, "weight_decay": 0.01}]',
        vissl,
    ),
    "lars_exclude without decay_mult": (
        "mmselfsup, mmpretrain `LARS`",
        "plain_inside]",
        '{**plain_inside, "weight_decay": 0.01}]',
        partial(openmmlab, decay_mult=1),
    ),
    "adam_w_mode=False": ("NVIDIA apex `FusedLAMB`", "AdamW", "Adam", partial(apex_lamb, adam_w_mode=False)),
    "TensorFlow 2": ("MLPerf's reference since v0.7", "eps=0", "eps=1e-7", partial(mlperf, eps=1e-7)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    peer, old, new, formula = VARIANTS[name]
    problem = Problem(8)
    params = problem.params()
    result = problem.run(ours(CALLS[peer].replace(old, new), params), params)
    assert_same(result, by_formula(peer, problem, formula=formula))
    assert differ(result, by_formula(peer, problem), by=1e-12)
