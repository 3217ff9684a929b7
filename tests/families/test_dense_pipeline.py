"""ImageDream's and MVDream's folders through the whole pipeline, against the loop written out in plain PyTorch."""

import diffusers
import numpy as np
import pytest
import torch
from helpers import max_abs_diff
from plain_imagedream import IMAGEDREAM, MVDREAM, Plain
from safetensors.torch import save_file
from small_checkpoints import assert_conditional_pass_alone, portrait, run, save_imagedream
from transformers import CLIPTextModel, CLIPVisionModel

import gafext
from gafext.errors import CheckpointError


@pytest.fixture(scope="module")
def imagedream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagedream")
    return folder, Plain(save_imagedream(folder, IMAGEDREAM))


@torch.no_grad()
def test_the_loop_is_imagedreams(imagedream):
    folder, plain = imagedream
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(folder, device="cpu")
    picture, latents = portrait(size=(16, 16)), torch.randn(4, 4, 8, 8)
    options = {"num_inference_steps": 5, "upsample": "none", "output_type": "latent"}
    ours = run(pipe, picture, latents=latents, **options).images

    pixels = pipe.image_encoder.preprocess(picture)
    clip = CLIPVisionModel.from_pretrained(folder / "image_encoder")(pixels, output_hidden_states=True).hidden_states[
        -2
    ]
    tokens = plain.tokens(torch.cat([torch.zeros_like(clip), clip]).double())
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    ids = torch.tensor([[49406] + [49407] * 76])
    text = text(ids).last_hidden_state.repeat(10, 1, 1)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    image = torch.from_numpy(np.array(picture))[None].permute(0, 3, 1, 2) / 127.5 - 1
    reference = vae.encode(image).latent_dist.mean * 0.18215
    reference = torch.cat([torch.zeros_like(reference), reference])
    # On the horizon at 0, 90, 180 and 270 degrees: camera-to-world, z up, at distance 1; zeros for the reference.
    at = [(0, -1), (1, 0), (0, 1), (-1, 0)]
    camera = torch.stack(
        [torch.tensor([[-y, 0, x, x], [x, 0, y, y], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float32) for x, y in at]
    ).flatten(1)
    camera = torch.cat([camera, torch.zeros(1, 16)]).repeat(2, 1)

    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(5)
    sample = torch.cat([latents, torch.randn(1, 4, 8, 8)])
    for t in scheduler.timesteps:
        both = sample.repeat(2, 1, 1, 1)
        output = plain(both, t.item(), text, camera, views=5, tokens=tokens, reference=reference).float()
        negative, positive = output.chunk(2)
        sample = scheduler.step(negative + 5.0 * (positive - negative), t, sample).prev_sample
    expected = sample[:4]
    assert expected.std() > 0.1
    assert max_abs_diff(ours, expected) < 1e-3 * max(1.0, expected.abs().max().item())


def test_portrait_in_views_out_and_saved_back(imagedream, tmp_path):
    folder, _ = imagedream
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(folder, device="cpu")
    assert pipe.guidance_scale == 5.0
    out = run(pipe)
    assert out.images.shape == (4, 3, 32, 32)
    assert max_abs_diff(run(pipe, portrait(5)).images, out.images) > 1e-3
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "text_encoder").exists()  # the empty prompt is there instead, encoded
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(run(again).images, out.images)


def test_two_portraits_at_once_are_each_alone(imagedream):
    folder, _ = imagedream
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(folder, device="cpu")
    both = run(pipe, [portrait(0), portrait(1)], num_views=2)
    assert max_abs_diff(both[0].images, run(pipe, portrait(0), num_views=2).images) < 1e-4


def test_the_conditional_pass_alone(imagedream):
    assert_conditional_pass_alone(gafext.MultiViewDiffusionPipeline.from_pretrained(imagedream[0], device="cpu"))


def test_mvdream_runs_and_says_that_it_does_not_look(tmp_path):
    save_imagedream(tmp_path, MVDREAM)
    with pytest.warns(UserWarning, match="does not look at the portrait"):
        pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    assert run(pipe).images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    "tensors", [{"prompt_embedz": (1, 3, 40)}, {"prompt_embeds": (1, 0, 40)}, {"prompt_embeds": (1, 3, 41)}]
)
def test_a_damaged_empty_prompt_is_named(tensors, imagedream, tmp_path):
    pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(imagedream[0], device="cpu")
    pipe.save_pretrained(tmp_path)
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "empty_prompt.safetensors")
    with pytest.raises(CheckpointError, match=r"empty_prompt\.safetensors"):
        gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path)
