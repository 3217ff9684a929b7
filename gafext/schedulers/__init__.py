"""Solvers that go from noise to a sample in few steps, over the noise schedules of diffusers' checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path

from gafext import weights
from gafext.errors import CheckpointError
from gafext.schedulers.base import CONFIG_NAME, MAX_STEPS, Scheduler, check_eta, check_steps
from gafext.schedulers.ddim import DDIMScheduler
from gafext.schedulers.dpm_solver import DPMSolverMultistepScheduler
from gafext.schedulers.euler import EulerDiscreteScheduler
from gafext.schedulers.euler_ancestral import EulerAncestralDiscreteScheduler
from gafext.schedulers.external import as_scheduler
from gafext.schedulers.lcm import LCMScheduler

__all__ = [
    "CONFIG_NAME",
    "MAX_STEPS",
    "SCHEDULERS",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "Scheduler",
    "as_scheduler",
    "check_eta",
    "check_steps",
    "scheduler_class",
    "scheduler_from_pretrained",
]

SCHEDULERS: dict[str, type[Scheduler]] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}
"""Solvers by short name."""


def scheduler_class(name: str) -> type[Scheduler]:
    """Return the solver with a short name; raise a ValueError that lists the names if there is no such solver."""
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: expected one of {list(SCHEDULERS)}, got {name!r}")
    return SCHEDULERS[name]


def scheduler_from_pretrained(folder: str | Path, *, name: str | None = None) -> Scheduler:
    """Load the solver named in `scheduler_config.json`, or another one over the same noise schedule.

    Args:
        folder: scheduler folder of a diffusers checkpoint.
        name: one of `SCHEDULERS`; None: the file's solver, or DDIM, with a warning, if that is not one of these.

    Returns:
        The solver.

    Raises:
        ValueError: the name is unknown.
        CheckpointError: the file is missing or damaged, or has settings that the solver does not support here.
    """
    if name is not None:
        return scheduler_class(name).from_pretrained(folder)
    written_by = weights.read_json(Path(folder) / CONFIG_NAME).get("_class_name")
    own = [solver for solver in SCHEDULERS.values() if solver.config_class.class_name == written_by]
    if not own:
        solver = DDIMScheduler.from_pretrained(folder)
        if written_by is not None:
            warnings.warn(
                f"{folder}: {written_by} is read as DDIM over its noise schedule: expected one of {list(SCHEDULERS)}. "
                "Assign diffusers' own to pipe.scheduler, or choose a scheduler by name",
                stacklevel=2,
            )
        return solver
    try:
        return own[0].from_pretrained(folder)
    except CheckpointError as error:
        advice = "" if own[0] is DDIMScheduler else "; the scheduler 'ddim' reads the noise schedule alone"
        raise CheckpointError(f"{error}{advice}") from None
