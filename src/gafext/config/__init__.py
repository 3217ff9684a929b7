"""Frozen configurations with diffusers' and transformers' field names.

Field defaults are those of the library that writes the file, because a key that a file leaves out means that value.
The published configurations are the constants below each class.
"""

from gafext.config.base import Config
from gafext.config.clip import CLIP_VIT_H_14, CLIPVisionConfig
from gafext.config.scheduler import SD_SCHEDULE, SchedulerConfig
from gafext.config.unet import SD21_MULTIVIEW_UNET, SD21_UNET, UNetConfig
from gafext.config.vae import SD_VAE, VAEConfig

__all__ = [
    "CLIP_VIT_H_14",
    "SD21_MULTIVIEW_UNET",
    "SD21_UNET",
    "SD_SCHEDULE",
    "SD_VAE",
    "CLIPVisionConfig",
    "Config",
    "SchedulerConfig",
    "UNetConfig",
    "VAEConfig",
]
