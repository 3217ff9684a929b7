"""Shapes of drawn heads as numbers: they determine every surface, and nothing of the colours."""

import pytest
import torch

from gafext import heads
from gafext.cameras import orbit
from gafext.heads.identity import HAIRSTYLES, PARTS
from gafext.heads.shape import MEASURES, SHAPE, beard_numbers, hairstyle_numbers, shape_numbers, shaped_heads

SURFACE, COLOURS = ("centre", "inverse", "clip", "active"), ("colour", "iris", "light", "ambient")


def test_the_numbers_of_an_identity_build_its_surfaces_in_neutral_colours():
    who = heads.TEST_IDENTITIES[:40]
    made, again, neutral = heads.make_heads(who), shaped_heads(shape_numbers(who)), heads.neutral_head()
    for name in SURFACE:
        assert torch.equal(getattr(again, name), getattr(made, name)), name
    for name in COLOURS:
        assert torch.equal(getattr(again, name), getattr(neutral, name).expand_as(getattr(again, name))), name


def test_every_number_changes_a_surface():
    middle = torch.full((1, len(SHAPE)), 0.5, dtype=torch.float64)
    hair = {"hair_length": "long", "bun_size": "bun", "afro_size": "afro"}
    names = [name for name, _ in HAIRSTYLES]
    for index, name in enumerate(SHAPE):
        base = middle.clone()
        if name in hair:
            base[0, SHAPE.index("style")] = hairstyle_numbers()[names.index(hair[name])]
        changed = base.clone()
        changed[0, index] = 0.95
        before, after = shaped_heads(base), shaped_heads(changed)
        assert any(not torch.equal(getattr(before, part), getattr(after, part)) for part in SURFACE), name
    assert set(SHAPE) - set(MEASURES) == {"style", "beard"}


@pytest.mark.parametrize(("index", "parts"), [(0, ()), (1, ("cap",)), (2, ("cap", "mane")), (3, ("cap", "knot"))])
def test_hairstyles_have_their_parts(index, parts):
    numbers = torch.full((1, len(SHAPE)), 0.5, dtype=torch.float64)
    numbers[0, SHAPE.index("style")] = hairstyle_numbers()[index]
    active = shaped_heads(numbers).active[0]
    assert {part for part in ("cap", "mane", "knot") if active[PARTS.index(part)]} == set(parts)


def test_beards():
    numbers = torch.full((2, len(SHAPE)), 0.5, dtype=torch.float64)
    numbers[:, SHAPE.index("beard")] = beard_numbers()
    assert shaped_heads(numbers).active[:, PARTS.index("beard")].tolist() == [False, True]


def test_heads_are_concatenated_in_order():
    both = heads.cat([heads.make_heads([3, 4]), heads.make_heads([9])])
    alone = heads.make_heads([3, 4, 9])
    assert len(both) == 3 and torch.equal(both.centre, alone.centre) and torch.equal(both.ambient, alone.ambient)


def test_heads_are_symmetric():
    """So the mirror image of a portrait is one of the same shape; hair and light may be on one side in colour alone."""
    who = heads.make_heads(heads.TEST_IDENTITIES[:20])
    left, right = (heads.render(who, orbit(1, azimuth_start=azimuth).w2c, 32).normals for azimuth in (20, -20))
    mirrored = right.flip(-1)
    mirrored[:, :, 0] = 1 - mirrored[:, :, 0]
    assert ((left - mirrored).abs().amax(2) > 1e-3).float().mean() < 0.01
