"""Entry point of `python -m gafext`, the same command line as `gafext`."""

from gafext.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
