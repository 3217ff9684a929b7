"""Layers of MV-Adapter: attention over rows of views and to the portrait, and the encoder of camera rays."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from gafext.models.attention import Attention, DecoupledAttention, KeyValue

RAY_CHANNELS = 6  # direction and position
RAY_FACTOR = 8  # pixels of a ray map per latent pixel, along each side


class MultiViewAdapter(nn.Module):
    """Two attentions in parallel with a transformer block's self-attention, on the same normalised hidden states.

    A position attends to the row that it lies in, in all views (`mv`), and to the features of the portrait (`ref`).

    Args:
        channels: C.
        heads: H; a head is C/H wide.

    Source: MV-Adapter (arXiv 2412.03632); github.com/huanngzh/MV-Adapter:
    mvadapter/models/attention_processor.py, DecoupledMVRowSelfAttnProcessor2_0.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.mv = Attention(channels, heads)
        self.ref = DecoupledAttention(channels, heads, context_channels=channels, image=False)

    def forward(self, hidden_states: Tensor, reference: KeyValue, num_views: int) -> Tensor:
        """Compute what is added to the self-attention's output.

        Args:
            hidden_states: [B*V,L,C], normalised, the view index fastest; L positions of a square map.
            reference: keys and values of the portraits' features [B',H,L',D]. Fewer than B portraits
                belong to the LAST rows; the rows before attend to features of zeros.
            num_views: V.

        Returns:
            [B*V,L,C].

        Raises:
            ValueError: the map is not square, or there are more portraits than rows.
        """
        rows, length, channels = hidden_states.shape
        side, first = math.isqrt(length), rows - reference.key.shape[0] * num_views
        if side * side != length:
            raise ValueError(f"sample: expected a square, got {length} positions in an attention over rows")
        if first < 0:
            raise ValueError(
                f"reference_latents: expected at most {rows // num_views} portraits, got {reference.key.shape[0]}"
            )
        maps = hidden_states.reshape(-1, num_views, side, side, channels).transpose(1, 2)  # [B,h,V,w,C]
        attended = self.mv(maps.reshape(-1, num_views * side, channels)).view(maps.shape).transpose(1, 2)
        return attended.reshape(hidden_states.shape) + self.ref(hidden_states, None, reference, first=first)


class RayResnet(nn.Module):
    """Residual block x + conv1x1(relu(conv3x3(x)))."""

    def __init__(self, channels: int):
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(F.relu(self.block1(x))) + x


class RayStage(nn.Module):
    """Halving by average if `down` is set, change of width, residual blocks."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, *, down: bool):
        super().__init__()
        self.down = down
        self.in_conv = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.resnets = nn.Sequential(*[RayResnet(out_channels) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return self.resnets(self.in_conv(x))


class RayEncoder(nn.Module):
    """Encoder of ray maps to features that are added to the output of each down block of the U-Net.

    Args:
        channels: of the U-Net's stages.
        layers: residual blocks per stage.

    Source: T2I-Adapter (arXiv 2302.08453) section 3.3; diffusers: models/adapter.py, FullAdapter.
    """

    def __init__(self, channels: Sequence[int], layers: Sequence[int]):
        super().__init__()
        self.conv_in = nn.Conv2d(RAY_CHANNELS * RAY_FACTOR**2, channels[0], 3, padding=1)
        stages = nn.ModuleList(
            RayStage(channels[max(stage - 1, 0)], width, count, down=stage > 0)
            for stage, (width, count) in enumerate(zip(channels, layers, strict=True))
        )
        self.body = cast("Sequence[RayStage]", stages)

    def forward(self, rays: Tensor) -> tuple[Tensor, ...]:
        """Map ray maps [R,6,8h,8w] to one feature map per stage, [R,C,h,w] and its halves."""
        x, features = self.conv_in(F.pixel_unshuffle(rays, RAY_FACTOR)), []
        for stage in self.body:
            x = stage(x)
            features.append(x)
        return tuple(features)


def adapter_inputs(latents: Tensor | None, rays: Tensor | None, *, channels: int) -> tuple[Tensor, Tensor]:
    """Validate the portraits' latents [B,channels,h,w] and the rays; returns them, the rays as maps [V,6,8h,8w]."""
    if latents is None or rays is None:
        raise ValueError("reference_latents, rays: expected both or none, got one of them")
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"reference_latents: expected [B,{channels},h,w], got {list(latents.shape)}")
    size = [RAY_FACTOR * side for side in latents.shape[2:]]
    if rays.ndim != 4 or rays.shape[1] != RAY_CHANNELS or list(rays.shape[2:]) not in ([1, 1], size):
        shapes = f"[V,{RAY_CHANNELS},1,1] or [V,{RAY_CHANNELS},{size[0]},{size[1]}]"
        raise ValueError(f"rays: expected {shapes}, got {list(rays.shape)}")
    return latents, rays.expand(-1, -1, *size)


@contextmanager
def recorded_inputs(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the first argument of every call of the layers by this thread, in the order of the calls."""
    inputs: list[Tensor] = []
    thread = threading.get_ident()  # another may denoise a portrait meanwhile, with the same layers

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            inputs.append(args[0])

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def add_views(x: Tensor, features: Tensor | None) -> Tensor:
    """Add features of V views [V,C,h,w] to [B*V,C,h,w]; None adds nothing."""
    return x if features is None else (x.unflatten(0, (-1, len(features))) + features).flatten(0, 1)
