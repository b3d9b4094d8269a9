"""LARS: published numbers, its options, the layers it gathers, its errors and what it shows."""

import copy
import warnings

import pytest
import torch
from calls import scale_gradients
from published import PUBLISHED
from small_layers import float64
from torch import nn
from torch.optim import SGD

import torchlars.optim
from torchlars import LAMB, LARS, ops, reference

DATA = PUBLISHED["data"]


@pytest.mark.parametrize("name", PUBLISHED["cases"])
def test_numbers_of_torchlars_0_1_2(backend, name):
    case = PUBLISHED["cases"][name]
    hparams = case["hparams"]
    w, b = nn.Parameter(float64(DATA["W0"])), nn.Parameter(float64(DATA["B0"]))
    groups = [{"params": [w], "weight_decay": hparams["wd"]}]
    if "b" in case["steps"][0]:
        groups.append({"params": [b], "weight_decay": 0})
    sgd = {key: hparams[key] for key in ("momentum", "dampening", "nesterov") if key in hparams}
    optimizer = LARS(SGD(groups, lr=hparams["lr"][0], **sgd), eps=hparams["eps"], trust_coef=hparams["trust"])
    for i, expected in enumerate(case["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = hparams["lr"][i]
        w.grad, b.grad = float64(DATA["GW"][i]), float64(DATA["GB"][i])
        optimizer.step()
        seen = {"w": w, "w_grad_after": w.grad, "b": b, "buf": optimizer.state[w].get("momentum_buffer")}
        for key, values in expected.items():
            torch.testing.assert_close(seen[key].detach(), float64(values), rtol=0, atol=1e-12, msg=f"step {i}: {key}")


def make(shapes=((3, 4), (5,)), dtype=torch.float64, **hyper):
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params, SGD(params, **{"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, **hyper})


def adapted(param, weight_decay=0.01, trust_coef=0.001, eps=1e-8, grad=None):
    """The formula once more, by hand."""
    param, grad = param.detach(), (param.grad if grad is None else grad).detach()
    ratio = trust_coef * param.norm() / (grad.norm() + weight_decay * param.norm() + eps)
    return ratio * (grad + weight_decay * param)


# Options


def test_constructor_is_that_of_0_1_2():
    _, base = make()
    optimizer = LARS(base, 1e-5, 0.02)
    assert (optimizer.optim, optimizer.eps, optimizer.trust_coef) == (base, 1e-5, 0.02)
    optimizer = LARS(optimizer=base)
    assert (optimizer.eps, optimizer.trust_coef) == (1e-8, 0.001)


def test_groups_have_options_of_their_own(backend):
    params, _ = make([(3, 4), (5,), (6, 2), (7,)])
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "trust_coef": 0.05, "weight_decay": 0.2},
        {"params": params[2:3], "eps": 3.0},
        {"params": params[3:], "trust_coef": None, "weight_decay": 0.3},
    ]
    optimizer = LARS(SGD(groups, lr=0.5, weight_decay=0.01))
    expected = [
        adapted(params[0]),
        adapted(params[1], weight_decay=0.2, trust_coef=0.05),
        adapted(params[2], eps=3.0),
        params[3].grad.clone(),
    ]
    before = params[3].detach().clone()
    optimizer.step()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-13, atol=0)
    torch.testing.assert_close(params[3].detach(), before - 0.5 * (expected[3] + 0.3 * before), rtol=1e-13, atol=0)


def test_eps_of_an_adam_group_is_adams(backend):
    params, _ = make()
    optimizer = LARS(torch.optim.Adam(params, lr=0.1, weight_decay=0.01, eps=1e3), eps=0.5)
    expected = [adapted(param, eps=0.5) for param in params]
    optimizer.step()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-13, atol=0)


def test_attributes_take_effect_at_the_next_step(backend):
    params, base = make()
    optimizer = LARS(base)
    optimizer.trust_coef, optimizer.eps = 0.5, 0.25
    expected = [adapted(param, trust_coef=0.5, eps=0.25) for param in params]
    optimizer.step()
    torch.testing.assert_close(params[0].grad, expected[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("optimizer", "got"),
    [([nn.Parameter(torch.ones(2))], "list"), (None, "NoneType"), (nn.Linear(2, 2), "Linear"), (SGD, "type")],
)
def test_what_is_no_optimizer_is_refused(optimizer, got):
    message = rf"optimizer must be a torch.optim.Optimizer \(got: {got}\); construct the base first: LARS\("
    with pytest.raises(TypeError, match=message):
        LARS(optimizer)


def test_a_wrapper_is_no_base():
    _, base = make()
    with pytest.raises(TypeError, match=r"must be a base optimizer, not itself a wrapper \(got: LARS\)"):
        LARS(LARS(base))


def test_parameters_from_a_generator_are_refused():
    with pytest.raises(
        TypeError, match=r"got: generator\); construct the base first.*; where only params .* call LARS.over\("
    ):
        LARS(nn.Linear(2, 2).parameters())


BAD_NUMBERS = [
    (-0.001, ValueError, r"number \(got: -0.001\)"),
    (float("nan"), ValueError, r"number \(got: nan\)"),
    (float("inf"), ValueError, r"number \(got: inf\)"),
    (10**400, ValueError, r"number \(got: 10*\)"),
    (True, TypeError, r"number \(got: True of type bool\)"),
    ("0.1", TypeError, r"number \(got: '0.1' of type str\)"),
    (1j, TypeError, r"number \(got: 1j of type complex\)"),
    (torch.tensor(0.1), TypeError, r"number \(got: tensor\(0.1000\) of type Tensor\)"),
]


@pytest.mark.parametrize(("value", "error", "message"), BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize(("name", "kind"), [("eps", "non-negative"), ("trust_coef", "positive")])
def test_bad_numbers_are_refused(name, kind, value, error, message):
    params, base = make()
    with pytest.raises(error, match=f"^{name} must be a {kind} {message}"):
        LARS(base, **{name: value})
    with pytest.raises(error, match=f"^{name} of parameter group 1 must be a {kind} {message}"):
        LARS(SGD([{"params": params[:1]}, {"params": params[1:], name: value}], lr=0.1))
    optimizer = LARS(base)
    with pytest.raises(error, match=f"^{name} of parameter group 1 must be a {kind} {message}"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: value})
    assert len(optimizer.param_groups) == 1
    setattr(optimizer, name, value)
    before = copy.deepcopy((params, [param.grad for param in params], base.param_groups[0]["weight_decay"]))
    with pytest.raises(error, match=f"^{name} must be a {kind} {message}"):
        optimizer.step()
    after = (params, [param.grad for param in params], base.param_groups[0]["weight_decay"])
    assert str(before) == str(after)


def test_trust_coef_of_zero_or_none_is_refused_and_eps_of_zero_is_not():
    _, base = make()
    with pytest.raises(ValueError, match=r"trust_coef must be a positive number \(got: 0.0\)"):
        LARS(base, trust_coef=0.0)
    with pytest.raises(TypeError, match=r"trust_coef must be a positive number \(got: None of type NoneType\)"):
        LARS(base, trust_coef=None)
    assert LARS(base, eps=0).eps == 0


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), "much", True, torch.tensor(-0.1)], ids=repr)
def test_a_groups_weight_decay_must_be_a_number(weight_decay):
    params, base = make()
    base.param_groups[0]["weight_decay"] = weight_decay
    before = params[0].grad.clone()
    with pytest.raises(
        (TypeError, ValueError), match=r"weight_decay of parameter group 0 must be a non-negative number \(got: "
    ):
        LARS(base).step()
    assert torch.equal(params[0].grad, before)
    assert base.param_groups[0]["weight_decay"] is weight_decay


def test_a_differentiable_base_is_refused():
    params, _ = make()
    with pytest.raises(ValueError, match=r"differentiable must be False \(group: 0, got: True\)"):
        LARS(SGD(params, lr=0.1, differentiable=True))


# What is gathered


def test_layers_without_a_gradient_are_left_alone(backend):
    params, base = make()
    params[0].grad = None
    before = params[0].detach().clone()
    LARS(base).step()
    assert torch.equal(params[0], before)
    assert params[0].grad is None


def test_no_gradients_at_all(backend):
    _, base = make()
    base.zero_grad()
    assert LARS(base).step() is None


def test_several_dtypes_in_one_group(backend):
    params = [nn.Parameter(torch.randn(40, 3).to(dtype)) for dtype in ops.DTYPES]
    grads = [torch.randn_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    LARS(SGD(params, lr=0.0, weight_decay=0.1)).step()
    for param, grad in zip(params, grads, strict=True):
        scale_gradients([grad], [param.detach()], [0.1], [0.001], [1e-8], False, module=reference)
        torch.testing.assert_close(param.grad, grad)


def test_gradients_of_several_dtypes_under_parameters_of_one(backend):
    params = [nn.Parameter(torch.randn(30, 5).bfloat16()) for _ in range(3)]
    for param, dtype in zip(params, (torch.float32, torch.bfloat16, torch.float64), strict=True):
        param.grad_dtype = dtype
        param.grad = torch.randn(30, 5).to(dtype)
    expected = [adapted(param.detach().double(), grad=param.grad.double()).to(param.grad.dtype) for param in params]
    LARS(SGD(params, lr=0.0, weight_decay=0.01, foreach=False)).step()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)


def test_several_devices_in_one_group(backend):
    (param,), _ = make([(3, 4)])
    elsewhere = nn.Parameter(torch.ones(3, 4, dtype=torch.float64, device="meta"))
    elsewhere.grad = torch.ones_like(elsewhere)
    expected = adapted(param)
    optimizer = LARS(SGD([elsewhere, param], lr=0.1, weight_decay=0.01, foreach=False))
    optimizer.step()
    torch.testing.assert_close(param.grad, expected, rtol=1e-13, atol=0)
    assert [ratio.device.type for ratio in optimizer.trust_ratios().values()] == ["meta", "cpu"]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's own, in 2.11, though it is told
def test_dense_and_sparse_layers_side_by_side(backend):
    dense = nn.Parameter(torch.randn(10, 3, dtype=torch.float64))
    sparse = nn.Parameter(torch.randn(10, 3, dtype=torch.float64))
    dense.grad = torch.randn(10, 3, dtype=torch.float64)
    sparse.grad = torch.sparse_coo_tensor(
        [[1, 7]], torch.randn(2, 3, dtype=torch.float64), (10, 3), check_invariants=True
    )
    expected = [adapted(dense, 0.0), adapted(sparse, 0.0, grad=sparse.grad.to_dense())]
    LARS(SGD([dense, sparse], lr=0.1)).step()
    torch.testing.assert_close(dense.grad, expected[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(sparse.grad.to_dense(), expected[1], rtol=1e-13, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's own, in 2.11, though it is told
@pytest.mark.parametrize("shape", [(2, 4), (1, 4)])
def test_expanded_values_of_a_sparse_gradient_are_replaced(backend, shape):
    param = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    values = torch.tensor([[0.3]], dtype=torch.float64).expand(shape)
    indices = torch.arange(shape[0]).reshape(1, -1)
    param.grad = torch.sparse_coo_tensor(indices, values, (5, 4), is_coalesced=True, check_invariants=True)
    expected = adapted(param, 0.0, grad=param.grad.to_dense())
    LARS(SGD([param], lr=0.1)).step()
    assert param.grad.is_coalesced()
    torch.testing.assert_close(param.grad.to_dense(), expected, rtol=1e-13, atol=0)


def test_a_negated_view_and_an_inference_tensor_are_replaced_by_their_values(backend):
    params, base = make([(3,), (4,)])
    params[0].grad = torch._neg_view(params[0].grad)
    with torch.inference_mode():
        made = torch.randn(4, dtype=torch.float64)
    params[1].grad = made
    expected = [adapted(param) for param in params]
    LARS(base).step()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-13, atol=0)


def test_a_tied_parameter_is_scaled_once(backend):
    params, _ = make([(3, 4)])
    expected = adapted(params[0])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        base = SGD([params[0], params[0]], lr=0.0, weight_decay=0.01)
    LARS(base).step()
    torch.testing.assert_close(params[0].grad, expected, rtol=1e-13, atol=0)


def test_an_expanded_gradient_is_replaced_by_its_values(backend):
    params, base = make([(3, 4)])
    params[0].grad = torch.tensor([[0.3]], dtype=torch.float64).expand(3, 4)
    expected = adapted(params[0])
    LARS(base).step()
    torch.testing.assert_close(params[0].grad, expected, rtol=1e-13, atol=0)


def test_a_gradient_of_overlapping_windows_is_replaced_by_its_values(backend):
    params, base = make([(3, 4)])
    params[0].grad = torch.arange(1.0, 7.0, dtype=torch.float64).as_strided((3, 4), (1, 1))
    expected = adapted(params[0])
    LARS(base).step()
    torch.testing.assert_close(params[0].grad, expected, rtol=1e-13, atol=0)


def test_a_conjugated_gradient_is_replaced_by_its_values(backend):
    params, base = make([(3, 4)], dtype=torch.complex128)
    params[0].grad = params[0].grad.conj()
    expected = adapted(params[0])
    LARS(base).step()
    torch.testing.assert_close(params[0].grad, expected, rtol=1e-13, atol=0)


VIEWS = {
    "in one piece": lambda flat: flat[:12].view(3, 4),
    "transposed": lambda flat: flat[:12].view(4, 3).mT,
    "with gaps": lambda flat: flat.view(3, 6)[:, 1:5],
    "every other column": lambda flat: flat.view(3, 6)[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_gradients_are_written_in_place(backend, view):
    flat = torch.randn(18, dtype=torch.float64)
    params, base = make([view(flat).shape, (5,)])
    params[0].grad = bucket_view = view(flat)
    expected_flat = flat.clone()
    expected = view(expected_flat).copy_(adapted(params[0]))
    LARS(base).step()
    assert params[0].grad is bucket_view
    torch.testing.assert_close(view(flat), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(flat, expected_flat, rtol=1e-13, atol=0)  # and nothing around it


def test_gradients_with_a_graph_are_adapted_without_it(backend):
    params, base = make([(3, 4), (4,)])
    loss = params[0].square().sum() + params[1].sum() ** 2  # the second gradient is expanded, and replaced
    grads = torch.autograd.grad(loss, params, create_graph=True)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    expected = [adapted(param) for param in params]
    LARS(base).step()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad.detach(), gradient, rtol=1e-13, atol=0)
        assert param.is_leaf
    assert not params[1].grad.requires_grad


@pytest.mark.parametrize("kind", ["shared", "of another layout"])
def test_copies_of_gradients_with_a_graph_have_none(backend, kind):
    params, base = make([(3, 4), (3, 4)], fused=True)
    graph = torch.ones((), dtype=torch.float64, requires_grad=True)
    for param in params:
        param.grad = {"shared": param.grad, "of another layout": param.grad.t().contiguous().t()}[kind] * graph
    if kind == "shared":
        params[1].grad = params[0].grad
    with torch.no_grad():
        expected = [adapted(param) for param in params]
    LARS(base).step()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad.detach(), gradient, rtol=1e-13, atol=0)
    assert not params[1].grad.requires_grad


def test_step_in_inference_mode(backend):
    params, base = make()
    expected = [adapted(param) for param in params]
    with torch.inference_mode():
        params[1].grad = params[1].grad.clone()
        LARS(base).step()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-13, atol=0)


STEPPING = {
    "LARS(SGD)": lambda params: LARS(SGD(params, lr=0.5, weight_decay=0.1), trust_coef=0.5),
    "LARS(torchlars SGD)": lambda params: LARS(
        torchlars.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.1), trust_coef=0.5
    ),
    "torchlars SGD": lambda params: torchlars.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.1),
    "LAMB(SGD)": lambda params: LAMB(SGD(params, lr=0.5, weight_decay=0.1)),
}


@pytest.mark.parametrize("make_optimizer", STEPPING.values(), ids=STEPPING)
def test_memory_that_is_shared_until_it_is_written(make_optimizer, backend):
    def random_values():
        return torch.randn(4, 300_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    values, stepped = random_values(), []
    for clone in (torch.clone, torch._lazy_clone):
        params = [nn.Parameter(clone(values[i])) for i in (0, 1)]
        for i, param in enumerate(params):
            param.grad = clone(values[2 + i])
        make_optimizer(params).step()
        stepped.append([*params, *(param.grad for param in params)])
    assert all(map(torch.equal, *stepped))
    assert torch.equal(values, random_values())  # of which the copies were made
    assert not torch.equal(stepped[0][0], values[0])


def test_gradients_in_float32_of_parameters_in_bfloat16(backend):
    param = nn.Parameter(torch.randn(30, 5).bfloat16())
    param.grad_dtype = torch.float32
    param.grad = torch.randn(30, 5)
    expected = adapted(param.detach().float(), grad=param.grad)
    LARS(SGD([param], lr=0.1, weight_decay=0.01, foreach=False)).step()
    torch.testing.assert_close(param.grad, expected)


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients_without_weight_decay(backend, coalesced):
    embedding = nn.Embedding(10, 3, sparse=True, dtype=torch.float64)
    optimizer = LARS(SGD(embedding.parameters(), lr=1.0))
    embedding(torch.tensor([1, 4, 4, 7])).square().sum().backward()
    if coalesced:
        embedding.weight.grad = embedding.weight.grad.coalesce()
    grad, before = embedding.weight.grad.to_dense(), embedding.weight.detach().clone()
    ratio = 0.001 * before.norm() / (grad.norm() + 1e-8)
    optimizer.step()
    torch.testing.assert_close(embedding.weight.detach(), before - ratio * grad, rtol=1e-13, atol=0)
    assert embedding.weight.grad.is_coalesced()  # else the base sorts it once more
    torch.testing.assert_close(embedding.weight.grad.to_dense(), ratio * grad, rtol=1e-13, atol=0)
    torch.testing.assert_close(optimizer.trust_ratios()[embedding.weight], ratio, rtol=1e-13, atol=0)


# What cannot be adapted


def compressed(dense):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout a beta
        return dense.to_sparse_csr()


def broken(kind):
    """A parameter with a gradient that LARS must refuse."""
    param = nn.Parameter(torch.ones(3, 4))
    param.grad = torch.ones(3, 4)
    if kind == "sparse":
        param.grad = torch.ones(3, 4).to_sparse()
    elif kind in ("csr", "device"):  # torch lets them come about on a GPU only, so the parameter lies here

        class Lying(nn.Parameter):
            grad = compressed(torch.ones(3, 4)) if kind == "csr" else torch.ones(3, 4, device="meta")

        param = Lying(torch.ones(3, 4))
    elif kind == "shape":
        param.data = torch.ones(4, 3)
    elif kind == "dtype":
        param.grad_dtype = None
        param.grad = torch.ones(3, 4, dtype=torch.complex64)
    elif kind == "gradient":
        param.grad_dtype = None
        param.grad = torch.ones(3, 4).to(torch.float8_e4m3fn)
    elif kind == "float8":
        param = nn.Parameter(torch.ones(3, 4).to(torch.float8_e4m3fn))
        param.grad = torch.ones(3, 4).to(torch.float8_e4m3fn)
    elif kind == "integer":
        param = nn.Parameter(torch.ones(3, 4, dtype=torch.int64), requires_grad=False)
        param.grad = torch.ones(3, 4, dtype=torch.int64)
    elif kind == "fsdp1":
        param._fsdp_flattened = True
    return param


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("sparse", RuntimeError, r"sparse gradients need weight_decay=0 \(weight_decay: 0.1\)"),
        ("csr", RuntimeError, r"gradients must be strided or sparse COO \(layout: torch.sparse_csr\)"),
        ("shape", RuntimeError, r"gradients must have their parameter's shape \(gradient: \(3, 4\)\)"),
        ("device", RuntimeError, r"gradients must be on their parameter's device \(parameter: cpu, gradient: meta\)"),
        ("dtype", RuntimeError, r"of their parameter's kind \(parameter: torch.float32, gradient: torch.complex64\)"),
        (
            "gradient",
            RuntimeError,
            r"of their parameter's kind \(parameter: torch.float32, gradient: torch.float8_e4m3fn",
        ),
        ("float8", TypeError, r"floating dtype with at least 16 bits .*float8_e4m3fn\); leave others to the base"),
        ("integer", TypeError, r"floating dtype with at least 16 bits .*int64\); leave others to the base"),
        ("fsdp1", RuntimeError, r"FSDP1 flattens and splits them; use fully_shard \(FSDP2\) from"),
    ],
)
def test_what_cannot_be_adapted_is_named_and_nothing_changes(backend, kind, error, message):
    fine, param = nn.Parameter(torch.ones(2)), broken(kind)
    fine.grad = torch.ones(2)
    base = SGD([{"params": [fine]}, {"params": [nn.Parameter(torch.ones(1)), param]}], lr=0.5, weight_decay=0.1)
    with pytest.raises(error, match=message) as raised:
        LARS(base).step()
    assert "group: 1, parameter: 1" in str(raised.value)
    assert fine.tolist() == [1.0, 1.0]
    assert fine.grad.tolist() == [1.0, 1.0]
    assert [group["weight_decay"] for group in base.param_groups] == [0.1, 0.1]
    assert not base.state


# Seeing what it does


def test_trust_ratios_of_the_last_step(backend):
    params, _ = make([(3, 4), (5,), (6,), (2,)])
    params[2].grad = None
    groups = [{"params": params[:3]}, {"params": params[3:], "trust_coef": None}]
    optimizer = LARS(SGD(groups, lr=0.1, weight_decay=0.01))
    assert optimizer.trust_ratios() == {}
    expected = [0.001 * p.detach().norm() / (p.grad.norm() + 0.01 * p.detach().norm() + 1e-8) for p in params[:2]]
    optimizer.step()
    ratios = optimizer.trust_ratios()
    assert list(ratios) == params[:2]
    for param, ratio in zip(params, expected, strict=False):
        torch.testing.assert_close(ratios[param], ratio, rtol=1e-13, atol=0)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.trust_ratios() == {}


def named_model():
    """A model with two kinds of layers, and its optimizer's groups with names."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    for i, param in enumerate(model.parameters()):
        param.grad = (i + 1) * torch.randn_like(param)
    weights = [(name, param) for name, param in model.named_parameters() if param.ndim > 1]
    biases = [(name, param) for name, param in model.named_parameters() if param.ndim == 1]
    return model, [{"params": weights}, {"params": biases, "trust_coef": None}]


def test_trust_ratios_by_name(backend):
    model, groups = named_model()
    optimizer = LARS(SGD(groups, lr=0.1, weight_decay=0.01))
    assert optimizer.named_trust_ratios() == optimizer.named_trust_ratios(model.named_parameters()) == {}
    expected = {
        name: 0.001 * p.detach().norm() / (p.grad.norm() + 0.01 * p.detach().norm() + 1e-8)
        for name, p in model.named_parameters()
        if p.ndim > 1
    }
    assert list(expected) == ["0.weight", "1.weight"]
    optimizer.step()
    of_part = optimizer.named_trust_ratios(model[1].named_parameters())
    assert of_part == {"weight": optimizer.trust_ratios()[model[1].weight]}
    assert optimizer.named_trust_ratios([("bias", model[1].bias)]) == {}
    for names in (None, model.named_parameters(), dict(model.named_parameters())):
        ratios = optimizer.named_trust_ratios(names)
        assert list(ratios) == list(expected)
        torch.testing.assert_close(ratios, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (
            None,
            ValueError,
            r"must hold the names of their parameters \(got: no param_names in group 0\); pass model\.named",
        ),
        (nn.Linear(2, 2), TypeError, r"must be names and parameters, such as .* \(got: Linear with Linear\)"),
        (
            nn.Sequential(nn.ReLU()),
            TypeError,
            r"must be names and parameters, such as .* \(got: Sequential with ReLU\)",
        ),
        ([nn.Parameter(torch.ones(2, 2))], TypeError, r"must be names and parameters, .* \(got: list with Parameter\)"),
        (
            nn.Linear(2, 2).named_parameters(),
            ValueError,
            r"\(got: 2, of which none is among the 4 in its groups\)",
        ),
        (iter(()), ValueError, r"\(got: 0, of which none is among the 4 in its groups\)"),
        (
            [*nn.Linear(2, 2).named_parameters(), *nn.Linear(2, 2).named_parameters()],
            ValueError,
            r"must have one name each \(got: 'weight' twice\)",
        ),
    ],
)
def test_trust_ratios_by_name_need_the_names_of_the_parameters(names, error, message):
    groups = named_model()[1]
    for group in groups:
        group["params"] = [param for _, param in group["params"]]
    optimizer = LARS(SGD(groups, lr=0.1, weight_decay=0.01))
    with pytest.raises(error, match=message):
        optimizer.named_trust_ratios(names)


def test_gradients_are_not_kept_alive(backend):
    import weakref

    params, base = make()
    optimizer = LARS(base)
    optimizer.step()
    grad = weakref.ref(params[0].grad)
    optimizer.zero_grad(set_to_none=True)
    assert grad() is None


def test_repr_shows_the_options_and_the_base():
    _, base = make()
    assert repr(LARS(base, trust_coef=0.02, norm="decayed")) == (
        "LARS(eps=1e-08, trust_coef=0.02, clip=False, norm='decayed', lr_in_momentum=False, apply_to='gradient', "
        f"always_adapt=True, weight_decay=None, optim={base!r})"
    )


# --- What groups, state dicts and classes bring with them ------------------------------------------------------------


@pytest.mark.parametrize("said_by", ["wrapper", "group"])
@pytest.mark.parametrize("options", [{}, {"norm": "decayed"}, {"clip": True}, {"apply_to": "update"}], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torchlars.optim.SGD], ids=["torch", "torchlars"])
def test_decoupled_decay_stays_the_bases_whichever_base_it_is(backend, base, options, said_by):
    """A base that takes trust ratios would multiply its own decay by them."""
    param = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    group = {"params": [param], **({"decoupled_weight_decay": True} if said_by == "group" else {})}
    options = {**options, **({"weight_decay": "decoupled"} if said_by == "wrapper" else {})}
    optimizer = LARS(base([group], lr=0.5, momentum=0.9, weight_decay=0.1), eps=0.25, trust_coef=0.1, **options)
    w, m = param.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for g in (torch.tensor([0.6, 0.8]), torch.tensor([-0.3, 0.4])):
        param.grad = g.double()
        optimizer.step()
        r = 0.1 * w.norm() / (param.grad.new_tensor(g.norm().item()) + 0.25)  # no decay in it
        r = min(r / 0.5, torch.tensor(1.0)) if "clip" in options else r
        scale_gradient, scale_step = (1, r) if "apply_to" in options else (r, 1)
        m = 0.9 * m + scale_gradient * g.double() + 0.1 * w
        w = w - scale_step * 0.5 * m
        torch.testing.assert_close(param.detach(), w, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("make_base", "options"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), {"weight_decay": "decoupled"}),
        (
            lambda params: torch.optim.SGD(
                [{"params": params, "decoupled_weight_decay": True}], lr=0.1, weight_decay=0.1
            ),
            {},
        ),
    ],
    ids=["wrapper", "group"],
)
def test_decoupled_decay_needs_the_lr_that_lr_in_momentum_hides(make_base, options):
    with pytest.raises(ValueError, match=r"lr_in_momentum=True.* hides lr from the base, which decoupled"):
        LARS(make_base([nn.Parameter(torch.ones(2))]), lr_in_momentum=True, **options)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"trust_coef": None, "clip": "yes"}, TypeError, "clip of parameter group 0 must be True or False"),
        ({"trust_coef": None, "norm": "l1"}, ValueError, "norm of parameter group 0 must be 'raw' or 'decayed'"),
        (
            {"trust_coef": None, "lr_in_momentum": True, "apply_to": "update"},
            ValueError,
            "lr_in_momentum=True of parameter group 0 needs apply_to='gradient'",
        ),
        ({"clip": "yes"}, TypeError, "clip of parameter group 0 must be True or False"),
        ({"weight_decay": "decoupled"}, TypeError, "weight_decay of parameter group 0 must be a non-negative number"),
    ],
    ids=str,
)
def test_a_group_is_checked_before_it_is_taken_or_loaded(keys, error, message):
    def base(**keys):
        return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], **keys}], lr=0.1, momentum=0.5)

    with pytest.raises(error, match=message):
        LARS(base(**keys))
    optimizer = LARS(base(), eps=0.5)
    before = copy.deepcopy(optimizer.state_dict())
    state_dict = base(**keys).state_dict()
    state_dict["param_groups"][0]["momentum"] = 0.9
    with pytest.raises(error, match=message):
        optimizer.load_state_dict({**state_dict, "lars": {"eps": 0.25}})
    assert optimizer.state_dict() == before
    with pytest.raises(error, match=message.replace("group 0", "group 1")):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **keys})
    assert len(optimizer.param_groups) == 1


def test_lars_over_a_base_without_lr_says_so_where_it_needs_one():
    class Stepless(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    base = Stepless([nn.Parameter(torch.ones(2))], {})
    with pytest.raises(TypeError, match=r"optimizer must have a learning rate \(got: Stepless, without lr in"):
        LARS(base, clip=True)
    LARS(base)


@pytest.mark.parametrize(
    "make",
    [
        lambda lr, params: LARS(torch.optim.SGD(params, lr=lr), clip=True),
        lambda lr, params: LARS(torchlars.optim.SGD(params, lr=lr)),
        lambda lr, params: torchlars.LAMB(torch.optim.SGD(params, lr=lr)),
    ],
    ids=["LARS, clipped", "LARS(torchlars SGD)", "LAMB"],
)
def test_an_lr_of_the_host_is_refused_while_a_cuda_graph_is_captured(make, monkeypatch):
    """The graph would copy it, at every replay, from memory that has long been something else."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    lr = torch.tensor(0.5)
    optimizer = make(lr, [param])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    message = r"^lr must be on the parameters' device while a CUDA graph is captured \(got: a tensor on cpu\); a number is kept"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))
    assert torch.equal(param.grad, torch.ones(3))
    monkeypatch.undo()
    optimizer.step()
    assert not torch.equal(param, torch.ones(3))
