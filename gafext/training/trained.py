"""Which weights of the U-Net are trained, and what of it is recomputed."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from gafext.models.blocks import MultiViewSpatialTransformer, ResnetBlock2D
from gafext.models.unet import MultiViewUNet
from gafext.training.fsdp import part

TRAINED = ("new", "lora", "all")
_NEW = re.compile(
    r"\.(norm_cv|attn_cv|norm_ip|attn_ip)\.|^(image_projection|class_embedding|add_embedding)\.|^conv_in\.weight$"
)
_ADAPTED = re.compile(r"\.attn[12]\.(to_[qkv]|to_out\.0)$")


class LowRank(nn.Module):
    """Parametrization of a weight: W + B A of a low rank, B = 0 at first (LoRA, arXiv 2106.09685 eq. 3, alpha = rank).

    A parametrization, not a wrapper as peft's: gafext's operations read a layer's weight without calling the layer.

    Args:
        weight: W, [N,K].
        rank: columns of B and rows of A.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device, dtype=weight.dtype) / rank)  # A
        self.up = nn.Parameter(weight.new_zeros(rows, rank))  # B

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def choose_trained(unet: MultiViewUNet, which: str, *, rank: int, seed: int) -> None:
    """Set `requires_grad` of the U-Net's weights, and add low-rank updates.

    Args:
        unet: the U-Net.
        which: "new": what `gafext assemble` adds, of conv_in the channels of the normal latents alone; "lora": this,
            and low-rank updates of the parent's attention layers; or "all".
        rank: rank of these updates.
        seed: seed of their initial values.
    """
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(which == "all" or _NEW.search(name) is not None)
    if which == "all":
        return
    if which == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the same on every process
            for name, module in list(unet.named_modules()):
                if _ADAPTED.search(name) and isinstance(module, nn.Linear):
                    parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


@torch.no_grad()
def leave_old(unet: MultiViewUNet, which: str) -> None:
    """Zero the gradient of the channels of conv_in that the parent had, unless all weights are trained."""
    gradient = unet.conv_in.weight.grad
    if which != "all" and gradient is not None:
        part(gradient)[:, : unet.config.out_channels] = 0


def merge_updates(unet: MultiViewUNet) -> None:
    """Add the low-rank updates to the weights that they belong to."""
    for module in list(unet.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


@contextmanager
def recomputing(unet: MultiViewUNet, enabled: bool) -> Iterator[None]:
    """Recompute the residual and transformer blocks in the backward pass instead of keeping their activations."""
    blocks = [m for m in unet.modules() if enabled and isinstance(m, (ResnetBlock2D, MultiViewSpatialTransformer))]
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's again
