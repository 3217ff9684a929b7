"""Cases of the 3×3 convolution with 8-bit weights, against the same weights in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gafext.bench.cases.base import Case, Contestant, channels_last
from gafext.bench.cases.conv3x3 import CONV_SHAPES
from gafext.ops import conv3x3, conv3x3_int8
from gafext.ops.conv3x3 import reference_conv3x3
from gafext.ops.linear_int8 import quantize_weight


def shapes(device: str, dtype: torch.dtype) -> list[tuple]:
    return CONV_SHAPES if device == "cpu" and dtype == torch.float32 else []  # where the kernel runs


def case(batch: int, in_channels: int, out_channels: int, side: int, where: str, **options: Any) -> Case:
    """Build a case; the opponents have the weights in float32 before the clock starts."""

    def inputs() -> tuple[Tensor, ...]:
        weight = torch.randn(out_channels, in_channels, 3, 3) * (9 * in_channels) ** -0.5
        x = torch.randn(batch, in_channels, side, side)
        return *channels_last(x), *quantize_weight(weight), torch.randn(out_channels)

    def in_float32(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return x, weight * scale[:, None, None, None], bias

    def in_float32_channels_last(*given: Tensor) -> tuple[Tensor, ...]:
        return channels_last(*in_float32(*given))

    return Case(
        op="conv3x3_int8",
        shape=f"{batch},{in_channels}->{out_channels},{side}x{side}",
        where=where,
        bound="compute",
        flops=2 * 9 * batch * in_channels * out_channels * side * side,  # Winograd's algorithm does a quarter
        inputs=inputs,
        contestants=[
            Contestant("gafext", conv3x3_int8),
            Contestant("gafext in float32", conv3x3, prepare=in_float32),
            Contestant("conv2d channels-last", reference_conv3x3, prepare=in_float32_channels_last),
        ],
        tolerance=0.02,  # gafext's rounds its inputs
    )
