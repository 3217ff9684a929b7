"""Measure the peak memory of a pass of the networks at published sizes on the CPU, beside their random weights.

    python benchmarks/memory.py [--part unet,8,32 ...] [--dtype float32] [--json FILE]

A part is a network, the rows of its batch and the side of its latents (of its result, for the upsampler). Each is
measured in a process of its own. The estimate of gafext/checkpoints/estimate.py was fitted to these peaks, and a test
holds it to them.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from race import json_file, random_network, write
from torch import Tensor

from gafext.bench.environment import environment
from gafext.config import SD21_MULTIVIEW_UNET, SD_VAE, SD_X2_UNET
from gafext.models.k_unet import KUNet
from gafext.models.unet import MultiViewUNet
from gafext.models.vae import AutoencoderKL
from gafext.ops import memory
from gafext.watch.peak import peak_memory

PARTS = ["unet,8,32", "unet,8,64", "upsampler,1,64", "upsampler,1,128"]
PARTS += ["decoder,1,32", "decoder,4,32", "decoder,1,64", "decoder,1,128"]


def passes(part: str, rows: int, size: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Build a network, and return one pass of it."""
    cpu = torch.device("cpu")
    if part == "decoder":
        vae = random_network(AutoencoderKL, SD_VAE, cpu, dtype)
        latents = torch.randn(rows, SD_VAE.latent_channels, size, size).to(dtype)
        return lambda: vae.decode(latents)
    if part == "upsampler":
        network = random_network(KUNet, SD_X2_UNET, cpu, dtype)
        shapes = (rows, SD_X2_UNET.in_channels, size, size), (1, 77, SD_X2_UNET.cross_attention_dim), (1, 896)
        sample, text, condition = (torch.randn(shape).to(dtype) for shape in shapes)
        return lambda: network(sample, torch.ones(1), text, condition)
    unet = random_network(MultiViewUNet, SD21_MULTIVIEW_UNET, cpu, dtype)
    inputs = torch.randn(rows, 12).to(dtype), torch.randn(2, 257, 1024).to(dtype)
    conditioning = unet.precompute(pose=inputs[0], image_embeds=inputs[1])
    sample = torch.randn(rows, unet.config.in_channels, size, size).to(dtype)
    return lambda: unet(sample, 500.0, conditioning=conditioning, num_views=rows // 2)


@torch.inference_mode()
def measure(part: str, rows: int, size: int, dtype: str) -> dict:
    run = passes(part, rows, size, getattr(torch, dtype))
    gc.collect()
    memory.release_freed_memory()
    start = time.perf_counter()
    with peak_memory(torch.device("cpu")) as peak:
        run()
    found = {"part": part, "rows": rows, "size": size, "dtype": dtype, "weights": peak.before}
    return found | {"bytes": peak.above, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=PARTS, metavar="NETWORK,ROWS,SIZE")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", type=json_file, metavar="FILE")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one part, in a process of its own
    args = parser.parse_args()
    if args.measure:
        part, rows, size = args.measure.split(",")
        print(json.dumps(measure(part, int(rows), int(size), args.dtype)))
        return
    found = {"environment": environment("cpu"), "peaks": []}
    for part in args.part:
        words = [sys.executable, __file__, "--measure", part, "--dtype", args.dtype]
        found["peaks"].append(json.loads(subprocess.check_output(words, text=True)))
        print(part, f"{found['peaks'][-1]['bytes'] / 2**30:.2f} GiB", flush=True)
        write(found, args.json)


if __name__ == "__main__":
    main()
