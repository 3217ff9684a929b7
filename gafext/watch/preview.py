"""Pictures of a run while it is being denoised, without the autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from gafext.atomic import replace_whole

_SIDE = 64  # pixels of a view, at least


class LatentToRGB:
    """Linear map from latents to colours: rgb = W z + b at each position, by least squares on a picture.

    Args:
        picture: [1,3,H,W] in [0,1], such as the portrait.
        latents: its latents [1,C,h,w], scaled as the U-Net's.
    """

    def __init__(self, picture: Tensor, latents: Tensor):
        colours = F.interpolate(picture.to(latents), size=latents.shape[2:], mode="area")
        rows = _with_ones(latents)
        # A ridge, because a drawing can have fewer colours than latents have channels.
        normal = rows.mT @ rows + 1e-3 * len(rows) * torch.eye(rows.shape[1], device=rows.device)
        self.weight = torch.linalg.solve(normal, rows.mT @ colours.movedim(1, -1).flatten(0, 2))  # [C+1,3]

    def __call__(self, latents: Tensor) -> Tensor:
        """Map latents [N,C,h,w] to colours [N,3,h,w] in [0,1]."""
        batch, _, height, width = latents.shape
        colours = _with_ones(latents) @ self.weight
        return colours.unflatten(0, (batch, height, width)).movedim(-1, 1).clamp(0, 1)


def _with_ones(latents: Tensor) -> Tensor:
    """Return the positions of latents as rows [N*h*w,C+1], the last column 1."""
    rows = latents.float().movedim(1, -1).flatten(0, 2)
    return F.pad(rows, (0, 1), value=1.0)


class Preview:
    """A `callback_on_step_end` that writes a picture which grows by a row of all views every few steps.

    Each row shows the clean views predicted at its step, at the size of the latents, enlarged.

    Args:
        path: picture to write; complete at any time.
        to_rgb: colours of latents.
        every: steps from row to row; above 0.
        show: called with each new row; None for none.
    """

    tensor_inputs: ClassVar[tuple[str, ...]] = ("pred_original_sample",)

    def __init__(
        self,
        path: Path,
        to_rgb: LatentToRGB,
        *,
        every: int,
        show: Callable[[PIL.Image.Image], None] | None = None,
    ):
        if every < 1:
            raise ValueError(f"preview: expected a whole number of steps above 0, got {every}")
        if path.suffix.lower() not in PIL.Image.registered_extensions():
            raise ValueError(f"preview: expected the name of a picture, such as views.png, got {path.name}")
        self.path, self.to_rgb, self.every, self.show = path, to_rgb, every, show
        self._rows: list[np.ndarray] = []

    def __call__(self, pipeline: Any, step: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        if step + 1 == self.every:
            self._rows = []  # of a run before this one, which may have had other views
        if (step + 1) % self.every == 0:
            self._rows.append(_row(self.to_rgb(tensors["pred_original_sample"])))
            with replace_whole(self.path.parent) as temporary:
                PIL.Image.fromarray(np.concatenate(self._rows)).save(temporary / self.path.name)
            if self.show is not None:
                self.show(PIL.Image.fromarray(self._rows[-1]))


def _row(colours: Tensor) -> np.ndarray:
    scale = -(-_SIDE // colours.shape[-1])
    views = (255 * colours).round().byte().cpu().movedim(1, -1).numpy()
    return np.concatenate(list(views), axis=1).repeat(scale, axis=0).repeat(scale, axis=1)
