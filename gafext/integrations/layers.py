"""PyTorch's own layers, computed by gafext's operations.

Each class has no state of its own: a layer of the class that it derives from becomes one by assigning `__class__`, and
goes back the same way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.ops import conv3x3, group_norm_silu, linear

# Fewer output channels are a network's result, not features: callers may call `view` on it, as on the stock network's.
_FEATURES = 16


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias) if input.is_cpu else super().forward(input)


class Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        # peft's adapters make 1×1 convolutions of the class of the layer that they adapt.
        if input.dim() != 4 or not is_conv3x3(self):
            return super().forward(input)
        if input.is_cpu and not (self.weight.is_contiguous() or torch.compiler.is_compiling()):
            self.weight.data = self.weight.data.contiguous()  # once: the kernel would copy channels-last weights
        out = conv3x3(input, self.weight, self.bias)
        return out.contiguous() if self.out_channels < _FEATURES else out


class GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4) or not _is_of_dtype(self, input):
            return super().forward(input)
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, silu=False)


def is_conv3x3(layer: nn.Conv2d) -> bool:
    """Return whether a convolution is the operation `conv3x3`."""
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return plain and layer.kernel_size == (3, 3) and layer.stride == (1, 1) and layer.padding in ((1, 1), "same")


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling the layer is exactly the `forward` of `kind`, with no hook around it."""
    return (
        type(layer) is kind
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )


def _is_of_dtype(norm: nn.Module, x: Tensor) -> bool:
    """Return whether a norm's weights have the dtype of x, or autocast gives both one: PyTorch's may mix two."""
    weight = norm.weight
    return not isinstance(weight, Tensor) or weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a group normalisation and SiLU: in one operation, unless a hook or an adapter wants the norm's result."""
    if is_plain(norm, GroupNorm) and _is_of_dtype(norm, x):
        assert isinstance(norm, GroupNorm)
        return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(norm(x))
