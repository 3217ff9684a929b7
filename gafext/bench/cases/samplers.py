"""A step of every sampler, against diffusers' sampler of the same configuration."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gafext.bench.cases.base import Case, Contestant
from gafext.config import SD_SCHEDULE
from gafext.schedulers import SCHEDULERS, Scheduler

SAMPLERS = ("ddim", "dpm++", "euler")
VIEWS = (4, 32)
_STEPS, _INDEX = 25, 10


def cases(**options: Any) -> Iterator[Case]:
    """Yield a case per sampler and number of views, of 32×32 latents in the middle of a run.

    Args:
        options: device and dtype.
    """
    for name in SAMPLERS:
        for views in VIEWS:
            yield _case(name, (views, 4, 32, 32), **options)


def _case(name: str, shape: tuple[int, ...], **options: Any) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape, **options) for _ in range(3))

    config = dict(SCHEDULERS[name].from_config(dict(SD_SCHEDULE)).config)
    return Case(
        op=f"{name} step",
        shape=f"V={shape[0]},({','.join(map(str, shape[1:]))})",
        where="the middle of a run",
        bound="memory",
        flops=0,
        inputs=inputs,
        contestants=[
            Contestant("gafext", _Step(lambda: SCHEDULERS[name].from_config(config))),
            Contestant("diffusers", _Step(lambda: _of_diffusers(name, config)), optional=True),
        ],
    )


class _Step:
    """One step of a sampler, from the same state at every call."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._scheduler, self._timestep, self._state = make, None, 0.0, {}

    def __call__(self, sample: Tensor, output: Tensor, earlier: Tensor) -> Tensor:
        if self._scheduler is None:
            self._scheduler = self._prepared(sample, earlier)
            self._state = dict(vars(self._scheduler))
            timestep = self._scheduler.timesteps[_INDEX]  # the pipelines of diffusers hand on the tensor
            self._timestep = timestep.item() if isinstance(self._scheduler, Scheduler) else timestep
        scheduler = self._scheduler
        vars(scheduler).update({name: copy.copy(v) if isinstance(v, list) else v for name, v in self._state.items()})
        result = scheduler.step(output, self._timestep, sample)
        return result if isinstance(result, Tensor) else result.prev_sample

    def _prepared(self, sample: Tensor, earlier: Tensor) -> Any:
        """Take the step before, for the samplers with a memory."""
        scheduler = self._make()
        scheduler.set_timesteps(_STEPS)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(_INDEX - 1)
        timestep = scheduler.timesteps[_INDEX - 1]
        scheduler.scale_model_input(sample, timestep)
        scheduler.step(earlier, timestep, sample)
        return scheduler


def _of_diffusers(name: str, config: dict) -> Any:
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError:
        raise RuntimeError("diffusers is not installed") from None
    return getattr(diffusers, SCHEDULERS[name].config_class.class_name).from_config(config)
