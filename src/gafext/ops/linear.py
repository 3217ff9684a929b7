"""A linear layer, on the tiles of a CPU with AMX."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.ops import _common

_OP = "linear"
_HAS_AMX = _common.INSTRUCTION_SET == "amx"
# Rows from which on it pays. Measured on two cores of a Sapphire Rapids, three runs: 128 rows of 1280 numbers 1.15x to
# 1.25x PyTorch's, of 5120 1.4x, of 320 0.9x; 64 and 77 rows 0.8x to 1.2x from run to run.
_WIDE, _FEW_ROWS, _FEW_NARROW_ROWS = 640, 128, 192


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer.

    out = x weight^T + bias

    AMX multiplies each float32 as three bfloat16: rounding errors are 0.4 to 0.9 times those of PyTorch's linear, and
    infinities, NaN and numbers so huge or so tiny that this would go wrong are left to that one. On two
    cores of a Sapphire Rapids it is 1.1 to 1.8 times as fast from 256 rows on. Weights packed once for MKL gained 1.0
    to 1.1 from 512 rows on and 1.2 to 1.3 below, at the price of a second copy in memory: a hundredth of a U-Net's
    time, so that without AMX this is torch's linear.

    Args:
        x: [..., in_features], float32.
        weight: [out_features, in_features], like x.
        bias: [out_features], like x, or None.

    Returns:
        [..., out_features], contiguous where the kernel ran.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.

    What the kernel cannot serve (see `unsupported_reasons`) or PyTorch serves faster (see `slower_reasons`) goes to
    torch's linear; torch.ops.gafext.linear is always the kernel, where there is one.
    """
    if _fits(x, weight, bias) and slower_reasons(x):
        return F.linear(x, weight, bias)
    x, weight, bias = _common.autocast(x, weight, bias)
    check_linear(x, weight, bias)
    if unsupported_reasons(x, weight, bias) or slower_reasons(x):
        return F.linear(x, weight, bias)
    return torch.ops.gafext.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `check_linear` would let the tensors through; in one expression, as this comes before small products."""
    return (
        weight.dim() == 2
        and x.dim() >= 1
        and x.shape[-1] == weight.shape[1]
        and (x.dtype == weight.dtype and x.device == weight.device)
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.device == x.device))
    )


def unsupported_reasons(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    """Why the kernel cannot serve tensors of matching shapes; empty when it can."""
    reasons = _common.place_reasons(x, weight, bias)
    if x.device.type not in ("cpu", "meta"):
        reasons.append(f"the kernel is for CPUs, got {x.device.type} tensors")
    if x.dtype != torch.float32:
        reasons.append(f"dtype must be float32, got {_common.dtype_name(x)}")
    return reasons


def slower_reasons(x: Tensor) -> list[str]:
    """Why PyTorch's own operation is the faster one for what the kernel could serve too; empty when it is not."""
    if not _HAS_AMX:
        return [f"without AMX it is PyTorch's: the instruction set is {_common.INSTRUCTION_SET}"]
    if torch.compiler.is_compiling():  # where this would be a guard on sizes
        return []
    few = _FEW_ROWS if x.shape[-1] >= _WIDE else _FEW_NARROW_ROWS
    if x.numel() < few * x.shape[-1]:
        return [f"fewer than {few} rows do not pay for splitting the weights"]
    return []


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raises ValueError for tensors that do not go together, in the words of csrc/checks.h."""
    shape = tuple(weight.shape)
    _common.require(weight.dim() == 2, _OP, lambda: f"weight must have shape (out_features, in_features), got {shape}")
    _common.require(
        x.dim() >= 1 and x.shape[-1] == shape[1],
        _OP,
        lambda: f"x must have shape (..., {shape[1]}) to go with weight {shape}, got {tuple(x.shape)}",
    )
    _common.check_weight_and_bias(_OP, x, weight, bias)


@torch.library.register_fake("gafext::linear")
def _fake(x, weight, bias=None):
    check_linear(x, weight, bias)
    _common.require(x.dtype == torch.float32, _OP, lambda: f"dtype must be float32, got {_common.dtype_name(x)}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for x [..., in_features], weight and bias of the result's, `grad` [..., out_features]."""
    rows = grad.reshape(-1, weight.shape[0])
    grad_x = grad @ weight if needed[0] else None
    grad_weight = rows.T @ x.reshape(rows.shape[0], -1) if needed[1] else None
    return grad_x, grad_weight, rows.sum(dim=0) if needed[2] else None


def _backward(ctx, grad):
    return linear_backward(grad, *ctx.saved_tensors, _common.gradients_wanted(ctx))


torch.library.register_autograd("gafext::linear", _backward, setup_context=_common.save_x_and_weight)
