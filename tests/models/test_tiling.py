"""Tiles of the autoencoder: the seams, the difference from the whole, and what is decoded at once."""

import pytest
import torch
import torch.nn.functional as F
from helpers import max_abs_diff
from small_checkpoints import stock_vae

from gafext import PORTRAIT
from gafext.assets import MODEL
from gafext.config import VAEConfig
from gafext.images import load_image, to_square_tensor
from gafext.models.blocks import GroupNorm
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


def test_tiles_overlap_by_a_quarter():
    starts = []

    def note(part):
        starts.append(part[0, 0, 0, 0].item())
        return part

    x = torch.arange(52.0).expand(1, 1, 8, 52)
    assert torch.equal(tiled(note, x, tile=16), x) and starts == [0, 12, 24, 36]


def test_a_seam_fades_from_one_tile_to_the_next():
    levels = iter([0.0, 1.0])
    merged = tiled(lambda part: torch.full_like(part, next(levels)), torch.zeros(1, 1, 8, 14), tile=8)
    expected = torch.tensor([0.0] * 6 + [0.0, 0.5] + [1.0] * 6)
    assert torch.equal(merged, expected.expand(1, 1, 8, 14))


@pytest.fixture(scope="module")
def trained():
    """The built-in autoencoder, and the portrait for it: tiles of noise would show no seams."""
    pixels = to_square_tensor([load_image(PORTRAIT)], 384) * 2 - 1
    return AutoencoderKL.from_pretrained(MODEL / "vae"), pixels


def psnr(left, right):
    return -10 * (left / 2 - right / 2).square().mean().log10().item()


@torch.no_grad()
def test_tiles_are_as_good_as_the_whole(trained):
    vae, pixels = trained
    mean, _ = vae.encode(pixels)
    whole = vae.decode(mean)
    vae.enable_tiling(256)
    tiles = vae.decode(mean)
    encoded, _ = vae.encode(pixels)
    vae.disable_tiling()
    assert 45 < psnr(tiles, whole) < 120
    assert 45 < psnr(vae.decode(encoded), whole) < 120
    assert torch.equal(vae.decode(mean), whole)  # no statistics of the tiles are left behind


@torch.no_grad()
def test_statistics_of_the_input_are_its_own():
    norm, x = GroupNorm(2, 8, eps=1e-2, silu=True), 0.1 * torch.randn(2, 8, 1, 3)
    norm.weight.copy_(torch.randn(8)), norm.bias.copy_(torch.randn(8))
    expected = F.silu(F.group_norm(x, 2, norm.weight, norm.bias, 1e-2))
    norm.statistics = norm.measure(x)
    assert torch.allclose(norm(x), expected, atol=1e-6)


@torch.no_grad()
def test_statistics_do_not_outlive_a_failure(trained):
    vae, _ = trained
    vae.enable_tiling(256)
    hook = vae.decoder.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vae.decode(torch.zeros(1, vae.config.latent_channels, 96, 96))
    hook.remove()
    vae.disable_tiling()
    assert all(module.statistics is None for module in vae.modules() if isinstance(module, GroupNorm))


@torch.no_grad()
def test_tiling_bounds_what_is_decoded_at_once():
    vae, sizes = AutoencoderKL(VAEConfig.from_dict(dict(stock_vae((8, 16)).config))), []
    vae.enable_tiling(32)
    vae.decoder.up_blocks[0].register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[2:])))
    latents = torch.randn(1, 4, 40, 40)
    tiles = vae.decode(latents)
    assert set(sizes) == {(16, 16)} and len(sizes) == 1 + 9
    vae.disable_tiling()
    whole = vae.decode(latents)
    assert sizes[-1] == (40, 40) and whole.shape == tiles.shape
    vae.enable_tiling(32)
    assert torch.equal(vae.decode(latents[..., :16, :16]), vae.decoder(vae.post_quant_conv(latents[..., :16, :16])))
    with pytest.raises(ValueError, match="tile_size: expected a multiple of 8, got 12"):
        vae.enable_tiling(12)
