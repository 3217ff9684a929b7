"""Training data in WebDataset shards: tar files of one head per sample, read one after another from a disk or a URL.

A sample KEY is `KEY.json`, a transforms.json of one head, and the files that it names: `KEY.000.png` is its `000.png`,
and `KEY.000.normal.png` the normal map of that picture. `heads.json` beside the shards lists the samples.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gafext.atomic import replace_whole, whole_folder
from gafext.training.checks import least_views
from gafext.training.data import read_heads, subject_of
from gafext.training.head import Head

INDEX = "heads.json"
_NORMAL = ".normal"
Sample = dict[str, Any]  # what webdataset yields: bytes by extension, and "__key__"


@dataclass(frozen=True)
class Packed:
    """A head in a shard: its line of `heads.json`.

    Attributes:
        name: key of the sample.
        subject: whose head it is.
        views: number of its pictures.
        shard: name of the tar file.
        digest: digest of its files.
    """

    name: str
    subject: str
    views: int
    shard: str
    digest: str

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "digest": self.digest}

    def files(self) -> list[Path]:
        return []


def write_shards(heads: Sequence[Head], folder: Path, *, megabytes: float) -> list[Packed]:
    """Write heads into shards `heads-000000.tar` and on, with their index.

    Args:
        heads: heads of `read_heads`.
        folder: a new or empty folder.
        megabytes: size that a shard does not exceed, but by its last head.

    Returns:
        The samples.
    """
    webdataset = _webdataset()
    with whole_folder(folder) as new:
        pattern = str(new).replace("%", "%%") + "/heads-%06d.tar"
        with webdataset.ShardWriter(pattern, maxsize=megabytes * 1e6, verbose=0, encoder=False, mtime=0) as writer:
            for head in heads:
                writer.write(_sample(head))
        return write_index(new)


def write_index(folder: Path) -> list[Packed]:
    """Read all shards of a folder, and write `heads.json`.

    Raises:
        ValueError: a sample has no transforms.json, or one name is there twice.
    """
    found: dict[str, Packed] = {}
    for path in sorted(folder.glob("*.tar")):
        for sample in _samples(str(path)):
            packed = _describe(sample, path.name)
            if packed.name in found:
                raise ValueError(f"{path}: expected samples of different names, got {packed.name} twice")
            found[packed.name] = packed
    text = json.dumps([asdict(packed) for packed in found.values()], indent=1) + "\n"
    with replace_whole(folder) as new:
        (new / INDEX).write_text(text, encoding="utf-8")
    return list(found.values())


class Shards:
    """Shards that have an index.

    Args:
        base: folder or URL; its shards are read by webdataset.

    Raises:
        ValueError: there is no index, or it cannot be read.
    """

    def __init__(self, base: str | Path):
        self.base = str(base).rstrip("/")
        try:
            with _webdataset().gopen(self._at(INDEX)) as file:
                self.heads = [Packed(**line) for line in json.loads(file.read())]
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self._at(INDEX)}: expected the index of the shards, which gafext train --check writes, got "
                f"none that can be read ({error})"
            ) from None

    @staticmethod
    def are_at(data: str | Path) -> bool:
        """Return whether training data is shards: a URL, or a folder with tar files."""
        return "://" in str(data) or any(Path(data).glob("*.tar"))

    def read_heads(self, *, views: int) -> tuple[list[Packed], list[str]]:
        """Return the heads in their order, and one sentence for each that has fewer views than a step takes."""
        return self.heads, [fault for head in self.heads if (fault := least_views(head.name, head.views, views))]

    def open(self, heads: Sequence[Packed], indices: Sequence[int]) -> Iterator[tuple[int, Head]]:
        """Yield some of `heads`, whose files are there until the next one is asked for, in the order of the shards."""
        wanted = {heads[index]: index for index in indices}
        for shard in dict.fromkeys(packed.shard for packed in self.heads if packed in wanted):
            for sample in _samples(self._at(shard)):
                packed = _describe(sample, shard)
                if packed in wanted:
                    with tempfile.TemporaryDirectory(prefix="gafext-") as folder:
                        yield wanted.pop(packed), self._head(sample, packed, Path(folder))
        if wanted:
            name = next(iter(wanted)).name
            raise ValueError(f"{self.base}: expected {name} as heads.json lists it, got another or none; run --check")

    def extract(self, heads: Sequence[Packed], folder: Path) -> list[Head]:
        """Write the files of some heads into a folder, and return them in their order."""
        extracted = {}
        for index, head in self.open(heads, range(len(heads))):
            place = folder / f"{index:03d}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(head.pictures[0].parent, place)
            extracted[index] = self._read(place, heads[index])[0][0]
        return [extracted[index] for index in range(len(heads))]

    def check(self, *, views: int) -> tuple[list[Head], list[str]]:
        """Read every sample, and list what is wrong, as `data.read_heads` does if it is thorough."""
        heads, faults = [], []
        for shard in dict.fromkeys(packed.shard for packed in self.heads):
            for sample in _samples(self._at(shard)):
                packed = _describe(sample, shard)
                with tempfile.TemporaryDirectory(prefix="gafext-") as folder:
                    _unpack(sample, Path(folder))
                    found, wrong = self._read(Path(folder), packed, views=views, thorough=True)
                    heads += found
                    faults += [f"{shard}: {fault}" for fault in wrong]
        return heads, faults

    def _at(self, name: str) -> str:
        return f"{self.base}/{name}"

    def _head(self, sample: Sample, packed: Packed, folder: Path) -> Head:
        _unpack(sample, folder)
        found, faults = self._read(folder, packed)
        if faults or len(found) != 1:
            why = faults[0] if faults else f"{len(found)} heads"
            raise ValueError(f"{self._at(packed.shard)}: {packed.name}: expected one head, got {why}")
        return found[0]

    @staticmethod
    def _read(folder: Path, packed: Packed, **options: Any) -> tuple[list[Head], list[str]]:
        heads, faults = read_heads(folder, **options)
        for head in heads:
            head.name, head.subject = packed.name, packed.subject
        return heads, [fault.replace(str(folder), packed.name).replace(folder.name, packed.name) for fault in faults]


def _webdataset() -> Any:
    if importlib.util.find_spec("webdataset") is None:
        raise ValueError("shards: expected webdataset, which is not installed: pip install gafext[shards]")
    return importlib.import_module("webdataset")


def _samples(url: str) -> Iterator[Sample]:
    webdataset = _webdataset()
    try:
        # Not WebDataset(): in a run of several processes it wants to divide the shards itself.
        yield from webdataset.DataPipeline(webdataset.SimpleShardList([url]), webdataset.tarfile_to_samples())
    except Exception as error:  # of the tar file, the disk, or the program that reads a URL
        raise ValueError(f"{url}: expected a shard, got one that cannot be read ({error})") from None


def _describe(sample: Sample, shard: str) -> Packed:
    key = sample["__key__"]
    try:
        values = json.loads(sample["json"])
        views, subject = len(values["frames"]), values.get("subject")
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{shard}: {key}: expected a transforms.json {key}.json, got none that can be read") from None
    digest = hashlib.sha256()
    for name in sorted(name for name in sample if not name.startswith("__")):
        digest.update(f"{name} {len(sample[name])} ".encode())
        digest.update(sample[name])
    named = subject if isinstance(subject, str) else subject_of(key.rpartition("/")[0] or key)
    return Packed(key, named, views, shard, digest.hexdigest()[:16])


def _unpack(sample: Sample, folder: Path) -> None:
    """Write a sample as a folder that `read_heads` reads."""
    for name, content in sample.items():
        if name.startswith(("__", ".")):
            continue
        stem, _, extension = name.rpartition(".")
        path = folder / ("transforms.json" if name == "json" else name)
        if stem.endswith(_NORMAL):
            path = folder / "normals" / f"{stem.removesuffix(_NORMAL)}.{extension}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


def _sample(head: Head) -> Sample:
    """Make the sample of a head, with its files as they are."""
    sample: Sample = {"__key__": head.name.replace(".", "_")}
    frames = []
    for view, (picture, mask) in enumerate(zip(head.pictures, head.masks, strict=True)):
        width, height = head.sizes[view] or _size(picture)
        side, lens = max(width, height), head.intrinsics[view].double()
        frame = {"file_path": f"{view:03d}{picture.suffix.lower()}", "w": width, "h": height}
        frame |= {"fx": lens[0, 0].item() * side, "fy": lens[1, 1].item() * side, "w2c": head.w2c[view].tolist()}
        frame["cx"] = lens[0, 2].item() * side - (side - width) / 2
        frame["cy"] = lens[1, 2].item() * side - (side - height) / 2
        sample[frame["file_path"]] = picture.read_bytes()
        if mask is not None:
            frame["mask_path"] = f"{view:03d}.mask{mask.suffix.lower()}"
            sample[frame["mask_path"]] = mask.read_bytes()
        if head.normals:
            normal = head.normals[view]
            sample[f"{view:03d}{_NORMAL}{normal.suffix.lower()}"] = normal.read_bytes()
        frames.append(frame)
    sample["json"] = json.dumps({"subject": head.subject, "frames": frames}).encode()
    return sample
