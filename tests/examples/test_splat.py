"""The example that fits Gaussians to views."""

import sys
import types

import pytest
import torch
from helpers import ROOT, max_abs_diff
from plyfile import PlyData

from gafext import heads
from gafext.cameras import orbit
from gafext.images import to_pil
from gafext.output import write_views

sys.path.insert(0, str(ROOT / "examples" / "splat"))
import fit
from gaussians import Gaussians

SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """True views of one head, as the output folder of a run."""
    cameras = orbit(16, elevation=10)
    pictures = heads.render(heads.make_heads([7]), cameras.w2c, SIZE).rgb[0]
    return write_views(tmp_path_factory.mktemp("views") / "views", to_pil(pictures), cameras, {})


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fit.py", *map(str, arguments)])
    fit.main()
    return float(capsys.readouterr().out.rpartition(": ")[2].split()[0])


def test_held_out_views_agree_unless_cameras_are_swapped(folder, tmp_path, monkeypatch, capsys):
    options = ["--steps", 120, "--gaussians", 400]
    score = run(monkeypatch, capsys, folder, tmp_path / "head.ply", *options)
    swapped = run(monkeypatch, capsys, folder, tmp_path / "swapped.ply", *options, "--swap")
    assert score > 18 and score > swapped + 3
    vertex = PlyData.read(tmp_path / "head.ply")["vertex"]
    assert {"f_dc_0", "opacity", "scale_2", "rot_3"} <= set(vertex.data.dtype.names) and len(vertex) == 400


def test_gsplat_is_given_what_it_documents(monkeypatch):
    """gsplat 1.6, gsplat/rendering.py, rasterization: scales, opacities and colours after their activations."""

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, *, backgrounds):
        assert (viewmats.shape, Ks.shape, backgrounds.shape) == ((1, 4, 4), (1, 3, 3), (1, 3))
        again = Gaussians(means, colors, scale=1.0)
        with torch.no_grad():
            again.rotation.copy_(quats)
            again.scale.copy_(scales.log())
            again.opacity.copy_(opacities.logit())
        picture = again.render(viewmats[0], Ks[0], width, float(backgrounds[0, 0]))
        assert picture.shape == (3, height, width)
        return picture.permute(1, 2, 0)[None], None, {}

    monkeypatch.setitem(sys.modules, "gsplat", types.SimpleNamespace(rasterization=rasterization))
    cameras, gaussians = orbit(1), Gaussians(torch.rand(20, 3) - 0.5, torch.rand(20, 3), scale=0.1)
    with torch.no_grad():
        gaussians.scale.add_(torch.rand(20, 3))
        gaussians.rotation.copy_(torch.randn(20, 4))
        gaussians.opacity.copy_(torch.randn(20))
        views = [
            render(cameras.w2c[0], cameras.intrinsics(32)[0], 32, 0.5)
            for render in (gaussians.render, gaussians.render_with_gsplat)
        ]
    assert max_abs_diff(*views) < 1e-5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not fit.has_gsplat()


def test_one_gaussian_is_where_its_camera_puts_it():
    cameras = orbit(1)
    gaussians = Gaussians(torch.tensor([[0.3, -0.2, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), scale=0.05)
    with torch.no_grad():
        gaussians.opacity.fill_(10.0)
        picture = gaussians.render(cameras.w2c[0], cameras.intrinsics(64)[0], 64)
    weight = 1 - picture[1]
    pixels = torch.arange(64) + 0.5
    found = torch.stack([(weight.sum(0) * pixels).sum(), (weight.sum(1) * pixels).sum()]) / weight.sum()
    there = cameras.w2c[0] @ torch.tensor([0.3, -0.2, 0.0, 1.0])
    expected = cameras.focal(64) * there[:2] / there[2] + 32
    assert max_abs_diff(found, expected) < 0.1
    assert picture[:, 0, 0].tolist() == [1, 1, 1]
