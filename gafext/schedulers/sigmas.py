"""Base class of the solvers that step from one noise level σ to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from gafext.config.scheduler import SigmaConfig
from gafext.schedulers import schedule
from gafext.schedulers.base import Scheduler


class SigmaScheduler(Scheduler):
    """Base of the solvers over the noise levels σ_t = √((1 - ᾱ_t)/ᾱ_t) of x_0 + σ_t noise.

    Args:
        config: noise schedule, type of prediction, and settings of the solver.

    Raises:
        ValueError: the noise level does not increase with every training timestep.
    """

    config: SigmaConfig

    def __init__(self, config: SigmaConfig):
        super().__init__(config)
        self._table = schedule.sigma_table(self.alphas_cumprod)  # [T]
        self.sigmas = self._table.float().flip(0)
        # At zero signal the last σ is a floor, as in diffusers, and may lie below the one before.
        growing = self._table if self.alphas_cumprod[-1] > 0 else self._table[:-1]
        if not (growing.isfinite().all() and growing[0] > 0 and (growing.diff() > 0).all()):
            raise ValueError(
                "beta_schedule, trained_betas: expected noise that grows with every timestep, got "
                f"sigmas from {self._table[0]:.3g} to {self._table[-1]:.3g} that do not"
            )

    def _set_sigmas(self, sigmas: Tensor, *, last: bool = True) -> None:
        """Set the run's decreasing σ; with `last`, append the final σ given by the configuration."""
        if last:
            end = self._table[:1] if self.config.final_sigmas_type == "sigma_min" else self._table.new_zeros(1)
            sigmas = torch.cat([sigmas, end])
        self._begin = 0
        self.sigmas = sigmas.float()  # [n+1], rounded as in diffusers
        self._levels_of_run = self.sigmas.tolist()

    def set_begin_index(self, begin_index: int) -> None:
        self._begin = begin_index

    def _index(self, t: int | float | Tensor) -> int:
        t = t.item() if isinstance(t, Tensor) else t
        if self.num_inference_steps is not None and self._times[self._begin] == t:  # rounded timesteps repeat
            return self._begin
        return super()._index(t)

    def _sigmas_of(self, timesteps: Tensor) -> Tensor:
        return self.sigmas[[self._index(t) for t in timesteps.tolist()]]
