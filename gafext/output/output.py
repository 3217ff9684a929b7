"""The output folder: views, contact sheet, parameters and camera files, written completely or not at all."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gafext.atomic import whole_folder
from gafext.cameras import Cameras
from gafext.images import to_pil, to_square_tensor
from gafext.mesh import Mesh
from gafext.output.alpha import with_alpha
from gafext.output.formats import FORMATS, Scene, choose_formats
from gafext.output.points import surface_points
from gafext.weights import write_json

VIEW_FILES = re.compile(
    r"((images|masks)/)?view_\d{3,}\.png|contact_sheet\.png|run\.json|transforms(_train|_test|_val)?\.json|"
    r"opencv_cameras\.json|points3d\.ply|sparse/0/(cameras|images|points3D)\.txt|"
    r"canonical_flame_param\.npz|flame_param/[^/]+\.npz"
)
"""Paths of the files that gafext writes into an output folder and may replace."""

_TILE, _GAP = 256, 8  # pixels of the contact sheet


@dataclass(frozen=True)
class MultiViewOutput:
    """Views generated from one portrait.

    Attributes:
        images: V PIL images; or a [V,H,W,3] float32 array or [V,3,H,W] tensor in [0,1]; or scaled latents [V,4,h,w].
        cameras: V cameras.
        run: all parameters of the run, the seed and the versions.
        mesh: the mesh that the normal maps are of; None: the neutral head.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    cameras: Cameras
    run: dict[str, Any] = field(default_factory=dict)
    mesh: Mesh | None = None

    def save(
        self, folder: str | Path, *, overwrite: bool = False, formats: Iterable[str] | None = None, alpha: bool = False
    ) -> Path:
        """Write view_000.png ..., contact_sheet.png, run.json and camera files, all or none.

        Args:
            folder: folder to create; an existing one must be empty.
            overwrite: replace a folder that holds only an earlier result.
            formats: programs to write camera files for, of `gafext.output.FORMATS`; None: all that can describe the
                cameras.
            alpha: make the plain background of the views transparent, and write masks.

        Returns:
            The folder's absolute path.

        Raises:
            OutputError: the folder cannot be written, or holds other files.
            ValueError: the images are latents, or a format is unknown or cannot describe the cameras.
        """
        if self.run.get("output_type") == "latent":
            raise ValueError("save: expected pictures, got latents (output_type='latent')")
        pictures = self.images
        if isinstance(pictures, np.ndarray):
            pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        if isinstance(pictures, Tensor):
            pictures = to_pil(pictures)
        options = {"overwrite": overwrite, "formats": formats, "alpha": alpha, "mesh": self.mesh}
        return write_views(folder, pictures, self.cameras, self.run, **options)


def write_views(
    folder: str | os.PathLike,
    images: Sequence[Image.Image],
    cameras: Cameras,
    run: dict[str, Any],
    *,
    overwrite: bool = False,
    formats: Iterable[str] | None = None,
    alpha: bool = False,
    mesh: Mesh | None = None,
) -> Path:
    """Write view_000.png ..., contact_sheet.png, run.json and camera files, all or none.

    Args:
        folder: an empty folder or one that does not exist yet; its parents are created.
        images: V square images of one size.
        cameras: V cameras.
        run: parameters for run.json; values without a JSON type are written as strings, NaN and infinity as null.
        overwrite: replace a folder that holds only an earlier result.
        formats: as for `MultiViewOutput.save`.
        alpha: as for `MultiViewOutput.save`.
        mesh: surface of the points; None: the neutral head.

    Returns:
        The folder's absolute path.

    Raises:
        OutputError: the folder cannot be written; it is unchanged.
        ValueError: the images are not one per camera, square and of one size, or a format is unknown or cannot describe
            the cameras.
    """
    sizes = sorted({image.size for image in images})
    if len(images) != len(cameras):
        raise ValueError(f"images: expected {len(cameras)}, one per camera, got {len(images)}")
    if len(sizes) != 1 or sizes[0][0] != sizes[0][1]:
        raise ValueError(f"images: expected square images of one size, got {sizes}")
    chosen = choose_formats(formats, cameras)
    pixels = to_square_tensor(images, sizes[0][0])  # [V,3,S,S]
    pictures = [with_alpha(view) for view in pixels] if alpha else images
    names = [f"view_{view:03d}.png" for view in range(len(images))]
    with whole_folder(folder, replaceable=VIEW_FILES if overwrite else None) as new:
        masks = [f"masks/{name}" for name in names] if alpha else []
        for picture, name in zip(pictures, names, strict=True):
            picture.save(new / name)
            if alpha:
                (new / "masks").mkdir(exist_ok=True)
                picture.getchannel("A").save(new / "masks" / name)
        contact_sheet(images).save(new / "contact_sheet.png")
        write_json(new / "run.json", _json_clean(run))
        scene = Scene(names, cameras, sizes[0][0], surface_points(pixels, cameras, mesh), masks)
        for name in chosen:
            FORMATS[name](new, scene)
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
