"""Class labels of unCLIP: a noised CLIP image embedding beside the embedding of its noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gafext.config.base import Config, require
from gafext.models.base import PretrainedModel
from gafext.models.embeddings import timestep_embedding

NOISE_LEVEL = 0
"""Timestep of the noise schedule at which image embeddings are noised."""


@dataclass(frozen=True)
class ImageNormalizerConfig(Config):
    """Configuration of a diffusers StableUnCLIPImageNormalizer."""

    class_name: ClassVar[str] = "StableUnCLIPImageNormalizer"

    embedding_dim: int = 768

    def __post_init__(self) -> None:
        require(0 < self.embedding_dim <= 65536, f"embedding_dim={self.embedding_dim}: expected 1 to 65536")


class ImageNormalizer(PretrainedModel):
    """Mean and standard deviation of CLIP's image embeddings, with which unCLIP noises an embedding.

    Args:
        config: width of the embeddings.

    Source: diffusers: pipelines/stable_diffusion/stable_unclip_image_normalizer.py.
    """

    config_class: ClassVar = ImageNormalizerConfig
    config: ImageNormalizerConfig

    def __init__(self, config: ImageNormalizerConfig):
        super().__init__(config)
        self.mean = nn.Parameter(torch.zeros(1, config.embedding_dim))
        self.std = nn.Parameter(torch.ones(1, config.embedding_dim))

    def forward(self, image_embeds: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
        """Compute class labels: [μ + √ᾱ (e - μ) + √(1 - ᾱ) σ·noise, sinusoids of the noise level].

        Args:
            image_embeds: e, CLIP's projected image embeddings [N,D], any floating-point dtype.
            noise: standard normal noise [N,D].
            alphas_cumprod: ᾱ of every timestep of the noise schedule of image embeddings, [T].

        Returns:
            [N,2D] float32.

        Source: diffusers: pipelines/stable_diffusion/pipeline_stable_unclip_img2img.py, noise_image_embeddings.
        """
        signal = alphas_cumprod[NOISE_LEVEL].item()
        mean, std = self.mean.float(), self.std.float()
        noised = mean + signal**0.5 * (image_embeds.float() - mean) + (1 - signal) ** 0.5 * std * noise
        level = timestep_embedding(torch.full(noised.shape[:1], NOISE_LEVEL, device=noised.device), noised.shape[1])
        return torch.cat([noised, level], dim=1)
