"""Train the image encoder to tell a portrait's colours and light, before the U-Net that reads them is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from data import draw_heads, generator, normalized, photographic, portrait_cameras
from export import half
from initial import new_image_encoder
from torch import Tensor, nn
from training import Trainer, arguments, mixed_precision, rung_of

from gafext import heads
from gafext.heads.identity import PARTS

POOL, FRESH, BATCH = 1000, 3, 48  # portraits before the first step, and of each step: new ones, and all
KEPT = 12_000  # portraits; then the oldest are replaced
HELD_OUT = 200
COLOURED = ("skull", "upper_lip", "brow_left", "chest")  # parts of one colour each: skin, lips, hair, shirt
NAMES = ("skin", "lips", "hair", "shirt", "iris", "light", "ambient")
SIZES = (3, 3, 3, 3, 3, 3, 1)
IRIS_WEIGHT = 4.0  # of the squared error of irises, the smallest of what is told
PATCH_WEIGHT, PATCH_SCALE = 2.0, 10.0  # of the squared error of patches, and of their targets, which are mostly 0


class Portraits(NamedTuple):
    """N portraits and what is to be told of them."""

    pictures: Tensor  # [N,3,S,S] uint8, as photographic as those that the U-Net is trained with
    appearance: Tensor  # [N,19], colours, direction and strength of the light
    irises: Tensor  # [N,T,3] of the T patches: mean of what white irises would add
    unchanged: Tensor  # [N] bool: the picture is as rendered, and `irises` are where they were


class Appearance(nn.Module):
    """Reads the appearance from the class token, and the irises from the patches; not used after training."""

    def __init__(self, width: int):
        super().__init__()
        self.whole, self.patch = nn.Linear(width, sum(SIZES)), nn.Linear(width, 3)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.whole(hidden_states[:, 0]), self.patch(hidden_states[:, 1:])


def appearance(drawn: heads.Heads) -> Tensor:
    """Return the numbers of NAMES, [N,19] float32."""
    colours = drawn.colour[:, [PARTS.index(part) for part in COLOURED]].flatten(1)
    return torch.cat([colours, drawn.iris, drawn.light, drawn.ambient[:, None]], dim=1).float()


def portraits_of(drawn: heads.Heads, size: int, patch: int, random: torch.Generator) -> Portraits:
    cameras = portrait_cameras(len(drawn), random)
    taken = heads.render(drawn, cameras, size)
    white = heads.render(replace(drawn, iris=torch.ones_like(drawn.iris)), cameras, size)
    added = F.avg_pool2d((white.rgb - taken.rgb)[:, 0], patch).flatten(2).transpose(1, 2)
    pictures = photographic(taken.rgb[:, 0], taken.alpha[:, 0], random)
    unchanged = (pictures == taken.rgb[:, 0]).flatten(1).all(1)
    return Portraits((pictures * 255).round().byte(), appearance(drawn), added * PATCH_SCALE, unchanged)


@torch.no_grad()
def explained(encoder: nn.Module, reader: nn.Module, held_out: Portraits) -> dict[str, float]:
    """Compute the share of the variance that is told, of each of NAMES: 1 is all, 0 what the mean tells."""
    found = reader(encoder(normalized(held_out.pictures.float() / 255)).last_hidden_state.float())[0]
    wrong, all_of_it = (found - held_out.appearance).square().mean(0), held_out.appearance.var(0, correction=0)
    parts = zip(NAMES, wrong.split(SIZES), all_of_it.split(SIZES), strict=True)
    return {name: 1 - (error.sum() / variance.sum()).item() for name, error, variance in parts}


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    torch.manual_seed(args.seed)
    config = rung_of(args).image_encoder
    size, patch = config.image_size, config.patch_size
    encoder = new_image_encoder(config, args.start and args.start / "image_encoder")
    encoder, reader = encoder.to(args.device).requires_grad_(True), Appearance(config.hidden_size).to(args.device)

    def draw(count: int, random: torch.Generator) -> Portraits:
        return portraits_of(draw_heads(count, random, args.device), size, patch, random)

    start = generator(args.seed + 1, 0)
    first = [draw(len(part), start) for part in torch.arange(POOL).split(200)]
    pool = Portraits(*(torch.cat(parts) for parts in zip(*first, strict=True)))
    mean, std = pool.appearance.mean(0), pool.appearance.std(0)
    pool = Portraits(*(torch.cat([x, x.new_empty(KEPT - POOL, *x.shape[1:])]) for x in pool))
    filled = POOL
    numbers = torch.arange(HELD_OUT) + heads.TEST_IDENTITIES.start
    held_out = portraits_of(heads.make_heads(numbers, args.device), size, patch, generator(args.seed + 2, 0))
    weight = torch.ones(sum(SIZES), device=args.device)
    weight[torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES)) == NAMES.index("iris")] = IRIS_WEIGHT

    def loss(step: int) -> Tensor:
        nonlocal filled
        random = generator(args.seed, step)
        slots = (filled + torch.arange(FRESH)) % KEPT
        for kept, fresh in zip(pool, draw(FRESH, random), strict=True):
            kept[slots] = fresh
        filled += FRESH
        chosen = torch.randint(min(filled, KEPT), (BATCH,), generator=random)
        pictures, told, irises, unchanged = (x[chosen] for x in pool)
        with mixed_precision(torch.device(args.device)):
            hidden_states = encoder(normalized(pictures.float() / 255)).last_hidden_state
        whole, of_patches = reader(hidden_states.float())
        off = (of_patches - irises).square() * (1 + PATCH_SCALE * irises.amax(2, keepdim=True))
        off = (off * unchanged[:, None, None]).mean()
        return (weight * (whole - (told - mean) / std).square()).mean() + PATCH_WEIGHT * off

    def measure(averaged: dict[str, nn.Module], step: int) -> dict[str, float]:
        half(averaged["image_encoder"]).save_pretrained(args.out / "image_encoder")  # the U-Net's stage goes on from it
        scaled = held_out._replace(appearance=(held_out.appearance - mean) / std)
        return explained(averaged["image_encoder"], averaged["reader"], scaled)

    modules = {"image_encoder": encoder, "reader": reader}
    Trainer("image_encoder", args, modules, rate=1e-3, loss=loss, measure=measure).run()


if __name__ == "__main__":
    main()
