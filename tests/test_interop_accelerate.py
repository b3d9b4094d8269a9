"""accelerate drives LARS and LAMB: after the same batches, they have the numbers of a plain loop."""

from functools import partial

import pytest
import torch
from plain_loop import (
    ACCUMULATE,
    CLIP,
    EPOCHS,
    TRUST_COEF,
    assert_trained_as_by_a_plain_loop,
    batches,
    each_wrapper,
    fresh_accelerate,
    launched,
    network,
    offer_fsdp,
    optimizer_of,
    regression_loss,
    scheduler_of,
    trained,
)
from torch.distributed.tensor import DTensor

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(autouse=True)
def _forget():
    with fresh_accelerate():
        yield


def prepare(wrapper, trust_coef=TRUST_COEF, **more):
    split = accelerate.DataLoaderConfiguration(split_batches=True)  # each process gets its share of each batch
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=ACCUMULATE, dataloader_config=split, **more
    )
    model = network()
    optimizer = optimizer_of(model, wrapper, trust_coef)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler_of(optimizer), batches())


def train_an_epoch(accelerator, model, optimizer, scheduler, loader):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(regression_loss(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@each_wrapper
def test_accumulate_and_clip(wrapper):
    prepared = prepare(wrapper)
    for _ in range(EPOCHS):
        train_an_epoch(*prepared)
    _, model, optimizer, _, _ = prepared
    assert_trained_as_by_a_plain_loop(model, optimizer, *trained(wrapper))


@each_wrapper
def test_save_and_load_state(wrapper, tmp_path):
    prepared = prepare(wrapper)
    train_an_epoch(*prepared)
    prepared[0].save_state(str(tmp_path))

    prepared = prepare(wrapper, trust_coef=0.5)
    accelerator, model, optimizer, _, _ = prepared
    accelerator.load_state(str(tmp_path))
    train_an_epoch(*prepared)
    assert_trained_as_by_a_plain_loop(model, optimizer, *trained(wrapper))


@each_wrapper
def test_a_step_that_the_scaler_skips(wrapper):
    """With float16 accelerate puts a ``step`` of its own on the optimizer, to see whether the scaler calls it."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    model, plain_model = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(optimizer_of(model, wrapper), scaler=scaler)
    plain_optimizer = optimizer_of(plain_model, wrapper)
    for i, batch in enumerate(batches()):
        scaler.scale(regression_loss(model, batch)).backward()
        if i == 1:
            model[0].weight.grad[0, 0] = torch.inf
        else:
            regression_loss(plain_model, batch).backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
        optimizer.step()
        assert optimizer.step_was_skipped == (i == 1)
        optimizer.zero_grad()
    assert_trained_as_by_a_plain_loop(model, optimizer, plain_model, plain_optimizer)


def train_sharded(wrapper, folder):
    with launched(), fresh_accelerate():
        offer_fsdp()
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=20
        )
        set_up = partial(prepare, wrapper, fsdp_plugin=plugin)
        first = set_up()
        train_an_epoch(*first)
        first[0].save_state(folder)

        second = set_up()
        accelerator, model, optimizer, _, _ = second
        accelerator.load_state(folder)
        for param in model.parameters():
            assert isinstance(param, DTensor)
            assert param.device_mesh.size() == 2
        train_an_epoch(*second)
        assert_trained_as_by_a_plain_loop(model, optimizer, *trained(wrapper))


@each_wrapper
def test_fsdp2(wrapper, workers, tmp_path):
    """Parameters are whole when the optimizer is made; accelerate shards them and exchanges them in its groups."""
    workers(2, train_sharded, wrapper, str(tmp_path))
