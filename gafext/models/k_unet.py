"""K-UNet of the latent upsampler, with the keys and numbers of diffusers' UNet2DConditionModel of K-blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext.config import SD_X2_UNET, KUNetConfig
from gafext.models.attention import merge_heads, split_heads
from gafext.models.base import PretrainedModel
from gafext.models.blocks import Conv2d, Conv3x3
from gafext.ops import flash_attention
from gafext.ops.linear import linear_layer

GROUP_SIZE = 32
ATTENTION_EPS = 1e-5


def downsample(x: Tensor) -> Tensor:
    """Halve the size with the fixed filter [1,3,3,1]/8, reflected at the edges: [B,C,h,w] -> [B,C,h/2,w/2].

    Source: diffusers: models/downsampling.py, KDownsample2D.
    """
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    # [1,3,3,1]/8 is [1,1]/2 applied three times: means of pixel pairs, the last one with stride 2.
    for stride in (1, 1, 2):
        x = F.avg_pool2d(x, 2, stride)
    return x


def upsample(x: Tensor) -> Tensor:
    """Double the size with the filter of `downsample`: [B,C,h,w] -> [B,C,2h,2w].

    Source: diffusers: models/upsampling.py, KUpsample2D.
    """
    # Inside, the filter is bilinear interpolation; at the edges it reflects instead of repeating.
    x = F.interpolate(F.pad(x, (1, 1, 1, 1), mode="reflect"), scale_factor=2.0, mode="bilinear", align_corners=False)
    return x[..., 2:-2, 2:-2]


class FourierTime(nn.Module):
    """Fourier features of the timestep, [cos(2π t w), sin(2π t w)]; the random w, `weight`, is in the checkpoint."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels // 2).normal_(), requires_grad=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Map [B] to [B,channels] float32."""
        angles = timestep.float()[:, None] * self.weight.float() * 2 * math.pi
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class ConditionedTimeEmbedding(nn.Module):
    """MLP (linear_1, GELU, linear_2, GELU) of the Fourier features plus a projected condition."""

    def __init__(self, channels: int, condition_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, channels)
        self.cond_proj = nn.Linear(condition_channels, channels, bias=False)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, frequencies: Tensor, condition: Tensor) -> Tensor:
        x = frequencies.to(condition.dtype) + linear_layer(self.cond_proj, condition)
        return F.gelu(linear_layer(self.linear_2, F.gelu(linear_layer(self.linear_1, x))))


class AdaGroupNorm(nn.Module):
    """Group normalisation, scaled and shifted by the time embedding: (1 + scale) · norm(x) + shift."""

    def __init__(self, channels: int, time_channels: int, eps: float):
        super().__init__()
        self.groups, self.eps = channels // GROUP_SIZE, eps
        self.linear = nn.Linear(time_channels, 2 * channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = linear_layer(self.linear, time)[:, :, None, None].chunk(2, dim=1)  # [1 or B,C,1,1] each
        return F.group_norm(x, self.groups, eps=self.eps) * (1 + scale) + shift


class KResnetBlock(nn.Module):
    """Residual block: norm, GELU, conv, norm, GELU, conv, plus the input; a 1×1 convolution adapts its channels.

    Source: diffusers: models/resnet.py, ResnetBlockCondNorm2D with time_embedding_norm="ada_group".
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, time_channels: int, eps: float):
        super().__init__()
        self.norm1 = AdaGroupNorm(in_channels, time_channels, eps)
        self.conv1 = Conv3x3(in_channels, mid_channels)
        self.norm2 = AdaGroupNorm(mid_channels, time_channels, eps)
        self.conv2 = Conv3x3(mid_channels, out_channels)
        changes = in_channels != out_channels
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1, bias=False) if changes else nn.Identity()

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        x = self.conv1(F.gelu(self.norm1(hidden_states, time)))
        x = self.conv2(F.gelu(self.norm2(x, time)))
        return self.conv_shortcut(hidden_states) + x


class KAttention(nn.Module):
    """Multi-head attention with biases in all layers; `norm_cross` normalises a context first."""

    def __init__(self, channels: int, head_width: int, *, context_channels: int | None = None):
        super().__init__()
        self.heads = channels // head_width
        self.attention_backend = "auto"
        self.norm_cross = nn.LayerNorm(context_channels) if context_channels else nn.Identity()
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(context_channels or channels, channels)
        self.to_v = nn.Linear(context_channels or channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map x [B,L,C] to [B,L,C]; context is [1 or B,T,C'], or None for self-attention."""
        tokens = x if context is None else self.norm_cross(context)
        query, key, value = (
            split_heads(linear_layer(project, source), self.heads).expand(len(x), -1, -1, -1)
            for project, source in ((self.to_q, x), (self.to_k, tokens), (self.to_v, tokens))
        )
        x = flash_attention(query, key, value, backend=self.attention_backend)
        return linear_layer(self.to_out[0], merge_heads(x))


class KAttentionBlock(nn.Module):
    """Optional self-attention over the pixels, then attention to the text; no feed-forward layer.

    Source: diffusers: models/unets/unet_2d_blocks.py, KAttentionBlock.
    """

    def __init__(self, channels: int, config: KUNetConfig, *, self_attention: bool):
        super().__init__()
        width, time = config.attention_head_dim, config.time_channels
        self.norm1 = AdaGroupNorm(channels, time, ATTENTION_EPS) if self_attention else None
        self.attn1 = KAttention(channels, width) if self_attention else None
        self.norm2 = AdaGroupNorm(channels, time, ATTENTION_EPS)
        self.attn2 = KAttention(channels, width, context_channels=config.cross_attention_dim)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        height = x.shape[-2]

        def pixels(x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)  # [B,h*w,C]

        def image(x: Tensor) -> Tensor:
            return x.transpose(1, 2).unflatten(2, (height, -1))  # [B,C,h,w]

        if self.attn1 is not None and self.norm1 is not None:
            x = x + image(self.attn1(pixels(self.norm1(x, time))))
        return x + image(self.attn2(pixels(self.norm2(x, time)), text))


class KStage(nn.Module):
    """Residual blocks at one resolution, each followed by an attention block if the stage has attention."""

    def __init__(self, resnets: list[KResnetBlock], attentions: list[KAttentionBlock]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[index](x, time, text)
        return x


class KUNet(PretrainedModel):
    """Network F of the latent upsampler, with diffusers' key names.

    Args:
        config: sizes; the default is sd-x2-latent-upscaler's.

    Source: diffusers: models/unets/unet_2d_condition.py and unet_2d_blocks.py; k-diffusion: models/image_v1.py.
    """

    config_class: ClassVar = KUNetConfig
    config: KUNetConfig

    def __init__(self, config: KUNetConfig = SD_X2_UNET):
        super().__init__(config)
        assert config.time_cond_proj_dim is not None  # checked by the configuration
        widths, kernels = config.block_out_channels, (config.conv_in_kernel, config.conv_out_kernel)
        deepest = len(widths) - 1
        self.conv_in = Conv2d(config.in_channels, widths[0], kernels[0], padding=kernels[0] // 2)
        self.time_proj = FourierTime(config.time_channels)
        self.time_embedding = ConditionedTimeEmbedding(config.time_channels, config.time_cond_proj_dim)
        self.down_blocks = nn.ModuleList(self._down_block(stage) for stage in range(deepest + 1))
        self.up_blocks = nn.ModuleList(self._up_block(stage) for stage in reversed(range(deepest + 1)))
        self.conv_out = Conv2d(widths[0], config.out_channels, kernels[1], padding=kernels[1] // 2)

    def _down_block(self, stage: int) -> KStage:
        width, before = self.config.block_out_channels[stage], self.config.block_out_channels[max(stage - 1, 0)]
        layers = self.config.layers_per_block
        return self._stage(stage, pairwise((before, *(width,) * layers)), attended=(width,) * layers)

    def _up_block(self, stage: int) -> KStage:
        width, after = self.config.block_out_channels[stage], self.config.block_out_channels[max(stage - 1, 0)]
        deepest = stage == len(self.config.block_out_channels) - 1
        inside = (width,) * (self.config.layers_per_block - 1)
        sources, targets = (width if deepest else 2 * width, *inside), (*inside, after)
        return self._stage(stage, zip(sources, targets, strict=True), attended=targets)

    def _stage(self, stage: int, channels: Iterable[tuple[int, int]], *, attended: tuple[int, ...]) -> KStage:
        config, width = self.config, self.config.block_out_channels[stage]
        resnets = [
            KResnetBlock(source, width, target, time_channels=config.time_channels, eps=config.norm_eps)
            for source, target in channels
        ]
        if config.down_block_types[stage] == "KDownBlock2D":
            return KStage(resnets, [])
        deepest = stage == len(config.block_out_channels) - 1
        return KStage(resnets, [KAttentionBlock(size, config, self_attention=deepest) for size in attended])

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            sample: [B,in_channels,h,w], the weights' dtype; h and w multiples of `config.size_multiple`, at least twice
                that.
            timestep: ln(σ)/4, a scalar, [1] or [B], float32.
            encoder_hidden_states: text, [1,T,cross_attention_dim] for all rows or [B,T,cross_attention_dim].
            timestep_cond: condition of the time embedding, [1,time_cond_proj_dim] or [B,time_cond_proj_dim].

        Returns:
            [B,out_channels,h,w].

        Raises:
            ValueError: a shape does not match.
        """
        self._check_inputs(sample, timestep, encoder_hidden_states, timestep_cond)
        time = self.time_embedding(self.time_proj(timestep.reshape(-1)), timestep_cond)  # [1 or B,time_channels]
        x, skips = self.conv_in(sample), []
        for block in self.down_blocks[:-1]:
            x = block(x, time, encoder_hidden_states)
            skips.append(x)
            x = downsample(x)
        x = self.down_blocks[-1](x, time, encoder_hidden_states)
        x = self.up_blocks[0](x, time, encoder_hidden_states)
        for block in self.up_blocks[1:]:
            x = block(torch.cat([upsample(x), skips.pop()], dim=1), time, encoder_hidden_states)
        return self.conv_out(x)

    def _check_inputs(self, sample: Tensor, timestep: Tensor, text: Tensor, condition: Tensor) -> None:
        config, multiple = self.config, self.config.size_multiple
        # Reflection at the edges needs two pixels at the lowest resolution too.
        least = 2 * multiple if multiple > 1 else 1
        if (
            sample.ndim != 4
            or sample.shape[1] != config.in_channels
            or any(size % multiple or size < least for size in sample.shape[2:])
        ):
            raise ValueError(
                f"sample: expected (B,{config.in_channels},h,w), h and w multiples of {multiple} and at least {least}, "
                f"got {tuple(sample.shape)}"
            )
        batch = len(sample)
        if timestep.numel() not in (1, batch) or timestep.ndim > 1:
            raise ValueError(f"timestep: expected a scalar or ({batch},), got {tuple(timestep.shape)}")
        if text.ndim != 3 or len(text) not in (1, batch) or text.shape[2] != config.cross_attention_dim:
            raise ValueError(
                f"encoder_hidden_states: expected (1 or {batch},T,{config.cross_attention_dim}), "
                f"got {tuple(text.shape)}"
            )
        if condition.ndim != 2 or len(condition) not in (1, batch) or condition.shape[1] != config.time_cond_proj_dim:
            raise ValueError(
                f"timestep_cond: expected (1 or {batch},{config.time_cond_proj_dim}), got {tuple(condition.shape)}"
            )
