"""The table of docs/precision.md, for benchmarks/precision.py, which prints it, and docs/fill.py, which writes it."""

from __future__ import annotations

TITLES = {
    "linear": "8 bits: linear layers",
    "linear+3x3": "8 bits: linear layers and 3×3 convolutions",
    "int8-inner": "8 bits, with the first and the last stage in float32",
    "int8": "8 bits: linear layers and all wide convolutions",
    "bfloat16": "`bfloat16`",
    "float16": "`float16`",
}


def table(result: dict) -> list[str]:
    """Format the rows of docs/precision.md."""
    lines = ["| precision | error of a pass | CPU time of a pass | PSNR of the views |", "|---|---|---|---|"]
    for choice, title in TITLES.items():
        row, decibels = result["unet"].get(choice), result["views_psnr"].get(choice)
        if decibels and row and "failed" not in row:
            error, ratio = row["relative_difference"], row["times_float32"]
            lines.append(f"| {title} | {100 * error:.1f} % | {ratio:.2f} | {decibels:.0f} dB |")
    return lines
