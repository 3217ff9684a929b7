"""Estimate of the memory that a run needs, and of what is free, so that it is refused before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gafext.config import KUNetConfig, UNetConfig, VAEConfig

WORKSPACE = 0.1 * 2**30
"""Bytes of a kernel's scratch memory, and of what is small."""
# Largest activations of a pass, in maps as wide as the network is at its finest resolution, with the gaps that malloc
# leaves; measured by benchmarks/memory.py at the published sizes.
_UNET_MAPS, _UPSAMPLER_MAPS, _DECODER_MAPS = 25, 8, 3
# A container's limit, what it uses, and the part of that which are cached files: version 2 of control groups, and 1.
_CGROUP = (
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)


@dataclass(frozen=True)
class Workload:
    """What a run computes at once.

    Attributes:
        rows: views of all portraits.
        passes: 2 with guidance.
        size: side of the U-Net's latents.
        decoded_size: side of the latents that are decoded.
        decoded_rows: views that are decoded at once.
        tile: side of a tile of latents; None: the whole.
        itemsize: bytes of an activation.
    """

    rows: int
    passes: int
    size: int
    decoded_size: int
    decoded_rows: int = 1
    tile: int | None = None
    itemsize: int = 4


def activation_bytes(
    work: Workload, *, unet: UNetConfig, vae: VAEConfig, upsampler: KUNetConfig | None = None
) -> dict[str, float]:
    """Estimate the bytes that each stage needs beside the weights: workspace + itemsize · maps · channels · positions.

    Args:
        work: what is computed at once.
        unet, vae, upsampler: the networks; no upsampler: interpolation.

    Returns:
        Bytes by stage: "denoise", "upsample", "decode".
    """
    side = min(work.decoded_size, work.tile or work.decoded_size) * vae.factor
    picture = work.decoded_rows * (work.decoded_size * vae.factor) ** 2 * vae.out_channels
    widest = vae.block_out_channels[:2][-1]  # channels that enter the decoder's last stage
    floats = {
        "denoise": _UNET_MAPS * unet.block_out_channels[0] * work.rows * work.passes * work.size**2,
        "upsample": 0
        if upsampler is None
        else _UPSAMPLER_MAPS * upsampler.block_out_channels[0] * work.decoded_size**2,
        "decode": _DECODER_MAPS * widest * work.decoded_rows * side**2 + picture,
    }
    return {stage: WORKSPACE + work.itemsize * count for stage, count in floats.items()}


def free_bytes(device: torch.device) -> float | None:
    """Return the memory that a device has left for tensors; None if that is not known.

    On CPUs that is what Linux calls available, with the free swap, or what a container's limit leaves if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not (meminfo := Path("/proc/meminfo")).is_file():
        return None
    values = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = sum(1024 * int(values[name].split()[0]) for name in ("MemAvailable", "SwapFree") if name in values)
    for limit_file, used_file, stat_file, cached in _CGROUP:
        limit, used, stat = (_read(Path("/sys/fs/cgroup") / name) for name in (limit_file, used_file, stat_file))
        if limit.isdigit() and used.isdigit():
            counts = dict(line.split() for line in stat.splitlines())
            free = min(free, int(limit) - int(used) + sum(int(counts.get(name, 0)) for name in cached))
    return free


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
