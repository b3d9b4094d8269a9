"""PercentileClipping of sharded layers: factors and histories of whole layers, one all-reduce, checkpoints.

As in test_distributed.py, whose set-ups these are, the unsharded run happens on each rank beside the sharded one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import SETUPS, Setup, batch, counting, difference, loss_of, network
from torch import Tensor, nn

from torchlars import LAMB, LARS, PercentileClipping

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")

UNDER = {
    "SGD": lambda base: base,
    "LARS": lambda base: LARS(base, trust_coef=0.3),
    "LAMB, clipped": lambda base: LAMB(base, trust_coef=0.3, clip=True),
}
LOSS_SCALES = [1.0, 4.0, 0.5, 8.0, 2.0, 16.0]  # which clip every other gradient
STEPS = len(LOSS_SCALES)


def build(under: str, model: nn.Module) -> tuple[Any, PercentileClipping]:
    optimizer = UNDER[under](torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1))
    return optimizer, PercentileClipping(optimizer, percentile=50, history=4)


def give_gradients(setup: Setup | None, model: nn.Module, step: int) -> None:
    inputs, targets = batch(step, torch.float64)
    if setup is not None:
        inputs, targets = setup.share(inputs), setup.share(targets)
    model.zero_grad()
    (LOSS_SCALES[step % STEPS] * loss_of(model, inputs, targets)).backward()


def differences(model: nn.Module, clipping: Any, whole: nn.Module, expected: Any) -> list[float]:
    found = [difference(param, other) for param, other in zip(model.parameters(), whole.parameters(), strict=True)]
    histories = zip(clipping.state_dict()["histories"], expected.state_dict()["histories"], strict=True)
    return found + [difference(history, other) for history, other in histories]


def train(under: str, setup: Setup) -> tuple[list[float], list[int], float, list[Tensor]]:
    """Return differences, the collectives of each clipping, how far clipping leads, and this rank's histories."""
    model, whole, unclipped = (network(torch.float64) for _ in range(3))
    setup.apply(model, setup.world)
    (optimizer, clipping), (expected, twin), (bare, never) = (build(under, one) for one in (model, whole, unclipped))
    clipping.remove()  # so that its collectives are counted alone
    never.remove()
    collectives = []
    for step in range(STEPS):
        for of, one in ((setup, model), (None, whole), (None, unclipped)):
            give_gradients(of, one, step)
        with counting() as mode:
            clipping._clip()
        collectives.append(mode.get_total_counts())
        for one in (optimizer, expected, bare):
            one.step()
    pairs = zip(whole.parameters(), unclipped.parameters(), strict=True)
    way = max(difference(param, other) for param, other in pairs)
    return differences(model, clipping, whole, twin), collectives, way, clipping.state_dict()["histories"]


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_sharded_run_has_the_numbers_of_the_unsharded_one(workers, setup, under):
    results = workers(setup.world, train, under, setup)
    for found, collectives, way, histories in results:
        assert max(found) <= 1e-12, found
        assert collectives == [setup.partial + setup.process_groups] * STEPS
        assert way > 1e-3
        assert all(map(torch.equal, histories, results[0][-1]))


def train_on_norms_of_shards(setup: Setup) -> float:
    from torchlars import sharding

    complete, sharding.complete = sharding.complete, lambda squared_norms: list(squared_norms) and None
    try:
        return max(train("SGD", setup)[0])
    finally:
        sharding.complete = complete


@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup.process_groups], ids=str)
def test_these_tests_would_see_norms_of_shards(workers, setup):
    assert min(workers(setup.world, train_on_norms_of_shards, setup)) > 1e-3


def step_with_nan_in_one_shard(setup: Setup) -> tuple[bool, bool, bool]:
    """Return whether the history and the other shard's gradient stay, and whether another layer is clipped."""
    model = network(torch.float64)
    setup.apply(model, setup.world)
    clipping = build("SGD", model)[1]
    give_gradients(setup, model, 0)
    clipping._clip()
    histories = [history.clone() for history in clipping.state_dict()["histories"]]
    give_gradients(setup, model, 1)
    first = next(model.parameters()).grad.to_local()
    if dist.get_rank() == 0:
        first[0, 0] = torch.nan
    before = [param.grad.to_local().clone() for param in model.parameters()]
    clipping._clip()
    stays = torch.equal(clipping.state_dict()["histories"][0], histories[0])
    is_as_it_was = torch.equal(first.nan_to_num(), before[0].nan_to_num())
    return stays, is_as_it_was, not torch.equal(clipping.state_dict()["histories"][1], histories[1])


def test_nan_in_one_shard_leaves_the_layer_as_it_is_on_all_ranks(workers):
    assert workers(2, step_with_nan_in_one_shard, SETUPS[0]) == [(True, True, True)] * 2


def save(setup: Setup, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state_dict

    model = network(torch.float64)
    setup.apply(model, setup.world)
    optimizer, clipping = build("SGD", model)
    for step in range(STEPS):
        give_gradients(setup, model, step)
        optimizer.step()
    weights, state = dcp_state_dict.get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "clipping": clipping.state_dict()}, checkpoint_id=folder)


def load(setup: Setup, folder: str) -> list[float]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state_dict

    whole, model = network(torch.float64), network(torch.float64)
    setup.apply(model, setup.world)
    expected, twin = build("SGD", whole)
    optimizer, clipping = build("SGD", model)
    weights, state = dcp_state_dict.get_state_dict(model, optimizer)  # takes a step with gradients of 0
    of_clipping = clipping.state_dict()
    dcp.load({"model": weights, "optimizer": state, "clipping": of_clipping}, checkpoint_id=folder)
    dcp_state_dict.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    clipping.load_state_dict(of_clipping)
    for step in range(2 * STEPS):
        give_gradients(None, whole, step)
        expected.step()
        if step >= STEPS:
            give_gradients(setup, model, step)
            optimizer.step()
    return differences(model, clipping, whole, twin)


@pytest.mark.parametrize(("before", "after"), [(SETUPS[0], SETUPS[1]), (SETUPS[1], SETUPS[3])], ids=str)
def test_a_checkpoint_is_resumed_by_other_shards(workers, tmp_path, before, after):
    workers(before.world, save, before, str(tmp_path))
    for found in workers(after.world, load, after, str(tmp_path)):
        assert max(found) <= 1e-12, found
