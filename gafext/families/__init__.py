"""The families of checkpoints that gafext reads; each is one file of this folder, found by its presence there.

A file defines a subclass of `Family` and its instance `FAMILY`. Everything that sets the family apart is there; the
rest of gafext asks `family_of(unet.config)` and compares no names.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from gafext.config import UNetConfig
from gafext.families.base import Family

__all__ = ["Family", "families", "family_of", "family_of_file"]

_DEFAULT = "gaf"


@functools.cache
def families() -> dict[str, Family]:
    """Every family by its name."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def family_of(config: UNetConfig) -> Family:
    """The family of a U-Net: the one that its configuration names, else the one that owns such a configuration."""
    known = families()
    if config.family is not None:
        if config.family not in known:
            raise ValueError(f"family: expected one of {sorted(known)}, got {config.family!r}")
        return known[config.family]
    return next((family for family in known.values() if family.owns(config)), known[_DEFAULT])


def family_of_file(values: dict[str, Any]) -> Family:
    """The family whose code wrote this `unet/config.json`; GAF's reads what gafext saved."""
    written_by, known = values.get("_class_name"), families()
    return next((family for family in known.values() if written_by in family.unet_class_names), known[_DEFAULT])
