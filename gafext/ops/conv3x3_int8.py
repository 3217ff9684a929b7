"""3×3 convolution with 8-bit weights, on the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from gafext.ops import _common
from gafext.ops.backend import use_kernel
from gafext.ops.conv3x3 import (
    channel_reasons,
    check_addends,
    check_channels_last,
    check_shapes,
    copied_reasons,
    fake_result,
    place_reasons,
    reference_conv3x3,
)

_OP = "conv3x3_int8"
FEW_CHANNELS = 128
"""Number of channels of both sides below which the kernel is slower than float32's convolutions."""
_MAX_DIRECT_CHANNELS = 7281  # kMaxDirectChannels of csrc/ops/conv3x3_int8.h


def conv3x3_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve with a 3×3 kernel of 8-bit numbers, stride 1 and zero padding of 1.

    out[n, o, y, x] = bias[o] + residual[n, o, y, x]
                    + scale[o] (sum over i, j, c of weight[o, c, i, j] x[n, c, y + i - 1, x + j - 1])

    Winograd's F(4×4, 3×3), whose products are of 16-bit integers: transformed inputs and weights are rounded, with a
    scale for every 64 channels of a tile of 6×6 pixels. That error is 0.1 % of the result's norm, and more beside
    pixels that are many times as large, or of channels as large that an output hardly reads. What reads a NaN, an
    infinity or a magnitude above 1e37 is NaN, and so may be the rest of its 4×4 outputs.

    With AMX directly, by products of 8-bit integers: the inputs are rounded to 256 steps between the least and the
    largest number of a picture, or zero. That error is 0.3 to 1.5 % of the result's norm. A NaN or an infinity makes
    the picture NaN.

    Args:
        x: [batch, in_channels, height, width], float32, float16 or bfloat16; copied unless its memory format is
            channels-last.
        weight: [out_channels, in_channels, 3, 3], int8, as `quantize_weight` of `gafext.ops.linear_int8`; with AMX
            copied unless its memory format is channels-last (`prefers_channels_last`).
        scale: [out_channels], float32.
        bias: [out_channels], or one per image, [batch, out_channels], like x; or None.
        residual: [batch, out_channels, height, width], like x, or None.
        backend: "auto" or "kernel"; "sdpa" and "reference" are both PyTorch's conv2d with weights in float32.

    Returns:
        [batch, out_channels, height, width], channels-last if the kernel ran.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the backend is "kernel" and does not support them.

    With "auto", inputs that the kernel does not support (`unsupported_reasons`) or that PyTorch computes faster
    (`slower_reasons`) fall back to torch's conv2d; torch.ops.gafext.conv3x3_int8 always runs the kernel.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308).
    """
    x, bias, residual = _common.autocast(x, bias, residual)
    check_conv3x3_int8(x, weight, scale, bias, residual)

    def unsupported() -> list[str]:
        return unsupported_reasons(x, weight, scale, bias, residual)

    if not use_kernel(backend, _OP, unsupported, lambda: slower_reasons(x, weight)):
        return reference_conv3x3_int8(x, weight, scale, bias, residual)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    return torch.ops.gafext.conv3x3_int8(x, weight, scale, bias, residual)


def prefers_channels_last(weight: Tensor) -> bool:
    """Return whether the kernel copies a weight at each call unless its memory format is channels-last."""
    return _common.INT8_PRODUCTS.startswith("AMX") and weight.shape[1] <= _MAX_DIRECT_CHANNELS


def reference_conv3x3_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Compute the formula in plain PyTorch: any dtype of x, float64 included; differentiable."""
    wide = scale.dtype
    addends = (None if addend is None else addend.to(wide) for addend in (bias, residual))
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return reference_conv3x3(x.to(wide), weight.to(wide) * scale[:, None, None, None], *addends).to(x.dtype)


def unsupported_reasons(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> list[str]:
    """List why the kernel does not support tensors of matching shapes; empty when it does."""
    return place_reasons(x, scale, bias, residual) + _common.dtype_reasons(x) + channel_reasons(x)


def slower_reasons(x: Tensor, weight: Tensor) -> list[str]:
    """List why PyTorch's operation is faster for inputs that the kernel supports; empty when it is not.

    It never is for a small map: widening the weights takes 3 to 10 times as long as the kernel (1280 channels of 4×4).
    """
    reasons = copied_reasons(x)
    if min(weight.shape[:2]) < FEW_CHANNELS:
        reasons.append(f"fewer than {FEW_CHANNELS} channels: the transforms outweigh the products")
    if _common.INSTRUCTION_SET in ("portable", "neon"):
        reasons.append(f"the {_common.INSTRUCTION_SET} kernels have no fast products of 16-bit integers")
    return reasons


def check_conv3x3_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    """Raise a ValueError for tensors that do not match; the messages are those of its file in csrc/ops."""
    check_shapes(_OP, x, weight)
    _common.require(weight.dtype == torch.int8, _OP, lambda: f"weight must be int8, got {_common.dtype_name(weight)}")
    _common.require(weight.device == x.device, _OP, lambda: "weight must be on the device of x")
    _common.check_per_channel(_OP, x, weight, scale, None)
    check_addends(_OP, x, weight, bias, residual)


@torch.library.register_fake("gafext::conv3x3_int8")
def _fake(x, weight, scale, bias=None, residual=None):
    check_conv3x3_int8(x, weight, scale, bias, residual)
    _common.require_supported(_OP, _common.dtype_reasons(x))
    if residual is not None:
        check_channels_last(_OP, "residual", residual)
    return fake_result(_OP, x, weight, _common.dtype_reasons(x))
