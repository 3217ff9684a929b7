"""Train the detector of heads in photographs: drawn heads before scenery, whose squares are known."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from data import RADIUS, between, draw_heads, generator
from export import half
from initial import carry_over
from scenery import scenery
from torch import Tensor, nn
from training import Trainer, arguments

from gafext import heads
from gafext.cameras import DEFAULT_FOV, look_at_origin
from gafext.models.head_detector import SURE, HeadDetector, HeadDetectorConfig

HEADS, SCENES, PICTURES, HELD_OUT = 1200, 400, 3072, 384  # drawn before the first step
BATCH, FRESH = 48, 8  # pictures of a step, and of them new ones: composing one takes as long as training on five
SIZE, WIDE = 160, 1.5  # pixels of a drawn head, and side of its frame, of a portrait's
SHOULDERS = 0.85  # of a drawn head's side; below, the chest would narrow, and its row is repeated
SIDES = (0.2, 1.6)  # of the squares, of a picture's side
NO_HEAD = 0.15  # fraction of the pictures
BORDER = 0.02  # a head whose centre is closer to the picture's border counts as none


def chest_portraits(count: int, random: torch.Generator) -> Tensor:
    """Render heads with their chests: [count,4,SIZE,SIZE], RGB times alpha, and alpha; float16."""
    azimuth, elevation = (torch.deg2rad(between(-most, most, (count,), random)) for most in (55, 15))
    directions = [azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()]
    w2c = look_at_origin(RADIUS * torch.stack(directions, dim=-1))[:, None]
    fov = math.degrees(2 * math.atan(WIDE * math.tan(math.radians(DEFAULT_FOV / 2))))
    made = []
    for cameras in w2c.split(50):
        drawn = heads.render(draw_heads(len(cameras), random, "cpu"), cameras, SIZE, fov=fov)
        alpha = drawn.alpha[:, 0]
        picture = torch.cat([drawn.rgb[:, 0] - (1 - alpha), alpha], dim=1)
        row = round(SHOULDERS * SIZE)
        picture[:, :, row:] = picture[:, :, row : row + 1]
        made.append(picture.half())
    return torch.cat(made)


def compose(
    count: int, drawn: Tensor, scenes: Tensor, size: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Compose photographs.

    Args:
        count: N.
        drawn: heads of `chest_portraits`.
        scenes: scenes of `scenery`.
        size: S, side of the pictures.
        random: generator of the CPU.

    Returns:
        Pictures [N,3,S,S] in [0,1]; squares [N,3], x, y and log side in shares of S; whether there is a head, [N] bool.
    """

    def numbers(low: float, high: float, *shape: int) -> Tensor:
        return between(low, high, (count, *shape), random).float()

    side = torch.exp(numbers(math.log(SIDES[0]), math.log(SIDES[1])))
    reach = (0.5 + 0.2 * (1 - side)).clamp(0.15, 0.5)
    x, y = 0.5 + reach * numbers(-1, 1), 0.5 + reach * numbers(-1, 1)
    turn, mirror = torch.deg2rad(numbers(-15, 15)), torch.where(numbers(0, 1) < 0.5, -1.0, 1.0)
    scale, stretch = 1 / (side * WIDE), numbers(0.85, 1.15)  # faces are longer or wider than the drawn ones
    rows = [[turn.cos() * mirror * stretch, -turn.sin() * mirror], [turn.sin(), turn.cos()]]
    head = _resampled(drawn, scale, rows, (2 * x - 1, 2 * y - 1), size, random)
    angle, zoom, zero = numbers(0, 2 * math.pi), numbers(0.4, 1.0), torch.zeros(count)
    rows = [[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]
    behind = _resampled(scenes, zoom, rows, (zero, zero), size, random)

    present = numbers(0, 1) >= NO_HEAD
    alpha = head[:, 3:] * present.view(-1, 1, 1, 1)
    patches = F.interpolate(numbers(-1, 1, 1, 24, 24), 2 * size, mode="bilinear")
    colours = head[:, :3] * numbers(0.6, 1.3, 3, 1, 1) * (1 + numbers(0, 0.25, 1, 1, 1) * patches)
    picture = F.avg_pool2d(colours * present.view(-1, 1, 1, 1) + (1 - alpha) * behind, 2)
    seen = present & (torch.stack([x, y, 1 - x, 1 - y]).amin(0) > BORDER)
    return develop(picture, random), torch.stack([x, y, side.log()], dim=-1), seen


def _resampled(
    pool: Tensor,
    scale: Tensor,
    rows: list[list[Tensor]],
    centre: tuple[Tensor, Tensor],
    size: int,
    random: torch.Generator,
) -> Tensor:
    """Draw images of a pool and transform them: a result's place p in [-1,1]² shows scale · rows · (p - centre)."""
    chosen = pool[torch.randint(len(pool), (len(scale),), generator=random)].float()
    matrix = scale[:, None, None] * torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    matrix = torch.cat([matrix, -matrix @ torch.stack(centre, dim=-1)[..., None]], dim=-1)
    grid = F.affine_grid(matrix, [*chosen.shape[:2], 2 * size, 2 * size], align_corners=False)
    if chosen.shape[1] == 3:
        return F.grid_sample(chosen, grid, padding_mode="reflection", align_corners=False)
    grid[..., 1] = grid[..., 1].clamp(max=1 - 1 / SIZE)  # the chest's lowest row goes on
    return F.grid_sample(chosen, grid, align_corners=False)


def develop(picture: Tensor, random: torch.Generator) -> Tensor:
    """Light pictures [N,3,S,S] from a side, and give some of them grey, blur, noise and grey margins."""
    count, size = len(picture), picture.shape[-1]

    def numbers(low: float, high: float, *shape: int) -> Tensor:
        return between(low, high, (count, *shape), random).float()

    def chance(share: float) -> Tensor:
        return numbers(0, 1, 1, 1, 1) < share

    along = torch.linspace(-1, 1, size)
    picture = picture * (1 + numbers(-0.5, 0.5, 1, 1, 1) * along + numbers(-0.4, 0.4, 1, 1, 1) * along[:, None])
    picture = torch.where(chance(0.25), picture.mean(1, keepdim=True), picture).clamp(0, 1)
    picture = picture ** numbers(0.6, 1.6, 1, 1, 1) * numbers(0.6, 1.1, 1, 1, 1)
    small = F.interpolate(F.avg_pool2d(picture, 2), size=(size, size), mode="bilinear")
    picture = torch.lerp(picture, small, numbers(0, 1, 1, 1, 1) * chance(0.4))
    picture = picture + numbers(0, 0.08, 1, 1, 1) * torch.randn(picture.shape, generator=random)
    margin = torch.where(chance(0.4), numbers(0, 0.4, 1, 1, 1), 0.0)  # of a picture that is not square
    outside = (along.abs() > 1 - margin).expand(count, 1, size, size)
    return torch.where(torch.where(chance(0.5), outside, outside.mT), 0.5, picture).clamp(0, 1)


def errors(found: tuple[Tensor, Tensor], squares: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of the cell, and the error of the squares of the cells around it, in their sides."""
    logits, boxes = found
    cells = boxes.shape[1]
    grid = math.isqrt(cells)
    cell = (squares[:, :2] * grid).floor().clamp(0, grid - 1).long()
    index = torch.where(seen, cell[:, 1] * grid + cell[:, 0], cells)
    places = torch.stack([torch.arange(cells) % grid, torch.arange(cells) // grid], dim=-1)
    near = ((cell[:, None] - places).abs().amax(-1) <= 1) & seen[:, None]  # [N,K]
    off = (boxes - squares[:, None]).abs()
    off = off[..., :2].sum(-1) / squares[:, None, 2].exp() + off[..., 2]
    return F.cross_entropy(logits, index, label_smoothing=0.02), off[near].mean()


@torch.no_grad()
def scores(detector: nn.Module, composed: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Score a detector: heads found to a fifth of their side, the errors of these, and right and wrong "none"."""
    picture, squares, seen = composed
    logits, boxes = detector(picture)
    none = logits.softmax(-1)[:, -1] > 1 - SURE
    off = (boxes[torch.arange(len(boxes)), logits[:, :-1].argmax(-1)] - squares).abs()
    apart = off[:, :2].norm(dim=-1) / squares[:, 2].exp()
    good = seen & (apart < 0.2)
    return {
        "found": (good & ~none).sum().item() / seen.sum().item(),
        "apart": apart[good].mean().item(),
        "log_side": off[good, 2].mean().item(),
        "none_right": none[~seen].float().mean().item(),
        "none_wrong": none[seen].float().mean().item(),
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    args.device = "cpu"  # its time is in drawing
    torch.manual_seed(args.seed)
    config = HeadDetectorConfig()
    detector = HeadDetector(config)
    if args.start and (args.start / "head_detector").is_dir():
        carry_over(detector, HeadDetector.from_pretrained(args.start / "head_detector").state_dict())
    detector = detector.to(memory_format=torch.channels_last)
    start = generator(args.seed + 1, 0)
    drawn, scenes = chest_portraits(HEADS, start), scenery(SCENES, 128, start)
    counts = [len(part) for part in torch.arange(PICTURES).split(256)]
    parts = [compose(count, drawn, scenes, config.image_size, start) for count in counts]
    pool = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    pool[0] = pool[0].half()
    held_out = compose(HELD_OUT, drawn, scenes, config.image_size, generator(args.seed + 2, 0))

    def loss(step: int) -> Tensor:
        random = generator(args.seed, step)
        slots = (FRESH * step + torch.arange(FRESH)) % len(pool[0])
        for kept, fresh in zip(pool, compose(FRESH, drawn, scenes, config.image_size, random), strict=True):
            kept[slots] = fresh.to(kept.dtype)
        drawn_again = torch.randint(len(pool[0]), (BATCH,), generator=random)
        picture, squares, seen = (kept[drawn_again] for kept in pool)
        chosen, off = errors(detector(picture.float()), squares, seen)
        return chosen + 3 * off

    def measure(averaged: dict[str, nn.Module], step: int) -> dict[str, float]:
        half(averaged["head_detector"]).save_pretrained(args.out / "model" / "head_detector")
        return scores(averaged["head_detector"], held_out)

    Trainer("head_detector", args, {"head_detector": detector}, rate=2e-3, loss=loss, measure=measure).run()


if __name__ == "__main__":
    main()
