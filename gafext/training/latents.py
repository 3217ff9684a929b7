"""Encoded training data: latents of views and normals, CLIP features of portraits; one safetensors file per head."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gafext import images
from gafext.families import family_of
from gafext.heads import head_normals
from gafext.mesh import load_mesh
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import MultiViewUNet
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.training.head import Head
from gafext.weights import save_tensors

_PORTRAITS = {"features", "portraits"}  # a file has one of them


class Described(Protocol):
    """A head in a file of its own, or in a shard."""

    def describe(self) -> dict[str, Any]: ...

    def files(self) -> list[Path]: ...


Opened = Callable[[Sequence[int]], Iterator[tuple[int, Head]]]


class EncodedHead:
    """One file of `encode_head`, of which a step reads the rows that it needs.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, "pt") as file:
            self.pose: Tensor = file.get_tensor("pose")  # [V,pose_dim]
            self.places: Tensor = file.get_tensor("places")  # [V,3], of the cameras
            self.names = frozenset(file.keys())
            [seen] = self.names & _PORTRAITS
            self.portraits: int = file.get_slice(seen).get_shape()[0]

    def read(self, views: Sequence[int], portrait: int) -> dict[str, Tensor]:
        """Read some views and one portrait, as in `Batch` without B."""
        with safe_open(self.path, "pt") as file:
            rows = {name: file.get_slice(name)[portrait] for name in self.names & {*_PORTRAITS, "reference"}}
            for name in self.names & {"latents", "normals"}:
                every = file.get_slice(name)
                rows[name] = torch.stack([every[view] for view in views])
        return {**rows, "pose": self.pose[list(views)]}


def image_features(encoder: CLIPVisionEncoder, portraits: Tensor, unet: MultiViewUNet) -> Tensor:
    """Compute the features [B,T,D] of portraits [B,3,S,S] that a U-Net reads."""
    output = "last_hidden_state" if unet.image_projection is None else unet.image_projection.clip_output
    return getattr(encoder(portraits), output)


def digest_weights(digest: hashlib._Hash, network: nn.Module) -> None:
    """Add the names and the bits of a network's weights to a digest."""
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def cache_key(
    heads: Sequence[Described], pipeline: MultiViewDiffusionPipeline, *, size: int, degrees: float, pixels: bool = False
) -> str:
    """Compute a digest of what encoded heads depend on: files and their times, cameras, background, networks' sizes.

    Args:
        heads: the heads.
        pipeline: the parent.
        size: side of the pictures in pixels.
        degrees: largest angle of a portrait from the front.
        pixels: keep the portraits themselves, for an image encoder that is trained, instead of its features.
    """
    networks = [network for network in (pipeline.vae, pipeline.image_encoder) if network is not None]
    configs = [repr(network.config) for network in (pipeline.unet, *networks)]
    background = family_of(pipeline.unet.config).background
    described = [size, degrees, background, configs, [head.describe() for head in heads]] + ["pixels"] * pixels
    digest = hashlib.sha256(json.dumps(described).encode())
    for head in heads:
        for path in head.files():
            digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    for network in networks:
        digest_weights(digest, network)
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_head(
    head: Head, pipeline: MultiViewDiffusionPipeline, *, size: int, degrees: float, pixels: bool = False
) -> dict[str, Tensor]:
    """Encode one head.

    Args:
        head, pipeline, size, degrees, pixels: as for `cache_key`.

    Returns:
        latents [V,C,h,w], and normals if the U-Net takes them; places [V,3] and pose [V,pose_dim] of the cameras;
        features [P,T,D] of the P portraits, or these as the encoder takes them, portraits [P,3,S,S]; and for a U-Net
        with an extra frame their latents, reference [P,C,h,w].
    """
    unet, encoder = pipeline.unet, pipeline.image_encoder
    family = family_of(unet.config)
    assert encoder is not None  # `check_parent` requires it
    cameras, views = head.cameras, [head.picture(view, family.background) for view in range(len(head.pictures))]
    chosen = [views[view] for view in head.portraits(degrees)]
    portraits = torch.cat([encoder.preprocess(portrait) for portrait in chosen]).to(encoder.device, encoder.dtype)
    tensors = {
        "latents": pipeline.encode(images.to_square_tensor(views, size)),
        "places": cameras.c2w[:, :3, 3],
        "pose": family.poses(unet.config, cameras)[: len(views)].float(),  # without the extra frame's
    }
    if pixels:
        tensors["portraits"] = portraits.float()
    else:
        tensors["features"] = image_features(encoder, portraits, unet).float()
    if pipeline.takes_normals:
        tensors["normals"] = pipeline.encode(_normals(head, size))
    if family.has_reference_frame(unet.config):
        tensors["reference"] = pipeline.encode(images.to_square_tensor(chosen, size))
    return tensors


def _normals(head: Head, size: int) -> Tensor:
    if head.mesh is not None:
        return load_mesh(head.mesh).normal_maps(head.cameras, size)
    if not head.normals:
        return head_normals(head.cameras, size)
    return images.to_square_tensor([head.normal_map(view) for view in range(len(head.normals))], size)


def encode_heads(
    heads: Sequence[Described],
    pipeline: MultiViewDiffusionPipeline,
    folder: Path,
    *,
    size: int,
    degrees: float,
    pixels: bool = False,
    every: slice = slice(None),
    opened: Opened | None = None,
) -> list[EncodedHead]:
    """Encode heads, or find those that are already there.

    Args:
        heads, pipeline, size, degrees, pixels: as for `cache_key`.
        folder: folder named after `cache_key`.
        every: the heads to encode; each keeps the file of its place in `heads`.
        opened: what yields some heads by their places, with their files; None: `heads` have theirs.

    Returns:
        The encoded heads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {index: folder / f"{index:06d}.safetensors" for index in range(len(heads))[every]}
    missing = [index for index, path in paths.items() if not path.is_file()]
    for index, head in opened(missing) if opened else ((index, cast(Head, heads[index])) for index in missing):
        tensors = encode_head(head, pipeline, size=size, degrees=degrees, pixels=pixels)
        temporary = paths[index].with_suffix(f".{uuid.uuid4().hex}.tmp")  # another run may write the same cache
        save_tensors(tensors, temporary)
        temporary.replace(paths[index])  # whole or not at all: a killed run resumes here
    return [EncodedHead(path) for path in paths.values()]
