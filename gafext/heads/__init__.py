"""Procedural heads: training and test data of the bundled model, and its default normal maps."""

# ruff: noqa: F401  names of the package
from gafext.heads.identity import TEST_IDENTITIES, TRAIN_IDENTITIES, Heads, make_heads, neutral_head
from gafext.heads.render import Renders, head_normals, head_surface, render
