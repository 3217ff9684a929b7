"""Plot the speed-up of gafext over PyTorch's forms, from the JSON of `gafext bench`.

    python benchmarks/plot.py RESULTS.json ... FIGURE.svg [--mode warm] [--allocator default]

Several files must be from one machine and one dtype, such as those of benchmarks/gpu_checklist.sh, one per operation.

With the results of `gafext bench --suite lengths`, the figure shows the peak memory and the time of attention over the
length of the sequence instead, both axes logarithmic, with lines of N and N² through the last points.

Each shape has one row, in the order of the table. The bar is the speed-up over the fastest of PyTorch's forms, red if
gafext is slower; the marks are the speed-ups over each form. The axis is logarithmic.
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

WIN, LOSS = "#4c78a8", "#d62728"
MARKS = "osD^vPX<>*"
TITLES = {
    "flash_attention": "flash attention: batch, heads, queries × keys, head width",
    "cross_view_attention": "attention across V views: (positions, channels)",
    "geglu": "GEGLU: rows × channels",
    "geglu_gate": "gate of GEGLU: rows, channels",
    "conv3x3": "3×3 convolution: batch, channels, height × width",
    "linear": "linear layer: rows, features",
}


def opponents(race: dict) -> list[dict]:
    return [row for row in race["contestants"] if not row["name"].startswith("gafext")]


def draw(axes: Axes, races: list[dict], limits: tuple[float, float]) -> None:
    names = list(dict.fromkeys(row["name"] for race in races for row in opponents(race)))
    for y, race in enumerate(races):
        fastest = min((row["speedup"] for row in opponents(race)), default=1.0)
        axes.barh(y, fastest - 1, left=1, height=0.72, color=WIN if fastest >= 1 else LOSS, alpha=0.55)
        axes.annotate(
            f"{fastest:.2f}", (limits[0] * 1.02, y), va="center", fontsize=8, color="black" if fastest >= 1 else LOSS
        )
    for name, mark in zip(names, MARKS, strict=False):
        points = [(row["speedup"], y) for y, race in enumerate(races) for row in opponents(race) if row["name"] == name]
        axes.plot(*zip(*points, strict=True), mark, color="black", markersize=3.5, alpha=0.75, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(races)), [race["shape"].replace("x", "×") for race in races], fontsize=8)
    axes.set_ylim(len(races) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_title(TITLES.get(races[0]["op"], races[0]["op"]), loc="left", fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7.5, frameon=False)


LENGTHS_STYLE = {"standard": "o-", "sdpa": "s--", "gafext": "D-"}


def lengths(races: list[dict]) -> dict[str, list[dict]]:
    """Return the rows of each contestant by length of the sequence, with the length added."""
    found: dict[str, list[dict]] = {}
    for race in races:
        for row in race["contestants"]:
            found.setdefault(row["name"], []).append({**row, "length": int(race["where"].split()[0])})
    return found


def draw_lengths(axes: Axes, rows: dict[str, list[dict]], key: str, label: str) -> None:
    for name, points in rows.items():
        x, y = zip(*((point["length"], point[key]) for point in points if point.get(key)), strict=True)
        axes.plot(x, y, LENGTHS_STYLE.get(name, "^:"), markersize=4, linewidth=1.2, label=name)
        power = 2 if name == "standard" or key != "peak_mib" else 1
        if name in ("standard", "gafext"):
            axes.plot(x, [y[-1] * (n / x[-1]) ** power for n in x], color="grey", linewidth=0.6)
            x_of_text = x[-2:][0]
            at = (x_of_text, y[-1] * (x_of_text / x[-1]) ** power)
            axes.annotate(f"N{'²' * (power == 2)}", at, color="grey", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("length N of the sequence", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(linewidth=0.4)
    axes.legend(loc="upper left", fontsize=8, frameon=False)


def plot_lengths(races: list[dict]) -> plt.Figure:
    rows = lengths(races)
    figure, (memory, time) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    draw_lengths(memory, rows, "peak_mib", "peak memory beside the inputs, MiB")
    draw_lengths(time, rows, "median_ms", "median time, ms")
    return figure


def plot_speedups(races: list[dict]) -> plt.Figure:
    ops = dict.fromkeys([*TITLES, *(race["op"] for race in races)])
    groups = [[race for race in races if race["op"] == op] for op in ops]
    groups = [group for group in groups if group]
    speedups = [row["speedup"] for race in races for row in opponents(race)]
    limits = (min([0.45, *speedups]) * 0.9, max([3, *speedups]) * 1.1)
    figure, panels = plt.subplots(
        len(groups),
        figsize=(9, 0.21 * len(races) + 0.75 * len(groups) + 0.6),
        height_ratios=[len(group) + 0.5 for group in groups],
        squeeze=False,
        layout="constrained",
    )
    for axes, group in zip(panels[:, 0], groups, strict=True):
        draw(axes, group, limits)
    panels[-1, 0].set_xlabel("times as fast as PyTorch; bar: its fastest form, marks: each", fontsize=9)
    return figure


def subtitle(environment: dict, mode: str, allocator: str) -> str:
    if environment["gpu"]:
        place = environment["gpu"]["name"]
    else:
        kernels = environment["build"]["instruction_set"]
        place = f"{environment['cpu']['model']}, {kernels} kernels, {environment['threads']} threads"
    kept = ", malloc keeps big blocks" if allocator == "keep" else ""
    return f"{place}, torch {environment['versions']['torch']}, {environment['dtype']}, {mode} inputs{kept}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("figure", type=Path, help=".svg or .png")
    parser.add_argument("--mode", choices=["warm", "cold"], default="warm")
    parser.add_argument("--allocator", choices=["default", "keep"], default="default")
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.json]
    environments = [result["environment"] for result in results]
    if len({(e["machine"], str(e["gpu"]), e["dtype"]) for e in environments}) > 1:
        parser.error("the files are not of one machine and one dtype")
    races = [race for result in results for race in result["races"]]
    races = [race for race in races if race["mode"] == args.mode and race["allocator"] == args.allocator]
    if not races:
        parser.error(f"{args.json[0]} has no races of mode {args.mode} and allocator {args.allocator}")

    # The same JSON gives the same file.
    plt.rcParams.update({"svg.hashsalt": "gafext", "font.family": "DejaVu Sans"})
    measured_memory = any("peak_mib" in row for race in races for row in race["contestants"])
    figure = (plot_lengths if measured_memory else plot_speedups)(races)
    figure.suptitle(subtitle(environments[0], args.mode, args.allocator), fontsize=9)
    svg = args.figure.suffix == ".svg"
    figure.savefig(args.figure, dpi=130, metadata={"Date": None} if svg else None)


if __name__ == "__main__":
    main()
