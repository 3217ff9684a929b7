"""Training data in WebDataset shards: tar files of one head per sample, read one after another from a disk or a URL.

A sample KEY is `KEY.json`, a transforms.json of one head, and the files that it names: `KEY.000.png` is its `000.png`,
`KEY.000.normal.png` the normal map of that picture, and `KEY.mesh.obj` the head's mesh. `heads.json` beside the shards
lists the samples.
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

    Raises:
        ValueError: the folder has files, or heads have names that a shard cannot keep apart.
    """
    webdataset = _webdataset()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder for the shards, got another")
    names: dict[str, str] = {}
    for head in heads:
        key = _key(head)
        if not key or key.startswith("__"):
            raise ValueError(f"expected names that shards keep, got {head.name!r}: empty, or with __ before it")
        if key in names:
            raise ValueError(f"{head.name}: expected a name of its own in the shards, got {key}, as of {names[key]}")
        names[key] = head.name
    with whole_folder(folder) as new:
        pattern = str(new).replace("%", "%%") + "/heads-%06d.tar"
        with webdataset.ShardWriter(pattern, maxsize=megabytes * 1e6, verbose=0, encoder=False, mtime=0) as writer:
            for head in heads:
                writer.write(_sample(head))
        return index_shards(new)


def index_shards(folder: Path) -> list[Packed]:
    """Read all shards of a folder, and write `heads.json`.

    Raises:
        ValueError: a sample has no transforms.json, one name is there twice, or there are no samples.
    """
    found: dict[str, Packed] = {}
    for path in sorted(folder.glob("*.tar")):
        for sample in _samples(str(path.absolute())):
            packed = _describe(sample, path.name)
            if packed.name in found:
                raise ValueError(f"{path}: expected samples of different names, got {packed.name} twice")
            found[packed.name] = packed
    if not found:
        raise ValueError(f"{folder}: expected heads in its shards, got none")
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
        # Absolute, for webdataset takes what stands before a colon for the scheme of a URL.
        self.base, webdataset = (
            str(base).rstrip("/") if "://" in str(base) else str(Path(base).absolute()),
            _webdataset(),
        )
        try:
            with webdataset.gopen(self._at(INDEX)) as file:
                self.heads = [Packed(**line) for line in json.loads(file.read())]
        except Exception as error:  # of the file, or of what reads URLs
            raise ValueError(
                f"{self._at(INDEX)}: expected the index of the shards, got none that can be read "
                f"({_reason(error)}); gafext train --check writes it into the folder that has them"
            ) from None

    @staticmethod
    def are_at(data: str | Path) -> bool:
        """Return whether training data is shards: a URL, or a folder with an index, or with tar files and no heads."""
        if "://" in str(data) or (Path(data) / INDEX).is_file():
            return True
        return any(Path(data).glob("*.tar")) and not any(Path(data).rglob("transforms*.json"))

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
        heads, faults, left = [], [], dict.fromkeys(self.heads)
        for shard in dict.fromkeys(packed.shard for packed in self.heads):
            try:
                for sample in _samples(self._at(shard)):
                    packed = _describe(sample, shard)
                    if packed not in left:
                        faults.append(f"{shard}: {packed.name}: expected what {INDEX} lists, got another head")
                        continue
                    del left[packed]
                    with tempfile.TemporaryDirectory(prefix="gafext-") as folder:
                        _unpack(sample, Path(folder))
                        found, wrong = self._read(Path(folder), packed, views=views, thorough=True)
                        heads += found
                        faults += [f"{shard}: {fault}" for fault in wrong]
            except ValueError as error:
                faults.append(str(error))
        faults += [f"{packed.shard}: {packed.name}: expected it as {INDEX} lists it, got none" for packed in left]
        return heads, faults

    def _at(self, name: str) -> str:
        return f"{self.base}/{name}"

    def _head(self, sample: Sample, packed: Packed, folder: Path) -> Head:
        _unpack(sample, folder)
        found, faults = self._read(folder, packed)
        if faults:
            raise ValueError(f"{self._at(packed.shard)}: {faults[0]} (gafext train --check lists all faults)")
        return found[0]

    @staticmethod
    def _read(folder: Path, packed: Packed, **options: Any) -> tuple[list[Head], list[str]]:
        heads, faults = read_heads(folder, **options)
        if not faults and len(heads) != 1:
            heads, faults = [], [f"{packed.name}: expected one moment of one head, got {len(heads)}"]
        for head in heads:
            head.name, head.subject = packed.name, packed.subject
        return heads, [fault.replace(str(folder), packed.name).replace(folder.name, packed.name) for fault in faults]


def _webdataset() -> Any:
    if importlib.util.find_spec("webdataset") is None:
        raise ValueError("shards: expected webdataset, which is not installed: pip install gafext[shards]")
    return importlib.import_module("webdataset")


def _reason(error: Exception) -> str:
    """Return what an error says, without what webdataset appends to it."""
    said = str(error.args[0]) if error.args else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _samples(url: str) -> Iterator[Sample]:
    webdataset = _webdataset()
    try:
        # Not WebDataset(): in a run of several processes it wants to divide the shards itself.
        yield from webdataset.DataPipeline(webdataset.SimpleShardList([url]), webdataset.tarfile_to_samples())
    except Exception as error:  # of the tar file, the disk, or the program that reads a URL
        raise ValueError(f"{url}: expected a shard, got one that cannot be read ({_reason(error)})") from None


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
        if name == "json":
            content = _with_small_letters(content)
        stem, _, extension = name.rpartition(".")
        path = folder / ("transforms.json" if name == "json" else name)
        if stem.endswith(_NORMAL):
            path = folder / "normals" / f"{stem.removesuffix(_NORMAL)}.{extension}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _with_small_letters(transforms: bytes) -> bytes:
    """Write the names of files in a transforms.json as webdataset writes those of entries: in small letters."""
    values = json.loads(transforms)
    for frame in values["frames"]:
        for name in ("file_path", "mask_path", "fg_mask_path"):
            if isinstance(frame, dict) and isinstance(frame.get(name), str):
                frame[name] = frame[name].lower()
    return json.dumps(values).encode()


def _key(head: Head) -> str:
    return head.name.replace(".", "_")  # a key ends at the first dot


def _size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


def _sample(head: Head) -> Sample:
    """Make the sample of a head, with its files as they are."""
    sample: Sample = {"__key__": _key(head)}
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
    if head.mesh is not None:
        sample[f"mesh{head.mesh.suffix.lower()}"] = head.mesh.read_bytes()
    sample["json"] = json.dumps({"subject": head.subject, "frames": frames}).encode()
    return sample
