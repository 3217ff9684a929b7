"""The multi-view U-Net: Stable Diffusion's, whose transformer blocks also attend across views and to the portrait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext import weights
from gafext.config import SD21_MULTIVIEW_UNET, UNetConfig
from gafext.models.base import PretrainedModel
from gafext.models.blocks import (
    Downsample2D,
    KeyValue,
    MultiViewSpatialTransformer,
    MultiViewTransformerBlock,
    ResnetBlock2D,
    Upsample2D,
)
from gafext.models.ip_adapter import ImageProjection


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timestep: [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i/half).

    Args:
        timesteps: [B], any dtype.
        channels: C; half of them are cosines, and an odd one ends in a zero.

    Returns:
        [B,C] float32.

    Source: diffusers: models/embeddings.py, get_timestep_embedding with flip_sin_to_cos and freq_shift 0.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=timesteps.device, dtype=torch.float32))
    angles = timesteps[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, channels - 2 * half))


class TimestepEmbedding(nn.Module):
    """linear_1, SiLU, linear_2: of the timestep's sinusoids, and of a camera's pose."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class UNetBlock(nn.Module):
    """Residual blocks, each followed by a transformer where the stage has attention, and a change of resolution."""

    def __init__(
        self,
        resnets: list[ResnetBlock2D],
        attentions: list[MultiViewSpatialTransformer],
        *,
        downsampler: Downsample2D | None = None,
        upsampler: Upsample2D | None = None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told and what does not change over the denoising steps; `MultiViewUNet.precompute` makes it.

    `image_key_values` has one entry a transformer block. It may hold fewer portraits than the batch: the first rows
    then skip `attn_ip`, which is how the unconditional pass shares the batch with the conditional one.
    """

    pose_embeds: Tensor | None = None  # [B*V,time_channels]
    image_key_values: tuple[KeyValue, ...] = ()  # each [B',H,T,D]


class MultiViewUNet(PretrainedModel):
    """The denoiser of V views at once.

    Args:
        config: sizes; the default is SD 2.1 made multi-view.

    Source: GAF (arXiv 2412.10209) section 3; diffusers: models/unets/unet_2d_condition.py.
    """

    config_class = UNetConfig
    config: UNetConfig

    def __init__(self, config: UNetConfig = SD21_MULTIVIEW_UNET):
        super().__init__(config)
        channels = config.block_out_channels
        time_channels = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_channels)
        self.class_embedding = TimestepEmbedding(config.pose_dim, time_channels) if config.pose_dim else None
        self.image_projection = (
            ImageProjection(config.image_embed_dim, config.cross_attention_dim) if config.image_embed_dim else None
        )
        self.down_blocks = nn.ModuleList(self._down_block(stage) for stage in range(len(channels)))
        mid = len(channels) - 1
        depth = config.per_stage(config.transformer_layers_per_block)[mid]
        self.mid_block = UNetBlock(
            [self._resnet(channels[mid], channels[mid]) for _ in range(2)], [self._transformer(mid, depth)]
        )
        self.up_blocks = nn.ModuleList(self._up_block(stage) for stage in reversed(range(len(channels))))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def _resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels,
            out_channels,
            time_channels=4 * self.config.block_out_channels[0],
            groups=self.config.norm_num_groups,
            eps=self.config.norm_eps,
        )

    def _transformer(self, stage: int, layers: int) -> MultiViewSpatialTransformer:
        return MultiViewSpatialTransformer(
            self.config.block_out_channels[stage],
            self.config.heads[stage],
            layers=layers,
            context_channels=self.config.cross_attention_dim,
            groups=self.config.norm_num_groups,
            linear_projection=self.config.use_linear_projection,
            cross_view=self.config.cross_view == "position",
            image_attention=self.config.image_attention,
        )

    def _transformers(self, stage: int, block_type: str, count: int) -> list[MultiViewSpatialTransformer]:
        layers = self.config.per_stage(self.config.transformer_layers_per_block)[stage]
        return [self._transformer(stage, layers) for _ in range(count)] if block_type.startswith("CrossAttn") else []

    def _down_block(self, stage: int) -> UNetBlock:
        config, channels = self.config, self.config.block_out_channels
        layers = config.per_stage(config.layers_per_block)[stage]
        widths = [channels[max(stage - 1, 0)]] + [channels[stage]] * (layers - 1)
        last = stage == len(channels) - 1
        return UNetBlock(
            [self._resnet(width, channels[stage]) for width in widths],
            self._transformers(stage, config.down_block_types[stage], layers),
            downsampler=None if last else Downsample2D(channels[stage], padding=1),
        )

    def _up_block(self, stage: int) -> UNetBlock:
        """The mirror of down block `stage`: each residual block also takes the skip that its twin left."""
        config, channels = self.config, self.config.block_out_channels
        layers = config.per_stage(config.layers_per_block)[stage] + 1
        incoming = channels[min(stage + 1, len(channels) - 1)]
        skips = [channels[stage]] * (layers - 1) + [channels[max(stage - 1, 0)]]
        widths = [incoming] + [channels[stage]] * (layers - 1)
        return UNetBlock(
            [self._resnet(a + skip, channels[stage]) for a, skip in zip(widths, skips, strict=True)],
            self._transformers(stage, config.up_block_types[len(channels) - 1 - stage], layers),
            upsampler=Upsample2D(channels[stage]) if stage else None,
        )

    @classmethod
    def read_config(cls, folder: Path, file: weights.WeightFile) -> UNetConfig:
        """A folder that does not say which attentions were added shows it by its keys."""
        path = folder / "config.json"
        values = weights.read_json(path)
        if "cross_view" not in values and any(".attn_cv." in key for key in file):
            values["cross_view"] = "position"
        if "image_attention" not in values and any(".attn_ip." in key for key in file):
            values["image_attention"] = True
        projection = file.shapes.get("image_projection.proj.weight")
        if "image_embed_dim" not in values and projection is not None and len(projection) == 2:
            values["image_embed_dim"] = projection[1]
        return UNetConfig.from_dict(values, source=str(path))

    def transformer_blocks(self) -> list[MultiViewTransformerBlock]:
        """All transformer blocks, in the order in which `forward` reaches them."""
        stages = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [block for stage in stages for spatial in stage.attentions for block in spatial.transformer_blocks]

    def precompute(self, *, pose: Tensor | None = None, image_embeds: Tensor | None = None) -> Conditioning:
        """Everything that is the same at every step: the poses' embeddings, and the image tokens' keys and values.

        Args:
            pose: [B*V,pose_dim], or None.
            image_embeds: [B,T,cross_attention_dim], or None.

        Returns:
            What `forward` takes as `conditioning`.
        """
        if pose is not None and self.class_embedding is None:
            raise ValueError("pose: expected None, because this U-Net has no class_embedding")
        if pose is None and self.class_embedding is not None:
            raise ValueError(f"pose: expected [B*V,{self.config.pose_dim}], got None")
        if pose is not None and (pose.ndim != 2 or pose.shape[1] != self.config.pose_dim):
            raise ValueError(f"pose: expected [B*V,{self.config.pose_dim}], got {list(pose.shape)}")
        if image_embeds is not None and not self.config.image_attention:
            raise ValueError("image_embeds: expected None, because this U-Net has no attn_ip")
        width = self.config.cross_attention_dim
        if image_embeds is not None and (image_embeds.ndim != 3 or image_embeds.shape[2] != width):
            raise ValueError(f"image_embeds: expected [B,T,{width}], got {list(image_embeds.shape)}")
        return Conditioning(
            pose_embeds=None if pose is None else self.class_embedding(pose.to(self.dtype)),
            image_key_values=()
            if image_embeds is None
            else tuple(block.image_key_value(image_embeds) for block in self.transformer_blocks()),
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None = None,
        *,
        pose: Tensor | None = None,
        image_embeds: Tensor | None = None,
        num_views: int = 1,
        reference_latents: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """Predict the noise (or v) of B·V noisy latents.

        Args:
            sample: [B*V,Cin,h,w], the view running fastest; latents, then normal latents where Cin says so.
            timestep: one number for all, or [B*V].
            encoder_hidden_states: text [B*V,T,cross_attention_dim]; None is the all-zero text, exactly and for free.
            pose: [B*V,pose_dim].
            image_embeds: image tokens [B,T,cross_attention_dim]; None skips every attn_ip.
            num_views: V.
            reference_latents: [B,4,h,w], for U-Nets with dense cross-view attention only.
            conditioning: from `precompute`, in place of `pose` and `image_embeds`.

        Returns:
            [B*V,Cout,h,w].

        Raises:
            ValueError: a shape does not fit, naming the argument, what was expected and what was got.
        """
        if reference_latents is not None:
            raise ValueError("reference_latents: expected None, because this U-Net's cross_view is not 'dense'")
        if conditioning is None:
            conditioning = self.precompute(pose=pose, image_embeds=image_embeds)
            whole = image_embeds is None or image_embeds.shape[0] * num_views == sample.shape[0]
            if not whole:
                raise ValueError(
                    f"image_embeds: expected {sample.shape[0]} / num_views={num_views} portraits, "
                    f"got {image_embeds.shape[0]}"
                )
        elif pose is not None or image_embeds is not None:
            raise ValueError("conditioning: expected either it, or pose and image_embeds, not both")
        timesteps = self._check(sample, timestep, encoder_hidden_states, num_views, conditioning)

        emb = self.time_embedding(timestep_embedding(timesteps, self.config.block_out_channels[0]).to(self.dtype))
        if conditioning.pose_embeds is not None:
            emb = emb + conditioning.pose_embeds
        image_key_values = iter(conditioning.image_key_values)

        def run(block: UNetBlock, index: int, x: Tensor) -> Tensor:
            x = block.resnets[index](x, emb)
            return attend(block, index, x) if index < len(block.attentions) else x

        def attend(block: UNetBlock, index: int, x: Tensor) -> Tensor:
            spatial = block.attentions[index]
            image = (
                [next(image_key_values) for _ in spatial.transformer_blocks] if conditioning.image_key_values else None
            )
            return spatial(x, encoder_hidden_states, image_key_values=image, num_views=num_views)

        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            for index in range(len(block.resnets)):
                x = run(block, index, x)
                skips.append(x)
            for downsampler in block.downsamplers:
                x = downsampler(x)
                skips.append(x)
        x = run(self.mid_block, 0, x)
        x = self.mid_block.resnets[1](x, emb)
        for block in self.up_blocks:
            for index in range(len(block.resnets)):
                x = run(block, index, torch.cat([x, skips.pop()], dim=1))
            for upsampler in block.upsamplers:
                x = upsampler(x, size=skips[-1].shape[2:])  # odd sizes round up on the way down
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _check(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        text: Tensor | None,
        num_views: int,
        conditioning: Conditioning,
    ) -> Tensor:
        """Validate what `forward` got; returns the timesteps as [B*V]."""
        channels, width = self.config.in_channels, self.config.cross_attention_dim
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"sample: expected [B*V,{channels},h,w], got {list(sample.shape)}")
        rows = sample.shape[0]
        if num_views < 1 or rows % num_views:
            raise ValueError(f"num_views: expected a divisor of the batch {rows}, got {num_views}")
        if text is not None and (text.ndim != 3 or text.shape[0] != rows or text.shape[2] != width):
            raise ValueError(f"encoder_hidden_states: expected [{rows},T,{width}], got {list(text.shape)}")
        pose_embeds = conditioning.pose_embeds
        if pose_embeds is not None and pose_embeds.shape[0] != rows:
            raise ValueError(f"pose: expected {rows} rows, got {pose_embeds.shape[0]}")
        timesteps = torch.as_tensor(timestep, device=sample.device)
        if timesteps.ndim > 1 or timesteps.numel() not in (1, rows):
            raise ValueError(f"timestep: expected a number or [{rows}], got {list(timesteps.shape)}")
        return timesteps.reshape(-1).expand(rows)
