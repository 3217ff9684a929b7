"""Latent upsampler of sd-x2-latent-upscaler: denoises latents of twice the size, conditioned on the small ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gafext import weights
from gafext.atomic import replace_whole
from gafext.checkpoints.prompts import encode_text
from gafext.config import SD_X2_SCHEDULE, EulerConfig, KUNetConfig, VAEConfig
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.guidance import check_guidance_scale, guide
from gafext.models.k_unet import KUNet
from gafext.noise import resolve_seed, view_noise
from gafext.schedulers import CONFIG_NAME, EulerDiscreteScheduler

EMPTY_PROMPT_NAME = "empty_prompt.safetensors"
LEVEL_CHANNELS = 128
"""Channels of the condition that encode the noise added to the small latents; the others are the pooled prompt."""
NOISE_STEP = 2**20
"""Argument `step` of `view_noise` for the upsampler's noise; denoising uses 0 to 1000."""


class PromptEmbeds(NamedTuple):
    """Embeddings of a prompt for the upsampler."""

    prompt_embeds: Tensor  # [1 or B,T,C]
    pooled_prompt_embeds: Tensor  # [1 or B,P]


def encode_prompt(
    folder: str | Path,
    prompt: str | list[str] = "",
    *,
    device: torch.device | str | None = None,
    variant: str | None = None,
) -> PromptEmbeds:
    """Encode prompts for the upsampler; arguments and errors are those of `prompts.encode_text`.

    Returns:
        prompt_embeds [B,T,C], the last layer's output before the final LayerNorm, and pooled_prompt_embeds [B,C];
        float32.

    Source: diffusers: pipeline_stable_diffusion_latent_upscale.py, encode_prompt.
    """
    encoded = encode_text(folder, prompt, device=device, variant=variant)
    return PromptEmbeds(encoded.unnormalized, encoded.pooled)


class LatentUpsampler(nn.Module):
    """Double the size of latents with a K-UNet F, Euler's method and EDM's preconditioning at σ_data = 1.

    D(x; σ) = x/(σ²+1) + σ/√(σ²+1) · F([x/√(σ²+1), nearest2×(latents)], ln σ / 4)
    x ← x + (x - D)/σ · (σ_next - σ), from x = σ_max · noise

    Args:
        unet: F; its last output channel, a variance, is not used.
        scheduler: Euler's method over the noise levels; the network predicts the clean sample.
        empty_prompt: embeddings of the empty prompt, the default of a call's prompt and negative prompt; None: every
            call has to pass its own.
        scaling_factor: that of the autoencoder whose latents it was trained on; None: unknown.

    Source: EDM (arXiv 2206.00364) eq. 7 and table 1; diffusers: pipeline_stable_diffusion_latent_upscale.py.
    """

    prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor | None

    def __init__(
        self,
        unet: KUNet,
        scheduler: EulerDiscreteScheduler | None = None,
        *,
        empty_prompt: PromptEmbeds | None = None,
        scaling_factor: float | None = None,
    ):
        super().__init__()
        self.scaling_factor = scaling_factor
        with torch.device("cpu"):  # a scheduler's numbers are read, also where the network is on the meta device
            self.scheduler = scheduler or EulerDiscreteScheduler(SD_X2_SCHEDULE)
        self.unet = unet
        _check_unet(unet.config)
        if self.scheduler.config.prediction_type != "sample":
            got = self.scheduler.config.prediction_type
            raise CheckpointError(f"scheduler: expected prediction_type 'sample', got {got!r}")
        if empty_prompt is not None:
            self._check_prompt("empty prompt's ", empty_prompt, batch=1, error=CheckpointError)
        for name in PromptEmbeds._fields:
            value = None if empty_prompt is None else getattr(empty_prompt, name).to(unet.device, unet.dtype)
            self.register_buffer(name, value)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def latent_channels(self) -> int:
        return self.unet.config.in_channels // 2

    @property
    def empty_prompt(self) -> PromptEmbeds | None:
        if self.prompt_embeds is None or self.pooled_prompt_embeds is None:
            return None
        return PromptEmbeds(self.prompt_embeds, self.pooled_prompt_embeds)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
    ) -> LatentUpsampler:
        """Load a published upsampler's folder, or one that `save_pretrained` wrote.

        Args:
            folder: folder with `unet/`, `scheduler/`, and either `empty_prompt.safetensors` or a `text_encoder/`
                (and `tokenizer/`) to encode the empty prompt once. Without these, every call has to pass
                prompt_embeds. Of a `vae/`, only the scaling factor is read.
            dtype: dtype of the weights; None: float32.
            device: device of the weights; None: CPU.
            variant: variant in the names of the weight files, such as "fp16".

        Returns:
            The upsampler, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or damaged, or the components do not fit together.
        """
        folder = Path(folder)

        def variant_of(name: str) -> str | None:
            return weights.available_variant(folder / name, variant, checkpoint=folder)

        scheduler = _read_scheduler(folder / "scheduler")
        empty_prompt = None
        if (folder / EMPTY_PROMPT_NAME).is_file():
            file = weights.WeightFile(folder / EMPTY_PROMPT_NAME)
            # The widths are checked against the network's, like those of an encoded prompt.
            weights.check_keys(file, {name: file.shapes.get(name, ()) for name in PromptEmbeds._fields})
            empty_prompt = PromptEmbeds(*(file.tensor(name) for name in PromptEmbeds._fields))
        elif (folder / "text_encoder").is_dir():
            empty_prompt = encode_prompt(folder, device=device, variant=variant_of("text_encoder"))
        unet = KUNet.from_pretrained(folder / "unet", dtype=dtype, device=device, variant=variant_of("unet"))
        vae, scaling_factor = folder / "vae" / "config.json", None
        if vae.is_file():
            scaling_factor = weights.read_json(vae).get("scaling_factor", VAEConfig.scaling_factor)
        return cls(unet, scheduler, empty_prompt=empty_prompt, scaling_factor=scaling_factor).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `unet/` and `scheduler/` as diffusers reads them, and `empty_prompt.safetensors`."""
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / EMPTY_PROMPT_NAME).unlink(missing_ok=True)  # left by an upsampler that was saved here before
        if self.empty_prompt is not None:
            with replace_whole(folder) as temporary:
                weights.save_tensors(self.empty_prompt._asdict(), temporary / EMPTY_PROMPT_NAME)

    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        *,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | int | None = 0,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        network: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Double the size of latents.

        Args:
            latents: scaled latents [B,4,h,w], any floating-point dtype; for h and w see `check_size`.
            prompt_embeds: [1,T,C] for all rows or [B,T,C], from `encode_prompt`; None: the empty prompt.
            pooled_prompt_embeds: [1,P] or [B,P]; required with prompt_embeds.
            negative_prompt_embeds: [1,T,C] or [B,T,C], for the unconditional pass; None: the empty prompt.
            negative_pooled_prompt_embeds: [1,P] or [B,P]; required with negative_prompt_embeds.
            noise: standard normal noise [B,4,2h,2w]; None: drawn from `generator`.
            generator: seed of the noise: row i depends only on (seed, i), on every device. None: a random seed.
            num_inference_steps: 1 to 1000.
            guidance_scale: 0 to 20; up to 1 no unconditional pass runs.
            network: computes what `unet` computes of tensors alone, such as its CUDA graph; None: `unet` itself.

        Returns:
            [B,4,2h,2w], dtype of the latents; noise levels and steps are computed in float32.

        Raises:
            ValueError: an argument has another shape, dtype or range, or the empty prompt is required and missing.
        """
        self._check_latents(latents)
        self.scheduler.set_timesteps(num_inference_steps)
        check_guidance_scale(guidance_scale, least=0)
        prompt = self._prompt("", prompt_embeds, pooled_prompt_embeds, batch=len(latents))
        negative = None
        if guidance_scale > 1:
            negative = self._prompt(
                "negative_", negative_prompt_embeds, negative_pooled_prompt_embeds, batch=len(latents)
            )

        denoise = functools.partial(self._denoise, network or self.unet)
        x = self._noise(noise, generator, latents) * self.scheduler.init_noise_sigma
        low = F.interpolate(latents.to(self.device, self.dtype), scale_factor=2.0, mode="nearest")
        for timestep, sigma in zip(self.scheduler.timesteps.tolist(), self.scheduler.sigmas.tolist(), strict=False):
            clean = denoise(x, sigma, low, prompt)
            if negative is not None:
                clean = guide(denoise(x, sigma, low, negative), clean, guidance_scale)
            x = self.scheduler.step(clean, timestep, x)
        return x.to(latents.dtype)

    def check_size(self, height: int, width: int) -> None:
        """Raise a ValueError unless latents of this size can be doubled: for SD x2, multiples of 4, at least 8."""
        least = self.unet.config.size_multiple
        multiple = max(least // 2, 1)
        if any(size % multiple or size < least for size in (height, width)):
            raise ValueError(
                f"latents: expected a height and width in multiples of {multiple} and at least {least}, "
                f"got {height}×{width}"
            )

    def _denoise(
        self, network: Callable[..., Tensor], x: Tensor, sigma: float, low: Tensor, prompt: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Compute D(x; σ) for x [B,4,2h,2w] float32; same shape and dtype."""
        scale = 1 / math.sqrt(sigma**2 + 1)
        sample = torch.cat([(x * scale).to(low.dtype), low], dim=1)
        timestep = torch.full((1,), math.log(sigma) / 4, device=x.device)  # filled on the device: no copy to wait for
        output = network(sample, timestep, *prompt)[:, :-1]
        return x * scale**2 + sigma * scale * output.float()

    def _noise(self, noise: Tensor | None, generator: torch.Generator | int | None, latents: Tensor) -> Tensor:
        batch, channels, height, width = latents.shape
        shape = (channels, 2 * height, 2 * width)
        if noise is None:
            noise = view_noise(resolve_seed(generator), portraits=1, views=batch, shape=shape, step=NOISE_STEP)
        if noise.shape != (batch, *shape):
            raise ValueError(f"noise: expected {(batch, *shape)}, got {tuple(noise.shape)}")
        return noise.to(self.device, torch.float32)

    def _prompt(
        self, prefix: str, embeds: Tensor | None, pooled: Tensor | None, *, batch: int
    ) -> tuple[Tensor, Tensor]:
        """Return the K-UNet's text [1 or B,T,C] and condition [1 or B,time_cond_proj_dim]."""
        if (embeds is None) != (pooled is None):
            raise ValueError(f"{prefix}prompt_embeds and {prefix}pooled_prompt_embeds: expected both or neither")
        prompt = self.empty_prompt if embeds is None or pooled is None else PromptEmbeds(embeds, pooled)
        if prompt is None:
            raise ValueError(
                f"{prefix}prompt_embeds: expected a tensor, got None, and this upsampler has neither an "
                f"{EMPTY_PROMPT_NAME} nor a text_encoder"
            )
        self._check_prompt(prefix, prompt, batch=batch)
        text, pooled = (value.to(self.device, self.dtype) for value in prompt)
        # The published network was trained on noised small latents: 64 ones and 64 zeros encode the noise level 0.
        level = pooled.new_tensor([1.0, 0.0]).repeat_interleave(LEVEL_CHANNELS // 2).expand(len(pooled), -1)
        return text, torch.cat([level, pooled], dim=1)

    def _check_prompt(
        self, prefix: str, prompt: PromptEmbeds, *, batch: int, error: type[ValueError] = ValueError
    ) -> None:
        width, pooled_width = _prompt_widths(self.unet.config)
        rows = "1" if batch == 1 else f"1 or {batch}"
        embeds, pooled = prompt
        if embeds.ndim != 3 or len(embeds) not in (1, batch) or embeds.shape[1] == 0 or embeds.shape[2] != width:
            raise error(f"{prefix}prompt_embeds: expected ({rows},T,{width}), got {tuple(embeds.shape)}")
        if pooled.ndim != 2 or len(pooled) not in (1, batch) or pooled.shape[1] != pooled_width:
            raise error(f"{prefix}pooled_prompt_embeds: expected ({rows},{pooled_width}), got {tuple(pooled.shape)}")

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels or len(latents) == 0 or not latents.is_floating_point():
            raise ValueError(
                f"latents: expected (B,{channels},h,w), floating-point, got {tuple(latents.shape)}, {latents.dtype}"
            )
        self.check_size(*latents.shape[2:])


def _prompt_widths(config: KUNetConfig) -> tuple[int, int]:
    """Return the widths of prompt_embeds and pooled_prompt_embeds."""
    assert config.time_cond_proj_dim is not None  # KUNetConfig requires it
    return config.cross_attention_dim, config.time_cond_proj_dim - LEVEL_CHANNELS


def _check_unet(config: KUNetConfig) -> None:
    latent, odd = divmod(config.in_channels, 2)
    if odd or config.out_channels != latent + 1:
        raise CheckpointError(
            "unet: expected in_channels of twice the latents and out_channels of one more than them, such as 8 and 5, "
            f"got {config.in_channels} and {config.out_channels}"
        )
    if _prompt_widths(config)[1] <= 0:
        raise CheckpointError(
            f"unet: expected a time_cond_proj_dim over {LEVEL_CHANNELS}, got {config.time_cond_proj_dim}"
        )


def _read_scheduler(folder: Path) -> EulerDiscreteScheduler:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: no such folder")
    solver = weights.read_json(path).get("_class_name", EulerConfig.class_name)
    if solver != EulerConfig.class_name:
        raise CheckpointError(f"{path}: _class_name={solver!r}: expected {EulerConfig.class_name!r}")
    return EulerDiscreteScheduler.from_pretrained(folder)
