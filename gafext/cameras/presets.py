"""Paths of cameras around the head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gafext.cameras.cameras import DEFAULT_FOV, Cameras
from gafext.cameras.checks import between, view_count


def orbit(
    num_views: int,
    elevation: float = 0.0,
    radius: float = 4.0,
    fov: float = DEFAULT_FOV,
    *,
    azimuth_start: float = 0.0,
    azimuth_span: float = 360.0,
) -> Cameras:
    """Create cameras on a circle around the head, all looking at the origin.

    azimuth_i = azimuth_start + i * azimuth_span / num_views. World: y up, the face looks along +z; azimuth 0
    is in front of the face and azimuth 90 at the subject's left (+x).

    Args:
        num_views: number of cameras, at least 1.
        elevation: degrees above the horizon, -90 < elevation < 90.
        radius: distance to the origin in world units, above 0.
        fov: horizontal field of view in degrees, 0 < fov < 180.
        azimuth_start: azimuth of view 0 in degrees.
        azimuth_span: degrees that the views divide evenly; 360 is a full circle.

    Raises:
        ValueError: an argument is out of range or NaN.
    """
    num_views = view_count(num_views)
    start = between("azimuth_start", azimuth_start, -math.inf, math.inf)
    span = between("azimuth_span", azimuth_span, -math.inf, math.inf)
    steps = torch.arange(num_views, dtype=torch.float64, device="cpu") / num_views
    return on_sphere(start + span * steps, elevation, radius, fov)


def on_sphere(azimuth: Tensor, elevation: Tensor | float, radius: float, fov: float) -> Cameras:
    """Create cameras on a sphere around the origin that look at it.

    Args:
        azimuth: [V] degrees; 0 is in front of the face, 90 at the subject's left (+x).
        elevation: degrees above the horizon, of all or [V], each -90 < elevation < 90.
        radius: distance to the origin in world units, above 0.
        fov: field of view in degrees, 0 < fov < 180.

    Raises:
        ValueError: an argument is out of range or NaN.
    """
    radius = between("radius", radius, 0, math.inf)
    azimuth = torch.deg2rad(azimuth.double())
    angles = elevation.expand(len(azimuth)).tolist() if isinstance(elevation, Tensor) else [elevation] * len(azimuth)
    angles = [between("elevation", angle, -90, 90) for angle in angles]
    elevation = torch.deg2rad(torch.tensor(angles, dtype=torch.float64, device=azimuth.device))
    horizontal = elevation.cos()
    positions = torch.stack([azimuth.sin() * horizontal, elevation.sin(), azimuth.cos() * horizontal], dim=-1)
    return Cameras(look_at_origin(radius * positions), fov)


def look_at_origin(positions: Tensor) -> Tensor:
    """Compute world-to-camera matrices [V,4,4] of upright cameras at `positions` [V,3] that look at the origin."""
    forward = torch.nn.functional.normalize(-positions, dim=-1)
    up = torch.tensor([0.0, 1.0, 0.0], dtype=positions.dtype, device=positions.device).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    w2c = torch.eye(4, dtype=positions.dtype, device=positions.device).repeat(len(positions), 1, 1)
    w2c[:, :3, :3] = torch.stack([right, down, forward], dim=1)
    w2c[:, :3, 3:] = -w2c[:, :3, :3] @ positions[:, :, None]
    return w2c


def turntable(num_views: int, elevation: float = 0.0, radius: float = 4.0, fov: float = DEFAULT_FOV) -> Cameras:
    """Create a full circle that begins in front of the face and ends beside its first camera, for a film in a loop."""
    return orbit(num_views, elevation, radius, fov)


def arc(
    num_views: int, span: float = 120.0, elevation: float = 0.0, radius: float = 4.0, fov: float = DEFAULT_FOV
) -> Cameras:
    """Create cameras on an arc in front of the face, from its right to its left, both ends included.

    azimuth_i = -span/2 + i * span / (num_views - 1); one camera alone is in front.

    Args:
        num_views: number of cameras, at least 1.
        span: degrees between the first and the last camera, 0 to 360.
        elevation: degrees above the horizon, -90 < elevation < 90.
        radius: distance to the origin in world units, above 0.
        fov: field of view in degrees, 0 < fov < 180.

    Raises:
        ValueError: an argument is out of range or NaN.
    """
    num_views = view_count(num_views)
    span = between("span", span, 0, 360)
    azimuth = torch.linspace(-span / 2, span / 2, num_views, dtype=torch.float64, device="cpu")
    return on_sphere(azimuth if num_views > 1 else torch.zeros(1, device="cpu"), elevation, radius, fov)


def spiral(
    num_views: int,
    turns: float = 2.0,
    elevation: float | tuple[float, float] = (-20.0, 40.0),
    radius: float = 4.0,
    fov: float = DEFAULT_FOV,
) -> Cameras:
    """Create cameras on a spiral around the head, rising evenly from the first elevation to the second.

    azimuth_i = i * 360 turns / num_views

    Args:
        num_views: number of cameras, at least 1.
        turns: turns around the head, above 0.
        elevation: degrees above the horizon of the first and the last camera, each between -90 and 90; or one of all.
        radius: distance to the origin in world units, above 0.
        fov: field of view in degrees, 0 < fov < 180.

    Raises:
        ValueError: an argument is out of range or NaN.
    """
    num_views = view_count(num_views)
    turns = between("turns", turns, 0, math.inf)
    ends = elevation if isinstance(elevation, Sequence) else (elevation, elevation)
    low, high = (between("elevation", value, -90, 90) for value in ends)
    azimuth = torch.arange(num_views, dtype=torch.float64, device="cpu") * (360 * turns / num_views)
    return on_sphere(azimuth, torch.linspace(low, high, num_views, dtype=torch.float64, device="cpu"), radius, fov)


def facelift() -> Cameras:
    """Create FaceLift's six cameras, in the order of its views: front, front right, right, back, left, front left.

    Distance 2.7, field of view 50 degrees, elevation 0.

    Source: github.com/weijielyu/FaceLift: inference.py, utils_folder/opencv_cameras.json, which counts azimuths towards
    the subject's right.
    """
    return on_sphere(torch.tensor([0.0, 315, 270, 180, 90, 45], dtype=torch.float64, device="cpu"), 0.0, 2.7, 50.0)


def imagedream() -> Cameras:
    """Create the four cameras of ImageDream's own script, a quarter of a turn apart at elevation 5.

    Its poses have distance 1 whatever it is here, and no field of view. Both are the middle of what its splat stage
    draws: field of view 45 to 50 degrees, distance 0.6 to 0.75 / tan(fov / 2) for an object that is 1 high, here 2.

    Source: github.com/bytedance/ImageDream: extern/ImageDream/scripts/demo.py, configs/imagedream-sd21-shading.yaml.
    """
    fov = 47.5
    return orbit(4, elevation=5.0, radius=2 * 0.675 / math.tan(math.radians(fov / 2)), fov=fov)


PRESETS: dict[str, tuple[Callable[..., Cameras], frozenset[str]]] = {
    "orbit": (orbit, frozenset({"num_views", "elevation", "radius", "fov"})),
    "turntable": (turntable, frozenset({"num_views", "elevation", "radius", "fov"})),
    "arc": (arc, frozenset({"num_views", "elevation", "radius", "fov"})),
    "spiral": (spiral, frozenset({"num_views", "radius", "fov"})),
    "facelift": (facelift, frozenset()),
    "imagedream": (imagedream, frozenset()),
}
"""Paths by the names that the command line gives them, each with the numbers that its options set."""


def as_cameras(
    cameras: Cameras | Tensor | np.ndarray | Sequence | None, *, num_views: int, fov: float = DEFAULT_FOV
) -> Cameras:
    """Convert any accepted form of cameras to `Cameras`.

    Args:
        cameras: Cameras; or [V,4,4] or [V,3,4] world-to-camera matrices with OpenCV axes as a tensor, array
            or nested list; or None for `orbit(num_views)`.
        num_views: number of cameras on the orbit; ignored when `cameras` is given.
        fov: horizontal field of view in degrees; ignored for `Cameras`, which have their own.

    Raises:
        CameraError: a matrix is not a rigid transform; the message names the view and the fault.
        ValueError: `num_views` or `fov` is out of range.
    """
    if cameras is None:
        return orbit(num_views, fov=fov)
    return cameras if isinstance(cameras, Cameras) else Cameras(cameras, fov)
