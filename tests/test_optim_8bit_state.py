"""State dicts of torchlars.optim.SGD with momentum in 8 bits: loads in every direction, and changes between steps."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict as dcp
from coded_layers import (
    BUFFER,
    CHANNELS_LAST,
    CODES,
    IS_CODED,
    KEYS,
    ORDER,
    SCALES,
    assert_same_runs,
    assert_same_tensors,
    give_gradients,
    in_order,
    run,
    sgd,
)
from sgd_cases import snapshot

from torchlars import LARS, optim

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {"deepcopy": copy.deepcopy, "weights_only": saved, "as it is": lambda x: x}
WRAPS = {"plain": lambda base: base, "LARS": LARS}
ways = pytest.mark.parametrize("way", WAYS)
wraps = pytest.mark.parametrize("wrap", WRAPS)


def trained(wrap="plain", steps=2, **options):
    optimizer = WRAPS[wrap](sgd(**options))
    run(optimizer, range(steps))
    return optimizer


def fresh(optimizer, wrap="plain", **options):
    """Another optimizer over copies of the layers, with no state."""
    return WRAPS[wrap](sgd([torch.nn.Parameter(param.detach().clone()) for param in in_order(optimizer)], **options))


def to_nearest(momentum):
    """Codes and scales, from one row after the other."""
    rows = momentum.float()
    if rows.dim() == 4:
        rows = rows.permute(0, 2, 3, 1).flatten(1)
    codes, scales = [], []
    for part in rows.split(128, dim=1):
        largest = part.abs().amax(1, keepdim=True)
        codes.append((part * (torch.full_like(largest, 127) / largest)).round())
        scales.append(largest / torch.full_like(largest, 127))
    codes = torch.cat(codes, dim=1).to(torch.int8)
    if momentum.dim() == 4:
        n, c, h, w = momentum.shape
        codes = codes.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return codes, torch.cat(scales, dim=1)


def decoded(state):
    codes = state[CODES]
    rows = codes.permute(0, 2, 3, 1).flatten(1) if codes.dim() == 4 else codes
    momentum = rows * state[SCALES].repeat_interleave(128, dim=1)[:, : rows.shape[1]]
    if codes.dim() == 4:
        n, c, h, w = codes.shape
        momentum = momentum.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return momentum


@wraps
def test_a_state_dict_holds_plain_types_and_tensors(wrap, backend):
    state_dict = trained(wrap).state_dict()
    assert [group["momentum_dtype"] for group in state_dict["param_groups"]] == ["int8", "int8"]
    assert [group["min_8bit_size"] for group in state_dict["param_groups"]] == [1000, 1000]
    kinds = [
        {name: (tensor.dtype, tensor.dim()) for name, tensor in state_dict["state"][i].items()}
        for i in range(len(IS_CODED))
    ]
    by_group = KEYS[::2] + KEYS[1::2]
    for kind, keys in zip(kinds, by_group, strict=True):
        assert list(kind) == keys
        assert CODES not in keys or (kind[CODES][0] == torch.int8 and kind[SCALES] == (torch.float32, 2))
        assert ORDER not in keys or kind[ORDER] == (torch.int64, 0)
    assert sum(ORDER in keys for keys in KEYS) == 1


@ways
@wraps
def test_its_own_state_dict_is_loaded_bit_for_bit_and_the_run_goes_on(wrap, way, backend):
    optimizer = trained(wrap)
    twin = fresh(optimizer, wrap, lr=7.0)
    twin.load_state_dict(WAYS[way](optimizer.state_dict()))
    assert all(group["momentum_dtype"] is torch.int8 for group in twin.param_groups)
    assert_same_runs(optimizer, twin)
    optimizer = copy.deepcopy(optimizer)  # "as it is" shares its tensors
    for one in (optimizer, twin):
        run(one, range(2, 5))
    assert_same_runs(optimizer, twin)


def test_a_run_that_is_resumed_has_the_bits_of_one_that_went_on(backend):
    whole = trained(steps=6)
    part = trained(steps=3)
    resumed = fresh(part)
    resumed.load_state_dict(saved(part.state_dict()))
    run(resumed, range(3, 6))
    assert_same_runs(whole, resumed)


@pytest.mark.parametrize("kept", [None, torch.float32, "torch"], ids=str)
@ways
def test_a_float_momentum_becomes_codes_to_nearest(way, kept, backend):
    source = trained(cls=torch.optim.SGD) if kept == "torch" else trained(momentum_dtype=kept)
    buffers = [source.state[param][BUFFER].detach().clone() for param in in_order(source)]
    state_dict = WAYS[way](source.state_dict())
    for group in state_dict["param_groups"]:
        if kept != "torch":
            group["momentum_dtype"] = "int8"
    ours = fresh(source)
    ours.load_state_dict(state_dict)
    for param, buffer, keys in zip(in_order(ours), buffers, KEYS, strict=True):
        state = ours.state[param]
        assert list(state) == keys
        if CODES in keys:
            codes, scales = to_nearest(buffer)
            assert torch.equal(state[CODES], codes)
            assert torch.equal(state[SCALES], scales)
            assert state[CODES].stride() == param.stride()
            assert ORDER not in keys or int(state[ORDER]) == CHANNELS_LAST
        else:
            assert torch.equal(state[BUFFER], buffer.to(state[BUFFER].dtype))
            assert state[BUFFER].dtype == (torch.float64 if param.dtype == torch.float64 else torch.float32)
    run(ours, range(2, 3))


@pytest.mark.parametrize("options", [{"momentum_dtype": None}, {"momentum_dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("by", ["state dict", "group"])
def test_codes_become_a_buffer(by, options, backend):
    """Loaded into groups that are not in 8 bits, or in groups that leave them between steps."""
    optimizer = trained()
    expected = [
        decoded(optimizer.state[param]) if coded else None
        for param, coded in zip(in_order(optimizer), IS_CODED, strict=True)
    ]
    ours = copy.deepcopy(optimizer)
    if by == "state dict":
        state_dict = copy.deepcopy(optimizer.state_dict())
        for group in state_dict["param_groups"]:
            group["momentum_dtype"] = None if options["momentum_dtype"] is None else "float32"
        ours = fresh(optimizer, **options)
        ours.load_state_dict(state_dict)
    else:
        for group in ours.param_groups:
            group.update(options)
        give_gradients(ours, 0, zero=True)
        for group in ours.param_groups:
            group.update(lr=0.0, momentum=1.0, weight_decay=0.0)
        ours.step()
    for param, momentum in zip(in_order(ours), expected, strict=True):
        if momentum is not None:
            state = ours.state[param]
            assert list(state) == [BUFFER]
            dtype = torch.float32 if options["momentum_dtype"] is torch.float32 else param.dtype
            assert_same_tensors([state[BUFFER]], [torch.empty_like(param, dtype=dtype).copy_(momentum).detach()])
    run(ours, range(2, 3))


def test_a_larger_min_8bit_size_turns_codes_into_a_buffer_and_a_smaller_one_turns_it_back(backend):
    optimizer = trained()
    linear = in_order(optimizer)[0]
    momentum, codes = decoded(optimizer.state[linear]), optimizer.state[linear][CODES].clone()
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group["min_8bit_size"] = 10**6
    other = fresh(optimizer)
    other.load_state_dict(state_dict)
    assert not any(CODES in state for state in other.state.values())
    assert torch.equal(other.state[in_order(other)[0]][BUFFER], momentum)
    back = fresh(optimizer)
    state_dict = copy.deepcopy(other.state_dict())
    for group in state_dict["param_groups"]:
        group["min_8bit_size"] = 1000
    back.load_state_dict(state_dict)
    assert torch.equal(back.state[in_order(back)[0]][CODES], codes)
    assert back.state[in_order(back)[0]].keys() == {CODES, SCALES}


def test_a_group_that_enters_8_bits_between_steps_codes_what_it_has_to_nearest(backend):
    optimizer = trained(momentum_dtype=torch.float32)
    for group in optimizer.param_groups:
        group["momentum_dtype"] = torch.int8
    expected = copy.deepcopy(optimizer)
    for param, is_coded in zip(in_order(expected), IS_CODED, strict=True):
        if is_coded:
            codes, scales = to_nearest(expected.state[param].pop(BUFFER))
            expected.state[param] |= {CODES: torch.empty_like(param, dtype=torch.int8).copy_(codes), SCALES: scales}
            if param.dim() > 2:
                expected.state[param][ORDER] = torch.tensor(CHANNELS_LAST)
    for one in (optimizer, expected):
        run(one, range(2, 4))
    assert_same_runs(optimizer, expected)


def test_a_state_dict_without_the_keys_leaves_the_groups_their_own(backend):
    theirs = trained(cls=torch.optim.SGD)
    ours = fresh(theirs, min_8bit_size=500)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert all(group["momentum_dtype"] is torch.int8 for group in ours.param_groups)
    assert all(group["min_8bit_size"] == 500 for group in ours.param_groups)
    assert CODES in ours.state[in_order(ours)[5]]  # 800 elements


@ways
def test_torchs_sgd_loads_it_and_begins_its_momentum_anew(way, backend):
    ours = trained()
    theirs, begun = (fresh(ours, cls=torch.optim.SGD) for _ in range(2))
    theirs.load_state_dict(WAYS[way](ours.state_dict()))
    for i, param in enumerate(in_order(begun)):  # what it does find
        if not IS_CODED[i]:
            begun.state[param][BUFFER] = ours.state[in_order(ours)[i]][BUFFER].to(param.dtype).clone()
    for one in (theirs, begun):
        run(one, range(2, 4))
    for p, q in zip(in_order(theirs), in_order(begun), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(theirs.state[p][BUFFER], begun.state[q][BUFFER])


@pytest.mark.parametrize(
    ("options", "flat"),
    [({"full_state_dict": True}, False), ({"cpu_offload": True}, False), ({}, False), ({}, True)],
    ids=str,
)
@wraps
def test_a_state_dict_of_distributed_checkpoints_is_loaded_bit_for_bit(wrap, options, flat, backend):
    def build():
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(130, 40), torch.nn.Linear(40, 70, dtype=torch.bfloat16))
        optimizer = WRAPS[wrap](
            optim.SGD(model.parameters(), lr=0.1, momentum=0.9, momentum_dtype=torch.int8, min_8bit_size=1000)
        )
        return model, optimizer

    def train(model, optimizer, steps):
        for step in steps:
            random = torch.Generator().manual_seed(step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=random).to(param.dtype)
            optimizer.step()

    options = dcp.StateDictOptions(**options, flatten_optimizer_state_dict=flat)
    (model, optimizer), (other, resumed) = build(), build()
    train(model, optimizer, range(2))
    state = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    other.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other, resumed, state, options=options)
    assert all(group["momentum_dtype"] is torch.int8 for group in resumed.param_groups)
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(optimizer.state[p][key], resumed.state[q][key]) for key in optimizer.state[p])
    assert [CODES in optimizer.state[param] for param in model.parameters()] == [True, False, False, False]


# Memory orders: scales belong to blocks in memory

ORDERED = {  # shape, and the order of dimensions 1 and more in memory
    "convolution": ((8, 16, 3, 3), (2, 3, 1)),
    "convolution in 3 dimensions, of whose shape either order could be": ((16, 3, 3, 3, 3), (2, 3, 4, 1)),
    "convolution in 1 dimension": ((6, 30, 9), (2, 1)),
    "pointwise convolution": ((16, 70, 1, 1), (2, 3, 1)),
}


def in_memory(tensor, dims):
    back = sorted(range(len(dims)), key=dims.__getitem__)
    return tensor.permute(0, *dims).contiguous().permute(0, *(1 + i for i in back))


def ordered_layers(is_reordered):
    random = torch.Generator().manual_seed(5)
    values = [0.3 * torch.randn(shape, generator=random) for shape, _ in ORDERED.values()]
    dims = [dims if is_reordered else sorted(dims) for _, dims in ORDERED.values()]
    params = [torch.nn.Parameter(in_memory(value, order)) for value, order in zip(values, dims, strict=True)]
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, momentum_dtype=torch.int8, min_8bit_size=1)
    return torch.nn.ParameterList(params), optimizer, dims


def step_ordered(params, seed):
    random = torch.Generator().manual_seed(seed)
    for param in params:  # rows, and what is beside each other in them, differ much
        size = torch.logspace(-2, 0, param[0].numel()).reshape(param[0].shape)
        param.grad = torch.empty_like(param).copy_(size * torch.randn(param.shape, generator=random))


def through_checkpoint(source, target, folder, get, put):
    torch.distributed.checkpoint.save({"optimizer": get(*source)}, checkpoint_id=folder)
    state = {"optimizer": get(*target)}
    torch.distributed.checkpoint.load(state, checkpoint_id=folder)
    put(*target, state["optimizer"])


def through_memory(change):
    def load(source, target, folder):
        state_dict = change(source[1].state_dict())
        target[1].load_state_dict(state_dict)

    return load


def contiguous(state_dict):
    state_dict = copy.deepcopy(state_dict)
    for state in state_dict["state"].values():
        state.update({name: tensor.contiguous() for name, tensor in state.items()})
    return state_dict


def through_api(**options):
    given = dcp.StateDictOptions(**options)

    def load(source, target, folder):
        def put(model, optimizer, state):
            dcp.set_optimizer_state_dict(model, optimizer, state, options=given)

        through_checkpoint(source, target, folder, lambda *of: dcp.get_optimizer_state_dict(*of, options=given), put)

    return load


def through_plain_checkpoint(source, target, folder):
    through_checkpoint(
        source, target, folder, lambda _, one: one.state_dict(), lambda _, one, state: one.load_state_dict(state)
    )


LOADS = {
    "torch.save": through_memory(saved),
    "as it is": through_memory(lambda state_dict: state_dict),
    "contiguous copies": through_memory(contiguous),
    "a checkpoint": through_plain_checkpoint,
    "a checkpoint by names": through_api(),
    "a flat checkpoint by names": through_api(flatten_optimizer_state_dict=True),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("to", [False, True], ids=["to contiguous", "to another order"])
@pytest.mark.parametrize("of", [False, True], ids=["of contiguous", "of another order"])
@pytest.mark.parametrize("load", LOADS)
def test_momentum_is_loaded_into_layers_of_any_memory_order(load, of, to, tmp_path, backend):
    source, target = ordered_layers(of), ordered_layers(to)
    for (params, optimizer, _), seeds in ((source, (1, 2)), (target, (3,))):
        for seed in seeds:
            step_ordered(params, seed)
            optimizer.step()
    kept = copy.deepcopy([source[1].state[param] for param in source[0]])
    LOADS[load](source[:2], target[:2], tmp_path)
    for param, was, dims, old in zip(target[0], kept, target[2], source[2], strict=True):
        state, is_pointwise = target[1].state[param], 1 in param.shape  # whose memory is the same in either order
        assert list(state) == [CODES, SCALES, ORDER]
        assert is_pointwise or int(state[ORDER]) == int("".join(map(str, dims)))
        assert state[CODES].stride() == param.stride()
        rows = was[CODES].permute(0, *old).flatten(1)
        if dims == old or is_pointwise:
            codes, scales = rows, was[SCALES]
        else:
            momentum = rows * was[SCALES].repeat_interleave(128, dim=1)[:, : rows.shape[1]]
            momentum = momentum.reshape([param.shape[0], *(param.shape[dim] for dim in old)])
            momentum = momentum.permute(0, *(1 + old.index(dim) for dim in range(1, param.dim())))
            codes, scales = to_nearest(momentum.permute(0, *dims).flatten(1))
        assert torch.equal(state[CODES].permute(0, *dims).flatten(1), codes)
        assert torch.equal(state[SCALES], scales)
    step_ordered(target[0], 4)
    target[1].step()


def test_a_layer_that_changes_its_memory_order_between_steps_saves_the_new_one(backend):
    params, optimizer, _ = ordered_layers(True)
    step_ordered(params, 1)
    optimizer.step()
    assert int(optimizer.state[params[0]][ORDER]) == CHANNELS_LAST
    params[0].data = params[0].data.contiguous()
    step_ordered(params, 2)
    optimizer.step()
    state = optimizer.state[params[0]]
    assert (state[CODES].is_contiguous(), int(state[ORDER])) == (True, 123)
    others, resumed, _ = ordered_layers(True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    momentum = state[CODES].flatten(1) * state[SCALES].repeat_interleave(128, dim=1)[:, :144]
    codes, scales = to_nearest(momentum.reshape(8, 16, 3, 3))
    state = resumed.state[others[0]]
    assert int(state[ORDER]) == CHANNELS_LAST
    assert torch.equal(state[CODES], codes)
    assert torch.equal(state[SCALES], scales)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (torch.tensor(124), ValueError, r"momentum_order must name dimensions 1 to 3, a digit each \(got: 124\)"),
        (torch.tensor(12), ValueError, r"dimensions 1 to 3, a digit each \(got: 12\)"),
        (torch.tensor(5231), ValueError, r"\(got: 5231\)"),
        (torch.tensor(-231), ValueError, r"\(got: -231\)"),
        (torch.tensor(231.0), ValueError, r"momentum_order must be torch.int64 of shape \(\) \(got: torch.float32"),
        (torch.tensor([231]), ValueError, r"momentum_order must be torch.int64 of shape \(\) .*shape \(1,\)"),
        (231, TypeError, r"\['momentum_order'\] must be a tensor or None \(got: int\)"),
    ],
)
def test_a_wrong_memory_order_is_refused_and_nothing_is_loaded(order, error, message, backend):
    params, optimizer, _ = ordered_layers(True)
    step_ordered(params, 1)
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0][ORDER] = order
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state_dict)
    torch.testing.assert_close(snapshot(optimizer), before, rtol=0, atol=0)


def test_codes_that_became_contiguous_between_steps_are_read_in_the_order_of_their_scales(backend):
    params, optimizer, _ = ordered_layers(True)
    step_ordered(params, 1)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    for state in optimizer.state.values():
        state[CODES] = state[CODES].contiguous()
    for one in (optimizer, twin):
        step_ordered(one.param_groups[0]["params"], 2)
        one.step()
    for p, q in zip(*(one.param_groups[0]["params"] for one in (optimizer, twin)), strict=True):
        assert optimizer.state[p][CODES].stride() == p.stride()
        assert torch.equal(p, q)


def test_a_wrong_memory_order_is_refused_by_a_step_that_reads_it(backend):
    params, optimizer, _ = ordered_layers(True)
    step_ordered(params, 1)
    optimizer.step()
    state = optimizer.state[params[0]]
    state[CODES], state[ORDER] = state[CODES].contiguous(), torch.tensor(7)
    step_ordered(params, 2)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"momentum_order must name dimensions 1 to 3, a digit each \(got: 7\)"):
        optimizer.step()
    torch.testing.assert_close(snapshot(optimizer), before, rtol=0, atol=0)


def test_the_memory_order_is_on_the_cpu_whatever_the_default_device(backend):
    params, optimizer, _ = ordered_layers(True)
    step_ordered(params, 1)
    with torch.device("meta"):
        optimizer.step()
    assert all(state[ORDER].device.type == "cpu" for state in optimizer.state.values())


def test_codes_that_no_rounding_would_give_are_loaded_as_they_are(backend):
    """Decoded and coded anew, the largest code of a block would be 127."""
    optimizer = trained()
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        if CODES in state:
            state[CODES] //= 2
    resumed = fresh(optimizer)
    resumed.load_state_dict(copy.deepcopy(state_dict))
    for param, i in zip(in_order(resumed), (0, 4, 1, 5, 2, 6, 3, 7), strict=True):
        if CODES in state_dict["state"][i]:
            assert torch.equal(resumed.state[param][CODES], state_dict["state"][i][CODES])


def test_codes_that_torchs_sgd_has_cast_are_refused_with_a_way_out(backend):
    """It has not stepped since, or it would have begun a buffer."""
    theirs = sgd(cls=torch.optim.SGD)
    theirs.load_state_dict(trained().state_dict())
    with pytest.raises(ValueError, match=r"if torch\.optim\.SGD has cast them, delete them, and momentum begins anew"):
        sgd().load_state_dict(theirs.state_dict())


def test_a_parameter_without_dimensions_has_no_codes(backend):
    optimizer = sgd([torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.ones(3))])
    state_dict = optimizer.state_dict()
    state_dict["state"][0] = {CODES: torch.zeros((), dtype=torch.int8), SCALES: torch.zeros(1, 1)}
    with pytest.raises(ValueError, match="a parameter without dimensions has no rows, and cannot have momentum_codes"):
        optimizer.load_state_dict(state_dict)


# State dicts that fit nothing

WRONG = {
    "codes of another shape": ({CODES: torch.zeros(130, 40, dtype=torch.int8)}, ValueError, r"momentum_codes must be .*\(40, 130\) .*\(130, 40\)"),
    "codes in uint8": ({CODES: torch.zeros(40, 130, dtype=torch.uint8)}, ValueError, r"momentum_codes must be torch.int8 .*torch.uint8"),
    "codes in float32": ({CODES: torch.zeros(40, 130)}, ValueError, r"momentum_codes must be torch.int8 .*torch.float32"),
    "sparse codes": ({CODES: torch.zeros(40, 130, dtype=torch.int8).to_sparse()}, ValueError, r"momentum_codes must be .*sparse"),
    "scales of another shape": ({SCALES: torch.zeros(40, 1)}, ValueError, r"momentum_scales must be .*\(40, 2\) .*\(40, 1\)"),
    "scales in float64": ({SCALES: torch.zeros(40, 2, dtype=torch.float64)}, ValueError, r"momentum_scales must be torch.float32 .*torch.float64"),
    "codes alone": ({SCALES: None}, ValueError, r"momentum must be a momentum_buffer, or momentum_codes with their momentum_scales \(found: momentum_codes\)"),
    "scales alone": ({CODES: None}, ValueError, r"or momentum_codes with their momentum_scales \(found: momentum_scales\)"),
    "both kinds": ({BUFFER: torch.zeros(40, 130)}, ValueError, r"\(found: momentum_buffer, momentum_codes, momentum_scales\)"),
    "codes in a list": ({CODES: [[0] * 130] * 40}, TypeError, r"\['momentum_codes'\] must be a tensor or None \(got: list\)"),
    "a number for scales": ({SCALES: 1.0}, TypeError, r"\['momentum_scales'\] must be a tensor or None \(got: float\)"),
    "a buffer of another shape": ({CODES: None, SCALES: None, BUFFER: torch.zeros(7)}, ValueError, r"momentum_buffer must have its parameter's shape \(got: \(7,\)\)"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "min_8bit_size"),
    [(wrong, size) for wrong in WRONG for size in (1000, 10**6) if size == 1000 or "a buffer" not in wrong],
)
@wraps
def test_a_wrong_state_dict_is_refused_and_nothing_is_loaded(wrap, min_8bit_size, wrong, backend):
    """Also where its codes would become a buffer."""
    changes, error, message = WRONG[wrong]
    optimizer = trained(wrap)
    state_dict = copy.deepcopy(trained(wrap, steps=3, lr=0.7).state_dict())
    state_dict["state"][0].update(changes)
    for group in state_dict["param_groups"]:
        group["min_8bit_size"] = min_8bit_size
    before, groups = (
        snapshot(optimizer),
        [{**group, "params": list(group["params"])} for group in optimizer.param_groups],
    )
    kept = {param: dict(state) for param, state in optimizer.state.items()}
    with pytest.raises(error, match=message) as raised:
        optimizer.load_state_dict(state_dict)
    assert "state_dict['state'][0]" in str(raised.value)
    torch.testing.assert_close(snapshot(optimizer), before, rtol=0, atol=0)
    for param, state in kept.items():
        assert all(optimizer.state[param][name] is tensor for name, tensor in state.items())
    for group, old in zip(optimizer.param_groups, groups, strict=True):
        assert group.keys() == old.keys()
        assert all(
            group[key] is old[key] or (key == "params" and all(map(lambda a, b: a is b, group[key], old[key])))
            for key in group
        )
    twin = trained(wrap)
    for one in (optimizer, twin):
        run(one, range(2, 3))
    assert_same_runs(optimizer, twin)


@pytest.mark.parametrize(
    "changes", [{"momentum_dtype": "int4"}, {"min_8bit_size": -1}, {"min_8bit_size": "4096"}], ids=str
)
@wraps
def test_a_state_dict_with_wrong_keys_of_groups_is_refused_and_nothing_is_loaded(wrap, changes, backend):
    optimizer = trained(wrap)
    state_dict = copy.deepcopy(trained(wrap, steps=3).state_dict())
    state_dict["param_groups"][1].update(changes)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(changes))} of parameter group 1 must be"):
        optimizer.load_state_dict(state_dict)
    torch.testing.assert_close(snapshot(optimizer), before, rtol=0, atol=0)
    assert optimizer.param_groups[1]["momentum_dtype"] is torch.int8
    assert optimizer.param_groups[1]["min_8bit_size"] == 1000


def test_a_state_dict_that_has_been_through_steps_of_torchs_sgd_has_the_momentum_of_these(backend):
    """torch keeps the codes, cast to the parameters' dtype, and begins a buffer beside them."""
    theirs = sgd(cls=torch.optim.SGD)
    theirs.load_state_dict(trained().state_dict())
    give_gradients(theirs, 7)
    theirs.step()
    other = sgd()
    other.load_state_dict(theirs.state_dict())
    for param, theirs_param in zip(in_order(other), in_order(theirs), strict=True):
        momentum = theirs.state[theirs_param]["momentum_buffer"]
        state = other.state[param]
        if CODES in state:
            assert set(state) == {CODES, SCALES} | ({ORDER} if param.dim() > 2 else set())
            expected = to_nearest(momentum)
            assert all(torch.equal(state[name], one) for name, one in zip((CODES, SCALES), expected, strict=True))
        else:
            assert torch.equal(state[BUFFER], momentum.to(state[BUFFER].dtype))


@pytest.mark.parametrize("name", [CODES, SCALES])
def test_momentum_whose_memory_was_freed_is_refused(name, backend):
    optimizer = trained()
    param = next(param for param in in_order(optimizer) if CODES in optimizer.state[param])
    optimizer.state[param][name].untyped_storage().resize_(0)
    give_gradients(optimizer, 7)
    with pytest.raises(RuntimeError, match=rf"{name} must have memory \(its storage was freed\)"):
        optimizer.step()


def test_no_size_is_too_large(backend):
    optimizer = sgd(min_8bit_size=2**70)
    give_gradients(optimizer, 0)
    optimizer.step()
    give_gradients(optimizer, 1)
    optimizer.step()
    assert all(set(optimizer.state[param]) == {BUFFER} for param in in_order(optimizer))
