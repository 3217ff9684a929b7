"""Where the views are seen from, and in which order they go around the head."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from gafext.cameras import Cameras


class Turn(NamedTuple):
    """Order of V views around the head."""

    order: list[int]  # of the views, by azimuth
    closed: bool  # the last view is followed by the first


def angles(cameras: Cameras) -> list[tuple[float, float]]:
    """Compute azimuth in (-180,180] and elevation in [-90,90] of each camera's position, in degrees.

    As in `gafext.cameras.orbit`: azimuth 0 is in front of the face (+z), 90 at the subject's left (+x); y is up.
    """
    x, y, z = cameras.c2w[:, :3, 3].double().unbind(-1)
    degrees = torch.stack([torch.atan2(x, z), torch.atan2(y, torch.hypot(x, z))], dim=-1).rad2deg()
    return [(180.0 if azimuth <= -179.9995 else azimuth, elevation) for azimuth, elevation in degrees.tolist()]


def turn(cameras: Cameras) -> Turn:
    """Sort views by azimuth, from view 0 on or, if they do not go all around, from one end to the other.

    They go all around if no gap between neighbours is much larger than all others. Views that go around several times,
    as `gafext.cameras.spiral` does, keep their order, and are not closed.
    """
    azimuth = [round(azimuth, 3) % 360 for azimuth, _ in angles(cameras)]
    elevation = [elevation for _, elevation in angles(cameras)]
    steps = [(after - before) % 360 for before, after in itertools.pairwise(azimuth)]
    rises = [after - before for before, after in itertools.pairwise(elevation)]
    if sum(steps) > 360 and _all_equal(steps) and _all_equal(rises) and abs(rises[0]) > 0.01:
        return Turn(list(range(len(cameras))), closed=False)
    order = sorted(range(len(cameras)), key=lambda view: (azimuth[view], elevation[view]))
    gaps = [(azimuth[after] - azimuth[view]) % 360 for view, after in zip(order, order[1:] + order[:1], strict=True)]
    largest, second = sorted([0.0, *gaps], reverse=True)[:2]
    closed = largest <= 1.5 * second
    first = order.index(0) if closed else gaps.index(largest) + 1
    return Turn(order[first:] + order[:first], closed)


def _all_equal(degrees: list[float]) -> bool:
    return max(degrees) - min(degrees) < 0.01
