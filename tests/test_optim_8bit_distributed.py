"""torchlars.optim.SGD with momentum in 8 bits, sharded and replicated: codes, scales and layers of the unsharded run.

Each test runs a function of this module on two to four processes, beside the unsharded run. Gradients are given, so that
bits can be compared.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import full, mesh_of
from torch import Tensor, nn

import torchlars
from torchlars import LARS, sharding

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")

CODES, SCALES, BUFFER, ORDER = "momentum_codes", "momentum_scales", "momentum_buffer", "momentum_order"
SHAPES = {"first": (7, 300), "second": (5, 512), "third": (1, 768), "bias": (9,), "fourth": (6, 4, 64)}
STEPS = 3


class Network(nn.Module):
    """Layers that ranks cannot share evenly, of which some are too small for all to have a part."""

    def __init__(self, numbers_elements: bool = False) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        for name, shape in SHAPES.items():
            dtype = torch.bfloat16 if name == "fourth" else torch.float32
            values = 0.1 * torch.randn(shape, generator=random)
            if numbers_elements:
                values, dtype = torch.arange(values.numel()).reshape(shape), torch.float64
            part = nn.Module()  # for FSDP, of whose modules each has one dtype
            part.register_parameter("weight", nn.Parameter(values.to(dtype)))
            self.add_module(name, part)


def placed(setup: str, numbers_elements: bool = False) -> Network:
    """Return the network as a set-up of torch.distributed shards it."""
    model, world = Network(numbers_elements), dist.get_world_size()
    if setup.startswith("FSDP2"):
        from torch.distributed.fsdp import fully_shard

        if setup == "FSDP2":
            mesh = mesh_of(world)
        else:
            mesh = mesh_of(world // 2, 2)
            shard_columns(model, mesh["inner"], 0 if setup.endswith("rows") else 1)
            mesh = mesh["outer"]
        for part in model.children():
            fully_shard(part, mesh=mesh)
    elif setup == "HSDP":
        distribute(model, mesh_of(2, world // 2), "RS")
    elif setup == "TP":
        shard_columns(model, mesh_of(world), 1)
    elif setup == "replicated":
        distribute(model, mesh_of(world), "R")
    return model


def distribute(model: Network, mesh: Any, placements: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    kinds = [Replicate() if kind == "R" else Shard(0) for kind in placements]
    for part in model.children():
        part.weight = nn.Parameter(distribute_tensor(part.weight.detach(), mesh, kinds))


def shard_columns(model: Network, mesh: Any, dim: int) -> None:
    """Shard what can be cut at multiples of 128; the first layer, of 300 columns, cannot where ``dim`` is 1."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name in ("second", "third") if dim == 1 else ("first", "second"):
        part: Any = getattr(model, name)
        part.weight = nn.Parameter(distribute_tensor(part.weight.detach(), mesh, [Shard(dim)]))


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): param for name, param in model.named_parameters()}


def positions_of(setup: str) -> dict[str, Tensor]:
    """Return where the elements of each local part stand in the whole layer, which torch itself says."""
    return {name: sharding.local(param.detach()).long() for name, param in named(placed(setup, True)).items()}


def give_gradients(model: nn.Module, step: int, positions: dict[str, Tensor] | None = None) -> None:
    random = torch.Generator().manual_seed(50 + step)
    params = named(model)
    for name, shape in SHAPES.items():
        param: Any = params[name]
        grad = (0.05 * torch.randn(shape, generator=random)).to(param.dtype)
        if positions is not None:
            grad = grad.flatten()[positions[name]]
        if sharding.is_distributed(param):
            from torch.distributed.tensor import DTensor

            mesh, stride = param.device_mesh, param.stride()
            grad = DTensor.from_local(grad, mesh, param.placements, run_check=False, shape=param.shape, stride=stride)
        param.grad = grad


def sgd(model: nn.Module, **options: Any) -> Any:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "momentum_dtype": torch.int8, **options}
    return torchlars.optim.SGD([named(model)[name] for name in SHAPES], min_8bit_size=500, **options)


def run(model: nn.Module, optimizer: Any, steps: range, positions: dict[str, Tensor] | None = None) -> None:
    for step in steps:
        give_gradients(model, step, positions)
        optimizer.step()


def run_whole(steps: int, **options: Any) -> tuple[nn.Module, Any]:
    whole = Network()
    expected = sgd(whole, **options)
    run(whole, expected, range(steps))
    return whole, expected


def differing(
    model: nn.Module, optimizer: Any, whole: nn.Module, expected: Any, positions: dict[str, Tensor]
) -> list[str]:
    """Return what has other bits here than in the unsharded run."""
    found = []
    for name, param in named(model).items():
        other, here = named(whole)[name], positions[name]
        state, theirs = optimizer.state[param], expected.state[other]
        assert state.keys() == theirs.keys(), name
        for key, (one, two) in {"layer": (param, other), **{key: (state[key], theirs[key]) for key in theirs}}.items():
            if key == ORDER:  # a number
                assert one == two
                continue
            if sharding.is_distributed(param):
                assert (one.device_mesh, one.placements) == (param.device_mesh, param.placements)
            assert one.shape == two.shape
            where, length = here, two[0].numel()
            if key == SCALES:  # of the block that begins with each 128th element of a row
                first, of_row = here.flatten(1)[:, ::128], torch.Size(SHAPES[name][1:]).numel()
                where = first // of_row * length + first % of_row // 128
            if not torch.equal(sharding.local(one.detach()), two.detach().flatten()[where]):
                found.append(f"{key} of {name}")
    return found


def coded_layers(model: nn.Module, optimizer: Any) -> list[str]:
    return sorted(name for name, param in named(model).items() if CODES in optimizer.state[param])


def train(setup: str, options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what differs, and which layers are coded."""
    model, positions = placed(setup), positions_of(setup)
    optimizer = sgd(model, **options)
    run(model, optimizer, range(STEPS), positions)
    return differing(model, optimizer, *run_whole(STEPS, **options), positions), coded_layers(model, optimizer)


SETUPS = [("FSDP2", 2), ("FSDP2", 3), ("HSDP", 4), ("FSDP2 and rows", 4), ("FSDP2 and columns", 4), ("TP", 2)]
SETUPS.append(("replicated", 2))
setups = pytest.mark.parametrize(("setup", "world"), SETUPS)


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "maximize": True}], ids=str)
@setups
def test_a_sharded_run_has_the_bits_of_the_unsharded_one(workers, setup, world, options):
    for differs, coded in workers(world, train, setup, options):
        assert differs == []
        assert coded == ["first", "fourth", "second", "third"]


def places(setup: str) -> list[tuple[str, Any, Any]]:
    """Return for each layer its place as we compute it, and as torch laid out a layer of numbered elements."""
    found, positions = [], positions_of(setup)
    for name, param in named(placed(setup)).items():
        here, length = positions[name], torch.Size(SHAPES[name][1:]).numel()
        if here.numel() > 0:
            begins = here.flatten(1)[:, 0] if here.dim() > 1 else here
            assert here.dim() == 1 or (here.flatten(1).diff(dim=1) == 1).all()
            assert (begins.diff() == length).all()
            found.append((name, sharding.place_of_rows(param), (int(begins[0]), length)))
    return found


@setups
def test_the_place_of_rows_is_where_torch_put_them(workers, setup, world):
    answers = workers(world, places, setup)
    for found in answers:
        for name, place, expected in found:
            assert place == expected, name
    if setup != "replicated":
        assert len({place for found in answers for _, place, _ in found if place is not None}) > len(SHAPES)


def train_off_the_grid(setup: str, shape: tuple[int, ...], dim: int) -> tuple[list[str], list[str], Any]:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of(dist.get_world_size())
    params = [nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(dim)])) for _ in range(2)]
    params.append(nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)])))
    optimizer = torchlars.optim.SGD(params, lr=0.1, momentum=0.9, momentum_dtype=torch.int8, min_8bit_size=0)
    optimizer = LARS(optimizer) if setup == "LARS" else optimizer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for param in params:
                param.grad = param.detach().clone()
            optimizer.step()
    kept = [list(optimizer.state[param]) for param in params]
    dtypes = {optimizer.state[param][BUFFER].dtype for param in params[:2]}
    messages = [str(warning.message) for warning in caught if "multiples of 128" in str(warning.message)]
    return messages, kept, dtypes


@pytest.mark.parametrize("setup", ["plain", "LARS"])
@pytest.mark.parametrize(("shape", "dim"), [((4, 300), 1), ((3, 640), 1), ((3, 2, 256), 2), ((3, 4, 96), 1)])
def test_layers_that_are_cut_inside_of_blocks_have_momentum_in_float32_and_one_warning(workers, shape, dim, setup):
    for messages, kept, dtypes in workers(2, train_off_the_grid, setup, shape, dim):
        assert kept == [[BUFFER], [BUFFER], [CODES, SCALES] + [ORDER] * (len(shape) > 2)]
        assert dtypes == {torch.float32}
        assert len(messages) == 1
        assert f"group: 0, shape: {shape}, placements: (Shard(dim={dim}),); and 1 more" in messages[0]


def train_without_columns() -> tuple[list[str], tuple[int, ...], bool]:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of(dist.get_world_size())
    whole = nn.Parameter(0.1 * torch.randn(5, 1, 128, generator=torch.Generator().manual_seed(0)))
    grad = torch.randn(5, 1, 128, generator=torch.Generator().manual_seed(1))
    param = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(1)]))
    whole.grad, param.grad = grad, distribute_tensor(grad, mesh, [Shard(1)])
    given = {"lr": 0.1, "momentum": 0.9, "momentum_dtype": torch.int8, "min_8bit_size": 0}
    optimizer, expected = (torchlars.optim.SGD([one], **given) for one in (param, whole))
    for one in (optimizer, expected, optimizer, expected):
        one.step()
    state, theirs = optimizer.state[param], expected.state[whole]
    same = torch.equal(full(param), whole) and all(
        torch.equal(full(state[key]), theirs[key]) for key in theirs if key != ORDER
    )
    return list(state), tuple(param.to_local().shape), same


def test_a_rank_may_have_no_columns_of_a_layer(workers):
    """Its rows have no elements and no blocks, and to divide by their length killed the process."""
    first, second = workers(2, train_without_columns)
    assert first == ([CODES, SCALES, ORDER], (5, 1, 128), True)
    assert second == ([CODES, SCALES, ORDER], (5, 0, 128), True)


def train_under_lars(setup: str) -> tuple[list[str], int]:
    """Return what differs of the layers whose ratios have equal bits, and how many these are."""
    model, whole, positions = placed(setup), Network(), positions_of(setup)
    optimizer, expected = (LARS(sgd(one), trust_coef=0.3) for one in (model, whole))
    run(model, optimizer, range(1), positions)
    run(whole, expected, range(1))
    ratios, theirs = optimizer.trust_ratios(), expected.trust_ratios()
    differs = differing(model, optimizer, whole, expected, positions)
    alike = []
    for name, param in named(model).items():
        ratio, other = ratios[param], theirs[named(whole)[name]]
        assert abs(ratio / other - 1) < 1e-6
        alike += [name] if ratio == other else []
    return [what for what in differs if what.split(" of ")[1] in alike], len(alike)


@pytest.mark.parametrize(("setup", "world"), [("FSDP2", 2), ("FSDP2", 3), ("FSDP2 and columns", 4)])
def test_under_lars_layers_have_the_bits_of_the_unsharded_run_where_their_ratios_do(workers, setup, world):
    """Ratios are of norms that are summed over the ranks, in another order."""
    for differs, count in workers(world, train_under_lars, setup):
        assert differs == []
        assert count > 0


def train_replicas() -> list[str]:
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(130, 70), nn.Linear(70, 3))
    parallel = DistributedDataParallel(model)
    optimizer = torchlars.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, momentum_dtype=torch.int8, min_8bit_size=0
    )
    for step in range(3):
        optimizer.zero_grad()
        random = torch.Generator().manual_seed(10 * step + dist.get_rank())
        parallel(torch.randn(4, 130, generator=random)).square().mean().backward()
        optimizer.step()
    assert CODES in optimizer.state[model[0].weight]
    return [x.detach() for param in model.parameters() for x in (param, *optimizer.state[param].values())]


def test_replicas_have_the_same_bits(workers):
    first, second = workers(2, train_replicas)
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))


# Checkpoints


def save(setup: str, folder: str, options: dict[str, bool]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state_dict

    model, positions = placed(setup), positions_of(setup)
    optimizer = sgd(model)
    run(model, optimizer, range(STEPS), positions)
    given = dcp_state_dict.StateDictOptions(**options)
    weights, state = dcp_state_dict.get_state_dict(model, optimizer, options=given)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(setup: str, folder: str, options: dict[str, bool], begun: int, again: str | None) -> list[str]:
    """Load, go on, and return what differs from the unsharded run; and save anew."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state_dict

    model, positions = placed(setup), positions_of(setup)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = sgd(model)
    given = dcp_state_dict.StateDictOptions(**options)
    weights, state = dcp_state_dict.get_state_dict(model, optimizer, options=given)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    dcp_state_dict.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=given)
    run(model, optimizer, range(begun, begun + 2), positions)
    if again is not None:
        weights, state = dcp_state_dict.get_state_dict(model, optimizer, options=given)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=again)
    return differing(model, optimizer, *run_whole(begun + 2), positions)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("through", ["FSDP2", "TP"])
def test_a_checkpoint_is_resumed_by_2_then_3_then_1_ranks_with_the_same_bits(workers, tmp_path, through, flatten):
    options = {"flatten_optimizer_state_dict": flatten}
    folders = [str(tmp_path / name) for name in ("first", "second", "third")]
    workers(2, save, "FSDP2", folders[0], options)
    world = 3 if through == "FSDP2" else 2
    for found in workers(world, load, through, folders[0], options, STEPS, folders[1]):
        assert found == []
    for found in workers(1, load, "FSDP2", folders[1], options, STEPS + 2, folders[2]):
        assert found == []


def gather_and_load(setup: str, options: dict[str, bool]) -> list[str]:
    from torch.distributed.checkpoint import state_dict as dcp_state_dict

    model, other, positions = placed(setup), placed(setup), positions_of(setup)
    optimizer, resumed = sgd(model), sgd(other)
    run(model, optimizer, range(STEPS), positions)
    given = dcp_state_dict.StateDictOptions(**options)
    weights, state = dcp_state_dict.get_state_dict(model, optimizer, options=given)
    if options.get("full_state_dict") and not options.get("cpu_offload"):
        assert not any(sharding.is_distributed(x) for kept in state["state"].values() for x in kept.values())
    dcp_state_dict.set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=given)
    run(other, resumed, range(STEPS, STEPS + 2), positions)
    return differing(other, resumed, *run_whole(STEPS + 2), positions)


@pytest.mark.parametrize("options", [{"full_state_dict": True}, {"cpu_offload": True}], ids=str)
@pytest.mark.parametrize(("setup", "world"), [("FSDP2", 2), ("FSDP2", 3), ("HSDP", 4)])
def test_gathered_and_offloaded_state_dicts_are_loaded_with_the_same_bits(workers, setup, world, options):
    for found in workers(world, gather_and_load, setup, options):
        assert found == []


def step_with_momentum_placed_otherwise(kinds: str) -> bool:
    """Tell whether momentum that is placed otherwise than its layer is decoded, moved to it, and rounded again."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(dist.get_world_size())
    of_layer, of_momentum = ({"R": Replicate(), "0": Shard(0), "1": Shard(1)}[kind] for kind in kinds)
    whole = 0.1 * torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    runs = []
    for placement in (None, of_layer):
        param = nn.Parameter(whole.clone() if placement is None else distribute_tensor(whole, mesh, [placement]))
        param.grad = grad.clone() if placement is None else distribute_tensor(grad, mesh, [placement])
        given = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        optimizer = torchlars.optim.SGD([param], **given, momentum_dtype=torch.int8, min_8bit_size=0)
        optimizer.step()
        state = optimizer.state[param]
        for name in (CODES, SCALES):
            if placement is not None:
                state[name] = state[name].redistribute(mesh, [of_momentum])
        optimizer.step()
        runs.append([full(x) for x in (param.detach(), state[CODES], state[SCALES])])
    return all(map(torch.equal, *runs))


@pytest.mark.parametrize("kinds", ["R0", "0R", "R1", "1R", "01", "10"])
def test_momentum_that_is_placed_otherwise_is_moved_to_its_layer(workers, kinds):
    """Its codes are those of a largest of 127, which rounding again leaves as they are."""
    assert workers(2, step_with_momentum_placed_otherwise, kinds) == [True, True]


def step_with_scales_placed_otherwise() -> str:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(dist.get_world_size())
    param = nn.Parameter(distribute_tensor(torch.ones(8, 200), mesh, [Shard(0)]))
    optimizer = torchlars.optim.SGD([param], lr=0.1, momentum=0.9, momentum_dtype=torch.int8, min_8bit_size=0)
    param.grad = param.detach().clone()
    optimizer.step()
    optimizer.state[param][SCALES] = optimizer.state[param][SCALES].redistribute(mesh, [Replicate()])
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_scales_that_are_placed_otherwise_than_their_codes_are_refused(workers):
    """The scales of other rows would be taken."""
    message = "have the same placements (momentum_codes: (Shard(dim=0),), momentum_scales: (Replicate(),))"
    assert all(message in found for found in workers(2, step_with_scales_placed_otherwise))
