"""Entry point of `gafext` and `python -m gafext`."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line of this process and return its exit code."""
    try:
        signal.signal(signal.SIGTERM, _end)  # as an exception, so that no temporary folder is left
        if sys.argv[1:2] == ["doctor"]:  # which runs where the other commands cannot be imported
            from gafext.doctor.command import main
        else:
            from gafext.cli import main
            from gafext.watch.events import guard_streams

            guard_streams()
        return main(sys.argv[1:])
    except KeyboardInterrupt:  # while modules are imported; later the command says what is there
        print("gafext: interrupted", file=sys.stderr)
        return 130


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
