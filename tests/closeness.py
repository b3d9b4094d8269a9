"""Comparison in units of the last place, which says the same for every dtype."""

import torch
from torch import Tensor


def assert_within_ulps(actual: Tensor, expected: Tensor, ulps: float, message: str = "") -> None:
    """Assert equality to a number of ULPs of each expected value; NaN equals NaN, infinities only themselves."""
    assert actual.dtype == expected.dtype, message
    assert actual.shape == expected.shape, message
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    info = torch.finfo(expected.dtype)
    a, e = actual.double(), expected.double()
    same = (a == e) | (a.isnan() & e.isnan())
    unit = torch.maximum(e.abs(), torch.tensor(info.smallest_normal, dtype=torch.float64)) * info.eps
    close = same | ((a - e).abs() <= ulps * unit)
    worst = ((a - e).abs() / unit)[~close]
    assert bool(close.all()), f"{message}: {len(worst)} of {close.numel()} differ, by up to {worst.max():.1f} ULP"
