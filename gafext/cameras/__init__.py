"""Cameras: poses and intrinsics, paths around the head, and the files of other programs.

World: y up, the face looks along +z. Matrices inside are world-to-camera with OpenCV axes (x right, y down, z forward).
"""

from gafext.cameras.cameras import DEFAULT_FOV, Cameras
from gafext.cameras.presets import (
    PRESETS,
    arc,
    as_cameras,
    facelift,
    imagedream,
    look_at_origin,
    on_sphere,
    orbit,
    spiral,
    turntable,
)
from gafext.cameras.readers import CONVENTIONS, read_transforms

__all__ = [
    "CONVENTIONS",
    "DEFAULT_FOV",
    "PRESETS",
    "Cameras",
    "arc",
    "as_cameras",
    "facelift",
    "imagedream",
    "look_at_origin",
    "on_sphere",
    "orbit",
    "read_transforms",
    "spiral",
    "turntable",
]
