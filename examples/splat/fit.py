"""Fit 3D Gaussians to the views of `gafext generate`, and measure them on views that the fit did not see.

    gafext generate --views 16 --steps 25 --out views
    python examples/splat/fit.py views head.ply [--steps 400] [--gaussians 2000] [--hold-out 4] [--swap]

It shows that views and cameras belong together: `--swap` gives each view its neighbour's camera, and the held-out views
get worse. For a fit worth keeping, use 3DGS or gsplat, which read the same folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from gaussians import TILE, Gaussians, read_points
from PIL import Image
from torch import Tensor

from gafext.cameras import Cameras, read_transforms
from gafext.images import load_image, to_square_tensor
from gafext.output import write_viewer


def read_views(folder: Path, size: int | None) -> tuple[Tensor, Cameras]:
    """Read the pictures [V,3,S,S] and cameras of an output folder; S is rounded down to whole tiles."""
    pictures = [load_image(path) for path in sorted(folder.glob("view_*.png"))]
    size = (size or pictures[0].width) // TILE * TILE
    return to_square_tensor(pictures, size), read_transforms(folder)


def psnr(left: Tensor, right: Tensor) -> float:
    return -10 * math.log10((left.clamp(0, 1) - right).square().mean().item())


def has_gsplat() -> bool:
    """gsplat is installed, and has a CUDA device to run on."""
    return torch.cuda.is_available() and importlib.util.find_spec("gsplat") is not None


def fit(views: Tensor, cameras: Cameras, points: tuple[Tensor, Tensor], *, steps: int, count: int, hold_out: int):
    """Fit Gaussians to all views but each `hold_out`-th, with gsplat where it runs.

    Returns:
        The Gaussians, and the PSNR in dB on the held-out views.
    """
    torch.manual_seed(0)
    positions, colours = points
    kept = torch.randperm(len(positions))[:count]
    spacing = math.sqrt(4 * math.pi * positions.norm(dim=1).mean().item() ** 2 / len(kept))
    device = "cuda" if has_gsplat() else "cpu"
    gaussians = Gaussians(positions[kept], colours[kept], scale=0.6 * spacing).to(device)
    render = gaussians.render_with_gsplat if has_gsplat() else gaussians.render
    size = views.shape[-1]
    views, w2c, lenses = (tensor.to(device) for tensor in (views, cameras.w2c, cameras.intrinsics(size)))
    rates = {"positions": 2e-3, "f_dc": 2e-2, "opacity": 5e-2, "scale": 1e-2, "rotation": 5e-3}
    optimizer = torch.optim.Adam([{"params": [getattr(gaussians, name)], "lr": rate} for name, rate in rates.items()])
    test = list(range(hold_out // 2, len(views), hold_out)) if hold_out else []
    train = [view for view in range(len(views)) if view not in test]
    for step in range(steps):
        view = train[torch.randint(len(train), ()).item()]
        picture = render(w2c[view], lenses[view], size)
        loss = F.l1_loss(picture, views[view]) + 0.01 * gaussians.scale.exp().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: L1 {loss.item():.4f}", flush=True)
    with torch.no_grad():
        scores = [psnr(render(w2c[v], lenses[v], size), views[v]) for v in test or train]
    return gaussians.cpu(), sum(scores) / len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("views", type=Path, help="output folder of gafext generate")
    parser.add_argument("ply", type=Path, help="file to write")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--gaussians", type=int, default=2000)
    parser.add_argument("--size", type=int, help="pixels; default: the pictures'")
    parser.add_argument("--hold-out", type=int, default=4, help="each which view is not fitted but measured; 0: none")
    parser.add_argument("--swap", action="store_true", help="give each view its neighbour's camera")
    parser.add_argument("--figure", type=Path, help="picture of all views above their renders")
    args = parser.parse_args()
    if args.hold_out < 0 or args.hold_out == 1:
        parser.error(f"--hold-out: expected 0, or 2 and more, got {args.hold_out}")
    for name, least in (("steps", 1), ("gaussians", 1), ("size", TILE)):
        if (number := getattr(args, name)) is not None and number < least:
            parser.error(f"--{name}: expected at least {least}, got {number}")
    for path in filter(None, (args.ply, args.figure)):
        if not path.absolute().parent.is_dir():
            parser.error(f"{path}: expected a file in a folder that exists")
    if not any(args.views.glob("view_*.png")):
        parser.error(f"{args.views}: expected an output folder of gafext generate, got none")
    views, cameras = read_views(args.views, args.size)
    if args.swap:  # by pairs: on a full circle, giving each view the next one's camera only turns the world
        order = torch.arange(len(cameras)) ^ 1
        cameras = cameras.with_poses(cameras.w2c[order.clamp(max=len(cameras) - 1)])
    points = read_points(args.views / "points3d.ply")
    options = {"steps": args.steps, "count": args.gaussians, "hold_out": args.hold_out}
    gaussians, score = fit(views, cameras, points, **options)
    is_held_out = args.hold_out and args.hold_out // 2 < len(views)
    print(f"PSNR of {'held-out' if is_held_out else 'all'} views: {score:.2f} dB")
    gaussians.save(args.ply)
    if not args.swap:
        write_viewer(args.views, splat=args.ply)
    if args.figure:
        lenses, size = cameras.intrinsics(views.shape[-1]), views.shape[-1]
        with torch.no_grad():
            renders = [gaussians.render(w2c, lens, size) for w2c, lens in zip(cameras.w2c, lenses, strict=True)]
        rows = torch.cat([torch.cat(list(row), dim=2) for row in (views, torch.stack(renders).clamp(0, 1))], dim=1)
        picture = Image.fromarray((rows.permute(1, 2, 0) * 255).round().byte().numpy())
        picture.quantize(128).save(args.figure, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main()
