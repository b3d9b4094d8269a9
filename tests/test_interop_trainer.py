"""Hugging Face's Trainer drives LARS and LAMB: after the same batches, they have the numbers of a plain loop.

It gets the optimizer made, or a class and its arguments, which is the only way under FSDP.
"""

import pytest
import torch
from plain_loop import (
    ACCUMULATE,
    BATCH_SIZE,
    BATCHES,
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    TRUST_COEF,
    assert_trained_as_by_a_plain_loop,
    distance,
    each_wrapper,
    fresh_accelerate,
    groups_of,
    launched,
    offer_fsdp,
    optimizer_of,
    plain_loop,
    scheduler_of,
)
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader

pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CLIP = 0.2


@pytest.fixture(autouse=True)
def _fresh():
    with fresh_accelerate():
        yield


def classifier():
    """Return a tiny transformer of random weights."""
    torch.manual_seed(13)
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).double()


def sentences():
    random = torch.Generator().manual_seed(17)
    words = torch.randint(16, (BATCHES * BATCH_SIZE, 8), generator=random)
    labels = torch.randint(2, (BATCHES * BATCH_SIZE,), generator=random)
    return [{"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)]


def trained(wrapper):
    model = classifier()
    loader = DataLoader(sentences(), BATCH_SIZE)
    return model, plain_loop(model, lambda model, batch: model(**batch).loss, loader, CLIP, wrapper)


class Trainer(transformers.Trainer):
    def get_train_dataloader(self):  # in order, where the Trainer's own shuffles
        return self.accelerator.prepare(DataLoader(sentences(), BATCH_SIZE))

    def create_scheduler(self, num_training_steps, optimizer=None):  # the plain loop's, for the class route
        if self.lr_scheduler is None:
            self.lr_scheduler = scheduler_of(self.optimizer)
        return self.lr_scheduler


def loss_over_a_step(outputs, labels, num_items_in_batch):  # of several batches, as the Trainer asks
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def arguments_in(folder, **more):
    return transformers.TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATE,
        max_grad_norm=CLIP,
        save_strategy="epoch",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def optimizer_made(model, wrapper, trust_coef):
    optimizer = optimizer_of(model, wrapper, trust_coef)
    return {"optimizers": (optimizer, scheduler_of(optimizer))}


def class_and_arguments(model, wrapper, trust_coef):
    kwargs = {"params": groups_of(model), "momentum": 0.9, "eps": 1e-3, "trust_coef": trust_coef}
    return {"optimizer_cls_and_kwargs": (wrapper.over(SGD), kwargs)}


@each_wrapper
@pytest.mark.parametrize("route", [optimizer_made, class_and_arguments])
def test_train_and_resume(route, wrapper, tmp_path):
    def trainer_in(folder, trust_coef=TRUST_COEF):
        model = classifier()
        optimizer = route(model, wrapper, trust_coef)
        return Trainer(
            model, arguments_in(folder), train_dataset=sentences(), compute_loss_func=loss_over_a_step, **optimizer
        )

    expected = trained(wrapper)
    trainer = trainer_in(tmp_path)
    trainer.train()
    assert distance(trainer.model, classifier()) > 1e-3
    assert trainer.state.global_step == STEPS
    assert_trained_as_by_a_plain_loop(trainer.model, trainer.optimizer, *expected)

    trainer = trainer_in(tmp_path / "resumed", trust_coef=0.5)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS_PER_EPOCH}"))
    assert trainer.state.global_step == STEPS
    assert_trained_as_by_a_plain_loop(trainer.model, trainer.optimizer, *expected)


def train_sharded(wrapper, folder):
    with launched(), fresh_accelerate():
        arguments = arguments_in(
            folder,
            accelerator_config={"split_batches": True},
            fsdp=True,
            fsdp_config={"transformer_layer_cls_to_wrap": "BertLayer"},
        )
        assert arguments.device.type == "cpu"  # sets accelerate's state, once
        offer_fsdp()
        model, expected = classifier(), trained(wrapper)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=sentences(),
            compute_loss_func=loss_over_a_step,
            **class_and_arguments(model, wrapper, TRUST_COEF),
        )
        trainer.train()
        for param in trainer.model.parameters():
            assert isinstance(param, DTensor)
            assert param.device_mesh.size() == 2
        assert_trained_as_by_a_plain_loop(trainer.model, trainer.optimizer, *expected)


@each_wrapper
def test_fsdp2(wrapper, workers, tmp_path):
    workers(2, train_sharded, wrapper, str(tmp_path))
