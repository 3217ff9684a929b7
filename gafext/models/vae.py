"""Autoencoder between images and latents, with the keys and numbers of diffusers' AutoencoderKL."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from gafext.config import SD_VAE, VAEConfig
from gafext.models.base import PretrainedModel
from gafext.models.blocks import Conv2d, Conv3x3, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D
from gafext.models.tiling import shared_statistics, tiled
from gafext.ops import flash_attention
from gafext.ops.linear import linear_layer
from gafext.weights.keys import vae_key

EPS = 1e-6


def _resnet(in_channels: int, out_channels: int, groups: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels, out_channels, time_channels=None, groups=groups, eps=EPS)


class SpatialAttention(nn.Module):
    """Self-attention over the pixels with a single head of all channels, and a residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attention_backend = "auto"
        self.group_norm = GroupNorm(groups, channels, eps=EPS, silu=False)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.group_norm(hidden_states).flatten(2).transpose(1, 2)  # [B,H*W,C]
        query, key, value = (linear_layer(f, x).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))  # [B,1,H*W,C]
        x = flash_attention(query, key, value, backend=self.attention_backend).squeeze(1)
        x = linear_layer(self.to_out[0], x)
        return hidden_states + x.transpose(1, 2).reshape(hidden_states.shape)


class MidBlock(nn.Module):
    """ResNet block, attention, ResNet block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Stage(nn.Module):
    """ResNet blocks at one resolution, followed by down- or upsampling except in the last stage."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        groups: int,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        widths = (in_channels, *(out_channels,) * layers)
        self.resnets = nn.ModuleList(_resnet(a, b, groups) for a, b in pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Encoder of images to the moments of the latents, before `quant_conv`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv3x3(config.in_channels, widths[0])
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            Stage(before, width, layers=config.layers_per_block, groups=groups, downsample=index < last)
            for index, (before, width) in enumerate(zip(widths[:1] + widths, widths, strict=False))
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS, silu=True)
        self.conv_out = Conv3x3(widths[-1], 2 * config.latent_channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.to_moments(self.from_pixels(image))

    def from_pixels(self, image: Tensor) -> Tensor:
        """Compute all that is local: every layer up to the size of the latents."""
        x = self.conv_in(image)
        for stage in self.down_blocks:
            x = stage(x)
        return x

    def to_moments(self, x: Tensor) -> Tensor:
        """Compute the rest, at the size of the latents."""
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """Decoder of latents after `post_quant_conv`, with one more ResNet block per stage than the encoder."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv3x3(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        last = len(widths) - 1
        self.up_blocks = nn.ModuleList(
            Stage(before, width, layers=config.layers_per_block + 1, groups=groups, upsample=index < last)
            for index, (before, width) in enumerate(zip(widths[:1] + widths, widths, strict=False))
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS, silu=True)
        self.conv_out = Conv3x3(widths[-1], config.out_channels)

    def forward(self, latents: Tensor) -> Tensor:
        return self.to_pixels(self.from_latents(latents))

    def from_latents(self, latents: Tensor) -> Tensor:
        """Compute the layers at the size of the latents, with the attention over all of them."""
        return self.mid_block(self.conv_in(latents))

    def to_pixels(self, x: Tensor) -> Tensor:
        """Compute the rest, which is local."""
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(self.conv_norm_out(x))


def _require_input(name: str, tensor: Tensor, channels: int, factor: int = 1) -> None:
    expected = f"{name}: expected (B,{channels},H,W)" + (f", H and W multiples of {factor}" if factor > 1 else "")
    height, width = tensor.shape[-2:] if tensor.ndim == 4 else (0, 0)
    if tensor.ndim != 4 or tensor.shape[1] != channels or 0 in (height, width) or height % factor or width % factor:
        raise ValueError(f"{expected}, got {tuple(tensor.shape)}")


class AutoencoderKL(PretrainedModel):
    """Variational autoencoder of latent diffusion, with diffusers' key names.

    Latents are unscaled here; the U-Net works on `config.scaling_factor` times `mean`.

    Args:
        config: widths and depths; the default is Stable Diffusion's.

    Source: diffusers: models/autoencoders/autoencoder_kl.py; arXiv 2112.10752 section 3.1.
    """

    config_class: ClassVar = VAEConfig
    config: VAEConfig
    key_rule: ClassVar = staticmethod(vae_key)
    channels_last: ClassVar = True

    def __init__(self, config: VAEConfig = SD_VAE):
        super().__init__(config)
        self.latent_tile: int | None = None
        """Side of a tile of latents; None: images are not tiled."""
        self.use_slicing = True
        """Whether a pipeline decodes one view at a time."""
        self.encoder = Encoder(config)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def enable_slicing(self) -> None:
        """Let a pipeline decode one view at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Let a pipeline decode all views as one batch."""
        self.use_slicing = False

    def enable_tiling(self, tile_size: int = 512) -> None:
        """Encode and decode larger images in tiles, whose overlaps of a quarter or more are blended.

        The layers at the size of the latents see the whole image. The others normalise all tiles by the statistics of
        the image reduced to one tile, so that the result is close to that of the whole image.

        Args:
            tile_size: side in pixels of the image, a multiple of 4 times `config.factor`: 32 in Stable Diffusion.

        Raises:
            ValueError: the size is not such a multiple.
        """
        multiple = 4 * self.config.factor
        if tile_size <= 0 or tile_size % multiple:
            raise ValueError(f"tile_size: expected a multiple of {multiple}, got {tile_size}")
        self.latent_tile = tile_size // self.config.factor

    def disable_tiling(self) -> None:
        """Encode and decode images as a whole."""
        self.latent_tile = None

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images to the Gaussian over their latents: q(z|x) = N(mean, exp(logvar)).

        Args:
            image: [B,3,H,W] in -1 to 1, the weights' dtype; H and W multiples of `config.factor`.

        Returns:
            mean and logvar, [B,4,H/factor,W/factor] each, unscaled; logvar is clamped to -30 to 20.

        Raises:
            ValueError: the shape does not match.
        """
        _require_input("image", image, self.config.in_channels, self.config.factor)
        factor = self.config.factor
        if self.latent_tile is None or max(image.shape[2:]) <= self.latent_tile * factor:
            moments = self.encoder(image)
        else:
            with shared_statistics(self.encoder, self.encoder.from_pixels, image, size=self.latent_tile * factor):
                x = tiled(self.encoder.from_pixels, image, tile=self.latent_tile, in_scale=factor)
            moments = self.encoder.to_moments(x)
        mean, logvar = self.quant_conv(moments).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images.

        Args:
            latents: [B,4,h,w], unscaled, the weights' dtype.

        Returns:
            [B,3,h*factor,w*factor], about -1 to 1, not clamped.

        Raises:
            ValueError: the shape does not match.
        """
        _require_input("latents", latents, self.config.latent_channels)
        if self.latent_tile is None or max(latents.shape[2:]) <= self.latent_tile:
            return self.decoder(self.post_quant_conv(latents))
        x = self.decoder.from_latents(self.post_quant_conv(latents))
        with shared_statistics(self.decoder, self.decoder.to_pixels, x, size=self.latent_tile):
            return tiled(self.decoder.to_pixels, x, tile=self.latent_tile, out_scale=self.config.factor)
