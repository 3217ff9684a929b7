"""The command line: `gafext generate`, `assemble`, `eval`, `bench` and `info`."""

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

import numpy as np
import PIL.Image
import torch

import gafext._C as _C
from gafext import cameras, ops
from gafext.assets import PORTRAIT
from gafext.atomic import check_writable, whole_folder
from gafext.cameras import Cameras
from gafext.conditions import DEFAULT_VIEWS
from gafext.guidance import check_guidance_scale
from gafext.images import load_images, read_image, remove_background
from gafext.mesh import Mesh, load_mesh
from gafext.noise import resolve_seed
from gafext.ops.backend import BACKENDS
from gafext.output import FORMATS, VIEW_FILES, MultiViewOutput
from gafext.pipeline import UPSAMPLE, MultiViewDiffusionPipeline
from gafext.schedulers import MAX_STEPS, SCHEDULERS, check_eta
from gafext.versions import versions

EXIT_CODES = "exit codes: 0 success, 1 unusable input, 2 invalid command line, 130 interrupted"
_DTYPES = ("float32", "float16", "bfloat16")
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gafext", description="Generate several consistent views of a head from one portrait.", epilog=EXIT_CODES
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_assemble(commands)
    _add_eval(commands)
    _add_bench(commands)
    info = commands.add_parser(
        "info",
        help="print versions, devices, instruction set and compiled kernels; or with --model, what a checkpoint is",
        epilog=EXIT_CODES,
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument(
        "--model",
        metavar="PATH",
        help="describe a folder, file or hub id: parts, dtypes, sizes, what is read and ignored, or why it is refused",
    )
    info.add_argument("--variant", metavar="NAME", help='variant in the names of the weight files, such as "fp16"')
    info.add_argument("--subfolder", metavar="NAME", help="folder inside the model's that is the checkpoint")
    return parser


def _add_sampling(command: argparse.ArgumentParser, *, steps: int) -> None:
    """Add the options of every command that runs a pipeline."""
    add = command.add_argument
    add("--model", metavar="DIR", help="checkpoint folder or hub id; default: the small built-in model")
    add("--steps", type=int, default=steps, metavar="N", help=f"denoising steps, 1 to 1000; default: {steps}")
    add("--guidance", type=float, metavar="G", help="guidance scale, 1 to 20; default: the checkpoint's, usually 7.5")
    add("--seed", type=int, default=0, metavar="S", help="seed of all noise; default: 0")
    add(
        "--upsample",
        choices=UPSAMPLE,
        default="auto",
        help="double the size of the latents before decoding; default: auto, with the checkpoint's upsampler",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; default: the first of cuda, mps, cpu")
    add("--quiet", action="store_true", help="no progress and no summary")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        help="generate views of the head in a portrait",
        description="Write view_000.png ..., contact_sheet.png, run.json and camera files into a folder.",
        epilog=EXIT_CODES,
    )
    add = generate.add_argument
    _add_sampling(generate, steps=50)
    add("portrait", nargs="?", metavar="PORTRAIT", help="image of a head; default: the bundled portrait")
    add("--matte", action="store_true", help="remove the portrait's background, with rembg (pip install gafext[matte])")
    add("--variant", metavar="NAME", help='variant in the names of the weight files, such as "fp16"')
    add("--subfolder", metavar="NAME", help="folder inside the model's that is the checkpoint")
    add("--lora", metavar="FILE", help="LoRA file to merge into the U-Net")
    add("--lora-scale", type=float, metavar="S", help="weight of the LoRA; default: 1")
    add(
        "--ip-adapter",
        metavar="FILE",
        help="IP-Adapter file, plain, Plus or full-face, for a U-Net without image attention",
    )
    add("--ip-adapter-scale", type=float, metavar="S", help="weight of the IP-Adapter; default: 1")
    add("--mv-adapter", metavar="FILE", help="MV-Adapter file (image to multi-view) to add to Stable Diffusion 2.1")
    add("--out", metavar="DIR", default="views", help="folder to write; must be new or empty; default: views")
    add("--overwrite", action="store_true", help="replace the result of an earlier run")
    add("--format", action="append", choices=tuple(FORMATS), help="program to write camera files for; default: all")
    add("--alpha", action="store_true", help="make the plain background of the views transparent")
    add("--views", type=int, metavar="V", help="number of views on the orbit; default: 4, or the checkpoint's")
    add("--scheduler", choices=tuple(SCHEDULERS), help="solver; default: the checkpoint's")
    add("--eta", type=float, metavar="E", help="0: deterministic, 1: as much noise as DDPM; default: the checkpoint's")
    add("--cameras", metavar="PATH", help="camera file or folder to use instead of an orbit; see the README, Cameras")
    add("--convention", choices=cameras.CONVENTIONS, help="of --cameras that are bare matrices, with --fov")
    add("--elevation", type=float, metavar="DEG", help="elevation of the orbit; default: 0")
    add("--radius", type=float, metavar="R", help="radius of the orbit; default: 4")
    add("--fov", type=float, metavar="DEG", help="field of view of the orbit's cameras; default: 30")
    add("--normals", metavar="DIR", help="folder with one normal map per view; default: a neutral head's")
    add("--mesh", metavar="FILE", help="mesh of the head (.obj, .ply, .glb) to render the normal maps of")
    add("--mesh-pose", metavar="FILE", help="text file with a 4 x 4 matrix from the mesh's coordinates to the world")
    add("--renders", metavar="DIR", help="folder with one image per view to start from; see --strength")
    add("--strength", type=float, default=1.0, metavar="S", help="fraction of the steps run on the renders; default: 1")
    add(
        "--dtype",
        choices=(*_DTYPES, "int8"),
        default="float32",
        help="dtype of weights and activations; int8: only the U-Net's linear layers, on a CPU; default: float32",
    )
    add("--backend", choices=BACKENDS, default="auto", help="backend of attention and GEGLU; default: auto")


def _add_assemble(commands: argparse._SubParsersAction) -> None:
    assemble = commands.add_parser(
        "assemble",
        help="build a multi-view checkpoint from Stable Diffusion, CLIP and the latent upscaler",
        description="Write a checkpoint whose new layers (attention across views and to the portrait, camera pose, "
        "normal latents) have no effect until they are trained: until then, every view is the parent's output.",
        epilog=EXIT_CODES,
    )
    add = assemble.add_argument
    add(
        "--parent", required=True, metavar="DIR", help="Stable Diffusion: unet/ vae/ scheduler/, or a .safetensors file"
    )
    add("--image-encoder", metavar="DIR", help="CLIP ViT-H/14 as saved by transformers; optional with --mv-adapter")
    add("--upsampler", metavar="DIR", help="checkpoint folder of the latent upscaler")
    add("--ip-adapter", metavar="FILE", help="IP-Adapter file to use for image attention instead of new layers")
    add("--mv-adapter", metavar="FILE", help="MV-Adapter file that belongs to the parent")
    add("--trained", metavar="FILE", help="state dict of a trained GAF-style U-Net to load into the result")
    add("--pose-dim", type=int, default=12, choices=(12, 16), help="numbers per camera; default: 12")
    add("--variant", metavar="NAME", help='variant in the names of the weight files, such as "fp16"')
    add("--dtype", choices=_DTYPES, default="float32", help="dtype of the weights written; default: float32")
    add("--out", required=True, metavar="DIR", help="folder to write; must be new or empty")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="compare the speed of gafext's operations and PyTorch's on this machine",
        description="Time every operation at the shapes of the published networks; implementations take turns. "
        "Columns: median and quartiles of a call, speed-up of gafext, and the fraction of the rate of a matrix product "
        "or a copy in the same run.",
        epilog=EXIT_CODES,
    )
    add = bench.add_argument
    add("--op", choices=ops.__all__, action="append", help="only this operation; may be repeated")
    add("--shape", metavar="TEXT", action="append", help="only shapes that contain this text; may be repeated")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--dtype", choices=_DTYPES, default="float32", help="default: float32")
    add("--rounds", type=int, default=11, metavar="N", help="timed rounds per implementation, at least 7; default: 11")
    add("--threads", type=int, metavar="N", help="threads of PyTorch and gafext; default: PyTorch's setting")
    add("--quick", action="store_true", help="3 rounds of one call, to check that everything runs and agrees")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time forms with torch.compile, which need a C++ compiler; default: yes",
    )
    add("--cold", action="store_true", help="also measure with inputs that are not in a cache")
    add(
        "--allocator",
        choices=("default", "keep", "both"),
        default="default",
        help="keep: glibc's malloc keeps large blocks instead of returning them to the kernel; default: default",
    )
    add(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="repeat disturbed measurements of a shape for up to S seconds and keep the least disturbed one",
    )
    add("--seconds", type=float, metavar="S", help="skip the shapes that have not started after S seconds")
    add("--compile-seconds", type=float, metavar="S", help="skip torch.compile after it has taken S seconds in total")
    add("--json", metavar="FILE", help="write the environment and all times to this file")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure the quality of views of held-out procedural heads",
        description="Measure PSNR, SSIM and cross-view consistency on heads that the built-in model was not trained "
        "on, with baselines and ablations.",
        epilog=EXIT_CODES,
    )
    add = evaluate.add_argument
    _add_sampling(evaluate, steps=25)
    add("--heads", type=int, default=8, metavar="N", help="number of heads; default: 8")
    add("--views", type=int, default=4, metavar="V", help="number of views on an orbit; default: 4")
    add("--ablations", action="store_true", help="also measure with inputs or parts of the network removed or changed")
    add("--json", metavar="FILE", help="write the numbers to this file")
    add("--figure", metavar="FILE", help="write an image of portraits, normal maps, generated views and ground truth")


def _eval(args: argparse.Namespace) -> int:
    from gafext.evaluation import Evaluation, table

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the CartoonWarning is not about drawn heads
        pipeline = MultiViewDiffusionPipeline.from_pretrained(args.model, device=_device(args.device))
    evaluation = Evaluation(
        pipeline,
        args.heads,
        cameras.orbit(args.views),
        progress=lambda name: None if args.quiet else print(f"gafext: {name}", file=sys.stderr),
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=args.seed,
        upsample=args.upsample,
    )
    lines = evaluation.baselines() + evaluation.main() + (evaluation.ablations() if args.ablations else [])
    print(table(lines))
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("command", "json", "figure")}
        report = {"settings": settings, "versions": versions(), "lines": [asdict(line) for line in lines]}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if args.figure:
        evaluation.figure(evaluation.generate()).save(args.figure)
    return 0


def _assemble(args: argparse.Namespace) -> int:
    from gafext.checkpoints.assemble import assemble

    check_writable(args.out)
    pipeline = assemble(
        args.parent,
        image_encoder=args.image_encoder,
        upsampler=args.upsampler,
        ip_adapter=args.ip_adapter,
        mv_adapter=args.mv_adapter,
        trained=args.trained,
        pose_dim=args.pose_dim,
        dtype=getattr(torch, args.dtype),
        variant=args.variant,
    )
    with whole_folder(args.out) as folder:
        pipeline.save_pretrained(folder)
    print(f"{sum(p.numel() for p in pipeline.unet.parameters()) / 1e6:.0f} M parameters in the U-Net: {args.out}")
    return 0


def _pictures(folder: str | None, *, count: int | None, name: str) -> list[PIL.Image.Image] | None:
    """Read a folder's images in the order of their names; count None leaves their number to the pipeline."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: expected a folder of pictures")
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in _PICTURES)
    return load_images(paths, count=len(paths) if count is None else count, name=name)


def _mesh(args: argparse.Namespace) -> Mesh:
    pose = None if args.mesh_pose is None else np.loadtxt(args.mesh_pose)
    return load_mesh(args.mesh, pose=pose)


def _cameras(args: argparse.Namespace) -> Cameras | None:
    """Return the cameras that the options ask for; None if they leave all but their number to the checkpoint."""
    orbit = {"num_views": args.views, "elevation": args.elevation, "radius": args.radius, "fov": args.fov}
    given = {name: value for name, value in orbit.items() if value is not None}
    if args.cameras is None:
        views = cameras.orbit(**{"num_views": DEFAULT_VIEWS, **given})
        return views if given.keys() - {"num_views"} else None
    if given.keys() - ({"fov"} if args.convention else set()):
        raise ValueError(f"--cameras: expected no orbit beside it, got {', '.join(given)}")
    return cameras.read_transforms(args.cameras, convention=args.convention, fov=args.fov)


def _check_early(args: argparse.Namespace) -> None:
    """Validate the options before the model is loaded, which can take minutes."""
    pairs = {"lora_scale": "lora", "ip_adapter_scale": "ip_adapter", "variant": "model", "subfolder": "model"}
    pairs["mesh_pose"] = "mesh"
    if args.mesh is not None and args.normals is not None:
        raise ValueError("--mesh: expected no --normals beside it, got both")
    for option, needs in pairs.items():
        if getattr(args, option) is not None and getattr(args, needs) is None:
            option, needs = (name.replace("_", "-") for name in (option, needs))
            raise ValueError(f"--{option}: expected --{needs} with it")
    check_writable(args.out, replaceable=VIEW_FILES if args.overwrite else None)
    if args.guidance is not None:
        check_guidance_scale(args.guidance)
    if args.eta is not None:
        check_eta(args.eta)
    resolve_seed(args.seed)
    if not 1 <= args.steps <= MAX_STEPS:
        raise ValueError(f"num_inference_steps: expected a whole number from 1 to {MAX_STEPS}, got {args.steps}")


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
        _device(args.device),
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
    return pipeline


@_warnings_in_one_line()
def _generate(args: argparse.Namespace) -> int:
    _check_early(args)
    views = _cameras(args)
    portrait = read_image(args.portrait or PORTRAIT)
    if args.matte and portrait.mode == "RGB":
        portrait = remove_background(portrait)
    count = args.views if views is None else len(views)
    normals = _pictures(args.normals, count=count, name="normal_maps") if args.mesh is None else _mesh(args)
    renders = _pictures(args.renders, count=count, name="renders")
    pipeline = _load(args)
    start = time.monotonic()
    output = pipeline(
        portrait,
        views,
        normals,
        num_views=count,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=args.seed,
        renders=renders,
        strength=args.strength,
        eta=args.eta,
        upsample=args.upsample,
        progress_bar=not args.quiet,
    )
    assert isinstance(output, MultiViewOutput)  # one portrait, not a list
    command = {**vars(args), "portrait": str(args.portrait or PORTRAIT.name)}
    output.run["command"] = {name: value for name, value in command.items() if value is not None}
    output.save(args.out, overwrite=args.overwrite, formats=args.format, alpha=args.alpha)
    if not args.quiet:
        print(f"{len(output.images)} views in {time.monotonic() - start:.1f} s: {args.out}")
    return 0


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors in the input print one line on stderr, not a traceback.

    Args:
        argv: arguments without the program's name; None: those of the process.
    """
    args = _parser().parse_args(argv)
    try:
        commands = {"generate": _generate, "assemble": _assemble, "eval": _eval, "bench": _bench, "info": _info}
        return commands[args.command](args)
    except KeyboardInterrupt:
        print("gafext: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError) as error:
        print(f"gafext: error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise  # a bug in gafext: keep the traceback
        print(f"gafext: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
