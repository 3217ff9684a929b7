"""The output folder: views, a page to look at them, parameters and camera files, written completely or not at all."""

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

from gafext.atomic import Replaceable, whole_folder
from gafext.cameras import Cameras
from gafext.heads import Heads
from gafext.images import GREY, ImageLike, load_images, read_image, to_square_tensor
from gafext.mesh import Mesh
from gafext.output.alpha import with_alpha
from gafext.output.formats import FORMATS, Scene, choose_formats
from gafext.output.points import surface_points
from gafext.output.sheet import contact_sheet
from gafext.output.turntable import check_turntable, write_turntable
from gafext.output.viewer import write_viewer
from gafext.weights import write_json

_FILES = re.compile(
    r"((images|masks|normals)/)?view_\d{3,}\.png|(contact_sheet|portrait)\.png|turntable\.(webp|mp4)|run\.json|"
    r"transforms(_train|_test|_val)?\.json|opencv_cameras\.json|points3d\.ply|sparse/0/((cameras|images|points3D)\.txt|points3D\.ply)|"
    r"index\.html|viewer/(gsplat\.min|splat)\.js|"
    r"canonical_flame_param\.npz|flame_param/[^/]+\.npz"
)
VIEW_FILES = Replaceable(_FILES, always=("run.json", "contact_sheet.png"))
"""Output folders that gafext may replace: cameras and FLAME's parameters alone are another program's."""


@dataclass(frozen=True)
class MultiViewOutput:
    """Views generated from one portrait.

    Attributes:
        images: V PIL images; or a [V,H,W,3] float32 array or [V,3,H,W] tensor in [0,1]; or scaled latents [V,4,h,w].
        cameras: V cameras.
        run: all parameters of the run, the seed and the versions.
        surface: the mesh, or the head fitted to the portrait, that the normal maps are of; None: the neutral head.
        portrait: the portrait as the networks saw it, or None.
        normal_maps: V pictures of the normal maps, or None.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    cameras: Cameras
    run: dict[str, Any] = field(default_factory=dict)
    surface: Mesh | Heads | None = None
    portrait: Image.Image | None = None
    normal_maps: list[Image.Image] | None = None

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        formats: Iterable[str] | None = None,
        alpha: bool = False,
        turntable: str = "webp",
    ) -> Path:
        """Write view_000.png ..., index.html to look at them, run.json and camera files, all or none.

        Args:
            folder: folder to create; an existing one must be empty.
            overwrite: replace a folder that holds only an earlier result.
            formats: programs to write camera files for, of `gafext.output.FORMATS`; None: all that can describe the
                cameras.
            alpha: make the plain background of the views transparent, and write masks.
            turntable: kind of film of the views: "webp"; "mp4", which needs ffmpeg; or "none".

        Returns:
            The folder's absolute path.

        Raises:
            OutputError: the folder cannot be written, or holds other files.
            ImageError: numbers of the images are not in [0,1].
            ValueError: the images are latents, a format is unknown or cannot describe the cameras, or the film is of
                an unknown kind or has no encoder.
        """
        if self.run.get("output_type") == "latent":
            raise ValueError("save: expected pictures, got latents (output_type='latent')")
        pictures = self.images
        if isinstance(pictures, np.ndarray):
            pictures = torch.from_numpy(np.ascontiguousarray(pictures))
            pictures = pictures.permute(0, 3, 1, 2) if pictures.ndim == 4 else pictures
        if isinstance(pictures, Tensor):
            if not pictures.is_floating_point() or pictures.ndim != 4 or pictures.shape[1] != 3:
                got = f"{list(pictures.shape)} of {str(pictures.dtype).removeprefix('torch.')}"
                raise ValueError(f"save: expected images [V,3,H,W], as an array [V,H,W,3], in [0,1], got {got}")
            pictures = list(pictures)
        options = {"overwrite": overwrite, "formats": formats, "alpha": alpha, "turntable": turntable}
        options |= {"surface": self.surface, "portrait": self.portrait, "normal_maps": self.normal_maps}
        return write_views(folder, pictures, self.cameras, self.run, **options)


def write_views(
    folder: str | os.PathLike,
    images: Sequence[ImageLike],
    cameras: Cameras,
    run: dict[str, Any],
    *,
    overwrite: bool = False,
    formats: Iterable[str] | None = None,
    alpha: bool = False,
    turntable: str = "webp",
    surface: Mesh | Heads | None = None,
    portrait: ImageLike | None = None,
    normal_maps: Sequence[ImageLike] | None = None,
) -> Path:
    """Write view_000.png ..., index.html to look at them, run.json and camera files, all or none.

    Args:
        folder: an empty folder or one that does not exist yet; its parents are created.
        images: V square images of one size, in any form that `load_image` accepts; transparent ones over white.
        cameras: V cameras.
        run: parameters for run.json; values without a JSON type are written as strings, NaN and infinity as null.
        overwrite: replace a folder that holds only an earlier result.
        formats: as for `MultiViewOutput.save`.
        alpha, turntable: as for `MultiViewOutput.save`.
        surface: surface of the points; None: the neutral head.
        portrait: picture to show beside the views; portrait.png is at most as large as a view.
        normal_maps: V pictures to show beside the views, as normals/view_000.png ...

    Returns:
        The folder's absolute path.

    Raises:
        OutputError: the folder cannot be written; it is unchanged.
        ImageError: a picture is not accepted; the message says which.
        ValueError: the images are not one per camera, square and of one size, a format is unknown or cannot describe
            the cameras, or the film is of an unknown kind or has no encoder.
    """
    views = load_images(images, count=len(cameras), name="images")
    maps = (
        [] if normal_maps is None else load_images(normal_maps, count=len(cameras), name="normal_maps", background=GREY)
    )
    small = None if portrait is None else read_image(portrait, name="portrait")
    sizes = sorted({view.size for view in views})
    if len(sizes) != 1 or sizes[0][0] != sizes[0][1]:
        raise ValueError(f"images: expected square images of one size, got {sizes}")
    chosen = choose_formats(formats, cameras)
    check_turntable(turntable)
    pixels = to_square_tensor(views, sizes[0][0])  # [V,3,S,S]
    pictures = [with_alpha(view) for view in pixels] if alpha else views
    digits = max(3, len(str(len(views) - 1)))  # so that the order of the names is that of the views
    names = [f"view_{view:0{digits}d}.png" for view in range(len(views))]
    with whole_folder(folder, replaceable=VIEW_FILES if overwrite else None) as new:
        masks = [f"masks/{name}" for name in names] if alpha else []
        for picture, name in zip(pictures, names, strict=True):
            picture.save(new / name)
            if alpha:
                (new / "masks").mkdir(exist_ok=True)
                picture.getchannel("A").save(new / "masks" / name)
        contact_sheet(views, cameras).save(new / "contact_sheet.png")
        write_turntable(new, views, cameras, turntable)
        if small is not None:
            small.thumbnail(sizes[0])
            small.save(new / "portrait.png")
        for picture, name in zip(maps, names, strict=False):
            (new / "normals").mkdir(exist_ok=True)
            picture.save(new / "normals" / name)
        write_json(new / "run.json", json_clean(run))
        scene = Scene(names, cameras, sizes[0][0], surface_points(pixels, cameras, surface), masks)
        for name in (name for name in FORMATS if name in chosen):  # "3dgs" first: transforms.json names its files
            FORMATS[name](new, scene)
        write_viewer(new, cameras=cameras)
    return Path(os.path.realpath(folder))


def json_clean(value: Any) -> Any:
    """Return a value as run.json has it: what has no type of JSON as a string, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): json_clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_clean(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    has_list = hasattr(value, "tolist") and not isinstance(value, type)
    return json_clean(value.tolist()) if has_list else str(value)
