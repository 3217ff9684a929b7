"""Convolutions of few positions as a product of patches, on the CPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.ops import _common
from gafext.ops.linear import linear


def convolve_patches(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int, padding: int) -> Tensor:
    """Convolve as torch's conv2d does, by one product: out = W p + b for each patch p of x.

    Args:
        x: [batch, in_channels, height, width].
        weight: [out_channels, in_channels, kernel_height, kernel_width], like x.
        bias: [out_channels], like x, or None.
        stride: from patch to patch.
        padding: zeros on every side.

    Returns:
        [batch, out_channels, out_height, out_width], channels-last.
    """
    patches = patches_of(x, tuple(weight.shape[2:]), stride=stride, padding=padding)
    return linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)


def patches_of(x: Tensor, kernel: tuple[int, ...], *, stride: int = 1, padding: int) -> Tensor:
    """Copy what a kernel of (rows, columns) sees at each of its positions: [B,C,H,W] -> [B,h,w,C*rows*columns]."""
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    rows, columns = kernel
    height, width = pixels.shape[1] - rows + 1, pixels.shape[2] - columns + 1
    taps = [pixels[:, i : i + height : stride, j : j + width : stride] for i in range(rows) for j in range(columns)]
    return taps[0] if len(taps) == 1 else torch.stack(taps, dim=-1).flatten(3)


def patches_are_faster(layer: nn.Conv2d, x: Tensor) -> bool:
    """Return whether the weights of a layer without groups outweigh the map: oneDNN reorders them at each call.

    Measured on one thread of an EPYC with AVX2: 3.3 for 1280 channels of 8x8 to 4x4 and batch 8, 7 for batch 2; 1.0 to
    1.7 for 1x1 kernels; 0.6 for 320 channels of 32x32 to 16x16 and batch 8. AVX-512 and AMX were not measured.
    """
    fits = x.dtype == torch.float32 and x.dim() == 4 and x.is_cpu and not torch.compiler.is_compiling()
    if not fits or _common.INSTRUCTION_SET == "amx" or not _is_square(layer):
        return False
    sides = [(x.shape[2 + i] + 2 * int(layer.padding[i]) - layer.kernel_size[i]) // layer.stride[i] + 1 for i in (0, 1)]
    return min(sides) > 0 and 0 < x.shape[0] * math.prod(sides) < layer.out_channels


def _is_square(layer: nn.Conv2d) -> bool:
    """Return whether the layer has one stride, one padding, and a kernel of at most 3×3."""
    return (
        isinstance(layer.padding[0], int)
        and (len(set(layer.stride)), len(set(layer.padding))) == (1, 1)
        and max(layer.kernel_size) <= 3
    )
