"""Procedural heads: training and test data of the bundled model, and its default normal maps."""

from gafext.heads.identity import TEST_IDENTITIES, TRAIN_IDENTITIES, Heads, cat, make_heads, neutral_head
from gafext.heads.render import Renders, head_normals, head_surface, render

__all__ = [
    "TEST_IDENTITIES",
    "TRAIN_IDENTITIES",
    "Heads",
    "Renders",
    "cat",
    "head_normals",
    "head_surface",
    "make_heads",
    "neutral_head",
    "render",
]
