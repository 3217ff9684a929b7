"""Linear layer with 8-bit weights and inputs, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from gafext.ops import _common
from gafext.ops.backend import use_kernel

_OP = "linear_int8"
MAX_FEATURES = 65536  # kMaxInt8Features of csrc/ops/linear_int8.h
_TINY = 2.0**-126


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Apply a linear layer whose weights are 8-bit integers, rounding the inputs to 8 bits row by row.

    out = s_x scale (q weight^T) + bias + residual,  q = round(x / s_x),  s_x = max |x| / 127 of each row

    The products are added up exactly, in 32-bit integers: the result is the same on every processor and any number of
    threads, up to the rounding of x / s_x and of the scales in float32. The whole row of an infinity or a NaN is NaN.

    Args:
        x: [..., in_features], float32, float16 or bfloat16, on the CPU.
        weight: [out_features, in_features], int8, at most 65536 in_features.
        scale: [out_features], float32: what a unit of `weight` stands for, per output feature.
        bias: [out_features], like x, or None.
        residual: [..., out_features], like x, or None.
        backend: "auto" or "kernel"; "sdpa" and "reference" are both the formula in plain PyTorch.

    Returns:
        [..., out_features], contiguous if the kernel ran.

    Raises:
        ValueError: shapes, dtypes or devices do not match, x needs a gradient, which rounding does not have, or the
            backend is "kernel" and does not support them.

    Inputs that the kernel does not support (`unsupported_reasons`) fall back to the formula in plain PyTorch.
    """
    if backend == "auto" and _is_plain(x, weight, scale, bias, residual):
        return torch.ops.gafext.linear_int8(x, weight, scale, bias, residual)
    x, bias, residual = _common.autocast(x, bias, residual)
    check_linear_int8(x, weight, scale, bias)
    check_residual(x, weight, residual)
    if use_kernel(backend, _OP, lambda: unsupported_reasons(x, weight, scale, bias, residual)):
        return torch.ops.gafext.linear_int8(x, weight, scale, bias, residual)
    require_no_gradient(_OP, x)
    return reference_linear_int8(x, weight, scale, bias, residual)


def reference_linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Compute the formula in plain PyTorch, products in float64: exact, on any device that has it."""
    wide = x if x.dtype == torch.float64 else x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)
    of_row = torch.where(largest.isfinite(), (largest / 127).clamp_min(_TINY), torch.nan)
    sums = (wide * (1 / of_row)).round().double() @ weight.double().mT
    out = sums.to(wide.dtype) * (of_row * scale)
    for addend in (bias, residual):
        out = out if addend is None else out + addend
    return out.to(x.dtype)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits per output feature.

    weight ~ scale q,  q = round(weight / scale),  scale = max |weight| / 127 of each output feature

    Args:
        weight: [out_features, ...], floating point.

    Returns:
        q like weight, int8, and scale [out_features], float32.
    """
    rows = weight.detach().float().flatten(1)
    scale = (rows.abs().amax(dim=1) / 127).clamp_min(_TINY)
    return (rows / scale[:, None]).round().to(torch.int8).view(weight.shape), scale


def unsupported_reasons(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> list[str]:
    """List why the kernel does not support tensors of matching shapes; empty when it does."""
    reasons = _common.place_reasons(x, scale, bias, residual)
    if x.device.type not in ("cpu", "meta"):
        reasons.append(f"the kernel is for CPUs, got {x.device.type} tensors")
    return reasons + kernel_reasons(x, weight)


def slower_than_float32() -> list[str]:
    """List why a linear layer in float32 is faster on this processor; empty when it is not."""
    has_products = {"portable": False, "neon": _common.INT8_PRODUCTS == "SDOT"}.get(_common.INSTRUCTION_SET, True)
    if has_products:
        return []
    return ["without AVX2 or SDOT there are no fast products of small integers: float32 is faster"]


def kernel_reasons(x: Tensor, weight: Tensor) -> list[str]:
    """List why the kernels do not support the dtype or the size; empty when they do."""
    reasons = _common.dtype_reasons(x)
    if weight.shape[1] > MAX_FEATURES:
        reasons.append(f"in_features must be at most {MAX_FEATURES}, got {int(weight.shape[1])}")
    return reasons


def _is_plain(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Return whether the checks pass and the kernel supports tensors without gradient on the CPU.

    False only means that the individual checks have to run. A network that a large product has just driven out of the
    caches takes 0.1 ms for them, 200 times a pass.
    """
    dtype = x.dtype
    return (
        not torch.compiler.is_compiling()  # this expression would add guards
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _common.is_transformed())
        and (x.is_cpu and weight.is_cpu and scale.is_cpu and dtype in _common.KERNEL_DTYPES)
        and (weight.dtype == torch.int8 and scale.dtype == torch.float32)
        and (weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1] <= MAX_FEATURES)
        and scale.shape == weight.shape[:1]
        and (bias is None or (bias.shape == scale.shape and bias.dtype == dtype and bias.is_cpu))
        and (residual is None or (residual.dtype == dtype and residual.is_cpu))
        and (residual is None or residual.shape == (*x.shape[:-1], weight.shape[0]))
    )


def check_linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, op: str = _OP) -> None:
    """Raise a ValueError for tensors that do not match; the messages are those of its file in csrc/ops."""
    shape = tuple(weight.shape)
    _common.require(weight.dim() == 2, op, lambda: f"weight must have shape (out_features, in_features), got {shape}")
    _common.require(
        weight.dtype == torch.int8, op, lambda: f"weight must have dtype int8, got {_common.dtype_name(weight)}"
    )
    _common.require(weight.device == x.device, op, lambda: "weight must be on the device of x")
    _common.require(
        x.dim() >= 1 and x.shape[-1] == shape[1],
        op,
        lambda: f"x must have shape (..., {shape[1]}) to go with weight {shape}, got {tuple(x.shape)}",
    )
    _common.check_per_channel(op, x, weight, scale, bias)


def require_no_gradient(op: str, x: Tensor) -> None:
    """Raise a ValueError if autograd follows x: the gradient of rounding is zero almost everywhere."""
    _common.require(not _common.needs_gradient(x), op, lambda: "x must not need a gradient: rounding has none")


def check_residual(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Raise a ValueError for a residual that does not match; the messages are those of the file in csrc/ops."""
    if residual is None:
        return
    features, shape, got = weight.shape[0], tuple(x.shape), tuple(residual.shape)
    _common.require(
        got == (*shape[:-1], features),
        _OP,
        lambda: f"residual must have shape (..., {features}) to go with x {shape}, got {got}",
    )
    _common.check_same_kind(_OP, "x", x, "residual", residual)


@torch.library.register_fake("gafext::linear_int8")
def _fake(x, weight, scale, bias=None, residual=None):
    check_linear_int8(x, weight, scale, bias)
    check_residual(x, weight, residual)
    _common.require_supported(_OP, kernel_reasons(x, weight))
    return x.new_empty(*x.shape[:-1], weight.shape[0])
