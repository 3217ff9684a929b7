"""Entry point of `gafext` and `python -m gafext`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of this process and return its exit code."""
    if sys.argv[1:2] == ["doctor"]:  # which runs where the other commands cannot be imported
        from gafext.doctor.command import main
    else:
        from gafext.cli import main
    return main(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
