"""Multistep sampling of latent consistency models (arXiv 2310.04378)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gafext.config.base import require, require_counts
from gafext.config.scheduler import SchedulerConfig
from gafext.schedulers import schedule
from gafext.schedulers.ddim import DDIMScheduler

_SIGMA_DATA = 0.5


@dataclass(frozen=True)
class LCMConfig(SchedulerConfig):
    """Configuration of a diffusers LCMScheduler."""

    class_name: ClassVar[str] = "LCMScheduler"

    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, self.num_train_timesteps, "original_inference_steps")
        require(self.timestep_scaling > 0, f"timestep_scaling={self.timestep_scaling}: expected over 0")


class LCMScheduler(DDIMScheduler):
    """Solver of latent consistency models, which predict the clean sample from any noise level; 2 to 8 steps are usual.

    f = c_skip x_t + c_out x̂_0,  c_skip = d²/(s² + d²),  c_out = s/√(s² + d²),  s = t · timestep_scaling,  d = 1/2
    x_{t-1} = √ᾱ_{t-1} f + √(1 - ᾱ_{t-1}) (√(1 - eta²) ε̂ + eta · noise)

    with ε̂ the noise that f leaves in x_t; the last step returns f. eta = 1, the default, is the paper's. The U-Net has
    to be distilled for it, for example by an LCM-LoRA.

    Args:
        config: noise schedule, type of prediction, and the steps of the distillation, some of which a run takes.

    Source: arXiv 2310.04378 algorithm 3 and section 4; diffusers: schedulers/scheduling_lcm.py.
    """

    config_class: ClassVar = LCMConfig
    config: LCMConfig
    default_eta: ClassVar = 1.0

    def __init__(self, config: LCMConfig):
        super().__init__(config)

    @property
    def _most_steps(self) -> int:
        return self.config.original_inference_steps

    def _plan(self, count: int) -> Tensor:
        steps = self.config.original_inference_steps
        skipped = (torch.arange(count, dtype=torch.float64) * (steps / count)).long()
        return self._with_signal((steps - skipped) * (self.config.num_train_timesteps // steps) - 1)

    def _advance(self, index: int, model_output: Tensor, sample: Tensor, eta: float, noise: Tensor | None) -> Tensor:
        t = self._times[index]
        signal, level = (factor.sqrt() for factor in (self.alphas_cumprod[t], 1 - self.alphas_cumprod[t]))
        clean, _ = schedule.predicted(self.config.prediction_type, model_output, sample, signal, level)
        scaled = t * self.config.timestep_scaling
        norm = scaled**2 + _SIGMA_DATA**2
        clean = scaled / norm**0.5 * self._clipped(clean) + _SIGMA_DATA**2 / norm * sample
        if index + 1 == len(self._times):
            return clean
        after = self.alphas_cumprod[self._times[index + 1]]
        epsilon = (1 - eta**2) ** 0.5 * (sample - signal * clean) / level
        if noise is not None:
            epsilon = epsilon + eta * noise
        return after.sqrt() * clean + (1 - after).sqrt() * epsilon
