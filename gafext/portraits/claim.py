"""The right to make one output folder: held by a lock that ends with the process, however it ends."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from gafext.errors import OutputError

_LONGEST = 240  # bytes of a name: a file system takes 255


class Claim:
    """A hidden folder beside the output folder, `.gafext-NAME`, to write into; locked while the claim is held.

    A process that is killed leaves the hidden folder without its lock: the next claim of the same output empties it.

    Attributes:
        target: the output folder.
        new: where to write it, on the same file system; does not exist yet.
    """

    def __init__(self, target: Path, descriptor: int):
        self.target, self._folder, self._descriptor = target, hidden(target), descriptor
        self.new = self._folder / "views"

    @classmethod
    def take(cls, target: Path) -> Claim | None:
        """Claim an output folder; None while another process holds it.

        Raises:
            OutputError: the parent folder cannot be written.
        """
        folder = hidden(target)
        try:
            while True:
                folder.mkdir(parents=True, exist_ok=True)
                descriptor = _lock(folder)
                if descriptor is None:
                    return None
                if descriptor >= 0:
                    break
            for path in folder.iterdir():
                shutil.rmtree(path)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written ({error})") from None
        return cls(target, descriptor)

    def publish(self) -> None:
        """Rename the new folder to the output folder; an older one is removed only after that has succeeded."""
        old = self._folder / "old"
        if self.target.exists():
            self.target.rename(old)
        try:
            self.new.rename(self.target)
        except OSError:
            if old.exists():
                old.rename(self.target)
            raise

    def release(self) -> None:
        """Remove the hidden folder and give the claim up."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._descriptor)


def hidden(target: Path) -> Path:
    """Return the hidden folder of an output folder, `.gafext-NAME`; of a long name, with a digest in its place."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return target.with_name(f".gafext-{name}")


def _lock(folder: Path) -> int | None:
    """Return the descriptor of a locked folder; None if another process has the lock, -1 if the folder has gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks: processes have to be given portraits of their own, as torchrun's are
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)  # it was released, and perhaps made anew, since it was opened
    return -1
