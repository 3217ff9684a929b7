"""Ancestral sampling with Euler's method (arXiv 2206.00364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gafext.config.scheduler import NoiseScheduleConfig
from gafext.schedulers.euler import EulerDiscreteScheduler


@dataclass(frozen=True)
class EulerAncestralConfig(NoiseScheduleConfig):
    """Configuration of a diffusers EulerAncestralDiscreteScheduler: the noise schedule alone."""

    class_name: ClassVar[str] = "EulerAncestralDiscreteScheduler"
    final_sigmas_type: ClassVar[str] = "zero"
    interpolation_type: ClassVar[str] = "linear"
    use_karras_sigmas: ClassVar[bool] = False

    timestep_spacing: str = "linspace"


class EulerAncestralDiscreteScheduler(EulerDiscreteScheduler):
    """Euler's method that adds noise at every step: `EulerDiscreteScheduler` at eta 1, unless a step asks for less.

    Args:
        config: noise schedule and type of prediction.

    Raises:
        ValueError: the noise level does not increase with every training timestep.

    Source: diffusers: schedulers/scheduling_euler_ancestral_discrete.py.
    """

    config_class: ClassVar = EulerAncestralConfig
    default_eta: ClassVar = 1.0
