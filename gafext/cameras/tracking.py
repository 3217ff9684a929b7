"""What a head tracker's file says of each frame beside its camera: FLAME's parameters, timesteps, cameras' names.

Source: github.com/ShenhanQian/VHAP: vhap/export_as_nerf_dataset.py, which GaussianAvatars' loader reads.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gafext.errors import CameraError

CANONICAL = "canonical_flame_param.npz"
_FIELDS = (
    *("timestep_index", "timestep_index_original", "timestep_id"),
    *("camera_index", "camera_id", "flame_param_path"),
)
_PATH = re.compile(r"flame_param/[^/\\]+\.npz")


@dataclass(frozen=True)
class Tracking:
    """Fields of V frames that gafext hands on and does not use.

    Attributes:
        folder: where the file is, which `flame_param_path` is relative to.
        frames: of each view, those of VHAP's fields that its frame has.
    """

    folder: Path
    frames: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, folder: Path, frames: Sequence[Mapping[str, Any]]) -> Tracking | None:
        """Collect the fields of a file's frames; None if they have none."""
        found = tuple({name: frame[name] for name in _FIELDS if frame.get(name) is not None} for frame in frames)
        return cls(folder.resolve(), found) if any(found) else None

    def __getitem__(self, views: slice) -> Tracking:
        return Tracking(self.folder, self.frames[views])

    @property
    def has_flame(self) -> bool:
        """A frame has FLAME's parameters."""
        return any("flame_param_path" in frame for frame in self.frames)

    def flame_files(self) -> list[str]:
        """List the files of FLAME's parameters, relative to `folder`; none without `has_flame`.

        Raises:
            CameraError: a path leaves flame_param/, or a file is missing.
        """
        if not self.has_flame:
            return []
        names = [frame.get("flame_param_path") for frame in self.frames]
        for view, name in enumerate(names):
            if not _PATH.fullmatch(str(name)):
                raise CameraError(
                    f"frame {view}: expected flame_param_path of the form flame_param/NAME.npz, got {name!r}; "
                    "copy the file there, or remove the field from all frames"
                )
        names = [CANONICAL, *sorted(set(map(str, names)))]
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise CameraError(
                f"{self.folder}: expected {missing[0]} there, as a frame has flame_param_path, got no such file; "
                "copy it there, or remove the field from all frames"
            )
        return names

    def copy_flame_files(self, folder: Path) -> None:
        """Copy the files of FLAME's parameters into a folder, under the same names."""
        for name in self.flame_files():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)
