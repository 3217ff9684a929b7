"""Cases of linear layers, against PyTorch's linear with plain and with packed weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.bench.cases.base import Case, Contestant, linear_packed_by_mkl, pack_by_mkl
from gafext.ops import linear

# (rows, features in, features out, where); with guidance, 4 views are a batch of 8
LINEAR_SHAPES = [
    *(
        (rows, ratio * channels, channels, f"{what}, {side}x{side}")
        for rows, channels, side in ((8192, 320, 32), (2048, 640, 16), (512, 1280, 8), (128, 1280, 4))
        for ratio, what in ((1, "projections of attention"), (4, "feed-forward"))
    ),
    (257, 1280, 1280, "CLIP ViT-H, projections of attention"),
    (257, 1280, 5120, "CLIP ViT-H, feed-forward"),
    (257, 5120, 1280, "CLIP ViT-H, feed-forward"),
]


def shapes(device: str, dtype: torch.dtype) -> list[tuple]:
    return LINEAR_SHAPES if device == "cpu" else []  # where the kernel runs


def case(rows: int, in_features: int, out_features: int, where: str, **options: Any) -> Case:
    """Build a case; torch.compile is not a contestant, because it calls the same linear."""

    def inputs() -> tuple[Tensor, ...]:
        weight = torch.randn(out_features, in_features) * in_features**-0.5
        floats = torch.randn(rows, in_features), weight, torch.randn(out_features)
        return tuple(tensor.to(options["dtype"]) for tensor in floats)

    contestants = [Contestant("gafext", linear), Contestant("eager", F.linear)]
    if options["dtype"] == torch.float32 and torch.backends.mkl.is_available():
        contestants.append(Contestant("packed by MKL", linear_packed_by_mkl, prepare=pack_by_mkl))
    return Case(
        op="linear",
        shape=f"{rows},{in_features}->{out_features}",
        where=where,
        bound="compute",
        flops=2 * rows * in_features * out_features,
        inputs=inputs,
        contestants=contestants,
    )
