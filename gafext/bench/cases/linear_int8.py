"""Cases of linear layers in 8 bits, against PyTorch's linear in float32: what one would call without them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.bench.cases.base import Case, Contestant
from gafext.bench.cases.linear import LINEAR_SHAPES
from gafext.ops import linear_int8
from gafext.ops.linear_int8 import quantize_weight


def shapes(device: str, dtype: torch.dtype) -> list[tuple]:
    return LINEAR_SHAPES[:8] if device == "cpu" and dtype == torch.float32 else []  # those of the U-Net


def in_float32(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return x, weight * scale[:, None], bias


def case(rows: int, in_features: int, out_features: int, where: str, **options: Any) -> Case:
    """Build a case; the contestants' results are about 1 % apart, and the opponent has the weights in float32."""

    def inputs() -> tuple[Tensor, ...]:
        weight = torch.randn(out_features, in_features) * in_features**-0.5
        return torch.randn(rows, in_features), *quantize_weight(weight), torch.randn(out_features)

    return Case(
        op="linear_int8",
        shape=f"{rows},{in_features}->{out_features}",
        where=where,
        bound="compute",
        flops=2 * rows * in_features * out_features,
        inputs=inputs,
        contestants=[
            Contestant("gafext", linear_int8),
            Contestant("eager, float32", F.linear, prepare=in_float32),
        ],
        tolerance=0.03,  # 1 % of a typical result
    )
