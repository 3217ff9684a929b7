"""Batches of a training run: which heads, views, noise and dropped conditions a step has, by seed and step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gafext.training.latents import EncodedHead


@dataclass(frozen=True)
class Sampling:
    """How a step's batch is drawn; fractions are of the heads.

    Attributes:
        batch: heads per step, over all processes.
        views: views per head.
        near: heads whose views are neighbours, instead of spread over all cameras.
        apart: heads of which each view has a noise level of its own.
        drop_image: heads without image tokens, for guidance.
        drop_all: heads without image tokens, normals and pose.
        blindfold: heads of which each view sees the portrait or not, so that the others have to tell it; not for U-Nets
            in which all views attend to an extra frame of the portrait.
    """

    batch: int = 4
    views: int = 4
    near: float = 0.3
    apart: float = 0.3
    drop_image: float = 0.1
    drop_all: float = 0.05
    blindfold: float = 0.4


@dataclass
class Batch:
    """Inputs of a step for B heads of V views, on the CPU; rows are heads, views fastest."""

    latents: Tensor  # [B,V,C,h,w]
    pose: Tensor  # [B,V,pose_dim]
    features: Tensor | None  # [B,T,D] of the image encoder; None: `portraits` are there for it
    noise: Tensor  # [B,V,C,h,w]
    timesteps: Tensor  # [B,V]
    sees: Tensor  # [B,V] of 0 and 1: the view attends to the portrait
    normals: Tensor | None = None  # [B,V,C,h,w], of a U-Net that takes them
    portraits: Tensor | None = None  # [B,3,S,S], as the image encoder takes them
    weights: Tensor | None = None  # [B,V,1,h,w], of the squared error
    reference: Tensor | None = None  # [B,C,h,w], of a U-Net with the portrait's latents as an extra frame

    def part(self, index: int, count: int) -> Batch:
        """Return the share of one of `count` processes.

        Raises:
            ValueError: the heads do not divide among them.
        """
        if len(self.latents) % count:
            raise ValueError(f"batch: expected a multiple of the {count} processes, got {len(self.latents)}")
        return self._each(lambda tensor: tensor.chunk(count)[index])

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in given.items() if tensor is not None})


def choose_views(places: Tensor, count: int, *, near: bool, random: torch.Generator) -> Tensor:
    """Choose views of a head: a random one, and the nearest to it, or random ones.

    Args:
        places: [V,3] positions of the cameras.
        count: number of views, at most V.
        near: whether they are neighbours.
        random: source of the choice.

    Returns:
        [count] indices.
    """
    order = torch.randperm(len(places), generator=random)
    if near:
        order = (places - places[order[0]]).norm(dim=1).argsort(stable=True)
    return order[:count]


def draw_batch(encoded: Sequence[EncodedHead], step: int, sampling: Sampling, *, seed: int, timesteps: int) -> Batch:
    """Draw the whole batch of a step, which is the same on every process and after a resume.

    Args:
        encoded: heads.
        step: number of the step.
        sampling: how to draw.
        seed: seed of the run.
        timesteps: number of training timesteps, T.
    """
    random = torch.Generator().manual_seed(seed * 1_000_003 + step)  # the CPU's takes the lower 32 bits alone
    count, views = sampling.batch, sampling.views

    def chance(fraction: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) < fraction

    rows = []
    for near in chance(sampling.near, count).tolist():
        head = encoded[int(torch.randint(len(encoded), (1,), generator=random))]
        chosen = choose_views(head.places, views, near=near, random=random)
        portrait = int(torch.randint(head.portraits, (1,), generator=random))
        rows.append(head.read(chosen.tolist(), portrait))
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    latents, normals, reference = stacked["latents"], stacked.get("normals"), stacked.get("reference")
    times = torch.randint(timesteps, (count, views), generator=random)
    times = torch.where(chance(sampling.apart, count, 1), times, times[:, :1])
    every = chance(sampling.drop_all, count, 1)
    hidden = every | chance(sampling.drop_image, count, 1)
    partly = chance(sampling.blindfold if reference is None else 0.0, count, 1)
    sees = torch.where(partly, chance(0.5, count, views), True) & ~hidden
    keep = (~every).to(latents.dtype)
    return Batch(
        latents=latents,
        normals=None if normals is None else normals * keep[..., None, None, None],
        reference=reference,
        pose=stacked["pose"] * keep[..., None],
        features=stacked.get("features"),
        portraits=stacked.get("portraits"),
        noise=torch.randn(latents.shape, generator=random),
        timesteps=times,
        sees=sees.to(latents.dtype),
    )


class Steps(Dataset):
    """Batches by number, for a DataLoader whose processes read ahead: one process's part of `draw_batch`.

    Args:
        encoded, sampling, seed, timesteps: as for `draw_batch`.
        process: index of the process.
        processes: number of processes.
    """

    def __init__(
        self,
        encoded: Sequence[EncodedHead],
        sampling: Sampling,
        *,
        seed: int,
        timesteps: int,
        process: int,
        processes: int,
    ):
        self.encoded, self.sampling, self.seed, self.timesteps = encoded, sampling, seed, timesteps
        self.process, self.processes = process, processes

    def __getitem__(self, step: int) -> Batch:
        batch = draw_batch(self.encoded, step, self.sampling, seed=self.seed, timesteps=self.timesteps)
        return batch.part(self.process, self.processes)
