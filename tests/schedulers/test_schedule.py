"""Changes of a noise schedule."""

from dataclasses import replace

import pytest
import torch
from helpers import max_abs_diff

from gafext.config.scheduler import SD_SCHEDULE
from gafext.schedulers import DDIMScheduler, EulerDiscreteScheduler
from gafext.schedulers.schedule import alphas_cumprod, shift_snr


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_signal_to_noise_ratio_falls_by_the_scale_at_the_end(scale):
    before, after = (alphas_cumprod(config).double() for config in (SD_SCHEDULE, shift_snr(SD_SCHEDULE, scale)))
    ratio = before / (1 - before) / (after / (1 - after))
    assert max_abs_diff(ratio, scale ** (torch.arange(1000) / 999).double()) < 2e-4 * scale


def test_it_keeps_the_solver_and_its_other_settings():
    shifted = shift_snr(SD_SCHEDULE, 8.0)
    assert replace(shifted, trained_betas=None) == SD_SCHEDULE
    euler = EulerDiscreteScheduler.from_config(shifted)
    assert max_abs_diff(euler.alphas_cumprod, DDIMScheduler(shifted).alphas_cumprod) == 0


def test_a_schedule_without_signal_at_its_end_is_refused():
    with pytest.raises(ValueError, match="rescale_betas_zero_snr: expected false"):
        shift_snr(replace(SD_SCHEDULE, rescale_betas_zero_snr=True), 8.0)
