"""Layers and groups for tests of torchlars.optim.SGD with momentum in 8 bits, and its steps by the reference."""

import torch
from cases import channels_last
from code_cases import assert_same_bits, scales_shape

import torchlars
from torchlars import reference

MIN_SIZE = 1000
CODES, SCALES, BUFFER, ORDER = "momentum_codes", "momentum_scales", "momentum_buffer", "momentum_order"
LAYERS = {
    # shape, dtype, memory order, whether it is coded
    "linear": ((40, 130), torch.float32, None, True),
    "bfloat16": ((20, 200), torch.bfloat16, None, True),
    "float16": ((5, 300), torch.float16, None, True),
    "convolution": ((8, 16, 3, 3), torch.float32, channels_last, True),
    "bias": ((40,), torch.float32, None, False),
    "small": ((8, 100), torch.float32, None, False),
    "narrow": ((100, 63), torch.bfloat16, None, False),
    "wide": ((10, 128), torch.float64, None, False),
}
IS_CODED = [coded for *_, coded in LAYERS.values()]
CHANNELS_LAST = 231  # as momentum_order has it
KEYS = [[CODES, SCALES] + [ORDER] * (len(shape) > 2) if coded else [BUFFER] for shape, *_, coded in LAYERS.values()]
OPTIONS = {
    "momentum": {},
    "dampened": {"dampening": 0.25},
    "nesterov": {"nesterov": True},
    "maximize": {"maximize": True, "lr": torch.tensor(0.03)},
}


def layers(seed=0):
    random = torch.Generator().manual_seed(seed)
    made = []
    for shape, dtype, order, _ in LAYERS.values():
        values = (0.3 * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)
        made.append(torch.nn.Parameter(values if order is None else order(values)))
    return made


def sgd(params=None, *, cls=torchlars.optim.SGD, **options):
    """SGD over two groups that differ in their hyper-parameters, by default with momentum in 8 bits."""
    params = layers() if params is None else params
    options = {"lr": 0.1, "momentum": 0.9, **options}
    if cls is torchlars.optim.SGD:
        options = {"momentum_dtype": torch.int8, "min_8bit_size": MIN_SIZE, **options}
    groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "momentum": 0.6, "lr": 0.05}]
    return cls(groups, **options)


def in_order(optimizer):
    """The layers in the order of LAYERS."""
    first, second = (group["params"] for group in optimizer.param_groups)
    return [param for pair in zip(first, second, strict=True) for param in pair]


def give_gradients(optimizer, step, zero=False):
    random = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(in_order(optimizer)):
        grad = 0.02 * (1 + i % 3) * torch.randn(param.shape, generator=random, dtype=torch.float64)
        param.grad = torch.empty_like(param).copy_(0 * grad if zero else grad)


def run(optimizer, steps):
    for step in steps:
        give_gradients(optimizer, step)
        optimizer.step()


def assert_same_runs(one, other):
    """Parameters and the state, to the bit, also in its memory order."""
    for p, q in zip(in_order(one), in_order(other), strict=True):
        assert_same_tensors([p.detach()], [q.detach()])
        assert one.state[p].keys() == other.state[q].keys()
        assert_same_tensors(list(one.state[p].values()), [other.state[q][key] for key in one.state[p]])


def assert_same_tensors(ones, others):
    assert [x.stride() for x in ones] == [x.stride() for x in others]
    assert_same_bits(ones, others, "tensor")


class Expected:
    """The steps of an optimizer by the reference, with layers and momentum of its own."""

    def __init__(self, optimizer, is_coded=IS_CODED):
        self.optimizer, self.is_coded, self.begun = optimizer, is_coded, False
        self.params = [param.detach().clone() for param in in_order(optimizer)]
        self.kept = [
            (
                torch.zeros_like(param, dtype=torch.int8),
                torch.zeros(scales_shape(param.shape)),
                *([torch.tensor(CHANNELS_LAST)] if param.dim() > 2 else []),
            )
            if coded
            else (torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32)),)
            for param, coded in zip(self.params, is_coded, strict=True)
        ]

    def step(self, ratios=None, lr_in_momentum=False):
        """Step with the optimizer's gradients, and trust ratios by parameter."""
        for i, param in enumerate(in_order(self.optimizer)):
            group = self.optimizer.param_groups[i % 2]
            lr = group["lr"]
            dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            reference.sgd_(
                [self.params[i]],
                [param.grad],
                [self.kept[i][0]],
                momentum_scales=[self.kept[i][1]] if self.is_coded[i] else None,
                maximize=group["maximize"],
                weight_decays=[group["weight_decay"]],
                lrs=[1.0 if isinstance(lr, torch.Tensor) else lr],
                lr_tensor=lr.double() if isinstance(lr, torch.Tensor) else None,
                lr_in_momentum=lr_in_momentum and param in ratios,
                momentums=[group["momentum"]],
                dampenings=[group["dampening"] if self.begun else 0.0],
                nesterov=group["nesterov"],
                ratios=None if ratios is None else ratios[param].reshape(1).to(dtype),
            )
        self.begun = True

    def assert_same(self):
        for i, param in enumerate(in_order(self.optimizer)):
            state = self.optimizer.state[param]
            assert list(state) == (KEYS[i] if self.is_coded[i] else [BUFFER]), i
            assert_same_tensors([param.detach(), *state.values()], [self.params[i], *self.kept[i]])
