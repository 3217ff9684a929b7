"""Evaluation of the autoencoder on overlapping tiles, to bound its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.models.blocks import GroupNorm


@contextmanager
def shared_statistics(
    network: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, *, size: int
) -> Iterator[None]:
    """Let the GroupNorms of a network normalise by the statistics of an image's reduced copy, on all of its tiles.

    Args:
        network: the network whose GroupNorms `function` calls.
        function: what is going to be evaluated on tiles; evaluated once on the copy.
        x: the image [B,C,H,W].
        size: largest side of the copy, every n-th pixel of the image.
    """
    norms = [module for module in network.modules() if isinstance(module, GroupNorm)]
    hooks = [norm.register_forward_pre_hook(_keep_statistics) for norm in norms]
    try:
        # Of nearest pixels: averages of neighbours would have a smaller variance than the image.
        function(F.interpolate(x, size=[min(side, size) for side in x.shape[2:]], mode="nearest"))
        for hook in hooks:
            hook.remove()
        yield
    finally:
        for norm, hook in zip(norms, hooks, strict=True):
            hook.remove()
            norm.statistics = None


def _keep_statistics(norm: GroupNorm, args: tuple[Tensor]) -> None:
    norm.statistics = norm.measure(args[0])


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

    Source: diffusers: models/autoencoders/autoencoder_kl.py, tiled_decode, with a last tile as large as the others.
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
