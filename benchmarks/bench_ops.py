"""Times gafext's operations against PyTorch's own, at the shapes of the SD 2.1 sized multi-view U-Net.

    python benchmarks/bench_ops.py [--op flash_attention] [--device cpu] [--dtype float32] [--json FILE]

The contestants of a shape take turns, round by round, in one process, so that a machine that changes speed changes it
for all of them. Printed per contestant: median and quartiles of the rounds, and how many times faster gafext is (the
median over the rounds of the ratio within a round). Inputs are strided as a projection leaves them: (B, L, H * D).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from gafext import _C
from gafext.ops import cross_view_attention, flash_attention, geglu

# (batch, heads, queries, keys, head_dim)
ATTENTION_SHAPES = [
    (4, 5, 1024, 1024, 64),  # self-attention of four views at 32x32, 16x16, 8x8 latents
    (1, 5, 4096, 4096, 64),
    (4, 10, 256, 256, 64),
    (4, 20, 64, 64, 64),
    (4, 5, 1024, 257, 64),  # image tokens
    (4, 10, 256, 257, 64),
    (4, 20, 64, 257, 64),
    (4, 5, 1024, 77, 64),  # text
    (4, 20, 64, 77, 64),
    (1, 16, 257, 257, 80),  # CLIP ViT-H
]
CROSS_VIEW_SHAPES = [
    (4, 1024, 5),
    (4, 256, 10),
    (4, 64, 20),
    (8, 1024, 5),
    (16, 256, 10),
]  # (views, positions, heads)
GEGLU_SHAPES = [(4096, 320), (1024, 640), (256, 1280)]  # (rows, channels); inner is 4 * channels


@dataclass
class Result:
    op: str
    shape: str
    contestant: str
    median_ms: float
    quartile1_ms: float
    quartile3_ms: float
    speedup: float  # of gafext over this contestant


def heads_first(batch: int, length: int, heads: int, head_dim: int, **kind) -> torch.Tensor:
    return torch.randn(batch, length, heads * head_dim, **kind).unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_cases(**kind) -> Iterator[tuple[str, dict[str, Callable]]]:
    for batch, heads, queries, keys, head_dim in ATTENTION_SHAPES:
        q = heads_first(batch, queries, heads, head_dim, **kind)
        k, v = (heads_first(batch, keys, heads, head_dim, **kind) for _ in range(2))
        yield (
            f"{batch},{heads},{queries}x{keys},{head_dim}",
            {
                "gafext": lambda q=q, k=k, v=v: flash_attention(q, k, v),
                "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            },
        )


def cross_view_sdpa(q, k, v, num_views):
    """The eager form of most implementations: views into the length, positions into the batch."""

    def fold(x):  # (B*V,H,L,D) -> (B,L,H,V,D)
        return x.unflatten(0, (-1, num_views)).permute(0, 3, 2, 1, 4)

    out = F.scaled_dot_product_attention(fold(q), fold(k), fold(v))
    return out.permute(0, 3, 2, 1, 4).flatten(0, 1)


def cross_view_elementwise(q, k, v, num_views):
    """The eager form without copies: products and sums over a broadcast pair of views."""
    q, k, v = (x.unflatten(0, (-1, num_views)) for x in (q, k, v))
    weights = ((q[:, :, None] * k[:, None]).sum(-1, keepdim=True) * q.shape[-1] ** -0.5).softmax(2)
    return (weights * v[:, None]).sum(2).flatten(0, 1)


def cross_view_cases(**kind) -> Iterator[tuple[str, dict[str, Callable]]]:
    for views, positions, heads in CROSS_VIEW_SHAPES:
        q, k, v = (heads_first(views, positions, heads, 64, **kind) for _ in range(3))
        yield (
            f"V={views},({positions},{heads * 64})",
            {
                "gafext": lambda q=q, k=k, v=v, n=views: cross_view_attention(q, k, v, n),
                "sdpa": lambda q=q, k=k, v=v, n=views: cross_view_sdpa(q, k, v, n),
                "elementwise": lambda q=q, k=k, v=v, n=views: cross_view_elementwise(q, k, v, n),
            },
        )


def eager_geglu(x, weight, bias):
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def geglu_cases(**kind) -> Iterator[tuple[str, dict[str, Callable]]]:
    for rows, channels in GEGLU_SHAPES:
        x = torch.randn(rows, channels, **kind)
        weight = torch.randn(8 * channels, channels, **kind) * channels**-0.5
        bias = torch.randn(8 * channels, **kind)
        yield (
            f"{rows}x{channels}",
            {
                "gafext": lambda x=x, w=weight, b=bias: geglu(x, w, b),
                "eager": lambda x=x, w=weight, b=bias: eager_geglu(x, w, b),
            },
        )


CASES = {"flash_attention": attention_cases, "cross_view_attention": cross_view_cases, "geglu": geglu_cases}


def timed(run: Callable, device: str, calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def race(contestants: dict[str, Callable], device: str, rounds: int) -> dict[str, list[float]]:
    for run in contestants.values():
        timed(run, device, 2)
    # Enough calls for 10 ms a turn, so that the clock and the switch between contestants do not show.
    calls = {name: max(1, int(0.01 / timed(run, device, 1))) for name, run in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(timed(run, device, calls[name]))
    return times


def summarise(op: str, shape: str, times: dict[str, list[float]]) -> list[Result]:
    results = []
    for name, seconds in times.items():
        first, median, third = (1e3 * t for t in statistics.quantiles(seconds, n=4))
        speedup = statistics.median(t / ours for t, ours in zip(seconds, times["gafext"], strict=True))
        results.append(Result(op, shape, name, median, first, third, speedup))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=CASES, action="append", help="only this one (repeatable)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15, help="at least 7")
    parser.add_argument("--threads", type=int, help="of PyTorch and gafext")
    parser.add_argument("--json", metavar="FILE", help="write the results and the environment there")
    args = parser.parse_args()
    if args.rounds < 7:
        parser.error("--rounds must be at least 7: a median of fewer says little")
    if args.threads:
        torch.set_num_threads(args.threads)

    results = []
    with torch.inference_mode():
        for op in args.op or CASES:
            for shape, contestants in CASES[op](device=args.device, dtype=getattr(torch, args.dtype)):
                of_shape = summarise(op, shape, race(contestants, args.device, args.rounds))
                results += of_shape
                for r in of_shape:
                    spread = f"{r.quartile1_ms:.3f}..{r.quartile3_ms:.3f}"
                    print(f"{op:21}{shape:18}{r.contestant:12}{r.median_ms:9.3f} ms  {spread:16}{r.speedup:6.2f}x")
    if args.json:
        environment = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
            "machine": platform.platform(),
            "dtype": args.dtype,
            "rounds": args.rounds,
            "build": _C.build_info(),
        }
        with open(args.json, "w") as file:
            json.dump({"environment": environment, "results": [asdict(r) for r in results]}, file, indent=1)


if __name__ == "__main__":
    main()
