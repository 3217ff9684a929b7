"""Noise schedule of training and choice of timesteps, common to all solvers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from gafext.config.scheduler import NoiseScheduleConfig

ScheduleType = TypeVar("ScheduleType", bound=NoiseScheduleConfig)


def _betas(config: NoiseScheduleConfig) -> Tensor:
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float32)
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    # squaredcos_cap_v2: arXiv 2102.09672 eq. 17, with Python's cosine, whose rounding is the same on every machine.
    curve = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    alphas_cumprod = torch.tensor(curve, dtype=torch.float64)
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999).float()


def alphas_cumprod(config: NoiseScheduleConfig) -> Tensor:
    """Compute ᾱ of every training timestep, [T] float32 as in diffusers."""
    alphas_cumprod = torch.cumprod(1 - _betas(config), dim=0)
    if not config.rescale_betas_zero_snr:
        return alphas_cumprod
    root = alphas_cumprod.sqrt()  # arXiv 2305.08891 algorithm 1: √ᾱ keeps its first value and ends at 0
    rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    # Recomputed as a product of ratios, as in diffusers, for equal bits.
    return torch.cumprod(torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]]), dim=0)


def shift_snr(config: ScheduleType, scale: float) -> ScheduleType:
    """Lower the signal-to-noise ratio of a schedule, the more the noisier: SNR'_t = SNR_t / scale^(t/(T-1)).

    Args:
        config: noise schedule.
        scale: divisor at the last timestep, over 0.

    Returns:
        The configuration with `trained_betas`.

    Raises:
        ValueError: the schedule ends without signal.

    Source: MV-Adapter (arXiv 2412.03632); github.com/huanngzh/MV-Adapter:
    mvadapter/schedulers/scheduling_shift_snr.py, its mode "interpolated".
    """
    if config.rescale_betas_zero_snr:
        raise ValueError("rescale_betas_zero_snr: expected false for a shifted schedule, got true")
    alphas = alphas_cumprod(config).double()
    weights = torch.linspace(0, 1, len(alphas), dtype=torch.float64)
    snr = alphas / (1 - alphas) / scale**weights
    shifted = snr / (1 + snr)
    betas = 1 - shifted / torch.cat([shifted.new_ones(1), shifted[:-1]])
    return replace(config, trained_betas=tuple(betas.tolist()))


def spaced_timesteps(config: NoiseScheduleConfig, count: int, *, whole: bool = True) -> Tensor:
    """Choose `count` of the T training timesteps, decreasing, [count] float64 (arXiv 2305.08891 table 2).

    Args:
        config: noise schedule with the timestep spacing.
        count: number of steps.
        whole: round the timesteps of "linspace".
    """
    total, steps = config.num_train_timesteps, torch.arange(count, dtype=torch.float64)
    if config.timestep_spacing == "trailing":
        # Computed as by NumPy's arange, so that halves round as in diffusers.
        stride = total - (total - total / count)
        return (total - steps * stride).round() - 1
    if config.timestep_spacing == "linspace":
        timesteps = (steps * ((total - 1) / max(count - 1, 1))).flip(0)
        return timesteps.round() if whole else timesteps
    ratio = total // count
    # With all T steps the offset must be 0; diffusers indexes out of the schedule there.
    offset = min(config.steps_offset, total - 1 - (count - 1) * ratio)
    return (steps * ratio + offset).flip(0)


def sigma_table(alphas_cumprod: Tensor) -> Tensor:
    """Compute σ = √((1 - ᾱ)/ᾱ) of every training timestep, increasing but for the floor at zero signal, [T] float64."""
    floor = alphas_cumprod.masked_fill(alphas_cumprod == 0, 2.0**-24)  # diffusers' floor: σ is 4096 at zero signal
    return ((1 - floor) / floor).sqrt().double()


def sigmas_at(timesteps: Tensor, table: Tensor) -> Tensor:
    """Interpolate the table's σ linearly at timesteps [n]."""
    low = timesteps.floor().long()
    return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], timesteps - low)


def timesteps_at(sigmas: Tensor, table: Tensor) -> Tensor:
    """Invert the table: timesteps [n] of the given σ, interpolated linearly in log σ."""
    # diffusers' table is rounded to float32: its largest σ may come out just below T - 1, which truncates to T - 2.
    logs, log = table.log().float().double(), sigmas.log()
    low = (torch.searchsorted(logs[:-1], log, right=True) - 1).clamp(min=0)  # sorted, which a floor at the end is not
    return low + ((log - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)


def karras_sigmas(largest: Tensor, smallest: Tensor, count: int) -> Tensor:
    """Compute `count` decreasing noise levels with evenly spaced 7th roots (arXiv 2206.00364 eq. 5)."""
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    return (largest ** (1 / 7) + ramp * (smallest ** (1 / 7) - largest ** (1 / 7))) ** 7


def predicted(
    prediction_type: str, model_output: Tensor, sample: Tensor, signal: Tensor | float, noise: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Convert a prediction to (x̂_0, ε̂), for sample = signal x_0 + noise ε with signal² + noise² = 1."""
    if prediction_type == "epsilon":
        return (sample - noise * model_output) / signal, model_output
    if prediction_type == "sample":
        return model_output, (sample - signal * model_output) / noise
    return signal * sample - noise * model_output, signal * model_output + noise * sample


def prediction_of(
    prediction_type: str, clean: Tensor, sample: Tensor, signal: Tensor | float, noise: Tensor | float
) -> Tensor:
    """Return the model output from which `predicted` makes x̂_0 = `clean`."""
    epsilon = (sample - signal * clean) / noise
    if prediction_type == "epsilon":
        return epsilon
    return clean if prediction_type == "sample" else signal * epsilon - noise * clean
