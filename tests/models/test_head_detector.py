"""The detector of heads: its files, its squares, and what the built-in one finds of held-out drawn heads."""

import pytest
import torch
from helpers import max_abs_diff, normal

from gafext import heads
from gafext.assets import MODEL
from gafext.cameras import orbit
from gafext.errors import CheckpointError
from gafext.models.head_detector import HeadBox, HeadDetector, HeadDetectorConfig, crop


@pytest.fixture(scope="module")
def detector():
    return HeadDetector.from_pretrained(MODEL / "head_detector")


@pytest.fixture(scope="module")
def portraits():
    """Portraits [8,3,96,96] of held-out heads, and their alpha."""
    drawn = heads.render(heads.make_heads(heads.TEST_IDENTITIES[200:208]), orbit(1, azimuth_start=10).w2c, 96)
    return drawn.rgb[:, 0], drawn.alpha[:, 0]


def photograph(portrait, alpha, *, x, y, height=192, width=288):
    """Paste a portrait of 96 pixels into a striped picture, with its top left corner at (x, y)."""
    picture = (torch.linspace(0, 25, width).sin() * 0.2 + 0.5).expand(3, height, width).clone()
    where = picture[:, y : y + 96, x : x + 96]
    where.copy_(portrait - (1 - alpha) + (1 - alpha) * where)
    return picture


def test_round_trip(tmp_path):
    made = HeadDetector(HeadDetectorConfig(image_size=64, block_out_channels=(8, 16, 16), dilations=(1, 2))).eval()
    made.save_pretrained(tmp_path)
    again = HeadDetector.from_pretrained(tmp_path)
    assert again.config == made.config
    with torch.no_grad():
        for got, wanted in zip(again(normal(2, 3, 64, 64)), made(normal(2, 3, 64, 64)), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "changes", [{"image_size": 90}, {"image_size": 0}, {"block_out_channels": [16, 32]}, {"dilations": [0]}]
)
def test_configuration_is_checked(changes):
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        HeadDetectorConfig.from_dict(changes, source="config.json")


def test_crop_goes_beyond_the_border():
    picture = torch.rand(3, 10, 20)
    assert torch.equal(crop(picture, HeadBox(5, 5, 4)), picture[:, 3:7, 3:7])
    cut = crop(picture, HeadBox(0, 5, 4))
    assert torch.equal(cut[..., 2:], picture[:, 3:7, :2]) and (cut[..., :2] == 0.5).all()


@pytest.mark.parametrize(("x", "y"), [(0, 0), (90, 40), (192, 96), (20, 90)])
def test_finds_heads_anywhere(detector, portraits, x, y):
    found = [detector.find(photograph(*head, x=x, y=y)) for head in zip(*portraits, strict=True)]
    good = [
        box is not None and abs(box.x - x - 48) < 12 and abs(box.y - y - 48) < 12 and 72 < box.side < 128
        for box in found
    ]
    assert sum(good) >= 7, found


def test_finds_none_where_there_is_none(detector):
    stripes = (torch.linspace(0, 25, 200).sin() * 0.2 + 0.5).expand(3, 150, 200)
    assert detector.find(stripes) is None
    assert detector.find(torch.ones(3, 64, 64)) is None
    assert detector.find(torch.zeros(3, 1, 1)) is None


def test_half_precision_agrees(detector, portraits):
    picture = photograph(portraits[0][0], portraits[1][0], x=90, y=40)
    half = HeadDetector.from_pretrained(MODEL / "head_detector", dtype=torch.bfloat16)
    assert max_abs_diff(torch.tensor(half.find(picture)), torch.tensor(detector.find(picture))) < 4
