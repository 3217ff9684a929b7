"""`gafext train`: a run on folders of heads, from the data and the parent to the folder that it leaves."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path
from typing import Any

from gafext.atomic import check_writable
from gafext.conditions import latent_size
from gafext.errors import CheckpointError
from gafext.families import family_name, family_of
from gafext.guidance import check_guidance_scale
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.training.batches import Sampling
from gafext.training.checks import unframed
from gafext.training.data import Files, hold_out
from gafext.training.head import Head
from gafext.training.latents import cache_key, encode_heads
from gafext.training.run import fit, start
from gafext.training.settings import Settings
from gafext.training.shards import Shards
from gafext.training.source import Folders
from gafext.training.validation import MODEL_FILES

SAMPLING, SETTINGS = Sampling(), Settings()


def check_parent(pipeline: MultiViewDiffusionPipeline, which: str) -> None:
    """Raise an error unless the parent can be trained.

    Args:
        pipeline: the parent.
        which: weights to train, as `Settings.train`.

    Raises:
        CheckpointError: it neither has what `gafext assemble` adds to single-view parents nor is ImageDream's.
        ValueError: there are no new layers to train.
    """
    config = pipeline.unet.config
    if family_of(config).has_reference_frame(config):
        if which == "new":
            raise ValueError("train: expected lora or all for ImageDream's checkpoint, without new layers, got new")
        return
    attends = all(
        block.attn_ip is not None and block.attn_cv is not None for block in pipeline.unet.transformer_blocks()
    )
    if not attends or config.pose_dim is None or not pipeline.takes_normals:
        raise CheckpointError(
            "parent: expected ImageDream's checkpoint, or one of single-view parents that gafext assemble wrote, got "
            f"another ({family_name(config)}); run it first; MV-Adapter, FaceLift and MVDream are not trainable"
        )


def share_of(heads: int, process: int, processes: int) -> slice:
    """Return the heads that a process encodes: neighbours, which are in the same shards."""
    block = -(-heads // processes)
    return slice(process * block, (process + 1) * block)


def train(
    data: str | Path,
    parent: str | Path,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    sampling: Sampling = SAMPLING,
    settings: Settings = SETTINGS,
) -> dict[str, float]:
    """Train a checkpoint of `gafext assemble` or ImageDream's; a run whose `out` has a checkpoint resumes there.

    Args:
        data: folder of heads, as for `read_heads`; or of shards, as `write_shards` makes them, or its URL.
        parent: checkpoint folder.
        out: folder for `model/` (the trained checkpoint), `log.jsonl`, TensorBoard's events where it is installed,
            checkpoints and pictures of held-out heads.
        cache: folder for the encoded data; None: `out`/cache.
        sampling: how batches are drawn.
        settings: everything else.

    Returns:
        PSNR in dB and SSIM of the held-out heads, and LPIPS where the package lpips is installed; empty without any.

    Raises:
        ValueError: the data has faults, the batch does not divide among the processes, the loss is not finite, or
            Accelerate is set to divide the weights among processes by other means than FSDP 2.
        CheckpointError: the parent cannot be read, or has not been assembled; or a checkpoint in `out` is damaged, or
            of a run that trained other weights or held other heads out.
        OutputError: `out` cannot be written, or `out`/model holds other files than a checkpoint's.
    """
    out = Path(out)
    model = (out / "model").resolve()
    for name, given in (("parent", Path(parent)), ("data", Path(data))):
        if model in (given.resolve(), *given.resolve().parents):
            raise ValueError(f"{name}: expected another folder than the result's, {out / 'model'}, got {given}")
    check_writable(model, replaceable=MODEL_FILES)
    if settings.guidance is not None:
        check_guidance_scale(settings.guidance)
    if settings.adam_8bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("adam_8bit: expected bitsandbytes, which is not installed: pip install bitsandbytes")
    accelerator = start(out, settings)
    count = accelerator.num_processes
    if sampling.batch % count:
        raise ValueError(f"batch: expected a multiple of the {count} processes, got {sampling.batch}")
    found = Shards(data) if Shards.are_at(data) else Files(data)
    heads: list[Any]  # as `found` has them
    heads, faults = found.read_heads(views=sampling.views)
    if faults:
        raise ValueError(f"{faults[0]} ({len(faults)} faults; gafext train --check lists them)")
    known, held_out = hold_out(heads, settings.validation)
    pipeline = MultiViewDiffusionPipeline.from_pretrained(parent, device=accelerator.device)
    pipeline.head_fitter = None  # it fits drawn heads; data without normal maps is trained with the neutral head's
    check_parent(pipeline, settings.train)
    if settings.guidance is not None:
        pipeline.guidance_scale = settings.guidance
    size = latent_size(None, rows=1, channels=1, config=pipeline.unet.config) * pipeline.vae.config.factor
    options = {"size": size, "degrees": settings.portrait_angle, "pixels": settings.encoder_rate is not None}
    key = cache_key(known, pipeline, **options)
    folder = (out / "cache" if cache is None else Path(cache)) / key
    options["opened"] = functools.partial(found.open, known)
    if accelerator.is_main_process:
        held_out = found.extract(held_out, folder / "held_out")
        framed = [head for head in [*known, *held_out] if isinstance(head, Head)]  # of shards --check tells
        if pipeline.takes_normals and (warning := unframed(framed)):
            warnings.warn(warning, stacklevel=2)
    encode_heads(known, pipeline, folder, **options, every=share_of(len(known), accelerator.process_index, count))
    accelerator.wait_for_everyone()
    # Those of the others, anew on a disk that they do not write.
    encoded = encode_heads(known, pipeline, folder, **options)
    source = Folders(
        encoded,
        held_out,
        key=key,
        sampling=sampling,
        settings=settings,
        timesteps=pipeline.solver.config.num_train_timesteps,
        device_type=accelerator.device.type,
    )
    return fit(accelerator, pipeline, source, out, parent=parent, settings=settings)
