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
        eta: default of a call.
        doubles_latents: a checkpoint without upsampler decodes latents of twice the U-Net's size.
        reference_channels: the U-Net's channels after the noisy latents hold the portrait's latents in every view.
        attends_to_latents: the U-Net attends to features of the portrait's latents.
        portrait_labels: the U-Net's class labels encode the portrait instead of the cameras.
        fixed_cameras: the U-Net was trained with `default_cameras` alone.
        prompts: texts that the U-Net was trained with, one for all views or one per view; (): zeros instead of text.
        negative_prompt: text of the unconditional pass; None: that of the conditional pass.
        prompt_file: file of a checkpoint with the embeddings of `negative_prompt` and `prompts`.
        prompt_advice: how to get that file, for a checkpoint that needs it; "": zeros or the empty prompt instead.
        snr_shift: divisor of the signal-to-noise ratio at the last timestep of the parent's schedule.
        background: colour behind the portraits of training, 0 to 255, for portraits with transparency.
    """

    unet_class_names: ClassVar[frozenset[str]] = frozenset()
    guidance_scale: ClassVar[float] = 7.5
    eta: ClassVar[float] = 0.0
    doubles_latents: ClassVar[bool] = True
    reference_channels: ClassVar[bool] = False
    attends_to_latents: ClassVar[bool] = False
    portrait_labels: ClassVar[bool] = False
    fixed_cameras: ClassVar[bool] = False
    prompts: ClassVar[tuple[str, ...]] = ()
    negative_prompt: ClassVar[str | None] = None
    prompt_file: ClassVar[str] = "empty_prompt.safetensors"
    prompt_advice: ClassVar[str] = ""
    snr_shift: ClassVar[float] = 1.0
    background: ClassVar[tuple[int, int, int]] = (255, 255, 255)

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

    def rays(self, config: UNetConfig, cameras: Cameras) -> Tensor | None:
        """Encode cameras for the U-Net's ray encoder: [V,6,1,1] or [V,6,8h,8w] in [0,1]; None without one."""
        return None

    def default_cameras(self) -> Cameras | None:
        """Return the cameras of a run that does not ask for others; None: an orbit."""
        return None

    def looks_at_portrait(self, config: UNetConfig) -> bool:
        """Return whether the portrait affects the views."""
        sees_latents = self.reference_channels or self.attends_to_latents
        return config.image_attention is not None or sees_latents or self.portrait_labels

    def has_reference_frame(self, config: UNetConfig) -> bool:
        """Return whether the portrait's latents are an extra frame after the views."""
        return False

    def unconditional_reference(self, reference_latents: Tensor) -> Tensor:
        """Return the reference latents [B,4,h,w] of the unconditional pass."""
        return torch.zeros_like(reference_latents)
