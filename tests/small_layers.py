"""Layers small enough to work with by hand, and what LARS makes of them."""

import torch
from torch import nn


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def layer(dtype=torch.float64, grad=True):
    """A parameter of norm 5 whose gradient has norm 0.5."""
    param = nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))
    if grad:
        param.grad = torch.tensor([-0.4, 0.3], dtype=dtype)
    return param


def trust_ratio(weight_decay=0.0, trust_coef=0.001):
    """That layer's."""
    return trust_coef * 5 / (0.5 + weight_decay * 5 + 1e-8)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-12, atol=0)


def sparse_rows(param):
    values = torch.randn(2, *param.shape[1:], dtype=param.dtype)
    with torch.sparse.check_sparse_tensor_invariants(True):  # says so, else torch warns
        param.grad = torch.sparse_coo_tensor([[1, 3]], values, param.shape)
