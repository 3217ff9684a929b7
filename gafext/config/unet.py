"""Configuration of the multi-view U-Net."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gafext.config.base import Config, Ints, require

MAX_LAYERS = 64  # limit of every count of layers: a damaged file must not build modules for minutes
_PROJECTION_SIZES = {
    "linear": ("image_embed_dim",),
    "mlp": ("image_embed_dim",),
    "pooled": ("image_embed_dim", "image_tokens"),
    "resampler": ("image_embed_dim", "image_tokens", "resampler_width", "resampler_depth", "resampler_heads"),
}
_IMAGE = ("image_", "resampler_")  # prefixes of the fields about the portrait


@dataclass(frozen=True)
class UNetConfig(Config):
    """Configuration of a diffusers UNet2DConditionModel with attention across views and to the portrait.

    `attention_head_dim` is the NUMBER of heads of each stage, which is the meaning of this name in every published
    Stable Diffusion configuration. Fields that diffusers does not have:

    `cross_view`: "position" adds `attn_cv` to every transformer block; "dense" makes `attn1` attend to all views;
        "front" makes `attn1` attend to the first view and the own view; "row" adds MV-Adapter: attention over rows of
        the views and to the portrait's features, and a ray encoder.
    `image_attention`: "block" (or `true`) adds `attn_ip` to every transformer block; "decoupled" adds keys and values
        of the image to `attn2`, and their attention output is added with the weight `image_scale`.
    `image_projection`: mapping from CLIP's output of width `image_embed_dim` to image tokens: "linear" maps each token
        of the output, "mlp" does so with two layers, "pooled" maps the projected embedding to `image_tokens` tokens,
        "resampler" maps all tokens to `image_tokens` tokens.
    `addition_embed_type`: "image" adds the first image token, CLIP's class token, to the embedding of the timestep, by
        the layers `add_embedding`; None does not.
    `image_unconditional`: image tokens of the unconditional pass. None: no tokens; "zero_features": the projection of
        zeros in place of CLIP's output; "zero_image": the tokens of an all-zero CLIP input.
    `family`: name of the module in `gafext/families` that reads the checkpoint; None: derived from the other fields.
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
        "quantization_config": (None, {"quant_method": "gafext_int8"}),  # the weight file says which layers
    }
    without_effect: ClassVar[frozenset[str]] = frozenset({"dropout", "addition_embed_type_num_heads"})

    sample_size: int | Ints | None = None
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
    upcast_attention: bool | None = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    projection_class_embeddings_input_dim: int | None = None
    cross_view: str | None = None
    image_attention: bool | str | None = None
    image_scale: float = 1.0
    image_projection: str | None = None
    image_embed_dim: int | None = None
    image_tokens: int | None = None
    resampler_width: int | None = None
    resampler_depth: int | None = None
    resampler_heads: int | None = None
    image_unconditional: str | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.sample_size, tuple) and len(set(self.sample_size)) == 1:
            object.__setattr__(self, "sample_size", self.sample_size[0])
        if isinstance(self.image_attention, bool):
            object.__setattr__(self, "image_attention", "block" if self.image_attention else None)
        if self.image_embed_dim is not None and self.image_projection is None:
            object.__setattr__(self, "image_projection", "linear")
        self._check_sizes()
        self._check_views_and_image()

    def _check_sizes(self) -> None:
        stages = len(self.block_out_channels)
        require(0 < stages <= MAX_LAYERS, f"block_out_channels has {stages} entries: expected 1 to {MAX_LAYERS}")
        for name, known in (
            ("down_block_types", {"DownBlock2D", "CrossAttnDownBlock2D"}),
            ("up_block_types", {"UpBlock2D", "CrossAttnUpBlock2D"}),
        ):
            types = getattr(self, name)
            require(len(types) == stages, f"{name} has {len(types)} entries, block_out_channels {stages}")
            require(set(types) <= known, f"{name}={list(types)}: expected only {sorted(known)}")
        for name, most in (
            ("layers_per_block", MAX_LAYERS),
            ("transformer_layers_per_block", MAX_LAYERS),
            ("attention_head_dim", 4096),
        ):
            value = getattr(self, name)
            require(
                not isinstance(value, tuple) or len(value) == stages,
                f"{name}={value}: expected {stages} entries, one per stage",
            )
            values = value if isinstance(value, tuple) else (value,)
            require(all(0 < v <= most for v in values), f"{name}={value}: expected 1 to {most}")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            require(0 < channels <= 65536, f"block_out_channels has {channels}: expected 1 to 65536")
            require(
                self.norm_num_groups > 0 and channels % self.norm_num_groups == 0,
                f"{channels} channels do not divide into norm_num_groups={self.norm_num_groups}",
            )
            require(channels % heads == 0, f"{channels} channels do not divide into {heads} heads")
        for name in ("in_channels", "out_channels", "cross_attention_dim"):
            require(0 < getattr(self, name) <= 65536, f"{name}={getattr(self, name)}: expected 1 to 65536")
        size = self.sample_size
        if isinstance(size, tuple):
            raise ValueError(f"sample_size={size}: expected a square")
        require(size is None or 0 < size <= 4096, f"sample_size={size}: expected 1 to 4096")
        require(self.class_embed_type in (None, "projection"), f"class_embed_type={self.class_embed_type!r}")
        require(
            (self.class_embed_type == "projection") == (self.projection_class_embeddings_input_dim is not None),
            "class_embed_type='projection' and projection_class_embeddings_input_dim go together",
        )
        has_class_token = self.image_attention and self.image_projection in (None, "linear", "mlp")
        require(
            self.addition_embed_type is None or (self.addition_embed_type == "image" and bool(has_class_token)),
            f"addition_embed_type={self.addition_embed_type!r}: expected None, or 'image' with image_attention and "
            "tokens of CLIP's output, of which the first is the class token: image_projection 'linear' or 'mlp'",
        )

    def _check_views_and_image(self) -> None:
        for name, known in (
            ("cross_view", (None, "position", "dense", "front", "row")),
            ("image_attention", (None, "block", "decoupled")),
            ("image_projection", (None, *_PROJECTION_SIZES)),
            ("image_unconditional", (None, "zero_features", "zero_image")),
        ):
            value = getattr(self, name)
            require(value in known, f"{name}={value!r}: expected one of {list(known)}")
        require(
            self.image_attention is not None or self.image_projection is None,
            f"image_projection={self.image_projection!r} is set, but image_attention is not",
        )
        require(
            math.isfinite(self.image_scale) and (self.image_scale == 1.0 or self.image_attention == "decoupled"),
            f"image_scale={self.image_scale}: expected a finite number, and 1.0 unless image_attention is 'decoupled'",
        )
        needed = _PROJECTION_SIZES.get(self.image_projection or "", ())
        for name in sorted({name for names in _PROJECTION_SIZES.values() for name in names}):
            value = getattr(self, name)
            most = MAX_LAYERS if name == "resampler_depth" else 65536
            expected = f"1 to {most}" if name in needed else "nothing"
            fits = value is not None and 0 < value <= most if name in needed else value is None
            require(fits, f"{name}={value}: expected {expected} with image_projection={self.image_projection!r}")

    def per_stage(self, value: int | Ints) -> Ints:
        """Return one number per stage, from a single number or a tuple."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def heads(self) -> Ints:
        return self.per_stage(self.attention_head_dim)

    @property
    def takes_reference(self) -> bool:
        """Return True if `reference_latents` can replace the latents of the last frame."""
        return self.cross_view == "dense"

    @property
    def has_mv_adapter(self) -> bool:
        """Return True if the network has the layers of MV-Adapter."""
        return self.cross_view == "row"

    @property
    def pose_dim(self) -> int | None:
        return self.projection_class_embeddings_input_dim

    def to_dict(self) -> dict[str, Any]:
        # A network without added attentions keeps diffusers' class name and fields, so that diffusers can load it.
        values = super().to_dict()
        if self.family is None:
            del values["family"]
        if self.cross_view is not None or self.image_attention is not None:
            return {**values, "_class_name": "MultiViewUNet"}
        return {key: value for key, value in values.items() if key != "cross_view" and not key.startswith(_IMAGE)}


def image_projection_fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Derive fields of `UNetConfig` from the shapes of the weights `image_projection.*`; {} without such weights."""

    def size(name: str, axis: int, ndim: int = 2) -> int | None:
        shape = shapes.get(f"image_projection.{name}")
        return shape[axis] if shape is not None and len(shape) == ndim else None

    if size("latents", 1, 3) is not None:
        layers = {name.split(".")[2] for name in shapes if name.startswith("image_projection.layers.")}
        return {
            "image_projection": "resampler",
            "image_embed_dim": size("proj_in.weight", 1),
            "image_tokens": size("latents", 1, 3),
            "resampler_width": size("latents", 2, 3),
            "resampler_depth": len(layers),
            "resampler_heads": (size("layers.0.0.to_q.weight", 0) or 0) // 64,  # all published heads are 64 wide
        }
    if size("proj.3.weight", 0, 1) is not None:
        return {"image_projection": "mlp", "image_embed_dim": size("proj.0.weight", 1)}
    width, rows = size("norm.weight", 0, 1), size("proj.weight", 0)
    if rows is None:
        return {}
    fields = {"image_projection": "linear", "image_embed_dim": size("proj.weight", 1)}
    return fields if width is None else {**fields, "image_projection": "pooled", "image_tokens": rows // max(width, 1)}


SD21_UNET = UNetConfig(
    sample_size=32,
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
)
"""U-Net of Stable Diffusion 2.1: 865,910,724 parameters."""

SD21_MULTIVIEW_UNET = UNetConfig(
    sample_size=32,
    in_channels=8,
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    class_embed_type="projection",
    projection_class_embeddings_input_dim=12,
    cross_view="position",
    image_attention="block",
    image_embed_dim=1280,
)
"""U-Net of Stable Diffusion 2.1 with normal latents, camera pose, cross-view and image attention."""
