"""What failed with bases and engines of other libraries: one test a failing, with its story."""

import copy
import pickle

import pytest
import torch
from small_layers import assert_close, float64, layer, trust_ratio
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

import torchlars
from torchlars import LAMB, LARS

# Weight decay


def test_maximize(backend):
    """In 0.1.2, weight decay made weights grow in groups with ``maximize=True``.

    The base negates the gradients of such groups, and with them the decay that they held. The gradient here is at a
    right angle to the weights, so that the decay alone says whether the weights' norm grows.
    """
    param = layer()
    LARS(SGD([param], lr=2.0, weight_decay=0.1, maximize=True)).step()
    r = trust_ratio(weight_decay=0.1)
    assert_close(param, float64([3.0, 4.0]) + 2.0 * r * float64([-0.4 - 0.3, 0.3 - 0.4]))
    assert param.norm() < 5


def test_decoupled_weight_decay(backend):
    """In 0.1.2, AdamW did not decay weights: LARS took its decay away and mixed it into the gradients.

    There Adam's division by their size swallows it, which is what AdamW was made to avoid. One step from zero state is
    the sign of the gradient; the decay of 0.1 · 0.5 of the weights must show beside it.
    """
    param = layer()
    LARS(AdamW([param], lr=0.1, weight_decay=0.5, eps=0.0)).step()
    assert_close(param, float64([3.0 * 0.95 + 0.1, 4.0 * 0.95 - 0.1]))
    assert_close(param.grad, trust_ratio() * float64([-0.4, 0.3]))


class Shrinks(torch.optim.Optimizer):
    """A base of another house whose decay is decoupled where what it holds says so, and else goes through gradients."""

    def __init__(self, params, defaults=None, shrinks=True):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.5, **(defaults or {})})
        self.shrinks = shrinks

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                decay = group["weight_decay"] * param
                grad = param.grad + (0 if self.shrinks else decay)
                param.sub_(group["lr"] * (grad.sign() + (decay if self.shrinks else 0)))


FLAGS = [
    *(
        (name, True)
        for name in ("decoupled_weight_decay", "weight_decouple", "decoupled", "decoupled_decay", "decouple")
    ),
    *(("use_decoupled_weight_decay", True), ("stable_weight_decay", True), ("adam_w_mode", 1)),
    *(("weight_decay_type", "decoupled"), ("weight_decay_type", "stable")),
]


def assert_decay_stays(param):
    """One step of Shrinks by the sign of the gradient, and the decay of 0.1 · 0.5 of the weights beside it."""
    assert_close(param, float64([3.0 * 0.95 + 0.1, 4.0 * 0.95 - 0.1]))
    assert_close(param.grad, trust_ratio() * float64([-0.4, 0.3]))


@pytest.mark.parametrize("where", ["group", "defaults"])
@pytest.mark.parametrize(("flag", "value"), FLAGS)
def test_decoupled_weight_decay_by_another_name(flag, value, where, backend):
    """Only ``decoupled_weight_decay`` was read, so that bases of other libraries lost their decay.

    pytorch_optimizer's AdaBelief and Lion, timm's Adopt and AdaBelief, and Prodigy say it by other names. LARS took
    their decay and added it to the gradients, where the sign or the division by their size swallows it. A name can
    stand in the defaults alone: a checkpoint from before it existed replaces the groups.
    """
    param = layer()
    base = Shrinks([param], {flag: value})
    if where == "group":
        del base.defaults[flag]
    else:
        del base.param_groups[0][flag]
    LARS(base).step()
    assert_decay_stays(param)


@pytest.mark.parametrize(("flag", "value"), [*((flag, False) for flag, _ in FLAGS[:8]), ("weight_decay_type", "l2")])
def test_coupled_weight_decay_by_another_name(flag, value):
    """Such names also say that decay is coupled: then LARS takes it over as ever, and has nothing to warn of."""
    param = layer()
    optimizer = LARS(Shrinks([param], {flag: value}, shrinks=False))
    optimizer.step()
    assert_close(param.grad, trust_ratio(weight_decay=0.5) * float64([-0.4 + 1.5, 0.3 + 2.0]))


def test_what_a_group_says_of_its_weight_decay_comes_before_the_defaults():
    """One group may decouple and its neighbour not."""
    one, other = layer(), layer()
    base = Shrinks([{"params": [one], "weight_decouple": False}, {"params": [other]}], {"weight_decouple": True})
    LARS(base).step()
    assert_close(one.grad, trust_ratio(weight_decay=0.5) * float64([-0.4 + 1.5, 0.3 + 2.0]))
    assert_decay_stays(other)


@pytest.mark.parametrize(
    ("library", "name"),
    [("timm", "NAdamW"), ("timm", "Kron"), ("pytorch_optimizer", "SOAP"), ("bitsandbytes", "Optimizer2State")],
)
def test_decoupled_weight_decay_of_classes_that_do_not_say_so(library, name):
    """timm's NAdamW, Lion and LaProp say nothing, and its Kron says ``decoupled_decay=False`` of another kind of its own.

    They are known by name, and so are classes derived from them.
    """
    param = layer()
    known = type(name, (Shrinks,), {"__module__": f"{library}.optim.any"})
    base = type("Own", (known,), {})([param], {"decoupled_decay": False} if name == "Kron" else {})
    LARS(base).step()
    assert_decay_stays(param)


class Keeps(torch.optim.Optimizer):
    """A wrapper that borrows what its base has, and keeps the base under some name."""

    def __init__(self, name, base):
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups
        self.__dict__.update({name: base, "itself": self, "number": 3})

    @property
    def optim(self):
        raise RuntimeError("not to be read")

    def step(self, closure=None):
        next(value for value in vars(self).values() if isinstance(value, Shrinks)).step()


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer", "_base_optimizer", "_optimizer", "inner"])
def test_decoupled_weight_decay_inside_of_a_wrapper(name):
    """Only ``.optim`` was followed to what a base is wrapped around.

    Lookahead and SAM keep theirs as ``_base_optimizer``, ``base_optimizer`` or ``optimizer``. What else they hold,
    themselves included, must not confuse the search, and what is LBFGS inside is LBFGS.
    """
    param = layer()
    base = Shrinks([param], {"decouple": True})
    del base.param_groups[0]["decouple"]
    LARS(Keeps(name, base)).step()
    assert_decay_stays(param)
    with pytest.raises(TypeError, match="LBFGS"):
        LAMB(Keeps(name, LBFGS([layer()])))


def test_weight_decay_of_a_base_that_says_nothing():
    """The decay of a base that nobody knows was taken for coupled in silence. Now that is said, once, before training."""
    with pytest.warns(UserWarning, match="Shrinks does not say .* give weight_decay='decoupled' to LARS") as warned:
        optimizer = LARS(Shrinks([layer()]))
    assert warned[0].filename == __file__
    optimizer.add_param_group({"params": [layer()]})  # said already

    optimizer = LARS(Shrinks([layer()], {"weight_decay": 0.0}))  # nothing to say
    with pytest.warns(UserWarning, match="Shrinks does not say"):
        optimizer.add_param_group({"params": [layer()], "weight_decay": 0.5})
    optimizer = LARS(Shrinks([layer()], {"weight_decay": 0.0}))
    with pytest.warns(UserWarning, match="Shrinks does not say"):
        optimizer.load_state_dict(Shrinks([layer()]).state_dict())

    around = type("Around", (Keeps,), {"__module__": "torch.distributed.optim.any"})  # torch's, but not its base
    with pytest.warns(UserWarning, match="Around does not say"):
        LARS(around("optim_", Shrinks([layer()])))

    LARS(Shrinks([layer()]), weight_decay="decoupled")
    LARS(Shrinks([{"params": [layer()], "trust_coef": None}]))  # left to the base
    LARS(type("Own", (SGD,), {})([layer()], lr=0.1, weight_decay=0.5))  # known


def test_weight_decay_of_a_subclass_with_a_step_of_its_own():
    """It was taken for that of the class of torch that it is derived from, which another step may not apply so."""

    class SGDW(SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(param.grad.sign(), alpha=group["lr"])

    class Logs(SGD):
        def step(self, closure=None):
            self.logged = True
            return super().step(closure)

    with pytest.warns(UserWarning, match="SGDW does not say whether its weight decay is decoupled"):
        LARS(SGDW([layer()], lr=0.1, weight_decay=0.5))
    LARS(SGDW([layer()], lr=0.1))
    LARS(Logs([layer()], lr=0.1, weight_decay=0.5))  # leaves the decay to torch's step
    param = layer()
    LARS(SGDW([param], lr=0.1, weight_decay=0.5), weight_decay="decoupled").step()
    assert_decay_stays(param)


# Options under the names of other libraries


FOREIGN = [
    ("trust_coefficient", 0.02, "say trust_coef$"),
    ("trust_coeff", 0.02, "say trust_coef$"),
    ("eta", 0.02, "say trust_coef$"),
    ("eeta", 0.02, "say trust_coef$"),
    ("lars_coeff", 0.02, "say trust_coef$"),
    ("trust_clip", True, "say clip$"),
    ("clip_lr", True, "say clip$"),
    ("epsilon", 0.1, "say eps$"),
    ("lars_weight_decay", 0.1, "say weight_decay$"),
    ("max_unorm", 0.02, r"say the trust_coef of LAMB\(..., clip=True\)$"),
    ("weight_decay_filter", None, "say weight_decay=0 in a group"),
    ("lars_adaptation_filter", None, "say trust_coef=None in a group"),
    ("exclude_bias_n_norm", True, "say trust_coef=None in a group"),
    ("lars_exclude", True, "say trust_coef=None, where it is True$"),
    ("exclude", True, "say trust_coef=None, where it is True$"),
    ("lars", False, "say trust_coef=None and weight_decay=0, where it is False$"),
]


@pytest.mark.parametrize("wrap", [LARS, LAMB])
@pytest.mark.parametrize(("key", "value", "remedy"), FOREIGN)
def test_options_under_the_names_of_other_libraries(key, value, remedy, wrap):
    """A group's ``trust_coefficient`` was ignored, so that an apex or timm checkpoint's 0.02 became 0.001.

    It is refused wherever a group comes in, and nothing has changed then.
    """
    message = rf"(?s)parameter group {{}} must hold .*\(got: {key}={value!r}\); instead of {key} {remedy}"
    group = {"params": [layer()], key: value}
    with pytest.raises(ValueError, match=message.format(1)):
        wrap(SGD([{"params": [layer()]}, group], lr=1.0))
    optimizer = wrap(SGD([layer()], lr=1.0, momentum=0.9))
    optimizer.step()
    with pytest.raises(ValueError, match=message.format(1)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1

    before = copy.deepcopy(optimizer.state_dict())
    checkpoint = copy.deepcopy(before)
    checkpoint["param_groups"][0].update({"lr": 3.0, key: value})
    checkpoint["state"][0]["momentum_buffer"] += 1
    checkpoint[wrap.state_key]["eps"] = 0.5
    with pytest.raises(ValueError, match=message.format(0)):
        optimizer.load_state_dict(checkpoint)
    after = optimizer.state_dict()
    assert torch.equal(after["state"][0].pop("momentum_buffer"), before["state"][0].pop("momentum_buffer"))
    assert after == before


def test_a_checkpoint_of_timm():
    """Every key that is to be renamed is named at once."""
    optimizer = LARS(SGD([layer()], lr=1.0))
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0].update(trust_coeff=0.02, trust_clip=True, always_adapt=False)
    with pytest.raises(ValueError, match=r"\(got: trust_coeff=0.02, trust_clip=True\)"):
        optimizer.load_state_dict(checkpoint)


@pytest.mark.parametrize("wrap", [LARS, LAMB])
@pytest.mark.parametrize("inside", [False, True])
def test_options_of_the_base_under_such_names(inside, wrap):
    """What the base has in its defaults, or one that it is wrapped around, is the base's, and nobody's key is let be."""
    base = Shrinks([layer()], {"trust_coefficient": 0.02, "max_unorm": 0.1, "decouple": True})
    optimizer = wrap(Keeps("base_optimizer", base) if inside else base)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer = wrap(base)
    optimizer.add_param_group({"params": [layer()], "trust_coefficient": 0.1, "color": "red"})
    assert optimizer.param_groups[1]["trust_coefficient"] == 0.1


# Sharded parameters


def test_flattened_parameters_of_fsdp():
    """In 0.1.2, FSDP trained with ratios of slices of many layers glued together, different on every rank, silently.

    FSDP1 leaves plain tensors with nothing but a mark on them.
    """
    param = layer()
    param._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="FSDP1 flattens and splits them"):
        LARS(SGD([param], lr=1.0)).step()

    class FlatParameter(nn.Parameter):  # of fairscale, where FSDP1 comes from
        _param_numels = (1, 1)

    param = FlatParameter(layer().detach())
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="FSDP1 flattens and splits them"):
        LARS(SGD([param], lr=1.0)).step()


FLATTENING = {
    "LARS": lambda params: LARS(SGD(params, lr=0.5, weight_decay=0.1)),
    "LARS, torchlars.optim.SGD": lambda params: LARS(torchlars.optim.SGD(params, lr=0.5, weight_decay=0.1)),
    "LARS, update": lambda params: LARS(SGD(params, lr=0.5, weight_decay=0.1), apply_to="update"),
    "LARS.over": lambda params: LARS.over(SGD)(params, lr=0.5, weight_decay=0.1),
    "LAMB": lambda params: LAMB(AdamW(params, lr=0.5, weight_decay=0.1)),
}
flattening = pytest.mark.parametrize("build", FLATTENING.values(), ids=FLATTENING.keys())
FLAT = r"^parameters must be whole layers, but this tensor is no torch.nn.Parameter .*\(group: 0, parameter: 0, shape: {}\)$"


def two_layers(*shapes):
    """Layers with gradients; unless told otherwise, a weight and a bias."""
    params = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes or ((3, 4), (3,))]
    for param in params:
        param.grad = torch.full_like(param, 0.25)
    return params


def master(param):
    """A copy as engines make them: a plain tensor, a leaf."""
    copied = param.detach().clone().requires_grad_()
    copied.grad = param.grad.clone()
    return copied


def flatten(group, ranks=1):
    """Do what the ZeRO optimizers of DeepSpeed do to a group: a rank's piece of one flat copy of all its layers."""
    flat = torch.cat([param.detach().flatten() for param in group["params"]])
    flat = flat[: len(flat) // ranks].clone().requires_grad_()
    flat.grad = torch.full_like(flat, 0.25)
    group["params"] = [flat]
    return flat


def assert_refused(optimizer, flat):
    before = flat.detach().clone(), flat.grad.clone(), optimizer.param_groups[0]["weight_decay"]
    with pytest.raises(RuntimeError, match=FLAT.format(rf"\({len(flat)},\)")):
        optimizer.step()
    assert torch.equal(flat, before[0])
    assert torch.equal(flat.grad, before[1])
    assert optimizer.param_groups[0]["weight_decay"] == before[2]


@flattening
def test_flat_partitions(build, backend):
    """DeepSpeed's ZeRO trained with one ratio for all layers, silently, or with that of a rank's piece of them all.

    After the optimizer was wrapped, it puts one flat vector into each group, a plain tensor with no mark on it.
    """
    for ranks in (1, 2, 5):
        optimizer = build(two_layers())
        flat = flatten(optimizer.param_groups[0], ranks)
        assert_refused(optimizer, flat)
        optimizer.load_state_dict(optimizer.state_dict())
        assert_refused(optimizer, flat)

    optimizer = build(two_layers((3, 4)))  # one layer, but this rank's piece of it only
    assert_refused(optimizer, flatten(optimizer.param_groups[0], ranks=2))
    optimizer = build(two_layers((4,), (12,)))  # the piece has the shape of a layer
    assert_refused(optimizer, flatten(optimizer.param_groups[0], ranks=4))

    optimizer = build(two_layers())  # ZeRO 3: one piece after another, and none between steps
    flat = flatten(optimizer.param_groups[0])
    for piece in flat.detach().split(4):
        optimizer.param_groups[0]["params"] = []
        optimizer.step()
        optimizer.param_groups[0]["params"] = [piece.clone().requires_grad_()]
        optimizer.step()  # there is no gradient yet
        optimizer.param_groups[0]["params"][0].grad = torch.ones_like(piece)
        assert_refused(optimizer, optimizer.param_groups[0]["params"][0])


@flattening
def test_flat_partitions_of_a_group_that_opts_out(build, backend):
    optimizer = build([{"params": two_layers(), "trust_coef": None}, {"params": two_layers()}])
    flat = flatten(optimizer.param_groups[0])
    optimizer.step()
    assert not torch.equal(flat, torch.ones_like(flat))


def steps(optimizer):
    """Whether a step changes every tensor there is, each by a trust ratio of its own."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert list(optimizer.trust_ratios()) == params
    return all(not torch.equal(param, old) for param, old in zip(params, before, strict=True))


@flattening
def test_parameters_that_are_replaced_one_by_one(build, backend):
    """They hold whole layers, whoever replaced them, and whatever their type."""
    params = two_layers()
    optimizer = build(params)
    optimizer.param_groups[0]["params"][:] = [
        nn.Parameter(param.detach().clone()) for param in two_layers((5, 4), (7,))
    ]
    for param in optimizer.param_groups[0]["params"]:  # a model's own: other Parameters, of other shapes
        param.grad = torch.ones_like(param)
    assert steps(optimizer)

    class OfALibrary(nn.Parameter):
        pass

    optimizer.param_groups[0]["params"] = [OfALibrary(torch.ones(6, 4, dtype=torch.float64))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(6, 4, dtype=torch.float64)
    assert steps(optimizer)

    optimizer = build(params)  # float32 copies of layers in float16, as apex, Megatron and DeepSpeed make them
    optimizer.param_groups[0]["params"] = [master(param) for param in optimizer.param_groups[0]["params"]]
    assert steps(optimizer)

    params = two_layers()
    optimizer = build(params)
    params[0].grad = None
    torch.utils.swap_tensors(params[0], torch.full((3, 4), 2.0, dtype=torch.float64, requires_grad=True))
    params[0].grad = torch.ones_like(params[0])
    assert type(params[0]) is torch.Tensor  # types are swapped, too
    assert steps(optimizer)


@flattening
def test_plain_tensors_that_the_user_gave(build, backend):
    params = [master(param) for param in two_layers()]
    optimizer = build(params)
    optimizer.add_param_group({"params": [master(param) for param in two_layers((5,))]})
    assert steps(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups.reverse()
    assert steps(optimizer)
    for make in (copy.copy, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))):
        copied = make(optimizer)
        for group in copied.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, 0.25)
        assert steps(copied)

    params[0].data = torch.ones(6, 4, dtype=torch.float64)  # it grows
    params[0].grad = torch.full_like(params[0], 0.25)
    optimizer.state.clear()
    assert steps(optimizer)
    params[0].grad = None
    torch.utils.swap_tensors(params[0], torch.ones(2, 2, dtype=torch.float64, requires_grad=True))
    params[0].grad = torch.full_like(params[0], 0.25)
    optimizer.state.clear()
    assert steps(optimizer)


def test_parameters_that_are_sharded_after_the_optimizer_was_wrapped(workers):
    """accelerate puts placeholders into the groups, shards the model, and then puts DTensors there."""
    for names in workers(2, shard_as_accelerate_does):
        assert names == ["DTensor"] * 4


def shard_as_accelerate_does():
    """One rank of two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 2)
    nn.init.ones_(model.bias)
    optimizers = [LARS(SGD(model.parameters(), lr=1.0)), LAMB(AdamW(model.parameters(), lr=1.0))]
    names = {param.data_ptr(): name for name, param in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for position, param in enumerate(group["params"]):
                group["params"][position] = torch.empty(1)
                group["params"][position].data_ptr = param.data_ptr()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    sharded = dict(model.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[param.data_ptr]] for param in group["params"]]
    model(torch.ones(3, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return [type(param).__name__ for optimizer in optimizers for param in optimizer.trust_ratios()]


def test_sharded_parameters(workers):
    """In 0.1.2, the norms of a DTensor went to C++ code that reads them by their address, and a DTensor's address is 0.

    Others took the norm of the shard that they saw, so that every rank had a ratio of its own.
    """
    for ratio, grad in workers(2, step_of_a_shard):
        assert ratio == pytest.approx(0.5 * 5.0 / (2.0 + 0.1 * 5.0), rel=1e-12)  # ‖(3, 4)‖ = 5, ‖(2, 0)‖ = 2
        assert grad == pytest.approx([ratio * (2.0 + 0.1 * 3.0), ratio * 0.1 * 4.0], rel=1e-12)


def step_of_a_shard():
    """One rank of two: 3 of (3, 4) is on the first, 4 on the second."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    values, grads = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([2.0, 0.0], dtype=torch.float64)
    param = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    param.grad = distribute_tensor(grads, mesh, [Shard(0)])
    optimizer = LARS(SGD([param], lr=1.0, weight_decay=0.1), eps=0, trust_coef=0.5)
    optimizer.step()
    return optimizer.trust_ratios()[param].item(), param.grad.full_tensor().tolist()
