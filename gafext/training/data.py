"""Training data: heads seen by several cameras, in GaussianAvatars' folders (VHAP) or with one transforms.json each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gafext.cameras import read_transforms
from gafext.errors import CameraError
from gafext.training.checks import faults_of
from gafext.training.head import Head

_RIGID_TOLERANCE = 1e-4


def read_heads(root: str | Path) -> tuple[list[Head], list[str]]:
    """Read the heads below a folder, and list what is wrong with them.

    A folder with `transforms_*.json` or `transforms.json` is one head per `timestep_index`. Pictures have to be there,
    and of one size per head; the cameras of one `camera_index` have to agree over the timesteps, and those of a head on
    where the foreground is.

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
            own = faults_of(head)
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
            cameras = read_transforms(file, pad=True)
            values = json.loads(file.read_text(encoding="utf-8"))
        except CameraError as error:
            faults.append(str(error))
            continue
        for view, frame in enumerate(values["frames"]):
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
            own = {**values, **frame}
            head.sizes.append((own["w"], own["h"]) if "w" in own and "h" in own else None)
            mask = frame.get("fg_mask_path") or frame.get("mask_path")
            head.masks.append(None if mask is None else folder / mask)
            normal = folder / "normals" / picture.name
            head.normals += [normal] if normal.is_file() else []
            head.w2c.append(w2c)
            head.intrinsics.append(cameras.intrinsics(1)[view])
    return [heads[time] for time in sorted(heads)], faults


def _with_extension(path: Path) -> Path:
    return path if path.is_file() or path.suffix else path.with_name(path.name + ".png")
