"""The screen that `gafext doctor` prints."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any


def screen(found: dict[str, Any]) -> str:
    """Format the findings: the verdict, what a run uses, and a block for a bug report."""
    lines = ["a run works here" if found["works"] else "a run does not work here"]
    lines += [f"  broken: {problem}" for problem in found["problems"]]
    if "devices" in found:
        lines += ["", *_machine(found)]
        for devices in _alike(found["devices"]):
            lines += _operations(devices, found["sizes"])
    if found["notes"]:
        lines += ["", *(f"note: {note}" for note in found["notes"])]
    return "\n".join([*lines, "", "for a bug report:", *(f"  {line}" for line in _report(found))])


def without_names(text: str) -> str:
    """Replace the home folder, and folders of the user's name, in a text that others will read."""
    home = os.path.expanduser("~").rstrip("/")
    if not home:
        return text
    name = re.escape(os.path.basename(home))
    return re.sub(rf"(?<=/){name}(?=[/\s\"':]|$)", "USER", re.sub(rf"{re.escape(home)}(?![\w-])", "~", text))


def _alike(devices: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group neighbours of one name, as the GPUs of a server are."""
    return [list(group) for _, group in itertools.groupby(devices, key=lambda entry: entry["name"])]


def _names(devices: list[dict[str, Any]]) -> str:
    return f"{', '.join(entry['device'] for entry in devices)} ({devices[0]['name']})"


def _machine(found: dict[str, Any]) -> list[str]:
    chosen, threads = found["instruction_set"], found["threads"]
    why = "".join(f"; {name}: {reason}" for name, reason in chosen["why"].items())
    omp = found["system"]["environment"].get("OMP_NUM_THREADS")
    lines = [
        f"instruction set: {chosen['uses']}{why}",
        f"threads: {threads['uses']} on {threads['cores']} cores" + (f" (OMP_NUM_THREADS={omp})" if omp else ""),
    ]
    if memory := found.get("memory"):
        free = "unknown" if memory["free"] is None else f"{memory['free'] / 1e9:.1f} GB"
        lines.append(
            f"memory: {memory['model'] or 'the built-in model'} needs about {memory['needed'] / 1e9:.1f} GB for "
            f"{memory['views']} views; free on {memory['device']}: {free}"
        )
    gpus = [f"{_names(gpus)}: {gpus[0]['verified']}" for gpus in _alike(found["devices"]) if "verified" in gpus[0]]
    cards = ", ".join(sorted({record["card"] for record in found["verified_cards"]}))
    if len(found["devices"]) == 1:  # the CPU
        gpus = [f"GPU: none that PyTorch can use; the CUDA kernels were verified on {cards or 'no card yet'}"]
    return lines + gpus


def _operations(devices: list[dict[str, Any]], sizes: str) -> list[str]:
    lines = ["", f"{_names(devices)}, at the sizes of {sizes}:"]
    for op, chosen in devices[0].get("operations", {}).items():
        for index, choice in enumerate(chosen):
            dtypes = f"{', '.join(choice['dtypes'])}: " if len(chosen) > 1 else ""
            why = f" ({'; '.join(choice['why'])})" if choice["why"] else ""
            lines.append(f"  {'' if index else op:21}{dtypes}{choice['uses']}{why}")
    return lines


def _report(found: dict[str, Any]) -> list[str]:
    system = found["system"]
    lines = [", ".join(f"{name} {version}" for name, version in system["versions"].items()), system["platform"]]
    if "cpu" in system:
        cpu, build = system["cpu"], system["build"]
        lines.append(f"{cpu['model']}, {cpu['cores']} cores, {' '.join(cpu['flags'])}; {system['processor']}")
        cuda = " ".join([build["cuda_compiler"] or "no CUDA", *build["cuda_architectures"]])
        lines.append(
            f"build: {build['compiler']}, torch {build['torch']}, {cuda}; CPU {' '.join(build['instruction_sets'])}, "
            f"uses {build['instruction_set']}, int8 {build['int8_products']}"
        )
        gpus = [f"{_names(gpus)} {gpus[0].get('capability', '')}" for gpus in _alike(found["devices"][1:])]
        lines.append(f"GPU: {', '.join(gpus) or 'none'}; torch for CUDA {system['cuda']}")
    lines.append("environment: " + (" ".join(f"{k}={v}" for k, v in system["environment"].items()) or "nothing set"))
    return lines + [f"broken: {problem}" for problem in found["problems"]]
