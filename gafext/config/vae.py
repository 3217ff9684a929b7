"""Configuration of the autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gafext.config.base import Config, Ints, require, require_counts


@dataclass(frozen=True)
class VAEConfig(Config):
    """Configuration of a diffusers AutoencoderKL."""

    class_name: ClassVar[str] = "AutoencoderKL"
    only: ClassVar[dict[str, tuple]] = {
        "act_fn": ("silu", "swish"),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    }
    without_effect: ClassVar[frozenset[str]] = frozenset({"sample_size", "force_upcast"})

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: Ints = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None

    def __post_init__(self) -> None:
        stages = len(self.block_out_channels)
        for name, known in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            types = getattr(self, name)
            require(types == (known,) * stages, f"{name}={list(types)}: expected {known}, {stages} times")
        counts = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        require_counts(self, 4096, *counts)
        for channels in self.block_out_channels:
            require(
                0 < channels <= 65536 and channels % self.norm_num_groups == 0,
                f"{channels} channels do not divide into norm_num_groups={self.norm_num_groups}",
            )
        require(self.scaling_factor != 0, "scaling_factor is 0")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)


SD_VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
"""Autoencoder of Stable Diffusion: 83,653,863 parameters."""
