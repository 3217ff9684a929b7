"""The only place that picks a backend: "kernel" (gafext's C++/CUDA ops), "sdpa" (PyTorch's ops), "reference".

"auto" takes the kernel unless it cannot serve the inputs or PyTorch is faster at it. The choice is an argument, never a
global: every module keeps its own `attention_backend`, and `set_attention_backend` sets those of a whole tree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.ops import conv3x3 as _conv3x3_kernel
from gafext.ops import cross_view_attention as _cross_view_kernel
from gafext.ops import geglu as _geglu_kernel
from gafext.ops import geglu_gate as _geglu_gate_kernel
from gafext.ops import group_norm_silu as _group_norm_kernel
from gafext.ops import linear as _linear_kernel
from gafext.ops._common import autocast
from gafext.ops.conv3x3 import FEW_CHANNELS
from gafext.ops.conv3x3 import slower_reasons as _conv3x3_slower
from gafext.ops.conv3x3 import unsupported_reasons as _conv3x3_unsupported
from gafext.ops.cross_view_attention import reference_cross_view_attention, sdpa_cross_view_attention
from gafext.ops.cross_view_attention import unsupported_reasons as _cross_view_unsupported
from gafext.ops.flash_attention import reference_flash_attention
from gafext.ops.flash_attention import slower_reasons as _flash_slower
from gafext.ops.flash_attention import unsupported_reasons as _flash_unsupported
from gafext.ops.geglu import reference_geglu, reference_geglu_gate
from gafext.ops.geglu import unsupported_reasons as _geglu_unsupported
from gafext.ops.group_norm_silu import reference_group_norm_silu
from gafext.ops.group_norm_silu import unsupported_reasons as _group_norm_unsupported

BACKENDS = ("auto", "kernel", "sdpa", "reference")


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"attention backend: expected one of {list(BACKENDS)}, got {backend!r}")


def set_attention_backend(module: nn.Module, backend: str) -> None:
    """Set `attention_backend` on every submodule that has one.

    Args:
        module: any network of gafext.
        backend: "auto", "kernel", "sdpa" or "reference".

    Raises:
        ValueError: no such backend.
    """
    check_backend(backend)
    for submodule in module.modules():
        if hasattr(submodule, "attention_backend"):
            submodule.attention_backend = backend


def _use_kernel(backend: str, op: str, reasons: list[str]) -> bool:
    check_backend(backend)
    if backend == "kernel" and reasons:
        raise ValueError(f"backend='kernel' cannot serve this {op}: " + "; ".join(reasons))
    return backend == "kernel" or (backend == "auto" and not reasons)


def _flash_kernel(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    # The bare operation: gafext.ops.flash_attention goes to PyTorch where that is faster, also when asked for by name.
    return torch.ops.gafext.flash_attention(query, key, value, is_causal=is_causal)


def attention_reasons(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None) -> list[str]:
    """Why the flash-attention kernel cannot serve these inputs; empty when it can."""
    mask = ["a mask is given, and the kernel knows only causal masking"] if attn_mask is not None else []
    return _flash_unsupported(query, key, value) + mask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention: softmax(Q Kᵀ / √D) V.

    Args:
        query: [B,H,Lq,D], float32, float16 or bfloat16, any strides.
        key: [B,H,Lk,D].
        value: [B,H,Lk,D].
        attn_mask: added to the scores, broadcast to [B,H,Lq,Lk]; never served by the kernel.
        is_causal: query i sees keys 0..i.
        backend: "auto", "kernel", "sdpa" or "reference".

    Returns:
        [B,H,Lq,D].

    Raises:
        ValueError: backend "kernel" was asked for and cannot serve the inputs (the reasons are listed), or there is
            no such backend.
    """
    query, key, value = autocast(query, key, value)
    reasons = attention_reasons(query, key, value, attn_mask=attn_mask) if backend in ("auto", "kernel") else []
    if backend == "auto":
        reasons += _flash_slower(query, key)
    if _use_kernel(backend, "flash_attention", reasons):
        return _flash_kernel(query, key, value, is_causal=is_causal)
    if backend == "reference" and attn_mask is None:
        return reference_flash_attention(query, key, value, is_causal=is_causal)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)


def cross_view_attention(query: Tensor, key: Tensor, value: Tensor, num_views: int, *, backend: str = "auto") -> Tensor:
    """Attention over the views at each position: softmax over w of q[v,l]·k[w,l] / √D, times v[w,l].

    Args:
        query: [B*V,H,L,D], the view running fastest.
        key: [B*V,H,L,D].
        value: [B*V,H,L,D].
        num_views: V.
        backend: "auto", "kernel", "sdpa" or "reference".

    Returns:
        [B*V,H,L,D].

    Raises:
        ValueError: as `attention`.
    """
    reasons = []
    if backend in ("auto", "kernel"):
        reasons = _cross_view_unsupported(query, key, value, num_views)
    if _use_kernel(backend, "cross_view_attention", reasons):
        return _cross_view_kernel(query, key, value, num_views)
    form = reference_cross_view_attention if backend == "reference" else sdpa_cross_view_attention
    return form(query, key, value, num_views)


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Gated linear unit: h = x Wᵀ + b; h[:inner] · gelu(h[inner:]), the value first and the gate second.

    Args:
        x: [...,d].
        weight: [2*inner,d].
        bias: [2*inner] or None.
        backend: "auto" or "kernel"; "sdpa" and "reference" are both PyTorch's linear, chunk and gelu.

    Returns:
        [...,inner].

    Raises:
        ValueError: as `attention`.
    """
    reasons = []
    if backend in ("auto", "kernel"):
        reasons = _geglu_unsupported(x, weight, bias)
    if _use_kernel(backend, "geglu", reasons):
        return _geglu_kernel(x, weight, bias)
    return reference_geglu(x, weight, bias)


def geglu_gate(projected: Tensor, *, backend: str = "auto") -> Tensor:
    """The gate of GEGLU where there is a projection h [...,2*inner] already: h[:inner] · gelu(h[inner:])."""
    check_backend(backend)
    return _geglu_gate_kernel(projected) if backend in ("auto", "kernel") else reference_geglu_gate(projected)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Group normalisation and, with `silu`, SiLU.

    Args:
        x: [B,C,h,w].
        num_groups: a divisor of C.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        silu: whether SiLU follows.
        backend: "auto" and "kernel" take the kernel where there is one, that is on CUDA, and where it can serve, that
            is channels-last memory and inference; "sdpa" and "reference" are PyTorch's group_norm and silu.

    Returns:
        [B,C,h,w].

    Raises:
        ValueError: there is no such backend.
    """
    check_backend(backend)
    if backend in ("auto", "kernel") and not _group_norm_unsupported(x, num_groups, weight, bias):
        return _group_norm_kernel(x, num_groups, weight, bias, eps, silu=silu)
    return reference_group_norm_silu(x, num_groups, weight, bias, eps, silu=silu)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """3×3 convolution with a border of zeros.

    Args:
        x: [B,Cin,h,w].
        weight: [Cout,Cin,3,3].
        bias: [Cout] or None.
        backend: "auto" and "kernel" take the kernel where there is one and it is faster, that is on CPUs, and turn to
            channels-last memory for it; "sdpa" and "reference" are PyTorch's conv2d.

    Returns:
        [B,Cout,h,w].

    Raises:
        ValueError: there is no such backend.
    """
    check_backend(backend)
    if backend in ("auto", "kernel") and not _conv3x3_unsupported(x, weight, bias):
        if not _conv3x3_slower(x, weight):
            return _conv3x3_kernel(x, weight, bias)
        if max(weight.shape[:2]) >= FEW_CHANNELS:  # at the ends of a network: its neighbours take the kernel
            x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, padding=1)


def linear(layer: nn.Module, x: Tensor, *, backend: str = "auto") -> Tensor:
    """`layer(x)`, where the layer may be anything in the place of a linear one: 8-bit, wrapped, with hooks.

    Args:
        layer: a torch.nn.Linear, or what stands for it.
        x: [...,in_features].
        backend: "auto" and "kernel" take the kernel for a plain torch.nn.Linear where there is one and it is faster,
            that is on CPUs with AMX; "sdpa" and "reference" call the layer.

    Returns:
        [...,out_features].

    Raises:
        ValueError: there is no such backend.
    """
    check_backend(backend)
    if _is_plain(layer) and x.is_cpu and backend in ("auto", "kernel"):
        return _linear_kernel(x, layer.weight, layer.bias)
    return layer(x)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call is the product and nothing else: no hooks, no `forward` put in place of the class's."""
    return (
        type(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in layer.__dict__
    )
