import pytest
import torch

from gafext.cameras import arc, on_sphere, orbit
from gafext.output.turn import angles, turn


def around(*azimuth, elevation=0.0):
    elevation = torch.tensor(elevation, dtype=torch.float64).expand(len(azimuth))
    return on_sphere(torch.tensor(azimuth, dtype=torch.float64), elevation, 4, 30)


def test_angles_are_those_of_the_presets():
    azimuth, elevation = [0.0, 90.0, 135.0, -60.0, 180.0], [10.0, -20.0, 0.0, 80.0, 5.0]
    cameras = on_sphere(torch.tensor(azimuth), torch.tensor(elevation), 3, 30)
    expected = list(zip(azimuth, elevation, strict=True))
    assert [tuple(map(round, pair)) for pair in angles(cameras)] == expected


@pytest.mark.parametrize(
    ("cameras", "order", "closed"),
    [
        (orbit(1), [0], True),
        (orbit(4), [0, 1, 2, 3], True),
        (orbit(2), [0, 1], True),
        (orbit(6, azimuth_start=-47), [0, 1, 2, 3, 4, 5], True),
        (around(90, 0, 270, 180), [0, 3, 2, 1], True),  # begins with view 0
        (around(0, 45, 90, 180, 270, 315), [0, 1, 2, 3, 4, 5], True),  # FaceLift's
        (arc(2, 120), [0, 1], False),
        (arc(5), [0, 1, 2, 3, 4], False),
        (around(0, 30, -30), [2, 0, 1], False),
        (around(170, -170, 180), [0, 2, 1], False),  # behind the head
        (around(0, 90, 180, 270, 0, 90, 180, 270, elevation=[0.0] * 4 + [-9.0] * 4), [0, 5, 1, 6, 2, 7, 3, 4], True),
        (around(20, 20, 20), [0, 1, 2], True),
    ],
)
def test_views_are_sorted_around_the_head(cameras, order, closed):
    got = turn(cameras)
    assert (got.order, got.closed) == (order, closed)
