"""Training data: heads seen by several cameras, in GaussianAvatars' folders (VHAP) or with one transforms.json each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gafext import images
from gafext.cameras import Cameras, orbit, read_transforms
from gafext.errors import CameraError

_RIGID_TOLERANCE = 1e-4


@dataclass
class Head:
    """One head at one moment, from V cameras.

    Attributes:
        name: its folder relative to the data folder, and the timestep where a folder has several.
        pictures: V files.
        masks: V files of the foreground, or None where a picture has none.
        normals: V files of camera-space normals n/2 + 1/2, or none at all.
        w2c: [V,4,4].
        intrinsics: [V,3,3] of pictures of side 1.
    """

    name: str
    pictures: list[Path] = field(default_factory=list)
    masks: list[Path | None] = field(default_factory=list)
    normals: list[Path] = field(default_factory=list)
    w2c: list[Tensor] = field(default_factory=list)
    intrinsics: list[Tensor] = field(default_factory=list)

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

    def picture(self, view: int) -> Image.Image:
        """Load a picture over white, where a mask or its own transparency says so."""
        mask = self.masks[view]
        if mask is None:
            return images.load_image(self.pictures[view])
        picture = images.load_image(self.pictures[view])
        with Image.open(mask) as alpha:
            return Image.composite(picture, Image.new("RGB", picture.size, images.WHITE), alpha.convert("L"))

    def describe(self) -> dict[str, Any]:
        """Return the head's line of `index.json`."""
        return {
            "name": self.name,
            "pictures": [str(path) for path in self.pictures],
            "masks": [None if path is None else str(path) for path in self.masks],
            "normals": [str(path) for path in self.normals],
            "w2c": torch.stack(self.w2c).tolist(),
            "intrinsics": torch.stack(self.intrinsics).tolist(),
        }


def read_heads(root: str | Path) -> tuple[list[Head], list[str]]:
    """Read the heads below a folder, and list what is wrong with them.

    A folder with `transforms_*.json` or `transforms.json` is one head per `timestep_index`. Pictures have to be there,
    square and of one size per head; the cameras of one `camera_index` have to agree over the timesteps.

    Args:
        root: such a folder, or one that has them at any depth.

    Returns:
        Heads with nothing wrong in the order of their names, and one sentence per fault.

    Raises:
        ValueError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of training data, got none")
    heads, faults = [], []
    for folder in sorted({path.parent for path in root.rglob("transforms*.json")}):
        found, wrong = _read_folder(folder, root)
        faults += wrong
        for head in found:
            own = _faults(head)
            faults += own
            heads += [] if own else [head]
    if not heads and not faults:
        faults.append(f"{root}: expected transforms_*.json or transforms.json in it or below, got none")
    return heads, faults


def write_index(path: Path, heads: Sequence[Head]) -> None:
    """Write `index.json`: the files and cameras of each head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([head.describe() for head in heads], indent=1) + "\n", encoding="utf-8")


def _read_folder(folder: Path, root: Path) -> tuple[list[Head], list[str]]:
    # VHAP's splits hold different cameras and timesteps of one subject: all of them are read.
    files = sorted(folder.glob("transforms_*.json")) or [folder / "transforms.json"]
    heads: dict[Any, Head] = {}
    name = root.name if folder == root else folder.relative_to(root).as_posix()
    faults, seen, poses = [], set(), {}
    for file in files:
        try:
            cameras = read_transforms(file)
            frames = json.loads(file.read_text(encoding="utf-8"))["frames"]
        except CameraError as error:
            faults.append(str(error))
            continue
        for view, frame in enumerate(frames):
            path = frame.get("file_path")
            if path is None:
                faults.append(f"{file}: frame {view}: expected file_path, got none")
                continue
            if path in seen:
                continue
            seen.add(path)
            time, camera, w2c = frame.get("timestep_index", 0), frame.get("camera_index"), cameras.w2c[view]
            known = poses.setdefault(camera, w2c)
            if camera is not None and not torch.allclose(known, w2c, atol=_RIGID_TOLERANCE):
                faults.append(f"{file}: frame {view}: camera_index {camera} disagrees with its pose in another frame")
            head = heads.setdefault(time, Head(f"{name}/{time}" if "timestep_index" in frame else name))
            picture = _with_extension(folder / path)
            head.pictures.append(picture)
            mask = frame.get("fg_mask_path") or frame.get("mask_path")
            head.masks.append(None if mask is None else folder / mask)
            normal = folder / "normals" / picture.name
            head.normals += [normal] if normal.is_file() else []
            head.w2c.append(w2c)
            head.intrinsics.append(cameras.intrinsics(1)[view])
    return [heads[time] for time in sorted(heads)], faults


def _with_extension(path: Path) -> Path:
    return path if path.is_file() or path.suffix else path.with_name(path.name + ".png")


def _faults(head: Head) -> list[str]:
    """List what is wrong with the files of one head."""
    faults, sizes = [], set()
    for path in [*head.pictures, *(mask for mask in head.masks if mask is not None), *head.normals]:
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
        except OSError:
            faults.append(f"{path}: expected a picture, got {'a damaged one' if path.is_file() else 'no such file'}")
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        got = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        faults.append(f"{head.name}: expected square pictures, masks and normals of one size, got {got}")
    if head.normals and len(head.normals) != len(head.pictures):
        faults.append(f"{head.name}: expected {len(head.pictures)} normal maps or none, got {len(head.normals)}")
    if len(head.pictures) < 2:
        faults.append(f"{head.name}: expected at least 2 views, got {len(head.pictures)}")
    return faults
