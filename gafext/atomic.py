"""Atomic output: files and folders are written completely or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gafext.errors import OutputError

_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # what Finder and Explorer leave in folders they show


@dataclass(frozen=True)
class Replaceable:
    """Which folders may be replaced: those that have nothing but files of a pattern, and every one of some of them.

    Attributes:
        files: pattern of paths below the folder.
        always: files that what wrote the folder always wrote; others may have written the rest.
    """

    files: re.Pattern[str]
    always: tuple[str, ...] = ()


@contextmanager
def replace_whole(target: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `target`; its files replace those in `target` if the block ends without an error.

    So do the files in its folders. Every file is complete at any time, either old or new; only a crash between two
    renames leaves a mixture of both.

    Args:
        target: created with its parents if it does not exist.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=target))
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from None
    try:
        yield temporary
        folders = sorted(path for path in temporary.rglob("*") if path.is_dir())
        files = [path for path in temporary.rglob("*") if not path.is_dir()]
        files.sort(key=lambda path: (-len(path.parts), path.name == "model_index.json", path))
        moves = [(path, target / path.relative_to(temporary)) for path in (*folders, *files)]  # the outermost file last
        try:
            _check_moves(moves)
            for path, place in moves:
                _move(path, place)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_moves(moves: Sequence[tuple[Path, Path]]) -> None:
    """Raise an OSError for what stands in the way, before anything is moved."""
    for path, place in moves:
        if place.exists() and place.is_dir() != path.is_dir():
            raise FileExistsError(errno.EEXIST, f"expected a {'folder' if path.is_dir() else 'file'}", str(place))
        if place.parent.exists() and not os.access(place.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place.parent))


def _move(path: Path, place: Path) -> None:
    if path.is_dir():
        place.mkdir(exist_ok=True)
        return
    if path.parent.stat().st_dev != place.parent.stat().st_dev:  # a link to another disk
        with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=place.parent) as beside:
            os.replace(shutil.copy(path, beside), place)
        return
    os.replace(path, place)


@contextmanager
def whole_folder(folder: str | os.PathLike, *, replaceable: Replaceable | None = None) -> Iterator[Path]:
    """Yield a new folder to write into; it is renamed to `folder` if the block ends without an error.

    Args:
        folder: an empty folder or one that does not exist yet; its parents are created.
        replaceable: which folder that is not empty is replaced; None: none.

    Raises:
        OutputError: the folder cannot be written; it is unchanged.
    """
    target = Path(os.path.realpath(folder))
    with _staging(target, replaceable) as new:
        yield new
        check_target(target, replaceable)  # again, because another process may have written there meanwhile
        if target.exists():
            shutil.copymode(target, new)
        _swap(new, target)


def check_writable(folder: str | os.PathLike, *, replaceable: Replaceable | None = None) -> None:
    """Check in advance that `whole_folder` will accept a folder; nothing is left on the disk.

    Args:
        folder: as for `whole_folder`.
        replaceable: as for `whole_folder`.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
    """
    with _staging(Path(os.path.realpath(folder)), replaceable):
        pass


def check_target(target: Path, replaceable: Replaceable | None) -> None:
    """Check that a folder may be written, as `check_writable` does, without trying to."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target}: expected a folder, got a file")
    if target == Path.cwd() or target.is_mount():
        raise OutputError(
            f"{target}: expected a folder that can be replaced as a whole, got the current folder or a mount "
            f"point; pass a folder inside it, such as {target / 'views'}"
        )
    entries = sorted(path for path in target.iterdir() if path.name not in _SYSTEMS)
    if entries and replaceable is None:
        raise OutputError(
            f"{target}: expected a new or empty folder, got one that holds {_listing(entries)}; pass another "
            "folder, or overwrite (--overwrite)"
        )
    foreign = [
        path
        for path in sorted(target.rglob("*"))
        if replaceable and not _is_replaceable(path, target, replaceable.files)
    ]
    if foreign:
        raise OutputError(
            f"{target}: expected nothing but files that gafext wrote, got {_listing(foreign)}; pass another folder"
        )
    missing = [name for name in replaceable.always if not (target / name).is_file()] if entries and replaceable else []
    if missing:
        raise OutputError(
            f"{target}: expected a result of gafext, got a folder without {', '.join(missing)}, of files that other "
            "programs write too; pass another folder"
        )
    if not os.access(target, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: expected a writable folder, got one without write permission")


def _is_replaceable(path: Path, target: Path, files: re.Pattern[str]) -> bool:
    """Return whether a path below `target` is a file that may be replaced, or a folder that holds something."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    known = path.name in _SYSTEMS or files.fullmatch(path.relative_to(target).as_posix()) is not None
    return path.is_file() and known


def _listing(paths: list[Path]) -> str:
    names = ", ".join(path.name for path in paths[:5])
    return names + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


@contextmanager
def _staging(target: Path, replaceable: Replaceable | None) -> Iterator[Path]:
    """Yield a new folder beside `target`, on the same file system; it is removed when the block ends."""
    new = target.parent / f".gafext-{uuid.uuid4().hex[:8]}"
    missing: list[Path] = []
    try:
        check_target(target, replaceable)
        missing = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        yield new
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not empty: it holds the result
                parent.rmdir()


def _swap(new: Path, target: Path) -> None:
    """Rename `new` to `target`; an existing `target` is removed only after that has succeeded."""
    if not (target.exists() and any(target.iterdir())):
        new.replace(target)
        return
    old = new.with_name(f"{new.name}-old")
    try:
        target.rename(old)
        new.rename(target)
    finally:
        if not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
