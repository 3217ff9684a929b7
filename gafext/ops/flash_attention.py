"""Softmax attention without the score matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.ops import _common
from gafext.ops.backend import use_kernel

_OP = "flash_attention"


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attend from every query to all keys, tile by tile, without holding the Lq x Lk score matrix.

    out[b,h,i] = sum_j softmax_j(scale * <query[b,h,i], key[b,h,j]>) value[b,h,j]

    Args:
        query: [B,H,Lq,D], float32, float16 or bfloat16. The last stride must be 1, the others are free: a view of a
            projection [B,Lq,H*D] is not copied. Accumulation is in float32.
        key: [B,H,Lk,D], like query.
        value: [B,H,Lk,D], like query.
        scale: factor of the scores; None is 1/sqrt(D).
        is_causal: query i attends to keys j <= i only (aligned at the top left, as in scaled_dot_product_attention).
        backend: "auto", "kernel", "sdpa" or "reference"; see `gafext.ops.backend`.

    Returns:
        [B,H,Lq,D]; if the kernel ran, `out.transpose(1, 2).flatten(2)` is a view: memory is [B,Lq,H,D].

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the backend is "kernel" and does not support them.

    With "auto", inputs that the kernel does not support (`unsupported_reasons`) or that PyTorch computes faster
    (`slower_reasons`) fall back to torch's scaled_dot_product_attention; torch.ops.gafext.flash_attention always runs
    the kernel.

    Source: FlashAttention (arXiv 2205.14135), algorithm 1; online softmax (arXiv 1805.02867), algorithm 3.
    """
    op = torch.ops.gafext.flash_attention.default
    if backend == "auto" and _common.are_plain_heads(query, key, value) and _same_but_length(query, key):
        if slower_reasons(query, key):
            return _sdpa(query, key, value, scale=scale, is_causal=is_causal)
        return _common.call_without_gradient(op, query, key, value, scale=scale, is_causal=is_causal)
    query, key, value = _common.autocast(query, key, value)
    check_flash_attention(query, key, value)
    unsupported, slower = (lambda: unsupported_reasons(query, key, value)), (lambda: slower_reasons(query, key))
    form = reference_flash_attention if backend == "reference" else _sdpa
    if use_kernel(backend, _OP, unsupported, slower):
        form = op
    return form(query, key, value, scale=scale, is_causal=is_causal)


def reference_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, is_causal: bool = False
) -> Tensor:
    """Compute the formula in plain PyTorch, with the score matrix: any dtype, float64 included; differentiable."""
    return attention_weights(query, key, scale=scale, is_causal=is_causal) @ value


def unsupported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """List why the kernel does not support tensors of matching shapes; empty when it does."""
    reasons = _common.head_reasons(query, key, value, _max_head_dim(query)) + _common.place_reasons(query, key, value)
    if not reasons and query.is_cuda and query.shape[3] > _common.MAX_HEAD_DIM and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(query.device.index)
        if gpu.major < 8:
            reasons.append(
                f"the CUDA kernel for head_dim {int(query.shape[3])} needs compute capability 8.0, "
                f"this GPU has {gpu.major}.{gpu.minor}"
            )
    return reasons


def _max_head_dim(query: Tensor) -> int:
    if query.device.type != "cuda" or (query.dtype != torch.float32 and query.shape[3] % 8 == 0):
        return 512  # kMaxWideHeadDim of csrc/ops/flash_attention.h
    return _common.MAX_HEAD_DIM


# Measured on two cores of a Sapphire Rapids; ratios are gafext's speed over torch 2.13's.
# Packing the keys pays from 12 queries on with heads of 64 (1.03; 8 queries 0.85). With 257 keys and heads of 40, 12
# queries had 0.65 and 36 had 1.
_FEW_QUERIES = 12
# With bfloat16 on AMX tiles, wider heads need more queries. With 77 to 1024 keys: 1.3 with 12 queries and heads of 40,
# 1.2 to 1.5 with 16 and 64, 1.3 to 1.7 with 48 and 160, where 16 had 0.8. With 64 keys and heads of 256: 0.97 with 85
# queries, 1.2 with 96.
_QUERIES_PER_DIMENSION = 3 / 8
# Multiply-adds of the scores, below which the call itself takes the time. On one thread: 1.04 with 1.3 million
# (1,8,64,40), 1.46 with 1.6 million (1,4,64,80 and 77 keys).
_LITTLE_WORK = 3 * 2**19


class GpuShapes(NamedTuple):
    """Half-precision attentions for which the CUDA kernel was measured to be faster than all of PyTorch's backends."""

    capability: int  # ten times the compute capability
    head_dims: range
    queries: range
    keys: range


# To be filled in from benchmarks on a GPU; nothing has been measured yet.
FASTER_ON_GPU: tuple[GpuShapes, ...] = ()


def is_faster_on_gpu(capability: int, head_dim: int, queries: int, keys: int) -> bool:
    return any(
        capability == shapes.capability
        and head_dim in shapes.head_dims
        and queries in shapes.queries
        and keys in shapes.keys
        for shapes in FASTER_ON_GPU
    )


def _gpu_reasons(query: Tensor, key: Tensor) -> list[str]:
    if FASTER_ON_GPU and query.dtype in (torch.float16, torch.bfloat16):
        major, minor = torch.cuda.get_device_capability(query.device)
        if is_faster_on_gpu(10 * major + minor, query.shape[3], query.shape[2], key.shape[2]):
            return []
    return ["the CUDA kernel was not measured to be faster than PyTorch's for this GPU, shape and dtype"]


def _wide_heads_pay(query: Tensor, key: Tensor) -> bool:
    # On AMX tiles with heads of 512: float32 1.2 with 256 and 1024 queries and keys, 1.4 with 4096; float16 1.1 to 2.5.
    length, keys, head_dim = query.shape[2], key.shape[2], query.shape[3]
    # Two cores of a Zen 5, with 1024 and 4096: float32 2.0 and 2.1, float16 2.7, bfloat16 3.5 and 3.7; 256: 1.1, 2.1
    # and 1.9. Of a Zen 4, with 1024 and 4096: 1.06, 1.4 to 1.7, 1.8; with 256: 0.6, 1.1 and 1.0.
    if _common.ZEN:
        return min(length, keys) >= ((256 if _common.ZEN == 5 else 512) if query.dtype == torch.float32 else 64)
    if query.dtype == torch.float32:
        return length >= 256 and keys >= 256 and head_dim >= 384
    return query.dtype == torch.float16 and length >= 64 and keys >= 64


def slower_reasons(query: Tensor, key: Tensor) -> list[str]:
    """List why PyTorch's operation is faster for inputs that the kernel supports; empty when it is not."""
    if query.device.type == "cuda":
        return _gpu_reasons(query, key)
    if query.device.type != "cpu":
        return []
    reasons = []
    dtype, any_size = query.dtype, torch.compiler.is_compiling()  # while compiling, sizes would add guards
    batch, heads, length, head_dim = query.shape
    keys = key.shape[2]
    if not any_size and 0 in (batch, heads, length, keys):
        return []  # torch 2.11 crashes with a division by zero
    # PyTorch's bfloat16 is slow with few keys that do not fill whole blocks: 1.5 to 1.9 with 77 keys.
    few_odd_keys = not any_size and keys < 128 and keys % 32 != 0 and head_dim < 128
    on_tiles = _common.INSTRUCTION_SET == "amx"
    # With AVX512_BF16 alone float32 arithmetic is the faster: 1.8 with 64 to 4096 queries and keys on a Sapphire Rapids
    # without its tiles, 1.5 with a head of 512. Arm's instructions were not measured.
    on_arm = _common.INSTRUCTION_SET == "neon"
    if dtype == torch.bfloat16 and _common.MULTIPLIES_BFLOAT16 and on_arm and not few_odd_keys:
        reasons.append("this processor multiplies bfloat16, and PyTorch makes use of it")
    can_pay = on_tiles or _common.ZEN > 0
    if head_dim > _common.MAX_HEAD_DIM and (any_size or not can_pay or not _wide_heads_pay(query, key)):
        reasons.append("PyTorch's matrix products are the faster ones for heads this wide")
    few = _FEW_QUERIES
    if dtype == torch.bfloat16 and on_tiles and not any_size:
        few = max(few, int(head_dim * _QUERIES_PER_DIMENSION))
    if not any_size and length < few and dtype != torch.float16:
        reasons.append(f"fewer than {few} queries do not pay for packing the keys")
    if not any_size and batch * heads * length * keys * head_dim < _LITTLE_WORK:
        reasons.append("so little work that the time is that of a call")
    return reasons


def check_flash_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise a ValueError for tensors that do not match; the messages are those of its file in csrc/ops."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _common.check_heads_shape(_OP, name, tensor)
    _common.require(
        _same_but_length(query, key),
        _OP,
        lambda: f"key must have the batch, heads and head_dim of query, {tuple(query.shape)}, got {tuple(key.shape)}",
    )
    _common.check_equal_shape(_OP, "key", key, "value", value)
    _common.check_same_kind(_OP, "query", query, "key", key)
    _common.check_same_kind(_OP, "query", query, "value", value)


def _same_but_length(query: Tensor, key: Tensor) -> bool:
    (batch, heads, _, head_dim), (key_batch, key_heads, _, key_dim) = query.shape, key.shape
    return key_batch == batch and key_heads == heads and key_dim == head_dim


def attention_weights(query: Tensor, key: Tensor, *, scale: float | None, is_causal: bool = False) -> Tensor:
    """Compute softmax(scale * query key^T) over the last dimension: [..., Lq, D], [..., Lk, D] -> [..., Lq, Lk]."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * (query @ key.transpose(-1, -2))  # [..., Lq, Lk]
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1)


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    is_causal: bool = False,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of attention over the last two dimensions, in float32 (FlashAttention, appendix B.2).

    With P the weights: dV = P^T dO, dS = scale P * (dO V^T - rowsum(P * dO V^T)), dQ = dS K, dK = dS^T Q.
    """
    dtype = query.dtype
    grad, query, key, value = (t.float() for t in (grad, query, key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    weights = attention_weights(query, key, scale=factor, is_causal=is_causal)  # [..., Lq, Lk]
    grad_query = grad_key = grad_value = None
    if needed[0] or needed[1]:
        grad_weights = grad @ value.transpose(-1, -2)
        grad_scores = factor * weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True))
        grad_query = (grad_scores @ key).to(dtype) if needed[0] else None
        grad_key = (grad_scores.transpose(-1, -2) @ query).to(dtype) if needed[1] else None
    if needed[2]:
        grad_value = (weights.transpose(-1, -2) @ grad).to(dtype)
    return grad_query, grad_key, grad_value


def flash_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of `flash_attention`, in float32 on a CPU without the Lq x Lk score matrix.

    There PyTorch's own tiles compute the result and its log-sum-exp again, and then the gradients: 7 products where
    saving the log-sum-exp would take 5. Elsewhere it is `attention_backward`.

    Args:
        grad: dO, [B,H,Lq,D], like query.
        query: as in `flash_attention`, and so are key, value, scale and is_causal.
        needed: whether query, key and value need theirs; others may be None.

    Returns:
        Gradients of query, key and value, of their shapes.
    """
    tiled = _common.has_backward_kernel(grad) and query.dtype == torch.float32
    if not tiled or 0 in (*query.shape, *key.shape):  # the tiles divide by the lengths
        return attention_backward(grad, query, key, value, scale=scale, is_causal=is_causal, needed=needed)
    aten = torch.ops.aten
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.contiguous(), query, key, value, out, logsumexp, 0.0, is_causal, scale=scale
    )


@torch.library.register_fake("gafext::flash_attention")
def _fake(query, key, value, *, scale=None, is_causal=False):
    check_flash_attention(query, key, value)
    _common.require_supported(_OP, _common.head_reasons(query, key, value, _max_head_dim(query)))
    batch, heads, length, head_dim = query.shape
    return query.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _sdpa(query, key, value, *, scale=None, is_causal=False):
    return _common.heads_like(F.scaled_dot_product_attention(query, key, value, scale=scale, is_causal=is_causal))


torch.library.impl("gafext::flash_attention", "MPS", _sdpa)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx, grad):
    query, key, value = ctx.saved_tensors
    return flash_attention_backward(grad, query, key, value, **ctx.options, needed=ctx.needs_input_grad[:3])


_common.register_autograd("flash_attention", _backward, setup_context=_setup_context)
