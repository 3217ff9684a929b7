"""Verbs of a pipeline that trade speed for memory, with diffusers' names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gafext.models.base import PretrainedModel
from gafext.models.int8 import is_quantized
from gafext.models.offload import Offload
from gafext.models.vae import AutoencoderKL


def default_device() -> torch.device:
    """Return the first available device of CUDA, MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class PipelineMemory:
    """Slicing and tiling of the autoencoder, and offloading of the weights to main memory."""

    vae: AutoencoderKL
    _offload: Offload | None = None

    @property
    def _networks(self) -> list[nn.Module]:
        raise NotImplementedError

    def enable_vae_slicing(self) -> None:
        """Decode one view at a time, as a new pipeline does."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all views as one batch: as many times the memory, sometimes faster on a GPU."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self, tile_size: int = 512) -> None:
        """Encode and decode images in tiles, see `AutoencoderKL.enable_tiling`."""
        self.vae.enable_tiling(tile_size)

    def disable_vae_tiling(self) -> None:
        """Encode and decode images as a whole."""
        self.vae.disable_tiling()

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the weights in main memory, and those of one network at a time on the accelerator.

        The network stays there until another one is used: the U-Net for all steps of a run.

        Args:
            gpu_id: index of the GPU.
            device: device to compute on; None: CUDA or MPS, or a warning that this machine has neither, and no change.

        Raises:
            ValueError: the weights are 8-bit integers, or gpu_id is given with another index in `device`.
        """
        self._enable_offload("enable_model_cpu_offload", gpu_id, device, sequential=False)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the weights in main memory, and those of one block at a time on the accelerator.

        All weights are copied to the accelerator at every step. Arguments and errors are those of
        `enable_model_cpu_offload`.
        """
        self._enable_offload("enable_sequential_cpu_offload", gpu_id, device, sequential=True)

    def maybe_free_model_hooks(self) -> None:
        """Drop the weights on the accelerator, where offloading is enabled; each call of the pipeline ends with it."""
        if self._offload is not None:
            self._offload.release()

    def remove_all_hooks(self) -> None:
        """End offloading; the weights stay in main memory, and `to` moves them."""
        if self._offload is not None:
            self._offload.remove()
        self._offload = None

    def _enable_offload(
        self, name: str, gpu_id: int | None, device: torch.device | str | None, *, sequential: bool
    ) -> None:
        if any(map(is_quantized, self._networks)):
            raise ValueError(f"{name}: expected floating-point weights, got 8-bit ones, which only run on the CPU")
        target = default_device() if device is None else torch.device(device)
        if gpu_id is not None:
            if target.index not in (None, gpu_id):
                raise ValueError(f"gpu_id: expected {target.index}, the index of device, or None, got {gpu_id}")
            target = torch.device(target.type, gpu_id)
        if device is None and target.type == "cpu":
            warnings.warn(f"{name}: no accelerator (CUDA or MPS) here; the weights stay in main memory", stacklevel=3)
            return
        self.remove_all_hooks()
        self._start_offload(target, sequential)

    def _start_offload(self, device: torch.device, sequential: bool) -> None:
        found = (part for network in self._networks for part in network.modules() if isinstance(part, PretrainedModel))
        self._offload = Offload(list(found), device, sequential=sequential)

    @contextmanager
    def _without_offload(self) -> Iterator[None]:
        """Have all weights in main memory for a change of the networks, and go on as before it."""
        offload = self._offload
        self.remove_all_hooks()
        try:
            yield
        finally:
            if offload is not None:
                self._start_offload(offload.device, offload.sequential)
