"""The fitter of heads: its files, its decisions, and how well the built-in one fits held-out drawn heads."""

import pytest
import torch
from helpers import normal

from gafext import heads
from gafext.assets import MODEL
from gafext.cameras import orbit
from gafext.errors import CheckpointError
from gafext.evaluation import as_portrait, subjects
from gafext.evaluation.measures import psnr
from gafext.heads.identity import HAIRSTYLES, PARTS
from gafext.heads.shape import MEASURES, SHAPE, shaped_heads
from gafext.models.head_fitter import HeadFitter, HeadFitterConfig, HeadShape

HELD_OUT = 12


@pytest.fixture(scope="module")
def fitter():
    return HeadFitter.from_pretrained(MODEL / "head_fitter")


@pytest.fixture(scope="module")
def held_out():
    return subjects(HELD_OUT, 96, first=100)


def normals_of(head):
    return heads.head_normals(orbit(4), 96, head)


def test_round_trip(tmp_path):
    made = HeadFitter(HeadFitterConfig(image_size=32, block_out_channels=(8, 8, 16, 16), hidden_size=24)).eval()
    made.save_pretrained(tmp_path)
    again = HeadFitter.from_pretrained(tmp_path)
    assert again.config == made.config
    with torch.no_grad():
        found, wanted = again(normal(2, 3, 32, 32)), made(normal(2, 3, 32, 32))
    assert all(map(torch.equal, found, wanted))
    assert found.measures.shape == (2, len(MEASURES)) and found.hairstyle.shape == (2, len(HAIRSTYLES))
    assert found.beard.shape == (2,)


@pytest.mark.parametrize(
    "changes",
    [{"image_size": 90}, {"image_size": 0}, {"block_out_channels": [16, 32]}, {"hidden_size": 0}],
)
def test_configuration_is_checked(changes):
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        HeadFitterConfig.from_dict(changes, source="config.json")


def test_the_likeliest_shape_is_taken():
    measures = torch.linspace(-0.5, 1.5, len(MEASURES)).expand(2, -1)
    shape = HeadShape(measures, torch.tensor([[0.0, 1, 5, 2, 3], [2, 1, 0, 0, 0]]), torch.tensor([-0.1, 0.1]))
    numbers = shape.numbers()
    assert numbers.shape == (2, len(SHAPE)) and numbers.min() >= 0 and numbers.max() < 1
    assert numbers[0, SHAPE.index(MEASURES[0])] == 0
    middle = MEASURES[len(MEASURES) // 2]
    assert numbers[0, SHAPE.index(middle)] == pytest.approx(measures[0, len(MEASURES) // 2].item())
    active = shaped_heads(numbers).active
    mane, cap, beard = (active[:, PARTS.index(name)].tolist() for name in ("mane", "cap", "beard"))
    assert mane == [True, False] and cap == [True, False] and beard == [False, True]


def test_fits_held_out_heads_better_than_the_neutral_one(fitter, held_out):
    truth = torch.cat([subject.views.normals for subject in held_out])
    fitted = torch.cat([normals_of(fitter.fit(as_portrait(subject.portrait))) for subject in held_out])
    neutral = normals_of(None).repeat(HELD_OUT, 1, 1, 1)
    assert psnr(fitted, truth).mean() > psnr(neutral, truth).mean() + 4


def test_the_size_of_a_portrait_does_not_matter(fitter):
    large = as_portrait(subjects(1, 512, first=100)[0].portrait)
    small, whole = normals_of(fitter.fit(large.resize((128, 128)))), normals_of(fitter.fit(large))
    assert psnr(small, whole).min() > 25


def test_half_precision_agrees(fitter, held_out):
    half = HeadFitter.from_pretrained(MODEL / "head_fitter", dtype=torch.bfloat16)
    portrait = as_portrait(held_out[0].portrait)
    assert psnr(normals_of(half.fit(portrait)), normals_of(fitter.fit(portrait))).min() > 25
