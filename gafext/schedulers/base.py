"""What every solver does alike: files, the choice of timesteps, the checks of a step, noising."""

from __future__ import annotations

import numbers
import operator
from pathlib import Path
from typing import ClassVar, TypeVar

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


def _require_shape(name: str, tensor: Tensor, sample: Tensor) -> None:
    if tensor.shape != sample.shape:
        raise ValueError(f"{name}: expected the sample's shape {list(sample.shape)}, got {list(tensor.shape)}")


class Scheduler:
    """A way from noise to a sample in few steps; a solver says how one step goes.

    Args:
        config: the noise schedule, what the network predicts, and the solver's settings.
    """

    config_class: ClassVar[type[NoiseScheduleConfig]]
    init_noise_sigma: float = 1.0
    """What standard normal noise is multiplied by to become the first sample; of a run, after `set_timesteps`."""

    def __init__(self, config: NoiseScheduleConfig):
        self.config = config
        self.alphas_cumprod = schedule.alphas_cumprod(config)  # [T]
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.int64)

    @classmethod
    def from_pretrained(cls: type[SchedulerType], folder: str | Path) -> SchedulerType:
        """Load `scheduler_config.json`; another solver's file is taken for its noise schedule.

        Args:
            folder: a scheduler folder of a diffusers checkpoint.

        Raises:
            CheckpointError: the file is missing or damaged, or asks for what this solver does not do here.
        """
        path = Path(folder) / CONFIG_NAME
        try:
            return cls(cls.config_class.from_dict(weights.read_json(path), source=str(path)))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_config(cls: type[SchedulerType], config: NoiseScheduleConfig) -> SchedulerType:
        """This solver over the noise schedule of another one's configuration."""
        return cls(cls.config_class.from_dict(config.to_dict()))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json` as diffusers' scheduler of the same name reads it."""
        with replace_whole(Path(folder)) as temporary:
            weights.write_json(temporary / CONFIG_NAME, self.config.to_dict())

    @property
    def _most_steps(self) -> int:
        return min(self.config.num_train_timesteps, MAX_STEPS)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps of a run and put them into `timesteps`, falling.

        Args:
            num_inference_steps: 1 to the number of training timesteps, and at most 1000.
            device: of `timesteps`; None is the CPU.

        Raises:
            ValueError: the number is out of range, or the run would start at zero signal with a network that
                predicts epsilon.
        """
        count, most = num_inference_steps, self._most_steps
        whole = hasattr(count, "__index__") and not isinstance(count, bool)
        if not whole or not 1 <= operator.index(count) <= most:
            raise ValueError(f"num_inference_steps: expected a whole number from 1 to {most}, got {count!r}")
        count = operator.index(count)
        timesteps = self._plan(count)
        self.num_inference_steps = count
        self.timesteps = timesteps.to(device)
        self._times = timesteps.tolist()  # on the CPU, so that no step waits for a device
        self._indices = {t: index for index, t in reversed(list(enumerate(self._times)))}

    def _plan(self, count: int) -> Tensor:
        """The timesteps [count] of a run, and whatever else the solver needs to know of it."""
        raise NotImplementedError

    def _index(self, t: int | float | Tensor) -> int:
        """Which step of the run begins at t."""
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps(n) has not been called")
        t = t.item() if isinstance(t, Tensor) else t
        if t not in self._indices:
            raise ValueError(f"t: expected one of the timesteps {self._times}, got {t!r}")
        return self._indices[t]

    def scale_model_input(self, sample: Tensor, t: int | float | Tensor) -> Tensor:
        """The sample as the network was trained to see it at t.

        Args:
            sample: of any shape.
            t: one of `timesteps`.

        Returns:
            The sample's shape and dtype.
        """
        return sample

    def step(
        self,
        model_output: Tensor,
        t: int | float | Tensor,
        sample: Tensor,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Go from the sample at t to the one that is one step less noisy.

        Args:
            model_output: what the network predicts at t (epsilon, v or x_0), the sample's shape.
            t: one of `timesteps`; a number costs no wait for the device.
            sample: x_t, any shape; half types are computed in float32.
            eta: 0 is deterministic, 1 adds as much noise as DDPM does.
            noise: standard normal, the sample's shape; needed when eta is over 0, otherwise unused.

        Returns:
            The sample's shape and dtype.

        Raises:
            ValueError: t is none of the timesteps, shapes differ, eta is out of range, or noise is missing.
        """
        index = self._index(t)
        _require_shape("model_output", model_output, sample)
        check_eta(eta)
        if eta > 0:
            if noise is None:
                raise ValueError(f"noise: expected a tensor of shape {list(sample.shape)} at eta={eta}, got None")
            _require_shape("noise", noise, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        noise = noise.to(dtype) if eta > 0 else None
        return self._advance(index, model_output.to(dtype), sample.to(dtype), eta, noise).to(sample.dtype)

    def _advance(self, index: int, model_output: Tensor, sample: Tensor, eta: float, noise: Tensor | None) -> Tensor:
        """The step itself, on checked tensors of one dtype; noise is None at eta 0."""
        raise NotImplementedError

    def add_noise(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int | float) -> Tensor:
        """Noise a clean sample: signal_t x_0 + level_t noise, which is √ᾱ_t x_0 + √(1 - ᾱ_t) noise but for Euler.

        Args:
            sample: x_0, [B,...]; half types are computed in float32.
            noise: standard normal, the same shape.
            timesteps: one for all or [B]; of DDIM any whole numbers from 0 to the number of training timesteps
                less one, of the others some of `timesteps`.

        Returns:
            The sample's shape and dtype.

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
        """How much signal and how much noise a sample has at each of the timesteps."""
        raise NotImplementedError
