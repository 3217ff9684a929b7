"""How it is measured: contestants and ceilings take turns, round by round, in one process.

A machine that changes its speed changes it for all of a round, so what is compared are times of the same round. Each
round has an order of its own: who always came after the copy would always find its bytes in the caches. Warm: every
call has the same inputs. Cold: the calls rotate over sets of inputs that together exceed the last-level cache. The
ceilings race along: a large matrix product, and a copy that moves as many bytes as the operation must, as warm or as
cold. On a GPU a turn is the replay of a CUDA graph between two events (cuda.py).
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gafext.bench import cuda
from gafext.bench.cases import Case, Contestant
from gafext.bench.environment import watch_others

# Largest difference to ours, relative to the largest value of the result.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CEILINGS = ("gemm", "copy")
_MAX_SETS = 256


@dataclass
class Race:
    case: Case
    bytes: int  # that must be moved: every input read once, the result written once
    gemm_flops: int
    times: dict[str, list[float]] = field(default_factory=dict)  # seconds a call by contestant, one a round
    skipped: dict[str, str] = field(default_factory=dict)  # the reason by contestant
    first_seconds: dict[str, float] = field(default_factory=dict)  # of the first call, that compiles
    others: float | None = None  # share of the cores that other processes held meanwhile


class Entrant:
    """A contestant with its inputs; `turn()` gives the seconds a call."""

    def __init__(self, contestant: Contestant, sets: list[tuple], prepared: dict[Callable, list[tuple]]):
        self.contestant = contestant
        if contestant.prepare is None:
            self.arguments = sets
        else:  # copies are shared by the contestants that want the same
            if contestant.prepare not in prepared:
                prepared[contestant.prepare] = [contestant.prepare(*inputs) for inputs in sets]
            self.arguments = prepared[contestant.prepare]
        self._arguments = itertools.cycle(self.arguments)
        self._calls = 1
        self._graph: cuda.GraphTurns | None = None

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
            for _ in range(3):  # the shortest: a contestant that starts in cold caches would get fewer calls a turn
                start = time.perf_counter()
                self.calls(1)
                synchronize()
                call_seconds = min(call_seconds, time.perf_counter() - start)
            if device == "cuda":
                seconds = {"call_seconds": call_seconds, "turn_seconds": turn_seconds}
                self._graph = cuda.GraphTurns(self.contestant.run, self.arguments, **seconds)
            else:
                self._calls = max(1, math.ceil(turn_seconds / call_seconds))

    def turn(self) -> float:
        if self._graph is not None:
            return self._graph.turn()
        with self.contestant.context():
            if len(self.arguments) == 1:
                self.calls(1)  # what the contestant before has put out of the cache comes back
            start = time.perf_counter()
            self.calls(self._calls)
            return (time.perf_counter() - start) / self._calls


def race(case: Case, device: str, *, cold_bytes: int, rounds: int, turn_seconds: float) -> Race:
    """The times of all contestants of a case, once they are seen to agree.

    Args:
        case: what to measure.
        device: "cpu" or "cuda".
        cold_bytes: size that the inputs of a contestant must have in all; 0 measures warm.
        rounds: turns of each contestant.
        turn_seconds: a turn repeats its call until about so long; 0 calls once.

    Returns:
        The times of the contestants and of the ceilings.

    Raises:
        RuntimeError: a contestant's result differs from ours.
    """
    sets = [case.inputs()]
    copies = min(math.ceil(cold_bytes / _bytes(sets[0])), _MAX_SETS)
    sets += [tuple(x.clone() for x in sets[0]) for _ in range(copies)]
    prepared: dict[Callable, list[tuple]] = {}
    ours, *others = (Entrant(contestant, sets, prepared) for contestant in case.contestants)
    expected = ours.result()
    gemm, gemm_flops = _gemm(device, expected.dtype)
    result = Race(case, bytes=_bytes(sets[0]) + expected.nbytes, gemm_flops=gemm_flops)
    for entrant in others:
        start = time.perf_counter()
        reason = _why_not(case, entrant, expected)
        result.first_seconds[entrant.contestant.name] = time.perf_counter() - start
        if reason:
            result.skipped[entrant.contestant.name] = reason
    ceilings = [Entrant(ceiling, sets, prepared) for ceiling in (gemm, _copy(device, result.bytes))]
    for entrant in (ours, *others, *ceilings):
        name = entrant.contestant.name
        if name not in result.skipped and (reason := _uncalibrated(entrant, turn_seconds, device)):
            result.skipped[name] = reason
    entrants = [entrant for entrant in (ours, *others, *ceilings) if entrant.contestant.name not in result.skipped]
    result.times = {entrant.contestant.name: [] for entrant in entrants}
    share_of_others = watch_others()
    shuffle = random.Random(0).sample
    for _ in range(rounds):
        for entrant in shuffle(entrants, len(entrants)):  # so that nobody always has the same one's caches and clock
            result.times[entrant.contestant.name].append(entrant.turn())
    result.others = share_of_others()
    return result


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratio within a round."""
    return quartiles([a / b for a, b in zip(over, under, strict=True)])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.nbytes for x in tensors)


def _why_not(case: Case, entrant: Entrant, expected: Tensor) -> str:
    """Why an optional contestant cannot run, or "". A contestant that runs must give our result."""
    name = entrant.contestant.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA's list of what each backend lacks
            result = entrant.result()
    except RuntimeError as error:
        return _reason(entrant, error)
    same_shape = result.shape == expected.shape
    difference = (result.double() - expected.double()).abs().max().item() if same_shape else math.inf
    allowed = TOLERANCE[expected.dtype] * max(1.0, expected.abs().max().item())
    if not difference <= allowed:  # true for NaN too
        first = case.contestants[0].name
        raise RuntimeError(f"{case.op} {case.shape}: {name} differs from {first} by {difference:.3g}")
    return ""


def _uncalibrated(entrant: Entrant, turn_seconds: float, device: str) -> str:
    """Why an optional contestant that runs cannot be timed, or "": not everything can be captured in a CUDA graph."""
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
    """Half of the bytes read, half written, to pages that are there already."""

    def prepare(*_: Tensor) -> tuple[Tensor, ...]:
        source = torch.rand(moved // 8, device=device)
        return source, source.clone()

    return Contestant("copy", lambda source, target: target.copy_(source), prepare=prepare)
