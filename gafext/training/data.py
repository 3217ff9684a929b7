"""Training data: heads seen by several cameras, in GaussianAvatars' folders (VHAP) or with one transforms.json each."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from gafext.atomic import replace_whole
from gafext.cameras import read_transforms
from gafext.errors import CameraError
from gafext.training.checks import faults_of
from gafext.training.head import Head


class Named(Protocol):
    """A head in files or in a shard."""

    subject: str


HeadType = TypeVar("HeadType", bound=Named)
_RIGID_TOLERANCE = 1e-4
_MESHES = (".obj", ".ply", ".glb")
_NERSEMBLE = re.compile(r"(?:UNION\d*_)?(\d{3})_")  # sequences of a subject, in the names of VHAP and GaussianAvatars


def read_heads(root: str | Path, *, views: int = 2, thorough: bool = False) -> tuple[list[Head], list[str]]:
    """Read the heads below a folder, and list what is wrong with them.

    A folder with `transforms_{train,val,test}.json`, or else `transforms.json`, is one head per `timestep_index`. Other
    files of such names, as VHAP's `transforms_backup.json`, are not read. A picture that several files name, as VHAP's
    unions do, counts once. Pictures have to be there, and of one size per head; the cameras of one `camera_index` have
    to agree over the timesteps, in a union over those of each sequence. A split without frames is left out.

    Args:
        root: such a folder, or one that has them at any depth.
        views: number of views that a step takes of a head, of which none is taken twice.
        thorough: also decode every picture, and compare the cameras of a head on where the foreground is.

    Returns:
        Heads with nothing wrong in the order of their names, and one sentence per fault.

    Raises:
        ValueError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of training data, got none")
    heads, faults, seen = [], [], set()
    for folder in sorted(_folders(root)):
        found, wrong = _read_folder(folder, root, seen)
        faults += wrong
        for head in found:
            own = faults_of(head, views=views, thorough=thorough)
            faults += own
            heads += [] if own else [head]
    if not heads and not faults:
        faults.append(f"{root}: expected transforms_train.json or transforms.json in it or below, got none")
    return heads, faults


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders below a root that have a camera file, those behind links too, each once."""
    known = set()
    for name, folders, files in os.walk(root, followlinks=True):
        place = os.path.realpath(name)
        if place in known:
            folders.clear()  # a link back, or a second one
            continue
        known.add(place)
        if any(fnmatch.fnmatch(file, "transforms*.json") for file in files):
            yield Path(name)


class Files:
    """Heads in folders, with what `Shards` has too.

    Args:
        root: as for `read_heads`.
    """

    def __init__(self, root: str | Path):
        self.root = root

    def read_heads(self, *, views: int) -> tuple[list[Head], list[str]]:
        return read_heads(self.root, views=views)

    def open(self, heads: Sequence[Head], indices: Sequence[int]) -> Iterator[tuple[int, Head]]:
        """Yield some of `heads`."""
        return ((index, heads[index]) for index in indices)

    def extract(self, heads: Sequence[Head], folder: Path) -> list[Head]:
        """Return heads, whose files are there."""
        return list(heads)


def hold_out(heads: Sequence[HeadType], count: int) -> tuple[list[HeadType], list[HeadType]]:
    """Divide heads into those to train on and those to measure: the first moment of each of the last subjects.

    Of one subject its last moments are held out, with a warning: their measures say nothing of other people.

    Args:
        heads: heads, those of a subject in the order of their moments.
        count: number of subjects that are held out, with all their moments.

    Raises:
        ValueError: no subject is left to train on.
    """
    subjects = sorted({head.subject for head in heads})
    if len(subjects) == 1 and 0 < count < len(heads):
        warnings.warn(
            f"data: all heads are moments of one subject, {subjects[0]}: the last {count} are held out, of a person "
            "whom the model is trained on",
            stacklevel=2,
        )
        return list(heads[:-count]), list(heads[-count:])
    if len(subjects) <= count:
        raise ValueError(
            f"data: expected more than the {count} heads held out, got {len(subjects)} (timesteps of one subject are "
            "held out together); choose a smaller --validation"
        )
    measured = dict.fromkeys(subjects[len(subjects) - count :])
    known = [head for head in heads if head.subject not in measured]
    return known, [next(head for head in heads if head.subject == subject) for subject in measured]


def subject_of(name: str) -> str:
    """Return whose head a folder has, by its name: NeRSemble's three digits, or the whole name."""
    found = _NERSEMBLE.match(name.rpartition("/")[2])
    return found[1] if found else name


def write_index(path: Path, heads: Sequence[Head]) -> None:
    """Write `index.json`, for people to read: the files and cameras of each head."""
    text = json.dumps([head.describe() for head in heads], indent=1) + "\n"
    with replace_whole(path.parent) as new:
        (new / path.name).write_text(text, encoding="utf-8")


def _read_folder(folder: Path, root: Path, seen: set[str]) -> tuple[list[Head], list[str]]:
    """Read the heads of one folder; `seen` are the pictures of all folders."""
    # The splits hold different cameras and timesteps of one subject: all of them are read.
    files = [folder / f"transforms_{split}.json" for split in ("train", "val", "test")]
    files = [file for file in files if file.is_file()] or [folder / "transforms.json"]
    files = [file for file in files if not _is_empty(file)] or files[:1]
    heads: dict[int | str, Head] = {}
    name = root.resolve().name if folder == root else folder.relative_to(root).as_posix()
    subject = subject_of(name)
    faults, poses = [], {}
    for file in files if files[0].is_file() else ():
        try:
            cameras = read_transforms(file, pad=True)
            values = json.loads(file.read_text(encoding="utf-8-sig"))
        except CameraError as error:
            faults.append(str(error))
            continue
        for view, frame in enumerate(values["frames"]):
            wrong = _wrong_types(frame)
            if wrong:
                faults.append(f"{file}: frame {view}: {wrong}")
                continue
            picture = _with_extension(folder / frame["file_path"])
            if os.path.normpath(picture) in seen:
                continue
            seen.add(os.path.normpath(picture))
            time, camera, w2c = frame.get("timestep_index", 0), frame.get("camera_index"), cameras.w2c[view]
            # VHAP centres each sequence, and its unions name the pictures of several in their own folders.
            known = poses.setdefault((os.path.normpath(picture.parent), camera), w2c)
            if camera is not None and not torch.allclose(known, w2c, atol=_RIGID_TOLERANCE):
                faults.append(f"{file}: frame {view}: camera_index {camera} disagrees with its pose in another frame")
            head = heads.setdefault(time, Head(f"{name}/{time}" if "timestep_index" in frame else name, subject))
            _add(head, {**values, **frame}, folder, picture, w2c, cameras.intrinsics(1)[view])
    for time, head in heads.items():
        if not head.normals:
            head.mesh = _mesh(folder, time, alone=len(heads) == 1)
    return [heads[time] for time in sorted(heads, key=lambda time: (isinstance(time, str), time))], faults


def _mesh(folder: Path, time: int | str, *, alone: bool) -> Path | None:
    """Find the mesh of a moment, `meshes/3.obj` or `meshes/00003.obj`, or of a folder with one, `mesh.obj`."""
    names = [f"meshes/{time}", f"meshes/{time:05d}" if isinstance(time, int) else ""] + ["mesh"] * alone
    found = (folder / f"{name}{extension}" for name in names for extension in _MESHES)
    return next((path for path in found if path.is_file()), None)


def _is_empty(file: Path) -> bool:
    """Return whether a file has an empty list of frames, as VHAP's split of one camera or of three timesteps."""
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads(file.read_text(encoding="utf-8-sig"))
        return isinstance(values, dict) and values.get("frames") == []
    return False


def _wrong_types(frame: Any) -> str | None:
    """Say which field of a frame is not what it should be; None if all are."""
    for name, kinds in (
        ("file_path", (str,)),
        ("timestep_index", (int, str)),
        ("camera_index", (int, str, type(None))),
        ("fg_mask_path", (str, type(None))),
        ("mask_path", (str, type(None))),
    ):
        if (name == "file_path" or name in frame) and not isinstance(frame.get(name), kinds):
            return f"expected {name} of type {kinds[0].__name__}, got {frame.get(name)!r}"
    return None


def _add(head: Head, values: dict[str, Any], folder: Path, picture: Path, w2c: Tensor, lens: Tensor) -> None:
    """Add a frame to its head."""
    head.pictures.append(picture)
    head.sizes.append((values["w"], values["h"]) if "w" in values and "h" in values else None)
    mask = values.get("fg_mask_path") or values.get("mask_path")
    head.masks.append(None if mask is None else folder / mask)
    # Beside the pictures' folder too: the pictures of VHAP's unions are in other folders.
    normals = [place / "normals" / picture.name for place in (folder, picture.parent.parent)]
    head.normals += [normal for normal in normals if normal.is_file()][:1]
    head.w2c.append(w2c)
    head.intrinsics.append(lens)


def _with_extension(path: Path) -> Path:
    """Add the extension that nerfstudio and Blender may leave out."""
    named = [path.with_name(path.name + extension) for extension in ("", ".png", ".jpg", ".jpeg")]
    return next((candidate for candidate in named if candidate.is_file()), path if path.suffix else named[1])
