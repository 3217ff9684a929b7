"""Image tower of CLIP, with the keys and numbers of transformers' CLIPVisionModelWithProjection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext import weights
from gafext.config import CLIP_VIT_H_14, CLIPTextConfig, CLIPVisionConfig
from gafext.errors import CheckpointError
from gafext.models.attention import merge_heads, split_heads
from gafext.models.base import PretrainedModel
from gafext.models.blocks import Conv2d
from gafext.ops import flash_attention
from gafext.ops.linear import linear_layer
from gafext.weights.keys import clip_vision_key

if TYPE_CHECKING:
    from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPVisionOutput(NamedTuple):
    """Outputs of the image tower, one per kind of image conditioning."""

    last_hidden_state: Tensor  # [B,tokens,hidden], before post_layernorm
    penultimate: Tensor  # [B,tokens,hidden]: transformers' hidden_states[-2]
    image_embeds: Tensor | None  # [B,projection]; None where the checkpoint has no projection


class Embeddings(nn.Module):
    """A class token and the image's patches, plus learned positions."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        hidden, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(hidden).normal_(std=hidden**-0.5))
        self.patch_embedding = Conv2d(config.num_channels, hidden, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.num_tokens, hidden)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B,tokens-1,hidden]
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class SelfAttention(nn.Module):
    """Multi-head attention with biases in all layers; `is_causal` hides later tokens, as in the text tower."""

    def __init__(self, hidden: int, heads: int, *, is_causal: bool):
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.attention_backend = "auto"
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            split_heads(linear_layer(layer, x, backend=self.attention_backend), self.heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = flash_attention(query, key, value, is_causal=self.is_causal, backend=self.attention_backend)
        return linear_layer(self.out_proj, merge_heads(x), backend=self.attention_backend)


class MLP(nn.Module):
    """Two linear layers with the configuration's GELU in between."""

    def __init__(self, config: CLIPVisionConfig | CLIPTextConfig):
        super().__init__()
        self.attention_backend = "auto"
        self.exact = config.hidden_act == "gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = linear_layer(self.fc1, x, backend=self.attention_backend)
        x = F.gelu(x) if self.exact else x * torch.sigmoid(1.702 * x)
        return linear_layer(self.fc2, x, backend=self.attention_backend)


class EncoderLayer(nn.Module):
    """Attention and MLP, each on a normalised input and with a residual."""

    def __init__(self, config: CLIPVisionConfig | CLIPTextConfig, *, is_causal: bool):
        super().__init__()
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, is_causal=is_causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Stack of layers, of the image tower and of the text tower."""

    def __init__(self, config: CLIPVisionConfig | CLIPTextConfig, *, is_causal: bool = False):
        super().__init__()
        layers = (EncoderLayer(config, is_causal=is_causal) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B,tokens,hidden] to the input and the output of the last layer."""
        for layer in self.layers[:-1]:
            x = layer(x)
        return x, self.layers[-1](x)


class VisionTransformer(nn.Module):
    """Embeddings, encoder and two LayerNorms; `pre_layrnorm` is misspelt in the checkpoints too."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPVisionEncoder(PretrainedModel):
    """CLIP's image tower with its projection; also loads full CLIP checkpoints.

    Args:
        config: widths and depths; the default is ViT-H/14.

    Source: arXiv 2103.00020; transformers: models/clip/modeling_clip.py, CLIPVisionModelWithProjection.
    """

    config_class: ClassVar = CLIPVisionConfig
    config: CLIPVisionConfig
    weights_stem: ClassVar = "model"
    key_rule: ClassVar = staticmethod(clip_vision_key)

    def __init__(self, config: CLIPVisionConfig = CLIP_VIT_H_14):
        super().__init__(config)
        self.vision_model = VisionTransformer(config)
        self.visual_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if config.projection_dim else None
        )

    @classmethod
    def read_config(cls, folder: Path, file: weights.WeightFile) -> CLIPVisionConfig:
        """Read the configuration in `config.json`; in a full CLIP model's it is the vision part."""
        path = folder / "config.json"
        values = weights.read_json(path)
        if values.get("model_type") == "clip":
            # vision_config_dict, an older name of the same part, takes precedence; projection_dim is at the top level.
            part = values.get("vision_config_dict") or values.get("vision_config") or {}
            if not isinstance(part, dict):
                raise CheckpointError(f"{path}: vision_config: expected an object, got {part!r}")
            values = {**part, "projection_dim": values.get("projection_dim", CLIPVisionConfig.projection_dim)}
        if values.get("architectures") == ["CLIPVisionModel"]:  # without the projection, as ImageDream ships it
            values = {**values, "projection_dim": None}
        return CLIPVisionConfig.from_dict(values, source=str(path))

    def forward(self, pixel_values: Tensor) -> CLIPVisionOutput:
        """Encode preprocessed images.

        Args:
            pixel_values: [B,3,image_size,image_size], normalised as by `preprocess`, any floating-point type.

        Returns:
            last_hidden_state and penultimate [B,tokens,hidden_size]; image_embeds [B,projection_dim], or None where the
            checkpoint has no projection.

        Raises:
            ValueError: the shape does not match.
        """
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values: expected (B,{','.join(map(str, expected))}), got {tuple(pixel_values.shape)}"
            )
        tower = self.vision_model
        x = tower.pre_layrnorm(tower.embeddings(pixel_values.to(self.dtype)))
        penultimate, last = tower.encoder(x)
        pooled = tower.post_layernorm(last[:, 0])
        image_embeds = None if self.visual_projection is None else self.visual_projection(pooled)
        return CLIPVisionOutput(last, penultimate, image_embeds)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resize a PIL image so that its shorter edge is `image_size`, crop the centre and normalise it.

        Args:
            image: any size and mode; transparent pixels are composed with white.

        Returns:
            [1,3,image_size,image_size], float32, on the CPU.

        Source: transformers: models/clip/image_processing_pil_clip.py.
        """
        from PIL import Image

        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image, size, short = image.convert("RGB"), self.config.image_size, min(image.size)
        if max(image.size) > 64 * short:  # only the centre is kept: do not resize a long strip as a whole
            left, top = (max(edge - 64 * short, 0) // 2 for edge in image.size)
            image = image.crop((left, top, image.width - left, image.height - top))
        image = image.resize([int(size * edge / short) for edge in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, size, size, 3)
        pixels = pixels.permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        return ((pixels - mean) / std).contiguous()
