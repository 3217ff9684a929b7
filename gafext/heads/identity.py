"""Identities of procedural heads: an integer determines about twenty coloured ellipsoids and a light.

A head is built in head units (the skull is about 1.5 wide) and converted to world units last, so that hair and upper
chest fit into the frame of the default orbit. World axes as in `gafext.cameras`: y up, the face looks along +z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

TRAIN_IDENTITIES = range(0, 1_000_000)
TEST_IDENTITIES = range(1_000_000, 1_010_000)

SCALE = 0.60  # world units per head unit
RAISE = 0.10  # offset along y, in head units
_MOST = 2**51  # of `uniform_numbers`: beyond it products wrap to smaller identities'

_SKINS = ((0.96, 0.80, 0.69), (0.36, 0.22, 0.15))  # the lightest and the darkest
_HAIRS = (
    ((0.08, 0.06, 0.05), 0.24),
    ((0.27, 0.16, 0.09), 0.24),
    ((0.50, 0.31, 0.15), 0.16),
    ((0.85, 0.69, 0.37), 0.16),
    ((0.62, 0.24, 0.10), 0.10),
    ((0.66, 0.66, 0.67), 0.10),
)
_IRISES = (((0.22, 0.13, 0.07), 0.4), ((0.20, 0.42, 0.72), 0.25), ((0.25, 0.50, 0.30), 0.2), ((0.42, 0.44, 0.46), 0.15))
HAIRSTYLES = (("bald", 0.10), ("short", 0.38), ("long", 0.28), ("bun", 0.12), ("afro", 0.12))

RANGES = {
    "skin": (0, 1), "skin_red": (-0.03, 0.03), "hair_colour": (0, 1), "hair_light": (0.85, 1.15), "iris": (0, 1),
    "shirt_hue": (0, 1), "shirt_saturation": (0.15, 0.85), "shirt_value": (0.25, 0.95), "style": (0, 1),
    "skull_width": (0.68, 0.80), "skull_height": (0.80, 0.92), "skull_depth": (0.82, 0.95),
    "jaw_width": (0.48, 0.66), "jaw_height": (0.68, 0.84), "jaw_depth": (0.56, 0.68),
    "neck_width": (0.30, 0.42), "chest_width": (1.10, 1.45), "chest_depth": (0.50, 0.64),
    "nose_width": (0.09, 0.15), "nose_length": (0.20, 0.28), "nose_depth": (0.12, 0.22), "nose_slope": (-30, -12),
    "eye_apart": (0.23, 0.31), "eye_height": (0.02, 0.12), "eye_size": (0.12, 0.17), "lid": (0.10, 0.55),
    "brow_above": (0.05, 0.12), "brow_thick": (0.035, 0.065), "brow_slant": (-14, 14),
    "ear_size": (0.17, 0.27), "mouth_below": (0.17, 0.25), "mouth_width": (0.14, 0.26), "lip_red": (0, 0.12),
    "hair_thick": (0.06, 0.13), "hairline": (0.40, 0.62), "hairline_tilt": (0.35, 0.80), "hair_length": (0.70, 1.25),
    "bun_size": (0.27, 0.38), "afro_size": (0.25, 0.38), "beard": (0, 1), "beard_line": (-0.08, 0.10),
    "light_azimuth": (-50, 50), "light_elevation": (25, 60), "ambient": (0.45, 0.60),
}  # fmt: skip
BEARDED = 0.2  # probability

PAIRED = ("eye", "lid", "brow", "ear", "strand")  # left and right
_SINGLE = ("skull", "jaw", "neck", "chest", "bridge", "tip", "upper_lip", "lower_lip", "cap", "mane", "knot", "beard")
PARTS = (*_SINGLE, *(f"{part}_{side}" for part in PAIRED for side in ("left", "right")))
FACE = tuple(name for name in PARTS if name.split("_")[0] in ("eye", "lid", "brow", "upper", "lower", "bridge", "tip"))
CLIPPED = ("cap", "beard", "lid_left", "lid_right")


@dataclass(frozen=True)
class Heads:
    """N heads of P parts each; every part is an ellipsoid |inverse (x - centre)| = 1, some clipped by a plane.

    Attributes:
        centre: [N,P,3] in world units.
        inverse: [N,P,3,3], from world units to the unit sphere.
        colour: [N,P,3], RGB in [0,1].
        clip: [N,P,4], (n,k) of the half-space n·x + k >= 0 that is kept; zeros keep all.
        active: [N,P] bool, False for parts that a head does not have, such as the hair of a bald one.
        iris: [N,3], RGB.
        light: [N,3], the unit direction to the light in world axes.
        ambient: [N], brightness of surfaces that face away from the light.
    """

    centre: Tensor
    inverse: Tensor
    colour: Tensor
    clip: Tensor
    active: Tensor
    iris: Tensor
    light: Tensor
    ambient: Tensor

    def __len__(self) -> int:
        return len(self.centre)

    def repeat(self, count: int) -> Heads:
        """Repeat every head `count` times."""
        return Heads(**{f.name: getattr(self, f.name).repeat_interleave(count, dim=0) for f in fields(self)})

    def to(self, device: torch.device | str) -> Heads:
        """Move all tensors to a device."""
        return Heads(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def uniform_numbers(identities: Tensor, count: int) -> Tensor:
    """Compute numbers in [0,1) that depend only on identity and column: [N] int64 -> [N,count] float64.

    Source: the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    x = identities[:, None] * 4096 + torch.arange(count, device=identities.device) + 1
    x = x * -0x61C8864680B583EB  # 2^64 / golden ratio as a signed number; products wrap around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 11) & (2**53 - 1)).double() * 2.0**-53


def cat(heads: Sequence[Heads]) -> Heads:
    """Concatenate heads, which are on one device."""
    return Heads(**{f.name: torch.cat([getattr(head, f.name) for head in heads]) for f in fields(Heads)})


def make_heads(identities: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> Heads:
    """Build the heads of identities; an identity is the same head in every batch.

    Args:
        identities: N integers, 0 or more; TRAIN_IDENTITIES and TEST_IDENTITIES are disjoint.
        device: device of the result.

    Returns:
        N heads.

    Raises:
        ValueError: an identity is no whole number, below 0, or too large.
    """
    numbers = torch.as_tensor(identities, device="cpu")
    if numbers.is_floating_point() or ((numbers < 0) | (numbers >= _MOST)).any():
        raise ValueError(f"identities: expected whole numbers, 0 or more and below 2^51, got {numbers.tolist()}")
    numbers = numbers.to(torch.int64)
    return build(uniform_numbers(numbers, len(RANGES))).to(device)


def neutral_head(device: torch.device | str = "cpu") -> Heads:
    """Build the head in the middle of every range, which has long hair and no beard."""
    return build(torch.full((1, len(RANGES)), 0.5, dtype=torch.float64)).to(device)


def pick(table: Sequence[tuple], uniform: Tensor) -> Tensor:
    """Return the indices of the rows (value, probability) that uniform numbers select."""
    edges = torch.tensor([share for _, share in table], dtype=torch.float64).cumsum(0)[:-1]
    return torch.bucketize(uniform.contiguous(), edges, right=True)


def _rotation(axis: int, degrees: Tensor) -> Tensor:
    """Compute right-handed rotations about one axis: [N] degrees -> [N,3,3]."""
    angle = torch.deg2rad(degrees)
    matrix = torch.eye(3, dtype=angle.dtype).repeat(len(angle), 1, 1)
    i, j = ((1, 2), (2, 0), (0, 1))[axis]
    matrix[:, i, i] = matrix[:, j, j] = angle.cos()
    matrix[:, j, i], matrix[:, i, j] = angle.sin(), -angle.sin()
    return matrix


def _colours(u: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the colours of skin, hair, shirt and iris, [N,3] each."""
    light, dark = (torch.tensor(skin, dtype=torch.float64) for skin in _SKINS)
    skin = torch.lerp(light, dark, u["skin"][:, None])
    skin = skin + u["skin_red"][:, None] * torch.tensor([1.0, 0.0, -0.7], dtype=torch.float64)
    hairs, irises = (torch.tensor([c for c, _ in table], dtype=torch.float64) for table in (_HAIRS, _IRISES))
    wheel = (u["shirt_hue"][:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    pure = ((wheel - 3).abs() - 1).clamp(0, 1)  # the saturated colour of the hue
    saturation, value = u["shirt_saturation"][:, None], u["shirt_value"][:, None]
    return {
        "skin": skin.clamp(0, 1),
        "hair": (hairs[pick(_HAIRS, u["hair_colour"])] * u["hair_light"][:, None]).clamp(0, 1),
        "shirt": value * (1 - saturation * (1 - pure)),
        "iris": irises[pick(_IRISES, u["iris"])],
    }


class _Assembly:
    """Parts of N heads in head units."""

    def __init__(self, count: int):
        self.count, self.parts = count, {}

    def column(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64).expand(self.count)

    def add(self, name: str, centre, radii, colour: Tensor, *, turn=None, clip=None, active=None) -> None:
        """Add a part; `clip` is (normal, offset) of the half-space normal · x >= offset that is kept."""
        centre, radii = (torch.stack([self.column(v) for v in values], dim=-1) for values in (centre, radii))
        turn = torch.eye(3, dtype=torch.float64).expand(self.count, 3, 3) if turn is None else turn
        inverse = turn.transpose(1, 2) / radii[:, :, None]  # diag(1/radii) turn^T
        plane = torch.zeros(self.count, 4, dtype=torch.float64)
        if clip is not None:
            plane[:, :3] = torch.stack([self.column(v) for v in clip[0]], dim=-1)
            plane[:, 3] = -clip[1]
        active = torch.ones(self.count, dtype=torch.bool) if active is None else active
        self.parts[name] = (centre, inverse, colour.expand(self.count, 3), plane, active)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all parts in world units, in the order of PARTS."""
        columns = zip(*(self.parts[name] for name in PARTS), strict=True)
        centre, inverse, colour, clip, active = (torch.stack(column, dim=1) for column in columns)
        raised = torch.tensor([0.0, RAISE, 0.0], dtype=torch.float64)
        offset = (clip[..., 3] - clip[..., :3] @ raised) * SCALE
        return {
            "centre": (centre + raised) * SCALE,
            "inverse": inverse / SCALE,
            "colour": colour.clamp(0, 1).float(),
            "clip": torch.cat([clip[..., :3], offset[..., None]], dim=-1),
            "active": active,
        }


def build(uniform: Tensor) -> Heads:
    """Build N heads from [N,len(RANGES)] numbers in [0,1)."""
    low, high = torch.tensor(list(RANGES.values()), dtype=torch.float64).T
    u = dict(zip(RANGES, (low + (high - low) * uniform).T, strict=True))
    colours, parts = _colours(u), _Assembly(len(uniform))
    surface = _add_skull(parts, u, colours)
    mouth = _add_face(parts, u, colours, surface)
    _add_hair(parts, u, colours, mouth)
    azimuth, elevation = torch.deg2rad(u["light_azimuth"]), torch.deg2rad(u["light_elevation"])
    light = [azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()]
    return Heads(
        **parts.tensors(),
        iris=colours["iris"].float(),
        light=torch.stack(light, dim=-1).float(),
        ambient=u["ambient"].float(),
    )


def _add_skull(parts: _Assembly, u: dict[str, Tensor], colours: dict[str, Tensor]):
    """Add skull, jaw, neck and chest; returns a function that gives the face's z at (x, y)."""
    skin = colours["skin"]
    width, height, depth = u["skull_width"], u["skull_height"], u["skull_depth"]
    parts.add("skull", (0, 0.18, -0.08), (width, height, depth), skin)
    parts.add("jaw", (0, -0.32, 0.14), (u["jaw_width"], u["jaw_height"], u["jaw_depth"]), skin)
    parts.add("neck", (0, -1.25, -0.2), (u["neck_width"], 0.8, 0.38), skin)
    parts.add("chest", (0, -2.15, -0.25), (u["chest_width"], 0.85, u["chest_depth"]), colours["shirt"])

    def surface(x: Tensor | float, y: Tensor) -> Tensor:
        bulge = [
            z + d * (1 - (x / w) ** 2 - ((y - middle) / h) ** 2).clamp(min=0.05).sqrt()
            for z, d, w, h, middle in (
                (-0.08, depth, width, height, 0.18),
                (0.14, u["jaw_depth"], u["jaw_width"], u["jaw_height"], -0.32),
            )
        ]
        return torch.maximum(*bulge)

    return surface


def _add_face(parts: _Assembly, u: dict[str, Tensor], colours: dict[str, Tensor], surface) -> tuple[Tensor, Tensor]:
    """Add nose, eyes, brows, ears and mouth; returns the y and the z of the mouth."""
    skin, hair = colours["skin"], colours["hair"]
    width, length, depth = u["nose_width"], u["nose_length"], u["nose_depth"]
    front = 0.14 + u["jaw_depth"]
    parts.add(
        "bridge", (0, -0.12, front - 0.04), (width, length, depth), skin * 0.97, turn=_rotation(0, u["nose_slope"])
    )
    tip = (0, -0.12 - 0.6 * length, front + 0.45 * depth)
    parts.add("tip", tip, (1.25 * width, width, width), skin * 0.93)

    apart, height, size = u["eye_apart"], u["eye_height"], u["eye_size"]
    eye = surface(apart, height) - 0.6 * size
    brow = height + size + u["brow_above"]
    white = torch.tensor([0.95, 0.95, 0.93], dtype=torch.float64)
    for side, sign in (("left", 1), ("right", -1)):
        centre = (sign * apart, height, eye)
        parts.add(f"eye_{side}", centre, (size,) * 3, white)
        edge = height - 0.15 * eye + size * u["lid"]
        parts.add(f"lid_{side}", centre, (1.08 * size,) * 3, skin * 0.88, clip=((0, 1, -0.15), edge))
        turn = _rotation(2, sign * u["brow_slant"]) @ _rotation(1, parts.column(18.0 * sign))
        above = (sign * apart * 1.05, brow, surface(1.05 * apart, brow) - 0.02)
        parts.add(f"brow_{side}", above, (1.35 * size, u["brow_thick"], 0.08), hair * 0.8, turn=turn)
        beside = (sign * (u["skull_width"] - 0.02), -0.05, -0.08)
        radii, turn = (0.09, u["ear_size"], 0.65 * u["ear_size"]), _rotation(1, parts.column(-20.0 * sign))
        parts.add(f"ear_{side}", beside, radii, skin * 0.94, turn=turn)

    mouth = -0.12 - length - u["mouth_below"]
    lips = skin * torch.tensor([0.95, 0.60, 0.60], dtype=torch.float64)
    lips = lips + u["lip_red"][:, None] * torch.tensor([1.0, 0.0, 0.1], dtype=torch.float64)
    inside = surface(0.0, mouth) - 0.05
    parts.add("upper_lip", (0, mouth + 0.035, inside), (u["mouth_width"], 0.05, 0.10), lips)
    parts.add("lower_lip", (0, mouth - 0.04, inside), (0.85 * u["mouth_width"], 0.06, 0.11), lips * 1.05)
    return mouth, inside


def _add_hair(parts: _Assembly, u: dict[str, Tensor], colours: dict[str, Tensor], mouth: tuple[Tensor, Tensor]) -> None:
    hair, thick = colours["hair"], u["hair_thick"]
    width, height, depth = u["skull_width"], u["skull_height"], u["skull_depth"]
    style = pick(HAIRSTYLES, u["style"])
    bald, _, long, bun, afro = (style == index for index in range(len(HAIRSTYLES)))
    volume = torch.where(afro, u["afro_size"], thick)
    tilt = u["hairline_tilt"]
    line = u["hairline"] - tilt * (0.04 + u["jaw_depth"])
    middle, radii = (0, 0.2 + 0.3 * volume, -0.12), (width + volume, height + volume, depth + volume)
    parts.add("cap", middle, radii, hair, clip=((0, 1, -tilt), line), active=~bald)
    length = u["hair_length"]
    parts.add("mane", (0, -0.45 * length, -0.5), (width + thick + 0.05, length, 0.5), hair, active=long)
    for side, sign in (("left", 1), ("right", -1)):
        centre, radii = (sign * (width - 0.02), -0.35 * length, -0.12), (0.2, 0.85 * length, 0.34)
        turn = _rotation(2, parts.column(6.0 * sign))
        parts.add(f"strand_{side}", centre, radii, hair, turn=turn, active=long)
    size = u["bun_size"]
    parts.add("knot", (0, 1.08 + 0.5 * size, -0.35), (size,) * 3, hair * 0.95, active=bun)

    radii = (u["jaw_width"] + 0.05, u["jaw_height"] + 0.04, u["jaw_depth"] + 0.04)
    line = -(mouth[0] + u["beard_line"]) - 0.25 * mouth[1]
    bearded = u["beard"] > 1 - BEARDED
    parts.add("beard", (0, -0.36, 0.14), radii, hair * 0.9, clip=((0, -1, -0.25), line), active=bearded)
