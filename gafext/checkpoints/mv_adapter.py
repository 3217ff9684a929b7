"""MV-Adapter files (arXiv 2412.03632) of the image-to-multi-view kind, for a stock U-Net."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from gafext import weights
from gafext.errors import CheckpointError
from gafext.models.int8 import require_floats
from gafext.models.unet import MultiViewUNet
from gafext.weights.keys import mv_adapter_key


def with_mv_adapter(unet: MultiViewUNet, path: str | Path) -> MultiViewUNet:
    """Add MV-Adapter to a stock U-Net: attention across views and to the portrait, and the encoder of camera rays.

    Args:
        unet: U-Net of the size that the adapter was trained with, Stable Diffusion 2.1's for the published file.
        path: a safetensors file with `*.attn1.processor.to_{q,k,v,out}_{mv,ref}.*` and `adapter.*`.

    Returns:
        The U-Net with the adapter; it shares the tensors of `unet`, which is not changed.

    Raises:
        CheckpointError: the file is a pickle, is damaged, or does not fit; the message lists all wrong keys.
        ValueError: the U-Net is not a stock one, or its weights are 8-bit integers.

    Source: github.com/huanngzh/MV-Adapter: mvadapter/pipelines/pipeline_mvadapter_i2mv_sd.py.
    """
    path, config = Path(path), unet.config
    if config.cross_view is not None or config.pose_dim is not None or config.in_channels != config.out_channels:
        raise ValueError("mv_adapter: expected a stock U-Net without views, pose and normals, got one with some")
    require_floats(unet, "mv_adapter")
    weights.require_safetensors(path)
    file = weights.WeightFile(path, mv_adapter_key)
    if any(".adapter.mv." in key for key in file) and not any(".adapter.ref." in key for key in file):
        raise CheckpointError(
            f"{path}: a text-to-multi-view adapter, which does not look at a portrait (no to_q_ref); expected an "
            "image-to-multi-view one, such as mvadapter_i2mv_sd21.safetensors"
        )
    with torch.device("meta"):
        adapted = MultiViewUNet(replace(config, cross_view="row"))
    parent = unet.state_dict()
    expected = {key: tuple(value.shape) for key, value in adapted.state_dict().items() if key not in parent}
    weights.check_keys(file, expected)
    added = {
        key: file.tensor(key, dtype=unet.dtype).view(shape).to(device=unet.device, dtype=unet.dtype)
        for key, shape in expected.items()
    }
    adapted.load_state_dict({**parent, **added}, assign=True)
    return adapted.to(unet.device).train(unet.training)
