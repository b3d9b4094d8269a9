"""What is measured on a GPU besides wall time: its own time, launches, and what a copy achieves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType

from benchmarks.common import seconds

Step = Callable[[], object]


def wall_seconds(step: Step) -> float:
    """Return the wall time of one step, from an idle device to an idle device."""

    def until_done() -> None:
        step()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return seconds(until_done)


def gpu_seconds(launch: Step) -> float:
    """Return the time between two events around what is launched.

    The GPU sleeps first, or it would be waiting, between the two, for the host to launch.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)  # cycles: about half a millisecond
    start.record()
    launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capture(step: Step) -> Step:
    """Return the replay of one step as a CUDA graph, which has the GPU's time in it and none of the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # whatever is allocated or compiled once must not be part of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def kernels(step: Step) -> list[str]:
    """Return the names of the kernels that one step launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation  # torch marks every optimizer's step
        and not event.name.startswith(("Memcpy", "Memset"))
    ]


def copy_bandwidth(device: torch.device, gigabytes: int = 1, repeats: int = 20) -> float:
    """Return the bytes per second, read and written, of copying within the device."""
    source = torch.zeros(gigabytes * 10**9, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    destination.copy_(source)
    fastest = min(gpu_seconds(lambda: destination.copy_(source)) for _ in range(repeats))
    return 2 * source.numel() / fastest
