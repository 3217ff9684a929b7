"""Gaussians of the example in the output folder's page, against the example's own renderer."""

import io
import math
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from gafext import heads
from gafext.cameras import Cameras, orbit
from gafext.images import to_pil
from gafext.output import write_viewer, write_views

sys.path.insert(0, str(ROOT / "examples" / "splat"))
import fit
from gaussians import Gaussians, read_points

SIZE = 256


@pytest.fixture(scope="module")
def views():
    """Pictures of a head, from above."""
    pictures = heads.render(heads.make_heads([7]), orbit(3, elevation=25, azimuth_start=30).w2c, SIZE).rgb[0]
    return to_pil(pictures)


def open_gaussians(page, views, cameras, tmp_path):
    """Open the page of views with Gaussians on the head: long ones, flat ones, some of them half transparent."""
    folder, path = write_views(tmp_path / "views", views, cameras, {}), tmp_path / "head.ply"
    positions, colours = (values[::32] for values in read_points(folder / "points3d.ply"))
    gaussians, numbers = Gaussians(positions, colours, scale=0.08), torch.Generator().manual_seed(0)
    with torch.no_grad():
        gaussians.scale += 0.6 * torch.randn(len(positions), 3, generator=numbers)
        gaussians.rotation.copy_(torch.randn(len(positions), 4, generator=numbers))
        gaussians.opacity.copy_(1 + 2 * torch.randn(len(positions), generator=numbers))
    gaussians.save(path)
    write_viewer(folder, splat=path)
    page.goto((folder / "index.html").as_uri())
    return gaussians


@torch.no_grad()
def assert_shows(page, gaussians, cameras, view, rows=slice(None), columns=slice(None)):
    """Mirrored or upside down, the picture would differ by more than 0.05."""
    expected = gaussians.render(cameras.w2c[view], cameras.intrinsics(SIZE)[view], SIZE).clamp(0, 1)
    page.wait_for_selector("#splat[data-state=drawn]", timeout=60_000)
    picture = Image.open(io.BytesIO(page.locator(".frame").screenshot())).convert("RGB")
    got = torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1) / 255
    errors = [(other - expected)[:, rows, columns].abs().mean().item() for other in (got, got.flip(1), got.flip(2))]
    assert errors[0] < 0.015 and min(errors[1:]) > 0.05


def test_gaussians_are_seen_from_the_cameras_of_the_views_and_turn(page, views, tmp_path):
    cameras = orbit(3, elevation=25, azimuth_start=30)
    gaussians = open_gaussians(page, views, cameras, tmp_path)
    assert_shows(page, gaussians, cameras, 0)
    page.keyboard.press("ArrowRight")
    assert_shows(page, gaussians, cameras, 1)
    box = page.locator(".frame").bounding_box()
    x, y = box["x"] + SIZE / 2, box["y"] + SIZE / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - SIZE / 8, y - SIZE / 16)  # the camera goes right by 180/8 degrees and down by 180/16
    page.mouse.up()
    page.mouse.wheel(0, 300)  # away
    there = orbit(1, elevation=25 - 180 / 16, azimuth_start=150 + 180 / 8, radius=4 * math.exp(0.3))
    assert_shows(page, gaussians, there, 0)


def test_every_view_has_its_own_lens(page, views, tmp_path):
    lenses = [[[500, 0, 144], [0, 400, 120], [0, 0, 1]], [[300, 0, 128], [0, 300, 128], [0, 0, 1]]]
    cameras = Cameras(orbit(2, elevation=25).w2c, intrinsics=lenses, size=SIZE)
    gaussians = open_gaussians(page, views[:2], cameras, tmp_path)
    assert_shows(page, gaussians, cameras, 0, slice(0, -8), slice(16, None))  # the rest is beyond the canvas
    page.keyboard.press("ArrowRight")
    assert_shows(page, gaussians, cameras, 1)


def test_the_example_adds_what_it_fitted_unless_cameras_are_swapped(page, views, tmp_path, monkeypatch):
    small = [view.resize((32, 32)) for view in views]
    folder = write_views(tmp_path / "views", small, orbit(3, elevation=25, azimuth_start=30), {})
    for options in (["--swap"], []):
        arguments = [folder, tmp_path / "head.ply", "--steps", 1, "--gaussians", 50, *options]
        monkeypatch.setattr(sys, "argv", ["fit.py", *map(str, arguments)])
        fit.main()
        page.goto((folder / "index.html").as_uri())
        assert page.is_visible("#splat") == (not options)
    page.wait_for_selector("#splat[data-state=drawn]", timeout=60_000)
