"""Fit of a drawn head's shape to a portrait: the normal maps of a portrait that comes without any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import PIL.Image
import torch
from torch import Tensor, nn

from gafext.config.base import Config, Ints, require, require_counts
from gafext.heads.identity import HAIRSTYLES, Heads
from gafext.heads.shape import MEASURES, SHAPE, beard_numbers, hairstyle_numbers, shaped_heads
from gafext.images import to_square_tensor
from gafext.models.base import PretrainedModel
from gafext.models.head_detector import GROUPS, ConvLayer

_STAGES = 4


class HeadShape(NamedTuple):
    """What a portrait tells of a head's shape."""

    measures: Tensor  # [N,len(MEASURES)], about in [0,1]
    hairstyle: Tensor  # [N,len(HAIRSTYLES)], logits
    beard: Tensor  # [N], logits

    def numbers(self) -> Tensor:
        """Decide on the most likely shape: [N,len(SHAPE)] in [0,1), in the order of `heads.shape.SHAPE`.

        float64 on the CPU, because Apple's GPUs have none.
        """
        measures, hairstyle, beard = (part.float().cpu() for part in self)
        columns = dict(zip(MEASURES, measures.double().clamp(0, 1 - 1e-6).unbind(1), strict=True))
        columns["style"] = hairstyle_numbers()[hairstyle.argmax(1)]
        columns["beard"] = beard_numbers()[(beard > 0).long()]
        return torch.stack([columns[name] for name in SHAPE], dim=1)


@dataclass(frozen=True)
class HeadFitterConfig(Config):
    """Configuration of a HeadFitter."""

    class_name: ClassVar[str] = "HeadFitter"

    image_size: int = 96
    block_out_channels: Ints = (16, 32, 64, 96)
    hidden_size: int = 128

    def __post_init__(self) -> None:
        require_counts(self, 1024, "image_size", "hidden_size")
        widths = self.block_out_channels
        fits = len(widths) == _STAGES and all(0 < width <= 1024 and width % GROUPS == 0 for width in widths)
        require(fits, f"block_out_channels={widths}: expected {_STAGES} multiples of {GROUPS} up to 1024")
        cell = 2**_STAGES
        require(self.image_size % cell == 0, f"image_size={self.image_size}: expected a multiple of {cell}")


class HeadFitter(PretrainedModel):
    """Convolutional network from a portrait to the shape of the drawn head that is most like it.

    It takes the place that the tracker of a head model (FLAME in GAF, arXiv 2412.10209) has for a real head: normal
    maps are then rendered of the fitted head.

    Args:
        config: sizes.
    """

    config_class: ClassVar = HeadFitterConfig
    config: HeadFitterConfig

    def __init__(self, config: HeadFitterConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *config.block_out_channels), config.block_out_channels, strict=False):
            layers += [ConvLayer(inputs, outputs, stride=2), ConvLayer(outputs, outputs)]
        self.layers = nn.Sequential(*layers)
        cells = (config.image_size // 2**_STAGES) ** 2
        self.hidden = nn.Linear(config.block_out_channels[-1] * cells, config.hidden_size)  # a place means a measure
        self.out = nn.Linear(config.hidden_size, len(MEASURES) + len(HAIRSTYLES) + 1)

    def forward(self, pictures: Tensor) -> HeadShape:
        """Estimate the shape of the head in each portrait.

        Args:
            pictures: [N,3,S,S] in [0,1], S the configuration's image_size.

        Returns:
            The measures and the logits of hairstyle and beard.
        """
        features = self.layers((pictures - 0.5) / 0.25).flatten(1)
        out = self.out(nn.functional.silu(self.hidden(features)))
        measures, hairstyle, beard = out.split([len(MEASURES), len(HAIRSTYLES), 1], dim=1)
        return HeadShape(measures + 0.5, hairstyle, beard[:, 0])

    @torch.no_grad()
    def fit(self, portrait: PIL.Image.Image) -> Heads:
        """Fit one head to a portrait.

        Args:
            portrait: RGB picture of any size, framed as the portraits of training.

        Returns:
            One head, on the CPU, in the neutral head's colours and light.
        """
        picture = to_square_tensor([portrait], self.config.image_size).to(self.device, self.dtype)
        return shaped_heads(self(picture).numbers())
