"""Configuration of CLIP's image encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from gafext.config.base import Config, require, require_counts, require_either


@dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """Configuration of a transformers CLIPVisionModelWithProjection."""

    class_name: ClassVar[str] = "CLIPVisionModelWithProjection"
    only: ClassVar[dict[str, tuple]] = {"model_type": ("clip_vision_model",)}
    # transformers writes these into every model's file; before its release 5 also settings of text generation.
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
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        counts = [field.name for field in fields(self) if field.type.startswith("int")]
        require_counts(self, 65536, *(name for name in counts if getattr(self, name) is not None))
        check_transformer(self)

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "architectures": [self.class_name if self.projection_dim else "CLIPVisionModel"],
            "model_type": "clip_vision_model",
        }

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


def check_transformer(config: Any) -> None:
    """Check what both towers have: an activation, and a width that the heads divide evenly."""
    require_either(config, "hidden_act", "gelu", "quick_gelu")
    require(
        config.hidden_size % config.num_attention_heads == 0,
        f"hidden_size={config.hidden_size} does not divide into num_attention_heads={config.num_attention_heads}",
    )


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
