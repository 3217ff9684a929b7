"""Cases of GroupNorm and SiLU, against PyTorch's two operations in both layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gafext.bench.cases.base import Case, Contestant, channels_last, compiled_form, contiguous
from gafext.ops import group_norm_silu
from gafext.ops.group_norm_silu import reference_group_norm_silu

# (batch, channels, side, where), in 32 groups
GROUP_NORM_SHAPES = [
    (8, 320, 32, "4 views with guidance, 32x32"),
    (8, 640, 32, "32x32, on the way up"),
    (8, 960, 32, "32x32, on the way up"),
    (8, 640, 16, "16x16"),
    (8, 1920, 16, "16x16, on the way up"),
    (8, 1280, 8, "8x8"),
    (8, 2560, 4, "4x4, on the way up"),
    (8, 320, 64, "64x64 latents"),
    (1, 512, 64, "autoencoder, 64x64"),
    (1, 256, 256, "autoencoder, 256x256"),
    (1, 128, 512, "autoencoder, 512x512"),
]


def shapes(device: str, dtype: torch.dtype) -> list[tuple]:
    return GROUP_NORM_SHAPES if device == "cuda" else [shape for shape in GROUP_NORM_SHAPES if shape[2] <= 64]


def case(batch: int, channels: int, side: int, where: str, *, compiled: bool, **options: Any) -> Case:
    def of_32(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias: form(x, 32, weight, bias)

    def inputs() -> tuple[Tensor, ...]:
        x = torch.randn(batch, channels, side, side, **options)
        return *channels_last(x), torch.randn(channels, **options), torch.randn(channels, **options)

    contestants = [
        Contestant("gafext", of_32(group_norm_silu)),
        Contestant("eager channels-last", of_32(reference_group_norm_silu)),
        Contestant("eager contiguous", of_32(reference_group_norm_silu), prepare=contiguous),
    ]
    if compiled:
        contestants.append(compiled_form("eager", of_32(reference_group_norm_silu)))
    return Case(
        op="group_norm_silu",
        shape=f"{batch},{channels},{side}x{side}",
        where=where,
        bound="memory",
        flops=8 * batch * channels * side * side,
        inputs=inputs,
        contestants=contestants,
    )
