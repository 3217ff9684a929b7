"""From CLIP's tokens to the tokens that `attn_ip` attends to."""

from __future__ import annotations

from torch import Tensor, nn


class ImageProjection(nn.Module):
    """Linear projection of CLIP's patch tokens to the U-Net's context width.

    Args:
        image_embed_dim: width of CLIP's hidden states: 1280 for ViT-H/14.
        cross_attention_dim: width of the context: 1024 for SD 2.1.

    Source: GAF (arXiv 2412.10209): 257 tokens of ViT-H/14, projected.
    """

    clip_output = "last_hidden_state"
    """Which of CLIP's outputs it reads; resampler adapters read the penultimate one."""

    def __init__(self, image_embed_dim: int, cross_attention_dim: int):
        super().__init__()
        self.proj = nn.Linear(image_embed_dim, cross_attention_dim)

    def forward(self, clip_hidden_states: Tensor) -> Tensor:
        """[B,T,image_embed_dim] -> [B,T,cross_attention_dim]."""
        if clip_hidden_states.shape[-1] != self.proj.in_features:
            raise ValueError(
                f"clip_hidden_states: expected width {self.proj.in_features}, got {clip_hidden_states.shape[-1]}"
            )
        return self.proj(clip_hidden_states)
