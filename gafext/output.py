"""Output folder: views, contact sheet, cameras and parameters, written completely or not at all."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gafext.atomic import whole_folder
from gafext.cameras import Cameras
from gafext.images import to_pil
from gafext.weights import write_json

VIEW_FILES = re.compile(r"view_\d{3,}\.png|contact_sheet\.png|transforms_train\.json|run\.json")
"""Names of the files that gafext writes into an output folder and may replace."""

_TILE, _GAP = 256, 8  # pixels of the contact sheet


@dataclass(frozen=True)
class MultiViewOutput:
    """Views generated from one portrait.

    Attributes:
        images: V PIL images; or a [V,H,W,3] float32 array or [V,3,H,W] tensor in [0,1]; or scaled latents [V,4,h,w].
        cameras: V cameras.
        run: all parameters of the run, the seed and the versions.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    cameras: Cameras
    run: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write view_000.png ..., contact_sheet.png, transforms_train.json and run.json, all or none.

        Args:
            folder: folder to create; an existing one must be empty.
            overwrite: replace a folder that holds only an earlier result.

        Returns:
            The folder's absolute path.

        Raises:
            OutputError: the folder cannot be written, or holds other files.
            ValueError: the images are latents.
        """
        if self.run.get("output_type") == "latent":
            raise ValueError("save: expected pictures, got latents (output_type='latent')")
        pictures = self.images
        if isinstance(pictures, np.ndarray):
            pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        if isinstance(pictures, Tensor):
            pictures = to_pil(pictures)
        return write_views(folder, pictures, self.cameras, self.run, overwrite=overwrite)


def write_views(
    folder: str | os.PathLike,
    images: Sequence[Image.Image],
    cameras: Cameras,
    run: dict[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write view_000.png ..., contact_sheet.png, transforms_train.json and run.json, all or none.

    Args:
        folder: an empty folder or one that does not exist yet; its parents are created.
        images: V square images of one size.
        cameras: V cameras.
        run: parameters for run.json; values without a JSON type are written as strings, NaN and infinity as null.
        overwrite: replace a folder that holds only an earlier result.

    Returns:
        The folder's absolute path.

    Raises:
        OutputError: the folder cannot be written; it is unchanged.
        ValueError: the images are not one per camera, square and of one size.
    """
    sizes = sorted({image.size for image in images})
    if len(images) != len(cameras):
        raise ValueError(f"images: expected {len(cameras)}, one per camera, got {len(images)}")
    if len(sizes) != 1 or sizes[0][0] != sizes[0][1]:
        raise ValueError(f"images: expected square images of one size, got {sizes}")
    with whole_folder(folder, replaceable=VIEW_FILES if overwrite else None) as new:
        for view, image in enumerate(images):
            image.save(new / f"view_{view:03d}.png")
        contact_sheet(images).save(new / "contact_sheet.png")
        write_json(new / "transforms_train.json", transforms(cameras, sizes[0][0]))
        write_json(new / "run.json", _json_clean(run))
    return Path(os.path.realpath(folder))


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Arrange images row by row on one nearly square sheet, each at most 256 pixels wide."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    tile = min(_TILE, images[0].width)
    step = tile + _GAP
    sheet = Image.new("RGB", (columns * step + _GAP, rows * step + _GAP), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        small = image.resize((tile, tile), Image.Resampling.LANCZOS)
        sheet.paste(small, (column * step + _GAP, row * step + _GAP))
    return sheet


def transforms(cameras: Cameras, size: int) -> dict[str, Any]:
    """Return the content of transforms_train.json for NeRF trainers and GaussianAvatars.

    Args:
        cameras: V cameras, written as OpenGL camera-to-world matrices.
        size: side of the images in pixels.
    """
    focal = cameras.focal(size)
    return {
        "camera_angle_x": cameras.camera_angle_x,
        "w": size,
        "h": size,
        "fl_x": focal,
        "fl_y": focal,
        "cx": size / 2,
        "cy": size / 2,
        "frames": [
            {
                "file_path": f"view_{view:03d}.png",
                "timestep_index": 0,
                "camera_index": view,
                "w": size,  # without a size per frame, GaussianAvatars opens every image file
                "h": size,
                "transform_matrix": matrix,
            }
            for view, matrix in enumerate(cameras.opengl_c2w.tolist())
        ],
    }


def _json_clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_clean(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _json_clean(value.tolist()) if hasattr(value, "tolist") else str(value)
