"""The attentions and the feed-forward layer of a transformer block, with diffusers' submodule names."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from gafext.ops import cross_view_attention, flash_attention, geglu, geglu_gate
from gafext.ops.linear import linear_layer


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B,L,H*D] -> [B,H,L,D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B,H,L,D] -> [B,L,H*D]; a view of what the attentions return."""
    return x.transpose(1, 2).flatten(2)


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
        return linear_layer(layer, x, backend=self.attention_backend)

    def key_value(self, context: Tensor) -> KeyValue:
        """Keys and values of a context [B,T,C'] that many calls attend to."""
        key, value = (split_heads(self.project(layer, context), self.heads) for layer in (self.to_k, self.to_v))
        return KeyValue(key, value)

    def attend(self, query: Tensor, key_value: KeyValue) -> Tensor:
        """Attention before the output projection: query [N,L,C], R contexts -> [N,L,C].

        N is a multiple of R: each run of N/R rows shares a context, as one long row of queries; nothing is repeated.
        """
        long = split_heads(query.reshape(key_value.key.shape[0], -1, query.shape[-1]), self.heads)  # [R,H,N/R*L,D]
        attended = flash_attention(long, *key_value, backend=self.attention_backend)
        return merge_heads(attended).view(query.shape)

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
        return KeyValue(split_heads(key, self.heads), split_heads(value * scale, self.heads))

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
        query = split_heads(self.project(self.to_q, hidden_states), self.heads)
        key, value = self.key_value(hidden_states)
        attended = cross_view_attention(query, key, value, num_views, backend=self.attention_backend)
        return self.project(self.to_out[0], merge_heads(attended))


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.attention_backend = "auto"
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(self.proj, nn.Linear):  # 8-bit weights
            return geglu_gate(self.proj(hidden_states), backend=self.attention_backend)
        return geglu(hidden_states, self.proj.weight, self.proj.bias, backend=self.attention_backend)


class FeedForward(nn.Module):
    """GEGLU up to four times the width, and down again. `net.1` is diffusers' dropout: it has no weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention_backend = "auto"
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear_layer(self.net[2], self.net[0](hidden_states), backend=self.attention_backend)
