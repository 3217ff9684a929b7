"""MV-Adapter: a Stable Diffusion 2.1 whose views attend to each other by rows, and to the portrait's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.cameras import Cameras, orbit
from gafext.config import UNetConfig
from gafext.errors import CameraError
from gafext.families.base import Family

AZIMUTHS = (0.0, 45.0, 90.0, 180.0, 270.0, 315.0)
"""Degrees towards the subject's left, of the views that the published adapter was trained on."""


class MVAdapter(Family):
    """A stock U-Net with the layers of MV-Adapter's image-to-multi-view kind.

    The unconditional pass sees the cameras, features of zeros instead of the portrait's, and the negative prompt.

    Source: MV-Adapter (arXiv 2412.03632); github.com/huanngzh/MV-Adapter: scripts/inference_i2mv_sd.py.
    """

    background = (127, 127, 127)
    guidance_scale = 3.0
    prompts = ("high quality",)
    negative_prompt = "watermark, ugly, deformed, noisy, blurry, low contrast"
    doubles_latents = False
    attends_to_latents = True
    snr_shift = 8.0

    def owns(self, config: UNetConfig) -> bool:
        return config.has_mv_adapter

    def rays(self, config: UNetConfig, cameras: Cameras) -> Tensor:
        return orthographic_rays(cameras)

    def default_cameras(self) -> Cameras:
        views = [orbit(1, azimuth_start=azimuth) for azimuth in AZIMUTHS]
        return Cameras(torch.cat([view.w2c for view in views]), views[0].fov)


FAMILY = MVAdapter()


def orthographic_rays(cameras: Cameras) -> Tensor:
    """Encode cameras as (n + 1) / 2 of their viewing direction and the direction of their position, z up.

    The views are orthographic: neither distance nor field of view has an effect, and all rays of a view are parallel.

    Args:
        cameras: V cameras.

    Returns:
        [V,6,1,1] float32 in [0,1].

    Raises:
        CameraError: a camera is at the origin and has no direction.

    Source: github.com/huanngzh/MV-Adapter: mvadapter/utils/geometry.py, get_plucker_embeds_from_cameras_ortho.
    """
    if (cameras.c2w[:, :3, 3].norm(dim=1) < 1e-6).any():
        raise CameraError("cameras: expected none at the origin, got one")
    x, y, z = F.normalize(cameras.c2w[:, :3, 2:], dim=1).unbind(1)  # [V,2] each: direction, position
    rays = torch.stack([x, -z, y], dim=1)  # from y up to z up
    return ((rays.transpose(1, 2).flatten(1) + 1) / 2).clamp(0, 1)[:, :, None, None]
