"""Seconds of a U-Net pass, of a step, and peak memory of the whole pipeline at the published sizes, random weights.

    python benchmarks/full_size.py [--backend auto sdpa reference] [--views 4] [--steps 2] [--json FILE]
    python benchmarks/full_size.py --backend auto sdpa --rounds 0 [--json FILE]     the U-Net alone

SD 2.1's U-Net with attn_cv and attn_ip, ViT-H/14 and the SD autoencoder. The backends take turns in one process; peak
memory is the process's high-water mark after the pipeline's runs, so it is honest for one backend a run. The
U-Net's passes come last, on CPUs with one more contestant: its transformers in 8-bit integers.
"""

import argparse
import copy
import itertools
import json
import platform
import resource
import statistics
import time

import torch

from gafext import PORTRAIT, MultiViewDiffusionPipeline, int8
from gafext.attention import set_attention_backend
from gafext.config import CLIP_VIT_H_14, SD21_MULTIVIEW_UNET, SD_SCHEDULE, SD_VAE
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.scheduler import DDIMScheduler
from gafext.versions import versions


def random_network(network_class, config, device, dtype):
    """Small random weights, drawn in place: torch's own initialisation takes a minute at this size."""
    with torch.device("meta"):
        network = network_class(config)
    network = network.to_empty(device=device).to(dtype)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.uniform_(-(parameter[0].numel() ** -0.5), parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))  # normalisations: 1 and 0
    return network.eval()


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def race_unet(unet: MultiViewUNet, backends: list[str], views: int, rounds: int) -> dict:
    """One forward pass of a step with guidance, and the same with the transformers in 8-bit integers.

    Returns:
        By contestant: the seconds a pass, their median, and against the first contestant: times as long (the median and
        the quartiles of the ratios within a round), the largest difference, and the norm of all differences to that of
        the first one's result.
    """
    device, dtype = next(unet.parameters()).device, next(unet.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    latents, pose, image_embeds = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((2 * views, unet.config.in_channels, 32, 32), (2 * views, 12), (2, 257, 1024))
    )
    contestants = [(backend, backend, unet) for backend in backends]
    if dtype == torch.float32 and not int8.unsupported_reasons(device):
        # A copy of the modules only, so that the weights which stay as they are lie in memory once.
        quantized = copy.deepcopy(unet, memo={id(weight): weight for weight in unet.parameters()})
        int8.quantize_transformers(quantized)
        contestants.append(("int8", "auto", quantized))

    seconds: dict[str, list[float]] = {name: [] for name, _, _ in contestants}
    results, conditioning = {}, {}
    for round_ in range(rounds + 1):
        for name, backend, network in contestants:
            set_attention_backend(network, backend)
            if name not in conditioning:
                conditioning[name] = network.precompute(pose=pose, image_embeds=image_embeds)
            synchronize(device)
            start = time.perf_counter()
            results[name] = network(latents, 500, conditioning=conditioning[name], num_views=views).float()
            synchronize(device)
            if round_ > 0:  # the first is for the results, and to warm up
                seconds[name].append(time.perf_counter() - start)
    first = results[backends[0]]
    summary = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[backends[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        difference = results[name] - first
        summary[name] = {
            "seconds": times,
            "median": statistics.median(times),
            f"times_{backends[0]}": middle,
            "quartiles": [low, high],
            "largest_difference": difference.abs().max().item(),
            "relative_difference": (difference.norm() / first.norm()).item(),
        }
        print(f"U-Net, {name}: {middle:.3f} ({low:.3f} .. {high:.3f}) times as long as {backends[0]}", flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["auto", "sdpa", "reference"])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=1, help="whole runs of the pipeline a backend, taking turns")
    parser.add_argument("--unet-rounds", type=int, default=7, help="passes of the U-Net alone; 0: none, else 7 or more")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if 0 < args.unet_rounds < 7:
        parser.error("--unet-rounds: expected at least 7: a median of fewer says little")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    pipe = MultiViewDiffusionPipeline(
        unet=random_network(MultiViewUNet, SD21_MULTIVIEW_UNET, device, dtype),
        vae=random_network(AutoencoderKL, SD_VAE, device, dtype),
        image_encoder=random_network(CLIPVisionEncoder, CLIP_VIT_H_14, device, dtype),
        scheduler=DDIMScheduler(SD_SCHEDULE),
    )
    print(f"weights loaded: {peak_gib(device):.1f} GiB")

    steps: dict[str, list[float]] = {backend: [] for backend in args.backend}
    totals: dict[str, list[float]] = {backend: [] for backend in args.backend}
    for _ in range(args.rounds):
        for backend in args.backend:
            pipe.set_attention_backend(backend)
            marks = []

            def mark(pipe, step, timestep, kwargs, marks=marks):
                synchronize(device)
                marks.append(time.perf_counter())

            start = time.perf_counter()
            pipe(
                PORTRAIT,
                num_views=args.views,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                generator=0,
                callback_on_step_end=mark,
                progress_bar=False,
            )
            totals[backend].append(time.perf_counter() - start)
            # The first step's start is not marked, so only the gaps between marks count.
            steps[backend] += [b - a for a, b in itertools.pairwise(marks)]
            print(f"{backend}: {totals[backend][-1]:.1f} s in all, peak {peak_gib(device):.1f} GiB", flush=True)
    peak = peak_gib(device)
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "peak_gib": peak,
        "seconds_a_step": {backend: statistics.median(values) for backend, values in steps.items() if values},
        "seconds_in_all": {backend: statistics.median(values) for backend, values in totals.items() if values},
        "unet": race_unet(pipe.unet, args.backend, args.views, args.unet_rounds) if args.unet_rounds else {},
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
