"""The pipeline as a competent user of diffusers writes it: the opponent of `bench_pipeline.py`.

diffusers' U-Net, autoencoder and K-UNet, and CLIP of transformers, with the weights of a gafext pipeline (the same
memory). The transformer blocks get attn_cv and attn_ip as modules of diffusers' Attention, whose processor is PyTorch's
SDPA. As gafext does, the portrait's tokens are computed once and not repeated for the views, the rows without an image
skip attn_ip, and the empty text is one zero token. Each network maps tensors to a tensor, so that torch.compile and
OpenVINO can take its place.
"""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import ImageTimeEmbedding
from run_inputs import Inputs
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from gafext import MultiViewDiffusionPipeline
from gafext.models.unet import MultiViewUNet
from gafext.upsampler import LEVEL_CHANNELS


class MultiViewBlock(BasicTransformerBlock):
    """A transformer block of diffusers with attention across views and to the image; see `StockPipeline`."""

    num_views: int

    def add_attentions(self, channels: int, heads: int, context_channels: int) -> None:
        self.norm_cv, self.norm_ip = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn_cv = Attention(channels, heads=heads, dim_head=channels // heads)
        self.attn_ip = Attention(channels, context_channels, heads=heads, dim_head=channels // heads)

    def forward(self, hidden_states: Tensor, *args: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map [2V,L,C]; encoder_hidden_states [2V,1+T,C'] is the zero text and the image, which the first V lack."""
        x, views = hidden_states, self.num_views
        rows, length, channels = x.shape
        x = x + self.attn1(self.norm1(x))
        crossed = self.norm_cv(x).view(-1, views, length, channels).transpose(1, 2).reshape(-1, views, channels)
        crossed = self.attn_cv(crossed).view(-1, length, views, channels).transpose(1, 2)
        x = x + crossed.reshape(rows, length, channels)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states[:, :1])
        seeing = x[-views:]
        query = self.norm_ip(seeing).reshape(1, views * length, channels)
        attended = self.attn_ip(query, encoder_hidden_states[-1:, 1:])
        x = torch.cat([x[:-views], seeing + attended.view(views, length, channels)])
        return x + self.ff(self.norm3(x))


class Tokens(nn.Module):
    """CLIP's tokens of the portrait [1,T,C]."""

    def __init__(self, pipe: MultiViewDiffusionPipeline):
        super().__init__()
        assert pipe.image_encoder is not None and pipe.unet.image_projection is not None
        assert pipe.unet.image_projection.clip_output == "last_hidden_state"
        config = {name: value for name, value in _config(pipe.image_encoder).items() if value is not None}
        self.clip = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
        # Without the prefix since transformers 5; the last LayerNorm is not part of the last hidden state.
        names = {
            name.removeprefix("vision_model."): name for name in self.clip.state_dict() if "post_layer" not in name
        }
        state = pipe.image_encoder.state_dict()
        weights = {name: state[f"vision_model.{key}"] for key, name in names.items()}
        self.clip.load_state_dict(weights, strict=False, assign=True)
        self.clip.to(pipe.device, pipe.dtype)
        self.proj = pipe.unet.image_projection.proj

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(self.clip(pixel_values).last_hidden_state)


class Encoder(nn.Module):
    """Latents of pictures in [-1,1]."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> Tensor:
        config = self.vae.config
        return (self.vae.encode(pictures).latent_dist.mode() - (config.shift_factor or 0.0)) * config.scaling_factor


class Decoder(nn.Module):
    """Pictures in [0,1] of latents."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


class SeenImage(ImageTimeEmbedding):
    """What the portrait's class token adds to the timestep embedding of the second V rows; the first V lack it."""

    num_views: int

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Map [1,C'] to [2V,D]."""
        return F.pad(super().forward(image_embeds).expand(self.num_views, -1), (0, 0, self.num_views, 0))


class Denoiser(nn.Module):
    """The multi-view U-Net on both passes of guidance."""

    def __init__(self, pipe: MultiViewDiffusionPipeline, num_views: int):
        super().__init__()
        config = pipe.unet.config
        self.told = config.addition_embed_type == "image"
        with torch.device("meta"):
            # With addition_embed_type, diffusers would project the context too.
            self.unet = UNet2DConditionModel.from_config(_config(pipe.unet) | {"addition_embed_type": None})
            if self.told:
                width = self.unet.time_embedding.linear_2.out_features
                self.unet.add_embedding = SeenImage(config.cross_attention_dim, width)
                self.unet.add_embedding.num_views = num_views
                self.unet.register_to_config(addition_embed_type="image")
            for block in self.unet.modules():
                if isinstance(block, BasicTransformerBlock):
                    block.__class__, block.num_views = MultiViewBlock, num_views
                    block.add_attentions(block.dim, block.num_attention_heads, config.cross_attention_dim)
        weights = {k: v for k, v in pipe.unet.state_dict().items() if not k.startswith("image_projection")}
        self.unet.load_state_dict(weights, assign=True)
        self.unet.eval()

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, pose_embeds: Tensor) -> Tensor:
        added = {"image_embeds": context[-1:, 1]} if self.told else None
        conditions = {"class_labels": pose_embeds, "added_cond_kwargs": added}
        return self.unet(sample, timestep, context, **conditions, return_dict=False)[0]


class Upsampler(nn.Module):
    """The K-UNet of the latent upsampler."""

    def __init__(self, pipe: MultiViewDiffusionPipeline):
        super().__init__()
        assert pipe.upsampler is not None
        # Not on the meta device, because the kernels that resize are not among the weights.
        self.unet = UNet2DConditionModel.from_config(_config(pipe.upsampler.unet))
        self.unet.load_state_dict(pipe.upsampler.unet.state_dict(), assign=True)
        self.unet.to(pipe.device, pipe.dtype).eval()

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        return self.unet(sample, timestep, text, timestep_cond=condition, return_dict=False)[0][:, :-1]


class StockPipeline:
    """One portrait to views with diffusers' networks: DDIM, guidance, the latent upsampler, decoding.

    Args:
        pipe: a gafext pipeline whose U-Net has attn_cv and attn_ip, with its weights; with the upsampler or without.
        num_views: V.
        guidance_scale: above 1.
        num_inference_steps: of DDIM; of the upsampler's Euler method 10.

    Attributes:
        networks: what maps tensors to a tensor, by name; replace an entry to run that network otherwise.
    """

    def __init__(
        self,
        pipe: MultiViewDiffusionPipeline,
        *,
        num_views: int,
        guidance_scale: float,
        num_inference_steps: int,
    ):
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(_config(pipe.vae))
        vae.load_state_dict(pipe.vae.state_dict(), assign=True)
        vae.eval()
        self.networks: dict[str, Any] = {
            "tokens": Tokens(pipe),
            "encoder": Encoder(vae),
            "denoiser": Denoiser(pipe, num_views),
            "decoder": Decoder(vae),
        }
        self.guidance_scale, self.num_inference_steps = guidance_scale, num_inference_steps
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config.to_dict())
        if pipe.upsampler is not None:
            self.networks["upsampler"] = Upsampler(pipe)
            self.euler = EulerDiscreteScheduler.from_config(pipe.upsampler.scheduler.config.to_dict())
            assert pipe.upsampler.empty_prompt is not None
            text, pooled = pipe.upsampler.empty_prompt
            level = pooled.new_tensor([1.0, 0.0]).repeat_interleave(LEVEL_CHANNELS // 2)[None]
            self.prompt = (text.repeat(num_views, 1, 1), torch.cat([level, pooled], dim=1).repeat(num_views, 1))

    def encode(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """Encode the portrait and the normal maps to the context [2V,1+T,C'] and latents [V,4,h,w]."""
        tokens = self.networks["tokens"](given.pixel_values)
        context = F.pad(tokens, (0, 0, 1, 0)).expand(len(given.pose_embeds), -1, -1)
        return context.contiguous(), self.networks["encoder"](given.normal_maps)

    def denoise(self, given: Inputs, context: Tensor, normal_latents: Tensor) -> Tensor:
        """Denoise the latents [V,4,h,w]."""
        latents = given.latents
        self.scheduler.set_timesteps(self.num_inference_steps, device=latents.device)
        fixed = normal_latents.repeat(2, 1, 1, 1)
        for timestep in self.scheduler.timesteps:
            sample = torch.cat([latents.to(fixed.dtype).repeat(2, 1, 1, 1), fixed], dim=1)
            output = self.networks["denoiser"](sample, timestep, context, given.pose_embeds)
            unconditional, conditional = output.float().chunk(2)
            output = unconditional + self.guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
        return latents

    def upsample(self, given: Inputs, latents: Tensor) -> Tensor:
        """Double the size of the latents as diffusers' latent upscale pipeline; without an upsampler, bilinear."""
        if "upsampler" not in self.networks:
            return F.interpolate(latents, scale_factor=2.0, mode="bilinear", align_corners=False)
        self.euler.set_timesteps(10, device=latents.device)
        x, low = given.upsampler_noise * self.euler.init_noise_sigma, F.interpolate(latents, scale_factor=2.0)
        for timestep, sigma in zip(self.euler.timesteps, self.euler.sigmas.tolist(), strict=False):
            scaled = self.euler.scale_model_input(x, timestep)
            time = torch.full((1,), math.log(sigma) / 4, device=x.device)
            dtype = self.prompt[0].dtype
            output = self.networks["upsampler"](torch.cat([scaled, low], dim=1).to(dtype), time, *self.prompt)
            clean = x / (sigma**2 + 1) + self.euler.scale_model_input(sigma * output.float(), timestep)
            x = self.euler.step(clean, timestep, x, return_dict=False)[0]
        return x

    def decode(self, given: Inputs, latents: Tensor) -> Tensor:
        """Decode latents to pictures [V,3,H,W] in [0,1]."""
        return self.networks["decoder"](latents.to(given.normal_maps.dtype)).float()


def _config(network: Any) -> dict[str, Any]:
    """Return the configuration without what is gafext's own, of which diffusers would warn."""
    known = inspect.signature(UNet2DConditionModel.__init__).parameters.keys()
    values = network.config.to_dict()
    return {name: value for name, value in values.items() if name in known or not isinstance(network, MultiViewUNet)}
