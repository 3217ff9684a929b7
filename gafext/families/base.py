"""Base class of the families of checkpoints."""

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
    """Conventions of one family of checkpoints; the defaults are GAF's, and subclasses override what differs.

    Attributes:
        unet_class_names: values of `_class_name` in the `config.json` of the family's U-Nets.
        guidance_scale: default for checkpoints whose files do not specify it.
        reads_empty_prompt: the U-Net was trained with the encoded empty prompt as its text, instead of zeros.
    """

    unet_class_names: ClassVar[frozenset[str]] = frozenset()
    guidance_scale: ClassVar[float] = 7.5
    reads_empty_prompt: ClassVar[bool] = False

    def owns(self, config: UNetConfig) -> bool:
        """Return whether a configuration without a family name belongs to this family."""
        return False

    def unet_config(self, values: dict[str, Any], shapes: Shapes, *, source: str) -> UNetConfig:
        """Convert the U-Net's `config.json`.

        Args:
            values: content of the file.
            shapes: shapes of the tensors in the weight file, by their names there.
            source: path of the file, for error messages.

        Returns:
            The configuration.

        Raises:
            CheckpointError: the file sets a value that gafext does not support.
        """
        return UNetConfig.from_dict(values, source=source)

    def key_rule(self, config: UNetConfig) -> KeyRule:
        """Return the rule that maps the names of the U-Net's tensors in the file to gafext's."""
        return same_key

    def poses(self, config: UNetConfig, cameras: Cameras) -> Tensor:
        """Encode cameras for the U-Net's pose MLP: [frames,pose_dim], the reference frame last."""
        assert config.pose_dim is not None
        return cameras.pose(config.pose_dim)

    def has_reference_frame(self, config: UNetConfig) -> bool:
        """Return whether the portrait's latents are an extra frame after the views."""
        return False

    def unconditional_reference(self, reference_latents: Tensor) -> Tensor:
        """Return the reference latents [B,4,h,w] of the unconditional pass."""
        return torch.zeros_like(reference_latents)
