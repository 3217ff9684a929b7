"""From what a user names to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from gafext.errors import CheckpointNotFoundError

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")

FOLDERS = ("unet", "vae", "image_encoder", "text_encoder", "tokenizer", "scheduler", "upsampler")
"""The parts of a checkpoint that gafext reads; others, such as a safety checker, are not downloaded."""
_STEMS = ("diffusion_pytorch_model", "model")
_SMALL = ("*.json", "*.txt", "empty_prompt.safetensors")


def wanted_files(variant: str | None = None, folders: tuple[str, ...] = FOLDERS) -> list[str]:
    """Patterns, as the hub matches them, of the files that a checkpoint needs: no pickles and no other variant.

    Args:
        variant: "fp16" takes the files that carry it in their name.
        folders: parts of the checkpoint.
    """
    part = f".{variant}" if variant else ""
    # Shards of an index, and those of diffusers' older spelling, which has the variant behind their number.
    names = [f"{stem}{part}{shard}.safetensors" for stem in _STEMS for shard in ("", "-*-of-?????")]
    if variant:
        names += [f"{stem}-*-of-?????{part}.safetensors" for stem in _STEMS]
    return ["model_index.json", "empty_prompt.safetensors"] + [
        f"{folder}/{place}{name}" for folder in folders for place in ("", "*/") for name in (*_SMALL, *names)
    ]


def checkpoint_folder(
    path_or_repo_id: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    folders: tuple[str, ...] = FOLDERS,
) -> Path:
    """A checkpoint's folder: the path itself, or the hub's local copy of a repository, with the needed files alone.

    Args:
        path_or_repo_id: a folder, or "owner/name". In offline mode (HF_HUB_OFFLINE=1) the hub's cache is all there is.
        revision: of the repository: a branch, a tag or a commit; None is its main branch.
        variant: "fp16" takes the weights that carry it in their name.
        folders: parts of the checkpoint.

    Raises:
        CheckpointNotFoundError: no such folder, and no such repository, revision or variant of weights (or
            huggingface_hub is not installed).
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
        patterns = wanted_files(variant, folders)
        folder = Path(snapshot_download(path_or_repo_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's errors have no common base: HTTP, offline mode, names, gates
        raise CheckpointNotFoundError(f"{path_or_repo_id}: no such folder, and the hub says: {error}") from error
    if not any(folder.rglob("*.safetensors")):
        raise CheckpointNotFoundError(
            f"{path_or_repo_id}: expected safetensors weights"
            + (f" of variant {variant!r}" if variant else " without a variant")
            + f" in {', '.join(folders)}, got none"
        )
    return folder
