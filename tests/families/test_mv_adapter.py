"""MV-Adapter over a stock folder, against a plain rendering on diffusers' own networks."""

import json
import sys

import diffusers
import numpy as np
import pytest
import torch
from helpers import assert_backends_agree, assert_equal_weights, max_abs_diff, normal
from plain_mv_adapter import Plain, save_mv_adapter
from small_checkpoints import (
    SD_SCHEDULE,
    SIZE,
    assert_conditional_pass_alone,
    portrait,
    run,
    save_ip_adapter,
    stock_clip,
    stock_text,
    stock_tokenizer,
    stock_unet,
    stock_vae,
)
from transformers import CLIPTextModel, CLIPTokenizer

import gafext
from gafext.checkpoints.mv_adapter import with_mv_adapter
from gafext.cli import main
from gafext.errors import CameraError
from gafext.families import families
from gafext.models.unet import MultiViewUNet
from gafext.portraits.stream import Hooks, stream

FAMILY = families()["mv_adapter"]
SCHEDULE = {**SD_SCHEDULE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock Stable Diffusion folder, small, and an adapter file for its U-Net."""
    folder = tmp_path_factory.mktemp("stock")
    unet = stock_unet(cross_attention_dim=32)
    unet.conv_out.weight.data *= 0.3  # keeps the samples of a loop in the range of a trained network
    unet.save_pretrained(folder / "unet")
    stock_vae(seed=None).save_pretrained(folder / "vae")
    stock_text().save_pretrained(folder / "text_encoder")
    stock_tokenizer(folder / "tokenizer", model_max_length=12)
    stock_clip().save_pretrained(folder / "image_encoder")
    diffusers.DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    return folder, save_mv_adapter(folder / "mvadapter_i2mv_sd21.safetensors", unet)


def load(stock, **options):
    folder, file = stock
    return gafext.MultiViewDiffusionPipeline.from_pretrained(folder, device="cpu", mv_adapter=file, **options)


@pytest.fixture
def pipe(stock):
    return load(stock)


@pytest.fixture
def plain(stock):
    return Plain(diffusers.UNet2DConditionModel.from_pretrained(stock[0] / "unet"), stock[1])


@pytest.mark.parametrize("portraits,views", [(1, 6), (2, 3)])
@torch.no_grad()
def test_the_network_is_the_plain_one(pipe, plain, portraits, views):
    sample, reference = normal(portraits * views, 4, SIZE, SIZE), normal(portraits, 4, SIZE, SIZE, seed=1)
    rays, text = normal(views, 6, 8 * SIZE, 8 * SIZE, seed=2).sigmoid(), normal(1, 7, 32, seed=3)
    given = {"num_views": views, "reference_latents": reference, "rays": rays}
    expected = plain(sample, 481, text, rays=rays, reference=reference)
    assert expected.std() > 0.1
    assert max_abs_diff(pipe.unet(sample, 481, text, **given), expected) < 2e-5
    assert max_abs_diff(pipe.unet(sample, 481, text, num_views=views), expected) > 0.1


@torch.no_grad()
def test_a_parent_of_several_layers_with_convolutions_around_its_transformers(tmp_path):
    """As Stable Diffusion 1's."""
    parent = stock_unet(
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=2,
        use_linear_projection=False,
    )
    file = save_mv_adapter(tmp_path / "mv.safetensors", parent)
    parent.save_pretrained(tmp_path / "unet")
    ours = with_mv_adapter(MultiViewUNet.from_pretrained(tmp_path / "unet"), file)
    sample, reference, text = normal(4, 4, SIZE, SIZE), normal(2, 4, SIZE, SIZE, seed=1), normal(1, 7, 40, seed=3)
    rays = normal(2, 6, 8 * SIZE, 8 * SIZE, seed=2).sigmoid()
    expected = Plain(parent, file)(sample, 3, text, rays=rays, reference=reference)
    assert max_abs_diff(ours(sample, 3, text, num_views=2, reference_latents=reference, rays=rays), expected) < 2e-5


@torch.no_grad()
def test_both_passes_in_one_batch(pipe, plain):
    sample, reference, rays = normal(3, 4, SIZE, SIZE), normal(1, 4, SIZE, SIZE, seed=1), normal(3, 6, 1, 1, seed=2)
    text = normal(1, 7, 32, seed=3)
    given = {"encoder_hidden_states": text, "reference_latents": reference, "rays": rays}
    result = pipe.unet(sample.repeat(2, 1, 1, 1), 20, conditioning=pipe.unet.precompute(**given), num_views=3)
    maps = rays.expand(-1, -1, 8 * SIZE, 8 * SIZE)
    both = {"rays": maps, "reference": reference.repeat(2, 1, 1, 1), "dropped": [0]}
    assert max_abs_diff(result, plain(sample.repeat(2, 1, 1, 1), 20, text, **both)) < 2e-5
    assert max_abs_diff(*result.chunk(2)) > 0.1


@torch.no_grad()
def test_without_rays_and_reference_it_is_the_parent(pipe, stock):
    sample, text = normal(2, 4, SIZE, SIZE), normal(2, 7, 32)
    parent = diffusers.UNet2DConditionModel.from_pretrained(stock[0] / "unet")
    assert max_abs_diff(pipe.unet(sample, 481, text, num_views=2), parent(sample, 481, text).sample) < 2e-5


def test_backends_agree(pipe):
    given = {"reference_latents": normal(1, 4, SIZE, SIZE, seed=1), "rays": normal(3, 6, 1, 1, seed=2)}
    sample = normal(3, 4, SIZE, SIZE)
    assert_backends_agree(pipe.unet, lambda: pipe.unet(sample, 7, num_views=3, **given), tolerance=2e-5)


def test_every_added_weight_gets_a_gradient(pipe):
    unet = pipe.unet.train()
    given = {"reference_latents": normal(1, 4, SIZE, SIZE, seed=1), "rays": normal(3, 6, 1, 1, seed=2)}
    unet(normal(3, 4, SIZE, SIZE), 301, normal(1, 7, 32), num_views=3, **given).square().sum().backward()
    added = [(name, p) for name, p in unet.named_parameters() if ".adapter." in name or "ray_encoder" in name]
    assert added and not [name for name, p in added if p.grad is None or not p.grad.abs().sum() > 0]


@torch.no_grad()
def test_the_loop_with_shifted_noise_and_guidance(pipe, plain, stock):
    folder, picture, latents = stock[0], portrait(size=(16, 16)), normal(6, 4, SIZE, SIZE)
    ours = run(pipe, picture, latents=latents, num_inference_steps=5, output_type="latent").images

    alphas = torch.from_numpy(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    snr = alphas / (1 - alphas) * 8.0 ** -(torch.arange(1000) / 999)
    shifted = snr / (1 + snr)
    betas = 1 - shifted / torch.cat([torch.ones(1), shifted[:-1]])
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, trained_betas=betas.tolist())
    scheduler.set_timesteps(5)
    prompts = ["watermark, ugly, deformed, noisy, blurry, low contrast", "high quality"]
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")(prompts, **options).input_ids
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")(ids).last_hidden_state
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    image = torch.from_numpy(np.array(picture))[None].permute(0, 3, 1, 2) / 127.5 - 1
    reference = (vae.encode(image).latent_dist.mean * 0.18215).repeat(2, 1, 1, 1)
    rays = FAMILY.rays(pipe.unet.config, FAMILY.default_cameras()).expand(-1, -1, 8 * SIZE, 8 * SIZE)
    expected = latents
    for t in scheduler.timesteps:
        both = expected.repeat(2, 1, 1, 1)
        negative, positive = plain(both, t, text, rays=rays, reference=reference, dropped=[0]).chunk(2)
        expected = scheduler.step(negative + 3.0 * (positive - negative), t, expected).prev_sample
    assert expected.std() > 0.1
    assert max_abs_diff(*text) > 0.1
    assert max_abs_diff(ours, expected) < 1e-4


def test_rays_of_known_cameras():
    """Direction and position with z up, the face towards -y, the subject's left at +x; mapped to [0,1]."""
    half = 0.5**0.5
    positions = [[0, -1, 0], [half, -half, 0], [1, 0, 0], [0, 1, 0], [-1, 0, 0], [-half, -half, 0]]
    positions = torch.tensor(positions)
    expected = (torch.cat([-positions, positions], dim=1) + 1) / 2
    assert max_abs_diff(FAMILY.rays(None, FAMILY.default_cameras())[:, :, 0, 0], expected) < 1e-6
    above = FAMILY.rays(None, gafext.cameras.orbit(1, 30, radius=9))[0, :, 0, 0] * 2 - 1
    assert max_abs_diff(above, torch.tensor([0, 0.75**0.5, -0.5, 0, -(0.75**0.5), 0.5])) < 1e-6
    with pytest.raises(CameraError, match="none at the origin"):
        FAMILY.rays(None, gafext.cameras.Cameras(torch.eye(4)[None], 30))


def test_six_views_of_the_latents_size_unless_others_are_asked_for(pipe):
    assert pipe.guidance_scale == 3.0
    out = run(pipe)
    assert out.images.shape == (6, 3, 2 * SIZE, 2 * SIZE)  # decoded as they are: the VAE doubles
    assert max_abs_diff(out.cameras.w2c, FAMILY.default_cameras().w2c) == 0
    four = run(pipe, num_views=4)
    assert max_abs_diff(four.cameras.w2c, gafext.cameras.orbit(4).w2c) == 0
    assert run(pipe, upsample="bilinear").images.shape == (6, 3, 4 * SIZE, 4 * SIZE)


def test_each_of_two_portraits_is_seen_and_alone(pipe):
    both = run(pipe, [portrait(0), portrait(1)], num_views=2)
    assert max_abs_diff(both[0].images, run(pipe, portrait(0), num_views=2).images) < 1e-4
    latents = normal(2, 4, SIZE, SIZE)
    other = run(pipe, portrait(1), num_views=2, latents=latents).images
    assert max_abs_diff(run(pipe, portrait(0), num_views=2, latents=latents).images, other) > 1e-3


def test_a_portrait_that_is_encoded_beside_the_loop_has_features_of_its_own(pipe):
    portraits = [portrait(index) for index in range(4)]
    options = {"num_views": 2, "num_inference_steps": 4, "generator": 7, "output_type": "pt"}
    alone = [run(pipe, picture, **options).images for picture in portraits]
    for result, images in zip(stream(pipe, portraits, hooks=Hooks(overlap=True), **options), alone, strict=True):
        assert result.error is None and max_abs_diff(result.output.images, images) < 1e-5


def test_saved_and_loaded_again_it_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    assert_equal_weights(again.unet, pipe.unet)
    assert max_abs_diff(run(again).images, run(pipe).images) < 1e-5  # the alignment of memory-mapped weights rounds
    stock = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert max_abs_diff(stock.alphas_cumprod, again.scheduler.alphas_cumprod) == 0


@torch.no_grad()
def test_without_transformers_the_empty_prompt_takes_the_place_of_the_prompts(stock, monkeypatch):
    text = CLIPTextModel.from_pretrained(stock[0] / "text_encoder")(torch.tensor([[8] + [9] * 11])).last_hidden_state
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.warns(UserWarning, match="needs transformers .* the empty prompt takes the place of 'high quality'"):
        pipe = load(stock)
    assert max_abs_diff(pipe.prompt_embeds, text) < 1e-5
    assert run(pipe).images.shape[0] == 6


def test_without_guidance_only_the_conditional_prompt_counts(pipe):
    images = run(pipe, guidance_scale=1.0).images
    pipe.prompt_embeds = pipe.prompt_embeds[1:]
    assert max_abs_diff(run(pipe, guidance_scale=1.0).images, images) < 1e-5


def test_the_conditional_pass_alone(pipe):
    assert_conditional_pass_alone(pipe)


def test_beside_an_ip_adapter_and_another_solver(stock, pipe, tmp_path):
    file = save_ip_adapter(tmp_path / "ip.safetensors", context=32)
    both = load(stock, ip_adapter=file)
    assert max_abs_diff(run(both).images, run(pipe).images) > 1e-3
    off = load(stock, ip_adapter=file, ip_adapter_scale=0.0)
    assert max_abs_diff(run(off).images, run(pipe).images) < 1e-5
    euler = load(stock, scheduler="euler")
    assert max_abs_diff(euler.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod) == 0


def test_the_command_line(stock, tmp_path):
    folder, file = stock
    portrait().save(tmp_path / "head.png")
    command = ["generate", tmp_path / "head.png", "--model", folder, "--mv-adapter", file, "--steps", 2]
    command += ["--device", "cpu", "--out", tmp_path / "views", "--quiet"]
    assert main(list(map(str, command))) == 0
    assert len(list((tmp_path / "views").glob("view_*.png"))) == 6
    settings = json.loads((tmp_path / "views/run.json").read_text())
    assert settings["mv_adapter"] == str(file) and settings["upsample"] == "none"
    assert settings["guidance_scale"] == 3.0 and settings["num_views"] == 6
    assert main([*map(str, command), "--overwrite", "--views", "2"]) == 0
    assert len(list((tmp_path / "views").glob("view_*.png"))) == 2


@pytest.mark.parametrize(
    "change,match",
    [
        ({"rays": None}, "reference_latents, rays: expected both or none"),
        ({"reference_latents": None}, "reference_latents, rays: expected both or none"),
        ({"rays": torch.zeros(3, 5, 1, 1)}, r"rays: expected \[V,6,1,1\] or \[V,6,64,64\], got \[3, 5, 1, 1\]"),
        ({"rays": torch.zeros(3, 6, 8, 8)}, r"rays: expected .* got \[3, 6, 8, 8\]"),
        ({"rays": torch.zeros(2, 6, 1, 1)}, r"rays, reference_latents: expected \[V,h,w\] \[3, 8, 8\]"),
        ({"reference_latents": torch.zeros(1, 4, 4, 4)}, r"rays, reference_latents: .* got \[3, 4, 4\]"),
        ({"reference_latents": torch.zeros(1, 8, 8, 8)}, r"reference_latents: expected \[B,4,h,w\]"),
        ({"reference_latents": torch.zeros(2, 4, 8, 8)}, "reference_latents: expected at most 1 portraits, got 2"),
    ],
)
@torch.no_grad()
def test_wrong_inputs_are_named(pipe, change, match):
    given = {"reference_latents": torch.zeros(1, 4, 8, 8), "rays": torch.zeros(3, 6, 1, 1)}
    with pytest.raises(ValueError, match=match):
        pipe.unet(torch.zeros(3, 4, 8, 8), 7, num_views=3, **{**given, **change})


@torch.no_grad()
def test_only_squares_have_rows(pipe):
    given = {"reference_latents": torch.zeros(1, 4, 8, 6), "rays": torch.zeros(1, 6, 1, 1)}
    with pytest.raises(ValueError, match="sample: expected a square"):
        pipe.unet(torch.zeros(1, 4, 8, 6), 7, **given)
