"""The prediction of a denoising step: the U-Net on both passes, and guidance."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gafext.conditions import Conditions, Run
from gafext.guidance import exchange, guide, guides_at
from gafext.models.graph import GraphedCall
from gafext.models.unet import MultiViewUNet


class Predictor:
    """Predict the U-Net's output for the latents of a run; guided, both passes form one batch.

    Args:
        unet: the network.
        run: its inputs; with `run.graph`, the second guided step on CUDA and the second other one record a CUDA graph,
            which later steps replay. With `run.parallel`, the first of two processes computes the unconditional pass of
            a guided step, and the second the conditional one; steps without guidance are computed by both.
    """

    def __init__(self, unet: MultiViewUNet, run: Run):
        self._unet, self._run = unet, run

        def call(conditions: Conditions) -> Callable[[Tensor, Tensor], Tensor]:
            evaluate = functools.partial(self._evaluate, conditions)
            return GraphedCall(evaluate) if run.graph else evaluate

        own, portraits = run.conditions, run.num_portraits
        self._shared = run.parallel is not None and run.conditions.passes > 1
        if self._shared:
            first = torch.distributed.get_rank() == 0
            own = own.unconditional(portraits) if first else own.conditional(portraits)
        self._guided = self._conditional = call(own)
        if run.guidance_interval is not None and run.conditions.passes > 1:
            self._conditional = call(run.conditions.conditional(portraits))

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Map latents [B*V,4,h,w] float32 to the prediction, of the same shape and dtype."""
        run = self._run
        sample = run.solver.scale_model_input(latents, timestep)
        # A tensor, because torch.compile would compile for each number; filled on the device, because a copy waits.
        time = torch.full((1,), timestep, device=sample.device)
        guided = run.guidance_interval is None or guides_at(run.solver.sigma(timestep), run.guidance_interval)
        if not guided:
            return self._conditional(sample, time)
        prediction = self._guided(sample, time)
        return prediction if not self._shared else guide(*exchange(prediction), run.guidance_scale)

    def _evaluate(self, conditions: Conditions, sample: Tensor, timestep: Tensor) -> Tensor:
        views = frames = self._run.num_views
        sample = sample.repeat(conditions.passes, 1, 1, 1)
        if conditions.input_latents is not None:
            sample = torch.cat([sample, conditions.input_latents], dim=1)
        if conditions.reference_latents is not None:
            frames += 1  # the U-Net overwrites this frame with the reference latents, so its content is irrelevant
            sample = sample.unflatten(0, (-1, views))
            sample = torch.cat([sample, sample[:, :1]], dim=1).flatten(0, 1)
        output = self._unet(
            sample.to(self._unet.dtype),
            timestep,
            conditioning=conditions.conditioning,
            num_views=frames,
            reference_latents=conditions.reference_latents,
        ).float()
        if frames > views:
            output = output.unflatten(0, (-1, frames))[:, :views].flatten(0, 1)
        predictions = output.chunk(conditions.passes)
        return guide(predictions[0], predictions[1], self._run.guidance_scale) if conditions.passes == 2 else output
