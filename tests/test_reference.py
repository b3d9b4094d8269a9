"""The reference against numbers worked by hand. All else is checked against the reference."""

import pytest
import torch
from closeness import assert_within_ulps

from torchlars import reference

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("maximize", "expected"), [(False, [0.0225, 0.03]), (True, [0.0075, 0.01])])
def test_formula_by_hand(dtype, maximize, expected):
    # ‖w‖ = 5, ‖g‖ = 1, so r = 0.01·5 / (1 + 0.1·5 + 0.5) = 0.025, and λw = (0.3, 0.4).
    param, grad = torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([0.6, 0.8], dtype=dtype)
    ratios = reference.scale_by_trust_ratios_([grad], [param], [0.1], [0.01], [0.5], maximize)
    assert_within_ulps(ratios, torch.tensor([0.025], dtype=dtype), 1)
    assert_within_ulps(grad, torch.tensor(expected, dtype=dtype), 4)


def test_every_layer_has_its_own_norms_and_hyper_parameters():
    params = [torch.tensor([[3.0], [4.0]]), torch.tensor([12.0, 5.0])]  # norms 5 and 13
    grads = [torch.tensor([[0.0], [2.0]]), torch.tensor([8.0, -6.0])]  # norms 2 and 10
    ratios = reference.scale_by_trust_ratios_(grads, params, [0.2, 0.0], [0.4, 0.5], [1.0, 3.0], False)
    # 0.4·5 / (2 + 0.2·5 + 1) = 0.5 and 0.5·13 / (10 + 0 + 3) = 0.5
    assert ratios.tolist() == [0.5, 0.5]
    assert_within_ulps(grads[0], torch.tensor([[0.3], [1.4]]), 2)
    assert grads[1].tolist() == [4.0, -3.0]


@pytest.mark.parametrize(
    ("param", "grad", "adapted"),
    [
        ([0.0, 0.0], [3.0, 4.0], [3.0, 4.0]),
        ([3.0, 4.0], [0.0, 0.0], [1.5, 2.0]),  # 1 · (0 + 0.5·w)
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_ratio_is_one_where_a_norm_is_zero(param, grad, adapted):
    grad = torch.tensor(grad)
    ratios = reference.scale_by_trust_ratios_([grad], [torch.tensor(param)], [0.5], [0.001], [1e-8], False)
    assert ratios.tolist() == [1.0]
    assert grad.tolist() == adapted


@pytest.mark.parametrize(("param", "grad"), [(float("nan"), 1.0), (1.0, float("nan")), (0.0, float("nan"))])
def test_nan_is_never_a_ratio_of_one(param, grad):
    norms = torch.tensor([param], dtype=torch.float64), torch.tensor([grad], dtype=torch.float64)
    assert reference.trust_ratios(*norms, [0.1], [1.0], [0.0], torch.float32).isnan().all()


def test_squared_norms_by_hand():
    tensors = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(5.0), torch.empty(0, 7)]
    norms = reference.squared_norms(tensors)
    assert norms.tolist() == [30.0, 25.0, 0.0]
    assert norms.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("maximize", "expected"), [(False, [0.0225, 0.03]), (True, [0.0075, 0.01])])
def test_scaled_gradients_by_hand(dtype, maximize, expected):
    # 0.375·g = (0.6, 0.8), so that all is as above: r = 0.01·5 / (1 + 0.1·5 + 0.5) = 0.025, and λw = (0.3, 0.4).
    param, grad = torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([1.6, 6.4 / 3], dtype=dtype)
    hyper, dialect = ([0.1], [0.01], [0.5], maximize), ((), None, False, False, False)
    ratios = reference.scale_by_trust_ratios_([grad], [param], *hyper, *dialect, torch.tensor(0.375))
    assert_within_ulps(ratios, torch.tensor([0.025], dtype=dtype), 1)
    assert_within_ulps(grad, torch.tensor(expected, dtype=dtype), 4)


def test_norms_of_scaled_tensors_by_hand():
    tensors, others = [torch.tensor([4.0, 0.0]), torch.tensor([3.0, 4.0])], [torch.tensor([2.0, 8.0])] * 2
    half = torch.tensor([0.5])
    assert reference.squared_norms(tensors, half).tolist() == [4.0, 6.25]
    # 0.5·(4, 0) + 0.5·(2, 8) = (3, 4), and 0.5·(3, 4) alone; then 0.5·(4, 0) − (2, 8) = (0, −8), (1.5, 2) − (2, 8)
    assert reference.squared_norms_of_sums(tensors, others, [0.5, 0.0], half).tolist() == [25.0, 6.25]
    assert reference.squared_norms_of_sums(tensors, others, [-1.0, -1.0], half).tolist() == [64.0, 36.25]


@pytest.mark.parametrize(
    ("nesterov", "maximize", "momentum", "after"),
    [
        (False, False, 5.15, 0.485),  # d = 2·(0.5·6 + 0.1·1) = 6.2, m = 0.5·1 + 0.75·d, w = 1 − 0.1·m
        (True, False, 5.15, 0.1225),  # w = 1 − 0.1·(d + 0.5·m)
        (False, True, -3.85, 1.385),  # d = 2·(−0.5·6 + 0.1·1) = −5.8
    ],
)
def test_sgd_of_scaled_gradients_by_hand(nesterov, maximize, momentum, after):
    param, grad, buffer = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 6.0, 1.0))
    ratios, numbers = torch.tensor([2.0], dtype=torch.float64), ([0.1], [0.1], [0.5], [0.25])
    reference.sgd_([param], [grad], [buffer], ratios, *numbers, nesterov, maximize, None, torch.tensor(0.5))
    assert buffer.item() == pytest.approx(momentum, rel=1e-14)
    assert param.item() == pytest.approx(after, rel=1e-14)
    assert grad.item() == 6.0


def test_a_skipped_step_by_hand():
    # Where inv_scale is 0 no gradient has a length: r = 1, clipped at γ = 4 to 1/4, and nothing is written.
    params, grads, skip = [torch.tensor([3.0, 4.0])] * 2, [torch.tensor([float("inf"), 1.0])] * 2, torch.zeros(())
    assert reference.squared_norms(grads, skip).tolist() == [0.0, 0.0]
    assert reference.squared_norms_of_sums(grads, params, [0.5, 0.0], skip).tolist() == [0.0, 0.0]
    hyper = [0.1, 0.1], [0.01, 0.01], [0.0, 0.0]
    ratios = reference.scale_by_trust_ratios_(
        grads, params, *hyper, False, [0.5, 4.0], None, True, True, True, inv_scale=skip
    )
    assert ratios.tolist() == [1.0, 0.25]
    sgd = [0.5, 4.0], [0.0, 0.0], [0.0, 0.0], False, False
    ratios = reference.lars_sgd_(params, grads, [], *hyper, *sgd, None, True, True, True, inv_scale=skip)
    assert ratios.tolist() == [1.0, 0.25]
    assert params[0].tolist() == [3.0, 4.0]
    assert grads[0].tolist() == [float("inf"), 1.0]


def test_float16_norms_do_not_overflow():
    # ‖w‖ = 1000·√10000 = 100,000, which float16 cannot hold; ‖g‖ = 100, so r = 0.001·1e5 / (100 + 1e-4·1e5) = 100/110.
    param, grad = torch.full((10000,), 1000.0).half(), torch.ones(10000).half()
    ratios = reference.scale_by_trust_ratios_([grad], [param], [1e-4], [0.001], [0.0], False)
    assert_within_ulps(ratios, torch.tensor([100 / 110]), 1)
    assert_within_ulps(grad[:1], torch.tensor([1.1 * 100 / 110]).half(), 1)


def test_half_results_are_rounded_once():
    # In bfloat16, 1 + λw = 1.00390625 would round to 1; rounded only at the end, r times it is 1.5058…, nearest 1.5078125.
    param, grad = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).bfloat16()
    reference.apply_trust_ratios_([grad], [param], torch.tensor([1.5]), [0.00390625], False)
    assert grad.item() == 1.5078125
