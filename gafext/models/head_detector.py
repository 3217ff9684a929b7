"""Detector of the head in a photograph: the square that shows it as the portraits of training were framed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.config.base import Config, Ints, require, require_counts
from gafext.models.base import PretrainedModel

STRIDE = 8  # pixels of a cell's side
GROUPS = 8
SURE = 0.5  # least probability of a head
CLOSER = 1.7  # side of the second look, of the square that the first one found


class HeadBox(NamedTuple):
    """Square of a picture in pixels, from its top left corner; it may reach over the picture's border."""

    x: float  # of the centre
    y: float
    side: float


@dataclass(frozen=True)
class HeadDetectorConfig(Config):
    """Configuration of a HeadDetector."""

    class_name: ClassVar[str] = "HeadDetector"

    image_size: int = 96
    block_out_channels: Ints = (16, 32, 64)
    dilations: Ints = (1, 2, 4, 1)

    def __post_init__(self) -> None:
        require_counts(self, 1024, "image_size")
        for name in ("block_out_channels", "dilations"):
            sizes = getattr(self, name)
            require(all(0 < size <= 1024 for size in sizes), f"{name}={sizes}: expected 1 to 1024 each")
        widths = self.block_out_channels
        fits = len(widths) == 3 and not any(width % GROUPS for width in widths)
        require(fits, f"block_out_channels={widths}: expected 3 multiples of {GROUPS}")
        require(self.image_size % STRIDE == 0, f"image_size={self.image_size}: expected a multiple of {STRIDE}")


class ConvLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation)
        self.norm = nn.GroupNorm(GROUPS, outputs)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        made = F.silu(self.norm(self.conv(x)))
        return x + made if self.residual else made


class HeadDetector(PretrainedModel):
    """Fully convolutional detector of one head.

    Each cell of 8 x 8 pixels gets a logit, the offset of the square's centre in cells and the logarithm of its side
    as a share of the picture's. A softmax over the cells and "none" says where the head is.

    Args:
        config: sizes.
    """

    config_class: ClassVar = HeadDetectorConfig
    config: HeadDetectorConfig

    def __init__(self, config: HeadDetectorConfig):
        super().__init__(config)
        widths = config.block_out_channels
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *widths), widths, strict=False):
            layers += [ConvLayer(inputs, outputs, stride=2), ConvLayer(outputs, outputs)]
        layers += [ConvLayer(widths[-1], widths[-1], dilation=dilation) for dilation in config.dilations]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Conv2d(widths[-1], 4, 1)
        self.none = nn.Parameter(torch.zeros(1))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Look for a head in each picture.

        Args:
            pictures: [N,3,S,S] in [0,1].

        Returns:
            Logits [N,K+1] of the K cells, row by row, and of "none"; squares [N,K,3]: x, y and log side, shares of S.
        """
        maps = self.out(self.layers((pictures - 0.5) / 0.25))  # [N,4,G,G]
        grid = maps.shape[-1]
        centres = (torch.arange(grid, device=maps.device, dtype=maps.dtype) + 0.5) / grid
        x = (centres + maps[:, 1] / grid).flatten(1)
        y = (centres[:, None] + maps[:, 2] / grid).flatten(1)
        logits = torch.cat([maps[:, 0].flatten(1), self.none.expand(len(maps), 1)], dim=1)
        return logits, torch.stack([x, y, maps[:, 3].flatten(1)], dim=-1)

    @torch.no_grad()
    def find(self, picture: Tensor) -> HeadBox | None:
        """Find the head in a picture of any size: in all of it, then once more from close by.

        Args:
            picture: [3,H,W] in [0,1].

        Returns:
            The square that frames the head as a portrait; None without a head.
        """
        height, width = picture.shape[-2:]
        box = self._look(picture, HeadBox(width / 2, height / 2, max(width, height)))
        return box and self._look(picture, box._replace(side=CLOSER * box.side))

    def _look(self, picture: Tensor, within: HeadBox) -> HeadBox | None:
        """Look for a head in a square of the picture; what is outside of the picture is grey."""
        size = self.config.image_size
        seen = F.interpolate(crop(picture, within)[None], (size, size), mode="bilinear", antialias=True)
        logits, boxes = (x[0].float() for x in self(seen.to(self.device, self.dtype)))
        shares, best = logits.softmax(-1), int(logits[:-1].argmax())
        if shares[-1] > 1 - SURE:
            return None
        x, y, side = boxes[best].tolist()
        corner_x, corner_y = within.x - within.side / 2, within.y - within.side / 2
        return HeadBox(corner_x + x * within.side, corner_y + y * within.side, math.exp(side) * within.side)


def crop(picture: Tensor, box: HeadBox) -> Tensor:
    """Cut a square out of [3,H,W], grey outside of the picture: [3,S,S], S the box's side in whole pixels."""
    side = max(1, round(box.side))
    left, top = round(box.x - side / 2), round(box.y - side / 2)
    height, width = picture.shape[-2:]
    return F.pad(picture, (-left, left + side - width, -top, top + side - height), value=0.5)
