"""Families of checkpoints that gafext reads, one per file of this folder; a new file is found without registration.

A file defines a subclass of `Family` and its instance `FAMILY`, with everything that is specific to the family. The
rest of gafext calls `family_of(unet.config)` and never compares family names.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from gafext.config import UNetConfig
from gafext.families.base import Family

__all__ = ["Family", "families", "family_name", "family_of", "family_of_file"]

_DEFAULT = "gaf"


@functools.cache
def families() -> dict[str, Family]:
    """Return every family by its name."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def family_of(config: UNetConfig) -> Family:
    """Return the family of a U-Net: named by its configuration, or else the first that owns the configuration."""
    known = families()
    if config.family is not None:
        if config.family not in known:
            raise ValueError(f"family: expected one of {sorted(known)}, got {config.family!r}")
        return known[config.family]
    return next((family for family in known.values() if family.owns(config)), known[_DEFAULT])


def family_name(config: UNetConfig) -> str:
    """Return the name of a U-Net's family."""
    family = family_of(config)
    return next(name for name, known in families().items() if known is family)


def family_of_file(values: dict[str, Any]) -> Family:
    """Return the family of a `unet/config.json` by its `_class_name`; the default is GAF, which gafext itself saves."""
    written_by, known = values.get("_class_name"), families()
    return next((family for family in known.values() if written_by in family.unet_class_names), known[_DEFAULT])
