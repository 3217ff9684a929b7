"""The procedural heads: who they are, and that their pictures obey the package's cameras and axes."""

import math

import pytest
import torch
import torch.nn.functional as F

from gafext import heads
from gafext.cameras import Cameras, orbit
from gafext.heads.identity import PARTS, uniform_numbers

SEMI_AXES = (0.65, 0.90, 0.75)


def lone_part(centre, semi_axes, *, clip=(0.0, 0.0, 0.0, 0.0)):
    """A head of which nothing is there but one ellipsoid."""
    who = heads.make_heads([0])
    who.active[:] = False
    index = PARTS.index("cap")
    who.active[0, index] = True
    who.centre[0, index] = torch.tensor(centre, dtype=torch.float64)
    who.inverse[0, index] = torch.diag(1 / torch.tensor(semi_axes, dtype=torch.float64))
    who.clip[0, index] = torch.tensor(clip, dtype=torch.float64)
    return who


def splitmix(x):
    x = x * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) >> 11) / 2**53


def test_numbers_are_those_of_splitmix_and_of_the_identity_alone():
    numbers = uniform_numbers(torch.tensor([3, 1_000_123]), 5)
    expected = [[splitmix(who * 4096 + index + 1) for index in range(5)] for who in (3, 1_000_123)]
    assert numbers.tolist() == expected
    many = uniform_numbers(torch.arange(2000), 45)
    assert many.min() >= 0 and many.max() < 1
    assert many.mean(0).sub(0.5).abs().max() < 0.04 and many.mean(1).sub(0.5).abs().max() < 0.25
    assert torch.corrcoef(many.T).fill_diagonal_(0).abs().max() < 0.12


def test_no_test_identity_is_trained_on():
    assert not set(heads.TEST_IDENTITIES) & set(heads.TRAIN_IDENTITIES)
    assert len(heads.TRAIN_IDENTITIES) >= 1000 and len(heads.TEST_IDENTITIES) >= 1000


def test_an_identity_is_the_same_head_in_every_batch():
    cameras = orbit(2)
    alone = heads.render(heads.make_heads([41]), cameras.w2c, 32)
    among = heads.render(heads.make_heads([7, 41, 9]), cameras.w2c, 32)
    for one, several in zip(alone, among, strict=True):
        assert torch.equal(one[0], several[1])
    assert (among.rgb[0] - among.rgb[1]).abs().mean() > 0.01


@pytest.mark.parametrize("identity", [-1, 1.5, 2**51])
def test_identities_that_are_none_are_refused(identity):
    with pytest.raises(ValueError, match="identities: expected whole numbers, 0 or more"):
        heads.make_heads([identity])


def test_shapes_ranges_and_background():
    cameras = orbit(3)
    made = heads.render(heads.make_heads([1, 2]), cameras.w2c, 32)
    assert made.rgb.shape == made.normals.shape == (2, 3, 3, 32, 32)
    assert made.alpha.shape == made.depth.shape == made.face.shape == (2, 3, 1, 32, 32)
    for picture in made[:3]:
        assert picture.dtype == torch.float32 and picture.min() >= 0 and picture.max() <= 1
    empty = made.alpha[:, :, 0] == 0
    assert 0.3 < empty.float().mean() < 0.8
    assert (made.rgb.movedim(2, -1)[empty] == 1).all() and (made.normals.movedim(2, -1)[empty] == 0.5).all()
    assert made.depth[:, :, 0][empty].isinf().all() and made.depth[made.alpha > 0].isfinite().all()


def test_the_face_is_seen_from_the_front():
    front, back = heads.render(heads.make_heads([1]), orbit(2).w2c, 64).face[0, :, 0]
    assert 0.01 < front.mean() < 0.1 and front.min() == 0 and front.max() == 1 and back.max() == 0
    rows, columns = front.nonzero().T
    assert rows.min() > 15 and rows.max() < 45 and columns.min() > 20 and columns.max() < 44


def test_supersampling_is_the_mean_of_neighbouring_rays():
    who, cameras = heads.make_heads([5]), orbit(2, elevation=10)
    fine = heads.render(who, cameras.w2c, 64, supersample=1)
    coarse = heads.render(who, cameras.w2c, 32, supersample=2)
    assert torch.allclose(coarse.rgb[0], F.avg_pool2d(fine.rgb[0], 2), atol=1e-6)
    assert torch.allclose(coarse.alpha[0], F.avg_pool2d(fine.alpha[0], 2), atol=1e-6)


@pytest.mark.parametrize(("view", "half_width", "depth"), [(0, 0, 2), (1, 2, 0)])
def test_the_silhouette_of_an_ellipsoid_is_the_analytic_one(view, half_width, depth):
    size, radius = 512, 4.0
    cameras = orbit(4, radius=radius)
    who = lone_part((0, 0, 0), SEMI_AXES)
    seen = heads.render(who, cameras.w2c[view : view + 1], size, supersample=1).alpha[0, 0, 0] > 0
    # From a distance d the tangent to an ellipse of half-width a, half-depth c has slope a / sqrt(d^2 - c^2).
    distance = math.sqrt(radius**2 - SEMI_AXES[depth] ** 2)
    for axis, count in ((half_width, seen[size // 2].sum()), (1, seen[:, size // 2].sum())):
        assert count.item() == pytest.approx(2 * cameras.focal(size) * SEMI_AXES[axis] / distance, abs=1.5)


def test_a_point_lies_where_the_cameras_put_it():
    size, point = 256, torch.tensor([0.31, -0.22, 0.40])
    cameras = orbit(5, elevation=25, azimuth_start=20, radius=3.5, fov=40)
    made = heads.render(lone_part(point.tolist(), (0.03,) * 3), cameras.w2c, size, fov=40, supersample=1)
    centres = torch.arange(size) + 0.5
    for view in range(5):
        x, y, z = cameras.w2c[view, :3, :3] @ point + cameras.w2c[view, :3, 3]
        u, v, _ = cameras.intrinsics(size)[view] @ torch.stack([x / z, y / z, torch.tensor(1.0)])
        seen = made.alpha[0, view, 0]
        assert ((seen.sum(0) * centres).sum() / seen.sum()).item() == pytest.approx(u.item(), abs=0.3)
        assert ((seen.sum(1) * centres).sum() / seen.sum()).item() == pytest.approx(v.item(), abs=0.3)
        assert made.depth[0, view].min().item() == pytest.approx(z.item() - 0.03, abs=3e-3)


def test_normals_point_where_the_picture_says():
    front = heads.render(lone_part((0, 0, 0), SEMI_AXES), orbit(1).w2c, 129, supersample=1).normals[0, 0]
    assert front[:, 64, 64].tolist() == pytest.approx([0.5, 0.5, 1.0], abs=1e-5)
    columns, rows = ((front[2] > 0.5).any(dim=axis).nonzero().flatten() for axis in (0, 1))
    assert front[0, 64, columns[0]] < 0.1 and front[0, 64, columns[-1]] > 0.9
    assert front[1, rows[0], 64] > 0.9 and front[1, rows[-1], 64] < 0.1


def test_normals_are_unit_and_agree_with_the_numeric_gradient_of_the_depth():
    size = 256
    cameras = orbit(3, elevation=15, azimuth_start=30)
    made = heads.render(heads.make_heads([17]), cameras.w2c, size, supersample=1)
    normals, depth, seen = made.normals[0] * 2 - 1, made.depth[0, :, 0].double(), made.alpha[0, :, 0] > 0
    assert normals.norm(dim=1)[seen].sub(1).abs().max() < 1e-5
    offsets = (torch.arange(size, dtype=torch.float64) + 0.5 - size / 2) / cameras.focal(size)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1) * depth[..., None]
    across = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    along = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    numeric = F.normalize(torch.linalg.cross(along, across), dim=-1) * torch.tensor([1.0, -1.0, -1.0]).double()
    error = (numeric - normals.movedim(1, -1)[:, 1:-1, 1:-1]).norm(dim=-1)
    # Where two parts meet within the three pixels, or at the silhouette, a difference is no gradient.
    inner = error[seen[:, 1:-1, 1:-1] & error.isfinite()]
    assert inner.median() < 2e-3 and (inner < 0.05).float().mean() > 0.9


def test_a_cut_part_shows_its_inner_side_facing_the_viewer():
    half = lone_part((0, 0, 0), (0.5,) * 3, clip=(0.0, 0.0, -1.0, 0.0))  # the front is cut away
    made = heads.render(half, orbit(2).w2c, 65, supersample=1)
    assert made.depth[0, 0, 0, 32, 32].item() == pytest.approx(4.5, abs=1e-3)
    assert made.normals[0, 0, :, 32, 32].tolist() == pytest.approx([0.5, 0.5, 1.0], abs=1e-5)
    assert made.depth[0, 1, 0, 32, 32].item() == pytest.approx(3.5, abs=1e-3)


@pytest.mark.parametrize("eye", [(0.0, 0.0, 0.0), (0.0, 0.0, -4.0)])
def test_a_camera_inside_or_turned_away_sees_background(eye):
    w2c = orbit(1).w2c.clone()
    w2c[0, :3, 3] = -w2c[0, :3, :3] @ torch.tensor(eye)
    assert (heads.render(lone_part((0, 0, 0), SEMI_AXES), w2c, 16).alpha == 0).all()


def test_the_neutral_head_faces_front():
    maps = heads.head_normals(orbit(4), 64)
    assert maps.shape == (4, 3, 64, 64) and maps.dtype == torch.float32
    assert maps.min() >= 0 and maps.max() <= 1 and (maps[:, :, 0, 0] == 0.5).all()
    flipped = torch.stack([1 - maps[0, 0], *maps[0, 1:]]).flip(-1)
    assert (flipped - maps[0]).abs().mean() < 1e-3  # left is right
    assert (maps[0] - maps[2]).abs().mean() > 0.01  # but a face is no back of a head
    assert torch.allclose(heads.head_normals(Cameras(orbit(4).w2c[2:], 30.0), 64), maps[2:])


def test_a_part_behind_a_near_camera_hides_nothing():
    """From below and near, the neck lies behind some of the cameras."""
    head = heads.make_heads([5])
    near, far = (
        heads.render(head, orbit(4, elevation=-60, radius=radius).w2c, 32, fov=fov).alpha[0]
        for radius, fov in ((1.1, 60.0), (2.2, 30.0))
    )
    covered = near.flatten(1).mean(1)
    assert (covered > 0.5 * covered.max()).all() and covered.min() > far.flatten(1).mean(1).min() / 2
