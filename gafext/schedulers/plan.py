"""Which steps a run takes: presets of sampler and steps, and the first step of a run from renders."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gafext.schedulers.base import Scheduler

PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"num_inference_steps": 50, "upsample_steps": 10},
    "balanced": {"scheduler": "dpm++", "num_inference_steps": 25},
    "fast": {"scheduler": "dpm++", "num_inference_steps": 15, "guidance_interval": (0.28, 5.42), "upsample_steps": 1},
}
"""Options of a run by the name of a preset; without `scheduler`, the pipeline's. docs/speed.md has their errors."""


def with_preset(preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a run, those that are None replaced by the preset's.

    Args:
        preset: a name in `PRESETS`; None: "quality".
        given: options of the run that presets set; `quality` stands in for those that the preset does not.

    Raises:
        ValueError: the preset is unknown.
    """
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ValueError(f"preset: expected one of {list(PRESETS)}, got {preset!r}")
    chosen = PRESETS["quality"] | PRESETS[preset or "quality"]
    return {name: chosen.get(name) if value is None else value for name, value in given.items()}


def set_timesteps(solver: Scheduler, num_inference_steps: int, *, strength: float = 1.0, noised: bool) -> Tensor:
    """Set a solver's timesteps and return those of a run.

    Args:
        solver: the solver.
        num_inference_steps: of the whole schedule.
        strength: fraction of the schedule, its end, that the run takes, over 0 and up to 1.
        noised: the run starts from noised renders.

    Raises:
        ValueError: an argument is out of range, or a run from pure noise would not take the whole schedule.
    """
    if not isinstance(strength, numbers.Real) or not 0 < strength <= 1:
        raise ValueError(f"strength: expected above 0 to 1, got {strength!r}")
    if strength < 1 and not noised:
        raise ValueError(f"strength: expected 1 without renders, got {strength}")
    solver.set_timesteps(num_inference_steps)
    steps = int(num_inference_steps * strength)
    if steps == 0:
        raise ValueError(f"strength: {strength} of num_inference_steps={num_inference_steps} leaves no step")
    begin = (num_inference_steps - steps) * solver.order
    solver.set_begin_index(begin)
    return solver.timesteps[begin:]
