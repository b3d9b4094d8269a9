"""Comparison to the bit and in units of the last place, which says the same for every dtype.

Of many tensors at once: a GPU is waited for once for each list, not once for each layer.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All elements one after the other, on the CPU."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).resolve_conj().cpu()


def assert_within_ulps(actual: Tensor, expected: Tensor, ulps: float, message: str = "") -> None:
    """Assert equality to a number of ULPs of each expected value; NaN equals NaN, infinities only themselves."""
    assert_all_within_ulps([actual], [expected], ulps, message)


def assert_all_within_ulps(actual: Sequence[Tensor], expected: Sequence[Tensor], ulps: float, what: str) -> None:
    """Assert ``assert_within_ulps`` of each pair of two lists. The message lists the indices of those that differ."""
    assert [x.dtype for x in actual] == [x.dtype for x in expected], what
    assert [x.shape for x in actual] == [x.shape for x in expected], what
    a, e = joined(actual), joined(expected)
    if e.is_complex():
        a, e = torch.view_as_real(a), torch.view_as_real(e)
    info = torch.finfo(e.dtype)
    a, e = a.double(), e.double()
    same = (a == e) | (a.isnan() & e.isnan())
    unit = torch.maximum(e.abs(), torch.tensor(info.smallest_normal, dtype=torch.float64)) * info.eps
    close = same | ((a - e).abs() <= ulps * unit)
    if not bool(close.all()):
        worst = ((a - e).abs() / unit)[~close]
        where = _where(~close.reshape(len(close), -1).all(1), expected)
        raise AssertionError(f"{what}{where}: {len(worst)} of {close.numel()} differ, by up to {worst.max():.1f} ULP")


def assert_all_equal(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Assert ``torch.equal`` of each two tensors. The message numbers those that differ."""
    assert [x.dtype for x in actual] == [x.dtype for x in expected], what
    assert [x.shape for x in actual] == [x.shape for x in expected], what
    differs = joined(actual) != joined(expected)  # NaN differs from NaN
    if bool(differs.any()):
        where = _where(differs, expected)
        raise AssertionError(f"{what}{where}: {int(differs.sum())} of {differs.numel()} elements differ")


def _where(differs: Tensor, tensors: Sequence[Tensor]) -> str:
    """Number the tensors in which joined elements differ."""
    if len(tensors) == 1:
        return ""
    ends = torch.tensor(list(accumulate(x.numel() for x in tensors)))
    numbers = torch.bucketize(differs.nonzero().reshape(-1), ends, right=True).unique().tolist()
    return f" {', '.join(map(str, numbers[:10]))}{', ...' if len(numbers) > 10 else ''}"


def close(a: Tensor, b: Tensor, tolerance: float, message: str) -> None:
    """Assert that two tensors are close, of which either may be sparse."""
    a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
    alike = a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
    if alike and torch.allclose(a, b, rtol=tolerance, atol=tolerance):
        return  # five times faster than the function that can say what differs
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{message}: {text}")
