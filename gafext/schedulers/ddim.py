"""DDIM sampling (arXiv 2010.02502)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gafext.config.scheduler import SD_SCHEDULE, SchedulerConfig
from gafext.schedulers import schedule
from gafext.schedulers.base import Scheduler


class DDIMScheduler(Scheduler):
    """DDIM: from x_t to x_{t-1} in few steps, deterministic at eta 0.

    x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1} - σ²) ε̂ + σ·noise
    σ² = eta² (1 - ᾱ_{t-1})/(1 - ᾱ_t) (1 - ᾱ_t/ᾱ_{t-1})

    Args:
        config: the noise schedule and what the network predicts.

    Source: arXiv 2010.02502 eq. 12 and 16; diffusers: schedulers/scheduling_ddim.py.
    """

    config_class: ClassVar = SchedulerConfig
    config: SchedulerConfig

    def __init__(self, config: SchedulerConfig = SD_SCHEDULE):
        super().__init__(config)

    def _plan(self, count: int) -> Tensor:
        timesteps = schedule.spaced_timesteps(self.config, count).long()
        if self.config.prediction_type == "epsilon" and (self.alphas_cumprod[timesteps] == 0).any():
            raise ValueError(
                "prediction_type: expected 'v_prediction' or 'sample', got 'epsilon', which says nothing at "
                f"timestep {int(timesteps[0])}, where all is noise (rescale_betas_zero_snr)"
            )
        return timesteps

    def _advance(self, index: int, model_output: Tensor, sample: Tensor, eta: float, noise: Tensor | None) -> Tensor:
        alpha, alpha_before = self._alphas(self._times[index])
        clean, epsilon = schedule.predicted(
            self.config.prediction_type, model_output, sample, alpha.sqrt(), (1 - alpha).sqrt()
        )
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

        sigma = eta * ((1 - alpha_before) / (1 - alpha) * (1 - alpha / alpha_before)).sqrt()
        direction = (1 - alpha_before - sigma**2).clamp(min=0).sqrt()  # rounding alone makes it negative
        before = alpha_before.sqrt() * clean + direction * epsilon
        return before if noise is None else before + sigma * noise

    def _alphas(self, t: int) -> tuple[Tensor, Tensor]:
        """ᾱ at t and one step earlier, as scalars on the CPU, which combine with tensors of any device."""
        # As in diffusers: one stride for every spacing, although only "leading" timesteps lie that far apart.
        before = t - self.config.num_train_timesteps // self.num_inference_steps
        if before >= 0 or not self.config.set_alpha_to_one:
            return self.alphas_cumprod[t], self.alphas_cumprod[max(before, 0)]
        return self.alphas_cumprod[t], torch.ones(())

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        last = self.config.num_train_timesteps - 1
        if timesteps.is_floating_point() or ((timesteps < 0) | (timesteps > last)).any():
            raise ValueError(f"timesteps: expected whole numbers from 0 to {last}, got {timesteps.tolist()}")
        alphas = self.alphas_cumprod[timesteps]
        return alphas.sqrt(), (1 - alphas).sqrt()
