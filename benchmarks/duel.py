"""Race builds of the extension against each other, operation by operation, in processes that take turns.

    cp .venv/lib/python*/site-packages/gafext/_C.*.so OLD.so      # before a change; build it, then
    python benchmarks/duel.py OLD.so NEW.so [--case "conv(8, 320, 320, 32)" ...] [--dtype bfloat16] [--seconds 30]

Every process holds one build and the same inputs; one call of each follows the other, so that a busy machine slows both
alike: ratios repeat within 1 % where times differ by 10. Cases: conv(batch, in, out, side), linear(rows, in, out),
geglu(rows, in, inner), attention(batch, heads, queries, keys, head_dim). Prints the first build's median in ms and how
many times as fast the others are. Only the extension is loaded, so that a build may be older than the Python files.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CASES = (
    "conv(8, 320, 320, 32)",
    "conv(8, 640, 640, 16)",
    "conv(8, 1280, 1280, 8)",
    "linear(8192, 320, 320)",
    "linear(2048, 640, 640)",
    "geglu(2048, 640, 2560)",
    "attention(8, 5, 1024, 1024, 64)",
)


def worker(build: str, dtype_name: str) -> None:
    """Time one call of each case that standard input names."""
    import torch  # which the extension is linked with

    spec = importlib.util.spec_from_file_location("gafext._C", build)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # registers torch.ops.gafext
    ops, dtype = torch.ops.gafext, getattr(torch, dtype_name)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def conv(batch: int, inputs: int, outputs: int, side: int) -> Callable[[], object]:
        x = random(batch, inputs, side, side).to(memory_format=torch.channels_last)
        weight, bias = random(outputs, inputs, 3, 3), random(outputs)
        return lambda: ops.conv3x3(x, weight, bias)

    def linear(rows: int, inputs: int, outputs: int) -> Callable[[], object]:
        x, weight, bias = random(rows, inputs), random(outputs, inputs), random(outputs)
        return lambda: ops.linear(x, weight, bias)

    def geglu(rows: int, inputs: int, inner: int) -> Callable[[], object]:
        x, weight, bias = random(rows, inputs), random(2 * inner, inputs), random(2 * inner)
        return lambda: ops.geglu(x, weight, bias)

    def attention(batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Callable[[], object]:
        query, key, value = (
            random(batch, length, heads * head_dim).view(batch, length, heads, head_dim).transpose(1, 2)
            for length in (queries, keys, keys)
        )
        return lambda: ops.flash_attention(query, key, value)

    kinds = {"conv": conv, "linear": linear, "geglu": geglu, "attention": attention}
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        case = line.strip()
        if case not in calls:
            kind, _, sizes = case.rstrip(")").partition("(")
            calls[case] = kinds[kind](*map(int, sizes.split(",")))
        start = time.perf_counter()
        calls[case]()
        print(time.perf_counter() - start, flush=True)


class Build:
    """A process that holds one build."""

    def __init__(self, path: Path, dtype: str):
        command = [sys.executable, __file__, "--worker", "--dtype", dtype, str(path)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # whose turn it is not does not spin
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def seconds(self, case: str) -> float:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(f"{case}\n")
        stdin.flush()
        if not (line := stdout.readline()):
            raise SystemExit(f"duel: the process of {self.process.args[-1]} ended at {case}")
        return float(line)


def duel(paths: list[Path], cases: list[str], dtype: str, seconds: float) -> None:
    """Let the builds take turns for `seconds`, and print each case's line."""
    builds = [Build(path, dtype) for path in paths]
    for case in cases:
        for build in builds:
            build.seconds(case)
    times: dict[str, list[list[float]]] = {case: [[] for _ in builds] for case in cases}
    end, turn = time.monotonic() + seconds, 0
    while turn < 7 or time.monotonic() < end:
        for case in cases:
            for place in range(len(builds)):
                which = (place + turn) % len(builds)
                times[case][which].append(builds[which].seconds(case))
        turn += 1
    for case, (first, *others) in times.items():
        ratios = [statistics.median(a / b for a, b in zip(first, other, strict=True)) for other in others]
        print(f"{case:32} {1e3 * statistics.median(first):9.2f} ms ", *(f"{ratio:7.3f}" for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", type=Path)
    parser.add_argument("--case", action="append", help="default: " + "; ".join(CASES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(str(args.builds[0]), args.dtype)
    duel(args.builds, args.case or list(CASES), args.dtype, args.seconds)


if __name__ == "__main__":
    main()
