"""Measurement of a case: contestants and ceilings take turns, round by round, in one process.

Changes of the machine's speed affect a whole round, so only times of the same round are compared. The order is shuffled
in each round: a contestant that always followed the copy would find its bytes in the caches. Warm: every call has the
same inputs. Cold: the calls rotate over sets of inputs that together exceed the last-level cache, which is emptied
between contestants. The ceilings are a large matrix product, and a copy of as many bytes as the operation has to move,
equally warm or cold. On a GPU, a turn is the replay of a CUDA graph between two events (cuda.py).
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gafext.bench import cuda
from gafext.bench.cases import Case, Contestant
from gafext.bench.environment import cold_bytes as bytes_of_cold_calls
from gafext.bench.environment import watch_others
from gafext.ops.memory import release_freed_memory
from gafext.watch.peak import Peak, peak_memory

# Largest difference from gafext's result, relative to its largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CEILINGS = ("gemm", "copy")
_MAX_SETS = 256


@dataclass
class Race:
    """Times of all contestants of a case."""

    case: Case
    bytes: int  # minimum to be moved: every input read once, the result written once
    gemm_flops: int
    times: dict[str, list[float]] = field(default_factory=dict)  # by contestant: seconds per call, one per round
    skipped: dict[str, str] = field(default_factory=dict)  # reasons by contestant
    first_seconds: dict[str, float] = field(default_factory=dict)  # of the first call, which compiles
    others: float | None = None  # share of the cores that other processes used meanwhile
    peaks: dict[str, int | None] = field(default_factory=dict)  # bytes of a call beside the inputs


class Entrant:
    """A contestant with its inputs; `turn()` returns the seconds per call."""

    def __init__(self, contestant: Contestant, sets: list[tuple], prepared: dict[Callable, list[tuple]]):
        self.contestant = contestant
        if contestant.prepare is None:
            self.arguments = sets
        else:  # contestants with the same preparation share the copies
            if contestant.prepare not in prepared:
                prepared[contestant.prepare] = [contestant.prepare(*inputs) for inputs in sets]
            self.arguments = prepared[contestant.prepare]
        self._arguments = itertools.cycle(self.arguments)
        self._calls = 1
        self._graph: cuda.GraphTurns | None = None
        self._flush: Callable[[], object] = lambda: None

    def result(self) -> Tensor:
        with self.contestant.context():
            return self.contestant.run(*self.arguments[0])

    def calls(self, number: int) -> None:
        for arguments in itertools.islice(self._arguments, number):
            self.contestant.run(*arguments)

    def calibrate(self, turn_seconds: float, device: str) -> None:
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        with self.contestant.context():
            self.calls(2)
            synchronize()
            call_seconds = math.inf
            for _ in range(3):  # the shortest, so that cold caches at the start do not reduce the calls per turn
                start = time.perf_counter()
                self.calls(1)
                synchronize()
                call_seconds = min(call_seconds, time.perf_counter() - start)
            if device == "cuda":
                seconds = {"call_seconds": call_seconds, "turn_seconds": turn_seconds}
                self._graph = cuda.GraphTurns(self.contestant.run, self.arguments, **seconds)
            else:
                self._calls = max(1, math.ceil(turn_seconds / call_seconds))
                self._flush = flush if len(self.arguments) > 1 else lambda: None

    def turn(self) -> float:
        if self._graph is not None:
            return self._graph.turn()
        self._flush()  # another contestant may just have read the same sets
        with self.contestant.context():
            if len(self.arguments) == 1:
                self.calls(1)  # reload what the previous contestant has evicted from the caches
            start = time.perf_counter()
            self.calls(self._calls)
            return (time.perf_counter() - start) / self._calls


def flush() -> None:
    """Evict the CPU's caches by reading."""
    _flush_buffer().sum()


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.ones(bytes_of_cold_calls("cpu") // 4)


def race(case: Case, device: str, *, cold_bytes: int, rounds: int, turn_seconds: float) -> Race:
    """Time all contestants of a case, after checking that their results agree.

    Args:
        case: the case.
        device: "cpu" or "cuda".
        cold_bytes: minimum total size of a contestant's sets of inputs; 0 measures warm.
        rounds: number of turns of each contestant.
        turn_seconds: approximate duration of a turn, for which its call is repeated; 0 calls once.

    Returns:
        The times of the contestants and of the ceilings.

    Raises:
        RuntimeError: a contestant's result differs from gafext's.
    """
    sets = [case.inputs()]
    copies = min(math.ceil(cold_bytes / _bytes(sets[0])), _MAX_SETS)
    sets += [tuple(x.clone() for x in sets[0]) for _ in range(copies)]
    prepared: dict[Callable, list[tuple]] = {}
    ours, *others = (Entrant(contestant, sets, prepared) for contestant in case.contestants)
    with _peak(case, ours, device) as peak:
        expected = ours.result()
    gemm, gemm_flops = _gemm(device, expected.dtype)
    result = Race(case, bytes=_bytes(sets[0]) + expected.nbytes, gemm_flops=gemm_flops)
    peaks = {case.ours: peak.above}
    for entrant in others:
        start = time.perf_counter()
        reason = _cannot_run(case, entrant, expected, peaks)
        result.first_seconds[entrant.contestant.name] = time.perf_counter() - start
        if reason:
            result.skipped[entrant.contestant.name] = reason
    ceilings = [Entrant(ceiling, sets, prepared) for ceiling in (gemm, _copy(device, result.bytes))]
    for entrant in (ours, *others, *ceilings):
        name = entrant.contestant.name
        if name not in result.skipped and (reason := _cannot_be_timed(entrant, turn_seconds, device)):
            result.skipped[name] = reason
    result.peaks = peaks if case.memory else {}
    entrants = [entrant for entrant in (ours, *others, *ceilings) if entrant.contestant.name not in result.skipped]
    result.times = {entrant.contestant.name: [] for entrant in entrants}
    share_of_others = watch_others()
    shuffle = random.Random(0).sample
    for _ in range(rounds):
        for entrant in shuffle(entrants, len(entrants)):  # so that the predecessor in the caches varies
            result.times[entrant.contestant.name].append(entrant.turn())
    result.others = share_of_others()
    return result


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratios within a round."""
    return quartiles([a / b for a, b in zip(over, under, strict=True)])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.nbytes for x in tensors)


@contextmanager
def _peak(case: Case, entrant: Entrant, device: str) -> Iterator[Peak]:
    """Measure the peak memory of a call, if the case asks for it."""
    if not case.memory:
        yield Peak()
        return
    entrant.result()  # at their first call, libraries allocate what they keep
    release_freed_memory()
    with peak_memory(torch.device(device)) as peak:
        yield peak


def _cannot_run(case: Case, entrant: Entrant, expected: Tensor, peaks: dict[str, int | None]) -> str:
    """Return why an optional contestant cannot run, or ""; raise if its result differs from gafext's."""
    name = entrant.contestant.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA's list of what each backend lacks
            with _peak(case, entrant, expected.device.type) as peak:
                result = entrant.result()
            peaks[name] = peak.above
    except RuntimeError as error:
        return _reason(entrant, error)
    same_shape = result.shape == expected.shape
    difference = (result.double() - expected.double()).abs().max().item() if same_shape else math.inf
    allowed = (case.tolerance or TOLERANCE[expected.dtype]) * max(1.0, expected.abs().max().item())
    if not difference <= allowed:  # true for NaN too
        first = case.contestants[0].name
        raise RuntimeError(f"{case.op} {case.shape}: {name} differs from {first} by {difference:.3g}")
    return ""


def _cannot_be_timed(entrant: Entrant, turn_seconds: float, device: str) -> str:
    """Return why an optional contestant cannot be timed, or ""; some cannot be captured in a CUDA graph."""
    try:
        entrant.calibrate(turn_seconds, device)
    except RuntimeError as error:
        return _reason(entrant, error)
    return ""


def _reason(entrant: Entrant, error: RuntimeError) -> str:
    if not entrant.contestant.optional:
        raise error
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _gemm(device: str, dtype: torch.dtype) -> tuple[Contestant, int]:
    size = cuda.MATRIX if device == "cuda" else 1024
    matrices = tuple(torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))

    def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        return torch.mm(left, right, out=out)

    return Contestant("gemm", multiply, prepare=lambda *_: matrices), 2 * size**3


def _copy(device: str, moved: int) -> Contestant:
    """Copy half of the bytes to the other half, whose pages are already mapped."""

    def prepare(*_: Tensor) -> tuple[Tensor, ...]:
        source = torch.rand(moved // 8, device=device)
        return source, source.clone()

    return Contestant("copy", lambda source, target: target.copy_(source), prepare=prepare)
