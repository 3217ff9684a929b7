"""Configuration of CLIP's text encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from gafext.config.base import Config, require_counts
from gafext.config.clip import CLIPVisionConfig, check_transformer


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """Configuration of a transformers CLIPTextModel."""

    class_name: ClassVar[str] = "CLIPTextModel"
    only: ClassVar[dict[str, tuple]] = {"model_type": ("clip_text_model",)}
    # The projection is not used; the ids of these tokens do not matter, because the caller tokenizes.
    without_effect: ClassVar[frozenset[str]] = CLIPVisionConfig.without_effect | {
        *("projection_dim", "bos_token_id", "pad_token_id")
    }

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        require_counts(self, 2**20, "vocab_size")
        require_counts(self, 256, "num_hidden_layers")
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
        require_counts(self, 65536, *sizes)
        check_transformer(self)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "architectures": [self.class_name], "model_type": "clip_text_model"}


CLIP_VIT_L_14_TEXT = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
"""Text encoder of ViT-L/14, used by the latent upsampler: 123,060,480 parameters."""

CLIP_VIT_H_14_TEXT = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
"""Text encoder of ViT-H/14 without its last layer (Stable Diffusion 2.1, ImageDream): 340,387,840 parameters."""
