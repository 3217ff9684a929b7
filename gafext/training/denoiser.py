"""Module that a training step runs: the U-Net with its conditions, its loss, and which of its weights are trained."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from gafext.config.scheduler import NoiseScheduleConfig
from gafext.families import family_of
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import MultiViewUNet
from gafext.schedulers import schedule
from gafext.training.batches import Batch
from gafext.training.latents import image_features


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
    noise = (1 - alphas_cumprod).clamp(min=1e-12)  # γ may be infinite: all weights of ε and v are 1
    if prediction_type == "epsilon":
        return (gamma * noise / alphas_cumprod.clamp(min=1e-12)).clamp(max=1)
    if prediction_type == "v_prediction":
        return (gamma * noise).clamp(max=1)  # SNR + 1 = 1/(1 - ᾱ)
    return (alphas_cumprod / noise).clamp(max=gamma)


def diffuse(
    clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction_type: str = "v_prediction"
) -> tuple[Tensor, Tensor]:
    """Compute noised latents √ᾱ x + √(1-ᾱ) ε, and the prediction's target: ε, v = √ᾱ ε - √(1-ᾱ) x, or x.

    Args:
        clean: latents x, [N,C,h,w].
        noise: ε, of the same shape.
        alphas_cumprod: ᾱ, [N].
        prediction_type: "epsilon", "v_prediction" or "sample".

    Returns:
        Noised latents and target, both [N,C,h,w].
    """
    signal, level = alphas_cumprod.sqrt().view(-1, 1, 1, 1), (1 - alphas_cumprod).sqrt().view(-1, 1, 1, 1)
    targets = {"epsilon": noise, "v_prediction": signal * noise - level * clean, "sample": clean}
    return signal * clean + level * noise, targets[prediction_type]


class Blindfold:
    """Removes image attention from some views while training, which then need the portrait from others by attn_cv.

    If all views attend to the portrait, the U-Net does not learn to use attn_cv. A view without image attention equals
    one of the unconditional pass.

    Args:
        unet: the U-Net; without layers of image attention there is no effect.
    """

    def __init__(self, unet: MultiViewUNet):
        self.sees: Tensor | None = None  # [B*V,1,1] of 0 and 1; None: every view sees the portrait
        blocks = unet.transformer_blocks() if unet.config.image_attention == "block" else []
        self._hooks = [block.attn_ip.register_forward_hook(self) for block in blocks if block.attn_ip]
        if unet.add_embedding is not None:
            self._hooks.append(unet.add_embedding.register_forward_hook(self._hide_from_views))

    def __call__(self, attn_ip: nn.Module, inputs: object, attended: Tensor) -> Tensor | None:
        if self.sees is None or not attn_ip.training:
            return None
        return attended * self.sees.to(attended.dtype)

    def _hide_from_views(self, layer: nn.Module, inputs: object, added: Tensor) -> Tensor | None:
        """Return the embeddings of portraits [B,C] for each view, [B*V,C], zeros for views that do not see them."""
        if self.sees is None or not layer.training:
            return None
        views = len(self.sees) // len(added)
        return added.repeat_interleave(views, dim=0) * self.sees[:, 0].to(added.dtype)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Denoiser(nn.Module):
    """Loss of a batch.

    Args:
        unet: a U-Net of GAF's or ImageDream's family.
        config: its noise schedule and type of prediction.
        prompt_embeds: text of all rows [1,T,C]; None: zeros.
        gamma: of `min_snr_weights`.
        image_encoder: an encoder that is trained too, on batches with portraits; None: batches have features.
    """

    alphas_cumprod: Tensor  # a buffer

    def __init__(
        self,
        unet: MultiViewUNet,
        config: NoiseScheduleConfig,
        *,
        prompt_embeds: Tensor | None,
        gamma: float,
        image_encoder: CLIPVisionEncoder | None = None,
    ):
        super().__init__()
        self.unet, self.prediction_type, self.gamma = unet, cast(str, config.prediction_type), gamma
        self.image_encoder = image_encoder
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod(config), persistent=False)
        self.register_buffer("prompt_embeds", prompt_embeds, persistent=False)
        self.family = family_of(unet.config)
        self._blindfold = Blindfold(unet)

    def __enter__(self) -> Denoiser:
        return self

    def __exit__(self, *error: object) -> None:
        """Give the U-Net back: every view sees the portrait again."""
        self._blindfold.remove()

    def forward(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch on the weights' device: the weighted mean squared error, a number."""
        views = batch.latents.shape[1]
        latents, noise, pose = (t.flatten(0, 1) for t in (batch.latents, batch.noise, batch.pose))
        times = batch.timesteps.flatten()
        alphas = self.alphas_cumprod[times]
        sample, target = diffuse(latents, noise, alphas, self.prediction_type)
        if batch.normals is not None:
            sample = torch.cat([sample, batch.normals.flatten(0, 1)], dim=1)
        self._blindfold.sees = batch.sees.view(-1, 1, 1)
        features = self._features(batch)
        if batch.reference is None:
            predicted = self._predict(sample, times, pose, features, views)
        else:
            predicted = self._with_reference(sample, times, pose, features, batch)
        error = (predicted.float() - target).square()
        if batch.weights is not None:
            error = batch.weights.flatten(0, 1) * error
        return (error.flatten(1).mean(1) * min_snr_weights(alphas, self.prediction_type, self.gamma)).mean()

    def _features(self, batch: Batch) -> Tensor:
        if batch.features is not None:
            return batch.features
        assert self.image_encoder is not None and batch.portraits is not None  # one of both is there
        return image_features(self.image_encoder, batch.portraits, self.unet)

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

    def _with_reference(self, sample: Tensor, times: Tensor, pose: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """Predict with the portrait as a frame more; heads without image have zero features, as in generation."""
        assert batch.reference is not None
        views = batch.latents.shape[1]

        def framed(rows: Tensor, last: Tensor) -> Tensor:
            rows = rows.unflatten(0, (-1, views))
            return torch.cat([rows, last.expand_as(rows[:, :1])], dim=1).flatten(0, 1)

        sees = batch.sees.amax(1)  # [B]
        blind = self.family.unconditional_reference(batch.reference)
        reference = torch.where(sees.view(-1, 1, 1, 1) > 0, batch.reference, blind)
        times = framed(times, times.unflatten(0, (-1, views))[:, :1])
        # The U-Net replaces the extra frame's latents, and its pose is zero.
        sample, pose = framed(sample, torch.zeros_like(sample[:1])), framed(pose, torch.zeros_like(pose[:1]))
        features = features * sees.view(-1, 1, 1)
        predicted = self._predict(sample, times, pose, features, views + 1, reference)
        return predicted.unflatten(0, (-1, views + 1))[:, :views].flatten(0, 1)
