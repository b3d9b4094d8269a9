"""What a step has to tell other ranks, and how long that takes by the α–β model. Nothing is measured here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import ceil, log2
from typing import Any

from benchmarks import common
from benchmarks.scaling.models import MODELS, Model

RANKS = (8, 64, 512, 4096, 10_000)
FLOAT64, FLOAT32 = 8, 4
LARS_ACCESSES = 5  # of memory per element, above the base's: w and g for norms, both again, and g written


def _assumed(value: float, what: str) -> Any:
    return field(default=value, metadata={"help": what})


@dataclass(frozen=True)
class Machine:
    """What is assumed of a cluster of H100s. README says where each number is from."""

    node: int = _assumed(8, "ranks of a node")
    launch_us: float = _assumed(6.8, "µs, of a collective before its first hop")
    nvlink_us: float = _assumed(0.6, "µs, α of a hop within a node")
    network_us: float = _assumed(5.0, "µs, α of a hop between nodes")
    nvlink_small: float = _assumed(141.0, "GB/s, 1/β of a hop within a node, small messages")
    network_small: float = _assumed(19.0, "GB/s, 1/β of a hop between nodes, small messages")
    nvlink_large: float = _assumed(450.0, "GB/s and rank within a node, large messages")
    network_large: float = _assumed(50.0, "GB/s and rank between nodes, large messages")
    memory: float = _assumed(3350.0, "GB/s, of a GPU's memory")
    gather_bytes: int = _assumed(2, "of an element that FSDP gathers")
    scatter_bytes: int = _assumed(2, "of an element that FSDP reduces and scatters")

    def hop_us(self, size: float, within_node: bool) -> float:
        """Return α + β · size of one hop."""
        if within_node:
            return self.nvlink_us + size / self.nvlink_small / 1e3
        return self.network_us + size / self.network_small / 1e3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each assumption."""
    group = parser.add_argument_group("assumptions")
    for each in fields(Machine):
        kind = int if isinstance(each.default, int) else float
        name = f"--{each.name.replace('_', '-')}"
        text = f"{each.metadata['help']} (default: {each.default})"
        group.add_argument(name, type=common.positive(kind), default=each.default, metavar="X", help=text)


def machine(args: argparse.Namespace) -> Machine:
    """Return what the command line assumes."""
    return Machine(**{each.name: getattr(args, each.name) for each in fields(Machine)})


# What LARS and LAMB tell other ranks.


def vector_bytes(layers: int) -> int:
    """Return the bytes of the vector that is reduced: two squared norms a layer."""
    return 2 * layers * FLOAT64


def prediction(layers: int, ranks: int) -> dict[str, int]:
    """Return the collectives of one step under FSDP2, and the bytes that each rank puts in."""
    if ranks == 1:
        return {"collectives": 0, "bytes": 0}
    return {"collectives": 1, "bytes": vector_bytes(layers)}


# Microseconds of an all-reduce.


def ring_us(size: float, ranks: int, on: Machine) -> float:
    """Return those of a flat ring: 2 (N − 1) hops of an N-th, as slow as the slowest link."""
    return on.launch_us + 2 * (ranks - 1) * on.hop_us(size / ranks, ranks <= on.node)


def tree_us(size: float, ranks: int, on: Machine) -> float:
    """Return those of a flat binary tree: ⌈log₂ N⌉ hops up and as many down, of the whole."""
    return on.launch_us + 2 * ceil(log2(ranks)) * on.hop_us(size, ranks <= on.node)


def two_level_us(size: float, ranks: int, on: Machine) -> float:
    """Return those of a chain within each node and a binary tree of nodes, up and down. NCCL calls it Tree."""
    local, nodes = min(ranks, on.node), ceil(ranks / on.node)
    hops = (local - 1) * on.hop_us(size, True) + ceil(log2(nodes)) * on.hop_us(size, False)
    return on.launch_us + 2 * hops


# What there is to compare it with.


def fsdp_bytes(model: Model, on: Machine) -> int:
    """Return the bytes of FSDP2's collectives of a step, of all ranks' shards together.

    Blocks are gathered for the forward and for the backward pass, the root once, as is the default.
    """
    root, blocks = model.elements(slice(0, 1)), model.elements(slice(1, None))
    return on.gather_bytes * (root + 2 * blocks) + on.scatter_bytes * (root + blocks)


def fsdp_collectives(model: Model) -> int:
    """Return their number."""
    return 3 * len(model.units) - 1


def fsdp_bandwidth_us(model: Model, ranks: int, on: Machine) -> float:
    """Return microseconds in which the bytes of FSDP2's collectives pass: what enters a rank, and its node."""
    rate = on.nvlink_large if ranks <= on.node else min(on.nvlink_large, on.node * on.network_large)
    return fsdp_bytes(model, on) * (ranks - 1) / ranks / rate / 1e3


def fsdp_latency_us(model: Model, ranks: int, on: Machine) -> float:
    """Return microseconds of their first bytes: one way of the two levels each, though NCCL's rings have N - 1 hops."""
    return fsdp_collectives(model) * (on.launch_us + two_level_us(0, ranks, on)) / 2


def fsdp_us(model: Model, ranks: int, on: Machine) -> float:
    """Return microseconds of FSDP2's collectives, a lower bound."""
    return fsdp_bandwidth_us(model, ranks, on) + fsdp_latency_us(model, ranks, on)


def sweep_us(model: Model, ranks: int, on: Machine) -> float:
    """Return microseconds in which a rank sweeps its shard of float32, above what the base does: a lower bound."""
    return LARS_ACCESSES * FLOAT32 * model.elements() / ranks / on.memory / 1e3


def one_by_one_us(model: Model, ranks: int, on: Machine) -> float:
    """Return microseconds of a collective for each norm, one after the other."""
    return 2 * model.layers * two_level_us(FLOAT32, ranks, on)


def ratios_that_may_differ(layers: int, ranks: int) -> float:
    """Return how many ratios of a step may differ, at most and on average, between replicas that add in another order.

    Two sums of N numbers ≥ 0 in float64 are within 2 (N − 1) u of each other, u = 2⁻⁵³. Square roots halve that for
    each norm, two norms add up, and seven roundings on either side are at most 14 u more. Neighbours in float32 are
    more than 2⁻²⁴ apart, both relative to the ratio. So (N + 6) 2⁻²⁸ of ratios may be rounded to another one, if they
    lie evenly between neighbours.
    """
    return layers * (ranks + 6) * 2.0**-28


def simulate(on: Machine, ranks: Sequence[int] = RANKS) -> dict[str, Any]:
    """Return all figures."""
    return {"machine": asdict(on), "models": {name: figures(build(), on, ranks) for name, build in MODELS.items()}}


def figures(model: Model, on: Machine, ranks: Sequence[int]) -> dict[str, Any]:
    """Return those of one model."""
    size = vector_bytes(model.layers)
    return {
        "layers": model.layers,
        "elements": model.elements(),
        "vector_bytes": size,
        "rank_bytes": size + FLOAT32 * model.layers,  # all that a rank holds of it, with the ratios
        "one_by_one_collectives": 2 * model.layers,
        "fsdp_collectives": fsdp_collectives(model),
        "fsdp_bytes": fsdp_bytes(model, on),
        "ranks": {
            str(count): {
                "ring_us": ring_us(size, count, on),
                "tree_us": tree_us(size, count, on),
                "two_level_us": two_level_us(size, count, on),
                "one_by_one_us": one_by_one_us(model, count, on),
                "sweep_us": sweep_us(model, count, on),
                "fsdp_bandwidth_us": fsdp_bandwidth_us(model, count, on),
                "fsdp_latency_us": fsdp_latency_us(model, count, on),
                "fsdp_us": fsdp_us(model, count, on),
                "share_of_fsdp": two_level_us(size, count, on) / fsdp_us(model, count, on),
                "one_by_one_share_of_fsdp": one_by_one_us(model, count, on) / fsdp_us(model, count, on),
                "shard_gb": 3 * FLOAT32 * model.elements() / count / 1e9,  # float32: parameter, gradient, momentum
                "ratios_that_may_differ": ratios_that_may_differ(model.layers, count),
            }
            for count in ranks
        },
    }


def short(value: float) -> str:
    """Return three digits that count, or all of a whole number."""
    digits = 2 - int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(digits, 0)}f}"


def summary_table(found: Mapping[str, Any]) -> str:
    """Return it as a Markdown table."""
    rows = []
    for name, model in found["models"].items():
        for count, at in model["ranks"].items():
            times = [at[f"{each}_us"] for each in ("two_level", "tree", "ring", "sweep", "fsdp")]
            shares = [f"{short(100 * at[each])} %" for each in ("share_of_fsdp", "one_by_one_share_of_fsdp")]
            one_by_one = short(at["one_by_one_us"])
            rows.append([name, f"{int(count):,}", *map(short, times), shares[0], one_by_one, shares[1]])
    header = ["µs a step", "ranks", "all-reduce", "flat tree", "flat ring", "LARS sweep ≥", "FSDP2 ≥"]
    return common.table([*header, "all-reduce / FSDP2", "norms one by one", "one by one / FSDP2"], rows)


def models_table(found: Mapping[str, Any]) -> str:
    """Return what does not depend on the number of ranks."""
    rows = [
        [
            name,
            f"{model['layers']:,}",
            f"{model['elements']:,}",
            f"{model['vector_bytes']:,}",
            f"{model['rank_bytes']:,}",
            f"{model['one_by_one_collectives']:,}",
            f"{model['fsdp_collectives']:,}",
            short(model["fsdp_bytes"] / 1e9),
        ]
        for name, model in found["models"].items()
    ]
    header = ["model", "layers", "elements", "bytes all-reduced", "bytes a rank holds", "collectives one by one"]
    return common.table([*header, "FSDP2's collectives", "FSDP2's GB"], rows)
