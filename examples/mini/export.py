"""Checkpoint folder `<out>/model`, in float16, into which each script writes its networks."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from gafext import AutoencoderKL, MultiViewDiffusionPipeline
from gafext.models.base import PretrainedModel
from gafext.models.head_detector import HeadDetector
from gafext.models.head_fitter import HeadFitter

GUIDANCE_SCALE = 1.5


def half(module: nn.Module) -> nn.Module:
    return deepcopy(module).cpu().to(memory_format=torch.contiguous_format).half()


def export_vae(out: Path, vae: AutoencoderKL, *, scale: float, shift: float) -> None:
    """Write the autoencoder, whose latents have mean 0 and variance 1 after (z - shift) * scale."""
    vae = half(vae)
    vae.config = replace(vae.config, scaling_factor=scale, shift_factor=shift)
    vae.save_pretrained(out / "model" / "vae")


def load_vae(out: Path, device: torch.device) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(out / "model" / "vae", device=device).requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


def export(out: Path, **parts: object) -> None:
    """Write components of a pipeline into the folder, keeping its other components."""
    folder = out / "model"
    alone: dict[str, type[PretrainedModel]] = {"head_detector": HeadDetector, "head_fitter": HeadFitter}
    for name, network in alone.items():  # trained without a pipeline around them
        if (folder / name).is_dir():
            parts[name] = network.from_pretrained(folder / name)
    parts = {name: half(part) if isinstance(part, nn.Module) else part for name, part in parts.items()}
    if (folder / "model_index.json").exists():
        pipeline = MultiViewDiffusionPipeline.from_pretrained(folder, dtype=torch.float16, device="cpu")
        for name, part in parts.items():
            setattr(pipeline, name, part)
    else:
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float16)
        pipeline = MultiViewDiffusionPipeline(vae=vae, guidance_scale=GUIDANCE_SCALE, **parts)
    pipeline.save_pretrained(folder)
