"""Run every CUDA kernel once at small, odd sizes, under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Inputs are created and results compared on the CPU, so that only gafext's kernels run. Without PyTorch's caching
allocator, each tensor has an allocation of exactly its size, so that accesses out of bounds are detected.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from gafext.ops.cross_view_attention import reference_cross_view_attention
from gafext.ops.flash_attention import reference_flash_attention
from gafext.ops.geglu import reference_geglu_gate
from gafext.ops.group_norm_silu import reference_group_norm_silu

OPS = torch.ops.gafext
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}
# (batch, queries, keys, head_dim, causal), 3 heads each: slightly more than one block of every kind, and lengths that
# end within a tile.
ATTENTION = [
    (2, 1, 1, 64, False),
    (2, 65, 77, 40, False),
    (2, 129, 257, 64, False),
    (2, 300, 300, 64, True),
    (2, 130, 129, 80, True),
    (2, 70, 200, 128, False),
    (2, 33, 65, 160, False),
    (2, 33, 40, 256, False),
    (2, 17, 31, 17, False),
    (2, 65, 1100, 64, False),  # enough keys to be split into parts
]
# Only in half precision: enough heads for blocks of 128 rows, and heads too wide for the other kernels.
TENSOR_CORES = [(30, 300, 77, head_dim, head_dim == 80) for head_dim in (48, 64, 80, 96, 128, 160)]
WIDE = [(2, 33, 65, 512, False), (1, 130, 600, 264, True)]
# Long enough for the Hopper kernel: two and three warpgroups, tiles of 128 and of 96 keys.
HOPPER = [(2, 2900, 200, 64, False), (2, 1500, 1500, 64, True)]
HOPPER += [(2, 1500, keys, head_dim, False) for head_dim in (64, 80, 128) for keys in (200, 257)]
CROSS_VIEW = [(1, 5, 64), (4, 33, 64), (6, 9, 40), (8, 17, 64), (32, 3, 80)]  # (views, positions, head_dim)
GATES = [(3, 40), (33, 1280), (5, 7)]  # (rows, inner)
# (batch, channels, positions, groups)
NORMS = [(2, 320, 9, 32), (33, 80, 500, 8), (2, 32, 2500, 4), (2, 30, 41, 6), (1, 33, 1300, 3)]


def heads(batch: int, length: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, length, 3, head_dim).to(dtype).transpose(1, 2)


def results(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each call, its result and the exact result."""
    attention = ATTENTION if dtype == torch.float32 else ATTENTION + TENSOR_CORES + HOPPER
    for batch, queries, keys, head_dim, is_causal in attention + WIDE * (device == "cuda" and dtype != torch.float32):
        inputs = [heads(batch, n, head_dim, dtype) for n in (queries, keys, keys)]
        out = OPS.flash_attention(*(x.to(device) for x in inputs), is_causal=is_causal)
        name = f"flash_attention {queries}x{keys}, {head_dim}"
        yield name, out, reference_flash_attention(*(x.double() for x in inputs), is_causal=is_causal)
    for views, positions, head_dim in CROSS_VIEW:
        inputs = [heads(2 * views, positions, head_dim, dtype) for _ in range(3)]
        out = OPS.cross_view_attention(*(x.to(device) for x in inputs), views)
        name = f"cross_view_attention V={views}, {positions}, {head_dim}"
        yield name, out, reference_cross_view_attention(*(x.double() for x in inputs), views)
    for rows, inner in GATES:
        projected = torch.randn(rows, 2 * inner).to(dtype)
        yield (
            f"geglu_gate {rows}, {inner}",
            OPS.geglu_gate(projected.to(device)),
            reference_geglu_gate(projected.double()),
        )
    for batch, channels, positions, groups in NORMS:
        x, weight, bias = torch.randn(batch, positions, channels), torch.randn(channels), torch.randn(channels)
        inputs = [t.to(dtype) for t in (x, weight, bias)]
        x, weight, bias = (t.to(device) for t in inputs)
        exact = [t.double() for t in inputs]
        yield (
            f"group_norm_silu {batch}, {channels}, {positions}, {groups}",
            OPS.group_norm_silu(x.transpose(1, 2), groups, weight, bias),
            reference_group_norm_silu(exact[0].transpose(1, 2), groups, *exact[1:]),
        )


def main(device: str) -> int:
    torch.manual_seed(0)
    wrong = count = 0
    for dtype in DTYPES:
        for name, out, exact in results(device, dtype):
            error = ((out.cpu().double() - exact).abs().max() / exact.abs().max()).item()
            count += 1
            if not error <= TOLERANCE[dtype]:
                wrong += 1
                print(f"{name} {dtype}: relative error {error:.2g}")
    print(f"{count} calls, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["cuda"]))
