"""Plot the stages of the pipeline in gafext and its opponents, from the JSON of benchmarks/bench_pipeline.py.

python benchmarks/plot_pipeline.py RESULTS.json FIGURE.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"encode": "#9ecae9", "denoise": "#4c78a8", "upsample": "#f58518", "decode": "#54a24b"}


# The same JSON gives the same file.
@plt.rc_context({"svg.hashsalt": "gafext", "svg.fonttype": "none", "font.family": "DejaVu Sans"})
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("figure", type=Path, help=".svg or .png")
    args = parser.parse_args()
    result = json.loads(args.json.read_text())
    place, given = result["environment"], result["arguments"]
    rows = {name: row["stages"] for name, row in result["contestants"].items() if "stages" in row}
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.45 * len(rows)), layout="constrained")
    for index, stages in enumerate(rows.values()):
        left = 0.0
        for stage, colour in COLOURS.items():
            seconds = stages[stage]["median"]
            axes.barh(index, seconds, left=left, color=colour, label=stage if index == 0 else None)
            left += seconds
        times = f"{stages['all']['times_gafext']:.2f} times gafext" if index else ""
        axes.annotate(times, (left, index), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("seconds, medians", fontsize=9)
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    machine = (place["gpu"] or place["cpu"]).get("name") or place["cpu"]["model"]
    steps = f"{given['steps']} step" + "s" * (given["steps"] > 1)
    axes.set_title(
        f"{given['model']}, {given['views']} views, {steps}, {given['dtype']}; {machine}, "
        f"torch {place['versions']['torch']}",
        fontsize=9,
        pad=22,
    )
    svg = args.figure.suffix == ".svg"
    figure.savefig(args.figure, dpi=130, metadata={"Date": None} if svg else None)


if __name__ == "__main__":
    main()
