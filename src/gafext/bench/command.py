"""The command behind `gafext bench`."""

from __future__ import annotations

import argparse
import platform
import shlex
import time
from pathlib import Path

import torch

from gafext import _C
from gafext.bench.cases import Case, cases
from gafext.bench.environment import QUIET, environment, last_level_cache
from gafext.bench.measure import Race, race
from gafext.bench.report import heading, rows, summary, write_json

MIN_ROUNDS = 7
_QUICK_ROUNDS = 3
_TURN_SECONDS = 0.01  # long enough that neither the clock nor the change of contestants shows


def bench(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the JSON; in a process whose malloc nobody has changed.

    Raises:
        ValueError: options that do not go together, or no case that they leave.
    """
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    races = []
    for allocator in ("default", "keep") if args.allocator == "both" else (args.allocator,):
        if allocator == "keep":
            _C.keep_freed_memory()  # last, as there is no way back
        races += _measured(args, allocator)
    if args.json:
        described = {**environment(args.device), "dtype": args.dtype, "rounds": _rounds(args)}
        described["command"] = shlex.join(["gafext", *_words(args)])
        write_json(args.json, described, races)
    return 0


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
    if not _chosen(args):
        raise ValueError(f"--shape: no shape contains {' or '.join(args.shape)}")


def _rounds(args: argparse.Namespace) -> int:
    return _QUICK_ROUNDS if args.quick else args.rounds


def _chosen(args: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in cases(args.device, getattr(torch, args.dtype), compiled=args.compile)
        if (not args.op or case.op in args.op) and (not args.shape or any(text in case.shape for text in args.shape))
    ]


@torch.inference_mode()
def _measured(args: argparse.Namespace, allocator: str) -> list[dict]:
    races, printed = [], None
    # By a quarter larger than the cache, so that no replacement policy keeps a part of it.
    modes = {"warm": 0} | ({"cold": last_level_cache(args.device) * 5 // 4} if args.cold else {})
    for mode, cold_bytes in modes.items():
        for case in _chosen(args):
            if args.compile:
                torch.compiler.reset()  # or the ninth shape of a form would not be compiled any more
            races.append(summary(_least_disturbed(args, case, cold_bytes), mode=mode, allocator=allocator))
            title = heading(case.op, mode=mode, allocator=allocator)
            lines = rows(races[-1])
            print(*(lines if title == printed else [title, *lines]), sep="\n", flush=True)
            printed = title
    return races


def _least_disturbed(args: argparse.Namespace, case: Case, cold_bytes: int) -> Race:
    """Chosen by what other processes held meanwhile, never by a time measured."""
    deadline = time.monotonic() + args.patience
    best = None
    while best is None or (best.others is not None and best.others > QUIET and time.monotonic() < deadline):
        torch.manual_seed(0)
        turn_seconds = 0 if args.quick else _TURN_SECONDS
        again = race(case, args.device, cold_bytes=cold_bytes, rounds=_rounds(args), turn_seconds=turn_seconds)
        best = again if best is None else min(best, again, key=lambda race: race.others)
    return best


def _words(args: argparse.Namespace) -> list[str]:
    """The command line that gives these arguments."""
    words = ["bench"]
    for name, value in vars(args).items():
        if name == "command" or value is None:
            continue
        if isinstance(value, bool):
            words += [f"--{name}"] if value else [f"--no-{name}"] * (name == "compile")
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [f"--{name}", str(item)]
    return words
