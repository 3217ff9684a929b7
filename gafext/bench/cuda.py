"""Measurements on a GPU: calls captured in a CUDA graph, ceilings of the GPU, names of the kernels that ran.

Launches are not measured. A graph contains a rotation over the sets of inputs and keeps all its results until the
rotation is over, so that cold calls neither read nor write what the L2 cache holds. Before a cold turn, a buffer of
twice the cache's size is read, because another contestant may just have read the same sets.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

MATRIX = 8192  # rows and columns of the matrix product that is the ceiling of arithmetic
_COPY_BYTES = 2 << 30
_ROUNDS = 7
_NO_KERNELS = ("Context Sync", "Activity Buffer Request")  # entries of a GPU profile that are not kernels
_PATIENCE = 10  # limit of a rotation's time, in turns


def graph_calls(call_seconds: float, turn_seconds: float, sets: int) -> int:
    """Return the number of calls in a graph: those of a turn, extended to a whole rotation unless that takes long."""
    calls = max(1, math.ceil(turn_seconds / call_seconds))
    return sets if calls < sets and sets * call_seconds <= _PATIENCE * turn_seconds else calls


def graph_replays(replay_seconds: float, turn_seconds: float, calls: int, sets: int) -> int:
    """Return the number of replays in a turn: 1 if a second replay would find the same sets in the cache."""
    return max(1, math.ceil(turn_seconds / replay_seconds)) if calls >= sets else 1


def event_seconds(run: Callable[[], None]) -> float:
    """Measure the GPU time in seconds between two events around what `run` enqueues."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


class GraphTurns:
    """A contestant's calls as a CUDA graph; `turn()` returns the seconds per call."""

    def __init__(self, run: Callable[..., Tensor], arguments: list[tuple], *, call_seconds: float, turn_seconds: float):
        sets = len(arguments)
        self.calls = graph_calls(call_seconds, turn_seconds, sets)
        self._graph = torch.cuda.CUDAGraph()
        # Kept for a whole rotation, so that each call writes to memory of its own.
        results = deque(maxlen=sets if sets > 1 else 0)
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self._graph):
                for call in range(self.calls):
                    results.append(run(*arguments[call % sets]))
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current
            raise
        self._graph.replay()  # the first replay uploads the graph
        self._flush = flush if sets > 1 else lambda: None
        self.replays = graph_replays(event_seconds(self._graph.replay), turn_seconds, self.calls, sets)

    def _replay(self) -> None:
        for _ in range(self.replays):
            self._graph.replay()

    def turn(self) -> float:
        self._flush()
        return event_seconds(self._replay) / (self.calls * self.replays)


def flush() -> None:
    """Evict the L2 cache by reading; writes would still be in flight to memory in the next turn."""
    _flush_buffer().sum()


@functools.cache
def _flush_buffer() -> Tensor:
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    return torch.ones(size // 4, device="cuda")


def ceilings() -> dict:
    """Measure the GPU's throughput for a copy and for matrix products of random values: medians of 7, warmed up."""
    found = {"copy_gbps": _copy_gbps()}
    for dtype in (torch.bfloat16, torch.float16):
        left, right, out = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype) for _ in range(3))
        seconds = _median_seconds(lambda left=left, right=right, out=out: torch.mm(left, right, out=out))
        found[f"{str(dtype).removeprefix('torch.')}_tflops"] = 1e-12 * 2 * MATRIX**3 / seconds
    return {name: round(value, 1) for name, value in found.items()}


def _copy_gbps() -> float:
    source = torch.randn(_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 1e-9 * 2 * source.nbytes / _median_seconds(lambda: target.copy_(source))


def _median_seconds(call: Callable[[], object], calls: int = 5) -> float:
    def several() -> None:
        for _ in range(calls):
            call()

    several()
    return statistics.median(event_seconds(several) / calls for _ in range(_ROUNDS))


def kernels_of(call: Callable[[], object]) -> list[str]:
    """List the names of the kernels and copies that a call runs on the GPU, the longest-running first."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return device_names(profile.key_averages())


def device_names(events: Iterable) -> list[str]:
    """List the names of the GPU's entries in a profile's averages, without those of the CUDA runtime."""
    cuda = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]  # exported, not in __all__
    kernels = [e for e in events if e.device_type == cuda and e.key not in _NO_KERNELS]
    return [e.key for e in sorted(kernels, key=lambda e: -e.self_device_time_total)]
