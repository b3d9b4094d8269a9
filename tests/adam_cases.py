"""Arguments of the op adam_, groups and gradients for tests of torchlars.optim.Adam and AdamW, and comparisons."""

import copy

import pytest
import torch
from cases import copied
from closeness import assert_all_equal
from optimizers import params_of
from sgd_cases import DECAYS, assert_same, layers
from wrapped_networks import loss_of, network

from torchlars import ops, optim, reference

WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "steps")
# Every way to take a step: what is given to the op besides a plain step's arguments.
MODES = {
    "plain": {},
    "of gradients": {"ratios": ...},
    "of gradients, measured": {"trust_coefs": ...},
    "of gradients, decayed": {"trust_coefs": ..., "decayed_norm": True},
    "of gradients, clipped": {"trust_coefs": ..., "clip": True},
    "of updates": {"of_updates": True, "ratios": ...},
    "of updates, measured": {"of_updates": True, "trust_coefs": ...},
    "of updates, clipped": {"of_updates": True, "trust_coefs": ..., "clip": True},
}


def arguments_of(case, dtype, mode, variant=0, grad_dtype=None, moments_in_float32=False):
    """Arguments of adam_ by name, with numbers of its own for each layer. Of four variants each has other flags."""
    grads, params, weight_decays, trust_coefs, eps, case_maximizes = case.make(dtype, grad_dtype=grad_dtype)
    if case.name == "conjugated":  # torch's dispatcher lets no op write lists of lazily conjugated tensors
        grads, params = params, [param.resolve_conj() for param in grads]
    n, generator, options = len(params), torch.Generator().manual_seed(len(params)), MODES[mode]
    of_updates, measures = options.get("of_updates", False), "trust_coefs" in options
    wide = torch.complex128 if dtype.is_complex else torch.float64
    kept = torch.float32 if moments_in_float32 else dtype

    def moment(param, value):
        return torch.empty_like(param.resolve_conj(), dtype=kept).copy_(value)

    def random(param, scale):
        return scale * torch.randn(param.shape, generator=generator, dtype=wide)

    def squares(param, scale):  # none is so small that float16 loses it
        parts = random(param, scale)
        parts = parts + (0.05 + 0.05j if dtype.is_complex else 0.05) * parts.sgn()
        return torch.view_as_complex(torch.view_as_real(parts).square()) if dtype.is_complex else parts.square()

    arguments = {
        "params": params,
        "grads": grads,
        "exp_avgs": [moment(param, random(param, 0.05 * (1 + i % 3))) for i, param in enumerate(params)],
        "exp_avg_sqs": [moment(param, squares(param, 0.3 * (1 + i % 4))) for i, param in enumerate(params)],
        "steps": [torch.full((1,) * (i % 2), float(i % 5)) for i in range(n)],
        "maximize": (variant % 4 in (1, 2)) != case_maximizes,
        "weight_decays": weight_decays,
        "decoupled_weight_decay": variant % 2 == 0,
        "beta1": 0.8,
        "beta2": 0.95,
        "adam_eps": 1e-3,
        "lrs": [(0.02 if of_updates else [0.002, 0.2][i % 2]) * (1 + i % 4) for i in range(n)],
    }
    if variant % 4 > 1:
        arguments["lr_tensor"] = torch.tensor(0.37, dtype=torch.float64)
    if variant % 3 > 0:
        arguments["inv_scale"] = torch.tensor([0.25])
    if of_updates:  # some r are above 1, where clipping shows
        trust_coefs = [coef * [3, 100][i % 2] for i, coef in enumerate(trust_coefs)]
    arguments |= {**options, **({"trust_coefs": trust_coefs, "eps": eps} if measures else {})}
    if "ratios" in options or measures:
        ratio_dtype = ops.compute_dtype(grads[0].dtype, dtype)
        ratios = torch.rand(n, generator=generator, dtype=ratio_dtype) + 0.1
        arguments["ratios"] = ratios if "ratios" in options else torch.full_like(ratios, float("nan"))
    return arguments


def call(arguments, module=ops, **different):
    """Call adam_ with copies of what it writes. Return all arguments, as they are afterwards."""
    taken = {**arguments, **different}
    taken |= {name: [copied(x) for x in taken[name]] for name in (*WRITTEN, "grads")}
    if "trust_coefs" in taken:
        taken["ratios"] = taken["ratios"].clone()
    module.adam_(**taken)
    assert_all_equal(taken["grads"], {**arguments, **different}["grads"], "gradients are only read, layer")
    return taken


def in_two_calls(arguments, module=ops, decide=ops):
    """Take a step that measures ratios of updates in two calls. Return what it wrote, with the squared norms."""
    n, of_ratios = len(arguments["params"]), {"trust_coefs", "eps", "clip", "ratios"}
    first = {name: value for name, value in arguments.items() if name not in of_ratios}
    first |= {name: [copied(x) for x in arguments[name]] for name in WRITTEN}
    squared_norms = torch.full((2 * n,), float("nan"), dtype=torch.float64)
    module.adam_(**first, squared_norms=squared_norms)
    assert_all_equal(first["params"], arguments["params"], "parameters are not written yet, layer")
    ratios = decide.trust_ratios(
        *squared_norms.chunk(2),
        weight_decays=[0.0] * n,
        trust_coefs=arguments["trust_coefs"],
        eps=arguments["eps"],
        dtype=arguments["ratios"].dtype,
        clip=arguments.get("clip", False),
        lrs=[1.0] * n,
        of_updates=True,
    )
    moments = [x.clone() for name in WRITTEN[1:] for x in first[name]]
    module.adam_(**{**first, "grads": []}, ratios=ratios)
    assert_all_equal([x for name in WRITTEN[1:] for x in first[name]], moments, "the second call keeps state")
    return {**first, "ratios": ratios, "squared_norms": squared_norms}


def assert_same_results(actual, expected):
    """The same bits of everything that a step writes."""
    for name in WRITTEN:
        assert_same_bits(actual[name], expected[name], f"{name} of layer")
    if actual.get("ratios") is not None:
        assert_same_bits([actual["ratios"]], [expected["ratios"]], "ratios")


def assert_same_bits(ones, others, what):
    nan = [torch.where(x.isnan(), 0.125, x) for x in ones], [torch.where(x.isnan(), 0.125, x) for x in others]
    assert_all_equal([x.isnan() for x in ones], [x.isnan() for x in others], f"NaN of {what}")
    assert_all_equal(*nan, what)


def real(tensor):
    """Real and imaginary parts as numbers of their own, in float64."""
    tensor = tensor.resolve_conj()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def sizes_of(tensors):
    return [real(x).abs() for x in tensors]


def assert_rounded(actual, expected, terms, ulps, compute_dtype, what):
    """Assert that results equal expected ones to the rounding of their dtype, and ``ulps`` of the arithmetic.

    ULPs of the arithmetic are those of the terms of the sum that a result is: where these cancel, no arithmetic of
    finite precision gives the result to its own ULP.
    """
    a, e, size = (torch.cat([real(x).reshape(-1) for x in xs]) for xs in (actual, expected, terms))
    info = torch.finfo(actual[0].dtype)
    rounding = torch.maximum(e.abs(), torch.tensor(info.smallest_normal, dtype=torch.float64)) * info.eps
    same = (a == e) | (a.isnan() & e.isnan())
    off = (a - e).abs() - rounding
    bound = ulps * torch.finfo(compute_dtype).eps * size
    wrong = ~(same | (off <= bound))
    assert not bool(wrong.any()), f"{what}: {int(wrong.sum())} of {len(a)}, up to {(off / bound)[wrong].max() * ulps}"


def widened(tensors):
    return [x.resolve_conj().to(torch.promote_types(x.dtype, torch.float64), copy=True) for x in tensors]


def rest_of_step(arguments, state, ratios, **different):
    """The arguments of the reference for what is left of a step in float64, once the state is that of this step."""
    kept = ("weight_decays", "decoupled_weight_decay", "beta1", "beta2", "adam_eps", "lrs", "lr_tensor")
    rest = {name: arguments[name] for name in kept if name in arguments}
    rest |= {"maximize": False, "of_updates": True, "grads": [], "steps": [x.clone() for x in state["steps"]]}
    rest |= {name: widened(state[name]) for name in WRITTEN[1:3]}
    rest |= {"params": widened(arguments["params"]), "ratios": None if ratios is None else ratios.double()}
    rest |= different
    reference.adam_(**rest)
    return rest["params"]


def updates_of(arguments, state):
    """The updates u of a step in float64, as the reference has them of the state after the step."""
    n = len(arguments["params"])
    before = widened(arguments["params"])
    after = rest_of_step(arguments, state, None, lrs=[1.0] * n, lr_tensor=None)
    return [old - new for old, new in zip(before, after, strict=True)]


def assert_follows_the_reference(arguments, actual, ulps=4):
    """What a step wrote is what the reference makes of it. Ratios that it measured itself are checked, then given.

    The state is compared to that after a step of the reference; parameters and ratios of updates to those that the
    reference makes of the state as it was written, so that its rounding counts once. Updates of 16-bit moments that are
    not measured, or from gradients of another dtype, are those before they were rounded, as the reference has them in
    float64.
    """
    n, of_updates = len(arguments["params"]), arguments.get("of_updates", False)
    ratio_dtype = ops.compute_dtype(arguments["grads"][0].dtype, arguments["params"][0].dtype)
    compute_dtype = ops.compute_dtype(arguments["params"][0].dtype, arguments["params"][0].dtype)
    is_mixed = arguments["grads"][0].dtype != arguments["params"][0].dtype
    is_unrounded = arguments["exp_avgs"][0].dtype.itemsize == 2 and (
        is_mixed or not of_updates or "trust_coefs" not in arguments
    )
    of_state = arguments["exp_avgs"][0].dtype if is_mixed and not is_unrounded else compute_dtype
    measures, inv_scale = "trust_coefs" in arguments, arguments.get("inv_scale")
    given = {k: v for k, v in arguments.items() if k not in ("trust_coefs", "eps", "clip", "decayed_norm", "ratios")}
    if actual.get("ratios") is not None:
        given["ratios"] = actual["ratios"]
    expected = call(given, reference)
    absolute = {
        **given,
        "maximize": False,
        **{name: [copied(x) for x in sizes_of(given[name])] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")},
    }
    if given.get("ratios") is not None:
        absolute["ratios"] = given["ratios"].double()
    terms = call(absolute, reference)
    for name in ("exp_avgs", "exp_avg_sqs"):
        assert_rounded(actual[name], expected[name], terms[name], ulps, compute_dtype, name)
    assert_all_equal(actual["steps"], expected["steps"], "steps of layer")
    factors = actual.get("ratios") if of_updates else None
    state = sizes = actual
    if is_unrounded:
        wide = {name: widened(given[name]) for name in WRITTEN[:3]}
        state, sizes = call({**given, **wide, "ratios": absolute.get("ratios")}, reference), terms
    expected_params = rest_of_step(arguments, state, factors)
    largest = {
        "params": [-x for x in sizes_of(arguments["params"])],
        "exp_avgs": sizes_of(sizes["exp_avgs"]),
        "exp_avg_sqs": sizes_of(state["exp_avg_sqs"]),
        "weight_decays": [0.0] * n,
    }
    lengths = [-x for x in rest_of_step(arguments, state, factors, **largest)]  # |w| + |γsu|, but for its λw
    expected_params = [x.to(p.dtype) for x, p in zip(expected_params, arguments["params"], strict=True)]
    assert_rounded(actual["params"], expected_params, lengths, ulps, of_state, "params")
    if measures:
        is_wide, how = ratio_dtype == torch.float64, {}
        weight_decays = [0.0] * n
        if of_updates:
            others, params = reference.squared_norms(updates_of(arguments, state)), arguments["params"]
            how = {"of_updates": True, "lrs": [1.0] * n}
        else:
            how = {"lrs": arguments["lrs"], "lr_tensor": arguments.get("lr_tensor")}
            grads, params = arguments["grads"], arguments["params"]
            decays = [0.0] * n if arguments["decoupled_weight_decay"] else arguments["weight_decays"]
            if arguments.get("decayed_norm"):
                scales = [-decay if arguments["maximize"] else decay for decay in decays]
                others = reference.squared_norms(grads, others=params, scales=scales, inv_scale=inv_scale)
            else:
                others, weight_decays = reference.squared_norms(grads, inv_scale=inv_scale), decays
        ratios = reference.trust_ratios(
            reference.squared_norms(params),
            others,
            weight_decays=weight_decays,
            trust_coefs=arguments["trust_coefs"],
            eps=arguments["eps"],
            dtype=ratio_dtype,
            clip=arguments.get("clip", False),
            **how,
        )
        tolerance = 1e-15 if is_wide else 1.2e-7
        if of_updates:  # which are computed in the precision of the arithmetic
            tolerance = 1e-12 if of_state.itemsize == 8 and is_wide else 4 * torch.finfo(of_state).eps
            # Where the two terms of u cancel, as they may in layers of one element, u is less exact.
            plain = updates_of({**arguments, "weight_decays": [0.0] * n}, state)
            most = reference.squared_norms(plain).sqrt() / others.sqrt()
            tolerance = tolerance * most.nan_to_num(1.0, posinf=1.0).clamp(min=1.0)
        a, e = actual["ratios"].double(), ratios.double()
        wrong = ~((a == e) | (a.isnan() & e.isnan()) | ((a - e).abs() <= tolerance * e.abs()))
        assert not bool(wrong.any()), f"ratios: {int(wrong.sum())}, by {((a - e).abs() / e.abs())[wrong].max()}"


# Optimizers.

ADAMS = [(optim.Adam, torch.optim.Adam), (optim.AdamW, torch.optim.AdamW)]
adams = pytest.mark.parametrize(("ours_of", "theirs_of"), ADAMS, ids=["Adam", "AdamW"])
KEPT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
STATE_DTYPES = pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)


def groups_of(dtype=torch.float64, decays=DECAYS["decays"], lr=0.1, **second):
    """Two groups that differ in every hyper-parameter; of layers with scales of their own, one zero and one empty."""
    others = {"betas": (0.6, 0.7), "eps": 0.02, "lr": lr / 3, **second}
    return [
        {"params": layers(0, dtype), "weight_decay": decays[0]},
        {"params": layers(1, dtype), "weight_decay": decays[1], **others},
    ]


def pair(ours_of, theirs_of, dtype=torch.float64, decays=DECAYS["decays"], ours_alone=(), **options):
    """Our optimizer and torch's, over equal layers."""
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, **options}
    ours = ours_of(groups_of(dtype, decays), **options, **dict(ours_alone))
    return ours, theirs_of(groups_of(dtype, decays), **options)


def op_arguments(optimizer, index):
    """What adam_ is to be given for the next step of a group, as far as its layers have gradients."""
    group = optimizer.param_groups[index]
    params = [param for param in group["params"] if param.grad is not None]
    in_float32 = group.get("state_dtype") is not None
    n, state = len(params), optimizer.state

    def moments(name):
        return [
            state[p][name].clone()
            if p in state
            else torch.zeros_like(p, dtype=torch.float32 if in_float32 and p.dtype.itemsize == 2 else p.dtype)
            for p in params
        ]

    return {
        "params": [param.detach().clone() for param in params],
        "grads": [param.grad.clone() for param in params],
        "exp_avgs": [x.detach() for x in moments("exp_avg")],
        "exp_avg_sqs": [x.detach() for x in moments("exp_avg_sq")],
        "steps": [state[p]["step"].clone() if p in state else torch.zeros(()) for p in params],
        "maximize": group["maximize"],
        "weight_decays": [group["weight_decay"]] * n,
        "decoupled_weight_decay": group["decoupled_weight_decay"],
        "beta1": group["betas"][0],
        "beta2": group["betas"][1],
        "adam_eps": group["eps"],
        "lrs": [float(group["lr"])] * n,
    }


def results_of(optimizer, index):
    """The same, as a step left it."""
    params = [param for param in optimizer.param_groups[index]["params"] if param.grad is not None]
    states = [optimizer.state[param] for param in params]
    return {
        "params": [param.detach() for param in params],
        **{name + "s": [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")},
    }


def widen(theirs, ours):
    """Let torch's optimizer have what ours has, in float64."""
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        q.data.copy_(p.detach())
        q.grad = None if p.grad is None else p.grad.to(q.dtype)
        theirs.state.pop(q, None)
        if p in ours.state:
            theirs.state[q] = {
                name: value.clone() if name == "step" else value.to(q.dtype) for name, value in ours.state[p].items()
            }


def train_with_overflows(build, if_skipped=lambda optimizer: None, if_taken=lambda optimizer, plain: None):
    """Train under a scaler with overflows in steps 0 and 3, beside steps without one; ``build(parameters)`` is taken.

    A step that is skipped leaves parameters and state as they were; of the first one it begins state, by zeros.
    """
    model, same = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer, plain = build(model.parameters()), build(same.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(6):
        overflows = step in (0, 3)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if overflows:
            model[2].bias.grad[0] = float("inf")
        before = copy.deepcopy(([*model.parameters()], optimizer.state_dict()["state"]))
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert all(map(torch.equal, before[0], model.parameters()))
            for index, state in optimizer.state_dict()["state"].items():
                assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
                for name, value in state.items():
                    assert torch.equal(value, before[1][index][name] if step else torch.zeros_like(value))
            if_skipped(optimizer)
        else:
            plain.zero_grad()
            loss_of(same, step).backward()
            plain.step()
            assert_same(optimizer, plain)  # a power of two leaves no trace
            if_taken(optimizer, plain)
