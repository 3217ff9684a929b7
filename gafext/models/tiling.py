"""Evaluation of the autoencoder on overlapping tiles, to bound its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, in_scale: int = 1, out_scale: int = 1
) -> Tensor:
    """Evaluate a function of images on tiles that overlap by a quarter or more, and blend the seams linearly.

    Args:
        function: maps [B,C,h·in_scale,w·in_scale] to [B,C',h·out_scale,w·out_scale], for any h and w.
        x: [B,C,H·in_scale,W·in_scale].
        tile: side of a tile, in the unit of H and W.
        in_scale: pixels of the input per unit.
        out_scale: pixels of the result per unit.

    Returns:
        [B,C',H·out_scale,W·out_scale].

    Source: diffusers: models/autoencoders/autoencoder_kl.py, tiled_decode, with smaller last tiles.
    """
    height, width = (size // in_scale for size in x.shape[2:])
    tops, lefts = _starts(height, tile), _starts(width, tile)
    strips = []
    for top in tops:
        rows = x[:, :, top * in_scale : (top + tile) * in_scale]
        row = [function(rows[..., left * in_scale : (left + tile) * in_scale]) for left in lefts]
        strips.append(_merge(row, [left * out_scale for left in lefts], dim=3))
    return _merge(strips, [top * out_scale for top in tops], dim=2)


def _starts(length: int, tile: int) -> list[int]:
    last = max(length - tile, 0)
    return [*range(0, last, tile - tile // 4), last]


def _merge(parts: Sequence[Tensor], starts: Sequence[int], *, dim: int) -> Tensor:
    """Join tensors that begin at the given positions of an axis; an overlap fades from the one to the next."""
    merged = parts[0]
    for part, start in zip(parts[1:], starts[1:], strict=True):
        overlap = merged.shape[dim] - start
        ramp = torch.arange(overlap, device=part.device, dtype=part.dtype) / overlap
        ramp = ramp.view(-1, 1) if dim == 2 else ramp
        seam = merged.narrow(dim, start, overlap).lerp(part.narrow(dim, 0, overlap), ramp)
        rest = part.narrow(dim, overlap, part.shape[dim] - overlap)
        merged = torch.cat([merged.narrow(dim, 0, start), seam, rest], dim=dim)
    return merged
