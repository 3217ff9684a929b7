"""A linear layer, on a CPU with AMX."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.ops import _common

_OP = "linear"
_HAS_AMX = _common.INSTRUCTION_SET == "amx"
_FEW_ROWS = 64
_FEW_PRODUCTS = 1 << 24


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """A linear layer and, with `residual`, the sum after it.

    out = x weight^T + bias + residual

    Args:
        x: [..., in_features]
        weight: [out_features, in_features], like x.
        bias: [out_features], like x, or None.
        residual: [..., out_features], like x, or None.

    Returns:
        [..., out_features], contiguous where the kernel ran.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    x, weight, bias, residual = _common.autocast(x, weight, bias, residual)
    check_linear(x, weight, bias, residual)
    if unsupported_reasons(x, weight, bias, residual) or slower_reasons(x, weight):
        return reference_linear(x, weight, bias, residual)
    return torch.ops.gafext.linear(x, weight, bias, residual)


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch: any dtype, float64 too; differentiable."""
    out = F.linear(x, weight, bias)
    return out if residual is None else residual + out


def unsupported_reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> list[str]:
    """Why the kernel cannot serve tensors of matching shapes; empty when it can."""
    reasons = _common.place_reasons(x, weight, bias, residual)
    if x.device.type not in ("cpu", "meta"):
        reasons.append(f"the kernel is for CPUs, got {x.device.type} tensors")
    if x.dtype != torch.float32:
        reasons.append(f"dtype must be float32, got {_common.dtype_name(x)}")
    return reasons


def slower_reasons(x: Tensor, weight: Tensor) -> list[str]:
    """Why PyTorch's own operation is the faster one for what the kernel could serve too; empty when it is not."""
    if not _HAS_AMX:
        return ["this processor has no AMX, or this build no kernels for it"]
    return []


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    """Raises ValueError for tensors that do not go together, in the words of csrc/checks.h."""
    shape = tuple(weight.shape)
    _common.require(
        weight.dim() == 2, _OP, lambda: f"weight must have shape (out_features, in_features), got {shape}"
    )
    _common.require(
        x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        _OP,
        lambda: f"x must have shape (..., {shape[1]}) to go with weight {shape}, got {tuple(x.shape)}",
    )
    _common.check_weight_and_bias(_OP, x, weight, bias)


@torch.library.register_fake("gafext::linear")
def _fake(x, weight, bias=None, residual=None):
    check_linear(x, weight, bias, residual)
    return x.new_empty(*x.shape[:-1], weight.shape[0])
