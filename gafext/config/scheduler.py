"""Configurations of the noise schedule and of the solvers that use it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from gafext.config.base import Config, require, require_counts, require_either
from gafext.errors import CheckpointError

ScheduleType = TypeVar("ScheduleType", bound="NoiseScheduleConfig")
_EULER = {"clip_sample": False, "timestep_spacing": "linspace"}
_HEUN = {**_EULER, "beta_start": 0.00085, "beta_end": 0.012}
_LCM = {"clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LEAST_BETA = 2.0**-23  # below it, 1 - beta rounds to 1 in float32: no noise


@dataclass(frozen=True)
class NoiseScheduleConfig(Config, dict[str, Any]):
    """Settings common to all of diffusers' schedulers: the noise schedule of training and the type of prediction.

    From another solver's file the settings that this solver has too are read, as by diffusers, and the others ignored.
    As a dict it is the content of the file, and so `Scheduler.from_config(pipe.scheduler.config)` works with classes of
    diffusers.
    """

    may_be_empty = True
    only: ClassVar[dict[str, tuple]] = {"thresholding": (False,), "use_flow_sigmas": (False,)}
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            *("clip_sample", "clip_sample_range", "set_alpha_to_one"),
            *("skip_prk_steps", "solver_order", "solver_type", "solver_p", "algorithm_type", "predict_x0"),
            *("lower_order_final", "euler_at_final", "disable_corrector", "noise_sampler_seed"),
            *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
            *("sigma_min", "sigma_max", "final_sigmas_type", "lambda_min_clipped", "variance_type"),
            *("interpolation_type", "timestep_type", "flow_shift", "time_shift_type"),
            *("dynamic_thresholding_ratio", "sample_max_value", "original_inference_steps", "timestep_scaling"),
        }
    )
    # Defaults of the solver that wrote the file where they differ from DDIM's: those with settings here never clip.
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
        "LCMScheduler": _LCM,
    }

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    @classmethod
    def from_dict(cls: type[ScheduleType], values: dict[str, Any], *, source: str = "config") -> ScheduleType:
        """Build a configuration from the file of this solver, or of another one of `solver_defaults`."""
        solver = str(values.get("_class_name", cls.class_name))
        if solver not in cls.solver_defaults:
            raise CheckpointError(f"{source}: _class_name={solver!r}: expected one of {list(cls.solver_defaults)}")
        if "timestep_spacing" in (values.get("_use_default_values") or ()):
            values = {**values, "timestep_spacing": cls.timestep_spacing}  # of what made the configuration, in no file
        return super().from_dict(cls._own_values(solver, values), source=source)

    @classmethod
    def _own_values(cls, solver: str, values: dict[str, Any]) -> dict[str, Any]:
        """Select the values of a file written by `solver` that apply to this solver.

        Missing settings of the noise schedule get the writing solver's default, except for a missing timestep spacing,
        which gets this solver's, as in diffusers. Its own settings keep their values of another solver's file; those
        that diffusers lists as left at the writer's default get this solver's.
        """
        shared = {field.name for field in fields(NoiseScheduleConfig)}
        unset = values.get("_use_default_values") or ()
        values = {key: value for key, value in values.items() if key in shared or key not in unset}
        return values if solver == cls.class_name else cls.solver_defaults[solver] | values

    def __post_init__(self) -> None:
        self.update(self.to_dict())
        for name, known in (
            ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2")),
            ("prediction_type", ("epsilon", "sample", "v_prediction")),
            ("timestep_spacing", ("leading", "trailing", "linspace")),
        ):
            require(getattr(self, name) in known, f"{name}={getattr(self, name)!r}: expected one of {list(known)}")
        require_counts(self, 100_000, "num_train_timesteps")
        require(
            _LEAST_BETA <= self.beta_start <= self.beta_end < 1,
            f"beta_start={self.beta_start}, beta_end={self.beta_end}: expected {_LEAST_BETA:.1e} <= start <= end < 1",
        )
        betas = self.trained_betas
        require(
            betas is None
            or (len(betas) == self.num_train_timesteps and all(_LEAST_BETA <= beta <= 1 for beta in betas)),
            f"trained_betas: expected {self.num_train_timesteps} values, {_LEAST_BETA:.1e} to 1",
        )
        require(
            0 <= self.steps_offset < self.num_train_timesteps,
            f"steps_offset={self.steps_offset}: expected 0 to {self.num_train_timesteps - 1}",
        )


@dataclass(frozen=True)
class SchedulerConfig(NoiseScheduleConfig):
    """Configuration of a diffusers DDIMScheduler."""

    class_name: ClassVar[str] = "DDIMScheduler"

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True

    @classmethod
    def _own_values(cls, solver: str, values: dict[str, Any]) -> dict[str, Any]:
        return {**cls.solver_defaults[solver], **values}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.clip_sample_range > 0, f"clip_sample_range={self.clip_sample_range}: expected over 0")


@dataclass(frozen=True)
class SigmaConfig(NoiseScheduleConfig):
    """Settings common to the solvers that step from one noise level σ to the next."""

    timestep_spacing: str = "linspace"
    final_sigmas_type: str = "zero"
    use_karras_sigmas: bool = False

    @classmethod
    def _own_values(cls, solver: str, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._own_values(solver, values)
        if solver == cls.class_name or values.get("use_karras_sigmas"):
            return values
        # Bounds of UniPC's or Euler's: diffusers reads them from its configuration for Karras' noise levels alone.
        return {key: value for key, value in values.items() if key not in ("sigma_min", "sigma_max")}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_train_timesteps > 1, "num_train_timesteps=1: expected 2 to 100000")
        require_either(self, "final_sigmas_type", "zero", "sigma_min")


@dataclass(frozen=True)
class EulerConfig(SigmaConfig):
    """Configuration of a diffusers EulerDiscreteScheduler."""

    class_name: ClassVar[str] = "EulerDiscreteScheduler"
    only: ClassVar[dict[str, tuple]] = {
        **NoiseScheduleConfig.only,
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "timestep_type": ("discrete",),
        "sigma_min": (None,),
        "sigma_max": (None,),
    }

    interpolation_type: str = "linear"

    @classmethod
    def _own_values(cls, solver: str, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._own_values(solver, values)
        if values.get("prediction_type") == "original_sample":  # older name of "sample"
            values = {**values, "prediction_type": "sample"}
        return values

    def __post_init__(self) -> None:
        super().__post_init__()
        require_either(self, "interpolation_type", "linear", "log_linear")


SD_SCHEDULE = SchedulerConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
"""Noise schedule of Stable Diffusion; 2.1 (768) predicts v, 2.1-base and ImageDream predict epsilon."""
