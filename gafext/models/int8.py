"""Linear layers in 8-bit integers on CPUs, an option that trades accuracy for speed and memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gafext.models.blocks import MultiViewSpatialTransformer
from gafext.models.int8_conv import Int8Conv3x3, quantize_convolutions
from gafext.ops.linear_int8 import linear_int8, quantize_weight, slower_than_float32


class Int8Linear(nn.Module):
    """Linear layer with 8-bit weights, scaled per output channel, and 8-bit inputs, scaled per row at run time.

    y = s_x s_w (q_x q_wᵀ) + b,  q = round(value / s),  s_w = max |w| / 127 per channel, s_x = max |x| / 127 per row

    The weights take a quarter of float32's memory. The error is about 1 % of the result's norm.

    Args:
        linear: float32, on the CPU; its weights are not kept.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_weight(linear.weight)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [...,in_features] float32 to [...,out_features]."""
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"int8 linear layer: expected float32 on the CPU, got {x.dtype} on {x.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("int8 linear layer: expected an input without gradient, got one that needs it")
        return linear_int8(x, self.weight, self.scale, self.bias)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        raise ValueError(f"state_dict: expected floating-point weights, got 8-bit ones in {prefix.removesuffix('.')}")


def unsupported_reasons(device: torch.device) -> list[str]:
    """List why linear layers should not be in 8-bit integers; empty when they can."""
    if device.type != "cpu":
        return [f"8-bit linear layers are for CPUs, got {device.type}"]
    return slower_than_float32()


def require_supported(device: torch.device) -> None:
    """Raise a ValueError with the reasons if linear layers cannot be in 8-bit integers."""
    reasons = unsupported_reasons(device)
    if reasons:
        raise ValueError("dtype: expected one that this machine has, got int8: " + "; ".join(reasons))


def quantize(network: nn.Module) -> int:
    """Put a U-Net's linear layers and 3×3 convolutions in 8-bit integers, in place.

    They are the linear layers of the transformers (`quantize_transformers`) and the convolutions of at least 128
    channels on both sides (`quantize_convolutions`); the rest stays float32.

    Args:
        network: float32, on the CPU.

    Returns:
        Number of replaced layers.

    Raises:
        ValueError: as for `quantize_transformers`.
    """
    return quantize_transformers(network) + quantize_convolutions(network)


def quantize_transformers(network: nn.Module) -> int:
    """Replace the linear layers of every transformer of a U-Net by `Int8Linear`, in place.

    The time embedding, the convolutions and the image projection are not changed.

    Args:
        network: float32, on the CPU.

    Returns:
        Number of replaced layers.

    Raises:
        ValueError: the device or the processor does not support it, or the weights are not float32.
    """
    parameter = next(network.parameters())
    require_supported(parameter.device)
    if parameter.dtype != torch.float32:
        raise ValueError(f"quantize_transformers: expected float32 weights, got {parameter.dtype}")
    transformers = [module for module in network.modules() if isinstance(module, MultiViewSpatialTransformer)]
    parents = [parent for transformer in transformers for parent in transformer.modules()]
    count = 0
    for parent in parents:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
                count += 1
    return count


def is_quantized(network: nn.Module) -> bool:
    """Return whether a network has layers in 8-bit integers, and so can be neither moved nor saved."""
    return any(isinstance(module, (Int8Linear, Int8Conv3x3)) for module in network.modules())


def check_move(network: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Raise a ValueError if `network.to(...)` with these arguments would move or convert 8-bit weights."""
    # torch.nn.Module.to parses its arguments with this function; torch's stubs lack the module.
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    stays = dtype in (None, torch.float32) and torch.device(device or "cpu").type == "cpu"
    if is_quantized(network) and not stays:
        raise ValueError("to: expected float32 on the CPU for dtype='int8', got " + str(dtype or device))
