"""Print a short table of the JSON files of `gafext bench` and benchmarks/full_size.py.

    python benchmarks/summary.py FILE.json ...

Each shape has one line, with the fastest other form. `cold`, `warm`: microseconds of gafext's call, and the ratio of
the other form's time to it. `share`: fraction of the rate measured in the same run, on a GPU of a copy of 4 GiB or a
large matrix product, on a CPU of a copy of as many bytes or a matrix product.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path


def table(results: dict) -> list[str]:
    environment = results["environment"]
    place = (environment["gpu"] or {}).get("name") or environment["cpu"]["model"]
    ceilings = "".join(f", {name} {value:.0f}" for name, value in environment.get("ceilings", {}).items())
    lines = [f"{place}, torch {environment['versions']['torch']}, {environment['dtype']}{ceilings}"]
    shapes: dict[tuple, dict[str, dict]] = {}
    for race in results["races"]:
        if race["allocator"] == "default":
            shapes.setdefault((race["op"], race["shape"]), {})[race["mode"]] = race
    op_before = None
    for (op, shape), modes in shapes.items():
        if op != op_before:
            rate = "TFLOP/s" if next(iter(modes.values()))["bound"] == "compute" else "GB/s"
            lines.append(f"{op:26}{'cold us':>9}{'warm us':>9}{rate:>9} share  {'best other':24} cold   warm")
            op_before = op
        lines.append(line(shape, modes, environment))
    lines += [f"FAILED {what}: {reason}" for what, reason in results.get("failed", {}).items()]
    if results.get("left_out"):
        lines.append(f"left out: {', '.join(results['left_out'])}")
    return lines + kernels(results["races"])


def line(shape: str, modes: dict[str, dict], environment: dict) -> str:
    """Format one shape; the other form is the fastest one cold, or warm if only that was measured."""
    race = modes.get("cold") or modes["warm"]
    best = min(opponents(race), key=lambda row: row["median_ms"], default={"name": "nothing else ran"})
    micros, faster = [], []
    for mode in ("cold", "warm"):
        rows = {row["name"]: row for row in modes[mode]["contestants"]} if mode in modes else {}
        micros.append(f"{1e3 * rows[race['ours']]['median_ms']:9.1f}" if rows else f"{'':9}")
        faster.append(f"{rows[best['name']]['speedup']:6.2f}x" if best["name"] in rows else f"{'':7}")
    ours = next(row for row in race["contestants"] if row["name"] == race["ours"])
    rate, share = rate_and_share(race, ours, environment)
    return f"  {shape:24}{micros[0]}{micros[1]}{rate:9.3g} {share:5.0%}  {best['name']:24}{faster[0]}{faster[1]}"


def opponents(race: dict) -> list[dict]:
    return [row for row in race["contestants"] if not row["name"].startswith("gafext")]


def rate_and_share(race: dict, row: dict, environment: dict) -> tuple[float, float]:
    ceilings = environment.get("ceilings", {})
    if race["bound"] == "memory":
        return row["gbps"], row["gbps"] / ceilings["copy_gbps"] if ceilings else row["of_copy"]
    ceiling = ceilings.get(f"{environment['dtype']}_tflops")
    return 1e-3 * row["gflops"], 1e-3 * row["gflops"] / ceiling if ceiling else row["of_gemm"]


def kernels(races: list[dict]) -> list[str]:
    """List the kernels that each form ran, with the number of shapes; PyTorch's choice depends on version and size."""
    ran: dict[tuple[str, str], Counter] = {}
    for race in races:
        if race["mode"] != races[0]["mode"]:
            continue
        for row in race["contestants"]:
            if row.get("kernels"):
                ran.setdefault((race["op"], row["name"]), Counter())[short_name(row["kernels"][0])] += 1
    return [
        f"{op}, {name} ran {'; '.join(f'{kernel} ({count})' for kernel, count in counted.most_common(3))}"
        for (op, name), counted in ran.items()
    ]


def short_name(kernel: str) -> str:
    """Strip return type, anonymous namespaces and arguments from a kernel's C++ name."""
    name = re.sub(r"^void |\(anonymous namespace\)::", "", kernel)
    return re.split(r"[<(]", name)[0][:60]


def full_size(results: dict) -> list[str]:
    lines = [f"U-Net of SD 2.1's size, {results['device']}, peak of the pipeline {results['peak_gib']:.1f} GiB"]
    for name, row in results.get("unet", {}).items():
        if "failed" in row:
            lines.append(f"  FAILED {name}: {row['failed']}")
            continue
        peak = f", peak {row['peak_gib']:.1f} GiB" if row.get("peak_gib") else ""
        low, high = row["quartiles"]
        first, times = next((key, value) for key, value in row.items() if key.startswith("times_"))
        against = f"{times:.3f} times {first.removeprefix('times_')} ({low:.3f}..{high:.3f})"
        lines.append(f"  {name:34}{1 / row['median']:8.2f} passes/s, {against}{peak}")
    steps = results["seconds_a_step"].items()
    lines += [f"  whole pipeline, {name}: {seconds:.4g} s a step" for name, seconds in steps]
    return lines


def stages(results: dict) -> list[str]:
    place, given = results["environment"], results["arguments"]
    machine = (place["gpu"] or place["cpu"]).get("name") or place["cpu"]["model"]
    what = f"{given['views']} views, {given['steps']} steps, {given['dtype']}"
    lines = [f"pipeline, {machine}, {what}: seconds, and times as long as gafext"]
    for name, row in results["contestants"].items():
        if "failed" in row:
            lines.append(f"  FAILED {name}: {row['failed']}")
            continue
        parts = (f"{stage} {each['median']:.3g} s {each['times_gafext']:.2f}x" for stage, each in row["stages"].items())
        lines.append(f"  {name:14} " + ", ".join(parts))
    return lines


def main(paths: list[str]) -> None:
    for path in paths:
        results = json.loads(Path(path).read_text())
        read = table if "races" in results else stages if "contestants" in results else full_size
        print(*read(results), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
