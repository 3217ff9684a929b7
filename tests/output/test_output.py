import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gafext.atomic import check_writable
from gafext.cameras import orbit
from gafext.errors import OutputError
from gafext.output import VIEW_FILES, contact_sheet, write_views

NAMES = [
    *("contact_sheet.png", "images", "index.html", "opencv_cameras.json", "points3d.ply", "run.json", "sparse"),
    *("transforms.json", "transforms_test.json", "transforms_train.json", "transforms_val.json", "turntable.webp"),
    *("view_000.png", "view_001.png"),
]
REPLACEABLE = {"replaceable": VIEW_FILES}


def views(count=2, size=32, level=0):
    return [Image.new("RGB", (size, size), (level, 25 * index, 200)) for index in range(count)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, *, level=0, overwrite=False, run=None):
    return write_views(folder, views(level=level), orbit(2), run or {"seed": level}, overwrite=overwrite)


def test_everything_is_written(tmp_path):
    folder = write(tmp_path / "deep" / "out")
    assert folder == tmp_path / "deep" / "out" and names(folder) == NAMES
    assert names(tmp_path) == ["deep"] and names(tmp_path / "deep") == ["out"]
    for index, image in enumerate(views()):
        assert np.array_equal(np.asarray(Image.open(folder / f"view_00{index}.png")), np.asarray(image))
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_transforms_are_opengl_camera_to_world(tmp_path):
    folder = write_views(tmp_path / "out", views(4, 64), orbit(4, fov=90), {})
    got = json.loads((folder / "transforms_train.json").read_text())
    frames = got.pop("frames")
    assert got == pytest.approx(
        {"camera_angle_x": math.pi / 2, "w": 64, "h": 64, "fl_x": 32, "fl_y": 32, "cx": 32, "cy": 32}
    )
    assert [frame.pop("file_path") for frame in frames] == [f"view_00{i}" for i in range(4)]
    expected = {
        0: [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]],
        1: [[0, 0, 1, 4], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]],
        2: [[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, -4], [0, 0, 0, 1]],
    }
    for view, matrix in expected.items():
        assert np.allclose(frames[view].pop("transform_matrix"), matrix, atol=1e-6)
        assert frames[view] == {"camera_index": view, "camera_id": str(view), "timestep_index": 0, "w": 64, "h": 64}


def test_run_json_is_strict_json(tmp_path):
    run = {
        "seed": 0,
        "guidance_scale": 7.5,
        "image": Path("face.png"),
        "dtype": torch.float32,
        "ok": True,
        "none": None,
        "nan": math.nan,
        "numpy": np.float32(0.5),
        "count": np.int64(3),
        "tensor": torch.tensor([1.0, math.inf]),
        "nested": {"sizes": (1, 2)},
    }
    text = (write(tmp_path / "out", run=run) / "run.json").read_text()
    got = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert got == {
        "seed": 0,
        "guidance_scale": 7.5,
        "image": "face.png",
        "dtype": "torch.float32",
        "ok": True,
        "none": None,
        "nan": None,
        "numpy": 0.5,
        "count": 3,
        "tensor": [1.0, None],
        "nested": {"sizes": [1, 2]},
    }


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (8, 3, 3)])
def test_contact_sheet_is_near_square(count, columns, rows):
    sheet = contact_sheet(views(count, 32))
    assert sheet.size == (columns * 40 + 8, rows * 40 + 8)
    for index in range(count):
        row, column = divmod(index, columns)
        assert sheet.getpixel((column * 40 + 24, row * 40 + 24)) == (0, 25 * index, 200)
    assert contact_sheet(views(4, 512)).size == (536, 536)


@pytest.mark.parametrize("size", [256, 128])
def test_contact_sheet_names_the_cameras(size):
    """Each label is dark text on white within its tile; another camera has another label, an equal one the same."""

    def label(cameras, view):
        pixels = np.asarray(contact_sheet(views(2, size), cameras).convert("L"))
        assert pixels.shape == (size + 36, 2 * size + 24)
        strip = pixels[size + 8 : size + 28, 8 + view * (size + 8) :][:, :size]
        assert strip.min() < 80 and (strip[:, [0, -1]] == 255).all() and (strip[[0, -1]] == 255).all()
        return strip.tobytes()

    cameras = orbit(2, elevation=10)
    assert label(cameras, 0) == label(orbit(2, elevation=10, radius=3), 0)
    others = [(orbit(2, elevation=11), 0), (orbit(2, elevation=10, azimuth_start=1), 0), (cameras, 1)]
    assert len({label(cameras, 0), *(label(*other) for other in others)}) == 4


def test_an_earlier_result_with_all_that_there_can_be_is_replaced(tmp_path):
    pictures = {"portrait": views(1)[0], "normal_maps": views(), "alpha": True}
    folder = write_views(tmp_path / "out", views(), orbit(2), {}, **pictures)
    (folder / "viewer").mkdir()
    for name in ("gsplat.min.js", "splat.js"):
        (folder / "viewer" / name).touch()
    assert sorted({*NAMES, "masks", "normals", "portrait.png", "viewer"}) == names(folder)
    write(folder, overwrite=True)
    assert names(folder) == NAMES


def test_an_empty_folder_is_filled(tmp_path):
    assert names(write(tmp_path)) == NAMES


def test_a_symbolic_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "disk") == NAMES


@pytest.mark.parametrize(("call", "overwrite"), [(write, {"overwrite": True}), (check_writable, REPLACEABLE)])
def test_a_folder_that_holds_something_stays(tmp_path, call, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"expected a new or empty folder, got .*thesis.tex; .*--overwrite"):
        call(tmp_path)
    with pytest.raises(
        OutputError, match=r"expected nothing but files that gafext wrote, got thesis.tex; pass another"
    ):
        call(tmp_path, **overwrite)
    assert names(tmp_path) == ["thesis.tex"] and (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("call", [write, check_writable])
def test_cameras_of_another_program_stay(tmp_path, call):
    """Files of the names that gafext writes too."""
    result = write(tmp_path / "result")
    for name in ("transforms.json", "run.json", "canonical_flame_param.npz"):
        (tmp_path / "export").mkdir(exist_ok=True)
        (tmp_path / "export" / name).write_text("mine")
    options = {"overwrite": True} if call is write else REPLACEABLE
    with pytest.raises(OutputError, match="expected a result of gafext, got a folder without contact_sheet.png"):
        call(tmp_path / "export", **options)
    assert (tmp_path / "export" / "run.json").read_text() == "mine"
    call(result, **options)


def test_an_earlier_result_is_replaced_only_on_demand(tmp_path):
    out = tmp_path / "out"
    write_views(out, views(3), orbit(3), {"seed": 0})
    with pytest.raises(OutputError, match="overwrite"):
        write(out, level=9)
    assert json.loads((out / "run.json").read_text()) == {"seed": 0}
    check_writable(out, **REPLACEABLE)
    write(out, level=9, overwrite=True)
    assert json.loads((out / "run.json").read_text()) == {"seed": 9}
    assert names(out) == NAMES and names(tmp_path) == ["out"]


@pytest.mark.parametrize("foreign", ["view_000.txt", "view_0.png", "my_run.json", ".hidden"])
def test_a_foreign_file_in_an_earlier_result_is_kept(tmp_path, foreign):
    write(tmp_path)
    (tmp_path / foreign).touch()
    with pytest.raises(OutputError, match=f"got {foreign};"):
        write(tmp_path, level=9, overwrite=True)
    assert names(tmp_path) == sorted([*NAMES, foreign])
    assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 0}


def test_a_folder_with_the_name_of_a_view_is_foreign(tmp_path):
    (tmp_path / "view_000.png").mkdir()
    with pytest.raises(OutputError, match=r"got view_000.png"):
        write(tmp_path, overwrite=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", ["nothing", "empty", "result"])
def test_a_failure_half_way_leaves_everything_as_it_was(tmp_path, monkeypatch, error, before):
    out = tmp_path / "new" / "out"
    if before == "empty":
        out.mkdir(parents=True)
    if before == "result":
        write(out)
    saved, save = [], Image.Image.save

    def failing(self, path, *args, **kwargs):
        if saved:
            raise error
        saved.append(path)
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", failing)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    with pytest.raises(expected, match="No space left" if expected is OutputError else None):
        write(out, level=9, overwrite=True)
    assert len(saved) == 1
    if before == "nothing":
        assert names(tmp_path) == []
    else:
        assert names(tmp_path / "new") == ["out"]
        assert names(out) == (NAMES if before == "result" else [])
        assert before == "empty" or json.loads((out / "run.json").read_text()) == {"seed": 0}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [0, 1])
def test_a_failure_in_the_swap_restores_the_old_result(tmp_path, monkeypatch, error, step):
    out = tmp_path / "out"
    write(out)
    calls, rename = [], Path.rename

    def failing(self, target):
        calls.append(self)
        if len(calls) == step + 1:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write(out, level=9, overwrite=True)
    assert names(tmp_path) == ["out"] and names(out) == NAMES
    assert json.loads((out / "run.json").read_text()) == {"seed": 0}


def test_a_file_that_appears_meanwhile_is_not_lost(tmp_path, monkeypatch):
    out, save = tmp_path / "out", Image.Image.save
    write(out)

    def meddling(self, path, *args, **kwargs):
        (out / "thesis.tex").touch()
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", meddling)
    with pytest.raises(OutputError, match=r"thesis.tex"):
        write(out, level=9, overwrite=True)
    assert names(out) == sorted([*NAMES, "thesis.tex"])


@pytest.mark.parametrize("call", [write, check_writable])
def test_what_cannot_be_written(tmp_path, monkeypatch, call):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file: expected a folder, got a file"):
        call(tmp_path / "file")
    with pytest.raises(OutputError, match=r"file/out: cannot be written"):
        call(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match=r"cannot be written .*File name too long"):
        call(tmp_path / ("x" * 300))
    if sys.platform == "linux":  # not even root makes folders there
        with pytest.raises(OutputError, match="/proc/gafext/out: cannot be written"):
            call("/proc/gafext/out")
        with pytest.raises(OutputError, match="or a mount point; pass a folder inside it, such as /proc/views"):
            call("/proc")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match=r"got the current folder .*pass a folder inside it"):
        call(".")
    assert names(tmp_path) == ["file", "here"]


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b" / "c")
    assert names(tmp_path) == []
    (tmp_path / "empty").mkdir()
    check_writable(tmp_path / "empty")
    assert names(tmp_path) == ["empty"] and names(tmp_path / "empty") == []


def test_images_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="images: expected 3, one per camera, got 2"):
        write_views(tmp_path / "out", views(2), orbit(3), {})
    with pytest.raises(ValueError, match=r"square images of one size, got \[\(32, 32\), \(64, 64\)\]"):
        write_views(tmp_path / "out", [*views(1), *views(1, 64)], orbit(2), {})
    with pytest.raises(ValueError, match="normal_maps: expected 2, one per camera, got 3"):
        write_views(tmp_path / "out", views(2), orbit(2), {}, normal_maps=views(3))
    assert names(tmp_path) == []
