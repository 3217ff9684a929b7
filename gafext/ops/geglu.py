"""GEGLU, the gated projection of a transformer's feed-forward layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.ops import _common
from gafext.ops.backend import use_kernel
from gafext.ops.linear import linear_backward

_OP = "geglu"


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Project linearly and multiply the first half of the result by the GELU of the second.

    h = x weight^T + bias;  out = h[..., :inner] * gelu(h[..., inner:]),  gelu(g) = g/2 (1 + erf(g / sqrt 2))

    Args:
        x: [..., in_features], float32, float16 or bfloat16. Accumulation is in float32.
        weight: [2 * inner, in_features], like x: the rows of the value, then those of the gate.
        bias: [2 * inner], like x, or None.
        backend: "auto" or "kernel"; "sdpa" and "reference" are both PyTorch's linear, chunk and gelu.

    Returns:
        [..., inner], contiguous if the kernel ran.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the backend is "kernel" and does not support them.

    With "auto", inputs that the kernel does not support (`unsupported_reasons`) fall back to torch's linear and gelu.

    Source: GEGLU of "GLU Variants Improve Transformer" (arXiv 2002.05202), equation 6; diffusers'
    models/activations.py, class GEGLU.
    """
    x, weight, bias = _common.autocast(x, weight, bias)
    check_geglu(x, weight, bias)
    if use_kernel(backend, _OP, lambda: unsupported_reasons(x, weight, bias)):
        return _common.call_kernel(torch.ops.gafext.geglu.default, x, weight, bias)
    # For a backward pass, which needs h: geglu's own would compute the product again.
    return geglu_gate(F.linear(x, weight, bias), backend=backend)


def geglu_gate(projected: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply the first half of a projection by the GELU of the second: GEGLU without its linear layer.

    out = h[..., :inner] * gelu(h[..., inner:])

    Args:
        projected: h, [..., 2 * inner], float32, float16 or bfloat16.
        backend: as for `geglu`.

    Returns:
        [..., inner], contiguous if the kernel ran.

    Raises:
        ValueError: the last dimension is odd, or the backend is "kernel" and does not support the tensor.
    """
    check_geglu_gate(projected)
    if use_kernel(backend, "geglu_gate", lambda: gate_unsupported_reasons(projected)):
        return _common.call_kernel(torch.ops.gafext.geglu_gate.default, projected)
    return reference_geglu_gate(projected)


def reference_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the formula in plain PyTorch: any dtype, float64 included; differentiable."""
    return reference_geglu_gate(F.linear(x, weight, bias))


def reference_geglu_gate(projected: Tensor) -> Tensor:
    """Compute the gate's formula in plain PyTorch."""
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


def unsupported_reasons(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    """List why the kernel does not support tensors of matching shapes; empty when it does."""
    return _common.dtype_reasons(x) + _common.place_reasons(x, weight, bias)


def gate_unsupported_reasons(projected: Tensor) -> list[str]:
    """List why the gate's kernel does not support a tensor; empty when it does."""
    return _common.dtype_reasons(projected) + _common.place_reasons(projected, fast_backward=True, cuda_backward=True)


def check_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raise a ValueError for tensors that do not match; the messages are those of its file in csrc/ops."""
    shape = tuple(weight.shape)
    _common.require(
        weight.dim() == 2 and weight.shape[0] % 2 == 0,
        _OP,
        lambda: f"weight must have shape (2 * inner, in_features), got {shape}",
    )
    _common.require(
        x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        _OP,
        lambda: f"x must have shape (..., {shape[1]}) to go with weight {shape}, got {tuple(x.shape)}",
    )
    _common.check_weight_and_bias(_OP, x, weight, bias)


def check_geglu_gate(projected: Tensor, op: str = "geglu_gate") -> None:
    """Raise a ValueError for a tensor whose last dimension is odd; the message is that of csrc/ops/geglu.cpp."""
    _common.require(
        projected.dim() >= 1 and projected.shape[-1] % 2 == 0,
        op,
        lambda: f"projected must have shape (..., 2 * inner), got {tuple(projected.shape)}",
    )


@torch.library.register_fake("gafext::geglu")
def _fake(x, weight, bias=None):
    check_geglu(x, weight, bias)
    _common.require_supported(_OP, _common.dtype_reasons(x))
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


@torch.library.register_fake("gafext::geglu_gate")
def _fake_gate(projected):
    check_geglu_gate(projected)
    _common.require_supported("geglu_gate", _common.dtype_reasons(projected))
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


torch.library.impl("gafext::geglu", "MPS", reference_geglu)
torch.library.impl("gafext::geglu_gate", "MPS", reference_geglu_gate)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def geglu_gate_backward(grad: Tensor, projected: Tensor) -> Tensor:
    """Compute the gradient of `geglu_gate` for h = [value, gate], in one pass over memory with a kernel.

    dh = [grad * gelu(gate), grad * value * gelu'(gate)],  gelu(g) = g cdf(g),  gelu'(g) = cdf(g) + g pdf(g)

    Args:
        grad: [..., inner], like h. Arithmetic is in float32.
        projected: h, [..., 2 * inner].

    Returns:
        [..., 2 * inner], contiguous.
    """
    if _common.has_backward_kernel(grad, cuda=True):
        return torch.ops.gafext.geglu_gate_backward(grad, projected)
    value, gate = projected.float().chunk(2, dim=-1)
    cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * gate * gate) * (1 / math.sqrt(2 * math.pi))
    halves = grad.float() * gate * cdf, grad.float() * value * (cdf + gate * pdf)
    return torch.cat(halves, dim=-1).to(grad.dtype)


@torch.library.register_fake("gafext::geglu_gate_backward")
def _fake_gate_backward(grad, projected):
    op = "geglu_gate_backward"
    check_geglu_gate(projected, op)
    _common.require_supported(op, _common.dtype_reasons(projected))
    _common.require(
        grad.shape == (*projected.shape[:-1], projected.shape[-1] // 2),
        op,
        lambda: (
            f"grad must have shape (..., inner) to go with projected {tuple(projected.shape)}, got {tuple(grad.shape)}"
        ),
    )
    _common.check_same_kind(op, "projected", projected, "grad", grad)
    return projected.new_empty(projected.shape)


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    dtype = x.dtype
    grad, x, weight = (t.float() for t in (grad, x, weight))
    grad_h = geglu_gate_backward(grad, F.linear(x, weight, None if bias is None else bias.float()))
    needed = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
    gradients = linear_backward(grad_h, x, weight, needed)
    return tuple(None if gradient is None else gradient.to(dtype) for gradient in gradients)


_common.register_autograd("geglu", _backward, setup_context=_setup_context)
_common.register_autograd(
    "geglu_gate",
    lambda ctx, grad: geglu_gate_backward(grad, *ctx.saved_tensors),
    setup_context=_setup_context,
)
_common.refuse_second_order("geglu_gate_backward")
