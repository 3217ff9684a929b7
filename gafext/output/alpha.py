"""Alpha channels of views before a plain background."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gafext.images import to_pil

# Differences of a colour from the background's, in the channel that differs most: noise of the decoder, and the head.
_NOISE, _HEAD = 0.03, 0.15


def background_alpha(image: Tensor) -> Tensor:
    """Estimate how much of each pixel is not background.

    The background has the median colour of the picture's upper border, and is what is connected to the border; a pixel
    of its colour inside the head is the head's. At the edge, alpha rises with the difference from the background:

    alpha = clamp((max_c |image_c - background_c| - 0.03) / 0.12, 0, 1)

    Args:
        image: [3,S,S] in [0,1].

    Returns:
        [S,S] in [0,1].
    """
    colour = _background(image)
    difference = (image - colour[:, None, None]).abs().amax(0)
    alpha = ((difference - _NOISE) / (_HEAD - _NOISE)).clamp(0, 1)
    similar = (alpha < 1).float()[None, None]
    outside = similar.clone()
    outside[..., 1:-1, 1:-1] = 0
    while True:  # spread from the border over similar pixels
        grown = F.max_pool2d(outside, 3, 1, padding=1) * similar
        if torch.equal(grown, outside):
            break
        outside = grown
    return torch.where(outside[0, 0] > 0, alpha, 1.0)


def _background(image: Tensor) -> Tensor:
    """Return the median colour [3] of the upper border and the upper halves of the sides; below may be a chest."""
    half = image.shape[1] // 2
    return torch.cat([image[:, 0], image[:, :half, 0], image[:, :half, -1]], dim=1).median(dim=1).values


def with_alpha(image: Tensor) -> Image.Image:
    """Return the picture of [3,S,S] in [0,1] as RGBA, with the background's share taken out of the edges' colours.

    image = alpha * colour + (1 - alpha) * background

    Where a colour far from the background's meets it softly, alpha is 1 from a difference of 0.15 on, and some
    of the background stays in the edge: before another background it shows as a fringe of a pixel or two.
    """
    alpha = background_alpha(image)
    behind = (1 - alpha) * _background(image)[:, None, None]
    colour = torch.where(alpha > 0, (image - behind) / alpha.clamp(min=1e-3), image).clamp(0, 1)
    [picture] = to_pil(colour[None])
    picture.putalpha(to_pil(alpha.expand(1, 3, *alpha.shape))[0].getchannel("R"))
    return picture
