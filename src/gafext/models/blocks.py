"""Blocks of the U-Net and the autoencoder, with diffusers' submodule names."""

from __future__ import annotations

from collections.abc import Sequence
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

    def project(self, layer: nn.Module, x: Tensor) -> Tensor:
        return ops.linear(layer, x, backend=self.attention_backend)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,L,C] -> [B,H,L,D], a view

    def merge_heads(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # [B,H,L,D] -> [B,L,C]

    def key_value(self, context: Tensor) -> KeyValue:
        """Keys and values of a context [B,T,C'] that many calls attend to."""
        return KeyValue(
            self.split_heads(self.project(self.to_k, context)), self.split_heads(self.project(self.to_v, context))
        )

    def attend(self, query: Tensor, key_value: KeyValue) -> Tensor:
        """Attention before the output projection: query [N,L,C], R contexts -> [N,L,C].

        N is a multiple of R: each run of N/R rows shares a context, as one long row of queries; nothing is repeated.
        """
        long = self.split_heads(query.reshape(key_value.key.shape[0], -1, query.shape[-1]))  # [R,H,N/R*L,D]
        attended = ops.attention(long, *key_value, backend=self.attention_backend)
        return self.merge_heads(attended).view(query.shape)

    def forward(self, hidden_states: Tensor, key_value: KeyValue | None = None) -> Tensor:
        """Self-attention, or attention to ready keys and values: [N,L,C] -> [N,L,C]."""
        key_value = key_value or self.key_value(hidden_states)
        return self.project(self.to_out[0], self.attend(self.project(self.to_q, hidden_states), key_value))


class DecoupledAttention(Attention):
    """Attention to the text and, where there is `to_k_ip`, to the image with the same queries.

    out = W_out (softmax(Q K_textᵀ / √D) V_text + s · softmax(Q K_imageᵀ / √D) V_image)

    Source: IP-Adapter (arXiv 2308.06721) eq. 5; ImageDream (arXiv 2312.02201) section 3.2.
    """

    def __init__(self, channels: int, heads: int, *, context_channels: int, image: bool):
        super().__init__(channels, heads, context_channels=context_channels)
        self.to_k_ip = self.to_v_ip = None
        if image:
            self.add_image()

    def add_image(self) -> None:
        """Make room for the image's projections."""
        self.to_k_ip, self.to_v_ip = (
            nn.Linear(self.to_k.in_features, self.to_k.out_features, bias=False) for _ in range(2)
        )

    def image_key_value(self, image_embeds: Tensor, scale: float = 1.0) -> KeyValue:
        """Keys and values of image tokens [B,T,C']; `scale` is s."""
        key, value = self.to_k_ip(image_embeds), self.to_v_ip(image_embeds)
        return KeyValue(self.split_heads(key), self.split_heads(value * scale))

    def forward(
        self, hidden_states: Tensor, text: KeyValue | None, image: KeyValue | None = None, *, first: int = 0
    ) -> Tensor:
        """[N,L,C] -> [N,L,C], from at least one of text and image; the rows before `first` do not see the image."""
        query = self.project(self.to_q, hidden_states)
        attended = None if text is None else self.attend(query, text)
        if image is not None:
            seen = self.attend(query[first:], image)
            if first > 0:
                seen = F.pad(seen, (0, 0, 0, 0, first, 0))
            attended = seen if attended is None else attended + seen
        return self.project(self.to_out[0], attended)


class CrossViewAttention(Attention):
    """Attention over the views at each position; [B*V,L,C] with the view fastest."""

    def forward(self, hidden_states: Tensor, num_views: int) -> Tensor:
        query = self.split_heads(self.project(self.to_q, hidden_states))
        key, value = self.key_value(hidden_states)
        attended = ops.cross_view_attention(query, key, value, num_views, backend=self.attention_backend)
        return self.project(self.to_out[0], self.merge_heads(attended))


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.attention_backend = "auto"
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(self.proj, nn.Linear):  # 8-bit weights
            return ops.geglu_gate(self.proj(hidden_states), backend=self.attention_backend)
        return ops.geglu(hidden_states, self.proj.weight, self.proj.bias, backend=self.attention_backend)


class FeedForward(nn.Module):
    """GEGLU up to four times the width, and down again. `net.1` is diffusers' dropout: it has no weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention_backend = "auto"
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.linear(self.net[2], self.net[0](hidden_states), backend=self.attention_backend)


class MultiViewTransformerBlock(nn.Module):
    """One transformer block: attn1, attn_cv, attn2, attn_ip, ff, each with its own LayerNorm and residual.

    Args:
        channels: C.
        heads: H; a head is C/H wide.
        context_channels: width of the text and image tokens.
        cross_view: "position" adds `attn_cv`, attention over the views at each position; "dense" lets `attn1` attend
            to all positions of all views of a portrait; None keeps the views apart.
        image_attention: "block" adds `attn_ip`; "decoupled" adds `attn2.to_k_ip` and `attn2.to_v_ip`; None neither.

    Raises:
        ValueError: `cross_view` or `image_attention` is something else.

    Source: GAF (arXiv 2412.10209) section 3; MVDream (arXiv 2308.16512) section 3.1 (dense); diffusers:
    models/attention.py, BasicTransformerBlock.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        context_channels: int,
        cross_view: str | None = "position",
        image_attention: str | None = "block",
    ):
        super().__init__()
        if cross_view not in (None, "position", "dense"):
            raise ValueError(f"cross_view: expected None, 'position' or 'dense', got {cross_view!r}")
        if image_attention not in (None, "block", "decoupled"):
            raise ValueError(f"image_attention: expected None, 'block' or 'decoupled', got {image_attention!r}")
        positions, block = cross_view == "position", image_attention == "block"
        self.dense = cross_view == "dense"
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm_cv = nn.LayerNorm(channels) if positions else None
        self.attn_cv = CrossViewAttention(channels, heads) if positions else None
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = DecoupledAttention(
            channels, heads, context_channels=context_channels, image=image_attention == "decoupled"
        )
        self.norm_ip = nn.LayerNorm(channels) if block else None
        self.attn_ip = Attention(channels, heads, context_channels=context_channels) if block else None
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeyValue | None = None,
        *,
        image_embeds: Tensor | KeyValue | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """Apply the operations.

        Args:
            hidden_states: [B*V,L,C], the view running fastest.
            encoder_hidden_states: text [R,T,context_channels], or its `KeyValue` from `text_key_value`; R divides B*V,
                and each run of B*V/R rows reads one text. None is the all-zero text, of which K = V = 0, so that it
                adds nothing but attn2's output bias.
            image_embeds: image tokens [B,T,context_channels], or their `KeyValue` from `image_key_value`. Fewer than
                B portraits serve the LAST rows, and the rows before them see no image: this is how the
                unconditional pass shares the batch. None is no image at all.
            num_views: V.

        Returns:
            [B*V,L,C].

        Raises:
            ValueError: there are more portraits than rows, or no part that reads an image.
        """
        x, text, image = hidden_states, encoder_hidden_states, image_embeds
        if isinstance(text, Tensor):
            text = self.text_key_value(text)
        if isinstance(image, Tensor):
            image = self.image_key_value(image)
        first = self._first_with_image(x, image, num_views)

        views = num_views if self.dense else 1
        x = x + self.attn1(self.norm1(x).reshape(-1, views * x.shape[1], x.shape[2])).view_as(x)
        if self.attn_cv is not None:
            x = x + self.attn_cv(self.norm_cv(x), num_views)
        decoupled = image if self.attn_ip is None else None
        if text is None and decoupled is None:
            x = x + self.attn2.to_out[0].bias
        else:
            x = x + self.attn2(self.norm2(x), text, decoupled, first=first)
        if self.attn_ip is not None and image is not None:
            rows = x[first:]
            rows = rows + self.attn_ip(self.norm_ip(rows), image)
            x = rows if first == 0 else torch.cat([x[:first], rows])
        return x + self.ff(self.norm3(x))

    def text_key_value(self, encoder_hidden_states: Tensor) -> KeyValue:
        """Keys and values of a text [R,T,C'], which do not change over the denoising steps."""
        return self.attn2.key_value(encoder_hidden_states)

    def image_key_value(self, image_embeds: Tensor, scale: float = 1.0) -> KeyValue:
        """Keys and values of image tokens [B,T,C'], which do not change either; `scale` weighs decoupled attention."""
        if self.attn_ip is not None:
            return self.attn_ip.key_value(image_embeds)
        if self.attn2.to_k_ip is None:
            raise ValueError("image_embeds: expected None, because this block reads no image")
        return self.attn2.image_key_value(image_embeds, scale)

    @staticmethod
    def _first_with_image(x: Tensor, image: KeyValue | None, num_views: int) -> int:
        portraits = 0 if image is None else image.key.shape[0]
        first = x.shape[0] - portraits * num_views
        if first < 0:
            raise ValueError(f"image_embeds: expected at most {x.shape[0] // num_views} portraits, got {portraits}")
        return first


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
        cross_view: str | None,
        image_attention: str | None,
    ):
        super().__init__()
        self.linear_projection = linear_projection
        self.attention_backend = "auto"
        self.norm = GroupNorm(groups, channels, eps=1e-6, silu=False)
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
        text: Sequence[KeyValue | None],
        image: Sequence[KeyValue | None],
        *,
        num_views: int = 1,
    ) -> Tensor:
        """[B*V,C,h,w] -> [B*V,C,h,w]; `text` and `image` have one entry a transformer block."""
        height = hidden_states.shape[-2]
        x = self.norm(hidden_states)
        if not self.linear_projection:
            x = self.proj_in(x)
        x = x.flatten(2).transpose(1, 2)  # [B*V,L,C]
        if self.linear_projection:
            x = ops.linear(self.proj_in, x, backend=self.attention_backend)
        for block, block_text, block_image in zip(self.transformer_blocks, text, image, strict=True):
            x = block(x, block_text, image_embeds=block_image, num_views=num_views)
        if self.linear_projection:
            x = ops.linear(self.proj_out, x, backend=self.attention_backend)
        x = x.transpose(1, 2).unflatten(2, (height, -1))
        if not self.linear_projection:
            x = self.proj_out(x)
        return hidden_states + x  # in this order: the sum keeps the memory format of hidden_states


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution with a border of zeros, through `gafext.attention`'s choice of backend."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.attention_backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv3x3(x, self.weight, self.bias, backend=self.attention_backend)


class GroupNorm(nn.GroupNorm):
    """Group normalisation and, with `silu`, the SiLU after it, through `gafext.attention`'s choice of backend."""

    def __init__(self, groups: int, channels: int, *, eps: float, silu: bool):
        super().__init__(groups, channels, eps=eps)
        self.attention_backend = "auto"
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, backend=self.attention_backend
        )


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
        self.norm1 = GroupNorm(groups, in_channels, eps=eps, silu=True)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = GroupNorm(groups, out_channels, eps=eps, silu=True)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """[B,Cin,h,w], time embedding [B,time_channels] -> [B,Cout,h,w]."""
        x = self.conv1(self.norm1(hidden_states))
        if self.time_emb_proj is not None:
            x = x + self.time_emb_proj(F.silu(time_embedding))[:, :, None, None]
        x = self.conv2(self.norm2(x))
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
        self.conv = Conv3x3(channels, channels)

    def forward(self, hidden_states: Tensor, size: torch.Size | None = None) -> Tensor:
        factor = None if size is not None else 2.0
        return self.conv(F.interpolate(hidden_states, size=size, scale_factor=factor, mode="nearest"))
