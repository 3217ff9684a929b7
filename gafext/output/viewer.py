"""index.html of an output folder: the views, what they were made from, and the Gaussians fitted to them."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from gafext.assets import VIEWER
from gafext.atomic import replace_whole
from gafext.cameras import Cameras, read_transforms
from gafext.output.turn import angles, turn

_SCRIPTS = ("viewer/gsplat.min.js", "viewer/splat.js")
_GAUSSIAN = ("x", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_3")


def write_viewer(
    folder: str | os.PathLike, *, splat: str | os.PathLike | None = None, cameras: Cameras | None = None
) -> Path:
    """Write index.html into an output folder; a browser opens it as a file, without network.

    The page shows what the folder holds: view_*.png, normals/, portrait.png, run.json, and Gaussians.

    Args:
        folder: the folder of `write_views`.
        splat: .ply file of 3DGS with Gaussians to add, of which the page shows the colours without spherical harmonics
            of higher degree; None: those that were added before, if any.
        cameras: cameras of the views; None: those of the folder.

    Returns:
        The path of index.html.

    Raises:
        OutputError: the folder cannot be written.
        ValueError: the folder has no views, not as many as cameras, or `splat` holds no Gaussians.
    """
    folder = Path(folder)
    if cameras is None:
        cameras = read_transforms(folder)
    found = (path.name for path in folder.glob("view_*.png") if path.stem.removeprefix("view_").isdecimal())
    names = sorted(found, key=lambda name: (len(name), name))
    if not names or len(names) != len(cameras):
        raise ValueError(f"{folder}: expected {len(cameras)} views, one per camera, got {len(names)}")
    if splat is not None:
        content = _read_gaussians(Path(splat))
        with replace_whole(folder / "viewer") as new:
            (new / "gsplat.min.js").write_bytes((VIEWER / "gsplat.min.js").read_bytes())
            (new / "splat.js").write_text(f'const splatBase64 = "{base64.b64encode(content).decode()}";\n')
    data = _json(_describe(folder, names, cameras))
    with replace_whole(folder) as new:
        page = (VIEWER / "index.html").read_text(encoding="utf-8").replace("@DATA@", data)
        (new / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def _describe(folder: Path, names: list[str], cameras: Cameras) -> dict[str, Any]:
    """Collect what the page reads: the views in their order around the head, and the files that are there."""
    order, closed = turn(cameras)
    lenses, c2w, seen = cameras.intrinsics(1), cameras.c2w, angles(cameras)
    views = []
    for index in order:
        normals = f"normals/{names[index]}"
        (fx, _, cx), (_, fy, cy), _ = lenses[index].tolist()
        azimuth, elevation = map(round, seen[index])
        views.append(
            {
                "index": index,
                "picture": names[index],
                "normals": normals if (folder / normals).is_file() else None,
                "azimuth": azimuth,
                "elevation": elevation,
                "focal": [fx, fy],  # of a picture of side 1, as is the centre
                "centre": [cx, cy],
                "axes": c2w[index, :3, :3].T.tolist(),  # of the camera, OpenCV's
                "position": c2w[index, :3, 3].tolist(),
            }
        )
    with Image.open(folder / names[0]) as picture:
        size = picture.width
    run = folder / "run.json"
    return {
        "views": views,
        "start": order.index(0),
        "closed": closed,
        "size": size,
        "portrait": "portrait.png" if (folder / "portrait.png").is_file() else None,
        "scripts": _SCRIPTS if (folder / _SCRIPTS[-1]).is_file() else (),
        "run": json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {},
    }


def _json(value: Any) -> str:
    """Return JSON that may stand inside <script>: no text in it can end the element."""
    return json.dumps(value).replace("<", "\\u003c")


def _read_gaussians(path: Path) -> bytes:
    """Read a .ply file and check that it is binary and has the properties of 3DGS."""
    content = path.read_bytes()
    header = content[: content.find(b"end_header") + 1].decode("ascii", errors="replace")
    names = re.findall(r"^property float (\w+)", header, re.MULTILINE)
    if not header.startswith("ply\nformat binary_little_endian") or not set(_GAUSSIAN) <= set(names):
        raise ValueError(f"{path}: expected Gaussians of 3DGS as a binary .ply file, got something else")
    return content
