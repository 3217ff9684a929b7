"""Time U-Net passes and denoising steps, and measure peak memory, at published sizes with random weights.

    python benchmarks/full_size.py [--backend auto sdpa reference] [--views 4] [--steps 2] [--json FILE]
    python benchmarks/full_size.py --backend auto sdpa --rounds 0 [--json FILE]     only the U-Net

SD 2.1's U-Net with attn_cv and attn_ip, ViT-H/14 and the SD autoencoder. The backends take turns in one process; peak
memory is the process's high-water mark after the runs of the pipeline, so it is valid only with one backend per run.
The U-Net's passes are timed last. On CPUs, 8-bit transformers are timed as well. On GPUs, each backend is timed both
directly and as a CUDA graph, and so is diffusers' U-Net of SD 2.1, if installed, which has neither attn_cv nor attn_ip
and computes less.
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gafext import PORTRAIT, MultiViewDiffusionPipeline
from gafext.config import CLIP_VIT_H_14, SD21_MULTIVIEW_UNET, SD_SCHEDULE, SD_VAE
from gafext.models import int8
from gafext.models.clip import CLIPVisionEncoder
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.ops.backend import set_attention_backend
from gafext.schedulers import DDIMScheduler
from gafext.versions import versions


def random_network(network_class, config, device, dtype):
    """Build a network with small random weights; torch's initialisation would take a minute at this size."""
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


@dataclass
class Contestant:
    name: str
    run: Callable[[], Tensor]
    network: nn.Module | None = None  # its backend is set before each timing
    backend: str = "auto"
    comparable: bool = True  # computes the same function as the first contestant
    result: Tensor | None = None  # set by warmed_up, with peak_gib
    peak_gib: float | None = None

    def prepare(self) -> None:
        if self.network is not None:
            set_attention_backend(self.network, self.backend)

    def warmed_up(self) -> "Contestant":
        self.prepare()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.result = self.run().float()
        if self.result.is_cuda:
            self.peak_gib = peak_gib(self.result.device)
        return self


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
    if dtype == torch.float32 and not int8.unsupported_reasons(device):
        # Copy modules but not weights, so that unquantized weights are in memory only once.
        quantized = copy.deepcopy(unet, memo={id(weight): weight for weight in unet.parameters()})
        int8.quantize_transformers(quantized)
        contestants.append(contestant("int8", quantized, "auto"))
    if device.type == "cuda" and importlib.util.find_spec("diffusers"):
        plain = random_network(diffusers_sd21, None, device, dtype)
        text = torch.randn(2 * views, 77, 1024, generator=generator).to(device, dtype)
        run = lambda: plain(latents[:, :4], timestep, encoder_hidden_states=text).sample  # noqa: E731
        contestants.append(Contestant("diffusers, single view", run, comparable=False))
    return contestants


def diffusers_sd21(_: None) -> nn.Module:
    from diffusers import UNet2DConditionModel

    widths, heads = (320, 640, 1280, 1280), (5, 10, 20, 20)
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=widths,
        attention_head_dim=heads,  # the number of heads, despite the name
        cross_attention_dim=1024,
        use_linear_projection=True,
    )


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
    """Time all contestants in turn, round by round.

    Returns:
        Per contestant: seconds of each pass and their median; relative to the first contestant, the ratio of times
        (median and quartiles over the rounds), the largest difference and the relative norm of the differences; on a
        GPU the peak memory. Contestants that cannot run have a message in `failed`.
    """
    contestants = unet_contestants(unet, backends, views)
    makers = [(contestant.name, contestant.warmed_up) for contestant in contestants]
    if unet.device.type == "cuda":
        makers += [(f"{c.name}, CUDA graph", functools.partial(graphed, c)) for c in contestants]
    entrants, failed = [], {}
    for name, make in makers:
        try:
            entrants.append(make())
        except (RuntimeError, ValueError) as error:
            failed[name] = {"failed": str(error).partition("\n")[0]}
            print(f"U-Net, {name}: {failed[name]}", flush=True)
    if backends[0] in failed:
        raise RuntimeError(f"{backends[0]}: {failed[backends[0]]}")
    seconds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for _ in range(rounds):
        for entrant in entrants:
            entrant.prepare()
            synchronize(unet.device)
            start = time.perf_counter()
            entrant.run()
            synchronize(unet.device)
            seconds[entrant.name].append(time.perf_counter() - start)
    first = entrants[0]
    return failed | {e.name: compared(e, seconds[e.name], first, seconds[first.name]) for e in entrants}


def compared(entrant: Contestant, times: list[float], first: Contestant, firsts_times: list[float]) -> dict:
    ratios = [a / b for a, b in zip(times, firsts_times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(f"U-Net, {entrant.name}: {middle:.3f} ({low:.3f} .. {high:.3f}) times as long as {first.name}", flush=True)
    found = {"seconds": times, "median": statistics.median(times), f"times_{first.name}": middle}
    found["quartiles"] = [low, high]
    if entrant.comparable:
        difference = entrant.result - first.result
        found["largest_difference"] = difference.abs().max().item()
        found["relative_difference"] = (difference.norm() / first.result.norm()).item()
    return found | ({"peak_gib": entrant.peak_gib} if entrant.peak_gib else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["auto", "sdpa", "reference"])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=1, help="runs of the whole pipeline per backend, in turn")
    parser.add_argument("--unet-rounds", type=int, default=7, help="timed passes of the U-Net, 0 or at least 7")
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
            # The start of the first step is not marked, so only intervals between marks are used.
            steps[backend] += [b - a for a, b in itertools.pairwise(marks)]
            print(f"{backend}: {totals[backend][-1]:.1f} s in all, peak {peak_gib(device):.1f} GiB", flush=True)
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "peak_gib": peak_gib(device),
        "seconds_a_step": {backend: statistics.median(values) for backend, values in steps.items() if values},
        "seconds_in_all": {backend: statistics.median(values) for backend, values in totals.items() if values},
        "unet": {},
        "versions": versions(),
    }
    write(result, args.json)  # now, in case the following passes fail
    if args.unet_rounds:
        result["unet"] = race_unet(pipe.unet, args.backend, args.views, args.unet_rounds)
        write(result, args.json)
    print(json.dumps(result, indent=2))


def write(result: dict, path: str | None) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
