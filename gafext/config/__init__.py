"""Frozen configurations with diffusers' and transformers' field names.

Field defaults are those of the library that writes the file, because a missing key means that library's default.
The published configurations are the constants below each class.
"""

from gafext.config.base import Config
from gafext.config.clip import CLIP_VIT_H_14, CLIPVisionConfig
from gafext.config.clip_text import CLIP_VIT_H_14_TEXT, CLIP_VIT_L_14_TEXT, CLIPTextConfig
from gafext.config.scheduler import SD_SCHEDULE, EulerConfig, SchedulerConfig
from gafext.config.unet import SD21_MULTIVIEW_UNET, SD21_UNET, UNetConfig
from gafext.config.upsampler import SD_X2_SCHEDULE, SD_X2_UNET, KUNetConfig
from gafext.config.vae import SD_VAE, VAEConfig

__all__ = [
    "CLIP_VIT_H_14",
    "CLIP_VIT_H_14_TEXT",
    "CLIP_VIT_L_14_TEXT",
    "SD21_MULTIVIEW_UNET",
    "SD21_UNET",
    "SD_SCHEDULE",
    "SD_VAE",
    "SD_X2_SCHEDULE",
    "SD_X2_UNET",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "Config",
    "EulerConfig",
    "KUNetConfig",
    "SchedulerConfig",
    "UNetConfig",
    "VAEConfig",
]
