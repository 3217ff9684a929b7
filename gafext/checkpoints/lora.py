"""Low-rank adaptations (LoRA, arXiv 2106.09685) of the U-Net, merged into its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gafext import weights
from gafext.errors import CheckpointError
from gafext.models.int8 import require_floats
from gafext.models.unet import MultiViewUNet
from gafext.weights.lora_keys import lora_rule, other_forms

_ADDED = ("gaussian", "orthogonal", "eva", "mica")  # beginnings of peft that leave the weights below as they are
_TEXT = ("text_encoder", "lora_te_", "lora_te1_", "lora_te2_", "base_model.model.text_model")


class _Factors(NamedTuple):
    """Keys in the file of one module's tensors."""

    down: str
    up: str
    mid: str | None
    alpha: str | None


@torch.no_grad()
def merge_lora(unet: MultiViewUNet, path: str | Path, *, scale: float = 1.0) -> list[str]:
    """Merge the low-rank updates of a LoRA file into the weights of a U-Net, at no cost for inference.

    W ← W + scale · alpha/r · up · down, computed in float32; convolution kernels are flattened. With a middle factor,
    the kernel's: W[o,i] ← W[o,i] + scale · alpha/r · Σ_ab up[o,a] mid[a,b] down[b,i].

    Args:
        unet: network whose linear layers and convolutions are updated, on any device; unchanged if the file does not
            fit.
        path: a safetensors file of peft, diffusers (`unet.*.lora_A`, `.lora.down`, `processor.to_q_lora.down`) or
            kohya (`lora_unet_*.lora_down`, `.lora_mid`, `.alpha`), with diffusers' or latent diffusion's block names.
        scale: weight of the updates; -1 reverts a merge with 1, up to rounding.

    Returns:
        Warnings: one message if the file has updates of a text encoder, which are ignored.

    Raises:
        CheckpointError: the file is a pickle, is missing or damaged, or does not fit; the message lists all wrong keys.
        ValueError: the scale is not finite, or the weights are 8-bit integers.

    Source: arXiv 2106.09685 eq. 3; LyCORIS (arXiv 2309.14859), Tucker decomposition; diffusers:
    loaders/lora_conversion_utils.py.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    require_floats(unet, "lora")
    path = Path(path)
    weights.require_safetensors(path)
    file = weights.WeightFile(path)
    targets = {
        name.removesuffix(".weight"): value
        for name, value in unet.state_dict().items()
        if name.endswith(".weight") and value.ndim > 1
    }
    text = [key for key in file if key.startswith(_TEXT)]
    factors = _match(file, set(file) - set(text), targets, lora_rule(targets, unet.config))
    scalings = _read_scalings(path, file.metadata)
    merged = {}
    for name, keys in factors.items():
        weight, rank = targets[name], file.shapes[keys.down][0]
        scaling = scalings(name, rank) if keys.alpha is None else file.number(keys.alpha) / rank
        update = _product(file, keys, weight.device)
        result = weight.float() + (scale * scaling * update).view(weight.shape)
        if not result.isfinite().all() or result.abs().max() > torch.finfo(weight.dtype).max:
            raise CheckpointError(f"{path}: {name}: the sum is beyond {weight.dtype} at scale={scale}")
        merged[f"{name}.weight"] = result.to(weight.dtype)
    unet.load_state_dict(merged, strict=False, assign=True)
    return [f"{path}: {len(text)} tensors for a text encoder are ignored: no text is encoded here"] if text else []


def _product(file: weights.WeightFile, keys: _Factors, device: torch.device) -> Tensor:
    """Multiply the factors of one module; the kernels of a convolution are flattened."""
    down, up = (file.tensor(key).to(device, torch.float32).flatten(1) for key in (keys.down, keys.up))
    if keys.mid is None:
        return up @ down
    mid = file.tensor(keys.mid).to(device, torch.float32).flatten(2)
    return torch.einsum("oa,abk,bi->oik", up, mid, down)


def _match(
    file: weights.WeightFile,
    keys: Iterable[str],
    targets: dict[str, Tensor],
    rule: Callable[[str], tuple[str, str] | None],
) -> dict[str, _Factors]:
    """Match the factors of each module; a CheckpointError lists all unknown and unpaired keys and wrong shapes."""
    unknown: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        name, part = rule(key) or ("", "")
        if name not in targets or part in found.get(name, ()):
            unknown.append(key)
        else:
            found.setdefault(name, {})[part] = key
    unpaired = [key for parts in found.values() if not {"down", "up"} <= parts.keys() for key in parts.values()]
    factors = {
        name: _Factors(parts["down"], parts["up"], parts.get("mid"), parts.get("alpha"))
        for name, parts in found.items()
        if {"down", "up"} <= parts.keys()
    }
    shapes = [text for name, keys in factors.items() for text in _wrong_shapes(name, keys, file.shapes, targets[name])]
    if unknown or unpaired or shapes or not factors:
        others = other_forms(unknown)
        advice = (
            f": {' and '.join(others)}, which gafext does not merge. Merge it into the U-Net with the program that "
            "trained it, and load the result without a LoRA"
            if others
            else ""
        )
        raise CheckpointError(
            f"{file.path}: no LoRA that fits this U-Net{advice}"
            + weights.listing("unknown keys", unknown)
            + weights.listing("keys without their partner", unpaired)
            + weights.listing("wrong shapes", shapes)
        )
    return factors


def _wrong_shapes(name: str, keys: _Factors, shapes: dict[str, tuple[int, ...]], weight: Tensor) -> Iterator[str]:
    down, up = shapes[keys.down], shapes[keys.up]
    rank, inputs = (down[0] if down else 0), weight[0].numel()
    if keys.mid is not None:
        expected, inputs = (rank, rank, *weight.shape[2:]), weight.shape[1]
        if shapes[keys.mid] != expected or weight.ndim != 4:
            yield f"{keys.mid}: expected {list(expected)} for {name}, got {list(shapes[keys.mid])}"
    if rank == 0 or math.prod(down[1:]) != inputs or len(down) < 2:
        yield f"{keys.down}: expected [r, {inputs}] for {name}, got {list(down)}"
    elif len(up) < 2 or up[0] != weight.shape[0] or math.prod(up[1:]) != rank:
        yield f"{keys.up}: expected [{weight.shape[0]}, {rank}] for {name}, got {list(up)}"


def _of_unet(settings: dict[str, Any]) -> dict[str, Any]:
    """Select the U-Net's of a pipeline's settings; those that a U-Net saved alone have no prefix."""
    if not any(key.startswith(("unet.", "text_encoder")) for key in settings):
        return settings
    return {key.removeprefix("unet."): value for key, value in settings.items() if key.startswith("unet.")}


def _read_scalings(path: Path, metadata: dict[str, str]) -> Callable[[str, int], float]:
    """Return a function for alpha/r of a module without an alpha in the file: from peft's settings, or 1.

    diffusers stores the settings in the file's metadata, peft in adapter_config.json beside the file. The keys of an
    alpha_pattern are regular expressions of the ends of names.
    """
    source, settings = path, {}
    try:
        if "lora_adapter_metadata" in metadata:
            settings = _of_unet(weights.parse_json(metadata["lora_adapter_metadata"]))
        elif path.stem == "adapter_model" and path.with_name("adapter_config.json").is_file():
            source = path.with_name("adapter_config.json")
            settings = weights.read_json(source)
        default, pattern = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
        alphas = [(re.compile(rf"(.*\.)?({key})"), float(alpha)) for key, alpha in pattern.items()]
        default = None if default is None else float(default)
        finite = all(math.isfinite(alpha) for alpha in (*(alpha for _, alpha in alphas), default or 0))
        if not finite or settings.get("use_dora"):
            raise ValueError("alpha that is no number, or DoRA")
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise CheckpointError(f"{source}: expected the settings of a LoRA, got {error}") from None
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower() not in _ADDED:
        raise CheckpointError(
            f"{source}: init_lora_weights={begun!r}: expected updates of the U-Net's own weights, got those of others "
            "that were made of them. Save it with peft's path_initial_model_for_weight_conversion, as a plain LoRA"
        )

    def scaling(name: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in alphas if pattern.fullmatch(name)), default)
        return 1.0 if alpha is None else alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    return scaling
