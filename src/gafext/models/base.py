"""What every network has: a configuration, a folder to come from and a folder to go to."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import nn

from gafext import weights
from gafext.config import Config

ModelType = TypeVar("ModelType", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A network that loads from and saves to one folder of a diffusers or transformers checkpoint."""

    config_class: ClassVar[type[Config]]
    weights_stem: ClassVar[str] = "diffusion_pytorch_model"
    key_rule: ClassVar[weights.KeyRule] = staticmethod(weights.same_key)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def read_config(cls, folder: Path, file: weights.WeightFile) -> Config:
        """The configuration in `config.json`; a network may complete it from the names in the weight file."""
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
        """Load `config.json` and the safetensors file of one network.

        Args:
            folder: a diffusers or transformers folder, such as `checkpoint/vae`.
            dtype: of the weights; None is float32.
            device: of the weights; None is the CPU.
            variant: "fp16" reads `<stem>.fp16.safetensors`.

        Returns:
            The network, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or damaged, a value is NaN, or names and shapes do not fit the
                configuration; all of them are listed.
        """
        folder = Path(folder)
        path = weights.find_weights(folder, cls.weights_stem, variant)
        file = weights.WeightFile(path, cls.key_rule)
        config = cls.read_config(folder, file)
        with torch.device("meta"):
            model = cls(config)
        weights.load_into(model, file, dtype=dtype, device=device)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and one safetensors file, both or neither, under the library's own key names."""
        weights.save_weights(self, self.config.to_dict(), Path(folder), self.weights_stem)
