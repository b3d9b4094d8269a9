"""Parameter groups of optimizers: their parameters and hyper-parameters, read, changed and compared."""


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def change_lr(optimizers, step):
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = group["lr"] * [0.5, 1.7, 0.9, 1.2][(step + index) % 4]


def hyper_parameters(optimizer):
    """Everything the groups hold, as the very objects."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def assert_identical(before, after):
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert old.keys() == new.keys()
        for key in old:
            assert old[key] is new[key], f"group {index}: {key} was {old[key]!r} and is {new[key]!r}"
