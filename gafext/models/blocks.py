"""Blocks of the U-Net and the autoencoder, with diffusers' submodule names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.models.attention import Attention, CrossViewAttention, DecoupledAttention, FeedForward, KeyValue
from gafext.models.mv_adapter import MultiViewAdapter
from gafext.ops import conv3x3, group_norm_silu
from gafext.ops.backend import prefer
from gafext.ops.conv2d import conv2d_layer
from gafext.ops.linear import linear_layer


class MultiViewTransformerBlock(nn.Module):
    """One transformer block: attn1, attn_cv, attn2, attn_ip, ff, each with its own LayerNorm and residual.

    Args:
        channels: C.
        heads: H; a head is C/H wide.
        context_channels: width of the text and image tokens.
        cross_view: "position" adds `attn_cv`, attention over the views at each position; "dense" lets `attn1` attend
            to all positions of all views of a portrait, "front" to those of the first view and of the own view; "row"
            adds `adapter`, attention over rows of the views and to the portrait, in parallel with `attn1`; None keeps
            the views independent.
        image_attention: "block" adds `attn_ip`; "decoupled" adds `attn2.to_k_ip` and `attn2.to_v_ip`; None neither.

    Raises:
        ValueError: `cross_view` or `image_attention` is something else.

    Source: GAF (arXiv 2412.10209) section 3; MVDream (arXiv 2308.16512) section 3.1 (dense);
    github.com/weijielyu/FaceLift: mvdiffusion/models/transformer_mv2d_image.py, its sparse attention (front);
    diffusers: models/attention.py, BasicTransformerBlock.
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
        if cross_view not in (None, "position", "dense", "front", "row"):
            raise ValueError(f"cross_view: expected None, 'position', 'dense', 'front' or 'row', got {cross_view!r}")
        if image_attention not in (None, "block", "decoupled"):
            raise ValueError(f"image_attention: expected None, 'block' or 'decoupled', got {image_attention!r}")
        positions, block = cross_view == "position", image_attention == "block"
        self.dense, self.front = cross_view == "dense", cross_view == "front"
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.adapter = MultiViewAdapter(channels, heads) if cross_view == "row" else None
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
        reference: KeyValue | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """Apply the block.

        Args:
            hidden_states: [B*V,L,C], the view index fastest.
            encoder_hidden_states: text [R,T,context_channels], or its `KeyValue` from `text_key_value`; R divides B*V,
                and each run of B*V/R rows shares one text. None is the all-zero text, for which K = V = 0: attn2 adds
                its output bias only.
            image_embeds: image tokens [B,T,context_channels], or their `KeyValue` from `image_key_value`. Fewer than
                B portraits belong to the LAST rows, and the rows before have no image: this is how the unconditional
                pass shares the batch. None is no image.
            reference: keys and values of the portraits' features, for `adapter`; None leaves the adapter out.
            num_views: V.

        Returns:
            [B*V,L,C].

        Raises:
            ValueError: there are more portraits than rows, or the block has no attention to an image.
        """
        x, text, image = hidden_states, encoder_hidden_states, image_embeds
        if isinstance(text, Tensor):
            text = self.text_key_value(text)
        if isinstance(image, Tensor):
            image = self.image_key_value(image)
        first = self._first_with_image(x, image, num_views)

        views = num_views if self.dense else 1
        tokens = self.norm1(x).reshape(-1, views * x.shape[1], x.shape[2])
        key_value = self.attn1.key_value_with_front(tokens, num_views) if self.front else None
        x = _add(x.reshape(tokens.shape), self.attn1, tokens, key_value).view_as(x)
        if self.adapter is not None and reference is not None:
            x = x + self.adapter(tokens, reference, num_views)
        if self.attn_cv is not None and self.norm_cv is not None:
            x = _add(x, self.attn_cv, self.norm_cv(x), num_views)
        decoupled = image if self.attn_ip is None else None
        if text is None and decoupled is None:
            x = x + cast("Tensor", self.attn2.to_out[0].bias)
        else:
            x = _add(x, self.attn2, self.norm2(x), text, decoupled, first=first)
        if self.attn_ip is not None and self.norm_ip is not None and image is not None:
            rows = x[first:]
            rows = _add(rows, self.attn_ip, self.norm_ip(rows), image)
            x = rows if first == 0 else torch.cat([x[:first], rows])
        return _add(x, self.ff, self.norm3(x))

    def text_key_value(self, encoder_hidden_states: Tensor) -> KeyValue:
        """Compute the keys and values of a text [R,T,C'], which are constant over the denoising steps."""
        return self.attn2.key_value(encoder_hidden_states)

    def image_key_value(self, image_embeds: Tensor, scale: float = 1.0) -> KeyValue:
        """Compute the keys and values of image tokens [B,T,C']; `scale` is the weight of decoupled attention."""
        if self.attn_ip is not None:
            return self.attn_ip.key_value(image_embeds)
        if self.attn2.to_k_ip is None:
            raise ValueError("image_embeds: expected None, because this block reads no image")
        return self.attn2.image_key_value(image_embeds, scale)

    def reference_key_value(self, features: Tensor) -> KeyValue:
        """Compute the keys and values of the portraits' features [B,L,C], the inputs of `attn1` for their latents."""
        assert self.adapter is not None
        return self.adapter.ref.key_value(features)

    @staticmethod
    def _first_with_image(x: Tensor, image: KeyValue | None, num_views: int) -> int:
        portraits = 0 if image is None else image.key.shape[0]
        first = x.shape[0] - portraits * num_views
        if first < 0:
            raise ValueError(f"image_embeds: expected at most {x.shape[0] // num_views} portraits, got {portraits}")
        return first


def _add(x: Tensor, layer: Attention | FeedForward, *args: Any, **options: Any) -> Tensor:
    """Compute x + layer(...), in one pass over memory where the layer's last product is in 8 bits."""
    if layer.adds_residual:
        return layer(*args, residual=x, **options)
    return x + layer(*args, **options)


class MultiViewSpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with one residual around all blocks.

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
            (lambda: nn.Linear(channels, channels)) if linear_projection else (lambda: Conv2d(channels, channels, 1))
        )
        self.proj_in = projection()
        blocks = nn.ModuleList(
            MultiViewTransformerBlock(
                channels,
                heads,
                context_channels=context_channels,
                cross_view=cross_view,
                image_attention=image_attention,
            )
            for _ in range(layers)
        )
        self.transformer_blocks = cast("Sequence[MultiViewTransformerBlock]", blocks)
        self.proj_out = projection()

    def forward(
        self,
        hidden_states: Tensor,
        text: Sequence[KeyValue | None],
        image: Sequence[KeyValue | None],
        reference: Sequence[KeyValue | None],
        *,
        num_views: int = 1,
    ) -> Tensor:
        """Map [B*V,C,h,w] to [B*V,C,h,w]; `text`, `image` and `reference` have one entry per transformer block."""
        height = hidden_states.shape[-2]
        x = self.norm(hidden_states)
        if not self.linear_projection:
            x = self.proj_in(x)
        x = x.flatten(2).transpose(1, 2)  # [B*V,L,C]
        if self.linear_projection:
            x = linear_layer(self.proj_in, x, backend=self.attention_backend)
        for block, own_text, own_image, own_reference in zip(
            self.transformer_blocks, text, image, reference, strict=True
        ):
            x = block(x, own_text, image_embeds=own_image, reference=own_reference, num_views=num_views)
        adds_residual = self.linear_projection and getattr(self.proj_out, "adds_residual", False)
        if self.linear_projection:
            residual = hidden_states.flatten(2).transpose(1, 2) if adds_residual else None
            x = linear_layer(self.proj_out, x, residual=residual, backend=self.attention_backend)
        x = x.transpose(1, 2).unflatten(2, (height, -1))
        if not self.linear_projection:
            x = self.proj_out(x)
        # In this order, the sum has the memory format of hidden_states.
        return x if adds_residual else hidden_states + x


class Conv2d(nn.Conv2d):
    """Convolution of any kernel, in the fastest form that the CPU has."""

    def forward(self, input: Tensor) -> Tensor:
        return conv2d_layer(self, input)


class Conv3x3(nn.Conv2d):
    """3×3 convolution with zero padding of 1."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.attention_backend = "auto"

    def forward(self, x: Tensor, *, addend: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Convolve [B,Cin,h,w] to [B,Cout,h,w], and add `addend` [B,Cout] and `residual` [B,Cout,h,w]."""
        assert self.bias is not None
        bias = self.bias if addend is None else self.bias + addend
        return conv3x3(x, self.weight, bias, residual, backend=prefer(self.attention_backend))


class GroupNorm(nn.GroupNorm):
    """Group normalisation, followed by SiLU if `silu` is set.

    Attributes:
        statistics: variances and means [B,G,1,1,1] float32 to normalise by; None: those of the input.
    """

    def __init__(self, groups: int, channels: int, *, eps: float, silu: bool):
        super().__init__(groups, channels, eps=eps)
        self.attention_backend = "auto"
        self.silu = silu
        self.statistics: tuple[Tensor, Tensor] | None = None

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the variances and means of the groups of x [B,C,h,w], for `statistics`."""
        groups = x.unflatten(1, (self.num_groups, -1)).float()
        return torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.statistics is not None:
            variance, mean = self.statistics
            weight, bias = (tensor.unflatten(0, (self.num_groups, -1, 1, 1)) for tensor in (self.weight, self.bias))
            scale = (variance + self.eps).rsqrt() * weight
            shift = bias - mean * scale
            x = torch.addcmul(shift.flatten(1, 2).to(x.dtype), x, scale.flatten(1, 2).to(x.dtype))
            return F.silu(x, inplace=True) if self.silu else x
        backend = prefer(self.attention_backend)
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, backend=backend)


class ResnetBlock2D(nn.Module):
    """Residual block: norm, SiLU, conv, plus the time embedding, norm, SiLU, conv, plus the input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; if they differ, the residual goes through a 1×1 convolution.
        time_channels: width of the time embedding; None for a block without it.
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
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """Map [B,Cin,h,w] and the time embedding [B,time_channels] to [B,Cout,h,w]."""
        time = None
        if self.time_emb_proj is not None:
            assert time_embedding is not None
            time = linear_layer(self.time_emb_proj, F.silu(time_embedding))
        x = self.conv1(self.norm1(hidden_states), addend=time)
        shortcut = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        return self.conv2(self.norm2(x), residual=shortcut)


class Downsample2D(nn.Module):
    """Stride-2 convolution; padding 0 pads the bottom and the right only, as the autoencoder's encoder does."""

    def __init__(self, channels: int, *, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(hidden_states if self.padding else F.pad(hidden_states, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling to twice the size, or to `size`, followed by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, hidden_states: Tensor, size: torch.Size | None = None) -> Tensor:
        factor = None if size is not None else 2.0
        return self.conv(F.interpolate(hidden_states, size=size, scale_factor=factor, mode="nearest"))
