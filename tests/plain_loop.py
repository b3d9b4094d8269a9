"""A training by hand, whose numbers trainers of others must reach after the same batches.

Whatever a trainer does around ``step`` (closures, clipping, accumulation, schedules, wrapping, checkpoints) is done by
hand in :func:`plain_loop`, in float64. The wrapper has two kinds of groups here, momentum, weight decay and an ε that counts,
and some steps clip while others do not, so that nothing can be left out or done twice unseen.
"""

import os
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from torchlars import LAMB, LARS

EPOCHS, BATCHES, BATCH_SIZE, ACCUMULATE, CLIP, TRUST_COEF = 2, 6, 4, 2, 0.9, 0.02
STEPS_PER_EPOCH = BATCHES // ACCUMULATE
STEPS = EPOCHS * STEPS_PER_EPOCH

each_wrapper = pytest.mark.parametrize("wrapper", [LARS, LAMB])
options = {"momentum": 0.9, "trust_coef": TRUST_COEF, "eps": 1e-3}  # of the base and of the wrapper


def groups_of(model):
    """Return what a user would write; biases are left to the base."""
    weights = [param for param in model.parameters() if param.ndim > 1]
    biases = [param for param in model.parameters() if param.ndim == 1]
    return [
        {"params": weights, "weight_decay": 0.05, "lr": 2.0},
        {"params": biases, "weight_decay": 0.001, "lr": 0.1, "trust_coef": None},
    ]


def optimizer_of(model, wrapper=LARS, trust_coef=TRUST_COEF):
    return wrapper(SGD(groups_of(model), lr=2.0, momentum=0.9), trust_coef=trust_coef, eps=1e-3)


def scheduler_of(optimizer):
    warmup = LinearLR(optimizer, start_factor=0.25, total_iters=2)
    return SequentialLR(optimizer, [warmup, PolynomialLR(optimizer, STEPS - 1, power=2)], milestones=[2])


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def regression_loss(model, batch):
    inputs, targets = batch
    return mse_loss(model(inputs), targets)


def examples():
    random = torch.Generator().manual_seed(11)
    inputs = torch.randn(BATCHES * BATCH_SIZE, 5, generator=random, dtype=torch.float64)
    return inputs, torch.randn(BATCHES * BATCH_SIZE, 3, generator=random, dtype=torch.float64)


def batches(rank=0, world_size=1):
    """Return a loader of the same batches in the same order each epoch, or of a rank's share of each batch."""
    share = TensorDataset(*(tensor[rank::world_size] for tensor in examples()))
    return DataLoader(share, batch_size=BATCH_SIZE // world_size)


def plain_loop(model, loss_of, loader, clip=CLIP, wrapper=LARS, schedule=scheduler_of):
    """Train by hand, without closures; return the optimizer."""
    optimizer = optimizer_of(model, wrapper)
    scheduler = schedule(optimizer)
    clipped = set()
    for _ in range(EPOCHS):
        for i, batch in enumerate(loader, start=1):
            (loss_of(model, batch) / ACCUMULATE).backward()
            if i % ACCUMULATE == 0:
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
                clipped.add(bool(norm > clip))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert clipped == {True, False}, "a loop that clips always or never shows less"
    return optimizer


def trained(wrapper=LARS):
    """Return the plain loop's model and optimizer."""
    model = network()
    return model, plain_loop(model, regression_loss, batches(), wrapper=wrapper)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(model, other):
    """Return the largest difference between two models."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((whole(p) - whole(q)).abs().max().item() for p, q in pairs)


def assert_trained_as_by_a_plain_loop(model, optimizer, plain_model, plain_optimizer):
    """Compare parameters, momenta, hyper-parameters, the wrapper's own values and the trust ratios by name."""
    assert distance(model, plain_model) <= 1e-12
    wrapper = getattr(optimizer, "optimizer", optimizer)  # in what accelerate and Fabric make of it
    ratios = wrapper.named_trust_ratios(model.named_parameters())
    expected = plain_optimizer.named_trust_ratios(plain_model.named_parameters())
    assert [name.removeprefix("_forward_module.") for name in ratios] == list(expected)
    torch.testing.assert_close([*ratios.values()], [*expected.values()], rtol=1e-9, atol=0)
    actual, expected = optimizer.state_dict(), plain_optimizer.state_dict()
    key = plain_optimizer.state_key
    assert actual[key] == expected[key]
    assert len(expected["state"]) > 0
    for key, state in expected["state"].items():
        momentum = whole(actual["state"][key]["momentum_buffer"])
        torch.testing.assert_close(momentum, state["momentum_buffer"], rtol=0, atol=1e-12)
    for group, expected_group in zip(actual["param_groups"], expected["param_groups"], strict=True):
        for key in ("lr", "momentum", "weight_decay"):
            assert group[key] == pytest.approx(expected_group[key], rel=1e-12)
        assert group.get("trust_coef", "absent") == expected_group.get("trust_coef", "absent")


@contextmanager
def launched():
    """Set the variables that torchrun sets, for trainers that read them, in a process that has a process group."""
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    values = (rank, rank, "0", world_size, world_size, "localhost", "29500")  # the group is there: nobody connects
    before = dict(os.environ)
    os.environ.update(zip(names, values, strict=True))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def fresh_accelerate():
    """Reset what accelerate keeps for the process, before and afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    environment = dict(os.environ)
    try:
        yield
    finally:
        forget()
        os.environ.clear()
        os.environ.update(environment)


def offer_fsdp():
    """Make accelerate offer FSDP to processes on CPUs, where by itself it falls back to DDP."""
    from accelerate.state import DistributedType, PartialState

    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
