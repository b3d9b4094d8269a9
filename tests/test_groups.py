"""param_groups(), which keeps layers out of adaptation, and the warning of layers whose weights are all 0."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LinearLR

import torchlars
from torchlars import LARS, param_groups, zero_layers

LR = {"lr": 16.0, "weight_decay": 0.1}


class Net(nn.Module):
    """Something of everything: norms of many dimensions, a tied weight, a scalar, a frozen layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        )
        self.norm = nn.LayerNorm((4, 2))
        self.rms = nn.RMSNorm((2, 2))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight


NORMS = [
    "norm.weight",
    "norm.bias",
    "rms.weight",
    *(f"body.{i}.{name}" for i in (1, 2, 3) for name in ("weight", "bias")),
]
OTHERS = {"scale", "body.0.bias", "frozen.bias", "head.bias", *NORMS}


def names(model, group):
    """The names of a group's parameters, in its order."""
    by_param = {param: name for name, param in model.named_parameters()}
    return [by_param[param] for param in group["params"]]


def split(model, **options):
    """The names of the weights and of the others, as sets."""
    return [set(names(model, group)) for group in param_groups(model, **{**LR, **options})]


# The groups


def test_weights_and_the_others_with_their_hyper_parameters():
    model = Net()
    weights, others = param_groups(model, lr=16, weight_decay=5e-4, bias_lr=0.2)
    assert names(model, weights) == [name for name, _ in model.named_parameters() if name not in OTHERS]
    assert names(model, others) == [name for name, _ in model.named_parameters() if name in OTHERS]
    assert {key: value for key, value in weights.items() if key != "params"} == {"lr": 16.0, "weight_decay": 5e-4}
    assert {key: value for key, value in others.items() if key != "params"} == {
        "lr": 0.2,
        "weight_decay": 0.0,
        "trust_coef": None,
    }


@pytest.mark.parametrize(("lr", "expected"), [(16, 0.05), (0.05, 0.05), (1e-3, 1e-3), (0, 0.0)])
def test_bias_lr_is_by_default_one_that_the_base_can_take(lr, expected):
    assert [group["lr"] for group in param_groups(Net(), lr=lr, weight_decay=0)] == [lr, expected]


def test_lrs_may_be_tensors():
    lr, bias_lr = torch.tensor(16.0), torch.tensor([0.05])
    groups = param_groups(Net(), lr=lr, weight_decay=0, bias_lr=bias_lr)
    assert groups[0]["lr"] is lr
    assert groups[1]["lr"] is bias_lr
    assert param_groups(Net(), lr=lr, weight_decay=0, bias_lr=0.5)[1]["lr"] == 0.5


@pytest.mark.parametrize(
    ("exclude", "more"),
    [
        ([], set()),
        (["embedding.weight"], {"embedding.weight"}),
        (("body.0.*",), {"body.0.weight"}),
        (["*d*.weight"], {"embedding.weight", "body.0.weight"}),
        (["head.bias"], set()),  # it is out already
        ({"frozen.*", "body.?.weight"}, {"frozen.weight", "body.0.weight"}),
        ((pattern for pattern in ["embedding.*", "frozen.*"]), {"embedding.weight", "frozen.weight"}),
    ],
)
def test_names_and_patterns_are_excluded_as_well(exclude, more):
    model = Net()
    weights, others = split(model, exclude=exclude)
    assert others == OTHERS | more
    assert weights | others == {name for name, _ in model.named_parameters()}


def test_patterns_know_upper_and_lower_case():
    with pytest.raises(ValueError, match=r"got: 'HEAD\.\*'"):
        param_groups(Net(), **LR, exclude=["HEAD.*"])


def test_a_name_with_the_signs_of_a_pattern_is_a_name():
    model = nn.ParameterDict({"a[0]": torch.randn(2, 2), "a0": torch.randn(2, 2)})
    assert split(model, exclude=["a[[]0]"]) == [{"a0"}, {"a[0]"}]
    assert split(model, exclude=["a[0]"]) == [{"a0", "a[0]"}]  # as a pattern, it is the other one
    (group,) = param_groups(nn.ParameterDict({"a[0]": torch.randn(2, 2)}), **LR, exclude=["a[0]"])
    assert group["trust_coef"] is None


def test_a_tied_parameter_comes_once_and_is_excluded_under_any_of_its_names():
    model = Net()
    for exclude in (["head.weight"], ["embedding.weight"]):  # the second owner's name is not in named_parameters()
        weights, others = param_groups(model, **LR, exclude=exclude)
        assert sum(param is model.head.weight for param in weights["params"]) == 0
        assert sum(param is model.head.weight for param in others["params"]) == 1


def test_one_module_may_have_two_names_for_a_parameter():
    model = nn.Linear(3, 4)
    model.other = model.weight
    assert [len(group["params"]) for group in param_groups(model, **LR)] == [1, 1]
    assert [len(group["params"]) for group in param_groups(model, **LR, exclude=["other"])] == [2]


def test_a_weight_that_a_norm_owns_as_well_is_excluded():
    norm = nn.LayerNorm((4, 2))
    linear = nn.Linear(2, 4)
    linear.weight = norm.weight
    for model in (nn.Sequential(linear, norm), nn.Sequential(norm, linear)):
        (group,) = param_groups(model, **LR)
        assert group["trust_coef"] is None
        assert len(group["params"]) == 3


def test_a_module_that_is_there_twice_comes_once():
    block = nn.Linear(3, 3)
    model = nn.Sequential(block, nn.ReLU(), block)
    assert [len(group["params"]) for group in param_groups(model, **LR)] == [1, 1]
    assert [len(group["params"]) for group in param_groups(model, **LR, exclude=["2.weight"])] == [2]


def test_classes_derived_from_torchs_norms_are_norms_and_what_they_contain_is_not():
    class Scaled(nn.LayerNorm):
        def __init__(self):
            super().__init__((3, 2))
            self.inner = nn.Linear(2, 2)

    assert split(Scaled()) == [{"inner.weight"}, {"weight", "bias", "inner.bias"}]


def test_empty_groups_are_left_out():
    (group,) = param_groups(nn.Linear(2, 2, bias=False), **LR)
    assert "trust_coef" not in group
    (group,) = param_groups(nn.BatchNorm1d(3), **LR)
    assert group["trust_coef"] is None
    assert param_groups(nn.ReLU(), **LR) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": [nn.Parameter(torch.ones(2))]}, TypeError, r"model must be a torch.nn.Module \(got: list\)"),
        ({"model": nn.Linear}, TypeError, r"model must be a torch.nn.Module \(got: type\)"),
        ({"lr": -1.0}, ValueError, r"lr must be a non-negative number \(got: -1.0\)"),
        ({"lr": None}, TypeError, r"lr must be a non-negative number \(got: None of type NoneType\)"),
        ({"lr": torch.ones(2), "bias_lr": 0.1}, ValueError, r"lr must be .* of one element \(got: \(2,\)\)"),
        ({"lr": torch.tensor(16.0)}, ValueError, r"bias_lr must be given where lr is a tensor \(got: None\)"),
        ({"bias_lr": float("nan")}, ValueError, r"bias_lr must be a non-negative number \(got: nan\)"),
        ({"bias_lr": "0.1"}, TypeError, r"bias_lr must be a non-negative number \(got: '0.1' of type str\)"),
        ({"bias_lr": torch.ones(0)}, ValueError, r"bias_lr must be .* of one element \(got: \(0,\)\)"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be a non-negative number \(got: -0.1\)"),
        ({"weight_decay": torch.tensor(0.1)}, TypeError, r"weight_decay must be a non-negative number \(got: tensor"),
        ({"exclude": "head.*"}, TypeError, r"exclude must be a list of patterns, .*'head\.\*'\); pass \['head\.\*'\]"),
        ({"exclude": 3}, TypeError, r"exclude must be a list of patterns \(got: int\)"),
        ({"exclude": ["head.*", None]}, TypeError, r"exclude must hold strings, names or patterns \(got: NoneType\)"),
        (
            {"exclude": ["head.*", "tail"]},
            ValueError,
            r"exclude must match names of parameters \(got: 'tail'; names: scale, embedding.weight, body.0.weight, "
            r"body.0.bias, body.1.weight, and 1\d more\)",
        ),
        ({"model": nn.ReLU(), "exclude": ["x"]}, ValueError, r"\(got: 'x'; names: none\)"),
        (
            {"model": nn.Sequential(nn.LazyLinear(3))},
            ValueError,
            r"model must have seen a batch, which gives lazy parameters their shape \(got: 0.weight\)",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, error, message):
    arguments = {"model": Net(), **LR, **options}
    with pytest.raises(error, match=f"^{message}" if not message.startswith(r"\(") else message):
        param_groups(arguments.pop("model"), **arguments)


# What they do


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def test_lars_over_sgd_treats_weights_and_biases_as_by_hand(backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((2, 2)), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[0].bias)  # no layer is too small for its group
    by_hand = copy.deepcopy(model)
    optimizer = LARS(SGD(param_groups(model, lr=16, weight_decay=0.1, bias_lr=0.2), momentum=0.9), trust_coef=0.01)
    buffers = {}
    for step in range(3):
        gradients(model, step)
        gradients(by_hand, step)
        optimizer.step()
        with torch.no_grad():
            for name, param in by_hand.named_parameters():
                lr, update = 0.2, param.grad
                if name in ("0.weight", "2.weight"):
                    lr, decayed = 16, param.grad + 0.1 * param
                    update = 0.01 * param.norm() / (param.grad.norm() + 0.1 * param.norm() + 1e-8) * decayed
                buffers[name] = 0.9 * buffers.get(name, 0) + update
                param -= lr * buffers[name]
        for param, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-12, atol=1e-14)
    assert set(optimizer.trust_ratios()) == {model[0].weight, model[2].weight}


def test_a_scheduler_keeps_the_two_lrs_in_proportion_and_a_state_dict_keeps_the_groups():
    model = Net()
    optimizer = LARS(SGD(param_groups(model, **LR, bias_lr=0.2)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [8.0, 0.1]
    other = LARS(SGD(param_groups(model, lr=1, weight_decay=0)))
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [8.0, 0.1]
    assert [group.get("trust_coef", "adapted") for group in other.param_groups] == ["adapted", None]


@pytest.mark.parametrize("base", [SGD, AdamW, torchlars.optim.SGD], ids=["SGD", "AdamW", "torchlars"])
def test_the_second_group_is_the_bases_alone(base, backend):
    model = nn.Linear(3, 4)
    plain = copy.deepcopy(model)
    optimizer = LARS(base(param_groups(model, lr=2, weight_decay=0.5, bias_lr=0.2)))
    alone = base([plain.bias], lr=0.2, weight_decay=0.0)
    for step in range(3):
        gradients(model, step)
        gradients(plain, step)
        optimizer.step()
        alone.step()
        assert torch.equal(model.bias, plain.bias)


# The warning

WARNING = (
    r"^a layer whose weights are all 0 has the trust ratio 1, so that its first step takes the whole lr \({}\); give "
    r"biases and norms an lr of their own, as torchlars\.param_groups\(model, lr=\.\.\., weight_decay=\.\.\., "
    r"bias_lr=\.\.\.\) does, or warm lr up from one that the base could take alone$"
)
WARNING_OF_MATRICES = WARNING.replace("biases and norms", "layers that start at 0").replace(
    r"bias_lr=\.\.\.\) does", r"exclude=\['\*\.lora_B\.\*'\]\) does by name"
)


def layers(*zero, dtype=torch.float32):
    """Three layers, of which some are 0."""
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 4), (5,), (2,))]
    for position in zero:
        nn.init.zeros_(params[position])
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def warned(optimizer, closure=None):
    """The warnings of one step, which name a line here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(*[closure] if closure else [])
    assert all((one.category, one.filename) == (UserWarning, __file__) for one in caught)
    return [str(one.message) for one in caught]


def test_a_layer_of_zeros_is_named_once(backend):
    optimizer = LARS(SGD([{"params": layers()}, {"params": layers(1)}], lr=16.0))
    with pytest.warns(UserWarning, match=WARNING.format(r"group: 1, parameter: 1, shape: \(5,\), lr: 16.0")) as caught:
        optimizer.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert warned(optimizer) == []


def test_of_many_layers_the_first_is_named_and_the_others_are_counted(backend):
    params = [*layers(0, 1, dtype=torch.bfloat16), *layers(2)]
    optimizer = LARS(SGD(params, lr=1))
    expected = r"group: 0, parameter: 0, shape: \(3, 4\), lr: 1; and 2 more"
    with pytest.warns(UserWarning, match=WARNING_OF_MATRICES.format(expected)):
        optimizer.step()


def test_the_advice_for_a_matrix_of_zeros_helps(backend):
    """LoRA's B starts at 0, and param_groups takes it for weights: the warning names the argument that does not."""
    model = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(4, 2)}), "lora_B": nn.Linear(2, 3)})
    nn.init.zeros_(model["lora_B"].weight)
    options = {"lr": 16.0, "weight_decay": 0.1}
    gradients(model, 0)
    optimizer = LARS(SGD(param_groups(model, **options), momentum=0.9))
    with pytest.warns(
        UserWarning, match=WARNING_OF_MATRICES.format(r"group: 0, parameter: 1, shape: \(3, 2\), lr: 16.0")
    ):
        optimizer.step()

    nn.init.zeros_(model["lora_B"].weight)
    optimizer = LARS(SGD(param_groups(model, **options, exclude=["*lora_B.*"]), momentum=0.9))
    assert warned(optimizer) == []
    step = 0.05 * model["lora_B"].weight.grad  # by the lr of biases
    torch.testing.assert_close(model["lora_B"].weight.detach(), -step, rtol=1e-6, atol=0)


def test_a_layer_is_called_by_its_name_if_the_base_knows_it():
    model = nn.Sequential(nn.Linear(3, 4))
    nn.init.zeros_(model[0].bias)
    gradients(model, 0)
    optimizer = LARS(SGD(model.named_parameters(), lr=16.0))
    with pytest.warns(UserWarning, match=r"\(group: 0, parameter: 1, name: 0.bias, shape: \(4,\), lr: 16.0\)"):
        optimizer.step()


def test_the_whole_lr_is_taken_indeed(backend):
    """What the warning says is so, and not so for its neighbour."""
    params = layers(1, dtype=torch.float64)
    optimizer = LARS(SGD(params, lr=16.0))
    before = params[0].detach().clone()
    assert len(warned(optimizer)) == 1
    assert torch.equal(params[1].detach(), torch.full((5,), -16.0, dtype=torch.float64))
    assert (params[0].detach() - before).norm() < 0.017 * before.norm()


def scaled_step(optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


def hooked_step(optimizer):
    optimizer.register_step_pre_hook(lambda *args: None)
    optimizer.step()


@pytest.mark.parametrize("step", [LARS.step, scaled_step, hooked_step, lambda optimizer: optimizer.step(lambda: 0.0)])
def test_the_warning_names_the_line_of_the_user(step):
    """Not one of torch's schedulers, scalers and hooks, which call the step."""
    optimizer = LARS(SGD(layers(1), lr=16.0))
    LinearLR(optimizer, start_factor=0.5)
    with pytest.warns(UserWarning, match="a layer whose weights are all 0") as caught:
        step(optimizer)
    assert [one.filename for one in caught] == [__file__]


def test_a_base_that_takes_trust_ratios_is_warned_of_as_well(backend):
    assert len(warned(LARS(torchlars.optim.SGD(layers(1), lr=16.0)))) == 1


def test_gradients_may_come_from_a_closure():
    params = layers(1, 2)
    for param in params:
        param.grad = None
    calls = []

    def closure():
        calls.append(None)
        params[2].grad = torch.ones(2)
        return torch.tensor(3.0)

    optimizer = LARS(SGD(params, lr=16.0))
    with pytest.warns(UserWarning, match=r"\(group: 0, parameter: 2, shape: \(2,\), lr: 16.0\)"):
        assert optimizer.step(closure) == 3
    assert len(calls) == 1
    assert warned(optimizer, closure) == []


def test_a_closure_that_is_evaluated_twice_warns_once():
    class Twice(SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    params = layers(1)
    optimizer = LARS(Twice(params, lr=16.0))
    assert len(warned(optimizer, lambda: None)) == 1


@pytest.mark.parametrize("lr", [0.0, 0.5, 0.999, torch.tensor(16.0)], ids=str)
def test_a_small_lr_or_one_that_the_host_does_not_know_gives_no_warning(lr):
    optimizer = LARS(SGD(layers(1), lr=lr))
    assert warned(optimizer) == []
    optimizer.param_groups[0]["lr"] = 16.0  # a second step is none of its business
    nn.init.zeros_(optimizer.param_groups[0]["params"][1])
    assert warned(optimizer) == []


def test_the_lr_is_that_of_the_first_step():
    optimizer = LARS(SGD(layers(1), lr=16.0))
    torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=10)
    assert warned(optimizer) == []
    optimizer = LARS(SGD(layers(1), lr=0.1))
    optimizer.param_groups[0]["lr"] = 16.0
    assert len(warned(optimizer)) == 1


def test_an_lr_that_the_base_comes_with_gives_no_warning():
    assert warned(LARS(torch.optim.Adadelta(layers(1)))) == []
    assert len(warned(LARS(torch.optim.Adadelta(layers(1), lr=5.0)))) == 1

    class WithoutLR(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    assert warned(LARS(WithoutLR(layers(1)))) == []


def test_groups_that_opt_out_give_no_warning():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(param)
    gradients(model, 0)
    assert len(warned(LARS(SGD(copy_with_gradients(model).parameters(), lr=16.0)))) == 1
    assert warned(LARS(SGD(param_groups(model, lr=16, weight_decay=0.1)))) == []
    assert warned(LARS(SGD([{"params": layers(1), "trust_coef": None}], lr=16.0))) == []


def copy_with_gradients(model):
    model = copy.deepcopy(model)
    gradients(model, 0)
    return model


def test_lars_that_clips_gives_no_warning():
    assert warned(LARS(SGD(layers(1), lr=16.0), clip=True)) == []
    assert warned(LARS(SGD([{"params": layers(1), "clip": True}], lr=16.0))) == []
    for clip in (True, False):
        assert len(warned(LARS(SGD([{"params": layers(1), "clip": False}], lr=16.0), clip=clip))) == 1


def test_layers_without_a_gradient_or_without_elements_give_no_warning():
    params = [*layers(1), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(3))]
    params[1].grad = None
    params[3].grad = torch.zeros(0, 3)
    assert warned(LARS(SGD(params, lr=16.0))) == []


def test_layers_that_were_filled_meanwhile_give_no_warning():
    model, trained = nn.Linear(3, 4), nn.Linear(3, 4)
    nn.init.zeros_(model.bias)
    optimizer = LARS(SGD(model.parameters(), lr=16.0))
    model.load_state_dict(trained.state_dict())
    gradients(model, 0)
    assert warned(optimizer) == []


def test_a_group_that_is_added_is_watched_until_its_first_step():
    optimizer = LARS(SGD(layers(), lr=16.0))
    optimizer.add_param_group({"params": layers(2)})
    with pytest.warns(UserWarning, match=r"\(group: 1, parameter: 2, shape: \(2,\), lr: 16.0\)"):
        optimizer.step()
    nn.init.zeros_(optimizer.param_groups[0]["params"][1])  # it has had its first step
    optimizer.add_param_group({"params": layers(1)})
    with pytest.warns(UserWarning, match=r"\(group: 2, parameter: 1, shape: \(5,\), lr: 16.0\)"):
        optimizer.step()
    assert warned(optimizer) == []


def test_a_group_that_the_base_refuses_is_not_watched():
    params = layers(1)
    optimizer = LARS(SGD(layers(), lr=16.0))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [*params, optimizer.param_groups[0]["params"][0]]})
    assert warned(optimizer) == []


def test_a_warning_that_is_an_error_comes_before_anything_has_changed():
    params = layers(1)
    optimizer = LARS(SGD(params, lr=16.0, weight_decay=0.1, momentum=0.9))
    before = [(param.detach().clone(), param.grad.clone()) for param in params]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="a layer whose weights are all 0"):
            optimizer.step()
    assert all(torch.equal(p, q) and torch.equal(p.grad, g) for p, (q, g) in zip(params, before, strict=True))
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert warned(optimizer) == []


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_copies_do_not_watch_and_the_original_still_does(duplicate):
    optimizer = LARS(SGD(layers(1), lr=16.0))
    keys = set(optimizer.state_dict())
    other = duplicate(optimizer)
    assert other._zero_layers is None
    for param in other.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    assert warned(other) == []
    assert keys == {"state", "param_groups", "lars"}
    assert set(optimizer.state_dict()["lars"]) == set(LARS.options)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    assert len(warned(optimizer)) == 1


def test_nothing_is_held_after_the_first_step():
    params = layers(1)
    optimizer = LARS(SGD(params, lr=16.0))
    watching = weakref.ref(optimizer._zero_layers)
    warned(optimizer)
    gc.collect()
    assert optimizer._zero_layers is None
    assert watching() is None


def test_tensors_that_are_not_what_they_seem_are_passed_over():
    class Special(torch.Tensor):
        pass

    with torch.inference_mode():
        inference = torch.zeros(3)
    passed_over = [
        torch.zeros(3).as_subclass(Special),
        nn.Parameter(torch.zeros(3).as_subclass(Special)),
        torch.zeros(3, device="meta"),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, dtype=torch.int64),
        nn.UninitializedParameter(),
        inference,
    ]
    watching = zero_layers.ZeroLayers()
    watching.watch(passed_over)
    assert watching._watched == set()
    assert watching._answers == []
    with torch._subclasses.FakeTensorMode():
        LARS(SGD([nn.Parameter(torch.zeros(3))], lr=16.0))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("with_closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("eager_steps", [0, 1])
def test_a_compiled_step_is_as_it_was(eager_steps, with_closure, backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    params = layers(1, dtype=torch.float64)
    optimizer = LARS(SGD(params, lr=16.0, momentum=0.9))
    expected = copy.deepcopy(optimizer)
    for mine, theirs in zip(params, expected.param_groups[0]["params"], strict=True):
        theirs.grad = mine.grad.clone()
    for _ in range(eager_steps):
        assert len(warned(optimizer)) == 1
        expected.step()
    compiles = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=compiles)
    counts = []

    def closure():
        return torch.tensor(1.0)

    for _ in range(3):
        step(*[closure] if with_closure else [])  # a warning would be an error
        expected.step()
        counts.append(compiles.frame_count)
        for mine, theirs in zip(params, expected.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
            mine.grad, theirs.grad = torch.ones_like(mine), torch.ones_like(mine)
    assert counts[-1] > 0
    assert counts[2] == counts[1]  # the momentum is there from the second step on: nothing is compiled anew
    torch._dynamo.reset()


# An accelerator, of which there may be none here: the same tensors, said to be far away.


class Event:
    def __init__(self, is_done):
        self.is_done, self.asked = is_done, 0

    def query(self):
        self.asked += 1
        return self.is_done


@pytest.fixture
def far_away(monkeypatch):
    """Make the CPU a device whose values are not to be read, and whose events are this one."""
    event = Event(is_done=True)
    monkeypatch.setattr(zero_layers, "_is_readable", lambda param: False)
    monkeypatch.setattr(zero_layers, "_record", lambda device: event)
    return event


def test_an_accelerators_answer_is_taken(far_away, backend):
    optimizer = LARS(SGD([*layers(1), *layers(0, dtype=torch.float64)], lr=16.0))
    with pytest.warns(UserWarning, match=r"\(group: 0, parameter: 1, shape: \(5,\), lr: 16.0; and 1 more\)"):
        optimizer.step()
    assert warned(optimizer) == []


def test_an_accelerators_answer_is_not_waited_for(far_away):
    far_away.is_done = False
    optimizer = LARS(SGD(layers(1), lr=16.0))
    assert warned(optimizer) == []
    assert far_away.asked == 1
    far_away.is_done = True
    assert warned(optimizer) == []
    assert far_away.asked == 1


def test_an_accelerator_is_not_asked_where_no_layer_is_in_question(far_away):
    assert warned(LARS(SGD(layers(1), lr=0.1))) == []
    assert far_away.asked == 0


def test_an_accelerators_answer_is_dropped_where_the_layer_is_another_by_now(far_away):
    model, trained = nn.Linear(3, 4), nn.Linear(3, 4)
    nn.init.zeros_(model.bias)
    optimizer = LARS(SGD(model.parameters(), lr=16.0))
    model.load_state_dict(trained.state_dict())
    gradients(model, 0)
    assert warned(optimizer) == []

    params = layers(1)
    optimizer = LARS(SGD(params, lr=16.0))
    params[1].data = torch.ones(5)  # as .to(device) does
    assert warned(optimizer) == []


def test_a_device_that_has_no_events_gives_no_warning(far_away, monkeypatch):
    def record(device):
        raise NotImplementedError("no events here")

    monkeypatch.setattr(zero_layers, "_record", record)
    assert warned(LARS(SGD(layers(1), lr=16.0))) == []


def test_a_graph_that_is_captured_is_not_disturbed(far_away, monkeypatch):
    optimizer = LARS(SGD(layers(1), lr=16.0))
    monkeypatch.setattr(zero_layers, "is_capturing", lambda device: True)
    assert warned(optimizer) == []
    assert far_away.asked == 0
    optimizer = LARS(SGD(layers(1), lr=16.0))
    assert optimizer._zero_layers._answers == []


def test_groups_that_are_not_always_adapted_are_warned_of_too():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    groups = [{"params": [param], "weight_decay": decay} for param, decay in zip(params, (0.1, 0.0), strict=True)]
    optimizer = LARS(SGD(groups, lr=16.0), always_adapt=False)
    message = r"a group with always_adapt=False and no weight decay takes .* \(group: 1, lr: 16\)"
    with pytest.warns(UserWarning, match=message):
        optimizer.step()
    optimizer.step()
