"""Draw how the kernels work, with the numbers of csrc/: the pictures of docs/inside.

python docs/draw_kernels.py docs/inside
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

CSRC = Path(__file__).resolve().parents[1] / "csrc"
BLUE, ORANGE, GREEN, GREY = "#4c78a8", "#f58518", "#54a24b", "#d9d9d9"


def constant(file: str, name: str) -> float:
    """Read `constexpr ... NAME = NUMBER` of a source file."""
    found = re.search(rf"\b{name} = ([\d.]+)f?\b", (CSRC / file).read_text())
    if found is None:
        raise ValueError(f"{file}: expected a number called {name}, got none")
    return float(found[1])


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str = "none", text: str = "", **style):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, **{"edgecolor": "black", "lw": 0.8} | style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


def plain(axes: Axes, title: str, width: tuple[float, float], height: tuple[float, float]) -> None:
    axes.set(xlim=width, ylim=height)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def loops(axes: Axes, keys: int, rows: int) -> None:
    """The score matrix of a head, cut into blocks of queries and tiles of keys."""
    for block in range(3):
        for tile in range(4):
            current = block == 1
            colour = (BLUE if tile < 2 else ORANGE if tile == 2 else "none") if current else "none"
            box(axes, 2.2 * tile, -1.5 * block, 2.2, 1.5, colour, f"tile {tile}" if current else "", alpha=0.75)
    box(axes, 4.4, -0.55, 2.2, 0.3, GREEN, "a group of rows")
    box(axes, 0, 1.8, 8.8, 0.45, GREY, f"keys and values, up to {keys} a tile: packed once per block")
    box(axes, -1.9, -3, 1.6, 4.5, GREY, f"queries,\nup to {rows}\na block:\none unit\nof work")
    axes.text(4.4, -3.4, "blue: done, folded into m, l and O; orange: now; white: later, or another thread's",
              ha="center", fontsize=8)  # fmt: skip
    plain(axes, "The tile loop: the scores of one head exist a group and a tile at a time", (-2, 9), (-3.7, 2.5))


def online_softmax(axes: Axes, tiles: int = 4, width: int = 8) -> None:
    """One row over four tiles: the scores, and what the row keeps of those that it has seen."""
    scores = np.random.default_rng(3).normal(0, 1.5, (tiles, width)) + np.array([0.0, 1.5, -1.0, 2.5])[:, None]
    values = np.random.default_rng(4).normal(size=(tiles, width))
    highest, total, out, text = -np.inf, 0.0, 0.0, []
    for tile in range(tiles):
        new = max(highest, scores[tile].max())
        alpha = 0.0 if tile == 0 else 2.0 ** (highest - new)
        weights = 2.0 ** (scores[tile] - new)
        highest, total, out = new, alpha * total + weights.sum(), alpha * out + weights @ values[tile]
        text.append(f"m = {highest:.2f}\nα = {alpha:.2f}\nl = {total:.2f}")
    whole = 2.0 ** (scores - scores.max())
    assert np.isclose(out / total, (whole * values).sum() / whole.sum())
    axes.bar(np.arange(tiles * width), scores.ravel(), color=BLUE, width=0.8)
    maxima = np.maximum.accumulate(scores.ravel())
    axes.step(np.arange(tiles * width), maxima, where="mid", color=ORANGE)
    for tile, label in enumerate(text):
        axes.axvline(tile * width - 0.5, color="black", lw=0.6)
        axes.text((tile + 0.5) * width - 0.5, 6.4, label, ha="center", va="bottom", fontsize=8)
    axes.set(ylim=(-5, 10), xlim=(-0.5, tiles * width - 0.5), xticks=[], ylabel="score · scale · log2(e)")
    axes.set_title(
        "One row: m is the highest score so far (orange), l and O are rescaled by α = 2^(m - m')", fontsize=9
    )


def flash_attention() -> Figure:
    figure, axes = plt.subplots(2, 1, figsize=(8.5, 7.5), height_ratios=[1.1, 1])
    keys, rows = (int(constant(*where)) for where in (("cpu/flash_tiles.h", "kMaxTileKeys"),
                                                      ("cpu/flash_attention.cpp", "kMaxRows")))  # fmt: skip
    loops(axes[0], keys, rows)
    online_softmax(axes[1])
    return figure


def hopper() -> Figure:
    """Two consumers in turn: while one computes its softmax, the tensor cores have the other's products."""
    figure, axes = plt.subplots(figsize=(8.5, 3))
    consumers = 2
    names = {"scores": BLUE, "values": GREEN, "softmax": ORANGE}
    for tile in range(4):
        for consumer in range(consumers):
            start = 4 * tile + 2 * consumer
            row = -1.2 * consumer
            for kind, (begin, length) in {"scores": (0, 1), "values": (1, 1), "softmax": (1, 2.5)}.items():
                if kind == "values" and tile == 0:
                    continue
                number = tile - 1 if kind == "values" else tile
                letter = {"scores": "S", "values": "PV", "softmax": "softmax"}[kind]
                offset = 0.5 if kind == "softmax" else 0
                box(axes, start + begin, row - offset, length, 0.45, names[kind], f"{letter} {number}", alpha=0.8)
    for copy in range(4):
        box(axes, 4 * copy - 1.5, 0.9, 3.6, 0.35, GREY, f"K {copy}" + (f", V {copy - 1}" if copy else ""))
    for y, name in ((1.07, "producer"), (0.0, "consumer 0"), (-1.2, "consumer 1")):
        axes.text(-1.7, y, name, ha="right", va="center", fontsize=9)
    plain(axes, "Time to the right, lengths not measured: products (above) and softmax (below) alternate",
          (-4, 18.5), (-2, 1.5))  # fmt: skip
    return figure


def cross_view() -> Figure:
    """Where the rows of one position and head lie in memory, and the tile of their scores."""
    views, positions, heads = 4, 5, 3
    figure, (memory, tile) = plt.subplots(1, 2, figsize=(9.5, 3.6), width_ratios=[2.2, 1])
    at = 2 * heads + 1
    for view in range(views):
        for cell in range(positions * heads):
            box(memory, cell, -view, 1, 0.7, (BLUE if cell == at else GREY if cell // heads == 2 else "white"))
        memory.text(-0.3, -view + 0.35, f"view {view}", ha="right", va="center", fontsize=8)
    for position in range(positions):
        memory.text(heads * (position + 0.5), 1.0, f"position {position}", ha="center", fontsize=8)
        memory.plot([heads * position] * 2, [0.9, -views + 0.9], color="black", lw=2)
    memory.annotate("", (at + 0.5, -views + 1.1), (at + 0.5, 0.4), arrowprops={"arrowstyle": "-|>", "color": ORANGE})
    memory.text(at + 0.5, -views + 0.35, "V rows, a view apart: read in place", ha="center", fontsize=8, color=ORANGE)
    plain(
        memory, "Memory of q, k, v and out: (view, position, head, D); a cell is D numbers", (-2.2, 15.2), (-3.9, 1.5)
    )
    quad = int(constant("cpu/cross_view_tiles.h", "kQuad"))
    for query in range(views):
        for key in range(quad):
            box(tile, key, -query, 1, 1, BLUE if query == 1 else "white", f"{quad * query + key}", alpha=0.8)
        tile.text(-0.2, -query + 0.5, f"q{query}", ha="right", va="center", fontsize=8)
        tile.text(query + 0.5, 1.2, f"k{query}", ha="center", fontsize=8)
    plain(tile, "V × V scores in one vector: lane 4 i + j", (-1, 4.5), (-3.3, 1.6))
    return figure


def winograd_matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bᵀ, G and Aᵀ of csrc/cpu/conv3x3_winograd.h, as its transforms have them."""
    a, b = (constant("cpu/conv3x3_winograd.h", name) for name in ("kA", "kB"))
    points = np.array([0, a, -a, b, -b])
    output = np.vstack([np.append(points**power, power == 3) for power in range(4)])
    weight = np.vstack([points**power for power in range(3)]).T
    others = [np.prod([p - q for q in points if q != p]) for p in points]
    weight = np.vstack([weight / np.array(others)[:, None], [0, 0, 1]])
    inputs = np.zeros((6, 6))
    for row, point in enumerate(points):  # the polynomial that is 0 at all other points
        inputs[row, :5] = np.poly([p for p in points if p != point])[::-1]
    inputs[5] = np.poly(points)[::-1]
    data, taps = np.random.default_rng(0).normal(size=6), np.random.default_rng(1).normal(size=3)
    expected = np.correlate(data, taps, "valid")
    assert np.allclose(output @ ((weight @ taps) * (inputs @ data)), expected)
    return inputs, weight, output


def winograd() -> Figure:
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.6), width_ratios=[1.5, 1.5, 0.8, 1.5])
    image = axes[0]
    size, out, width = (
        12,
        int(constant("cpu/conv3x3_winograd.h", "kOut")),
        int(constant("cpu/conv3x3_winograd.h", "kIn")),
    )
    for line in range(size + 1):
        image.plot([0, size], [line, line], color=GREY, lw=0.6)
        image.plot([line, line], [0, size], color=GREY, lw=0.6)
    for tile in range(0, size, out):
        for other in range(0, size, out):
            box(image, tile, other, out, out)
    box(image, out - 1, out - 1, width, width, BLUE, alpha=0.35)
    box(image, 2 * out - 1, out - 1, width, width, ORANGE, alpha=0.35)
    image.set_aspect("equal")
    plain(
        image,
        f"Tiles of {out}×{out} results, and the {width}×{width}\ninputs of two: they overlap by 2",
        (-1, 14),
        (-1, 13),
    )
    for place, matrix, name in zip(
        axes[1:], winograd_matrices(), ("Bᵀ: inputs", "G: weights", "Aᵀ: results"), strict=True
    ):
        place.imshow(np.sign(matrix) * np.abs(matrix) ** 0.5, cmap="RdBu", vmin=-2.2, vmax=2.2)
        for (row, column), number in np.ndenumerate(matrix):
            place.text(column, row, f"{number:.3g}", ha="center", va="center", fontsize=7)
        place.set_title(name, fontsize=9)
        place.set(xticks=[], yticks=[])
    figure.tight_layout()
    return figure


PICTURES = {
    "flash-attention.svg": flash_attention,
    "hopper.svg": hopper,
    "cross-view.svg": cross_view,
    "winograd.svg": winograd,
}


def main() -> None:
    for name, draw in PICTURES.items():
        plt.rcParams["svg.hashsalt"] = name  # the same file in every run
        draw().savefig(Path(sys.argv[1]) / name, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
