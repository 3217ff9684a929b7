"""Frozen configurations with diffusers' and transformers' field names.

Field defaults are those of the library that writes the file, because a key that a file leaves out means that value.
The published configurations are the constants below each class.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from gafext.errors import CheckpointError

Ints = tuple[int, ...]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value (lists already made tuples) has the annotated type."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Config:
    """Base of the configurations: reads a JSON object and refuses what the network here would not honour."""

    class_name: ClassVar[str]
    only: ClassVar[dict[str, tuple]] = {}
    """Keys of the published format of which these values alone are supported."""
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Keys that change no number at inference."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config") -> Config:
        """Build from a JSON object; a key with an unknown effect, a wrong type or a bad value is an error."""
        names = {field.name for field in fields(cls)}
        problems, known = [], {}
        for key, value in values.items():
            value = _as_tuple(value)
            if key in names:
                known[key] = value
            elif key in cls.only:
                if value not in cls.only[key]:
                    problems.append(f"{key}={value!r}: expected one of {list(cls.only[key])}")
            elif not (key.startswith("_") or key in cls.without_effect or value is None or value is False):
                problems.append(f"{key}={value!r} is not known here")
        hints = get_type_hints(cls)
        problems += [
            f"{key}={value!r}: expected {hints[key]}" for key, value in known.items() if not _fits(value, hints[key])
        ]
        if problems:
            raise CheckpointError(f"{source}: " + "; ".join(problems))
        try:
            return cls(**known)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads back."""
        return {"_class_name": self.class_name, **asdict(self)}


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


_CROSS_ATTENTION_BLOCKS = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}


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
        _require(stages > 0, "block_out_channels is empty")
        for name, known in (
            ("down_block_types", {"DownBlock2D", "CrossAttnDownBlock2D"}),
            ("up_block_types", {"UpBlock2D", "CrossAttnUpBlock2D"}),
        ):
            types = getattr(self, name)
            _require(len(types) == stages, f"{name} has {len(types)} entries, block_out_channels {stages}")
            _require(set(types) <= known, f"{name}={list(types)}: expected only {sorted(known)}")
        for name in (
            "layers_per_block",
            "transformer_layers_per_block",
            "attention_head_dim",
        ):
            value = getattr(self, name)
            _require(
                not isinstance(value, tuple) or len(value) == stages,
                f"{name}={value}: expected {stages} entries, one a stage",
            )
            values = value if isinstance(value, tuple) else (value,)
            _require(all(0 < v <= 4096 for v in values), f"{name}={value}: expected 1 to 4096")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            _require(0 < channels <= 65536, f"block_out_channels has {channels}: expected 1 to 65536")
            _require(
                self.norm_num_groups > 0 and channels % self.norm_num_groups == 0,
                f"{channels} channels do not divide into norm_num_groups={self.norm_num_groups}",
            )
            _require(channels % heads == 0, f"{channels} channels do not divide into {heads} heads")
        for name in ("in_channels", "out_channels", "cross_attention_dim"):
            _require(0 < getattr(self, name) <= 65536, f"{name}={getattr(self, name)}: expected 1 to 65536")
        _require(self.class_embed_type in (None, "projection"), f"class_embed_type={self.class_embed_type!r}")
        _require(
            (self.class_embed_type == "projection") == (self.projection_class_embeddings_input_dim is not None),
            "class_embed_type='projection' and projection_class_embeddings_input_dim go together",
        )
        _require(
            self.cross_view in (None, "position"),
            f"cross_view={self.cross_view!r}: expected None or 'position'",
        )
        _require(
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


@dataclass(frozen=True)
class VAEConfig(Config):
    """A diffusers AutoencoderKL."""

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
            _require(types == (known,) * stages, f"{name}={list(types)}: expected {known}, {stages} times")
        for name in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            _require(0 < getattr(self, name) <= 4096, f"{name}={getattr(self, name)}: expected 1 to 4096")
        for channels in self.block_out_channels:
            _require(
                0 < channels <= 65536 and channels % self.norm_num_groups == 0,
                f"{channels} channels do not divide into norm_num_groups={self.norm_num_groups}",
            )
        _require(self.scaling_factor != 0, "scaling_factor is 0")

    @property
    def factor(self) -> int:
        """Image pixels a latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)


SD_VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
"""Stable Diffusion's autoencoder: 83,653,863 parameters."""


@dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """A transformers CLIPVisionModelWithProjection."""

    class_name: ClassVar[str] = "CLIPVisionModelWithProjection"
    only: ClassVar[dict[str, tuple]] = {"model_type": ("clip_vision_model",)}
    # What transformers writes into any model's file, and before its release 5 the settings of text
    # generation too.
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            *("architectures", "attention_dropout", "dropout", "dtype", "torch_dtype", "transformers_version"),
            *("initializer_factor", "initializer_range", "id2label", "label2id", "problem_type", "pruned_heads"),
            *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "do_sample"),
            *("diversity_penalty", "encoder_no_repeat_ngram_size", "length_penalty", "max_length"),
            *("min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
            *("repetition_penalty", "temperature", "tie_word_embeddings", "top_k", "top_p", "typical_p"),
        }
    )

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require(
            self.hidden_act in ("gelu", "quick_gelu"),
            f"hidden_act={self.hidden_act!r}: expected 'gelu' or 'quick_gelu'",
        )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                _require(0 < value <= 65536, f"{field.name}={value}: expected 1 to 65536")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size={self.hidden_size} does not divide into num_attention_heads={self.num_attention_heads}",
        )
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}",
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "architectures": [self.class_name],
            "model_type": "clip_vision_model",
        }

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


CLIP_VIT_H_14 = CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1024,
    num_hidden_layers=32,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="gelu",
)
"""OpenCLIP's ViT-H/14: 632,076,800 parameters. Its GELU is exact; OpenAI's ViT-L/14 uses quick_gelu."""


_EULER = {"clip_sample": False, "timestep_spacing": "linspace"}
_HEUN = {**_EULER, "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class SchedulerConfig(Config):
    """The noise schedule of a diffusers scheduler, as far as DDIM reads it.

    Another solver's file is taken for its noise schedule; what concerns that solver alone is left aside.
    """

    class_name: ClassVar[str] = "DDIMScheduler"
    only: ClassVar[dict[str, tuple]] = {"thresholding": (False,), "use_flow_sigmas": (False,)}
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            *("skip_prk_steps", "solver_order", "solver_type", "solver_p", "algorithm_type", "predict_x0"),
            *("lower_order_final", "euler_at_final", "disable_corrector", "noise_sampler_seed"),
            *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
            *("sigma_min", "sigma_max", "final_sigmas_type", "lambda_min_clipped", "variance_type"),
            *("interpolation_type", "timestep_type", "flow_shift", "time_shift_type"),
            *("dynamic_thresholding_ratio", "sample_max_value"),
        }
    )
    # The defaults of the solver that wrote the file, where they are not DDIM's: none of these ever clips.
    solver_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "DDIMScheduler": {},
        "DDPMScheduler": {},
        "PNDMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
        "DPMSolverSinglestepScheduler": {"clip_sample": False},
        "DPMSolverMultistepScheduler": _EULER,
        "UniPCMultistepScheduler": _EULER,
        "DEISMultistepScheduler": _EULER,
        "EulerDiscreteScheduler": _EULER,
        "EulerAncestralDiscreteScheduler": _EULER,
        "LMSDiscreteScheduler": _EULER,
        "HeunDiscreteScheduler": _HEUN,
        "KDPM2DiscreteScheduler": _HEUN,
        "KDPM2AncestralDiscreteScheduler": _HEUN,
        "DPMSolverSDEScheduler": _HEUN,
    }

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config") -> SchedulerConfig:
        """Build from the file of DDIM or of another solver with the same kind of noise schedule."""
        solver = str(values.get("_class_name", cls.class_name))
        if solver not in cls.solver_defaults:
            raise CheckpointError(f"{source}: _class_name={solver!r}: expected one of {list(cls.solver_defaults)}")
        return super().from_dict({**cls.solver_defaults[solver], **values}, source=source)

    def __post_init__(self) -> None:
        for name, known in (
            ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2")),
            ("prediction_type", ("epsilon", "sample", "v_prediction")),
            ("timestep_spacing", ("leading", "trailing", "linspace")),
        ):
            _require(getattr(self, name) in known, f"{name}={getattr(self, name)!r}: expected one of {list(known)}")
        _require(
            1 <= self.num_train_timesteps <= 100_000,
            f"num_train_timesteps={self.num_train_timesteps}: expected 1 to 100000",
        )
        _require(
            0 < self.beta_start <= self.beta_end < 1,
            f"beta_start={self.beta_start}, beta_end={self.beta_end}: expected 0 < start <= end < 1",
        )
        betas = self.trained_betas
        _require(
            betas is None or (len(betas) == self.num_train_timesteps and all(0 < beta <= 1 for beta in betas)),
            f"trained_betas: expected {self.num_train_timesteps} values over 0 and up to 1",
        )
        _require(self.clip_sample_range > 0, f"clip_sample_range={self.clip_sample_range}: expected over 0")
        _require(
            0 <= self.steps_offset < self.num_train_timesteps,
            f"steps_offset={self.steps_offset}: expected 0 to {self.num_train_timesteps - 1}",
        )


SD_SCHEDULE = SchedulerConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
"""Stable Diffusion's schedule; 2.1 (768) predicts v, 2.1-base and ImageDream epsilon."""
