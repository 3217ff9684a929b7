"""Module that a training step runs: the U-Net with its conditions, its loss, and which of its weights are trained."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from gafext.config.scheduler import NoiseScheduleConfig
from gafext.families import family_of
from gafext.models.unet import MultiViewUNet
from gafext.schedulers import schedule
from gafext.training.batches import Batch


def min_snr_weights(alphas_cumprod: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Compute the weights of the squared error by min-SNR: min(SNR, γ) / SNR for ε, min(SNR + 1, γ) / (SNR + 1) for v.

    The paper has min(SNR, γ) / (SNR + 1) for v, which is 0 without signal: a schedule that ends without (arXiv
    2305.08891) would not learn the first step of generation, which decides the background.

    Args:
        alphas_cumprod: ᾱ of each row, [N].
        prediction_type: "epsilon", "v_prediction" or "sample".
        gamma: γ, over 0.

    Returns:
        [N] float32.

    Source: arXiv 2303.09556 section 3.4; for v, its appendix, and diffusers: examples/text_to_image.
    """
    # SNR = ᾱ/(1 - ᾱ); written so that neither zero signal nor zero noise divides by 0.
    noise = 1 - alphas_cumprod
    if prediction_type == "epsilon":
        return (gamma * noise / alphas_cumprod.clamp(min=1e-12)).clamp(max=1)
    if prediction_type == "v_prediction":
        return (gamma * noise).clamp(max=1)  # SNR + 1 = 1/(1 - ᾱ)
    return (alphas_cumprod / noise.clamp(min=1e-12)).clamp(max=gamma)


class Denoiser(nn.Module):
    """Loss of a batch.

    Args:
        unet: a U-Net of GAF's or ImageDream's family.
        config: its noise schedule and type of prediction.
        prompt_embeds: text of all rows [1,T,C]; None: zeros.
        gamma: of `min_snr_weights`.
    """

    alphas_cumprod: Tensor  # a buffer

    def __init__(self, unet: MultiViewUNet, config: NoiseScheduleConfig, *, prompt_embeds: Tensor | None, gamma: float):
        super().__init__()
        self.unet, self.prediction_type, self.gamma = unet, cast(str, config.prediction_type), gamma
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod(config), persistent=False)
        self.register_buffer("prompt_embeds", prompt_embeds, persistent=False)
        self.family = family_of(unet.config)
        self._sees: Tensor | None = None
        blocks = unet.transformer_blocks() if unet.config.image_attention == "block" else []
        self._hooks = [block.attn_ip.register_forward_hook(self._blindfold) for block in blocks if block.attn_ip]

    def _blindfold(self, attn_ip: nn.Module, inputs: object, attended: Tensor) -> Tensor | None:
        # A view that the hook blinds equals one of the unconditional pass, which has no image attention.
        if self._sees is None or not attn_ip.training:
            return None
        return attended * self._sees.to(attended.dtype)

    def __enter__(self) -> Denoiser:
        return self

    def __exit__(self, *error: object) -> None:
        """Give the U-Net back: every view sees the portrait again."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch on the weights' device: the weighted mean squared error, a number."""
        views = batch.latents.shape[1]
        latents, noise, pose = (t.flatten(0, 1) for t in (batch.latents, batch.noise, batch.pose))
        times = batch.timesteps.flatten()
        alphas = self.alphas_cumprod[times]
        signal, level = alphas.sqrt().view(-1, 1, 1, 1), (1 - alphas).sqrt().view(-1, 1, 1, 1)
        targets = {"epsilon": noise, "v_prediction": signal * noise - level * latents, "sample": latents}
        sample = signal * latents + level * noise
        if batch.normals is not None:
            sample = torch.cat([sample, batch.normals.flatten(0, 1)], dim=1)
        self._sees = batch.sees.view(-1, 1, 1)
        if batch.reference is None:
            predicted = self._predict(sample, times, pose, batch.features, views)
        else:
            predicted = self._with_reference(sample, times, pose, batch, views)
        error = (predicted.float() - targets[self.prediction_type]).square().flatten(1).mean(1)
        return (error * min_snr_weights(alphas, self.prediction_type, self.gamma)).mean()

    def _predict(
        self,
        sample: Tensor,
        times: Tensor,
        pose: Tensor,
        features: Tensor,
        frames: int,
        reference: Tensor | None = None,
    ) -> Tensor:
        projection = self.unet.image_projection
        return self.unet(
            sample,
            times,
            self.prompt_embeds,
            pose=pose,
            image_embeds=features if projection is None else projection(features),
            num_views=frames,
            reference_latents=reference,
        )

    def _with_reference(self, sample: Tensor, times: Tensor, pose: Tensor, batch: Batch, views: int) -> Tensor:
        """Predict with the portrait as a frame more; heads without image have zero features, as in generation."""
        assert batch.reference is not None

        def framed(rows: Tensor, last: Tensor) -> Tensor:
            rows = rows.unflatten(0, (-1, views))
            return torch.cat([rows, last.expand_as(rows[:, :1])], dim=1).flatten(0, 1)

        sees = batch.sees.amax(1)  # [B]
        blind = self.family.unconditional_reference(batch.reference)
        reference = torch.where(sees.view(-1, 1, 1, 1) > 0, batch.reference, blind)
        times = framed(times, times.unflatten(0, (-1, views))[:, :1])
        # The U-Net replaces the extra frame's latents, and its pose is zero.
        sample, pose = framed(sample, torch.zeros_like(sample[:1])), framed(pose, torch.zeros_like(pose[:1]))
        features = batch.features * sees.view(-1, 1, 1)
        predicted = self._predict(sample, times, pose, features, views + 1, reference)
        return predicted.unflatten(0, (-1, views + 1))[:, :views].flatten(0, 1)
