"""The command line as a user meets it; most of it in this process, its start in a fresh one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import max_abs_diff
from PIL import Image
from safetensors.torch import load_file, save_file

import gafext.__main__
from gafext import cameras
from gafext.cli import main
from gafext.models.offload import Offload


@pytest.fixture
def portrait(tmp_path):
    path = tmp_path / "portrait.jpg"
    pixels = np.full((60, 50, 3), 255, np.uint8)
    pixels[20:, 10:40] = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def generate(*arguments) -> int:
    return main(["generate", *map(str, arguments), "--device", "cpu", "--quiet"])


def fails(capsys, *arguments) -> str:
    """The one line on stderr of a command that must end with exit code 1 and without a traceback."""
    assert generate(*arguments) == 1
    text = capsys.readouterr().err
    assert text.startswith("gafext: error: ") and "Traceback" not in text
    return text


def test_a_reader_of_events_that_stops_early_does_not_stop_the_run(checkpoint, portrait, tmp_path):
    out = tmp_path / "views"
    command = f"{sys.executable} -m gafext generate {portrait} --model {checkpoint} --views 2 --steps 3 --device cpu"
    command += f" --quiet --json --out {out} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "Broken" not in done.stderr
    assert (out / "view_001.png").is_file()


@pytest.mark.parametrize("streams", ["2>&1 | true", ">&-", "2>&-", ">&- 2>&-"])
def test_without_readers_and_streams_a_run_goes_on(checkpoint, portrait, tmp_path, streams):
    command = f"{sys.executable} -m gafext generate {portrait} --model {checkpoint} --views 2 --steps 3 --device cpu"
    command = f"{{ sleep 0.5; {command} --json --out {tmp_path / 'views'}; }} {streams}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout
    assert (tmp_path / "views" / "view_001.png").is_file()


def test_an_interrupt_while_modules_are_imported(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("gafext.cli.main", interrupted)
    monkeypatch.setattr("gafext.watch.events.guard_streams", lambda: None)
    try:
        assert gafext.__main__.main() == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "gafext: interrupted\n"


def test_numbers_that_are_none_or_too_large(portrait, tmp_path, capsys):
    with pytest.raises(SystemExit):
        generate(portrait, "--batch", "abc")
    assert "argument --batch: expected a whole number or auto, got 'abc'" in capsys.readouterr().err
    words = fails(capsys, portrait, "--views", 10**9, "--out", tmp_path / "out")
    assert "num_views: expected at most 100000, got 1000000000" in words


def test_a_preview_that_never_comes_is_named(checkpoint, portrait, tmp_path, capsys):
    options = ("--model", checkpoint, "--views", 2, "--steps", 2, "--preview", 5, "--out", tmp_path / "out")
    assert generate(portrait, *options) == 0
    assert "--preview 5: no picture, because the run has 2 steps" in capsys.readouterr().err


def test_a_convention_without_cameras_is_refused(portrait, tmp_path, capsys):
    words = fails(capsys, portrait, "--convention", "opengl-c2w", "--out", tmp_path / "out")
    assert "--convention: expected --cameras with it" in words


def test_a_pose_that_is_no_matrix_is_named(portrait, tmp_path, capsys):
    (tmp_path / "pose.txt").write_text("hello")
    arguments = ("--mesh", tmp_path / "head.obj", "--mesh-pose", tmp_path / "pose.txt", "--out", tmp_path / "out")
    assert "pose.txt: expected a matrix of numbers" in fails(capsys, portrait, *arguments)


def test_generate_writes_the_folder(checkpoint, portrait, tmp_path):
    out = tmp_path / "deep" / "views"
    assert generate(portrait, "--model", checkpoint, "--views", 3, "--steps", 2, "--seed", 5, "--out", out) == 0
    pictures = ["view_000.png", "view_001.png", "view_002.png"]
    others = {"contact_sheet.png", "turntable.webp", "index.html", "portrait.png", "normals", "run.json"}
    assert {*pictures, *others} <= {path.name for path in out.iterdir()}
    record = json.loads((out / "run.json").read_text())
    expected = {
        "num_views": 3,
        "num_inference_steps": 2,
        "seed": 5,
        "guidance_scale": 7.5,
        "model": str(checkpoint),
    }
    assert {key: record[key] for key in expected} == expected
    assert record["command"]["portrait"] == str(portrait) and record["command"]["views"] == 3
    assert {"gafext", "torch", "python"} <= set(record["versions"])
    frames = json.loads((out / "transforms.json").read_text())["frames"]
    assert [frame["file_path"] for frame in frames] == pictures
    assert all((out / frame["file_path"]).is_file() for frame in frames)


def test_generate_reads_bare_matrices_and_writes_one_format(checkpoint, portrait, tmp_path):
    given = cameras.orbit(2, elevation=30, fov=45)
    np.save(tmp_path / "poses.npy", given.opengl_c2w)
    options = ["--cameras", tmp_path / "poses.npy", "--convention", "blender-c2w", "--fov", 45]
    options += ["--format", "facelift", "--alpha", "--steps", 1, "--out", tmp_path / "out"]
    assert generate(portrait, "--model", checkpoint, *options) == 0
    again = cameras.read_transforms(tmp_path / "out")
    assert max_abs_diff(again.w2c, given.w2c) < 1e-6 and abs(again.fov - 45) < 1e-4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"opencv_cameras.json", "masks"} <= names and "transforms.json" not in names


def test_the_same_seed_writes_the_same_bytes(checkpoint, portrait, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert generate(portrait, "--model", checkpoint, "--steps", 2, "--seed", seed, "--out", tmp_path / name) == 0
    a, b, c = ((tmp_path / name / "view_002.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_writes_the_same_bytes(checkpoint, portrait, tmp_path, offload, monkeypatch, pretend_cpu):
    pretend_cpu("avx512")  # a linear layer with hooks is PyTorch's, and has not the bits of the kernel for AMX
    started = []
    monkeypatch.setattr(Offload, "__init__", noted(Offload.__init__, started))
    options = [portrait, "--model", checkpoint, "--steps", 1, "--views", 2]
    assert generate(*options, "--out", tmp_path / "plain") == 0 and not started
    assert generate(*options, "--offload", offload, "--out", tmp_path / "offloaded") == 0
    assert [options["sequential"] for options in started] == [offload == "sequential"]
    assert len({(tmp_path / name / "view_001.png").read_bytes() for name in ("plain", "offloaded")}) == 1


def noted(method, calls):
    return lambda *args, **options: (calls.append(options), method(*args, **options))[1]


def test_cameras_normals_and_renders_from_files(checkpoint, portrait, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert generate(portrait, "--model", checkpoint, "--views", 3, "--steps", 2, "--elevation", 20, "--out", first) == 0
    transforms = first / "transforms_train.json"
    for folder in ("normals", "renders"):
        (tmp_path / folder).mkdir()
        for view in range(3):
            shutil.copy(first / f"view_00{view}.png", tmp_path / folder)
    options = ["--cameras", transforms, "--normals", tmp_path / "normals", "--renders", tmp_path / "renders"]
    assert generate(portrait, "--model", checkpoint, "--steps", 4, *options, "--strength", 0.5, "--out", second) == 0
    matrices = [cameras.read_transforms(folder / "transforms_train.json").w2c for folder in (first, second)]
    assert max_abs_diff(*matrices) < 1e-6
    record = json.loads((second / "run.json").read_text())
    assert record["normal_maps"] == record["renders"] == "given" and record["command"]["renders"].endswith("renders")
    assert record["num_inference_steps"] == 4 and record["strength"] == 0.5


def test_transparent_normal_maps_are_before_grey(checkpoint, portrait, tmp_path):
    for folder in ("normals", "renders"):
        (tmp_path / folder).mkdir()
        for view in range(2):
            Image.new("RGBA", (32, 32), (0, 0, 255, 0)).save(tmp_path / folder / f"{view}.png")
        Image.new("RGBA", (32, 32)).save(tmp_path / folder / ".hidden.png")
    options = ["--normals", tmp_path / "normals", "--renders", tmp_path / "renders", "--strength", 0.5, "--views", 2]
    assert generate(portrait, "--model", checkpoint, "--steps", 2, *options, "--out", tmp_path / "out") == 0
    assert Image.open(tmp_path / "out/normals/view_001.png").getpixel((5, 5)) == (128, 128, 128)


def test_the_field_of_view_of_a_camera_file(checkpoint, portrait, tmp_path, capsys):
    views = cameras.orbit(2, fov=40)
    np.savez(tmp_path / "bare.npz", w2c=views.w2c)
    np.savez(tmp_path / "angle.npz", w2c=views.w2c, fov=40.0)
    common = [portrait, "--model", checkpoint, "--steps", 1, "--fov", 35, "--out", tmp_path / "out", "--cameras"]
    assert "fov: expected none" in fails(capsys, *common, tmp_path / "angle.npz")
    assert "got elevation" in fails(capsys, *common, tmp_path / "bare.npz", "--elevation", 3)
    assert generate(*common, tmp_path / "bare.npz") == 0
    assert cameras.read_transforms(tmp_path / "out").fov == pytest.approx(35)


def test_a_preset_and_what_replaces_its_options(checkpoint, portrait, tmp_path):
    common = [portrait, "--model", checkpoint, "--views", 2, "--preset", "fast"]
    assert generate(*common, "--out", tmp_path / "fast") == 0
    record = json.loads((tmp_path / "fast/run.json").read_text())
    assert record["num_inference_steps"] == 15 and record["guidance_interval"] == [0.28, 5.42]
    assert record["scheduler"]["_class_name"] == "DPMSolverMultistepScheduler"
    others = ["--steps", 2, "--scheduler", "euler-a", "--guidance-interval", 1, "inf"]
    assert generate(*common, *others, "--out", tmp_path / "other") == 0
    record = json.loads((tmp_path / "other/run.json").read_text())
    assert record["num_inference_steps"] == 2 and record["guidance_interval"] == [1, None]  # JSON has no infinity
    assert record["scheduler"]["_class_name"] == "EulerAncestralDiscreteScheduler" and record["eta"] == 1


def test_a_folder_with_something_in_it_is_left_alone(checkpoint, portrait, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    arguments = [portrait, "--model", checkpoint, "--steps", 1, "--out", out]
    assert "thesis.txt" in fails(capsys, *arguments)
    assert "thesis.txt" in fails(capsys, *arguments, "--overwrite")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    assert generate(*arguments) == 0
    assert "--overwrite" in fails(capsys, *arguments)
    assert generate(*arguments, "--overwrite", "--views", 2) == 0
    assert not (out / "view_002.png").exists()


def test_a_users_mistakes_are_one_line(checkpoint, portrait, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--model", checkpoint, "--steps", 1, "--out", out]
    assert "nowhere.png" in fails(capsys, "nowhere.png", *common)
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png" in fails(capsys, tmp_path / "text.png", *common)
    assert "num_views" in fails(capsys, portrait, *common, "--views", 0)
    assert "num_inference_steps" in fails(capsys, portrait, *common, "--steps", 1001)
    assert "guidance_scale" in fails(capsys, portrait, *common, "--guidance", 25)
    assert "guidance_interval" in fails(capsys, portrait, *common, "--guidance-interval", 2, 1)
    assert "generator" in fails(capsys, portrait, *common, "--seed", -1)
    assert "fov" in fails(capsys, portrait, *common, "--fov", 0)
    assert "no/checkpoint" in fails(capsys, portrait, "--model", "./no/checkpoint", "--out", out)
    assert "cameras.json" in fails(capsys, portrait, *common, "--cameras", tmp_path / "cameras.json")
    assert "normal_maps: expected 4" in fails(capsys, portrait, *common, "--normals", tmp_path / "..")
    (tmp_path / "cameras.json").write_text("[" * 100_000)
    assert "cameras.json" in fails(capsys, portrait, *common, "--cameras", tmp_path / "cameras.json")
    (tmp_path / "cameras.json").write_text('{"camera_angle_x": 1%s, "frames": []}' % ("0" * 400))
    assert "cameras.json" in fails(capsys, portrait, *common, "--cameras", tmp_path / "cameras.json")
    assert "no orbit beside it" in fails(capsys, portrait, *common, "--cameras", "x.json", "--views", 3)
    assert "--lora-scale: expected --lora" in fails(capsys, portrait, *common, "--lora-scale", 2)
    assert main(["generate", "--device", "meta", "--out", str(out)]) == 1
    assert "--device meta: expected cpu" in capsys.readouterr().err
    assert "no_normals" in fails(capsys, portrait, *common, "--normals", tmp_path / "no_normals")
    assert main(["generate", "--device", "nonsense", "--out", str(out)]) == 1
    assert "--device nonsense" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(checkpoint, portrait, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert str(tmp_path) in fails(capsys, portrait, "--model", checkpoint, "--out", tmp_path / "out")


def test_a_path_through_a_file(checkpoint, portrait, capsys):
    assert str(portrait) in fails(capsys, portrait, "--model", checkpoint, "--out", portrait / "out")


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder"])
def test_damaged_weights_name_the_file(part, checkpoint, portrait, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    file = next((folder / part).glob("*.safetensors"))
    arguments = [portrait, "--model", folder, "--steps", 1, "--out", tmp_path / "out"]
    whole = file.read_bytes()
    for size in (len(whole) // 2, 100, 4, 0):
        file.write_bytes(whole[:size])
        assert str(file) in fails(capsys, *arguments)
    file.write_bytes(whole)
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, str(file))
    assert name in fails(capsys, *arguments)
    file.unlink()
    (file.parent / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "Pickled weights" in fails(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_interrupt(monkeypatch, tmp_path, capsys):
    from gafext.pipeline import MultiViewDiffusionPipeline

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MultiViewDiffusionPipeline, "denoise", interrupt)
    assert generate("--steps", 1, "--out", tmp_path / "out") == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_command_lines_are_argparses(capsys):
    for arguments in ([], ["paint"], ["generate", "--views", "many"], ["generate", "--backend", "magic"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("PORTRAIT", "--steps", "default: 50", "exit codes"))


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("gafext", "torch", "cpu", "instruction"))
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert set(info) == {"versions", "devices", "threads", "build"}


def test_a_fresh_process_with_the_embedded_default(tmp_path):
    command = [sys.executable, "-m", "gafext", "generate", "--steps", "2", "--views", "2", "--out", "views"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "a cartoon" in result.stderr and "Traceback" not in result.stderr
    assert Image.open(tmp_path / "views" / "view_001.png").size == (256, 256)


def test_matte_and_warnings_about_the_portrait(checkpoint, tmp_path, capsys, monkeypatch):
    """rembg is imported before the model is loaded; here it makes everything transparent."""
    portrait = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)).save(portrait)
    arguments = [portrait, "--model", checkpoint, "--steps", 1, "--views", 2]
    monkeypatch.setitem(sys.modules, "rembg", None)
    words = fails(capsys, *arguments[:1], "--model", tmp_path / "nowhere", "--matte", "--out", tmp_path / "none")
    assert "pip install gafext[matte]" in words and not (tmp_path / "none").exists()
    assert generate(*arguments, "--out", tmp_path / "busy") == 0
    assert capsys.readouterr().err.startswith("gafext: image: the background is not plain")
    cut_out = SimpleNamespace(remove=lambda image: Image.new("RGBA", image.size, (0, 0, 0, 0)))
    monkeypatch.setitem(sys.modules, "rembg", cut_out)
    assert generate(*arguments, "--matte", "--out", tmp_path / "matte") == 0
    assert capsys.readouterr().err == ""
    white = tmp_path / "white.png"
    Image.new("RGB", (50, 60), "white").save(white)
    assert generate(white, *arguments[1:], "--out", tmp_path / "white") == 0
    first, second = ((tmp_path / name / "view_001.png").read_bytes() for name in ("matte", "white"))
    assert first == second
