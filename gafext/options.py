"""Options of the command line."""

from __future__ import annotations

import argparse

from gafext import cameras, ops
from gafext.bench import SUITES
from gafext.doctor import command as doctor
from gafext.ops.backend import BACKENDS
from gafext.output import FORMATS, TURNTABLES
from gafext.pipeline import UPSAMPLE
from gafext.schedulers import SCHEDULERS
from gafext.schedulers.plan import PRESETS
from gafext.training.settings import SCHEDULES

EXIT_CODES = "exit codes: 0 success, 1 unusable input, 2 invalid command line, 130 interrupted"
EVAL_STEPS = 25
_LEVELS = ("debug", "info", "warning", "error")
_DTYPES = ("float32", "float16", "bfloat16")
_IN_8_BITS = ("int8", "int8-bfloat16")


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="gafext", description="Generate several consistent views of a head from one portrait.", epilog=EXIT_CODES
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_demo(commands)
    _add_assemble(commands)
    _add_train(commands)
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
    doctor.add_options(commands.add_parser("doctor", help=doctor.HELP, epilog=doctor.EXIT_CODES))
    return result


def _add_sampling(command: argparse.ArgumentParser, *, steps: int) -> None:
    """Add the options of every command that runs a pipeline."""
    add = command.add_argument
    add("--model", metavar="DIR", help="checkpoint folder or hub id; default: the small built-in model")
    add("--preset", choices=tuple(PRESETS), help="solver, both kinds of steps and guidance interval; docs/speed.md")
    add("--steps", type=int, metavar="N", help=f"denoising steps, 1 to 1000; default: {steps}, or the preset's")
    add("--guidance", type=float, metavar="G", help="guidance scale, 1 to 20; default: the checkpoint's, usually 7.5")
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("A", "B"),
        help="guide only steps at noise levels over A and up to B, inf allowed; default: the preset's, or all steps",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of all noise; default: 0")
    add(
        "--upsample",
        choices=UPSAMPLE,
        default="auto",
        help="double the size of the latents before decoding; default: auto, with the checkpoint's upsampler",
    )
    add(
        "--upsample-steps",
        type=int,
        metavar="N",
        help="steps of the checkpoint's upsampler, 1 to 1000; default: 10, or the preset's",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; default: the first of cuda, mps, cpu")
    add("--quiet", action="store_true", help="no progress and no summary")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        help="generate views of the head in a portrait",
        description="Write view_000.png ..., index.html to look at them, run.json and camera files into a folder.",
        epilog=EXIT_CODES,
    )
    add = generate.add_argument
    _add_sampling(generate, steps=50)
    add(
        "portrait",
        nargs="*",
        metavar="PORTRAIT",
        help="image of a head; several, or a folder of them: each gets a folder in --out (docs/portraits.md); default: "
        "the bundled portrait",
    )
    add(
        "--batch",
        type=_count_or_auto,
        default=1,
        metavar="N",
        help="portraits that are denoised together; auto: 1 on a CPU, else as many as memory holds; default: 1",
    )
    add(
        "--no-crop",
        action="store_true",
        default=None,
        help="take the portrait's centre square, also where the head is elsewhere",
    )
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
    add("--json", action="store_true", help="print one line of JSON per event")
    add("--log-level", choices=_LEVELS, default="warning", help="of several portraits, on stderr; default: warning")
    add("--format", action="append", choices=tuple(FORMATS), help="program to write camera files for; default: all")
    add("--alpha", action="store_true", help="make the plain background of the views transparent")
    add(
        "--turntable",
        choices=TURNTABLES,
        default="webp",
        help="film of the views; mp4 needs ffmpeg (pip install gafext[mp4]); default: webp",
    )
    add("--views", type=int, metavar="V", help="number of views on the path; default: 4, or the checkpoint's")
    add("--scheduler", choices=tuple(SCHEDULERS), help="solver; default: the preset's, or the checkpoint's")
    add("--eta", type=float, metavar="E", help="0: deterministic, 1: as much noise as DDPM; default: the checkpoint's")
    add(
        "--cameras",
        metavar="NAME_OR_PATH",
        help=f"{', '.join(cameras.PRESETS)}, or a camera file or folder; see docs/cameras.md; default: the "
        "checkpoint's, usually an orbit",
    )
    add("--convention", choices=cameras.CONVENTIONS, help="of --cameras that are bare matrices, with --fov")
    add("--elevation", type=float, metavar="DEG", help="elevation of the path; default: 0")
    add("--radius", type=float, metavar="R", help="radius of the path; default: 4")
    add("--fov", type=float, metavar="DEG", help="field of view; default: 30; also of --cameras without intrinsics")
    add("--normals", metavar="DIR", help="folder with one normal map per view; default: a drawn head's")
    add(
        "--no-fit",
        action="store_true",
        default=None,
        help="do not fit the drawn head to the portrait: its normal maps are the neutral one's",
    )
    add("--mesh", metavar="FILE", help="mesh of the head (.obj, .ply, .glb) to render the normal maps of")
    add("--mesh-pose", metavar="FILE", help="text file with a 4 x 4 matrix from the mesh's coordinates to the world")
    add("--renders", metavar="DIR", help="folder with one image per view to start from; see --strength")
    add("--strength", type=float, default=1.0, metavar="S", help="fraction of the steps run on the renders; default: 1")
    add(
        "--dtype",
        choices=(*_DTYPES, *_IN_8_BITS),
        help="dtype of weights and activations; int8: only the U-Net's wide layers, on a CPU; int8-bfloat16: with "
        "bfloat16 for the rest; default: float32, or int8 if the checkpoint was saved so",
    )
    add("--backend", choices=BACKENDS, default="auto", help="backend of attention and GEGLU; default: auto")
    add("--profile", action="store_true", help="print time and peak memory of each stage, and add them to run.json")
    add(
        "--preview",
        type=int,
        metavar="N",
        help="every N steps, add a row of the views to the picture OUT.preview.png, and show it in terminals that can",
    )
    add(
        "--parallel",
        choices=("guidance",),
        help="of one portrait, each of the two processes of torchrun computes one pass of guidance",
    )
    add(
        "--offload",
        choices=("model", "sequential"),
        help="keep the weights in main memory, but those of a network, or of a block, in use; default: on the device",
    )


def _count_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or auto, got {text!r}") from None


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="serve a web page to upload a portrait to and download the views from",
        description="Serve a web page on this machine: upload a portrait, watch the views being denoised, download the "
        "folder that generate writes. One run at a time; others wait. Needs gradio (pip install gafext[demo]).",
        epilog=EXIT_CODES,
    )
    add = demo.add_argument
    add(
        "--model",
        action="append",
        metavar="DIR",
        help="checkpoint folder or hub id to choose from; may be repeated; default: the small built-in model",
    )
    add("--host", default="127.0.0.1", metavar="NAME", help="address to listen on; default: 127.0.0.1, this machine")
    add("--port", type=int, default=7860, metavar="N", help="port to listen on; default: 7860")
    add("--max-upload", type=float, default=10, metavar="MB", help="largest portrait file, in megabytes; default: 10")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; default: the first of cuda, mps, cpu")
    add("--dtype", choices=(*_DTYPES, *_IN_8_BITS), help="as of generate")


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
    add(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="what a .safetensors file's U-Net predicts: v_prediction of Stable Diffusion 2.1 (768); default: epsilon",
    )
    add("--pose-dim", type=int, default=12, choices=(12, 16), help="numbers per camera; default: 12")
    add("--variant", metavar="NAME", help='variant in the names of the weight files, such as "fp16"')
    add("--dtype", choices=_DTYPES, default="float32", help="dtype of the weights written; default: float32")
    add("--out", required=True, metavar="DIR", help="folder to write; must be new or empty")


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="train an assembled checkpoint on folders of posed pictures of heads",
        description="Train a checkpoint that assemble wrote, or ImageDream's. DATA has folders of GaussianAvatars "
        "(transforms_*.json, as VHAP writes them) or with a transforms.json, at any depth. A run resumes at the last "
        "checkpoint in --out; accelerate launch runs it on several devices. Needs the extra train.",
        epilog=EXIT_CODES,
    )
    add = train.add_argument
    add("data", metavar="DATA", help="folder of training data, or of its shards, or the shards' URL")
    add("--check", action="store_true", help="say what is there and what is broken, write the index, and stop")
    add("--pack", metavar="DIR", help="write the data as WebDataset shards into a new folder, and stop")
    add("--shard-mb", type=float, default=1000.0, metavar="MB", help="size of a shard; default: 1000")
    add("--parent", metavar="DIR", help="checkpoint folder that assemble wrote, or of ImageDream")
    add("--out", metavar="DIR", help="folder for the trained checkpoint (model/), log, checkpoints and pictures")
    add("--cache", metavar="DIR", help="folder for the index and the encoded data; default: cache/ in --out")
    add(
        "--train",
        choices=("new", "lora", "all"),
        default="new",
        help="new: the layers that assemble added; lora: also low-rank updates of the parent's attention; default: new",
    )
    add("--rank", type=int, default=16, metavar="R", help="of these updates; default: 16")
    add("--steps", type=int, default=10000, metavar="N", help="steps of the optimizer; default: 10000")
    add("--minutes", type=float, metavar="M", help="end earlier, after this time of training, all sittings together")
    add("--batch", type=int, default=4, metavar="B", help="heads per batch, over all devices; default: 4")
    add("--views", type=int, default=4, metavar="V", help="views per head; default: 4")
    add("--rate", type=float, default=1e-4, metavar="R", help="learning rate; default: 1e-4")
    add("--encoder-rate", type=float, metavar="R", help="train the image encoder too, at this rate")
    add("--warmup", type=int, default=200, metavar="N", help="steps over which the rates rise; default: 200")
    add(
        "--schedule",
        choices=SCHEDULES,
        default="constant",
        help="rates after that; wsd: they fall over the last 30 %% of the run; default: constant",
    )
    add("--adam-8bit", action="store_true", help="keep the optimizer's moments in 8 bits; needs bitsandbytes")
    add("--gamma", type=float, default=5.0, metavar="G", help="of the min-SNR weights of the loss; default: 5")
    add("--ema", type=float, default=0.999, metavar="D", help="decay of the averaged weights; default: 0.999")
    for name, value, text in (
        ("near", 0.3, "whose views are neighbours instead of spread"),
        ("apart", 0.3, "of which each view has a noise level of its own"),
        ("drop-image", 0.1, "without image tokens"),
        ("drop-all", 0.05, "without image tokens, normals and pose"),
        ("blindfold", 0.4, "of which a random half of the views sees no portrait"),
    ):
        add(f"--{name}", type=float, default=value, metavar="F", help=f"fraction of heads {text}; default: {value}")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step of the optimizer; default: 1")
    add("--checkpointing", action="store_true", help="recompute blocks in the backward pass: less memory, more time")
    add("--precision", choices=("no", "fp16", "bf16"), help="mixed precision; default: Accelerate's, or no")
    add("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints; default: 500")
    add("--validation", type=int, default=1, metavar="N", help="subjects held out, the last by name; default: 1")
    add("--validate-every", type=int, default=0, metavar="N", help="steps between validations; default: at the end")
    add("--validation-steps", type=int, default=25, metavar="N", help="denoising steps of their views; default: 25")
    add("--guidance", type=float, metavar="G", help="scale of these views and of the result; default: parent's")
    add("--portrait-angle", type=float, default=35.0, metavar="D", help="degrees from the front; default: 35")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--cpu", action="store_true", help="train on the CPU")


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
    add(
        "--suite",
        choices=SUITES,
        default=SUITES[0],
        help="lengths: time and peak memory of attention over 64 to 16384 tokens; samplers: a step of each, against "
        "diffusers'; default: operations",
    )
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
    _add_sampling(evaluate, steps=EVAL_STEPS)
    add("--heads", type=int, default=8, metavar="N", help="number of heads; default: 8")
    add("--views", type=int, default=4, metavar="V", help="views on an orbit; default: 4")
    add("--ablations", action="store_true", help="also measure with inputs or parts of the network removed or changed")
    add("--json", metavar="FILE", help="write the numbers to this file")
    add("--figure", metavar="FILE", help="write an image of portraits, normal maps, generated views and ground truth")
