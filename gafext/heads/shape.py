"""Shapes of procedural heads as numbers in [0,1), without their colours and light: what a portrait is fitted with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gafext.heads.identity import BEARDED, HAIRSTYLES, RANGES, Heads, build, pick, uniform_numbers

_COLOURS = ("skin", "skin_red", "hair_colour", "hair_light", "iris", "lip_red")
_WITHOUT_SHAPE = (
    *_COLOURS,
    "shirt_hue",
    "shirt_saturation",
    "shirt_value",
    "light_azimuth",
    "light_elevation",
    "ambient",
)
SHAPE = tuple(name for name in RANGES if name not in _WITHOUT_SHAPE)
"""Names of the numbers; "style" and "beard" choose one of several shapes, the others are shares of a range."""
MEASURES = tuple(name for name in SHAPE if name not in ("style", "beard"))
_COLUMNS = [tuple(RANGES).index(name) for name in SHAPE]


def shape_numbers(identities: Sequence[int] | Tensor) -> Tensor:
    """Compute the numbers of identities: [N] -> [N,len(SHAPE)] float64, in the order of SHAPE."""
    numbers = torch.as_tensor(identities, dtype=torch.int64, device="cpu")
    return uniform_numbers(numbers, len(RANGES))[:, _COLUMNS]


def shaped_heads(numbers: Tensor) -> Heads:
    """Build heads of given shapes, in the neutral head's colours and light.

    Args:
        numbers: [N,len(SHAPE)] in [0,1), in the order of SHAPE.

    Returns:
        N heads, on the CPU.
    """
    every = torch.full((len(numbers), len(RANGES)), 0.5, dtype=torch.float64)
    every[:, _COLUMNS] = numbers.double().cpu()
    return build(every)


def styles(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the hairstyle [N] and whether there is a beard [N] bool, of shapes [N,len(SHAPE)]."""
    style, beard = (numbers[:, SHAPE.index(name)].double() for name in ("style", "beard"))
    return pick(HAIRSTYLES, style), beard > 1 - BEARDED


def hairstyle_numbers() -> Tensor:
    """Return the number of "style" in the middle of each hairstyle's interval, float64, in the order of HAIRSTYLES."""
    shares = torch.tensor([share for _, share in HAIRSTYLES], dtype=torch.float64)
    return shares.cumsum(0) - shares / 2


def beard_numbers() -> Tensor:
    """Return the numbers of "beard" of heads without and with one, float64."""
    return torch.tensor([(1 - BEARDED) / 2, 1 - BEARDED / 2], dtype=torch.float64)
