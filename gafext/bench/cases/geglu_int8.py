"""Cases of GEGLU in 8 bits, against GEGLU of PyTorch's operations in float32: what one would call without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gafext.bench.cases.base import Case, Contestant
from gafext.bench.cases.geglu import GEGLU_SHAPES
from gafext.bench.cases.linear_int8 import in_float32
from gafext.ops import geglu_int8
from gafext.ops.geglu import reference_geglu
from gafext.ops.linear_int8 import quantize_weight


def shapes(device: str, dtype: torch.dtype) -> list[tuple]:
    return GEGLU_SHAPES if device == "cpu" and dtype == torch.float32 else []


def case(rows: int, channels: int, where: str, **options: Any) -> Case:
    """Build a case; the contestants' results are about 1 % apart, and the opponent has the weights in float32."""

    def inputs() -> tuple[Tensor, ...]:
        weight = torch.randn(8 * channels, channels) * channels**-0.5
        return torch.randn(rows, channels), *quantize_weight(weight), torch.randn(8 * channels)

    return Case(
        op="geglu_int8",
        shape=f"{rows}x{channels}",
        where=where,
        bound="compute",
        flops=2 * rows * channels * 8 * channels,
        inputs=inputs,
        contestants=[
            Contestant("gafext", geglu_int8),
            Contestant("eager, float32", reference_geglu, prepare=in_float32),
        ],
        tolerance=0.1,  # 1 % of the value and of the gate, which multiply
    )
