"""A small network under every wrapper, and how it is trained."""

import io

import torch

import torchlars


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(dtype)


def sgd(model, cls=torch.optim.SGD, **options):
    """A base with two groups of different decay."""
    groups = [
        {"params": list(model[0].parameters()), "weight_decay": 0.1},
        {"params": list(model[2].parameters()), "weight_decay": 0.03, "lr": 0.2},
    ]
    return cls(groups, **{"lr": 0.5, "momentum": 0.9, **options})


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), **{"lr": 0.1, "weight_decay": 0.1, **options})


def torchlars_adamw(model, **options):
    return torchlars.optim.AdamW(model.parameters(), **{"lr": 0.1, "weight_decay": 0.1, **options})


BASES = {"SGD": sgd, "Adam": adam, "torchlars AdamW": torchlars_adamw}


def wrapped(wrap, model, base=sgd, **options):
    return wrap(base(model, **options))


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    return (model(torch.randn(6, 3, dtype=torch.float64, generator=generator).to(model[0].weight.dtype)) ** 2).mean()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def assert_same(one, other, tolerance=0.0):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def assert_same_state_dict(one, other):
    """Tensors by their values, all else by equality."""
    assert {**one, "state": None} == {**other, "state": None}
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)


def trained(wrap, base=sgd, steps=3):
    model = network()
    optimizer = wrapped(wrap, model, base)
    train(model, optimizer, range(steps))
    return model, optimizer


def save(what):
    buffer = io.BytesIO()
    torch.save(what, buffer)
    buffer.seek(0)
    return buffer
