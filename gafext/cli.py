"""The command line: `gafext generate`, `demo`, `assemble`, `train`, `eval`, `bench`, `info` and `doctor`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

import gafext._C as _C
from gafext import cameras
from gafext.assets import PORTRAIT
from gafext.atomic import check_writable, whole_folder
from gafext.cameras import Cameras
from gafext.checkpoints.memory import default_device, usable_device
from gafext.conditions import DEFAULT_SAMPLE_SIZE, DEFAULT_VIEWS, RunOptions
from gafext.doctor.command import doctor
from gafext.families import family_name
from gafext.guidance import check_guidance_interval, check_guidance_scale
from gafext.images import load_image, read_image, remove_background, to_square_tensor
from gafext.mesh import Mesh, load_mesh
from gafext.noise import resolve_seed
from gafext.options import EVAL_STEPS, parser
from gafext.output import VIEW_FILES, MultiViewOutput, check_turntable, choose_formats
from gafext.output.output import json_clean
from gafext.pipeline import MultiViewDiffusionPipeline
from gafext.portraits.batch import check_batch_size
from gafext.portraits.command import generate_portraits, process_pair
from gafext.portraits.jobs import is_many, list_pictures
from gafext.schedulers import MAX_STEPS, check_eta, check_steps
from gafext.versions import versions
from gafext.watch.events import StepEvents, print_event, say
from gafext.watch.preview import LatentToRGB, Preview
from gafext.watch.stages import Stages
from gafext.watch.terminal import picture_writer


def _eval(args: argparse.Namespace) -> int:
    from gafext.evaluation import Evaluation, table

    args.steps = EVAL_STEPS if args.preset is args.steps is None else args.steps
    _check_reports(args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the CartoonWarning is not about drawn heads
        pipeline = MultiViewDiffusionPipeline.from_pretrained(args.model, device=_device(args.device))
    evaluation = Evaluation(
        pipeline,
        args.heads,
        cameras.orbit(args.views),
        progress=lambda name: None if args.quiet else print(f"gafext: {name}", file=sys.stderr),
        preset=args.preset,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        guidance_interval=args.guidance_interval,
        generator=args.seed,
        upsample=args.upsample,
        upsample_steps=args.upsample_steps,
    )
    lines = evaluation.baselines() + evaluation.main() + (evaluation.ablations() if args.ablations else [])
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("command", "json", "figure")}
        report = {"settings": settings, "versions": versions(), "lines": [asdict(line) for line in lines]}
        Path(args.json).write_text(json.dumps(json_clean(report), indent=2) + "\n")
    if args.figure:
        evaluation.figure(evaluation.generate()).save(args.figure)
    say(table(lines))
    return 0


def _check_reports(args: argparse.Namespace) -> None:
    """Validate where `eval` is to write, before it takes minutes."""
    for path in (Path(name) for name in (args.json, args.figure) if name):
        if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise ValueError(f"{path}: expected a file in a folder that can be written")
    formats = PIL.Image.registered_extensions()
    if args.figure and formats.get(Path(args.figure).suffix.lower()) not in PIL.Image.SAVE:
        raise ValueError(f"--figure {args.figure}: expected the suffix of a picture, such as .png")


def _assemble(args: argparse.Namespace) -> int:
    from gafext.checkpoints.assemble import assemble

    check_writable(args.out)
    options = {name: value for name, value in vars(args).items() if name not in ("command", "parent", "dtype", "out")}
    with _warnings_in_one_line():
        pipeline = assemble(args.parent, dtype=getattr(torch, args.dtype), **options)
    with whole_folder(args.out) as folder:
        pipeline.save_pretrained(folder)
    say(f"{sum(p.numel() for p in pipeline.unet.parameters()) / 1e6:.0f} M parameters in the U-Net: {args.out}")
    return 0


def _train(args: argparse.Namespace) -> int:
    from gafext.training.command import train_command

    return train_command(args)


def _pictures(folder: str | None, *, count: int | None, name: str) -> list[PIL.Image.Image] | None:
    """Read a folder's images in the order of their names; count None leaves their number to the pipeline."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: expected a folder of pictures")
    pictures = [read_image(path) for path in list_pictures(Path(folder))]
    if count not in (None, len(pictures)):
        raise ValueError(f"{name}: expected {count}, one per camera, got {len(pictures)}")
    return pictures


def _mesh(args: argparse.Namespace) -> Mesh:
    try:
        pose = None if args.mesh_pose is None else np.loadtxt(args.mesh_pose)
    except ValueError as error:
        raise ValueError(f"--mesh-pose {args.mesh_pose}: expected a matrix of numbers ({error})") from None
    return load_mesh(args.mesh, pose=pose)


def _cameras(args: argparse.Namespace) -> Cameras | None:
    """Return the cameras that the options ask for; None if they leave all but their number to the checkpoint."""
    orbit = {"num_views": args.views, "elevation": args.elevation, "radius": args.radius, "fov": args.fov}
    given = {name: value for name, value in orbit.items() if value is not None}
    if args.cameras is None:
        views = cameras.orbit(**{"num_views": DEFAULT_VIEWS, **given})
        return views if given.keys() - {"num_views"} else None
    if args.cameras in cameras.PRESETS:
        path, known = cameras.PRESETS[args.cameras]
        flags = {*(given.keys() - known), *(["convention"] if args.convention else [])}
        if flags:
            names = ", ".join(sorted(f"--{name.removeprefix('num_')}" for name in flags))
            raise ValueError(f"--cameras {args.cameras}: expected no {names} beside it")
        return path(**({"num_views": DEFAULT_VIEWS} if "num_views" in known else {}) | given)
    if others := given.keys() - {"fov"}:
        raise ValueError(f"--cameras: expected no orbit beside it, got {', '.join(sorted(others))}")
    return cameras.read_transforms(args.cameras, convention=args.convention, fov=args.fov)


def _check_early(args: argparse.Namespace) -> None:
    """Validate the options before the model is loaded, which can take minutes."""
    pairs = {"lora_scale": "lora", "ip_adapter_scale": "ip_adapter", "variant": "model", "subfolder": "model"}
    pairs |= {"mesh_pose": "mesh", "convention": "cameras"}
    if args.mesh is not None and args.normals is not None:
        raise ValueError("--mesh: expected no --normals beside it, got both")
    if args.no_fit and (args.mesh is not None or args.normals is not None):
        raise ValueError(f"--no-fit: expected no --{'normals' if args.mesh is None else 'mesh'} beside it")
    for option, needs in pairs.items():
        if getattr(args, option) is not None and getattr(args, needs) is None:
            option, needs = (name.replace("_", "-") for name in (option, needs))
            raise ValueError(f"--{option}: expected --{needs} with it")
    check_batch_size(args.batch, name="--batch")
    if is_many(args.portrait):
        for option in ("profile", "preview", "parallel"):
            if getattr(args, option):
                raise ValueError(f"--{option}: expected one portrait, got several")
    else:
        check_writable(args.out, replaceable=VIEW_FILES if args.overwrite else None)
    if args.guidance is not None:
        check_guidance_scale(args.guidance)
    check_guidance_interval(args.guidance_interval)
    if args.eta is not None:
        check_eta(args.eta)
    resolve_seed(args.seed)
    if args.preview is not None and args.preview < 1:
        raise ValueError(f"--preview: expected a whole number of steps above 0, got {args.preview}")
    check_turntable(args.turntable)
    for name, steps in (("num_inference_steps", args.steps), ("upsample_steps", args.upsample_steps)):
        if steps is not None:
            check_steps(steps, MAX_STEPS, name=name)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"gafext: {message}", file=sys.stderr)
        yield


def _load(args: argparse.Namespace) -> MultiViewDiffusionPipeline:
    pipeline = MultiViewDiffusionPipeline.from_pretrained(
        args.model,
        args.dtype,
        "cpu" if args.offload else _device(args.device),
        args.variant,
        subfolder=args.subfolder,
        scheduler=args.scheduler,
        lora=args.lora,
        lora_scale=1.0 if args.lora_scale is None else args.lora_scale,
        ip_adapter=args.ip_adapter,
        ip_adapter_scale=1.0 if args.ip_adapter_scale is None else args.ip_adapter_scale,
        mv_adapter=args.mv_adapter,
    )
    pipeline.set_attention_backend(args.backend)
    if args.offload == "model":
        pipeline.enable_model_cpu_offload(device=_device(args.device))
    elif args.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=_device(args.device))
    return pipeline


def _preview(args: argparse.Namespace, pipeline: MultiViewDiffusionPipeline, portrait: PIL.Image.Image) -> Preview:
    """Return the callback of --preview, with colours fitted to the portrait."""
    picture = to_square_tensor([load_image(portrait)], DEFAULT_SAMPLE_SIZE * pipeline.vae.config.factor)
    out = Path(args.out).absolute()
    show = None if args.quiet else picture_writer(os.environ)
    to_rgb = LatentToRGB(picture, pipeline.encode(picture))
    return Preview(out.with_name(f"{out.name}.preview.png"), to_rgb, every=args.preview, show=show)


@_warnings_in_one_line()
def _generate(args: argparse.Namespace) -> int:
    _check_early(args)
    views = _cameras(args)
    if views is not None:
        choose_formats(args.format, views)
    many, path = is_many(args.portrait), args.portrait[0] if args.portrait else PORTRAIT
    portrait = None if many else read_image(path)
    if args.matte and portrait is not None and portrait.mode == "RGB":
        portrait = remove_background(portrait)
    count = args.views if views is None else len(views)
    normals = _pictures(args.normals, count=count, name="normal_maps") if args.mesh is None else _mesh(args)
    renders = _pictures(args.renders, count=count, name="renders")
    options: RunOptions = {
        "num_views": count,
        "preset": args.preset,
        "num_inference_steps": args.steps,
        "scheduler": args.scheduler,
        "guidance_scale": args.guidance,
        "guidance_interval": args.guidance_interval,
        "generator": args.seed,
        "renders": renders,
        "strength": args.strength,
        "eta": args.eta,
        "upsample": args.upsample,
        "upsample_steps": args.upsample_steps,
        "matte": args.matte,
        "crop": not args.no_crop,
        "fit": not args.no_fit,
    }
    saving = {"formats": args.format, "alpha": args.alpha, "turntable": args.turntable}
    inputs = {"cameras": views, "normal_maps": normals}
    if portrait is None:
        return generate_portraits(args, lambda: _load(args), {**options, **inputs}, saving)
    options |= {"parallel": args.parallel}
    if args.parallel is None:
        return _generate_one(args, path, portrait, {**options, **inputs}, saving)
    with process_pair(args) as is_first:
        if not is_first:
            args.quiet, args.json, args.profile, args.preview = True, False, False, None
            warnings.simplefilter("ignore")  # the first process warns of the same
        return _generate_one(args, path, portrait, {**options, **inputs}, saving if is_first else None)


def _generate_one(
    args: argparse.Namespace,
    path: str | Path,
    portrait: PIL.Image.Image,
    options: dict[str, Any],
    saving: dict[str, Any] | None,
) -> int:
    """Make the views of one portrait; `saving` are the options of `MultiViewOutput.save`, None: they are not saved."""
    device = _device(args.device) or default_device()
    stages = Stages(device, bars=not args.quiet, memory=args.profile, events=args.json)
    with stages("load"):
        pipeline = _load(args)
    start = time.monotonic()
    callback = None if args.preview is None else _preview(args, pipeline, portrait)
    if args.json:
        callback = StepEvents(callback)
    with stages.follow(pipeline):
        output = pipeline(portrait, callback_on_step_end=callback, progress_bar=not args.quiet, **options)
    assert isinstance(output, MultiViewOutput)  # one portrait, not a list
    if args.preview is not None and args.preview > (steps := output.run["num_inference_steps"]):
        warnings.warn(f"--preview {args.preview}: no picture, because the run has {steps} steps", stacklevel=1)
    if saving is None:
        return 0
    command = {**vars(args), "portrait": PORTRAIT.name if path is PORTRAIT else path}
    output.run["command"] = {name: value for name, value in command.items() if value is not None}
    if args.profile:
        output.run["profile"] = stages.to_dict()  # all but saving
    with stages("save"):
        output.save(args.out, overwrite=args.overwrite, **saving)
    seconds = time.monotonic() - start
    if args.profile:
        print(stages.table(), file=sys.stderr)
    number = len(output.images)
    if args.json:
        print_event("portrait", portrait=str(path), folder=args.out, views=number, seconds=seconds)
    elif not args.quiet:
        say(f"{number} views in {seconds:.1f} s ({number / seconds:.2f} per second): {args.out}")
    return 0


@_warnings_in_one_line()
def _demo(args: argparse.Namespace) -> int:
    from gafext.integrations.demo import require_gradio, serve

    require_gradio()
    if not 1 <= args.port <= 65535:
        raise ValueError(f"--port: expected 1 to 65535, got {args.port}")
    if not args.max_upload > 0:
        raise ValueError(f"--max-upload: expected a number of megabytes above 0, got {args.max_upload}")
    pipelines = {}
    for model in args.model or [None]:
        pipeline = MultiViewDiffusionPipeline.from_pretrained(model, args.dtype, _device(args.device))
        pipelines[f"{family_name(pipeline.unet.config)}: {model or 'built-in'}"] = pipeline
    serve(pipelines, host=args.host, port=args.port, max_upload=args.max_upload)
    return 0


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    device = usable_device(name, option="--device")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: expected cpu, cuda or mps")
    return device


def _bench(args: argparse.Namespace) -> int:
    from gafext.bench.command import bench

    return bench(args)


def _info(args: argparse.Namespace) -> int:
    if args.model is not None:
        from gafext.checkpoints.describe import describe, lines

        description = describe(args.model, variant=args.variant, subfolder=args.subfolder)
        print(json.dumps(description, indent=2) if args.json else "\n".join(lines(description)))
        if description["refused"] is not None:
            raise ValueError(description["refused"])
        return 0
    if not (args.variant is args.subfolder is None):
        raise ValueError("--variant, --subfolder: expected --model with them")
    devices = ["cpu"] + [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    info = {"versions": versions(), "devices": devices, "threads": torch.get_num_threads(), "build": _C.build_info()}
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    for title, value in info.items():
        if isinstance(value, dict):
            print(f"{title}:")
            for key, item in value.items():
                print(f"  {key}: {', '.join(map(str, item)) if isinstance(item, (list, tuple)) else item}")
        else:
            print(f"{title}: {', '.join(value) if isinstance(value, list) else value}")
    return 0


_COMMANDS = {
    "generate": _generate,
    "demo": _demo,
    "assemble": _assemble,
    "train": _train,
    "eval": _eval,
    "bench": _bench,
    "info": _info,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors in the input print one line on stderr, not a traceback.

    Args:
        argv: arguments without the program's name; None: those of the process.
    """
    args = parser().parse_args(argv)
    try:
        return _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        left = {
            "train": "the same command goes on at the last checkpoint",
            "bench": "the file of --json has the races until then"
            if getattr(args, "json", None)
            else "nothing was written",
        }.get(args.command, "nothing was written")
        print(f"gafext: interrupted; {left}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        print(f"gafext: error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise  # a bug in gafext: keep the traceback
        print(f"gafext: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
