"""Base class of the networks: configuration, loading and saving."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gafext import weights
from gafext.config import Config
from gafext.errors import CheckpointError
from gafext.models import int8
from gafext.weights.single_file import take_part

ModelType = TypeVar("ModelType", bound="PretrainedModel")


class _Skeleton(TorchFunctionMode):
    """Skip initial values, which the stored weights replace, and limit the tensors that a constructor creates.

    Drawing normal numbers on the meta device imports PyTorch's compiler, for 1.2 seconds. A damaged configuration would
    create tensors for hours. The limit is well above the number of stored ones, so that a configuration that merely
    does not match the weights is reported with all its keys.
    """

    _SKIPPED = (
        *(getattr(nn.init, name) for name in ("normal_", "uniform_", "kaiming_uniform_")),
        *(Tensor.normal_, Tensor.uniform_),
    )

    def __init__(self, stored: int):
        super().__init__()
        self.stored, self.left = stored, 4 * stored + 4096

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        self.left -= func is torch.empty
        if self.left < 0:
            raise ValueError(f"asks for far more than the {self.stored} tensors of the weights")
        return func(*args, **kwargs)


def convolution_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Return the memory format of a convolution's weights, which determines that of its results.

    cuDNN's half-precision kernels, the transformers and gafext's GroupNorm work on channels-last memory.
    """
    on_tensor_cores = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return torch.channels_last if on_tensor_cores else torch.contiguous_format


class PretrainedModel(nn.Module):
    """A network that loads from and saves to one folder of a diffusers or transformers checkpoint."""

    config_class: ClassVar[type[Config]]
    weights_stem: ClassVar[str] = "diffusion_pytorch_model"
    key_rule: ClassVar[weights.KeyRule] = staticmethod(weights.same_key)
    channels_last: ClassVar[bool] = False  # convolutions take `convolution_format`

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self._compute_device: torch.device | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device that the network computes on, also while its weights rest elsewhere."""
        return self._compute_device or next(self.parameters()).device

    def compute_on(self, device: torch.device | None) -> None:
        """Set `device`, for weights that are moved there when they are used; None: where the weights are."""
        self._compute_device = device
        self._arrange_weights()

    def _apply(self, fn, recurse: bool = True):
        """Apply `fn` to all tensors, as `to`, `cuda` and `half` do, and restore the memory format."""
        super()._apply(fn, recurse)
        self._arrange_weights()
        return self

    def _arrange_weights(self) -> None:
        if not self.channels_last:
            return
        for parameter in self.parameters():
            if parameter.ndim == 4 and not parameter.is_meta:
                parameter.data = parameter.data.contiguous(memory_format=convolution_format(self.device, self.dtype))

    @classmethod
    def read_config(cls, folder: Path, file: weights.WeightFile) -> Config:
        """Read the configuration in `config.json`; a network may complete it from the names in the weight file."""
        path = folder / "config.json"
        return cls.config_class.from_dict(weights.read_json(path), source=str(path))

    @classmethod
    def from_pretrained(
        cls: type[ModelType],
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
    ) -> ModelType:
        """Load `config.json` and the safetensors of one network, memory-mapped.

        Args:
            folder: a diffusers or transformers folder, such as `checkpoint/vae`.
            dtype: of the weights; None is float32, and what was saved in 8-bit integers stays so.
            device: of the weights; None is the CPU.
            variant: "fp16" reads `<stem>.fp16.safetensors`, or the shards of that variant's index.

        Returns:
            The network, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or damaged, a value is NaN, or names or shapes do not match the
                configuration (lists all that do not).
            ValueError: the weights are 8-bit integers, and `dtype` is not None or this machine does not support them.
        """
        folder = Path(folder)
        path = weights.find_weights(folder, cls.weights_stem, variant)
        file = weights.WeightFile(path)
        file.rename(weights.unwrapped_rule(file))
        file.rename(cls.key_rule)
        config = cls.read_config(folder, file)
        return cls._load(config, file, source=folder / "config.json", dtype=dtype, device=device)

    @classmethod
    def from_single_file(
        cls: type[ModelType],
        path: str | Path,
        *,
        config: Config | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelType:
        """Load one network out of a single-file checkpoint of Stable Diffusion, with latent diffusion's key names.

        Args:
            path: a safetensors file; tensors of other networks in it are ignored.
            config: None deduces it from the shapes, which is correct for Stable Diffusion 2.
            dtype: of the weights; None is float32.
            device: of the weights; None is the CPU.

        Returns:
            The network, in evaluation mode.

        Raises:
            CheckpointError: the file is a pickle, is missing or damaged, does not contain the network, or names or
                shapes do not match (lists all that do not).
        """
        path = Path(path)
        weights.require_safetensors(path)
        file = weights.WeightFile(path)
        file.rename(weights.unwrapped_rule(file))
        config = take_part(file, cls.config_class, config)
        return cls._load(config, file, source=path, dtype=dtype, device=device)

    @classmethod
    def _load(
        cls: type[ModelType],
        config: Config,
        file: weights.WeightFile,
        *,
        source: Path,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> ModelType:
        try:
            with torch.device("meta"), _Skeleton(len(file.shapes)):
                model = cls(config)
        except (ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(f"{source}: cannot build {cls.__name__} ({error})") from None
        int8.replace_stored(model, file, dtype=dtype, device=torch.device(device or "cpu"))
        weights.load_into(model, file, dtype=dtype, device=device)
        model._arrange_weights()
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and one safetensors file under the library's own key names.

        A layer in 8-bit integers is stored as it is, with its scales; only gafext reads such a file.
        """
        config = self.config.to_dict() | (int8.QUANTIZATION if int8.is_quantized(self) else {})
        weights.save_weights(self, config, Path(folder), self.weights_stem)
