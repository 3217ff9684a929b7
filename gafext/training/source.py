"""What a run trains on: where its batches come from, and what measures its views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader

from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.training.batches import Batch, Sampling, Steps
from gafext.training.head import Head
from gafext.training.latents import EncodedHead
from gafext.training.settings import Settings
from gafext.training.validation import validate

_READERS = 2  # processes that read ahead of a GPU; on the CPU they would take the training's cores


class Source(Protocol):
    """Source of the batches of a run: folders of heads (`Folders`), or heads that are drawn while it runs.

    Attributes:
        described: what its batches depend on, by name: a run that resumes with another says so. `held_out` in it, names
            of the subjects that `validate` measures, has to stay.
    """

    @property
    def described(self) -> dict[str, Any]: ...

    def batches(self, numbers: range, *, process: int, processes: int) -> Iterator[Batch]:
        """Yield one process's part of each batch.

        Args:
            numbers: numbers of the batches, on which, with the seed, they depend alone.
            process: index of the process.
            processes: number of processes, among which the heads of a batch are divided.
        """
        ...

    def validate(self, pipeline: MultiViewDiffusionPipeline, folder: Path) -> tuple[dict[str, float], list[np.ndarray]]:
        """Measure the views that the pipeline makes of heads that are held out, as `validation.validate` does.

        Args:
            pipeline: the pipeline with the averaged weights.
            folder: folder for pictures.

        Returns:
            Numbers by name, empty where nothing is held out; and pictures [H,W,3] uint8.
        """
        ...


class Folders:
    """Encoded heads of `read_heads`.

    Args:
        encoded: heads to train on.
        held_out: heads of the validation.
        key: digest of the encoded heads, `cache_key`.
        sampling: how batches are drawn.
        settings: seed, and what `validate` needs.
        timesteps: number of training timesteps.
        device_type: "cpu", "cuda" or another: batches of the others are read ahead.
    """

    def __init__(
        self,
        encoded: list[EncodedHead],
        held_out: list[Head],
        *,
        key: str,
        sampling: Sampling,
        settings: Settings,
        timesteps: int,
        device_type: str,
    ):
        self.encoded, self.held_out, self.key = encoded, held_out, key
        self.sampling, self.settings, self.timesteps = sampling, settings, timesteps
        self.readers = 0 if device_type == "cpu" else _READERS

    @property
    def described(self) -> dict[str, Any]:
        subjects = sorted(head.subject for head in self.held_out)
        return {**asdict(self.sampling), "data": self.key, "held_out": subjects}

    def batches(self, numbers: range, *, process: int, processes: int) -> Iterator[Batch]:
        steps = Steps(
            self.encoded,
            self.sampling,
            seed=self.settings.seed,
            timesteps=self.timesteps,
            process=process,
            processes=processes,
        )
        return iter(DataLoader(steps, batch_size=None, sampler=numbers, num_workers=self.readers))

    def validate(self, pipeline: MultiViewDiffusionPipeline, folder: Path) -> tuple[dict[str, float], list[np.ndarray]]:
        if not self.held_out:
            return {}, []
        return validate(pipeline, self.held_out, folder, self.settings, views=self.sampling.views)
