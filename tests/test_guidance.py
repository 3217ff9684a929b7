"""Classifier-free guidance."""

import math

import pytest
import torch
from helpers import max_abs_diff

from gafext.guidance import check_guidance_scale, guide, guides_at, needs_unconditional


@pytest.mark.parametrize("scale", [1, 1.0, 2.5, 7.5, 20, 20.0])
def test_scales_in_range_pass(scale):
    check_guidance_scale(scale)


@pytest.mark.parametrize("scale", [0.99, 0, -7.5, 20.01, math.inf, -math.inf, math.nan, "7.5", None])
def test_other_scales_are_refused_with_the_range(scale):
    with pytest.raises(ValueError, match=r"guidance_scale.*1\.0 to 20\.0, got"):
        check_guidance_scale(scale)


def test_only_scale_one_needs_no_unconditional_pass():
    assert not needs_unconditional(1) and not needs_unconditional(1.0)
    assert needs_unconditional(1.01) and needs_unconditional(7.5)


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_guide_extrapolates_from_the_unconditional_prediction(scale):
    unconditional, conditional = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = (1 - scale) * unconditional.double() + scale * conditional.double()
    assert max_abs_diff(guide(unconditional, conditional, scale), expected) < 1e-5


def test_guide_keeps_the_dtype_and_refuses_to_broadcast():
    half = torch.ones(2, 4, 3, 3, dtype=torch.float16)
    assert guide(half, half, 7.5).dtype == torch.float16
    with pytest.raises(ValueError, match=r"conditional: expected .*\[2, 4, 3, 3\], got \[1, 4, 3, 3\]"):
        guide(half, half[:1], 7.5)


def test_the_interval_has_its_upper_end_and_not_its_lower():
    levels = (0.0, 0.28, 0.2801, 5.42, 5.43, math.inf)
    assert [guides_at(sigma, (0.28, 5.42)) for sigma in levels] == [False, False, True, True, False, False]
    assert guides_at(math.inf, (1.0, math.inf))
