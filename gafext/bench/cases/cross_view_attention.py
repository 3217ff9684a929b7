"""Cases of attention across views, against SDPA with permutes, batched products, and the formula elementwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gafext.bench.cases.base import Case, Contestant, compiled_form, heads_first
from gafext.ops import cross_view_attention
from gafext.ops.cross_view_attention import sdpa_cross_view_attention

# (views, positions, heads of 64, where, portraits)
CROSS_VIEW_SHAPES = [
    (4, 1024, 5, "4 views, 32x32"),
    (4, 256, 10, "4 views, 16x16"),
    (4, 64, 20, "4 views, 8x8"),
    (6, 1024, 5, "6 views, 32x32"),
    (8, 1024, 5, "8 views, 32x32"),
    (16, 256, 10, "16 views, 16x16"),
]
# Additional shapes on GPUs, with two portraits: the two passes of guidance.
GPU_CROSS_VIEW_SHAPES = [
    (views, positions, heads, f"{views} views with guidance", 2)
    for views in (4, 8)
    for positions, heads in ((1024, 5), (256, 10), (4096, 5))
]


def shapes(device: str, dtype: torch.dtype) -> list[tuple]:
    return CROSS_VIEW_SHAPES + GPU_CROSS_VIEW_SHAPES * (device == "cuda")


def cross_view_elementwise(query: Tensor, key: Tensor, value: Tensor, num_views: int) -> Tensor:
    """Compute products and sums over broadcast pairs of views: no copies, and torch.compile fuses it best."""
    query, key, value = (x.unflatten(0, (-1, num_views)) for x in (query, key, value))
    weights = ((query[:, :, None] * key[:, None]).sum(-1, keepdim=True) * query.shape[-1] ** -0.5).softmax(2)
    return (weights * value[:, None]).sum(2).flatten(0, 1)


def cross_view_batched(query: Tensor, key: Tensor, value: Tensor, num_views: int) -> Tensor:
    """Multiply in batches over positions and then heads, in the order of a projection's memory: no copies of inputs."""
    query, key, value = (x.unflatten(0, (-1, num_views)).permute(0, 3, 2, 1, 4) for x in (query, key, value))
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value).permute(0, 3, 2, 1, 4).flatten(0, 1)


def case(
    views: int, positions: int, heads: int, where: str, portraits: int = 1, *, compiled: bool, **options: Any
) -> Case:
    forms = {"sdpa": sdpa_cross_view_attention, "elementwise": cross_view_elementwise}

    def of_views(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda query, key, value: form(query, key, value, views)

    contestants = [Contestant("gafext", of_views(cross_view_attention))]
    contestants += [Contestant(name, of_views(form)) for name, form in forms.items()]
    if compiled:
        contestants += [compiled_form(name, of_views(form)) for name, form in forms.items()]
    contestants.append(Contestant("matmul", of_views(cross_view_batched)))
    return Case(
        op="cross_view_attention",
        shape=f"{portraits}x" * (portraits > 1) + f"V={views},({positions},{heads * 64})",
        where=where,
        bound="memory",
        flops=4 * portraits * views * views * heads * positions * 64,
        inputs=lambda: tuple(heads_first(portraits * views, positions, heads, 64, **options) for _ in range(3)),
        contestants=contestants,
    )
