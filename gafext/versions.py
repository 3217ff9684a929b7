"""Versions for `gafext info` and for run.json."""

from __future__ import annotations

import platform
from importlib import metadata


def version() -> str:
    """Return gafext's version from the installed package's metadata, or "not installed"."""
    try:
        return metadata.version("gafext")
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions of gafext, Python and the packages that can change an image."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy", "Pillow", "safetensors")}
    return {"gafext": version(), "python": platform.python_version(), **packages}
