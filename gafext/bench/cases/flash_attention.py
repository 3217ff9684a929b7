"""Cases of flash attention, against every backend of PyTorch's SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from gafext.bench.cases.base import Case, Contestant, compiled_form, contiguous, heads_first, pinned
from gafext.ops import flash_attention

# (batch, heads, queries, keys, head_dim, where it occurs)
ATTENTION_SHAPES = [
    (4, 5, 1024, 1024, 64, "self-attention, 4 views, 32x32 latents"),
    (1, 5, 4096, 4096, 64, "self-attention, 64x64 latents, or dense over 4 views"),
    (4, 10, 256, 256, 64, "self-attention, 16x16"),
    (4, 20, 64, 64, 64, "self-attention, 8x8"),
    (4, 5, 1024, 257, 64, "image tokens, 32x32"),
    (4, 10, 256, 257, 64, "image tokens, 16x16"),
    (4, 20, 64, 257, 64, "image tokens, 8x8"),
    (4, 5, 1024, 77, 64, "text, 32x32"),
    (4, 10, 256, 77, 64, "text, 16x16"),
    (4, 20, 64, 77, 64, "text, 8x8"),
    (1, 16, 257, 257, 80, "CLIP ViT-H, one portrait"),
    (4, 16, 257, 257, 80, "CLIP ViT-H, four portraits"),
    (1, 1, 1024, 1024, 512, "autoencoder, 32x32: PyTorch's own"),
    (1, 1, 4096, 4096, 512, "autoencoder, 64x64: PyTorch's own"),
    (4, 8, 1024, 1024, 40, "heads of Stable Diffusion 1, 32x32"),
    (4, 8, 256, 256, 96, "other heads"),
    (4, 8, 256, 256, 128, "other heads"),
    (4, 8, 256, 256, 160, "heads of Stable Diffusion 1, inner stages"),
]
# Additional shapes on GPUs.
GPU_ATTENTION_SHAPES = [
    *((8, 8, n, n, width, "64 heads in all") for width in (40, 64, 80, 160) for n in (64, 256, 1024, 4096)),
    *((8, 8, n, n, 128, "64 heads in all") for n in (1024, 4096)),
    *(
        (8, heads, n, keys, 64, f"{what}, 4 views with guidance")
        for keys, what in ((257, "image tokens"), (77, "text"))
        for heads, n in ((20, 64), (10, 256), (5, 1024), (5, 4096))
    ),
    *((1, heads, n, 257, 64, "image tokens, 4 views as one row") for heads, n in ((20, 256), (10, 1024), (5, 4096))),
    (1, 1, 16384, 16384, 512, "autoencoder, 128x128"),
]


def shapes(device: str, dtype: torch.dtype) -> list[tuple]:
    return ATTENTION_SHAPES + GPU_ATTENTION_SHAPES * (device == "cuda")


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def rows_last(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap an attention to return contiguous [B,L,H,D] for the next projection; other layouts are timed with a copy."""
    return lambda query, key, value: attention(query, key, value).transpose(1, 2).contiguous()


def case(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, where: str, *, compiled: bool, **options: Any
) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        lengths = (queries, keys, keys)
        return tuple(heads_first(batch, length, heads, head_dim, **options) for length in lengths)

    contestants = attention_on_gpu() if options["device"] == "cuda" else attention_on_cpu(compiled=compiled)
    return Case(
        op="flash_attention",
        shape=f"{batch},{heads},{queries}x{keys},{head_dim}",
        where=where,
        bound="compute",
        flops=4 * batch * heads * queries * keys * head_dim,
        inputs=inputs,
        contestants=contestants,
    )


def attention_on_cpu(*, compiled: bool) -> list[Contestant]:
    # Compiled SDPA is SDPA behind a guard. torch.compile(flex_attention), which Inductor generates itself, took 1.25
    # times as long on the CPU (4,5,1024x1024,64).
    return [
        Contestant("gafext", flash_attention),
        Contestant("sdpa", sdpa),
        Contestant("sdpa contiguous", sdpa, prepare=contiguous),
        *([compiled_form("sdpa", sdpa)] if compiled else []),
        pinned("sdpa math", sdpa, SDPBackend.MATH),
    ]


def attention_on_gpu() -> list[Contestant]:
    """List each of PyTorch's backends, and PyTorch's choice; from (B,L,H*D) to (B,L,H*D).

    "gafext kernel" is the kernel even if `flash_attention` falls back to PyTorch. "sdpa contiguous" takes and returns
    (B,H,L,D), SDPA's documented layout, without timing a copy.
    """
    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    return [
        Contestant("gafext", rows_last(flash_attention)),
        Contestant("gafext kernel", rows_last(torch.ops.gafext.flash_attention), optional=True),
        Contestant("sdpa", rows_last(sdpa)),
        Contestant("sdpa contiguous", lambda *inputs: sdpa(*inputs).transpose(1, 2), prepare=contiguous),
        *(pinned(f"sdpa {name}", rows_last(sdpa), backend) for name, backend in backends.items()),
    ]
