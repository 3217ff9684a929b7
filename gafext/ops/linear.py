"""Linear layer: on CPUs with AMX, in half precision on those that lack it, and on AMD's where MKL is slow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.ops import _common
from gafext.ops.backend import prefer, use_kernel

_OP = "linear"
_HAS_AMX = _common.INSTRUCTION_SET == "amx"
# Rows below which PyTorch's linear is faster with AMX. Two cores of a Sapphire Rapids, three runs, as gafext's
# speed over PyTorch's: 128 rows of 1280 features 1.15 to 1.25, of 5120 1.4, of 320 0.9; 64 and 77 rows 0.8 to 1.2.
# Without AMX this is torch's linear on Intel: weights packed once for MKL had 1.0 to 1.1 from 512 rows on and 1.2 to
# 1.3 below, which saved a hundredth of a U-Net's time and cost a second copy of the weights.
_WIDE, _FEW_ROWS, _FEW_NARROW_ROWS = 640, 128, 192
# By generation of Zen, the products from which the kernel is the faster one. Two cores of a Zen 5: 64 rows of 128
# features to 128 1.2 (1.4 on one core), 16 of 128 .8, 8 of 320 to 320 1.05, 2 of 1280 to 1280 1.05 to 1.7, one row at
# most 1.3. Of a Zen 4: float32 1.0 to 1.1 from 2^26 on, 1.05 to 1.2 from 2^28 on, .8 to 1.0 below; bfloat16 1.0 to 1.1
# from 2^28 on (1.1 to 1.3 for 8192 rows of 320 features), .9 to 1.0 below.
_MOST_SIZES = 1 << 20
_FEWEST_PRODUCTS = {
    4: {torch.float32: 1 << 26, torch.bfloat16: 1 << 28},
    5: {torch.float32: _MOST_SIZES},
}
_SOME_SIZES = ["compiled for all sizes, of which PyTorch computes some faster"]
_WITHOUT_AMX = [f"without AMX it is PyTorch's: the instruction set is {_common.INSTRUCTION_SET}"]
_FAST_HALF = ["this processor multiplies half precision, and PyTorch makes use of it"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Apply a linear layer.

    out = x weight^T + bias

    AMX multiplies each float32 as three bfloat16 terms: rounding errors are 0.4 to 0.9 times those of PyTorch's linear.
    Infinities, NaN and magnitudes at which the terms lose digits fall back to PyTorch's linear. Half precision is
    multiplied and summed in float32, and rounded once.

    Args:
        x: [..., in_features], float32, float16 or bfloat16.
        weight: [out_features, in_features], like x.
        bias: [out_features], like x, or None.
        backend: "auto" or "kernel"; "sdpa" and "reference" are both PyTorch's linear.

    Returns:
        [..., out_features], contiguous if the kernel ran.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the backend is "kernel" and does not support them.

    With "auto", inputs that the kernel does not support (`unsupported_reasons`) or that PyTorch computes faster
    (`slower_reasons`) fall back to torch's linear; torch.ops.gafext.linear runs the kernel on every CPU.
    """
    slower = slower_reasons(x, weight) if backend == "auto" else []
    if slower and _fits(x, weight, bias):  # what PyTorch computes ends here
        return F.linear(x, weight, bias)
    x, weight, bias = _common.autocast(x, weight, bias)
    check_linear(x, weight, bias)
    if use_kernel(backend, _OP, lambda: unsupported_reasons(x, weight, bias), lambda: slower):
        return _common.call_kernel(torch.ops.gafext.linear.default, x, weight, bias)
    return F.linear(x, weight, bias)


def linear_layer(layer: nn.Module, x: Tensor, *, residual: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Call a layer, through `linear` if it is a plain torch.nn.Linear on a CPU, and add a residual.

    Args:
        layer: a torch.nn.Linear, or a replacement (8-bit, wrapped, with hooks), which is called as it is.
        x: [...,in_features].
        residual: [...,out_features] or None; the layer adds it itself if its `adds_residual` is true.
        backend: as for `linear`, but "kernel" counts as "auto".

    Returns:
        [...,out_features].
    """
    if x.is_cpu and _is_plain(layer):
        out = linear(x, layer.weight, layer.bias, backend=prefer(backend))
    elif residual is not None and getattr(layer, "adds_residual", False):
        return layer(x, residual=residual)
    else:
        out = layer(x)
    return out if residual is None else residual + out


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether calling the layer is only the product: no hooks, no `forward` on the instance."""
    return (
        type(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in layer.__dict__
    )


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `check_linear` passes; one expression, because small products are fast."""
    return (
        weight.dim() == 2
        and x.dim() >= 1
        and x.shape[-1] == weight.shape[1]
        and (x.dtype == weight.dtype and x.device == weight.device)
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.device == x.device))
    )


def unsupported_reasons(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    """List why the kernel does not support tensors of matching shapes; empty when it does."""
    reasons = _common.place_reasons(x, weight, bias)
    if x.device.type not in ("cpu", "meta"):
        reasons.append(f"the kernel is for CPUs, got {x.device.type} tensors")
    return reasons + _common.dtype_reasons(x)


def slower_reasons(x: Tensor, weight: Tensor | None = None) -> list[str]:
    """List why PyTorch's operation is faster for inputs that the kernel supports; empty when it is not.

    Without `weight`, x [..., in_features] is taken to be projected to as many features.
    """
    if _common.is_slow_half(x):
        return []
    dtype = _common.computes_in(x)
    fewest = _fewest_products(x, dtype)
    if dtype in (torch.float16, torch.bfloat16) and fewest is None:
        return _FAST_HALF
    if not _HAS_AMX and fewest is None:
        return _WITHOUT_AMX
    if torch.compiler.is_compiling():  # the rest would add a guard on sizes
        return [] if fewest in (None, _MOST_SIZES) else _SOME_SIZES
    width = x.shape[-1] if x.dim() else 1
    if fewest is not None:
        outputs = width if weight is None else weight.shape[0]
        few = x.numel() < 2 * width or x.numel() * outputs < fewest
        return [f"fewer than {fewest} products, or one row, do not pay for calling the kernel"] if few else []
    few = _FEW_ROWS if width >= _WIDE else _FEW_NARROW_ROWS
    if x.numel() < few * width:
        return [f"fewer than {few} rows do not pay for splitting the weights"]
    return []


def _fewest_products(x: Tensor, dtype: torch.dtype) -> int | None:
    """Return from how many products on the kernel is the faster one without AMX; None where it never is."""
    if _HAS_AMX:
        return None
    if dtype == torch.bfloat16:  # in pairs, in rows of whole words; autocast keeps what it has cast of the weights
        in_pairs = x.shape[-1:].numel() % 2 == 0 and (x.dim() < 2 or x.stride(-2) % 2 == 0)
        if not (_common.BFLOAT16_PAIRS and in_pairs and x.dtype == dtype):
            return None
    return _FEWEST_PRODUCTS.get(_common.ZEN, {}).get(dtype)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raise a ValueError for tensors that do not match; the messages are those of its file in csrc/ops."""
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
    _common.require_supported(_OP, _common.dtype_reasons(x))
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the needed gradients of x [..., in_features], weight and bias from `grad` [..., out_features]."""
    rows = grad.reshape(math.prod(grad.shape[:-1]), weight.shape[0])  # not -1: there may be none
    grad_x = grad @ weight if needed[0] else None
    grad_weight = rows.T @ x.reshape(rows.shape[0], weight.shape[1]) if needed[1] else None
    return grad_x, grad_weight, rows.sum(dim=0) if needed[2] else None


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    return linear_backward(grad, x, weight, _common.gradients_needed(ctx))


_common.register_autograd("linear", _backward, setup_context=_common.save_x_and_weight)
