"""Versions for `gafext info` and for the record that every run leaves."""

from __future__ import annotations

import platform
from importlib import metadata


def version() -> str:
    """gafext's own version, from the installed package's metadata."""
    try:
        return metadata.version("gafext")
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """gafext, Python and the packages whose version can change a picture."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy", "Pillow", "safetensors")}
    return {"gafext": version(), "python": platform.python_version(), **packages}
