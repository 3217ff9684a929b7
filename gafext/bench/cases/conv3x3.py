"""Cases of the 3×3 convolution, against conv2d in both layouts and with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gafext.bench.cases.base import Case, Contestant, channels_last, contiguous
from gafext.ops import conv3x3
from gafext.ops.conv3x3 import reference_conv3x3

# (batch, input channels, output channels, side, where); with guidance, 4 views are a batch of 8
CONV_SHAPES = [
    (8, 320, 320, 32, "4 views with guidance, 32x32"),
    (8, 640, 320, 32, "32x32, on the way up"),
    (8, 640, 640, 16, "16x16"),
    (8, 1280, 640, 16, "16x16, on the way up"),
    (8, 1280, 1280, 8, "8x8"),
    (8, 2560, 1280, 8, "8x8, on the way up"),
    (8, 1280, 1280, 4, "4x4"),
    (1, 512, 512, 64, "autoencoder, 64x64"),
]


def shapes(device: str, dtype: torch.dtype) -> list[tuple]:
    return CONV_SHAPES if device == "cpu" else []  # where the kernel runs


def pack_by_onednn(x: Tensor, weight: Tensor, bias: Tensor) -> tuple:
    pack = torch._C._nn.mkldnn_reorder_conv2d_weight  # pyright: ignore[reportAttributeAccessIssue]  # not in the stubs
    return x, pack(weight.to_mkldnn(), [1, 1], [1, 1], [1, 1], 1, list(x.shape)), bias


def conv_packed_by_onednn(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """Convolve with packed weights, as Inductor does when weights are frozen."""
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], "")


def case(batch: int, in_channels: int, out_channels: int, side: int, where: str, **options: Any) -> Case:
    """Build a case; torch.compile is not a contestant, because it calls the same conv2d."""

    def inputs() -> tuple[Tensor, ...]:
        weight = torch.randn(out_channels, in_channels, 3, 3) * (9 * in_channels) ** -0.5
        [x] = channels_last(torch.randn(batch, in_channels, side, side))
        return tuple(tensor.to(options["dtype"]) for tensor in (x, weight, torch.randn(out_channels)))

    contestants = [
        Contestant("gafext", conv3x3),
        Contestant("conv2d channels-last", reference_conv3x3, prepare=channels_last),
        Contestant("conv2d contiguous", reference_conv3x3, prepare=contiguous),
    ]
    if options["dtype"] == torch.float32 and torch.backends.mkldnn.is_available():
        contestants.append(Contestant("conv2d prepacked", conv_packed_by_onednn, prepare=pack_by_onednn))
    return Case(
        op="conv3x3",
        shape=f"{batch},{in_channels}->{out_channels},{side}x{side}",
        where=where,
        bound="compute",
        flops=2 * 9 * batch * in_channels * out_channels * side * side,  # Winograd's algorithm does a quarter
        inputs=inputs,
        contestants=contestants,
    )
