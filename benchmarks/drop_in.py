"""Time a stock U-Net of Stable Diffusion 2.1 in diffusers: as it is, compiled, accelerated, and in gafext's own class.

    python benchmarks/drop_in.py [--batch 8] [--rounds 7] [--no-compile] [--json FILE]

All have the same random weights in memory once, take turns in one process, and are compared with the stock network.
malloc keeps freed memory for all of them, which gafext sets for the process.
"""

import argparse
import copy
import json

import torch
from race import Contestant, diffusers_sd21, json_file, positive, race, random_network, write

import gafext
from gafext.bench.environment import environment
from gafext.config import SD21_UNET
from gafext.models.unet import MultiViewUNet


def contestants(batch: int, compiled: bool) -> list[Contestant]:
    """Build the U-Nets of one set of weights, and their pass of [batch,4,32,32] latents with 77 text tokens."""
    device, dtype = torch.device("cpu"), torch.float32
    stock = random_network(diffusers_sd21, None, device, dtype)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, 32, 32, generator=generator)
    text = torch.randn(batch, 77, 1024, generator=generator)
    timestep = torch.tensor(500)

    # A copy of the modules, but not of the weights.
    accelerated = copy.deepcopy(stock, memo={id(weight): weight for weight in stock.parameters()})
    print(gafext.accelerate(accelerated))
    with torch.device("meta"):
        own = MultiViewUNet(SD21_UNET)
    own.load_state_dict(stock.state_dict(), assign=True)

    found = [
        Contestant("stock", lambda: stock(latents, timestep, text).sample),
        Contestant("accelerated", lambda: accelerated(latents, timestep, text).sample),
        Contestant("gafext", lambda: own.eval()(latents, timestep, text)),
    ]
    if compiled:
        graph = torch.compile(stock)
        found.append(Contestant("compiled", lambda: graph(latents, timestep, text).sample))
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--json", type=json_file, metavar="FILE")
    args = parser.parse_args()
    makers = {contestant.name: contestant.warmed_up for contestant in contestants(args.batch, not args.no_compile)}
    result = {
        "environment": environment("cpu"),
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "unet": race(makers, args.rounds, torch.device("cpu")),
    }
    write(result, args.json)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
