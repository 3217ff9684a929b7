"""Group normalisation followed by SiLU, as in residual networks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.ops import _common
from gafext.ops.backend import use_kernel

_OP = "group_norm_silu"
MAX_GROUP_CHANNELS = 512  # kMaxGroupChannels of csrc/ops/group_norm_silu.h


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Normalise groups of channels of each image and apply SiLU.

    out = f((x - mean) / sqrt(variance + eps) * weight + bias),  f(y) = y / (1 + exp(-y)) or, without `silu`, y
    with mean and (biased) variance over all positions of each group of C / num_groups consecutive channels.

    Args:
        x: [B,C,h,w] or [B,C,L], float32, float16 or bfloat16. Mean, variance and result are computed in float32.
        num_groups: a divisor of C.
        weight: [C], like x, or None.
        bias: [C], like x, or None.
        eps: added to the variance.
        silu: apply SiLU to the result.
        backend: "auto" or "kernel"; "sdpa" and "reference" are both PyTorch's group_norm and silu.

    Returns:
        [B,C,h,w] or [B,C,L], channels-last if the kernel ran.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the backend is "kernel" and does not support them.

    With "auto", inputs that the kernel does not support (`unsupported_reasons`) fall back to torch's group_norm and
    silu.

    Source: "Group Normalization" (arXiv 1803.08494), equation 7; diffusers' models/resnet.py, class ResnetBlock2D.
    """
    check_group_norm_silu(x, num_groups, weight, bias, mixed=_common.is_autocast(x))
    if use_kernel(backend, _OP, lambda: unsupported_reasons(x, num_groups, weight, bias)):
        op = torch.ops.gafext.group_norm_silu.default
        return _common.call_kernel(op, x, num_groups, weight, bias, eps, silu=silu)
    return reference_group_norm_silu(x, num_groups, weight, bias, eps, silu=silu)


def reference_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
) -> Tensor:
    """Compute the formula in plain PyTorch: any dtype, float64 included; differentiable."""
    normalized = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(normalized, inplace=True) if silu else normalized


def unsupported_reasons(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None
) -> list[str]:
    """List why the kernel does not support tensors of matching shapes; empty when it does."""
    reasons = _kernel_reasons(x, num_groups) + _common.place_reasons(x, weight, bias)
    if x.device.type not in ("cpu", "cuda", "meta"):
        reasons.append(f"the kernel is for CPUs and CUDA, got {x.device.type} tensors")
    elif _common.is_autocast(x):
        reasons.append("torch.autocast is on, under which PyTorch normalises in float32")
    return reasons


def _kernel_reasons(x: Tensor, num_groups: int) -> list[str]:
    reasons = _common.dtype_reasons(x)
    channels = x.shape[1]
    if channels // num_groups > MAX_GROUP_CHANNELS:
        reasons.append(f"a group must have at most {MAX_GROUP_CHANNELS} channels, got {int(channels // num_groups)}")
    if channels != 1 and x.stride(1) != 1:
        reasons.append(f"x must be channels-last, got a stride of {int(x.stride(1))} from channel to channel")
    if x.dim() == 4 and x.shape[2] != 1 and x.shape[3] != 1 and x.stride(2) != x.shape[3] * x.stride(3):
        expected = int(x.shape[3] * x.stride(3))
        reasons.append(f"x must have a stride of {expected} from row to row, got {int(x.stride(2))}")
    return reasons


def check_group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, mixed: bool = False
) -> None:
    """Raise a ValueError for tensors that do not match; the messages are those of csrc/ops/group_norm_silu.cpp.

    With `mixed`, as under torch.autocast, weight and bias may be of another dtype than x.
    """
    shape = tuple(x.shape)
    _common.require(
        x.dim() in (3, 4),
        _OP,
        lambda: f"x must have shape (batch, channels, length) or (batch, channels, height, width), got {shape}",
    )
    _common.require(
        num_groups >= 1 and x.shape[1] % num_groups == 0,
        _OP,
        lambda: f"num_groups must divide the channels of x {shape}, got {num_groups}",
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        _common.require(
            tensor.dim() == 1 and tensor.shape[0] == x.shape[1],
            _OP,
            lambda name=name, tensor=tensor: (
                f"{name} must have shape ({shape[1]},) to go with x {shape}, got {tuple(tensor.shape)}"
            ),
        )
        if not mixed:
            _common.check_same_kind(_OP, "x", x, name, tensor)


@torch.library.register_fake("gafext::group_norm_silu")
def _fake(x, num_groups, weight=None, bias=None, eps=1e-5, *, silu=True):
    check_group_norm_silu(x, num_groups, weight, bias)
    _common.require_supported(_OP, _kernel_reasons(x, num_groups))
    return x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _mps(x, num_groups, weight=None, bias=None, eps=1e-5, *, silu=True):
    out = reference_group_norm_silu(x, num_groups, weight, bias, eps, silu=silu)
    return out.movedim(1, -1).contiguous().movedim(-1, 1)  # in the memory in which the kernels return it


torch.library.impl("gafext::group_norm_silu", "MPS", _mps)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, ctx.num_groups, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.silu = keyword_only_inputs["silu"]


def _backward(ctx, grad):
    """Compute the gradients in float32.

    With n the normalised x and y = n weight + bias: dy = grad * silu'(y), dn = dy weight,
    dx = (dn - mean(dn) - n mean(dn n)) / sqrt(variance + eps), the means over a group.
    """
    x, weight, bias = ctx.saved_tensors
    groups, dtype = ctx.num_groups, x.dtype
    channels = (1, -1, *(1,) * (x.dim() - 2))

    def in_groups(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], groups, math.prod(t.shape[1:]) // groups)  # not -1: there may be none

    values = in_groups(x.float())
    centred = values - values.mean(2, keepdim=True)
    rstd = (centred.square().mean(2, keepdim=True) + ctx.eps).rsqrt()
    normalized = (centred * rstd).view(x.shape)
    grad = grad.float()
    if ctx.silu:
        y = normalized if weight is None else normalized * weight.float().view(channels)
        y = y if bias is None else y + bias.float().view(channels)
        gate = torch.sigmoid(y)
        grad = grad * gate * (1 + y * (1 - gate))
    over = [0, *range(2, x.dim())]
    grad_weight = None if weight is None else (grad * normalized).sum(over).to(dtype)
    grad_bias = None if bias is None else grad.sum(over).to(dtype)
    if weight is not None:
        grad = grad * weight.float().view(channels)
    grad, normalized = in_groups(grad), in_groups(normalized)
    correction = grad.mean(2, keepdim=True) + normalized * (grad * normalized).mean(2, keepdim=True)
    return ((grad - correction) * rstd).view(x.shape).to(dtype), None, grad_weight, grad_bias, None


_common.register_autograd("group_norm_silu", _backward, setup_context=_setup_context)
