"""Table and JSON of `gafext bench`; both show slower results of gafext in the same way as faster ones."""

from __future__ import annotations

import json
from pathlib import Path

from gafext.atomic import replace_whole
from gafext.bench.environment import QUIET
from gafext.bench.measure import CEILINGS, Race, quartiles, ratio


def summary(race: Race, *, mode: str, allocator: str) -> dict:
    """Convert a race to its JSON object; all ratios follow from the times."""
    case = race.case
    times = {name: [_four_digits(1e3 * seconds) for seconds in values] for name, values in race.times.items()}
    gemm, copy = (times[name] for name in CEILINGS)
    contestants = []
    for name, values in times.items():
        if name in CEILINGS:
            continue
        first, median, third = quartiles(values)
        slow, speedup, fast = map(_four_digits, ratio(values, times[case.ours]))
        contestants.append(
            {
                "name": name,
                "median_ms": median,
                "quartiles_ms": [first, third],
                "speedup": speedup,  # gafext's speed over this contestant's: the median over the rounds
                "speedup_quartiles": [slow, fast],
                "gflops": _four_digits(1e-6 * case.flops / median),
                "of_gemm": _four_digits(ratio(gemm, values)[1] * case.flops / race.gemm_flops),
                "gbps": _four_digits(1e-6 * race.bytes / median),
                "of_copy": _four_digits(ratio(copy, values)[1]),
                "times_ms": values,
                "first_s": _four_digits(race.first_seconds.get(name, 0.0)),
            }
        )
        if (peak := race.peaks.get(name)) is not None:
            contestants[-1]["peak_mib"] = _four_digits(peak / 2**20)
    return {
        "op": case.op,
        "shape": case.shape,
        "where": case.where,
        "mode": mode,
        "allocator": allocator,
        "bound": case.bound,
        "flops": case.flops,
        "bytes": race.bytes,
        "ours": case.ours,
        "others_busy": None if race.others is None else _four_digits(race.others),
        "ceilings": {
            "gemm_gflops": _four_digits(1e-6 * race.gemm_flops / quartiles(gemm)[1]),
            "copy_gbps": _four_digits(1e-6 * race.bytes / quartiles(copy)[1]),
            "gemm_flops": race.gemm_flops,
            "gemm_times_ms": gemm,
            "copy_times_ms": copy,
        },
        "contestants": contestants,
        "skipped": race.skipped,
    }


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def heading(op: str, *, place: str) -> str:
    titles = f"{'median':>10} ms  {'quartiles':17}{'gafext is':>12}"
    return f"\n{op}, {place}\n{'':20}{titles}"


def rows(summary: dict) -> list[str]:
    """Format a race: one line for the shape and one per contestant."""
    ceilings = summary["ceilings"]
    reached = f"{summary['mode']}; gemm {ceilings['gemm_gflops']:.0f} GFLOP/s, copy {ceilings['copy_gbps']:.1f} GB/s"
    lines = [f"{summary['shape']}   {summary['where']}   ({reached})"]
    if (summary["others_busy"] or 0) > QUIET:
        lines.append(f"  not to be trusted: other processes held {summary['others_busy']:.0%} of the cores")
    for row in summary["contestants"]:
        if summary["bound"] == "compute":
            roofline = f"{row['gflops']:7.0f} GFLOP/s {row['of_gemm']:6.0%} of gemm"
        else:
            roofline = f"{row['gbps']:7.1f} GB/s    {row['of_copy']:6.0%} of copy"
        spread = "{:.3f}..{:.3f}".format(*row["quartiles_ms"])
        peak = f"  {row['peak_mib']:.1f} MiB" if "peak_mib" in row else ""
        faster = "" if row["name"] == summary["ours"] else f"{row['speedup']:.2f}x"
        lines.append(f"  {row['name']:22}{row['median_ms']:10.3f}  {spread:19}{faster:>8}  {roofline}{peak}")
    lines += [f"  {name:22}left out: {reason}" for name, reason in summary["skipped"].items()]
    return lines


def write_json(path: str, environment: dict, races: list[dict], **more: object) -> None:
    """Write the JSON file with one race per line, so that version control shows which races changed."""
    lines = ",\n  ".join(json.dumps(race) for race in races)
    head = "".join(f' "{name}": {json.dumps(value, indent=1)},\n' for name, value in more.items())
    text = f'{{\n "environment": {json.dumps(environment, indent=1)},\n{head} "races": [\n  {lines}\n ]\n}}\n'
    target = Path(path).absolute()
    if target.exists() and not target.is_file():  # a pipe
        target.write_text(text)
        return
    with replace_whole(target.parent) as new:
        (new / target.name).write_text(text)
