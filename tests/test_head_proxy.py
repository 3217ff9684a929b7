import math

import pytest
import torch

from gafext.cameras import Cameras, orbit
from gafext.head_proxy import SEMI_AXES, ellipsoid_normals

FRONT, UPWARDS, LEFTWARDS = (0.5, 0.5, 1.0), (0.5, 1.0, 0.5), (0.0, 0.5, 0.5)


def background(image):
    return (image == 0.5).all(dim=0)


def test_shape_range_and_background():
    maps = ellipsoid_normals(orbit(3), 32)
    assert maps.shape == (3, 3, 32, 32) and maps.dtype == torch.float32
    assert maps.min() >= 0 and maps.max() <= 1
    assert background(maps[0])[0, 0] and not background(maps[0])[16, 16]


def test_normals_point_where_the_picture_says():
    front = ellipsoid_normals(orbit(4), 129)[0]
    assert front[:, 64, 64].tolist() == pytest.approx(FRONT, abs=1e-6)
    columns = (~background(front)[64]).nonzero().flatten()
    rows = (~background(front)[:, 64]).nonzero().flatten()
    # The outermost pixel centres lie just inside the silhouette, where the normal is nearly sideways.
    assert front[:, 64, columns[0]].tolist() == pytest.approx(LEFTWARDS, abs=0.25) and front[0, 64, columns[0]] < 0.1
    assert front[0, 64, columns[-1]] > 0.9
    assert front[:, rows[0], 64].tolist() == pytest.approx(UPWARDS, abs=0.25) and front[1, rows[0], 64] > 0.9
    assert front[1, rows[-1], 64] < 0.1


@pytest.mark.parametrize(("view", "half_width", "depth"), [(0, 0, 2), (1, 2, 0)])
def test_silhouette_is_the_analytic_one(view, half_width, depth):
    size, radius = 512, 4.0
    cameras = orbit(4, radius=radius)
    seen = ~background(ellipsoid_normals(cameras, size)[view])
    # From a distance d the tangent to an ellipse of half-width a, half-depth c has slope a / sqrt(d^2 - c^2).
    distance = math.sqrt(radius**2 - SEMI_AXES[depth] ** 2)
    for axis, count in ((half_width, seen[size // 2].sum()), (1, seen[:, size // 2].sum())):
        assert count.item() == pytest.approx(2 * cameras.focal(size) * SEMI_AXES[axis] / distance, abs=1.5)
    assert 0.8 < seen.any(dim=1).float().mean() < 0.9


def test_normals_agree_with_the_numeric_gradient_of_the_depth():
    size, radius = 256, 4.0
    cameras = orbit(1, elevation=35, radius=radius, azimuth_start=50)
    encoded = ellipsoid_normals(cameras, size)[0].double()
    # Depth without the code under test: bisect each ray between the camera and the plane through the origin.
    focal, c2w = cameras.focal(size), cameras.c2w[0].double()
    pixels = (torch.arange(size, dtype=torch.float64) + 0.5 - size / 2) / focal
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    near, far = torch.zeros_like(x), torch.full_like(x, radius)
    for _ in range(60):
        middle = (near + far) / 2
        world = c2w[:3, 3] + middle[..., None] * (rays @ c2w[:3, :3].T)
        outside = (world / torch.tensor(SEMI_AXES, dtype=torch.float64)).square().sum(-1) > 1
        near, far = torch.where(outside, middle, near), torch.where(outside, far, middle)
    points = rays * near[..., None]
    across = points[1:-1, 2:] - points[1:-1, :-2]
    along = points[2:, 1:-1] - points[:-2, 1:-1]
    towards_camera = torch.nn.functional.normalize(torch.linalg.cross(along, across), dim=-1)  # OpenCV axes
    numeric = towards_camera * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    inner = (slice(size // 2 - 45, size // 2 + 45),) * 2
    analytic = (encoded.permute(1, 2, 0) * 2 - 1)[1:-1, 1:-1]
    assert not background(encoded)[inner].any()
    assert torch.allclose(analytic[inner], numeric[inner], atol=2e-3)


def test_views_differ_and_mirror():
    maps = ellipsoid_normals(orbit(4), 64)
    assert not torch.allclose(maps[0], maps[1], atol=1e-2)
    assert torch.allclose(maps[0], maps[2], atol=1e-5)  # front and back of an ellipsoid look alike
    assert torch.allclose(maps[0, 0], 1 - maps[0, 0].flip(-1), atol=1e-5)


@pytest.mark.parametrize("eye", [(0.0, 0.0, 0.0), (0.0, 0.0, -4.0)])
def test_a_camera_inside_or_turned_away_sees_background(eye):
    w2c = orbit(1).w2c.clone()
    w2c[0, :3, 3] = -w2c[0, :3, :3] @ torch.tensor(eye)
    assert background(ellipsoid_normals(Cameras(w2c, 30), 16)[0]).all()


def test_size_is_checked():
    with pytest.raises(ValueError, match="size: expected >= 1, got 0"):
        ellipsoid_normals(orbit(1), 0)
