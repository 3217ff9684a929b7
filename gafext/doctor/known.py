"""Versions of other packages that are known to be broken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Known(NamedTuple):
    """Versions of a package, first ≤ version < before, with what is wrong with them."""

    package: str
    first: str
    before: str | None
    breaks: bool  # no run works; else only what the reason names
    reason: str


KNOWN = (
    Known(
        *("torch", "0", "2.11", True),
        "the extension uses the stable ABI of torch 2.11, which older versions lack: pip install -U torch",
    ),
    Known(
        *("torch", "2.11", "2.12", False),
        "its attention of no queries or no keys crashes on the CPU (division by zero); gafext's kernel serves those",
    ),
    Known(
        *("torch", "2.13", "2.14", False),
        "torch.compile makes wrong numbers of its attention of five dimensions on the CPU; gafext's has four",
    ),
    Known(
        *("torch", "2.14", "2.16", False),
        "its attention gives zeros, not NaN, for a query with NaN on the CPU; gafext's kernel gives NaN",
    ),
    Known("Pillow", "13", None, False, "gradio, and so `gafext demo`, needs Pillow < 13"),
)


def known_problems(versions: Mapping[str, str]) -> list[tuple[bool, str]]:
    """List what is known of installed versions.

    Args:
        versions: version of each package by its name; what is no version, such as "not installed", is passed over.

    Returns:
        For each entry of `KNOWN` that applies: whether no run works, and what is wrong, with the version.
    """
    return [
        (known.breaks, f"{known.package} {versions[known.package]}: {known.reason}")
        for known in KNOWN
        if (version := _numbers(versions.get(known.package, "")))
        and _numbers(known.first) <= version
        and (known.before is None or version < _numbers(known.before))
    ]


def _numbers(version: str) -> tuple[int, ...]:
    """Return (2, 13, 0) for "2.13.0+cpu"; what follows the numbers does not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
