"""Films of the views; mp4 with an encoder in place of ffmpeg that keeps what it got."""

import os
import stat
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageSequence

from gafext.cameras import arc, orbit
from gafext.errors import OutputError
from gafext.output import write_views

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def write(folder, cameras, size=64, **options):
    views = [Image.new("RGB", (size, size), COLOURS[view]) for view in range(len(cameras))]
    return write_views(folder, views, cameras, {}, **options)


def colours(frames):
    """Which view each frame is."""
    pixels = [np.asarray(frame.convert("RGB"))[16, 16].astype(int) for frame in frames]
    return [int(np.abs(np.array(COLOURS) - pixel).sum(1).argmin()) for pixel in pixels]


@pytest.mark.parametrize(("cameras", "expected"), [(orbit(4), [0, 1, 2, 3]), (arc(3), [0, 1, 2, 1]), (orbit(1), [0])])
def test_webp_goes_around_or_back_and_forth(tmp_path, cameras, expected):
    with Image.open(write(tmp_path / "views", cameras) / "turntable.webp") as film:
        assert film.size == (64, 64)
        assert colours(ImageSequence.Iterator(film)) == expected
        if len(expected) > 1:
            assert (film.info["loop"], film.info["duration"]) == (0, 500)


def test_webp_is_at_most_512_pixels_and_quick_with_many_views(tmp_path):
    views = [Image.new("RGB", (600, 600), (view, 3 * view, 9 * view)) for view in range(20)]
    folder = write_views(tmp_path / "views", views, orbit(20), {}, formats=["facelift"])
    with Image.open(folder / "turntable.webp") as film:
        assert film.size == (512, 512) and film.n_frames == 20
        film.seek(1)
        film.load()
        assert film.info["duration"] == 200


def test_none_writes_none(tmp_path):
    assert not list(write(tmp_path / "views", orbit(2), turntable="none").glob("turntable*"))


def encoder(folder, code):
    """A program called ffmpeg that runs a line of Python on its arguments."""
    folder.mkdir()
    program = folder / "ffmpeg"
    program.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(folder)


KEEP = "pathlib.Path(sys.argv[-1]).write_bytes(repr(sys.argv[1:-1]).encode() + b'|' + sys.stdin.buffer.read())"


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)


@pytest.mark.parametrize("found", ["on PATH", "in a package"])
def test_mp4_is_encoded_by_ffmpeg(tmp_path, monkeypatch, found):
    path = encoder(tmp_path / "bin", KEEP)
    package = types.SimpleNamespace(get_ffmpeg_exe=lambda: f"{path}/ffmpeg") if found == "in a package" else None
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", package)
    if package is None:
        monkeypatch.setenv("PATH", path, prepend=os.pathsep)
    folder = write(tmp_path / "views", arc(3), size=33, turntable="mp4")
    arguments, _, pixels = (folder / "turntable.mp4").read_bytes().partition(b"|")
    assert b"'-s', '32x32', '-r', '2.0000'" in arguments and b"yuv420p" in arguments  # no odd sizes
    frames = np.frombuffer(pixels, np.uint8).reshape(-1, 32, 32, 3)
    assert colours(map(Image.fromarray, frames)) == [0, 1, 2, 1]
    assert not (folder / "turntable.webp").exists()
    write(folder, orbit(2), overwrite=True)
    assert not (folder / "turntable.mp4").exists()


def test_an_encoder_that_fails_leaves_nothing(tmp_path, monkeypatch, no_package):
    monkeypatch.setenv("PATH", encoder(tmp_path / "bin", "sys.exit('Unknown encoder libx264')"), prepend=os.pathsep)
    with pytest.raises(OutputError, match="ffmpeg: Unknown encoder libx264"):
        write(tmp_path / "views", orbit(2), turntable="mp4")
    assert not (tmp_path / "views").exists()


def test_without_an_encoder_or_with_an_unknown_kind_nothing_is_written(tmp_path, monkeypatch, no_package):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"got none: pip install gafext\[mp4\], put ffmpeg on PATH, or choose webp"):
        write(tmp_path / "views", orbit(2), turntable="mp4")
    with pytest.raises(ValueError, match="turntable: expected one of webp, mp4, none, got 'gif'"):
        write(tmp_path / "views", orbit(2), turntable="gif")
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_so_before_it_runs(tmp_path):
    command = [sys.executable, "-m", "gafext", "generate", "--turntable", "mp4", "--out", str(tmp_path / "views")]
    block = (
        "import sys; sys.modules['imageio_ffmpeg'] = None; from gafext.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command[1:3] = ["-c", block]
    done = subprocess.run(command, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("gafext: error: turntable: expected an encoder for mp4")
    assert not list(tmp_path.iterdir())
