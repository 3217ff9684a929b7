"""Alpha channels of views before a plain background."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gafext.images import to_pil

# Differences of a colour from the background's, in the channel that differs most: noise of the decoder, and the head.
_NOISE, _HEAD = 0.03, 0.15
# Pixels inside the outline that may have some of the background, and the distance over which the head's colour is
# averaged. The edges of rendered heads, before black against the truth, have 34 dB, after the autoencoder 32; with 1
# and 2 they have 40 and 34, and softer ones would not; with every pixel beyond _HEAD opaque 16.
_BAND, _REACH = 2, 3


def background_alpha(image: Tensor) -> Tensor:
    """Estimate how much of each pixel is not background.

    The background has the median colour b of the picture's upper border, and is what is connected to the border; a
    pixel of its colour inside the head is the head's. At the edge, alpha is the share of the head's colour f, the mean
    of what lies further inside:

    alpha = clamp((image - b) · (f - b) / |f - b|², 0, 1)

    Where nothing does, it rises with the difference: clamp((max_c |image_c - b_c| - 0.03) / 0.12, 0, 1).

    Args:
        image: [3,S,S] in [0,1].

    Returns:
        [S,S] in [0,1].
    """
    away = image - _background(image)[:, None, None]
    difference = away.abs().amax(0)
    outside = _connected_to_border(difference < _HEAD)
    inner = 1 - F.max_pool2d(outside[None].float(), 2 * _BAND + 1, 1, _BAND)  # [1,S,S]
    share, head = (F.avg_pool2d(x, 2 * _REACH + 1, 1, _REACH) for x in (inner, away * inner))
    head = head / share.clamp(min=1e-6)
    mixed = ((away * head).sum(0) / head.square().sum(0).clamp(min=1e-6)).clamp(0, 1)
    rising = torch.where(outside, ((difference - _NOISE) / (_HEAD - _NOISE)).clamp(0, 1), 1.0)
    is_edge = (inner == 0) & (share > 0) & (head.abs().amax(0, keepdim=True) > _HEAD)
    alpha = torch.where(is_edge[0], mixed, rising)
    return torch.where(outside & (difference < _NOISE), 0.0, alpha)


def _connected_to_border(similar: Tensor) -> Tensor:
    """Return which pixels of [S,S] bool the border reaches over pixels that are True."""
    allowed = similar[None].float()
    reached = allowed.clone()
    reached[:, 1:-1, 1:-1] = 0
    while True:
        grown = F.max_pool2d(reached, 3, 1, padding=1) * allowed
        if torch.equal(grown, reached):
            return reached[0] > 0
        reached = grown


def _background(image: Tensor) -> Tensor:
    """Return the median colour [3] of the upper border and the upper halves of the sides; below may be a chest."""
    half = image.shape[1] // 2
    return torch.cat([image[:, 0], image[:, :half, 0], image[:, :half, -1]], dim=1).median(dim=1).values


def with_alpha(image: Tensor) -> Image.Image:
    """Return the picture of [3,S,S] in [0,1] as RGBA, with the background's share taken out of the edges' colours.

    image = alpha * colour + (1 - alpha) * background
    """
    alpha = background_alpha(image)
    behind = (1 - alpha) * _background(image)[:, None, None]
    colour = torch.where(alpha > 0, (image - behind) / alpha.clamp(min=1e-3), image).clamp(0, 1)
    [picture] = to_pil(colour[None])
    picture.putalpha(to_pil(alpha.expand(1, 3, *alpha.shape))[0].getchannel("R"))
    return picture
