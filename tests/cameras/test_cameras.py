import math

import numpy as np
import pytest
import torch

from gafext.cameras import Cameras, as_cameras, orbit
from gafext.errors import CameraError


def pixel(cameras, view, point, size=100):
    """Where a world point lands in a view's image: (column, row, depth)."""
    camera = cameras[view][:3, :3] @ torch.tensor(point) + cameras[view][:3, 3]
    column, row, _ = cameras.intrinsics(size)[view] @ (camera / camera[2])
    return column.item(), row.item(), camera[2].item()


def test_front_view_sees_the_subjects_left_on_the_right_and_the_crown_on_top():
    cameras = orbit(4)
    left, top, nose = (
        pixel(cameras, 0, [0.5, 0, 0]),
        pixel(cameras, 0, [0, 0.5, 0]),
        pixel(cameras, 0, [0, 0, 0.5]),
    )
    assert left[0] > 60 and left[1] == pytest.approx(50, abs=1e-3)
    assert top[1] < 40 and top[0] == pytest.approx(50, abs=1e-3)
    assert nose == pytest.approx((50, 50, 3.5), abs=1e-3)


def test_azimuth_grows_towards_the_subjects_left():
    cameras = orbit(4)
    assert cameras.c2w[1, :3, 3].tolist() == pytest.approx([4, 0, 0], abs=1e-6)
    # From the subject's left the nose (+z) points to the image's left, and the left ear is nearest.
    assert pixel(cameras, 1, [0, 0, 0.5])[0] < 40
    assert pixel(cameras, 1, [0.5, 0, 0]) == pytest.approx((50, 50, 3.5), abs=1e-3)


def test_opengl_matrices_of_the_front_and_the_left_view():
    front, left = orbit(4).opengl_c2w[:2]
    assert torch.allclose(front, torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]), atol=1e-6)
    assert torch.allclose(left, torch.tensor([[0.0, 0, 1, 4], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]]), atol=1e-6)


def test_w2c_of_the_front_and_the_left_view():
    front, left = orbit(4).w2c[:2]
    assert torch.allclose(front, torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 4], [0, 0, 0, 1]]), atol=1e-6)
    assert torch.allclose(left, torch.tensor([[0.0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 4], [0, 0, 0, 1]]), atol=1e-6)


def test_opengl_round_trip():
    cameras = orbit(5, elevation=25, azimuth_start=10)
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    assert torch.allclose(torch.linalg.inv(cameras.opengl_c2w @ flip), cameras.w2c, atol=1e-6)
    assert torch.allclose(cameras.c2w @ cameras.w2c, torch.eye(4).expand(5, 4, 4), atol=1e-6)


def test_elevation_lifts_the_camera_and_keeps_it_upright_and_aimed():
    cameras = orbit(3, elevation=30, radius=2)
    assert torch.allclose(cameras.c2w[:, 1, 3], torch.full((3,), 1.0))
    assert torch.allclose(cameras.c2w[:, :3, 3].norm(dim=-1), torch.full((3,), 2.0))
    for view in range(3):
        assert pixel(cameras, view, [0.0, 0, 0]) == pytest.approx((50, 50, 2), abs=1e-3)
        column, row, _ = pixel(cameras, view, [0.0, 0.3, 0])
        assert column == pytest.approx(50, abs=1e-3) and row < 50


def test_azimuths_are_start_plus_i_span_over_n():
    eyes = orbit(3, azimuth_start=-45, azimuth_span=90).c2w[:, :3, 3]
    azimuths = torch.rad2deg(torch.atan2(eyes[:, 0], eyes[:, 2]))
    assert azimuths.tolist() == pytest.approx([-45, -15, 15], abs=1e-4)


def test_intrinsics_put_the_field_of_view_at_the_border():
    cameras = orbit(2, fov=60)
    focal = 256 / math.tan(math.radians(30))
    expected = [[focal, 0, 256], [0, focal, 256], [0, 0, 1]]
    assert cameras.intrinsics(512).shape == (2, 3, 3)
    assert torch.allclose(cameras.intrinsics(512)[1], torch.tensor(expected))
    assert cameras.camera_angle_x == pytest.approx(math.pi / 3)
    assert pixel(orbit(1, fov=90), 0, [4.0, 0, 0])[0] == pytest.approx(100, abs=1e-3)


def test_pose_is_the_w2c_matrix_row_after_row():
    matrix = [0.0, 0, -1, 0, 0, -1, 0, 0, -1, 0, 0, 4]  # row-major: the translation is every fourth number
    cameras = orbit(4)
    assert cameras.pose(12)[1].tolist() == pytest.approx(matrix, abs=1e-6)
    assert cameras.pose(16)[1].tolist() == pytest.approx([*matrix, 0, 0, 0, 1], abs=1e-6)
    with pytest.raises(CameraError, match=r"expected 12 .* or 16 .* got 7"):
        cameras.pose(7)


def test_indexing_and_length():
    cameras = orbit(6, fov=40)
    assert len(cameras) == 6 and torch.equal(cameras[2], cameras.w2c[2])
    part = cameras[1:3]
    assert isinstance(part, Cameras) and part.fov == 40 and torch.equal(part.w2c, cameras.w2c[1:3])
    assert len(list(cameras)) == 6


def test_as_cameras_takes_every_spelling():
    cameras = orbit(3, elevation=10)
    assert as_cameras(cameras, num_views=3) is cameras
    assert torch.equal(as_cameras(None, num_views=5).w2c, orbit(5).w2c)
    read_only = cameras.w2c.double().numpy()
    read_only.setflags(write=False)
    for given in (cameras.w2c, cameras.w2c.double(), read_only, cameras.w2c.tolist(), list(cameras.w2c)):
        assert torch.equal(as_cameras(given, num_views=4).w2c, cameras.w2c)
    assert torch.equal(as_cameras(cameras.w2c[:, :3], num_views=4).w2c, cameras.w2c)
    assert as_cameras(cameras.w2c, num_views=3, fov=50).fov == 50


def test_cameras_keep_a_copy():
    given = orbit(2).w2c.clone()
    cameras = as_cameras(given, num_views=2)
    given.zero_()
    assert torch.equal(cameras.w2c, orbit(2).w2c) and cameras.w2c.dtype == torch.float32


def _spoilt(change):
    matrices = orbit(4, elevation=20).w2c.clone()
    change(matrices[2])
    return matrices


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.mul_(1.1), "camera 2: expected the last row"),
        (
            lambda m: m[:3].mul_(1.1),
            r"camera 2: expected a rotation, R\^T R = I within 0.001, got .* off by 0.21",
        ),
        (lambda m: m[:3].mul_(1.002), r"camera 2: expected a rotation, .* off by 0\.004"),
        (lambda m: m[0].neg_(), "camera 2: .* got -1: one axis is mirrored"),
        (lambda m: m[1, 3].fill_(math.nan), "camera 2: expected finite numbers"),
        (lambda m: m.copy_(m.T.clone()), r"camera 2: expected the last row .* transposed\?"),
        (lambda m: m[:3, :3].zero_(), "camera 2: expected a rotation"),
    ],
)
def test_no_rigid_transform(change, text):
    with pytest.raises(CameraError, match=text):
        as_cameras(_spoilt(change), num_views=4)
    with pytest.raises(CameraError, match=text):
        Cameras(_spoilt(change), 30)


def test_small_rounding_is_no_error():
    assert len(as_cameras(_spoilt(lambda m: m[:3, :3].mul_(1 + 2e-4)), num_views=4)) == 4


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (np.eye(4), r"\[V,4,4\] or \[V,3,4\], got shape \[4, 4\]"),
        ([], "expected at least one matrix"),
        (torch.zeros(0, 4, 4), "expected at least one matrix"),
        (3, "expected at least one matrix.* got int"),
        ([np.eye(4), np.eye(3)], r"camera 1: .* got shape \[3, 3\]"),
        ([np.eye(4).tolist(), [[1, 0], [0]]], "camera 1: expected a 4 x 4 or 3 x 4 matrix of numbers"),
        (["front"], "camera 0: expected a 4 x 4"),
    ],
)
def test_what_is_no_list_of_matrices(given, text):
    with pytest.raises(CameraError, match=text):
        as_cameras(given, num_views=4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_views": 0}, "num_views: expected >= 1, got 0"),
        ({"num_views": -3}, "num_views: expected >= 1, got -3"),
        ({"num_views": 2.5}, "num_views: expected a whole number >= 1, got 2.5"),
        ({"elevation": 90}, "elevation: expected -90 < elevation < 90, got 90"),
        ({"elevation": -95.5}, "elevation: .* got -95.5"),
        ({"elevation": math.nan}, "elevation: .* got nan"),
        ({"radius": 0}, "radius: expected 0 < radius < inf, got 0"),
        ({"radius": math.inf}, "radius: .* got inf"),
        ({"fov": 180}, "fov: expected 0 < fov < 180, got 180"),
        ({"fov": math.nan}, "fov: .* got nan"),
        ({"fov": "wide"}, "fov: expected a number, got 'wide'"),
        ({"azimuth_start": math.nan}, "azimuth_start: .* got nan"),
        ({"azimuth_span": math.inf}, "azimuth_span: .* got inf"),
    ],
)
def test_orbit_names_the_bad_argument(arguments, text):
    with pytest.raises(ValueError, match=text):
        orbit(**{"num_views": 4, **arguments})
