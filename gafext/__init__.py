"""gafext: one portrait in, several consistent views of the same head out."""

from gafext import cameras, ops
from gafext.assets import PORTRAIT
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.pipeline import MultiViewDiffusionPipeline, MultiViewOutput
from gafext.schedulers import DDIMScheduler
from gafext.upsampler import LatentUpsampler
from gafext.versions import version

__version__ = version()
__all__ = [
    "PORTRAIT",
    "AutoencoderKL",
    "CLIPVisionEncoder",
    "DDIMScheduler",
    "LatentUpsampler",
    "MultiViewDiffusionPipeline",
    "MultiViewOutput",
    "MultiViewUNet",
    "cameras",
    "ops",
]
