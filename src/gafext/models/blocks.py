"""Blocks of the U-Net and the autoencoder, with diffusers' submodule names."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext import attention as ops


class KeyValue(NamedTuple):
    """Keys and values of one attention, split into heads."""

    key: Tensor  # [B,H,T,D]
    value: Tensor  # [B,H,T,D]


class Attention(nn.Module):
    """Multi-head attention with diffusers' key names: to_q, to_k, to_v without bias, to_out.0 with one."""

    def __init__(self, channels: int, heads: int, *, context_channels: int | None = None):
        super().__init__()
        self.heads = heads
        self.attention_backend = "auto"
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,L,C] -> [B,H,L,D], a view

    def project_out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.transpose(1, 2).flatten(2))  # [B,H,L,D] -> [B,L,C]

    def key_value(self, context: Tensor) -> KeyValue:
        """Keys and values of a context [B,T,C'] that many calls attend to."""
        return KeyValue(self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context)))

    def forward(self, hidden_states: Tensor, key_value: KeyValue | None = None) -> Tensor:
        """Self-attention, or attention to ready keys and values: [B,L,C] -> [B,L,C]."""
        key, value = key_value or self.key_value(hidden_states)
        query = self.split_heads(self.to_q(hidden_states))
        return self.project_out(ops.attention(query, key, value, backend=self.attention_backend))


class CrossViewAttention(Attention):
    """Attention over the views at each position; [B*V,L,C] with the view fastest."""

    def forward(self, hidden_states: Tensor, num_views: int) -> Tensor:
        query = self.split_heads(self.to_q(hidden_states))
        key, value = self.key_value(hidden_states)
        attended = ops.cross_view_attention(query, key, value, num_views, backend=self.attention_backend)
        return self.project_out(attended)


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.attention_backend = "auto"
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.geglu(hidden_states, self.proj.weight, self.proj.bias, backend=self.attention_backend)


class FeedForward(nn.Module):
    """GEGLU up to four times the width, and down again. `net.1` is diffusers' dropout: it has no weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.net[2](self.net[0](hidden_states))


class MultiViewTransformerBlock(nn.Module):
    """One transformer block: attn1, attn_cv, attn2, attn_ip, ff, each with its own LayerNorm and residual.

    Args:
        channels: C.
        heads: H; a head is C/H wide.
        context_channels: width of the text and image tokens.
        cross_view: whether there is `attn_cv`.
        image_attention: whether there is `attn_ip`.

    Source: GAF (arXiv 2412.10209) section 3; diffusers: models/attention.py, BasicTransformerBlock.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        context_channels: int,
        cross_view: bool = True,
        image_attention: bool = True,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm_cv = nn.LayerNorm(channels) if cross_view else None
        self.attn_cv = CrossViewAttention(channels, heads) if cross_view else None
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels=context_channels)
        self.norm_ip = nn.LayerNorm(channels) if image_attention else None
        self.attn_ip = Attention(channels, heads, context_channels=context_channels) if image_attention else None
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        image_embeds: Tensor | KeyValue | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """Apply the five operations.

        Args:
            hidden_states: [B*V,L,C], the view running fastest.
            encoder_hidden_states: text [B*V,T,context_channels]; None is the all-zero text, of which K = V = 0, so
                that attn2 adds its output bias alone.
            image_embeds: image tokens [B,T,context_channels], or their `KeyValue` from `image_key_value`. Fewer than
                B portraits serve the LAST rows, and the rows before them skip attn_ip: this is how the
                unconditional pass shares the batch. None skips attn_ip altogether.
            num_views: V.

        Returns:
            [B*V,L,C].
        """
        x = hidden_states
        x = x + self.attn1(self.norm1(x))
        if self.attn_cv is not None:
            x = x + self.attn_cv(self.norm_cv(x), num_views)
        if encoder_hidden_states is None:
            x = x + self.attn2.to_out[0].bias
        else:
            x = x + self.attn2(self.norm2(x), self.attn2.key_value(encoder_hidden_states))
        if self.attn_ip is not None and image_embeds is not None:
            x = self._attend_to_image(x, image_embeds, num_views)
        return x + self.ff(self.norm3(x))

    def image_key_value(self, image_embeds: Tensor) -> KeyValue:
        """Keys and values of image tokens [B,T,C'], which do not change over the denoising steps."""
        return self.attn_ip.key_value(image_embeds)

    def _attend_to_image(self, x: Tensor, image_embeds: Tensor | KeyValue, num_views: int) -> Tensor:
        key_value = image_embeds if isinstance(image_embeds, KeyValue) else self.image_key_value(image_embeds)
        # The V views of a portrait attend to the same tokens: as one long row of queries, nothing is repeated.
        conditional = key_value.key.shape[0] * num_views
        first = x.shape[0] - conditional
        if first < 0:
            raise ValueError(
                f"image_embeds: expected at most {x.shape[0] // num_views} portraits, got {key_value.key.shape[0]}"
            )
        rows = x[first:]
        queries = self.norm_ip(rows).reshape(key_value.key.shape[0], -1, x.shape[-1])  # [B,V*L,C]
        rows = rows + self.attn_ip(queries, key_value).view_as(rows)
        return rows if first == 0 else torch.cat([x[:first], rows])


class MultiViewSpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual around all of them.

    Source: diffusers: models/transformers/transformer_2d.py (its continuous input).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        layers: int,
        context_channels: int,
        groups: int,
        linear_projection: bool,
        cross_view: bool,
        image_attention: bool,
    ):
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        projection = (
            (lambda: nn.Linear(channels, channels)) if linear_projection else (lambda: nn.Conv2d(channels, channels, 1))
        )
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(
            MultiViewTransformerBlock(
                channels,
                heads,
                context_channels=context_channels,
                cross_view=cross_view,
                image_attention=image_attention,
            )
            for _ in range(layers)
        )
        self.proj_out = projection()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        image_key_values: list[KeyValue] | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """[B*V,C,h,w] -> [B*V,C,h,w]; `image_key_values` has one entry a transformer block."""
        height = hidden_states.shape[-2]
        x = self.norm(hidden_states)
        if not self.linear_projection:
            x = self.proj_in(x)
        x = x.flatten(2).transpose(1, 2)  # [B*V,L,C]
        if self.linear_projection:
            x = self.proj_in(x)
        for index, block in enumerate(self.transformer_blocks):
            image = image_key_values[index] if image_key_values else None
            x = block(x, encoder_hidden_states, image_embeds=image, num_views=num_views)
        if self.linear_projection:
            x = self.proj_out(x)
        x = x.transpose(1, 2).unflatten(2, (height, -1))
        if not self.linear_projection:
            x = self.proj_out(x)
        return x + hidden_states


class ResnetBlock2D(nn.Module):
    """norm, SiLU, conv, plus the time embedding; norm, SiLU, conv; plus the input.

    Args:
        in_channels: channels in.
        out_channels: channels out; a 1×1 convolution carries the residual when they differ.
        time_channels: width of the time embedding, or None for a block without one.
        groups: of the two GroupNorms.
        eps: of the two GroupNorms: 1e-5 in the U-Net, 1e-6 in the autoencoder.

    Source: diffusers: models/resnet.py, ResnetBlock2D with time_embedding_norm="default".
    """

    def __init__(self, in_channels: int, out_channels: int, *, time_channels: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """[B,Cin,h,w], time embedding [B,time_channels] -> [B,Cout,h,w]."""
        x = self.conv1(F.silu(self.norm1(hidden_states)))
        if self.time_emb_proj is not None:
            x = x + self.time_emb_proj(F.silu(time_embedding))[:, :, None, None]
        x = self.conv2(F.silu(self.norm2(x)))
        shortcut = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        return shortcut + x


class Downsample2D(nn.Module):
    """A stride-2 convolution; padding 0 pads below and to the right alone, as the autoencoder's encoder does."""

    def __init__(self, channels: int, *, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(hidden_states if self.padding else F.pad(hidden_states, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling to twice the size, or to `size`, and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor, size: torch.Size | None = None) -> Tensor:
        factor = None if size is not None else 2.0
        return self.conv(F.interpolate(hidden_states, size=size, scale_factor=factor, mode="nearest"))
