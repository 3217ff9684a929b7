"""The U-Net configuration of ImageDream and MVDream in diffusers folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gafext.config.base import Config, Ints, require
from gafext.config.unet import UNetConfig


@dataclass(frozen=True)
class LDMUNetConfig(Config):
    """What `unet/config.json` of class MultiViewUNetModel says, in the words of latent diffusion's own code.

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
        self.to_unet()  # values that make no U-Net are an error of this file

    def to_unet(self) -> UNetConfig:
        """The same network in our words."""
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
        # These sizes are constants of the published code, in no file.
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
