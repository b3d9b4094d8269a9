"""Times of a step on processes of this machine that share a model by FSDP2."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from benchmarks import common
from benchmarks.scaling.simulate import prediction
from benchmarks.step_time.contestants import Hyper, sgd, torchlars_sgd
from benchmarks.step_time.sets import SETS, Shape
from torchlars import LAMB, LARS

TIMEOUT = 300  # seconds, of a collective
HYPER = Hyper(lr=1e-6, weight_decay=1e-4)
TOLERANCE = 1e-5
REDUCE = "all-reduce alone"
ONE_BY_ONE = "norms alone, one by one"
KINDS = ("whole", "sharded")
UNEVEN = ((7, 5), (7,), (3, 2, 2), (1,), (6, 1))  # shapes that ranks cannot share evenly

Step = Callable[[], object]


class Disagreement(Exception):
    """Contestants that should compute the same do not, or tell other ranks what was not predicted."""


@dataclass(frozen=True)
class Contestant:
    """One way to take a step."""

    name: str
    build: Callable[[list[Parameter], Hyper], Any]  # returns what has a ``step``
    formula: str
    base: str | None = None  # what it is measured in
    wraps: bool = False  # whether norms are completed


def adamw(params: list[Parameter], hyper: Hyper) -> torch.optim.Optimizer:
    """Build torch's AdamW."""
    return torch.optim.AdamW(params, lr=hyper.lr, weight_decay=hyper.weight_decay, foreach=True)


def foreach(params: list[Parameter], hyper: Hyper) -> torch.optim.Optimizer:
    """Build torch's SGD."""
    return sgd(params, hyper, "foreach")


def lars(base: Callable[[list[Parameter], Hyper], torch.optim.Optimizer]) -> Callable[[list[Parameter], Hyper], LARS]:
    """Return a builder of LARS over a base."""
    return lambda params, hyper: LARS(base(params, hyper), eps=hyper.eps, trust_coef=hyper.trust_coef)


def lamb(params: list[Parameter], hyper: Hyper) -> LAMB:
    """Build LAMB."""
    return LAMB(adamw(params, hyper))


CONTESTANTS = [
    Contestant("SGD foreach", foreach, "SGD"),
    Contestant("LARS(SGD foreach)", lars(foreach), "LARS", "SGD foreach", wraps=True),
    Contestant("torchlars.optim.SGD", torchlars_sgd, "SGD"),
    Contestant("LARS(torchlars.optim.SGD)", lars(torchlars_sgd), "LARS", "torchlars.optim.SGD", wraps=True),
    Contestant("AdamW foreach", adamw, "AdamW"),
    Contestant("LAMB(AdamW foreach)", lamb, "LAMB", "AdamW foreach", wraps=True),
]


class Net(nn.Module):
    """Layers of given shapes, each of its own scale."""

    def __init__(self, shapes: list[Shape]) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for i, shape in enumerate(shapes):
            values = torch.randn(shape, generator=random).mul_(0.02 * (1 + i % 7))
            self.register_parameter(f"layer{i}", Parameter(values))


def sharded(shapes: list[Shape]) -> list[Parameter]:
    """Return parameters of which every rank has its shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net(shapes)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return list(model.parameters())


def new_gradients(like: list[Parameter], whole: list[Parameter], seed: int) -> list[Tensor]:
    """Return gradients, distributed as parameters are."""
    from torch.distributed.tensor import distribute_tensor

    random = torch.Generator().manual_seed(seed)
    grads = [torch.randn(param.shape, generator=random).mul_(0.01 * (1 + i % 5)) for i, param in enumerate(whole)]
    return [
        grad if like is whole else distribute_tensor(grad, param.device_mesh, param.placements)
        for param, grad in zip(like, grads, strict=True)
    ]


def one_by_one(params: list[Parameter]) -> list[Tensor]:
    """Return the norms of all parameters, then of all gradients, each by a collective of its own."""
    tensors = [param.detach() for param in params] + [param.grad for param in params]
    return [torch.linalg.vector_norm(tensor).full_tensor() for tensor in tensors]


def check_agreement() -> None:
    """Raise if a sharded run has not the numbers of the unsharded one, for all who are timed."""
    hyper = Hyper(lr=0.1, weight_decay=0.05, trust_coef=0.02)
    expected: dict[str, list[Tensor]] = {}
    for contestant in CONTESTANTS:
        params, whole = sharded(list(UNEVEN)), list(Net(list(UNEVEN)).parameters())
        optimizer, reference = contestant.build(params, hyper), contestant.build(whole, hyper)
        for step in range(3):
            for each, stepped in ((params, optimizer), (whole, reference)):
                for param, grad in zip(each, new_gradients(each, whole, step), strict=True):
                    param.grad = grad
                if step == 0 and each is params:
                    norms = torch.stack(one_by_one(params))
                stepped.step()
        found = [param.detach().full_tensor() for param in params]
        of_whole = [param.detach() for param in whole]
        for other in (of_whole, expected.setdefault(contestant.formula, found)):
            for one, two in zip(found, other, strict=True):
                if float((one - two).norm()) > TOLERANCE * float(two.norm()):
                    raise Disagreement(f"{contestant.name} does not compute {contestant.formula} where it is sharded")
    start = list(Net(list(UNEVEN)).parameters())
    of_start = torch.stack([tensor.detach().norm() for tensor in (*start, *new_gradients(start, start, 0))])
    if not torch.allclose(norms, of_start, rtol=TOLERANCE, atol=0):
        raise Disagreement("norms one by one are not those of whole layers")


def communication(step: Step) -> dict[str, int]:
    """Return the collectives of a step, and the bytes that this rank puts in."""
    from torch.distributed.tensor.debug import CommDebugMode

    class Counting(CommDebugMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = self.get_total_counts()
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if self.get_total_counts() > before:
                tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
                self.size += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return result

    with Counting() as mode:
        step()
    return {"collectives": mode.get_total_counts(), "bytes": mode.size}


def work(rank: int, ranks: int, folder: str, function: Callable[..., Any], *args: Any) -> None:
    """Call a function as one of several ranks, and write what it returns to a file."""
    torch.set_num_threads(1)
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "OFF"
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    try:
        Path(folder, f"{rank}.json").write_text(json.dumps(function(*args)), encoding="utf-8")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still hold tensors: where they let go of them at a normal exit, torch aborts


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function on so many processes. Return what each returns."""
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (ranks, folder, function, *args), nprocs=ranks)
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def time_contestants(shapes: list[Shape], rounds: int, seed: int) -> dict[str, Any]:
    """Check, then return wall and CPU seconds of this rank, round by round, and what it told others."""
    check_agreement()
    params = sharded(shapes)
    random = torch.Generator().manual_seed(dist.get_rank())
    for param in params:
        param.grad = torch.empty_like(param)
    grads = [param.grad.to_local() for param in params]
    masters = [torch.randn(grad.shape, generator=random).mul_(1e-3) for grad in grads]

    def restore() -> None:
        for grad, master in zip(reversed(grads), reversed(masters), strict=True):  # as backward does
            grad.copy_(master)

    vector = torch.zeros(2 * len(shapes), dtype=torch.float64)
    optimizers = {each.name: each.build(params, HYPER) for each in CONTESTANTS}
    steps: dict[str, Step] = {each: optimizer.step for each, optimizer in optimizers.items()}
    steps[REDUCE] = lambda: dist.all_reduce(vector)
    steps[ONE_BY_ONE] = lambda: one_by_one(params)
    told = {}
    for each, step in steps.items():
        restore()
        step()  # allocates state
        told[each] = communication(step)
    cpu: dict[str, list[float]] = {each: [] for each in steps}

    def clock(each: str) -> Callable[[], float]:
        def sample() -> float:
            restore()
            dist.barrier()
            start = time.process_time()
            wall = common.seconds(steps[each])
            cpu[each].append(time.process_time() - start)
            return wall

        return sample

    gc.collect()
    # The shortest of all turns: one step that is not counted, and one that is, so that ranks stay in step.
    wall = common.interleaved({each: clock(each) for each in steps}, rounds, 1e-12, seed)
    return {
        "wall": wall,
        "cpu": {each: times[1::2] for each, times in cpu.items()},
        "told": told,
        "ratios": {each.name: digest(optimizers[each.name]) for each in CONTESTANTS if each.wraps},
    }


def digest(optimizer: Any) -> str:
    """Return what tells the bits of one step's trust ratios from others."""
    ratios = torch.stack([ratio.cpu() for ratio in optimizer.trust_ratios().values()])
    return hashlib.sha256(ratios.numpy().tobytes()).hexdigest()


def measure(name: str, ranks: int, rounds: int, seed: int) -> dict[str, Any]:
    """Time all contestants on so many processes, and check what they told each other."""
    each_rank = on_ranks(ranks, time_contestants, list(SETS[name].shapes()), rounds, seed)
    layers = len(list(SETS[name].shapes()))
    check_told([found["told"] for found in each_rank], layers, ranks)
    if any(found["ratios"] != each_rank[0]["ratios"] for found in each_rank):
        raise Disagreement("ranks have other bits of trust ratios")
    wall = over_ranks(each_rank, "wall", max)
    cpu = over_ranks(each_rank, "cpu", statistics.fmean)
    bases = {each.name: each.base for each in CONTESTANTS}
    found: dict[str, Any] = {}
    for each in wall:
        found[each] = {**each_rank[0]["told"][each], "wall_ms": in_ms(wall[each]), "cpu_ms": in_ms(cpu[each])}
        base = bases.get(each)
        if base is not None:
            found[each]["wall_ratio"] = common.ratio(wall[each], wall[base])
            found[each]["cpu_ratio"] = common.ratio(cpu[each], cpu[base])
    return {"layers": layers, "contestants": found}


def time_host(layers: int, rounds: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Return microseconds of CPU time per layer, of layers with next to no elements: whole ones, and DTensors."""
    shapes: list[Shape] = [(8, 8)] * layers
    samples: dict[Any, Callable[[], float]] = {}
    for kind, params in (("whole", list(Net(shapes).parameters())), ("sharded", sharded(shapes))):
        for param in params:
            param.grad = torch.ones_like(param)
        for each in CONTESTANTS:
            samples[each.name, kind] = cpu_clock(each.build(params, HYPER).step)
    times = common.interleaved(samples, rounds, 1e-12, seed)
    found: dict[str, dict[str, list[float]]] = {}
    for (name, kind), seconds in times.items():
        found.setdefault(name, {})[kind] = [each / layers * 1e6 for each in seconds]
    return found


def cpu_clock(step: Step) -> Callable[[], float]:
    """Return what takes a step and returns its CPU time."""

    def sample() -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    step()  # allocates state
    return sample


def host(layers: int, rounds: int, seed: int) -> dict[str, Any]:
    """Return what a layer costs the host on a mesh of one rank: contestants, and what wrappers add to their bases."""
    (found,) = on_ranks(1, time_host, layers, rounds, seed)
    for each in CONTESTANTS:
        if each.base is not None:
            pairs = {kind: zip(found[each.name][kind], found[each.base][kind], strict=True) for kind in KINDS}
            found[added(each)] = {kind: [one - base for one, base in pair] for kind, pair in pairs.items()}
    return {
        "layers": layers,
        "us": {
            name: {kind: {**common.summary(rounds), "rounds": rounds} for kind, rounds in kinds.items()}
            for name, kinds in found.items()
        },
    }


def added(contestant: Contestant) -> str:
    """Return the name of what a wrapper adds."""
    return f"{contestant.name} − {contestant.base}"


def over_ranks(
    each_rank: list[dict[str, Any]], clock: str, combine: Callable[[tuple[float, ...]], float]
) -> dict[str, list[float]]:
    """Return one time a round of each contestant."""
    return {
        name: [combine(times) for times in zip(*(found[clock][name] for found in each_rank), strict=True)]
        for name in each_rank[0][clock]
    }


def in_ms(seconds: list[float]) -> dict[str, Any]:
    """Return milliseconds: median, quartiles and all rounds."""
    rounds = [each * 1e3 for each in seconds]
    return {**common.summary(rounds), "rounds": rounds}


def check_told(told: list[Mapping[str, Any]], layers: int, ranks: int) -> None:
    """Raise unless every rank told what was predicted."""
    of_lars, nothing = prediction(layers, ranks), {"collectives": 0, "bytes": 0}
    for rank, found in enumerate(told):
        for each in CONTESTANTS:
            expected = of_lars if each.wraps else nothing
            if found[each.name] != expected:
                raise Disagreement(f"{each.name} told {found[each.name]} on rank {rank}, and not {expected}")


def summary_table(report: Mapping[str, Any]) -> str:
    """Return milliseconds as a Markdown table."""
    rows = []
    for ranks, found in report["ranks"].items():
        for name, entry in found["contestants"].items():
            row = [str(ranks), name]
            for clock in ("wall", "cpu"):
                times = entry[f"{clock}_ms"]
                row.append(f"{times['median']:.2f} ({times['q1']:.2f}–{times['q3']:.2f})")
                row.append(f"{entry[f'{clock}_ratio']:.2f}" if f"{clock}_ratio" in entry else "")
            rows.append([*row, str(entry["collectives"]), f"{entry['bytes']:,}"])
    header = ["ranks", "ms a step: median (quartiles)", "wall, slowest rank", "/ base", "CPU, mean rank", "/ base"]
    return common.table([*header, "collectives", "bytes"], rows, left=2)


def host_table(found: Mapping[str, Any]) -> str:
    """Return microseconds per layer as a Markdown table."""
    rows = [
        [name, *(f"{kinds[kind]['median']:.2f} ({kinds[kind]['q1']:.2f}–{kinds[kind]['q3']:.2f})" for kind in KINDS)]
        for name, kinds in found["us"].items()
    ]
    return common.table(["host µs a layer: median (quartiles)", "whole layers", "DTensors"], rows)
