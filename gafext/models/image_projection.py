"""Projections of CLIP's outputs to the image tokens that the U-Net attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gafext.config import UNetConfig
from gafext.models.attention import merge_heads, split_heads
from gafext.ops import flash_attention
from gafext.ops.linear import linear_layer

HEAD_WIDTH = 64  # of every published resampler


class ImageProjection(nn.Module):
    """Linear projection of CLIP's patch tokens to the U-Net's context width.

    Args:
        image_embed_dim: width of CLIP's hidden states: 1280 for ViT-H/14.
        cross_attention_dim: width of the context: 1024 for SD 2.1.

    Source: GAF (arXiv 2412.10209): 257 tokens of ViT-H/14, projected.
    """

    clip_output: ClassVar[str] = "last_hidden_state"
    """Name of the CLIP output that is projected, a field of `CLIPVisionOutput`."""

    def __init__(self, image_embed_dim: int, cross_attention_dim: int):
        super().__init__()
        self.proj = nn.Linear(image_embed_dim, cross_attention_dim)

    def forward(self, clip_hidden_states: Tensor) -> Tensor:
        """Map [B,T,image_embed_dim] to [B,T,cross_attention_dim]."""
        _check(clip_hidden_states, 3, self.proj.in_features)
        return self.proj(clip_hidden_states)


class PooledProjection(nn.Module):
    """Projection of CLIP's pooled embedding e to a few tokens: LayerNorm(W e), with W e split into tokens.

    Args:
        image_embed_dim: width of CLIP's `image_embeds`: 1024 for ViT-H/14.
        cross_attention_dim: width of the context.
        tokens: T, 4 in the published files.

    Source: IP-Adapter (arXiv 2308.06721) section 3.2.1; its ip_adapter.py, ImageProjModel.
    """

    clip_output: ClassVar[str] = "image_embeds"

    def __init__(self, image_embed_dim: int, cross_attention_dim: int, *, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(image_embed_dim, tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, clip_hidden_states: Tensor) -> Tensor:
        """Map [B,image_embed_dim] to [B,T,cross_attention_dim]."""
        _check(clip_hidden_states, 2, self.proj.in_features)
        return self.norm(self.proj(clip_hidden_states).unflatten(1, (self.tokens, -1)))


class MLPProjection(nn.Module):
    """Projection of all of CLIP's tokens by two linear layers: LayerNorm(W₂ gelu(W₁ x)).

    Args:
        image_embed_dim: width of CLIP's hidden states.
        cross_attention_dim: width of the context.

    Source: IP-Adapter full face: ip_adapter/ip_adapter.py, MLPProjModel.
    """

    clip_output: ClassVar[str] = "penultimate"

    def __init__(self, image_embed_dim: int, cross_attention_dim: int):
        super().__init__()
        self.image_embed_dim = image_embed_dim
        self.proj = nn.Sequential(
            nn.Linear(image_embed_dim, image_embed_dim),
            nn.GELU(),
            nn.Linear(image_embed_dim, cross_attention_dim),
            nn.LayerNorm(cross_attention_dim),
        )

    def forward(self, clip_hidden_states: Tensor) -> Tensor:
        """Map [B,T,image_embed_dim] to [B,T,cross_attention_dim]."""
        _check(clip_hidden_states, 3, self.image_embed_dim)
        return self.proj(clip_hidden_states)


class PerceiverAttention(nn.Module):
    """Attention from the queries to the image tokens and to themselves, with the published files' key names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_backend = "auto"
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        """Map tokens [B,T,W] and queries [B,Q,W] to [B,Q,W]."""
        queries = self.norm2(queries)
        tokens = torch.cat([self.norm1(x), queries], dim=1)  # [B,T+Q,W]
        key, value = linear_layer(self.to_kv, tokens).chunk(2, dim=-1)  # [B,T+Q,H*D] each
        query, key, value = (split_heads(t, self.heads) for t in (linear_layer(self.to_q, queries), key, value))
        attended = flash_attention(query, key, value, backend=self.attention_backend)  # [B,H,Q,D]
        return linear_layer(self.to_out, merge_heads(attended))


class Resampler(nn.Module):
    """Learned queries that attend to all of CLIP's tokens in several layers.

    Args:
        image_embed_dim: width of CLIP's hidden states.
        cross_attention_dim: width of the context.
        tokens: Q, the number of queries, 16 in the published files.
        width: W of the layers, `cross_attention_dim` in the published files.
        depth: number of layers, 4 in the published files.
        heads: number of heads, 12 in the published files, each 64 wide.

    Source: IP-Adapter Plus: ip_adapter/resampler.py; ImageDream (arXiv 2312.02201) section 3.2, its local controller.
    """

    clip_output: ClassVar[str] = "penultimate"

    def __init__(
        self, image_embed_dim: int, cross_attention_dim: int, *, tokens: int, width: int, depth: int, heads: int
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, tokens, width).normal_(std=width**-0.5))
        self.proj_in = nn.Linear(image_embed_dim, width)
        self.proj_out = nn.Linear(width, cross_attention_dim)
        self.norm_out = nn.LayerNorm(cross_attention_dim)
        layers = ([PerceiverAttention(width, heads), self._feed_forward(width)] for _ in range(depth))
        self.layers = cast("Sequence[Sequence[nn.Module]]", nn.ModuleList(map(nn.ModuleList, layers)))

    @staticmethod
    def _feed_forward(width: int) -> nn.Sequential:
        up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        return nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), down)

    def forward(self, clip_hidden_states: Tensor) -> Tensor:
        """Map [B,T,image_embed_dim] to [B,Q,cross_attention_dim]."""
        _check(clip_hidden_states, 3, self.proj_in.in_features)
        x, queries = self.proj_in(clip_hidden_states), self.latents.expand(len(clip_hidden_states), -1, -1)
        for attention, feed_forward in self.layers:
            queries = queries + attention(x, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


def _check(clip_hidden_states: Tensor, ndim: int, width: int) -> None:
    if clip_hidden_states.ndim != ndim or clip_hidden_states.shape[-1] != width:
        expected = f"[B,{width}]" if ndim == 2 else f"[B,T,{width}]"
        raise ValueError(f"clip_hidden_states: expected {expected}, got {list(clip_hidden_states.shape)}")


Projection = ImageProjection | PooledProjection | MLPProjection | Resampler


def image_projection(config: UNetConfig) -> Projection | None:
    """Build the projection of a U-Net's configuration; None if it has none."""
    checked: Any = config  # its sizes are not None, where the projection needs them
    sizes = (checked.image_embed_dim, checked.cross_attention_dim)
    if config.image_projection == "linear":
        return ImageProjection(*sizes)
    if config.image_projection == "pooled":
        return PooledProjection(*sizes, tokens=checked.image_tokens)
    if config.image_projection == "mlp":
        return MLPProjection(*sizes)
    if config.image_projection == "resampler":
        return Resampler(
            *sizes,
            tokens=checked.image_tokens,
            width=checked.resampler_width,
            depth=checked.resampler_depth,
            heads=checked.resampler_heads,
        )
    return None
