"""Attention over the views of one portrait, separately at each spatial position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.ops import _common
from gafext.ops.backend import use_kernel
from gafext.ops.flash_attention import attention_backward, attention_weights

_OP = "cross_view_attention"
MAX_VIEWS = 32  # kMaxViews of csrc/ops/cross_view_attention.h


def cross_view_attention(
    query: Tensor, key: Tensor, value: Tensor, num_views: int, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attend from each view to all views of its portrait, separately at each position.

    With V = num_views, and row b*V+i holding view i of portrait b:
    out[b*V+i,h,l] = sum_j softmax_j(scale * <query[b*V+i,h,l], key[b*V+j,h,l]>) value[b*V+j,h,l]

    Args:
        query: [B*V,H,L,D], float32, float16 or bfloat16. The last stride must be 1, the others are free: a view of a
            projection [B*V,L,H*D] is not copied. Accumulation is in float32.
        key: [B*V,H,L,D], like query.
        value: [B*V,H,L,D], like query.
        num_views: V, the fastest index of the batch.
        scale: factor of the scores; None is 1/sqrt(D).
        backend: "auto", "kernel", "sdpa" or "reference"; see `gafext.ops.backend`.

    Returns:
        [B*V,H,L,D]; if the kernel ran, `out.transpose(1, 2).flatten(2)` is a view: memory is [B*V,L,H,D].

    Raises:
        ValueError: shapes, dtypes or devices do not match, the batch is not a multiple of num_views, or the backend is
            "kernel" and does not support them.

    With "auto", inputs that the kernel does not support (`unsupported_reasons`) fall back to torch's
    scaled_dot_product_attention.

    Source: the cross-view attention of GAF (arXiv 2412.10209); MVDiffusion's has the same form, and so has the temporal
    attention of Tune-A-Video (diffusers: models/attention.py, TemporalBasicTransformerBlock).
    """
    query, key, value = _common.autocast(query, key, value)
    op = torch.ops.gafext.cross_view_attention.default
    if backend == "auto" and _common.are_plain_heads(query, key, value) and _are_views(query, key, num_views):
        return _common.call_without_gradient(op, query, key, value, num_views, scale=scale)
    check_cross_view_attention(query, key, value, num_views)
    if use_kernel(backend, _OP, lambda: unsupported_reasons(query, key, value, num_views)):
        return op(query, key, value, num_views, scale=scale)
    form = reference_cross_view_attention if backend == "reference" else sdpa_cross_view_attention
    return form(query, key, value, num_views, scale=scale)


def reference_cross_view_attention(
    query: Tensor, key: Tensor, value: Tensor, num_views: int, *, scale: float | None = None
) -> Tensor:
    """Compute the formula in plain PyTorch: any dtype, float64 included; differentiable."""
    query, key, value = (views_last(t, num_views) for t in (query, key, value))
    return views_first(attention_weights(query, key, scale=scale) @ value)


def unsupported_reasons(query: Tensor, key: Tensor, value: Tensor, num_views: int) -> list[str]:
    """List why the kernel does not support tensors of matching shapes; empty when it does."""
    place = _common.place_reasons(query, key, value, fast_backward=True, cuda_backward=True)
    return _kernel_reasons(query, key, value, num_views) + place


def check_cross_view_attention(query: Tensor, key: Tensor, value: Tensor, num_views: int, op: str = _OP) -> None:
    """Raise a ValueError for arguments that do not match; the messages are those of its file in csrc/ops."""
    _common.check_heads_shape(op, "query", query)
    _common.check_equal_shape(op, "query", query, "key", key)
    _common.check_equal_shape(op, "query", query, "value", value)
    _common.require(num_views >= 1, op, lambda: f"num_views must be at least 1, got {num_views}")
    _common.require(
        query.shape[0] % num_views == 0,
        op,
        lambda: f"the batch of query must be a multiple of num_views = {num_views}, got {tuple(query.shape)}",
    )
    _common.check_same_kind(op, "query", query, "key", key)
    _common.check_same_kind(op, "query", query, "value", value)


def _are_views(query: Tensor, key: Tensor, num_views: int) -> bool:
    return key.shape == query.shape and 1 <= num_views <= MAX_VIEWS and query.shape[0] % num_views == 0


def views_last(tensor: Tensor, num_views: int) -> Tensor:
    """View [B*V,H,L,D] as [B,H,L,V,D], whose sequence dimension is the views."""
    return tensor.unflatten(0, (tensor.shape[0] // num_views, num_views)).permute(0, 2, 3, 1, 4)


def views_first(tensor: Tensor) -> Tensor:
    """Return [B*V,H,L,D] from [B,H,L,V,D], the inverse of `views_last`."""
    return tensor.permute(0, 3, 1, 2, 4).flatten(0, 1)


def _kernel_reasons(query: Tensor, key: Tensor, value: Tensor, num_views: int) -> list[str]:
    reasons = _common.head_reasons(query, key, value)
    if num_views > MAX_VIEWS:
        reasons.append(f"num_views must be in 1..{MAX_VIEWS}, got {int(num_views)}")
    return reasons


def sdpa_cross_view_attention(
    query: Tensor, key: Tensor, value: Tensor, num_views: int, *, scale: float | None = None
) -> Tensor:
    """Compute the formula with PyTorch's scaled_dot_product_attention, copying every argument and the result."""

    def folded(x: Tensor) -> Tensor:
        # Four dimensions: with five, Inductor of torch 2.13 computes wrong numbers on the CPU.
        _, heads, _, width = x.shape
        return views_last(x, num_views).transpose(1, 2).reshape(-1, heads, num_views, width)  # [B*L,H,V,D]

    batch, heads, length, width = query.shape
    out = F.scaled_dot_product_attention(folded(query), folded(key), folded(value), scale=scale)
    out = out.view(batch // num_views, length, heads, num_views, width)
    return out.permute(0, 3, 2, 1, 4).reshape(batch, heads, length, width)


@torch.library.register_fake("gafext::cross_view_attention")
def _fake(query, key, value, num_views, *, scale=None):
    check_cross_view_attention(query, key, value, num_views)
    _common.require_supported(_OP, _kernel_reasons(query, key, value, num_views))
    batch, heads, length, head_dim = query.shape
    return query.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _mps(query, key, value, num_views, *, scale=None):
    return _common.heads_like(sdpa_cross_view_attention(query, key, value, num_views, scale=scale))


torch.library.impl("gafext::cross_view_attention", "MPS", _mps)


def cross_view_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, num_views: int, *, scale: float | None = None
) -> tuple[Tensor, ...]:
    """Compute the gradients of `cross_view_attention`, with a kernel without a score matrix in memory.

    With P the weights of a position: dV = P^T dO, dS = scale P * (dO V^T - rowsum(P * dO V^T)), dQ = dS K, dK = dS^T Q.

    Args:
        grad: dO, [B*V,H,L,D], like query.
        query: as in `cross_view_attention`, and so are key, value, num_views and scale.

    Returns:
        Gradients of query, key and value, [B*V,H,L,D].

    Source: FlashAttention (arXiv 2205.14135), appendix B.2.
    """
    if _common.has_backward_kernel(grad, cuda=True):
        return torch.ops.gafext.cross_view_attention_backward(grad, query, key, value, num_views, scale=scale)
    grad, query, key, value = (views_last(t, num_views) for t in (grad, query, key, value))
    return tuple(views_first(g) for g in attention_backward(grad, query, key, value, scale=scale) if g is not None)


@torch.library.register_fake("gafext::cross_view_attention_backward")
def _fake_backward(grad, query, key, value, num_views, *, scale=None):
    op = "cross_view_attention_backward"
    check_cross_view_attention(query, key, value, num_views, op)
    _common.require_supported(op, _kernel_reasons(query, key, value, num_views))
    _common.check_equal_shape(op, "query", query, "grad", grad)
    _common.check_same_kind(op, "query", query, "grad", grad)
    batch, heads, length, head_dim = query.shape
    return tuple(query.new_empty(batch, length, heads, head_dim).transpose(1, 2) for _ in range(3))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    query, key, value, ctx.num_views = inputs
    ctx.save_for_backward(query, key, value)
    ctx.scale = keyword_only_inputs["scale"]


def _backward(ctx, grad):
    query, key, value = ctx.saved_tensors
    return *cross_view_attention_backward(grad, query, key, value, ctx.num_views, scale=ctx.scale), None


_common.register_autograd("cross_view_attention", _backward, setup_context=_setup_context)
_common.refuse_second_order("cross_view_attention_backward")
