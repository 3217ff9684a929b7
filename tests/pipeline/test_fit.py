"""Without normal maps given, a pipeline with a fitter takes those of a head that is fitted to the portrait."""

import json

import pytest
import torch
from helpers import max_abs_diff

import gafext
from gafext.assets import MODEL
from gafext.cameras import orbit
from gafext.checkpoints.describe import describe
from gafext.cli import main
from gafext.evaluation import as_portrait, subjects
from gafext.heads import head_normals
from gafext.images import to_square_tensor
from gafext.output.points import surface_points

SHORT = {"num_inference_steps": 1, "upsample": "none", "num_views": 2}


@pytest.fixture(scope="module")
def pipe():
    loaded = gafext.MultiViewDiffusionPipeline.from_pretrained(device="cpu")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def size(pipe):
    """Side in pixels of the pictures that are not upsampled, and of the normal maps."""
    return pipe.unet.config.sample_size * pipe.vae.config.factor


@pytest.fixture(scope="module")
def portraits():
    return [as_portrait(subject.portrait) for subject in subjects(2, 96, first=40)]


def test_normal_maps_are_of_the_fitted_head(pipe, portraits, size):
    run = pipe.prepare(portraits[0], generator=0, **SHORT)
    head = pipe.head_fitter.fit(portraits[0])
    assert torch.equal(run.heads[0].centre, head.centre) and run.describe(0)["normal_maps"] == "fitted"
    maps = to_square_tensor(run.normal_maps, size)
    assert max_abs_diff(maps, head_normals(orbit(2), size, head)) < 1 / 255
    wanted = pipe.encode(head_normals(orbit(2), size, head))
    assert torch.equal(run.conditions.input_latents, wanted.repeat(2, 1, 1, 1))  # of both passes of guidance


def test_without_fitter_or_fit_they_are_of_the_neutral_head(pipe, portraits, size):
    off = pipe.prepare(portraits[0], generator=0, fit=False, **SHORT)
    without = gafext.MultiViewDiffusionPipeline(**{**pipe.components, "head_fitter": None})
    same = without.prepare(portraits[0], generator=0, **SHORT)
    wanted = pipe.encode(head_normals(orbit(2), size)).repeat(2, 1, 1, 1)
    for run in (off, same):
        assert run.heads is None and run.describe(0)["normal_maps"] == "default"
        assert torch.equal(run.conditions.input_latents, wanted)


def test_given_normal_maps_are_taken(pipe, portraits, size):
    maps = head_normals(orbit(2), size)
    run = pipe.prepare(portraits[0], None, list(maps), generator=0, **SHORT)
    assert run.heads is None and run.describe(0)["normal_maps"] == "given"


def test_each_portrait_has_its_own_head(pipe, portraits):
    seeds = [3, 4]
    both = pipe(portraits, generator=seeds, output_type="pt", **SHORT)
    for portrait, seed, result in zip(portraits, seeds, both, strict=True):
        alone = pipe([portrait], generator=[seed], output_type="pt", **SHORT)[0]
        assert max_abs_diff(result.images, alone.images) < 1e-4
        assert torch.equal(result.surface.centre, pipe.head_fitter.fit(portrait).centre)
        for got, wanted in zip(result.normal_maps, alone.normal_maps, strict=True):
            assert got.tobytes() == wanted.tobytes()
    assert not torch.equal(both[0].surface.centre, both[1].surface.centre)


def test_several_results_share_one_head(pipe, portraits, monkeypatch):
    fitted, fit = [], pipe.head_fitter.fit
    monkeypatch.setattr(pipe.head_fitter, "fit", lambda portrait: (fitted.append(portrait), fit(portrait))[1])
    run = pipe.prepare(portraits, generator=0, num_images_per_prompt=2, **SHORT)
    assert len(fitted) == 2 and len(run.heads) == 2
    results = pipe.finish(run, pipe.denoise(run))
    heads = [result.surface.centre for result in results]
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[2], heads[3]) and not torch.equal(heads[0], heads[2])
    rows = run.conditions.input_latents.unflatten(0, (2, 4, 2))  # passes, results, views
    assert torch.equal(rows[:, 0], rows[:, 1]) and torch.equal(rows[:, 2], rows[:, 3])
    assert not torch.equal(rows[:, 1], rows[:, 2])


def test_points_lie_on_the_fitted_head(pipe, portraits, size, tmp_path):
    output = pipe(portraits[0], generator=0, **SHORT)
    output.save(tmp_path / "views", formats=["3dgs"], turntable="none")
    written = (tmp_path / "views" / "points3d.ply").read_bytes()
    images = to_square_tensor(output.images, size)
    fitted = surface_points(images, orbit(2), pipe.head_fitter.fit(portraits[0])).positions
    neutral = surface_points(images, orbit(2)).positions
    for points, there in ((fitted, True), (neutral, False)):
        assert (points[len(points) // 2].tobytes() in written) == there


def test_the_fitter_is_saved(pipe, portraits, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = gafext.MultiViewDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert torch.equal(again.head_fitter.fit(portraits[0]).centre, pipe.head_fitter.fit(portraits[0]).centre)


def test_nothing_is_fitted_beside_given_normals(tmp_path, capsys):
    assert main(["generate", "--no-fit", "--normals", str(tmp_path), "--out", str(tmp_path / "views")]) == 1
    assert "--no-fit: expected no --normals beside it" in capsys.readouterr().err


def test_the_description_of_a_fitter():
    found = describe(MODEL / "head_fitter")
    assert found["refused"] is None and [part["network"] for part in found["parts"].values()] == ["HeadFitter"]


@pytest.mark.parametrize("placed", ["model", "sequential"])
def test_offloaded_weights_fit_the_same_head(pipe, portraits, placed):
    other = gafext.MultiViewDiffusionPipeline.from_pretrained(device="cpu")
    offload = {"model": other.enable_model_cpu_offload, "sequential": other.enable_sequential_cpu_offload}
    offload[placed](device="cpu")
    run = other.prepare(portraits[0], generator=0, **SHORT)
    assert torch.equal(run.heads[0].centre, pipe.head_fitter.fit(portraits[0]).centre)


@pytest.mark.parametrize(("more", "wanted"), [((), "fitted"), (("--no-fit",), "default")])
def test_the_command(tmp_path, more, wanted):
    out = tmp_path / "views"
    main(["generate", "--out", str(out), "--views", "1", "--steps", "1", "--quiet", "--device", "cpu", *more])
    assert json.loads((out / "run.json").read_text())["normal_maps"] == wanted
