"""Linear layers and convolutions in 8-bit integers on CPUs, an option that trades accuracy for speed and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gafext.models.blocks import Conv2d, Conv3x3, MultiViewSpatialTransformer
from gafext.models.int8_conv import Int8Conv3x3, Int8PatchConv
from gafext.models.int8_layer import Int8Layer
from gafext.ops.conv3x3_int8 import FEW_CHANNELS
from gafext.ops.geglu_int8 import geglu_int8
from gafext.ops.linear_int8 import linear_int8, slower_than_float32
from gafext.weights import WeightFile

IN_8_BITS: dict[str, torch.dtype | None] = {"int8": None, "int8-bfloat16": torch.bfloat16}
"""Names of the dtypes in 8 bits, and what the rest has; None: float32, or as the checkpoint was saved."""
QUANTIZATION = {"quantization_config": {"quant_method": "gafext_int8"}}
"""What `config.json` says of a network with 8-bit layers, under the key that diffusers refuses unknown methods by."""


class Int8Linear(Int8Layer):
    """Linear layer with 8-bit weights, scaled per output channel, and 8-bit inputs, scaled per row at run time.

    y = s_x s_w (q_x q_wᵀ) + b,  q = round(value / s),  s_w = max |w| / 127 per channel, s_x = max |x| / 127 per row

    The weights take a quarter of float32's memory. The error is about 1 % of the result's norm.

    Args:
        linear: float32, on the CPU; its weights are not kept.
    """

    adds_residual = True  # for `linear_layer`

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.weight, linear.bias)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Map [...,in_features] to [...,out_features], and add `residual` [...,out_features]."""
        if x.requires_grad or not x.is_cpu:
            self._check(x)
        return linear_int8(x, self.weight, self.scale, self.bias, residual)

    def geglu(self, x: Tensor) -> Tensor:
        """Map [...,in_features] to [...,out_features/2], the first half times the GELU of the second."""
        self._check(x)
        return geglu_int8(x, self.weight, self.scale, self.bias)


_LAYERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Linear: Int8Linear,
    Conv3x3: Int8Conv3x3,
    Conv2d: Int8PatchConv,
    nn.Conv2d: Int8PatchConv,
}
"""8-bit form of each kind of layer."""


def unsupported_reasons(device: torch.device) -> list[str]:
    """List why layers should not be in 8-bit integers; empty when they can."""
    if device.type != "cpu":
        return [f"8-bit layers are for CPUs (device='cpu'), got {device.type}"]
    return slower_than_float32()


def require_supported(device: torch.device) -> None:
    """Raise a ValueError with the reasons if layers cannot be in 8-bit integers."""
    reasons = unsupported_reasons(device)
    if reasons:
        raise ValueError("dtype: expected one that this machine has, got int8: " + "; ".join(reasons))


def quantize(network: nn.Module) -> int:
    """Put a U-Net's linear layers and convolutions in 8-bit integers, in place.

    They are the linear layers of the transformers (`quantize_transformers`) and the convolutions of at least 128
    channels on both sides (`quantize_convolutions`), but for what ends the last stage's residual blocks, `conv2` and
    `conv_shortcut`, whose rounding nothing after them averages out. The rest stays as it is. Of a stock U-Net of SD 2.1
    in bfloat16, with and without AMX: error 2.4 and 2.0 %; with all of the last stage in 8 bits 2.8 and 2.3 %; with
    none of its residual blocks 2.2 and 1.9 %, which takes 2.5 % longer.

    Args:
        network: float32 or bfloat16, on the CPU.

    Returns:
        Number of replaced layers.

    Raises:
        ValueError: as for `quantize_transformers`.
    """
    blocks = getattr(network, "up_blocks", None)
    last = "" if blocks is None else f"up_blocks.{len(blocks) - 1}.resnets."

    def ends_it(path: str) -> bool:
        return bool(last) and path.startswith(last) and not path.endswith(".conv1")

    return quantize_transformers(network) + quantize_convolutions(network, without=ends_it)


def quantize_transformers(network: nn.Module) -> int:
    """Replace the linear layers of every transformer of a U-Net by `Int8Linear`, in place.

    The time embedding, the convolutions and the image projection are not changed.

    Args:
        network: float32 or bfloat16, on the CPU.

    Returns:
        Number of replaced layers.

    Raises:
        ValueError: the device or the processor does not support it, or the weights are neither float32 nor bfloat16.
    """
    parameter = next(network.parameters())
    require_supported(parameter.device)
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"quantize_transformers: expected float32 or bfloat16 weights, got {parameter.dtype}")
    transformers = [module for module in network.modules() if isinstance(module, MultiViewSpatialTransformer)]
    return sum(_replace(transformer, lambda _, layer: type(layer) is nn.Linear) for transformer in transformers)


def quantize_convolutions(
    network: nn.Module, *, min_channels: int = FEW_CHANNELS, without: Callable[[str], bool] = lambda path: False
) -> int:
    """Replace the convolutions of at least `min_channels` on both sides by their 8-bit forms, in place.

    Args:
        network: float32 or bfloat16.
        min_channels: least number of channels of both sides.
        without: whether the convolution of a path stays as it is.

    Returns:
        Number of replaced layers.
    """

    def is_wide(path: str, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Conv2d) and not without(path) and min(layer.weight.shape[:2]) >= min_channels

    return _replace(network, is_wide)


def _replace(network: nn.Module, chosen: Callable[[str, nn.Module], bool]) -> int:
    """Replace the layers that are chosen, by their path and themselves, by their 8-bit forms."""
    count = 0
    for path, parent in list(network.named_modules()):
        for name, child in parent.named_children():
            if type(child) in _LAYERS and chosen(f"{path}.{name}".lstrip("."), child):
                setattr(parent, name, _LAYERS[type(child)](child))
                count += 1
    return count


def replace_stored(network: nn.Module, file: WeightFile, *, dtype: torch.dtype | None, device: torch.device) -> None:
    """Replace the layers whose weights a file has in 8-bit integers, so that the file can be loaded.

    Args:
        network: on the meta device.
        file: weights with the network's names; 8-bit integers mark an 8-bit layer.
        dtype: what the caller was asked to load; must be None for such a file.
        device: where the weights will be; "meta" for checking names and shapes alone.

    Raises:
        ValueError: the file has 8-bit layers, and a dtype was asked for, or this machine does not support them.
    """
    stored = {key.removesuffix(".weight") for key in file if file.kind(key) == "I8"}
    if not stored:
        return
    advice = "To have them otherwise, load the checkpoint that they were rounded from"
    if dtype is not None:
        raise ValueError(f"dtype: expected 'int8' or None for the 8-bit weights of {file.path}, got {dtype}. {advice}")
    reasons = [] if device.type == "meta" else unsupported_reasons(device)
    if reasons:
        raise ValueError(f"{file.path}: expected a machine for 8-bit weights, but {'; '.join(reasons)}. {advice}")
    _replace(network, lambda path, _: path in stored)


def is_quantized(network: nn.Module) -> bool:
    """Return whether a network has layers in 8-bit integers, and so can be neither moved nor converted."""
    return any(isinstance(module, Int8Layer) for module in network.modules())


def dtype_name(network: nn.Module) -> str:
    """Return the name that `from_pretrained` knows a network's dtype by."""
    floats = str(next(network.parameters()).dtype).removeprefix("torch.")
    if not is_quantized(network):
        return floats
    return "int8" if floats == "float32" else f"int8-{floats}"


def require_floats(network: nn.Module, name: str) -> None:
    """Raise a ValueError that begins with `name` if a network has layers in 8-bit integers."""
    if is_quantized(network):
        raise ValueError(
            f"{name}: expected floating-point weights, got 8-bit ones: make the change before they are rounded, "
            "from_pretrained(..., dtype='int8') of a floating-point checkpoint with its other arguments"
        )


def check_move(network: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Raise a ValueError if `network.to(...)` with these arguments would move or convert 8-bit weights."""
    # torch.nn.Module.to parses its arguments with this function; torch's stubs lack the module.
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    stays = dtype in (None, torch.float32) and torch.device(device or "cpu").type == "cpu"
    if is_quantized(network) and not stays:
        raise ValueError("to: expected float32 on the CPU for dtype='int8', got " + str(dtype or device))
