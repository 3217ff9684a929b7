"""Tiles of the autoencoder: the seams, diffusers' tiles, and what is decoded at once."""

import diffusers
import pytest
import torch
from helpers import max_abs_diff
from small_checkpoints import stock_vae

from gafext.models.tiling import tiled
from gafext.models.vae import AutoencoderKL


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (28, 16), (5, 33), (64, 21)])
def test_tiles_of_a_pointwise_function_are_the_whole(size):
    x = torch.randn(2, 3, *size)

    def double(part):
        assert max(part.shape[2:]) <= 16
        return torch.nn.functional.interpolate(part, scale_factor=2, mode="nearest")

    assert max_abs_diff(tiled(double, x, tile=16, out_scale=2), double_whole(x)) < 1e-6
    wide = double_whole(x)
    assert max_abs_diff(tiled(lambda part: part[..., ::2, ::2], wide, tile=16, in_scale=2), x) < 1e-6


def double_whole(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_a_seam_fades_from_one_tile_to_the_next():
    levels = iter([0.0, 1.0])
    merged = tiled(lambda part: torch.full_like(part, next(levels)), torch.zeros(1, 1, 8, 14), tile=8)
    expected = torch.tensor([0.0] * 6 + [0.0, 0.5] + [1.0] * 6)
    assert torch.equal(merged, expected.expand(1, 1, 8, 14))


@pytest.fixture
def vaes(tmp_path):
    theirs = stock_vae((8, 16), seed=3, sample_size=32)  # tiles of 32 pixels, 16 latents
    theirs.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_pretrained(tmp_path)
    assert isinstance(theirs, diffusers.AutoencoderKL)
    ours.enable_tiling(32)
    theirs.enable_tiling()
    return ours, theirs


@torch.no_grad()
def test_tiles_are_those_of_diffusers(vaes):
    """Before the last seam of diffusers, whose last tile of an axis is a sliver."""
    ours, theirs = vaes
    latents = torch.randn(1, 4, 16, 28)
    mine, expected = ours.decode(latents), theirs.decode(latents).sample
    assert mine.shape == expected.shape == (1, 3, 32, 56)
    assert max_abs_diff(mine[..., :24, :48], expected[..., :24, :48]) < 1e-4
    image = torch.rand(1, 3, 32, 56) * 2 - 1
    mean, logvar = ours.encode(image)
    theirs_moments = theirs.encode(image).latent_dist
    assert max_abs_diff(mean[..., :12, :24], theirs_moments.mean[..., :12, :24]) < 1e-4
    assert max_abs_diff(logvar[..., :12, :24], theirs_moments.logvar[..., :12, :24]) < 1e-4


@torch.no_grad()
def test_tiling_bounds_what_is_decoded_at_once(vaes):
    ours, _ = vaes
    sizes = []
    ours.decoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
    latents = torch.randn(1, 4, 40, 40)
    tiles = ours.decode(latents)
    assert set(sizes) == {(16, 16)} and len(sizes) == 9
    ours.disable_tiling()
    whole = ours.decode(latents)
    assert sizes[-1] == (40, 40) and whole.shape == tiles.shape
    ours.enable_tiling(32)
    assert torch.equal(ours.decode(latents[..., :16, :16]), ours.decoder(ours.post_quant_conv(latents[..., :16, :16])))
    with pytest.raises(ValueError, match="tile_size: expected a multiple of 8, got 12"):
        ours.enable_tiling(12)
