"""The reference against numbers worked by hand. All else is checked against the reference."""

import math

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


class AdamByHand:
    """Layers of two elements each in plain Python: w, g, the state before the third step, and every number."""

    def __init__(self, decoupled, maximize):
        self.w, self.g = [[1.5, -2.5], [0.3, 0.7]], [[0.6, 0.8], [-0.9, 0.2]]
        self.m, self.v = [[0.2, -0.15], [0.05, 0.35]], [[0.04, 0.09], [0.16, 0.02]]
        self.t, self.beta1, self.beta2, self.eps = [2.0, 4.0], 0.5, 0.75, 0.125
        self.decays, self.lrs, self.lr_tensor, self.inv_scale = [0.2, 0.3], [0.4, 0.6], 0.5, 0.25
        self.decoupled, self.maximize = decoupled, maximize

    def coupled_decay(self, i):
        return 0.0 if self.decoupled else self.decays[i]

    def gradients(self, i):
        """σg of a layer, or −σg."""
        return [(-1 if self.maximize else 1) * self.inv_scale * g for g in self.g[i]]

    def step(self, ratio_of_gradient=lambda i: 1.0, ratio_of_update=lambda i, u: 1.0):
        """Take a step; return the ratios of both kinds and the updates."""
        ratios, updates = [], []
        for i, (w, m, v) in enumerate(zip(self.w, self.m, self.v, strict=True)):
            r = ratio_of_gradient(i)
            self.t[i] += 1
            u = []
            for j in range(2):
                d = r * (self.gradients(i)[j] + self.coupled_decay(i) * w[j])
                m[j] = self.beta1 * m[j] + (1 - self.beta1) * d
                v[j] = self.beta2 * v[j] + (1 - self.beta2) * d * d
                m_hat, v_hat = m[j] / (1 - self.beta1 ** self.t[i]), v[j] / (1 - self.beta2 ** self.t[i])
                u.append(m_hat / (math.sqrt(v_hat) + self.eps) + (self.decays[i] * w[j] if self.decoupled else 0.0))
            s = ratio_of_update(i, u)
            for j in range(2):
                w[j] -= self.lrs[i] * self.lr_tensor * s * u[j]
            ratios.append((r, s))
            updates.append(u)
        return ratios, updates

    def arguments(self):
        def tensors(values):
            return [torch.tensor(value, dtype=torch.float64) for value in values]

        return {
            "params": tensors(self.w),
            "grads": tensors(self.g),
            "exp_avgs": tensors(self.m),
            "exp_avg_sqs": tensors(self.v),
            "steps": [torch.tensor(t) for t in self.t],
            "maximize": self.maximize,
            "weight_decays": self.decays,
            "decoupled_weight_decay": self.decoupled,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "adam_eps": self.eps,
            "lrs": self.lrs,
            "lr_tensor": torch.tensor(self.lr_tensor, dtype=torch.float64),
            "inv_scale": torch.tensor(self.inv_scale),
        }

    def assert_is(self, arguments):
        for name, values in (("params", self.w), ("exp_avgs", self.m), ("exp_avg_sqs", self.v)):
            for tensor, value in zip(arguments[name], values, strict=True):
                assert tensor.tolist() == pytest.approx(value, rel=1e-13), name
        assert [step.item() for step in arguments["steps"]] == self.t


adams = pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
directions = pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
given_ratios = pytest.mark.parametrize("of_updates", [None, False, True], ids=["plain", "of gradients", "of updates"])


@given_ratios
@directions
@adams
def test_two_steps_of_adam_by_hand(decoupled, maximize, of_updates):
    by_hand, ratios = AdamByHand(decoupled, maximize), [1.75, 0.375]
    arguments = by_hand.arguments()
    kinds = [{}, {"ratio_of_gradient": lambda i: ratios[i]}, {"ratio_of_update": lambda i, u: ratios[i]}]
    kind = kinds[0 if of_updates is None else 1 + of_updates]
    given = {} if of_updates is None else {"of_updates": of_updates, "ratios": torch.tensor(ratios).double()}
    for _ in range(2):
        reference.adam_(**arguments, **given)
        by_hand.step(**kind)
        by_hand.assert_is(arguments)
    assert arguments["grads"][0].tolist() == [0.6, 0.8]


def test_numbers_of_one_step_of_adam_by_hand():
    # d = 0.5·4 + 0.25·2 = 2.5, m = 0.5·1.5 + 0.5·2.5 = 2, v = 0.75·5 + 0.25·6.25 = 5.3125; at the second step m / 0.75
    # and √v / √0.4375 = √(85/7): u = (8/3) / (√(85/7) + 0.5), and w = 2 − 0.25·u.
    one = {"maximize": False, "weight_decays": [0.25], "decoupled_weight_decay": False, "lrs": [0.25]}
    numbers = {"beta1": 0.5, "beta2": 0.75, "adam_eps": 0.5, "inv_scale": torch.tensor(0.5)}
    w, g, m, v = (torch.tensor([x], dtype=torch.float64) for x in (2.0, 4.0, 1.5, 5.0))
    step = torch.tensor(1.0)
    reference.adam_([w], [g], [m], [v], [step], **one, **numbers)
    assert [m.item(), v.item(), step.item()] == [2.0, 5.3125, 2.0]
    assert w.item() == pytest.approx(2 - 0.25 * (8 / 3) / (math.sqrt(85 / 7) + 0.5), rel=1e-14)
    # Decoupled: d = 2, m = 1.75, v = 4.75, and u gains 0.25·2.
    w, g, m, v = (torch.tensor([x], dtype=torch.float64) for x in (2.0, 4.0, 1.5, 5.0))
    reference.adam_([w], [g], [m], [v], [step.fill_(1)], **{**one, "decoupled_weight_decay": True}, **numbers)
    assert [m.item(), v.item()] == [1.75, 4.75]
    u = (1.75 / 0.75) / (math.sqrt(4.75 / 0.4375) + 0.5) + 0.5
    assert w.item() == pytest.approx(2 - 0.25 * u, rel=1e-14)


@pytest.mark.parametrize("kind", ["raw", "decayed", "clipped"])
@directions
@adams
def test_ratios_of_gradients_of_adam_by_hand(decoupled, maximize, kind):
    by_hand, trust_coefs, eps = AdamByHand(decoupled, maximize), [0.02, 0.75], [0.05, 0.125]
    arguments = by_hand.arguments()
    ratios = torch.full((2,), math.nan, dtype=torch.float64)

    def ratio(i):
        w, g, decay = by_hand.w[i], by_hand.gradients(i), by_hand.coupled_decay(i)
        length = math.hypot(*g) + decay * math.hypot(*w)
        if kind == "decayed":
            length = math.hypot(*(x + decay * y for x, y in zip(g, w, strict=True)))
        r = trust_coefs[i] * math.hypot(*w) / (length + eps[i])
        return min(r / (by_hand.lrs[i] * by_hand.lr_tensor), 1.0) if kind == "clipped" else r

    for _ in range(2):
        how = {"trust_coefs": trust_coefs, "eps": eps, "ratios": ratios}
        reference.adam_(**arguments, **how, clip=kind == "clipped", decayed_norm=kind == "decayed")
        expected, _ = by_hand.step(ratio)
        by_hand.assert_is(arguments)
        assert ratios.tolist() == pytest.approx([r for r, _ in expected], rel=1e-13)
    if kind == "clipped":
        assert ratios[0] < 1 == ratios[1]


@pytest.mark.parametrize("clip", [False, True])
@directions
@adams
def test_ratios_of_updates_of_adam_by_hand(decoupled, maximize, clip):
    by_hand, trust_coefs, eps = AdamByHand(decoupled, maximize), [0.75, 0.25], [0.05, 0.125]
    arguments = by_hand.arguments()
    two = AdamByHand(decoupled, maximize).arguments()
    ratios, squared_norms = (torch.full((n,), math.nan, dtype=torch.float64) for n in (2, 4))

    def ratio(i, u):
        s = trust_coefs[i] * math.hypot(*by_hand.w[i]) / (math.hypot(*u) + eps[i])
        return min(s, 1.0) if clip else s

    for _ in range(2):
        how = {"of_updates": True, "trust_coefs": trust_coefs, "eps": eps, "ratios": ratios, "clip": clip}
        reference.adam_(**arguments, **how)
        reference.adam_(**two, of_updates=True, squared_norms=squared_norms)
        norms = [math.hypot(*w) for w in by_hand.w]
        expected, updates = by_hand.step(ratio_of_update=ratio)
        by_hand.assert_is(arguments)
        assert ratios.tolist() == pytest.approx([s for _, s in expected], rel=1e-13)
        assert squared_norms.tolist() == pytest.approx([x**2 for x in (*norms, *(math.hypot(*u) for u in updates))])
        reference.adam_(**{**two, "grads": []}, of_updates=True, ratios=ratios)
        by_hand.assert_is(two)


def test_moments_of_adam_are_rounded_before_they_make_the_update():
    # In bfloat16 m = 0.5·1 + 0.5·1.015625 = 1.0078125 and v = 0.5 + 0.5·1.031494140625 round to 1.0078125 and 1.015625.
    w, g, m, v = (torch.tensor([x]).bfloat16() for x in (0.25, 1.015625, 1.0, 1.0))
    one = {"maximize": False, "weight_decays": [0.0], "decoupled_weight_decay": True, "lrs": [0.5]}
    step = torch.tensor(6.0)
    reference.adam_([w], [g], [m], [v], [step], **one, beta1=0.5, beta2=0.5, adam_eps=0.25)
    assert (m.item(), v.item(), step.item()) == (1.0078125, 1.015625, 7.0)
    u = 1.0078125 / (1 - 0.5**7) / (math.sqrt(1.015625 / (1 - 0.5**7)) + 0.25)
    assert w.item() == torch.tensor(0.25 - 0.5 * u).bfloat16().item()
