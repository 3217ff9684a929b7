"""Attention layers and feed-forward layer of a transformer block, with diffusers' submodule names."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.ops import cross_view_attention, flash_attention, geglu, geglu_gate
from gafext.ops.linear import linear_layer


def split_heads(x: Tensor, heads: int) -> Tensor:
    """View [B,L,H*D] as [B,H,L,D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Merge [B,H,L,D] to [B,L,H*D]; for results of the attention operations, a view."""
    return x.transpose(1, 2).flatten(2)


class KeyValue(NamedTuple):
    """Keys and values of one attention, split into heads."""

    key: Tensor  # [B,H,T,D]
    value: Tensor  # [B,H,T,D]


class Attention(nn.Module):
    """Multi-head attention with diffusers' key names: to_q, to_k, to_v without bias, to_out.0 with bias.

    With `upcast_attention` the scores of half-precision queries and keys are float32 in every backend. In most they
    always are; those of the reference, and of PyTorch's operation on MPS, would overflow beyond 65504 in float16.
    """

    def __init__(self, channels: int, heads: int, *, context_channels: int | None = None):
        super().__init__()
        self.heads = heads
        self.attention_backend = "auto"
        self.upcast_attention = False
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def project(self, layer: nn.Module, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        return linear_layer(layer, x, residual=residual, backend=self.attention_backend)

    @property
    def adds_residual(self) -> bool:
        """Whether `forward` takes a residual and adds it in the pass over memory of its last layer."""
        return bool(getattr(self.to_out[0], "adds_residual", False))

    def operate(self, operation: Callable[..., Tensor], query: Tensor, key_value: KeyValue, *args: int) -> Tensor:
        """Run an attention operation on heads [.,H,L,D] with this layer's backend."""
        options = {"backend": self.attention_backend}
        if self.upcast_attention and (self.attention_backend == "reference" or query.device.type == "mps"):
            wide = (tensor.float() for tensor in (query, *key_value))
            return operation(*wide, *args, **options).to(query.dtype)
        return operation(query, *key_value, *args, **options)

    def key_value(self, context: Tensor) -> KeyValue:
        """Compute the keys and values of a context [B,T,C'], for any number of calls."""
        key, value = (split_heads(self.project(layer, context), self.heads) for layer in (self.to_k, self.to_v))
        return KeyValue(key, value)

    def key_value_with_front(self, hidden_states: Tensor, num_views: int) -> KeyValue:
        """Compute the keys and values of the first view, followed by each view's own: [B*V,L,C] to [B*V,H,2L,D]."""
        own = self.key_value(hidden_states)
        fronts = (tensor[::num_views].repeat_interleave(num_views, dim=0) for tensor in own)
        return KeyValue(*(torch.cat(pair, dim=2) for pair in zip(fronts, own, strict=True)))

    def attend(self, query: Tensor, key_value: KeyValue) -> Tensor:
        """Attend without the output projection: query [N,L,C] and R contexts to [N,L,C].

        N is a multiple of R: each run of N/R rows shares a context and is one row of queries, so that no context is
        repeated.
        """
        queries = split_heads(query.reshape(key_value.key.shape[0], -1, query.shape[-1]), self.heads)  # [R,H,N/R*L,D]
        return merge_heads(self.operate(flash_attention, queries, key_value)).view(query.shape)

    def forward(
        self, hidden_states: Tensor, key_value: KeyValue | None = None, *, residual: Tensor | None = None
    ) -> Tensor:
        """Map [N,L,C] to [N,L,C] by self-attention, or by attention to precomputed keys and values."""
        key_value = key_value or self.key_value(hidden_states)
        attended = self.attend(self.project(self.to_q, hidden_states), key_value)
        return self.project(self.to_out[0], attended, residual=residual)


class DecoupledAttention(Attention):
    """Attention to the text and, if the layer has `to_k_ip`, to the image with the same queries.

    out = W_out (softmax(Q K_textᵀ / √D) V_text + s · softmax(Q K_imageᵀ / √D) V_image)

    Source: IP-Adapter (arXiv 2308.06721) eq. 5; ImageDream (arXiv 2312.02201) section 3.2.
    """

    def __init__(self, channels: int, heads: int, *, context_channels: int, image: bool):
        super().__init__(channels, heads, context_channels=context_channels)
        self.to_k_ip = self.to_v_ip = None
        if image:
            self.add_image()

    def add_image(self) -> None:
        """Add the projections of the image, `to_k_ip` and `to_v_ip`."""
        self.to_k_ip, self.to_v_ip = (
            nn.Linear(self.to_k.in_features, self.to_k.out_features, bias=False) for _ in range(2)
        )

    def image_key_value(self, image_embeds: Tensor, scale: float = 1.0) -> KeyValue:
        """Compute the keys and values of image tokens [B,T,C']; `scale` is s."""
        assert self.to_k_ip is not None and self.to_v_ip is not None
        key, value = self.to_k_ip(image_embeds), self.to_v_ip(image_embeds)
        return KeyValue(split_heads(key, self.heads), split_heads(value * scale, self.heads))

    def forward(
        self,
        hidden_states: Tensor,
        text: KeyValue | None,
        image: KeyValue | None = None,
        *,
        first: int = 0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Map [N,L,C] to [N,L,C], given text, image or both; rows before `first` do not attend to the image."""
        query = self.project(self.to_q, hidden_states)
        attended = None if text is None else self.attend(query, text)
        if first == len(query) and attended is None:
            attended = torch.zeros_like(query)  # no row has an image
        elif image is not None and first < len(query):
            from_image = self.attend(query[first:], image)
            if first > 0:
                from_image = F.pad(from_image, (0, 0, 0, 0, first, 0))
            attended = from_image if attended is None else attended + from_image
        assert attended is not None
        return self.project(self.to_out[0], attended, residual=residual)


class CrossViewAttention(Attention):
    """Attention over the views at each position of [B*V,L,C], the view index fastest."""

    def forward(self, hidden_states: Tensor, num_views: int, *, residual: Tensor | None = None) -> Tensor:
        query = split_heads(self.project(self.to_q, hidden_states), self.heads)
        attended = self.operate(cross_view_attention, query, self.key_value(hidden_states), num_views)
        return self.project(self.to_out[0], merge_heads(attended), residual=residual)


class GEGLU(nn.Module):
    """Linear projection to value and gate, value * gelu(gate); the projection may have 8-bit weights."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.attention_backend = "auto"
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(self.proj, nn.Linear):  # 8-bit weights
            fused = getattr(self.proj, "geglu", None)
            if fused is not None:
                return fused(hidden_states)
            return geglu_gate(self.proj(hidden_states), backend=self.attention_backend)
        return geglu(hidden_states, self.proj.weight, self.proj.bias, backend=self.attention_backend)


class FeedForward(nn.Module):
    """GEGLU to four times the width and a linear layer back; `net.1` is diffusers' dropout, without weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention_backend = "auto"
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    @property
    def adds_residual(self) -> bool:
        """Whether `forward` takes a residual and adds it in the pass over memory of its last layer."""
        return bool(getattr(self.net[2], "adds_residual", False))

    def forward(self, hidden_states: Tensor, *, residual: Tensor | None = None) -> Tensor:
        gated = self.net[0](hidden_states)
        return linear_layer(self.net[2], gated, residual=residual, backend=self.attention_backend)
