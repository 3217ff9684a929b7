"""Files of a checkpoint: JSON, and the location of a network's weights."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

from gafext.errors import CheckpointError, CheckpointNotFoundError

MAX_JSON_BYTES, MAX_KEY = 2**24, 1000
_LFS = b"version https://git-lfs.github.com/spec/"


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value or not key.isprintable() or len(key) > MAX_KEY:
            raise ValueError(f"{'repeated' if key in value else 'damaged'} key {key[:MAX_KEY]!r}")
        value[key] = item
    return value


def parse_json(text: str) -> Any:
    """Parse JSON; invalid JSON, and repeated, unprintable or overlong keys, are a ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_json_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> dict:
    """Read a JSON object from a file of at most 16 MiB.

    Raises:
        CheckpointError: the file is missing, is not valid JSON, or holds something other than an object.
    """
    try:
        if not path.is_file():  # reading a named pipe would block
            raise CheckpointNotFoundError(f"{path}: no such file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes: expected at most {MAX_JSON_BYTES}")
        require_content(path)
        value = parse_json(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def require_content(path: Path) -> None:
    """Raise a CheckpointError if a file is the pointer that `git clone` without git-LFS leaves in its place.

    Source: github.com/git-lfs/git-lfs: docs/spec.md.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS)) != _LFS:
            return
    raise CheckpointError(
        f"{path}: a git-LFS pointer, expected the file that it stands for. Download it: "
        f"git -C {shlex.quote(str(path.parent))} lfs pull"
    )


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Path:
    """Find the weights of one network: a safetensors file, or the index of a sharded one.

    Accepted names: `<stem>.safetensors`, `<stem>.<variant>.safetensors`, `<stem>.safetensors.index.json`, and for an
    index of a variant `<stem>.safetensors.index.<variant>.json` or one of its two older spellings.

    Args:
        folder: folder of the network, such as `checkpoint/unet`.
        stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers).
        variant: variant in the file's name, such as "fp16".

    Raises:
        CheckpointError: the folder has only pickled weights; the message has a command that converts them.
        CheckpointNotFoundError: the folder or the file does not exist; the message lists the variants that do.
    """
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: no such folder")
    part = f".{variant}" if variant else ""
    single = f"{stem}{part}.safetensors"
    indices = (f"{stem}.safetensors.index{part}.json", f"{single}.index.json", f"{stem}.safetensors{part}.index.json")
    for name in (*indices, single):
        if (folder / name).is_file():
            return folder / name
    present = ", ".join(sorted(p.name for p in folder.glob("*.safetensors*") if p.is_file())) or "none"
    variants = sorted({v for p in folder.glob("*.safetensors*") for v in _variants(p.name, stem)})
    hint = f"; variants: {', '.join(variants)}" if variants else ""
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    chosen = _pickles_of(pickles, "pytorch_model" if stem == "model" else stem, part)
    if chosen:
        listed = ", ".join(chosen if len(chosen) < 4 else [*chosen[:2], f"{len(chosen) - 2} more"])
        raise CheckpointError(f"{folder}: has {listed} but no {single}{hint}. {_pickle_advice(chosen, single)}")
    others = f"; pickles: {', '.join(pickles)}" if pickles else ""
    lacking = "a link that leads nowhere" if (folder / single).is_symlink() else "no such file"
    raise CheckpointNotFoundError(f"{folder / single}: {lacking} (safetensors files there: {present}{hint}{others})")


def _pickles_of(names: list[str], stem: str, part: str) -> list[str]:
    """Select the pickled weights of a variant: one file, or all shards."""
    single = [name for name in names if re.fullmatch(rf"{re.escape(stem + part)}\.(bin|pt|pth|ckpt)", name)]
    shards = rf"{re.escape(stem)}({re.escape(part)}-\d+-of-\d+|-\d+-of-\d+{re.escape(part)})\.bin"
    named = single[:1] or [name for name in names if re.fullmatch(shards, name)]
    return named or (names if len(names) == 1 and not part else [])


def available_variant(folder: Path, variant: str | None, *, checkpoint: Path) -> str | None:
    """Return the variant, or None with a warning if only other folders of the checkpoint have weights of it.

    Args:
        folder: folder of one component, with its subfolders.
        variant: variant in the names of the weight files, such as "fp16".
        checkpoint: folder of all components.
    """

    def has(place: Path) -> bool:
        return any(re.search(rf"\.{re.escape(variant or '')}[.-]", path.name) for path in place.rglob("*.safetensors*"))

    if variant is None or has(folder) or not has(checkpoint) or not any(folder.rglob("*.safetensors")):
        return variant
    warnings.warn(f"{folder}: no weights of variant {variant!r}: those without a variant are read", stacklevel=2)
    return None


def _variants(name: str, stem: str) -> list[str]:
    """Return the variant in the name of a weight file, "None" for a file without one, [] for another stem."""
    match = re.fullmatch(
        rf"{re.escape(stem)}(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(\w+))?\.json)?", name
    )
    return [match[1] or match[2] or "None"] if match else []


def _pickle_advice(pickles: list[str], target: str, *, nested: bool = False) -> str:
    """Say how to convert pickled weights, one file or the shards of one network, beside the target."""
    load = f"torch.load('{pickles[0]}', map_location='cpu', weights_only=True)"
    if len(pickles) > 1:
        shards = re.sub(r"-\d+-of-", "-*-of-", pickles[0])
        load = (
            f"{{k: v for p in glob.glob('{shards}') "
            "for k, v in torch.load(p, map_location='cpu', weights_only=True).items()}"
        )
    modules = "torch, safetensors.torch as s" if len(pickles) == 1 else "glob, torch, safetensors.torch as s"
    flat = "{k: v.contiguous().clone() for k, v in d.get('state_dict', d).items()}"
    if nested:  # an IP-Adapter: a dictionary of dictionaries as published, flat as its trainer saves it
        flat = (
            "{k: v.contiguous().clone() for a, b in d.items() "
            "for k, v in ({f'{a}.{c}': b[c] for c in b} if isinstance(b, dict) else {a: b}).items()}"
        )
    return (
        "Pickled weights can run code when they are opened, so gafext does not read them. Convert once: "
        f"python -c \"import {modules}; d = {load}; s.save_file({flat}, '{target}')\""
    )


def require_safetensors(path: Path, *, nested: bool = False) -> None:
    """Raise a CheckpointError unless the path is a safetensors file; the message has a command to convert a pickle."""
    if path.is_dir():
        found = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) or "none"
        raise CheckpointError(f"{path}: expected a .safetensors file, got a folder; pass weight_name=, of: {found}")
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise CheckpointError(
            f"{path}: expected a .safetensors file, or weight_name= beside a folder or hub id, got neither"
        )
    if path.suffix != ".safetensors":
        advice = _pickle_advice([path.name], path.with_suffix(".safetensors").name, nested=nested)
        raise CheckpointError(f"{path}: expected a .safetensors file. {advice}")
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: no such file")
