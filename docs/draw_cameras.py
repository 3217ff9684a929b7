"""Draw the conventions of cameras, from gafext's own cameras and neutral head.

python docs/draw_cameras.py docs/cameras.svg
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from gafext.cameras import Cameras, orbit
from gafext.output.points import surface_points

X, Y, Z = "#d62728", "#2ca02c", "#1f77b4"  # red, green, blue: as in every viewer
OBLIQUE = torch.tensor([[0.85, 0.0, 0.75], [-0.25, -0.9, 0.45]])  # of OpenCV's camera axes onto the paper


def arrow(axes: Axes, start, end, colour: str, label: str = "", *, gap: float = 0.13) -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    )
    direction = [b - a for a, b in zip(start, end, strict=True)]
    length = max(1e-6, sum(part**2 for part in direction) ** 0.5)
    place = [b + gap * part / length for b, part in zip(end, direction, strict=True)]
    axes.text(*place, label, color=colour, ha="center", va="center", fontsize=9)


def world(axes: Axes, cameras: Cameras, axis: tuple[int, int], names: list[str], title: str) -> None:
    """Draw a plane of the world: points of the head, cameras with what they see, and the world's axes."""
    points = surface_points(torch.zeros(8, 3, 16, 16), orbit(8, elevation=10), count=3000).positions[:, axis]
    axes.scatter(*points.T, s=1.5, color="#c9a58a", linewidths=0, rasterized=True)
    half = torch.tan(torch.deg2rad(torch.tensor(cameras.fov / 2)))
    for c2w, name in zip(cameras.c2w, names, strict=True):
        eye, right, forward = c2w[:3, 3], c2w[:3, 0 if axis == (0, 2) else 1], c2w[:3, 2]
        corners = [eye + 0.9 * (forward + sign * half * right) for sign in (-1, 1)]
        outline = torch.stack([eye, *corners, eye])[:, axis]
        axes.plot(*outline.T, color="black", lw=1)
        arrow(axes, eye[list(axis)].tolist(), (eye + 1.3 * forward)[list(axis)].tolist(), Z)
        axes.text(*(eye - 0.55 * forward)[list(axis)].tolist(), name, ha="center", va="center", fontsize=8)
    for index, (colour, letter) in enumerate(((X, "x"), (Y, "y"), (Z, "z"))):
        if index in axis:
            end = [1.6 if place == axis.index(index) else 0 for place in (0, 1)]
            arrow(axes, (0, 0), end, colour, letter)
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal")
    axes.margins(0.14)
    axes.axis("off")


def camera_axes(axes: Axes, flip: float, title: str) -> None:
    """Draw a camera that looks to the right and into the paper, and its axes; flip = -1 turns OpenCV's y and z."""

    def at(x: float, y: float, z: float) -> list[float]:
        return (OBLIQUE @ torch.tensor([x, y, z], dtype=torch.float32)).tolist()

    picture = [at(x, y, 1.2) for x, y in ((-0.6, -0.6), (0.6, -0.6), (0.6, 0.6), (-0.6, 0.6), (-0.6, -0.6))]
    axes.plot(*zip(*picture, strict=True), color="black", lw=1)
    for corner in picture[:4]:
        axes.plot(*zip(at(0, 0, 0), corner, strict=True), color="black", lw=0.7)
    axes.text(*at(0, -0.78, 1.2), "picture", fontsize=8, ha="center", rotation=-16)
    for end, colour, letter in (((1, 0, 0), X, "x"), ((0, flip, 0), Y, "y"), ((0, 0, flip), Z, "z")):
        arrow(axes, at(0, 0, 0), at(*end), colour, letter)
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal")
    axes.set(xlim=(-1.1, 1.8), ylim=(-1.2, 1.6))
    axes.axis("off")


def pixels(axes: Axes, size: int = 6) -> None:
    """Draw a picture of few pixels with its principal point."""
    for line in range(size + 1):
        axes.plot([0, size], [line, line], color="#999999", lw=0.7)
        axes.plot([line, line], [0, size], color="#999999", lw=0.7)
    for mark, place, label in (("o", (0.5, 0.5), "centre of pixel (0, 0):\n(0.5, 0.5)"), ("+", (3.4, 2.6), "(cx, cy)")):
        axes.plot(*place, mark, color="black", ms=3 if mark == "o" else 9, mew=1.5)
        line = {"arrowstyle": "-", "lw": 0.7}
        axes.annotate(label, place, (6.4, place[1] + 0.3), arrowprops=line, fontsize=8, va="center")
    arrow(axes, (0, 0), (2.6, 0), X, "u", gap=0.4)
    arrow(axes, (0, 0), (0, 2.6), Y, "v", gap=0.4)
    axes.text(3, 6.5, "u = fx x / z + cx\nv = fy y / z + cy   (OpenCV's x, y, z)", fontsize=8, ha="center", va="top")
    axes.set_title("a picture of 6 × 6 pixels", fontsize=9)
    axes.set_aspect("equal")
    axes.set(xlim=(-0.8, 9.5), ylim=(8.2, -0.8))
    axes.axis("off")


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "cameras"  # the same file in every run
    figure = plt.figure(figsize=(10, 7.4))
    top, bottom = figure.add_gridspec(2, 1, height_ratios=[1.5, 1], hspace=0.2)
    left, right = top.subgridspec(1, 2).subplots()
    names = [f"view {view}\n{azimuth}°" for view, azimuth in enumerate(range(0, 360, 45))]
    world(left, orbit(8), (0, 2), names, "from above: orbit(8), radius 4; the subject's left is +x")
    left.invert_yaxis()
    side = Cameras(torch.cat([orbit(1, elevation=e).w2c for e in (0, 30)]), 30)
    world(right, side, (2, 1), ["elevation\n0°", "elevation\n30°"], "from the subject's right: the face looks along +z")
    boxes = bottom.subgridspec(1, 3).subplots()
    camera_axes(boxes[0], 1, "OpenCV, COLMAP, FaceLift\nx right, y down, z forward")
    camera_axes(boxes[1], -1, "OpenGL, Blender, nerfstudio, 3DGS's JSON\nx right, y up, z backward")
    pixels(boxes[2])
    figure.savefig(sys.argv[1], bbox_inches="tight", dpi=150, metadata={"Date": None})


if __name__ == "__main__":
    main()
