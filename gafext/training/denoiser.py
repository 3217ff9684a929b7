"""Module that a training step runs: the U-Net with its conditions, its loss, and which of its weights are trained."""

from __future__ import annotations

import functools
import re
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gafext.config.scheduler import NoiseScheduleConfig
from gafext.models.blocks import MultiViewSpatialTransformer, ResnetBlock2D
from gafext.models.unet import MultiViewUNet
from gafext.schedulers import schedule
from gafext.training.batches import Batch

TRAINED = ("new", "all")
_NEW = re.compile(r"\.(norm_cv|attn_cv|norm_ip|attn_ip)\.|^(image_projection|class_embedding)\.|^conv_in\.weight$")


def min_snr_weights(alphas_cumprod: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Compute the weights of the squared error by min-SNR: min(SNR, γ) / SNR for ε, / (SNR + 1) for v.

    Args:
        alphas_cumprod: ᾱ of each row, [N].
        prediction_type: "epsilon", "v_prediction" or "sample".
        gamma: γ, over 0.

    Returns:
        [N] float32.

    Source: arXiv 2303.09556 section 3.4; for v, its appendix.
    """
    # SNR = ᾱ/(1 - ᾱ); written so that neither zero signal nor zero noise divides by 0.
    noise = 1 - alphas_cumprod
    if prediction_type == "epsilon":
        return (gamma * noise / alphas_cumprod.clamp(min=1e-12)).clamp(max=1)
    least = torch.minimum(alphas_cumprod / noise.clamp(min=1e-12), torch.full_like(noise, gamma))
    return least * noise if prediction_type == "v_prediction" else least


def choose_trained(unet: MultiViewUNet, which: str) -> None:
    """Set `requires_grad` of the U-Net's weights.

    Args:
        unet: the U-Net.
        which: "new": what `gafext assemble` adds, of conv_in the channels of the normal latents alone; or "all".
    """
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(which == "all" or _NEW.search(name) is not None)
    if which == "new":
        old = unet.config.out_channels

        def keep_old(gradient: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(gradient[:, :old]), gradient[:, old:]], dim=1)

        unet.conv_in.weight.register_hook(keep_old)


def checkpoint_blocks(unet: MultiViewUNet) -> None:
    """Recompute the residual and transformer blocks in the backward pass instead of keeping their activations."""
    for module in unet.modules():
        if isinstance(module, (ResnetBlock2D, MultiViewSpatialTransformer)):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


class Denoiser(nn.Module):
    """Loss of a batch.

    Args:
        unet: a U-Net of GAF's family.
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
        self._sees: Tensor | None = None
        self._hooks = []
        for block in unet.transformer_blocks():
            assert block.attn_ip is not None  # `check_parent` requires it
            self._hooks.append(block.attn_ip.register_forward_hook(self._blindfold))

    def _blindfold(self, attn_ip: nn.Module, inputs: object, attended: Tensor) -> Tensor | None:
        # A view that the hook blinds equals one of the unconditional pass, which has no image attention.
        return None if self._sees is None else attended * self._sees.to(attended.dtype)

    def release(self) -> None:
        """Give the U-Net back: every view sees the portrait again."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch on the weights' device: the weighted mean squared error, a number."""
        views = batch.latents.shape[1]
        latents, noise, normals, pose = (
            t.flatten(0, 1) for t in (batch.latents, batch.noise, batch.normals, batch.pose)
        )
        times = batch.timesteps.flatten()
        alphas = self.alphas_cumprod[times]
        signal, level = alphas.sqrt().view(-1, 1, 1, 1), (1 - alphas).sqrt().view(-1, 1, 1, 1)
        targets = {"epsilon": noise, "v_prediction": signal * noise - level * latents, "sample": latents}
        sample = torch.cat([signal * latents + level * noise, normals], dim=1)
        self._sees = batch.sees.view(-1, 1, 1)
        projection = self.unet.image_projection
        predicted = self.unet(
            sample,
            times,
            self.prompt_embeds,
            pose=pose,
            image_embeds=batch.features if projection is None else projection(batch.features),
            num_views=views,
        ).float()
        error = (predicted - targets[self.prediction_type]).square().flatten(1).mean(1)
        return (error * min_snr_weights(alphas, self.prediction_type, self.gamma)).mean()
