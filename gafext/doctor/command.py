"""Implementation of the command `gafext doctor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from gafext.doctor.findings import examine
from gafext.doctor.text import screen, without_names

HELP = "print what this machine uses for every operation, why nothing faster, what is broken, and a bug report's facts"
EXIT_CODES = "exit codes: 0 a run works, 1 something is broken, 2 invalid command line"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--model", metavar="DIR", help="checkpoint to estimate the memory for; default: the built-in")
    parser.add_argument("--json", action="store_true", help="print JSON")


def doctor(args: argparse.Namespace) -> int:
    """Print the findings and return 0 if a run works, 1 if something is broken.

    Args:
        args: options of `gafext doctor`.
    """
    found = examine(args.model)
    print(without_names(json.dumps(found, indent=2) if args.json else screen(found)))
    return 0 if found["works"] else 1


def main(argv: Sequence[str]) -> int:
    """Run the command where `gafext.cli` may not be importable.

    Args:
        argv: ["doctor", ...], arguments without the program's name.
    """
    parser = argparse.ArgumentParser(prog="gafext doctor", description=HELP, epilog=EXIT_CODES)
    add_options(parser)
    args = parser.parse_args(argv[1:])
    try:
        code = doctor(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
