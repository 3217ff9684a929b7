"""The multi-view U-Net's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gafext.config.base import Config, Ints, require


@dataclass(frozen=True)
class UNetConfig(Config):
    """A diffusers UNet2DConditionModel, with the two attentions that make it multi-view.

    `cross_view` "position" gives every transformer block `attn_cv`; `image_attention` gives it `attn_ip`, and the
    U-Net an `image_projection` from `image_embed_dim` to `cross_attention_dim`. `attention_head_dim` is the NUMBER of
    heads of each stage, as it is (under that name) in every published Stable Diffusion configuration.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    only: ClassVar[dict[str, tuple]] = {
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "act_fn": ("silu", "swish"),
        "resnet_time_scale_shift": ("default",),
        "resnet_out_scale_factor": (1, 1.0),
        "time_embedding_type": ("positional",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
    }
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"dropout", "upcast_attention", "addition_embed_type_num_heads"}
    )

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: Ints = (320, 640, 1280, 1280)
    layers_per_block: int | Ints = 2
    transformer_layers_per_block: int | Ints = 1
    attention_head_dim: int | Ints = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    class_embed_type: str | None = None
    projection_class_embeddings_input_dim: int | None = None
    cross_view: str | None = None
    image_attention: bool = False
    image_embed_dim: int | None = None

    def __post_init__(self) -> None:
        stages = len(self.block_out_channels)
        require(stages > 0, "block_out_channels is empty")
        for name, known in (
            ("down_block_types", {"DownBlock2D", "CrossAttnDownBlock2D"}),
            ("up_block_types", {"UpBlock2D", "CrossAttnUpBlock2D"}),
        ):
            types = getattr(self, name)
            require(len(types) == stages, f"{name} has {len(types)} entries, block_out_channels {stages}")
            require(set(types) <= known, f"{name}={list(types)}: expected only {sorted(known)}")
        for name in (
            "layers_per_block",
            "transformer_layers_per_block",
            "attention_head_dim",
        ):
            value = getattr(self, name)
            require(
                not isinstance(value, tuple) or len(value) == stages,
                f"{name}={value}: expected {stages} entries, one a stage",
            )
            values = value if isinstance(value, tuple) else (value,)
            require(all(0 < v <= 4096 for v in values), f"{name}={value}: expected 1 to 4096")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            require(0 < channels <= 65536, f"block_out_channels has {channels}: expected 1 to 65536")
            require(
                self.norm_num_groups > 0 and channels % self.norm_num_groups == 0,
                f"{channels} channels do not divide into norm_num_groups={self.norm_num_groups}",
            )
            require(channels % heads == 0, f"{channels} channels do not divide into {heads} heads")
        for name in ("in_channels", "out_channels", "cross_attention_dim"):
            require(0 < getattr(self, name) <= 65536, f"{name}={getattr(self, name)}: expected 1 to 65536")
        require(self.class_embed_type in (None, "projection"), f"class_embed_type={self.class_embed_type!r}")
        require(
            (self.class_embed_type == "projection") == (self.projection_class_embeddings_input_dim is not None),
            "class_embed_type='projection' and projection_class_embeddings_input_dim go together",
        )
        require(
            self.cross_view in (None, "position"),
            f"cross_view={self.cross_view!r}: expected None or 'position'",
        )
        require(
            self.image_embed_dim is None or self.image_attention,
            "image_embed_dim is set, but image_attention is false",
        )

    def per_stage(self, value: int | Ints) -> Ints:
        """One number a stage, from a number or a tuple."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def heads(self) -> Ints:
        return self.per_stage(self.attention_head_dim)

    @property
    def pose_dim(self) -> int | None:
        return self.projection_class_embeddings_input_dim

    def to_dict(self) -> dict[str, Any]:
        # Without the two added attentions the network is diffusers' own, so diffusers' pipelines may load it by name.
        stock = self.cross_view is None and not self.image_attention
        return {**super().to_dict(), "_class_name": self.class_name if stock else "MultiViewUNet"}


SD21_UNET = UNetConfig(
    sample_size=32,
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
)
"""Stable Diffusion 2.1's U-Net: 865,910,724 parameters."""

SD21_MULTIVIEW_UNET = UNetConfig(
    sample_size=32,
    in_channels=8,
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    class_embed_type="projection",
    projection_class_embeddings_input_dim=12,
    cross_view="position",
    image_attention=True,
    image_embed_dim=1280,
)
"""The same, made multi-view: normal latents, camera pose, cross-view and image attention."""
