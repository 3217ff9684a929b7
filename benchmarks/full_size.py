"""Seconds a step and peak memory of the whole pipeline at the published sizes, with random weights.

    python benchmarks/full_size.py [--backend auto sdpa reference] [--views 4] [--steps 2] [--json FILE]

SD 2.1's U-Net with attn_cv and attn_ip, ViT-H/14 and the SD autoencoder. The backends take turns, step by step, in one
process; peak memory is the process's high-water mark, so it is honest for one backend a run.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import time

import torch

from gafext import PORTRAIT, MultiViewDiffusionPipeline
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["auto", "sdpa", "reference"])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=1, help="whole runs a backend, taking turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
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
                if device.type == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

            start = time.perf_counter()
            output = pipe(
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
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "size": output.images[0].size,
        "peak_gib": peak_gib(device),
        "seconds_a_step": {backend: statistics.median(values) for backend, values in steps.items() if values},
        "seconds_in_all": {backend: statistics.median(values) for backend, values in totals.items()},
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
