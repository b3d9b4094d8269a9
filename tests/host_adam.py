"""Steps of Adam by the CUDA kernels' own source on a CPU, and what the reference says of them.

The reference computes in float64 and the kernels in float32, so that each element may differ by the roundings of its
own terms. Their sizes are known: what is compared differs by a few of them at most, beside the one of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from host_driver import (
    ADAM,
    LAMB,
    LAMB_IN_TWO_PARTS,
    LARS_ADAM,
    ORDERS,
    QUARTER,
    SKIP,
    THIRD,
    Case,
    Output,
    Way,
    compare,
    momenta_of,
    ratio_rtol,
    to_bytes,
    to_input,
)
from torch import Tensor

from torchlars import reference


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(torch.float64, copy=True) for tensor in tensors]


@dataclass
class State:
    """What Adam keeps of all layers."""

    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    def wide(self) -> State:
        return State(wide(self.exp_avgs), wide(self.exp_avg_sqs), [step.clone() for step in self.steps])


@dataclass
class Result:
    params: list[Tensor]
    state: State
    param_squared_norms: Tensor
    update_squared_norms: Tensor
    ratios: Tensor

    def bits(self) -> list[bytes]:
        tensors = (self.params, self.state.exp_avgs, self.state.exp_avg_sqs, self.state.steps, [self.ratios])
        return [to_bytes(each) for each in tensors]


def adam_ways(dtype: torch.dtype) -> list[Way]:
    """Return every op with every kind of ratios, moments and weight decay; and the flags in turn."""
    moments = [dtype, torch.float32] if dtype.itemsize == 2 else [dtype]
    ops = [
        (ADAM, False, False),
        (ADAM, True, False),
        (ADAM, True, True),
        (LARS_ADAM, False, False),
        (LAMB, False, True),
    ]
    ways = []
    for i, (moment, decoupled, (op, has_ratios, of_updates)) in enumerate(product(moments, (True, False), ops)):
        way = Way(
            op,
            order=ORDERS[i % 3],
            maximize=i % 4 >= 2,
            momentum=moment,
            has_ratios=has_ratios,
            has_lr_tensor=i % 2 == 1,
            decayed_norm=op == LARS_ADAM and i % 4 == 0,
            clip=op in (LARS_ADAM, LAMB) and not decoupled,
            of_updates=of_updates,
            decoupled=decoupled,
        )
        ways += [way, replace(way, op=LAMB_IN_TWO_PARTS, order=ORDERS[(i + 1) % 3])] if op == LAMB else [way]
    return ways


def scaled_adam_ways(dtype: torch.dtype) -> list[Way]:
    """Return the same of scaled gradients."""
    inverses = (QUARTER, SKIP, THIRD, SKIP)
    return [replace(way, inverse=inverses[(i // 2) % 4]) for i, way in enumerate(adam_ways(dtype))]


ADAM_WAYS = {"plain": adam_ways, "of scaled gradients": scaled_adam_ways}


def numbers_of(way: Way) -> dict[str, float]:
    beta1, beta2, eps = (0.5, 0.9, 1e-3) if way.maximize else (0.9, 0.99, 1e-8)
    return {"beta1": beta1, "beta2": beta2, "adam_eps": eps}


def state_of(case: Case, way: Way) -> State:
    random = torch.Generator().manual_seed(2)
    squares = [
        (0.1 + i % 3) * layer.momentum_scale * torch.randn(layer.numel, generator=random, dtype=torch.float64).square()
        for i, layer in enumerate(case.layers)
    ]
    steps = [torch.tensor([(0.0, 1.0, 7.0, 1000.0)[i % 4]]) for i in range(len(squares))]
    return State(momenta_of(case, way), [square.to(way.momentum) for square in squares], steps)


def execute_adam(driver: Path, case: Case, ways: list[Way]) -> list[Result]:
    """Run the kernels of a driver on a case, in several ways."""
    inputs = []
    for way in ways:
        state = state_of(case, way)
        numbers = np.array(list(numbers_of(way).values())).tobytes()
        inputs.append(to_input(case, way, to_bytes(state.exp_avg_sqs) + to_bytes(state.steps) + numbers))
    output = Output(driver, case, inputs)
    results = []
    for way in ways:
        name, sizes = f"{case.name}, {case.dtype}, {way}", [layer.numel for layer in case.layers]
        params, grads, exp_avgs = ([output.take(n, t) for n in sizes] for t in (case.dtype, case.dtype, way.momentum))
        norms = [output.take(len(sizes), torch.float64) for _ in range(2)]
        ratios = output.take(len(sizes), reference.compute_dtype(case.dtype, case.dtype))
        state = State(
            exp_avgs, [output.take(n, way.momentum) for n in sizes], [output.take(1, torch.float32) for _ in sizes]
        )
        results.append(Result(params, state, *norms, ratios))
        assert to_bytes(grads) == to_bytes(case.grads), f"{name}: a gradient was written"
        assert not way.has_ratios or to_bytes([ratios]) == to_bytes([case.ratios(way)]), f"{name}: ratios were written"
    assert output.is_taken()
    return results


def check_adam(case: Case, ways: list[Way], results: list[Result]) -> None:
    """Compare steps of Adam with the reference. Two calls must have the bits of one."""
    one_call: list[bytes] = []
    for way, result in zip(ways, results, strict=True):
        if way.inverse == SKIP:
            check_skipped(case, way, result)
        else:
            check_updates(case, way, result, *check_moments(case, way, result))
        if way.op == LAMB_IN_TWO_PARTS and one_call:
            assert result.bits() == one_call, f"two calls differ from one: {case.name}, {case.dtype}, {way}"
        one_call = result.bits() if way.op == LAMB else []


def check_skipped(case: Case, way: Way, result: Result) -> None:
    before = state_of(case, way)
    unwritten = Result(case.params, before, *[result.param_squared_norms] * 2, result.ratios)
    assert result.bits() == unwritten.bits(), f"a skipped step was written: {case.name}, {case.dtype}, {way}"
    if way.op == LARS_ADAM:
        compare(
            "ratios", case, way, result.ratios, ratios_of_gradients(case, way), rtol=ratio_rtol(result.ratios.dtype)
        )
    elif way.op in (LAMB, LAMB_IN_TWO_PARTS):
        assert (result.ratios == 1).all(), f"ratios of a skipped step: {case.name}, {case.dtype}, {way}"
    if way.op == LAMB_IN_TWO_PARTS:
        norms = torch.stack([result.param_squared_norms, result.update_squared_norms])
        assert (norms == 0).all(), f"norms of a skipped step: {case.name}, {case.dtype}, {way}"


def call(case: Case, way: Way, params: list[Tensor], grads: list[Tensor], state: State, **arguments: object) -> None:
    reference.adam_(
        params,
        grads,
        state.exp_avgs,
        state.exp_avg_sqs,
        state.steps,
        maximize=way.maximize,
        weight_decays=case.weight_decays,
        decoupled_weight_decay=way.decoupled,
        **numbers_of(way),
        lrs=case.lrs,
        lr_tensor=case.lr_tensor if way.has_lr_tensor else None,
        of_updates=way.of_updates or not grads,
        inv_scale=way.inv_scale,
        **arguments,
    )


def ratios_of_gradients(case: Case, way: Way) -> Tensor:
    ratios = torch.empty(len(case.layers), dtype=reference.compute_dtype(case.dtype, case.dtype))
    params, measured = [param.clone() for param in case.params], {"trust_coefs": case.trust_coefs, "eps": case.eps}
    call(
        case,
        way,
        params,
        case.grads,
        state_of(case, way),
        ratios=ratios,
        **measured,
        clip=way.clip,
        decayed_norm=way.decayed_norm,
    )
    return ratios


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors).double()


def of_elements(case: Case, numbers: Tensor | list[float] | float) -> Tensor:
    """Return numbers of layers as numbers of elements."""
    sizes = torch.tensor([layer.numel for layer in case.layers])
    return torch.as_tensor(numbers, dtype=torch.float64).expand(len(sizes)).repeat_interleave(sizes)


def assert_within(
    what: str, case: Case, way: Way, got: Tensor, exact: Tensor, roundings: Tensor, terms: list[Tensor]
) -> None:
    """Compare numbers with exact ones, up to roundings and that of the result.

    Where float32 is left by a term, on the way to a result that float32 holds, anything goes.
    """
    info, real = torch.finfo(got.dtype), torch.finfo(reference.compute_dtype(case.dtype, case.dtype))
    last = exact.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2
    same = (got.double() == exact.to(got.dtype).double()) | (got.isnan() & exact.isnan())
    beyond = torch.stack([(term.abs() > real.max / 64) & term.isfinite() for term in terms]).any(0)
    close = same | ((got.double() - exact).abs() <= roundings + last) | beyond
    first = int((~close).nonzero()[0]) if not close.all() else 0
    assert close.all(), (
        f"{what} differ: {case.name}, {case.dtype}, {way}: {int((~close).sum())} of {close.numel()}, the first at "
        f"{first}: {float(got[first])!r} instead of {float(exact[first])!r}"
    )


def decays_of(case: Case, decays: bool) -> list[Tensor]:
    """Return the decays of all parameters, zeros where there is none."""
    factors = [weight_decay * decays for weight_decay in case.weight_decays]
    return [
        factor * param.double() if factor else torch.zeros_like(param, dtype=torch.float64)
        for factor, param in zip(factors, case.params, strict=True)
    ]


def check_moments(case: Case, way: Way, result: Result) -> tuple[State, list[Tensor]]:
    """Compare with moments in float64. Return these, and what both may be off by before they are rounded."""
    before, expected = state_of(case, way), state_of(case, way).wide()
    params, grads = wide(case.params), wide(case.grads)
    ratios = result.ratios if way.op == LARS_ADAM or way.has_ratios else None
    if way.op == LARS_ADAM:
        compare(
            "ratios", case, way, result.ratios, ratios_of_gradients(case, way), rtol=ratio_rtol(result.ratios.dtype)
        )
    call(case, way, params, grads, expected, ratios=None if ratios is None else ratios.double())
    assert result.state.steps == expected.steps, f"steps differ: {case.name}, {case.dtype}, {way}"

    real = torch.finfo(reference.compute_dtype(case.dtype, case.dtype))
    least, numbers = real.smallest_normal * real.eps, numbers_of(way)
    factor = of_elements(case, 1.0 if ratios is None or way.of_updates else ratios)
    terms = [joined(case.grads) * (way.inverse or 1.0), joined(decays_of(case, not way.decoupled))]
    direction = factor.abs() * (terms[0].abs() + terms[1].abs()) + least * (1 + factor.abs())
    old = numbers["beta1"] * joined(before.exp_avgs).abs(), numbers["beta2"] * joined(before.exp_avg_sqs)
    sizes = old[0] + (1 - numbers["beta1"]) * direction, old[1] + (1 - numbers["beta2"]) * direction.square()
    moments = (result.state.exp_avgs, expected.exp_avgs), (result.state.exp_avg_sqs, expected.exp_avg_sqs)
    all_roundings = []
    for what, (got, exact), size in zip(("first moments", "second moments"), moments, sizes, strict=True):
        roundings = 10 * real.eps * size + least * (4 + direction)
        all_roundings.append(roundings)
        assert_within(
            what, case, way, torch.cat(got), joined(exact), roundings, [*terms, direction, direction.square()]
        )
    return expected, all_roundings


def check_updates(case: Case, way: Way, result: Result, exact: State, of_moments: list[Tensor]) -> None:
    """Compare with updates of the moments as they are stored, which ``check_moments`` has compared.

    Those of 16-bit moments that are not measured are updates of the moments before they were rounded, which are
    ``exact`` up to ``of_moments``.
    """
    stored, layers = result.state.wide(), len(case.layers)
    are_unrounded = way.momentum.itemsize == 2 and way.op in (ADAM, LARS_ADAM)
    if are_unrounded:
        stored = exact
    real = torch.finfo(reference.compute_dtype(case.dtype, case.dtype))
    expected = wide(case.params)
    unit = [torch.zeros_like(param) for param in expected]  # loses the update itself, without decay
    numbers, steps = numbers_of(way), joined(stored.steps)
    corrections = [of_elements(case, 1 - numbers[beta] ** steps) for beta in ("beta1", "beta2")]
    numerators = joined(stored.exp_avgs) / corrections[0]
    roots = (joined(stored.exp_avg_sqs) / corrections[1]).sqrt()
    reference.adam_(
        unit,
        [],
        stored.exp_avgs,
        stored.exp_avg_sqs,
        stored.steps,
        maximize=way.maximize,
        weight_decays=case.weight_decays,
        decoupled_weight_decay=way.decoupled,
        **numbers,
        lrs=[1.0] * layers,
        of_updates=True,
    )
    params, decays = joined(case.params), decays_of(case, way.decoupled)
    terms = [params, numerators, roots, joined(unit), joined(decays)]
    least = real.smallest_normal * real.eps * (1 + 1 / (roots + numbers["adam_eps"]))
    roundings = 10 * real.eps * (joined(unit).abs() + joined(decays).abs()) + 4 * least
    if are_unrounded:
        of_numerators, of_squares = (off / by for off, by in zip(of_moments, corrections, strict=True))
        least_roots = (roots.square() - of_squares).clamp(min=0).sqrt()
        of_roots = joined(unit).abs() * (roots - least_roots)
        roundings = roundings + (of_numerators + of_roots) / (least_roots + numbers["adam_eps"])
        terms += [joined(stored.exp_avgs), joined(stored.exp_avg_sqs)]
    updates = [decay - lost for lost, decay in zip(unit, decays, strict=True)]
    if way.op in (LAMB, LAMB_IN_TWO_PARTS):
        check_norms(case, way, result, updates, roundings, terms)

    ratios = result.ratios.double() if way.of_updates else None
    call(case, way, expected, [], stored, ratios=ratios)
    lrs = of_elements(case, case.lrs) * (case.lr_tensor if way.has_lr_tensor else 1.0)
    factor = (lrs * of_elements(case, 1.0 if ratios is None else ratios)).abs()
    sizes = joined(updates).abs()
    roundings = real.eps * params.abs() + factor * (roundings + 2 * real.eps * sizes) + real.smallest_normal * real.eps
    terms = [*terms, factor, factor * sizes]
    assert_within("parameters", case, way, torch.cat(result.params), joined(expected), roundings, terms)


def check_norms(
    case: Case, way: Way, result: Result, updates: list[Tensor], roundings: Tensor, terms: list[Tensor]
) -> None:
    """Compare squared norms of parameters and updates, and trust ratios that were decided from them."""
    sizes = [layer.numel for layer in case.layers]
    exact = reference.squared_norms(case.params), reference.squared_norms(updates)
    least = torch.finfo(torch.float64).smallest_normal
    real = torch.finfo(reference.compute_dtype(case.dtype, case.dtype))
    of_updates = (2 * joined(updates).abs() + roundings) * roundings
    allowed = (
        (2.0**-23 if case.dtype.itemsize == 2 else 1e-13) * exact[0],
        torch.stack([part.sum() for part in of_updates.split(sizes)]) + 1e-13 * exact[1] + least,
    )
    beyond = torch.stack([(term.abs() > real.max / 64) & term.isfinite() for term in terms]).any(0)
    counted = torch.tensor([not part.any() for part in beyond.split(sizes)])
    if way.op == LAMB_IN_TWO_PARTS:
        got = result.param_squared_norms, result.update_squared_norms
        for what, norms, known, error in zip(("params", "updates"), got, exact, allowed, strict=True):
            same = (norms == known) | (norms.isnan() & known.isnan()) | ((norms - known).abs() <= error) | ~counted
            assert same.all(), f"squared norms of {what} differ: {case.name}, {case.dtype}, {way}: {norms} {known}"
    ratios = reference.trust_ratios(
        *exact,
        weight_decays=[0.0] * len(sizes),
        trust_coefs=case.trust_coefs,
        eps=case.eps,
        dtype=torch.float64,
        clip=way.clip,
        lrs=[1.0] * len(sizes),
        of_updates=True,
    )
    error = ratios * (
        ratio_rtol(result.ratios.dtype)
        + 0.6 * sum(a / torch.where(e == 0, 1.0, e) for a, e in zip(allowed, exact, strict=True))
    )
    got = result.ratios.double()
    same = (got == ratios.to(result.ratios.dtype)) | (got.isnan() & ratios.isnan()) | ((got - ratios).abs() <= error)
    assert (same | ~counted).all(), f"ratios differ: {case.name}, {case.dtype}, {way}: {got} {ratios}"
