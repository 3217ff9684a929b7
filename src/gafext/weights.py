"""Checkpoint files: JSON configurations and safetensors, and the only place that knows foreign key names."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gafext.errors import CheckpointError, CheckpointNotFoundError, OutputError

KeyRule = Callable[[str], "str | None"]
"""Maps a key of a file to the key of our module, or to None when the tensor is not needed."""


def same_key(key: str) -> str | None:
    return key


_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_key(key: str) -> str | None:
    """AutoencoderKL files before diffusers 0.18 call the mid block's projections query, key, value, proj_attn."""
    match = re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    return f"{match[1]}.{_OLD_VAE_ATTENTION[match[2]]}.{match[3]}" if match else key


def clip_vision_key(key: str) -> str | None:
    """A full CLIPModel file carries the text tower too; `position_ids` is a constant that older files store."""
    if key.startswith(("text_model.", "text_projection.")) or key == "logit_scale":
        return None
    return None if key.endswith("position_ids") else key


def read_json(path: Path) -> dict:
    """Read a JSON object; errors name the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Path:
    """The safetensors file of one network: `<stem>.safetensors` or `<stem>.<variant>.safetensors`."""
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: no such folder")
    path = folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
    if path.is_file():
        return path
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: has {', '.join(pickles)} but no {path.name}. Pickled weights can run code when they are "
            'opened, so gafext does not read them. Convert once: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{pickles[0]}', weights_only=True), '{path.name}')\""
        )
    present = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "none"
    raise CheckpointNotFoundError(f"{path}: no such file (safetensors files there: {present})")


class WeightFile:
    """An open safetensors file whose keys have been mapped to our modules' names.

    Shapes and names come from the header alone, so that everything can be checked before a tensor is read.
    """

    def __init__(self, path: Path, rule: KeyRule = same_key):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            names = list(self._file.keys())
            self.shapes: dict[str, tuple[int, ...]] = {}
            self._stored: dict[str, str] = {}
            for name in names:
                key = rule(name)
                if key is None:
                    continue
                if key in self._stored:
                    raise CheckpointError(f"{path}: {self._stored[key]} and {name} are both {key}")
                self._stored[key] = name
                self.shapes[key] = tuple(self._file.get_slice(name).get_shape())
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor; NaN and infinity are errors."""
        try:
            tensor = self._file.get_tensor(self._stored[key])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: cannot read {self._stored[key]} ({error})") from None
        # One sum is far cheaper than isfinite(): the exact test runs only when the sum itself overflowed.
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise CheckpointError(f"{self.path}: {self._stored[key]} has {bad} NaN or infinite values")
        return tensor


def _listing(title: str, lines: list[str]) -> str:
    return f"\n  {title} ({len(lines)}):\n    " + "\n    ".join(sorted(lines)) if lines else ""


def check_keys(file: WeightFile, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise one CheckpointError that lists every missing key, every unknown key and every wrong shape."""
    missing = [key for key in expected if key not in file.shapes]
    unknown = [key for key in file.shapes if key not in expected]
    shapes = [
        f"{key}: expected {list(shape)}, got {list(file.shapes[key])}"
        for key, shape in expected.items()
        if key in file.shapes and file.shapes[key] != shape
    ]
    if missing or unknown or shapes:
        raise CheckpointError(
            f"{file.path}: the weights do not fit the configuration"
            + _listing("missing keys", missing)
            + _listing("unknown keys", unknown)
            + _listing("wrong shapes", shapes)
        )


def load_into(
    module: torch.nn.Module, file: WeightFile, *, dtype: torch.dtype | None, device: torch.device | str | None
) -> None:
    """Fill a module that was built on the meta device; nothing is read before every name and shape fits."""
    check_keys(file, {name: tuple(value.shape) for name, value in module.state_dict().items()})
    tensors = {key: file.tensor(key).to(device=device or "cpu", dtype=dtype or torch.float32) for key in file}
    module.load_state_dict(tensors, assign=True)


@contextmanager
def replace_whole(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` whose files move into it only when the block ends without an error."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=target))
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from None
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_weights(module: torch.nn.Module, config: dict, folder: Path, stem: str) -> None:
    """Write `config.json` and `<stem>.safetensors`, both or neither."""
    with replace_whole(folder) as temporary:
        write_json(temporary / "config.json", config)
        tensors = {key: value.detach().contiguous().cpu() for key, value in module.state_dict().items()}
        save_file(tensors, temporary / f"{stem}.safetensors", metadata={"format": "pt"})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
