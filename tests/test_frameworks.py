"""The recipes under "Frameworks that construct the optimizer" in examples/README.md, where these are installed."""

import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from peer_calls import README, assert_same, openmmlab, torchlars_0_1_2
from torch import nn

from torchlars import LARS

SECTION = re.search(r"^## Frameworks that construct the optimizer\n(.*?)^## ", README, re.M | re.S)[1]
MMENGINE, TORCHTITAN, SOLO_LEARN = re.findall(r"^```python\n(.*?)^```", SECTION, re.M | re.S)
LRS = (1.0, 1.5, 0.2)  # relative to the recipe's


def run(code, needs):
    """Run a recipe as it is printed; return its names."""
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(needs, exc_type=ImportError)
        exec(code, names)
    return names


def model():
    torch.manual_seed(2)
    parts = {"fc": nn.Linear(4, 6), "bn": nn.BatchNorm1d(6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 3)}
    net = nn.Sequential()
    for i, (name, part) in enumerate(parts.items()):
        net.add_module(name, part.double())
        with torch.no_grad():
            for param in part.parameters():
                param.copy_(10.0 ** (i - 1) * torch.randn(param.shape, dtype=torch.float64))
    return net


def set_grads(net, step):
    random = torch.Generator().manual_seed(step)
    for i, param in enumerate(net.parameters()):
        param.grad = 10.0 ** (i % 3 - 2) * torch.randn(param.shape, generator=random, dtype=torch.float64)


def set_lrs(groups, lrs, relative):
    for group, lr in zip(groups, lrs, strict=True):
        group["lr"] = lr * relative


def expected_of(formula, hyper_of):
    """Take all steps by a formula, with the hyper-parameters of each named parameter."""
    net, memories = model(), {}
    for step, relative in enumerate(LRS):
        set_grads(net, step)
        with torch.no_grad():
            for name, param in net.named_parameters():
                h = SimpleNamespace(nesterov=False, dampening=0.0, momentum=0.9, **hyper_of(name))
                h.lr *= relative
                param.copy_(formula(name)(param.clone(), param.grad, h, memories.setdefault(name, {})))
    return list(net.parameters())


@pytest.mark.filterwarnings("ignore:a group with .* takes its lr whole:UserWarning")  # as in its configurations
def test_mmengine():
    names = run(MMENGINE, "mmengine.optim")
    from mmengine.optim import build_optim_wrapper

    try:
        config = names["optim_wrapper"]
        config["optimizer"]["weight_decay"] = 0.05  # 1e-6 would not show
        config["paramwise_cfg"]["custom_keys"]["norm"] = names["excluded"]
        net = model()
        optimizer = build_optim_wrapper(net, config)
    finally:
        names["OPTIMIZERS"].module_dict.pop("TorchLARS")
    lrs = [group["lr"] for group in optimizer.param_groups]
    for step, relative in enumerate(LRS):
        set_lrs(optimizer.param_groups, lrs, relative)
        set_grads(net, step)
        optimizer.step()
    expected = expected_of(lambda name: openmmlab, lambda name: {"lr": 4.8, "weight_decay": 0.05})
    assert_same(net.parameters(), expected)


def sgd(w, g, h, memory):
    memory["buffer"] = h.momentum * memory.get("buffer", 0) + g
    return w - h.lr * memory["buffer"]


def test_torchtitan():
    names = run(TORCHTITAN, "torchtitan.components.optimizer")
    names["weights"]["weight_decay"] = 0.05  # 5e-4 would not show
    net = model()
    optimizers = names["optimizer"].build(model_parts=[net])
    for step, relative in enumerate(LRS):
        if step == 2:
            saved = optimizers.state_dict()
            optimizers.zero_grad()
            optimizers = names["optimizer"].build(model_parts=[net])
            optimizers.load_state_dict(saved)
        (optimizer,) = optimizers
        set_lrs(optimizer.param_groups, (0.05, 16.0), relative)
        set_grads(net, step)
        optimizers.step()

    def is_excluded(name):
        return name.endswith("bias") or "norm" in name

    expected = expected_of(
        lambda name: sgd if is_excluded(name) else torchlars_0_1_2,
        lambda name: {"lr": 0.05 if is_excluded(name) else 16.0, "weight_decay": 0.05},
    )
    assert_same(net.parameters(), expected)


def test_solo_learn(monkeypatch):
    """Beside what stands in for its class of methods and its function, which needs torchvision of torch's own build."""

    def remove_bias_and_norm_from_weight_decay(groups):
        split = []
        for group in groups:
            for is_weight in (True, False):
                params = [param for param in group["params"] if (param.ndim > 1) == is_weight]
                split.append({**group, "params": params, **({} if is_weight else {"weight_decay": 0})})
        return split

    methods = type("BaseMethod", (), {"_OPTIMIZERS": {}})
    for module, names in {
        "solo.methods.base": {"BaseMethod": methods},
        "solo.utils.misc": {"remove_bias_and_norm_from_weight_decay": remove_bias_and_norm_from_weight_decay},
    }.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names))
    exec(SOLO_LEARN, {"LARS": LARS, "SGD": torch.optim.SGD})
    net, expected = model(), model()
    groups = [
        {"params": list(net.parameters()), "lr": 0.48}
    ]  # it names parts of the model, of which each may have an lr
    optimizer = methods._OPTIMIZERS["torchlars"](groups, lr=2.0, weight_decay=0.05, momentum=0.9)
    weights = [param for param in expected.parameters() if param.ndim > 1]
    others = [param for param in expected.parameters() if param.ndim == 1]
    plain = {"params": others, "trust_coef": None, "weight_decay": 0}
    call = LARS(torch.optim.SGD([{"params": weights}, plain], lr=0.48, weight_decay=0.05, momentum=0.9))
    for step in range(3):
        for part, one in ((net, optimizer), (expected, call)):
            set_grads(part, step)
            one.step()
    assert_same(net.parameters(), expected.parameters())
