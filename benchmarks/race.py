"""What the scripts of this folder share: networks of random weights, and contestants that take turns in one process."""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gafext.checkpoints.memory import usable_device
from gafext.ops.backend import set_attention_backend


def json_file(name: str) -> str:
    """Return the value of `--json`, refused before anything is measured if its folder is not there."""
    if not Path(name).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {name}")
    return name


def positive(text: str) -> int:
    """Return a number of the command line that says how many; at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def device_name(name: str) -> str:
    """Return the value of `--device`, refused if nothing can be put there."""
    try:
        usable_device(name, option="got")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a device of this machine, {error}") from None
    return name


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


def race(
    makers: dict[str, Callable[[], Contestant]],
    rounds: int,
    device: torch.device,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Make all contestants, then time them in turn, round by round.

    Args:
        makers: by name, what builds a contestant and warms it up; raises a RuntimeError or a ValueError if it cannot.
        rounds: timed passes of each contestant.
        device: the device that they run on.
        clock: time.process_time counts CPU seconds, for a machine that others use too.

    Returns:
        Per contestant: seconds of each pass and their median; relative to the first contestant, the ratio of times
        (median and quartiles over the rounds), the largest difference and the relative norm of the differences; on a
        GPU the peak memory. Contestants that cannot run have a message in `failed`.

    Raises:
        RuntimeError: the first contestant cannot run.
    """
    entrants, failed = [], {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            entrants.append(make())
            print(f"U-Net, {name}: built and run once in {time.perf_counter() - start:.0f} s", flush=True)
        except (RuntimeError, ValueError) as error:
            failed[name] = {"failed": str(error).partition("\n")[0]}
            print(f"U-Net, {name}: {failed[name]}", flush=True)
    leader = next(iter(makers))
    if leader in failed:
        raise RuntimeError(f"{leader}: {failed[leader]}")
    seconds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for _ in range(rounds):
        for entrant in entrants:
            entrant.prepare()
            synchronize(device)
            start = clock()
            entrant.run()
            synchronize(device)
            seconds[entrant.name].append(clock() - start)
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


def write(result: dict, path: str | None) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=2)
