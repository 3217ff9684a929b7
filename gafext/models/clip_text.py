"""Text tower of CLIP, with the keys and numbers of transformers' CLIPTextModel."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gafext import weights
from gafext.config import CLIP_VIT_L_14_TEXT, CLIPTextConfig
from gafext.errors import CheckpointError
from gafext.models import clip
from gafext.models.base import PretrainedModel
from gafext.weights.keys import clip_text_key


class CLIPTextOutput(NamedTuple):
    """Outputs of the text tower, one per kind of text conditioning."""

    last_hidden_state: Tensor  # [B,T,hidden], after final_layer_norm
    unnormalized: Tensor  # [B,T,hidden]: transformers' hidden_states[-1], before final_layer_norm
    penultimate: Tensor  # [B,T,hidden]: transformers' hidden_states[-2]
    pooled: Tensor  # [B,hidden]: last_hidden_state at the end-of-text token


class Embeddings(nn.Module):
    """Tokens plus learned positions."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class TextTransformer(nn.Module):
    """Embeddings, the encoder of the image tower with causal attention, and a LayerNorm."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = clip.Encoder(config, is_causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPTextEncoder(PretrainedModel):
    """CLIP's text tower without its projection; also loads full CLIP checkpoints.

    Args:
        config: widths and depths; the default is ViT-L/14.

    Source: arXiv 2103.00020 section 2.4; transformers: models/clip/modeling_clip.py, CLIPTextModel.
    """

    config_class: ClassVar = CLIPTextConfig
    config: CLIPTextConfig
    weights_stem: ClassVar = "model"
    key_rule: ClassVar = staticmethod(clip_text_key)

    def __init__(self, config: CLIPTextConfig = CLIP_VIT_L_14_TEXT):
        super().__init__(config)
        self.text_model = TextTransformer(config)

    @classmethod
    def read_config(cls, folder: Path, file: weights.WeightFile) -> CLIPTextConfig:
        """Read the configuration in `config.json`; in a full CLIP model's it is the text part."""
        path = folder / "config.json"
        values = weights.read_json(path)
        if values.get("model_type") == "clip":
            # text_config_dict, an older name of the same part, takes precedence.
            values = values.get("text_config_dict") or values.get("text_config") or {}
            if not isinstance(values, dict):
                raise CheckpointError(f"{path}: text_config: expected an object, got {values!r}")
        return CLIPTextConfig.from_dict(values, source=str(path))

    def forward(self, input_ids: Tensor) -> CLIPTextOutput:
        """Encode tokenized prompts.

        Args:
            input_ids: [B,T], int64, 0 to vocab_size - 1; T at most max_position_embeddings. Padding is not masked, as
                in CLIP: causal attention hides it from the tokens before it.

        Returns:
            last_hidden_state, unnormalized and penultimate [B,T,hidden_size], pooled [B,hidden_size].

        Raises:
            ValueError: the shape, the dtype or an id is invalid.
        """
        self._check_ids(input_ids)
        tower = self.text_model
        penultimate, unnormalized = tower.encoder(tower.embeddings(input_ids))
        last = tower.final_layer_norm(unnormalized)
        pooled = last[torch.arange(len(last), device=last.device), self._end_of_text(input_ids)]
        return CLIPTextOutput(last, unnormalized, penultimate, pooled)

    def _end_of_text(self, input_ids: Tensor) -> Tensor:
        """Return the positions [B] of the first end-of-text tokens, or 0 without one, as in transformers."""
        # Files from before transformers 4.31 say 2, which is wrong: the actual token is the largest id.
        if self.config.eos_token_id == 2:
            return input_ids.argmax(dim=1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=1)

    def _check_ids(self, input_ids: Tensor) -> None:
        longest, count = self.config.max_position_embeddings, self.config.vocab_size
        if input_ids.ndim != 2 or not 0 < input_ids.shape[1] <= longest:
            raise ValueError(f"input_ids: expected (B,T), T from 1 to {longest}, got {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"input_ids: expected int64 or int32, got {input_ids.dtype}")
        if ((input_ids < 0) | (input_ids >= count)).any():
            raise ValueError(f"input_ids: expected 0 to {count - 1}, got {sorted(set(input_ids.flatten().tolist()))}")
