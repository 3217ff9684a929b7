"""One head of the training data: its pictures and cameras."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gafext import images
from gafext.cameras import Cameras, orbit

_BLACK = (0, 0, 0)


@dataclass
class Head:
    """One head at one moment, from V cameras.

    Attributes:
        name: its folder relative to the data folder, and the timestep where a folder has several.
        subject: whose head it is: heads of one subject are held out together.
        pictures: V files.
        sizes: V widths and heights for which the cameras are, or None where the file has none.
        masks: V files of the foreground, or None where a picture has none.
        normals: V files of camera-space normals n/2 + 1/2, or none at all.
        w2c: [V,4,4].
        intrinsics: [V,3,3] of pictures of side 1, after padding to squares.
        mesh: file of a mesh in the cameras' world, of which normal maps are rendered where there are none; or None.
    """

    name: str
    subject: str
    pictures: list[Path] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    masks: list[Path | None] = field(default_factory=list)
    normals: list[Path] = field(default_factory=list)
    w2c: list[Tensor] = field(default_factory=list)
    intrinsics: list[Tensor] = field(default_factory=list)
    mesh: Path | None = None

    @property
    def cameras(self) -> Cameras:
        return Cameras(torch.stack(self.w2c), intrinsics=torch.stack(self.intrinsics), size=1)

    def portraits(self, degrees: float) -> list[int]:
        """List the views within an angle of the front (+z), or the nearest one if there are none."""
        front = orbit(1).c2w[0, :3, 3]
        places = self.cameras.c2w[:, :3, 3]
        angles = torch.rad2deg(torch.cosine_similarity(places, front[None]).clamp(-1, 1).acos())
        near = (angles <= degrees).nonzero().flatten().tolist()
        return near or [int(angles.argmin())]

    def picture(self, view: int, background: images.Colour = images.WHITE) -> Image.Image:
        """Load a picture over a background, where a mask or its transparency says so, padded with it to a square."""
        picture, mask = images.load_image(self.pictures[view], background=background), self.mask(view)
        if mask is not None:
            picture = Image.composite(picture, Image.new("RGB", picture.size, background), mask)
        return _square(picture, background)

    def mask(self, view: int) -> Image.Image | None:
        """Load a mask as grey levels, 0 where it is transparent; None without one."""
        path = self.masks[view]
        return None if path is None else images.load_image(path, background=_BLACK).convert("L")

    def normal_map(self, view: int) -> Image.Image:
        """Load a normal map over the value of a background, padded with it to a square."""
        return _square(images.load_image(self.normals[view], background=images.GREY), images.GREY)

    def files(self) -> list[Path]:
        """List all files."""
        mesh = [] if self.mesh is None else [self.mesh]
        return [*self.pictures, *(mask for mask in self.masks if mask), *self.normals, *mesh]

    def describe(self) -> dict[str, Any]:
        """Return the head's line of `index.json`."""
        return {
            "name": self.name,
            "pictures": [str(path) for path in self.pictures],
            "masks": [None if path is None else str(path) for path in self.masks],
            "normals": [str(path) for path in self.normals],
            "w2c": torch.stack(self.w2c).tolist(),
            "intrinsics": torch.stack(self.intrinsics).tolist(),
            **({} if self.mesh is None else {"mesh": str(self.mesh)}),
        }


def _square(picture: Image.Image, colour: images.Colour) -> Image.Image:
    """Pad a picture on both sides to a square."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
