"""Measure the peak memory of whole runs of one step, on a CPU, of a pipeline of SD 2.1's size with random weights.

    python benchmarks/whole_runs.py [--run "4 views, 1024x1024" ...] [--json FILE]

Each run is a process of its own: the peak of a process never falls.
"""

import argparse
import multiprocessing
import time
import warnings

import torch
from full_size import random_pipeline
from race import json_file, write

from gafext import PORTRAIT
from gafext.bench.environment import environment
from gafext.output import MultiViewOutput
from gafext.watch.peak import peak_memory

RUNS = {  # views, side of the latents, upsampler
    "32 views, 256x256": (32, 32, False),
    "4 views, 1024x1024": (4, 64, True),
}


def measure(name: str) -> dict[str, int]:
    views, size, upsampler = RUNS[name]
    warnings.simplefilter("ignore")
    pipe = random_pipeline(torch.device("cpu"), "float32", upsampler=upsampler)
    noise = torch.randn(views, 4, size, size, generator=torch.Generator().manual_seed(0))
    options = {"num_views": views, "num_inference_steps": 1, "guidance_scale": 3.0, "latents": noise}
    start = time.monotonic()
    with peak_memory(torch.device("cpu")) as peak:
        output = pipe(PORTRAIT, upsample="auto" if upsampler else "none", output_type="pt", **options)
    assert isinstance(output, MultiViewOutput) and isinstance(output.images, torch.Tensor) and peak.bytes is not None
    side = output.images.shape[-1]
    assert name == f"{views} views, {side}x{side}"
    return {"before": peak.before, "peak": peak.bytes, "seconds": round(time.monotonic() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--json", type=json_file, metavar="FILE")
    args = parser.parse_args()
    result = {"environment": environment("cpu"), "command": "python benchmarks/whole_runs.py --json FILE", "runs": {}}
    for name in args.run:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            found = result["runs"][name] = process.apply(measure, (name,))
        print(
            f"{name}: {found['peak'] / 2**30:.2f} GiB, {found['before'] / 2**30:.2f} of them before the call",
            flush=True,
        )
    write(result, args.json)


if __name__ == "__main__":
    main()
