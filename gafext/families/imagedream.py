"""ImageDream's and MVDream's checkpoints in diffusers folders, with latent diffusion's configuration and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gafext.cameras import Cameras
from gafext.config import Config, UNetConfig
from gafext.config.base import Ints, require
from gafext.errors import CameraError
from gafext.families.base import Family, Shapes
from gafext.weights.keys import KeyRule, ldm_unet_rule


@dataclass(frozen=True)
class LDMUNetConfig(Config):
    """Configuration of a MultiViewUNetModel (`unet/config.json`), with the names of latent diffusion's code.

    Source: github.com/ashawkey/mvdream_diffusers: mv_unet.py; ImageDream (arXiv 2312.02201), MVDream (2308.16512).
    """

    class_name: ClassVar[str] = "MultiViewUNetModel"
    only: ClassVar[dict[str, tuple]] = {"conv_resample": (True,), "dims": (2,), "num_heads_upsample": (-1,)}
    without_effect: ClassVar[frozenset[str]] = frozenset({"dropout", "use_checkpoint"})

    in_channels: int
    out_channels: int
    model_channels: int
    num_res_blocks: int | Ints
    attention_resolutions: Ints
    context_dim: int
    image_size: int | None = None
    channel_mult: Ints = (1, 2, 4, 8)
    num_heads: int = -1
    num_head_channels: int = -1
    transformer_depth: int = 1
    camera_dim: int | None = None
    ip_dim: int = 0
    ip_weight: float = 1.0

    def __post_init__(self) -> None:
        self.to_unet()  # raises for invalid values, so that the error names this file

    def to_unet(self) -> UNetConfig:
        """Return the configuration of the same network with diffusers' names."""
        channels = tuple(self.model_channels * factor for factor in self.channel_mult)
        attends = [2**stage in self.attention_resolutions for stage in range(len(channels))]
        return UNetConfig(
            sample_size=self.image_size,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
            block_out_channels=channels,
            layers_per_block=self.num_res_blocks,
            transformer_layers_per_block=self.transformer_depth,
            attention_head_dim=self._heads(channels),
            cross_attention_dim=self.context_dim,
            use_linear_projection=True,
            class_embed_type="projection" if self.camera_dim is not None else None,
            projection_class_embeddings_input_dim=self.camera_dim,
            cross_view="dense",
            **self._image(),
        )

    def _heads(self, channels: Ints) -> Ints:
        width = self.num_head_channels
        if width == -1:
            require(self.num_heads > 0, "num_heads or num_head_channels: expected one of them above 0, got neither")
            return (self.num_heads,) * len(channels)
        require(
            width > 0 and all(count % width == 0 for count in channels),
            f"num_head_channels={width}: expected a divisor of each of {list(channels)}",
        )
        return tuple(count // width for count in channels)

    def _image(self) -> dict[str, Any]:
        if self.ip_dim == 0:
            return {}
        # These sizes are constants in the published code; no file contains them.
        resampler = {"image_embed_dim": 1280, "resampler_depth": 4, "resampler_heads": 12}
        return {
            "image_attention": "decoupled",
            "image_scale": float(self.ip_weight),
            "image_projection": "resampler",
            "image_tokens": self.ip_dim,
            "resampler_width": self.context_dim,
            "image_unconditional": "zero_features",
            **resampler,
        }


class ImageDream(Family):
    """Dense attention over all views, flattened camera-to-world poses, the portrait's latents as an extra frame.

    MVDream's checkpoints belong to this family too: they have neither image tokens nor the extra frame.

    Source: ImageDream (arXiv 2312.02201) section 3; MVDream (arXiv 2308.16512) section 3.
    """

    unet_class_names = frozenset({LDMUNetConfig.class_name})
    guidance_scale = 5.0
    prompts = ("",)
    background = (127, 127, 127)  # the mean of its random greys: extern/ImageDream/imagedream/ldm/util.py

    def owns(self, config: UNetConfig) -> bool:
        return config.cross_view == "dense"

    def unet_config(self, values: dict[str, Any], shapes: Shapes, *, source: str) -> UNetConfig:
        return LDMUNetConfig.from_dict(values, source=source).to_unet()

    def key_rule(self, config: UNetConfig) -> KeyRule:
        return ldm_unet_rule(config)

    def poses(self, config: UNetConfig, cameras: Cameras) -> Tensor:
        assert config.pose_dim is not None
        poses = blender_poses(cameras, config.pose_dim)
        if self.has_reference_frame(config):
            poses = torch.cat([poses, torch.zeros_like(poses[:1])])
        return poses

    def has_reference_frame(self, config: UNetConfig) -> bool:
        return config.image_attention is not None


FAMILY = ImageDream()


def blender_poses(cameras: Cameras, dim: int) -> Tensor:
    """Encode cameras for ImageDream's and MVDream's pose MLP: camera-to-world, Blender's axes, distance 1.

    Args:
        cameras: V cameras.
        dim: 16, the 4 x 4 matrix flattened row by row.

    Returns:
        [V,16] float32.

    Raises:
        CameraError: `dim` is not 16, or a camera is at the origin and has no direction.

    Source: MVDream (arXiv 2308.16512) section 3.2.
    """
    if dim != 16:
        raise CameraError(f"pose: expected 16 (c2w, 4 x 4) numbers per camera, got {dim}")
    y_up_to_z_up = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], device="cpu")
    poses = y_up_to_z_up @ cameras.opengl_c2w
    distance = poses[:, :3, 3].norm(dim=1, keepdim=True)
    if (distance < 1e-6).any():
        raise CameraError("cameras: expected none at the origin, got one")
    poses[:, :3, 3] /= distance
    return poses.flatten(1)
