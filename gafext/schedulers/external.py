"""Schedulers of diffusers, stepped behind the interface of gafext's own."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from gafext.schedulers.base import MAX_STEPS, Scheduler, check_eta, check_steps

_INTERFACE = ("config", "set_timesteps", "timesteps", "init_noise_sigma", "scale_model_input", "step", "add_noise")


def as_scheduler(scheduler: Any) -> Scheduler:
    """Return one of gafext's schedulers as it is, and any other behind their interface.

    Raises:
        ValueError: the object does not have the methods of diffusers' schedulers.
    """
    return scheduler if isinstance(scheduler, Scheduler) else ExternalScheduler(scheduler)


class ExternalScheduler(Scheduler):
    """A scheduler of diffusers, stepped as diffusers' pipelines do.

    Args:
        scheduler: any object with the methods of a diffusers scheduler for diffusion models, such as UniPC, LCM or
            Euler-ancestral; diffusers is not imported.

    Raises:
        ValueError: a method or attribute is missing, as in schedulers for flow matching.

    Source: diffusers: pipelines/stable_diffusion/pipeline_stable_diffusion_img2img.py, get_timesteps and the loop.
    """

    def __init__(self, scheduler: Any):  # without super's: noise schedule and timesteps are the scheduler's own
        missing = [name for name in _INTERFACE if not hasattr(scheduler, name)]
        if missing:
            raise ValueError(
                "scheduler: expected one of gafext's, or of diffusers' for diffusion models, "
                f"got {type(scheduler).__name__} without {', '.join(missing)}"
            )
        self.scheduler, self.config = scheduler, scheduler.config
        self._options = inspect.signature(scheduler.step).parameters

    @property
    def timesteps(self) -> Tensor:
        return self.scheduler.timesteps

    @property
    def order(self) -> int:
        return getattr(self.scheduler, "order", 1)

    @property
    def init_noise_sigma(self) -> float:
        return float(self.scheduler.init_noise_sigma)

    @property
    def _stateful(self) -> object:
        return self.scheduler

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set the timesteps of a run, 1 to 1000 steps; the scheduler may set limits of its own.

        Raises:
            ValueError: the number is out of range, or the scheduler's noise levels are infinite, as at zero signal.
        """
        self.scheduler.set_timesteps(check_steps(num_inference_steps, MAX_STEPS), device=device)
        if not torch.as_tensor(getattr(self.scheduler, "sigmas", 0.0)).isfinite().all():
            raise ValueError(
                f"scheduler: expected finite noise levels, got infinite ones of {type(self.scheduler).__name__}, whose "
                "schedule ends in pure noise: use gafext's 'dpm++' or 'euler', or a DDIMScheduler"
            )

    def for_run(self) -> ExternalScheduler:
        """Return a copy for one run, whose steps leave the state of others alone."""
        return ExternalScheduler(copy.deepcopy(self.scheduler))

    def set_begin_index(self, begin_index: int) -> None:
        """Start a run at a later entry of `timesteps`."""
        if begin_index and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin_index)

    def scale_model_input(self, sample: Tensor, t: int | float | Tensor) -> Tensor:
        """Scale a sample to the network's input at t."""
        return self.scheduler.scale_model_input(sample, self._timestep(t))

    def step(
        self,
        model_output: Tensor,
        t: Any,
        sample: Tensor,
        *,
        eta: float | None = None,
        noise: Any = None,
        generator: Any = None,
    ) -> Tensor:
        """Compute the sample of the next timestep; the arguments are those of `Scheduler.step`.

        `eta` and `generator` reach the schedulers that have them, as in diffusers. `noise` is ignored: the scheduler
        draws its own.
        """
        eta = self.default_eta if eta is None else eta
        check_eta(eta)
        given = {"eta": eta, "generator": generator}
        options = {name: value for name, value in given.items() if name in self._options}
        return self.scheduler.step(model_output, self._timestep(t), sample, **options, return_dict=False)[0]

    def _timestep(self, t: int | float | Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=self.timesteps.dtype, device=self.timesteps.device)

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # Schedulers differ in how they keep these two; all of them show them by what they do to a 1 and to a 0.
        one, zero = torch.ones(len(timesteps), device="cpu"), torch.zeros(len(timesteps), device="cpu")
        timesteps = timesteps.to(self.timesteps.dtype)
        return self.scheduler.add_noise(one, zero, timesteps), self.scheduler.add_noise(zero, one, timesteps)
