"""FaceLift's folders, against diffusers' networks and the loop written out in plain PyTorch."""

import json
import math
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from helpers import BACKENDS, assert_equal_weights, edit_json, max_abs_diff
from PIL import Image
from plain_facelift import UPSTREAM, VIEWS, plain_unet, write, write_text
from safetensors.torch import load_file
from small_checkpoints import assert_conditional_pass_alone, portrait, run
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

import gafext
from gafext.cli import main
from gafext.conditions import LABEL_STEP
from gafext.errors import CheckpointError
from gafext.models.blocks import MultiViewTransformerBlock
from gafext.models.unet import MultiViewUNet
from gafext.noise import view_noise
from gafext.ops.backend import set_attention_backend


@pytest.fixture(scope="module")
def facelift(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facelift") / "mvdiffusion" / "pipeckpts"
    return folder, write(folder)


@pytest.fixture
def copied(facelift, tmp_path):
    return shutil.copytree(facelift[0], tmp_path / "copied")


def load(folder, **options):
    return gafext.MultiViewDiffusionPipeline.from_pretrained(folder, device="cpu", **options)


@torch.no_grad()
def plain_loop(folder, unet, picture, latents, *, seed, steps, guidance_scale=3.0, eta=1.0):
    """FaceLift's pipeline: latents [6,4,h,w] of the views of one picture."""
    pixels = load(folder).image_encoder.preprocess(picture)
    embeds = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")(pixels).image_embeds
    normalizer = StableUnCLIPImageNormalizer.from_pretrained(folder / "image_normalizer")
    noising = diffusers.DDPMScheduler.from_pretrained(folder / "image_noising_scheduler")
    noise = view_noise(seed, portraits=1, views=VIEWS, shape=(16,), step=LABEL_STEP)
    embeds = normalizer.scale(embeds.repeat(VIEWS, 1))
    embeds = normalizer.unscale(noising.add_noise(embeds, noise, torch.zeros(VIEWS, dtype=torch.long)))
    labels = torch.cat([embeds, torch.ones(VIEWS, 8), torch.zeros(VIEWS, 8)], dim=1)  # cos 0 and sin 0
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    image = torch.from_numpy(np.array(picture))[None].permute(0, 3, 1, 2) / 127.5 - 1
    image = (vae.encode(image).latent_dist.mode() * 0.18215).repeat(VIEWS, 1, 1, 1)
    text = load_file(folder / "prompt_embeds.safetensors")["prompt_embeds"].float()
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    sample = latents
    for step, t in enumerate(scheduler.timesteps):
        without = unet(torch.cat([sample, torch.zeros_like(image)], 1), t, text, torch.zeros_like(labels)).sample
        seen = unet(torch.cat([sample, image], 1), t, text, labels).sample
        output = without + guidance_scale * (seen - without)
        noise = view_noise(seed, portraits=1, views=VIEWS, shape=sample.shape[1:], step=step + 1)
        sample = scheduler.step(output, t, sample, eta=eta, variance_noise=noise).prev_sample
    return sample


@pytest.mark.parametrize("size", [8, 12])
@torch.no_grad()
def test_the_unet_is_facelifts(facelift, size):
    folder, plain = facelift
    ours = MultiViewUNet.from_pretrained(folder / "unet")
    rows = 2 * VIEWS
    sample, text, labels = torch.randn(rows, 8, size, size), torch.randn(rows, 7, 40), torch.randn(rows, 32)
    expected = plain(sample, 481, text, labels).sample
    assert expected.std() > 0.1
    for backend in BACKENDS:
        set_attention_backend(ours, backend)
        assert max_abs_diff(ours(sample, 481, text, pose=labels, num_views=VIEWS), expected) < 2e-5, backend


@torch.no_grad()
def test_views_attend_to_the_front_view_and_to_themselves():
    block = MultiViewTransformerBlock(32, 2, context_channels=8, cross_view="front", image_attention=None)
    x = torch.randn(6, 9, 32)

    def moved(view):
        changed = x.clone()
        changed[view, 4] = torch.randn(32)
        return (block(changed, num_views=3) - block(x, num_views=3)).abs().amax((1, 2)) > 0

    assert moved(0).tolist() == [True] * 3 + [False] * 3
    assert moved(1).tolist() == [False, True] + [False] * 4
    assert moved(5).tolist() == [False] * 5 + [True]


def test_the_loop_is_facelifts(facelift):
    folder, plain = facelift
    picture, latents = portrait(size=(16, 16)), torch.randn(VIEWS, 4, 8, 8)
    ours = run(load(folder), picture, latents=latents, generator=5, num_inference_steps=4, output_type="latent")
    expected = plain_loop(folder, plain, picture, latents, seed=5, steps=4)
    assert expected.std() > 0.1
    assert max_abs_diff(ours.images, expected) < 1e-4
    assert {name: ours.run[name] for name in ("guidance_scale", "eta", "num_views", "upsample")} == {
        **{"guidance_scale": 3.0, "eta": 1.0, "num_views": VIEWS, "upsample": "none"}
    }


def test_the_defaults_can_be_changed(facelift):
    folder, plain = facelift
    picture, latents = portrait(size=(16, 16)), torch.randn(VIEWS, 4, 8, 8)
    options = {"guidance_scale": 1.0, "eta": 0.0}
    ours = run(load(folder), picture, latents=latents, num_views=VIEWS, output_type="latent", **options).images
    assert max_abs_diff(ours, plain_loop(folder, plain, picture, latents, seed=0, steps=2, **options)) < 1e-4


def test_the_conditional_pass_alone(facelift):
    assert_conditional_pass_alone(load(facelift[0]))


def test_six_views_from_the_subjects_right_round_to_the_left(facelift):
    out = run(load(facelift[0]))
    assert out.images.shape == (VIEWS, 3, 16, 16)  # the U-Net's latents have the final size
    assert out.cameras.fov == 50
    half = 2.7 * math.sqrt(0.5)
    at = [(0, 2.7), (-half, half), (-2.7, 0), (0, -2.7), (2.7, 0), (half, half)]  # x: the subject's left, z: in front
    expected = torch.tensor([[x, 0.0, z] for x, z in at])
    assert max_abs_diff(out.cameras.c2w[:, :3, 3], expected) < 1e-6
    inwards = out.cameras.c2w[:, :3, 2]
    assert max_abs_diff(inwards, -expected / 2.7) < 1e-6


def test_every_portrait_is_on_its_own(facelift):
    pipe = load(facelift[0])
    both = run(pipe, [portrait(0), portrait(1)])
    alone = run(pipe, portrait(0)).images
    assert max_abs_diff(both[0].images, alone) < 1e-4
    assert max_abs_diff(both[1].images, alone) > 1e-2


def test_saved_and_loaded_again(facelift, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: this U-Net does not look at the portrait
        pipe = load(facelift[0])
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.unet.config == pipe.unet.config and again.unet.config.family == "facelift"
    assert_equal_weights(again.image_normalizer, pipe.image_normalizer)
    assert torch.equal(run(again).images, run(pipe).images)


@torch.no_grad()
def test_without_the_file_the_text_encoder_makes_the_texts(copied):
    (copied / "prompt_embeds.safetensors").unlink()
    write_text(copied)
    tokenizer = CLIPTokenizer.from_pretrained(copied / "tokenizer")
    views = ("front", "front_right", "right", "back", "left", "front_left")
    prompts = [f"a rendering image of 3D models, {view} view, color map." for view in views]
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    expected = CLIPTextModel.from_pretrained(copied / "text_encoder")(ids).last_hidden_state
    assert (expected[0] - expected[2]).abs().max() > 0.1
    assert max_abs_diff(load(copied).prompt_embeds, expected) < 1e-5


def test_without_any_texts_it_says_how_to_convert_them(copied):
    (copied / "prompt_embeds.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"prompt_embeds\.safetensors: no such file.*python -c.*clr_embeds\.pt"):
        load(copied)


@pytest.mark.parametrize("part", ["image_normalizer", "image_noising_scheduler", "image_encoder"])
def test_a_missing_part_is_named(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(CheckpointError, match=f"{part}: (no such folder; .*copy it|expected one, because)"):
        load(copied)


def test_parts_of_other_widths_are_named(copied):
    StableUnCLIPImageNormalizer(12).save_pretrained(copied / "image_normalizer")
    with pytest.raises(CheckpointError, match="image_encoder: expected projection_dim 12 as image_normalizer, got 16"):
        load(copied)


@pytest.mark.parametrize(
    "change",
    [
        {"num_views": 4},
        {"sparse_mv_attention": False},
        {"cd_attention_mid": True},
        {"selfattn_block": "self_rowwise"},
        {"mid_block_type": "UNetMidBlock2DCrossAttn"},
        {"down_block_types": ["CrossAttnDownBlockMV3D", "DownBlock2D"]},
        {"up_block_types": "UpBlock2D"},
    ],
)
def test_other_networks_of_this_class_are_refused(tmp_path, change):
    plain_unet(tmp_path)
    assert MultiViewUNet.from_pretrained(tmp_path).config.cross_view == "front"
    edit_json(tmp_path / "config.json", **{**UPSTREAM, **change})
    with pytest.raises(CheckpointError, match=f"config.json: {next(iter(change))}="):
        MultiViewUNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "given,words",
    [
        ({"num_views": 5}, "num_views=5: expected neither, because this checkpoint makes its 6 views alone"),
        ({"cameras": gafext.cameras.orbit(6)}, "other cameras: expected neither"),
        ({"normal_maps": [portrait()] * 6}, "normal_maps: expected None"),
    ],
)
def test_what_its_views_do_not_depend_on_is_refused(facelift, given, words):
    with pytest.raises(ValueError, match=words):
        run(load(facelift[0]), **given)


def test_its_own_cameras_may_be_named(facelift):
    own = run(load(facelift[0]), cameras=gafext.cameras.facelift())
    assert torch.equal(torch.as_tensor(own.images), torch.as_tensor(run(load(facelift[0])).images))


def test_on_the_command_line_in_a_subfolder(facelift, tmp_path, capsys):
    root, picture = facelift[0].parents[1], tmp_path / "portrait.png"
    portrait().save(picture)
    place = ["--model", str(root), "--subfolder", "mvdiffusion/pipeckpts", "--device", "cpu"]
    assert main(["generate", str(picture), *place, "--steps", "2", "--out", str(tmp_path / "views")]) == 0
    expected = run(load(root, subfolder="mvdiffusion/pipeckpts"), portrait(), output_type="pil")
    for view, image in enumerate(expected.images):
        assert np.array_equal(Image.open(tmp_path / f"views/view_{view:03d}.png"), image)
    transforms = json.loads((tmp_path / "views/transforms_train.json").read_text())
    assert len(transforms["frames"]) == VIEWS
    assert math.degrees(transforms["camera_angle_x"]) == pytest.approx(50)
    assert json.loads((tmp_path / "views/run.json").read_text())["subfolder"] == "mvdiffusion/pipeckpts"

    capsys.readouterr()
    assert main(["generate", str(picture), *place, "--elevation", "10", "--out", str(tmp_path / "other")]) == 1
    assert "other cameras: expected neither" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"mvdiffusion/pipe: no such folder"):
        load(root, subfolder="mvdiffusion/pipe")
