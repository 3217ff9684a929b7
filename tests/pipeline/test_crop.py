"""Photographs are cropped to the head by a pipeline with a detector, and portraits as of training are left alone."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import gafext
from gafext import heads
from gafext.cameras import orbit
from gafext.evaluation import portrait_camera

SHORT = {"num_inference_steps": 1, "generator": 0, "upsample": "none", "output_type": "latent", "num_views": 1}


@pytest.fixture(scope="module")
def pipe():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = gafext.MultiViewDiffusionPipeline.from_pretrained(device="cpu")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def photograph():
    """A head in a frame of 120 pixels around (100, 90), in a plain grey picture of 400 x 240."""
    drawn = heads.render(heads.make_heads([1_000_200]), orbit(1).w2c, 120)
    rgb, alpha = drawn.rgb[0, 0], drawn.alpha[0, 0]
    picture = torch.full((3, 240, 400), 0.6)
    where = picture[:, 30:150, 40:160]
    where.copy_(rgb - (1 - alpha) + (1 - alpha) * where)
    return Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy())


def test_a_photograph_is_cropped(pipe, photograph):
    with pytest.warns(UserWarning, match=r"image: cropped to the head, a square of \d+ pixels around \(\d+, \d+\)"):
        run = pipe.prepare(photograph, **SHORT)
    side = run.portraits[0].width
    assert run.portraits[0].height == side and 90 <= side <= 160
    crop = np.asarray(photograph.crop((100 - side // 2, 90 - side // 2, 100 + side // 2, 90 + side // 2)), dtype=float)
    got = np.asarray(run.portraits[0].resize(crop.shape[1::-1]), dtype=float)
    assert np.abs(crop - got).mean() < 40  # of the head and not of the wall: 60 and more elsewhere
    cropped, uncropped = pipe(photograph, **SHORT), pipe(photograph, crop=False, **SHORT)
    assert uncropped.portrait.size == (400, 240)
    assert not torch.equal(cropped.images, uncropped.images)


def test_the_size_of_a_photograph_does_not_matter(pipe, photograph):
    """Of 14 and of 0.1 megapixels the same part is cut, and the detector sees no more than 512 pixels across."""
    seen, find = [], pipe.head_detector.find
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="cropped to the head"):
        patch.setattr(pipe.head_detector, "find", lambda picture: (seen.append(picture.shape), find(picture))[1])
        small = pipe.prepare(photograph, **SHORT).portraits[0]
        large = pipe.prepare(photograph.resize((4800, 2880)), **SHORT).portraits[0]
    assert abs(large.width / 12 - small.width) < 4 and max(seen[1]) <= 512
    left, right = (np.asarray(picture.resize((64, 64)), dtype=float) for picture in (small, large))
    assert np.abs(left - right).mean() < 8


def test_portraits_as_of_training_are_left_alone(pipe):
    drawn = [
        heads.render(heads.make_heads([identity]), portrait_camera(identity).w2c, 128).rgb[0, 0]
        for identity in heads.TEST_IDENTITIES[300:320]
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = pipe.prepare(drawn, **SHORT)
        alone = pipe.prepare(gafext.PORTRAIT, **SHORT)
    assert {portrait.size for portrait in run.portraits} == {(128, 128)}
    assert alone.portraits[0].size == Image.open(gafext.PORTRAIT).size


def test_without_a_head_the_centre_square_is_taken(pipe):
    with pytest.warns(UserWarning, match="image: no head is found, and the centre square is taken"):
        run = pipe.prepare(Image.new("RGB", (300, 200), "lightblue"), **SHORT)
    assert run.portraits[0].size == (300, 200)


def test_the_detector_is_saved_and_optional(pipe, photograph, tmp_path):
    pipe.save_pretrained(tmp_path / "with")
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "with", device="cpu")
    picture = torch.from_numpy(np.array(photograph)).permute(2, 0, 1) / 255
    assert again.head_detector.find(picture) == pipe.head_detector.find(picture)
    without = gafext.MultiViewDiffusionPipeline(**{**pipe.components, "head_detector": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert without.prepare(photograph, **SHORT).portraits[0].size == (400, 240)
