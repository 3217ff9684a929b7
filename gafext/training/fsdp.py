"""Weights that Accelerate's FSDP divides among processes: each process's part, and the whole of them."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from gafext.training.denoiser import Denoiser

_UNITS = ("ResnetBlock2D", "MultiViewTransformerBlock")  # whose weights are whole while they compute


def divide_by_blocks(accelerator: Accelerator) -> None:
    """Have Accelerate's FSDP divide a denoiser by residual and transformer blocks, whatever its configuration says.

    Raises:
        ValueError: the configuration has FSDP recompute activations, which renames the weights.
    """
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None  # under FSDP there is one
    if plugin.activation_checkpointing:
        raise ValueError("accelerate: expected --checkpointing, got FSDP's own activation checkpointing")
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, list(_UNITS)


def gather_keys(denoiser: Denoiser) -> None:
    """Have the blocks' weights whole also for the keys and values of tokens, which the U-Net computes before them."""
    for block in denoiser.unet.transformer_blocks():
        for method in ("image_key_value", "text_key_value"):
            register_fsdp_forward_method(block, method)


def part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is divided by rows, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a divided tensor as a whole, on the CPU; every process has to ask for it. Others stay as they are."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, the same on every process, into one that may be divided."""
    if isinstance(target, DTensor):
        source = source.to(target.device)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    part(target).copy_(part(source))


def fill_gradients(weights: Iterable[Tensor]) -> None:
    """Give weights without a gradient one of zeros: a checkpoint of FSDP has the optimizer's state of all weights."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)


class Whole:
    """Copy of a denoiser on the main process, made before its weights are divided, for what needs all of them.

    Args:
        accelerator: the processes.
        module: a denoiser that `accelerator.prepare` has not seen yet.
    """

    def __init__(self, accelerator: Accelerator, module: Denoiser):
        self.module: Denoiser | None = deepcopy(module).cpu() if accelerator.is_main_process else None

    @torch.no_grad()
    def gather(self, module: Denoiser, weights: dict[str, Tensor]) -> None:
        """Collect the divided weights; every process has to take part.

        Args:
            module: the denoiser, divided.
            weights: weights in place of its own, by name.
        """
        own = {} if self.module is None else dict(self.module.named_parameters())
        for name, weight in module.named_parameters():
            full = whole(weights.get(name, weight))
            if own:
                own[name].copy_(full)
