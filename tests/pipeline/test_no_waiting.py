"""The denoising loop on a device: nothing reads a value back, nothing is copied to it.

The device is "meta", which has no values to read: what waits for one, such as `item()`, is an error there.
"""

import copy
import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import gafext
from gafext.predictor import Predictor
from gafext.schedulers import SCHEDULERS


class Transfers(TorchDispatchMode):
    """Lists the operations with tensors on two devices; a number in a tensor of no dimensions is an argument."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors if t.dim() or t is out}) > 1:
            self.seen.append(func)
        return out


def on_meta(value, dtype):
    """The same tensors, also of nested dataclasses and tuples, in a dtype on the device meta."""
    if isinstance(value, torch.Tensor):
        return value.to("meta", dtype)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: on_meta(getattr(value, name), dtype) for name in names})
    if isinstance(value, tuple):
        parts = [on_meta(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_step_waits_for_the_device(pipe, name, dtype):
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    run = pipe.prepare(gafext.PORTRAIT, num_inference_steps=4, num_views=2, generator=0)
    unet = copy.deepcopy(pipe.unet).to("meta", dtype)
    run = dataclasses.replace(run, conditions=on_meta(run.conditions, dtype))
    latents, solver, predict = on_meta(run.latents, torch.float32), run.solver, Predictor(unet, run)
    solver.set_timesteps(run.num_inference_steps)
    with Transfers() as transfers:
        for timestep in run.timesteps.tolist():
            output = predict(latents, timestep)
            latents = solver.step(output, timestep, latents, eta=0.0, noise=None, generator=None)
    assert latents.is_meta and not transfers.seen
