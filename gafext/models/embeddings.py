"""Embeddings of timesteps, camera poses and images, of which the U-Net's residual blocks take the sum."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.ops.linear import linear_layer


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Encode timesteps as sinusoids: [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i/half), half = C // 2.

    Args:
        timesteps: [B], any dtype.
        channels: C; if it is odd, the last channel is zero.

    Returns:
        [B,C] float32.

    Source: diffusers: models/embeddings.py, get_timestep_embedding with flip_sin_to_cos and freq_shift 0.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=timesteps.device, dtype=torch.float32))
    angles = timesteps[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, channels - 2 * half))


class TimestepEmbedding(nn.Module):
    """MLP (linear_1, SiLU, linear_2) of the timestep's sinusoids or of a camera pose."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return linear_layer(self.linear_2, F.silu(linear_layer(self.linear_1, x)))


class ImageTimeEmbedding(nn.Module):
    """Map image embeddings [rows,D] to vectors that are added to the embedding of the timestep.

    Source: diffusers: models/embeddings.py, ImageTimeEmbedding.
    """

    def __init__(self, image_embed_dim: int, time_embed_dim: int):
        super().__init__()
        self.image_proj = nn.Linear(image_embed_dim, time_embed_dim)
        self.image_norm = nn.LayerNorm(time_embed_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        return self.image_norm(linear_layer(self.image_proj, image_embeds))
