"""Score the views of drawn heads in photographs, with and without cropping: small, off centre, before white or scenery.

Held-out identities from the 201st on, which no other number is of.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from data import generator
from scenery import scenery
from torch import Tensor

from gafext import MultiViewDiffusionPipeline, heads
from gafext.evaluation import Scores, Subject, as_portrait, portrait_camera, subjects, table

FIRST = 200  # held-out identities to skip
SIDE, WIDTH, HEIGHT = 256, 640, 480  # pixels: of the head's frame, and of a photograph


def photograph(subject: Subject, index: int, *, plain: bool) -> Tensor:
    """Draw a head at a place that the index determines: [3,HEIGHT,WIDTH] in [0,1]; `plain`: before white, as matted."""
    random = generator(11, index)
    scene = scenery(1, WIDTH, random)[0, :, :HEIGHT].float()
    if plain:
        scene = torch.ones_like(scene)
    drawn = heads.render(heads.make_heads([subject.identity]), portrait_camera(subject.identity).w2c, SIDE)
    rgb, alpha = drawn.rgb[0, 0], drawn.alpha[0, 0]
    room = torch.rand(2, generator=random) * torch.tensor([WIDTH - SIDE, HEIGHT - SIDE])
    x, y = room.int().tolist()
    below = (0, 0, 0, HEIGHT - SIDE - y)  # the chest goes on to the picture's lower border
    head, alpha = (F.pad(part, below, mode="replicate") for part in (rgb - (1 - alpha), alpha))
    place = scene[:, y:, x : x + SIDE]
    place.copy_(head + (1 - alpha) * place)
    return scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint folder; default: the built-in model")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of crops, busy backgrounds and cartoons
    pipe = MultiViewDiffusionPipeline.from_pretrained(args.model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size * pipe.vae.config.factor * (1 if pipe.upsampler is None else 2)
    who = subjects(args.heads, size, first=FIRST)
    taken, cut_out = ([photograph(s, index, plain=plain) for index, s in enumerate(who)] for plain in (False, True))

    def score(name: str, portraits: list[Tensor], *, crop: bool) -> Scores:
        options = {"generator": 0, "num_inference_steps": 25, "output_type": "pt", "crop": crop}
        return Scores.of(name, who, [pipe(as_portrait(portrait), **options).images for portrait in portraits])

    lines = [
        score("portrait as in training", [subject.portrait for subject in who], crop=True),
        score("before white, cropped to the head", cut_out, crop=True),
        score("before white, centre square", cut_out, crop=False),
        score("before scenery, cropped to the head", taken, crop=True),
        score("before scenery, centre square", taken, crop=False),
    ]
    print(table(lines))
    if args.json:
        args.json.write_text(
            json.dumps({"heads": args.heads, "lines": [asdict(line) for line in lines]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
