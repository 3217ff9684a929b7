"""Train the network that fits a drawn head's shape to a portrait."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from data import generator, photographic, portrait_cameras, view_cameras
from export import half
from initial import carry_over
from torch import Tensor, nn
from training import Trainer, arguments

from gafext import heads
from gafext.evaluation.measures import psnr
from gafext.heads.identity import HAIRSTYLES
from gafext.heads.shape import MEASURES, SHAPE, shape_numbers, shaped_heads, styles
from gafext.models.head_fitter import HeadFitter, HeadFitterConfig, HeadShape

POOL, FRESH, BATCH = 4000, 8, 48  # portraits before the first step, and of each step: new ones, and all
KEPT = 24_000  # portraits; then the oldest are replaced
HELD_OUT, NORMALS = 64, 64  # heads to measure on, and the side of their normal maps
STYLE_WEIGHT = 0.1  # of a cross-entropy, against the squared error of the mean measure


class Portraits(NamedTuple):
    """N portraits and the numbers of their heads' shapes."""

    pictures: Tensor  # [N,3,S,S] uint8, as photographic as those that the U-Net is trained with
    numbers: Tensor  # [N,len(SHAPE)] float32


def draw_portraits(identities: Tensor, size: int, random: torch.Generator) -> Portraits:
    drawn = heads.render(heads.make_heads(identities), portrait_cameras(len(identities), random), size)
    pictures = photographic(drawn.rgb[:, 0], drawn.alpha[:, 0], random)
    return Portraits((pictures * 255).round().byte(), shape_numbers(identities).float())


def draw_identities(count: int, random: torch.Generator, of: range = heads.TRAIN_IDENTITIES) -> Tensor:
    return torch.randint(of.start, of.stop, (count,), generator=random)


def visible(numbers: Tensor) -> Tensor:
    """Return for each measure whether the head has the part that it is of: [N,len(MEASURES)] bool."""
    style, bearded = styles(numbers)
    bald, _, long, bun, afro = (style == index for index in range(len(HAIRSTYLES)))
    condition = {"hair_thick": ~bald & ~afro, "hairline": ~bald, "hairline_tilt": ~bald, "hair_length": long}
    condition |= {"bun_size": bun, "afro_size": afro, "beard_line": bearded}
    always = torch.ones_like(bald)
    return torch.stack([condition.get(name, always) for name in MEASURES], dim=1)


def error(found: tuple[Tensor, Tensor, Tensor], numbers: Tensor) -> Tensor:
    """Compute the loss: squared error of the visible measures, cross-entropies of hairstyle and beard."""
    measures, hairstyle, beard = found
    style, bearded = styles(numbers)
    true = numbers[:, [SHAPE.index(name) for name in MEASURES]]
    off = ((measures - true).square() * visible(numbers)).mean()
    chosen = F.cross_entropy(hairstyle, style) + F.binary_cross_entropy_with_logits(beard, bearded.float())
    return off + STYLE_WEIGHT * chosen


@torch.no_grad()
def scores(fitter: nn.Module, held_out: Portraits, w2c: Tensor) -> dict[str, float]:
    """Score a fitter: PSNR of the normal maps of fitted heads, of the neutral head's too, and right styles."""
    device = next(fitter.parameters()).device
    found = HeadShape(*(part.cpu() for part in fitter(held_out.pictures.float().to(device) / 255)))
    style, bearded = styles(held_out.numbers)

    def normals(of: heads.Heads) -> Tensor:
        return heads.render(of, w2c, NORMALS).normals.flatten(0, 1)

    truth = normals(shaped_heads(held_out.numbers))
    return {
        "normals": psnr(normals(shaped_heads(found.numbers())), truth).mean().item(),
        "neutral_normals": psnr(normals(heads.neutral_head().repeat(len(w2c))), truth).mean().item(),
        "hairstyle": (found.hairstyle.argmax(1) == style).float().mean().item(),
        "beard": ((found.beard > 0) == bearded).float().mean().item(),
        "loss_held_out": error(found, held_out.numbers).item(),
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    torch.manual_seed(args.seed)
    config = HeadFitterConfig()
    fitter = HeadFitter(config)
    if args.start and (args.start / "head_fitter").is_dir():
        carry_over(fitter, HeadFitter.from_pretrained(args.start / "head_fitter").state_dict())
    fitter = fitter.to(args.device, memory_format=torch.channels_last)
    start, size = generator(args.seed + 1, 0), config.image_size
    pool = Portraits(torch.empty(KEPT, 3, size, size, dtype=torch.uint8), torch.empty(KEPT, len(SHAPE)))
    filled = 0

    def add(count: int, random: torch.Generator) -> None:
        nonlocal filled
        slots = (filled + torch.arange(count)) % KEPT
        for kept, fresh in zip(pool, draw_portraits(draw_identities(count, random), size, random), strict=True):
            kept[slots] = fresh
        filled += count

    for part in torch.arange(POOL).split(200):
        add(len(part), start)
    random = generator(args.seed + 2, 0)
    held_out = draw_portraits(draw_identities(HELD_OUT, random, heads.TEST_IDENTITIES), size, random)
    w2c = view_cameras(HELD_OUT, 4, random)

    def loss(step: int) -> Tensor:
        random = generator(args.seed, step)
        add(FRESH, random)
        chosen = torch.randint(min(filled, KEPT), (BATCH,), generator=random)
        pictures = pool.pictures[chosen].float() / 255
        mirrored = torch.rand(BATCH, 1, 1, 1, generator=random) < 0.5  # the heads are symmetric
        pictures = torch.where(mirrored, pictures.flip(-1), pictures).to(args.device)
        return error(fitter(pictures), pool.numbers[chosen].to(args.device))

    def measure(averaged: dict[str, nn.Module], step: int) -> dict[str, float]:
        half(averaged["head_fitter"]).save_pretrained(args.out / "model" / "head_fitter")
        return scores(averaged["head_fitter"], held_out, w2c)

    Trainer("head_fitter", args, {"head_fitter": fitter}, rate=2e-3, loss=loss, measure=measure).run()


if __name__ == "__main__":
    main()
