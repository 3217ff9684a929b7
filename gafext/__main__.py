"""`python -m gafext` is `gafext`."""

from gafext.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
