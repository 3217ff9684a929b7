"""Write procedural heads as a GaussianAvatars folder each, the input of `gafext train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gafext import cameras, heads, images


def write_heads(root: Path, count: int, *, views: int, size: int, normals: bool = True, first: int = 0) -> None:
    """Write heads from an orbit of cameras: root/head_000/transforms_train.json, images/, fg_masks/ and normals/."""
    path = cameras.orbit(views)
    for index in range(count):
        folder = root / f"head_{index:03d}"
        made = heads.render(heads.make_heads([first + index]), path.w2c, size, fov=path.fov)
        frames = []
        for view in range(views):
            name = f"00000_{view:02d}.png"
            pictures = {"images": made.rgb, "fg_masks": made.alpha.expand_as(made.rgb)}
            for place, tensor in {**pictures, **({"normals": made.normals} if normals else {})}.items():
                (folder / place).mkdir(parents=True, exist_ok=True)
                images.to_pil(tensor[0, view : view + 1])[0].save(folder / place / name)
            frames.append(
                {
                    "timestep_index": 0,
                    "camera_index": view,
                    "file_path": f"images/{name}",
                    "fg_mask_path": f"fg_masks/{name}",
                    "transform_matrix": path.opengl_c2w[view].tolist(),
                }
            )
        values = {"camera_angle_x": path.camera_angle_x, "w": size, "h": size, "frames": frames}
        (folder / "transforms_train.json").write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--no-normals", action="store_true", help="leave the normal maps out")
    args = parser.parse_args()
    write_heads(args.out, args.heads, views=args.views, size=args.size, normals=not args.no_normals)
