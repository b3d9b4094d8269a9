"""timm's training script drives LARS and LAMB: after the same batches, they have the numbers of a plain loop.

timm brings torchvision along, which has to match torch's very build: what of the script can be told without is told here.
"""

import torch
from plain_loop import (
    ACCUMULATE,
    CLIP,
    EPOCHS,
    assert_trained_as_by_a_plain_loop,
    batches,
    distance,
    each_wrapper,
    network,
    optimizer_of,
    plain_loop,
    regression_loss,
    scheduler_of,
    trained,
)
from torch import nn
from torch.optim import SGD


def test_the_plain_loop_tells_the_wrapper_from_its_base():
    model, (plain_model, _) = network(), trained()
    plain_loop(model, regression_loss, batches(), wrapper=lambda base, **options: base)
    assert distance(model, plain_model) > 1e-2
    assert distance(network(), plain_model) > 1e-2


@each_wrapper
def test_what_timms_training_loop_reads(wrapper):
    """timm asks by ``hasattr`` whether gradients need a graph of their own, and whether there are slow weights."""
    optimizer = optimizer_of(network(), wrapper)
    assert not (hasattr(optimizer, "is_second_order") and optimizer.is_second_order)
    assert not hasattr(optimizer, "sync_lookahead")


@each_wrapper
def test_groups_scaler_and_schedules_like_timms(wrapper):
    """timm's schedules know ``param_groups`` only: they write ``lr``, scaled by a key that timm has put there."""
    model = network()
    optimizer = optimizer_of(model, wrapper)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clock = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler_of(clock)

    def write_rates():
        for group, lr_scale in zip(optimizer.param_groups, (2.0, 0.1), strict=True):
            group.setdefault("lr_scale", lr_scale)
            group["lr"] = schedule.get_last_lr()[0] * group["lr_scale"]

    write_rates()
    for _ in range(EPOCHS):
        for i, batch in enumerate(batches(), start=1):
            scaler.scale(regression_loss(model, batch) / ACCUMULATE).backward(create_graph=False)
            if i % ACCUMULATE == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                clock.step()
                schedule.step()
                write_rates()
    assert_trained_as_by_a_plain_loop(model, optimizer, *trained(wrapper))
    assert [group["lr_scale"] for group in optimizer.state_dict()["param_groups"]] == [2.0, 0.1]
