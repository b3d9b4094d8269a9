"""Every class of ``torch.optim.lr_scheduler`` drives a wrapper as it drives the plain base. Warnings are errors here."""

import copy
import inspect
import pickle

import pytest
import torch
from by_hand import ByHand, wrappers
from optimizers import params_of
from torch.optim import lr_scheduler, swa_utils

pytestmark = pytest.mark.usefixtures("one_thread")


STEPS = 9


def sequential(optimizer):
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    second = lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[3])


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, step_size=2)], optimizer=optimizer
    )


# Every class has to have a line. The first argument is the optimizer.
SCHEDULERS = {
    "ChainedScheduler": chained,
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=0.25, total_iters=4),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, step_size_up=3, cycle_momentum=True),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.8),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 1 / (n + 1)]),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, milestones=[2, 5]),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda n: 0.7),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=[2.0, 1.0], total_steps=STEPS + 1),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=7, power=2),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "SWALR": lambda optimizer: swa_utils.SWALR(optimizer, swa_lr=[0.05, 0.5], anneal_epochs=4),
    "SequentialLR": sequential,
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=2),
}
MOVES_MOMENTUM = {"CyclicLR", "OneCycleLR"}


def build():
    """A plain base with two groups."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[(3, 4), (4,)], [(2, 3), (2,)]]
    a, b = (
        [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in group]
        for group in shapes
    )
    groups = [{"params": a, "lr": 1.0, "weight_decay": 0.1}, {"params": b, "lr": 0.5, "weight_decay": 0.03}]
    return torch.optim.SGD(groups, lr=0.7, momentum=0.9)


def give_gradients(optimizer, step):
    generator = torch.Generator().manual_seed(step)
    for param in params_of(optimizer):
        param.grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)


def train(optimizer, scheduler, steps):
    """Train, and return what the schedule was."""
    schedule = []
    for step in steps:
        give_gradients(optimizer, step)
        schedule.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
        optimizer.step()
        advance(scheduler, step)
    return schedule


def advance(scheduler, step):
    scheduler.step(*[1.0 if step > 1 else 2.0 - step] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))


def same(ours, theirs, tolerance=0.0):
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_every_class_has_a_line_in_the_table():
    names = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler)
    }
    assert names - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
@wrappers
def test_scheduler_drives_the_wrapper_as_the_contract_says(wrap, name, backend):
    optimizer, model = wrap(build()), ByHand(wrap, build())
    scheduler, model_scheduler = SCHEDULERS[name](optimizer), SCHEDULERS[name](model.base)
    schedule, expected = [], []
    for step in range(STEPS):
        schedule += train(optimizer, scheduler, [step])
        give_gradients(model, step)
        expected.append([(group["lr"], group["momentum"]) for group in model.param_groups])
        model.step()
        advance(model_scheduler, step)
        same(optimizer, model, 1e-12)
    assert schedule == expected
    assert scheduler.get_last_lr() == model_scheduler.get_last_lr()
    assert len({lr for groups in schedule for lr, _ in groups}) > 2
    assert (len({momentum for groups in schedule for _, momentum in groups}) > 1) == (name in MOVES_MOMENTUM)


@pytest.mark.parametrize("name", SCHEDULERS)
@wrappers
def test_training_goes_on_from_the_state_dicts_of_scheduler_and_optimizer(wrap, name):
    optimizer, resumed = wrap(build()), wrap(build())
    scheduler, resumed_scheduler = SCHEDULERS[name](optimizer), SCHEDULERS[name](resumed)
    train(optimizer, scheduler, range(4))
    state_dicts = pickle.loads(pickle.dumps((scheduler.state_dict(), optimizer.state_dict())))
    resumed_scheduler.load_state_dict(state_dicts[0])
    resumed.load_state_dict(state_dicts[1])
    with torch.no_grad():
        for p, q in zip(params_of(resumed), params_of(optimizer), strict=True):
            p.copy_(q)
    assert train(resumed, resumed_scheduler, range(4, STEPS)) == train(optimizer, scheduler, range(4, STEPS))
    same(resumed, optimizer)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("attached_to", ["wrapper", "base"])
@wrappers
def test_a_copy_made_under_a_scheduler_steps_itself_and_not_the_original(wrap, how, attached_to, backend):
    optimizer = wrap(build())
    scheduler = lr_scheduler.StepLR(optimizer if attached_to == "wrapper" else optimizer.optim, step_size=2)
    train(optimizer, scheduler, range(3))
    copied, reference = how(optimizer), wrap(build())
    train(reference, lr_scheduler.StepLR(reference, step_size=2), range(3))
    old = [param.detach().clone() for param in params_of(optimizer)]
    for one in (copied, reference):
        give_gradients(one, 3)
        one.step()
    assert all(map(torch.equal, old, params_of(optimizer)))
    same(copied, reference)
    train(copied, lr_scheduler.StepLR(copied, step_size=2), range(4, 6))  # takes a scheduler of its own
    assert all(map(torch.equal, old, params_of(optimizer)))


@wrappers
def test_an_optimizer_and_its_scheduler_can_be_copied_together(wrap):
    optimizer = wrap(build())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(optimizer, scheduler, range(3))
    copied, copied_scheduler = copy.deepcopy((optimizer, scheduler))
    assert copied_scheduler.optimizer is copied
    assert train(copied, copied_scheduler, range(3, 6)) == train(optimizer, scheduler, range(3, 6))
    same(copied, optimizer)


@wrappers
def test_a_scheduler_on_the_base_drives_the_wrapper(wrap):
    outside, inside = wrap(build()), wrap(build())
    schedules = [
        train(outside, lr_scheduler.StepLR(outside, step_size=2), range(4)),
        train(inside, lr_scheduler.StepLR(inside.optim, step_size=2), range(4)),
    ]
    assert schedules[0] == schedules[1]
    same(outside, inside)


@wrappers
def test_a_scheduler_notices_that_it_was_stepped_first(wrap):
    optimizer = wrap(build())
    scheduler = lr_scheduler.StepLR(optimizer, step_size=2)
    with pytest.warns(UserWarning, match=r"call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()
