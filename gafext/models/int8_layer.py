"""What linear layers and convolutions with 8-bit weights share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gafext.ops.linear_int8 import quantize_weight


class Int8Layer(nn.Module):
    """Layer of 8-bit weights with a scale in float32 per output channel, neither of which a conversion changes.

    Args:
        weight: [out, ...], floating point; it is rounded by `quantize_weight`, and not kept.
        bias: [out], or None; like a layer's input, and converted like one.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        rounded, scale = quantize_weight(weight)
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Int8Layer:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype in (torch.float16, torch.bfloat16):
            self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight, errors = state_dict.get(f"{prefix}weight"), args[-1]
        if weight is None or weight.dtype == torch.int8:
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:  # copied into integers, its fractions would be lost
            errors.append(f"{prefix}weight: expected 8-bit integers, got {weight.dtype}: load it before it is rounded")

    def _check(self, x: Tensor) -> None:
        if x.device.type != "cpu":
            raise ValueError(f"int8 layer: expected an input on the CPU, got {x.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("int8 layer: expected an input without gradient, got one that needs it")
