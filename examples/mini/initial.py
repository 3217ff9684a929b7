"""Initialisations: a stack of convolutions that preserves its input, and weights carried over from another network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext import CLIPVisionEncoder
from gafext.config import CLIPVisionConfig

SPREAD = 0.3  # scale of the random part of a convolution's weights


@torch.no_grad()
def start_linear(network: nn.Module, *, zero: tuple[str, ...]) -> None:
    """Initialise convolutions with orthogonal centre taps, and the last layers of residual branches with zero.

    With PyTorch's initialisation an autoencoder does not learn colour: after 120 steps, R - G of held-out shirts has a
    correlation of 0.0 with the ground truth, with this one 0.9.

    Args:
        network: network whose convolutions, with biases, are overwritten.
        zero: parts of the names of modules that start at zero.
    """
    for name, module in network.named_modules():
        if any(part in f"{name}." for part in zero):
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
        elif isinstance(module, nn.Conv2d):
            weight, (rows, columns, *taps) = module.weight, module.weight.shape
            square = torch.eye(rows) if rows == columns else nn.init.orthogonal_(torch.empty(rows, columns))
            square = (square * max(1, rows / columns) ** 0.5).to(weight.device)
            weight.normal_(std=SPREAD * weight[0].numel() ** -0.5)
            if module.stride == (2, 2):
                weight[:, :, 1:, 1:] += square[:, :, None, None] / 4  # average of the four pixels that are merged
            else:
                weight[:, :, taps[0] // 2, taps[1] // 2] += square
            if module.bias is not None:
                module.bias.zero_()


@torch.no_grad()
def carry_over(network: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Copy the weights of a network that has fewer levels, or tensors of other shapes.

    The levels of the other network are the inner ones of `network`: its last down blocks and its first up blocks. In a
    network for larger images they then see features of the size that they were trained on.

    Args:
        network: network that is overwritten where names and shapes agree.
        weights: state dictionary of the other network.

    Returns:
        Number of tensors copied.
    """
    own, copied = network.state_dict(), 0
    added = _levels(own) - _levels(weights)
    for key, value in weights.items():
        name = re.sub(r"down_blocks\.(\d+)", lambda match: f"down_blocks.{int(match[1]) + added}", key)
        if name.endswith("position_embedding.weight") and name in own:
            value = _resized(value, len(own[name]))
        if name in own and own[name].shape == value.shape:
            own[name].copy_(value)
            copied += 1
    return copied


def new_image_encoder(config: CLIPVisionConfig, taught: Path | None) -> CLIPVisionEncoder:
    """Build an image encoder with new weights, or with those of the folder `taught` where they fit."""
    encoder = CLIPVisionEncoder(config)
    nn.init.normal_(encoder.vision_model.embeddings.position_embedding.weight, std=0.02)  # 1 would dominate the patches
    if taught:
        carry_over(encoder, CLIPVisionEncoder.from_pretrained(taught).state_dict())
    return encoder


def _resized(positions: Tensor, count: int) -> Tensor:
    """Interpolate a vision transformer's position embedding [1+n*n,C], whose first row is the class token's."""
    side, wanted = math.isqrt(len(positions) - 1), math.isqrt(count - 1)
    grid = positions[1:].float().T.unflatten(1, (side, side))[None]
    grid = F.interpolate(grid, (wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1].float(), grid[0].flatten(1).T])


def _levels(weights: Mapping[str, Tensor]) -> int:
    found = (re.search(r"down_blocks\.(\d+)", key) for key in weights)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
