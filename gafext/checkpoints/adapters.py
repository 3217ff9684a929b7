"""Verbs of a pipeline that add and remove adapters of the U-Net, with diffusers' names."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gafext.checkpoints.ip_adapter import IPAdapter
from gafext.checkpoints.lora import merge_lora
from gafext.checkpoints.memory import PipelineMemory
from gafext.config import UNetConfig
from gafext.errors import CheckpointNotFoundError
from gafext.models.attention import DecoupledAttention
from gafext.models.int8 import require_floats
from gafext.models.unet import MultiViewUNet
from gafext.weights.hub import checkpoint_file


class PipelineAdapters(PipelineMemory):
    """LoRA and IP-Adapter files of a pipeline."""

    unet: MultiViewUNet
    origin: dict[str, Any]
    _before_lora: dict[str, Tensor] | None = None
    _before_ip_adapter: tuple[UNetConfig, Any, list[tuple[Any, Any]]] | None = None

    def _check_parts(self, config: UNetConfig | None = None) -> None:
        raise NotImplementedError

    def load_lora_weights(
        self,
        file: str | Path,
        *,
        scale: float = 1.0,
        weight_name: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        """Merge a LoRA file into the U-Net: W ← W + scale · alpha/r · up · down.

        Args:
            file: safetensors file of peft, diffusers or kohya; or with `weight_name`, its folder or hub id.
            scale: weight of the updates; -1 reverts a merge with 1, up to rounding.
            weight_name: name of the file in the folder or repository.
            subfolder: folder of the file in the folder or repository.

        Raises:
            CheckpointError: the file is missing, damaged or does not fit; the U-Net is unchanged.
            ValueError: the scale is not finite, or the weights are 8-bit integers.
        """
        path = _file(file, weight_name, subfolder)
        with self._without_offload():
            before = self.unet.state_dict()
            for note in merge_lora(self.unet, path, scale=scale):
                warnings.warn(note, stacklevel=2)
            after = self.unet.state_dict()
        merged = {name: value.cpu() for name, value in before.items() if value.data_ptr() != after[name].data_ptr()}
        self._before_lora = merged | (self._before_lora or {})
        self.origin |= {"lora": [*self.origin.get("lora", ()), {"file": str(path), "scale": scale}]}

    def unload_lora_weights(self) -> None:
        """Give the U-Net the weights back that it had before the first `load_lora_weights`, bit for bit.

        They are kept in main memory from the first merge on. Without a LoRA, nothing changes.

        Raises:
            ValueError: the weights were rounded to 8-bit integers after the merge.
        """
        if self._before_lora is not None:
            require_floats(self.unet, "unload_lora_weights")
            self.maybe_free_model_hooks()
            self.unet.load_state_dict(self._before_lora, strict=False)
        self._before_lora = None
        self.origin = {name: value for name, value in self.origin.items() if name != "lora"}

    def load_ip_adapter(
        self,
        file: str | Path,
        *,
        scale: float = 1.0,
        weight_name: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        """Add an IP-Adapter, plain, Plus or full-face, to a U-Net without attn_ip; it replaces an earlier IP-Adapter.

        Args:
            file: safetensors file; or with `weight_name`, its folder or hub id.
            scale: weight of the attention to the portrait; 0 removes its influence.
            weight_name: name of the file in the folder or repository.
            subfolder: folder of the file in the folder or repository.

        Raises:
            CheckpointError: the file is damaged or does not fit the U-Net or image encoder; the pipeline is unchanged.
            ValueError: the U-Net has attn_ip, or the scale is not finite.
        """
        path = _file(file, weight_name, subfolder)
        with self._without_offload():
            adapter = IPAdapter.read(self.unet, path, scale=scale)
            self._check_parts(adapter.config)
            layers = [(layer.to_k_ip, layer.to_v_ip) for layer in self._image_layers()]
            self._before_ip_adapter = self._before_ip_adapter or (self.unet.config, self.unet.image_projection, layers)
            adapter.apply(self.unet)
        self._forget_adapters_lora()
        self.origin |= {"ip_adapter": str(path), "ip_adapter_scale": scale}

    def set_ip_adapter_scale(self, scale: float) -> None:
        """Set the weight of the attention to the portrait in the next runs; 0 removes its influence.

        Raises:
            ValueError: the U-Net has no IP-Adapter, or the scale is not a finite number.
        """
        if self.unet.config.image_attention != "decoupled":
            raise ValueError("set_ip_adapter_scale: expected a U-Net with an IP-Adapter, got one without")
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number for all layers, got {scale!r}")
        self.unet.config = replace(self.unet.config, image_scale=float(scale))
        self.origin |= {"ip_adapter_scale": scale}

    def unload_ip_adapter(self) -> None:
        """Remove the IP-Adapters that `load_ip_adapter` added; the image encoder stays.

        Raises:
            ValueError: none was added.
        """
        if self._before_ip_adapter is None:
            raise ValueError("unload_ip_adapter: expected an IP-Adapter from load_ip_adapter, got none")
        config, projection, layers = self._before_ip_adapter
        with self._without_offload():
            self.unet.config, self.unet.image_projection = config, projection
            for layer, (to_k_ip, to_v_ip) in zip(self._image_layers(), layers, strict=True):
                layer.to_k_ip, layer.to_v_ip = to_k_ip, to_v_ip
            self.unet.to(self.unet.device, self.unet.dtype)
        self._before_ip_adapter = None
        self._forget_adapters_lora()
        self.origin = {key: value for key, value in self.origin.items() if not key.startswith("ip_adapter")}

    def _forget_adapters_lora(self) -> None:
        """Forget the weights before a LoRA of the IP-Adapter's layers, which are others now."""
        kept = (self._before_lora or {}).items()
        of_adapter = ("to_k_ip.", "to_v_ip.", "image_projection.")
        self._before_lora = {name: x for name, x in kept if not any(part in name for part in of_adapter)} or None

    def _image_layers(self) -> list[DecoupledAttention]:
        return [module for module in self.unet.modules() if isinstance(module, DecoupledAttention)]


def _file(place: str | Path, weight_name: str | None, subfolder: str | None) -> Path:
    if weight_name is not None:
        prefix = "" if subfolder is None else f"{subfolder}/"
        if weight_name == "adapter_model.safetensors":  # peft's, whose alpha is in a file beside it
            with suppress(CheckpointNotFoundError):
                checkpoint_file(place, f"{prefix}adapter_config.json")
        return checkpoint_file(place, f"{prefix}{weight_name}")
    if subfolder is not None:
        raise ValueError(f"weight_name: expected the name of the file in {place}/{subfolder}, got None")
    return Path(place)
