"""Cases of GEGLU, against linear, chunk and gelu."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.bench.cases.base import Case, Contestant, compiled_form, linear_packed_by_mkl, pack_by_mkl
from gafext.ops import geglu
from gafext.ops.geglu import reference_geglu

# (rows, channels, where); the inner width is 4 * channels
GEGLU_SHAPES = [
    (4096, 320, "4 views, 32x32"),
    (1024, 640, "4 views, 16x16"),
    (256, 1280, "4 views, 8x8"),
]
# Additional shapes on GPUs.
GPU_GEGLU_SHAPES = [(2 * rows, channels, f"{where}, with guidance") for rows, channels, where in GEGLU_SHAPES]


def shapes(device: str, dtype: torch.dtype) -> list[tuple]:
    return GEGLU_SHAPES + GPU_GEGLU_SHAPES * (device == "cuda")


def geglu_packed_by_mkl(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = linear_packed_by_mkl(x, packed, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def case(rows: int, channels: int, where: str, *, compiled: bool, **options: Any) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        weight = torch.randn(8 * channels, channels, **options) * channels**-0.5
        return torch.randn(rows, channels, **options), weight, torch.randn(8 * channels, **options)

    contestants = [Contestant("gafext", geglu), Contestant("eager", reference_geglu)]
    if compiled:
        contestants.append(compiled_form("eager", reference_geglu))
    if options["device"] == "cpu" and options["dtype"] == torch.float32 and torch.backends.mkl.is_available():
        contestants.append(Contestant("eager packed by MKL", geglu_packed_by_mkl, prepare=pack_by_mkl))
    return Case(
        op="geglu",
        shape=f"{rows}x{channels}",
        where=where,
        bound="compute",
        flops=2 * rows * channels * 8 * channels,
        inputs=inputs,
        contestants=contestants,
    )
