"""Paths of cameras, and intrinsics of their own in what is rendered."""

import math

import pytest
import torch
from helpers import max_abs_diff
from PIL import Image

from gafext.cameras import (
    PRESETS,
    Cameras,
    arc,
    facelift,
    imagedream,
    on_sphere,
    orbit,
    read_transforms,
    spiral,
    turntable,
)
from gafext.cli import main
from gafext.families.facelift import FAMILY
from gafext.heads import head_normals


def positions(cameras):
    return cameras.c2w[:, :3, 3]


def azimuths(cameras):
    x, _, z = positions(cameras).T
    return torch.rad2deg(torch.atan2(x, z))


def elevations(cameras):
    return torch.rad2deg(torch.asin(positions(cameras)[:, 1] / positions(cameras).norm(dim=1)))


def assert_looks_at_origin(cameras, radius):
    assert max_abs_diff(positions(cameras).norm(dim=1), torch.full((len(cameras),), radius)) < 1e-5
    assert max_abs_diff(cameras.w2c[:, :3, 3], torch.tensor([0, 0, radius]).expand(len(cameras), 3)) < 1e-5


def test_an_arc_has_both_its_ends():
    cameras = arc(5, span=120, elevation=10, radius=3, fov=35)
    assert max_abs_diff(azimuths(cameras), torch.tensor([-60.0, -30, 0, 30, 60])) < 1e-4
    assert max_abs_diff(elevations(cameras), torch.full((5,), 10.0)) < 1e-4
    assert cameras.fov == 35
    assert_looks_at_origin(cameras, 3.0)
    assert max_abs_diff(arc(1).w2c, orbit(1).w2c) < 1e-7


def test_a_spiral_rises_evenly():
    cameras = spiral(9, turns=2, elevation=(-20, 60), radius=2.5)
    assert max_abs_diff(elevations(cameras), torch.linspace(-20, 60, 9)) < 1e-4
    turned = torch.tensor([math.remainder(80 * view, 360) for view in range(9)])
    assert max_abs_diff(azimuths(cameras), turned) < 1e-4
    assert_looks_at_origin(cameras, 2.5)


def test_a_turntable_is_a_full_circle():
    assert max_abs_diff(turntable(6, 5.0, 3.0, 40.0).w2c, orbit(6, 5.0, 3.0, 40.0).w2c) == 0


def test_facelift():
    """utils_folder/opencv_cameras.json, in the order of inference.py; its world is z up, the face along -y."""
    w = 2.7 / math.sqrt(2)
    theirs = torch.tensor([[0, -2.7, 0], [-w, -w, 0], [-2.7, 0, 0], [0, 2.7, 0], [2.7, 0, 0], [w, -w, 0]])
    x, y, z = theirs.T
    assert max_abs_diff(positions(facelift()), torch.stack([x, z, -y], dim=1)) < 1e-6
    assert_looks_at_origin(facelift(), 2.7)
    assert abs(facelift().focal(512) - 548.9937744140625) < 1e-3
    assert torch.equal(FAMILY.default_cameras().w2c, facelift().w2c)


def test_imagedream():
    """extern/ImageDream/scripts/demo.py and camera_utils.py, create_camera_to_world_matrix: elevation 5, four views."""
    up, flat = math.sin(math.radians(5)), math.cos(math.radians(5))
    theirs = torch.tensor([[0, up, flat], [flat, up, 0], [0, up, -flat], [-flat, up, 0]])
    distance = positions(imagedream()).norm(dim=1, keepdim=True)
    assert max_abs_diff(positions(imagedream()) / distance, theirs) < 1e-6
    first = torch.tensor([[1.0, 0, 0], [0, flat, up], [0, -up, flat]])  # columns: right, up, backward
    assert max_abs_diff(imagedream().opengl_c2w[0, :3, :3], first) < 1e-6
    # configs/imagedream-sd21-shading.yaml, with relative_radius: of objects in a cube of side 1, here of side 2.
    assert 45 <= imagedream().fov <= 50
    assert 0.6 <= distance[0].item() / 2 * math.tan(math.radians(imagedream().fov / 2)) <= 0.75


OPTIONS = {"num_views": 3, "elevation": 12.0, "radius": 3.5, "fov": 35.0}


def generate(checkpoint, folder, name, options, *more):
    Image.new("RGB", (64, 64), "white").save(folder / "portrait.png")
    flags = [word for key, value in options.items() for word in (f"--{key.removeprefix('num_')}", value)]
    command = ["generate", folder / "portrait.png", "--model", checkpoint, "--steps", 1, "--cameras", name, *flags]
    return main([str(word) for word in (*command, "--out", folder / "views", *more)])


@pytest.mark.parametrize("name", PRESETS)
def test_paths_by_name(checkpoint, tmp_path, name, capsys):
    path, known = PRESETS[name]
    options = {key: OPTIONS[key] for key in sorted(known)}
    assert generate(checkpoint, tmp_path, name, options) == 0
    expected, again = path(**options), read_transforms(tmp_path / "views")
    assert max_abs_diff(again.w2c, expected.w2c) < 1e-6 and abs(again.fov - expected.fov) < 1e-5
    capsys.readouterr()
    for unknown in OPTIONS.keys() - known:
        assert generate(checkpoint, tmp_path, name, {unknown: OPTIONS[unknown]}, "--overwrite") == 1
        assert f"--cameras {name}: expected no --{unknown.removeprefix('num_')} beside it" in capsys.readouterr().err
    assert generate(checkpoint, tmp_path, name, {}, "--convention", "opencv-w2c", "--overwrite") == 1
    assert f"--cameras {name}: expected no --convention beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: arc(0), "num_views: expected >= 1"),
        (lambda: arc(3, span=360), "span: expected 0 < span < 360"),
        (lambda: spiral(3, elevation=(0, 90)), "elevation: expected -90 < elevation < 90"),
        (lambda: spiral(3, turns=0), "turns: expected 0 < turns"),
        (lambda: Cameras(torch.eye(4)[None]), "expected fov, or intrinsics and size"),
        (lambda: Cameras(torch.eye(4)[None], 30, intrinsics=torch.eye(3), size=4), "expected fov, or intrinsics"),
        (lambda: Cameras(torch.eye(4)[None], intrinsics=torch.eye(3)), "expected fov, or intrinsics and size"),
        (lambda: Cameras(torch.eye(4)[None], intrinsics=torch.eye(4), size=4), r"intrinsics: expected \[3,3\] or"),
        (lambda: Cameras(torch.eye(4)[None], intrinsics=torch.ones(3, 3), size=4), "intrinsics 0: expected"),
        *(
            (lambda k=k: Cameras(torch.eye(4)[None], intrinsics=k, size=4), r"intrinsics 0: expected \[\[fx, 0, cx\]")
            for k in ([[4.0, 1, 2], [0, 4, 2], [0, 0, 1]], [[4.0, 0, 2], [1, 4, 2], [0, 0, 1]])
        ),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_intrinsics_of_a_common_field_of_view_are_that():
    matrix = [[40.0, 0, 32], [0, 40, 32], [0, 0, 1]]
    cameras = Cameras(orbit(2).w2c, intrinsics=matrix, size=64)
    assert cameras.has_fov and abs(cameras.focal(64) - 40) < 1e-9
    assert not Cameras(orbit(2).w2c, intrinsics=[matrix, [[41.0, 0, 32], *matrix[1:]]], size=64).has_fov


def test_a_principal_point_off_the_middle_by_little_is_no_common_field_of_view():
    lens = [[600.0, 0, 256.1], [0, 600, 256], [0, 0, 1]]
    assert not Cameras(orbit(2).w2c, intrinsics=lens, size=512).has_fov


def test_angles_on_a_sphere_of_any_dtype():
    cameras = on_sphere(torch.tensor([0, 90]), 10.7, 4.0, 30.0)
    assert cameras.c2w[0, 1, 3].item() == pytest.approx(4 * math.sin(math.radians(10.7)), abs=1e-5)
    for elevation in (torch.tensor([0.0, 95.0]), torch.tensor([90.0, 0.0]), 90.0):
        with pytest.raises(ValueError, match="elevation: expected -90 < elevation < 90"):
            on_sphere(torch.tensor([0.0, 90.0]), elevation, 4.0, 30.0)


def test_a_slice_keeps_its_intrinsics():
    matrices = [[[40.0 + view, 0, 30], [0, 41, 33], [0, 0, 1]] for view in range(3)]
    cameras = Cameras(orbit(3).w2c, intrinsics=matrices, size=64)
    assert (
        max_abs_diff(cameras[1:].intrinsics(128), 2 * torch.tensor(matrices[1:]) - torch.tensor([0, 0, 1.0]).diag())
        < 1e-4
    )
    with pytest.raises(ValueError, match="expected one field of view and principal points in the middle"):
        _ = cameras.fov


def test_normals_are_rendered_through_the_intrinsics():
    """A principal point that is moved by 8 pixels moves the picture by 8 pixels."""
    middle = orbit(2, fov=40)
    focal = middle.focal(64)
    moved = Cameras(middle.w2c, intrinsics=[[focal, 0, 40], [0, focal, 29], [0, 0, 1]], size=64)
    plain, shifted = head_normals(middle, 64), head_normals(moved, 64)
    assert max_abs_diff(shifted[:, :, :61, 8:], plain[:, :, 3:, :56]) < 1e-4
