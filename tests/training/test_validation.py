"""What the validation of a run measures of held-out heads."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from gafext import MultiViewDiffusionPipeline
from gafext.training.data import read_heads
from gafext.training.settings import Settings
from gafext.training.validation import validate


class Distance(nn.Module):
    """Stand-in for lpips.LPIPS, which would download AlexNet: the mean absolute difference [N,1,1,1]."""

    def __init__(self, *, net, verbose):
        super().__init__()
        assert (net, verbose) == ("alex", False)

    def forward(self, left, right, *, normalize):
        assert normalize and not torch.is_grad_enabled()  # images in [0,1]
        return (left - right).abs().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch):
    """The package lpips, whose LPIPS a test may replace."""
    package = types.ModuleType("lpips")
    package.LPIPS = Distance
    package.__spec__ = types.SimpleNamespace(name="lpips")
    monkeypatch.setitem(sys.modules, "lpips", package)
    return package


@pytest.fixture(scope="module")
def measured(files):
    """Validation of two heads: folder -> scores and pictures."""
    pipe = MultiViewDiffusionPipeline.from_pretrained(files / "parent", device="cpu")
    heads, faults = read_heads(files / "data", views=2)
    assert not faults
    settings = replace(Settings(), validation_steps=1, guidance=1.0)
    return lambda folder: validate(pipe, heads[:2], folder, settings, views=2)


def test_lpips_is_measured_where_it_is_installed(measured, lpips, tmp_path):
    scores, pictures = measured(tmp_path)
    assert list(scores) == ["psnr", "ssim", "lpips"] and len(pictures) == 2
    rows = [torch.tensor(picture) / 255 for picture in pictures]  # generated views above the true ones
    halves = [row.split(row.shape[0] // 2) for row in rows]
    expected = sum((made - true).abs().mean() for made, true in halves) / 2
    assert scores["lpips"] == pytest.approx(expected.item(), abs=1 / 255)


def test_without_lpips_psnr_and_ssim_are_left(measured, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    scores, _ = measured(tmp_path)
    assert list(scores) == ["psnr", "ssim"]


def test_weights_that_cannot_be_downloaded_do_not_end_a_run(measured, lpips, monkeypatch, tmp_path):
    def offline(**options):
        raise OSError("no network")

    monkeypatch.setattr(lpips, "LPIPS", offline)
    with pytest.warns(UserWarning, match="lpips: not measured, because it cannot be loaded: no network"):
        scores, _ = measured(tmp_path)
    assert list(scores) == ["psnr", "ssim"]
