"""Plot the quality of views against the time of the denoising steps, from the JSON of benchmarks/presets.py.

    python benchmarks/plot_presets.py RESULTS.json FIGURE.svg

Both panels have the time of an option as a fraction of that of "quality", on a logarithmic axis.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

PRESET, OTHER = "#d62728", "#4c78a8"
PRESETS = ("quality", "balanced", "fast")


def draw(axes: Axes, rows: list[dict], key: str, label: str) -> None:
    for index, row in enumerate(rows):
        x, colour = 1 / row["times_as_fast"], PRESET if row["name"] in PRESETS else OTHER
        axes.plot(x, row[key], "o", color=colour, markersize=4)
        axes.annotate(
            str(index + 1), (x, row[key]), xytext=(4, 3), textcoords="offset points", fontsize=7.5, color=colour
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_ylabel(label, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("figure", type=Path, help=".svg or .png")
    args = parser.parse_args()
    result = json.loads(args.json.read_text())
    rows, place = result["options"], result["environment"]
    # The same JSON gives the same file.
    plt.rcParams.update({"svg.hashsalt": "gafext", "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(2, figsize=(8, 6.5), sharex=True, layout="constrained")
    draw(panels[0], rows, "psnr", "PSNR to the truth, dB")
    draw(panels[1], rows, "consistency", "consistency of the views, dB")
    panels[1].set_xlabel('time of the denoising steps, that of "quality" is 1', fontsize=9)
    names = "\n".join(f"{index + 1}  {row['name']}" for index, row in enumerate(rows))
    figure.text(1.01, 0.5, names, fontsize=8, va="center")
    figure.suptitle(
        f"built-in model, {result['arguments']['heads']} held-out heads; {place['cpu']['model']}, "
        f"{place['threads']} threads, torch {place['versions']['torch']}",
        fontsize=9,
    )
    svg = args.figure.suffix == ".svg"
    figure.savefig(args.figure, dpi=130, bbox_inches="tight", metadata={"Date": None} if svg else None)


if __name__ == "__main__":
    main()
