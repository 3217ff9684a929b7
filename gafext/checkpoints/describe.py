"""Description of any checkpoint folder or file from its headers: what it is, what is read, or why it is refused."""

from __future__ import annotations

import fnmatch
import warnings
from pathlib import Path
from typing import Any

from gafext import weights
from gafext.config.unet import image_projection_fields
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.families import families, family_name
from gafext.models.base import PretrainedModel
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.clip_text import CLIPTextEncoder
from gafext.models.head_detector import HeadDetector
from gafext.models.head_fitter import HeadFitter
from gafext.models.image_normalizer import ImageNormalizer
from gafext.models.k_unet import KUNet
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.upsampler import LatentUpsampler
from gafext.weights.hub import FOLDERS, PROMPTS, STEMS, checkpoint_folder, missing_file_advice, wanted_files
from gafext.weights.keys import ip_adapter_rule, mv_adapter_key
from gafext.weights.lora_keys import is_factor, other_forms

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
_ADAPTERS = {"pooled": "IP-Adapter", "resampler": "IP-Adapter Plus", "mlp": "full-face IP-Adapter"}
_NETWORKS: dict[str, type[PretrainedModel]] = {
    "AutoencoderKL": AutoencoderKL,
    "StableUnCLIPImageNormalizer": ImageNormalizer,
    "HeadDetector": HeadDetector,
    "HeadFitter": HeadFitter,
    "clip": CLIPVisionEncoder,
    "clip_vision_model": CLIPVisionEncoder,
    "clip_text_model": CLIPTextEncoder,
}
"""Class that loads a network, by `_class_name` or `model_type` of its `config.json`; the U-Nets are the families'."""


def describe(
    path_or_repo_id: str | Path, *, variant: str | None = None, subfolder: str | None = None
) -> dict[str, Any]:
    """Describe a checkpoint without reading its weights.

    Everything that loading would check is checked, except the values of the weights.

    Args:
        path_or_repo_id: any folder or file, or a hub id, whose files are downloaded.
        variant: variant in the names of the weight files, such as "fp16".
        subfolder: folder inside the path or repository that is the checkpoint.

    Returns:
        A JSON object: `path`; `kind`; `family`, or None; `parts`, by name: `network`, `dtype`, `parameters`, `bytes`,
        `files`; `reads`, the files that gafext looks at; `ignores`, the reason for each other file; `notes`; and
        `refused`, the reason, or None.
    """
    result: dict[str, Any] = {"path": str(path_or_repo_id), "kind": "unknown", "family": None, "parts": {}}
    result |= {"reads": [], "ignores": {}, "notes": [], "refused": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if Path(path_or_repo_id).is_file():
                _describe_file(result, Path(path_or_repo_id))
            else:
                folder = checkpoint_folder(path_or_repo_id, variant=variant, subfolder=subfolder)
                try:
                    _describe_folder(result, folder, variant)
                except CheckpointNotFoundError as error:
                    advice = missing_file_advice(path_or_repo_id, folder)
                    raise CheckpointNotFoundError(f"{error}{advice}") from None
        except (ValueError, OSError) as error:
            result["refused"] = str(error)
    result["notes"] += sorted({str(warning.message) for warning in caught})
    return result


def lines(description: dict[str, Any]) -> list[str]:
    """Format a description as text; the reason of a refusal is not part of it."""
    text = [f"{description['path']}: {description['kind']}"]
    if description["family"]:
        text.append(f"family: {description['family']}")
    if description["parts"]:
        text.append("parts:")
        text += [
            f"  {name}: {part['network']}, {part['dtype']}, {part['parameters'] / 1e6:.1f} M parameters, "
            f"{part['bytes'] / 1e6:.1f} MB"
            for name, part in description["parts"].items()
        ]
        text.append(f"size: {sum(part['bytes'] for part in description['parts'].values()) / 1e6:.1f} MB")
    for title in ("reads", "ignores", "notes"):
        entries = description[title]
        if entries:
            entries = [f"{name}: {reason}" for name, reason in entries.items()] if title == "ignores" else entries
            text += [f"{title}:", *(f"  {entry}" for entry in entries)]
    return text


def _describe_folder(result: dict[str, Any], folder: Path, variant: str | None) -> None:
    load = MultiViewDiffusionPipeline.from_pretrained
    if (folder / "model_index.json").is_file() or any((folder / name).is_dir() for name in ("unet", "vae")):
        result["kind"] = "checkpoint, for --model"
        if _has_k_blocks(folder / "unet" / "config.json"):
            result["kind"] = "latent upsampler, for upsampler/ in a checkpoint or `gafext assemble --upsampler`"
            load = LatentUpsampler.from_pretrained
    elif (folder / "config.json").is_file():
        network = _network(folder / "config.json")
        result["kind"] = f"one network, for {network.__name__}.from_pretrained"
        load = network.from_pretrained
    else:
        names = sorted(path.name for path in folder.iterdir())
        raise CheckpointError(
            f"{folder}: expected a checkpoint (unet/, vae/, scheduler/), or one network (config.json and its weights), "
            f"got {', '.join(names[:8]) or 'an empty folder'}"
            + (". Name one of the files to see what it is" if any(folder.glob("*.safetensors")) else "")
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading warns of the same
        _describe_files(result, folder, variant)
    loaded: Any = load(folder, device="meta", variant=variant)
    unet = getattr(loaded, "unet", loaded)
    if isinstance(unet, MultiViewUNet):
        result["family"] = family_name(unet.config)


def _has_k_blocks(config: Path) -> bool:
    return config.is_file() and "KCrossAttnDownBlock2D" in str(weights.read_json(config).get("down_block_types"))


def _network(path: Path) -> type[PretrainedModel]:
    """Return the class that loads the network of a `config.json`."""
    values = weights.read_json(path)
    name, kind = values.get("_class_name"), values.get("model_type")
    if _has_k_blocks(path):
        return KUNet
    unets = {class_name for family in families().values() for class_name in family.unet_class_names}
    known = {**dict.fromkeys(sorted(unets), MultiViewUNet), **_NETWORKS}
    network = known.get(str(name if name is not None else kind))
    if network is None:
        raise CheckpointError(
            f"{path}: expected the _class_name or model_type {', '.join(known)}, got {name or kind!r}"
        )
    return network


def _describe_files(result: dict[str, Any], folder: Path, variant: str | None) -> None:
    """Add the parts, the files that are read, and the reasons for those that are not."""
    reads: set[Path] = set()
    for config in sorted(folder.rglob("config.json")):
        part, name = config.parent, str(config.parent.relative_to(folder))
        if name.split("/")[0] not in (*FOLDERS, ".") or name.endswith("upsampler/vae"):
            continue
        try:
            path = _find_weights(part, weights.available_variant(part, variant, checkpoint=folder))
            file = weights.WeightFile(path)
            network = weights.read_json(config)
        except CheckpointError:
            continue  # loading names the reason
        title = network.get("_class_name") or network.get("architectures") or "unknown"
        title = ", ".join(map(str, title)) if isinstance(title, list) else str(title)
        result["parts"][part.name if name == "." else name] = _part(file, title, folder)
        reads |= {path, *file.files}
    patterns = [*wanted_files(), "config.json"]
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        small = path.suffix != ".safetensors" or path.name in PROMPTS
        small = small and ".safetensors.index" not in path.name
        if path in reads or (small and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)):
            result["reads"].append(name)
        else:
            result["ignores"].update([_reason(path, name)])


def _reason(path: Path, name: str) -> tuple[str, str]:
    """Return the name to list an ignored file under, and why it is ignored."""
    if path.suffix == ".py":
        return name, "code, never run"
    top = name.split("/")[0]
    if top != name and top not in FOLDERS:
        return f"{top}/", "not a component that gafext has"
    if path.suffix in _PICKLES:
        return name, "pickled weights, never opened"
    return name, "weights of another variant or layout" if ".safetensors" in path.name else "not needed"


def _find_weights(folder: Path, variant: str | None) -> Path:
    try:
        return weights.find_weights(folder, STEMS[0], variant)
    except CheckpointNotFoundError:
        return weights.find_weights(folder, STEMS[1], variant)


def _part(file: weights.WeightFile, network: str, folder: Path) -> dict[str, Any]:
    counts = file.count()
    return {
        "network": network,
        "dtype": ", ".join(_TYPES.get(kind, kind) for kind in sorted(counts)),
        "parameters": sum(counts.values()),
        "bytes": sum(path.stat().st_size for path in file.files),
        "files": [str(path.relative_to(folder)) for path in file.files],
    }


def _describe_file(result: dict[str, Any], path: Path) -> None:
    if path.suffix not in (".safetensors", *_PICKLES):
        raise CheckpointError(f"{path}: expected a folder or a .safetensors file, got a file of another kind")
    weights.require_safetensors(path)
    file = weights.WeightFile(path)
    result["parts"]["file"], result["reads"] = _part(file, "unknown", path.parent), [path.name]
    part, others = result["parts"]["file"], other_forms(file)
    file.rename(weights.unwrapped_rule(file))
    if others or any(map(is_factor, file)):
        result["kind"], part["network"] = "LoRA, for --lora", "LoRA"
        if others:
            raise CheckpointError(f"{path}: expected a LoRA, got {' and '.join(others)}, which gafext does not merge")
    elif any(mv_adapter_key(key) != key for key in file):
        result["kind"], part["network"] = "MV-Adapter, for --mv-adapter", "MV-Adapter"
    elif any(key.startswith(("image_proj.", "image_proj_model.")) for key in file):
        result["kind"] = "IP-Adapter, for --ip-adapter"
        file.rename(ip_adapter_rule((), file))
        kind = image_projection_fields(file.shapes).get("image_projection")
        if kind not in _ADAPTERS:
            raise CheckpointError(f"{path}: expected an IP-Adapter, plain, Plus or full-face, got one of another kind")
        part["network"] = _ADAPTERS[kind]
    elif any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in file):
        result["kind"], part["network"] = "Stable Diffusion in one file, for `gafext assemble --parent`", "all"
        for network in (MultiViewUNet, AutoencoderKL):
            network.from_single_file(path, device="meta")
    else:
        raise CheckpointError(
            f"{path}: expected a LoRA, IP-Adapter, MV-Adapter or Stable Diffusion in one file, got the keys "
            f"{', '.join(sorted(file)[:4]) or 'of no tensor'}. For the weights of one network, name the folder with "
            "its config.json"
        )
