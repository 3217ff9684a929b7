"""Held-out heads of a run: their views, measured and drawn, and the folder that is published."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gafext import images
from gafext.atomic import Replaceable, whole_folder
from gafext.cameras import Cameras
from gafext.evaluation.measures import psnr, ssim
from gafext.families import family_of
from gafext.mesh import load_mesh
from gafext.output import MultiViewOutput
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.training.head import Head
from gafext.training.settings import Settings


def perceptual_distance(device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return LPIPS with AlexNet, a distance of images [N,3,H,W] in [0,1], or None where lpips is not installed.

    lpips downloads AlexNet's weights at its first use. Where they cannot be had, a warning says so, and this is None.

    Source: Zhang et al.: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv 1801.03924).
    """
    if importlib.util.find_spec("lpips") is None:
        return None
    try:
        network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).to(device).eval()
    except Exception as error:  # of the network, the disk, or torchvision beside another torch: training goes on
        warnings.warn(f"lpips: not measured, because it cannot be loaded: {error}", stacklevel=2)
        return None
    return lambda left, right: network(left.to(device), right.to(device), normalize=True).cpu()


@torch.no_grad()
def validate(
    pipeline: MultiViewDiffusionPipeline, heads: list[Head], folder: Path, settings: Settings, *, views: int
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Generate views of held-out heads, write them beside the true ones, and measure them.

    Args:
        pipeline: the pipeline.
        heads: the heads.
        folder: folder for one picture per head: generated views above the true ones.
        settings: denoising steps, angle of the portrait, seed.
        views: number of views, spread over the cameras of a head.

    Returns:
        Mean PSNR in dB and SSIM, and LPIPS where it is installed, by name; and the pictures, [H,W,3] uint8.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    if (lpips := perceptual_distance(pipeline.device)) is not None:
        measures["lpips"] = lpips
    scores, pictures = [], []
    background = family_of(pipeline.unet.config).background
    for index, head in enumerate(heads):
        chosen = torch.linspace(0, len(head.pictures) - 1, min(views, len(head.pictures))).round().long().tolist()
        cameras = Cameras(head.cameras.w2c[chosen], intrinsics=head.cameras.intrinsics(1)[chosen], size=1)
        normal_maps = None if head.mesh is None else load_mesh(head.mesh)
        if head.normals:
            normal_maps = [head.normal_map(view) for view in chosen]
        output = pipeline(
            head.picture(head.portraits(settings.portrait_angle)[0], background),
            cameras,
            normal_maps if pipeline.takes_normals else None,
            num_views=len(chosen),
            num_inference_steps=settings.validation_steps,
            generator=settings.seed,
            upsample="none",
            crop=False,
            output_type="pt",
            progress_bar=False,
        )
        assert isinstance(output, MultiViewOutput) and isinstance(output.images, Tensor)  # of one portrait, as asked
        made = output.images.cpu()
        true = images.to_square_tensor([head.picture(view, background) for view in chosen], made.shape[-1])
        scores.append([measure(made, true).mean() for measure in measures.values()])
        rows = torch.cat([torch.cat(list(made), dim=2), torch.cat(list(true), dim=2)], dim=1)
        picture = images.to_pil(rows[None])[0]
        picture.save(folder / f"{index:03d}.png")
        pictures.append(np.asarray(picture))
    return dict(zip(measures, torch.tensor(scores).mean(0).tolist(), strict=True)), pictures


_PARTS = "unet|vae|scheduler|image_encoder|image_normalizer|image_noising_scheduler|head_detector|head_fitter"
MODEL_FILES = Replaceable(
    re.compile(
        rf"(model_index\.json|README\.md|prompt_embeds\.safetensors|({_PARTS})/[^/]+|upsampler/((unet|scheduler)/)?[^/]+)"
    ),
    always=("model_index.json",),
)
"""What a trained checkpoint may take the place of: an earlier one."""


def publish(
    pipeline: MultiViewDiffusionPipeline,
    folder: Path,
    parent: str | Path,
    settings: Settings,
    steps: int,
    scores: dict[str, float],
) -> None:
    """Write the trained checkpoint with a model card."""
    with whole_folder(folder, replaceable=MODEL_FILES) as temporary:
        pipeline.save_pretrained(temporary)
        measured = ", ".join(f"{name} {value:.4g}" for name, value in scores.items()) or "not measured"
        (temporary / "README.md").write_text(
            f"# Multi-view head checkpoint\n\nTrained by `gafext train` from `{parent}`: {steps} steps, "
            f"weights trained: {settings.train}, seed {settings.seed}.\nHeld-out heads: {measured}.\n",
            encoding="utf-8",
        )
