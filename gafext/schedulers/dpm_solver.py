"""DPM-Solver++ (arXiv 2211.01095), the second-order multistep solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gafext.config.base import require
from gafext.config.scheduler import NoiseScheduleConfig, SigmaConfig
from gafext.schedulers import schedule
from gafext.schedulers.base import MAX_STEPS
from gafext.schedulers.sigmas import SigmaScheduler


@dataclass(frozen=True)
class DPMSolverConfig(SigmaConfig):
    """Configuration of a diffusers DPMSolverMultistepScheduler: DPM-Solver++ of first or second order."""

    class_name: ClassVar[str] = "DPMSolverMultistepScheduler"
    only: ClassVar[dict[str, tuple]] = {
        **NoiseScheduleConfig.only,
        # Behind the first of each are values of other solvers' files, which diffusers reads as the first.
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_type": ("midpoint", "bh1", "bh2", "logrho"),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "use_lu_lambdas": (False,),
        "lambda_min_clipped": (-math.inf,),
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        "sigma_min": (None,),
        "sigma_max": (None,),
    }

    solver_order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.solver_order in (1, 2), f"solver_order={self.solver_order}: expected 1 or 2")


class DPMSolverMultistepScheduler(SigmaScheduler):
    """DPM-Solver++ (2M) solver: second order, from the clean samples predicted at this step and the previous one.

    x_{t-1} = (b/a) e^(-eta h) x_t + α (1 - e^(-(1 + eta) h)) D + b √(1 - e^(-2 eta h)) noise
    D = x̂_0 + h/(2 h') (x̂_0 - x̂_0'),  e^(-h) = σ_{t-1}/σ_t

    with a, b the noise in x_t and x_{t-1}, α the signal in x_{t-1}, and ' for the previous step. D = x̂_0 at the first
    step of a run, also of one that starts within the schedule, and at a last step to σ = 0. eta = 1 is
    SDE-DPM-Solver++.

    Args:
        config: noise schedule, type of prediction, and settings of the solver.

    Raises:
        ValueError: the noise level does not increase with every training timestep.

    Source: arXiv 2211.01095 algorithm 2 and section 6; diffusers: schedulers/scheduling_dpmsolver_multistep.py.
    """

    config_class: ClassVar = DPMSolverConfig
    config: DPMSolverConfig

    def __init__(self, config: DPMSolverConfig):
        super().__init__(config)
        self._next, self._clean = 0, None

    @property
    def _most_steps(self) -> int:
        return min(self.config.num_train_timesteps - (self.config.timestep_spacing != "trailing"), MAX_STEPS)

    def _plan(self, count: int) -> Tensor:
        self._next, self._clean = 0, None
        if self.config.use_karras_sigmas:
            sigmas = schedule.karras_sigmas(self._table[-1], self._table[0], count)
            timesteps = schedule.timesteps_at(sigmas, self._table)
            if self.config.beta_schedule != "squaredcos_cap_v2":  # as in diffusers, which truncates those
                timesteps = timesteps.round()
        elif self.config.timestep_spacing == "trailing":
            timesteps = schedule.spaced_timesteps(self.config, count)
            sigmas = schedule.sigmas_at(timesteps, self._table)
        else:
            timesteps = schedule.spaced_timesteps(self.config, count + 1)[:-1]
            sigmas = schedule.sigmas_at(timesteps, self._table)
        self._set_sigmas(sigmas)
        return timesteps.long()

    def _index(self, t: int | float | Tensor) -> int:
        # Rounded Karras timesteps repeat: prefer the step after the previous one to the first with this timestep.
        t = t.item() if isinstance(t, Tensor) else t
        if self._next and self._next < len(self._times) and self._times[self._next] == t:
            return self._next
        return super()._index(t)

    def _advance(self, index: int, model_output: Tensor, sample: Tensor, eta: float, noise: Tensor | None) -> Tensor:
        sigma, after = self._levels_of_run[index : index + 2]
        signal, signal_after = ((1 + s * s) ** -0.5 for s in (sigma, after))
        clean, _ = schedule.predicted(self.config.prediction_type, model_output, sample, signal, sigma * signal)

        before = self._clean if index == self._next else None
        # A copy, because a network may write every output to the same memory.
        self._next, self._clean = index + 1, clean.clone() if clean is model_output else clean
        if before is not None and not self._first_order(index):
            h, h_before = math.log(sigma / after), math.log(self._levels_of_run[index - 1] / sigma)
            clean = clean + h / (2 * h_before) * (clean - before)

        ratio = after / sigma  # e^-h
        kept = ratio * signal_after / signal * ratio**eta
        result = kept * sample + signal_after * (1 - ratio ** (1 + eta)) * clean
        if noise is None:
            return result
        return result + after * signal_after * max(1 - ratio ** (2 * eta), 0.0) ** 0.5 * noise

    def _first_order(self, index: int) -> bool:
        config, count = self.config, len(self._times)
        if config.solver_order == 1 or index < count - 1:
            return config.solver_order == 1
        return config.final_sigmas_type == "zero" or config.euler_at_final or (config.lower_order_final and count < 15)

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = self._sigmas_of(timesteps)
        signal = (1 + sigmas**2) ** -0.5
        return signal, sigmas * signal
