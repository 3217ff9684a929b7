"""Encoded training data: latents of views and normals, CLIP features of portraits; one safetensors file per head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gafext import images
from gafext.families import family_of
from gafext.heads import head_normals
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.training.head import Head

TENSORS = ("latents", "normals", "pose", "features")


class EncodedHead:
    """One file of `encode_head`, of which a step reads the rows that it needs.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, "pt") as file:
            self.pose: Tensor = file.get_tensor("pose")  # [V,pose_dim]
            self.portraits: int = file.get_slice("features").get_shape()[0]

    def read(self, views: Sequence[int], portrait: int) -> dict[str, Tensor]:
        """Read `TENSORS` of some views and one portrait: latents and normals [V,C,h,w], pose [V,P], features [T,D]."""
        with safe_open(self.path, "pt") as file:
            rows = {"features": file.get_slice("features")[portrait], "pose": self.pose[list(views)]}
            for name in ("latents", "normals"):
                every = file.get_slice(name)
                rows[name] = torch.stack([every[view] for view in views])
        return rows


def cache_key(heads: Sequence[Head], pipeline: MultiViewDiffusionPipeline, *, size: int, degrees: float) -> str:
    """Compute a digest of what the encoded heads depend on: files and their times, cameras, weights of VAE and CLIP.

    Args:
        heads: the heads.
        pipeline: the parent.
        size: side of the pictures in pixels.
        degrees: largest angle of a portrait from the front.
    """
    digest = hashlib.sha256(json.dumps([size, degrees, [head.describe() for head in heads]]).encode())
    for head in heads:
        for path in [*head.pictures, *(mask for mask in head.masks if mask), *head.normals]:
            digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    for network in (pipeline.vae, pipeline.image_encoder):
        for name, tensor in [] if network is None else network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_head(head: Head, pipeline: MultiViewDiffusionPipeline, *, size: int, degrees: float) -> dict[str, Tensor]:
    """Encode one head.

    Args:
        head, pipeline, size, degrees: as for `cache_key`.

    Returns:
        latents, normals [V,C,h,w] and pose [V,pose_dim]; features [P,T,D] of the P portraits.
    """
    unet, encoder = pipeline.unet, pipeline.image_encoder
    assert encoder is not None  # `check_parent` requires it
    cameras, views = head.cameras, [head.picture(view) for view in range(len(head.pictures))]
    if head.normals:
        normals = images.to_square_tensor([head.normal_map(view) for view in range(len(views))], size)
    else:
        normals = head_normals(cameras, size)
    chosen = [views[view] for view in head.portraits(degrees)]
    pixels = torch.cat([encoder.preprocess(portrait) for portrait in chosen]).to(encoder.device, encoder.dtype)
    output = "last_hidden_state" if unet.image_projection is None else unet.image_projection.clip_output
    return {
        "latents": pipeline.encode(images.to_square_tensor(views, size)),
        "normals": pipeline.encode(normals),
        "pose": family_of(unet.config).poses(unet.config, cameras).float(),
        "features": getattr(encoder(pixels), output).float(),
    }


def encode_heads(
    heads: Sequence[Head], pipeline: MultiViewDiffusionPipeline, folder: Path, *, size: int, degrees: float
) -> list[EncodedHead]:
    """Encode heads, or find those that are already in a folder named after `cache_key`.

    Args:
        heads, pipeline, size, degrees: as for `cache_key`.
        folder: folder for the caches of any data and parents.

    Returns:
        The encoded heads.
    """
    shards = folder / cache_key(heads, pipeline, size=size, degrees=degrees)
    shards.mkdir(parents=True, exist_ok=True)
    encoded = []
    for index, head in enumerate(heads):
        path = shards / f"{index:06d}.safetensors"
        if not path.is_file():
            tensors = encode_head(head, pipeline, size=size, degrees=degrees)
            temporary = path.with_suffix(".tmp")
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
            temporary.replace(path)  # whole or not at all: a killed run resumes here
        encoded.append(EncodedHead(path))
    return encoded
