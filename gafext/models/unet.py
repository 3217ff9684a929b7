"""Multi-view U-Net: Stable Diffusion's, with transformer blocks that also attend across views and to the portrait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext import families, weights
from gafext.config import SD21_MULTIVIEW_UNET, UNetConfig
from gafext.models.attention import Attention, KeyValue
from gafext.models.base import PretrainedModel
from gafext.models.blocks import (
    Conv3x3,
    Downsample2D,
    GroupNorm,
    MultiViewSpatialTransformer,
    MultiViewTransformerBlock,
    ResnetBlock2D,
    Upsample2D,
)
from gafext.models.embeddings import ImageTimeEmbedding, TimestepEmbedding, timestep_embedding
from gafext.models.image_projection import image_projection
from gafext.models.mv_adapter import RayEncoder, adapter_inputs, add_views, recorded_inputs
from gafext.ops import memory


class UNetBlock(nn.Module):
    """Residual blocks, each followed by a transformer if the stage has attention, and a change of resolution."""

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
        self.attentions = cast("Sequence[MultiViewSpatialTransformer]", nn.ModuleList(attentions))
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of the U-Net that is constant over the denoising steps, computed by `MultiViewUNet.precompute`.

    The keys and values have one entry per transformer block, or none. There may be fewer portraits than the batch has:
    the first rows then have no image, which is how the unconditional pass shares the batch with the conditional one; so
    it is with `image_time_embeds`. There may be fewer texts than rows: each run of rows shares one. `ray_features` has
    one entry per down block, or none, and all portraits share it.
    """

    pose_embeds: Tensor | None = None  # [B*V,time_channels]
    image_time_embeds: Tensor | None = None  # [B',time_channels], or of each view [B*V,time_channels]
    image_key_values: tuple[KeyValue, ...] = ()  # each [B',H,T,D]
    text_key_values: tuple[KeyValue, ...] = ()  # each [R,H,T,D]
    reference_key_values: tuple[KeyValue, ...] = ()  # each [B',H,L,D]
    ray_features: tuple[Tensor, ...] = ()  # each [V,C,h,w]


class MultiViewUNet(PretrainedModel):
    """Denoising U-Net for V views at once.

    Args:
        config: sizes and layers; the default is SD 2.1's with the multi-view layers.

    Source: GAF (arXiv 2412.10209) section 3; diffusers: models/unets/unet_2d_condition.py.
    """

    config_class = UNetConfig
    channels_last = True
    config: UNetConfig

    def __init__(self, config: UNetConfig = SD21_MULTIVIEW_UNET):
        super().__init__(config)
        channels = config.block_out_channels
        time_channels = 4 * channels[0]
        self.conv_in = Conv3x3(config.in_channels, channels[0])
        self.time_embedding = TimestepEmbedding(channels[0], time_channels)
        self.class_embedding = TimestepEmbedding(config.pose_dim, time_channels) if config.pose_dim else None
        self.image_projection = image_projection(config)
        added = config.addition_embed_type == "image"
        self.add_embedding = ImageTimeEmbedding(config.cross_attention_dim, time_channels) if added else None
        layers = config.per_stage(config.layers_per_block)
        self.ray_encoder = RayEncoder(channels, layers) if config.has_mv_adapter else None
        self.down_blocks = cast("Sequence[UNetBlock]", nn.ModuleList(map(self._down_block, range(len(channels)))))
        mid = len(channels) - 1
        depth = config.per_stage(config.transformer_layers_per_block)[mid]
        self.mid_block = UNetBlock(
            [self._resnet(channels[mid], channels[mid]) for _ in range(2)], [self._transformer(mid, depth)]
        )
        self.up_blocks = cast("Sequence[UNetBlock]", nn.ModuleList(map(self._up_block, range(len(channels))[::-1])))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps, silu=True)
        self.conv_out = Conv3x3(channels[0], config.out_channels)
        for module in self.modules():
            if isinstance(module, Attention):
                module.upcast_attention = bool(config.upcast_attention)

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
            cross_view=self.config.cross_view,
            image_attention=cast("str | None", self.config.image_attention),  # the configuration replaces booleans
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
        """Build the mirror image of down block `stage`; each residual block also takes a skip connection."""
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
        """Read `config.json` by the rules of the checkpoint's family, and rename the file's tensors to our keys."""
        path = folder / "config.json"
        values = weights.read_json(path)
        family = families.family_of_file(values)
        config = family.unet_config(values, file.shapes, source=str(path))
        file.rename(family.key_rule(config))
        return config

    def transformer_blocks(self) -> list[MultiViewTransformerBlock]:
        """List all transformer blocks in the order of `forward`."""
        stages = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [block for stage in stages for spatial in stage.attentions for block in spatial.transformer_blocks]

    def precompute(
        self,
        *,
        pose: Tensor | None = None,
        image_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        image_scale: float | None = None,
        reference_latents: Tensor | None = None,
        rays: Tensor | None = None,
    ) -> Conditioning:
        """Compute the conditioning that is constant over the steps: pose embeddings, keys and values of image and text.

        Args:
            pose: [B*V,pose_dim], poses of the cameras or other class labels; or None.
            image_embeds: [B,T,cross_attention_dim], or None.
            encoder_hidden_states: text [R,T,cross_attention_dim], R = 1 if all rows share one; None is zeros.
            image_scale: weight of decoupled image attention; None is the configuration's.
            reference_latents: latents of the portraits [B,4,h,w], for MV-Adapter; None leaves the adapter out.
            rays: Plücker coordinates in [0,1], for MV-Adapter: [V,6,8h,8w], or [V,6,1,1] where they do not change over
                the view; None leaves the adapter out.

        Returns:
            The argument `conditioning` of `forward`.

        Raises:
            ValueError: a shape does not match, or the U-Net does not use an argument.
        """
        width = self.config.cross_attention_dim
        if pose is not None and self.class_embedding is None:
            raise ValueError("pose: expected None, because this U-Net has no class_embedding")
        if self.class_embedding is not None and (pose is None or pose.shape[1:] != (self.config.pose_dim,)):
            raise ValueError(f"pose: expected [B*V,{self.config.pose_dim}], got {_shape(pose)}")
        if image_embeds is not None and self.config.image_attention is None:
            raise ValueError("image_embeds: expected None, because this U-Net has no attention to an image")
        for name, tokens in (("image_embeds", image_embeds), ("encoder_hidden_states", encoder_hidden_states)):
            if tokens is not None and (tokens.ndim != 3 or tokens.shape[2] != width):
                raise ValueError(f"{name}: expected [rows,T,{width}], got {_shape(tokens)}")
        if image_scale is not None and self.config.image_attention != "decoupled":
            raise ValueError("image_scale: expected None, because this U-Net's image_attention is not 'decoupled'")
        scale = self.config.image_scale if image_scale is None else image_scale
        blocks, text, embed = self.transformer_blocks(), encoder_hidden_states, self.class_embedding
        conditioning = Conditioning(
            pose_embeds=None if pose is None or embed is None else embed(pose.to(self.dtype)),
            image_key_values=()
            if image_embeds is None
            else tuple(block.image_key_value(image_embeds, scale) for block in blocks),
            text_key_values=() if text is None else tuple(block.text_key_value(text) for block in blocks),
        )
        if image_embeds is not None and self.add_embedding is not None:
            conditioning = replace(conditioning, image_time_embeds=self.add_embedding(image_embeds[:, 0]))
        if reference_latents is None and rays is None:
            return conditioning
        if self.ray_encoder is None:
            raise ValueError("reference_latents, rays: expected None, because this U-Net has no MV-Adapter")
        latents, rays = adapter_inputs(reference_latents, rays, channels=self.config.out_channels)
        sample = F.pad(latents.to(self.dtype), (0, 0, 0, 0, 0, self.config.in_channels - latents.shape[1]))
        last_text = tuple(KeyValue(each.key[-1:], each.value[-1:]) for each in conditioning.text_key_values)
        with recorded_inputs([block.attn1 for block in blocks]) as features:  # without `reference`, no block adapts
            self(sample, 0, conditioning=Conditioning(text_key_values=last_text))
        return replace(
            conditioning,
            reference_key_values=tuple(map(MultiViewTransformerBlock.reference_key_value, blocks, features)),
            ray_features=self.ray_encoder(rays.to(self.dtype)),
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
        rays: Tensor | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor:
        """Predict the noise (or v) of B·V noisy latents.

        Args:
            sample: [B*V,Cin,h,w], the view index fastest; latents, followed by normal latents if Cin includes them.
            timestep: one number for all rows, or [B*V].
            encoder_hidden_states: text [R,T,cross_attention_dim]; R divides B*V (usually R = B*V), and each run of
                B*V/R rows shares one. None equals the all-zero text, at no cost.
            pose: [B*V,pose_dim].
            image_embeds: image tokens [B,T,cross_attention_dim]; None is no image.
            num_views: V, including a reference frame.
            reference_latents: [B,4,h,w], replace the latents of the last view in U-Nets with dense cross-view
                attention; for MV-Adapter as in `precompute`.
            rays: as in `precompute`.
            conditioning: from `precompute`, in place of its arguments.

        Returns:
            [B*V,Cout,h,w].

        Raises:
            ValueError: a shape does not match; the message names the argument and both shapes.
        """
        if sample.device.type == "cpu" and not torch.compiler.is_compiling():
            memory.keep_freed_memory()
        if conditioning is None:
            adapter_latents = None
            if self.config.has_mv_adapter:
                adapter_latents, reference_latents = reference_latents, None
            conditioning = self.precompute(
                pose=pose,
                image_embeds=image_embeds,
                encoder_hidden_states=encoder_hidden_states,
                reference_latents=adapter_latents,
                rays=rays,
            )
            if image_embeds is not None and image_embeds.shape[0] * num_views != sample.shape[0]:
                raise ValueError(
                    f"image_embeds: expected {sample.shape[0]} / num_views={num_views} portraits, "
                    f"got {image_embeds.shape[0]}"
                )
        elif not (pose is image_embeds is encoder_hidden_states is rays is None):
            raise ValueError("conditioning: expected either it, or pose, image_embeds, text and rays, not both")
        timesteps = self._check(sample, timestep, num_views, conditioning)
        if reference_latents is not None:
            sample = self._with_reference(sample, reference_latents, num_views)

        emb = self.time_embedding(timestep_embedding(timesteps, self.config.block_out_channels[0]).to(self.dtype))
        if conditioning.pose_embeds is not None:
            emb = emb + conditioning.pose_embeds
        if conditioning.image_time_embeds is not None:
            added = conditioning.image_time_embeds
            if len(added) != len(emb):
                added = added.repeat_interleave(num_views, dim=0)
            emb = emb + F.pad(added, (0, 0, len(emb) - len(added), 0))  # the first rows have no image
        texts, images = iter(conditioning.text_key_values), iter(conditioning.image_key_values)
        references = iter(conditioning.reference_key_values)

        def run(block: UNetBlock, index: int, x: Tensor) -> Tensor:
            x = block.resnets[index](x, emb)
            if index >= len(block.attentions):
                return x
            spatial = block.attentions[index]
            text, image, reference = (
                [next(each, None) for _ in spatial.transformer_blocks] for each in (texts, images, references)
            )
            return spatial(x, text, image, reference, num_views=num_views)

        x = self.conv_in(sample)
        skips = [x]
        ray_features = iter(conditioning.ray_features)
        for block in self.down_blocks:
            for index in range(len(block.resnets)):
                x = run(block, index, x)
                if index + 1 == len(block.resnets):
                    x = add_views(x, next(ray_features, None))
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
        return self.conv_out(self.conv_norm_out(x))

    def _with_reference(self, sample: Tensor, reference_latents: Tensor, num_views: int) -> Tensor:
        if not self.config.takes_reference:
            raise ValueError("reference_latents: expected None, because this U-Net's cross_view is not 'dense'")
        channels = self.config.out_channels  # the channels after these are not latents of the portrait
        expected = [sample.shape[0] // num_views, channels, *sample.shape[2:]]
        if list(reference_latents.shape) != expected:
            raise ValueError(f"reference_latents: expected {expected}, got {list(reference_latents.shape)}")
        sample = sample.clone()
        sample[num_views - 1 :: num_views, :channels] = reference_latents
        return sample

    def _check(
        self, sample: Tensor, timestep: Tensor | float | int, num_views: int, conditioning: Conditioning
    ) -> Tensor:
        """Validate the arguments of `forward`; returns the timesteps as [B*V]."""
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample: expected [B*V,{self.config.in_channels},h,w], got {list(sample.shape)}")
        if sample.dtype != self.dtype:
            raise ValueError(f"sample: expected {self.dtype} as the weights, got {sample.dtype}")
        rows = sample.shape[0]
        if not isinstance(num_views, int) or num_views < 1 or rows % num_views:
            raise ValueError(f"num_views: expected a divisor of the batch {rows}, got {num_views}")
        for text in conditioning.text_key_values[:1]:
            if text.key.shape[0] == 0 or rows % text.key.shape[0]:
                raise ValueError(f"encoder_hidden_states: expected a divisor of {rows} rows, got {text.key.shape[0]}")
        pose_embeds = conditioning.pose_embeds
        if pose_embeds is not None and pose_embeds.shape[0] != rows:
            raise ValueError(f"pose: expected {rows} rows, got {pose_embeds.shape[0]}")
        for rays in conditioning.ray_features[:1]:
            expected, got = [num_views, *sample.shape[2:]], [rays.shape[0], *rays.shape[2:]]
            if got != expected:
                raise ValueError(f"rays, reference_latents: expected [V,h,w] {expected} as the sample, got {got}")
        if not isinstance(timestep, Tensor):  # filled on the device: no copy to wait for
            timestep = torch.full((1,), timestep, device=sample.device)
        timesteps = timestep.to(sample.device)
        if timesteps.ndim > 1 or timesteps.numel() not in (1, rows):
            raise ValueError(f"timestep: expected a number or [{rows}], got {list(timesteps.shape)}")
        return timesteps.reshape(-1).expand(rows)


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
