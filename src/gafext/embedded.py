"""The pipeline that needs no download: every stage at a small size, with fixed random weights. It is untrained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from gafext.config import SD_SCHEDULE, CLIPVisionConfig, UNetConfig, VAEConfig
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.scheduler import scheduler_class

PORTRAIT = Path(__file__).parent / "assets" / "portrait.png"
"""Eileen Collins, NASA astronaut portrait, public domain; cropped from scikit-image's `astronaut` test picture."""

NOTICE = (
    "The built-in model is untrained: its weights are random, and its views are coloured noise. "
    "It shows that every stage runs; for pictures of heads, pass a checkpoint."
)


class UntrainedWarning(UserWarning):
    """The pipeline runs on random weights."""


_UNET = UNetConfig(
    sample_size=32,
    in_channels=8,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    attention_head_dim=(1, 2, 2),
    cross_attention_dim=64,
    use_linear_projection=True,
    norm_num_groups=8,
    class_embed_type="projection",
    projection_class_embeddings_input_dim=12,
    cross_view="position",
    image_attention=True,
    image_embed_dim=64,
)
_VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(8, 16, 16, 32),
    norm_num_groups=4,
)
_CLIP = CLIPVisionConfig(
    hidden_size=64,
    intermediate_size=256,
    projection_dim=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=14,
    hidden_act="gelu",
)


def embedded_parts(scheduler: str | None = None) -> dict[str, object]:
    """The small networks with weights from a fixed seed, as keyword arguments of the pipeline; DDIM unless named."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae, image_encoder = MultiViewUNet(_UNET), AutoencoderKL(_VAE), CLIPVisionEncoder(_CLIP)
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "image_encoder": image_encoder.eval(),
        "scheduler": scheduler_class(scheduler or "ddim").from_config(
            replace(SD_SCHEDULE, prediction_type="v_prediction")
        ),
    }
