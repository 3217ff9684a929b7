"""Convolutions with 8-bit weights, an option that trades accuracy for speed and memory on CPUs."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.models.blocks import Conv3x3
from gafext.models.int8_layer import Int8Layer
from gafext.ops import conv3x3_int8, linear_int8
from gafext.ops.backend import prefer
from gafext.ops.conv3x3_int8 import prefers_channels_last


class Int8Conv3x3(Int8Layer):
    """3×3 convolution with zero padding of 1 and 8-bit weights, scaled per output channel.

    The error is about 1 % of the result's norm.

    Args:
        conv: float32; its weights are not kept.
    """

    def __init__(self, conv: Conv3x3):
        super().__init__(conv.weight, conv.bias)
        self.attention_backend = conv.attention_backend

    def forward(self, x: Tensor, *, addend: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Convolve [B,Cin,h,w] to [B,Cout,h,w], and add `addend` [B,Cout] and `residual` [B,Cout,h,w]."""
        if self.weight.is_contiguous() and prefers_channels_last(self.weight):
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)  # once: the kernel would copy it
        bias = self.bias if addend is None else addend if self.bias is None else addend + self.bias
        return conv3x3_int8(x, self.weight, self.scale, bias, residual, backend=prefer(self.attention_backend))


class Int8PatchConv(Int8Layer):
    """Convolution of any square kernel and stride as an 8-bit linear layer of each output pixel's patch.

    The patches are copied: at stride 2, 9/4 of the input for a 3×3 kernel; with a 1×1 kernel they are the pixels.

    Args:
        conv: float32, with zero padding, without groups and dilation; its weights are not kept.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)  # [out, kernel * kernel * in]
        self.kernel, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], cast("int", conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        """Map [B,in_channels,h,w] to [B,out_channels,h',w'], channels-last."""
        self._check(x)
        pixels = x.movedim(1, -1)
        if self.kernel > 1 or self.stride > 1:
            sides = (self.padding,) * 2
            windows = F.pad(pixels, (0, 0, *sides, *sides))
            for side in (1, 2):
                windows = windows.unfold(side, self.kernel, self.stride)
            pixels = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return linear_int8(pixels, self.weight, self.scale, self.bias).movedim(-1, 1)
