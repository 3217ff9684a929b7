"""Procedural heads: what the built-in model was trained on, what it is measured on, and its stand-in normal maps."""

from gafext.heads.identity import TEST_IDENTITIES, TRAIN_IDENTITIES, Heads, make_heads, neutral_head
from gafext.heads.render import Renders, head_normals, render

__all__ = [
    "TEST_IDENTITIES",
    "TRAIN_IDENTITIES",
    "Heads",
    "Renders",
    "head_normals",
    "make_heads",
    "neutral_head",
    "render",
]
