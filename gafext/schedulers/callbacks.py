"""Calls of `callback_on_step_end` around a step, as diffusers' pipelines make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gafext.schedulers.base import Scheduler

TENSOR_INPUTS = ("latents", "pred_original_sample")
"""Tensors that a callback may ask for."""


class StepCallback:
    """Take steps of a scheduler, call back after each, and use what the callback returns.

    Args:
        callback: called as (pipeline, index, timestep, {name: tensor}); returns None or a dict of the same tensors, of
            which those that differ from what was passed are used. A returned `pred_original_sample` replaces the
            network's prediction, and the step is taken again from it, with the same noise; returned `latents` replace
            the result. None: no calls.
        tensor_inputs: names out of `TENSOR_INPUTS`; a callback with an attribute of this name brings its own, as
            diffusers' PipelineCallback does.

    Raises:
        ValueError: a name is unknown.
    """

    def __init__(self, callback: Callable[..., dict | None] | None = None, tensor_inputs: Sequence[str] = ("latents",)):
        self.callback, self.names = callback, tuple(getattr(callback, "tensor_inputs", tensor_inputs))
        unknown = [name for name in self.names if name not in TENSOR_INPUTS]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected names out of {list(TENSOR_INPUTS)}, got {unknown}"
            )

    def step(
        self,
        pipeline: Any,
        scheduler: Scheduler,
        index: int,
        model_output: Tensor,
        timestep: float,
        sample: Tensor,
        *,
        eta: float,
        noise: Tensor | None,
        generator: list[torch.Generator],
    ) -> Tensor:
        """Take one step and call back.

        Args:
            pipeline, index, timestep: arguments of the callback.
            scheduler: the scheduler to step.
            model_output, timestep, sample, eta, noise, generator: those of `Scheduler.step`.

        Returns:
            The next sample, same shape and dtype as the sample.

        Raises:
            ValueError: the callback returned something else than a dict, or a tensor of another shape.
        """

        def step(output: Tensor) -> Tensor:
            return scheduler.step(output, timestep, sample, eta=eta, noise=noise, generator=generator)

        if self.callback is None:
            return step(model_output)
        passed, before = {}, None
        if "pred_original_sample" in self.names:
            passed["pred_original_sample"] = scheduler.pred_original_sample(model_output, timestep, sample)
            before = scheduler.state(), [each.get_state() for each in generator]
        latents = step(model_output)
        if "latents" in self.names:
            passed["latents"] = latents
        originals = {name: tensor.clone() for name, tensor in passed.items()} if before is not None else {}
        returned = self._checked(self.callback(pipeline, index, timestep, dict(passed)), sample)
        # Callbacks usually return the whole dict that they got: only what they changed is meant.
        changed = {
            name: tensor
            for name, tensor in returned.items()
            if name not in originals or not torch.equal(tensor, originals[name])
        }
        if "pred_original_sample" in changed and before is not None:
            state, draws = before
            scheduler.restore(state)
            for each, draw in zip(generator, draws, strict=True):
                each.set_state(draw)
            output = scheduler.model_output_for(changed["pred_original_sample"], timestep, sample)
            latents = step(output)
        return changed.get("latents", latents)

    @staticmethod
    def _checked(returned: Any, sample: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a callback's result, in the sample's dtype and on its device."""
        if returned is None:
            return {}
        if not isinstance(returned, dict):
            raise ValueError(f"callback_on_step_end: expected a dict or None, got {type(returned).__name__}")
        tensors = {name: returned[name] for name in TENSOR_INPUTS if returned.get(name) is not None}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.shape != sample.shape:
                got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"callback_on_step_end: expected {name} of shape {list(sample.shape)}, got {got}")
        return {name: tensor.to(sample) for name, tensor in tensors.items()}
