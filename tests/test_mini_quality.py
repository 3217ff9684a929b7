"""The built-in model makes the right heads: held-out ones, small pictures, and what each condition is worth."""

import warnings

import pytest
import torch

import gafext
from gafext.embedded import MODEL
from gafext.evaluate import Evaluation

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
    assert len(files) == 5 and sum(file.stat().st_size for file in files) < 15e6


def test_the_codec_keeps_colours(lines, evaluation):
    assert lines["codec round trip"].psnr > 28
    subject = evaluation.subjects[0]
    with torch.no_grad():
        made = evaluation.pipe.decode(evaluation.pipe.encode(subject.views.rgb * 2 - 1)) / 2 + 0.5
    shirts = (slice(None), slice(None), slice(-6, None), slice(24, 40))
    assert (made - subject.views.rgb)[shirts].mean(dim=(0, 2, 3)).abs().max() < 0.03


def test_generated_views_are_the_portraits_head(lines):
    generated, copy = lines["generated"], lines["copy of the portrait"]
    assert generated.psnr > copy.psnr + 2
    assert generated.ssim > copy.ssim
    assert generated.psnr > lines["mean picture"].psnr + 2


def test_every_condition_counts(lines, evaluation):
    named = {line.name: line for line in evaluation.ablations(["no image tokens", "zero normals", "wrong cameras"])}
    generated = lines["generated"].psnr
    assert named["no image tokens"].psnr < generated - 1.5
    assert named["zero normals"].psnr < generated - 1.5
    assert named["wrong cameras"].psnr < generated - 1
