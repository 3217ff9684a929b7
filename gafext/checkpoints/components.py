"""Components of a pipeline: loading, adapters, moving and saving."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gafext.assets import MODEL, NOTICE, CartoonWarning
from gafext.checkpoints.adapters import PipelineAdapters
from gafext.checkpoints.folder import load_parts, save_parts
from gafext.checkpoints.memory import default_device, usable_device
from gafext.config import UNetConfig
from gafext.errors import CheckpointError, CheckpointNotFoundError
from gafext.families import family_of
from gafext.guidance import check_guidance_scale
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.head_detector import HeadDetector
from gafext.models.head_fitter import HeadFitter
from gafext.models.image_normalizer import ImageNormalizer
from gafext.models.int8 import IN_8_BITS, check_move, dtype_name, is_quantized, quantize, require_supported
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.ops.backend import check_backend, set_attention_backend
from gafext.schedulers import Scheduler, as_scheduler, scheduler_class
from gafext.upsampler import LatentUpsampler
from gafext.versions import versions
from gafext.weights.hub import checkpoint_folder, missing_file_advice

PipelineType = TypeVar("PipelineType", bound="PipelineComponents")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class PipelineComponents(PipelineAdapters):
    """Networks and solver of a pipeline; arguments and errors are those of `MultiViewDiffusionPipeline`."""

    def __init__(
        self,
        *,
        unet: MultiViewUNet,
        vae: AutoencoderKL,
        scheduler: Any,
        image_encoder: CLIPVisionEncoder | None = None,
        upsampler: LatentUpsampler | None = None,
        prompt_embeds: Tensor | None = None,
        guidance_scale: float = 7.5,
        image_normalizer: ImageNormalizer | None = None,
        image_noising_scheduler: Scheduler | None = None,
        head_detector: HeadDetector | None = None,
        head_fitter: HeadFitter | None = None,
    ):
        self.unet, self.vae, self.scheduler, self.image_encoder = unet, vae, scheduler, image_encoder
        self.upsampler, self.prompt_embeds = upsampler, prompt_embeds
        check_guidance_scale(guidance_scale)
        self.guidance_scale = guidance_scale
        self.image_normalizer, self.image_noising_scheduler = image_normalizer, image_noising_scheduler
        self.head_detector, self.head_fitter = head_detector, head_fitter
        self.attention_backend = "auto"
        self._progress_bar_config: dict[str, Any] = {}
        self.origin: dict[str, Any] = {"model": "memory"}
        """Source of the weights, for run.json: the arguments of `from_pretrained` and of the adapters."""
        self._check_parts()

    @property
    def scheduler(self) -> Any:
        """The solver: one of gafext's, or any scheduler of diffusers for diffusion models; may be assigned."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        as_scheduler(scheduler)  # raises for what cannot be stepped
        self._scheduler = scheduler

    @property
    def solver(self) -> Scheduler:
        """The scheduler behind the interface of gafext's."""
        return as_scheduler(self._scheduler)

    def _solver(self, name: str | None) -> Scheduler:
        """Return the solver of a run: the pipeline's, or one of this name over the same noise schedule."""
        if name is None:
            return self.solver
        written_by = {"_class_name": type(self._scheduler).__name__}  # diffusers' configurations may lack it
        return scheduler_class(name).from_config({**written_by, **self._scheduler.config})

    def _check_parts(self, config: UNetConfig | None = None) -> None:
        """Raise a CheckpointError unless the components fit together; `config` replaces the U-Net's configuration."""
        config, latent = config or self.unet.config, self.vae.config.latent_channels
        if config.in_channels not in (latent, 2 * latent):
            raise CheckpointError(
                f"unet: expected in_channels {latent} (latents) or {2 * latent} (latents and normal latents) "
                f"for a VAE of {latent} latent channels, got {config.in_channels}"
            )
        if config.out_channels != latent:
            raise CheckpointError(f"unet: expected out_channels {latent}, got {config.out_channels}")
        if self.upsampler is not None and self.upsampler.latent_channels != latent:
            raise CheckpointError(f"upsampler: expected {latent} latents, got {self.upsampler.latent_channels}")
        if family_of(config).portrait_labels:
            self._check_labels(config)
        factor, trained = self.vae.config.scaling_factor, getattr(self.upsampler, "scaling_factor", None)
        if trained not in (None, factor):
            raise CheckpointError(
                f"upsampler: expected the VAE's scaling_factor {factor}, got {trained} (its vae/config.json): it was "
                "trained on other latents. Without it, views are upsampled bilinearly"
            )
        if config.image_attention is None:
            return
        if self.image_encoder is None:
            raise CheckpointError("image_encoder: expected one, because the U-Net attends to the portrait, got none")
        field = "projection_dim" if config.image_projection == "pooled" else "hidden_size"
        width, got = config.image_embed_dim or config.cross_attention_dim, getattr(self.image_encoder.config, field)
        if width != got:
            raise CheckpointError(f"image_encoder: expected {field} {width} to fit the U-Net, got {got}")

    def _check_labels(self, config: UNetConfig) -> None:
        """Raise a CheckpointError unless the parts that make class labels of the portrait are there and fit."""
        for name in ("image_encoder", "image_normalizer", "image_noising_scheduler"):
            if getattr(self, name) is None:
                raise CheckpointError(f"{name}: expected one, because the U-Net's labels are of the portrait, got none")
        assert self.image_encoder is not None and self.image_normalizer is not None
        width, got = self.image_normalizer.config.embedding_dim, self.image_encoder.config.projection_dim
        if width != got:
            raise CheckpointError(f"image_encoder: expected projection_dim {width} as image_normalizer, got {got}")
        if config.pose_dim != 2 * width:
            raise CheckpointError(f"image_normalizer: expected embedding_dim {config.pose_dim} / 2, got {width}")

    @classmethod
    def from_pretrained(
        cls: type[PipelineType],
        path_or_repo_id: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        scheduler: Any = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        ip_adapter: str | Path | None = None,
        ip_adapter_scale: float = 1.0,
        mv_adapter: str | Path | None = None,
        torch_dtype: torch.dtype | str | None = None,
    ) -> PipelineType:
        """Load a checkpoint folder: `unet/ vae/ scheduler/`, and optionally `image_encoder/ upsampler/ text_encoder/`.

        Args:
            path_or_repo_id: a folder, or a hub id such as "owner/name"; None: the small built-in model.
            dtype: dtype of the weights, or its name: "float32", "float16", "bfloat16"; None: float32. "int8": float32
                with the U-Net's linear layers and wide convolutions in 8-bit integers, on CPUs: faster, in less
                memory, at an error of about 1 % per layer. "int8-bfloat16": the same with bfloat16 for float32, the
                fastest on CPUs with AMX. A checkpoint saved in either loads with "int8" or None, as "int8".
            device: device of the networks; None: CUDA if available, else MPS, else CPU.
            variant: variant in the names of the weight files, such as "fp16".
            revision: branch, tag or commit of a hub id.
            subfolder: folder inside the path or repository that is the checkpoint.
            scheduler: a solver's name, "ddim", "dpm++", "euler", "euler-a" or "lcm"; or a scheduler, as the constructor
                takes, whose noise schedule stays (MV-Adapter shifts the checkpoint's); None: the checkpoint's.
            lora: LoRA file to merge; see `load_lora_weights`.
            lora_scale: weight of the LoRA.
            ip_adapter: IP-Adapter file, plain, Plus or full-face; see `load_ip_adapter`.
            ip_adapter_scale: weight of the IP-Adapter's attention.
            mv_adapter: MV-Adapter file (image to multi-view) to add to a stock folder of Stable Diffusion 2.1.
            torch_dtype: older name of `dtype`, with a FutureWarning.

        Returns:
            The pipeline.

        Raises:
            CheckpointError: a file is missing or damaged, or the components do not fit together.
            ValueError: an argument is out of range, or this machine does not support the dtype.
        """
        if torch_dtype is not None:
            if dtype is not None:
                raise ValueError("torch_dtype: expected None beside dtype, of which it is the older name")
            warnings.warn("torch_dtype is an older name: use dtype", FutureWarning, stacklevel=2)
            dtype = torch_dtype
        device = default_device() if device is None else usable_device(device)
        in_8_bits = False
        if isinstance(dtype, str) and dtype in IN_8_BITS:
            require_supported(device)
            in_8_bits, dtype = True, IN_8_BITS[dtype]
        dtype = _DTYPES.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
        if dtype is not None and dtype not in _DTYPES.values() and dtype is not torch.float64:
            raise ValueError(f"dtype: expected a torch.dtype, None or one of {[*_DTYPES, *IN_8_BITS]}, got {dtype!r}")
        if path_or_repo_id is None:
            if not (lora is ip_adapter is mv_adapter is variant is revision is subfolder is None):
                names = "lora, ip_adapter, mv_adapter, variant, revision, subfolder"
                raise ValueError(f"{names}: expected None for the built-in model")
            warnings.warn(NOTICE, CartoonWarning, stacklevel=2)
            folder, origin = MODEL, {"model": "built-in"}
        else:
            folder = checkpoint_folder(path_or_repo_id, revision=revision, variant=variant, subfolder=subfolder)
            origin = {"model": str(path_or_repo_id), "variant": variant, "revision": revision, "subfolder": subfolder}
        name = scheduler if isinstance(scheduler, str) else None
        options = {"dtype": dtype, "device": device, "variant": variant}
        try:
            parts = load_parts(folder, **options, scheduler=name, mv_adapter=mv_adapter)
        except CheckpointNotFoundError as error:
            advice = "" if path_or_repo_id is None else missing_file_advice(path_or_repo_id, folder)
            raise CheckpointNotFoundError(f"{error}{advice}") from None
        if scheduler is not None and name is None:
            parts["scheduler"] = scheduler
        try:
            pipeline = cls(**parts)
            pipeline.origin = origin if mv_adapter is None else {**origin, "mv_adapter": str(mv_adapter)}
            if ip_adapter is not None:
                pipeline.load_ip_adapter(ip_adapter, scale=ip_adapter_scale)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        if lora is not None:
            pipeline.load_lora_weights(lora, scale=lora_scale)
        if not family_of(pipeline.unet.config).looks_at_portrait(pipeline.unet.config):
            warnings.warn(f"{folder / 'unet'}: this U-Net does not look at the portrait", stacklevel=2)
        if in_8_bits and not is_quantized(pipeline.unet):
            quantize(pipeline.unet)
        return pipeline

    def describe(self) -> dict[str, Any]:
        """Return the parameters that every run of this pipeline has, for run.json."""
        return {
            **self.origin,
            "scheduler": dict(self.scheduler.config),
            "attention_backend": self.attention_backend,
            "device": str(self.device),
            "dtype": dtype_name(self.unet),
            "versions": versions(),
        }

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Set options of tqdm for the progress bars of all runs, such as disable=True or leave=False."""
        self._progress_bar_config = settings

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint folder that `from_pretrained` reads; `model_index.json` is written last."""
        self.maybe_free_model_hooks()
        save_parts(self.components, Path(folder))

    @property
    def components(self) -> dict[str, Any]:
        """Arguments of the constructor: `MultiViewDiffusionPipeline(**pipe.components)` shares all components."""
        names = ("unet", "vae", "scheduler", "image_encoder", "upsampler", "prompt_embeds", "guidance_scale")
        others = ("image_normalizer", "image_noising_scheduler", "head_detector", "head_fitter")
        return {name: getattr(self, name) for name in (*names, *others)}

    @property
    def _networks(self) -> list[torch.nn.Module]:
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def to(self: PipelineType, *args: Any, **kwargs: Any) -> PipelineType:
        """Move or convert all networks; the arguments are those of `torch.nn.Module.to`. A device ends offloading.

        Raises:
            ValueError: the weights are 8-bit integers, which support only the CPU and float32 activations.
        """
        check_move(self.unet, *args, **kwargs)
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if device is not None:
            self.remove_all_hooks()
        with self._without_offload():
            for network in self._networks:
                network.to(*args, **kwargs)
        return self

    def set_attention_backend(self, backend: str) -> None:
        """Set the backend of all attention and GEGLU layers: "auto", "kernel", "sdpa" or "reference".

        With "kernel" the autoencoder uses "auto", because its attention has a single head as wide as its channels, 512
        in Stable Diffusion, which no float32 kernel for GPUs supports.
        """
        check_backend(backend)
        self.attention_backend = backend
        for network in self._networks:
            set_attention_backend(network, "auto" if network is self.vae and backend == "kernel" else backend)
