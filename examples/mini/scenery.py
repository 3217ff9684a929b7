"""Scenes behind drawn heads in photographs."""

from __future__ import annotations

import math

import torch
from data import between
from torch import Tensor


def scenery(count: int, size: int, random: torch.Generator) -> Tensor:
    """Draw discs, ovals and boxes that cover each other, shaded and some striped: [count,3,size,size] in [0,1], half.

    Pictures of things that cover each other have the statistics of photographs: Lee, Mumford, Huang, "Occlusion models
    for natural images" (2001).
    """
    y, x = torch.meshgrid(*2 * [torch.linspace(0, 1, size)], indexing="ij")
    scenes = []
    for _ in range(count):
        scene = between(0, 1, (3, 1, 1), random).float().expand(3, size, size)
        for _ in range(int(between(0, 60, (), random))):
            centre_x, centre_y, turn, kind, shade, stripes = between(0, 1, (6,), random).tolist()
            across, along = (0.02 * 30 ** between(0, 1, (2,), random)).tolist()
            along = min(along, 3 * across)
            right, down = x - (1.2 * centre_x - 0.1), y - (1.2 * centre_y - 0.1)
            cos, sin = math.cos(turn * math.pi), math.sin(turn * math.pi)
            u, v = (right * cos + down * sin) / across, (down * cos - right * sin) / along
            inside = torch.maximum(u.abs(), v.abs()) < 0.5 if kind > 0.5 else u**2 + v**2 < 0.25
            colour = between(0, 1, (3, 1, 1), random).float() * (1 + (shade - 0.5) * (u + v))
            if stripes > 0.8:
                colour = colour * (1 + 0.4 * torch.sin(u * 40 * stripes))
            scene = torch.where(inside, colour.clamp(0, 1), scene)
        scenes.append(scene.half())
    return torch.stack(scenes)
