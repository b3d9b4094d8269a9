"""timm's scaler and schedules drive LARS and LAMB: after the same batches, they have the numbers of a plain loop."""

from functools import partial

import pytest
from plain_loop import (
    ACCUMULATE,
    CLIP,
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    assert_trained_as_by_a_plain_loop,
    batches,
    each_wrapper,
    network,
    optimizer_of,
    plain_loop,
    regression_loss,
)
from test_recipes import pretend_torchvision
from torch.optim.lr_scheduler import PolynomialLR


@pytest.mark.filterwarnings("ignore")
@each_wrapper
def test_scaler_and_schedule(wrapper, monkeypatch):
    """As in its ``train.py``, with gradients accumulated and clipped, and a schedule that only knows ``param_groups``."""
    pretend_torchvision(monkeypatch)
    timm = pytest.importorskip("timm", exc_type=ImportError)
    from timm.scheduler import create_scheduler_v2

    model = network()
    optimizer = optimizer_of(model, wrapper)
    assert not (hasattr(optimizer, "is_second_order") and optimizer.is_second_order)  # asked by train.py
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="poly",
        num_epochs=EPOCHS,
        decay_rate=2,
        min_lr=0,
        step_on_epochs=False,
        updates_per_epoch=STEPS_PER_EPOCH,
    )
    scaler = timm.utils.NativeScaler(device="cpu")
    updates = 0
    for _ in range(EPOCHS):
        for i, batch in enumerate(batches(), start=1):
            loss = regression_loss(model, batch) / ACCUMULATE
            steps = i % ACCUMULATE == 0
            scaler(loss, optimizer, clip_grad=CLIP, parameters=model.parameters(), need_update=steps)
            if steps:
                optimizer.zero_grad()
                updates += 1
                scheduler.step_update(updates)

    expected, schedule = network(), partial(PolynomialLR, total_iters=STEPS, power=2)
    plain_optimizer = plain_loop(expected, regression_loss, batches(), wrapper=wrapper, schedule=schedule)
    assert_trained_as_by_a_plain_loop(model, optimizer, expected, plain_optimizer)
