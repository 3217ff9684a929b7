"""What is to be made: one output folder per portrait, and which of them are there already."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gafext.atomic import check_target
from gafext.cameras import Cameras
from gafext.errors import OutputError
from gafext.mesh import Mesh
from gafext.output import VIEW_FILES, json_clean
from gafext.portraits.claim import hidden
from gafext.weights import read_json, write_json

log = logging.getLogger(__name__)

PICTURES = {
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".heic", ".heif", ".avif"),  # read_image says what it needs for them where it is not installed
}
"""Suffixes of the files of a folder that are taken for pictures."""
FAILURES = "failures.json"
_ELSEWHERE = ("portrait", "out", "overwrite", "quiet", "json", "log_level", "batch", "device")
"""Options that say where and how to compute, not what: a folder made with others of them is kept."""


_NONE: Mapping[str, str] = {}
_CONFIGURATIONS = ("model_index.json", "config.json", "scheduler_config.json")
_BLOCKS, _BLOCK = 64, 2**16  # parts of a file of weights that are compared, and their bytes


@dataclass(frozen=True)
class Job:
    """A portrait and its output folder."""

    portrait: Path
    folder: Path


def is_many(arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask for a folder per portrait: several, or a folder of portraits."""
    return len(arguments) > 1 or any(map(os.path.isdir, arguments))


def list_pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder by name, without hidden files; with links that lead nowhere, which fail later."""
    return [path for path in _visible(folder) if path.suffix.lower() in PICTURES and not path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _left_out(folder: Path, taken: Sequence[Path]) -> list[str]:
    """Name what a folder has beside the pictures that are taken: files, and folders of pictures but gafext's own."""
    others = [path for path in _visible(folder) if path not in taken]
    holds = (path for path in others if path.is_dir() and not (path / "run.json").exists() and list_pictures(path))
    return [path.name for path in others if not path.is_dir()] + [f"{path.name}/" for path in holds]


def find_jobs(arguments: Sequence[str], out: str | os.PathLike) -> list[Job]:
    """List the portraits in the order given, those of a folder by name, and name the folder of each after its file.

    Of portraits with the same name the second gets "NAME-2", and so on, with a warning; another names what of a folder
    is not taken.

    Args:
        arguments: files, and folders of pictures, of which hidden ones are left out; the same file twice counts once.
        out: folder that the output folders are in.

    Raises:
        ValueError: a folder has no pictures.
    """
    found: dict[str, Path] = {}
    for argument in map(Path, arguments):
        paths = [argument]
        if argument.is_dir():
            paths = list_pictures(argument)
            if left := _left_out(argument, paths):
                more = f" and {len(left) - 5} more" if len(left) > 5 else ""
                log.warning("%s: not taken for pictures, by their suffix: %s%s", argument, ", ".join(left[:5]), more)
            if not paths:
                raise ValueError(f"{argument}: expected portraits in it ({', '.join(sorted(PICTURES))}), got none")
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    jobs, taken = [], {FAILURES}
    for path in found.values():
        stem = path.stem.lstrip(".") or "portrait"  # hidden folders are temporary ones
        name, count = stem, 1
        while name.casefold() in taken:  # some file systems do not tell "A" from "a"
            count += 1
            name = f"{stem}-{count}"
        taken.add(name.casefold())
        jobs.append(Job(path, Path(out) / name))
        if name != stem:
            log.warning("%s: its views go to %s, because %s is another portrait's", path, jobs[-1].folder, stem)
    return jobs


def missing(
    jobs: Iterable[Job], command: Mapping[str, Any], *, inputs: Mapping[str, str] = _NONE, overwrite: bool
) -> list[Job]:
    """Return the jobs whose folders are not there; with `overwrite` also those made with other options.

    Args:
        jobs: the jobs.
        command: options of the command, as run.json has them.
        inputs: digests of what the options name, of `digests`.
        overwrite: replace folders that were made with other options or from other pictures or cameras.

    Raises:
        OutputError: without `overwrite`, a folder was made with other options or from other pictures or cameras; or it
            holds files that gafext did not write, or cannot be written.
    """
    todo = []
    for job in jobs:
        if job.folder.exists() and (reason := _difference(job, command, inputs)) is None:
            continue
        if job.folder.exists() and not overwrite and reason:
            raise OutputError(
                f"{job.folder}: expected a result of the same portrait and options, got one with {reason}; repeat the "
                "earlier options, pass another --out, or replace such results (--overwrite)"
            )
        check_target(job.folder, VIEW_FILES if overwrite else None)
        todo.append(job)
    return todo


def record(
    job: Job, command: Mapping[str, Any], portrait_sha256: str, inputs: Mapping[str, str] = _NONE
) -> dict[str, Any]:
    """Return what run.json says of a job, which `missing` compares.

    Args:
        job: the job.
        command: options of the command.
        portrait_sha256: digest of the portrait when it was read.
        inputs: digests of what the options name, of `digests`.
    """
    return {
        "command": {**command, "portrait": str(job.portrait)},
        "portrait_sha256": portrait_sha256,
    } | ({"inputs_sha256": dict(inputs)} if inputs else {})


def digests(options: Mapping[str, Any], command: Mapping[str, Any] = _NONE) -> dict[str, str]:
    """Return digests of what a run's options name: cameras, normal maps or mesh, renders, and files of weights."""
    given = {name: options.get(name) for name in ("cameras", "normal_maps", "renders")}
    weights = {name: Path(command[name]) for name in ("model", "lora", "ip_adapter", "mv_adapter") if name in command}
    digests = {name: _digest(_contents(value)) for name, value in given.items() if value is not None}
    return digests | {name: _digest(_sample(path)) for name, path in weights.items() if path.exists()}


def _sample(path: Path) -> Iterator[bytes]:
    """Yield the names, sizes and parts of the files of a checkpoint: 64 blocks, or all of a file that is no larger.

    A checkpoint may take longer to read as a whole than its views to make, and training changes all of a file.
    """
    # The folder may hold other things, such as results, and links of a cache that lead nowhere.
    found = (file for file in path.rglob("*") if file.suffix == ".safetensors" or file.name in _CONFIGURATIONS)
    for file in sorted(filter(Path.is_file, found)) if path.is_dir() else [path]:
        size = file.stat().st_size
        yield repr((file.relative_to(path).as_posix(), size)).encode()
        apart = max(_BLOCK, (size - _BLOCK) // (_BLOCKS - 1))  # from block to block
        with file.open("rb") as content:
            for part in range(_BLOCKS):
                content.seek(part * apart)
                yield content.read(_BLOCK)


def _contents(value: Any) -> Iterator[bytes]:
    if isinstance(value, Cameras):
        yield from (value.w2c.numpy().tobytes(), value.intrinsics(1).numpy().tobytes())
        if value.tracking is not None:
            yield repr(value.tracking.frames).encode()
            names = sorted({str(frame.get("flame_param_path")) for frame in value.tracking.frames})
            yield from (file.read_bytes() for file in map(value.tracking.folder.joinpath, names) if file.is_file())
    elif isinstance(value, Mesh):
        yield from (value.vertices.tobytes(), value.faces.tobytes())
    else:
        for picture in value:
            yield from (repr((picture.mode, picture.size)).encode(), picture.tobytes())


def _difference(job: Job, command: Mapping[str, Any], inputs: Mapping[str, str]) -> str | None:
    """Say how an existing folder differs from what the job would make; "" if it is no result at all, None if not."""
    try:
        run = read_json(job.folder / "run.json")
        made = dict(run["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    wanted = json_clean(dict(command))
    names = sorted((made.keys() | wanted.keys()) - set(_ELSEWHERE))
    others = [
        f"{name} {made.get(name)} (now {wanted.get(name)})" for name in names if made.get(name) != wanted.get(name)
    ]
    # A portrait that has gone since, or cannot be read any more, has nothing to be compared with.
    with contextlib.suppress(OSError):
        if run.get("portrait_sha256") != file_digest(job.portrait):
            others.append("another picture")
    before = run.get("inputs_sha256", inputs)  # results of before this was recorded are kept
    others += [f"other {name.replace('_', ' ')}" for name in inputs if before.get(name, inputs[name]) != inputs[name]]
    return ", ".join(others) or None


def _digest(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return _digest(iter(lambda: file.read(2**20), b""))


def check_out(out: Path) -> None:
    """Raise an OutputError if the folder of the output folders cannot be written, or has a foreign failures.json."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: expected a writable folder, got {existing}, which cannot be written")
    path = out / FAILURES
    try:
        known = not path.exists() or isinstance(read_json(path)["failures"], list)
    except (ValueError, KeyError):
        known = False
    if not known:
        raise OutputError(f"{path}: expected gafext's list of failures or no such file; pass another --out")


def write_failures(out: Path, failures: Sequence[Mapping[str, str]]) -> None:
    """Write failures.json as a whole, or remove it if nothing failed."""
    path = out / FAILURES
    temporary = hidden(path)
    if failures:
        write_json(temporary, {"failures": list(failures)})
        temporary.replace(path)
    else:
        path.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)  # of a run that was killed
