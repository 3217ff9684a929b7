"""Measure what a choice of precision costs and gains: the table of docs/precision.md.

    python benchmarks/precision.py [--choices linear,int8,bfloat16] [--rounds 7] [--steps 25] [--json FILE]
    python benchmarks/precision.py --table FILE        print the table of earlier runs

For each choice: the error and the CPU time of a pass of a stock U-Net of SD 2.1's size with random weights, relative to
float32 and in turn with it (--rounds 0: not measured); and the PSNR of the built-in model's views against those of
float32 (--steps 0). What an earlier run wrote to FILE, and this one does not measure, stays in it.
"""

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from full_size import words
from peers import Inputs
from precision_table import TITLES, table
from race import Contestant, json_file, positive, race, random_network, write
from torch import nn

from gafext import PORTRAIT, MultiViewDiffusionPipeline
from gafext.assets import CartoonWarning
from gafext.bench.environment import environment, watch_others
from gafext.config import SD21_UNET
from gafext.evaluation.measures import psnr
from gafext.models import int8
from gafext.models.blocks import Conv3x3
from gafext.models.unet import MultiViewUNet


def other_than(*kinds: type[nn.Module]) -> Callable[[MultiViewUNet], Iterable[nn.Module]]:
    return lambda unet: (layer for layer in unet.modules() if type(layer) not in kinds)


IN_8_BITS: dict[str, Callable[[MultiViewUNet], Iterable[nn.Module]]] = {
    "linear": other_than(nn.Linear),
    "linear+3x3": other_than(nn.Linear, Conv3x3),
    "int8-inner": lambda unet: [*unet.down_blocks[0].modules(), *unet.up_blocks[-1].modules()],
    "int8": lambda unet: [],
}
"""Which layers of a float32 U-Net stay so, of its linear layers and wide convolutions; dtype="int8" is in between."""
_NARROW = 32  # channels of the built-in model's convolutions are from 64 on; conv_in and conv_out have fewer than this


def in_8_bits(exact: MultiViewUNet) -> MultiViewUNet:
    """Return the network with all layers rounded, also narrow ones; what stays float32 is shared with `exact`."""
    network = copy.deepcopy(exact, memo={id(weight): weight for weight in exact.parameters()})
    int8.quantize_transformers(network)
    int8.quantize_convolutions(network, min_channels=_NARROW)
    return network


def mixed(exact: MultiViewUNet, rounded: MultiViewUNet, choice: str) -> MultiViewUNet:
    """Return the network of a choice in `IN_8_BITS`, which shares all weights with the other two."""
    shared = {id(weight): weight for weight in (*rounded.parameters(), *rounded.buffers())}
    network, kept = copy.deepcopy(rounded, memo=shared), set(IN_8_BITS[choice](exact))
    for path, layer in exact.named_modules():
        if layer in kept and not any(layer.children()):
            network.set_submodule(path, layer)
    return network


def race_unet(choices: list[str], *, batch: int, size: int, rounds: int) -> dict:
    """Race a pass of [batch,4,size,size] latents with 77 text tokens; the result is that of `race.race`."""
    exact = random_network(MultiViewUNet, SD21_UNET, torch.device("cpu"), torch.float32)
    rounded = in_8_bits(exact) if set(choices) & set(IN_8_BITS) else exact
    inputs = Inputs.random(batch, size, seed=0, timestep=500.0)

    def contestant(choice: str) -> Contestant:
        if choice in IN_8_BITS:
            network = mixed(exact, rounded, choice)
        else:
            network = exact if choice == "float32" else copy.deepcopy(exact).to(getattr(torch, choice))
        own = inputs.to(network.dtype)
        return Contestant(choice, lambda: network(*own)).warmed_up()

    makers = {choice: lambda choice=choice: contestant(choice) for choice in ("float32", *choices)}
    return race(makers, rounds, torch.device("cpu"), clock=time.process_time)


def views_psnr(choices: list[str], *, steps: int) -> dict[str, float]:
    """Measure the PSNR in dB of the built-in model's views of its portrait, all pixels of all views together.

    Its convolutions are too narrow for dtype="int8"; here they are rounded, so that the views show what that does.
    """

    def views(choice: str) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CartoonWarning)
            dtype = None if choice in IN_8_BITS else choice
            pipe = MultiViewDiffusionPipeline.from_pretrained(dtype=dtype, device="cpu")
        if choice in IN_8_BITS:
            unet = mixed(pipe.unet, in_8_bits(pipe.unet), choice)
            pipe = MultiViewDiffusionPipeline(**pipe.components | {"unet": unet})
            pipe.set_attention_backend("kernel")  # "auto" leaves narrow convolutions to PyTorch, which rounds no input
        images = pipe(PORTRAIT, num_inference_steps=steps, generator=0, output_type="pt", progress_bar=False).images
        assert isinstance(images, torch.Tensor)
        return images.float().flatten(0, 1)[None]

    exact, found = views("float32"), {}
    for choice in choices:
        found[choice] = psnr(views(choice), exact).item()
        print(f"views, {choice}: {found[choice]:.1f} dB", flush=True)
    return found


def measured(args: argparse.Namespace) -> dict:
    """Measure what the arguments ask for, and add it to what an earlier run wrote."""
    result = json.loads(Path(args.json).read_text()) if args.json and Path(args.json).exists() else {}
    if args.rounds:
        load, share_of_others = os.getloadavg(), watch_others()
        unet = race_unet(args.choices, batch=args.batch, size=args.size, rounds=args.rounds)
        result["unet"] = result.get("unet", {}) | unet
        result |= {"load": [load, os.getloadavg()], "others_busy": share_of_others()}
        write(result, args.json)  # now, in case the views fail
    if args.steps:
        result["views_psnr"] = result.get("views_psnr", {}) | views_psnr(args.choices, steps=args.steps)
    names = ("batch", "size", "rounds", "steps")
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    return {**result, "environment": environment("cpu"), "arguments": result.get("arguments", {}) | given}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", type=words(tuple(TITLES)), default=list(IN_8_BITS), metavar=",".join(TITLES))
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--size", type=positive, default=32, help="of the latents")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each choice, 0 or at least 7")
    parser.add_argument("--steps", type=int, default=25, help="of the views, or 0")
    parser.add_argument("--json", type=json_file, metavar="FILE")
    parser.add_argument("--table", metavar="FILE")
    args = parser.parse_args()
    if 0 < args.rounds < 7:
        parser.error("--rounds: expected at least 7: a median of fewer says little")
    return args


@torch.inference_mode()
def main() -> None:
    args = arguments()
    if args.table:
        result = json.loads(Path(args.table).read_text())
    else:
        result = measured(args)
        write(result, args.json)
    print(*table({"unet": {}, "views_psnr": {}, **result}), sep="\n")


if __name__ == "__main__":
    main()
