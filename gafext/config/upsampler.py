"""Configuration of the latent upsampler: its K-UNet and its noise schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gafext.config.base import Config, Ints, require, require_counts
from gafext.config.scheduler import EulerConfig

_CROSS = "KCrossAttnDownBlock2D"
_UP = {"KDownBlock2D": "KUpBlock2D", _CROSS: "KCrossAttnUpBlock2D"}


@dataclass(frozen=True)
class KUNetConfig(Config):
    """Configuration of a diffusers UNet2DConditionModel of K-blocks, without a middle block.

    `attention_head_dim` is the WIDTH of a head, unlike in `UNetConfig`. `time_cond_proj_dim` is the width of the
    condition that is added to the time embedding.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    only: ClassVar[dict[str, tuple]] = {"flip_sin_to_cos": (True,), "attention_type": ("default",)}
    # Settings of blocks that this network does not have.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            *("sample_size", "freq_shift", "downsample_padding", "mid_block_scale_factor", "dropout"),
            *("transformer_layers_per_block", "use_linear_projection", "upcast_attention", "only_cross_attention"),
            *("resnet_time_scale_shift", "resnet_out_scale_factor", "addition_embed_type_num_heads"),
        }
    )
    required: ClassVar[dict[str, str | None]] = {
        "act_fn": "gelu",
        "mid_block_type": None,
        "norm_num_groups": None,
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
    }
    """Required values of fields whose diffusers default is for another kind of network."""

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    block_out_channels: Ints = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int = 8
    cross_attention_dim: int = 1280
    norm_eps: float = 1e-5
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    act_fn: str = "silu"
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    norm_num_groups: int | None = 32
    time_embedding_type: str = "positional"
    timestep_post_act: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.required.items():
            require(getattr(self, name) == value, f"{name}={getattr(self, name)!r}: expected {value!r}")
        self._check_types()
        widths = ("in_channels", "out_channels", "cross_attention_dim", "time_channels", "time_cond_proj_dim")
        require_counts(self, 65536, *widths)
        require_counts(self, 64, "layers_per_block")
        kernels = ("conv_in_kernel", "conv_out_kernel")
        require_counts(self, 15, *kernels)
        for name in kernels:
            require(getattr(self, name) % 2 == 1, f"{name}={getattr(self, name)}: expected an odd number")
        require(self.time_channels % 2 == 0, f"time_embedding_dim={self.time_channels}: expected an even number")
        self._check_widths()

    def _check_types(self) -> None:
        stages, down = len(self.block_out_channels), self.down_block_types
        require(1 <= stages <= 8, f"block_out_channels has {stages} entries: expected 1 to 8")
        expected = [("KDownBlock2D",) + (_CROSS,) * (stages - 1), (_CROSS,) * stages]
        require(
            down in expected and _CROSS in down,
            f"down_block_types={list(down)}: expected {stages} of {_CROSS}, of which the first may be KDownBlock2D",
        )
        up = tuple(_UP[name] for name in reversed(down))
        require(self.up_block_types == up, f"up_block_types={list(self.up_block_types)}: expected {list(up)}")

    def _check_widths(self) -> None:
        widths, time = self.block_out_channels, self.time_channels
        for width in widths:
            groups = {size: size // 32 for size in (width, 2 * width)}
            require(
                32 <= width <= 65536 and all(size % count == 0 for size, count in groups.items()),
                f"block_out_channels has {width}: expected 32 to 65536, in groups of 32",
            )
            require(
                0 < self.attention_head_dim <= width and width % self.attention_head_dim == 0,
                f"{width} channels do not divide into heads {self.attention_head_dim} wide (attention_head_dim)",
            )
        # diffusers recognises the first up block, which has self-attention and no skip, only by its widths.
        first = [stage for stage in range(len(widths)) if widths[max(stage - 1, 0)] == widths[stage] == time]
        require(
            first == [len(widths) - 1],
            f"block_out_channels={list(widths)}: expected the last two stages and no other pair to be as wide as the "
            f"time embedding ({time})",
        )

    @property
    def time_channels(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 2 * self.block_out_channels[0]

    @property
    def size_multiple(self) -> int:
        """Number that the height and width of a sample must be multiples of."""
        return 2 ** (len(self.block_out_channels) - 1)


SD_X2_UNET = KUNetConfig(
    in_channels=8,
    out_channels=5,
    down_block_types=("KDownBlock2D",) + (_CROSS,) * 3,
    up_block_types=("KCrossAttnUpBlock2D",) * 3 + ("KUpBlock2D",),
    block_out_channels=(384, 384, 768, 768),
    layers_per_block=4,
    attention_head_dim=64,
    cross_attention_dim=768,
    time_cond_proj_dim=896,
    conv_in_kernel=1,
    conv_out_kernel=1,
    act_fn="gelu",
    mid_block_type=None,
    norm_num_groups=None,
    time_embedding_type="fourier",
    timestep_post_act="gelu",
)
"""K-UNet of sd-x2-latent-upscaler: 372,560,645 parameters."""

SD_X2_SCHEDULE = EulerConfig(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="sample"
)
"""Noise levels of Stable Diffusion; the interpolation between them is given by the checkpoint's own file."""
