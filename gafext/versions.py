"""Versions for `gafext info` and for run.json."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
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


def oldest_architecture(architectures: Sequence[str]) -> int:
    """Return ten times the lowest compute capability of CMake's architectures ("90", "75-real"); 0 without a number."""
    return min((int(number) for name in architectures for number in re.findall(r"^\d+", name)), default=0)


def has_code_for(architectures: Sequence[str], capability: int) -> bool:
    """Return whether a GPU can run what was compiled for some architectures.

    Machine code runs on cards of the same major capability that are not older, PTX on all that are not older; words as
    "native" are believed.

    Args:
        architectures: CMake's, such as "75-real" (machine code), "90-virtual" (PTX), "120" (both), "90a", "native".
        capability: ten times the compute capability.
    """
    for name in architectures:
        found = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", name)
        if found is None:
            return True
        number, only, kind = int(found[1]), found[2], found[3]
        same = number // 10 == capability // 10 and kind != "-virtual"
        if number == capability or (not only and number < capability and (same or kind != "-real")):
            return True
    return False
