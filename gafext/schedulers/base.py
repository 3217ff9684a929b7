"""Base class of the solvers: files, choice of timesteps, validation of a step, adding noise."""

from __future__ import annotations

import copy
import math
import numbers
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gafext import weights
from gafext.atomic import replace_whole
from gafext.config.scheduler import NoiseScheduleConfig
from gafext.errors import CheckpointError
from gafext.schedulers import schedule

CONFIG_NAME = "scheduler_config.json"
MAX_STEPS = 1000

SchedulerType = TypeVar("SchedulerType", bound="Scheduler")


def check_eta(eta: float) -> None:
    """Raise a ValueError unless 0.0 ≤ eta ≤ 1.0."""
    if not isinstance(eta, numbers.Real) or not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: expected 0.0 to 1.0, got {eta!r}")


def check_steps(count: Any, most: int, *, name: str = "num_inference_steps") -> int:
    """Return a number of steps as an int; raise a ValueError unless it is a whole number from 1 to `most`."""
    whole = hasattr(count, "__index__") and not isinstance(count, bool)
    if not whole or not 1 <= operator.index(count) <= most:
        raise ValueError(f"{name}: expected a whole number from 1 to {most}, got {count!r}")
    return operator.index(count)


def _copied(value: Any) -> Any:
    """Copy tensors, also those in lists: diffusers' PNDMScheduler adds to one in place."""
    if isinstance(value, Tensor):
        return value.clone()
    return [_copied(part) for part in value] if type(value) is list else copy.copy(value)


def _require_shape(name: str, tensor: Tensor, sample: Tensor) -> None:
    if tensor.shape != sample.shape:
        raise ValueError(f"{name}: expected the sample's shape {list(sample.shape)}, got {list(tensor.shape)}")


class Scheduler:
    """Base of the solvers, which go from noise to a sample in few steps; a subclass defines one step.

    Args:
        config: noise schedule, type of prediction, and settings of the solver.
    """

    config_class: ClassVar[type[NoiseScheduleConfig]]
    init_noise_sigma: float = 1.0
    """Factor from standard normal noise to the first sample of a run; valid after `set_timesteps`."""
    order: int = 1
    """Entries of `timesteps` per step of a run."""
    default_eta: ClassVar[float] = 0.0
    """Noise of a step that asks for no other: 0, or 1 for a solver that adds noise at every step."""

    def __init__(self, config: NoiseScheduleConfig):
        self.config = config
        self.alphas_cumprod = schedule.alphas_cumprod(config)  # [T]
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.int64)

    @classmethod
    def from_pretrained(cls: type[SchedulerType], folder: str | Path) -> SchedulerType:
        """Load `scheduler_config.json`; from another solver's file, the settings that this solver has too.

        Args:
            folder: scheduler folder of a diffusers checkpoint.

        Raises:
            CheckpointError: the file is missing or damaged, or has settings that this solver does not support here.
        """
        path = Path(folder) / CONFIG_NAME
        try:
            return cls(cls.config_class.from_dict(weights.read_json(path), source=str(path)))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_config(cls: type[SchedulerType], config: Mapping[str, Any], **changes: Any) -> SchedulerType:
        """Create this solver from another solver's configuration: its noise schedule, and the settings that both have.

        Args:
            config: configuration of a solver, gafext's or diffusers'.
            changes: settings that replace those of the configuration, such as `use_karras_sigmas=True`.

        Raises:
            CheckpointError: a setting is unknown, or its value is not supported by this solver here.
        """
        left = [name for name in config.get("_use_default_values") or () if name not in changes]
        return cls(cls.config_class.from_dict({**config, "_use_default_values": left, **changes}))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json` for diffusers' scheduler of the same name."""
        with replace_whole(Path(folder)) as temporary:
            weights.write_json(temporary / CONFIG_NAME, self.config.to_dict())

    @property
    def _most_steps(self) -> int:
        return min(self.config.num_train_timesteps, MAX_STEPS)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set `timesteps` to the decreasing timesteps of a run.

        Args:
            num_inference_steps: 1 to the number of training timesteps, at most 1000.
            device: device of `timesteps`; None: CPU.

        Raises:
            ValueError: the number is out of range, or the run would start at zero signal, where a prediction of
                epsilon does not determine the sample.
        """
        count = check_steps(num_inference_steps, self._most_steps)
        timesteps = self._plan(count)
        self.num_inference_steps = count
        self.timesteps = timesteps.to(device)
        self._times = timesteps.tolist()  # Python numbers, so that no step waits for a device
        self._indices = {t: index for index, t in reversed(list(enumerate(self._times)))}

    def for_run(self) -> Scheduler:
        """Return a copy for one run, whose steps leave the state of others alone."""
        return copy.copy(self)  # what steps change is replaced, never changed in place

    def set_begin_index(self, begin_index: int) -> None:
        """Start a run at a later entry of `timesteps`; solvers whose timesteps never repeat find it by its value."""

    def _plan(self, count: int) -> Tensor:
        """Return the timesteps [count] of a run, and prepare the solver's own state for it."""
        raise NotImplementedError

    def _index(self, t: int | float | Tensor) -> int:
        """Return the index of the step that starts at t."""
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps(n) has not been called")
        t = t.item() if isinstance(t, Tensor) else t
        if t not in self._indices:
            raise ValueError(f"t: expected one of the timesteps {self._times}, got {t!r}")
        return self._indices[t]

    def scale_model_input(self, sample: Tensor, t: int | float | Tensor) -> Tensor:
        """Scale a sample to the network's input at t.

        Args:
            sample: x_t, any shape.
            t: one of `timesteps`.

        Returns:
            The input, same shape and dtype as the sample.
        """
        return sample

    def step(
        self,
        model_output: Tensor,
        t: int | float | Tensor,
        sample: Tensor,
        *,
        eta: float | None = None,
        noise: Tensor | None = None,
        generator: list[torch.Generator] | None = None,
    ) -> Tensor:
        """Compute the sample of the next, less noisy timestep from the sample at t.

        Args:
            model_output: the network's prediction at t (epsilon, v or x_0), same shape as the sample.
            t: one of `timesteps`; a Python number avoids waiting for the device.
            sample: x_t, any shape; 16-bit dtypes are computed in float32.
            eta: 0 is deterministic, 1 adds as much noise as DDPM; None: `default_eta`.
            noise: standard normal noise, same shape; required if eta is over 0, otherwise ignored.
            generator: one per row of the sample, for diffusers' schedulers, which draw their own noise; ignored here.

        Returns:
            The next sample, same shape and dtype.

        Raises:
            ValueError: t is not one of the timesteps, shapes differ, eta is out of range, or noise is missing.
        """
        index = self._index(t)
        _require_shape("model_output", model_output, sample)
        eta = self.default_eta if eta is None else eta
        check_eta(eta)
        if eta > 0:
            if noise is None:
                raise ValueError(f"noise: expected a tensor of shape {list(sample.shape)} at eta={eta}, got None")
            _require_shape("noise", noise, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        noise = None if noise is None or eta == 0 else noise.to(dtype)
        return self._advance(index, model_output.to(dtype), sample.to(dtype), eta, noise).to(sample.dtype)

    def _advance(self, index: int, model_output: Tensor, sample: Tensor, eta: float, noise: Tensor | None) -> Tensor:
        """Compute a step on validated tensors of one dtype; noise is None at eta 0."""
        raise NotImplementedError

    def pred_original_sample(self, model_output: Tensor, t: int | float | Tensor, sample: Tensor) -> Tensor:
        """Compute the clean sample x̂_0 that a prediction stands for; to be called before the step at t.

        Args:
            model_output: the network's prediction at t, same shape as the sample.
            t: one of `timesteps`.
            sample: x_t, any shape, floating-point.

        Returns:
            x̂_0, same shape and dtype.
        """
        unit, signal, level = self._unit(t, sample)
        return schedule.predicted(self.config.prediction_type, model_output, unit, signal, level)[0]

    def model_output_for(self, pred_original_sample: Tensor, t: int | float | Tensor, sample: Tensor) -> Tensor:
        """Return the model output for which `pred_original_sample` would compute the given clean sample."""
        unit, signal, level = self._unit(t, sample)
        return schedule.prediction_of(self.config.prediction_type, pred_original_sample, unit, signal, level)

    def sigma(self, t: int | float | Tensor) -> float:
        """Return the noise level of the sample at t, noise / signal = √((1 - ᾱ_t)/ᾱ_t); infinity at zero signal."""
        signal, level = self._levels_at(t)
        return level / signal if signal else math.inf

    def _levels_at(self, t: int | float | Tensor) -> tuple[float, float]:
        signal, level = (value.item() for value in self._levels(torch.as_tensor([t], device="cpu")))
        return signal, level

    def _unit(self, t: int | float | Tensor, sample: Tensor) -> tuple[Tensor, float, float]:
        """Return a sample scaled to signal² + noise² = 1, and these two factors."""
        signal, level = self._levels_at(t)
        norm = (signal**2 + level**2) ** 0.5
        return sample / norm, signal / norm, level / norm

    def state(self) -> dict[str, Any]:
        """Return what a run has changed so far, for `restore`."""
        return {name: _copied(value) for name, value in vars(self._stateful).items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state, to take a step again."""
        vars(self._stateful).update(state)

    @property
    def _stateful(self) -> object:
        return self

    def add_noise(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int | float) -> Tensor:
        """Add noise to a clean sample: √ᾱ_t x_0 + √(1 - ᾱ_t) noise; for Euler, x_0 + σ_t noise.

        Args:
            sample: x_0, [B,...]; 16-bit dtypes are computed in float32.
            noise: standard normal noise, same shape.
            timesteps: one timestep, or [B]; for DDIM whole numbers from 0 to the number of training timesteps minus 1,
                for other solvers elements of `timesteps`.

        Returns:
            The noised sample, same shape and dtype.

        Raises:
            ValueError: shapes differ or a timestep is out of range.

        Source: arXiv 2006.11239 eq. 4; arXiv 2206.00364 section 2 for Euler.
        """
        _require_shape("noise", noise, sample)
        timesteps = torch.as_tensor(timesteps, device="cpu").reshape(-1)
        if timesteps.numel() not in (1, sample.shape[0]):
            raise ValueError(f"timesteps: expected 1 or {sample.shape[0]} values, got {timesteps.numel()}")
        dtype = torch.promote_types(sample.dtype, torch.float32)
        signal, level = (
            value.view(-1, *[1] * (sample.ndim - 1)).to(sample.device, dtype) for value in self._levels(timesteps)
        )  # [B,1,...]
        return (signal * sample.to(dtype) + level * noise.to(dtype)).to(sample.dtype)

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of signal and noise in a sample at each of the timesteps."""
        raise NotImplementedError
