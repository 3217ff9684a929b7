"""From what a user names to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from gafext.errors import CheckpointNotFoundError

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def checkpoint_folder(path_or_repo_id: str | Path) -> Path:
    """A checkpoint's folder: the path itself, or the hub's local copy of a repository (JSON and safetensors alone).

    Args:
        path_or_repo_id: a folder, or "owner/name".

    Raises:
        CheckpointNotFoundError: no such folder, and no such repository (or huggingface_hub is not installed).
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointNotFoundError(f"{path_or_repo_id}: expected a folder, got a file")
    if isinstance(path_or_repo_id, Path) or not _REPO_ID.fullmatch(path_or_repo_id):
        raise CheckpointNotFoundError(f"{path_or_repo_id}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointNotFoundError(
            f"{path_or_repo_id}: no such folder; as a hub id it needs huggingface_hub (pip install 'gafext[hub]')"
        ) from None
    try:
        return Path(snapshot_download(path_or_repo_id, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # the hub's errors have no common base: HTTP, offline mode, names, gates
        raise CheckpointNotFoundError(f"{path_or_repo_id}: no such folder, and the hub says: {error}") from error
