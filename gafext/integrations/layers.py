"""PyTorch's own layers, computed by gafext's operations.

Each class has no state of its own: a layer of the class that it derives from becomes one by assigning `__class__`, and
goes back the same way. Another class's `forward` is called by that class's name, never with `super()`: a bound forward
that somebody keeps still works once the layer has gone back.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.ops import conv3x3, group_norm_silu, linear

# Fewer output channels are a network's result, not features: callers may call `view` on it, as on the stock network's.
_FEATURES = 16
_LAID_OUT: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by `lay_out`, until `give_layout_back`


def register_names() -> None:
    """Make "gafext" known to the parts of transformers and diffusers that choose an attention by name, if imported."""
    if "transformers.modeling_utils" in sys.modules:
        from gafext.integrations.transformers import register_attention

        register_attention()
    if "diffusers.models.attention_dispatch" in sys.modules:
        from gafext.integrations.dispatch import register_attention_backend

        register_attention_backend()


def set_state(self: nn.Module, state: dict[str, Any]) -> None:
    """Unpickle a layer, as its class's `__setstate__`: its network may name what this process has not registered."""
    nn.Module.__setstate__(self, state)
    register_names()


class Linear(nn.Linear):
    __setstate__ = set_state

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias) if input.is_cpu else nn.Linear.forward(self, input)


class Conv2d(nn.Conv2d):
    __setstate__ = set_state

    def forward(self, input: Tensor) -> Tensor:
        # peft's adapters make 1×1 convolutions of the class of the layer that they adapt.
        if input.dim() != 4 or not is_conv3x3(self):
            return nn.Conv2d.forward(self, input)
        out = conv3x3(input, self.weight, self.bias)
        return out.contiguous() if self.out_channels < _FEATURES else out


class GroupNorm(nn.GroupNorm):
    __setstate__ = set_state

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4) or not _is_of_dtype(self, input):
            return nn.GroupNorm.forward(self, input)
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, silu=False)


def is_conv3x3(layer: nn.Conv2d) -> bool:
    """Return whether a convolution is the operation `conv3x3`."""
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return plain and layer.kernel_size == (3, 3) and layer.stride == (1, 1) and layer.padding in ((1, 1), "same")


def lay_out(layer: nn.Module) -> None:
    """Store a 3×3 convolution's channels-last weight in the default order, which the kernel reads.

    No `forward` does: states of a fused optimizer have the layout of their weight, and a weight that is replaced in
    inference mode cannot be trained any more. So the kernel copies, in each call, weights of layers in training and
    those that become channels-last later.
    """
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or layer.training or not weight.is_cpu or weight.is_inference():
        return
    if weight.is_contiguous(memory_format=torch.channels_last):
        _store(weight, torch.contiguous_format)
        _LAID_OUT.add(layer)


def give_layout_back(layer: nn.Module) -> None:
    """Undo `lay_out`."""
    if layer in _LAID_OUT:
        _LAID_OUT.discard(layer)
        if isinstance(layer.weight, nn.Parameter) and not layer.weight.is_inference():
            _store(layer.weight, torch.channels_last)


def _store(weight: nn.Parameter, memory_format: torch.memory_format) -> None:
    with torch.inference_mode(False):
        weight.data = weight.data.contiguous(memory_format=memory_format)


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
