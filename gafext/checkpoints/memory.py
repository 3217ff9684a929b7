"""Verbs of a pipeline that trade speed for memory, with diffusers' names, and the check that a run fits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from gafext.checkpoints.estimate import Workload, activation_bytes, free_bytes
from gafext.models.base import PretrainedModel
from gafext.models.int8 import is_quantized
from gafext.models.offload import Offload
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.upsampler import LatentUpsampler

CERTAIN = 1.3
"""Multiple of the free memory that an estimate has to exceed for a run to be refused; the estimate is that exact."""


def default_device() -> torch.device:
    """Return the first available device of CUDA, MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(device: torch.device | str, *, option: str = "device") -> torch.device:
    """Return a device, or raise a ValueError that begins with the option if nothing can be put there."""
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise ValueError(f"{option} {device}: not usable here ({str(error).splitlines()[0]})") from None


class PipelineMemory:
    """Slicing and tiling of the autoencoder, and offloading of the weights to main memory."""

    unet: MultiViewUNet
    vae: AutoencoderKL
    upsampler: LatentUpsampler | None
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

    def _check_graph(self, graph: bool) -> None:
        """Raise a ValueError if a CUDA graph is asked for whose weights would be dropped between its replays."""
        if graph and self._offload is not None:
            raise ValueError("graph: expected False with offloading, which moves the weights that a CUDA graph reads")

    def _check_memory(self, *, portraits: int, views: int, passes: int, size: int, doubled: bool) -> None:
        """Warn if a run is not likely to fit into the memory of its device, and refuse it if that is clear.

        Args:
            portraits, views, passes: their product is the U-Net's batch.
            size: side of the U-Net's latents.
            doubled: whether they are doubled before they are decoded.

        Raises:
            ValueError: the estimate is 1.3 times what is free, or more.
        """
        device = self.unet.device
        unused = free_bytes(device)
        work = self._workload(portraits=portraits, views=views, passes=passes, size=size, doubled=doubled)
        offload = None if self._offload is None else self._offload.sequential
        resident = all(next(network.parameters()).device == device for network in self._networks)
        if unused is None or (resident and self._activation_bytes(work) <= unused):
            return  # without counting the weights, which takes milliseconds
        free, needed = unused + self._weights_on(device), self._needed_bytes(work, offload)
        if needed <= free:
            return
        choices = {}
        if device.type != "cpu" and offload is None:
            choices |= {"--offload model": self._needed_bytes(work, False)}
            choices |= {"--offload sequential": self._needed_bytes(work, True)}
        while views > 1 and needed > free:
            views //= 2
            decoded = min(work.decoded_rows, portraits * views)
            needed = self._needed_bytes(replace(work, rows=portraits * views, decoded_rows=decoded), offload)
        choices[f"--views {views}"] = needed
        needed = self._needed_bytes(work, offload)
        if self.unet.dtype == torch.float32 and not is_quantized(self.unet):
            choices["--dtype bfloat16"] = needed / 2
        enough = [choice for choice, bytes_then in choices.items() if bytes_then <= free]
        advice = ", ".join(enough[:-1]) + " or " * (len(enough) > 1) + enough[-1] if enough else "use a larger machine"
        message = f"memory: the run needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free on {device}: {advice}"
        if needed >= CERTAIN * free:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)

    def available_bytes(self) -> float | None:
        """Return what the device has for runs, the weights that are there included; None if it does not say."""
        free = free_bytes(self.unet.device)
        return None if free is None else free + self._weights_on(self.unet.device)

    def _weights_on(self, device: torch.device) -> int:
        return sum(_weight_bytes(one, on=device) for one in self._networks)

    def estimate_bytes(self, *, portraits: int, views: int, passes: int, size: int, doubled: bool) -> float:
        """Estimate what a run needs on its device, weights included, in bytes.

        Args:
            portraits, views, passes: their product is the U-Net's batch.
            size: side of the U-Net's latents.
            doubled: whether they are doubled before they are decoded.
        """
        work = self._workload(portraits=portraits, views=views, passes=passes, size=size, doubled=doubled)
        return self._needed_bytes(work, None if self._offload is None else self._offload.sequential)

    def _workload(self, *, portraits: int, views: int, passes: int, size: int, doubled: bool) -> Workload:
        return Workload(
            rows=portraits * views,
            passes=passes,
            size=size,
            decoded_size=size * (1 + doubled),
            decoded_rows=1 if self.vae.use_slicing else portraits * views,
            tile=self.vae.latent_tile,
            itemsize=self.unet.dtype.itemsize,
        )

    def _needed_bytes(self, work: Workload, offload: bool | None) -> float:
        """Estimate what a run needs on its device: weights, of which offloading leaves a network or a block there."""
        weights = [_weight_bytes(network) for network in self._networks]
        resident = 0 if offload else sum(weights) if offload is None else max(weights)  # a block is small
        return resident + self._activation_bytes(work)

    def _activation_bytes(self, work: Workload) -> float:
        upsampler = None if self.upsampler is None else self.upsampler.unet.config
        return max(activation_bytes(work, unet=self.unet.config, vae=self.vae.config, upsampler=upsampler).values())


def _weight_bytes(network: nn.Module, on: torch.device | None = None) -> int:
    """Return the bytes of a network's weights, or of those that are on one device."""
    tensors = (*network.parameters(), *network.buffers())
    return sum(tensor.nbytes for tensor in tensors if on is None or tensor.device == on)
