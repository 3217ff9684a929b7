"""Multi-view checkpoints from single-view parents: the added layers have no effect until they are trained."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gafext import weights
from gafext.checkpoints.folder import add_mv_adapter, prompt_embeds
from gafext.checkpoints.ip_adapter import load_ip_adapter
from gafext.config.scheduler import SD_SCHEDULE
from gafext.errors import CheckpointError
from gafext.families import family_of
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.int8 import require_floats
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.schedulers import DDIMScheduler, scheduler_from_pretrained
from gafext.upsampler import LatentUpsampler
from gafext.weights.keys import trained_key

LATENT_SIZE = 32
"""Latent size of GAF's views, which the upsampler doubles; Stable Diffusion's 64 or 96 is for use without it."""

_SD2_WIDTH = 1024  # of the text that Stable Diffusion 2's U-Nets attend to

# Added tensors that start as copies of the parent's, so that training starts from working attention.
_COPIES = (
    (r"\.norm_cv\.", ".norm1."),
    (r"\.attn_cv\.(?=to_[qkv]\.)", ".attn1."),
    (r"\.norm_ip\.", ".norm2."),
    (r"\.attn_ip\.(?=to_[qkv]\.)", ".attn2."),
)
# Layers whose output is added to the U-Net's hidden states; they start at zero.
_ZERO = re.compile(r"\.(attn_cv|attn_ip)\.to_out\.0\.|^class_embedding\.linear_2\.")


def assemble(
    parent: str | Path,
    *,
    image_encoder: str | Path | None = None,
    upsampler: str | Path | None = None,
    ip_adapter: str | Path | None = None,
    mv_adapter: str | Path | None = None,
    trained: str | Path | None = None,
    pose_dim: int = 12,
    prediction_type: str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> MultiViewDiffusionPipeline:
    """Assemble a multi-view pipeline that generates its parent's images until it is trained.

    With MV-Adapter, these are the adapter's views: it has the attention across views and to the portrait, and the
    cameras, so that only normal latents are added, and attn_ip if there is an image encoder.

    Args:
        parent: diffusers folder of Stable Diffusion (`unet/ vae/ scheduler/`), or its single safetensors file.
        image_encoder: folder of CLIP as saved by transformers; None: none, with MV-Adapter alone.
        upsampler: folder of the latent upscaler; None: no upsampler.
        ip_adapter: IP-Adapter file to use for image attention instead of attn_ip.
        mv_adapter: MV-Adapter file that belongs to the parent.
        trained: state dict of a trained U-Net of this form, to load into the result.
        pose_dim: numbers per camera, 12 or 16.
        prediction_type: what the U-Net of a single file predicts, "epsilon" or "v_prediction", which the file does not
            say; None: epsilon, with a warning for Stable Diffusion 2's, of which 2.1-base predicts epsilon and 2.1 v.
        dtype: dtype of the weights; None: float32.
        variant: variant in the names of the weight files, such as "fp16"; a folder without it is read without one, with
            a warning.

    Returns:
        The pipeline, on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the components do not fit together.
        ValueError: an image encoder is required, an MV-Adapter is for a U-Net that is not a stock one, or a
            prediction_type is unknown or given with a folder.
    """
    if image_encoder is None and (mv_adapter is None or ip_adapter is not None):
        raise ValueError("image_encoder: expected a folder, because the image attention reads its output, got none")
    parent = Path(parent)
    if parent.is_dir() and prediction_type is not None:
        raise ValueError(f"prediction_type: expected None, because {parent}/scheduler has it, got {prediction_type!r}")

    def options(folder: str | Path) -> dict[str, Any]:
        return {"dtype": dtype, "variant": weights.available_variant(Path(folder), variant, checkpoint=parent)}

    if parent.is_dir():
        unet = MultiViewUNet.from_pretrained(parent / "unet", **options(parent / "unet"))
        vae = AutoencoderKL.from_pretrained(parent / "vae", **options(parent / "vae"))
        scheduler = scheduler_from_pretrained(parent / "scheduler")
    else:
        unet = MultiViewUNet.from_single_file(parent, dtype=dtype)
        vae = AutoencoderKL.from_single_file(parent, dtype=dtype)
        scheduler = DDIMScheduler(replace(SD_SCHEDULE, prediction_type=prediction_type or "epsilon"))
        if prediction_type is None and unet.config.cross_attention_dim == _SD2_WIDTH:
            warnings.warn(
                f"{parent}: taken to predict epsilon, as Stable Diffusion 2.1-base does; 2.1 (768) predicts v with the "
                "same shapes, and the wrong one gives noise: pass --prediction-type (prediction_type)",
                stacklevel=2,
            )
    if mv_adapter is not None:
        unet, scheduler = add_mv_adapter(unet, scheduler, mv_adapter)
    encoder = None
    if image_encoder is not None:
        encoder = CLIPVisionEncoder.from_pretrained(image_encoder, **options(image_encoder))
    width = None if encoder is None or ip_adapter is not None else encoder.config.hidden_size
    unet = assemble_unet(unet, image_embed_dim=width, pose_dim=pose_dim)
    if ip_adapter is not None:
        load_ip_adapter(unet, ip_adapter)
    if trained is not None:
        load_trained(unet, trained)
    return MultiViewDiffusionPipeline(
        unet=unet,
        vae=vae,
        scheduler=scheduler,
        image_encoder=encoder,
        upsampler=None if upsampler is None else LatentUpsampler.from_pretrained(upsampler, **options(upsampler)),
        prompt_embeds=prompt_embeds(parent, unet, variant=variant),
        guidance_scale=family_of(unet.config).guidance_scale,
    )


def assemble_unet(
    parent: MultiViewUNet, *, image_embed_dim: int | None, pose_dim: int = 12, seed: int = 0
) -> MultiViewUNet:
    """Add attn_cv, attn_ip, normal latents, a pose MLP and an image projection to a stock U-Net, without effect yet.

    f_child(x, normals, pose, image) = f_parent(x) for every view until it is trained: the output projections of the new
    attention layers, the second layer of the pose MLP and the new input channels of conv_in are zero. The layers before
    them are copies of the parent's attention layers, or randomly initialised linear layers. A parent with MV-Adapter
    keeps its attention across views and its cameras instead of attn_cv and the pose MLP.

    Args:
        parent: U-Net without any of the additions.
        image_embed_dim: hidden width of the image encoder, 1280 for ViT-H/14; None: no attn_ip.
        pose_dim: numbers per camera, 12 or 16.
        seed: seed of the random initialisation.

    Returns:
        The multi-view U-Net; it shares the parent's tensors.

    Raises:
        CheckpointError: the parent already has some of the additions.
        ValueError: the parent's weights are 8-bit integers.
    """
    require_floats(parent, "parent")
    config = parent.config
    views = config.cross_view and not config.has_mv_adapter
    if views or config.image_attention or config.pose_dim or config.in_channels != config.out_channels:
        raise CheckpointError("unet: expected a stock U-Net without views, image, pose and normals, got one with some")
    if not config.has_mv_adapter:
        config = replace(
            config,
            sample_size=min(config.sample_size or LATENT_SIZE, LATENT_SIZE),
            class_embed_type="projection",
            projection_class_embeddings_input_dim=pose_dim,
            cross_view="position",
        )
    config = replace(
        config,
        in_channels=2 * config.in_channels,
        image_attention="block" if image_embed_dim else None,
        image_embed_dim=image_embed_dim,
    )
    with torch.device("meta"):
        child = MultiViewUNet(config)
    old, generator = parent.state_dict(), torch.Generator().manual_seed(seed)
    new = {name: _initial(name, blank, old, generator) for name, blank in child.state_dict().items()}
    child.load_state_dict(new, assign=True)
    return child.eval()


def _initial(name: str, blank: Tensor, old: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    like = next(iter(old.values()))
    if name == "conv_in.weight":
        added = old[name].new_zeros(old[name].shape[0], blank.shape[1] - old[name].shape[1], *blank.shape[2:])
        return torch.cat([old[name], added], dim=1)
    if name in old:
        return old[name]
    if _ZERO.search(name):
        return like.new_zeros(blank.shape)
    for pattern, source in _COPIES:
        if re.search(pattern, name):
            return old[re.sub(pattern, source, name)].clone()
    if blank.ndim == 1:
        return like.new_zeros(blank.shape)
    bound = blank.shape[1] ** -0.5
    return torch.empty(blank.shape).uniform_(-bound, bound, generator=generator).to(like)


def load_trained(unet: MultiViewUNet, path: str | Path) -> None:
    """Load a state dict written by training code into a multi-view U-Net.

    Args:
        unet: U-Net of the same configuration, such as `assemble_unet` returns.
        path: a safetensors file; keys may have prefixes of wrappers ("module.", "unet.", ...) and other common names
            of the additions (attn_mv, pose_embedding, ...).

    Raises:
        CheckpointError: the file is damaged, or names or shapes do not fit; the message lists all.
    """
    path = Path(path)
    weights.require_safetensors(path)
    weights.load_into(unet, weights.WeightFile(path, trained_key), dtype=unet.dtype, device=unet.device)
