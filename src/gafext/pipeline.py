"""The whole way from one portrait to several views, in the order of the diagram in the README."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from gafext import conditions, memory
from gafext import images as imaging
from gafext.attention import check_backend, set_attention_backend
from gafext.cameras import Cameras, as_cameras
from gafext.checkpoint import load_parts, save_parts
from gafext.embedded import MODEL, NOTICE, CartoonWarning
from gafext.errors import CheckpointError
from gafext.guidance import check_guidance_scale, needs_unconditional
from gafext.heads import head_normals
from gafext.hub import checkpoint_folder
from gafext.int8 import check_move, is_quantized, quantize_transformers, require_supported
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import MultiViewUNet
from gafext.models.upsampler import NOISE_STEP, LatentUpsampler
from gafext.models.vae import AutoencoderKL
from gafext.noise import resolve_seed, view_noise
from gafext.output import MultiViewOutput
from gafext.scheduler import Scheduler, check_eta
from gafext.versions import versions

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
UPSAMPLE = ("auto", "bilinear", "none")
DEFAULT_SAMPLE_SIZE = 32
DEFAULT_VIEWS = 4


class MultiViewDiffusionPipeline:
    """One portrait in, V consistent views of the same head out.

    Args:
        unet: the multi-view denoiser.
        vae: between pictures and latents.
        scheduler: the sampler.
        image_encoder: CLIP; needed when the U-Net attends to the portrait.
        upsampler: doubles the latents; without one they are doubled bilinearly.
        prompt_embeds: the text [1,T,C] of every row; None is the all-zero text.
        guidance_scale: what a call without one uses.

    Raises:
        CheckpointError: the parts do not fit together.

    Source: GAF (arXiv 2412.10209) section 3; ImageDream (arXiv 2312.02201) for the dense family.
    """

    def __init__(
        self,
        *,
        unet: MultiViewUNet,
        vae: AutoencoderKL,
        scheduler: Scheduler,
        image_encoder: CLIPVisionEncoder | None = None,
        upsampler: LatentUpsampler | None = None,
        prompt_embeds: Tensor | None = None,
        guidance_scale: float = 7.5,
    ):
        self.unet, self.vae, self.scheduler, self.image_encoder = unet, vae, scheduler, image_encoder
        self.upsampler, self.prompt_embeds = upsampler, prompt_embeds
        check_guidance_scale(guidance_scale)
        self.guidance_scale = guidance_scale
        self.attention_backend = "auto"
        self.origin: dict[str, Any] = {"model": "memory"}
        """Where the weights come from: what `from_pretrained` was given."""
        self._check_parts()

    def _check_parts(self) -> None:
        config, latent = self.unet.config, self.vae.config.latent_channels
        if config.in_channels not in (latent, 2 * latent):
            raise CheckpointError(
                f"unet: expected in_channels {latent} (latents) or {2 * latent} (latents and normal latents) "
                f"for a VAE of {latent} latent channels, got {config.in_channels}"
            )
        if config.out_channels != latent:
            raise CheckpointError(f"unet: expected out_channels {latent}, got {config.out_channels}")
        if self.upsampler is not None and self.upsampler.latent_channels != latent:
            raise CheckpointError(f"upsampler: expected {latent} latents, got {self.upsampler.latent_channels}")
        if config.image_attention is None:
            return
        if self.image_encoder is None:
            raise CheckpointError("image_encoder: expected one, because the U-Net attends to the portrait, got none")
        field = "projection_dim" if config.image_projection == "pooled" else "hidden_size"
        width, got = config.image_embed_dim or config.cross_attention_dim, getattr(self.image_encoder.config, field)
        if width != got:
            raise CheckpointError(f"image_encoder: expected {field} {width} to fit the U-Net, got {got}")

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        *,
        revision: str | None = None,
        scheduler: str | None = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        ip_adapter: str | Path | None = None,
        ip_adapter_scale: float = 1.0,
    ) -> MultiViewDiffusionPipeline:
        """Load a checkpoint folder: `unet/ vae/ scheduler/`, and `image_encoder/ upsampler/ text_encoder/` if there.

        Args:
            path_or_repo_id: a folder, or a hub id such as "owner/name"; None is the small built-in model.
            dtype: of the weights; None is float32. "int8" is float32 with the U-Net's linear layers in 8-bit integers:
                faster, about 1 % off a layer, for CPUs with VNNI.
            device: None is CUDA, else MPS, else the CPU.
            variant: "fp16" reads the files that carry it in their name.
            revision: of a hub id: a branch, tag or commit.
            scheduler: "ddim", "dpm++" or "euler"; None is the checkpoint's own.
            lora: a safetensors file of low-rank updates, merged into the U-Net.
            lora_scale: weight of the updates.
            ip_adapter: an IP-Adapter file, plain or Plus, for a U-Net that does not look at the portrait otherwise.
            ip_adapter_scale: weight of the portrait's attention.

        Returns:
            The pipeline, ready to be called.

        Raises:
            CheckpointError: something is missing, damaged or does not fit together.
            ValueError: this machine does not have the dtype.
        """
        device = torch.device(device) if device is not None else default_device()
        adapters = {"lora": lora, "lora_scale": lora_scale}
        adapters |= {"ip_adapter": ip_adapter, "ip_adapter_scale": ip_adapter_scale}
        if dtype == "int8":
            require_supported(device)
            options = {"revision": revision, "scheduler": scheduler, **adapters}
            pipeline = cls.from_pretrained(path_or_repo_id, torch.float32, device, variant, **options)
            quantize_transformers(pipeline.unet)
            return pipeline
        if not isinstance(dtype, torch.dtype | None):
            raise ValueError(f"dtype: expected a torch.dtype, 'int8' or None, got {dtype!r}")
        if path_or_repo_id is None:
            if not (lora is ip_adapter is variant is revision is None):
                raise ValueError("lora, ip_adapter, variant, revision: expected None for the built-in model")
            warnings.warn(NOTICE, CartoonWarning, stacklevel=2)
            pipeline = cls(**load_parts(MODEL, dtype=dtype, device=device, variant=None, scheduler=scheduler))
            pipeline.origin = {"model": "built-in"}
            return pipeline
        folder = checkpoint_folder(path_or_repo_id, revision=revision, variant=variant)
        parts = load_parts(folder, dtype=dtype, device=device, variant=variant, scheduler=scheduler, **adapters)
        try:
            pipeline = cls(**parts)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        given = {"variant": variant, "revision": revision, **adapters}
        pipeline.origin = {"model": str(path_or_repo_id), **{k: _plain(v) for k, v in given.items()}}
        if pipeline.unet.config.image_attention is None:
            warnings.warn(f"{folder / 'unet'}: this U-Net does not look at the portrait", stacklevel=2)
        return pipeline

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint folder that `from_pretrained` reads; `model_index.json` comes last."""
        save_parts(self, Path(folder))

    @property
    def _networks(self) -> list[torch.nn.Module]:
        return [part for part in (self.unet, self.vae, self.image_encoder, self.upsampler) if part is not None]

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def to(self, *args: Any, **kwargs: Any) -> MultiViewDiffusionPipeline:
        """Move every network: the arguments are those of `torch.nn.Module.to`.

        Raises:
            ValueError: the weights are 8-bit integers, which stay on the CPU, with float32 around them.
        """
        check_move(self.unet, *args, **kwargs)
        for network in self._networks:
            network.to(*args, **kwargs)
        return self

    def set_attention_backend(self, backend: str) -> None:
        """Choose "auto", "kernel", "sdpa" or "reference" for every attention and GEGLU of every network.

        "kernel" leaves the autoencoder at "auto": its one head is as wide as its channels, 512 in Stable Diffusion,
        and in float32 on a GPU no kernel is that wide.
        """
        check_backend(backend)
        self.attention_backend = backend
        for network in self._networks:
            set_attention_backend(network, "auto" if network is self.vae and backend == "kernel" else backend)

    @torch.no_grad()
    @memory.release_afterwards
    def __call__(
        self,
        image: Any,
        cameras: Any = None,
        normal_maps: Any = None,
        *,
        num_views: int = DEFAULT_VIEWS,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        generator: torch.Generator | int | None = None,
        latents: Tensor | None = None,
        renders: Any = None,
        strength: float = 1.0,
        eta: float = 0.0,
        upsample: str = "auto",
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict | None] | None = None,
        progress_bar: bool = True,
    ) -> MultiViewOutput | list[MultiViewOutput]:
        """Generate the views of one portrait, or of each of a list of them.

        Args:
            image: the portrait: a path, a PIL image, an array [H,W,3] or a tensor [3,H,W], uint8 or float in [0,1], of
                any size and mode; or a list of them.
            cameras: a `Cameras`, or world-to-camera matrices [V,4,4] with OpenCV axes, taken to have a field of view
                of 30 degrees; None is an orbit of `num_views`.
            normal_maps: V pictures of camera-space normals, n/2 + 1/2; None are those of a neutral head.
            num_views: V, when no cameras are given. The reference frame of ImageDream's family does not count.
            num_inference_steps: 1 to 1000.
            guidance_scale: 1.0 to 20.0; at 1.0 no unconditional pass runs. None is the checkpoint's own, 7.5 as a rule.
            generator: an integer seed or a torch.Generator, whose initial seed counts. Noise depends on the seed, the
                index of the portrait and the index of the view alone. None draws a seed, which `run` tells.
            latents: initial noise [B*V,4,h,w] in place of the seed's.
            renders: B*V pictures to start from, noised: the views of an avatar that is being fitted.
            strength: how much of the noise schedule is run on `renders`, above 0 to 1.
            eta: 0 is deterministic, 1 is as noisy as DDPM.
            upsample: "auto" doubles the latents before they are decoded, by the checkpoint's upsampler if it has one;
                "bilinear" doubles them without it; "none" leaves them.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after each step; a dict that
                it returns replaces the latents.
            progress_bar: show one.

        Returns:
            The views; a list of them, one a portrait, when `image` is a list.

        Raises:
            ImageError: a picture cannot be read.
            CameraError: a camera is no rigid transform.
            ValueError: an argument is out of range, or counts do not agree.
        """
        several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        check_guidance_scale(guidance_scale)
        check_eta(eta)
        _check_choice("output_type", output_type, OUTPUT_TYPES)
        _check_choice("upsample", upsample, UPSAMPLE)
        given = {"cameras": cameras, "normal_maps": normal_maps, "latents": latents, "renders": renders}
        cameras = _cameras(cameras, num_views)
        num_views = len(cameras)
        portraits = [imaging.load_image(item) for item in (image if several else [image])]
        if not portraits:
            raise ValueError("image: expected at least one portrait, got an empty list")
        seed = resolve_seed(generator)
        timesteps = self._timesteps(num_inference_steps, strength, noised=renders is not None)
        size = self._latent_size(latents, rows=len(portraits) * num_views)
        if upsample == "auto" and self.upsampler is not None:
            self.upsampler.check_size(size, size)
        pixels = size * self.vae.config.factor
        if renders is not None:
            renders = imaging.load_images(renders, count=len(portraits) * num_views, name="renders")
            renders = imaging.to_square_tensor(renders, pixels)
        normals = self._normal_maps(normal_maps, cameras, pixels)

        guided = needs_unconditional(guidance_scale)
        told = conditions.prepare(
            self.unet,
            cameras,
            portraits=len(portraits),
            tokens=self.encode_portraits(portraits, guided=guided),
            guided=guided,
            prompt_embeds=self.prompt_embeds,
            normal_latents=None if normals is None else self.encode(normals).repeat(len(portraits), 1, 1, 1),
            reference_latents=self._reference(portraits, pixels),
        )
        if latents is None:
            shape = (self.vae.config.latent_channels, size, size)
            latents = view_noise(seed, portraits=len(portraits), views=num_views, shape=shape)
        latents = latents.to(self.device, torch.float32)
        if renders is None:
            latents = latents * self.scheduler.init_noise_sigma
        else:
            latents = self.scheduler.add_noise(self.encode(renders), latents, timesteps[:1].expand(len(latents)))

        steps = self.denoise(
            latents, timesteps, told, num_views=num_views, guidance_scale=guidance_scale, eta=eta, seed=seed
        )
        bar = tqdm(steps, total=len(timesteps), disable=not progress_bar, desc=f"{len(latents)} views")
        for index, (timestep, latents) in enumerate(bar):
            if callback_on_step_end is not None:
                _replace(latents, callback_on_step_end(self, index, timestep, {"latents": latents}))
        latents = self.upsample(latents, upsample, num_views=num_views, seed=seed)

        run = {
            **self._settings(upsample),
            **{"num_views": num_views, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale},
            **{"seed": seed, "strength": strength, "eta": eta, "output_type": output_type},
            **{name: "default" if value is None else "given" for name, value in given.items()},
        }
        outputs = [
            MultiViewOutput(self._finish(part, output_type), cameras, {**run, "portrait_index": index})
            for index, part in enumerate(latents.split(num_views))
        ]
        return outputs if several else outputs[0]

    def _settings(self, upsample: str) -> dict[str, Any]:
        """What of the pipeline itself decides how the views look, for the record of a run."""
        learned = upsample == "auto" and self.upsampler is not None
        return {
            **self.origin,
            "scheduler": self.scheduler.config.to_dict(),
            "upsample": "upsampler" if learned else "none" if upsample == "none" else "bilinear",
            "attention_backend": self.attention_backend,
            "device": str(self.device),
            "dtype": "int8" if is_quantized(self.unet) else str(self.dtype).removeprefix("torch."),
            "versions": versions(),
        }

    def _timesteps(self, num_inference_steps: int, strength: float, *, noised: bool) -> Tensor:
        """The last `strength` of the schedule, when it starts from renders."""
        if not isinstance(strength, numbers.Real) or not 0 < strength <= 1:
            raise ValueError(f"strength: expected above 0 to 1, got {strength!r}")
        if strength < 1 and not noised:
            raise ValueError(f"strength: expected 1 without renders, got {strength}")
        self.scheduler.set_timesteps(num_inference_steps)
        steps = int(num_inference_steps * strength)
        if steps == 0:
            raise ValueError(f"strength: {strength} of num_inference_steps={num_inference_steps} leaves no step")
        return self.scheduler.timesteps[num_inference_steps - steps :]

    def _latent_size(self, latents: Tensor | None, *, rows: int) -> int:
        if latents is None:
            return self.unet.config.sample_size or DEFAULT_SAMPLE_SIZE
        if not isinstance(latents, Tensor):
            raise ValueError(f"latents: expected a tensor, got {type(latents).__name__}")
        channels, shape = self.vae.config.latent_channels, list(latents.shape)
        if len(shape) != 4 or shape[:2] != [rows, channels] or shape[2] != shape[3] or shape[2] == 0:
            raise ValueError(f"latents: expected [{rows},{channels},s,s], got {shape}")
        return shape[2]

    def _normal_maps(self, normal_maps: Any, cameras: Cameras, pixels: int) -> Tensor | None:
        """[V,3,s,s] in [-1,1], or None for a U-Net without normal latents."""
        if self.unet.config.in_channels == self.vae.config.latent_channels:
            if normal_maps is not None:
                raise ValueError("normal_maps: expected None, because this U-Net has no channels for normal latents")
            return None
        if normal_maps is None:
            return head_normals(cameras, pixels) * 2 - 1
        return imaging.to_square_tensor(
            imaging.load_images(normal_maps, count=len(cameras), name="normal_maps"), pixels
        )

    def _reference(self, portraits: Sequence[PIL.Image.Image], pixels: int) -> Tensor | None:
        """The portraits' latents [B,4,h,w], for the family that has them as a frame of their own."""
        if not conditions.uses_reference(self.unet.config):
            return None
        return self.encode(imaging.to_square_tensor(portraits, pixels))

    def encode_portraits(
        self, portraits: Sequence[PIL.Image.Image], *, guided: bool = False
    ) -> conditions.ImageTokens | None:
        """Image tokens of RGB pictures, or None when the U-Net does not look at them; see `conditions.image_tokens`."""
        if self.unet.config.image_attention is None:
            return None
        return conditions.image_tokens(self.unet, self.image_encoder, portraits, guided=guided)

    def encode(self, pictures: Tensor) -> Tensor:
        """Scaled latents [N,4,h,w] float32 of pictures [N,3,H,W] in [-1,1]: the mean, without sampling."""
        config = self.vae.config
        # One picture at a time: the same bits whatever the batch, and an eighth of the memory at 8 views.
        means = [self.vae.encode(picture.to(self.device, self.dtype))[0] for picture in pictures.split(1)]
        return (torch.cat(means).float() - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N,3,H,W] float32 in about [-1,1] of scaled latents [N,4,h,w], one at a time as in `encode`."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return torch.cat([self.vae.decode(latent.to(self.dtype)).float() for latent in latents.split(1)])

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        told: conditions.Conditions,
        *,
        num_views: int,
        guidance_scale: float,
        eta: float = 0.0,
        seed: int = 0,
    ) -> Iterator[tuple[float, Tensor]]:
        """The denoising loop: yields (timestep, latents) after each step; the latents may be changed in place.

        Args:
            latents: noise [B*V,4,h,w] float32.
            timesteps: of the scheduler, falling.
            told: everything else that the U-Net is told, from `conditions.prepare`.
            num_views: V.
            guidance_scale: 1.0 to 20.0.
            eta: 0 is deterministic.
            seed: of the noise that eta > 0 adds.
        """
        options = {"num_views": num_views, "guidance_scale": guidance_scale}
        for step, timestep in enumerate(timesteps.tolist()):
            output = told.predict(self.unet, self.scheduler, latents, timestep, **options)
            noise = None
            if eta > 0:
                portraits, shape = len(latents) // num_views, tuple(latents.shape[1:])
                noise = view_noise(seed, portraits=portraits, views=num_views, shape=shape, step=step + 1)
                noise = noise.to(latents.device)
            latents = self.scheduler.step(output, timestep, latents, eta=eta, noise=noise)
            yield timestep, latents

    def upsample(self, latents: Tensor, how: str, *, num_views: int, seed: int) -> Tensor:
        """Latents [B*V,4,h,w] of twice the size, or the same ones for "none"."""
        if how == "none":
            return latents
        if how == "bilinear" or self.upsampler is None:
            return F.interpolate(latents, scale_factor=2.0, mode="bilinear", align_corners=False)
        channels, height, width = latents.shape[1:]
        noise = view_noise(
            seed,
            portraits=len(latents) // num_views,
            views=num_views,
            shape=(channels, 2 * height, 2 * width),
            step=NOISE_STEP,
        )
        return torch.cat([self.upsampler(a, noise=b) for a, b in zip(latents.split(1), noise.split(1), strict=True)])

    def _finish(self, latents: Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | Tensor:
        if output_type == "latent":
            return latents
        pictures = self.decode(latents)
        if not pictures.isfinite().all():
            hint = "" if self.dtype == torch.float32 else f": {self.dtype} may be too narrow for this checkpoint"
            raise ValueError(f"the decoded pictures have NaN or infinite values{hint}")
        if output_type == "pt":
            return (pictures / 2 + 0.5).clamp(0, 1)
        return imaging.to_pil(pictures) if output_type == "pil" else imaging.to_numpy(pictures)


def default_device() -> torch.device:
    """CUDA, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")


def _cameras(cameras: Any, num_views: int) -> Cameras:
    """The cameras of a call; their number wins over the default of num_views, but not over another number."""
    orbit = as_cameras(None, num_views=num_views)
    if cameras is None:
        return orbit
    cameras = as_cameras(cameras, num_views=num_views)
    if num_views not in (DEFAULT_VIEWS, len(cameras)):
        raise ValueError(f"num_views: expected {len(cameras)}, the number of cameras, got {num_views}")
    return cameras


def _replace(latents: Tensor, returned: Any) -> None:
    """Put the latents that a callback returned in the place of the loop's."""
    if returned is None:
        return
    if not isinstance(returned, dict):
        raise ValueError(f"callback_on_step_end: expected a dict or None, got {type(returned).__name__}")
    replaced = returned.get("latents")
    if replaced is None:
        return
    if not isinstance(replaced, Tensor) or replaced.shape != latents.shape:
        got = list(replaced.shape) if isinstance(replaced, Tensor) else type(replaced).__name__
        raise ValueError(f"callback_on_step_end: expected latents of shape {list(latents.shape)}, got {got}")
    latents.copy_(replaced)
