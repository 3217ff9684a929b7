"""The noise schedule's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gafext.config.base import Config, require
from gafext.errors import CheckpointError

_EULER = {"clip_sample": False, "timestep_spacing": "linspace"}
_HEUN = {**_EULER, "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class SchedulerConfig(Config):
    """The noise schedule of a diffusers scheduler, as far as DDIM reads it.

    Another solver's file is taken for its noise schedule; what concerns that solver alone is left aside.
    """

    class_name: ClassVar[str] = "DDIMScheduler"
    only: ClassVar[dict[str, tuple]] = {"thresholding": (False,), "use_flow_sigmas": (False,)}
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            *("skip_prk_steps", "solver_order", "solver_type", "solver_p", "algorithm_type", "predict_x0"),
            *("lower_order_final", "euler_at_final", "disable_corrector", "noise_sampler_seed"),
            *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
            *("sigma_min", "sigma_max", "final_sigmas_type", "lambda_min_clipped", "variance_type"),
            *("interpolation_type", "timestep_type", "flow_shift", "time_shift_type"),
            *("dynamic_thresholding_ratio", "sample_max_value"),
        }
    )
    # The defaults of the solver that wrote the file, where they are not DDIM's: none of these ever clips.
    solver_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "DDIMScheduler": {},
        "DDPMScheduler": {},
        "PNDMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
        "DPMSolverSinglestepScheduler": {"clip_sample": False},
        "DPMSolverMultistepScheduler": _EULER,
        "UniPCMultistepScheduler": _EULER,
        "DEISMultistepScheduler": _EULER,
        "EulerDiscreteScheduler": _EULER,
        "EulerAncestralDiscreteScheduler": _EULER,
        "LMSDiscreteScheduler": _EULER,
        "HeunDiscreteScheduler": _HEUN,
        "KDPM2DiscreteScheduler": _HEUN,
        "KDPM2AncestralDiscreteScheduler": _HEUN,
        "DPMSolverSDEScheduler": _HEUN,
    }

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config") -> SchedulerConfig:
        """Build from the file of DDIM or of another solver with the same kind of noise schedule."""
        solver = str(values.get("_class_name", cls.class_name))
        if solver not in cls.solver_defaults:
            raise CheckpointError(f"{source}: _class_name={solver!r}: expected one of {list(cls.solver_defaults)}")
        return super().from_dict({**cls.solver_defaults[solver], **values}, source=source)

    def __post_init__(self) -> None:
        for name, known in (
            ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2")),
            ("prediction_type", ("epsilon", "sample", "v_prediction")),
            ("timestep_spacing", ("leading", "trailing", "linspace")),
        ):
            require(getattr(self, name) in known, f"{name}={getattr(self, name)!r}: expected one of {list(known)}")
        require(
            1 <= self.num_train_timesteps <= 100_000,
            f"num_train_timesteps={self.num_train_timesteps}: expected 1 to 100000",
        )
        require(
            0 < self.beta_start <= self.beta_end < 1,
            f"beta_start={self.beta_start}, beta_end={self.beta_end}: expected 0 < start <= end < 1",
        )
        betas = self.trained_betas
        require(
            betas is None or (len(betas) == self.num_train_timesteps and all(0 < beta <= 1 for beta in betas)),
            f"trained_betas: expected {self.num_train_timesteps} values over 0 and up to 1",
        )
        require(self.clip_sample_range > 0, f"clip_sample_range={self.clip_sample_range}: expected over 0")
        require(
            0 <= self.steps_offset < self.num_train_timesteps,
            f"steps_offset={self.steps_offset}: expected 0 to {self.num_train_timesteps - 1}",
        )


SD_SCHEDULE = SchedulerConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
"""Stable Diffusion's schedule; 2.1 (768) predicts v, 2.1-base and ImageDream epsilon."""
