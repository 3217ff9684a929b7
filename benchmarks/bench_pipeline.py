"""Race the whole pipeline and each of its stages against diffusers, torch.compile and OpenVINO.

    python benchmarks/bench_pipeline.py [--model sd21|built-in|FOLDER] [--against stock,compile,openvino]
        [--views 4] [--steps 4] [--rounds 7] [--device cpu] [--dtype float32] [--json FILE]
    python benchmarks/plot_pipeline.py FILE FIGURE.svg

One portrait to views: encode (the portrait's tokens, the latents of the normal maps), denoise (DDIM with guidance),
upsample, decode. Nobody reads a file, looks for a head or draws normal maps while the clock runs. The opponents are
`stock.py`, eager, compiled (U-Net, decoder and upsampler) or as OpenVINO's graphs of static shapes (without the
upsampler); they share gafext's weights, noise and normal maps, and take turns with it in one process. "sd21" is the
U-Net of SD 2.1 with attn_cv and attn_ip, ViT-H/14, SD's autoencoder and sd-x2-latent-upscaler, of random weights. On
a GPU, gafext races with `graph=True` as well. Peak memory is that of a second run, above what was in use before it.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from full_size import DTYPES, random_pipeline, words
from race import device_name, json_file, positive, synchronize, write
from run_inputs import Inputs
from torch import Tensor

from gafext import PORTRAIT, MultiViewDiffusionPipeline
from gafext.bench.environment import environment, watch_others
from gafext.bench.measure import quartiles, ratio
from gafext.images import load_image
from gafext.noise import view_noise
from gafext.ops.memory import release_freed_memory
from gafext.upsampler import NOISE_STEP
from gafext.watch.peak import peak_memory

if TYPE_CHECKING:
    from stock import StockPipeline

STAGES = ("encode", "denoise", "upsample", "decode")
AGAINST = {"stock": "diffusers", "compile": "diffusers", "openvino": "openvino"}
"""Package that each opponent needs, with diffusers and transformers."""


def missing_packages(against: list[str]) -> list[str]:
    """List the packages that the opponents need and that are not installed."""
    needed = dict.fromkeys(package for name in against for package in ("transformers", "diffusers", AGAINST[name]))
    return [package for package in needed if importlib.util.find_spec(package) is None]


class Ours:
    """gafext, stage by stage as `StockPipeline`."""

    def __init__(self, pipe: MultiViewDiffusionPipeline, **options: Any):
        self.pipe, self.options, self.portrait = pipe, options, load_image(PORTRAIT)

    def encode(self, given: Inputs) -> tuple[Any, ...]:
        return (self.pipe.prepare(self.portrait, **self.options),)

    def denoise(self, given: Inputs, run: Any) -> Tensor:
        self.run = run
        return self.pipe.denoise(run)

    def upsample(self, given: Inputs, latents: Tensor) -> Tensor:
        return self.pipe.upsample(self.run, latents)

    def decode(self, given: Inputs, latents: Tensor) -> Tensor:
        return self.pipe.decode(latents).clamp(0, 1)


def compiled(stock: "StockPipeline", device: torch.device) -> None:
    """Compile the networks that run more than once per portrait, and the decoder."""
    for name in stock.networks.keys() & {"denoiser", "upsampler", "decoder"}:
        options = {"freezing": True} if device.type == "cpu" else None
        stock.networks[name] = torch.compile(stock.networks[name], dynamic=False, options=options)


def openvino(stock: "StockPipeline") -> None:
    """Replace the networks by OpenVINO's graphs of them, in float32 and for the shapes of this run.

    The upsampler stays PyTorch's: OpenVINO 2026.4 crashes when it compiles a K-UNet.
    """
    from openvino import Core, convert_model

    core, settings = Core(), {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "f32"

    def first_call(name: str, network: Any, *args: Tensor) -> Tensor:
        arrays = [tensor.contiguous().numpy() for tensor in args]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            model = convert_model(network, example_input=args, input=[list(tensor.shape) for tensor in args])
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def infer(*args: Tensor) -> Tensor:
            arrays = [tensor.contiguous().numpy() for tensor in args]
            return torch.from_numpy(request.infer(arrays, share_inputs=True)[0])

        stock.networks[name] = infer
        return torch.from_numpy(request.infer(arrays, share_inputs=True)[0])

    for name in stock.networks.keys() - {"upsampler"}:
        stock.networks[name] = functools.partial(first_call, name, stock.networks[name])


def timed(contestant: Any, given: Inputs, device: torch.device) -> tuple[dict[str, float], Tensor, Tensor]:
    """Run a contestant: seconds of its stages, the denoised latents and the pictures."""
    seconds, found = {}, ()
    results: list[Any] = []
    for stage in STAGES:
        synchronize(device)
        start = time.perf_counter()
        found = getattr(contestant, stage)(given, *found)
        synchronize(device)
        seconds[stage] = time.perf_counter() - start
        found = found if isinstance(found, tuple) else (found,)
        results.append(found[0])
    return seconds, results[1], results[3]


def contestants(
    pipe: MultiViewDiffusionPipeline, against: list[str], *, views: int, steps: int, guidance: float
) -> tuple[Inputs, dict[str, Callable[[], Any]]]:
    """Return the inputs of all, and what builds each contestant, gafext first."""
    options = {
        "num_views": views,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": 0,
        "crop": False,
    }
    run = pipe.prepare(PORTRAIT, **options)
    options["normal_maps"] = run.normal_maps  # none of the contestants draws them
    size = 2 * run.latents.shape[-1]
    noise = view_noise(0, portraits=1, views=views, shape=(run.latents.shape[1], size, size), step=NOISE_STEP)
    given = Inputs.of(pipe, run, noise)

    def stock(change: "Callable[[StockPipeline], None] | None" = None) -> "StockPipeline":
        from stock import StockPipeline  # of diffusers, which a machine may not have

        made = StockPipeline(pipe, num_views=views, guidance_scale=guidance, num_inference_steps=steps)
        if change is not None:
            change(made)
        return made

    makers: dict[str, Callable[[], Any]] = {"gafext": lambda: Ours(pipe, **options)}
    if pipe.device.type == "cuda":
        makers["gafext, graph"] = lambda: Ours(pipe, graph=True, **options)
    changes = {"stock": None, "compile": functools.partial(compiled, device=pipe.device)}
    changes["openvino"] = openvino
    return given, makers | {name: functools.partial(stock, changes[name]) for name in against}


@torch.inference_mode()
def race_pipelines(given: Inputs, makers: dict[str, Callable[[], Any]], *, rounds: int, device: torch.device) -> dict:
    """Build all contestants, compare their results, and time them in turn.

    Returns:
        By contestant: of each stage and of "all" the seconds, their median, and the ratio to gafext's (median and
        quartiles within the rounds); peak memory in bytes; differences from gafext's latents and pictures. Those that
        cannot run have a message in `failed`.
    """
    entrants, results = {}, {}
    expected: tuple[Tensor, Tensor] | None = None
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            entrant = make()
            _, latents, pictures = timed(entrant, given, device)
            release_freed_memory()
            with peak_memory(device) as peak:
                timed(entrant, given, device)
        except Exception as error:  # compilers fail in many ways
            if not entrants:
                raise
            results[name] = {"failed": str(error).partition("\n")[0] or type(error).__name__}
        else:
            entrants[name] = entrant
            expected = expected or (latents, pictures)
            results[name] = {"peak_bytes": peak.above, **differences(latents, pictures, *expected)}
        print(f"{name}, {time.perf_counter() - start:.0f} s: {results[name]}", flush=True)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in entrants}
    for _ in range(rounds):
        for name, entrant in entrants.items():
            stages = timed(entrant, given, device)[0]
            seconds[name].append({**stages, "all": sum(stages.values())})
    ours = seconds[next(iter(entrants))]
    for name, runs in seconds.items():
        results[name]["stages"] = {stage: _compared(stage, runs, ours) for stage in (*STAGES, "all")}
    return results


def differences(latents: Tensor, pictures: Tensor, expected_latents: Tensor, expected_pictures: Tensor) -> dict:
    """Return the relative norm of the latents' difference, and the largest of the pictures'."""
    latents, expected_latents = latents.float(), expected_latents.float()
    relative = (latents - expected_latents).norm() / expected_latents.norm()
    largest = (pictures.float() - expected_pictures.float()).abs().max()
    return {"latents_relative_difference": relative.item(), "pictures_largest_difference": largest.item()}


def _compared(stage: str, runs: list[dict[str, float]], ours: list[dict[str, float]]) -> dict:
    times, own = ([run[stage] for run in each] for each in (runs, ours))
    low, middle, high = ratio(times, own)
    return {"seconds": times, "median": quartiles(times)[1], "times_gafext": middle, "quartiles": [low, high]}


def table(results: dict) -> str:
    """Format how many times as long as gafext each stage takes."""
    lines = [f"{'':16}" + "".join(f"{stage:>10}" for stage in (*STAGES, "all")) + f"{'peak GiB':>10}"]
    for name, found in results.items():
        if "failed" in found:
            lines.append(f"{name:16}  {found['failed']}")
            continue
        ratios = "".join(f"{found['stages'][stage]['times_gafext']:9.2f}x" for stage in (*STAGES, "all"))
        peak = found["peak_bytes"]
        lines.append(f"{name:16}{ratios}" + ("" if peak is None else f"{peak / 2**30:10.2f}"))
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd21", metavar="sd21|built-in|FOLDER")
    parser.add_argument("--against", type=words(tuple(AGAINST)), metavar=",".join(AGAINST))
    parser.add_argument("--views", type=positive, default=4)
    parser.add_argument("--steps", type=positive, help="default: 4 on a CPU, else 50")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=json_file, metavar="FILE")
    args = parser.parse_args()
    if args.model not in ("sd21", "built-in") and not Path(args.model).is_dir():
        parser.error(f"--model: expected sd21, built-in or a checkpoint's folder, got {args.model}")
    if args.rounds < 7:
        parser.error("--rounds: expected at least 7: a median of fewer says little")
    if args.guidance <= 1:
        parser.error(f"--guidance: expected above 1, got {args.guidance}: all contestants run both passes")
    if args.against is None:
        args.against = [name for name in AGAINST if args.device == "cpu" or name != "openvino"]
        args.against = [name for name in args.against if not missing_packages([name])]
    elif missing := missing_packages(args.against):
        parser.error(f"--against: expected {' and '.join(missing)} to be installed: pip install {' '.join(missing)}")
    args.steps = args.steps or (4 if args.device == "cpu" else 50)
    return args


def main() -> None:
    args = arguments()
    device, share_of_others = torch.device(args.device), watch_others()
    if args.model == "sd21":
        pipe = random_pipeline(device, args.dtype, upsampler=True)
    else:
        model = None if args.model == "built-in" else args.model
        pipe = MultiViewDiffusionPipeline.from_pretrained(model, args.dtype, device)
    given, makers = contestants(pipe, args.against, views=args.views, steps=args.steps, guidance=args.guidance)
    packages = dict.fromkeys(["transformers", *(AGAINST[name] for name in args.against)])
    results = race_pipelines(given, makers, rounds=args.rounds, device=device)
    print(table(results))
    found = {
        "environment": environment(args.device),
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "peers": {name: importlib.metadata.version(name) for name in packages if args.against},
        "others_busy": share_of_others(),
        "contestants": results,
    }
    write(found, args.json)
    if not args.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
