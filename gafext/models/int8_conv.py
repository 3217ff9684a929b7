"""3×3 convolutions with 8-bit weights, an option that trades accuracy for speed on CPUs."""

from __future__ import annotations

from torch import Tensor, nn

from gafext.models.blocks import Conv3x3
from gafext.ops import conv3x3_int8
from gafext.ops.backend import prefer
from gafext.ops.conv3x3 import FEW_CHANNELS
from gafext.ops.linear_int8 import quantize_weight


class Int8Conv3x3(nn.Module):
    """3×3 convolution with zero padding of 1 and 8-bit weights, scaled per output channel.

    The error is about 1 % of the result's norm.

    Args:
        conv: float32; its weights are not kept.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, conv: Conv3x3):
        super().__init__()
        weight, scale = quantize_weight(conv.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = conv.bias
        self.attention_backend = conv.attention_backend

    def forward(self, x: Tensor, *, addend: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Convolve [B,Cin,h,w] to [B,Cout,h,w], and add `addend` [B,Cout] and `residual` [B,Cout,h,w]."""
        out = conv3x3_int8(x, self.weight, self.scale, self.bias, backend=prefer(self.attention_backend))
        out = out if addend is None else out + addend[:, :, None, None]
        return out if residual is None else residual + out


def quantize_convolutions(network: nn.Module) -> int:
    """Replace the 3×3 convolutions that are wide enough for the kernel by `Int8Conv3x3`, in place.

    Args:
        network: float32.

    Returns:
        Number of replaced layers.
    """
    count = 0
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is Conv3x3 and min(child.weight.shape[:2]) >= FEW_CHANNELS:
                setattr(parent, name, Int8Conv3x3(child))
                count += 1
    return count
