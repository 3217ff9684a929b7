"""Reading and writing of safetensors: single files, sharded files, and parts of larger files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gafext.atomic import replace_whole
from gafext.errors import CheckpointError, CheckpointNotFoundError, OutputError
from gafext.weights.files import MAX_KEY, read_json, require_content, write_json
from gafext.weights.keys import KeyRule, same_key

_FLOATS = ("F64", "F32", "F16", "BF16")
_SHARD_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")


class _Stored(NamedTuple):
    """Location of a tensor: its shard, the open file, its name there, and its rows if several keys share it."""

    shard: Path
    file: Any
    name: str
    rows: slice | None = None


def _split(stored: _Stored, shape: tuple[int, ...], count: int) -> list[tuple[_Stored, tuple[int, ...]]]:
    """Split the rows of a stored tensor evenly into `count` tensors; return their locations and shapes."""
    if count <= 1:
        return [(stored, shape)] * count
    if not shape or shape[0] % count:
        raise CheckpointError(f"{stored.shard}: {stored.name}: expected {count} tensors in one, got {list(shape)}")
    rows = shape[0] // count
    return [(stored._replace(rows=slice(i * rows, (i + 1) * rows)), (rows, *shape[1:])) for i in range(count)]


class WeightFile:
    """Open safetensors file, or the shards of an index, with keys mapped to the names of our modules.

    Names and shapes are read from the headers, so that everything is validated before any tensor is read. Tensors are
    copy-on-write views of the memory-mapped file.

    Args:
        path: a safetensors file, or the JSON index of a sharded one.
        rule: mapping of the keys.

    Raises:
        CheckpointError: a file is missing or damaged, or two keys map to the same name.
    """

    def __init__(self, path: Path, rule: KeyRule = same_key):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, str] = {}
        self._stored: dict[str, _Stored] = {}
        if path.suffix == ".json":
            self._open_shards(path)
        else:
            self._open(path)
        self.rename(rule)

    def _open(self, path: Path) -> None:
        try:
            require_content(path)
            file = safe_open(path, framework="pt", device="cpu")
            self.metadata.update(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 (the file is no dict)
                if name in self._stored:
                    raise CheckpointError(f"{path}: {name} is in {self._stored[name].shard.name} too")
                self._stored[name] = _Stored(path, file, name)
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({str(error)[:MAX_KEY]})") from None

    def _open_shards(self, path: Path) -> None:
        """Open every file of an index; the index must list exactly the tensors of these files."""
        places = read_json(path).get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(name, str) and _SHARD_NAME.fullmatch(name) for name in places.values()
        ):
            raise CheckpointError(
                f"{path}: weight_map: expected names of tensors, each with a .safetensors file's name"
            )
        for name in sorted(set(places.values())):
            if not (path.parent / name).is_file():
                raise CheckpointNotFoundError(f"{path.parent / name}: no such file, but {path.name} names it")
            self._open(path.parent / name)
        found = {name: stored.shard.name for name, stored in self._stored.items()}
        wrong = sorted(name for name in found.keys() | places.keys() if found.get(name) != places.get(name))
        if wrong:
            raise CheckpointError(
                f"{path}: does not tell where the tensors are"
                + listing("misplaced", [f"{name}: {places.get(name)}, found in {found.get(name)}" for name in wrong])
            )

    def rename(self, rule: KeyRule) -> None:
        """Map the keys, again if the layout is known only from the configuration."""
        before, shapes = self._stored, self.shapes
        self._stored, self.shapes = {}, {}
        for name, stored in before.items():
            keys = rule(name)
            keys = () if keys is None else (keys,) if isinstance(keys, str) else keys
            for key, (place, shape) in zip(keys, _split(stored, shapes[name], len(keys)), strict=True):
                if key in self._stored:
                    raise CheckpointError(f"{self.path}: {self._stored[key].name} and {stored.name} are both {key}")
                self._stored[key], self.shapes[key] = place, shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    @property
    def files(self) -> list[Path]:
        """The safetensors files that hold the tensors."""
        return sorted({stored.shard for stored in self._stored.values()})

    def count(self) -> dict[str, int]:
        """Count the parameters of each stored type, such as {"F16": 865910724}, from the headers alone."""
        counts: dict[str, int] = {}
        for key in self:
            counts[self.kind(key)] = counts.get(self.kind(key), 0) + math.prod(self.shapes[key])
        return counts

    def kind(self, key: str) -> str:
        """Return the stored type of a tensor, such as "F16", from the header."""
        stored = self._stored[key]
        return stored.file.get_slice(stored.name).get_dtype()

    def tensor(self, key: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor in its stored dtype.

        Args:
            key: name after mapping.
            dtype: dtype that the caller will convert to, for the range check; torch.int8 expects that in the file.

        Raises:
            CheckpointError: the tensor is not floating-point, or has NaN, infinite values or values out of range.
        """
        stored, whole = self._stored[key], dtype == torch.int8
        tensor = self._read(stored, ("I8",) if whole else _FLOATS)
        low, high = (value.item() for value in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)  # without a copy
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(f"{stored.shard}: {stored.name} has {bad} NaN or infinite values")
        if dtype is not None and max(-low, high) > (torch.iinfo if whole else torch.finfo)(dtype).max:
            raise CheckpointError(f"{stored.shard}: {stored.name} has values up to {max(-low, high):g}, over {dtype}'s")
        return tensor

    def number(self, key: str) -> float:
        """Read a tensor of one finite number, floating-point or integer."""
        stored = self._stored[key]
        tensor = self._read(stored, (*_FLOATS, "I64", "I32"))
        if tensor.numel() != 1 or not math.isfinite(tensor.item()):
            raise CheckpointError(
                f"{stored.shard}: {stored.name}: expected one number, got {tensor.flatten()[:9].tolist()}"
            )
        return float(tensor.item())

    @staticmethod
    def _read(stored: _Stored, types: tuple[str, ...]) -> torch.Tensor:
        try:
            kind = stored.file.get_slice(stored.name).get_dtype()
            if kind not in types:
                raise CheckpointError(f"{stored.shard}: {stored.name}: expected one of the types {types}, got {kind}")
            tensor = stored.file.get_tensor(stored.name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{stored.shard}: cannot read {stored.name} ({error})") from None
        return tensor if stored.rows is None else tensor[stored.rows]


def listing(title: str, lines: list[str]) -> str:
    """Format a section of an error message, with long lines shortened; "" without lines."""
    short = [line if len(line) < 500 else f"{line[:240]}...{line[-240:]}" for line in sorted(lines)]
    return f"\n  {title} ({len(lines)}):\n    " + "\n    ".join(short) if lines else ""


def _is_shape(got: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return True if the shapes agree; old autoencoders store linear layers as 1×1 convolutions."""
    return got == expected or (len(expected) == 2 and got[:2] == expected and set(got[2:]) == {1})


def check_keys(file: WeightFile, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise a CheckpointError that lists all missing keys, unknown keys and wrong shapes, if any."""
    missing = [key for key in expected if key not in file.shapes]
    unknown = [key for key in file.shapes if key not in expected]
    shapes = [
        f"{key}: expected {list(shape)}, got {list(file.shapes[key])}"
        for key, shape in expected.items()
        if key in file.shapes and not _is_shape(file.shapes[key], shape)
    ]
    if missing or unknown or shapes:
        raise CheckpointError(
            f"{file.path}: the weights do not fit the configuration"
            + listing("missing keys", missing)
            + listing("unknown keys", unknown)
            + listing("wrong shapes", shapes)
        )


def load_into(
    module: torch.nn.Module, file: WeightFile, *, dtype: torch.dtype | None, device: torch.device | str | None
) -> None:
    """Load weights into a module on the meta device, after all names and shapes have been validated.

    A parameter on the CPU with the file's dtype is a copy-on-write view of the memory-mapped file.

    Args:
        module: a module on the meta device.
        file: weights with the module's names.
        dtype: dtype of the parameters; None: float32. 8-bit integers stay so.
        device: device of the parameters; None: CPU; "meta": names and shapes are checked, and no value is read.

    Raises:
        CheckpointError: names, shapes or values do not fit.
    """
    blank = module.state_dict()
    check_keys(file, {name: tuple(value.shape) for name, value in blank.items()})
    dtype = dtype or torch.float32
    if device is not None and torch.device(device).type == "meta":
        module.to(dtype)
        return

    def read(key: str) -> torch.Tensor:
        own = torch.int8 if blank[key].dtype == torch.int8 else dtype
        return file.tensor(key, dtype=own).view(blank[key].shape).to(device=device or "cpu", dtype=own)

    tensors = {key: read(key) for key in file}
    module.load_state_dict(tensors, assign=True)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, whose tensors may be on any device.

    Raises:
        OutputError: the file cannot be written, as on a full disk.
    """
    try:
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{path}: cannot be written ({error})") from None


def save_weights(module: torch.nn.Module, config: dict, folder: Path, stem: str) -> None:
    """Write `config.json` and `<stem>.safetensors` atomically, and remove an older index and its shards."""
    with replace_whole(folder) as temporary:
        write_json(temporary / "config.json", config)
        save_tensors(module.state_dict(), temporary / f"{stem}.safetensors")
    remove_shards(folder, stem)


def remove_shards(folder: Path, stem: str) -> None:
    """Remove the index and the shards beside `<stem>.safetensors`, which are older."""
    stale = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)")
    for path in folder.iterdir():
        if stale.fullmatch(path.name):  # readers such as diffusers prefer it to the file just written
            path.unlink()
