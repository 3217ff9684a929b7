"""Time U-Net passes and denoising steps, and measure peak memory, at published sizes with random weights.

    python benchmarks/full_size.py [--backend auto sdpa reference] [--views 4] [--steps 2] [--json FILE]
    python benchmarks/full_size.py --backend auto sdpa --rounds 0 [--json FILE]     only the U-Net
    python benchmarks/full_size.py --whole --backend auto sdpa --unet-rounds 0 [--dtype int8] [--json FILE]
    python benchmarks/full_size.py --peers openvino,diffusers,compile [--precisions float32,int8] [--json FILE]

SD 2.1's U-Net with attn_cv and attn_ip, ViT-H/14 and the SD autoencoder. The backends take turns in one process; peak
memory is the process's high-water mark after the runs of the pipeline, so it is valid only with one backend per run.
The U-Net's passes are timed last. On CPUs, 8-bit transformers are timed as well. On GPUs, each backend is timed both
directly and as a CUDA graph, and so is diffusers' U-Net of SD 2.1, if installed, which has neither attn_cv nor attn_ip
and computes less.

--whole adds sd-x2-latent-upscaler, which makes the views 512x512, and takes 50 steps. --peers times a stock U-Net of
SD 2.1 on the CPU instead, in gafext and its peers (peers.py); all precisions together need about 25 GiB at batch 8.
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from peers import PEERS, PRECISIONS, missing_packages, race_peers
from race import (
    Contestant,
    device_name,
    diffusers_sd21,
    json_file,
    peak_gib,
    positive,
    race,
    random_network,
    synchronize,
    write,
)
from torch import Tensor

from gafext import PORTRAIT, MultiViewDiffusionPipeline
from gafext.config import CLIP_VIT_H_14, SD21_MULTIVIEW_UNET, SD_SCHEDULE, SD_VAE, SD_X2_UNET
from gafext.models import int8
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.k_unet import KUNet
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.schedulers import DDIMScheduler
from gafext.upsampler import LatentUpsampler, PromptEmbeds
from gafext.versions import versions

DTYPES = ("float32", "float16", "bfloat16", "int8")


def unet_contestants(unet: MultiViewUNet, backends: list[str], views: int) -> list[Contestant]:
    """Build a U-Net pass with guidance for every backend, with 8-bit transformers (CPU), and with diffusers (CUDA)."""
    device, dtype = next(unet.parameters()).device, next(unet.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    latents, pose, image_embeds = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((2 * views, unet.config.in_channels, 32, 32), (2 * views, 12), (2, 257, 1024))
    )
    # On the device, because a CUDA graph cannot copy a number there.
    timestep = torch.tensor([500], device=device)

    def contestant(name: str, network: MultiViewUNet, backend: str) -> Contestant:
        conditioning = network.precompute(pose=pose, image_embeds=image_embeds)
        run = lambda: network(latents, timestep, conditioning=conditioning, num_views=views)  # noqa: E731
        return Contestant(name, run, network, backend)

    contestants = [contestant(backend, unet, backend) for backend in backends]
    if dtype == torch.float32 and not (int8.is_quantized(unet) or int8.unsupported_reasons(device)):
        # Copy modules but not weights, so that unquantized weights are in memory only once.
        quantized = copy.deepcopy(unet, memo={id(weight): weight for weight in unet.parameters()})
        int8.quantize(quantized)
        contestants.append(contestant("int8", quantized, "auto"))
    if device.type == "cuda" and importlib.util.find_spec("diffusers"):
        plain = random_network(diffusers_sd21, None, device, dtype)
        text = torch.randn(2 * views, 77, 1024, generator=generator).to(device, dtype)
        run = lambda: plain(latents[:, :4], timestep, encoder_hidden_states=text).sample  # noqa: E731
        contestants.append(Contestant("diffusers, single view", run, comparable=False))
    return contestants


def graphed(contestant: Contestant) -> Contestant:
    """Capture the same pass as a CUDA graph, which has no launch overhead on the CPU."""
    contestant.prepare()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # initialisation on first use cannot be captured
            contestant.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = contestant.run()

    def replay() -> Tensor:
        graph.replay()
        return out

    result = replay().float().clone()
    return Contestant(f"{contestant.name}, CUDA graph", replay, comparable=contestant.comparable, result=result)


@torch.inference_mode()
def race_unet(unet: MultiViewUNet, backends: list[str], views: int, rounds: int) -> dict:
    """Time all contestants in turn; the result is that of `race.race`."""
    contestants = unet_contestants(unet, backends, views)
    makers: dict[str, Callable[[], Contestant]] = {c.name: c.warmed_up for c in contestants}
    if unet.device.type == "cuda":
        makers |= {f"{c.name}, CUDA graph": functools.partial(graphed, c) for c in contestants}
    return race(makers, rounds, unet.device)


def random_pipeline(device: torch.device, dtype: str, *, upsampler: bool) -> MultiViewDiffusionPipeline:
    """Build a pipeline of published sizes; `dtype` is one of `DTYPES`, int8 as of `from_pretrained`."""
    if dtype == "int8":
        int8.require_supported(device)
    torch_dtype = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    network = functools.partial(random_network, device=device, dtype=torch_dtype)
    doubling = None
    if upsampler:
        width = SD_X2_UNET.cross_attention_dim
        prompt = PromptEmbeds(torch.zeros(1, 77, width), torch.zeros(1, width))
        doubling = LatentUpsampler(network(KUNet, SD_X2_UNET), empty_prompt=prompt)
    pipe = MultiViewDiffusionPipeline(
        unet=network(MultiViewUNet, SD21_MULTIVIEW_UNET),
        vae=network(AutoencoderKL, SD_VAE),
        image_encoder=network(CLIPVisionEncoder, CLIP_VIT_H_14),
        scheduler=DDIMScheduler(SD_SCHEDULE),
        upsampler=doubling,
    )
    if dtype == "int8":
        int8.quantize(pipe.unet)
    return pipe


def time_stages(pipe: MultiViewDiffusionPipeline, args: argparse.Namespace) -> tuple[dict[str, float], list[float]]:
    """Run the pipeline once: seconds of its stages, and of each step but the first."""
    device, marks = pipe.unet.device, []

    def mark(*_) -> None:
        synchronize(device)
        marks.append(time.perf_counter())

    options = {"num_views": args.views, "num_inference_steps": args.steps, "guidance_scale": args.guidance}
    start = time.perf_counter()
    run = pipe.prepare(PORTRAIT, generator=0, **options)
    synchronize(device)
    prepared = time.perf_counter()
    latents = pipe.denoise(run, callback_on_step_end=mark)
    synchronize(device)
    denoised = time.perf_counter()
    pipe.finish(run, latents)
    end = time.perf_counter()
    stages = {"prepare": prepared - start, "denoise": denoised - prepared, "finish": end - denoised}
    # The start of the first step is not marked, so only intervals between marks are used.
    return stages, [b - a for a, b in itertools.pairwise(marks)]


def time_pipeline(pipe: MultiViewDiffusionPipeline, args: argparse.Namespace) -> dict:
    """Run the pipeline with each backend in turn, `args.rounds` times."""
    steps: dict[str, list[float]] = {backend: [] for backend in args.backend}
    stages: dict[str, list[dict[str, float]]] = {backend: [] for backend in args.backend}
    for _ in range(args.rounds):
        for backend in args.backend:
            pipe.set_attention_backend(backend)
            seconds, seconds_of_steps = time_stages(pipe, args)
            stages[backend].append(seconds)
            steps[backend] += seconds_of_steps
            total, peak = sum(seconds.values()), peak_gib(pipe.unet.device)
            print(f"{backend}: {total:.1f} s in all, peak {peak:.1f} GiB", flush=True)
    median = statistics.median
    return {
        "peak_gib": peak_gib(pipe.unet.device),
        "seconds_a_step": {backend: median(values) for backend, values in steps.items() if values},
        "seconds_in_all": {backend: median(sum(s.values()) for s in runs) for backend, runs in stages.items() if runs},
        "seconds_of_stages": {
            backend: {stage: median(s[stage] for s in runs) for stage in runs[0]}
            for backend, runs in stages.items()
            if runs
        },
    }


def words(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return a parser of words separated by commas."""

    def parse(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [word for word in given if word not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {','.join(unknown)}")
        return given

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["auto", "sdpa", "reference"])
    parser.add_argument("--views", type=positive, default=4)
    parser.add_argument("--steps", type=positive, help="default: 2, with --whole 50")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument(
        "--rounds", type=int, default=1, help="runs of the whole pipeline per backend, in turn; not with --peers"
    )
    parser.add_argument("--unet-rounds", type=int, default=7, help="timed passes of the U-Net, 0 or at least 7")
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="int8: as of `from_pretrained`, on a CPU")
    parser.add_argument("--whole", action="store_true", help="with the upsampler: views of 512x512")
    parser.add_argument("--json", type=json_file, metavar="FILE")
    peers = parser.add_argument_group("with --peers")
    peers.add_argument("--peers", type=words(tuple(PEERS)), metavar=",".join(PEERS))
    peers.add_argument("--precisions", type=words(PRECISIONS), default=list(PRECISIONS), metavar=",".join(PRECISIONS))
    peers.add_argument("--batch", type=positive, default=8)
    peers.add_argument("--size", type=positive, default=32, help="of the latents")
    args = parser.parse_args()
    if 0 < args.unet_rounds < 7:
        parser.error("--unet-rounds: expected at least 7: a median of fewer says little")
    if args.peers and not args.unet_rounds:
        parser.error("--peers: expected --unet-rounds of at least 7")
    if args.peers and (missing := missing_packages(args.peers)):
        parser.error(f"--peers: expected {' and '.join(missing)} to be installed: pip install {' '.join(missing)}")
    if args.dtype == "int8" and (reasons := int8.unsupported_reasons(torch.device(args.device))):
        parser.error("--dtype: " + "; ".join(reasons))
    args.steps = args.steps or (50 if args.whole else 2)
    return args


def main() -> None:
    args = arguments()
    given = {name: value for name, value in vars(args).items() if name != "json"}
    if args.peers:
        size = {"batch": args.batch, "size": args.size, "rounds": args.unet_rounds}
        result = {"arguments": given, **race_peers(args.peers, args.precisions, **size)}
        write(result, args.json)
        print(json.dumps(result, indent=2))
        return
    device = torch.device(args.device)
    pipe = random_pipeline(device, args.dtype, upsampler=args.whole)
    print(f"weights loaded: {peak_gib(device):.1f} GiB")
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "arguments": given,
        **time_pipeline(pipe, args),
        "unet": {},
        "versions": versions(),
    }
    write(result, args.json)  # now, in case the following passes fail
    if args.unet_rounds:
        result["unet"] = race_unet(pipe.unet, args.backend, args.views, args.unet_rounds)
        write(result, args.json)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
