"""Reading and writing the folder of a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gafext import weights
from gafext.atomic import replace_whole
from gafext.checkpoints.mv_adapter import with_mv_adapter
from gafext.checkpoints.prompts import encode_text
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.families import family_of
from gafext.guidance import check_guidance_scale
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.head_detector import HeadDetector
from gafext.models.head_fitter import HeadFitter
from gafext.models.image_normalizer import ImageNormalizer
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.schedulers import DDIMScheduler, Scheduler, scheduler_from_pretrained
from gafext.schedulers.schedule import shift_snr
from gafext.upsampler import EMPTY_PROMPT_NAME, LatentUpsampler

NetworkType = TypeVar(
    "NetworkType",
    MultiViewUNet,
    AutoencoderKL,
    CLIPVisionEncoder,
    LatentUpsampler,
    ImageNormalizer,
    HeadDetector,
    HeadFitter,
)

_LIBRARIES = {
    "unet": "gafext",
    "vae": "diffusers",
    "scheduler": "diffusers",
    "image_encoder": "transformers",
    "upsampler": "gafext",
    "image_normalizer": "diffusers",
    "image_noising_scheduler": "diffusers",
    "head_detector": "gafext",
    "head_fitter": "gafext",
}
"""Library that `model_index.json` names for each saved component."""


def load_parts(
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    variant: str | None,
    scheduler: str | None = None,
    mv_adapter: str | Path | None = None,
) -> dict[str, Any]:
    """Load the components of a pipeline.

    Args:
        folder: local folder of the checkpoint.
        dtype: dtype of the weights; None: float32.
        device: device of the weights; None: CPU; "meta": everything is checked except the values, which are not read.
        variant: variant in the names of the weight files, such as "fp16"; a component without it is read without a
            variant, with a warning.
        scheduler: a solver's short name; None: the checkpoint's.
        mv_adapter: MV-Adapter file to add to a stock U-Net.

    Returns:
        Keyword arguments of `MultiViewDiffusionPipeline`.

    Raises:
        CheckpointError: a file is missing or damaged.
        ValueError: an MV-Adapter for a U-Net that is not a stock one.
    """
    index_path = folder / "model_index.json"
    index = weights.read_json(index_path) if index_path.exists() else {}

    def is_null(name: str) -> bool:
        return index.get(name, ["library", "class"]) in (None, [None, None])

    def has(name: str) -> bool:
        return (folder / name).is_dir() and not is_null(name)

    def require(name: str, hint: str = "") -> None:
        if is_null(name):
            raise CheckpointError(f"{index_path}: expected a {name}, got null")
        if not has(name):
            raise CheckpointNotFoundError(f"{folder / name}: no such folder{hint}")

    def load(network: type[NetworkType], name: str) -> NetworkType:
        part = weights.available_variant(folder / name, variant, checkpoint=folder)
        return network.from_pretrained(folder / name, dtype=dtype, device=device, variant=part)

    for name in ("unet", "vae", "scheduler"):
        require(name)
    unet = load(MultiViewUNet, "unet")
    solver = scheduler_from_pretrained(folder / "scheduler", name=scheduler)
    if mv_adapter is not None:
        unet, solver = add_mv_adapter(unet, solver, mv_adapter)
    family = family_of(unet.config)
    guidance_scale = index.get("guidance_scale", family.guidance_scale)
    try:
        check_guidance_scale(guidance_scale)
    except ValueError as error:
        raise CheckpointError(f"{index_path}: {error}") from None
    labels = {}
    if family.portrait_labels:
        hint = (
            "; the U-Net's class labels need it: copy it from the published checkpoint or from its parent's, unCLIP's"
        )
        for name in ("image_normalizer", "image_noising_scheduler"):
            require(name, hint)
        labels["image_normalizer"] = load(ImageNormalizer, "image_normalizer")
        labels["image_noising_scheduler"] = DDIMScheduler.from_pretrained(folder / "image_noising_scheduler")
    return {
        "unet": unet,
        "vae": load(AutoencoderKL, "vae"),
        "scheduler": solver,
        # Also loaded for a U-Net without image attention, so that save_pretrained writes all loaded components.
        "image_encoder": load(CLIPVisionEncoder, "image_encoder") if has("image_encoder") else None,
        "upsampler": load(LatentUpsampler, "upsampler") if has("upsampler") else None,
        "prompt_embeds": prompt_embeds(folder, unet, variant=variant),
        "guidance_scale": guidance_scale,
        "head_detector": load(HeadDetector, "head_detector") if has("head_detector") else None,
        "head_fitter": load(HeadFitter, "head_fitter") if has("head_fitter") else None,
        **labels,
    }


def add_mv_adapter(unet: MultiViewUNet, scheduler: Scheduler, path: str | Path) -> tuple[MultiViewUNet, Scheduler]:
    """Add MV-Adapter to a stock U-Net, and the shift of its family to the noise schedule."""
    adapted = with_mv_adapter(unet, path)
    return adapted, type(scheduler)(shift_snr(scheduler.config, family_of(adapted.config).snr_shift))


def prompt_embeds(folder: Path, unet: MultiViewUNet, *, variant: str | None) -> Tensor | None:
    """Load the embeddings [P,T,C] of the family's P prompts, or compute them with the text encoder.

    Without either: None, or an error if the family cannot do without. None for a family without prompts.
    """
    family = family_of(unet.config)
    if not family.prompts:
        return None
    source = folder / family.prompt_file
    prompts = family.prompts if family.negative_prompt is None else (family.negative_prompt, *family.prompts)
    if source.is_file():
        file = weights.WeightFile(source)
        weights.check_keys(file, {"prompt_embeds": file.shapes.get("prompt_embeds", ())})
        embeds = file.tensor("prompt_embeds")
    elif (folder / "text_encoder").is_dir():
        source = folder / "text_encoder"
        variant = weights.available_variant(source, variant, checkpoint=folder)
        options = {"device": "meta" if unet.device.type == "meta" else None, "variant": variant}
        embeds = _encode_prompts(folder, prompts, required=bool(family.prompt_advice), **options)
    elif family.prompt_advice:
        raise CheckpointNotFoundError(
            f"{source}: no such file, and no text_encoder to make it with: the texts of the views. "
            f"{family.prompt_advice}"
        )
    else:
        return None
    count, width = len(prompts), unet.config.cross_attention_dim
    counts = (count,) if family.prompt_advice else (count, 1)  # the empty prompt alone may take the place of others
    if embeds.ndim != 3 or embeds.shape[0] not in counts or embeds.shape[1] == 0 or embeds.shape[2] != width:
        raise CheckpointError(f"{source}: prompt_embeds: expected [{count},T,{width}], got {list(embeds.shape)}")
    return embeds


def _encode_prompts(folder: Path, prompts: tuple[str, ...], *, required: bool, **options: Any) -> Tensor:
    """Encode the prompts [P,T,C], or the empty prompt [1,T,C] if they cannot be tokenized and are not required."""
    texts = prompts[0] if len(prompts) == 1 else list(prompts)
    try:
        return encode_text(folder, texts, **options).last_hidden_state
    except CheckpointError as error:
        if required or texts == "":
            raise
        warnings.warn(f"{error}; the empty prompt takes the place of {prompts[-1]!r}", stacklevel=2)
    return encode_text(folder, **options).last_hidden_state


def save_parts(components: Mapping[str, Any], folder: Path) -> None:
    """Write a folder that `load_parts` reads, whole or not at all; `model_index.json` has null for missing components.

    Args:
        components: keyword arguments of `MultiViewDiffusionPipeline`.
        folder: folder to write; files of these components are replaced when all are written.
    """
    index: dict[str, Any] = {
        "_class_name": "MultiViewDiffusionPipeline",
        "guidance_scale": components["guidance_scale"],
    }
    prompt_file = family_of(components["unet"].config).prompt_file
    with replace_whole(folder) as new:
        for name, library in _LIBRARIES.items():
            part, index[name] = components[name], [None, None]
            if part is not None:
                part.save_pretrained(new / name)
                class_name = getattr(getattr(part, "config", None), "class_name", type(part).__name__)
                index[name] = [library, "MultiViewUNet" if name == "unet" else class_name]
        if components["prompt_embeds"] is not None:
            weights.save_tensors({"prompt_embeds": components["prompt_embeds"]}, new / prompt_file)
        weights.write_json(new / "model_index.json", index)
        written = [path.relative_to(new) for path in new.rglob("*.safetensors")]
    # What was left by a pipeline that was saved here before.
    for path in written:
        weights.remove_shards(folder / path.parent, path.stem)
    prompts = [prompt_file, *([f"upsampler/{EMPTY_PROMPT_NAME}"] if components["upsampler"] is not None else [])]
    for stale in {*prompts} - {path.as_posix() for path in written}:
        (folder / stale).unlink(missing_ok=True)
