"""A run of the pipeline between `prepare` and `finish`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import PIL.Image
from torch import Tensor

from gafext.cameras import Cameras
from gafext.conditions.conditions import Conditions
from gafext.heads import Heads
from gafext.mesh import Mesh
from gafext.schedulers import Scheduler


@dataclass(frozen=True)
class Run:
    """One call of the pipeline, as `MultiViewDiffusionPipeline.prepare` returns it.

    Attributes:
        latents: initial latents [B*V,4,h,w] float32: noise, or noised renders.
        timesteps: the scheduler's timesteps, decreasing; the last ones of a run from renders.
        num_inference_steps: of the whole schedule.
        conditions: the U-Net's other inputs.
        cameras: V cameras.
        guidance_scale: 1.0 to 20.0.
        solver: the scheduler, or one of the run's own.
        seed: seed of all noise, or one per portrait.
        portraits: B portraits, RGB of any size.
        guidance_interval: noise levels (a, b) of the steps with guidance, a < σ ≤ b; None: all steps.
        graph: launch the U-Net and the upsampler's network as CUDA graphs.
        parallel: "guidance": this process computes one pass of a guided step, and another the other one; or None.
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
        upsample: "auto", "bilinear" or "none".
        upsample_steps: of the checkpoint's upsampler.
        output_type: "pil", "np", "pt" or "latent".
        is_batch: True if the call got a list of portraits or asked for several results each; it then returns a list.
        num_images_per_prompt: results per portrait; each counts as a portrait everywhere else.
        normal_maps: V pictures of the normal maps, or V for each of `heads`; None for a U-Net without them.
        mesh: the mesh that the normal maps are of, or None.
        heads: the heads that are fitted to the portraits and that the normal maps are of, or None; one for the
            `num_images_per_prompt` results of a portrait.
        settings: other parameters for run.json.
    """

    latents: Tensor
    timesteps: Tensor
    num_inference_steps: int
    conditions: Conditions
    cameras: Cameras
    guidance_scale: float
    solver: Scheduler
    seed: int | tuple[int, ...]
    portraits: Sequence[PIL.Image.Image]
    guidance_interval: tuple[float, float] | None = None
    graph: bool = False
    parallel: str | None = None
    eta: float = 0.0
    upsample: str = "auto"
    upsample_steps: int = 10
    output_type: str = "pil"
    is_batch: bool = False
    num_images_per_prompt: int = 1
    normal_maps: list[PIL.Image.Image] | None = None
    mesh: Mesh | None = None
    heads: Sequence[Heads] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def num_views(self) -> int:
        return len(self.cameras)

    @property
    def num_portraits(self) -> int:
        return len(self.latents) // self.num_views

    def begun(self) -> Run:
        """Return the run with a solver of its own at its first timestep: two runs may take steps in turns."""
        solver = self.solver.for_run()
        solver.set_timesteps(self.num_inference_steps)  # another run may have been prepared meanwhile
        solver.set_begin_index(len(solver.timesteps) - len(self.timesteps))
        return replace(self, solver=solver)

    def normal_maps_of(self, index: int) -> list[PIL.Image.Image] | None:
        """Return the V pictures of the normal maps of the result with this index."""
        if self.normal_maps is None or self.heads is None:
            return self.normal_maps
        first = index // self.num_images_per_prompt * self.num_views
        return self.normal_maps[first : first + self.num_views]

    def surface_of(self, index: int) -> Mesh | Heads | None:
        """Return what the normal maps of the result with this index are of; None: the neutral head, or pictures."""
        return self.mesh if self.heads is None else self.heads[index // self.num_images_per_prompt]

    def describe(self, index: int) -> dict[str, Any]:
        """Return the parameters of the result with this index, for run.json."""
        return {
            "num_views": self.num_views,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": self.guidance_interval,
            "seed": self.seed[index] if isinstance(self.seed, tuple) else self.seed,
            "eta": self.eta,
            "output_type": self.output_type,
            **self.settings,
            "portrait_index": index // self.num_images_per_prompt,
            "image_index": index % self.num_images_per_prompt,
        }
