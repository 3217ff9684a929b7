"""What sets one family of checkpoints apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gafext.cameras import Cameras
from gafext.config import UNetConfig
from gafext.weights.keys import KeyRule, same_key

Shapes = Mapping[str, tuple[int, ...]]


class Family:
    """The decisions of one family of checkpoints; the methods here are GAF's, and a family overrides what differs.

    Attributes:
        unet_class_names: `_class_name` of the U-Net's `config.json` in the family's checkpoints.
        guidance_scale: of a checkpoint whose files do not say it.
        reads_empty_prompt: whether the network was trained with the text encoder's empty prompt in place of zeros.
    """

    unet_class_names: ClassVar[frozenset[str]] = frozenset()
    guidance_scale: ClassVar[float] = 7.5
    reads_empty_prompt: ClassVar[bool] = False

    def owns(self, config: UNetConfig) -> bool:
        """Tell whether a configuration that names no family is of this one."""
        return False

    def unet_config(self, values: dict[str, Any], shapes: Shapes, *, source: str) -> UNetConfig:
        """Translate the U-Net's `config.json`.

        Args:
            values: the file's content.
            shapes: of the tensors beside it, by their names there.
            source: the file's path, for errors.

        Raises:
            CheckpointError: the file asks for what the network here does not do.
        """
        return UNetConfig.from_dict(values, source=source)

    def key_rule(self, config: UNetConfig) -> KeyRule:
        """Return the rule from the names of the U-Net's tensors in the file to ours."""
        return same_key

    def poses(self, config: UNetConfig, cameras: Cameras) -> Tensor:
        """Encode the cameras as the U-Net was trained to see them: [frames,pose_dim], the reference frame last."""
        return cameras.pose(config.pose_dim)

    def has_reference_frame(self, config: UNetConfig) -> bool:
        """Tell whether the portrait's latents are a frame of their own, after the views."""
        return False

    def unconditional_reference(self, reference_latents: Tensor) -> Tensor:
        """The reference latents [B,4,h,w] that the unconditional pass sees."""
        return torch.zeros_like(reference_latents)
