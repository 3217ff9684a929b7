"""The noise of training and the timesteps of a run: what every solver starts from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gafext.config.scheduler import NoiseScheduleConfig


def _betas(config: NoiseScheduleConfig) -> Tensor:
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


def alphas_cumprod(config: NoiseScheduleConfig) -> Tensor:
    """ᾱ of every training timestep, [T], float32 as in diffusers."""
    alphas_cumprod = torch.cumprod(1 - _betas(config), dim=0)
    if not config.rescale_betas_zero_snr:
        return alphas_cumprod
    root = alphas_cumprod.sqrt()  # arXiv 2305.08891 algorithm 1: √ᾱ keeps its start and ends in 0
    rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    # Multiplied up again from its ratios, as diffusers does: equal to the last bit.
    return torch.cumprod(torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]]), dim=0)


def spaced_timesteps(config: NoiseScheduleConfig, count: int, *, whole: bool = True) -> Tensor:
    """`count` of the T training timesteps, falling, float64 [count]; arXiv 2305.08891 table 2.

    Without `whole`, "linspace" is not rounded.
    """
    total, steps = config.num_train_timesteps, torch.arange(count, dtype=torch.float64)
    if config.timestep_spacing == "trailing":
        # Rounded as NumPy's arange does it, so that halves fall as in diffusers.
        stride = total - (total - total / count)
        return (total - steps * stride).round() - 1
    if config.timestep_spacing == "linspace":
        timesteps = (steps * ((total - 1) / max(count - 1, 1))).flip(0)
        return timesteps.round() if whole else timesteps
    ratio = total // count
    # With all T steps there is no room for an offset: diffusers then indexes past the end of the schedule.
    offset = min(config.steps_offset, total - 1 - (count - 1) * ratio)
    return (steps * ratio + offset).flip(0)


def sigma_table(alphas_cumprod: Tensor) -> Tensor:
    """σ = √((1 - ᾱ)/ᾱ) of every training timestep, rising, [T] float64."""
    floor = alphas_cumprod.masked_fill(alphas_cumprod == 0, 2.0**-24)  # of diffusers: σ is 4096 where all is noise
    return ((1 - floor) / floor).sqrt().double()


def sigmas_at(timesteps: Tensor, table: Tensor) -> Tensor:
    """The table's σ at timesteps [n], linear between two entries."""
    low = timesteps.floor().long()
    return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], timesteps - low)


def timesteps_at(sigmas: Tensor, table: Tensor) -> Tensor:
    """The timesteps [n] at which the table has these σ, log-linear between two entries."""
    logs, log = table.log(), sigmas.log()
    low = (torch.searchsorted(logs, log, right=True) - 1).clamp(0, len(table) - 2)
    return low + ((log - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)


def karras_sigmas(largest: Tensor, smallest: Tensor, count: int) -> Tensor:
    """`count` noise levels whose 7th roots are evenly spaced, falling; arXiv 2206.00364 eq. 5."""
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    return (largest ** (1 / 7) + ramp * (smallest ** (1 / 7) - largest ** (1 / 7))) ** 7


def predicted(
    prediction_type: str, model_output: Tensor, sample: Tensor, signal: Tensor | float, noise: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The clean sample x̂_0 and the noise ε̂ of a prediction from sample = signal x_0 + noise ε, signal² + noise² = 1."""
    if prediction_type == "epsilon":
        return (sample - noise * model_output) / signal, model_output
    if prediction_type == "sample":
        return model_output, (sample - signal * model_output) / noise
    return signal * sample - noise * model_output, signal * model_output + noise * sample
