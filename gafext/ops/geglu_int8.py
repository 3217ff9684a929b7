"""GEGLU whose projection has 8-bit weights and inputs, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from gafext.ops import _common
from gafext.ops.backend import use_kernel
from gafext.ops.geglu import geglu_gate
from gafext.ops.linear_int8 import (
    check_linear_int8,
    kernel_reasons,
    reference_linear_int8,
    require_no_gradient,
    unsupported_reasons,
)

_OP = "geglu_int8"


def geglu_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Apply `linear_int8`, and multiply the first half of the result by the GELU of the second.

    h = linear_int8(x, weight, scale, bias);  out = h[..., :inner] * gelu(h[..., inner:])

    The gate takes the products' sums as they come: h is neither rounded to x's dtype nor written.

    Args:
        x: [..., in_features], float32, float16 or bfloat16, on the CPU.
        weight: [2 * inner, in_features], int8: the rows of the value, then those of the gate.
        scale: [2 * inner], float32: what a unit of `weight` stands for, per row.
        bias: [2 * inner], like x, or None.
        backend: "auto" or "kernel"; "sdpa" and "reference" are both the formula in plain PyTorch.

    Returns:
        [..., inner], contiguous if the kernel ran.

    Raises:
        ValueError: shapes, dtypes or devices do not match, x needs a gradient, or the backend is "kernel" and does not
            support them.

    Inputs that the kernel does not support (`unsupported_reasons` of `linear_int8`) fall back to the formula.

    Source: GEGLU of "GLU Variants Improve Transformer" (arXiv 2002.05202), equation 6.
    """
    x, bias = _common.autocast(x, bias)
    check_geglu_int8(x, weight, scale, bias)
    if use_kernel(backend, _OP, lambda: unsupported_reasons(x, weight, scale, bias)):
        return torch.ops.gafext.geglu_int8(x, weight, scale, bias)
    require_no_gradient(_OP, x)
    return geglu_gate(reference_linear_int8(x, weight, scale, bias), backend=backend)


def check_geglu_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """Raise a ValueError for tensors that do not match; the messages are those of its file in csrc/ops."""
    check_linear_int8(x, weight, scale, bias, op=_OP)
    shape = tuple(weight.shape)
    _common.require(shape[0] % 2 == 0, _OP, lambda: f"weight must have shape (2 * inner, in_features), got {shape}")


@torch.library.register_fake("gafext::geglu_int8")
def _fake(x, weight, scale, bias=None):
    check_geglu_int8(x, weight, scale, bias)
    _common.require_supported(_OP, kernel_reasons(x, weight))
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)
