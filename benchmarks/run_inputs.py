"""What a run of the whole pipeline is given, as tensors: the same for gafext and its opponents."""

from typing import NamedTuple

from torch import Tensor

from gafext import MultiViewDiffusionPipeline
from gafext.conditions import Run
from gafext.families import family_of
from gafext.images import to_square_tensor


class Inputs(NamedTuple):
    """What a run is given, as tensors."""

    pixel_values: Tensor  # [1,3,s,s], CLIP's
    normal_maps: Tensor  # [V,3,H,W] in [-1,1]
    pose_embeds: Tensor  # [2V,12]
    latents: Tensor  # [V,4,h,w], noise
    upsampler_noise: Tensor  # [V,4,2h,2w]

    @classmethod
    def of(cls, pipe: MultiViewDiffusionPipeline, run: Run, upsampler_noise: Tensor) -> "Inputs":
        """Collect the inputs of a run of a gafext pipeline."""
        assert run.normal_maps is not None and pipe.image_encoder is not None
        poses = family_of(pipe.unet.config).poses(pipe.unet.config, run.cameras)
        normals = to_square_tensor(run.normal_maps, run.normal_maps[0].height)
        found = (pipe.image_encoder.preprocess(run.portraits[0]), 2 * normals - 1, poses.repeat(2, 1))
        found = (tensor.to(pipe.device, pipe.dtype) for tensor in found)
        return cls(*found, run.latents.to(pipe.device), upsampler_noise.to(pipe.device))
