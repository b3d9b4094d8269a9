"""The reference against numbers worked by hand. All else is checked against the reference."""

import pytest
import torch
from calls import scale_gradients, sgd
from closeness import assert_within_ulps

from torchlars import reference

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("maximize", "expected"), [(False, [0.0225, 0.03]), (True, [0.0075, 0.01])])
def test_formula_by_hand(dtype, maximize, expected):
    # ‖w‖ = 5, ‖g‖ = 1, so r = 0.01·5 / (1 + 0.1·5 + 0.5) = 0.025, and λw = (0.3, 0.4).
    param, grad = torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([0.6, 0.8], dtype=dtype)
    ratios = scale_gradients([grad], [param], [0.1], [0.01], [0.5], maximize, module=reference)
    assert_within_ulps(ratios, torch.tensor([0.025], dtype=dtype), 1)
    assert_within_ulps(grad, torch.tensor(expected, dtype=dtype), 4)


def test_every_layer_has_its_own_norms_and_hyper_parameters():
    params = [torch.tensor([[3.0], [4.0]]), torch.tensor([12.0, 5.0])]  # norms 5 and 13
    grads = [torch.tensor([[0.0], [2.0]]), torch.tensor([8.0, -6.0])]  # norms 2 and 10
    ratios = scale_gradients(grads, params, [0.2, 0.0], [0.4, 0.5], [1.0, 3.0], False, module=reference)
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
    ratios = scale_gradients([grad], [torch.tensor(param)], [0.5], [0.001], [1e-8], False, module=reference)
    assert ratios.tolist() == [1.0]
    assert grad.tolist() == adapted


@pytest.mark.parametrize(("param", "grad"), [(float("nan"), 1.0), (1.0, float("nan")), (0.0, float("nan"))])
def test_nan_is_never_a_ratio_of_one(param, grad):
    norms = torch.tensor([param], dtype=torch.float64), torch.tensor([grad], dtype=torch.float64)
    hyper = {"weight_decays": [0.1], "trust_coefs": [1.0], "eps": [0.0]}
    assert reference.trust_ratios(*norms, **hyper, dtype=torch.float32).isnan().all()


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
    hyper, scale = ([0.1], [0.01], [0.5], maximize), torch.tensor(0.375)
    ratios = scale_gradients([grad], [param], *hyper, inv_scale=scale, module=reference)
    assert_within_ulps(ratios, torch.tensor([0.025], dtype=dtype), 1)
    assert_within_ulps(grad, torch.tensor(expected, dtype=dtype), 4)


def test_norms_of_scaled_tensors_by_hand():
    tensors, others = [torch.tensor([4.0, 0.0]), torch.tensor([3.0, 4.0])], [torch.tensor([2.0, 8.0])] * 2
    half = torch.tensor([0.5])

    def norms_of_sums(scales):
        return reference.squared_norms(tensors, others=others, scales=scales, inv_scale=half)

    assert reference.squared_norms(tensors, inv_scale=half).tolist() == [4.0, 6.25]
    # 0.5·(4, 0) + 0.5·(2, 8) = (3, 4), and 0.5·(3, 4) alone; then 0.5·(4, 0) − (2, 8) = (0, −8), (1.5, 2) − (2, 8)
    assert norms_of_sums([0.5, 0.0]).tolist() == [25.0, 6.25]
    assert norms_of_sums([-1.0, -1.0]).tolist() == [64.0, 36.25]


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
    how = {"maximize": maximize, "nesterov": nesterov, "ratios": torch.tensor([2.0], dtype=torch.float64)}
    numbers = {"weight_decays": [0.1], "lrs": [0.1], "momentums": [0.5], "dampenings": [0.25]}
    reference.sgd_([param], [grad], [buffer], **how, **numbers, inv_scale=torch.tensor(0.5))
    assert buffer.item() == pytest.approx(momentum, rel=1e-14)
    assert param.item() == pytest.approx(after, rel=1e-14)
    assert grad.item() == 6.0


def test_a_skipped_step_by_hand():
    # Where inv_scale is 0 no gradient has a length: r = 1, clipped at γ = 4 to 1/4, and nothing is written.
    params, grads, skip = [torch.tensor([3.0, 4.0])] * 2, [torch.tensor([float("inf"), 1.0])] * 2, torch.zeros(())
    assert reference.squared_norms(grads, inv_scale=skip).tolist() == [0.0, 0.0]
    sums = {"others": params, "scales": [0.5, 0.0]}
    assert reference.squared_norms(grads, **sums, inv_scale=skip).tolist() == [0.0, 0.0]
    how = {"weight_decays": [0.1, 0.1], "trust_coefs": [0.01, 0.01], "eps": [0.0, 0.0], "maximize": False}
    how |= {"lrs": [0.5, 4.0], "decayed_norm": True, "clip": True, "lr_in_momentum": True, "inv_scale": skip}
    ratios = scale_gradients(grads, params, **how, module=reference)
    assert ratios.tolist() == [1.0, 0.25]
    how |= {"params": params, "grads": grads, "momentum_buffers": [], "momentums": [0.0] * 2, "dampenings": [0.0] * 2}
    ratios = sgd(**how, module=reference)
    assert ratios.tolist() == [1.0, 0.25]
    assert params[0].tolist() == [3.0, 4.0]
    assert grads[0].tolist() == [float("inf"), 1.0]


def test_float16_norms_do_not_overflow():
    # ‖w‖ = 1000·√10000 = 100,000, which float16 cannot hold; ‖g‖ = 100, so r = 0.001·1e5 / (100 + 1e-4·1e5) = 100/110.
    param, grad = torch.full((10000,), 1000.0).half(), torch.ones(10000).half()
    ratios = scale_gradients([grad], [param], [1e-4], [0.001], [0.0], False, module=reference)
    assert_within_ulps(ratios, torch.tensor([100 / 110]), 1)
    assert_within_ulps(grad[:1], torch.tensor([1.1 * 100 / 110]).half(), 1)


def test_half_results_are_rounded_once():
    # In bfloat16, 1 + λw = 1.00390625 would round to 1; rounded only at the end, r times it is 1.5058…, nearest 1.5078125.
    param, grad = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).bfloat16()
    reference.scale_gradients_([grad], [param], maximize=False, weight_decays=[0.00390625], ratios=torch.tensor([1.5]))
    assert grad.item() == 1.5078125
