"""IP-Adapter files (arXiv 2308.06721), plain, Plus and full-face, for a U-Net without attn_ip."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gafext import weights
from gafext.config import UNetConfig
from gafext.config.unet import image_projection_fields
from gafext.errors import CheckpointError
from gafext.models.blocks import MultiViewTransformerBlock
from gafext.models.image_projection import Projection, image_projection
from gafext.models.unet import MultiViewUNet
from gafext.weights.keys import ip_adapter_rule

_SIZES = ("image_embed_dim", "image_tokens", "resampler_width", "resampler_depth", "resampler_heads")
_UNCONDITIONAL = {"pooled": "zero_features", "mlp": "zero_image", "resampler": "zero_image"}


@dataclass(frozen=True)
class IPAdapter:
    """Validated adapter for one U-Net.

    Attributes:
        config: configuration of the U-Net with the adapter.
        projection: image projection, on the meta device.
        tensors: weights of the projection and of `to_k_ip` and `to_v_ip` of all blocks.
    """

    config: UNetConfig
    projection: Projection
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, unet: MultiViewUNet, path: str | Path, *, scale: float = 1.0) -> IPAdapter:
        """Read an IP-Adapter file and validate it for a U-Net, which is not changed.

        Args:
            unet: U-Net without attn_ip.
            path: a safetensors file with `image_proj.*` and `ip_adapter.{1,3,...}.to_{k,v}_ip.weight`, or the trainer's
                checkpoint with `image_proj_model.*` and `adapter_modules.*`.
            scale: weight of the attention to the image; 0 removes its influence.

        Raises:
            CheckpointError: the file is a pickle, is damaged, or does not fit; the message lists all wrong keys.
            ValueError: the U-Net has attn_ip, or the scale is not finite.
        """
        path = Path(path)
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale}")
        if unet.config.image_attention == "block":
            raise ValueError("load_ip_adapter: expected a U-Net without attn_ip, got one that has it")
        weights.require_safetensors(path, nested=True)
        blocks = _blocks(unet)
        file = weights.WeightFile(path)
        file.rename(weights.unwrapped_rule(file))
        file.rename(ip_adapter_rule(blocks, file))
        config = _with_adapter(unet.config, file, scale)
        with torch.device("meta"):
            projection = image_projection(config)
        assert projection is not None  # _with_adapter requires one
        expected = {f"image_projection.{name}": tuple(value.shape) for name, value in projection.state_dict().items()}
        for name, block in blocks.items():
            for which in ("to_k_ip", "to_v_ip"):
                expected[f"{name}.attn2.{which}.weight"] = tuple(block.attn2.to_k.weight.shape)
        weights.check_keys(file, expected)
        tensors = {
            key: file.tensor(key, dtype=unet.dtype).view(shape).to(device=unet.device, dtype=unet.dtype)
            for key, shape in expected.items()
        }
        return cls(config, projection, tensors)

    def apply(self, unet: MultiViewUNet) -> None:
        """Add the adapter to the U-Net for which it was read, replacing an earlier adapter."""
        unet.config, unet.image_projection = self.config, self.projection.train(unet.training)
        with torch.device("meta"):
            for block in _blocks(unet).values():
                block.attn2.add_image()
        unet.load_state_dict(self.tensors, strict=False, assign=True)


def load_ip_adapter(unet: MultiViewUNet, path: str | Path, *, scale: float = 1.0) -> None:
    """Add an IP-Adapter's image projection and decoupled image attention to a U-Net.

    out = attn2(text) + scale · attn2(image), before the output projection. The U-Net's configuration is updated, and
    `save_pretrained` writes the adapter with the other weights. Arguments and errors are those of `IPAdapter.read`.

    Source: IP-Adapter (arXiv 2308.06721) eq. 5; diffusers: loaders/unet.py.
    """
    IPAdapter.read(unet, path, scale=scale).apply(unet)


def _blocks(unet: MultiViewUNet) -> dict[str, MultiViewTransformerBlock]:
    return {name: part for name, part in unet.named_modules() if isinstance(part, MultiViewTransformerBlock)}


def _with_adapter(config: UNetConfig, file: weights.WeightFile, scale: float) -> UNetConfig:
    fields = image_projection_fields(file.shapes)
    kind = fields.get("image_projection")
    if kind not in _UNCONDITIONAL:
        raise CheckpointError(
            f"{file.path}: expected image_proj.proj and image_proj.norm (IP-Adapter), image_proj.latents "
            f"(IP-Adapter Plus) or image_proj.proj.3 (full face), got {', '.join(sorted(file)[:8]) or 'no tensors'}"
        )
    adapter = {"image_attention": "decoupled", "image_scale": scale, "image_unconditional": _UNCONDITIONAL[kind]}
    try:
        return replace(config, **{**dict.fromkeys(_SIZES), **adapter, **fields})
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
