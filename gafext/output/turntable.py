"""The turntable: a film that goes around the head."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gafext.cameras import Cameras
from gafext.output.turn import turn

TURNTABLES = ("webp", "mp4", "none")
_SIDE = 512  # pixels at most
_SECONDS = 4.0  # of one round, but each view is shown between _SHORTEST and _LONGEST
_SHORTEST, _LONGEST = 0.04, 0.5


def check_turntable(kind: str) -> None:
    """Check that a film of this kind can be written.

    Raises:
        ValueError: the kind is unknown, or "mp4" without an encoder.
    """
    if kind not in TURNTABLES:
        raise ValueError(f"turntable: expected one of {', '.join(TURNTABLES)}, got {kind!r}")
    if kind == "mp4" and _encoder() is None:
        raise ValueError(
            "turntable: expected an encoder for mp4, got none: pip install gafext[mp4], put ffmpeg on PATH, or "
            "choose webp"
        )


def write_turntable(folder: Path, images: Sequence[Image.Image], cameras: Cameras, kind: str = "webp") -> None:
    """Write turntable.webp or turntable.mp4: the views by azimuth, back and forth if they do not go all around.

    Args:
        folder: where to write.
        images: V square images of one size.
        cameras: V cameras.
        kind: one of `TURNTABLES`; "none" writes nothing.

    Raises:
        ValueError: as for `check_turntable`.
        OSError: the encoder failed.
    """
    check_turntable(kind)
    if kind == "none":
        return
    order, closed = turn(cameras)
    if not closed:
        order = order + order[-2:0:-1]
    side = max(2, min(images[0].width, _SIDE) // 2 * 2)  # mp4 wants even numbers
    small = {view: images[view].convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for view in set(order)}
    frames = [small[view] for view in order]
    seconds = min(max(_SECONDS / len(frames), _SHORTEST), _LONGEST)
    if kind == "mp4":
        _write_mp4(folder / "turntable.mp4", frames, seconds)
        return
    # method 2: 60 ms for four frames of 512 pixels, half of the default's time, for 4 % more bytes.
    options = {"save_all": True, "append_images": frames[1:], "duration": round(1000 * seconds), "loop": 0}
    frames[0].save(folder / "turntable.webp", quality=80, method=2, **options)


def _encoder() -> str | None:
    """Return the path of ffmpeg: imageio-ffmpeg's, or the one on PATH."""
    try:
        return importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # RuntimeError: imageio-ffmpeg without a binary for this system
        return shutil.which("ffmpeg")


def _write_mp4(path: Path, frames: list[Image.Image], seconds: float) -> None:
    """Encode one round as H.264, each picture shown for `seconds`; players repeat it on request."""
    encoder = _encoder()
    assert encoder is not None  # check_turntable
    side = frames[0].width
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{side}x{side}", "-r", f"{1 / seconds:.4f}", "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    pixels = b"".join(frame.tobytes() for frame in frames)
    done = subprocess.run([encoder, "-loglevel", "error", "-y", *source, *target], input=pixels, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"{encoder}: {lines[-1] if lines else f'exit code {done.returncode}'}")
