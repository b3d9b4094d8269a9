"""PercentileClipping: published numbers, the rule by hand, what enters a history, and every kind of step and gradient."""

import copy
import io
import math
import pickle

import pytest
import torch
from cases import DTYPES
from closeness import assert_within_ulps, close
from optimizers import params_of
from published import PUBLISHED
from sgd_cases import ODD, give_gradients, groups, raises_and_changes_nothing
from torch import nn
from torch.optim import LBFGS, SGD
from torch.utils._python_dispatch import TorchDispatchMode

import torchlars
from torchlars import LAMB, LARS, PercentileClipping, percentile_clipping

pytestmark = pytest.mark.usefixtures("one_thread", "checked_sparse_tensors")


class ByHand:
    """The rule as it is published, for one layer: a ring of squared norms and a count."""

    def __init__(self, percentile=5, history=100):
        self.index, self.history = percentile * history // 100, history
        self.ring, self.count = [], 0

    def __call__(self, squared_norm):
        """Return what the gradient is multiplied by."""
        if not 0 < squared_norm < math.inf:
            return 1.0
        self.count += 1
        if self.count == 1:
            self.ring = [squared_norm] * self.history
        self.ring[self.count % self.history] = squared_norm
        return min(1.0, math.sqrt(sorted(self.ring)[self.index]) / math.sqrt(squared_norm))


def squared_norm(tensor):
    return math.fsum(abs(value) ** 2 for value in tensor.detach().flatten().tolist())


def layer(dtype=torch.float64):
    return nn.Parameter(torch.tensor([3.0, 4.0], dtype=dtype))


def gradient(norm, dtype=torch.float64):
    return norm * torch.tensor([0.6, -0.8], dtype=dtype)


def factor(optimizer, param, norm):
    """Take a step with a gradient of some norm, and return what it was multiplied by."""
    param.grad = gradient(norm, param.dtype)
    optimizer.step()
    one, other = (param.grad / gradient(norm, param.dtype)).tolist()
    assert one == pytest.approx(other, rel=2 * torch.finfo(param.dtype).eps)
    return one


# The factors


PUBLISHED_CASES = PUBLISHED["percentile clipping"]["cases"]


@pytest.mark.parametrize(
    ("name", "percentile"), [("steady with spikes", 5), ("steady with spikes", 95), ("growing", 50)], ids=str
)
def test_published_factors(name, percentile, backend):
    case = PUBLISHED_CASES[name]
    param = layer()
    optimizer = SGD([param], lr=0.1)
    PercentileClipping(optimizer, percentile=percentile)
    found = [factor(optimizer, param, norm) for norm in case["norms"]]
    assert found == pytest.approx(case[str(percentile)], rel=1e-6)


def test_factors_worked_by_hand(backend):
    """Of the last four norms the third smallest; the first one counts four times at first."""
    param = layer()
    optimizer = SGD([param], lr=0.5)
    PercentileClipping(optimizer, percentile=50, history=4)
    factors = [1, 1, 2 / 4, 1, 4 / 6, 1, 6 / 10]
    expected = param.detach().clone()
    for norm, by_hand in zip([2, 1, 4, 3, 6, 5, 10], factors, strict=True):
        assert factor(optimizer, param, norm) == pytest.approx(by_hand, rel=1e-12)
        expected -= 0.5 * by_hand * gradient(norm)
        close(param.detach(), expected, 1e-12, str(norm))


@pytest.mark.parametrize(
    ("percentile", "history", "index"),
    [(5, 100, 5), (99, 100, 99), (29, 100, 29), (0, 4, 0), (5, 10, 0), (50, 3, 1), (50, 4, 2), (99, 7, 6), (99, 1, 0)],
)
def test_which_of_the_norms_is_taken(percentile, history, index, backend):
    param = layer()
    optimizer = SGD([param], lr=0.1)
    PercentileClipping(optimizer, percentile, history)
    norms = [1.0 + (7 * i) % 101 / 100 for i in range(history)] + [5.0]
    for norm in norms:
        last = factor(optimizer, param, norm)
    assert last == pytest.approx(sorted(norms[1:])[index] / 5.0, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layer_has_a_history_of_its_own(dtype, backend):
    """Of several groups, shapes and memory orders; gradients are missing or zero in some steps."""
    optimizer = SGD(groups(dtype), lr=0.1)
    PercentileClipping(optimizer, percentile=30, history=5)
    rules = [ByHand(percentile=30, history=5) for _ in params_of(optimizer)]
    clipped = set()
    for step in range(12):
        give_gradients([optimizer], step)
        for i, param in enumerate(params_of(optimizer)):
            if param.grad is not None:
                param.grad.mul_([1, 1.5, 0.7, 2][(step + i) % 4])
        before = [None if param.grad is None else param.grad.clone() for param in params_of(optimizer)]
        optimizer.step()
        for i, (param, grad, rule) in enumerate(zip(params_of(optimizer), before, rules, strict=True)):
            assert (param.grad is None) == (grad is None)
            if grad is not None:
                by_hand = rule(squared_norm(grad))
                wide = grad.to(torch.promote_types(dtype, torch.float64))
                assert_within_ulps(param.grad, (by_hand * wide).to(dtype), 4, f"step {step}, layer {i}")
                clipped |= {i} if by_hand < 0.9 else set()
    assert clipped == {0, 1, 2, 3, 5, 6, 7}  # the other one has no elements


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_whose_squares_are_beyond_float32(scale, dtype, backend):
    param = layer(dtype)
    optimizer = SGD([param], lr=0.1)
    PercentileClipping(optimizer)
    assert factor(optimizer, param, scale) == 1
    assert factor(optimizer, param, 4 * scale) == pytest.approx(0.25, rel=1e-2 if dtype == torch.bfloat16 else 1e-12)


# What enters no history


@pytest.mark.parametrize("kind", [math.nan, math.inf, -math.inf, 0.0], ids=str)
@pytest.mark.parametrize("at", [0, 2], ids=["first", "later"])
def test_a_norm_of_zero_or_not_finite_leaves_everything_as_it_is(kind, at, backend):
    """And other layers take their step. A history that begins with 0 would clip to 0 from then on."""
    params, twins = ([layer(), layer()] for _ in range(2))
    optimizer, expected = SGD(params, lr=0.1), SGD(twins, lr=0.1)
    clipping, twin_clipping = (PercentileClipping(one, percentile=0, history=3) for one in (optimizer, expected))
    for step, norm in enumerate([4.0, 6.0, 3.0, 9.0, 8.0]):
        if step == at:
            params[0].grad = torch.tensor([kind, 0.0], dtype=torch.float64)
            params[1].grad, twins[1].grad, twins[0].grad = gradient(7.0), gradient(7.0), None
            before = copy.deepcopy((params[0].grad, clipping.state_dict()["histories"][0]))
            optimizer.step()
            expected.step()
            after = params[0].grad, clipping.state_dict()["histories"][0]
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
            params[0].data.copy_(twins[0])
        for one in (params, twins):
            one[0].grad, one[1].grad = gradient(norm), gradient(10 - norm)
        optimizer.step()
        expected.step()
        assert all(torch.equal(param.grad, twin.grad) for param, twin in zip(params, twins, strict=True))
    assert all(map(torch.equal, clipping.state_dict()["histories"], twin_clipping.state_dict()["histories"]))
    assert params[0].grad.norm().item() == pytest.approx(3.0, rel=1e-12)


SCALED = {
    "torchlars SGD": lambda params: torchlars.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD, fused": lambda params: SGD(params, lr=0.1, weight_decay=0.1, fused=True),
    "SGD, which does not unscale": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
}
UNDER = {
    "alone": lambda base: base,
    "LARS": lambda base: LARS(base, trust_coef=0.3),
    "LAMB": lambda base: LAMB(base, trust_coef=0.3, clip=True),
}


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("base", SCALED)
@pytest.mark.parametrize("overflows_at", [0, 3])
def test_a_scaled_run_has_the_bits_of_one_that_is_not(overflows_at, base, under, backend):
    """The scale is a power of two that changes, and the norms of scaled gradients would not go together."""
    params, twins = ([layer(torch.float32), layer(torch.float32)] for _ in range(2))
    optimizer, expected = (UNDER[under](SCALED[base](one)) for one in (params, twins))
    clipping, twin_clipping = (PercentileClipping(one, percentile=40, history=4) for one in (optimizer, expected))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = set()
    for step, norm in enumerate([1.0, 2.0, 0.5, 3.0, 0.75, 8.0, 5.0]):
        for one, scale in ((params, scaler.scale), (twins, lambda grad: grad)):
            one[0].grad, one[1].grad = scale(gradient(norm, torch.float32)), scale(gradient(9 - norm, torch.float32))
        if step == overflows_at:
            params[1].grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        scales.add(scaler.get_scale())
        if step != overflows_at:
            expected.step()
        assert all(map(torch.equal, params, twins)), step
        histories = zip(clipping.state_dict()["histories"], twin_clipping.state_dict()["histories"], strict=True)
        assert all(torch.equal(*pair) for pair in histories), step
    assert len(scales) > 1
    last = clipping.state_dict()["histories"][0]
    assert last.sort().values[1] < 0.5 * last[-1]  # the last gradient was clipped


@pytest.mark.parametrize(("grad_scale", "found_inf"), [(8.0, None), (None, 0.0), (None, 1.0), (8.0, 0.0), (8.0, 1.0)])
def test_a_scaled_gradient_stays_scaled_and_a_skipped_one_as_it_is(grad_scale, found_inf, backend):
    param = layer(torch.float32)
    optimizer = torchlars.optim.SGD([param], lr=0.1)
    clipping = PercentileClipping(optimizer)
    assert factor(optimizer, param, 2.0) == 1
    optimizer.grad_scale, optimizer.found_inf = (
        None if number is None else torch.tensor(number) for number in (grad_scale, found_inf)
    )
    by_hand = 1.0 if found_inf else 0.5
    assert factor(optimizer, param, 4.0 * (grad_scale or 1.0)) == pytest.approx(by_hand, rel=1e-6)
    assert clipping.state_dict()["histories"][0][-1].item() == pytest.approx(4.0 if found_inf else 16.0, rel=1e-6)


# Steps


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("call", ["step(closure)", "step(closure=closure)"])
def test_a_closure(call, under, backend):
    """Its gradients are clipped, not those that were there before it."""

    def train(clips):
        param = layer()
        optimizer = UNDER[under](SGD([param], lr=0.1, momentum=0.9, weight_decay=0.1))
        rule, norms = ByHand(percentile=50, history=3), iter([2.0, 6.0, 1.0, 3.0])
        if not clips:
            PercentileClipping(optimizer, percentile=50, history=3)

        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = (param * gradient(next(norms))).sum()
            loss.backward()
            if clips:
                param.grad.mul_(rule(squared_norm(param.grad)))
            return loss

        param.grad = gradient(100.0)
        losses = [optimizer.step(closure) if call == "step(closure)" else optimizer.step(closure=closure)]
        losses += [optimizer.step(closure=closure) for _ in range(3)]
        return param.detach(), torch.stack(losses).detach()

    (param, losses), (expected, expected_losses) = train(clips=False), train(clips=True)
    close(param, expected, 1e-12, "parameter")
    close(losses, expected_losses, 1e-12, "losses")


def test_every_evaluation_of_a_closure_is_clipped(backend):
    def train(clips):
        param = layer()
        optimizer = LBFGS([param], lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
        rule, evaluations = ByHand(percentile=20, history=5), 0
        if not clips:
            PercentileClipping(optimizer, percentile=20, history=5)

        def closure():
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = (param**4).sum() / 100
            loss.backward()
            if clips:
                param.grad.mul_(rule(squared_norm(param.grad)))
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return param.detach(), evaluations

    (param, evaluations), (expected, expected_evaluations) = train(clips=False), train(clips=True)
    assert evaluations == expected_evaluations > 6
    close(param, expected, 1e-12, "parameter")


def test_the_arguments_behind_a_closure_keep_their_places():
    class Takes(SGD):
        def step(self, closure=None, more=None, *, other=None):
            return super().step.__wrapped__(self, closure), more, other

    param = layer()
    optimizer = Takes([param], lr=0.1)
    PercentileClipping(optimizer, percentile=0)

    def closure(norm=1.0):
        param.grad = gradient(norm)
        return norm

    assert optimizer.step(closure, 2, other=3) == (1.0, 2, 3)
    assert optimizer.step(None, 2, other=3) == (None, 2, 3)
    assert optimizer.step(lambda: closure(4.0), other=3) == (4.0, None, 3)
    assert param.grad.norm().item() == pytest.approx(1.0)


def test_under_lars_without_decay_it_changes_nothing_but_what_lars_leaves_alone(backend):
    """The ratio divides by the norm of the clipped gradient; with decay it does not divide by all of it."""

    def train(clips, wrap, weight_decay, **of_group):
        params = [layer(), layer()]
        base = torchlars.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=weight_decay)
        base.param_groups[0].update(of_group)
        optimizer = wrap(base)
        if clips:
            PercentileClipping(optimizer, percentile=0)
        for norm in (1.0, 7.0, 2.0):
            for param in params:
                param.grad = gradient(norm)
            optimizer.step()
        return torch.cat([param.detach() for param in params])

    def difference(*args, **of_group):
        one, other = (train(clips, *args, **of_group) for clips in (True, False))
        return (one - other).abs().max().item()

    lars, lamb = (lambda base: LARS(base, eps=0.0)), (lambda base: LAMB(base, clip=True))
    assert difference(lars, 0.0) < 1e-14
    assert difference(lars, 0.1) > 1e-6
    assert difference(lars, 0.0, trust_coef=None) > 0.1
    assert difference(lamb, 0.0) > 0.1


def test_parameters_that_are_added_later_take_part(backend):
    first, second = layer(), layer()
    optimizer = LARS(SGD([first], lr=0.1), trust_coef=0.1)
    clipping = PercentileClipping(optimizer, percentile=0)
    first.grad = gradient(3.0)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "trust_coef": None})
    first.grad = None
    assert factor(optimizer, second, 1.0) == 1
    assert factor(optimizer, second, 4.0) == pytest.approx(0.25)
    assert len(clipping.state_dict()["histories"]) == 2


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
def test_a_parameter_that_is_listed_twice_is_one_layer(backend):
    param = layer()
    optimizer = SGD([param, param], lr=0.1)
    clipping = PercentileClipping(optimizer, percentile=50, history=4)
    rule = ByHand(percentile=50, history=4)
    for norm in (2.0, 8.0, 4.0, 6.0, 9.0):
        assert factor(optimizer, param, norm) == pytest.approx(rule(norm**2), rel=1e-12)
    assert len(clipping.state_dict()["histories"]) == 1


def test_removed(backend):
    param = layer()
    optimizer = SGD([param], lr=0.1)
    clipping = PercentileClipping(optimizer, percentile=0)
    assert factor(optimizer, param, 1.0) == 1
    assert factor(optimizer, param, 2.0) == pytest.approx(0.5)
    clipping.remove()
    assert factor(optimizer, param, 2.0) == 1


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
@pytest.mark.parametrize("under", UNDER)
def test_a_compiled_step_has_the_bits_of_an_eager_one(under):
    def train(compiles):
        params = [layer(), nn.Parameter(torch.ones(3, 2, dtype=torch.float64))]
        optimizer = UNDER[under](SGD(params, lr=0.1, momentum=0.9))
        clipping = PercentileClipping(optimizer, percentile=50, history=3)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        for norm in (1.0, 2.0, 0.5, 3.0, 0.7):
            for i, param in enumerate(params):
                param.grad = torch.full_like(param, (i + 1) * norm)
            step()
        return [*params, *(param.grad for param in params), *clipping.state_dict()["histories"]]

    torch._dynamo.reset()
    assert all(map(torch.equal, train(compiles=True), train(compiles=False)))
    torch._dynamo.reset()


# No waiting


def test_the_host_reads_no_number():
    """There are none to be read on this device."""
    params = [nn.Parameter(torch.ones(3, 2, device="meta")), nn.Parameter(torch.ones(4, device="meta"))]
    optimizer = torchlars.optim.SGD(params, lr=0.1)
    PercentileClipping(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="meta"), torch.zeros((), device="meta")
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()


class Operators(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_one_sort_and_one_multiplication_for_all_layers_of_a_dtype(extension):
    params = [layer(dtype) for dtype in (torch.float32, torch.bfloat16) for _ in range(20)]
    optimizer = SGD(params, lr=0.1)
    clipping = PercentileClipping(optimizer)
    for param in params:
        param.grad = gradient(1.0, param.dtype)
    optimizer.step()
    with Operators() as operators:
        clipping._clip()
    for name in ("squared_norms", "sort", "scale_gradients_", "_foreach_copy_"):
        assert operators.names.count(name) == 2, name
    assert "_local_scalar_dense" not in operators.names
    assert len(operators.names) < 60


def test_a_history_that_a_captured_graph_would_begin_is_refused(monkeypatch, backend):
    first, second = layer(), layer()
    optimizer = SGD([first, second], lr=0.1)
    clipping = PercentileClipping(optimizer, percentile=0)
    first.grad = gradient(1.0)
    optimizer.step()
    before = copy.deepcopy(clipping._histories[first])
    first.grad, second.grad = gradient(2.0), gradient(2.0)
    with monkeypatch.context() as in_capture:
        in_capture.setattr(percentile_clipping, "is_capturing", lambda device: True)
        raises_and_changes_nothing(
            optimizer, RuntimeError, r"take a step before the capture \(group: 0, parameter: 1, shape: \(2,\)\)"
        )
        assert torch.equal(clipping._histories[first], before)
        second.grad = None
        assert factor(optimizer, first, 4.0) == pytest.approx(0.25)


# Gradients


@pytest.mark.parametrize("name", [name for name in ODD if name not in ("FSDP1", "float8")])
def test_odd_gradients(name, backend):
    """Between two plain layers. The first gradient is half as long as the odd one."""
    odd = ODD[name]()
    real = odd.grad.to_dense() if odd.grad.is_sparse else odd.grad.clone().resolve_conj().resolve_neg()
    grad, odd_grad = real.detach().clone(), odd.grad
    params = [layer(torch.float32), odd, layer(torch.float32)]
    optimizer = SGD(params, lr=0.1)
    clipping = PercentileClipping(optimizer)
    for one, norm in ((params[0], 1.0), (params[2], 2.0)):
        one.grad = gradient(norm, torch.float32)
    odd.grad = 0.5 * (odd_grad if odd_grad.is_sparse else grad)
    optimizer.step()
    close(odd.grad, 0.5 * grad, 0.0, "the first gradient")
    for one in (params[0], params[2]):
        one.grad = gradient(8.0, torch.float32)
    odd.grad = odd_grad
    optimizer.step()
    assert odd.grad.is_sparse == odd_grad.is_sparse
    close(odd.grad.to_dense() if odd.grad.is_sparse else odd.grad, 0.5 * grad, 1e-6, name)
    assert [params[i].grad.norm().item() for i in (0, 2)] == pytest.approx([1.0, 2.0], rel=1e-6)
    assert clipping.state_dict()["histories"][1][-1].item() == pytest.approx(squared_norm(grad), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FSDP1", r"FSDP1 flattens .* \(group: 0, parameter: 1, shape: \(3,\)\)"),
        ("float8", r"gradients must be of their parameter's kind .* \(group: 0, parameter: 1, shape: \(3,\)\)"),
    ],
)
def test_what_cannot_be_clipped_is_refused_and_nothing_changes(name, message, backend):
    first = layer()
    optimizer = SGD([first, ODD[name]()], lr=0.1)
    clipping = PercentileClipping(optimizer, percentile=0)
    first.grad = gradient(2.0)
    raises_and_changes_nothing(optimizer, RuntimeError, message)
    assert not clipping.state_dict()["histories"][0].any()


@pytest.mark.parametrize("kind", ["one tensor", "views", "a momentum"])
def test_gradients_that_share_memory_are_clipped_each_for_its_layer(kind, backend):
    params = [layer(), layer()]
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    PercentileClipping(optimizer, percentile=0)
    for param, norm in zip(params, (1.0, 2.0), strict=True):
        param.grad = gradient(norm)
    optimizer.step()
    shared = gradient(8.0)
    if kind == "a momentum":
        optimizer.state[params[0]]["momentum_buffer"] = shared
    params[0].grad = shared
    params[1].grad = shared if kind == "one tensor" else shared.view(1, 2)[0]
    grads = []
    optimizer.register_step_pre_hook(lambda *_: grads.extend(param.grad.clone() for param in params))
    optimizer.step()
    assert [grad.norm().item() for grad in grads] == pytest.approx([1.0, 2.0], rel=1e-12)
    momentum = optimizer.state[params[0]]["momentum_buffer"].norm().item()
    assert momentum == pytest.approx(0.9 * (8.0 if kind == "a momentum" else 1.0) + 1.0, rel=1e-12)


# Saving and loading


def saved(state_dict):
    """The same, as a file gives it back to whoever trusts nothing."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("at", [0, 1, 4, 9])
@pytest.mark.parametrize("under", UNDER)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(under, at, backend):
    """Before, while and after the history fills; gradients are missing, zero or NaN in some steps."""

    def build(**options):
        optimizer = UNDER[under](SGD(groups(torch.float32), lr=0.1, momentum=0.9))
        return optimizer, PercentileClipping(optimizer, history=5, **options)

    def advance(optimizers, step):
        give_gradients(optimizers, step)
        for optimizer in optimizers:
            for i, param in enumerate(params_of(optimizer)):
                if param.grad is not None:
                    param.grad.mul_([1, 4, 0.7][(step + i) % 3] if (step, i) != (3, 2) else torch.nan)
            optimizer.step()

    (optimizer, clipping), (resumed, resumed_clipping) = build(percentile=40), build()
    for step in range(at):
        advance([optimizer], step)
    for param, other in zip(params_of(resumed), params_of(optimizer), strict=True):
        param.data.copy_(other)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    resumed_clipping.load_state_dict(saved(clipping.state_dict()))
    assert resumed_clipping.percentile == 40
    for step in range(at, at + 7):
        advance([optimizer, resumed], step)
        for param, other in zip(params_of(optimizer), params_of(resumed), strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(param.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    histories = clipping.state_dict()["histories"]
    assert all(map(torch.equal, histories, resumed_clipping.state_dict()["histories"]))
    assert len({history.data_ptr() for history in histories}) == len(histories)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_was_loaded_is_a_copy(dtype):
    param = layer()
    optimizer = SGD([param], lr=0.1)
    clipping = PercentileClipping(optimizer, history=2)
    given = {"percentile": 5, "histories": [torch.tensor([1.0, 4.0], dtype=dtype)]}
    clipping.load_state_dict(given)
    assert factor(optimizer, param, 4.0) == pytest.approx(2.0 / 4.0)  # of 4 and 16; 1 was the oldest
    assert given["histories"][0].tolist() == [1.0, 4.0]
    assert clipping.state_dict()["histories"][0].dtype == torch.float64


HISTORIES = [torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
WRONG_STATE_DICTS = {
    "no dict": (3, ValueError, r"state_dict must be a dict of percentile and histories \(got: int\)"),
    "an optimizer's": ({"state": {}, "param_groups": []}, ValueError, r"\(got: state, param_groups\)"),
    "nothing": ({}, ValueError, r"state_dict must be a dict of percentile and histories \(got: \)"),
    "a percentile": (
        {"percentile": 100, "histories": HISTORIES},
        ValueError,
        r"state_dict\['percentile'\] must be an integer from 0 to 99 \(got: 100\)",
    ),
    "no list": (
        {"percentile": 9, "histories": 4},
        ValueError,
        r"state_dict\['histories'\] must be a list of 2, one a parameter \(got: int\)",
    ),
    "another model": ({"percentile": 9, "histories": HISTORIES[:1]}, ValueError, r"one a parameter \(got: 1\)"),
    "no tensor": (
        {"percentile": 9, "histories": [HISTORIES[0], 2.0]},
        ValueError,
        r"state_dict\['histories'\]\[1\] must be a tensor of shape \(3,\) \(got: float\)",
    ),
    "another length": (
        {"percentile": 9, "histories": [HISTORIES[0], torch.ones(100)]},
        ValueError,
        r"state_dict\['histories'\]\[1\] must be a tensor of shape \(3,\) \(got: \(100,\)\)",
    ),
    **{
        f"norms of {value}": (
            {"percentile": 9, "histories": [HISTORIES[0], torch.tensor([1.0, value, 1.0])]},
            ValueError,
            r"state_dict\['histories'\]\[1\] must hold squared norms \(got: tensor",
        )
        for value in (-1.0, 0.0, math.nan, math.inf, 1j)
    },
    **{
        f"norms that are {name}": (
            {"percentile": 9, "histories": [HISTORIES[0], history]},
            ValueError,
            r"state_dict\['histories'\]\[1\] must hold squared norms \(got: tensor",
        )
        for name, history in {
            "on no device": torch.ones(3, device="meta"),
            "integers": torch.ones(3, dtype=torch.int64),
        }.items()
    },
}


@pytest.mark.parametrize(("state_dict", "error", "message"), WRONG_STATE_DICTS.values(), ids=WRONG_STATE_DICTS)
def test_a_wrong_state_dict_is_refused_and_nothing_is_loaded(state_dict, error, message):
    params = [layer(), layer()]
    optimizer = SGD(params, lr=0.1)
    clipping = PercentileClipping(optimizer, history=3)
    params[0].grad, params[1].grad = gradient(2.0), gradient(3.0)
    optimizer.step()
    before = copy.deepcopy(clipping.state_dict())
    with pytest.raises(error, match=message):
        clipping.load_state_dict(state_dict)
    torch.testing.assert_close(clipping.state_dict(), before, rtol=0, atol=0)


# What it is constructed with


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([],),
            TypeError,
            r"optimizer must be a torch.optim.Optimizer \(got: list\); "
            r"construct it first: PercentileClipping\(torch.optim.SGD\(params, lr=0.1\)\)",
        ),
        ((None, 100), ValueError, r"percentile must be an integer from 0 to 99 \(got: 100\)"),
        ((None, -1), ValueError, r"percentile must be an integer from 0 to 99 \(got: -1\)"),
        ((None, 5.0), TypeError, r"percentile must be an integer from 0 to 99 \(got: 5.0 of type float\)"),
        ((None, True), TypeError, r"percentile must be an integer from 0 to 99 \(got: True of type bool\)"),
        ((None, 5, 0), ValueError, r"history must be an integer of at least 1 \(got: 0\)"),
        ((None, 5, "10"), TypeError, r"history must be an integer of at least 1 \(got: '10' of type str\)"),
        ((None, 5, True), TypeError, r"history must be an integer of at least 1 \(got: True of type bool\)"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:30],
)
def test_wrong_arguments(arguments, error, message):
    optimizer = SGD([layer()], lr=0.1)
    with pytest.raises(error, match=message):
        PercentileClipping(*[optimizer if argument is None else argument for argument in arguments])
    assert not optimizer._optimizer_step_pre_hooks


def test_defaults():
    clipping = PercentileClipping(SGD([layer()], lr=0.1))
    assert (clipping.percentile, clipping.history) == (5, 100)


def test_the_percentile_may_be_set_between_steps(backend):
    """Of three norms, 1, 2 and 3, and of 2, 3 and 6."""
    param = layer()
    optimizer = SGD([param], lr=0.1)
    clipping = PercentileClipping(optimizer, percentile=99, history=3)
    assert [factor(optimizer, param, norm) for norm in (1.0, 2.0, 3.0)] == pytest.approx([1, 1, 1])
    clipping.percentile = 34
    assert factor(optimizer, param, 6.0) == pytest.approx(3 / 6)
    for wrong, error in ((100, ValueError), (5.0, TypeError), ("5", TypeError)):
        with pytest.raises(error, match=f"percentile must be an integer from 0 to 99 .got: {wrong!r}"):
            clipping.percentile = wrong
    assert clipping.percentile == 34
    with pytest.raises(AttributeError):
        clipping.history = 5


@pytest.mark.parametrize("way", ["copied", "pickled"])
@pytest.mark.parametrize("is_removed", [False, True])
def test_a_copy_clips_the_copy_of_its_optimizer(way, is_removed):
    """torch drops the hooks of an optimizer that is copied."""
    param = layer()
    optimizer = SGD([param], lr=0.1)
    clipping = PercentileClipping(optimizer, percentile=0, history=3)
    factor(optimizer, param, 2.0)
    if is_removed:
        clipping.remove()
    other = copy.deepcopy(clipping) if way == "copied" else pickle.loads(pickle.dumps(clipping))
    (twin,) = other.optimizer.param_groups[0]["params"]
    assert twin is not param
    assert factor(other.optimizer, twin, 8.0) == (1.0 if is_removed else 0.25)
