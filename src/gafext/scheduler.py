"""DDIM sampling (arXiv 2010.02502) over the noise schedules of diffusers' checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from gafext import weights
from gafext.config import SD_SCHEDULE, SchedulerConfig

CONFIG_NAME = "scheduler_config.json"
MAX_STEPS = 1000


def _betas(config: SchedulerConfig) -> Tensor:
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float32)
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    # squaredcos_cap_v2: arXiv 2102.09672 eq. 17, with Python's cosine, which rounds alike on every machine.
    curve = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    alphas_cumprod = torch.tensor(curve, dtype=torch.float64)
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999).float()


def _alphas_cumprod(config: SchedulerConfig) -> Tensor:
    """ᾱ of every training timestep, [T], float32 as in diffusers."""
    alphas_cumprod = torch.cumprod(1 - _betas(config), dim=0)
    if not config.rescale_betas_zero_snr:
        return alphas_cumprod
    root = alphas_cumprod.sqrt()  # arXiv 2305.08891 algorithm 1: √ᾱ keeps its start and ends in 0
    rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    # Multiplied up again from its ratios, as diffusers does: equal to the last bit.
    return torch.cumprod(torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]]), dim=0)


def _spaced_timesteps(config: SchedulerConfig, count: int) -> Tensor:
    """`count` of the T training timesteps, falling; arXiv 2305.08891 table 2."""
    total, steps = config.num_train_timesteps, torch.arange(count)
    if config.timestep_spacing == "trailing":
        # Rounded as NumPy's arange does it, so that halves fall as in diffusers.
        stride = total - (total - total / count)
        return (total - steps.double() * stride).round().long() - 1
    if config.timestep_spacing == "linspace":
        return (steps.double() * ((total - 1) / max(count - 1, 1))).round().long().flip(0)
    ratio = total // count
    # With all T steps there is no room for an offset: diffusers then indexes past the end of the schedule.
    offset = min(config.steps_offset, total - 1 - (count - 1) * ratio)
    return (steps * ratio + offset).flip(0)


def _require_shape(name: str, tensor: Tensor, sample: Tensor) -> None:
    if tensor.shape != sample.shape:
        raise ValueError(f"{name}: expected the sample's shape {list(sample.shape)}, got {list(tensor.shape)}")


def check_eta(eta: float) -> None:
    """Raise a ValueError unless 0.0 ≤ eta ≤ 1.0."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta: expected 0.0 to 1.0, got {eta!r}")


class DDIMScheduler:
    """DDIM: from x_t to x_{t-1} in few steps, deterministic at eta 0.

    x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1} - σ²) ε̂ + σ·noise
    σ² = eta² (1 - ᾱ_{t-1})/(1 - ᾱ_t) (1 - ᾱ_t/ᾱ_{t-1})

    Args:
        config: the noise schedule and what the network predicts.

    Source: arXiv 2010.02502 eq. 12 and 16; diffusers: schedulers/scheduling_ddim.py.
    """

    init_noise_sigma = 1.0

    def __init__(self, config: SchedulerConfig = SD_SCHEDULE):
        self.config = config
        self.alphas_cumprod = _alphas_cumprod(config)  # [T]
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.int64)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DDIMScheduler:
        """Load `scheduler_config.json`; another solver's file is taken for its noise schedule.

        Args:
            folder: a scheduler folder of a diffusers checkpoint.

        Raises:
            CheckpointError: the file is missing or damaged, or asks for what DDIM here does not do.
        """
        path = Path(folder) / CONFIG_NAME
        return cls(SchedulerConfig.from_dict(weights.read_json(path), source=str(path)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `scheduler_config.json` as diffusers' DDIMScheduler reads it."""
        with weights.replace_whole(Path(folder)) as temporary:
            weights.write_json(temporary / CONFIG_NAME, self.config.to_dict())

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps of a run and put them into `timesteps`, falling, int64.

        Args:
            num_inference_steps: 1 to the number of training timesteps, and at most 1000.
            device: of `timesteps`; None is the CPU.

        Raises:
            ValueError: the number is out of range, or the run would start at zero signal with a network that
                predicts epsilon.
        """
        most = min(self.config.num_train_timesteps, MAX_STEPS)
        count = num_inference_steps
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= most:
            raise ValueError(f"num_inference_steps: expected a whole number from 1 to {most}, got {count!r}")
        timesteps = _spaced_timesteps(self.config, count)
        if self.config.prediction_type == "epsilon" and (self.alphas_cumprod[timesteps] == 0).any():
            raise ValueError(
                "prediction_type: expected 'v_prediction' or 'sample', got 'epsilon', which says nothing at "
                f"timestep {int(timesteps[0])}, where all is noise (rescale_betas_zero_snr)"
            )
        self.num_inference_steps = count
        self.timesteps = timesteps.to(device)
        self._steps = frozenset(timesteps.tolist())  # on the CPU, so that no step waits for a device

    def step(
        self,
        model_output: Tensor,
        t: int | Tensor,
        sample: Tensor,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Go from x_t to the sample one step earlier.

        Args:
            model_output: what the network predicts at t (epsilon, v or x_0), the sample's shape.
            t: one of `timesteps`; an int costs no wait for the device.
            sample: x_t, any shape; half types are computed in float32.
            eta: 0 (DDIM) to 1 (DDPM).
            noise: standard normal, the sample's shape; needed when eta is over 0, otherwise unused.

        Returns:
            The sample's shape and dtype.

        Raises:
            ValueError: t is none of the timesteps, shapes differ, eta is out of range, or noise is missing.
        """
        alpha, alpha_before = self._alphas(t)
        _require_shape("model_output", model_output, sample)
        check_eta(eta)
        if eta > 0:
            if noise is None:
                raise ValueError(f"noise: expected a tensor of shape {list(sample.shape)} at eta={eta}, got None")
            _require_shape("noise", noise, sample)

        dtype = torch.promote_types(sample.dtype, torch.float32)
        clean, epsilon = self._split(model_output.to(dtype), sample.to(dtype), alpha)
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

        sigma = eta * ((1 - alpha_before) / (1 - alpha) * (1 - alpha / alpha_before)).sqrt()
        direction = (1 - alpha_before - sigma**2).clamp(min=0).sqrt()  # rounding alone makes it negative
        before = alpha_before.sqrt() * clean + direction * epsilon
        if eta > 0:
            before = before + sigma * noise.to(dtype)
        return before.to(sample.dtype)

    def add_noise(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Noise a clean sample: √ᾱ_t x_0 + √(1 - ᾱ_t) noise.

        Args:
            sample: x_0, [B,...]; half types are computed in float32.
            noise: standard normal, the same shape.
            timesteps: one for all or [B], int64, 0 to the number of training timesteps less one.

        Returns:
            The sample's shape and dtype.

        Raises:
            ValueError: shapes differ or a timestep is out of range.

        Source: arXiv 2006.11239 eq. 4.
        """
        _require_shape("noise", noise, sample)
        timesteps = torch.as_tensor(timesteps, device="cpu").reshape(-1)
        if timesteps.numel() not in (1, sample.shape[0]):
            raise ValueError(f"timesteps: expected 1 or {sample.shape[0]} values, got {timesteps.numel()}")
        last = self.config.num_train_timesteps - 1
        if timesteps.is_floating_point() or ((timesteps < 0) | (timesteps > last)).any():
            raise ValueError(f"timesteps: expected whole numbers from 0 to {last}, got {timesteps.tolist()}")
        dtype = torch.promote_types(sample.dtype, torch.float32)
        alpha = self.alphas_cumprod[timesteps].view(-1, *[1] * (sample.ndim - 1)).to(sample.device, dtype)  # [B,1,...]
        return (alpha.sqrt() * sample.to(dtype) + (1 - alpha).sqrt() * noise.to(dtype)).to(sample.dtype)

    def _alphas(self, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """ᾱ at t and one step earlier, as scalars on the CPU, which combine with tensors of any device."""
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps(n) has not been called")
        t = t.item() if isinstance(t, Tensor) else t
        if t not in self._steps:
            raise ValueError(f"t: expected one of the timesteps {self.timesteps.tolist()}, got {t!r}")
        # As in diffusers: one stride for every spacing, although only "leading" timesteps lie that far apart.
        before = t - self.config.num_train_timesteps // self.num_inference_steps
        if before >= 0 or not self.config.set_alpha_to_one:
            return self.alphas_cumprod[t], self.alphas_cumprod[max(before, 0)]
        return self.alphas_cumprod[t], torch.ones(())

    def _split(self, model_output: Tensor, sample: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample x̂_0 and the noise ε̂ that the network's prediction amounts to."""
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        if self.config.prediction_type == "epsilon":
            return (sample - noise * model_output) / signal, model_output
        if self.config.prediction_type == "sample":
            return model_output, (sample - signal * model_output) / noise
        return signal * sample - noise * model_output, signal * model_output + noise * sample
