"""Implementation of the command `gafext bench`."""

from __future__ import annotations

import argparse
import gc
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from gafext import _C
from gafext.bench import cuda
from gafext.bench.cases import Case, cases
from gafext.bench.environment import QUIET, cold_bytes, environment
from gafext.bench.measure import Race, race
from gafext.bench.report import heading, rows, summary, write_json

MIN_ROUNDS = 7
_QUICK_ROUNDS = 3
# Long enough to hide the clock's resolution and the change of contestants; on a GPU, the GPU's clock is read.
_TURN_SECONDS = {"cpu": 0.01, "cuda": 0.002}
_NAMING_SECONDS = 15  # for naming the kernels, in addition to the limit of the races


@dataclass
class Results:
    """Content of the JSON file, which is written after every race so that a later failure loses nothing."""

    environment: dict
    races: list[dict] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # reasons by shape
    left_out: list[str] = field(default_factory=list)  # shapes after the time limit

    def write(self, path: str | None) -> None:
        if path:
            write_json(path, self.environment, self.races, failed=self.failed, left_out=self.left_out)


def bench(args: argparse.Namespace) -> int:
    """Measure, print the table and write the JSON; in a process in which malloc's settings are unchanged.

    Args:
        args: options of `gafext bench`.

    Returns:
        0, or 1 if an operation failed or its result differed from PyTorch's.

    Raises:
        ValueError: options contradict each other, or select no case.
    """
    deadline = time.monotonic() + _limit(args.seconds)
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = Results({**environment(args.device), "dtype": args.dtype, "rounds": _rounds(args)})
    results.environment["command"] = shlex.join(["gafext", *_arguments(args)])
    if args.device == "cuda":
        gc.freeze()  # some versions of torch collect garbage before every capture
        results.environment["ceilings"] = cuda.ceilings()
        print(*(f"{name} {value:.0f}" for name, value in results.environment["ceilings"].items()), sep=", ", flush=True)
    for allocator in ("default", "keep") if args.allocator == "both" else (args.allocator,):
        if allocator == "keep":
            _C.keep_freed_memory()  # last, because it cannot be undone
        _measure(args, results, allocator, deadline=deadline)
    if args.device == "cuda":
        _name_kernels(args, results, deadline=deadline + _NAMING_SECONDS)
    results.write(args.json)
    for what, reason in results.failed.items():
        print(f"failed: {what}: {reason}", file=sys.stderr)
    if results.left_out:
        print(f"left out, as {args.seconds:.0f} s were up: {len(results.left_out)} shapes")
    return 1 if results.failed else 0


def _check(args: argparse.Namespace) -> None:
    if args.rounds < MIN_ROUNDS:
        raise ValueError(f"--rounds: expected at least {MIN_ROUNDS}, got {args.rounds}: a median of fewer says little")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: not usable here")
    if args.device == "cuda" and args.allocator != "default":
        raise ValueError(f"--allocator {args.allocator}: that is a setting of the CPU's allocator")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such folder")
    if args.allocator != "default" and platform.libc_ver()[0] != "glibc":
        raise ValueError(f"--allocator {args.allocator}: only glibc's malloc has that setting")
    if not any(_chosen(args)):
        wanted = f"--shape: no shape contains {' or '.join(args.shape)}" if args.shape else f"--op: none of {args.op}"
        raise ValueError(f"{wanted} on {args.device} in {args.dtype}")


def _limit(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _rounds(args: argparse.Namespace) -> int:
    return _QUICK_ROUNDS if args.quick else args.rounds


def _chosen(args: argparse.Namespace, *, compiled: bool = False) -> Iterator[Case]:
    return (
        case
        for case in cases(args.device, getattr(torch, args.dtype), compiled=compiled, suite=args.suite)
        if (not args.op or case.op in args.op) and (not args.shape or any(text in case.shape for text in args.shape))
    )


@torch.inference_mode()
def _measure(args: argparse.Namespace, results: Results, allocator: str, *, deadline: float) -> None:
    modes = {"warm": 0} | ({"cold": cold_bytes(args.device)} if args.cold else {})
    if args.device == "cuda":
        place = f"{results.environment['gpu']['name']}, {args.dtype}"
    else:
        place = "malloc keeps big blocks" if allocator == "keep" else "malloc as it is"
    printed, compiling = None, 0.0
    for case in _chosen(args, compiled=args.compile):
        name = f"{case.op} {case.shape}"
        if time.monotonic() > deadline:
            results.left_out.append(name)
            continue
        skipped = {}
        if compiling > _limit(args.compile_seconds):
            case, skipped = _without_compiled(case)
        if args.compile:
            torch.compiler.reset()  # otherwise the ninth shape of a function would not be compiled
        for mode, size in modes.items():
            try:
                measured = _least_disturbed(args, case, size)
            except RuntimeError as error:
                results.failed[name] = str(error).strip().partition("\n")[0]
                if isinstance(error, torch.AcceleratorError):  # this process cannot use the GPU any more
                    return
                break
            measured.skipped.update(skipped)
            compiling += sum(measured.first_seconds.get(c.name, 0.0) for c in case.contestants if c.compiled)
            results.races.append(summary(measured, mode=mode, allocator=allocator))
            results.write(args.json)
            title = heading(case.op, place=place)
            lines = rows(results.races[-1])
            print(*(lines if title == printed else [title, *lines]), sep="\n", flush=True)
            printed = title


def _without_compiled(case: Case) -> tuple[Case, dict[str, str]]:
    skipped = {c.name: "the time for compiling is up" for c in case.contestants if c.compiled}
    return replace(case, contestants=[c for c in case.contestants if not c.compiled]), skipped


def _least_disturbed(args: argparse.Namespace, case: Case, size: int) -> Race:
    """Repeat a race within `args.patience`; the choice depends on the load of other processes, never on the times."""
    deadline = time.monotonic() + args.patience
    best = None
    while best is None or (best.others is not None and best.others > QUIET and time.monotonic() < deadline):
        torch.manual_seed(0)
        turn_seconds = 0 if args.quick else _TURN_SECONDS[args.device]
        again = race(case, args.device, cold_bytes=size, rounds=_rounds(args), turn_seconds=turn_seconds)
        if best is not None:
            again.first_seconds = best.first_seconds  # a repeated race finds compiled what the first one compiled
        best = again if best is None else min(best, again, key=lambda race: race.others)
    return best


@torch.inference_mode()
def _name_kernels(args: argparse.Namespace, results: Results, *, deadline: float) -> None:
    """Add the names of the kernels that ran to the races, when all are over, so that no profiler disturbs a time."""
    measured = {(r["op"], r["shape"], row["name"]): [] for r in results.races for row in r["contestants"]}
    for case in _chosen(args):
        inputs = None
        for contestant in case.contestants:
            key = (case.op, case.shape, contestant.name)
            if key not in measured or time.monotonic() > deadline:
                continue
            try:
                inputs = inputs or case.inputs()
                arguments = contestant.prepare(*inputs) if contestant.prepare else inputs
                with contestant.context():
                    measured[key] = cuda.kernels_of(lambda run=contestant.run, given=arguments: run(*given))
            except RuntimeError as error:
                results.failed["names of the kernels"] = str(error).strip().partition("\n")[0]
                return
    for r in results.races:
        for row in r["contestants"]:
            row["kernels"] = measured[r["op"], r["shape"], row["name"]]


def _arguments(args: argparse.Namespace) -> list[str]:
    """Return the command-line arguments that parse to `args`."""
    arguments = ["bench"]
    for name, value in vars(args).items():
        option = name.replace("_", "-")
        if name == "command" or value is None:
            continue
        if isinstance(value, bool):
            arguments += [f"--{option}"] if value else [f"--no-{option}"] * (name == "compile")
        else:
            for item in value if isinstance(value, list) else [value]:
                arguments += [f"--{option}", str(item)]
    return arguments
