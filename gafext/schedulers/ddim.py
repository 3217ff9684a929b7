"""DDIM sampling (arXiv 2010.02502)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gafext.config.scheduler import SD_SCHEDULE, SchedulerConfig
from gafext.schedulers import schedule
from gafext.schedulers.base import Scheduler


class DDIMScheduler(Scheduler):
    """DDIM solver, deterministic at eta 0.

    x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1} - σ²) ε̂ + σ·noise
    σ² = eta² (1 - ᾱ_{t-1})/(1 - ᾱ_t) (1 - ᾱ_t/ᾱ_{t-1})

    Args:
        config: noise schedule and type of prediction.

    Source: arXiv 2010.02502 eq. 12 and 16; diffusers: schedulers/scheduling_ddim.py.
    """

    config_class: ClassVar = SchedulerConfig
    config: SchedulerConfig

    def __init__(self, config: SchedulerConfig = SD_SCHEDULE):
        super().__init__(config)

    def _plan(self, count: int) -> Tensor:
        return self._with_signal(schedule.spaced_timesteps(self.config, count).long())

    def _with_signal(self, timesteps: Tensor) -> Tensor:
        """Return timesteps; raise a ValueError if the prediction does not determine the sample at one of them."""
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
        clean = self._clipped(clean)
        sigma = eta * ((1 - alpha_before) / (1 - alpha) * (1 - alpha / alpha_before)).sqrt()
        direction = (1 - alpha_before - sigma**2).clamp(min=0).sqrt()  # negative only by rounding
        before = alpha_before.sqrt() * clean + direction * epsilon
        return before if noise is None else before + sigma * noise

    def pred_original_sample(self, model_output: Tensor, t: int | float | Tensor, sample: Tensor) -> Tensor:
        return self._clipped(super().pred_original_sample(model_output, t, sample))

    def _clipped(self, clean: Tensor) -> Tensor:
        limit = self.config.clip_sample_range
        return clean.clamp(-limit, limit) if self.config.clip_sample else clean

    def _alphas(self, t: int) -> tuple[Tensor, Tensor]:
        """Return ᾱ at t and at the next step, as scalars on the CPU, which combine with tensors on any device."""
        assert self.num_inference_steps is not None  # _index requires it
        # As in diffusers: the stride of "leading" timesteps is used for every spacing.
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
