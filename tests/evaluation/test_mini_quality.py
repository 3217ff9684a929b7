"""The built-in model makes the right heads: held-out ones, small pictures, and what each condition is worth."""

import inspect
import warnings

import diffusers
import pytest
import torch
from helpers import ablated_pipeline, max_abs_diff

import gafext
from gafext.assets import MODEL
from gafext.evaluation import Evaluation
from gafext.evaluation.measures import psnr

HEADS = 4


@pytest.fixture(scope="module")
def evaluation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = gafext.MultiViewDiffusionPipeline.from_pretrained(device="cpu")
    return Evaluation(pipe, HEADS, num_inference_steps=15, upsample="none")


@pytest.fixture(scope="module")
def lines(evaluation):
    return {line.name: line for line in evaluation.baselines() + evaluation.main()}


def test_the_weights_are_small():
    files = list(MODEL.rglob("*.safetensors"))
    assert len(files) == 7 and sum(file.stat().st_size for file in files) < 15e6


def test_the_codec_keeps_colours_and_normals(lines, evaluation):
    assert lines["codec round trip"].psnr > 32
    subject = evaluation.subjects[0]
    images, normals = subject.views.rgb, subject.views.normals
    with torch.no_grad():
        made, mapped = (evaluation.pipe.decode(evaluation.pipe.encode(x)) for x in (images, normals))
    shirts = (slice(None), slice(None), slice(-6, None), slice(24, 40))
    assert (made - images)[shirts].mean(dim=(0, 2, 3)).abs().max() < 0.03
    assert psnr(mapped, normals).mean() > 32


def test_generated_views_are_the_portraits_head(lines):
    generated, copy = lines["generated"], lines["copy of the portrait"]
    assert generated.psnr > copy.psnr + 10 and generated.ssim > copy.ssim + 0.2
    assert generated.sharpness > 0.4 and generated.face > copy.face + 5
    assert generated.psnr > lines["mean picture"].psnr + 7


def test_without_normal_maps_given_a_head_is_fitted(lines, evaluation):
    fitted = lines["generated, no normal maps given"]
    assert fitted.psnr > 25.5
    [neutral] = evaluation.ablations(["neutral normals"])
    assert neutral.psnr < fitted.psnr - 4
    assert fitted.psnr > (neutral.psnr + lines["generated"].psnr) / 2  # more than half of the way to the true ones


def test_every_condition_counts(lines, evaluation):
    named = {line.name: line for line in evaluation.ablations(["no image tokens", "zero normals", "wrong cameras"])}
    generated = lines["generated"].psnr
    assert named["no image tokens"].psnr < generated - 6
    assert named["zero normals"].psnr < generated - 10
    assert named["wrong cameras"].psnr < generated - 2


def test_views_hear_of_each_other_through_attn_cv(lines, evaluation):
    apart = evaluation.ablations(["attn_cv off"])[0]
    assert apart.consistency < lines["generated"].consistency - 0.5
    assert apart.psnr < lines["generated"].psnr - 1


def test_stock_diffusers_loads_the_autoencoder(evaluation):
    stock = diffusers.AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
    picture = evaluation.subjects[0].views.rgb[:1] * 2 - 1
    with torch.no_grad():
        latents = stock.encode(picture).latent_dist.mode()
        assert max_abs_diff(latents, evaluation.pipe.vae.encode(picture)[0]) < 1e-3
        assert max_abs_diff(stock.decode(latents).sample, evaluation.pipe.vae.decode(latents)) < 1e-3
    assert stock.config.scaling_factor == evaluation.pipe.vae.config.scaling_factor


def test_stock_diffusers_loads_the_trunk_of_the_unet(evaluation):
    ours = ablated_pipeline(evaluation, "attn_cv off").unet
    added = ("attn_cv.", "norm_cv.", "attn_ip.", "norm_ip.", "image_projection.", "add_embedding.")
    trunk = {key: value for key, value in ours.state_dict().items() if not any(part in key for part in added)}
    fields = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    config = {key: value for key, value in ours.config.to_dict().items() if key in fields}
    assert config.pop("addition_embed_type") == "image"  # of which diffusers would project the context too
    stock = diffusers.UNet2DConditionModel(**config).eval()
    stock.load_state_dict(trunk)
    sample, pose = (
        torch.randn(2, config["in_channels"], config["sample_size"], config["sample_size"]),
        torch.randn(2, 12),
    )
    text = torch.zeros(2, 1, config["cross_attention_dim"])
    with torch.no_grad():
        expected = stock(sample, 500, text, class_labels=pose).sample
        assert max_abs_diff(ours(sample, 500, pose=pose), expected) < 1e-3
