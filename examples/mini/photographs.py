"""Score the views of drawn heads in photographs: small and off centre before scenery, under coloured light.

Held-out identities 200 and up, which no other number is of.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from data import generator
from scenery import scenery
from torch import Tensor

from gafext import MultiViewDiffusionPipeline, heads
from gafext.evaluation import Scores, Subject, as_portrait, portrait_camera, subjects, table

FIRST, SIDE, LONG = 200, 256, 640  # pixels: of the head's frame, and of the photograph's longer side


def photograph(subject: Subject, index: int, *, light: Tensor | None = None) -> Tensor:
    """Draw a head into scenery, at a place that the index determines: [3,480,640]; `light` scales the channels."""
    random = generator(11, index)
    scene = scenery(1, LONG, random)[0, :, :480].float()
    drawn = heads.render(heads.make_heads([subject.identity]), portrait_camera(subject.identity).w2c, SIDE)
    rgb, alpha = drawn.rgb[0, 0], drawn.alpha[0, 0]
    body = F.pad(torch.cat([rgb - (1 - alpha), alpha]), (0, 0, 0, 480), mode="replicate")
    x, y = (int(n) for n in torch.rand(2, generator=random) * torch.tensor([LONG - SIDE, 480 - SIDE]))
    part = body[:, : 480 - y]
    place = scene[:, y:, x : x + SIDE]
    place.copy_(part[:3] + (1 - part[3:]) * place)
    return scene if light is None else (scene * light).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint folder; default: the built-in model")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="image of photographs, crops and views")
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = MultiViewDiffusionPipeline.from_pretrained(args.model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size * pipe.vae.config.factor * (1 if pipe.upsampler is None else 2)
    who = subjects(args.heads, size, first=FIRST)
    forms = {
        "portrait": [as_portrait(subject.portrait) for subject in who],
        "photograph": [as_portrait(photograph(subject, index)) for index, subject in enumerate(who)],
    }
    lines, rows = [], []
    for name, portraits in forms.items():
        for crop in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runs = [pipe(p, generator=0, num_inference_steps=25, output_type="pt", crop=crop) for p in portraits]
            made = [run.images for run in runs]
            lines.append(replace(Scores.of(name, who, made), name=f"{name}, {'cropped' if crop else 'centre square'}"))
            rows.append((portraits, [run.portrait for run in runs], made))
    print(table(lines))
    if args.json:
        args.json.write_text(
            json.dumps({"heads": args.heads, "lines": [asdict(line) for line in lines]}, indent=2) + "\n"
        )
    if args.figure:
        from PIL import Image

        from gafext.images import to_pil

        tall = 160
        sheet = Image.new("RGB", (tall * 9, tall * 2 * args.heads), "white")
        for index in range(args.heads):
            for line, (portraits, cut, made) in enumerate(rows[2:]):
                shown = portraits[index].copy()
                shown.thumbnail((tall * 2, tall))
                sheet.paste(shown, (0, tall * (2 * index + line)))
                pictures = [cut[index].resize((tall, tall)), *(p.resize((tall, tall)) for p in to_pil(made[index]))]
                for column, picture in enumerate(
                    [*pictures, *(p.resize((tall, tall)) for p in to_pil(who[index].views.rgb[:2]))]
                ):
                    sheet.paste(picture, (tall * (2 + column), tall * (2 * index + line)))
        sheet.save(args.figure)


if __name__ == "__main__":
    main()
