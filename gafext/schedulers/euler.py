"""Euler's method over the noise levels (arXiv 2206.00364)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gafext.config.scheduler import EulerConfig
from gafext.schedulers import schedule
from gafext.schedulers.base import MAX_STEPS
from gafext.schedulers.sigmas import SigmaScheduler


class EulerDiscreteScheduler(SigmaScheduler):
    """Euler's method: a straight step along the predicted noise from σ_t to σ_{t-1}, for samples x_0 + σ_t noise.

    x_{t-1} = x̂_0 + σ_down ε̂ + σ_up noise
    σ_up² = eta² σ_{t-1}² (σ_t² - σ_{t-1}²)/σ_t²,  σ_down² = σ_{t-1}² - σ_up²

    The signal in a sample is not scaled: the first sample is `init_noise_sigma` times noise, and the network's input is
    `scale_model_input(x_t, t)`. Timesteps are float32, because "linspace" does not round. eta = 1 is the ancestral
    sampler.

    Args:
        config: noise schedule, type of prediction, and settings of the solver.

    Raises:
        ValueError: the noise level does not increase with every training timestep.

    Source: arXiv 2206.00364 algorithm 1, without its correction; diffusers: schedulers/scheduling_euler_discrete.py.
    """

    config_class: ClassVar = EulerConfig
    config: EulerConfig

    @property
    def _most_steps(self) -> int:
        # "linspace" does not round, so there can be more steps than training timesteps.
        return MAX_STEPS if self.config.timestep_spacing == "linspace" else super()._most_steps

    @property
    def init_noise_sigma(self) -> float:
        largest = self.sigmas.max().item()
        return (largest**2 + 1) ** 0.5 if self.config.timestep_spacing == "leading" else largest

    def _plan(self, count: int) -> Tensor:
        timesteps = schedule.spaced_timesteps(self.config, count, whole=False).float()
        log_linear = self.config.interpolation_type == "log_linear"
        if log_linear:  # ends above 0, because diffusers appends the last σ one step too late
            sigmas = torch.linspace(self._table[-1].log(), self._table[0].log(), count + 1, dtype=torch.float64).exp()
        else:
            sigmas = schedule.sigmas_at(timesteps.double(), self._table)
        if self.config.use_karras_sigmas:
            sigmas = schedule.karras_sigmas(sigmas[0], sigmas[-1], count)
            timesteps = schedule.timesteps_at(sigmas, self._table).float()
        self._set_sigmas(sigmas, last=len(sigmas) == count)
        return timesteps

    def scale_model_input(self, sample: Tensor, t: int | float | Tensor) -> Tensor:
        """Scale a sample to the network's input at t: x_t / √(σ_t² + 1).

        Args:
            sample: x_t, any shape.
            t: one of `timesteps`.

        Returns:
            The input, same shape and dtype as the sample.

        Raises:
            ValueError: t is not one of the timesteps.
        """
        return sample * (1 + self._levels_of_run[self._index(t)] ** 2) ** -0.5

    def _advance(self, index: int, model_output: Tensor, sample: Tensor, eta: float, noise: Tensor | None) -> Tensor:
        sigma, after = self._levels_of_run[index : index + 2]
        signal = (1 + sigma**2) ** -0.5
        clean, epsilon = schedule.predicted(
            self.config.prediction_type, model_output, signal * sample, signal, sigma * signal
        )
        up = eta * after * max(1 - (after / sigma) ** 2, 0.0) ** 0.5
        down = (after**2 - up**2) ** 0.5
        result = clean + down * epsilon  # not x_t + (down - σ_t) ε̂, which suffers from cancellation at a large σ_t
        return result if noise is None else result + up * noise

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = self._sigmas_of(timesteps)
        return torch.ones_like(sigmas), sigmas
