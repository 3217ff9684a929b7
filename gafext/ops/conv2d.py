"""Convolutions of any kernel, by PyTorch, in an arithmetic that the CPU has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.ops import _common
from gafext.ops.linear import linear
from gafext.ops.patches import convolve_patches, patches_are_faster


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: Any = 0,
) -> Tensor:
    """Convolve as torch's conv2d does, in half precision on any CPU.

    On a CPU a 1×1 kernel is `linear`: oneDNN's takes 1.1 to 1.3 times as long from 640 channels on (one thread of a
    Zen 4), and its sums depend on the number of threads. Where the CPU has no half-precision products, PyTorch's
    half-precision convolution takes 5 to 20 times as long as its float32 one: there other kernels are convolved in
    float32 and rounded once.

    Args:
        x: [batch, in_channels, height, width].
        weight: [out_channels, in_channels, kernel_height, kernel_width], like x.
        bias: [out_channels], like x, or None.
        stride: as for torch's conv2d.
        padding: as for torch's conv2d: a number, one per dimension, or "same".

    Returns:
        [batch, out_channels, out_height, out_width].
    """
    x, weight, bias = _common.autocast(x, weight, bias)
    if _is_pointwise(x, weight, stride, padding) and weight.shape[1] == x.shape[1] and weight.dtype == x.dtype:
        return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    if not _common.is_slow_half(x) or weight.dtype != x.dtype:
        return F.conv2d(x, weight, bias, stride=stride, padding=padding)
    wide_bias = None if bias is None else bias.float()
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x.float(), weight.float(), wide_bias, stride=stride, padding=padding).to(x.dtype)


def conv2d_layer(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Compute a layer's convolution, by `conv2d` or `convolve_patches` where that is faster than torch.nn.Conv2d's.

    Args:
        layer: the weights, stride and padding; its hooks are not called.
        x: [batch, in_channels, height, width].

    Returns:
        [batch, out_channels, out_height, out_width], channels-last on a CPU.
    """
    if x.is_cpu and x.dim() == 4 and x.layout == torch.strided and not _common.is_transformed():
        # 1.1 to 2 times as fast, and what the other operations work in
        x = x.contiguous(memory_format=torch.channels_last)
    pointwise = _is_pointwise(x, layer.weight, layer.stride, layer.padding)
    if _is_simple(layer) and (pointwise or _common.is_slow_half(x)):
        return conv2d(x, layer.weight, layer.bias, stride=layer.stride, padding=layer.padding)
    if _is_simple(layer) and patches_are_faster(layer, x):
        return convolve_patches(x, layer.weight, layer.bias, stride=layer.stride[0], padding=int(layer.padding[0]))
    return nn.Conv2d.forward(layer, x)


def _is_simple(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and (layer.groups, layer.dilation) == (1, (1, 1))


def _is_pointwise(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> bool:
    one = weight.shape[2:] == (1, 1) and stride in (1, (1, 1)) and padding in (0, (0, 0))
    return one and x.is_cpu and x.dim() == 4
