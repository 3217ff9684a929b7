"""Sizes and settings of training, for all scripts; a rung is one set of settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gafext.config import CLIPVisionConfig, KUNetConfig, UNetConfig, VAEConfig

LATENTS = 8
"""Channels of the latents: one latent pixel encodes 4 x 4 image pixels."""
_LEVEL = 128  # gafext.upsampler.LEVEL_CHANNELS, the first part of the condition
_TEXT = 8  # width of the upsampler's empty prompt, which is all zeros


@dataclass(frozen=True)
class Rung:
    """Network sizes, batch sizes and learning rates."""

    image_size: int
    """Side in pixels of the images decoded from the U-Net's latents; the upsampler doubles it."""
    vae: VAEConfig
    image_encoder: CLIPVisionConfig
    unet: UNetConfig
    upsampler: KUNetConfig
    vae_batch: int
    unet_batch: int
    """Latents per step: heads times views."""
    upsampler_batch: int
    upsampler_pool: int
    """Number of heads, with one view each, in the upsampler's pool."""
    upsampler_fresh: int
    """Number of heads in that pool that are replaced at a time."""
    pool_heads: int
    """Number of heads, with 8 views each, in the U-Net's pool."""
    fresh_heads: int
    """Number of heads in that pool that are replaced at a time."""
    fresh_every: int = 1
    """Number of steps between replacements."""
    pool_limit: int = 0
    """Number of heads up to which the U-Net's pool grows before the oldest are replaced; 0: it does not grow."""
    snr_divisor: float = 1.0
    """Divisor of the signal-to-noise ratio of Stable Diffusion's schedule, for latents larger than 16 x 16."""
    upsampler_fresh_every: int = 1
    """Number of steps between replacements."""
    measured_heads: int = 8
    vae_rate: float = 1e-3
    unet_rate: float = 1e-3
    encoder_rate: float = 2e-4
    """Lower than the U-Net's rate, at which the image encoder diverges and the U-Net learns to ignore it."""
    upsampler_rate: float = 2e-3


def _vae(widths: tuple[int, ...], groups: int) -> VAEConfig:
    return VAEConfig(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=LATENTS,
        norm_num_groups=groups,
    )


def _clip(image_size: int, patch_size: int, layers: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        projection_dim=None,
        num_hidden_layers=layers,
        num_attention_heads=3,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act="gelu",
    )


def _unet(sample_size: int, widths: tuple[int, ...], attended: tuple[bool, ...]) -> UNetConfig:
    return UNetConfig(
        sample_size=sample_size,
        in_channels=2 * LATENTS,
        out_channels=LATENTS,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=tuple(width // 32 for width in widths),
        cross_attention_dim=96,
        use_linear_projection=True,
        norm_num_groups=4,
        class_embed_type="projection",
        addition_embed_type="image",
        projection_class_embeddings_input_dim=12,
        cross_view="position",
        image_attention="block",
        image_embed_dim=96,
    )


def _upsampler(widths: tuple[int, ...]) -> KUNetConfig:
    stages = len(widths)
    return KUNetConfig(
        in_channels=2 * LATENTS,
        out_channels=LATENTS + 1,
        down_block_types=("KDownBlock2D",) + ("KCrossAttnDownBlock2D",) * (stages - 1),
        up_block_types=("KCrossAttnUpBlock2D",) * (stages - 1) + ("KUpBlock2D",),
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=32,
        cross_attention_dim=_TEXT,
        time_embedding_dim=widths[-1],
        time_cond_proj_dim=_LEVEL + _TEXT,
        conv_in_kernel=3,
        conv_out_kernel=3,
        act_fn="gelu",
        mid_block_type=None,
        norm_num_groups=None,
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )


RUNGS = {
    "cpu": Rung(
        image_size=64,
        vae=_vae((16, 32, 64), groups=2),
        image_encoder=_clip(64, 8, layers=2),
        unet=_unet(16, (64, 96), (False, True)),
        upsampler=_upsampler((32, 64, 64)),
        vae_batch=16,
        unet_batch=24,
        upsampler_batch=8,
        upsampler_pool=256,
        upsampler_fresh=2,
        pool_heads=160,
        fresh_heads=1,
        fresh_every=3,
    ),
    "gpu": Rung(
        image_size=128,
        vae=_vae((32, 64, 64), groups=4),
        image_encoder=_clip(96, 8, layers=3),
        unet=_unet(32, (64, 96, 96), (False, True, True)),
        upsampler=_upsampler((32, 64, 64)),
        vae_batch=192,
        unet_batch=256,
        upsampler_batch=192,
        upsampler_pool=1536,
        upsampler_fresh=48,
        pool_heads=1024,
        fresh_heads=24,
    ),
}
RUNGS["sharp"] = replace(
    RUNGS["cpu"],
    image_size=128,
    image_encoder=_clip(96, 8, layers=2),
    unet=_unet(32, (64, 64, 96), (False, False, True)),
    vae_batch=8,
    upsampler_batch=4,
    upsampler_fresh=1,
    pool_heads=480,
    fresh_every=3,
    pool_limit=3000,
    snr_divisor=4.0,
    upsampler_fresh_every=3,
    vae_rate=5e-4,
    unet_rate=7e-4,
    encoder_rate=1e-4,
)
