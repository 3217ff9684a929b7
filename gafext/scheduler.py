"""The solvers DDIM, DPM-Solver++ and Euler: what the rest of gafext imports of the package `schedulers`."""

from gafext.schedulers import SCHEDULERS, scheduler_class, scheduler_from_pretrained
from gafext.schedulers.base import CONFIG_NAME, MAX_STEPS, Scheduler, check_eta
from gafext.schedulers.ddim import DDIMScheduler
from gafext.schedulers.dpm_solver import DPMSolverMultistepScheduler
from gafext.schedulers.euler import EulerDiscreteScheduler

__all__ = [
    "CONFIG_NAME",
    "MAX_STEPS",
    "SCHEDULERS",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "Scheduler",
    "check_eta",
    "scheduler_class",
    "scheduler_from_pretrained",
]
